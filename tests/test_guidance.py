"""Conditions and guidance: against quadrature, another library's solver, Bayes' rule, and inputs that do not fit."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import diffcourse as dc
from diffcourse.draws import batch_indices, told_labels
from diffcourse.flow_matching import FlowMatching
from diffcourse.faces import LAW, faces
from diffcourse.faces_judge import granted
from diffcourse.guidance import Composed, Guided
from diffcourse.distill import Distillation
from diffcourse.paths import VP, Linear
from diffcourse.playground import GaussianMixture
from diffcourse.sampling import Denoiser, Euler, asking, sample, uniform
from diffcourse.solvers import RK4
from diffcourse.training import fit
from diffcourse.unet import UNet

HEAPS = GaussianMixture((-1.0, 0.5), (0.5, 0.6), (0.5, 0.5))
RIGHT = GaussianMixture((0.5,), (0.6,), (1.0,))
PATHS = [Linear(), VP.cosine(), VP.linear()]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))


def heaps(path=Linear()):  # class 0: the right heap
    def exact(x, t, condition):
        both = HEAPS.flow(x, t, path), RIGHT.flow(x, t, path)
        return torch.where(condition[:, None] < 0, *both).to(x.dtype)

    return Denoiser(exact, path, "flow")


def unet(seed=0, **more):
    torch.manual_seed(seed)
    net = UNet(size=4, base=8, mults=(1, 2), attention=(2,), heads=2, **({"classes": 3} | more))
    for name, p in net.named_parameters():  # zeros would hide what is wrong
        if "labels" not in name:
            nn.init.normal_(p, std=0.15)
    return net


def images(n=40, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=made) * 2 - 1, torch.randint(3, (n,), generator=made)


# what a guided sample is a sample of


def slope(w):
    def of(t, y):
        x = torch.as_tensor(y)
        plain = HEAPS.flow(x, t, Linear())
        return (plain + w * (RIGHT.flow(x, t, Linear()) - plain)).numpy()

    return of


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5, 4.0])
def test_guided_ends_are_those_of_another_solver(w):
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)
    ends = sample(Guided(heaps(), w), (1,), RK4(), uniform(200), x=z[:, None], condition=0).x[:, 0]
    theirs = solve_ivp(slope(w), (1, 0), z.numpy(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    assert (ends - torch.as_tensor(theirs)).abs().max() < 1e-6


@pytest.mark.parametrize("w, power", [(0.0, HEAPS), (1.0, RIGHT)])
def test_scales_zero_and_one_sample_all_and_the_class(w, power):
    z = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    ends = sample(Guided(heaps(), w), (1,), RK4(), uniform(100), x=z[:, None], condition=0).x[:, 0]
    below = torch.special.ndtr(z)  # a map that grows carries quantiles to quantiles
    assert (power.cdf(ends) - below).abs().max() < 1e-6


def test_the_law_of_guided_samples_is_not_the_power():
    z = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    normal = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    ends = sample(Guided(heaps(), 4.0), (1,), RK4(), uniform(100), x=z[:, None], condition=0).x[:, 0]
    assert torch.trapezoid(normal, z) == pytest.approx(1, abs=1e-9)
    mean = torch.trapezoid(ends * normal, z)
    x = torch.linspace(-6, 8, 8001, dtype=torch.float64)
    power = RIGHT.pdf(x) ** 4 * HEAPS.pdf(x) ** -3
    far = torch.trapezoid(x * power, x) / torch.trapezoid(power, x)
    assert mean - far > 0.5


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_difference_of_scores_is_the_slope_of_the_class(path):
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None].requires_grad_()
    t = 0.4
    a, s = float(path.alpha(t)), float(path.sigma(t))
    normals = [torch.distributions.Normal(a * m, math.hypot(a * d, s)) for m, d in ((-1.0, 0.5), (0.5, 0.6))]
    logs = torch.stack([n.log_prob(x) for n in normals])
    (wanted,) = torch.autograd.grad((logs[1] - logs.logsumexp(0)).sum(), x)
    with torch.no_grad():
        den = heaps(path)
        with asking(den, torch.zeros(21, dtype=torch.long)):
            right = den.score(x, t)
        with asking(den, torch.full((21,), -1)):
            both = den.score(x, t)
    assert (right - both - wanted).abs().max() < 1e-6


# the denoiser


def test_scale_one_asks_once_and_scale_zero_asks_nothing():
    net, x, t = unet(), torch.randn(3, 1, 4, 4), torch.full((3,), 0.5)
    nn.init.normal_(net.labels.tables[0].weight)
    label = torch.tensor([0, 1, 2])
    den = Denoiser(net, Linear(), "flow", condition=label)
    one, none = Guided(den, 1.0), Guided(den, 0.0)
    with torch.no_grad():
        assert torch.equal(one(x, t).out, net(x, t, condition=label)) and one.nfe == 1
        gap = none(x, t).out - net(x, t, condition=torch.full((3,), -1))
        assert gap.abs().max() < 1e-5 and none.nfe == 2


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_the_rule_is_the_same_for_every_prediction(predicts):
    path, x, t = VP.cosine(), torch.randn(5, 2, dtype=torch.float64), 0.6
    said_, silent = torch.randn(2, 5, 2, dtype=torch.float64)
    flows = [dc.Prediction(x, t, o, "flow", path) for o in (said_, silent)]

    def net(y, t, condition):
        return torch.cat([getattr(p, predicts) for p in flows])

    out = Guided(Denoiser(net, path, predicts, condition=0), 3.0)(x, t)
    assert (out.flow - (silent + 3 * (said_ - silent))).abs().max() < 1e-9


def test_an_interval_costs_fewer_evaluations():
    den = Guided(heaps(), 3.0, (0.25, 0.65))
    out = sample(den, (1,), Euler(), uniform(10), n=4, condition=0)
    assert out.nfe == 10 + 4  # twice at 0.6, 0.5, 0.4 and 0.3
    assert Guided(heaps(), 3.0, (0.25, 0.65)).nfe == 0


def test_samples_are_asked_for_in_batches_as_at_once():
    net = unet()
    den, label = Guided(Denoiser(net, Linear(), "flow"), 2.0), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    whole, parts = (sample(den, (1, 4, 4), grid=uniform(3), seeds=range(7), condition=label, batch=b).x for b in (7, 2))
    assert (whole - parts).abs().max() < 1e-5
    alone = sample(den, (1, 4, 4), grid=uniform(3), seeds=[4], condition=1).x
    assert (whole[4] - alone[0]).abs().max() < 1e-5
    assert den.condition is None and "condition" not in vars(den)


@pytest.mark.parametrize("scale", [-1, -0.01, float("nan"), float("inf")])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="0 .nothing asked., 1 .the condition. or more"):
        Guided(heaps(), scale)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.2), (0.1, 0.2, 0.3), (float("nan"), 1)])
def test_bad_intervals(interval):
    with pytest.raises(ValueError, match="0 <= from < to <= 1"):
        Guided(heaps(), 2.0, interval)


def test_bad_questions():
    den = Denoiser(unet(), Linear(), "flow")
    shape, grid = (1, 4, 4), uniform(2)
    with pytest.raises(TypeError, match="a Denoiser is needed"):
        Guided(unet(), 2.0)
    with pytest.raises(ValueError, match="nothing is asked"):
        sample(Guided(den, 2.0), shape, grid=grid, n=2)
    for wrong in (3, -2, [0, 5]):
        with pytest.raises(ValueError, match="0 to 2, and -1 for not said"):
            sample(den, shape, grid=grid, n=2, condition=wrong)
    with pytest.raises(ValueError, match="3 samples, and 2 samples"):
        sample(den, shape, grid=grid, n=2, condition=[0, 1, 2])
    with pytest.raises(ValueError, match="whole numbers"):
        sample(den, shape, grid=grid, n=2, condition=[0.5, 1.0])
    with pytest.raises(ValueError, match="whole numbers"):
        sample(den, shape, grid=grid, n=2, condition=[[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="takes no condition"):
        sample(Denoiser(unet(classes=0), Linear(), "flow"), shape, grid=grid, n=2, condition=1)


# the network


def test_nothing_said_is_the_network_without_labels():
    torch.manual_seed(3)
    plain = UNet(size=4, base=8, mults=(1, 2), attention=(2,), heads=2)
    torch.manual_seed(3)
    told = UNet(size=4, base=8, mults=(1, 2), attention=(2,), heads=2, classes=3, attributes=[2, 4])
    missing = told.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(k.startswith("labels") for k in missing.missing_keys)
    for p, q in zip(plain.parameters(), told.parameters()):
        assert torch.equal(p, q)  # the same start from the same seed
    for net in (plain, told):
        for name, p in net.named_parameters():
            if "labels" not in name:
                nn.init.constant_(p, 0.02)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.9])
    silent = torch.full((2, 3), -1)
    with torch.no_grad():
        assert torch.equal(plain(x, t), told(x, t)) and torch.equal(plain(x, t), told(x, t, condition=silent))
        assert not torch.equal(plain(x, t), told(x, t, condition=torch.tensor([[0, 1, 3], [2, 0, 0]])))


@pytest.mark.parametrize("bad", [{"classes": 1}, {"classes": -2}, {"classes": 2.5}, {"attributes": [2, 1]}, {"attributes": [0]}])
def test_bad_labels_of_a_network(bad):
    with pytest.raises((ValueError, TypeError)):
        UNet(size=4, base=8, mults=(1, 2), attention=(2,), heads=2, **bad)


# the training


def test_labels_are_left_out_as_often_as_asked():
    labels = torch.arange(1, 7).repeat(5000, 1)[:, :3]
    told = torch.cat([told_labels(labels, 0.1, 0.2, 0, k, 512) for k in range(40)])
    silent = (told == -1).double()
    assert float(silent.mean(1).eq(1).double().mean()) == pytest.approx(0.1 + 0.9 * 0.2**3, abs=0.01)
    assert float(silent.mean()) == pytest.approx(0.1 + 0.9 * 0.2, abs=0.01)
    assert torch.equal(told_labels(labels, 0.1, 0.2, 0, 3, 512), told_labels(labels, 0.1, 0.2, 0, 3, 512))
    assert not torch.equal(told_labels(labels, 0.1, 0.2, 0, 3, 512), told_labels(labels, 0.1, 0.2, 1, 3, 512))


def test_labels_go_with_their_images():
    labels = torch.arange(50)
    rows = batch_indices(7, 2, 16, 50)
    assert torch.equal(told_labels(labels, 0.0, 0.0, 7, 2, 16), labels[torch.from_numpy(rows)])
    assert (told_labels(labels, 1.0, 0.0, 7, 2, 16) == -1).all()


def test_a_network_learns_what_its_labels_mean():
    y = torch.arange(60) % 3
    x = (y.float() - 1)[:, None, None, None].expand(60, 1, 4, 4) * 0.9
    made = fit(FlowMatching(), unet(), x, "told", 150, labels=y, batch=32, lr=5e-3, warmup=5)
    den = Denoiser(made.net, Linear(), "flow")
    out = sample(den, (1, 4, 4), grid=uniform(10), seeds=range(9), condition=torch.arange(9) % 3).x
    means = out.mean((1, 2, 3)).view(3, 3).mean(0)
    assert means[0] < -0.4 and means[1].abs() < 0.4 and means[2] > 0.4


def test_labels_are_part_of_a_runs_identity():
    x, y = images()
    runs = [fit(FlowMatching(), unet(), x, f"same{k}", 2, labels=y, batch=8, **more).folder.name
            for k, more in enumerate([{}, {}, {"drop": 0.2}, {"hide": 0.2}])]
    runs.append(fit(FlowMatching(), unet(), x, "same4", 2, labels=y.flip(0), batch=8).folder.name)
    assert runs[0] == runs[1] and len(set(runs)) == 4


def test_an_interrupted_training_with_labels_reaches_the_same_bits():
    x, y = images()

    def stop(step, net):
        if step == 3:
            raise KeyboardInterrupt

    whole = fit(FlowMatching(), unet(), x, "whole", 6, labels=y, batch=8)
    with pytest.raises(KeyboardInterrupt):
        fit(FlowMatching(), unet(), x, "cut", 6, labels=y, batch=8, every=1, callback=stop)
    again = fit(FlowMatching(), unet(), x, "cut", 6, labels=y, batch=8)
    for p, q in zip(whole.net.state_dict().values(), again.net.state_dict().values()):
        assert torch.equal(p, q)


def test_a_student_is_taught_what_its_teacher_was_asked():
    x, y = images()
    net = unet()
    nn.init.normal_(net.labels.tables[0].weight)
    teacher, asked = Guided(Denoiser(net, Linear(), "flow"), 3.0), []
    inner = teacher._twice
    teacher._twice = lambda x, t, told, silent: asked.append(told.clone()) or inner(x, t, told, silent)
    fit(Distillation(teacher, 4, ratio=1), unet(1), x, "student", 2, labels=y, drop=0.0, batch=8)
    for step, told in enumerate(asked):
        assert torch.equal(told, y[torch.from_numpy(batch_indices(0, step, 8, 40))])
    assert len(asked) == 2 and teacher.condition is None


def test_bad_labels_of_a_training():
    x, y = images()
    train = lambda net, **more: fit(FlowMatching(), net, x, "bad", 1, batch=8, **more)
    with pytest.raises(ValueError, match="none came"):
        train(unet())
    with pytest.raises(ValueError, match="takes none"):
        train(unet(classes=0), labels=y)
    for wrong in (y[:-1], y.float(), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="whole numbers, one row an image"):
            train(unet(), labels=wrong)
    with pytest.raises(ValueError, match="0 to 2"):
        train(unet(), labels=y + 1)
    for chance in ({"drop": -0.1}, {"drop": 1.5}, {"hide": float("nan")}):
        with pytest.raises(ValueError, match="chances from 0 to 1"):
            train(unet(), labels=y, **chance)


# held back


def wild(n=6):  # answers far outside the range of images
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    told, silent = (torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(k)) * 0.5 for k in (3, 4))
    return Denoiser(lambda y, t, condition: torch.cat([told, silent]), Linear(), "x0", condition=0), x, told, silent


def test_rescaling_gives_back_the_spread():
    den, x, told, silent = wild()
    whole, half = (Guided(den, 6.0, rescale=r)(x, 0.5).x0 for r in (1.0, 0.5))
    free = silent + 6 * (told - silent)
    assert torch.allclose(whole.std((1, 2, 3)), told.std((1, 2, 3)), atol=1e-5)
    assert torch.allclose(half, (free + whole) / 2, atol=1e-5)


def test_a_threshold_keeps_its_share_of_pixels():
    den, x, told, silent = wild()
    kept = Guided(den, 6.0, threshold=0.9)(x, 0.5).x0
    free = silent + 6 * (told - silent)
    size = free.abs().flatten(1).quantile(0.9, dim=1).view(-1, 1, 1, 1)
    assert (size > 1).all() and kept.abs().max() <= 1
    inside = free.abs() <= size
    assert torch.allclose(kept[inside], (free / size)[inside], atol=1e-6)
    assert inside.double().mean() == pytest.approx(0.9, abs=0.02)


def test_what_is_in_range_is_left_alone():
    den, x, told, silent = wild()
    small = Denoiser(lambda y, t, condition: 0.05 * den.net(y, t, condition), Linear(), "x0", condition=0)
    free, kept = (Guided(small, 2.0, threshold=q)(x, 0.5).x0 for q in (1.0, 0.995))
    assert torch.equal(free, kept)


@pytest.mark.parametrize("bad", [{"rescale": -0.1}, {"rescale": 1.1}, {"threshold": 0.0}, {"threshold": 1.5}, {"rescale": float("nan")}])
def test_bad_taming(bad):
    with pytest.raises(ValueError, match="0 to 1 are allowed"):
        Guided(heaps(), 2.0, **bad)


# several labels at once


TABLE = [2, 4, 3]  # how many values each label has


def told(seed=0):
    net = unet(seed, classes=0, attributes=TABLE)
    for table in net.labels.tables:
        nn.init.normal_(table.weight[1:], std=0.5)
    return net


def table(n=40, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(k, (n,), generator=made) for k in TABLE], 1)


def test_what_is_said_of_several_labels_adds_up():
    net = told()
    rows = torch.tensor([[1, 3, -1], [-1, -1, 2], [-1, -1, -1]])
    one, two, three = (t.weight for t in net.labels.tables)
    with torch.no_grad():
        assert torch.allclose(net.labels(rows, 3), torch.stack([one[2] + two[4], three[3], 0 * one[0]]), atol=1e-6)


def test_a_network_learns_two_labels_and_is_asked_for_both():
    y = torch.stack([torch.arange(64) % 2, torch.arange(64) // 2 % 2], 1)
    x = torch.zeros(64, 1, 4, 4)
    x[:, :, :2], x[:, :, 2:] = (1.6 * y.T.float() - 0.8)[:, :, None, None, None]
    net = unet(classes=0, attributes=[2, 2])
    made = fit(FlowMatching(), net, x, "two", 250, labels=y, hide=0.4, batch=32, lr=5e-3, warmup=5)
    den = Denoiser(made.net, Linear(), "flow")
    asked = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(3, 1)
    out = sample(den, (1, 4, 4), grid=uniform(10), seeds=range(12), condition=asked).x
    assert torch.equal(out[:, 0, :2].mean((1, 2)) > 0, asked[:, 0] == 1)
    assert torch.equal(out[:, 0, 2:].mean((1, 2)) > 0, asked[:, 1] == 1)
    composed = Composed(den, [[1, -1], [-1, 0]], 1.5)
    out = sample(composed, (1, 4, 4), grid=uniform(10), seeds=range(6)).x
    assert (out[:, 0, :2].mean((1, 2)) > 0).all() and (out[:, 0, 2:].mean((1, 2)) < 0).all()


@pytest.mark.parametrize("t", [0.4, torch.tensor(0.4), torch.tensor([0.2, 0.4, 0.9])])
def test_a_composition_is_its_formula(t):
    net, x = told(), torch.randn(3, 1, 4, 4)
    wishes, scales = [[1, -1, -1], [-1, 2, -1], [-1, 0, 1]], (1.5, 2.0, 0.5)
    each = torch.as_tensor(t).expand(3).float()
    with torch.no_grad():
        plain = net(x, each)
        by_hand = plain + sum(w * (net(x, each, condition=torch.tensor([c] * 3)) - plain) for c, w in zip(wishes, scales))
        den = Composed(Denoiser(net, Linear(), "flow"), wishes, scales)
        assert (den(x, t).out - by_hand).abs().max() < 1e-5
    assert den.nfe == 4 and den.condition is None and "condition" not in vars(den)


def test_one_wish_is_guidance_and_none_is_the_plain_flow():
    den, wish = Denoiser(told(), Linear(), "flow"), torch.tensor([[1, 3, -1]])
    ways = Composed(den, wish, 2.0), Guided(den, 2.0)
    one, two = (sample(d, (1, 4, 4), grid=uniform(4), seeds=range(5), condition=c, batch=2)
                for d, c in zip(ways, (None, wish.expand(5, -1))))
    assert (one.x - two.x).abs().max() < 1e-5 and one.nfe == two.nfe == 8
    none, plain = (sample(d, (1, 4, 4), grid=uniform(4), seeds=range(5)).x for d in (Composed(den, wish, 0.0), den))
    assert (none - plain).abs().max() < 1e-5


def test_composed_heaps_end_where_another_solver_ends():
    z = torch.linspace(-3, 3, 21, dtype=torch.float64)
    den = Composed(heaps(), [0, 0], (1.0, 0.5))  # the same wish twice: w = 1.5
    ends = sample(den, (1,), RK4(), uniform(200), x=z[:, None]).x[:, 0]
    theirs = solve_ivp(slope(1.5), (1, 0), z.numpy(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    assert (ends - torch.as_tensor(theirs)).abs().max() < 1e-6


def test_bad_wishes():
    den = Denoiser(told(), Linear(), "flow")
    with pytest.raises(TypeError, match="a Denoiser is needed"):
        Composed(told(), [[0, 0, 0]])
    for wrong in ([], 1):
        with pytest.raises(ValueError, match="a row for each, one or more"):
            Composed(den, wrong)
    with pytest.raises(ValueError, match="label 1: 0 to 3, and -1 for not said"):
        Composed(den, [[0, 4, 0]])
    for scales in ((1.0, 2.0), -1.0, float("nan")):
        with pytest.raises(ValueError, match="one for all, or one each"):
            Composed(den, [[0, 1, 0]], scales)
    with pytest.raises(ValueError, match="give it to Composed"):
        sample(Composed(den, [[0, 1, 0]]), (1, 4, 4), grid=uniform(2), n=1, condition=torch.tensor([[0, 0, 0]]))
    with pytest.raises(ValueError, match=r"shape \(4, 2\).*\(4, 3\), are needed"):
        sample(Composed(den, [[0, 1]]), (1, 4, 4), grid=uniform(2), n=2)


def test_bad_tables_of_labels():
    x, y = images()[0], table()
    train = lambda y: fit(FlowMatching(), told(), x, "bad", 1, labels=y, batch=8)
    for wrong in (y[:, :2], torch.cat([y, y], 1)):
        with pytest.raises(ValueError, match="whole numbers, .8, 3., are needed"):
            train(wrong)
    with pytest.raises(ValueError, match="label 2: 0 to 2"):
        train(y + torch.tensor([0, 0, 1]))
    den = Denoiser(told(), Linear(), "flow")
    for wrong, said in ([[2, 0, 0]], "label 0: 0 to 1"), ([[0, -2, 0]], "from -2 to -2 for label 1"):
        with pytest.raises(ValueError, match=said):
            sample(den, (1, 4, 4), grid=uniform(2), n=1, condition=wrong)


# the drawn faces


def test_wishes_in_words():
    wish = LAW.wish(glasses="square", hat="straw")
    assert wish.dtype == torch.long and (wish >= 0).sum() == 2
    names = [*LAW.attributes]
    assert wish[names.index("glasses")] == 2 and wish[names.index("hat")] == 3
    assert (LAW.wish() == -1).all()
    with pytest.raises(ValueError, match="'nose' is no attribute; they are skin, hair"):
        LAW.wish(nose="long")
    with pytest.raises(ValueError, match="hat is 'crown'; choose of none, cap, beanie, straw"):
        LAW.wish(hat="crown")


def test_faces_are_granted_what_they_show():
    x = faces("held_out", 32, 400).x
    everyone, straw = granted(x), granted(x, hat="straw")
    assert everyone["shares"] == {} and 0.6 < everyone["others"] < 1.4
    assert straw["together"] == straw["shares"]["hat"] < 0.15
    with pytest.raises(ValueError, match="is no attribute"):
        granted(x, nose="long")
