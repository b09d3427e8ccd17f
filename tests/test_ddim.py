"""DDIM against diffusers step for step, against DDPM's posterior, and against the exact flow."""
import math

import pytest
import torch

from diffcourse.ddim import DDIM
from diffcourse.ddpm import DDPM
from diffcourse.inversion import invert, slerp
from diffcourse.paths import VP, Linear, cosine_betas, linear_betas
from diffcourse.playground import mixture, stratified_normal, wasserstein1
from diffcourse.sampling import Denoiser, Euler, leading, linspace, sample, trailing, uniform

NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
GRIDS = {"leading": leading, "trailing": trailing, "linspace": linspace}


class Fake:
    """A deterministic stand-in for a network, with a different answer each time."""

    def __call__(self, x, t):
        return torch.tanh(x) * (0.3 + t.view(-1, *[1] * (x.ndim - 1)))


def normal(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def theirs(spacing, steps, predicts="eps", clip=None, schedule="linear", table=1000, offset=0):
    """diffusers' scheduler, with its float32 table replaced by the same one in float64."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        table,
        beta_schedule=schedule,
        prediction_type=NAMES[predicts],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    scheduler.set_timesteps(steps)
    path = VP.table(scheduler.betas)
    assert (scheduler.alphas_cumprod - path.alphas_cumprod).abs().max() < 1e-5
    scheduler.alphas_cumprod = path.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler, path


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("table", [1000, 77])
@pytest.mark.parametrize("offset", [0, 1])
def test_grids_are_those_of_diffusers(spacing, table, offset):
    if offset and spacing == "linspace":
        return  # it has none
    scheduler, path = theirs(spacing, 1, table=table, offset=offset)
    for steps in [1, 2, 3, 5, 6, 7, 10, 13, 20, 30, 48, 66, 73, 100, 333, 501, 999]:
        if steps > table // (1 + offset):
            continue
        scheduler.set_timesteps(steps)
        grid = GRIDS[spacing](steps, table, **({"offset": 1} if offset else {}))
        times = grid.times(path)
        entries = (times * table).round() - 1
        assert entries[:-1].tolist() == scheduler.timesteps.tolist(), steps
        assert times[-1] == 0 and grid.start == times[0] and grid.steps == steps
        assert (times * table - entries - 1).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [3, 5, 7, 10, 20, 25, 50, 100, 1000])
def test_trailing_too(steps):
    scheduler, path = theirs("trailing", steps)
    entries = (trailing(steps).times(path)[:-1] * 1000).round() - 1
    assert entries.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [10, 7])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("predicts", NAMES)
def test_step_for_step_equal_to_diffusers(predicts, spacing, eta, clip, steps):
    schedule = "linear" if steps == 10 else "squaredcos_cap_v2"
    scheduler, path = theirs(spacing, steps, predicts, clip, schedule)
    den, solver = Denoiser(Fake(), path, predicts), DDIM(eta, clip)
    x, clipped = normal(3, 1, 4, 4), 0
    for i, stamp in enumerate(scheduler.timesteps.tolist()):
        t = (stamp + 1) / 1000
        s = max(stamp + 1 - 1000 // steps, 0) / 1000  # where theirs goes
        out = Fake()(x, torch.full((3,), t, dtype=x.dtype))
        z = normal(*x.shape, seed=i + 1)
        want = scheduler.step(out, stamp, x, eta=eta, variance_noise=z if eta else None)
        ours = solver.step(den, x, t, s, lambda: z)
        assert torch.allclose(ours, want.prev_sample, rtol=1e-9, atol=1e-9), (t, s)
        clipped += clip is not None and bool((den.x0(x, t).abs() > clip).any())
        x = want.prev_sample
    assert clip is None or clipped  # else clipping was not tested


@pytest.mark.parametrize("spacing, equal", [("leading", True), ("trailing", True), ("linspace", False)])
def test_whole_run_beside_diffusers(spacing, equal):
    """With linspace theirs steps to a time that it does not visit next: it ends elsewhere."""
    scheduler, path = theirs(spacing, 10, "v")
    x = z = normal(3, 1, 4, 4)
    for stamp in scheduler.timesteps.tolist():
        out = Fake()(x, torch.full((3,), (stamp + 1) / 1000, dtype=x.dtype))
        x = scheduler.step(out, stamp, x).prev_sample
    den = Denoiser(Fake(), path, "v")
    ours = sample(den, (1, 4, 4), DDIM(), GRIDS[spacing](10), x=z)
    assert ((ours.x - x).abs().max() < 1e-9) == equal
    assert ours.nfe == 10


PATHS = [VP.table(linear_betas()), VP.table(cosine_betas()), VP.cosine(), VP.sigmoid(), Linear()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t, s", [(0.9, 0.899), (0.9, 0.5), (0.5, 0.1), (0.05, 0.001), (0.7, 0.0)])
def test_eta_one_is_the_posterior_at_any_stride(path, t, s):
    """Mean and variance by conditioning the joint Gaussian of x_s and x_t, given x_0."""
    x0, x = normal(5, 2), normal(5, 2, seed=1)
    den = Denoiser(lambda x, t: x0, path, "x0")
    a, b = path.alpha(t), path.alpha(s)
    var_s, var_t = path.sigma(s) ** 2, path.sigma(t) ** 2
    joint = a / b * var_s
    mean = b * x0 + joint / var_t * (x - a * x0)
    var = var_s - joint**2 / var_t
    got = DDIM(1.0).step(den, x, t, s, lambda: torch.zeros_like(x))
    more = DDIM(1.0).step(den, x, t, s, lambda: torch.ones_like(x))
    assert torch.allclose(got, mean, atol=1e-12)
    assert torch.allclose((more - got) ** 2, var.expand_as(x), atol=1e-12)
    half = [DDIM(0.5).step(den, x, t, s, lambda: f(x)) for f in (torch.zeros_like, torch.ones_like)]
    assert torch.allclose((half[1] - half[0]) ** 2, 0.25 * var.expand_as(x), atol=1e-12)


@pytest.mark.parametrize("path", [VP.cosine(), Linear()])
def test_eta_one_makes_the_samples_of_ddpm(path):
    den = Denoiser(mixture().net(path, "v"), path, "v")
    runs = [
        sample(den, (1,), solver, uniform(12), seeds=range(20))
        for solver in (DDPM("small"), DDIM(1.0), DDIM(0.9))
    ]
    assert (runs[0].x - runs[1].x).abs().max() < 1e-4
    assert (runs[0].x - runs[2].x).abs().max() > 1e-2


@pytest.mark.parametrize("path", [VP.linear(), VP.cosine(), Linear()])
def test_no_noise_is_a_first_order_solver(path):
    mix = mixture()
    z = stratified_normal(101)[:, None]
    den = Denoiser(mix.net(path, "v"), path, "v")
    exact = mix.flow_map(z, 1.0, 0.0, path)
    start = path.sigma(1.0) * z
    if path.alpha(1.0) > 0:
        exact = mix.flow_map(start, 1.0, 0.0, path)
    errors = []
    for steps in (40, 80, 160):
        out = sample(den, (1,), DDIM(), uniform(steps), x=start)
        errors.append((out.x - exact).abs().mean().item())
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert all(1.7 < r < 2.3 for r in ratios), errors
    assert errors[-1] < 0.02


def test_it_is_euler_in_another_clock():
    """One step is linear in sigma / alpha for x / alpha; on the linear path it is Euler in t."""
    x = normal(50, 1)
    for path in (VP.linear(), VP.cosine(), Linear()):
        den = Denoiser(mixture().net(path, "eps"), path, "eps")
        for t, s in ((0.9, 0.6), (0.6, 0.55), (0.3, 0.0)):
            a, b, u, v = path.alpha(t), path.alpha(s), path.sigma(t), path.sigma(s)
            want = b * (x / a + (v / b - u / a) * den.eps(x, t))
            assert torch.allclose(DDIM().step(den, x, t, s, None), want, atol=1e-12)
    den = Denoiser(mixture().net(Linear(), "flow"), Linear(), "flow")
    runs = [sample(den, (1,), solver, uniform(7), x=x).x for solver in (DDIM(), Euler())]
    assert (runs[0] - runs[1]).abs().max() < 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", [VP.cosine(), VP.table(linear_betas()), Linear()])
def test_every_member_has_the_same_marginals(eta, path):
    """With the true x_0 in place of the guess x_s is distributed as on the path, whatever eta."""
    n, t, s = 30_000, 0.8, 0.3
    x0 = mixture().sample(n, 1)[:, None]
    x = path.add_noise(x0, normal(n, 1), t)
    den = Denoiser(lambda x, t: x0, path, "x0")
    out = DDIM(eta).step(den, x, t, s, lambda: normal(n, 1, seed=2))
    rest = (out - path.alpha(s) * x0) / path.sigma(s)  # this should be new noise
    assert abs(rest.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((rest * x0).mean()) < 5 / math.sqrt(n)
    assert wasserstein1(out, mixture().at(path, s)) < 0.02
    kept = (rest * (x - path.alpha(t) * x0) / path.sigma(t)).mean()  # correlation of old and new
    assert (kept > 0.999) == (eta == 0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_reach_the_data(eta):
    path, mix, n = VP.cosine(), mixture(), 5_000
    den = Denoiser(mix.net(path, "v"), path, "v")
    floor = wasserstein1(mix.sample(n, 7), mix)
    far = [
        wasserstein1(sample(den, (1,), DDIM(eta), uniform(k), seeds=3, n=n).x, mix)
        for k in (5, 100)
    ]
    assert far[1] < 3 * floor and far[1] < far[0] / 4, (far, floor)


@pytest.mark.parametrize("path", [VP.cosine(), Linear()])
def test_inversion_returns_to_the_data(path):
    mix = mixture()
    x = mix.icdf((torch.arange(99) + 0.5) / 99)[:, None]
    den, errors, far = Denoiser(mix.net(path, "v"), path, "v"), [], []
    for steps in (40, 80, 160):
        up = invert(den, x, uniform(steps), trajectory=True)
        assert up.nfe == steps and up.times[0] == 0 and up.times[-1] == 1
        assert torch.equal(up.trajectory[0], x) and torch.equal(up.trajectory[-1], up.x)
        down = sample(den, (1,), DDIM(), uniform(steps), x=up.x)
        errors.append((down.x - x).abs().mean().item())
        exact = mix.flow_map(x, 0.0, 1.0, path)
        far.append((up.x - exact).abs().mean().item())
    for e in (errors, far):
        assert 1.7 < e[0] / e[1] < 2.3 and 1.7 < e[1] / e[2] < 2.3, e


def test_inversion_on_a_table_and_from_a_list_of_times():
    path = VP.table(linear_betas())
    den = Denoiser(mixture().net(path, "eps"), path, "eps")
    x = mixture().sample(30, 0)[:, None]
    for grid in (leading(20), linspace(20), trailing(20), [1.0, 0.5, 0.1, 0.0]):
        up = invert(den, x, grid)
        assert up.x.isfinite().all() and up.nfe == len(up.times) - 1
    with pytest.raises(ValueError, match="eps is not determined by 'x0'"):
        invert(Denoiser(lambda x, t: x, VP.cosine(), "x0"), x)


class Drops(torch.nn.Dropout):
    def forward(self, x, t):
        return super().forward(x)


def test_inversion_evaluates():
    """Dropout is off, no graph is kept, and the network is in training mode afterwards."""
    den, x = Denoiser(Drops(0.5), VP.cosine(), "v"), normal(30, 1).requires_grad_()
    once, again = invert(den, x, uniform(5)).x, invert(den, x, uniform(5)).x
    assert torch.equal(once, again) and not once.requires_grad and den.net.training


def test_no_noise_is_drawn_at_eta_zero():
    path = VP.cosine()
    den = Denoiser(mixture().net(path, "v"), path, "v")

    def refuse():
        raise AssertionError("drew noise")

    x = normal(4, 1)
    assert not DDIM().stochastic and DDIM(0.01).stochastic
    DDIM().step(den, x, 0.9, 0.5, refuse)
    DDIM(1.0).step(den, x, 0.9, 0.0, refuse)  # nor in the last step
    with pytest.raises(AssertionError, match="drew"):
        DDIM(0.01).step(den, x, 0.9, 0.5, refuse)


def test_first_step_from_pure_noise():
    """alpha = 0 at t = 1: nothing is divided by it, and no root of a negative number is taken."""
    for path in (VP.cosine(), VP.sigmoid(), Linear()):
        for predicts in ("x0", "v"):
            den = Denoiser(mixture().net(path, predicts), path, predicts)
            for s in (0.9, 0.37, 1e-3, 0.0):
                assert DDIM(1.0).step(den, normal(9, 1), 1.0, s, lambda: normal(9, 1)).isfinite().all()


def test_float32_stays_float32():
    path = VP.cosine()
    den = Denoiser(mixture().net(path, "v"), path, "v")
    for eta in (0.0, 1.0):
        assert sample(den, (1,), DDIM(eta), uniform(4), seeds=range(3)).x.dtype == torch.float32
    assert invert(den, torch.ones(3, 1)).x.dtype == torch.float32


def test_slerp_walks_on_an_arc():
    a, b = normal(200, 1, 8, 8), normal(200, 1, 8, 8, seed=1)
    norm = a.flatten(1).norm(dim=1)
    b = b * (norm / b.flatten(1).norm(dim=1))[:, None, None, None]
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    mid = slerp(a, b, 0.5)
    assert torch.allclose(mid.flatten(1).norm(dim=1), norm)
    angle = lambda u, v: torch.cosine_similarity(u.flatten(1), v.flatten(1)).arccos()
    third = slerp(a, b, 1 / 3)
    assert torch.allclose(3 * angle(a, third), angle(a, b), atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a)
    row = slerp(a[:1].float(), b[:1].float(), torch.linspace(0, 1, 5))
    assert row.shape == (5, 1, 8, 8) and row.dtype == torch.float32
    assert torch.allclose(row[2].double(), slerp(a, b, 0.5)[0], atol=1e-6)


def test_names():
    assert [repr(s) for s in (DDIM(), DDIM(0.5), DDIM(1), DDIM(0.5, 1.0), DDIM(clip=1.0))] == [
        "DDIM()",
        "DDIM(0.5)",
        "DDIM(1.0)",
        "DDIM(0.5, clip=1.0)",
        "DDIM(clip=1.0)",
    ]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: DDIM(1.5), "eta = 1.5"),
        (lambda: DDIM(-0.1), "0 .no noise. to 1"),
        (lambda: DDIM(math.nan), "eta = nan"),
        (lambda: DDIM(clip=0.0), "clip = 0.0"),
        (lambda: leading(0), "steps = 0: a whole number >= 1"),
        (lambda: leading(1001), "1 to 1000"),
        (lambda: linspace(51, 50), "1 to 50"),
        (lambda: leading(1000, offset=1), "0 to 0"),
        (lambda: leading(10, offset=-1), "0 to 99"),
        (lambda: slerp(normal(2, 3), normal(2, 4), 0.5), r"\(2, 4\)"),
        (lambda: slerp(normal(2, 3), normal(3, 3), 0.5), "an n of 1"),
        (lambda: slerp(normal(2, 3), normal(2, 3), torch.ones(3)), "an n of 1"),
        (lambda: slerp(normal(2, 3), -normal(2, 3), 0.5), "opposite"),
        (lambda: slerp(normal(2, 3), torch.zeros(2, 3).double(), 0.5), "zero"),
        (lambda: invert(Denoiser(Fake(), VP.cosine(), "v"), normal(2, 3), [0.0, 0.5]), "decreasing"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_noise_prediction_cannot_start_where_no_data_is_left():
    den = Denoiser(Fake(), VP.cosine(), "eps")
    with pytest.raises(ValueError, match="start=0.999"):
        sample(den, (2,), DDIM(), uniform(4), n=2)
