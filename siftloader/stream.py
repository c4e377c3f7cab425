"""``TokenShards``: samples, or whole batches, of a split, in an order that needs no state.

    shards = TokenShards("shards/wikibooks", split="train", seed=0)
    for batch in shards.batches(32):        # dict of int64 tensors [32, 512]
        loss = model(**batch).loss

Global position ``p`` of an epoch belongs to rank ``p % ranks``; the loader workers of a rank take
turns in the rank's own sequence. So the state is one number, whatever the topology was or becomes.

Letters: n rows of a batch, m rows of a block, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from siftloader.bigrams import Bigrams, read_bigrams
from siftloader.errors import EmptyEpoch, ShardError, StateError
from siftloader.masking import IGNORED, Mlm
from siftloader.order import Order
from siftloader.shards import Shard, ShardSet
from siftloader.world import World


STATE_VERSION = 1
BLOCK_TOKENS = 1 << 20  # located and gathered at once, 2 MiB of uint16: amortises NumPy's calls
SAMPLES_AT_ONCE = 64  # the batch behind the sample iterator


class TokenShards(IterableDataset[dict[str, Tensor]]):
    """Reads a split as samples, or as whole batches, exactly resumable on any number of ranks.

    shards = TokenShards("shards/wikibooks")
    loader = DataLoader(shards, batch_size=32)     # works, but collates sample by sample
    for batch in shards.batches(32): ...           # the same rows in the same order, vectorised

    A sample is what a Hugging Face model takes: ``input_ids`` and ``labels``, and for the ``mlm``
    objectives ``attention_mask`` (only there the tail is padded), all int64 [T]. For sentence pairs
    (``mlm-nsp``, ``BertForPreTraining``) also ``token_type_ids`` [T], 1 from the first token after the first
    [SEP] to the last [SEP], and ``next_sentence_label``, 0-d: 0 where the second segment follows the first
    in the text, 1 where it was drawn at random. ``with_ids`` adds
    ``id``, the global position in the manifest; ``with_source`` adds ``source``, an index into
    ``shard_set.sources``; both int64 and 0-d.

    ``masking``: ``"auto"`` is what the recorded objective needs, ``Mlm`` at 0.15 for ``mlm`` and
    labels equal to the ids for ``clm``. A number is ``Mlm`` at that probability, an ``Mlm`` is
    used as it is. ``None`` leaves the ids alone and labels them all, except padding (-100).

    Every iteration begins the next epoch; the first after ``load_state_dict`` continues. Loader
    workers iterate over copies, so with ``num_workers > 0`` call ``set_epoch`` before every epoch
    (and not with ``persistent_workers``), as with a DistributedSampler. Of two iterators alive at
    once, the one that started last is the one that counts.

    ``split="val"`` is read in the order of the manifest with the masks of epoch 0, always, and hands
    out every sample exactly once over the ranks. Other splits give every rank equally many samples
    and leave out the last ``total % ranks`` positions, other samples in each epoch.

    A shard is verified (sha256) when it is first opened, by each process that opens it, and again
    once the file was touched; ``verify=False`` trusts the disk. At most ``window + 1`` shards are
    mapped at once, beside one block of about a million token ids.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: str = "train",
        seed: int = 0,
        masking: Mlm | float | Literal["auto"] | None = "auto",
        with_ids: bool = False,
        with_source: bool = False,
        world: World | None = None,
        verify: bool = True,
        window: int = 8,
    ) -> None:
        if not Path(folder).is_dir():
            raise ShardError(f"{folder}: not a folder; give the one that holds manifest.jsonl")
        self.shard_set = ShardSet.open(folder)
        self.split = split
        self.seed = int(seed)  # a NumPy integer would make the state unfit for JSON
        self.window = window
        self.world = world
        self.verify = verify
        self.with_ids = with_ids
        self.with_source = with_source
        self.masking = _resolve(masking, self.shard_set)
        if self.shard_set.layout.labels and "sep" not in self.shard_set.tokenizer.special_ids:
            raise ShardError(
                f"{folder}: sentence pairs, but tokenizer {self.shard_set.tokenizer.name!r} records no "
                f'"sep" token that would part them; prepare the shards again'
            )
        self._shards = self.shard_set.shards(split)
        self.total = sum(shard.num_sequences for shard in self._shards)  # over all ranks
        self._shuffle = split != "val"
        self._first_id = self.shard_set.first_id(split)
        self._verdicts: dict[str, tuple[int, ...]] = {}
        self._epoch = 0
        self._position = 0
        self._pending = True  # the next iteration starts at (epoch, position), not an epoch later
        self._reader = 0  # counts iterations: only the latest may move the position
        self._order(0)  # checks window
        self.rows()  # checks that every rank gets something

    @property
    def fingerprint(self) -> str:
        """The identity of the data set: equal wherever it is copied."""
        return self.shard_set.fingerprint

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer, V."""
        return self.shard_set.tokenizer.vocab_size

    @property
    def unigrams(self) -> NDArray[np.int64]:
        """How often each id occurs in the train split, int64 [V]."""
        return self.shard_set.unigrams

    @property
    def bigrams(self) -> Bigrams:
        """The pairs of the train split, as `siftloader bigrams` counted them; read anew each time.

        ShardError where they were not counted, or are those of other shards.
        """
        return read_bigrams(self.shard_set)

    def check_model(self, model: Any) -> None:
        """Raise ValueError if a model, or its config, has fewer token embeddings than there are ids.

        More are fine: models pad their vocabulary. Warns where the special ids it is configured with
        (pad, mask, ...) are not those of the shards.
        """
        tokenizer = self.shard_set.tokenizer
        whose = f"tokenizer {tokenizer.name!r} of {self.shard_set.folder}"
        rows = check_vocabulary(model, tokenizer.vocab_size, whose)
        config = getattr(_inside(model), "config", model)
        for key, recorded in sorted(tokenizer.special_ids.items()):
            found = getattr(config, f"{key}_token_id", None)
            # One beyond the embeddings is a default that nobody set: GPT-2's end of text, say.
            if isinstance(found, int) and found != recorded and (rows is None or found < rows):
                warnings.warn(
                    f"the model is configured with {key}_token_id {found}, in the shards (tokenizer "
                    f"{tokenizer.name!r}) it is {recorded}; build the model for that tokenizer, or set "
                    f"config.{key}_token_id = {recorded}",
                    stacklevel=2,
                )

    def __len__(self) -> int:
        """Samples this rank hands out per epoch."""
        return self.rows()

    def rows(self, position: int = 0, world: World | None = None) -> int:
        """How many rows this rank, all its workers together, hands out from ``position`` on."""
        here = self._world(world)
        if self._shuffle and self.total < here.ranks:
            raise EmptyEpoch(
                f"{self.total} samples of split {self.split!r} for {here.ranks} ranks are "
                f"{self.total} // {here.ranks} = 0 each; use fewer ranks or more data"
            )
        return self._rows(position, World(here.rank, here.ranks))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._counted(SAMPLES_AT_ONCE, per_row=True)

    def batches(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Batches of ``n`` rows, the last one ragged: the sample iterator's rows in its order.

        for batch in shards.batches(256): ...    # int64 [256, T]
        """
        _check_rows(n)
        return self._counted(n, per_row=False)

    def read_batches(
        self, n: int, epoch: int, position: int = 0, world: World | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's batches of ``n`` rows from ``position`` of ``epoch`` on, the last ragged.

        Neither reads nor moves the epoch and position of this object, so a thread may read ahead.
        """
        _check_rows(n)
        here = self._world(world)
        order = self._order(epoch)
        if not 0 <= position <= self.total:
            raise ValueError(f"position must lie in 0..{self.total}, got {position}")
        return self._read(n, order, position, here)

    def _read(
        self, n: int, order: Order, position: int, world: World
    ) -> Iterator[dict[str, Tensor]]:
        for block in self._gather(n, order, position, world):
            for first in range(0, len(block.tokens), n):
                yield self._finish(block.rows(first, first + n), order.epoch)

    def _gather(self, n: int, order: Order, position: int, world: World) -> Iterator[_Rows]:
        # A block is a whole number of batches, so that batches never have to be joined.
        size = max(1, BLOCK_TOKENS // self.shard_set.layout.seq_len // n) * n
        first = position + (world.rank - position) % world.ranks + world.worker * world.ranks
        step = world.ranks * world.workers
        rows = self._rows(position, world)
        opened = _Opened(self, limit=self.window + 1)
        for begin in range(0, rows, size):
            turns = np.arange(begin, min(begin + size, rows), dtype=np.int64)
            yield self._take(*order.locate(first + step * turns), opened)

    def _take(self, shard: NDArray[np.int64], row: NDArray[np.int64], opened: _Opened) -> _Rows:
        layout = self.shard_set.layout
        tokens = np.empty((len(row), layout.seq_len), layout.dtype)
        sources = np.empty(len(row), np.int64) if self.with_source else None
        pairs = np.empty(len(row), np.int64) if layout.labels else None
        ids = np.empty(len(row), np.int64)
        numbers, seen = np.unique(shard, return_index=True)
        # In the order of first use: a block that crosses into a new window opens each shard once.
        for number in numbers[np.argsort(seen)].tolist():
            at = np.flatnonzero(shard == number)
            content = opened.get(number)
            tokens[at] = content.tokens[row[at]]
            ids[at] = content.first_id + row[at]
            if sources is not None and content.sources is not None:
                sources[at] = content.sources[row[at]]
            if pairs is not None and content.pairs is not None:
                pairs[at] = content.pairs[row[at]]
        return _Rows(tokens, ids, sources, pairs)

    def _finish(self, rows: _Rows, epoch: int) -> dict[str, Tensor]:
        pad = self.shard_set.tokenizer.special_ids.get("pad")
        padded = self.shard_set.objective.startswith("mlm")
        real = rows.tokens != pad if padded and pad is not None else None
        if self.masking is not None:
            input_ids, labels = self.masking(rows.tokens, rows.ids, seed=self.seed, epoch=epoch)
        else:
            input_ids = rows.tokens.astype(np.int64)
            labels = input_ids.copy() if real is None else np.where(real, input_ids, IGNORED)
        batch = {"input_ids": input_ids}
        if rows.pairs is not None:
            sep = self.shard_set.tokenizer.special_ids["sep"]
            batch["token_type_ids"] = _segments(rows.tokens, sep, real)
        if padded:
            batch["attention_mask"] = (
                np.ones_like(input_ids) if real is None else real.astype(np.int64)
            )
        batch["labels"] = labels
        if rows.pairs is not None:
            batch["next_sentence_label"] = rows.pairs
        if self.with_ids:
            batch["id"] = rows.ids
        if rows.sources is not None:
            batch["source"] = rows.sources
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _order(self, epoch: int) -> Order:
        return Order(
            tuple(shard.num_sequences for shard in self._shards),
            fingerprint=self.fingerprint,
            seed=self.seed,
            epoch=epoch if self._shuffle else 0,
            window=self.window,
            shuffle=self._shuffle,
        )

    def _world(self, world: World | None) -> World:
        found = World.detect()
        given = world or self.world
        if given is None:
            return found
        if given.workers > 1:
            return given
        return World(given.rank, given.ranks, found.worker, found.workers)

    def _rows(self, position: int, world: World) -> int:
        left = self.total - position
        if self._shuffle:
            rows = left // world.ranks
        else:  # from this rank's first position on, however uneven
            rows = -(-max(0, left - (world.rank - position) % world.ranks) // world.ranks)
        return -(-max(0, rows - world.worker) // world.workers)

    def _counted(self, n: int, per_row: bool) -> Iterator[dict[str, Tensor]]:
        self._epoch, self._position = self.upcoming()
        world = self._world(None)
        self.rows()  # ranks may have appeared since construction: raise rather than yield nothing
        self._pending = False
        self._reader += 1
        reader, begin, handed = self._reader, self._position, 0
        step = world.ranks * world.workers
        for batch in self.read_batches(n, self._epoch, begin):
            for item in _samples(batch) if per_row else (batch,):
                handed += 1 if per_row else len(batch["input_ids"])
                if reader == self._reader:  # counted before it leaves: the caller may never return
                    self._position = min(begin + handed * step, self.total)
                yield item
        if reader == self._reader and world.workers == 1:
            self._epoch, self._position, self._pending = self._epoch + 1, 0, True

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch ``epoch``, from its start.

        A restored state that stands in this very epoch keeps its position, so that loops which
        announce every epoch resume too.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if not (self._pending and epoch == self._epoch):
            self._epoch, self._position, self._pending = int(epoch), 0, True
        self._reader += 1

    def upcoming(self) -> tuple[int, int]:
        """Epoch and global position at which the next iteration begins."""
        return (self._epoch, self._position) if self._pending else (self._epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-able: all positions below ``position`` were handed out.

        ``position`` counts over all ranks, so the state of any rank restores all of them.
        """
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            "window": self.window,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, on any number of ranks and workers.

        Raises StateError where the state belongs to another order of other data.
        """
        checked = self._check(state)
        self._epoch, self._position, self._pending = checked["epoch"], checked["position"], True
        self._reader += 1

    def _check(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        own = self.state_dict()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise StateError(
                f"the state lacks {missing}; it needs {list(own)}, as state_dict() gives"
            )
        if state["version"] > STATE_VERSION:
            raise StateError(
                f"found a state of version {state['version']}, this siftloader reads up to "
                f"{STATE_VERSION}; upgrade siftloader"
            )
        remedies = {
            "fingerprint": f"open the data set it was saved from, not {self.shard_set.folder}",
            "split": "load it into the TokenShards of that split",
            "seed": f"construct TokenShards(..., seed={state['seed']!r})",
            "window": f"construct TokenShards(..., window={state['window']!r})",
        }
        for name, remedy in remedies.items():
            if state[name] != own[name]:
                raise StateError(
                    f"the state belongs to another order: {name} {state[name]!r} found, "
                    f"{own[name]!r} expected; {remedy}, or start a new epoch without the state"
                )
        for name, limit in (("epoch", None), ("position", self.total)):
            value = state[name]
            if not isinstance(value, int) or value < 0 or (limit is not None and value > limit):
                raise StateError(
                    f"{name} {value!r} found, a whole number from 0"
                    f"{'' if limit is None else f' to {limit}'} expected; the state is damaged"
                )
        return state


@dataclass(frozen=True)
class _Rows:
    """Rows as they lie on disk: tokens [m, T], global ids [m], sources and labels of pairs [m] or None."""

    tokens: NDArray[Any]
    ids: NDArray[np.int64]
    sources: NDArray[np.int64] | None
    pairs: NDArray[np.int64] | None

    def rows(self, first: int, end: int) -> _Rows:
        cut = slice(first, end)
        return _Rows(
            self.tokens[cut],
            self.ids[cut],
            None if self.sources is None else self.sources[cut],
            None if self.pairs is None else self.pairs[cut],
        )


@dataclass(frozen=True)
class _Content:
    """A mapped shard: tokens [N, T], sources and labels [N] where there are any, the id of row 0."""

    tokens: NDArray[Any]
    sources: NDArray[np.uint8] | None
    pairs: NDArray[np.uint8] | None
    first_id: int


class _Opened:
    """The shards one reader has mapped, least recently used first out.

    Every reader has its own, so readers in other threads share nothing but the verdicts.
    """

    def __init__(self, owner: TokenShards, limit: int) -> None:
        self._owner = owner
        self._limit = limit
        self._contents: OrderedDict[int, _Content] = OrderedDict()
        counts = [shard.num_sequences for shard in owner._shards]
        self._first_ids = owner._first_id + np.cumsum([0, *counts])

    def get(self, number: int) -> _Content:
        if number in self._contents:
            self._contents.move_to_end(number)
            return self._contents[number]
        owner, shard = self._owner, self._owner._shards[number]
        content = _Content(
            _read_once_verified(owner.shard_set, shard, owner.verify, owner._verdicts),
            owner.shard_set.read_sources(shard) if owner.with_source else None,
            # The same file, verified a moment ago.
            owner.shard_set.read_labels(shard, verify=False)
            if owner.shard_set.layout.labels
            else None,
            int(self._first_ids[number]),
        )
        self._contents[number] = content
        if len(self._contents) > self._limit:
            self._contents.popitem(last=False)
        return content


def _read_once_verified(
    shards: ShardSet, shard: Shard, verify: bool, verdicts: dict[str, tuple[int, ...]]
) -> NDArray[Any]:
    # A verdict holds for these bytes on disk only: a file that was touched since is read again.
    path = shards.folder / f"{shard.shard}.tar"
    try:
        stat = path.stat()
    except OSError as error:
        raise ShardError(
            f"{shard.shard}: cannot be read ({error}); is {path} in place?"
        ) from error
    identity = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    known = verdicts.get(shard.shard) == identity
    tokens = shards.read(shard, verify=verify and not known)
    if verify:
        verdicts[shard.shard] = identity
    return tokens


def _resolve(masking: Mlm | float | str | None, shards: ShardSet) -> Mlm | None:
    if masking is None or isinstance(masking, Mlm):
        return masking
    if isinstance(masking, str):
        if masking != "auto":
            raise ValueError(
                f'masking must be "auto", None, a probability or an Mlm, got {masking!r}'
            )
        return Mlm.of(shards.tokenizer) if shards.objective.startswith("mlm") else None
    return Mlm.of(shards.tokenizer, masking)


def check_vocabulary(model: Any, vocab_size: int, whose: str = "the data set") -> int | None:
    """Raise ValueError if a model, or its config, embeds fewer than ``vocab_size`` token ids.

    Returns how many it embeds, None where that cannot be told.
    """
    model = _inside(model)
    rows = _embeddings(model) if isinstance(model, nn.Module) else None
    if rows is None:
        rows = getattr(getattr(model, "config", model), "vocab_size", None)
    if not isinstance(rows, int):
        return None
    if rows < vocab_size:
        raise ValueError(
            f"{whose} has {vocab_size} token ids, but the model embeds only {rows}: an id beyond them "
            f"would fail in the middle of training; build the model with vocab_size={vocab_size} or "
            f"more, or prepare the text with the model's own tokenizer"
        )
    return rows


def _inside(model: Any) -> Any:
    # Of a data-parallel wrapper, the model; a compiled one passes questions on by itself.
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    return model.module if isinstance(model, parallel) else model


def _embeddings(model: nn.Module) -> int | None:
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)  # a sharded weight is not all of it
    if rows is None and getattr(getattr(embedding, "weight", None), "ndim", 0) == 2:
        rows = embedding.weight.shape[0]
    return rows if isinstance(rows, int) else None


def _segments(tokens: NDArray[Any], sep: int, real: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    # [n, T]: 0 for [CLS] A [SEP] and for padding, 1 for B [SEP].
    width = tokens.shape[1]
    ends = tokens == sep
    first = np.where(ends.any(axis=1), ends.argmax(axis=1), width)  # of the first segment
    second: NDArray[np.bool_] = np.arange(width) > first[:, None]
    return (second if real is None else second & real).astype(np.int64)


def _samples(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    # [n, T] -> n x [T]. Cloned: a view would keep, and pickle, the storage of the whole batch.
    columns = [value.unbind(0) for value in batch.values()]
    for values in zip(*columns, strict=True):
        yield {name: value.clone() for name, value in zip(batch, values, strict=True)}


def _check_rows(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1 row, got {n}")
