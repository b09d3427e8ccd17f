"""The parameter files of the tasks and of the machines: only what their notebook declares, and only what fits."""
import ast
import json
from pathlib import Path

import pytest
import torch
import yaml

import diffcourse as dc
from diffcourse.runs import _fit_type

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.stem for p in ROOT.glob("nbs/[0-9]*.ipynb"))
TASKS = ["mnist14", "mnist28", "faces32", "celeba64"]
FILES = [p for t in TASKS for p in sorted((ROOT / "configs" / t).glob("*"))]
MACHINES = sorted((ROOT / "configs").glob("*.yaml"))


def name(path):
    return path.relative_to(ROOT / "configs").as_posix()


def notebook(path):
    """The notebook that a file is for: 06_distill_10_5 and fast_06_distill are for 06_distill."""
    stem = path.stem.removeprefix("fast_")
    found = [n for n in NOTEBOOKS if stem == n or stem.startswith(f"{n}_")]
    assert found, f"{name(path)}: no notebook has this name"
    return max(found, key=len)


def declared(stem):
    cells = json.loads((ROOT / "nbs" / f"{stem}.ipynb").read_text())["cells"]
    found = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {n.target.id: ast.literal_eval(n.value) for n in ast.parse(found[0]).body[:-1]}


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_what_the_notebook_declares(path):
    known = declared(notebook(path))
    for key, value in read(path).items():
        assert key in known, f"{name(path)}: {key} is no parameter of {notebook(path)}, there are {sorted(known)}"
        _fit_type(key, value, known[key])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_its_task_takes_network_and_settings(path):
    given = read(path)
    task = dc.task(given["data"], given.get("size"))
    assert task.name == path.parent.name
    with torch.device("meta"):
        task.net(**given.get("net", {}))
    task.settings(**given.get("settings", {}) | given.get("machine", {}))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_folder_may_take_the_place_of_the_task(path, tmp_path):
    given = read(path)
    assert dc.task(tmp_path, given["size"]).size == dc.task(given["data"]).size, "-p data FOLDER needs a size"


@pytest.mark.parametrize("path", MACHINES, ids=name)
def test_a_machine_changes_how_it_computes_and_nothing_else(path):
    given = read(path)
    assert given.keys() == {"machine"}
    assert given["machine"].keys() <= {"precision", "compile", "channels_last", "tf32", "fused", "exact", "accumulate"}
    for task in TASKS:
        dc.task(task).settings(**given["machine"])


@pytest.mark.parametrize("stem", ["02_ddpm", "04_flow_matching"])
def test_the_recipe_of_the_reference_project(stem):
    task, given = dc.task("celeba64"), read(ROOT / f"configs/celeba64/{stem}.yaml")
    steps = {"steps": given["steps"]}
    said, own = task.settings(**given["settings"] | steps), task.settings()
    assert dc.Settings(**said) == dc.Settings(**own)
    with torch.device("meta"):
        assert task.net(**given["net"]).config() == task.net().config()


def run(path):
    "The name of the run that a file makes."
    made = {"02_ddpm": "ddpm", "04_flow_matching": "flow", "06_distill": "distilled-{steps}", "07_meanflow": "meanflow"}
    given = read(path)
    return given.get("prefix", "") + made[notebook(path)].format(**given)


def test_each_recipe_has_runs_of_its_own_and_the_teachers_of_its_own():
    folder = ROOT / "configs/celeba64"
    files = [p for p in sorted(folder.glob("*")) if notebook(p) != "05_solvers"]
    assert len({run(p) for p in files}) == len(files)
    pairs = {"06_distill_10_5": "06_distill_20_10", "fast_06_distill": "fast_04_flow_matching"}
    for student, teacher in pairs.items():
        assert read(folder / f"{student}.yaml")["teacher"] == run(folder / f"{teacher}.yaml")
    assert "teacher" not in read(folder / "06_distill_20_10.yaml") and run(folder / "04_flow_matching.yaml") == "flow"
