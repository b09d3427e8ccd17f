"""The command line: every example of its help, the library's own results, the chapters' own runs, and one line for what is wrong."""

import configparser
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import diffcourse as dc
from diffcourse import methods, terminal
from diffcourse.catalogue import trainings
from diffcourse.cli import main
from diffcourse.images import save_images

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"train": "-p steps=2", "evaluate": "-n 100", "bench": "--batch 4 --repeats 1 --steps 1",
         "sample": "--steps 2"}


def call(line, answer=""):
    """Exit code and both streams of a command line."""
    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(answer)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(shlex.split(line))
    finally:
        sys.stdin = stdin
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with two trained runs, and a folder with images, in which we stand."""
    place = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFCOURSE_HOME", str(place / "home"))
        patch.chdir(place)
        losses = {"flow": dc.FlowMatching(), "ddpm": dc.DenoisingLoss(dc.VP.cosine(), "v")}
        for name, loss in losses.items():  # a little more than what the package has
            dc.fit(loss, dc.task("digits").net(), dc.digits(), f"digits/{name}", 2, start=f"digits/{name}", lr=1e-6)
        save_images(torch.rand(30, 3, 16, 16) * 2 - 1, place / "FOLDER")
        yield place


EVERY = [e for examples in terminal.EXAMPLES.values() for e in examples]


@pytest.mark.parametrize("line", EVERY)
def test_every_example_of_the_help_runs(line, home, tmp_path, monkeypatch):
    command = line.split()[0]
    if command == "train" or " rm " in line:
        monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    if " rm " in line:
        methods.train("ddpm", "digits", steps=1)
    small = "-p iterations=2" if "distilled" in line else SMALL.get(command, "")
    code, out, err = call(f"{line} {small}")
    assert code == 0 or command == "doctor", err
    assert out.strip() and "Traceback" not in err
    if "--json" in line:
        json.loads(out)


@pytest.mark.parametrize("name", terminal.EXAMPLES)
def test_the_help_shows_the_examples(name):
    code, out, err = call(f"{name} --help")
    assert code == 0 and not err
    for example in terminal.EXAMPLES[name]:
        assert f"  diffcourse {example}\n" in out


def test_help_loads_no_torch():
    code = ("import runpy, sys\nsys.argv = ['diffcourse', '--help']\ntry:\n    runpy.run_module('diffcourse', run_name='__main__')\n"
            "except SystemExit as e:\n    print('code', e.code)\n"
            "print('loaded', sorted({'torch', 'numpy', 'matplotlib', 'torchvision', 'rich'} & {*sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "code 0" in done.stdout and "loaded []" in done.stdout, done.stdout + done.stderr
    assert "Usage: diffcourse" in done.stdout


def test_the_script_is_declared():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["console_scripts"] == "diffcourse=diffcourse.cli:main"
    assert {"typer", "rich", "pyyaml"} <= {re.match(r"[\w-]+", r)[0] for r in settings["DEFAULT"]["requirements"].split()}


def test_no_command_shows_the_help_on_the_other_stream():
    for line in ("", "runs"):
        code, out, err = call(line)
        assert code == 2 and out == "" and err.startswith("Usage: diffcourse") and "Commands:\n" in err


# -- the same as the library -------------------------------------------------

def pixels(file):
    return Image.open(file).tobytes()


def test_sample_gives_the_images_of_the_library(home, tmp_path):
    code, out, err = call(f"sample digits/flow-labels --solver ab2 --steps 3 --seeds 5:9 --condition 1,2 --guide c=2.0 --out {tmp_path / 'a'}")
    assert code == 0, err
    den = dc.load("digits/flow-labels")
    made = dc.sample(dc.Guided(den, 2.0), (1, 8, 8), dc.AB2(), dc.uniform(3), range(5, 9), condition=[1, 2, 1, 2])
    for file in save_images(made.x, tmp_path / "b", range(5, 9)):
        assert pixels(file) == pixels(tmp_path / "a" / file.name)


def test_a_trajectory_has_every_state(home, tmp_path):
    code, out, err = call(f"sample digits/flow -n 2 --steps 3 --trajectory --out {tmp_path} --json")
    assert code == 0, err
    files = json.loads(out)["files"]
    assert len(files) == 2 * (1 + 4) and all(Path(f).is_file() for f in files)
    assert pixels(tmp_path / "000001.png") == pixels(tmp_path / "state-003" / "000001.png")


def test_a_result_is_alone_on_its_stream(home, tmp_path):
    code, out, err = call(f"sample digits/flow -n 2 --steps 1 --out {tmp_path} --json")
    assert json.loads(out)["nfe"] == 1
    assert "digits/flow: local run" in err


def test_evaluate_scores_what_the_library_scores(home):
    code, out, err = call("evaluate digits/flow --steps 2 -n 70 --metrics fd --json")
    assert code == 0, err
    record = json.loads(out)
    made = dc.sample(dc.load("digits/flow"), (1, 8, 8), dc.AB2(), dc.uniform(2), range(1000, 1070))
    assert record["fd"] == pytest.approx(dc.task("digits").score(made.x).fd, rel=1e-6)
    assert record["seeds"] == "1000-1069" and record["nfe"] == 2 and "kid" not in record


@pytest.mark.parametrize("tasks, kind", [(["digits"], "evaluation.Score"), (["mnist28"], "yardstick.Marks"),
                                         (["faces32", "faces64"], "faces_judge.FaceScore"), (["celeba64"], "inception.Fidelity")])
def test_the_metrics_of_a_task_are_fields_of_its_score(tasks, kind):
    module, name = kind.split(".")
    fields = {f.name for f in dataclasses.fields(getattr(getattr(__import__(f"diffcourse.{module}"), module), name))}
    for task in tasks:
        for metric in terminal.metrics_of("", task):
            assert fields & {*terminal.METRICS[metric]}, (task, metric)


# -- the runs of the chapters ------------------------------------------------

CELLS = {  # method -> parameters at a small size; cells of the chapter that check and train
    "ddpm": ({"steps": 2}, "61ae4d5f 116f05c5"),
    "flow": ({"steps": 2, "time_law": [0.1, 1.0]}, "8a919086 bd147f56"),
    "distilled": ({"iterations": 2, "compact_iterations": 2, "student": {"dropout": 0.1}},
                  "8f37d7dc 1dbbbe4e f0782c52 87c5396c c427a34a 8deac2bf"),
    "meanflow": ({"steps": 2, "settings": {"lr": 5e-4}}, "6fa672b8 c7ebd76a"),
    "labels": ({"steps": 2, "student_steps": 2}, "e7f58c4e d584d837 050db212 0bd75447"),
}


def script(page, given, ids):
    """The cells of a notebook that import, define and declare, and those named, one after the other: a chapter without its lesson."""
    codes, program = ids.split(), []
    for cell in json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text())["cells"]:
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or text.startswith("#| hide") or "by-hand" in tags:
            continue
        imports = re.match(r"(import|from) ", text) and not re.search(r"(?m)^\w+ = ", text)
        if imports or "parameters" in tags or text.startswith("#| export") or cell["id"] in codes:
            program.append(text)
        if "parameters" in tags:
            program.append("\n".join(f"{k} = {v!r}" for k, v in given.items()))
        if cell["id"] == ids.split()[0]:  # which checks the parameters; what its lesson made and its training reads
            program.append("import torch\nfrom diffcourse.paths import Linear\npath, held = Linear(), torch.zeros(2, 2, 1, 8, 8)")
        codes = [c for c in codes if c != cell["id"]]
    assert not codes
    return "".join(f"exec(compile({text!r}, 'cell', 'exec'), globals())\n" for text in program)  # each by itself, as in a kernel


@pytest.mark.parametrize("method", CELLS)
def test_train_makes_the_run_of_the_chapter(method, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    given, ids = CELLS[method]
    (tmp_path / "chapter.py").write_text(script(methods.METHODS[method].page, given, ids))
    done = subprocess.run([sys.executable, tmp_path / "chapter.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = {(t.name, t.identity) for t in trainings()}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({**given, "samples": 100}))
    code, out, err = call(f"train {method} --task digits -f {tmp_path / 'given.yaml'} --json")
    assert code == 0, err
    rows = json.loads(out)
    assert {(r["run"], r["identity"]) for r in rows} == before and {r["status"] for r in rows} == {"reused"}


@pytest.mark.parametrize("method", methods.METHODS)
def test_files_of_parameters_are_those_of_the_chapters(method):
    m = methods.METHODS[method]
    usual = yaml.safe_load((ROOT / "configs/digits" / f"{m.page}.yaml").read_text())
    assert m.defaults == {k: usual[k] for k in m.defaults}
    assert {*usual} == {*m.defaults, *m.drawn.split(), "data", "size"}
    for file in ROOT.glob(f"configs/*/*{m.page}*.yaml"):
        methods.chosen(method, yaml.safe_load(file.read_text()) or {})


def test_single_parameters_count_more_than_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nsettings: {lr: 1.0e-3, batch: 8}\n")
    values = terminal.parameters_of([tmp_path / "a.yaml"], ["steps=4", "settings.lr=2e-4"])
    assert values == {"steps": 4, "settings": {"lr": 2e-4, "batch": 8}}


# -- what is wrong -----------------------------------------------------------

WRONG = {  # line -> what the answer names
    "sample digits/flwo": "'digits/flow'",
    "sample digits/flow@zzz": "digits/flow@",
    "sample digits/classifier": "draws no images",
    "sample digits/flow --solver ab3": "'ab2'",
    "sample digits/flow --solver ddim:eat=1": "eta",
    "sample digits/flow --solver ddim:0.5": "option=value",
    "sample digits/flow --grid unifrom": "'uniform'",
    "sample digits/flow --steps 0": "--steps: 0",
    "sample digits/flow --sed 0:9": "--seeds",
    "sample digits/flow -n 0": "0: 1 or more",
    "sample digits/flow --seeds 9:9": "9:9",
    "sample digits/flow --seeds many": "many",
    "sample digits/flow --seeds 0:9 -n 8": "9 seeds",
    "sample digits/flow-labels --condition a": "whole numbers",
    "sample digits/flow --guide much": "much",
    "smaple digits/flow": "'sample'",
    "runs lst": "'list'",
    "train flwo": "'flow'",
    "train flow --task digitz": "'digits'",
    "train flow -p stepz=5": "'steps'",
    "train flow -p steps=many": "steps",
    "train flow -p steps": "name=value",
    "train flow -f nowhere.yaml": "nowhere.yaml",
    "evaluate digits/flow --metrics fad": "fd",
    "evaluate digits/flow --metrics fid": "digits has fd",
    "evaluate digits/flow --task digitz": "'digits'",
    "data info nowhere/at/all": "nowhere/at/all",
    "data show digits --split al": "held_out",
    "data show digits --out digits.gif": ".png",
    "runs show digits/flwo": "'digits/flow'",
    "bench digits/meanflow": "two times",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_asked_is_one_line(line, home):
    code, out, err = call(line)
    assert code == 2, (out, err)
    said = [text for text in err.splitlines() if not re.match(r"digits/\S+: (local|weights)", text)]
    assert out == "" and len(said) == 1 and said[0].startswith("diffcourse: "), err
    assert WRONG[line] in said[0]


def broken(kind, folder):
    file = folder / f"{kind}.safetensors"
    whole = (ROOT / "diffcourse/weights" / dc._shipped()["digits/flow"]["file"]).read_bytes()
    if kind == "pickle":
        torch.save({"a": torch.ones(1)}, file)
    elif kind == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    return file


@pytest.mark.parametrize("kind, said", [("truncated", "no whole safetensors file"), ("pickle", "refused"), ("missing", "no file")])
def test_a_file_that_cannot_be_read(kind, said, tmp_path):
    code, out, err = call(f"sample {broken(kind, tmp_path)} --out {tmp_path / 'out'}")
    assert code == 1 and out == "" and said in err and "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_a_task_without_data(home):
    code, out, err = call("data info celeba64")
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert "img_align_celeba" in err


def test_a_task_without_a_judge_and_too_few_images(home):
    for line in ("evaluate digits/flow --task mnist14", "evaluate digits/flow -n 9"):
        code, out, err = call(line)
        assert code == 1 and "no score" in err and len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "out"]
    if os.getuid():
        (tmp_path / "fixed").mkdir(mode=0o555)
        places.append(tmp_path / "fixed")
    for place in places:
        code, out, err = call(f"sample digits/flow -n 1 --out {place}")
        assert code == 1 and out == "" and "--out" in err and len(err.splitlines()) == 1


def test_a_network_of_another_task(home):
    code, out, err = call("evaluate digits/flow --task mnist28 -n 200 --steps 1")
    assert code == 1 and "made for images" in err


def test_rm_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path))
    methods.train("flow", "digits", steps=1)
    code, out, err = call("runs rm digits/flow", answer="n\n")
    assert (code, out) == (1, "") and "Delete digits/flow@" in err and len(trainings()) == 1
    code, out, err = call("runs rm digits/flow", answer="y\n")
    assert code == 0 and "deleted" in out and trainings() == []


def test_an_interruption_has_its_code(monkeypatch):
    def stop(*given, **more):
        raise KeyboardInterrupt("stopped after iteration 7")

    monkeypatch.setattr(methods, "train", stop)
    code, out, err = call("train flow")
    assert (code, out, err) == (130, "", "diffcourse: stopped after iteration 7\n")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(methods, "train", lambda *a, **k: {}["nothing"])
    with pytest.raises(KeyError):
        call("train flow")
