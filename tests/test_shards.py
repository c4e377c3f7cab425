"""A shard is the tar everybody writes, an array, and never read wrong."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
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
    ShardSet,
    Source,
    Tokenizer,
    check_headers,
    encode,
    sha256,
    verify,
    write_dataset,
    write_shard,
)


VOCAB = 60


def write_set(folder: Path, ids: dict[str, np.ndarray], seq_len: int = 5) -> None:
    """A finished set with the given shards, two sources taking turns."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(seq_len)
    shards = [
        write_shard(folder, stem, rows, (np.arange(len(rows)) % 2).astype(np.uint8), layout)
        for stem, rows in ids.items()
    ]
    train = np.concatenate([rows.ravel() for stem, rows in ids.items() if stem[0] == "t"])
    write_dataset(
        folder,
        shards,
        layout=layout,
        objective="mlm",
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
            (shard, dataset.read(shard).tolist(), dataset.read_sources(shard).tolist())
            for shard in dataset.manifest
        ],
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    write_set(
        folder,
        {
            "train-000000": some_ids(3, 0),
            "train-000001": some_ids(2, 1),
            "val-000000": some_ids(1, 2),
        },
    )
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@examples(60)
@given(data=st.data(), dtype=st.sampled_from(["<u2", "<u4"]))
def test_a_shard_is_byte_for_byte_what_tarfile_writes(data, dtype):
    """Members of USTAR with mtime 0, as the standard library and numpy would make them."""
    shape = data.draw(st.tuples(st.integers(0, 12), st.integers(1, 400)))
    seed = data.draw(st.integers(0, 9))
    ids = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True)
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(ids):
            member = io.BytesIO()
            np.save(member, row.astype(dtype))
            info = tarfile.TarInfo(f"train-000003-{number:06d}.input_ids.npy")
            info.size, info.mode, info.mtime = len(member.getvalue()), 0o444, 0
            tar.addfile(info, io.BytesIO(member.getvalue()))
    ours = encode("train-000003", ids, Layout(shape[1], dtype))
    assert theirs.getvalue().startswith(ours)
    assert not any(theirs.getvalue()[len(ours) :]), "tarfile only pads its end further"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the file open
@pytest.mark.parametrize(("dtype", "seq_len"), [("<u2", 128), ("<u2", 512), ("<u4", 33)])
def test_webdataset_tarfile_and_the_view_read_alike(tmp_path, dtype, seq_len):
    layout = Layout(seq_len, dtype)
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, seq_len), endpoint=True)
    data = encode("val-000000", ids, layout)
    path = tmp_path / "val-000000.tar"
    path.write_bytes(data)

    stock = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in stock] == [f"val-000000-{n:06d}" for n in range(30)]
    assert np.array_equal([sample["input_ids.npy"] for sample in stock], ids)
    assert stock[0]["input_ids.npy"].dtype == dtype

    with tarfile.open(path) as tar:
        members = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar.getmembers()]
    assert np.array_equal(members, ids)

    plain = np.frombuffer(data[:-1024], np.uint8).reshape(-1, layout.stride)
    view = plain[:, layout.offset : layout.offset + layout.payload].copy().view(dtype)
    assert np.array_equal(view, ids)


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
    layout = Layout(seq_len, dtype)
    assert layout.stride == stride
    assert layout.size(3) == 3 * stride + 1024
    assert len(encode("train-000000", np.zeros((3, seq_len), int), layout)) == layout.size(3)


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


@examples(600)
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


@pytest.mark.parametrize("name", ["dataset.json", "manifest.jsonl"])
def test_every_byte_of_the_description_counts_or_means_nothing(copy, name):
    """Law 8 without chance: a digit or letter changed into its neighbour is the worst of flips."""
    whole = ShardSet.open(copy)
    data = (copy / name).read_bytes()
    for at in range(len(data)):
        (copy / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with suppress(ShardError):
            assert ShardSet.open(copy) == whole, f"byte {at}"


FAULTS = {
    "no manifest": (lambda f: (f / "manifest.jsonl").unlink(), "not a finished shard folder"),
    "no description": (lambda f: (f / "dataset.json").unlink(), "cannot be read"),
    "other JSON": (lambda f: (f / "dataset.json").write_text("[]"), "a JSON object, got list"),
    "other seed": (lambda f: edit(f / "dataset.json", seed=8), "not as it was written"),
    "empty manifest": (lambda f: (f / "manifest.jsonl").write_text(""), "at least one shard"),
    "error page": (lambda f: (f / "manifest.jsonl").write_text("<html>"), "line 1 is not a"),
    "shard twice": (lambda f: double_first_line(f / "manifest.jsonl"), "every name once"),
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


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_two_generations_in_one_folder_are_told_apart(finished, tmp_path):
    other = tmp_path / "other"
    write_set(other, {"train-000000": some_ids(3, 9)})
    shutil.copy(finished / "manifest.jsonl", other)
    with pytest.raises(ShardError, match="do not belong together"):
        ShardSet.open(other)


@pytest.mark.parametrize("sample", [0, 4_095, 4_096, 9_000])
def test_a_header_changed_by_one_bit_names_its_sample(sample):
    layout = Layout(2)
    raw = bytearray(encode("train-000000", np.zeros((9_001, 2), int), layout))
    raw[sample * layout.stride + 157] ^= 1
    with pytest.raises(CorruptShard, match=f"train-000000: sample {sample} "):
        check_headers("train-000000", np.frombuffer(raw, np.uint8), 9_001, layout)


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
