"""Paired differences, their intervals, and what they are worth: known values, laws, and simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from effort import examples
from hypothesis import assume, given, strategies as st

from siftloader.comparison import (
    Difference,
    Name,
    corrected,
    difference,
    differences,
    ends,
    equivalent,
    noise,
    worth,
)
from siftloader.intervals import interval, t_quantile
from siftloader.results import Evaluation, Results, Run


def run(
    arm: str,
    seed: int,
    loss: float,
    *,
    seconds: float = 100.0,
    accuracy: float = 0.5,
    final: bool = True,
) -> Run:
    end = Evaluation(10, 80, seconds, loss, accuracy, final)
    return Run("e", arm, seed, 10, (end,))


def results(losses: dict[str, list[float]]) -> Results:
    return Results(
        tuple(
            run(arm, k, x, seconds=100 * Name.of(arm).budget)
            for arm, ends in losses.items()
            for k, x in enumerate(ends)
        )
    )


def test_pairing_finds_what_seeds_would_hide():
    generator = np.random.default_rng(0)
    seed = generator.normal(0, 0.16, 6)
    plain = 3 + seed + generator.normal(0, 0.005, 6)
    sifted = 3 - 0.03 + seed + generator.normal(0, 0.005, 6)
    found = difference(results({"plain": [*plain], "loss": [*sifted]}), "e", "loss", "plain")
    assert found.verdict == "better" and found.half_width < 0.012
    apart = math.hypot(interval(plain)[1], interval(sifted)[1])
    assert apart > 5 * found.half_width, "unpaired, nothing could be said"


# --- one difference --------------------------------------------------------------------------------


def test_a_difference_is_what_paper_and_pencil_give():
    found = difference(
        results({"plain": [3.0, 3.1, 3.2, 3.3], "loss": [2.9, 3.1, 3.0, 3.2]}),
        "e",
        "loss",
        "plain",
    )
    assert found.seeds == (0, 1, 2, 3)
    assert found.values == pytest.approx([-0.1, 0.0, -0.2, -0.1])
    assert found.mean == pytest.approx(-0.1)
    assert found.half_width == pytest.approx(3.182 * 0.0816497 / 2, abs=1e-4)
    assert found.p == pytest.approx(0.0917, abs=1e-3) and found.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("values", "verdict", "accuracy"),
    [
        ([-0.02, -0.03, -0.025], "better", "worse"),
        ([0.02, 0.03, 0.025], "worse", "better"),
        ([0.001, -0.001, 0.0], "level", "level"),
        ([0.003, -0.001, 0.0], "level", "inconclusive"),
        ([-0.0015, -0.0016, -0.0017], "better, by little", "worse, by little"),
        ([0.0015, 0.0016, 0.0017], "worse, by little", "better, by little"),
        ([-0.0065, -0.0066, -0.0067], "better, by little", "worse"),
        ([-0.0095, -0.0096, -0.0107], "better", "worse"),
        ([0.02, -0.03, 0.0], "inconclusive", "inconclusive"),
        ([-0.5], "one seed", "one seed"),
        ([], "no seed", "no seed"),
        ([0.0, 0.0], "level", "level"),
        ([-0.25, -0.25], "better", "worse"),
        ([0.1, math.nan, 0.1], "diverged", "not measured"),
        ([0.1, math.inf, 0.1], "diverged", "not measured"),
    ],
)
def test_verdicts(values, verdict, accuracy):
    runs = [run("plain", 0, 0.0, accuracy=0.0)]
    for seed, value in enumerate(values):
        runs += [run("plain", seed, 0.0, accuracy=0.0), run("loss", seed, value, accuracy=value)]
    found = difference(Results(tuple(runs)), "e", "loss", "plain")
    assert found.verdict == verdict
    assert (found.half_width is None) == (len(values) < 2 or not np.isfinite(values).all())
    assert (found.p is None) == (found.half_width is None)
    found = difference(Results(tuple(runs)), "e", "loss", "plain", measure="accuracy")
    assert found.verdict == accuracy


def test_only_seeds_that_both_finished_count():
    runs = [run("plain", seed, 3.0) for seed in range(4)]
    runs += [run("loss", seed, 2.0, final=seed != 2) for seed in range(1, 7)]
    found = Results(tuple(runs))
    assert difference(found, "e", "loss", "plain").seeds == (1, 3)
    assert difference(found, "e", "loss", "plain", seeds=range(2)).seeds == (1,)
    assert difference(found, "e", "gone", "plain").verdict == "no seed"
    assert difference(found, "other", "loss", "plain").verdict == "no seed"


def test_a_control_that_diverged_is_not_held_against_the_arm():
    found = difference(
        results({"plain": [3.0, math.inf], "loss": [3.0, 3.0]}), "e", "loss", "plain"
    )
    assert found.verdict == "control diverged"
    both = results({"plain": [3.0, math.nan], "loss": [3.0, math.inf]})
    assert difference(both, "e", "loss", "plain").verdict == "control diverged"
    wild = results({"plain": [3.0, math.inf, 3.0], "loss": [3.0, 3.0, math.inf]})
    found = difference(wild, "e", "loss", "plain")  # inf and -inf have no mean, and warn of it
    assert math.isnan(found.mean) and found.half_width is None


# --- laws ------------------------------------------------------------------------------------------

ENDS = st.floats(-9, 9).map(lambda value: round(value, 3))


@st.composite
def tables(draw) -> dict[str, list[float]]:
    seeds = draw(st.integers(2, 6))
    arms = ["plain", *draw(st.sets(st.sampled_from("abcdef"), min_size=1))]
    return {arm: draw(st.lists(ENDS, min_size=seeds, max_size=seeds)) for arm in arms}


def same(one: dict[str, Difference], other: dict[str, Difference], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for arm in one:
        assert one[arm].mean == pytest.approx(other[arm].mean, abs=tolerance)
        assert one[arm].half_width == pytest.approx(other[arm].half_width, abs=tolerance)


@examples(50)
@given(table=tables())
def test_with_all_seeds_the_mean_difference_is_the_difference_of_means(table):
    for arm, found in differences(results(table), "e", "plain").items():
        assert found.mean == pytest.approx(np.mean(table[arm]) - np.mean(table["plain"]), abs=1e-9)
        # ... and the interval is that of numpy's sample variance
        values = np.subtract(table[arm], table["plain"])
        half = t_quantile(len(values) - 1) * math.sqrt(values.var(ddof=1) / len(values))
        assert found.half_width == pytest.approx(half, abs=1e-9)


@examples(50)
@given(table=tables(), order=st.randoms(use_true_random=False))
def test_neither_the_order_of_seeds_nor_of_arms_matters(table, order: random.Random):
    seeds = [*range(len(table["plain"]))]
    order.shuffle(seeds)
    names = [*table]
    order.shuffle(names)
    shuffled = {arm: [table[arm][seed] for seed in seeds] for arm in names}
    same(
        differences(results(table), "e", "plain"),
        differences(results(shuffled), "e", "plain"),
        1e-9,
    )


@examples(50)
@given(table=tables(), data=st.data())
def test_what_all_arms_of_a_seed_share_cancels(table, data):
    count = len(table["plain"])
    shift = data.draw(st.lists(st.floats(-100, 100), min_size=count, max_size=count))
    shifted = {
        arm: [x + s for x, s in zip(ends, shift, strict=True)] for arm, ends in table.items()
    }
    same(
        differences(results(table), "e", "plain"),
        differences(results(shifted), "e", "plain"),
        1e-9,
    )


@examples(50)
@given(table=tables())
def test_arm_and_control_in_exchanged_places_change_the_sign(table):
    for arm in table.keys() - {"plain"}:
        one = difference(results(table), "e", arm, "plain")
        other = difference(results(table), "e", "plain", arm)
        assert (one.mean, one.half_width) == (-other.mean, other.half_width)
        opposite = {"better": "worse", "worse": "better"}
        word, *little = one.verdict.split(", ")
        assert ", ".join([opposite.get(word, word), *little]) == other.verdict


# --- many arms -------------------------------------------------------------------------------------


def test_holm_is_the_textbook_example():
    def tested(arm: str, p: float | None, verdict: str = "better") -> Difference:
        return Difference(arm, "plain", "loss", (0, 1), (0.0, 0.0), 0.0, 1.0, p, verdict)

    arms = {"a": 0.015, "b": 0.04, "c": 0.03, "d": 0.005}  # 4 x 0.005, 3 x 0.015, then 2 x 0.03
    found = corrected([tested(arm, p) for arm, p in arms.items()])
    assert {one.arm: one.holds for one in found} == {"a": True, "b": False, "c": False, "d": True}
    assert [one.arm for one in found] == [*arms], "as they came"
    alone = corrected(
        [tested("b", 0.04), tested("x", None, "one seed"), tested("y", 0.9, "level")]
    )
    assert [one.holds for one in alone] == [False, True, True]
    little = corrected([tested(arm, p, "worse, by little") for arm, p in arms.items()])
    assert [one.holds for one in little] == [True, False, False, True]


def test_of_noise_alone_holm_finds_something_in_five_tries_of_a_hundred_at_most():
    generator = np.random.default_rng(5)
    naive = holm = 0
    tries = 150
    for _ in range(tries):
        table = {f"arm {k}": [*generator.normal(3, 0.1, 5)] for k in range(8)}
        found = differences(results({"plain": [3.0] * 5, **table}), "e", "plain").values()
        tells = [one for one in found if one.verdict in ("better", "worse")]
        naive += bool(tells)
        holm += any(one.holds for one in tells)
    assert naive > 0.2 * tries
    assert holm < 0.1 * tries, f"{holm} of {tries}"


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("plain", Name("plain")),
        ("plain@0.71", Name("plain", 0.71)),
        ("plain@2#3", Name("plain", 2.0, 3)),
        ("plain#0", Name("plain", 1.0, 0)),
        ("loss, equal time", Name("loss, equal time")),
        ("a@b", Name("a@b")),
        ("a@0", Name("a@0")),
        ("#1", Name("#1")),
        ("a#1@2", Name("a#1", 2.0)),
    ],
)
def test_names_taken_apart(arm, name):
    assert Name.of(arm) == name


def test_budgets_and_repeats_of_the_control_are_no_arms():
    found = results(
        {
            "plain": [3.0, 3.1],
            "plain@0.5": [3.5, 3.6],
            "plain#1": [3.0, 3.2],
            "loss": [2.9, 3.0],
            "loss@0.5": [3.2, 3.3],
            "loss@2": [2.0, 2.0],
        }
    )
    compared = differences(found, "e", "plain")
    assert {arm: one.control for arm, one in compared.items()} == {
        "loss": "plain",
        "loss@0.5": "plain@0.5",
    }
    assert compared["loss@0.5"].mean == pytest.approx(-0.3)


def test_where_only_repeats_are_there_the_first_stands_for_the_arm():
    runs = [run("plain#2", 0, 2.0), run("plain#10", 0, 10.0), run("plain#1", 0, 1.0, final=False)]
    assert ends(runs)["plain"][0].arm == "plain#2"
    runs.append(run("plain", 0, 0.0))
    for order in (runs, runs[::-1]):
        assert ends(order)["plain"][0].arm == "plain"


def test_noise_is_the_pooled_deviation_of_repeats():
    found = results({"plain": [3.0, 4.0], "plain#1": [3.2, 4.0], "plain#2": [3.1], "loss": [1, 2]})
    told = noise(found, "e")
    # seed 0: 3.0, 3.2, 3.1; seed 1: 4.0, 4.0
    assert told.deviation == pytest.approx(math.sqrt(0.02 / 3))
    assert (told.runs, told.groups) == (5, 2)
    assert noise(results({"plain": [3.0], "loss": [2.0]}), "e") is None
    wild = results({"plain": [3.0, 4.0], "plain#1": [3.2, math.nan], "plain#2": [3.1, math.inf]})
    assert noise(wild, "e").deviation == pytest.approx(0.1), "of those that have an end"
    assert noise(results({"plain": [3.0], "plain#1": [math.nan]}), "e") is None


# --- worth -----------------------------------------------------------------------------------------

LADDER = {0.5: 3.4, 1.0: 3.2, 2.0: 3.0}


@pytest.mark.parametrize(
    ("loss", "budget", "bound"),
    [
        (3.2, 1.0, "="),
        (3.1, math.sqrt(2), "="),
        (3.35, 0.5 * 2**0.25, "="),
        (3.4, 0.5, "="),
        (3.0, 2.0, "="),
        (2.99, 2.0, ">"),
        (3.41, 0.5, "<"),
        (math.inf, 0.5, "<"),
        (-math.inf, 2.0, ">"),
    ],
)
def test_the_budget_that_buys_a_loss(loss, budget, bound):
    found, told = equivalent(LADDER, loss)
    assert found == pytest.approx(budget) and told == bound


def test_without_a_ladder_nothing_is_said():
    for ladder in ({}, {1.0: 3.0}, {1.0: 3.0, 2.0: math.nan}):
        assert equivalent(ladder, 3.0)[1] == "?"
    assert equivalent(LADDER, math.nan)[1] == "?"


@examples(80)
@given(
    budgets=st.sets(st.sampled_from([0.25, 0.5, 0.71, 1.0, 1.41, 2.0]), min_size=2),
    losses=st.lists(ENDS, min_size=6, max_size=6),
    loss=ENDS,
    more=st.floats(0, 2),
)
def test_a_lower_loss_is_never_worth_less(budgets, losses, loss, more):
    ladder = dict(zip(sorted(budgets), losses, strict=False))
    assume(len(set(ladder.values())) > 1)
    (one, _), (other, _) = equivalent(ladder, loss), equivalent(ladder, loss - more)
    assert other >= one * (1 - 1e-12)
    assert min(ladder) <= one <= max(ladder) * (1 + 1e-12)


@examples(30)
@given(exponent=st.floats(-0.5, 1), cost=st.floats(0.5, 2))
def test_a_true_speed_up_is_found(exponent, cost):
    """The arm is plain training at another budget, charged something else."""
    runs = []
    for seed in range(3):
        for budget in (0.5, 0.71, 1, 1.41, 2):
            name = "plain" if budget == 1 else f"plain@{budget}"
            loss = 3 + seed - 0.1 * math.log(budget)
            runs.append(run(name, seed, loss, seconds=100 * budget))
        runs.append(run("loss", seed, 3 + seed - 0.1 * exponent * math.log(2), seconds=100 * cost))
    found = worth(Results(tuple(runs)), "e", "loss", "plain")
    assert found.seeds == (0, 1, 2)
    assert found.equivalents == pytest.approx([2**exponent] * 3, rel=1e-6)
    assert found.factor == pytest.approx(2**exponent / cost, rel=1e-6)


def test_the_papers_claim_is_57_hours_over_43():
    runs = [run("plain", 0, 3.0, seconds=57.0), run("plain@0.5", 0, 3.3, seconds=28.5)]
    runs.append(run("loss", 0, 3.0, seconds=43.0))
    found = worth(Results(tuple(runs)), "e", "loss", "plain")
    assert (found.factor, found.bound) == (pytest.approx(57 / 43), "=")


def test_time_is_what_was_charged_and_not_what_a_name_says():
    """The rungs took less and more than their names say, and each its own by seed."""
    runs, factors = [], []
    for seed, (half, whole, arm) in enumerate([(60.0, 100.0, 80.0), (44.0, 110.0, 90.0)]):
        runs += [run("plain@0.5", seed, 3.4, seconds=half), run("plain", seed, 3.2, seconds=whole)]
        runs.append(run("loss", seed, 3.3, seconds=arm))
        factors.append(math.sqrt(half * whole) / arm)  # in the middle, in log time
    found = worth(Results(tuple(runs)), "e", "loss", "plain")
    assert found.factors == pytest.approx(factors)
    assert found.equivalents == pytest.approx([math.sqrt(0.6), math.sqrt(0.4)])
    assert found.factor == pytest.approx(math.sqrt(factors[0] * factors[1]))


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf])
def test_of_time_that_is_none_nothing_is_told(seconds):
    ladder = [run("plain", 0, 3.2), run("plain@0.5", 0, 3.4, seconds=50.0)]
    arm = run("loss", 0, 3.3, seconds=seconds)
    assert worth(Results((*ladder, arm)), "e", "loss", "plain").bound == "?"
    ladder[1] = run("plain@0.5", 0, 3.4, seconds=seconds)
    assert worth(Results((*ladder, run("loss", 0, 3.3))), "e", "loss", "plain").bound == "?"


def test_a_ladder_on_which_more_time_is_worse_gives_the_least_time():
    found, told = equivalent({1.0: 3.3, 2.0: 3.4, 4.0: 3.0}, 3.35)
    assert (found, told) == (1.0, "<")
    found, told = equivalent({1.0: 3.3, 2.0: 3.1, 4.0: 3.2}, 3.2)
    assert (found, told) == (pytest.approx(math.sqrt(2)), "=")
    assert equivalent({1.0: 3.3, 2.0: 3.1, 4.0: 3.2}, 3.0) == (4.0, ">")


@pytest.mark.parametrize(
    ("losses", "bound"),
    [
        ([3.1, 3.1], "="),
        ([3.1, 2.0], ">"),
        ([2.0, 2.0], ">"),
        ([3.1, 9.0], "<"),
        ([2.0, 9.0], "?"),
    ],
)
def test_out_of_the_ladder_only_a_bound_is_told(losses, bound):
    ladder = {"plain@0.5": [3.4, 3.4], "plain": [3.2, 3.2], "plain@2": [3.0, 3.0]}
    assert worth(results({**ladder, "loss": losses}), "e", "loss", "plain").bound == bound


def test_without_other_budgets_there_is_no_worth():
    found = worth(results({"plain": [3.0], "loss": [2.0]}), "e", "loss", "plain")
    assert found.seeds == () and found.bound == "?" and math.isnan(found.factor)
