"""What tests/test_processes.py starts with torchrun: python tests/training_together.py PLAN, in one process or in several."""

import json
import os
import sys
import time

import torch

import diffcourse as dc
from diffcourse import processes, training
from diffcourse.consistency import Consistency
from diffcourse.data import Images
from diffcourse.distill import Distillation
from diffcourse.flow_matching import FlowMatching
from diffcourse.meanflow import MeanFlowLoss
from diffcourse.unet import UNet

RANK = int(os.environ.get("RANK", 0))


def network(**more):
    torch.manual_seed(0)
    return UNet(size=4, base=16, mults=(1,), attention=(), **more)


def images():
    x = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Images(2 * x - 1, torch.arange(60) % 3, flip=True)


def teacher():
    torch.manual_seed(3)
    return dc.Denoiser(network(), dc.Linear(), "flow")


LOSSES = {
    "flow": (FlowMatching, {}),
    "meanflow": (MeanFlowLoss, {"second_time": True}),
    "distilled": (lambda: Distillation(teacher(), 5), {}),
    "consistency": (lambda: Consistency(10), {}),
}


class Broken(FlowMatching):
    "A loss that fails in one process."

    def __call__(self, net, x0, draw):
        if draw.step == 3 and processes.rank_and_count()[0] == 1:
            raise ArithmeticError("process 1 is broken")
        return super().__call__(net, x0, draw)


class Slow(FlowMatching):
    "A loss that leaves time for a signal."

    def __call__(self, net, x0, draw):
        time.sleep(0.02)
        return super().__call__(net, x0, draw)


def train(loss="flow", steps=10, labels=False, **more):
    make, kind = {**LOSSES, "broken": (Broken, {}), "slow": (Slow, {})}[loss]
    data, told = images(), {}
    if labels:
        kind, told = {"classes": 3}, {"labels": data.y}
    usual = dict(run=f"{loss}{'-labels' * labels}", batch=17, warmup=5, log_every=1, precision="fp32")
    return training.fit(make(), network(**kind), data, steps=steps, **told, **usual | more)


def together():  # what each process ends with must be the same
    generator = torch.Generator().manual_seed(5)
    den = dc.Denoiser(network().eval(), dc.Linear(), "flow")
    with torch.no_grad():
        for p in den.net.parameters():
            p.normal_(0, 0.2, generator=generator)
    out = processes.sample_together(den, (1, 4, 4), seeds=range(7), trajectory=True)
    means = torch.cat(processes.gathered(lambda rows: out.x[rows].mean((1, 2, 3)), 7))
    return {"x": out.x.tolist(), "nfe": out.nfe, "states": list(out.trajectory.shape), "means": means.tolist()}


def main(plan):
    for call in plan:
        if call == "sample":
            told = together()
        else:
            made = train(**call)
            weights = torch.cat([p.flatten() for p in made.net.parameters()])
            told = {"status": made.status, "steps": len(made.log), "sum": float(weights.double().square().sum())}
        print(f"\nrank {RANK} " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
