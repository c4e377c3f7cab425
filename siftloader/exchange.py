"""One selection over the pools of all ranks, and the moves after which every rank has as many winners.

    deal = deal_of(agreement, scores, keep, TopK(), pool)
    deal.kept                                  # [k] those of this rank's candidates that won
    batch = deal.handed(candidates)            # b rows, some of them from other ranks

Candidate i of rank r is number ``i * R + r`` of the union, as the ranks of a stream take turns: so the winners
are those that one rank would find that drew all of it. A rank keeps its own, up to b of them; only what is more
than b moves, to ranks that have less. The scores come to the host, which waits for the device once a step.

Letters: R ranks, P candidates of this rank, n candidates of all of them, b rows handed out by each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
import torch.distributed as dist
from torch import Tensor

from siftloader.agreement import Agreement, number_of
from siftloader.batches import (
    IGNORED,
    Batch,
    has_mask,
    replaced,
    select,
    stretched,
    tensor_fields,
)
from siftloader.errors import BatchError, RanksDisagree, ScoringError
from siftloader.pool import Pool
from siftloader.selection import Selection


Weigh: TypeAlias = Callable[[Tensor, int, Pool], Tensor]


@dataclass(frozen=True)
class Moves:
    """Who hands out which winner: of this rank, all indices into its own candidates, on the host.

    ``kept`` are its winners and ``stays`` those it hands out itself; ``sends[d]`` go to rank d, from s come
    ``receives[s]`` rows; ``order`` puts what stays and then what comes, by rank, into the order of the union.
    ``mine`` are the numbers among all winners of what it hands out.
    """

    kept: Tensor
    stays: Tensor
    sends: list[Tensor]
    receives: list[int]
    order: Tensor
    mine: Tensor
    any: bool  # whether any rank sends


def moves(winners: Tensor, rows_of: Tensor, keep: int, ranks: int, rank: int) -> Moves:
    """Give every rank ``keep`` winners with as few moves as there can be.

    ``winners`` are the ranks they come from and ``rows_of`` their rows there, both [R * keep], in the order of
    the union. What a rank has too much goes, the last ones of the lowest rank first, to the lowest rank that
    lacks some.
    """
    by_rank = winners.sort(stable=True).indices
    begins = torch.searchsorted(winners[by_rank], winners[by_rank])
    place = torch.empty_like(winners)
    place[by_rank] = torch.arange(len(winners)) - begins
    surplus = by_rank[place[by_rank] >= keep]
    lack = (keep - torch.bincount(winners, minlength=ranks)).clamp_min(0)
    goes_to = winners.clone()
    goes_to[surplus] = torch.repeat_interleave(torch.arange(ranks), lack)

    own, mine = winners == rank, goes_to == rank
    comes, goes = (mine & ~own).nonzero()[:, 0], (own & ~mine).nonzero()[:, 0]
    comes = comes[winners[comes].sort(stable=True).indices]
    goes = goes[goes_to[goes].sort(stable=True).indices]
    arriving = torch.cat([(own & mine).nonzero()[:, 0], comes])
    sizes = torch.bincount(goes_to[goes], minlength=ranks).tolist()
    return Moves(
        kept=rows_of[own],
        stays=rows_of[own & mine],
        sends=[*torch.split(rows_of[goes], sizes)],
        receives=torch.bincount(winners[comes], minlength=ranks).tolist(),
        order=arriving.sort().indices,
        mine=mine.nonzero()[:, 0],
        any=len(surplus) > 0,
    )


@final
class Deal:
    """What a selection over all ranks means for this one."""

    def __init__(
        self, agreement: Agreement, found: Moves, weights: Tensor | None, winners: int
    ) -> None:
        self._agreement, self._moves, self._winners = agreement, found, winners
        self.kept, self.weights = (
            found.kept,
            weights,
        )  # [k] of its candidates; [b] of what it hands out

    def handed(
        self, candidates: Batch, pad_id: int = 0, label: str = "labels", ignored: int = IGNORED
    ) -> Batch:
        """The b rows that this rank hands out, in the order of the union; all ranks must call it.

        Every field must be a tensor (BatchError). Rows of other lengths elsewhere are padded as ``merge`` does.
        """
        found = self._moves
        candidates = self._alike(candidates, pad_id, label, ignored)
        if not found.any:
            return select(candidates, found.stays)
        columns = tensor_fields(candidates)
        device = columns[0].device
        send = torch.cat(found.sends).to(device)
        packed = torch.cat([_bytes(column.index_select(0, send)) for column in columns], 1)
        arrived = packed.new_empty(sum(found.receives), packed.shape[1])
        sizes = [len(each) for each in found.sends]
        dist.all_to_all_single(
            arrived, packed, found.receives, sizes, group=self._agreement.process_group
        )
        stays, order = found.stays.to(device), found.order.to(device)
        parts, first = [], 0
        for column in columns:
            width = column.shape[1:].numel() * column.element_size()
            # A copy, so that its first byte lies where the dtype wants it.
            there = column.new_empty(len(arrived), *column.shape[1:])
            if width:
                _bytes(there).copy_(arrived[:, first : first + width])
            parts.append(torch.cat((column.index_select(0, stays), there)).index_select(0, order))
            first += width
        return replaced(candidates, parts)

    def _alike(self, candidates: Batch, pad_id: int, label: str, ignored: int) -> Batch:
        # The same shapes on all ranks, and moves that fit together. What one of them must refuse, all refuse.
        try:
            columns = tensor_fields(candidates)
            if len({column.device for column in columns}) > 1:
                raise BatchError(
                    'scope="global" moves rows between ranks: all tensors of a batch must lie on one device'
                )
        except BatchError:
            self._agreement.failed()
            raise
        dims = number_of(_keys(candidates), [(str(each.dtype), each.ndim) for each in columns])
        shape = [n for each in columns for n in (each.ndim, *each.shape[1:])]
        told = self._agreement.gathered(torch.tensor([self._winners, dims, *shape]))
        if any(each[0] != self._winners for each in told):
            raise RanksDisagree(
                "the ranks disagree: each selected other winners from the same scores; give all of them the same "
                "selection, with the same seed, which may depend on scores and fields alone"
            )
        if any(each[1] != dims for each in told):
            raise RanksDisagree(
                "the ranks disagree: their batches have other fields, in another order, or of another dtype; "
                "draw the same kind of data on all of them"
            )
        found = [each[2:] for each in told]
        most = torch.stack(found).amax(0)
        if all(torch.equal(each, most) for each in found):
            return candidates
        if not has_mask(candidates):
            raise BatchError(
                "the rows of the ranks differ in shape, and there is no attention_mask to tell padding from "
                "text; pad all of them to one length in collate_fn"
            )
        shapes, left = [], most.tolist()
        for each in columns:
            shapes.append(left[1 : each.ndim])
            left = left[each.ndim :]
        return stretched(candidates, shapes, pad_id, label, ignored)


def deal_of(
    agreement: Agreement,
    scores: Tensor,
    keep: int,
    selection: Selection,
    pool: Pool,
    weigh: Weigh | None = None,
) -> Deal:
    """Select ``R * keep`` of the candidates of all ranks by their scores [P]; all ranks must call it.

    ``weigh`` gives the weights [n] of a selection. The selection sees scores and fields of all ranks, never their
    batches.
    """
    found = agreement.gathered(torch.cat((scores.new_tensor([keep]), scores)))
    if any(int(each[0]) != keep for each in found):
        raise RanksDisagree(
            f"the ranks disagree: they hand out {[int(each[0]) for each in found]} rows at this step; give all "
            f"the same batch size"
        )
    ranks, counts = len(found), [len(each) - 1 for each in found]
    ranks_of = torch.repeat_interleave(torch.arange(ranks), torch.tensor(counts))
    rows_of = torch.cat([torch.arange(count) for count in counts])
    order = (rows_of * ranks + ranks_of).sort().indices

    def of_all(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)[order]

    union = Pool(
        _OutOfSight(), pool.number, 0, _Fields(pool, lambda own: of_all(agreement.gathered(own)))
    )
    all_scores = of_all([each[1:] for each in found])
    index = selection(all_scores, ranks * keep, union)
    dealt = moves(ranks_of[order][index], rows_of[order][index], keep, ranks, agreement.rank)
    weights = None if weigh is None else weigh(all_scores, ranks * keep, union)[index][dealt.mine]
    return Deal(agreement, dealt, weights, number_of(index.tolist()))


@final
class _Fields(Mapping[str, Tensor]):
    """What is known of the candidates of all ranks, [n], fetched when it is asked for."""

    def __init__(self, pool: Pool, of_all: Callable[[Tensor], Tensor]) -> None:
        self._pool, self._of_all = pool, of_all

    def __getitem__(self, name: str) -> Tensor:
        return self._of_all(self._pool.field(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pool.fields)

    def __len__(self) -> int:
        return len(self._pool.fields)


@final
class _OutOfSight:
    """Where a batch would be."""

    def __getattr__(self, name: str) -> Any:
        raise ScoringError(
            'scope="global" selects by the scores and fields of all ranks, their batches stay where they are; '
            "name a field instead of computing from the batch"
        )

    __getitem__ = __getattr__


def _keys(batch: Batch) -> Any:
    # The names of the fields, in their order, which is that in which the rows travel.
    if isinstance(batch, Mapping):
        return [(str(key), _keys(each)) for key, each in batch.items()]
    return [_keys(each) for each in batch] if isinstance(batch, (list, tuple)) else None


def _bytes(rows: Tensor) -> Tensor:
    # [n, bytes of a row]
    return rows.reshape(len(rows), rows.shape[1:].numel()).contiguous().view(torch.uint8)
