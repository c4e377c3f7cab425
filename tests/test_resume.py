"""Restarts where order, data and random streams are not the library's own: pytest tests/test_resume.py"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import classifier
from test_loader import DEMO, Rows, Stateful, ids, make, planted
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from siftloader import RankSample, SiftingDataLoader, StateError, TokenShards
from siftloader.indices import decoded, encoded


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
@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        # Workers take a second to come and go: here the restart in the middle, the rest in `make test-all`.
        pytest.param(kind, cut, marks=pytest.mark.slow if "workers" in kind and cut != 1 else ())
        for kind in KINDS
        for cut in (0, 1, 3, "end")
    ],
)
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
    with pytest.raises(StateError, match="seed 0 found, 1 expected"):
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
    loader = fresh()
    iterator = iter(loader)
    for cut in range(len(straight)):
        resumed = fresh()
        resumed.load_state_dict(loader.state_dict())
        assert [batch["id"].tolist() for batch in resumed] == straight[cut:], cut
        next(iterator)


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
    with pytest.warns(UserWarning, match="another iterator of this loader was begun"):
        next(older)
    next(newer)
    state = loader.state_dict()
    list(older)
    assert loader.state_dict()["cursor"] == state["cursor"]
    assert loader.state_dict()["epoch"] == state["epoch"] == 1


@pytest.mark.parametrize("kind", ["map", "shards"])
def test_the_length_after_a_restart_between_epochs_is_the_coming_epochs(kind):
    def fresh() -> SiftingDataLoader:
        if kind == "map":
            return make(Rows(40), 4, warmup_steps=10)
        shards = TokenShards(DEMO)
        return SiftingDataLoader(
            shards, 256, model=classifier(), criterion="rarity", warmup_steps=len(shards) // 256
        )

    loader = fresh()
    warm = len(loader)
    list(loader)
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert len(resumed) == len(loader) < warm
    again = fresh()
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert len(again) == len(loader) == len(list(loader))


def test_a_restart_in_the_cool_down_scores_nothing():
    def unscorable(early, batch):
        raise AssertionError("nothing is to be scored")

    def fresh(score_fn) -> SiftingDataLoader:
        return make(Rows(64), 4, score_fn=score_fn, total_steps=4, cooldown_steps=2)

    loader = fresh(planted)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = fresh(unscorable)
    resumed.load_state_dict(loader.state_dict())
    assert [ids(batch) for batch in resumed] == [ids(batch) for batch in iterator]


@pytest.mark.filterwarnings("ignore:resuming by drawing")
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=9),
    sifted=st.integers(1, 3),
    keep=st.sampled_from([0.25, 0.5, 0.75]),
)
@examples(40)
def test_split_pools_at_the_border_to_plain_survive_a_restart(sizes, sifted, keep):
    inner, start = [], 0
    for size in [4, *sizes]:
        x = torch.arange(start, start + size).float()[:, None].expand(-1, 8)
        inner.append({"x": x, "labels": torch.zeros(size, dtype=torch.long)})
        start += size

    def fresh() -> SiftingDataLoader:
        return wrap(
            inner,
            pool="split",
            keep=keep,
            warmup_steps=0,
            total_steps=9,
            cooldown_steps=9 - sifted,
        )

    straight = [ids(batch) for batch in fresh()]
    for cut in range(1, len(straight)):
        loader = fresh()
        iterator = iter(loader)
        found = [ids(next(iterator)) for _ in range(cut)]
        resumed = fresh()
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert found + [ids(batch) for batch in resumed] == straight, cut


class Told(IterableDataset):
    """Row i is i; what it remembers is of many types, and changes in its place."""

    def __init__(self) -> None:
        self.random, self.numpy = random.Random(0), np.random.RandomState(0)
        self.state = {"at": 0, "pair": (0, (1, "two")), 3: {"tuple": [4]}, "blob": b"\x00"}

    def __iter__(self):
        while self.state["at"] < 64:
            noise = self.random.random() + self.numpy.rand()
            number = self.state["at"]
            self.state["at"] += 1
            self.state["pair"] = (number, (1, "two"))
            yield {"x": torch.full((8,), float(number)), "noise": noise, "labels": torch.tensor(0)}
        self.state["at"] = 0

    def state_dict(self):
        self.state["random"], self.state["numpy"] = self.random.getstate(), self.numpy.get_state()
        self.state["scalar"] = np.int64(self.state["at"])
        return self.state

    def load_state_dict(self, state):
        assert isinstance(state["scalar"], np.int64) and state["scalar"] == state["at"]
        assert isinstance(state["pair"], tuple) and isinstance(state["pair"][1], tuple)
        assert state[3] == {"tuple": [4]} and state["blob"] == b"\x00"
        self.random.setstate(state["random"])
        self.numpy.set_state(state["numpy"])
        self.state = state


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_states_of_other_types_that_change_in_their_place_come_back_as_they_were(cut):
    def fresh() -> SiftingDataLoader:
        return make(Told(), 4, keep=2 / 3, warmup_steps=1, drop_last=True)

    def seen(batch):
        return ids(batch), batch["noise"].tolist()

    straight = [seen(batch) for batch in fresh()]
    loader = fresh()
    iterator = iter(loader)
    found = [seen(next(iterator)) for _ in range(cut)]
    state = loader.state_dict()
    text = json.dumps(state)
    next(iterator)
    assert json.dumps(state) == text, "a state does not move on with its loader"
    resumed = fresh()
    resumed.load_state_dict(json.loads(text))
    assert found + [seen(batch) for batch in resumed] == straight


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)
KEYS = st.one_of(
    st.text(max_size=3), st.integers(), st.sampled_from(["tuple", "bytes", "dict", "dtype"])
)


@given(
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(KEYS, inner, max_size=4),
        ),
        max_leaves=12,
    )
)
@examples(200)
def test_any_nest_of_builtins_survives_json(state):
    assert repr(decoded(json.loads(json.dumps(encoded(state))))) == repr(state)


@pytest.mark.parametrize(
    "state",
    [
        torch.arange(6).view(2, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.arange(6).view(2, 3).T,
        np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        np.array(2.5, dtype=">f4"),
        np.array(["a", "bcd"]),
        np.zeros((0, 2), dtype=np.bool_),
        np.float32(0.1),
    ],
    ids=repr,
)
def test_arrays_and_tensors_survive_json(state):
    found = decoded(json.loads(json.dumps(encoded([state]))))[0]
    assert type(found) is type(state)
    assert (found.dtype, found.shape) == (state.dtype, state.shape)
    assert found.tolist() == state.tolist()


def test_a_state_saved_again_before_the_head_is_loaded_still_asks_for_it():
    model = classifier()

    def fresh() -> SiftingDataLoader:
        return make(Rows(64), 4, model=model, score_fn=None, exit_head="probe")

    loader = fresh()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state, head = loader.state_dict(), loader.exit_head.state_dict()
    between = fresh()
    between.load_state_dict(state)
    again = between.state_dict()
    assert again["learned"] == state["learned"] != fresh().state_dict()["learned"]
    resumed = fresh()
    resumed.load_state_dict(again)
    for _ in range(2):  # asking twice does not help
        with pytest.raises(StateError, match=r"other tensors of loader\.exit_head"):
            iter(resumed)
    resumed.exit_head.load_state_dict(head)
    assert [ids(batch) for batch in resumed] == [ids(batch) for batch in iterator]


@pytest.mark.parametrize("settings", [{"criterion": "random"}, {"selection": RankSample()}])
def test_a_pool_whose_report_fails_is_drawn_again_as_if_for_the_first_time(settings):
    model = classifier()

    def fresh(on_select=None) -> SiftingDataLoader:
        options = {"model": model, "score_fn": None, "on_select": on_select}
        return make(Rows(64), 4, **options | settings)

    seen = []

    def failing(*args):
        seen.append(args)
        if len(seen) == 3:
            raise RuntimeError("of the callback")

    straight = [ids(batch) for batch in fresh()]
    loader = fresh(failing)
    found = []
    with pytest.raises(RuntimeError, match="of the callback"):
        for batch in loader:
            found.append(ids(batch))  # noqa: PERF401 - those before the error count
    state = loader.state_dict()
    assert (state["pools"], state["stats"]["candidates"], state["stats"]["kept"]) == (2, 16, 8)
    resumed = fresh()
    resumed.load_state_dict(state)
    assert found + [ids(batch) for batch in resumed] == straight


def test_how_labels_are_read_is_part_of_the_state():
    class Shifting(nn.Module):
        """Its own loss shifts the labels, which no name tells."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 16)

        def forward(self, input_ids, labels=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + layer(x)
            logits = self.head(x)
            if labels is None:
                return {"logits": logits}
            lost = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
            return {"logits": logits, "loss": lost}

    model = Shifting().train()
    inner = [{"input_ids": x, "labels": x} for x in torch.randint(0, 16, (8, 4, 6))]
    loader = SiftingDataLoader.wrap(inner, model=model, warmup_steps=0)
    assert loader.state_dict()["reading"] is None
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["reading"] == loader._scorer.reading_state is not None
    resumed = SiftingDataLoader.wrap(inner, model=model, warmup_steps=0)
    resumed.load_state_dict(state)
    assert resumed._scorer.reading_state == loader._scorer.reading_state
