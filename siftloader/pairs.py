"""BERT's sentence pairs: tokenised documents to ``[CLS] A [SEP] B [SEP]``, and whether B follows A.

    documents = Segmented(ids, segments, documents)         # sentences by ``segment``, then tokens
    rows, random = pack_pairs(documents, 512, cls=2, sep=3, pad=0, key=(seed, split, block),
                              pairing=pairing)              # [n, T], [n]: 1 = B is from elsewhere
    assert pairing.tokens == pairing.kept + pairing.dropped

The recipe of Devlin et al. (2018), with two changes. The length a pair aims at is drawn for every pair,
not once for a document, so a tenth of the pairs is short however long the documents are. And what
truncation cuts off the end is where the next pair begins, so most of it is not lost.

Letters: n pairs, T tokens of a pair, S segments (sentences), D documents.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


SHORT = 0.1  # of the pairs aim at a length drawn from 2..T - 3 instead of T - 3

ROWS = 256  # pairs that random numbers are drawn for at a time

# After these a full stop ends no sentence; after those in the second row only before a number.
_TITLES = "Mr Ms Dr St Sr Jr Lt vs cf Mrs Mme Rev Gen Col Sgt Gov Sen Hon e.g i.e Prof Capt Messrs"
_COUNTED = "No no p pp vol Vol fig Fig"
_SMALL = "a-zß-öø-ÿα-ωа-џ"  # a sentence does not begin with one of these
_OPEN, _CLOSE = r"\"'“‘«»„(\[{¿¡_*—–\-", r"\"'“”’«»)\]}_*"
_END = re.compile(
    # Punctuation (the first of a run: whatever follows belongs to it) and what closes with it...
    rf"[.!?…](?<![.!?…]{{2}})[.!?…]*[{_CLOSE}]*"
    # ... before a space and what may begin the next sentence; a line end is dealt with below ...
    rf"(?=[^\S\n]+[{_OPEN}]*[^\s{_OPEN}{_SMALL},;:.!?…”)\]}}])"
    # ... unless it is the point of an abbreviation, or of an initial ("I" is a word).
    + "".join(rf"(?<!\b{re.escape(word)}\.)" for word in _TITLES.split())
    + "".join(rf"(?<!\b{word}\.(?=\s\d))" for word in _COUNTED.split())
    + r"(?<!\b[^\W\d_a-zI]\.)"
    # Chinese and Japanese put no space between sentences.
    r"|[。！？｡][。！？｡」』”’）】》]*"
    # A line that begins small goes on where the one before left off: wrapped text.
    rf"|\n(?:\s*\n|(?![{_SMALL}]))"
)


@dataclass(frozen=True)
class Segmented:
    """Tokenised documents end to end, and where their segments begin and end."""

    ids: NDArray[Any]  # [tokens], any integer dtype
    segments: NDArray[np.int64]  # [S + 1], offsets into ids
    documents: NDArray[np.int64]  # [D + 1], offsets into segments

    def __post_init__(self) -> None:
        for name, offsets, size in (
            ("segments", self.segments, len(self.ids)),
            ("documents", self.documents, len(self.segments) - 1),
        ):
            if not len(offsets) or offsets[0] != 0 or offsets[-1] != size:
                raise ValueError(f"{name} must be offsets from 0 to {size}, got {offsets}")
            if (np.diff(offsets) < 0).any():
                raise ValueError(f"{name} must be offsets that never fall, got {offsets}")


@dataclass
class Pairing:
    """Where the tokens went. Text only: special tokens and padding are counted apart."""

    documents: int = 0  # that hold a token
    tokens: int = 0  # of text, that came in
    kept: int = 0  # of them, in some sample
    dropped: int = 0  # of them, in none: truncated away
    reused: int = 0  # in second segments from another document, so copies
    padding: int = 0
    samples: int = 0
    random: int = 0  # samples whose second segment is from another document
    forced: int = 0  # of these, because there was but one sentence to divide
    alone: int = 0  # samples that had to be true pairs, for want of another document
    short: int = 0  # samples that aimed at a length below T - 3

    def __add__(self, other: Pairing) -> Pairing:
        return Pairing(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


def segment(text: str) -> list[str]:
    """Cut a text into sentences, which joined are the text again.

    A sentence ends at its punctuation, or with its line. The space between two begins the second:
    byte-level vocabularies begin words with it.
    """
    pieces, first = [], 0
    for match in _END.finditer(text):
        last = match.end()
        pieces.append(text[first:last])
        first = last
    if first < len(text):
        pieces.append(text[first:])
    return pieces


def pack_pairs(
    documents: Segmented,
    seq_len: int,
    *,
    cls: int,
    sep: int,
    pad: int,
    key: tuple[int, ...],
    pairing: Pairing | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows [n, T] of ``[CLS] A [SEP] B [SEP]``, padded, and 0 where B follows A, 1 where it is random.

    A random B is from another of these documents. The pairs of a call depend on the documents and
    ``key`` alone. A document is never too small for a pair, unless it is a single token and alone.
    """
    if seq_len < 5:
        raise ValueError(
            f"seq_len must be at least 5: [CLS], a token, [SEP], a token, [SEP]; got {seq_len}"
        )
    pairing = Pairing() if pairing is None else pairing
    offsets, bounds = _parts(documents, seq_len - 3)
    flat = _divide(offsets, bounds, seq_len - 3, key, pairing)
    pairs = np.array(flat, np.int64).reshape(-1, 5)
    rows, reached = _lay(documents.ids, pairs, seq_len, cls, sep, pad)

    random = pairs[:, 4].astype(np.uint8)
    second = pairs[:, 3] - pairs[:, 2]
    text = int((pairs[:, 1] - pairs[:, 0] + second).sum())
    pairing.documents += len(bounds) - 1
    pairing.tokens += len(documents.ids)
    pairing.kept += reached
    pairing.dropped += len(documents.ids) - reached
    pairing.reused += int(second[random == 1].sum())
    pairing.padding += len(rows) * (seq_len - 3) - text
    pairing.samples += len(rows)
    pairing.random += int(random.sum())
    return rows, random


def _parts(documents: Segmented, room: int) -> tuple[list[int], list[int]]:
    # Offsets of the segments that hold a token, those above `room` cut in equal parts; and of the
    # documents that hold one, into these offsets. A paragraph without a full stop is not thrown away.
    sizes = np.diff(documents.segments)
    parts = -(-sizes // room)  # 0 for an empty segment
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts)])
    segment = np.repeat(np.arange(len(sizes)), parts)
    number = np.arange(before[-1]) - before[segment]
    starts = documents.segments[segment] + number * sizes[segment] // parts[segment]
    bounds = before[documents.documents]
    return [*starts.tolist(), len(documents.ids)], np.unique(bounds).tolist()


def _divide(
    offsets: list[int], bounds: list[int], room: int, key: tuple[int, ...], pairing: Pairing
) -> list[int]:
    # Five numbers a pair: A from, A to, B from, B to, random. Documents are few and long or many and
    # short, so this is a plain loop; it does a little per pair and nothing per token.
    pairs: list[int] = []
    draws = _draws(room, key)
    others = len(bounds) - 2
    half = (room + 1) // 2
    for own, (here, last) in enumerate(pairwise(bounds)):
        first, end = offsets[here], offsets[last]
        while first < end:
            target, coin, split, other, start, flips = next(draws)
            stop = bisect_left(offsets, first + target, here + 1, last)
            single = stop - here == 1
            random = others > 0 and (single or coin)
            # A has at least one segment, and leaves at least one where there are two.
            middle = offsets[here + 1 + (split * (stop - here - 1) >> 32)]
            if random:
                other = other * others >> 32
                other += other >= own
                low, high = bounds[other], bounds[other + 1]
                low += start * (high - low) >> 32
                second = offsets[low]
                wanted = second + target - (middle - first)
                final = offsets[bisect_left(offsets, wanted, low + 1, high)]
                pairing.forced += single
            else:
                final = offsets[stop]
                if single:
                    middle = (first + final) // 2
                    if middle == first:  # one token: no pair can be made of it
                        break
                second = middle
                pairing.alone += others == 0 and (single or coin)
            pairing.short += target < room
            a, b = middle - first, final - second
            if a + b > room:
                # What is longer gives way, B where they are equal. Each token goes from the front or
                # from the back, as a coin falls.
                cut_a = cut_b = 0
                if a > half and b > room - half:
                    cut_a, cut_b = a - half, b - room + half
                elif a > b:
                    cut_a = a + b - room
                else:
                    cut_b = a + b - room
                bits = int.from_bytes(flips, "little")
                front = (bits & ((1 << cut_a) - 1)).bit_count()
                first, middle = first + front, middle - (cut_a - front)
                front = (bits >> cut_a & ((1 << cut_b) - 1)).bit_count()
                second, final = second + front, final - (cut_b - front)
            pairs += (first, middle, second, final, random)
            first = middle if random else final
            here = bisect_right(offsets, first, here, stop + 1) - 1
    return pairs


def _draws(room: int, key: tuple[int, ...]) -> Iterator[tuple[int, int, int, int, int, bytes]]:
    # For every pair: the length to aim at, a coin, three 32-bit words and a coin for every token that
    # may have to go. The raw stream of a bit generator is guaranteed to stay as it is.
    stream = np.random.PCG64(np.random.SeedSequence(key))
    flips = 8 * -(-room // 64)  # bytes
    size = 24 + flips
    while True:
        block = stream.random_raw(ROWS * size // 8).astype("<u8").tobytes()
        words = np.frombuffer(block, "<u4").reshape(ROWS, -1)[:, :6].astype(np.uint64)
        lengths = 2 + (words[:, 1] * np.uint64(room - 1) >> np.uint64(32))
        targets = np.where(words[:, 0] < int(SHORT * (1 << 32)), lengths, np.uint64(room))
        coins = words[:, 2] >> np.uint64(31)
        numbers = np.column_stack([targets, coins, words[:, 3:]]).tolist()
        places = range(24, len(block), size)
        for first, (target, coin, split, other, start) in zip(places, numbers, strict=True):
            yield target, coin, split, other, start, block[first : first + flips]


def _lay(
    ids: NDArray[Any], pairs: NDArray[np.int64], seq_len: int, cls: int, sep: int, pad: int
) -> tuple[NDArray[np.int64], int]:
    # The rows, and how many tokens are in some row. Every row is six runs of places in one long array:
    # the text, then [CLS], [SEP] and as many [PAD] as a row may need.
    place = len(ids)
    whole = np.full(place + 2 + seq_len, pad, np.int64)
    whole[:place], whole[place], whole[place + 1] = ids, cls, sep
    runs = np.empty((len(pairs), 6, 2), np.int64)  # from, length
    runs[:, 0], runs[:, 2], runs[:, 4] = (place, 1), (place + 1, 1), (place + 1, 1)
    runs[:, 1, 0], runs[:, 3, 0], runs[:, 5, 0] = pairs[:, 0], pairs[:, 2], place + 2
    runs[:, 1, 1] = pairs[:, 1] - pairs[:, 0]
    runs[:, 3, 1] = pairs[:, 3] - pairs[:, 2]
    runs[:, 5, 1] = seq_len - runs[:, :5, 1].sum(1)
    starts, lengths = runs[..., 0].ravel(), runs[..., 1].ravel()
    source = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    source += np.arange(len(source))
    reached = np.zeros(len(whole), np.bool_)
    reached[source] = True
    return whole[source].reshape(-1, seq_len), int(reached[:place].sum())
