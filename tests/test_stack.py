"""Where a model can be cut: pytest tests/test_stack.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, HIDDEN, LAYERS, Layer, logits_in
from models import Block, trace
from torch import Tensor, nn

from siftloader import EarlyExit, ScoringError
from siftloader.stack import exit_at, find_stack, find_stages


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm = nn.BatchNorm2d(outside)
        self.downsample = None if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.norm(self.conv(x)) + other)


class ResNet(nn.Module):
    """The names of torchvision and timm: conv1, layer1 to layer4, fc."""

    def __init__(self, *blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        width = 8
        for number, count in enumerate(blocks, 1):
            wider = 8 * 2 ** (number - 1)
            layer = [Residual(width if n == 0 else wider, wider) for n in range(count)]
            setattr(self, f"layer{number}", nn.Sequential(*layer))
            width = wider
        self.fc = nn.Linear(width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv1(pixel_values)
        for name, child in self.named_children():
            x = child(x) if name.startswith("layer") else x
        return self.fc(x.mean((2, 3)))


class Pyramid(nn.Module):
    """Stages and what leads from one to the next in a single sequence, as torchvision's ConvNeXt has."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        for width in (8, 16, 32):
            stages.append(nn.Sequential(Residual(width, width), Residual(width, width)))
            stages.append(nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2)))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.features(pixel_values).mean((2, 3)))


class Mobile(nn.Module):
    """Blocks among other parts, in no list of their own; a few of them hold a list of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        for number, width in enumerate((8, 8, 16, 32)):
            block = Residual(width if number < 2 else width // 2, width)
            if number == 1:
                block.extra = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1))
            self.features.append(block)
        self.classifier = nn.Linear(32, 2000)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.features(pixel_values).mean((2, 3)))


def vision(kind: str, **settings: Any) -> nn.Module:
    config = getattr(hf, f"{kind}Config")(num_labels=10, **settings)
    return getattr(hf, f"{kind}ForImageClassification")(config)


def swin(kind: str) -> nn.Module:
    heads = {"num_heads": [2] * 4, "window_size": 2, "patch_size": 2, "image_size": 32}
    return vision(kind, embed_dim=8, depths=[2] * 4, **heads)


def hf_resnet(blocks: int) -> nn.Module:
    widths = [8, 16, 32, 64]
    return vision("ResNet", embedding_size=8, hidden_sizes=widths, depths=[blocks] * 4)


def funnel() -> nn.Module:
    sizes = {"d_model": HIDDEN, "n_head": 4, "d_head": 8, "d_inner": 64, "vocab_size": 97}
    return hf.FunnelForMaskedLM(hf.FunnelConfig(block_sizes=[1, 1, 1, 1], **sizes))


def children(path: str, count: int) -> list[str]:
    return [f"{path}.{number}" for number in range(count)]


STAGES = {
    "resnet": (lambda: ResNet(2, 2, 2, 2), ["layer1", "layer2", "layer3", "layer4"]),
    "uneven resnet": (lambda: ResNet(2, 1, 1), ["layer1", "layer2", "layer3"]),
    "pyramid": (Pyramid, ["features.1", "features.3", "features.5"]),
    "mobile": (Mobile, ["features.2", "features.3", "features.4", "features.5"]),
    "hf resnet": (lambda: hf_resnet(2), children("resnet.encoder.stages", 4)),
    "hf resnet of single blocks": (lambda: hf_resnet(1), children("resnet.encoder.stages", 4)),
    "convnext": (
        lambda: vision("ConvNext", hidden_sizes=[8, 16, 32, 64], depths=[2] * 4),
        children("convnext.encoder.stages", 4),
    ),
    "swin": (lambda: swin("Swin"), children("swin.encoder.layers", 4)),
    "swinv2": (lambda: swin("Swinv2"), children("swinv2.encoder.layers", 4)),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_of_a_stage_network_are_found_in_the_order_they_run(name):
    make, expected = STAGES[name]
    model = make().eval()
    assert find_stages(model) == expected
    ran: list[str] = []
    for path in expected:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    model(pixel_values=torch.randn(2, 3, 32, 32))
    assert ran == expected


@pytest.mark.parametrize("name", [*STAGES, "funnel"])
def test_a_stage_network_is_not_cut(name):
    model = funnel() if name == "funnel" else STAGES[name][0]()
    with pytest.raises(ScoringError, match='exit_head="probe"'):
        EarlyExit(model, layer=1)


@pytest.mark.parametrize("name", ["bert", "t5", "torchtitan", "timm-vit", "mixtral"])
def test_the_stages_of_a_stack_are_its_layers(name):
    model = FAMILIES[name].model()
    stages = find_stages(model)
    assert stages == children(find_stack(model), LAYERS)
    ran: list[str] = []
    for path in stages:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    FAMILIES[name].call(model, FAMILIES[name].batch())
    assert ran == stages


WITHOUT_STAGES = {
    "shared layers": (FAMILIES["albert-1-groups"].model, "share their weights"),
    "one layer": (lambda: nn.Linear(8, 10), "no stages found"),
    "a sequence": (lambda: nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 10)), "no stages found"),
}


@pytest.mark.parametrize("name", WITHOUT_STAGES)
def test_where_there_are_no_stages_it_is_said(name):
    make, text = WITHOUT_STAGES[name]
    with pytest.raises(ScoringError, match=text):
        find_stages(make())


def test_both_sides_of_a_translator_are_cut_and_a_named_one_alone():
    model, batch = FAMILIES["t5"].model().double(), FAMILIES["t5"].batch()
    assert exit_at(model, 2).cuts == {"decoder.block": 2, "encoder.block": 3}
    assert [exit_at(model, layer).cuts["encoder.block"] for layer in (1, 3, 4)] == [2, 5, 6]
    named = EarlyExit(model, "decoder.block:2")
    assert exit_at(model, "decoder.block:2").cuts == {"decoder.block": 2}
    whole = hf.T5ForConditionalGeneration(
        hf.T5Config(**{**model.config.to_dict(), "num_decoder_layers": 2})
    )
    whole.load_state_dict(model.state_dict(), strict=False)
    wanted = logits_in(FAMILIES["t5"].call(whole.double().eval(), batch))
    assert torch.allclose(logits_in(FAMILIES["t5"].call(named, batch)), wanted, atol=1e-9)
    both = logits_in(FAMILIES["t5"].call(EarlyExit(model, 2), batch))
    assert not torch.allclose(both, wanted, atol=1e-2)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Transformer(HIDDEN, 4, 4, 2, 64, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.core(source, target))


def test_torch_s_own_transformer_is_cut_on_both_sides():
    model = Translator()
    assert exit_at(model, 1).cuts == {"core.decoder.layers": 1, "core.encoder.layers": 2}
    assert exit_at(model, "core.encoder.layers:3").cuts == {"core.encoder.layers": 3}
    inputs = torch.randn(2, 5, HIDDEN), torch.randn(2, 7, HIDDEN)
    assert EarlyExit(model, 1)(*inputs).shape == (2, 7, 10)


class TwoTowers(nn.Module):
    """Called encoder and decoder, but nothing says that one reads the other."""

    def __init__(self, small: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Layer() for _ in range(3))
        self.decoder = nn.ModuleList(Block(small) for _ in range(2))


def test_names_alone_make_no_translator():
    assert exit_at(TwoTowers(8), 1).cuts == {"encoder": 1}


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@pytest.mark.parametrize("groups", [1, 2])
def test_a_shared_layer_runs_as_often_as_the_exit_says(groups, layer):
    model = FAMILIES[f"albert-{groups}-groups"].model()
    batch = FAMILIES["bert"].batch()
    before, ran = trace(model), []
    early = EarlyExit(model, layer)
    assert (early.layer, early.layers) == (layer, LAYERS)
    hooks = [
        group.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, group in enumerate(model.albert.encoder.albert_layer_groups)
    ]
    early.logits(batch)
    for hook in hooks:
        hook.remove()
    assert ran == [number * groups // LAYERS for number in range(layer)]
    assert trace(model) == before and model.config.num_hidden_layers == LAYERS


def test_settings_of_a_live_config_are_followed():
    model, batch = FAMILIES["albert-1-groups"].model(), FAMILIES["bert"].batch()
    early = EarlyExit(model, 2)
    early.logits(batch)
    model.config.num_hidden_layers = 3  # not the twin's: it stays at two
    before = early.logits(batch)
    model.albert.encoder.config = None  # a shell that kept an old config would not notice
    with pytest.raises(TypeError):
        early.logits(batch)
    model.albert.encoder.config = model.config
    assert torch.equal(early.logits(batch), before)


class Beside(nn.Module):
    """A list as long as the stack, larger and not of layers; or a stack of several kinds of layer."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.config = hf.GPT2Config(n_layer=3)
        self.tables = nn.ModuleList(nn.ModuleList([nn.Linear(64, 64)]) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
        other = nn.Linear(8, 8) if mixed else Block(8)
        self.blocks = nn.ModuleList([Block(8), other, Block(8)])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_list_of_lists_and_a_head_of_as_many_parts_are_no_stacks(mixed):
    assert find_stack(Beside(mixed)) == "blocks"
