"""Samples as files: read back by another library, whole or not there, and refused where they are no images."""

import numpy as np
import pytest
import torch
from PIL import Image

import diffcourse as dc
from diffcourse import images
from diffcourse.evaluation import to_bytes
from diffcourse.images import preview, save_grid, save_images, tiled


def some(n=5, c=3, h=6, w=4):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2


def pixels(file):
    x = np.asarray(Image.open(file))
    return torch.from_numpy(x.copy() if x.ndim == 3 else x[..., None].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("c", [1, 3])
def test_files_hold_the_bytes(tmp_path, c):
    x = some(c=c)
    files = save_images(x, tmp_path / "new" / "folder", seeds=torch.tensor([7, 3, 1_000_000, 0, 4]))
    assert [f.name for f in files] == ["000007.png", "000003.png", "1000000.png", "000000.png", "000004.png"]
    assert {*files} == {*(tmp_path / "new" / "folder").iterdir()}
    for file, want in zip(files, to_bytes(x)):
        assert torch.equal(pixels(file), want)
        assert Image.open(file).mode == ("L" if c == 1 else "RGB")


def test_without_seeds_the_place_and_again_in_place(tmp_path):
    save_images(some(), tmp_path)
    files = save_images(-some(), str(tmp_path))
    assert sorted(tmp_path.iterdir()) == files and [f.stem for f in files] == [f"{i:06d}" for i in range(5)]
    assert torch.equal(pixels(files[2]), to_bytes(-some())[2])


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    save_images(some(2), tmp_path)
    before = [f.read_bytes() for f in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(images.runs.os, "replace", full)
    with pytest.raises(OSError, match="cannot write .*000000.png"):
        save_images(-some(2), tmp_path)
    with pytest.raises(OSError, match="cannot write .*sheet.png"):
        save_grid(some(), tmp_path / "sheet.png")
    assert [f.read_bytes() for f in sorted(tmp_path.iterdir())] == before


def test_a_sheet(tmp_path):
    x = some(5)
    file = save_grid(x, tmp_path / "a" / "sheet.png", columns=2, scale=3)
    got, want = pixels(file), to_bytes(x)
    assert got.shape == (3, 3 * 19 + 1, 2 * 13 + 1)
    for i in range(5):
        top, left = i // 2 * 19 + 1, i % 2 * 13 + 1
        for dy in range(3):
            assert torch.equal(got[:, top + dy : top + 18 : 3, left + dy : left + 12 : 3], want[i])
    assert not got[:, 2 * 19 + 1 :, 14:].any() and not got[:, ::19].any() and not got[:, :, ::13].any()


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (2, 1, 2), (9, 3, 3), (10, 3, 4), (20, 4, 5)])
def test_as_many_columns_as_rows_about(n, rows, columns):
    from torchvision.utils import make_grid

    x = to_bytes(some(n))
    sheet = tiled(x)
    assert sheet.shape == (3, rows * 7 + 1, columns * 5 + 1)
    if n > 1:  # torchvision leaves the line around a single one out
        assert torch.equal(sheet, make_grid(x, nrow=columns, padding=1))


@pytest.mark.parametrize("save", [lambda x, f: save_images(x, f / "none"), lambda x, f: save_grid(x, f / "none" / "sheet.png")])
@pytest.mark.parametrize(
    "x, kind, said",
    [
        (some() * 127.5 + 127.5, ValueError, r"reach 2\d\d.*x / 127.5 - 1"),
        (to_bytes(some()), TypeError, "torch.uint8"),
        (some().numpy(), TypeError, "ndarray"),
        (some()[0], ValueError, r"\(3, 6, 4\): \(n, C, H, W\)"),
        (some()[:, :2], ValueError, "1 or 3"),
        (some()[:0], ValueError, "one image or more"),
        (some() * torch.tensor(float("nan")), ValueError, "5 of 5 images hold nan"),
        (some().index_fill(0, torch.tensor([1]), float("inf")), ValueError, "1 of 5 images hold nan or inf"),
    ],
)
def test_what_is_no_image(tmp_path, save, x, kind, said):
    with pytest.raises(kind, match=said):
        save(x, tmp_path)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seeds", [[1, 2], [1, 2, 3, 4, 4], range(6)])
def test_seeds_that_do_not_fit(tmp_path, seeds):
    with pytest.raises(ValueError, match="for 5 images: one of its own"):
        save_images(some(), tmp_path / "none", seeds=seeds)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("more", [dict(columns=0), dict(columns=2.5), dict(scale=0), dict(scale="2")])
def test_columns_and_scale(tmp_path, more):
    with pytest.raises(ValueError, match="a whole number >= 1"):
        save_grid(some(), tmp_path / "sheet.png", **more)


def test_half_precision_and_overshoot(tmp_path):
    (file,) = save_images(torch.full((1, 1, 2, 2), 1.4, dtype=torch.bfloat16), tmp_path)
    assert (pixels(file) == 255).all()


def test_preview_is_silent_and_repeats(capsys):
    class Loss:
        path, predicts = dc.Linear(), "flow"

    look = preview(Loss, (3, 64, 64), n=40, steps=2)
    assert torch.equal(look(0, lambda x, t: x / 2), look(9, lambda x, t: x / 2))
    assert capsys.readouterr() == ("", "")


def test_preview_asks_as_the_loss_says():
    asked = []

    class Loss:
        path, predicts, sampler = dc.Linear(), "flow", (dc.Euler(), dc.uniform(3))

    preview(Loss, (1, 8, 8), n=2)(0, lambda x, t: (asked.append(t[0].item()), x)[1])
    assert asked == pytest.approx([1, 2 / 3, 1 / 3])


def test_public_names():
    assert dc.save_images is save_images and dc.save_grid is save_grid
