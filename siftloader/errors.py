"""Everything siftloader raises on its own account.

* SiftError
  + CorpusError        text that cannot be read, or options that contradict the text
  + ShardError         shards on disk that cannot be trusted
    - CorruptShard     the bytes of a shard are not those the manifest recorded
    - FetchError       a shard behind a URL did not arrive, however often it was asked for
  + StateError         a saved state that belongs to other data, another seed or a newer version
  + RanksDisagree      ranks of one job that read other data, or begin elsewhere
  + BatchError         a batch whose rows cannot be told apart
  + ScoringError       a model that cannot be cut, or an early prediction that makes no sense
  + EmptyEpoch         an epoch that would hand out nothing
  + WorkerDied         a loader worker was killed: by the system, for memory, or by somebody
  + Stalled            nothing came for as long as `timeout` allows

Wrong arguments are plain ``ValueError`` or ``TypeError``, raised at construction. Every message says
what was found, what is needed and what to do.
"""


class SiftError(Exception):
    """The base of the tree: ``except SiftError`` catches all of it."""


class CorpusError(SiftError):
    """Text cannot be read as asked, or holds nothing to prepare."""


class ShardError(SiftError):
    """Shards on disk are missing, incomplete or not what their manifest says.

    ``shard`` is a stem, ``sample`` a number within it, ``byte`` an offset in its file; None where unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        shard: str | None = None,
        sample: int | None = None,
        byte: int | None = None,
    ) -> None:
        super().__init__(message)
        self.shard, self.sample, self.byte = shard, sample, byte


class CorruptShard(ShardError):
    """The bytes of a shard are not those that were written: the message names shard, sample and byte."""


class FetchError(ShardError):
    """A file behind a URL did not arrive whole, however often it was asked for."""


class StateError(SiftError):
    """A saved state belongs to other data, another seed or a newer version."""


class RanksDisagree(SiftError):
    """Ranks of one job read other data, in another order, or begin elsewhere: samples would be lost."""


class BatchError(SiftError):
    """The rows of a batch cannot be told apart, so none of them can be selected."""


class ScoringError(SiftError):
    """A model cannot be cut at the exit layer, or its early predictions make no sense."""


class EmptyEpoch(SiftError):
    """An epoch would hand out nothing; the message has the arithmetic."""


class WorkerDied(SiftError, RuntimeError):
    """A loader worker ended without a word; a RuntimeError too, as torch raises for it."""


class Stalled(SiftError, RuntimeError):
    """Nothing came within ``timeout`` seconds; the message has the stacks of all threads."""
