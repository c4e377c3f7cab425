"""Tars of others: what stock webdataset lets pass in silence is an order, an equal share or an error here.

pytest tests/test_tars.py
"""

from __future__ import annotations

import gzip
import http.server
import io
import itertools
import json
import pickle
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from siftloader.errors import (
    CorruptShard,
    EmptyEpoch,
    ShardError,
    SiftError,
    StateError,
)
from siftloader.masking import IGNORED, Mlm
from siftloader.tar_batches import TextRows, batched, decoded, masked, packed
from siftloader.tar_samples import Tar, checked_tars, record_tars
from siftloader.tars import Plan, TarStream, _deal, _trimmed, webdataset
from siftloader.world import World


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
Fields = dict[str, bytes]


def write(path: Path, samples: list[tuple[str, Fields]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in samples:
            for extension, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def numbered(folder: Path, counts: list[int]) -> list[str]:
    """Tars of classes 0, 1, 2, ...: every sample is told by its number."""
    folder.mkdir(exist_ok=True)
    urls, number = [], 0
    for index, count in enumerate(counts):
        samples = []
        for _ in range(count):
            samples.append((f"{number:06d}", {"cls": str(number).encode()}))
            number += 1
        urls.append(str(write(folder / f"t-{index:03d}.tar", samples)))
    return urls


def numbers(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["cls"].tolist()]


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def picture(size: tuple[int, int] = (4, 6), kind: str = "PNG", value: int = 7) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (value, 0, 255)).save(buffer, kind)
    return buffer.getvalue()


def worlds(ranks: int, workers: int = 1) -> list[World]:
    return [World(r, ranks, w, workers) for r in range(ranks) for w in range(workers)]


def read(urls: Any, world: World, epoch: int = 0, **options: Any) -> list[int]:
    stream = webdataset(urls, world=world, **options)
    stream.set_epoch(epoch)
    return numbers(stream)


# ---------------------------------------------------------------------------- order and shares


def test_an_epoch_is_every_sample_once_and_the_next_is_another_order(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [5, 3, 7, 6])
    stream = webdataset(urls, batch_size=4, shuffle=5)
    first, second = numbers(stream), numbers(stream)
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second and first != list(range(21))
    again = webdataset(urls, batch_size=4, shuffle=5)
    assert [numbers(again), numbers(again)] == [first, second]
    assert numbers(webdataset(urls, batch_size=4, shuffle=5, seed=1)) != first
    again.set_epoch(0)
    assert numbers(again) == first


def test_no_shuffle_is_the_order_of_the_files_in_every_epoch(tmp_path: Path) -> None:
    stream = webdataset(numbered(tmp_path, [5, 3, 7]), batch_size=4, shuffle=0)
    assert numbers(stream) == numbers(stream) == list(range(15))


def test_tars_are_permuted_before_they_are_dealt_so_a_rank_gets_others(tmp_path: Path) -> None:
    # Stock webdataset splits first: rank 0 has the same tars for ever.
    urls = numbered(tmp_path, [2] * 16)
    record_tars(urls)
    shares = []
    for epoch in range(6):
        parts = [read(urls, each, epoch, batch_size=2) for each in worlds(4)]
        assert sorted(each for part in parts for each in part) == list(range(32))
        shares.append(frozenset(parts[0]))
    assert len(set(shares)) > 3
    assert len(frozenset.union(*shares)) > 20


@pytest.mark.parametrize(
    ("tars", "ranks", "workers"), [(12, 2, 3), (5, 2, 4), (2, 3, 2), (1, 2, 1)]
)
def test_every_reader_has_its_own_however_few_tars_there_are(
    tmp_path: Path, tars: int, ranks: int, workers: int
) -> None:
    urls = numbered(tmp_path, [24 // tars] * tars)
    record_tars(urls)
    parts = []
    for world in worlds(ranks, workers):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            parts.append(numbers(webdataset(urls, batch_size=2, world=world)))
        alone = tars >= ranks * workers or world.rank or world.worker
        assert [f"{ranks * workers} readers" in str(each.message) for each in said] == [
            True for _ in range(not alone)
        ]
    handed = [number for part in parts for number in part]
    assert all(parts) and len(handed) == len(set(handed))
    plan = webdataset(urls, batch_size=2, world=World(1, ranks)).plan(workers)
    assert len(handed) == plan.samples and plan.left_out == 24 // tars * tars - len(handed)
    by_rank = [sum(map(len, parts[r * workers : (r + 1) * workers])) for r in range(ranks)]
    assert len(set(by_rank)) == 1


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_end_together_however_uneven_the_tars(
    tmp_path: Path, ranks: int, workers: int, drop_last: bool
) -> None:
    urls = numbered(tmp_path, [50, 7, 21, 50, 50, 50, 3, 50])
    record_tars(urls)
    counts: Counter[int] = Counter()
    for world in worlds(ranks, workers):
        stream = webdataset(urls, batch_size=8, world=world, drop_last=drop_last)
        counts[world.rank] += len(list(stream))
    assert len(set(counts.values())) == 1
    assert counts[0] == stream.plan(workers).batches > 0


def test_a_deal_gives_all_and_evenly_and_a_trim_keeps_the_total() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        among = int(rng.integers(1, 9))
        sizes = dict(enumerate(rng.integers(0, 50, int(rng.integers(among, 40))).tolist()))
        for key in ("a", None):
            hands = _deal(list(sizes), sizes, among, key)
            assert sorted(itertools.chain(*hands)) == list(sizes) and all(hands)
            loads = [sum(max(1, sizes[each]) for each in hand) for hand in hands]
            assert max(loads) - min(loads) <= max(1, *sizes.values())
        own = rng.integers(0, 9, among).tolist()
        total = int(rng.integers(0, sum(own) + 1))
        shares = _trimmed(own, total)
        assert sum(shares) == total
        assert all(share <= most for share, most in zip(shares, own, strict=True))


def test_a_plan_says_what_is_left_out_and_what_is_repeated(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [10, 10, 10, 11])
    record_tars(urls)
    assert webdataset(urls, batch_size=8).plan() == Plan(6, 41, 0, 0)
    half = webdataset(urls, batch_size=8, world=World(0, 2), drop_last=True)
    assert half.plan() == Plan(2, 32, 9, 0)
    more = webdataset(urls, batch_size=8, world=World(0, 2), batches_per_epoch=4)
    assert more.plan().repeated > 0 and more.plan().batches == 4


def test_unknown_sizes_on_several_ranks_are_refused_with_arithmetic(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [5, 3, 7])
    with pytest.raises(ValueError, match=r"3 tars for 2 ranks \(2 or 1 each\).*batches_per_epoch"):
        webdataset(urls, batch_size=2, world=World(0, 2))
    with pytest.raises(ValueError, match="own stages"):
        record_tars(urls)
        webdataset(urls, batch_size=2, world=World(0, 2), stages=[iter])


def test_a_given_number_of_batches_repeats_in_another_order(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [6, 6])
    seen = read(urls, World(0, 2), batch_size=4, batches_per_epoch=6)
    assert len(seen) == 24 and set(Counter(seen).values()) == {4}
    assert seen[:6] != seen[6:12]  # a second time, in another order, and each pass is whole
    assert [set(seen[at : at + 6]) for at in range(0, 24, 6)] == [set(seen)] * 4
    stream = webdataset(urls, batch_size=4, batches_per_epoch=6, world=World(1, 2))
    assert len(stream) == len(DataLoader(stream, batch_size=None)) == 6


def test_a_length_that_depends_on_workers_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="batches_per_epoch"):
        len(webdataset(numbered(tmp_path, [5]), batch_size=2))


def test_a_rank_without_any_batch_is_refused(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [9, 1])
    record_tars(urls)
    with pytest.raises(EmptyEpoch, match="10 samples in 2 tars for 2 ranks"):
        webdataset(urls, batch_size=4, world=World(0, 2), drop_last=True)


def test_tars_without_samples_end_with_words(tmp_path: Path) -> None:
    with pytest.raises(EmptyEpoch, match="not one sample"):
        list(webdataset(numbered(tmp_path, [0, 0]), batch_size=4))
    with pytest.raises(EmptyEpoch, match="not one sample"):
        list(webdataset(numbered(tmp_path, [0, 0]), batch_size=4, batches_per_epoch=3))


def test_the_buffer_is_full_before_it_is_drawn_from(tmp_path: Path) -> None:
    order = read(numbered(tmp_path, [1000]), World(), batch_size=100, shuffle=300)
    assert sorted(order) == list(range(1000))
    follow = sum(after == before + 1 for before, after in itertools.pairwise(order))
    assert follow < 10 and 120 < np.mean(np.abs(np.array(order) - np.arange(1000))) < 300
    assert np.mean(order[:100]) > 140  # stock webdataset begins when a hundred are there


# ---------------------------------------------------------------------------- loaders and epochs


@pytest.mark.parametrize("persistent", [False, True])
def test_plain_loops_over_a_loader_with_workers_see_other_epochs(
    tmp_path: Path, persistent: bool
) -> None:
    urls = numbered(tmp_path, [4] * 6)
    alone = webdataset(urls, batch_size=3, world=World(workers=2))
    loader = DataLoader(
        webdataset(urls, batch_size=3),
        batch_size=None,
        num_workers=2,
        persistent_workers=persistent,
    )
    epochs = [numbers(loader) for _ in range(2)]
    for epoch, seen in enumerate(epochs):
        assert sorted(seen) == list(range(24))
        expected = [numbers(alone.pipeline(epoch, World(0, 1, w, 2))) for w in (0, 1)]
        assert sorted(seen[:3]) == sorted(expected[0][:3])
        assert Counter(seen) == Counter(expected[0] + expected[1])
    assert epochs[0] != epochs[1]
    if persistent:
        loader.dataset.set_epoch(0)  # reaches workers that live on, too
        assert numbers(loader) == epochs[0]


def test_seeding_torch_alike_before_every_epoch_repeats_no_order(tmp_path: Path) -> None:
    stream = webdataset(numbered(tmp_path, [4] * 6), batch_size=3)
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    epochs = []
    for _ in range(2):
        torch.manual_seed(0)
        epochs.append(numbers(loader))
    assert epochs[0] != epochs[1] and sorted(epochs[1]) == list(range(24))


def test_workers_agree_on_an_epoch_in_whatever_order_they_start() -> None:
    from siftloader.tars import _Epochs

    epochs = _Epochs()
    for iteration, starts in [(5, (0, 1, 2)), (9, (2, 0, 1)), (9, (1, 2, 0)), (5, (2, 1, 0))]:
        found = []
        for worker in starts:
            found.append(epochs.upcoming(worker, iteration))
            epochs.note(worker, found[-1], iteration)
        assert len(set(found)) == 1
    assert found == [3, 3, 3]
    alike = [
        epochs.upcoming(worker, 7) for worker in range(3)
    ]  # all look before any of them writes
    assert alike == [4, 4, 4]
    copied = pickle.loads(pickle.dumps(epochs))
    assert copied.marks.is_shared() and copied.upcoming(0, 7) == 4


def test_no_worker_sees_half_a_mark() -> None:
    from siftloader.tars import _Epochs

    epochs, often = _Epochs(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writer = threading.Thread(
            target=lambda: [epochs.note(0, number - 1, number) for number in range(1, 5000)]
        )
        writer.start()
        while writer.is_alive():
            iterations, following = epochs.seen()
            assert iterations[0] == following[0]
        writer.join()
    finally:
        sys.setswitchinterval(often)


def test_webdatasets_own_loader_takes_it(tmp_path: Path) -> None:
    stream = webdataset(numbered(tmp_path, [4] * 4), batch_size=4)
    loader = wds.WebLoader(stream, batch_size=None, num_workers=0)
    assert sorted(numbers(loader)) == list(range(16))
    assert isinstance(stream.pipeline(), wds.DataPipeline)


def test_stages_stand_in_anybodys_pipeline(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [4, 4])
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls), checked_tars, decoded, partial(batched, size=3)
    )
    assert numbers(pipeline) == list(range(8))
    assert numbers(batched(decoded(checked_tars(urls)), 3, drop_last=True)) == list(range(6))


def test_own_stages_see_decoded_samples(tmp_path: Path) -> None:
    def odd(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return (sample for sample in samples if sample["cls"] % 2)

    negated = wds.map(lambda sample: {**sample, "cls": -sample["cls"]})
    stream = webdataset(numbered(tmp_path, [6]), batch_size=2, shuffle=0, stages=[odd, negated])
    assert numbers(stream) == [-1, -3, -5]


# ---------------------------------------------------------------------------- states


@pytest.mark.parametrize("text", [False, True])
def test_a_state_resumes_at_every_batch_of_every_epoch(tmp_path: Path, text: bool) -> None:
    if text:
        make: Callable[[], TarStream] = partial(text_stream, texts(tmp_path, 2, 2), batch_size=3)
    else:
        make = partial(webdataset, numbered(tmp_path, [5, 3, 7]), batch_size=4, shuffle=4)
    whole = make()
    expected = [(epoch, batch) for epoch in range(2) for batch in whole]
    running, at = make(), 0
    for _ in range(2):
        for _ in running:
            at += 1
            state = json.loads(json.dumps(running.state_dict()))
            resumed = make()
            resumed.load_state_dict(state)
            rest = list(resumed)
            left = [batch for epoch, batch in expected[at:] if epoch == state["epoch"]]
            assert repr(rest) == repr(left)
            assert repr(next(iter(resumed))) != repr(expected[0][1])  # an epoch of its own follows
        state = running.state_dict()
        assert (state["batches"], state["epoch"]) == (0, expected[at - 1][0] + 1)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(("workers", "counts"), [(0, [5, 3, 7, 4]), (2, [14, 2])])
def test_torchdatas_stateful_loader_resumes_within_and_between_epochs(
    tmp_path: Path, workers: int, counts: list[int]
) -> None:
    urls = numbered(tmp_path, counts)

    def make() -> Any:
        stream = webdataset(urls, batch_size=3, shuffle=4)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    running = make()
    expected: list[list[Any]] = [[], [], []]
    for epoch in range(3):
        if epoch == 2:
            between = running.state_dict()
        for batch in running:
            expected[epoch].append(batch["cls"].tolist())
            if (epoch, len(expected[1])) == (1, 4):  # of [14, 2], one worker has ended before
                within = running.state_dict()
    assert sorted(itertools.chain(*expected[0])) == list(range(sum(counts)))
    assert expected[0] != expected[1] != expected[2]
    for state, rest in ((within, expected[1][4:]), (between, expected[2])):
        resumed = make()
        resumed.load_state_dict(state)
        assert [batch["cls"].tolist() for batch in resumed] == rest
        if state is within:
            assert [batch["cls"].tolist() for batch in resumed] == expected[2]


def test_a_state_of_another_order_is_refused(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [4] * 4)
    state = webdataset(urls, batch_size=4).state_dict()
    for options, message in [
        ({"batch_size": 2}, "batch_size 4 found, 2 expected"),
        ({"seed": 1}, "seed 0 found, 1 expected"),
        ({"world": World(0, 2), "batches_per_epoch": 9}, "batches_per_epoch None found"),
        (
            {"world": World(0, 1, 1, 2)},
            "worker 0 found, 1 expected|workers 1 found",
        ),
    ]:
        other = webdataset(urls, **{"batch_size": 4, **options})
        with pytest.raises(StateError, match=message):
            other.load_state_dict(state)
    with pytest.raises(StateError, match=r"tars .* found.*names and sizes"):
        webdataset(urls[:3], batch_size=4).load_state_dict(state)
    record_tars(urls)  # and now they are dealt by size
    with pytest.raises(StateError, match=r"tars .* found.*names and sizes"):
        webdataset(urls, batch_size=4).load_state_dict(state)
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(StateError, match="lacks"):
        webdataset(urls, batch_size=4).load_state_dict({})
    with pytest.raises(StateError, match="version 99 found, 1 expected"):
        webdataset(urls, batch_size=4).load_state_dict({**state, "version": 99})
    with pytest.raises(StateError, match="damaged"):
        webdataset(urls, batch_size=4).load_state_dict({**state, "batches": -1})


def test_a_state_of_no_workers_is_refused_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = webdataset(numbered(tmp_path, [4] * 4), batch_size=4)
    next(iter(stream))
    state = stream.state_dict()
    stream.load_state_dict(state)
    monkeypatch.setattr("siftloader.tars.World.detect", lambda home=None: World(workers=2))
    with pytest.raises(StateError, match="workers 1 found, 2 expected"):
        next(iter(stream))


def test_workers_that_had_all_ended_go_on_with_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = numbered(tmp_path, [9])
    monkeypatch.setattr("siftloader.tars.iteration", lambda: 1)  # as in a loader worker
    stream, resumed = webdataset(urls, batch_size=2), webdataset(urls, batch_size=2)
    list(stream)
    state = stream.state_dict()
    assert state["finished"] and state["epoch"] == 0
    resumed.load_state_dict(state)
    assert list(resumed) == []
    monkeypatch.setattr("siftloader.tars.iteration", lambda: 2)
    assert numbers(resumed) == numbers(stream)


def test_what_workers_read_the_stream_itself_cannot_tell(tmp_path: Path) -> None:
    stream = webdataset(numbered(tmp_path, [4] * 4), batch_size=4)
    list(DataLoader(stream, batch_size=None, num_workers=1))
    with pytest.raises(StateError, match="StatefulDataLoader"):
        stream.state_dict()
    stream.set_epoch(5)
    assert stream.state_dict()["epoch"] == 5


def test_announcing_the_epoch_of_a_state_keeps_its_place(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [4] * 4)
    stream = webdataset(urls, batch_size=4)
    source = iter(stream)
    first = next(source)
    state, rest = stream.state_dict(), numbers(source)
    stream.load_state_dict(state)
    stream.set_epoch(0)
    assert numbers(stream) == rest
    stream.load_state_dict(state)
    stream.set_epoch(1)
    assert len(numbers(stream)) == 16 and first is not None


# ---------------------------------------------------------------------------- damage


def broken(data: bytes, kind: str) -> bytes:
    body = bytearray(data)
    middle = 1024 * 5  # a header: two blocks a sample
    if kind == "header name":
        body[middle + 3] ^= 1
    elif kind == "header size":
        body[middle + 130] ^= 1
    elif kind == "cut between members":
        del body[middle:]
    elif kind == "cut within a header":
        del body[middle + 100 :]
    elif kind == "cut after a header":
        del body[middle + 512 :]
    elif kind == "cut within a payload":
        del body[middle + 513 :]
    elif kind == "zero block":
        body[middle:middle] = bytes(512)
    elif kind == "zero blocks":
        body[middle:middle] = bytes(1024)
    elif kind == "hole":
        body[middle : middle + 1024] = bytes(1024)
    elif kind == "second tar":
        body += data
    elif kind == "trailing garbage":
        body += b"x" * 700
    elif kind == "empty file":
        body.clear()
    elif kind == "web page":
        body[:] = b"<html><body>404 Not Found</body></html>\n" * 40
    elif kind == "gz named .tar":
        body[:] = gzip.compress(data)
    elif kind == "payload byte":
        body[middle + 512] ^= 1
    else:
        raise AssertionError(kind)
    return bytes(body)


ALWAYS_SEEN = [
    "header name",
    "header size",
    "cut between members",
    "cut within a header",
    "cut after a header",
    "cut within a payload",
    "zero block",
    "zero blocks",
    "hole",
    "second tar",
    "trailing garbage",
    "empty file",
    "web page",
    "gz named .tar",
]


@pytest.mark.parametrize("kind", ALWAYS_SEEN)
def test_no_damage_is_silent(tmp_path: Path, kind: str) -> None:
    urls = numbered(tmp_path, [10, 10])
    path = Path(urls[1])
    path.write_bytes(broken(path.read_bytes(), kind))
    with pytest.raises(CorruptShard, match=r"t-001.tar: damaged, cut short, or no tar") as caught:
        list(webdataset(urls, batch_size=4))
    assert caught.value.shard == "t-001"


def test_no_byte_can_be_flipped_nor_cut_off_unseen_but_where_nothing_changes(
    tmp_path: Path,
) -> None:
    (url,) = numbered(tmp_path, [3])
    path = Path(url)
    end = 3 * 1024
    whole = path.read_bytes()[: end + 1024]
    expected = list(checked_tars([url]))

    def same() -> bool:
        try:
            return list(checked_tars([url])) == expected
        except CorruptShard:
            return False

    for at in range(0, len(whole), 31):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        padding = at < end and at % 1024 > 512
        if at >= end or at % 1024 not in (154, 155):  # what ends a checksum may be anything
            assert same() == padding, at
        path.write_bytes(whole[:at])
        assert same() == (at >= end + 512), at
    path.write_bytes(whole)
    record_tars(url)
    for at in range(0, len(whole), 307):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CorruptShard):
            list(webdataset(url, batch_size=4))


def test_a_flipped_byte_of_a_payload_is_seen_where_tars_were_recorded(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [10, 10])
    assert record_tars(str(tmp_path)) == [tmp_path / "manifest.jsonl"]
    path = Path(urls[0])
    path.write_bytes(broken(path.read_bytes(), "payload byte"))
    with pytest.raises(CorruptShard, match=r"sha256 .* found, manifest.jsonl says"):
        list(webdataset(urls, batch_size=4))


def test_another_number_of_samples_than_recorded_is_an_error(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [10, 10])
    (tmp_path / "sizes.json").write_text('{"t-000.tar": 10, "t-001.tar": 11}')
    with pytest.raises(CorruptShard, match=r"t-001.tar: 10 samples found, sizes.json says 11"):
        list(webdataset(urls, batch_size=4))
    with pytest.raises(CorruptShard, match="10 samples found, its record says 8"):
        list(checked_tars([Tar(urls[1], 8)]))
    with pytest.raises(CorruptShard, match="10 samples found, sizes= says 9"):
        list(webdataset(urls, batch_size=4, sizes={"t-000.tar": 9, "t-001": 10}))


def test_sizes_are_found_in_every_usual_file(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [10, 12])
    for name, text in [
        ("sizes.json", '{"t-000.tar": 10, "t-001.tar": 12}'),
        (
            "manifest.jsonl",
            '{"shard": "t-000", "num_sequences": 10}\n{"shard": "t-001", "num_sequences": 12}',
        ),
        (
            "dataset.json",
            '{"wids_version": 1, "shardlist": [{"url": "t-000.tar", "nsamples": 10}, {"url": "x/t-001.tar", "nsamples": 12}]}',
        ),
    ]:
        (tmp_path / name).write_text(text)
        assert webdataset(urls, batch_size=2, world=World(1, 2)).plan() == Plan(5, 20, 2, 0)
        (tmp_path / name).unlink()
    (tmp_path / "manifest.jsonl").write_text('{"shard": "t-0')
    with pytest.raises(ShardError, match=r"manifest.jsonl: cannot be read"):
        webdataset(urls, batch_size=2)
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / "sizes.json").write_text('{"t-000.tar": "10"}')
    with pytest.raises(ShardError, match=r"sizes.json: cannot be read"):
        webdataset(urls, batch_size=2)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a", {"txt": b"1"}), ("a", {"txt": b"2"})], "sample 'a' has 'txt' twice"),
        ([("a", {"txt": b"1"}), ("b", {"txt": b"2"}), ("a", {"txt": b"3"})], "'a' comes back at 'a.txt'"),
        ([("a", {"txt": b"1"}), ("b", {"txt": b"2"}), ("a", {"cls": b"3"})], "'a' comes back at 'a.cls'"),
        ([("a", {"txt": b"1", "cls": b"1"}), ("b", {"txt": b"2"})], r"sample 'b': fields \['txt'\], but"),
        ([("a", {"cls": b"one"})], "sample 'a': field 'cls' cannot be decoded"),
        ([("a", {"npy": npy(np.array([{}], object))})], "sample 'a': field 'npy' cannot be decoded.*pickle"),
        ([("a", {"json": b"{"})], "sample 'a': field 'json' cannot be decoded"),
        ([("a", {"json.gz": gzip.compress(b"[1, 2]")[:-9]})], "'json.gz' cannot be decoded"),
        ([("a", {"txt": b"\xff"})], "sample 'a': field 'txt' cannot be decoded"),
        ([("a", {"png": picture()[:45]})], "sample 'a': field 'png' cannot be decoded"),
        ([("a", {"x.pyd": b""})], r"sample 'a': \.pyd runs code"),
        ([("a", {"pkl": b""})], r"sample 'a': \.pkl runs code"),
        ([("a", {"pickle": b""})], r"sample 'a': \.pickle runs code"),
        ([("a", {"pth": b""})], r"sample 'a': \.pth runs code"),
        ([("a", {"input_ids.npy": npy([1, 2])}), ("b", {"input_ids.npy": npy([1])})], "'b': 1 token ids, but"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_used_is_named(
    tmp_path: Path, samples: list[tuple[str, Fields]], message: str
) -> None:
    path = write(tmp_path / "t.tar", samples)
    with pytest.raises(ShardError, match=rf"{path.name}.*{message}") as caught:
        list(webdataset(path, batch_size=8, shuffle=0))
    assert caught.value.shard == "t"


def test_links_are_never_followed_and_other_members_are_as_webdataset_has_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("__meta__.json", tarfile.REGTYPE),
            ("README", tarfile.REGTYPE),
            ("._a.txt", tarfile.REGTYPE),
            (f"folder/{'long' * 40}.TXT", tarfile.REGTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert list(webdataset(path, batch_size=2)) == [{"txt": [""]}]
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ShardError, match=r"'b\.txt' is a link"):
        list(webdataset(path, batch_size=2))


def test_members_without_extensions_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("sample"))
    with pytest.raises(ShardError, match="no samples among 1 members"):
        list(webdataset(path, batch_size=2))


def test_an_error_of_a_stage_reaches_the_loop(tmp_path: Path) -> None:
    def fails(samples: Iterator[Any]) -> Iterator[Any]:
        yield next(samples)
        raise RuntimeError("mine")

    stream = webdataset(numbered(tmp_path, [9]), batch_size=1, stages=[fails])
    with pytest.raises(RuntimeError, match="mine"):
        list(stream)


# ---------------------------------------------------------------------------- where tars are


class Server(http.server.BaseHTTPRequestHandler):
    """/whole, /cut (Content-Length, half of it), /silent (half, no length), /flaky (once cut); else 404."""

    data = b""
    asked: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        self._answer(self.path.split("/")[1])

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.asked[kind] += 1
        if kind == "flaky":
            kind = {1: "silent", 2: "cut"}.get(self.asked[kind], "whole")
        if self._answer(kind):
            half = len(self.data) // 2 // 512 * 512
            self.wfile.write(self.data if kind == "whole" else self.data[:half])

    def _answer(self, kind: str) -> bool:
        if kind not in ("whole", "cut", "silent", "flaky"):
            self.send_error(404)
            return False
        self.send_response(200)
        if kind in ("whole", "cut", "flaky"):
            self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        return True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("siftloader.tar_samples.PAUSE", 0.01)
    Server.asked.clear()
    Server.data = Path(numbered(tmp_path / "served", [20])[0]).read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_connection_that_is_cut_is_an_error(server: str) -> None:
    assert numbers(webdataset(f"{server}/whole/t.tar", batch_size=4, shuffle=0)) == list(range(20))
    assert numbers(webdataset(f"{server}/flaky/t.tar", batch_size=4, shuffle=0)) == list(range(20))
    assert Server.asked == {"whole": 1, "flaky": 3}
    for kind in ("cut", "silent", "gone"):
        stream = webdataset(f"{server}/{kind}/t.tar", batch_size=4, shuffle=0)
        message = rf"(?s){kind}/t.tar: (cannot be fetched|damaged, cut short).*asked for 4 times"
        with pytest.raises(ShardError, match=message) as caught:
            list(stream)
        assert caught.value.shard == "t"


def test_pipes_need_to_be_allowed_and_must_end_well(tmp_path: Path) -> None:
    (url,) = numbered(tmp_path, [20])
    with pytest.raises(ValueError, match="pipes=True"):
        webdataset(f"pipe:cat {url}", batch_size=4)
    with pytest.raises(ValueError, match="pipes=True"):
        list(checked_tars([f"pipe:cat {url}"]))
    stream = webdataset(f"pipe:cat {url}", batch_size=4, pipes=True, shuffle=0)
    assert numbers(stream) == list(range(20))
    assert len(next(iter(stream))["cls"]) == 4  # and leaves nobody waiting
    for command in (
        f"head -c 5120 {url}; exit 141",
        f"cat {url}; exit 141",
        f"cat {url}; exit 3",
        "false",
    ):
        with pytest.raises(ShardError, match=r"status|damaged"):
            list(webdataset(f"pipe:{command}", batch_size=4, pipes=True))


def test_tars_are_named_by_braces_lists_globs_and_folders(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [2, 2, 2])
    (tmp_path / "notes.txt").write_text("")
    for given in (
        f"{tmp_path}/t-{{000..002}}.tar",
        f"{tmp_path}/t-{{000,001}}.tar::{urls[2]}",
        urls,
        [Path(url) for url in urls],
        f"{tmp_path}/*.tar",
        tmp_path,
        f"file:{tmp_path}/t-{{000..002}}.tar",
        f"file://{tmp_path}/t-{{000..002}}.tar",
    ):
        assert list(webdataset(given, batch_size=4).urls) == urls, given


def test_compressed_tars_are_read_and_their_ends_checked(tmp_path: Path) -> None:
    (url,) = numbered(tmp_path, [20])
    data = gzip.compress(Path(url).read_bytes())
    path = tmp_path / "t-000.tar.gz"
    path.write_bytes(data)
    assert numbers(webdataset(path, batch_size=4, shuffle=0)) == list(range(20))
    path.write_bytes(data[:-4])
    with pytest.raises(CorruptShard, match=r"t-000.tar.gz: damaged or cut short"):
        list(webdataset(path, batch_size=4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"urls": "t-{000..002.tar"}, ValueError, "Unbalanced braces"),
        ({"urls": "t-{000...002}.tar"}, ShardError, "braces count as in"),
        ({"urls": "t-{000..004}.tar"}, ShardError, "2 of 5 tars are not there: t-003.tar, t-004.tar"),
        ({"urls": "none/*.tar"}, ShardError, "no file matches"),
        ({"urls": "."}, ShardError, "no tar in this folder"),
        ({"urls": []}, ValueError, "no tars"),
        ({"urls": [5]}, TypeError, "str, bytes or os.PathLike"),
        ({"urls": "${SIFT_NONE}.tar"}, ValueError, "WDS_NAME"),
        ({"urls": ["t-000.tar", "t-000.tar"]}, ValueError, "given twice"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "as an integer"),
        ({"shuffle": -1}, ValueError, "shuffle must be at least 0"),
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch must be at least 1"),
        ({"objective": "bert"}, ValueError, 'must be "mlm" or "clm"'),
        ({"tokenizer": "x", "seq_len": 8}, ValueError, "needs seq_len= and objective"),
        ({"tokenizer": "x", "objective": "clm"}, ValueError, "needs seq_len= and objective"),
        ({"tokenizer": 5, "objective": "clm", "seq_len": 8}, TypeError, "a fast tokenizer, got int"),
        ({"tokenizer": "./no.json", "objective": "clm", "seq_len": 8}, SiftError, "no such tokenizer"),
        ({"seq_len": 8}, ValueError, "needs a tokenizer"),
        ({"objective": "mlm"}, ValueError, "what to mask with"),
        ({"masking": 0.15}, ValueError, 'needs objective="mlm"'),
        ({"sizes": {"u-000.tar": 5}}, ValueError, "none of the 3 tars"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_construction(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    numbered(tmp_path / "tars", [2, 2, 2])
    monkeypatch.chdir(tmp_path / "tars" if options.get("urls") != "." else tmp_path)
    given = {"urls": "t-{000..002}.tar", "batch_size": 2, **options}
    with pytest.raises(error, match=message):
        webdataset(given.pop("urls"), **given)


def test_webdataset_is_asked_for_by_name_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = numbered(tmp_path, [2])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"siftloader\[webdataset\]"):
        webdataset(urls, batch_size=1)


def test_guarantees_say_what_is_not_given(tmp_path: Path) -> None:
    urls = numbered(tmp_path, [4, 4])
    said = webdataset(urls, batch_size=2).guarantees
    assert "0 of 2 tars" in said and "goes unseen" in said
    record_tars(urls)
    assert "sha256) for 2" in webdataset(urls, batch_size=2).guarantees


# ---------------------------------------------------------------------------- what batches are


def test_images_and_classes_are_a_tuple(tmp_path: Path) -> None:
    samples = [(f"{i}", {"png": picture(value=i), "cls": str(i).encode()}) for i in range(3)]
    path = write(tmp_path / "t.tar", samples)
    ((images, classes),) = webdataset(path, batch_size=4, shuffle=0)
    assert images.shape == (3, 3, 4, 6) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] == classes.tolist()
    assert classes.dtype == torch.int64
    mixed = [("a", {"jpg": picture((8, 8), "JPEG"), "cls": b"1"}), ("b", {"webp": picture(kind="WEBP"), "cls": b"2"})]  # fmt: skip
    ((images, _),) = webdataset(write(tmp_path / "u.tar", mixed), batch_size=4, shuffle=0)
    assert [tuple(image.shape) for image in images] == [(3, 8, 8), (3, 4, 6)]


def test_pillow_is_asked_for_where_images_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.tar", [("a", {"png": picture(), "cls": b"1"})])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ShardError, match=r"sample 'a'.*pip install pillow"):
        list(webdataset(path, batch_size=4))


def test_other_fields_are_a_dict_stacked_where_shapes_allow(tmp_path: Path) -> None:
    samples = [
        (f"k{i}", {"x.npy": npy([0.5, i]), "id": b"%d" % i, "json": b'{"a": 1}', "bin": b"raw"})
        for i in range(2)
    ]
    path = write(tmp_path / "t.tar", samples)
    (batch,) = webdataset(path, batch_size=4, shuffle=0, with_keys=True)
    assert batch["x"].tolist() == [[0.5, 0], [0.5, 1]] and batch["id"].tolist() == [0, 1]
    assert batch["json"] == [{"a": 1}] * 2 and batch["bin"] == [b"raw"] * 2
    assert batch["__key__"] == ["k0", "k1"] and batch["__url__"] == [str(path)] * 2
    (batch,) = webdataset(path, batch_size=4, fields=(".id",))
    assert list(batch) == ["id"]
    own = {".bin": lambda data: len(data)}
    (batch,) = webdataset(path, batch_size=4, fields=("bin",), decoders=own)
    assert batch["bin"].tolist() == [3, 3]
    with pytest.raises(ShardError, match="'k0': no field 'jpg or png' among"):
        list(webdataset(path, batch_size=4, shuffle=0, fields=("jpg;png",)))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_are_what_numpy_reads(tmp_path: Path, version: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 9, (3, 4)).astype(">i4"),
        np.asfortranarray(rng.normal(size=(3, 4, 2))).astype("<f2", order="K"),
        np.array(7, "<u2"),
        np.empty((0, 3), "<f8"),
        np.array([True, False]),
    ]
    for array in arrays:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version)
        path = write(tmp_path / "t.tar", [("a", {"x.npy": buffer.getvalue()})])
        (sample,) = decoded(checked_tars([str(path)]))
        found = sample["x.npy"]
        assert np.array_equal(found, array) and found.shape == array.shape
        assert found.dtype == array.dtype.newbyteorder("=") and found.flags.writeable
        if array.nbytes:
            write(path, [("a", {"x.npy": buffer.getvalue()[:-1]})])
            with pytest.raises(ShardError, match=r"'x.npy' cannot be decoded"):
                list(decoded(checked_tars([str(path)])))


def test_a_pickle_is_opened_only_by_a_decoder_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("a", {"pkl": pickle.dumps(3), "cls": b"1"})])
    (batch,) = webdataset(path, batch_size=1, decoders={".pkl": pickle.loads})
    assert batch["pkl"].tolist() == [3]
    (batch,) = webdataset(path, batch_size=1, fields=("cls",))
    assert batch["cls"].tolist() == [1]


@pytest.mark.parametrize("form", ["input_ids.npy", "npy", "json.gz", "json", "input_ids.json"])
def test_token_ids_become_what_a_model_takes(tmp_path: Path, form: str) -> None:
    rows = np.arange(12, dtype=">u2").reshape(3, 4)

    def encode(row: Any) -> bytes:
        data = npy(row) if form.endswith("npy") else json.dumps(row.tolist()).encode()
        return gzip.compress(data) if form.endswith("gz") else data

    path = write(tmp_path / "t.tar", [(f"{i}", {form: encode(row)}) for i, row in enumerate(rows)])
    (batch,) = webdataset(path, batch_size=4, shuffle=0)
    assert list(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == rows.tolist()


def test_masks_are_keyed_by_epoch_and_key_whoever_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(5, 100, (40, 32)).astype("<u2")
    urls = [
        str(write(tmp_path / f"t-{s}.tar", [(f"{i}", {"input_ids.npy": npy(rows[i])}) for i in range(s, 40, 4)]))
        for s in range(4)
    ]  # fmt: skip
    masking = Mlm(0.3, mask_id=4, vocab_size=100, special_ids=(0, 1, 2, 3, 4))
    record_tars(urls)

    def seen(epoch: int, batch_size: int, among: list[World]) -> dict[str, Any]:
        found = {}
        for world in among:
            stream = webdataset(
                urls,
                batch_size=batch_size,
                objective="mlm",
                masking=masking,
                with_keys=True,
                world=world,
            )
            stream.set_epoch(epoch)
            for batch in stream:
                for key, ids, labels in zip(
                    batch["__key__"], batch["input_ids"], batch["labels"], strict=True
                ):
                    found[key] = (ids.tolist(), labels.tolist())
                assert batch["attention_mask"].all()
        return found

    alone = seen(1, 7, worlds(1))
    assert alone == seen(1, 10, worlds(2, 2)) != seen(0, 7, worlds(1))
    share = np.mean([label != IGNORED for _, labels in alone.values() for label in labels])
    assert 0.2 < share < 0.4
    for key, (ids, labels) in alone.items():
        whole = np.where(np.array(labels) == IGNORED, ids, labels)
        assert whole.tolist() == rows[int(key)].tolist()
    wrong = Mlm(mask_id=4, vocab_size=50)
    with pytest.raises(ShardError, match="another tokenizer"):
        list(webdataset(urls, batch_size=4, objective="mlm", masking=wrong))


def test_our_own_shards_give_the_same_rows_in_another_order() -> None:
    from siftloader.stream import TokenShards

    shards = TokenShards(DEMO, masking=None)
    ours = torch.cat([batch["input_ids"] for batch in shards.batches(256)])
    tars = webdataset(str(DEMO / "train-*.tar"), batch_size=256)
    found = list(tars)
    assert set(found[0]) == {"input_ids", "attention_mask", "labels"}
    labels = torch.cat([batch["labels"] for batch in found])
    whole = torch.cat([batch["input_ids"] for batch in found]).where(labels == IGNORED, labels)
    assert sorted(whole.tolist()) == sorted(ours.tolist())
    pad = torch.cat([batch["attention_mask"] for batch in found]) == 0
    assert bool((whole[pad] == shards.shard_set.tokenizer.special_ids["pad"]).all())
    assert tars.plan().samples == len(ours) and "sha256) for 4" in tars.guarantees


def test_padding_is_neither_seen_nor_labelled() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 0], [7, 0, 0]]),
        "__key__": ["a", "b"],
        "__url__": ["x", "x"],
    }
    for masking in (None, Mlm(0.99, mask_id=4, vocab_size=9, special_ids=(0, 4))):
        (made,) = masked([batch], masking, pad=0, padded=True)
        assert made["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
        assert made["labels"].tolist() == [[5, 6, IGNORED], [7, IGNORED, IGNORED]]


# ---------------------------------------------------------------------------- text


WORDS = [
    "the",
    "storm",
    "came",
    "over",
    "the",
    "hills",
    "at",
    "night",
    "and",
    "nobody",
    "in",
    "the",
    "village",
    "slept",
]


def texts(folder: Path, tars: int, documents: int, form: str = "txt") -> list[str]:
    rng = np.random.default_rng(0)
    urls = []
    for index in range(tars):
        samples = []
        for number in range(documents):
            text = " ".join(rng.choice(WORDS, rng.integers(20, 60)))
            data = text if form == "txt" else json.dumps({"text": text, "other": 1})
            samples.append((f"{index}-{number}", {form: data.encode()}))
        urls.append(str(write(folder / f"text-{index}.tar", samples)))
    return urls


def text_stream(urls: Any, **options: Any) -> TarStream:
    given = {"batch_size": 4, "seq_len": 16, "objective": "clm", "shuffle": 20}
    return webdataset(urls, tokenizer=DEMO / "bpe-2048.json", **{**given, **options})


@pytest.mark.parametrize("form", ["txt", "json"])
def test_text_is_packed_on_the_fly_and_every_token_is_counted(tmp_path: Path, form: str) -> None:
    from siftloader.tokens import load_tokenizer

    urls = texts(tmp_path, 3, 4, form)
    tokenizer = load_tokenizer(DEMO / "bpe-2048.json")
    stream = text_stream(urls, shuffle=0)
    rows = torch.cat([batch["input_ids"] for batch in stream])
    documents = [
        sample["txt"] if form == "txt" else sample["json"]["text"]
        for sample in decoded(checked_tars(urls))
    ]
    eos = tokenizer.token_to_id("<|endoftext|>")
    expected = [i for text in documents for i in (*tokenizer.encode(text).ids, eos)]
    assert rows.flatten().tolist() == expected[: rows.numel()]
    assert 0 < rows.shape[1] == 16 and len(expected) - rows.numel() < 16
    assert len(expected) - rows.numel() - stream.dropped in (0, 1)  # but for an end of text
    assert torch.equal(rows, torch.cat([batch["labels"] for batch in stream]))


def test_text_for_masked_models_has_what_they_take(tmp_path: Path) -> None:
    urls = texts(tmp_path, 3, 4)
    stream = webdataset(
        urls, tokenizer=DEMO / "tokenizer.json", batch_size=4, seq_len=16, objective="mlm"
    )
    first, second = list(stream), list(stream)
    assert set(first[0]) == {"input_ids", "attention_mask", "labels"}
    assert (torch.cat([batch["labels"] for batch in first]) != IGNORED).any()
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    assert (first[0]["input_ids"][:, 0] == 2).all()


def test_text_on_workers_drops_the_tails_and_says_how_much(tmp_path: Path) -> None:
    urls = texts(tmp_path, 2, 4)
    stream = text_stream(urls)
    rows = torch.cat([b["input_ids"] for b in DataLoader(stream, batch_size=None, num_workers=2)])
    apart = [text_stream(urls, world=world) for world in worlds(1, 2)]
    assert len(rows) == sum(len(batch["input_ids"]) for each in apart for batch in each)
    assert stream.dropped == sum(each.dropped for each in apart) > 0


def test_text_on_several_ranks_needs_a_number_of_batches(tmp_path: Path) -> None:
    urls = texts(tmp_path, 4, 4)
    with pytest.raises(ValueError, match="how many rows text packs to"):
        text_stream(urls, world=World(0, 2))
    counts = [len(list(text_stream(urls, world=each, batches_per_epoch=7))) for each in worlds(3)]
    assert counts == [7, 7, 7]


def test_text_that_fills_no_row_ends_with_words(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [("a", {"txt": b"short"})])
    with pytest.raises(EmptyEpoch, match="not one row of 64 tokens"):
        list(text_stream(path, seq_len=64, batches_per_epoch=2))
    path = write(tmp_path / "u.tar", [("a", {"json": b'{"body": "x"}'})])
    with pytest.raises(ShardError, match=r"'a': no text in .txt or under 'text'"):
        list(text_stream(path))
    assert list(text_stream(path, column="body", seq_len=2))


def test_tokenizers_come_as_objects_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    urls = texts(tmp_path, 1, 4)
    file = str(DEMO / "bpe-2048.json")
    by_path = list(text_stream(urls))
    fast = Fast.from_file(file)
    fast.enable_truncation(3)  # somebody else's, and left as it is
    for tokenizer in (fast, PreTrainedTokenizerFast(tokenizer_file=file)):
        batches = list(webdataset(urls, tokenizer=tokenizer, batch_size=4, seq_len=16, objective="clm", shuffle=20))  # fmt: skip
        assert repr(batches) == repr(by_path)
    assert fast.truncation["max_length"] == 3
    stages = packed(decoded(checked_tars(urls)), TextRows.of(file, 16, "clm"))
    (batch, *_) = masked(batched(stages, 4))
    assert batch["labels"].shape == (4, 16)


# ---------------------------------------------------------------------------- the example


def test_a_gpt_trains_straight_from_text_in_tars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DEMO.parent.parent / "examples")
    import train_from_tars

    train_from_tars.main(["--steps=10"])
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and min(losses[-4:]) < min(losses[:4])


@pytest.mark.filterwarnings("ignore:resuming by drawing")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sifting_loader_around_it_resumes_in_a_later_epoch(tmp_path: Path, workers: int) -> None:
    from siftloader import SiftingDataLoader
    from siftloader.scores import Random

    rng = np.random.default_rng(0)
    rows = [(f"{i}", {"npy": npy(rng.integers(0, 9, 4))}) for i in range(24)]
    urls = [str(write(tmp_path / f"t-{at}.tar", rows[at : at + 12])) for at in (0, 12)]
    model = torch.nn.Embedding(9, 2)

    def make() -> SiftingDataLoader:
        inner = DataLoader(webdataset(urls, batch_size=4), batch_size=None, num_workers=workers)
        return SiftingDataLoader.wrap(inner, model=model, criterion=Random(), warmup_steps=0)

    running = make()
    expected = [list(map(repr, running)) for _ in range(3)]  # and nobody announces them
    assert len(set(map(repr, expected))) == 3
    again = make()
    list(again)
    between = json.loads(json.dumps(again.state_dict()))
    seen = list(itertools.islice(map(repr, again), 2))
    within = json.loads(json.dumps(again.state_dict()))
    for state, rest in ((within, expected[1][len(seen) :]), (between, expected[1])):
        resumed = make()
        resumed.load_state_dict(state)
        assert list(map(repr, resumed)) == rest
    assert list(map(repr, resumed)) == expected[2]


class Told(IterableDataset[Any]):
    """Rows of an epoch that a data set counts by itself, or that is announced and else stays."""

    def __init__(self, counts: bool) -> None:
        self.counts, self.epoch = counts, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        self.epoch += self.counts
        for row in range(16):
            yield {"x": torch.tensor(100 * epoch + row)}


@pytest.mark.filterwarnings("ignore:resuming by drawing")
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("announced", [False, True])
def test_a_data_set_with_epochs_of_its_own_resumes_in_the_right_one(
    counts: bool, announced: bool
) -> None:
    from siftloader import SiftingDataLoader
    from siftloader.scores import Random
    from siftloader.testing import assert_resumes_exactly

    def make() -> SiftingDataLoader:
        inner = DataLoader(Told(counts), batch_size=4)
        model = torch.nn.Embedding(9, 2)
        return SiftingDataLoader.wrap(inner, model=model, criterion=Random(), warmup_steps=0)

    assert_resumes_exactly(make, positions=None, set_epoch=announced)


def test_ranks_are_told_apart_by_the_stream_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftloader import SiftingDataLoader
    from siftloader.scores import Random

    path = write(tmp_path / "t.tar", [(f"{i}", {"npy": npy([i])}) for i in range(8)])
    record_tars(path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    inner = DataLoader(webdataset(path, batch_size=2, shuffle=0), batch_size=None)
    model = torch.nn.Embedding(9, 2)
    loader = SiftingDataLoader.wrap(inner, model=model, criterion=Random(), warmup_steps=100)
    with pytest.warns(UserWarning, match="inside the warm-up"):
        assert [batch["input_ids"].flatten().tolist() for batch in loader] == [[1, 3], [5, 7]]
