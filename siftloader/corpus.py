"""Files to blocks of raw records, blocks to documents.

    inputs = find_inputs(["books=gutenberg/", "wiki/*.xml.bz2", "news.jsonl.zst"])
    for block in cut_blocks(inputs, Format()):      # one process: sequential, on bytes, cheap
        parse(block).texts                          # any process: decode, parse, strip markup

Where the blocks are cut depends on what the files hold and on ``Format`` alone, and the documents
depend on neither blocks nor compression.

Nothing is repaired in silence: a file that is damaged or ends too early is a CorpusError, a record
that is not text is a ``Bad`` that names file, line and byte. What is skipped is counted.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np

from siftloader.errors import CorpusError
from siftloader.files import (
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
CSV_BLOCK = 32 << 20  # the longest row a .csv may have
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
    column: str | None = None  # that holds the text of a record; None: text, content, or the only
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
        reading.hashes.clear()
        gathered: list[Piece] = []
        size = 0
        for file in source.files:
            some = False
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
            if not some:
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
        match kind:
            case "txt" if format.documents == "file":
                yield from _some(Piece("file", file.path, 1, 0, stream.read()))
            case "txt":
                for line, offset, data in _spans(stream, _BLANK_LINE, format.block_bytes):
                    yield from _some(Piece("txt", file.path, line, offset, data))
            case "jsonl":
                yield from _cut_jsonl(file, stream, format)
            case "csv" | "tsv":
                yield from _cut_csv(file, stream, format, reading, "\t" if kind == "tsv" else ",")
            case "tar":
                yield from _cut_tar(file, stream, format, reading)
            case "wiki":
                yield from _cut_wiki(file, stream, format)


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
    for line, offset, data in _spans(stream, _LINE_END, format.block_bytes):
        if column is None:
            column = _json_column(file.path, data)
        # Without a column all of it is malformed, or blank.
        yield from _some(Piece(f"jsonl:{column or ''}", file.path, line, offset, data))


def _json_column(path: str, data: bytes) -> str | None:
    for line in data.removeprefix(BOM).split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return _choose_column(path, {key: isinstance(record[key], str) for key in record})
    return None


def _choose_column(path: str, columns: Mapping[str, bool], asked: str | None = None) -> str:
    # ``columns``: name -> whether it holds text.
    names = ", ".join(columns) or "none at all"
    if asked is not None and asked not in columns:
        raise CorpusError(f"{path}: no column {asked!r}; it has {names}: give one of them")
    if asked is not None:
        return asked
    found = [name for name in COLUMNS if name in columns]
    found = found[:1] or [name for name, is_text in columns.items() if is_text]
    if len(found) != 1:
        raise CorpusError(
            f"{path}: which column holds the text? It has {names}, neither "
            f"{' nor '.join(COLUMNS)}, and {len(found)} that hold text; name the column"
        )
    return found[0]


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
    for group in _tar_groups(file, blocks):
        # Beside a text of the same name, a .json says something about it.
        suffix = ".txt" if any(name.lower().endswith(".txt") for name in group) else ".json"
        for name, data in group.items():
            shown = f"{file.path}: {_printable(name)}"
            if data is None or not name.lower().endswith(suffix):
                reading.skipped["tar members that are not text"] += 1
            elif suffix == ".txt":
                yield Piece("file", shown, 1, 0, data)
            else:
                column = column or _json_column(shown, b" ".join(data.splitlines()))
                yield Piece(f"json:{column or ''}", shown, 1, 0, data)


def _tar_groups(file: File, blocks: _Blocks) -> Iterator[dict[str, bytes | None]]:
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
    with _tables(file), open_seekable(file, reading) as whole:
        if not whole.read(1):
            return
        whole.seek(0)
        arrays = _parquet(file, whole, format) if kind == "parquet" else _ipc(file, whole, format)
        yield from _slices(file, arrays, format.block_bytes)


def _parquet(file: File, whole: BinaryIO, format: Format) -> Iterator[Any]:  # noqa: A002
    from pyarrow import parquet

    # buffer_size: pages are read as they are needed, not a row group's whole column.
    table = parquet.ParquetFile(whole, pre_buffer=False, buffer_size=1 << 20)
    column = _table_column(file, table.schema_arrow, format)
    for batch in table.iter_batches(batch_size=1024, columns=[column], use_threads=False):
        yield _as_bytes(batch.column(0))


def _ipc(file: File, whole: BinaryIO, format: Format) -> Iterator[Any]:  # noqa: A002
    from pyarrow import ipc

    if whole.read(6) == b"ARROW1":
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


def _cut_csv(
    file: File,
    stream: BinaryIO,
    format: Format,  # noqa: A002
    reading: Reading,
    delimiter: str,
) -> Iterator[Piece]:
    head = stream.peek(1 << 20)  # type: ignore[attr-defined]
    if not head:
        return
    with _tables(file):
        yield from _slices(
            file, _csv(file, stream, format, reading, delimiter, head), format.block_bytes
        )


def _csv(
    file: File,
    stream: BinaryIO,
    format: Format,  # noqa: A002
    reading: Reading,
    delimiter: str,
    head: bytes,
) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv as tables

    rows = csv.reader(
        io.StringIO(head.removeprefix(BOM).decode("utf-8", "replace"), newline=""),
        delimiter=delimiter,
    )
    names = next((row for row in rows if row), [])
    column = _choose_column(file.path, dict.fromkeys(names, True), format.column)

    def refuse(row: Any) -> str:
        where = "" if row.number is None else f" (row {row.number}, the header being row 1)"
        shown = (row.text or "")[:60]
        reading.bad.append(
            Bad(
                "wrong number of fields",
                f"{file.path}: a row of {row.actual_columns} fields{where}, but the header has "
                f"{row.expected_columns}: {shown!r}; quote what holds a {delimiter!r}",
            )
        )
        return "skip"

    opened = tables.open_csv(
        pa.PythonFile(stream, mode="r"),
        read_options=tables.ReadOptions(use_threads=False, block_size=CSV_BLOCK),
        parse_options=tables.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
        ),
        # As bytes: one text that is not UTF-8 is that row's fault, not the file's.
        convert_options=tables.ConvertOptions(
            check_utf8=False, include_columns=[column], column_types={column: pa.large_binary()}
        ),
    )
    for batch in opened:
        yield batch.column(0)


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
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        # MemoryError: a damaged length asks for more bytes than there are.
        cause = str(error) or "it claims to hold more than memory does"
        raise CorpusError(
            f"{file.path}: damaged or cut short ({cause}); fetch it again, or write it anew"
        ) from error


def _table_column(file: File, schema: Any, format: Format) -> str:  # noqa: A002
    import pyarrow as pa

    text = {each.name: _is_text(each.type) for each in schema}
    column = _choose_column(file.path, text, format.column)
    kind = schema.field(column).type
    if not text[column] and not pa.types.is_null(kind):
        raise CorpusError(
            f"{file.path}: column {column!r} is of type {kind}, not text; it has "
            f"{', '.join(f'{each.name} ({each.type})' for each in schema)}: name one of strings"
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
            case "arrow":
                _parse_rows(piece, parsed)
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
        parsed.bad.append(
            Bad(
                "malformed JSON",
                f"{where}: malformed JSON ({error}); needed is one object a line, so mend the "
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
        names = ", ".join(record) or "no field at all"
        parsed.bad.append(
            Bad(
                "no text",
                f"{where}: no text in field {column!r} (it has {_printable(names)}); name the "
                f"column that holds the text, or leave the record out",
            )
        )
    elif not isinstance(record[column], str):
        parsed.bad.append(
            Bad(
                "text is not a string",
                f"{where}: field {column!r} is {type(record[column]).__name__}, not a string; "
                f"name the column that holds the text, or leave the record out",
            )
        )
    else:
        _take(record[column], where, parsed)


def _parse_rows(piece: Piece, parsed: Parsed) -> None:
    import pyarrow as pa

    with pa.ipc.open_stream(piece.data) as stream:
        rows = stream.read_all().column(0).to_pylist()
    for number, row in enumerate(rows, piece.line):
        where = f"{piece.file}: record {number}"
        if row is None:
            parsed.bad.append(
                Bad("no text", f"{where}: null where its text should be; leave the record out")
            )
            continue
        try:
            text = row.decode()
        except UnicodeDecodeError as error:
            parsed.bad.append(
                Bad(
                    "not UTF-8",
                    f"{where}, byte {error.start} of its text: not UTF-8 ({error.reason}); "
                    f"convert the text, or leave the record out",
                )
            )
            continue
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
    return text.encode("utf-8", "backslashreplace").decode()


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
