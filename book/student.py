"""Editions of the chapters for a class, made from the notebooks of the book, in build/student.

    python book/student.py

- nbs: for students, with a stub in the place of each solution, and without the explanations.
- instructor: the same with solutions, explanations, and the hint that each wrong answer gets.
- otter: the exercises of a chapter as an assignment that `otter assign` takes. Where otter-grader is installed it makes of them
  what students get and the zip file for Gradescope.

What only the book's pages understand (directives and roles of MyST) becomes plain Markdown.
"""
import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell
from pybtex.database import parse_file
from pybtex.richtext import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # its package, and not another that is installed
TARGET = ROOT / "build" / "student"
REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
diffcourse @ git+https://github.com/diffcourse/diffcourse
"""
DIRECTIVE = re.compile(r"^(`{3,}|:{3,})\{([\w-]+)\} *(.*)\n((?::[\w-]+:.*\n)*)((?:.*\n)*?)\1 *$", re.M)
ROLE = re.compile(r"\{([a-z:]+)\}`([^`]+)`")
MARKED = re.compile(r"# BEGIN SOLUTION\n(.*)^# END SOLUTION\n", re.M | re.S)
CHECK = re.compile(r"^check_(\d+_\d+)\((\w+)\)$", re.M)


def chapters() -> list[Path]:
    return sorted(ROOT.glob("nbs/0[1-9]_*.ipynb"))


# ---------------------------------------------------------------- MyST as plain Markdown

@cache
def site() -> str:
    return yaml.safe_load((ROOT / "book" / "_config.yml").read_text())["html"]["baseurl"]


@cache
def pages() -> dict[str, tuple[str, list[str]]]:
    """Each page of the book: its address without ending -> its title, and its Markdown cells."""
    found = {}
    for path in [*sorted(ROOT.glob("nbs/[0-9]*.ipynb")), *sorted(ROOT.glob("book/*.ipynb")), *sorted(ROOT.glob("book/*.md"))]:
        text = path.read_text(encoding="utf-8")
        cells = [c.source for c in nbformat.reads(text, 4).cells if c.cell_type == "markdown"] if path.suffix == ".ipynb" else [text]
        title = re.search(r"^# +(.+)", "\n".join(cells), re.M)
        found[path.relative_to(ROOT).with_suffix("").as_posix()] = (title[1] if title else path.stem, cells)
    return found


@cache
def labels() -> dict[str, tuple[str, str]]:
    """Each label of an equation or a section -> its page, and its number or its title. Chapters number equations like the site."""
    found = {}
    for page, (_, cells) in pages().items():
        text, chapter = "\n\n".join(cells), re.match(r"nbs/0([1-9])_", page)
        for n, label in enumerate(re.findall(r"^\$\$ *\(([\w-]+)\)", text, re.M), 1):
            found[label] = page, f"{chapter[1]}.{n}" if chapter else f"{n}"
        for label, title in re.findall(r"^\(([\w-]+)\)=\n+#+ +(.+)", text, re.M):
            found[label] = page, title
    return found


@cache
def works() -> dict:
    return parse_file(str(ROOT / "book" / "references.bib")).entries


@cache
def cited(key: str) -> tuple[str, str, str]:
    """Of a work: its authors, its year and its address."""
    entry = works()[key]
    names = [str(Text.from_latex(" ".join([*p.prelast_names, *p.last_names]))) for p in entry.persons["author"]]
    said = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    field = entry.fields
    link = (f"https://arxiv.org/abs/{field['eprint']}" if "eprint" in field else
            f"https://doi.org/{field['doi']}" if "doi" in field else field.get("url", ""))
    return said, field["year"], link


def address(page: str) -> str:
    """Where a page is, seen from an edition: the chapters lie side by side, the rest is on the site."""
    beside = ROOT / f"{page}.ipynb" in chapters()
    return f"{Path(page).name}.ipynb" if beside else f"{site()}{page}.html"


def citation(keys: str, in_brackets: bool) -> str:
    said = []
    for key in keys.split(","):
        names, year, link = cited(key.strip())
        text = f"{names}, {year}" if in_brackets else f"{names} ({year})"
        said.append(f"[{text}]({link})" if link else text)
    return f"({'; '.join(said)})" if in_brackets else ", ".join(said)


def role(match: re.Match, page: str) -> str:
    """A role of MyST in plain words."""
    kind, text = match.groups()
    named = re.fullmatch(r"(.+?)\s*<(.+)>", text, re.S)
    words, target = named.groups() if named else ("", text)
    if kind == "term":
        return words or target
    if kind in ("cite:t", "cite:p"):
        return citation(target, kind == "cite:p")
    if kind == "doc":
        target = target.strip("/")
        return f"[{words or pages()[target][0]}]({address(target)})"
    if kind in ("eq", "ref") and target in labels():
        other, said = labels()[target]
        said = words or (f"({said})" if kind == "eq" else said)
        return said if other == page else f"[{said}]({address(other)})"
    sys.exit(f"{page}: {match[0]} has no plain form: write one into `role` of book/student.py")


def directive(match: re.Match, page: str) -> str:
    """A directive of MyST: a heading, something that unfolds, or a quotation."""
    _, kind, title, options, body = match.groups()
    body = plain(body.strip("\n"), page)
    if kind in ("solution-start", "solution-end"):
        return ""
    if kind == "exercise":
        return f"### Exercise {title}\n\n{body}\n"
    if kind == "admonition" and "dropdown" in options:
        return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>\n"
    if kind == "admonition":
        return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *body.splitlines()])
    sys.exit(f"{page}: the directive {kind} has no plain form: write one into `directive` of book/student.py")


def plain(text: str, page: str) -> str:
    """Markdown as Jupyter shows it."""
    text = DIRECTIVE.sub(lambda m: directive(m, page), text)
    text = re.sub(r"^\$\$ *\(([\w-]+)\)", lambda m: rf"\tag{{{labels()[m[1]][1]}}}" + "\n$$", text, flags=re.M)
    text = re.sub(r"^\([\w-]+\)=\n+", "", text, flags=re.M)
    return ROLE.sub(lambda m: role(m, page), text)


# ---------------------------------------------------------------- the exercises of a page

@dataclass
class Exercise:
    number: str                        # "3.2": the second of chapter 3
    title: str
    asked: nbformat.NotebookNode       # its cell
    label: str = ""
    start: nbformat.NotebookNode | None = None
    code: nbformat.NotebookNode | None = None
    told: list | None = None           # cells of explanation, to the one with solution-end
    ended: bool = False

    @property
    def stars(self) -> int:
        return max(1, self.title.count("★"))

    @property
    def name(self) -> str:             # of what the check is given
        return CHECK.search(self.code.source)[2]

    @property
    def solution(self) -> str:
        return MARKED.search(self.code.source)[1]


def wrong(page: str, cell, what: str) -> None:
    sys.exit(f"{page}, cell {cell.id}: {what}")


def exercises(cells: list, page: str) -> list[Exercise]:
    """The exercises of a page, in order; a mark without its partner ends the command with what to do."""
    found, last = [], None
    known = {label for cell in cells for label in re.findall(r"^:label: (ex-\S+)", cell.source, re.M)}
    for cell in cells:
        text, markdown = cell.source, cell.cell_type == "markdown"
        if markdown and (asked := re.search(r"^`{3,}\{exercise\} (\S+) (.+)\n", text, re.M)):
            complete(last, page)
            if text.count("{exercise}") > 1:
                wrong(page, cell, "two exercises in one cell: give each a cell of its own")
            label = re.search(r"^:label: (\S+)", text, re.M)
            last = Exercise(asked[1], asked[2].strip(), cell, label[1] if label else "")
            found.append(last)
            continue
        inside = last is not None and last.start is not None and not last.ended
        if markdown and (start := re.search(r"\{solution-start\} *(\S*)", text)):
            if start[1] not in known:
                wrong(page, cell, f"no exercise has the label {start[1]!r}: write the one behind :label: of the exercise above")
            if inside:
                complete(last, page)
            if last is None or last.start or last.label != start[1]:
                wrong(page, cell, f"the solution of {start[1]} does not stand below its exercise: move it there")
            last.start, last.told = cell, []
            inside = True
        elif "BEGIN SOLUTION" in text or "END SOLUTION" in text or "solution" in cell.metadata.get("tags", []):
            if not inside:
                wrong(page, cell, "a solution outside of {solution-start} and {solution-end}: put it between the two")
            if last.code:
                wrong(page, cell, f"exercise {last.number} has a second solution cell: put both into cell {last.code.id}")
            last.code = solved(cell, last, page)
        elif inside:
            last.told.append(cell)
        if markdown and "{solution-end}" in text:
            if not inside:
                wrong(page, cell, "{solution-end} without its {solution-start}: write ```{solution-start} LABEL above the solution")
            last.ended = True
    complete(last, page)
    return found


def complete(exercise: Exercise | None, page: str) -> None:
    """End the command where the exercise lacks a part of its solution."""
    if exercise is None:
        return
    number, label = exercise.number, exercise.label
    if not label:
        wrong(page, exercise.asked, f"exercise {number} has no label: write :label: ex-{number.replace('.', '-')} below its title")
    if exercise.start is None:
        wrong(page, exercise.asked, f"exercise {number} has no solution: write ```{{solution-start}} {label} in a cell below it")
    if not exercise.ended:
        wrong(page, exercise.start, f"{{solution-start}} {label} has no end: write ```{{solution-end}} below the explanation of {number}")
    if exercise.code is None:
        wrong(page, exercise.start, f"exercise {number} has no solution cell: write a code cell with the tag solution below this one")


def solved(cell, exercise: Exercise, page: str):
    """The solution cell, if it is as it should be."""
    number = exercise.number
    if cell.cell_type != "code" or "solution" not in cell.metadata.get("tags", []):
        wrong(page, cell, f"the solution of {number} needs the tag solution: give it to this cell")
    for mark, where in (("BEGIN", "above"), ("END", "below")):
        if (many := cell.source.count(f"# {mark} SOLUTION\n")) != 1:
            wrong(page, cell, f"the solution of {number} has {'two lines' if many else 'no line'} # {mark} SOLUTION: write one {where} "
                              "the answer, and the check below # END SOLUTION")
    if not MARKED.search(cell.source):
        wrong(page, cell, "# END SOLUTION stands above # BEGIN SOLUTION: exchange the two")
    wanted = f"check_{number.replace('.', '_')}"
    if [f"check_{n}" for n, _ in CHECK.findall(MARKED.sub("", cell.source))] != [wanted]:
        wrong(page, cell, f"the solution of {number} has no line {wanted}(NAME) below # END SOLUTION: write it, and no other check")
    exercise.code = cell
    if not any(defines(node, exercise.name) for node in ast.parse(exercise.solution).body):
        wrong(page, cell, f"the solution of {number} does not define {exercise.name}, which its check takes: give both one name")
    return cell


def defines(node: ast.stmt, name: str) -> bool:
    return getattr(node, "name", "") == name or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name


def stub(exercise: Exercise) -> str:
    """What a student finds in the place of the solution."""
    node = next(n for n in ast.parse(exercise.solution).body if defines(n, exercise.name))
    if isinstance(node, ast.Assign):
        return f"{exercise.name} = ...\n"
    head = f"{node.name}({ast.unparse(node.args)})"
    said = ast.get_docstring(node)
    lines = [f"def {head}:", *([f"    {said!r}"] if said else []), "    raise NotYet(", f'        "write {head}, "',
             '        "then run its cell again")']
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the editions

def readable(cell, page: str):
    """A copy of a cell as it is in Jupyter: plain Markdown, code without nbdev's lines, folded where the page folds it."""
    copy = nbformat.from_dict(json.loads(json.dumps(cell)))
    if copy.cell_type == "markdown":
        copy.source = plain(copy.source, page).strip()
        return copy
    tags = copy.metadata.get("tags", [])
    if {"hide-input", "hide-cell"} & {*tags} or re.search(r"^#\| *hide", copy.source, re.M):
        copy.metadata["jupyter"] = {"source_hidden": True}
    copy.source = re.sub(r"^#\|.*\n?", "", copy.source, flags=re.M).strip("\n")
    copy.outputs, copy.execution_count = [], None
    return copy


def edition(cells: list, page: str, told: bool) -> list:
    """The cells for the students; `told`: with solutions, explanations and hints, for their instructor."""
    asked = exercises(cells, page)
    codes, ends = {e.code.id: e for e in asked}, {(e.told or [e.code])[-1].id: e for e in asked}
    dropped = {c.id for e in asked for c in [e.start, *([] if told else e.told)]}
    made = []
    for cell in cells:
        if cell.id not in dropped:
            made.append(readable(cell, page))
            if cell.id in codes and not told:
                made[-1].source = unsolved(codes[cell.id])
        if told and cell.id in ends:
            made.append(new_markdown_cell(hints(ends[cell.id], page), id=f"{cell.id}-hints"))
    return [c for c in made if c.source]


def unsolved(exercise: Exercise) -> str:
    """The solution cell with its stub."""
    text = MARKED.sub(lambda _: stub(exercise) + "\n", exercise.code.source)
    return text.replace("import check_", "import NotYet, check_", 1) if "NotYet" in text else text


@cache
def code_of_answers(chapter: str) -> tuple[dict[str, str], dict[str, str]]:
    """The wrong answers of a chapter as code: those that stand behind a hint, and the functions that have a name."""
    tree = ast.parse((ROOT / "diffcourse" / f"answers_{chapter}.py").read_text())
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    behind = {key.value: ast.unparse(value.body if isinstance(value, ast.Lambda) else value)
              for table in tables for key, value in zip(table.keys, table.values) if isinstance(key, ast.Constant)}
    return behind, {n.name: ast.unparse(n) for n in tree.body if isinstance(n, ast.FunctionDef)}


def escape(text: str, marks: str) -> str:
    return re.sub(f"([{marks}])", r"\\\1", text)


def hints(exercise: Exercise, page: str) -> str:
    """The table of the wrong answers to an exercise, and the code of the functions in it."""
    from diffcourse.exercises import EXERCISES

    chapter = exercise.number.split(".")[0]
    importlib.import_module(f"diffcourse.answers_{chapter}")
    if exercise.number not in EXERCISES:
        wrong(page, exercise.asked, f"the answers of chapter {chapter} do not know exercise {exercise.number}: enter it in "
                                    f"the notebook answers_{chapter}")
    known, (behind, functions) = EXERCISES[exercise.number], code_of_answers(chapter)
    word = isinstance(known.answer, str)
    rows = [(repr(key), value) if word else (behind[key], key) for key, value in known.wrong.items()]
    shown, named = " ".join(given for given, _ in rows), []
    for _ in range(3):                 # what the answers call, and what that calls
        named = [code for name, code in functions.items() if re.search(rf"\b{name}\b", shown)]
        shown = " ".join([shown, *named])
    lines = [f"| `{escape(given, '|')}` | {escape(hint, '|*<')} |" for given, hint in rows]
    table = "\n".join(["| Wrong answer | The hint that it gets |", "|---|---|", *lines])
    if not named:
        return table
    block = "\n\n\n".join(named)
    return f"{table}\n\n<details><summary>The functions in this table</summary>\n\n```python\n{block}\n```\n\n</details>"


# ---------------------------------------------------------------- otter-grader

def assignment(cells: list, page: str) -> list:
    """The exercises of a chapter in the format of `otter assign`: a point for each star, and the checks of the book as tests."""
    asked, title = exercises(cells, page), re.search(r"^# +(.+)", cells[0].source, re.M)[1]
    name = Path(page).name
    config = {"name": name, "requirements": "requirements.txt", "python_version": "3.11", "export_cell": {"pdf": False},
              "tests": {"ok_format": False}, "show_question_points": True}
    made = [new_raw_cell("# ASSIGNMENT CONFIG\n" + yaml.safe_dump(config, sort_keys=False)),
            new_markdown_cell(f"# Exercises: {title}\n\nThey belong to the [chapter]({site()}{page}.html). Write the function that is "
                              "asked for, or set the answer, and run the cell below it. It tells what kind of wrong an answer is."),
            new_code_cell("import math\n\nimport torch\n\nfrom diffcourse.exercises import NotYet")]
    for e in asked:
        made += question(e, page)
    for n, cell in enumerate(made):
        cell["id"] = f"{name}-{n}"
    return made


def question(exercise: Exercise, page: str) -> list:
    """The cells of one exercise."""
    number = exercise.number.replace(".", "_")
    name = f"answer_{number}" if exercise.name == "answer" else exercise.name    # otter may test at the end, when the last one holds
    asked, solution, prompt = (re.sub(r"(?<=`)answer(?=`)|^answer(?= =)", name, text, flags=re.M) for text in
                               (plain(exercise.asked.source, page).strip(), exercise.solution, stub(exercise)))
    config = {"name": f"q{number}", "points": exercise.stars}
    solved = f'# BEGIN SOLUTION NO PROMPT\n{solution}# END SOLUTION\n""" # BEGIN PROMPT\n{prompt}""" # END PROMPT'
    test = f"def test_{number}({name}):\n    from diffcourse.exercises import check_{number}\n    check_{number}({name})"
    return [new_raw_cell("# BEGIN QUESTION\n" + yaml.safe_dump(config, sort_keys=False)), new_markdown_cell(asked),
            new_raw_cell("# BEGIN SOLUTION"), new_code_cell(solved), new_raw_cell("# END SOLUTION"),
            new_raw_cell("# BEGIN TESTS"), new_code_cell(test), new_raw_cell("# END TESTS"),
            new_raw_cell("# END QUESTION")]


def assign(masters: list[Path]) -> None:
    """Let otter-grader make of each master what students get and the zip file for Gradescope."""
    otter = [sys.executable, "-m", "otter", "assign"]
    if not importlib.util.find_spec("otter"):
        return print("student: for the zip files of Gradescope: .venv/bin/pip install otter-grader, then make student again")

    def run(master):
        command = [*otter, str(master), str(master.parent / "dist" / master.stem)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with ThreadPoolExecutor(2) as pool:
        for master, done in zip(masters, pool.map(run, masters)):
            if done.returncode:
                sys.exit(f"{done.stdout}\n{master.name}: otter assign failed, what it said stands above")
    print("student: what students get of otter, and the zip files for Gradescope, in otter/dist")


# ---------------------------------------------------------------- all of it

def write(path: Path, cells: list, metadata: dict) -> None:
    nb = new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(nb)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def make(source: Path, target: Path) -> int:
    """Write the three editions of a chapter; gives the number of its exercises."""
    nb, page = nbformat.read(source, 4), f"nbs/{source.stem}"
    asked = exercises(nb.cells, page)
    write(target / "nbs" / source.name, edition(nb.cells, page, told=False), nb.metadata)
    write(target / "instructor" / source.name, edition(nb.cells, page, told=True), nb.metadata)
    write(target / "otter" / source.name, assignment(nb.cells, page), nb.metadata)
    return len(asked)


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    many = sum(make(source, TARGET) for source in chapters())
    (TARGET / "otter" / "requirements.txt").write_text(REQUIREMENTS)
    print(f"student: {many} exercises of {len(chapters())} chapters in {TARGET.relative_to(ROOT)}: nbs, instructor, otter")
    assign(sorted((TARGET / "otter").glob("*.ipynb")))


if __name__ == "__main__":
    main()
