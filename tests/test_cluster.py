"""The files of cluster/: the SLURM script played with its signal and its queue, the sweep, the images of the clouds."""
import configparser
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "cluster"
SCRIPT = FOLDER / "slurm.sh"
AGAIN = 75

# stands for the training: counts to N, saves when it is asked to stop; as a notebook its kernel does that, in a process of its own
TRAINING = """
    import os, signal, subprocess, sys, time
    from pathlib import Path

    words, state = sys.argv[1:], Path(os.environ["STATE"])
    if words[:2] == ["-m", "papermill"]:
        sys.exit(1 if subprocess.call([sys.executable, __file__, "kernel"]) else 0)
    done, last = int(state.read_text()) if state.exists() else 0, int(os.environ["N"])
    will_be_warned = int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ.get("WARN", 0))

    def write():  # the first node alone, whole or not at all
        if os.environ.get("SLURM_NODEID", "0") == "0":
            state.with_suffix(".new").write_text(str(done))
            state.with_suffix(".new").replace(state)

    def save(*_):
        write()
        sys.exit(int(os.environ.get("CODE", 75)))

    signal.signal(signal.SIGTERM, save)
    print("begins at", done, flush=True)
    while done < last:
        done = min(done + 1, last - will_be_warned)  # not done before the warning, however slow the machine
        time.sleep(0.02)
        if os.environ.get("FAIL") == str(done):
            sys.exit(3)
    write()
    print("all done", flush=True)
"""
SRUN = """
    import os, signal, subprocess, sys

    words = sys.argv[1:]
    while words[0].startswith("--"):
        words.pop(0)
    tasks = [subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(i)}) for i in range(int(os.environ["SLURM_NNODES"]))]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
    import os, sys
    from pathlib import Path

    if sys.argv[1:3] == ["show", "hostnames"]:
        print("node7\\nnode8")
    else:
        Path(os.environ["QUEUE"]).write_text(" ".join(sys.argv[1:]))
"""


class Slurm:
    "Plays sbatch: the variables, the signal that the script asks for, and the queue."

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name, code in ("srun", SRUN), ("scontrol", SCONTROL):
            self.program(self.bin / name, code)
        self.python = self.program(folder / "python", f'open({str(folder / "calls")!r}, "a").write(repr(sys.argv[1:]) + "\\n")', TRAINING)
        self.options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SCRIPT.read_text(), re.M))

    def program(self, path, *codes):
        program = path.with_name(f"{path.name}.py")
        program.write_text("import sys\n" + "\n".join(map(textwrap.dedent, codes)))
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')  # a path with a blank is none for #!
        path.chmod(0o755)
        return path

    def calls(self):  # of the training: its arguments
        return [eval(line) for line in (self.folder / "calls").read_text().splitlines()]

    def sbatch(self, *words, warn=(), restarts=0, **variables):
        """Run to the end, with every restart; `warn`: iterations after which the signal comes, one a run."""
        queue, state, log = (self.folder / name for name in ("queue", "state", "log"))
        queue.unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.python), "STATE": str(state), "N": "40",
               "QUEUE": str(queue), "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts), "SLURM_NNODES": "1",
               "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "node[7-8]",
               "WARN": str(restarts + len(warn)), **variables}
        begun = log.read_text().count("begins") if log.exists() else 0
        with open(log, "a") as out:
            job = subprocess.Popen(["bash", SCRIPT, *words], env=env, cwd=self.folder, stdout=out, stderr=out)
            if warn:
                tasks = int(env["SLURM_NNODES"])
                while log.read_text().count("begins") < begun + tasks and job.poll() is None:
                    time.sleep(0.02)
                time.sleep(0.02 * warn[0])
                to, name, _ = re.fullmatch(r"(B):(\w+)@(\d+)", self.options["signal"]).groups()
                job.send_signal(getattr(signal, f"SIG{name}"))  # B: to the script alone
            code = job.wait(300)
        if not queue.exists():
            return code, restarts
        assert code == 0 and queue.read_text() == "requeue 4711" and "requeue" in self.options
        return self.sbatch(*words, warn=warn[1:], restarts=restarts + 1, **variables)


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def begins(slurm):
    return [int(n) for n in re.findall(r"begins at (\d+)", (slurm.folder / "log").read_text())]


def test_shell_is_clean():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    checker = shutil.which("shellcheck")
    if not checker:
        pytest.skip("no shellcheck here")
    done = subprocess.run([checker, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_gpu(slurm):
    assert slurm.sbatch("train", "flow", "--task", "digits") == (0, 0)
    assert slurm.calls() == [["-m", "diffcourse.cli", "train", "flow", "--task", "digits"]]
    assert (slurm.folder / "state").read_text() == "40"


def test_a_warning_saves_and_the_queue_goes_on(slurm):
    assert slurm.sbatch("train", "flow", warn=(8, 8)) == (0, 2)
    first, second, third = begins(slurm)
    assert first == 0 < second <= third < 40
    assert (slurm.folder / "state").read_text() == "40"


def test_a_notebook_its_kernel_is_warned_and_not_papermill(slurm):
    assert slurm.sbatch("nbs/04_flow_matching.ipynb", "-f", "a.yaml", warn=(8,), SLURM_GPUS_ON_NODE="4", SLURM_ARRAY_TASK_ID="3") == (0, 1)
    said = ["-m", "papermill", "nbs/04_flow_matching.ipynb", "04_flow_matching-4711.ipynb", "-f", "a.yaml", "-p", "num_processes", "4",
            "-p", "seed", "3", "--no-progress-bar"]
    assert [call for call in slurm.calls() if call != ["kernel"]] == [said, said]
    assert begins(slurm)[0] == 0 < begins(slurm)[1] < 40


def test_several_nodes_meet_at_the_first(slurm):
    many = dict(SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8")
    assert slurm.sbatch("train", "flow", warn=(8,), **many) == (0, 1)
    calls = slurm.calls()
    assert len(calls) == 4 and calls[0] == calls[1] != calls[2]  # another rendezvous after the restart
    assert calls[0] == ["-m", "diffcourse.processes", "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-id",
                        "4711-0", "--rdzv-endpoint", "node7:24711", "-m", "diffcourse.cli", "train", "flow"]


def test_an_array_is_over_seeds(slurm):
    slurm.sbatch("train", "flow", SLURM_ARRAY_TASK_ID="2")
    assert slurm.calls()[0][-2:] == ["-p", "seed=2"]


def test_a_fault_is_not_queued_again(slurm):
    assert slurm.sbatch("train", "flow", FAIL="5") == (3, 0)


def test_saved_and_not_done_is_queued_again_without_a_warning(slurm):
    code = slurm.python.with_name("python.py")
    code.write_text(code.read_text().replace("all done", "enough").replace(
        'print("enough"', f'sys.exit({AGAIN} if int(os.environ["SLURM_RESTART_COUNT"]) < 2 else 0); print("enough"'))
    assert slurm.sbatch("train", "flow") == (0, 2)


def test_an_end_after_the_warning_is_the_end(slurm):
    assert slurm.sbatch("train", "flow", warn=(8,), CODE="0") == (0, 0)


def test_restarts_have_an_end(slurm):
    assert slurm.sbatch("train", "flow", warn=(5, 5, 5), MAX_RESTARTS="1", N="1000") == (1, 1)
    assert "enough" in (slurm.folder / "log").read_text()


def test_nothing_to_run(slurm):
    code, _ = slurm.sbatch()
    assert code == 2 and "say what to run" in (slurm.folder / "log").read_text()


@pytest.mark.skipif(importlib.util.find_spec("diffcourse.cli") is None, reason="no command line yet")
def test_a_real_training_with_a_requeue_in_the_middle(slurm, tmp_path):
    from diffcourse import checkpoints

    env = dict(PYTHON=sys.executable, SLURM_CPUS_PER_TASK="1", DIFFCOURSE_HOME=str(tmp_path / "home"))
    words = ["train", "flow", "--task", "digits", "-p", "steps=150", "-p", "settings.log_every=5"]
    program = slurm.program(tmp_path / "real", f"""
        import os, runpy, threading, time
        def watch():  # says that the training has begun, as the other one does
            from pathlib import Path
            while not any(p.stat().st_size for p in Path(os.environ["DIFFCOURSE_HOME"]).rglob("log.jsonl")):
                time.sleep(0.1)
            print("begins at", flush=True)
        threading.Thread(target=watch, daemon=True).start()
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    """)
    code, restarts = slurm.sbatch(*words, warn=(10,), **env | {"PYTHON": str(program)})
    assert (code, restarts) == (0, 1), (tmp_path / "log").read_text()[-2000:]
    file, = (tmp_path / "home").rglob("model.safetensors")
    assert checkpoints.read_about(file.parent)


# -- the others ---------------------------------------------------------------

def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sweep_is_every_combination():
    pytest.importorskip("submitit")
    submit = load("submit")
    options, base = submit.parse(["train", "flow", "--task", "digits", "--sweep", "settings.lr=1e-4,2e-4", "--seeds", "0", "1"])
    made = submit.commands(base, options.sweep, options.seeds)
    assert len(made) == 4 and made[3] == [*"train flow --task digits -p settings.lr=2e-4 -p seed=1".split()]
    assert submit.commands(base, [], []) == [base]
    for bad in ([], ["train", "--sweep", "lr"]):
        with pytest.raises(SystemExit):
            submit.parse(bad)


def test_a_sweep_on_this_machine_is_warned_and_goes_on(slurm, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), *filter(None, sys.path)]))
    monkeypatch.syspath_prepend(str(FOLDER))
    import submit

    for key, value in dict(STATE=tmp_path / "state", N=200).items():
        monkeypatch.setenv(key, str(value))
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    job = executor.submit(submit.Job([str(slurm.python), "train"]))
    end = time.monotonic() + 60
    while not (tmp_path / "calls").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    task, = subprocess.run(["pgrep", "-P", str(job._process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(task), signal.SIGUSR2)
    assert job.result() == 0 and len(slurm.calls()) == 2 and (tmp_path / "state").read_text() == "200"
    assert "Requeued" in job.stdout() + job.stderr()


def test_the_app_of_modal(tmp_path, capsys, monkeypatch):
    pytest.importorskip("modal")
    from modal.volume import FileEntry, FileEntryType

    app = load("modal_app")
    assert app.PACKAGES and app.whole(["train", "flow"], 4)[1:4] == ["-m", "diffcourse.processes", "--standalone"]
    files = {"runs/digits/flow/abc/model.safetensors": b"x" * 10, "runs/digits/flow/latest.json": b"{}", "runs/digits/flow/abc/.lock": b""}

    class Volume:
        def iterdir(self, path):
            return [FileEntry(path=k, type=FileEntryType.FILE, mtime=0, size=len(v)) for k, v in files.items()]

        def read_file(self, path):
            return iter([files[path]])

        def commit(self):
            print("commit")

    monkeypatch.setattr(app, "volume", Volume())
    assert [name for name, _ in app.weights(app.volume.iterdir("/runs"))] == ["digits/flow"]
    app.fetch.info.raw_f("digits/flow", str(tmp_path))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["latest.json", "model.safetensors"]
    for code in 0, 3:
        monkeypatch.setattr(app, "whole", lambda words, n, code=code: [sys.executable, "-c", f"raise SystemExit({code})"])
        assert app.work.local(["train"]) == code
    monkeypatch.setattr(app, "whole", lambda words, n: [sys.executable, "-c", f"raise SystemExit({AGAIN})"])
    with pytest.raises(RuntimeError, match="next try"):
        app.work.local(["train"])
    assert "commit" in capsys.readouterr().out


def test_the_file_of_skypilot():
    told = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert told["resources"]["job_recovery"]["recover_on_exit_codes"] == [AGAIN]
    assert {*told} <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    home = re.search(r"DIFFCOURSE_HOME=(\S+)", told["run"])[1]
    assert home in told["file_mounts"]
    for part in "setup", "run":
        assert subprocess.run(["bash", "-n", "-c", told[part]]).returncode == 0
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_TASK_ID", *told["envs"], "first"}
    assert {*re.findall(r"\$\{?(\w+)", told["run"])} <= known


def test_the_dockerfile():
    lines = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text()).splitlines()
    orders = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    assert orders[0] == "FROM" and {*orders} <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "build"} <= {*ignored}
    for line in lines:
        if line.startswith("RUN"):
            assert subprocess.run(["bash", "-n", "-c", line[3:]]).returncode == 0
            assert "pip install" not in line or "--no-cache-dir" in line
    if linter := shutil.which("hadolint"):
        done = subprocess.run([linter, FOLDER / "Dockerfile"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_all_know_the_exit_code_and_the_commands():
    for name in ("slurm.sh", "submit.py", "modal_app.py"):
        assert re.search(rf"(?i)^again ?= ?{AGAIN}\b", (FOLDER / name).read_text(), re.M), name
    if importlib.util.find_spec("diffcourse.processes"):
        from diffcourse import processes

        assert processes.AGAIN == AGAIN
    requirements = configparser.ConfigParser(delimiters=["="])
    requirements.read(ROOT / "settings.ini")
    assert not {"submitit", "modal"} & {*requirements["DEFAULT"]["requirements"].split()}
