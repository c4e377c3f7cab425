"""python examples/convex_gsgd.py

Greedy SGD against SGD on convex problems: where choosing the highest of R losses wins, and where it stops winning.

Every step draws R samples and takes one gradient: SGD that of the first, greedy SGD (GSGD) that of the sample with the
highest loss, all from the same draws. Two problems, both with samples that contradict each other, as all real data
has:

    least squares          20 weights, 1,000 samples, one in 20 with a target that is off, always upwards
    logistic regression    20 weights, 1,000 samples, one in 20 with the wrong label

What to look for in the picture:

* the early win: greedy falls faster, in the bounds by the factor rho_R = (expected highest of R losses) / (mean loss);
* the floor (Remark 1): greedy ends at the weights where the *highest* of R losses is least, not the mean;
* the lower panels: rho_R along the way may stay high long after greedy has begun to lose. A high rho says that some
  samples are hard, not that learning them lowers the mean;
* the crossing: full dots where the measured curves cross, rings where the bounds do (Corollary 1). The bounds hold,
  and promise less than is found. Past the crossing, go on with plain SGD: a loader's `cooldown_steps` is that.

rho* is the least rho_R that was met on the way or at the minimiser, which is all that the proofs ask of it.

    python examples/convex_gsgd.py --candidates 2 4 16 --steps 100000
    python examples/convex_gsgd.py --quick --out quick.png        # two seconds, rough curves
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader import SiftError, theory


ROOT = Path(__file__).resolve().parent.parent
N, D = 1000, 20  # samples, weights
OFF = 20  # one sample in so many contradicts the others
BLOCK = 500  # steps whose candidates are drawn at once
FIRST = 3  # iteration that the picture begins with
COLOURS = ["#4c566a", "#d1495b", "#edae49", "#00798c", "#7b2d8b"]  # SGD, then each R
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Losses of a linear model, one per sample; ``link`` maps predictions and targets [..., n] to losses."""

    name: str
    a: Array  # [n, d]
    y: Array  # [n]
    link: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]  # of link, by the prediction
    best: Array  # w*, [d]
    L: float

    def losses(self, w: Array) -> Array:
        return self.link(w @ self.a.T, self.y)  # [..., d] -> [..., n]


@dataclass(frozen=True)
class Arm:
    """What SGD (R = 1) or GSGD did, and what the theorems say of it."""

    R: int
    loss: Array  # F of the mean iterate, mean over runs, at every mark
    bound: Array
    rho: Array  # rho_R at the iterates, mean over runs
    rho_star: float
    Delta: float
    bounds_cross: float  # iterations; Corollary 1
    meet: float  # the loss there
    curves_cross: float  # iterations; inf where they did not


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rng = np.random.default_rng(options.seed)
    began, found = time.perf_counter(), []
    print(
        f"Greedy SGD against SGD, {options.runs} runs of {options.steps:,} steps, "
        f"eta = {options.eta} / L, seed {options.seed}"
    )
    for problem in (least_squares(rng), logistic(rng)):
        marks, arms = compare(problem, options, rng)
        print(told(problem, marks, arms))
        found.append((problem, marks, arms))
    print(f"\n{time.perf_counter() - began:.0f} s")
    draw(found, options)
    print(f"{options.out}: the same as a picture")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--candidates", type=int, nargs="+", default=[2, 8], metavar="R", help="(2 8)")
    add("--steps", type=int, default=30_000, help="iterations K of each run (30,000)")
    add("--runs", type=int, default=32, help="the curves are their mean (32)")
    add("--eta", type=float, default=0.1, help="step size as a share of 1/L, below 1 (0.1)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="2,000 steps, 8 runs")
    add("--out", type=Path, default=ROOT / "runs" / "convex_gsgd.png", help="the picture")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.runs = 2_000, 8
    if not 0 < options.eta < 1:
        parser.error(f"--eta {options.eta}: need a share of 1/L between 0 and 1")
    if min(options.candidates) < 2 or len(options.candidates) >= len(COLOURS):
        parser.error(f"--candidates: need 1 to {len(COLOURS) - 1} numbers of at least 2")
    if options.steps < 10 or options.runs < 1:
        parser.error("need at least 10 steps and one run")
    return options


# ---- problems


def least_squares(rng: np.random.Generator) -> Problem:
    """f = (a . w - y)^2 / 2: smooth with L = max |a|^2."""
    a = rows(rng)
    y = a @ truth(rng) + 0.1 * rng.standard_normal(N)
    y[::OFF] += 1.5
    best = np.linalg.lstsq(a, y, rcond=None)[0]
    largest = float((a**2).sum(1).max())
    return Problem(
        "least squares", a, y, lambda z, y: (z - y) ** 2 / 2, lambda z, y: z - y, best, largest
    )


def logistic(rng: np.random.Generator) -> Problem:
    """f = log(1 + exp(-y a . w)): smooth with L = max |a|^2 / 4; its infimum 0 is never reached, which is enough."""
    a = rows(rng)
    y = np.sign(a @ truth(rng))
    y[::OFF] *= -1
    best = np.zeros(D)
    for _ in range(50):  # Newton's method
        p = falling(a @ best, y)
        gradient, curve = -(y * p) @ a, (a * (p * (1 - p))[:, None]).T @ a
        best = best - np.linalg.solve(curve, gradient)
    largest = float((a**2).sum(1).max() / 4)
    return Problem(
        "logistic regression",
        a,
        y,
        lambda z, y: np.logaddexp(0, -y * z),
        lambda z, y: -y * falling(z, y),
        best,
        largest,
    )


def rows(rng: np.random.Generator) -> Array:
    """Directions at random, of lengths 0.5 to 1, so that some samples say more than others; and a constant."""
    a = rng.standard_normal((N, D - 1))
    a *= rng.uniform(0.5, 1, (N, 1)) / np.linalg.norm(a, axis=1, keepdims=True)
    return np.concatenate([a, np.full((N, 1), 0.3)], axis=1)


def truth(rng: np.random.Generator) -> Array:
    w = rng.standard_normal(D)
    return w / np.linalg.norm(w) * 8


def falling(z: Array, y: Array) -> Array:
    """1 / (1 + exp(y z)): the chance that the model gives to the other label."""
    return np.exp(-np.logaddexp(0, y * z))


# ---- runs


def compare(
    problem: Problem, options: argparse.Namespace, rng: np.random.Generator
) -> tuple[NDArray[np.int64], list[Arm]]:
    """SGD and GSGD for every R, from one start and on the same draws; losses at marks, evenly spread over log K."""
    counts = [1, *options.candidates]
    marks = np.unique(np.geomspace(1, options.steps, 90).round().astype(np.int64))
    marked = set(marks.tolist())
    eta = options.eta / problem.L
    # Not from 0: there all losses of a logistic regression are equal, and so rho* would be 1.
    start = truth(rng)
    w = np.tile(start, (len(counts), options.runs, 1))
    total = np.zeros_like(w)
    loss: list[Array] = []
    ratios: list[Array] = []
    for k in range(1, options.steps + 1):
        if k % BLOCK == 1:
            drawn = rng.integers(0, N, (BLOCK, options.runs, max(counts)))
        total += w  # w_0 ... w_{k-1}
        if k in marked:
            loss.append(problem.losses(total / k).mean(axis=(1, 2)))
            now = problem.losses(w)
            ratios.append(np.stack([rho_of(each, R) for each, R in zip(now, counts, strict=True)]))
        step = drawn[(k - 1) % BLOCK]
        for arm, R in enumerate(counts):
            w[arm] -= eta * gradient(problem, w[arm], step[:, :R])
    curves = np.stack(loss, axis=1)  # [arms, marks]
    arms = []
    for arm, R in enumerate(counts):
        seen = np.stack([each[arm] for each in ratios])  # [marks, runs]
        D_0 = float(np.linalg.norm(start - problem.best))
        arms.append(judged(problem, R, eta, D_0, marks, curves[arm], curves[0], seen))
    return marks, arms


def gradient(problem: Problem, w: Array, drawn: NDArray[np.int64]) -> Array:
    """The gradient [runs, d] of the sample of highest loss among the candidates ``drawn`` [runs, R]."""
    z = np.einsum("rcd,rd->rc", problem.a[drawn], w)
    y = problem.y[drawn]
    taken = problem.link(z, y).argmax(axis=1)[:, None]
    z, y = np.take_along_axis(z, taken, 1), np.take_along_axis(y, taken, 1)
    row = np.take_along_axis(drawn, taken, 1)[:, 0]
    return problem.slope(z, y) * problem.a[row]


def rho_of(losses: Array, R: int) -> Array:
    return theory.rho(losses, R) if R > 1 else np.ones(len(losses))


def judged(
    problem: Problem,
    R: int,
    eta: float,
    D_0: float,
    marks: NDArray[np.int64],
    loss: Array,
    plain: Array,
    seen: Array,
) -> Arm:
    """The theorems for the problem as it is: F* and Delta_R at w*, and rho* as it was met."""
    there = problem.losses(problem.best)
    F_star = float(there.mean())
    if R == 1:
        bound = [theory.theorem_2(D_0, eta, problem.L, K, F_star) for K in marks.tolist()]
        return Arm(1, loss, np.array(bound), seen.mean(1), 1.0, F_star, math.inf, F_star, math.inf)
    Delta = float(theory.F_hat(there, R))
    rho_star = min(float(seen.min()), float(theory.rho(there, R)))
    bound = [theory.theorem_1(D_0, rho_star, eta, problem.L, K, Delta) for K in marks.tolist()]
    cross, meet = theory.corollary_1(D_0, rho_star, eta, problem.L, Delta, F_star)
    after = crossing(marks, loss, plain)
    return Arm(R, loss, np.array(bound), seen.mean(1), rho_star, Delta, cross, meet, after)


def crossing(marks: NDArray[np.int64], loss: Array, plain: Array) -> float:
    """The iteration from which ``loss`` stays above ``plain``; inf where it never does."""
    ahead = np.flatnonzero(loss <= plain)
    last = ahead[-1] if len(ahead) else 0
    if last == len(marks) - 1:
        return math.inf
    one, other = (float(loss[i] - plain[i]) for i in (last, last + 1))
    share = one / (one - other) if one != other else 0.0
    return float(marks[last]) * float(marks[last + 1] / marks[last]) ** share


# ---- what was found


def told(problem: Problem, marks: NDArray[np.int64], arms: list[Arm]) -> str:
    F_star = float(problem.losses(problem.best).mean())
    levels = (2.0, 1.5)
    lines = [
        f"\n{problem.name}: F* = {F_star:.4f}, L = {problem.L:.3f}",
        f"  {'':14}{'rho*':>6}{'Delta_R/F*':>12}{'K to 2 F*':>11}{'K to 1.5 F*':>13}"
        f"{'last loss/F*':>14}{'curves cross':>14}{'bounds cross':>14}{'at loss/F*':>12}",
    ]
    for arm in arms:
        reached = [first(marks, arm.loss, level * F_star) for level in levels]
        steps = f"{reached[0]:>11}{reached[1]:>13}"
        row = f"{arm.loss[-1] / F_star:>14.3f}"
        if arm.R == 1:
            lines.append(f"  {'SGD':14}{'':>6}{'':>12}" + steps + row)
            continue
        lines.append(
            f"  {f'GSGD, R = {arm.R}':14}{arm.rho_star:>6.2f}{arm.Delta / F_star:>12.2f}"
            + steps
            + row
            + f"{count(arm.curves_cross):>14}{count(arm.bounds_cross):>14}{arm.meet / F_star:>12.1f}"
        )
    return "\n".join(lines)


def first(marks: NDArray[np.int64], loss: Array, level: float) -> str:
    below = np.flatnonzero(loss <= level)
    return f"{marks[below[0]]:,}" if len(below) else "never"


def count(K: float) -> str:
    return f"{K:,.0f}" if math.isfinite(K) else "never"


def draw(
    found: list[tuple[Problem, NDArray[np.int64], list[Arm]]], options: argparse.Namespace
) -> None:
    """Losses above, rho along the way below, a column per problem."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SiftError("a plot needs `matplotlib`; pip install 'siftloader[examples]'") from error
    figure = Figure(figsize=(6.2 * len(found), 7.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine has
    grid = figure.subplots(2, len(found), squeeze=False, sharex="col", height_ratios=[2.4, 1])
    for column, (problem, marks, arms) in enumerate(found):
        loss_panel(grid[0, column], problem, marks, arms)
        rho_panel(grid[1, column], marks, arms)
    grid[0, 0].set_ylabel("loss F of the mean iterate, over F*")
    grid[1, 0].set_ylabel("rho_R at the iterates")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Choosing the highest of R losses: sooner down, and not all the way",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150, format="png")


def loss_panel(axes: Any, problem: Problem, marks: NDArray[np.int64], arms: list[Arm]) -> None:
    F_star = float(problem.losses(problem.best).mean())
    plain = arms[0].loss / F_star
    for arm, colour in zip(arms, COLOURS, strict=False):
        name = "SGD" if arm.R == 1 else f"greedy, R = {arm.R}"
        curve = arm.loss / F_star
        axes.plot(marks, curve, color=colour, linewidth=2.2, label=name, zorder=3)
        axes.plot(marks, arm.bound / F_star, color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
        if math.isfinite(arm.bounds_cross) and FIRST < arm.bounds_cross < marks[-1]:
            axes.plot(
                arm.bounds_cross,
                arm.meet / F_star,
                "o",
                markersize=9,
                markerfacecolor="white",
                markeredgecolor=colour,
                markeredgewidth=1.8,
                zorder=5,
            )
        if math.isfinite(arm.curves_cross):
            at = float(np.interp(math.log(arm.curves_cross), np.log(marks), plain))
            axes.plot(arm.curves_cross, at, "o", markersize=9, color=colour, zorder=5)
    grey = "#888888"
    axes.plot([], [], color=grey, linewidth=1.1, linestyle=(0, (4, 3)), label="bounds")
    axes.plot([], [], "o", color=grey, markersize=8, label="curves cross")
    axes.plot([], [], "o", color=grey, markersize=8, markerfacecolor="white", label="bounds cross")
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(
        "F*",
        (0, 1),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color="#666666",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    met = [arm.meet / F_star for arm in arms[1:] if arm.bounds_cross > FIRST]
    axes.set_xlim(FIRST, marks[-1])
    axes.set_ylim(0.85, 2 * max(plain[0], *met, 1.0))  # bounds begin far above
    axes.set_title(problem.name, loc="left", fontweight="bold")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def rho_panel(axes: Any, marks: NDArray[np.int64], arms: list[Arm]) -> None:
    for arm, colour in zip(arms[1:], COLOURS[1:], strict=False):
        axes.plot(marks, arm.rho, color=colour, linewidth=1.8)
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0.9)
    axes.set_xlabel("iterations K, one gradient each")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
