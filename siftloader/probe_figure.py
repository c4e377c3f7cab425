"""What a probe found, as a picture: what each exit layer keeps against what it costs, and how it ranks.

    draw(probe(model, shards), "probe.png")

Needs matplotlib.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from siftloader.errors import SiftError
from siftloader.forks import Trial
from siftloader.probes import Probe


COLORS = (
    *("#1f4e8c", "#c8442b", "#3a8a5f", "#8a5fa8", "#b8862b", "#4a4a4a"),
    *("#3ba7c4", "#d472a3"),
)
MUTED = "#6b6b6b"
ACROSS = ("axes fraction", "data")


def draw(found: Probe, path: str | os.PathLike[str], tried: Trial | None = None) -> None:
    """Draw as PNG what each exit selects against what it costs, and how it ranks; SiftError without matplotlib.

    The title is the verdict: that of a trial, where there was one.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SiftError("a plot needs `matplotlib`; pip install 'siftloader[log]'") from error
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    parts = figure.subplot_mosaic([["gain", "overlap"], ["gain", "sigma"]], width_ratios=(8, 5))
    names = dict.fromkeys(each.criterion for each in found.choices)
    colors = dict(zip(names, cycle(COLORS), strict=False))
    _draw_gain(parts["gain"], found, colors)
    _draw_overlap(parts["overlap"], found, colors)
    _draw_sigma(parts["sigma"], found)
    handles, labels = parts["gain"].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=len(labels) if len(labels) <= 6 else 4,
        frameon=False,
        fontsize=9,
    )
    for axes in parts.values():
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{found.model}: {_verdict(found) if tried is None else _verdict_tried(found, tried)}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=14)
    figure.savefig(path, dpi=150, format="png")


def _verdict(found: Probe) -> str:
    best = found.best
    if best is None:
        return found.verdict
    whose = f", {best.called}" if found.pays else f"; best was {best.called}"
    return f"{found.verdict}{whose}, at a speed of {best.speed:.2f} ± {best.speed_half_width:.2f}"


def _verdict_tried(found: Probe, tried: Trial) -> str:
    if tried.half_width is None:
        return f"{found.candidate.called} was tried, and {tried.verdict}"
    gain = f"{tried.gain:+.3f} ± {tried.half_width:.3f} nats in equal time"
    return f"{tried.verdict}; {found.candidate.called} was tried, {gain}"


def _draw_gain(axes: Any, found: Probe, colors: Mapping[str, str]) -> None:
    known = [each for each in found.choices if math.isfinite(each.rho)]
    axes.set_title("What is kept, against what choosing costs", loc="left")
    axes.set_xlabel("cost of scoring a pool, in % of a plain training step")
    axes.set_ylabel("rho: mean loss of the kept over mean loss of all")
    dearest = 100 * max((each.cost for each in known), default=1.0) * 1.12
    halves = [0 if math.isnan(each.rho_half_width) else each.rho_half_width for each in known]
    lows = [each.rho - half for each, half in zip(known, halves, strict=True)]
    highs = [each.rho + half for each, half in zip(known, halves, strict=True)]
    bottom, top = min([1.0, *lows]), max([1.0, found.rho_full, *highs])
    margin = 0.09 * max(top - bottom, 0.01)
    bottom, top = bottom - margin, top + margin
    axes.set_xlim(0, dearest)
    axes.set_ylim(bottom, top)
    edge = [1, 1 + dearest / 100]
    axes.fill_between([0, dearest], bottom, edge, color="#c8442b", alpha=0.07, linewidth=0)
    axes.fill_between(
        [0, dearest], edge, [max(top, edge[1])] * 2, color="#3a8a5f", alpha=0.09, linewidth=0
    )
    axes.plot([0, dearest], edge, color=MUTED, linewidth=1.4)
    most = "the most there is: rho of the highest losses"
    axes.axhline(found.rho_full, color=MUTED, linestyle=":", linewidth=1.2, label=most)
    out = min(dearest, 100 * (top - 1))  # where the line leaves the picture
    axes.text(
        *(0.4 * out, 1 + 0.004 * out, "break-even: rho = 1 + cost"),
        rotation=math.degrees(math.atan(0.01)),
        transform_rotates_text=True,
        rotation_mode="anchor",
        ha="center",
        va="top",
        color=MUTED,
        fontsize=8.5,
    )
    for number, (name, color) in enumerate(colors.items()):
        row = [
            (each, half)
            for each, half in zip(known, halves, strict=True)
            if each.criterion == name
        ]
        aside = (
            0.006 * dearest * (number - (len(colors) - 1) / 2)
        )  # criteria that share a pass cost alike
        costs = [100 * each.cost + aside for each, _ in row]
        axes.plot(costs, [each.rho for each, _ in row], color=color, linewidth=1, alpha=0.35)
        axes.plot([], [], "o", color=color, label=name)
        for cost, (each, half) in zip(costs, row, strict=True):
            place, face = (cost, each.rho), color if each.follows else "white"
            axes.errorbar(*place, half, fmt="o", color=color, mfc=face, ms=7, capsize=3, lw=1.2)
            offset = (7, 4) if number % 2 == 0 else (7, -12)
            axes.annotate(
                str(each.layer), place, offset, textcoords="offset points", color=color, fontsize=9
            )
            if each == found.best:
                axes.plot(*place, "o", ms=16, mfc="none", mec=color, mew=1.6)
    if not all(each.follows for each in known):
        axes.plot(
            [], [], "o", color=MUTED, mfc="white", label="ranks otherwise than the whole model"
        )
    if found.best is not None:
        axes.plot(
            [], [], "o", ms=12, mfc="none", mec=MUTED, mew=1.4, label="fastest: rho / (1 + cost)"
        )


def _draw_overlap(axes: Any, found: Probe, colors: Mapping[str, str]) -> None:
    axes.set_title("How much of the whole model's choice is kept", loc="left")
    places = _places(found)
    for name, color in colors.items():
        row = [each for each in found.choices if each.criterion == name]
        axes.errorbar(
            [places[str(each.layer)] for each in row],
            [100 * each.overlap for each in row],
            [0 if math.isnan(each.overlap_half_width) else 100 * each.overlap_half_width for each in row],
            fmt="o-", color=color, ms=4.5, capsize=2.5, lw=1.4,
        )  # fmt: skip
    for height, text in ((found.keep, "chance"), (found.asked, "asked for")):
        axes.axhline(100 * height, color=MUTED, linestyle=":", linewidth=1.2)
        _say(axes, text, (1, 100 * height), ACROSS)
    # Of few pools an interval may be wider than all there is.
    axes.set_ylim(max(axes.get_ylim()[0], -3), 103)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.set_xticks(list(places.values()), [])


def _draw_sigma(axes: Any, found: Probe) -> None:
    axes.set_title("Noise of the early losses, sigma", loc="left")
    places = _places(found)
    sigmas = {str(each.layer): each.sigma for each in found.choices}
    axes.plot(
        list(places.values()),
        [sigmas[name] for name in places],
        "o-",
        color="#4a4a4a",
        ms=4.5,
        lw=1.4,
    )
    if math.isfinite(found.sigma_max):
        axes.axhspan(0, found.sigma_max, color="#3a8a5f", alpha=0.12, linewidth=0)
        below = "below this, rho > 1 (Corollary 2)"
        _say(axes, below, (0.99, found.sigma_max), ACROSS, (0, -4))
    highest = max((each for each in sigmas.values() if math.isfinite(each)), default=1.0)
    floor = 0.0 if math.isnan(found.sigma_max) else found.sigma_max
    axes.set_ylim(0, 1.12 * max(highest, floor, 1e-3))
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlabel("exit layer")


def _say(
    axes: Any,
    text: str,
    place: tuple[float, float],
    coordinates: Any,
    offset: tuple[float, float] = (0, 3),
) -> None:
    axes.annotate(
        text,
        place,
        offset,
        coordinates,
        "offset points",
        ha="right",
        va="bottom" if offset[1] > 0 else "top",
        color=MUTED,
        fontsize=8.5,
    )


def _places(found: Probe) -> dict[str, int]:
    layers = dict.fromkeys(str(each.layer) for each in found.choices)
    return {layer: number for number, layer in enumerate(layers)}
