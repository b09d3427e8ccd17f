"""The package as others meet it: what an import loads, what the wheel holds, what README.md promises."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def python(*arguments, cwd=ROOT, path=ROOT, **extra):
    env = {**os.environ, "PYTHONPATH": str(path), **extra}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)


def test_import_is_light():
    heavy = "torchvision torch_fidelity matplotlib sklearn accelerate ipywidgets IPython PIL".split()
    done = python("-c", f"import sys, diffcourse; print(sorted({heavy} & sys.modules.keys()))".replace(str(heavy), str({*heavy})))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no trace is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source") / "diffcourse", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_wheel_holds_the_package_with_its_data_and_nothing_of_the_book(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    data = [p for folder in ("weights", "results") for p in (ROOT / "diffcourse" / folder).rglob("*") if p.is_file()]
    wanted = [*(ROOT / "diffcourse").glob("*.py"), *data]
    assert sorted(names) == sorted(p.relative_to(ROOT).as_posix() for p in wanted)


def test_wheel_brings_the_command(wheel, installed, tmp_path):
    archive = zipfile.ZipFile(wheel)
    entries = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "[console_scripts]\ndiffcourse = diffcourse.cli:main" in entries
    script = next((installed / "bin").glob("diffcourse*"))
    for command in ([script], ["-m", "diffcourse"]):
        done = python(*command, "--help", cwd=tmp_path, path=installed)
        assert done.returncode == 0 and done.stdout.startswith("Usage: diffcourse"), done.stderr


def test_wheel_works_where_nothing_of_the_checkout_is(installed, tmp_path):
    script = "import diffcourse; print(diffcourse.__file__); print(float(diffcourse.Linear().alpha(0.25)))"
    done = python("-c", script, cwd=tmp_path, path=installed)
    assert done.stdout.split() == [str(installed / "diffcourse" / "__init__.py"), "0.75"], done.stderr


def test_notebook_runs_with_the_wheel_alone_from_another_folder(installed, tmp_path):
    shutil.copy(ROOT / "nbs" / "19_runs.ipynb", tmp_path / "page.ipynb")
    done = python("-m", "papermill", "page.ipynb", "out.ipynb", "-p", "samples", "2000", "--no-progress-bar", cwd=tmp_path, path=installed,
                  DIFFCOURSE_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr


def test_readme_python_runs_as_printed(tmp_path):
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(snippet.splitlines()) <= 10
    done = python("-c", snippet, cwd=tmp_path, DIFFCOURSE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "torch.Size([16, 1, 8, 8]) 20" in done.stdout


def test_readme_commands_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"README.md names make {target}"
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), f"README.md links to {link}"
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == re.findall(r"^(make \w+) ", README, re.M)


def test_readme_papermill_command_names_a_notebook_and_its_parameter():
    notebook, parameter = re.search(r"`papermill (\S+) out.ipynb -p (\w+) \d+`", README).groups()
    done = python("-m", "papermill", notebook, "--help-notebook")
    assert re.search(rf"^\s+{parameter}: int", done.stdout, re.M), done.stdout + done.stderr


@pytest.mark.parametrize("given, said", [(("sampels", "5"), "sampels"), (("samples", "many"), "samples")])
def test_papermill_stops_at_a_parameter_that_is_wrong(given, said, tmp_path):
    done = python("-m", "papermill", ROOT / "nbs" / "19_runs.ipynb", "out.ipynb", "-p", *given, "--no-progress-bar", cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr and "seed" in done.stderr, "the message lists the parameters"
