"""Does sifting pay, from here? Train a copy both ways for a while and look at held-out loss: the only direct evidence.

    found = trial(model, optimizer, pools, held_out, steps=200)
    found.verdict                                 # "sift", "do not sift", "no difference seen", "diverged"
    found.gain, found.half_width                  # nats of held-out loss in equal time, 95 % interval
    print(found)                                  # all of it, for people

Its pieces stand alone: ``fork`` copies a model with its optimizer, ``arm`` trains such a copy, ``cost_of`` times
steps, ``held_out_loss`` measures.

Letters: P candidates of a pool, b rows kept of them.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from types import MethodType
from typing import Any, TypeAlias, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from siftloader.batches import IGNORED, Batch, clone, move, rows, select
from siftloader.intervals import interval
from siftloader.labels import find_labels, is_causal
from siftloader.pool import Pool
from siftloader.schedule import check_keep, whole
from siftloader.scores import ScoreOf
from siftloader.sharded import is_spread, within
from siftloader.sifter import Sifter
from siftloader.stack import unwrap
from siftloader.updates import owns


LossOf: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Choose: TypeAlias = Callable[[Batch], Batch]  # P rows in, b out

WARM_UP = 3  # rounds of steps that are not timed
ROUNDS = 15  # that are


@final
@dataclass(frozen=True)
class Trial:
    """What a trial found: held-out losses in nats, after equal time from the same start, by repeat.

    ``steps`` plain steps took as long as ``sifted_steps`` sifted ones, at ``cost`` (a sifted step in plain ones).
    ``seconds`` is what a plain step takes; None where the cost was given instead of measured. ``before`` is the
    loss of the model as it came.
    """

    steps: int
    sifted_steps: int
    cost: float
    seconds: float | None
    before: float
    plain: tuple[float, ...]
    sifted: tuple[float, ...]

    @property
    def gains(self) -> tuple[float, ...]:
        """Plain minus sifted, by repeat: above zero where sifting won."""
        return tuple(plain - ours for plain, ours in zip(self.plain, self.sifted, strict=True))

    @property
    def gain(self) -> float:
        """How much lower held-out loss is with sifting, in nats; nan where a loss is not finite."""
        return interval(self.gains)[0]

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval around the gain (Student's t); None where a loss is not finite."""
        return interval(self.gains)[1]

    @property
    def verdict(self) -> str:
        """ "sift", "do not sift" (the interval leaves zero out), "no difference seen", or "diverged"."""
        half_width = self.half_width
        if half_width is None:
            return "diverged"
        if abs(self.gain) <= half_width:
            return "no difference seen"
        return "sift" if self.gain > 0 else "do not sift"

    @property
    def per_second(self) -> tuple[float, float] | None:
        """Held-out nats that a second of plain and of sifted training took off; None where nothing was timed."""
        if self.seconds is None:
            return None
        seconds = self.steps * self.seconds
        plain, ours = (self.before - float(np.mean(each)) for each in (self.plain, self.sifted))
        return plain / seconds, ours / seconds

    @property
    def sentence(self) -> str:
        """The verdict and what it rests on, as a sentence."""
        gain, half_width = self.gain, self.half_width
        if half_width is None:
            return (
                "diverged: a held-out loss is not finite; lower the learning rate, then try again"
            )
        if self.verdict == "no difference seen":
            least = max(abs(gain - half_width), abs(gain + half_width))
            return (
                f"no difference seen: {gain:+.4f} ± {half_width:.4f} nats in equal time; more than "
                f"{least:.4f} either way is unlikely, and less takes more repeats or steps to see"
            )
        way = "lower" if gain > 0 else "higher"
        return (
            f"{self.verdict}: in equal time held-out loss ends {abs(gain):.4f} ± {half_width:.4f} nats {way} "
            f"with sifting"
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; what is not finite is None."""
        per_second = self.per_second or (None, None)
        found = asdict(self) | {
            "gains": self.gains,
            "gain": self.gain,
            "half_width": self.half_width,
            "verdict": self.verdict,
            "plain_per_second": per_second[0],
            "sifted_per_second": per_second[1],
        }
        return {name: _jsonable(value) for name, value in found.items()}

    def __str__(self) -> str:
        timed = "given" if self.seconds is None else f"measured; a plain one {_time(self.seconds)}"
        lines = [
            f"trial: {self.steps:,} plain steps against {self.sifted_steps:,} sifted ones in the same time, "
            f"{len(self.plain)} times from the same start",
            f"a sifted step takes {self.cost:.3f} x a plain one ({timed})",
            "",
            f"held-out loss {'before':>9} {'plain':>9} {'sifted':>9} {'gain':>9}",
        ]
        for number, (plain, ours) in enumerate(zip(self.plain, self.sifted, strict=True), 1):
            name = f"repeat {number}"
            lines.append(
                f"{name:13} {self.before:9.4f} {plain:9.4f} {ours:9.4f} {plain - ours:+9.4f}"
            )
        means = [float(np.mean(each)) for each in (self.plain, self.sifted)]
        half_width = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        lines.append(
            f"{'mean':13} {self.before:9.4f} {means[0]:9.4f} {means[1]:9.4f} {self.gain:+9.4f}{half_width}"
        )
        if self.per_second is not None:
            lines.append(
                f"{'per second':13} {'':9} {-self.per_second[0]:+9.4f} {-self.per_second[1]:+9.4f} "
                f"{self.per_second[1] - self.per_second[0]:+9.4f}"
            )
        return "\n".join([*lines, "", self.sentence])


def trial(
    model: nn.Module,
    optimizer: Optimizer,
    pools: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    steps: int = 200,
    repeats: int = 5,
    exit_layer: int | str = 1,
    criterion: ScoreOf | str = "loss",
    keep: float = 0.5,
    sift: Callable[[nn.Module], Sifter] | None = None,
    loss: LossOf | None = None,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    cost: float | None = None,
    seed: int = 0,
) -> Trial:
    """Fork ``model`` and ``optimizer``, train plainly and sifted from here for equal time, compare held-out loss.

    found = trial(model, optimizer, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 64), steps=200)
    found = trial(..., sift=lambda fork: Sifter(fork, criterion=Entropy(), selection=RankSample()))

    A batch of ``pools`` is one pool of P candidates; every repeat draws ``steps`` new ones, and both its arms get
    them in the same order: the plain one trains on a random ``keep * P`` rows of each, the sifted one on what
    ``Sifter`` keeps (``sift`` builds it for a fork, where there is more to say than layer, criterion and share).
    Both start from copies of the model and the optimizer as they are, with equal seeds for dropout. A sifted
    step costs ``cost`` plain ones (measured first, unless given), so that arm makes ``round(steps / cost)``.
    In both the learning rate falls linearly from what it is to zero, since at a constant rate the noise of the
    last few steps would hide the difference.

    ``loss(model, batch)`` gives a scalar (``model(**batch).loss``); ``clip`` is the largest norm of gradients
    (None: any); ``autocast`` the dtype to train, score and measure in. ``held_out`` is measured whole, in eval
    mode, mean over labelled positions. Nothing of the model, the optimizer or the global random streams changes;
    memory holds one copy of both beside them. Copies run uncompiled, reading the data is not charged, and a loop
    that accumulates gradients is not imitated.

    The interval is over repeats from *one* start: it tells of the noise of which samples came in which order, not
    of other initial weights, and of the next ``steps`` steps with a decay, not of the whole run.

    ValueError where model and optimizer cannot be copied, and where there are too few pools.
    """
    _check(steps, repeats, keep, cost, autocast)
    step = Step(loss or model_loss, clip, autocast)

    def sifting(forked: nn.Module) -> Sifter:
        if sift is not None:
            return sift(forked)
        of = copy.deepcopy(criterion)  # what learns, or remembers, does so in each arm by itself
        return Sifter(forked, exit_layer=exit_layer, criterion=of, keep=keep, autocast=autocast)

    def begun(candidates: Sequence[Batch]) -> tuple[float, float, float | None, float]:
        forked, its_optimizer = fork(model, optimizer)
        sifter = sifting(forked)
        share, before = _share(sifter, rows(candidates[0])), held_out_loss(forked, held, step)
        if cost is not None:
            return share, before, None, float(cost)
        ways = at_random(share, _key(seed, 0)), sifter
        return share, before, *cost_of(forked, its_optimizer, candidates, ways, step)

    def ended(candidates: Sequence[Batch], key: int, drawn: float | None) -> float:
        forked, its_optimizer = fork(model, optimizer)
        choose = sifting(forked) if drawn is None else at_random(drawn, key)
        arm(forked, its_optimizer, candidates, choose, step, key, bar.update)
        return held_out_loss(forked, held, step)

    plain, sifted = [], []
    with streams_kept(), _bar() as bar:
        held = [clone(batch) for batch in held_out]
        source = _drawn(pools, steps * repeats)
        for repeat in range(repeats):
            candidates, key = list(itertools.islice(source, steps)), _key(seed, repeat)
            if not repeat:
                share, before, seconds, ratio = begun(candidates)
                sifted_steps = max(1, round(steps / ratio))
                bar.reset(repeats * (steps + sifted_steps))
            plain.append(ended(candidates, key, share))
            sifted.append(ended(candidates[:sifted_steps], key, None))
    return Trial(steps, sifted_steps, ratio, seconds, before, tuple(plain), tuple(sifted))


# ---- a copy of both


def fork(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Copies of a model and of the optimizer that trains it, which know each other and nothing of these two.

    forked, its_optimizer = fork(model, optimizer)

    Weights, buffers, flags, hooks, the optimizer's state and groups are copied, gradients are not; wrappers (compiled,
    data-parallel, Accelerate's, Fabric's) are left off, and what hooks an optimizer's step (a scheduler) too.
    ValueError where a copy would not be whole, or would not be one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a trial needs the model itself, a torch.nn.Module, got {type(model).__name__}"
        )
    inner: Any = optimizer
    while not isinstance(inner, Optimizer) or isinstance(
        getattr(inner, "optimizer", None), Optimizer
    ):
        inner = getattr(inner, "optimizer", None)  # of Accelerate or Fabric
        if inner is None:
            raise TypeError(
                f"a trial needs the torch.optim.Optimizer that trains the model, got {type(optimizer).__name__}"
            )
    check_whole(model)
    root = within(unwrap(model))
    own = {id(parameter) for parameter in root.parameters()}
    trained = {id(each) for group in inner.param_groups for each in group["params"]}
    if not owns(root, inner):
        raise ValueError(
            f"the optimizer trains none of the parameters of {type(root).__name__}: a trial needs the one that "
            f"trains it, made after whatever replaced its parameters"
        )
    if trained - own:
        raise ValueError(
            f"the optimizer trains {len(trained - own)} parameters that {type(root).__name__} does not have: their "
            f"copies would belong to nobody; give the one module that holds all that it trains"
        )
    memo: dict[int, Any] = {}
    try:
        forked, its_optimizer = copy.deepcopy(root, memo), copy.deepcopy(inner, memo)
        # What an optimizer of one's own keeps beside torch's three fields, which alone are copied.
        for name in vars(inner).keys() - vars(its_optimizer).keys() - {"step"}:
            vars(its_optimizer)[name] = copy.deepcopy(vars(inner)[name], memo)
    except Exception as error:
        raise ValueError(
            f"{type(root).__name__} and its {type(inner).__name__} cannot be copied ({type(error).__name__}: {error}); "
            f"a trial trains copies: leave off what cannot be copied, or free memory for one copy of both"
        ) from error
    _check_apart(forked, its_optimizer)
    return forked, its_optimizer


def check_whole(model: nn.Module) -> None:
    """Raise ValueError where a copy of ``model`` would not be all of it: its ranks train it together."""
    for each in model.modules():
        apart = is_spread(each)
        if isinstance(each, nn.parallel.DistributedDataParallel):
            apart = dist.get_world_size(each.process_group) > 1
        if apart:
            raise ValueError(
                f"{type(each).__name__} is trained by several ranks together, and a copy of this rank's part would "
                f"not be; run the trial in one process, on the model before it is wrapped"
            )


def _check_apart(forked: nn.Module, its_optimizer: Optimizer) -> None:
    own = {id(parameter) for parameter in forked.parameters()}
    if {id(each) for group in its_optimizer.param_groups for each in group["params"]} - own:
        raise ValueError(
            f"a copy of {type(its_optimizer).__name__} does not train the copied {type(forked).__name__}: one of "
            f"them copies itself in its own way; give plain torch objects"
        )
    modules = {id(each) for each in forked.modules()}
    for name, module in forked.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and "_original_forward" in vars(module):
            # What Accelerate laid its own over, which autocasts.
            forward = module.forward = module._original_forward
        # A function in an object's own forward is not copied: it would train the model that was given.
        if forward is not None and not (
            isinstance(forward, MethodType) and id(forward.__self__) in modules
        ):
            raise ValueError(
                f"the forward of {name or type(forked).__name__!r} was replaced by a function, which no copy has for "
                f"itself; give the model without it"
            )


# ---- training a copy


@final
@dataclass(frozen=True)
class Step:
    """How a loop makes a training step of a batch: its loss, the largest norm of gradients, its autocast dtype."""

    loss: LossOf
    clip: float | None = 1.0
    autocast: torch.dtype | None = None

    def __call__(self, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
        """One step; gradients of before are gone."""
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            self.measured(model, batch).backward()  # type: ignore[no-untyped-call]
        if self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, moved to the model's device."""
        device = _device(model)
        with self._context(device):
            return self.loss(model, move(batch, device))

    def _context(self, device: torch.device) -> AbstractContextManager[Any]:
        return (
            nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)
        )


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes itself, as those of Hugging Face do: ``model(**batch).loss``."""
    found = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor):
        raise ValueError(
            f"model(**batch).loss is what a trial trains on, and {type(model).__name__} has none for a "
            f"{type(batch).__name__}; pass loss=, a function of model and batch that returns a scalar"
        )
    return found


def arm(
    model: nn.Module,
    optimizer: Optimizer,
    pools: Sequence[Batch],
    choose: Choose,
    step: Step,
    seed: int,
    tell: Callable[[int], Any] = lambda steps: None,
) -> None:
    """Train ``model`` in place, a step on what ``choose`` keeps of each pool, its learning rate falling to zero.

    forked, its_optimizer = fork(model, optimizer)
    arm(forked, its_optimizer, pools, at_random(0.5, seed=1), Step(model_loss), seed=1)

    The rate falls linearly from what each group has. A model in eval mode is put into training mode. ``seed`` is
    that of what the model draws (dropout); the global streams are left as they were. ``tell`` hears of every step.
    """
    if not model.training:
        model.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    with streams_kept():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        for number, pool in enumerate(pools):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - number / len(pools))
            step(model, optimizer, choose(pool))
            tell(1)


def at_random(keep: float, seed: int) -> Choose:
    """Keeps a random ``keep * P`` rows of every pool, in their order: a function of the seed and the pool's number."""
    numbers = itertools.count()

    def choose(pool: Batch) -> Batch:
        drawn = Pool(number=next(numbers)).uniform(seed, rows(pool))
        kept = drawn.topk(round(rows(pool) * keep)).indices.sort().values
        return select(pool, kept)

    return choose


def held_out_loss(model: nn.Module, batches: Iterable[Batch], step: Step) -> float:
    """Mean loss over the labelled positions of all batches, in nats, in eval mode; flags and streams come back.

    Positions are counted in ``batch["labels"]`` or in the last of a tuple (in a causal model without the first of
    each row); where there are none, rows are. ValueError where nothing is labelled.
    """
    flags = [(each, each.training) for each in model.modules()]
    total, weights = 0.0, 0
    model.eval()
    try:
        with streams_kept(), torch.no_grad():
            for batch in batches:
                if weight := _labelled(model, batch):
                    total += weight * float(step.measured(model, batch))
                    weights += weight
    finally:
        for each, training in flags:
            each.training = training
    if not weights:
        raise ValueError(
            "held_out holds no labelled position; a trial needs held-out batches with labels"
        )
    return total / weights


def _labelled(model: nn.Module, batch: Batch) -> int:
    labels = find_labels(batch, "labels")
    if labels is None or labels.is_floating_point():
        return rows(batch)
    if labels.ndim == 2 and is_causal(model):
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


# ---- what it costs


def cost_of(
    model: nn.Module,
    optimizer: Optimizer,
    pools: Sequence[Batch],
    ways: tuple[Choose, Choose],
    step: Step,
) -> tuple[float, float]:
    """Seconds of a plain step, and a sifted one in plain ones: of a copy, which is trained on the way.

    ``ways`` are those to choose from a pool, plain and sifted. They take turns, round by round, so that what disturbs
    the machine disturbs both; the first rounds warm up, and the median of the others' ratios is the cost.
    """
    device = _device(model)

    def seconds_of(choose: Choose, pool: Batch) -> float:
        _wait(device)
        begun = time.perf_counter()
        step(model, optimizer, choose(pool))
        _wait(device)
        return time.perf_counter() - begun

    rounds = []
    model.train()
    with streams_kept():
        for pool in itertools.islice(itertools.cycle(pools), WARM_UP + ROUNDS):
            plain, sifted = (seconds_of(choose, pool) for choose in ways)
            rounds.append((plain, sifted))
    timed = rounds[WARM_UP:]
    # A sifted step does all that a plain one does: less than that is noise.
    cost = max(1.0, median(sifted / plain for plain, sifted in timed))
    return median(plain for plain, _ in timed), cost


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- what is drawn


def _drawn(pools: Iterable[Batch], wanted: int) -> Iterator[Batch]:
    """The pools on and on, beginning anew where they end, all as large as the first: an epoch's last may be smaller."""
    size, drawn = 0, 0
    while True:
        before = drawn
        for pool in pools:
            size = size or rows(pool)
            if rows(pool) == size:
                drawn += 1
                yield clone(pool)
        if drawn == before or isinstance(pools, Iterator):
            raise ValueError(
                f"the pools ended after {drawn:,}, and steps x repeats = {wanted:,} are needed; give more of "
                f"them, or something that begins anew at iter(), such as a DataLoader"
            )
        if not before:
            warnings.warn(
                f"the pools ended after {drawn:,} of {wanted:,} and begin anew: repeats that share samples vary less, "
                f"so the interval is too narrow",
                stacklevel=3,
            )


def _share(sifter: Sifter, candidates: int) -> float:
    if isinstance(keep := sifter.keep, float | int) and whole(candidates * keep) is None:
        raise ValueError(
            f"{candidates} candidates of a pool * keep {keep} is not a whole number of rows; give pools of "
            f"another size, or keep another share"
        )
    return sifter.keep


def _key(seed: int, repeat: int) -> int:
    # No key that a criterion or selection draws with: two draws that are alike would differ in nothing.
    found = np.random.SeedSequence((seed, repeat, 0x517A7)).generate_state(1, np.uint64)
    return int(found[0] >> np.uint64(1))


@contextmanager
def streams_kept() -> Iterator[None]:
    """The global random streams afterwards as before: torch's, those of CUDA devices, random's and NumPy's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    host, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _check(
    steps: int, repeats: int, keep: float, cost: float | None, autocast: torch.dtype | None
) -> None:
    for name, value, least in (("steps", steps, 1), ("repeats", repeats, 2)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    check_keep(keep)
    if cost is not None and not 1 <= cost < math.inf:
        raise ValueError(
            f"cost must be a number of at least 1, what a sifted step takes in plain ones, got {cost!r}; "
            f"leave it out to have it measured"
        )
    if autocast is torch.float16:
        raise ValueError(
            "float16 needs scaled gradients, which a trial does not do; use torch.bfloat16"
        )


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _bar() -> Any:
    # Silent unless stderr is a terminal; there may be none at all.
    return tqdm(desc="trial", unit="step", disable=None if sys.stderr else True, leave=False)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
