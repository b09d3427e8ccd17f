"""Solvers: their orders on the exact flow, equality with other libraries, every combination, the ends, bad input."""
import functools
import itertools
import math

import pytest
import torch

from diffcourse.ddim import DDIM
from diffcourse.paths import PREDICTIONS, VP, Linear, cosine_betas, linear_betas
from diffcourse.playground import mixture, stratified_normal
from diffcourse.sampling import Denoiser, Euler
from diffcourse.sampling import cosine, explicit, logsnr, quadratic, sample, trailing, uniform
from diffcourse.solvers import AB2, RK4, DPMpp, DPMSolver, Heun, Midpoint, order_list
from diffcourse.timing import NetworkTime
from diffcourse.unet import UNet
from test_ddim import Fake, normal

SMOOTH = [Linear(), VP.cosine(), VP.linear(), VP.sigmoid()]
FLOW = [Heun(), Midpoint(), RK4(), AB2()]
LAM = [DPMSolver(k) for k in (1, 2, 3)] + [DPMpp(k) for k in (1, 2, 3)] + [DPMpp(3, halved=True)]


def error(path, solver, grid, predicts="x0"):
    """Mean distance from where the exact flow takes the same starts."""
    den = Denoiser(mixture().net(path, predicts), path, predicts)
    t = grid.times(path).tolist()
    x = path.sigma(t[0]) * stratified_normal(31)[:, None]
    out = sample(den, (1,), solver, grid, x=x)
    assert out.x.dtype == torch.float64
    return (out.x - mixture().flow_map(x, t[0], t[-1], path)).abs().mean().item()


def in_lam(path, n):
    start, end = (float(path.t_of_lam(lam)) for lam in (-4.0, 4.0))
    return logsnr(n, start, end, lam_max=4.0)


def slope(path, solver, grid, few, many):
    a, b = (error(path, solver, grid(path, n)) for n in (few, many))
    return math.log(a / b) / math.log(many / few)


def in_t(path, n):
    return uniform(n, 0.98, 0.02)


@pytest.mark.parametrize(
    "path, grid", [(SMOOTH[0], in_t), (SMOOTH[1], in_t), (SMOOTH[2], in_lam)], ids=lambda v: getattr(v, "__name__", repr(v))
)
@pytest.mark.parametrize(
    "solver, order",
    [(Euler(), 1), (Heun(), 2), (Midpoint(), 2), (RK4(), 4), (AB2(), 2)]
    + [(DPMSolver(1), 1), (DPMSolver(2), 2), (DPMSolver(3), 3), (DPMpp(1), 1), (DPMpp(2), 2)],
    ids=repr,
)
def test_orders(path, grid, solver, order):
    n = {"AB2()": 80, "DPMpp(2)": 80}.get(repr(solver), 40)
    assert abs(slope(path, solver, grid, n, 2 * n) - order) < 0.3


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_the_third_order_with_half_of_the_curvature_is_second(path):
    assert abs(slope(path, DPMpp(3, halved=True), in_lam, 80, 160) - 2) < 0.15
    assert abs(slope(path, DPMpp(3), in_lam, 80, 160) - 3) < 0.2


def theirs(kind, steps, schedule, zero=None, **more):
    """A scheduler of diffusers, its noise levels in float64, and our grid of its times."""
    import diffusers

    scheduler = getattr(diffusers, kind)(1000, beta_schedule=schedule, **more)
    scheduler.set_timesteps(steps)
    path = VP.table(scheduler.betas)
    times = [(stamp + 1) / 1000 for stamp in scheduler.timesteps.tolist()]
    level = torch.stack([path.sigma(t) / path.alpha(t) for t in times])
    zero = more.get("final_sigmas_type", "zero") == "zero" if zero is None else zero
    last = level.new_zeros(1) if zero else None
    if last is None:
        times = times + [1 / 1000]
        last = (path.sigma(1 / 1000) / path.alpha(1 / 1000))[None]
    else:
        times = times + [0.0]
    own = torch.cat([level, last])
    assert torch.allclose(own.float(), scheduler.sigmas, rtol=2e-3, atol=1e-6)
    scheduler.sigmas = own
    return scheduler, path, explicit(times)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 15])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_multistep_as_in_diffusers(order, steps, schedule, spacing):
    scheduler, path, grid = theirs(
        "DPMSolverMultistepScheduler", steps, schedule, solver_order=order,
        lower_order_final=False, timestep_spacing=spacing, prediction_type="v_prediction",
    )
    x = z = normal(3, 1, 4, 4)
    for stamp, t in zip(scheduler.timesteps.tolist(), grid.option):
        out = Fake()(x.float(), torch.full((3,), t))
        x = scheduler.step(out, stamp, x.float()).prev_sample
    den = Denoiser(Fake(), path, "v")
    solver = DPMpp(order, halved=order == 3)
    ours = sample(den, (1, 4, 4), solver, grid, x=z)
    assert ours.nfe == steps
    assert (ours.x - x).abs().max() < 2e-5 * z.abs().max()
    if order == 3:
        other = sample(den, (1, 4, 4), DPMpp(3), grid, x=z)
        assert (other.x - x).abs().max() > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_each_multistep_update_as_in_diffusers_to_rounding(order, schedule):
    scheduler, path, grid = theirs(
        "DPMSolverMultistepScheduler", 12, schedule, solver_order=order, final_sigmas_type="sigma_min"
    )
    den, solver = Denoiser(Fake(), path, "x0"), DPMpp(order, halved=order == 3)
    update = [
        lambda m, x: scheduler.dpm_solver_first_order_update(m[-1], sample=x),
        lambda m, x: scheduler.multistep_dpm_solver_second_order_update(m, sample=x),
        lambda m, x: scheduler.multistep_dpm_solver_third_order_update(m, sample=x),
    ]
    x, past = normal(3, 1, 4, 4), []
    for i, (t, s) in enumerate(zip(grid.option, grid.option[1:])):
        past.append(den.x0(x, t))
        scheduler._step_index = i
        want = update[min(len(past), order) - 1]([None, None, *past][-3:], x)
        x = solver.step(den, x, t, s, None)
        assert torch.allclose(x, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_each_singlestep_update_as_in_diffusers_to_rounding(order):
    """Ours chooses the inner times; theirs is shown them and the same outputs."""
    path = VP.table(linear_betas())
    t, s = 0.8, 0.5
    seen = []

    class Watch:
        def __call__(self, x, time):
            seen.append((time[0].item(), Fake()(x, time)))
            return seen[-1][1]

    x = normal(3, 1, 4, 4)
    ours = DPMSolver(order).step(Denoiser(Watch(), path, "eps"), x, t, s, None)
    assert len(seen) == order
    from diffusers import DPMSolverSinglestepScheduler

    scheduler = DPMSolverSinglestepScheduler(
        1000, solver_order=order, algorithm_type="dpmsolver", solver_type="midpoint", final_sigmas_type="sigma_min"
    )
    times = [u for u, _ in seen] + [s]
    scheduler.sigmas = torch.stack([path.sigma(u) / path.alpha(u) for u in times])
    scheduler._step_index = order - 1
    outs, one = [out for _, out in seen], scheduler.dpm_solver_first_order_update
    if order == 1:
        want = one(outs[0], sample=x)
    elif order == 2:
        want = scheduler.singlestep_dpm_solver_second_order_update([None, *outs][-2:], sample=x)
    else:
        want = scheduler.singlestep_dpm_solver_third_order_update(outs, sample=x)
    assert torch.allclose(ours, want, rtol=1e-9, atol=1e-9)


GRIDS = [uniform, quadratic, cosine, logsnr, trailing, lambda n: explicit([1.0, 0.6, 0.1, 0.0])]


def has_value(path, predicts, solver, start):
    """Whether the first evaluation, at t = 1, gives the solver what it needs."""
    alpha = float(path.alpha(start))
    if predicts in ("eps", "score") and alpha == 0:
        return False
    bad = not math.isfinite(float(path.dalpha(start)))
    return not bad or (predicts != "flow" and solver not in FLOW)


@functools.cache
def ran(path, predicts, solver, grid):
    den = Denoiser(mixture().net(path, predicts), path, predicts)
    return sample(den, (1,), solver, grid, x=stratified_normal(9)[:, None])


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("solver", FLOW + LAM[:-1] + [DPMSolver([1, 3, 1])], ids=repr)
def test_every_combination_is_finite_and_right_or_an_error(path, predicts, solver):
    """Right: what the network predicts changes the answer only where the last step sees another end."""
    exact = mixture().flow_map(path.sigma(1.0) * stratified_normal(9), 1.0, 0.0, path)
    for grid in GRIDS:
        grid = grid(3)
        if not has_value(path, predicts, solver, grid.start):
            with pytest.raises(ValueError, match="t = "):
                ran(path, predicts, solver, grid)
            continue
        out = ran(path, predicts, solver, grid)
        assert out.x.dtype == torch.float64
        assert (out.x[:, 0] - exact).abs().mean() < 1
        others = [p for p in ("x0", "flow") if has_value(path, p, solver, grid.start)]
        same = [r for p in others if (r := ran(path, p, solver, grid)).nfe == out.nfe]
        assert same and all(torch.allclose(r.x, out.x, atol=1e-7) for r in same)


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
def test_first_orders_are_ddim(path):
    den, x = Denoiser(Fake(), path, "v"), normal(5, 2)
    for t, s in [(1.0, 0.9), (0.9, 0.5), (0.3, 0.29), (0.2, 0.0), (1.0, 0.0)]:
        want = DDIM().step(den, x, t, s, None)
        for solver in (DPMSolver(1), DPMpp(1), DPMSolver([1]), DPMpp(3)):
            solver.reset()
            assert torch.allclose(solver.step(den, x, t, s, None), want, atol=1e-13)
        if isinstance(path, Linear):
            assert torch.allclose(Euler().step(den, x, t, s, None), want, atol=1e-13)


@pytest.mark.parametrize("solver", FLOW + LAM, ids=repr)
def test_a_sample_depends_on_its_seed_alone(solver):
    """Batches one after another, other companions, other order: as with Euler."""
    path = VP.cosine()
    den = Denoiser(mixture().net(path, "v"), path, "v")
    go = lambda seeds, **k: sample(den, (3,), solver, uniform(5), seeds=seeds, **k)
    whole = go(range(10))
    for other, rows in ((go(range(10), batch=3), slice(None)), (go([7, 2]), [7, 2])):
        assert torch.allclose(whole.x[rows], other.x, atol=1e-5)
        assert other.nfe == whole.nfe
    assert whole.x.dtype == torch.float32


@pytest.mark.parametrize(
    "solver, whole, ended",
    [(Heun(), 10, 9), (Midpoint(), 10, 10), (RK4(), 20, 18), (AB2(), 5, 5)]
    + [(DPMSolver(2), 10, 8), (DPMSolver(3), 15, 11), (DPMpp(3), 5, 5), (DPMSolver([3, 2, 2, 1, 1]), 9, 7)],
    ids=repr,
)
def test_nfe_is_counted_and_the_end_has_a_lower_order(solver, whole, ended):
    """Away from the ends all evaluations are made; x0 at t = 0 and an infinite lam take some away."""
    path = Linear()
    den = Denoiser(mixture().net(path, "x0"), path, "x0")
    z = normal(4, 1)
    assert sample(den, (1,), solver, uniform(5, 0.9, 0.1), x=z).nfe == whole
    assert sample(den, (1,), solver, uniform(5), x=z).nfe == ended
    more = sample(den, (1,), solver, uniform(5, 0.9, 0.1), x=z, final="denoise")
    assert more.nfe == whole + 1


def test_heun_and_rk4_fall_back_at_the_data():
    x = normal(6, 2)
    for path, predicts, falls in [
        (Linear(), "x0", True), (Linear(), "eps", True), (Linear(), "flow", False), (Linear(), "v", False),
        (VP.cosine(), "v", False), (VP.linear(), "v", True), (VP.sigmoid(), "v", True),
    ]:
        for solver, lower in ((Heun(), Euler()), (RK4(), Midpoint())):
            den = Denoiser(Fake(), path, predicts)
            same = torch.equal(solver.step(den, x, 0.2, 0.0, None), lower.step(den, x, 0.2, 0.0, None))
            assert same == falls, (path, predicts, solver)


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_as_in_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    x = z = normal(3, 1, 4, 4).float()
    for stamp, t in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        x = scheduler.step(Fake()(x, torch.full((3,), t)), stamp, x).prev_sample
    den = Denoiser(Fake(), Linear(), "flow")
    ours = sample(den, (1, 4, 4), Euler(), explicit(scheduler.sigmas.tolist()), x=z)
    assert (ours.x - x).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [3, 10])
def test_flow_heun_as_in_diffusers_with_its_last_step_of_eulers(steps):
    """Theirs never looks at t = 0. Ours looks if the network predicts the flow, and not for eps."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(1000)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    times = [*dict.fromkeys(sigmas)]
    times[0] = min(times[0], 0.999)  # eps alone does not give x0 at 1

    def flow(x, t):  # of a network that predicts eps, on the linear path
        return (Fake()(x, torch.full((len(x),), t)) - x) / (1 - t)

    scheduler.sigmas = torch.tensor([times[0], *(s for s in times[1:-1] for _ in (0, 1)), 0.0])
    x = z = normal(3, 1, 4, 4).float()
    for i, stamp in enumerate(scheduler.timesteps):
        x = scheduler.step(flow(x, scheduler.sigmas[i].item()), stamp, x).prev_sample
    ours = sample(Denoiser(Fake(), Linear(), "eps"), (1, 4, 4), Heun(), explicit(times), x=z)
    assert ours.nfe == len(scheduler.timesteps) == 2 * steps - 1
    assert (ours.x - x).abs().max() < 2e-5 * x.abs().max()


@pytest.mark.parametrize("method, solver", [("euler", Euler()), ("midpoint", Midpoint())])
@pytest.mark.parametrize("grid", [uniform(9), quadratic(5), cosine(6)])
def test_as_in_torchdiffeq(method, solver, grid):
    from torchdiffeq import odeint

    path, z = VP.cosine(), normal(6, 1)
    den = Denoiser(mixture().net(path, "v"), path, "v")
    theirs = odeint(lambda t, x: den.flow(x, float(t)), z, grid.times(path), method=method)[-1]
    assert torch.allclose(sample(den, (1,), solver, grid, x=z).x, theirs, atol=1e-12)


def test_rk4_is_the_classic_one_and_exact_on_cubics():
    """torchdiffeq's rk4 is the 3/8 rule, so the weights are checked on polynomials and on x' = x."""
    den = Denoiser(lambda x, t: t[:, None] ** 3 + 0 * x, Linear(), "flow")
    out = sample(den, (1,), RK4(), [0.9, 0.2], x=torch.zeros(1, 1, dtype=torch.float64)).x
    assert abs(out.item() - (0.2**4 - 0.9**4) / 4) < 1e-12
    h = -0.7
    den = Denoiser(lambda x, t: x, Linear(), "flow")
    out = sample(den, (1,), RK4(), [0.9, 0.2], x=torch.ones(1, 1, dtype=torch.float64)).x
    assert abs(out.item() - (1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24)) < 1e-12


def test_ab2_by_hand_with_unequal_steps_and_its_memory():
    den, t = Denoiser(Fake(), Linear(), "flow"), [0.9, 0.7, 0.6, 0.2]
    x, old, solver = normal(4, 2), None, AB2()
    want = x.clone()
    for k, (now, then) in enumerate(zip(t, t[1:])):
        f, h = den.flow(want, now), then - now
        w = h / (now - t[k - 1]) if k else 0
        want, old = want + h * ((1 + w / 2) * f - (w / 2) * old if k else f), f
    for _ in range(2):  # `sample` forgets between two runs
        got = sample(den, (2,), solver, t, x=x).x
        assert torch.allclose(got, want, atol=1e-14)
    solver.step(den, x, 0.5, 0.4, None)  # another road: no past, even without reset
    assert torch.equal(solver.step(den, x, 0.3, 0.2, None), x - (0.3 - 0.2) * den.flow(x, 0.3))


def test_order_lists_of_the_paper():
    """Lu et al. (2022), section 3.4, for every remainder."""
    assert [order_list(3, n) for n in (1, 2, 3)] == [[1], [2], [2, 1]]
    assert [order_list(3, n) for n in (9, 10, 11)] == [[3, 3, 2, 1], [3, 3, 3, 1], [3, 3, 3, 2]]
    assert [order_list(2, n) for n in (6, 7)] == [[2, 2, 2], [2, 2, 2, 1]]
    assert order_list(1, 4) == [1] * 4
    assert order_list(3, 10, path=Linear()) == [1, 3, 3, 2, 1]
    assert order_list(2, 8, path=VP.linear()) == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("order, nfe", list(itertools.product((1, 2, 3), (1, 2, 3, 4, 7, 10))))
def test_order_lists_spend_their_budget(order, nfe):
    z = normal(3, 1)
    for path in SMOOTH[:3]:
        den = Denoiser(mixture().net(path, "x0"), path, "x0")
        for orders, grid in (
            (order_list(order, nfe), lambda n: uniform(n, 0.98, 0.02)),
            (order_list(order, nfe, path), uniform),
        ):
            solver = DPMSolver(orders)
            for _ in range(2):  # reset begins the list again
                assert sample(den, (1,), solver, grid(len(orders)), x=z).nfe == nfe


def test_on_a_table_inner_times_are_entries():
    """A chain of 1000 is close to the path that it was cut from; where no entry is left the order falls."""
    path, smooth = VP.table(linear_betas()), VP.linear()
    z, grid = normal(20, 1), trailing(20)
    for order in (1, 2, 3):
        runs = []
        for p in (path, smooth):
            den = Denoiser(mixture().net(p, "x0"), p, "x0")
            runs.append(sample(den, (1,), DPMSolver(order), grid, x=z))
        assert (runs[0].x - runs[1].x).abs().max() < 0.1 and runs[0].nfe <= runs[1].nfe
    den = Denoiser(Fake(), path, "v")
    before = den.nfe
    near = DPMSolver(3).step(den, z, 0.002, 0.001, None)
    assert den.nfe - before == 1
    assert torch.equal(near, DDIM().step(den, z, 0.002, 0.001, None))
    DPMSolver(3).step(den, z, 0.003, 0.001, None)
    assert den.nfe - before == 4  # DDIM above, and one inner entry


@pytest.mark.parametrize("solver", FLOW, ids=repr)
def test_a_table_has_no_flow(solver):
    path = VP.table(cosine_betas())
    for predicts in ("v", "flow"):
        with pytest.raises(ValueError, match="a table has no derivative"):
            sample(Denoiser(Fake(), path, predicts), (1,), solver, trailing(5), n=2)


@pytest.mark.parametrize("solver", [DPMSolver(2), DPMpp(2)], ids=repr)
def test_between_two_entries_of_a_table(solver):
    den = Denoiser(Fake(), VP.table(linear_betas(10)), "v")
    with pytest.raises(ValueError, match=r"values at t = i/10 only"):
        sample(den, (1,), solver, uniform(3), n=2)


def bad(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("order", [0, 4, -1, 2.0, 1.5, True, "2", None])
def test_orders_that_do_not_exist(order):
    bad(lambda: DPMSolver(order), "1, 2, 3 or a list of them is allowed")
    bad(lambda: DPMSolver([1, order]), "a list of 1, 2 and 3 is allowed")
    bad(lambda: DPMpp(order), "1, 2 or 3 is allowed")
    bad(lambda: order_list(order, 5), "1, 2 or 3 is allowed")
    bad(lambda: DPMSolver([]), "1, 2, 3 or a list")


@pytest.mark.parametrize("order", [1, 2])
def test_only_order_three_can_be_halved(order):
    bad(lambda: DPMpp(order, halved=True), r"DPMpp\(3, halved=True\) alone")
    bad(lambda: DPMpp(3, halved="yes"), "halved='yes'")


@pytest.mark.parametrize("nfe", [0, -3, 2.5, True, "4"])
def test_budgets_that_do_not_exist(nfe):
    bad(lambda: order_list(2, nfe), "a whole number >= 1")


def test_lists_of_another_length():
    den = Denoiser(Fake(), Linear(), "flow")
    for orders, message in (([2, 1], "2 orders for 3 steps"), ([1] * 4, "4 orders for 3 steps")):
        for grid in (uniform(3), uniform(3, 0.9, 0.1)):  # to the data, and to an end before them
            bad(lambda: sample(den, (1,), DPMSolver(orders), grid, n=2), message)
    assert den.nfe == 0
    solver = DPMSolver([1])  # stepped by hand
    solver.step(den, torch.zeros(2, 1), 0.9, 0.5, None)
    bad(lambda: solver.step(den, torch.zeros(2, 1), 0.5, 0.1, None), "1 orders for 2 steps")


def test_crossed_lambda_limits():
    for path in (Linear(), VP.cosine(), VP.linear()):
        bad(lambda: logsnr(5, 0.05, 0.001, lam_max=0.5).times(path), "do not decrease.*wider range")
        bad(lambda: logsnr(5, 0.999, 0.98, lam_max=0.5).times(path), "do not decrease.*wider range")
    bad(lambda: logsnr(5, lam_max=0.0), "positive")


def test_start_without_a_value_says_where_to_go():
    path = VP.sigmoid()
    for predicts in ("v", "flow"):
        den = Denoiser(Fake(), path, predicts)
        bad(lambda: sample(den, (1,), Heun(), uniform(3), n=2), "no value at t = 1.0.*start=0.999.*DPMpp")
    den = Denoiser(Fake(), Linear(), "eps")
    for solver in FLOW + LAM:
        bad(lambda: sample(den, (1,), solver, uniform(3), n=2), "not determined by 'eps' at t")


def test_names_are_short_and_stable():
    made = FLOW + LAM + [DPMSolver((3, 2, 1))]
    names = "Heun() Midpoint() RK4() AB2() DPMSolver(1) DPMSolver(2) DPMSolver(3) DPMpp(1) DPMpp(2) DPMpp(3)"
    assert [repr(s) for s in made] == [*names.split(), "DPMpp(3, halved=True)", "DPMSolver([3, 2, 1])"]
    den = Denoiser(Fake(), Linear(), "flow")
    for s in made[:-1]:
        sample(den, (1,), s, uniform(3), n=2)
    assert [repr(s) for s in made[:-1]] == [*names.split(), "DPMpp(3, halved=True)"]


@pytest.mark.parametrize("solver", [AB2(), RK4(), DPMSolver(3), DPMpp(3)], ids=repr)
def test_the_time_is_spent_in_the_network(solver):
    den = Denoiser(UNet(), VP.cosine(), "v")
    ratios = []
    for _ in range(3):
        with NetworkTime(den.net) as inside:
            out = sample(den, (1, 8, 8), solver, uniform(2, 0.9, 0.1), seeds=range(64))
        ratios.append(out.seconds / inside.seconds)
    assert min(ratios) < 1.1, ratios


def test_the_note_on_the_third_order_prints_what_its_script_prints():
    import subprocess
    import sys
    from pathlib import Path

    book = Path(__file__).resolve().parents[1] / "book"
    made = subprocess.run([sys.executable, book / "_static" / "third_order.py"], capture_output=True, text=True, check=True).stdout
    note = (book / "third_order.md").read_text().splitlines()
    assert all(line in note for line in made.splitlines())
    orders = [[float(p) for p in line.split("orders")[1].split()] for line in made.splitlines()]
    assert all(abs(p - 2) < 0.15 for p in orders[0]) and all(abs(p - 3) < 0.3 for p in orders[1])
    assert abs(orders[2][-1] - 1) < 0.15, "the stochastic branch as released"
    assert abs(orders[3][-1] - 2) < 0.15 and abs(orders[4][-1] - 2) < 0.2
    assert orders[5][-1] < -5, "the factor without the sign explodes"


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"])
def test_the_stochastic_third_order_of_diffusers_is_as_the_note_says(kind):
    """The weight of its second difference tends to -1; with + 0.5 it would tend to h / 3."""
    import diffusers

    scheduler = getattr(diffusers, kind)(1000, solver_order=3, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(100)
    scheduler.sigmas = torch.exp(-torch.arange(101, dtype=torch.float64) * 0.1)
    scheduler._step_index, h, zero = 50, 0.1, torch.zeros(1, dtype=torch.float64)
    square = [zero + (k * h) ** 2 for k in (2, 1, 0)]  # a guess that is lam^2 from now on, oldest first
    found = scheduler.multistep_dpm_solver_third_order_update(square, sample=zero, noise=zero)
    alpha = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[51])[0]
    share = (1 - math.exp(-2 * h) - 2 * h) / (2 * h) ** 2
    assert (found / alpha).item() == pytest.approx((share - 0.5) * h**2, rel=1e-6)
    assert share - 0.5 == pytest.approx(-0.968, abs=1e-3) and share + 0.5 == pytest.approx(0.032, abs=1e-3)
    assert share + 0.5 == pytest.approx(h / 3, rel=0.1)
