"""Figures of diffcourse.plotting: what they show, what they refuse, and the slider in a real browser."""
import base64
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffcourse import image_grids, plotting, style

ROOT = Path(__file__).resolve().parents[1]


def png_size(fig):
    from io import BytesIO
    out = BytesIO()
    fig.savefig(out, format="png", bbox_inches="tight")       # as a notebook does
    from PIL import Image
    return Image.open(out).size, len(out.getvalue())


def pixels(fig):
    "The figure as bytes (H, W, 3)."
    from io import BytesIO
    from PIL import Image
    out = BytesIO()
    fig.savefig(out, format="png")
    return np.asarray(Image.open(out).convert("RGB"))


def ramp(n=8):
    return torch.linspace(-1, 1, n * n).view(1, 1, n, n)


# --- importing, style ---------------------------------------------------------------------------------------------

def test_importing_loads_nothing_heavy():
    code = ("import sys, diffcourse.plotting; "
            "print([m for m in ('matplotlib', 'ipywidgets', 'IPython', 'PIL', 'sklearn', 'torchvision') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def every_kind():
    x = np.linspace(-3, 3, 50)
    p = np.exp(-x ** 2 / 2) / 2.5066
    yield plotting.grid(torch.zeros(3, 1, 8, 8))
    yield plotting.curves({"a": (x, p), "b": (x, 2 * p)}, xlabel="x", title="two")
    yield plotting.losses([{"step": i, "loss": 1 / (i + 1)} for i in range(40)])
    yield plotting.densities(x, {"a": p}, {"a": x})
    yield plotting.histogram({"a": x, "b": x + 1})
    yield plotting.trajectories([1, 0.5, 0], np.zeros((3, 4)), background=([0, 1], [-1, 1], np.ones((2, 2))))


def test_style_is_taken_back_and_no_figure_stays_open():
    import matplotlib.pyplot as plt
    before = dict(plt.rcParams)
    for fig in every_kind():
        assert fig.get_facecolor() == (1.0, 1.0, 1.0, 1.0)    # opaque white
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == []


def test_every_figure_has_one_width_also_cropped_by_a_notebook():
    widths, sizes = zip(*[png_size(fig) for fig in every_kind()])
    assert {w for w, _ in widths} == {widths[0][0]}
    assert widths[0][0] == pytest.approx(style.WIDTH * style.DPI, rel=0.05)
    assert max(sizes) < 60_000


def test_the_readers_style_does_not_leak_in():
    import matplotlib as mpl
    x = np.linspace(0, 1, 20)
    plain = pixels(plotting.curves({"a": (x, x), "b": (x, -x)}, "x", "y"))
    with mpl.rc_context({"xtick.color": "red", "axes.facecolor": "black", "font.size": 20, "xtick.major.size": 12,
                         "axes.prop_cycle": mpl.cycler(color=["red"])}):
        fig = plotting.curves({"a": (x, x), "b": (x, -x)}, "x", "y")
        styled = pixels(fig)
    assert (plain == pixels(fig)).all()
    assert (styled != (255, 0, 0)).any(-1).all()


def test_colours_come_with_line_styles():
    x = np.arange(5.0)
    ax = plotting.curves({str(i): (x, x + i) for i in range(7)}).axes[0]
    assert len({line.get_color() for line in ax.lines}) == 7
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == 7


# --- what the figures show ----------------------------------------------------------------------------------------

def test_grid_draws_every_pixel_equally_large_and_in_order():
    x = 0.9 * torch.cat([ramp(), -ramp()])
    seen = pixels(plotting.grid(x, columns=2))
    drawn = (seen < 255).any(-1)
    rows, cols = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    side = (np.diff(cols) > 1).argmax() + 1                   # up to the gap
    assert side == len(rows) and side % 8 == 0
    for i, left in enumerate((cols[0], cols[-1] + 1 - side)):
        tile = seen[rows[0]:rows[-1] + 1, left:left + side]
        want = ((x[i, 0] + 1) * 127.5).round().byte().numpy().repeat(side // 8, 0).repeat(side // 8, 1)
        assert (tile == want[..., None]).all()


def test_grid_clips_and_marks_what_is_no_number():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 0, :] = 9.0
    x[..., 1, :] = -9.0
    x[..., 2, :] = float("nan")
    tile = image_grids._tiles(image_grids._images(x), 80)[0]
    assert tile.shape == (80, 80, 3)
    assert (tile[5] == 255).all() and (tile[15] == 0).all() and (tile[25] == (213, 94, 0)).all()
    assert (tile[35:] == 128).all()


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 23), columns=st.integers(1, 12), h=st.integers(1, 9), w=st.integers(1, 9))
def test_mosaic_places_every_tile_inside_without_overlap(n, columns, h, w):
    tiles = np.repeat(np.arange(n, dtype=np.uint8), h * w * 3).reshape(n, h, w, 3)
    canvas, corners = image_grids._mosaic(tiles, columns, 3, columns * (w + 3))
    assert len(set(corners)) == n
    for i, (x, y) in enumerate(corners):
        tile = canvas[y:y + h, x:x + w]
        assert (tile[..., :3] == i).all() and (tile[..., 3] == 255).all() and tile.shape == (h, w, 4)
    assert (canvas[..., 3] == 0).sum() == canvas[..., 3].size - n * h * w


def test_colour_and_shapes_without_channel():
    assert (image_grids._tiles(image_grids._images(torch.zeros(2, 8, 8)), 8) == 128).all()
    x = -torch.ones(1, 3, 4, 4)
    x[:, 0] = 1
    assert (image_grids._tiles(image_grids._images(x), 8) == (255, 0, 0)).all()
    assert image_grids._tiles(image_grids._images(torch.zeros(1, 3, 64, 32)), 16).shape == (1, 16, 8, 3)     # made smaller


def test_titles_and_rows_stand_in_the_figure():
    fig = plotting.grid(torch.zeros(6, 8, 8), columns=3, titles=list("abc"), rows=["one", "two"], title="top")
    assert {t.get_text() for t in fig.axes[0].texts} == {"a", "b", "c", "one", "two", "top"}


def test_losses_mean_looks_back_only():
    y = np.r_[np.ones(50), np.zeros(50)]
    fig = plotting.losses([{"step": i, "loss": v} for i, v in enumerate(y)], window=10, logy=False)
    mean = fig.axes[0].lines[0].get_ydata()
    assert (mean[:50] == 1).all() and mean[54] == pytest.approx(0.5) and mean[60:] == pytest.approx(np.zeros(40))


def test_losses_of_several_logs_and_another_entry():
    log = [{"step": 1, "grad": 2.0}, {"step": 2}, {"step": 3, "grad": 1.0}]
    fig = plotting.losses({"a": log, "b": log}, key="grad")
    assert len(fig.axes[0].lines) == 4 and len(fig.axes[0].lines[0].get_xdata()) == 2
    with pytest.raises(ValueError, match=r"none with the entry 'loss'.*\['grad', 'step'\]"):
        plotting.losses(log)


def test_densities_histogram_counts_draws_outside():
    x = np.linspace(0, 1, 11)
    fig = plotting.densities(x, {"p": np.ones(11)}, {"p": np.r_[np.full(50, 0.5), np.full(50, 7.0)]}, bins=10)
    area = sum(bar.get_height() * bar.get_width() for bar in fig.axes[0].patches)
    assert area == pytest.approx(0.5)


def test_a_single_line_has_no_legend_but_every_mark_has_its_name():
    assert plotting.curves({"a": ([0, 1], [0, 1])}).axes[0].get_legend() is None
    assert plotting.histogram([1.0, 2.0]).axes[0].get_legend() is None
    for fig in (plotting.histogram([1.0, 2.0], marks={"mean": 1.5}), plotting.curves({"a": ([0, 1], [0, 1])}, levels={"mean": 1.5})):
        assert "mean" in [t.get_text() for t in fig.axes[0].get_legend().get_texts()]


def test_trajectories_take_the_trajectory_of_a_sampler():
    fig = plotting.trajectories(torch.tensor([1.0, 0.5, 0.0]), torch.zeros(3, 5, 1))
    assert len(fig.axes[0].lines) == 5 and fig.axes[0].get_xlim() == (1.0, 0.0)     # from left to right, as the sampler goes
    assert plotting.trajectories([0, 1], torch.zeros(2, 3)).axes[0].get_xlim() == (0.0, 1.0)


def test_small_multiples_share_their_axes():
    fig = plotting.curves({"p": {"a": ([0, 1], [0, 1])}, "q": {"a": ([0, 5], [0, 9])}})
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim() and fig.axes[0].get_xlim() == fig.axes[1].get_xlim()


# --- what is refused ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, error, match", [
    (lambda: plotting.grid([1, 2]), TypeError, "images is list; pass a tensor"),
    (lambda: plotting.grid(torch.zeros(2, 8, 8, dtype=torch.uint8)), TypeError, "uint8.*127.5"),
    (lambda: plotting.grid(torch.zeros(2, 5, 8, 8)), ValueError, r"\(2, 5, 8, 8\); allowed are"),
    (lambda: plotting.grid(torch.zeros(0, 1, 8, 8)), ValueError, r"\(0, 1, 8, 8\)"),
    (lambda: plotting.grid(torch.zeros(2, 8, 8), columns=0), ValueError, "columns is 0"),
    (lambda: plotting.grid(torch.zeros(5, 8, 8), columns=2, titles=["a"]), ValueError, "titles has 1 texts; this grid takes 5 or 2"),
    (lambda: plotting.grid(torch.zeros(5, 8, 8), rows=["a", "b"]), ValueError, "rows has 2 texts"),
    (lambda: plotting.curves([1, 2]), TypeError, "lines is list; pass a dict"),
    (lambda: plotting.curves({}), TypeError, "empty dict"),
    (lambda: plotting.curves({"a": ([1, 2], [1, 2, 3])}), ValueError, "'a' have the lengths 2, 3"),
    (lambda: plotting.curves({"a": [1, 2, 3]}), TypeError, r"must be \(x, y\)"),
    (lambda: plotting.curves({"a": (["x"], [1])}), TypeError, "x of 'a' is list"),
    (lambda: plotting.densities([0, 1], {"p": [1, 1]}, {"q": [0]}), ValueError, r"\['q'\].*\['p'\]"),
    (lambda: plotting.trajectories([0, 1], torch.zeros(3, 4)), ValueError, r"shape \(3, 4\) and there are 2 times"),
    (lambda: plotting.trajectories([0, 1], torch.zeros(2, 4), groups=[1]), ValueError, "1 entries for 4 paths"),
    (lambda: plotting.histogram([]), ValueError, "empty"),
    (lambda: plotting.slider([torch.zeros(1, 8, 8)], ["a", "b"], "x"), ValueError, "1 frames and 2 labels"),
    (lambda: plotting.slider([torch.zeros(1, 8, 8)], ["a"], " "), ValueError, "alt must say"),
    (lambda: plotting.slider([torch.zeros(1, 8, 8)], ["a"], "x", start=1), ValueError, "start is 1"),
    (lambda: plotting.slider(["a.png"], ["a"], "x"), TypeError, "a frame is str; allowed are"),
])
def test_wrong_input_is_refused_with_the_way_out(call, error, match):
    import matplotlib.pyplot as plt
    with pytest.raises(error, match=match):
        call()
    plt.close("all")


# --- the slider ---------------------------------------------------------------------------------------------------

def three(**kwargs):
    frames = [torch.full((4, 1, 8, 8), v) for v in (-1.0, 0.0, 1.0)]
    return plotting.slider(frames, ["dark", "grey", "light <&\">"], "Squares get brighter", columns=4, **kwargs)


def test_slider_is_a_live_widget_and_html():
    s = three()
    bundle = s._repr_mimebundle_()
    assert {"text/html", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    s.slider.value = 2
    assert s.picture.value == s.pngs[2] and s.text.value == 'light <&">'
    html = bundle["text/html"]
    assert html.count("<img") == 3 and html.count('style="display:block">') == 1 and "<noscript>" in html
    assert not re.search(r"https?:|//[a-z]", html)
    assert re.findall(r'alt="([^"]*)"', html)[0] == "Squares get brighter: dark"


def test_slider_ids_are_unique_even_for_one_slider_shown_twice():
    s = three()
    ids = re.findall(r' id="([^"]*)"', s.make() + s.make() + three().make())
    assert len(ids) == len(set(ids)) == 3


def test_slider_takes_figures_pictures_bytes_and_grids():
    from PIL import Image
    fig = plotting.curves({"a": ([0, 1], [0, 1])})
    s = plotting.slider([fig, Image.new("RGB", (9, 9)), np.zeros((9, 9, 3), np.uint8), np.zeros((2, 8, 8))],
                        "abcd", alt=["one", "two", "three", "four"], start=3)
    assert all(png.startswith(b"\x89PNG") for png in s.pngs)
    assert len(s.pngs[0]) < 40_000
    assert 'value="3"' in s.make() and 'aria-valuetext="d"' in s.make()


@cache
def waves():
    x = np.linspace(0, 1, 50)
    frames = [plotting.curves({"": (x, np.sin(6 * k * x))}, height=2) for k in (1, 2, 3)]
    return plotting.slider(frames, "abc", "A wave that gets shorter")


def test_a_figure_in_a_slider_has_both_drawings_and_images_have_one():
    s = waves()
    images = re.findall(r"<img[^>]*>", s.make())
    assert [re.search(r'class="([^"]*)"', tag)[1] for tag in images] == ["only-light", "only-dark"] * 3
    assert [re.search(r'alt="([^"]*)"', tag)[1][-1] for tag in images] == list("aabbcc")
    light, dark = (re.search("base64,([^\"]*)", tag)[1] for tag in images[:2])
    assert light != dark and base64.b64decode(light) == s.pngs[0]
    assert re.findall(r'class="(only|dark)[^"]*"', three().make()) == ["dark"] * 3


def test_the_gaps_of_a_grid_in_a_slider_are_transparent():
    from io import BytesIO
    from PIL import Image
    grey = np.asarray(Image.open(BytesIO(three().pngs[2])))
    assert grey.shape[2] == 2 and set(np.unique(grey[..., 1])) == {0, 255}
    assert (grey[grey[..., 1] == 255][:, 0] == 255).all()


@pytest.fixture(scope="module")
def browser():
    chromium = Path("/usr/bin/chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not chromium.exists():
        pytest.skip("no /usr/bin/chromium on this machine: the slider was not tried in a browser")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=str(chromium), args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        yield b
        b.close()


def opened(browser, folder, html, **kwargs):
    page = browser.new_context(**kwargs).new_page()
    page.trouble = []
    page.on("console", lambda m: page.trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("data:", "file:")) else page.trouble.append(r.url))
    file = folder / "page.html"
    file.write_text("<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>" + html)
    page.goto(file.as_uri())
    return page


def state(page, nth=0):
    box = page.locator(".dc-slider").nth(nth)
    shown = [i for i, img in enumerate(box.locator("img").all()) if img.is_visible()]
    loaded = box.locator("img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
    assert loaded
    return shown, box.locator("output").inner_text(), box.locator("input").get_attribute("aria-valuetext")


def test_slider_in_a_browser_by_keyboard_and_mouse(browser, tmp_path):
    page = opened(browser, tmp_path, three().make() + three().make(), viewport={"width": 900, "height": 900})
    assert state(page) == ([0], "dark", "dark")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert state(page) == ([1], "grey", "grey")
    page.keyboard.press("End")
    assert state(page) == ([2], 'light <&">', 'light <&">')
    page.keyboard.press("ArrowLeft")
    assert state(page) == ([1], "grey", "grey")
    assert state(page, 1) == ([0], "dark", "dark")              # the other slider stayed
    box = page.locator("input").nth(1).bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, y, steps=8)
    page.mouse.up()
    assert state(page, 1)[0] == [2] and state(page)[0] == [1]
    assert page.get_by_role("slider", name="Squares get brighter").count() == 2
    assert page.trouble == []
    page.context.close()


@pytest.mark.parametrize("theme, seen", [("light", "only-light"), ("dark", "only-dark"), (None, "only-light")])
def test_slider_shows_the_drawing_of_the_page(browser, tmp_path, theme, seen):
    rules = "".join(f"html[data-theme={a}] .only-{b} {{display: none !important}}\n" for a, b in ("light dark".split(), "dark light".split()))
    css = rules + (ROOT / "book/_static/custom.css").read_text() if theme else ""       # those of the theme, and ours
    page = opened(browser, tmp_path, f"<style>{css}</style>" + waves().make())
    page.evaluate("theme => { if (theme) document.documentElement.dataset.theme = theme }", theme)

    def shown():
        return [(i // 2, img.get_attribute("class")) for i, img in enumerate(page.locator("img").all()) if img.is_visible()]

    assert shown() == [(0, seen)]
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert shown() == [(2, seen)] and page.locator("output").inner_text() == "c"
    assert page.trouble == []
    page.context.close()


def test_slider_on_a_phone_by_touch(browser, tmp_path):
    page = opened(browser, tmp_path, three().make(), viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("input").bounding_box()
    assert box["height"] >= 44
    page.touchscreen.tap(box["x"] + box["width"] - 5, box["y"] + box["height"] / 2)
    assert state(page)[0] == [2]
    y = box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)
    for kind, x in [("touchStart", box["width"] - 8), ("touchMove", box["width"] / 2), ("touchMove", 6), ("touchEnd", None)]:
        points = [] if x is None else [{"x": box["x"] + x, "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert state(page)[0] == [0]
    assert page.trouble == []
    page.context.close()


def test_slider_without_javascript_shows_its_start(browser, tmp_path):
    page = opened(browser, tmp_path, three(start=1).make(), java_script_enabled=False)
    images = page.locator("img")
    assert [images.nth(i).is_visible() for i in range(3)] == [False, True, False]
    page.context.close()


def tick_labels(axis):
    return [text for label in axis.get_ticklabels(which="both") if (text := label.get_text())]


def test_short_numbers_on_a_logarithmic_axis_are_written_out():
    x = torch.linspace(1, 40, 50)
    short = plotting.curves({"": {"a": (x, 0.6 / x.sqrt())}}, "x", "y", logx=True, logy=True).axes[0]
    long = plotting.curves({"": {"a": (x, (-x).exp())}}, "x", "y", logy=True).axes[0]
    for ax in (short, long):
        ax.figure.canvas.draw()
    assert {"1", "10"} <= {*tick_labels(short.xaxis)} and "0.3" in tick_labels(short.yaxis)
    assert any("10^" in text for text in tick_labels(long.yaxis))


def test_two_halves_of_a_grid_stand_apart():
    x = torch.ones(8, 1, 8, 8)
    joined, split = (plotting.grid(x, columns=4, **k) for k in ({}, {"halves": ("made", "real")}))
    assert [t.get_text() for t in split.axes[0].texts] == ["made", "real"]

    def widest(fig):  # gap without a picture inside the second row of pictures
        seen = fig.axes[0].images[0].get_array()[-10, :, 3] > 0
        at = seen.nonzero()[0]
        return max(at[1:] - at[:-1])

    assert widest(split) > widest(joined) + 30
    for wrong in ({"columns": 5}, {"columns": 4, "titles": list("abcd")}):
        with pytest.raises(ValueError, match="halves need"):
            plotting.grid(torch.ones(10, 1, 8, 8)[: 2 * wrong["columns"]], halves=("made", "real"), **wrong)
