"""The pages for teachers: every exercise has its line, the syllabus adds up, the museum is whole, the project's code runs."""

import importlib
import json
import re
from pathlib import Path

import pytest

from diffcourse.exercises import EXERCISES
from diffcourse.museum import EXHIBITS

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = {p.stem[1]: p for p in sorted(ROOT.glob("nbs/0[1-9]_*.ipynb"))}
for k in CHAPTERS:
    importlib.import_module(f"diffcourse.answers_{k}")
INSTRUCTOR = (ROOT / "book/instructor.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "book/project.md").read_text(encoding="utf-8")


def prose(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


ASKED = {  # number -> title, stars, as the chapters have them
    number: (title, stars) for path in CHAPTERS.values()
    for number, title, stars in re.findall(r"^`+\{exercise\} (\d\.\d) (.*) (★+)$", prose(path), re.M)}
LINES = [[c.strip() for c in line.strip("| ").split(" | ")] for line in INSTRUCTOR.splitlines() if line.startswith("| {ref}`")]
MUSEUM = prose(ROOT / "nbs/79_museum.ipynb")
SECTIONS = {label: text for label, text in zip(*[iter(re.split(r"^\(mus-([\w-]+)\)=$", MUSEUM, flags=re.M)[1:])] * 2)}


def test_the_table_has_each_exercise_once_with_its_title_and_stars():
    shown = {re.match(r"\{ref\}`(\d\.\d) (.*) <ex-\d-\d>`", name).groups(): stars for name, stars, *_ in LINES}
    assert [n for n, _ in shown] == [*EXERCISES] == [*ASKED]
    assert {n: (title, stars) for (n, title), stars in shown.items()} == ASKED
    assert {how for *_, how, _ in LINES} == {"check", "derivation", "talk"} and all(why for *_, why in LINES)


@pytest.mark.parametrize("page", ["book/instructor.md", "book/project.md", "nbs/79_museum.ipynb"])
def test_exercises_that_a_page_names_exist(page):
    for shown, label in re.findall(r"\{ref\}`(\d\.\d)[^<`]*<(ex-\d-\d)>`", prose(ROOT / page)):
        assert shown in EXERCISES and label == f"ex-{shown.replace('.', '-')}"


def test_research_is_graded_by_its_derivation():
    for name, stars, how, _ in LINES:
        assert how == "derivation" or len(stars) < 4, name


def weeks():
    table = INSTRUCTOR.split("(sec-syllabus)=")[1]
    return [row.strip("| ").split(" | ") for row in table.splitlines() if re.match(r"\| \d \|", row)]


def test_minutes_of_the_syllabus():
    assert len(weeks()) == 6
    for week, pages, reading, exercises, work in weeks():
        files = [next(ROOT.glob(f"{target.lstrip('/')}.*")) for target in re.findall(r"<(/[^>]*)>", pages)]
        words = sum(len(prose(path).split("\n## Exercises\n")[0].split()) for path in files)
        assert abs(int(reading) - words / 100) < 10, f"week {week}: {words / 100:.0f} minutes of reading"
        numbers = exercises.split(", ")
        assert {*numbers} <= {*EXERCISES} and int(work) == 10 * sum(len(ASKED[n][1]) for n in numbers), f"week {week}"


def test_each_chapter_has_its_week():
    read = " ".join(pages for _, pages, *_ in weeks())
    assert all(f"/nbs/{path.stem}>" in read for path in CHAPTERS.values())


WANTED = """no-half whole-log-snr integer-time wide-grid two-ends cold-average batches-counted subset-spread clipped-guess no-warm-up
half-precision no-waiting output-features training-reference leading-grid signal-left pixel-range shared-average flipped-velocity"""


def test_the_museum_is_whole():
    assert {*WANTED.split()} <= {*EXHIBITS} and [*SECTIONS] == [*EXHIBITS]
    assert sum(source == "tracker" for source, _ in EXHIBITS.values()) >= 5


@pytest.mark.parametrize("label", EXHIBITS)
def test_an_exhibit_names_its_source_and_its_exercises(label):
    source, exercises = EXHIBITS[label]
    text = SECTIONS[label]
    assert {*exercises.split()} <= {*re.findall(r"\{ref\}`(\d\.\d) <", text)} <= {*EXERCISES}
    links = re.findall(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/\d+\)", text)
    assert bool(links) == ("tracker" in source), label
    assert ("reference project" in text) == ("project" in source), label


def test_an_exhibit_is_followed_by_a_check():
    cells = json.loads((ROOT / "nbs/79_museum.ipynb").read_text(encoding="utf-8"))["cells"]
    label, checked = None, set()
    for cell in cells:
        text = "".join(cell["source"])
        if marks := re.findall(r"^\(mus-([\w-]+)\)=$", text, re.M):
            label = marks[-1]
        elif cell["cell_type"] == "code" and "assert" in text and "hide-cell" in cell["metadata"].get("tags", []):
            checked.add(label)
    assert checked == {*EXHIBITS}


# -- the final project ----------------------------------------------------------

def project():
    names, (score, example) = {}, re.findall(r"```python\n(.*?)```", PROJECT, re.S)
    exec(compile(score, "project.md", "exec"), names)
    return names, example


def test_the_project_scores_a_denoiser():
    names, example = project()
    dc = names["dc"]
    den = dc.load("digits/meanflow", source="shipped")
    mean, half, near = names["marks"](den, dc.MeanFlow(), dc.uniform(1), nfe=1, sets=2, size=200)
    assert mean > 1 and half > 0 and near > names["CLOSE"]
    assert not names["passes"](mean, half, near, 1)  # as the page says
    with pytest.raises(ValueError, match="2 evaluations came"):
        names["marks"](den, dc.MeanFlow(), dc.uniform(2), nfe=1, sets=2, size=200)
    assert {n for n in re.findall(r"\b(marks|passes|dc\.\w+)\(", example)} == {"marks", "passes", "dc.load", "dc.MeanFlow", "dc.uniform"}


def test_the_bars_are_those_of_the_records():
    names, _ = project()
    assert {*names["BARS"]} == {1, 2, 4}
    bars = {n: names["rival"](at) for n, at in names["BARS"].items()}
    assert all(m.short == "control" and m.solver == "AB2()" for m in bars.values())
    assert bars[1].level.value == bars[2].level.value > 2 * bars[4].level.value
    assert bars[4].nfe == 4
    with pytest.raises(KeyError):
        names["rival"](6)
    assert f"{bars[2].mean('total_images'):,.0f} images of training" in PROJECT
    level = bars[4].level.value
    assert names["passes"](level - 0.2, 0.1, 1.0, 4) and not names["passes"](level - 0.1, 0.2, 1.0, 4)
    assert not names["passes"](1.0, 0.1, 0.5, 4)
