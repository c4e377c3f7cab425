"""A folder behind a URL is as good as a folder: whole, verified, fetched once; or it says what is wrong.

pytest tests/test_storage.py
"""

import errno
import hashlib
import importlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import (
    PAGE,
    always,
    cut,
    drip,
    longer,
    moved,
    once,
    page,
    reset,
    serving,
    slow,
    stall,
    status,
    unsized,
    wrong,
)

from siftloader import storage
from siftloader.errors import FetchError, ShardError
from siftloader.storage import (
    LocalFolder,
    Patience,
    RemoteFolder,
    joined,
    open_folder,
    redacted,
    scrubbed,
)


DATA = bytes(range(256)) * 64  # 16 KiB
QUICK = Patience(tries=4, wait=0.02, longest_wait=0.05, stall=20)  # a busy machine is no stall
FRAIL = Patience(tries=4, wait=0.02, longest_wait=0.05, stall=0.7, floor=2000)
HASTY = Patience(
    tries=2, wait=0.02, longest_wait=0.05, stall=0.2, floor=2000
)  # stalls when starved
QUICK_BUCKET = Patience(tries=2, wait=0.02, longest_wait=0.05, stall=5)
SOON = 50.0  # seconds: at once, on a busy machine
MANIFEST = b'{"shard": "train-000000"}\n'


def sha(data):
    return hashlib.sha256(data).hexdigest()


def about(name="a.tar", data=DATA):
    return {"name": name, "size": len(data), "sha256": sha(data)}


def copies(cache):
    return sorted(entry.name for entry in Path(cache).glob("**/*") if entry.is_file())


def only_copy(data=DATA, suffix=".tar"):
    return [sha(data) + suffix]


@pytest.fixture
def web(monkeypatch):
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving({"a.tar": DATA, "manifest.jsonl": MANIFEST}) as server:
        yield server


@pytest.fixture
def folder(web, tmp_path):
    opened = open_folder(web.url, cache=tmp_path / "cache", patience=QUICK)
    yield opened
    opened.close()


@pytest.fixture
def frail(monkeypatch):
    """Patience that a stall ends soon; once one did, a busy machine may take its time."""

    def make(folder):
        def pause(*given):
            folder.patience = QUICK
            return paused(*given)

        folder.patience = FRAIL
        paused = storage._pause
        monkeypatch.setattr(storage, "_pause", pause)

    return make


@pytest.fixture
def memory():
    """A file system in this process: the quickest there is."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.pipe("/shards/manifest.jsonl", MANIFEST)
    yield system
    system.store.clear()


# The places


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}"])
def test_a_path_is_used_where_it_is(tmp_path, form):
    (tmp_path / "manifest.jsonl").write_bytes(MANIFEST)
    folder = open_folder(form.format(tmp_path))
    assert isinstance(folder, LocalFolder)
    assert folder.name == str(tmp_path)
    assert folder.read("manifest.jsonl") == MANIFEST
    assert folder.path(**about()) == tmp_path / "a.tar"  # not even looked for
    folder.forget("manifest.jsonl", sha256=sha(MANIFEST))
    folder.fetch_ahead([("a.tar", 1, sha(DATA))])
    folder.close()
    assert folder.read("manifest.jsonl") == MANIFEST
    assert open_folder(Path(tmp_path)) == folder
    assert folder.room() is None


def test_a_file_of_a_folder_that_is_not_there_is_told_from_one_that_cannot_be_read(tmp_path):
    folder = open_folder(tmp_path)
    with pytest.raises(ShardError, match=r"manifest\.jsonl: no such file") as caught:
        folder.read("manifest.jsonl")
    assert not isinstance(caught.value, FetchError)
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(FetchError, match="cannot be read"):
        folder.read("manifest.jsonl")


@pytest.mark.parametrize(
    "where", ["pipe:curl http://x/", "PIPE://cat x", "exec://x", "shell://x", "| cat x"]
)
def test_nothing_that_runs_a_program_is_opened(where):
    with pytest.raises(ValueError, match="would run a program"):
        open_folder(where)


def test_other_wrong_arguments_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="a chain of file systems"):
        open_folder("simplecache::s3://bucket/x")
    with pytest.raises(ValueError, match="cache_bytes must be a positive number of bytes, got 0"):
        open_folder("s3://bucket/x", cache_bytes=0)
    with pytest.raises(ValueError, match="at least one try"):
        Patience(tries=0)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SIFTLOADER_CACHE", str(tmp_path / "a"))
    assert open_folder("memory://x").copies.root == tmp_path / "a"
    monkeypatch.delenv("SIFTLOADER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert open_folder("memory://x").copies.root == tmp_path / "b" / "siftloader"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert open_folder("memory://x").copies.root == tmp_path / "c/.cache/siftloader"
    assert open_folder("memory://x", cache="~/d").copies.root == tmp_path / "c/d"


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("https://host/data", "https://host/data/a.tar"),
        ("https://host/data/", "https://host/data/a.tar"),
        ("https://host/data?key=k&x=y", "https://host/data/a.tar?key=k&x=y"),
        ("s3://bucket", "s3://bucket/a.tar"),
        ("gs://bucket/x//", "gs://bucket/x/a.tar"),
        ("hf://datasets/me/x@main/shards/", "hf://datasets/me/x@main/shards/a.tar"),
    ],
)
def test_a_file_lies_in_its_folder(url, file):
    assert joined(url, "a.tar") == file


@pytest.mark.parametrize(
    "name", ["", "../a", "x/../../a", "/etc/passwd", "http://x/a", "a?b", "a#b", "a*", "C:\\a"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(ShardError, match="cannot be the name of a file within"):
        joined("https://host/data", name)
    with pytest.raises(ShardError):
        open_folder("https://host/data").path(name, size=1, sha256=sha(b""))


def test_a_hash_that_is_none_cannot_name_a_copy():
    with pytest.raises(ShardError, match=r"'\.\./\.\./x' is no sha256 in hex"):
        open_folder("https://host/data").path("a.tar", size=1, sha256="../../x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host:8080/a/b", "https://host:8080/a/b"),
        ("https://me:pw@host/a", "https://***@host/a"),
        ("https://token@host/a", "https://***@host/a"),
        ("s3://AKIA:ab/cd+e@bucket/a", "s3://***@bucket/a"),
        ("hf://datasets/me/x@main/a", "hf://datasets/me/x@main/a"),
        ("https://h/a?X-Amz-Signature=12ab&b=c", "https://h/a?***"),
        (
            "404, url='https://h/a?sig=12' and 'http://u:p@i/'",
            "404, url='https://h/a?***' and 'http://***@i/'",
        ),
    ],
)
def test_what_is_shown_holds_no_secrets(text, shown):
    assert redacted(text) == shown


def test_what_a_library_says_of_our_url_holds_no_secrets():
    url = "https://me:hunter22@host/a?token=abc%2Fdef%2Fghi"
    assert "hunter22" not in scrubbed("bad login me:hunter22", url)
    assert scrubbed("denied for abc/def/ghi, abc%2Fdef%2Fghi", url) == "denied for ***, ***"


# What goes right


def test_a_small_file_is_read_as_it_is_now_and_never_kept(web, folder, tmp_path):
    assert folder.read("manifest.jsonl") == MANIFEST
    web.files["manifest.jsonl"] = b"new\n"
    assert folder.read("manifest.jsonl") == b"new\n"
    assert web.asked["manifest.jsonl"] == 2
    assert copies(tmp_path / "cache") == []


def test_a_shard_is_fetched_once_in_one_request(web, folder, tmp_path):
    path = folder.path(**about())
    assert path.read_bytes() == DATA
    assert path.name == sha(DATA) + ".tar"
    assert folder.path(**about()) == path
    again = pickle.loads(pickle.dumps(folder))
    assert again.path(**about()) == path
    alias = open_folder(web.url + "/", cache=tmp_path / "cache", patience=QUICK)
    assert alias.path("b.tar", size=len(DATA), sha256=sha(DATA)) == path
    assert web.asked == {"a.tar": 1}
    assert copies(tmp_path / "cache") == only_copy()  # no lock, no part


def test_two_generations_of_a_name_are_two_files(web, folder):
    old = folder.path(**about())
    web.files["a.tar"] = DATA[::-1]
    new = folder.path(**about(data=DATA[::-1]))
    assert (old.read_bytes(), new.read_bytes()) == (DATA, DATA[::-1])


def test_a_file_of_unknown_size_is_checked_by_its_hash(web, folder):
    web.files["a.sources.npy"] = DATA
    assert folder.path("a.sources.npy", sha256=sha(DATA)).suffix == ".npy"
    with pytest.raises(FetchError, match=r"other bytes \(sha256 "):
        folder.path("a.sources.npy", sha256=sha(b"other"))


def test_the_query_of_the_folder_goes_with_every_file_and_is_not_shown(web, tmp_path):
    folder = open_folder(f"{web.url}?token=very-secret", cache=tmp_path, patience=QUICK)
    assert folder.read("manifest.jsonl") == MANIFEST
    assert web.queries == ["token=very-secret"]
    with pytest.raises(ShardError) as caught:
        folder.read("lost.jsonl")
    assert "secret" not in f"{caught.value} {folder.name} {folder!r}"


def test_through_a_proxy(web, tmp_path, monkeypatch):
    """Asked for the whole URL, the server stands for a proxy of which the environment tells."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{web.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    folder = open_folder("http://nowhere.invalid/data", cache=tmp_path, patience=QUICK)
    assert folder.path(**about()).read_bytes() == DATA
    assert web.asked == {"a.tar": 1}


def test_in_memory_or_anywhere(memory, tmp_path):
    memory.pipe("/shards/a.tar", DATA)
    folder = open_folder("memory://shards", cache=tmp_path)
    assert folder.read("manifest.jsonl") == MANIFEST
    assert folder.path(**about()).read_bytes() == DATA
    with pytest.raises(FetchError, match=r"memory://shards/b\.tar: not there"):
        folder.path("b.tar", size=1, sha256=sha(b"b"))


# What goes wrong once, or for a while


@pytest.mark.parametrize(
    "faults",
    [
        [status(503), status(503)],
        [status(500)],
        [status(408), status(425)],
        [status(429, Retry_After="0.01")],
        [cut(1000)],
        [cut(1000, sized=False)],
        [cut(0)],
        [reset],
        [wrong],
        [longer],
        [page],
        [stall()],
        [stall(answer=False)],
        [drip(0.02)],
    ],
    ids=[
        "503-twice",
        "500",
        "408-and-425",
        "429",
        "cut",
        "cut-unsized",
        "cut-at-once",
        "reset",
        "wrong",
        "longer",
        "page",
        "stall",
        "mute",
        "drip",
    ],
)
def test_what_goes_wrong_for_a_while_is_tried_again(web, folder, tmp_path, faults, request, frail):
    if request.node.callspec.id in ("stall", "mute", "drip"):
        frail(folder)
    web.faults["a.tar"] = faults
    assert folder.path(**about()).read_bytes() == DATA
    assert web.asked["a.tar"] == len(faults) + 1
    assert copies(tmp_path / "cache") == only_copy()


def test_a_size_that_nobody_says_and_a_redirect_are_no_faults(web, folder):
    web.files["b.tar"] = DATA
    web.faults = {"a.tar": [moved(f"{web.url}/b.tar?signature=s")], "b.tar": [unsized]}
    assert folder.path(**about()).read_bytes() == DATA
    assert web.asked == {"a.tar": 1, "b.tar": 1}


def test_a_small_file_is_tried_again_too(web, folder, frail):
    frail(folder)
    web.faults["manifest.jsonl"] = [stall(), status(503), cut(3)]
    assert folder.read("manifest.jsonl") == MANIFEST
    assert web.asked["manifest.jsonl"] == 4


def test_a_server_that_says_how_long_to_wait_is_heard(web, folder):
    web.faults["a.tar"] = [status(429, Retry_After="0.2")]
    folder.path(**about())
    assert web.times[1] - web.times[0] >= 0.2
    assert storage._retry_after({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}) > 1e9
    assert storage._pause(Patience(longest_wait=1), 1, 1e9) <= 5 + 1
    assert storage._retry_after({"Retry-After": "soon"}) == 0


def test_waits_grow_and_are_drawn():
    for tries, most in ((1, 1), (2, 2), (5, 16), (9, 60)):
        drawn = [storage._pause(Patience(), tries, 0) for _ in range(200)]
        assert 0 <= min(drawn) < most / 4 < most / 2 < max(drawn) <= most


# What stays wrong


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(503), r"did not arrive in 4 tries: 4 x 503 Service Unavailable; look after"),
        (wrong, r"in 4 tries: 4 x other bytes \(sha256 [0-9a-f]{12}, not "),
        (longer, r"4 x more than the 16,384 bytes expected;"),
        (
            page,
            f"4 x {len(PAGE)} bytes instead of 16,384; begins with '<!DOCTYPE html>.*a page in",
        ),
        (cut(1000, sized=False), "4 x 1,000 bytes instead of 16,384;"),
        (cut(1000), "in 4 tries: 4 x ClientPayloadError"),
    ],
    ids=["503", "wrong", "longer", "page", "cut-unsized", "cut"],
)
def test_what_stays_wrong_is_said_of_every_try(web, folder, tmp_path, fault, message):
    web.faults["a.tar"] = always(fault)
    with pytest.raises(FetchError, match=message) as caught:
        folder.path(**about())
    assert str(caught.value).startswith(f"{web.url}/a.tar: ")
    assert caught.value.shard == "a"
    assert web.asked["a.tar"] == 4
    assert copies(tmp_path / "cache") == []


def test_how_long_it_was_tried_is_said_and_so_is_that_it_takes_long(
    web, tmp_path, monkeypatch, caplog
):
    web.faults["a.tar"] = always(status(429, Retry_After="0.2"))
    folder = open_folder(web.url, cache=tmp_path, patience=Patience(3, 0.01, 1))
    monkeypatch.setattr(storage, "TELL_AFTER", 0.1)
    clock = [0.0]  # which only the pauses move
    monkeypatch.setattr(storage, "time", SimpleNamespace(**vars(time)))
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    wait = lambda seconds: clock.append(clock.pop() + seconds)  # noqa: E731
    monkeypatch.setattr(folder._here().stop, "wait", wait)
    with pytest.raises(FetchError, match=r"in 3 tries: 3 x 429 .*; 0\.4 s went into it"):
        folder.path(**about())
    (told,) = caplog.messages  # the first try is nothing to speak of
    assert "a.tar: try 2 of 3: 429 Too Many Requests; again in 0.2 s" in told


@pytest.mark.parametrize(("fault", "came"), [(drip(0.01), "[0-9]+"), (stall(5), "[05]")])
def test_what_trickles_is_given_up_and_said_to(web, tmp_path, fault, came):
    web.faults["a.tar"] = always(fault)
    folder = open_folder(web.url, cache=tmp_path, patience=HASTY)
    with pytest.raises(
        FetchError, match=rf"in 2 tries: .*stalled: {came} bytes in 0\.2 s, after "
    ):
        folder.path(**about())
    assert copies(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (404, r"a\.tar: not there \(404|a\.tar: not there \(FileNotFoundError"),
        (403, r"access denied \(403 Forbidden\); check that the credentials"),
        (401, r"access denied \(401 Unauthorized\)"),
        (410, r"refused \(410 Gone\)"),
    ],
)
def test_what_will_not_change_fails_at_once(web, folder, tmp_path, code, message):
    web.faults["a.tar"] = always(status(code))
    with pytest.raises(FetchError, match=message):
        folder.path(**about())
    assert web.asked["a.tar"] == 1
    assert copies(tmp_path / "cache") == []


def test_a_manifest_that_is_not_there_is_no_failure_to_fetch(web, folder):
    del web.files["manifest.jsonl"]
    with pytest.raises(ShardError, match="not there") as caught:
        folder.read("manifest.jsonl")
    assert not isinstance(caught.value, FetchError)


def test_credentials_that_expire_are_read_anew_once(web, folder, monkeypatch):
    renewed = []
    real = storage.file_system
    monkeypatch.setattr(
        storage,
        "file_system",
        lambda url, fresh=False: (renewed.append(fresh), real(url, fresh))[1],
    )
    folder.read("manifest.jsonl")
    web.faults["a.tar"] = [status(403)]
    assert folder.path(**about()).read_bytes() == DATA
    assert renewed == [False, True]
    web.faults["manifest.jsonl"] = always(status(403))
    with pytest.raises(FetchError, match="also with credentials read anew"):
        folder.read("manifest.jsonl")
    assert web.asked["manifest.jsonl"] == 3


def test_a_package_that_is_missing_and_a_scheme_nobody_knows_say_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    with pytest.raises(FetchError, match=r"this kind of URL cannot be opened.*install what"):
        open_folder("what://ever", cache=tmp_path).read("manifest.jsonl")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)  # that of earlier tests
    with pytest.raises(FetchError, match=r"\(Install s3fs to access S3\); pip install s3fs"):
        open_folder("s3://bucket/x", cache=tmp_path).read("manifest.jsonl")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(
        FetchError, match=r"needs the `aiohttp` package; pip install 'siftloader\[urls\]'"
    ):
        open_folder("http://127.0.0.1:9/x", cache=tmp_path).read("manifest.jsonl")


def test_a_server_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("aiohttp")
    folder = open_folder("http://127.0.0.1:9/x", cache=tmp_path, patience=QUICK)
    with pytest.raises(FetchError, match="in 4 tries: 4 x ClientConnectorError: Cannot connect"):
        folder.read("manifest.jsonl")


# One fetch per machine


def fetch_in_child(url, cache, results, barrier):
    folder = RemoteFolder(url, cache, None, QUICK)
    barrier.wait()
    results.put(folder.path(**about()).read_bytes() == DATA)


def test_many_processes_and_threads_make_one_request(web, tmp_path):
    web.faults["a.tar"] = always(slow(0.3))
    context = multiprocessing.get_context("fork")
    results, barrier = context.Queue(), context.Barrier(6)
    children = [
        context.Process(target=fetch_in_child, args=(web.url, tmp_path, results, barrier))
        for _ in range(6)
    ]
    for child in children:
        child.start()
    assert [results.get(timeout=SOON) for _ in children] == [True] * 6
    for child in children:
        child.join()
    assert web.asked == {"a.tar": 1}
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    web.files["b.tar"] = DATA[::-1]
    threads = [
        threading.Thread(target=folder.path, kwargs=about("b.tar", DATA[::-1])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert web.asked["b.tar"] == 1
    assert copies(tmp_path) == sorted(only_copy() + only_copy(DATA[::-1]))


def fetch_and_hang(url, cache):
    RemoteFolder(url, cache, None, Patience()).path(**about())


def wait_until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_when_the_one_that_fetches_is_killed_the_next_goes_on(web, folder, tmp_path):
    web.faults["a.tar"] = [stall(100)]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=fetch_and_hang, args=(web.url, tmp_path / "cache"))
    child.start()
    part = sha(DATA) + ".tar.part"
    wait_until(lambda: part in copies(tmp_path / "cache") and web.asked["a.tar"])
    waiting = threading.Thread(target=folder.path, kwargs=about())
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    assert web.asked["a.tar"] == 1
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    waiting.join()
    assert copies(tmp_path / "cache") == only_copy()
    assert web.asked["a.tar"] == 2


def test_a_lock_whose_file_was_removed_keeps_nobody_out(tmp_path, monkeypatch):
    """Opened by one, removed by its holder, made anew by a third: the first must look again."""
    lock, opened = tmp_path / "x.lock", storage._opened_lock
    holder, third = storage._lock(lock, wait=False), []

    def overtaken(path):
        handle = opened(path)
        monkeypatch.setattr(storage, "_opened_lock", opened)
        storage._unlock(lock, holder)
        third.append(storage._lock(lock, wait=False))
        return handle

    monkeypatch.setattr(storage, "_opened_lock", overtaken)
    assert storage._lock(lock, wait=False) is None
    storage._unlock(lock, third[0])
    assert not lock.exists()


def test_a_child_forked_while_a_file_comes_does_not_keep_its_lock(web, folder, tmp_path):
    """flock belongs to the open file, which a fork shares: the parent's death must still release it."""
    lock = tmp_path / "x.lock"
    context = multiprocessing.get_context("fork")
    started, go_on = context.Event(), context.Event()
    handle = storage._lock(lock, wait=False)
    child = context.Process(target=lambda: (started.set(), go_on.wait(100)))
    child.start()
    assert started.wait(SOON)
    try:
        storage._HELD.discard(handle)
        os.close(handle)  # what the system does when a process is killed
        other = storage._lock(lock, wait=False)
        assert other is not None
        storage._unlock(lock, other)
    finally:
        go_on.set()
        child.join()


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_and_another_asked_for(
    web, folder, tmp_path, monkeypatch, reason
):
    """As some network file systems are mounted: two machines would write one file."""
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, how):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FetchError, match=r"no locks.*SIFTLOADER_CACHE or cache="):
        folder.path(**about())
    assert not storage._HELD
    assert web.asked == {}


def test_an_interrupt_while_a_lock_is_taken_does_not_keep_it(tmp_path, monkeypatch):
    """The next fetch of a notebook would wait for its own process for ever."""
    fcntl = pytest.importorskip("fcntl")
    lock, flock = tmp_path / "x.lock", fcntl.flock

    def interrupted(handle, how):
        flock(handle, how)
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage._lock(lock, wait=True)
    monkeypatch.setattr(fcntl, "flock", flock)
    handle = storage._lock(lock, wait=False)
    assert handle is not None
    storage._unlock(lock, handle)
    assert not storage._HELD


def test_whoever_waits_long_is_told_for_what(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "TELL_AFTER", 0.05)
    lock = tmp_path / "x.lock"
    handle = storage._lock(lock, wait=False)
    waiting = threading.Thread(
        target=lambda: storage._unlock(lock, storage._lock(lock, wait=True))
    )
    waiting.start()
    wait_until(lambda: caplog.messages)
    storage._unlock(lock, handle)
    waiting.join()
    (told,) = caplog.messages
    assert re.fullmatch(rf"for \d+ s another process has held {lock}", told)


def test_what_a_dead_run_left_is_swept_and_what_lives_is_not(web, tmp_path):
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    (tmp_path / "cd").mkdir()
    dead, alive = (tmp_path / "cd" / (digit * 64 + ".tar") for digit in "ab")
    for each in (dead, alive):
        Path(f"{each}.part").write_bytes(b"half")
        Path(f"{each}.lock").touch()
    (tmp_path / "cd" / "notes.txt").write_text("not ours")
    handle = storage._lock(Path(f"{alive}.lock"), wait=False)
    folder.path(**about())
    storage._unlock(Path(f"{alive}.lock"), handle)
    assert copies(tmp_path) == sorted([*only_copy(), alive.name + ".part", "notes.txt"])


def test_a_part_of_a_dead_run_is_not_continued(web, folder, tmp_path):
    part = tmp_path / "cache" / sha(DATA)[:2] / (sha(DATA) + ".tar.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"garbage" * 10000)
    assert folder.path(**about()).read_bytes() == DATA
    assert copies(tmp_path / "cache") == only_copy()


# Bounds


def shards(web, count, size=10_000):
    made = [bytes([index]) * size for index in range(count)]
    web.files |= {f"{index}.tar": data for index, data in enumerate(made)}
    return [about(f"{index}.tar", data) for index, data in enumerate(made)]


def kept(cache, wanted):
    return [index for index, one in enumerate(wanted) if one["sha256"] + ".tar" in copies(cache)]


def test_the_least_recently_used_go_first_and_the_bound_holds(web, tmp_path):
    folder = open_folder(web.url, cache=tmp_path, cache_bytes=30_000, patience=QUICK)
    wanted = shards(web, 5)
    first = [folder.path(**one) for one in wanted[:3]]
    assert kept(tmp_path, wanted) == [0, 1, 2]
    identity = first[0].stat().st_mtime_ns
    folder.path(**wanted[0])  # used again
    assert first[0].stat().st_mtime_ns == identity
    mapped = first[1].open("rb")
    folder.path(**wanted[3])
    assert kept(tmp_path, wanted) == [0, 2, 3]
    with mapped:
        assert mapped.read() == b"\1" * 10_000  # who has it open keeps it
    folder.path(**wanted[1])
    assert kept(tmp_path, wanted) == [0, 1, 3]
    assert web.asked["1.tar"] == 2
    assert folder.room() == 30_000


def test_room_is_made_before_a_file_comes_and_for_what_others_fetch_too(web, tmp_path):
    wanted = shards(web, 3)
    folder = open_folder(web.url, cache=tmp_path, cache_bytes=20_000, patience=QUICK)
    folder.path(**wanted[0])
    go_on = threading.Event()
    web.faults["1.tar"] = [once(go_on)]
    slow_one = threading.Thread(target=folder.path, kwargs=wanted[1])
    slow_one.start()
    wait_until(lambda: any(name.endswith(".part") for name in copies(tmp_path)))
    folder.path(**wanted[2])  # 10,000 kept + 10,000 on their way: the first must go
    assert kept(tmp_path, wanted) == [2]
    go_on.set()
    slow_one.join()
    assert kept(tmp_path, wanted) == [1, 2]


def test_a_file_larger_than_the_cache_is_refused(web, tmp_path):
    folder = open_folder(web.url, cache=tmp_path, cache_bytes=1000, patience=QUICK)
    with pytest.raises(FetchError, match="cache_bytes=1000 is less than the 16384 bytes"):
        folder.path(**about())
    assert copies(tmp_path) == []
    assert web.asked == {}


def test_a_disk_is_never_filled_to_the_last(web, tmp_path, monkeypatch):
    wanted = shards(web, 3)
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    folder.path(**wanted[0])
    free = [35_000]

    def usage(path):
        return 40_000 - 10_000 * len(kept(tmp_path, wanted)) + free[0]

    monkeypatch.setattr(storage, "_free", lambda root: (usage(root), 60_000))
    folder.path(**wanted[1])
    assert kept(tmp_path, wanted) == [1]  # ours goes, before the reserve does
    assert folder.room() == 15_000
    free[0] = 20_000
    with pytest.raises(
        FetchError, match=r"the disk has 50000 bytes free and 60000 of them are left"
    ):
        folder.path(**wanted[2])
    assert kept(tmp_path, wanted) == [1]  # nothing is thrown away in vain


def test_a_full_disk_is_an_error_that_leaves_nothing(web, tmp_path):
    """The system refuses to write beyond a limit in a child; whoever comes next finds nothing half done."""
    code = f"""
        import resource, sys
        from siftloader.errors import FetchError
        from siftloader.storage import open_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        folder = open_folder({web.url!r}, cache={str(tmp_path)!r})
        try:
            folder.path(**{about()!r})
        except FetchError as error:
            sys.exit(str(error))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert f"{tmp_path}: cannot keep a copy of a.tar ([Errno {errno.EFBIG}]" in found.stderr
    assert "SIFTLOADER_CACHE or cache=" in found.stderr
    assert copies(tmp_path) == []


@pytest.mark.parametrize("what", ["ftruncate", "fsync", "replace"])
def test_a_disk_that_fails_is_no_matter_of_the_network(web, tmp_path, monkeypatch, what):
    def failing(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if what == "ftruncate":
        monkeypatch.setattr(storage.os, "ftruncate", failing)
    elif what == "fsync":
        monkeypatch.setattr(storage.os, "fsync", failing)
    else:
        monkeypatch.setattr(Path, "replace", failing)
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    with pytest.raises(FetchError, match=r"cannot keep a copy of a\.tar.*Errno 5") as caught:
        folder.path(**about())
    assert caught.value.shard == "a"
    assert web.asked["a.tar"] <= 1
    assert copies(tmp_path) == []


def as_nobody(cache, url, results):
    os.setuid(65534)
    folder = RemoteFolder(url, cache, None, QUICK)
    try:
        results.put(folder.path(**about()).read_bytes() == DATA)
        folder.path(**about("b.tar", DATA[::-1]))
    except Exception as error:
        results.put(f"{type(error).__name__} {error}")


def test_a_cache_that_is_only_read_serves_what_it_has(web):
    if os.getuid():
        pytest.skip("needs to become another user")
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        cache = Path(made)
        cache.chmod(0o755)
        open_folder(web.url, cache=cache, patience=QUICK).path(**about())
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=as_nobody, args=(cache, web.url, results))
        child.start()
        assert results.get(timeout=SOON) is True
        refused = results.get(timeout=SOON)
        child.join()
    assert refused.startswith(f"FetchError {cache}: cannot keep a copy of b.tar ([Errno 13]")


def as_a_colleague(cache, url, wanted, results):
    os.setuid(65534)
    folder = RemoteFolder(url, cache, 30_100, QUICK)
    try:
        results.put([folder.path(**one).read_bytes()[0] for one in wanted])
    except Exception as error:
        results.put(f"{type(error).__name__} {error}")


def test_what_other_users_left_in_a_common_cache_stops_nobody(web):
    """In a folder like /tmp nobody may remove, or open for writing, what belongs to another."""
    if os.getuid():
        pytest.skip("needs to become another user")
    import tempfile

    wanted = shards(web, 5)
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        cache = Path(made)
        for name in ("", "cd", *(one["sha256"][:2] for one in wanted)):
            (cache / name).mkdir(exist_ok=True)
            (cache / name).chmod(0o1777)
        theirs = open_folder(web.url, cache=cache, patience=QUICK)
        theirs.path(**wanted[0])
        for dead in (
            cache / "cd" / ("a" * 64),
            Path(f"{theirs.copies.place('4.tar', sha(bytes([4]) * 10_000))}"),
        ):
            Path(f"{dead}.lock").touch()
        (cache / "cd" / ("a" * 64 + ".part")).write_bytes(b"half")
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=as_a_colleague, args=(cache, web.url, wanted, results))
        child.start()
        found = results.get(timeout=SOON)
        child.join()
        left = kept(cache, wanted)
    assert found == [0, 1, 2, 3, 4]
    assert left == [0, 3, 4]  # their own went, least recently used first


def test_links_in_a_common_cache_lead_nowhere(web, folder, tmp_path):
    """Whoever may write there could else have files elsewhere cut off, made, or taken for copies."""
    victim, new = tmp_path / "victim", tmp_path / "new"
    victim.write_bytes(b"x" * len(DATA))
    copy = tmp_path / "cache" / sha(DATA)[:2] / (sha(DATA) + ".tar")
    copy.parent.mkdir(parents=True)
    copy.symlink_to(victim)
    Path(f"{copy}.part").symlink_to(victim)
    assert folder.path(**about()).read_bytes() == DATA
    assert not copy.is_symlink()
    assert victim.read_bytes() == b"x" * len(DATA)
    copy.unlink()
    Path(f"{copy}.lock").symlink_to(new)
    with pytest.raises(FetchError, match=r"cannot keep a copy.*\.lock"):
        folder.path(**about())
    assert not new.exists()


def test_a_part_is_made_as_large_as_it_will_be_through_its_own_handle(tmp_path, monkeypatch):
    """Between its being made and its being grown, a link could take its name."""
    victim = tmp_path / "victim"
    victim.write_bytes(DATA)
    plain = Path.open

    def overtaken(path, mode):
        file = plain(path, mode)
        part.unlink()
        part.symlink_to(victim)
        return file

    copies = storage.Copies(tmp_path / "cache")
    copy = copies.place("a.tar", sha(DATA))
    part = Path(f"{copy}.part")
    copy.parent.mkdir(parents=True)
    monkeypatch.setattr(Path, "open", overtaken)
    with copies.part(copy, 10) as (_, file):
        file.close()
    assert victim.stat().st_size == len(DATA)


def test_a_cache_that_is_a_file_is_named(web, tmp_path):
    (tmp_path / "cache").write_text("")
    folder = open_folder(web.url, cache=tmp_path / "cache", patience=QUICK)
    with pytest.raises(FetchError, match=r"cache: cannot keep a copy of a\.tar"):
        folder.path(**about())
    folder = open_folder(web.url, cache="/proc/nothing/here", patience=QUICK)
    with pytest.raises(FetchError, match=r"cannot keep a copy of a\.tar"):
        folder.path(**about())


# Damage, and reading ahead


def test_a_damaged_copy_is_thrown_away_and_fetched_anew(web, folder):
    path = folder.path(**about())
    path.write_bytes(DATA[:-1] + b"x")
    assert folder.path(**about()) == path  # the size is right: whoever reads it finds out
    folder.forget("a.tar", sha256=sha(DATA))
    assert folder.path(**about()).read_bytes() == DATA
    path.write_bytes(DATA[:-1])  # a wrong size is seen at once
    assert folder.path(**about()).read_bytes() == DATA
    path.unlink()  # evicted by somebody
    assert folder.path(**about()).read_bytes() == DATA
    assert web.asked["a.tar"] == 4
    folder.forget("b.tar", sha256=sha(b""))  # never there: nothing


def test_fetching_ahead_returns_at_once_and_what_comes_is_found(web, tmp_path):
    wanted = shards(web, 4)
    go_on = threading.Event()
    web.faults |= {f"{index}.tar": [once(go_on)] for index in range(4)}
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    folder.fetch_ahead([tuple(one.values()) for one in wanted])
    folder.fetch_ahead([tuple(one.values()) for one in wanted])
    assert kept(tmp_path, wanted) == []
    go_on.set()
    wait_until(lambda: kept(tmp_path, wanted) == [0, 1, 2, 3])
    for one in wanted:
        folder.path(**one)
    assert set(web.asked.values()) == {1}
    wait_until(lambda: not folder._here().threads)
    assert copies(tmp_path) == sorted(one["sha256"] + ".tar" for one in wanted)


def test_what_is_asked_for_ahead_now_takes_the_place_of_what_was(web, tmp_path):
    """After a jump in the order, what lay ahead before is no longer wanted."""
    wanted = shards(web, 6)
    asked_anew = threading.Event()
    web.faults |= {f"{index}.tar": [once(asked_anew)] for index in range(2)}
    folder = open_folder(web.url, cache=tmp_path, patience=QUICK)
    folder.fetch_ahead([tuple(one.values()) for one in wanted[:5]])
    wait_until(lambda: len(web.asked) == 2)
    folder.fetch_ahead([tuple(wanted[5].values())])
    asked_anew.set()
    wait_until(lambda: not folder._here().threads)
    assert kept(tmp_path, wanted) == [0, 1, 5]


def test_what_fails_ahead_fails_when_it_is_wanted(web, folder):
    web.faults["a.tar"] = always(status(404))
    folder.fetch_ahead([("a.tar", len(DATA), sha(DATA)), ("../x", 1, sha(b""))])
    wait_until(lambda: not folder._here().threads)
    with pytest.raises(FetchError, match="not there"):
        folder.path(**about())


def test_closing_ends_what_is_on_its_way(web, tmp_path):
    web.faults["a.tar"] = always(stall(5))
    folder = open_folder(web.url, cache=tmp_path, patience=Patience())
    folder.fetch_ahead([("a.tar", len(DATA), sha(DATA))])
    wait_until(lambda: web.asked["a.tar"] == 1)
    began = time.monotonic()
    folder.close()
    assert time.monotonic() - began < SOON
    assert copies(tmp_path) == []
    web.faults.clear()
    assert folder.path(**about()).read_bytes() == DATA  # and can be used again
    folder.close()


def test_a_fork_and_a_pickle_start_afresh(web, folder, tmp_path, frail):
    folder.read("manifest.jsonl")
    frail(folder)
    web.faults["a.tar"] = [stall(5)]
    folder.fetch_ahead([("a.tar", len(DATA), sha(DATA))])
    wait_until(lambda: web.asked["a.tar"] == 1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def fetch():
        folder.patience = QUICK
        results.put(folder.path(**about()).read_bytes() == DATA)

    child = context.Process(target=fetch)
    child.start()
    assert results.get(timeout=SOON) is True
    child.join()
    assert web.asked["a.tar"] == 2  # the parent's, given up after a stall, and one more by either


@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
def test_a_process_that_ends_while_something_comes_ends_at_once_and_quietly(web, tmp_path, ends):
    web.files |= {f"{name}.tar": DATA for name in "abc"}
    web.faults = {f"{name}.tar": always(stall(100)) for name in "abc"}
    code = f"""
        from siftloader.storage import open_folder
        folder = open_folder({web.url!r}, cache={str(tmp_path)!r})
        folder.read("manifest.jsonl")
        folder.fetch_ahead([(f"{{name}}.tar", {len(DATA)}, name * 64) for name in "ab"])
        print("now", flush=True)
        if {ends == "by Ctrl-C"}:
            folder.path("c.tar", size={len(DATA)}, sha256="c" * 64)
        while True:  # until one is on its way
            import pathlib
            if [*pathlib.Path({str(tmp_path)!r}).glob("??/*.part")]:
                break
    """
    with subprocess.Popen(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "ignore::ResourceWarning",
            "-c",
            textwrap.dedent(code),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout.readline() == "now\n", run.stderr.read()
        if ends == "by Ctrl-C":
            wait_until(lambda: web.asked["c.tar"] == 1)
            run.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, told = run.communicate(timeout=100)
    assert time.monotonic() - began < SOON
    if ends == "by Ctrl-C":
        assert told.rstrip().endswith("KeyboardInterrupt")
        assert "c" * 64 + ".tar.part" not in copies(tmp_path)
    else:
        assert (run.returncode, told) == (0, "")
    web.faults.clear()
    open_folder(web.url, cache=tmp_path, patience=QUICK).path(**about())
    assert copies(tmp_path) == only_copy()


# Object stores


@pytest.fixture(scope="module")
def s3():
    """An S3 on loopback; there where s3fs and moto[server] are installed."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    server_of = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = server_of(port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        yield system
        server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what these packages do among themselves
def test_in_a_bucket(s3, tmp_path):
    type(s3).clear_instance_cache()  # one of another test knows another server
    large = os.urandom(9 << 20)  # more than one block
    s3.pipe({"bucket/x/a.tar": large, "bucket/x/manifest.jsonl": MANIFEST})
    folder = open_folder("s3://bucket/x", cache=tmp_path, patience=QUICK_BUCKET)
    assert folder.read("manifest.jsonl") == MANIFEST
    s3.pipe("bucket/x/manifest.jsonl", b"new, and longer than before\n")
    assert folder.read("manifest.jsonl") == b"new, and longer than before\n"
    assert folder.path(**about(data=large)).read_bytes() == large
    with pytest.raises(FetchError, match=r"s3://bucket/x/b\.tar: not there \("):
        folder.path(**about("b.tar"))
    with pytest.raises(FetchError, match=r"in 2 tries: 2 x other bytes \(sha256"):
        folder.path("a.tar", size=len(large), sha256=sha(b""))
    with pytest.raises(ShardError, match="not there") as caught:
        open_folder("s3://no-such-bucket/x", cache=tmp_path).read("manifest.jsonl")
    assert not isinstance(caught.value, FetchError)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    s3.pipe("bucket/x/c.tar", DATA)
    child = context.Process(
        target=lambda: results.put(folder.path(**about("c.tar")).read_bytes() == DATA)
    )
    child.start()
    assert results.get(timeout=SOON) is True
    child.join()
    folder.close()
    assert copies(tmp_path) == sorted(only_copy() + only_copy(large))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_bucket_that_is_busy_or_mute_or_denies(s3, web, tmp_path, monkeypatch):
    """A server that goes wrong in place of the store: what boto makes of it is understood."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url.removesuffix("/data"))
    for fault, message in (
        (status(403), r"access denied \(403 Forbidden"),
        (status(503), "in 2 tries: 2 x "),
        (stall(answer=False), "in 2 tries: 2 x stalled: 0 bytes in 5 s"),
    ):
        web.faults["a.tar"] = always(fault)
        type(s3).clear_instance_cache()
        folder = open_folder("s3://bucket/x", cache=tmp_path, patience=QUICK_BUCKET)
        with pytest.raises(FetchError, match=message):
            folder.path(**about())
    assert copies(tmp_path) == []


# All at once


def read_for_ever(url, cache, most, wanted, seed, log):
    import random

    rng = random.Random(seed)
    folder = open_folder(url, cache=cache, cache_bytes=most, patience=Patience(9, 0.01, 0.05, 5))
    while True:
        order = rng.sample(wanted, len(wanted))
        for index, one in enumerate(order):
            folder.fetch_ahead([tuple(each.values()) for each in order[index + 1 : index + 3]])
            while True:
                try:
                    data = folder.path(**one).read_bytes()
                    break
                except FileNotFoundError:  # evicted before it was opened
                    continue
                except Exception as error:
                    log.write_text(repr(error))
                    raise
            if sha(data) != one["sha256"]:
                log.write_text("other bytes")
                raise SystemExit
        with log.open("a") as lines:
            lines.write("round\n")


def held_bytes(cache):
    held = 0
    for entry in cache.glob("??/*.tar"):
        with suppress(FileNotFoundError):
            held += entry.stat().st_size
    return held


@pytest.mark.slow
def test_readers_that_are_killed_all_the_time_read_the_right_bytes_from_a_bad_server(
    web, tmp_path
):
    """Six readers, a cache for five of twelve files, a fault in every third answer, a kill every 0.2 s."""
    wanted = shards(web, 12, size=200_000)
    bad = [
        wrong,
        status(503),
        cut(5000),
        cut(100_000, sized=False),
        page,
        reset,
        longer,
        slow(0.2),
    ]
    for index in range(12):
        good = always(slow(0.02))
        web.faults[f"{index}.tar"] = (
            fault
            for number, each in enumerate(good)
            for fault in ([each, each, bad[(number + index) % len(bad)]])
        )
    context = multiprocessing.get_context("fork")
    cache, logs = tmp_path / "cache", tmp_path / "logs"
    logs.mkdir()
    most, sizes = 1_000_000, []

    def begin(seed):
        child = context.Process(
            target=read_for_ever, args=(web.url, cache, most, wanted, seed, logs / str(seed))
        )
        child.start()
        return child

    children = [begin(seed) for seed in range(6)]
    end = time.monotonic() + 12
    killed = 0
    try:
        while time.monotonic() < end:
            time.sleep(0.2)
            victim = children[killed % 3]  # the other three live on
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            killed += 1
            children[(killed - 1) % 3] = begin(100 + killed)
            sizes.append(held_bytes(cache))
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
    lines = [line for log in logs.iterdir() for line in log.read_text().splitlines()]
    assert killed > 20
    assert set(lines) == {"round"}
    assert len(lines) > 3
    assert max(sizes) <= most
    left = open_folder(web.url, cache=cache, cache_bytes=most, patience=QUICK)
    web.faults.clear()
    web.files["last.tar"] = DATA
    left.path(**about("last.tar"))
    assert all(storage._COPY.fullmatch(name) for name in copies(cache))
