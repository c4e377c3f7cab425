"""Which candidates win: pytest tests/test_selection.py"""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from siftloader import TopK


SCORES = st.lists(
    st.one_of(st.floats(-1e3, 1e3, width=32), st.just(-torch.inf), st.integers(0, 3).map(float)),
    min_size=1,
    max_size=24,
)


@given(scores=SCORES, data=st.data())
def test_exactly_the_highest_win_in_candidate_order(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    index = TopK()(torch.tensor(scores), keep).tolist()
    assert index == sorted(set(index)) and len(index) == keep
    kept = [scores[i] for i in index]
    dropped = [score for i, score in enumerate(scores) if i not in index]
    assert not dropped or min(kept) >= max(dropped)


@given(scores=SCORES, data=st.data())
def test_the_lower_position_wins_a_tie(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    index = TopK()(torch.tensor(scores), keep).tolist()
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    assert index == sorted(expected)


@given(
    scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=24, unique=True),
    data=st.data(),
)
def test_the_order_of_the_rows_does_not_matter(scores, data):
    order = data.draw(st.permutations(range(len(scores))))
    keep = data.draw(st.integers(1, len(scores)))
    straight = {scores[i] for i in TopK()(torch.tensor(scores), keep).tolist()}
    shuffled = [scores[i] for i in order]
    assert {shuffled[i] for i in TopK()(torch.tensor(shuffled), keep).tolist()} == straight


def test_planted_winners_win():
    scores = torch.zeros(64)
    planted = torch.tensor([3, 17, 40, 63])
    scores[planted] = 1.0
    assert torch.equal(TopK()(scores, 4), planted)


def test_rows_that_must_not_win_rank_last():
    scores = torch.tensor([-torch.inf, -5.0, -torch.inf, -9.0])
    assert TopK()(scores, 2).tolist() == [1, 3]
    assert TopK()(scores, 3).tolist() == [0, 1, 3]
