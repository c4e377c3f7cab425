"""What a selection log tells: which samples, lengths and sources win, and how the scores drift.

    table = read_log("runs/a/selections.parquet")         # pyarrow, one row per candidate
    print(report(table, top=10))
    plot_drift(drift(table, bins=60), "drift.png")

No row is looked at by Python: ten million take seconds. Needs numpy, pyarrow and, to draw, matplotlib.

Letters: N rows, B bins of steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import SiftError
from siftloader.shards import ShardSet


Table: TypeAlias = Any  # pyarrow.Table, imported by those who read one

COLUMNS = {
    "step": "int64",
    "rank": "int32",
    "pool": "int64",
    "position": "int32",
    "id": "int64",
    "score": "float",
    "kept": "bool",
    "labels": "int32",
    "source": "int32",
}
QUANTILES = (0.1, 0.5, 0.9)
KEPT, DROPPED, THRESHOLD = "#0b6e99", "#c2671b", "#222222"
_PART = re.compile(r"rank-(\d{5,})-part-(\d{6,})\.parquet")


def read_log(path: str | os.PathLike[str]) -> Table:
    """All rows of a selection log, sorted by (pool, rank, position), each once.

    A resumed run repeats pools; of rows with the same (rank, pool, position) that of the latest part
    counts. Raises SiftError where there is no log, or naming the part that is damaged.
    """
    arrow, parquet = _pyarrow()
    parts = _parts(Path(path))
    tables = []
    for part in parts:
        with _damage(part):
            table = parquet.read_table(
                part, columns=list(COLUMNS), page_checksum_verification=True, partitioning=None
            )
            found = {field.name: str(field.type) for field in table.schema}
            if found != COLUMNS:
                raise ValueError(f"columns {found}, needed are {COLUMNS}")
        tables.append(table.replace_schema_metadata(None))
    whole = arrow.concat_tables(tables)
    if not len(whole):
        raise SiftError(f"{path}: a selection log without a row; nothing was scored yet")
    return _latest(whole)


def ids_of(path: str | os.PathLike[str]) -> str:
    """What the ids of a log count, as its latest part says; "" where it does not."""
    _, parquet = _pyarrow()
    part = _parts(Path(path))[-1]
    with _damage(part):
        found = (parquet.read_schema(part).metadata or {}).get(b"siftloader.ids", b"")
    return str(found.decode())


def _parts(folder: Path) -> list[Path]:
    # Rank by rank, and of each the latest last: what is repeated comes later.
    if folder.is_file():
        raise SiftError(
            f"{folder}: a file, and a selection log is a folder of Parquet files; give that folder"
        )
    named = [
        ((int(match[1]), int(match[2])), entry)
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if (match := _PART.fullmatch(entry.name))
    ]
    if not named:
        raise SiftError(
            f"{folder}: no finished part of a selection log here (rank-00000-part-000000.parquet); "
            f"the first is written after a minute or 65,536 rows"
        )
    return [entry for _, entry in sorted(named)]


@contextmanager
def _damage(part: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these kinds
        raise SiftError(
            f"{part}: not a part of a selection log, or damaged ({error}); the others can be read "
            f"once it is moved out of the folder"
        ) from error


def _latest(table: Table) -> Table:
    pool, rank, position = (table[name].to_numpy() for name in ("pool", "rank", "position"))
    if len(table) < 2 or _rising(pool, rank, position).all():
        return table.combine_chunks()
    order = np.lexsort((position, rank, pool))  # stable: what is repeated stays in order
    rising = _rising(pool[order], rank[order], position[order])
    order = order[np.append(rising, True)]  # the last of each run of equals
    return table.combine_chunks().take(order)


def _rising(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    # [N - 1]: whether each row stands after the one before, by the first key that differs.
    after = np.zeros(len(keys[0]) - 1, np.bool_)
    for key in reversed(keys):
        after = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & after)
    return after


@dataclass(frozen=True)
class Group:
    """Rows that belong together: how many, which share was kept, their mean finite score."""

    name: str
    rows: int
    share: float
    score: float


def by_length(table: Table, bins: int = 8) -> list[Group]:
    """Kept share by the number of labelled positions, in ``bins`` groups of about equal size.

    Rows whose length is unknown are left out; [] if all are.
    """
    labels = table["labels"].to_numpy()
    known = labels >= 0
    if not known.any():
        return []
    edges = np.unique(
        np.quantile(labels[known], np.linspace(0, 1, bins + 1)[1:-1], method="higher")
    )
    # A group begins at its edge; a length that is common enough to be several edges is one group.
    group = np.searchsorted(edges, labels, side="right")
    found = []
    for number, rows in _slices(np.where(known, group, -1)):
        if number >= 0:
            low, high = int(labels[rows].min()), int(labels[rows].max())
            name = f"{low:,}" if low == high else f"{low:,}..{high:,}"
            found.append(_group(table, rows, name))
    return found


def by_source(
    table: Table, sources: NDArray[Any] | None = None, names: Sequence[str] = ()
) -> list[Group]:
    """Kept share by source; ``sources`` [N] stands in for the log's own where that knows none."""
    found = table["source"].to_numpy() if sources is None else sources
    groups = []
    for number, rows in _slices(found):
        name = "unknown" if number < 0 else f"source {number}"
        groups.append(_group(table, rows, names[number] if 0 <= number < len(names) else name))
    return groups


def _group(table: Table, rows: NDArray[np.int64], name: str) -> Group:
    scores = table["score"].to_numpy()[rows]
    real = scores[np.isfinite(scores)].astype(np.float64)
    share = float(table["kept"].to_numpy()[rows].mean())
    return Group(name, len(rows), share, float(real.mean()) if len(real) else np.nan)


def _slices(group: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    # Every group with the indices of its rows: one sort, not a pass per group.
    low = int(group.min()) if len(group) else 0
    small = len(group) > 0 and int(group.max()) - low < 1 << 16
    keys = (group - low).astype(np.uint16) if small else group  # 16 bits are sorted by radix
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=low - 1))
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        yield int(group[order[first]]), order[first:last]


def by_sample(table: Table) -> Table:
    """One row per sample: id, seen, kept, share, mean finite score, mean labels, source."""
    arrow, _ = _pyarrow()
    import pyarrow.compute as compute

    finite = compute.is_finite(table["score"])
    scores = compute.if_else(finite, table["score"], arrow.scalar(None, arrow.float32()))
    grouped = (
        arrow.table({name: table[name] for name in ("id", "kept", "labels", "source")})
        .append_column("score", scores)
        .group_by("id")
        .aggregate(
            [
                *(("id", "count"), ("kept", "sum"), ("score", "mean")),
                *(("labels", "mean"), ("source", "max")),
            ]
        )
    )
    seen = grouped["id_count"].to_numpy()
    kept = grouped["kept_sum"].to_numpy().astype(np.int64)
    return arrow.table(
        {
            "id": grouped["id"],
            "seen": seen,
            "kept": kept,
            "share": kept / seen,
            "score": grouped["score_mean"],
            "labels": grouped["labels_mean"],
            "source": grouped["source_max"],
        }
    )


def extremes(samples: Table, top: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The most and the least kept samples, ``top`` of each, among those seen at least twice.

    By share, then by how often they were seen, then by mean score. If every sample was seen once,
    all of them take part.
    """
    import pyarrow.compute as compute

    twice = samples.filter(compute.greater_equal(samples["seen"], 2))
    among = twice if len(twice) else samples
    found = []
    for direction in ("descending", "ascending"):
        keys = [("share", direction), ("seen", "descending"), ("score", direction)]
        index = compute.select_k_unstable(
            among, k=min(top, len(among)), sort_keys=[*keys, ("id", "ascending")]
        )
        found.append(among.take(index).to_pylist())
    return found[0], found[1]


@dataclass(frozen=True)
class Drift:
    """Scores over steps, in B bins that hold rows: quantiles 0.1, 0.5, 0.9, nan where none is finite.

    ``threshold`` is the median, over the pools of a bin, of the lowest kept score.
    """

    first: NDArray[np.int64]  # [B], the first step in the bin
    last: NDArray[np.int64]  # [B]
    rows: NDArray[np.int64]  # [B]
    kept: NDArray[np.float64]  # [B, 3]
    dropped: NDArray[np.float64]  # [B, 3]
    threshold: NDArray[np.float64]  # [B]


def drift(table: Table, bins: int) -> Drift:
    """Quantiles of kept and dropped scores in at most ``bins`` equal stretches of steps."""
    step, score, kept = (table[name].to_numpy() for name in ("step", "score", "kept"))
    finite = np.isfinite(score)
    low, high = int(step.min()), int(step.max())
    bins = min(bins, high - low + 1)
    stretch = (step - low) * bins // (high - low + 1)

    pool, rank = table["pool"].to_numpy(), table["rank"].to_numpy()
    begins = np.flatnonzero(np.append(True, (np.diff(pool) != 0) | (np.diff(rank) != 0)))
    lowest = np.minimum.reduceat(np.where(kept & finite, score, np.inf), begins)
    thresholds = dict.fromkeys(range(bins), np.nan)
    for number, pools in _slices(stretch[begins]):
        real = lowest[pools][np.isfinite(lowest[pools])]
        thresholds[number] = float(np.median(real)) if len(real) else np.nan

    found: list[tuple[Any, ...]] = []
    for number, rows in _slices(stretch):
        real = rows[finite[rows]]
        found.append(
            (
                int(step[rows].min()),
                int(step[rows].max()),
                len(rows),
                _quantiles(score[real[kept[real]]]),
                _quantiles(score[real[~kept[real]]]),
                thresholds[number],
            )
        )
    return Drift(*(np.array(column) for column in zip(*found, strict=True)))


def _quantiles(values: NDArray[np.float32]) -> NDArray[np.float64]:
    if not len(values):
        return np.full(len(QUANTILES), np.nan)
    return np.asarray(np.quantile(values, QUANTILES), np.float64)


def plot_drift(found: Drift, path: str | os.PathLike[str]) -> None:
    """Draw the drift as PNG: bands from the 10 % to the 90 % quantile, medians, the threshold."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise SiftError("a plot needs `matplotlib`; pip install 'siftloader[log]'") from error
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    axes = figure.add_subplot()
    steps = (found.first + found.last) / 2
    dot = "o" if len(steps) == 1 else None  # a line of one point would not be seen
    curves = [("threshold", THRESHOLD, found.threshold)]
    for name, color, (low, middle, high) in (
        ("kept", KEPT, found.kept.T),
        ("dropped", DROPPED, found.dropped.T),
    ):
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, middle, color=color, linewidth=2, marker=dot)
        curves.append((name, color, middle))
    axes.plot(steps, found.threshold, THRESHOLD, linewidth=1.2, dashes=(4, 2), marker=dot)
    axes.set_title("Scores of kept and dropped candidates", loc="left", weight="bold", pad=22)
    about = "lines: medians; bands: 10 % to 90 %; threshold: the lowest kept score of a pool"
    axes.text(0, 1.02, about, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0 if dot is None else None)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, steps, curves)
    figure.savefig(path, dpi=150, format="png")


def _label_ends(axes: Any, steps: Any, curves: list[tuple[str, str, Any]]) -> None:
    # Names stand where their lines end, pushed apart where the lines meet.
    ends = []
    for name, color, values in curves:
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            ends.append((float(values[known[-1]]), name, color))
    bottom, top = axes.get_ylim()
    place = -np.inf
    for value, name, color in sorted(ends):
        place = max((value - bottom) / (top - bottom), place + 0.05)
        axes.text(
            1.01,
            place,
            name,
            transform=axes.transAxes,
            va="center",
            color=color,
            fontweight="bold",
        )


def report(
    table: Table,
    *,
    top: int = 10,
    names: Sequence[str] = (),
    sources: NDArray[Any] | None = None,
    texts: Callable[[list[int]], dict[int, str]] | None = None,
) -> str:
    """The log as text for people. ``texts`` turns ids into what stands behind them."""
    samples = by_sample(table)
    blocks = [_summary(table, samples)]
    once = int(samples["seen"].to_numpy().max()) < 2
    for title, rows in zip(("Most kept", "Least kept"), extremes(samples, top), strict=True):
        said = texts([row["id"] for row in rows]) if texts else {}
        heading = f"{title} samples ({'all were seen once' if once else 'seen at least twice'})"
        blocks.append(f"{heading}\n{_samples(rows, said)}" if rows else "")
    blocks.append(_groups("Kept share by length (labelled positions)", by_length(table)))
    blocks.append(_groups("Kept share by source", by_source(table, sources, names)))
    blocks.append(f"Scores over steps\n{_drift(drift(table, 10))}")
    return "\n\n".join(block for block in blocks if block)


def _summary(table: Table, samples: Table) -> str:
    pool, rank, step, score = (
        table[name].to_numpy() for name in ("pool", "rank", "step", "score")
    )
    pools = 1 + int(((np.diff(pool) != 0) | (np.diff(rank) != 0)).sum())
    ranks = np.unique(rank)
    kept = int(table["kept"].to_numpy().sum())
    unscored = len(score) - int(np.isfinite(score).sum())
    rows = [
        ("rows", f"{len(table):,} in {pools:,} pools"),
        ("steps", f"{step.min():,}..{step.max():,}"),
        ("ranks", f"{len(ranks)} ({', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)})"),
        ("samples", f"{len(samples):,}, each seen {len(table) / len(samples):.1f} times"),
        ("kept", f"{kept / len(table):.1%}"),
    ]
    if unscored:
        rows.append(
            ("no score", f"{unscored:,} rows (without labels, or not finite): ranked last")
        )
    return "\n".join(f"{left:<9}{right}" for left, right in rows)


def _samples(rows: list[dict[str, Any]], said: dict[int, str]) -> str:
    lines = [["id", "seen", "kept", "share", "mean score", "labels"]]
    for row in rows:
        labels = f"{row['labels']:.0f}" if row["labels"] >= 0 else "-"
        score = _figure(row["score"])
        lines.append(
            [
                str(row["id"]),
                str(row["seen"]),
                str(row["kept"]),
                f"{row['share']:.0%}",
                score,
                labels,
            ]
        )
    drawn = _aligned(lines).split("\n")
    if not said:
        return "\n".join(drawn)
    texts = ["text", *(said.get(row["id"], "") for row in rows)]
    return "\n".join(f"{line}  {text}" for line, text in zip(drawn, texts, strict=True))


def _groups(title: str, groups: list[Group]) -> str:
    if not groups or [group.name for group in groups] == ["unknown"]:
        return f"{title}: not recorded"
    lines = [
        [group.name, f"{group.rows:,}", f"{group.share:.1%}", _figure(group.score)]
        for group in groups
    ]
    return f"{title}\n{_aligned([['', 'rows', 'kept', 'mean score'], *lines])}"


def _drift(found: Drift) -> str:
    lines = [
        ["steps", "rows", "dropped 10 %", "50 %", "90 %", "threshold", "kept 10 %", "50 %", "90 %"]
    ]
    for row in range(len(found.rows)):
        values = (*found.dropped[row], found.threshold[row], *found.kept[row])
        steps = f"{found.first[row]:,}..{found.last[row]:,}"
        lines.append([steps, f"{found.rows[row]:,}", *map(_figure, values)])
    return _aligned(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _aligned(lines: list[list[str]]) -> str:
    # The first column to the left, figures to the right.
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"  {line[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def sources_of(dataset: ShardSet, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The source of every id, uint8 [N]; ids count through the manifest."""
    _check_ids(dataset, ids)
    return np.concatenate([dataset.read_sources(shard) for shard in dataset.manifest])[ids]


def tokens_of(dataset: ShardSet, ids: Sequence[int]) -> dict[int, list[int]]:
    """The token ids of a few samples; each shard is opened once."""
    wanted = np.array(ids, np.int64)
    _check_ids(dataset, wanted)
    found: dict[int, list[int]] = {}
    first = 0
    for shard in dataset.manifest:
        here = wanted[(wanted >= first) & (wanted < first + shard.num_sequences)]
        if len(here):
            # A look, not training: the sha256 of a whole shard is not worth ten rows of it.
            rows = dataset.read(shard, verify=False)
            found |= {int(number): rows[number - first].tolist() for number in here}
        first += shard.num_sequences
    return found


def _check_ids(dataset: ShardSet, ids: NDArray[np.int64]) -> None:
    total = sum(shard.num_sequences for shard in dataset.manifest)
    if len(ids) and not (ids.min() >= 0 and ids.max() < total):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise SiftError(
            f"{dataset.name}: holds samples 0..{total - 1}, the log names {wrong}; give the shards "
            f"that the run was trained on"
        )


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SiftError(
            "a selection log is read with the `pyarrow` package; pip install 'siftloader[log]'"
        ) from error
    return pyarrow, pyarrow.parquet
