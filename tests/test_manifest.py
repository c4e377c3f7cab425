"""The manifest as columns: the same as its lines, in a few bytes a shard."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from siftloader.errors import ShardError
from siftloader.manifest import AT_ONCE, Manifest, Shard, as_lines, fingerprint
from siftloader.shards import Layout


SIZE = Layout(16).size


def shard(name: str, count: int = 3) -> Shard:
    digests = [hashlib.sha256(f"{name}{which}".encode()).hexdigest() for which in "ab"]
    return Shard(name, count, SIZE(count), *digests)


def several(count: int, split: str = "train") -> list[Shard]:
    return [shard(f"{split}-{number:06d}", number % 5) for number in range(count)]


@given(
    train=st.integers(0, 200),
    val=st.integers(1, 3),
    odd=st.lists(st.from_regex(r"[abz.+0]{1,3}-[abz.0-]{0,4}", fullmatch=True), max_size=4),
)
def test_columns_hold_what_the_lines_say(train, val, odd):
    names = {f"train-{n:06d}" for n in range(train)} | {f"val-{n:06d}" for n in range(val)}
    shards = [shard(name, len(name) * 3 % 7) for name in sorted(names | set(odd))]
    manifest = Manifest.parse(as_lines(shards), SIZE)
    assert list(manifest) == shards == [manifest[i] for i in range(len(manifest))]
    assert manifest[-1] == shards[-1] and len(manifest) == len(shards)
    assert manifest.splits == tuple(sorted({one.split for one in shards}))
    counts = np.cumsum([0, *(one.num_sequences for one in shards)]).tolist()
    assert [manifest.first_id(i) for i in range(len(shards) + 1)] == counts
    for split in manifest.splits:
        part = manifest.of(split)
        assert part is not None
        assert list(part) == [one for one in shards if one.split == split]
        first = shards.index(part[0])
        assert [part.first_id(i) for i in range(len(part))] == counts[first : first + len(part)]
    assert manifest.of("test") is None or "test" in manifest.splits


def test_the_fingerprint_is_that_of_one_json_however_many_shards():
    shards = several(2 * AT_ONCE + 7)
    lines = [[s.shard, s.num_sequences, s.sha256, s.sources_sha256] for s in shards]
    text = json.dumps({"schema": {"a": [1]}, "shards": lines}) + "\n"
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint(shards, {"a": [1]}) == expected
    assert fingerprint(Manifest.parse(as_lines(shards), SIZE), {"a": [1]}) == expected


@pytest.mark.parametrize("name", ["train", "-000000", "a/b-1", ""])
def test_a_name_begins_with_its_split(name):
    with pytest.raises(ShardError, match="line 1 is not a manifest line"):
        Manifest.parse(as_lines([shard(name)]), SIZE)


@pytest.mark.parametrize("place", [0, AT_ONCE - 1, AT_ONCE, AT_ONCE + 5])
@pytest.mark.parametrize("wrong", [b"{", b"[1]", b"{}, {}", b"", b'"x"', b"null"], ids=repr)
def test_a_line_that_is_none_is_named_wherever_it_stands(place, wrong):
    lines = as_lines(several(AT_ONCE + 9)).splitlines()
    lines[place] = wrong
    with pytest.raises(ShardError, match=rf"line {place + 1} is not a manifest line"):
        Manifest.parse(b"\n".join(lines), SIZE)


def test_two_lines_that_are_one_object_together_are_none():
    one, two = as_lines(several(2)).splitlines()
    cut = one.index(b", ")
    with pytest.raises(ShardError, match="line 1 is not"):
        Manifest.parse(one[:cut] + b"\n" + one[cut + 2 :] + b"\n" + two, SIZE)


@pytest.mark.parametrize("place", [1, AT_ONCE])
@pytest.mark.parametrize("how", ["twice", "exchanged"])
def test_names_come_once_and_in_order_across_the_parts_that_are_parsed(place, how):
    shards = several(AT_ONCE + 3)
    if how == "twice":
        shards[place] = shards[place - 1]
    else:
        shards[place - 1 : place + 1] = shards[place - 1 : place + 1][::-1]
    with pytest.raises(ShardError, match="every name once and in order"):
        Manifest.parse(as_lines(shards), SIZE)


def test_a_size_that_does_not_fit_is_told_after_all_else():
    shards = several(5)
    shards[3] = replace(shards[3], bytes=7)
    doubt = Manifest.parse(as_lines(shards), SIZE).doubt
    assert doubt is not None and "train-000003 has 3 samples and 7 bytes" in str(doubt)


def test_a_shard_takes_less_than_a_hundred_bytes_of_memory():
    """With what an order and the verdicts need beside it: tools/bench_stream.py measures the whole."""
    lines = as_lines(several(30_000))
    tracemalloc.start()
    manifest = Manifest.parse(lines, SIZE)
    taken, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == 30_000 and taken / 30_000 < 75
    assert peak - taken < 8 << 20, "never all lines at once"


def test_what_is_written_is_what_asdict_says():
    assert [json.loads(line) for line in as_lines(several(3)).splitlines()] == [
        asdict(one) for one in several(3)
    ]
