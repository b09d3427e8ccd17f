"""The adaptive pair: its tolerance, scipy's answer, each sample of a batch, ends and flows it cannot do."""

import numpy as np
import pytest
import torch

from diffcourse.adaptive import RK45
from diffcourse.paths import VP, Linear
from diffcourse.playground import mixture, stratified_normal
from diffcourse.sampling import Denoiser, sample, uniform
from test_ddim import Fake, normal


def exact(path, z, t, s):
    return mixture().flow_map(path.sigma(t) * z, t, s, path)


@pytest.mark.parametrize("path", [Linear(), VP.cosine()], ids=repr)
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_every_sample_keeps_the_tolerance(path, tol):
    den = Denoiser(mixture().net(path, "flow"), path, "flow")
    z = stratified_normal(40)[:, None]
    out = sample(den, (1,), RK45(tol, tol), uniform(1, 0.98, 0.02), x=path.sigma(0.98) * z)
    assert (out.x - exact(path, z, 0.98, 0.02)).abs().max() < 10 * tol
    assert out.nfe > 6


def test_the_answer_of_scipy():
    from scipy.integrate import solve_ivp

    path, x = Linear(), normal(5, 3)
    den = Denoiser(Fake(), path, "flow")
    f = lambda t, y: den.flow(torch.from_numpy(y.reshape(5, 3)), float(t)).numpy().ravel()
    theirs = solve_ivp(f, (1.0, 0.0), x.numpy().ravel(), rtol=1e-9, atol=1e-9).y[:, -1]
    ours = sample(den, (3,), RK45(1e-8, 1e-8), uniform(1), x=x).x
    assert np.allclose(ours.numpy().ravel(), theirs, atol=1e-7)


def test_one_hard_sample_among_easy_ones_is_not_averaged_away():
    """A flow that turns fast for large states only."""
    class Net:
        def __call__(self, x, t):
            return torch.where(x.abs() > 2, torch.cos(10 * t)[:, None], 0.0 * x)

    den = Denoiser(Net(), Linear(), "flow")
    x = torch.zeros(500, 1, dtype=torch.float64)
    x[7] = 10.0
    out = sample(den, (1,), RK45(1e-4, 1e-4), uniform(1), x=x).x
    assert out[7].item() == pytest.approx(10 - np.sin(10) / 10, abs=1e-3)


def test_nfe_is_that_of_the_batch_that_took_most_and_seeds_agree_within_the_tolerance():
    path = Linear()
    den = Denoiser(mixture().net(path, "flow"), path, "flow")
    whole = sample(den, (1,), RK45(1e-4, 1e-4), uniform(1), range(40))
    parts = sample(den, (1,), RK45(1e-4, 1e-4), uniform(1), range(40), batch=3)
    alone = [sample(den, (1,), RK45(1e-4, 1e-4), uniform(1), [*range(k, min(k + 3, 40))]).nfe for k in range(0, 40, 3)]
    assert parts.nfe == max(alone) and len({*alone}) > 1
    assert (whole.x - parts.x).abs().max() < 5e-3


@pytest.mark.parametrize("make, says", [
    (lambda: RK45(0), "both above 0"), (lambda: RK45(1e-3, -1), "both above 0"), (lambda: RK45(float("nan")), "both above 0"), (lambda: RK45(float("inf")), "finite"),
    (lambda: RK45(most=0), "most"),
])
def test_tolerances_that_are_none(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_it_cannot_do_is_said():
    path = Linear()
    den = Denoiser(mixture().net(path, "flow"), path, "flow")
    with pytest.raises(ValueError, match="did not get from t = 1.0 to 0.0.*max_num_steps.*most="):
        sample(den, (1,), RK45(1e-10, 1e-10, most=60), uniform(1), n=4)
    broken = Denoiser(lambda x, t: x / 0, path, "flow")
    with pytest.raises(ValueError, match="did not get from"):
        sample(broken, (1,), RK45(), uniform(1), n=4)
    with pytest.raises(ValueError, match="looks at the end t = 0.0.*final='denoise'"):
        sample(Denoiser(mixture().net(path, "x0"), path, "x0"), (1,), RK45(), uniform(1), n=4)
    steep = VP.sigmoid()
    with pytest.raises(ValueError, match="flow has no value at t = 1.0"):
        sample(Denoiser(mixture().net(steep, "flow"), steep, "x0"), (1,), RK45(), uniform(1, end=0.1), n=4)


def test_with_a_last_guess_it_needs_no_flow_at_the_data():
    path = VP.cosine()
    den = Denoiser(mixture().net(path, "x0"), path, "x0")
    z = stratified_normal(20)[:, None]
    out = sample(den, (1,), RK45(), uniform(1, 0.999, 0.001), x=path.sigma(0.999) * z, final="denoise")
    assert (out.x - exact(path, z, 0.999, 0.0)).abs().mean() < 0.01
