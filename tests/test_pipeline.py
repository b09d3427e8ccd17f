"""The runner and the environment, on tiny trees with notebooks of a line or two."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
INIT = '_names = {"paths": "VP", "unet": "UNet", "plotting": ""}\n\ndef load(name):\n    pass\n'


def notebook(path, *sources, parameters=None):
    """Write a notebook: code cells, and Markdown where a source begins with #."""
    cells = []
    for i, source in enumerate(sources):
        cell = {"id": f"cell{i}", "metadata": {}, "source": source.splitlines(True), "cell_type": "markdown"}
        if not source.startswith("# "):
            cell.update(cell_type="code", outputs=[], execution_count=None)
        if i == parameters:
            cell["metadata"]["tags"] = ["parameters"]
        cells.append(cell)
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def tree(tmp_path):
    """A small project: 01 uses paths, 02 makes a run, 03 loads it."""
    for folder in ("nbs", "book", "diffcourse/weights", "diffcourse/results", "configs/smoke", "configs/digits"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "book" / "build.py", tmp_path / "book")
    modules = {"__init__": INIT, "paths": "VP = 1  # a path\n", "unet": "from .paths import VP\nUNet = VP\n", "plotting": "x = 1\n"}
    for name, text in modules.items():
        (tmp_path / "diffcourse" / f"{name}.py").write_text(text)
    notebook(tmp_path / "nbs/01_a.ipynb", "# A", "import diffcourse as dc\ndc.VP")
    notebook(tmp_path / "nbs/02_b.ipynb", "# B", "from diffcourse.unet import UNet\nfit(UNet, run='digits/b')")
    notebook(tmp_path / "nbs/03_c.ipynb", "# C", "from diffcourse import load\nname = 'digits/b'")
    notebook(tmp_path / "nbs/04_d.ipynb", "# D", "from diffcourse import plotting\nplotting.x")
    return tmp_path


def prints(tree):
    """The fingerprints of all notebooks of a tree."""
    spec = importlib.util.spec_from_file_location("runner", tree / "book" / "build.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return {nb[4:6]: runner.parts(nb, "digits") for nb in runner.notebooks()}


def changed(tree, act):
    """Which notebooks an act makes stale."""
    before = prints(tree)
    act()
    after = prints(tree)
    return {nb for nb in before if before[nb] != after[nb]}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("file, old, new, wanted", [
    ("nbs/02_b.ipynb", "# B", "# Prose", ""),
    ("nbs/02_b.ipynb", "digits/b')", "digits/b')  ", ""),
    ("diffcourse/paths.py", "# a path", "# the path", ""),
    ("diffcourse/paths.py", "VP = 1", "\n\nVP = 1", ""),
    ("nbs/01_a.ipynb", "dc.VP", "dc.VP + 1", "01"),
    ("nbs/02_b.ipynb", "digits/b'", "digits/b', steps=2", "02 03"),
    ("diffcourse/plotting.py", "x = 1", "x = 2", "03 04"),                  # load takes what it is told: all modules
    ("diffcourse/unet.py", "UNet = VP", "UNet = 2", "02 03"),
    ("diffcourse/paths.py", "VP = 1", "VP = 2", "01 02 03"),
], ids=["prose", "space", "comment", "lines", "cell", "maker", "block", "net", "base"])
def test_what_an_edit_makes_stale(tree, file, old, new, wanted):
    edit(tree / "diffcourse/__init__.py", "    pass", "    return __getattr__(name)")
    assert changed(tree, lambda: edit(tree / file, old, new)) == {*wanted.split()}


def test_parameters_make_their_notebook_stale(tree):
    config = tree / "configs/digits/04_d.yaml"
    assert changed(tree, lambda: config.write_text("x: 1\n")) == {"04"}
    assert changed(tree, lambda: config.write_text("# a comment\nx: 1\n")) == set()


def test_weights_of_the_package_need_no_run(tree):
    weights = tree / "diffcourse/weights"
    weights.joinpath("b.safetensors").write_text("1")
    weights.joinpath("index.json").write_text(json.dumps({"digits/b": {"file": "b.safetensors"}}))
    notebook(tree / "nbs/03_c.ipynb", "# C", "from diffcourse import load\nload('digits/b', source='shipped')")
    assert changed(tree, lambda: edit(tree / "nbs/02_b.ipynb", "digits/b'", "digits/b', steps=2")) == {"02"}
    assert changed(tree, lambda: weights.joinpath("b.safetensors").write_text("2")) == {"03"}


def test_a_run_of_a_recipe_is_published_by_its_name_and_the_others_stay(tree):
    index = tree / "diffcourse/weights/index.json"
    index.write_text(json.dumps({"digits/b": {"file": "b.safetensors", "sha256": "0"}}))
    publish = [sys.executable, tree / "book/build.py", "weights", "faces32/flow"]
    done = subprocess.run(publish, capture_output=True, text=True)
    assert done.returncode == 1 and "no run faces32/flow" in done.stderr
    run = tree / "build/digits/runs/faces32/flow"
    (run / "ab12").mkdir(parents=True)
    (run / "latest.json").write_text('{"identity": "ab12"}')
    save_file({"w": torch.tensor([0.5, 3.0])}, run / "ab12/model.safetensors", {"json": "said"})
    assert subprocess.run(publish, capture_output=True, text=True).returncode == 0
    found = json.loads(index.read_text())
    assert found.pop("digits/b") == {"file": "b.safetensors", "sha256": "0"} and list(found) == ["faces32/flow"]
    with safe_open(index.parent / found["faces32/flow"]["file"], "pt") as file:
        assert file.metadata() == {"json": "said"} and file.get_tensor("w").equal(torch.tensor([0.5, 3.0]).half())


def test_weights_and_records_make_those_that_name_them_stale(tree):
    weights = tree / "diffcourse/weights"
    weights.joinpath("b.safetensors").write_text("1")
    weights.joinpath("index.json").write_text(json.dumps({"digits/b": {"file": "b.safetensors"}}))
    assert changed(tree, lambda: weights.joinpath("b.safetensors").write_text("2")) == {"03"}
    assert changed(tree, lambda: (tree / "diffcourse/results/other.jsonl").write_text("{}")) == set()


def test_a_name_that_cannot_be_told_means_all_modules(tree):
    notebook(tree / "nbs/01_a.ipynb", "import diffcourse as dc\nprint(dir(dc))")
    assert {f"diffcourse.{m}" for m in ("__init__", "paths", "unet", "plotting")} <= prints(tree)["01"].keys()


# ---------------------------------------------------------------- running

@pytest.fixture
def runs(tmp_path):
    """A project that the runner can export and run."""
    for folder in ("nbs", "book", "diffcourse", "configs/smoke"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "book" / "build.py", tmp_path / "book")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "diffcourse/__init__.py").write_text('__version__ = "0.1.0"\n')
    notebook(tmp_path / "nbs/01_a.ipynb", "n: int = 1", "from pathlib import Path\nlog = open('log', 'a').write(f'a{n} ')", parameters=0)
    notebook(tmp_path / "nbs/02_b.ipynb", "open('log', 'a').write('b ')")
    (tmp_path / "configs/smoke/01_a.yaml").write_text("n: 7\n")
    return tmp_path


def smoke(tree, *more):
    return subprocess.run([sys.executable, "book/build.py", "smoke", *more], cwd=tree, capture_output=True, text=True)


def test_runs_with_parameters_once_and_only_the_edited_again(runs):
    done = smoke(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((runs / "log").read_text().split()) == ["a7", "b"]
    assert "all 2 runs are up to date" in smoke(runs).stdout
    edit(runs / "nbs/02_b.ipynb", "'b '", "'new '")
    assert "[1/1] nbs/02_b took" in smoke(runs).stdout
    assert sorted((runs / "log").read_text().split()) == ["a7", "b", "new"]


def test_failing_cell_is_told_kept_and_not_published(runs):
    notebook(runs / "nbs/02_b.ipynb", "print('before')", "1 / 0", "print('after')")
    notebook(runs / "nbs/03_c.ipynb", "run = dict\nrun(run='digits/c')", "raise ValueError('made nothing')")
    notebook(runs / "nbs/04_d.ipynb", "name = 'digits/c'")
    done = smoke(runs)
    assert done.returncode != 0
    assert "nbs/02_b FAILED" in done.stdout and "cell 1 ZeroDivisionError: division by zero" in done.stdout
    assert "not run, they load what it makes: nbs/04_d" in done.stdout
    kept = json.loads((runs / "build/smoke/failed/nbs/02_b.ipynb").read_text())
    assert "before" in str(kept) and not (runs / "build/smoke/nbs/02_b.ipynb").exists()
    assert (runs / "build/smoke/nbs/01_a.ipynb").exists(), "the others go on"
    site = subprocess.run([sys.executable, "book/build.py", "site", "smoke"], cwd=runs, capture_output=True, text=True)
    assert site.returncode != 0 and "nbs/02_b (not run yet)" in site.stderr


def test_a_failure_leaves_the_old_run_but_does_not_trust_it(runs):
    assert smoke(runs).returncode == 0
    edit(runs / "nbs/02_b.ipynb", "'b '", "1 / 0")
    assert smoke(runs).returncode != 0
    status = subprocess.run([sys.executable, "book/build.py", "status", "smoke"], cwd=runs, capture_output=True, text=True)
    assert "nbs/01_a: fresh" in status.stdout and "nbs/02_b: its code" in status.stdout


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_interrupted_run_is_never_taken_for_a_whole_one(runs, how):
    wait = "import pathlib, time\nflag = pathlib.Path('flag')\nif not flag.exists():\n    flag.touch()\n    time.sleep(60)"
    notebook(runs / "nbs/02_b.ipynb", "print('half')", wait, "print('whole')")
    process = subprocess.Popen([sys.executable, "book/build.py", "smoke"], cwd=runs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    limit = time.monotonic() + 60
    while not (runs / "flag").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.kill() if how == signal.SIGKILL else os.killpg(process.pid, how)
    assert process.wait(30) != 0
    assert not (runs / "build/smoke/nbs/02_b.ipynb").exists()
    for _ in range(50):                              # a killed runner's worker sees it within a moment
        done = smoke(runs)
        if "another run" not in done.stderr:
            break
        time.sleep(0.1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole" in (runs / "build/smoke/nbs/02_b.ipynb").read_text()


def test_a_run_by_hand_that_took_a_name_over_is_noticed(runs):
    make = ("import os, pathlib\nfolder = pathlib.Path(os.environ['DIFFCOURSE_HOME'], 'runs/digits/ddpm')\n"
            "folder.mkdir(parents=True, exist_ok=True)\nwrote = (folder / 'latest.json').write_text('{\"identity\": \"ours\"}')\n"
            "run = dict\nmade = run(run='digits/ddpm')")
    notebook(runs / "nbs/02_b.ipynb", make)
    notebook(runs / "nbs/03_c.ipynb", "name = 'digits/ddpm'")
    assert smoke(runs).returncode == 0
    assert "all 3 runs are up to date" in smoke(runs).stdout
    latest = runs / "build/smoke/runs/digits/ddpm/latest.json"
    latest.write_text('{"identity": "of another size"}')
    status = subprocess.run([sys.executable, "book/build.py", "status", "smoke"], cwd=runs, capture_output=True, text=True).stdout
    assert status.split("\n")[:3] == ["nbs/01_a: fresh", "nbs/02_b: run digits/ddpm", "nbs/03_c: run digits/ddpm"]
    assert "smoke: 2 notebooks" in smoke(runs).stdout and "ours" in latest.read_text()
    weights = subprocess.run([sys.executable, "book/build.py", "weights"], cwd=runs, capture_output=True, text=True)
    assert weights.returncode != 0 and "nbs/02_b is out of date (not run yet): make book" in weights.stderr


def test_truncated_run_is_run_again(runs):
    assert smoke(runs).returncode == 0
    file = runs / "build/smoke/nbs/02_b.ipynb"
    file.write_text(file.read_text()[:200])
    assert "[1/1] nbs/02_b took" in smoke(runs).stdout


# ---------------------------------------------------------------- the environment

def environment(tree, body, **extra):
    """Run make env in a tree with a Python that does what `body` (shell) says."""
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    (tree / "book").mkdir(exist_ok=True)
    shutil.copy(ROOT / "book" / "env.py", tree / "book")
    fake = tree / "python"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # the test may itself be run by make
    done = subprocess.run(["make", "env", f"PYTHON={fake}"], cwd=tree, capture_output=True, text=True, env={**outside, **extra})
    assert done.returncode != 0
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]


def faked(module, said):
    """A Python whose `-m module` fails with a message; book/env.py, run by it, takes it for itself."""
    itself = "import runpy, sys; sys.executable = sys.argv[1]; runpy.run_path('book/env.py', run_name='__main__')"
    return (f'case "$*" in *"-m {module}"*) echo "{said}" >&2; exit 1;; esac\n'
            f'exec "{sys.executable}" -c "{itself}" "$0"')


@pytest.mark.parametrize("body, said", [
    (f"exec '{sys.executable}' -c \"import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path('book/env.py', run_name='__main__')\"",
     "Python 3.11 or newer is needed and this is 3.9"),
    (faked("venv", "No module named venv"), "no venv module"),
    (faked("venv", "The virtual environment was not created successfully because ensurepip is not available."), "python3-venv"),
    (faked("venv", "OSError: [Errno 28] No space left on device"), "no disk space"),
], ids=["old", "no venv", "no ensurepip", "full"])
def test_environment_says_in_one_line_what_is_missing(tmp_path, body, said):
    lines = environment(tmp_path, body)
    assert len(lines) == 1 and said in lines[0]


def test_environment_without_a_package_index(tmp_path):
    closed = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "",
              "PIP_EXTRA_INDEX_URL": ""}
    lines = environment(tmp_path, f'exec "{sys.executable}" "$@"', **closed)
    assert len(lines) == 1 and "no package index" in lines[0]
    assert not (tmp_path / ".venv/diffcourse.stamp").exists()


def test_makefile_lists_its_commands_by_default():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    for name in "env book test smoke nb serve sync clean".split():
        assert f"make {name} " in done.stdout
