"""Several sets in one stream, epochs of any length, and lanes: what TokenShards makes of them."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import classifier
from test_stream import SPECIAL, V, make, opened, row, rows, write  # noqa: F401
from torch.utils.data import DataLoader

from siftloader import SiftingDataLoader, TokenShards
from siftloader.coverage import Coverage
from siftloader.errors import RanksDisagree, ShardError, StateError
from siftloader.shards import ShardSet
from siftloader.world import World


@pytest.fixture
def two(make):  # noqa: F811
    return {make((5, 7, 3, 6)): 3.0, make((9, 1, 1, 14, 2, 1)): 1.0}


def mixed(two, **options) -> TokenShards:
    return TokenShards.mix(two, with_ids=True, with_source=True, window=2, **options)


def ids(shards: TokenShards) -> list[int]:
    return [one for batch in shards.batches(5) for one in batch["id"].tolist()]


def test_ids_say_the_set_and_the_sample_and_rows_are_those_of_the_set(two):
    known = {
        (number, dict(one)["id"]): dict(one)
        for number, folder in enumerate(two)
        for batch in opened(folder, masking=None).batches(7)
        for one in rows(batch)
    }
    found = [dict(one) for batch in mixed(two, masking=None).batches(7) for one in rows(batch)]
    assert len(found) == 21 + 28 and {one["id"] >> 40 for one in found} == {0, 1}
    for one in found:
        number, sample = one["id"] >> 40, one["id"] % 2**40
        there = known[number, sample]
        assert one["input_ids"] == there["input_ids"]
        assert one["source"] == 3 * number + there["source"]


def test_a_set_comes_round_before_a_sample_of_it_comes_again_and_with_other_masks(two):
    shards = mixed(two, epoch_samples=200)
    seen: dict[int, list] = {}
    for _ in range(2):
        for batch in shards.batches(8):
            for one in rows(batch):
                seen.setdefault(dict(one)["id"], []).append(dict(one)["labels"])
    counts = Counter({0: 0, 1: 0})
    for number, size in ((0, 21), (1, 28)):
        times = [len(labels) for one, labels in seen.items() if one >> 40 == number]
        assert len(times) == size and max(times) - min(times) <= 1
        counts[number] = sum(times)
    assert counts[0] / 400 == pytest.approx(0.75, abs=0.05)
    often = [labels for labels in seen.values() if len(labels) >= 8]
    assert all(len(set(labels)) > 1 for labels in often), "masked anew each time"


def test_an_epoch_of_any_length_goes_on_where_the_last_one_ended(make):  # noqa: F811
    folder = make((5, 7, 3, 6))
    plain = opened(folder)
    whole = [row(sample) for _ in range(4) for sample in plain]
    parts = opened(folder, epoch_samples=12)
    assert len(parts) == 12
    assert [row(sample) for _ in range(7) for sample in parts] == whole
    longer = opened(folder, epoch_samples=42)
    assert [row(sample) for _ in range(2) for sample in longer] == whole


@pytest.mark.parametrize("options", [{"lanes": 3}, {"epoch_samples": 31}, {}], ids=str)
def test_a_mix_resumes_anywhere_on_any_ranks(two, options):
    def fresh(world=None):
        return mixed(two, seed=3, world=world, **options)

    straight = [row(sample) for _ in range(2) for sample in fresh(World())]
    length = len(straight) // 2
    for cut in (0, 1, 11, 15):
        readers = [fresh(World(rank, 2)) for rank in range(2)]
        parts = [[row(one) for one in islice(reader, cut)] for reader in readers]
        state = json.loads(json.dumps(readers[1].state_dict()))
        three = [fresh(World(rank, 3)) for rank in range(3)]
        rest = []
        for reader in three:
            reader.load_state_dict(state)
            rest.append([row(one) for one in reader])
        found = [one for pair in zip(*parts, strict=True) for one in pair]
        # Position p belongs to rank p % 3, wherever the resumed epoch began.
        left = straight[2 * cut : length]
        left = left[: len(left) // 3 * 3]
        order = [rest[(2 * cut + i) % 3].pop(0) for i in range(len(left))]
        assert found + order == straight[: 2 * cut] + left
        assert not any(rest)


def test_lanes_give_each_machine_its_share_of_the_shards(tmp_path):
    write(tmp_path / "shards", (8,) * 24, "mlm", SPECIAL)
    whole = None
    for machines in (1, 2, 4):
        shards_of, by_slot = [], {}
        for rank in range(4):
            world = World(rank, 4, machines=machines)
            found = ids(opened(tmp_path / "shards", lanes=4, world=world))
            shards_of.append({one // 8 for one in found})
            by_slot[world.slot] = found
        per_machine = 4 // machines
        for machine in range(machines):
            ranks = range(machine * per_machine, (machine + 1) * per_machine)
            assert len(set().union(*(shards_of[rank] for rank in ranks))) <= 24 / machines + 2
        order = [one for step in zip(*(by_slot[s] for s in range(4)), strict=True) for one in step]
        whole = whole or order
        assert order == whole, "the global order does not depend on the machines"
    assert sorted(whole) == list(range(192))


def test_a_slot_is_the_rank_on_one_machine_and_without_lanes(make):  # noqa: F811
    assert [World(rank, 6).slot for rank in range(6)] == list(range(6))
    assert [World(rank, 6, machines=3).slot for rank in range(6)] == [0, 3, 1, 4, 2, 5]
    plain = ids(opened(make((40, 40, 3)), world=World(1, 4)))
    assert ids(opened(make((40, 40, 3)), world=World(1, 4, machines=2))) == plain
    with pytest.raises(ValueError, match="4 ranks on 3 machines"):
        World(0, 4, machines=3)


def test_machines_are_found_where_the_launcher_tells(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert World.detect() == World(5, 8, machines=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert World.detect().machines == 1


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((3, 1), {"lanes": 2}, "lanes 2 found, 1 expected"),
        ((1, 1), {}, r"weights \[1.0, 1.0\] found, \[3.0, 1.0\] expected"),
        ((3, 1), {"epoch_samples": 30}, "samples 30 found, 49 expected"),
        ((3, 1), {"seed": 4}, "seed 4 found, 0 expected"),
    ],
    ids=str,
)
def test_a_state_of_another_mix_is_refused(two, weights, options, message):
    saved = mixed(dict(zip(two, weights, strict=True)), **options).state_dict()
    with pytest.raises(StateError, match=message):
        mixed(two).load_state_dict(saved)


def test_another_order_of_the_sets_is_another_mix(two):
    backwards = dict(reversed([*dict.fromkeys(two, 1.0).items()]))
    with pytest.raises(StateError, match="fingerprint"):
        mixed(dict.fromkeys(two, 1.0)).load_state_dict(mixed(backwards).state_dict())


def test_what_differs_may_be_overridden_by_name(make):  # noqa: F811
    saved = {**opened(make(), seed=1).state_dict(), "epoch": 2, "position": 5}
    shards = opened(make())
    with pytest.raises(StateError, match=r"override=\{'seed'\}"):
        shards.load_state_dict(saved)
    shards.load_state_dict(saved, override={"seed"})
    assert shards.upcoming() == (2, 5)
    with pytest.raises(ValueError, match="override names some of"):
        shards.load_state_dict(saved, override={"position"})


def test_a_state_of_the_first_version_is_read(make):  # noqa: F811
    shards = opened(make())
    state = {
        k: v for k, v in shards.state_dict().items() if k not in ("lanes", "weights", "samples")
    }
    shards.load_state_dict({**state, "version": 1, "epoch": 1, "position": 4})
    assert shards.upcoming() == (1, 4)
    with pytest.raises(StateError, match="lanes 1 found, 2 expected"):
        opened(make(), lanes=2).load_state_dict({**state, "version": 1})
    with pytest.raises(
        StateError, match="samples 21 found, 12 expected"
    ):  # an epoch was all of them
        opened(make(), epoch_samples=12).load_state_dict({**state, "version": 1})


def test_all_that_differs_is_told_at_once_and_can_be_overridden_at_once(make):  # noqa: F811
    other = opened(make((40, 40, 3)), window=3)
    saved = {**other.state_dict(), "epoch": 2, "position": 20}
    shards = opened(make())
    with pytest.raises(
        StateError, match=r"fingerprint .* \(window and samples differ, too\); .*"
    ) as caught:
        shards.load_state_dict(saved)
    assert "override={'fingerprint', 'window', 'samples'}" in str(caught.value)
    with pytest.raises(
        StateError, match=r"window 3 found, 2 .*override={'fingerprint', 'window', 's"
    ):
        shards.load_state_dict(saved, override={"fingerprint", "samples"})
    shards.load_state_dict(saved, override={"fingerprint", "window", "samples"})
    assert shards.upcoming() == (2, 20)
    with pytest.raises(
        StateError, match=r"position 60 found, but an epoch has 21 samples here; .*set_epoch"
    ):
        shards.load_state_dict(
            {**saved, "position": 60}, override={"fingerprint", "window", "samples"}
        )
    with pytest.raises(StateError, match="samples 'all' found, a whole number"):
        shards.load_state_dict({**saved, "samples": "all"}, override={*shards.identity()})
    with pytest.raises(StateError, match=r"epoch .* found, a whole number from 0 to"):
        shards.load_state_dict({**shards.state_dict(), "epoch": 1 << 61})
    shards.load_state_dict({**opened(make(), seed=1).state_dict()}, override="seed")


def test_weights_that_went_through_a_tuple_are_the_same(two):
    shards = mixed(two)
    shards.load_state_dict({**shards.state_dict(), "weights": (3, 1), "position": 7})
    assert shards.upcoming() == (0, 7)


def test_sets_that_differ_cannot_be_mixed(make, tmp_path):  # noqa: F811
    with pytest.raises(ShardError, match="differ in objective"):
        TokenShards.mix({make(): 1, make((5, 7, 3, 6), "clm"): 1})
    other = write(tmp_path / "other", (5,), "mlm", {**SPECIAL, "mask": 5})
    with pytest.raises(ShardError, match="differ in tokenizer"):
        TokenShards.mix({make(): 1, other: 1})


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((1, 0), {}, "positive"),
        ((1, 1), {"split": "val"}, "open each set by itself"),
        ((1, 1), {"lanes": 0}, "lanes must be at least 1"),
        ((1, 1), {"epoch_samples": 0}, "at least 1 sample"),
    ],
    ids=str,
)
def test_wrong_mixes_are_refused(two, weights, options, message):
    with pytest.raises(ValueError, match=message):
        TokenShards.mix(dict(zip(two, weights, strict=True)), **options)


def test_a_mix_needs_a_weight_for_every_set(two):
    with pytest.raises(TypeError, match=r"mix takes \{folder: weight\}, got list"):
        TokenShards.mix([*two])


def test_a_mix_is_described_by_what_its_sets_have_in_common(two):
    shards = mixed(two)
    assert (shards.vocab_size, len(shards.sources), len(shards.shard_sets)) == (V, 6, 2)
    each = [ShardSet.open(folder).unigrams for folder in two]
    expected = (0.75 * each[0] / each[0].sum() + 0.25 * each[1] / each[1].sum()) * sum(
        int(one.sum()) for one in each
    )
    assert np.abs(shards.unigrams - expected).max() <= 1
    with pytest.raises(ShardError, match="a mix of 2 sets"):
        shards.shard_set  # noqa: B018
    with pytest.raises(ShardError, match="a mix of 2 sets"):
        shards.bigrams  # noqa: B018


def test_a_mix_is_sifted(two):
    loader = SiftingDataLoader(
        mixed(two, epoch_samples=64), 8, model=classifier(), criterion="rarity", warmup_steps=1
    )
    batches = [batch["id"].tolist() for batch in loader]
    assert {one >> 40 for batch in batches for one in batch} == {0, 1}
    again = SiftingDataLoader(
        mixed(two, epoch_samples=64), 8, model=classifier(), criterion="rarity", warmup_steps=1
    )
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) > 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"lanes": 3}, {"epoch_samples": 31}], ids=str)
def test_what_all_ranks_were_given_adds_up_whoever_they_are_and_after_restarts(
    two, ranks, options
):
    total = None
    for cut in (0, 5):
        found = Coverage()
        state = None
        for rank in range(ranks):
            shards = mixed(two, world=World(rank, ranks), **options)
            stream = shards.batches(1)
            list(islice(stream, cut))
            state = state or shards.state_dict()
            resumed = mixed(two, world=World(rank, ranks), **options)
            resumed.load_state_dict(state)
            list(resumed.batches(4))
            found += resumed.coverage()
        size = mixed(two, world=World(), **options).total // ranks * ranks
        total = total or mixed(two, world=World(), **options).expected_coverage(0, size)
        assert found == total, cut


def test_coverage_takes_ids_as_they_come(make):  # noqa: F811
    shards = opened(make())
    (batch,) = shards.batches(21)
    assert Coverage.of(batch["id"]) == shards.coverage() == shards.expected_coverage(0)
    for samples in (-1, 22):
        with pytest.raises(ValueError, match=f"samples must lie in 0..21, got {samples}"):
            shards.expected_coverage(0, samples)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_mix_in_lanes_resumes_through_a_stateful_loader(two, workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        shards = mixed(two, lanes=3, epoch_samples=31)
        return torchdata.StatefulDataLoader(shards, batch_size=4, num_workers=workers)

    straight = [batch["id"].tolist() for batch in loader()]
    for cut in (1, 3, len(straight) - 1):
        first, second = loader(), loader()
        for _ in islice(first, cut):
            pass
        second.load_state_dict(
            json.loads(json.dumps(first.state_dict())) if not workers else first.state_dict()
        )
        assert [batch["id"].tolist() for batch in second] == straight[cut:]


def test_a_simulated_worker_is_not_read_by_several_real_ones(make):  # noqa: F811
    shards = opened(make(), world=World(worker=0, workers=2))
    with pytest.raises(ValueError, match="world has a worker of its own"):
        next(iter(DataLoader(shards, batch_size=4, num_workers=2)))


def test_a_lost_or_doubled_sample_changes_the_coverage():
    whole = np.arange(1000)
    assert Coverage.of(whole[:400]) + Coverage.of(whole[400:]) == Coverage.of(whole[::-1])
    others = [
        np.delete(whole, 7),
        np.append(whole, 7),
        np.where(whole == 7, 8, whole),
        np.where(whole == 7, 6, np.where(whole == 8, 9, whole)),
    ]
    digests = {Coverage.of(each).digest for each in (whole, *others)}
    assert len(digests) == 5
    assert Coverage.of(whole) + Coverage() == Coverage.of(whole)
    assert len({Coverage.of(np.array([i])).digest for i in range(5000)}) == 5000


@pytest.fixture
def group(monkeypatch):
    """The store of a process group of two ranks; gives the first and the second of them the word."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("siftloader.world._store", lambda: store)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def speak(rank: int):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("siftloader.stream._STREAMS", count())

    return speak


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"rank 1 of 2 .*seed 1 \(there 0\)"),
        ({"window": 4}, r"window 4 \(there 2\)"),
        ({"lanes": 2}, r"lanes 2 \(there 1\)"),
        ({"counts": (40, 40, 3)}, r"fingerprint '.*' \(there '.*'\), samples 83 \(there 21\)"),
        ({"state": True}, r"position 8 \(there 0\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sifted", [False, True])
def test_ranks_that_read_something_else_are_told(make, group, change, message, sifted):  # noqa: F811
    def begin(counts=(5, 7, 3, 6), state=False, **options):
        shards = opened(make(counts), **options)
        if state:
            shards.load_state_dict({**shards.state_dict(), "position": 8})
        if not sifted:
            return next(iter(shards))
        loader = SiftingDataLoader(shards, 2, model=classifier(), criterion="rarity")
        return next(iter(loader))

    group(0)
    begin()
    group(1)
    with pytest.raises(RanksDisagree, match=message):
        begin(**change)
    group(1)
    begin()


def test_a_loader_worker_asks_nobody(make, group, monkeypatch):  # noqa: F811
    """Forked, it would talk over its parent's connection."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("siftloader.world._store", lambda: store)
    group(0)
    list(DataLoader(opened(make()), batch_size=None, num_workers=1))
    assert store.num_keys() == 0
    group(1)
    next(iter(opened(make())))
    assert store.num_keys() == 1


def test_one_rank_alone_reads_the_validation_split_or_a_world_of_its_own(make, group):  # noqa: F811
    group(0)
    next(iter(opened(make(), seed=3)))
    group(1)
    next(iter(opened(make(), split="val")))
    next(iter(opened(make(), seed=5, world=World(0, 2))))


def sifting(two, rank=0, ranks=1, **options) -> SiftingDataLoader:
    shards = mixed(two, world=World(rank, ranks), epoch_samples=100, lanes=2)
    options = {"model": classifier(), "criterion": "random", "warmup_steps": 3} | options
    return SiftingDataLoader(shards, 6, **options)


@pytest.mark.parametrize("options", [{}, {"keep": 0.3}, {"drop_last": True}, {"pool": "split"}])
@pytest.mark.filterwarnings("ignore:the epoch ended inside")
def test_a_loader_tells_which_candidates_it_used_at_any_batch_and_after_restarts(two, options):
    loader, shards = sifting(two, **options), mixed(two, epoch_samples=100, lanes=2)
    assert loader.coverage() == Coverage()
    for epoch in range(2):
        for _ in loader:
            cursor = loader.state_dict()["cursor"]
            expected = shards.expected_coverage(epoch, cursor["position"])
            assert loader.coverage() == expected, "all that was drawn is below the position"
            again = sifting(two, **options)
            again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            assert again.coverage() == expected
        used = loader.coverage()
        assert used == expected, "after its end, that of the epoch that ended"
        rest = list(again)
        assert again.coverage() == used and not rest
        first = next(iter(sifting(two, **options)))  # another loader's batches are not counted
        assert first and loader.coverage() == used


def test_what_the_loaders_of_all_ranks_used_adds_up_also_on_other_ranks(two):
    found, states = Coverage(), []
    for rank in range(2):
        loader = sifting(two, rank, 2)
        list(islice(loader, 4))
        states.append(loader.state_dict()["cursor"])
        found += loader.coverage()
    position = states[0]["position"]
    shards = mixed(two, epoch_samples=100, lanes=2)
    assert states[0] == states[1] and found == shards.expected_coverage(0, position)
    state = loader.state_dict()
    found = Coverage()
    for rank in range(3):
        loader = sifting(two, rank, 3)
        loader.load_state_dict(state)
        list(loader)
        found += loader.coverage()
        dropped = loader.stats["tail_dropped"]
    total = 100 - (100 - position) % 3
    assert found == shards.expected_coverage(0, total - 3 * dropped)


def test_a_batch_that_failed_is_not_covered_and_another_kind_of_data_has_none(two):
    loader = sifting(two, on_select=lambda ids, scores, kept: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loader)
    position = loader.state_dict()["cursor"]["position"]
    assert loader.coverage() == mixed(two, epoch_samples=100, lanes=2).expected_coverage(
        0, position
    )
    wrapped = SiftingDataLoader.wrap([{"x": torch.ones(2, 1)}], model=classifier(), keep=1.0)
    with pytest.raises(TypeError, match=r"coverage\(\) is known over TokenShards only"):
        wrapped.coverage()


def test_a_loader_whose_state_was_overridden_saves_one_that_fits(two):
    def seeded(seed):
        shards = mixed(two, seed=seed)
        return SiftingDataLoader(shards, 6, model=classifier(), keep=1.0)

    loader, other = seeded(0), seeded(1)
    list(islice(loader, 2))
    with pytest.raises(StateError, match=r"seed 0 found, 1 expected"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(loader.state_dict(), override={"seed"})
    seeded(1).load_state_dict(other.state_dict())
    assert other.state_dict()["cursor"]["seed"] == 1
    assert other.coverage() == mixed(two, seed=1).expected_coverage(0, 12)


def test_a_loader_reads_states_from_before_there_were_lanes(make):  # noqa: F811
    def loader(**options):
        return SiftingDataLoader(opened(make(), **options), 6, model=classifier(), keep=1.0)

    first = loader()
    stream = iter(first)
    next(stream)
    state = first.state_dict()
    for name in ("lanes", "weights", "samples"):
        del state["cursor"][name]
    again = loader()
    again.load_state_dict(state)
    assert [one["id"].tolist() for one in again] == [one["id"].tolist() for one in stream]
    with pytest.raises(StateError, match="lanes 1 found, 2 expected"):
        loader(lanes=2).load_state_dict(state)


def test_a_spawned_worker_reads_for_the_rank_that_it_was_started_by(make, monkeypatch):  # noqa: F811
    """It has no process group, and without torchrun no environment either, to find its rank in."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sent = pickle.dumps(opened(make()))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert len(ids(pickle.loads(sent))) == 21, "a process of its own, alone"
    monkeypatch.setattr(
        "siftloader.world._worker_info", lambda: SimpleNamespace(id=1, num_workers=2, seed=8)
    )
    found = ids(pickle.loads(sent))
    monkeypatch.undo()
    assert found == ids(opened(make(), world=World(1, 2, 1, 2))) and len(found) == 5


def test_lanes_that_no_machine_has_to_itself_are_warned_of(make):  # noqa: F811
    with pytest.warns(UserWarning, match=r"lanes=3 is no multiple of 2 machines.*lanes=6 gives"):
        opened(make(), lanes=3, world=World(0, 4, machines=2))


@pytest.mark.parametrize("wrong", [None, ["a", "b"], 3], ids=str)
def test_what_is_no_folder_is_refused_by_type(wrong):
    with pytest.raises(TypeError, match="a path, a URL or, to mix"):
        TokenShards(wrong)


def test_a_world_is_a_world(make):  # noqa: F811
    with pytest.raises(TypeError, match=r"World\(rank, ranks\), got \(0, 4\)"):
        TokenShards(make(), world=(0, 4))


def test_workers_that_begin_the_same_epoch_again_say_so(make, capfd, monkeypatch):  # noqa: F811
    """Warned of in the workers, so seen on their stderr, but for what pytest does to warnings."""
    monkeypatch.setattr("warnings.warn", lambda text, **_: os.write(2, text.encode()))
    shards = opened(make())
    loader = DataLoader(shards, batch_size=4, num_workers=1)

    def said() -> bool:
        list(loader)
        return "begin epoch" in capfd.readouterr().err

    assert not said()
    assert said()
    shards.set_epoch(1)
    assert not said()
    loader = DataLoader(opened(make(), split="val"), batch_size=4, num_workers=1)
    assert not said() and not said()
