"""Train on the samples worth training on: SIFT for any unmodified PyTorch loop."""

from siftloader.errors import (
    BatchError as BatchError,
    CorpusError as CorpusError,
    CorruptShard as CorruptShard,
    EmptyEpoch as EmptyEpoch,
    ScoringError as ScoringError,
    ShardError as ShardError,
    SiftError as SiftError,
    StateError as StateError,
)
from siftloader.exits import EarlyExit as EarlyExit
from siftloader.loader import SiftingDataLoader as SiftingDataLoader
from siftloader.masking import Mlm as Mlm
from siftloader.schedule import Schedule as Schedule
from siftloader.scores import (
    Criterion as Criterion,
    Entropy as Entropy,
    Loss as Loss,
    Predictions as Predictions,
    Random as Random,
    Rarity as Rarity,
)
from siftloader.selection import Selection as Selection, TopK as TopK
from siftloader.sifter import Sifter as Sifter
from siftloader.stream import TokenShards as TokenShards
from siftloader.world import World as World


__version__ = "0.1.0.dev0"
