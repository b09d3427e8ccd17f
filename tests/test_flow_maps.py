"""The three identities of a flow map as losses: zero at the exact map, the targets by hand, bad input."""

import pytest
import torch

from diffcourse.flow_maps import TARGETS, FlowMapLoss
from diffcourse.meanflow import IntervalMLP, Intervals, MeanFlow, MeanFlowLoss, average_net
from diffcourse.paths import VP, Linear
from diffcourse.playground import mixture, stratified_normal
from diffcourse.sampling import Denoiser, sample, uniform
from diffcourse.training import fit

MIX, PATH = mixture(), Linear()
FLOW = Denoiser(MIX.net(PATH, "flow"), PATH, "flow")


class Draw:
    step = 0

    def __init__(self, n, dtype=torch.float64):
        self.n, self.gen, self.dtype = n, torch.Generator().manual_seed(0), dtype

    def uniform(self, k):
        return torch.rand(self.n, k, generator=self.gen).to(self.dtype)

    def noise(self):
        return torch.randn(self.n, 1, generator=self.gen).to(self.dtype)


def exact(x, t, r):
    u = average_net(MIX, PATH)(x, t, r)
    late = MIX.flow((x - (t - r)[:, None] * u).detach(), r.detach(), PATH)
    return u - late / (t - r)[:, None].detach().clamp(min=1e-9) * (r - r.detach())[:, None]


@pytest.mark.parametrize("identity", TARGETS)
def test_the_exact_map_has_no_loss_and_another_has(identity):
    loss, x0 = FlowMapLoss(identity, FLOW, Intervals("uniform", share=0.9)), MIX.sample(500)[:, None]
    assert loss(exact, x0, Draw(500)).quantile(0.98) < 1e-12
    bent = lambda x, t, r: exact(x, t, r) + 0.3 * (t - r)[:, None] * torch.sin(3 * x)
    assert loss(bent, x0, Draw(500)).mean() > 1e-3


@pytest.mark.parametrize("identity", TARGETS)
def test_where_the_interval_is_empty_it_is_flow_matching(identity):
    torch.manual_seed(0)
    net, x0 = IntervalMLP(), MIX.sample(200)[:, None].float()
    got = FlowMapLoss(identity, law=Intervals(share=0.0))(net, x0, Draw(200, torch.float32))
    draw = Draw(200, torch.float32)
    t, r = Intervals(share=0.0).sample(draw.uniform(4))
    eps = draw.noise()
    x = PATH.add_noise(x0, eps, t)
    assert torch.allclose(got, (net(x, t, r) - (eps - x0)).square()[:, 0], atol=1e-5)


def test_the_eulerian_loss_is_meanflow():
    torch.manual_seed(0)
    net, x0, law = IntervalMLP(), MIX.sample(300)[:, None].float(), Intervals("mix")
    ours = FlowMapLoss("eulerian", law=law)(net, x0, Draw(300, torch.float32))
    theirs = MeanFlowLoss(law, power=0.0)(net, x0, Draw(300, torch.float32))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_semigroup_target_is_the_mean_of_two_jumps():
    torch.manual_seed(0)
    net, n = IntervalMLP().double(), 50
    x, t, r = torch.randn(n, 1).double(), torch.full((n,), 0.9).double(), torch.full((n,), 0.2).double()
    draw = Draw(n)
    s = 0.2 + 0.7 * Draw(n).uniform(1)[:, 0]
    _, target = TARGETS["semigroup"](FlowMapLoss(), net, x, t, r, None, draw)
    y = x - (t - s)[:, None] * net(x, t, s)
    two = y - (s - r)[:, None] * net(y, s, r)
    assert torch.allclose(x - 0.7 * target, two, atol=1e-9) and not target.requires_grad


def test_the_lagrangian_loss_compares_the_speed_of_the_end():
    torch.manual_seed(0)
    net, n, h = IntervalMLP().double(), 40, 1e-5
    x, t, r = torch.randn(n, 1).double(), torch.full((n,), 0.9).double(), torch.full((n,), 0.3).double()
    jump = lambda r: x - (t - r)[:, None] * net(x, t, r)
    with torch.no_grad():
        speed = (jump(r + h) - jump(r - h)) / (2 * h)
        wanted = net(jump(r), r, r)
    u, target = TARGETS["lagrangian"](FlowMapLoss("lagrangian"), net, x, t, r, None, Draw(n))
    assert torch.allclose(u, speed, atol=1e-6) and torch.allclose(target, wanted, atol=1e-9)
    u.sum().backward()
    assert all(p.grad is not None for p in net.parameters()), "the derivative is trained, too"


@pytest.mark.parametrize("identity", TARGETS)
def test_training_learns_the_map_from_data(identity, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    torch.manual_seed(0)
    loss = FlowMapLoss(identity, law=Intervals("mix", share=0.5))
    made = fit(loss, IntervalMLP(width=48), MIX.sample(4000)[:, None].float(), "map", steps=900, batch=128, lr=3e-3, precision="fp32", seed=0)
    z = stratified_normal(100)[:, None].float()
    ends = MIX.flow_map(z.double(), 1.0, 0.0, PATH)
    out = sample(Denoiser(made.net.cpu(), PATH, "flow"), (1,), MeanFlow(), uniform(1), x=z).x
    assert (out - ends).abs().mean() < 0.35 < 0.7 < ends.abs().mean()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"one of \['semigroup', 'eulerian', 'lagrangian'\]"):
        FlowMapLoss("euler")
    with pytest.raises(ValueError, match=r"a flow on Linear\(\)"):
        FlowMapLoss("lagrangian", Denoiser(MIX.net(VP.cosine(), "v"), VP.cosine(), "v"))
