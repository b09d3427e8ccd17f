"""Solvers with numbers of their own: the families they belong to, what they were chosen for, budgets they refuse."""

import math

import pytest
import torch

from diffcourse.paths import VP, Linear
from diffcourse.playground import mixture, stratified_normal
from diffcourse.sampling import Denoiser, explicit, sample, uniform
from diffcourse.solvers import AB2, Heun, Midpoint
from diffcourse.tuned import Multistep, TwoStage, learned_multistep, limit, optimised_grid, tuned_two_stage
from test_solvers import in_t, slope

PATH = Linear()
DEN = Denoiser(mixture().net(PATH, "flow"), PATH, "flow")
SEEDS, FRESH = range(60), range(1000, 1200)


def ends(seeds):
    z = sample(DEN, (1,), AB2(), uniform(1), seeds, trajectory=True).trajectory[0]
    return mixture().flow_map(z.double(), 1.0, 0.0, PATH)


def miss(solver, grid, seeds=FRESH):
    return (sample(DEN, (1,), solver, grid, seeds).x - ends(seeds)).square().mean().sqrt().item()


def test_the_limit_is_the_exact_flow_at_every_time():
    times = [1.0, 0.7, 0.35, 0.1, 0.0]
    road = limit(DEN, (1,), times, SEEDS)
    assert road.shape == (5, 60, 1)
    for t, x in zip(times[1:], road[1:]):
        want = mixture().flow_map(road[0].double(), 1.0, t, PATH)
        assert (x - want).abs().max() < 2e-4


@pytest.mark.parametrize("ours, theirs", [(TwoStage(), Midpoint()), (TwoStage(1.0, 0.5), Heun())])
def test_two_stage_has_midpoint_and_heun_among_its_members(ours, theirs):
    a, b = (sample(DEN, (1,), rule, uniform(4), SEEDS) for rule in (ours, theirs))
    assert torch.allclose(a.x, b.x, atol=1e-5) and a.nfe == b.nfe == 8


@pytest.mark.parametrize("c, weight, order", [(0.3, 0.5 / 0.3, 2), (2 / 3, 0.75, 2), (0.4, 1.3, 1), (0.5, 0.0, 1)])
def test_order_two_only_where_the_product_is_a_half(c, weight, order):
    assert abs(slope(PATH, TwoStage(c, weight), in_t, 80, 160) - order) < 0.2


def test_the_tuned_rule_is_the_best_of_its_family_on_its_noises():
    rule = tuned_two_stage(DEN, (1,), uniform(1), SEEDS)
    end = limit(DEN, (1,), uniform(1), SEEDS)[-1]
    error = lambda r: (sample(DEN, (1,), r, uniform(1), SEEDS).x - end).square().mean().item()
    own = error(rule)
    assert all(own <= error(TwoStage(rule.c, rule.weight + d)) + 1e-9 for d in (-0.2, -0.05, 0.05, 0.2))
    assert own <= min(error(TwoStage(c / 10, w / 4)) for c in range(2, 10) for w in range(0, 9)) + 1e-6
    assert miss(rule, uniform(1)) < min(miss(Midpoint(), uniform(1)), miss(AB2(), uniform(2)))


def test_learned_weights_are_those_of_least_squares_and_gain_on_fresh_noise():
    rule = learned_multistep(DEN, (1,), uniform(5), SEEDS)
    assert [len(row) for row in rule.weights] == [1, 2, 3, 3, 3]
    assert miss(rule, uniform(5)) < 0.7 * miss(AB2(), uniform(5))
    road = limit(DEN, (1,), uniform(5), SEEDS)
    out = sample(DEN, (1,), rule, uniform(5), SEEDS, trajectory=True).trajectory
    for i in range(5):  # no other weights of this step come nearer
        slopes = [DEN.flow(x, 1 - k / 5) for k, x in list(enumerate(out[: i + 1]))[::-1]][:3]
        rest = road[i + 1] - out[i + 1]
        assert all(abs(float((rest * u).mean())) < 1e-5 for u in slopes)
    again = sample(DEN, (1,), rule, uniform(5), SEEDS)
    assert again.nfe == 5 and torch.equal(again.x, out[-1])


def test_weights_of_ab2_are_ab2():
    rows = [[-0.2]] + [[-0.3, 0.1]] * 4
    a, b = (sample(DEN, (1,), rule, uniform(5), SEEDS).x for rule in (Multistep(rows), AB2()))
    assert torch.allclose(a, b, atol=1e-5)


def test_an_optimised_grid_is_a_grid_and_never_worse_on_its_noises():
    grid = optimised_grid(DEN, (1,), AB2(), uniform(4, 1.0, 0.01), SEEDS, tried=60)
    times = grid.times(PATH)
    assert len(times) == 5 and times[0] == 1.0 and times[-1] == 0.01 and (times.diff() < 0).all()
    end = limit(DEN, (1,), uniform(4, 1.0, 0.01), SEEDS)[-1]
    error = lambda g: (sample(DEN, (1,), AB2(), g, SEEDS).x - end).square().mean().item()
    assert error(grid) < error(uniform(4, 1.0, 0.01))


@pytest.mark.parametrize("steps", [4, 6])
def test_another_budget_is_refused(steps):
    rule = Multistep([[-0.2]] + [[-0.3, 0.1]] * 4)
    with pytest.raises(ValueError, match=f"made for 5 steps, not {steps}: learn another"):
        sample(DEN, (1,), rule, uniform(steps), SEEDS)


@pytest.mark.parametrize("make, says", [
    (lambda: TwoStage(0), "above 0 and up"), (lambda: TwoStage(1.5), "above 0 and up"), (lambda: TwoStage(math.nan), "above 0"),
    (lambda: TwoStage(0.5, math.nan), "finite weight"),
    (lambda: Multistep([]), "one row of finite numbers a step"), (lambda: Multistep([[1, 2]]), "the first of one number"),
    (lambda: Multistep([[1], []]), "one row"), (lambda: Multistep(5), "one row"), (lambda: Multistep([[math.nan]]), "finite numbers"),
    (lambda: limit(DEN, (1,), uniform(2), SEEDS, -5), "evaluations"),
    (lambda: optimised_grid(DEN, (1,), AB2(), uniform(1), SEEDS), "no time to choose"),
    (lambda: optimised_grid(DEN, (1,), AB2(), uniform(3), SEEDS, tried=0), "tried"),
    (lambda: learned_multistep(DEN, (1,), uniform(3), SEEDS, past=0), "past"),
    (lambda: learned_multistep(Denoiser(mixture().net(VP.sigmoid(), "x0"), VP.sigmoid(), "x0"), (1,), uniform(3), SEEDS), "no value at t"),
])
def test_what_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_explicit_times_as_a_list_are_taken():
    rule = learned_multistep(DEN, (1,), [1.0, 0.5, 0.0], SEEDS)
    assert sample(DEN, (1,), rule, explicit([1.0, 0.5, 0.0]), SEEDS).nfe == 2
