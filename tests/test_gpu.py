"""What only a GPU can show: pytest tests/test_gpu.py -m gpu"""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, candidates, reference_scores

from siftloader import Sifter, SiftingDataLoader


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


def test_scoring_leaves_the_cuda_stream_of_random_numbers_alone():
    model = FAMILIES["bert"]().cuda()
    before = torch.cuda.get_rng_state()
    Sifter(model, criterion="entropy")(candidates("bert"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
