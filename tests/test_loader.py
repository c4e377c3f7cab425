"""The loader's contract: pytest tests/test_loader.py"""

from __future__ import annotations

import difflib
import gc
import json
import pickle
import random
import threading
import warnings
import weakref
from collections import namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import VOCAB, Classifier, bert, candidates, classifier, gpt2
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    default_collate,
)

from siftloader import (
    BatchError,
    EmptyEpoch,
    Loss,
    ScoringError,
    Sifter,
    SiftingDataLoader,
    StateError,
    TokenShards,
    TopK,
)
from siftloader.world import World


DEMO = "shards/demo"


class Rows(Dataset):
    """Row i is i everywhere; its planted score is i % 7."""

    def __init__(self, count: int = 100) -> None:
        self.count = count
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.fetched.append(index)
        return {"x": torch.full((8,), float(index)), "labels": torch.tensor(index % 10)}


def planted(early, batch) -> Tensor:
    return batch["x"][:, 0] % 7


def ids(batch) -> list[int]:
    return batch["x"][:, 0].long().tolist()


def make(dataset=None, *args, **options) -> SiftingDataLoader:
    options = {"model": classifier(), "score_fn": planted, "warmup_steps": 0} | options
    return SiftingDataLoader(Rows() if dataset is None else dataset, *args, **options)


# Law 3: off, or warming up, it is the plain loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"warmup_steps": 10**6}])
def test_off_it_is_the_plain_loader_and_draws_what_it_draws(options, workers):
    settings = {"batch_size": 8, "shuffle": True, "num_workers": workers}
    torch.manual_seed(3)
    plain = DataLoader(Rows(50), **settings)
    expected = [ids(batch) for _ in range(2) for batch in plain]
    state = torch.get_rng_state()
    loader = make(Rows(50), **{"warmup_steps": 0} | options, **settings)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the epoch ends inside the warm-up
        assert [ids(batch) for _ in range(2) for batch in loader] == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader) == len(plain) == 7


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_off_training_is_bit_identical(family):
    batch = candidates(family, samples=32)
    dataset = [{name: value[i] for name, value in batch.items()} for i in range(32) if i != 3]

    def values(make_loader):
        torch.manual_seed(1)
        model = {"bert": bert, "gpt2": gpt2}[family]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            for step in make_loader(model):
                model(**step).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()] + [torch.rand(3)]

    settings = {"batch_size": 4, "shuffle": True}
    expected = values(lambda model: DataLoader(dataset, **settings))
    off = {"keep=1.0": {"keep": 1.0}, "warm-up": {"warmup_steps": 1000}}
    for options in off.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = values(
                lambda model, o=options: SiftingDataLoader(dataset, **settings, model=model, **o)
            )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_scoring_leaves_the_training_on_given_batches_bit_identical():
    # Law 6 as a trajectory: the same selected batches without siftloader train the same model.
    batch = candidates("bert", samples=64)
    dataset = [{name: value[i] for name, value in batch.items()} for i in range(64) if i != 3]

    def trained(batches_for):
        torch.manual_seed(1)
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        seen = []
        for step in batches_for(model):
            seen.append({name: value.clone() for name, value in step.items()})
            model(**step).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, seen

    sifted, seen = trained(
        lambda model: SiftingDataLoader(
            dataset, 4, model=model, warmup_steps=2, criterion="entropy"
        )
    )
    # batch_size=None hands the batches on, and draws from the global stream what any loader draws.
    plain, _ = trained(lambda model: DataLoader(seen, batch_size=None))
    pairs = zip(sifted.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_is_read_before_the_first_next_and_one_next_is_one_draw():
    dataset = Rows()
    loader = make(dataset, 4, warmup_steps=3)
    iterator = iter(loader)
    assert dataset.fetched == []
    for batches in (1, 2, 3):
        next(iterator)
        assert len(dataset.fetched) == 4 * batches
    next(iterator)  # sifting: a pool of two inner batches
    assert len(dataset.fetched) == 4 * 5


# Pools


@given(
    count=st.integers(1, 120),
    batch=st.integers(1, 9),
    over=st.sampled_from([1, 2, 3, 4]),
    warmup=st.integers(0, 6),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
@examples(150)
def test_an_epoch_is_what_len_says_and_hands_out_the_best(
    count, batch, over, warmup, drop_last, shuffle
):
    loader = make(
        Rows(count), batch, shuffle, keep=1 / over, warmup_steps=warmup, drop_last=drop_last
    )
    batches, samples = loader.epoch()
    assert loader.total_batches(1) == len(loader) == batches
    assert len(loader.dataset) == samples
    pools = []
    loader._on_select = lambda ids, scores, kept: pools.append((ids, scores, kept))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if batches == 0:
            with pytest.raises(EmptyEpoch):
                list(loader)
            return
        handed = list(loader)
    assert len(handed) == batches
    assert sum(len(ids(each)) for each in handed) == samples
    sifted = handed[-len(pools) :] if pools else []
    for each, (_, scores, kept) in zip(sifted, pools, strict=True):
        assert len(ids(each)) == batch == int(kept.sum())
        assert not (~kept).any() or scores[kept].min() >= scores[~kept].max()
        assert sorted((scores[kept]).tolist()) == sorted(float(i % 7) for i in ids(each))
    everything = [i for each in handed for i in ids(each)]
    assert len(set(everything)) == len(everything)
    stats = loader.stats
    assert stats["steps"] == batches and stats["samples"] == samples
    assert stats["kept"] == len(pools) * batch


def test_a_pool_is_the_next_rows_and_winners_keep_candidate_order():
    loader = make(Rows(16), 4)
    assert [ids(batch) for batch in loader] == [[3, 4, 5, 6], [10, 11, 12, 13]]


def test_ragged_inner_batches_are_carried_over_and_still_give_b_rows():
    sizes = [4, 3, 5, 2, 6, 4, 1, 7, 4]
    starts = np.cumsum([0, *sizes])
    inner = [
        {
            "x": torch.arange(a, b).float()[:, None].expand(-1, 8),
            "labels": torch.zeros(b - a).long(),
        }
        for a, b in pairwise(starts)
    ]
    loader = SiftingDataLoader.wrap(inner, model=classifier(), score_fn=planted, warmup_steps=0)
    pools = []
    loader._on_select = lambda ids, scores, kept: pools.append(scores.tolist())
    handed = [ids(batch) for batch in loader]
    assert all(len(each) == 4 for each in handed)
    assert [score for pool in pools for score in pool] == [i % 7 for i in range(36)]
    assert [len(pool) for pool in pools] == [8, 8, 8, 8, 4]


def test_rows_of_different_padded_length_share_a_pool():
    model = bert().double()
    short, long = candidates("bert", 8, length=12), candidates("bert", 8, length=20)
    loader = SiftingDataLoader.wrap([short, long], model=model, warmup_steps=0)
    (batch,) = list(loader)
    assert batch["input_ids"].shape == (8, 20)
    scores = torch.cat([Sifter(model).score(short), Sifter(model).score(long)])
    expected = scores.sort(descending=True).values[:8].sort().values
    assert torch.allclose(Sifter(model).score(batch).sort().values, expected, atol=1e-6)


class Tagger(nn.Module):
    """A loss of its own that skips -1, and dies of any other label it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        flat = logits.flatten(0, 1), labels.flatten()
        return {"logits": logits, "loss": nn.functional.cross_entropy(*flat, ignore_index=-1)}


@pytest.mark.parametrize("lengths", [(6, 6, 4, 5), (6, 9, 5, 8)], ids=["first alike", "ragged"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_padded_labels_carry_the_mark_of_the_models_own_loss(lengths, warmup, tmp_path):
    def batch(length: int) -> dict[str, Tensor]:
        words = torch.randint(0, 16, (4, length))
        return {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "labels": torch.where(torch.arange(length) < 2, words, -1),
        }

    model = Tagger().train()
    loader = SiftingDataLoader.wrap(
        [batch(length) for length in (lengths[0],) * warmup + lengths],
        model=model,
        warmup_steps=warmup,
        shift_labels=False,
        log_selections=tmp_path,
    )
    handed = list(loader)
    assert len(handed) == warmup + 2
    for each in handed:
        assert ((each["labels"] >= 0).sum(1) == 2).all() and each["labels"].min() == -1
        model(**each)["loss"].backward()
    assert logged(tmp_path, "labels") == [2] * 16


def test_a_reused_buffer_is_not_mistaken_for_two_draws():
    buffer = {"x": torch.zeros(4, 8), "labels": torch.zeros(4, dtype=torch.long)}

    class Reusing:
        def __iter__(self):
            for start in (0, 4, 8, 12):
                buffer["x"][:] = torch.arange(start, start + 4.0)[:, None]
                yield buffer

    loader = SiftingDataLoader.wrap(
        Reusing(), model=classifier(), score_fn=planted, warmup_steps=0
    )
    assert [ids(batch) for batch in loader] == [[3, 4, 5, 6], [10, 11, 12, 13]]


def test_split_takes_each_inner_batch_as_the_pool():
    loader = make(Rows(24), 8, pool="split")
    assert [ids(batch) for batch in loader] == [[3, 4, 5, 6], [10, 11, 12, 13], [17, 18, 19, 20]]
    assert len(loader) == 3
    warm = make(Rows(24), 8, pool="split", warmup_steps=1)
    assert ids(next(iter(warm))) == [0, 1, 2, 3]


@given(
    count=st.integers(1, 60),
    size=st.sampled_from([4, 8, 12]),
    keep=st.sampled_from([0.25, 0.5, 0.75]),
    warmup=st.integers(0, 8),
)
@examples(60)
def test_an_epoch_of_split_pools_is_what_len_says(count, size, keep, warmup):
    loader = make(Rows(count), size, pool="split", keep=keep, warmup_steps=warmup)
    batches, samples = loader.epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if not batches:
            with pytest.raises(EmptyEpoch):
                list(loader)
            return
        handed = [len(ids(batch)) for batch in loader]
    assert (len(handed), sum(handed)) == (batches, samples)
    assert set(handed[:-1]) <= {round(size * keep)}


def test_many_short_batches_do_not_pile_up():
    sizes = [8] + [1] * 3000 + [8]
    inner = [{"x": torch.zeros(n, 8), "labels": torch.zeros(n).long()} for n in sizes]
    loader = SiftingDataLoader.wrap(
        inner, model=classifier(), score_fn=planted, warmup_steps=0, pool="split"
    )
    assert len(list(loader)) == 2


def test_the_length_is_known_once_b_is():
    inner = [{"x": torch.zeros(4, 8), "labels": torch.zeros(4).long()}] * 6
    loader = SiftingDataLoader.wrap(inner, model=classifier(), warmup_steps=0)
    with pytest.raises(TypeError):
        len(loader)
    assert len(list(loader)) == len(loader) == 3


def test_a_batch_sampler_of_ones_own_counts_its_batches():
    class Half:
        batch_size = 4

        def __iter__(self):
            return iter([list(range(i, i + 4)) for i in range(0, 32, 4)])

        def __len__(self):
            return 8

    loader = make(Rows(64), batch_sampler=Half())
    assert len(loader) == len(list(loader)) == 4


def test_the_tail_is_dropped_and_counted():
    loader = make(Rows(19), 4)
    assert len(list(loader)) == len(loader) == 2
    assert loader.stats["tail_dropped"] == 3


def test_an_epoch_that_would_yield_nothing_raises_with_the_arithmetic():
    with pytest.raises(
        EmptyEpoch, match=r"3 rows are drawn.* at least batch_size = 4 \(of 8 wanted\)"
    ):
        list(make(Rows(3), 4))


def test_eval_mode_passes_through_and_counts_no_step():
    model = classifier()
    loader = make(Rows(32), 4, model=model)
    iterator = iter(loader)
    assert len(set(ids(next(iterator))) & {3, 4, 5, 6}) == 4
    model.eval()
    assert ids(next(iterator)) == [8, 9, 10, 11]
    assert loader.stats["steps"] == 1 and not loader.stats["sifting"]
    model.train()
    assert ids(next(iterator)) == [12, 13, 18, 19]
    assert loader.stats["steps"] == 2 and loader.stats["sifting"]


def test_the_cool_down_passes_through():
    loader = make(Rows(64), 4, total_steps=8, cooldown_steps=0.5)
    assert len(loader) == 12
    handed = [ids(batch) for batch in loader]
    assert [len(set(each)) for each in handed] == [4] * 12
    assert handed[4:] == [list(range(start, start + 4)) for start in range(32, 64, 4)]


# Epochs and state


@pytest.mark.parametrize("kind", ["sequential", "shuffled", "generator"])
@given(cuts=st.lists(st.integers(0, 9), max_size=4))
@examples(12)
def test_any_number_of_restarts_changes_nothing(kind, cuts):
    """Law 1, map-style data: saved, reloaded in a new process's stead, wherever it likes."""
    restart_at(kind, cuts)


@given(cuts=st.lists(st.integers(0, 9), max_size=4))
@examples(4, large=12)  # each starts workers several times
def test_any_number_of_restarts_changes_nothing_with_workers(cuts):
    restart_at("workers", cuts)


def restart_at(kind, cuts):
    def fresh() -> SiftingDataLoader:
        torch.manual_seed(99)  # a new process: another global stream, the loop restores none
        settings = {
            "sequential": {},
            "shuffled": {"shuffle": True},
            "generator": {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
            "workers": {"shuffle": True, "num_workers": 1},
        }[kind]
        return make(Rows(61), 4, warmup_steps=3, criterion="random", score_fn=None, **settings)

    torch.manual_seed(7)
    straight_loader = fresh()
    straight = [ids(batch) for batch in straight_loader]
    found, state = [], None
    for cut in [*cuts, 10**6]:
        loader = fresh()
        if state is not None:
            torch.manual_seed(12345)  # whatever the new process did before
            loader.load_state_dict(json.loads(json.dumps(state)))
        iterator = iter(loader)
        for _ in range(cut):
            batch = next(iterator, None)
            if batch is None:
                break
            found.append(ids(batch))
        state = loader.state_dict()
        if len(found) == len(straight):
            break
    assert found == straight


def test_a_restart_skips_indices_and_fetches_nothing_for_them():
    loader = make(Rows(64), 4, True)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    dataset = Rows(64)
    resumed = make(dataset, 4, True)
    resumed.load_state_dict(loader.state_dict())
    assert ids(next(iter(resumed))) == ids(next(iterator))
    assert len(dataset.fetched) == 8


@given(cuts=st.lists(st.integers(0, 12), max_size=5))
@examples(8, large=15)
def test_any_number_of_restarts_changes_nothing_with_shards(cuts):
    model = classifier()

    def fresh() -> SiftingDataLoader:
        shards = TokenShards(DEMO, seed=3, with_ids=True)
        return SiftingDataLoader(
            shards, 64, model=model, warmup_steps=4, criterion="rarity", num_workers=2
        )

    straight_loader = fresh()
    straight = [batch["id"].tolist() for _ in range(2) for batch in straight_loader]
    found, state = [], None
    for cut in [*cuts, 10**6]:
        loader = fresh()
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        left = cut
        while left and len(found) < len(straight):
            for batch in loader:
                found.append(batch["id"].tolist())
                left -= 1
                if not left:
                    break
            # A break inside an epoch: what follows in this process is the next epoch, so stop here.
            if not left:
                break
        state = loader.state_dict()
        if len(found) >= len(straight):
            break
    assert found[: len(straight)] == straight


def test_shards_give_the_same_batches_whatever_the_workers():
    batches = [
        [
            batch["id"].tolist()
            for batch in SiftingDataLoader(
                TokenShards(DEMO, with_ids=True),
                64,
                model=classifier(),
                warmup_steps=2,
                criterion="random",
                num_workers=workers,
            )
        ]
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1]


def test_off_shards_are_the_plain_loader_epoch_after_epoch():
    plain = DataLoader(TokenShards(DEMO), batch_size=64)
    loader = SiftingDataLoader(TokenShards(DEMO), batch_size=64, model=classifier(), keep=1.0)
    assert len(plain) == len(loader)
    for _ in range(2):
        for a, b in zip(plain, loader, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_iter_begins_the_next_epoch_and_set_epoch_overrides():
    def first(loader) -> list[int]:
        return next(iter(loader))["id"].tolist()

    def fresh() -> SiftingDataLoader:
        return SiftingDataLoader(TokenShards(DEMO, with_ids=True), 8, model=classifier(), keep=1.0)

    loader = fresh()
    epochs = [first(loader) for _ in range(3)]
    assert len({tuple(each) for each in epochs}) == 3
    again = fresh()
    again.set_epoch(2)
    assert first(again) == epochs[2]
    again.set_epoch(0)
    assert first(again) == epochs[0]
    assert first(again) == epochs[1]


def test_announcing_the_restored_epoch_keeps_the_place():
    def fresh() -> SiftingDataLoader:
        return SiftingDataLoader(
            TokenShards(DEMO, with_ids=True), 64, model=classifier(), keep=1.0
        )

    loader = fresh()
    loader.set_epoch(1)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    expected = next(iterator)["id"].tolist()
    resumed = fresh()
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert next(iter(resumed))["id"].tolist() == expected


def test_a_distributed_sampler_is_told_the_epoch_and_told_again_on_resume():
    def fresh():
        sampler = DistributedSampler(Rows(64), num_replicas=2, rank=1, seed=4)
        return make(Rows(64), 4, sampler=sampler)

    loader = fresh()
    loader.set_epoch(3)
    iterator = iter(loader)
    next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = ids(next(iterator))
    resumed = fresh()
    resumed.load_state_dict(state)
    assert ids(next(iter(resumed))) == expected


def test_a_restart_leaves_the_global_random_stream_alone():
    loader = make(Rows(64), 4, True)
    next(iter(loader))
    resumed = make(Rows(64), 4, True)
    resumed.load_state_dict(loader.state_dict())
    before = torch.get_rng_state()
    next(iter(resumed))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:resuming by drawing")
@pytest.mark.parametrize("cut", range(6))
def test_half_used_inner_batches_survive_a_restart(cut):
    def fresh() -> SiftingDataLoader:
        sizes, start, inner = [4, 3, 5, 2, 6, 4, 1, 7, 4, 6], 0, []
        for size in sizes:
            x = torch.arange(start, start + size).float()[:, None].expand(-1, 8)
            inner.append({"x": x, "labels": torch.zeros(size, dtype=torch.long)})
            start += size
        return SiftingDataLoader.wrap(inner, model=classifier(), score_fn=planted, warmup_steps=1)

    straight = [ids(batch) for batch in fresh()]
    assert len(straight) == 6
    loader = fresh()
    iterator = iter(loader)
    found = [ids(next(iterator)) for _ in range(cut)]
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert found + [ids(batch) for batch in resumed] == straight


class Stateful(IterableDataset):
    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        while self.position < 64:
            self.position += 1
            yield Rows()[self.position - 1]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_stateful_iterable_resumes_by_its_own_state():
    loader = make(Stateful(), 4)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = ids(next(iterator))
    resumed = make(Stateful(), 4)
    resumed.load_state_dict(state)
    assert ids(next(iter(resumed))) == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_resumes_by_its_own_state():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def fresh() -> SiftingDataLoader:
        inner = torchdata.StatefulDataLoader(Rows(64), batch_size=4, num_workers=0)
        return SiftingDataLoader.wrap(inner, model=classifier(), score_fn=planted, warmup_steps=1)

    loader = fresh()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    expected = [ids(batch) for batch in iterator]
    resumed = fresh()
    resumed.load_state_dict(state)
    assert [ids(batch) for batch in resumed] == expected


def test_a_plain_iterable_is_replayed_with_a_warning_and_an_iterator_is_refused():
    inner = [
        {"x": torch.full((4, 8), float(i)), "labels": torch.zeros(4).long()} for i in range(8)
    ]
    options = {"model": classifier(), "score_fn": planted, "warmup_steps": 0}
    loader = SiftingDataLoader.wrap(inner, **options)
    iterator = iter(loader)
    next(iterator)
    state, expected = loader.state_dict(), ids(next(iterator))
    resumed = SiftingDataLoader.wrap(inner, **options)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="drawing 2 batches of list again"):
        assert ids(next(iter(resumed))) == expected
    with pytest.raises(StateError, match="iterator without state_dict"):
        SiftingDataLoader.wrap(iter(inner), **options).load_state_dict(state)


def test_the_state_counts_what_was_handed_out_after_a_break_and_at_the_end():
    loader = make(Rows(32), 4)
    for _ in loader:
        break
    state = loader.state_dict()
    assert (state["epoch"], state["cursor"]["batches"]) == (0, 2)
    list(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["cursor"]["batches"]) == (2, 0)
    at_the_last = make(Rows(32), 4)
    iterator = iter(at_the_last)
    for _ in range(4):
        next(iterator)
    resumed = make(Rows(32), 4)
    resumed.load_state_dict(at_the_last.state_dict())
    assert list(resumed) == []  # the epoch was over but for its end
    assert len(list(resumed)) == 4


def test_the_length_of_a_resumed_epoch_is_the_whole_epochs():
    loader = make(Rows(64), 4, warmup_steps=4)
    expected = len(loader)
    iterator = iter(loader)
    assert len(loader) == expected
    for _ in range(6):
        next(iterator)
    resumed = make(Rows(64), 4, warmup_steps=4)
    resumed.load_state_dict(loader.state_dict())
    assert len(resumed) == len(loader) == expected == 4 + 6
    assert len(list(resumed)) == 4
    assert len(resumed) == 8


def test_counters_and_random_draws_continue():
    loader = make(Rows(64), 4, criterion="random", score_fn=None)
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = make(Rows(64), 4, criterion="random", score_fn=None)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.stats["steps"] == 2 and resumed.stats["candidates"] == 16
    assert [ids(batch) for batch in resumed] == [ids(batch) for batch in iterator]


REFUSED = [
    ("version", {"version": 5}, "version 5"),
    ("batch size", {"batch_size": 8}, "batch_size 8, this loader has 4"),
    ("keep", {"keep": 0.25}, "keep 0.25"),
    ("ranks", {"ranks": 4}, "4 ranks, 1 run now"),
    ("shards", {"cursor": {"position": 3}}, "saved over TokenShards"),
    ("scores ahead", {"ahead": {"scores": ["1.0"], "missing": [0, 0, 0], "rank": 0}}, "ahead"),
    ("counts ahead", {"ahead": {"scores": [1.0], "missing": [0], "rank": 0}}, "ahead"),
    ("rank ahead", {"ahead": {"scores": [1.0], "missing": [0, 0, 0], "rank": -1}}, "ahead"),
    ("watched", {"watched": 1}, "watched"),
    ("room", {"room": [8, None, -1, 0]}, "room"),
    ("room of nothing", {"room": [None, None, None, 0]}, "room"),
]


@pytest.mark.parametrize(("_name", "change", "text"), REFUSED)
def test_a_state_of_something_else_is_refused(_name, change, text):
    loader = make(Rows(64), 4)
    next(iter(loader))
    with pytest.raises(StateError, match=text):
        make(Rows(64), 4).load_state_dict(loader.state_dict() | change)
    state = loader.state_dict()
    del state["pools"]
    with pytest.raises(StateError, match=r"lacks \['pools'\]"):
        make(Rows(64), 4).load_state_dict(state)


def test_a_state_keeps_the_room_for_labels_that_lie_on_a_gpu():
    loader, again = make(Rows(64), 4), make(Rows(64), 4)
    next(iter(loader))
    state = loader.state_dict() | {"room": [24, 20, 21, 3]}
    again.load_state_dict(state)
    assert again.state_dict()["room"] == [24, 20, 21, 3]


def test_a_state_of_another_seed_is_refused():
    def fresh(seed):
        return SiftingDataLoader(TokenShards(DEMO, seed=seed), 64, model=classifier(), keep=1.0)

    loader = fresh(0)
    next(iter(loader))
    with pytest.raises(StateError, match="seed 0 found, 1 expected"):
        fresh(1).load_state_dict(loader.state_dict())


def test_another_number_of_ranks_continues_shards_and_says_so():
    def fresh(world) -> SiftingDataLoader:
        shards = TokenShards(DEMO, with_ids=True, world=world)
        return SiftingDataLoader(shards, 32, model=classifier(), keep=1.0)

    loaders = [fresh(World(rank, 2)) for rank in range(2)]
    seen = [next(iter(loader))["id"] for loader in loaders]
    state = loaders[0].state_dict() | {"ranks": 2}
    resumed = fresh(World())
    with pytest.warns(UserWarning, match="kept depends on the number of ranks"):
        resumed.load_state_dict(state)
    rest = torch.cat([batch["id"] for batch in resumed])
    everything = torch.cat([*seen, rest]).sort().values
    assert torch.equal(everything, torch.arange(TokenShards(DEMO).total))


# The object


PLAIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader
from siftloader import SiftingDataLoader

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


x = torch.randn(600, 4)
y = (x @ torch.randn(4, 3)).argmax(1)
dataset = {DATASET}
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
{LOADER}
steps = 0
for epoch in range(8):
    for batch in loader:
        {INPUTS}
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
accuracy = (model(x).argmax(1) == y).float().mean().item()
"""
KINDS = {
    "dict": (
        '[{"x": a, "labels": b} for a, b in zip(x, y)]',
        'inputs, labels = batch["x"], batch["labels"]',
    ),
    "tuple": ("torch.utils.data.TensorDataset(x, y)", "inputs, labels = batch"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_script_changes_in_one_line(kind):
    dataset, inputs = KINDS[kind]
    line = "loader = DataLoader(dataset, batch_size=20, shuffle=True)"
    plain = PLAIN.replace("{DATASET}", dataset).replace("{INPUTS}", inputs)
    plain = plain.replace("{LOADER}", line)
    sifted = plain.replace(
        line,
        "loader = SiftingDataLoader(dataset, batch_size=20, shuffle=True, model=model, "
        "exit_layer=1, warmup_steps=10)",
    )
    changed = [
        row
        for row in difflib.unified_diff(plain.splitlines(), sifted.splitlines(), n=0)
        if row[0] in "+-" and row[:3] not in ("+++", "---")
    ]
    assert len(changed) == 2 and all("loader = " in row for row in changed)
    before, after = {}, {}
    exec(compile(plain, "plain", "exec"), before)
    exec(compile(sifted, "sifted", "exec"), after)
    assert before["steps"] == 240
    assert after["steps"] == after["loader"].stats["steps"] == 20 + 7 * 15
    stats = after["loader"].stats
    assert stats["score_kept"] > stats["score_dropped"] and stats["sifting"]
    assert before["accuracy"] > 0.9
    assert after["accuracy"] > 0.8  # half the updates


def test_the_loader_is_a_dataloader_of_finished_batches():
    loader = make(Rows(32), 4)
    assert isinstance(loader, DataLoader) and loader.batch_size is None
    assert len(loader.dataset) == 16
    rebuilt = DataLoader(loader.dataset, batch_size=None)  # what some frameworks do
    assert [ids(batch) for batch in rebuilt] == [[3, 4, 5, 6], [10, 11, 12, 13]] + [
        ids(batch) for batch in list(make(Rows(32), 4))[2:]
    ]


def test_positions_are_torchs():
    loader = SiftingDataLoader(Rows(40), 4, True, model=classifier(), warmup_steps=0)
    assert len(loader) == 5
    assert sorted(i for batch in loader for i in ids(batch)) != list(range(20))
    sampler = torch.utils.data.BatchSampler(range(40), 5, False)
    by_sampler = make(Rows(40), batch_sampler=sampler)
    assert [len(ids(batch)) for batch in by_sampler] == [5] * 4 and len(by_sampler) == 4


def test_wrap_takes_any_iterable_and_learns_b_from_its_first_batch():
    inner = [(torch.full((6, 8), float(i)), torch.zeros(6).long()) for i in range(6)]
    loader = SiftingDataLoader.wrap(inner, model=classifier(), warmup_steps=0)
    with pytest.raises(TypeError, match="not known before"):
        len(loader)
    handed = list(loader)
    assert [type(batch) for batch in handed] == [tuple] * 3
    assert all(len(batch[0]) == 6 for batch in handed)
    assert (
        len(
            list(
                SiftingDataLoader.wrap(DataLoader(Rows(64), 8), model=classifier(), warmup_steps=0)
            )
        )
        == 4
    )


def test_a_data_set_is_no_loader():
    with pytest.raises(TypeError, match="data set of samples"):
        SiftingDataLoader.wrap(TokenShards(DEMO), model=classifier())
    with pytest.raises(TypeError, match="loader as it is"):
        SiftingDataLoader.wrap([], model=classifier(), batch_size=4)


def test_every_kind_of_batch_comes_out_as_it_went_in():
    Pair = namedtuple("Pair", ["x", "labels"])
    x, y = torch.randn(8, 8), torch.zeros(8).long()
    texts = [f"text {i}" for i in range(8)]
    for batch in ({"x": x, "labels": y, "text": texts}, (x, y), [x, y], Pair(x, y)):
        (out,) = list(
            SiftingDataLoader.wrap(
                [select_rows(batch, 0, 4), select_rows(batch, 4, 8)],
                model=classifier(),
                warmup_steps=0,
            )
        )
        assert type(out) is type(batch)
        first = out["x"] if isinstance(out, dict) else out[0]
        assert len(first) == 4
        if isinstance(out, dict):
            rows = [int((x == row).all(1).nonzero()) for row in first]
            assert out["text"] == [f"text {i}" for i in rows] and rows == sorted(rows)


def select_rows(batch, start, stop):
    from siftloader.batches import cut

    return cut(batch, start, stop)


def test_the_model_may_be_found_later_and_reattached():
    holder = {}
    loader = SiftingDataLoader(Rows(32), 4, model=lambda: holder["model"], warmup_steps=0)
    holder["model"] = classifier()
    first = [ids(batch) for batch in loader]
    torch.manual_seed(42)
    holder["model"] = classifier()
    assert [ids(batch) for batch in loader] != first
    loader.attach_model(classifier())
    assert len(list(loader)) == 4


def test_data_parallel_wrappers_are_seen_through():
    model = classifier()
    loader = SiftingDataLoader(Rows(32), 4, model=nn.DataParallel(model), warmup_steps=0)
    expected = SiftingDataLoader(Rows(32), 4, model=model, warmup_steps=0)
    assert [ids(a) for a in loader] == [ids(b) for b in expected]


def test_the_first_batch_of_the_warm_up_is_test_scored():
    class Broken(Classifier):
        def forward(self, x):
            return super().forward(x).sum()

    loader = SiftingDataLoader(Rows(32), 4, model=Broken(), warmup_steps=1000)
    with pytest.raises(ScoringError, match="without logits"):
        next(iter(loader))
    silent = SiftingDataLoader(Rows(32), 4, model=Broken(), keep=1.0)
    assert len(list(silent)) == 8


def test_short_runs_and_forgotten_train_modes_are_told():
    with pytest.warns(UserWarning, match=r"inside the warm-up \(8 of 1000 steps\)"):
        list(make(Rows(32), 4, warmup_steps=1000))
    with pytest.warns(UserWarning, match="eval mode"):
        list(make(Rows(32), 4, model=classifier().eval()))
    with pytest.warns(UserWarning, match="eval mode"):  # not: lower warmup_steps
        list(make(Rows(32), 4, model=classifier().eval(), warmup_steps=2))


def test_a_loop_that_never_ends_its_epoch_is_told_of_eval_mode_too():
    iterator = iter(make(Rows(1000), 4, model=classifier().eval()))
    with pytest.warns(UserWarning, match="eval mode"):
        for _ in range(100):
            next(iterator)


def test_an_evaluation_after_training_is_no_reason_to_warn():
    model = classifier()
    loader = make(Rows(32), 4, model=model)
    list(loader)
    model.eval()
    assert len(list(loader)) == 8


class Custom:
    """torch's own pattern for a batch of a class of its own."""

    def __init__(self, samples) -> None:
        self.x = torch.stack([sample["x"] for sample in samples])

    def pin_memory(self):
        return self


def test_batches_of_an_unknown_class_pass_through_but_cannot_be_sifted():
    loader = make(Rows(32), 4, collate_fn=Custom, keep=1.0)
    assert [type(batch) for batch in loader] == [Custom] * 8
    assert [type(batch) for batch in make(["a"] * 8, 4, keep=1.0)] == [list] * 2
    with pytest.raises(BatchError, match="type Custom"):
        next(iter(make(Rows(32), 4, collate_fn=Custom)))


def test_random_needs_no_labels_and_neither_does_eval_mode():
    x = [{"x": torch.full((8,), float(i))} for i in range(32)]
    assert len(list(make(x, 4, criterion="random", score_fn=None))) == 4
    model = classifier().eval()
    with pytest.warns(UserWarning, match="eval mode"):
        assert len(list(make(x, 4, criterion="loss", score_fn=None, model=model))) == 8
    with pytest.raises(ScoringError, match=r"no labels in a dict with fields \['x'\]"):
        next(iter(make(x, 4, criterion="loss", score_fn=None)))


@pytest.mark.parametrize("criterion", ["loss", "entropy", "random"])
def test_no_criterion_lets_a_row_without_labels_win(criterion):
    batch = candidates("bert", 8)
    batch["labels"][:6] = -100
    sifter = Sifter(bert(), criterion=criterion, keep=0.25)
    kept = sifter(batch)
    assert torch.equal(kept["input_ids"], batch["input_ids"][6:])
    assert sifter.stats["unlabelled"] == 6 and sifter.stats["nonfinite"] == 0


def test_strings_and_lists_of_tensors_stay_with_their_rows():
    class Told(Rows):
        def __getitem__(self, index):
            return torch.full((8,), float(index)), f"name {index}", torch.tensor(index % 10)

    for batch in make(Told(32), 4, score_fn=lambda early, batch: batch[0][:, 0] % 7):
        assert list(batch[1]) == [f"name {i}" for i in batch[0][:, 0].long().tolist()]

    def ragged(samples):
        sizes = [int(sample["x"][0]) % 5 + 1 for sample in samples]
        return {**default_collate(samples), "var": [torch.ones(size) for size in sizes]}

    for batch in make(Rows(32), 4, collate_fn=ragged):
        assert [len(each) for each in batch["var"]] == [i % 5 + 1 for i in ids(batch)]


def test_a_data_set_that_reuses_its_buffer_is_not_mistaken_for_two_draws():
    class Reusing(IterableDataset):
        def __iter__(self):
            buffer = {"x": torch.zeros(4, 8), "labels": torch.zeros(4, dtype=torch.long)}
            for start in (0, 4, 8, 12):
                buffer["x"][:] = torch.arange(start, start + 4.0)[:, None]
                yield buffer

    assert [ids(batch) for batch in make(Reusing(), batch_size=None)] == [
        [3, 4, 5, 6],
        [10, 11, 12, 13],
    ]


def test_a_dropped_batch_does_not_live_on_in_the_loader():
    iterator = iter(make(Rows(64), 4))
    batch = next(iterator)
    alive = weakref.ref(batch["x"])
    del batch
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "loader", [5, {"input_ids": torch.zeros(2)}, torch.zeros(4), "text", lambda: iter([])]
)
def test_wrap_refuses_what_is_no_iterable_of_batches(loader):
    with pytest.raises(TypeError, match="wrap takes an iterable of batches"):
        SiftingDataLoader.wrap(loader, model=classifier())


def test_shards_need_a_batch_size_of_their_own():
    with pytest.raises(ValueError, match=r"wrap\(shards\.batches\(n\)"):
        SiftingDataLoader(TokenShards(DEMO), batch_size=None, model=classifier())


def test_on_select_sees_every_pool():
    seen = []
    loader = make(Rows(24), 4, on_select=lambda *args: seen.append(args))
    handed = list(loader)
    assert [len(each[0]) for each in seen] == [8, 8, 8]
    assert seen[1][0].tolist() == list(range(8, 16))
    for (numbers, scores, kept), batch in zip(seen, handed, strict=True):
        assert numbers[kept].tolist() == ids(batch)
        assert torch.equal(scores, (numbers % 7).float())


def logged(folder, column: str) -> list:
    tables = pytest.importorskip("pyarrow.parquet")
    return tables.read_table(folder)[column].to_pylist()


OWN_FIELDS = {
    "int64 id": ("id", torch.arange(16) * 3, True),
    "int16 id": ("id", torch.arange(16).short() * 3, True),
    "float id": ("id", torch.arange(16) / 2, False),
    "bool id": ("id", torch.arange(16) > 8, False),
    "two ids a row": ("id", torch.arange(32).view(16, 2), False),
    "names": ("id", [f"n{i}" for i in range(16)], False),
    "int64 source": ("source", torch.arange(16) % 3, True),
    "float source": ("source", torch.rand(16), False),
    "complex source": ("source", torch.complex(torch.rand(16), torch.rand(16)), False),
}


@pytest.mark.parametrize("kind", OWN_FIELDS)
def test_fields_of_ones_own_under_known_names_harm_nobody(kind, tmp_path):
    field, values, known = OWN_FIELDS[kind]
    batch = {"x": torch.rand(16, 8), "labels": torch.zeros(16).long(), field: values}
    seen = []
    loader = SiftingDataLoader.wrap(
        [select_rows(batch, 0, 8), select_rows(batch, 8, 16)],
        model=classifier(),
        warmup_steps=0,
        on_select=lambda numbers, scores, kept: seen.extend(numbers.tolist()),
        log_selections=tmp_path,
    )
    (handed,) = list(loader)
    assert len(handed[field]) == 8
    unknown = list(range(16)) if field == "id" else [-1] * 16
    found = logged(tmp_path, field)
    assert found == (values.tolist() if known else unknown)
    assert field == "source" or seen == found


def test_a_source_that_the_log_has_no_room_for_is_unknown(tmp_path):
    sources = torch.tensor([0, 2**31 - 1, 2**31, 2**40, -(2**40), 5, -1, 7])
    batch = {"x": torch.rand(8, 8), "labels": torch.zeros(8).long(), "source": sources}
    options = {"warmup_steps": 0, "pool": "split", "log_selections": tmp_path}
    list(SiftingDataLoader.wrap([batch], model=classifier(), **options))
    assert logged(tmp_path, "source") == [0, 2**31 - 1, -1, -1, -1, 5, -1, 7]


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_batch_without_tensors_is_given_back_as_it_was(keep):
    batch = {"x": np.arange(32.0).reshape(4, 8)}
    settings = {"output_device": "inner", "pool": "split", "criterion": "random"}
    loader = SiftingDataLoader.wrap(
        [batch] * 2, model=classifier(), keep=keep, warmup_steps=0, **settings
    )
    handed = list(loader)
    assert [type(each["x"]) for each in handed] == [np.ndarray] * 2
    assert [len(each["x"]) for each in handed] == [4 * keep] * 2


def test_stats_are_a_plain_dict_that_any_logger_takes():
    loader = make(Rows(40), 4, warmup_steps=2)
    list(loader)
    stats = loader.stats
    json.dumps(stats)
    assert (stats["steps"], stats["samples"], stats["candidates"], stats["kept"]) == (
        6,
        24,
        32,
        16,
    )
    assert stats["score_kept"] >= stats["threshold"] >= stats["score_dropped"]
    assert stats["seconds_scoring"] > 0 and stats["epoch"] == 1


def test_the_model_is_never_pickled():
    with pytest.raises(TypeError, match="save state_dict"):
        pickle.dumps(make(Rows(32), 4))


def test_unsharded_data_on_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="every rank would train on the same samples"):
        iter(make(Rows(32), 4))
    sharded = DistributedSampler(Rows(32), num_replicas=2, rank=1)
    assert len(list(make(Rows(32), 4, sampler=sharded))) == 2
    inner = DataLoader(Rows(32), 4)
    declared = SiftingDataLoader.wrap(
        inner, model=classifier(), sharded=True, score_fn=planted, warmup_steps=0
    )
    assert len(list(declared)) == 4
    shards = SiftingDataLoader(TokenShards(DEMO), 64, model=classifier(), keep=1.0)
    assert len(list(shards)) == -(-len(TokenShards(DEMO)) // 64)


def test_a_break_leaves_no_thread_behind():
    before = set(threading.enumerate())
    for _ in range(3):
        for _ in SiftingDataLoader(TokenShards(DEMO), 8, model=classifier(), keep=1.0):
            break
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # it ends with what it is at
        assert not thread.is_alive(), thread


def test_an_error_in_the_data_arrives_in_the_loop():
    class Failing(Rows):
        def __getitem__(self, index):
            if index == 9:
                raise RuntimeError("row 9 is broken")
            return super().__getitem__(index)

    iterator = iter(make(Failing(32), 4, warmup_steps=99))
    next(iterator), next(iterator)
    with pytest.raises(RuntimeError, match="row 9"):
        next(iterator)


BAD = [
    ("keep", {"keep": 0.3}, ValueError, "whole number of rows"),
    ("pool", {"pool": "both"}, ValueError, '"merge" or "split"'),
    ("output", {"output_device": "cpu"}, ValueError, '"inner"'),
    ("a class", {"criterion": Loss, "score_fn": None}, TypeError, r"Loss\(\), with brackets"),
    ("another class", {"selection": TopK}, TypeError, r"TopK\(\), with brackets"),
    ("keep as text", {"keep": "0.5"}, ValueError, "must be a number"),
    ("layer", {"exit_layer": 9, "score_fn": None}, ScoringError, r"1\.\.4"),
    ("cooldown", {"cooldown_steps": 3}, ValueError, "needs total_steps"),
    ("torch's own", {"bogus": 3}, TypeError, "bogus"),
    ("torch's own value", {"num_workers": -1}, ValueError, "num_workers"),
]


@pytest.mark.parametrize(("_name", "options", "error", "text"), BAD)
def test_wrong_arguments_fail_at_construction(_name, options, error, text):
    with pytest.raises(error, match=text):
        make(Rows(32), 4, **options)


def test_global_random_streams_are_left_alone():
    random.seed(1), np.random.seed(1)  # noqa: NPY002 - the global stream is what is checked
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(SiftingDataLoader(Rows(64), 4, model=classifier(), warmup_steps=0, criterion="random"))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


class Letters(Rows):
    """Not shards, but it says how many token ids there are."""

    vocab_size = VOCAB + 1


UNFIT = rf"{VOCAB + 1} token ids.*embeds only {VOCAB}: .*vocab_size={VOCAB + 1} or more"


def test_a_model_with_fewer_embeddings_than_token_ids_is_refused_at_construction():
    with pytest.raises(
        ValueError, match=r"^tokenizer '.*' of shards.demo has \d+ token ids, .*only 97: "
    ):
        SiftingDataLoader(TokenShards(DEMO), 4, model=bert())
    for off in ({}, {"keep": 1.0}, {"criterion": "random"}):
        with pytest.raises(ValueError, match=UNFIT):
            make(Letters(), 4, model=bert(), **off)
    with pytest.raises(ValueError, match=UNFIT):
        SiftingDataLoader.wrap(DataLoader(Letters(), 4), model=bert())


def test_a_model_found_later_is_refused_before_its_first_batch():
    dataset = Letters()
    loader = make(dataset, 4, model=bert, keep=1.0)
    with pytest.raises(ValueError, match=UNFIT):
        next(iter(loader))
    assert dataset.fetched == []
    loader = make(dataset, 4)  # a classifier embeds nothing
    assert len(next(iter(loader))["x"]) == 4
    with pytest.raises(ValueError, match=UNFIT):
        loader.attach_model(bert())


def test_more_embeddings_than_token_ids_are_fine_and_looked_at_once():
    dataset, looked = Letters(), []
    dataset.vocab_size = VOCAB - 1
    model = bert()
    embedding = model.get_input_embeddings()

    class Counted:
        weight = embedding.weight

        @property
        def num_embeddings(self) -> int:
            looked.append(1)
            return VOCAB

    model.get_input_embeddings = Counted
    assert len(list(make(dataset, 4, model=lambda: model, keep=1.0))) == 25
    assert len(looked) == 1


def test_another_iterator_inside_the_loop_is_told():
    loader = make(Rows(64), 4)
    outer = iter(loader)
    next(outer)
    next(iter(loader))
    with pytest.warns(UserWarning, match="another iterator of this loader was begun"):
        next(outer)
    next(outer)  # once


def test_what_sifts_already_is_not_sifted_twice():
    loader = make(Rows(64), 4)
    with pytest.raises(ValueError, match="sifts already"):
        SiftingDataLoader.wrap(loader, model=classifier())


def test_an_iterator_that_is_spent_is_named():
    inner = iter(DataLoader(Rows(32), 4))
    loader = SiftingDataLoader.wrap(inner, model=classifier(), warmup_steps=0)
    assert len(list(loader)) == 4
    with pytest.raises(EmptyEpoch, match="it gives one epoch only"):
        list(loader)
