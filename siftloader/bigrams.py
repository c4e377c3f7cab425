"""How often a token follows another in the train split, and the surprise of a token given its neighbours.

    write_bigrams("shards/wikibooks")                      # once, beside the shards
    bigrams = read_bigrams(ShardSet.open("shards/wikibooks"))
    bigrams.surprise(tokens, left)                         # nats, of float64

A pair is two neighbours within a sample. Ids that frame the text ([PAD], [CLS], [SEP], [MASK]) are in
none; the end-of-text id of running text (``clm``) is like any other, for it is predicted too. The pairs of
the largest counts are listed, all others summed up by their first and by their second token.

``bigrams.npy`` is an array of records (prev, next, count), rising by prev, then next; an id of V stands for
"any other". ``bigrams.json``, written last, has the fingerprint of the shards and the sha256 of the array.

Letters: K pairs, N tokens, V vocabulary, n samples of a chunk, T tokens of a sample.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorruptShard, ShardError
from siftloader.shards import Shard, ShardSet, check_ids, sha256, write_atomically


BIGRAMS = "bigrams.npy"
SEAL = "bigrams.json"
VERSION = 1
LIMIT = 4_000_000  # pairs listed: 64 MB
CHUNK = 1 << 22  # tokens counted at once
ROOM = (
    1 << 25
)  # different pairs counted at once: 512 MB, up to four times that while they are merged
DISCOUNT = 0.75  # of every listed count; held-out surprise is flat between 0.5 and 0.85
PAIR = np.dtype([("prev", "<u4"), ("next", "<u4"), ("count", "<u8")])
BEYOND = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Side:
    """What is known of a token by one neighbour, indexed by that neighbour's id; at V, by none.

    ``listed`` [K + 1] belongs to the keys, the others are [V + 1]. P(token) is ``listed`` of the pair, if it
    is one, plus ``rest`` times the token's unigram probability.
    """

    listed: NDArray[np.float64]
    rest: NDArray[np.float64]
    weight: NDArray[np.float64]  # one over the perplexity: how much this neighbour tells


@dataclass(frozen=True, eq=False)
class Bigrams:
    """The surprise of a token given the one before it or, if ``masked``, the ones on both sides.

    Residual(shards.bigrams)                              # loss minus this surprise
    shards.bigrams.surprise(ids[:, 1:], ids[:, :-1])      # [n, T - 1], nats

    Absolute discounting, interpolated with add-one smoothed unigrams: P(w | v) = (count(v, w) - 0.75) /
    count(v) for listed pairs, and the mass that leaves times P(w) for all. Both neighbours: the two
    distributions, each of them weighed by one over its perplexity. Every one sums to 1 over V.
    """

    pairs: NDArray[Any]  # [K] of PAIR
    unigrams: NDArray[np.int64]  # [V]
    masked: bool  # whether models of these shards see both neighbours

    def __post_init__(self) -> None:
        counts = np.asarray(self.unigrams)
        if counts.ndim != 1 or counts.size < 2 or (counts < 0).any():
            raise ValueError(f"unigrams must be non-negative counts [V], got shape {counts.shape}")
        prev, following = (self.pairs[name].astype(np.int64) for name in ("prev", "next"))
        top = max(prev.max(initial=0), following.max(initial=0))
        if top > len(counts):
            raise ValueError(f"pairs must be of ids in 0..{len(counts)}, got {top}")
        if (np.diff(prev * (len(counts) + 1) + following) <= 0).any():
            raise ValueError("pairs must be rising, by prev and then next, each of them once")
        if (self.pairs["count"] < 1).any():
            raise ValueError("pairs must have counts of at least 1")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.unigrams)

    @cached_property
    def unigram(self) -> NDArray[np.float64]:
        """P(w), [V], add-one smoothed."""
        smooth = self.unigrams.astype(np.float64) + 1
        return np.asarray(smooth / smooth.sum(), np.float64)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """prev * (V + 1) + next of the listed pairs, rising, and one beyond them all: [K + 1]."""
        prev, following = (
            self.pairs[name][self._is_listed].astype(np.int64) for name in ("prev", "next")
        )
        return np.append(prev * (self.vocab_size + 1) + following, BEYOND)

    @cached_property
    def left(self) -> Side:
        """By the token before."""
        return self._side("prev", "next")

    @cached_property
    def right(self) -> Side:
        """By the token after."""
        return self._side("next", "prev")

    @cached_property
    def _is_listed(self) -> NDArray[np.bool_]:
        size = self.vocab_size
        listed: NDArray[np.bool_] = (self.pairs["prev"] < size) & (self.pairs["next"] < size)
        return listed

    def _side(self, given: str, predicted: str) -> Side:
        size, counts = self.vocab_size, self.pairs["count"].astype(np.float64)
        about = self.pairs[given] < size  # leaves out the margins of the other side
        total = np.bincount(self.pairs[given][about], counts[about], size + 1)
        context, word = (self.pairs[name][self._is_listed] for name in (given, predicted))
        listed = (counts[self._is_listed] - DISCOUNT) / total[context]
        rest = 1.0 - np.bincount(context, listed, size + 1).astype(np.float64)
        # The entropy of each context: its listed words one by one, the others by their unigrams.
        base = self.unigram[word]
        chance = listed + rest[context] * base
        own = np.bincount(context, chance * np.log(chance), size + 1)
        mass = 1 - np.bincount(context, base, size + 1)
        log_mass = (self.unigram * np.log(self.unigram)).sum()
        log_mass = log_mass - np.bincount(context, base * np.log(base), size + 1)
        weight = np.exp(own + rest * (log_mass + np.log(rest) * mass))
        return Side(np.append(listed, 0.0), rest, weight)

    def surprise(
        self, tokens: NDArray[Any], left: NDArray[Any], right: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        """-log P(token | neighbours) in nats, of any shape; a neighbour below 0 is none.

        The slow, obvious one, on the host; criteria do the same in float32 where the model is.
        """
        word = np.asarray(tokens, np.int64)
        none, stride = self.vocab_size, self.vocab_size + 1
        before = np.where(np.asarray(left) < 0, none, left).astype(np.int64)
        chance = self._chance(self.left, before, word, before * stride + word)
        if right is not None:
            after = np.where(np.asarray(right) < 0, none, right).astype(np.int64)
            other = self._chance(self.right, after, word, word * stride + after)
            a, b = self.left.weight[before], self.right.weight[after]
            chance = (a * chance + b * other) / (a + b)
        return np.asarray(-np.log(chance), np.float64)

    def _chance(
        self, side: Side, given: NDArray[Any], word: NDArray[Any], key: NDArray[Any]
    ) -> NDArray[Any]:
        at = np.searchsorted(self.keys, key)
        found = np.where(self.keys[at] == key, side.listed[at], 0.0)
        return np.asarray(found + side.rest[given] * self.unigram[word])


Tell = Callable[[int, int], None]  # of tokens read, and tokens to read


def count_bigrams(
    shards: ShardSet,
    limit: int = LIMIT,
    *,
    chunk: int = CHUNK,
    room: int = ROOM,
    tell: Tell | None = None,
) -> NDArray[Any]:
    """Count the pairs of the train split; return the ``limit`` most frequent and the sums of the rest.

    Ties are broken by the smaller ids. ``chunk`` and ``room`` bound memory and change nothing else: where the
    pairs may be more than ``room``, the split is read several times, each time for other first tokens, so
    that every count is complete before it is compared.
    """
    if limit < 0:
        raise ValueError(f"limit must be 0 or more pairs, got {limit}")
    size, train = shards.tokenizer.vocab_size, shards.shards("train")
    spans = _spans(shards.unigrams, room)
    to_read = len(spans) * sum(shard.num_sequences for shard in train) * shards.layout.seq_len
    read = 0
    by_prev, by_next = np.zeros(size, np.int64), np.zeros(size, np.int64)
    kept = _Counted.of(np.empty(0, np.int64))
    for number, span in enumerate(spans):
        stack = [_Counted.of(np.empty(0, np.int64))]
        for shard in train:
            for rows in _rows(shards, shard, chunk, verify=number == 0):
                stack.append(_Counted.of(_keys(rows, _frame(shards), span, size)))
                # Like the digits of a counter: what was merged often is not merged again soon.
                while len(stack) > 1 and 2 * len(stack[-1].keys) > len(stack[-2].keys):
                    stack[-2:] = [stack[-2].with_(stack[-1])]
                read += rows.size
                if tell:
                    tell(read, to_read)
        while len(stack) > 1:
            stack[-2:] = [stack[-2].with_(stack[-1])]
        by_prev += _sums(stack[0].keys // size, stack[0].counts, size)
        by_next += _sums(stack[0].keys % size, stack[0].counts, size)
        # These counts are complete, so what is not among the most frequent of them never will be.
        kept = kept.with_(stack[0]).most_frequent(limit)
    return _records(kept, by_prev, by_next)


@dataclass(frozen=True)
class _Counted:
    """Different keys [K], rising, and how often each was seen."""

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, keys: NDArray[Any]) -> _Counted:
        found, counts = np.unique(keys, return_counts=True)
        return cls(found.astype(np.int64), counts.astype(np.int64))

    def with_(self, other: _Counted) -> _Counted:
        large, small = (self, other) if len(self.keys) >= len(other.keys) else (other, self)
        if not len(small.keys):
            return large
        at = np.searchsorted(large.keys, small.keys)
        new = large.keys[np.minimum(at, len(large.keys) - 1)] != small.keys
        keys = np.insert(large.keys, at[new], small.keys[new])
        counts = np.insert(large.counts, at[new], 0)
        counts[np.searchsorted(keys, small.keys)] += small.counts
        return _Counted(keys, counts)

    def most_frequent(self, limit: int) -> _Counted:
        if len(self.keys) <= limit:
            return self
        # Stable, so of equal counts the lower keys come first.
        best = np.sort(np.argsort(-self.counts, kind="stable")[:limit])
        return _Counted(self.keys[best], self.counts[best])


def _frame(shards: ShardSet) -> NDArray[np.bool_]:
    # [V]: the ids that are not text. Where [SEP] is the end of running text, it is predicted as any other.
    special = dict(shards.tokenizer.special_ids)
    text = {special.get("unk")} | ({special.get("eos")} if shards.objective == "clm" else set())
    frame = np.zeros(shards.tokenizer.vocab_size, bool)
    frame[[number for number in special.values() if number not in text]] = True
    return frame


def _spans(unigrams: NDArray[np.int64], room: int) -> list[tuple[int, int]]:
    # First tokens [low, high) that have no more than `room` different followers together, or one of them.
    most = np.minimum(unigrams, len(unigrams))
    spans, low, total = [], 0, 0
    for number, count in enumerate(most.tolist()):
        if total + count > room and number > low:
            spans.append((low, number))
            low, total = number, 0
        total += count
    return [*spans, (low, len(most))]


def _rows(shards: ShardSet, shard: Shard, chunk: int, verify: bool) -> Iterator[NDArray[Any]]:
    ids = shards.read(shard, verify=verify)
    step = max(1, chunk // shards.layout.seq_len)
    for first in range(0, len(ids), step):
        rows = ids[first : first + step]
        check_ids(shards, shard, rows, first)
        yield rows


def _keys(
    rows: NDArray[Any], frame: NDArray[np.bool_], span: tuple[int, int], size: int
) -> NDArray[Any]:
    # prev * V + next of all pairs in rows [n, T]; in 32 bits where they fit, which sort much faster.
    text = ~frame[rows]
    low, high = span
    taken = text[:, :-1] & text[:, 1:]
    if high - low < size:
        taken &= (rows[:, :-1] >= low) & (rows[:, :-1] < high)
    kind = np.uint32 if size * size <= 1 << 32 else np.int64
    prev, following = rows[:, :-1][taken].astype(kind), rows[:, 1:][taken].astype(kind)
    return np.asarray(prev * kind(size) + following)


def _records(
    kept: _Counted, by_prev: NDArray[np.int64], by_next: NDArray[np.int64]
) -> NDArray[Any]:
    size = len(by_prev)
    prev, following = np.divmod(kept.keys, size)
    left = by_prev - _sums(prev, kept.counts, size)
    right = by_next - _sums(following, kept.counts, size)
    others = np.full(size, size)
    every = np.arange(size)
    columns = (
        np.concatenate([prev, every, others]),
        np.concatenate([following, others, every]),
        np.concatenate([kept.counts, left, right]),
    )
    records = np.empty(len(columns[0]), PAIR)
    for name, column in zip(("prev", "next", "count"), columns, strict=True):
        records[name] = column
    order = np.argsort(columns[0] * (size + 1) + columns[1], kind="stable")
    return records[order][columns[2][order] > 0]


def _sums(ids: NDArray[Any], counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    # [size]; by way of float64, exact below 2**53
    return np.bincount(ids, counts, size).astype(np.int64)


def write_bigrams(
    folder: str | os.PathLike[str], limit: int = LIMIT, tell: Tell | None = None
) -> bool:
    """Count the pairs of a finished folder and keep them beside its shards; False if they are there.

    The bytes follow from the shards and ``limit``. A run that was killed is run again.
    """
    shards = ShardSet.open(folder)
    try:
        if _read(shards)[1] == limit:
            return False
    except ShardError:
        pass  # none, or not of these shards
    buffer = io.BytesIO()
    np.save(buffer, count_bigrams(shards, limit, tell=tell), allow_pickle=False)
    data = buffer.getvalue()
    seal = {
        "version": VERSION,
        "fingerprint": shards.fingerprint,
        "limit": limit,
        "sha256": sha256(data),
    }
    write_atomically(shards.folder / BIGRAMS, data)
    write_atomically(shards.folder / SEAL, (json.dumps(seal) + "\n").encode())
    return True


def read_bigrams(shards: ShardSet) -> Bigrams:
    """Those beside the shards, checked; ShardError where there are none, or those of other shards."""
    return Bigrams(_read(shards)[0], shards.unigrams, masked=shards.objective.startswith("mlm"))


def _read(shards: ShardSet) -> tuple[NDArray[Any], int]:
    # The records, and the limit they were made with.
    remedy = f"make them with `siftloader bigrams {shards.folder}`"
    path = shards.folder / SEAL
    if not path.is_file():
        raise ShardError(f"{shards.folder}: no {SEAL}, so pairs were not counted; {remedy}")
    try:
        seal = json.loads(path.read_bytes())
        version, fingerprint = int(seal["version"]), str(seal["fingerprint"])
        limit, expected = int(seal["limit"]), str(seal["sha256"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path}: not a description of bigrams ({error!r}); {remedy}") from error
    if version > VERSION:
        raise ShardError(
            f"{path}: written in version {version}, this siftloader reads up to {VERSION}; upgrade, or "
            f"{remedy}"
        )
    if fingerprint != shards.fingerprint:
        raise ShardError(
            f"{path}: bigrams of other shards (fingerprint {fingerprint[:12]} found, "
            f"{shards.fingerprint[:12]} needed); {remedy}"
        )
    try:
        data = (shards.folder / BIGRAMS).read_bytes()
    except OSError as error:
        raise ShardError(f"{BIGRAMS}: cannot be read ({error}); {remedy}") from error
    if sha256(data) != expected:
        raise CorruptShard(f"{BIGRAMS}: sha256 differs from the one in {SEAL}; {remedy}")
    return np.load(io.BytesIO(data), allow_pickle=False), limit
