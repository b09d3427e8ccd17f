"""Every exercise: its answer passes, a stub fails, and each wrong answer is told by a hint of its own."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import diffcourse.exercises as ex
from diffcourse.exercises import EXERCISES, NotYet, checker, fault, proven

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = {p.stem[1]: p for p in sorted(ROOT.glob("nbs/0[1-9]_*.ipynb"))}
for k in CHAPTERS:
    importlib.import_module(f"diffcourse.answers_{k}")


def cells(chapter):
    return json.loads(CHAPTERS[chapter].read_text(encoding="utf-8"))["cells"]


def solutions(chapter):  # number -> code of the page
    found = {}
    for cell in cells(chapter):
        text = "".join(cell["source"])
        if "solution" in cell["metadata"].get("tags", []):
            found[re.search(r"import check_(\d_\d)", text).group(1).replace("_", ".")] = text
    return found


@pytest.mark.parametrize("number", [*EXERCISES])
def test_an_exercise_keeps_its_word(number):
    proven(EXERCISES[number])


def test_there_are_enough():
    assert len(EXERCISES) >= 48 and sum(len(e.wrong) for e in EXERCISES.values()) >= 150
    assert all(5 <= sum(n[0] == k for n in EXERCISES) <= 9 for k in CHAPTERS)
    hints = [h for e in EXERCISES.values() if not isinstance(e.answer, str) for h in e.wrong]
    assert all(len(h) > 20 for h in hints)


@pytest.mark.parametrize("number", [*EXERCISES])
def test_the_solution_on_the_page_is_right(number, capsys):
    code = solutions(number[0])[number]
    before, inside = code.split("# BEGIN SOLUTION\n")
    inside, after = inside.split("# END SOLUTION\n")
    assert ast.parse(inside) and after.strip().startswith(f"check_{number.replace('.', '_')}(")
    import math

    exec(compile(code, number, "exec"), {"torch": torch, "math": math})
    assert capsys.readouterr().out == f"{number}: right.\n"


@pytest.mark.parametrize("chapter", [*CHAPTERS])
def test_every_exercise_of_a_chapter_is_on_its_page(chapter):
    text = "\n".join("".join(c["source"]) for c in cells(chapter))
    asked = re.findall(r"^`+\{exercise\} (\d\.\d) ", text, re.M)
    assert asked == [n for n in EXERCISES if n[0] == chapter] == [*solutions(chapter)]
    assert text.count("{solution-start}") == text.count("{solution-end}") == len(asked)


def noised(x0, eps, abar):
    return abar**0.5 * x0 + (1 - abar) ** 0.5 * eps


def cases():
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    return [(*x, abar) for abar in (0.9, 0.3)]


EXAMPLE = ex.Exercise("0.1", noised, cases)


@pytest.mark.parametrize("given, word", [
    (lambda x, e, a: -noised(x, e, a), "sign"),
    (lambda x, e, a: 2 * noised(x, e, a), "constant factor"),
    (lambda x, e, a: noised(x, e, a) + 1, "added"),
    (lambda x, e, a: noised(x, e, a)[0], "shape"),
    (lambda x, e, a: noised(x, e, a) + 0j, "type"),
    (lambda x, e, a: noised(x, e, a) / 0, "nan or an infinite"),
    (lambda x, e, a: noised(x, e, a).to("meta"), "meta"),
    (lambda x, e, a: "0.3", "a number or a tensor"),
    (lambda x, e, a: None, "is there a return"),
    (lambda x, e, a: 1 / 0, "ZeroDivisionError"),
    (lambda x, e: x, "3 arguments"),
    (torch.nn.Module, "a class came"),
    (noised(*cases()[0]), "without calling it"),
    (3.0, "without calling it"),
])
def test_what_is_no_answer_is_named(given, word):
    assert word in fault(EXAMPLE, given)


def test_an_answer_to_another_exercise_is_named():
    functions = [e for e in EXERCISES.values() if callable(e.answer)]
    first, second = functions[0], functions[-1]
    assert f"answers {second.number}" in fault(first, second.answer)


def test_arguments_that_an_answer_changes_are_copies():
    def greedy(x0, eps, abar):
        x0 *= abar**0.5
        x0 += (1 - abar) ** 0.5 * eps
        return x0

    assert fault(EXAMPLE, greedy) == ""


def test_words_and_numbers():
    word = ex.Exercise("0.2", "wider", wrong={"narrower": "look at the tails", "equal": "is it?"})
    assert fault(word, " Wider ") == "" and fault(word, "equal") == "is it?"
    assert "one of ['equal', 'narrower', 'wider']" in fault(word, "blue") and "a word" in fault(word, 3)
    number = ex.Exercise("0.3", 0.25, wrong={"squared": 0.0625})
    assert fault(number, 0.25) == "" and fault(number, torch.tensor(0.25)) == "" and fault(number, 0.0625) == "squared"
    for odd in ("0.25", True, float("nan"), torch.zeros(2), noised):
        assert "number is asked for" in fault(number, odd)


def test_checks_are_found_by_their_names(capsys):
    number, exercise = next(iter(EXERCISES.items()))
    getattr(ex, f"check_{number.replace('.', '_')}")(exercise.answer)
    assert capsys.readouterr().out == f"{number}: right.\n"
    with pytest.raises(NotYet, match=f"^{number}: "):
        checker(number)(object)
    for name in ("check_9_9", "check_1_99", "check_1", "nothing"):
        with pytest.raises(AttributeError):
            getattr(ex, name)
