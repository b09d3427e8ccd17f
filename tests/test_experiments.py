"""`make results`: what is to do, an interruption, one record made again, and no measured number typed into the text."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffcourse import evaluation as ev
from diffcourse import experiments as ex
from diffcourse import recording as rg
from diffcourse import records as rc
from diffcourse.inference import LEAST
from diffcourse.unet import UNet
from test_front_matter import sources

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = {"TwoStage()", "Multistep()"}  # solvers made for a network


def test_experiments_are_what_the_book_says():
    for name, rows in ex.EXPERIMENTS.items():
        assert len(set(rows)) == len(rows), name
        for row in rows:
            assert row.model in ex.MODELS and row.grid in ex.GRIDS
            assert row.solver in CHOSEN or hasattr(ex.solver_of(row.solver, ex.uniform(row.steps)), "step")
            assert row.seeds in ex.NOISES
    assert len(ex.TRAIN_SEEDS) >= LEAST and len(set(ex.NOISES)) >= LEAST and min(ex.NOISES)[0] >= 1000
    with pytest.raises(ValueError, match="must not teach"):  # no noise of the report makes pairs
        rg.make_pairs(rg.Denoiser(UNet(), ex.FlowMatching().path, "flow"), 2, max(ex.NOISES)[1] - 1)


def test_recipes_name_models_that_exist_and_differ():
    for name, recipe in ex.MODELS.items():
        before = {recipe.parent, recipe.teacher, recipe.pairs} - {None}
        assert before <= set(ex.MODELS) - {name} and recipe.start in ex.STARTS
        assert {ex.MODELS[m].task for m in before} <= {recipe.task}  # no teacher of other images
        assert recipe.start.startswith("fresh") == (recipe.parent is None)
    prints = [ex.identity(m) for m in ex.MODELS]
    assert len(set(prints)) == len(prints)


def test_other_pairs_are_another_training(monkeypatch):
    before = {m: ex.identity(f"mnist28/{m}") for m in ("regression", "drift", "control")}
    monkeypatch.setitem(ex.PAIRS, "grid", ex.uniform(3))
    changed = {m for m, was in before.items() if ex.identity(f"mnist28/{m}") != was}
    assert changed == {"regression", "drift"}  # drift starts from the regression


def test_another_network_of_a_task_is_another_model(monkeypatch):
    before = {m: ex.identity(m) for m in ("flow", "mnist28/flow", "mnist28/halved 1")}
    monkeypatch.setitem(ex.task("mnist28").network, "base", 20)
    assert {m for m, was in before.items() if ex.identity(m) != was} == {"mnist28/flow", "mnist28/halved 1"}


def test_students_come_after_their_teachers():
    order = [row.model for _, row, seed in rg.todo(again=True) if seed == 0]
    for name, recipe in ex.MODELS.items():
        for before in {recipe.parent, recipe.teacher, recipe.pairs} & set(order):
            assert name not in order or order.index(before) < order.index(name)


def behind(model, solver="Euler()", steps=5, grid="uniform"):
    return ex.made_by(ex.Row(model, solver, steps, grid)).keys() - set(ex.COMMON)


def test_the_families_behind_a_row():
    assert set(ex.COMMON) <= ex.made_by(ex.Row("flow", "Euler()", 5)).keys()
    assert behind("flow") == {"FlowMatching", "Euler", "grid uniform"}
    assert behind("v cosine", "DPMSolver(3)", 4, "clipped") == {"DenoisingLoss", "DPMSolver", "grid clipped"}
    assert behind("distilled 5") == {"FlowMatching", "Distillation", "Euler", "grid uniform"}
    crowd = {"FlowMatching", "PairRegression", "Drift", "pairs", "AB2"}  # the solver that makes the pairs
    assert behind("mnist28/drift", steps=1) == crowd | {"Euler", "grid uniform"}


def test_raising_a_version_makes_the_records_behind_it_out_of_date(monkeypatch):
    every = [(n, row) for n, rows in ex.EXPERIMENTS.items() for row in rows]
    for family, wanted in (("MeanFlowLoss", lambda r: "meanflow" in r.model), ("grid late", lambda r: r.grid == "late"),
                           ("MeanFlow", lambda r: r.solver == "MeanFlow()")):
        with monkeypatch.context() as m:
            m.setitem(rc.VERSIONS, family, 99)
            assert {(n, r) for n, r, _ in rg.todo()} == {(n, r) for n, r in every if wanted(r)} != set()


def test_where_a_class_is_defined_does_not_count(monkeypatch):
    before = {m: ex.identity(m) for m in ex.MODELS}
    for kind in (ex.Distillation, ex.FlowMatching, ex.Intervals, ex.Recipe):
        monkeypatch.setattr(kind, "__module__", "diffcourse.elsewhere")
    assert {m: ex.identity(m) for m in ex.MODELS} == before


def test_a_new_option_with_its_default_is_no_new_recipe(monkeypatch):
    from dataclasses import make_dataclass

    wider = make_dataclass("LogitNormal", [("low", float, 0.0)], bases=(ex.LogitNormal,), frozen=True)
    before = ex.identity("flow logit-normal")
    monkeypatch.setitem(ex.MODELS["flow logit-normal"].options, "times", wider())
    assert ex.identity("flow logit-normal") == before
    monkeypatch.setitem(ex.MODELS["flow logit-normal"].options, "times", wider(low=0.1))
    assert ex.identity("flow logit-normal") != before


def test_a_student_of_a_student_in_a_few_iterations(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    monkeypatch.setitem(ex.PAIRS, "grid", ex.uniform(2))
    row = ex.Row("regression", "Euler()", 1, seeds=(2000, 2066))
    made = rg.run_row("04_flow", row, 0, 2)
    assert made["nfe"] == 1 and made["seeds"] == "2000-2065" and made["train_steps"] == 2
    assert made["made"]["PairRegression"] == rc.VERSIONS["PairRegression"] and "--seeds 2000-2065" in made["command"]
    assert sorted(p.name for p in tmp_path.glob("runs/results/*-0")) == ["flow-0", "regression-0"]
    assert made["total_images"] == 2 * 2 * 64 + 64 and made["total_seconds"] > made["train_seconds"]
    rg._train.cache_clear()  # fetched from the disk
    assert rg.run_row("04_flow", row, 0, 2)["value"] == made["value"]


def test_every_recipe_trains(tmp_path, monkeypatch):
    "Each of MNIST for one iteration, with the images of digits and a network of their size."
    import dataclasses

    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    monkeypatch.setitem(ex.PAIRS, "grid", ex.uniform(2))
    small = dataclasses.replace(ex.task("digits"), network=dict(base=8))
    monkeypatch.setattr(rg, "task", lambda name: small)
    for name, recipe in ex.MODELS.items():
        if recipe.task == "mnist28":
            den, about = rg.train(name, 0, 1)
            assert about["train_steps"] == 1 and about["recipe"] == ex.identity(name)
            assert den.net.config()["second_time"] == (recipe.loss is ex.MeanFlowLoss)
            paid = rg.cost(name, 0, 1)
            own = [ex.MODELS[m] for m in ex.lineage(name)]
            assert paid["total_images"] == sum(r.batch for r in own) + 64 * any(r.pairs for r in own)


def test_a_single_step_solver_that_no_budget_has():
    with pytest.raises(ValueError, match=r"DPMSolver\(3\) takes \[2, 4\] steps"):
        ex.solver_of("DPMSolver(3)", ex.uniform(5))


@pytest.mark.parametrize("solver, steps, nfe", [("TwoStage()", 1, 2), ("Multistep()", 5, 5)])
def test_a_solver_is_chosen_for_the_network_of_a_row(solver, steps, nfe, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    monkeypatch.setattr(ex, "CHOICE", (0, 4))
    made = rg.run_row("04_flow", ex.Row("flow", solver, steps, seeds=(1000, 1066)), 0, 2)
    assert made["nfe"] == nfe and made["made"][solver[:-2]] == rc.VERSIONS[solver[:-2]]
    assert ex.CHOICE[1] <= min(min(s) for s in ex.NOISES)  # it has seen no noise of the report


def test_the_matrix_is_recorded_network_by_network(tmp_path, monkeypatch):
    from diffcourse.matrix import CAST, ENTRIES, Cell

    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    every, asked = [("faces32/flow", 0, (1000, 1002)), ("faces32/flow", 0, (1002, 1004))], []

    def small(den, shape, seeds):
        asked.append((*shape, *seeds))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [Cell("AB2", "even, 1 to 0", 10, 0.25, 0.3), Cell("Euler", "even, 1 to 0", 10, 0.5, 0.6)]

    monkeypatch.setattr(rg, "_networks", lambda: every)
    monkeypatch.setattr(rg, "matrix", small)
    with pytest.raises(KeyboardInterrupt):
        rg.make_results([rg.MATRIX], folder=tmp_path)
    for _ in range(2):  # the second call finds nothing to do
        rg.make_results([rg.MATRIX], folder=tmp_path)
    assert asked == [(3, 32, 32, 1000, 1001), (3, 32, 32, 1002, 1003), (3, 32, 32, 1002, 1003)]
    found = rc.read_records(rg.MATRIX, tmp_path)
    assert [r["seeds"] for r in found] == ["1000-1001", "1002-1003"] and not found.old()
    assert found[0]["value"] == 0.25 and Cell(*found[0]["cells"][1]) == Cell("Euler", "even, 1 to 0", 10, 0.5, 0.6)
    assert set(ENTRIES) <= found[0]["made"].keys() and len(CAST) == 19


def test_every_record_is_committed():
    for name, rows in ex.EXPERIMENTS.items():
        found, seen = rc.read_records(name), 0
        for row in rows:
            for seed in ex.TRAIN_SEEDS:
                one = found.where(**ex.key(row), train_seed=seed)
                assert len(one) == 1, (name, row, seed)
                seen += 1
                assert one[0]["n"] == row.seeds[1] - row.seeds[0] == 1000
                assert one[0]["nfe"] == evaluations(row), (name, row)  # for one sample
                assert one[0]["command"] == ex.command(name, row, seed)
        assert seen == len(found), f"{name} has records of no row"


def test_a_choice_that_no_row_has(tmp_path, capsys):
    for slip in (dict(steps=7), dict(seeds="1000-2000"), dict(modle="flow")):
        with pytest.raises(ValueError, match="no row of .*--list"):
            rg.make_results(["04_flow"], folder=tmp_path, **slip)
    with pytest.raises(SystemExit):
        rg.main(["04_flow", "--steps", "7"])
    assert "no row of ['04_flow'] has {'steps': 7}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_choice_of_rows_leaves_the_floor_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(rg, "_work", lambda jobs, workers: iter(()))
    monkeypatch.setattr(rg, "estimate", lambda *_: 0.0)
    names = [*rg.UNTRAINED, *ex.EXPERIMENTS]
    rg.make_results(names, again=True, folder=tmp_path, model="control", seed=0)
    assert not list(tmp_path.iterdir())


def test_make_results_without_a_floor_says_so_before_it_trains(monkeypatch):
    def none():
        raise FileNotFoundError("no records '16_floor'")
    monkeypatch.setattr(rg, "floor", none)
    monkeypatch.setattr(rg, "_work", lambda *_: pytest.fail("it trained"))
    with pytest.raises(FileNotFoundError, match="16_floor"):
        rg.make_results(["04_flow"], again=True, seed=0)


def test_the_estimate_counts_ancestors_and_batches():
    assert ex.lineage("distilled 5") == {"distilled 5", "distilled 10", "flow"}
    assert ex.lineage("mnist28/distribution matching") == {f"mnist28/{m}" for m in ("distribution matching", "regression", "flow")}
    assert rg._iterations(ex.MODELS["mnist28/drift"]) == 2 * 8 * ex.MODELS["mnist28/drift"].steps  # eight times the images


def test_the_estimate_counts_each_training_once(monkeypatch):
    monkeypatch.setattr(rg, "_pace", lambda task: (1.0, 0.0))
    jobs = rg.todo(["06_distill"], again=True, seed=0, model="distilled 5")
    assert len(jobs) > 1
    want = sum(rg._iterations(ex.MODELS[m]) for m in ("distilled 5", "distilled 10", "flow"))
    assert rg.estimate(jobs) == rg.estimate(jobs[:1]) == want
    assert rg.estimate(jobs, workers=2) == want / 2


def test_a_choice_among_what_has_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row of .'16_floor'. has .'seed': 0"):
        rg.make_results(["16_floor"], again=True, folder=tmp_path, seed=0)


def test_what_is_no_row_any_more_is_dropped(tmp_path):
    name, text = "04_flow", (ev.results_folder() / "04_flow.jsonl").read_text()
    old = json.loads(text.splitlines()[0]) | {"steps": 77}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(old) + "\n" + text)
    rg._arrange(ex.EXPERIMENTS, tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_text() == text
    assert len([*tmp_path.iterdir()]) == 1, "and nothing is made where nothing was"


def evaluations(row):
    "Network evaluations for one sample, from the solver's name alone."
    if row.solver.startswith("DPMSolver"):
        return dict(zip((2, 4) if "3" in row.solver else (3, 5), ex.BUDGETS))[row.steps]
    return row.steps * {"Heun()": 2, "Midpoint()": 2, "TwoStage()": 2, "RK4()": 4}.get(row.solver, 1)


def test_what_a_record_holds():
    every = "metric value floor n reference_hash feature_hash model device dtype versions command made date".split()
    sampled = "solver grid steps nfe seeds seconds train_seed class_error lost memorisation total_seconds total_images".split()
    for name in [*rg.UNTRAINED, *ex.EXPERIMENTS]:
        for r in rc.read_records(name):
            assert not set(every + (sampled if name in ex.EXPERIMENTS else [])) - set(r), name
            assert rc._judged(r["task"]).items() <= r.items()
            if name in ex.EXPERIMENTS:
                assert r["recipe"] == ex.identity(r["model"]) and r["task"] == ex.MODELS[r["model"]].task


def test_the_floor_made_again():
    (again,) = rg.run_floor()
    assert again["value"] == pytest.approx(ev.floor(), rel=1e-3)


def test_a_record_made_again_from_the_shipped_weights():
    import diffcourse as dc

    den = dc.load("digits/flow", source="shipped")
    out = dc.sample(den, (1, 8, 8), grid=dc.uniform(5), seeds=range(1000, 2000))
    (r,) = rc.read_records("04_flow").where(model="flow", steps=5, train_seed=0, seeds="1000-1999")
    assert ev.score(out.x).fd == pytest.approx(r["value"], rel=0.02) and out.nfe == r["nfe"]


def test_quality_that_the_book_promises():
    "Digits, means of five training seeds, in multiples of the floor."
    def mean(name, **where):
        found = rc.read_records(name).where(**where).averaged()
        assert len(found) == 5
        assert min(r["memorisation"] for r in found) >= 0.9
        return sum(r["value"] / r["floor"] for r in found) / 5

    assert mean("04_flow", model="flow", nfe=40) <= 5
    assert mean("03_ddim", solver="DDIM()", grid="uniform", nfe=50) <= 8


# -- the command --------------------------------------------------------------

SMALL = """
from dataclasses import replace
from pathlib import Path
from diffcourse import experiments as ex
from diffcourse import recording as rg
rg.TRAIN_SEEDS = 0, 1
ex.MODELS["flow"] = rg.MODELS["flow"] = replace(ex.MODELS["flow"], steps=2)
rg.EXPERIMENTS = {"04_flow": ex._rows(["flow"], ["Euler()"], (1, 2, 3), seeds=[(1000, 1066)])}
if __name__ == "__main__":
    rg.make_results(["04_flow"], workers=1, folder=Path("records"))
"""


def test_an_interrupted_make_results_goes_on(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DIFFCOURSE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-u", str(script)]
    first = subprocess.Popen(run, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    said = []
    for line in first.stdout:
        said.append(line)
        if line.startswith("[1/6"):
            os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert "6 records of 2 trainings, 1 at a time: about" in "".join(said)
    file = tmp_path / "records" / "04_flow.jsonl"
    before = file.read_text().splitlines()
    assert 1 <= len(before) < 6 and json.loads(before[0])["steps"] == 1
    again = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{6 - len(before)} records of" in again.stdout
    after = file.read_text().splitlines()
    assert len(after) == 6 and set(before) <= set(after)  # nothing was made twice
    third = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "all records stand" in third.stdout and file.read_text().splitlines() == after


def test_rows_are_chosen(tmp_path, capsys):
    rg.main(["--list", "--again", "04_flow", "--model", "flow", "--steps", "5", "--seed", "1", "--seeds", "1000-1999"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("04_flow Row(model='flow', solver='Euler()', steps=5")
    rows = sum(len(r) * len(ex.TRAIN_SEEDS) for r in ex.EXPERIMENTS.values())
    assert len(rg.todo(folder=tmp_path)) == rows


@pytest.mark.parametrize("wrong, allowed", [("05_none", "04_flow"), ("--model none", "v cosine"), ("--grid none", "leading"), ("--seed 7", "4")])
def test_what_does_not_exist_is_refused(wrong, allowed, capsys):
    with pytest.raises(SystemExit):
        rg.main(wrong.split())
    assert allowed in capsys.readouterr().err


def test_another_version_is_to_do_again(tmp_path):
    row = ex.Row("flow", "Euler()", 5)
    (r,) = rc.read_records("04_flow").where(**ex.key(row), train_seed=0)
    chosen = dict(folder=tmp_path, seed=0, model="flow", steps=5, seeds="1000-1999")
    for change, todo in (({}, 0), ({"made": r["made"] | {"Euler": 0}}, 1), ({"made": {}}, 1), ({"feature_hash": "0"}, 1),
                         ({"recipe": "0"}, 1), ({"train_steps": 9}, 1)):
        rc.write_record("04_flow", r | change, tmp_path)
        assert rg.todo(["04_flow"], **chosen) == [("04_flow", row, 0)] * todo, change


def test_nothing_is_left_to_do(capsys):
    rg.main(["--list"])
    assert capsys.readouterr().out == ""


# -- measured numbers in the text ---------------------------------------------

UNIT = (r"(?<![\w.^])\d+(?:[.,]\d+)?\s*(?:ms|s|seconds?|minutes?|it/s|iterations a second|MB|GB|F|%|per ?cent|"
        r"times (?:faster|slower|better|worse|smaller|larger))(?![\w-])")
NAME = r"(?i:\b(?:FD|FID|KID|W1|W_1|accuracy|loss|memorisation|ratio|floor)\b)[^.|\n]{0,30}?(?<![\w^{])\d+\.\d+"


def measured(text):
    "Numbers with a unit, or behind the name of a measure; not in code, formulas, or sentences that cite a source."
    text = re.sub(r"(?s)```.*?```|~~~.*?~~~|`[^`]*`|\$\$.*?\$\$", "", text)
    for sentence in re.split(r"(?<=[.?!])\s+|\n\s*\n", text):
        if "{cite" not in sentence:
            yield from (m.group(0) for m in re.finditer(f"{UNIT}|{NAME}", sentence))


@pytest.mark.parametrize("name, text", [*sources(), ("README.md", (ROOT / "README.md").read_text())],
                         ids=lambda v: v if len(v) < 40 else "")
def test_no_measured_number_is_typed(name, text):
    assert list(measured(text)) == [], f"{name}: print it by code, or read it from a record"


@pytest.mark.parametrize("text", ["It takes 12 s.", "FD is 0.51 here", "we reach 1.2 F", "98.7 % are right", "the loss falls to 0.27",
                                  "| DDIM | FD 1.52 |", "three times: 2 times faster"])
def test_measured_numbers_are_found(text):
    assert list(measured(text))


@pytest.mark.parametrize("text", ["`fd(a, b)` 0.5", "on 1,000 samples", "FID 3.17 {cite:p}`Ho2020DDPM`", "$$F = 0.5$$", "at $t = 0.3$"])
def test_other_numbers_are_not(text):
    assert not list(measured(text))
