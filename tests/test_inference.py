"""Effects and their intervals against statsmodels, and how often the rule is wrong where the answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffcourse import inference
from diffcourse.inference import Effect, compare, decide, differences, effect, power, verdicts, visible
from diffcourse.records import VERSIONS, Records, _judged


def table(rng, training, noise, rest, S=5, N=5):
    "Differences without a difference; the arguments are standard deviations."
    a, b, e = (rng.standard_normal(s) for s in ((S, 1), (1, N), (S, N)))
    return training * a + noise * b + rest * e


def squares(d):
    "The mean squares in three lines, for simulations."
    (S, N), m, rows, columns = d.shape, d.mean(), d.mean(1), d.mean(0)
    rest = d - rows[:, None] - columns + m
    return [N * rows.var(ddof=1), S * columns.var(ddof=1), (rest**2).sum() / ((S - 1) * (N - 1))]


@pytest.mark.parametrize("shape", [(5, 5), (6, 5), (5, 12), (9, 7)])
def test_mean_squares_are_those_of_statsmodels(shape):
    d = table(np.random.default_rng(0), 1.0, 0.5, 0.2, *shape)
    assert inference._mean_squares(d) == pytest.approx(squares(d), rel=1e-9)


def test_luck_is_that_of_a_mixed_model_by_restricted_likelihood():
    import pandas
    from statsmodels.formula.api import mixedlm

    d = 0.4 + table(np.random.default_rng(3), 1.0, 0.7, 0.3, 8, 6)
    rows, columns = np.indices(d.shape).reshape(2, -1)
    data = pandas.DataFrame(dict(d=d.ravel(), row=rows, column=columns))
    parts = {"row": "0 + C(row)", "column": "0 + C(column)"}
    fit = mixedlm("d ~ 1", data, groups=np.ones(d.size), vc_formula=parts).fit()
    by_name, found = dict(zip(fit.model.exog_vc.names, fit.vcomp)), effect(d)
    assert np.square(found.luck) == pytest.approx([by_name["row"], by_name["column"], fit.scale], rel=1e-2)
    assert found.value == pytest.approx(fit.fe_params.iloc[0], abs=1e-9)
    assert found.error > fit.bse.iloc[0], "the rest is counted twice: never too short"


MIXES = [(1, 0, 0.3), (1, 0.2, 0.2), (1, 0.4, 0.3), (1, 1, 0.3), (1, 1, 3), (0.3, 1, 0.5), (0, 1, 0.3), (0, 0, 1)]


@pytest.mark.parametrize("mix", MIXES)
def test_at_most_five_per_cent_of_null_tables_are_decided(mix, monkeypatch):
    monkeypatch.setattr(inference, "_mean_squares", squares)
    rng, cases = np.random.default_rng(1), 4000
    wrong = sum(effect(table(rng, *mix)).p <= 0.05 for _ in range(cases)) / cases
    assert wrong <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / cases)


def test_the_interval_holds_the_truth_where_both_kinds_of_luck_are_shared(monkeypatch):
    monkeypatch.setattr(inference, "_mean_squares", squares)
    rng, inside = np.random.default_rng(2), 0
    for _ in range(2000):
        low, high = effect(0.7 + table(rng, 0.6, 0.6, 0.3)).interval()
        inside += low < 0.7 < high
    assert inside / 2000 > 0.94


def test_a_family_of_null_comparisons_holds_a_false_word_in_five_per_cent_at_most(monkeypatch):
    monkeypatch.setattr(inference, "_mean_squares", squares)
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it for each family
    rng, false = np.random.default_rng(4), 0
    for _ in range(400):
        found = decide([effect(table(rng, 1, 0, 0.1)) for _ in range(8)], margin=1e-6)
        false += any(e.verdict != "undecided" for e in found)
    assert false / 400 <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("luck, S, N", [((0.1, 0.1, 0.05), 5, 20), ((0.3, 0.05, 0.2), 8, 5), ((0.05, 0.2, 0.1), 5, 10)])
def test_what_is_said_to_be_visible_is_seen_in_four_cases_of_five(luck, S, N, monkeypatch):
    monkeypatch.setattr(inference, "_mean_squares", squares)
    least, rng = visible(luck, S, N), np.random.default_rng(5)
    seen = sum(effect(least + table(rng, *luck, S, N)).p < 0.05 for _ in range(3000)) / 3000
    assert seen == pytest.approx(0.8, abs=0.025)
    assert power(least, luck, S, N) == pytest.approx(0.8, abs=0.01)
    assert power(0.0, luck, S, N) <= 0.053


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3), S=st.integers(5, 8), N=st.integers(5, 8))
def test_order_sign_and_shift(seed, shift, S, N):
    rng = np.random.default_rng(seed)
    d = table(rng, 1, 0.5, 0.3, S, N)
    e, mixed = effect(d), effect(d[rng.permutation(S)][:, rng.permutation(N)])
    assert (mixed.value, mixed.error) == pytest.approx((e.value, e.error))
    moved, flipped = effect(d + shift), effect(-d)
    assert (moved.value, moved.error) == pytest.approx((e.value + shift, e.error))
    assert (flipped.value, flipped.p) == pytest.approx((-e.value, e.p))


def test_p_and_interval_are_student_t():
    e = Effect("", 0.5, 0.2, 5, 7, (0, 0, 0))
    assert e.degrees == 4 and e.t == 2.5
    assert e.p == pytest.approx(2 * stats.t.sf(2.5, 4))
    assert e.interval(0.9) == pytest.approx(stats.t.interval(0.9, 4, loc=0.5, scale=0.2))
    assert Effect("", 0.0, 0.0, 5, 5, (0, 0, 0)).p == 1.0
    assert Effect("", 0.1, 0.0, 5, 5, (0, 0, 0)).p == 0.0


def test_holm_by_hand_and_the_words():
    ours = [Effect(n, v, e, 5, 5, (1, 1, 1)) for n, v, e in
            (("clear", -5, 0.5), ("second", 2, 0.35), ("third", 1, 0.5), ("close", 0.01, 0.01), ("vague", 0.0, 1.0))]
    ps = sorted(e.p for e in ours)
    assert ps[0] < 0.05 / 5 and ps[1] < 0.05 / 4 and ps[2] > 0.05 / 3, "the third stops Holm"
    assert [e.verdict for e in decide(ours, margin=0.2)] == ["better", "worse", "undecided", "equal", "undecided"]
    assert [e.verdict for e in decide(ours[:3], margin=0.2)][:2] == ["better", "worse"]


def test_equal_needs_the_interval_of_the_whole_family():
    e = Effect("", 0.0, 0.06, 5, 5, (1, 1, 1))
    assert e.interval()[1] < 0.2 < e.interval(1 - 0.05 / 10)[1]
    assert decide([e], margin=0.2)[0].verdict == "equal"
    assert {f.verdict for f in decide([e] * 10, margin=0.2)} == {"undecided"}


def test_a_real_difference_inside_the_margin_is_called_equal():
    assert decide([Effect("", -0.1, 0.01, 5, 5, (1, 1, 1))], margin=0.2)[0].verdict == "equal"


def records(shift, cells=None, **more):
    rng = np.random.default_rng(0)
    cells = cells or [(s, f"{n}000-{n}999") for s in range(5) for n in range(1, 6)]
    return Records(dict(train_seed=s, seeds=n, floor=0.5, value=2 + shift + rng.random(), **more) for s, n in cells)


def test_differences_are_taken_cell_by_cell_whatever_the_order():
    a, b = records(0.25), records(0.0)
    assert differences(Records(a[::-1]), b) == pytest.approx(np.full((5, 5), 0.5))


@pytest.mark.parametrize("a, b, says", [
    (records(0), records(0)[:-1], "only one of the two has"),
    (records(0)[:-1], records(0)[:-1], "24 cells of 5 trainings and 5 noises"),
    (Records([*records(0), *records(0)]), records(0), "50 records for 25 cells"),
])
def test_tables_with_holes_are_refused(a, b, says):
    with pytest.raises(ValueError, match=says):
        differences(Records(a), Records(b))


@pytest.mark.parametrize("field, a, b", [("task", "digits", "mnist28"), ("n", 200, 1000), ("feature_hash", "0", "1"), ("metric", "FD", "FID")])
def test_what_was_not_scored_alike_is_not_compared(field, a, b):
    with pytest.raises(ValueError, match=f"{field} is .*: these do not compare"):
        differences(records(0, **{field: a}), records(0, **{field: b}))


@pytest.mark.parametrize("floor", [0.0, -1.0, math.inf, math.nan])
def test_a_floor_that_is_none(floor):
    with pytest.raises(ValueError, match="a floor that is finite and above zero"):
        differences(Records(r | {"floor": floor} for r in records(0)), records(0))


@pytest.mark.parametrize("d, says", [
    (np.zeros((4, 5)), r"\(4, 5\) came, \(trainings, sets of noise\)"),
    (np.zeros((5, 3)), "5 of each or more"),
    (np.zeros(25), r"\(25,\) came"),
    (np.full((5, 5), np.nan), "25 of 25 are nan or inf"),
    (np.full((5, 5), 0.1), "all cells are 0.1, so there is no luck to see"),
])
def test_what_effect_refuses(d, says):
    with pytest.raises(ValueError, match=says):
        effect(d, "AB2 less Euler")


def test_what_decide_and_power_refuse():
    with pytest.raises(ValueError, match="0 comparisons"):
        decide([], 0.2)
    for margin in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin"):
            decide([effect(table(np.random.default_rng(0), 1, 1, 1))], margin)
    with pytest.raises(ValueError, match="two or more of each"):
        power(0.2, (1, 1, 1), 1, 5)
    for luck in ((0, 0, 0), (math.nan, 1, 1), (-1, 1, 1)):
        with pytest.raises(ValueError, match="some luck"):
            power(0.2, luck)
    with pytest.raises(ValueError, match="some luck, finite"):
        power(math.nan, (1, 1, 1))
    for alpha in (0, 1, 5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            power(0.2, (1, 1, 1), alpha=alpha)
        with pytest.raises(ValueError, match="alpha"):
            decide([effect(table(np.random.default_rng(0), 1, 1, 1))], 0.2, alpha)
    for often in (80, 0.01, 1.0):
        with pytest.raises(ValueError, match="often"):
            visible((1, 1, 1), often=often)


def test_an_effect_has_no_verdict_before_it_is_decided():
    one = Effect("", 0.1, 0.01, 5, 5, (0, 0, 0))
    assert one.verdict == "" and str(one) == "+0.10 [+0.07, +0.13] F"
    assert str(decide([one], 0.05)[0]).endswith(": worse")


def test_a_table_of_nothing_but_the_rest_has_the_error_of_its_mean():
    "Equal means in all rows and columns: the mean squares of both are zero, and the mean is still not certain."
    k = np.arange(5)
    d = 0.3 + 0.1 * ((k[:, None] + k) % 5 - 2)
    assert d.mean(0) == pytest.approx(d.mean(1)) and effect(d).p > 1e-3
    assert effect(d).error == pytest.approx(math.sqrt(squares(d)[2] / 25))


def test_equal_is_schuirmanns_two_one_sided_tests():
    "As statsmodels has it, for a paired sample: equal where both one-sided tests at 0.05 say so."
    from statsmodels.stats.weightstats import ttost_paired

    rng = np.random.default_rng(7)
    for _ in range(40):
        x = 0.1 * rng.standard_normal() + 0.25 * rng.standard_normal(5)
        e = Effect("", x.mean(), x.std(ddof=1) / math.sqrt(5), 5, 5, (1, 1, 1))
        p = ttost_paired(x, np.zeros(5), -0.3, 0.3)[0]
        assert (decide([e], margin=0.3)[0].verdict == "equal") == (p < 0.05)


def test_records_of_another_version_are_not_compared():
    def made(judge):
        return Records(dict(train_seed=s, seeds=f"{n}000", value=1.0 + 0.1 * ((s + n) % 3), floor=0.5, made={"judge": judge}, **_judged("digits"))
                       for s in range(5) for n in range(5))

    now = made(VERSIONS["judge"])
    assert compare({"x": (now, now)})[0].value == 0
    mixed = Records([*now[:24], made(1)[24]])
    for pair in ((mixed, now), (now, made(1))):
        with pytest.raises(ValueError, match="of another version of the code or of the protocol: run make results"):
            compare({"x": pair})


def test_a_family_is_decided_together_and_told_as_a_table():
    draw = np.random.default_rng(0)

    def made(mean):
        return Records(dict(train_seed=s, seeds=f"{n}000", value=0.5 * (mean + 0.05 * draw.standard_normal()), floor=0.5)
                       for s in range(5) for n in range(5))

    base = made(2.0)
    found = compare({"lower": (made(1.0), base), "same": (made(2.0), base), "higher": (made(3.0), base)})
    assert [e.verdict for e in found] == ["better", "equal", "worse"] and abs(found[0].value + 1) < 0.05
    table = verdicts(found)
    assert table.rows[0][0] == "lower" and table.rows[0][-1] == "better" and "5 trainings x 5 sets" in table.note
    with pytest.raises(ValueError, match="0 comparisons"):
        compare({})
    with pytest.raises(ValueError, match="20 cells of 5 trainings and 5 noises|only one of the two"):
        compare({"holes": (Records(base[:24]), base)})
