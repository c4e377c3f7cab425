"""``TokenShards``: samples, or whole batches, of a split, in an order that needs no state.

    shards = TokenShards("shards/wikibooks", split="train", seed=0)
    for batch in shards.batches(32):        # dict of int64 tensors [32, 512]
        loss = model(**batch).loss

Global position ``p`` of an epoch belongs to rank ``p % ranks``; the loader workers of a rank take
turns in the rank's own sequence. So the state is one number, whatever the topology was or becomes.

Letters: n rows of a batch, m rows of a block, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import os
import warnings
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from mmap import mmap
from struct import Struct
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from siftloader.bigrams import Bigrams, read_bigrams
from siftloader.coverage import Coverage
from siftloader.errors import EmptyEpoch, RanksDisagree, ShardError, StateError
from siftloader.masking import IGNORED, Mlm
from siftloader.mixture import Mixture
from siftloader.opened import Budget, Opened, Part, Verdicts
from siftloader.reading import Places, Rows, Windows, copied
from siftloader.shards import ShardSet
from siftloader.tars import webdataset as webdataset
from siftloader.world import World, first_word, iteration


STATE_VERSION = 2
FIRST_VERSION = {"lanes": 1, "weights": None}  # what it had not
BLOCK_TOKENS = 1 << 20  # located and gathered at once, 2 MiB of uint16: amortises NumPy's calls
COUNTED = 64  # batches whose coverage is worked out at once: it costs little by the thousand
LOCATED = 32  # blocks whose places are found at once
SAMPLES_AT_ONCE = 64  # the batch behind the sample iterator
SET_BITS = 40  # of an id: the sample within its set; the bits above them are the number of the set
MOST_OPEN = 512  # shards a reader keeps mapped, if the process may have four times as many files
MOST_EPOCHS = 1 << 40
NOTHING = np.zeros(0, np.int64)
ENUMERATED = 1 << 20  # positions located at once where a coverage is worked out

Folder = str | os.PathLike[str]
_FORKED = Struct("qqq")  # iteration, epoch, position
_STREAMS = (
    count()
)  # of this process, as they begin: the same stream has the same number on all ranks


class TokenShards(IterableDataset[dict[str, Tensor]]):
    """Reads a split as samples, or as whole batches, exactly resumable on any number of ranks.

    shards = TokenShards("shards/wikibooks")
    loader = DataLoader(shards, batch_size=32)     # works, but collates sample by sample
    for batch in shards.batches(32): ...           # the same rows in the same order, vectorised

    A sample is what a Hugging Face model takes: ``input_ids`` and ``labels``, and for the ``mlm``
    objectives ``attention_mask`` (only there the tail is padded), all int64 [T]. For sentence pairs
    (``mlm-nsp``, ``BertForPreTraining``) also ``token_type_ids`` [T], 1 from the first token after the first
    [SEP] to the last [SEP], and ``next_sentence_label``, 0-d: 0 where the second segment follows the first
    in the text, 1 where it was drawn at random. ``with_ids`` adds ``id``, the global position in the manifest
    (of a mix: plus the number of the set times 2^40); ``with_source`` adds ``source``, an index into
    ``sources``; both int64 and 0-d.

    ``masking``: ``"auto"`` is what the recorded objective needs, ``Mlm`` at 0.15 for ``mlm`` and
    labels equal to the ids for ``clm``. A number is ``Mlm`` at that probability, an ``Mlm`` is
    used as it is. ``None`` leaves the ids alone and labels them all, except padding (-100).

    Every iteration begins the next epoch; the first after ``load_state_dict`` continues. Loader
    workers iterate over copies, so with ``num_workers > 0`` call ``set_epoch`` before every epoch
    (and not with ``persistent_workers``), as with a DistributedSampler. Of two iterators alive at
    once, the one that started last is the one that counts.

    An epoch is every sample once, or ``epoch_samples`` of them: the next epoch then goes on where this one
    ended, and the data begin anew, in another order and with other masks, when they are used up.

    ``split="val"`` is read in the order of the manifest with the masks of epoch 0, always, and hands
    out every sample exactly once over the ranks. Other splits give every rank equally many samples
    and leave out the last ``total % ranks`` positions, other samples in each epoch.

    ``lanes``: on that many machines each reads only its share of the shards, and so it does on any number
    of machines that divides it; the order is the same on all of them. Ranks of one machine open ``lanes /
    machines`` windows of shards at once. Its share is another one in each epoch, unless ``epoch_samples`` is a
    multiple of ``lanes``.

    ``folder`` may be a URL that fsspec opens (http, s3, gs, hf, ...): shards are fetched a window ahead, once
    per machine, into ``cache`` ($SIFTLOADER_CACHE, else ~/.cache/siftloader), which holds ``cache_bytes``
    at most, those least recently used going first.

    A shard is verified (sha256) when it is first opened, by each process that opens it, those of the next
    window while this one is read, and again once the file was touched; ``verify=False`` trusts the disk.
    ``on_error=Budget(100)`` passes over so many damaged samples, with a warning, before it raises. At most
    ``2 * window + 1`` shards of a lane are mapped at once, beside one block of about a million token ids.
    """

    def __init__(
        self,
        folder: Folder | Mapping[Folder, float],
        *,
        split: str = "train",
        seed: int = 0,
        masking: Mlm | float | Literal["auto"] | None = "auto",
        with_ids: bool = False,
        with_source: bool = False,
        world: World | None = None,
        verify: bool = True,
        window: int = 8,
        lanes: int = 1,
        epoch_samples: int | None = None,
        on_error: Literal["raise"] | Budget = "raise",
        cache: Folder | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        if on_error != "raise" and not isinstance(on_error, Budget):
            raise ValueError(f'on_error must be "raise" or a Budget, got {on_error!r}')
        if on_error != "raise" and not verify:
            raise ValueError("a Budget needs verify=True: unverified, damage is not seen")
        if world is not None and not isinstance(world, World):
            raise TypeError(f"world must be a World(rank, ranks), got {world!r}")
        weights = folder if isinstance(folder, Mapping) else None
        folders = [folder] if not isinstance(folder, Mapping) else list(folder)
        if wrong := [each for each in folders if not isinstance(each, (str, os.PathLike))]:
            raise TypeError(
                f"folder must be a path, a URL or, to mix, {{folder: weight}}; got {wrong[0]!r}"
            )
        if not folders:
            raise ValueError("a mix needs at least one set of shards, got {}")
        self._opened = [(each, cache, cache_bytes) for each in folders]
        self.shard_sets = tuple(ShardSet.open(each, cache, cache_bytes) for each in folders)
        self.split = split
        # A NumPy integer would make the state unfit for JSON.
        self.seed, self.window = _integer("seed", seed), _integer("window", window)
        self.lanes = _integer("lanes", lanes)
        length = None if epoch_samples is None else _integer("epoch_samples", epoch_samples)
        self.world = world
        self.verify = verify
        self.with_ids = with_ids
        self.with_source = with_source
        self.on_error = on_error
        self.weights = None if weights is None else [float(weight) for weight in weights.values()]
        first = self.shard_sets[0]
        self.layout, self.objective, self.tokenizer = (
            first.layout,
            first.objective,
            first.tokenizer,
        )
        self.sources = tuple(source for each in self.shard_sets for source in each.sources)
        self.masking = _resolve(masking, first)
        self._shuffle = split != "val"
        if len(folders) > 1:
            self._check_alike()
        if not self._shuffle and (weights is not None or length is not None):
            raise ValueError(
                'split="val" is every sample once: open each set by itself, without epoch_samples'
            )
        if self.layout.labels and "sep" not in self.tokenizer.special_ids:
            raise ShardError(
                f"{first.name}: sentence pairs, but tokenizer {self.tokenizer.name!r} records no "
                f'"sep" token that would part them; prepare the shards again'
            )
        self._parts = tuple(_parts(self.shard_sets, split))
        sizes = [int(part.shards.counts.sum(dtype=np.int64)) for part in self._parts]
        self._samples = sum(sizes)
        self._mixture: Mixture | None = None
        if weights is not None or length is not None:
            self._mixture = Mixture(
                tuple(sizes), tuple(self.weights or [1.0]), length, self.seed, self.lanes
            )
        self.total = (
            self._samples if self._mixture is None else len(self._mixture)
        )  # over all ranks
        self._verdicts = Verdicts.of(self._parts)
        self._epoch = 0
        self._position = 0
        self._pending = True  # the next iteration starts at (epoch, position), not an epoch later
        self._reader = 0  # counts iterations: only the latest may move the position
        self._loads = 0  # counts states loaded: what ran before is told
        self._home: World | None = None  # the process that this one was sent from
        self._compared = False  # with the other ranks
        self._restored_by_worker = False
        self._forks = mmap(
            -1, _FORKED.size
        )  # the latest epoch of loader workers, which fork shares
        self._number: int | None = None  # among the streams of this process, as they begin
        self._delivered = Coverage()  # in the epoch under way, but for
        self._uncounted: list[NDArray[np.int64]] = []  # ids of the latest batches
        self._before: tuple[int, int] | None = (
            None  # epoch and position up to which others delivered
        )
        self._places().order(0, 0)  # checks window and lanes
        self._check_room()
        self.rows()  # checks that every rank gets something

    @classmethod
    def mix(cls, weights: Mapping[Folder, float], **options: Any) -> TokenShards:
        """Several shard sets in one stream, drawn in proportion to their weights.

        shards = TokenShards.mix({"shards/wiki": 0.7, "shards/code": 0.3}, seed=0, epoch_samples=1_000_000)

        All need one tokenizer, length and objective. Weights hold among any 4,096 samples in a row. Every set goes
        through its own samples once before any of them comes again, then with other masks, however often the
        others did; ``epoch_samples`` is as many as all of them have, where it is not given. ``options``
        are the class's; ids say the set: ``id >> 40``.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"mix takes {{folder: weight}}, got {type(weights).__name__}; give every set its weight"
            )
        return cls(weights, **options)

    def held_out(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Batches of ``n`` rows of the val split, this rank's; of a mix, of one set after the other in turn.

        EmptyEpoch where nothing was held out.
        """
        sets = [
            TokenShards(
                folder, split="val", masking=self.masking, cache=cache, cache_bytes=cache_bytes
            )
            for folder, cache, cache_bytes in self._opened
        ]
        in_turn = itertools.zip_longest(*(each.batches(n) for each in sets))
        return (batch for turn in in_turn for batch in turn if batch is not None)

    @property
    def shard_set(self) -> ShardSet:
        """The set of shards that is read; ShardError where it is a mix: see ``shard_sets``."""
        if len(self.shard_sets) > 1:
            raise ShardError(
                f"this is a mix of {len(self.shard_sets)} sets of shards; ask one of shard_sets"
            )
        return self.shard_sets[0]

    @property
    def fingerprint(self) -> str:
        """The identity of the data set, or of the mix: equal wherever it is copied."""
        if len(self.shard_sets) == 1:
            return self.shard_sets[0].fingerprint
        every = " ".join(each.fingerprint for each in self.shard_sets)
        return hashlib.sha256(every.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer, V."""
        return self.tokenizer.vocab_size

    @property
    def unigrams(self) -> NDArray[np.int64]:
        """How often each id occurs in the train split, int64 [V]; of a mix, by the weights of its sets."""
        if len(self.shard_sets) == 1:
            return self.shard_sets[0].unigrams
        assert self._mixture is not None
        counts = [each.unigrams for each in self.shard_sets]
        total = sum(int(each.sum()) for each in counts)
        parts = [
            share * total * each / max(1, int(each.sum()))
            for share, each in zip(self._mixture.shares, counts, strict=True)
        ]
        return np.asarray(np.sum(parts, axis=0).round(), np.int64)

    @property
    def bigrams(self) -> Bigrams:
        """The pairs of the train split, as `siftloader bigrams` counted them; read anew each time.

        ShardError where they were not counted, or are those of other shards, or for a mix.
        """
        return read_bigrams(self.shard_set)

    @property
    def passed_over(self) -> dict[str, int]:
        """How many damaged samples a Budget passed over so far, by shard."""
        found = sorted(self._verdicts.damaged.items())
        return {self._name(number): damage.samples for number, damage in found}

    def check_model(self, model: Any) -> None:
        """Raise ValueError if a model, or its config, has fewer token embeddings than there are ids.

        More are fine: models pad their vocabulary. Warns where the special ids it is configured with
        (pad, mask, ...) are not those of the shards.
        """
        tokenizer = self.tokenizer
        whose = f"tokenizer {tokenizer.name!r} of {self.shard_sets[0].name}"
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
        if not self.total:
            raise EmptyEpoch(
                f"0 samples in split {self.split!r}; prepare more text, or hold more out"
            )
        if self._shuffle and self.total < here.ranks:
            raise EmptyEpoch(
                f"{self.total} samples of split {self.split!r} for {here.ranks} ranks are "
                f"{self.total} // {here.ranks} = 0 each; use fewer ranks, more data or epoch_samples"
            )
        return self._rows(position, World(here.rank, here.ranks))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._counted(SAMPLES_AT_ONCE, per_row=True)

    def batches(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Batches of ``n`` rows, the last one ragged: the sample iterator's rows in its order.

        for batch in shards.batches(256): ...    # int64 [256, T]
        """
        return self._counted(_rows_of_batch(n), per_row=False)

    def read_batches(
        self, n: int, epoch: int, position: int = 0, world: World | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's batches of ``n`` rows from ``position`` of ``epoch`` on, the last ragged.

        Neither reads nor moves the epoch and position of this object, so a thread may read ahead.
        """
        return (batch for batch, _ in self._checked_read(n, epoch, position, world))

    def _checked_read(
        self, n: int, epoch: int, position: int, world: World | None
    ) -> Iterator[_Read]:
        n, epoch = _rows_of_batch(n), _epoch(epoch)
        if not 0 <= position <= self.total:
            raise ValueError(f"position must lie in 0..{self.total}, got {position}")
        return self._read(n, epoch, position, self._world(world))

    def _read(self, n: int, epoch: int, position: int, world: World) -> Iterator[_Read]:
        for block in self._gather(n, epoch, position, world):
            for first in range(0, len(block.tokens), n):
                rows = block.part(first, first + n)
                yield self._finish(rows), rows.ids

    def _gather(self, n: int, epoch: int, position: int, world: World) -> Iterator[Rows]:
        # A block is a whole number of batches, so that batches never have to be joined.
        size = max(1, BLOCK_TOKENS // self.layout.seq_len // n) * n
        slot, step = self._slot(world), world.ranks * world.workers
        first = position + (slot - position) % world.ranks + world.worker * world.ranks
        rows = self._rows(position, world)
        lanes = self.lanes // math.gcd(self.lanes, step)  # of which this reader reads
        opened = Opened(
            self._parts,
            self._verdicts,
            limit=min(_most_open(), (self.window + 1) * lanes * len(self._parts)),
            verify=self.verify,
            sources=self.with_source,
            budget=None if self.on_error == "raise" else self.on_error,
        )
        places = self._places()
        windows = Windows(places)
        try:
            for begin in range(0, rows, LOCATED * size):
                # More than a block: each call costs as much as a thousand positions.
                turns = np.arange(begin, min(begin + LOCATED * size, rows), dtype=np.int64)
                located = places.locate(first + step * turns, epoch)
                for at in range(0, len(turns), size):
                    where = located.part(at, at + size)
                    opened.announce(*windows.upcoming(where))
                    yield copied(where, opened, self.layout, self.with_source)
        finally:
            opened.close()

    def _finish(self, rows: Rows) -> dict[str, Tensor]:
        pad = self.tokenizer.special_ids.get("pad")
        padded = self.objective.startswith("mlm")
        # Few tokens are padding: their places are faster than a mask of all.
        padding = np.flatnonzero(rows.tokens == pad) if padded and pad is not None else NOTHING
        if self.masking is not None:
            input_ids, labels = self.masking(
                rows.tokens, rows.ids, seed=self.seed, epoch=rows.repeat
            )
        else:
            input_ids = rows.tokens.astype(np.int64)
            labels = input_ids.copy()
            labels.reshape(-1)[padding] = IGNORED
        batch = {"input_ids": input_ids}
        if rows.pairs is not None:
            sep = self.tokenizer.special_ids["sep"]
            batch["token_type_ids"] = _segments(rows.tokens, sep, padding)
        if padded:
            batch["attention_mask"] = np.ones_like(input_ids)
            batch["attention_mask"].reshape(-1)[padding] = 0
        batch["labels"] = labels
        if rows.pairs is not None:
            batch["next_sentence_label"] = rows.pairs
        if self.with_ids:
            batch["id"] = rows.ids
        if rows.sources is not None:
            batch["source"] = rows.sources
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _places(self) -> Places:
        # Made anew for each reader: not to be shared by threads.
        return Places(
            self._parts,
            self._mixture,
            seed=self.seed,
            window=self.window,
            shuffle=self._shuffle,
            lanes=self.lanes,
        )

    def _name(self, number: int) -> str:
        bases = self._places().bases
        which = bisect_right(bases, number) - 1
        stem = self._parts[which].shards[number - bases[which]].shard
        return stem if len(self._parts) == 1 else f"{self.shard_sets[which].name}/{stem}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_home": World.detect(), "_forks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_forks": mmap(-1, _FORKED.size)}

    def _warn_of_repeats(self) -> None:
        # Loader workers hold copies, which do not hear of each other's epochs: forked ones of one stream leave
        # word in memory that they share.
        turn = iteration()
        if not turn or not self._shuffle or self._restored_by_worker:
            return
        before, epoch, position = _FORKED.unpack(self._forks[:])
        if before not in (0, turn) and (epoch, position) == (self._epoch, self._position):
            warnings.warn(
                f"loader workers begin epoch {epoch} once more, with the same samples and masks: they read "
                f"copies, so call set_epoch(e) before every epoch, or read shards.batches(n), which "
                f"needs no workers",
                stacklevel=2,
            )
        self._forks[:] = _FORKED.pack(turn, self._epoch, self._position)

    def _world(self, world: World | None) -> World:
        found = World.detect(self._home)
        given = world or self.world
        if given is None:
            return found
        if given.workers > 1:
            if found.workers > 1:
                raise ValueError(
                    f"world has a worker of its own ({given.worker} of {given.workers}), so all "
                    f"{found.workers} of this loader would read the same; pass World(rank, ranks)"
                )
            return given
        return World(given.rank, given.ranks, found.worker, found.workers, given.machines)

    def _slot(self, world: World) -> int:
        return world.slot if self.lanes > 1 and self._shuffle else world.rank

    def _rows(self, position: int, world: World) -> int:
        left = self.total - position
        if self._shuffle:
            rows = left // world.ranks
        else:  # from this rank's first position on, however uneven
            rows = -(-max(0, left - (world.rank - position) % world.ranks) // world.ranks)
        return -(-max(0, rows - world.worker) // world.workers)

    def _counted(self, n: int, per_row: bool) -> Iterator[dict[str, Tensor]]:
        continues = self._pending
        self._epoch, self._position = self.upcoming()
        world = self._world(None)
        self.rows()  # ranks may have appeared since construction: raise rather than yield nothing
        self.check_ranks(self._epoch, self._position)
        self._warn_of_repeats()
        if not continues or not self._position:
            self._delivered, self._before, self._uncounted = Coverage(), None, []
        self._pending = False
        self._reader += 1
        reader, begin, handed = self._reader, self._position, 0
        step, loads = world.ranks * world.workers, self._loads
        for batch, ids in self._checked_read(n, self._epoch, begin, None):
            for at, item in enumerate(_samples(batch)) if per_row else [(None, batch)]:
                if loads != self._loads:
                    raise StateError(
                        "a state was loaded while this iterator ran, which cannot follow it; load it "
                        "before iter(), or begin a new iterator"
                    )
                some = ids if at is None else ids[at : at + 1]
                handed += len(some)
                if reader == self._reader:  # counted before it leaves: the caller may never return
                    self._position = min(begin + handed * step, self.total)
                    self._uncounted.append(some)
                    if len(self._uncounted) == COUNTED:
                        self._count()
                yield item
        if reader == self._reader and world.workers == 1:
            self._epoch, self._position, self._pending = self._epoch + 1, 0, True

    def check_ranks(self, epoch: int, position: int) -> None:
        """Raise RanksDisagree where the first rank to begin reads something else, or from elsewhere.

        Looked at once, when the first iteration begins, without waiting for anybody: whoever comes later finds
        it. Not for ``split="val"``, which one rank may read alone, nor where ``world`` was given.
        """
        if self._compared or not self._shuffle or self.world is not None:
            return
        if self._number is None:
            self._number = next(_STREAMS)
        world = World.detect()
        own = {**self.identity(), "machines": world.machines, "epoch": epoch, "position": position}
        first = json.loads(first_word(f"streams/{self._number}", json.dumps(own)))
        different = [name for name in own if own[name] != first.get(name)]
        if different:
            what = ", ".join(
                f"{name} {own[name]!r} (there {first.get(name)!r})" for name in different
            )
            raise RanksDisagree(
                f"rank {world.rank} of {world.ranks} is to read other samples than the first rank to begin: "
                f"{what}; give all ranks the same data, options and state, and let them open their "
                f"streams in the same order (or pass world=World(rank, ranks), which asks nobody)"
            )
        self._compared = True

    def coverage(self) -> Coverage:
        """Which samples this reader was given in the epoch under way, or in the one that ended last.

        Those before a restart count, as the order has them: a state says that they were handed out, and
        working out which takes a second for 10 million of them. Add up those of all ranks to compare with
        ``expected_coverage``. A loader's workers have their own, and so has a ``SiftingDataLoader``.
        """
        if self._before is not None:
            before, self._before = self._before, None
            self._delivered += self.covered(*before)
        self._count()
        return self._delivered

    def _count(self) -> None:
        if self._uncounted:
            uncounted, self._uncounted = self._uncounted, []
            self._delivered += Coverage.of(np.concatenate(uncounted))

    def covered(self, epoch: int, position: int) -> Coverage:
        """Which samples this reader is given of an epoch below a position."""
        world = self._world(None)
        first = self._slot(world) + world.worker * world.ranks
        return self._enumerated(epoch, range(first, position, world.ranks * world.workers))

    def expected_coverage(self, epoch: int, samples: int | None = None) -> Coverage:
        """What all ranks together are given of an epoch: all of it, or its first ``samples``.

        shards.expected_coverage(3, samples=shards.total // ranks * ranks)    # without the tail that is left out
        """
        if samples is not None and not 0 <= samples <= self.total:
            raise ValueError(f"samples must lie in 0..{self.total}, got {samples}")
        return self._enumerated(epoch, range(self.total if samples is None else samples))

    def _enumerated(self, epoch: int, positions: range) -> Coverage:
        found, places = Coverage(), self._places()
        firsts = np.concatenate([part.first_ids() for part in self._parts])
        for start in range(0, len(positions), ENUMERATED):
            some = positions[start : start + ENUMERATED]
            at = np.arange(some.start, some.stop, some.step, dtype=np.int64)
            where = places.locate(at, epoch)
            found += Coverage.of(firsts[where.number] + where.row)
        return found

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch ``epoch``, from its start.

        A restored state that stands in this very epoch keeps its position, so that loops which
        announce every epoch resume too.
        """
        epoch = _epoch(epoch)
        if not (self._pending and epoch == self._epoch):
            self._epoch, self._position, self._pending = epoch, 0, True
        self._reader += 1

    def upcoming(self) -> tuple[int, int]:
        """Epoch and global position at which the next iteration begins."""
        return (self._epoch, self._position) if self._pending else (self._epoch + 1, 0)

    def identity(self) -> dict[str, Any]:
        """What the order depends on, JSON-able: a state fits where all of this is equal."""
        return {
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            "window": self.window,
            "lanes": self.lanes,
            "weights": self.weights,
            "samples": self.total,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-able: all positions below ``position`` were handed out.

        ``position`` counts over all ranks, so the state of any rank restores all of them. By this object: loader
        workers have copies (``StatefulDataLoader`` asks them), a ``SiftingDataLoader`` has its own state.
        """
        return {
            "version": STATE_VERSION,
            **self.identity(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, override: Collection[str] = ()) -> None:
        """Continue where ``state`` was taken, on any number of ranks and workers.

        Raises StateError where the state belongs to another order of other data. ``override`` names what may
        differ all the same, say ``{"fingerprint"}``: the position then counts in the order of here, so
        that samples may come twice in this epoch, or not at all.
        """
        checked = self.checked_state(state, override)
        self._epoch, self._position, self._pending = checked["epoch"], checked["position"], True
        self._delivered, self._before = Coverage(), (self._epoch, self._position)
        self._uncounted = []
        self._restored_by_worker = bool(
            iteration()
        )  # as torchdata does: it may begin where it did before
        self._reader += 1
        self._loads += 1

    def checked_state(
        self, state: Mapping[str, Any], override: Collection[str] = ()
    ) -> dict[str, Any]:
        """The state, in today's version; StateError where it does not fit."""
        own = self.state_dict()
        if not isinstance(state, Mapping):
            raise StateError(
                f"a state is a dict as state_dict() gives, found {type(state).__name__}; json.loads a text first"
            )
        version = state.get("version", 1)
        if not _whole(version) or version < 1:
            raise StateError(f"version {version!r} found, a whole number expected; it is damaged")
        if version > STATE_VERSION:
            raise StateError(
                f"found a state of version {version}, this siftloader reads up to "
                f"{STATE_VERSION}; upgrade siftloader, or start a new epoch without the state"
            )
        if version == 1:
            state = {**FIRST_VERSION, "samples": self._samples, **state}
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise StateError(
                f"the state lacks {missing}; it needs {list(own)}, as state_dict() gives"
            )
        self.check_identity(state, override)
        epochs = min(MOST_EPOCHS, (1 << 62) // max(1, self.total))  # or positions would overflow
        limits = {"epoch": epochs, "samples": 1 << 62, "position": state["samples"]}
        for name, limit in limits.items():
            if not _whole(state[name]) or state[name] > limit:
                raise StateError(
                    f"{name} {state[name]!r} found, a whole number from 0 to {limit} expected; the "
                    f"state is damaged"
                )
        if state["position"] > self.total:
            raise StateError(
                f"position {state['position']} found, but an epoch has {self.total} samples here; begin "
                f"the next one: set_epoch({state['epoch'] + 1}), without the state"
            )
        return dict(state)

    def check_identity(self, found: Mapping[str, Any], override: Collection[str] = ()) -> None:
        """Raise StateError unless a state with this identity continues here, but for what ``override`` names."""
        expected, found = self.identity(), dict(found)
        override = {override} if isinstance(override, str) else {*override}
        if unknown := override - expected.keys():
            raise ValueError(f"override names some of {list(expected)}, got {sorted(unknown)}")
        if isinstance(found.get("weights"), tuple):  # as some checkpoints give a list back
            found["weights"] = [*found["weights"]]
        different = [
            name
            for name, value in expected.items()
            if name not in override
            and not (type(found.get(name)) is type(value) and found[name] == value)
        ]
        if not different:
            return
        where = " and ".join(each.name for each in self.shard_sets)
        remedies = {
            "fingerprint": f"open the data set it was saved from, not {where}",
            "split": "load it into the TokenShards of that split",
            "seed": f"construct TokenShards(..., seed={found.get('seed')!r})",
            "window": f"construct TokenShards(..., window={found.get('window')!r})",
            "lanes": f"construct TokenShards(..., lanes={found.get('lanes')!r})",
            "weights": f"mix the sets with weights {found.get('weights')!r}",
            "samples": f"construct TokenShards(..., epoch_samples={found.get('samples')!r})",
        }
        name, *others = different
        too = f" ({' and '.join(others)} differ{'s' * (len(others) == 1)}, too)" if others else ""
        names = ", ".join(repr(each) for each in expected if each in override | {*different})
        raise StateError(
            f"the state belongs to another order: {name} {found.get(name)!r} found, {expected[name]!r} "
            f"expected{too}; {remedies[name]}, or start a new epoch without the state, or "
            f"load_state_dict(state, override={{{names}}}) to go on at its position in the order of "
            f"here, where samples may come twice or not at all"
        )

    def _check_room(self) -> None:
        # Copies that do not outlive the window they belong to are fetched again and again.
        machines = self._world(None).machines
        lanes = self.lanes // math.gcd(self.lanes, machines)
        if self._shuffle and self.lanes > 1 and self.lanes % machines:
            warnings.warn(
                f"lanes={self.lanes} is no multiple of {machines} machines, so each of them opens more "
                f"than its share of the shards; lanes={self.lanes * machines // math.gcd(self.lanes, machines)} "
                f"gives each its own",
                stacklevel=3,
            )
        for part in self._parts:
            room = part.files.files.room()
            largest = part.files.layout.size(int(part.shards.counts.max()))
            needed = largest * min(len(part.shards), 2 * self.window * lanes)
            if room is not None and room < needed:
                warnings.warn(
                    f"{part.files.name}: room for {room / 1e6:,.1f} MB of copies, but {needed / 1e6:,.1f} MB "
                    f"are in use at a time on one machine (two windows of {self.window} shards in "
                    f"{lanes} lanes): shards would be fetched again and again; raise cache_bytes, free "
                    f"the disk, give another cache=, or lower window",
                    stacklevel=3,
                )

    def _check_alike(self) -> None:
        # What the sets of a mix must have in common.
        first = self.shard_sets[0]
        if len({each.fingerprint for each in self.shard_sets}) < len(self.shard_sets):
            raise ValueError("the same set of shards twice in a mix; give it one weight")
        for other in self.shard_sets[1:]:
            for what, one, two in (
                ("layout", first.layout, other.layout),
                ("objective", first.objective, other.objective),
                ("tokenizer", _meaning(first), _meaning(other)),
            ):
                if one != two:
                    raise ShardError(
                        f"{first.name} and {other.name} differ in {what} ({one} and {two}), so "
                        f"they cannot be mixed; prepare them alike"
                    )


# A batch, and the global ids of its rows, int64 [n].
_Read = tuple[dict[str, Tensor], NDArray[np.int64]]


def _parts(sets: Sequence[ShardSet], split: str) -> Iterator[Part]:
    sources = 0
    for number, files in enumerate(sets):
        yield Part(files, files.shards(split), number << SET_BITS, sources)
        sources += len(files.sources)


def _meaning(files: ShardSet) -> tuple[int, dict[str, int], str]:
    # What the ids of a set mean.
    tokenizer = files.tokenizer
    return tokenizer.vocab_size, dict(tokenizer.special_ids), tokenizer.sha256


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


def _segments(tokens: NDArray[Any], sep: int, padding: NDArray[np.int64]) -> NDArray[np.int64]:
    # [n, T]: 0 for [CLS] A [SEP] and for padding, 1 for B [SEP].
    width = tokens.shape[1]
    ends = tokens == sep
    first = np.where(ends.any(axis=1), ends.argmax(axis=1), width)  # of the first segment
    second = np.asarray(np.arange(width) > first[:, None], np.int64)
    second.reshape(-1)[padding] = 0
    return second


def _samples(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    # [n, T] -> n x [T]. Cloned: a view would keep, and pickle, the storage of the whole batch.
    columns = [value.unbind(0) for value in batch.values()]
    for values in zip(*columns, strict=True):
        yield {name: value.clone() for name, value in zip(batch, values, strict=True)}


def _most_open() -> int:
    # Shards that a reader keeps mapped, each with a descriptor: a quarter of what the process may have.
    try:
        import resource
    except ImportError:  # no such limit here
        return MOST_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(2, min(MOST_OPEN, soft // 4))


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return operator.index(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows_of_batch(value: Any) -> int:
    if (n := _integer("n", value)) < 1:
        raise ValueError(f"n must be at least 1 row, got {n}")
    return n


def _epoch(value: Any) -> int:
    if (epoch := _integer("epoch", value)) < 0:
        raise ValueError(f"epoch must be 0 or more, got {epoch}")
    return epoch
