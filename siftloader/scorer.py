"""``Scorer``: one score per candidate, by the live model, its own loss, or a function of the loop.

Letters: P candidates, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from siftloader.batches import IGNORED, Batch, cut, move, rows
from siftloader.errors import ScoringError
from siftloader.exits import EarlyExit, Task
from siftloader.heads import ExitHead, ProbeExit
from siftloader.heard import hear
from siftloader.labels import (
    Labels,
    are_inputs,
    find_labels,
    is_causal,
    skips_padding,
    without_padding,
)
from siftloader.overlap import HasRead
from siftloader.padding import (
    MASK,
    POSITIONS,
    ROUND,
    at_the_end,
    by_length,
    columns,
    covering,
    shortened,
    without_mask,
)
from siftloader.pool import Pool
from siftloader.precision import Precision, scoring_in
from siftloader.predictions import Predictions, Value
from siftloader.scores import Random, Rarity, ScoreOf, Weighted, criterion_named
from siftloader.sharded import (
    agreed,
    check_alike,
    data_rank,
    is_fsdp,
    is_fsdp1,
    replica_groups,
)
from siftloader.stack import unwrap
from siftloader.taps import Reading, listen
from siftloader.targets import Capacity, Positions, Targets, check_soft, to_device
from siftloader.twin import Twin, agree


Model: TypeAlias = nn.Module | Callable[[], nn.Module]
ScoreFunction: TypeAlias = Callable[[EarlyExit, Batch], Tensor]
TOKENS_AT_ONCE = (
    1 << 14
)  # of a forward without gradients: fills an H100, and is little beside a training step


# For rows of ids that are inputs and targets at once, as litgpt and others draw them.
_SHIFTS = (
    " with the lines of the loop: lambda model, ids: "
    "cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())"
)


class Scores(NamedTuple):
    """Of a pool, all on the device: values [P], -inf where a row must not win; and how many rows are what.

    Not finite; without a label; with more labels than there was room for.
    """

    values: Tensor
    nonfinite: Tensor
    unlabelled: Tensor
    capped: Tensor


@final
class Scorer:
    """Score the rows of a pool: what ``Sifter`` does before it selects, and its options for that.

    Nothing of the model is touched: no parameter, buffer, flag, hook or random stream.
    """

    def __init__(
        self,
        model: Model,
        *,
        exit_layer: int | str,
        criterion: ScoreOf | str,
        positions: Positions | None,
        exit_head: ExitHead | Literal["probe"] | None,
        labels: Labels | None,
        score_fn: ScoreFunction | None,
        shift_labels: bool | None,
        autocast: torch.dtype | None,
        score_batch_size: int | None = None,
        compile: bool | str = False,  # noqa: A002
        scorer_device: torch.device | str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(
                f"model must be a torch.nn.Module or a function that returns one, "
                f"got {type(model).__name__}"
            )
        if exit_head not in (None, "probe") and not isinstance(exit_head, ExitHead):
            raise ValueError(f'exit_head must be None, "probe" or an ExitHead, got {exit_head!r}')
        if exit_head is not None and score_fn is not None:
            raise ValueError(
                "score_fn calls the model's own early exit, exit_head replaces it: give one of them"
            )
        if not (isinstance(compile, bool) or (isinstance(compile, str) and compile)):
            raise TypeError(
                f"compile must be True, False or a mode of torch.compile, got {compile!r}"
            )
        at_once = score_batch_size
        if at_once is not None and (type(at_once) is not int or at_once < 1):
            raise ValueError(f"score_batch_size must be an int of at least 1, got {at_once!r}")
        if exit_head is not None and (compile or scorer_device is not None):
            raise ValueError(
                "exit_head is trained where the model is, and not compiled: give neither compile nor scorer_device"
            )
        self.exit_layer = exit_layer
        self.criterion = criterion_named(criterion)
        self.positions = positions
        self.exit_head = ExitHead() if isinstance(exit_head, str) else exit_head
        self.precision = Precision(autocast)
        self.scorer_device = None if scorer_device is None else torch.device(scorer_device)
        self._compile, self._rows_at_once = compile, at_once
        self._labels, self._score_fn, self._shift = labels, score_fn, shift_labels
        self._room = Capacity()  # for labels that lie on a GPU
        self.attach_model(model)

    def beside(self, criterion: ScoreOf, exit_layer: int | str | None = None) -> Scorer:
        """Another one for the same model, batches and precision, which scores by ``criterion``.

        At another exit layer it looks at all labelled positions, under the model's own head. What it learns of
        its pools it learns for itself, so that this one scores the same with and without it.
        """
        whole = exit_layer is not None
        other = self._sibling(
            self._model,
            self.exit_layer if exit_layer is None else exit_layer,
            criterion,
            None if whole else self.positions,
            None if whole else self.exit_head,
        )
        other.precision = self.precision
        return other

    def of(self, model: nn.Module) -> Scorer:
        """The same for a copy of the model, with copies of what was learned."""
        criterion, head = copy.deepcopy((self.criterion, self.exit_head))
        other = self._sibling(model, self.exit_layer, criterion, self.positions, head)
        other.precision.name = self.precision.name
        other.precision.settle()
        other.follow(self)
        return other

    def _sibling(
        self,
        model: Model,
        exit_layer: int | str,
        criterion: ScoreOf,
        positions: Positions | None,
        exit_head: ExitHead | None,
    ) -> Scorer:
        return Scorer(
            model,
            exit_layer=exit_layer,
            criterion=criterion,
            positions=positions,
            exit_head=exit_head,
            labels=self._labels,
            score_fn=self._score_fn,
            shift_labels=self._shift,
            autocast=None,
            score_batch_size=self._rows_at_once,
        )

    def follow(self, other: Scorer) -> None:
        """Read labels as ``other`` has learned to, and have room for as many; waits for nothing."""
        self.reading_state = other.reading_state
        self._room.most = other._room.most

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on."""
        self.precision.unwatch()
        self._model = model
        self._early: EarlyExit | ProbeExit | None = None
        self._task: Task | None = None  # how labels are read; learned from the first pool, as are
        self._tried = False  # whether scoring works
        self._heard_shift: bool | None = None
        self._listens: bool | None = None  # to the model's loss, though it gives logits
        self._reading: Reading | None = None  # and by whose loss, where it is not by the logits
        self._settled: tuple[Twin, set[Any]] | None = None  # what was seen to score such batches
        # By what is left out (the mask, the tail) and the fields of a batch: None where that would be seen in the
        # predictions, else the fields that it was seen of.
        self._skips: dict[tuple[str, ...], frozenset[str] | None] = {}
        self._untold = False  # the pool could not tell
        self._overlapped: Twin | None = None  # that was seen to need no other rank
        self._alike = False  # whether ranks of one replica were seen to hold the same candidates
        self._replica: tuple[nn.Module, list[Any]] | None = None
        # What cannot be cut fails here, not after the warm-up. A callable may have nothing to find yet.
        if isinstance(model, nn.Module) and self.looks_at_model:
            self._exit()

    @property
    def given_model(self) -> nn.Module:
        """The live model as it was given, wrappers and all."""
        model = self._model if isinstance(self._model, nn.Module) else self._model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model= returned {type(model).__name__}, need a torch.nn.Module")
        return model

    @property
    def model(self) -> nn.Module:
        """The live model without its compiled and data-parallel wrappers."""
        return unwrap(self.given_model)

    @property
    def device(self) -> torch.device:
        """Where the model reads its input: the device of its input embedding, else its first parameter."""
        model = self.model
        try:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            return torch.device(embedding.weight.device)
        except (AttributeError, NotImplementedError):
            first = next(model.parameters(), None)
            return torch.device("cpu") if first is None else first.device

    def digests(self) -> dict[str, str]:
        """What was learned beside the model, by name: the sha256 of each, for a state to refer to."""
        named: dict[str, Any] = {f"criterion {n}": e for n, e in enumerate(terms(self.criterion))}
        named["exit_head"] = self.exit_head
        return {name: each.digest() for name, each in named.items() if hasattr(each, "digest")}

    def labels_of(self, batch: Batch) -> Tensor | None:
        """The labels of a batch as they lie; None where nobody looks at them."""
        if self._score_fn is not None:
            return None
        if callable(self._labels):
            return self._labels(batch)
        found = find_labels(batch, self.label_name)
        if found is not None:
            return without_padding(found, batch) if skips_padding(self.model) else found
        if isinstance(self.criterion, Random):
            return None
        fields = f" with fields {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise ScoringError(
            f"no labels in a {type(batch).__name__}{fields}: they must be tensors under "
            f'"{self.label_name}" or last in a tuple; or pass labels= (a key or a function) or '
            f"score_fn={_SHIFTS if isinstance(batch, Tensor) else ''}"
        )

    @property
    def by_function(self) -> bool:
        """Whether a function of the loop scores, or the loss in it."""
        return self._score_fn is not None

    @property
    def ignored(self) -> int:
        """The label that stands for none, as the model's own loss has it where it was heard."""
        return IGNORED if self._task is None else self._task.ignored

    @property
    def reading_state(self) -> list[Any] | None:
        """[shift, ignored, whether the model's loss is listened to], once known.

        A restart must read labels alike, whatever its first pool would tell.
        """
        return None if self._task is None else [*self._task, self._listens]

    @reading_state.setter
    def reading_state(self, state: list[Any] | None) -> None:
        given = self._shift  # an option weighs more than what an earlier run learned
        if state is not None:
            shift, ignored, self._listens = state
            self._task = Task(shift if given is None else given, ignored)

    @property
    def room_state(self) -> list[int | None] | None:
        """What was learned of labels that lie on a GPU, JSON-able: a restart must take as many."""
        return self._room.state

    @room_state.setter
    def room_state(self, state: list[int | None] | None) -> None:
        self._room.state = state

    @property
    def label_name(self) -> str:
        """The key under which labels are looked for."""
        return self._labels if isinstance(self._labels, str) else "labels"

    def teach(self, batch: Batch, labels: Tensor | None) -> None:
        """Train the exit head on a batch that is not sifted; nothing where there is none."""
        if isinstance(early := self._exit() if self.exit_head else None, ProbeExit):
            with torch.no_grad(), self.precision.context(self.device):
                early.learn(batch, self._targets(batch, labels, self.device))

    def score(self, pool: Pool, labels: Tensor | None, learn: bool = False) -> Scores:
        """Score the candidates of a pool, on the model's device; ``labels`` best lie on the host.

        With ``learn`` the exit head, if there is one, is trained on them, after it scored them.
        """
        device = self.device
        if isinstance(self._early, EarlyExit):
            self._early.release()  # held for a job that could not begin
        if self.replica_groups and not self._alike:
            check_alike(pool.batch, self.replica_groups, device)
            self._alike = True
        if self.scorer_device is not None and self.looks_at_model:
            self._own_exit().fetch()
        self._untold = False
        scores = self._score(pool, labels, learn, self.precision.dtype(device))
        twin = self._early.twin if isinstance(self._early, EarlyExit) else None
        if self._settled is None or self._settled[0] is not twin:
            self._settled = None if twin is None else (twin, set())
        if self._settled is not None and not self._untold:
            self._settled[1].add(_kind(pool, labels))
        return scores

    def ahead(self, pool: Pool, labels: Tensor | None) -> Callable[[HasRead], Scores] | None:
        """``score`` as a job to run elsewhere, beside the model's next step, with the weights of when it begins.

        None where that is to be done here first: by this twin no such batch was scored yet. Until the job has
        returned nothing else may be asked of this object.
        """
        early, settled = self._early, self._settled
        if not (isinstance(early, EarlyExit) and self.looks_at_model and settled):
            return None
        # One look at everything that this batch will meet was taken on the loop's own time.
        if not early.is_of(self.model) or early.twin is not settled[0]:
            return None
        if _kind(pool, labels) not in settled[1]:
            return None
        if self._overlapped is not settled[0]:
            self.check_overlap()
            self._overlapped = settled[0]
        dtype = self.precision.dtype(self.device)
        early.hold()

        def job(has_read: HasRead) -> Scores:
            try:
                if self.scorer_device is not None:
                    early.fetch()
                    has_read()
                return self._score(pool, labels, False, dtype)
            finally:
                early.release()

        return job

    @property
    def is_spread(self) -> bool:
        """Whether the model's weights lie on several ranks, so that scoring communicates."""
        spread = any(is_fsdp(each) or is_fsdp1(each) for each in self.model.modules())
        return spread or bool(self.replica_groups)

    def check_overlap(self) -> None:
        """Raise ScoringError where scoring must not run beside a step: it would need what other ranks do."""
        if self.is_spread:
            raise ScoringError(
                "overlap=True cannot score a model whose weights lie on several ranks: gathering them would meet "
                "the collectives of the training step; use overlap=False"
            )

    def _score(
        self, pool: Pool, labels: Tensor | None, learn: bool, dtype: torch.dtype | None
    ) -> Scores:
        samples, device = rows(pool.batch), self.scorer_device or self.device
        before = self._room.capped
        if self.scorer_device is not None:
            pool = replace(pool, batch=move(pool.batch, device))
        # Within it the ranks need nothing of each other, however much each has to run.
        with torch.no_grad(), scoring_in(dtype, device), self._opened():
            if self._score_fn is not None and self.looks_at_model:
                scores, labelled = self._by_function(self._score_fn, pool, learn)
            elif isinstance(self.criterion, Random):
                scores, labelled = self._at_random(pool, labels, device)
            else:
                scores, labelled = self._by_labels(pool, labels, device, learn)
        if not isinstance(scores, Tensor) or scores.shape != (samples,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(f"need one score per candidate, [{samples}], got {found}")
        device = self.device
        scores = self.agreed(scores.detach().to(device, torch.float32))
        labelled, finite = labelled.to(device), scores.isfinite()
        ranked = scores.masked_fill(~(finite & labelled), -torch.inf)
        capped = self._room.capped - before
        if not isinstance(capped, Tensor):  # filled in, not copied: nobody waits
            capped = torch.full((), capped, device=device)
        return Scores(ranked, (~finite & labelled).sum(), (~labelled).sum(), capped)

    def agreed(self, values: Tensor) -> Tensor:
        """``values``, on the model's device, of the first of the ranks that hold one replica together."""
        return agreed(values, self.replica_groups)

    @property
    def data_rank(self) -> int:
        """This rank, or the first of those that hold one replica together: they are handed the same data."""
        return data_rank(self.replica_groups)

    @property
    def replica_groups(self) -> list[Any]:
        """Process groups of the ranks that hold one replica together (tensor parallel); none is the rule."""
        model = self.model
        if self._replica is None or self._replica[0] is not model:
            self._replica = model, replica_groups(model)
        return self._replica[1]

    def _opened(self) -> AbstractContextManager[None]:
        # An exit head's own features are gathered as they are asked for.
        early = self._exit() if self.looks_at_model else None
        return early.opened() if isinstance(early, EarlyExit) else nullcontext()

    def _at_random(
        self, pool: Pool, labels: Tensor | None, device: torch.device
    ) -> tuple[Any, Tensor]:
        # Whatever the labels are: of those only a row that has none is told apart.
        everyone = torch.zeros(rows(pool.batch), dtype=torch.long)
        targets = Targets.of(everyone, device, False)
        labelled = torch.ones_like(everyone, dtype=torch.bool)
        if labels is not None and not labels.is_floating_point():
            labelled = (labels != IGNORED).reshape(len(everyone), -1).any(1)
        return self.criterion(Predictions(targets, _nothing, pool)), to_device(labelled, device)

    def _by_labels(
        self, pool: Pool, labels: Tensor | None, device: torch.device, learn: bool
    ) -> tuple[Any, Tensor]:
        assert labels is not None  # only a random criterion does without
        targets = self._targets(pool.batch, labels, device)
        if self.looks_at_model and not self._tried:
            self._try(pool.batch, targets)
        if self._reading is not None:
            return self._heard(self._reading, self._own_exit().with_labels, pool, learn)

        ends = self._ends(pool, labels, targets)

        def run(batch: Batch, targets: Targets, first: int) -> Iterator[Tensor]:
            known = ends if batch is pool.batch else None
            for part, wanted in self._parts(batch, targets, known):
                yield from self._exit().logits_at(part, wanted)

        def quick(
            batch: Batch, targets: Targets, values: tuple[Value, ...]
        ) -> dict[Value, Tensor] | None:
            known, places = ends if batch is pool.batch else None, None
            if known is not None and self._are_short(known, batch):
                batch, targets, known, places = by_length(batch, targets, known)
            found: list[dict[Value, Tensor]] = []
            for part, wanted in self._parts(batch, targets, known):
                values_of = self._own_exit().values_at(part, wanted, values)
                if values_of is None:
                    return None
                found.append(values_of)
            joined = {value: torch.cat([each[value] for each in found]) for value in values}
            if places is None:
                return joined
            return {v: torch.empty_like(x).index_copy_(0, places, x) for v, x in joined.items()}

        fused = quick if isinstance(self._early, EarlyExit) else None
        scores = self.criterion(Predictions(targets, run, pool, learn=learn, quick=fused))
        if isinstance(probe := self._early, ProbeExit):
            if learn:  # after the scores: those are of the weights before it
                probe.learn(pool.batch, targets)
            probe.forget()
        return scores, targets.labelled()

    def _parts(
        self, batch: Batch, targets: Targets, ends: Tensor | None
    ) -> Iterator[tuple[Batch, Targets]]:
        # As many rows at once as fill a device, and no more: what scoring needs on top of the training step.
        width, short = targets.length, False
        if ends is not None:
            width, short = batch[MASK].shape[1], self._are_short(ends, batch)
            batch = batch if short else without_mask(batch)
        size = self._rows_at_once or max(1, TOKENS_AT_ONCE // (4 * width if short else width))
        if isinstance(self._early, ProbeExit) or (size >= targets.samples and not short):
            yield batch, targets
            return
        for first in range(0, targets.samples, size):
            last = min(first + size, targets.samples)
            part, wanted = cut(batch, first, last), targets.part(first, last)
            if ends is not None and short:
                fields, longest = self._skips[("tail", *batch)], int(ends[first:last].max())
                part, wanted = shortened(part, wanted, longest, fields)
            yield part, wanted

    def _ends(self, pool: Pool, labels: Tensor, targets: Targets) -> Tensor | None:
        # Where the rows end, if what is behind need not be computed, or the mask that tells need not be looked at.
        read = ends = pool.ends
        if (
            read is None
            or ends is None
            or not isinstance(self._early, EarlyExit)
            or not self.looks_at_model
        ):
            return None
        width = pool.batch[MASK].shape[1]
        if labels.ndim > 1:
            if labels.device.type != "cpu" or labels.shape != (len(ends), width):
                return None
            ends = covering(ends, labels)
        masks = self._are_short(read, pool.batch)
        what = ("tail" if masks else "mask", *pool.batch)
        if masks and (self._compile or not self._are_short(ends, pool.batch)):
            return None  # compiled for one shape; or there is a label behind every end
        if not masks and POSITIONS in pool.batch:
            return (
                None  # by which some forwards tell packed rows apart, where they are given no mask
            )
        if what not in self._skips:
            same = self._same_without(what[0], pool.batch, targets, ends)
            if same is None:
                self._untold = not masks  # a forward without a mask is yet to be watched
                return None
            self._skips[what] = columns(pool.batch) if same else None
        return None if self._skips[what] is None else ends

    def _same_without(
        self, what: str, batch: Batch, targets: Targets, ends: Tensor
    ) -> bool | None:
        # Whether a row is predicted alike without its tail, or the mask; None where no row can tell.
        width, early = batch[MASK].shape[1], self._own_exit()
        asked = [
            row for row in range(targets.samples) if targets.starts[row] < targets.starts[row + 1]
        ]
        if what == "tail":
            asked = [row for row in asked if int(ends[row]) <= width - ROUND]
        if not asked:
            return None
        row = min(asked, key=lambda row: int(ends[row]))
        whole, wanted = cut(batch, row, row + 1), targets.part(row, row + 1)
        if what == "tail":
            wanted = at_the_end(wanted, int(ends[row]))
        expected = torch.cat(list(early.logits_at(whole, wanted)))
        try:
            if what == "tail":
                part, few = shortened(whole, wanted, int(ends[row]))
            else:
                part, few = without_mask(whole), wanted
            if agree(torch.cat(list(early.logits_at(part, few))), expected):
                return True
        except (TypeError, ValueError, RuntimeError):
            pass  # a forward that wants its mask, or all of its columns
        if what == "tail":
            warnings.warn(
                "the model predicts otherwise where the padding at the end of a row is cut off, so that is "
                "computed for the scores: right, but slower",
                stacklevel=2,
            )
        return False

    def _are_short(self, ends: Tensor, batch: Batch) -> bool:
        return int(ends.min()) < int(batch[MASK].shape[1])

    def _targets(self, batch: Batch, labels: Tensor | None, device: torch.device) -> Targets:
        assert labels is not None
        task = self._task_of(batch, labels)
        if task.ignored != IGNORED and not labels.is_floating_point():
            labels = labels.masked_fill(labels == task.ignored, IGNORED)
        return Targets.of(labels, device, bool(task.shift), self.positions, capacity=self._room)

    def _try(self, candidates: Batch, targets: Targets) -> None:
        # Once: are there predictions without the labels? Else the model's own loss is listened to.
        early, samples = self._exit(), targets.samples
        try:
            classes = early.classes(candidates, targets.length)
        except (ScoringError, TypeError, ValueError) as error:  # some forwards need their labels
            if not isinstance(early, EarlyExit) or not early.takes_labels(candidates):
                raise
            single = targets.length == 1
            self._reading = Reading.of(early.with_labels, candidates, samples, single)
            if self._reading is None:
                if isinstance(error, TypeError):
                    raise ScoringError(
                        f"the model cannot be run without labels ({error}), and with them it computes "
                        f"no cross_entropy that could be heard; pass score_fn= with one score per "
                        f"candidate"
                    ) from error
                raise
            self._warn()
        else:
            _check_classes(targets.labels, classes)
            self._check_head(candidates, targets.length, classes)
            if self._listens is not False:
                self._reading = self._stricter(candidates, targets)
                self._listens = self._reading is not None
        self._tried = True

    def _check_head(self, candidates: Batch, length: int, classes: int) -> None:
        # A stack named by the user may hold the head itself: what is left then ends in hidden units. Not where that
        # would gather all of a model that lies on several ranks.
        named = isinstance(self.exit_layer, str) and ":" in self.exit_layer
        spread = any(is_fsdp(each) or is_fsdp1(each) for each in self.model.modules())
        if not named or spread or self.exit_head is not None:
            return
        found = EarlyExit(self.model, "full").classes(candidates, length)
        if found != classes:
            raise ScoringError(
                f"at exit_layer={self.exit_layer!r} the model predicts {classes} classes, as a whole {found}: "
                f'its head is cut off; name a stack without the head, or use exit_head="probe"'
            )

    def _stricter(self, candidates: Batch, targets: Targets) -> Reading | None:
        # A loss may leave out what is labelled (padding, say): then it is listened to after all.
        early = self._exit()
        if self._shift is not None and self._heard_shift not in (None, self._shift):
            return None  # the caller knows better
        if targets.length == 1 or targets.labels.is_floating_point() or callable(self._labels):
            return None
        if not isinstance(early, EarlyExit) or not early.takes_labels(candidates):
            return None
        try:
            reading = Reading.of(early.with_labels, candidates, targets.samples, single=False)
            if reading is None or self._listens:
                return reading
            parts = reading.samples(early.with_labels, candidates, targets.samples)
            heard = torch.cat([(part.labels != IGNORED).sum(1) for part in parts])
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # a loss that does not run like this; the predictions do
        if skips_padding(self.model) or not int(heard.sum()):
            return None
        times = max(
            1, round(int(heard.sum()) / max(1, int(targets.counts.sum())))
        )  # several heads
        if torch.equal(heard, times * targets.counts):
            return None
        warnings.warn(
            "the model's own loss leaves out positions that are labelled (padding, or a mark of its "
            "own), so it is listened to while it is computed: right, but its head runs everywhere; mark "
            "them as -100 to spare that",
            stacklevel=2,
        )
        return reading

    def _by_function(self, function: ScoreFunction, pool: Pool, learn: bool) -> tuple[Any, Tensor]:
        def call(batch: Batch) -> Any:
            return function(self._own_exit(), batch)

        samples = rows(pool.batch)
        if not self._tried:
            few = min(2, samples)
            found, taps = listen(lambda: call(cut(pool.batch, 0, few)))
            one_each = isinstance(found, Tensor) and found.ndim == 1 and len(found) == few
            if taps and not one_each:
                self._reading = Reading.of(call, pool.batch, samples)
                self._warn()
            self._tried = True
        if self._reading is not None:
            return self._heard(self._reading, call, pool, learn)
        scores = call(pool.batch)
        if isinstance(scores, Tensor) and scores.ndim == 0:
            raise ScoringError(
                "score_fn returned one number for all candidates and did not call cross_entropy, "
                "where their losses could be heard apart; return one score per candidate, [P]"
            )
        return scores, torch.ones(samples, dtype=torch.bool, device=self.device)

    def _warn(self) -> None:
        assert self._reading is not None
        if self._reading.order == "alone":
            warnings.warn(
                "the loss of several samples together does not show which position belongs to which "
                "sample, so they are scored one at a time: right, but slower",
                stacklevel=2,
            )
        if self._reading.differs:
            warnings.warn(
                "the loss of a sample is not the mean of the cross-entropy that is heard of it: a mask, "
                "a weight or a further term is not part of the scores; mark what must not count as "
                "-100, or return one score per candidate from score_fn",
                stacklevel=2,
            )

    def _warn_of_unheard(self, task: Task, candidates: Batch, labels: Tensor) -> None:
        early = self._early
        if task.shift is not None or labels.ndim != 2 or labels.is_floating_point():
            return
        if isinstance(early, EarlyExit) and early.takes_labels(candidates):
            warnings.warn(
                "how the model's own loss reads its labels could not be heard; each is taken for that "
                "of the prediction at its place (pass shift_labels=True if the loss shifts them)",
                stacklevel=2,
            )

    def _heard(
        self, reading: Reading, call: Callable[[Batch], Any], pool: Pool, learn: bool
    ) -> tuple[Any, Tensor]:
        values = tuple(getattr(self.criterion, "values", ()))
        early, labelled = hear(reading, call, pool, self.positions, values, learn)
        return self.criterion(early), labelled

    @property
    def looks_at_model(self) -> bool:
        """Whether scores depend on the model at all."""
        return self._score_fn is not None or not isinstance(self.criterion, (Random, Rarity))

    def _exit(self) -> EarlyExit | ProbeExit:
        if self._early is None or not self._early.is_of(self.model):
            if self.exit_head is None:
                self._early = EarlyExit(
                    self.model, self.exit_layer, compile=self._compile, device=self.scorer_device
                )
            else:
                self._early = ProbeExit(self.model, self.exit_layer, self.exit_head)
        return self._early

    def _own_exit(self) -> EarlyExit:
        early = self._exit()
        assert isinstance(early, EarlyExit)  # exit heads have no loss to listen to, nor a score_fn
        return early

    def _task_of(self, candidates: Batch, labels: Tensor) -> Task:
        if self._task is None:
            # The model's own loss is asked first: the names of classes are not always right.
            task = Task()
            if self.looks_at_model and not callable(self._labels):
                task = self._exit().task(candidates, self.label_name, labels)
            self._heard_shift = task.shift
            shift = is_causal(self.model) if task.shift is None else task.shift
            task = Task(shift if self._shift is None else self._shift, task.ignored)
            self._warn_of_unheard(task, candidates, labels)
            if task.shift is None and are_inputs(labels, candidates, self.label_name):
                raise ScoringError(
                    "the labels are the inputs themselves, so either this is a causal model whose "
                    "loss shifts them (pass shift_labels=True) or an unmasked one "
                    "(shift_labels=False); every score would be wrong otherwise"
                )
            self._task = task
        return self._task


def _check_classes(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        check_soft(labels)
        if labels.shape[1] != classes:
            raise ScoringError(
                f"the labels are probabilities of {labels.shape[1]} classes, the model predicts {classes}"
            )
    elif labels.numel() and int(labels.max()) >= classes:
        raise ScoringError(
            f"found label {int(labels.max())}, the model predicts {classes} classes (0 to "
            f"{classes - 1}); is it the tokenizer that the model was built for?"
        )


def _kind(pool: Pool, labels: Tensor | None) -> Any:
    # What a pool asks of a model: its fields, and whether all rows are read to their end.
    batch, ends = pool.batch, pool.ends
    whole = ends is not None and int(ends.min()) == batch[MASK].shape[1]
    return type(batch), tuple(batch) if isinstance(batch, Mapping) else None, ends is None, whole


def _nothing(batch: Batch, targets: Targets, first: int) -> Iterator[Tensor]:
    return iter(())


def terms(criterion: ScoreOf) -> Iterator[ScoreOf]:
    """The criteria that a weighted sum is made of, or the one that it is."""
    if isinstance(criterion, Weighted):
        for _, each in criterion.terms:
            yield from terms(each)
    else:
        yield criterion
