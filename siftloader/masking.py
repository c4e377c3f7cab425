"""BERT's masked language modelling, a batch at a time, from counters instead of a generator.

Every draw is a hash of (seed, epoch, repeat, sample id, token position). So the masks of a sample do
not depend on who reads it, in which batch, after which restart:

    mlm = Mlm(0.15, mask_id=103, vocab_size=30522, special_ids=(0, 100, 101, 102, 103))
    input_ids, labels = mlm(ids, sample_ids, seed=0, epoch=0)    # int64 [n, T] each

Letters: n samples, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.order import mix32, mix64
from siftloader.shards import Tokenizer


IGNORED = -100  # the label that torch's cross-entropy skips
MASKED, REPLACED = 0.8, 0.9  # of the chosen tokens: 80 % [MASK], 10 % another id, 10 % left as is


@dataclass(frozen=True)
class Mlm:
    """Chooses ``probability`` of the ordinary tokens; 80 % become [MASK], 10 % a random id, 10 % stay.

    Special ids are never chosen, never labelled and never drawn as replacements.
    """

    probability: float = 0.15
    _: KW_ONLY
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must lie between 0 and 1, got {self.probability}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f"mask_id must be an id of the vocabulary, 0..{self.vocab_size - 1}, got "
                f"{self.mask_id}; masking needs a tokenizer with a mask token"
            )
        wrong = [i for i in self.special_ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"special_ids must lie in 0..{self.vocab_size - 1}, got {wrong}")
        if not len(self._ordinary):
            raise ValueError(f"all {self.vocab_size} ids are special, so none can be masked")

    @classmethod
    def of(cls, tokenizer: Tokenizer, probability: float = 0.15) -> Mlm:
        """The masking that a recorded tokenizer allows: its mask id, its special ids spared."""
        if "mask" not in tokenizer.special_ids:
            raise ValueError(
                f"masking needs a mask token, and tokenizer {tokenizer.name!r} has only "
                f"{sorted(tokenizer.special_ids)}; pass masking=None, or prepare the shards with "
                f"another tokenizer"
            )
        return cls(
            probability,
            mask_id=tokenizer.special_ids["mask"],
            vocab_size=tokenizer.vocab_size,
            special_ids=tuple(sorted(set(tokenizer.special_ids.values()))),
        )

    def __call__(
        self,
        ids: NDArray[Any],
        sample_ids: NDArray[np.int64],
        *,
        seed: int,
        epoch: int | NDArray[np.int64],
        repeat: int = 0,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked ids and labels, int64 [n, T] each, of ``ids`` [n, T]; labels are -100 elsewhere.

        ``epoch`` may differ by sample, int64 [n]; ``repeat`` tells apart visits of one sample within an epoch.
        """
        rows, width = ids.shape
        keys = _row_keys(np.asarray(sample_ids, np.int64), seed, epoch, repeat)
        chosen = np.flatnonzero(_words(keys, width) < np.uint32(self.probability * 2**32))
        # Only the chosen tokens, one in seven, are looked at from here on.
        originals = ids.reshape(-1)[chosen]
        try:
            ordinary = ~self._special[originals]
        except IndexError as error:
            raise ValueError(
                f"found token id {ids.max()}, but vocab_size is {self.vocab_size}: these ids come "
                f"from another tokenizer"
            ) from error
        chosen, originals = chosen[ordinary], originals[ordinary]

        input_ids = ids.astype(np.int64)
        labels = np.full((rows, width), IGNORED, np.int64)
        labels.reshape(-1)[chosen] = originals
        fate, draw = _second_draw(keys, chosen, width)
        flat = input_ids.reshape(-1)
        flat[chosen[fate < np.uint32(MASKED * 2**32)]] = self.mask_id
        replaced = (fate >= np.uint32(MASKED * 2**32)) & (fate < np.uint32(REPLACED * 2**32))
        # A 32-bit fraction of the table's length: uniform to one part in 10,000 at any vocabulary.
        pick = (draw[replaced].astype(np.uint64) * np.uint64(len(self._ordinary))) >> np.uint64(32)
        flat[chosen[replaced]] = self._ordinary[pick.astype(np.int64)]
        return input_ids, labels

    @cached_property
    def _special(self) -> NDArray[np.bool_]:
        # [V]: what is never chosen and never drawn
        special = np.zeros(self.vocab_size, bool)
        special[[self.mask_id, *self.special_ids]] = True
        return special

    @cached_property
    def _ordinary(self) -> NDArray[np.int64]:
        # [V - specials]: what a replacement is drawn from
        return np.flatnonzero(~self._special).astype(np.int64)


def _row_keys(
    sample_ids: NDArray[np.int64], seed: int, epoch: int | NDArray[np.int64], repeat: int
) -> NDArray[np.uint64]:
    # [n]: 64 bits per sample, so that no two samples of any real corpus share their draws
    epochs, which = np.unique(epoch, return_inverse=True)
    texts = [f"mlm/{seed}/{each}/{repeat}" for each in epochs.tolist()]
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    keys = np.frombuffer(b"".join(digests), "<u8")[which.reshape(-1)]
    return mix64(mix64(sample_ids.astype(np.uint64)) ^ keys)


def _words(keys: NDArray[np.uint64], width: int) -> NDArray[np.uint32]:
    # [n, T]: one word per token. This alone runs over every token, hence 32-bit and in place.
    positions = mix32(np.arange(1, width + 1, dtype=np.uint32))
    words = positions[None, :] ^ keys.astype(np.uint32)[:, None]
    words *= np.uint32(0x9E3779B1)
    words ^= (keys >> np.uint64(32)).astype(np.uint32)[:, None]
    return mix32(words)


def _second_draw(
    keys: NDArray[np.uint64], chosen: NDArray[np.int64], width: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    # Two fresh words for each chosen token: its fate and its replacement.
    row, column = np.divmod(chosen, width)
    bits = keys[row]
    bits += (column.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = mix64(bits)
    return (bits >> np.uint64(32)).astype(np.uint32), bits.astype(np.uint32)
