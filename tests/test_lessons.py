"""Lessons: what a reader of a chapter sees of its code, and the programs written by hand, pasted into an empty Python."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = [
    "01_playground", "02_ddpm", "03_ddim", "04_flow_matching", "05_solvers", "06_distill", "07_meanflow", "08_leaderboard",
    "09_guidance", "66_inversion", "67_likelihood",
]


def code_cells(chapter):
    cells = json.loads((ROOT / f"nbs/{chapter}.ipynb").read_text())["cells"]
    return [c for c in cells if c["cell_type"] == "code"]


def lines(cell):
    return [line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#|")]


def seen(cell):
    directives = re.findall(r"^#\|\s*(\S+)", "".join(cell["source"]), re.MULTILINE)
    folded = any("hide" in tag or tag == "solution" for tag in cell["metadata"].get("tags", []))
    return not {"hide", "default_exp"} & {*directives} and not folded


def by_hand(chapter):
    return [line for c in code_cells(chapter) if "by-hand" in c["metadata"].get("tags", []) for line in lines(c)]


@pytest.mark.parametrize("chapter", LESSONS)
def test_visible_code_is_short(chapter):
    lengths = [len(lines(c)) for c in code_cells(chapter) if seen(c)]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 20


@pytest.mark.parametrize("chapter", LESSONS)
def test_folded_code_says_what_it_holds(chapter):
    for c in code_cells(chapter):
        if "hide-input" in c["metadata"].get("tags", []):
            assert c["metadata"]["mystnb"]["code_prompt_show"], c["id"]


@pytest.mark.parametrize("chapter", LESSONS)
def test_the_program_by_hand_runs_in_an_empty_python(chapter, tmp_path):
    program = by_hand(chapter)
    assert 10 <= len(program) <= 40
    assert "diffcourse" not in "\n".join(program)
    short, shortened = re.subn(r"\b\d{4}\b", "20", "\n".join(program))  # iterations
    assert shortened
    (tmp_path / "program.py").write_text(short)
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": ""}
    ran = subprocess.run([sys.executable, "-I", "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
