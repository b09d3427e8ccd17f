"""Pictures: one set is the same bytes wherever it lies, and what is no set of pictures is refused by name."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffcourse.data import digits
from diffcourse.evaluation import to_bytes
from diffcourse.files import Files
from diffcourse.pictures import pictures
from diffcourse.store import prepare
from diffcourse.tasks import task


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))


@pytest.fixture
def x():
    return 2 * torch.rand(7, 3, 6, 6, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture
def folder(x, tmp_path):
    where = tmp_path / "faces"
    where.mkdir()
    for k, image in enumerate(to_bytes(x).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(where / f"{k}.png")
    return where


def test_one_set_has_one_hash_wherever_it_lies(x, folder, tmp_path):
    store = prepare(Files(folder, 6), tmp_path / "store")
    sources = [x, to_bytes(x), folder, str(folder), shutil.make_archive(str(tmp_path / "a"), "zip", folder),
               shutil.make_archive(str(tmp_path / "b"), "gztar", folder), store, tmp_path / "store", task(folder, size=6).images("all")]
    seen = [pictures(s) for s in sources]
    assert len({p.hash for p in seen}) == 1 and {p.shape for p in seen} == {(3, 6, 6)} and {len(p) for p in seen} == {7}
    for p in seen:
        parts = [*p.batches(3)]
        assert [len(v) for v in parts] == [3, 3, 1] and torch.equal(torch.cat(parts), to_bytes(x)) and not p.grey
    assert pictures(x.flip(0)).hash != seen[0].hash != pictures(x[:6]).hash
    assert pictures(seen[0]) is seen[0]


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
def test_colours_are_those_of_torch_fidelity(mode, tmp_path):
    from torch_fidelity.datasets import ImagesPathDataset

    r = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(r.integers(0, 256, (9, 5, 4), np.uint8), "RGBA").convert(mode).save(tmp_path / f"{k}.png")
    theirs = torch.stack([*ImagesPathDataset(sorted(tmp_path.glob("*.png")))])
    seen = pictures(tmp_path)
    assert torch.equal(torch.cat([*seen.batches(2)]), theirs) and seen.grey == (mode in ("L", "LA", "1"))


def test_tasks_by_name():
    seen = pictures("digits")
    assert len(seen) == 1500 and seen.grey and seen.shape == (3, 8, 8) and seen.name == digits("train").name
    assert seen.hash == pictures(task("digits")).hash == pictures(digits("train")).hash


@pytest.mark.parametrize("bad, said", [
    (lambda x: x * math.nan, "7 of 7 images hold nan or inf"),
    (lambda x: 127.5 * (x + 1), r"span 0\.\d+ to 25\d.* % of the values lie beyond 1.2"),
    (lambda x: (x + 1) / 2, r"for \[0, 1\] pass"),
    (lambda x: x[:, :2], r"\(7, 2, 6, 6\): \(n, 3, H, W\)"),
    (lambda x: x[:0], "needed"), (lambda x: x[0], "needed"), (lambda x: to_bytes(x)[:0], "needed"),
])
def test_tensors_that_are_no_pictures(bad, said, x):
    with pytest.raises(ValueError, match=said):
        pictures(bad(x))


def test_a_little_beyond_is_cut_off(x):
    assert torch.equal(pictures(1.1 * x).x, to_bytes(x * 1.1))


@pytest.mark.parametrize("bad", [5, None, [1, 2], torch.zeros(2, 3, 4, 4).long()])
def test_what_holds_no_pictures(bad):
    with pytest.raises(TypeError, match="tensor|floating"):
        pictures(bad)


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'faces32'"):
        pictures("faces23")
    with pytest.raises(FileNotFoundError, match="neither a task nor a folder"):
        pictures(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no image in"):
        pictures(tmp_path)


def test_broken_files_are_named_at_once(folder):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "6.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 7 images .*2\.png .*6\.png .*Repair or remove them"):
        pictures(folder).hash


def test_broken_files_of_later_batches_are_named_too(folder):
    (folder / "1.png").write_bytes(b"")
    (folder / "6.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png .*6\.png"):
        [*pictures(folder).batches(2)]


@pytest.mark.parametrize("batch", [2, 100])
def test_several_sizes(batch, folder):
    Image.new("RGB", (8, 9)).save(folder / "5.png")
    with pytest.raises(ValueError, match="0.png is 6x6, 5.png 8x9. Pass size="):
        [*pictures(folder).batches(batch)]
    assert pictures(folder, size=4).shape == (3, 4, 4)


@pytest.mark.parametrize("size, kind, said", [(16, ValueError, "resizes files only"), (0, ValueError, "whole number"), ("8", ValueError, "whole number")])
def test_sizes_that_do_not_fit(size, kind, said, x):
    with pytest.raises(kind, match=said):
        pictures(x, size=size)
    assert pictures(x, size=6).shape == (3, 6, 6)
