"""Tasks: what they bring fits together, and slips are refused with the list of what exists."""
import pytest
import torch
from PIL import Image

import diffcourse as dc
from diffcourse.tasks import _TASKS, task
from diffcourse.unet import count_parameters


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "my faces"
    where.mkdir()
    for k in range(40):
        Image.new("RGB", (20, 30), (6 * k, 255 - 6 * k, 99)).save(where / f"{k}.png")
    return where


@pytest.mark.parametrize("name", ["digits", "mnist14", "mnist28"])
def test_images_network_and_settings_fit(name):
    t = task(name)
    train, held = t.images(), t.images("held_out")
    assert train.shape == held.shape == t.shape and len(train) > len(held)
    net = t.net(base=8, heads=2)
    t.check_net(net)
    x = train.batch([0, 1])
    assert net(x, torch.rand(2)).shape == x.shape
    assert dc.Settings(**t.settings(steps=2)).steps == 2


def test_the_network_of_the_reference_project():
    assert count_parameters(task("celeba64").net()) == 77_531_523
    s = task("celeba64").settings()
    assert (s["steps"], s["batch"], s["lr"], s["ema"]) == (40_000, 128, 2e-4, 0.999)


@pytest.mark.parametrize("make", [lambda t: t.net(bse=16), lambda t: t.settings(step=5), lambda t: t.images("test"), lambda t: t.settings(steps=0)])
def test_slips_are_refused(make):
    with pytest.raises(ValueError, match="base|steps|train|whole number"):
        make(task("digits"))


@pytest.mark.parametrize("name, kind, words", [
    ("faces23", ValueError, "did you mean 'faces32'.*digits, mnist14, mnist28, faces32, faces64, celeba64"),
    ("no/where", FileNotFoundError, "neither a task nor a folder"), ("", ValueError, "say how many pixels|neither"),
])
def test_unknown_tasks(name, kind, words):
    with pytest.raises(kind, match=words):
        task(name)


def test_sizes():
    with pytest.raises(ValueError, match="8 pixels a side, not 64"):
        task("digits", size=64)
    assert task("digits", size=8) is task("digits") is task("digits", size=0)


def test_a_folder(folder):
    with pytest.raises(ValueError, match="size=64"):
        task(folder)
    t = task(str(folder), size=16)
    assert t.name == "my-faces16" and t.run("flow") == "my-faces16/flow" and t.shape == (3, 16, 16)
    parts = [t.images(s) for s in ("train", "held_out", "all")]
    assert [len(p) for p in parts] == [35, 5, 40]
    every = {tuple(p.batch([i]).flatten().tolist()) for p in parts[:2] for i in range(len(p))}
    assert len(every) == 40  # no image in both
    grey = task(folder, size=16, channels=1)
    assert grey.images().shape == (1, 16, 16)
    t.net()(t.images().batch([0]), torch.zeros(1))


def test_an_archive_and_a_folder_have_the_same_split(folder, tmp_path):
    import shutil

    file = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    a, b = task(folder, size=16).images("held_out"), task(file, size=16).images("held_out")
    assert torch.equal(a.batch(range(len(a))), b.batch(range(len(b))))
    assert task(file, size=16).name == "packed16"


def test_a_network_of_another_task_is_refused():
    with pytest.raises(ValueError, match=r"the teacher is made for images of \(1, 8, 8\), faces32 has \(3, 32, 32\)"):
        task("faces32").check_net(dc.UNet(), "the teacher")
    task("faces32").check_net(torch.nn.Linear(1, 1))  # one that does not say its size


def test_a_teacher_is_a_run_of_its_task_or_a_file(monkeypatch):
    asked, digits, net = [], task("digits"), dc.UNet()
    flow = dc.Denoiser(net, dc.Linear(), "flow")
    monkeypatch.setattr(dc, "load", lambda name, source: asked.append((name, source)) or flow)
    assert digits.teacher("flow").net is digits.teacher("digits/flow", "shipped").net is net
    digits.teacher("there/on/disk.safetensors")
    assert asked == [("digits/flow", "auto"), ("digits/flow", "shipped"), ("there/on/disk.safetensors", "auto")]
    with pytest.raises(ValueError, match="'faces32/flow' is of another task than digits"):
        digits.teacher("faces32/flow")
    with pytest.raises(ValueError, match="the teacher is made for images of"):
        task("faces32").teacher("flow")
    monkeypatch.setattr(dc, "load", lambda name, source: torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="a U-Net with its path"):
        digits.teacher("classifier")


def test_judges():
    x = task("faces32").images("held_out").x[:100]
    assert task("faces32").judge(x).valid > 0.85 and task("faces32").features(x).shape == (100, 64)
    assert task("digits").judge(task("digits").images("held_out").x[:100]).fd > 0
    assert task("mnist28").judge is None and all(t.name == k for k, t in _TASKS.items())
