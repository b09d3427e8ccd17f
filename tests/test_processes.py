"""Training and sampling in several processes: torchrun starts them on the CPU, with one thread each."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcourse import processes, runs

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "training_together.py"
LOSSES = ["flow", "meanflow", "distilled", "consistency"]


def command(plan, count, *, script=SCRIPT):
    many = ["-m", "diffcourse.processes", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    return [sys.executable, *many, str(script), json.dumps(plan)]


def environment(home):
    return os.environ | {"OMP_NUM_THREADS": "1", "DIFFCOURSE_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def carry_out(plan, count, home):
    "Run a plan to its end; what each process told, in the order of the processes."
    out = subprocess.run(command(plan, count), env=environment(home), capture_output=True, text=True, timeout=170)
    lines = sorted(line for line in out.stdout.splitlines() if line.startswith("rank "))
    told = [[json.loads(x.split(" ", 2)[2]) for x in lines if x.startswith(f"rank {k} ")] for k in range(count)]
    return out, told


def trained(home, run):
    folder = next((Path(home) / "runs" / run).glob("*/model.safetensors")).parent
    state = runs.load_tensors(folder / "state.safetensors")[0]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, state, log


def distance(a, b):  # of weights and of their average, relative
    names = [k for k in a if k.startswith(("net.", "ema."))]
    one, two = (torch.cat([s[k].flatten() for k in names]).double() for s in (a, b))
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("n, count", [(17, 1), (17, 2), (17, 3), (4, 4), (3, 5), (0, 2)])
def test_shares_are_all_rows_once_and_equal_to_a_row(n, count):
    shares = [processes.share_of(n, k, count) for k in range(count)]
    rows = [i for s in shares for i in range(s.start, s.stop)]
    sizes = {s.stop - s.start for s in shares}
    assert rows == list(range(n)) and max(sizes) - min(sizes) <= 1


def test_local_rows_are_a_share_of_each_micro_batch():
    each = [processes.local_rows(12, 3, k, 2).tolist() for k in range(2)]
    assert each == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_local_batches_rows_are_read():
    asked, rows = [], processes.local_rows(6, 1, 1, 2)

    def ahead(plan, device):
        for indices in plan:
            asked.append(indices.tolist())
            yield torch.from_numpy(indices).float()

    (batch,) = processes.local_batches(ahead, [np.arange(10, 16)], rows, 6, torch.device("cpu"))
    assert asked == [[13, 14, 15]] and batch.tolist() == [0, 0, 0, 13, 14, 15]


def test_a_batch_without_a_row_for_each_process_is_refused():
    processes.check_batch(8, 2, 4)
    with pytest.raises(ValueError, match="batch=8 in accumulate=4.*3 processes.*larger batch"):
        processes.check_batch(8, 4, 3)


def test_samples_together_need_a_seed_each():
    with pytest.raises(ValueError, match=r"seeds = 0.*range\(64\)"):
        processes.sample_together(None, (1,), seeds=0)


FLOW = [dict(steps=50), dict(run="micro", accumulate=3, batch=18), dict(labels=True)]
PLAN = [*FLOW, *(dict(loss=name) for name in LOSSES[1:]), "sample"]
SLOW = dict(loss="slow", steps=40)
RUNS = ["flow", "micro", "flow-labels", *LOSSES[1:]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    home = tmp_path_factory.mktemp("alone")
    out, told = carry_out([SLOW, *PLAN], 1, home)
    assert out.returncode == 0, out.stderr
    return home, told[0]


def several(count, plan, home):
    out, told = carry_out(plan, count, home)
    assert out.returncode == 0, out.stderr
    return home, told, out.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return several(2, PLAN, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return several(3, [PLAN[0], PLAN[-1]], tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("count, run", [*((2, run) for run in RUNS), (3, "flow")])
def test_several_processes_train_as_one(request, alone, count, run):
    "The loss of every iteration to 1e-6, the weights to 1e-5; and under the same identity."
    together = request.getfixturevalue({2: "two", 3: "three"}[count])
    (one, state, log), (other, same, lines) = (trained(home, run) for home in (alone[0], together[0]))
    assert one.name == other.name
    assert len(log) == len(lines) == (50 if run == "flow" else 10)
    gaps = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(log, lines)]
    small = run in ("distilled", "consistency")  # losses that are differences of nearly equal numbers
    assert max(gaps) <= (1e-5 if small else 1e-6)
    assert distance(state, same) <= 1e-5
    assert "waiting" in lines[-1] and "waiting" not in log[-1]


def test_every_process_has_the_same_average(two, three):
    for _, told, _ in (two, three):
        assert all(t == told[0] for t in told)
        assert {t["status"] for t in told[0][:-1]} == {"trained"}


def test_only_the_first_process_speaks(two):
    assert len(re.findall(r"^flow: trained · 50 iterations", two[2], re.M)) == 1


def test_images_do_not_depend_on_the_number_of_processes(alone, two, three):
    one = alone[1][-1]
    for _, told, _ in (two, three):
        assert told[0][-1]["nfe"] == one["nfe"] == 10 and told[0][-1]["states"] == one["states"] == [11, 7, 1, 4, 4]
        for key in ("x", "means"):
            assert torch.allclose(torch.tensor(one[key]), torch.tensor(told[0][-1][key]), rtol=0, atol=1e-5)


def test_a_process_that_fails_stops_all_with_its_traceback(tmp_path):
    begin = time.monotonic()
    out, _ = carry_out([dict(loss="broken")], 2, tmp_path)
    assert out.returncode == 1 and time.monotonic() - begin < 60
    assert "ArithmeticError: process 1 is broken" in out.stderr and "in __call__" in out.stderr


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_sigterm_saves_and_another_number_of_processes_goes_on(alone, tmp_path):
    p = subprocess.Popen(command([SLOW], 2), env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: any(len(f.read_text().splitlines()) >= 4 for f in tmp_path.glob("runs/slow/*/log.jsonl")))
    p.send_signal(signal.SIGTERM)
    lines, error = p.communicate(timeout=60)
    assert p.returncode == processes.AGAIN == 75, error
    done = int(re.search(r"stopped after iteration (\d+), which is saved", lines)[1])
    (state,) = tmp_path.glob("runs/slow/*/state.safetensors")
    assert runs.load_meta(state)["step"] == done < 40
    out, told = carry_out([SLOW], 1, tmp_path)
    assert out.returncode == 0 and told[0][0]["status"] == "resumed", out.stderr
    assert f"going on from iteration {done} of 40" in out.stdout
    assert re.search("begun with 2 processes and.*, goes on with 1 process and", out.stdout)
    (folder, tensors, log), (same, want, _) = trained(tmp_path, "slow"), trained(alone[0], "slow")
    assert folder.name == same.name and len(log) == 40
    assert distance(tensors, want) <= 1e-5


def test_minutes_end_with_the_code_that_asks_for_more(tmp_path):
    plan = [dict(loss="slow", steps=10_000, log_every=1000, minutes=0.01)]
    out, _ = carry_out(plan, 1, tmp_path)
    assert out.returncode == processes.AGAIN and "which is saved" in out.stdout, out.stderr


def test_processes_that_would_train_different_networks_are_refused(monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda names: [*names, "b"])
    processes.check_same(None, "b")
    with pytest.raises(RuntimeError, match=r"\['a', 'b'\].*torch.manual_seed\(0\) is missing"):
        processes.check_same(None, "a")


@pytest.mark.parametrize("code, error", [(75, processes.Stopped), (130, KeyboardInterrupt), (1, RuntimeError)])
def test_how_processes_ended_is_told(monkeypatch, code, error):
    monkeypatch.setattr(processes, "_run", lambda *a: (code, ["ArithmeticError: broken\n"]))
    with pytest.raises(error) as raised:
        processes.launch({}, 2)
    assert code != 1 or "exit code 1:\nArithmeticError: broken" in str(raised.value)
    assert code != 75 or raised.value.code == 75


def test_what_cannot_be_handed_over_is_refused():
    with pytest.raises(TypeError, match="num_processes=.*handed to other processes"):
        processes.launch({"loss": (k for k in range(3))}, 2)


NOTEBOOK = """
import torch
from diffcourse import fit, UNet
from diffcourse.data import digits
shift = 0.5

def loss(net, x0, draw):  # of a cell, with a value of another cell
    t, eps = draw.t(), draw.noise()
    x = torch.lerp(x0, eps, t[:, None, None, None])
    return (net(x, t) - eps + x0 * shift).square().mean((1, 2, 3))

def train(**more):
    torch.manual_seed(0)
    net = UNet(size=8, base=16, mults=(1,), attention=())
    seen = lambda step, net: torch.tensor(float(step))
    return fit(loss, net, digits(), "notebook", 6, batch=8, precision="fp32", every=3, callback=seen, **more)

made = train(num_processes=2)
print(made.status, sorted(made.snapshots), len(made.log), not made.net.training)
print(train().status, train(num_processes=2).status)
"""


def test_a_notebook_starts_processes_and_reads_the_run(tmp_path):
    "The loss lives in the notebook; the run is the one that a single process would have made."
    out = subprocess.run([sys.executable, "-"], input=NOTEBOOK, env=environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr + out.stdout
    assert "trained [3, 6] 1 True" in out.stdout and "reused reused" in out.stdout
    assert "trained · 6 iterations" in out.stdout and "fp32 on 2 x cpu" in out.stdout
    about = json.loads(next(tmp_path.glob("runs/notebook/*/run.json")).read_text())
    assert about["processes"] == 2
