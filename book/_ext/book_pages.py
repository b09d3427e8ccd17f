"""How the book's pages are made from notebooks and docstrings.

- The source notebooks hold no outputs. When Sphinx reads one, the outputs of its run (folder `book_runs`) are put on it by cell
  id, nbdev's `#|` lines become tags, and whatever a page may not be published with is a warning, so an error in a strict build.
- A figure comes as two drawings in one output (nbs/53_style). Both go on the page, with the theme's classes for light and dark.
- Docments, the comments beside a function's parameters, become the parameter list of the reference.
- Nothing on a page is fetched from another host.
"""
import binascii
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.alpha import Style as AlphaStyle
from pybtex.style.labels import alpha
from sphinx.util import logging
from sphinx.util.fileutil import copy_asset

log = logging.getLogger(__name__)
TAGS = {"hide": "remove-cell", "default_exp": "remove-cell", "include: false": "remove-cell", "echo: false": "remove-input",
        "hide_input": "remove-input", "hide_output": "remove-output", "code-fold: true": "hide-input"}
WIDGET = "application/vnd.jupyter.widget-view+json"
DARK = "application/vnd.diffcourse.dark+png"                  # DARK of diffcourse.style
DRAWINGS = {}                                                 # sha256 of a file -> the classes of its picture


def text(cell):
    """A cell's source without white space at line ends."""
    return "\n".join(line.rstrip() for line in "".join(cell["source"]).strip().splitlines())


def read_directives(cell):
    """Cut nbdev's lines out of a code cell and turn them into tags."""
    lines = "".join(cell["source"]).splitlines()
    found = [re.sub(r"^#\|\s*", "", line).strip() for line in lines if line.startswith("#|")]
    tags = cell["metadata"].setdefault("tags", [])
    for directive in found:
        name = directive if directive in TAGS else directive.partition(" ")[0]
        if name in TAGS and TAGS[name] not in tags:
            tags.append(TAGS[name])
    cell["source"] = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")


def clean_outputs(outputs, alt, warn):
    """The outputs that a static page shows, each picture with an alt text."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        wiped = {*data} == {"text/plain"} and not "".join(data["text/plain"])     # a line of progress
        if wiped or output.get("name") == "stderr":
            continue
        if WIDGET in data:
            if "text/html" not in data:
                warn("shows a widget without a static form (text/html)")
            output = {**output, "data": {k: v for k, v in data.items() if k != WIDGET}}
        if any(kind.startswith("image/") for kind in data) and not alt:
            warn("shows a picture without alt text (cell metadata mystnb.image.alt)")
        if "".join(data.get("text/plain", "")).startswith("<Figure ") and "image/png" in data and DARK not in data:
            warn("shows a figure without its drawing for dark pages (import diffcourse.style before it)")
        if any("alt=" not in tag for tag in re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))):
            warn("shows HTML with a picture without alt text")
        kept += drawings(output)
    return kept


def drawings(output):
    """The output, and the drawing for dark pages as one of its own."""
    data = {**output.get("data", {})}
    dark, light = (re.sub(r"\s", "", "".join(data.get(kind, ""))) for kind in (DARK, "image/png"))
    data.pop(DARK, None)
    if not dark or dark == light:
        return [{**output, "data": data}] if data else [output]
    for picture, kind in ((light, "only-light"), (dark, "only-dark")):
        png = binascii.a2b_base64(picture)
        wide = ["wide"] * (int.from_bytes(png[16:20], "big") > 640)     # pixels; a phone lets it scroll (custom.css)
        DRAWINGS[hashlib.sha256(png).hexdigest()] = [kind, *wide]
    return [{**output, "data": data}, {**output, "data": {"image/png": dark}}]


def class_drawings(app, doctree):
    """Give the two drawings of a figure their classes: a cell's metadata has only one for all its pictures."""
    for image in doctree.findall(nodes.image):
        kinds = DRAWINGS.get(Path(image["uri"]).stem)         # myst-nb names the files by their sha256
        image["classes"] = kinds or image["classes"]


def graft(app, docname, source):
    """Put the outputs of a notebook's run on its source."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    path = Path(app.config.book_runs) / f"{docname}.ipynb"
    done = {}
    if path.exists():
        app.env.note_dependency(str(path))
        executed = json.loads(path.read_text())
        done = {cell["id"]: cell for cell in executed["cells"]}
        took, when = executed["metadata"]["diffcourse"]["seconds"], executed["metadata"]["papermill"]["end_time"][:10]
        words = sum(len("".join(cell["source"]).split()) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        notebook["cells"][0]["source"] = [*notebook["cells"][0]["source"],
                                          f"\n\n*{words / 100:.0f} minutes to read slowly. The code ran in {took:.0f} s on {when}.*"]
    else:
        log.warning("was not run: make book runs it", location=docname, type="book", subtype="stale")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            cell["source"] = re.sub(r"(?m)^\[Rendered page\]\(.*\)$", "", "".join(cell["source"]))  # we are there
            continue

        def warn(message, cell=cell):
            log.warning(f"cell {cell['id']} {message}", location=docname, type="book", subtype="outputs")

        run = done.get(cell["id"])
        if done and (run is None or text(run) != text(cell)):
            warn("differs from what was run, or was not run: make book runs it")
            run = None
        read_directives(cell)
        image = cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})
        image["classes"] = "dark-light"                       # of a picture for both; the theme would dim it on dark pages
        hidden = {"remove-cell", "remove-output"} & {*cell["metadata"]["tags"]}
        cell["outputs"] = [] if hidden or not run else clean_outputs(run["outputs"], image.get("alt"), warn)
        cell["execution_count"] = None
    source[0] = json.dumps(notebook)


def escape(prose):
    """Plain prose with `code` as reStructuredText."""
    pieces = re.split(r"(`[^`]+`)", prose)
    return "".join(f"``{p.strip('`')}``" if p.startswith("`") and len(p) > 2 else re.sub(r"([*_|\\`])", r"\\\1", p) for p in pieces)


def describe(app, what, name, obj, options, lines):
    """Write a docstring and the docments of its parameters as fields."""
    from fastcore.docments import docments

    said, fields, later = [], [], []
    for line in lines:
        field = re.match(r"(Raises|Source|Returns): *(.+)", line)
        if field:
            later.append(f":{field[1]}: {escape(field[2])}")
        elif later and line.strip():                          # a field goes on until the next one
            later[-1] += " " + escape(line.strip())
        else:
            said.append(escape(line))
    if what in ("function", "method", "class"):
        for key, item in docments(obj, full=True, returns=True).items():
            note = " ".join((item.docment or "").split())
            if note:
                fields.append(f":returns: {escape(note)}" if key == "return" else f":param {key}: {escape(note)}")
    lines[:] = [*said, "", *fields, *later, ""]


def leave_out_thebe(app, page, template, context, doctree):
    """The theme always loads the starter of thebe, which would fetch from another host; no page uses it."""
    context["script_files"] = [script for script in context.get("script_files", [])
                               if "thebe" not in str(getattr(script, "filename", script)).lower()
                               and "THEBE" not in str(getattr(script, "attributes", {}).get("body", ""))]


def copy_mathjax(app, error):
    """Put the one file of MathJax that the pages load beside them (the package holds all 24 MB of it)."""
    if error is None:
        package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        copy_asset(str(package / "static" / "mathjax" / "tex-svg.js"), str(Path(app.outdir) / "_static" / "mathjax"))


class Labels(alpha.LabelStyle):
    """A letter behind the year, as in 2021a, is one behind the label too."""

    def format_label(self, entry):
        year = entry.fields["year"]
        entry.fields["year"] = year[:4]
        label = super().format_label(entry)
        entry.fields["year"] = year
        return label + year[4:]


class References(AlphaStyle):
    default_label_style = Labels


def setup(app):
    register_plugin("pybtex.style.formatting", "course", References)
    app.add_config_value("book_runs", os.environ.get("DIFFCOURSE_RUNS", "build/digits"), "env")
    app.config.mathjax_path = "mathjax/tex-svg.js"
    app.connect("source-read", graft, priority=1)
    app.connect("doctree-read", class_drawings)
    app.connect("autodoc-process-docstring", describe)
    app.connect("html-page-context", leave_out_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "version": "1"}
