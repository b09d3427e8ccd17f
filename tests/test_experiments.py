"""`make results`: what is to do, an interruption, one record made again, and no measured number typed into the text."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from diffcourse import evaluation as ev
from diffcourse import experiments as ex
from diffcourse import leaderboard as lb
from diffcourse import recording as rg
from diffcourse import records as rc
from test_front_matter import sources

ROOT = Path(__file__).resolve().parents[1]


def test_experiments_are_what_the_book_says():
    for name, rows in ex.EXPERIMENTS.items():
        assert len(set(rows)) == len(rows), name
        for row in rows:
            assert row.model in ex.MODELS and row.grid in ex.GRIDS
            assert hasattr(ex.solver_of(row.solver, row.steps), "step")
            chosen = name in ex.SCREENED
            assert row.seeds[1] <= 1000 if chosen else row.seeds in ex.NOISES  # chosen on other noise than reported
    assert len(ex.TRAIN_SEEDS) >= 3 and ex.SEEDS == ex.NOISES[0] == (1000, 2000)
    with pytest.raises(ValueError, match="must not teach"):  # no noise of the report makes pairs
        rg.make_pairs(rg.Denoiser(ex.UNet(), ex.MODELS["flow"].path, "flow"), 2, max(ex.NOISES)[1] - 1)


def test_recipes_name_models_that_exist_and_differ():
    recipes = {k: m for k, m in ex.MODELS.items() if isinstance(m, ex.Recipe)}
    for name, recipe in recipes.items():
        assert {recipe.parent, recipe.teacher} - {None} <= set(ex.MODELS) - {name}
        assert recipe.start in ex.STARTS and recipe.data in ("digits", "pairs")
    prints = [ex.identity(m) for m in ex.MODELS]
    assert len(set(prints)) == len(prints)


def test_other_pairs_are_another_training(monkeypatch):
    before = {m: ex.identity(m) for m in ("regression", "drift", "control")}
    monkeypatch.setitem(ex.PAIRS, "grid", ex.uniform(3))
    changed = {m for m, was in before.items() if ex.identity(m) != was}
    assert changed == {"regression", "drift"}  # drift starts from the regression


def test_students_come_after_their_teachers():
    order = [row.model for _, row, seed in rg.todo(again=True) if seed == 0]
    for name, recipe in ex.MODELS.items():
        if isinstance(recipe, ex.Recipe) and recipe.parent in order and name in order:
            assert order.index(recipe.parent) < order.index(name)


def behind(model, solver="Euler()", steps=5, grid="uniform", experiment="04_flow"):
    return ex.made_by(experiment, ex.Row(model, solver, steps, grid)).keys() - set(ex.COMMON)


def test_the_families_behind_a_row():
    assert set(ex.COMMON) <= ex.made_by("04_flow", ex.Row("flow", "Euler()", 5)).keys()
    assert behind("flow") == {"FlowMatching", "Euler", "grid uniform"}
    assert behind("v cosine", "DPMSolver(3)", 4, "clipped") == {"DenoisingLoss", "DPMSolver", "grid clipped"}
    assert behind("distilled 5", experiment="06_distill") == {"FlowMatching", "Distillation", "Euler", "grid uniform", "ClassifierLoss"}
    crowd = {"FlowMatching", "PairRegression", "Drift", "pairs", "AB2"}  # the solver that makes the pairs
    assert behind("drift", steps=1) == crowd | {"Euler", "grid uniform"}


def test_raising_a_version_makes_the_records_behind_it_out_of_date(monkeypatch):
    every = [(n, row) for n, rows in ex.EXPERIMENTS.items() for row in rows]
    for family, wanted in (("Drift", lambda r: r.model.startswith("drift")), ("grid late", lambda r: r.grid == "late"),
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
    monkeypatch.setattr(ex.MODELS["flow logit-normal"], "times", wider())
    assert ex.identity("flow logit-normal") == before
    monkeypatch.setattr(ex.MODELS["flow logit-normal"], "times", wider(low=0.1))
    assert ex.identity("flow logit-normal") != before


def test_a_student_of_a_student_in_a_few_iterations(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    monkeypatch.setitem(ex.PAIRS, "grid", ex.uniform(2))
    row = ex.Row("drift", "Euler()", 1, seeds=(2000, 2066))
    made = rg.run_row("04_flow", row, 0, 2)
    assert made["nfe"] == 1 and made["seeds"] == "2000-2065" and made["train_steps"] == 2
    assert made["made"]["Drift"] == rc.VERSIONS["Drift"] and "--seeds 2000-2065" in made["command"]
    assert sorted(p.name for p in tmp_path.glob("runs/results/*-0")) == ["drift-0", "flow-0", "regression-0"]
    rg._trained.cache_clear()  # fetched from the disk
    assert rg.run_row("04_flow", row, 0, 2)["value"] == made["value"]


def test_a_single_step_solver_that_no_budget_has():
    with pytest.raises(ValueError, match=r"DPMSolver\(3\) takes \[2, 4\] steps"):
        ex.solver_of("DPMSolver(3)", 5)


def test_every_record_is_committed():
    for name, rows in ex.EXPERIMENTS.items():
        found, seen = rc.read_records(name), 0
        for row in rows:
            for seed in ex.TRAIN_SEEDS[:1] if name in ex.SCREENED else ex.TRAIN_SEEDS:
                one = found.where(**ex.key(row), train_seed=seed)
                assert len(one) == 1, (name, row, seed)
                seen += 1
                assert one[0]["n"] == row.seeds[1] - row.seeds[0] == (500 if name in ex.SCREENED else 1000)
                assert one[0]["nfe"] == evaluations(row), (name, row)  # for one sample
                assert one[0]["command"] == ex.command(name, row, seed)
        assert seen == len(found), f"{name} has records of no row"


def test_one_second_judge():
    judges = {r.get("feature_hash2") for name in ("06_distill", "07_one_step") for r in rc.read_records(name)}
    assert len(judges) == 1 and None not in judges


def test_the_second_judge_is_told_by_its_weights(monkeypatch):
    net = torch.nn.Linear(2, 1)
    for p in net.parameters():
        torch.nn.init.constant_(p, 0.5)
    monkeypatch.setattr(rg, "second_judge", lambda: net)
    assert rg._second_hash.__wrapped__() == "cfc5c0132117"  # as in the records of 2026
    torch.nn.init.constant_(net.bias, 0.25)
    assert rg._second_hash.__wrapped__() != "cfc5c0132117"


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
    rg.make_results(names, again=True, folder=tmp_path, model="drift", seed=0)
    assert not list(tmp_path.iterdir())


def test_make_results_without_a_floor_says_so_before_it_trains(monkeypatch):
    def none():
        raise FileNotFoundError("no records '16_floor'")
    monkeypatch.setattr(rg, "floor", none)
    monkeypatch.setattr(rg, "_work", lambda *_: pytest.fail("it trained"))
    with pytest.raises(FileNotFoundError, match="16_floor"):
        rg.make_results(["04_flow"], again=True, seed=0)


def test_the_estimate_counts_ancestors_and_batches():
    assert ex.lineage("drift 2") == {"drift 2", "distilled 2 accurate", "flow"}
    assert ex.lineage("distribution matching") == {"distribution matching", "regression", "flow"}
    long, large = (rg._iterations(ex.MODELS[m]) for m in ("control", "control 512"))
    assert large == 2 * long  # half as many iterations, of eight times the images


def test_the_estimate_counts_each_training_once(monkeypatch):
    monkeypatch.setattr(rg, "fit", lambda *_, steps, **__: types.SimpleNamespace(net=None, seconds=float(steps)))
    monkeypatch.setattr(rg, "Denoiser", lambda *_: None)
    monkeypatch.setattr(rg, "sample", lambda *_, **__: types.SimpleNamespace(seconds=0.0))
    jobs = rg.todo(["07_one_step"], again=True, seed=0, model="drift 2")
    assert len(jobs) > 1
    want = sum(rg._iterations(ex.MODELS[m]) for m in ("drift 2", "distilled 2 accurate", "flow"))
    assert rg.estimate(jobs) == rg.estimate(jobs[:1]) == want
    assert rg.estimate(jobs, workers=2) == want / 2


def test_a_choice_among_what_has_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row of .'16_floor'. has .'seed': 0"):
        rg.make_results(["16_floor"], again=True, folder=tmp_path, seed=0)


def test_the_screening_is_of_one_training_seed():
    assert {s for _, _, s in rg.todo(["05_screening"], again=True)} == {0}
    assert not rg.todo(["05_screening"], again=True, seed=1)


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
    return row.steps * {"Heun()": 2, "Midpoint()": 2, "RK4()": 4}.get(row.solver, 1)


def test_what_a_record_holds():
    every = "metric value floor n reference_hash feature_hash model device dtype versions command made date".split()
    sampled = "solver grid steps nfe seeds seconds train_seed kid kid_error memorisation".split()
    for name in [*rg.UNTRAINED, *ex.EXPERIMENTS]:
        for r in rc.read_records(name):
            assert not set(every + (sampled if name in ex.EXPERIMENTS else [])) - set(r), name
            assert r["feature_hash"] == ev.classifier_hash() and r["reference_hash"] == ev.reference_hash()


def test_the_floor_made_again():
    (again,) = rg.run_floor()
    assert again["value"] == pytest.approx(ev.floor(), rel=1e-3)


def test_a_record_made_again_from_the_shipped_weights():
    import diffcourse as dc

    den = dc.load("digits/flow", source="shipped")
    out = dc.sample(den, (1, 8, 8), grid=dc.uniform(5), seeds=range(1000, 2000))
    (r,) = rc.read_records("04_flow").where(model="flow", steps=5, train_seed=0)
    assert ev.score(out.x).fd == pytest.approx(r["value"], rel=0.02) and out.nfe == r["nfe"]


def test_quality_that_the_book_promises():
    "Digits, mean of three training seeds, in multiples of the floor."
    def mean(name, **where):
        found = rc.read_records(name).where(**where)
        assert len(found) == 3
        assert min(r["memorisation"] for r in found) >= 0.9
        return sum(r["value"] / r["floor"] for r in found) / 3

    assert mean("04_flow", model="flow", nfe=40) <= 2
    assert mean("03_ddim", solver="DDIM()", grid="uniform", nfe=50) <= 4


def test_quality_of_few_steps():
    "Means of three training seeds and three sets of noise, in multiples of the floor."
    flow = [r["value"] / r["floor"] for r in rc.read_records("05_solvers").where(model="flow", solver="DPMpp(2)", grid="uniform", nfe=10)]
    assert len(flow) == 3 and sum(flow) / 3 <= 2
    for nfe, most in ((2, 3.0), (1, 3.6)):
        assert lb.best(nfe)[1][0].fd <= most
    assert max(lb.versus(5).pairs.differences) < 0  # below the hardest rival of every seed
    of = {(m.model, m.nfe): m.fd for m in lb.board()}
    assert lb.best(1)[1][0].fd <= 1.8 * of["flow", 24]
    assert of["distilled 5 compact", 5] <= 1.3 * of["distilled 5 accurate", 5]
    for r in rc.read_records("07_one_step"):
        assert r["memorisation"] >= 0.9, (r["model"], r["nfe"])


# -- the command --------------------------------------------------------------

SMALL = """
from pathlib import Path
from diffcourse import experiments as ex
from diffcourse import recording as rg
rg.STEPS, rg.TRAIN_SEEDS = 2, (0, 1)
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
    rg.main(["--list", "--again", "04_flow", "--model", "flow", "--steps", "5", "--seed", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("04_flow Row(model='flow', solver='Euler()', steps=5")
    rows = sum(len(r) * (1 if n in ex.SCREENED else len(ex.TRAIN_SEEDS)) for n, r in ex.EXPERIMENTS.items())
    assert len(rg.todo(folder=tmp_path)) == rows


@pytest.mark.parametrize("wrong, allowed", [("05_none", "04_flow"), ("--model none", "v cosine"), ("--grid none", "leading"), ("--seed 7", "2")])
def test_what_does_not_exist_is_refused(wrong, allowed, capsys):
    with pytest.raises(SystemExit):
        rg.main(wrong.split())
    assert allowed in capsys.readouterr().err


def test_another_version_is_to_do_again(tmp_path):
    (row,) = {r for r in ex.EXPERIMENTS["04_flow"] if r.model == "flow" and r.steps == 5}
    (r,) = rc.read_records("04_flow").where(model="flow", steps=5, train_seed=0)
    chosen = dict(folder=tmp_path, seed=0, model="flow", steps=5)
    for change, todo in (({}, 0), ({"made": r["made"] | {"Euler": 0}}, 1), ({"made": {}}, 1), ({"feature_hash": "0"}, 1),
                         ({"loss": "0"}, 1), ({"train_steps": 9}, 1)):
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
