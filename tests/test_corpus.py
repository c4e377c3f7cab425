"""Text comes back as it was written, or the error says where it went wrong."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import lzma
import os
from pathlib import Path

import pytest
from effort import examples
from hypothesis import given, strategies as st

from siftloader.corpus import Reading, find_inputs, hash_input, read_documents
from siftloader.errors import CorpusError


COMPRESS = {
    ".txt": bytes,
    ".txt.gz": lambda data: gzip.compress(data, mtime=0),
    ".txt.bz2": bz2.compress,
    ".txt.xz": lzma.compress,
}

# Lines that hold something, no line ends, no NUL, nothing UTF-8 cannot say.
words = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0\n\r\ufeff"), min_size=1
)
lines = words.filter(lambda line: line.strip() == line)
texts = st.lists(lines, min_size=1, max_size=4).map("\n".join)


def read(*arguments: object, boundary: str = "blank-line", reading: Reading | None = None):
    inputs = find_inputs(str(argument) for argument in arguments)
    return [
        (inputs[document.source].name, document.text)
        for document in read_documents(inputs, boundary, reading)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@examples(150)
@given(
    documents=st.lists(texts, min_size=1, max_size=5),
    blanks=st.lists(st.sampled_from(["", " ", "\t \t"]), min_size=1, max_size=3),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last=st.booleans(),
    suffix=st.sampled_from(sorted(COMPRESS)),
)
def test_documents_come_back_whatever_the_file_is_made_of(
    folder, documents, blanks, end, bom, last, suffix
):
    """Line ends, marks, blank lines and compression are the file's business, not the text's."""
    between = "\n" + "".join(blank + "\n" for blank in blanks)
    text = between.join(documents) + "\n" * last
    data = b"\xef\xbb\xbf" * bom + text.replace("\n", end).encode()
    path = folder / f"law{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    assert read(path) == [("law", document) for document in documents]


@examples(80)
@given(cut=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from(sorted(COMPRESS)[1:]))
def test_a_compressed_file_cut_anywhere_is_refused(folder, cut, suffix):
    data = COMPRESS[suffix]("\n\n".join(f"document {n}" for n in range(200)).encode())
    path = folder / f"cut{suffix}"
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    with pytest.raises(CorpusError, match=r"damaged or cut short|cannot be read") as caught:
        read(path)
    assert str(path) in str(caught.value)


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
        (b"  indented\n    more  \n", "blank-line", ["indented\n    more"]),
        ("mid\ufeffdle".encode(), "blank-line", ["mid\ufeffdle"]),
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
        ("utf-16".encode("utf-16"), r"line 1, byte 3: a NUL byte.*UTF-16"),
        (b"one\n\ntwo\0three\n", r"line 3, byte 8: a NUL byte"),
        (b"cut in a letter \xc3", r"line 1, byte 16: not UTF-8 \(unexpected end"),
    ],
)
def test_bad_bytes_are_named_by_file_line_and_byte(tmp_path, data, where):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=where) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """books/{emma,zoo/ape,Zed}.txt, news/{b,a}.txt.gz, one file of another kind; each its own text."""
    for name in ("books/emma.txt", "books/zoo/ape.txt", "books/Zed.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {path.name}")
    (tmp_path / "books/cover.jpg").write_bytes(b"\xff")
    (tmp_path / "news").mkdir()
    for name in ("b", "a"):
        (tmp_path / f"news/{name}.txt.gz").write_bytes(gzip.compress(f"text of {name}".encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["books/emma.txt"], {"emma": ["emma.txt"]}),
        (["books"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["books/"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["./books/../books"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["books/*.txt"], {"books": ["Zed.txt", "emma.txt"]}),
        (["books/**/*.txt"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["news/*"], {"news": ["a.txt.gz", "b.txt.gz"]}),
        (["n=news/a.txt.gz", "books/emma.txt"], {"n": ["a.txt.gz"], "emma": ["emma.txt"]}),
        (["x=news", "x=books/emma.txt"], {"x": ["a.txt.gz", "b.txt.gz", "emma.txt"]}),
    ],
)
def test_each_argument_is_a_source_with_sorted_files(library, arguments, expected):
    found = {source.name: [f.path.rpartition("/")[2] for f in source.files] for source in find_inputs(arguments)}
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input"),
        (["nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["books/*.md"], "no file matches"),
        (["books/cover.jpg"], "not a kind of file that can be read; readable are .txt"),
        (["books/*"], "not a kind of file that can be read"),
        (["books/emma.txt", "books"], "given twice"),
        (["a=books/emma.txt", "b=./books/emma.txt"], "given twice"),
        (["x=news", "books/../x.txt"], "second source named 'x'"),
        (["empty"], "no text among the 0 files"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(library, arguments, message):
    (library / "empty").mkdir()
    (library / "x.txt").write_text("x")
    with pytest.raises(CorpusError, match=message):
        find_inputs(arguments)


def test_more_sources_than_a_byte_can_number_are_refused_with_the_way_out(tmp_path):
    for number in range(257):
        (tmp_path / f"{number}.txt").write_text("x")
    every = [str(path) for path in sorted(tmp_path.iterdir())]
    assert len(find_inputs(every[:256])) == 256
    with pytest.raises(CorpusError, match=r"257 sources.*256 at most.*give their folder"):
        find_inputs(every)
    assert [len(source.files) for source in find_inputs([str(tmp_path)])] == [257]


def test_the_order_of_files_is_not_the_file_systems(library, monkeypatch):
    straight = find_inputs(["books", "news/*"])
    walk, matches = os.walk, glob.glob
    monkeypatch.setattr(
        os, "walk", lambda top: reversed([(a, b, c[::-1]) for a, b, c in walk(top)])
    )
    monkeypatch.setattr(glob, "glob", lambda *args, **kw: sorted(matches(*args, **kw))[::-1])
    assert find_inputs(["books", "news/*"]) == straight
    monkeypatch.setattr(glob, "glob", lambda *args, **kw: sorted(matches(*args, **kw)))
    assert find_inputs(["books", "news/*"]) == straight


def test_a_link_that_goes_round_is_not_followed(library):
    (library / "books/zoo/back").symlink_to(library / "books")
    assert len(find_inputs(["books"])[0].files) == 3


def test_a_source_is_hashed_as_sha256sum_would_and_again_while_it_is_read(library):
    reading = Reading()
    inputs = find_inputs(["news/a.txt.gz", "books"])
    assert len(list(read_documents(inputs, reading=reading))) == 4
    whole = hashlib.sha256(Path("news/a.txt.gz").read_bytes()).hexdigest()
    assert hash_input(inputs[0]) == whole == reading.sha256[0]
    assert hash_input(inputs[1]) == reading.sha256[1]
    assert reading.bytes == sum(f.size for each in inputs for f in each.files)
    assert reading.skipped == {"files that are not text": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(library):
    Path("books/emma.txt").chmod(0)
    with pytest.raises(CorpusError, match=r"emma\.txt: cannot be read"):
        read("books/emma.txt")
