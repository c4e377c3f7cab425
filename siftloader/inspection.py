"""What a folder of shards holds: counts, lengths, unknown tokens, and samples as text.

    dataset = ShardSet.open("shards/demo")
    splits = [look(dataset, "train", examples=2), look(dataset, "val", examples=2)]
    print(report(dataset, splits, decode=decode))
    plot(splits, "shards.png")

Every byte that is counted was verified, a shard at a time, so that neither memory nor trust depends on the
size of the set. Needs numpy and, to draw, matplotlib.

Letters: N samples of a split, n of a chunk, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import SiftError
from siftloader.shards import Shard, ShardSet, Source, check_ids, check_sources


Decode = Callable[[list[int]], str]
CHUNK_TOKENS = 1 << 20  # counted at once
BARS = 64  # of a histogram, at most
COLORS = ("#0b6e99", "#c2671b", "#5b8c2a", "#8b3a8f")


@dataclass(frozen=True)
class Example:
    """A sample as it lies on disk; ``label`` only where there are pairs."""

    id: int  # global: counts through the manifest
    source: str
    length: int  # tokens that are no padding
    unknown: int
    label: int | None
    ids: list[int]


@dataclass
class Split:
    """What a split holds. Padding counts nowhere but in ``padding``."""

    name: str
    shards: int
    samples: int
    bytes: int
    sources: dict[str, int]  # samples by source
    counts: NDArray[np.int64]  # [V]: how often each id occurs
    lengths: NDArray[np.int64]  # [T + 1]: samples by the number of their tokens
    unknowns: NDArray[np.int64] | None  # [T + 1]: samples by the number of unknown tokens
    labels: tuple[int, int] | None  # samples whose second segment follows the first; and not
    special: dict[str, int]
    pad: int | None
    examples: list[Example] = field(default_factory=list)

    @property
    def padding(self) -> int:
        """Tokens of padding."""
        return 0 if self.pad is None else int(self.counts[self.pad])

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.counts.sum()) - self.padding

    @property
    def text(self) -> int:
        """Tokens that are no padding and no frame ([CLS], [SEP], end of text) either."""
        frame = {self.special[key] for key in ("cls", "sep", "eos") if key in self.special}
        return self.tokens - sum(int(self.counts[number]) for number in frame)

    @property
    def unknown(self) -> int | None:
        """Tokens the vocabulary has no word for; None where it has no such token."""
        return int(self.counts[self.special["unk"]]) if "unk" in self.special else None

    @property
    def used(self) -> int:
        """Ids that occur at all."""
        return int((self.counts > 0).sum())


def look(dataset: ShardSet, split: str, examples: int = 0) -> Split:
    """Read a split, verified, and count; keep its first ``examples`` samples, which are shuffled."""
    layout, special = dataset.layout, dict(dataset.tokenizer.special_ids)
    shards = dataset.shards(split)
    width = layout.seq_len + 1
    # A causal model knows no padding: there, the id is a token like others.
    pad = special.get("pad") if dataset.objective.startswith("mlm") else None
    found = Split(
        name=split,
        shards=len(shards),
        samples=sum(shard.num_sequences for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        sources=dict.fromkeys((source.name for source in dataset.sources), 0),
        counts=np.zeros(dataset.tokenizer.vocab_size, np.int64),
        lengths=np.zeros(width, np.int64),
        unknowns=np.zeros(width, np.int64) if "unk" in special else None,
        labels=(0, 0) if layout.labels else None,
        special=special,
        pad=pad,
    )
    first_id = dataset.first_id(split)
    for shard in shards:
        _count(found, dataset, shard, first_id, examples)
        first_id += shard.num_sequences
    return found


def _count(found: Split, dataset: ShardSet, shard: Shard, first_id: int, examples: int) -> None:
    ids = dataset.read(shard)
    sources = dataset.read_sources(shard)
    check_sources(dataset, shard, sources)
    labels = dataset.read_labels(shard, verify=False) if found.labels is not None else None
    names = [source.name for source in dataset.sources]
    for index, samples in enumerate(np.bincount(sources, minlength=len(names)).tolist()):
        found.sources[names[index]] += samples
    if labels is not None and found.labels is not None:
        other = int(labels.sum())
        found.labels = found.labels[0] + len(labels) - other, found.labels[1] + other
    step = max(1, CHUNK_TOKENS // dataset.layout.seq_len)
    for first in range(0, len(ids), step):
        rows = ids[first : first + step]  # [n, T]
        check_ids(dataset, shard, rows, first)
        found.counts += np.bincount(rows.ravel(), minlength=len(found.counts))
        lengths = np.full(len(rows), rows.shape[1])
        if found.pad is not None:
            lengths -= (rows == found.pad).sum(axis=1)
        found.lengths += np.bincount(lengths, minlength=len(found.lengths))
        unknown = np.zeros(len(rows), np.int64)
        if found.unknowns is not None:
            unknown = (rows == found.special["unk"]).sum(axis=1)
            found.unknowns += np.bincount(unknown, minlength=len(found.unknowns))
        for row in range(min(len(rows), examples - len(found.examples))):
            at = first + row
            found.examples.append(
                Example(
                    id=first_id + at,
                    source=names[sources[at]],
                    length=int(lengths[row]),
                    unknown=int(unknown[row]),
                    label=None if labels is None else int(labels[at]),
                    ids=rows[row].tolist(),
                )
            )


def report(
    dataset: ShardSet, splits: Sequence[Split], decode: Decode | None = None, width: int = 100
) -> str:
    """The folder as text for people, lines of samples cut at ``width`` columns."""
    tokenizer, layout = dataset.tokenizer, dataset.layout
    blocks = [
        _pairs(
            [
                ("folder", dataset.name),
                ("objective", dataset.objective),
                ("tokens", f"{layout.seq_len} per sample, {layout.dtype}"),
                ("stride", f"{layout.stride} bytes"),
                ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"),
                ("special ids", ", ".join(f"{k} {v}" for k, v in tokenizer.special_ids.items())),
                ("seed", str(dataset.seed)),
                ("fingerprint", dataset.fingerprint),
            ]
        ),
        _origins(dataset.sources),
    ]
    if dataset.accounts:
        blocks.append(f"of the text\n{_pairs(_accounts(dataset.accounts), indent=2)}")
    for split in splits:
        heading = f"{shown(split.name)}: {split.shards} shards, {split.samples:,} samples, {split.bytes:,} bytes"
        blocks.append(f"{heading}\n{_pairs(_figures(split), indent=2)}")
        blocks.append(_sources(split))
        if split.examples:
            blocks.append(_examples(split, decode, width))
    return "\n\n".join(blocks)


def _accounts(accounts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("documents", f"{accounts.get('documents', 0):,}")]
    for kind, said in (("skipped", "skipped"), ("bad", "bad:")):
        reasons = accounts.get(kind, {})
        rows += [(f"{said} {reason}", f"{count:,}") for reason, count in reasons.items()]
    for split, packing in accounts.get("packing", {}).items():
        dropped, tokens = packing.get("dropped", 0), packing.get("tokens", 0)
        of = f"of {tokens:,} tokens ({_share(dropped, tokens)})"
        rows.append((f"dropped of {split}", f"{dropped:,} {of}"))
    return rows


def _origins(sources: Sequence[Source]) -> str:
    # Shards that other programs wrote may not say how many tokens a source has.
    known = any(source.tokens for source in sources)
    lines = [["source", "documents", "tokens", "weight"]]
    for source in sources:
        tokens = f"{source.tokens:,}" if known else "-"
        lines.append([shown(source.name), f"{source.documents:,}", tokens, f"{source.weight:g}"])
    return _aligned(lines, left=(0,))


def _figures(split: Split) -> list[tuple[str, str]]:
    everything = split.tokens + split.padding
    low, middle, high = _quantiles(split.lengths)
    rows = [
        ("tokens", f"{split.tokens:,}, {split.text:,} of them text"),
        ("padding", f"{split.padding:,} ({_share(split.padding, everything)})"),
        ("unknown", "the vocabulary has no unknown token"),
        ("ids used", f"{split.used:,} of {len(split.counts):,}"),
        ("length", f"{low:,} to {high:,} tokens, the median is {middle:,}"),
    ]
    if split.unknown is not None:
        share = _share(split.unknown, split.text)
        rows[2] = "unknown", f"{split.unknown:,} ({share} of the text)"
    if split.labels is not None:
        follows, random = (_share(count, split.samples) for count in split.labels)
        rows.append(
            ("labels", f"0 in {follows}: B follows A in the text; 1 in {random}: B is random")
        )
    return rows


def _sources(split: Split) -> str:
    lines = [["source", "samples", "share"]]
    for name, samples in split.sources.items():
        lines.append([shown(name), f"{samples:,}", _share(samples, split.samples)])
    return _aligned(lines, left=(0,))


def _examples(split: Split, decode: Decode | None, width: int) -> str:
    pairs = split.labels is not None
    lines = [["id", "source", "length", "unknown", *(["label"] if pairs else [])]]
    for example in split.examples:
        label = [str(example.label)] if pairs else []
        cells = [str(example.id), shown(example.source), str(example.length)]
        lines.append([*cells, str(example.unknown), *label])
    texts = ["ids" if decode is None else "text"]
    texts += [as_text(example, split.pad, decode) for example in split.examples]
    drawn = _aligned(lines, left=(1,)).split("\n")
    return "\n".join(
        f"{line}  {_cut(text, width - len(line) - 2)}"
        for line, text in zip(drawn, texts, strict=True)
    )


def as_text(example: Example, pad: int | None, decode: Decode | None) -> str:
    """A sample on one line: special tokens in sight, padding as a number, ids where none decodes."""
    ids = example.ids
    end = len(ids)
    while end and ids[end - 1] == pad:
        end -= 1
    text = " ".join(map(str, ids[:end])) if decode is None else decode(ids[:end])
    return on_a_line(f"{text} (and {len(ids) - end} of padding)" if end < len(ids) else text)


def shown(text: str) -> str:
    """The text with nothing in it that a terminal would obey: what does not print stands escaped."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def on_a_line(text: str) -> str:
    """The same, of text that flows: lines go on after a space."""
    return shown(re.sub(r"[ \t\r\n]+", " ", text).strip(" "))


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) == "Zs":  # a space of some width
        return " "
    return letter.encode("unicode_escape").decode("ascii")


def _cut(text: str, width: int) -> str:
    # Columns, not letters: those of Chinese and Japanese take two.
    columns, room = 0, max(width, 20)
    for at, letter in enumerate(text):
        columns += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if columns > room - 3 and len(text) - at > 3:
            return f"{text[:at]}..."
    return text


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _quantiles(histogram: NDArray[np.int64]) -> tuple[int, int, int]:
    # The smallest, the median and the largest value that a histogram counted.
    known = np.flatnonzero(histogram)
    if not len(known):
        return 0, 0, 0
    middle = int(np.searchsorted(np.cumsum(histogram), (histogram.sum() + 1) // 2))
    return int(known[0]), middle, int(known[-1])


def _pairs(rows: Sequence[tuple[str, str]], indent: int = 0) -> str:
    lines = [(shown(left), shown(right)) for left, right in rows]
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{' ' * indent}{left:<{width}}  {right}".rstrip() for left, right in lines)


def _aligned(lines: list[list[str]], left: tuple[int, ...]) -> str:
    # Columns `left` to the left, figures to the right.
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join(
            f"  {cell:{'<' if at in left else '>'}{width}}"
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def as_json(
    dataset: ShardSet, splits: Sequence[Split], decode: Decode | None = None
) -> dict[str, Any]:
    """All of the report and the histograms behind the plot, as values for JSON."""
    tokenizer, layout = dataset.tokenizer, dataset.layout
    return {
        "folder": dataset.name,
        "fingerprint": dataset.fingerprint,
        "objective": dataset.objective,
        "seq_len": layout.seq_len,
        "dtype": layout.dtype,
        "labels": layout.labels,
        "stride": layout.stride,
        "seed": dataset.seed,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "special_ids": dict(tokenizer.special_ids),
        },
        "sources": [
            {
                "name": source.name,
                "sha256": source.sha256,
                "documents": source.documents,
                "tokens": source.tokens,
                "weight": source.weight,
            }
            for source in dataset.sources
        ],
        "accounts": dict(dataset.accounts),
        "splits": {split.name: _split_json(split, decode) for split in splits},
    }


def _split_json(split: Split, decode: Decode | None) -> dict[str, Any]:
    return {
        "shards": split.shards,
        "samples": split.samples,
        "bytes": split.bytes,
        "tokens": split.tokens,
        "text_tokens": split.text,
        "padding": split.padding,
        "padding_share": _ratio(split.padding, split.tokens + split.padding),
        "unknown": split.unknown,
        "unknown_share": None if split.unknown is None else _ratio(split.unknown, split.text),
        "ids_used": split.used,
        "labels": None if split.labels is None else list(split.labels),
        "sources": {
            name: {"samples": samples, "share": _ratio(samples, split.samples)}
            for name, samples in split.sources.items()
        },
        "samples_by_length": split.lengths.tolist(),  # [T + 1]
        "samples_by_unknown": None if split.unknowns is None else split.unknowns.tolist(),
        "examples": [
            {
                "id": example.id,
                "source": example.source,
                "length": example.length,
                "unknown": example.unknown,
                "label": example.label,
                "ids": example.ids,
                "text": None if decode is None else decode(example.ids),
            }
            for example in split.examples
        ],
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise where no plot can be written, before what is drawn has taken an hour to read."""
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ValueError(f"{file}: a plot is a PNG; give it a name that ends in .png")
    if not file.parent.is_dir():
        raise SiftError(f"{file}: no folder {file.parent}; make it, or plot somewhere else")
    if file.is_dir():
        raise SiftError(f"{file}: a folder; give the plot another name")


def plot(splits: Sequence[Split], path: str | os.PathLike[str]) -> None:
    """Draw as PNG how many samples have how many tokens, and how many unknown ones."""
    check_plot(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SiftError("a plot needs `matplotlib`; pip install 'siftloader[log]'") from error
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    left, right = figure.subplots(1, 2)
    left.set_title("Tokens of a sample, without padding", loc="left", weight="bold")
    _draw(left, [split.lengths for split in splits], "tokens")
    right.set_title("Unknown tokens of a sample", loc="left", weight="bold")
    unknowns = [split.unknowns for split in splits if split.unknowns is not None]
    if unknowns:
        _draw(right, unknowns, "unknown tokens")
    else:
        right.text(0.5, 0.5, "the vocabulary has no unknown token", ha="center", va="center")
        right.set_axis_off()
    curves = left.get_legend_handles_labels()[0]
    names = [
        f"{split.name}: {split.samples:,} samples, {_share(split.padding, split.tokens + split.padding)} "
        f"padding" + f", {_share(split.unknown or 0, split.text)} unknown" * bool(unknowns)
        for split in splits
    ]
    figure.legend(curves, names, loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _draw(axes: Any, histograms: Sequence[NDArray[np.int64]], what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    # Ten values at least: a lone bar would fill the panel and say nothing of its place.
    last = max(9, *(_quantiles(histogram)[2] for histogram in histograms))
    width = -(-(last + 1) // BARS)  # values in a bar
    bars = -(-(last + 1) // width)
    for number, histogram in enumerate(histograms):
        counted = np.zeros(bars * width, np.int64)
        known = histogram[: last + 1]
        counted[: len(known)] = known
        heights = counted.reshape(bars, width).sum(axis=1)
        edges = width * np.arange(bars + 1) - 0.5
        color = COLORS[number % len(COLORS)]
        axes.stairs(heights, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(heights, edges, color=color, linewidth=1.4, label="a split")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # so that a single sample is seen
    axes.set_ylabel("samples (log scale)")
    axes.set_xlabel(what if width == 1 else f"{what} (bars {width} wide)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
