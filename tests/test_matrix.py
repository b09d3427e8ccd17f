"""Solvers by grids by budgets: what is spent, errors against the exact flow, what is refused, the table."""

import pytest

from diffcourse import matrix as mx
from diffcourse.grids import uniform
from diffcourse.paths import Linear
from diffcourse.playground import mixture
from diffcourse.sampling import Denoiser, sample

MIX, PATH = mixture(), Linear()
DEN = Denoiser(MIX.net(PATH, "flow"), PATH, "flow")


@pytest.mark.parametrize("name", mx.CAST)
def test_a_budget_is_what_is_spent(name):
    found = {}
    for nfe in (1, 2, 3, 4, 5, 8, 10, 12, 13):
        if made := mx.CAST[name](nfe, PATH):
            solver, steps = made
            first = 1.0 if name == "DPM-Solver-2" else 0.999  # its list of orders is for a grid from 1
            last = 0.0 if name in ("DPM-Solver-2", "EDM Heun") else 0.001
            found[nfe] = sample(DEN, (1,), solver, uniform(steps, first, last), range(2)).nfe
    least = 1 if name == "EDM Heun" else 0  # which leaves one of an even budget
    assert found and all(nfe - least <= spent <= nfe for nfe, spent in found.items())


def test_errors_are_distances_from_the_exact_flow():
    seeds = range(30)
    noise = sample(DEN, (1,), mx.Euler(), uniform(1), seeds, trajectory=True).trajectory[0]
    end = MIX.flow_map(noise[:, 0], 1.0, 0.0, PATH)
    cells = mx.matrix(DEN, (1,), seeds, (8, 16, 32), ["Euler", "DDIM", "midpoint"], ["even, 1 to 0"])
    of = {(c.solver, c.nfe): c.rms for c in cells}
    by_hand = sample(DEN, (1,), mx.Euler(), uniform(8), seeds).x[:, 0] - end
    assert of["Euler", 8] == pytest.approx(float(by_hand.square().mean().sqrt()), rel=1e-3)
    assert of["DDIM", 8] == pytest.approx(of["Euler", 8], rel=1e-6)  # one method on the linear path
    (by_noise,) = [c.median for c in cells if (c.solver, c.nfe) == ("Euler", 8)]
    assert by_noise == pytest.approx(float(by_hand.abs().median(dim=0).values), rel=1e-3)
    assert 1.7 < of["Euler", 16] / of["Euler", 32] < 2.3 and of["midpoint", 16] / of["midpoint", 32] > 3


def test_a_grid_on_which_a_solver_would_overspend_is_left_out():
    cells = mx.matrix(DEN, (1,), range(3), (5, 6), ["EDM Heun"], ["λ, .995 to .005", "ρ = 7, 80 to .002"])
    assert {(c.grid[0], c.nfe) for c in cells} == {("λ", 6), ("ρ", 5), ("ρ", 6)}  # the λ grid saves nothing at its end


def test_what_a_solver_refuses_is_left_out():
    cells = mx.matrix(DEN, (1,), range(3), (13,), ["PNDM", "Euler"], ["even, 1 to 0", "even, .999 to 0"])
    assert {(c.solver, c.grid) for c in cells} == {("Euler", "even, 1 to 0"), ("Euler", "even, .999 to 0"), ("PNDM", "even, .999 to 0")}
    assert not mx.matrix(DEN, (1,), range(3), (3,), ["RK4"])  # no step of four evaluations fits


def test_names_and_budgets_that_are_none():
    with pytest.raises(ValueError, match=r"no \['Eular'\]; there are \['Euler'"):
        mx.matrix(DEN, (1,), range(3), (3,), ["Eular"])
    with pytest.raises(ValueError, match=r"no \['odd'\]; there are \['even, 1 to 0'"):
        mx.matrix(DEN, (1,), range(3), (3,), grids=["odd"])
    with pytest.raises(ValueError, match="no budget"):
        mx.matrix(DEN, (1,), range(3), ())


def test_the_table_names_the_best_grid():
    cells = [mx.Cell("A", "g", 5, 0.2), mx.Cell("A", "h", 5, 0.1), mx.Cell("A", "g", 10, 0.05), mx.Cell("B", "g", 10, 0.07)]
    table = mx.best_grids(cells)
    assert table.rows == [["A", "0.100 b", "0.050 a"], ["B", "–", "0.070 a"]] and "a: g; b: h" in table.note
    assert mx.best_grids(cells, ["g"]).rows[0][1] == "0.200 a"
