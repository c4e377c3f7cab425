"""Where the files of a data set are: a folder, or behind a URL with verified copies on this machine.

    folder = open_folder("s3://bucket/shards/wikibooks")
    lines = folder.read("manifest.jsonl")                           # as it is there now
    tar = folder.path("train-000000.tar", size=..., sha256=...)     # a local file of these bytes

A copy is named by its sha256, so generations and aliases of a URL are never confused, and all processes of
a machine share it: one of them fetches, the others wait for its lock and find the file. It takes its name
only when size and sha256 are right and it is on disk. Locks are the system's (flock), released when their
holder dies; what a dead run left half-written is removed by whoever holds the lock next, or in passing.

``<cache>/ab/ab12….tar`` the copy · ``….tar.lock`` somebody fetches it · ``….tar.part`` what came so far
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import logging
import os
import random
import re
import shutil
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from siftloader.errors import FetchError, ShardError
from siftloader.files import file_system, is_url


COMMANDS = ("pipe", "exec", "shell", "sh", "cmd", "popen")  # schemes that would run a program
BLOCK = (
    4 << 20
)  # bytes of a request where they are for ranges: slower than one per stall ends a try
LARGEST_READ = 1 << 30  # bytes of a file that is read whole: a manifest of some million shards
TELL_AFTER = 30  # seconds of waiting for another process, or of failing, before a warning
AHEAD = 2  # files a process fetches ahead at the same time
RESERVE = 5 << 30  # bytes of a disk that are never filled with copies
RESERVE_SHARE = 0.02  # or this share of it, if that is less
PAGES = (b"<!doctype", b"<html", b"<?xml", b"{")  # how what is sent in place of a file begins

_LOG = logging.getLogger(__name__)
_COPY = re.compile(r"[0-9a-f]{64}(\.[A-Za-z0-9]{1,8})?")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How often a file is asked for, and how slowly it may come.

    Patience(tries=3, stall=20)     # at most 3 times; 20 s with under 1 KiB/s end a try

    Before try n + 1 it waits a random time of up to ``wait * 2**n`` seconds, ``longest_wait`` at most,
    and as long as the server asks (Retry-After, five times ``longest_wait`` at most).
    """

    tries: int = 6
    wait: float = 1.0  # seconds
    longest_wait: float = 60.0  # seconds
    stall: float = 60.0  # seconds over which the rate is taken
    floor: int = 1024  # bytes a second

    def __post_init__(self) -> None:
        if self.tries < 1 or min(self.wait, self.longest_wait, self.floor) < 0 or self.stall <= 0:
            raise ValueError(f"needs at least one try, a stall above zero, nothing below: {self}")


def open_folder(
    where: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    patience: Patience | None = None,
) -> Folder:
    """The folder at a path, or behind any URL that fsspec opens; nothing is read yet.

    open_folder("shards/wikibooks")
    open_folder("s3://bucket/shards", cache="/scratch/copies", cache_bytes=200 << 30)

    ``cache`` holds the copies of this machine: $SIFTLOADER_CACHE, else ~/.cache/siftloader. They may take
    ``cache_bytes``, or all of the disk but a reserve (5 GiB, or 2 % of a small disk); the least recently
    used go first. ValueError for URLs that would run a program, and for wrong numbers.
    """
    given = os.fspath(where)
    scheme = given.partition(":")[0].lower() if isinstance(where, str) else ""
    if scheme in COMMANDS or given.startswith("|"):
        raise ValueError(
            f"{given!r} would run a program, which siftloader does not do; give a path, or a URL such "
            f"as https:// or s3://"
        )
    if not (isinstance(where, str) and is_url(given)):
        return LocalFolder(Path(given))
    if scheme in ("file", "local"):
        return LocalFolder(Path(given.partition("://")[2]))
    return RemoteFolder(given, cache, cache_bytes, patience or Patience())


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or mounted here: its files are used where they are."""

    root: Path
    dated = True  # whether a file whose times changed may hold other bytes

    @property
    def name(self) -> str:
        """The path, for messages."""
        return str(self.root)

    def read(self, name: str) -> bytes:
        """A small file, whole; ShardError if it is not there, FetchError if it cannot be read."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(f"{self.root / name}: no such file; is the path right?") from error
        except OSError as error:
            raise FetchError(
                f"{self.root / name}: cannot be read ({error}); is it a file, and may you?"
            ) from error

    def path(self, name: str, *, size: int | None = None, sha256: str = "") -> Path:
        """Where the file is; nothing is checked, nothing opened."""
        return self.root / name

    def forget(self, name: str, *, sha256: str = "") -> None:
        """Nothing: what lies in the folder is the user's."""

    def fetch_ahead(self, files: Iterable[tuple[str, int | None, str]]) -> None:
        """Nothing: all is here."""

    def room(self) -> int | None:
        """None: there are no copies that would need room."""
        return None

    def close(self) -> None:
        """Nothing: there are no threads."""


class RemoteFolder:
    """A folder behind a URL; files are fetched once per machine, verified, and kept as copies.

    Pickled or forked it starts afresh: threads, connections and locks belong to a process.
    """

    dated = False  # every use of a copy sets a time of it

    def __init__(
        self,
        url: str,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        if "::" in url:
            raise ValueError(
                f"{redacted(url)}: a chain of file systems; give the plain URL, siftloader keeps copies "
                f"itself"
            )
        if cache_bytes is not None and (not isinstance(cache_bytes, int) or cache_bytes < 1):
            raise ValueError(
                f"cache_bytes must be a positive number of bytes, got {cache_bytes!r}"
            )
        self.url, self.patience = url, patience or Patience()
        self.copies = Copies(Path(cache or default_cache()).expanduser().absolute(), cache_bytes)
        self._processes: dict[int, _Process] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url, self.copies.root, self.copies.most, self.patience)

    def __repr__(self) -> str:
        return f"RemoteFolder({self.name!r}, cache={str(self.copies.root)!r})"

    @property
    def name(self) -> str:
        """The URL, for messages: without user, password and query."""
        return redacted(self.url)

    def read(self, name: str) -> bytes:
        """A small file, whole, as it is there now; never kept on disk.

        ShardError if it is not there, FetchError if it cannot be had.
        """

        def once(system: Any, path: str) -> bytes:
            taken = io.BytesIO()
            come = _Coming(system, path, taken, LARGEST_READ)
            come.wait_for(self.patience, here.stop)
            return taken.getvalue()

        here = self._here()
        return self._asked(here, name, once, ShardError)

    def path(self, name: str, *, size: int | None = None, sha256: str) -> Path:
        """A local file that holds these bytes, fetched unless somebody on this machine did already.

        It may be evicted before it is opened: whoever finds it gone calls ``path`` again. Opened or
        mapped, it stays whole. FetchError says what each try found.
        """
        copy = self._fetched(self._here(), name, size, sha256, wait=True)
        assert copy is not None  # only whoever does not wait gets nothing
        return copy

    def forget(self, name: str, *, sha256: str) -> None:
        """Throw the copy away: it turned out to be damaged."""
        copy = self.copies.place(name, sha256)
        with _kept_in(self.copies.root, name), _disk():
            copy.unlink(missing_ok=True)

    def fetch_ahead(self, files: Iterable[tuple[str, int | None, str]]) -> None:
        """Begin to fetch (name, size, sha256) that nobody has or fetches, in this order; return at once.

        Takes the place of what an earlier call asked for and is not begun. What fails here is silent:
        ``path`` tries again and raises.
        """
        here = self._here()
        missing = [
            (name, size, sha256)
            for name, size, sha256 in files
            if not self.copies.has(self.copies.place(name, sha256), size)
        ]
        with here.lock:
            here.pending = deque(missing)
            for _ in range(min(AHEAD, len(missing)) - len(here.threads)):
                thread = threading.Thread(
                    target=self._fetch_pending, args=(here,), daemon=True, name="siftloader-ahead"
                )
                here.threads.add(thread)
                thread.start()

    def room(self) -> int:
        """How many bytes of copies fit: more than a window of shards, or every shard is fetched often."""
        return self.copies.room()

    def close(self) -> None:
        """End the threads of this process; the folder can be used again."""
        here = self._processes.pop(os.getpid(), None)
        if here is None:
            return
        here.stop.set()
        with here.lock:
            here.pending.clear()
            threads = list(here.threads)
        for thread in threads:
            thread.join()

    def _here(self) -> _Process:
        return self._processes.setdefault(os.getpid(), _Process())

    def _fetch_pending(self, here: _Process) -> None:
        while True:
            with here.lock:
                if not here.pending:
                    here.threads.discard(threading.current_thread())
                    return
                name, size, sha256 = here.pending.popleft()
            try:
                self._fetched(here, name, size, sha256, wait=False)
            except ShardError as error:
                _LOG.info("not fetched ahead: %s", error)

    def _fetched(
        self, here: _Process, name: str, size: int | None, sha256: str, wait: bool
    ) -> Path | None:
        # The copy; None if another fetches it and we are not to wait.
        copy = self.copies.place(name, sha256)
        if self.copies.has(copy, size):
            return copy

        def once(system: Any, path: str) -> None:
            with self.copies.part(copy, size) as (part, file):
                come = _Coming(system, path, file, size)
                come.wait_for(self.patience, here.stop)
                come.check(size, sha256)
                with _disk():
                    part.replace(copy)

        with _kept_in(self.copies.root, name), self.copies.locked(copy, wait) as ours:
            if not ours:
                return None
            if not self.copies.has(copy, size):
                self._asked(here, name, once, FetchError)
        return copy

    def _asked(
        self,
        here: _Process,
        name: str,
        once: Callable[[Any, str], Result],
        missing: type[ShardError],
    ) -> Result:
        # What the first try that works gives; the rest are told of in the error.
        url, renewed, began = joined(self.url, name), False, time.monotonic()
        found: list[str] = []
        shard = name.partition(".")[0]
        while True:
            try:
                system = here.system(self.url)
                result = once(system, system._strip_protocol(url))
            except (ShardError, _Unwritable):
                raise
            except Exception as error:
                trouble = _trouble(error)
            else:
                here.worked = True
                return result
            what = scrubbed(trouble.text, self.url)
            found.append(what)
            if trouble.verdict == "missing":
                raise missing(
                    f"{redacted(url)}: not there ({what}); is the URL right, and the copy behind it "
                    f"complete?",
                    shard=shard,
                ) from None
            if trouble.verdict == "denied" and here.worked and not renewed:
                renewed = True  # credentials may have expired: read them anew, once
                here.renew(self.url)
                continue
            if trouble.verdict == "denied":
                anew = ", also with credentials read anew" if renewed else ""
                raise FetchError(
                    f"{redacted(url)}: access denied ({what}){anew}; check that the credentials of this "
                    f"machine are valid and may read it, and that it is there: some stores say the same "
                    f"of what is not",
                    shard=shard,
                ) from None
            if trouble.verdict == "hopeless":
                raise FetchError(f"{redacted(url)}: {what}", shard=shard) from None
            if len(found) >= self.patience.tries:
                raise FetchError(
                    f"{redacted(url)}: did not arrive in {len(found)} tries: {_counted(found)}; look "
                    f"after the server and the network, then run again; "
                    f"{time.monotonic() - began:.1f} s went into it",
                    shard=shard,
                ) from None
            pause = _pause(self.patience, len(found), trouble.retry_after)
            failing_long = time.monotonic() - began > TELL_AFTER
            _LOG.log(
                logging.WARNING if failing_long else logging.INFO,
                "%s: try %d of %d: %s; again in %.1f s",
                redacted(url),
                len(found),
                self.patience.tries,
                what,
                pause,
            )
            if here.stop.wait(pause):
                raise _Stopped(f"{redacted(url)}: the folder was closed while it was fetched")


Folder = LocalFolder | RemoteFolder


def default_cache() -> Path:
    """Where copies are kept unless said otherwise: $SIFTLOADER_CACHE, or in the user's cache folder."""
    if given := os.environ.get("SIFTLOADER_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "siftloader"


def joined(url: str, name: str) -> str:
    """The URL of a file in a folder, with the folder's own query.

    joined("https://host/shards?key=k", "a.tar")    # "https://host/shards/a.tar?key=k"
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or re.search(r"^/|[\\?#*\[\]\x00-\x1f]|:", name):
        raise ShardError(
            f"{redacted(url)}: {name!r} cannot be the name of a file within; the manifest was not "
            f"written by siftloader, so prepare the shards again"
        )
    if not re.match("https?://", url):
        return f"{url.rstrip('/')}/{name}"
    split = urlsplit(url)
    return split._replace(path=f"{split.path.rstrip('/')}/{quote(name)}").geturl()


def redacted(text: str) -> str:
    """A URL, or a text with URLs in it, that may be shown: no users, no passwords, no queries.

    redacted("https://me:secret@host/x?token=t")    # "https://***@host/x?***"
    """
    return _URL.sub(
        lambda found: (
            f"{found[1]}{'***@' if found[2] else ''}{found[3]}{'?***' if found[4] else ''}"
        ),
        text,
    )


_URL = re.compile(
    r"([A-Za-z][\w+.-]*://)"
    r"([^\s'\"/:@]*:(?!\d+/)[^\s'\"@]*@|[^\s'\"/@?]*@)?"  # a secret key may hold a slash
    r"([^\s'\"?<>)]*)"
    r"(\?[^\s'\"<>)]*)?"
)


def scrubbed(text: str, url: str) -> str:
    """A text that may be shown, though a library wrote it that knows the secrets of ``url``."""
    parts = urlsplit(url)
    values = [value for _, value in parse_qsl(parts.query)]
    secrets = {parts.password or "", parts.query, *values, *re.split("[&=]", parts.query)}
    for secret in sorted(secrets | {quote(each) for each in secrets}, key=len, reverse=True):
        if len(secret) >= 6:
            text = text.replace(secret, "***")
    return redacted(text)


class Copies:
    """Verified copies of files on this machine, named by their content, of bounded size.

    ``most`` bytes, those on their way included; None: all of the disk but the reserve.
    """

    def __init__(self, root: Path, most: int | None = None) -> None:
        self.root, self.most = root, most
        self._swept = False

    def place(self, name: str, sha256: str) -> Path:
        """Where the copy of a file is, or would be."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ShardError(f"{name}: {sha256!r} is no sha256 in hex; prepare the shards again")
        suffix = PurePosixPath(name).suffix
        copy = self.root / sha256[:2] / (sha256 + suffix)
        return copy if _COPY.fullmatch(copy.name) else copy.with_suffix("")

    def has(self, copy: Path, size: int | None) -> bool:
        """Whether the copy is there; if so, it was just used."""
        try:
            found = copy.lstat()  # a link is nothing that was fetched
        except OSError:
            return False
        if not stat.S_ISREG(found.st_mode) or size not in (None, found.st_size):
            return False
        with suppress(OSError):  # a cache that is only read keeps its own times
            os.utime(copy, ns=(time.time_ns(), found.st_mtime_ns))  # mtime tells copies apart
        return True

    @contextmanager
    def locked(self, copy: Path, wait: bool = True) -> Iterator[bool]:
        """Hold the right to write a copy; yields False if another has it and we do not wait."""
        lock = copy.with_name(f"{copy.name}.lock")
        handle = _lock(lock, wait)
        try:
            yield handle is not None
        finally:
            if handle is not None:
                _unlock(lock, handle)

    @contextmanager
    def part(self, copy: Path, size: int | None) -> Iterator[tuple[Path, IO[bytes]]]:
        """A file that may become the copy, with room made for it; removed unless it did.

        Whoever writes it closes it: what was given up on may still hold it.
        """
        part = copy.with_name(f"{copy.name}.part")
        try:
            with _locked_for_room(self.root), _disk():
                part.unlink(missing_ok=True)  # of a dead run: the lock of the copy is ours
                self._make_room(size or 0)
                file = part.open("xb")
                if size:
                    try:
                        os.ftruncate(file.fileno(), size)  # counts from now on
                    except OSError:
                        file.close()
                        raise
            yield part, file
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def room(self) -> int:
        """How many bytes of copies fit into the bounds."""
        held = sum(size for _, size, _ in self._held())
        root = self.root
        while not root.exists():
            root = root.parent
        free, reserve = _free(root)
        fits = max(0, free - reserve + held)
        return fits if self.most is None else min(fits, self.most)

    def _make_room(self, size: int) -> None:
        # Alone: two at once would both take the same room. What is mapped elsewhere stays readable.
        if self.most is not None and size > self.most:
            raise OSError(
                f"cache_bytes={self.most} is less than the {size} bytes of one file; raise it"
            )
        free, reserve = _free(self.root)
        if self.most is None and self._swept and free - size >= reserve:
            return
        self._sweep()
        self._swept = True
        held = sorted(self._held())
        total = sum(size for _, size, _ in held)
        if free + total - size < reserve:
            raise OSError(
                f"the disk has {free} bytes free and {reserve} of them are left to others, but the file "
                f"has {size}"
            )
        for _, bytes_, copy in held:
            full = self.most is not None and total + size > self.most
            if not full and free - size >= reserve:
                return
            if _COPY.fullmatch(copy.name):
                with suppress(PermissionError):  # of another user, in a folder like /tmp
                    copy.unlink(missing_ok=True)
                    total -= bytes_
                    free, reserve = _free(self.root)

    def _held(self) -> Iterator[tuple[int, int, Path]]:
        # When last used, how large, where; parts too, at the size that they will have.
        for entry in self.root.glob("??/*"):
            if _COPY.fullmatch(entry.name.removesuffix(".part")):
                with suppress(OSError):
                    found = entry.stat()
                    yield found.st_atime_ns, found.st_size, entry

    def _sweep(self) -> None:
        # What dead runs left: parts and locks whose lock can be had.
        for entry in self.root.glob("??/*.*"):
            name, _, kind = entry.name.rpartition(".")
            if kind in ("part", "lock") and _COPY.fullmatch(name):
                # What cannot be removed, that of another user, say, is no reason to fail.
                with (
                    suppress(OSError, _Unwritable),
                    self.locked(entry.with_name(name), wait=False) as ours,
                ):
                    if ours:
                        entry.with_name(f"{name}.part").unlink(missing_ok=True)


def _free(root: Path) -> tuple[int, int]:
    # Bytes free, and how many of them are not for us.
    disk = shutil.disk_usage(root)
    return disk.free, min(RESERVE, int(disk.total * RESERVE_SHARE))


@contextmanager
def _locked_for_room(root: Path) -> Iterator[None]:
    lock = root / "room.lock"
    handle = _lock(lock, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            _unlock(lock, handle)


@contextmanager
def _kept_in(root: Path, name: str) -> Iterator[None]:
    # What goes wrong on this machine, as opposed to the other end: never worth another try.
    try:
        yield
    except _Unwritable as error:
        raise FetchError(
            f"{root}: cannot keep a copy of {name} ({error}); free some room, or give another folder with "
            f"SIFTLOADER_CACHE or cache=",
            shard=name.partition(".")[0],
        ) from error


_LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as some network disks are mounted
_HELD: set[int] = set()  # locks of this process: a fork must not keep them beyond its parent


def _lock(lock: Path, wait: bool) -> int | None:
    """Hold a lock file alone, and return its handle; None if another does and we do not wait."""
    try:
        import fcntl
    except ImportError:  # no such lock here: two processes may fetch the same, and the last wins
        fcntl = None  # type: ignore[assignment]
    _drop_locks_in_children()
    began, told = time.monotonic(), False
    while True:
        handle, held = _opened_lock(lock), False
        _HELD.add(handle)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us removed the file: then this lock keeps nobody out.
            held = os.path.samestat(os.fstat(handle), lock.stat())
            if held:
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno in _LOCKLESS:
                raise _Unwritable(
                    f"its file system has no locks, so two could write one file: {error}; keep copies on "
                    f"a disk of this machine"
                ) from error
            raise _Unwritable(f"no lock on {lock}: {error}") from error
        finally:
            if not held:
                _HELD.discard(handle)
                os.close(handle)
        if not wait:
            return None
        waited = time.monotonic() - began
        if waited > TELL_AFTER and not told:
            told = True
            _LOG.warning("for %d s another process has held %s", waited, lock)
        time.sleep(min(0.2, 0.005 + waited / 10))


def _opened_lock(lock: Path) -> int:
    with _disk():
        for _ in range(9):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # somebody removes the whole cache just now
                return _open_unlinked(lock)
        raise FileNotFoundError(f"{lock.parent} vanishes as soon as it is made")


def _open_unlinked(lock: Path) -> int:
    # Never through a link, which in a common cache may lead anywhere.
    direct = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | direct, 0o666)
    except PermissionError:
        if not lock.exists():
            raise
        return os.open(lock, os.O_RDONLY | direct)  # another user's, whose lock is as good


def _unlock(lock: Path, handle: int) -> None:
    if handle not in _HELD:  # in a child, whose parent goes on
        return
    with suppress(OSError):
        lock.unlink()
    _HELD.discard(handle)
    with suppress(ImportError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would not do where a child has it too
    os.close(handle)


@functools.cache
def _drop_locks_in_children() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_drop_locks)


def _drop_locks() -> None:
    while _HELD:
        with suppress(OSError):
            os.close(_HELD.pop())


class _Unwritable(Exception):
    """Something on this machine is in the way of a copy."""


class _Stopped(FetchError):
    """The folder was closed while something was on its way."""


@contextmanager
def _disk() -> Iterator[None]:
    # Errors of this machine's disk, told apart from those of the network, which are OSErrors too.
    try:
        yield
    except OSError as error:
        raise _Unwritable(str(error)) from error


@dataclass
class _Process:
    """What belongs to one process: connections, and threads that fetch ahead."""

    worked: bool = False  # whether anything ever came
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    pending: deque[tuple[str, int | None, str]] = field(default_factory=deque)
    threads: set[threading.Thread] = field(default_factory=set)
    opened: Any = None

    def system(self, url: str) -> Any:
        """The file system behind the folder."""
        if self.opened is None:
            self.opened, _ = file_system(url)
        return self.opened

    def renew(self, url: str) -> None:
        """Take a new one, with credentials read anew."""
        self.opened, _ = file_system(url, fresh=True)


class _Coming(threading.Thread):
    """One try at a file, in a thread of its own, so that a read that never returns can be given up.

    Whatever file system it is, and whether it hangs in a name server, in a handshake or in a body, the
    bytes that arrive are what is watched. A thread given up ends when its read does.
    """

    def __init__(self, system: Any, path: str, file: IO[bytes], most: int | None) -> None:
        super().__init__(daemon=True, name="siftloader-fetch")
        self.system, self.path, self.file, self.most = system, path, file, most
        self.count, self.head, self.digest = 0, b"", hashlib.sha256()
        self.given_up = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Copy what comes; never raises."""
        try:
            with _reading(self.system, self.path) as stream:
                while not self.given_up and (chunk := stream.read(BLOCK)):
                    self._take(chunk)
            with _disk():
                self.file.flush()
                if not isinstance(self.file, io.BytesIO):
                    os.ftruncate(self.file.fileno(), self.count)
                    os.fsync(self.file.fileno())
        except BaseException as error:
            self.error = error
        finally:
            if not isinstance(self.file, io.BytesIO):
                with suppress(OSError):
                    self.file.close()

    def _take(self, chunk: bytes) -> None:
        if self.most is not None and self.count + len(chunk) > self.most:
            self.head = self.head or chunk[:64]
            raise _Unfit(f"more than the {self.most:,} bytes expected{_page(self.head)}")
        self.head = self.head or chunk[:64]
        self.digest.update(chunk)
        with _disk():
            self.file.write(chunk)
        self.count += len(chunk)

    def wait_for(self, patience: Patience, stop: threading.Event) -> None:
        """Until all has come; raises what went wrong, TimeoutError where too little comes."""
        seen = deque([(time.monotonic(), 0)])
        self.start()
        try:
            while True:
                self.join(min(0.25, patience.stall / 10))
                if not self.is_alive():
                    break
                if stop.is_set():
                    raise _Stopped(f"{redacted(self.path)}: the folder was closed while it came")
                now = time.monotonic()
                seen.append((now, self.count))
                while len(seen) > 1 and seen[1][0] <= now - patience.stall:
                    seen.popleft()
                came = self.count - seen[0][1]
                if now - seen[0][0] >= patience.stall and came < patience.floor * patience.stall:
                    raise TimeoutError(
                        f"stalled: {came:,} bytes in {patience.stall:g} s, after {self.count:,}"
                    )
        finally:
            self.given_up = True  # nothing is lost where it has ended
        if self.error is not None:
            raise self.error

    def check(self, size: int | None, sha256: str) -> None:
        """Raise _Unfit unless these are the bytes that were to come."""
        if size is not None and self.count != size:
            raise _Unfit(f"{self.count:,} bytes instead of {size:,}{_page(self.head)}")
        if self.digest.hexdigest() != sha256:
            raise _Unfit(
                f"other bytes (sha256 {self.digest.hexdigest()[:12]}, not {sha256[:12]})"
                f"{_page(self.head)}"
            )


class _Unfit(Exception):
    """What came is not what was to come."""


def _page(head: bytes) -> str:
    # How what came begins, where it looks like a page of a proxy, a login or a store.
    if not head.lstrip().lower().startswith(PAGES):
        return ""
    return f"; begins with {head[:32].decode('latin-1')!r}: a page in place of the file"


@contextmanager
def _reading(system: Any, path: str) -> Iterator[IO[bytes]]:
    protocols = system.protocol
    web = "http" in ((protocols,) if isinstance(protocols, str) else protocols)
    # On the web zero streams, in one request: the size given here saves the question for it.
    options = {"block_size": 0, "size": 1} if web else {"block_size": BLOCK}
    with system.open(path, "rb", **options) as stream:
        yield stream


@dataclass(frozen=True)
class _Trouble:
    verdict: Literal["again", "missing", "denied", "hopeless"]
    text: str
    retry_after: float = 0.0  # seconds


def _trouble(error: Exception) -> _Trouble:
    # What to do about an error of any file system: its type, or the HTTP status it or its causes carry.
    status, headers = _response(error)
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if status is not None:
        with suppress(ValueError):
            text = f"{status} {HTTPStatus(status).phrase}"
    if isinstance(error, _Unfit | TimeoutError) and str(error):
        text = str(error)
    if status == 404 or isinstance(error, FileNotFoundError):
        return _Trouble("missing", text)
    if status in (401, 403) or isinstance(error, PermissionError):
        return _Trouble("denied", text)
    if isinstance(error, ImportError | ValueError) and status is None:
        return _Trouble("hopeless", str(error))
    if isinstance(error, (TypeError, LookupError, AttributeError, NotImplementedError)):
        return _Trouble("hopeless", f"cannot be read ({text}); fetch it yourself, give its path")
    if type(error).__name__ == "NoCredentialsError":  # botocore's, a plain Exception
        return _Trouble("denied", text)
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return _Trouble("hopeless", f"refused ({text}); check the URL")
    return _Trouble("again", text, _retry_after(headers))


def _response(error: BaseException | None) -> tuple[int | None, Any]:
    # The status and headers of the answer behind an error, as aiohttp, requests and boto keep them.
    for _ in range(5):
        if error is None:
            break
        answer = getattr(error, "response", None)
        about = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
        for holder, status_name, headers_name in (
            (error, "status", "headers"),
            (answer, "status_code", "headers"),
            (about, "HTTPStatusCode", "HTTPHeaders"),
            (error if type(error).__module__.startswith("gcsfs") else None, "code", ""),
        ):
            read = holder.get if isinstance(holder, dict) else functools.partial(_get, holder)
            status = read(status_name)
            if isinstance(status, int) and 300 <= status < 600:
                return status, read(headers_name)
        error = error.__cause__
    return None, None


def _get(holder: Any, name: str) -> Any:
    return getattr(holder, name, None)


def _retry_after(headers: Any) -> float:
    # Seconds that the answer asks to wait; zero if it does not.
    value = None
    with suppress(AttributeError, TypeError):
        value = headers.get("Retry-After") or headers.get("retry-after")
    if not isinstance(value, str):
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _pause(patience: Patience, tries: int, asked: float) -> float:
    # Full jitter: many that fail together must not come back together.
    most = min(patience.longest_wait, patience.wait * 2 ** (tries - 1))
    return min(asked, 5 * patience.longest_wait) + random.SystemRandom().uniform(0, most)


def _counted(found: Sequence[str]) -> str:
    return ", ".join(
        f"{count} x {what}" if count > 1 else what for what, count in Counter(found).items()
    )
