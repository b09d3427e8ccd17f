"""Average velocities against closed forms, and the gradients of the losses that make one step enough."""

import math
import re
import signal

import pytest
import torch
from torch import nn

import diffcourse as dc
from diffcourse.identity import fingerprint
from diffcourse.generators import (
    DistributionMatching, Drift, PairRegression, Reflow, WithFake, drift, end_point_rms, make_pairs, one_step, trainable,
)
from diffcourse.meanflow import (
    IntervalMLP, Intervals, MeanFlow, MeanFlowLoss, average_net, average_velocity, check_jvp, difference,
    draws_of, total_derivative, with_interval,
)
from diffcourse.paths import VP, Linear
from diffcourse.playground import MLP, GaussianMixture, mixture, stratified_normal, wasserstein1
from diffcourse.sampling import Denoiser, Euler, Solver, sample, uniform
from diffcourse.training import Draws, fit
from diffcourse.unet import UNet

MIX, LINE = mixture(), Linear()
PATHS = [Linear(), VP.cosine(), VP.linear()]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))


def draws(x, step=0, seed=0):
    return Draws(seed, step, len(x), 0, len(x), x)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(n, seed=0, dtype=torch.float64):
    u = torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    t = 0.02 + 0.96 * u[0]
    return t, 0.97 * t * u[1]


def unet(second=False, seed=0, **more):
    torch.manual_seed(seed)
    net = UNet(size=4, base=8, mults=(1, 2), attention=(2,), heads=2, second_time=second, **more)
    for p in net.parameters():  # zeros would hide what is wrong
        nn.init.normal_(p, std=0.15)
    return net


# the average velocity


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_identity_of_the_derivative(path):
    x, (t, r) = normal(500, 1, dtype=torch.float64), times(500)
    v, span = MIX.flow(x, t, path), (t - r)[:, None]
    u, rate = total_derivative(average_net(MIX, path), x, t, r, v)
    scale = 1 + v.abs()
    assert ((u - (v - span * rate)).abs() / scale).max() < 1e-12
    # the derivative in x is that of the map, a ratio of two densities
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(average_velocity(MIX, y, t, r, path).sum(), y)
    end = MIX.flow_map(x, t, r, path)
    ratio = MIX.at(path, t).pdf(x) / MIX.at(path, r).pdf(end)
    assert torch.allclose(slope, (1 - ratio) / span, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_intervals_add_up(path):
    x, (t, r) = normal(500, 1, dtype=torch.float64), times(500)
    s = (t + r) / 2
    net = average_net(MIX, path)
    first = (t - s)[:, None] * net(x, t, s)
    second = (s - r)[:, None] * net(x - first, s, r)
    assert ((t - r)[:, None] * net(x, t, r) - first - second).abs().max() < 1e-12


@pytest.mark.parametrize("path", [Linear(), VP.cosine()], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_are_exact(path, steps):
    z = stratified_normal(300)[:, None]
    den = Denoiser(average_net(MIX, path), path, "flow")
    out = sample(den, (1,), MeanFlow(), uniform(steps), x=z)
    assert out.nfe == steps and wasserstein1(out.x, MIX) < 1e-12
    assert (out.x - MIX.flow_map(z, 1.0, 0.0, path)).abs().max() < 1e-11


def test_short_intervals_give_the_velocity():
    x = normal(50, 1, dtype=torch.float64)
    v = MIX.flow(x, 0.6, LINE)
    assert torch.equal(average_velocity(MIX, x, 0.6, 0.6, LINE), v)
    gaps = [(average_velocity(MIX, x, 0.6, 0.6 - h, LINE) - v).abs().max() for h in (1e-3, 1e-4)]
    assert gaps[1] < 0.02 and 9 < gaps[0] / gaps[1] < 11  # first order in h
    assert average_net(MIX, LINE)(x.float(), 0.5, 0.1).dtype == torch.float32


def test_a_gaussian_by_hand():
    m, s, x = 0.7, 0.4, normal(20, 1, dtype=torch.float64)
    one = GaussianMixture((m,), (s,), (1.0,))
    assert torch.allclose(average_velocity(one, x, 1.0, 0.0, LINE), x - (m + s * x), atol=1e-12)


# derivatives


def test_jvp_of_networks_is_their_derivative():
    torch.manual_seed(0)
    cases = [(IntervalMLP(16).double(), normal(6, 1, dtype=torch.float64)),
             (unet(True).double(), normal(3, 1, 4, 4, dtype=torch.float64))]
    for net, x in cases:
        (t, r), v = times(len(x)), normal(*x.shape, seed=1, dtype=torch.float64)
        u, rate = total_derivative(net, x, t, r, v)
        assert torch.allclose(u, net(x, t, r)) and rate.abs().max() > 1e-3
        assert torch.allclose(rate, difference(net, x, t, r, v, 1e-5), rtol=1e-6, atol=1e-8)
        # backward twice: the derivative of a vector-Jacobian product
        a, b, w = x.clone().requires_grad_(), t.clone().requires_grad_(), torch.zeros_like(u).requires_grad_()
        ga, gb = torch.autograd.grad(net(a, b, r), (a, b), w, create_graph=True)
        (twice,) = torch.autograd.grad((ga * v).sum() + gb.sum(), w)
        assert torch.allclose(rate, twice, rtol=1e-9, atol=1e-11)


def test_difference_stays_inside_the_interval():
    seen = []

    def net(x, t, r):
        seen.append(t)
        assert ((t >= r) & (t <= 1)).all()
        return x * 0 + (3 * t)[:, None]

    t, r = torch.tensor([1.0, 0.5, 0.2, 1.0]), torch.tensor([0.0, 0.5, 0.1, 1.0])
    rate = difference(net, torch.zeros(4, 1), t, r, torch.ones(4, 1), 0.04)
    assert torch.allclose(rate[:3, 0], torch.full((3,), 3.0), atol=1e-4) and rate[3] == 0


def test_check_jvp_sees_wiggles():
    x, v = normal(64, 1), normal(64, 1, seed=1)

    def net(fast):
        return lambda x, t, r: (2 * t)[:, None] * x + 0.05 * torch.sin(fast * t)[:, None]

    calm, wild = (check_jvp(net(f), x, 0.7, 0.0, v) for f in (3.0, 300.0))
    assert calm.cosine > 0.999 and wild.cosine < 0.7 and wild.exact > 2 * wild.difference


# the loss


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_loss_and_gradient_by_hand(power, derivative):
    torch.manual_seed(0)
    net, x0 = IntervalMLP(16), normal(32, 1, seed=5)
    loss = MeanFlowLoss(Intervals("uniform", 0.6), power, derivative=derivative)
    params = list(net.parameters())
    value = loss(net, x0, draws(x0))
    got = torch.autograd.grad(value.mean(), params)
    draw = draws(x0)
    t, r = loss.law.sample(draw.uniform(4))
    eps = draw.noise()
    x, v, h = (1 - t[:, None]) * x0 + t[:, None] * eps, eps - x0, 1e-3
    wide = net.double()
    x, v, t, r = (a.double() for a in (x, v, t, r))
    with torch.no_grad():
        ends = [wide(x + k * h * v, t + k * h, r) for k in (1, -1)]
        target = v - (t - r)[:, None] * (ends[0] - ends[1]) / (2 * h)
    square = ((wide(x, t, r) - target) ** 2)[:, 0]
    hand = square / (square.detach() + 1e-3) ** power
    loose = 1e-3 if derivative == "exact" else 0.1  # its h is larger
    assert value.shape == (32,) and torch.allclose(value.double(), hand, rtol=loose, atol=loose)
    want = torch.autograd.grad(hand.mean(), params)
    a, b = (torch.cat([g.flatten().double() for g in s]) for s in (got, want))
    assert (a - b).norm() < loose * b.norm()


def test_exact_network_has_the_least_loss():
    # its residual is (v - E v) (1 - (t - r) du/dx): mean zero, and nothing is left at p = 0
    x0 = MIX.sample(40_000, 1)[:, None]
    exact, sums = average_net(MIX, LINE), []

    def off(x, t, r):
        return exact(x, t, r) + 0.1

    law = Intervals("uniform", 0.8)
    draw = draws(x0.float())
    t, r = (a.double() for a in law.sample(draw.uniform(4)))
    eps = draw.noise().double()
    x, v = LINE.add_noise(x0, eps, t), eps - x0
    u, rate = total_derivative(exact, x, t, r, v)
    miss = u - (v - (t - r)[:, None] * rate)
    for g in (1.0, x, t[:, None], x * r[:, None]):  # orthogonal to what a network could add
        sums.append(float((miss * g).mean() / ((miss * g).std() / 200)))
    assert max(map(abs, sums)) < 4, sums
    u2, rate2 = total_derivative(off, x, t, r, v)
    gap = (u2 - (v - (t - r)[:, None] * rate2)).mean() - miss.mean()
    assert abs(gap - 0.1) < 1e-9


def test_no_gradient_through_the_target():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, r):
            return self.a * x

    net, x0 = Net(), normal(64, 1)
    (got,) = torch.autograd.grad(MeanFlowLoss(power=0.0)(net, x0, draws(x0)).mean(), net.a)
    draw = draws(x0)
    t, r = Intervals().sample(draw.uniform(4))
    eps = draw.noise()
    x, v = LINE.add_noise(x0, eps, t), eps - x0
    target = v - (t - r)[:, None] * 0.5 * v
    assert torch.allclose(got, (2 * (0.5 * x - target) * x).mean(), atol=1e-5)


def test_precision_inside_is_float32():
    seen = []

    def net(x, t, r):
        w = torch.ones(1, 1)
        seen.append((x @ w).dtype)
        return x

    x0 = normal(4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        MeanFlowLoss()(net, x0, draws(x0))
    assert set(seen) == {torch.float32}


# the law of the interval


@pytest.mark.parametrize("kind", ["logit-normal", "v1", "uniform", "mix"])
def test_laws(kind):
    t, r = draws_of(Intervals(kind, 0.75), 50_000)
    assert t.shape == r.shape == (50_000,) and ((0 <= r) & (r <= t) & (t <= 1)).all()
    equal = (r == t).float().mean()
    assert abs(equal - 0.25) < 0.01 or kind in ("v1", "mix") and 0.25 < equal < 0.35
    same = draws_of(Intervals(kind, 0.0), 1000)
    assert torch.equal(*same)
    corner = ((t > 0.95) & (r < 0.05)).float().mean()
    assert corner < 1e-4 if kind == "logit-normal" else corner > 1e-3


def test_laws_by_their_distribution_functions():
    n = 200_000
    t, r = draws_of(Intervals("logit-normal", 1.0), n)
    mean, std = -0.4, 1.0
    for q in (0.3, 0.5, 0.8):  # the larger of two, the smaller of two
        z = torch.special.ndtr((torch.tensor(q).logit() - mean) / std)
        assert abs((t < q).float().mean() - z**2) < 0.006
        assert abs((r > q).float().mean() - (1 - z) ** 2) < 0.006
    t, r = draws_of(Intervals("mix", 1.0), n)
    assert abs(t.mean() - 0.5) < 0.004
    t, _ = draws_of(Intervals("v1", 1.0), n)
    assert abs(t.logit().mean() + 0.6) < 0.02 and abs(t.logit().std() - 1.6) < 0.02
    t, _ = draws_of(Intervals("logit-normal", 0.0, noisy=(1.0, 0.5)), n)
    assert t.logit().mean() > 1.0  # the larger of two


# networks


def test_with_interval_starts_as_the_flow():
    net = unet()
    two = with_interval(net)
    x, (t, r) = normal(3, 1, 4, 4), times(3, dtype=torch.float32)
    assert torch.equal(two(x, t, r), net(x, t)) and two.config()["second_time"]
    assert all(p.requires_grad for p in two.parameters())
    again = with_interval(net)
    assert all(torch.equal(a, b) for a, b in zip(two.state_dict().values(), again.state_dict().values()))
    two(x, t, r).square().sum().backward()
    assert two.interval.linear2.weight.grad.abs().max() > 0  # it can learn
    with pytest.raises(TypeError, match="takes two already"):
        with_interval(two)


def test_trainable_copies():
    net = unet().requires_grad_(False).eval()
    new = trainable(net)
    assert new.training and all(p.requires_grad for p in new.parameters())
    assert not net.training and not any(p.requires_grad for p in net.parameters())


# one step


def teacher():
    return Denoiser(unet().eval().requires_grad_(False), LINE, "flow")


def test_one_step_is_one_euler_step():
    den, z = teacher(), normal(5, 1, 4, 4)
    out = sample(den, (1, 4, 4), Euler(), uniform(1), x=z)
    assert torch.allclose(one_step(den.net, z), out.x, atol=1e-6)


def test_pairs_are_what_sample_makes():
    den = teacher()
    pairs = make_pairs(den, 5, 7000, Euler(), uniform(3), batch=2, precision="fp32")
    seeds = range(7000, 7005)
    out = sample(den, (1, 4, 4), Euler(), uniform(3), seeds=seeds, trajectory=True)
    assert pairs.shape == (5, 2, 1, 4, 4) and torch.equal(pairs[:, 0], out.trajectory[0])
    assert torch.allclose(pairs[:, 1], out.x, atol=1e-5)
    assert end_point_rms(den, pairs, Euler(), uniform(3)) < 1e-5
    far = end_point_rms(den, pairs, Euler(), uniform(1))
    want = (one_step(den.net, pairs[:, 0]) - pairs[:, 1]).square().mean().sqrt()
    assert far == pytest.approx(float(want), rel=1e-4) and far > 1e-3


def test_regression_by_hand():
    net, pairs = unet(), normal(4, 2, 1, 4, 4)
    value = PairRegression(0.1)(net, pairs, draws(pairs))
    miss = (pairs[:, 0] - net(pairs[:, 0], torch.ones(4)) - pairs[:, 1]).flatten(1)
    assert torch.allclose(value, (miss.square().mean(1) + 0.01).sqrt() - 0.1)
    same = torch.stack([pairs[:, 0], one_step(net, pairs[:, 0])], 1).detach()
    assert PairRegression()(net, same, draws(pairs)).abs().max() < 1e-6


def test_reflow_by_hand():
    net, pairs = unet(), normal(4, 2, 1, 4, 4)
    value, t = Reflow()(net, pairs, draws(pairs)), 1 - draws(pairs).t()
    z, x = pairs.unbind(1)
    a = t.reshape(-1, 1, 1, 1)
    want = (net((1 - a) * x + a * z, t) - (z - x)).square().flatten(1).mean(1)
    assert torch.allclose(value, want, atol=1e-6)


def test_distribution_matching_cuts_the_gradients():
    den, pairs = teacher(), normal(6, 2, 1, 4, 4)
    net = WithFake(unet(seed=1))
    with torch.no_grad():  # the three are different networks
        for p in net.fake.parameters():
            p.add_(0.05)
    parts = {n: list(getattr(net, n).parameters()) for n in ("student", "fake")}
    loss = DistributionMatching(den, anchor=0.0)
    got = torch.autograd.grad(loss(net, pairs, draws(pairs)).mean(), sum(parts.values(), []))
    k = len(parts["student"])
    draw = draws(pairs)
    z, eps = draw.noise().unbind(1)
    t = 0.02 + 0.96 * draw.t()
    a = t.reshape(-1, 1, 1, 1)
    x = one_step(net.student, z)
    x_t = ((1 - a) * x + a * eps).detach()
    real, fake = den.net(x_t, t), net.fake(x_t, t)
    size = (x - (x_t - a * real)).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    push = (a * (real - fake) / size).detach()  # d loss / d image, a sample
    want = torch.autograd.grad(x, parts["student"], push / x.numel(), retain_graph=True)
    for p, q in zip(got[:k], want):
        assert torch.allclose(p, q, atol=1e-6)
    flow = (fake - (eps - x).detach()).square().mean()
    for p, q in zip(got[k:], torch.autograd.grad(flow, parts["fake"])):
        assert torch.allclose(p, q, atol=1e-6)
    assert all(p.grad is None for p in loss.teacher.parameters())
    more = DistributionMatching(den, anchor=0.5)(net, pairs, draws(pairs))
    near = PairRegression()(net.student, pairs[:3], draws(pairs)).repeat(2)
    assert torch.allclose(more, loss(net, pairs, draws(pairs)) + 0.5 * near, atol=1e-5)


def test_with_two_time_scales_the_student_waits_for_its_turn():
    den, pairs, net = teacher(), normal(6, 2, 1, 4, 4), WithFake(unet(seed=1))
    loss, plain = DistributionMatching(den, every=3), DistributionMatching(den)
    for step in range(5):
        net.zero_grad(set_to_none=True)
        value = loss(net, pairs, Draws(0, step, 6, 0, 6, pairs))
        value.mean().backward()
        moved = [p.grad is not None for p in net.student.parameters()]
        assert all(moved) if step % 3 == 0 else not any(moved)
        assert all(p.grad is not None for p in net.fake.parameters())
        if step % 3 == 0:
            assert torch.equal(value, plain(net, pairs, Draws(0, step, 6, 0, 6, pairs)))
    with pytest.raises(ValueError, match="every"):
        DistributionMatching(den, every=0)


def test_distribution_matching_goes_downhill():
    # a student with too narrow images is pushed outwards: real and fake flows are exact
    def flow(std):
        one = GaussianMixture((0.0,), (std,), (1.0,))

        class Net(nn.Module):
            def forward(self, x, t):
                return one.flow(x, t, LINE).to(x.dtype)

        return Net()

    loss = DistributionMatching(Denoiser(flow(1.0), LINE, "flow"))
    x, eps = 0.5 * normal(500, 1), normal(500, 1, seed=1)
    t = torch.full((500,), 0.5)
    x_t = LINE.add_noise(x, eps, t)
    push = loss._push(x, x_t, t, flow(0.5)(x_t, t))
    assert (push * x_t).mean() < 0  # a step against it widens


def test_fake_is_kept_beside_the_student():
    net = WithFake(unet())
    x, t = normal(2, 1, 4, 4), torch.tensor([0.3, 0.9])
    assert torch.equal(net(x, t), net.student(x, t)) and torch.equal(net.fake(x, t), net(x, t))
    again = WithFake(**net.config())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, t), net(x, t))


def test_drift_moves_a_crowd_to_the_data():
    x, real = 0.3 * normal(200, 2), normal(400, 2, seed=1) + torch.tensor([2.0, 0.0])
    first = float((x.mean(0) - real.mean(0)).norm())
    for _ in range(60):
        x = x + 0.1 * drift(x, real, (0.5, 2.0))
    assert (x.mean(0) - real.mean(0)).norm() < 0.2 * first
    assert 0.7 < x.std(0).mean() / real.std(0).mean() < 1.3


def test_drift_by_hand():
    x, y, tau = normal(3, 2), normal(4, 2, seed=1), 0.7
    k = torch.zeros(3, 7)
    for i in range(3):
        for j in range(4):
            k[i, j] = math.exp(-float((x[i] - y[j]).norm()) / tau)
        for j in range(3):
            k[i, 4 + j] = 0 if i == j else math.exp(-float((x[i] - x[j]).norm()) / tau)
    w = (k / k.sum(1, keepdim=True) * k / k.sum(0)).sqrt()
    v = torch.zeros(3, 2)
    for i in range(3):
        for j in range(4):
            for m in range(3):
                v[i] += w[i, j] * w[i, 4 + m] * (y[j] - x[m])
    assert torch.allclose(drift(x, y, (tau,)), v / v.square().mean().sqrt(), atol=1e-5)


def test_drift_loss_takes_part_of_the_noise():
    net, x0 = unet(), normal(9, 1, 4, 4)
    value = Drift(per=3)(net, x0, draws(x0))
    image = one_step(net, draws(x0).noise()[:3])
    want = (0.1 * drift(image, x0)).square().flatten(1).mean(1)
    assert value.shape == (9,) and torch.allclose(value, want.repeat(3), rtol=1e-3)
    (g,) = torch.autograd.grad(value.mean(), net.last[2].bias, retain_graph=True)
    out = one_step(net, draws(x0).noise()[:3])
    (h,) = torch.autograd.grad((-0.2 * drift(out, x0) * out).flatten(1).mean(), net.last[2].bias)
    assert torch.allclose(g, h, rtol=1e-3)


# training: exact to the bit, and told apart


def small(kind):
    pairs, x0 = normal(40, 2, 1, 4, 4), normal(40, 1, 4, 4)
    return {
        "meanflow": lambda: (MeanFlowLoss(), with_interval(unet()), x0),
        "matching": lambda: (DistributionMatching(teacher()), WithFake(unet()), pairs),
        "drift": lambda: (Drift(), unet(), x0),
    }[kind]()


@pytest.mark.parametrize("kind", ["meanflow", "matching", "drift"])
def test_an_interrupted_training_reaches_the_same_bits(kind):
    def go(run, **more):
        loss, net, data = small(kind)
        return fit(loss, net, data, run, 4, batch=8, warmup=1, log_every=1, **more)

    def stop(step, net):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("cut", every=1, callback=stop)
    cut = go("cut")
    assert cut.status == "resumed"
    for a, b in zip(whole.net.state_dict().values(), cut.net.state_dict().values()):
        assert torch.equal(a, b)
    assert go("whole").status == "reused"


def test_what_is_published_can_be_loaded():
    made = fit(*small("meanflow"), "mf", 1, batch=8)
    den = dc.load("mf", source="local")
    out = sample(den, (1, 4, 4), MeanFlow(), uniform(2), seeds=range(3))
    assert out.nfe == 2 and den.predicts == "flow"
    assert torch.equal(den.net.state_dict()["first.weight"], made.net.cpu().state_dict()["first.weight"])


def test_identity_knows_teacher_and_settings():
    a, b = teacher(), teacher()
    with torch.no_grad():
        next(b.net.parameters()).add_(1e-3)
    made = [DistributionMatching(a), DistributionMatching(b), DistributionMatching(a, anchor=1.0),
            MeanFlowLoss(), MeanFlowLoss(Intervals("v1")), MeanFlowLoss(Intervals(share=0.5)),
            MeanFlowLoss(power=1.0), MeanFlowLoss(derivative="difference"),
            PairRegression(), PairRegression(0.1), Drift(), Drift((1.0,)), Reflow()]
    assert len({fingerprint(m) for m in made}) == len(made)
    assert fingerprint(DistributionMatching(a)) == fingerprint(DistributionMatching(teacher()))


# bad input


def test_networks_of_one_time_are_refused():
    x0 = normal(4, 1, 4, 4)
    for net in (unet(), MLP(), lambda x, t: x):
        with pytest.raises(TypeError, match="with_interval"):
            MeanFlowLoss()(net, x0, draws(x0))
        with pytest.raises(TypeError, match="takes one time"):
            sample(Denoiser(net, LINE, "flow"), (1, 4, 4), MeanFlow(), uniform(1), seeds=[0])
    for bad in (MLP(), unet(True)):
        with pytest.raises(TypeError, match="UNet that takes one time"):
            with_interval(bad)


def test_meanflow_refuses_what_is_no_velocity():
    net = average_net(MIX, LINE)
    with pytest.raises(ValueError, match="predicts 'x0'"):
        sample(Denoiser(net, LINE, "x0"), (1,), MeanFlow(), uniform(1), seeds=0, n=3)
    with pytest.raises(ValueError, match="keep the shape"):
        wide = Denoiser(lambda x, t, r: x.repeat(1, 2), LINE, "flow")
        sample(wide, (1,), MeanFlow(), uniform(1), seeds=0, n=3)


def test_nan_in_a_derivative_says_what_to_do():
    def net(x, t, r):  # its value is finite, its derivative at 0 is not
        return x + (x - x.detach()).abs().sqrt()

    x0 = normal(4, 1)
    with pytest.raises(FloatingPointError, match="4 of 4 samples.*Lower lr.*derivative='difference'"):
        MeanFlowLoss()(net, x0, draws(x0))
    with pytest.raises(FloatingPointError, match="difference"):
        nan = lambda x, t, r: x * math.nan
        MeanFlowLoss(derivative="difference")(nan, x0, draws(x0))


def test_nan_stops_the_training():
    loss, net, data = small("meanflow")
    with torch.no_grad():
        net.last[2].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(loss, net, data, "nan", 3, batch=8)


@pytest.mark.parametrize("bad, says", [
    (lambda: average_velocity(MIX, torch.zeros(2), 0.2, 0.5, LINE), "r = 0.5 lies after t = 0.2"),
    (lambda: average_velocity(MIX, torch.zeros(2), 1.2, 0.5, LINE), "time t = 1.2"),
    (lambda: check_jvp(IntervalMLP(), torch.zeros(2, 1), 0.2, 0.5, torch.zeros(2, 1)), "r = 0.5 lies after t = 0.2 for 2 of 2 states"),
    (lambda: IntervalMLP()(torch.zeros(2), torch.zeros(2), torch.zeros(2)), "(2,), (2,), (2,)"),
    (lambda: IntervalMLP()(torch.zeros(2, 1), torch.zeros(2), torch.zeros(3)), "(2, 1), (2,), (3,)"),
    (lambda: Intervals("normal"), "kind='normal'"),
    (lambda: Intervals(share=1.2), "share=1.2"),
    (lambda: Intervals(noisy=(0.0, 0.0)), "noisy=(0.0, 0.0)"),
    (lambda: MeanFlowLoss(derivative="forward"), "derivative='forward'"),
    (lambda: MeanFlowLoss(power=-1.0), "power=-1.0"),
    (lambda: PairRegression()(unet(), torch.zeros(4, 1, 4, 4), None), "(B, 2, …)"),
    (lambda: DistributionMatching(Denoiser(unet(), VP.cosine(), "v")), "predicts='flow'"),
    (lambda: make_pairs(teacher(), 2, 0), "seed = 0:"),
    (lambda: make_pairs(teacher(), 2, 5999), "seed = 5999:"),  # the last seed that judges
    (lambda: make_pairs(teacher(), 2, 7000, grid=uniform(3, start=0.9)), "a grid from t = 1"),
    (lambda: make_pairs(Denoiser(lambda x, t: x, LINE, "flow"), 2, 7000), "pass shape="),
    (lambda: make_pairs(teacher(), 2, 7000, precision="fp16"), "precision='fp16': 'auto', 'fp32' or 'bf16'"),
    (lambda: Drift(steps=0), "steps = 0: a whole number"),
    (lambda: Drift(per=0), "per = 0: a whole number"),
    (lambda: Drift(steps=1.5), "steps = 1.5"),
    (lambda: Drift(step=0.0), "step=0.0"),
    (lambda: Drift(()), "taus=()"),
    (lambda: Drift((1.0, -1.0)), "taus=(1.0, -1.0)"),
    (lambda: Drift()(unet(), torch.zeros(2, 1, 4, 4), draws(torch.zeros(2, 1, 4, 4))), "two or more are needed"),
])
def test_what_does_not_fit(bad, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        bad()


def test_noise_in_the_teacher_is_refused():
    class Noisy(Solver):
        stochastic = True

    with pytest.raises(ValueError, match="without noise"):
        make_pairs(teacher(), 2, 7000, Noisy())
    pairs = torch.zeros(4, 2, 1, 4, 4)
    with pytest.raises(TypeError, match="WithFake"):
        DistributionMatching(teacher())(unet(), pairs, draws(pairs))
