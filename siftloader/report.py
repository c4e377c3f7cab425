"""What a comparison found, for people: a table for the terminal, a page to look at.

    results = read_results("runs/compare")
    print(table(results, control="plain"))
    write_page(results, "runs/compare/report.html", selection_logs=[Selections("runs/x.parquet")])

The page is one HTML file with its figures inside: nothing is fetched, no script runs, the same results give
the same bytes. Needs numpy and, for the page, matplotlib; pyarrow for selection logs.

The figures and tables are those of the paper (Das et al., ICML 2024) in the runs' own numbers: held-out
accuracy and loss against samples and against time, accuracy and scoring time by criterion and exit layer.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.comparison import (
    LEVEL,
    Difference,
    Measure,
    Name,
    Worth,
    differences,
    ends,
    noise,
    t_quantile,
    worth,
)
from siftloader.errors import SiftError
from siftloader.results import Results, Run
from siftloader.selection_report import (
    Group,
    Table,
    by_length,
    by_sample,
    by_source,
    extremes,
    read_log,
)
from siftloader.shards import write_atomically


RANDOM = "random"
EMPHASISED = 7  # curves that are told apart by colour; the others are grey
AUDITS = {
    "rho": "rho: mean loss of the kept over mean loss of all",
    "overlap": "overlap of the kept with the full model's choice",
    "spearman": "rank correlation of scores with the full model's",
}


@dataclass(frozen=True)
class Selections:
    """A selection log to show, and maybe how to find what stands behind its ids.

    ``texts`` turns ids into texts, ``sources`` are the names of the sources by number; ``note`` is what the
    reader should know of them.
    """

    folder: str | os.PathLike[str]
    texts: Callable[[list[int]], dict[int, str]] | None = None
    sources: Sequence[str] = ()
    note: str = ""


# ---- what is told of an arm


@dataclass(frozen=True)
class _Line:
    # An arm in the table: means over its finished seeds, and its differences.
    arm: str
    seeds: int
    samples: float
    seconds: float
    loss: float
    accuracy: float
    control: Difference | None
    random: Difference | None
    worth: Worth


def _lines(results: Results, experiment: str, control: str) -> list[_Line]:
    """The control and its random twin first, then arms from low to high loss, other budgets last."""
    found = ends(results.of(experiment))
    against = differences(results, experiment, control)
    random = differences(results, experiment, RANDOM) if control != RANDOM else {}
    lines = []
    for arm, runs in found.items():
        finals = [run.end for run in runs.values() if run.end is not None]
        lines.append(
            _Line(
                arm,
                len(finals),
                float(np.mean([end.samples for end in finals])),
                float(np.mean([end.seconds for end in finals])),
                float(np.mean([end.loss for end in finals])),
                float(np.mean([end.accuracy for end in finals])),
                against.get(arm),
                random.get(arm) if Name.of(arm).base != control else None,
                worth(results, experiment, arm, control),
            )
        )

    def place(line: _Line) -> tuple[Any, ...]:
        name = Name.of(line.arm)
        if name.base == control:
            return (0, "") if name.budget == 1 else (3, name.budget)
        return (1, "") if line.arm == RANDOM else (2, math.isnan(line.loss), line.loss, line.arm)

    return sorted(lines, key=place)


def _rows(lines: Sequence[_Line], control: str) -> list[list[str]]:
    """The table as text, headings first; columns that no arm fills are left out."""
    rows = [
        [
            *("arm", "seeds", "samples", "seconds", "loss", f"minus {control}", f"minus {RANDOM}"),
            *("accuracy", "speed-up", "verdict"),
        ]
    ]
    for line in lines:
        one = line.control
        told = "" if one is None else one.verdict + "†" * (not one.holds)
        own = Name.of(line.arm).base == control
        rows.append(
            [
                line.arm,
                str(line.seeds),
                f"{line.samples:,.0f}",
                _count(line.seconds),
                _figure(line.loss),
                _signed(one, line.seeds),
                _signed(line.random, line.seeds),
                "" if math.isnan(line.accuracy) else f"{line.accuracy:.2%}",
                "" if own else _speed(line.worth),
                told,
            ]
        )
    filled = [any(row[column] for row in rows[1:]) for column in range(len(rows[0]))]
    return [[cell for cell, keep in zip(row, filled, strict=True) if keep] for row in rows]


def _signed(found: Difference | None, seeds: int) -> str:
    if found is None or not math.isfinite(found.mean):
        return ""
    scale, unit = (100, " points") if found.measure == "accuracy" else (1, "")
    digits = 2 if found.measure == "accuracy" else 4
    told = f"{scale * found.mean:+.{digits}f}"
    if found.half_width is not None:
        told += f" ± {scale * found.half_width:.{digits}f}"
    return told + unit + (f" ({len(found.seeds)} seeds)" if len(found.seeds) < seeds else "")


def _speed(found: Worth) -> str:
    if found.bound == "?":
        return ""
    return f"{'' if found.bound == '=' else found.bound + ' '}{found.factor:.2f}"


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _summary(results: Results, experiment: str, control: str, lines: Sequence[_Line]) -> str:
    """One or two sentences: how the arms ended."""
    found = [line.control for line in lines if line.control is not None]
    if not found:
        return f"Nothing here can be compared with {control}."
    count = {said: sum(one.verdict == said for one in found) for said in _VERDICTS}
    told = ", ".join(f"{number} {_VERDICTS[said]}" for said, number in count.items() if number)
    arms = f"{len(found)} arm{'s' * (len(found) > 1)}"
    best = min(found, key=lambda one: one.mean if math.isfinite(one.mean) else math.inf)
    sentence = f"Of {arms} compared with {control}: {told}."
    if math.isfinite(best.mean):
        sentence += f" The lowest: “{best.arm}”, {_signed(best, len(best.seeds))} nats."
    return sentence


_VERDICTS = {
    "better": "better",
    "level": "level",
    "inconclusive": "inconclusive",
    "worse": "worse",
    "one seed": "with one seed only",
    "no seed": "without a seed in common",
    "diverged": "diverged",
}


def _notes(results: Results, experiment: str, control: str, lines: Sequence[_Line]) -> list[str]:
    """What a reader must know to read the table, in plain words; only what applies."""
    found = [line.control for line in lines if line.control is not None]
    notes = ["loss: held out, nats, mean over seeds at the end of training."]
    if found:
        notes.append(
            f"minus {control}: the same seed in both arms, the mean of those differences and the half-width "
            f"of its 95 % interval (Student's t); below 0 is better. better, worse: the interval leaves "
            f"out 0; level: it lies within {LEVEL['loss']} nats of 0; inconclusive: more seeds would tell."
        )
    if sum(one.p is not None for one in found) > 1:
        notes.append(
            f"{len(found)} arms were compared with {control}: by chance alone, about one in twenty equal arms "
            f"is called better or worse. Marked †: a verdict that does not survive Holm's correction for that."
        )
    if any(line.random for line in lines):
        notes.append(
            f"minus {RANDOM}: the same against a random choice from the same candidates, which shows what "
            f"the score adds."
        )
    if any(_speed(line.worth) for line in lines):
        budgets = sorted(
            Name.of(line.arm).budget for line in lines if Name.of(line.arm).base == control
        )
        notes.append(
            f"speed-up: how much more time {control} needs for the same loss, scoring charged; {control} was "
            f"run at {', '.join(f'{budget:g}' for budget in budgets)} of its budget, its learning rate "
            f"decayed at each, with straight lines in log time between; > and <: beyond those. The "
            f"paper's is 57 h / 43 h = 1.33."
        )
    if told := noise(results, experiment):
        notes.append(
            f"repeats: the same arm under the same seed ends {told.deviation:.4f} nats apart (one standard "
            f"deviation, {told.runs} runs): what the machine alone does."
        )
    if unfinished := [run for run in results.unfinished if run.experiment == experiment]:
        names = ", ".join(f"{run.arm} (seed {run.seed})" for run in unfinished[:6])
        more = f" and {len(unfinished) - 6} more" * (len(unfinished) > 6)
        notes.append(f"not finished, and left out: {names}{more}.")
    return notes


def table(results: Results, control: str = "plain") -> str:
    """Every experiment as a table of its arms, with footnotes.

    Raises SiftError where no experiment has the control among its finished runs.
    """
    _check_control(results, control)
    blocks = []
    for experiment in results.experiments:
        lines = _lines(results, experiment, control)
        if not lines:
            blocks.append(f"{experiment}\nNo run has finished.")
            continue
        notes = "\n".join(
            textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="      ")
            for note in _notes(results, experiment, control, lines)
        )
        said = _summary(results, experiment, control, lines)
        blocks.append(f"{experiment}\n{said}\n\n{_aligned(_rows(lines, control))}\n\n{notes}")
    return "\n\n\n".join(blocks)


def _check_control(results: Results, control: str) -> None:
    arms = {arm for name in results.experiments for arm in ends(results.of(name))}
    if not arms:
        raise SiftError(
            f"{len(results.runs)} runs, and none has finished; there is nothing to compare until one has"
        )
    if not any(Name.of(arm).base == control for arm in arms):
        raise SiftError(
            f"no finished run of an arm {control!r} to compare with, only {', '.join(sorted(arms))}; name "
            f"one of them as the control"
        )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    # Names to the left, figures to the right, the verdict (last) to the left again.
    last = len(rows[0]) - 1 if rows[0][-1] == "verdict" else len(rows[0])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column in (0, last) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ---- figures


# Colours are named here and given in the style sheet, so that they suit light and dark. Matplotlib knows
# only numbers: these stand for the names until the figure is text.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
BETTER, WORSE = "#010206", "#010207"
SERIES = [f"#01030{number}" for number in range(EMPHASISED)]
_STYLE = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BETTER: "better",
    WORSE: "worse",
    **{color: f"series{number}" for number, color in enumerate(SERIES)},
}


def _svg(name: str, alt: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """A figure as SVG that stands in HTML: its own ids, colours of the page, text as text."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SiftError(
            "the figures of a page need `matplotlib`; pip install 'siftloader[log]'"
        ) from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "axes.unicode_minus": False,
    }
    whole = io.StringIO()
    with rc_context(style), warnings.catch_warnings():
        # The browser has letters that matplotlib's font, which only measures them, has not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(whole, format="svg", metadata=nothing, transparent=True)
    text = whole.getvalue()
    text = re.sub(r"<[^<>]+>", lambda tag: _for_page(tag[0], name), text[text.index("<svg") :])
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    titled = f'<title id="{name}-title">{_e(alt)}</title>'
    text = text.replace("<svg", head, 1)
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + titled, text, count=1)


def _for_page(tag: str, name: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(
            r' (?:width|height)="[^"]*"', "", tag
        )  # the page decides; viewBox has the shape
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    for color, word in _STYLE.items():
        tag = tag.replace(color, f"var(--{word})")
    return re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px var(--font)", tag)


@dataclass(frozen=True)
class _Curve:
    # Mean over seeds, and half the 95 % interval of its difference from the control there.
    arm: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    half: NDArray[np.float64] | None


def _curve(
    arm: str,
    runs: Mapping[int, Run],
    control: Mapping[int, Run],
    along: Callable[[Any], float],
    value: Callable[[Any], float],
) -> _Curve | None:
    points = {seed: _points(run, along, value) for seed, run in runs.items()}
    steps = sorted(set.intersection(*(set(found) for found in points.values())))
    if not steps:
        return None
    x = np.array(
        [[found[step][0] for step in steps] for found in points.values()]
    )  # [seeds, steps]
    y = np.array([[found[step][1] for step in steps] for found in points.values()])
    half = None
    pairs = [row for row, seed in enumerate(points) if seed in control]
    if len(pairs) > 1 and control is not runs:
        apart = []
        for row in pairs:
            other = np.array(sorted(_points(control[[*points][row]], along, value).values()))
            if not len(other):
                return _Curve(arm, x.mean(0), y.mean(0), None)
            apart.append(y[row] - np.interp(x[row], other[:, 0], other[:, 1]))
        half = np.std(apart, axis=0, ddof=1) / math.sqrt(len(pairs)) * t_quantile(len(pairs) - 1)
    return _Curve(arm, x.mean(0), y.mean(0), half)


def _points(
    run: Run, along: Callable[[Any], float], value: Callable[[Any], float]
) -> dict[int, tuple[float, float]]:
    # By step. The last one is evaluated twice, on as much text as the others and on all of it: the
    # former belongs to the curve.
    found: dict[int, tuple[float, float]] = {}
    for one in run.evaluations:
        point = (float(along(one)), float(value(one)))
        if math.isfinite(point[1]):
            found.setdefault(one.step, point)
    return found


def _colors(lines: Sequence[_Line], control: str) -> dict[str, str]:
    """A colour for at most EMPHASISED arms: control, random, then the lowest losses; no budgets."""
    drawn = [line.arm for line in lines if Name.of(line.arm).budget == 1]
    palette = iter(SERIES)
    found = {}
    for arm in drawn[:EMPHASISED]:
        found[arm] = INK if arm == control else MUTED if arm == RANDOM else next(palette)
    return found


def _draw_curves(
    axes: Any,
    curves: Sequence[_Curve],
    colors: Mapping[str, str],
    inches: float,
    rungs: NDArray[np.float64] | None = None,
    zoom: bool = True,
) -> None:
    """Curves with their names where they end; those without a colour thin and nameless.

    ``rungs`` [2, n] are where the control ends at its budgets; ``inches`` is the height of a panel.
    """
    for curve in sorted(curves, key=lambda curve: curve.arm in colors):
        color = colors.get(curve.arm)
        dot = "o" if len(curve.x) == 1 else None
        if color is None:
            axes.plot(curve.x, curve.y, color=GRID, linewidth=1, marker=dot, zorder=1)
            continue
        if curve.half is not None:
            low, high = curve.y - curve.half, curve.y + curve.half
            axes.fill_between(curve.x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(curve.x, curve.y, color=color, linewidth=1.8, marker=dot, markersize=4)
    if rungs is not None:
        axes.plot(*rungs, "o--", color=MUTED, linewidth=1, markersize=3.5, zorder=1)
    named = [curve for curve in curves if curve.arm in colors]
    if zoom:
        _zoom(axes, named)
    axes.grid(True, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(_thousands)
    _name_ends(axes, [(c.x[-1], c.y[-1], _short(c.arm), colors[c.arm]) for c in named], inches)


def _zoom(axes: Any, curves: Sequence[_Curve]) -> None:
    # The first drop is a hundred times what arms differ by: the second half is looked at.
    last = max(float(curve.x[-1]) for curve in curves)
    values = np.concatenate([curve.y[curve.x >= last / 2] for curve in curves])
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0.3 * last, last * 1.005)


def _name_ends(axes: Any, named: Sequence[tuple[float, float, str, str]], inches: float) -> None:
    bottom, top = axes.get_ylim()
    gap = 13 / 72 / inches  # a line of text, as a share of the panel
    inside = sorted(named, key=lambda one: one[1])
    places = _apart([(y - bottom) / (top - bottom) for _, y, _, _ in inside], gap)
    for place, (x, y, name, color) in zip(places, inside, strict=True):
        axes.annotate(
            name,
            (x, min(max(y, bottom), top)),
            (1.025, place),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            color=color,
            fontweight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "alpha": 0.5,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved as little as needed to stand ``gap`` apart: groups share their middle."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _middle(groups[-1]) - _middle(groups[-2]) < gap * (
            (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] = groups[-1] + last
    found = []
    for group in groups:
        first = _middle(group) - gap * (len(group) - 1) / 2
        found += [first + gap * number for number in range(len(group))]
    for number in reversed(
        range(len(found))
    ):  # not above the panel, and better below than on others
        found[number] = min(found[number], 1 - gap * (len(found) - 1 - number))
    return found


def _middle(group: Sequence[float]) -> float:
    return sum(group) / len(group)


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _short(name: str) -> str:
    name = _plain(name)
    return name if len(name) <= 28 else f"{name[:27]}…"


def _curves_figure(
    results: Results, experiment: str, control: str, lines: Sequence[_Line], name: str, time: bool
) -> str:
    found = ends(results.of(experiment))
    colors = _colors(lines, control)
    longest = max(line.seconds for line in lines)
    unit, seconds = _unit(longest)
    what = f"{unit} charged, scoring included" if time else "samples backpropagated"

    def along(one: Any) -> float:
        return one.seconds / seconds if time else float(one.samples)

    panels: list[tuple[str, Callable[[Any], float]]] = [
        ("held-out accuracy, %", lambda one: 100 * one.accuracy),
        ("held-out loss, nats", lambda one: float(one.loss)),
    ]
    drawn = []
    for title, value in panels:
        curves = [
            _curve(arm, runs, found.get(control, {}), along, value)
            for arm, runs in found.items()
            if Name.of(arm).budget == 1
        ]
        real = [curve for curve in curves if curve is not None]
        if any(curve.arm in colors for curve in real):
            drawn.append((title, value, real))
    if not drawn:
        return ""
    ladder = [line.arm for line in lines if Name.of(line.arm).base == control]
    ladder.sort(key=lambda arm: Name.of(arm).budget)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, value, curves) in zip(all_axes, drawn, strict=True):
            rungs = None
            if time and len(ladder) > 1:
                last = [
                    [(along(run.end), value(run.end)) for run in found[arm].values()]
                    for arm in ladder
                ]
                rungs = np.array([np.mean(rung, axis=0) for rung in last]).T
            _draw_curves(axes, curves, colors, 2.5, rungs)
            axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        all_axes[-1].set_xlabel(what)

    alt = f"{experiment}: {' and '.join(title for title, _, _ in drawn)} against {what}"
    return _svg(name, alt, (9, 0.6 + 3.1 * len(drawn)), draw)


def _unit(longest: float) -> tuple[str, float]:
    for name, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 3 * seconds:
            return name, seconds
    return "seconds", 1.0


def _forest(found: Sequence[Difference], control: str, name: str) -> str:
    """Paired differences with intervals, best on top, a dot per seed."""
    shown = [one for one in found if math.isfinite(one.mean)]
    measure: Measure = shown[0].measure
    scale = 100 if measure == "accuracy" else 1
    unit = "points" if measure == "accuracy" else "nats"
    sign = -1 if measure == "accuracy" else 1  # a better arm stands higher
    shown.sort(key=lambda one: sign * one.mean, reverse=True)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        level = scale * LEVEL[measure]
        axes.axvspan(-level, level, color=GRID, alpha=0.55, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, one in enumerate(shown):
            color = {"better": BETTER, "worse": WORSE}.get(one.verdict, INK)
            values = [scale * value for value in one.values]
            axes.plot(
                values, [row - 0.26] * len(values), "o", color=MUTED, markersize=3, alpha=0.75
            )
            if one.half_width is not None:
                axes.errorbar(
                    scale * one.mean,
                    row,
                    xerr=scale * one.half_width,
                    color=color,
                    linewidth=2.2,
                    capsize=4,
                    capthick=1.6,
                )
            axes.plot(scale * one.mean, row, "o", color=color, markersize=7)
            axes.text(
                1.02,
                row,
                f"{_signed(one, len(one.seeds))}, {one.verdict}{'†' * (not one.holds)}",
                transform=axes.get_yaxis_transform(),
                va="center",
                color=color,
            )
        axes.set_yticks(range(len(shown)), [_short(one.arm) for one in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=10)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel(f"{measure} minus that of {_short(control)}, {unit}")
        sides = ("better", "worse") if measure == "loss" else ("worse", "better")
        for place, side, align in (
            (0.0, f"← {sides[0]}", "left"),
            (1.0, f"{sides[1]} →", "right"),
        ):
            axes.text(
                place,
                1.02,
                side,
                transform=axes.transAxes,
                ha=align,
                color=BETTER if "better" in side else WORSE,
            )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(True, axis="x", linewidth=0.6)

    told = "; ".join(f"{_plain(one.arm)} {_signed(one, 0)}, {one.verdict}" for one in shown[::-1])
    alt = f"{measure} minus that of {control}, by arm: {told}"
    return _svg(name, alt, (9, 1.3 + 0.46 * len(shown)), draw)


def _audit_figure(
    results: Results, experiment: str, control: str, lines: Sequence[_Line], name: str
) -> str:
    """What scoring at full depth said beside the exit, where the logs have it; else nothing."""
    found = ends(results.of(experiment))
    colors = _colors(lines, control)
    drawn = []
    for field, title in AUDITS.items():
        curves = [
            _curve(arm, runs, {}, lambda one: float(one.samples), _field(field))
            for arm, runs in found.items()
            if Name.of(arm).budget == 1
        ]
        real = [curve for curve in curves if curve is not None]
        if any(curve.arm in colors for curve in real):
            drawn.append((title, real))
    if not drawn:
        return ""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(all_axes, drawn, strict=True):
            _draw_curves(axes, curves, colors, 1.6, zoom=False)
            axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        all_axes[-1].set_xlabel("samples backpropagated")

    titles = ", ".join(title for title, _ in drawn)
    return _svg(name, f"{experiment}: {titles}", (9, 0.6 + 2.2 * len(drawn)), draw)


def _field(name: str) -> Callable[[Any], float]:
    def value(one: Any) -> float:
        found = one.fields.get(name)
        return float(found) if isinstance(found, int | float) else math.nan

    return value


def _histograms(log: Table, name: str, what: str) -> str:
    """Scores of the kept and the dropped in three thirds of the steps."""
    step, score, kept = (log[column].to_numpy() for column in ("step", "score", "kept"))
    real = np.isfinite(score)
    if not real.any():
        return ""
    step, score, kept = step[real], score[real].astype(np.float64), kept[real]
    low, high = np.quantile(score, (0.002, 0.998))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 49)
    first, last = int(step.min()), int(step.max())
    thirds = np.minimum((step - first) * 3 // max(1, last - first + 1), 2)
    panels = [number for number in range(3) if (thirds == number).any()]

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, number in zip(all_axes, panels, strict=True):
            here = thirds == number
            for chosen, color in ((~kept, SERIES[1]), (kept, SERIES[0])):
                counts, _ = np.histogram(score[here & chosen], edges)
                share = counts / max(1, int(here.sum()))
                axes.stairs(share, edges, fill=True, color=color, alpha=0.3)
                axes.stairs(share, edges, color=color, linewidth=1.4)
            steps = step[here]
            title = f"steps {int(steps.min()):,} to {int(steps.max()):,}"
            axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
            axes.set_xlabel("score")
            axes.set_yticks([])
            axes.spines[["top", "right", "left"]].set_visible(False)
        for line, (word, color) in enumerate((("kept", SERIES[0]), ("dropped", SERIES[1]))):
            all_axes[0].text(
                *(0.02, 0.94 - 0.09 * line, word),
                transform=all_axes[0].transAxes,
                color=color,
                fontweight="bold",
                va="top",
            )

    return _svg(name, f"{what}: scores of kept and dropped candidates", (9, 2.8), draw)


# ---- the page


def write_page(
    results: Results,
    path: str | os.PathLike[str],
    *,
    control: str = "plain",
    selection_logs: Sequence[Selections] = (),
) -> None:
    """Write one self-contained HTML file: tables, figures, settings, and what was selected.

    Raises SiftError where no experiment has the control, a selection log cannot be read, or matplotlib is
    missing.
    """
    _check_control(results, control)
    selected = [_selections(log, number) for number, log in enumerate(selection_logs)]  # may fail
    found = [_experiment(results, name, control, n) for n, name in enumerate(results.experiments)]
    page = _PAGE.replace("CONTENT", "\n".join(found + selected))
    write_atomically(Path(path), page.encode("utf-8"))


def _experiment(results: Results, experiment: str, control: str, number: int) -> str:
    lines = _lines(results, experiment, control)
    name = f"e{number}"
    parts = [f"<h2>{_e(experiment)}</h2>"]
    if not lines:
        return _section([*parts, '<p class="lead">No run has finished.</p>'])
    parts.append(f'<p class="lead">{_e(_summary(results, experiment, control, lines))}</p>')
    measured = any(not math.isnan(line.accuracy) for line in lines)
    measures: list[Measure] = ["loss", "accuracy"] if measured else ["loss"]
    for measure in measures:
        found = [*differences(results, experiment, control, measure).values()]
        if any(math.isfinite(one.mean) for one in found):
            words = f"Each arm minus {control}: held-out {measure}"
            picture = _forest(found, control, f"{name}-{measure}")
            caption = (
                "Large dot and bar: mean over seeds and its 95 % interval; small dots: one seed each, the "
                "same in both arms. Grey: too small to care for."
            )
            parts.append(_figure_html(words, picture, caption))
    parts.append(_table_html("How each arm ended", _rows(lines, control)))
    notes = _notes(results, experiment, control, lines)
    parts.append("<ul class='notes'>" + "".join(f"<li>{_e(n)}</li>" for n in notes) + "</ul>")
    colors = _colors(lines, control)
    grey = sum(Name.of(line.arm).budget == 1 for line in lines) > len(colors)
    for time, words in (
        (False, "Figure 1. Against samples backpropagated"),
        (True, "Figure 2. Against the time charged"),
    ):
        picture = _curves_figure(
            results, experiment, control, lines, f"{name}-{'time' if time else 'samples'}", time
        )
        caption = (
            f"Means over seeds. Where an arm's band leaves {control}'s line out, the two differ: it is the 95 % "
            f"interval of their difference, paired by seed. The beginning leaves the picture, so that the end can be seen."
        )
        caption += " Grey: the other arms." * grey
        if time and any(Name.of(line.arm).budget != 1 for line in lines):
            caption += f" Dots on a dashed line: where {control} ends at other budgets."
        if picture:
            parts.append(_figure_html(words, picture, caption))
    parts += _paper_tables(results, experiment, control)
    if audit := _audit_figure(results, experiment, control, lines, f"{name}-audit"):
        parts.append(
            _figure_html("Audits: the exit against full depth", audit, "Means over seeds.")
        )
    parts += _settings_html(results.of(experiment))
    return _section(parts)


def _paper_tables(results: Results, experiment: str, control: str) -> list[str]:
    """Accuracy and scoring seconds by criterion and exit layer, of arms whose settings name both."""
    found = ends(results.of(experiment))
    against = differences(results, experiment, control, "accuracy")
    cells: dict[tuple[str, str], list[tuple[str, list[Run]]]] = {}
    for arm, runs in found.items():
        settings = next(iter(runs.values())).settings
        criterion, layer = settings.get("criterion"), settings.get("exit_layer")
        if Name.of(arm) == Name(arm) and arm != control and criterion and layer is not None:
            cells.setdefault((str(criterion), str(layer)), []).append((arm, [*runs.values()]))
    if not cells:
        return []
    criteria = sorted({criterion for criterion, _ in cells})
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (len(layer), layer))
    plain = [*found.get(control, {}).values()]

    def accuracy(runs: Sequence[Run]) -> str:
        mean = float(np.mean([run.end.accuracy for run in runs if run.end is not None]))
        if math.isnan(mean):
            return ""
        paired = against.get(Name.of(runs[0].arm).base)
        return f"{mean:.2%}" + (f" ({_signed(paired, len(runs))})" if paired else "")

    def told(say: Callable[[Sequence[Run]], str]) -> list[list[str]]:
        rows = [["criterion", *(f"exit layer {layer}" for layer in layers)]]
        if said := say(plain) if plain else "":
            rows.append([f"{control} (nothing is scored)", said, *[""] * (len(layers) - 1)])
        for criterion in criteria:
            row = []
            for layer in layers:
                here = [(arm, say(runs)) for arm, runs in cells.get((criterion, layer), [])]
                several = len(here) > 1
                row.append(
                    "; ".join(f"{arm}: {said}" if several else said for arm, said in here if said)
                )
            rows.append([criterion, *row])
        return rows

    tables = []
    for title, say in (
        (
            f"Table 1. Held-out accuracy (and minus {control}) by criterion and exit layer",
            accuracy,
        ),
        ("Table 2. Seconds of scoring by criterion and exit layer", _scoring),
    ):
        rows = told(say)
        if any(cell for row in rows[1:] for cell in row[1:]):
            tables.append(_table_html(title, rows))
    return tables


def _scoring(runs: Sequence[Run]) -> str:
    found = []
    for run in runs:
        if run.end is not None:
            seconds = run.settings.get("seconds_scoring", run.end.fields.get("seconds_scoring"))
            if isinstance(seconds, int | float) and math.isfinite(seconds):
                found.append((float(seconds), run.end.seconds))
    scoring, all_of_it = map(sum, zip(*found, strict=True)) if found else (0.0, 0.0)
    if not scoring:
        return ""
    share = f" ({scoring / all_of_it:.1%} of all)" if all_of_it > 0 else ""
    return f"{_count(scoring / len(found))} s{share}"


def _settings_html(runs: Sequence[Run]) -> list[str]:
    """What all runs share, once; what differs, arm by arm."""
    by_run = [(run.arm, _flat(run.settings)) for run in runs]
    names = sorted({name for _, settings in by_run for name in settings})
    if not names:
        return []
    shared: list[str] = []
    differing: list[str] = []
    for name in names:
        values = {settings.get(name) for _, settings in by_run}
        (shared if len(values) == 1 else differing).append(name)
    parts = ["<details><summary>Settings, machine and versions of the runs</summary>"]
    if shared:
        rows = [["setting", "value"], *([name, by_run[0][1][name]] for name in shared)]
        parts.append(_table_html("The same in all runs", rows, figures=False))
    if differing:
        rows = [["arm", *differing]]
        for arm in sorted({arm for arm, _ in by_run}):
            row = []
            for name in differing:
                own = sorted(
                    {settings.get(name, "") for other, settings in by_run if other == arm}
                )
                row.append(", ".join(own[:3]) + f", … ({len(own)})" * (len(own) > 3))
            rows.append([arm, *row])
        parts.append(_table_html("What differs", rows, figures=False))
    return [*parts, "</details>"]


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            told = value if isinstance(value, str) else json.dumps(value)
            found[above + name] = "none" if value is None else told
    return found


def _selections(log: Selections, number: int) -> str:
    rows = read_log(log.folder)
    name = Path(log.folder).name
    parts = [f"<h2>What was selected: {_e(name)}</h2>"]
    kept = float(rows["kept"].to_numpy().mean())
    samples = by_sample(rows)
    parts.append(
        f'<p class="lead">{len(rows):,} candidates scored, {kept:.1%} of them kept; {len(samples):,} '
        f"different samples.</p>"
    )
    if picture := _histograms(rows, f"s{number}", name):
        caption = "Each panel a third of the steps; areas are shares of the candidates."
        parts.append(_figure_html("Scores of the kept and the dropped", picture, caption))
    for words, found in zip(("Kept most", "Kept least"), extremes(samples, 12), strict=True):
        said = log.texts([row["id"] for row in found]) if log.texts else {}
        cells = [["id", "seen", "kept", "mean score", *["text"] * bool(said)]]
        for row in found:
            score = "-" if row["score"] is None else f"{row['score']:.3f}"
            cells.append([str(row["id"]), str(row["seen"]), str(row["kept"]), score])
            if said:
                cells[-1].append(said.get(row["id"], ""))
        parts.append(_table_html(words, cells))
    groups = (
        ("Kept by length (labelled positions)", by_length(rows)),
        ("Kept by source", by_source(rows, names=log.sources)),
    )
    for words, group in groups:
        if len(group) > 1:
            parts.append(_table_html(words, _group_rows(group)))
    if log.note:
        parts.append(f'<p class="notes">{_e(log.note)}</p>')
    return _section(parts)


def _group_rows(groups: Iterable[Group]) -> list[list[str]]:
    rows = [["", "candidates", "kept", "mean score"]]
    for group in groups:
        score = f"{group.score:.3f}" if math.isfinite(group.score) else "-"
        rows.append([group.name, f"{group.rows:,}", f"{group.share:.1%}", score])
    return rows


def _section(parts: Iterable[str]) -> str:
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _figure_html(title: str, picture: str, caption: str) -> str:
    return (
        f'<figure><h3>{_e(title)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{_e(title)}">{picture}</div><figcaption>{_e(caption)}</figcaption></figure>'
    )


def _table_html(title: str, rows: Sequence[Sequence[str]], figures: bool = True) -> str:
    head = "".join(f'<th scope="col"{_WORDS.get(cell, "")}>{_e(cell)}</th>' for cell in rows[0])
    body = []
    for row in rows[1:]:
        cells = [_cell(cell, rows[0][column]) for column, cell in enumerate(row) if column]
        body.append(f'<tr><th scope="row">{_e(row[0])}</th>{"".join(cells)}</tr>')
    return (
        f'<h3>{_e(title)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{_e(title)}">'
        f"<table{' class=figures' * figures}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}"
        f"</tbody></table></div>"
    )


_WORDS = {"verdict": ' class="word"', "text": ' class="word text"'}  # these stand to the left


def _cell(text: str, heading: str) -> str:
    if heading == "verdict" and text.rstrip("†") in ("better", "worse"):
        return f'<td class="word {text.rstrip("†")}">{_e(text)}</td>'
    return f"<td{_WORDS.get(heading, '')}>{_e(text)}</td>"


def _plain(text: str) -> str:
    """What neither prints nor is a space is not handed to a browser."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _e(text: str) -> str:
    return html.escape(_plain(text))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What the runs found</title>
<style>
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --page: #ffffff; --ink: #1b1f24; --muted: #5c6670; --grid: #d9dee3; --stripe: #f6f7f9;
  --better: #0a6b3d; --worse: #b3261e;
  --series0: #0b6e99; --series1: #c2571b; --series2: #7a3e9d; --series3: #4d7c0f; --series4: #b8326f;
  --series5: #806000; --series6: #00776c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e8eaed; --muted: #a2abb4; --grid: #363d44; --stripe: #1b1f24;
    --better: #6fd39b; --worse: #ff8f85;
    --series0: #5ab7e3; --series1: #f2965c; --series2: #c79be3; --series3: #a5d063; --series4: #f78fbb;
    --series5: #dcbb55; --series6: #4fc9bb;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 0 0 0.25rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 0.4rem; }
section { border-top: 1px solid var(--grid); padding-top: 1.5rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; margin: 0.25rem 0 0; max-width: 48rem; }
figure { margin: 0; }
figcaption, .notes { color: var(--muted); font-size: 0.875rem; max-width: 52rem; }
ul.notes { padding-left: 1.1rem; }
ul.notes li { margin: 0.2rem 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--series0); }
svg { display: block; width: 100%; min-width: 38rem; height: auto; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.35; min-width: 50%; }
th, td { padding: 0.35rem 0.7rem 0.35rem 0; text-align: left; vertical-align: top; }
td, tbody th { border-top: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
table.figures td, table.figures thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.figures thead th { white-space: normal; }
table.figures thead th:first-child { text-align: left; }
table.figures .word, table.figures thead .word { text-align: left; }
table.figures td.text { white-space: normal; overflow-wrap: anywhere; min-width: 18rem; }
td.better { color: var(--better); font-weight: 700; }
td.worse { color: var(--worse); font-weight: 700; }
details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 600; }
@media print { .scroll { overflow: visible; } svg { min-width: 0; } details > * { display: block; } }
</style>
</head>
<body>
<main>
<h1>What the runs found</h1>
CONTENT
</main>
</body>
</html>
"""
