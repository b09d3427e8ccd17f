"""A denoiser made fast: its numbers against the plain one, what stays as it was, compilers that fail, precisions that are missing."""

import copy
import warnings

import pytest
import torch
from torch import nn

import diffcourse as dc
from diffcourse import fast as module
from diffcourse import settings
from diffcourse.fast import Fast, compiled, make_fast, plain_net
from diffcourse.meanflow import IntervalMLP, MeanFlow
from diffcourse.settings import choose, lacks, precisions
from diffcourse.timing import measure

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


def awake(net):
    torch.manual_seed(0)
    for p in net.parameters():  # zeros would hide every difference
        nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def den():
    return dc.Denoiser(awake(dc.UNet(size=4, base=8, attention=(2,), heads=2)), dc.Linear(), "flow")


def test_the_given_one_stays_as_it_was(den):
    den.net.train()
    before, kind = copy.deepcopy(den.net.state_dict()), type(den.net)
    plain = dc.sample(den, SHAPE, seeds=range(3), grid=dc.uniform(4))
    count = den.nfe
    fast = make_fast(den, "bf16", channels_last=True)
    out = dc.sample(fast, SHAPE, seeds=range(3), grid=dc.uniform(4))
    assert den.nfe == count and fast.nfe == out.nfe == 4
    assert type(den.net) is kind and den.net.training and fast.net.training and plain_net(den) is den.net
    after = den.net.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].stride() == after[k].stride() for k in before)
    assert torch.equal(dc.sample(den, SHAPE, seeds=range(3), grid=dc.uniform(4)).x, plain.x)
    weights = [p for p in fast.net.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1 and p.shape[2] > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("precision, dtype", [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_inside_alone_is_rounded(den, precision, dtype):
    fast, x = make_fast(den, precision), torch.randn(5, *SHAPE)
    out = fast.flow(x, 0.3)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        want = den.net(x, torch.full((5,), 0.3)).float()
    assert out.dtype == torch.float32 and torch.equal(out, want)
    assert (precision == "fp32") == torch.equal(out, den.flow(x, 0.3))
    assert torch.allclose(out, den.flow(x, 0.3), atol=0.1 * float(want.abs().max()))
    states = dc.sample(fast, SHAPE, dc.DPMpp(2), dc.uniform(4, 0.99), seeds=range(2), trajectory=True).trajectory
    assert states.dtype == torch.float32 and not torch.equal(states, states.bfloat16().float())


def test_fp32_holds_inside_of_another_precision(den):
    x = torch.randn(2, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make_fast(den, "fp32").flow(x, 0.5), den.flow(x, 0.5)) is False
        inside = make_fast(den, "fp32").flow(x, 0.5)
    assert torch.equal(inside, den.flow(x, 0.5))


def test_any_network(den):
    points = dc.Denoiser(awake(dc.MLP()), dc.Linear(), "flow")
    jump = dc.Denoiser(awake(IntervalMLP()), dc.Linear(), "flow")
    two = dc.Denoiser(awake(dc.UNet(size=4, base=8, heads=2, second_time=True)), dc.Linear(), "flow")
    free = dc.Denoiser(lambda x, t: x / 2, dc.VP.cosine(), "v")
    for d, shape, solver in ((points, (1,), dc.Euler()), (jump, (1,), MeanFlow()), (two, SHAPE, MeanFlow()), (free, (2,), dc.DPMpp(2))):
        for how in (dict(precision="fp32"), dict(precision="fp32", channels_last=True), dict(precision="bf16")):
            own = dict(solver=solver, grid=dc.uniform(3), seeds=range(4))
            a, b = dc.sample(d, shape, **own), dc.sample(make_fast(d, **how), shape, **own)
            assert b.nfe == a.nfe == 3 and torch.allclose(a.x, b.x, atol=1e-5 if how["precision"] == "fp32" else 0.5)
    assert make_fast(two).net.config() == two.net.config() and not hasattr(make_fast(free).net, "config")


def test_made_fast_twice_the_last_counts(den):
    twice = make_fast(make_fast(den, "bf16"), "fp32")
    x = torch.randn(2, *SHAPE)
    assert torch.equal(twice.flow(x, 0.5), den.flow(x, 0.5)) and not isinstance(plain_net(twice), Fast)


def test_gradients_pass(den):
    net = Fast(copy.deepcopy(den.net).requires_grad_(True), "bf16")
    net(torch.randn(2, *SHAPE), torch.rand(2)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_a_compiler_that_fails_is_said_once_and_gone_without(den, monkeypatch):
    def broken(call):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    fast = make_fast(den, "fp32", compile=True)
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it: RuntimeError: no compiler here$") as said:
        out = dc.sample(fast, SHAPE, seeds=range(2), grid=dc.uniform(3))
    assert len(said) == 1 and fast.nfe == out.nfe == 3
    assert torch.equal(out.x, dc.sample(den, SHAPE, seeds=range(2), grid=dc.uniform(3)).x)


def test_a_fault_after_compiling_is_not_hidden(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)

    def picky(x):
        if x < 0:
            raise ValueError("negative")
        return x

    call = compiled(picky)
    assert call(1) == 1
    with warnings.catch_warnings(), pytest.raises(ValueError, match="negative"):
        warnings.simplefilter("error")
        call(-1)


def test_a_copy_compiles_its_own_network(den, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f: seen.append(f) or f)
    fast, x = make_fast(den, "fp32", compile=True), torch.randn(1, *SHAPE)
    fast.flow(x, 0.5), fast.flow(x, 0.4)
    other = copy.deepcopy(fast.net)
    other(x, torch.ones(1))
    assert seen == [fast.net.net, other.net] and other.net is not fast.net.net


def test_precisions_of_this_device_and_of_others(monkeypatch):
    assert precisions(CPU)[0] == "fp32" and lacks("fp32", CPU) == lacks("auto", CPU) == ""
    assert choose("auto", CPU) == ("bf16" if settings.fast_bf16(CPU) else "fp32")
    settings._computes.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Old card")
    assert not settings._computes(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(settings, "_computes", lambda dtype, device: dtype == torch.float16)
    with pytest.raises(ValueError, match=r"precision='bf16': Old card does not compute in it; it has \('fp32', 'fp16'\)"):
        choose("bf16", torch.device("cuda"))
    assert choose("auto", torch.device("cuda")) == "fp32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_precision_is_tried(dtype, monkeypatch):
    settings._computes.cache_clear()
    assert settings._computes(dtype, CPU)
    settings._computes.cache_clear()

    def missing(*a, **k):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", missing)
    assert not settings._computes(dtype, CPU)
    settings._computes.cache_clear()


def test_bad_input(den, monkeypatch):
    with pytest.raises(ValueError, match="precision='fp8': one of"):
        make_fast(den, "fp8")
    with pytest.raises(TypeError, match="UNet: a Denoiser"):
        make_fast(den.net)
    monkeypatch.setattr(settings, "_computes", lambda *a: False)
    with pytest.raises(ValueError, match=r"cpu does not compute in it; it has \('fp32',\)"):
        make_fast(den, "fp16")


def test_measure_and_pairs_take_it(den):
    plain, fast = (measure(d, SHAPE, grid=dc.uniform(2), batch=2, repeats=1) for d in (den, make_fast(den, "bf16")))
    assert (plain.dtype, fast.dtype) == ("float32", "bf16")
    assert (plain.macs, plain.parameters, plain.nfe) == (fast.macs, fast.parameters, fast.nfe)
    pairs = [dc.make_pairs(d, 3, grid=dc.uniform(2), precision=p) for d, p in ((den, "bf16"), (make_fast(den), "bf16"), (den, "fp32"))]
    assert torch.equal(pairs[0], pairs[1]) and not torch.equal(pairs[0], pairs[2])
    assert torch.equal(pairs[0][:, 0], pairs[2][:, 0])


def test_public_name():
    assert dc.make_fast is module.make_fast
