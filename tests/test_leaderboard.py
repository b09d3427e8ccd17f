"""The leaderboard: what is on it, its levels and verdicts against arithmetic, costs, break-even, the texts, the poster; README.md's table."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from diffcourse import leaderboard as lb
from diffcourse import records as rc
from diffcourse.experiments import EXPERIMENTS, MODELS, NOISES, TRAIN_SEEDS
from diffcourse.inference import LEAST, effect
from test_experiments import measured

ROOT = Path(__file__).resolve().parents[1]
F, NOW = 0.5, {"made": rc.versions(["unet"]), **rc._judged("digits")}


def rows(model, solver, nfe, mean, training=0.1, noise=0.1, paid=100, size=10, seconds=None, trainings=LEAST, grid="uniform"):
    "A record for each training and set of noise; `mean` in multiples of F, the luck of both added up."
    luck = [-2, -1, 0, 1, 2]
    rest = 0.01 * np.random.default_rng([*model.encode(), nfe]).standard_normal((trainings, LEAST))
    own = dict(model=model, solver=solver, grid=grid, steps=nfe, nfe=nfe, floor=F, n=1000, class_error=0.05, memorisation=1.0,
               seconds=seconds or nfe / 10, parameters=size, total_seconds=paid, total_images=1000 * paid, device="a machine",
               date="2026-11-26", **NOW)
    return [own | {"train_seed": s, "seeds": f"{n}000", "value": F * (mean + training * luck[s] + noise * luck[n] + rest[s, n])}
            for s in range(trainings) for n in range(LEAST)]


SMALL = {
    "04_flow": [*rows("flow", "Euler()", 5, 9), *rows("flow", "Heun()", 5, 1, trainings=2)],
    "06_distill": [*(r for n, m in ((1, 99), (2, 20), (5, 6), (10, 4)) for r in rows("flow", "AB2()", n, m, paid=100)),
                   *(r for n, m in ((1, 98), (2, 18), (5, 5), (10, 3.5)) for r in rows("control", "AB2()", n, m, paid=150)),
                   *rows("distilled 5", "Euler()", 5, 3, paid=120), *rows("distilled 10", "Euler()", 10, 4.2, paid=140),
                   *rows("distilled 5 compact", "Euler()", 5, 5.0, paid=200, size=5, seconds=0.1)],
    "07_one_step": [*rows("meanflow", "MeanFlow()", 1, 30, paid=300), *rows("meanflow", "MeanFlow()", 2, 3.4, paid=300)],
}


def written(folder, records):
    for name in lb.BOARD:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records.get(name, [])))
    edition = (rc.results_folder() / "first_edition.jsonl").read_text()
    (folder / "first_edition.jsonl").write_text(edition)
    return folder


@pytest.fixture
def small(tmp_path):
    return written(tmp_path, SMALL)


def test_what_counts(small):
    "Only what has all trainings and noises; a hole in the table is no full table."
    names = {m.name for m in lb.methods(small)}
    assert "flow, AB2" in names and "flow, Heun" not in names and len(names) == 7
    lines = (small / "06_distill.jsonl").read_text().splitlines(keepends=True)
    (small / "06_distill.jsonl").write_text("".join(lines[:-1]))  # one cell of the compact student is missing
    assert "distilled 5 compact" not in {m.name for m in lb.methods(small)}


def test_records_of_another_version_are_not_on_the_board(tmp_path):
    old = {k: [r | {"made": {"unet": 0}} if r["model"] == "distilled 5" else r for r in own] for k, own in SMALL.items()}
    assert "distilled 5" not in {m.name for m in lb.methods(written(tmp_path, old))}


def test_what_a_method_says(small):
    of = {(m.name, m.nfe): m for m in lb.methods(small)}
    one = of["distilled 5", 5]
    table = np.array([[r["value"] / F for r in one.records if r["train_seed"] == s] for s in range(5)])
    assert one.level.value == pytest.approx(table.mean()) and one.level.error == pytest.approx(effect(table).error)
    assert one.seconds == pytest.approx(0.5) and of["distilled 5 compact", 5].seconds == pytest.approx(0.1)  # another network
    assert of["flow, AB2", 5].seconds == pytest.approx(0.5)
    assert {m.model for m in of.values() if m.student} == {"distilled 5", "distilled 10", "distilled 5 compact", "meanflow"}
    plain = {m for m in MODELS if not lb.Method(m, "Euler()", "uniform", 1, []).student}
    assert all("control" in m or not MODELS[m].parent or m == "drift from scratch" for m in plain)


def test_duels_are_differences_of_tables(small):
    first, long = lb.duels("teacher", small), lb.duels("long", small)
    of = {e.name: e for e in first}
    assert of["NFE 5: distilled 5 – flow, AB2"].value == pytest.approx(-3, abs=0.02)
    assert of["NFE 5: distilled 5 – flow, AB2"].verdict == "better" and of["NFE 1: meanflow – flow, AB2"].value == pytest.approx(-69, abs=0.02)
    assert {e.name.split("– ")[1] for e in long} == {"flow, AB2"} and len(long) == len(lb.students(small)) == 5
    assert {e.name: e.verdict for e in long}["NFE 10: distilled 10 – flow, AB2"] == "equal"  # half a floor is the margin


def test_who_is_met_at_equal_cost(small):
    by = {kind: {e.name.split(":")[1].split(" – ")[0].strip(): e.name.split(" – ")[1] for e in lb.duels(kind, small)}
          for kind in ("seconds", "images")}
    assert by["seconds"] == by["images"]  # here a second sees a thousand images
    assert by["seconds"]["distilled 5"] == "control, AB2"  # the teacher cost less than this student
    assert {"distilled 5 compact", "meanflow"}.isdisjoint(by["seconds"])  # nobody cost as much
    with pytest.raises(ValueError, match="kind = 'price': 'rival'"):
        lb.duels("price", small)


def test_champions_and_answer(small):
    found = lb.champions(small)
    assert {n: m.name for n, (m, *_) in found.items()} == {1: "meanflow", 2: "meanflow", 5: "distilled 5", 10: "distilled 10"}
    assert lb.answer(small).endswith("The best student is better at 5. At 1 the only student, meanflow, is better. At 2 the only student, meanflow, is better. "
                                     "At 10 the only student, distilled 10, is worse.")


def test_a_lost_class_is_marked_and_nothing_to_compare_with(tmp_path):
    lost = {k: [r | {"lost": [7]} if r["nfe"] == 1 and r["model"] == "control" else r for r in own] for k, own in SMALL.items()}
    folder = written(tmp_path, lost)
    assert lb.answer(folder).endswith("distilled 10, is worse. At 1 the undistilled flow loses whole classes: there is nothing to compare with.")
    assert [r[2] for r in lb.leaderboard(folder).rows if "‡" in r[2]] == ["control, AB2 ‡"]


def test_baselines_beside_the_board(small):
    made = [*rows("copies of training images", "", 0, 0.5), *rows("a mixture of 30 Gaussians", "", 0, 3.75)]
    text = "".join(json.dumps(r | {"memorisation": 0.0 if "copies" in r["model"] else 1.0}) + "\n" for r in made)
    (small / "08_baselines.jsonl").write_text(text)
    table = lb.baselines(small)
    assert [r[0] for r in table.rows] == ["copies of training images", "a mixture of 30 Gaussians"]
    assert table.rows[0][4].endswith("copies") and table.rows[0][5] == "14 of 14" and not table.rows[1][4].endswith("copies")
    ahead = sum(m.level.value > 3.75 for m in lb.methods(small))
    assert table.rows[1][5] == f"{ahead} of 14"


def test_a_method_that_is_not_there(small):
    with pytest.raises(ValueError, match=r"no flow with AB2\(\) at NFE 7 on the board; there are \[\]"):
        lb.method("flow", "AB2()", 7, small)
    with pytest.raises(FileNotFoundError, match="make results"):
        lb.methods(small / "nowhere")


def test_break_even(small):
    of = {(m.name, m.nfe): m for m in lb.methods(small)}
    instead, n = lb.breakeven(of["distilled 5", 5], small)
    assert instead is None and n is None  # nothing undistilled is as good
    instead, n = lb.breakeven(of["distilled 5 compact", 5], small)
    assert (instead.name, instead.nfe) == ("control, AB2", 5)  # as good, and the cheapest of these
    assert n == round(1000 * (200 - 150) / (0.5 - 0.1), -2)


def test_what_may_be_worse_does_not_replace_a_student(tmp_path):
    "Undecided is not as good: a difference within the luck, beyond the margin."
    vague = rows("control", "AB2()", 5, 3.4, training=0.6, paid=150)
    found = SMALL | {"06_distill": [r for r in SMALL["06_distill"] if (r["model"], r["nfe"]) != ("control", 5)] + vague}
    folder = written(tmp_path, found)
    (one,) = [m for m in lb.students(folder) if m.name == "distilled 5"]
    (e,) = lb.compare({"": (lb.method("control", "AB2()", 5, folder).records, one.records)})
    assert e.verdict == "undecided" and lb.breakeven(one, folder)[0] is None


def test_table(small):
    table = lb.leaderboard(small)
    assert [r[0] for r in table.rows] == sorted((r[0] for r in table.rows), key=int)
    assert all(len(r) == len(table.head) for r in table.rows) and "a machine, 2026-11-26" in table.note
    (row,) = [r for r in table.rows if r[2] == "distilled 5"]
    assert row[1] == "student" and row[3].startswith("3.0") and row[7:] == ["120", "120k", "0.5"]


def test_verdicts_that_moved(small):
    table = lb.moved(small)
    assert [r[0] for r in table.rows] == ["1", "2", "4", "5", "10"]
    assert table.rows[0][1] == "drift: better" and table.rows[0][2] == "meanflow: better" and table.rows[2][2] == "–"


# -- the poster ---------------------------------------------------------------

def boxes(fig):
    "Where the texts and the panels are, as (x0, y0, x1, y1) of the sheet."
    whole = fig.bbox
    found = [*fig.texts, *(ax.get_tightbbox() for ax in fig.axes)]
    for b in (t.get_window_extent() if hasattr(t, "get_text") else t for t in found):
        yield b.x0 / whole.width, b.y0 / whole.height, b.x1 / whole.width, b.y1 / whole.height


def test_poster(small, tmp_path, capsys):
    fig = lb.poster(tmp_path / "new" / "poster", 40, small)
    assert ET.parse(tmp_path / "new" / "poster.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "new" / "poster.png").read_bytes()[:4] == b"\x89PNG"
    found = list(boxes(fig))
    for a in found:
        assert min(a) > 0 and max(a) < 1, "on the sheet"
    for i, a in enumerate(found):
        for b in found[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], f"{a} overlaps {b}"
    once = (tmp_path / "new" / "poster.svg").read_text()
    lb.main([str(tmp_path / "again"), "--records", str(small), "--dpi", "40"])
    assert (tmp_path / "again.svg").read_text() == once
    assert "again.png" in capsys.readouterr().out


def test_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "diffcourse.leaderboard", *arguments], cwd=ROOT, capture_output=True, text=True)

    assert "--records" in run("--help").stdout
    done = run(str(tmp_path / "poster"), "--records", str(tmp_path))
    assert done.returncode == 1 and "make results" in done.stderr and "Traceback" not in done.stderr


# -- the committed records ----------------------------------------------------

def test_every_student_has_its_rivals():
    for m in lb.students():
        for model in lb.LADDER:
            other = lb.rival(m.nfe, model)
            assert {r["train_seed"] for r in other.records} == {r["train_seed"] for r in m.records} == {*TRAIN_SEEDS}
            assert len(other.records) == len(m.records) == len(TRAIN_SEEDS) * len(NOISES)
    assert not [m for m in lb.methods() if m.records.old()]
    known = {(r.model, r.solver, r.grid, r.steps) for name in lb.BOARD for r in EXPERIMENTS[name]}
    assert {m.model for m in lb.methods()} <= {k[0] for k in known}


def test_readme_table(small):
    text = lb.readme_table(small)
    found = [r for r in text.splitlines() if r.startswith("|")]
    assert len(found) == 2 + len(lb.champions(small))
    assert {r.count("|") for r in found} == {7}
    assert not list(measured(text))


def test_readme_has_the_table_of_the_records():
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- leaderboard -->\n(.*?)\n<!-- /leaderboard -->", readme, re.S)
    assert found, "README.md has no marks <!-- leaderboard --> and <!-- /leaderboard -->"
    assert found[1].strip() == lb.readme_table(), "python -m diffcourse.leaderboard --readme prints it"
