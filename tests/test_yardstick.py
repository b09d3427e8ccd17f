"""The two judges and the yardstick: what they share, weights against arithmetic, copies flagged, damage ranked, bad input."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from diffcourse import judges
from diffcourse import yardstick as ys
from diffcourse.data import mnist5k
from diffcourse.evaluation import corruptions, fd

TRAIN, HELD = mnist5k("train"), mnist5k("held_out")
KINDS = [*judges.KINDS]


def rows(n, of, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).permutation(of)[:n])


# -- the judges ---------------------------------------------------------------

def test_the_halves_are_disjoint_whole_and_balanced():
    a, b = judges.half(0), judges.half(1)
    assert len(a) + len(b) == len(TRAIN) == 4000
    assert (a.y.bincount() - b.y.bincount()).abs().max() <= 1
    seen = {x.numpy().tobytes() for x in a.x}
    assert sum(x.numpy().tobytes() in seen for x in b.x) <= 2, "MNIST repeats hardly any image"
    with pytest.raises(ValueError, match="half 2: 0 or 1"):
        judges.half(2)


def test_the_judges_share_no_half_and_no_architecture_and_edges_are_blind_to_a_constant():
    one, two = (judges.judge(k) for k in KINDS)
    assert one.seen.hash == two.unseen.hash != one.unseen.hash
    assert type(one.net) is not type(two.net)
    x = HELD.x[:50]
    lighter = (x * 0.5).clamp(-1, 1) + 0.3  # the same edges but for their size
    assert torch.allclose(judges.edges(lighter)[:, :2], 0.5 * judges.edges(x)[:, :2], atol=1e-6)


def test_edges_are_central_differences():
    x = torch.arange(28.0).expand(1, 1, 28, 28) * 0.01 + 0.03 * torch.arange(28.0)[:, None]
    e = judges.edges(x)[0, :, 5:-5, 5:-5]
    assert torch.allclose(e[0], torch.full_like(e[0], 0.01), atol=1e-6)
    assert torch.allclose(e[1], torch.full_like(e[1], 0.03), atol=1e-6)
    assert torch.allclose(e[2], (e[0] ** 2 + e[1] ** 2 + 1e-6).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_judges_from_the_package_are_small_good_and_known_by_their_hash(kind):
    from diffcourse import _shipped, _shipped_file

    who = judges.judge(kind)
    assert _shipped_file(f"mnist28/judge-{kind}").stat().st_size < 250_000
    assert who.sha256 == _shipped()[f"mnist28/judge-{kind}"]["sha256"]
    features, classes = who.look(HELD.x)
    assert features.shape == (1000, 112) and features.dtype == torch.float64
    assert (classes == HELD.y).double().mean() > 0.96
    other = who.look(who.unseen.x)[0]
    assert other[:, :48].var(0).mean() == pytest.approx(1, abs=0.02) and other[:, 48:].var(0).mean() == pytest.approx(1, abs=0.02)
    assert torch.allclose(who.net.features(HELD.x[:3]).double(), features[:3], atol=1e-4)


def test_a_changed_judge_is_refused(monkeypatch):
    import diffcourse

    shipped = {k: dict(v) for k, v in diffcourse._shipped().items()}
    shipped["mnist28/judge-pixels"]["sha256"] = "0" * 64
    monkeypatch.setattr(diffcourse, "_shipped", lambda: shipped)
    judges.judge.cache_clear()
    with pytest.raises(ValueError, match="not the published"):
        judges.judge("pixels")
    judges.judge.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_is_trained_calibrated_and_published(kind, tmp_path, monkeypatch):
    from diffcourse import _network, runs

    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    (tmp_path / "weights").mkdir()
    made = judges.train_judge(kind, steps=3, run="judge")
    monkeypatch.setattr(runs, "_package", lambda: tmp_path)
    digest = judges.publish(kind, made)
    file = tmp_path / "weights" / f"mnist28-judge-{kind}.safetensors"
    index = json.loads((tmp_path / "weights" / "index.json").read_text())
    assert index == {f"mnist28/judge-{kind}": {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}
    assert index[f"mnist28/judge-{kind}"]["sha256"] == digest
    tensors, meta = runs.load_tensors(file)
    net = _network(file, tensors, meta)
    other = judges.half(1 - judges.KINDS[kind][1]).x[:300]
    with torch.no_grad():
        assert torch.allclose(net.features(other), made.net.features(other), atol=1e-3)
    assert tensors["hidden.weight"].dtype == torch.float16 and tensors["scale"].dtype == torch.float32


@pytest.mark.parametrize("bad, says", [
    (lambda: judges.judge("taste"), r"kind = 'taste': one of \['pixels', 'edges'\]"), (lambda: judges.train_judge("taste"), "one of"),
    (lambda: judges.judge("pixels").look(torch.zeros(2, 1, 14, 14)), r"the judge sees \(n, 1, 28, 28\)"),
    (lambda: judges.judge("pixels").look(torch.full((2, 1, 28, 28), math.nan)), "nan or inf"),
])
def test_what_judges_refuse(bad, says):
    with pytest.raises(ValueError, match=says):
        bad()


# -- weights and distances ----------------------------------------------------

def test_weighted_classes_are_those_of_the_reference():
    classes = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    w = ys.class_weights(classes, shares)
    assert w.sum() == pytest.approx(100)
    assert [float(w[classes == c].sum()) for c in range(3)] == pytest.approx([20, 30, 50])
    assert ys.class_error(classes, shares) == pytest.approx((0.4 + 0.0 + 0.4) / 2)


def test_a_class_that_no_sample_has_is_named():
    shares = torch.full((10,), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="no sample of 50 is of class 3, 9: no weight"):
        ys.class_weights(torch.tensor([0, 1, 2, 4, 5, 6, 7, 8] * 7)[:50], shares)
    only = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert ys.class_weights(torch.zeros(5).long(), only).tolist() == [1] * 5, "a class that the reference lacks is not missed"


def test_weights_do_what_repetition_does():
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, generator=gen, dtype=torch.float64) for n in (400, 300))
    twice = torch.cat([a, a[:100]])
    w = torch.ones(400, dtype=torch.float64)
    w[:100] = 2
    assert ys.weighted_fd(a, w, b) == pytest.approx(fd(twice, b), rel=1e-2)
    assert ys.weighted_fd(a, torch.ones(400), b) == pytest.approx(fd(a, b), abs=1e-9)
    assert ys.weighted_fd(a, 7.0 * torch.ones(400), b) == pytest.approx(fd(a, b), abs=1e-9)
    with pytest.raises(ValueError, match="5 images for 5 features"):
        ys.weighted_fd(a[:5], w[:5], b)


def test_weights_take_the_luck_of_the_counts_out():
    own = ys.yardstick("pixels")
    features, classes = own._real
    even = rows(1000, len(features))
    sevens = (classes == 7).nonzero()[:, 0]
    few = torch.cat([even[classes[even] != 7], even[classes[even] == 7][:20]])
    raw = [fd(features[r], own.reference) for r in (even, few)]
    fair = [own.distance(features[r], classes[r])[0] for r in (even, few)]
    assert raw[1] > 2 * raw[0] and fair[1] < 1.5 * fair[0] and len(sevens) > 20


# -- the yardstick ------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_sampler_scores_one_floor_whatever_n(kind):
    own = ys.yardstick(kind)
    for n in (300, 1000):
        x = own.judge.unseen.x[rows(n, len(own.judge.unseen), seed=5)]
        assert own.measure(x).ratio == pytest.approx(1, abs=0.35)
    assert own.floor(300) > 2 * own.floor(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_known_damage_is_ranked(kind):
    own = ys.yardstick(kind)
    x = own.judge.unseen.x[rows(1000, len(own.judge.unseen), seed=1)]
    d = {k: own.measure(y).ratio for k, y in corruptions(x).items() if k != "white noise"} | {"none": own.measure(x).ratio}
    order = ["none", "noise 0.1", "noise 0.2", "noise 0.3"]
    assert sorted(order, key=d.get) == order and d["noise 0.3"] > 20 * d["none"]
    assert d["shift by a pixel"] < 3 < 10 < min(d[k] for k in ("blur 3x3", "mean of two digits", "Gaussian, same covariance"))


def test_the_copier_is_flagged_and_nothing_else_gives_it_away():
    own = ys.yardstick("pixels")
    copied, gauss, soft = (own.measure(ys.BASELINES[k](1000, 0)) for k in (
        "copies of training images", "a Gaussian a class", "a mixture of 30 Gaussians"))
    assert copied.copies and copied.memorisation < 0.01 and "copies" in copied.headline
    assert copied.ratio < 1.3 and copied.precision > 0.85 and copied.recall > 0.85
    assert not gauss.copies and not soft.copies and gauss.ratio > soft.ratio > 10
    assert own.measure(ys.kernel_density(1000, 0)).copies


def test_a_lost_class_is_named_and_weighted_only_where_one_has_samples():
    own = ys.yardstick("pixels")
    x = TRAIN.x[TRAIN.y != 4]
    found = own.judge.look(x[:600])[1]
    keep = x[:600][found != 4]
    none = own.measure(keep)
    features, classes = own.judge.look(keep)
    assert none.lost == (4,) and none.headline.endswith("class 4 lost") and none.fd == pytest.approx(fd(features, own.reference))
    with pytest.raises(ValueError, match="is of class 4"):
        ys.class_weights(classes, own.shares)
    some = own.measure(torch.cat([keep, TRAIN.x[TRAIN.y == 4][:8]]))
    assert some.class_error > 0.07 and some.lost == () and some.fd < 0.6 * none.fd


def test_shares_and_weights_and_counts_that_are_none():
    classes = torch.tensor([0, 1, 2])
    for shares in (torch.ones(3), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match="adding up to 1"):
            ys.class_weights(classes, shares.double())
    a = torch.randn(20, 3).double()
    with pytest.raises(ValueError, match="above zero"):
        ys.weighted_fd(a, torch.zeros(20), a)
    for make in (ys.copies, ys.kernel_density):
        with pytest.raises(ValueError, match="there are 4000 to copy"):
            make(5000, 0)
        with pytest.raises(ValueError, match="n"):
            make(-1, 0)


def test_baselines_are_in_no_order():
    own = ys.yardstick("pixels")
    for name in ("a Gaussian a class", "a mixture of 30 Gaussians"):
        x = ys.BASELINES[name](400, 0)
        halves = [own.judge.look(part)[1].bincount(minlength=10) for part in (x[:200], x[200:])]
        assert (halves[0] - halves[1]).abs().max() < 40


@pytest.mark.parametrize("name", ys.BASELINES)
def test_baselines_depend_on_their_seed_alone(name):
    make = ys.BASELINES[name]
    a, b, c = make(20, 3), make(20, 3), make(20, 4)
    assert a.shape == (20, 1, 28, 28) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("n", [112, 1997, 5000])
def test_floors_exist_where_there_are_enough_real_images(n):
    with pytest.raises(ValueError, match="113 to 1996 images have a floor"):
        ys.yardstick("pixels").floor(n)


def test_precision_falls_for_what_is_no_digit_and_recall_for_what_is_never_drawn():
    own = ys.yardstick("pixels")
    features, classes = own._real
    real = ys.precision_recall(features[rows(1000, len(features))], own.reference)
    ones = ys.precision_recall(features[classes == 1], own.reference)
    noise = own.judge.look(torch.rand(300, 1, 28, 28) * 2 - 1)[0]
    assert min(real) > 0.8 and ones[0] > 0.8 and ones[1] < 0.3
    assert ys.precision_recall(noise, own.reference)[0] < 0.05
