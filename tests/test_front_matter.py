"""The pages around the chapters: notation, glossary, references, front page."""

import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffcourse import paths

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NOTATION = (BOOK / "notation.md").read_text(encoding="utf-8")


def sources():
    "(name, Markdown) of every page of the book."
    for path in sorted([*BOOK.glob("*.md"), *ROOT.glob("nbs/*.md")]):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted([*BOOK.glob("*.ipynb"), *ROOT.glob("nbs/*.ipynb")]):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        yield path.name, "\n\n".join(text)


def section(text, label):
    "What stands between the label (label)= and the next section label."
    return re.split(r"^\(sec-", text.split(f"({label})=\n")[1], flags=re.M)[0]


def rows(text):
    "Cells of the rows of the Markdown tables in text, headings left out."
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [c.strip() for c in line.strip().strip("|").split(" | ")]


# -- the bibliography ---------------------------------------------------------

def bib_entries():
    text = (BOOK / "references.bib").read_text(encoding="utf-8")
    parts = re.split(r"^@(\w+)\{([^,]+),", text, flags=re.M)[1:]
    return [(k, key, body) for k, key, body in zip(*[iter(parts)] * 3)]


def test_bibliography_is_whole():
    entries = bib_entries()
    keys = [key for _, key, _ in entries]
    assert len(keys) == len(set(keys)) > 20
    for kind, key, body in entries:
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, flags=re.M))
        assert {"author", "title", "year"} <= set(fields), key
        assert re.fullmatch(r"(19|20)\d\d[a-z]?", fields["year"]), key
        assert fields["year"][:4] in key, key
        venue = {"journal", "booktitle", "publisher", "institution", "howpublished"}
        assert venue & set(fields), f"{key} has no venue"
        findable = {"doi", "eprint", "url"} & set(fields)
        assert findable or key == "Diwan2026", f"{key}: no doi, eprint or url"
        assert re.fullmatch(r"\d{4}\.\d{5}", fields.get("eprint", "0000.00000")), key
        assert body.count("{") + 1 == body.count("}"), f"{key}: unbalanced braces"


def test_two_papers_of_a_year_can_be_told_apart():
    labels = {}
    for _, key, body in bib_entries():
        people = re.search(r"^  author = \{(.*)\},$", body, flags=re.M)[1].split(" and ")
        names = [person.split(",")[0] for person in people]
        shown = names if len(names) < 3 else names[:1]  # Song et al.
        year = re.search(r"^  year = \{(.*)\},$", body, flags=re.M)[1]
        labels.setdefault((*shown, len(names) > 2, year), []).append(key)
    assert not [keys for keys in labels.values() if len(keys) > 1]


def test_citations_exist():
    keys = {key for _, key, _ in bib_entries()}
    for name, text in sources():
        for cited in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            for key in cited.split(","):
                assert key.strip() in keys, f"{name} cites {key!r}"


# -- the glossary -------------------------------------------------------------

def glossary():
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    body = text.split(":::{glossary}\n")[1].rsplit(":::", 1)[0]
    return [
        (block.splitlines()[0], " ".join(block.split("\n")[1:]).strip())
        for block in re.split(r"\n\n(?=\S)", body.strip())
    ]


def test_glossary():
    entries = glossary()
    words = [word for word, _ in entries]
    assert len(words) >= 30
    assert len({w.lower() for w in words}) == len(words), "a word stands twice"
    assert words == sorted(words, key=str.lower), "not in the order of the alphabet"
    for word, meaning in entries:
        assert meaning, f"{word} has no meaning"
        plain = re.sub(r"\$[^$]*\$|\{[^}]*\}`[^`]*`", "x", meaning)
        assert len(re.findall(r"[.?](?=\s|$)", plain)) <= 2, f"{word}: too long"


def test_terms_exist():
    words = {word.lower() for word, _ in glossary()}
    for name, text in sources():
        for used in re.findall(r"\{term\}`([^`]+)`", text):
            target = re.sub(r"^.*<(.*)>$", r"\1", " ".join(used.split()))
            assert target.lower() in words, f"{name}: {target!r} is not in the glossary"


# -- links between pages ------------------------------------------------------

@pytest.mark.parametrize("page", ["index.md", "notation.md", "glossary.md",
                                  "references.md", "prerequisites.ipynb"])
def test_links_lead_to_pages(page):
    text = dict(sources())[page]
    for used in re.findall(r"\{doc\}`([^`]+)`", text):
        target = re.sub(r"^.*<(.*)>$", r"\1", " ".join(used.split()))
        here = ROOT / target.lstrip("/")
        assert any(here.with_name(here.name + e).is_file() for e in (".md", ".ipynb")), (
            f"{page} links to {target}"
        )


def test_labels_and_equations_are_unique_and_found():
    labels, used = [], []
    for name, text in sources():
        labels += re.findall(r"^\((\S+)\)=$", text, flags=re.M)
        labels += re.findall(r"^\$\$ \((\S+)\)$", text, flags=re.M)
        if name in ("prerequisites.ipynb", "notation.md", "index.md", "glossary.md"):
            used += re.findall(r"\{(?:eq|ref)\}`([^`<>]+)`", text)
    assert len(labels) == len(set(labels)), sorted(x for x in labels if labels.count(x) > 1)
    assert not set(used) - set(labels)


# -- the notation -------------------------------------------------------------

def formula(tex, values):
    "The value of a formula of the tables, read from the page itself."
    tex = tex.strip().strip("$").replace("\\,", "")
    names = {r"\alpha'": "da", r"\sigma'": "ds", r"\lambda'": "dl", r"\alpha": "a",
             r"\sigma": "b", r"\varepsilon": "eps", "x_0": "x0", "x": "x", "v": "v",
             "u": "u", "s": "s", "D": "D"}
    token = re.compile(
        r"(\\alpha'|\\sigma'|\\lambda'|\\alpha|\\sigma|\\varepsilon|x_0|\^2|[xvusD()/+-])\s*"
    )
    out, at, after = "", 0, False
    while at < len(tex):
        m = token.match(tex, at)
        assert m, f"cannot read {tex[at:]!r} of {tex!r}"
        piece, at = m[1], m.end()
        if piece in names or piece == "(":
            out += ("*" if after else "") + names.get(piece, piece)
            after = piece != "("
        else:
            out += {"^2": "**2"}.get(piece, piece)
            after = piece in (")", "^2")
    return eval(out, {"__builtins__": {}}, values)


def values_at(t, alpha, sigma):
    "Every symbol of the tables for one x0 and one eps, at time t."
    t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    a, b = alpha(t), sigma(t)
    da, ds = (torch.autograd.grad(f, t, retain_graph=True)[0].item() for f in (a, b))
    a, b, x0, eps = a.item(), b.item(), 0.7, -1.3
    return dict(a=a, b=b, da=da, ds=ds, dl=da / a - ds / b, D=a * ds - b * da, x0=x0,
                eps=eps, x=a * x0 + b * eps, v=a * eps - b * x0, u=da * x0 + ds * eps,
                s=-eps / b)


WAYS = {
    "linear": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2)),
    "neither": (lambda t: torch.exp(-t) * (1 - t / 2), lambda t: t * (2 - t) + t**3 / 4),
}
SYMBOL = {"eps": "eps", "x0": "x0", "v": "v", "flow": "u", "score": "s"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("t", [0.07, 0.5, 0.93])
def test_conversion_tables(way, t):
    values = values_at(t, *WAYS[way])
    text = section(NOTATION, "sec-notation-predictions")
    seen = []
    for row in rows(text):
        name = row[0].strip('`"')
        if name not in SYMBOL:
            continue
        if len(row) == 4:  # from a prediction to x0 and eps
            for cell, want in zip(row[1:3], ("x0", "eps")):
                assert formula(cell, values) == pytest.approx(values[want], rel=1e-10)
        else:  # from x0 and eps to a prediction
            want = values[SYMBOL[name]]
            assert formula(row[1], values) == pytest.approx(want, rel=1e-10)
        seen.append((name, len(row)))
    assert sorted(seen) == sorted(
        [(n, 4) for n in SYMBOL] + [(n, 3) for n in ("v", "flow", "score")]
    )


@pytest.mark.parametrize("way", WAYS)
def test_both_forms_of_d(way):
    "D = alpha sigma' - sigma alpha' = -alpha sigma lambda'."
    text = section(NOTATION, "sec-notation-predictions")
    line = re.search(r"^D = (.*) = (.*) \.$", text, flags=re.M)
    values = values_at(0.4, *WAYS[way])
    for side in line.groups():
        assert formula(side, values) == pytest.approx(values["D"], rel=1e-10)
    if way == "linear":
        assert values["D"] == pytest.approx(1)


def test_the_code_converts_as_the_page_says():
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, generator=gen, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for path in (paths.Linear(), paths.VP.cosine(), paths.VP.linear(), paths.VP.sigmoid()):
        x = path.add_noise(x0, eps, t)
        a, b, da, ds = (paths.expand(getattr(path, n)(t), x)
                        for n in ("alpha", "sigma", "dalpha", "dsigma"))
        out = dict(x0=x0, eps=eps, v=a * eps - b * x0, flow=da * x0 + ds * eps,
                   score=-eps / b)
        assert set(out) == set(paths.PREDICTIONS)
        for predicts in paths.PREDICTIONS:
            got = paths.Prediction(x, t, out[predicts], predicts, path)
            for name, want in out.items():
                torch.testing.assert_close(getattr(got, name), want, rtol=1e-9, atol=1e-9)


def found(module, name):
    "Whether a name such as Prediction.x0 exists; fields of dataclasses count."
    *outer, last = name.split(".")
    for part in outer:
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return hasattr(module, last) or last in getattr(module, "__annotations__", {})


TABLE = list(rows(section(NOTATION, "sec-notation-modules")))[1:]


@pytest.mark.parametrize("module, names, page", TABLE)
def test_names_of_the_notation_exist(module, names, page):
    module = importlib.import_module(module.strip("`"))
    assert (ROOT / f"nbs/{re.search(r'/nbs/(.+)`', page)[1]}.ipynb").is_file()
    for name in re.findall(r"`([\w.]+)`", names):
        assert found(module, name), f"{module.__name__} has no {name}"


def test_path_methods_of_the_symbols_exist():
    text = section(NOTATION, "sec-notation-symbols")
    methods = set(re.findall(r"`path\.(\w+)\(", text))
    assert {"alpha", "sigma", "lam", "t_of_lam"} <= methods
    for name in methods:
        assert callable(getattr(paths.Path, name)), name


# -- the front page -----------------------------------------------------------

def test_front_page_lists_every_notebook():
    text = (BOOK / "index.md").read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb")):
        assert f"/nbs/{path.stem}>`" in text, f"index.md has no line for {path.stem}"


def test_front_page_code_runs():
    text = (BOOK / "index.md").read_text(encoding="utf-8")
    code = re.search(r"^  ~~~python\n(.*?)^  ~~~$", text, flags=re.M | re.S)[1]
    names = {}
    exec(re.sub(r"^  ", "", code, flags=re.M), names)
    assert names["out"].x.shape == (64, 1, 8, 8)
    assert names["out"].nfe == 50


def script(name):
    "A script of book/_static as names; an import would leave its bytecode among the files of the site."
    file = BOOK / "_static" / f"{name}.py"
    names = {"__name__": name, "__file__": str(file)}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    return SimpleNamespace(**names)


def test_front_page_pictures_are_described_and_light():
    text = (BOOK / "index.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text)
    assert {Path(file).name for _, file in shown} == {*script("front").PICTURES, "map.svg"}
    assert all(len(alt) > 60 for alt, _ in shown)
    assert sum((BOOK / file).stat().st_size for _, file in shown) < 150_000


@pytest.mark.parametrize("name", script("front").PICTURES)
def test_front_page_pictures_are_what_the_weights_draw(name):
    front = script("front")
    again = front.sheet(front.drawn(*front.PICTURES[name])).numpy().astype(int)
    kept = np.asarray(Image.open(BOOK / "_static" / name), dtype=int)
    assert again.shape == kept.shape
    assert abs(again - kept).mean() < 1, f"python book/_static/front.py draws another {name}"


def contents():
    "[(caption, numbered, pages)] of the parts."
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [(part["caption"], part.get("numbered", False), [c["file"] for c in part["chapters"]]) for part in toc["parts"]]


def test_chapters_are_numbered_through_the_parts_that_the_map_shows():
    numbered = [(page, caption) for caption, yes, pages in contents() if yes for page in pages]
    assert [int(page[4:6]) for page, _ in numbered] == [*range(1, 10)]
    chart = script("map")
    drawn = [(name, part) for name, (_, _, part) in chart.PAGES.items() if part != "start"]
    assert [(int(name[0]), part) for name, part in drawn] == [(i, part) for i, (_, part) in enumerate(numbered, 1)]
    assert (BOOK / "_static/map.svg").read_text() == chart.drawing() + "\n", "python book/_static/map.py > book/_static/map.svg"


def test_a_chapter_of_the_map_stands_on_earlier_ones():
    chart = script("map")
    order = [name[0] for name in chart.PAGES]
    assert all(order.index(first) < order.index(last) for first, last, *_ in chart.ARROWS)


def test_hours_of_reading_are_words_at_a_hundred_a_minute():
    words = {Path(name).stem: len(re.sub(r"(?ms)^## Exercises$.*?^## ", "", text).split()) for name, text in sources()}
    text = section((BOOK / "index.md").read_text(encoding="utf-8"), "sec-roads")
    found = [row for row in rows(text.split("## What builds")[0]) if re.fullmatch(r"[\d.]+", row[-1])]
    assert len(found) == 8
    for name, pages, hours in found:
        read = sum(words[page] for page in re.findall(r"<\S*/(\w+)>", pages))
        assert float(hours) == pytest.approx(read / 100 / 60, abs=0.25), f"{name}: {read / 6000:.2f} hours"
