"""The paths against 50-digit arithmetic and the tables of diffusers."""
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcourse.paths import (
    PREDICTIONS,
    VP,
    Linear,
    Prediction,
    cosine_betas,
    linear_betas,
    path_from,
)

mpmath.mp.dps = 50
SMOOTH = {
    "linear": Linear(),
    "vp_linear": VP.linear(),
    "cosine": VP.cosine(),
    "cosine_s": VP.cosine(0.008),
    "sigmoid": VP.sigmoid(),
    "sigmoid_steep": VP.sigmoid(-2, 4, 0.5),
}
TIMES = [1e-6, 1e-3, 0.1, 0.25, 0.5, 0.77, 0.999, 1 - 1e-6]


def reference(name, t):  # alpha^2 and sigma^2 by definition, 50 digits
    t = mpmath.mpf(t)
    if name == "linear":
        return (1 - t) ** 2, t**2
    if name == "vp_linear":
        a2 = mpmath.exp(-mpmath.mpf("19.9") * t**2 / 2 - t * mpmath.mpf("0.1"))
    elif name.startswith("cosine"):
        s = mpmath.mpf("0.008") if name == "cosine_s" else mpmath.mpf(0)
        f = lambda u: mpmath.cos((u + s) / (1 + s) * mpmath.pi / 2) ** 2
        a2 = f(t) / f(mpmath.mpf(0))
    else:
        start, end, tau = (-3, 3, 1) if name == "sigmoid" else (-2, 4, mpmath.mpf("0.5"))
        g = lambda u: 1 / (1 + mpmath.exp(-(start + u * (end - start)) / tau))
        a2 = (g(1) - g(t)) / (g(1) - g(0))
    return a2, 1 - a2


@pytest.mark.parametrize("name", SMOOTH)
def test_closed_forms(name):
    path = SMOOTH[name]
    for t in TIMES:
        a2, s2 = reference(name, t)
        a, s = mpmath.sqrt(a2), mpmath.sqrt(s2)
        lam = mpmath.log(a / s)
        da = mpmath.diff(lambda u: mpmath.sqrt(reference(name, u)[0]), mpmath.mpf(t))
        ds = mpmath.diff(lambda u: mpmath.sqrt(reference(name, u)[1]), mpmath.mpf(t))
        got = {
            "alpha": (path.alpha(t), a),
            "sigma": (path.sigma(t), s),
            "dalpha": (path.dalpha(t), da),
            "dsigma": (path.dsigma(t), ds),
            "lam": (path.lam(t), lam),
            "dlam": (path.dlam(t), da / a - ds / s),
        }
        for what, (value, truth) in got.items():
            # relative to the value, and to how a rounded t moves it at the end
            slack = 1e-12 + 4e-16 / min(t, 1 - t)
            error = abs(mpmath.mpf(value.item()) - truth)
            assert error <= slack * max(1, abs(truth)), (name, what, t, error)
        back = path.t_of_lam(path.lam(t)).item()
        assert abs(back - t) < 1e-12, (name, t, back)


@pytest.mark.parametrize("name", SMOOTH)
def test_float32_keeps_its_digits(name):
    path, t = SMOOTH[name], torch.tensor([1e-3, 0.3, 0.9])
    for what in ("alpha", "sigma", "lam"):
        single, double = (getattr(path, what)(u) for u in (t, t.double()))
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), double, rtol=2e-6, atol=1e-6), what


def test_ends():
    for name, path in SMOOTH.items():
        assert path.alpha(0.0) == 1 and path.sigma(0.0) == 0
        if name != "vp_linear":
            assert path.alpha(1.0) == 0 and abs(path.sigma(1.0) - 1) < 1e-15


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
def test_tables_of_diffusers(kind):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_schedule=kind)
    betas = linear_betas() if kind == "linear" else cosine_betas()
    assert torch.allclose(betas.float(), theirs.betas, rtol=2e-4, atol=1e-8)
    ours = VP.table(betas).alphas_cumprod.float()
    assert torch.allclose(ours, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    # exactly theirs, once their betas are ours
    same = VP.table(theirs.betas).alphas_cumprod.float()
    assert torch.allclose(same, theirs.alphas_cumprod, rtol=1e-5, atol=1e-9)


def test_table_is_a_table():
    table = VP.table(linear_betas(100))
    t = torch.arange(0, 101).double() / 100
    assert table.alpha(t)[0] == 1 and table.sigma(t)[0] == 0
    assert torch.allclose(table.alpha(t[1:]) ** 2, table.alphas_cumprod, rtol=1e-14)
    assert torch.equal(table.t_of_lam(table.lam(t[1:])), t[1:])
    assert table.alpha(t[1:].float()).dtype == torch.float32
    for call in (lambda: table.alpha(0.505), lambda: table.dalpha(0.5)):
        with pytest.raises(ValueError, match="smooth path|VP.linear"):
            call()
    for bad in ([], [0.1, 1.0], [0.0], [-0.1]):
        with pytest.raises(ValueError, match="betas"):
            VP.table(bad)


def test_table_tends_to_the_smooth_path():
    gaps = []
    for n in (100, 200, 400):
        betas = (0.1 + torch.arange(1, n + 1) / n * 19.9) / n
        t = torch.arange(1, n + 1).double() / n
        gaps.append((VP.table(betas).alpha(t) - VP.linear().alpha(t)).abs().max())
    assert 1.8 < gaps[0] / gaps[1] < 2.2 and 1.8 < gaps[1] / gaps[2] < 2.2


@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("said", PREDICTIONS)
def test_conversions(path, said):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 32, 2, 3, generator=g, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 32, dtype=torch.float64)
    x = path.add_noise(x0, eps, t)
    p = Prediction(x, t, path.target(said, x0, eps, t), said, path)
    for want in PREDICTIONS:
        truth = path.target(want, x0, eps, t)
        assert torch.allclose(getattr(p, want), truth, rtol=1e-10, atol=1e-10), want


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0, 1), said=st.sampled_from(["v", "flow"]))
def test_v_and_flow_are_right_at_every_time(t, said):
    """v on the circle and flow on the line have no bad time, the ends included."""
    path = VP.cosine() if said == "v" else Linear()
    x0, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    p = Prediction(path.add_noise(x0, eps, t), t, path.target(said, x0, eps, t), said, path)
    assert torch.allclose(p.x0, x0, atol=1e-12) and torch.allclose(p.eps, eps, atol=1e-12)


@pytest.mark.parametrize(
    "path, t, said, want",
    [
        (Linear(), 1.0, "eps", "x0"),
        (VP.cosine(), 1.0, "eps", "flow"),
        (Linear(), 0.0, "x0", "eps"),
        (VP.cosine(), 0.0, "x0", "score"),
        (VP.linear(), 0.0, "flow", "x0"),
    ],
)
def test_undetermined_conversions_are_refused(path, t, said, want):
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match="not determined.*predict 'v'|has no value"):
        getattr(Prediction(z, t, z, said, path), want)
    # one bad sample in a batch is enough
    times = torch.tensor([0.5, t])
    with pytest.raises(ValueError, match="not determined"):
        getattr(Prediction(z, times, z, said, path), want)


def test_bad_input():
    for bad in (-0.1, 1.5, float("nan"), torch.tensor([0.5, 2.0])):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            Linear().alpha(bad)
    with pytest.raises(ValueError, match="eps.*x0.*v.*flow.*score"):
        Linear().target("noise", torch.ones(1), torch.ones(1), 0.5)
    with pytest.raises(ValueError, match="VPCosine"):
        path_from({"path": "VPQuadratic"})
    wrong = {"beta_min=2": lambda: VP.linear(2, 1), "s=-1": lambda: VP.cosine(-1), "start=1": lambda: VP.sigmoid(1, 0)}
    for says, make in wrong.items():
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.parametrize("path", [*SMOOTH.values(), VP.table(linear_betas(10))])
def test_config_round_trip(path):
    import json

    again = path_from(json.loads(json.dumps(path.config())))
    assert again.alpha(0.5) == path.alpha(0.5) and repr(again) == repr(path)
    assert math.isclose(again.sigma(0.1).item(), path.sigma(0.1).item())
