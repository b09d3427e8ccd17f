"""DEIS, PNDM, iPNDM and UniPC: orders on the exact flow, equality with diffusers, the ends, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffcourse.multistep import DEIS, IPNDM, PNDM, UniPC, _unified
from diffcourse.paths import PREDICTIONS, VP, Linear
from diffcourse.playground import mixture, stratified_normal
from diffcourse.sampling import Denoiser, Euler, explicit, sample, uniform
from diffcourse.ddim import DDIM
from diffcourse.solvers import DPMpp
from test_ddim import Fake, normal
from test_solvers import SMOOTH, error, in_lam, slope, theirs

ALL = [DEIS(1), DEIS(2), DEIS(3), DEIS(2, clock="t"), DEIS(3, "data"), DEIS(3, "data", "t"), IPNDM(1), IPNDM(), UniPC(1),
       UniPC(2), UniPC(3), UniPC(2, "bh1")]


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize(
    "solver, order",
    [(DEIS(1), 1), (DEIS(2), 2), (DEIS(3), 3), (DEIS(2, clock="t"), 2), (DEIS(3, clock="t"), 3), (DEIS(2, "data"), 2), (DEIS(3, "data"), 3),
     (DEIS(2, "data", "t"), 2), (DEIS(3, "data", "t"), 3), (IPNDM(1), 1), (IPNDM(2), 2), (IPNDM(4), 2), (PNDM(), 2),
     (UniPC(1), 2), (UniPC(2), 3), (UniPC(3), 4), (UniPC(2, "bh1"), 3)],
    ids=repr,
)
def test_orders(path, solver, order):
    assert abs(slope(path, solver, in_lam, 80, 160) - order) < 0.35


@pytest.mark.parametrize("path", SMOOTH[:2], ids=repr)
def test_only_the_data_form_in_t_keeps_its_order_over_the_whole_road(path):
    whole = lambda path, n: uniform(n)
    assert slope(path, DEIS(3, "data", "t"), whole, 40, 80) > 2.6
    assert slope(path, DEIS(3, "data"), whole, 40, 80) < 2.3
    assert slope(path, DEIS(3, "noise", "t"), whole, 40, 80) < 2.3, "tAB-DEIS"


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_three_papers_one_step(path):
    """The predictor of UniPC is 2M and the corrected 3M of DPM-Solver++, and DEIS on the data in lam."""
    times, x = (0.95, 0.75, 0.6, 0.45), normal(5, 2)
    said = dict(zip(times, normal(3, 5, 2)))
    den = Denoiser(lambda x, t: said[t[0].item()].to(x), path, "x0")
    lam = [float(path.lam(t)) for t in times]
    for solver, past in ((DPMpp(2), (1,)), (DPMpp(3), (1, 0)), (DEIS(3, "data"), (1, 0))):
        solver.reset()
        state = x
        for t, s in zip(times, times[1:]):
            before, state = state, solver.step(den, state, t, s, None)
        nodes = [(lam[i] - lam[2], said[times[i]]) for i in past]
        assert torch.allclose(_unified(path, before, *times[2:], said[times[2]], nodes, "bh2"), state, rtol=1e-9, atol=1e-11), solver


def test_weights_by_hand():
    """Two nodes in lam: the integral of exp(-u) u is 1 - (1 + h) exp(-h)."""
    path, t, s, before = Linear(), 0.5, 0.3, 0.8
    lam = [float(path.lam(u)) for u in (t, s, before)]
    h, back = lam[1] - lam[0], lam[0] - lam[2]
    want = -float(path.alpha(s) * path.sigma(t) / path.alpha(t)) * -(1 - (1 + h) * math.exp(-h)) / back
    assert DEIS(2)._weights(path, [t, before], s)[1] == pytest.approx(want, rel=1e-12)
    assert DEIS(2)._weights(path, [t, before], 0.0)[1] == pytest.approx(float(path.sigma(t) / path.alpha(t)) / back, rel=1e-12)


@pytest.mark.parametrize("form, clock", itertools.product(("noise", "data"), ("lam", "t")))
def test_weights_add_up_to_those_of_ddim(form, clock):
    path, times, s = VP.cosine(), [0.5, 0.7, 0.75], 0.42
    ratio = [float(path.alpha(s) / path.alpha(0.5)), float(path.sigma(s) / path.sigma(0.5))]
    own = float(path.sigma(s)) - ratio[0] * float(path.sigma(0.5)), float(path.alpha(s)) - ratio[1] * float(path.alpha(0.5))
    assert sum(DEIS(3, form, clock)._weights(path, times, s)) == pytest.approx(own[form == "data"], rel=1e-12)


@pytest.mark.parametrize("form, clock", itertools.product(("noise", "data"), ("lam", "t")))
def test_exact_where_the_guess_is_a_polynomial_of_its_clock(form, clock):
    """Guesses that are quadratic in the clock, whatever the state: the third order integrates them to rounding."""
    path = Linear()
    steps = [0.9, 0.75, 0.5, 0.45, 0.2]

    def guess(t):
        u = t if clock == "t" else float(path.lam(t))
        return 0.3 + 0.5 * u - 0.2 * u * u

    class Net:
        def __call__(self, x, t):
            return torch.full_like(x, guess(t[0].item()))

    den = Denoiser(Net(), path, "eps" if form == "noise" else "x0")
    lam = np.linspace(float(path.lam(steps[2])), float(path.lam(steps[-1])), 200001)
    t = torch.special.expit(torch.from_numpy(-lam)).numpy()
    u = t if clock == "t" else lam
    y = (0.3 + 0.5 * u - 0.2 * u * u) * np.exp(-lam if form == "noise" else lam)
    area = float(((y[1:] + y[:-1]) / 2 * np.diff(lam)).sum())
    a, b = (float(v(steps[-1]) / v(steps[2])) for v in (path.alpha, path.sigma))
    solver = DEIS(3, form, clock)
    solver.reset()
    x = torch.zeros(1, 1, dtype=torch.float64)
    for i, (now, then) in enumerate(zip(steps, steps[1:])):
        if i == 2:
            start = x.item()
        x = solver.step(den, x, now, then, None)
    want = a * start - float(path.alpha(steps[-1])) * area if form == "noise" else b * start + float(path.sigma(steps[-1])) * area
    assert x.item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_deis_as_in_diffusers(order, schedule):
    more = dict(solver_order=order, lower_order_final=False, prediction_type="v_prediction")
    scheduler, path, grid = theirs("DEISMultistepScheduler", 12, schedule, zero=False, **more)
    x = z = normal(3, 1, 4, 4)
    for stamp, t in zip(scheduler.timesteps.tolist(), grid.option):
        x = scheduler.step(Fake()(x, torch.full((3,), t)), stamp, x).prev_sample
    ours = sample(Denoiser(Fake(), path, "v"), (1, 4, 4), DEIS(order), grid, x=z)
    assert ours.nfe == 12
    assert (ours.x - x).abs().max() < 1e-6 * z.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_unipc_as_in_diffusers(order, variant, schedule):
    more = dict(solver_order=order, solver_type=variant, lower_order_final=False, prediction_type="v_prediction")
    scheduler, path, grid = theirs("UniPCMultistepScheduler", 12, schedule, **more)
    x = z = normal(3, 1, 4, 4)
    for stamp, t in zip(scheduler.timesteps.tolist()[:-1], grid.option):
        x = scheduler.step(Fake()(x, torch.full((3,), t)), stamp, x).prev_sample
    ours = sample(Denoiser(Fake(), path, "v"), (1, 4, 4), UniPC(order, variant), explicit(grid.option[:-1]), x=z)
    assert ours.nfe == 11
    assert (ours.x - x).abs().max() < 3e-6 * z.abs().max()


@pytest.mark.parametrize("steps", [10, 20])
def test_pndm_as_in_diffusers(steps):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(1000, beta_schedule="scaled_linear", set_alpha_to_one=True)
    path = VP.table(scheduler.betas)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = path.alphas_cumprod, torch.ones(1, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = z = normal(3, 1, 4, 4)
    stamps = scheduler.timesteps.tolist()
    for stamp in stamps:
        x = scheduler.step(Fake()(x, torch.full((3,), (stamp + 1) / 1000)), stamp, x).prev_sample
    first = stamps[0]
    times = [*((first - k * (1000 // steps) + 1) / 1000 for k in range(steps)), 0.0]
    ours = sample(Denoiser(Fake(), path, "eps"), (1, 4, 4), PNDM(), explicit(times), x=z)
    assert ours.nfe == len(stamps) == steps + 9
    assert (ours.x - x).abs().max() < 1e-6 * z.abs().max()  # their betas are float32


def test_ipndm_as_in_diffusers():
    """Their schedule has sigma = sin(pi t / 2)^2; ours is any path with those numbers."""
    from diffusers import IPNDMScheduler

    class Theirs(VP):
        def sigma(self, t):
            return torch.sin(torch.as_tensor(t, dtype=torch.float64) * math.pi / 2) ** 2

        def alpha(self, t):
            return (1 - self.sigma(t) ** 2).clamp(min=0).sqrt()

        def dalpha(self, t):
            raise NotImplementedError

    scheduler, path, n = IPNDMScheduler(1000), Theirs(), 12
    scheduler.set_timesteps(n)
    steps = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = path.sigma(steps), path.alpha(steps)
    x = z = normal(3, 1, 4, 4)
    scheduler._step_index = 1  # from below alpha = 0, where theirs divides by 1e-8
    grid = steps[1:].tolist()
    for t, stamp in zip(grid, scheduler.timesteps[1:]):
        x = scheduler.step(Fake()(x, torch.full((3,), t)), stamp, x).prev_sample
        if t == grid[-2]:
            break
    ours = sample(Denoiser(Fake(), path, "v"), (1, 4, 4), IPNDM(), explicit(grid), x=z)
    assert (ours.x - x).abs().max() < 1e-6 * z.abs().max()


def test_ipndm_is_of_first_order_where_steps_alternate():
    def uneven(path, n):
        start, end = (float(path.t_of_lam(v)) for v in (-4.0, 4.0))
        a, b = float(path.lam(start)), float(path.lam(end))
        share = torch.cat([torch.zeros(1), torch.tensor([0.25, 0.75]).repeat(n // 2).cumsum(0) / (n / 2)]).double()
        times = path.t_of_lam(a + (b - a) * share).tolist()
        return explicit([start, *times[1:-1], end])

    assert abs(slope(Linear(), IPNDM(4), uneven, 160, 320) - 1) < 0.25
    assert abs(slope(Linear(), DEIS(2), uneven, 160, 320) - 2) < 0.25


def test_the_variants_of_unipc_differ_for_a_single_node_alone():
    path, x, m, a, b = Linear(), *normal(4, 5)
    one, two = [(-0.7, a)], [(-0.7, a), (-1.9, b)]
    both = [[_unified(path, x, 0.6, 0.4, m, nodes, v) for v in ("bh1", "bh2")] for nodes in (one, two)]
    assert not torch.allclose(*both[0]) and torch.equal(*both[1])


def test_the_corrector_costs_nothing():
    path = Linear()
    den = Denoiser(mixture().net(path, "x0"), path, "x0")
    for solver in ALL:
        assert sample(den, (1,), solver, uniform(7), n=3).nfe == 7, solver


@pytest.mark.parametrize("solver", [DEIS(1), IPNDM(1), UniPC(3), DEIS(3), DEIS(3, "data", "t"), IPNDM()], ids=repr)
@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_one_step_is_ddim_whatever_the_network_predicts(solver, path):
    x = path.sigma(1.0) * stratified_normal(9)[:, None]
    for predicts in PREDICTIONS:
        den = Denoiser(mixture().net(path, predicts), path, predicts)
        try:
            want = sample(den, (1,), DDIM(), uniform(1, 0.999), x=x).x
        except ValueError:
            continue
        assert torch.allclose(sample(den, (1,), solver, uniform(1, 0.999), x=x).x, want, atol=1e-9)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_over_the_whole_road_finite_and_better_than_euler(solver, path, predicts):
    if predicts != "x0" and isinstance(path, type(VP.sigmoid())):
        pytest.skip("its flow has no value at t = 1")
    got = error(path, solver, uniform(20), predicts)
    assert math.isfinite(got) and got < 0.12
    if repr(solver) not in (repr(DEIS(1)), repr(IPNDM(1))) and path == Linear():
        assert got < error(path, Euler(), uniform(20), predicts)


def test_nothing_is_remembered_from_another_road():
    path, solver = Linear(), UniPC(3)
    den = Denoiser(mixture().net(path, "flow"), path, "flow")
    x = normal(4, 1)
    for rule in (solver, DEIS(3), IPNDM()):
        first = sample(den, (1,), rule, uniform(6), x=x).x
        rule.step(den, x, 0.5, 0.4, None)  # a road left half way
        assert torch.equal(sample(den, (1,), rule, uniform(6), x=x).x, first)
        apart = rule.step(den, x, 0.7, 0.3, None)
        assert torch.equal(apart, type(rule)(*([] if isinstance(rule, IPNDM) else [3])).step(den, x, 0.7, 0.3, None))


@pytest.mark.parametrize("make, says", [
    (lambda: DEIS(0), "order"), (lambda: DEIS(4), "order 1 to 3"), (lambda: DEIS(2.5), "order"), (lambda: DEIS(True), "order"),
    (lambda: DEIS(2, "eps"), "form 'noise' or 'data'"), (lambda: DEIS(2, clock="rho"), "clock 'lam' or 't'"),
    (lambda: IPNDM(5), "1 to 4"), (lambda: UniPC(4), "order 1 to 3"), (lambda: UniPC(2, "bh3"), "variant 'bh1' or 'bh2'"),
])
def test_what_does_not_exist_is_refused(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_pndm_says_where_it_cannot_begin_and_a_table_has_no_clock_t():
    path = Linear()
    den = Denoiser(mixture().net(path, "flow"), path, "flow")
    with pytest.raises(ValueError, match="PNDM cannot begin at t = 1.0"):
        sample(den, (1,), PNDM(), uniform(10), n=2)
    table = VP.table(torch.full((100,), 0.02))
    den = Denoiser(Fake(), table, "v")
    grid = explicit([1.0, 0.7, 0.4, 0.1])
    with pytest.raises(ValueError, match="no times between its entries"):
        sample(den, (1,), DEIS(2, clock="t"), grid, n=2)
    assert sample(den, (1,), DEIS(3), grid, n=2).x.isfinite().all()
