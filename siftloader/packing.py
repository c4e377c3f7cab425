"""Token ids of documents to samples of equal length, nothing lost that is not counted.

    packed = pack_mlm(documents, 128, cls=2, sep=3, pad=0)       # packed.rows [n, 128]
    rest = packed.tail                                           # documents again: pack it with others

One call packs one block of one source, so samples never cross sources. What does not fill a sample is
handed back, to be packed with the tails of other blocks; the last call of all keeps or drops it.

Letters: n samples, T tokens of a sample, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


# Stands for a separator while tokens are counted: the real id may also occur in text.
_BREAK = -1


@dataclass(frozen=True)
class Documents:
    """Documents end to end: ``ids`` of all of them, and how many of the ids each has, [D]."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]


@dataclass
class Packing:
    """Where the tokens went. Text only: separators and padding are counted apart.

    packing.tokens == packing.kept + packing.tail_kept + packing.dropped    # once all is packed
    """

    documents: int = 0
    tokens: int = 0  # of text, that came in
    kept: int = 0  # in full samples, or in a pair
    carried: int = 0  # of these, packed with the tails of other blocks
    tail_kept: int = 0  # in the padded last sample of a source
    dropped: int = 0  # cut off a pair, or did not fill a last sample
    reused: int = 0  # in a pair for the second time, as a random second segment
    padding: int = 0
    samples: int = 0
    random: int = 0  # pairs whose second segment is from another document
    short: int = 0  # pairs that aimed at less than a full sample
    alone: int = 0  # pairs that had to be true: there was no other document

    def __add__(self, other: Packing) -> Packing:
        return Packing(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


@dataclass(frozen=True)
class Packed:
    """Samples [n, T], where their tokens came from, and the documents' ends that filled none."""

    rows: NDArray[Any]
    tail: Documents
    packing: Packing


def pack_mlm(
    documents: Documents, seq_len: int, *, cls: int, sep: int, pad: int, last: bool = False
) -> Packed:
    """Samples ``[CLS] T - 2 tokens [SEP]``; the ``last`` tail is padded, so nothing drops.

    Documents run on, with a [SEP] between two of them wherever it falls. So the samples without
    their first and last token, laid end to end, are the documents joined by [SEP].
    """
    if seq_len < 3:
        raise ValueError(f"seq_len must be at least 3: [CLS], a token, [SEP]; got {seq_len}")
    width = seq_len - 2
    stream, packing = _stream(documents, after_last=False)
    body, rest = _cut(stream, width)
    packing.kept = int((body != _BREAK).sum())
    if last and (rest != _BREAK).any():
        packing.tail_kept = int((rest != _BREAK).sum())
        packing.padding = width - len(rest)
    rows = np.empty((len(body) + bool(packing.tail_kept), seq_len), documents.ids.dtype)
    rows[:, 0], rows[:, -1] = cls, sep
    rows[: len(body), 1:-1] = np.where(body == _BREAK, sep, body)
    if packing.tail_kept:
        rows[-1, 1:] = pad
        rows[-1, 1 : len(rest) + 1] = np.where(rest == _BREAK, sep, rest)
        rows[-1, len(rest) + 1] = sep
        rest = rest[:0]
    packing.samples = len(rows)
    tail = _documents(rest, documents)
    tail = replace(tail, lengths=tail.lengths[tail.lengths > 0])
    return Packed(rows, tail, packing)


def pack_clm(documents: Documents, seq_len: int, *, eos: int, last: bool = False) -> Packed:
    """Samples of running text, an end-of-text id after every document.

    A ``last`` tail that fills no sample is dropped and counted: a causal model knows no padding.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2: a token and its successor; got {seq_len}")
    stream, packing = _stream(documents, after_last=True)
    # Every document that came in ends: one whose tokens all went before is here for its end alone.
    body, rest = _cut(stream, seq_len)
    packing.kept = int((body != _BREAK).sum())
    if last:
        packing.dropped = int((rest != _BREAK).sum())
        rest = rest[:0]
    rows = np.where(body == _BREAK, eos, body).astype(documents.ids.dtype)
    packing.samples = len(rows)
    return Packed(rows, _documents(rest[:-1] if len(rest) else None, documents), packing)


def _stream(documents: Documents, after_last: bool) -> tuple[NDArray[np.int64], Packing]:
    # All ids, with a break after each document, or between any two.
    lengths = documents.lengths if after_last else documents.lengths[documents.lengths > 0]
    ids = documents.ids.astype(np.int64)
    if len(ids) and ids.min() < 0:
        raise ValueError(f"token ids must not be negative, got {ids.min()}")
    ends = np.cumsum(lengths)
    stream = np.insert(ids, ends if after_last else ends[:-1], _BREAK)
    return stream, Packing(documents=int((lengths > 0).sum()), tokens=len(ids))


def _cut(stream: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # [n, width] of the stream, and what is left of it
    rows = len(stream) // width
    return stream[: rows * width].reshape(rows, width), stream[rows * width :]


def _documents(rest: NDArray[np.int64] | None, like: Documents) -> Documents:
    # What lies between the breaks, if only an end; None is nothing at all.
    if rest is None:
        return Documents(like.ids[:0], np.empty(0, np.int64))
    breaks = np.flatnonzero(np.concatenate([[_BREAK], rest, [_BREAK]]) == _BREAK)
    return Documents(rest[rest != _BREAK].astype(like.ids.dtype), np.diff(breaks) - 1)
