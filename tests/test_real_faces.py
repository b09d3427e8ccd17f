"""CelebA from every place where it may be, small fakes in their stead: no network, no face of a person."""
import hashlib
import io
import re
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffcourse import files, real_faces, runs, store
from diffcourse.real_faces import celeba

NAMES = ["5_o_Clock_Shadow", "Bald", "Young"]           # three of the forty
N = 12


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (218, 178, 3), dtype=np.uint8)


def want(i, size=16):
    "The square in the middle, resized by Pillow itself."
    return torch.from_numpy(np.array(Image.fromarray(pixels(i)[20:198]).resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def marks(i):
    return [(i >> k) % 2 == 1 for k in range(3)]


def images(folder, suffix="png", n=N):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(pixels(i)).save(folder / f"{i + 1:06}.{suffix}")
    return folder


def official(folder, n=N, held=(10, 11)):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{i + 1:06}.jpg  " + "  ".join("1" if m else "-1" for m in marks(i)) for i in range(n)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(n), " ".join(NAMES), *rows]) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(f"{i + 1:06}.jpg {2 if i in held else 0}" for i in range(n)))


def kaggle(folder, n=N, held=(10, 11)):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{i + 1:06}.jpg," + ",".join("1" if m else "-1" for m in marks(i)) for i in range(n)]
    (folder / "list_attr_celeba.csv").write_text("\n".join(["image_id," + ",".join(NAMES), *rows]))
    (folder / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *(f"{i + 1:06}.jpg,{int(i in held)}" for i in range(n))]))


def same(d, rows):
    assert torch.equal(d.bytes(range(len(d))), torch.stack([want(i) for i in rows]))
    if d.y is not None:
        assert d.columns == NAMES and d.y.dtype == torch.bool and d.y.tolist() == [marks(i) for i in rows]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    return tmp_path / "home"


# --- a path --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lists, place", [(official, "."), (official, "img"), (official, "Anno"), (kaggle, "."), (kaggle, "img")])
def test_a_folder_with_the_lists_beside_or_inside(tmp_path, capsys, lists, place):
    folder = images(tmp_path / "set" / "img")
    lists(tmp_path / "set" / place)
    same(celeba(folder, "all", 16), range(N))
    same(celeba(folder, "train", 16), range(10))
    held = celeba(folder, "held_out", 16)
    same(held, [10, 11])
    said = capsys.readouterr().out
    assert "CelebA: 2 of 12 faces" in said and said.count("non-commercial research only") == 3
    assert said.count("images written") == 1                                # decoded once for the three
    assert held.manifest["licence"] == real_faces.TERMS and held.flip and held.name == "celeba held_out 16x16"


def test_archives_hold_images_and_lists(tmp_path):
    folder = images(tmp_path / "set" / "img_align_celeba" / "img_align_celeba")
    kaggle(tmp_path / "set")
    for kind in ("zip", "tar"):
        archive = shutil.make_archive(str(tmp_path / "archive"), kind, tmp_path / "set")
        same(celeba(archive, "train", 16), range(10))
    assert celeba(folder, "all", 16).y is None                              # two folders up is too far to guess


def test_half_size_is_cropped_alike(tmp_path):
    (tmp_path / "half").mkdir()
    Image.fromarray(pixels(0)).resize((89, 109)).save(tmp_path / "half" / "000001.png")
    Image.fromarray(pixels(0)).resize((89, 109)).crop((0, 10, 89, 99)).save(tmp_path / "cut.png")
    d = celeba(tmp_path / "half", "all", 16)
    direct, side = files.square(tmp_path / "cut.png", 16, 3)
    assert side == 89 and np.array_equal(d.bytes([0])[0].numpy(), direct)


def test_without_a_list_the_names_decide_the_same_everywhere(tmp_path):
    folder = images(tmp_path / "img", n=60)
    held = {n for n in (f"{i + 1:06}" for i in range(60)) if hashlib.sha256(n.encode()).digest()[0] < 26}
    d = celeba(folder, "held_out", 8)
    assert {n[:6] for n in d.names} == held and d.y is None and 0 < len(held) < 20
    train = celeba(folder, "train", 8)
    assert not set(train.names) & set(d.names) and len(train) + len(d) == 60
    official(tmp_path, 60, held=())                                         # all on one side: as if there were none
    assert celeba(folder, "held_out", 8).names == d.names


def test_a_list_of_another_set(tmp_path):
    folder = images(tmp_path / "img")
    official(tmp_path, 7)
    with pytest.raises(ValueError, match="list_attr_celeba has no line for 5 of 12 images .*000008.png"):
        celeba(folder, "all", 16)


def test_other_labels_are_another_store(tmp_path):
    folder = images(tmp_path / "img")
    before = celeba(folder, "all", 16).hash
    official(tmp_path)
    after = celeba(folder, "all", 16)
    assert after.hash != before
    same(after, range(N))


def test_a_store_as_path_and_its_size(tmp_path):
    made = store.prepare(files.Files(images(tmp_path / "img"), 16), tmp_path / "mine")
    assert torch.equal(celeba(tmp_path / "mine", "all", 16).bytes(range(N)), made.bytes(range(N)))
    assert len(celeba(tmp_path / "mine", "train", 16)) == N                 # split by names, and these names are few
    with pytest.raises(ValueError, match="none of 12 images is in held_out"):
        celeba(tmp_path / "mine", "held_out", 16)
    with pytest.raises(ValueError, match=r"holds images of \(3, 16, 16\), not of \(3, 64, 64\)"):
        celeba(tmp_path / "mine")
    with pytest.raises(ValueError, match="split is 'test'; allowed are 'train', 'held_out', 'all'"):
        celeba(tmp_path / "mine", "test", 16)


# --- the places where it may be ------------------------------------------------------------------------------------

def test_nowhere_lists_every_place_and_what_to_do(home):
    with pytest.raises(FileNotFoundError) as caught:
        celeba()
    text = str(caught.value)
    places = re.findall(r"^- (.*?):", text, re.M)
    assert places[0] == f"a store in {home}/data/celeba-64x64" and places[1] == f"images in {home}/data/img_align_celeba"
    assert places[-2:] == [f"{real_faces.HUB} on the hub", f"torchvision's CelebA in {home}/data"]
    assert "ModuleNotFoundError" in text and "By hand: fetch img_align_celeba.zip" in text and "non-commercial" in text


def test_a_zip_in_the_folder_of_downloads_then_its_store(home, tmp_path, capsys):
    folder = images(tmp_path / "img")
    (home / "data").mkdir(parents=True)
    with zipfile.ZipFile(home / "data" / "img_align_celeba.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"img_align_celeba/{file.name}")
    official(home / "data")
    same(celeba(split="train", size=16), range(10))
    said = capsys.readouterr().out
    assert f"not a store in {home}/data/celeba-16x16 (there is no store" in said
    assert f"10 of 12 faces, from images in {home}/data/img_align_celeba.zip" in said
    (home / "data" / "img_align_celeba.zip").unlink()
    same(celeba(split="held_out", size=16), [10, 11])
    assert f"from a store in {home}/data/celeba-16x16" in capsys.readouterr().out


def test_a_damaged_store_stops_the_search(home):
    images(home / "data" / "img_align_celeba")
    celeba(size=16)
    (home / "data" / "celeba-16x16" / "pixels.u8").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes .* cut off or changed"):
        celeba(size=16)


class Rows:
    "The part of a hub's Dataset that is used, after its documentation."

    def __init__(self, columns, decode=True):
        self.columns, self.decode = columns, decode
        self.column_names = list(columns)

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return list(self.columns[key])
        row = {k: v[key] for k, v in self.columns.items()}
        if self.decode:
            row["image"] = Image.open(io.BytesIO(row["image"]["bytes"]))
        return row

    def cast_column(self, name, kind):
        assert name == "image"
        return Rows(self.columns, kind.decode)


def hub(monkeypatch, parts, ids=True):
    def part(rows):
        raw = []
        for i in rows:
            Image.fromarray(pixels(i)[20:198]).resize((64, 64), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "PNG")
            raw.append({"bytes": file.getvalue(), "path": None})
        names = {"image_id": [f"{i + 1:06}.jpg" for i in rows]} if ids else {}
        return Rows({"image": raw, **names, **{a: [2 * marks(i)[k] - 1 for i in rows] for k, a in enumerate(NAMES)}})

    def load_dataset(name):
        assert name == "electronickale/cmu-10799-celeba64-subset"
        return {k: part(rows) for k, rows in parts.items()}
    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    fake.Image = lambda decode: types.SimpleNamespace(decode=decode)
    fake.concatenate_datasets = lambda sets: Rows({k: sum((s.columns[k] for s in sets), []) for k in sets[0].columns})
    monkeypatch.setitem(sys.modules, "datasets", fake)


@pytest.mark.parametrize("ids", [True, False])
def test_the_hub(monkeypatch, capsys, home, ids):
    hub(monkeypatch, {"train": range(9), "validation": range(9, 12)}, ids)
    d = celeba(split="held_out")
    assert torch.equal(d.bytes(range(3)), torch.stack([want(i, 64) for i in (9, 10, 11)]))
    assert d.columns == NAMES and d.y.tolist() == [marks(i) for i in (9, 10, 11)]
    assert f"faces, from {real_faces.HUB} on the hub" in capsys.readouterr().out
    assert len(celeba()) == 9
    assert "from a store" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError) as caught:
        celeba(size=32, download=False)
    assert real_faces.HUB not in str(caught.value)


def test_the_hub_with_one_split_and_without_a_network(monkeypatch, home):
    hub(monkeypatch, {"train": range(N)})
    names = [f"{i + 1:06}" for i in range(N)]
    held = [n for n in names if hashlib.sha256(n.encode()).digest()[0] < 26]
    assert len(celeba()) == N - len(held)
    def gone(name):
        raise ConnectionError("Couldn't reach\nthe Hub")
    sys.modules["datasets"].load_dataset = gone
    with pytest.raises(FileNotFoundError, match=r"on the hub: ConnectionError: Couldn't reach the Hub"):
        celeba(size=32)


def test_torchvision_fetches_and_the_lists_are_read(monkeypatch, home, capsys):
    from torchvision import datasets
    root = home / "data" / "celeba"

    def download(self):         # as if its addresses answered
        images(root / "img_align_celeba", "png")
        official(root)
        for name, head in (("identity_CelebA", ""), ("list_bbox_celeba", "12\na b c d\n"), ("list_landmarks_align_celeba", "12\na b c d\n")):
            (root / f"{name}.txt").write_text(head + "\n".join(f"{i + 1:06}.jpg 1 2 3 4" for i in range(N)))
    monkeypatch.setattr(datasets.CelebA, "download", download)
    monkeypatch.setattr(datasets.CelebA, "file_list", [
        (None, None, f"{name}.txt") for name in ("list_attr_celeba", "identity_CelebA", "list_bbox_celeba", "list_landmarks_align_celeba",
                                                 "list_eval_partition")])
    same(celeba(split="train", size=16), range(10))
    said = capsys.readouterr().out
    assert "torchvision's CelebA" in said and "not electronickale" in said and "10 of 12 faces" in said
    assert runs.home() == home
