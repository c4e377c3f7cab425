"""Bugs that sample-selection libraries have shipped, each as a test that would have caught it here.

pytest tests/test_shipped_bugs.py
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import bert, candidates, classifier, trace
from test_loader import Rows, ids, make
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, dataloader

import siftloader
from siftloader import (
    EmptyEpoch,
    Entropy,
    GradNorm,
    Gumbel,
    LeastConfidence,
    Loss,
    Margin,
    Pool,
    Random,
    RankSample,
    Rarity,
    Reducible,
    Residual,
    Robust,
    Sifter,
    SiftingDataLoader,
    Stratified,
    TopK,
    TrimmedTopK,
)
from siftloader.world import World


COUNTS = np.arange(97) + 1
CRITERIA = [
    Loss(),
    Entropy(),
    Margin(),
    LeastConfidence(),
    GradNorm(),
    Random(),
    Rarity(COUNTS),
    Residual(COUNTS),
    Reducible(np.arange(8) + 2**33, np.linspace(0, 1, 8)),
    Loss() - 0.5 * Entropy(),
]
SELECTIONS = [
    TopK(),
    RankSample(),
    Gumbel(),
    TrimmedTopK(0.25),
    Robust(),
    Stratified(by=lambda batch: torch.arange(8) % 2),
]


def test_an_inverted_sort_does_not_pass():
    # Tests that only looked at shapes, with a constant loss, passed whatever was kept.
    batch = {"x": torch.randn(64, 8), "labels": torch.randint(0, 10, (64,))}
    model = classifier()
    full = Sifter(model, exit_layer=4)
    losses = full.score(batch)
    kept = functional.cross_entropy(model.eval()(full(batch)["x"]), full(batch)["labels"])
    assert kept > losses.mean() > losses.sort().values[:32].mean()


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda each: type(each).__name__)
def test_every_criterion_and_selection_runs_and_gives_whole_batches(criterion, selection):
    # A selection class without a `return`; a pruned batch that broke micro-batches apart.
    batch = candidates("bert") | {"id": torch.arange(8) + 2**33}
    kept = Sifter(bert(), criterion=criterion, selection=selection)(batch)
    assert {len(value) for value in kept.values()} == {4}
    rows = (kept["id"] - 2**33).tolist()
    assert rows == sorted(set(rows))
    assert all(torch.equal(kept[name], batch[name][rows]) for name in batch), "rows were mixed up"


def test_equal_scores_keep_exactly_b():
    # `scores < scores.mean()` was true for all of them, and nothing (or everything) was kept.
    for selection in SELECTIONS:
        for value in (3.0, 0.1, -torch.inf):
            index = selection(torch.full((8,), value), 4, Pool({"x": torch.zeros(8)}))
            assert len(set(index.tolist())) == 4


def test_an_epoch_that_would_be_empty_is_an_error():
    # Warm-start epochs that came out as empty loaders.
    with pytest.raises(EmptyEpoch, match="hand out nothing"):
        next(iter(make(Rows(3), batch_size=4)))


def test_ids_are_never_floats():
    # Ids joined with float32 losses: 16,777,217 became 16,777,216.
    big = torch.arange(16) + 2**24 + 1
    rows = [{"x": torch.full((8,), float(n)), "labels": torch.tensor(0), "id": i}
            for n, i in enumerate(big)]  # fmt: skip
    seen = []
    loader = make(rows, batch_size=8, on_select=lambda numbers, scores, kept: seen.append(numbers))
    kept = next(iter(loader))["id"]
    assert torch.equal(seen[0], big) and seen[0].dtype == torch.int64
    assert set(kept.tolist()) < set(big.tolist())


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: type(each).__name__)
def test_no_global_random_stream_is_drawn_from_or_seeded(selection):
    # `np.random.choice` and `np.random.seed(epoch)` in the selecting step.
    batch = candidates("bert")
    for criterion in (Loss(), Random()):
        sifter = Sifter(bert(), criterion=criterion, selection=selection)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
        sifter(batch)
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_ranks_are_counted_over_all_machines(monkeypatch):
    # Weights indexed by LOCAL_RANK: right on the first machine only.
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    draws = []
    for rank in (1, 9):  # the second GPU of two machines
        monkeypatch.setenv("RANK", str(rank))
        assert World.detect().rank == rank and World.detect().ranks == 16
        sifter = Sifter(classifier(), criterion="random")
        batch = {"x": torch.arange(32.0)[:, None].expand(32, 8), "labels": torch.zeros(32).long()}
        draws.append(sifter(batch)["x"][:, 0].tolist())
    assert draws[0] != draws[1]


def test_nothing_of_torch_is_patched():
    # A replaced `_BaseDataLoaderIter.__next__`, from the import on.
    parts = [
        (dataloader._BaseDataLoaderIter, "__next__"),
        (DataLoader, "__iter__"),
        (nn.Module, "__call__"),
        (functional, "cross_entropy"),
        (torch.Tensor, "backward"),
    ]
    before = [getattr(owner, name) for owner, name in parts]
    for name in siftloader.__all__:
        getattr(siftloader, name)
    next(iter(make(batch_size=8)))
    assert [getattr(owner, name) for owner, name in parts] == before
    assert all(each.__module__.startswith("torch") for each in before)


@pytest.mark.parametrize("count", [64, 65, 79, 80, 95])
def test_no_batch_is_ragged_while_sifting(count):
    # Batches that shrank by what was pruned, and tails of any size.
    sizes = {len(ids(batch)) for batch in make(Rows(count), batch_size=16)}
    assert sizes == {16}


def test_scores_are_those_of_eval_mode():
    # Dropout noise in the scores, BatchNorm statistics moved by candidates that are never trained on.
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3)
            )
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            x = self.norm(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, batch = Noisy().train(), candidates("classifier")
    before = trace(model)
    scores = [Sifter(model, exit_layer=3).score(batch) for _ in range(2)]
    assert trace(model) == before and model.training
    assert torch.equal(scores[0], scores[1])
    with torch.no_grad():
        model.eval()
        expected = functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    rows = torch.arange(8) != 3
    assert torch.allclose(scores[0][rows], expected[rows], atol=1e-5)


def test_a_loss_belongs_to_the_sample_it_was_computed_for():
    # Losses zipped with another list of examples as soon as one was skipped.
    model, batch = bert(), candidates("bert")
    scores = Sifter(model).score(batch)
    order = torch.randperm(8)
    shuffled = {name: value[order] for name, value in batch.items()}
    assert torch.allclose(Sifter(model).score(shuffled), scores[order], atol=1e-5)


def test_wrong_options_fail_before_training():
    # A schedule whose first selecting step came half-way through a run, and only then raised.
    with pytest.raises(siftloader.ScoringError):
        SiftingDataLoader(Rows(), 8, model=classifier(), exit_layer=99, warmup_steps=10**6)
    loader = make(Rows(), batch_size=8, score_fn=lambda early, batch: 1.0, warmup_steps=10**6)
    with pytest.raises(siftloader.ScoringError):
        next(iter(loader))


def test_the_length_and_the_schedule_count_what_is_handed_out():
    # No `len`, or that of the candidates: learning rates decayed at half their way.
    loader = make(Rows(160), batch_size=16, warmup_steps=2)
    planned = loader.total_batches(epochs=2)
    assert planned == len(list(loader)) + len(list(loader)) == 6 + 5
