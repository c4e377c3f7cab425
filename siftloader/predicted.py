"""``Predicted``: a small model of your own that learns to predict a criterion, and scores with that.

    small = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 1))
    loader = SiftingDataLoader(dataset, batch_size=32, model=model, criterion=Predicted(small))

The large model scores a share of each pool, the small one all of it (Katharopoulos and Fleuret, 2017,
"Biased importance sampling for deep neural network training").

Letters: P samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from siftloader.batches import Batch, cut
from siftloader.errors import ScoringError
from siftloader.exits import EarlyExit, model_inputs
from siftloader.learners import Learner, State
from siftloader.predictions import Predictions
from siftloader.scores import Criterion, Loss, ScoreOf


MEMORY = 0.99  # of earlier scores in mean and scale, per pool


@final
class Predicted(Criterion):
    """The score that ``model`` predicts for a sample, in the unit of ``of``; it learns as it goes.

    ``model`` takes what the training model takes of a batch, as its forward names it (the labels too, if
    it has a place for them: a loss is hard to tell without), and returns one number per sample, [P] or
    [P, 1]. Every pool the true criterion is computed for a ``teach``-th of the rows, each time for the
    next ones, and ``model`` takes one AdamW step on the squared error. It stays in eval mode: dropout
    would draw from the training loop's random stream. Do not share its weights with the training model.
    To resume, save its ``state_dict()`` beside the loader's, and load both.
    """

    def __init__(
        self, model: nn.Module, of: ScoreOf | None = None, teach: float = 0.25, lr: float = 1e-3
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        of = Loss() if of is None else of
        if not callable(of) or isinstance(of, type):
            raise TypeError(f"of must be a criterion, as Loss(), got {of!r}")
        if isinstance(teach, bool) or not isinstance(teach, (int, float)) or not 0 < teach <= 1:
            raise ValueError(f"teach must be a number above 0 and at most 1, got {teach!r}")
        self.of, self.teach = of, teach
        self._inputs = EarlyExit(model, "full")
        self._small = _Standardised(model)
        self._learner = Learner(self._small, lr)

    def __call__(self, early: Predictions) -> Tensor:
        """[P], as the small model predicts them before it learns from a share of this very pool."""
        batch, samples = early.pool.batch, early.samples
        self._learner.to(early.device)
        with torch.no_grad():
            scores = self._small.scores(self._guesses(batch, samples))
        if not early.learn:  # somebody only looks
            return scores
        first, last = self.taught(early.pool.number, samples)
        truth = self.of(early.part(first, last)).detach()
        rows = batch if last - first == samples else cut(batch, first, last)

        def losses() -> Iterable[Tensor]:
            wanted = truth.to(early.device, torch.float32, copy=True)
            self._small.note(wanted)
            yield self._small.loss(self._guesses(rows, last - first), wanted)

        self._learner.step(losses)
        return scores

    def taught(self, pool: int, samples: int) -> tuple[int, int]:
        """First and last row (not included) of pool number ``pool`` whose true score is computed."""
        count = max(1, round(self.teach * samples))
        first = pool % math.ceil(samples / count) * count
        return first, min(first + count, samples)

    def state_dict(self) -> State:
        """Tensors in dicts, on the host: the small model, its optimizer, mean and scale of the scores."""
        return self._learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; StateError where it is that of another small model."""
        self._learner.load_state_dict(state)

    def digest(self) -> str:
        """The sha256 of all that."""
        return self._learner.digest()

    def _guesses(self, batch: Batch, samples: int) -> Tensor:
        model = self._small.model
        args, kwargs = model_inputs(model, batch, labels=self._inputs.takes_labels(batch))
        found = model(*args, **kwargs)
        if not isinstance(found, Tensor) or found.shape not in ((samples,), (samples, 1)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ScoringError(
                f"the model of Predicted must return one number per sample, [{samples}] or "
                f"[{samples}, 1], got {shape}"
            )
        return found.reshape(samples).float()


class _Standardised(nn.Module):
    """The small model, and the mean and scale of what it is to predict."""

    mean: Tensor
    squares: Tensor
    weight: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        first = next(model.parameters(), torch.zeros(0))
        for name in ("mean", "squares", "weight"):
            zero = torch.zeros((), dtype=torch.float32, device=first.device)
            self.register_buffer(name, zero)

    def scores(self, guesses: Tensor) -> Tensor:
        """From what the small model says to the unit of the criterion."""
        return self.mean + guesses * self._scale()

    def note(self, wanted: Tensor) -> None:
        """Take true scores into mean and scale; those that are not finite (no labels) do not count."""
        counts = wanted.isfinite()
        count = counts.sum()
        known = torch.where(counts, wanted, 0)
        mean = known.sum() / count.clamp_min(1)
        squares = torch.where(counts, wanted - mean, 0).square().sum()
        # Two sets of samples become one (Chan, Golub and LeVeque, 1979): no difference of large squares.
        old, apart = MEMORY * self.weight, mean - self.mean
        total = (old + count).clamp_min(1)
        self.squares.copy_(MEMORY * self.squares + squares + apart.square() * old * count / total)
        self.mean.add_(torch.where(count > 0, apart * count / total, 0))
        self.weight.copy_(old + count)

    def loss(self, guesses: Tensor, wanted: Tensor) -> Tensor:
        """The mean squared error in units of the scale."""
        counts = wanted.isfinite()
        target = torch.where(counts, (wanted - self.mean) / self._scale(), 0)
        error = torch.where(counts, guesses - target, 0)
        return error.square().sum() / counts.sum().clamp_min(1)

    def _scale(self) -> Tensor:
        return (self.squares / self.weight.clamp_min(1)).sqrt().clamp_min(1e-6)
