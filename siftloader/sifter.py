"""``Sifter``: the step itself, for loops that draw their own candidates.

    sift = Sifter(model, exit_layer=1, criterion="entropy")
    batch = sift(get_batch("train"))        # P rows in, keep * P out

Letters: b rows kept, P candidates, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siftloader.agreement import Agreement
from siftloader.batches import Batch, Copies, move, rows, select
from siftloader.errors import RanksDisagree, ScoringError
from siftloader.exchange import Deal, deal_of
from siftloader.heads import ExitHead
from siftloader.labels import Labels
from siftloader.padding import ends_of
from siftloader.pool import Pool
from siftloader.predicted import Predicted
from siftloader.schedule import check_keep, whole
from siftloader.scorer import Model, ScoreFunction, Scorer, Scores, terms
from siftloader.scores import Random, ScoreOf
from siftloader.selection import Selection, TopK, check_share, samples, weights
from siftloader.stats import Stats
from siftloader.targets import Positions, to_device


class Winners(NamedTuple):
    """Of a pool: the indices of those that won, rising; scores [P]; weights if they are wanted.

    With ``scope="rank"`` b of them, and weights [P]; with "global" any number, of which some go to other ranks as
    the deal says, and weights [b] of what is handed out.
    """

    kept: Tensor
    scores: Tensor
    weights: Tensor | None
    deal: Deal | None = None


class Sifter:
    """Keep the candidates with the highest score: P in, ``keep * P`` out.

    sift = Sifter(model, exit_layer=1, criterion="entropy", keep=0.5)
    batch = sift(candidates)            # same structure and types, rows in candidate order
    scores = sift.score(candidates)     # [P] float32 on the model's device, nats

    ``model`` is the live model, wrapped or not, or a callable that finds it. ``exit_layer`` is j in 1..N,
    ``"path.to.stack:j"``, or ``"full"``. Labels are ``batch["labels"]``, else the last element of a
    tuple, else ``labels`` (a key, or a function of the batch). ``score_fn(early, batch)`` replaces all
    that: it gets the early exit to call like the model and returns [P]. ``shift_labels`` says whether the
    label at t + 1 belongs to the prediction at t; found for Hugging Face models. ``autocast`` is the
    dtype to score in where the training loop owns the autocast context (a loader learns it from the
    loop's first forward).

    ``selection`` says who wins given the scores (``TopK``), ``positions`` at which labelled positions to
    score (all), ``exit_head="probe"`` trains a small head for the exit beside the model: for models
    whose own head does not fit their middle. ``sift_weight`` adds that field [b] to the batch: with it
    the weighted mean over the kept estimates the mean over all candidates, unbiased.

    Candidates are scored ``score_batch_size`` rows at a time (as many as have 16,384 positions), in a twin that
    ``compile`` compiles (True, or a mode of ``torch.compile``), and where ``scorer_device`` says, by a copy of
    the layers that it takes, brought up to date for every pool.

    ``scope="global"`` selects from the pools of all ranks of ``process_group`` (all ranks) together, as one rank
    would that drew them all, and moves winners until each has as many; the scores of a step then come to the host.

    Labels of -100 are not predicted. Rows without labels and rows whose score is not finite score
    ``-inf``, so they rank last. Nothing of the model is touched: no parameter, buffer, flag, hook or
    random stream. (Paper, section 7.)
    """

    def __init__(
        self,
        model: Model,
        *,
        exit_layer: int | str = 1,
        criterion: ScoreOf | str = "loss",
        keep: float = 0.5,
        scope: Literal["rank", "global"] = "rank",
        selection: Selection | None = None,
        positions: Positions | None = None,
        sift_weight: bool = False,
        exit_head: ExitHead | Literal["probe"] | None = None,
        labels: Labels | None = None,
        score_fn: ScoreFunction | None = None,
        shift_labels: bool | None = None,
        autocast: torch.dtype | None = None,
        score_batch_size: int | None = None,
        compile: bool | str = False,  # noqa: A002
        scorer_device: torch.device | str | None = None,
        process_group: Any = None,
    ) -> None:
        check_keep(keep)
        if isinstance(keep, Mapping):
            raise TypeError("a Sifter counts no steps: keep must be a number, not one by step")
        if isinstance(selection, type):
            raise TypeError(f"selection must be an object: {selection.__name__}(), with brackets")
        self.scorer = Scorer(
            model,
            exit_layer=exit_layer,
            criterion=criterion,
            positions=positions,
            exit_head=exit_head,
            labels=labels,
            score_fn=score_fn,
            shift_labels=shift_labels,
            autocast=autocast,
            score_batch_size=score_batch_size,
            compile=compile,
            scorer_device=scorer_device,
        )
        if scope not in ("rank", "global"):
            raise ValueError(f'scope must be "rank" or "global", got {scope!r}')
        predicts = any(isinstance(each, Predicted) for each in terms(self.scorer.criterion))
        self.learns = predicts or exit_head is not None
        if scope == "global" and self.learns:
            raise ValueError(
                'scope="global" compares scores of all ranks, but exit_head and Predicted learn on every rank by '
                'itself; use scope="rank", or a criterion that does not learn'
            )
        self.keep, self.scope, self.agreement = keep, scope, Agreement(process_group)
        self.selection = selection or TopK()
        if keep < 1:
            check_share(self.selection, keep)
        self.weighs = sift_weight
        if sift_weight and not (self._is_random or samples(self.selection)):
            weights(self.selection, torch.zeros(2), 1, Pool())  # says what is needed
        self.counts = Stats()
        self._copies = Copies()
        self.pools = 0  # scored so far: the key of random draws

    def of(self, model: nn.Module, keep: float) -> Sifter:
        """Another one with the same options, for a copy of the model; what was learned is copied too.

        It selects on its own rank, and hands out no weights.
        """
        other = copy.copy(self)
        other.scorer, other.selection = self.scorer.of(model), copy.deepcopy(self.selection)
        other.keep, other.scope, other.weighs = keep, "rank", False
        other.counts, other._copies = Stats(), Copies()
        return other

    @property
    def exit_head(self) -> ExitHead | None:
        """The head that is trained beside the model, if there is one."""
        return self.scorer.exit_head

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far, a plain dict; reading it may wait for the GPU."""
        return self.counts.read()

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on: after wrapping it, say."""
        self.scorer.attach_model(model)

    def __call__(self, candidates: Batch) -> Batch:
        """The best ``keep * P`` rows of ``candidates``; raises ValueError where that is not whole."""
        keep = whole(rows(candidates) * self.keep)
        if keep is None:
            raise ValueError(
                f"{rows(candidates)} candidates * keep {self.keep} is not a whole number of rows"
            )
        labels, ends = self.scorer.labels_of(candidates), ends_of(candidates)
        candidates = self._copies.to(candidates, self.scorer.device)
        try:
            return self.handed(candidates, self.winners(candidates, labels, keep, ends=ends))
        except RanksDisagree:
            raise
        except BaseException:
            if self._is_global:
                self.agreement.failed()  # the others wait for what this rank has to tell
            raise

    def score(self, candidates: Batch) -> Tensor:
        """One score per candidate, [P] float32, on the model's device; -inf ranks last."""
        pool = self.pool(move(candidates, self.scorer.device), ends=ends_of(candidates))
        return self.scorer.score(pool, self.scorer.labels_of(candidates)).values

    def pool(
        self,
        candidates: Batch,
        fields: Mapping[str, Tensor] | None = None,
        ends: Tensor | None = None,
    ) -> Pool:
        """Candidates on the model's device as the next pool, with what else is known of them, [P]."""
        agreement, rank, ranks = self.agreement, self.scorer.data_rank, 1
        if self._is_global:
            rank, ranks = agreement.rank, agreement.ranks
        return Pool(candidates, self.pools, rank, fields or {}, ranks, ends)

    def winners(
        self,
        candidates: Batch,
        labels: Tensor | None,
        keep: int,
        fields: Mapping[str, Tensor] | None = None,
        ends: Tensor | None = None,
        known: Scores | None = None,
    ) -> Winners:
        """Which rows of ``candidates``, on the model's device, are kept; counted.

        ``ends`` [P] say on the host how many positions of each row are read, where that is known; ``known`` are
        the scores, where somebody has found them.
        """
        pool, deal = self.pool(candidates, fields, ends), None
        if self._is_global:
            self._check_replicas()
        with self.counts.scoring.timing(self.scorer.device):
            found = known or self.scorer.score(pool, labels, learn=True)
            scores = found.values
            weigh = self._weights_of if self.weighs else None
            if self._is_global:
                deal = deal_of(self.agreement, scores, keep, self.selection, pool, weigh)
                kept = to_device(deal.kept, scores.device)
                weighed = None if deal.weights is None else to_device(deal.weights, scores.device)
            else:
                kept = self.selection(scores, keep, pool)
                weighed = None if weigh is None else weigh(scores, keep, pool)
        self.pools += 1
        self.counts.count_pool(scores, kept, found.nonfinite, found.unlabelled, found.capped)
        return Winners(kept, scores, weighed, deal)

    def handed(self, candidates: Batch, won: Winners, pad_id: int = 0) -> Batch:
        """The batch that these winners make; with ``scope="global"`` all ranks must call it."""
        if won.deal is None:
            return weighted(select(candidates, won.kept), won.weights, won.kept)
        batch = won.deal.handed(candidates, pad_id, self.scorer.label_name, self.scorer.ignored)
        return weighted(batch, won.weights, None)

    def _check_replicas(self) -> None:
        own = set(self.agreement.members)
        for group in self.scorer.replica_groups:
            if len(own & set(dist.get_process_group_ranks(group))) > 1:
                raise ScoringError(
                    'scope="global" would count the candidates of a tensor parallel replica once for each of its '
                    'ranks; name one rank of each replica, as process_group=mesh["dp"].get_group() does'
                )

    @property
    def _is_global(self) -> bool:
        return self.scope == "global" and self.agreement.ranks > 1

    @property
    def _is_random(self) -> bool:
        return isinstance(self.scorer.criterion, Random) and not self.scorer.by_function

    def _weights_of(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        # A random criterion makes any selection a draw: all that can win do so alike.
        if self._is_random and not samples(self.selection):
            can_win = scores.isfinite()
            return torch.where(can_win, (keep / can_win.sum().clamp_min(1)).clamp_min(1), 0.0)
        return weights(self.selection, scores, keep, pool)


def weighted(batch: Batch, weights: Tensor | None, index: Tensor | None) -> Batch:
    """The batch with ``sift_weight`` [b], where weights [P] are wanted."""
    if weights is None:
        return batch
    if not isinstance(batch, MutableMapping):
        raise ValueError(
            f"sift_weight is a field of the batch, which must be a dict; got {type(batch).__name__}"
        )
    out = copy.copy(batch)  # keeps the type
    out["sift_weight"] = weights if index is None else weights.index_select(0, index)
    return out
