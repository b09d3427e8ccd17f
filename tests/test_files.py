"""Folders and archives of images: which are found, how they are cropped, what is refused."""
import pickle
import shutil
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffcourse import files, store


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
    d = files.image_folder(folder_of(tmp_path, a_png=quadrants(w, h)), size=32)
    assert corners(d.x[0]) == COLOURS
    wide = Image.new("RGB", (96, 32), "white")                 # black bars that the crop must remove
    wide.paste("black", (0, 0, 32, 32))
    wide.paste("black", (64, 0, 96, 32))
    d = files.image_folder(folder_of(tmp_path / "bars", b_png=wide), size=16)
    assert (d.x == 1).all()


def test_an_image_of_the_size_stays_bit_for_bit(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    d = files.image_folder(folder_of(tmp_path, a_png=Image.fromarray(a)), size=20)
    assert torch.equal(d.x[0], (torch.from_numpy(a[:, 5:25]).permute(2, 0, 1).float() / 127.5 - 1))


def test_files_are_resized_with_antialiasing(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    d = files.image_folder(folder_of(tmp_path, a_png=Image.fromarray(board)), size=16)
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
    d = files.image_folder(tmp_path, size=32)
    seen = dict(zip(files.Files(tmp_path, 32).names, d.x, strict=True))
    assert len(seen) == 11
    for name in ("exif.png", "palette.png", "bmp.BMP"):
        assert corners(seen[name]) == COLOURS, name
    assert np.abs(np.subtract(corners(seen["ink.jpeg"]), COLOURS)).max() < 12
    assert (seen["clear.png"] == 1).all() and (seen["la.png"] == 1).all() and (seen["bit.png"] == 1).all()
    for name in ("grey.png", "deep.png"):
        assert torch.allclose(seen[name], torch.full((3, 32, 32), 51 / 127.5 - 1), atol=1e-6), name
    one = files.image_folder(tmp_path, size=32, channels=1)
    assert one.shape == (1, 32, 32) and one.x.dtype == torch.float32


def test_sixteen_bits_keep_more_than_eight(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 16, (64, 1))
    d = files.image_folder(folder_of(tmp_path, a_png=Image.fromarray(ramp)), size=64, channels=1)
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
    for odd in (".ipynb_checkpoints", "__MACOSX/a", ".cache/deep"):
        (tmp_path / odd).mkdir(parents=True)
        shutil.copy(tmp_path / "a" / "0.png", tmp_path / odd / "0-checkpoint.png")
    assert files.Files(tmp_path).names == ["a/0.png", "a/2.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"]


def test_a_store_equals_memory_also_through_workers(tmp_path):
    some(tmp_path)
    memory = files.image_folder(tmp_path, size=16)
    disk = files.image_folder(tmp_path, size=16, memory_limit=100)
    assert isinstance(disk, store.Store) and not isinstance(memory, store.Store)
    assert len(disk) == len(memory) == 7 and disk.shape == memory.shape and disk.flip and memory.flip
    assert torch.equal(disk.batch(range(7)), memory.x)
    assert disk.batch([]).shape == (0, 3, 16, 16)
    assert files.image_folder(tmp_path, size=16, streamed=True, flip=False).flip is False
    plan = [[6, 0, 3], [1], [2, 2]]
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(disk)), batch_sampler=plan, num_workers=2)
    for indices, batch in zip(plan, loader, strict=True):
        assert torch.equal(batch, memory.batch(indices))


def test_the_limit_is_one_of_bytes(tmp_path):
    some(tmp_path)
    limit = 7 * 3 * 16 * 16 * 4
    small, large = (files.image_folder(tmp_path, size=16, memory_limit=limit - less) for less in (0, 1))
    assert isinstance(large, store.Store) and not isinstance(small, store.Store)


def test_hash_survives_a_move_and_sees_a_change(tmp_path):
    some(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    load = lambda name, size=16, **how: files.image_folder(tmp_path / name, size=size, **{"streamed": True, **how})
    before = load("one")
    assert before.hash == load("two").hash != load("one", 8).hash
    Image.new("RGB", (24, 24)).save(tmp_path / "one" / "a" / "0.png")
    after = load("one")
    assert after.folder == before.folder and after.hash != load("two").hash
    assert torch.equal(after.batch(range(7)), load("one", streamed=False).x)


def test_a_store_needs_its_images_no_more(tmp_path, capsys):
    some(tmp_path / "set")
    d = files.image_folder(tmp_path / "set", size=16, streamed=True)
    assert "7 of 7 images written" in capsys.readouterr().out
    again = files.image_folder(tmp_path / "set", size=16, streamed=True)
    assert capsys.readouterr().out == "" and again.hash == d.hash
    shutil.rmtree(tmp_path / "set")
    assert torch.equal(store.open_store(d.folder).batch([6]), again.batch([6]))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        files.image_folder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NotADirectoryError, match="a.txt is a file"):
        files.image_folder(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"no image in .*\.jpg \.jpeg \.png \.webp \.bmp \.gif"):
        files.image_folder(tmp_path)
    for kwargs, match in (({"size": 0}, "size = 0"), ({"size": 8.5}, "size = 8.5"), ({"channels": 4}, "channels is 4")):
        with pytest.raises(ValueError, match=match):
            files.image_folder(tmp_path, **kwargs)


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
        files.image_folder(broken, size=16)
    text = str(caught.value)
    assert "3 of 7 images" in text and "skip_broken=True" in text
    assert all(name in text for name in ("cut.jpg", "empty.png", "text.gif"))
    for i in range(20):
        (broken / f"more{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="23 of 27 images .* and 18 more"):
        files.image_folder(broken, size=16)


@pytest.mark.parametrize("streamed", [False, True])
def test_broken_files_can_be_left_out(broken, streamed):
    with pytest.warns(UserWarning, match="left out 3 of 7 images .*cut.jpg"):
        d = files.image_folder(broken, size=16, skip_broken=True, streamed=streamed)
    assert len(d) == 4 and d.batch(range(4)).shape == (4, 3, 16, 16)


def test_a_folder_of_broken_files_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 images .* Repair or remove them$"):
        files.image_folder(tmp_path, skip_broken=True)


def test_small_images_are_enlarged_with_a_warning(tmp_path):
    some(tmp_path, n=3, side=24)
    with pytest.warns(UserWarning, match="3 of 3 images are smaller than 32 pixels"):
        d = files.image_folder(tmp_path, size=32)
    assert d.shape == (3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.image_folder(tmp_path, size=24)
    with pytest.warns(UserWarning, match="3 of 3 images are smaller"):
        files.image_folder(tmp_path, size=32, streamed=True)


# --- archives ------------------------------------------------------------------------------------------------------

def packed(folder, file):
    "The folder as an archive, in an order of its own, with what a Mac adds."
    names = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/a/._0.png", b"no image")
            for path in names:
                archive.write(path, path.relative_to(folder))
        return file
    with tarfile.open(file, "w:" + {".tar": "", ".tgz": "gz", ".gz": "gz", ".bz2": "bz2", ".xz": "xz"}[file.suffix]) as archive:
        for path in names:
            archive.add(path, f"./{path.relative_to(folder)}")
    return file


@pytest.mark.parametrize("suffix", files.ARCHIVES)
def test_an_archive_is_like_its_folder(tmp_path, suffix):
    some(tmp_path / "set", n=9)
    (tmp_path / "set" / ".DS_Store").write_bytes(b"x")
    archive = packed(tmp_path / "set", tmp_path / f"faces{suffix}")
    d, want = files.image_folder(archive, size=16), files.image_folder(tmp_path / "set", size=16)
    assert torch.equal(d.x, want.x) and d.name == "faces 16x16"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([archive.name, "set"])
    assert torch.equal(files.image_folder(archive, size=16, streamed=True).batch(range(9)), want.x)


def test_archives_that_are_none_or_cut(tmp_path):
    some(tmp_path / "set", n=30)
    for suffix in files.ARCHIVES:
        archive = packed(tmp_path / "set", tmp_path / f"a{suffix}")
        whole = archive.read_bytes()
        archive.write_bytes(b"no archive at all" * 99)
        with pytest.raises(ValueError, match="cannot be read as an archive.*fetch it again"):
            files.Files(archive)
        archive.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(ValueError, match="cannot be read as an archive|the archive was cut off here"):
            files.image_folder(archive, size=16)


def test_a_zip_with_a_damaged_member_names_it(tmp_path):
    some(tmp_path / "set", n=4)
    archive = packed(tmp_path / "set", tmp_path / "a.zip")
    raw = bytearray(archive.read_bytes())
    at = raw.index(b"b/1.png") + 60
    raw[at:at + 40] = bytes(40)
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match=r"1 of 4 images .*b/1\.png"):
        files.image_folder(archive, size=16)
