"""What inspect says is what plain loops over the samples find."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effort import examples
from hypothesis import given, strategies as st

from siftloader.cli import main
from siftloader.errors import CorruptShard, ShardError, SiftError
from siftloader.inspection import (
    Example,
    as_json,
    as_text,
    look,
    on_a_line,
    plot,
    report,
    shown,
)
from siftloader.shards import Layout, ShardSet, Source, Tokenizer, write_dataset, write_shard


V = 12
SOURCES = (Source("emma", "1" * 64, 3, 1_234, 2.0), Source("moby dick", "2" * 64, 4, 56, 0.25))
ACCOUNTS = {
    "documents": 7,
    "skipped": {"empty": 3, "no text at all": 1_000},
    "bad": {"not UTF-8": 2},
    "packing": {
        "train": {"tokens": 1_000, "kept": 900, "dropped": 12},
        "val": {"tokens": 290, "kept": 290, "dropped": 0},
    },
}
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "whale",
    "\x1b[31m",
    "鯨\n鯨",
    "a",
    "b",
    "c",
]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[number] for number in ids)


def write(
    folder: Path,
    shards: dict[str, list[list[int]]],
    objective: str = "mlm",
    special: dict[str, int] = SPECIAL,
    sources: tuple[Source, ...] = SOURCES,
    name: str = "words",
    accounts: dict[str, Any] | None = None,
) -> ShardSet:
    """Shards of those rows; sources and labels follow from the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = objective == "mlm-nsp"
    layout = Layout(len(next(iter(shards.values()))[0]), labels=pairs)
    written = [
        write_shard(
            folder,
            stem,
            np.array(rows),
            np.array([source_of(row) for row in rows], np.uint8),
            layout,
            np.array([sum(row) % 2 for row in rows]) if pairs else None,
        )
        for stem, rows in shards.items()
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer(name, "0" * 64, V, special),
        sources=sources,
        unigrams=np.bincount(
            [
                token
                for stem, rows in shards.items()
                if stem[0] == "t"
                for row in rows
                for token in row
            ],
            minlength=V,
        )[:V],
        seed=7,
        accounts=accounts,
    )
    return ShardSet.open(folder)


def source_of(row: list[int]) -> int:
    return int(sum(row) % 3 == 0)


ROWS = st.lists(st.lists(st.integers(0, V - 1), min_size=6, max_size=6), min_size=1, max_size=9)


@examples(100)
@given(
    train=st.lists(ROWS, min_size=1, max_size=3),
    val=ROWS,
    objective=st.sampled_from(["mlm", "mlm-nsp", "clm"]),
    unk=st.booleans(),
    wanted=st.integers(0, 30),
    chunk=st.sampled_from([1, 12, 1 << 20]),
)
def test_every_figure_is_what_a_loop_over_the_samples_counts(
    tmp_path_factory, train, val, objective, unk, wanted, chunk
):
    shards = {f"train-{number:06d}": rows for number, rows in enumerate(train)}
    special = {key: number for key, number in SPECIAL.items() if unk or key != "unk"}
    dataset = write(
        tmp_path_factory.mktemp("set"), {**shards, "val-000000": val}, objective, special
    )
    first_id = 0
    for split, rows in (("train", [row for part in train for row in part]), ("val", val)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("siftloader.inspection.CHUNK_TOKENS", chunk)
            found = look(dataset, split, wanted)
        padded = objective != "clm"
        real = [[token for token in row if not (padded and token == 0)] for row in rows]
        unknown = [row.count(1) for row in rows]
        assert (found.samples, found.shards) == (len(rows), len(train) if split == "train" else 1)
        assert found.bytes == sum(shard.bytes for shard in dataset.shards(split))
        assert found.tokens == sum(map(len, real))
        assert found.padding == 6 * len(rows) - found.tokens
        assert found.text == sum(token not in (2, 3) for row in real for token in row)
        assert found.unknown == (sum(unknown) if unk else None)
        assert found.used == len({token for row in rows for token in row})
        assert found.lengths.tolist() == [list(map(len, real)).count(n) for n in range(7)]
        if unk:
            assert found.unknowns.tolist() == [unknown.count(n) for n in range(7)]
        else:
            assert found.unknowns is None
        sources = [source_of(row) for row in rows]
        assert found.sources == {"emma": sources.count(0), "moby dick": sources.count(1)}
        labels = [sum(row) % 2 for row in rows]
        pairs = objective == "mlm-nsp"
        assert found.labels == ((labels.count(0), labels.count(1)) if pairs else None)
        assert found.examples == [
            Example(
                first_id + at,
                ["emma", "moby dick"][sources[at]],
                len(real[at]),
                unknown[at] if unk else 0,
                labels[at] if pairs else None,
                rows[at],
            )
            for at in range(min(wanted, len(rows)))
        ]
        first_id += len(rows)


@pytest.fixture
def pairs(tmp_path):
    return write(
        tmp_path / "pairs",
        {
            "train-000000": [[2, 5, 3, 6, 3, 0], [2, 1, 3, 9, 3, 0], [2, 7, 3, 8, 10, 3]],
            "val-000000": [[2, 1, 1, 3, 1, 3]],
        },
        "mlm-nsp",
    )


def test_the_report_says_it_in_words_and_aligned(pairs):
    said = report(pairs, [look(pairs, split, 2) for split in pairs.splits], decode, 120)
    for line in (
        "objective    mlm-nsp",
        "tokens       6 per sample, <u2",
        "stride       2048 bytes",
        "tokenizer    words, 12 ids",
        "special ids  pad 0, unk 1, cls 2, sep 3, mask 4",
        "train: 1 shards, 3 samples, 7,168 bytes",
        "  tokens    16, 7 of them text",
        "  padding   2 (11.11%)",
        "  unknown   1 (14.29% of the text)",
        "  ids used  10 of 12",
        "  length    5 to 6 tokens, the median is 5",
        "  labels    0 in 33.33%: B follows A in the text; 1 in 66.67%: B is random",
        "  source     samples   share",
        "  emma             1  33.33%",
        "  moby dick        2  66.67%",
        "  id  source     length  unknown  label  text",
        "   0  emma            5        0      1  [CLS] the [SEP] whale [SEP] (and 1 of padding)",
        "   1  moby dick       5        1      0  [CLS] [UNK] [SEP] a [SEP] (and 1 of padding)",
        "val: 1 shards, 1 samples, 3,072 bytes",
        "  unknown   3 (100.00% of the text)",
    ):
        assert line in said.split("\n"), line
    plain = report(pairs, [look(pairs, "train", 1)], None, 120)
    assert plain.endswith(
        "ids\n   0  emma         5        0      1  2 5 3 6 3 (and 1 of padding)"
    )
    assert "val" not in plain
    assert "id  source" not in report(pairs, [look(pairs, "train", 0)])


def test_what_cannot_be_counted_is_not_made_up(tmp_path):
    dataset = write(tmp_path, {"train-000000": [[5, 6, 7, 0, 0, 0]]}, "clm", {"pad": 0})
    said = report(dataset, [look(dataset, "train")])
    assert "unknown   the vocabulary has no unknown token" in said
    assert "tokens    6, 6 of them text" in said, "to a causal model, nothing is padding"
    assert "labels" not in said


@pytest.mark.parametrize("width", [10, 40, 60, 100])
def test_samples_keep_to_the_terminal_and_cannot_command_it(tmp_path, width):
    rows = [[2, 7, 8, 8, 7, 3], [2, 5, 5, 6, 6, 3]]
    dataset = write(tmp_path, {"train-000000": rows})
    said = report(dataset, [look(dataset, "train", 2)], decode, width)
    table = said.split("\n\n")[-1].split("\n")
    assert len(table) == 3 and "\x1b" not in said
    columns = [sum(2 if letter == "鯨" else 1 for letter in line) for line in table]
    frame = len("  id  source     length  unknown  ")
    assert max(columns) <= max(width, frame + 20)
    assert "\\x1b[31m" in table[1] or width < 100
    assert table[2].endswith("[SEP]" if width == 100 else "...")
    assert table[1].startswith("   0  moby dick") or table[1].startswith("   0  emma")


def test_only_padding_at_the_end_is_abridged():
    example = Example(0, "a", 3, 0, None, [0, 5, 0, 6, 0, 0])
    assert as_text(example, 0, decode) == "[PAD] the [PAD] whale (and 2 of padding)"
    assert as_text(example, None, None) == "0 5 0 6 0 0"


def test_json_has_the_same_figures_and_survives_the_trip(pairs):
    splits = [look(pairs, split, 1) for split in pairs.splits]
    found = json.loads(json.dumps(as_json(pairs, splits, decode), allow_nan=False))
    assert found["fingerprint"] == pairs.fingerprint
    assert (found["seq_len"], found["stride"], found["labels"]) == (6, 2048, True)
    assert found["tokenizer"]["special_ids"] == SPECIAL
    about = {"name": "moby dick", "sha256": "2" * 64, "documents": 4, "tokens": 56, "weight": 0.25}
    assert found["sources"][1] == about
    assert found["accounts"] == {}
    train, val = found["splits"]["train"], found["splits"]["val"]
    assert (train["tokens"], train["text_tokens"], train["padding"]) == (16, 7, 2)
    assert train["padding_share"] == pytest.approx(2 / 18)
    assert (train["unknown"], train["unknown_share"]) == (1, pytest.approx(1 / 7))
    assert train["samples_by_length"] == [0, 0, 0, 0, 0, 2, 1]
    assert val["samples_by_unknown"] == [0, 0, 0, 1, 0, 0, 0]
    assert train["labels"] == [1, 2]
    assert train["sources"]["emma"] == {"samples": 1, "share": pytest.approx(1 / 3)}
    assert train["examples"] == [
        {
            "id": 0,
            "source": "emma",
            "length": 5,
            "unknown": 0,
            "label": 1,
            "ids": [2, 5, 3, 6, 3, 0],
            "text": "[CLS] the [SEP] whale [SEP] [PAD]",
        }
    ]
    assert as_json(pairs, splits)["splits"]["train"]["examples"][0]["text"] is None


def panels(monkeypatch: pytest.MonkeyPatch, splits: Any, path: Path) -> list[Any]:
    """The axes that plot draws, beside the file that it writes."""
    figures = pytest.importorskip("matplotlib.figure")
    made: list[Any] = []

    class Kept(figures.Figure):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Kept)
    plot(splits, path)
    return made[0].axes


def test_the_plot_has_a_bar_for_every_sample(pairs, tmp_path, monkeypatch):
    splits = [look(pairs, split) for split in pairs.splits]
    left, right = panels(monkeypatch, splits, tmp_path / "found.png")
    data = (tmp_path / "found.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">2I", data[16:24]) == (1650, 690)
    assert (left.get_xlabel(), right.get_xlabel()) == ("tokens", "unknown tokens")
    assert left.get_ylabel() == right.get_ylabel() == "samples (log scale)"
    for axes, name in ((left, "lengths"), (right, "unknowns")):
        drawn = [patch.get_data() for patch in axes.patches if patch.get_fill() is False]
        assert len(drawn) == 2
        for split, (heights, edges, _) in zip(splits, drawn, strict=True):
            assert heights[:7].tolist() == getattr(split, name).tolist()
            assert edges[:3].tolist() == [-0.5, 0.5, 1.5], "a bar stands on its value"


def test_many_lengths_share_bars_and_none_is_lost(tmp_path, monkeypatch):
    rows = [[5] * length + [0] * (200 - length) for length in range(1, 201)]
    dataset = write(tmp_path, {"train-000000": rows})
    left, _ = panels(monkeypatch, [look(dataset, "train")], tmp_path / "found.png")
    assert left.get_xlabel() == "tokens (bars 4 wide)"
    heights = left.patches[0].get_data()[0]
    assert heights.sum() == 200
    assert heights.tolist() == [3, *[4] * 49, 1]


def test_a_plot_without_unknown_tokens_says_so(tmp_path, monkeypatch):
    dataset = write(tmp_path, {"train-000000": [[5, 6]]}, "clm", {"eos": 3})
    _, right = panels(monkeypatch, [look(dataset, "train")], tmp_path / "found.png")
    assert [text.get_text() for text in right.texts] == ["the vocabulary has no unknown token"]


def test_what_is_damaged_is_not_counted(pairs):
    path = pairs.folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[2048 + 641] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="train-000000: sample 1, byte 2689 "):
        look(pairs, "train")
    with pytest.raises(ShardError, match="no shards of split 'test'"):
        look(pairs, "test")


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    dataset = write(tmp_path, {"train-000000": [[5, 6], [5, V]]})
    with pytest.raises(CorruptShard, match="train-000000: sample 1 holds an id outside"):
        look(dataset, "train")


def test_memory_does_not_grow_with_the_shards(tmp_path):
    layout, rows = Layout(512), np.full((6_000, 512), 5, np.uint16)
    sources = np.zeros(len(rows), np.uint8)
    written = [write_shard(tmp_path, f"train-{n:06d}", rows, sources, layout) for n in range(2)]
    write_dataset(
        tmp_path,
        written,
        layout=layout,
        objective="mlm",
        tokenizer=Tokenizer("words", "0" * 64, V, SPECIAL),
        sources=[Source("a", "1" * 64, 1)],
        unigrams=np.zeros(V, np.int64),
        seed=0,
    )
    dataset = ShardSet.open(tmp_path)
    tracemalloc.start()
    try:
        assert look(dataset, "train").tokens == 2 * rows.size
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_what_it_was_made_from_is_said_in_words_and_in_json(tmp_path):
    rows = {"train-000000": [[2, 5, 6, 6, 6, 3]]}
    dataset = write(tmp_path, rows, accounts=ACCOUNTS)
    said = report(dataset, [look(dataset, "train")]).split("\n\n")
    assert said[1].split("\n") == [
        "  source     documents  tokens  weight",
        "  emma               3   1,234       2",
        "  moby dick          4      56    0.25",
    ]
    assert said[2].split("\n") == [
        "of the text",
        "  documents               7",
        "  skipped empty           3",
        "  skipped no text at all  1,000",
        "  bad: not UTF-8          2",
        "  dropped of train        12 of 1,000 tokens (1.20%)",
        "  dropped of val          0 of 290 tokens (0.00%)",
    ]
    assert json.loads(json.dumps(as_json(dataset, [])))["accounts"] == ACCOUNTS


def test_what_nobody_counted_is_not_made_up(tmp_path):
    dataset = write(
        tmp_path,
        {"train-000000": [[2, 5, 6, 6, 6, 3]]},
        sources=tuple(Source(name, "1" * 64, 3) for name in ("emma", "moby dick")),
    )
    said = report(dataset, [look(dataset, "train")])
    assert "\n  emma               3       -       1\n" in said
    assert "of the text\n" not in said


@examples(300)
@given(text=st.text(st.characters(codec=None)))
def test_whatever_a_text_holds_a_terminal_obeys_none_of_it(text):
    safe = shown(text)
    assert safe.isprintable()
    spaced = "".join(" " if unicodedata.category(letter) == "Zs" else letter for letter in text)
    if "\\" not in text:  # then it can be read back: nothing was swallowed
        coded = re.sub(r"\\(?:x..|u....|U........|[nrt])", _unescape, safe)
        assert coded == spaced
    assert on_a_line(text).isprintable()
    assert on_a_line(f" {text}\n") == on_a_line(text)


def _unescape(match: re.Match[str]) -> str:
    return match[0].encode("ascii").decode("unicode_escape")


def test_a_text_that_flows_is_one_line_and_its_words_stay_apart():
    assert on_a_line("one\r\n two\t three\x1c\x85\xa0four\n") == "one two three\\x1c\\x85 four"
    assert shown("one\ntwo  three") == "one\\ntwo  three"


EVIL = "\x1b]0;owned\x07\x9b2J\u202e\n\rx"


@pytest.fixture
def evil(tmp_path):
    """A set in which every name that a preparation could have taken from outside is hostile."""
    return write(
        tmp_path / f"set{EVIL}",
        {"train-000000": [[2, 7, 8, 1, 7, 3], [2, 5, 6, 6, 6, 3]], "x\x1b-000000": [[5] * 6]},
        special=SPECIAL | {EVIL: 9},
        sources=(Source(EVIL, "1" * 64, 3, 9), Source(f"b{EVIL}", "2" * 64, 4, 9)),
        name=EVIL,
        accounts={"documents": 7, "skipped": {EVIL: 3}, "bad": {EVIL: 1}, "packing": {EVIL: {}}},
    )


def hostile_tokenizer(path: Path) -> None:
    """A tokenizer.json whose words are those of WORDS."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")).save(str(path))


def harmless(printed: str) -> bool:
    return all(line.isprintable() for line in printed.split("\n"))


FAULTS = {
    "none": lambda folder: None,
    "stranger": lambda folder: (folder / f"{EVIL}.tar").write_text(""),
    "manifest": lambda folder: (folder / "manifest.jsonl").write_text(json.dumps({EVIL: 1})),
    "name": lambda folder: (folder / "manifest.jsonl").write_text(
        json.dumps(dict.fromkeys(("shard", "sha256", "sources_sha256"), EVIL))[:-1]
        + ', "num_sequences": 1, "bytes": 1}'
    ),
    "folder": shutil.rmtree,
    "tar": lambda folder: (folder / "train-000000.tar").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tokenizer", [False, True], ids=["ids", "text"])
def test_nothing_that_verify_and_inspect_print_commands_the_terminal(
    evil, capsys, fault, tokenizer
):
    if tokenizer:
        hostile_tokenizer(evil.folder / "tokenizer.json")
    FAULTS[fault](evil.folder)
    found = [main([command, str(evil.folder)]) for command in ("verify", "inspect")]
    printed = capsys.readouterr()
    assert harmless(printed.out) and harmless(printed.err)
    assert all(line.startswith("siftloader: ") for line in printed.err.splitlines())
    assert found == ([0, 0] if fault == "none" else [1, 0 if fault == "stranger" else 1])
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e" in printed.out + printed.err
    if tokenizer and fault == "none":
        assert "[CLS] \\x1b[31m" in printed.out
    for command in ("verify", "inspect"):
        main([command, str(evil.folder), "--json"])
    assert harmless(capsys.readouterr().out), "JSON escapes as well"


def test_inspect_selections_prints_nothing_that_commands_the_terminal(evil, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    torch = pytest.importorskip("torch")
    from siftloader.selection_log import SelectionLog

    hostile_tokenizer(evil.folder / "tokenizer.json")
    log = SelectionLog(tmp_path / "log.parquet")
    log.add(0, 0, torch.tensor([0, 1]), torch.rand(2), torch.tensor([0]))
    log.flush()
    command = ["inspect-selections", str(tmp_path / "log.parquet"), "--shards", str(evil.folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert harmless(printed)
    assert "\\x1b]0;owned" in printed, "the name of a source"
    assert "\\x1b[31m" in printed, "the text of a sample"
    assert "tokenizer.json is not the tokenizer" in printed


def damage(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[2048 + 641] ^= 1
    path.unlink()
    path.write_bytes(data)


WRONG = {
    "damage": (damage, [], ("train-000000", 1, 2689), "sample 1, byte 2689"),
    "no tar": (
        lambda folder: (folder / "val-000000.tar").unlink(),
        [],
        ("val-000000", None, None),
        "val-000000: cannot be read",
    ),
    "folder": (shutil.rmtree, [], (None, None, None), "no such folder (looked from "),
    "split": (None, ["--split", "test"], (None, None, None), "no shards of split 'test'"),
    "tokenizer": (None, ["--tokenizer", "gone.json"], (None, None, None), "gone.json: no such"),
    "plot": (None, ["--plot", "gone/x.png"], (None, None, None), "gone/x.png: no folder gone"),
}


@pytest.mark.parametrize("what", WRONG)
def test_inspect_as_json_says_in_json_what_is_wrong(pairs, capsys, what):
    change, more, where, message = WRONG[what]
    if change is not None:
        change(pairs.folder)
    assert main(["inspect", str(pairs.folder), *more]) == 1
    plain = capsys.readouterr()
    assert main(["inspect", str(pairs.folder), "--json", *more]) == 1
    printed, complaints = capsys.readouterr()
    assert complaints == ""
    found = json.loads(printed)
    said = found["error"].pop("message")
    assert found == {
        "folder": str(pairs.folder),
        "error": dict(zip(("shard", "sample", "byte"), where, strict=True)),
    }
    assert message in said
    assert plain == ("", f"siftloader: {said}\n")


def test_inspect_as_json_has_no_error_where_there_is_none(pairs, capsys):
    assert main(["inspect", str(pairs.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] is None


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("x.jpg", 2, "a plot is a PNG; give it a name that ends in .png"),
        ("x", 2, "a plot is a PNG"),
        ("gone/x.png", 1, "gone; make it, or plot somewhere else"),
        ("folder.png", 1, "a folder; give the plot another name"),
    ],
    ids=["jpg", "none", "no folder", "a folder"],
)
def test_where_no_plot_can_be_written_nothing_is_read(
    pairs, tmp_path, capsys, name, status, message
):
    (tmp_path / "folder.png").mkdir()
    damage(pairs.folder)  # would be told, were it read
    path = str(tmp_path / name)
    for command in (["inspect", str(pairs.folder)], ["inspect-selections", "gone.parquet"]):
        assert main([*command, "--plot", path]) == status
        printed, complaint = capsys.readouterr()
        assert printed == "" and complaint.startswith(f"siftloader: {path}: ")
        assert message in complaint
    with pytest.raises((SiftError, ValueError), match=re.escape(message)):
        plot([], path)
    assert [file.name for file in tmp_path.glob("*x*")] == []


def test_sources_that_are_none_are_not_counted(tmp_path):
    dataset = write(tmp_path, {"train-000000": [[0] * 6]}, sources=SOURCES[:1])
    with pytest.raises(CorruptShard, match=r"sources\.npy: needs 1 numbers below 1; prepare"):
        look(dataset, "train")


def test_verify_needs_no_standard_error(pairs):
    """As under pythonw, or with `2>&-`."""
    command = [sys.executable, "-m", "siftloader.cli", "verify", str(pairs.folder)]
    done = subprocess.run(
        f"{' '.join(command)} 2>&-", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.count("all as they were written")) == (0, 1), done.stdout
