"""A shard is the tar everybody writes, an array, and never read wrong."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import subprocess
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from effort import examples
from hypothesis import given, strategies as st

from siftloader.errors import CorruptShard, ShardError
from siftloader.shards import (
    Layout,
    Shard,
    ShardSet,
    Source,
    Tokenizer,
    check_samples,
    encode,
    sha256,
    single_byte,
    verify,
    write_dataset,
    write_shard,
)


VOCAB = 60


def whole(stem: str, ids: np.ndarray, layout: Layout, labels: np.ndarray | None = None) -> bytes:
    """All bytes of a shard."""
    return b"".join(encode(stem, ids, layout, labels))


def labels_of(ids: np.ndarray) -> np.ndarray:
    """Labels that tell their rows apart as well as one bit can."""
    return np.asarray(ids).sum(axis=1) % 2


def write_set(
    folder: Path, ids: dict[str, np.ndarray], seq_len: int = 5, labels: bool = False
) -> None:
    """A finished set with the given shards, two sources taking turns."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(seq_len, labels=labels)
    shards = [
        write_shard(
            folder,
            stem,
            rows,
            (np.arange(len(rows)) % 2).astype(np.uint8),
            layout,
            labels_of(rows) if labels else None,
        )
        for stem, rows in ids.items()
    ]
    train = np.concatenate([rows.ravel() for stem, rows in ids.items() if stem[0] == "t"])
    write_dataset(
        folder,
        shards,
        layout=layout,
        objective="mlm-nsp" if labels else "mlm",
        tokenizer=Tokenizer("tiny", "0" * 64, VOCAB, {"pad": 0, "mask": 4}),
        sources=[Source("a", "1" * 64, 3), Source("b", "2" * 64, 4)],
        unigrams=np.bincount(train, minlength=VOCAB).astype(np.int64),
        seed=7,
    )


def some_ids(rows: int, seed: int, seq_len: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, seq_len))


def everything(folder: Path) -> tuple:
    """All that can be read from a set, as plain values."""
    dataset = ShardSet.open(folder)
    return (
        dataset.layout,
        dataset.objective,
        dataset.tokenizer,
        dataset.sources,
        dataset.seed,
        dataset.fingerprint,
        dataset.unigrams.tolist(),
        [
            (
                shard,
                dataset.read(shard).tolist(),
                dataset.layout.labels and dataset.read_labels(shard).tolist(),
                dataset.read_sources(shard).tolist(),
            )
            for shard in dataset.manifest
        ],
    )


SETS = ("tokens", "pairs")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same ids with and without labels, by name."""
    made = {}
    for name in SETS:
        made[name] = tmp_path_factory.mktemp("shards") / name
        ids = {"train-000000": (3, 0), "train-000001": (2, 1), "val-000000": (1, 2)}
        rows = {stem: some_ids(*arguments) for stem, arguments in ids.items()}
        write_set(made[name], rows, labels=name == "pairs")
    return made


@pytest.fixture(scope="module", params=SETS)
def finished(sets, request):
    return sets[request.param]


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def ustar(name: str, content: bytes, crc: int | None = None) -> bytes:
    """A member as the standard library writes it, with a CRC-32 in devmajor and devminor."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o444, 0
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if crc is not None:
        header[329:345] = b"%07o\0%07o\0" % (crc >> 16, crc & 0xFFFF)
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    return bytes(header) + content + bytes(-len(content) % 512)


@examples(60)
@given(data=st.data(), dtype=st.sampled_from(["<u2", "<u4"]), labelled=st.booleans())
def test_a_shard_is_byte_for_byte_what_tarfile_writes(data, dtype, labelled):
    """Members of USTAR with mtime 0, as the standard library and numpy would make them."""
    shape = data.draw(st.tuples(st.integers(0, 12), st.integers(1, 400)))
    seed = data.draw(st.integers(0, 9))
    ids = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True)
    labels = labels_of(ids) if labelled else None
    theirs = b""
    for number, row in enumerate(ids):
        key, member = f"train-000003-{number:06d}", io.BytesIO()
        np.save(member, row.astype(dtype))
        label = b"" if labels is None else b"%d" % labels[number]
        crc = zlib.crc32(row.astype(dtype).tobytes() + label)
        theirs += ustar(f"{key}.input_ids.npy", member.getvalue(), crc)
        theirs += ustar(f"{key}.cls", label) if label else b""
    layout = Layout(shape[1], dtype, labelled)
    assert whole("train-000003", ids, layout, labels) == theirs + bytes(1024)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the file open
@pytest.mark.parametrize("labelled", [False, True], ids=SETS)
@pytest.mark.parametrize(("dtype", "seq_len"), [("<u2", 128), ("<u2", 512), ("<u4", 33)])
def test_webdataset_tar_tarfile_and_the_view_read_alike(tmp_path, dtype, seq_len, labelled):
    layout = Layout(seq_len, dtype, labelled)
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, seq_len), endpoint=True)
    labels = labels_of(ids) if labelled else None
    data = whole("val-000000", ids, layout, labels)
    path = tmp_path / "val-000000.tar"
    path.write_bytes(data)

    stock = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in stock] == [f"val-000000-{n:06d}" for n in range(30)]
    assert np.array_equal([sample["input_ids.npy"] for sample in stock], ids)
    assert stock[0]["input_ids.npy"].dtype == dtype
    if labels is not None:
        assert [sample["cls"] for sample in stock] == labels.tolist()
        assert type(stock[0]["cls"]) is int

    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert all(member.isreg() and member.mode == 0o444 for member in members)
        arrays = [member for member in members if member.name.endswith(".npy")]
        assert [
            np.load(io.BytesIO(tar.extractfile(m).read())).tolist() for m in arrays
        ] == ids.tolist()

    plain = np.frombuffer(data[:-1024], np.uint8).reshape(-1, layout.stride)
    view = plain[:, layout.offset : layout.offset + layout.payload].copy().view(dtype)
    assert np.array_equal(view, ids)


@pytest.mark.skipif(shutil.which("tar") is None, reason="lists a shard with tar; install tar")
def test_tar_lists_plain_files(sets):
    """The CRC lies in the fields for device numbers, which mean nothing here."""
    path = sets["pairs"] / "train-000001.tar"
    done = subprocess.run(["tar", "-tvf", path], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.stderr == ""
    assert {line[0] for line in lines} == {"-r--r--r--"}
    assert [(line[2], line[-1].partition(".")[2]) for line in lines] == [
        ("138", "input_ids.npy"),
        ("1", "cls"),
    ] * 2


@pytest.mark.parametrize(
    ("seq_len", "dtype", "stride"),
    [
        (1, "<u2", 1024),
        (128, "<u2", 1024),
        (192, "<u2", 1024),  # 128 + 384 fills a block to the byte
        (193, "<u2", 1536),
        (512, "<u2", 2048),
        (512, "<u4", 3072),
        (1024, "<u2", 3072),
        (2048, "<u4", 9216),
    ],
)
def test_stride_by_hand(seq_len, dtype, stride):
    ids = np.zeros((3, seq_len), int)
    for labels in (None, np.zeros(3)):
        layout = Layout(seq_len, dtype, labels is not None)
        assert layout.stride == (stride if labels is None else stride + 1024)
        assert layout.size(3) == 3 * layout.stride + 1024
        assert len(whole("train-000000", ids, layout, labels)) == layout.size(3)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the file open
def test_the_format_on_one_screen_is_the_format():
    """The strides in the drawing, the fields that hold the CRC, and the blocks of code, one by one."""
    screen = Path("shards/README.md").read_text()
    drawn = [
        [int(cell.replace(",", "")) for cell in match.groups()]
        for match in re.finditer(r" {6,}(\d,\d{3}) {4}(\d,\d{3})$", screen, flags=re.MULTILINE)
    ]
    kinds = [("<u2", False), ("<u4", False), ("<u2", True), ("<u4", True)]
    assert drawn == [[Layout(n, *kind).stride for n in (128, 512)] for kind in kinds]
    read = []
    for block in re.findall(r"```python\n(.*?)```", screen, flags=re.DOTALL):
        names: dict[str, np.ndarray] = {}
        exec(compile(block, "shards/README.md", "exec"), names)
        read.append(names["ids"])
    by_numpy, by_webdataset, by_us = read
    assert np.array_equal(by_numpy, by_us)
    assert np.array_equal(by_webdataset, by_us[0])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (250_000, "<u4")]
)
def test_two_bytes_a_token_as_long_as_they_suffice(vocab_size, dtype):
    assert Layout.for_vocabulary(8, vocab_size).dtype == dtype


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        ([[0, 65_536]], "<u2", r"0\.\.65535 for dtype <u2, got 0\.\.65536"),
        ([[-1, 0]], "<u2", r"got -1\.\.0"),
        ([[0, 1 << 32]], "<u4", r"0\.\.4294967295"),
        ([[0, 1, 2]], "<u2", r"shape \[N, 2\], got \(1, 3\)"),
        ([0, 1], "<u2", r"shape \[N, 2\]"),
    ],
)
def test_ids_that_do_not_fit_are_an_error_never_a_cast(ids, dtype, message):
    with pytest.raises(ValueError, match=message):
        encode("train-000000", np.array(ids), Layout(2, dtype))


@pytest.mark.parametrize(
    ("labels", "has", "message"),
    [
        (None, True, r"one label, 0 or 1, per sample \(2\), got none"),
        ([1], True, r"got an array of shape \(1,\)"),
        ([0, 2], True, "labels must be 0 or 1, got 2 for sample 1"),
        ([0, -1], True, "got -1 for sample 1"),
        ([0, 1], False, r"no labels; use Layout\(..., labels=True\)"),
    ],
    ids=["none", "few", "two", "negative", "unasked"],
)
def test_labels_are_one_bit_a_sample_where_the_layout_has_them(tmp_path, labels, has, message):
    labels = None if labels is None else np.array(labels)
    with pytest.raises(ValueError, match=message):
        write_shard(
            tmp_path,
            "train-000000",
            np.zeros((2, 5), int),
            np.zeros(2, np.uint8),
            Layout(5, labels=has),
            labels,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp", "clm"])
def test_an_objective_has_labels_or_has_not(tmp_path, objective):
    with pytest.raises(ValueError, match=f"objective '{objective}' (has no|needs) labels; use"):
        write_dataset(
            tmp_path,
            [],
            layout=Layout(5, labels=objective != "mlm-nsp"),
            objective=objective,
            tokenizer=Tokenizer("tiny", "0" * 64, VOCAB),
            sources=[],
            unigrams=np.zeros(VOCAB, np.int64),
            seed=0,
        )


def test_labels_are_read_as_they_were_written(sets):
    dataset = ShardSet.open(sets["pairs"])
    assert json.loads((sets["pairs"] / "dataset.json").read_text())["schema"]["fields"]["cls"]
    for shard in dataset.manifest:
        labels = dataset.read_labels(shard)
        assert labels.dtype == np.uint8
        assert labels.tolist() == labels_of(dataset.read(shard)).tolist()
    with pytest.raises(ShardError, match=r'objective \'mlm\' has no labels.*"mlm-nsp"'):
        plain = ShardSet.open(sets["tokens"])
        plain.read_labels(plain.manifest[0])


@pytest.mark.parametrize("arguments", [(0,), (5, ">u2"), (5, "<i8")])
def test_a_layout_checks_itself(arguments):
    with pytest.raises(ValueError, match="must be"):
        Layout(*arguments)


def test_what_is_written_is_what_is_read(finished):
    dataset = ShardSet.open(finished)
    first, second = dataset.shards("train")
    assert np.array_equal(dataset.read(first), some_ids(3, 0))
    assert np.array_equal(dataset.read(second), some_ids(2, 1))
    assert not dataset.read(first).flags.writeable
    assert dataset.read_sources(first).tolist() == [0, 1, 0]
    assert (dataset.first_id("train"), dataset.first_id("val")) == (0, 5)
    assert dataset.unigrams.sum() == 5 * 5
    assert [shard.num_sequences for shard in verify(finished)] == [3, 2, 1]


def test_a_moved_set_is_the_same_set(finished, tmp_path):
    elsewhere = shutil.copytree(finished, tmp_path / "under" / "another name")
    assert ShardSet.open(elsewhere).fingerprint == ShardSet.open(finished).fingerprint
    assert everything(elsewhere) == everything(finished)


def damages(size: int):
    """Ways to change a file of ``size`` bytes; each is a function of its bytes."""
    at = st.integers(0, size - 1)
    flip = st.tuples(at, st.integers(1, 255)).map(
        lambda where: (
            lambda data: (
                data[: where[0]] + bytes([data[where[0]] ^ where[1]]) + data[where[0] + 1 :]
            )
        )
    )
    cut = at.map(lambda end: lambda data: data[:end])
    more = st.binary(min_size=1, max_size=600).map(lambda tail: lambda data: data + tail)
    hole = st.tuples(at, at).map(
        lambda ends: (
            lambda data: data[: min(ends)] + bytes(max(ends) - min(ends)) + data[max(ends) :]
        )
    )
    lost = st.tuples(at, st.integers(1, 600)).map(
        lambda where: lambda data: data[: where[0]] + data[sum(where) :]
    )
    return st.one_of(flip, flip, flip, cut, more, hole, lost)


@examples(150, large=600)
@given(data=st.data())
def test_damage_anywhere_is_found_before_a_wrong_sample_is_read(finished, data):
    """Law 8. In the JSON files a change of form, white space say, may pass: it means the same."""
    whole = everything(finished)
    path = data.draw(st.sampled_from(sorted(finished.iterdir())), label="file")
    before = path.read_bytes()
    after = data.draw(damages(len(before)), label="damage")(before)
    try:
        path.unlink()  # a new file: pages of the old one may still be mapped
        path.write_bytes(after)
        if after == before:
            assert everything(finished) == whole
        elif path.suffix in (".json", ".jsonl"):
            with suppress(ShardError):
                assert everything(finished) == whole
        else:
            with pytest.raises(ShardError):
                everything(finished)
    finally:
        path.unlink()
        path.write_bytes(before)


def changed(data: bytes, at: int, xor: int) -> bytes:
    return data[:at] + bytes([data[at] ^ xor]) + data[at + 1 :]


def complaint(folder: Path) -> ShardError | None:
    """What reading and verifying a folder raises."""
    try:
        everything(folder)
        list(verify(folder))
    except ShardError as error:
        return error
    return None


@examples(120, large=400)
@given(data=st.data(), xor=st.integers(1, 255), by_verify=st.booleans())
def test_a_changed_byte_is_named(finished, data, xor, by_verify):
    """In a tar: sample, byte, what was written and what is found. In any other file: the file."""
    path = data.draw(st.sampled_from(sorted(finished.iterdir())), label="file")
    before, whole = path.read_bytes(), everything(finished)
    stride = ShardSet.open(finished).layout.stride
    at = data.draw(st.integers(0, len(before) - 1), label="byte")
    read = (lambda folder: list(verify(folder))) if by_verify else everything
    try:
        path.unlink()  # a new file: pages of the old one may still be mapped
        path.write_bytes(changed(before, at, xor))
        if path.suffix in (".json", ".jsonl") and complaint(finished) is None:
            assert everything(finished) == whole
            return
        with pytest.raises(ShardError) as caught:
            read(finished)
    finally:
        path.unlink()
        path.write_bytes(before)
    error = caught.value
    assert path.name in str(error)
    if path.suffix == ".tar":
        sample = at // stride if at < len(before) - 1024 else None
        assert (error.shard, error.sample, error.byte) == (path.stem, sample, at)
        assert str(error).startswith(
            f"{path.stem}: byte {at} of"
            if sample is None
            else f"{path.stem}: sample {sample}, byte {at} of"
        )
        assert f"{before[at] ^ xor:#04x}" in str(error)
        assert f"{before[at]:#04x} was written" in str(error)


@pytest.mark.parametrize("length", [1, 2, 257, 1_024, 8_193, 32_769])
def test_every_single_byte_has_a_crc_of_its_own(length):
    """So naming a byte by its CRC is never a guess, up to 16,384 tokens of two bytes and a label.

    What two errors do to a CRC moves with them, so one of the two may stand at the last byte.
    """
    table = np.array([zlib.crc32(bytes([byte])) for byte in range(256)], np.uint32)
    table ^= np.uint32(zlib.crc32(b"\0"))
    last = further = table[1:]
    assert len(np.unique(last)) == 255
    for _ in range(length - 1):
        further = table[further & 255] ^ (further >> 8)
        assert not np.isin(further, last).any()


@given(
    data=st.binary(min_size=1, max_size=3_000), at=st.integers(0, 2_999), xor=st.integers(1, 255)
)
def test_a_single_byte_is_found_by_its_crc_alone(data, at, xor):
    at %= len(data)
    difference = zlib.crc32(data) ^ zlib.crc32(changed(data, at, xor))
    assert single_byte(len(data), difference) == (at, xor)
    assert single_byte(len(data) - at - 1, difference) is None, "too short to hold it"


@examples(70, large=200)
@given(data=st.data(), written=st.binary(min_size=1, max_size=2_500), hole=st.booleans())
def test_damage_of_many_bytes_is_named_by_its_first_sample_and_a_range(
    finished, data, written, hole
):
    path = finished / "train-000000.tar"
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1), label="from byte")
    written = (bytes(len(written)) if hole else written)[: len(before) - at]
    after = before[:at] + written + before[at + len(written) :]
    first = next(
        (n for n, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]), None
    )
    try:
        path.unlink()
        path.write_bytes(after)
        error = complaint(finished)
    finally:
        path.unlink()
        path.write_bytes(before)
    if first is None:
        assert error is None
        return
    assert isinstance(error, CorruptShard)
    stride = ShardSet.open(finished).layout.stride
    assert error.sample == (first // stride if first < len(before) - 1024 else None)
    named = re.search(r"bytes (\d+)\.\.(\d+) of train-000000\.tar", str(error))
    low, high = map(int, named.groups()) if named else (error.byte, error.byte)
    assert error.byte == low <= first <= high < (first // stride + 1) * stride


@examples(60, large=100)
@given(data=st.data())
def test_a_shard_of_another_length_is_named_with_where_it_ends(finished, data):
    path = finished / "train-000000.tar"
    before, stride = path.read_bytes(), ShardSet.open(finished).layout.stride
    size = data.draw(st.integers(0, len(before) + 2_000).filter(lambda n: n != len(before)))
    try:
        path.unlink()
        path.write_bytes((before + bytes(2_000))[:size])
        error = complaint(finished)
    finally:
        path.unlink()
        path.write_bytes(before)
    assert isinstance(error, CorruptShard)
    assert f"{size} bytes on disk, {len(before)} in the manifest" in str(error)
    assert (error.shard, error.byte) == ("train-000000", min(size, len(before)))
    assert error.sample == (size // stride if size < len(before) - 1024 else None)


def test_shards_that_changed_places_are_told_by_their_names(tmp_path):
    write_set(tmp_path, {f"train-{n:06d}": some_ids(3, n) for n in range(2)})
    one, other = (tmp_path / f"train-{n:06d}.tar" for n in range(2))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(
        CorruptShard, match=r"train-000000: sample 0, .*'train-000001-000000.input"
    ):
        list(verify(tmp_path))


def swapped(data: bytes, one: int, other: int, stride: int) -> bytes:
    rows = [data[at : at + stride] for at in range(0, len(data) - 1024, stride)]
    rows[one], rows[other] = rows[other], rows[one]
    return b"".join(rows) + bytes(1024)


@pytest.mark.parametrize("sealed", [False, True], ids=["tar", "tar and manifest"])
def test_samples_that_changed_places_are_samples_of_the_same_shard(finished, tmp_path, sealed):
    """Also where whoever sorted them wrote the manifest anew."""
    rows = {"train-000000": some_ids(4, 0)}
    dataset = ShardSet.open(finished)
    write_set(tmp_path, rows, labels=dataset.layout.labels)
    path, stride = tmp_path / "train-000000.tar", dataset.layout.stride
    data = swapped(path.read_bytes(), 1, 3, stride)
    path.unlink()
    path.write_bytes(data)
    if sealed:
        reseal(tmp_path, sha256=sha256(data))
    with pytest.raises(CorruptShard) as caught:
        list(verify(tmp_path))
    assert (caught.value.shard, caught.value.sample) == ("train-000000", 1)
    assert (
        "found 'train-000000-000003.input_ids.npy', so this is another sample of the same"
        in str(caught.value)
    )
    assert "another shard" not in str(caught.value)


def reseal(folder: Path, **changes: object) -> None:
    """Change the first line of the manifest, and make what is said about it fit."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines[0] |= changes
    about = json.loads((folder / "dataset.json").read_text())
    keys = ("shard", "num_sequences", "sha256", "sources_sha256")
    content = {
        "schema": about["schema"],
        "shards": [[line[key] for key in keys] for line in lines],
    }
    about["fingerprint"] = sha256((json.dumps(content) + "\n").encode())
    rest = {key: value for key, value in about.items() if key != "sha256"}
    about["sha256"] = sha256(json.dumps(rest, sort_keys=True).encode())
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "dataset.json").write_text(json.dumps(about))


def without_checksums(data: bytes, stride: int, blank: bytes) -> bytes:
    """The shard as it was before samples had a CRC: fields for devices as tarfile fills them."""
    old = bytearray(data)
    for at in range(0, len(data) - 1024, stride):
        old[at + 329 : at + 345] = blank * 2
        old[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(old[at : at + 512])[0]
    return bytes(old)


@pytest.mark.parametrize("blank", [bytes(8), b"0000000\0"], ids=["empty", "zeros"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("labels", [False, True], ids=SETS)
def test_a_shard_from_before_checksums_is_told_from_a_damaged_one(tmp_path, labels, rows, blank):
    write_set(tmp_path, {"train-000000": some_ids(rows, 0)}, labels=labels)
    path, stride = tmp_path / "train-000000.tar", ShardSet.open(tmp_path).layout.stride
    sound = path.read_bytes()
    old = without_checksums(sound, stride, blank)
    path.unlink()
    path.write_bytes(old)
    reseal(tmp_path, sha256=sha256(old))
    with pytest.raises(
        ShardError, match=r"written by an older siftloader.*prepare it again"
    ) as caught:
        list(verify(tmp_path))
    assert not isinstance(caught.value, CorruptShard)
    assert caught.value.shard == "train-000000"
    other = old[: stride - 1] + b"?" + old[stride:]  # old, but not sound
    lone = old[:stride] + sound[stride:]  # the CRC of one sample alone is gone
    for damaged in [other, lone] if rows > 1 else [other]:
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(CorruptShard, match="train-000000: sample 0, "):
            list(verify(tmp_path))


def test_a_sound_shard_of_another_set_is_not_the_recorded_one(copy, tmp_path):
    labels = ShardSet.open(copy).layout.labels
    write_set(tmp_path / "other", {"train-000000": some_ids(3, 9)}, labels=labels)
    shutil.copy(tmp_path / "other" / "train-000000.tar", copy)
    with pytest.raises(CorruptShard, match=r"train-000000: a sound shard, but not the one of the"):
        list(verify(copy))


def test_a_label_that_is_no_label_is_named_even_where_all_hashes_fit():
    layout = Layout(2, labels=True)
    raw = bytearray(whole("train-000000", np.zeros((3, 2), int), layout, np.zeros(3)))
    second = raw[layout.stride : 2 * layout.stride]
    second[layout.label] = ord("2")
    crc = zlib.crc32(bytes(4) + b"2")
    second[:512] = ustar("train-000000-000001.input_ids.npy", bytes(132), crc)[:512]
    raw[layout.stride : 2 * layout.stride] = second
    with pytest.raises(CorruptShard, match=r"sample 1, byte .*a label must be 0 or 1, found 0x32"):
        check_samples("train-000000", np.frombuffer(raw, np.uint8), 3, layout)


def test_where_the_damage_is_survives_the_way_out_of_a_worker():
    error = CorruptShard("what, and what to do", shard="val-000000", sample=3, byte=9)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.shard, copy.sample, copy.byte) == (str(error), "val-000000", 3, 9)
    plain = ShardError("what")  # torch makes errors of workers anew, of their text alone
    assert (plain.shard, plain.sample, plain.byte) == (None, None, None)


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_writing_and_verifying_take_a_few_mebibytes_whatever_the_shard(tmp_path):
    """A shard of 28 MiB: less than half of it at any time, in either direction."""
    ids, layout = np.ones((14_000, 512), np.uint16), Layout(512)
    sources = np.zeros(len(ids), np.uint8)
    made: list[Shard] = []
    assert (
        peak_of(lambda: made.append(write_shard(tmp_path, "train-000000", ids, sources, layout)))
        < 9e6
    )
    about = {"tokenizer": Tokenizer("tiny", "0" * 64, 2), "sources": [Source("a", "1" * 64, 1)]}
    unigrams = np.array([0, ids.size])
    write_dataset(
        tmp_path, made, layout=layout, objective="mlm", unigrams=unigrams, seed=0, **about
    )
    assert peak_of(lambda: list(verify(tmp_path))) < 14e6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk: Linux's /dev/full")
@pytest.mark.parametrize("full", ["train-000000.tar", "train-000000.sources.npy"])
def test_a_full_disk_leaves_nothing_with_a_final_name(tmp_path, full):
    (tmp_path / f"{full}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_set(tmp_path, {"train-000000": some_ids(3, 0)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["dataset.json", "manifest.jsonl"])
def test_every_byte_of_the_description_counts_or_means_nothing(copy, name):
    """Law 8 without chance: a digit or letter changed into its neighbour is the worst of flips."""
    whole = ShardSet.open(copy)
    data = (copy / name).read_bytes()
    for at in range(len(data)):
        (copy / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert ShardSet.open(copy) == whole, f"byte {at}"
        except ShardError as error:
            assert name in str(error), f"byte {at}"


FAULTS = {
    "no manifest": (lambda f: (f / "manifest.jsonl").unlink(), "not a finished shard folder"),
    "no folder": (
        shutil.rmtree,
        r"copy: no such folder \(looked from .*\), so not .*; give the one",
    ),
    "a file": (
        lambda f: (shutil.rmtree(f), f.write_text("")),
        r"copy: a file, so not .*; give the one that holds manifest\.jsonl",
    ),
    "no description": (lambda f: (f / "dataset.json").unlink(), "cannot be read .*; copy the"),
    "no JSON": (lambda f: (f / "dataset.json").write_text("{"), r"cannot be read .*; copy the"),
    "other JSON": (
        lambda f: (f / "dataset.json").write_text("[]"),
        "a JSON object, got list; copy the file again, or prepare the shards again",
    ),
    "foreign JSON": (
        lambda f: (f / "dataset.json").write_text(json.dumps({"sha256": sha256(b"{}")})),
        r"not a shard description \(KeyError\('schema'\)\); copy the file again, or prepare",
    ),
    "other seed": (lambda f: edit(f / "dataset.json", seed=8), "not as it was written"),
    "empty manifest": (lambda f: (f / "manifest.jsonl").write_text(""), "at least one shard"),
    "error page": (
        lambda f: (f / "manifest.jsonl").write_text("<html>"),
        r"line 1 is not a manifest line \(.*\); copy the file again, or prepare the shards again",
    ),
    "shard twice": (
        lambda f: double_first_line(f / "manifest.jsonl"),
        "every name once and in order; copy the file again",
    ),
    "no name": (
        lambda f: edit_line(f / "manifest.jsonl", shard=["train-000000"]),
        r"line 1 is not a manifest line \(shard must be a name, got \[.*; copy the file again",
    ),
    "other count": (
        lambda f: edit_line(f / "manifest.jsonl", num_sequences=4),
        r"manifest\.jsonl and dataset\.json do not belong together",
    ),
    "other size": (
        lambda f: edit_line(f / "manifest.jsonl", bytes=4),
        r"manifest\.jsonl: says that train-000000 has 3 samples and 4 bytes",
    ),
    "no tar": (lambda f: (f / "train-000001.tar").unlink(), "train-000001: cannot be read"),
    "no sources": (
        lambda f: (f / "val-000000.sources.npy").unlink(),
        r"val-000000\.sources\.npy:",
    ),
    "no unigrams": (lambda f: (f / "unigrams.npy").unlink(), r"unigrams\.npy: cannot be read"),
    "longer tar": (
        lambda f: shutil.copy(f / "train-000000.tar", f / "train-000001.tar"),
        r"train-000001: \d+ bytes on disk",
    ),
    "other tar": (
        lambda f: shutil.copy(f / "train-000001.tar", f / "train-000000.tar"),
        r"train-000000: \d+ bytes on disk, \d+ in the manifest",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_lost_something_says_what(copy, fault):
    change, message = FAULTS[fault]
    change(copy)
    with pytest.raises(ShardError, match=message):
        everything(copy)


def double_first_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines]))


def edit_line(path: Path, **changes: object) -> None:
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_two_generations_in_one_folder_are_told_apart(finished, tmp_path):
    other = tmp_path / "other"
    write_set(other, {"train-000000": some_ids(3, 9)})
    shutil.copy(finished / "manifest.jsonl", other)
    with pytest.raises(ShardError, match="do not belong together"):
        ShardSet.open(other)


@pytest.mark.parametrize("sample", [0, 2_047, 2_048, 4_500])
def test_a_header_changed_by_one_bit_names_its_sample(sample):
    layout = Layout(2)
    raw = bytearray(whole("train-000000", np.zeros((4_501, 2), int), layout))
    raw[sample * layout.stride + 157] ^= 1
    with pytest.raises(CorruptShard, match=f"train-000000: sample {sample}, byte") as caught:
        check_samples("train-000000", np.frombuffer(raw, np.uint8), 4_501, layout)
    assert caught.value.byte == sample * layout.stride + 157


def test_verify_names_the_sample_whose_id_is_outside_the_vocabulary(tmp_path):
    ids = some_ids(4, 0)
    ids[2, 3] = VOCAB
    write_set(tmp_path, {"train-000000": some_ids(2, 1), "val-000000": ids})
    with pytest.raises(CorruptShard, match="val-000000: sample 2 holds an id outside"):
        list(verify(tmp_path))


def test_verify_names_a_tar_that_is_in_no_manifest(copy):
    shutil.copy(copy / "val-000000.tar", copy / "val-000001.tar")
    with pytest.raises(ShardError, match=r"val-000001\.tar is not in manifest"):
        list(verify(copy))


def test_a_newer_format_is_refused_by_name(copy):
    about = json.loads((copy / "dataset.json").read_text())
    about["schema"]["version"] = 99
    rest = {key: value for key, value in about.items() if key != "sha256"}
    about["sha256"] = sha256(json.dumps(rest, sort_keys=True).encode())
    (copy / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(ShardError, match=r"format 99.*upgrade siftloader"):
        ShardSet.open(copy)
