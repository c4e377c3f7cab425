"""Which files, in which order, and their bytes.

    inputs = find_inputs(["books=gutenberg/:2", "wiki/*.xml.bz2", "https://host/news.jsonl.zst"])
    with open_file(inputs[0].files[0]) as stream:      # decompressed
        stream.read(1 << 20)

A file that is damaged, cut short or longer than it says is a CorpusError that names it; nothing that
ends too early is ever taken for a whole.
"""

from __future__ import annotations

import bz2
import fnmatch
import glob
import gzip
import hashlib
import io
import lzma
import math
import os
import re
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from siftloader.errors import CorpusError


KINDS = {  # suffix -> what is inside
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tar": "tar",
    ".tgz": "tar",
    ".xml": "wiki",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READABLE = f"{', '.join(KINDS)}, each plain or {', '.join(COMPRESSIONS)}"
MAX_SOURCES = 256  # a sample's source is stored in one byte
CHUNK = 1 << 20  # bytes read at a time
PACKAGES = {  # for the URLs that are met most
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
SILENCE = 60  # seconds without a byte before a connection is given up
MARKS = (  # what a file system tells of a file that changes when the file does
    "ETag",
    "etag",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
    "generation",
    "md5Hash",
    "Content-MD5",
)


Place = TypeVar("Place", str, Path)


@dataclass(frozen=True)
class File:
    """One file as it was when it was found."""

    path: str  # or URL
    size: int | None  # bytes as stored; None if nobody says
    stamp: str  # changes when the file does; "" if nobody says


@dataclass(frozen=True)
class Input:
    """One source: its name and its files, in the order they are read."""

    name: str
    files: tuple[File, ...]
    weight: float = 1.0
    ignored: int = 0  # files of a folder that are not text
    passed: int = 0  # folders that were not entered: behind a link, or matched by a glob


@dataclass(frozen=True)
class Bad:
    """One record that cannot be used."""

    reason: str  # a category: "not UTF-8", "malformed JSON", ...
    message: str  # file, line, byte, and what to do


@dataclass
class Reading:
    """What reading has met so far; whoever reads keeps it up to date."""

    bytes: int = 0  # as stored, so compressed
    documents: Counter[int] = field(default_factory=Counter)  # by source
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    sha256: dict[int, str] = field(default_factory=dict)  # by source, of the bytes that were read
    bad: list[Bad] = field(default_factory=list)  # files that could not be cut; parsing finds more
    hashes: list[str] = field(default_factory=list)  # of the files of the source being read


def find_inputs(arguments: Iterable[str], without: Path | None = None) -> list[Input]:
    """Turn files, folders, globs and URLs, each ``[name=]path[:weight]``, into sources.

    find_inputs(["a.txt", "books=gutenberg/:2", "news=2016/*.txt", "news=2017/*.txt"])  # 3 sources

    The same name given twice is one source. Folders are searched in depth and files sorted by
    path, so the order depends on neither the file system nor the folder they were copied to.

    In a folder, here or behind a URL, a .json (compressed or not) beside other text says something
    about it and is ignored; it is read when given by its name or a glob, or if all is .json. Links
    to folders are not followed. What is ignored or not entered is counted. The folder ``without`` is as
    if it were not there: what is written into a folder of text is not text.
    """
    found: dict[str, Input] = {}
    chosen: dict[str, bool] = {}  # name -> whether it was given as name=path
    weights: dict[str, float] = {}
    seen: dict[str, tuple[str, str]] = {}  # file -> path and argument that gave it
    for argument in arguments:
        name, path, weight = _name_path_weight(argument)
        found_here = _expand_url(path) if is_url(path) else _expand(path, without)
        for file in found_here.files:
            real = file.path if is_url(file.path) else os.path.realpath(file.path)
            if real in seen:
                first, by = seen[real]
                raise CorpusError(
                    f"{file.path}: given twice; it is the same file as {first} (given by "
                    f"{by!r} and {argument!r}), and every document would count double: leave one "
                    f"of them out, or give it a weight"
                )
            seen[real] = file.path, argument
        key = name or _stem(path)
        before = found.get(key, Input(key, ()))
        if before.files and not (name and chosen[key]):
            raise CorpusError(
                f"{argument}: a second source named {key!r}; name them apart, or alike to make "
                f"them one source, as in {key}2={path}"
            )
        if weight is not None and weights.setdefault(key, weight) != weight:
            raise CorpusError(
                f"{argument}: source {key!r} has weight {weights[key]:g} already; a source has "
                f"one weight, so give it once, or name the parts apart"
            )
        chosen[key] = name is not None
        found[key] = Input(
            key,
            before.files + found_here.files,
            ignored=before.ignored + found_here.ignored,
            passed=before.passed + found_here.passed,
        )
    if not found:
        raise CorpusError("no input: give at least one text file, folder, glob or URL")
    if len(found) > MAX_SOURCES:
        raise CorpusError(
            f"{len(found)} sources, but a sample's source is stored in one byte, so {MAX_SOURCES} "
            f"at most; make many files one source: quote the glob, or give their folder"
        )
    return [replace(each, weight=weights.get(key, 1.0)) for key, each in found.items()]


def is_url(path: str) -> bool:
    """Whether a path is for fsspec to open."""
    return "://" in path


def kind_of(path: str) -> tuple[str, str] | None:
    """What is inside a file and how it is compressed, by its suffixes; None if it is unreadable.

    kind_of("wiki.JSONL.gz")   # ("jsonl", ".gz")
    """
    suffix, compression = _suffixes(path)
    return (KINDS[suffix], compression) if suffix in KINDS else None


def _suffixes(path: str) -> tuple[str, str]:
    # What is inside, and how it is compressed: (".json", ".gz").
    name = urlsplit(path).path if re.match("https?://", path) else path
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122 - also of URLs
    if suffix == ".tgz":
        return suffix, ".gz"
    if suffix in COMPRESSIONS:
        return os.path.splitext(stem)[1], suffix  # noqa: PTH122
    return suffix, ""


def _name_path_weight(argument: str) -> tuple[str | None, str, float | None]:
    if _exists(argument):  # a file may have "=" and ":" in its own name
        return None, argument, None
    match = re.fullmatch(r"([\w.-]+)=(.+)", argument, re.DOTALL)
    name, path = (match[1], match[2]) if match else (None, argument)
    head, _, tail = path.rpartition(":")
    if not head or _exists(path) or (is_url(path) and _is_host(head)):
        return name, path, None
    try:
        weight = float(tail)
    except ValueError:
        return name, path, None
    if not (math.isfinite(weight) and weight > 0):
        raise CorpusError(
            f"{argument}: a weight of {tail}; it must be a positive number, as in {head}:2"
        )
    return name, head, weight


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - a Path raises for a name that is too long


def _is_host(head: str) -> bool:  # so that what follows its colon is a port
    return "/" not in head.partition("://")[2] and kind_of(head) is None


def _stem(path: str) -> str:
    # books/*.txt is named after the folder, books/emma.txt.xz after the file.
    if is_url(path):
        path = urlsplit(path).path if path.startswith("http") else path.partition("://")[2]
    parts = [part for part in Path(os.path.normpath(path)).parts if not glob.has_magic(part)]
    if not parts or parts[-1] in ("/", ".", ".."):
        parts = [Path(*parts).resolve().name]
    name = parts[-1]
    for suffixes in (COMPRESSIONS, KINDS):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in suffixes and kind_of(name):
            name = stem if suffixes is KINDS or kind_of(name) else name
    return name or "text"


@dataclass(frozen=True)
class _Found:
    files: tuple[File, ...]  # sorted
    ignored: int = 0
    passed: int = 0


def _expand(path: str, without: Path | None) -> _Found:
    ignored, passed = 0, 0
    place = Path(path)
    if without and _lies_in(place, without):
        raise CorpusError(
            f"{path}: lies in {without}, which is to be written; give text from elsewhere"
        )
    if os.path.isdir(path):  # noqa: PTH112 - a Path raises for a name that is too long
        walked, passed = _walk(place)
        inside = [file for file in walked if not _hidden(file.relative_to(place))]
        inside = [file for file in inside if not (without and _lies_in(file, without))]
        found = _texts(inside, str)
        ignored = len(inside) - len(found)
        if not found:
            raise CorpusError(
                f"{path}: no text among the {len(inside)} files of this folder"
                f"{', whose links to folders are not followed' if passed else ''}; "
                f"readable are {READABLE}"
            )
    elif _exists(path):
        found = [place]
    else:
        matching, passed = _matching(path)
        matching = [file for file in matching if not (without and _lies_in(file, without))]
        found = [file for file in matching if not file.is_dir()]
        passed += len(matching) - len(found)
        if not found:
            what = "no file matches" if glob.has_magic(path) else "no such file or folder"
            raise CorpusError(f"{path}: {what} (looked from {Path.cwd()})")
    files = [_local(file) for file in found]
    for file in files:
        _check_kind(file.path)
    return _Found(_by_path(files), ignored, passed)


def _lies_in(file: Path, folder: Path) -> bool:
    inside = os.path.realpath(folder)
    return os.path.commonpath([inside, os.path.realpath(file)]) == inside


def _by_path(files: Iterable[File]) -> tuple[File, ...]:
    return tuple(sorted(files, key=lambda file: os.fsencode(file.path)))


def _texts(files: Iterable[Place], name_of: Callable[[Place], str]) -> list[Place]:
    # Those of the files of a folder that are text; a .json beside others says something about them.
    readable = [file for file in files if kind_of(name_of(file))]
    return [file for file in readable if _suffixes(name_of(file))[0] != ".json"] or readable


def _walk(folder: Path) -> tuple[list[Path], int]:
    # The files inside, and how many links to folders are not followed: no loops.
    found: list[Path] = []
    passed = 0
    for inside, folders, names in os.walk(folder):
        found += [Path(inside, name) for name in names]
        links = [Path(inside, name) for name in folders if Path(inside, name).is_symlink()]
        passed += sum(not _hidden(link.relative_to(folder)) for link in links)
    return found, passed


def _hidden(relative: PurePath) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _matching(pattern: str) -> tuple[list[Path], int]:
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(path) for path in glob.glob(pattern)], 0  # noqa: PTH207 - Path's has other rules
    # glob's own ** follows links to folders, and so goes round in circles.
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    top = Path(*parts[:fixed])
    walked, passed = _walk(top)
    rest = tuple(parts[fixed:])
    return [file for file in walked if _matches(file.relative_to(top).parts, rest)], passed


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern == ("**",):
        return not any(name.startswith(".") for name in names)
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (
            len(names) > 1 and not names[0].startswith(".") and _matches(names[1:], pattern)
        )
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _check_kind(path: str) -> None:
    if kind_of(path) is None:
        raise CorpusError(f"{path}: not a kind of file that can be read; readable are {READABLE}")


def _local(path: Path) -> File:
    try:
        about = path.stat()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from error
    if not stat.S_ISREG(about.st_mode):
        raise CorpusError(f"{path}: not a regular file; it could not be read twice, so copy it")
    return File(path.as_posix(), about.st_size, f"mtime_ns {about.st_mtime_ns}")


def _expand_url(url: str) -> _Found:
    with _fetchable(url):
        system, path = _file_system(url)
        web = "http" in _protocols(system)
        magic = "*[" if web else "*?["
        pattern = any(mark in path for mark in magic)
        if not pattern and not (path.endswith("/") if web else system.isdir(path)):
            if web and kind_of(url) is None:
                raise CorpusError(
                    f"{url}: not a kind of file that can be read; readable are {READABLE}; if it "
                    f"is a folder, end it with '/'"
                )
            _check_kind(url)
            return _Found((_described(url, system.info(path), web),))
        if pattern:
            if web:  # its glob passes over what cannot be listed, a server that is down included
                system.ls(re.split(r"[*[]", path)[0].rpartition("/")[0] + "/")
            listed = system.glob(path, detail=True)
        else:
            listed = _web_files(system, path) if web else system.find(path, detail=True)
        inside = [name for name, info in listed.items() if info.get("type") != "directory"]
        top = re.split(r"[*?[]", path)[0].rpartition("/")[0] if pattern else path.rstrip("/")
        shown = [name for name in inside if not _hidden(PurePosixPath(name.removeprefix(top)))]
        found = [name for name in shown if kind_of(name)] if pattern else _texts(shown, str)
        files = []
        for name in found:
            info = listed[name] if listed[name].get("size") is not None else system.info(name)
            files.append(_described(str(system.unstrip_protocol(name)), info, web))
    if not files:
        what = "no file matches" if pattern else "no text in this folder"
        raise CorpusError(f"{url}: {what}; readable are {READABLE}")
    return _Found(_by_path(files), len(inside) - len(files), 0)


def _web_files(system: Any, folder: str) -> dict[str, Any]:
    # As find() does, but what cannot be listed is an error.
    found, folders, seen = {}, [folder], {folder}
    while folders:
        for info in system.ls(folders.pop(), detail=True):
            if info["type"] != "directory":
                found[info["name"]] = info
            elif info["name"] not in seen:
                seen.add(info["name"])
                folders.append(info["name"])
    return found


@contextmanager
def _fetchable(url: str) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # each file system behind fsspec raises its own kinds
        cause = f", {error.__cause__}" if error.__cause__ else ""
        raise CorpusError(
            f"{url}: cannot be fetched ({type(error).__name__}: {error}{cause}); try it again, or "
            f"fetch the file yourself and give its path"
        ) from error


def _file_system(url: str) -> tuple[Any, str]:
    try:
        return file_system(url)
    except (ImportError, ValueError) as error:
        raise CorpusError(f"{url}: {error}") from error


def file_system(url: str, fresh: bool = False) -> tuple[Any, str]:
    """The fsspec file system behind a URL, one that gives up on silence, and the path within.

    ``fresh`` makes a new one, with credentials read anew. ImportError where a package is missing, ValueError
    where nothing can open such a URL; both say what to do.
    """
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError(
            "reading URLs needs the `fsspec` package; pip install 'siftloader[urls]'"
        ) from error
    options: dict[str, Any] = {"skip_instance_cache": True} if fresh else {}
    if re.match("https?://", url):
        try:
            from aiohttp import ClientTimeout
        except ImportError as error:
            raise ImportError(
                "reading from the web needs the `aiohttp` package; pip install 'siftloader[urls]'"
            ) from error
        # The default gives up on whatever takes five minutes, a large download included.
        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        theirs = conf.get("http", {}).get("client_kwargs", {})  # else ours would take its place
        # Clusters reach the web through HTTP_PROXY and HTTPS_PROXY.
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, **theirs}
    elif re.match("s3a?://", url):
        theirs = conf.get("s3", {}).get("config_kwargs", {})
        timeouts = {"connect_timeout": SILENCE, "read_timeout": SILENCE}
        options["config_kwargs"] = {**timeouts, **theirs}
    try:
        system, path = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        package = PACKAGES.get(url.partition("://")[0].lower())
        raise kind(
            f"this kind of URL cannot be opened ({error}); "
            f"{f'pip install {package}' if package else 'install what fsspec needs for it'}, or fetch "
            f"the file yourself and give its path"
        ) from error
    return system, str(path)


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _described(url: str, info: Mapping[str, Any], web: bool) -> File:
    size = info.get("size")
    if (
        web
        and size is None
        and kind_of(url) in [(kind, "") for kind in ("txt", "jsonl", "csv", "tsv")]
    ):
        raise CorpusError(
            f"{url}: the server does not say how long it is, and such a file does not know its "
            f"own end, so a cut connection would go unnoticed; fetch the file yourself and give "
            f"its path, or have it compressed"
        )
    marks = [f"{mark} {_moment(info[mark])}" for mark in MARKS if info.get(mark)]
    return File(url, None if size is None else int(size), "\n".join(marks))


def _moment(mark: Any) -> Any:  # lists have times as numbers where single files have dates
    return mark.timestamp() if isinstance(mark, datetime) else mark


def _same(now: File, then: File) -> bool:
    # A list of files tells less of each than asking for one of them.
    marks = [dict(mark.split(" ", 1) for mark in each.stamp.splitlines()) for each in (now, then)]
    return now.size == then.size and all(
        marks[0][key] == marks[1][key] for key in marks[0].keys() & marks[1].keys()
    )


def check_unchanged(inputs: Iterable[Input]) -> None:
    """Raise CorpusError for the first file that is no longer what it was when it was found."""
    for source in inputs:
        for file in source.files:
            if is_url(file.path):
                with _fetchable(file.path):
                    system, path = _file_system(file.path)
                    system.invalidate_cache()
                    now = _described(file.path, system.info(path), web=False)
            else:
                now = _local(Path(file.path))
            if now != file:
                raise CorpusError(
                    f"{file.path}: changed while it was read (source {source.name!r}); run again "
                    f"once it is at rest"
                )


def hash_input(source: Input) -> str:
    """Hex sha256 of a source: of its file, as ``sha256sum`` prints it, or of its files' hashes."""
    reading = Reading()
    for file in source.files:
        with (
            _stored(file) as raw,
            io.BufferedReader(_Watched(raw, file, reading), CHUNK) as stored,
        ):
            while stored.read(CHUNK):
                pass
    return combined(reading.hashes)


def combined(hashes: Sequence[str]) -> str:
    """The hash of a source from those of its files, in order."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{each}\n" for each in hashes).encode()).hexdigest()


@contextmanager
def open_file(file: File, reading: Reading | None = None) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as its suffix says; ``reading`` counts and hashes them.

    Reading raises CorpusError where the file is damaged, cut short or followed by something else,
    so what was read up to the end is whole.
    """
    reading = Reading() if reading is None else reading
    found = kind_of(file.path)
    compression = found[1] if found else ""
    with _stored(file) as raw:
        stored = io.BufferedReader(_Watched(raw, file, reading), CHUNK)
        yield (
            io.BufferedReader(_Decompressed(stored, file, compression), CHUNK)
            if (compression)
            else stored
        )


@contextmanager
def open_seekable(file: File, reading: Reading | None = None) -> Iterator[BinaryIO]:
    """Like ``open_file``, for readers that jump: what is compressed or far away is copied first."""
    found = kind_of(file.path)
    if is_url(file.path) or (found is not None and found[1]):
        whole: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    else:
        whole = io.BufferedReader(_opened(file))
    with whole:
        with open_file(file, reading) as stream:
            while chunk := stream.read(CHUNK):
                if whole.writable():
                    _copy(chunk, whole, file)
        whole.seek(0)
        yield whole


def _copy(chunk: bytes, whole: BinaryIO, file: File) -> None:
    try:
        whole.write(chunk)
    except OSError as error:
        raise CorpusError(
            f"{file.path}: no copy of it can be written to {tempfile.gettempdir()} ({error}); "
            f"set TMPDIR to a folder with more room, or unpack the file yourself"
        ) from error


@contextmanager
def _stored(file: File) -> Iterator[Any]:
    if is_url(file.path):
        with _fetchable(file.path):
            system, path = _file_system(file.path)
            # Zero streams; otherwise every block would be a request of its own.
            options = {"block_size": 0} if "http" in _protocols(system) else {}
            raw = system.open(path, "rb", **options)
    else:
        raw = _opened(file)
    try:
        yield raw
    finally:
        raw.close()


def _opened(file: File) -> io.FileIO:
    try:
        return Path(file.path).open("rb", buffering=0)
    except OSError as error:
        raise CorpusError(f"{file.path}: cannot be read ({error})") from error


class _Watched(io.RawIOBase):
    """A file that hashes and counts what is read from it, so that one pass is enough."""

    def __init__(self, raw: Any, file: File, reading: Reading) -> None:
        self.raw, self.file, self.reading = raw, file, reading
        self.digest, self.count, self.ended = hashlib.sha256(), 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.ended:
            return 0
        if is_url(self.file.path):
            with _fetchable(self.file.path):
                count = _filled(self._read_url, buffer)
        else:
            try:
                count = _filled(self.raw.readinto, buffer)
            except OSError as error:
                raise CorpusError(f"{self.file.path}: cannot be read ({error})") from error
        self.digest.update(memoryview(buffer)[:count])
        self.count += count
        self.reading.bytes += count
        if not count:
            self._end()
        return count

    def _read_url(self, buffer: memoryview) -> int:
        data = self.raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _end(self) -> None:
        self.ended = True
        if self.file.size is not None and self.count != self.file.size:
            raise CorpusError(
                f"{self.file.path}: {self.count} bytes came, but it has {self.file.size}; the "
                f"transfer was cut, or the file changed while it was read: run again"
            )
        self.reading.hashes.append(self.digest.hexdigest())


def _filled(read_some: Callable[[memoryview], int], buffer: memoryview) -> int:
    # As much as fits, however little comes at a time: a short read means the end.
    view, count = memoryview(buffer), 0
    while count < len(view) and (some := read_some(view[count:])):
        count += some
    return count


class _Decompressed(io.RawIOBase):
    """The inside of a compressed file, whole or a CorpusError that names it."""

    def __init__(self, stored: Any, file: File, compression: str) -> None:
        self.file, self.some = file, bool(stored.peek(1))
        self.read_some = _decompressor(stored, compression, file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            if not self.some:
                raise EOFError("it is empty")
            return _filled(self.read_some, buffer)
        except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise CorpusError(
                f"{self.file.path}: damaged or cut short ({error}); fetch it again"
            ) from error


def _decompressor(stored: Any, compression: str, file: File) -> Callable[[memoryview], int]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stored, mode="rb").readinto
    if compression == ".zst":
        try:
            import pyarrow as pa
        except ImportError as error:
            raise CorpusError(
                f"{file.path}: reading .zst needs the `pyarrow` package; "
                f"pip install 'siftloader[prepare]', or unpack the file"
            ) from error
        inside = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
        return lambda buffer: int(inside.readinto(buffer))
    members = _members(stored, bz2.BZ2Decompressor if compression == ".bz2" else None)
    next(members)

    def readinto(buffer: memoryview) -> int:
        data = members.send(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    return readinto


def _members(stored: Any, bzip2: type[bz2.BZ2Decompressor] | None) -> Generator[bytes, int, None]:
    # Streams end to end, up to the end of the file: the readers of bz2 and lzma stop in silence at
    # whatever does not look like another stream, so at garbage, and at half a file that was patched.
    limit = yield b""
    data = stored.read(CHUNK)
    while data:
        decoder: Any = bzip2() if bzip2 else lzma.LZMADecompressor()
        while not decoder.eof:
            if decoder.needs_input:
                data = data or stored.read(CHUNK)
                if not data:
                    raise EOFError("it ends within a compressed stream")
            some = decoder.decompress(data, limit)
            data = b""
            if some:
                limit = yield some
        data = decoder.unused_data or stored.read(CHUNK)
        while not bzip2 and data and not data.strip(b"\0"):  # xz may be padded
            data = stored.read(CHUNK)
        if not bzip2:
            data = data.lstrip(b"\0")
    while True:
        yield b""
