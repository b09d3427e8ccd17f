"""The network: shapes, errors, exact derivatives, counts that an independent counter confirms."""
import hashlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

from diffcourse.unet import Norm, UNet, count_macs, count_parameters, macs_by_module, resolutions

SMALL = dict(base=16)
CONFIGS = [
    dict(base=16),
    dict(base=16, channels=3, size=16, mults=(1, 2, 2), attention=(8, 4), heads=2, blocks=2),
    dict(base=16, mults=(1,), attention=()),
    dict(base=16, mults=(2, 1), attention=(8, 4), scale_shift=False, max_frequency=100.0),
    dict(base=16, size=12, mults=(1, 2, 3), attention=(3,), second_time=True),
    dict(base=18, mults=(1, 2), attention=(), time_mult=4),
    dict(base=16, channels=3, size=16, mults=(1, 2), attention=(4,), patch=2),
]


def build(seed=0, awake=True, **kw):
    "A network; awake: nothing in it is zero."
    torch.manual_seed(seed)
    net = UNet(**kw)
    if awake:
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(net, n=3, dtype=torch.float32, seed=1):
    g, c = torch.Generator().manual_seed(seed), net.config()
    x = torch.randn(n, c["channels"], c["size"], c["size"], generator=g).to(dtype)
    t = torch.rand(n, generator=g).to(dtype)
    return (x, t, t * 0.5) if c["second_time"] else (x, t)


@pytest.mark.parametrize("kw", CONFIGS)
def test_shapes_zero_start_and_round_trip(kw):
    net = build(awake=False, **kw)
    args = inputs(net)
    out = net(*args)
    assert out.shape == args[0].shape and out.is_contiguous() and not out.any()
    again = build(awake=False, **json.loads(json.dumps(net.config())))
    assert again.config() == net.config()
    for (k, a), (k2, b) in zip(net.state_dict().items(), again.state_dict().items(), strict=True):
        assert k == k2 and torch.equal(a, b)
    assert not list(net.buffers())  # nothing that processes would have to keep equal


def test_config_is_a_copy():
    net = build(**SMALL)
    net.config()["mults"].append(4)
    assert net.config()["mults"] == [1, 2]


@pytest.mark.parametrize("kw", CONFIGS)
def test_jvp_equals_a_central_difference(kw):
    net = build(**kw).double()
    args = inputs(net, 2, torch.float64)
    g = torch.Generator().manual_seed(2)
    tangents = tuple(torch.randn(a.shape, generator=g, dtype=torch.float64) for a in args)
    value, slope = jvp(net, args, tangents)
    assert torch.allclose(value, net(*args), atol=1e-12)
    h = 1e-4  # five-point rule: the error is of fourth order in h
    at = {s: net(*(a + s * h * d for a, d in zip(args, tangents))) for s in (-2, -1, 1, 2)}
    central = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    assert slope.abs().max() > 0.01
    assert (slope - central).abs().max() <= 1e-7 * slope.abs().max()


def test_jvp_can_be_trained_through():
    net = build(**SMALL)
    x, t = inputs(net)
    _, slope = jvp(net, (x, t), (torch.zeros_like(x), torch.ones_like(t)))
    slope.square().sum().backward()
    assert net.first.weight.grad.abs().sum() > 0


def test_jvp_under_cpu_autocast():
    net = build(**SMALL)
    x, t = inputs(net)
    want = jvp(net, (x, t), (x, torch.ones_like(t)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = jvp(net, (x, t), (x, torch.ones_like(t)))
    for a, b in zip(got, want):
        assert (a.float() - b).abs().max() < 0.1 * b.abs().max()


def test_norm_keeps_type_and_precision():
    x = 3 + torch.randn(2, 32, 4, 4)
    norm = Norm(32)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(norm(x.bfloat16()), norm(x.bfloat16().float()).bfloat16())
    for c in (2, 6, 7, 16, 36, 96, 128, 384, 1024):
        assert c % Norm(c).num_groups == 0 and Norm(c).num_groups <= 32


def test_second_time_starts_equal():
    one, two = build(awake=False, **SMALL), build(awake=False, second_time=True, **SMALL)
    for k, v in one.state_dict().items():
        assert torch.equal(v, two.state_dict()[k]), k
    one = build(seed=3, **SMALL)
    two.load_state_dict(one.state_dict(), strict=False)
    x, t = inputs(one)
    assert torch.equal(one(x, t), two(x, t, torch.zeros_like(t)))
    torch.nn.init.normal_(two.interval.linear2.weight)
    assert not torch.allclose(two(x, t, t), two(x, t, torch.zeros_like(t)))


def test_dropout_only_in_training():
    net = build(dropout=0.5, **SMALL)
    args = inputs(net)
    assert not torch.equal(net.train()(*args), net(*args))
    assert torch.equal(net.eval()(*args), net(*args))


def test_a_sample_does_not_see_its_batch():
    net = build(**SMALL).double()
    x, t = inputs(net, 5, torch.float64)
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(5)])
    assert torch.allclose(net(x, t), alone, atol=1e-12)


def test_channels_last_input_gives_the_same():
    net = build(**SMALL)
    x, t = inputs(net)
    last = net(x.to(memory_format=torch.channels_last), t)
    assert last.is_contiguous() and torch.allclose(last, net(x, t), atol=1e-5)


def test_weights_depend_on_the_seed_alone():
    def digest(net):
        h = hashlib.sha256()
        for k, v in net.state_dict().items():
            h.update(k.encode() + v.numpy().tobytes())
        return h.hexdigest()
    code = ("import torch, hashlib; from diffcourse.unet import UNet; torch.manual_seed(7); h = hashlib.sha256();"
            "[h.update(k.encode() + v.numpy().tobytes()) for k, v in UNet(base=16).state_dict().items()];"
            "print(h.hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = digest(build(seed=7, awake=False, **SMALL))
    assert mine == other.stdout.strip() != digest(build(seed=8, awake=False, **SMALL))


@pytest.mark.parametrize("kw", CONFIGS)
def test_gradient_reaches_every_parameter(kw):
    net = build(**kw)
    args = inputs(net)
    (net(*args) - args[0]).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_compiles_without_a_break():
    net = build(**SMALL).eval()
    args = inputs(net)
    with torch.no_grad():
        fast = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.allclose(fast(*args), net(*args))


def test_patches_are_pixels_moved_into_channels():
    "Both ends against torch's own reordering of pixels, around the same network at half the size."
    net, x, t = build(channels=3, size=16, patch=2), torch.randn(2, 3, 16, 16), torch.rand(2)
    half = build(channels=12, size=8)
    state = {k: v for k, v in net.state_dict().items() if k != "first.weight"}
    kernel = net.first.weight.unflatten(2, (3, 2)).unflatten(4, (3, 2))  # out, c, row, i, column, j
    state["first.weight"] = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    half.load_state_dict(state)
    want = F.pixel_shuffle(half(F.pixel_unshuffle(x, 2), t), 2)
    torch.testing.assert_close(net(x, t), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kw", CONFIGS)
def test_counts_agree_with_torch(kw):
    net = build(**kw)
    c = net.config()
    shape = (c["channels"], c["size"], c["size"])
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(*inputs(net, 1))
    assert count_macs(net, shape) == flops.get_total_flops() / 2
    first = macs_by_module(net, shape)["first"]
    assert first == c["channels"] * 9 * c["base"] * c["size"] ** 2
    assert net.training and not net.first._forward_hooks
    assert count_parameters(net) == sum(v.numel() for v in net.state_dict().values())


def test_the_shipped_size():
    n = count_parameters(UNet())
    assert 0.65e6 < n < 0.75e6 and 4 * n < 3e6


def test_reference_configuration_on_meta():
    with torch.device("meta"):
        net = UNet(channels=3, size=64, base=128, mults=(1, 2, 2, 4), blocks=2, attention=(16, 8),
                   heads=4, dropout=0.1, time_mult=4)
        assert all(p.is_meta for p in net.parameters())
        assert count_macs(net, (3, 64, 64)) > 1e10


@pytest.mark.parametrize("kw, words", [
    (dict(size=10, mults=(1, 2, 2)), ("size=10", "multiple of 4", "8 or 12")),
    (dict(size=8, attention=(16,)), ("[16]", "[8, 4]")),
    (dict(heads=5), ("heads=5", "64 channels")),
    (dict(heads=0), ("heads=0",)),
    (dict(base=15), ("base=15", "even")),
    (dict(base=-2), ("base=-2",)),
    (dict(mults=()), ("mults", "one a level")),
    (dict(mults=(1, 0)), ("mults",)),
    (dict(dropout=1.0), ("dropout=1.0",)),
    (dict(max_frequency=0.5), ("max_frequency=0.5",)),
    (dict(patch=0), ("patch=0", "at least 1")),
    (dict(patch=3), ("size=8", "patches of 3", "multiple of 6")),
    (dict(patch=2, attention=(8,)), ("[8]", "[4, 2]")),
])
def test_bad_configurations(kw, words):
    with pytest.raises(ValueError) as e:
        UNet(**kw)
    for w in words:
        assert w in str(e.value), str(e.value)


def test_bad_inputs():
    net, second = build(**SMALL), build(second_time=True, **SMALL)
    x, t = inputs(net)
    for args, words in [
        ((x[:, :, :4, :4], t), "(3, 1, 4, 4)"),
        ((x.repeat(1, 3, 1, 1), t), "(B, 1, 8, 8)"),
        ((x[0], t), "(1, 8, 8)"),
        ((x, t[:2]), "(3,)"),
        ((x, t[0]), "t.expand(len(x))"),
        ((x, (9 * t).long()), "torch.int64"),
        ((x.long(), t), "[-1, 1]"),
        ((x, t, t), "second_time=True"),
    ]:
        with pytest.raises(ValueError) as e:
            net(*args)
        assert words in str(e.value), str(e.value)
    with pytest.raises(ValueError, match=r"net\(x, t, r\)"):
        second(x, t)
    assert resolutions(32, (1, 1, 1)) == [32, 16, 8]
