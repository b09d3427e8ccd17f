"""The training loop: exact resumption, faults, and its pieces against their definitions."""
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffcourse import progress as progress_module
from diffcourse import runs, training
from diffcourse import draws
from diffcourse.averages import EMA
from diffcourse.draws import Draws, batch_indices
from diffcourse.settings import Settings, learning_rate
from diffcourse.training import fit

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))

    def config(self):
        return {"width": self.width}


def new_net(seed=0, width=8):
    torch.manual_seed(seed)
    return Net(width)


def loss(net, x0, draw):
    t, eps = draw.t(), draw.noise()
    x = torch.lerp(x0, eps, t[:, None])
    return (net(x, t) - eps + x0).square().mean(1)


def train(run="a", steps=30, net=None, **more):
    settings = dict(batch=16, warmup=5, log_every=5, precision="fp32") | more
    return fit(loss, net or new_net(), DATA, run, steps, **settings)


def bits(net):
    return [p.detach().clone() for p in net.state_dict().values()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b)))


def test_killed_at_random_moments_it_reaches_the_same_bits():
    script = Path(__file__).with_name("kill_training.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a GPU survives no fork
    env["PYTHONPATH"] = str(script.parent.parent)
    out = subprocess.run(
        [sys.executable, script, "6"], capture_output=True, text=True, env=env
    )
    assert out.returncode == 0 and "6 of 6" in out.stdout, out.stdout + out.stderr


@pytest.mark.parametrize("stop", [1, 7, 29])
def test_ctrl_c_saves_and_goes_on(stop):
    whole = train("whole")

    def interrupt(step, net):
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=f"iteration {stop}, which is saved"):
        train("cut", every=1, callback=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    cut = train("cut")
    assert cut.status == "resumed" and equal(whole.net, cut.net)
    drop = lambda log: [{k: e[k] for k in ("step", "loss", "lr", "grad_norm")} for e in log]
    assert drop(whole.log) == drop(cut.log)


def test_complete_runs_are_reused_and_fresh_trains_again():
    first = train()
    again = train()
    assert again.status == "reused" and equal(first.net, again.net)
    assert again.log == first.log
    assert train(fresh=True).status == "trained"


def test_identity_tells_trainings_apart():
    names = {train(steps=3).folder.name}
    others = [
        train(steps=2),
        train(steps=3, lr=1e-3),
        train(steps=3, seed=1),
        train(steps=3, net=new_net(seed=1)),
        train(steps=3, net=new_net(width=9)),
        fit(lambda n, x, d: loss(n, x, d) * 2, new_net(), DATA, "a", 3, precision="fp32"),
        fit(loss, new_net(), DATA + 1, "a", 3, batch=16, precision="fp32"),
    ]
    names |= {o.folder.name for o in others}
    assert len(names) == 8 and all(o.status == "trained" for o in others)


def test_snapshots_survive():
    watch = dict(every=10, callback=lambda step, net: torch.tensor([float(step)]))
    first = train(**watch)
    assert {k: v.item() for k, v in first.snapshots.items()} == {10: 10, 20: 20, 30: 30}
    assert train(**watch).snapshots.keys() == first.snapshots.keys()


def test_nothing_global_is_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        net = new_net()
    train(net=net)
    assert torch.equal(before, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_averaged_weights_by_definition():
    net, seen, d = new_net(), [], 0.9
    ema = EMA(net, d)
    weights = [1.0]
    seen.append(net.layers[0].weight.detach().clone())
    for k in range(40):
        with torch.no_grad():
            net.layers[0].weight.add_(0.1 * (k + 1))
        ema.update(net, k)
        dk = min(d, (1 + k) / (10 + k))
        weights = [w * dk for w in weights] + [1 - dk]
        seen.append(net.layers[0].weight.detach().clone())
    want = sum(w * s.double() for w, s in zip(weights, seen))
    assert torch.allclose(ema.net.layers[0].weight.double(), want, rtol=1e-5)
    assert ema.share == pytest.approx(weights[0]) and not ema.net.training


@pytest.mark.parametrize("ema", [0.99, 0.999, 0.9999])
def test_start_is_forgotten_when_saved(ema):
    made = train(steps=20, ema=ema)
    _, meta = runs.load_tensors(made.folder / "model.safetensors")
    assert meta["share_of_start"] < 1e-3


def test_learning_rate():
    s = Settings(100, lr=1.0, warmup=10, decay=0.2)
    rates = [learning_rate(k, s) for k in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert rates[10:81] == [1.0] * 71 and rates[100] == 0
    assert rates[90] == pytest.approx(0.5)
    assert learning_rate(0, Settings(10, warmup=0, decay=0)) == 2e-3


def test_order_takes_each_once_an_epoch():
    for n, b in ((40, 16), (7, 16), (16, 16)):
        taken = np.concatenate([batch_indices(3, k, b, n) for k in range(20)])
        for e in range(len(taken) // n):
            assert sorted(taken[e * n : (e + 1) * n]) == list(range(n))


def test_draws():
    like = torch.zeros(4096, 2)
    make = lambda *key: Draws(*key, 4096, 0, 4096, like)
    t, eps = make(0, 1).t(), make(0, 1).noise()
    assert t.dtype == eps.dtype == torch.float32 and eps.shape == like.shape
    assert 0 <= t.min() and t.max() < 1 and abs(t.mean() - 0.5) < 0.03
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    assert not torch.equal(make(0, 1).t(), make(1, 0).t())  # not seed + step
    draw = make(0, 1)
    assert torch.equal(draw.t(), t) and not torch.equal(draw.t(), t)  # anew
    part = Draws(0, 1, 4096, 100, 200, like[:100])
    assert torch.equal(part.t(), t[100:200])


def test_micro_batches_change_rounding_only():
    whole, parts = train(), train("b", accumulate=4)
    for a, b in zip(bits(whole.net), bits(parts.net)):
        assert torch.allclose(a, b, atol=1e-4)
    assert math.isclose(whole.log[0]["loss"], parts.log[0]["loss"], rel_tol=1e-5)


def test_an_accelerator_of_yours_is_used():
    from accelerate import Accelerator

    mine = Accelerator()
    a, b = train(accelerator=mine), train("b")
    assert equal(a.net, b.net)


def test_nan_stops_and_the_last_good_state_is_kept(home):
    def bad(net, x0, draw):
        return loss(net, x0, draw) / (draw._key[1] < 12)  # bad from there on

    with pytest.raises(FloatingPointError, match="Lower lr.*0.002") as e:
        fit(bad, new_net(), DATA, "nan", 50, batch=16, save_every=0, log_every=5, precision="fp32")
    file = next(home.rglob("state.safetensors"))
    assert str(file) in str(e.value)
    tensors, meta = runs.load_tensors(file)
    assert all(v.isfinite().all() for v in tensors.values()) and meta["step"] > 0
    assert not list(home.rglob("model.safetensors"))


def test_a_full_disk_keeps_the_old_state(monkeypatch, home):
    real, calls = os.replace, []

    def replace(a, b):
        if str(b).endswith("state.safetensors"):
            calls.append(b)
            if len(calls) == 4:
                raise OSError(28, "No space left on device")
        return real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left.*untouched.*Free some space"):
        train("full", save_every=0)
    monkeypatch.undo()
    os.environ["DIFFCOURSE_HOME"] = str(home)
    assert not list(home.rglob("*.tmp"))
    after = train("full")
    assert after.status == "resumed" and equal(after.net, train("whole").net)


def test_damaged_states_are_named(home):
    made = train()
    file = made.folder / "state.safetensors"
    whole = file.read_bytes()
    (made.folder / "model.safetensors").unlink()
    for bad in (whole[:100], whole[:-8], b"\x80\x04pickle", b"PK\x03\x04zip", b""):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="state.safetensors"):
            train()
        assert file.read_bytes() == bad  # nothing was overwritten
    (made.folder / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 1')
    file.unlink()
    assert train().log[-1]["step"] == 30


@pytest.mark.parametrize(
    "bad", [dict(steps=0), dict(batch=0), dict(lr=0), dict(lr=-1), dict(ema=1.5),
            dict(decay=2), dict(accumulate=3), dict(precision="fp8"), dict(seed=-1),
            dict(lr="2e-4"), dict(lr=math.nan), dict(batch=16.0), dict(steps=math.inf),
            dict(betas=0.9), dict(betas=(0.9, 1.0)), dict(weight_decay=-1)],
)
def test_settings_out_of_range(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=name):
        train(**bad)


def test_misspelt_setting_and_wrong_loss():
    with pytest.raises(TypeError, match="learning_rate"):
        train(learning_rate=1)
    with pytest.raises(ValueError, match="one number a sample"):
        fit(lambda n, x, d: loss(n, x, d).mean(), new_net(), DATA, "a", 3)
    with pytest.raises(ValueError, match="empty"):
        fit(loss, new_net(), DATA[:0], "a", 3)


def test_log_is_json_lines():
    made = train()
    lines = [json.loads(s) for s in (made.folder / "log.jsonl").read_text().splitlines()]
    assert lines == made.log and [e["step"] for e in lines] == [5, 10, 15, 20, 25, 30]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "seconds", "images_per_second", "peak_mb"}
    described = json.loads((made.folder / "run.json").read_text())
    assert described["settings"]["steps"] == 30 and described["net"] == {"own": "Net"}


def interrupt_at(stop):
    return lambda step, net: signal.raise_signal(signal.SIGINT) if step == stop else None


def test_the_same_cell_run_again_goes_on():
    whole, net = train("whole"), new_net()  # the network of another cell
    with pytest.raises(KeyboardInterrupt):
        train("cut", net=net, every=1, callback=interrupt_at(7))
    assert equal(net, new_net())  # as it came
    cut = train("cut", net=net)
    assert cut.status == "resumed" and equal(whole.net, cut.net)


def test_gradients_that_were_there_before_do_not_count():
    net = new_net()
    for p in net.parameters():
        p.grad = torch.full_like(p, 100.0)
    assert equal(train(net=net).net, train("clean").net)


def test_latest_is_what_was_returned_last(home):
    latest = lambda: json.loads((home / "runs" / "a" / "latest.json").read_text())
    first, second = train(steps=3), train(steps=4)
    assert latest() == {"identity": second.folder.name, "steps": 4}
    assert train(steps=3).status == "reused"
    assert latest() == {"identity": first.folder.name, "steps": 3}
    (home / "runs" / "a" / "latest.json").unlink()  # killed just before it
    assert train(steps=4).status == "reused"
    assert latest() == {"identity": second.folder.name, "steps": 4}


def test_a_finished_run_is_only_read(monkeypatch):
    made = train()
    monkeypatch.setattr(runs, "atomic_write", lambda *a: pytest.fail("a write"))
    assert train().log == made.log


def test_a_training_inside_a_callback_disturbs_nothing():
    from accelerate import Accelerator

    def other(step, net):
        train("inner", steps=3, fresh=True)

    more = dict(accumulate=4, accelerator=Accelerator())
    assert equal(train("outer", every=5, callback=other, **more).net, train("b", **more).net)


def test_outside_the_main_thread():
    made = []
    thread = threading.Thread(target=lambda: made.append(train("thread")))
    thread.start()
    thread.join()
    assert equal(made[0].net, train("main").net)


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        made = train(every=1, callback=interrupt_at(7))
        assert made.status == "trained" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_plan_of_a_long_training_is_not_listed():
    begin = time.perf_counter()
    assert [len(i) for i in draws.plan(0, 16, 40, 10**9 - 2, 10**9)] == [16, 16]
    next(draws.plan(0, 16, 40, 0, 10**9))
    assert time.perf_counter() - begin < 5


def test_progress_in_a_notebook(monkeypatch):
    lines, now = [], iter([10.0, 10.1, 12.0])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(progress_module, "say", lambda progress, line: lines.append(line))
    progress = progress_module.Progress("name", 100)
    progress.kernel = True
    for step in (51, 52, 61):  # resumed at 50
        progress(step, torch.tensor(1.5), 2e-3)
    assert lines[0] == "51/100 · loss 1.5000 · lr 2.0e-03"  # no speed yet
    assert lines[1:] == ["61/100 · loss 1.5000 · lr 2.0e-03 · 5.0 it/s · 8 s left"]


def test_a_closed_line_is_wiped_from_a_notebook():
    shown = []
    progress = progress_module.Progress("name", 100)
    progress.handle = SimpleNamespace(update=lambda data, raw: shown.append(data))
    progress.close()
    assert shown == [{"text/plain": ""}]


def test_progress_in_a_file_and_in_a_terminal(capsys, monkeypatch):
    train()
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("a: trained · 30 iterations") and out.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train("cut", every=1, callback=interrupt_at(20))
    assert "cut:  " in (err := capsys.readouterr().err) and err.endswith("\r")  # wiped
    train("cut")
    assert "20/30" not in (err := capsys.readouterr().err) and "21/30" in err
