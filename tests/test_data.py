"""Data sets of diffcourse.data: ranges, the split, folders good and bad, raw files of torchvision's sets."""
import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from diffcourse import data


def contents(images):
    return [x.numpy().tobytes() for x in images.x]


# --- digits -------------------------------------------------------------------------------------------------------

def test_importing_loads_nothing_heavy():
    code = ("import sys, diffcourse.data; print([m for m in ('matplotlib', 'torchvision', 'sklearn', 'PIL', 'IPython') "
            "if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_shape_type_range(size):
    d = data.digits("train", size)
    assert d.x.dtype == torch.float32 and d.x.shape == (1500, 1, size, size) and d.shape == (1, size, size)
    assert d.x.amin() == -1 and d.x.amax() == 1
    assert d.y.dtype == torch.int64 and set(d.y.tolist()) == set(range(10))
    assert d.flip is False and d.streamed is False and len(d) == 1500


def test_digits_are_scikit_learns_and_nothing_is_lost():
    from sklearn.datasets import load_digits
    raw = load_digits()
    ours = {(x.tobytes(), int(y)) for x, y in zip(((data.digits("all").x + 1) * 8).numpy()[:, 0], data.digits("all").y)}
    theirs = {(x.tobytes(), int(y)) for x, y in zip(raw.images.astype(np.float32), raw.target)}
    assert ours == theirs and len(ours) == 1797


def test_split_is_disjoint_by_content_and_ordered_by_it():
    train, held, every = (data.digits(s) for s in ("train", "held_out", "all"))
    assert (len(train), len(held), len(every)) == (1500, 297, 1797)
    assert not set(contents(train)) & set(contents(held))
    assert torch.equal(torch.cat([train.x, held.x]), every.x) and torch.equal(torch.cat([train.y, held.y]), every.y)
    keys = [hashlib.sha256(x.tobytes()).hexdigest() for x in ((every.x + 1) * 8).byte().numpy()]
    assert keys == sorted(keys)


def test_split_does_not_depend_on_the_order_of_the_file(monkeypatch):
    import sklearn.datasets
    raw = sklearn.datasets.load_digits()
    before = data.digits("train")
    turn = np.random.default_rng(0).permutation(len(raw.images))
    raw.images, raw.target = raw.images[turn], raw.target[turn]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: raw)
    data._digits.cache_clear()
    try:
        after = data.digits("train")
    finally:
        data._digits.cache_clear()
    assert torch.equal(before.x, after.x) and torch.equal(before.y, after.y)
    assert before.hash == after.hash


def test_the_split_that_committed_numbers_rest_on():
    assert data.digits("train").hash == "4194bf81eb40d8fcc822784545f01f5e42c0cc5e5ce9298f1f6b96ba0c45cf3b"
    assert data.digits("held_out").hash == "503fa27ce722c280773f925250481739305c0c775a0cb44de7e51453f43128ce"


def test_hash_follows_content():
    a = data.digits("train")
    assert a.hash == data.digits("train").hash and len(a.hash) == 64
    x = a.x.clone()
    x[0, 0, 0, 0] += 0.25
    assert data.Images(x).hash != a.hash
    assert data.Images(a.x.view(1500, 1, 4, 16)).hash != a.hash
    assert data.digits("train", 16).hash != a.hash


def test_changing_what_came_back_changes_no_later_call():
    first = data.digits("train")
    first.x.zero_(), first.y.zero_()
    assert data.digits("train").x.std() > 0.5 and data.digits("train").y.max() == 9


@pytest.mark.parametrize("call, match", [
    (lambda: data.digits("test"), "'test'; allowed are 'train', 'held_out', 'all'"),
    (lambda: data.digits("train", 12), "size is 12.*8.*16 and 32"),
    (lambda: data.mnist("validation"), "allowed are 'train'"),
    (lambda: data.mnist(size=0), "size is 0"),
])
def test_wrong_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- Images -------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=12))
def test_batch_gives_the_images_asked_for(indices):
    d = data.Images(torch.linspace(-1, 1, 40).view(10, 1, 2, 2))
    batch = d.batch(indices)
    assert batch.shape == (len(indices), 1, 2, 2)
    for i, x in zip(indices, batch):
        assert torch.equal(x, d.x[i]) and torch.equal(d[i], x) and torch.equal(d.item(i), x)
    assert torch.equal(d.batch(torch.tensor(indices, dtype=torch.int32)), batch)


@pytest.mark.parametrize("indices, error", [([10], IndexError), ([-1], IndexError), ([0.5], TypeError),
                                            ([[1]], TypeError), ([True], TypeError)])
def test_batch_refuses_what_is_no_index(indices, error):
    with pytest.raises(error, match="indices"):
        data.Images(torch.zeros(10, 1, 2, 2)).batch(indices)


def test_batch_is_a_copy_and_iteration_ends():
    d = data.Images(torch.zeros(3, 1, 2, 2))
    d.batch([0, 1]).fill_(1)
    assert d.x.abs().max() == 0
    assert len(list(d)) == 3


@pytest.mark.parametrize("x, y, error, match", [
    (np.zeros((2, 1, 8, 8)), None, TypeError, "x is ndarray"),
    (torch.zeros(2, 8, 8), None, TypeError, r"torch.float32 \(2, 8, 8\)"),
    (torch.zeros(2, 1, 8, 8).double(), None, TypeError, "float64"),
    (torch.zeros(0, 1, 8, 8), None, TypeError, "N >= 1"),
    (torch.full((2, 1, 8, 8), 255.0), None, ValueError, "spans 255 to 255.*127.5"),
    (torch.full((2, 1, 8, 8), float("nan")), None, ValueError, "spans nan"),
    (torch.zeros(2, 1, 8, 8), torch.zeros(3), ValueError, "2 images and 3 labels"),
])
def test_images_refuse_what_is_no_set(x, y, error, match):
    with pytest.raises(error, match=match):
        data.Images(x, y)


# --- resize -------------------------------------------------------------------------------------------------------

def test_resize_keeps_what_has_the_size_and_stays_in_range():
    x = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sign()
    assert torch.equal(data.resize(x, 9), x)
    assert data.resize(x, 27).abs().max() == 1            # a cubic filter alone overshoots
    assert data.resize(x, 4).shape == (3, 2, 4, 4)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_chess_board_becomes_grey(size):
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1)[None, None]
    assert board[..., ::32 // size, ::32 // size].abs().min() == 1      # without antialiasing
    assert data.resize(board, size).abs().max() < 0.13


# --- folders ------------------------------------------------------------------------------------------------------

def quadrants(w, h, colours=((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))):
    "An image of w x h whose four quarters have four colours."
    a = np.zeros((h, w, 3), np.uint8)
    for k, c in enumerate(colours):
        a[(k // 2) * h // 2:(k // 2 + 1) * h // 2, (k % 2) * w // 2:(k % 2 + 1) * w // 2] = c
    return Image.fromarray(a)


def folder_of(root, **images):
    for name, image in images.items():
        file = root / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return root


def corners(x):
    "The middle of each quarter as bytes, from a (3, H, W) image."
    h, w = x.shape[1:]
    return [tuple(((x[:, r, c] + 1) * 127.5).round().int().tolist())
            for r in (h // 4, 3 * h // 4) for c in (w // 4, 3 * w // 4)]


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


@pytest.mark.parametrize("w, h", [(64, 64), (96, 64), (64, 150), (65, 131)])
def test_the_crop_is_the_middle_and_stretches_nothing(tmp_path, w, h):
    d = data.image_folder(folder_of(tmp_path, a_png=quadrants(w, h)), size=32)
    assert corners(d.x[0]) == COLOURS
    wide = Image.new("RGB", (96, 32), "white")                 # black bars that the crop must remove
    wide.paste("black", (0, 0, 32, 32))
    wide.paste("black", (64, 0, 96, 32))
    d = data.image_folder(folder_of(tmp_path / "bars", b_png=wide), size=16)
    assert (d.x == 1).all()


def test_an_image_of_the_size_stays_bit_for_bit(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    d = data.image_folder(folder_of(tmp_path, a_png=Image.fromarray(a)), size=20)
    assert torch.equal(d.x[0], (torch.from_numpy(a[:, 5:25]).permute(2, 0, 1).float() / 127.5 - 1))


def test_files_are_resized_with_antialiasing(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    d = data.image_folder(folder_of(tmp_path, a_png=Image.fromarray(board)), size=16)
    assert d.x.abs().max() < 0.13


def test_modes_formats_and_the_cameras_turn(tmp_path):
    q = quadrants(32, 32)
    turned = q.transpose(Image.Transpose.ROTATE_90)            # EXIF 6: turn by 90 degrees clockwise to show
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "exif.png", exif=exif)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    grey = Image.new("L", (32, 32), 51)
    deep = Image.fromarray(np.full((32, 32), 51 * 257, np.uint16))
    gif = Image.new("P", (32, 32), 0)
    folder_of(tmp_path, palette_png=q.quantize(16), clear_png=clear, grey_png=grey, deep_png=deep, la_png=clear.convert("LA"),
              bit_png=grey.point(lambda v: 255).convert("1"), web_webp=grey, bmp_BMP=q)
    q.convert("CMYK").save(tmp_path / "ink.jpeg", quality=100)
    gif.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("P", (32, 32), 1)])
    d = data.image_folder(tmp_path, size=32, streamed=True)
    seen = {name: d.item(i) for i, name in enumerate(d.files)}
    assert len(seen) == 11
    for name in ("exif.png", "palette.png", "bmp.BMP"):
        assert corners(seen[name]) == COLOURS, name
    assert np.abs(np.subtract(corners(seen["ink.jpeg"]), COLOURS)).max() < 12
    assert (seen["clear.png"] == 1).all() and (seen["la.png"] == 1).all() and (seen["bit.png"] == 1).all()
    for name in ("grey.png", "deep.png"):
        assert torch.allclose(seen[name], torch.full((3, 32, 32), 51 / 127.5 - 1), atol=1e-6), name
    one = data.image_folder(tmp_path, size=32, channels=1)
    assert one.shape == (1, 32, 32) and one.x.dtype == torch.float32


def test_sixteen_bits_keep_more_than_eight(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 16, (64, 1))
    d = data.image_folder(folder_of(tmp_path, a_png=Image.fromarray(ramp)), size=64, channels=1)
    assert len(d.x.unique()) == 64


def some(root, n=7, side=24):
    rng = np.random.default_rng(1)
    for i in range(n):
        file = root / ("b" if i % 2 else "a") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)).save(file)
    return root


def test_order_is_that_of_the_paths(tmp_path):
    some(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    d = data.image_folder(tmp_path, size=16, streamed=True)
    assert d.files == ["a/0.png", "a/2.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"]


def test_streamed_equals_in_memory_also_through_workers(tmp_path):
    some(tmp_path)
    memory = data.image_folder(tmp_path, size=16)
    files = data.image_folder(tmp_path, size=16, memory_limit=100)
    assert memory.streamed is False and files.streamed is True and files.x is None
    assert len(files) == len(memory) == 7 and files.shape == memory.shape and files.flip and memory.flip
    assert torch.equal(files.batch(range(7)), memory.x)
    assert files.batch([]).shape == (0, 3, 16, 16)
    plan = [[6, 0, 3], [1], [2, 2]]
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(files)), batch_sampler=plan, num_workers=2)
    for indices, batch in zip(plan, loader, strict=True):
        assert torch.equal(batch, memory.batch(indices))


def test_the_limit_is_one_of_bytes(tmp_path):
    some(tmp_path)
    limit = 7 * 3 * 16 * 16 * 4
    assert not data.image_folder(tmp_path, size=16, memory_limit=limit).streamed
    assert data.image_folder(tmp_path, size=16, memory_limit=limit - 1).streamed


def test_hash_of_a_folder_survives_a_move_and_sees_a_change(tmp_path):
    import os, shutil
    some(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "a" / "0.png", (0, 0))
    load = lambda name, size=16: data.image_folder(tmp_path / name, size=size, streamed=True)
    assert load("one").hash == load("two").hash != load("one", 8).hash
    (tmp_path / "two" / "a" / "0.png").rename(tmp_path / "two" / "a" / "00.png")
    assert load("one").hash != load("two").hash
    Image.new("RGB", (24, 24)).save(tmp_path / "one" / "a" / "0.png")
    assert load("one").hash != data.image_folder(tmp_path / "two", size=16, streamed=True).hash


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        data.image_folder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NotADirectoryError, match="a.txt is a file"):
        data.image_folder(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"no image in .*\.jpg \.jpeg \.png \.webp \.bmp \.gif"):
        data.image_folder(tmp_path)
    for kwargs, match in (({"size": 0}, "size is 0"), ({"size": 8.5}, "size is 8.5"), ({"channels": 4}, "channels is 4")):
        with pytest.raises(ValueError, match=match):
            data.image_folder(tmp_path, **kwargs)


@pytest.fixture
def broken(tmp_path):
    some(tmp_path, n=4)
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.gif").write_text("not an image")
    return tmp_path


def test_broken_files_are_named_all_at_once(broken):
    with pytest.raises(ValueError) as caught:
        data.image_folder(broken, size=16)
    text = str(caught.value)
    assert "3 of 7 images" in text and "skip_broken=True" in text
    assert all(name in text for name in ("cut.jpg", "empty.png", "text.gif"))
    for i in range(20):
        (broken / f"more{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="23 of 27 images .* and 18 more"):
        data.image_folder(broken, size=16)


@pytest.mark.parametrize("streamed", [False, True])
def test_broken_files_can_be_left_out(broken, streamed):
    with pytest.warns(UserWarning, match="left out 3 of 7 images .*cut.jpg"):
        d = data.image_folder(broken, size=16, skip_broken=True, streamed=streamed)
    assert len(d) == 4 and d.batch(range(4)).shape == (4, 3, 16, 16)


def test_a_folder_of_broken_files_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 images .* Repair or remove them$"):
        data.image_folder(tmp_path, skip_broken=True)


def test_a_file_that_breaks_during_training_is_named_also_by_a_worker(tmp_path):
    some(tmp_path, n=4)
    d = data.image_folder(tmp_path, size=16, streamed=True)
    whole = (tmp_path / "b" / "3.png").read_bytes()
    (tmp_path / "b" / "3.png").write_bytes(whole[:200])
    assert d.batch([0, 1, 2]).shape[0] == 3
    with pytest.raises(OSError, match=r"3\.png cannot be read"):
        d.batch([3])
    batches = iter(torch.utils.data.DataLoader(d, batch_sampler=[[3]], num_workers=1))
    with pytest.raises(OSError, match=r"3\.png cannot be read"):
        next(batches)
    batches._shutdown_workers()      # left to the garbage collector it may wait for five seconds
    (tmp_path / "b" / "3.png").unlink()
    with pytest.raises(OSError, match="FileNotFoundError"):
        d.item(3)


def test_small_images_are_enlarged_with_a_warning(tmp_path):
    some(tmp_path, n=3, side=24)
    with pytest.warns(UserWarning, match="3 of 3 images are smaller than 32 pixels"):
        d = data.image_folder(tmp_path, size=32)
    assert d.shape == (3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.image_folder(tmp_path, size=24)


# --- sets that are downloaded -------------------------------------------------------------------------------------

def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


@pytest.fixture
def no_network(monkeypatch):
    import urllib.request
    def refuse(*args, **kwargs):
        raise OSError("the test has no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("kind, load", [("MNIST", data.mnist), ("FashionMNIST", data.fashion_mnist)])
def test_idx_files_put_there_by_hand(tmp_path, monkeypatch, no_network, kind, load):
    from torchvision import datasets
    cls, rng, resources = getattr(datasets, kind), np.random.default_rng(0), []
    sets = {}
    for part, n in (("train", 5), ("t10k", 3)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        sets[part] = x, y
        for name, raw in ((f"{part}-images-idx3-ubyte.gz", idx(x)), (f"{part}-labels-idx1-ubyte.gz", idx(y))):
            file = tmp_path / kind / "raw" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(raw)
            resources.append((name, hashlib.md5(raw).hexdigest()))
    monkeypatch.setattr(cls, "resources", resources)
    train, held, every = (load(split, root=tmp_path) for split in ("train", "held_out", "all"))
    assert (len(train), len(held), len(every)) == (5, 3, 8) and train.shape == (1, 28, 28) and train.flip is False
    assert torch.equal(train.x[:, 0], torch.from_numpy(sets["train"][0]).float() / 127.5 - 1)
    assert held.y.tolist() == sets["t10k"][1].tolist() and torch.equal(torch.cat([train.x, held.x]), every.x)
    assert load("train", size=32, root=tmp_path).shape == (1, 32, 32)


def test_cifar_file_put_there_by_hand(tmp_path, monkeypatch, no_network):
    from io import BytesIO
    from torchvision import datasets
    rng, md5 = np.random.default_rng(0), lambda raw: hashlib.md5(raw).hexdigest()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    files, lists = {}, {}
    for name in names:
        entry = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [1, 7], "label_names": ["plane", "car"]}
        files[name] = pickle.dumps(entry)
        lists[name] = entry
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            tar.addfile(info, BytesIO(raw))
    cls = datasets.CIFAR10
    monkeypatch.setattr(cls, "tgz_md5", md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()))
    monkeypatch.setattr(cls, "train_list", [[n, md5(files[n])] for n in names[:5]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files["batches.meta"])})
    d = data.cifar10("train", root=tmp_path)
    assert len(d) == 10 and d.shape == (3, 32, 32) and d.flip is True and d.y.tolist() == [1, 7] * 5
    want = lists["data_batch_1"]["data"][0].reshape(3, 32, 32)
    assert torch.equal(d.x[0], torch.from_numpy(want).float() / 127.5 - 1)
    assert len(data.cifar10("held_out", root=tmp_path)) == 2


@pytest.mark.parametrize("load, names", [
    (data.mnist, ("train-images-idx3-ubyte.gz", "MNIST/raw")),
    (data.fashion_mnist, ("t10k-labels-idx1-ubyte.gz", "FashionMNIST/raw")),
    (data.cifar10, ("cifar-10-python.tar.gz",)),
])
def test_a_download_that_fails_says_what_to_put_where(tmp_path, no_network, load, names):
    with pytest.raises(RuntimeError, match="could not be fetched") as caught:
        load(root=tmp_path / "data")
    assert all(name in str(caught.value) for name in names) and str(tmp_path) in str(caught.value)
    assert "Without a network" in str(caught.value)


def test_downloads_go_into_the_folder_of_runs(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    with pytest.raises(RuntimeError, match=str(tmp_path / "home" / "data")):
        data.mnist(download=False)
