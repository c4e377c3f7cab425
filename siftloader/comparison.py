"""Which arm ended better than its control: paired by seed, with an interval, and what that is worth in time.

    found = difference(results, "gpt", "loss", "plain")
    found.mean, found.half_width, found.verdict           # -0.021, 0.008, "better"
    worth(results, "gpt", "loss", "plain").factor         # 1.2: plain needs 1.2 x the time for that loss

Two arms under one seed share initial weights and candidates, so most of what makes seeds differ cancels in
their difference. Only runs that ended count, and only seeds that both arms finished.

Names say what else is there: ``plain@0.71`` is plain training at 0.71 of the budget, its learning rate
decayed there; ``plain#1`` repeats ``plain`` under the same seeds. Needs numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from siftloader.intervals import CONFIDENCE, interval, t_quantile, within
from siftloader.results import Evaluation, Results, Run


Measure = Literal["loss", "accuracy"]

RANDOM = "random"  # the arm that chooses from the same candidates without looking at them
LEVEL = {"loss": 0.01, "accuracy": 0.003}  # nats; a share: differences too small to care for
_NAME = re.compile(r"(?P<base>.+?)(?:@(?P<budget>\d+(?:\.\d*)?))?(?:#(?P<repeat>\d+))?")


@dataclass(frozen=True)
class Name:
    """An arm's name, taken apart: ``Name.of("plain@0.71#2") == Name("plain", 0.71, 2)``."""

    base: str
    budget: float = 1.0
    repeat: int | None = None

    @classmethod
    def of(cls, arm: str) -> Name:
        """Whatever has no such ending is a base."""
        found = _NAME.fullmatch(arm)
        if found is None or (found["budget"] and not float(found["budget"]) > 0):
            return cls(arm)
        repeat = None if found["repeat"] is None else int(found["repeat"])
        return cls(found["base"], float(found["budget"] or 1), repeat)


@dataclass(frozen=True)
class Difference:
    """Arm minus control at the end of training, one value per seed that both finished.

    ``half_width`` of the 95 % interval around ``mean`` (Student's t) is None with less than two seeds, and
    where a loss is not finite. ``p`` tests that the true mean is 0; ``holds`` is whether the verdict also
    holds after Holm's correction for all arms that are compared.

    Verdicts: ``better`` and ``worse`` (the interval leaves 0 out), ``level`` (it lies within 0.01 nats, or
    0.3 points of accuracy, of 0), ``better, by little`` and ``worse, by little`` (both of that),
    ``inconclusive``; ``one seed``, ``no seed``; ``diverged`` and ``control diverged`` (a loss that is not
    finite), ``not measured`` (of accuracy).
    """

    arm: str
    control: str
    measure: Measure
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    half_width: float | None
    p: float | None
    verdict: str
    holds: bool = True


@dataclass(frozen=True)
class Worth:
    """How much of the control's time buys the loss that an arm ended with, by seed.

    All times are those that the runs were charged, whatever their names say. ``equivalents`` are in charges
    of the control at its whole budget, ``factors`` in those of the arm: 1.3 means that the control needs
    1.3 x the time. ``bounds`` say of each whether it is met ("=") or lies above the largest (">") or below
    the smallest ("<") time at which the control was run. ``factor`` is the geometric mean, ``bound`` what is known of it; "?" if nothing is.
    """

    seeds: tuple[int, ...]
    equivalents: tuple[float, ...]
    factors: tuple[float, ...]
    bounds: tuple[str, ...]
    factor: float
    bound: str


@dataclass(frozen=True)
class Noise:
    """How far apart the same arm ends under the same seed: one standard deviation, pooled."""

    deviation: float
    runs: int
    groups: int


# ---- pairs


def ends(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Finished runs by arm and seed; where only repeats of an arm are there, the first stands for it."""
    found: dict[str, dict[int, Run]] = {}
    # The arm itself, then its repeats: who comes first stays.
    for run in sorted(runs, key=lambda run: (_repeat(run.arm), run.key)):
        if run.end is not None:
            arm = run.arm if _repeat(run.arm) < 0 else run.arm.rpartition("#")[0]
            found.setdefault(arm, {}).setdefault(run.seed, run)
    return found


def _repeat(arm: str) -> int:
    repeat = Name.of(arm).repeat
    return -1 if repeat is None else repeat


def control_of(arm: str, control: str, arms: Collection[str]) -> str | None:
    """What an arm is compared with: the control at the same budget; None where there is no such arm."""
    name = Name.of(arm)
    if name.base == control:
        return None
    for other in arms:
        if Name.of(other) == Name(control, name.budget):
            return other
    return None


def difference(
    results: Results,
    experiment: str,
    arm: str,
    control: str,
    *,
    measure: Measure = "loss",
    seeds: Collection[int] | None = None,
) -> Difference:
    """One arm against one control, over the seeds that both finished (of those asked for)."""
    found = ends(results.of(experiment))
    return _difference(found.get(arm, {}), found.get(control, {}), arm, control, measure, seeds)


def differences(
    results: Results, experiment: str, control: str, measure: Measure = "loss"
) -> dict[str, Difference]:
    """Every arm against the control at its budget, with Holm's correction over all of them."""
    found = ends(results.of(experiment))
    pairs = {arm: control_of(arm, control, found) for arm in found}
    compared = [
        _difference(found[arm], found[other], arm, other, measure, None)
        for arm, other in pairs.items()
        if other is not None
    ]
    return {one.arm: one for one in corrected(compared)}


def _difference(
    ours: Mapping[int, Run],
    theirs: Mapping[int, Run],
    arm: str,
    control: str,
    measure: Measure,
    seeds: Collection[int] | None,
) -> Difference:
    both = sorted(seed for seed in ours.keys() & theirs.keys() if seeds is None or seed in seeds)
    values = tuple(_end(ours[seed], measure) - _end(theirs[seed], measure) for seed in both)
    mean, half_width = interval(values)
    if half_width is None:
        p = None
    elif half_width:
        t = abs(mean) / half_width * t_quantile(len(values) - 1)
        p = 1 - within(t, len(values) - 1)
    else:
        p = float(mean == 0)
    said = _verdict(values, mean, half_width, measure)
    if said == "diverged" and not all(math.isfinite(_end(theirs[seed], measure)) for seed in both):
        said = "control diverged"
    return Difference(arm, control, measure, tuple(both), values, mean, half_width, p, said)


def _end(run: Run, measure: Measure) -> float:
    assert run.end is not None  # `ends` keeps no other
    return run.end.loss if measure == "loss" else run.end.accuracy


def _verdict(
    values: Sequence[float], mean: float, half_width: float | None, measure: Measure
) -> str:
    if not values:
        return "no seed"
    if not math.isfinite(mean):
        return "diverged" if measure == "loss" else "not measured"
    if half_width is None:
        return "one seed"
    little = abs(mean) + half_width <= LEVEL[measure]
    if abs(mean) > half_width:
        told = "better" if (mean < 0) == (measure == "loss") else "worse"
        return f"{told}, by little" if little else told
    return "level" if little else "inconclusive"


def direction(verdict: str) -> str:
    """What a verdict says, however much: "better", "worse", or "" for neither."""
    word = verdict.partition(",")[0]
    return word if word in ("better", "worse") else ""


def corrected(compared: Sequence[Difference]) -> list[Difference]:
    """The same with ``holds`` set: Holm's step-down at 5 %, over all that have a p."""
    tested = sorted((one for one in compared if one.p is not None), key=lambda one: one.p or 0.0)
    kept, holding = set(), True
    for rank, one in enumerate(tested):
        holding &= (one.p or 0.0) * (len(tested) - rank) < 1 - CONFIDENCE
        if holding:
            kept.add(one.arm)
    return [replace(one, holds=not direction(one.verdict) or one.arm in kept) for one in compared]


def noise(results: Results, experiment: str, measure: Measure = "loss") -> Noise | None:
    """What repeats (``plain#1``, ``plain#2``) differ by under one seed; None where nothing was repeated.

    Ends that are not finite are left out.
    """
    groups: dict[tuple[str, float, int], list[float]] = {}
    for run in results.of(experiment):
        if run.end is not None:
            name = Name.of(run.arm)
            value = _end(run, measure)
            if math.isfinite(value):
                groups.setdefault((name.base, name.budget, run.seed), []).append(value)
    repeated = [np.array(values) for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in repeated)
    runs = sum(map(len, repeated))
    return Noise(math.sqrt(squares / (runs - len(repeated))), runs, len(repeated))


def signed(found: Difference | None, seeds: int) -> str:
    """A difference as text: "-0.0240 ± 0.0031", and over how many seeds where those are fewer than ``seeds``."""
    if found is None or not math.isfinite(found.mean):
        return ""
    scale, unit = (100, " points") if found.measure == "accuracy" else (1, "")
    digits = 2 if found.measure == "accuracy" else 4
    told = f"{scale * found.mean:+.{digits}f}"
    if found.half_width is not None:
        told += f" ± {scale * found.half_width:.{digits}f}"
    return told + unit + (f" ({len(found.seeds)} seeds)" if len(found.seeds) < seeds else "")


# ---- worth


def equivalent(ladder: Mapping[float, float], loss: float) -> tuple[float, str]:
    """The least time in which the control reaches ``loss``, and "=", "<" or ">" for out of its range.

    equivalent({0.5: 3.4, 1.0: 3.2, 2.0: 3.0}, 3.1) == (sqrt(2), "=")     # times, and where they end

    Straight lines in log(time) join what was measured; nothing is extrapolated. nan, "?" without at
    least two finite rungs.
    """
    rungs = sorted((budget, end) for budget, end in ladder.items() if math.isfinite(end))
    if len(rungs) < 2 or math.isnan(loss):
        return math.nan, "?"
    before, above = rungs[0]
    if above <= loss:
        return before, "=" if above == loss else "<"
    for budget, end in rungs[1:]:
        if end <= loss:
            share = (above - loss) / (above - end)
            return math.exp(math.log(before) + share * math.log(budget / before)), "="
        before, above = budget, end
    return before, ">"


def worth(results: Results, experiment: str, arm: str, control: str) -> Worth:
    """What an arm's end is worth in time of the control, which was run at several budgets.

    By seed, of those for which the arm, the control and one more of its budgets are finished.
    """
    found = ends(results.of(experiment))
    rungs = [name for name in found if Name.of(name).base == control]
    rows = []
    for seed, run in sorted(found.get(arm, {}).items()):
        here = [found[name][seed].end for name in rungs if seed in found[name]]
        ladder = {end.seconds: end.loss for end in here if end is not None and _timed(end)}
        plain = found.get(control, {}).get(seed)
        if run.end is None or not _timed(run.end) or plain is None or plain.end is None:
            continue
        seconds, bound = equivalent(ladder, run.end.loss)
        if bound != "?" and _timed(plain.end):
            rows.append((seed, seconds / plain.end.seconds, seconds / run.end.seconds, bound))
    if not rows:
        return Worth((), (), (), (), math.nan, "?")
    seeds, budgets, factors, bounds = zip(*rows, strict=True)
    factor = math.exp(float(np.mean(np.log(factors))))
    # Of a mean, a part that is too low leaves it too low; too low and too high together say nothing.
    known = {"="} | set(bounds)
    bound = "?" if len(known) == 3 else max(known - {"="}, default="=")
    return Worth(seeds, budgets, factors, bounds, factor, bound)


def _timed(end: Evaluation) -> bool:
    return 0 < end.seconds < math.inf
