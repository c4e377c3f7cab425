"""Text comes back as it was written, or the error says where it went wrong."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from compressions import COMPRESS
from effort import examples
from hypothesis import example, given, strategies as st

from siftloader import corpus
from siftloader.corpus import Format, Parsed, cut_blocks, parse, read_documents
from siftloader.errors import CorpusError
from siftloader.files import File, Reading, find_inputs, hash_input


# Lines that hold something, no line ends, no NUL, nothing UTF-8 cannot say.
words = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0\n\r\ufeff"), min_size=1
)
lines = words.filter(lambda line: line.strip() == line)
texts = st.lists(lines, min_size=1, max_size=4).map("\n".join)
# What a record may hold besides: blank lines within.
records = st.lists(texts, min_size=1, max_size=3).map("\n\n".join)
SPACES = [chr(code) for code in range(0x11000) if chr(code).isspace() and chr(code) != "\n"]


def read(*arguments: object, boundary: str = "blank-line", reading: Reading | None = None):
    inputs = find_inputs(str(argument) for argument in arguments)
    return [
        (inputs[document.source].name, document.text)
        for document in read_documents(inputs, boundary, reading)
    ]


def cut(*arguments: object, reading: Reading | None = None, **options):
    inputs = find_inputs(str(argument) for argument in arguments)
    return list(cut_blocks(inputs, Format(**options), reading))


def parsed(*arguments: object, reading: Reading | None = None, **options) -> Parsed:
    """Everything at once, and what does not depend on how it was cut checked on the way."""
    whole = Parsed()
    for block in cut(*arguments, reading=reading, **options):
        part = parse(pickle.loads(pickle.dumps(block)))
        whole.texts += part.texts
        whole.skipped += part.skipped
        whole.bad += part.bad
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def as_txt(path: Path, documents: list[str]) -> bytes:
    return "\n\n".join(documents).encode()


def as_jsonl(path: Path, documents: list[str]) -> bytes:
    return "".join(f"{json.dumps({'id': 1, 'text': text})}\n" for text in documents).encode()


def as_csv(path: Path, documents: list[str]) -> bytes:
    sink = io.StringIO(newline="")
    rows = csv.writer(sink)
    rows.writerow(["id", "text", "more"])
    rows.writerows([number, text, "a, b"] for number, text in enumerate(documents))
    return sink.getvalue().encode()


def table(documents: list[str], kind: str = "string"):
    pa = pytest.importorskip("pyarrow")
    kinds = {
        "string": pa.string(),
        "large": pa.large_string(),
        "view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    array = pa.array(documents, pa.string())
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(kinds[kind])
    return pa.table({"id": list(range(len(documents))), "text": array})


def as_parquet(path: Path, documents: list[str]) -> bytes:
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(table(documents), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow(path: Path, documents: list[str], kind: str = "string", whole: bool = False) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    rows = table(documents, kind)
    with (pa.ipc.new_file if whole else pa.ipc.new_stream)(sink, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def as_feather(path: Path, documents: list[str]) -> bytes:
    return as_arrow(path, documents, whole=True)


def as_tar(path: Path, documents: list[str], suffix: str = ".txt") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number, text in enumerate(documents):
            data = text if suffix == ".txt" else json.dumps({"text": text})
            add(tar, f"{number:04}{suffix}", data.encode())
    return sink.getvalue()


def as_json_tar(path: Path, documents: list[str]) -> bytes:
    return as_tar(path, documents, ".json")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **about) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


CONTAINERS = {
    "jsonl": as_jsonl,
    "csv": as_csv,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "feather": as_feather,
    "tar": as_tar,
    "JSON.tar": as_json_tar,
}


@examples(150)
@given(
    documents=st.lists(texts, min_size=1, max_size=5),
    blanks=st.lists(
        st.text(st.sampled_from(SPACES), max_size=2).filter(lambda blank: "\n" not in blank),
        min_size=1,
        max_size=3,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last=st.booleans(),
    suffix=st.sampled_from(sorted(COMPRESS)),
    block_bytes=st.integers(1, 200),
)
def test_documents_come_back_whatever_the_file_is_made_of(
    folder, documents, blanks, end, bom, last, suffix, block_bytes
):
    """Line ends, marks, blank lines, compression, blocks are the file's business, not the text's."""
    between = "\n" + "".join(blank + "\n" for blank in blanks)
    text = between.join(documents) + "\n" * last
    data = b"\xef\xbb\xbf" * bom + text.replace("\n", end).encode()
    path = folder / f"law.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    assert read(path) == [("law", document) for document in documents]
    assert parsed(path, block_bytes=block_bytes) == Parsed(texts=documents)


@examples(120)
@given(
    documents=st.lists(records, min_size=1, max_size=7),
    container=st.sampled_from(sorted(CONTAINERS)),
    suffix=st.sampled_from(sorted(COMPRESS)),
    block_bytes=st.one_of(st.integers(1, 100), st.just(1 << 20)),
)
def test_records_come_back_whatever_holds_them(folder, documents, container, suffix, block_bytes):
    path = folder / f"law.{container}{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTAINERS[container](path, documents)))
    reading = Reading()
    assert parsed(path, block_bytes=block_bytes, reading=reading) == Parsed(texts=documents)
    assert reading.bytes == path.stat().st_size
    assert reading.sha256 == {0: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert not reading.bad


@examples(60)
@given(
    documents=st.lists(records, min_size=1, max_size=12),
    container=st.sampled_from(["txt", *sorted(CONTAINERS)]),
    block_bytes=st.integers(1, 200),
)
def test_blocks_depend_on_what_a_file_holds_alone(folder, documents, container, block_bytes):
    """Neither its name, nor how it is stored, nor the sources before it."""
    data = (as_txt if container == "txt" else CONTAINERS[container])(folder, documents)
    name = container.replace("JSON.", "")
    plain, packed = folder / f"plain.{name}", folder / f"packed.{name}.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    one = cut(plain, block_bytes=block_bytes)
    two = cut(packed, plain, block_bytes=block_bytes)
    assert [block.number for block in two] == list(range(2 * len(one)))
    assert [block.source for block in two] == [0] * len(one) + [1] * len(one)
    digests = [block.digest for block in one]
    assert [block.digest for block in two] == digests * 2
    # Each is full, and would not be without its last record.
    sizes = [sum(len(piece.data) for piece in block.pieces) for block in one]
    assert all(size >= block_bytes for size in sizes[:-1])


@examples(60)
@given(
    documents=st.lists(st.lists(lines, max_size=3).map("\n\n".join), min_size=1, max_size=6),
    block_bytes=st.integers(1, 60),
    boundary=st.sampled_from(["blank-line", "file"]),
)
def test_many_small_files_share_blocks(tmp_path_factory, documents, block_bytes, boundary):
    place = tmp_path_factory.mktemp("many")
    for number, text in enumerate(documents):
        (place / f"{number}.txt").write_bytes(text.encode())
    reading = Reading()
    blocks = cut(place, block_bytes=block_bytes, documents=boundary, reading=reading)
    expected = [
        part
        for text in documents
        for part in ([text] if boundary == "file" else text.split("\n\n"))
    ]
    found = [parse(block) for block in blocks]
    assert [text for part in found for text in part.texts] == [text for text in expected if text]
    assert reading.skipped["files without text"] == documents.count("")
    sizes = [sum(len(piece.data) for piece in block.pieces) for block in blocks]
    assert all(size >= block_bytes for size in sizes[:-1])


@pytest.mark.parametrize("kind", ["string", "large", "view", "dictionary"])
@pytest.mark.parametrize("suffix", ["arrow", "feather"])
def test_text_columns_of_every_type_are_read(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    documents = ["one", "two\n\nlines", "three", "one", ""]
    path.write_bytes(as_arrow(path, documents, kind, whole=suffix == "feather"))
    for block_bytes in (1, 5, 1 << 20):
        found = parsed(path, block_bytes=block_bytes)
        assert found.texts == ["one", "two\n\nlines", "three", "one"]
        assert found.skipped == {"empty documents": 1}


@pytest.mark.parametrize(
    ("data", "boundary", "expected"),
    [
        (b"one\ntwo\n\nthree\n", "blank-line", ["one\ntwo", "three"]),
        (b"one\ntwo\n\nthree\n", "file", ["one\ntwo\n\nthree"]),
        (b"no line end", "blank-line", ["no line end"]),
        (b"\n\n \n", "blank-line", []),
        (b"", "file", []),
        (b" \n\t", "file", []),
        (b"\xef\xbb\xbf", "file", []),
        (b"\xef\xbb\xbf\n\n", "blank-line", []),
        ("\u3000\n\u00a0".encode(), "blank-line", []),
        (b"  indented\n    more  \n", "blank-line", ["indented\n    more"]),
        ("mid\ufeffdle".encode(), "blank-line", ["mid\ufeffdle"]),
        (b"old\rmac\r\r\nend", "blank-line", ["old\rmac\nend"]),
        (b"a\r\n \t\r\nb", "blank-line", ["a", "b"]),
    ],
)
def test_what_a_document_is(tmp_path, data, boundary, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    reading = Reading()
    assert [text for _, text in read(path, boundary=boundary, reading=reading)] == expected
    assert reading.documents[0] == len(expected)
    assert reading.skipped == ({} if expected else {"files without text": 1})


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"fine\nbad \xff here\n", r"line 2, byte 9: not UTF-8"),
        ("é\nbad ".encode() + b"\xff", r"line 2, byte 7: not UTF-8"),
        ("latin é".encode("latin-1"), r"line 1, byte 6: not UTF-8"),
        (b"\xed\xa0\x80 a lone surrogate", r"line 1, byte 0: not UTF-8"),
        ("utf-16".encode("utf-16-le"), r"line 1, byte 1: a NUL byte.*UTF-16"),
        (b"one\n\ntwo\0three\n", r"line 3, byte 8: a NUL byte"),
        (b"cut in a letter \xc3", r"line 1, byte 16: not UTF-8 \(unexpected end"),
        (b"\xef\xbb\xbfmarked \xff", r"line 1, byte 10: not UTF-8"),
        (b"one\n\n\n\ntwo\r\n\xff", r"line 6, byte 12: not UTF-8"),
    ],
)
@pytest.mark.parametrize("boundary", ["blank-line", "file"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_bad_bytes_are_named_by_file_line_and_byte(tmp_path, data, where, boundary, block_bytes):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=where) as caught:
        read(path, boundary=boundary)
    assert str(path) in str(caught.value)
    (bad,) = parsed(path, documents=boundary, block_bytes=block_bytes).bad
    assert bad.message == str(caught.value)
    assert bad.reason in ("not UTF-8", "NUL byte")


@examples(100)
@given(
    documents=st.lists(
        st.sampled_from([b"good\nlines", "größer".encode(), b"bad \xff", b"n\0ul", b"\xc3"]),
        min_size=1,
        max_size=8,
    ),
    between=st.sampled_from([b"\n\n", b"\r\n \r\n", b"\n\n\n\n"]),
    block_bytes=st.integers(1, 60),
)
def test_a_bad_document_takes_no_other_with_it(folder, documents, between, block_bytes):
    path = folder / "mixed.txt"
    path.write_bytes(between.join(documents))
    found = parsed(path, block_bytes=block_bytes)
    good = [each for each in documents if each in (b"good\nlines", "größer".encode())]
    assert [text.encode() for text in found.texts] == good
    assert len(found.bad) == len(documents) - len(good)
    for bad, document in zip(found.bad, [d for d in documents if d not in good], strict=True):
        assert bad.reason == ("NUL byte" if b"\0" in document else "not UTF-8")


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "cut', "malformed JSON", "malformed JSON.*one object a line"),
        (b"not json", "malformed JSON", "malformed JSON"),
        (b"[" * 100_000, "malformed JSON", "malformed JSON|nested too deep"),
        (b'{"text": ' + b"1" * 5000 + b"}", "malformed JSON", "number of thousands of digits"),
        (b'[{"text": "x"}]', "not a JSON object", r"jq -c '\.\[\]'"),
        (b"null", "not a JSON object", "not an object"),
        (b'{"other": "x"}', "no text", r"no text in field 'text' \(it has other\)"),
        (b'{"\\ud800": "x"}', "no text", r"it has \\ud800"),
        (b"{}", "no text", "it has no field at all"),
        (b'{"text": null}', "no text", "no text in field 'text'"),
        (b'{"text": 5}', "text is not a string", "field 'text' is int, not a string"),
        (b'{"text": ["x"]}', "text is not a string", "is list, not a string"),
        (b'{"text": "\\ud800 x"}', "lone surrogate", r"half a surrogate pair \(U\+D800\)"),
        (b'{"text": "x \\udc00"}', "lone surrogate", "at character 2 of its text"),
        (b'{"text": "a\\u0000b"}', "NUL byte", "a NUL at character 1"),
        (b'{"text": "a\0b"}', "NUL byte", "line 3, byte 29: a NUL byte"),
        (b'{"text": "\xff"}', "not UTF-8", "line 3, byte 28: not UTF-8"),
    ],
    ids=[f"{number:02}" for number in range(17)],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_bad_line_is_named_and_the_others_survive(tmp_path, line, reason, message, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n \r\n" + GOOD)
    found = parsed(path, block_bytes=block_bytes)
    assert found.texts == ["good", "good"]
    assert [bad.reason for bad in found.bad] == [reason]
    with pytest.raises(CorpusError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: line 3")
    assert "set_int_max_str_digits" not in str(caught.value)


@pytest.mark.parametrize(
    ("records", "column", "expected"),
    [
        ([{"content": "b", "text": "a"}], None, ["a"]),
        ([{"content": "b", "title": "c"}], None, ["b"]),
        ([{"body": "d", "n": 1}], None, ["d"]),
        ([{"body": "d", "text": "e"}], "body", ["d"]),
        ([{"text": " \n spaced\r\nends  "}], None, ["spaced\nends"]),
        ([{"text": "\ud83d\ude00"}], None, ["😀"]),
        ([{"text": "a\n\nb"}, {"text": ""}, {"text": " \t"}], None, ["a\n\nb"]),
        ([{"body": "x", "n": 1}, {"body": None, "m": 2}, {"body": "z"}], None, ["x", "z"]),
        ([{"body": None}, {"body": "z"}], None, ["z"]),
        ([{"n": 1}, {"text": "y", "body": "z"}], None, ["y"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_field_of_the_text_is_found_or_given(tmp_path, records, column, expected, block_bytes):
    """Found among the first records, however few of them share a block."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = parsed(path, column=column, block_bytes=block_bytes)
    assert found.texts == expected
    assert found.skipped == ({"empty documents": 2} if expected == ["a\n\nb"] else {})


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_first_record_is_the_first_that_is_one(tmp_path, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{broken\n[1]\n{"body": "x"}\n{"text": "y"}\n{"body": "z"}')
    found = parsed(path, block_bytes=block_bytes)
    assert found.texts == ["y"]
    assert [bad.reason for bad in found.bad] == [
        "malformed JSON", "not a JSON object", "no text", "no text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"a": "x", "b": "y"}], r"which column.*It has a, b, neither.*2 that may.*--column NAME"),
        ([{"a": 1, "b": None}], "It has a, b, .*and 1 that may hold text"),
        ([{"title": "x", "body": None}], "It has title, body, .*and 2 that may hold text"),
        ([{"a": "x"}, {"b": "y"}], "It has a, b, .*and 2"),
        ([{"a": "x"}] * 99 + [{"b": "y"}], "It has a, b, .*and 2"),
        ([{"a": 1}], "It has a, .*and 0"),
        ([{f"n{n}": 1 for n in range(30)}], "n19 and 10 more, neither"),
        ([{}], "none at all"),
        ([{"\x1b[31m": 1}], r"It has \\x1b\[31m"),
    ],
    ids=["two", "null", "one-null", "later", "hundredth", "none", "many", "empty", "escape"],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_field_that_cannot_be_found_is_asked_for(tmp_path, records, message, block_bytes):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(CorpusError, match=message):
        cut(path, block_bytes=block_bytes)


def test_a_first_record_that_is_long_is_the_one_looked_at(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "x " * (1 << 20)}) + '\n{"text": "y"}\n')
    for block_bytes in (1, 8 << 20):
        found = parsed(path, block_bytes=block_bytes)
        assert [len(text) for text in found.texts] == [(1 << 21) - 1]
        assert [bad.reason for bad in found.bad] == ["no text"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather", "csv"])
def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(CONTAINERS[suffix](path, ["x"]))
    with pytest.raises(CorpusError, match=r"no column 'body'; it has id, text"):
        cut(path, column="body")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_a_column_that_holds_no_text_is_told_with_its_type(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(CONTAINERS[suffix](path, ["x"]))
    with pytest.raises(CorpusError, match=r"column 'id' is of type int64, not text; .*text \(str"):
        cut(path, column="id")


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_bad_rows_of_a_table_are_named_and_the_others_survive(tmp_path, suffix, block_bytes):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = pa.array([b"good", None, b"bad \xff", b"n\0ul", b"", b"more"], pa.binary())
    rows = pa.table({"text": raw.view(pa.string())})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(rows, path)
    else:
        new = pa.ipc.new_stream if suffix == "arrow" else pa.ipc.new_file
        with new(str(path), rows.schema) as sink:
            sink.write_table(rows)
    found = parsed(path, block_bytes=block_bytes)
    assert found.texts == ["good", "more"]
    assert found.skipped == {"empty documents": 1}
    assert [bad.reason for bad in found.bad] == ["no text", "not UTF-8", "NUL byte"]
    assert [bad.message.partition(",")[0].partition(": ")[2][:8] for bad in found.bad] == [
        f"record {number}" for number in (2, 3, 4)
    ]


def test_a_column_of_nulls_alone_is_bad_rows_not_a_bad_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    rows = pa.table({"text": pa.nulls(3)})
    with pa.ipc.new_stream(str(path), rows.schema) as sink:
        sink.write_table(rows)
    assert [bad.reason for bad in parsed(path).bad] == ["no text"] * 3


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_rows_of_a_csv_that_have_other_fields_are_told(tmp_path, block_bytes):
    path = tmp_path / "a.csv"
    data = b'\xef\xbb\xbfid,text\n1,one\n2,t,\x1bwo\n3\n\n4,"fo\n\nur"\n5,\xff\n6,\n7,\0'
    path.write_bytes(data)
    reading = Reading()
    found = parsed(path, reading=reading, block_bytes=block_bytes)
    assert found.texts == ["one", "fo\n\nur"]
    assert found.skipped == {"empty documents": 1}
    assert [bad.reason for bad in found.bad] == [
        "wrong number of fields", "wrong number of fields", "not UTF-8", "NUL byte",
    ]  # fmt: skip
    for bad, number, begins in zip(
        found.bad, (3, 4, 6, 8), (b"2,t", b"3\n", b"5,", b"7,"), strict=True
    ):
        assert bad.message.startswith(f"{path}: row {number} (byte {data.index(begins)})")
    assert "3 fields, but the header has 2 (it begins with 2,t,\\x1bwo)" in found.bad[0].message
    assert not reading.bad
    with pytest.raises(CorpusError, match=r"row 3 \(byte 17\): 3 fields"):
        read(path)


class Slowly(io.BytesIO):
    """Gives few bytes at a time, so that every byte is once the last that is known."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self.step = step

    def read(self, size=-1):
        return super().read(self.step)


@examples(200)
@given(
    rows=st.lists(
        st.lists(st.text(st.sampled_from('ab ,"\n\r\té'), max_size=6), min_size=2, max_size=3),
        min_size=1,
        max_size=5,
    ),
    end=st.sampled_from(["\n", "\r\n", "\r\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    last=st.booleans(),
    step=st.integers(1, 9),
)
def test_a_csv_is_cut_into_the_rows_that_were_written(rows, end, quoting, last, step):
    """As a reader of another make has them, whatever arrives at a time."""
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator=end, quoting=quoting).writerows(rows)
    data = sink.getvalue().encode()
    data = data if last else data.removesuffix(end.encode())
    found = list(corpus._rows(File("a.csv", None, ""), Slowly(data, step), True))
    assert b"".join(row for _, row in found) == data
    assert [offset for offset, _ in found] == [
        sum(len(row) for _, row in found[:number]) for number in range(len(found))
    ]
    # The writer quotes no carriage return but that of its line end.
    assert [
        [*cells[:-1], cells[-1].rstrip(b"\r")]
        for cells in (corpus._cells(row, True) for _, row in found)
    ] == [[cell.encode() for cell in [*row[:-1], row[-1].rstrip("\r")]] for row in rows]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'id,text\n1,"open\n2,b\n', "row 2 .*begins at byte 8: a quote that is never closed"),
        (b'id,text\n1,a\n2,"open', "row 3 .*byte 12: a quote that is never closed"),
        (b'"id,text\n1,a\n', "row 1 .*byte 0: a quote that is never closed"),
        (b'id,text\n1,"a""', "row 2 .*never closed"),
        (b'id,text\n1,"ab"cd\n2,e\n', r'row 2 .*byte 14: text after a quote \(1,"ab"cd\\n2,e'),
        (b'id,text\n\n1,a\n2,"x" y"\n', r"row 3 .*byte 18: text after a quote"),
        (b'id,text\n1,"ab" \n', "row 2 .*text after a quote"),
        (b'id,text\n1,"open\n2,"b"\n', "row 2 .*text after a quote"),
        (b'id,text\n1, "a\nb"\n', "row 2 .*byte 11: blanks before a quote"),
        (b'id,text\n1,"a\0"\x1b[31m', r"text after a quote \(1,\"a\\x00\"\\x1b\[31m"),
    ],
    ids=[f"{number:02}" for number in range(10)],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_quote_that_is_not_closed_merges_no_rows(tmp_path, data, message, block_bytes):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=f"a\\.csv: .*{message}"):
        cut(path, block_bytes=block_bytes)


def test_a_row_that_no_quote_ends_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_ROW", 4 << 20)
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,"' + b"long row\n" * (3 << 20))
    reading = Reading()
    with pytest.raises(CorpusError, match=r"row 2 .*byte 8: a row of more than 4 MiB"):
        cut(path, reading=reading)
    assert reading.bytes < 16 << 20


def test_quotes_within_a_plain_field_are_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\na 5" pipe,1\r\nb\rb,"1"\r\n"c ""d""",\n')
    assert parsed(path).texts == ['a 5" pipe', "b\rb", 'c "d"']


@examples(100)
@given(
    cells=st.lists(
        st.text(
            st.characters(exclude_categories=("Cs",), exclude_characters="\0\t\n\r\ufeff"),
            min_size=1,
        ).filter(str.strip),
        min_size=1,
        max_size=6,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(1, 60),
)
@example(cells=['"', 'a "b"', "c"], end="\n", block_bytes=1)
def test_a_tsv_has_no_quotes(folder, cells, end, block_bytes):
    path = folder / "a.tsv"
    path.write_bytes(f"text\tid{end}{''.join(f'{x}{chr(9)}1{end}' for x in cells)}".encode())
    expected = [cell.strip() for cell in cells]
    assert parsed(path, block_bytes=block_bytes) == Parsed(texts=expected)


def test_a_tsv_that_has_quotes_nevertheless_is_told_where_a_cell_is_broken(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b'id\ttext\n1\t"two\nlines"\n')
    found = parsed(path)
    assert found.texts == ['"two']
    assert [bad.reason for bad in found.bad] == ["wrong number of fields"]
    assert "a .tsv has no quoting" in found.bad[0].message


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("a.csv", "body", r"It has body, neither text nor content, and 1.*--column NAME"),
        ("a.csv", "Call me Ishmael.", r"which column"),
        ("a.csv", "id,body", r"It has id, body, neither .*and 2"),
        ("a.csv", "id;text", r"It has id;text, .*set apart by ',', but the header holds ';'"),
        ("a.csv", "id\ttext", r"set apart by ',', but the header holds '\\t'"),
        ("a.tsv", "id,text", r"set apart by '\\t', but the header holds ','"),
        ("a.csv", "text,id,text", "2 columns are named 'text'; rename"),
        ("a.tsv", "text\ttext", "2 columns are named 'text'"),
        ("a.csv", "a\x1b[2J,b", r"It has a\\x1b\[2J, b"),
    ],
    ids=[f"{number}" for number in range(9)],
)
def test_a_header_that_does_not_say_where_the_text_is_is_refused(tmp_path, name, head, message):
    (tmp_path / name).write_text(f"{head}\nx\n")
    with pytest.raises(CorpusError, match=rf"{name}: .*{message}"):
        cut(tmp_path / name)
    if name == "a.csv" and head == "body":
        assert parsed(tmp_path / name, column="body").texts == ["x"]


def test_columns_of_one_name_that_hold_no_text_are_no_matter(tmp_path):
    (tmp_path / "a.csv").write_text(",text,\n1,x,2\n")
    assert parsed(tmp_path / "a.csv").texts == ["x"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_two_text_columns_of_one_name_are_refused(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(rows, path)
    else:
        with (pa.ipc.new_file if suffix == "feather" else pa.ipc.new_stream)(
            str(path), rows.schema
        ) as sink:
            sink.write_table(rows)
    with pytest.raises(CorpusError, match=r"a\.\w+: 2 columns are named 'text'"):
        cut(path)


def test_a_column_is_read_by_its_whole_name_not_as_part_of_another(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = {"a": [{"text": "of the struct"}], "a.text": ["of the column"], "n": [1]}
    parquet.write_table(pa.table(rows), path)
    assert parsed(path, column="a.text").texts == ["of the column"]
    parquet.write_table(pa.table({"a": ["short"], "a.text": ["long"]}), path)
    assert parsed(path, column="a").texts == ["short"]
    parquet.write_table(pa.table({"a": [{"text": "of the struct"}], "n": [1]}), path)
    with pytest.raises(CorpusError, match=r"no column 'a\.text'; it has a, n"):
        cut(path, column="a.text")


def test_a_table_beside_whose_text_another_column_is_null_is_asked_about(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    rows = pa.table({"title": ["x"], "body": pa.nulls(1)})
    with pa.ipc.new_stream(str(path), rows.schema) as sink:
        sink.write_table(rows)
    with pytest.raises(CorpusError, match=r"title, body, neither.*2 that may hold text"):
        cut(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.feather", b"FEA1" + bytes(60) + b"FEA1", "Feather version 1.*version 2"),
        ("a.parquet", b"PAR1" + bytes(60) + b"PARE", "cannot read it .*ncrypted|damaged"),
        ("a.arrow", b"PK\3\4 another kind", "damaged or cut short"),
    ],
    ids=["feather", "encrypted", "zip"],
)
def test_what_a_table_cannot_be_read_for_is_told(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=rf"{name}: .*(?:{message})"):
        cut(tmp_path / name)


def test_what_pyarrow_has_not_learnt_is_no_damage(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    path.write_bytes(as_arrow(path, ["x"]))

    def unknown(*args):
        raise pa.ArrowNotImplementedError("codec \x1b[31m")

    monkeypatch.setattr(pa.ipc, "open_stream", unknown)
    with pytest.raises(CorpusError, match=r"a\.arrow: pyarrow .* cannot read it \(codec \\x1b"):
        cut(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.txt.gz"])
@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_called_so(tmp_path, name, code):
    data = "\ufeffid,text\n1,漢字\n\n2,x\n".encode(code)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "b.jsonl").write_text('{"text": "good"}')
    reading = Reading()
    found = parsed(tmp_path, reading=reading)
    assert (found.texts, found.bad) == (["good"], [])
    assert [bad.reason for bad in reading.bad] == ["UTF-16"]
    assert not reading.skipped
    assert reading.bytes == sum(each.stat().st_size for each in tmp_path.iterdir())
    with pytest.raises(CorpusError, match=rf"{name}: UTF-16, .*iconv -f utf-16"):
        read(path)


@pytest.mark.parametrize("boundary", ["blank-line", "file"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv"])
def test_lines_that_end_in_returns_alone_are_told(tmp_path, suffix, boundary, block_bytes):
    path = tmp_path / f"mac.{suffix}"
    path.write_bytes(b"one\rtwo\r\rthree\r" * 100_000 + b"\n\nunix")
    reading = Reading()
    found = parsed(path, documents=boundary, block_bytes=block_bytes, reading=reading)
    assert found == Parsed()
    (bad,) = reading.bad
    assert bad.reason == "lines that end in \\r alone"
    assert "no line feed in its first 1,048,576 bytes" in bad.message
    assert reading.bytes == path.stat().st_size  # and hashed, so that a change is noticed
    assert reading.sha256 == {0: hashlib.sha256(path.read_bytes()).hexdigest()}
    path.write_bytes(b"text\rmore\n" + b"three\r" * 100_000)
    reading = Reading()
    parsed(
        path, documents=boundary, column=None if suffix == "txt" else "text\rmore", reading=reading
    )
    assert not reading.bad


@pytest.mark.parametrize("container", ["parquet", "arrow", "feather", "tar", "JSON.tar"])
@examples(60)
@given(cut_at=st.floats(0, 1, exclude_max=True))
def test_a_container_cut_anywhere_is_refused(folder, container, cut_at):
    """Those that know their own end, plain: tables and tars."""
    data = CONTAINERS[container](folder, [f"document {n} " * 9 for n in range(40)])
    if container.endswith("tar"):
        data = data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512) + bytes(512)
    path = folder / f"short.{container}"
    path.write_bytes(data[: max(1, int(cut_at * len(data)))])
    with pytest.raises(CorpusError, match=r"short.*(damaged or cut short|which column)") as caught:
        cut(path)
    assert str(path) in str(caught.value)


@examples(100)
@given(
    where=st.integers(0, 10**6),
    value=st.integers(1, 255),
    container=st.sampled_from(["parquet", "arrow", "feather", "tar"]),
)
@example(where=613, value=1, container="arrow")  # asks for more memory than there is
@example(where=92, value=128, container="arrow")  # the name of a column is not UTF-8
def test_a_flipped_byte_is_an_error_that_names_the_file_or_another_text(
    folder, where, value, container
):
    """Nothing else: no crash, no stranger's exception."""
    data = bytearray(CONTAINERS[container](folder, [f"document {n} " * 3 for n in range(5)]))
    data[where % len(data)] ^= value
    path = folder / f"flipped.{container}"
    path.write_bytes(data)
    try:
        parsed(path)
    except CorpusError as error:
        assert str(path) in str(error)


def test_an_arrow_stream_cut_between_two_batches_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    data = as_arrow(path, ["one", "two", "three"])
    path.write_bytes(data[:-8])
    with pytest.raises(CorpusError, match=r"a\.arrow: damaged or cut short \(no end-of-stream"):
        cut(path)
    path.write_bytes(data + b"x")
    with pytest.raises(CorpusError, match=r"a\.arrow: damaged or cut short \(no end-of-stream"):
        cut(path)


@pytest.mark.parametrize(
    "offsets", [(0, 1 << 30, 8), (0, 3, 1 << 30), (0, 9, 8), (1 << 20, 3, 8), (0, -5, 8)], ids=str
)
def test_offsets_that_lead_outside_of_a_table_are_never_followed(tmp_path, offsets):
    """Followed, some of them end the process."""
    path = tmp_path / "a.arrow"
    data = as_arrow(path, ["one", "three"])
    right, wrong = struct.pack("<3i", 0, 3, 8), struct.pack("<3i", *offsets)
    assert data.count(right) == 1
    path.write_bytes(data.replace(right, wrong))
    with pytest.raises(CorpusError, match=r"a\.arrow: damaged"):
        cut(path)


@examples(60)
@given(
    documents=st.lists(records, min_size=1, max_size=12),
    chunk=st.integers(1, 12),
    block_bytes=st.integers(1, 200),
)
def test_how_a_table_groups_its_rows_moves_no_cut(folder, documents, chunk, block_bytes):
    pa = pytest.importorskip("pyarrow")
    rows = table(documents)
    found = []
    for size in (chunk, len(documents)):
        path = folder / "grouped.arrow"
        with pa.ipc.new_stream(str(path), rows.schema) as sink:
            sink.write_table(rows, max_chunksize=size)
        blocks = cut(path, block_bytes=block_bytes)
        found.append([parse(block).texts for block in blocks])
    assert found[0] == found[1]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather", "tar"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_an_empty_file_of_a_kind_that_is_never_empty_is_damaged(tmp_path, suffix, packed):
    path = tmp_path / f"a.{suffix}{'.gz' * packed}"
    path.write_bytes(gzip.compress(b"") if packed else b"")
    with pytest.raises(CorpusError, match=r"a\.\S+: damaged or cut short"):
        cut(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_an_empty_file_holds_nothing(tmp_path, suffix, packed):
    path = tmp_path / f"a.{suffix}{'.gz' * packed}"
    path.write_bytes(gzip.compress(b"") if packed else b"")
    reading = Reading()
    assert cut(path, reading=reading) == []
    assert reading.skipped == {"files without text": 1}
    assert reading.sha256 == {0: hashlib.sha256(path.read_bytes()).hexdigest()}


def archive(path: Path, *members: tuple[str, bytes], **about) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data, **about)
    return path


def test_a_tar_is_read_never_extracted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "../../escape.txt", b"a name is a name")
        add(tar, "/etc/passwd.txt", b"absolute")
        add(tar, "link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.txt", type=tarfile.LNKTYPE, linkname="../../escape.txt")
        add(tar, "null.txt", type=tarfile.CHRTYPE)
        add(tar, "x/1.jpg", b"\xff")
        add(tar, "x/1.json", b'{"text": "of the image"}')
        add(tar, "x/2.json", b'{"text": "beside a text"}')
        add(tar, "x/2.txt", b"\xef\xbb\xbfthe text\r\n\r\nitself")
        add(tar, "x/._2.txt", b"\0\xff what a Mac adds")
        add(tar, "n" * 200 + ".TXT", b"long name")
        add(tar, "empty.txt", b"")
    reading = Reading()
    found = parsed(path, reading=reading)
    assert found.texts == [
        "a name is a name", "absolute", "of the image", "the text\n\nitself", "long name",
    ]  # fmt: skip
    assert found.skipped == {"empty documents": 1}
    assert reading.skipped == {
        "tar members that are not text": 3,
        "tar members that are links or devices": 3,
    }
    assert not found.bad
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar"]


def test_bad_text_in_a_tar_is_named_by_its_member(tmp_path):
    path = archive(
        tmp_path / "a.tar",
        ("a.txt", b"fine\n\xff"),
        ("b.json", b"{"),
        ("c.json", b'{"text": "x",\n "n": 1}'),
        ("d.json", b'{"body": "x"}'),
        ("e\x1b.txt", b"old\rmac"),
        ("f.txt", "x".encode("utf-16")),
    )
    reading = Reading()
    found = parsed(path, reading=reading)
    assert found.texts == ["x"]
    assert [bad.message.removeprefix(f"{path}: ")[:15] for bad in reading.bad] == [
        r"e\x1b.txt: no l", "f.txt: UTF-16, ",
    ]  # fmt: skip
    assert [bad.reason for bad in found.bad] == ["not UTF-8", "malformed JSON", "no text"]
    assert found.bad[0].message.startswith(f"{path}: a.txt: line 2, byte 5: not UTF-8")
    assert found.bad[1].message.startswith(f"{path}: b.json: malformed JSON")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:1024] + b"\xff" * 8 + data[1032:], "a damaged header"),
        (lambda data: b"\xff" * 8 + data[8:], "damaged or cut short"),
        (lambda data: data[:2048], "no end-of-archive mark"),
        (lambda data: data + data, "something follows the end"),
        (lambda data: data + b"x", "something follows the end"),
        (lambda data: b"<html>no such page</html>", "damaged or cut short"),
        (lambda data: b"", "damaged or cut short"),
    ],
    ids=["second", "first", "end", "two", "garbage", "page", "empty"],
)
def test_a_tar_that_is_not_whole_is_refused(tmp_path, damage, message):
    path = archive(tmp_path / "a.tar", ("1.txt", b"one"), ("2.txt", b"two"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorpusError, match=message) as caught:
        cut(path)
    assert str(path) in str(caught.value)


PAGE = (
    "<page>\n<title>{title}</title>\n<ns>{ns}</ns>\n<id>1</id>\n{more}<revision><id>2</id>"
    '<model>{model}</model><text xml:space="preserve">{text}</text></revision>\n</page>\n'
)
HEAD = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="qq">\n<siteinfo>'
    '<namespaces><namespace key="0" case="first-letter" />'
    '<namespace key="6" case="first-letter">Pildi</namespace>'
    '<namespace key="14" case="first-letter">Liigi &amp; Co</namespace></namespaces></siteinfo>\n'
)


def page(title, text, ns=0, more="", model="wikitext"):
    return PAGE.format(title=title, text=text, ns=ns, more=more, model=model)


def dump(path: Path, *pages: str, tail: str = "</mediawiki>\n") -> Path:
    data = (HEAD + "".join(pages) + tail).encode()
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    return path


@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".bz2"], ids=["plain", "bz2"])
def test_a_wiki_dump_is_its_articles(tmp_path, block_bytes, suffix):
    pytest.importorskip("mwparserfromhell")
    path = dump(
        tmp_path / f"wiki.xml{suffix}",
        page(
            "Ada &amp; Co",
            "'''Ada''' wrote.\n\n[[Pildi:a.jpg|x]]She [[note|noted]].[[liigi &amp; Co:B]]",
        ),
        page("Talk:Ada", "chatter", ns=1),
        page("Byron", "#REDIRECT [[Ada]]", more='<redirect title="Ada" />'),
        page("Only", "{{template}}"),
        page("Style", "a {{b}}", model="css"),
        page("Zoë", "Last &lt;ref&gt;not this&lt;/ref&gt;one."),
    )
    found = parsed(path, block_bytes=block_bytes)
    assert found.texts == ["Ada & Co\nAda wrote.\nShe noted.", "Zoë\nLast one."]
    assert found.skipped == {
        "wiki pages outside the main namespace": 1,
        "wiki redirects": 1,
        "wiki pages that are not wikitext": 1,
        "empty documents": 1,
    }
    assert not found.bad


def test_a_broken_page_is_named_and_the_others_survive(tmp_path):
    pytest.importorskip("mwparserfromhell")
    path = dump(
        tmp_path / "wiki.xml",
        page("A", "one"),
        page("B", "a < b"),
        page("C", "&nbsp;"),
        page("D", "x"),
    )
    found = parsed(path)
    assert found.texts == ["A\none", "D\nx"]
    assert [bad.reason for bad in found.bad] == ["malformed XML"] * 2
    assert found.bad[0].message.startswith(f"{path}: line 9: a page that is not XML")


@pytest.mark.parametrize("tail", ["", "<page>", "</mediawik", "</mediawiki>x"])
def test_a_dump_without_its_end_is_refused(tmp_path, tail):
    pytest.importorskip("mwparserfromhell")
    path = dump(tmp_path / "wiki.xml", page("A", "one"), tail=tail)
    with pytest.raises(CorpusError, match=r"wiki\.xml: damaged or cut short.*</mediawiki>"):
        cut(path)


@pytest.mark.parametrize("data", [b"<html>404</html>", b""], ids=["page", "empty"])
def test_xml_of_another_kind_is_refused(tmp_path, data):
    pytest.importorskip("mwparserfromhell")
    path = tmp_path / "a.xml"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.xml"):
        cut(path)


def test_sources_keep_their_documents_and_blocks_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n\n{name}2")
    blocks = cut(tmp_path / "a.txt", tmp_path / "b.txt")
    assert [(block.source, block.number) for block in blocks] == [(0, 0), (1, 1)]
    assert read(tmp_path / "a.txt", tmp_path / "b.txt") == [
        ("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2"),
    ]  # fmt: skip


def test_what_is_read_is_counted_and_hashed(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    (tmp_path / "books/b.txt").write_text("three")
    (tmp_path / "books/c.jpg").write_text("x")
    reading = Reading()
    inputs = find_inputs([str(tmp_path / "books")])
    assert len(list(read_documents(inputs, reading=reading))) == 3
    assert reading.sha256 == {0: hash_input(inputs[0])}
    assert reading.bytes == sum(file.size for file in inputs[0].files)
    assert reading.skipped == {"files that are not text": 1}


@pytest.mark.parametrize(
    "options", [{"documents": "page"}, {"column": ""}, {"block_bytes": 0}], ids=str
)
def test_formats_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        Format(**options)


def test_a_digest_tells_apart_all_that_parsing_tells_apart(tmp_path):
    def digest(name, data, **options):
        (tmp_path / name).write_bytes(data)
        (block,) = cut(tmp_path / name, **options)
        return block.digest

    record = b'{"a": "x", "b": "y"}'
    found = {
        digest("a.txt", b"one\n\ntwo"),
        digest("a.txt", b"one\n\ntwo", documents="file"),
        digest("a.txt", b"one\n\ntwo "),
        digest("a.jsonl", record, column="a"),
        digest("a.jsonl", record, column="b"),
        digest("a.txt", record),
    }
    assert len(found) == 6
    # A mark is one only where a file begins.
    (tmp_path / "b.txt").write_bytes(b"\n\n\xef\xbb\xbfx")
    marked = cut(tmp_path / "b.txt", block_bytes=1)
    assert [parse(block).texts for block in marked] == [["\ufeffx"]]
    assert marked[0].digest != digest("c.txt", b"\xef\xbb\xbfx")


PEAK = """
import resource, sys
from siftloader.corpus import Format, cut_blocks, parse
from siftloader.files import find_inputs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(block,) = cut_blocks(find_inputs([sys.argv[1]]), Format())
(text,) = parse(block).texts
print(len(text), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize(
    "megabytes", [8, pytest.param(100, marks=pytest.mark.slow)], ids=["8", "100"]
)
@pytest.mark.parametrize("shape", ["line", "document", "returns", "spaces", "csv", "quotes"])
def test_a_document_longer_than_a_block_takes_memory_and_time_in_proportion(
    tmp_path, megabytes, shape
):
    unit = {
        "line": b"no line ever ends ",
        "document": b"a line\nof many \n",
        "returns": b"\r",
        "spaces": b" ",
        "csv": b"a cell, with commas\nand lines ",
        "quotes": b'says ""yes"" ',
    }[shape]
    size = megabytes << 20
    table = shape in ("csv", "quotes")
    size -= size % len(unit) * table  # no half of a doubled quote
    path = tmp_path / ("long.csv" if table else "long.txt")
    data = b"x\n" + (unit * (size // len(unit) + 1))[:size] + b"x"
    path.write_bytes(b'id,text\n1,"' + data + b'"\n' if table else data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        capture_output=True, text=True, timeout=250, check=True,
    )  # fmt: skip
    length, peak = map(int, done.stdout.split())
    assert length == size + 3 - data.count(b'""')
    assert peak < 6 * megabytes + 64, f"{peak} MiB for a document of {megabytes}"


def test_a_large_file_is_never_held_whole(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"a document of\nsome lines\n\n" * (2 << 20))
    import tracemalloc

    tracemalloc.start()
    count = sum(1 for _ in cut_blocks(find_inputs([str(path)]), Format(block_bytes=1 << 20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 52
    assert peak < 8 << 20, f"{peak:,} bytes held"


DIGESTS = """
import sys
from siftloader.corpus import Format, cut_blocks, parse
from siftloader.files import find_inputs
for block in cut_blocks(find_inputs([sys.argv[1]]), Format(block_bytes=1)):
    print(block.digest, ascii(parse(block).texts))
"""


def test_blocks_depend_on_no_locale_and_no_hash_seed(tmp_path):
    for name in ("é.txt", "b.txt", "Ünder/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"größe of {name}", "utf-8")
    printed = {
        subprocess.run(
            [sys.executable, "-c", DIGESTS, str(tmp_path)],
            env={**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for locale, seed in [("C", "1"), ("C.UTF-8", "2"), ("en_US.ISO-8859-1", "3")]
    }
    assert len(printed) == 1
    assert printed.pop().count(b"gr\\xf6\\xdfe of") == 3
