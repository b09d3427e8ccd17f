"""The editions for a class: no answer is left in the students', every hint is in the instructor's, otter's format is kept."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell

from diffcourse.exercises import EXERCISES, NotYet, checker

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("student", ROOT / "book" / "student.py")
student = importlib.util.module_from_spec(spec)
sys.modules["student"] = student
spec.loader.exec_module(student)
PAGES = {p.stem: nbformat.read(p, 4).cells for p in student.chapters()}
for name in PAGES:
    importlib.import_module(f"diffcourse.answers_{name[1]}")

ASKED = """`````{exercise} 3.1 What is kept ★★
:label: ex-3-1
:nonumber:

Write `kept_and_fresh(abar_t, abar_s, eta)` for {eq}`eq-ddim-step`.

````{admonition} Hint
:class: dropdown tip

Squares add up.
````
`````"""
START = "```{solution-start} ex-3-1\n:class: dropdown\n```"
CODE = """from diffcourse.exercises import check_3_1

# BEGIN SOLUTION
import secret

def kept_and_fresh(abar_t, abar_s, eta):
    "Two weights."
    return secret.answer(abar_t)
# END SOLUTION
check_3_1(kept_and_fresh)"""
END = "Because of a secret.\n\n```{solution-end}\n```"


def tiny(asked=ASKED, start=START, code=CODE, end=END, tags=("solution",)):
    """A page with one exercise; a part that is None is left out."""
    cells = [new_markdown_cell("# A page\n\n> A line.", id="title"), new_markdown_cell(asked, id="asked"),
             start and new_markdown_cell(start, id="start"), code and new_code_cell(code, id="code", metadata={"tags": [*tags]}),
             end and new_markdown_cell(end, id="end"), new_markdown_cell("## Summary", id="last")]
    return [c for c in cells if c]


def texts(cells, kind=None):
    return [c.source for c in cells if kind in (None, c.cell_type)]


def test_a_tiny_page_for_students():
    title, asked, code, last = student.edition(tiny(), "nbs/03_ddim", told=False)
    assert asked.source == """### Exercise 3.1 What is kept ★★

Write `kept_and_fresh(abar_t, abar_s, eta)` for (3.4).

<details><summary>Hint</summary>

Squares add up.

</details>"""
    assert code.source == """from diffcourse.exercises import NotYet, check_3_1

def kept_and_fresh(abar_t, abar_s, eta):
    'Two weights.'
    raise NotYet(
        "write kept_and_fresh(abar_t, abar_s, eta), "
        "then run its cell again")

check_3_1(kept_and_fresh)"""
    assert last.source == "## Summary"


def test_a_tiny_page_for_the_instructor():
    _, asked, code, told, hints, last = texts(student.edition(tiny(), "nbs/03_ddim", told=True))
    assert "secret.answer" in code and told == "Because of a secret." and last == "## Summary"
    assert hints.startswith("| Wrong answer | The hint that it gets |\n|---|---|\n| `((1 - b)") and "def _eta_once" in hints


FAULTS = {
    "no END": (dict(code=CODE.replace("# END SOLUTION\n", "")), "code", "no line # END SOLUTION: write one below"),
    "no BEGIN": (dict(code=CODE.replace("# BEGIN SOLUTION\n", "")), "code", "no line # BEGIN SOLUTION: write one above"),
    "two ENDs": (dict(code=CODE + "\n# END SOLUTION\n"), "code", "two lines # END SOLUTION"),
    "the wrong way round": (dict(code="# END SOLUTION\nx = 1\n# BEGIN SOLUTION\ncheck_3_1(x)"), "code", "exchange the two"),
    "no check": (dict(code=CODE.replace("check_3_1(k", "print(k")), "code", "no line check_3_1(NAME)"),
    "another check": (dict(code=CODE.replace("check_3_1(k", "check_3_2(k")), "code", "no line check_3_1(NAME)"),
    "another name": (dict(code=CODE.replace("check_3_1(kept", "check_3_1(kent")), "code", "does not define kent_and_fresh"),
    "no tag": (dict(tags=()), "code", "needs the tag solution"),
    "no end": (dict(end="Because."), "start", "write ```{solution-end} below the explanation of 3.1"),
    "no start": (dict(start=None), "code", "outside of {solution-start} and {solution-end}"),
    "an end alone": (dict(start=None, code=None), "end", "without its {solution-start}"),
    "no solution": (dict(start=None, code=None, end=None), "asked", "has no solution: write ```{solution-start} ex-3-1"),
    "no solution cell": (dict(code=None), "start", "has no solution cell"),
    "a strange label": (dict(start=START.replace("3-1", "9-9")), "start", "no exercise has the label 'ex-9-9'"),
    "no label": (dict(asked=ASKED.replace(":label: ex-3-1\n", ""), start=None, code=None, end=None), "asked", "has no label"),
    "two in a cell": (dict(asked=ASKED + "\n\n" + ASKED), "asked", "two exercises in one cell"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mark_without_its_partner_is_named(fault):
    change, cell, words = FAULTS[fault]
    with pytest.raises(SystemExit) as stopped:
        student.exercises(tiny(**change), "nbs/03_ddim")
    assert str(stopped.value).startswith(f"nbs/03_ddim, cell {cell}: ") and words in str(stopped.value)


def test_what_has_no_plain_form_is_named():
    for text in ("{abbr}`x`", "{eq}`eq-nowhere`", "```{figure} x.png\nA figure\n```"):
        with pytest.raises(SystemExit, match="has no plain form"):
            student.plain(text, "nbs/03_ddim")
    with pytest.raises(SystemExit, match="do not know exercise 3.99"):
        asked = tiny(asked=ASKED.replace("3.1", "3.99"), code=CODE.replace("3_1", "3_99"))
        student.edition(asked, "nbs/03_ddim", told=True)


def test_plain_forms():
    def plain(text):
        return student.plain(text, "nbs/03_ddim")

    assert plain("{cite:t}`Lin2024`") == "[Lin et al. (2024)](https://arxiv.org/abs/2305.08891)"
    assert plain("{cite:p}`Song2021DDIM,Lin2024`").startswith("([Song et al., 2021a](") and plain("{term}`the score <score>`") == "the score"
    assert plain("{doc}`/nbs/02_ddpm`").endswith("](02_ddpm.ipynb)") and plain("{doc}`x </nbs/16_evaluation>`").startswith("[x](https://")
    assert plain("$$\na = b\n$$ (eq-eta)") == "$$\na = b\n\\tag{3.3}\n$$" and plain("{eq}`eq-posterior`").endswith("(02_ddpm.ipynb)")
    assert plain(":::{admonition} Which?\n:class: tip\nThis.\n:::") == "> **Which?**\n>\n> This."


@pytest.mark.parametrize("name", PAGES)
def test_no_answer_is_left_for_students(name):
    cells, page = PAGES[name], f"nbs/{name}"
    text = "\n".join(texts(student.edition(cells, page, told=False)))
    hidden = {c.id for e in student.exercises(cells, page) for c in [e.start, e.code, *e.told]}
    public = "\n".join(c.source for c in cells if c.id not in hidden)
    for e in student.exercises(cells, page):
        lines = [line.strip() for line in e.solution.splitlines()]
        assert e.solution not in text and "# BEGIN SOLUTION" not in text
        left = [line for line in lines if len(line) > 12 and line in text and line not in public]
        assert [line for line in left if not line.startswith("def ")] == []
        said = [p for c in e.told for p in c.source.split("\n\n") if not p.startswith("```")]
        assert said and not any(p in text for p in said)
    assert not re.search(r"answers_\d|\{[a-z-]+\}`|^[`:]{3,}\{|^:\w+:|\(eq-", text, re.M)


@pytest.mark.parametrize("name", PAGES)
def test_every_exercise_is_there_and_stops_with_what_to_do(name):
    cells = student.edition(PAGES[name], f"nbs/{name}", told=False)
    numbers = re.findall(r"^### Exercise (\d\.\d) .+ ★+$", "\n".join(texts(cells)), re.M)
    assert numbers == [n for n in EXERCISES if n[0] == name[1]]
    stubs = [c.source for c in cells if "solution" in c.metadata.get("tags", [])]
    assert len(stubs) == len(numbers)
    for number, code in zip(numbers, stubs):
        with pytest.raises(NotYet) as stopped:
            exec(compile(code, number, "exec"), {"torch": torch, "math": math})
        name_asked = EXERCISES[number].name
        assert re.match(rf"{number}: (write {name_asked}\(.*\)|set answer), then run its cell again$", str(stopped.value))


@pytest.mark.parametrize("name", PAGES)
def test_the_instructor_has_every_hint(name):
    cells = student.edition(PAGES[name], f"nbs/{name}", told=True)
    tables = [c.source for c in cells if c.id.endswith("-hints")]
    for e, table in zip(student.exercises(PAGES[name], f"nbs/{name}"), tables, strict=True):
        wrong = EXERCISES[e.number].wrong
        hints = wrong.values() if isinstance(EXERCISES[e.number].answer, str) else wrong
        assert wrong and all(f" | {student.escape(hint, '|*<')} |" in table for hint in hints)
        assert table.count("\n| ") == len(wrong)
        assert e.solution in "\n".join(texts(cells))
    ids = [c.id for c in cells]
    assert len(ids) == len({*ids})


@pytest.mark.parametrize("name", PAGES)
def test_the_assignment_is_in_the_format_of_otter(name):
    cells = student.assignment(PAGES[name], f"nbs/{name}")
    raw = [c.source for c in cells if c.cell_type == "raw"]
    assert raw[0].startswith("# ASSIGNMENT CONFIG\n") and yaml.safe_load(raw[0])["name"] == name
    asked = student.exercises(PAGES[name], f"nbs/{name}")
    kinds = ["# BEGIN QUESTION", "# BEGIN SOLUTION", "# END SOLUTION", "# BEGIN TESTS", "# END TESTS", "# END QUESTION"]
    assert [text.splitlines()[0] for text in raw[1:]] == kinds * len(asked)
    questions = [yaml.safe_load(text) for text in raw if text.startswith("# BEGIN QUESTION")]
    assert questions == [{"name": f"q{e.number.replace('.', '_')}", "points": e.stars} for e in asked]
    start, *codes = [c.source for c in cells if c.cell_type == "code"]
    names = {}
    exec(start, names)
    for e, solved, test in zip(asked, codes[::2], codes[1::2], strict=True):
        prompt = re.search(r'^""" # BEGIN PROMPT\n(.*)""" # END PROMPT$', solved, re.M | re.S)[1]
        exec(test, names)
        check = names[f"test_{e.number.replace('.', '_')}"]
        (given,) = check.__code__.co_varnames[:1]
        exec(prompt, names)
        with pytest.raises(NotYet, match=f"^{e.number}: .*, then run its cell again$"):
            check(names[given])
        exec(solved, names)
        check(names[given])
    assert len({n for n in re.findall(r"^def test_\d_\d\((\w+)\)", "\n".join(codes), re.M)}) == len(asked)
    assert len({c["id"] for c in cells}) == len(cells)


def test_what_is_made_can_be_read(tmp_path):
    source = next(p for p in student.chapters() if p.stem == "03_ddim")
    assert student.make(source, tmp_path) == 8
    for folder in ("nbs", "instructor", "otter"):
        nb = nbformat.read(tmp_path / folder / "03_ddim.ipynb", 4)
        nbformat.validate(nb)
        assert all(not c.outputs and c.execution_count is None for c in nb.cells if c.cell_type == "code")
    first = (tmp_path / "nbs" / "03_ddim.ipynb").read_bytes()
    student.make(source, tmp_path)
    assert (tmp_path / "nbs" / "03_ddim.ipynb").read_bytes() == first


def test_otter_takes_the_assignment(tmp_path):
    pytest.importorskip("otter", reason="otter-grader is not installed")
    student.make(next(p for p in student.chapters() if p.stem == "03_ddim"), tmp_path)
    (tmp_path / "otter" / "requirements.txt").write_text(student.REQUIREMENTS)
    student.assign([tmp_path / "otter" / "03_ddim.ipynb"])
    (made,) = tmp_path.glob("otter/dist/03_ddim/student/*.ipynb")
    assert "eta**2 * var" not in made.read_text() and len([*tmp_path.glob("otter/dist/03_ddim/autograder/*.zip")]) == 1


def test_a_stub_says_what_to_do():
    def stub(*arguments):
        raise NotYet("write it, then run its cell again")

    functions = [e for e in EXERCISES.values() if callable(e.answer)]
    others = [e for e in EXERCISES.values() if not callable(e.answer)]
    for e, given, words in [(functions[0], stub, "write it"), *((e, ..., "set answer") for e in others)]:
        with pytest.raises(NotYet, match=f"^{e.number}: {words}, then run its cell again$"):
            checker(e.number)(given)
