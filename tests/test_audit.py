"""Audits: what they say, when, what they cost, and that training is the same with and without them."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from models import LAYERS, bert, candidates, classifier, gpt2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from siftloader import (
    Entropy,
    First,
    Loss,
    Predicted,
    Random,
    RankSample,
    Rarity,
    Sifter,
    SiftingDataLoader,
    StateError,
)
from siftloader.audit import FIGURES, Audits, Pace, Witness, _audit, _Look
from siftloader.fidelity import SUMS
from siftloader.stats import Stopwatch
from siftloader.targets import LATER


class Texts(Dataset):
    """Candidates of a family, one by one."""

    def __init__(self, family: str = "bert", count: int = 256, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.batch = candidates(family, samples=count)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int):
        return {name: value[index] for name, value in self.batch.items()}


class Small(nn.Module):
    """What predicts scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.out = nn.Embedding(97, 4), nn.Linear(4, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids).mean(1))


def make(model, *args, **options) -> SiftingDataLoader:
    options = {"warmup_steps": 0, "audit_every": 3} | options
    return SiftingDataLoader(Texts(), 4, *args, model=model, **options)


def train(loader, model, steps: int) -> list[list[int]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    batches = iter(loader)
    for _ in range(steps):
        batch = next(batches)
        seen.append(batch["input_ids"].sum(1).tolist())
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


# ---- what they say


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
def test_an_audit_says_what_scoring_by_hand_says(criterion):
    model = bert()
    loader = make(model, exit_layer=1, criterion=criterion)
    batches = iter(loader)
    for _ in range(3):
        next(batches)  # of a model that stands still, so that by hand is the same
    pools = []
    loader._on_select = lambda ids, scores, kept: pools.append((ids, kept))
    next(batches)
    found = loader.stats
    assert found["audit_step"] == 3 and loader.audits[-1]["sifting"]
    ids, kept = pools[0]
    pool = {name: value[24:32] for name, value in Texts().batch.items()}
    assert ids.tolist() == [*range(24, 32)]
    kind = {"loss": Loss, "entropy": Entropy}[criterion]
    early = Sifter(model, exit_layer=1, criterion=kind()).score(pool)
    full = Sifter(model, exit_layer=LAYERS, criterion=kind()).score(pool)
    losses = Sifter(model, exit_layer=LAYERS, criterion=Loss()).score(pool)
    early_losses = Sifter(model, exit_layer=1, criterion=Loss()).score(pool)
    top = early.argsort(descending=True, stable=True)[:4]
    assert kept.nonzero().flatten().tolist() == sorted(top.tolist())
    best = full.argsort(descending=True, stable=True)[:4]
    assert found["rho"] == pytest.approx((losses[top].mean() / losses.mean()).item(), rel=1e-5)
    assert found["population_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["overlap"] == len({*top.tolist()} & {*best.tolist()}) / 4
    ratio = (early_losses / losses).log().double()
    assert found["sigma"] == pytest.approx(ratio.std().item(), rel=1e-4)
    assert found["sigma"] > 0.01, "the depths must disagree, or this test sees nothing"


def test_the_whole_model_is_asked_at_all_positions_in_the_precision_of_the_loop():
    model = bert()
    low = {"positions": First(2), "autocast": torch.bfloat16}
    loader = make(model, audit_every=1, exit_layer=1, **low)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    pool = {name: value[16:24] for name, value in Texts().batch.items()}
    losses = Sifter(model, exit_layer="full", autocast=torch.bfloat16).score(pool)
    assert loader.stats["population_loss"] == losses.double().mean().item()


def test_labels_are_read_as_the_loader_learned_to():
    loader = make(bert(), audit_every=1)
    batches = iter(loader)
    next(batches)
    loader._scorer.reading_state = [False, 7, False]  # as a state may tell
    for _ in range(2):
        next(batches)
    assert [each.reading_state for each in loader._audits._pair] == [[False, 7, False]] * 2


def test_the_exit_that_is_the_whole_model_has_no_noise():
    loader = make(bert(), exit_layer="full")
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    found = loader.stats
    assert found["overlap"] == found["agreement"] == 1.0
    assert found["sigma"] == pytest.approx(0, abs=1e-6)
    assert found["rho"] == found["rho_full"] > 1


def test_scores_that_do_not_look_at_the_model_are_held_against_its_losses():
    loader = make(bert(), criterion=Random(seed=1), audit_every=1)
    batches = iter(loader)
    for _ in range(30):
        next(batches)
    overlaps = [each["overlap"] for each in loader.audits]
    assert len(overlaps) == 29 and 0.35 < np.mean(overlaps) < 0.65
    assert 0.9 < np.mean([each["rho"] for each in loader.audits]) < 1.1


def test_what_a_small_model_predicts_is_held_against_what_it_stands_for():
    model = bert()
    loader = make(model, criterion=Predicted(Small(), of=Entropy()), audit_every=1, exit_layer=1)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    pool = {name: value[16:24] for name, value in Texts().batch.items()}
    full = Sifter(model, exit_layer="full", criterion=Entropy()).score(pool)
    own = loader._sifter.pool(pool)
    early, whole = (each.score(own, pool["labels"]) for each in loader._audits._pair)
    assert torch.equal(whole.values, full) and not torch.equal(early.values, full)


def test_a_batch_that_passes_through_is_audited_as_if_it_were_a_pool():
    model = gpt2()
    loader = SiftingDataLoader(Texts("gpt2"), 8, model=model, warmup_steps=100, audit_every=2)
    plain = iter(DataLoader(Texts("gpt2"), 8))
    batches = iter(loader)
    for _ in range(3):
        batch = next(plain)
        assert torch.equal(next(batches)["input_ids"], batch["input_ids"])
    audit = loader.audits[-1]
    losses = Sifter(model, exit_layer="full").score(batch)
    top = Sifter(model, exit_layer=1).score(batch).argsort(descending=True, stable=True)[:4]
    assert not audit["sifting"] and audit["rows"] == 8
    assert audit["rho"] == pytest.approx((losses[top].mean() / losses.mean()).item(), rel=1e-5)


def test_before_the_first_audit_the_figures_are_none():
    loader = make(bert())
    next(iter(loader))
    found = loader.stats
    assert loader.audits == [] and found["audit_step"] is None
    assert all(found[name] is None for name in FIGURES)


def test_a_function_of_the_loop_is_audited_by_its_own_losses():
    def score(early, batch):
        return early(batch["x"]).square().mean(-1)

    class Rows(Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int):
            row = torch.randn(8, generator=torch.Generator().manual_seed(index))
            return {"x": row, "labels": torch.tensor(index % 10)}

    model = classifier()
    loader = SiftingDataLoader(
        Rows(), 4, model=model, score_fn=score, warmup_steps=0, audit_every=2
    )
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    found = loader.stats
    assert found["population_loss"] > 0 and found["overlap"] is not None


@pytest.mark.parametrize("options", [{"selection": RankSample()}, {"pool": "split"}])
def test_all_ways_to_select_are_audited(options):
    loader = make(bert(), **options)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    assert loader.stats["rho"] is not None


# ---- that nothing else changes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup_steps": 5},
        {"criterion": "entropy", "exit_layer": 2},
        {"selection": RankSample()},
        {"criterion": Rarity(torch.arange(1, 98).numpy())},
        {"overlap": True},
        {"pool": "split"},
        {"keep": {0: 0.5, 6: 0.25}},
        {"scorer_device": "cpu"},
        {"positions": First(8)},
        {"exit_head": "probe"},
        {"predicted": True},
    ],
    ids=str,
)
def test_training_is_the_same_to_the_bit_with_and_without_audits(options):
    ends = []
    for every in (0, 1):
        torch.manual_seed(0)
        model = bert()
        given = {name: value for name, value in options.items() if name != "predicted"}
        if "predicted" in options:  # one for each: it learns
            given["criterion"] = Predicted(Small())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loader = make(model, shuffle=True, audit_every=every, **given)
        seen = train(loader, model, 8)
        state = torch.get_rng_state()
        weights = [each.tolist() for each in model.parameters()]
        ends.append((seen, weights, state.tolist(), loader.state_dict()["learned"]))
        assert bool(loader.audits) == bool(every)
    assert ends[0] == ends[1]


def test_a_loader_that_never_sifts_is_not_audited():
    model = bert()
    loader = make(model, keep=1.0, audit_every=1)
    train(loader, model, 4)
    assert loader.audits == [] and loader.stats["audited"] == 0


def test_an_evaluation_is_not_audited():
    model = bert().eval()
    loader = make(model, audit_every=1)
    for _, _ in zip(range(4), loader):  # noqa: B905
        pass
    assert loader.stats["audited"] == 0


# ---- when, and what it costs


def test_rows_are_counted_and_nothing_is_looked_at_in_between():
    model = bert()
    loader = make(model, audit_every=4)
    rows = []
    batches = iter(loader)
    for _ in range(13):
        next(batches)
        rows.append(loader.stats["audited"])
    assert rows == [0] * 4 + [8] * 4 + [16] * 4 + [24]
    assert [each["step"] for each in loader.audits] == [4, 8, 12]


def test_an_audit_costs_what_stats_say(monkeypatch):
    # A clock that only scoring moves: one second a row and layer.
    from siftloader import stats as room
    from siftloader.scorer import Scorer

    now, scored = [0.0], Scorer.score

    def score(self, pool, labels, learn=False):
        depth = LAYERS if self.exit_layer == "full" else self.exit_layer
        times = 3 if isinstance(self.criterion, Witness) else 1  # uncompiled, say
        now[0] += times * depth * len(pool.batch["input_ids"])
        return scored(self, pool, labels, learn)

    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Scorer, "score", score)
    loader = make(bert(), exit_layer=1, audit_every=5)
    batches = iter(loader)
    for _ in range(17):
        next(batches)
        now[0] += 100.0  # the loop's step
    found = loader.stats
    assert found["seconds_auditing"] == 3 * (2 + 3 * 8) * (1 + LAYERS), (
        "two rows of the first pool are tried"
    )
    assert found["seconds_scoring"] == 8 * 17
    assert found["scoring_cost"] == pytest.approx(8 / 100)


def test_what_happens_between_epochs_belongs_to_no_step(monkeypatch):
    from siftloader import stats as room

    now = [0.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    loader = SiftingDataLoader(Texts(count=16), 4, model=bert(), warmup_steps=0, audit_every=5)
    for _ in range(8):  # epochs of two batches
        for _ in loader:
            now[0] += 1.0
        now[0] += 100.0
    assert loader._pace.period == 1.0


def test_the_cost_is_known_before_anything_is_sifted(monkeypatch):
    from siftloader import stats as room
    from siftloader.scorer import Scorer

    now, scored = [0.0], Scorer.score

    def score(self, pool, labels, learn=False):
        now[0] += len(pool.batch["input_ids"])
        return scored(self, pool, labels, learn)

    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Scorer, "score", score)
    loader = make(bert(), audit_every=5, warmup_steps=1000)
    batches = iter(loader)
    for _ in range(12):
        next(batches)
        now[0] += 100.0
    assert loader.stats["scoring_cost"] == pytest.approx(8 / 100), "of a pool of 8, not of 4 rows"


def test_of_more_audits_than_are_remembered_the_first_are_forgotten(monkeypatch):
    from siftloader import audit as room

    monkeypatch.setattr(room, "HISTORY", 2)
    loader = make(bert(), audit_every=1)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    assert [each["step"] for each in loader._audits.history] == [4, 5]
    assert len(loader.state_dict()["audits"]["history"]) == 2


def test_figures_are_settled_a_few_steps_later_and_read_no_sooner():
    # A decision must not depend on who reads stats.
    loader = make(bert(), audit_every=10)
    batches = iter(loader)
    for _ in range(11):
        next(batches)
    assert loader._audits.history == []
    assert len(loader.audits) == 1
    assert loader._audits.history == []
    for _ in range(LATER - 1):
        next(batches)
    assert len(loader._audits.history) == 1


def test_what_cannot_be_audited_is_told_once_and_trained_on():
    def score(early, batch):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("no room")
        return batch["input_ids"][:, 0].float()

    calls: list[int] = []
    loader = make(bert(), score_fn=score, audit_every=2)
    batches = iter(loader)
    with pytest.warns(UserWarning, match=r"no audits: no room; audit_every=0"):
        for _ in range(6):
            next(batches)
    assert loader.audits == [] and loader.stats["steps"] == 6


def test_where_other_ranks_would_wait_what_cannot_be_audited_raises(monkeypatch):
    from siftloader.scorer import Scorer

    def score(early, batch):
        if early.layers == 1:  # the whole model, in one piece
            raise RuntimeError("no room")
        return batch["input_ids"][:, 0].float()

    monkeypatch.setattr(Scorer, "is_spread", True)
    loader = make(bert(), score_fn=score, exit_layer=1)
    with pytest.raises(RuntimeError, match="no room"):
        next(iter(loader))


def test_another_model_is_audited_from_then_on():
    first, second = bert(), bert()
    loader = make(first, audit_every=1, exit_layer=1)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    loader.attach_model(second)
    for _ in range(3):
        next(batches)
    pool = {name: value[40:48] for name, value in Texts().batch.items()}
    expected = Sifter(second, exit_layer="full").score(pool).mean().item()
    assert loader.stats["population_loss"] == pytest.approx(expected, rel=1e-5)


def test_another_model_is_tried_at_once():
    loader = make(bert(), audit_every=100)
    batches = iter(loader)
    next(batches)
    loader.attach_model(bert())
    before = loader.stats["seconds_auditing"]
    next(batches)
    assert loader.stats["seconds_auditing"] > before


@pytest.mark.parametrize("wrong", [-1, 0.5, True, None])
def test_audit_every_is_a_number_of_steps(wrong):
    with pytest.raises(ValueError, match="audit_every must be an int of 0"):
        make(bert(), audit_every=wrong)


@pytest.mark.parametrize(("beside", "step"), [(False, 8), (True, 10)])
def test_a_step_is_what_is_left_without_scoring_unless_that_runs_beside(beside, step):
    # Two pools took 4 seconds, and from batch to batch it is 10.
    audits, scoring, pace = Audits(make(bert())._scorer, 5, beside), Stopwatch(4.0), Pace()
    scoring.blocks = 2
    for now in (0, 10, 20):
        pace.tick(now, True)
    audits._asked, audits._look = 5, _Look(5, True, torch.rand(5, 8), None, 1, 0, 0, Stopwatch())
    (found,) = audits.latest(pace, scoring, alone=True)
    assert found["scoring_cost"] == 2 / step


def test_of_timings_those_of_the_slowest_rank_count():
    one, other = ([1.0, *[1.0] * SUMS, scored, step, 1.0] for scored, step in ((1, 10), (3, 12)))
    assert _audit(5, [np.array(one), np.array(other)])["scoring_cost"] == 3 / 12
    assert _audit(5, [np.array(other), np.array(one)])["scoring_cost"] == 3 / 12


def test_a_pace_is_of_one_kind_of_step():
    pace = Pace()
    assert math.isnan(pace.period)
    for now, sifting in [(0, False), (1, False), (2, False), (9, True), (11, True), (13, True)]:
        pace.tick(now, sifting)
    assert pace.period == 2
    pace.rest()
    pace.tick(1000, True)
    pace.tick(1002, True)
    assert pace.period == 2, "an epoch's end belongs to no step"


def test_a_witness_scores_as_its_criterion_does():
    model, batch = bert(), candidates("bert")
    for criterion in (Loss(), Entropy(), Loss() + 0.5 * Entropy()):
        seen = Witness(criterion)
        found = Sifter(model, exit_layer=2, criterion=seen).score(batch)
        assert torch.equal(found, Sifter(model, exit_layer=2, criterion=criterion).score(batch))
        losses = seen.losses.nan_to_num(-torch.inf)  # of a row without labels
        assert torch.equal(losses, Sifter(model, exit_layer=2).score(batch))


# ---- restarts


def test_a_restart_at_any_step_remembers_the_same_audits():
    model = bert()
    whole = make(model, audit_every=3)
    batches = iter(whole)
    for _ in range(14):
        next(batches)
    timed = {"scoring_cost"}
    expected = [{k: v for k, v in a.items() if k not in timed} for a in whole.audits]
    assert len(expected) == 4
    for stop in (1, 3, 4, 5, 6, 7, 9, 10, 13):
        before = make(model, audit_every=3)
        batches = iter(before)
        for _ in range(stop):
            next(batches)
        state = json.loads(json.dumps(before.state_dict()))
        after = make(model, audit_every=3)
        after.load_state_dict(state)
        assert after.stats["audited"] == before.stats["audited"]
        batches = iter(after)
        for _ in range(14 - stop):
            next(batches)
        found = [{k: v for k, v in a.items() if k not in timed} for a in after.audits]
        assert found == expected, stop


@pytest.mark.parametrize(
    "audits",
    [
        {"history": [], "under_way": {"step": 3}},
        {"history": [], "under_way": {"step": 3, "rank": 0, "found": [1.0, 2.0]}},
        {"history": [], "under_way": {"step": 3, "rank": 0, "found": []}},
        {"history": [], "under_way": {"step": 3, "rank": 0, "found": [-1.0] * (SUMS + 4)}},
        {"history": [], "under_way": {"step": 3, "rank": 0, "found": [1.0] + [-1.0] * (SUMS + 3)}},
        {"history": [], "under_way": {"step": 3, "rank": 0, "found": [1.0] + [None] * (SUMS + 3)}},
        {"history": [{"step": 3, "rho": 10**400}], "under_way": None},
        {"history": [{"step": True}], "under_way": None},
        {"history": [{"step": "x"}], "under_way": None},
        {"history": [{"step": 3, "rho": math.nan}], "under_way": None},
        {"history": {}, "under_way": None},
        [],
    ],
)
def test_a_damaged_history_is_refused(audits):
    loader = make(bert())
    next(iter(loader))
    state = loader.state_dict() | {"audits": audits}
    with pytest.raises(StateError, match="audits"):
        make(bert()).load_state_dict(state)


def test_an_audit_under_way_belongs_to_the_rank_that_saved_it():
    model = bert()
    before = make(model)
    batches = iter(before)
    for _ in range(4):
        next(batches)
    state = before.state_dict()
    state["audits"]["under_way"]["rank"] = 1
    after = make(model)
    after.load_state_dict(state)
    batches = iter(after)
    for _ in range(4):
        next(batches)
    assert len(before.audits) == 1 and [each["step"] for each in after.audits] == [6]


def test_numbers_of_any_kind_are_taken_up_as_figures():
    loader = make(bert())
    next(iter(loader))
    found = [1, 2, *[10**30] * (SUMS - 1), None, 2, 1]
    under_way = {"step": 1, "rank": 0, "found": found}
    state = loader.state_dict() | {"audits": {"history": [], "under_way": under_way}}
    after = make(bert())
    after.load_state_dict(state)
    (audit,) = after.audits
    assert audit["rows"] == 2 and audit["scoring_cost"] is None
    assert json.loads(json.dumps(after.state_dict()))["audits"]["under_way"] == {
        **under_way,
        "found": [None if each is None else float(each) for each in found],
    }


def test_a_state_of_before_there_were_audits_is_taken():
    loader = make(bert())
    next(iter(loader))
    state = copy.deepcopy(loader.state_dict()) | {"version": 3}
    del state["audits"], state["gate"]
    for name in ("audited", "seconds_auditing"):
        del state["stats"][name]
    after = make(bert())
    after.load_state_dict(state)
    assert after.audits == [] and after.stats["audited"] == 0


# ---- gates


def test_a_gate_is_asked_after_every_audit_and_decides_from_then_on():
    model, asked = bert(), []

    def gate(audits, is_open):
        asked.append([each["step"] for each in audits])
        return len(audits) % 2 == 0

    loader = make(model, gate=gate, audit_every=5)
    sifted = []
    batches = iter(loader)
    for _ in range(26):
        before = loader.stats["candidates"]
        next(batches)
        sifted.append(loader.stats["candidates"] > before)
    assert asked == [[], [5], [5, 10], [5, 10, 15], [5, 10, 15, 20]]
    assert sifted == [True] * 10 + [False] * 5 + [True] * 5 + [False] * 5 + [True]
