"""Distillation: where a student must land, what it must reproduce, its losses, stages and trainings, and what is refused."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diffcourse as dc
from diffcourse import checkpoints, runs
from diffcourse.ddim import DDIM
from diffcourse.distill import (
    LOSSES, SETTINGS, WEIGHTS, Distillation, Middle, _start, check_student, compact,
    ddim_step, distill, follow, interval_weight, landing, midpoint_step, stages,
)
from diffcourse.flow_matching import FlowMatching
from diffcourse.paths import PREDICTIONS, VP, Linear, Prediction, VPTable
from diffcourse.playground import MLP, mixture, stratified_normal
from diffcourse.sampling import Denoiser, Euler, sample, uniform
from diffcourse.solvers import Midpoint
from diffcourse.training import Draws, Settings, fit, run_identity
from diffcourse.unet import UNet, count_macs

ROOT = Path(__file__).resolve().parents[1]
MIX, LINE = mixture(), Linear()
PATHS = [Linear(), VP.cosine(), VP.linear(), VP.sigmoid()]
TINY = dict(size=4, base=8, attention=(2,), heads=2)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(path=LINE, predicts="flow"):
    return Denoiser(MIX.net(path, predicts), path, predicts)


def unet(seed=0, **more):
    torch.manual_seed(seed)
    net = UNet(**TINY | more)
    for p in net.parameters():  # zeros would hide what is wrong
        nn.init.normal_(p, std=0.15)
    return net.eval()


def teacher(seed=0, **more):
    return Denoiser(unet(seed, **more).requires_grad_(False), LINE, "flow")


def draws(x, step=0, seed=0):
    return Draws(seed, step, len(x), 0, len(x), x)


def images(n=16):
    return normal(n, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)


# where a student must land


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_step_with_the_landing_lands(path, predicts):
    x, y = normal(50, 2), normal(50, 2, seed=1)
    t = 0.1 + 0.85 * torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for s in (t / 2, t - 0.05, t * 0, torch.full_like(t, 0.99)):
        out = landing(path, predicts, x, t, y, s)
        den = Denoiser(lambda x, t: out, path, predicts)
        assert torch.allclose(ddim_step(den, x, t, s), y, atol=1e-8)


@pytest.mark.parametrize("predicts", ["flow", "v", "x0"])
def test_landing_begins_in_pure_noise(predicts):
    for path in (Linear(), VP.cosine()):  # alpha = 0: eps tells nothing there
        x, y = normal(9, 1), normal(9, 1, seed=1)
        out = landing(path, predicts, x, 1.0, y, 0.5)
        found = ddim_step(Denoiser(lambda x, t: out, path, predicts), x, 1.0, 0.5)
        assert torch.allclose(found, y)


def test_formulas_of_the_paper():
    x, y, t, s = normal(9, 1), normal(9, 1, seed=1), 0.7, 0.3
    assert torch.allclose(landing(LINE, "flow", x, t, y, s), (y - x) / (s - t))
    for path in PATHS:
        a, b, c, d = path.alpha(t), path.alpha(s), path.sigma(t), path.sigma(s)
        x0 = (y - d / c * x) / (b - d / c * a)  # Salimans and Ho, algorithm 2
        assert torch.allclose(landing(path, "x0", x, t, y, s), x0)
        eps = (x - a * x0) / c
        assert torch.allclose(landing(path, "v", x, t, y, s), a * eps - c * x0)
        assert torch.allclose(landing(path, "x0", x, t, y, 0.0), y)


def test_flow_student_learns_the_mean_velocity():
    den, x, t, s = exact(), normal(9, 1), 0.6, 0.2
    slopes, y = [], x
    for k in range(4):
        slopes.append(den.flow(y, 0.6 - 0.1 * k))
        y = y - 0.1 * slopes[-1]
    want = landing(LINE, "flow", x, t, follow(den, x, t, s, 4), s)
    assert torch.allclose(want, sum(slopes) / 4)


# the teacher's steps


@pytest.mark.parametrize("path, predicts", [(LINE, "flow"), (VP.cosine(), "v"), (VP.linear(), "eps")], ids=str)
@pytest.mark.parametrize("rule, solver, calls", [("ddim", DDIM(), 4), ("midpoint", Midpoint(), 8)])
def test_follow_is_sample(path, predicts, rule, solver, calls):
    den, x = exact(path, predicts), normal(9, 1)
    found = follow(den, x, 0.9, 0.3, 4, rule)
    assert den.nfe == calls
    out = sample(den, (1,), solver, uniform(4, 0.9, 0.3), x=x)
    assert torch.allclose(found, out.x, atol=1e-12)


@pytest.mark.parametrize("rule", ["ddim", "midpoint"])
def test_times_are_those_of_each_sample(rule):
    den, x = exact(VP.cosine(), "v"), normal(9, 1)
    t = torch.linspace(0.2, 1, 9, dtype=torch.float64)
    together = follow(den, x, t, t / 2, 3, rule)
    for i in range(9):
        alone = follow(den, x[i : i + 1], float(t[i]), float(t[i] / 2), 3, rule)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)


def test_midpoint_is_accurate():
    x = normal(9, 1)
    truth = MIX.flow_map(x, 0.9, 0.5, LINE)
    errors = [(follow(exact(), x, 0.9, 0.5, n, "midpoint") - truth).abs().mean() for n in (4, 8)]
    assert 3.3 < errors[0] / errors[1] < 4.7
    assert torch.equal(midpoint_step(exact(), x, 0.9, 0.5), follow(exact(), x, 0.9, 0.5, 1, "midpoint"))


# what a student without error does


def perfect(den, few, many, rule="ddim"):
    def net(x, t):
        s = (t - 1 / few).clamp(min=0)
        y = follow(den, x, t, s, many // few, rule)
        return landing(den.path, den.predicts, x, t, y, s)

    return Denoiser(net, den.path, den.predicts)


@pytest.mark.parametrize("path, predicts", [(LINE, "flow"), (VP.cosine(), "v"), (VP.cosine(), "x0")], ids=str)
@pytest.mark.parametrize("steps", [10, 5, 4, 2, 1])
def test_perfect_student_is_the_map_of_its_teacher(path, predicts, steps):
    den, x = exact(path, predicts), stratified_normal(21)[:, None]
    student = den
    for many, few in stages(steps):
        student = perfect(student, few, many)
    found = sample(student, (1,), DDIM(), uniform(steps), x=x)
    assert found.nfe == steps
    want = sample(den, (1,), DDIM(), uniform(20), x=x).x
    assert torch.allclose(found.x, want, atol=1e-9)
    flow = MIX.flow_map(x, 1.0, 0.0, path)
    assert (want - flow).abs().mean() > 1e-3, "and not the flow"


def test_accurate_target_leaves_the_teachers_error_behind():
    x = stratified_normal(51)[:, None]
    flow = MIX.flow_map(x, 1.0, 0.0, LINE)
    ends = [
        sample(d, (1,), Euler(), uniform(n), x=x).x
        for d, n in ((perfect(exact(), 5, 10, "midpoint"), 5), (exact(), 20))
    ]
    accurate, halved = [(e - flow).abs().mean() for e in ends]
    assert accurate < 0.1 * halved


@pytest.mark.parametrize("rule", ["ddim", "midpoint"])
@pytest.mark.parametrize("path, predicts", [(LINE, "flow"), (VP.cosine(), "v")], ids=str)
def test_loss_is_zero_for_the_perfect_student_alone(path, predicts, rule):
    den, x0 = exact(path, predicts), MIX.sample(64, 0)[:, None]
    for name in LOSSES:
        loss = Distillation(den, 5, 4, rule, name)
        student = perfect(den, 5, 20, rule).net
        assert loss(student, x0, draws(x0)).max() < 1e-4
        naive = loss(den.net, x0, draws(x0))
        assert naive.shape == (64,) and naive.mean() > 1e-3


@pytest.mark.parametrize("path", [LINE, VP.cosine()], ids=str)
def test_a_step_of_two_evaluations(path):
    "What counts is said halfway, where the first answer leads."
    den, x0 = exact(path, "flow"), MIX.sample(64, 0)[:, None]
    twice = dict(rule="midpoint", student_rule="midpoint")

    def net(x, t):  # stands still first, so the half is x; then the slope of the whole step
        first = (t * 10).round() % 2 == 0  # where steps begin: at even tenths
        t, s = (t + 0.1).clamp(max=1), (t - 0.1).clamp(min=0)
        y = follow(den, x, t, s, 2, "midpoint")
        slope = (y - x) / (s - t)[:, None]
        return torch.where(first[:, None], 0 * x, slope)

    for name in LOSSES:
        loss = Distillation(den, 5, 2, loss=name, **twice)
        assert loss(net, x0, draws(x0)).max() < 1e-10 < 1e-5 < loss(den.net, x0, draws(x0)).mean()
        one = Distillation(den, 5, 1, loss=name, **twice)  # a step for a step: the teacher is its student
        assert one(den.net, x0, draws(x0)).max() < 1e-10
    x = stratified_normal(21)[:, None]
    found, want = (sample(d, (1,), *how, x=x) for d, how in (
        (Denoiser(net, path, "flow"), loss.sampler), (den, (Midpoint(), uniform(10)))
    ))
    assert found.nfe == 10 and torch.allclose(found.x, want.x, atol=1e-9)


def test_the_anchor_holds_what_is_said_first():
    x0, own = MIX.sample(64, 0)[:, None], draws(MIX.sample(64, 0)[:, None])
    plain, held = (Distillation(exact(), 5, rule="midpoint", student_rule="midpoint", anchor=a) for a in (0, 2.0))
    t, eps = ((own.t() * 5).long() + 1) / 5, own.noise()
    said = exact().net(LINE.add_noise(x0, eps, t), t)
    pull = held(exact().net, x0, draws(x0)) - plain(exact().net, x0, draws(x0))
    assert torch.allclose(pull, 2 * (said - (eps - x0)).square().flatten(1).mean(1), atol=1e-5)


def test_states_are_noised_data_where_steps_begin():
    seen = []

    def net(x, t):
        seen.append((x, t))
        return x

    x0 = MIX.sample(2000, 0)[:, None]
    Distillation(exact(), 4)(net, x0, draws(x0))
    ((x, t),) = seen
    assert sorted(set(t.tolist())) == [0.25, 0.5, 0.75, 1.0]
    assert all((t == u).double().mean() > 0.2 for u in t.unique())
    own = draws(x0)
    own.t()
    assert torch.allclose(x, LINE.add_noise(x0, own.noise(), t))


# distances and weights


def test_losses():
    d = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    for delta in (0.01, 0.5):
        huber = LOSSES["huber"](d, delta)
        assert torch.allclose(delta * huber, F.huber_loss(d, d * 0, reduction="none", delta=delta))
        smooth = F.smooth_l1_loss(d, d * 0, reduction="none", beta=delta)  # another of torch's: the same
        assert torch.allclose(huber, smooth)
        char = LOSSES["charbonnier"](d, delta)
        assert torch.allclose(char, (d**2 + delta**2) ** 0.5 - delta)
        for value in (huber, char):
            (slope,) = torch.autograd.grad(value.sum(), d, retain_graph=True)
            assert slope.abs().max() <= 1 + 1e-12
    assert torch.allclose(LOSSES["mse"](d, 0.1), F.mse_loss(d, d * 0, reduction="none"))


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", "score"])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_weights_are_those_of_the_image(path, predicts):
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x, out, d = normal(9, 1), normal(9, 1, seed=1), 1e-3
    moved = [Prediction(x, t, out + e, predicts, path).x0 for e in (0, d)]
    per_out = (moved[1] - moved[0])[:, 0] / d  # it is linear
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    for kind, own in (("x0", 1 + 0 * snr), ("snr+1", 1 + snr), ("truncated", snr.clamp(min=1))):
        found = interval_weight(kind, path, predicts, t)
        assert torch.allclose(found, own * per_out**2, rtol=1e-8)
    assert torch.equal(interval_weight("plain", path, predicts, t), torch.ones(9, dtype=torch.float64))


def test_weights_in_closed_form():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    assert set(WEIGHTS) == {"x0", "snr+1", "truncated"}
    for path in PATHS[1:]:  # SNR + 1 is the plain loss of v
        assert torch.allclose(interval_weight("snr+1", path, "v", t), torch.ones_like(t))
    assert torch.allclose(interval_weight("snr+1", LINE, "flow", t), t**2 + (1 - t) ** 2)
    assert torch.allclose(interval_weight("truncated", LINE, "flow", t), torch.maximum(t**2, (1 - t) ** 2))
    for path in PATHS:  # one at the noise, 1 + alpha at the image, straight between, whatever is predicted
        found = interval_weight("linear", path, "v", torch.tensor([1.0, 0.5, 0.2, 0.0]), alpha=0.6)
        assert torch.allclose(found, torch.tensor([1.0, 1.3, 1.48, 1.6]))


def test_weight_multiplies_the_loss_of_each_sample():
    x0 = MIX.sample(64, 0)[:, None]
    cases = dict(weight="plain"), dict(weight="x0"), dict(weight="linear"), dict(weight="linear", alpha=2.0)
    plain, *weighted = (Distillation(exact(), 5, **c)(exact().net, x0, draws(x0)) for c in cases)
    t = ((draws(x0).t() * 5).long() + 1) / 5
    for found, factor in zip(weighted, (t**2, 1.5 - t / 2, 3 - 2 * t)):
        assert torch.allclose(found, plain * factor, rtol=1e-5)


# the anchor and the features


def gradients(loss, net, x0):
    net.zero_grad()
    loss(net, x0, draws(x0)).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_anchor_adds_the_loss_on_data():
    den, net, x0 = teacher(), unet(1), images()
    plain, both = (Distillation(den, 5, anchor=a)(net, x0, draws(x0)) for a in (0.0, 0.5))
    own = draws(x0)
    t, eps = ((own.t() * 5).long() + 1) / 5, own.noise()  # at the states of the student, not at others
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    data = (net(x, t) - (eps - x0)).square().flatten(1).mean(1)
    assert torch.allclose(both, plain + 0.5 * data, rtol=1e-5)


def test_best_student_with_an_anchor():
    want, u, share, delta = 0.3, 1.1, 0.2, 0.01
    out = torch.linspace(-1, 2, 300_001, dtype=torch.float64)
    for name, pull in (("mse", share), ("huber", 2 * share * delta)):
        total = LOSSES[name](out - want, delta) + share * (out - u) ** 2
        best = float(out[total.argmin()])
        assert best == pytest.approx(want + pull / (1 + pull) * (u - want), abs=1e-5)


def test_best_student_with_the_anchor_of_the_loss_itself():
    "Least squares at t = 1: the best line is the mean of the two best lines, weighted 1 : c."
    x0 = MIX.sample(4000, 0)[:, None]

    def best(**more):  # of all a + b x, from the loss at four points: it is quadratic
        loss = lambda a, b: float(Distillation(exact(), 1, 2, loss="mse", **more)(lambda x, t: a + b * x, x0, draws(x0)).mean())
        o, a, b, c = loss(0, 0), loss(1, 0), loss(0, 1), loss(1, 1)
        aa, bb = (a + loss(-1, 0)) / 2 - o, (b + loss(0, -1)) / 2 - o
        h = torch.tensor([[2 * aa, c - a - b + o], [c - a - b + o, 2 * bb]])
        return torch.linalg.solve(h, -torch.tensor([a - o - aa, b - o - bb]))

    plain, naive = best(), best(anchor=1e6)
    assert (plain - naive).abs().max() > 0.05
    assert torch.allclose(best(anchor=0.5), (plain + 0.5 * naive) / 1.5, atol=1e-3)


def test_middle_keeps_what_the_network_computes_there_and_lets_go():
    net, x = unet(), images(3)
    with Middle(net) as middle:
        net(x, torch.full((3,), 0.4))
        assert middle.out.shape == (3, 16, 2, 2)
        kept = middle.out
    net(x, torch.full((3,), 0.9))
    assert middle.out is kept and not net.middle[-1]._forward_hooks


def test_features_are_zero_where_both_land_alike():
    den, x0 = teacher(), images()
    one = Distillation(den, 5, 1, features=1.0)  # one step of its own: the teacher is perfect
    assert one(den.net, x0, draws(x0)).max() < 1e-5
    two = [Distillation(den, 5, 2, features=f)(unet(1), x0, draws(x0)) for f in (0.0, 1.0, 2.0)]
    assert (two[1] > two[0]).all()
    assert torch.allclose(two[2] - two[0], 2 * (two[1] - two[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [dict(features=1.0), dict(anchor=1.0), dict(features=1.0, anchor=1.0)], ids=str)
def test_gradients_flow_to_the_student_alone(more):
    net, x0 = unet(1).train(), images()
    den = Denoiser(unet(0).requires_grad_(True), LINE, "flow")  # even where its weights could learn
    before = copy.deepcopy(den.net.state_dict())
    added = gradients(Distillation(den, 5, **more), net, x0)
    plain = gradients(Distillation(den, 5), net, x0)
    assert not torch.allclose(added, plain, rtol=1e-3)
    if "features" not in more:
        assert all(p.grad is None for p in den.net.parameters())
    frozen = teacher()
    gradients(Distillation(frozen, 5, **more), net, x0)
    assert all(p.grad is None for p in frozen.net.parameters())
    after = den.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not den.net.training


# the stages


@pytest.mark.parametrize(
    "steps, plan",
    [
        (10, [(20, 10)]),
        (5, [(20, 10), (10, 5)]),
        (4, [(20, 4)]),
        (2, [(20, 10), (10, 2)]),
        (1, [(20, 10), (10, 5), (5, 1)]),
    ],
)
def test_stages(steps, plan):
    assert stages(steps) == plan
    assert all(many % few == 0 for many, few in plan)


def test_stages_of_other_teachers():
    assert stages(1, 8) == [(8, 4), (4, 2), (2, 1)]
    assert stages(3, 9) == [(9, 3)]


@pytest.mark.parametrize("steps", [3, 6, 20, 40, 0, -5, 2.5, "5", None])
def test_steps_that_do_not_divide(steps):
    with pytest.raises(ValueError, match=r"20 steps can be distilled to \[10, 5, 4, 2, 1\]"):
        stages(steps)


# the trainings


def test_compact_costs_about_half():
    net, shape = UNet(), (1, 8, 8)
    small = compact(net)
    assert count_macs(small, shape) <= 0.55 * count_macs(net, shape)
    assert small(torch.zeros(2, *shape), torch.zeros(2)).shape == (2, *shape)
    check_student(small, net, shape)
    check_student(net, net, shape)
    with pytest.raises(ValueError, match="a smaller one is needed"):
        check_student(net, small, shape)


def test_a_larger_student_is_refused_before_any_training(home):
    with pytest.raises(ValueError, match="multiply-adds"):
        distill(teacher(), images(), 10, student=unet(1, base=16), iterations=1)
    assert not list(home.rglob("*.safetensors"))


FEW = SETTINGS | dict(batch=8, precision="fp32", warmup=1)


def train(den, steps=5, run="t/d", iterations=3, **more):
    return distill(den, images(), steps, run, iterations, settings=FEW, **more)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_two_stages_are_made_and_reused():
    den = teacher()
    before = copy.deepcopy(den.net.state_dict())
    student, made = train(den)
    assert [m.status for m in made] == ["trained"] * 2
    assert [m.folder.parent.name for m in made] == ["d-20-10", "d"]
    assert same(before, den.net.cpu().state_dict()) and not any(p.requires_grad for p in den.net.parameters())
    assert (student.path.config(), student.predicts) == (LINE.config(), "flow")
    again, reused = train(den)
    assert [m.status for m in reused] == ["reused"] * 2
    assert same(student.net.state_dict(), again.net.state_dict())
    loaded = dc.load("t/d")
    assert same(student.net.cpu().state_dict(), loaded.net.state_dict()) and loaded.predicts == "flow"


def test_an_interrupted_stage_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole, _ = train(teacher(), run="t/whole", iterations=4)
    count, save = [], checkpoints.Writer.save

    def stops(self, *args):
        save(self, *args)
        count.append(1)
        if len(count) == 7:  # in the second stage
            raise KeyboardInterrupt

    from diffcourse import distill as module

    saves = lambda *a, **k: fit(*a, save_every=0.0, **k)
    with monkeypatch.context() as m:
        m.setattr(module, "fit", saves)
        m.setattr(checkpoints.Writer, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            train(teacher(), iterations=4)
    student, made = train(teacher(), iterations=4)
    assert [m.status for m in made] == ["reused", "resumed"]
    assert same(whole.net.state_dict(), student.net.state_dict())


def test_identity_follows_the_weights_of_the_teacher():
    data = SimpleNamespace(name="none", hash="0", flip=False)

    def identity(den, **more):
        return run_identity(Distillation(den, 5, **more), unet(2), data, Settings(3))[0]

    first = identity(teacher(0))
    assert identity(teacher(0)) == first
    assert identity(teacher(1)) != first
    changed = teacher(0)
    next(changed.net.parameters()).data.view(-1)[0] += 1e-3
    assert identity(changed) != first
    for more in (dict(loss="mse"), dict(anchor=0.1), dict(ratio=4), dict(rule="midpoint"), dict(delta=0.1)):
        assert identity(teacher(0), **more) != first


def test_teachers_that_are_functions_are_told_apart():
    "Two functions would share a run, and the second be served the first's student."
    other = dc.GaussianMixture([-1.0, 1.0], [0.5, 0.5], [0.5, 0.5])
    folders = []
    for mix in (MIX, MIX, other):
        den = Denoiser(mix.net(Linear(), "flow"), Linear(), "flow")
        torch.manual_seed(0)
        made = fit(Distillation(den, 5), MLP(), MIX.sample(8, 0).float()[:, None], run="t/none", steps=1)
        folders.append(made.folder)
    assert folders[0] == folders[1] != folders[2]


def test_targets():
    followed, made = train(teacher(), target="teacher")
    assert len(made) == 1
    own = Distillation(teacher(), 5, 2, "midpoint")
    alone = fit(own, unet(0).requires_grad_(True), images(), run="t/alone", steps=3, **FEW)
    assert same(followed.net.state_dict(), alone.net.state_dict())
    with pytest.raises(ValueError, match="'student'.*'teacher'"):
        train(teacher(), target="flow")


def test_a_student_is_followed_by_the_steps_it_was_taught():
    "The midpoint rule asks halfway through a step, where a student was never asked: only the first teacher knows."
    _, made = train(teacher(), rule="midpoint")
    first = Distillation(teacher(), 10, 2, "midpoint")
    ten = fit(first, unet(0).requires_grad_(True), images(), run="t/ten", steps=3, **FEW)
    second = Distillation(Denoiser(ten.net, LINE, "flow"), 5, 2, "ddim")
    five = fit(second, copy.deepcopy(ten.net).requires_grad_(True), images(), run="t/five", steps=3, **FEW)
    for found, own in zip(made, (ten, five)):
        assert same(found.net.state_dict(), own.net.state_dict())
    _, (_, five) = train(teacher(), rule="midpoint", student_rule="midpoint")
    both = dict(rule="midpoint", student_rule="midpoint")
    ten = fit(Distillation(teacher(), 10, 2, **both), unet(0).requires_grad_(True), images(), run="t/ten", steps=3, **FEW)
    second = Distillation(Denoiser(ten.net, LINE, "flow"), 5, 2, **both)
    own = fit(second, copy.deepcopy(ten.net).requires_grad_(True), images(), run="t/five", steps=3, **FEW)
    assert same(five.net.state_dict(), own.net.state_dict())


def test_another_student_learns_in_the_last_stage():
    small = compact(UNet(**TINY | dict(heads=2)))
    student, made = train(teacher(), student=small)
    assert len(made) == 2 and student.net.config() == small.config()


def test_distillation_works_in_one_dimension_and_helps():
    torch.manual_seed(0)
    crowd, easy = MIX.sample(4000, 0).float()[:, None], dict(batch=256, precision="fp32")
    made = fit(FlowMatching(), MLP(), crowd, run="t/toy", steps=150, lr=2e-2, **easy)
    den = Denoiser(made.net, LINE, "flow")
    own = SETTINGS | easy | dict(lr=5e-3)
    student, _ = distill(den, crowd, 5, "t/toy-5", 60, settings=own)
    x = stratified_normal(101).float()[:, None]
    goal, naive, found = (
        sample(d, (1,), Euler(), uniform(n), x=x).x for d, n in ((den, 20), (den, 5), (student, 5))
    )
    assert (found - goal).abs().mean() < 0.3 * (naive - goal).abs().mean()


# bad input


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(loss="l1"), r"loss='l1': choose of \['mse', 'huber', 'charbonnier'\]"),
        (dict(weight="snr"), "weight='snr': choose of"),
        (dict(rule="euler"), "rule='euler': choose of"),
        (dict(student_rule="heun"), r"student_rule='heun': choose of \['ddim', 'midpoint'\]"),
        (dict(steps=0), "steps = 0: a whole number >= 1"),
        (dict(steps=2.0), "steps = 2.0"),
        (dict(ratio=0), "ratio = 0"),
        (dict(anchor=-0.1), "anchor=-0.1: 0 or more"),
        (dict(features=math.nan), "features=nan: 0 or more"),
        (dict(delta=0.0), "delta=0.0: above 0"),
        (dict(weight="linear", alpha=-0.1), "alpha=-0.1: 0 or more"),
    ],
)
def test_bad_options(given, said):
    with pytest.raises(ValueError, match=said):
        Distillation(**dict(teacher=exact(), steps=5) | given)


def test_teachers_that_cannot_be_followed():
    vp = VP.cosine()
    with pytest.raises(ValueError, match="predicts 'eps' knows no x0 at t = 1"):
        Distillation(Denoiser(MIX.net(vp, "eps"), vp, "eps"), 5)
    den, x = Denoiser(MIX.net(VP.sigmoid(), "x0"), VP.sigmoid(), "x0"), normal(4, 1)
    with pytest.raises(ValueError, match="has no value at some t"):
        follow(den, x, torch.ones(4), torch.full((4,), 0.8), rule="midpoint")
    assert follow(den, x, torch.ones(4), torch.full((4,), 0.8)).isfinite().all()
    with pytest.raises(ValueError, match="no value at some t: take student_rule='ddim'"):
        Distillation(den, 5, student_rule="midpoint")


def test_a_teacher_on_a_table_is_followed():
    "A discrete chain has no slope; DDIM's steps between its entries need none."
    path, x = VPTable(torch.linspace(1e-3, 0.2, 100, dtype=torch.float64)), normal(4, 1)
    t, s = torch.ones(4, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    den = Denoiser(lambda x, t: x * 0, path, "x0")  # every image is zero
    y = follow(den, x, t, s)
    assert torch.allclose(y, x * (path.sigma(s) / path.sigma(t))[:, None])
    with pytest.raises(ValueError, match="a table has no derivative"):
        follow(den, x, t, s, rule="midpoint")


def test_a_student_has_no_dropout(home):
    den = Denoiser(UNet(size=4, base=8, mults=(1,), blocks=1, attention=(), dropout=0.2), Linear(), "flow")
    own = _start(None, den.net, images())
    assert {m.p for m in own.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert {m.p for m in den.net.modules() if isinstance(m, nn.Dropout)} == {0.2}


def test_options_are_refused_before_any_training(home):
    fixed = "ratio and rule: set by the steps and by target='teacher'"
    for more, says in ((dict(loss="l1"), "'l1'"), (dict(anchor=-1.0), "-1.0"), (dict(ratio=3), "ratio: set by the steps"),
                       (dict(target="teacher", rule="ddim", ratio=2), fixed)):
        with pytest.raises(ValueError, match=says):
            train(teacher(), **more)
    with pytest.raises(TypeError, match="los"):
        train(teacher(), los="mse")
    with pytest.raises(ValueError, match="can be distilled to"):
        train(teacher(), steps=3)
    assert not list(home.rglob("*.safetensors"))


def test_settings_are_merged_with_those_of_students(home):
    _, made = distill(teacher(), images(), 10, "t/merged", 1, settings=dict(batch=8, lr=3e-3))
    ran = json.loads((made[0].folder / "run.json").read_text())["settings"]
    assert {k: ran[k] for k in SETTINGS} == SETTINGS | {"lr": 3e-3} and ran["batch"] == 8


def test_what_does_not_exist_is_named_with_what_does():
    x, t = torch.zeros(2, 1), torch.ones(2)
    with pytest.raises(ValueError, match=r"rule='heun': choose of \['ddim', 'midpoint'\]"):
        follow(teacher(), x, t, t / 2, rule="heun")
    with pytest.raises(ValueError, match=r"kind='snr': choose of \['plain', 'x0', 'snr\+1', 'truncated', 'linear'\]"):
        interval_weight("snr", LINE, "flow", t)


def save(path, net):
    about = {"class": "UNet", "config": net.config()}
    meta = {"net": about, "path": LINE.config(), "predicts": "flow", "steps": 1}
    runs.save_tensors(path, net.state_dict(), meta)
    return meta


def test_teacher_files(tmp_path):
    file = tmp_path / "teacher.safetensors"
    with pytest.raises(FileNotFoundError, match="teacher.safetensors"):
        dc.load(file)
    net = unet()
    meta = save(file, net)
    student, _ = train(dc.load(file), steps=10)
    assert student.net.config() == net.config()
    meta["net"]["config"] = net.config() | {"base": 16}
    runs.save_tensors(file, net.state_dict(), meta)
    with pytest.raises(ValueError, match="does not fit"):
        dc.load(file)


def test_teacher_of_another_shape_than_the_data():
    with pytest.raises(ValueError, match=r"this network takes \(B, 1, 8, 8\)"):
        train(teacher(size=8, attention=(4,)))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(steps="3"), "choose of [10, 5, 4, 2, 1]"),
        (dict(data="faces32", teacher="digits/flow"), "'digits/flow' is of another task than faces32"),
        (dict(teacher="distilled-10"), "knows its own 10 steps alone: teacher_steps = 10"),
        (
            dict(teacher="distilled-10", teacher_steps="10", target="student", rule="midpoint"),
            "give rule and student_rule alike, not 'midpoint' and 'ddim'",
        ),
    ],
)
def test_page_stops_at_what_does_not_fit(given, said, tmp_path):
    page = ROOT / "nbs" / "06_distill.ipynb"
    command = [sys.executable, "-m", "papermill", page, "out.ipynb", "--no-progress-bar"]
    command += [word for k, v in given.items() for word in ("-p", k, v)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
