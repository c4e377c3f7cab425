"""Laws of the stream, over shards, sets, topologies, epochs and restarts: pytest tests/test_laws.py

1. Any number of restarts, each on other ranks and machines, changes nothing.
2. Ranks and loader workers partition what is left of an epoch.
3. Each set of a mix goes through its own epochs, whatever else is in the mix.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import example, given, strategies as st

from siftloader import stream
from siftloader.coverage import Coverage
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard
from siftloader.stream import SET_BITS, TokenShards
from siftloader.world import World


pytestmark = pytest.mark.filterwarnings("ignore:lanes=.* is no multiple")

T, V = 8, 90
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SIZES = [(1,), (11,), (5, 7, 3, 6), (9, 1, 1, 14, 2, 1), (20, 30, 3), (1,) * 13]
SOURCES = 3  # of each set
Make = Callable[..., Path]
Row = tuple[int, int, bytes]  # the id of a sample, its source, and all else that came with it


@dataclass(frozen=True)
class Data:
    """What is read: one set of shards, or some of them mixed."""

    sets: tuple[tuple[int, ...], ...]  # samples of each shard of each set
    weights: tuple[int, ...] | None = None
    epoch_samples: int | None = None
    lanes: int = 1
    seed: int = 0
    window: int = 2
    split: str = "train"
    objective: str = "mlm"

    def opened(self, make: Make, world: World | None = None, **more: Any) -> TokenShards:
        """Told its place in the world; verification is the subject of other tests."""
        options = {"epoch_samples": self.epoch_samples, "world": world, **self.options, **more}
        folders = [make(sizes, self.objective, k) for k, sizes in enumerate(self.sets)]
        if self.weights is None:
            return TokenShards(folders[0], **options)
        return TokenShards.mix(dict(zip(folders, self.weights, strict=True)), **options)

    def alone(self, make: Make, number: int) -> TokenShards:
        """One of the sets, by itself and unmasked."""
        folder = make(self.sets[number], self.objective, number)
        return TokenShards(folder, world=World(), masking=None, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        order = {"seed": self.seed, "window": self.window, "lanes": self.lanes}
        fields = {"split": self.split, "with_ids": True, "with_source": True, "verify": False}
        return {**order, **fields}


@st.composite
def data(draw: st.DrawFn, splits: tuple[str, ...] = ("train",)) -> Data:
    sizes = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
    mixed = len(sizes) > 1 or draw(st.booleans())
    if not mixed and (split := draw(st.sampled_from(splits))) == "val":
        return Data(sizes, split=split)
    return Data(
        sizes,
        tuple(draw(st.integers(1, 9)) for _ in sizes) if mixed else None,
        draw(st.one_of(st.none(), st.integers(1, 90))),
        draw(st.integers(1, 4)),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        objective=draw(st.sampled_from(["mlm", "mlm-nsp"])),
    )


@st.composite
def topologies(draw: st.DrawFn) -> tuple[int, int]:
    """Machines, and ranks on each."""
    machines = draw(st.integers(1, 3))
    return machines, draw(st.integers(1, 4 if machines < 3 else 2))


# How many tokens are located and gathered at once: a few rows, or all there are.
blocks = st.sampled_from([1, 3 * T, 20 * T, stream.BLOCK_TOKENS])


@dataclass(frozen=True)
class Segment:
    """What runs between two restarts."""

    topology: tuple[int, int]
    n: int  # rows of a batch; 0: single samples
    epochs: int  # that many ends of an epoch first
    takes: int  # then so many batches
    saver: int  # of which rank the state is
    announced: bool  # whether set_epoch is called before every epoch
    twice: bool  # whether the state is restored, saved and restored again
    block: int  # tokens gathered at once


segments = st.builds(
    Segment,
    topologies(),
    st.integers(0, 9),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.integers(0, 5),
    st.integers(0, 11),
    st.booleans(),
    st.booleans(),
    blocks,
)


def worlds(topology: tuple[int, int]) -> list[World]:
    machines, here = topology
    return [World(rank, machines * here, machines=machines) for rank in range(machines * here)]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("laws")

    @functools.cache
    def written(sizes: tuple[int, ...], objective: str, number: int) -> Path:
        return write(root / f"{objective}-{'-'.join(map(str, sizes))}-{number}", sizes, objective)

    return written


def write(folder: Path, sizes: tuple[int, ...], objective: str) -> Path:
    """Shards of those sizes and 3 + 4 samples of validation, no two sets alike; one in three padded."""
    rng = np.random.default_rng([*sizes, int(folder.name.rpartition("-")[2])])
    pairs = objective == "mlm-nsp"
    layout = Layout.for_vocabulary(T, V, labels=pairs)
    folder.mkdir()
    written = []
    stems = [(f"train-{i:06d}", n) for i, n in enumerate(sizes)]
    for stem, n in [*stems, ("val-000000", 3), ("val-000001", 4)]:
        ids = rng.integers(5, V, (n, T))
        ids[::3, T // 2 :] = SPECIAL["pad"]
        ids[:, [0, 2, 3]] = SPECIAL["cls"], SPECIAL["sep"], SPECIAL["sep"]
        labels = ids.sum(axis=1) % 2 if pairs else None
        sources = rng.integers(0, SOURCES, n).astype(np.uint8)
        written.append(write_shard(folder, stem, ids, sources, layout, labels))
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
        sources=[Source(name, "0" * 64, 1) for name in "abc"],
        unigrams=np.arange(V),
        seed=0,
    )
    return folder


def rows(batch: dict[str, torch.Tensor]) -> list[Row]:
    """Each row as a value: a batch [n, T], or a single sample [T]."""
    ids = batch["id"].reshape(-1)
    sources = batch["source"].reshape(-1)
    rest = [value for name, value in batch.items() if name not in ("id", "source")]
    content = np.concatenate([value.reshape(len(ids), -1).numpy() for value in rest], axis=1)
    return [
        (number, source, row.tobytes())
        for number, source, row in zip(ids.tolist(), sources.tolist(), content, strict=True)
    ]


WHOLE: dict[tuple[Data, int], list[Row]] = {}


def epoch_of(make: Make, what: Data, epoch: int) -> list[Row]:
    """All rows of an epoch in the order of their positions: what one rank reads straight."""
    if (what, epoch) not in WHOLE:
        (whole,) = what.opened(make, World()).read_batches(1000, epoch)
        WHOLE[what, epoch] = rows(whole)
    return WHOLE[what, epoch]


def in_order(handed: list[list[Row]], slots: list[int], start: int) -> list[Row]:
    """Rows of ranks in the order of their positions: position ``p`` is of slot ``p % ranks``."""
    queues = {slot: iter(own) for slot, own in zip(slots, handed, strict=True)}
    found = []
    while (one := next(queues[(start + len(found)) % len(slots)], None)) is not None:
        found.append(one)
    assert all(next(queue, None) is None for queue in queues.values()), "ranks got equally many"
    return found


def slots_of(topology: tuple[int, int], lanes: int) -> list[int]:
    """With lanes, the ranks of one machine read the same lanes wherever they can; else rank by rank."""
    machines, here = topology
    if lanes == 1:
        return list(range(machines * here))
    return [local * machines + machine for machine in range(machines) for local in range(here)]


@given(data(), st.lists(segments, max_size=6))
@examples(20, large=30)
def test_any_number_of_restarts_on_any_topology_changes_nothing(make, what, run):
    state, epoch, position = None, 0, 0
    for segment in run:
        ranks = worlds(segment.topology)
        if len(ranks) > len(epoch_of(make, what, 0)):
            continue
        readers = [what.opened(make, world) for world in ranks]
        for reader in readers if state is not None else []:
            reader.load_state_dict(json.loads(json.dumps(state)))
            if segment.twice:
                other = what.opened(make, reader.world)
                other.load_state_dict(reader.state_dict())
                assert other.state_dict() == reader.state_dict()
        slots = slots_of(segment.topology, what.lanes)
        for takes in [*[None] * segment.epochs, segment.takes]:
            handed = [taken(reader, segment, epoch, takes) for reader in readers]
            whole = epoch_of(make, what, epoch)
            equal = (len(whole) - position) // len(ranks)
            count = equal if takes is None else min(takes * max(segment.n, 1), equal)
            end = position + count * len(ranks)
            assert in_order(handed, slots, position) == whole[position:end]
            if takes != 0:  # else nothing began, and it is still that of the epoch before
                covered = sum((reader.coverage() for reader in readers), Coverage())
                assert covered == readers[0].expected_coverage(epoch, end)
                assert covered == Coverage.of(np.array([one[0] for one in whole[:end]], np.int64))
            ended = takes is None or takes > -(-equal // max(segment.n, 1))
            epoch, position = (epoch + 1, 0) if ended else (epoch, end)
        states = [reader.state_dict() for reader in readers]
        assert all(one == states[0] for one in states)
        state = states[segment.saver % len(ranks)]
        if segment.takes or segment.epochs:
            assert (state["epoch"], state["position"]) == (epoch, position)


def taken(reader: TokenShards, segment: Segment, epoch: int, takes: int | None) -> list[Row]:
    if segment.announced:
        reader.set_epoch(epoch)
    items = reader.batches(segment.n) if segment.n else iter(reader)
    with patch.object(stream, "BLOCK_TOKENS", segment.block):
        return [one for batch in islice(items, takes) for one in rows(batch)]


@given(
    data(splits=("train", "train", "val")),
    topologies(),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 99),
    blocks,
)
@examples(20, large=30)
def test_ranks_and_workers_partition_what_is_left(
    make, what, topology, workers, n, epoch, start, block
):
    whole = epoch_of(make, what, epoch)
    start %= len(whole) + 1
    reader, ranks = what.opened(make), worlds(topology)
    if what.split == "train" and len(ranks) > len(whole):
        return
    handed = []
    for world in ranks:
        merged: dict[int, Row] = {}
        for worker in range(workers):
            here = replace(world, worker=worker, workers=workers)
            with patch.object(stream, "BLOCK_TOKENS", block):
                own = list(reader.read_batches(n, epoch, start, here))
            assert all(len(batch["id"]) == n for batch in own[:-1]), "only the last is ragged"
            found = [one for batch in own for one in rows(batch)]
            merged |= {worker + workers * at: one for at, one in enumerate(found)}
        assert sorted(merged) == list(range(reader.rows(start, world))), "workers take turns"
        handed.append([merged[at] for at in sorted(merged)])
    end = len(whole)
    if what.split == "train":  # equally many each, the tail left out
        end -= (end - start) % len(ranks)
    assert in_order(handed, slots_of(topology, what.lanes), start) == whole[start:end]


@given(data(), st.integers(1, 4))
@example(Data(((20, 30, 3), (11,)), (5, 2), epoch_samples=90, lanes=2), 100)  # beyond 4,096 turns
@examples(12, large=30)
def test_a_set_in_a_mix_goes_through_its_own_epochs(make, what, epochs):
    """Lane by lane, where there are several: a lane is every ``lanes``-th turn, from epoch to epoch."""
    mixed, sizes = what.opened(make, World(), masking=None), [sum(each) for each in what.sets]
    masked, alone = what.opened(make, World()), [what.alone(make, k) for k in range(len(sizes))]
    own = functools.cache(lambda number, repeat: columns(alone[number], repeat))
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(epochs):
        found, repeats = columns(mixed, epoch), np.zeros(len(mixed), np.int64)
        for at, one in enumerate(found["id"].tolist()):
            number, lane = one >> SET_BITS, (epoch * len(mixed) + at) % what.lanes
            place = (
                seen[number, lane] * what.lanes + lane
            )  # in the epochs of the set, one after the other
            repeats[at], turn = divmod(place, sizes[number])
            seen[number, lane] += 1
            expected = own(number, int(repeats[at]))
            offsets = {"id": number << SET_BITS, "source": SOURCES * number}
            for name, values in found.items():
                same = values[at] == expected[name][turn] + offsets.get(name, 0)
                assert np.all(same), (epoch, at, name)
        inputs = found["input_ids"].astype("<u2")
        ids, labels = masked.masking(inputs, found["id"], seed=what.seed, epoch=repeats)
        drawn = columns(masked, epoch)
        assert np.array_equal(drawn["input_ids"], ids) and np.array_equal(drawn["labels"], labels)
    for number, repeat in [(k, r) for k in range(len(sizes)) for r in range(3)]:
        assert sorted(own(number, repeat)["id"]) == list(range(sizes[number])), "each sample once"


def columns(shards: TokenShards, epoch: int) -> dict[str, Any]:
    """A whole epoch as one batch."""
    (batch,) = shards.read_batches(shards.total, epoch)
    return {name: value.numpy() for name, value in batch.items()}
