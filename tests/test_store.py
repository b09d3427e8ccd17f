"""The store: what is read is what was written, a stop or a full disk loses nothing, a damage is seen."""
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffcourse import data, store


class Made:
    "A source of random images that counts what it gives."

    def __init__(self, n=10, shape=(3, 4, 4), key="a", broken=(), where=".", labels=None):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        self.shape, self.key, self.where, self.name, self.reads = shape, key, where, "made", []
        self.names, self.broken, self.columns = [f"{i}.png" for i in range(n)], broken, []
        self.labels = {"y": torch.arange(n)} if labels is None else labels

    def read(self, i):
        self.reads.append(i)
        if i in self.broken:
            raise OSError("image file is truncated")
        return self.pixels[i], 99


def numbers(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store._decoded, "__defaults__", (0, 4))


# --- reading ------------------------------------------------------------------------------------------------------

def test_every_byte_is_the_number_that_images_have():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(store.scaled(levels), levels / 127.5 - 1)
    assert store.scaled(levels).dtype == torch.float32


def test_what_is_read_is_what_was_written(tmp_path):
    source = Made(50)
    d = store.prepare(source, tmp_path / "s", licence="free")
    assert len(d) == 50 and d.shape == (3, 4, 4) and d.flip is True and d.name == "made"
    i = [7, 0, 49, 7]
    assert torch.equal(d.batch(i), numbers(source.pixels[i])) and torch.equal(d.item(3), d.batch([3])[0])
    assert torch.equal(d.bytes(np.array(i)), torch.from_numpy(source.pixels[i])) and d.y[i].tolist() == i
    assert d.batch([]).shape == (0, 3, 4, 4)
    assert (tmp_path / "s" / "pixels.u8").read_bytes() == source.pixels.tobytes()
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["licence"] == "free" and manifest["shape"] == [50, 3, 4, 4] and manifest["source"] == "."
    assert json.loads((tmp_path / "s" / "names.json").read_text()) == source.names
    with pytest.raises(IndexError):
        d.batch([50])


def test_what_a_reader_does_to_a_batch_stays_with_him(tmp_path):
    d = store.prepare(Made(), tmp_path)
    before = d.hash
    d.batch([0]).zero_(), d.bytes([0]).zero_()
    assert d.hash == before and d.bytes([0]).any()


def test_a_part_is_the_samples_of_its_indices(tmp_path):
    d = store.prepare(Made(), tmp_path)
    part = d.part([8, 2, 5], "three").part([2, 0])
    assert len(part) == 2 and part.name == "three" and part.y.tolist() == [5, 8] == part.labels["y"].tolist()
    assert torch.equal(part.batch([0, 1]), d.batch([5, 8]))
    assert len({d.hash, part.hash, d.part([5]).hash}) == 3 and d.part([5, 8]).hash == part.hash
    assert torch.equal(torch.cat(list(part.ahead([[1], [0, 0]]))), d.batch([8, 5, 5]))


def test_reading_ahead_gives_the_plan_in_its_order(tmp_path):
    d = store.prepare(Made(40), tmp_path)
    rng = np.random.default_rng(1)
    plan = [rng.integers(0, 40, 8) for _ in range(20)]
    for indices, x in zip(plan, d.ahead(iter(plan), "cpu"), strict=True):
        assert torch.equal(x, d.batch(indices))
    images = data.Images(d.batch(range(40)))
    for x, y in zip(images.ahead(plan), d.ahead(plan), strict=True):
        assert torch.equal(x, y)


def test_reading_ahead_stops_with_its_reader_and_hands_on_errors(tmp_path):
    d, threads = store.prepare(Made(), tmp_path), threading.active_count()
    endless = d.ahead([i % 10] for i in range(10**9))
    assert next(endless).shape == (1, 3, 4, 4)
    endless.close()
    assert threading.active_count() == threads
    with pytest.raises(IndexError, match="10 images are numbered"):
        list(d.ahead([[0], [77], [1]]))
    assert threading.active_count() == threads


def test_bytes_that_lie_on_the_device_give_the_same(tmp_path):
    d = store.prepare(Made(40), tmp_path).part(range(39, 9, -1))
    plan = np.random.default_rng(2).integers(0, 30, (5, 8))
    read = list(d.ahead(plan))
    d._there = d.bytes(range(30))                            # where a GPU has them
    for x, y in zip(read, d.ahead(plan), strict=True):
        assert torch.equal(x, y)
    assert d.part([3])._there is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("free", [0, 2**40])
def test_a_gpu_gets_the_same_numbers(tmp_path, monkeypatch, free):
    d = store.prepare(Made(40), tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    plan = np.random.default_rng(2).integers(0, 40, (50, 8))
    for i, x in zip(plan, d.ahead(plan, "cuda"), strict=True):
        assert x.is_cuda and torch.equal(x.cpu(), d.batch(i))
    assert (d._there is not None) == bool(free)


def test_workers_and_copies_open_the_file_again(tmp_path):
    d = store.prepare(Made(1000, (3, 16, 16)), tmp_path).part(range(999, -1, -1))
    raw = pickle.dumps(d)
    assert len(raw) < 30_000
    for x, i in zip(DataLoader(pickle.loads(raw), batch_sampler=[[3, 1], [0]], num_workers=1), ([3, 1], [0]), strict=True):
        assert torch.equal(x, d.batch(i))


def test_training_on_a_store_is_training_on_its_images(tmp_path, monkeypatch):
    from diffcourse.training import fit
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    d = store.prepare(Made(30), tmp_path / "s").part(range(5, 30))
    weights = []
    for x in (d, data.Images(d.batch(range(25)), flip=True)):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(3, 3, 3, padding=1)
        loss = lambda net, x0, draw: (net(x0 + draw.noise()) - x0).square().mean((1, 2, 3))
        fit(loss, net, x, f"run{len(weights)}", 12, batch=8, precision="fp32")
        weights.append(net.weight.detach().clone())
    assert torch.equal(*weights)


# --- opening ------------------------------------------------------------------------------------------------------

def change(file, at=5):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_changed_byte_is_seen_when_opened_and_while_open(tmp_path):
    d = store.prepare(Made(), tmp_path)
    before = d.hash
    change(d.folder / "pixels.u8")
    for look in (lambda: d.hash, lambda: store.open_store(tmp_path)):
        with pytest.raises(ValueError, match="pixels.u8 was changed after it was written.*Delete the folder .* prepare it again"):
            look()
    change(d.folder / "pixels.u8")                           # back again
    assert store.open_store(tmp_path).hash == d.hash == before


def test_a_change_that_hides_its_date_is_seen_when_asked(tmp_path):
    store.prepare(Made(), tmp_path)
    about = (tmp_path / "pixels.u8").stat()
    change(tmp_path / "pixels.u8")
    os.utime(tmp_path / "pixels.u8", ns=(about.st_atime_ns, about.st_mtime_ns))
    store.open_store(tmp_path)
    with pytest.raises(ValueError, match="was changed"):
        store.open_store(tmp_path, check=True)


def test_a_copy_is_checked_once(tmp_path, monkeypatch):
    import shutil
    d = store.prepare(Made(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    asked, digest = [], store._digest
    monkeypatch.setattr(store, "_digest", lambda file: asked.append(file.name) or digest(file))
    assert store.open_store(tmp_path / "b").hash == d.hash
    assert asked == ["pixels.u8", "labels.safetensors"]
    store.open_store(tmp_path / "b")
    assert len(asked) == 2


@pytest.mark.parametrize("size", [0, 1, 479, 481])
def test_a_store_cut_off_or_grown(tmp_path, size):
    d = store.prepare(Made(), tmp_path)
    (tmp_path / "pixels.u8").write_bytes(bytes(size))
    if size < 480:                                           # reading there would end the process
        with pytest.raises(OSError, match=f"was cut off, to {size} of 480 bytes.*prepare it again"):
            d.batch([9])
    for look in (lambda: d.hash, lambda: store.open_store(tmp_path)):
        with pytest.raises(ValueError, match=f"has {size} bytes and its manifest says 480: it was cut off or changed"):
            look()


@pytest.mark.parametrize("text, match", [("{", "damaged"), ("[]", "damaged"), ('{"format": 2, "shape": [1, 1, 1, 1]}', "format 2"),
                                         ('{"format": 1}', "KeyError: 'shape'"), ("", "damaged")])
def test_a_damaged_manifest(tmp_path, text, match):
    store.prepare(Made(), tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{match}.*Delete the folder"):
        store.open_store(tmp_path)


def test_labels_that_are_gone_or_changed(tmp_path):
    d = store.prepare(Made(), tmp_path)
    change(tmp_path / "labels.safetensors", -3)
    for look in (lambda: d.hash, lambda: store.open_store(tmp_path)):
        with pytest.raises(ValueError, match="labels.safetensors was changed"):
            look()
    (tmp_path / "labels.safetensors").unlink()
    with pytest.raises(ValueError, match="labels.safetensors is gone.*prepare it again"):
        store.open_store(tmp_path)


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no store in .*prepare writes one"):
        store.open_store(tmp_path / "nothing")


# --- writing ------------------------------------------------------------------------------------------------------

def test_another_content_is_another_hash_and_an_equal_one_is_not_written_again(tmp_path):
    a = store.prepare(Made(), tmp_path)
    first = a.hash
    same, other = Made(), Made(key="b")
    assert store.prepare(same, tmp_path).hash == first and same.reads == []
    other.pixels = other.pixels + 1
    b = store.prepare(other, tmp_path)
    assert b.hash != first and torch.equal(b.batch(range(10)), numbers(other.pixels))
    labels = Made(key="c", labels={"y": torch.zeros(10)})
    labels.pixels = other.pixels
    second = b.hash
    assert store.prepare(labels, tmp_path).hash != second
    with pytest.raises(ValueError, match="labels.safetensors was changed"):
        b.hash                                               # what it was opened on has been replaced
    assert torch.equal(b.batch(range(10)), numbers(other.pixels))
    bare = Made(key="d", labels={})
    assert store.prepare(bare, tmp_path).y is None


def test_broken_images_are_named_together_and_decoded_once(tmp_path, small_chunks):
    source = Made(10, broken=(2, 9))
    with pytest.raises(ValueError, match=r"2 of 10 images .*2\.png \(OSError: image file is truncated\); 9\.png .*skip_broken=True"):
        store.prepare(source, tmp_path)
    assert sorted(source.reads) == list(range(10))
    with pytest.raises(FileNotFoundError, match="preparation was not finished"):
        store.open_store(tmp_path)
    with pytest.warns(UserWarning, match="left out 2 of 10 images"):
        d = store.prepare(source, tmp_path, skip_broken=True)
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    assert len(source.reads) == 10 and torch.equal(d.batch(range(8)), numbers(source.pixels[kept])) and d.y.tolist() == kept
    assert d.manifest["left_out"] == ["2.png", "9.png"]
    with pytest.raises(ValueError, match="2 of 10 images"):                 # to leave them out must be said each time
        store.prepare(source, tmp_path)
    assert store.prepare(source, tmp_path, skip_broken=True).hash == d.hash


def test_nothing_but_broken_images(tmp_path):
    with pytest.raises(ValueError, match="10 of 10 images .*Repair or remove them$"):
        store.prepare(Made(broken=range(10)), tmp_path, skip_broken=True)


def test_floats_are_rounded_and_small_images_counted(tmp_path):
    source = Made(3, (1, 2, 2))
    source.pixels = np.float32([[[[0.4, 0.6], [254.7, 300]]]] * 3)
    source.read = lambda i: (source.pixels[i], 1)
    with pytest.warns(UserWarning, match="3 of 3 images are smaller than 2 pixels"):
        d = store.prepare(source, tmp_path)
    assert d.bytes([1]).flatten().tolist() == [0, 1, 255, 255]


def test_a_source_that_goes_away_is_no_broken_image(tmp_path, small_chunks):
    folder = tmp_path / "disk"
    folder.mkdir()
    source = Made(10, where=folder)
    read = source.read
    def lost(i):
        if i == 6:
            folder.rmdir()
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return read(i)
    source.read = lost
    with pytest.raises(OSError, match="stopped after 4 of 10 images .*What is written stays"):
        store.prepare(source, tmp_path / "s")
    folder.mkdir()
    source.read, source.reads = read, []
    d = store.prepare(source, tmp_path / "s")
    assert sorted(source.reads) == [4, 5, 6, 7, 8, 9] and torch.equal(d.batch(range(10)), numbers(source.pixels))


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 521, 479))
    with pytest.raises(OSError, match="480 bytes are needed in .*479 are free.*DIFFCOURSE_HOME") as caught:
        store.prepare(source := Made(), tmp_path)
    assert caught.value.errno == errno.ENOSPC and source.reads == []


def test_a_disk_that_fills_keeps_what_is_written(tmp_path, small_chunks):
    source, (soft, hard) = Made(10, (3, 16, 16)), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 768 + 700, hard))       # the kernel refuses in the second chunk
    try:
        with pytest.raises(OSError, match=r"stopped after 4 of 10 images \(File too large\).*call this again"):
            store.prepare(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    source.reads = []
    d = store.prepare(source, tmp_path)
    assert sorted(source.reads) == [4, 5, 6, 7, 8, 9] and torch.equal(d.batch(range(10)), numbers(source.pixels))
    assert store.open_store(tmp_path, check=True).hash == d.hash


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[3])
from test_store import Made, store
store._decoded.__defaults__ = (0, 4)
source = Made(40)
read, slow = source.read, int(sys.argv[2])
source.read = lambda i: (time.sleep(0.02 * slow), os.write(2, b"%d\\n" % i), read(i))[2]
store.prepare(source, sys.argv[1])
"""


@pytest.mark.parametrize("after", [1, 18, 37])
def test_a_killed_preparation_goes_on_without_decoding_again(tmp_path, after):
    run = lambda slow: subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "s"), str(slow), os.path.dirname(__file__)],
                                        stderr=subprocess.PIPE, text=True)
    first = run(1)
    for _ in range(after):
        first.stderr.readline()
    first.kill()
    first.communicate()
    notes = tmp_path / "s" / "progress.json"
    done = json.loads(notes.read_text())["done"] if notes.exists() else 0
    assert done >= (after - 1) // 4 * 4 - 4 and not (tmp_path / "s" / "manifest.json").exists()
    again = [int(word) for word in run(0).communicate()[1].split()]
    assert sorted(again) == list(range(done, 40))
    d = store.open_store(tmp_path / "s", check=True)
    assert torch.equal(d.batch(range(40)), numbers(Made(40).pixels))


def test_notes_that_do_not_fit_are_not_believed(tmp_path, small_chunks):
    for text in ("", "{}", "[]", '{"key": "a"}', json.dumps({"key": "a", "done": 8, "kept": 8, "small": 0, "bad": []})):
        folder = tmp_path / str(abs(hash(text)))
        folder.mkdir()
        (folder / "progress.json").write_text(text)
        (folder / "pixels.part").write_bytes(bytes(17))
        source = Made()
        assert torch.equal(store.prepare(source, folder).batch(range(10)), numbers(source.pixels)) and len(source.reads) == 10


def test_two_that_prepare_the_same_at_once(tmp_path):
    sources = [Made(30), Made(30)]
    for source in sources:
        source.read = lambda i, s=source: (time.sleep(0.002), Made.read(s, i))[1]
    threads = [threading.Thread(target=store.prepare, args=(s, tmp_path)) for s in sources]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(len(s.reads) for s in sources) == 30
    assert store.open_store(tmp_path, check=True).bytes(range(30)).numpy().tobytes() == sources[0].pixels.tobytes()
