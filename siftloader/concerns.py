"""What would take the sifting away without a word: looked for while a loader runs, and told once each."""

from __future__ import annotations

import warnings
from typing import Any, final

from torch import Tensor

from siftloader.schedule import Schedule
from siftloader.scorer import Scorer
from siftloader.stats import Stats
from siftloader.updates import Updates


PATIENCE = 100  # batches handed out, nothing sifted (or no optimizer step seen), before a warning
STILL = 256  # batches sifted by a model that does not change, before a warning


@final
class Concerns:
    """Warnings of one loader; its ``updates`` are those it counts steps in, if it does."""

    def __init__(self, schedule: Schedule, accumulation: int, updates: Updates | None) -> None:
        self._schedule, self._accumulation, self._updates = schedule, accumulation, updates
        self._unsifted = 0  # batches in a row handed out in eval mode before anything was sifted
        self._still: int | None = 0  # batches sifted before the scored model was seen to train
        self._signs: list[Any] = []  # of that
        self._stepped: Updates | None = None
        self._told_unsifted = self._told_accumulation = self._told_older = False

    def batch(self, counts: Stats, scorer: Scorer, training: bool) -> None:
        """One more batch is about to leave."""
        self._unsifted = 0 if training or counts.candidates else self._unsifted + 1
        if self._unsifted == PATIENCE and self._schedule.ever_sifts:
            self._tell_of_eval_mode(stacklevel=5)
        if self._updates is not None and not self._updates.steps:
            self._look_for_updates(counts.steps)
        if self._still is not None and training and counts.candidates:
            self._look_for_training(scorer, self._still)

    def epoch(self, counts: Stats, step: int, training: bool) -> None:
        """An epoch has ended."""
        self._look_at_accumulation(counts.steps)
        if counts.candidates or self._told_unsifted or not self._schedule.ever_sifts:
            return
        warmup = self._schedule.warmup_steps
        if not training:
            self._tell_of_eval_mode(stacklevel=5)
        elif step < warmup:
            self._told_unsifted = True
            warnings.warn(
                f"the epoch ended inside the warm-up ({step} of {warmup} steps): nothing "
                f"was sifted; lower warmup_steps if the run is short",
                stacklevel=4,
            )

    def older_iterator(self) -> None:
        """An iterator hands out a batch after a newer one was begun, of which the state tells."""
        if not self._told_older:
            self._told_older = True
            warnings.warn(
                "another iterator of this loader was begun while this one runs, and state_dict() tells where that "
                "one is; give an evaluation in between a loader of its own",
                stacklevel=5,
            )

    def anew(self, epoch: int) -> None:
        """This epoch was announced to a loader that has counted nothing yet."""
        if self._schedule.warmup_steps or self._schedule.total_steps:
            warnings.warn(
                f"epoch {epoch} begins, but this loader has no state and counts its steps from 0, so its warm-up "
                f"begins anew: restore its state_dict() too (Lightning does that inside an epoch only, else it "
                f"takes on_save_checkpoint and on_load_checkpoint), and build it once, not for every epoch",
                stacklevel=4,
            )

    def _look_for_updates(self, handed: int) -> None:
        if handed == max(PATIENCE, 2 * self._accumulation) and self._schedule.ever_sifts:
            warnings.warn(
                f"no optimizer step of the scored model was seen in {handed} batches, so the schedule "
                f"stands still: is it another model, or an optimizer with copies of the parameters? "
                f'count="batches" counts batches',
                stacklevel=5,
            )

    def _look_at_accumulation(self, handed: int) -> None:
        if self._updates is None or self._told_accumulation or self._updates.steps < 4:
            return  # too few to tell: an epoch's last partial step may come after its end
        found, each = handed / self._updates.steps, self._accumulation
        if abs(found - each) > 0.5 * each:
            self._told_accumulation = True
            warnings.warn(
                f"accumulation={each} was given, but {found:.1f} batches were handed out per optimizer "
                f"step: len(loader) and total_batches() are planned with it",
                stacklevel=5,
            )

    def _look_for_training(self, scorer: Scorer, still: int) -> None:
        # It may be a model that the loop does not train: replaced by a framework, or a copy of it.
        tensors = [each for each in scorer.given_model.parameters() if each.requires_grad]
        if self._stepped is None:  # fused optimizers write weights without leaving a sign
            self._stepped = Updates(lambda: scorer.given_model)
        signs = [_sign(each) for each in tensors] + [_sign(each.grad) for each in tensors]
        signs.append(self._stepped.steps)
        if not tensors or scorer.precision.seen or (self._signs and signs != self._signs):
            self._still, self._signs, self._stepped = None, [], None
            return
        self._still, self._signs = still + 1, signs
        if self._still == STILL:
            self._still, self._signs, self._stepped = None, [], None
            warnings.warn(
                f"{STILL} batches were sifted by a model that the loop neither called nor changed: is another one "
                f"trained, made after the loader or copied? Give model= the one that is, or a function that finds "
                f"it, or call attach_model(); a proxy that is meant to stay as it is wants requires_grad_(False)",
                stacklevel=5,
            )

    def _tell_of_eval_mode(self, stacklevel: int) -> None:
        if not self._told_unsifted:
            self._told_unsifted = True
            warnings.warn(
                "nothing was sifted because the model is in eval mode (as from_pretrained leaves "
                "it); call model.train() if this is training",
                stacklevel=stacklevel,
            )


def _sign(tensor: Tensor | None) -> Any:
    return None if tensor is None or tensor.is_inference() else (id(tensor), tensor._version)
