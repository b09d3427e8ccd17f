"""Kill a short training with SIGKILL at random moments, start it again, compare: python tests/kill_training.py [KILLS].

A moment is a share of the undisturbed training's time, from a fixed list. The state is saved after every iteration, so
that many of the kills fall into a save. The network has dropout and the images are flipped, so that every stream of random
numbers is in play."""
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffcourse import data as sets
from diffcourse import runs, training
from diffcourse.unet import UNet

STEPS = 20


class Rows(sets.Rows):
    flip = True


def loss(net, x0, draw):
    t, eps = draw.t(), draw.noise()
    x = torch.lerp(x0, eps, t[:, None, None, None])
    return (net(x, t) - eps + x0).square().mean((1, 2, 3))


def train():
    torch.manual_seed(0)
    data = Rows(torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    net = UNet(size=4, base=16, mults=(1,), attention=(), dropout=0.1)
    net.register_buffer("ballast", torch.zeros(1_000_000))  # makes saving slow
    settings = dict(batch=16, warmup=5, log_every=4, precision="fp32")
    return training.fit(loss, net, data, "kill", STEPS, save_every=0, **settings)


def digest(home):  # of weights, average, optimiser and log
    folder = next((Path(home) / "runs" / "kill").glob("*/model.safetensors")).parent
    h = hashlib.sha256()
    for name in ("state", "model"):
        tensors, _ = runs.load_tensors(folder / f"{name}.safetensors")
        for k in sorted(tensors):
            h.update(k.encode() + tensors[k].numpy().tobytes())
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        h.update(f"{entry['step']} {entry['loss']!r} {entry['grad_norm']!r}".encode())
    return h.hexdigest()


def start(home):  # a training in a process of its own
    pid = os.fork()
    if pid == 0:
        os.environ["DIFFCOURSE_HOME"] = str(home)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 1
        try:
            code = 0 if train().net is not None else 1
        finally:
            os._exit(code)
    return pid


def main(kills):
    torch.set_num_threads(1)
    from accelerate import Accelerator

    Accelerator()  # what is slow to import, once for all children
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    with tempfile.TemporaryDirectory() as tmp:
        begin = time.perf_counter()
        assert os.waitpid(start(f"{tmp}/whole"), 0)[1] == 0, "the training failed"
        whole, want = time.perf_counter() - begin, digest(f"{tmp}/whole")
        same, cut_saves, partial = 0, 0, 0
        for k, share in enumerate(runs.rng(0, 77).random(kills)):
            home = Path(tmp, str(k))
            pid = start(home)
            time.sleep(share * whole)
            os.kill(pid, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            partial += killed
            cut_saves += any(home.rglob(".*.tmp"))
            assert os.waitpid(start(home), 0)[1] == 0, "it does not start again"
            same += digest(home) == want
    print(
        f"{same} of {kills} killed trainings reached the same bits "
        f"({partial} were still running, {cut_saves} were writing a state)"
    )
    return 0 if same == kills else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
