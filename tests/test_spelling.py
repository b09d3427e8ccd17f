"""Every word of the prose is in the dictionary or in words.txt beside this file, and its spelling is British."""

import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from spellchecker import SpellChecker

ROOT = Path(__file__).resolve().parents[1]
LISTED = (ROOT / "tests/words.txt").read_text(encoding="utf-8").splitlines()
NOTEBOOKS = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("book/*.ipynb")])
GROUPS = {"page": sorted([*ROOT.glob("[CR]*.md"), *ROOT.glob("book/*.md")]), "markdown": NOTEBOOKS, "code": NOTEBOOKS}
TITLED = re.compile(r"\{(?:doc|term)\}`([^`<]*)(<[^`]*)?`")  # roles whose text is prose
NO_PROSE = [re.compile(pattern) for pattern in (
    r"(?m)^ *`{4,}(\{[\w-]+\})?|^:\w+:.*$",  # around prose, such as that of an exercise
    r"(?ms)^ *(```|~~~).*?^ *\1", r"(?s)<!--.*?-->", r"(\{[^{}`\n]*\})?`[^`]*`",  # fences, comments, roles and code
    r"(?s)\$\$.*?\$\$( \(\S+\))?", r"(?s)\\begin\{.*?\\end\{[\w*]+\}", r"\$[^$]+\$", r"\\\w+",  # maths
    r"\{[^{}\n]*\}", r"(?m)^\(.*\)=$", r'"[\w+-]+"',  # directives, targets, values such as "v"
    r"(?<=\])\([^)]*\)", r"https?://\S+", r"<[/\w][^<>\n]*>",  # links, tags
)]
WORD = re.compile(r"(?<![\w./@])[A-Za-zÀ-ſ]{2,}(?:['’][a-z]+)?(?![\w/@]|\.\w)")
AMERICAN = re.compile(  # the dictionary knows these as well
    r"(dis|mis|un)?(behavi|col|endeav|fav|flav|harb|hon|hum|lab|neighb|rum|vap|vig)or(s|ed|ing|able|ful|less|hoods?|ite)?"
    r"|(?!(over|re)?siz|(pri|sei)z)\w+iz(e[drs]?|ers|ing|ations?)|(anal|catal|paral)yz(e[drs]?|ing)|(def|lic|off|pret)ense"
    r"|(cent|fib|lit|theat)er(s|ed|ing)?|gray(s|ed|ish|scale)?|(ana|cata|dia)logs?|artifacts?|math|skeptic\w*"
    r"|(cancel|channel|dial|fuel|label|level|model|signal|total|travel|tunnel)(ed|ing|ers?)")


def words(text):
    "(line, word) of the prose in text. Names of code, acronyms and whatever has a digit are no words."
    text = TITLED.sub(r"\1", text)
    for pattern in NO_PROSE:
        text = pattern.sub(lambda found: "0" + "\n" * found[0].count("\n"), text)
    for line, part in enumerate(text.split("\n"), 1):
        yield from ((line, re.sub("['’]s$", "", word)) for word in WORD.findall(part) if word[1:].islower())


def said(code):  # -> its comments and docstrings, each on its line
    begins = True  # a statement: its strings are docstrings
    for kind, text, (line, _), *_ in tokenize.generate_tokens(io.StringIO(code).readline):
        if kind == tokenize.COMMENT and text[1:2] != "|" or kind == tokenize.STRING and begins:
            yield "\n" * (line - 1) + text
        if kind not in (tokenize.COMMENT, tokenize.NL):
            begins = kind in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@cache
def prose(kind):
    "(place, word) of the pages, of the Markdown of the notebooks, or of their code with the alt texts of its pictures."
    found = []
    for path in GROUPS[kind]:
        text = path.read_text(encoding="utf-8")
        for cell in [{"cell_type": "page", "source": [text]}] if kind == "page" else json.loads(text)["cells"]:
            if cell["cell_type"] == kind:
                text, place = "".join(cell["source"]), f"{path.name}, {cell.get('id', kind)}"
                alt = cell.get("metadata", {}).get("mystnb", {}).get("image", {}).get("alt", "")
                parts = [*said(text), alt] if kind == "code" else [text]
                found += [(f"{place}, line {line}", word) for part in parts for line, word in words(part)]
    return found


@cache
def dictionary():
    known = {*SpellChecker().word_frequency.words()}
    british = {re.sub("iz(?=(e[drs]?|ers|ing|ations?)$)", "is", word) for word in known}
    return {word for word in known | british if not AMERICAN.fullmatch(word)} | {*LISTED}


def misspelt(found):
    return [f"{place}: {word}" for place, word in found if not {word, word.lower()} & dictionary()]


@pytest.mark.parametrize("kind", GROUPS)
def test_words_are_spelt_well(kind):
    wrong = misspelt(prose(kind))
    assert not wrong, "mend these, or put them into tests/words.txt:\n" + "\n".join(wrong)


def test_the_list_is_sorted_and_each_of_its_words_is_used():
    used = {form for kind in GROUPS for _, word in prose(kind) for form in (word, word.lower())}
    assert LISTED == sorted({*LISTED}) and not {*LISTED} - used, {*LISTED} - used


def test_a_misspelling_is_found_and_code_and_maths_are_no_prose():
    text = "The neighbour isn't a wronng {term}`color <x>`: `qzx`, $qzx$, {cite:p}`qzx`, <https://qzx>,\n\n~~~sh\nqzx\n~~~\n"
    text += "$$ qzx $$ (eq-qzx)\n\n(qzx)=\n[Normalized](qzx.md) qzx_qzx, QZX, q2zx, and *zecond*-hand."
    assert misspelt(words(text)) == ["1: wronng", "1: color", "9: Normalized", "9: zecond"]
    code = "#| qzx\ndef qzx(\n    qzx,  # qzz\n):\n    'Qzy.'\n    return qzx(\n        'qzx')\n"
    assert [found for part in said(code) for found in words(part)] == [(3, "qzz"), (5, "Qzy")]
