"""The table of speeds: its rows, the differences of the output, what is refused, and what is put back."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcourse import speed as module
from diffcourse.playground import MLP
from diffcourse.speed import OPTIONS, Option, speed
from diffcourse.unet import UNet

CPU = dict(device="cpu", batch=4, steps=2, repeats=1)
SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = UNet(size=4, base=8, attention=(2,), heads=2)
    for p in net.parameters():  # zeros would hide every difference
        nn.init.normal_(p, std=0.2)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def found(net):
    return speed(net, SHAPE, others=[2], **CPU)


def test_every_option_has_its_row(found):
    plain, *rows, other, again = found.rows
    assert [r.option for r in (plain, *rows)] == list(OPTIONS)
    assert (plain.batch, other.option, other.batch, again.option) == (4, "float32", 2, "float32 again")
    for r in found.rows:
        measured = r.option not in ("TF32", "compile", "CUDA graph")
        assert (r.seconds is not None) == measured == (r.training is not None)
        assert r.nfe == 2 and (r.setup or 1) > 0 and (r.seconds or 1) > 0


def test_differences_of_the_output(found):
    assert found["float32"].difference == 0 == found["float32 again"].difference
    assert 1e-5 < found["bf16"].difference < 0.05 * found.largest
    assert found["channels-last"].difference < 1e-5 * max(1, found.largest)


def test_a_cpu_says_what_it_has_not(found):
    assert found["TF32"].note == found["CUDA graph"].note == "needs CUDA"
    assert "compile=True" in found["compile"].note
    assert all(r.memory is None for r in found.rows)
    assert "thread(s)" in found.device


def test_table_shows_all_and_names_the_device(found):
    text, html = repr(found), found._repr_html_()
    for r in found.rows:
        assert r.option in text and r.option in html
    assert found.device in text and torch.__version__ in text
    lines = text.splitlines()
    gain = found["float32"].seconds / found["bf16"].seconds
    bf16 = next(line for line in lines if line.startswith("bf16"))
    assert f"{gain:.2f}" in bf16 and f"{4 / found['bf16'].seconds:.0f}" in bf16


def test_network_randomness_and_flags_stay(net):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = [f.allow_tf32 for f in flags]
    before, mode = copy.deepcopy(net.state_dict()), net.training
    try:
        for on in (True, False):
            for f in flags:
                f.allow_tf32 = on
            torch.manual_seed(3)
            speed(net, SHAPE, options=["bf16"], **CPU)
            assert [f.allow_tf32 for f in flags] == [on, on]
            value = torch.rand(1)
            torch.manual_seed(3)
            assert torch.equal(value, torch.rand(1))
    finally:
        for f, value in zip(flags, kept):
            f.allow_tf32 = value
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert net.training == mode and not any(p.requires_grad for p in net.parameters())


def test_flags_set_the_new_way_stay_too():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # torch then refuses to tell the old flag
    try:
        with module.tf32(False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_baseline_runs_without_tf32(net):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(1, 1)

        def forward(self, x, t):
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return x * self.own.weight.sum()

    with module.tf32(True):
        speed(Spy(), SHAPE, options=[], train=False, **CPU)
        assert torch.backends.cuda.matmul.allow_tf32
    assert seen and not any(seen)


def test_an_option_that_fails_is_a_row_with_its_error(net, monkeypatch):
    def broken(net, x, t):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(OPTIONS, "compile", Option(broken))
    found = speed(net, SHAPE, options=["compile"], compile=True, train=False, **CPU)
    assert found["compile"].note == "failed: RuntimeError: no compiler"
    assert found["compile"].seconds is None and found["float32 again"].seconds > 0
    assert "no compiler" in repr(found)


def test_a_wrong_answer_is_seen(net, monkeypatch):
    class Shifted(nn.Module):
        def __init__(self, net, x, t):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x, t) + 0.25

    monkeypatch.setitem(OPTIONS, "bf16", replace(OPTIONS["bf16"], net=Shifted))
    found = speed(net, SHAPE, options=["bf16"], train=False, **CPU)
    assert found["bf16"].difference == pytest.approx(0.25, abs=1e-5)
    assert found["bf16"].training is None


def test_other_networks_than_unets():
    found = speed(MLP(), (1,), **CPU)
    assert "images" in found["channels-last"].note
    assert found["bf16"].seconds > 0


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(options=["fp8"]), "choose of"),
        (dict(batch=0), "batch = 0"),
        (dict(steps=2.0), "steps = 2.0"),
        (dict(repeats=True), "repeats = True"),
        (dict(others=[4, 0]), r"others\[1\] = 0"),
    ],
)
def test_bad_input(net, given, said):
    with pytest.raises(ValueError, match=said):
        speed(net, SHAPE, **CPU | given)


def test_a_network_that_does_not_run_is_an_error_not_a_row(net):
    with pytest.raises(ValueError, match="this network"):
        speed(net, (3, 4, 4), **CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_on_cuda(net):
    found = speed(net, SHAPE, device="cuda", batch=4, steps=2, repeats=2, compile=False)
    graph = found["CUDA graph"]
    assert graph.seconds and graph.training and graph.memory > 0, graph.note
    assert graph.difference < 1e-4 and found["TF32"].difference < 0.05 * found.largest
