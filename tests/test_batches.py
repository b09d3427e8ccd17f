"""Batches that fit: how large, what happens when memory runs out, and the line on long work."""

import sys
import types
import warnings

import pytest
import torch

import diffcourse as dc
from diffcourse import batches
from diffcourse.batches import first_batch, in_batches

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def numbers(lo, hi):
    return [*range(lo, hi)]


def small(most, asked):
    def make(lo, hi):
        asked.append(hi - lo)
        if hi - lo > most:
            raise torch.OutOfMemoryError(f"{hi - lo} do not fit")
        return numbers(lo, hi)

    return make


@pytest.mark.parametrize("n, size", [(1, None), (10, 3), (10, 10), (7, 100), (5000, None)])
def test_all_samples_once_and_in_order(n, size):
    parts = in_batches(numbers, n, size, (1, 8, 8), CPU)
    assert sum(parts, []) == [*range(n)]
    assert max(map(len, parts)) == min(n, size or 4096)


def test_a_batch_is_bounded_on_a_cpu():
    for shape in ((1,), (2,), (1, 28, 28), (3, 64, 64), (3, 2048, 2048)):
        assert first_batch(shape) == max(1, 2**18 // torch.Size(shape).numel())
    assert first_batch(()) == 2**18


def test_what_does_not_fit_is_halved_and_it_is_said_once():
    asked = []
    with pytest.warns(UserWarning, match=r"memory of cpu: going on with 5 samples at a time \(batch=5 begins so\)") as said:
        parts = in_batches(small(5, asked), 23, 20, (1,), CPU)
    assert sum(parts, []) == [*range(23)] and len(said) == 1
    assert asked == [20, 10, 5, 5, 5, 5, 3]


def test_not_even_one_fits():
    asked = []
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError, match="1 do not fit"):
        warnings.simplefilter("error")
        in_batches(small(0, asked), 8, None, (1,), CPU)
    assert asked == [8, 4, 2, 1]


def test_another_error_is_not_an_occasion_to_try_again():
    asked = []

    def make(lo, hi):
        asked.append(hi - lo)
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(make, 8, None, (1,), CPU)
    assert asked == [8]


def card(monkeypatch, free, each, base=1000):
    "A card with so many free bytes, of which a sample takes `each`."
    state = dict(now=base, peak=base)

    def make(lo, hi):
        state["peak"] = max(state["peak"], state["now"] + each * (hi - lo))
        return numbers(lo, hi)

    cuda = types.SimpleNamespace(
        reset_peak_memory_stats=lambda d: state.update(peak=state["now"]),
        memory_allocated=lambda d: state["now"],
        max_memory_allocated=lambda d: state["peak"],
        memory_reserved=lambda d: state["now"] + 500,
        mem_get_info=lambda d: (free - 500, 10**9),
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(batches.torch, "cuda", cuda)
    return make


def test_a_card_is_filled_to_four_fifths(monkeypatch):
    make = card(monkeypatch, free=100_000, each=200)
    parts = in_batches(make, 2000, None, (3, 64, 64), CUDA)  # 21 at first
    assert [len(p) for p in parts[:3]] == [21, 336, 336]  # at most 16 times the first
    parts = in_batches(card(monkeypatch, 100_000, 1000), 2000, None, (3, 64, 64), CUDA)
    assert [len(p) for p in parts[:3]] == [21, 80, 80] and sum(map(len, parts)) == 2000
    parts = in_batches(card(monkeypatch, 100_000, 10**6), 30, None, (3, 64, 64), CUDA)
    assert [len(p) for p in parts[:3]] == [21, 1, 1]


def test_what_fits_at_once_or_was_asked_for_is_not_watched(monkeypatch):
    make = card(monkeypatch, 100_000, 200)
    batches.torch.cuda.reset_peak_memory_stats = None  # would fail
    assert len(in_batches(make, 21, None, (3, 64, 64), CUDA)) == 1
    assert len(in_batches(make, 100, 50, (3, 64, 64), CUDA)) == 2


class Clock:
    def __init__(self, each):
        self.now, self.each = 0.0, each

    def perf_counter(self):
        self.now += self.each
        return self.now


@pytest.mark.parametrize("each, n, progress, shown", [(1.5, 30, True, [20, 30]), (0.1, 30, True, []), (9.0, 10, True, []), (9.0, 30, False, [])])
def test_a_line_on_long_work_of_several_batches(monkeypatch, each, n, progress, shown):
    seen = []

    class Line:
        first = None

        def __init__(self, name, steps, unit):
            assert (name, steps) == ("sample", n)

        def __call__(self, step):
            self.first = 1
            seen.append(step)

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(batches, "time", Clock(each))
    monkeypatch.setattr(batches, "Progress", Line)
    in_batches(numbers, n, 10, (1,), CPU, progress)
    assert seen == [*shown, "closed"]


def test_the_line_in_a_notebook_is_one_output_and_is_wiped(monkeypatch):
    outputs = []

    class Handle:
        def update(self, data, raw):
            outputs.append(("update", data["text/plain"]))

    def display(data, raw, display_id):
        outputs.append(("new", data["text/plain"]))
        return Handle()

    shell = types.SimpleNamespace(kernel=True)
    ipython = types.SimpleNamespace(get_ipython=lambda: shell, display=types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    monkeypatch.setattr(batches, "time", Clock(1.5))
    in_batches(numbers, 40, 10, (1,), CPU)
    kinds, texts = zip(*outputs)
    assert kinds[0] == "new" and set(kinds[1:]) == {"update"}
    assert texts[0] == "sample: 20/40" and texts[-2].startswith("sample: 40/40") and "loss" not in texts[-2]
    assert texts[-1] == ""  # wiped at the end


def net(x, t):
    return torch.sin(3 * x) - t.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("solver", [dc.Euler(), dc.DDPM(), dc.DPMpp(2)], ids=repr)
def test_samples_do_not_depend_on_memory(solver):
    grid, calls = dc.uniform(4, 0.99), []

    def fits_three(x, t):
        calls.append(len(x))
        if len(x) > 3 and len(calls) > 1:  # in the second step of a batch
            raise torch.OutOfMemoryError("full")
        return net(x, t)

    table = dc.Denoiser(net, dc.VP.cosine(), "v"), dc.Denoiser(fits_three, dc.VP.cosine(), "v")
    whole = dc.sample(table[0], (2,), solver, grid, seeds=range(8))
    with pytest.warns(UserWarning, match="going on with 2"):
        parts = dc.sample(table[1], (2,), solver, grid, seeds=range(8))
    assert torch.allclose(whole.x, parts.x, atol=1e-6) and whole.nfe == parts.nfe == 4
    assert table[1].nfe == 4 * 4  # four parts; what failed is not counted


def test_a_cloud_is_not_divided():
    def full(x, t):
        raise torch.OutOfMemoryError("full")

    den = dc.Denoiser(full, dc.Linear(), "flow")
    with pytest.raises(torch.OutOfMemoryError, match=r"8 samples of one seed .* seeds=range\(8\)"):
        dc.sample(den, (2,), n=8)
    sizes = []
    den = dc.Denoiser(lambda x, t: sizes.append(len(x)) or x, dc.Linear(), "flow")
    dc.sample(den, (3, 64, 64), n=50, grid=dc.uniform(1))
    dc.sample(den, (3, 64, 64), seeds=range(50), grid=dc.uniform(1))
    assert sizes == [50, 21, 21, 8]
