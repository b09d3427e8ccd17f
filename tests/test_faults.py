"""Small inputs that once failed, each with what must come: a stale run, lost work, wrong numbers, an unclear error."""
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffcourse as dc
from diffcourse import checkpoints, runs
from diffcourse.training import fit

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Net(nn.Module):
    def __init__(self, seed=0, tied=False):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.m, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b = nn.Linear(8, 8)
        if tied:
            self.b.weight = self.m.weight

    def forward(self, x, t):
        h = torch.tanh(self.a(torch.cat([x, t[:, None]], 1)))
        return self.out(torch.tanh(self.b(torch.tanh(self.m(h)))))


def train(loss=None, net=None, data=X, run="r", steps=3, **more):
    settings = dict(batch=16, warmup=2, log_every=1, precision="fp32") | more
    return fit(loss or dc.FlowMatching(), net or Net(), data, run, steps, **settings)


# ------------------------------------------------------------------ A. nothing stale

CELLS = """
import torch, diffcourse as dc
from torch import nn

class Loss:
    path, predicts = dc.Linear(), "flow"
    def __call__(self, net, x0, draw):
        t, eps = 1 - draw.t(), draw.noise()
        out = net(self.path.add_noise(x0, eps, t), t)
        return 1.0 * (out - eps + x0).square().mean(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 2)
    def forward(self, x, t):
        return 1.0 * self.a(torch.cat([x, t[:, None]], 1))

x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
made = dc.fit(Loss(), Net(), x, "cell", 3, batch=8, precision="fp32")
"""


def cell(source):
    space = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), "<cell>", "exec"), space)
    return space["made"].status


@pytest.mark.parametrize("old, new", [
    ("return 1.0 * (out", "return 0.0 * (out"), ("return 1.0 * self.a", "return 2.0 * self.a"),
    ("x = torch.randn", "x = 2 * torch.randn"), ("dc.Linear()", "dc.VP.cosine()"), ("manual_seed(0)\n        self", "manual_seed(1)\n        self"),
    ("batch=8", "batch=10"),
])
def test_a_changed_cell_trains_and_a_comment_does_not(old, new):
    assert CELLS.count(old) == 1
    assert cell(CELLS) == "trained" and cell(CELLS) == "reused"
    assert cell("# a comment\n" + CELLS.replace("class Loss:\n", "class Loss:\n    'What it is.'\n\n")) == "reused"
    assert cell(CELLS.replace(old, new)) == "trained"
    assert cell(CELLS) == "reused"


def test_the_same_in_a_script_on_standard_input(home):
    def run(source):
        env = {**os.environ, "DIFFCOURSE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        out = subprocess.run([sys.executable, "-"], input=source + "\nprint(made.status)", env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return out.stdout.split()[-1]

    assert run(CELLS) == "trained"
    assert run(CELLS + "\n# said") == "reused"
    assert run(CELLS.replace("1.0 * (out", "3.0 * (out")) == "trained"


def test_a_value_that_a_loss_reads():
    cfg = {"w": 1.0}

    def loss(net, x0, draw):
        t, eps = draw.t(), draw.noise()
        return cfg["w"] * (net(torch.lerp(x0, eps, t[:, None]), t) - eps + x0).square().mean(1)

    first = train(loss)
    cfg["w"] = 5.0
    assert train(loss).status == "trained"
    cfg["w"] = 1.0
    assert train(loss).folder == first.folder


def test_data_that_changed_in_place():
    d = dc.Images(torch.rand(20, 1, 4, 4))
    net = lambda: dc.UNet(size=4, base=8, mults=(1,), heads=2)
    go = lambda: (torch.manual_seed(0), train(net=net(), data=d))[1].status
    assert go() == "trained" and go() == "reused"
    d.x.mul_(0.5)
    assert go() == "trained"
    x = X.clone()
    assert train(data=x, run="t").status == "trained"
    x[0, 0] += 1
    assert train(data=x, run="t").status == "trained"


def test_another_callback_on_a_complete_run(capsys):
    first = train(steps=6, every=2, callback=lambda step, net: torch.tensor([1.0]))
    assert {k: v.item() for k, v in first.snapshots.items()} == {2: 1, 4: 1, 6: 1}
    capsys.readouterr()
    other = train(steps=6, every=2, callback=lambda step, net: torch.tensor([2.0]))
    said = capsys.readouterr().out
    assert other.status == "reused" and {k: v.item() for k, v in other.snapshots.items()} == {6: 2}
    assert "iterations 2 to 4" in said and "fresh=True" in said
    more = train(steps=6, every=3, callback=lambda step, net: torch.tensor([1.0]))
    assert set(more.snapshots) == {6} and more.status == "reused"


def test_callbacks_that_cannot_be_described_are_never_the_same(capsys):
    lock = threading.Lock()

    def make(value):
        def look(step, net):
            with lock:
                return torch.tensor([value])
        return look

    assert set(train(steps=4, every=2, callback=make(1.0)).snapshots) == {2, 4}
    other = train(steps=4, every=2, callback=make(2.0))
    assert other.status == "reused" and {k: v.item() for k, v in other.snapshots.items()} == {4: 2}
    assert "fresh=True" in capsys.readouterr().out


def test_another_callback_sees_the_numbered_weights():
    look = lambda step, net: net.out.weight.detach().clone()
    first = train(steps=6, every=2, keep_every=2, callback=look)
    second = train(steps=6, every=2, callback=lambda step, net: 2 * net.out.weight.detach())
    assert second.status == "reused" and set(second.snapshots) == {2, 4, 6}
    assert all(torch.equal(second.snapshots[k], 2 * first.snapshots[k]) for k in (2, 4, 6))
    assert torch.equal(second.net.out.weight, first.net.out.weight)


def test_a_loss_that_was_loaded_from_a_place(tmp_path):
    import importlib.util

    file = tmp_path / "loaded_loss.py"
    text = "class Loss:\n    def __call__(self, net, x0, draw):\n        return 1.0 * (net(x0, draw.t()) - x0).square().mean(1)\n"

    def status(text):
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("loaded_loss", file)
        module = importlib.util.module_from_spec(spec)
        exec(compile(text, str(file), "exec"), vars(module))
        return train(module.Loss(), run="loaded").status

    assert [status(text), status("# said\n" + text), status(text.replace("1.0", "2.0"))] == ["trained", "reused", "trained"]


def test_what_cannot_be_told_is_refused_by_name():
    lock = threading.Lock()

    def loss(net, x0, draw):
        with lock:
            return (net(x0, draw.t()) - x0).square().mean(1)

    with pytest.raises(TypeError, match=r"loss\.lock is .*lock"):
        train(loss)


# ------------------------------------------------------------------ B. nothing lost

def test_tied_weights():
    made = train(net=Net(tied=True), steps=4)
    again = train(net=Net(tied=True), steps=4)
    assert made.status == "trained" and again.status == "reused"
    assert again.net.b.weight is again.net.m.weight and torch.equal(made.net.b.weight, again.net.b.weight)
    assert train(net=Net(), steps=4).folder != made.folder


def test_a_buffer_that_is_a_view_of_a_weight():
    net = Net()
    net.register_buffer("view", net.a.weight.detach()[:2])
    assert train(net=net).status == "trained"


class Own(dc.Linear):
    def __init__(self, w):
        self.w = w

    def alpha(self, t):
        return super().alpha(t) ** 1


def test_a_path_and_a_network_of_ones_own():
    made = train(dc.FlowMatching(Own(torch.ones(2))), run="own/r")
    with pytest.raises(ValueError, match="network of your own, Net.*net="):
        dc.load("own/r")
    with pytest.raises(ValueError, match="path of your own, Own.*path="):
        dc.load("own/r", net=Net(1))
    den = dc.load("own/r", net=Net(1), path=Own(torch.ones(2)))
    assert den.predicts == "flow" and torch.equal(den.net.out.weight.cpu(), made.net.out.weight.cpu())
    assert dc.sample(den, (2,), n=3).x.isfinite().all()
    with pytest.raises(ValueError, match="does not fit Linear"):
        dc.load("own/r", net=nn.Linear(1, 1), path=Own(1))
    train(run="known")
    with pytest.raises(ValueError, match=r"path=Linear\(\), not VPCosine"):
        dc.load("known", net=Net(), path=dc.VP.cosine())


def test_what_exists_is_told(capsys):
    train(steps=4)
    capsys.readouterr()
    train(steps=8)
    said = capsys.readouterr().out
    assert "4 iterations exist" in said and "steps (4, now 8)" in said and "start='r'" in said


def test_a_training_of_constant_rate_is_the_beginning_of_a_longer_one(capsys):
    short = train(steps=4, decay=0.0)
    long = train(steps=8, decay=0.0)
    assert long.status == "resumed" and "first 4 iterations" in capsys.readouterr().out
    undisturbed = train(steps=8, decay=0.0, run="other")
    assert undisturbed.status == "trained"
    for a, b in zip(long.net.state_dict().values(), undisturbed.net.state_dict().values()):
        assert torch.equal(a, b)
    assert [e["loss"] for e in long.log] == [e["loss"] for e in undisturbed.log]
    assert train(steps=4, decay=0.0).folder == short.folder


def test_how_often_it_is_logged_does_not_hinder_a_longer_one():
    train(steps=4, decay=0.0, log_every=1)
    assert train(steps=8, decay=0.0, log_every=2).status == "resumed"


def test_start_takes_weights():
    first = train(steps=4)
    tuned = train(steps=4, start="r", run="tuned", lr=1e-5)
    assert tuned.status == "trained" and train(steps=4, start=first.net, run="tuned", lr=1e-5).status == "reused"
    file = first.folder / "model.safetensors"
    assert train(steps=4, start=str(file), run="tuned", lr=1e-5).status == "reused"
    with pytest.raises(ValueError, match="does not fit"):
        train(start=nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match="nobody"):
        train(start="nobody")


def test_two_processes_one_run(home):
    source = CELLS.replace('"cell", 3, batch=8', '"cell", 300, batch=8') + "\nprint(made.status)"
    env = {**os.environ, "DIFFCOURSE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    start = lambda: subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)
    both = [start(), start()]
    for p in both:
        p.stdin.write(source)
        p.stdin.close()
    outs = [(p.stdout.read(), p.stderr.read()) for p in both]
    assert [p.wait() for p in both] == [0, 0], outs
    assert sorted(o.split()[-1] for o, _ in outs) == ["reused", "trained"]
    log = next(home.rglob("log.jsonl")).read_text().splitlines()
    assert [json.loads(s)["step"] for s in log] == list(range(50, 301, 50))


def test_a_folder_that_is_held_says_by_whom(tmp_path):
    said = []
    with checkpoints.held(tmp_path):
        with pytest.raises(RuntimeError, match="callback cannot train"):
            with checkpoints.held(tmp_path):
                pass

        def wait():
            with checkpoints.held(tmp_path, said.append):
                said.append("mine")

        thread = threading.Thread(target=wait)
        thread.start()
        for _ in range(100):
            time.sleep(0.02)
            if said:
                break
        assert f"process {os.getpid()}" in said[0] and "since" in said[0]
    thread.join()
    assert said[-1] == "mine"


# ------------------------------------------------------------------ C. no wrong number

ZERO = lambda x, t: 0 * x


@pytest.mark.parametrize("predicts", ["v", "x0", "flow", "eps", "score"])
@pytest.mark.parametrize("solver", [dc.Euler(), dc.Heun(), dc.Midpoint(), dc.RK4(), dc.AB2(), dc.DDIM(), dc.DPMpp(2), dc.DPMSolver(2), dc.DDPM()], ids=repr)
@pytest.mark.parametrize("path", [dc.VP.sigmoid(), dc.VP.cosine(), dc.VP.linear(), dc.Linear(), dc.VP.cosine(0.008)], ids=repr)
def test_at_the_ends_of_a_path_a_number_or_a_sentence(path, solver, predicts):
    try:
        out = dc.sample(dc.Denoiser(ZERO, path, predicts), (1, 8, 8), solver=solver, grid=dc.uniform(4), seeds=[0])
        assert out.x.isfinite().all()
    except ValueError as e:
        assert "start=0.999" in str(e)


@pytest.mark.parametrize("predicts", ["v", "x0", "flow", "eps", "score"])
@pytest.mark.parametrize("name", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_conversions_at_the_ends(predicts, name, t):
    for path in (dc.VP.sigmoid(), dc.VP.cosine(), dc.VP.linear(), dc.Linear()):
        try:
            assert getattr(dc.Denoiser(ZERO, path, predicts)(torch.randn(2, 3), t), name).isfinite().all()
        except ValueError as e:
            assert "keep away" in str(e)


@pytest.mark.parametrize("path", [dc.VP.sigmoid(), dc.VP.linear(), dc.VP.cosine(0.008)], ids=repr)
def test_a_loss_at_the_ends(path):
    class Draw:
        t = staticmethod(lambda: torch.tensor([0.0, 0.5, 1 - 2**-24]))  # so t is 1, 0.5 and almost 0
        noise = staticmethod(lambda: torch.randn(3, 2))

    for loss in (dc.FlowMatching(path), *(dc.DenoisingLoss(path, p) for p in ("eps", "x0", "v", "flow", "score"))):
        assert loss(ZERO, torch.randn(3, 2), Draw).isfinite().all()


@pytest.mark.parametrize("setting", ["ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_MIXED_PRECISION=fp16", "ACCELERATE_DYNAMO_BACKEND=EAGER"])
def test_precision_from_the_environment_is_refused(setting, home):
    name, value = setting.split("=")
    env = {**os.environ, name: value, "DIFFCOURSE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-"], input=CELLS, env=env, capture_output=True, text=True)
    assert out.returncode == 1 and name in out.stderr and "fit needs 'no'" in out.stderr, out.stderr
    assert not list(home.rglob("*.safetensors"))


def test_precision_from_around_changes_nothing():
    want = train(run="plain").net.out.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(train(run="cast").net.out.weight, want)
    half = train(run="half", steps=6, precision="bf16").net.out.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(train(run="half-cast", steps=6, precision="bf16").net.out.weight, half)
    with torch.no_grad():
        assert torch.equal(train(run="no-grad").net.out.weight, want)
    with torch.inference_mode():
        with torch.inference_mode(False):
            net = Net()
        assert torch.equal(train(run="inference", net=net).net.out.weight, want)


def test_modes_of_parts_are_as_they_were():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    for modes in ([True, True, False, True, False], [False, True, True, False, True]):
        for m, mode in zip(net.modules(), modes):
            m.training = mode
        den = dc.Denoiser(lambda x, t: net(x), dc.Linear(), "flow")
        den.net = type("Net", (nn.Module,), {"forward": lambda self, x, t: self.inner(x)})()
        den.net.inner = net
        dc.sample(den, (2,), n=2)
        assert [m.training for m in net.modules()] == modes


# ------------------------------------------------------------------ D. names, types, files

def test_public_names_are_those_of_their_modules():
    import importlib

    for module, names in dc._names.items():
        own = importlib.import_module(f"diffcourse.{module}")
        for name in names.split():
            assert getattr(dc, name) is getattr(own, name), name
    assert issubclass(dc.Linear, dc.Path)


@pytest.mark.parametrize("net", [
    {"class": "cifar10", "config": {}}, {"class": "load", "config": {}}, {"class": "os", "config": {}}, {"class": "UNet", "config": {"colour": 3}},
    {"class": "UNet"}, {"class": "UNet", "config": [1]}, {"class": ["UNet"], "config": {}}, {}, [], "UNet", {"class": "UNet", "config": {"base": "a"}},
])
def test_a_file_can_name_networks_only(tmp_path, net):
    file = tmp_path / "w.safetensors"
    runs.save_tensors(file, {"w": torch.ones(1)}, {"net": net, "path": None, "predicts": None, "steps": 1})
    with pytest.raises(ValueError, match="w.safetensors"):
        dc.load(str(file))


@pytest.mark.parametrize("meta", [{"path": {"path": "Nowhere"}}, {"path": {"path": "VPCosine", "q": 1}}, {"path": 5}, {"predicts": "noise"}, {"predicts": 3}])
def test_a_file_of_a_newer_version(tmp_path, meta):
    net, file = dc.UNet(base=8, heads=2), tmp_path / "w.safetensors"
    about = {"net": {"class": "UNet", "config": net.config()}, "path": {"path": "Linear"}, "predicts": "flow", "steps": 1}
    runs.save_tensors(file, net.state_dict(), about)
    assert dc.load(file).predicts == "flow"
    runs.save_tensors(file, net.state_dict(), about | meta)
    with pytest.raises(ValueError):
        dc.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"identity": 5}', "{}", '"x"'])
def test_a_damaged_pointer_names_itself(text):
    made = train(run="p/q")
    (made.folder.parent / "latest.json").write_text(text)
    with pytest.raises(ValueError, match="latest.json is damaged"):
        dc.load("p/q", net=Net())
    assert train(run="p/q").status == "reused" and dc.load("p/q", net=Net()) is not None


def test_a_frozen_network_names_trainable():
    den = dc.load("digits/flow")
    with pytest.raises(ValueError, match="trainable"):
        fit(dc.FlowMatching(), den.net, dc.digits(), "frozen", 1)
    assert all(p.requires_grad for p in dc.trainable(den.net).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_sample_with_whole_times(dtype):
    den = dc.load("digits/flow")
    seen = []
    want = dc.sample(den, (1, 8, 8), grid=dc.uniform(5), seeds=range(2)).x
    den.net.to(dtype)
    den.net.time.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    got = dc.sample(den, (1, 8, 8), grid=dc.uniform(5), seeds=range(2)).x
    assert got.dtype == torch.float32 and (got - want).abs().mean() < 0.05 and set(seen) == {torch.float32}
    own = dc.Denoiser(Net().to(dtype), dc.Linear(), "flow")
    assert dc.sample(own, (2,), n=3).x.isfinite().all()
    with pytest.raises(ValueError, match=r"net.float\(\)"):
        train(net=Net().to(dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_and_goes_on_bit_for_bit(precision):
    import signal

    def stop(step, net):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    more = dict(precision=precision, steps=20)
    whole = train(run="whole", **more)
    with pytest.raises(KeyboardInterrupt):
        train(run="cut", every=1, callback=stop, **more)
    cut = train(run="cut", **more)
    exact = train(run="exact", steps=20)
    assert np.allclose([e["loss"] for e in whole.log], [e["loss"] for e in exact.log], rtol=0.02)
    assert cut.status == "resumed" and [e["loss"] for e in whole.log] == [e["loss"] for e in cut.log]
    assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), cut.net.state_dict().values()))


@pytest.mark.parametrize("more", [dict(fused=True), dict(channels_last=True), dict(tf32=True), dict(exact=False), dict(ema_kind="constant"),
                                  dict(ema_kind="power", ema=0.1), dict(compile=True)], ids=str)
def test_switches_change_rounding_at_most(more, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)  # its compiler takes a minute
    plain, other = train(steps=6), train(run="other", steps=6, **more)
    assert other.status == "trained" and train(run="other", steps=6, **more).status == "reused"
    losses = [[e["loss"] for e in made.log] for made in (plain, other)]
    assert np.allclose(*losses, rtol=1e-3)


def test_a_compilation_that_fails_is_said_and_gone_without(monkeypatch):
    def broken(f):
        def call(*a):
            raise RuntimeError("no compiler here")
        return call

    plain = train(steps=4)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it: RuntimeError: no compiler here"):
        other = train(run="other", steps=4, compile=True)
    assert torch.equal(plain.net.out.weight, other.net.out.weight)


def test_numbered_and_raw_weights_can_be_loaded():
    net = Net()
    made = train(net=net, steps=6, keep_every=3)
    raw = dc.load("r", net=Net(), weights="raw")
    assert torch.equal(raw.net.out.weight.cpu(), net.out.weight.detach().cpu())
    assert torch.equal(dc.load("r", net=Net(), step=6).net.out.weight, dc.load("r", net=Net()).net.out.weight)
    three = train(steps=6, run="again", keep_every=3, every=3, callback=lambda step, net: net.out.weight.detach().clone())
    assert torch.equal(dc.load("r", net=Net(), step=3).net.out.weight.cpu(), three.snapshots[3])
    assert not torch.equal(dc.load("r", net=Net(), step=3, weights="raw").net.out.weight.cpu(), three.snapshots[3])
    with pytest.raises(FileNotFoundError, match=r"there are \[3, 6\]; fit\(keep_every=\)"):
        dc.load("r", net=Net(), step=4)


def test_an_average_of_another_width_from_kept_ones():
    from diffcourse.averages import posthoc

    more = dict(steps=64, ema_kind="power", batch=8, lr=1e-2)
    wanted = train(run="wanted", ema=0.08, **more).net.out.weight
    kept = train(run="kept", ema=0.05, keep_every=8, **more)
    found = posthoc(kept.folder, 0.08)["out.weight"]
    moved = (kept.net.out.weight - wanted).abs().max()
    assert (found - wanted).abs().max() < 0.2 * moved
    with pytest.raises(ValueError, match="keep_every"):
        posthoc(train().folder, 0.1)


def test_images_of_a_callback_are_drawn():
    x = torch.rand(4, 3, 5, 5) * 2 - 1
    made = train(every=1, callback=lambda step, net: x)
    from PIL import Image

    grid = Image.open(made.folder / "grid-0000002.png")
    assert grid.size == (13, 13) and grid.mode == "RGB"


def test_data_and_weights_of_other_types():
    whole = train()
    assert torch.equal(train(data=X.bfloat16().float(), run="b").net.out.weight, train(data=X.bfloat16(), run="c").net.out.weight)
    assert torch.equal(train(data=X.double(), run="d").net.out.weight, whole.net.out.weight)
    assert train(net=Net().double(), run="e").net.out.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_whole_numbers_of_numpy(kind):
    assert dc.uniform(kind(5)) == dc.uniform(5) and dc.trailing(kind(5), kind(100)) == dc.trailing(5, 100)
    den = dc.Denoiser(ZERO, dc.Linear(), "flow")
    want = dc.sample(den, (2,), n=3, seeds=3).x
    assert torch.equal(dc.sample(den, (2,), n=kind(3), seeds=kind(3), batch=kind(3)).x, want)
    assert torch.equal(dc.sample(den, (2,), seeds=np.arange(4, dtype=kind)).x, dc.sample(den, (2,), seeds=range(4)).x)
    assert train(steps=kind(3), batch=kind(16), lr=np.float32(2e-3), betas=(np.float64(0.9), 0.99)).status == "trained"
    assert dc.UNet(base=kind(8), heads=kind(2)).config() == dc.UNet(base=8, heads=2).config()


DEN = dc.Denoiser(ZERO, dc.Linear(), "flow")


@pytest.mark.parametrize("call, words", [
    (lambda: dc.sample(DEN, (2,), solver=dc.Euler, n=2), r"Euler is a class.*Euler\(\)"),
    (lambda: dc.sample(DEN, (2,), grid=20, n=2), r"grid=20: uniform\(20\)"),
    (lambda: dc.sample(DEN, (2,), n=0), "n = 0: a whole number >= 1"),
    (lambda: dc.sample(DEN, (2,), n=-3), "n = -3"),
    (lambda: dc.sample(DEN, (2,), n=2.5), "n = 2.5"),
    (lambda: dc.sample(DEN, (2,), seeds=range(4), batch=-1), "batch = -1: a whole number"),
    (lambda: dc.sample(DEN, (2,), seeds=range(4), batch=0), "batch = 0"),
    (lambda: dc.sample(DEN, (2,), seeds=[]), "0 seeds"),
    (lambda: dc.sample(DEN, (2,), seeds=[0.5]), "seeds = .0.5.: a whole number"),
    (lambda: dc.sample(DEN, (2,), seeds="many"), "seeds = 'many'"),
    (lambda: dc.sample(DEN, (2,), seeds=1.0, n=2), "seeds = 1.0"),
    (lambda: dc.uniform(2.0), "steps = 2.0"),
    (lambda: dc.uniform(True), "steps = True"),
    (lambda: dc.sample(DEN, (2,), grid=dc.uniform, n=2), r"grid=<function uniform.*uniform\(20\)"),
    (lambda: dc.sample(DEN, (2,), grid=None, n=2), r"grid=None: uniform\(20\)"),
    (lambda: dc.sample(DEN, (2,), grid="cosine", n=2), r"grid='cosine': uniform\(20\)"),
    (lambda: dc.sample(DEN, 2, n=2), r"shape=2: that of one sample"),
    (lambda: dc.sample(DEN, (2,), x=np.ones((3, 2))), "x is ndarray: a tensor"),
    (lambda: dc.sample(ZERO, (2,), n=2), "den is .*: a Denoiser is needed"),
    (lambda: dc.invert(DEN, torch.ones(3, 2), grid=20), r"grid=20: uniform\(20\)"),
    (lambda: dc.log_likelihood(DEN, torch.ones(3, 2), grid=20), r"grid=20: uniform\(20\)"),
    (lambda: dc.make_pairs(DEN, 3, grid=20, shape=(2,)), r"grid=20: uniform\(20\)"),
    (lambda: dc.score(torch.zeros(70, 1, 8, 8, dtype=torch.uint8)), r"uint8: floating point in \[-1, 1\]"),
    (lambda: dc.score(np.zeros((70, 1, 8, 8))), "a tensor"),
    (lambda: fit(dc.FlowMatching, Net(), X, "r", 3), r"loss is <class.*FlowMatching\(\)"),
    (lambda: train(net=DEN), "net is .*: a network is needed"),
    (lambda: train(callback=5, every=1), "callback is 5"),
    (lambda: train(run=""), "run = ''"),
    (lambda: train(run="../x"), "run = '../x'"),
    (lambda: train(run="/x"), "run = '/x'"),
    (lambda: train(callback=lambda s, n: None), "without every="),
    (lambda: train(every=-1), "every = -1"),
    (lambda: train(keep_every=0.5), "keep_every = 0.5"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("kept", [np.ones(2), 1.5, 3, [1.0, 2.0], np.float32(2), torch.ones(2, requires_grad=True)])
def test_what_a_callback_may_return(kept):
    made = train(every=1, callback=lambda step, net: kept)
    assert torch.equal(made.snapshots[2], torch.as_tensor(kept).detach())


def test_a_callback_that_fails_costs_nothing():
    def bad(step, net):
        return object() if step == 2 else None

    with pytest.raises(TypeError, match="returned object at iteration 2.*saved in"):
        train(steps=4, every=1, callback=bad)
    after = train(steps=4)
    assert after.status == "resumed"
    assert torch.equal(after.net.out.weight, train(steps=4, run="whole").net.out.weight)


def test_a_user_without_a_home():
    code = "import diffcourse as dc; print(dc.load('digits/classifier', source='shipped').config()['width'], dc.home())"
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "DIFFCOURSE_HOME", "XDG_CACHE_HOME")}
    env["PYTHONPATH"] = str(ROOT)
    start = "import os, pathlib; pathlib.Path.home = lambda: (_ for _ in ()).throw(RuntimeError('Could not determine home directory.'))\n"
    start += "import diffcourse.runs as r; r._is_checkout = lambda folder: False\n"
    out = subprocess.run([sys.executable, "-c", start + code], env=env, capture_output=True, text=True, cwd="/")
    assert out.returncode == 0, out.stderr
    assert str(os.getuid()) in out.stdout


def test_a_stopped_training_of_an_unseeded_network(capsys):
    import signal

    def stop(step, net):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="if its network starts from the same weights.*manual_seed"):
        train(net=Net(seed=1), steps=5, every=1, callback=stop)
    capsys.readouterr()
    train(net=Net(seed=2), steps=5)
    assert "2 iterations exist" in (said := capsys.readouterr().out) and "weights at the start" in said


def test_a_network_of_another_size_has_its_default_attention():
    for size in (4, 8, 16, 32, 64):
        assert dc.UNet(size=size).config()["attention"] == [size // 2]
    assert dc.UNet(attention=()).config()["attention"] == []


@pytest.mark.parametrize("x", [dc.digits("held_out").x, dc.digits("train").x[:200], dc.digits("all").x[:100].double(), dc.digits("all").x[:100].bfloat16()],
                         ids=["held out", "training", "float64", "bfloat16"])
def test_real_images_can_be_scored(x):
    found = dc.score(x)
    assert found.fd >= 0 and found.memorisation >= 0 and str(found)
    if len(x) == 200:
        assert found.memorisation == 0  # copies


@pytest.mark.parametrize("installed", [True, False])
def test_two_branches_that_change_different_cells_merge(tmp_path, installed):
    "The driver that `make hooks` installs, in a folder with a space; without nbdev_merge git merges lines and leaves markers."
    import shutil

    here = tmp_path / "a clone"
    (here / ".venv/bin").mkdir(parents=True)
    if installed:
        (here / ".venv/bin/nbdev_merge").symlink_to(Path(sys.executable).with_name("nbdev_merge"))
    git = lambda *a, **k: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=here, capture_output=True, text=True, **k)
    shutil.copy(ROOT / ".gitattributes", here)
    shutil.copy(ROOT / "Makefile", here)
    file = here / "a.ipynb"
    cells = [{"cell_type": "code", "id": f"cell{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": [f"x{i} = 0"]} for i in range(3)]
    write = lambda: file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1))
    write()
    git("init", "-q", "-b", "main"), git("add", "a.ipynb", ".gitattributes"), git("commit", "-qm", "one")
    lines = (ROOT / "Makefile").read_text().split("hooks: env")[1].split("\n\n")[0].replace("$$", "$")
    commands = [line.strip().lstrip("@") for line in lines.splitlines() if "git config merge" in line]
    assert len(commands) == 2 and all(subprocess.run(c, shell=True, cwd=here).returncode == 0 for c in commands)

    def branch(name, i, text):
        git("checkout", "-qb", name, "main")
        before, cells[i]["source"] = cells[i]["source"], [text]
        write()
        git("commit", "-qam", name)
        cells[i]["source"] = before
        git("checkout", "-q", "main")

    branch("left", 0, "x0 = 1"), branch("right", 2, "x2 = 1"), branch("other", 0, "x0 = 2")
    assert git("merge", "left", "-m", "l").returncode == 0 and git("merge", "right", "-m", "r").returncode == 0
    text = file.read_text()
    assert "x0 = 1" in text and "x2 = 1" in text
    done = git("merge", "other", "-m", "o")
    assert done.returncode == 1 and "<<<<<<<" in (text := file.read_text()) and "x0 = 2" in text
    if installed:
        assert json.loads(text)  # its conflict is a notebook still
    else:
        with pytest.raises(ValueError):
            json.loads(text)


def test_a_preview_where_there_is_no_callback(capsys):
    from PIL import Image

    torch.manual_seed(0)
    net = dc.UNet(size=4, base=8, mults=(1,), heads=2)
    x = torch.rand(20, 1, 4, 4) * 2 - 1
    made = train(net=net, data=dc.Images(x), every=2, steps=4)
    assert Image.open(made.folder / "grid-0000004.png").size == (31, 31) and made.snapshots == {}
    two = dc.UNet(size=4, base=8, mults=(1,), heads=2, second_time=True)
    train(lambda net, x0, draw: net(x0, draw.t(), draw.t()).square().flatten(1).mean(1), net=two, data=dc.Images(x), every=2, run="no")
    made = train(dc.MeanFlowLoss(), net=two, data=dc.Images(x), every=2, steps=2, run="mf")
    assert (made.folder / "grid-0000002.png").exists()
    assert "no preview" not in capsys.readouterr().out

    class Loss(dc.MeanFlowLoss):
        sampler = dc.Euler(), dc.uniform(2)

    train(Loss(), net=two, data=dc.Images(x), every=2, steps=2, run="euler")
    assert "no preview of this network" in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [
    *[("run.json", text) for text in ("", "{", "[]", "null", "{}", '{"settings": {}}')],
    *[("log.jsonl", text) for text in ("null\n", "{}\n", "5\n", "[]\n")],
])
def test_damaged_notes_of_a_run(name, text):
    made = train(steps=4, decay=0.0)
    (made.folder / "model.safetensors").unlink()
    (made.folder / name).write_text(text)
    assert train(steps=5, decay=0.0).status in ("trained", "resumed")  # beside it
    again = train(steps=4, decay=0.0)
    assert again.status == "resumed" and again.folder == made.folder


def test_plain_weights_of_ones_own(tmp_path):
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp_path / "w.safetensors")
    den = dc.load(tmp_path / "w.safetensors", net=Net(3), path=dc.Linear(), predicts="flow")
    assert den.predicts == "flow" and torch.equal(den.net.cpu().a.weight, Net().a.weight)


def test_a_fresh_start_waits_for_who_trains():
    first = train(steps=3)
    asked = []

    def callback(step, net):
        with pytest.raises(RuntimeError, match="cannot train"):
            train(steps=3, fresh=True)
        asked.append((first.folder / "run.json").exists())

    again = train(steps=3, fresh=True, every=3, callback=callback)
    assert again.status == "trained" and asked == [True] and (again.folder / "model.safetensors").exists()


def test_a_network_that_cannot_be_saved_is_refused_before_it_trains():
    class Told(Net):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="keeps _extra_state.*get_extra_state"):
        train(net=Told())


class Half(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t):
        return super().forward(self.drop(x), t)


def test_a_part_that_is_evaluated_stays_so():
    net = Half()
    net.drop.eval()
    made = train(net=net)
    assert net.training and not net.drop.training
    plain, dropped = train(run="plain"), train(net=Half())
    losses = [[e["loss"] for e in m.log] for m in (made, plain, dropped)]
    assert losses[0] == losses[1] != losses[2] and dropped.folder != made.folder
    assert train(net=Half().eval()).status == "reused"  # all of it in eval mode: it learns all the same


class Noisy(dc.Images):
    def batch(self, indices):
        return super().batch(indices) + 0.5


class Louder(dc.Images):
    def batch(self, indices):
        return super().batch(indices) + 0.7


Louder.__name__ = Louder.__qualname__ = "Noisy"


def test_a_batch_of_ones_own_shapes_the_training():
    torch.manual_seed(0)
    x = torch.rand(20, 1, 4, 4) * 2 - 1
    kind = dict(size=4, base=8, mults=(1,), heads=2)

    def made(data):
        torch.manual_seed(0)
        return train(net=dc.UNet(**kind), data=data, run="own")

    assert made(Noisy(x)).status == "trained" and made(Noisy(x)).status == "reused"
    assert made(Louder(x)).status == "trained"


def test_data_with_no_more_than_it_must():
    class Mine:
        hash = "mine"

        def __len__(self):
            return 50

        def batch(self, indices):
            return X[torch.as_tensor(indices)]

    assert train(data=Mine()).status == "trained" and train(data=Mine()).status == "reused"


def test_a_callback_sees_what_it_missed(capsys):
    every = dict(steps=6, every=2, keep_every=2)
    first = lambda step, net: print(f"seen {step}")  # noqa: E731
    train(**every, callback=first)
    assert "seen 2" in capsys.readouterr().out
    train(**every, callback=first)
    assert "seen" not in capsys.readouterr().out
    made = train(**every, callback=lambda step, net: torch.tensor([step]))
    assert sorted(made.snapshots) == [2, 4, 6]


def test_modes_of_parts_outlive_a_count():
    net = dc.UNet(size=4, base=8, mults=(1,), heads=2, dropout=0.1)
    part = next(m for m in net.modules() if isinstance(m, nn.Dropout))
    part.eval()
    dc.count_macs(net, (1, 4, 4))
    assert net.training and not part.training


def test_the_new_switch_of_tf32():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert train().status == "trained" and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_load_goes_where_the_machine_is_fast(monkeypatch):
    monkeypatch.setattr(runs, "device", lambda: torch.device("meta"))
    assert dc.load("digits/flow", "shipped").device.type == "meta"
    assert dc.load("digits/flow", "shipped", device="cpu").device.type == "cpu"


def test_a_module_of_ones_own_with_a_name_of_pythons(tmp_path):
    "A file code.py beside the notebook is code that is looked at; Python's own is not."
    text = "class Loss:\n    def __call__(self, net, x0, draw):\n        return 1.0 * (net(x0, draw.t()) - x0).square().mean(1)\n"
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import code; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    run += "import torch, diffcourse as dc\nfrom torch import nn\ntorch.manual_seed(0)\n"
    run += "class Net(nn.Linear):\n    def forward(self, x, t): return super().forward(x)\n"
    run += "print(dc.fit(code.Loss(), Net(2, 2), torch.randn(64, 2), 't/code', 3, batch=8).status)"

    def status(text):
        (tmp_path / "code.py").write_text(text)
        out = subprocess.run([sys.executable, "-B", "-c", run], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert out.returncode == 0, out.stderr[-1500:]
        return out.stdout.split()[-1]

    assert [status(text), status("# said\n" + text), status(text.replace("1.0", "2.0"))] == ["trained", "reused", "trained"]


def test_a_new_callback_after_an_interruption(capsys):
    import signal

    def first(step, net):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return torch.zeros(1)

    with pytest.raises(KeyboardInterrupt):
        train(steps=8, every=2, keep_every=4, callback=first)
    made = train(steps=8, every=2, keep_every=4, callback=lambda step, net: torch.full((1,), float(step)))
    assert made.status == "resumed" and {k: v.item() for k, v in made.snapshots.items()} == {4: 4, 6: 6, 8: 8}
    assert "has not seen iterations 2 to 2" in capsys.readouterr().out
    assert torch.equal(made.net.out.weight, train(steps=8, run="whole").net.out.weight)


@pytest.mark.parametrize("what", ["model-", "snapshot-", "log.jsonl", "run.json"])
def test_a_disk_that_fills(what, monkeypatch):
    "Whatever could not be written is named, and the training goes on later, bit for bit."
    real, tries = os.replace, []

    def fails(file):
        if what in str(file) and ".tmp" not in str(file):
            tries.append(file)
            return len(tries) == {"run.json": 1, "log.jsonl": 5}.get(what, 2)

    def replace(a, b):
        if fails(b):
            raise OSError(28, "No space left on device")
        return real(a, b)

    def opened(file, mode="r", *more, **kw):
        if mode == "a" and fails(file):
            raise OSError(28, "No space left on device")
        return open(file, mode, *more, **kw)

    more = dict(steps=8, every=2, keep_every=2, callback=lambda step, net: torch.ones(1), save_every=0)
    with monkeypatch.context() as full:
        full.setattr(os, "replace", replace)
        full.setattr(checkpoints, "open", opened, raising=False)
        with pytest.raises(OSError, match=f"cannot write .*{what}.*No space left.*Free some space"):
            train(**more)
    after = train(**more)
    assert after.status == ("trained" if what == "run.json" else "resumed")
    whole = train(run="whole", **more)
    assert torch.equal(after.net.out.weight, whole.net.out.weight) and after.snapshots.keys() == whole.snapshots.keys()
    assert [e["loss"] for e in after.log] == [e["loss"] for e in whole.log]


def test_the_state_of_another_network():
    made = train(steps=4)
    for name in ("model.safetensors", "log.jsonl"):
        (made.folder / name).unlink()
    other = train(net=Net(seed=1), run="other", steps=3)
    tensors, meta = runs.load_tensors(other.folder / "state.safetensors")
    tensors = {k: torch.zeros(3, 3) if k.startswith("net.") else v for k, v in tensors.items()}
    runs.save_tensors(made.folder / "state.safetensors", tensors, meta)
    with pytest.raises(ValueError, match="(?s)state.safetensors is no state of this training.*fresh=True"):
        train(steps=4)
    assert train(steps=4, fresh=True).status == "trained"


def test_a_precision_that_the_device_lacks_stops_before_training(monkeypatch, home):
    monkeypatch.setattr("diffcourse.settings.lacks", lambda precision, device: f"{device} has no {precision}")
    with pytest.raises(ValueError, match="cpu has no fp16"):
        train(precision="fp16")
    with pytest.raises(ValueError, match="precision = 'fp8': one of"):
        train(precision="fp8")
    assert not list(home.rglob("run.json"))
