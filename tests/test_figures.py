"""Pictures show what the comparison found, and repeat to the byte."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from effort import examples
from hypothesis import given, strategies as st
from synthetic import few, realistic, runs_of

from siftloader import figures, report
from siftloader.comparison import difference, ends
from siftloader.results import Evaluation, Results, Run


def test_no_more_curves_have_names_than_can_be_told_apart():
    results = few(*(run for k in range(12) for run in runs_of(f"arm {k}", k, 1, 1, "loss", 1)))
    colors = figures.colors([line.arm for line in report._lines(results, "gpt", "plain")], "plain")
    assert len(colors) == len(set(colors.values())) == figures.EMPHASISED
    assert next(iter(colors)) == "plain" and "arm 11" not in colors


def test_a_band_is_the_interval_of_the_paired_difference():
    results = realistic(3)
    found = ends(results.runs)
    curve = figures._curve(
        "loss", found["loss"], found["plain"], lambda one: one.samples, lambda one: one.loss
    )
    told = difference(results, "gpt", "loss", "plain")
    assert curve.half[-1] == pytest.approx(told.half_width)
    assert curve.y[-1] == pytest.approx(np.mean([run.end.loss for run in found["loss"].values()]))


def curve_of(results: Results, arm: str, along="samples") -> figures._Curve:
    found = ends(results.runs)
    return figures._curve(
        arm,
        found[arm],
        found["plain"],
        lambda one: getattr(one, along),
        lambda one: one.loss,
    )


def test_an_arm_of_fewer_seeds_is_drawn_where_it_stands_to_the_control():
    """Seeds differ by more than arms: the mean of two is not beside the mean of five."""
    every = realistic(5)
    some = Results(tuple(run for run in every.runs if run.arm != "loss" or run.seed in (1, 3, 4)))
    plain = curve_of(every, "plain")
    for results in (every, some):
        told = difference(results, "gpt", "loss", "plain")
        curve = curve_of(results, "loss")
        assert curve.y[-1] - plain.y[-1] == pytest.approx(told.mean, abs=1e-9)
        assert curve.half[-1] == pytest.approx(told.half_width)
    two = Results(tuple(run for run in some.runs if run.arm != "loss" or run.seed != 4))
    assert curve_of(two, "loss").half is None, "12.7 deviations would hide all other arms"
    only = Results(tuple(run for run in some.runs if run.arm != "plain" or run.seed == 0))
    assert curve_of(only, "loss").half is None, "no seed in common"


def test_there_is_no_band_where_the_control_has_no_line():
    results = realistic(3)
    costly, plain = curve_of(results, "loss", "seconds"), curve_of(results, "plain", "seconds")
    beyond = costly.x > plain.x[-1]
    assert beyond.sum() == 3 and (costly.x < plain.x[0]).sum() == 0
    assert (np.isnan(costly.half) == beyond).all()
    assert np.isfinite(curve_of(results, "loss").half).all()


def test_dots_of_budgets_stand_on_the_line_of_the_control():
    """They end on as much text as the curves do, not on what the table is of; and by the same seeds."""

    def off(run: Run) -> Run:
        *before, end = run.evaluations
        return replace(run, evaluations=(*before, replace(end, loss=end.loss + 0.01)))

    every = [off(run) for run in realistic(4).runs if run.arm != "plain@2" or run.seed < 2]
    found = ends(every)
    rungs = figures._rungs(
        {arm: found[arm] for arm in ("plain@0.5", "plain", "plain@2")},
        found["plain"],
        lambda one: one.seconds,
        lambda one: one.loss,
    )
    plain = curve_of(Results(tuple(every)), "plain", "seconds")
    assert rungs.shape == (2, 3)
    assert rungs[:, 1] == pytest.approx([plain.x[-1], plain.y[-1]])
    apart = [found["plain@2"][seed].end.loss - found["plain"][seed].end.loss for seed in (0, 1)]
    assert rungs[1, 2] - rungs[1, 1] == pytest.approx(np.mean(apart))


def test_all_budgets_are_in_the_picture_of_time():
    picture = figures.curves(realistic(2), "gpt", "plain", ["plain", "loss"], "x", time=True)
    ticks = {float(one) for one in re.findall(r">(\d+)</text>", picture)}
    assert max(ticks) >= 25, "minutes: plain takes 13, twice of it 27"


def test_audits_are_drawn_where_they_were_made_and_only_of_runs_that_have_them():
    results = few()
    run = next(one for one in results.runs if one.arm == "loss")
    audited = figures._as_audited(run)
    assert [one.samples for one in audited.evaluations[:2]] == [32 * 100, 32 * 200], "by step"
    assert audited.evaluations[0].loss == run.audits[0]["population_loss"]
    alone = [replace(one, audits=()) if one is not run else one for one in results.runs]
    given = Results(tuple(alone)), "gpt", "plain", ["plain", "loss"], "x"
    for picture in (figures.population(*given), figures.audits(*given)):
        assert "loss</text>" in picture and "plain</text>" not in picture
    nobody = Results(tuple(replace(one, audits=()) for one in results.runs)), *given[1:]
    assert figures.population(*nobody) == figures.audits(*nobody) == ""


def test_what_matplotlib_is_set_to_changes_nothing():
    import matplotlib

    given = (realistic(2), "gpt", "plain", ["plain", "loss"], "x", True)
    before = figures.curves(*given)
    with matplotlib.rc_context({"font.size": 30, "lines.linestyle": ":", "axes.grid.axis": "x"}):
        assert figures.curves(*given) == before
        assert matplotlib.rcParams["font.size"] == 30, "and is as it was"


@pytest.mark.parametrize("time", [False, True])
def test_runs_of_no_length_are_drawn_without_a_warning(time):
    first = [
        replace(run, evaluations=(Evaluation(0, 0, 0.0, 9.0, 0.0, True),)) for run in few().runs
    ]
    for runs in (first, [replace(run, arm="plain") for run in first[:1]]):
        picture = figures.curves(Results(tuple(runs)), "gpt", "plain", ["plain"], "x", time)
        assert "plain</text>" in picture


@examples(60)
@given(
    places=st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted), gap=st.floats(0.01, 0.12)
)
def test_names_stand_apart_in_their_order_and_inside(places, gap):
    found = figures._apart(places, gap)
    assert len(found) == len(places) and found[-1] <= 1
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(found))
    free = all(b - a >= gap for a, b in pairwise(places))
    assert not free or found == pytest.approx(places)
