"""When to sift, and the arithmetic of an epoch: pytest tests/test_schedule.py"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import assume, given, strategies as st

from siftloader.schedule import Epoch, Schedule


def simulated(schedule: Schedule, step: int, rows: int, batch: int) -> Epoch:
    """The loader in slow motion: inner batches drawn one by one, one decision a step."""
    inner = deque(min(batch, rows - start) for start in range(0, rows, batch))
    held = batches = samples = 0
    while True:
        if schedule.sifts(step):
            pool = round(batch / schedule.keep_at(step))
            while held < pool and inner:
                held += inner.popleft()
            if held < batch:
                break
            held, handed = held - min(held, pool), batch
        elif held or inner:
            handed, held = held or inner.popleft(), 0
        else:
            break
        samples, batches, step = samples + handed, batches + 1, step + 1
    return Epoch(batches, samples)


SHARES = st.sampled_from([1.0, 6 / 7, 2 / 3, 0.5, 0.25])


@given(
    warmup=st.integers(0, 12),
    total=st.none() | st.integers(1, 40),
    cooldown=st.integers(0, 15),
    step=st.integers(0, 30),
    rows=st.integers(0, 300),
    keep=SHARES | st.dictionaries(st.integers(0, 30), SHARES, min_size=1, max_size=4),
)
def test_the_arithmetic_is_the_simulation(warmup, total, cooldown, step, rows, keep):
    assume(not total or not cooldown or warmup < total - cooldown)
    schedule = Schedule(warmup, cooldown if total else 0, total, keep)
    schedule.check_batch(6)
    assert schedule.epoch(step, rows, 6) == simulated(schedule, step, rows, 6)


def test_keep_may_shrink_with_the_steps():
    schedule = Schedule(2, 1, 9, {3: 0.5, 6: 0.25})
    shares = [schedule.keep_at(step) for step in range(10)]
    assert shares == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 1, 1]
    assert [schedule.pool(step, 8) for step in (0, 3, 6)] == [8, 16, 32]
    assert schedule.ever_sifts and not Schedule(keep=1.0).ever_sifts
    with pytest.raises(ValueError, match="whole number of rows"):
        Schedule(keep={0: 0.5, 10: 0.3}).check_batch(8)


TABLE = [
    # step, rows, b: batches, samples
    (Schedule(0), 0, 128, 32, Epoch(2, 64)),
    (Schedule(0), 0, 128 + 31, 32, Epoch(2, 64)),  # 31 rows are dropped
    (Schedule(0), 0, 128 + 32, 32, Epoch(3, 96)),  # 32 are a short pool
    (Schedule(2), 0, 128, 32, Epoch(3, 96)),
    (Schedule(2), 2, 128, 32, Epoch(2, 64)),
    (Schedule(99), 0, 100, 32, Epoch(4, 100)),  # a ragged last batch, as the plain loader's
    (Schedule(0, 2, 4), 0, 192, 32, Epoch(4, 128)),  # two sifted, two plain
    (Schedule(0, 2, 3, 0.75), 0, 13, 6, Epoch(3, 11)),  # 4 rows of a half-used inner batch, then 1
    (Schedule(0, keep=1.0), 0, 128, 32, Epoch(4, 128)),
    (Schedule(0, keep={0: 0.5, 1: 0.25}), 0, 64 + 128 + 40, 32, Epoch(3, 96)),
]


@pytest.mark.parametrize(("schedule", "step", "rows", "batch", "expected"), TABLE)
def test_examples(schedule, step, rows, batch, expected):
    assert schedule.epoch(step, rows, batch) == expected


def test_the_paper_sifts_from_step_20_000():
    paper = Schedule(warmup_steps=20_000, total_steps=800_000)
    assert [paper.sifts(step) for step in (0, 19_999, 20_000, 799_999)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_fraction_cools_down_the_last_steps():
    schedule = Schedule(warmup_steps=0, cooldown_steps=0.2, total_steps=100)
    assert schedule.cooldown_begins == 80
    assert schedule.sifts(79) and not schedule.sifts(80) and not schedule.sifts(1000)


BAD = [
    ({"warmup_steps": -1}, ValueError, "not be negative"),
    ({"warmup_steps": 0.1}, TypeError, "must be an int"),
    ({"cooldown_steps": 10}, ValueError, "needs total_steps"),
    ({"cooldown_steps": 1.5, "total_steps": 10}, ValueError, r"in 0\.\.1"),
    ({"warmup_steps": 0, "cooldown_steps": -3, "total_steps": 10}, ValueError, "not be negative"),
    ({"total_steps": 0}, ValueError, "at least 1"),
    ({"total_steps": 10.5}, ValueError, "int of at least 1"),
    ({"keep": 0.0}, ValueError, "above 0 and at most 1"),
    ({"keep": True}, ValueError, "above 0 and at most 1"),
    ({"keep": {}}, ValueError, "at least one step"),
    ({"keep": {0: 1.5}}, ValueError, "above 0 and at most 1"),
    ({"keep": {-1: 0.5}}, ValueError, "steps of 0 or more"),
    ({"keep": {0.5: 0.5}}, ValueError, "steps of 0 or more"),
    (
        {"warmup_steps": 8, "cooldown_steps": 2, "total_steps": 10},
        ValueError,
        "nothing would ever",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_wrong_options_fail_at_construction(options, error, text):
    with pytest.raises(error, match=text):
        Schedule(**options)
