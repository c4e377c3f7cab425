"""Every argument is found or refused, every file read whole or named."""

from __future__ import annotations

import glob
import gzip
import hashlib
import http.server
import lzma
import os
import pickle
import threading
from pathlib import Path

import pytest
from compressions import COMPRESS
from effort import examples
from hypothesis import given, strategies as st

from siftloader.corpus import Format, cut_blocks
from siftloader.errors import CorpusError
from siftloader.files import (
    Reading,
    check_unchanged,
    find_inputs,
    hash_input,
    kind_of,
    open_file,
    open_seekable,
)


COMPRESSED = sorted(COMPRESS)[1:]


def read(path: object) -> bytes:
    (source,) = find_inputs([str(path)])
    parts = []
    for file in source.files:
        with open_file(file) as stream:
            parts.append(stream.read())
    return b"".join(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@examples(100)
@given(
    members=st.lists(st.binary(max_size=3000), min_size=1, max_size=3),
    suffix=st.sampled_from(sorted(COMPRESS)),
    step=st.integers(1, 5000),
)
def test_what_was_compressed_comes_back_in_steps_of_any_size(folder, members, suffix, step):
    """Several compressed streams in one file are one file, as their tools have it."""
    path = folder / f"whole.txt{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](member) for member in members))
    (source,) = find_inputs([str(path)])
    reading = Reading()
    with open_file(source.files[0], reading) as stream:
        parts = list(iter(lambda: stream.read(step), b""))
    assert b"".join(parts) == b"".join(members)
    assert all(len(part) == step for part in parts[:-1])
    assert reading.bytes == path.stat().st_size
    assert (
        reading.hashes == [hash_input(source)] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    )


@examples(150)
@given(
    cut=st.floats(0, 1, exclude_max=True),
    suffix=st.sampled_from(COMPRESSED),
    copies=st.integers(1, 2),
    seekable=st.booleans(),
)
def test_a_compressed_file_cut_anywhere_is_refused(folder, cut, suffix, copies, seekable):
    one = COMPRESS[suffix]("\n\n".join(f"document {n}" for n in range(200)).encode())
    data = one * copies
    size = int(cut * len(data))
    if size == len(one):
        return  # between two streams nothing is missing
    path = folder / f"cut.txt{suffix}"
    path.write_bytes(data[:size])
    (source,) = find_inputs([str(path)])
    opened = open_seekable if seekable else open_file
    with (
        pytest.raises(CorpusError, match="damaged or cut short") as caught,
        opened(source.files[0]) as stream,
    ):
        stream.read()
    assert str(path) in str(caught.value)


@examples(100)
@given(
    garbage=st.binary(min_size=1, max_size=40).filter(lambda data: data.strip(b"\0")),
    suffix=st.sampled_from(COMPRESSED),
)
def test_what_follows_a_compressed_file_is_not_ignored(folder, garbage, suffix):
    path = folder / f"tail.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"text") + garbage)
    with pytest.raises(CorpusError, match=r"tail\.txt.*damaged or cut short"):
        read(path)


def test_xz_may_be_padded(tmp_path):
    path = tmp_path / "padded.txt.xz"
    path.write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4))
    assert read(path) == b"one two"


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_another_kind_of_file_under_this_name_is_refused(tmp_path, suffix):
    path = tmp_path / f"page.txt{suffix}"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(CorpusError, match=r"page\.txt.*damaged or cut short"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_small_file_that_unpacks_to_much_is_not_held_whole(tmp_path, suffix):
    path = tmp_path / f"zeros.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(64 << 20)))
    (source,) = find_inputs([str(path)])
    import tracemalloc

    tracemalloc.start()
    with open_file(source.files[0]) as stream:
        count = 0
        while chunk := stream.read(1 << 20):
            count += len(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 64 << 20
    assert peak < 16 << 20, f"{peak:,} bytes held"


@pytest.mark.parametrize("copied", ["", ".gz"], ids=["plain", "packed"])
def test_a_seekable_file_is_the_same_bytes_counted_once(tmp_path, copied):
    path = tmp_path / f"a.parquet{copied}"
    path.write_bytes(COMPRESS[copied](b"0123456789"))
    (source,) = find_inputs([str(path)])
    reading = Reading()
    with open_seekable(source.files[0], reading) as whole:
        whole.seek(4)
        assert whole.read(2) == b"45"
    assert reading.bytes == path.stat().st_size
    assert reading.hashes == [hash_input(source)]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.txt", ("txt", "")),
        ("A.TXT.GZ", ("txt", ".gz")),
        ("a.jsonl.zst", ("jsonl", ".zst")),
        ("a.ndjson", ("jsonl", "")),
        ("a.json", ("jsonl", "")),
        ("a.tgz", ("tar", ".gz")),
        ("a.tar.xz", ("tar", ".xz")),
        ("a.feather", ("arrow", "")),
        ("dump.xml-p1p30.bz2", None),
        ("dump.xml.bz2", ("wiki", ".bz2")),
        ("https://host/a.txt.gz?key=1.tar", ("txt", ".gz")),
        ("memory://a/b.csv", ("csv", "")),
        ("a.gz", None),
        ("txt", None),
        ("a.txt.gz.gz", None),
        ("folder.txt/a", None),
    ],
)
def test_the_suffix_says_what_a_file_is(path, kind):
    assert kind_of(path) == kind


@pytest.fixture
def library(tmp_path, monkeypatch):
    """books/{emma,zoo/ape,Zed}.txt, news/{b,a}.txt.gz, one of another kind; each its own text."""
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


def names(arguments):
    return {
        source.name: [file.path.rpartition("/")[2] for file in source.files]
        for source in find_inputs(arguments)
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["books/emma.txt"], {"emma": ["emma.txt"]}),
        (["books"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["books/"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["./books/../books"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["books/*.txt"], {"books": ["Zed.txt", "emma.txt"]}),
        (["books/**/*.txt"], {"books": ["Zed.txt", "emma.txt", "ape.txt"]}),
        (["**/*.txt"], None),
        (["books/zoo/**"], {"zoo": ["ape.txt"]}),
        (["*/zoo/*"], {"zoo": ["ape.txt"]}),
        (["news/*"], {"news": ["a.txt.gz", "b.txt.gz"]}),
        (["n=news/a.txt.gz", "books/emma.txt"], {"n": ["a.txt.gz"], "emma": ["emma.txt"]}),
        (["x=news", "x=books/emma.txt"], {"x": ["a.txt.gz", "b.txt.gz", "emma.txt"]}),
        (["news/a.txt.gz:3"], {"a": ["a.txt.gz"]}),
    ],
)
def test_each_argument_is_a_source_with_sorted_files(library, arguments, expected):
    found = names(arguments)
    if expected is None:  # named after wherever this is
        expected = {library.name: ["Zed.txt", "emma.txt", "ape.txt"]}
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input"),
        (["nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["books/*.md"], "no file matches"),
        (["books/**/*.md"], "no file matches"),
        (["books/cover.jpg"], "not a kind of file that can be read; readable are .txt"),
        (["books/*"], "not a kind of file that can be read"),
        (["books/emma.txt", "books"], "given twice"),
        (["a=books/emma.txt", "b=./books/emma.txt"], "given twice"),
        (["x=news", "books/../x.txt"], "second source named 'x'"),
        (["empty"], "no text among the 0 files"),
        (["pipe.txt"], "not a regular file"),
        (["lost.txt.d"], r"lost\.txt: cannot be read"),
        (["lost.txt.d/*.txt"], r"lost\.txt: cannot be read"),
        (["lost.txt.d/**/*.txt"], r"lost\.txt: cannot be read"),
        (["lost.txt.d/lost.txt"], r"lost\.txt: cannot be read"),
        (["pip?.txt"], r"pipe\.txt: not a regular file"),
        (["linked"], "no text among the 0 files of this folder, whose links .* not followed"),
        (["news:0"], "a weight of 0; it must be a positive number"),
        (["n=news:-1"], "a weight of -1"),
        (["n=news:nan"], "a weight of nan"),
        (["n=news:inf"], "a weight of inf"),
        (["n=news:2", "n=books:3"], "weight 2 already"),
        (["n=news:two"], "no such file or folder"),
        (["n=" + "x" * 5000], "no such file or folder"),
        (["what://ever/a.txt"], "this kind of URL cannot be opened"),
        (["memory:///lost/a.txt"], r"memory:///lost/a\.txt: cannot be fetched \(FileNotFound"),
        (["memory:///lost/*.txt"], "no file matches"),
        (["memory:///lost/a.doc"], "not a kind of file"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(library, arguments, message):
    (library / "empty").mkdir()
    (library / "x.txt").write_text("x")
    os.mkfifo(library / "pipe.txt")
    (library / "lost.txt.d").mkdir()
    (library / "lost.txt.d/lost.txt").symlink_to("nowhere")
    (library / "linked").mkdir()
    (library / "linked/books").symlink_to(library / "books")
    with pytest.raises(CorpusError, match=message):
        find_inputs(arguments)


@pytest.mark.parametrize(
    ("argument", "weight"),
    [
        ("news", 1.0),
        ("news:2", 2.0),
        ("n=news:0.5", 0.5),
        ("n=news:1e-3", 1e-3),
        ("news/*:3", 3.0),
        ("news/a.txt.gz:4", 4.0),
        ("odd:2", 1.0),
        ("odd:2:3", 3.0),
        ("n=odd:2", 1.0),
        ("memory://weighed.txt", 1.0),
        ("memory://weighed.txt:2", 2.0),
        ("w=memory:///weighed.txt:2", 2.0),
    ],
)
def test_a_number_after_the_last_colon_is_a_weight_unless_a_file_is_called_so(
    library, argument, weight
):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/weighed.txt", b"text")
    (library / "odd:2").mkdir()
    (library / "odd:2/a.txt").write_text("x")
    assert [source.weight for source in find_inputs([argument])] == [weight]


def test_one_weight_is_enough_for_a_source_in_parts(library):
    (source,) = find_inputs(["x=news", "x=books:2"])
    assert source.weight == 2
    assert len(source.files) == 5


def test_a_port_is_no_weight():
    pytest.importorskip("aiohttp")
    with pytest.raises(CorpusError, match=r"http://127\.0\.0\.1:9: not a kind of file"):
        find_inputs(["http://127.0.0.1:9"])


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


def test_files_are_sorted_by_the_bytes_of_their_paths(tmp_path):
    written = [b"\xff.txt", "\U0001f600.txt".encode(), b"a-b.txt", b"a.txt", b"a/b.txt", b"B.txt"]
    for name in written:
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (source,) = find_inputs([str(tmp_path)])
    found = [os.fsencode(os.path.relpath(file.path, tmp_path)) for file in source.files]
    assert found == sorted(written)


def test_hidden_files_and_folders_are_passed_over(library):
    (library / "books/.git").mkdir()
    (library / "books/.git/log.txt").write_text("x")
    (library / "books/.hidden.txt").write_text("x")
    assert names(["books"]) == {"books": ["Zed.txt", "emma.txt", "ape.txt"]}
    assert names(["books/**/*.txt"]) == {"books": ["Zed.txt", "emma.txt", "ape.txt"]}
    assert find_inputs(["books"])[0].ignored == 1


@pytest.mark.parametrize("argument", ["books", "books/**/*.txt"], ids=["folder", "glob"])
def test_a_link_that_goes_round_is_not_followed_but_counted(library, argument):
    (library / "books/zoo/back").symlink_to(library / "books")
    (library / "books/news").symlink_to(library / "news")
    (library / "books/.hidden").symlink_to(library / "news")
    (source,) = find_inputs([argument])
    assert len(source.files) == 3
    assert source.passed == 2
    (source,) = find_inputs(["books/news"])  # given by itself
    assert len(source.files) == 2


def test_folders_that_a_glob_matches_are_counted(library):
    (library / "books/cover.jpg").unlink()
    (library / "books/news").symlink_to(library / "news")
    (source,) = find_inputs(["books/*"])
    assert names(["books/*"]) == {"books": ["Zed.txt", "emma.txt"]}
    assert source.passed == 2
    reading = Reading()
    assert len(list(cut_blocks([source], Format(), reading))) == 1
    assert reading.skipped == {"folders not entered (links, or matched by a glob)": 2}


def test_a_file_that_is_found_twice_is_named_by_both_paths(library):
    (library / "books/Emma.txt").symlink_to("emma.txt")
    with pytest.raises(CorpusError, match=r"books/emma\.txt: given twice; .* as books/Emma\.txt "):
        find_inputs(["books"])


def test_a_source_of_many_files_is_hashed_by_the_hashes_of_its_files(library):
    one, many = find_inputs(["news/a.txt.gz", "books"])
    assert hash_input(one) == hashlib.sha256(Path("news/a.txt.gz").read_bytes()).hexdigest()
    each = [hashlib.sha256(Path(file.path).read_bytes()).hexdigest() for file in many.files]
    lines = "".join(f"{digest}\n" for digest in each)
    assert hash_input(many) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("longer than it was"),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.unlink(),
    ],
    ids=["bytes", "time", "gone"],
)
def test_a_file_that_changed_since_it_was_found_is_named(library, change):
    inputs = find_inputs(["books", "news"])
    check_unchanged(inputs)
    change(Path("books/emma.txt"))
    with pytest.raises(CorpusError, match=r"emma\.txt: (changed while it was read|cannot be)"):
        check_unchanged(inputs)


@pytest.mark.parametrize("text", ["longer than before", "short"])
def test_a_file_that_is_not_as_long_as_it_was_found_is_refused_where_it_ends(library, text):
    inputs = find_inputs(["books/emma.txt"])
    Path("books/emma.txt").write_text(text)
    message = r"emma\.txt: \d+ bytes came, but it has 16"
    with (
        pytest.raises(CorpusError, match=message),
        open_file(inputs[0].files[0]) as stream,
    ):
        stream.read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(library):
    Path("books/emma.txt").chmod(0)
    with pytest.raises(CorpusError, match=r"emma\.txt: cannot be read"):
        read("books/emma.txt")


def test_a_folder_that_stands_where_a_file_was_found_is_named(library):
    inputs = find_inputs(["books/emma.txt"])
    Path("books/emma.txt").unlink()
    Path("books/emma.txt").mkdir()
    with pytest.raises(CorpusError, match=r"emma\.txt: cannot be read"):
        hash_input(inputs[0])


def test_what_is_found_travels_to_other_processes(library):
    inputs = find_inputs(["books:2", "news"])
    assert pickle.loads(pickle.dumps(inputs)) == inputs


def test_another_file_system_lists_matches_and_reads(library):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("b.txt", "a.txt.gz", "deep/c.txt", "cover.jpg", ".hidden.txt", ".git/d.txt"):
        memory.pipe(f"/shelf/{name}", gzip.compress(b"packed") if "gz" in name else name.encode())
    try:
        assert names(["memory:///shelf"]) == {"shelf": ["a.txt.gz", "b.txt", "c.txt"]}
        assert names(["memory:///shelf/*.txt"]) == {"shelf": ["b.txt"]}
        assert names(["memory:///shelf/**/*.txt"]) == {"shelf": ["b.txt", "c.txt"]}
        assert names(["memory:///shelf/.git/*"]) == {".git": ["d.txt"]}
        assert read("memory:///shelf") == b"packedb.txtdeep/c.txt"
        (source,) = inputs = find_inputs(["s=memory:///shelf:2"])
        assert (source.weight, source.ignored) == (2, 3)
        check_unchanged(inputs)
        memory.pipe("/shelf/b.txt", b"B.TXT")
        with pytest.raises(CorpusError, match=r"shelf/b\.txt: changed while it was read"):
            check_unchanged(inputs)
    finally:
        memory.rm("/shelf", recursive=True)


TEXT = b"".join(b"line %d of the text\n" % number for number in range(30_000))


PAGES = {
    "/shelf/": ["../", "sub/", "a.txt", "about.json", "cover.jpg"],
    "/shelf/sub/": ["../", "b.txt"],
    "/broken/": ["a.txt", "lost/"],
}


class Library(http.server.BaseHTTPRequestHandler):
    """What the web may do: the path says how the answer goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        page = self.path.partition("?")[0]
        if page in PAGES:
            self.page("".join(f'<a href="{name}">x</a>' for name in PAGES[page]).encode(), body)
            return
        parts = page.strip("/").split("/")
        how, name = parts[0], parts[-1]
        data = COMPRESS[".gz"](TEXT) if name.endswith(".gz") else TEXT
        sent = data[: len(data) // 2] if how.startswith("cut") else data
        self.close_connection = True
        if "lost" in parts:
            self.send_error(404)
            return
        if how == "busy":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.send_header("ETag", f'"{self.server.edition}"')
        if how.endswith("sized") or how in ("shelf", "broken"):
            self.send_header("Content-Length", str(len(data)))
        elif how.endswith("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if body and how.endswith("chunked"):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(sent), sent))
            if how == "chunked":
                self.wfile.write(b"0\r\n\r\n")
        elif body:
            self.wfile.write(sent)

    def page(self, data, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Library)
    server.edition = 1
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(web, path):
    return f"http://127.0.0.1:{web.server_port}/{path}"


@pytest.mark.parametrize(
    "path",
    ["sized/a.txt", "sized/a.txt.gz", "chunked/a.txt.gz", "plain/a.txt.gz", "sized/a.txt?k=v"],
)
def test_what_the_web_gives_whole_is_read(web, path):
    assert read(url(web, path)) == TEXT
    (source,) = find_inputs([f"w={url(web, path)}:2"])
    assert (source.name, source.weight) == ("w", 2)
    with open_seekable(source.files[0]) as whole:
        assert whole.read() == TEXT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lost/a.txt", "cannot be fetched.*404"),
        ("busy/a.txt", "cannot be fetched.*503"),
        ("cut-sized/a.txt", "cannot be fetched|bytes came"),
        ("cut-sized/a.txt.gz", "cannot be fetched|bytes came|cut short"),
        ("cut-chunked/a.txt", "does not say how long"),
        ("cut-chunked/a.txt.gz", "cannot be fetched|cut short"),
        ("cut-plain/a.txt.gz", "cut short"),
        ("cut-plain/a.txt", "does not say how long"),
        ("plain/a.jsonl", "does not say how long"),
        ("plain/a.csv", "does not say how long"),
    ],
)
def test_what_the_web_does_not_give_whole_is_never_taken_for_it(web, path, message):
    """Where a connection may close at any byte, only a format that knows its own end is read."""
    with pytest.raises(CorpusError, match=message) as caught:
        read(url(web, path))
    assert url(web, path) in str(caught.value)


def test_a_server_that_is_not_there_is_named():
    pytest.importorskip("aiohttp")
    for path in ("a.txt", "", "folder/", "folder/*.txt", "*/a.txt"):
        address = f"http://127.0.0.1:9/{path}"
        with pytest.raises(CorpusError) as caught:
            find_inputs([address])
        assert str(caught.value).startswith(f"{address}: cannot be fetched (")
        assert "Cannot connect to host" in str(caught.value)


def test_a_folder_of_the_web_is_listed_or_says_what_failed(web):
    (source,) = find_inputs([url(web, "shelf/")])
    assert [file.path.rpartition("/shelf/")[2] for file in source.files] == ["a.txt", "sub/b.txt"]
    assert source.ignored == 2  # about.json, cover.jpg
    (source,) = find_inputs([url(web, "shelf/*.txt")])
    assert [file.path for file in source.files] == [url(web, "shelf/a.txt")]
    with pytest.raises(CorpusError, match=r"shelf: not a kind of file .* end it with '/'"):
        find_inputs([url(web, "shelf")])
    with pytest.raises(CorpusError, match=r"cannot be fetched \(FileNotFoundError"):
        find_inputs([url(web, "broken/")])  # in a folder of it
    with pytest.raises(CorpusError, match=r"cannot be fetched \(FileNotFoundError"):
        find_inputs([url(web, "lost/*.txt")])
    with pytest.raises(CorpusError, match=r"cannot be fetched .*503"):
        find_inputs([url(web, "busy/*.txt")])


def test_a_page_that_changed_since_it_was_found_is_named(web):
    inputs = find_inputs([url(web, "sized/a.txt")])
    check_unchanged(inputs)
    web.edition += 1
    with pytest.raises(CorpusError, match="changed while it was read"):
        check_unchanged(inputs)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("far", [False, True], ids=["here", "url"])
def test_a_json_beside_other_text_in_a_folder_is_not_text(tmp_path, suffix, far):
    if far:
        pytest.importorskip("fsspec")
    top = f"file://{tmp_path}" if far else str(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / f"deep/about.JSON{suffix}").write_text("{}")

    def found(argument):
        (source,) = find_inputs([argument])
        return [Path(file.path).name for file in source.files], source.ignored

    assert found(top) == (["a.txt"], 1)
    assert found(f"{top}/deep/*.JSON{suffix}") == ([f"about.JSON{suffix}"], 0)
    assert found(f"{top}/deep/about.JSON{suffix}") == ([f"about.JSON{suffix}"], 0)
    (tmp_path / "a.txt").unlink()
    assert found(top) == ([f"about.JSON{suffix}"], 0)
