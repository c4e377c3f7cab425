"""Token lists of documents to samples of equal length, nothing lost that is not counted.

    packing = Packing()
    blocks = list(pack_mlm(documents, 128, cls=2, sep=3, pad=0, packing=packing))   # each [n, 128]
    assert packing.tokens == packing.kept + packing.tail_kept + packing.tail_dropped

One call packs one source, so samples never cross sources. The state is the part of a sample not yet
full: documents stream through.

Letters: n samples of a block, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Ids = NDArray[np.int64]
# Stands for a separator while tokens are counted: the real id may also occur in text.
_BREAK = -1


@dataclass
class Packing:
    """Where the tokens went. Text only: separators and padding are counted apart."""

    documents: int = 0
    tokens: int = 0  # of text, that came in
    kept: int = 0  # in full samples
    tail_kept: int = 0  # in the padded last sample of a source
    tail_dropped: int = 0  # did not fill a last sample
    padding: int = 0
    samples: int = 0

    def __add__(self, other: Packing) -> Packing:
        return Packing(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


def pack_mlm(
    documents: Iterable[Sequence[int] | NDArray[np.integer]],
    seq_len: int,
    *,
    cls: int,
    sep: int,
    pad: int,
    packing: Packing | None = None,
) -> Iterator[Ids]:
    """Yield blocks [n, T] of ``[CLS] T - 2 tokens [SEP]``; the tail is padded, so nothing drops.

    Documents run on, with a [SEP] between two of them wherever it falls. So the samples without
    their first and last token, laid end to end, are the documents joined by [SEP].
    """
    if seq_len < 3:
        raise ValueError(f"seq_len must be at least 3: [CLS], a token, [SEP]; got {seq_len}")
    packing = Packing() if packing is None else packing
    for body in _cut(_broken(documents, packing, before=True), seq_len - 2):  # [n, <= T - 2]
        rows, width = body.shape
        block = np.full((rows, seq_len), pad, np.int64)
        block[:, 0] = cls
        block[:, 1 : width + 1] = np.where(body == _BREAK, sep, body)
        block[:, width + 1] = sep
        text = int((body != _BREAK).sum())
        if width == seq_len - 2:
            packing.kept += text
        else:
            packing.tail_kept += text
            packing.padding += seq_len - 2 - width
        packing.samples += rows
        yield block


def pack_clm(
    documents: Iterable[Sequence[int] | NDArray[np.integer]],
    seq_len: int,
    *,
    eos: int,
    packing: Packing | None = None,
) -> Iterator[Ids]:
    """Yield blocks [n, T] of running text, an end-of-text id after every document.

    A tail that fills no sample is dropped and counted: a causal model knows no padding.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2: a token and its successor; got {seq_len}")
    packing = Packing() if packing is None else packing
    for body in _cut(_broken(documents, packing, before=False), seq_len):
        text = int((body != _BREAK).sum())
        if body.shape[1] < seq_len:
            packing.tail_dropped += text
            continue
        packing.kept += text
        packing.samples += len(body)
        yield np.where(body == _BREAK, eos, body)


def _broken(
    documents: Iterable[Sequence[int] | NDArray[np.integer]], packing: Packing, before: bool
) -> Iterator[Ids]:
    # One stream: a break between documents (`before` all but the first), or after each.
    for document in documents:
        ids = np.asarray(document, np.int64)
        if not len(ids):
            continue
        if ids.min() < 0:
            raise ValueError(f"token ids must not be negative, got {ids.min()}")
        first = packing.documents == 0
        packing.documents += 1
        packing.tokens += len(ids)
        if not before:
            yield np.append(ids, _BREAK)
        else:
            yield ids if first else np.insert(ids, 0, _BREAK)


def _cut(stream: Iterator[Ids], width: int) -> Iterator[Ids]:
    # Blocks [n, width] of the stream, then what is left as [1, < width].
    rest = np.empty(0, np.int64)
    for piece in stream:
        rest = np.concatenate([rest, piece])
        rows = len(rest) // width
        if rows:
            yield rest[: rows * width].reshape(rows, width)
            rest = rest[rows * width :]
    if len(rest):
        yield rest.reshape(1, -1)
