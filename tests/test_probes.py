"""Probes: each is as it was committed, each moves when its family computes something else, and new values need a raised version."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffcourse import families as fa
from diffcourse import probes as pr
from diffcourse.records import VERSIONS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the committed values were computed without a GPU")


@pytest.mark.parametrize("family", VERSIONS)
def test_the_family_computes_what_it_did(family):
    assert pr.fault(family) == ""


def test_every_version_has_its_probe():
    assert VERSIONS.keys() == fa.PROBES.keys() == pr.committed().keys()


# -- every family, changed a little -------------------------------------------

def scaled(change):
    "The same function with its result changed."
    return lambda old: lambda *a, **k: change(old(*a, **k))


def step(old):  # a hundredth too far
    return lambda self, den, x, t, s, noise: x + 1.01 * (old(self, den, x, t, s, noise) - x)


def loss(old):
    return lambda self, net, x, draw: 1.01 * old(self, net, x, draw)


times = scaled(lambda grid: fa.explicit([*[t * 0.99 for t in grid.times(fa.Linear()).tolist()[:-1]], 0.0]))
CHANGES = [
    ("data", "data._split", lambda old: lambda split, n, first: old(split, n, first - 1)),
    ("unet", "unet.ResBlock.forward", scaled(lambda x: 1.01 * x)),
    ("unet", "unet.UNet.__init__", lambda old: lambda self, **k: old(self, **k | {"heads": 2})),
    ("training", "training.learning_rate", scaled(lambda rate: 1.01 * rate)),
    ("training", "averages.EMA.update", lambda old: lambda self, net, step: old(self, net, step + 1)),
    ("training", "draws.NOISE", lambda old: old + 7),
    ("training", "draws.batch_indices", lambda old: lambda seed, step, batch, n: old(seed + 1, step, batch, n)),
    ("training", "training._seed_dropout", lambda old: lambda seed, device: old(seed + 1, device)),
    ("training", "torch.optim.AdamW.__init__", lambda old: lambda self, *a, **k: old(self, *a, **k | {"eps": 1e-3})),
    ("sampling", "sampling.Noise.__call__", scaled(lambda x: 1.01 * x)),
    ("sampling", "sampling.Noise.__init__", lambda old: lambda self, seeds, *a: old(self, seeds + 1 if isinstance(seeds, int) else [s + 1 for s in seeds], *a)),
    ("sampling", "paths.VPCosine.alpha", scaled(lambda a: 0.99 * a)),
    ("judge", "evaluation.to_bytes", scaled(lambda x: x // 2 * 2)),
    ("judge", "evaluation._mmd", scaled(lambda v: 1.01 * v)),
    ("judge", "evaluation._nearest", lambda old: lambda a, b, itself=False: old(a, b)),
    ("recording", "recording._parts", lambda old: lambda recipe, seed, steps: old(recipe, seed + 1, steps)),
    ("recording", "experiments.SETTINGS", lambda old: old | {"lr": 1.5 * old["lr"]}),  # rounding alone: up to .04
    ("pairs", "generators._sample", lambda old: lambda den, shape, solver, grid, *a, **k: old(den, shape, solver, fa.uniform(4), *a, **k)),
    ("Distillation", "distill.LOSSES", lambda old: old | {"huber": lambda d, delta: old["huber"](d, 1.1 * delta)}),
    ("Distillation", "distill.Distillation.delta", lambda old: 1.1 * old),
    ("Distillation", "distill.Distillation._seen", scaled(lambda d: 1.01 * d)),
    ("Distillation", "distill.compact", lambda old: lambda net: fa.UNet(base=22)),
    ("MeanFlowLoss", "meanflow._NOISY", lambda old: old | {"v1": (-0.5, 1.6)}),
    ("MeanFlowLoss", "meanflow.total_derivative", scaled(lambda two: (two[0], 1.01 * two[1]))),
    ("FlowMatching", "flow_matching.LogitNormal.sample", scaled(lambda t: 0.99 * t)),
    ("Drift", "generators.drift", scaled(lambda x: 1.01 * x)),
    ("DistributionMatching", "generators.DistributionMatching._push", scaled(lambda x: 1.01 * x)),
    *((k, f"{m}.{k}.__call__", loss) for k, m in (
        ("DenoisingLoss", "ddpm"), ("FlowMatching", "flow_matching"), ("Distillation", "distill"), ("MeanFlowLoss", "meanflow"),
        ("PairRegression", "generators"), ("Reflow", "generators"), ("DistributionMatching", "generators"), ("Drift", "generators"),
        ("Consistency", "consistency"), ("ClassifierLoss", "evaluation"))),
    *((k, f"{m}.{k}.step", step) for k, m in (
        ("DDPM", "ddpm"), ("DDIM", "ddim"), ("Euler", "sampling"), ("MeanFlow", "meanflow"),
        *((k, "solvers") for k in ("Heun", "Midpoint", "RK4", "AB2")), *((k, "exponential") for k in ("DPMSolver", "DPMpp")),
        *((k, "multistep") for k in ("DEIS", "IPNDM", "PNDM", "UniPC")),
        *((k, "stochastic") for k in ("EDM", "SDEDPMpp")), ("RK45", "adaptive"), ("TwoStage", "tuned"), ("Multistep", "tuned"), ("Renoise", "consistency"))),
    *((f"grid {k}", k, times) for k in fa.GRIDS),
]


def mutate(monkeypatch, family, target, change):
    if family.startswith("grid "):
        return monkeypatch.setitem(fa.GRIDS, target, change(fa.GRIDS[target]))
    *where, name = (target if target.startswith("torch") else f"diffcourse.{target}").split(".")
    home = sys.modules[".".join(where[:2])]
    for part in where[2:]:
        home = getattr(home, part)
    old = getattr(home, name)
    monkeypatch.setattr(home, name, new := change(old))
    if getattr(fa, name, None) is old:
        monkeypatch.setattr(fa, name, new)


def test_every_family_is_changed_below():
    assert {family for family, *_ in CHANGES} == VERSIONS.keys()


@pytest.mark.parametrize("family, target, change", CHANGES, ids=[f"{f}-{t}" for f, t, _ in CHANGES])
def test_a_change_is_seen(family, target, change, monkeypatch):
    mutate(monkeypatch, family, target, change)
    assert pr.distance(fa.probe(family), pr.committed()[family]["values"]) > 3 * pr.tolerance(family)


def test_a_solver_moves_its_own_probe_alone(monkeypatch):
    mutate(monkeypatch, "AB2", "solvers.AB2.step", step)
    mutate(monkeypatch, "Euler", "sampling.Euler.step", step)
    others = ["sampling", "pairs", "training", "Heun", "Midpoint", "DDIM", "DPMpp", "Reflow"]
    assert [f for f in ["AB2", "Euler", *others] if pr.fault(f)] == ["AB2", "Euler"]


# -- new values ---------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path):
    "Four families whose numbers and versions can be set."
    values = {"data": [1.0], "judge": [2.0], "unet": [3.0], "AB2": [4.0]}
    versions = dict.fromkeys(values, 1)
    monkeypatch.setattr(pr, "VERSIONS", versions)
    monkeypatch.setattr(pr, "probe", lambda family: {"x": values[family]})
    monkeypatch.setattr(pr, "results_folder", lambda: tmp_path)
    pr.write()
    return values, versions, tmp_path / "probes.json"


def test_what_moved_is_named_and_nothing_is_written(small):
    values, versions, file = small
    before = file.read_text()
    assert not any(map(pr.fault, versions))
    values["AB2"] = [4.1]
    assert "AB2 computes something else" in pr.fault("AB2") and "raise VERSIONS['AB2'] in nbs/26_records.ipynb" in pr.fault("AB2")
    with pytest.raises(ValueError, match="AB2 computes something else"):
        pr.write()
    assert file.read_text() == before


def test_a_raised_version_takes_new_values_and_no_other_does(small):
    values, versions, file = small
    before = pr.committed()
    values["AB2"], versions["AB2"] = [4.1], 2
    values["unet"] = [3.0 + 1e-9]  # moved by less than the tolerance
    assert "version 2, its committed probe version 1: run python -m diffcourse.probes --write" in pr.fault("AB2")
    pr.write()
    assert pr.committed() == before | {"AB2": {"version": 2, "values": {"x": [4.1]}}} and pr.fault("AB2") == ""


def test_what_is_behind_every_record_takes_the_others_along(small):
    values, versions, file = small
    values["unet"], versions["unet"], values["AB2"] = [3.1], 2, [4.1]
    pr.write()
    assert pr.committed()["AB2"] == {"version": 1, "values": {"x": [4.1]}}
    values["judge"] = [2.1]  # the floor has no network behind it
    versions["unet"] = 3
    with pytest.raises(ValueError, match="^judge computes something else[^\n]*$"):
        pr.write()
    versions["judge"] = 2
    pr.write()


def test_a_version_is_not_lowered(small):
    values, versions, file = small
    versions["AB2"] = 0
    with pytest.raises(ValueError, match="AB2"):
        pr.write()


@pytest.mark.parametrize("now", [{"x": [math.nan, 1]}, {"x": [1.0]}, {"y": [1.0, 1.0]}, {}, {"x": [1.0, 1.0], "y": [0.0]}])
def test_other_numbers_are_infinitely_far(now):
    assert pr.distance(now, {"x": [1.0, 1.0]}) == math.inf


def test_command_line(capsys):
    with pytest.raises(SystemExit) as done:
        pr.main(["data", "grid late"])
    assert done.value.code == 0 and capsys.readouterr().out == "data: as it was\ngrid late: as it was\n"
    with pytest.raises(SystemExit):
        pr.main(["AB3"])
    assert "no family ['AB3']" in capsys.readouterr().err


# -- tidying up ---------------------------------------------------------------

def test_a_function_that_moves_to_another_module_leaves_all_records_fresh(tmp_path):
    package = shutil.copytree(ROOT / "diffcourse", tmp_path / "diffcourse")
    source = (package / "exponential.py").read_text()
    start = source.index("def _lam(path, t):")
    lam = source[start : source.index("\n\n\n", start)]
    (package / "exponential.py").write_text(source.replace(lam, "from .paths import _lam"))
    with open(package / "paths.py", "a") as f:
        f.write(f"\n\n{lam}\n")
    (package / "distill.py").rename(package / "halving.py")
    (package / "distill.py").write_text("from .halving import *\n")
    run = [sys.executable, "-c", "import sys; from diffcourse import recording, distill; recording.main(['--list'])\n"
           "print(distill.Distillation.__module__, distill.__file__)"]
    done = subprocess.run(run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.split() == ["diffcourse.halving", str(package / "distill.py")], done.stderr
