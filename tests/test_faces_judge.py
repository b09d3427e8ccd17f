"""The judge of the drawn faces: what it reads, what is valid, floors against simulation, damage that must be seen."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch.nn import functional as F

import diffcourse as dc
from diffcourse import faces_judge as fj, runs
from diffcourse.faces import LAW, FaceLaw, faces
from diffcourse.training import Draws


@pytest.fixture(scope="module")
def held():
    return faces("held_out", 32, 2000, seed=0, first=5 * 10**6)


@pytest.fixture(scope="module")
def reading(held):
    return fj.read(held.x)


def test_every_attribute_is_read(held, reading):
    right = (reading[0] == held.y).double().mean(0)
    assert right.min() >= 0.99, dict(zip(LAW.attributes, right.tolist()))
    assert reading[1].min() > 0 and reading[1].max() <= 1


def test_the_judge_does_not_know_the_law():
    anybody = faces("held_out", 32, 1000, first=8 * 10**6, law=fj.ANYBODY)
    right = fj.read(anybody.x)[0] == anybody.y
    assert right.double().mean(0).min() > 0.98
    never = torch.from_numpy(LAW.probability(anybody.y) == 0)
    assert 0.2 < never.double().mean() < 0.5 and right[never].all(1).double().mean() > 0.95


def test_19_of_20_real_faces_are_valid(reading):
    share = float(fj.is_valid(reading[1]).double().mean())
    assert abs(share - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def test_64_pixels_are_read_like_32(held, reading):
    large = faces("held_out", 64, 200, seed=0, first=5 * 10**6)
    values, sure = fj.read(large.x)
    assert (values != reading[0][:200]).sum() <= 2 and (sure - reading[1][:200]).abs().mean() < 0.01
    assert fj.valid_share(large.x) == pytest.approx(fj.valid_share(held.x[:200]), abs=0.02)


def test_a_face_is_read_alike_in_every_batch(held, reading):
    values, sure = fj.read(held.x[700:703])
    assert torch.equal(values, reading[0][700:703]) and torch.allclose(sure, reading[1][700:703], atol=1e-4)


def test_shipped_weights():
    entry = dc._shipped()["faces32/judge"]
    file = Path(dc.__file__).parent / "weights" / entry["file"]
    net = dc.load("faces32/judge", source="shipped")
    assert file.stat().st_size <= 1_000_000 and isinstance(net, fj.FaceJudge)
    assert net.config() == fj.face_judge().config() == {"width": 24, "features": 64}
    assert 0.5 < net.threshold < 1 and net(torch.zeros(1, 3, 32, 32)).shape == (1, sum(map(len, LAW.attributes.values())))


@pytest.mark.parametrize("bad, said", [
    (torch.zeros(2, 3, 48, 48), r"\(2, 3, 48, 48\): the judge sees"), (torch.zeros(2, 1, 32, 32), "the judge sees"),
    (torch.zeros(0, 3, 32, 32), "is needed"), (torch.full((1, 3, 32, 32), torch.nan), "nan or inf")])
def test_what_cannot_be_read_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        fj.read(bad)


def test_too_few_faces_are_refused(held):
    with pytest.raises(ValueError, match="take more than 64"):
        fj.judge_faces(held.x[:64])


# --- frequencies --------------------------------------------------------------------------------------------------

def test_total_variation_by_hand():
    assert fj.total_variation([3, 1], [0.5, 0.5]) == pytest.approx(0.25)
    assert fj.total_variation([[5, 0], [0, 5]], [[0, 0.5], [0.5, 0]]) == 1


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
@pytest.mark.parametrize("p", [[0.5, 0.5], [0.9, 0.07, 0.03], [1.0, 0.0], [0.2] * 5])
def test_floor_is_the_mean_over_all_counts(n, p):
    k = np.arange(n + 1)
    want = sum((stats.binom.pmf(k, n, q) * abs(k / n - q)).sum() for q in p) / 2
    assert fj.tv_floor(p, n) == pytest.approx(want, abs=1e-12)


def test_floor_against_simulation():
    p, n = LAW.marginal("colour", "hat"), 500
    drawn = runs.rng(1).multinomial(n, p.ravel(), 2000)
    found = np.array([fj.total_variation(c, p) for c in drawn])
    assert abs(found.mean() - fj.tv_floor(p, n)) < 4 * found.std() / 2000 ** 0.5


def test_fresh_faces_lie_at_the_floor(held):
    score = fj.judge_faces(held.x)
    assert score.n == 2000 and 0.9 < score.ratio < 1.1 and score.impossible < 0.01
    assert score.fd < 1.5 * score.fd_floor and score.excess(score.worst) < 3
    assert len(score.attributes) == 12 and len(score.pairs) == 66 and score.floors.keys() == score.attributes.keys() | score.pairs.keys()
    assert f"{100 * score.valid:.1f} % valid" in str(score) and "n = 2000" in str(score)


def test_true_labels_give_what_the_law_gives(held):
    alone, pairs, floors = fj._variations(held.y)
    counts = np.bincount(held.y[:, 3], minlength=4)
    assert alone["hat"] == pytest.approx(abs(counts / 2000 - LAW.marginal("hat")).sum() / 2)
    assert 0.85 < sum(pairs.values()) / sum(floors[p] for p in pairs) < 1.15


def test_a_shifted_law_is_seen_where_it_was_shifted():
    values, parents, rows = LAW.table["glasses"]
    other = FaceLaw({**LAW.table, "glasses": (values, parents, {"*": "55 32 13"})})
    score = fj.judge_faces(faces("held_out", 32, 1000, first=6 * 10**6, law=other).x)
    assert score.worst == "glasses" and "glasses" in score.worst_pair and score.excess("glasses") > 4
    assert score.valid > 0.9


def test_impossible_people_are_seen():
    values, _, rows = LAW.table["hat"]
    other = FaceLaw({**LAW.table, "hat": (values, "hair", {**rows, "bun": "10 30 30 30"})})     # hats on buns
    sample = faces("held_out", 32, 1000, first=7 * 10**6, law=other)
    score, truth = fj.judge_faces(sample.x), (LAW.probability(sample.y) == 0).mean()
    assert 0.07 < truth < 0.11 and abs(score.impossible - truth) < 0.01
    assert "hat" in score.worst_pair and score.excess(("hair", "hat")) > 2 and score.valid > 0.9


def test_damaged_pictures_are_not_valid(held):
    x = held.x[:300]
    blurred = F.avg_pool2d(F.pad(x, [1] * 4, "replicate"), 3, 1)
    noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([x[..., :16], x.roll(1, 0)[..., 16:]], -1)
    for damaged in (blurred, (x + x.roll(1, 0)) / 2, halves, noisy):
        assert fj.valid_share(damaged) < 0.5
    assert fj.valid_share(x + 0.05 * (noisy - x)) > 0.85, "a trace of noise is forgiven"


# --- training -----------------------------------------------------------------------------------------------------

def test_labels_survive_a_mirror():
    images = faces("train", 32, 6)
    z = fj.Labelled(images).batch([4, 1])
    assert z.shape == (2, 4, 32, 32) and torch.equal(z[:, :3], images.x[[4, 1]])
    for seen in (z, z.flip(-1)):
        assert torch.equal(seen[:, 3, :12, 0].long(), images.y[[4, 1]])


def test_the_loss_is_the_sum_of_cross_entropies():
    torch.manual_seed(0)
    images, net = faces("train", 32, 5), fj.FaceJudge()
    z = fj.Labelled(images).batch(range(5))
    ours = fj.ReadingLoss(moved=0, noise=0, blur=0)(net, z, Draws(0, 0, 5, 0, 5, z))
    parts = net(images.x).split([len(v) for v in LAW.attributes.values()], 1)
    want = sum(torch.stack([-p.log_softmax(1)[i, images.y[i, k]] for i in range(5)]) for k, p in enumerate(parts))
    assert torch.allclose(ours, want, atol=1e-5)


def test_windows_move_by_a_pixel_and_repeat_the_rim():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(fj._windows(x, torch.tensor([[1, 1]])), x)
    assert torch.equal(fj._windows(x, torch.tensor([[2, 1]]))[0, 0], x[0, 0][[1, 2, 2]])
    assert torch.equal(fj._windows(x, torch.tensor([[1, 0]]))[0, 0], x[0, 0][:, [0, 0, 1, 2]])


def test_the_mean_of_nine_is_scipys():
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    want = ndimage.uniform_filter(x.numpy(), (1, 1, 3, 3), mode="nearest")
    assert np.allclose(fj._mean_of_nine(x), want, atol=1e-6)


def test_train_and_publish(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    trained = fj.train_judge("mine/judge", steps=2, n=64)
    assert trained.status == "trained" and fj.train_judge("mine/judge", steps=2, n=64).status == "reused"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "index.json").write_text(json.dumps({"other": {"file": "o", "sha256": "0"}}))
    monkeypatch.setattr(runs, "_package", lambda: tmp_path)
    monkeypatch.setattr(fj, "faces", lambda *a, **k: faces("held_out", 32, 100))     # calibrates on fewer
    digest = fj.publish(trained)
    index = json.loads((tmp_path / "weights" / "index.json").read_text())
    assert index["other"] and index["faces32/judge"]["sha256"] == digest
    net = dc.load(str(tmp_path / "weights" / "faces32-judge.safetensors"))
    x, plain = faces("held_out", 32, 100).x, trained.net.cpu()
    assert torch.allclose(net(x), plain(x), atol=0.02) and not net.out.weight.half().float().sub(net.out.weight).any()
    assert net.features(x).var(0).mean() == pytest.approx(1, abs=0.01)
    assert net.threshold == pytest.approx(fj.look(x, net)[2].amin(1).quantile(0.05).item())
