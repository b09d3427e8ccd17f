"""What tells trainings apart: every kind of change is seen, and a comment is not."""
import dataclasses
import enum
import functools
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from diffcourse import identity
from diffcourse.identity import differences, fingerprint, identify


def run(source, name="loss"):
    "What `name` is after a notebook cell, which no file holds."
    space = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), "<cell>", "exec"), space)
    return space[name]


LOSS = """
import functools, types
import torch
import torch.nn.functional as F
from diffcourse import paths
import diffcourse as dc

cfg = {"w": 1.0, "deep": [1, (2, 3)]}
space = types.SimpleNamespace(rate=1.0)
table = torch.ones(3)
NAMES = {"a", "b", "c"}

def helper(x, by=2.0):
    return by * x

@torch.no_grad()
def still(x):
    return x + 1

@functools.lru_cache
def cached(k):
    return k + 1

class Base:
    factor = 1.0
    def scale(self, x):
        return self.factor * x

class Part(Base):
    @staticmethod
    def fixed(x):
        return x * 1
    @property
    def half(self):
        return 0.5

part = Part()
part.own = 1.0

def loss(net, x0, draw):
    "Said."
    def inner(x):
        return [y * 1.5 for y in x]
    x = dc.VP.cosine().alpha(0.5) * paths.Linear().alpha(0.5)
    values = still(helper(x0)) * cfg["w"] + space.rate + table.sum()
    return inner(values), part.scale(part.half), cached(1), "a" in NAMES, F.relu(x), part.fixed(1), part.own
"""
CHANGES = {
    "a value in a dict": ('"w": 1.0', '"w": 5.0'),
    "a value deep in a dict": ("(2, 3)", "(2, 4)"),
    "an attribute of a namespace": ("rate=1.0", "rate=2.0"),
    "a tensor": ("torch.ones(3)", "torch.zeros(3)"),
    "a set": ('{"a", "b", "c"}', '{"a", "b", "d"}'),
    "a helper": ("by * x", "by + x"),
    "a default": ("by=2.0", "by=3.0"),
    "a function in a library's decorator": ("return x + 1", "return x + 2"),
    "a cached function": ("return k + 1", "return k + 2"),
    "a parent's attribute": ("factor = 1.0", "factor = 2.0"),
    "a parent's method": ("self.factor * x", "self.factor + x"),
    "a static method": ("x * 1\n", "x * 2\n"),
    "a property": ("return 0.5", "return 0.25"),
    "an attribute of an object": ("part.own = 1.0", "part.own = 2.0"),
    "an inner function": ("y * 1.5", "y * 2.5"),
    "the body": ("+ space.rate", "- space.rate"),
    "a name of a package": ("dc.VP.cosine()", "dc.VP.linear()"),
    "a class of a module": ("paths.Linear()", "paths.VPCosine()"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    old, new = CHANGES[change]
    assert LOSS.count(old) == 1
    assert fingerprint(run(LOSS)) != fingerprint(run(LOSS.replace(old, new)))


@pytest.mark.parametrize("same", [
    ("cfg =", "# a comment\n\ncfg ="),
    ('    "Said."\n', ""),
    ('    "Said."\n', '    "Said otherwise."\n    # and a comment\n'),
    ("class Base:\n", 'class Base:\n    "Text."\n\n'),
    ("space =", "unread = 5\nspace ="),
    ('{"a", "b", "c"}', '{"c", "b", "a"}'),
    ('{"w": 1.0, "deep": [1, (2, 3)]}', '{"deep": [1, (2, 3)], "w": 1.0}'),
])
def test_what_changes_nothing_is_not_seen(same):
    assert LOSS.count(same[0]) == 1
    assert fingerprint(run(LOSS)) == fingerprint(run(LOSS.replace(*same)))


@pytest.mark.parametrize("how", ["python -", "script", "module"])
def test_wherever_it_was_written_and_whatever_the_hash_seed(tmp_path, how):
    "The same in three processes; a change in a helper's file is seen."
    (tmp_path / "mine.py").write_text("def helper(x):\n    return 2 * x\n")
    loss = "import mine\nfrom mine import helper\nKEYS = {'a', 'b', 'c'}\n\ndef loss(n, x, d):\n    return mine.helper(x) + helper(x) in KEYS\n"
    say = "\nfrom diffcourse.identity import fingerprint\nprint(fingerprint(loss))\n"

    def told(seed):
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
        (tmp_path / "lossy.py").write_text(loss)
        (tmp_path / "script.py").write_text(loss + say)
        command, text = {
            "python -": (["-"], loss + say),
            "script": (["script.py"], ""),
            "module": (["-"], "from lossy import loss" + say),
        }[how]
        made = subprocess.run([sys.executable, *command], input=text, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return made.stdout

    first = told(1)
    (tmp_path / "mine.py").write_text("# moved down\n\ndef helper(x):\n    'Twice.'\n    return 2 * x\n")
    assert told(2) == first
    (tmp_path / "mine.py").write_text("def helper(x):\n    return 3 * x\n")
    assert told(3) != first


def test_a_function_that_imports_when_it_is_called(tmp_path, monkeypatch):
    file = tmp_path / "lazy_part.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "def loss(n, x, d):\n    {}\n    return {}\n"
    for how, use in (("from lazy_part import go", "go(x)"), ("import lazy_part", "lazy_part.go(x)")):
        names = []
        for body in ("x", "2 * x", "2 * x  # twice"):
            file.write_text(f"def go(x):\n    return {body}\n")
            sys.modules.pop("lazy_part", None)
            importlib_caches()
            names.append(fingerprint(run(source.format(how, use))))
        assert names[0] != names[1] == names[2]


def importlib_caches():
    import importlib

    importlib.invalidate_caches()
    sys.dont_write_bytecode = True


class Colour(enum.Enum):
    RED, BLUE = 1, 2


@dataclasses.dataclass
class Options:
    rate: float = 1.0
    names: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("a",)
    a: int


class Words(list):
    pass


class Point(tuple):
    pass


def make(k):
    return lambda x: x + k


class Net(nn.Module):
    def __init__(self, seed=0, tied=False):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.load_state_dict(self.a.state_dict())
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x, t):
        return self.b(self.a(x))

    @functools.cached_property
    def costly(self):
        return torch.rand(3)


def named(n):
    return types.SimpleNamespace(a=1, b=n)


VALUES = {
    "numbers": (1, 1.0, True, "1", None, 0, 0.0, -0.0, 1j, b"1", ...),
    "containers": ([1], (1, 2), {1: 2}, {1}, {2}, {"1": 2}, [[1]], range(3)),
    "numpy": (np.arange(3), np.arange(3.0), np.float32(1), np.float64(1), np.array(["a"], dtype=object), np.arange(3)[:, None]),
    "tensors": (torch.arange(3), torch.arange(3.0), torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, dtype=torch.bfloat16),
                torch.tensor(1.0), torch.ones(0), torch.ones(3, dtype=torch.bool), torch.zeros(3).to_sparse(), torch.ones(2) * 1j),
    "objects": (named(1), named(2), Options(), Options(2.0), Options(names=[1]), Slotted(1), Slotted(2), Words([1]), Words([2]),
                Point([1]), Point([2]), Colour.RED, Colour.BLUE, np.add, np.multiply),
    "functions": (make(1), make(2), functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1), len, max,
                  [1].index, [2].index, named, torch.sin, torch.cos, nn.functional.relu, nn.functional.silu, random.Random(1).random,
                  random.Random(2).random),
    "classes": (Net, Options, Colour, nn.Linear, nn.Conv2d, int),
    "networks": (Net(), Net(1), nn.Linear(3, 3), Net(tied=True), Net().train(False), nn.Dropout(0.1), nn.Dropout(0.2)),
    "dtypes": (torch.float32, torch.float64, torch.device("cpu"), torch.device("cuda:1"), torch.Size([1]), np.dtype("f4")),
    "generators": (np.random.default_rng(1), np.random.default_rng(2), torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "others": (logging.getLogger("a"), logging.getLogger("b"), math := __import__("math"), types.MappingProxyType({1: 2})),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_a_kind_are_told_apart(kind):
    names = [fingerprint(v) for v in VALUES[kind]]
    assert len({*names}) == len(names)
    assert names == [fingerprint(v) for v in VALUES[kind]]


def test_equal_values_are_one():
    for f in (lambda: make(1), lambda: named(3), Options, Net, lambda: {"b": [1, {2}], "a": torch.ones(2)}, lambda: Words("ab")):
        assert fingerprint(f()) == fingerprint(f())
    assert fingerprint({1: 2, "a": 3}) == fingerprint({"a": 3, 1: 2})
    assert fingerprint([1, (2, 3)]) == fingerprint((1, [2, 3]))  # as YAML writes them
    one = Options()
    assert fingerprint([one, one]) == fingerprint([Options(), Options()])
    assert fingerprint(torch.ones(3, 2).t()) == fingerprint(torch.ones(2, 3))


def test_a_number_of_numpy_is_not_mistaken_and_nan_is_a_value():
    assert fingerprint(float("nan")) == fingerprint(float("nan")) != fingerprint(float("inf"))


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


def test_what_refers_to_itself():
    ring = [1]
    ring.append(ring)
    other = [2]
    other.append(other)
    assert fingerprint(ring) != fingerprint(other)
    assert fingerprint(even) != fingerprint(odd) and fingerprint(even) == fingerprint(even)
    net = Net()
    net.forward = types.MethodType(lambda self, x, t: x, net)
    assert fingerprint(net) != fingerprint(Net())


@pytest.mark.parametrize("bad, word", [
    (threading.Lock(), "lock"), (open(os.devnull), "TextIOWrapper"), ((i for i in "ab"), "generator"),
    (torch.ones(2, device="meta"), "without values"), (sys._getframe(), "frame"),
])
def test_what_cannot_be_described_is_refused_by_name(bad, word):
    box = types.SimpleNamespace(deep={"key": [bad]})

    def loss(net, x, draw):
        return box.deep

    with pytest.raises(TypeError, match=rf"loss\.box\.deep\['key'\]\[0\] is .*{word}") as e:
        identify(Net(), loss=loss)
    assert "plain value" in str(e.value)


def test_modes_do_not_name_a_network_that_learns_but_one_that_is_read():
    on, off = Net().train(), Net().eval()
    assert identify(on)[0] == identify(off)[0] and fingerprint(on) != fingerprint(off)
    frozen = Net()
    frozen.a.weight.requires_grad_(False)
    assert identify(frozen)[0] != identify(on)[0]
    assert identify(Net(tied=True))[0] != identify(on)[0]
    on.costly
    assert identify(on)[0] == identify(off)[0]


def test_hooks_count_by_what_they_do_not_by_their_number():
    def hooked(f):
        net = Net()
        net.register_forward_hook(f)
        return identify(net)[0]

    def one(m, args, out):
        return out

    def two(m, args, out):
        return 2 * out

    assert hooked(one) == hooked(one) != hooked(two)


def test_a_compiled_network_is_what_it_was():
    assert fingerprint(torch.compile(Net())) == fingerprint(Net())
    inside = Net()
    inside.compile()
    assert fingerprint(inside) == fingerprint(Net())


def test_a_custom_gradient():
    source = """
    import torch
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()
        @staticmethod
        def backward(ctx, g):
            return 1 * g
    def loss(net, x, draw):
        return Straight.apply(x)
    """
    first = fingerprint(run(source))
    assert fingerprint(run(source)) == first
    assert fingerprint(run(source.replace("1 * g", "2 * g"))) != first


def test_the_same_code_in_a_file_and_in_a_cell(tmp_path, monkeypatch):
    "Where a function stands does not matter: moving it trains nothing again."
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loss_in_a_file.py").write_text(textwrap.dedent(LOSS))
    import loss_in_a_file

    assert fingerprint(loss_in_a_file.loss) == fingerprint(run(LOSS))


def test_differences_are_named():
    _, a = identify(Net(), loss=run(LOSS), data=torch.ones(3))
    _, b = identify(Net(1), loss=run(LOSS.replace("by * x", "by + x").replace('"w": 1.0', '"w": 2.0')), data=torch.ones(3))
    a["settings"], b["settings"] = {"steps": 4, "lr": 1.0}, {"steps": 8, "lr": 1.0}
    said = differences(a, b)
    assert said[0] == "steps (4, now 8)" and "the network or its weights at the start" in said
    assert "__main__.helper" in said and "loss reads cfg" in said
    assert differences(a, a) == [] and "the data" in differences(a, identify(Net(), data=torch.zeros(3))[1])


BRANCHES = '''def f(x, *, n=3):
    for i in range(n):
        try:
            x = torch.exp(x) if x else torch.log(x)
            y = [torch.nn.functional.mse(v, torch.sin(v)) for v in x if torch.any(v)]
        except ValueError:
            while torch.any(x):
                x = torch.sub(x, 1)
    return x, {k: torch.exp(k) for k in y}
'''
LONG = "def f(x):\n" + "".join(f"    if x: x = torch.f{k}(x)\n" for k in range(400)) + "    return x\n"


def _hash(text):
    return identity._bytecode([c for c in compile(text, "here", "exec").co_consts if hasattr(c, "co_code")][0])


@pytest.mark.parametrize("text", [BRANCHES, LONG])
def test_an_import_in_sight_changes_how_calls_are_compiled_and_not_the_hash(text):
    assert _hash("import torch\n" + text) == _hash(text)


@pytest.mark.parametrize("old, new", [("torch.exp(x) if", "torch.exp(x) if not"), ("torch.sub", "torch.add"), ("range(n)", "range(i)"),
                                      ("while", "if"), ("ValueError", "TypeError"), ("(x, 1)", "(x, 2)")])
def test_what_a_function_does_changes_it(old, new):
    assert old in BRANCHES and _hash(BRANCHES.replace(old, new)) != _hash(BRANCHES)
