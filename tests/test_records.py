"""Records: what is kept, what makes them old, tables, curves and pairs."""

import pytest

from diffcourse import records as rc


def record(seed=0, value=1.0, **more):
    return {"model": "m", "solver": "s", "grid": "uniform", "steps": 10, "nfe": 10, "train_seed": seed, "seeds": "0-9",
            "value": value, "floor": 0.5, "n": 10, "device": "D", "date": "2026-01-02",
            "made": rc.versions(["data", "Euler"]), **rc._judged(), **more}


def test_records_come_back(tmp_path):
    for seed in range(3):
        rc.write_record("x", record(seed, 1.0 + seed), tmp_path)
    rc.write_record("x", record(1, 9.0), tmp_path)  # the same key: in its place
    found = rc.read_records("x", tmp_path)
    assert sorted(r["value"] for r in found) == [1.0, 3.0, 9.0]
    assert len(found.where(train_seed=[0, 2])) == 2 and not found.where(model="other")
    assert found.curves("nfe") == {"s": ([10], [pytest.approx(26 / 3)], [2.0], [18.0])}
    assert "8.67 ± 8.33" in repr(found.table("steps", "solver"))
    assert "recorded on D, 2026-01-02" in found.table("steps", "solver")._repr_html_()


def test_records_of_another_version_are_marked_and_not_mixed(tmp_path):
    rc.write_record("x", record(0, 1.0), tmp_path)
    rc.write_record("x", record(1, 100.0, made={"Euler": 0}), tmp_path)
    found = rc.read_records("x", tmp_path)
    assert [r["train_seed"] for r in found.old()] == [1]
    text = repr(found.table("steps", "solver"))
    assert "2.00" in text and "100" not in text.splitlines()[1] and "another version" in text
    only_old = found.where(train_seed=1)
    assert "200.00 †" in repr(only_old.table("steps", "solver"))
    assert list(only_old.curves("nfe")) == ["s †"]
    assert found.curves("nfe")["s"] == ([10], [2.0], [2.0], [2.0])
    with pytest.raises(ValueError, match="another version"):
        rc.pairs(only_old, found.where(train_seed=0))


def test_what_makes_a_record_old(monkeypatch):
    gone = record(made={"a family that is gone": 1})
    judged, drawn, kept = record(feature_hash="0"), record(reference_hash="0"), record()
    assert len(rc.Records([gone, judged, drawn, kept]).old()) == 3
    monkeypatch.setitem(rc.VERSIONS, "AB2", rc.VERSIONS["AB2"] + 1)
    assert not rc.Records([kept]).old()  # of another solver
    monkeypatch.setitem(rc.VERSIONS, "Euler", rc.VERSIONS["Euler"] + 1)
    assert rc.Records([kept]).old()


def test_a_family_that_does_not_exist():
    with pytest.raises(ValueError, match="no family .'Eular'.; there are .*'Euler'"):
        rc.versions(["Eular", "data"])


def test_pairs(tmp_path):
    a = rc.Records(record(s, v) for s, v in enumerate((1.0, 2.0, 3.0)))
    b = rc.Records(record(s, v) for s, v in enumerate((2.0, 2.5, 3.5)))
    (p,) = rc.pairs(a, b)
    assert p.at == 10 and p.differences == [-2.0, -1.0, -1.0] and p.verdict == "better"
    assert rc.pairs(b, a)[0].verdict == "worse"
    mixed = rc.Records([*a[:2], record(2, 4.0)])
    assert rc.pairs(mixed, b)[0].verdict == "undecided"
    assert rc.pairs(a, rc.Records([record(0, nfe=7)])) == []


def test_the_mean_over_sets_of_noise():
    made = [record(s, v) | {"seeds": e} for s in (0, 1) for e, v in (("1000-1999", 1.0 + s), ("2000-2999", 4.0))]
    other = record(0, 9.0) | {"made": {"Euler": 0}, "seeds": "3000-3999"}
    means = rc.Records([*made, other]).averaged()
    assert [r["value"] for r in means] == [2.5, 3.0, 9.0]  # of other code: never in the same mean
    assert [r["noises"] for r in means] == [2, 2, 1] and means[0]["seeds"] == "1000-1999, 2000-2999"


@pytest.mark.parametrize("line", ["{", "[]", '{"value": 1}', '{"value": 1, "made": "x"}', "null"])
def test_a_damaged_record(tmp_path, line):
    rc.write_record("x", record(), tmp_path)
    with open(tmp_path / "x.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match="line 2 is no record"):
        rc.read_records("x", tmp_path)


def test_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="make results"):
        rc.read_records("x", tmp_path)
