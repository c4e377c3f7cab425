"""The public surface, and what importing it must not do: pytest tests/test_surface.py"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import siftloader
from siftloader import errors


PUBLIC = """
    BatchError Budget CorpusError CorruptShard Coverage Criterion EarlyExit EmptyEpoch Entropy ExitHead FetchError
    First GradNorm Gumbel LeastConfidence Loss Margin Mlm Pool Predicted Predictions Probe Random RankSample
    RanksDisagree Rarity Reducible Residual Robust Schedule ScoringError Selection ShardError SiftError Sifter
    SiftingDataLoader Stalled StateError Stratified Stride Threshold TokenShards TopK Trial TrialGate TrimmedTopK
    WorkerDied World attach probe sift_calls trial
""".split()  # noqa: SIM905 - a list of names reads better without quotes


def test_the_public_names_are_exactly_these():
    assert [name for name in dir(siftloader) if not name.startswith("_")] == PUBLIC
    assert siftloader.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(siftloader, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Siftr'"):
        siftloader.Siftr  # noqa: B018


def test_preparing_a_corpus_never_loads_torch():
    done = run(
        BLOCKED.format(blocked={"torch"})
        + """
    import siftloader.cli, siftloader.prepare, siftloader.order, siftloader.masking
    assert not asked
    try:
        siftloader.SiftingDataLoader
    except ImportError as error:
        assert "torch is blocked" in str(error) and asked
    else:
        raise AssertionError("this would not see torch")
    """
    )
    assert done.returncode == 0, done.stderr


def test_every_error_is_in_the_drawn_tree():
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert name in errors.__doc__
            assert issubclass(value, errors.SiftError)


BLOCKED = """
    import sys

    asked = []

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked}:
                asked.append(name)
                raise ImportError(f"{{name}} is blocked")

    sys.meta_path.insert(0, Block())
"""
IMPORTS = """
    import hashlib, random, threading, warnings
    import numpy as np, torch

    def state():
        streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()
        return (hashlib.sha256(repr(streams).encode()).hexdigest(), list(warnings.filters),
                torch.get_num_threads(), torch.is_grad_enabled(), threading.active_count())

    del asked[:]
    print(state())
    from siftloader import SiftingDataLoader
    print(state())
    print(asked)
"""
SIFTS = """
    import torch
    import siftloader
    from siftloader import SiftingDataLoader, TokenShards

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8192, 8)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.head = torch.nn.Linear(8, 8192)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    loader = SiftingDataLoader(TokenShards("shards/demo"), 8, model=Net(), warmup_steps=0)
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (8, 128) and loader.stats["kept"] == 8
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sifted() -> subprocess.CompletedProcess[str]:
    """One process, for importing torch takes seconds: it imports siftloader, and sifts without extras."""
    blocked = {"webdataset", "torchdata", "transformers", "tokenizers", "pyarrow"}
    return run(BLOCKED.format(blocked=blocked) + IMPORTS + SIFTS)


def test_sifting_needs_neither_webdataset_nor_torchdata_nor_transformers(sifted):
    assert sifted.returncode == 0, sifted.stderr


def test_the_block_above_can_fail():
    done = run(BLOCKED.format(blocked={"numpy"}) + SIFTS)
    assert done.returncode != 0 and "numpy is blocked" in done.stderr


def test_importing_changes_nothing(sifted):
    before, after, wanted = map(str.strip, sifted.stdout.splitlines()[:3])
    assert before == after and wanted == "[]", sifted.stderr
