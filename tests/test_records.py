"""Records: what is kept, what makes them old, tables, curves and pairs."""

import pytest

from diffcourse import records as rc


def record(seed=0, value=1.0, **more):
    return {"model": "m", "solver": "s", "grid": "uniform", "steps": 10, "nfe": 10, "train_seed": seed, "seeds": "0-9",
            "value": value, "floor": 0.5, "n": 10, "device": "D", "date": "2026-01-02",
            "made": rc.versions(["data", "Euler"]), **rc._judged("digits"), **more}


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
    assert "1 records of another version are left out" in text and "†" not in text


def test_another_protocol_never_stands_in_one_table(tmp_path):
    "Before 2026-11-26 distances were not weighted to the classes: judge 1."
    before = record(0, 50.0, steps=20, solver="old", made={"judge": 1, "Euler": 1})
    for r in (record(0, 1.0), record(1, 1.5), before):
        rc.write_record("x", r, tmp_path)
    found = rc.read_records("x", tmp_path)
    both, old = (repr(f.table("steps", "solver")) for f in (found, found.where(steps=20)))
    assert "100.00" not in both and "old" not in both and "left out" in both
    assert "100.00 †" in old and "another version" in old
    assert list(found.curves("nfe")) == ["s"] and list(found.old().curves("nfe")) == ["old †"]


def test_lost_classes_are_marked(tmp_path):
    rc.write_record("x", record(0, 1.0, lost=[3]), tmp_path)
    table = rc.read_records("x", tmp_path).table("steps", "solver")
    assert "2.00 ‡" in repr(table) and "a class was lost" in table.note


def test_mnist_is_judged_by_its_own_judge():
    own = record(task="mnist28")
    assert rc.Records([own]).old() and not rc.Records([own | rc._judged("mnist28")]).old()
    assert rc.Records([own | rc._judged("mnist28") | {"feature_hash": "0"}]).old()


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
