"""Consistency training: its zero, its gaps, its start at flow matching, one and several evaluations, bad input."""

import math

import pytest
import torch

from diffcourse.consistency import Consistency, Renoise
from diffcourse.flow_matching import FlowMatching
from diffcourse.generators import trainable
from diffcourse.paths import VP, Linear
from diffcourse.playground import MLP, mixture, stratified_normal, wasserstein1
from diffcourse.sampling import Denoiser, Euler, sample, uniform
from diffcourse.training import fit

PATH, MIX = Linear(), mixture()


class Draw:
    def __init__(self, n, step=0, shape=(1,)):
        gen = torch.Generator().manual_seed(0)
        self.step = step
        self._t = torch.rand(n, generator=gen, dtype=torch.float64)
        self._eps = torch.randn(n, *shape, generator=gen, dtype=torch.float64)

    def t(self):
        return self._t

    def noise(self):
        return self._eps


def ends(x, t):
    return (x - MIX.flow_map(x, t, torch.zeros_like(t), PATH)) / t[:, None]


EXACT = Denoiser(MIX.net(PATH, "flow"), PATH, "flow")


@pytest.mark.parametrize("step, gap", [(0, 1 / 2), (9, 1 / 2), (10, 1 / 4), (25, 1 / 8), (69, 1 / 128), (70, 1 / 128), (10**6, 1 / 128)])
def test_the_gap_halves_from_stage_to_stage(step, gap):
    assert Consistency(70, stages=7)._gap(step) == gap


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_teacher_on_the_road_and_the_ends_of_the_road_give_no_loss(step, monkeypatch):
    loss = Consistency(7, EXACT)
    monkeypatch.setattr(Consistency, "_moved", lambda self, x, x0, eps, t, r: MIX.flow_map(x, t, r, PATH))
    x0 = MIX.sample(400)[:, None]
    assert loss(ends, x0, Draw(400, step)).max() < 1e-6
    assert loss(MIX.net(PATH, "flow"), x0, Draw(400, step)).mean() > 0.01, "the mean velocity is no end of a road"


@pytest.mark.parametrize("rule, order", [("ddim", 1), ("midpoint", 2)])
def test_the_error_of_a_teacher_that_steps_shrinks_with_the_gap(rule, order):
    x0 = MIX.sample(2000)[:, None]
    loss = Consistency(7, EXACT, rule=rule, c=1e-9)
    with torch.no_grad():  # c near 0: the loss is the distance over the gap
        errors = [float(loss(ends, x0, Draw(2000, step)).mean()) for step in (4, 5, 6)]
    for a, b in zip(errors, errors[1:]):
        assert math.log2(a / b) == pytest.approx(order, abs=0.45)


def test_from_data_the_bias_of_the_exact_map_vanishes_with_the_gap():
    n = 200_000
    x0 = MIX.sample(n)[:, None]

    def slope(step):
        draw, out = Draw(n, step), []
        r = 1 - draw._t
        t = 1 - draw._t
        r = t * (1 - Consistency(7)._gap(step))
        y = PATH.add_noise(x0, draw._eps, r)
        want = y - r[:, None] * ends(y, r)
        x = PATH.add_noise(x0, draw._eps, t)
        base = x - t[:, None] * ends(x, t)
        for a in (-0.02, 0.02):
            moved = base + a * t[:, None] * torch.sin(2 * base)
            out.append((((moved - want) ** 2)[:, 0] / (t - r)).mean())
        return abs(float(out[1] - out[0]) / 0.04)

    assert slope(0) > 10 * slope(5)


def test_with_a_gap_of_all_it_would_be_flow_matching(monkeypatch):
    """r = 0: the loss asks for x0, which is t times the error of the flow."""
    monkeypatch.setattr(Consistency, "_gap", lambda self, step: 1.0)
    x0, draw, net = MIX.sample(300)[:, None], Draw(300), MIX.net(PATH, "flow")
    loss = Consistency(7, c=1e-9)(net, x0, draw)
    t = 1 - draw._t
    x = PATH.add_noise(x0, draw._eps, t)
    want = t * (net(x, t) - (draw._eps - x0)).abs()[:, 0] / t
    assert torch.allclose(loss, want, atol=1e-6)


def test_only_the_point_further_out_is_trained():
    torch.manual_seed(0)
    net = MLP()
    x0 = MIX.sample(64)[:, None].float()
    draw = Draw(64)
    draw._t, draw._eps = draw._t.float(), draw._eps.float()
    Consistency(7)(net, x0, draw).mean().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    t = 1 - draw._t
    r = t / 2
    with torch.no_grad():
        y = PATH.add_noise(x0, draw._eps, r)
        want = y - r[:, None] * net(y, r)
    x = PATH.add_noise(x0, draw._eps, t)
    d = ((x - t[:, None] * net(x, t)) - want).square().mean(1)
    (((d + 0.03**2).sqrt() - 0.03) / (t - r)).mean().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(got, net.parameters()))


def test_training_learns_the_end_of_the_road(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    line, how = MIX.sample(4000)[:, None].float(), dict(batch=256, lr=3e-3, precision="fp32", seed=0)
    torch.manual_seed(0)
    first = fit(FlowMatching(), MLP(width=48), line, "flow", steps=500, **how)
    made = fit(Consistency(900), trainable(first.net), line, "ends", steps=900, **how)
    z = stratified_normal(100)[:, None].float()
    exact = MIX.flow_map(z.double(), 1.0, 0.0, PATH)
    miss = [float((sample(Denoiser(f.net.cpu(), PATH, "flow"), (1,), Euler(), uniform(1), x=z).x - exact).abs().mean()) for f in (first, made)]
    assert miss[1] < 0.3 * miss[0]


def test_renoise_with_the_exact_ends_draws_the_data_whatever_the_grid():
    den = Denoiser(ends, PATH, "flow")
    data = MIX.sample(3000)
    for grid in ([1.0, 0.0], [1.0, 0.6, 0.0], [1.0, 0.9, 0.4, 0.0]):
        out = sample(den, (1,), Renoise(), grid, n=3000, seeds=2)
        assert out.nfe == len(grid) - 1 and wasserstein1(out.x, data) < 0.08
    one, two = (sample(den, (1,), rule, uniform(1), range(9)).x for rule in (Renoise(), Euler()))
    assert torch.allclose(one, two, atol=1e-5), "one evaluation is Euler's step"
    assert Renoise().stochastic


def test_mixed_precision_does_not_reach_the_difference_of_two_ends():
    torch.manual_seed(0)
    net, x0, draw = MLP(), MIX.sample(200)[:, None].float(), Draw(200, step=6)
    draw._t, draw._eps = draw._t.float(), draw._eps.float()
    plain = Consistency(7)(net, x0, draw)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Consistency(7)(net, x0, draw), plain)


@pytest.mark.parametrize("make, says", [
    (lambda: Consistency(0), "iterations"), (lambda: Consistency(3, stages=7), "no room for 7 stages"), (lambda: Consistency(10, stages=0), "stages"), (lambda: Consistency(10, c=0), "c above 0"),
    (lambda: Consistency(10, rule="heun"), "'ddim', 'midpoint'"),
    (lambda: Consistency(10, Denoiser(MIX.net(VP.cosine(), "v"), VP.cosine(), "v")), "lives on Linear"),
])
def test_what_does_not_fit_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
