"""Parameters, safe files and random streams."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffcourse import runs


def notebook(injected, **rules):
    ns = {"np": np, "steps": 10, "lr": 2e-3, "name": "a", "sizes": [1, 2], "ema": True, "ref": None}
    runs.declare(ns)
    ns.update(injected)
    runs.check(ns, **rules)
    return ns


@pytest.mark.parametrize(
    "injected, error",
    [
        ({"stepz": 5}, "stepz is not a parameter"),
        ({"steps": "abc"}, "steps = 'abc' is str"),
        ({"steps": 1.5}, "steps = 1.5 is float"),
        ({"steps": True}, "steps = True is bool"),
        ({"name": 7}, "name = 7 is int"),
        ({"ema": "true"}, "ema = 'true' is str"),
        ({"np": 3}, "np is not a parameter"),
        ({"lr": "2e-4"}, "lr = '2e-4' is str"),
        ({"steps": 0}, "out of range: 1 to any"),
        ({"name": "b"}, "choose of"),
    ],
)
def test_bad_parameters(injected, error):
    with pytest.raises((NameError, TypeError, ValueError), match=error) as e:
        notebook(injected, steps=(1, None), name=["a", "c"])
    assert "the parameters are: steps = 10, lr = 0.002" in str(e.value)


def test_good_parameters(capsys):
    ns = notebook({"lr": 1, "sizes": (3,), "ref": "x"}, page="02_ddpm", data="digits")
    assert ns["lr"] == 1.0 and isinstance(ns["lr"], float) and ns["sizes"] == [3]
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "steps=10" in line and "digits" in line
    assert "papermill nbs/02_ddpm.ipynb" in line


def test_check_without_declare():
    with pytest.raises(NameError, match="declare"):
        runs.check({"steps": 1})


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    assert runs.home() == tmp_path
    monkeypatch.delenv("DIFFCOURSE_HOME")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("lib_name = diffcourse\n")
    assert runs.home() == tmp_path / "build" / "digits"


def test_write_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "f"
    runs.atomic_write(file, "one")

    def fail(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        runs.atomic_write(file, "two")
    assert file.read_text() == "one" and list(file.parent.iterdir()) == [file]


def test_a_disk_that_is_really_full(tmp_path):
    code = (
        "import resource, signal; from diffcourse import runs;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"runs.atomic_write({str(tmp_path / 'f')!r}, b'x' * 5000)"
    )
    (tmp_path / "f").write_text("old")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1 and "the old file" in out.stderr
    assert (tmp_path / "f").read_text() == "old" and len(os.listdir(tmp_path)) == 1


def test_tensors_round_trip(tmp_path):
    file = tmp_path / "w.safetensors"
    w = {"a": torch.randn(3, 2).t(), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    runs.save_tensors(file, w, {"x": [1, None, "ü"]})
    got, meta = runs.load_tensors(file)
    assert meta == {"x": [1, None, "ü"]} and all(torch.equal(got[k], w[k]) for k in w)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("how", ["pickle", "torch", "truncated", "text", "empty"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.setenv("BOMB", str(tmp_path / "went-off"))
    file = tmp_path / "w.safetensors"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif how == "torch":
        torch.save({"w": torch.ones(3)}, file)
    else:
        runs.save_tensors(file, {"w": torch.ones(9)}, {})
        cut = {"truncated": file.read_bytes()[:-3], "text": b"hello, world", "empty": b""}
        file.write_bytes(cut[how])
    with pytest.raises(ValueError, match="refused|delete it") as e:
        runs.load_tensors(file)
    assert str(file) in str(e.value) and not (tmp_path / "went-off").exists()
    with pytest.raises(FileNotFoundError, match="no weights"):
        runs.load_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0x180, 0x4B50])  # written: 80 01, and "PK"
def test_a_safetensors_file_may_begin_like_a_pickle(tmp_path, length):
    "It begins with the length of its header, which may be any multiple of 8."
    file = tmp_path / "w.safetensors"
    have = lambda: int.from_bytes(file.read_bytes()[:8], "little")
    runs.save_tensors(file, {"w": torch.ones(2)}, {"note": ""})
    runs.save_tensors(file, {"w": torch.ones(2)}, {"note": "x" * (length - have())})
    assert have() == length
    assert torch.equal(runs.load_tensors(file)[0]["w"], torch.ones(2))


def test_random_streams():
    draw = lambda *key: tuple(runs.rng(*key).integers(2**62, size=2))
    keys = [(s, p, k) for s in range(12) for p in range(4) for k in range(12)]
    assert len({draw(*k) for k in keys}) == len(keys)
    assert draw(1, 2) == draw(1, 2) != draw(2, 1)
    for bad in ((-1,), (0.5,)):
        with pytest.raises(ValueError, match="non-negative"):
            runs.rng(*bad)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_clock_waits_for_the_device(kind, monkeypatch):
    waited, where = [], torch.device(kind)
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *device: waited.append(device))
    first = runs.clock(where)
    assert len(waited) == 1 and runs.clock(torch.device("cpu")) >= first and len(waited) == 1


def test_constants_are_no_parameters(capsys):
    ns = {"LEAST": 5, "ROWS": {"a": 1}, "steps": 3}
    runs.declare(ns)
    runs.check(ns, data="nothing")
    said = capsys.readouterr().out
    assert "steps=3" in said and "LEAST" not in said and "ROWS" not in said
    runs.declare(ns)
    ns["LEAST"] = 6
    with pytest.raises(NameError, match="LEAST is not a parameter, it is taken"):
        runs.check(ns, data="nothing")
