"""TokenShards behind a URL: the rows of the folder itself, fetched once, whatever goes wrong on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, always, cut, fine, serving, status
from test_stream import SPECIAL, epoch_of, make, opened, row, write  # noqa: F401

from siftloader import TokenShards
from siftloader.errors import CorruptShard, FetchError, ShardError
from siftloader.shards import ShardSet, verify
from siftloader.storage import Patience, RemoteFolder
from siftloader.world import World


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "shards", (6,) * 8, "mlm", SPECIAL)


@pytest.fixture
def web(folder) -> Iterator[Server]:
    with serving({path.name: path.read_bytes() for path in folder.iterdir()}) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SIFTLOADER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Patience.__init__, "__defaults__", (3, 0.02, 0.1, 60.0, 1))  # no stall
    return tmp_path / "cache"


def test_rows_are_those_of_the_folder_and_every_shard_is_fetched_once(web, folder):
    shards = opened(web.url)
    assert shards.fingerprint == opened(folder).fingerprint
    for epoch in range(2):
        assert [row(one) for one in shards] == epoch_of(folder, epoch)
    assert [row(one) for one in opened(web.url)] == epoch_of(folder, 0)
    tars = {name: count for name, count in web.asked.items() if name.endswith(".tar")}
    assert tars == {f"train-{i:06d}.tar": 1 for i in range(8)}


def test_servers_that_fail_for_a_while_change_nothing(web, folder):
    web.faults["train-000001.tar"] = [status(503), cut(700)]
    web.faults["train-000004.tar"] = [status(429)]
    web.faults["manifest.jsonl"] = [status(500)]
    assert [row(one) for one in opened(web.url)] == epoch_of(folder, 0)
    assert web.asked["train-000001.tar"] == 3


def test_what_never_comes_is_told_with_shard_and_url(web):
    web.faults["train-000003.tar"] = always(status(503))
    with pytest.raises(
        FetchError, match=r"train-000003\.tar.*did not arrive in 3 tries"
    ) as caught:
        list(opened(web.url))
    assert caught.value.shard == "train-000003"
    web.faults["manifest.jsonl"] = always(status(404))
    with pytest.raises(ShardError, match=r"manifest\.jsonl: not there"):
        TokenShards(web.url)


def test_a_damaged_copy_is_fetched_anew(web, folder, cache):
    list(opened(web.url))
    (copy,) = cache.glob(f"??/{ShardSet.open(folder).manifest[2].sha256}.tar")
    data = bytearray(copy.read_bytes())
    data[1300] ^= 8
    copy.write_bytes(data)
    assert [row(one) for one in opened(web.url)] == epoch_of(folder, 0)
    assert web.asked["train-000002.tar"] == 2
    assert copy.read_bytes() != data


def test_a_damaged_copy_of_sources_is_fetched_anew(web, folder, cache):
    list(opened(web.url))
    (copy,) = cache.glob(f"??/{ShardSet.open(folder).manifest[2].sources_sha256}.*")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 8
    copy.write_bytes(data)
    assert [row(one) for one in opened(web.url)] == epoch_of(folder, 0)
    assert web.asked["train-000002.sources.npy"] == 2


def test_what_the_manifest_did_not_record_is_refused_however_often_it_comes(web):
    other = bytearray(web.files["train-000002.tar"])
    other[1300] ^= 8
    web.files["train-000002.tar"] = bytes(other)
    with pytest.raises(FetchError, match=r"train-000002\.tar.*other bytes"):
        list(opened(web.url))


def test_a_cache_that_holds_less_than_two_windows_is_warned_of_and_works(web, folder, cache):
    size = (folder / "train-000000.tar").stat().st_size
    with pytest.warns(UserWarning, match="shards would be fetched again and again; raise"):
        shards = opened(web.url, cache_bytes=2 * size)
    assert [row(one) for one in shards] == epoch_of(folder, 0)
    assert sum(path.stat().st_size for path in cache.glob("??/*.tar")) <= 2 * size


def test_sources_and_counts_come_too_and_verify_reads_all(web, folder):
    good = []
    with pytest.raises(CorruptShard, match="not the counts of the train split"):  # made up here
        good += verify(web.url)  # an iterator: the last thing it looks at
    assert opened(web.url).unigrams.tolist() == opened(folder).unigrams.tolist()
    assert {name.rpartition(".")[2] for name in web.asked} == {"tar", "npy", "json", "jsonl"}
    web.files["train-000000.sources.npy"] = b"nonsense"
    with pytest.raises(FetchError, match="train-000000"):
        opened(web.url).shard_set.files.path("train-000000.sources.npy", sha256="0" * 64)


def test_nothing_that_is_saved_shown_or_raised_holds_the_secrets_of_a_url(web, folder, caplog):
    caplog.set_level("DEBUG", "siftloader")
    url = f"{web.url}?token=hunter22&sig=pass%2Fword".replace("http://", "http://me:letmein22@")
    web.faults["train-000001.tar"] = [status(503)]
    shards = opened(url)
    rows = [row(one) for one in shards]
    assert rows == epoch_of(folder, 0)
    assert "token=hunter22" in web.queries[0]
    shown = [repr(shards), repr(shards.shard_set), repr(shards.shard_set.files), str(shards)]
    shown += [json.dumps(shards.state_dict()), shards.shard_set.name, caplog.text]
    web.faults["train-000003.tar"] = always(status(403))
    web.faults["train-000002.tar"] = always(status(503))
    for copy in Path(shards.shard_set.files.copies.root).glob("??/*"):
        copy.unlink()
    for name in ("train-000003", "train-000002"):
        with pytest.raises(FetchError) as caught:
            shards.shard_set.files.path(f"{name}.tar", sha256=name[-1] * 64)
        shown += traceback.format_exception(caught.value)
    with pytest.raises(FetchError) as caught:
        TokenShards(url.replace("http://", "what://"))
    shown += traceback.format_exception(caught.value)
    secrets = ("hunter22", "letmein22", "pass/word", "pass%2Fword")
    assert [text for text in shown for secret in secrets if secret in text] == []


def test_a_generation_changed_behind_the_url_is_another_data_set(web, folder, tmp_path):
    state = opened(web.url).state_dict()
    other = write(tmp_path / "other", (6,) * 7, "mlm", SPECIAL)
    web.files.clear()
    web.files.update({path.name: path.read_bytes() for path in other.iterdir()})
    assert [row(one) for one in opened(web.url)] == epoch_of(other, 0)
    assert opened(web.url).fingerprint != state["fingerprint"]


@pytest.mark.parametrize("call", [0, 2])
def test_a_copy_evicted_before_it_is_looked_at_is_fetched_anew(web, folder, monkeypatch, call):
    """By another process, in the moment between its being found and its being opened."""
    path, calls = RemoteFolder.path, itertools.count()

    def evicted(self, name, **about):
        copy = path(self, name, **about)
        if name.endswith("2.tar") and next(calls) == call:
            copy.unlink()
        return copy

    monkeypatch.setattr(RemoteFolder, "path", evicted)
    assert [row(one) for one in opened(web.url)] == epoch_of(folder, 0)


def test_copies_evicted_as_soon_as_they_are_open_are_read_to_the_end(web, folder, monkeypatch):
    """As where many processes share a cache that is much too small."""
    expected, open_shard = epoch_of(folder, 0), ShardSet.open_shard

    def evicted(self, shard, verify=True):
        mapped = open_shard(self, shard, verify)
        mapped.path.unlink()
        return mapped

    monkeypatch.setattr(ShardSet, "open_shard", evicted)
    assert [row(one) for one in opened(web.url)] == expected


def read(url: str, rank: int, ranks: int) -> list[int]:
    stream = opened(url, world=World(rank, ranks))
    return [one for batch in stream.batches(4) for one in batch["id"].tolist()]


@pytest.mark.slow
def test_ranks_of_a_machine_fetch_every_shard_once(web, folder):
    web.faults["train-000000.tar"] = [lambda handler, data: fine(handler, data)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(read, [(web.url, rank, 4) for rank in range(4)])
    expected = [dict(one)["id"] for one in epoch_of(folder, 0)]
    assert [one for step in zip(*found, strict=True) for one in step] == expected
    assert {web.asked[f"train-{i:06d}.tar"] for i in range(8)} == {1}


def test_a_mirror_in_bad_faith_is_found(web):
    """Somebody who can answer for the server cannot change a byte that trains."""
    web.files["train-000001.tar"] = web.files["train-000002.tar"]
    with pytest.raises((FetchError, CorruptShard), match="train-000001"):
        list(opened(web.url))
