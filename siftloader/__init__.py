"""Train on the samples worth training on: SIFT for any unmodified PyTorch loop.

Names are imported from their files when they are first used, so that preparing a corpus never loads
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from siftloader.coverage import Coverage as Coverage
    from siftloader.errors import (
        BatchError as BatchError,
        CorpusError as CorpusError,
        CorruptShard as CorruptShard,
        EmptyEpoch as EmptyEpoch,
        FetchError as FetchError,
        RanksDisagree as RanksDisagree,
        ScoringError as ScoringError,
        ShardError as ShardError,
        SiftError as SiftError,
        Stalled as Stalled,
        StateError as StateError,
        WorkerDied as WorkerDied,
    )
    from siftloader.exits import EarlyExit as EarlyExit
    from siftloader.forks import Trial as Trial, trial as trial
    from siftloader.gate import Threshold as Threshold
    from siftloader.heads import ExitHead as ExitHead
    from siftloader.integrations import attach as attach, sift_calls as sift_calls
    from siftloader.loader import SiftingDataLoader as SiftingDataLoader
    from siftloader.masking import Mlm as Mlm
    from siftloader.opened import Budget as Budget
    from siftloader.pool import Pool as Pool
    from siftloader.predicted import Predicted as Predicted
    from siftloader.predictions import Predictions as Predictions
    from siftloader.probes import Probe as Probe, probe as probe
    from siftloader.schedule import Schedule as Schedule
    from siftloader.scores import (
        Criterion as Criterion,
        Entropy as Entropy,
        GradNorm as GradNorm,
        LeastConfidence as LeastConfidence,
        Loss as Loss,
        Margin as Margin,
        Random as Random,
        Rarity as Rarity,
        Reducible as Reducible,
        Residual as Residual,
    )
    from siftloader.selection import (
        Gumbel as Gumbel,
        RankSample as RankSample,
        Robust as Robust,
        Selection as Selection,
        Stratified as Stratified,
        TopK as TopK,
        TrimmedTopK as TrimmedTopK,
    )
    from siftloader.sifter import Sifter as Sifter
    from siftloader.stream import TokenShards as TokenShards
    from siftloader.targets import First as First, Stride as Stride
    from siftloader.trials import TrialGate as TrialGate
    from siftloader.world import World as World

__version__ = "0.1.0.dev0"

_NAMES = {
    "coverage": "Coverage",
    "errors": "BatchError CorpusError CorruptShard EmptyEpoch FetchError RanksDisagree ScoringError "
    "ShardError SiftError Stalled StateError WorkerDied",
    "exits": "EarlyExit",
    "forks": "Trial trial",
    "gate": "Threshold",
    "heads": "ExitHead",
    "integrations": "attach sift_calls",
    "loader": "SiftingDataLoader",
    "masking": "Mlm",
    "opened": "Budget",
    "pool": "Pool",
    "predicted": "Predicted",
    "predictions": "Predictions",
    "probes": "Probe probe",
    "schedule": "Schedule",
    "scores": "Criterion Entropy GradNorm LeastConfidence Loss Margin Random Rarity Reducible Residual",
    "selection": "Gumbel RankSample Robust Selection Stratified TopK TrimmedTopK",
    "sifter": "Sifter",
    "stream": "TokenShards",
    "targets": "First Stride",
    "trials": "TrialGate",
    "world": "World",
}
_FILES = {name: file for file, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_FILES)  # noqa: PLE0605 - for `import *`; the names above are for type checkers


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'siftloader' has no attribute {name!r}")
    return getattr(import_module(f"siftloader.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
