"""Tasks: what they bring fits together, and slips are refused with the list of what exists."""
import re

import pytest
import torch
from PIL import Image

import diffcourse as dc
from diffcourse import inception
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
    assert task("mnist14").judge is None and all(t.name == k for k, t in _TASKS.items())


def test_scores():
    faces = task("faces32").images("held_out").x[:100]
    digits = task("digits").images("held_out").x[:100]
    mnist = task("mnist28").images("held_out").x[:200]
    for name, x, words in (("faces32", faces, "% valid"), ("digits", digits, "memorisation"), ("mnist28", mnist, "recall")):
        score = task(name).score(x)
        assert score == task(name).judge(x) and words in str(score) and " F" in score.headline and task(name).why_no_score(len(x)) is None


@pytest.mark.parametrize("name, n, words", [("digits", 64, "64 images are too few, 65"), ("faces64", 5, "5 images"), ("mnist14", 5000, "mnist14 has no judge"),
                                            ("mnist28", 112, "112 images are too few, 113"), ("mnist28", 5000, "5000 images have no floor, 1996 at most"),
                                            ("celeba64", 999, "FID needs 1,000"), ("celeba64", 1000, "Inception's weights are not in .*inception_weights()")])
def test_no_score_is_said(name, n, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    t = task(name)
    found = t.score(torch.zeros(1, *t.shape).expand(n, *t.shape))
    assert re.search(words, t.why_no_score(n)) and str(found) == f"no score: {t.why_no_score(n)}" and found.headline == "–"


def test_photographs_get_their_fid(folder, tmp_path, monkeypatch):
    t, seen = task(folder, size=16), []
    (tmp_path / "w.pth").touch()
    monkeypatch.setattr(inception, "fid", lambda *given: seen.append(given) or "FID")
    x = torch.zeros(1000, 3, 16, 16)
    assert t.score(x, tmp_path / "w.pth") == "FID" and seen == [(x, t, tmp_path / "w.pth")]


def test_a_lost_class_is_named_and_no_crash():
    images = task("mnist28").images("train")
    found = task("mnist28").score(images.x[images.y == 1][:150])
    assert found.lost and 1 not in found.lost and "lost" in str(found) and task("mnist28").features(images.x[:5]).shape == (5, 112)


@pytest.mark.parametrize("x", [torch.zeros(100, 3, 8, 8), torch.full((100, 1, 8, 8), torch.nan)])
def test_what_cannot_be_scored(x):
    with pytest.raises(ValueError, match=r"finite ones of \(1, 8, 8\)"):
        task("digits").score(x)


def pictures(folder, n, size=20):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.new("RGB", (size, size), (i, 2 * i, 0)).save(folder / f"{i:03d}.png")
    return folder


def test_a_folder_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    folder = pictures(tmp_path / "mine", 40)
    own = task(folder, 16)
    assert len(own.images("all")) == 40
    pictures(folder, 45)
    assert len(own.images("all")) == 45


def test_a_folder_with_the_name_of_a_task_is_another_task(tmp_path):
    own = task(pictures(tmp_path / "faces", 2), 32)
    assert own.name.startswith("faces32-") and task(tmp_path / "faces", 16).name == "faces16"


def test_a_teacher_in_a_file_of_another_task(tmp_path):
    from diffcourse import runs

    net = task("faces64").net()
    config = {"class": "UNet", "config": net.config()}
    runs.save_tensors(tmp_path / "t.safetensors", net.state_dict(), {"net": config, "run": "faces64/flow"})
    with pytest.raises(ValueError, match="of another task than celeba64"):
        task("celeba64").teacher(str(tmp_path / "t.safetensors"))


@pytest.mark.parametrize("size", [64, 72, 96, 128, 256])
def test_folders_of_large_images_have_a_network(tmp_path, size):
    net = task(pictures(tmp_path / "mine", 2), size).net(base=8, blocks=1, heads=2)
    with torch.no_grad():
        assert net(torch.zeros(1, 3, size, size), torch.zeros(1)).shape == (1, 3, size, size)


def test_a_size_that_its_levels_do_not_divide(tmp_path):
    with pytest.raises(ValueError, match="30"):
        task(pictures(tmp_path / "mine", 2), 30).net()


def test_a_folder_that_is_not_mirrored_and_has_broken_files(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    folder = pictures(tmp_path / "mine", 12)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="skip_broken=True"):
        task(folder, 16).images("all")
    own = task(folder, 16, flip=False, skip_broken=True).images("all")
    assert len(own) == 12 and not own.flip


def test_what_a_training_keeps_is_told_with_its_settings():
    assert task("digits").settings(keep_every=500, lr=1e-4)["keep_every"] == 500
    with pytest.raises(ValueError, match="did you mean 'keep_every'"):
        task("digits").settings(kept_every=5)


def test_two_folders_of_one_name(tmp_path, monkeypatch, recwarn):
    "Their runs have one name: a teacher of the other's images is used, and said."
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))
    tasks = []
    for place, n in (("here", 9), ("there", 12)):
        (tmp_path / place / "faces").mkdir(parents=True)
        pictures(tmp_path / place / "faces", n)
        tasks.append(task(str(tmp_path / place / "faces"), 8))
    net = dc.UNet(3, 8, base=8, mults=(1,), attention=(), heads=2)
    dc.fit(dc.FlowMatching(), net, tasks[0].images(), tasks[0].run("flow"), 2, batch=2)
    recwarn.clear()
    tasks[0].teacher("flow")
    assert not recwarn
    with pytest.warns(UserWarning, match="was trained on other images than the folder of"):
        tasks[1].teacher("flow")
