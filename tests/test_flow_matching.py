"""Flow matching against hand computation, exact densities, scipy, torchdiffeq and diffusers."""

import math

import pytest
import scipy.stats
import torch

from diffcourse.ddim import DDIM
from diffcourse.ddpm import DenoisingLoss
from diffcourse.flow_matching import FlipTime, FlowMatching, LogitNormal
from diffcourse.identity import fingerprint
from diffcourse.paths import VP, Linear, linear_betas
from diffcourse.playground import MLP, mixture, stratified_normal
from diffcourse.sampling import Denoiser, Euler, explicit, quadratic, sample, uniform
from diffcourse.training import Draws, run_identity

MIX, LINE = mixture(), Linear()
PATHS = [Linear(), VP.cosine()]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(x0):
    return Draws(0, 3, len(x0), 0, len(x0), x0)


def fake(x, t):
    return torch.tanh(x) * (0.3 + t.view(-1, *[1] * (x.ndim - 1)))


def mlp(seed=0, double=True):
    torch.manual_seed(seed)
    return MLP().double() if double else MLP()


class Fixed:
    """Draws that were made before."""

    def __init__(self, u, eps):
        self.t, self.noise = lambda: u, lambda: eps


# the loss


def test_loss_by_hand():
    x0, eps = rand(5, 1, 3, 3), rand(5, 1, 3, 3, seed=1)
    u = torch.tensor([0.0, 0.2, 0.5, 0.7, 1 - 2**-24], dtype=torch.float64)
    value = FlowMatching()(fake, x0, Fixed(u, eps))
    for i in range(5):
        t = 1 - u[i]
        x = (1 - t) * x0[i] + t * eps[i]
        want = (torch.tanh(x) * (0.3 + t) - (eps[i] - x0[i])).square().mean()
        assert value[i] == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_uniform_times_are_the_loss_of_chapter_2_bit_for_bit(path):
    x0 = rand(64, 1, 4, 4).float()
    ours = FlowMatching(path)(fake, x0, draws(x0))
    theirs = DenoisingLoss(path, "flow")(fake, x0, draws(x0))
    assert torch.equal(ours, theirs) and ours.shape == (64,)


def test_the_defaults_and_what_a_training_is_called():
    loss = FlowMatching()
    assert loss.predicts == "flow" and isinstance(loss.path, Linear) and loss.times == "uniform"
    assert FlowMatching().path is not loss.path
    kinds = [FlowMatching(), FlowMatching(VP.cosine()), FlowMatching(times=LogitNormal())]
    kinds += [FlowMatching(times=LogitNormal(0.5)), FlowMatching(times=LogitNormal(std=0.5))]
    data = type("D", (), {"name": "none", "hash": "0", "flip": False})()
    from diffcourse.training import Settings

    names = {run_identity(k, MLP(), data, Settings(steps=1))[0] for k in kinds}
    assert len(names) == 5
    assert fingerprint(FlowMatching()) == fingerprint(FlowMatching())


# the floor


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_below_the_floor_and_the_exact_velocity_reaches_it(path, t):
    n = 20_000
    x0, eps = MIX.sample(n, 1)[:, None], rand(n, 1, seed=2)
    draw = Fixed(torch.full((n,), 1 - t, dtype=torch.float64), eps)
    loss, floor = FlowMatching(path), MIX.loss_floor(path, t, "flow")
    exact = MIX.net(path, "flow")
    best = loss(exact, x0, draw)
    assert (best.mean() - floor).abs() < 5 * best.std() / n**0.5
    others = {
        "shifted": lambda x, t: exact(x, t) + 0.3,
        "shrunk": lambda x, t: 0.5 * exact(x, t),
        "bent": lambda x, t: exact(x, t) + 0.4 * torch.sin(3 * x),
        "random": lambda x, t, net=mlp(): 3 * net(x, t),
    }
    for name, other in others.items():
        with torch.no_grad():
            worse = loss(other, x0, draw)
            x = path.add_noise(x0, eps, t)
            gap = (other(x, torch.full((n,), t)) - exact(x, t)).square()[:, 0]
        over = worse - best  # paired: the same noise
        assert over.mean() > 0, name
        off = over - gap  # Pythagoras
        assert off.mean().abs() < 5 * off.std() / n**0.5, name


@pytest.mark.parametrize("law", [LogitNormal(), LogitNormal(0.6, 0.7)])
def test_the_expected_loss_is_the_floor_under_the_law(law):
    n = 30_000
    x0 = MIX.sample(n, 4)[:, None]
    u = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    best = FlowMatching(times=law)(MIX.net(LINE, "flow"), x0, Fixed(u, rand(n, 1, seed=6)))
    t = (torch.arange(80).double() + 0.5) / 80
    want = (law.pdf(t) * MIX.loss_floor(LINE, t, "flow")).mean()
    assert (best.mean() - want).abs() < 5 * best.std() / n**0.5


def test_the_gradient_is_that_of_the_regression_on_the_unknown_velocity():
    """The two losses differ by a constant, so the mean of their gradients' difference is zero."""
    n, t, net = 40_000, 0.5, mlp()
    x0, eps = MIX.sample(n, 7)[:, None], rand(n, 1, seed=8)
    at = torch.full((n,), t, dtype=torch.float64)
    x = LINE.add_noise(x0, eps, t)
    weight = list(net.parameters())[-2]  # of the last layer: its gradient is 2 (f - y) h
    features = []
    net.net[-1].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    sampled = FlowMatching()(net, x0, Fixed(1 - at, eps)).mean()
    known = (net(x, at) - MIX.flow(x, at, LINE)).square().mean()
    a, b = (torch.autograd.grad(v, weight)[0][0] for v in (sampled, known))
    each = 2 * (MIX.flow(x, at, LINE) - (eps - x0)) * features[0]  # (n, width)
    assert torch.allclose(a - b, each.mean(0), atol=1e-10)
    assert ((a - b).abs() < 5 * each.std(0) / n**0.5).all() and b.norm() > 4 * (a - b).norm()


# the law of t


@pytest.mark.parametrize("law", [LogitNormal(), LogitNormal(-0.4, 1.0), LogitNormal(1.0, 0.3)])
def test_logit_normal_against_scipy(law):
    normal = scipy.stats.norm(law.mean, law.std)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    cdf = torch.from_numpy(normal.cdf(torch.logit(t).numpy()))
    inside = (cdf > 1e-12) & (cdf < 1 - 1e-9)
    assert torch.allclose(law.sample(cdf)[inside], t[inside], atol=1e-7)
    pdf = normal.pdf(torch.logit(t).numpy()) / (t * (1 - t)).numpy()
    assert torch.allclose(law.pdf(t), torch.from_numpy(pdf), rtol=1e-10)
    middle = (torch.arange(20_000).double() + 0.5) / 20_000
    assert law.pdf(middle).mean().item() == pytest.approx(1, abs=1e-6)
    assert law.pdf(torch.tensor([0.0, 1.0])).tolist() == [0, 0]
    x0, seen = torch.zeros(20_000, 1), []
    FlowMatching(times=law)(lambda x, t: seen.append(t) or x, x0, draws(x0))
    t = seen[0]
    assert t.min() > 0 and t.max() <= 1
    test = scipy.stats.kstest(torch.logit(t.double()).numpy(), normal.cdf)
    assert test.pvalue > 1e-3
    wrong = scipy.stats.norm(law.mean + 0.05, law.std)
    assert scipy.stats.kstest(torch.logit(t.double()).numpy(), wrong.cdf).pvalue < 1e-3


def test_times_stay_in_their_interval_at_the_ends_of_the_draw():
    u = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for law in ("uniform", LogitNormal(), LogitNormal(-9.0, 8.0), LogitNormal(9.0, 8.0)):
        seen = []
        loss = FlowMatching(times=law)
        value = loss(lambda x, t: seen.append(t) or x, torch.zeros(4, 1), Fixed(u, torch.ones(4, 1)))
        assert value.isfinite().all()
        assert (seen[0] > 0).all() and (seen[0] <= 1).all(), law
        assert (seen[0].diff() <= 0).all() and seen[0][0] == 1


# the other direction of time


def theirs(t, x):  # data at t = 1, dx/dt towards the data, arguments as in torchcfm
    return -MIX.flow(x, 1 - t, LINE)


def test_flip_is_its_own_inverse():
    net, x = mlp(), rand(5, 1)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    once, twice = FlipTime(net), FlipTime(FlipTime(net))
    assert torch.equal(twice(x, t), net(x, t))
    assert torch.equal(once(x, t), -net(x, 1 - t))
    back = FlipTime(FlipTime(net, gives="tx"), takes="tx")
    assert torch.equal(back(x, t), net(x, t))
    assert torch.equal(FlipTime(theirs, takes="tx", gives="tx")(t, x), MIX.flow(x, t, LINE))
    assert torch.equal(FlipTime(net, gives="tx")(torch.tensor(0.25), x), -net(x, torch.full((5,), 0.75, dtype=x.dtype)))


def test_flip_shows_the_network_inside():
    net = mlp(double=False)
    flipped = FlipTime(net)
    assert {*map(id, flipped.parameters())} == {*map(id, net.parameters())}
    flipped.eval()
    assert not net.training


def test_a_field_of_theirs_sampled_both_ways_lands_the_same():
    from torchdiffeq import odeint

    z = stratified_normal(50)[:, None]
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    forward = odeint(theirs, z, steps, method="euler")[-1]
    den = Denoiser(FlipTime(theirs, takes="tx"), LINE, "flow")
    ours = sample(den, (1,), Euler(), uniform(20), x=z).x
    assert (forward - ours).abs().max() < 1e-12
    wrong = Denoiser(lambda x, t: theirs(t, x), LINE, "flow")  # not flipped
    assert (sample(wrong, (1,), Euler(), uniform(20), x=z).x - ours).abs().mean() > 0.3
    back = FlipTime(MIX.net(LINE, "flow"), gives="tx")  # ours into their solver
    many = torch.linspace(0, 1, 65, dtype=torch.float64)
    data = odeint(back, z, many, method="midpoint")[-1]
    assert (data - MIX.flow_map(z, 1.0, 0.0, LINE)).abs().max() < 2e-3


# sampling


def test_euler_converges_to_the_flow_map_with_order_one():
    z = stratified_normal(200)[:, None]
    exact = MIX.flow_map(z, 1.0, 0.0, LINE)
    den, errors = Denoiser(MIX.net(LINE, "flow"), LINE, "flow"), []
    for n in (40, 80, 160, 320):
        out = sample(den, (1,), Euler(), uniform(n), x=z)
        errors.append((out.x - exact).abs().mean())
        assert out.nfe == n
    order = (torch.stack(errors[:-1]) / torch.stack(errors[1:])).log2()
    assert (order - 1).abs().max() < 0.12


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_step_for_step_equal_to_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.tolist()
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == steps + 1
    assert (shift > 1) == (sigmas[steps // 2] > 0.6)  # more time near the noise
    den = Denoiser(fake, LINE, "flow")
    start = rand(3, 1, 4, 4).float()
    whole = sample(den, (1, 4, 4), Euler(), explicit(sigmas), x=start, trajectory=True)
    x = start
    for i, stamp in enumerate(theirs.timesteps):
        assert stamp.item() == pytest.approx(1000 * sigmas[i], rel=1e-6)
        out = fake(x, (stamp / 1000).expand(3))
        x = theirs.step(out, stamp, x).prev_sample
        assert torch.allclose(whole.trajectory[i + 1], x, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("grid", [uniform(7), quadratic(5)])
def test_ddim_is_euler_on_the_linear_path(grid):
    z = rand(20, 3)
    den = Denoiser(fake, LINE, "flow")
    a, b = (sample(den, (3,), solver, grid, x=z).x for solver in (DDIM(), Euler()))
    assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("path", [VP.cosine(), VP.linear()])
def test_ddim_on_a_vp_path_is_euler_on_the_linear_one(path):
    """Scaled by alpha + sigma, at the times sigma / (alpha + sigma)."""
    grid, z = uniform(9), rand(40, 1)
    t = grid.times(path)
    total = path.alpha(t) + path.sigma(t)
    line = path.sigma(t) / total
    line[-1] = 0.0

    def translated(x, s):  # the velocity at line time s, from the v network
        u = path.t_of_lam(LINE.lam(s.clamp(max=1 - 1e-16))).clamp(0, 1)
        scale = (path.alpha(u) + path.sigma(u))[:, None]
        seen = Denoiser(MIX.net(path, "v"), path, "v")(x * scale, u)
        return seen.eps - seen.x0

    one = sample(Denoiser(MIX.net(path, "v"), path, "v"), (1,), DDIM(), grid, x=z)
    den = Denoiser(translated, LINE, "flow")
    two = sample(den, (1,), Euler(), explicit(line.tolist()), x=z / total[0])
    assert (one.x - two.x).abs().max() < 1e-6


# bad input


def test_bad_input():
    with pytest.raises(TypeError, match="Linear"):
        FlowMatching("linear")
    with pytest.raises(TypeError, match="Linear"):
        FlowMatching(LogitNormal())  # times is the second argument
    with pytest.raises(ValueError, match="no derivative"):
        FlowMatching(VP.table(linear_betas()))
    for times in ("logit-normal", 3, None):
        with pytest.raises(TypeError, match="'uniform' or a law"):
            FlowMatching(times=times)
    for args in [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)]:
        with pytest.raises(ValueError, match="positive std"):
            LogitNormal(*args)
    with pytest.raises(ValueError, match="outside"):
        LogitNormal().pdf(1.5)
    with pytest.raises(ValueError, match="'xt'"):
        FlipTime(fake, takes="t, x")
    with pytest.raises(TypeError, match="predicts"):
        FlowMatching(LINE, predicts="v")
