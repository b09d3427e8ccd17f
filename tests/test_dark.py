"""The second drawing of a figure: its colours, what stays as it was, and how it gets on a page."""
import base64
import colorsys
import importlib.util
import json
import re
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from diffcourse import plotting, style

ROOT = Path(__file__).resolve().parents[1]
GROUND = (18, 18, 18)


def pixels(png):
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def light_png(fig):
    out = BytesIO()
    fig.savefig(out, format="png")
    return out.getvalue()


def contrast(color, other=GROUND):
    return float(style._contrast(np.array(color) / 255, np.array(other) / 255).squeeze())


def turned(color):
    return 255 * style._turned(mpl.colors.to_rgb(color))


def curve():
    x = np.linspace(0, 1, 20)
    return plotting.curves({"a": (x, x), "b": (x, -x)}, "x", "y", title="Title", levels={"floor": 0.5})


# --- the colours --------------------------------------------------------------------------------------------------

def test_the_ground_is_that_of_the_dark_theme():
    found = importlib.util.find_spec("sphinx_book_theme")
    if not found:
        pytest.skip("sphinx-book-theme is not installed")
    css = "".join(p.read_text() for p in Path(found.origin).parent.rglob("*book-theme.css"))
    dark = [rule for rule in re.findall(r"html\[data-theme=\"?dark\"?\]\{[^}]*\}", css) if "--pst-color-background:" in rule]
    assert re.findall(r"--pst-color-background:(#\w+)", "".join(dark)) == ["#%02x%02x%02x" % GROUND]
    assert round(style.GROUND * 255) == GROUND[0]


def test_neutral_colours_are_turned_round():
    assert turned("white") == pytest.approx(GROUND, abs=0.01) and turned("black") == pytest.approx([255] * 3)
    greys = [contrast(turned(str(g))) for g in np.linspace(0, 1, 20)]
    assert (np.diff(greys) < 0).all()
    s = style.STYLE
    assert min(contrast(turned(s[key])) for key in ("text.color", "xtick.color", "axes.labelcolor")) > 10
    assert 1.1 < contrast(turned(s["grid.color"])) < 1.6           # there, and behind the lines
    pale = turned("#cfe3f7")
    assert contrast(pale) < 1.5 and pale[2] - pale[0] > 30         # a dark blue


@pytest.mark.parametrize("color", style.COLORS[:6])
def test_saturated_colours_keep_their_hue_and_stand_out(color):
    before, after = mpl.colors.to_rgb(color), style._turned(mpl.colors.to_rgb(color))
    assert contrast(255 * after) >= 3
    assert abs(colorsys.rgb_to_hsv(*before)[0] - colorsys.rgb_to_hsv(*after)[0]) < 0.03
    assert (after >= np.array(before) - 1e-9).all()


@pytest.mark.parametrize("name", ["viridis", "plasma"])
def test_maps_of_colours_stand_out_and_keep_their_order(name):
    colors = style._turned(mpl.colormaps[name](np.linspace(0, 1, 256)))
    assert style._contrast(colors, [style.GROUND] * 3).min() >= 3
    assert (np.diff(style._light(colors)[:, 0]) > 0).all()


def test_transparency_and_shape_stay():
    assert style._turned((0, 0, 1, 0.25))[3] == 0.25
    assert style._turned(np.zeros((0, 4))).shape == (0, 4) and style._turned(None) is None
    assert np.isfinite(style._turned(np.random.default_rng(0).random((500, 4)))).all()


# --- the drawing --------------------------------------------------------------------------------------------------

def test_text_is_light_on_dark():
    fig = curve()
    seen = pixels(style._dark(fig))
    assert (seen[0] == GROUND).all() and (seen[:, 0] == GROUND).all()
    assert (seen.min(-1) > 200).mean() < 0.03                      # no white panel and no white legend
    ax = fig.axes[0]
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()[1:3], *ax.get_legend().get_texts()):
        box = text.get_window_extent()
        part = seen[int(len(seen) - box.y1):int(len(seen) - box.y0) + 1, int(box.x0):int(box.x1) + 1]
        assert contrast(part.reshape(-1, 3).max(0)) > 7


def test_the_figure_is_as_it_was():
    fig = curve()
    canvas, before = fig.canvas, light_png(fig)
    assert style._dark(fig) == style._dark(fig) != before
    assert fig.canvas is canvas and light_png(fig) == before
    with pytest.raises(ZeroDivisionError):
        fig.axes[0].lines[0].draw = lambda renderer: 1 / 0
        style._dark(fig)
    assert fig.canvas is canvas


def bare(size=100):
    fig = Figure(figsize=(1, 1), dpi=size)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    return fig, ax


@pytest.mark.parametrize("kind", ["imshow", "pcolormesh"])
def test_images_keep_their_pixels(kind):
    image = np.random.default_rng(0).random((10, 10, 3)).round(1)
    fig, ax = bare()
    getattr(ax, kind)(image)
    ax.plot([2], [2], "k")                                         # nothing to see
    assert (pixels(style._dark(fig)) == pixels(light_png(fig))).all()


def test_the_tiles_of_a_grid_stay_and_the_gaps_take_the_ground():
    fig = plotting.grid(torch.linspace(-0.9, 0.9, 128).view(2, 1, 8, 8), columns=2)
    dark, light = pixels(style._dark(fig)), pixels(light_png(fig))
    gap = (light == 255).all(-1)
    assert gap.any() and (dark[gap] == GROUND).all() and (dark[~gap] == light[~gap]).all()


@pytest.mark.parametrize("shade, given, wanted", [
    (1.0, "black", "dark"), (0.0, "white", "light"), (None, "black", "light"), (None, "white", "light")])
def test_a_text_stands_out_from_what_is_under_it(shade, given, wanted):
    fig, ax = bare()
    if shade is None:
        ax.plot([0, 0])
    else:
        ax.imshow(np.full((2, 2, 3), shade), extent=(0, 1, 0, 1))
    ax.text(0.5, 0.5, "M", color=given, ha="center", va="center", size=40, transform=ax.transAxes, rotation=30)
    middle = pixels(style._dark(fig))[30:70, 30:70]
    assert (middle.max() if wanted == "light" else 255 - middle.min()) > 200


def test_the_dark_end_of_a_colour_map_is_visible():
    fig, ax = bare()
    lines = LineCollection([[(0.1, 0.1 * k), (0.9, 0.1 * k)] for k in range(1, 9)], cmap="viridis", linewidth=4)
    lines.set_array(np.linspace(0, 0.2, 8))
    lines.set_clim(0, 1)
    ax.add_collection(lines)
    rows = pixels(style._dark(fig)).max(1)
    assert sum(contrast(row) >= 3 for row in rows) >= 8 * 4


# --- the kernel and the page --------------------------------------------------------------------------------------

def bundle(fig, monkeypatch):
    "What a kernel stores for a figure."
    import IPython
    from IPython.core.formatters import DisplayFormatter
    from IPython.core.pylabtools import select_figure_formats
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    style._draw_twice()
    select_figure_formats(shell, {"png"})
    return shell.display_formatter.format(fig)[0]


def test_a_kernel_stores_both_drawings_in_one_output(monkeypatch):
    data = bundle(curve(), monkeypatch)
    assert {"image/png", style.DARK, "text/plain"} == data.keys()
    light, dark = (pixels(base64.b64decode(data[kind])) for kind in ("image/png", style.DARK))
    assert light.shape == dark.shape and (light[0, 0] == 255).all() and (dark[0, 0] == GROUND).all()
    assert len(data[style.DARK]) < len(data["image/png"])
    assert bundle(Figure(), monkeypatch).keys() == {"text/plain"}


def test_without_a_kernel_nothing_is_asked(monkeypatch):
    import IPython
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    style._draw_twice()


def site(folder, cells):
    "The page of a notebook whose run left these (metadata, outputs), and the warnings."
    from sphinx.application import Sphinx
    source, runs, target = folder / "source", folder / "runs", folder / "target"
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                "diffcourse": {"seconds": 1}, "papermill": {"end_time": "2026-01-01T"}}
    title = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title"]}
    for place, done in ((source, False), (runs, True)):
        place.mkdir(parents=True)
        code = [{"cell_type": "code", "id": f"b{i}", "metadata": meta, "source": ["fig"], "execution_count": None,
                 "outputs": outputs if done else []} for i, (meta, outputs) in enumerate(cells)]
        (place / "index.ipynb").write_text(json.dumps({"cells": [title, *code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    warnings = StringIO()
    Sphinx(str(source), None, str(target), str(folder / "doctrees"), "html", status=None, warning=warnings, confoverrides={
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "book_pages"], "html_theme": "basic", "nb_execution_mode": "off", "book_runs": str(runs)}).build()
    return (target / "index.html").read_text(), target, warnings.getvalue()


def test_the_page_shows_both_drawings_with_their_classes_and_alt_text(tmp_path, monkeypatch):
    pytest.importorskip("myst_nb")
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    data = bundle(curve(), monkeypatch)
    output = {"output_type": "display_data", "metadata": {}}
    alt = {"mystnb": {"image": {"alt": "Two lines"}}}
    other = {"image/png": base64.b64encode(light_png(bare()[0])).decode()}
    other["text/plain"] = "<Figure size 100x100 with 1 Axes>"
    page, target, warnings = site(tmp_path, [(meta, [{**output, "data": shown}]) for meta, shown in ((alt, data), (alt, other), ({}, data))])
    images = re.findall(r"<img[^>]*>", page)
    classes = [re.search(r'class="([^"]*)"', tag)[1].split() for tag in images]
    assert [kind for kind, *_ in classes] == ["only-light", "only-dark", "dark-light", "only-light", "only-dark"]
    broad = Image.open(BytesIO(base64.b64decode(data["image/png"]))).width > 640
    assert [more for _, *more in classes] == [["wide"] * (broad and k != 2) for k in range(5)]      # a phone lets it scroll
    assert all('alt="Two lines"' in tag for tag in images[:3])
    for tag, kind in zip(images, ("image/png", style.DARK)):
        assert (target / re.search(r'src="([^"]*)"', tag)[1]).read_bytes() == base64.b64decode(data[kind])
    assert warnings.count("shows a picture without alt text") == 1 and "cell b2 shows a picture" in warnings
    assert warnings.count("without its drawing for dark pages") == 1 and "cell b1 shows a figure" in warnings
    assert "mime" not in warnings
