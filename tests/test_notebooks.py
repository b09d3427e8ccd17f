"""The form that every notebook keeps: what the export, papermill, the site and Colab rely on."""

import ast
import configparser
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [*sorted(ROOT.glob("nbs/[0-9]*.ipynb")), *sorted(ROOT.glob("book/*.ipynb"))]
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name == "nbs"]
LINES, COLUMNS = 30, 72


def name(path):
    return path.stem


def cells(path, kind=None):
    found = json.loads(path.read_text())["cells"]
    return [(c, "".join(c["source"])) for c in found if kind in (None, c["cell_type"])]


def parameters(path):
    """The declared parameters, as papermill and a reader see them: name -> (value, comment)."""
    found = [text for cell, text in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(found) == 1, f"{path.name} has {len(found)} parameters cells, not one"
    lines = found[0].strip().splitlines()
    assert lines[-1] == "declare(ns=globals())"
    declared = {}
    for node in ast.parse(found[0]).body[:-1]:
        assert isinstance(node, ast.AnnAssign), f"{ast.unparse(node)}: give it an annotation"
        assert "#" in lines[node.end_lineno - 1], f"{ast.unparse(node)}: say in a comment what it is"
        declared[node.target.id] = ast.literal_eval(node.value)
    return declared


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_source_holds_no_outputs(path):
    notebook = json.loads(path.read_text())
    assert "widgets" not in notebook["metadata"]
    for cell, _ in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"cell {cell['id']}: make sync"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_cell_ids_are_there_and_differ(path):
    ids = [cell["id"] for cell, _ in cells(path)]
    assert len(ids) == len({*ids})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_first_cells(path):
    (_, title), *rest = cells(path)
    assert re.match(r"# \S[^\n]*\n\n> \S[^\n]*(\n|$)", title), "the first cell: # Title, an empty line, > one line"
    if path in CHAPTERS:
        page = f"[Rendered page](https://diffcourse.github.io/diffcourse/nbs/{path.stem}.html)"
        assert page in title
        module = "__init__" if path.stem == "10_diffcourse" else path.stem.partition("_")[2]
        assert rest[0][1].strip() == f"#| default_exp {module}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_setup_cell_installs_from_the_address_in_settings(path):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    setup = [text for _, text in cells(path, "code") if "find_spec" in text and "pip" in text]
    assert len(setup) == 1 and setup[0].startswith("#| hide\n")
    assert f'"git+{settings["DEFAULT"]["git_url"]}"' in setup[0]
    assert "torch" not in setup[0], "Colab's own torch must stay"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_code_cells_are_short_and_narrow(path):
    found = []
    for cell, text in cells(path, "code"):
        lines = text.splitlines()
        found += [f"cell {cell['id']} has {len(lines)} lines"] if len(lines) > LINES else []
        wide = [line for line in lines if len(line) > (79 if "http" in line else COLUMNS)]
        found += [] if text.startswith("#| hide") else [f"cell {cell['id']}, {len(line)} columns: {line.strip()}" for line in wide]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_the_cell_after_the_parameters_checks_them(path):
    parameters(path)
    code = cells(path, "code")
    at = next(i for i, (cell, _) in enumerate(code) if "parameters" in cell["metadata"].get("tags", []))
    assert re.match(r"check\(\s*globals\(\),", code[at + 1][1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_parameter_files(path):
    declared = parameters(path)
    digits, smoke = (yaml.safe_load((ROOT / "configs" / scale / f"{path.stem}.yaml").read_text()) or {} for scale in ("digits", "smoke"))
    assert digits == declared, "configs/digits repeats the defaults"
    assert smoke.keys() <= declared.keys()
    for key, value in smoke.items():
        assert type(value) is type(declared[key]) or declared[key] is None, f"{key}: {value!r} is not like {declared[key]!r}"


def test_every_parameter_file_has_its_notebook():
    for scale in ("digits", "smoke"):
        assert {p.stem for p in (ROOT / "configs" / scale).glob("*")} == {p.stem for p in NOTEBOOKS}


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    owners = {"__init__" if p.stem == "10_diffcourse" else p.stem.partition("_")[2] for p in CHAPTERS}
    assert owners == {p.stem for p in ROOT.glob("diffcourse/*.py")} - {"_modidx", "__main__"}


def test_every_page_is_in_the_contents_and_every_module_in_the_reference():
    files = set(re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text()))
    pages = {p.relative_to(ROOT).with_suffix("").as_posix() for p in [*NOTEBOOKS, *ROOT.glob("book/*.md")]}
    assert files == pages
    listed = set(re.findall(r"automodule:: (\S+)", (ROOT / "book" / "api.md").read_text()))
    modules = {p.stem for p in ROOT.glob("diffcourse/*.py")} - {"_modidx", "__init__", "__main__"}
    assert listed == {"diffcourse", *(f"diffcourse.{m}" for m in modules)}
