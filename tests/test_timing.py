"""Timing: evaluations for one sample, parameters, and what was measured is said."""

import pytest
import torch

from diffcourse.paths import Linear
from diffcourse.sampling import Denoiser, Euler, sample, uniform
from diffcourse.timing import join, measure
from diffcourse.unet import UNet


@pytest.fixture(scope="module")
def den():
    torch.manual_seed(0)
    return Denoiser(UNet(base=8).eval(), Linear(), "flow")


def test_join_keeps_nfe(den):
    parts = [sample(den, (1, 8, 8), Euler(), uniform(3), seeds=range(k, k + 2)) for k in (0, 2)]
    whole = join(parts)
    assert whole.nfe == 3 and whole.x.shape == (4, 1, 8, 8)
    assert whole.seconds == pytest.approx(sum(p.seconds for p in parts))
    other = sample(den, (1, 8, 8), Euler(), uniform(4), n=2)
    with pytest.raises(ValueError, match=r"NFE \[3, 4\]"):
        join([*parts, other])


def test_measure(den):
    t = measure(den, (1, 8, 8), grid=uniform(4), batch=3, repeats=2)
    assert (t.nfe, t.batch, t.dtype) == (4, 3, "float32")
    assert t.parameters == sum(p.numel() for p in den.net.parameters())
    assert t.ms_per_image > 0 and t.peak_mb > 50 and t.macs > 1e5
    assert "NFE 4, batch 3" in str(t) and t.device in str(t)
