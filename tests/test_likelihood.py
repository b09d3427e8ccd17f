"""The density of a flow against mixtures, Gaussians and the known variance of random signs."""

import math

import pytest
import scipy.stats
import torch

import diffcourse as dc
from diffcourse.flow_matching import log_likelihood as where_it_was
from diffcourse.likelihood import log_likelihood
from diffcourse.paths import VP, Linear
from diffcourse.playground import MLP, mixture
from diffcourse.sampling import Denoiser, Euler, sample, uniform

MIX, LINE = mixture(), Linear()
PATHS = [Linear(), VP.cosine()]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP().double()


def test_it_is_found_where_it_was():
    assert dc.log_likelihood is log_likelihood is where_it_was


X = torch.linspace(-2.2, 2.0, 22, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("predicts", ["flow", "v"])
@pytest.mark.parametrize("path", PATHS)
def test_log_likelihood_is_that_of_the_mixture_with_order_four(path, predicts):
    den, errors = Denoiser(MIX.net(path, predicts), path, predicts), []
    for n in (60, 120):
        den.nfe = 0
        value = log_likelihood(den, X, uniform(n))
        errors.append((value - MIX.log_prob(X)[:, 0]).abs().max())
        assert den.nfe == 4 * n and value.dtype == X.dtype and value.shape == (len(X),)
    order = (torch.stack(errors[:-1]) / torch.stack(errors[1:])).log2()
    assert errors[-1] < 1e-5 and abs(order.item() - 4) < 0.4


def test_log_likelihood_of_a_part_of_the_way():
    """Where the grid ends above 0, the density is that of the data noised so far."""
    path = VP.cosine()
    den = Denoiser(MIX.net(path, "eps"), path, "eps")
    value = log_likelihood(den, X, uniform(60, start=0.9999, end=0.1))
    assert (value - MIX.at(path, 0.1).log_prob(X)[:, 0]).abs().max() < 1e-3
    assert (value - MIX.log_prob(X)[:, 0]).abs().max() > 0.1


def test_log_likelihood_starts_from_the_noise_of_the_sampler():
    """VP.linear() keeps a little data at t = 1; the sampler ignores it, and so does the density."""
    path = VP.linear()
    den = Denoiser(MIX.net(path, "flow"), path, "flow")
    value = log_likelihood(den, X, uniform(80))[:, None]
    z = MIX.flow_map(X, 0.0, 1.0, path)
    prior = torch.distributions.Normal(0.0, float(path.sigma(1.0))).log_prob(z)
    want = MIX.log_prob(X) - MIX.at(path, 1.0).log_prob(z) + prior
    assert (value - want).abs().max() < 1e-4
    assert (value - MIX.log_prob(X)).abs().max() > 1e-3


def test_any_network_has_a_density_that_sums_to_one():
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)[:, None]
    den = Denoiser(mlp(3), LINE, "flow")
    p = log_likelihood(den, x, uniform(12)).exp()
    assert torch.trapezoid(p, x[:, 0]).item() == pytest.approx(1, abs=1e-6)
    out = sample(den, (1,), Euler(), uniform(100), x=rand(5_000, 1))
    cdf = torch.cumulative_trapezoid(p, x[:, 0])
    z = torch.searchsorted(x[1:, 0].contiguous(), out.x[:, 0].contiguous()).clamp(max=len(cdf) - 1)
    assert scipy.stats.kstest(cdf[z].numpy(), "uniform").pvalue > 1e-3


C = torch.tensor([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.5]], dtype=torch.float64)
ASKEW = torch.tensor([[0.0, 0.7, 0.0], [-0.7, 0.0, 0.3], [0.0, -0.3, 0.0]], dtype=torch.float64)


def gaussian_flow(x, t):  # exact velocity for data N(0, C)
    t = t[0]
    eye = torch.eye(3, dtype=x.dtype)
    var = (1 - t) ** 2 * C + t**2 * eye
    return x @ torch.linalg.solve(var, t * eye - (1 - t) * C)


def test_exact_divergence_in_three_dimensions():
    x = rand(20, 3)
    want = torch.distributions.MultivariateNormal(torch.zeros(3).double(), C).log_prob(x)
    den = Denoiser(gaussian_flow, LINE, "flow")
    assert (log_likelihood(den, x, uniform(40)) - want).abs().max() < 1e-5
    images = Denoiser(lambda x, t: gaussian_flow(x.flatten(1), t).view_as(x), LINE, "flow")
    assert torch.allclose(log_likelihood(images, x.view(20, 1, 1, 3)), want, atol=1e-5)


def test_hutchinson_is_unbiased_and_has_the_known_variance():
    """One step, one point, a constant Jacobian A: the variance is that of v A v."""
    A = C + ASKEW

    def field(x, t):
        return x @ A.T

    x = rand(1, 3).expand(20_000, 3)
    den, grid = Denoiser(field, LINE, "flow"), uniform(2)
    exact = log_likelihood(den, x[:1], grid)
    for k in (1, 4):
        guess = log_likelihood(den, x, grid, probes=k, seed=1)
        sym = (A + A.T) / 2
        var = 2 * (sym.square().sum() - sym.diag().square().sum()) / k
        assert (guess.mean() - exact).abs() < 5 * (var / len(x)) ** 0.5
        assert guess.var() == pytest.approx(var.item(), rel=0.06)
    again, other = (log_likelihood(den, x[:9], grid, probes=1, seed=s) for s in (1, 2))
    assert torch.equal(again, log_likelihood(den, x[:9], grid, probes=1, seed=1))
    assert not torch.equal(again, other)


def test_in_one_dimension_a_random_sign_is_exact():
    den = Denoiser(MIX.net(LINE, "flow"), LINE, "flow")
    a, b = (log_likelihood(den, X, uniform(8), probes=k) for k in (None, 3))
    assert torch.allclose(a, b, atol=1e-12)


def test_log_likelihood_leaves_the_network_as_it_was():
    net = mlp()
    net.train()
    log_likelihood(Denoiser(net, LINE, "flow"), X, uniform(2))
    assert net.training and all(p.grad is None for p in net.parameters())
    x = X.clone().requires_grad_()
    assert not log_likelihood(Denoiser(net, LINE, "flow"), x, uniform(2)).requires_grad
    net.float()
    with torch.no_grad():
        value = log_likelihood(Denoiser(net, LINE, "flow"), X.float(), [1.0, 0.5, 0.0])
    assert value.dtype == torch.float32


def test_bad_input():
    den = Denoiser(MIX.net(LINE, "flow"), LINE, "flow")
    with pytest.raises(ValueError, match="probes=0"):
        log_likelihood(den, X, probes=0)
    with pytest.raises(ValueError, match="not finite"):
        log_likelihood(den, torch.full((2, 1), math.nan))
    path = VP.linear()
    for predicts, match in [("v", "has no value"), ("x0", "has no value|not determined")]:
        with pytest.raises(ValueError, match=match):
            log_likelihood(Denoiser(MIX.net(path, predicts), path, predicts), X)
    with pytest.raises(RuntimeError, match="floating"):
        log_likelihood(den, torch.ones(2, 1, dtype=torch.long))
