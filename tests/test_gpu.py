"""What only a GPU can show: pytest tests/test_gpu.py -m gpu"""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, candidates, reference_scores

from siftloader import (
    Entropy,
    First,
    Gumbel,
    Loss,
    RankSample,
    Robust,
    Sifter,
    SiftingDataLoader,
    Stratified,
    Stride,
    TrimmedTopK,
)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_references(family, criterion):
    model, batch = FAMILIES[family](), candidates(family)
    expected = reference_scores(family, model, 2, batch, criterion)
    model.cuda()
    on_host = Sifter(model, exit_layer=2, criterion=criterion).score(batch).cpu()
    on_device = Sifter(model, exit_layer=2, criterion=criterion).score(
        {name: value.cuda() for name, value in batch.items()}
    )
    rows = torch.arange(8) != 3
    assert (on_host[rows] - expected[rows]).abs().max() < 1e-3
    assert torch.allclose(on_device.cpu()[rows], on_host[rows], atol=1e-4)


def test_bfloat16_scores_are_no_worse_than_the_eager_path():
    model, batch = FAMILIES["bert"](), candidates("bert")
    truth = reference_scores("bert", model, 1, batch, "loss")
    model.cuda()
    found = Sifter(model, autocast=torch.bfloat16).score(batch).cpu()
    rows = torch.arange(8) != 3
    spread = truth[rows].max() - truth[rows].min()
    assert (found - truth)[rows].abs().max() < 0.1 * spread + 0.05


@pytest.mark.parametrize("criterion", ["loss", "entropy", "random"])
def test_a_step_of_the_loader_does_not_synchronise(criterion):
    model = FAMILIES["classifier"]().cuda()
    batch = {name: value.pin_memory() for name, value in candidates("classifier", 32).items()}
    loader = SiftingDataLoader.wrap([batch] * 12, model=model, criterion=criterion, warmup_steps=0)
    iterator = iter(loader)
    next(iterator)  # the first pool is checked against the slow path
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            kept = next(iterator)
            loss = torch.nn.functional.cross_entropy(model(kept["x"]), kept["labels"])
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept["x"].is_cuda and loader.stats["seconds_scoring"] > 0


OPTIONS = {
    "margin": {"criterion": "margin"},
    "gradient": {"criterion": "grad-norm"},
    "a sum": {"criterion": Loss() + 0.1 * Entropy()},
    "ranks": {"selection": RankSample(), "sift_weight": True},
    "gumbel": {"selection": Gumbel(), "sift_weight": True},
    "trimmed": {"selection": TrimmedTopK()},
    "robust": {"selection": Robust()},
    "strata": {"selection": Stratified(by=lambda batch: batch["labels"] % 2)},
    "exit head": {"exit_head": "probe"},
    "log": {"log_selections": "selections.parquet"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_synchronises(option, tmp_path, monkeypatch):
    if option == "log":
        pytest.importorskip("pyarrow")
        monkeypatch.chdir(tmp_path)
    model = FAMILIES["classifier"]().cuda()
    batch = {name: value.pin_memory() for name, value in candidates("classifier", 32).items()}
    loader = SiftingDataLoader.wrap([batch] * 12, model=model, warmup_steps=0, **OPTIONS[option])
    iterator = iter(loader)
    next(iterator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            kept = next(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(kept["x"]) == 32


@pytest.mark.parametrize("positions", [Stride(4), First(6)])
def test_positions_agree_wherever_the_labels_lie(positions):
    model, batch = FAMILIES["gpt2"]().cuda(), candidates("gpt2")
    sifter = Sifter(model, exit_layer=2, positions=positions)
    on_host = sifter.score(batch)
    on_device = sifter.score({name: value.cuda() for name, value in batch.items()})
    rows = torch.arange(8) != 3
    assert torch.allclose(on_device[rows], on_host[rows], atol=1e-4)


def test_scoring_leaves_the_cuda_stream_of_random_numbers_alone():
    model = FAMILIES["bert"]().cuda()
    before = torch.cuda.get_rng_state()
    Sifter(model, criterion="entropy")(candidates("bert"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
