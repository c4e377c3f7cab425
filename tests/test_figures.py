"""Pictures show what the comparison found, and repeat to the byte."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from effort import examples
from hypothesis import given, strategies as st
from synthetic import few, realistic, runs_of

from siftloader import figures, report
from siftloader.comparison import difference, ends


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
