"""Gates: when they open and close, and what a loader makes of it."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from models import bert, candidates
from torch.utils.data import DataLoader, Dataset

from siftloader import SiftingDataLoader
from siftloader.gate import Threshold, settings_of


def audits(*values):
    return [{"step": 10 * (n + 1), "rho": value} for n, value in enumerate(values)]


def states(gate, *values):
    """What the gate says after each audit, one after the other."""
    is_open, said = gate((), True), []
    for n in range(1, len(values) + 1):
        is_open = gate(audits(*values)[:n], is_open)
        said.append(is_open)
    return said


def test_it_opens_at_one_value_and_closes_at_a_lower_one():
    gate = Threshold("rho", opens=1.2, closes=1.1)
    said = states(gate, 1.15, 1.19, 1.2, 1.15, 1.1, 1.09, 1.15, 1.3)
    assert said == [False, False, True, True, True, False, False, True]


def test_it_begins_closed_or_open():
    assert not Threshold("rho", 1.2, 1.1)((), True)
    assert Threshold("rho", 1.2, 1.1, begins_open=True)((), False)


def test_it_looks_at_the_mean_of_the_last_audits():
    gate = Threshold("rho", opens=2.0, closes=1.0, over=2)
    assert states(gate, 9.0, 1.0, 1.0, 0.5) == [False, True, True, False]
    # One alone is no mean of two.
    assert Threshold("rho", 2.0, 1.0, over=2)(audits(9.0), True)


def test_audits_without_the_figure_change_nothing():
    gate = Threshold("rho", opens=2.0, closes=1.0)
    assert states(gate, 3.0, None, None, 0.5) == [True, True, True, False]
    assert gate([{"step": 1}], True) and not gate([{"step": 1}], False)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"opens": 1.0, "closes": 1.1}, ValueError, "closes must not lie above opens"),
        ({"opens": "1", "closes": 1.1}, TypeError, "opens must be a number"),
        ({"opens": 1.0, "closes": True}, TypeError, "closes must be a number"),
        ({"opens": float("inf"), "closes": 1.1}, ValueError, "opens must be finite"),
        (
            {"opens": 2.0, "closes": 1.1, "over": 0},
            ValueError,
            "over must be an int of at least 1",
        ),
    ],
)
def test_a_threshold_checks_itself(options, error, text):
    with pytest.raises(error, match=text):
        Threshold("rho", **options)


class Rows(Dataset):
    def __init__(self, count: int = 128) -> None:
        torch.manual_seed(0)
        self.batch = candidates("bert", samples=count)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int):
        return {name: value[index] for name, value in self.batch.items()}


def make(gate, **options):
    options = {"warmup_steps": 0, "audit_every": 4, "model": bert()} | options
    return SiftingDataLoader(Rows(), 4, gate=gate, **options)


def shut(audits, is_open):
    return False


def test_behind_a_closed_gate_it_is_the_plain_loader():
    loader = make(shut, shuffle=True)
    torch.manual_seed(3)
    found = [batch["input_ids"] for batch in loader]
    inner = DataLoader(Rows(), 4, shuffle=True)
    torch.manual_seed(3)
    plain = [batch["input_ids"] for batch in inner]
    assert all(map(torch.equal, found, plain)) and len(found) == len(plain) == len(loader)
    assert loader.stats["candidates"] == 0 and not loader.stats["sifting"]
    assert loader.audits, "or it would never open again"


@pytest.mark.parametrize("overlap", [False, True])
def test_every_row_is_drawn_once_however_often_a_gate_opens_and_closes(overlap):
    def gate(audits, is_open):
        return len(audits) % 2 == 1

    drawn = []
    loader = make(
        gate,
        overlap=overlap,
        on_select=lambda ids, scores, kept: drawn.append(len(ids)),
    )
    for _ in range(3):
        before = loader.stats
        for _ in loader:
            pass
        after = loader.stats
        scored = after["candidates"] - before["candidates"]
        kept = after["kept"] - before["kept"]
        passed = after["samples"] - before["samples"] - kept
        dropped = after["tail_dropped"] - before["tail_dropped"]
        assert scored + passed + dropped == 128 and kept and passed
    assert sum(drawn) == loader.stats["candidates"]


def test_what_a_gate_says_is_kept_as_true_or_false():
    loader = make(lambda audits, is_open: np.float64(len(audits)) > 0, audit_every=2)
    for _ in zip(range(6), loader):  # noqa: B905
        pass
    assert json.loads(json.dumps(loader.state_dict()))["gate"] is True


def test_ranks_know_a_gate_by_what_it_is_not_by_where_it_lies():
    assert settings_of(shut) == "shut" and settings_of(functools.partial(shut)) == "partial"
    one, other = Threshold("rho", 1.2, 1.1), Threshold("rho", 1.2, 1.0)
    assert settings_of(one) == settings_of(Threshold("rho", 1.2, 1.1)) != settings_of(other)
    assert settings_of(None) == "None"


def test_its_length_is_that_of_the_gate_as_it_stands():
    loader = make(Threshold("rho", opens=0.0, closes=0.0))
    assert len(loader) == 32, "closed: all of 128 rows"
    for _ in zip(range(10), loader):  # noqa: B905
        pass
    assert loader._open
    assert loader.total_batches(1) == 16
    loader.set_epoch(1)
    assert len(loader) == 16


def test_a_restart_stands_where_the_gate_stood():
    gate = Threshold("rho", opens=0.0, closes=0.0)
    model = bert()

    def ids(batch):
        return batch["input_ids"].sum().item()

    whole = make(gate, model=model)
    expected = [ids(batch) for batch in whole]
    for stop in (1, 4, 6, 8, 9, 12):
        before = make(gate, model=model)
        found = [ids(batch) for _, batch in zip(range(stop), before)]  # noqa: B905
        state = json.loads(json.dumps(before.state_dict()))
        after = make(gate, model=model)
        after.load_state_dict(state)
        assert after._open == before._open
        assert found + [ids(batch) for batch in after] == expected, stop


def test_a_state_that_was_saved_without_a_gate_is_judged_by_its_audits():
    model = bert()
    before = make(None, model=model)
    for _ in zip(range(15), before):  # noqa: B905
        pass
    state = before.state_dict()
    first, second = (each["rho"] for each in state["audits"]["history"][:2])
    assert state["gate"] is None and first != second
    # Opened by the higher of them, which stays above `closes`; or by none.
    for opens, expected in ((max(first, second), True), (1e9, False)):
        after = make(Threshold("rho", opens=opens, closes=0.0), model=model)
        after.load_state_dict(state)
        assert after._open is expected


@pytest.mark.parametrize(
    ("gate", "options", "error", "text"),
    [
        (Threshold, {}, TypeError, r"Threshold\(\.\.\.\)"),
        ("always", {}, ValueError, 'gate must be "trial"'),
        (3, {}, TypeError, "gate must be a function of audits"),
        (shut, {"audit_every": 0}, ValueError, "audit_every=0 makes none"),
    ],
)
def test_what_is_no_gate_is_refused(gate, options, error, text):
    with pytest.raises(error, match=text):
        make(gate, **options)


def test_with_a_gate_what_cannot_be_audited_fails_at_once():
    calls = []

    def score(early, batch):
        calls.append(1)
        if len(batch["input_ids"]) == 2 and len(calls) > 2:
            raise RuntimeError("no room")
        return batch["input_ids"][:, 0].float()

    loader = make(Threshold("rho", 1.0, 1.0, begins_open=True), score_fn=score)
    with pytest.raises(RuntimeError, match="no room"):
        next(iter(loader))
