"""Everything that the mixture claims to know exactly, against scipy, autograd and brute force."""
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from diffcourse.paths import VP, Linear
from diffcourse.playground import MLP, GaussianMixture, mixture, stratified_normal, wasserstein1
from diffcourse.sampling import Denoiser, Euler, sample, uniform

F64 = torch.float64
PATHS = [VP.linear(), VP.cosine(), VP.cosine(0.008), VP.sigmoid(), Linear()]
HARD = GaussianMixture((-8.0, 0.0, 3.0), (0.01, 1.0, 0.2), (0.2, 0.5, 0.3))
MIXTURES = [mixture(), HARD, GaussianMixture([0.5], [0.4], [1.0])]


def grid(a, b, n):
    return torch.linspace(a, b, n, dtype=F64)


def parts(mix):
    return [a.numpy() for a in (mix.means, mix.stds, mix.weights)]


@pytest.mark.parametrize("mix", MIXTURES)
def test_density_and_distribution_against_scipy(mix):
    x = grid(-9, 6, 301)
    m, s, w = parts(mix)
    z = x.numpy()[:, None]
    norm = scipy.stats.norm(m, s)
    np.testing.assert_allclose(mix.pdf(x), (w * norm.pdf(z)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(mix.cdf(x), (w * norm.cdf(z)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(mix.sf(x), (w * norm.sf(z)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(mix.log_prob(x), scipy.special.logsumexp(np.log(w) + norm.logpdf(z), axis=1), rtol=1e-12)
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mix.cdf(y).sum(), y)
    np.testing.assert_allclose(slope, mix.pdf(x), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("mix", MIXTURES)
def test_quantiles_in_both_tails(mix):
    p = torch.tensor([1e-300, 1e-100, 1e-12, 1e-6, 0.1, 0.2, 0.5, 0.7, 0.9], dtype=F64)
    np.testing.assert_allclose(mix.cdf(mix.icdf(p)), p, rtol=2e-12)
    upper = mix._quantile(1 - p, p)
    np.testing.assert_allclose(mix.sf(upper), p, rtol=2e-12)
    x = mix.icdf(stratified := (torch.arange(5001).double() + 0.5) / 5001)
    assert (x.diff() > 0).all() and (mix.cdf(x) - stratified).abs().max() < 1e-14
    assert mix.icdf(0.0) == -torch.inf and mix.icdf(1.0) == torch.inf
    assert mix.icdf(torch.tensor([[0.5]], dtype=F64)).shape == (1, 1)


def test_moments_and_samples():
    for mix in MIXTURES:
        f = lambda x, k: float(mix.pdf(x)) * x**k
        ends = dict(limit=500, points=mix.means.tolist())
        mean = scipy.integrate.quad(f, -12, 12, (1,), **ends)[0]
        second = scipy.integrate.quad(f, -12, 12, (2,), **ends)[0]
        assert abs(mean - mix.mean()) < 1e-8 and abs((second - mean**2) ** 0.5 - mix.std()) < 1e-8
        x = mix.sample(4000, 3)
        assert x.shape == (4000,) and x.dtype == F64
        assert scipy.stats.kstest(x.numpy(), lambda v: mix.cdf(torch.as_tensor(v)).numpy()).pvalue > 1e-3
    mix = mixture()
    assert torch.equal(mix.sample(10, 1), mix.sample(10, 1)) and not torch.equal(mix.sample(10, 1), mix.sample(10, 2))
    assert 0.9 < mix.std() < 1.1  # figures of all chapters count on it


def test_samples_do_not_repeat_noise_of_the_same_seed():
    x = mixture().sample(20_000, 0)
    for draw in (torch.rand, torch.randn):
        other = draw(20_000, generator=torch.Generator().manual_seed(0), dtype=F64)
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.03


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("t", [0.03, 0.5, 0.97])
def test_posterior_against_quadrature(path, t):
    mix, x0 = mixture(), grid(-4, 4, 40_001)
    a, s = path.alpha(t), path.sigma(t)
    for x in (-2.0, -0.6, 0.0, 0.9, 2.5):
        weight = mix.pdf(x0) * (-(((x - a * x0) / s) ** 2) / 2).exp()
        weight = weight / weight.sum()
        want = {"x0": x0, "eps": (x - a * x0) / s}
        want["v"] = a * want["eps"] - s * x0
        want["flow"] = path.dalpha(t) * x0 + path.dsigma(t) * want["eps"]
        got = {"x0": mix.posterior_mean, "eps": mix.eps, "v": mix.v, "flow": mix.flow}
        for name, f in got.items():
            exact = float((weight * want[name]).sum())
            assert abs(float(f(x, t, path)) - exact) < 1e-9 * (1 + abs(exact)), name


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_score_is_the_slope_of_the_log_density(path):
    x = grid(-3, 3, 61).requires_grad_()
    for t in (0.0, 0.1, 0.6, 1.0):
        (slope,) = torch.autograd.grad(mixture().at(path, t).log_prob(x).sum(), x)
        assert torch.allclose(mixture().score(x, t, path), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_both_ends_are_finite_and_right(path):
    mix, x = mixture(), grid(-3, 3, 13)
    assert torch.allclose(mix.posterior_mean(x, 0.0, path), x, atol=1e-14)
    assert not mix.eps(x, 0.0, path).any()
    assert mix.flow(x, 0.0, path).isfinite().all()
    if path.alpha(1.0) == 0:
        assert torch.allclose(mix.posterior_mean(x, 1.0, path), mix.mean().expand(13))
        assert torch.allclose(mix.eps(x, 1.0, path), x)
    if isinstance(path, VP) and path.dsigma(1e-4).isfinite():
        near = mix.flow(x, 1e-7, path)
        assert torch.allclose(mix.flow(x, 0.0, path), near, atol=1e-3)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_flow_map_inverts_composes_and_moves_with_the_flow(path):
    mix, z = mixture(), grid(-7, 7, 57)
    start = mix.at(path, 0.98).std() * z
    data = mix.flow_map(start, 0.98, 0.0, path)
    back = mix.flow_map(data, 0.0, 0.98, path)
    # where a narrow component sends a long stretch to a short one, digits are lost in proportion
    h = 1e-6
    stretch = ((mix.flow_map(start + h, 0.98, 0.0, path) - data) / h).reciprocal().abs().clamp(1, 1e6)
    assert ((back - start).abs() / stretch).max() < 1e-12
    half = mix.flow_map(start, 0.98, 0.4, path)
    assert torch.allclose(mix.flow_map(half, 0.4, 0.0, path), data, atol=1e-12)
    ahead, behind = (mix.flow_map(half, 0.4, 0.4 + d, path) for d in (1e-5, -1e-5))
    assert torch.allclose((ahead - behind) / 2e-5, mix.flow(half, 0.4, path), atol=1e-6, rtol=1e-6)
    assert torch.equal(mix.flow_map(half, 0.4, 0.4, path).sort().values, mix.flow_map(half, 0.4, 0.4, path))


def test_flow_map_against_an_independent_solver():
    mix, path = mixture(), VP.linear()
    z = stratified_normal(9)
    f = lambda t, x: mix.flow(torch.as_tensor(x), float(t), path).numpy()
    end = scipy.integrate.solve_ivp(f, (1, 1e-3), z.numpy(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(mix.flow_map(z, 1.0, 1e-3, path), end, atol=1e-8)


def test_times_may_differ_by_sample():
    mix, path = mixture(), Linear()
    x, t, s = grid(-2, 2, 5), grid(0.1, 0.9, 5), grid(0.0, 0.5, 5)
    for f in (mix.posterior_mean, mix.score, mix.eps, mix.v, mix.flow):
        together = f(x[:, None], t, path)
        assert together.shape == (5, 1)
        alone = torch.stack([f(x[i], float(t[i]), path) for i in range(5)])
        assert torch.allclose(together[:, 0], alone, atol=1e-14)
        assert torch.allclose(f(x, t, path), alone, atol=1e-14)
    together = mix.flow_map(x[:, None], t, s, path)[:, 0]
    alone = torch.stack([mix.flow_map(x[i], float(t[i]), float(s[i]), path) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-13)
    assert mix.at(path, t).pdf(x).shape == (5, 5)
    assert torch.allclose(mix.at(path, t).pdf(x)[2], mix.at(path, float(t[2])).pdf(x))
    assert torch.allclose(mix.at(path, t).std()[2], mix.at(path, float(t[2])).std())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", "score"])
def test_loss_floor_against_double_quadrature(path, predicts):
    mix, t = mixture(), 0.3
    a, s = path.alpha(t), path.sigma(t)
    x0, x = grid(-4, 4, 4001), grid(-5, 5, 801)
    joint = mix.pdf(x0) * (-(((x[:, None] - a * x0) / s) ** 2) / 2).exp()
    eps = (x[:, None] - a * x0) / s
    target = path.target(predicts, x0.expand_as(eps), eps, t)
    mass = joint.sum(1)
    mean = (joint * target).sum(1) / mass
    exact = (joint * target**2).sum(1) - mass * mean**2
    exact = float(exact.sum() / mass.sum())
    assert abs(float(mix.loss_floor(path, t, predicts)) - exact) < 1e-7 * exact


def test_loss_floor_at_the_ends_and_for_many_times():
    mix = mixture()
    for path in PATHS:
        assert abs(float(mix.loss_floor(path, 0.0, "eps")) - 1) < 1e-9
        assert abs(float(mix.loss_floor(path, 0.0, "x0"))) < 1e-9
    assert abs(float(mix.loss_floor(Linear(), 1.0, "x0") - mix.std() ** 2)) < 1e-9
    t = grid(0.1, 0.9, 4)
    many = mix.loss_floor(Linear(), t, "flow")
    assert torch.allclose(many, torch.stack([mix.loss_floor(Linear(), float(u), "flow") for u in t]))
    single = GaussianMixture([0.5], [0.4], [1.0])  # posterior variance s^2 sigma^2 / V
    assert abs(float(single.loss_floor(Linear(), 0.5, "x0")) - 0.16 * 0.25 / (0.25 * 0.16 + 0.25)) < 1e-12


def test_wasserstein_against_scipy():
    g = np.random.default_rng(0)
    for n, m in ((50, 50), (50, 37), (7, 3000), (1, 5)):
        a, b = g.normal(size=n), g.exponential(size=m)
        want = scipy.stats.wasserstein_distance(a, b)
        assert abs(wasserstein1(torch.tensor(a), torch.tensor(b)[:, None]) - want) < 1e-12
        assert abs(wasserstein1(b, a) - want) < 1e-12
    mix = mixture()
    x = mix.icdf((torch.arange(999).double() + 0.5) / 999)
    assert wasserstein1(x[torch.randperm(999)], mix) < 1e-12
    assert abs(wasserstein1(x + 0.25, mix) - 0.25) < 1e-12
    with pytest.raises(ValueError, match="one dimension"):
        wasserstein1(torch.zeros(3, 2), mix)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        wasserstein1([], [1.0])


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 100_001])
def test_stratified_normal(n):
    z = stratified_normal(n)
    want = scipy.special.ndtri((np.arange(n) + 0.5) / n)
    assert z.shape == (n,) and z.dtype == F64
    np.testing.assert_allclose(z, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(z, -z.flip(0))
    with pytest.raises(ValueError, match="n = 0"):
        stratified_normal(0)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", "score"])
def test_exact_denoiser_samples_the_mixture(predicts):
    mix, path = mixture(), VP.cosine()
    den = Denoiser(mix.net(path, predicts), path, predicts)
    z = stratified_normal(500)
    start = mix.flow_map(z, 1.0, 0.99, path).float()[:, None]
    out = sample(den, (1,), Euler(), uniform(400, 0.99, 0.01), x=start)
    exact = mix.flow_map(z, 1.0, 0.01, path)
    assert out.nfe == 400 and out.x.dtype == torch.float32
    assert (out.x[:, 0] - exact).abs().mean() < 2e-3


def test_euler_is_of_first_order_on_every_path():
    mix = mixture()
    for path in PATHS:
        x = mix.at(path, 0.99).icdf((torch.arange(100).double() + 0.5) / 100)
        errors = []
        for n in (80, 160):
            y, t = x, grid(0.99, 0.01, n + 1)
            for now, then in zip(t, t[1:]):
                y = y + (then - now) * mix.flow(y, now, path)
            errors.append((y - mix.flow_map(x, 0.99, 0.01, path)).abs().mean())
        assert 0.85 < torch.log2(errors[0] / errors[1]) < 1.15, path


@pytest.mark.parametrize("kw", [{}, dict(width=8, depth=1, waves=1), dict(time=False), dict(waves=2, max_frequency=3.0)])
def test_mlp(kw):
    torch.manual_seed(0)
    net = MLP(**kw)
    x, t = torch.randn(5, 1), torch.rand(5)
    assert net(x, t).shape == (5, 1) and net(x, t).dtype == torch.float32
    torch.manual_seed(0)
    again = MLP(**net.config())
    assert torch.equal(again(x, t), net(x, t))
    assert torch.equal(net(x, t), net(x, 1 - t)) == (not net.config()["time"])
    _, slope = torch.func.jvp(net.double(), (x.double(), t.double()), (x.double(), torch.ones(5).double()))
    step = net(x.double() * (1 + 1e-6), t.double() + 1e-6) - net(x.double() * (1 - 1e-6), t.double() - 1e-6)
    assert torch.allclose(slope, step / 2e-6, atol=1e-7)
    for bad in ((x[:, 0], t), (x, t[:2]), (torch.randn(5, 2), t), (x, torch.tensor(0.5))):
        with pytest.raises(ValueError, match=r"\(B, 1\)"):
            MLP(**kw)(*bad)


def test_bad_mixtures_and_arguments():
    for args, words in [
        (((0, 1), (1,), (1,)), "one number for each component"),
        (((0, 1), (1, 0), (0.5, 0.5)), "positive"),
        (((0, 1), (1, 1), (0.5, 0.6)), "sum to 1.1"),
        (((0, float("nan")), (1, 1), (0.5, 0.5)), "finite"),
        (((), (), ()), "one number"),
    ]:
        with pytest.raises(ValueError, match=words):
            GaussianMixture(*args)
    mix = mixture()
    with pytest.raises(ValueError, match="outside"):
        mix.posterior_mean(0.0, 1.5, Linear())
    with pytest.raises(ValueError, match="outside"):
        mix.flow_map(0.0, 0.5, -0.1, Linear())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        mix.icdf(1.1)
    with pytest.raises(ValueError, match="choose of"):
        mix.loss_floor(Linear(), 0.5, "noise")
    with pytest.raises(ValueError, match="choose of"):
        mix.net(Linear(), "u")
