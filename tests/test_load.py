"""`load` and the lazy names."""
import hashlib
import json
from pathlib import Path

import pytest
import torch

import diffcourse as dc
from diffcourse import runs
from diffcourse.ddpm import DenoisingLoss


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def train(run="mine/net", seed=0):
    torch.manual_seed(seed)
    data = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    net = dc.UNet(size=4, base=16, mults=(1,), attention=())
    return dc.fit(DenoisingLoss(dc.VP.cosine(), "v"), net, data, run, 3, batch=4)


def test_the_local_run_comes_first(capsys):
    made = train()
    den = dc.load("mine/net")
    assert made.folder.name in capsys.readouterr().out
    assert den.predicts == "v" and repr(den.path) == repr(dc.VP.cosine())
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.7])
    assert torch.equal(den.net(x, t), made.net.cpu()(x, t).detach())
    newer = train(seed=1)
    assert torch.equal(dc.load("mine/net").net(x, t), newer.net.cpu()(x, t).detach())
    file = made.folder / "model.safetensors"
    assert torch.equal(dc.load(str(file)).net(x, t), made.net.cpu()(x, t).detach())


def test_shipped_weights(capsys):
    den = dc.load("digits/ddpm")
    assert "sha256 checked" in capsys.readouterr().out
    out = dc.sample(den, (1, 8, 8), dc.Euler(), dc.uniform(10), seeds=range(4))
    assert out.x.isfinite().all() and out.x.std() > 0.4
    index = dc._shipped()
    folder = Path(dc.__file__).parent / "weights"
    assert {v["file"] for v in index.values()} == {p.name for p in folder.glob("*.safetensors")}
    sizes = {name: (folder / v["file"]).stat().st_size for name, v in index.items()}
    assert all(size <= (3_000_000 if name.startswith("digits/") else 5_000_000) for name, size in sizes.items())
    assert sum(sizes.values()) < 40_000_000    # of the wheel


def test_damaged_shipped_weights_are_refused(monkeypatch):
    index = dc._shipped()
    index["digits/ddpm"]["sha256"] = hashlib.sha256(b"other").hexdigest()
    monkeypatch.setattr(dc, "_shipped", lambda: index)
    with pytest.raises(ValueError, match="install the package again"):
        dc.load("digits/ddpm")


def test_bad_loads(home):
    made = train()
    with pytest.raises(FileNotFoundError, match="digits/ddpm.*mine/net.*Train it"):
        dc.load("digits/nobody")
    with pytest.raises(FileNotFoundError):
        dc.load("mine/net", source="shipped")
    with pytest.raises(ValueError, match="source='hub'.*'auto', 'local', 'shipped'"):
        dc.load("mine/net", source="hub")
    file = made.folder / "model.safetensors"
    tensors, meta = runs.load_tensors(file)
    meta["net"]["config"]["base"] = 32  # another architecture
    runs.save_tensors(file, tensors, meta)
    with pytest.raises(ValueError, match="does not fit"):
        dc.load("mine/net")
    runs.save_tensors(file, tensors, {"net": {"class": "os", "config": {}}})
    with pytest.raises((AttributeError, ValueError)):
        dc.load("mine/net")
    runs.save_tensors(file, tensors, {})
    with pytest.raises(ValueError, match="which network"):
        dc.load("mine/net")
    (home / "runs" / "mine" / "net" / "latest.json").write_text(json.dumps({"identity": "gone"}))
    with pytest.raises(FileNotFoundError):
        dc.load("mine/net")


def test_names():
    assert set(dir(dc)) >= {"VP", "sample", "fit", "load", "UNet", "paths"}
    assert all(hasattr(dc, n) for n in dir(dc))
    with pytest.raises(AttributeError, match="did you mean.*sample"):
        dc.sampel
