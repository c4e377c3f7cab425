"""Restarts where order, data and random streams are not the library's own: pytest tests/test_resume.py"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest
import torch
from models import classifier
from test_loader import DEMO, Rows, Stateful, ids, make, planted
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from siftloader import SiftingDataLoader, StateError, TokenShards


def wrap(loader, **options) -> SiftingDataLoader:
    options = {"model": classifier(), "score_fn": planted, "warmup_steps": 1} | options
    return SiftingDataLoader.wrap(loader, **options)


def stateful(workers: int, shuffle: bool):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls a deprecated function of torch
        return torchdata.StatefulDataLoader(
            Rows(64), batch_size=4, num_workers=workers, shuffle=shuffle
        )


class Shuffled(Sampler):
    """A batch sampler of someone's own, drawing from torch's global stream."""

    batch_size = 4

    def __iter__(self):
        order = torch.randperm(64).tolist()
        for start in range(0, 64, 4):
            yield order[start : start + 4]

    def __len__(self) -> int:
        return 16


def two_generators() -> DataLoader:
    sampler = RandomSampler(Rows(64), generator=torch.Generator().manual_seed(2))
    return DataLoader(Rows(64), 4, sampler=sampler, generator=torch.Generator().manual_seed(3))


def weighted() -> DataLoader:
    sampler = WeightedRandomSampler(torch.arange(64.0) + 1, 64, replacement=False)
    return DataLoader(Rows(64), batch_sampler=BatchSampler(sampler, 4, False))


KINDS: dict[str, Callable[[], SiftingDataLoader]] = {
    "shuffled": lambda: make(Rows(64), 4, True, warmup_steps=1),
    "generator": lambda: make(
        Rows(64), 4, True, generator=torch.Generator().manual_seed(1), warmup_steps=1
    ),
    "two generators": lambda: wrap(two_generators()),
    "weighted": lambda: wrap(weighted()),
    "own batch sampler": lambda: make(Rows(64), batch_sampler=Shuffled(), warmup_steps=1),
    "stateful data set": lambda: make(Stateful(), 4, warmup_steps=1),
    "shards": lambda: SiftingDataLoader(
        TokenShards(DEMO, with_ids=True), 256, model=classifier(), criterion="rarity"
    ),
    "shards in torch's loader": lambda: SiftingDataLoader.wrap(
        DataLoader(TokenShards(DEMO, with_ids=True), 256), model=classifier(), criterion="random"
    ),
    "stateful loader": lambda: wrap(stateful(0, False)),
    "stateful loader, shuffled": lambda: wrap(stateful(0, True)),
    "stateful loader, workers": lambda: wrap(stateful(2, False)),
}


def numbers(batch) -> list[int]:
    return batch["id"].tolist() if "id" in batch else ids(batch)


@pytest.mark.filterwarnings("ignore:the epoch ended inside", "ignore:resuming .* of Shuffled")
@pytest.mark.parametrize("cut", [0, 1, 3, "end"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_changes_nothing_in_this_epoch_and_the_next(kind, cut):
    torch.manual_seed(11)
    loader = KINDS[kind]()
    iterator = iter(loader)
    handed = []
    while cut == "end" or len(handed) < cut:
        batch = next(iterator, None)
        if batch is None:
            break
        handed.append(numbers(batch))
    state, stream = json.loads(json.dumps(loader.state_dict())), torch.get_rng_state()
    rest = [numbers(batch) for batch in iterator]
    expected = rest + [numbers(batch) for _ in range(2) for batch in loader]
    draw = torch.rand(1)
    torch.manual_seed(999)
    resumed = KINDS[kind]()
    resumed.load_state_dict(state)
    torch.set_rng_state(stream)  # as a training script's own checkpoint does
    found = [numbers(batch) for batch in resumed]
    if cut != "end":
        assert found == rest
        found += [numbers(batch) for batch in resumed]
    # A state from between iter() and the first next() holds the order, but a sampler that draws its seed
    # at the first next() has not moved the stream yet; and torchdata draws when it is restored.
    if not cut or "stateful loader" in kind:
        assert found[: len(rest)] == rest
        assert cut != "end" or found == expected[: len(found)]
        return
    found += [numbers(batch) for batch in resumed]
    assert found == expected
    assert torch.equal(torch.rand(1), draw), "the global stream stands where it stood"


def test_a_place_the_shards_had_before_counts_once():
    shards = TokenShards(DEMO, with_ids=True)
    shards.load_state_dict({**shards.state_dict(), "epoch": 3, "position": 64})
    loader = SiftingDataLoader(shards, 64, model=classifier(), keep=1.0)
    assert len(list(loader)) == len(loader) - 1
    state = loader.state_dict()
    assert (state["epoch"], state["cursor"]["position"]) == (4, 0)
    with pytest.raises(StateError, match="seed 0, these shards have 1"):
        SiftingDataLoader(
            TokenShards(DEMO, seed=1), 64, model=classifier(), keep=1.0
        ).load_state_dict(state)


def test_what_collating_draws_comes_from_the_stream_of_now():
    def noisy(samples):
        batch = default_collate(samples)
        return {**batch, "noise": torch.rand(len(samples))}

    for settings in ({}, {"shuffle": True}):
        torch.manual_seed(5)
        loader = make(Rows(64), 4, collate_fn=noisy, warmup_steps=2, **settings)
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        state, stream = loader.state_dict(), torch.get_rng_state()
        expected = [(ids(batch), batch["noise"].tolist()) for batch in iterator]
        resumed = make(Rows(64), 4, collate_fn=noisy, warmup_steps=2, **settings)
        resumed.load_state_dict(state)
        torch.set_rng_state(stream)
        assert [(ids(batch), batch["noise"].tolist()) for batch in resumed] == expected


def test_loading_a_state_draws_nothing_and_starts_no_worker():
    loader = make(Rows(64), 4, True, num_workers=1)
    next(iter(loader))
    resumed = make(Rows(64), 4, True, num_workers=1)
    before = torch.get_rng_state()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_way_to_iterate_is_replayed_not_lost():
    class Doubling(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {**batch, "x": batch["x"] * 2}

    loader = wrap(Doubling(Rows(64), 4))
    iterator = iter(loader)
    next(iterator), next(iterator)
    expected = ids(next(iterator))
    state = loader.state_dict()
    expected_next = ids(next(iterator))
    resumed = wrap(Doubling(Rows(64), 4))
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="again"):
        assert ids(next(iter(resumed))) == expected_next
    assert all(number % 2 == 0 for number in expected)


def test_a_sampler_of_unknown_kind_is_named():
    loader = make(Rows(64), batch_sampler=Shuffled())
    next(iter(loader))
    resumed = make(Rows(64), batch_sampler=Shuffled())
    resumed.load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match="into the order of Shuffled"):
        iter(resumed)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"drop_last": True, "keep": 2 / 3}, 100),
        ({"keep": 0.75, "total_steps": 20, "cooldown_steps": 10}, 60),
        ({"keep": 0.75}, 90),
    ],
)
def test_shards_are_cut_where_an_unbroken_epoch_cuts_them(settings, size):
    def fresh() -> SiftingDataLoader:
        shards = TokenShards(DEMO, with_ids=True)
        options = {"model": classifier(), "criterion": "rarity", "warmup_steps": 1}
        return SiftingDataLoader(shards, size, **options, **settings)

    straight = [batch["id"].tolist() for batch in fresh()]
    assert len(straight) == len(fresh())
    for cut in range(len(straight)):
        loader = fresh()
        iterator = iter(loader)
        for _ in range(cut):
            next(iterator)
        resumed = fresh()
        resumed.load_state_dict(loader.state_dict())
        assert [batch["id"].tolist() for batch in resumed] == straight[cut:], cut


def test_a_state_of_other_data_is_refused():
    loader = make(Rows(64), 4)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(StateError, match="samples 64, this loader's has 16"):
        make(Rows(16), 4).load_state_dict(state)
    with pytest.raises(StateError, match="sampler 'SequentialSampler', this loader's has 'Random"):
        make(Rows(64), 4, True).load_state_dict(state)
    with pytest.raises(StateError, match="lacks"):
        make(Rows(64), 4).load_state_dict({})
    with pytest.raises(StateError, match="damaged"):
        make(Rows(64), 4).load_state_dict({**state, "stats": {}})
    shorter = make(Rows(64), 4)
    shorter.load_state_dict({**state, "cursor": {**state["cursor"], "batches": 99}})
    with pytest.raises(StateError, match="99 batches into an epoch"):
        iter(shorter)


def test_off_over_shards_draws_from_the_global_stream_what_a_dataloader_draws():
    torch.manual_seed(0)
    iterator = iter(DataLoader(TokenShards(DEMO), 64))
    next(iterator)
    expected = torch.rand(1)
    loader = SiftingDataLoader(TokenShards(DEMO), 64, model=classifier(), keep=1.0)
    torch.manual_seed(0)
    iterator = iter(loader)
    next(iterator)
    assert torch.equal(torch.rand(1), expected)


def test_what_the_shards_were_told_before_counts():
    shards = TokenShards(DEMO, with_ids=True)
    shards.set_epoch(3)
    expected = next(TokenShards(DEMO, with_ids=True).read_batches(8, epoch=3))["id"]
    loader = SiftingDataLoader(shards, 8, model=classifier(), keep=1.0)
    assert torch.equal(next(iter(loader))["id"], expected)
    restored = TokenShards(DEMO, with_ids=True)
    restored.load_state_dict({**restored.state_dict(), "epoch": 3, "position": 8})
    loader = SiftingDataLoader(restored, 8, model=classifier(), keep=1.0)
    later = next(TokenShards(DEMO, with_ids=True).read_batches(8, epoch=3, position=8))["id"]
    assert torch.equal(next(iter(loader))["id"], later)


def test_of_two_iterators_the_newest_moves_the_state():
    loader = make(Rows(64), 4)
    older, newer = iter(loader), iter(loader)
    next(older), next(newer)
    state = loader.state_dict()
    list(older)
    assert loader.state_dict()["cursor"] == state["cursor"]
    assert loader.state_dict()["epoch"] == state["epoch"] == 1
