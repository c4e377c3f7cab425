"""What a comparison found, drawn: pictures as SVG that stand in a page.

    curves(results, "gpt", "plain", ["plain", "loss"], "e0-samples", time=False)     # "<svg ..."
    forest(differences(results, "gpt", "plain").values(), "plain", "e0-loss")

Every function returns one ``<svg>`` element, or "" where there is nothing to draw. Ids begin with ``name``,
which must be another one for every picture of a page; colours are variables of the page's style sheet:
--ink, --muted, --grid, --better, --worse and --series0 to --series6. The same input gives the same bytes,
whatever matplotlib is set to. Needs matplotlib.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.comparison import (
    LEVEL,
    RANDOM,
    Difference,
    Measure,
    Name,
    direction,
    ends,
    signed,
)
from siftloader.errors import SiftError
from siftloader.intervals import t_quantile
from siftloader.results import Evaluation, Results, Run
from siftloader.selection_report import Table


EMPHASISED = 7  # curves that are told apart by colour; the others are grey
BANDED = 3  # seeds from which a band is drawn: of two it would hide all else
AUDITS = {
    "rho": "rho: mean loss of the kept over mean loss of all",
    "overlap": "overlap of the kept with the whole model's choice",
    "spearman": "rank correlation of scores with the whole model's",
    "sigma": "sigma: deviation of log(loss at the exit / loss)",
    "scoring_cost": "cost of scoring, in steps without it",
}


# ---- SVG


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
        from matplotlib import rc_context, rcdefaults, rcParams
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
    with rc_context(), warnings.catch_warnings():
        rcdefaults()  # not what somebody set for figures of their own
        rcParams.update(style)
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
    titled = f'<title id="{name}-title">{escaped(alt)}</title>'
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


# ---- curves


NOWHERE: NDArray[np.float64] = np.empty((2, 0))


@dataclass(frozen=True)
class _Curve:
    # Mean over seeds, and half the 95 % interval of its difference from the control there: nan where the
    # control has no line.
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
    plain = {}  # [2, points] by seed
    for seed, run in control.items():
        if found := _points(run, along, value):
            plain[seed] = np.array(sorted(found.values())).T
    paired = [seed for seed in points if seed in plain]
    both = [[points[seed][step] for step in steps] for seed in paired or points]
    x, y = np.moveaxis(np.array(both), 2, 0)  # [seeds, steps] each
    middle, level = x.mean(0), y.mean(0)
    if control is runs or not paired:
        return _Curve(arm, middle, level, None)
    # Seeds differ by more than arms do: what the other seeds of the control add, they add here too.
    at = {seed: np.interp(middle, *curve) for seed, curve in plain.items()}
    level += np.mean([*at.values()], axis=0) - np.mean([at[seed] for seed in paired], axis=0)
    if len(paired) < BANDED:
        return _Curve(arm, middle, level, None)
    lines = [plain[seed] for seed in paired]
    apart = [y[row] - np.interp(x[row], *line) for row, line in enumerate(lines)]
    half = np.std(apart, axis=0, ddof=1) / math.sqrt(len(paired)) * t_quantile(len(paired) - 1)
    for row, (along_control, _) in enumerate(
        lines
    ):  # where it has no line, nothing differs from it
        half[x[row] < along_control[0] * (1 - 1e-9)] = np.nan
        half[x[row] > along_control[-1] * (1 + 1e-9)] = np.nan
    return _Curve(arm, middle, level, half)


def _rungs(
    ladder: Mapping[str, Mapping[int, Run]],
    control: Mapping[int, Run],
    along: Callable[[Any], float],
    value: Callable[[Any], float],
) -> NDArray[np.float64]:
    """Where arms end, [2, n], as far from the end of the control as they are by seed; from left to right."""

    def lasts(runs: Mapping[int, Run]) -> dict[int, NDArray[np.float64]]:
        every = {seed: _points(run, along, value) for seed, run in runs.items()}
        return {seed: np.array([*found.values()][-1]) for seed, found in every.items() if found}

    plain = lasts(control)
    found = []
    for runs in ladder.values():
        here = lasts(runs)
        if paired := here.keys() & plain.keys():
            apart = np.mean([here[seed] - plain[seed] for seed in paired], axis=0)
            found.append(apart + np.mean([*plain.values()], axis=0))
    return np.array(sorted(map(tuple, found))).reshape(-1, 2).T


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


def colors(arms: Sequence[str], control: str) -> dict[str, str]:
    """A colour for the first EMPHASISED arms, no budgets among them."""
    drawn = [arm for arm in arms if Name.of(arm).budget == 1]
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
    rungs: NDArray[np.float64] = NOWHERE,
    zoom: bool = True,
) -> None:
    """Curves with their names where they end; those without a colour thin and nameless.

    ``rungs`` [2, n] are where the control ends at its budgets; ``inches`` is the height of a panel.
    """
    for curve in sorted(curves, key=lambda curve: curve.arm in colors):
        color = colors.get(curve.arm)
        dot = "o" if len(curve.x) == 1 else None
        if color is None:
            axes.plot(curve.x, curve.y, color=MUTED, alpha=0.4, linewidth=1, marker=dot, zorder=1)
            continue
        if curve.half is not None:
            low, high = curve.y - curve.half, curve.y + curve.half
            axes.fill_between(curve.x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(curve.x, curve.y, color=color, linewidth=1.8, marker=dot, markersize=4)
    if rungs.size:
        axes.plot(*rungs, "o--", color=MUTED, linewidth=1, markersize=3.5, zorder=1)
    named = [curve for curve in curves if curve.arm in colors]
    if zoom:
        _zoom(axes, named, rungs)
    axes.grid(True, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(_thousands)
    _name_ends(axes, [(c.x[-1], c.y[-1], _short(c.arm), colors[c.arm]) for c in named], inches)


def _zoom(axes: Any, curves: Sequence[_Curve], rungs: NDArray[np.float64]) -> None:
    # The first drop is a hundred times what arms differ by: the second half is looked at.
    last = max(float(curve.x[-1]) for curve in curves)
    seen = [(curve.x, curve.y) for curve in curves] + [tuple(rungs)] * bool(rungs.size)
    values = np.concatenate([y[x >= last / 2] for x, y in seen])
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)
    right = max(float(x.max()) for x, _ in seen)
    axes.set_xlim(0.3 * last, right * 1.005 or 1.0)


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
    name = printable(name)
    return name if len(name) <= 28 else f"{name[:27]}…"


def curves(
    results: Results, experiment: str, control: str, arms: Sequence[str], name: str, time: bool
) -> str:
    """Held-out accuracy and loss of finished runs against samples, or the ``time`` charged; mean over seeds.

    ``arms`` from the most to the least important: the first ones have colours.
    """
    found = ends(results.of(experiment))
    chosen = colors(arms, control)
    unit, seconds = _unit(
        max(run.end.seconds for runs in found.values() for run in runs.values() if run.end)
    )
    what = f"{unit} charged, scoring included" if time else "samples backpropagated"

    def along(one: Any) -> float:
        return one.seconds / seconds if time else float(one.samples)

    panels: list[tuple[str, Callable[[Any], float]]] = [
        ("held-out accuracy, %", lambda one: 100 * one.accuracy),
        ("held-out loss, nats", lambda one: float(one.loss)),
    ]
    drawn = []
    for title, value in panels:
        every = [
            _curve(arm, runs, found.get(control, {}), along, value)
            for arm, runs in found.items()
            if Name.of(arm).budget == 1
        ]
        real = [curve for curve in every if curve is not None]
        if any(curve.arm in chosen for curve in real):
            drawn.append((title, value, real))
    if not drawn:
        return ""
    ladder = sorted(
        (arm for arm in found if Name.of(arm).base == control), key=lambda arm: Name.of(arm).budget
    )

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, value, each) in zip(all_axes, drawn, strict=True):
            rungs = NOWHERE
            if time and len(ladder) > 1 and control in ladder:
                stairs = {arm: found[arm] for arm in ladder}
                rungs = _rungs(stairs, found[control], along, value)
            _draw_curves(axes, each, chosen, 2.5, rungs)
            axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        all_axes[-1].set_xlabel(what)

    alt = f"{experiment}: {' and '.join(title for title, _, _ in drawn)} against {what}"
    return _svg(name, alt, (9, 0.6 + 3.1 * len(drawn)), draw)


def _unit(longest: float) -> tuple[str, float]:
    for name, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 3 * seconds:
            return name, seconds
    return "seconds", 1.0


# ---- other pictures


def forest(found: Collection[Difference], control: str, name: str) -> str:
    """Paired differences with intervals, best on top, a dot per seed."""
    shown = [one for one in found if math.isfinite(one.mean)]
    if not shown:
        return ""
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
            color = {"better": BETTER, "worse": WORSE}.get(direction(one.verdict), INK)
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
                f"{signed(one, len(one.seeds))}, {one.verdict}{'†' * (not one.holds)}",
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

    told = "; ".join(
        f"{printable(one.arm)} {signed(one, 0)}, {one.verdict}" for one in shown[::-1]
    )
    alt = f"{measure} minus that of {control}, by arm: {told}"
    return _svg(name, alt, (9, 1.3 + 0.46 * len(shown)), draw)


def population(
    results: Results, experiment: str, control: str, arms: Sequence[str], name: str
) -> str:
    """Mean loss of all candidates by the whole model, where runs were audited; mean over seeds; else nothing."""
    found, chosen = _audited(results, experiment), colors(arms, control)
    every = [
        _curve(
            arm,
            runs,
            found.get(control, {}),
            lambda one: float(one.samples),
            lambda one: float(one.loss),
        )
        for arm, runs in found.items()
    ]
    # One pool a point: bands would hide the lines. The table of audits has paired differences.
    drawn = [replace(curve, half=None) for curve in every if curve is not None]
    if not any(curve.arm in chosen for curve in drawn):
        return ""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        _draw_curves(axes, drawn, chosen, 2.5)
        axes.set_title(
            "population loss, nats", loc="left", fontsize=10, color=INK, fontweight="bold"
        )
        axes.set_xlabel("samples backpropagated")

    alt = f"{experiment}: mean loss of all candidates against samples backpropagated"
    return _svg(name, alt, (9, 3.7), draw)


def audits(results: Results, experiment: str, control: str, arms: Sequence[str], name: str) -> str:
    """What audits said of the exit beside the whole model, where runs were audited; else nothing."""
    found, chosen = _audited(results, experiment), colors(arms, control)
    drawn = []
    for field, title in AUDITS.items():
        every = [
            _curve(arm, runs, {}, lambda one: float(one.samples), _field(field))
            for arm, runs in found.items()
        ]
        real = [curve for curve in every if curve is not None]
        if any(curve.arm in chosen for curve in real):
            drawn.append((title, real))
    if not drawn:
        return ""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, each) in zip(all_axes, drawn, strict=True):
            _draw_curves(axes, each, chosen, 1.6, zoom=False)
            axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        all_axes[-1].set_xlabel("samples backpropagated")

    titles = ", ".join(title for title, _ in drawn)
    return _svg(name, f"{experiment}: {titles}", (9, 0.6 + 2.2 * len(drawn)), draw)


def _audited(results: Results, experiment: str) -> dict[str, dict[int, Run]]:
    """Finished runs that were audited, with audits in the place of evaluations: loss is that of all candidates."""
    found: dict[str, dict[int, Run]] = {}
    for arm, runs in ends(results.of(experiment)).items():
        for seed, run in runs.items():
            if run.audits and Name.of(arm).budget == 1:
                found.setdefault(arm, {})[seed] = _as_audited(run)
    return found


def _as_audited(run: Run) -> Run:
    of_step = run.end.samples / run.end.step if run.end is not None and run.end.step else 0.0
    found = []
    for audit in run.audits:
        step, loss = audit["step"], audit.get("population_loss")
        value = float(loss) if isinstance(loss, int | float) else math.nan
        found.append(Evaluation(step, round(step * of_step), 0.0, value, fields=audit))
    return replace(run, evaluations=tuple(found))


def _field(name: str) -> Callable[[Any], float]:
    def value(one: Any) -> float:
        found = one.fields.get(name)
        return float(found) if isinstance(found, int | float) else math.nan

    return value


def histograms(log: Table, name: str, what: str) -> str:
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


# ---- text in pictures and pages


def printable(text: str) -> str:
    """What neither prints nor is a space is not handed to a browser."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def escaped(text: str) -> str:
    """Text that is nothing but text, in HTML and SVG."""
    return html.escape(printable(text))
