"""The live twin of every model family: pytest tests/test_families.py

Each row of the table in families.py is compared with a model that never had more layers, in float64,
while the live model trains with dropout on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, SAMPLES, UNLABELLED, VOCAB, cast, logits_in
from models import trace
from torch import Tensor, nn

from siftloader import EarlyExit, Sifter, twin
from siftloader.stack import exit_at


TOLERANCE = 2e-6  # of the largest score; float32 beside float64
ROWS = [row for row in range(SAMPLES) if row != UNLABELLED]
every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def live(name: str) -> tuple[nn.Module, Any]:
    """Shared by the tests that only score: scoring changes nothing, which is one of them."""
    return FAMILIES[name].model(), FAMILIES[name].batch()


@cache
def reference(name: str, layer: int) -> Tensor:
    return FAMILIES[name].reference(live(name)[0], layer)


def expected(name: str, layer: int, criterion: str) -> Tensor:
    return FAMILIES[name].scores(reference(name, layer), live(name)[1], criterion)


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
@every_family
def test_scores_are_those_of_a_truncated_model(name, layer):
    family, (model, batch) = FAMILIES[name], live(name)
    before = trace(model)
    for criterion in ("loss", "entropy"):
        sifter = Sifter(
            model, exit_layer=family.exit(layer), criterion=criterion, score_fn=family.loss
        )
        found = sifter.score(batch).double()
        wanted = expected(name, layer, criterion)
        assert wanted[ROWS].isfinite().all()
        tolerance = TOLERANCE * max(1.0, wanted[ROWS].abs().max().item())
        assert (found - wanted)[ROWS].abs().max() <= tolerance
        if not wanted[UNLABELLED].isfinite():
            assert found[UNLABELLED] == -torch.inf
        for other in {1, 2, 3, LAYERS} - {layer}:
            apart = (expected(name, other, criterion) - wanted)[ROWS].abs().max()
            assert apart >= 100 * tolerance, "depths must disagree, or this test could not fail"
    assert trace(model) == before, "scoring must leave no trace"


@every_family
def test_the_live_model_drops_out_and_its_twin_does_not(name):
    family, (model, batch) = FAMILIES[name], live(name)
    with torch.no_grad():
        trained = logits_in(family.call(model, batch)).double()
    early = logits_in(family.call(EarlyExit(model, family.exit(LAYERS)), batch)).double()
    wanted = reference(name, LAYERS)
    assert (early - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    if family.dropout:
        assert (trained - wanted).abs().max() > 1e-2 * wanted.abs().max()


@every_family
def test_weights_are_live(name):
    family = FAMILIES[name]
    model = family.model()
    early = EarlyExit(model, family.exit(2))
    last = torch.zeros(())

    def follows() -> None:
        nonlocal last
        dtype = next(model.parameters()).dtype
        found = logits_in(family.call(early, cast(family.batch(), dtype))).double()
        wanted = family.reference(model, 2, dtype)
        scale = wanted.abs().max()
        assert (found - wanted).abs().max() <= 1e-5 * scale
        assert (found - last).abs().max() > 1e-3 * scale, "nothing changed: this tells nothing"
        last = found

    follows()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    logits_in(family.call(model, family.batch())).float().logsumexp(-1).mean().backward()
    optimizer.step()
    follows()
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    follows()
    stack = model.get_submodule(next(iter(exit_at(model, family.exit(2)).cuts)))
    first = next(iter(stack.children()))
    module = next(m for m in first.modules() if getattr(m, "weight", torch.zeros(0)).ndim > 1)
    module.weight = nn.Parameter(module.weight.detach().flip(0))
    follows()
    model.to(torch.bfloat16)
    follows()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_sides_of_a_translator_run_once_whatever_the_number_of_chunks(name, monkeypatch):
    model, batch = live(name)
    whole = Sifter(model, exit_layer=2).score(batch)
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 7 * VOCAB)
    ran: list[int] = []
    hooks = [
        model.get_submodule(path)[0].register_forward_hook(lambda *_, side=side: ran.append(side))
        for side, path in enumerate(exit_at(model, 2).cuts)
    ]
    sifter = Sifter(model, exit_layer=2)
    assert torch.allclose(sifter.score(batch), whole, atol=1e-5)
    ran.clear()
    sifter.score(batch)
    for hook in hooks:
        hook.remove()
    assert sorted(ran) == [0, 1]


def test_a_vit_of_timm_is_cut():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch
        pytest.skip(f"timm is not installed, or does not fit this torch: {error}")
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10).train()
    pictures = torch.randn(2, 3, 224, 224)
    small = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10).eval()
    small.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(EarlyExit(model, layer=1)(pictures), small(pictures))
