"""Drawn faces: the law against its definition and against draws, the bits of the pictures, the data set."""
import hashlib
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from diffcourse import faces as fc
from diffcourse.faces import LAW, FaceLaw, draw_face, faces
from diffcourse.portraits import JITTER, PALETTE, TINT, jitter, portrait, still

COLUMN = {name: i for i, name in enumerate(LAW.attributes)}
SMALL = FaceLaw({"a": ("x y", "", {"": "30 70"}), "b": ("u v w", "a", {"x": "10 20 70", "*": "100 0 0"}),
                 "c": ("p q", "a b", {"x u": "25 75", "* v": "50 50", "* *": "0 100"})})


def brute(law, *names):
    """The marginal by walking through every combination, with the percents looked up in the table anew."""
    keys, found = [*law.attributes], {}
    for case in product(*law.attributes.values()):
        person, p = dict(zip(keys, case)), 1.0
        for name, (values, parents, rows) in law.table.items():
            given = [person[k] for k in parents.split()]
            row = next(r for w, r in rows.items() if all(x in ("*", g) for x, g in zip(w.split(), given)))
            p *= int(row.split()[values.split().index(person[name])]) / 100
        at = tuple(person[k] for k in names)
        found[at] = found.get(at, 0) + p
    return found


@pytest.mark.parametrize("names", [("a",), ("c",), ("a", "c"), ("c", "b"), ("b", "c", "a")])
def test_marginals_are_the_sums_over_all_combinations(names):
    ours, want = SMALL.marginal(*names), brute(SMALL, *names)
    for at in np.ndindex(ours.shape):
        words = tuple(SMALL.attributes[k][i] for k, i in zip(names, at))
        assert ours[at] == pytest.approx(want[words], abs=1e-14)


def test_possible_people_and_their_probabilities():
    every = np.array([*np.ndindex(2, 3, 2)])
    p = SMALL.probability(every)
    assert p.sum() == pytest.approx(1) and SMALL.possible() == (p > 0).sum() == 6
    assert SMALL.probability([[0, 0, 1]]) == pytest.approx(0.3 * 0.1 * 0.75)


def test_a_law_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a: a row needs 2 whole percentages that sum to 100"):
        FaceLaw({"a": ("x y", "", {"": "30 60"})})
    with pytest.raises(ValueError, match="a: a row needs 2"):
        FaceLaw({"a": ("x y", "", {"": "-30 130"})})
    with pytest.raises(ValueError, match="b: no row for the parents .*'y'"):
        FaceLaw({"a": ("x y", "", {"": "30 70"}), "b": ("u v", "a", {"x": "50 50"})})
    with pytest.raises(ValueError, match="'nose' is no attribute; they are skin"):
        LAW.marginal("nose")


def test_every_value_has_a_chance_and_twelve_attributes_make_a_face():
    assert len(LAW.attributes) == 12
    for name in LAW.attributes:
        p = LAW.marginal(name)
        assert p.sum() == pytest.approx(1) and (p > 0.01).all(), name


def chi_square(counts, p):
    """The p-value of counts under the probabilities p; counts where p is 0 must be 0."""
    assert counts[p == 0].sum() == 0
    return stats.chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue


def pair_counts(y, a, b):
    out = np.zeros((len(LAW.attributes[a]), len(LAW.attributes[b])))
    np.add.at(out, (y[:, COLUMN[a]], y[:, COLUMN[b]]), 1)
    return out


@pytest.fixture(scope="module")
def people():
    return LAW.draw(fc._numbers(0, 0, 20_000))


def test_drawn_people_follow_the_law(people):
    names = [*LAW.attributes]
    found = [chi_square(np.bincount(people[:, COLUMN[n]], minlength=len(LAW.attributes[n])), LAW.marginal(n)) for n in names]
    found += [chi_square(pair_counts(people, a, b).ravel(), LAW.marginal(a, b).ravel()) for i, a in enumerate(names) for b in names[:i]]
    assert len(found) == 78 and min(found) > 0.01 / 78 and 0.3 < np.median(found) < 0.7


def test_what_the_law_joins_depends_and_what_it_separates_does_not(people):
    def p_value(table):
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        return stats.chi2_contingency(table).pvalue
    for a, b in (("hair", "hat"), ("skin", "colour"), ("mouth", "eyes"), ("beard", "brows"), ("shirt", "background")):
        assert p_value(pair_counts(people, a, b)) < 1e-6, (a, b)
    for a, b in (("skin", "mouth"), ("hair", "shirt"), ("eyes", "background"), ("skin", "hat")):
        assert p_value(pair_counts(people, a, b)) > 1e-3, (a, b)
    short = people[people[:, COLUMN["hair"]] == 1]     # given the hair, hat and beard are independent
    assert p_value(pair_counts(short, "hat", "beard")) > 1e-3


def test_another_law_is_seen(people):
    table = {**LAW.table, "hat": (*LAW.table["hat"][:2], {"bun": "100 0 0 0", "*": "60 15 15 10"})}
    y = FaceLaw(table).draw(fc._numbers(0, 0, 20_000))
    same = np.delete(y == people, COLUMN["hat"], 1)
    assert same.all(), "equal numbers, equal people but for the hat"
    assert chi_square(np.bincount(y[:, COLUMN["hat"]], minlength=4), LAW.marginal("hat")) < 1e-6


# --- the painter --------------------------------------------------------------------------------------------------

def test_the_bits_of_the_pictures():
    """The same under Pillow 9.5, 10.1, 11.0, 13.0 and numpy 1.26, 2.0, 2.2, 2.4; other bits are another data set."""
    for size, split, want in ((32, "train", "bf9f56c040daa027"), (64, "held_out", "9827c3a0e3621dae")):
        d = faces(split, size, 50, seed=5)
        digest = hashlib.sha256(((d.x + 1) * 127.5).round().byte().numpy().tobytes()).hexdigest()
        assert digest.startswith(want), f"{size} {split}: {digest[:16]}"


def test_levels_are_whole_and_in_range():
    d = faces("train", 32, 20)
    levels = (d.x.double() + 1) * 127.5
    assert d.x.dtype == torch.float32 and d.shape == (3, 32, 32) and d.y.shape == (20, 12) and d.y.dtype == torch.int64
    assert (levels - levels.round()).abs().max() < 1e-4 and d.x.amin() >= -1 and d.x.amax() <= 1


def test_every_palette_has_every_value():
    for name in ("skin", "colour", "shirt", "background"):
        assert tuple(PALETTE[name]) == LAW.attributes[name]
    assert PALETTE["accent"].keys() == PALETTE["shirt"].keys()


def test_every_attribute_shows_whatever_the_others_are():
    """Another value of one attribute is another picture: at least one pixel moves by 20 levels."""
    y = LAW.draw(fc._numbers(3, 0, 40))
    for row in y:
        for name, i in COLUMN.items():
            for value in range(len(LAW.attributes[name])):
                other = row.copy()
                other[i] = value
                if value == row[i] or LAW.probability(other[None]) == 0:
                    continue
                a, b = (portrait(p, still(), 32).astype(int) for p in LAW.names(np.stack([row, other])))
                assert abs(a - b).max() >= 20, (name, LAW.names(row[None])[0], LAW.attributes[name][value])


def test_mirrored_is_mirrored_and_as_likely():
    person = LAW.names(LAW.draw(fc._numbers(0, 0, 1)))[0]
    a, b = (portrait(person, still() | {"mirror": m}, 64) for m in (0, 1))
    assert (a[:, ::-1] == b).all() and (a != b).any()
    js = jitter(fc._numbers(0, 0, 4000)[:, 12:])
    for name, (low, high, step) in JITTER.items():
        values = range(low, high + 1, step)
        seen = [sum(j[name] == v for j in js) for v in values]
        assert sum(seen) == len(js) and stats.chisquare(seen).pvalue > 1e-4, name
        assert still()[name] in values, name
    assert all(abs(v) <= TINT[k] for j in js for k in TINT for v in j[k])
    assert faces("train", 32, 1).flip is True


# --- the data set -------------------------------------------------------------------------------------------------

def test_face_i_is_the_same_in_every_batch():
    whole = faces("train", 32, 12, seed=2)
    part = faces("train", 32, 3, seed=2, first=7)
    assert torch.equal(part.x, whole.x[7:10]) and torch.equal(part.y, whole.y[7:10])
    assert faces("train", 32, 12, seed=2).hash == whole.hash


def test_splits_and_seeds_share_no_face():
    sets = [faces(split, 32, 100, seed) for split in fc.FIRST for seed in (0, 1)]
    pictures = {x.numpy().tobytes() for d in sets for x in d.x}
    assert len(pictures) == 400
    assert fc.FIRST["held_out"] - fc.FIRST["train"] == 10**9


def test_64_pixels_averaged_are_32():
    large, small = (faces("held_out", s, 10).x for s in (64, 32))
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().max() * 127.5 <= 1.001


def test_draw_face():
    x = draw_face(32, hair="long", colour="pink")
    assert x.shape == (3, 32, 32) and not torch.equal(x, draw_face(32, hair="long", colour="grey"))


@pytest.mark.parametrize("bad, said", [
    ({"size": 48}, "size is 48; faces come in 32 and 64"), ({"size": 32.0}, "size is 32.0"), ({"split": "test"}, "split is 'test'; allowed are 'train', 'held_out'"),
    ({"n": 0}, "n = 0: a whole number >= 1"), ({"n": 2.0}, "n = 2.0"), ({"seed": -1}, "seed = -1: a whole number >= 0"),
    ({"first": -1}, "first = -1"), ({"first": 10**9}, "a split has 1,000,000,000 faces"), ({"n": True}, "n = True")])
def test_faces_that_do_not_exist(bad, said):
    with pytest.raises(ValueError, match=said):
        faces(**{"n": 1, **bad})


def test_people_that_do_not_exist():
    with pytest.raises(ValueError, match="hat is 'crown'; choose of none, cap"):
        draw_face(hat="crown")
    with pytest.raises(ValueError, match="'nose' is no attribute"):
        draw_face(nose="long")
    with pytest.raises(ValueError, match="size is 128"):
        draw_face(128)
