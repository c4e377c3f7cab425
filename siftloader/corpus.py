"""Files to blocks of raw records, blocks to documents.

    inputs = find_inputs(["books=gutenberg/", "wiki/*.xml.bz2", "news.jsonl.zst"])
    for block in cut_blocks(inputs, Format()):      # one process: sequential, on bytes, cheap
        parse(block).texts                          # any process: decode, parse, strip markup

Where the blocks are cut depends on what the files hold and on ``Format`` alone, and the documents
depend on neither blocks nor compression.

Nothing is repaired in silence: a file that is damaged or ends too early is a CorpusError, a record
that is not text is a ``Bad`` that names file, line and byte. What is skipped is counted.

The first row of a .csv or .tsv names its columns. In a .csv, quotes may hold commas and line ends,
and stand doubled for themselves; a .tsv has no quoting, so a quote in it is a character like any
other, and its cells hold neither tabs nor line ends.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np

from siftloader.errors import CorpusError
from siftloader.files import (
    CHUNK,
    Bad,
    File,
    Input,
    Reading,
    combined,
    kind_of,
    open_file,
    open_seekable,
)
from siftloader.wikitext import plain_text, wikitext_parser


BOUNDARIES = ("blank-line", "file")  # what may end a document of a .txt
COLUMNS = ("text", "content")  # where the text of a record is looked for, in this order
SLACK = 1 << 16  # bytes read beyond a block, so that its end is mostly among them
SAMPLED = 100  # records that are looked at to find which of their fields holds the text
LONGEST_ROW = 256 << 20  # bytes of a .csv; beyond, some quote was not closed
PARSER = 1  # changes when the same bytes would be parsed otherwise
BOM = b"\xef\xbb\xbf"

# What str.strip() strips, as UTF-8, without line feed.
_SPACE = (
    rb"(?:[\t\x0b\x0c\r\x1c-\x20]|\xc2[\x85\xa0]|\xe1\x9a\x80"
    rb"|\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80)"
)
_BLANK_LINE = re.compile(rb"\n" + _SPACE + rb"*\n")
_LINE_END = re.compile(rb"\n")
_PAGE_END = re.compile(rb"</page>")
_NOTHING = re.compile(rb"(?:" + BOM + rb")?(?:\n|" + _SPACE + rb")*")
_BETWEEN_DOCUMENTS = re.compile(r"\n[^\S\n]*\n")
_CARRIAGE_RETURNS = re.compile(r"(?<!\r)\r+\n")  # looks behind: a long run is scanned once
_LINE = re.compile(rb"[^\n]*(?:\n|\Z)")
# A row of a .csv: one without quotes, or one whose fields have theirs where they should be. What
# this does not match (doubled quotes, and what is wrong) is gone through field by field.
_FIELD = rb'(?:"[^"]*"|(?![ \t]+")[^,"\n][^,\n]*|)'
_ROW = re.compile(rb'[^"\n]*(?:\n|\Z)|(?:%b,)*%b\r*(?:\n|\Z)' % (_FIELD, _FIELD))
_DOUBLED = re.compile(rb'(?:[^"]*""){1,999}')  # few enough at a time to take no memory
_ROW_END = re.compile(rb"\r*(?:\n|\Z)")
# Blanks end a field before a quote: whether it quotes is for nobody to guess at.
_PLAIN_FIELD = re.compile(rb'[ \t]+(?=")|[^,\n]*')


@dataclass(frozen=True)
class Document:
    """One text that belongs together, and the index of the input it came from."""

    text: str
    source: int


@dataclass(frozen=True)
class Piece:
    """Raw records that lie together in one file."""

    kind: str  # how to parse them, with all that decides it: "txt", "jsonl:text", ...
    file: str  # as errors name it
    line: int  # where they begin: line (or row, from 1) and byte of the decompressed file
    offset: int
    data: bytes


@dataclass(frozen=True)
class Block:
    """Raw records of one source, about ``Format.block_bytes`` of them."""

    source: int
    number: int  # counts over the whole corpus, from 0
    pieces: tuple[Piece, ...]

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of all that decides what parsing gives; of no path."""
        digest = hashlib.sha256(f"{PARSER}\n".encode())
        for piece in self.pieces:
            begins = piece.offset == 0  # where a byte order mark is one
            digest.update(f"{piece.kind}\n{len(piece.data)}\n{begins}\n".encode())
            digest.update(piece.data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Format:
    """How files are cut; checks itself.

    Format(documents="file", column="body")
    """

    documents: Literal["blank-line", "file"] = "blank-line"  # what ends a document of a .txt
    # The field that holds the text of a record; None: text, else content, else the only one with text
    column: str | None = None
    block_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if self.documents not in BOUNDARIES:
            raise ValueError(
                f"documents must be one of {', '.join(BOUNDARIES)}; got {self.documents!r}"
            )
        if self.column == "":
            raise ValueError("column must name a field, or be None to have it found; got ''")
        if not 1 <= self.block_bytes <= 1 << 30:
            raise ValueError(f"block_bytes must be in 1..2^30, got {self.block_bytes}")


@dataclass
class Parsed:
    """The documents of a block, what was skipped by reason, and what was bad."""

    texts: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    bad: list[Bad] = field(default_factory=list)


def read_documents(
    inputs: Sequence[Input], boundary: str = "blank-line", reading: Reading | None = None
) -> Iterator[Document]:
    """Yield the documents of all inputs in order; CorpusError at the first bad record.

    A document of a .txt ends at a blank line, or with its file; elsewhere each record is one. Line
    ends become ``\\n``, a byte order mark goes, white space around a document goes.
    """
    format = Format(documents=boundary)  # type: ignore[arg-type]  # noqa: A001 - checks itself
    reading = Reading() if reading is None else reading
    for block in cut_blocks(inputs, format, reading):
        parsed = parse(block)
        for bad in (*reading.bad, *parsed.bad):
            raise CorpusError(bad.message)
        reading.skipped += parsed.skipped
        reading.documents[block.source] += len(parsed.texts)
        for text in parsed.texts:
            yield Document(text, block.source)
    for bad in reading.bad:
        raise CorpusError(bad.message)


def cut_blocks(
    inputs: Sequence[Input],
    format: Format,  # noqa: A002
    reading: Reading | None = None,
) -> Iterator[Block]:
    """Yield the raw records of all inputs, in order, in blocks that never cross sources."""
    reading = Reading() if reading is None else reading
    number = 0
    for index, source in enumerate(inputs):
        if source.ignored:
            reading.skipped["files that are not text"] += source.ignored
        if source.passed:
            reading.skipped["folders not entered (links, or matched by a glob)"] += source.passed
        reading.hashes.clear()
        gathered: list[Piece] = []
        size = 0
        for file in source.files:
            some, refused = False, len(reading.bad)
            for piece in _cut(file, format, reading):
                some = True
                gathered.append(piece)
                size += len(piece.data)
                if size >= format.block_bytes:
                    block = Block(index, number, tuple(gathered))
                    del piece  # a block may be large, and the next is read meanwhile
                    gathered, size, number = [], 0, number + 1
                    yield block
                    del block
            if not some and len(reading.bad) == refused:
                reading.skipped["files without text"] += 1
        if gathered:
            yield Block(index, number, tuple(gathered))
            number += 1
        reading.sha256[index] = combined(reading.hashes)


def _cut(file: File, format: Format, reading: Reading) -> Iterator[Piece]:  # noqa: A002
    kind, _ = kind_of(file.path) or ("txt", "")
    if kind in ("parquet", "arrow"):
        yield from _cut_table(file, format, reading, kind)
        return
    with open_file(file, reading) as stream:
        if bad := _unlike_text(file.path, kind, stream.peek(1)):  # type: ignore[attr-defined]
            reading.bad.append(bad)
            while stream.read(CHUNK):  # hashed all the same
                pass
            return
        match kind:
            case "txt" if format.documents == "file":
                yield from _some(Piece("file", file.path, 1, 0, stream.read()))
            case "txt":
                for line, offset, data in _spans(stream, _BLANK_LINE, format.block_bytes):
                    yield from _some(Piece("txt", file.path, line, offset, data))
            case "jsonl":
                yield from _cut_jsonl(file, stream, format)
            case "csv" | "tsv":
                yield from _cut_rows(file, stream, format, kind)
            case "tar":
                yield from _cut_tar(file, stream, format, reading)
            case "wiki":
                yield from _cut_wiki(file, stream, format)


def _unlike_text(where: str, kind: str, head: bytes) -> Bad | None:
    # What would make a whole file one long line.
    if kind in ("txt", "jsonl", "csv", "tsv") and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Bad(
            "UTF-16",
            f"{where}: UTF-16, by its first two bytes; convert it to UTF-8, as in "
            f"`iconv -f utf-16 -t utf-8`",
        )
    if kind in ("txt", "csv", "tsv") and b"\r" in head and b"\n" not in head:
        return Bad(
            "lines that end in \\r alone",
            f"{where}: no line feed in its first {len(head):,} bytes, but carriage returns, as old "
            f"Macs ended lines; convert it, as in `tr '\\r' '\\n'`",
        )
    return None


def _spans(
    stream: BinaryIO, end: re.Pattern[bytes], target: int
) -> Iterator[tuple[int, int, bytes]]:
    # (line, byte, data): each span ends at the first ``end`` at or after its ``target`` bytes.
    held, begin = b"", 0  # what is read, and where in it the next span begins
    line, offset = 1, 0
    while True:
        missing = target - (len(held) - begin)
        match = None if missing > 0 else end.search(held, begin + target - 1)
        if match is None:
            # What does not end is read in ever larger steps, so that searching it stays linear.
            more = stream.read(max(missing, 0) + max(SLACK, (len(held) - begin) // 2))
            if not more:
                break
            held, begin = held[begin:] + more, 0
            continue
        data = held[begin : match.end()]
        begin = match.end()
        yield line, offset, data
        line += data.count(b"\n")
        offset += len(data)
        del data
    if begin < len(held):
        yield line, offset, held[begin:]


def _some(piece: Piece) -> Iterator[Piece]:
    nothing = _NOTHING.match(piece.data)
    if nothing and nothing.end() < len(piece.data):
        yield piece


def _cut_jsonl(file: File, stream: BinaryIO, format: Format) -> Iterator[Piece]:  # noqa: A002
    column = format.column
    if column is None:
        # The whole lines among the first bytes, and no others: where blocks are cut is no matter.
        head = stream.peek(1)  # type: ignore[attr-defined]
        lines = head.removeprefix(BOM).split(b"\n")
        column = _json_column(file.path, lines[: len(lines) - (len(head) >= CHUNK)], SAMPLED)
    for line, offset, data in _spans(stream, _LINE_END, format.block_bytes):
        if column is None:  # the first line is long, or no record
            column = _json_column(file.path, data.removeprefix(BOM).split(b"\n"), 1)
        # Without a column all of it is malformed, or blank.
        yield from _some(Piece(f"jsonl:{column or ''}", file.path, line, offset, data))


def _json_column(path: str, lines: Iterable[bytes], limit: int) -> str | None:
    # None if there is no record among the lines.
    fields: dict[str, bool | None] = {}
    records = 0
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        for name, value in record.items():
            is_text = None if value is None else isinstance(value, str)
            if is_text or fields.get(name) is None:
                fields[name] = is_text
        records += 1
        if records == limit:
            break
    return _choose_column(path, list(fields.items())) if records else None


def _choose_column(
    path: str, columns: Sequence[tuple[str, bool | None]], asked: str | None = None
) -> str:
    # ``columns``: (name, whether it holds text), None where that cannot be told.
    names = [name for name, _ in columns]
    if asked is not None and asked not in names:
        raise CorpusError(
            f"{path}: no column {asked!r}; it has {_listed(names)}: give one of them"
        )
    found = asked if asked is not None else next((each for each in COLUMNS if each in names), None)
    if found is None:
        texts = [name for name, is_text in columns if is_text]
        unknown = [name for name, is_text in columns if is_text is None]
        if len(texts) != 1 or unknown:
            raise CorpusError(
                f"{path}: which column holds the text? It has {_listed(names)}, neither "
                f"{' nor '.join(COLUMNS)}, and {len(texts) + len(unknown)} that may hold text; "
                f"name it with --column NAME (in Python: column=)"
            )
        found = texts[0]
    if names.count(found) > 1:
        raise CorpusError(
            f"{path}: {names.count(found)} columns are named {found!r}; rename all but one of them"
        )
    return found


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(map(_printable, names[:most])) or "none at all"
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def _cut_wiki(file: File, stream: BinaryIO, format: Format) -> Iterator[Piece]:  # noqa: A002
    wikitext_parser()  # its absence is told at once, by whoever reads
    kind, data = "", b""
    for line, offset, data in _spans(stream, _PAGE_END, format.block_bytes):
        kind = kind or _wiki_kind(file.path, data)
        if b"<page>" in data:
            yield Piece(kind, file.path, line, offset, data)
    if not data.rstrip().endswith(b"</mediawiki>"):
        raise CorpusError(
            f"{file.path}: damaged or cut short (a dump ends with </mediawiki>, this one with "
            f"{data[-40:]!r}); fetch it again"
        )


def _wiki_kind(path: str, head: bytes) -> str:
    # The dump says what its language calls the namespaces of files and categories.
    if b"<mediawiki" not in head.partition(b"<page>")[0]:
        raise CorpusError(
            f"{path}: XML, but not a MediaWiki export (it begins with {head[:40]!r}); readable "
            f"is what dumps call pages-articles"
        )
    names = re.findall(
        rb'<namespace key="(?:-2|6|14)"[^>]*>([^<]+)</namespace>', head.partition(b"<page>")[0]
    )
    return "wiki:" + "|".join(html.unescape(name.decode("utf-8", "replace")) for name in names)


class _Blocks:
    """What tarfile reads a tar from, 512 bytes at a time: remembers the last of them."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        self.last = self.stream.read(size)
        return self.last


def _cut_tar(
    file: File,
    stream: BinaryIO,
    format: Format,  # noqa: A002
    reading: Reading,
) -> Iterator[Piece]:
    column, blocks = format.column, _Blocks(stream)
    for group in _tar_groups(file, blocks, reading):
        # Beside a text of the same name, a .json says something about it.
        suffix = ".txt" if any(name.lower().endswith(".txt") for name in group) else ".json"
        for name, data in group.items():
            shown = f"{file.path}: {_printable(name)}"
            if data is None or not name.lower().endswith(suffix):
                reading.skipped["tar members that are not text"] += 1
            elif bad := _unlike_text(shown, suffix[1:], data[:CHUNK]):
                reading.bad.append(bad)
            elif suffix == ".txt":
                yield Piece("file", shown, 1, 0, data)
            else:
                column = column or _json_column(shown, [data.removeprefix(BOM)], 1)
                yield Piece(f"json:{column or ''}", shown, 1, 0, data)


def _tar_groups(
    file: File, blocks: _Blocks, reading: Reading
) -> Iterator[dict[str, bytes | None]]:
    # Neighbours that share their name up to the first dot, as WebDataset has it; None for what is
    # not text. Links, folders and devices are passed over: nothing is ever extracted.
    group: dict[str, bytes | None] = {}
    key = None
    try:
        with tarfile.open(fileobj=blocks, mode="r|", bufsize=512) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep all of them
                folder, _, name = member.name.rpartition("/")
                if not member.isreg():
                    if not member.isdir():
                        reading.skipped["tar members that are links or devices"] += 1
                    continue
                if (folder, name.partition(".")[0]) != key:
                    if group:
                        yield group
                    group, key = {}, (folder, name.partition(".")[0])
                wanted = name.lower().endswith((".txt", ".json")) and not name.startswith(".")
                inside = tar.extractfile(member) if wanted else None
                if member.name in group:
                    raise CorpusError(
                        f"{file.path}: two members named {member.name!r}; leave one of them out"
                    )
                group[member.name] = inside.read() if inside else None
    except tarfile.TarError as error:
        raise CorpusError(
            f"{file.path}: damaged or cut short ({error}); fetch it again"
        ) from error
    if group:
        yield group
    # tarfile takes a broken header for the end.
    if blocks.last != bytes(512):
        what = "a damaged header" if blocks.last.strip(b"\0") else "no end-of-archive mark"
        raise CorpusError(f"{file.path}: damaged or cut short ({what}); fetch it again")
    while chunk := blocks.stream.read(SLACK):
        if chunk.strip(b"\0"):
            raise CorpusError(
                f"{file.path}: something follows the end of the archive; if it is another tar, "
                f"take the two apart"
            )


def _cut_table(
    file: File,
    format: Format,  # noqa: A002
    reading: Reading,
    kind: str,
) -> Iterator[Piece]:
    with open_seekable(file, reading) as whole, _tables(file):
        arrays = _parquet(file, whole, format) if kind == "parquet" else _ipc(file, whole, format)
        yield from _slices(file, arrays, format.block_bytes)


def _parquet(file: File, whole: BinaryIO, format: Format) -> Iterator[Any]:  # noqa: A002
    from pyarrow import parquet

    # buffer_size: pages are read as they are needed, not a row group's whole column.
    table = parquet.ParquetFile(whole, pre_buffer=False, buffer_size=1 << 20)
    column = _table_column(file, table.schema_arrow, format)
    for batch in table.iter_batches(batch_size=1024, columns=[column], use_threads=False):
        # By its name again: for a.text, that part of a struct a is read besides.
        yield _as_bytes(batch.column(batch.schema.get_field_index(column)))


def _ipc(file: File, whole: BinaryIO, format: Format) -> Iterator[Any]:  # noqa: A002
    from pyarrow import ipc

    magic = whole.read(6)
    if magic[:4] == b"FEA1":
        raise CorpusError(
            f"{file.path}: Feather version 1, which is no longer read; rewrite it as version 2, or "
            f"as Parquet"
        )
    if magic == b"ARROW1":
        table = ipc.open_file(whole)
        column = _table_column(file, table.schema, format)
        for number in range(table.num_record_batches):
            yield _as_bytes(table.get_batch(number).column(column))
        return
    whole.seek(0)
    stream = ipc.open_stream(whole)
    column = _table_column(file, stream.schema, format)
    for batch in stream:
        yield _as_bytes(batch.column(column))
    # A stream that was cut between two batches looks ended, but for its end mark.
    end = whole.tell()
    whole.seek(max(0, end - 8))
    if whole.read(8) not in (b"\xff\xff\xff\xff\0\0\0\0",) or whole.read(1):
        raise CorpusError(
            f"{file.path}: damaged or cut short (no end-of-stream mark where it ends); fetch it "
            f"again"
        )


def _cut_rows(
    file: File,
    stream: BinaryIO,
    format: Format,  # noqa: A002
    kind: str,
) -> Iterator[Piece]:
    rows = _rows(file, stream, kind == "csv")
    head = next((row for _, row in rows if row.strip(b"\r\n")), b"")
    if not head:
        return
    names = [name.decode("utf-8", "replace") for name in _cells(head, kind == "csv")]
    column = _row_column(file, names, format, "," if kind == "csv" else "\t")
    kind = f"{kind}:{names.index(column)} {len(names)}"
    number, begin, size = 2, (2, 0), 0
    held: list[bytes] = []
    for offset, row in rows:
        if not held:
            begin = (number, offset)
        held.append(row)
        size += len(row)
        number += bool(row.strip(b"\r\n"))
        if size >= format.block_bytes and number > begin[0]:
            data = b"".join(held)
            held, size = [], 0
            del row
            yield Piece(kind, file.path, *begin, data)
            del data
    if number > begin[0] and held:
        yield Piece(kind, file.path, *begin, b"".join(held))


def _row_column(file: File, names: list[str], format: Format, delimiter: str) -> str:  # noqa: A002
    others = [each for each in (",", "\t", ";", "|") if each != delimiter and each in names[0]]
    try:
        # What a column holds cannot be told from its name.
        return _choose_column(file.path, [(name, None) for name in names], format.column)
    except CorpusError as error:
        if len(names) > 1 or not others:
            raise
        raise CorpusError(
            f"{error}; its fields should be set apart by {delimiter!r}, but the header holds "
            f"{others[0]!r}: if that sets them apart, rewrite the file"
        ) from None


def _rows(file: File, stream: BinaryIO, quoting: bool) -> Iterator[tuple[int, bytes]]:
    # (byte, row with its line end), blank lines among them.
    held = stream.read(CHUNK)
    begin, offset = len(BOM) if held.startswith(BOM) else 0, 0  # of a row in held, of held
    number = 1
    while True:
        end = _row_end(held, begin, quoting)
        if end is None or end == len(held):  # at the end of what is known, more may belong to it
            if end is None:
                _check_quotes(file, number, offset, held, begin)
            more = stream.read(max(CHUNK, (len(held) - begin) // 2))
            if more:
                held, begin, offset = held[begin:] + more, 0, offset + begin
                continue
            if begin == len(held):
                return
            if end is None:
                raise CorpusError(
                    f"{file.path}: row {number} (the header being row 1), which begins at byte "
                    f"{offset + begin}: a quote that is never closed; mend the row, or fetch the "
                    f"file again if it should be longer"
                )
        row = held[begin:end]
        yield offset + begin, row
        number += bool(row.strip(b"\r\n"))
        del row
        begin = end


def _check_quotes(file: File, number: int, offset: int, held: bytes, begin: int) -> None:
    where = f"{file.path}: row {number} (the header being row 1), byte"
    at = _fields_end(held, begin)
    if at is not None:
        what = "blanks before" if held[at : at + 1] == b'"' else "text after"
        shown = held[max(begin, at - 20) : at + 20]
        raise CorpusError(
            f"{where} {offset + at}: {what} a quote ({_printable(shown.decode('utf-8', 'replace'))}"
            f"); a quoted field begins and ends with its quotes, and one within it is doubled: "
            f"mend the row, or write the file anew"
        )
    if len(held) - begin > LONGEST_ROW:
        raise CorpusError(
            f"{where} {offset + begin}: a row of more than {LONGEST_ROW >> 20} MiB; if that is "
            f"no quote that was left open, write the file anew as .jsonl or .parquet"
        )


def _row_end(data: bytes, begin: int, quoting: bool) -> int | None:
    # None if no row ends where it should, so far.
    if found := (_ROW if quoting else _LINE).match(data, begin):
        return found.end()
    at = _fields_end(data, begin)
    end = None if at is None else _ROW_END.match(data, at)
    return end.end() if end else None


def _fields_end(data: bytes, begin: int) -> int | None:
    at = _field_end(data, begin)
    while at is not None and data[at : at + 1] == b",":
        at = _field_end(data, at + 1)
    return at


def _field_end(data: bytes, at: int) -> int | None:
    # None if it is quoted and not closed.
    if data[at : at + 1] != b'"':
        plain = _PLAIN_FIELD.match(data, at)
        return plain.end() if plain else at
    at += 1
    while doubled := _DOUBLED.match(data, at):
        at = doubled.end()
    return data.find(b'"', at) + 1 or None


def _cells(row: bytes, quoting: bool) -> list[bytes]:
    row = row.rstrip(b"\r\n")
    if not (quoting and b'"' in row):
        return row.split(b"," if quoting else b"\t")
    cells, begin = [], 0
    while (end := _field_end(row, begin)) is not None:
        cell = row[begin:end]
        cells.append(cell[1:-1].replace(b'""', b'"') if cell.startswith(b'"') else cell)
        begin = end + 1
        if end == len(row):
            break
    return cells


@contextmanager
def _tables(file: File) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise CorpusError(
            f"{file.path}: reading tables needs the `pyarrow` package; "
            f"pip install 'siftloader[prepare]'"
        ) from error
    try:
        yield
    except pa.ArrowNotImplementedError as error:
        raise CorpusError(
            f"{file.path}: pyarrow {pa.__version__} cannot read it ({_printable(str(error))}); write "
            f"it anew without what that names, or fetch it again if it is damaged"
        ) from error
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        # A damaged length asks for more bytes than there are; a damaged name of a column is no text.
        cause = _printable(str(error)) or "it claims to hold more than memory does"
        raise CorpusError(
            f"{file.path}: damaged or cut short ({cause}); fetch it again, or write it anew"
        ) from error


def _table_column(file: File, schema: Any, format: Format) -> str:  # noqa: A002
    import pyarrow as pa

    columns = [
        (each.name, None if pa.types.is_null(each.type) else _is_text(each.type))
        for each in schema
    ]
    column = _choose_column(file.path, columns, format.column)
    if dict(columns)[column] is False:
        raise CorpusError(
            f"{file.path}: column {column!r} is of type {schema.field(column).type}, not text; it "
            f"has {_listed([f'{each.name} ({each.type})' for each in schema])}: name one of "
            f"strings with --column NAME (in Python: column=)"
        )
    return column


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _as_bytes(array: Any) -> Any:
    # Strings as bytes: a table may hold what is not UTF-8, which is the record's fault. Checked
    # before anything follows its offsets, which may be those of a damaged file.
    import pyarrow as pa

    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.large_binary())
    if pa.types.is_dictionary(array.type):
        array = pa.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary))
        array.validate(full=True)
        return array.dictionary_decode()
    if pa.types.is_string(array.type):
        array = array.view(pa.binary())
    elif pa.types.is_large_string(array.type):
        array = array.view(pa.large_binary())
    array.validate(full=True)
    return array.cast(pa.large_binary())


def _slices(file: File, arrays: Iterable[Any], target: int) -> Iterator[Piece]:
    # Cut after the row that fills a piece, however the file groups its rows.
    from pyarrow import compute

    row = 1
    held: list[Any] = []
    size = 0
    for array in arrays:
        lengths = compute.binary_length(array).fill_null(0).to_numpy()
        ends = np.cumsum(lengths.astype(np.int64) + 1)
        begin = 0
        while begin < len(array):
            before = int(ends[begin - 1]) if begin else 0
            cut = int(np.searchsorted(ends, before + target - size)) + 1
            held.append(array.slice(begin, cut - begin))
            if cut > len(array):
                size += int(ends[-1]) - before
                break
            piece = _packed(file, row, held)
            row += sum(map(len, held))
            held, size, begin = [], 0, cut
            yield piece
    if held:
        yield _packed(file, row, held)


def _packed(file: File, row: int, arrays: Sequence[Any]) -> Piece:
    import pyarrow as pa

    batch = pa.RecordBatch.from_arrays([pa.concat_arrays(arrays)], ["text"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return Piece("arrow", file.path, row, 0, sink.getvalue().to_pybytes())


def parse(block: Block) -> Parsed:
    """The documents of a block; what cannot be one is told in ``bad``, and never raised.

    How to parse them is written on the pieces.
    """
    parsed = Parsed()
    for piece in block.pieces:
        kind, _, option = piece.kind.partition(":")
        match kind:
            case "txt" | "file":
                _parse_text(piece, kind == "txt", parsed)
            case "jsonl":
                _parse_lines(piece, option, parsed)
            case "json":
                data = piece.data.removeprefix(BOM)
                _parse_record(data, option, piece.file, parsed)
            case "csv" | "tsv":
                _parse_rows(piece, kind == "csv", option, parsed)
            case "arrow":
                _parse_arrow(piece, parsed)
            case "wiki":
                _parse_pages(piece, option, parsed)
    return parsed


def _parse_text(piece: Piece, divided: bool, parsed: Parsed) -> None:
    data, offset = piece.data, piece.offset
    if offset == 0 and data.startswith(BOM):
        data, offset = data[len(BOM) :], len(BOM)
    try:
        text, good = data.decode(), b"\0" not in data
    except UnicodeDecodeError:
        # What is not UTF-8 becomes lone surrogates, and so stays within its document.
        text, good = data.decode("utf-8", "surrogateescape"), False
    if not good:
        text = _without_bad(text, piece, offset, divided, parsed)
    elif not divided and not text.strip():
        parsed.skipped["empty documents"] += 1
    text = _with_plain_ends(text)
    for document in _BETWEEN_DOCUMENTS.split(text) if divided else [text]:
        if stripped := document.strip():
            parsed.texts.append(stripped)


def _without_bad(text: str, piece: Piece, offset: int, divided: bool, parsed: Parsed) -> str:
    line, good = piece.line, []
    ends = [*_BETWEEN_DOCUMENTS.finditer(text)] if divided else []
    begin = 0
    for end in [*(match.end() for match in ends), len(text)]:
        raw = text[begin:end].encode("utf-8", "surrogateescape")
        bad = _flaw(raw, piece.file, line, offset)
        if bad:
            parsed.bad.append(bad)
        else:
            good.append(text[begin:end])
        begin, line, offset = end, line + raw.count(b"\n"), offset + len(raw)
    return "\n\n".join(good)


def _flaw(raw: bytes, file: str, line: int, offset: int) -> Bad | None:
    for number, each in enumerate(io.BytesIO(raw), line):  # a line ends at a line feed only
        if b"\0" in each:
            return Bad(
                "NUL byte",
                f"{file}: line {number}, byte {offset + each.index(0)}: a NUL byte, so this is "
                f"not text (or UTF-16); convert it to UTF-8 or leave the file out",
            )
        try:
            each.decode()
        except UnicodeDecodeError as error:
            return Bad(
                "not UTF-8",
                f"{file}: line {number}, byte {offset + error.start}: not UTF-8 "
                f"({error.reason}); convert the file, as in `iconv -f latin1 -t utf-8`",
            )
        offset += len(each)
    return None


def _parse_lines(piece: Piece, column: str, parsed: Parsed) -> None:
    data, offset = piece.data, piece.offset
    if offset == 0 and data.startswith(BOM):
        data, offset = data[len(BOM) :], len(BOM)
    for number, line in enumerate(data.split(b"\n"), piece.line):
        if line.strip():
            where = f"{piece.file}: line {number}"
            bad = _flaw(line, piece.file, number, offset) if _is_flawed(line) else None
            if bad:
                parsed.bad.append(bad)
            else:
                _parse_record(line, column, where, parsed)
        offset += len(line) + 1


def _is_flawed(data: bytes) -> bool:
    if b"\0" in data:
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def _parse_record(data: bytes, column: str, where: str, parsed: Parsed) -> None:
    try:
        record = json.loads(data.decode())
    except RecursionError:
        parsed.bad.append(Bad("malformed JSON", f"{where}: JSON nested too deep; leave it out"))
        return
    except ValueError as error:
        known = isinstance(error, json.JSONDecodeError)
        cause = error if known else "a number of thousands of digits"
        parsed.bad.append(
            Bad(
                "malformed JSON",
                f"{where}: malformed JSON ({cause}); needed is one object a line, so mend the "
                f"line, leave it out, or rewrite the file with `jq -c`",
            )
        )
        return
    if not isinstance(record, dict):
        parsed.bad.append(
            Bad(
                "not a JSON object",
                f"{where}: JSON, but not an object; needed is one object a line, so a list is "
                f"rewritten with `jq -c '.[]'`",
            )
        )
    elif record.get(column) is None:
        names = _listed(list(record)) if record else "no field at all"
        parsed.bad.append(
            Bad(
                "no text",
                f"{where}: no text in field {column!r} (it has {names}); name the field that holds "
                f"the text with --column NAME (in Python: column=), or leave the record out",
            )
        )
    elif not isinstance(record[column], str):
        parsed.bad.append(
            Bad(
                "text is not a string",
                f"{where}: field {column!r} is {type(record[column]).__name__}, not a string; name "
                f"the field that holds the text with --column NAME (in Python: column=), or leave "
                f"the record out",
            )
        )
    else:
        _take(record[column], where, parsed)


def _parse_rows(piece: Piece, quoting: bool, option: str, parsed: Parsed) -> None:
    index, count = map(int, option.split())
    number, begin = piece.line, 0
    while begin < len(piece.data):
        end = _row_end(piece.data, begin, quoting) or len(piece.data)
        row = piece.data[begin:end]
        if row.strip(b"\r\n"):
            where = f"{piece.file}: row {number} (byte {piece.offset + begin})"
            cells = _cells(row, quoting)
            if len(cells) == count:
                _take_bytes(cells[index], where, parsed)
            else:
                parsed.bad.append(_wrong_count(where, row, quoting, len(cells), count))
            number += 1
        begin = end


def _wrong_count(where: str, row: bytes, quoting: bool, found: int, count: int) -> Bad:
    shown = _printable(row[:60].decode("utf-8", "replace").rstrip("\r\n"))
    what = "quote what holds a comma" if quoting else "a .tsv has no quoting: write it as .csv"
    return Bad(
        "wrong number of fields",
        f"{where}: {found} fields, but the header has {count} (it begins with {shown}); {what}, "
        f"or leave the row out",
    )


def _parse_arrow(piece: Piece, parsed: Parsed) -> None:
    import pyarrow as pa

    with pa.ipc.open_stream(piece.data) as stream:
        rows = stream.read_all().column(0).to_pylist()
    for number, row in enumerate(rows, piece.line):
        where = f"{piece.file}: record {number}"
        if row is None:
            parsed.bad.append(
                Bad("no text", f"{where}: null where its text should be; leave the record out")
            )
        else:
            _take_bytes(row, where, parsed)


def _take_bytes(data: bytes, where: str, parsed: Parsed) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        parsed.bad.append(
            Bad(
                "not UTF-8",
                f"{where}, byte {error.start} of its text: not UTF-8 ({error.reason}); "
                f"convert the text, or leave the record out",
            )
        )
        return
    _take(text, where, parsed)


def _take(text: str, where: str, parsed: Parsed) -> None:
    # The text of one record.
    if "\0" in text:
        parsed.bad.append(
            Bad(
                "NUL byte",
                f"{where}: a NUL at character {text.index(chr(0))} of its text; remove it, or "
                f"leave the record out",
            )
        )
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        parsed.bad.append(
            Bad(
                "lone surrogate",
                f"{where}: half a surrogate pair (U+{ord(text[error.start]):04X}) at character "
                f"{error.start} of its text, which UTF-8 cannot say; remove it, or leave the "
                f"record out",
            )
        )
        return
    if text := _with_plain_ends(text).strip():
        parsed.texts.append(text)
    else:
        parsed.skipped["empty documents"] += 1


def _with_plain_ends(text: str) -> str:
    return _CARRIAGE_RETURNS.sub("\n", text) if "\r" in text else text


def _printable(text: str) -> str:
    # Nothing that a terminal would obey, or that could not be written to one.
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _parse_pages(piece: Piece, names: str, parsed: Parsed) -> None:
    end = 0
    while (begin := piece.data.find(b"<page>", end)) >= 0:
        end = piece.data.find(b"</page>", begin) + len(b"</page>")
        where = f"{piece.file}: line {piece.line + piece.data.count(10, 0, begin)}"
        if end < begin:
            parsed.bad.append(Bad("malformed XML", f"{where}: a <page> that does not end"))
            return
        try:
            page = ElementTree.fromstring(piece.data[begin:end])
        except ElementTree.ParseError as error:
            parsed.bad.append(
                Bad(
                    "malformed XML",
                    f"{where}: a page that is not XML ({error}); mend it, or leave it out",
                )
            )
            continue
        _parse_page(page, [name for name in names.split("|") if name], where, parsed)


def _parse_page(
    page: ElementTree.Element, names: Sequence[str], where: str, parsed: Parsed
) -> None:
    revisions = page.findall("revision")
    markup = (revisions[-1].findtext("text") if revisions else None) or ""
    model = (revisions[-1].findtext("model") if revisions else None) or "wikitext"
    if page.findtext("ns", "0").strip() != "0":
        parsed.skipped["wiki pages outside the main namespace"] += 1
    elif page.find("redirect") is not None:
        parsed.skipped["wiki redirects"] += 1
    elif model.strip() != "wikitext":
        parsed.skipped["wiki pages that are not wikitext"] += 1
    else:
        _take(plain_text(page.findtext("title", ""), markup, names), where, parsed)
