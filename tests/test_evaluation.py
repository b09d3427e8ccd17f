"""Distances against closed forms and torch-fidelity, the judge, copies, the floor."""

import json
import math

import pytest
import torch

import diffcourse
from diffcourse import evaluation as ev
from diffcourse.data import Images, digits
from diffcourse.records import read_records


def cloud(n, d, seed, mean=0.0, std=1.0):
    g = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, d, generator=g, dtype=torch.float64)


# -- the two distances --------------------------------------------------------

def test_fd_of_gaussians_with_any_covariance():
    "Closed form by the matrix root of scipy, independent of torch-fidelity's eigenvalues."
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(6, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mu = torch.randn(6, generator=g, dtype=torch.float64)
    C1, C2 = (A @ A.T).numpy(), (B @ B.T).numpy()
    truth = float(mu @ mu) + (C1 + C2 - 2 * sqrtm(C1 @ C2).real).trace()
    found = ev.fd(cloud(200_000, 6, 1) @ A.T, cloud(200_000, 6, 2) @ B.T + mu)
    assert found == pytest.approx(truth, rel=0.02)


def test_fd_is_zero_to_itself_and_symmetric():
    a, b = cloud(300, 8, 0), cloud(400, 8, 1, 0.3, 1.2)
    assert abs(ev.fd(a, a)) < 1e-8
    assert ev.fd(a, b) == pytest.approx(ev.fd(b, a), rel=1e-8)


def test_fd_does_not_change_under_rotation():
    q, _ = torch.linalg.qr(cloud(8, 8, 5))
    a, b = cloud(300, 8, 0), cloud(300, 8, 1, 0.3, 1.2)
    assert ev.fd(a @ q, b @ q) == pytest.approx(ev.fd(a, b), rel=1e-8)


def population_kid(mean, d):
    """KID of N(0, 1) and N(mean, 1) in d dimensions, by the moments of s = a·b / d.

    (1 + s)^3 needs the mean m, the variance v and the third central moment c of s: (1 + m)^3 + 3 (1 + m) v + c.
    """
    shift = d * mean**2
    cube = lambda m, v, c: (1 + m) ** 3 + 3 * (1 + m) * v + c
    within_a = cube(0, 1 / d, 0)
    within_b = cube(shift / d, (2 * shift + d) / d**2, 6 * shift / d**3)
    across = cube(0, (shift + d) / d**2, 0)
    return within_a + within_b - 2 * across


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_kid_is_unbiased(mean):
    "The mean over many small samples is the population value, also where that is zero."
    d, n = 5, 40
    found = [ev.kid(cloud(n, d, 2 * k), cloud(n + 9, d, 2 * k + 1, mean), repeats=2)[0] for k in range(400)]
    found = torch.tensor(found)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - population_kid(mean, d)) < 4 * error
    assert error < 0.05  # the bias of pairs with themselves would be ten times that


def test_kid_equals_torch_fidelity():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = cloud(200, 16, 0), cloud(200, 16, 1, 0.2)
    how = dict(kid_subsets=1, kid_subset_size=200, kid_kernel="poly", kid_kernel_poly_degree=3,
               kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False)
    theirs = kid_features_to_metric(a, b, **how)[KEY_METRIC_KID_MEAN]
    assert ev.kid(a, b, repeats=2)[0] == pytest.approx(theirs, rel=1e-9)


def test_kid_error_bar_is_the_scatter_of_repetitions():
    pairs = [(cloud(150, 8, 2 * k), cloud(150, 8, 2 * k + 1, 0.3)) for k in range(60)]
    values, errors = zip(*(ev.kid(a, b, repeats=30, seed=k) for k, (a, b) in enumerate(pairs)))
    assert 0.7 < torch.tensor(errors).mean() / torch.tensor(values).std() < 1.6


def test_features_that_do_not_fit():
    good = cloud(100, 8, 0)
    for f in (ev.fd, ev.kid):
        with pytest.raises(ValueError, match="8 samples for 8 features"):
            f(good[:8], good)
        with pytest.raises(ValueError, match="needed"):
            f(good, good[:, :7])
        with pytest.raises(ValueError, match="nan"):
            f(good, good.index_fill(0, torch.tensor([3]), math.nan))


# -- the judge ----------------------------------------------------------------

def test_judge_knows_digits_it_never_saw():
    held = digits("held_out")
    with torch.no_grad():
        right = (ev.classifier()(held.x).argmax(1) == held.y).double().mean()
    assert right >= 0.98


def test_judge_with_another_hash(monkeypatch):
    wrong = {k: {**v, "sha256": "0" * 64} for k, v in diffcourse._shipped().items()}
    monkeypatch.setattr(diffcourse, "_shipped", lambda: wrong)
    ev.classifier.cache_clear()
    try:
        with pytest.raises(ValueError, match="not the published 000000000000"):
            ev.classifier()
    finally:
        ev.classifier.cache_clear()


def test_features_are_those_of_torch_fidelity():
    from torch_fidelity.utils import create_feature_extractor

    x = digits("held_out").x[:50] + 0.01
    net = create_feature_extractor(ev.register_judge(), ["64"], cuda=False, verbose=False)
    theirs = net.convert_features_tuple_to_dict(net(ev.to_bytes(x)))["64"]
    assert torch.equal(ev.features(x), theirs.double())
    assert ev.register_judge() == ev.register_judge()  # a second time is no error


@pytest.mark.parametrize("count", [None, 1, 8])
def test_labels_ride_along_in_rows(count):
    y = torch.arange(3) if count is None else torch.arange(3 * count).reshape(3, count)
    images = Images(torch.zeros(3, 1, 8, 8), y, flip=count == 1)
    z = ev.Labelled(images).batch([2, 0])
    assert z.shape == (2, 2, 8, 8) and ev.Labelled(images).flip == images.flip
    assert torch.equal(z.flip(-1)[:, 1, :count or 1, 0].long(), y[[2, 0]].reshape(2, -1))


def test_more_labels_than_rows():
    with pytest.raises(ValueError, match="9 labels an image, 8 rows"):
        ev.Labelled(Images(torch.zeros(3, 1, 8, 8), torch.zeros(3, 9)))


def test_bytes():
    x = torch.tensor([-3.0, -1, 0, 0.999, 1, 7]).reshape(1, 1, 1, 6)
    assert ev.to_bytes(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    every = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(ev.to_bytes(every / 127.5 - 1), every.to(torch.uint8))


@pytest.mark.parametrize("bad, says", [
    (torch.zeros(0, 1, 8, 8), "needed"),
    (torch.zeros(8, 8), "needed"),
    (torch.zeros(70, 1, 16, 16), "the judge sees"),
    (torch.zeros(70, 3, 8, 8), "the judge sees"),
    (torch.full((70, 1, 8, 8), math.nan), "70 of 70 images hold nan"),
    (torch.zeros(20, 1, 8, 8), "20 images for 64 features"),
])
def test_images_that_cannot_be_scored(bad, says):
    with pytest.raises(ValueError, match=says):
        ev.score(bad)


def test_damage_is_ranked():
    real = digits("all").x
    seen = ev.features(real)
    found = [ev.fd(ev.features(x[:1000]), seen) for x in ev.corruptions(real, 1).values()]
    assert found == sorted(found) and len(found) == 8


def test_the_gaussian_damage_has_the_covariance_of_digits():
    real = digits("all").x
    fake = ev.corruptions(real, 0)["Gaussian, same covariance"]
    assert (real.flatten(1).T.cov() - fake.flatten(1).T.cov()).abs().max() < 0.08
    assert (real.mean(0) - fake.mean(0)).abs().max() < 0.06


def test_memorisation():
    train, held = digits("train").x, digits("held_out").x
    copies = train[torch.arange(1000)]
    assert ev.memorisation(copies, train, held) == 0
    assert ev.memorisation(copies + 0.02, train, held) < 0.2
    half = train[:750]  # a model of which these are no training images
    rest = train[750:]
    assert 0.85 < ev.memorisation(rest, half, held) < 1.2


def test_score_of_real_digits():
    real = digits("all").x[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    s = ev.score(real[:1000])
    assert s.ratio < 1 and s.n == 1000 and s.floor == ev.floor()
    assert abs(s.kid) < 3 * s.kid_error
    assert f"{s.ratio:.2f} F" in str(s)


def test_sorted_digits():
    x = digits("held_out")
    sorted_x = ev.sort_digits(x.x)
    assert sorted_x.shape == (100, 1, 8, 8)
    label = ev.classifier()(sorted_x).argmax(1)
    assert torch.equal(label, torch.arange(10).repeat_interleave(10))
    few = ev.sort_digits(x.x[x.y == 3][:4], columns=5)
    assert (few[20:] == 1).all() and not (few[15:19] == 1).all()  # white where there is none


# -- the floor ---------------------------------------------------------------

@pytest.mark.parametrize("changed, value, says", [
    ("feature_hash", "f" * 64, "feature_hash ffffffffffff.*make results"),
    ("reference_hash", "f" * 64, "reference_hash ffffffffffff.*make results"),
    ("made", {"data": 1, "judge": 1}, "of another version of judge: run make results"),
])
def test_a_floor_of_another_judge_data_set_or_version(tmp_path, monkeypatch, changed, value, says):
    line = read_records("16_floor")[0] | {changed: value}
    (tmp_path / "16_floor.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(ev, "results_folder", lambda: tmp_path)
    ev.floor.cache_clear()
    try:
        with pytest.raises(ValueError, match=says):
            ev.floor()
    finally:
        ev.floor.cache_clear()


def test_without_a_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "results_folder", lambda: tmp_path)
    ev.floor.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="16_floor.jsonl: run make results"):
            ev.floor()
    finally:
        ev.floor.cache_clear()
