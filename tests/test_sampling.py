"""The sampling loop against exact maps, and what it promises about seeds, counts and faults."""
import pytest
import torch
from torch import nn

from diffcourse.paths import VP, Linear, linear_betas
from diffcourse.sampling import (
    Denoiser,
    Euler,
    NetworkTime,
    Noise,
    _looked_up,
    cosine,
    explicit,
    logsnr,
    quadratic,
    sample,
    trailing,
    uniform,
)
from diffcourse.unet import UNet

MU, STD = 0.7, 0.4


def gaussian(path, predicts="x0"):
    def net(x, t):
        t = t.double()
        a, s = (f(t)[:, None] for f in (path.alpha, path.sigma))
        x0 = MU + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MU)
        return path.target(predicts, x0, (x - a * x0) / s, t).to(x.dtype)

    return Denoiser(net, path, predicts)


def exact(z, path, t, s=0.0):
    a, b = path.alpha(t), path.alpha(s)
    spread = ((b * STD) ** 2 + path.sigma(s) ** 2) / ((a * STD) ** 2 + path.sigma(t) ** 2)
    return b * MU + spread.sqrt() * (z - a * MU)


@pytest.mark.parametrize("path", [Linear(), VP.cosine()])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("grid", [uniform, quadratic, cosine, logsnr])
def test_euler_is_first_order(path, predicts, grid):
    start = 0.99 if predicts in ("eps", "score") else 1.0
    z = torch.linspace(-2, 2, 9)[:, None].double()
    errors = []
    for steps in (64, 128, 256):
        out = sample(gaussian(path, predicts), (1,), Euler(), grid(steps, start), x=z)
        assert out.nfe == steps
        errors.append((out.x - exact(z, path, start)).abs().max().item())
    for a, b in zip(errors, errors[1:]):
        assert 1.7 < a / b < 2.4, errors


def test_seeds_belong_to_samples():
    den = gaussian(VP.cosine())
    go = lambda seeds, **k: sample(den, (3,), grid=uniform(5), seeds=seeds, trajectory=True, **k)
    whole = go(range(10))
    for other, rows in ((go(range(10), batch=3), slice(None)), (go([7, 2]), [7, 2])):
        assert torch.equal(whole.trajectory[0][rows], other.trajectory[0])
        assert torch.allclose(whole.x[rows], other.x, atol=1e-6)
        assert other.nfe == whole.nfe == 5
    assert torch.equal(whole.trajectory[-1], whole.x)
    assert not torch.equal(go([0]).x, go([1]).x)
    again = sample(den, (3,), seeds=4, n=6).x
    assert torch.equal(again, sample(den, (3,), seeds=4, n=6).x)


def test_noise_is_normal_and_one_stream_a_sample():
    noise = Noise(range(2000), 2000, (8,), torch.device("cpu"))
    a, b = noise(), noise()
    assert a.dtype == torch.float32 and not torch.equal(a, b)
    for z in (a, b):
        assert abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.03
    assert abs((a * b).mean()) < 0.04
    one = Noise([5], 1, (8,), torch.device("cpu"))
    assert torch.equal(one()[0], a[5]) and torch.equal(one()[0], b[5])


def test_start_final_and_trajectory():
    path, den = Linear(), gaussian(Linear())
    grid = uniform(4, start=0.9, end=0.1)
    out = sample(den, (1,), grid=grid, seeds=range(3), trajectory=True)
    noise = Noise(range(3), 3, (1,), torch.device("cpu"))()
    assert torch.allclose(out.trajectory[0], 0.9 * noise)
    assert out.trajectory.shape == (5, 3, 1) and len(out.times) == 5
    more = sample(den, (1,), grid=grid, seeds=range(3), final="denoise", trajectory=True)
    assert more.nfe == 5 and more.trajectory.shape == (6, 3, 1)
    assert torch.allclose(more.x, den.x0(out.x, 0.1)) and torch.equal(more.trajectory[4], out.x)
    assert sample(den, (1,), grid=[0.9, 0.5, 0.1], n=2).nfe == 2
    assert path.alpha(0.0) == 1


def test_dropout_is_off_and_comes_back():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.drop = nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(x) * self.w

    net = Noisy().train()
    den = Denoiser(net, Linear(), "v")
    a, b = (sample(den, (4,), seeds=range(3)).x for _ in range(2))
    assert torch.equal(a, b) and net.training and not a.requires_grad


def test_state_stays_float32_when_the_network_is_not():
    den = Denoiser(lambda x, t: x.bfloat16() * 0.5, Linear(), "flow")
    out = sample(den, (2,), seeds=range(2), trajectory=True)
    assert out.x.dtype == torch.float32 and den(out.x, 0.5).out.dtype == torch.float32


def test_grids():
    path = VP.cosine()
    for g in (uniform, quadratic, cosine, logsnr, trailing):
        for n in (1, 2, 7, 100):
            t = g(n).times(path)
            assert t.dtype == torch.float64 and len(t) == n + 1
            assert t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()
    t = logsnr(10, lam_max=4.0).times(path)
    lam = path.lam(t[1:-1])
    assert torch.allclose(lam.diff(), torch.full((8,), 0.8).double(), atol=1e-9)
    assert torch.allclose(trailing(3, 10).times(path), torch.tensor([1, 0.7, 0.3, 0]).double())
    table = VP.table(linear_betas(10))
    assert table.alpha(trailing(3, 10).times(table)).isfinite().all()


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: uniform(0), "steps = 0"),
        (lambda: uniform(2.5), "steps = 2.5"),
        (lambda: uniform(4, 0.2, 0.5), "0 <= end < start"),
        (lambda: uniform(4, start=1.2), "0 <= end < start"),
        (lambda: explicit([0.5]), "two or more"),
        (lambda: explicit([0.5, 0.5, 0]), "strictly decreasing"),
        (lambda: explicit([0, 0.5, 1]), "strictly decreasing"),
        (lambda: explicit([1.5, 0.5]), "0 <= end < start"),
        (lambda: trailing(11, 10), "1 to 10"),
        (lambda: logsnr(4, lam_max=-1), "positive"),
    ],
)
def test_bad_grids(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_bad_calls():
    den = gaussian(Linear())
    unet = Denoiser(UNet(base=16), Linear(), "flow")
    cases = [
        (TypeError, "Euler", lambda: sample(den, (1,), solver="heun", n=2)),
        (ValueError, "'stop' or 'denoise'", lambda: sample(den, (1,), final="x", n=2)),
        (ValueError, "ends above 0", lambda: sample(den, (1,), final="denoise", n=2)),
        (ValueError, "say n=", lambda: sample(den, (1,), seeds=3)),
        (ValueError, "one a sample", lambda: sample(den, (1,), seeds=[1, 2], n=3)),
        (ValueError, "seed -1", lambda: sample(den, (1,), seeds=[-1])),
        (ValueError, "seeds=range", lambda: sample(den, (1,), seeds=0, n=4, batch=2)),
        (ValueError, "shape says", lambda: sample(den, (2,), x=torch.ones(3, 1))),
        (ValueError, "8", lambda: sample(unet, (1, 9, 9), n=2)),
        (ValueError, "channels|1, 8, 8", lambda: sample(unet, (3, 8, 8), n=2)),
        (TypeError, "floating", lambda: den(torch.ones(2, 1, dtype=torch.long), 0.5)),
        (ValueError, "one time a sample", lambda: den(torch.ones(2, 1), torch.ones(3))),
        (ValueError, "outside", lambda: den(torch.ones(2, 1), 1.5)),
        (ValueError, "choose of", lambda: Denoiser(den.net, Linear(), "noise")),
        (TypeError, "VP.cosine", lambda: Denoiser(den.net, "cosine", "v")),
        (ValueError, "keeps the shape",
         lambda: Denoiser(lambda x, t: x[:, :1], Linear(), "v")(torch.ones(2, 2), 0.5)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()


def test_network_time_counts_the_network_alone():
    net = UNet(base=16)
    with NetworkTime(net) as inside:
        out = sample(Denoiser(net, Linear(), "flow"), (1, 8, 8), seeds=range(4))
    assert 0 < inside.seconds < out.seconds
    assert not net._forward_hooks and not net._forward_pre_hooks


@pytest.mark.parametrize("path", [Linear(), VP.linear(), VP.cosine(), VP.cosine(0.008), VP.sigmoid(), VP.table(linear_betas(10))], ids=repr)
def test_numbers_of_a_path_from_a_table(path):
    times = trailing(5, 10).times(path)
    table = _looked_up(path, times)
    assert isinstance(table, type(path)) and repr(table) == repr(path) and table.config() == path.config()
    for name in ("alpha", "sigma", "dalpha", "dsigma", "lam", "dlam"):
        for t in (*times.tolist(), 0.5, torch.tensor(0.4), torch.tensor([0.2, 1.0])):
            try:
                want = getattr(path, name)(t)
            except ValueError as e:
                with pytest.raises(ValueError, match=str(e)[:20]):
                    getattr(table, name)(t)
                continue
            got = getattr(table, name)(t)
            assert got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-14, atol=1e-15, equal_nan=True)
            if isinstance(t, float):
                got.mul_(3)  # what is done with a number stays outside of the table
            assert torch.allclose(getattr(table, name)(t), want, rtol=1e-14, atol=1e-15, equal_nan=True)
    with pytest.raises(ValueError, match="outside"):
        table.alpha(1.5)
    assert vars(table).keys() - vars(path).keys() == {"_path", "_times", "_tables"}


def test_a_path_of_ones_own_that_takes_no_list_of_times():
    class Own(Linear):
        def sigma(self, t):
            return torch.tensor(float(t), dtype=torch.float64)

        def dsigma(self, t):
            return torch.tensor(1.0)

    x = torch.ones(3, 1)
    own, plain = (sample(Denoiser(lambda x, t: x / 2, p, "v"), (1,), grid=uniform(4, 0.9, 0.1), x=x).x for p in (Own(), Linear()))
    assert torch.allclose(own, plain)


def test_a_denoiser_is_after_a_sampling_what_it_was():
    path = VP.cosine()
    for fails in (False, True):
        def net(x, t):
            if fails:
                raise RuntimeError("stop")
            return x

        den = Denoiser(net, path, "v")
        before = vars(den) | {"nfe": 0}
        try:
            sample(den, (1,), n=2)
        except RuntimeError:
            assert fails
        assert den.path is path and vars(den) | {"nfe": 0} == before | {"_weights": None}


def test_weights_that_become_half_between_two_samplings():
    net = UNet(size=4, base=8, heads=2)
    den, seen = Denoiser(net, Linear(), "flow"), []
    net.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    sample(den, (1, 4, 4), n=1, grid=uniform(1))
    net.bfloat16()
    out = sample(den, (1, 4, 4), n=1, grid=uniform(1))
    assert seen == [torch.float32, torch.bfloat16] and out.x.dtype == torch.float32


def test_one_time_for_all_or_one_each_is_the_same():
    for path in (Linear(), VP.cosine(), VP.sigmoid()):
        for predicts in ("eps", "x0", "v", "flow", "score"):
            den, x = Denoiser(lambda x, t: torch.sin(x) * (1 + t[:, None]), path, predicts), torch.randn(4, 2, dtype=torch.float64)
            for want in ("eps", "x0", "v", "flow", "score"):
                one, each = (getattr(den(x, t), want) for t in (0.3, torch.full((4,), 0.3, dtype=torch.float64)))
                assert torch.allclose(one, each, rtol=1e-12)
