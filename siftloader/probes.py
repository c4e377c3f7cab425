"""Will it help me, and at which layer? Every exit layer and criterion, on the user's own model and data.

    found = probe(model, shards, exit_layers=[1, 2, 6])
    print(found)                               # a line for each of them, and what that can and cannot tell
    found.verdict, found.best                  # "worth a trial" or "do not sift"; the layer and criterion
    draw(found, "probe.png")                   # of probe_figure

A probe scores a few pools of candidates at every exit layer and by the whole model, and times that beside a plain
training step. It trains nothing, and so proves nothing: the figures rule out what cannot work and name the one
layer and criterion to try; ``trial`` then measures the gain.

Letters: b rows kept, P candidates, R = P / b, N layers, j exit layer, d width of a linear network.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from textwrap import fill
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from siftloader import theory
from siftloader.batches import Batch, clone, cut, leaves, merge, move, rows
from siftloader.candidates import LoaderCandidates, ShardCandidates
from siftloader.errors import ScoringError
from siftloader.exits import EarlyExit, model_inputs, token_entropy, token_loss
from siftloader.fidelity import Fidelity, measured
from siftloader.forks import Trial
from siftloader.intervals import interval
from siftloader.loader import SiftingDataLoader
from siftloader.padding import ends_of
from siftloader.pool import Pool
from siftloader.predictions import Predictions, Value
from siftloader.schedule import whole
from siftloader.scorer import Scorer
from siftloader.scores import Criterion, Entropy, Loss, Random, ScoreOf, criterion_named
from siftloader.selection import TopK
from siftloader.sifter import Sifter
from siftloader.stack import find_stack, unwrap
from siftloader.stream import TokenShards


LossOf: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Layer: TypeAlias = int | str

BATCH = 32  # where neither the caller nor the loader says
WIDTH = 112  # of lines for people
MOST = 12  # exit layers that are probed unasked


@dataclass(frozen=True)
class Choice:
    """One exit layer and criterion, over all pools; half-widths are of 95 % intervals (Student's t over pools).

    Figures without a value are nan. What they are: ``fidelity.Fidelity``. Loss and entropy share a pass, and so
    their seconds.
    """

    layer: Layer
    criterion: str
    rho: float  # mean loss of the kept over that of all, both by the whole model
    rho_half_width: float
    overlap: float  # share of what the whole model's same score would keep, 0..1
    overlap_half_width: float
    spearman: float
    agreement: float  # p_j of Theorem 6, counted over pairs
    closed_form: (
        float  # the same from the weights (equation 13): of linear networks of two classes
    )
    sigma: float  # noise of the early losses, Assumption 6
    seconds: float  # to score a pool: median
    cost: float  # of a plain training step
    follows: bool  # whether the overlap is at least half-way from chance to all

    @property
    def called(self) -> str:
        """Its name in a sentence."""
        layer = self.layer if isinstance(self.layer, int) else f'"{self.layer}"'
        return f"exit layer {layer} by {self.criterion}"

    @property
    def speed(self) -> float:
        """How fast Theorem 1's first term, D0^2 / (2 rho eta K), falls with time, early on; plain training: 1.

        rho / (1 + cost), for K steps take (1 + cost) times as long.
        """
        return self.rho / (1 + self.cost)

    @property
    def speed_half_width(self) -> float:
        """Of rho alone: seconds are taken for certain."""
        return self.rho_half_width / (1 + self.cost)


@dataclass(frozen=True)
class Probe:
    """What a probe found; ``choices`` by layer, then criterion.

    ``sigma_max`` is Corollary 2's: below it rho stays above 1 in spite of the noise; nan unless R = 2.
    """

    model: str
    layers: int | None  # N, None where the model cannot be cut
    batch_size: int
    candidates: int
    pools: int
    population_loss: float  # of all candidates by the whole model, nats
    rho_full: float  # rho where the highest losses themselves are kept: the most that a choice could reach
    step_seconds: float  # a plain training step, forward and backward; nan where costs were given
    sigma_max: float
    choices: tuple[Choice, ...]

    @property
    def keep(self) -> float:
        """b / P: also the overlap that chance reaches."""
        return self.batch_size / self.candidates

    @property
    def asked(self) -> float:
        """The overlap from which on a choice follows the whole model: half-way from chance to all."""
        return (1 + self.keep) / 2

    @property
    def best(self) -> Choice | None:
        """The one to try, if any: of those that follow the whole model, the fastest at the low end of its interval."""
        known = [each for each in self.choices if each.follows and math.isfinite(_low(each))]
        return max(known, key=_low, default=None)

    @property
    def candidate(self) -> Choice:
        """What a trial should try: the best, or else what comes nearest to the whole model."""
        nearest = max(self.choices, key=lambda each: (math.isfinite(each.overlap), each.overlap))
        return self.best or nearest

    @property
    def pays(self) -> bool:
        """Whether sifting may pay by these figures, which a trial has to confirm."""
        return self.best is not None and _low(self.best) > 1

    @property
    def verdict(self) -> str:
        """ "worth a trial", or "do not sift"."""
        return "worth a trial" if self.pays else "do not sift"

    def advice(self, tried: Trial | None = None) -> str:
        """What the figures say, and cannot say; where the candidate was tried, what came of it counts."""
        return _advice(self) if tried is None else _advice_tried(self, tried)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able: None where there is no value."""
        found = asdict(self)
        for line, each in zip(found["choices"], self.choices, strict=True):
            line |= {"speed": each.speed, "speed_half_width": each.speed_half_width}
        best = self.best
        found["best"] = None if best is None else found["choices"][self.choices.index(best)]
        found |= {"verdict": self.verdict, "advice": self.advice()}
        jsonable: dict[str, Any] = _finite(found)
        return jsonable

    def table(self) -> str:
        """A line for every choice, for people."""
        return _table(self)

    def __str__(self) -> str:
        return f"{_table(self)}\n\n{fill(self.advice(), WIDTH)}"


def probe(
    model: nn.Module,
    batches: Iterable[Batch] | SiftingDataLoader,
    *,
    batch_size: int | None = None,
    keep: float | None = None,
    pools: int = 8,
    exit_layers: Sequence[Layer] | None = None,
    criteria: Sequence[ScoreOf | str] | None = None,
    like: Sifter | None = None,
    loss: LossOf | None = None,
    cost: Mapping[Layer, float] | None = None,
) -> Probe:
    """Measure what every exit layer and criterion would select, and what that would cost.

    found = probe(model, TokenShards("shards/wikibooks"))
    found = probe(model, loader, exit_layers=[1, 2], criteria=["loss", Margin()])
    found.verdict, found.best, found.advice()

    ``batches`` is any iterable of batches, ``TokenShards``, or a ``SiftingDataLoader``, whose options are then the
    defaults; ``pools`` pools of ``batch_size / keep`` rows are drawn from it. ``exit_layers`` are all, or a dozen of
    them spread evenly; "full" is the last. ``criteria`` are loss and entropy. ``like=Sifter(model, positions=...)``
    says how to read labels, at which positions and in what precision to score, as in training.

    A plain step is forward and backward on a copy of the model, timed in turn with scoring; ``loss(model, batch)``
    is its loss where the model does not compute one. An optimizer's own time is left out, which makes costs look
    larger. ``cost`` gives the cost of scoring a pool by exit layer, in plain steps: then nothing is timed against.

    Scoring and step run uncompiled. Of the model nothing is touched: no parameter, gradient, buffer or flag; random
    streams are put back, and shards and torch's loaders begin where they would have begun. What knows its own
    place (an iterator, a StatefulDataLoader) has moved on. Memory: all pools on the host, one copy of the model.

    Raises ValueError where there are too few rows, ScoringError where the model cannot be cut or copied.
    """
    if isinstance(pools, bool) or not isinstance(pools, int) or pools < 2:
        raise ValueError(f"pools must be an int of at least 2, for an interval; got {pools!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    given = _Given.of(model, batches, like)
    share = given.keep if keep is None else keep
    stack = _Stack.of(model, given.scorer.exit_layer)
    chosen = stack.chosen(exit_layers)
    if cost is not None and (missing := [each for each in chosen if each not in cost]):
        raise ValueError(f"cost must tell of every exit layer; there is nothing about {missing}")
    if cost is not None and not all(0 <= each < math.inf for each in cost.values()):
        raise ValueError(f"a cost is a share of a plain step, 0 or more; got {dict(cost)}")
    named = _named(given.criteria if criteria is None else criteria, given.unigrams)
    with _untouched(batches):
        drawn = _Drawn.of(given, batch_size, share, pools)
        exits = dict.fromkeys(["full", *map(stack.exit, chosen)])
        eyes = {each: _Eye(given.scorer, each, named) for each in exits}
        step = None if cost is not None else _PlainStep(given.scorer, loss)
        plain, seen = _looked(drawn, eyes, step)
        closed_forms = _closed_forms(given.scorer.model, drawn.pools[0])
    step_seconds = median(plain) if plain else math.nan
    losses = np.concatenate([each.losses for each in seen["full"]])
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        raise ScoringError(
            "none of the candidates has a label and a finite loss by the whole model, so there is nothing to compare"
        )
    found = []
    for layer in chosen:
        ours = seen[stack.exit(layer)]
        for name in named:
            took = median(each.seconds[name] for each in ours)
            price = took / step_seconds if cost is None else cost[layer]
            closed_form = closed_forms.get(layer, math.nan)
            each = _choice(layer, name, ours, seen["full"], drawn, price, closed_form)
            found.append(_control(each) if isinstance(named[name], Random) else each)
    return Probe(
        model=type(given.scorer.model).__name__,
        layers=stack.layers,
        batch_size=drawn.batch_size,
        candidates=rows(drawn.pools[0]),
        pools=pools,
        population_loss=float(losses.mean()),
        rho_full=_rho_full(seen["full"], drawn.batch_size),
        step_seconds=step_seconds,
        sigma_max=_sigma_max(losses) if share == 0.5 else math.nan,
        choices=tuple(found),
    )


# ---- what is given


@dataclass(frozen=True)
class _Given:
    # Where candidates come from, and how they are read.
    batches: Iterable[Batch]
    place: tuple[int, int]  # epoch, and position in it: of shards
    batch_size: int | None
    keep: float
    scorer: Scorer
    criteria: Sequence[ScoreOf | str]
    unigrams: Callable[[], Any]

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Batch] | SiftingDataLoader, like: Sifter | None
    ) -> _Given:
        size, share, place = None, 0.5, None
        criteria: list[ScoreOf | str] = ["loss", "entropy"]
        if isinstance(batches, SiftingDataLoader):
            like = like or batches._sifter
            sifted = [each for each in batches._schedule.shares if each < 1]
            source, share = batches._source, sifted[0] if sifted else share
            size, place = source.batch_size, (batches._epoch, batches._cursor.get("position", 0))
            batches = source.shards if isinstance(source, ShardCandidates) else source.loader
        elif like is not None:
            share = like.keep
        if isinstance(batches, DataLoader):
            size = size or batches.batch_size
            if isinstance(batches.dataset, TokenShards) and batches.collate_fn is default_collate:
                batches = batches.dataset
        shards = batches if isinstance(batches, TokenShards) else None
        if shards is not None:
            shards.check_model(unwrap(model))
            place = place or shards.upcoming()
        scorer = like.scorer if like is not None else Sifter(model, exit_layer="full").scorer
        if scorer.model is not unwrap(model):
            raise ValueError(
                "the model is not the one that the loader (or like=) sifts for; give that one"
            )
        if scorer.exit_head is not None:
            raise ValueError(
                "an exit head is trained for one exit layer: others cannot be compared with it; probe a loader "
                "without exit_head"
            )
        own = None if like is None else like.scorer.criterion
        if own is not None and own not in (Loss(), Entropy()):
            criteria = [*criteria, own]
        unigrams = (lambda: None) if shards is None else (lambda: shards.unigrams)
        return cls(batches, place or (0, 0), size, share, scorer, criteria, unigrams)


@dataclass(frozen=True)
class _Stack:
    """The layers to exit from: N of them, None where there are none; named by ``prefix`` and number, or the number."""

    layers: int | None
    prefix: str = ""

    @classmethod
    def of(cls, model: nn.Module, like: Layer) -> _Stack:
        prefix = like.rpartition(":")[0] + ":" if isinstance(like, str) and ":" in like else ""
        try:
            return cls(EarlyExit(model, f"{prefix}1" if prefix else 1).layers, prefix)
        except ScoringError:
            return cls(None)

    def named(self, number: int) -> Layer:
        return f"{self.prefix}{number}" if self.prefix else number

    def chosen(self, wanted: Sequence[Layer] | None) -> list[Layer]:
        if wanted is not None and (isinstance(wanted, str) or not wanted):
            raise ValueError(f"exit_layers must be a list of at least one layer, got {wanted!r}")
        if self.layers is None and wanted is None:
            raise ScoringError(
                "the model has no stack of equal layers to exit from, so there is nothing to compare; name some with "
                'exit_layers=["path.to.stack:1", ...], or probe the whole model with exit_layers=["full"]'
            )
        if self.layers is None:
            return list(dict.fromkeys(wanted or []))
        if wanted is None:
            spread = np.linspace(1, self.layers, min(self.layers, MOST))
            wanted = [self.named(each) for each in spread.round().astype(int).tolist()]
        last = self.named(self.layers)
        return list(dict.fromkeys(last if each == "full" else each for each in wanted))

    def exit(self, layer: Layer) -> Layer:
        """Where to cut for it: the last one is the whole model, which is scored once."""
        return "full" if self.layers is not None and layer == self.named(self.layers) else layer


def _named(criteria: Sequence[ScoreOf | str], unigrams: Callable[[], Any]) -> dict[str, ScoreOf]:
    if isinstance(criteria, str) or not criteria:
        raise ValueError(f"criteria must be a list of at least one criterion, got {criteria!r}")
    found: dict[str, ScoreOf] = {}
    for each in criteria:
        criterion = criterion_named(each, unigrams)
        name = each if isinstance(each, str) else _name(criterion)
        while name in found:
            name += "'"
        found[name] = criterion
    return found


def _name(criterion: ScoreOf) -> str:
    return str(getattr(criterion, "__name__", None) or type(criterion).__name__)


# ---- candidates


@dataclass(frozen=True)
class _Drawn:
    batch_size: int
    pools: list[Batch]

    @classmethod
    def of(cls, given: _Given, batch_size: int | None, keep: float, pools: int) -> _Drawn:
        shards = given.batches if isinstance(given.batches, TokenShards) else None
        size = batch_size or given.batch_size or (BATCH if shards is not None else None)
        source: Iterator[Batch]
        if shards is not None:
            assert size is not None
            each, (epoch, position) = _candidates(size, keep), given.place
            if shards.rows(position) < pools * each:  # what is left of an epoch
                epoch, position = epoch + bool(position), 0
            source = shards.read_batches(each, epoch, position)
        else:
            source = iter(given.batches)
        found: list[Batch] = []
        held: list[Batch] = []
        for batch in source:
            size = size or rows(batch)
            held.append(clone(batch))  # some loaders hand out one buffer again and again
            wanted = _candidates(size, keep)
            while len(found) < pools and sum(map(rows, held)) >= wanted:
                whole_of = merge(held, _pad_id(given.scorer), given.scorer.label_name)
                found.append(cut(whole_of, 0, wanted))
                held = [cut(whole_of, wanted, rows(whole_of))] if rows(whole_of) > wanted else []
            if len(found) == pools:
                return cls(size, found)
        of = f"{_candidates(size, keep)} rows" if size else "candidates"
        raise ValueError(
            f"too few samples: they fill {len(found)} pools of {of}, {pools} are wanted; give more data, a "
            f"smaller batch_size, or fewer pools (at least 2)"
        )


def _candidates(size: int, keep: float) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise ValueError(f"keep must lie between 0 and 1, got {keep!r}")
    found = whole(size / keep)
    if found is None:
        raise ValueError(f"batch_size / keep must be whole, got {size} / {keep} = {size / keep:g}")
    return found


def _pad_id(scorer: Scorer) -> int:
    pad = getattr(getattr(scorer.model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) else 0


@contextmanager
def _untouched(batches: Any) -> Iterator[None]:
    """Put every random stream that a loader or a forward may draw from back to where it was."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    host, numpy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    own = [(each, each.get_state()) for each in _generators(batches)]
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)
        for generator, state in own:
            generator.set_state(state)


def _generators(batches: Any) -> list[torch.Generator]:
    if isinstance(batches, SiftingDataLoader) and isinstance(batches._source, LoaderCandidates):
        batches = batches._source.loader
    sampler = getattr(batches, "batch_sampler", None)
    holders = (
        batches,
        getattr(batches, "sampler", None),
        sampler,
        getattr(sampler, "sampler", None),
    )
    found = (getattr(each, "generator", None) for each in holders)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


# ---- measuring


class _Several(Criterion):
    """Several criteria and the loss in one pass over the predictions: scores [P] each, remembered."""

    def __init__(self, criteria: Mapping[str, ScoreOf]) -> None:
        self.criteria = criteria
        asked = (value for each in criteria.values() for value in getattr(each, "values", ()))
        self.values: tuple[Value, ...] = tuple(dict.fromkeys((token_loss, *asked)))
        self.found: dict[str, Tensor] | None = None

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the losses."""
        early.ahead(*self.values)
        self.found = {name: each(early) for name, each in self.criteria.items()}
        return early.reduce(early.each(token_loss))


@dataclass(frozen=True)
class _Seen:
    """A pool as one exit layer sees it: losses and scores by criterion [P], and what that took."""

    losses: NDArray[np.float64]
    scores: dict[str, NDArray[np.float64]]
    seconds: dict[str, float]


class _Eye:
    """Looks at pools from one exit layer, by several criteria."""

    def __init__(self, base: Scorer, layer: Layer, named: Mapping[str, ScoreOf]) -> None:
        # What comes without logits shares a pass; any other criterion would make it dearer for all, so it has its own.
        shared = {name: each for name, each in named.items() if _is_cheap(each)}
        self._several = _Several(shared)
        self._together = self._scorer(base, layer, self._several)
        self._alone = {
            name: self._scorer(base, layer, each)
            for name, each in named.items()
            if name not in shared
        }

    @staticmethod
    def _scorer(base: Scorer, layer: Layer, criterion: ScoreOf) -> Scorer:
        scorer = base.beside(criterion, layer)
        if layer != "full":  # the whole model is the truth: it looks everywhere
            scorer.positions = base.positions
        return scorer

    def __call__(self, batch: Batch) -> _Seen:
        """Score a pool that lies on the host: each pass from there on, as in training."""
        took, values = _timed(self._together.device, partial(_scores, self._together, batch))
        if self._several.found is None:
            raise ScoringError(
                "score_fn returns scores, and a probe compares losses; give a score_fn with the lines of the loop "
                "that compute the loss"
            )
        found = {name: _host(each) for name, each in self._several.found.items()}
        seconds = dict.fromkeys(found, took)
        for name, scorer in self._alone.items():
            seconds[name], alone = _timed(scorer.device, partial(_scores, scorer, batch))
            found[name] = _host(alone)
        return _Seen(_host(values), found, seconds)


def _is_cheap(criterion: ScoreOf) -> bool:
    values = getattr(criterion, "values", ())
    return bool(values) and {token_loss, token_entropy}.issuperset(values)


def _scores(scorer: Scorer, batch: Batch) -> Tensor:
    pool = Pool(move(batch, scorer.device), ends=ends_of(batch))
    return scorer.score(pool, scorer.labels_of(batch)).values


def _host(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.detach().double().cpu().numpy()
    return found


class _PlainStep:
    """Forward and backward of a training step, on a copy of the model."""

    def __init__(self, base: Scorer, loss: LossOf | None) -> None:
        try:
            self._model = copy.deepcopy(base.model)
        except Exception as error:
            raise ScoringError(
                f"{type(base.model).__name__} cannot be copied to time a training step of it ({error}); give "
                f"cost={{exit layer: what scoring a pool takes, in plain steps}}"
            ) from error
        self._model.zero_grad(set_to_none=True)
        if not self._model.training:
            self._model.train()
        self._base, self._loss = base, loss

    def seconds(self, batch: Batch) -> float:
        """From rows on the host to gradients."""
        return _timed(self._base.device, partial(self._step, batch))[0]

    def _step(self, batch: Batch) -> Tensor:
        device = self._base.device
        dtype = self._base.precision.dtype(device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        moved = move(batch, device)
        with torch.enable_grad():
            with autocast:
                loss = (self._loss or self._own_loss)(self._model, moved)
            loss.backward()  # type: ignore[no-untyped-call]
        self._model.zero_grad(set_to_none=True)
        return loss

    def _own_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        # The value does not matter here, what it takes does: shifted labels or not are one to the clock.
        gives = EarlyExit(model, "full").takes_labels(batch)
        inputs, named = model_inputs(model, batch, labels=gives)
        found = model(*inputs, **named)
        named_loss = (
            found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        )
        listed = found if isinstance(found, tuple) else (named_loss, found)
        scalars = [each for each in listed if isinstance(each, Tensor) and each.ndim == 0]
        loss = scalars[0] if scalars else None
        labels = self._base.labels_of(batch)
        logits = getattr(found, "logits", found)
        if loss is None and isinstance(logits, Tensor) and isinstance(labels, Tensor):
            if labels.shape == logits.shape[:-1]:
                logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            if labels.shape in (logits.shape, logits.shape[:-1]):
                loss = nn.functional.cross_entropy(logits, labels)
        if loss is None:
            raise ScoringError(
                f"{type(model).__name__} returns neither a loss nor logits that fit the labels, so a training "
                f"step cannot be timed; pass loss=, a function of model and batch, or cost="
            )
        return loss


def _timed(device: torch.device, task: Callable[[], Tensor]) -> tuple[float, Tensor]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    since = time.perf_counter()
    found = task()
    wait()
    return time.perf_counter() - since, found


def _looked(
    drawn: _Drawn, eyes: Mapping[Layer, _Eye], step: _PlainStep | None
) -> tuple[list[float], dict[Layer, list[_Seen]]]:
    """Seconds of a plain step, and what each layer saw, by pool: in turns, so that all see the same machine."""
    size = drawn.batch_size
    if step is not None:  # what is made at first use is no part of a step
        step.seconds(cut(drawn.pools[0], 0, size))
        for eye in eyes.values():
            eye(drawn.pools[0])
    plain: list[float] = []
    seen: dict[Layer, list[_Seen]] = {layer: [] for layer in eyes}
    quiet = None if sys.stderr else True
    for pool in tqdm(drawn.pools, desc="probe", unit="pool", disable=quiet, leave=False):
        if step is not None:
            plain.append(step.seconds(cut(pool, 0, size)))
        for layer, eye in eyes.items():
            seen[layer].append(eye(pool))
    return plain, seen


def _choice(
    layer: Layer,
    name: str,
    seen: Sequence[_Seen],
    truth: Sequence[_Seen],
    drawn: _Drawn,
    cost: float,
    closed_form: float,
) -> Choice:
    sums = []
    for ours, whole_model in zip(seen, truth, strict=True):
        scores = np.where(np.isfinite(ours.scores[name]), ours.scores[name], -np.inf)
        kept = np.zeros(len(scores), bool)
        kept[TopK()(torch.from_numpy(scores), drawn.batch_size, Pool()).numpy()] = True
        losses = whole_model.losses
        sums.append(measured(scores, whole_model.scores[name], ours.losses, losses, kept))
    found = Fidelity.of(np.sum(sums, axis=0))
    by_pool = [Fidelity.of(each) for each in sums]
    chance = drawn.batch_size / rows(drawn.pools[0])
    return Choice(
        layer=layer,
        criterion=name,
        rho=found.rho,
        rho_half_width=_half_width([each.rho for each in by_pool]),
        overlap=found.overlap,
        overlap_half_width=_half_width([each.overlap for each in by_pool]),
        spearman=found.spearman,
        agreement=found.agreement,
        closed_form=closed_form,
        sigma=found.sigma,
        seconds=median(each.seconds[name] for each in seen),
        cost=cost,
        follows=found.overlap >= (1 + chance) / 2,
    )


def _control(choice: Choice) -> Choice:
    # Chance agrees with itself at every layer, and costs nothing: that follows no model, and is nothing to try.
    nan = math.nan
    return replace(
        choice, follows=False, overlap=nan, overlap_half_width=nan, spearman=nan, agreement=nan
    )


def _rho_full(seen: Sequence[_Seen], size: int) -> float:
    sums = []
    for each in seen:
        kept = np.zeros(len(each.losses), bool)
        kept[np.argsort(-np.nan_to_num(each.losses, nan=-np.inf), kind="stable")[:size]] = True
        sums.append(measured(each.losses, each.losses, each.losses, each.losses, kept))
    return Fidelity.of(np.sum(sums, axis=0)).rho_full


def _half_width(values: Sequence[float]) -> float:
    found = interval(values)[1]
    return math.nan if found is None else found


def _sigma_max(losses: NDArray[np.float64]) -> float:
    # Corollary 2, at these weights: rho_2 of the candidates in the place of its minimum over all weights.
    try:
        return theory.corollary_2(float(theory.rho(losses, 2)))
    except ValueError:  # no losses, or all alike
        return math.nan


# ---- a linear network (paper, section 6.1)


def _closed_forms(model: nn.Module, batch: Batch) -> dict[Layer, float]:
    """p_j of equation 13 by exit layer, where the model is a linear network of two classes; else nothing."""
    network = _linear_network(model)
    if network is None:
        return {}
    theta, weights = network
    inputs = next((e for e in leaves(batch) if isinstance(e, Tensor) and e.ndim == 2), None)
    if inputs is None or inputs.shape[1] != len(theta):
        return {}
    # What it is made of does not say how it is called: one look tells.
    expected = inputs.double().cpu().numpy()
    for each in weights:
        expected = expected @ each.T
    logits = EarlyExit(model, "full").logits(batch).double().cpu().numpy()
    if not np.allclose(logits[:, 1] - logits[:, 0], expected @ theta, rtol=1e-3, atol=1e-5):
        return {}
    return {j: theory.p_j(theory.beta_j(theta, weights, j)) for j in range(1, len(weights) + 1)}


def _linear_network(
    model: nn.Module,
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]] | None:
    # The head's theta [d], and W_1 to W_k [d, d]; None for any other model.
    try:
        stack = model.get_submodule(find_stack(model))
    except ScoringError:
        return None
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    inner = [each for each in stack.children() if isinstance(each, nn.Linear)]
    heads = [each for each in linear if each not in inner]
    found = [each.weight for each in [*inner, *heads] if each.bias is None]
    if len(heads) != 1 or len({len([*model.parameters()]), len(linear), len(found)}) > 1:
        return None
    *squares, head = (np.asarray(_host(each)) for each in found)
    if len(head) != 2 or any(each.shape != (head.shape[1],) * 2 for each in squares):
        return None
    return head[1] - head[0], squares


# ---- in words


def _low(choice: Choice) -> float:
    return choice.speed - choice.speed_half_width


def _high(choice: Choice) -> float:
    return choice.speed + choice.speed_half_width


def _table(found: Probe) -> str:
    width = max(9, *(len(each.criterion) for each in found.choices))
    exits = max(4, *(len(str(each.layer)) for each in found.choices))
    linear = any(math.isfinite(each.closed_form) for each in found.choices)
    of = "" if found.layers is None else f" of {found.layers} layers"
    step = (
        ""
        if math.isnan(found.step_seconds)
        else f"; a plain step takes {_time(found.step_seconds)}"
    )
    lines = [
        f"{found.model}{of}: {found.pools} pools of {found.candidates} candidates, {found.batch_size} kept{step}",
        f"mean loss by the whole model {found.population_loss:.3f} nats; rho would be {found.rho_full:.3f} if the "
        f"highest losses were kept",
        "",
        f"{'exit':>{exits}}  {'criterion':<{width}} {'rho':>15} {'overlap':>8} {'Spearman':>9} {'p_j':>6}"
        f"{'closed' if linear else '':>{7 * linear}} {'sigma':>7}  {'a pool':>8} {'cost':>7} {'speed':>15}",
    ]
    for each in found.choices:
        small = " " if math.isnan(found.sigma_max) or each.sigma >= found.sigma_max else "<"
        closed = f"{each.closed_form:7.3f}" if linear else ""
        best = each == found.best
        lines.append(
            f"{each.layer:>{exits}}  {each.criterion:<{width}} {_pm(each.rho, each.rho_half_width):>15} "
            f"{_known(each.overlap, '.1%'):>8} {_known(each.spearman, '.3f'):>9} "
            f"{_known(each.agreement, '.3f'):>6}{closed} "
            f"{each.sigma:>7.3f}{small} {_time(each.seconds):>8} {each.cost:>7.1%} "
            f"{_pm(each.speed, each.speed_half_width):>15}{' <- best' * best}"
        )
    lines += [
        "",
        "rho      mean loss of what is kept over that of all, both by the whole model, ± 95 %",
        f"overlap  with what the whole model's same score would keep: {found.keep:.0%} by chance, "
        f"{found.asked:.0%} is asked for",
        "p_j      share of pairs ordered as by the whole model (Theorem 6)"
        + ("; closed: equation 13, from the weights" if linear else ""),
        f"sigma    noise of the early losses (Assumption 6){_bound(found)}",
        "cost     of scoring a pool, in plain steps; speed: rho / (1 + cost), plain training is 1",
    ]
    return "\n".join(lines)


def _bound(found: Probe) -> str:
    if math.isnan(found.sigma_max):
        return ""
    return f'; "<": below Corollary 2\'s {found.sigma_max:.3f}, which suffices for rho > 1'


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _pm(value: float, half_width: float) -> str:
    return f"{value:.3f} ± {half_width:.3f}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _advice(found: Probe) -> str:
    best = found.best
    if best is None:
        nearest = found.candidate
        if math.isnan(nearest.overlap):
            return "Do not sift: nothing here ranks candidates."
        return (
            f"Do not sift: none of these exits ranks candidates as the whole model does. The nearest, {nearest.called}, "
            f"keeps {nearest.overlap:.0%} of what the whole model would keep; chance keeps {found.keep:.0%}, and "
            f"{found.asked:.0%} is asked for."
        )
    what = (
        f"rho is {_pm(best.rho, best.rho_half_width)} and scoring costs {best.cost:.1%} of a step, which makes a speed "
        f"of {_pm(best.speed, best.speed_half_width)}, where plain training has 1"
    )
    if found.pays:
        return (
            f"Worth a trial: {best.called}. It keeps {best.overlap:.0%} of what the whole model would keep; {what}. "
            f"That is no proof of a gain: it is the first term of a bound (Theorem 1), early in training from here. "
            f"Losses are also high where labels are noise or samples cannot be learned; then rho is large, and sifting "
            f"harms. (And rho favours loss by its definition.) Only a trial, `siftloader probe --trial 200` or "
            f"`siftloader.trial`, compares held-out loss in equal time."
        )
    if best.speed + best.speed_half_width <= 1:
        return (
            f"Do not sift, by these figures: even with the best, {best.called}, {what}. By that bound scoring costs more "
            f"than its choice is worth. That is no proof either: of text, much of the loss cannot be learned, which "
            f"keeps rho near 1 even where sifting pays (where the text repeats itself, it did at a speed of 0.8). A "
            f"trial, `siftloader probe --trial 200` or `siftloader.trial`, compares held-out loss in equal time."
        )
    return (
        f"Do not sift on this evidence: with the best, {best.called}, {what}, and the interval holds both outcomes. "
        f"More pools narrow it; a trial (`siftloader probe --trial 200`) measures the gain directly."
    )


def _advice_tried(found: Probe, tried: Trial) -> str:
    choice = found.candidate
    says = {
        "sift": f"Sift, from here, with {choice.called}.",
        "do not sift": f"Do not sift: {choice.called} was tried, and lost.",
        "no difference seen": f"Do not sift on this evidence: {choice.called} was tried, and made no difference that shows.",
    }.get(tried.verdict, f"Nothing can be said: with {choice.called} training diverged.")
    told = tried.sentence.partition(": ")[2]
    against = tried.verdict == ("do not sift" if found.pays else "sift")
    return (
        f"{says} {told[:1].upper()}{told[1:]}."
        + " The figures above said otherwise; a trial weighs more." * against
        + " It holds for this model, these data and about as many steps: try again later in training."
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
