"""The leaderboard: which records count, the hardest rival, the frontier, the texts, the poster; README.md's table."""

import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import product
from pathlib import Path

import pytest

from diffcourse import leaderboard as lb
from diffcourse import records as rc
from diffcourse.experiments import TRAIN_SEEDS
from test_experiments import measured

ROOT = Path(__file__).resolve().parents[1]
F, NOW = 0.5, {"made": rc.versions(["unet"]), **rc._judged()}


def record(model, solver, nfe, values, grid="uniform", seeds="1000-1999", seconds=None, **more):
    "One record a training seed; `values` in multiples of F."
    own = dict(model=model, solver=solver, grid=grid, steps=nfe, nfe=nfe, seeds=seeds, floor=F, n=500, kid=0.1, kid_error=0.01,
               seconds=seconds or nfe / 10, device="a machine", date="2026-11-23", **NOW)
    return [own | {"train_seed": s, "value": v * F} | more for s, v in enumerate(values)]


SMALL = {
    "04_flow": [*record("flow", "Euler()", 5, (3, 3, 3)), *record("flow", "Euler()", 1, (200, 210, 220)),
                *record("flow", "AB2()", 5, (1.0, 2.0, 3.0)), *record("flow", "AB2()", 10, (1.1, 1.1, 1.1))],
    "05_screening": record("flow", "AB2()", 5, (0.1, 0.1, 0.1), grid="cosine", seeds="0-499"),
    "05_solvers": [*record("flow", "Heun()", 5, (0.1, 0.1)), *record("flow", "AB2()", 2, (9, 9, 9))],
    "06_distill": [*record("control", "AB2()", 5, (2.0, 1.0, 2.5)), *record("distilled 5", "Euler()", 5, (0.9, 0.9, 0.9)),
                   *record("distilled 5 compact", "Euler()", 5, (1.5, 1.5, 1.5), seconds=0.2, parameters=9),
                   *record("control", "Euler()", 1, (100, 110, 120))],
    "07_one_step": [*record("control", "Euler()", 1, (100, 110, 120)), *record("control", "Euler()", 1, (80, 90, 100), seeds="2000-2999"),
                    *record("drift", "Euler()", 1, (2, 2, 2)), *record("drift", "Euler()", 1, (4, 4, 4), seeds="2000-2999"),
                    *record("meanflow scratch", "MeanFlow()", 2, (5, 9, 13))],
}


def written(folder, records):
    for name in lb.EXPERIMENTS:
        lines = [json.dumps(r) + "\n" for r in records.get(name, [])]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def one_noise(request, monkeypatch):
    if "small" in request.fixturenames or "tmp_path" in request.fixturenames:
        monkeypatch.setattr(lb, "BLOCKS", 1)


@pytest.fixture
def small(tmp_path):
    return written(tmp_path, SMALL)


def test_what_was_scored_on_fewer_noises_is_shown_and_not_compared(small, monkeypatch):
    monkeypatch.setattr(lb, "BLOCKS", 2)
    rivals, students = lb.best(1, small)
    assert [m.name for m in rivals + students] == ["control, Euler", "drift"]
    assert lb.best(5, small) == ([], [])
    behind = [m.name for m in lb.best(1, small, every=True)[0]]
    assert behind == ["control, Euler", "flow, Euler"]  # although it has the smaller mean of noises it saw, the first has more
    assert {m.nfe for m in lb.frontier(folder=small)} == {1}


def test_what_counts(small):
    "No screening, no row of two seeds, and a record of two experiments once."
    found = lb.final_records(small)
    assert not [r for r in found if r["seeds"] == "0-499"]
    assert len(found.where(model="control", nfe=1)) == 6  # three trainings, two noises
    names = {m.name for m in lb.methods(small)}
    assert "flow, AB2" in names and "flow, Heun" not in names and "flow, AB2, cosine" not in names


def test_a_file_that_changed_is_read_again(small):
    before = len(lb.methods(small))
    rc.write_record("04_flow", record("flow", "RK4()", 20, (1, 1, 1))[0], small)
    for r in record("flow", "RK4()", 20, (1, 1, 1)):
        rc.write_record("04_flow", r, small)
    assert len(lb.methods(small)) == before + 1


def test_what_a_method_says(small):
    of = {(m.name, m.nfe): m for m in lb.methods(small)}
    drift = of["drift", 1]  # noises averaged first
    assert drift.fd == pytest.approx(3) and drift.cells[0] == "3.00 ± 0.00"
    assert drift.seconds == pytest.approx(0.2)  # 0.1 s for 500 images and one evaluation
    small_one = of["distilled 5 compact", 5]  # 0.2 s for 500 and five, another network
    assert small_one.seconds == pytest.approx(0.4) and of["flow, AB2", 5].seconds == pytest.approx(1.0)
    assert of["flow, AB2", 5].cells[0] == f"2.00 ± {statistics.stdev([1, 2, 3]):.2f}"
    assert of["distilled 5 compact", 5].parameters == 9 and of["flow, AB2", 5].parameters == 687_297
    students = {m.model for m in of.values() if m.student}
    assert students == {"distilled 5", "distilled 5 compact", "drift", "meanflow scratch"}
    plain = {m for m in lb.MODELS if not lb.Method(m, "Euler()", "uniform", 1, []).student}
    assert plain == {*list(lb.MODELS)[:6], "control", "control 512"}  # trained for longer is not trained for few evaluations


def test_best_is_sorted_by_the_mean(small):
    rivals, students = lb.best(5, small)
    assert [m.name for m in rivals] == ["control, AB2", "flow, AB2", "flow, Euler"]
    assert [m.name for m in students] == ["distilled 5", "distilled 5 compact"]


def test_the_rival_is_the_hardest_of_each_seed(small):
    found = lb.versus(5, small)
    assert [m.name for m in found.rivals] == ["flow, AB2", "control, AB2", "control, AB2"]
    assert found.pairs.differences == pytest.approx([-0.1, -0.1, -1.6])
    assert found.pairs.verdict == "undecided" and "ahead in 3 of 3 trainings, undecided" in str(found)


def test_only_shared_noise_is_paired(small):
    found = lb.versus(1, small)
    assert [m.name for m in found.rivals] == ["control, Euler"] * 3
    assert found.pairs.differences == pytest.approx([3 - 90, 3 - 100, 3 - 110])
    more = [r | {"seeds": "3000-3999", "value": 1e-3} for r in record("drift", "Euler()", 1, (1, 1, 1))]
    for r in more:  # a noise that no rival has seen
        rc.write_record("07_one_step", r, small)
    assert lb.versus(1, small).pairs.differences == pytest.approx([3 - 90, 3 - 100, 3 - 110])


def test_a_student_that_loses_is_said_to_lose(small):
    for r in record("flow", "Midpoint()", 2, (1, 5, 9)):
        rc.write_record("05_solvers", r, small)
    found = lb.versus(2, small)
    assert found.pairs.differences == pytest.approx([4, 4, 4]) and "loses to" in str(found)
    assert "worse at 2" in lb.answer((2, 1), small)


def test_without_a_student(small):
    with pytest.raises(ValueError, match=r"0 students named 'drift 55' at NFE 5; there are \['distilled 5', 'distilled 5 compact'\]"):
        lb.versus(5, small, model="drift 55")
    with pytest.raises(ValueError, match="cost = 'time': 'nfe' or 'seconds'"):
        lb.frontier("time", folder=small)
    with pytest.raises(ValueError, match=r"0 students at NFE 10; there are students at \[1, 2, 5\]"):
        lb.versus(10, small)


def test_without_a_rival(small, monkeypatch):
    rivals, students = lb.best(5, small)
    assert rivals
    monkeypatch.setattr(lb, "best", lambda *_: ([], students))
    with pytest.raises(ValueError, match=r"no undistilled row at NFE 5; there are some at \[1, 2, 5"):
        lb.versus(5, small)


def test_two_versions_are_not_mixed(tmp_path):
    old = {k: [r | {"made": {"unet": 0}} if r["model"] == "flow" else r for r in own] for k, own in SMALL.items()}
    folder = written(tmp_path, old)
    with pytest.raises(ValueError, match="make results"):
        lb.versus(5, folder)
    table = lb.leaderboard((10,), folder=folder)
    assert "†" in table.rows[0][3] and "make results" in table.note


def test_missing_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="make results"):
        lb.methods(tmp_path)


@pytest.mark.parametrize("cost", ["nfe", "seconds"])
def test_frontier_by_its_definition(small, cost):
    board = lb.methods(small)
    price = lambda m: getattr(m, cost)
    beaten = {id(a) for a, b in product(board, board) if price(b) <= price(a) and b.fd < a.fd}
    kept = lb.frontier(cost, folder=small)
    assert {id(m) for m in kept} == {id(m) for m in board} - beaten
    assert [price(m) for m in kept] == sorted({price(m) for m in kept})


def test_matched_and_answer(small):
    assert lb.matched(5, small) == 5  # its three trainings scatter too much for a verdict
    assert lb.matched(1, small) == 5
    with pytest.raises(ValueError, match="0 students at NFE 10"):
        lb.matched(10, small)
    said = lb.answer((5, 1), small)
    assert said == ("Against the hardest undistilled rival at the same number of evaluations, the verdict on the best student is "
                    "undecided at 5, better at 1. The fewest evaluations at which the hardest undistilled rivals are no longer shown to be behind: "
                    "5 in place of 5 and 5 in place of 1.")
    assert lb.answer(folder=small).count("in place of") == 3  # 5, 2 and 1: where there are students


def test_a_student_that_no_rival_reaches(tmp_path):
    rows = {"04_flow": [*record("flow", "Euler()", 5, (3, 3, 3)), *record("flow", "AB2()", 10, (1.1, 1.1, 1.1))],
            "06_distill": record("distilled 5", "Euler()", 5, (0.9, 0.9, 0.9))}
    folder = written(tmp_path, rows)
    assert lb.matched(5, folder) is None and "more than we tried in place of 5" in lb.answer(folder=folder)


def test_table(small):
    table = lb.leaderboard((1, 5, 10), rivals=2, folder=small)
    kinds = [(r[0], r[1]) for r in table.rows]
    assert kinds == [*[("1", "undistilled")] * 2, ("1", "student"), *[("5", "undistilled")] * 2, *[("5", "student")] * 2, ("10", "undistilled")]
    assert all(len(r) == len(table.head) for r in table.rows)
    assert "a machine, 2026-11-23" in table.note and "†" not in table.note


# -- the poster ---------------------------------------------------------------

def boxes(fig):
    "Where the texts and the panels are, as (x0, y0, x1, y1) of the sheet."
    whole = fig.bbox
    found = [*fig.texts, *(ax.get_tightbbox() for ax in fig.axes)]
    for b in (t.get_window_extent() if hasattr(t, "get_text") else t for t in found):
        yield b.x0 / whole.width, b.y0 / whole.height, b.x1 / whole.width, b.y1 / whole.height


def test_poster(small, tmp_path, capsys):
    long = "meanflow logit-normal p1"  # the longest name
    for n, solver in ((5, "MeanFlow()"), (2, "MeanFlow()"), (1, "MeanFlow()")):
        for r in record(long, solver, n, (0.81234, 0.81234, 0.8)):
            rc.write_record("07_one_step", r, small)
    for r in record("flow", "AB2()", 2, (111.1, 121.1, 131.1)):
        rc.write_record("05_solvers", r, small)
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

def test_every_nfe_has_an_undistilled_row_of_three_trainings():
    for n in lb.NFES:
        rivals, _ = lb.best(n)
        assert rivals and all({r["train_seed"] for r in m.records} == {*TRAIN_SEEDS} for m in rivals)
    assert not [m for m in lb.methods() if m.records.old()]


@pytest.mark.parametrize("n", lb.NFES)
def test_no_rival_is_left_off_the_board(n):
    "Whoever is best on the noises that all have met, in one training or in the mean, was scored on the others too."
    def least(methods, seeds):
        mine = dict(seeds="1000-1999", train_seed=seeds)
        return min(sum(r["value"] for r in m.records.where(**mine)) for m in methods)

    alone = [[0], [1], [2]] if lb.best(n)[1] else []  # a student meets the hardest rival of each training
    for seeds in [*alone, [0, 1, 2]]:
        assert least(lb.best(n)[0], seeds) <= least(lb.best(n, every=True)[0], seeds)


def test_readme_table(small):
    text = lb.readme_table(small)
    rows = [r for r in text.splitlines() if r.startswith("|")]
    assert len(rows) == 2 + len(lb.NFES)
    assert {r.count("|") for r in rows} == {7}
    assert not list(measured(text))


def test_readme_has_the_table_of_the_records():
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- leaderboard -->\n(.*?)\n<!-- /leaderboard -->", readme, re.S)
    assert found, "README.md has no marks <!-- leaderboard --> and <!-- /leaderboard -->"
    assert found[1].strip() == lb.readme_table(), "python -m diffcourse.leaderboard --readme prints it"
