"""EDM and SDE-DPM-Solver++: orders, the authors' algorithm, equality with diffusers, laws, the ends, bad input."""

import math

import pytest
import torch

from diffcourse.ddim import DDIM
from diffcourse.grids import karras, shifted
from diffcourse.paths import VP, Linear
from diffcourse.playground import mixture, wasserstein1
from diffcourse.sampling import Denoiser, explicit, sample, uniform
from diffcourse.solvers import Heun
from diffcourse.stochastic import EDM, SDEDPMpp
from test_ddim import Fake, normal
from test_solvers import SMOOTH, in_lam, slope, theirs


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_edm_without_churn_is_of_second_order(path):
    assert abs(slope(path, EDM(), in_lam, 40, 80) - 2) < 0.2


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_edm_as_in_diffusers(schedule):
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(1000, beta_schedule=schedule, prediction_type="v_prediction", timestep_spacing="leading")
    scheduler.set_timesteps(9)
    path = VP.table(scheduler.betas)
    stamps = scheduler.timesteps.tolist()
    times = [(stamp + 1) / 1000 for stamp in stamps]
    level = torch.stack([path.sigma(t) / path.alpha(t) for t in times])
    own = torch.cat([level[:1], level[1:], level.new_zeros(1)])
    assert torch.allclose(own.float(), scheduler.sigmas, rtol=2e-3, atol=1e-6)
    scheduler.sigmas = own
    grid = explicit([times[0], *times[1::2], 0.0])
    z = normal(3, 1, 4, 4)
    y = z / path.alpha(times[0])
    for stamp, t in zip(stamps, times):
        y = scheduler.step(Fake()(path.alpha(t) * y, torch.full((3,), t)), stamp, y).prev_sample
    ours = sample(Denoiser(Fake(), path, "v"), (1, 4, 4), EDM(), grid, x=z)
    assert ours.nfe == len(stamps) == 17
    assert (ours.x - y).abs().max() < 2e-5 * y.abs().max()


def test_edm_with_churn_is_the_algorithm_of_the_paper():
    """Algorithm 2 in its own variables: y = x / alpha, D the posterior mean at level sigma / alpha."""
    path, n, churn, low, high, extra = VP.cosine(), 12, 6.0, 0.1, 5.0, 1.05
    net = Fake()
    den = Denoiser(net, path, "x0")
    grid = karras(n, sigma_min=0.01, sigma_max=20.0)
    t = grid.times(path)
    level = ((-path.lam(t)).exp()).tolist()[:-1] + [0.0]

    def D(y, sigma):
        time = path.t_of_lam(torch.tensor(-math.log(sigma), dtype=torch.float64))
        return net(path.alpha(time) * y, time.expand(len(y)))

    gen = torch.Generator().manual_seed(7)
    draw = lambda like: torch.randn(like.shape, generator=gen, dtype=torch.float64)
    x = normal(5, 2) * path.sigma(t[0])
    y = x / path.alpha(t[0])
    added = 0
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= level[i] <= high else 0.0
        hat = level[i] * (1 + gamma)
        if gamma > 0:
            y, added = y + math.sqrt(hat**2 - level[i] ** 2) * extra * draw(y), added + 1
        d = (y - D(y, hat)) / hat
        new = y + (level[i + 1] - hat) * d
        if level[i + 1] > 0:
            new = y + (level[i + 1] - hat) / 2 * (d + (new - D(new, level[i + 1])) / level[i + 1])
        y = new
    assert 0 < added < n
    solver = EDM(churn, low, high, extra)
    solver.check(n)
    gen.manual_seed(7)
    times = t.tolist()
    for a, b in zip(times, times[1:]):
        x = solver.step(den, x, a, b, lambda: draw(x))
    assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_sde_solver_as_in_diffusers_draw_for_draw(order, schedule, final):
    scheduler, path, grid = theirs(
        "DPMSolverMultistepScheduler", 12, schedule, solver_order=order, algorithm_type="sde-dpmsolver++",
        lower_order_final=False, prediction_type="v_prediction", final_sigmas_type=final,
    )
    gen = torch.Generator()
    draw = lambda: torch.randn(3, 1, 4, 4, generator=gen, dtype=torch.float64)
    x = z = normal(3, 1, 4, 4)
    gen.manual_seed(1)
    for stamp, t in zip(scheduler.timesteps.tolist(), grid.option):
        x = scheduler.step(Fake()(x, torch.full((3,), t)), stamp, x, variance_noise=draw()).prev_sample
    gen.manual_seed(1)
    ours, solver, den = z, SDEDPMpp(order), Denoiser(Fake(), path, "v")
    for t, s in zip(grid.option, grid.option[1:]):
        ours = solver.step(den, ours, t, s, draw)
    assert (ours - x).abs().max() < 2e-5 * z.abs().max()


def test_sde_solver_of_order_one_is_ddim_with_all_noise():
    den, grid = Denoiser(Fake(), VP.cosine(), "v"), uniform(7)
    two = [sample(den, (4,), rule, grid, range(6)).x for rule in (SDEDPMpp(1), DDIM(1.0))]
    assert torch.allclose(*two, atol=1e-6)


@pytest.mark.parametrize("solver", [EDM(8.0), SDEDPMpp()], ids=repr)
def test_with_many_steps_the_law_is_that_of_the_data(solver):
    path = VP.cosine()
    den = Denoiser(mixture().net(path, "x0"), path, "x0")
    grid = karras(60) if isinstance(solver, EDM) else uniform(120, 0.999, 0.001)
    x = sample(den, (1,), solver, grid, n=4000, seeds=3).x.double()
    assert wasserstein1(x, mixture().sample(4000)) < 0.06
    assert wasserstein1(x[:2000], x[2000:]) < 0.1


@pytest.mark.parametrize("solver", [EDM(8.0), SDEDPMpp()], ids=repr)
def test_each_sample_depends_on_its_seed_alone(solver):
    den, grid = Denoiser(Fake(), Linear(), "flow"), karras(6)
    assert solver.stochastic
    whole = sample(den, (3,), solver, grid, range(5)).x
    assert torch.allclose(sample(den, (3,), solver, grid, [3]).x[0], whole[3], atol=1e-6)
    assert not torch.allclose(sample(den, (3,), solver, grid, [3], x=whole[:1]).x, sample(den, (3,), solver, grid, [4], x=whole[:1]).x)


def test_nfe():
    den = Denoiser(Fake(), Linear(), "flow")
    assert sample(den, (1,), EDM(), karras(6), n=2).nfe == 11
    assert sample(den, (1,), EDM(3.0), karras(6), n=2).nfe == 11
    assert sample(den, (1,), SDEDPMpp(), uniform(6), n=2).nfe == 6


def test_edm_is_not_heun_in_t_but_both_are_of_second_order():
    den, grid = Denoiser(mixture().net(Linear(), "flow"), Linear(), "flow"), uniform(5, 0.98, 0.02)
    x = normal(50, 1)
    a, b = (sample(den, (1,), rule, grid, x=x).x for rule in (EDM(), Heun()))
    assert (a - b).abs().mean() > 0.01


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_karras_is_even_in_the_root_of_the_level(path):
    t = karras(9, rho=7, sigma_min=0.01, sigma_max=50).times(path)
    root = (-path.lam(t[:-1])).exp() ** (1 / 7)
    assert t[-1] == 0 and len(t) == 10
    assert root.diff().std() < 1e-6 * root[0]
    assert (-path.lam(t[0])).exp().item() == pytest.approx(50, rel=1e-6)
    assert (-path.lam(t[-2])).exp().item() == pytest.approx(0.01, rel=1e-4)
    assert karras(1).times(path).tolist() == [pytest.approx(karras(2).times(path)[0].item()), 0.0]


def test_shifted_moves_lam_by_the_log_of_the_shift_on_the_linear_path():
    a, b = uniform(8).times(Linear()), shifted(8, 3.0).times(Linear())
    moved = Linear().lam(a[1:-1]) - Linear().lam(b[1:-1])
    assert moved.tolist() == pytest.approx([math.log(3)] * 7)
    assert shifted(8, 1.0).times(Linear()).tolist() == pytest.approx(a.tolist())
    whole, part = shifted(6, 3.0).times(Linear()), shifted(6, 3.0, 0.9, 0.1).times(Linear())
    assert part.tolist() == pytest.approx((0.1 + 0.8 * whole).tolist()), "other ends, the same shape"


@pytest.mark.parametrize("make, says", [
    (lambda: EDM(-1), "churn >= 0"), (lambda: EDM(1, 5, 2), "low < high"), (lambda: EDM(1, noise=0), "noise > 0"), (lambda: EDM(math.inf), "churn >= 0"),
    (lambda: karras(5, sigma_max=200.0).times(VP.linear()), "lower sigma_max"), (lambda: shifted(5, math.inf), "above 0"),
    (lambda: SDEDPMpp(3), "1 or 2"), (lambda: SDEDPMpp(0), "order"),
    (lambda: karras(5, sigma_min=0), "0 < sigma_min"), (lambda: karras(5, sigma_min=2, sigma_max=1), "sigma_min < sigma_max"),
    (lambda: karras(5, rho=0), "rho > 0"), (lambda: shifted(5, 0), "above 0"), (lambda: shifted(5, -1), "above 0"),
])
def test_what_does_not_exist_is_refused(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_edm_says_where_it_cannot_begin():
    den = Denoiser(Fake(), Linear(), "flow")
    with pytest.raises(ValueError, match=r"EDM cannot begin at t = 1.0.*karras\(steps\)"):
        sample(den, (1,), EDM(), uniform(5), n=2)


def test_edm_with_churn_on_a_table_takes_its_entries():
    path = VP.table(torch.linspace(1e-4, 0.02, 1000))
    out = sample(Denoiser(Fake(), path, "eps"), (2,), EDM(5.0), karras(8, sigma_min=0.05, sigma_max=80), range(3))
    assert out.x.isfinite().all()
