"""Text files to documents, one stage after the other: find, open, decode, divide.

    inputs = find_inputs(["books=gutenberg/", "wiki/*.txt.xz"])
    for document in read_documents(inputs):
        document.text, inputs[document.source].name

Nothing is repaired in silence: text that is not UTF-8, holds NUL or ends too early is a CorpusError
that names file, line and byte. What is skipped is counted.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from siftloader.errors import CorpusError


BOUNDARIES = ("blank-line", "file")  # what may end a document
MAX_SOURCES = 256  # a sample's source is stored in one byte
COMPRESSIONS = ("", ".bz2", ".gz", ".xz")
SUFFIXES = tuple(f".txt{compression}" for compression in COMPRESSIONS)
CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Document:
    """One text that belongs together, and the index of the input it came from."""

    text: str
    source: int


@dataclass(frozen=True)
class Input:
    """One source: its name and its files, in the order they are read."""

    name: str
    files: tuple[Path, ...]
    ignored: int = 0  # files of a folder that are not text


@dataclass
class Reading:
    """What reading has met so far; ``read_documents`` keeps it up to date."""

    bytes: int = 0  # as stored, so compressed
    documents: Counter[int] = field(default_factory=Counter)  # by source
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    sha256: dict[int, str] = field(default_factory=dict)  # by source, of the bytes that were read


def find_inputs(arguments: Iterable[str]) -> list[Input]:
    """Turn files, folders and globs, each maybe ``name=path``, into sources: one per argument.

    find_inputs(["a.txt", "books=gutenberg/", "news=2016/*.txt", "news=2017/*.txt"])   # 3 sources

    The same name given twice is one source. Folders are searched in depth and files sorted by
    path, so the order depends on neither the file system nor the folder they were copied to.
    """
    found: dict[str, Input] = {}
    chosen: dict[str, bool] = {}  # name -> whether it was given as name=path
    seen: dict[str, str] = {}
    for argument in arguments:
        name, path = _name_and_path(argument)
        files, ignored = _expand(path)
        for file in files:
            real = os.path.realpath(file)
            if real in seen:
                raise CorpusError(
                    f"{file}: given twice (by {seen[real]!r} and {argument!r}); every document "
                    f"would count double, so leave one of them out"
                )
            seen[real] = argument
        key = name or _stem(path)
        before = found.get(key, Input(key, ()))
        if before.files and not (name and chosen[key]):
            raise CorpusError(
                f"{argument}: a second source named {key!r}; name them apart, or alike to make "
                f"them one source, as in {key}2={path}"
            )
        chosen[key] = name is not None
        found[key] = Input(key, before.files + files, before.ignored + ignored)
    if not found:
        raise CorpusError("no input: give at least one text file, folder or glob")
    if len(found) > MAX_SOURCES:
        raise CorpusError(
            f"{len(found)} sources, but a sample's source is stored in one byte, so {MAX_SOURCES} "
            f"at most; make many files one source: quote the glob, or give their folder"
        )
    return list(found.values())


def _name_and_path(argument: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"([\w.-]+)=(.+)", argument)
    if match is None or Path(argument).exists():  # a file may have "=" in its own name
        return None, argument
    return match[1], match[2]


def _stem(path: str) -> str:
    # books/*.txt is named after the folder, books/emma.txt.xz after the file.
    parts = [part for part in Path(os.path.normpath(path)).parts if not glob.has_magic(part)]
    name = parts[-1] if parts and parts[-1] not in ("/", ".", "..") else Path(path).resolve().name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name or "text"


def _expand(path: str) -> tuple[tuple[Path, ...], int]:
    ignored = 0
    if Path(path).is_dir():
        inside = [
            Path(folder, name)
            for folder, _, names in os.walk(path)  # links to folders are not followed: no loops
            for name in names
            if not name.startswith(".")
        ]
        files = [file for file in inside if file.name.endswith(SUFFIXES)]
        ignored = len(inside) - len(files)
        if not files:
            raise CorpusError(
                f"{path}: no text among the {len(inside)} files of this folder; "
                f"readable are {', '.join(SUFFIXES)}"
            )
    elif Path(path).exists():
        files = [Path(path)]
    else:
        files = [Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()]  # noqa: PTH207
        if not files:
            what = "no file matches" if glob.has_magic(path) else "no such file or folder"
            raise CorpusError(f"{path}: {what} (looked from {Path.cwd()})")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise CorpusError(
                f"{file}: not a kind of file that can be read; readable are {', '.join(SUFFIXES)}"
            )
    return tuple(sorted(files, key=lambda file: file.as_posix())), ignored


def hash_input(source: Input) -> str:
    """Hex sha256 of a source: of its file, as ``sha256sum`` prints it, or of its files' hashes."""
    hashes = []
    for file in source.files:
        digest = hashlib.sha256()
        with _readable(file), file.open("rb") as raw:
            while chunk := raw.read(CHUNK):
                digest.update(chunk)
        hashes.append(digest.hexdigest())
    return _combined(hashes)


def _combined(hashes: Sequence[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{each}\n" for each in hashes).encode()).hexdigest()


def read_documents(
    inputs: Sequence[Input], boundary: str = "blank-line", reading: Reading | None = None
) -> Iterator[Document]:
    """Yield the documents of all inputs in order; ``reading`` tells what was met and skipped.

    A document ends at a blank line, or with its file. Line ends become ``\\n``, a byte order mark
    goes, white space around a document goes; a file without any text is skipped and counted.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"documents must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")
    reading = Reading() if reading is None else reading
    for index, source in enumerate(inputs):
        if source.ignored:
            reading.skipped["files that are not text"] += source.ignored
        hashes: list[str] = []
        for file in source.files:
            before = reading.documents[index]
            lines = _decoded(file, _lines(file, reading, hashes))
            for text in _divided(lines, boundary):
                reading.documents[index] += 1
                yield Document(text, index)
            if reading.documents[index] == before:
                reading.skipped["files without text"] += 1
        reading.sha256[index] = _combined(hashes)


def _lines(file: Path, reading: Reading, hashes: list[str]) -> Iterator[bytes]:
    with _readable(file), file.open("rb", buffering=0) as raw:
        watched = _Watched(raw, reading)
        stored: IO[bytes] = io.BufferedReader(watched, CHUNK)
        yield from _decompressed(file, stored)
        while stored.read(CHUNK):  # what a decompressor leaves behind its last stream
            pass
        hashes.append(watched.digest.hexdigest())


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{file}: damaged or cut short ({error}); fetch it again") from error
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read ({error})") from error


class _Watched(io.RawIOBase):
    """A file that hashes and counts what is read from it, so that one pass is enough."""

    def __init__(self, raw: io.FileIO, reading: Reading) -> None:
        self.raw, self.reading, self.digest = raw, reading, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.reading.bytes += count
        return count


def _decompressed(file: Path, stored: IO[bytes]) -> Iterable[bytes]:
    match file.suffix:
        case ".xz":
            return lzma.open(stored)
        case ".gz":
            return gzip.open(stored)
        case ".bz2":
            return bz2.open(stored)
    return stored


def _decoded(file: Path, lines: Iterator[bytes]) -> Iterator[str]:
    offset = 0  # of the line, in bytes of the decompressed file
    for number, line in enumerate(lines, start=1):
        if b"\0" in line:
            raise CorpusError(
                f"{file}: line {number}, byte {offset + line.index(0)}: a NUL byte, so this is "
                f"not text (or UTF-16); convert it to UTF-8 or leave the file out"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file}: line {number}, byte {offset + error.start}: not UTF-8 "
                f"({error.reason}); convert the file, as in `iconv -f latin1 -t utf-8`"
            ) from error
        offset += len(line)
        yield text.rstrip("\r\n")


def _divided(lines: Iterator[str], boundary: str) -> Iterator[str]:
    gathered: list[str] = []
    for line in lines:
        if boundary == "file" or line.strip():
            gathered.append(line)
        elif gathered:
            yield "\n".join(gathered).strip()
            gathered = []
    text = "\n".join(gathered).strip()
    if text:
        yield text
