"""The same command on a rented GPU, by Modal.

    modal run cluster/modal_app.py::run --command "train flow --task celeba64" --gpu L40S
    modal run cluster/modal_app.py::run --command "train flow --task celeba64" --gpu H100:4
    modal run cluster/modal_app.py::runs
    modal run cluster/modal_app.py::fetch --name celeba64/flow

Runs and data lie on a volume. Images are put there once, `modal volume put diffcourse FOLDER data/FOLDER`, and are then
`--task /home-of-runs/data/FOLDER`. With `modal run --detach` a training outlives your terminal.
pip install modal, then `modal setup` once.
"""
import configparser
import shlex
import subprocess
import sys
from pathlib import Path

import modal

HOME = "/home-of-runs"                          # DIFFCOURSE_HOME there: a folder on the volume
CODE = "/code"                                  # where the package lies there
AGAIN = 75                                      # exit code of a training that is saved and not done
HERE = Path(__file__).resolve()
PACKAGES = []
if modal.is_local():                            # this file is imported in the container as well, where no settings.ini is
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(HERE.parents[1] / "settings.ini")
    PACKAGES = settings["DEFAULT"]["requirements"].split()

app = modal.App("diffcourse")
volume = modal.Volume.from_name("diffcourse", create_if_missing=True)
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install(*PACKAGES).env(
    {"DIFFCOURSE_HOME": HOME, "PYTHONPATH": CODE, "PYTHONUNBUFFERED": "1"})
if modal.is_local():
    image = image.add_local_dir(HERE.parents[1] / "diffcourse", f"{CODE}/diffcourse", ignore=["**/__pycache__"])


def whole(words: list[str], processes: int = 1) -> list[str]:
    """The command, by torchrun where there are several GPUs."""
    many = ["-m", "diffcourse.processes", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *many, "-m", "diffcourse.cli", *words]


# a day is the longest that Modal allows; what failed or was cut off starts again and goes on
@app.function(image=image, gpu="L40S", volumes={HOME: volume}, timeout=24 * 3600, single_use_containers=True,
              retries=modal.Retries(max_retries=10, initial_delay=1.0, backoff_coefficient=1.0))
def work(words: list[str], processes: int = 1):
    process = subprocess.Popen(whole(words, processes))
    try:
        code = process.wait()
    except KeyboardInterrupt:                   # the machine is wanted back: 30 seconds
        process.terminate()
        code = process.wait(25)
    finally:
        volume.commit()
    if code == AGAIN:
        raise RuntimeError("saved and not done: the next try goes on")
    if code:
        print(f"exit code {code}: {shlex.join(words)}", file=sys.stderr)
    return code


@app.local_entrypoint()
def run(command: str, gpu: str = "L40S"):
    """Run a command of diffcourse on a GPU: "L40S", "A100-80GB", or several, "H100:4"."""
    processes = int(gpu.partition(":")[2] or 1)
    sys.exit(work.with_options(gpu=gpu).remote(shlex.split(command), processes))


def weights(entries):
    """Of all files on the volume those that hold weights: name of the run, file."""
    for entry in entries:
        path = Path(entry.path.lstrip("/"))
        if path.suffix == ".safetensors" and path.parts[0] == "runs" and not path.name.startswith("."):
            yield "/".join(path.parts[1:-2]), entry


@app.local_entrypoint()
def runs():
    """List the runs on the volume, with their checkpoints and sizes."""
    for name, entry in sorted(weights(volume.iterdir("/runs")), key=lambda pair: pair[1].path):
        print(f"{name:30} {entry.size / 1e6:8.1f} MB  {'/'.join(Path(entry.path).parts[-2:])}")


@app.local_entrypoint()
def fetch(name: str, to: str = "build/digits"):
    """Copy a run to this machine, where `dc.load` finds it."""
    for entry in volume.iterdir(f"/runs/{name}"):
        target = Path(to, entry.path.lstrip("/"))
        if entry.type == modal.volume.FileEntryType.FILE and not target.name.startswith("."):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with open(part, "wb") as file:
                file.writelines(volume.read_file(entry.path))
            part.replace(target)
            print(target)
