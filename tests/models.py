"""Tiny models and an independent idea of what their early-exit scores are.

Weights are scaled by 8, so that depths disagree: at default initialisation every layer count scores
alike and a twin that runs the whole model would pass.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn


VOCAB, HIDDEN, LENGTH, LAYERS = 97, 32, 24, 4


def scaled(model: nn.Module, factor: float = 8.0) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def bert(layers: int = LAYERS, vocab_size: int = VOCAB) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=64,
    )
    return scaled(transformers.BertForMaskedLM(config)).train()


def gpt2(layers: int = LAYERS) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return scaled(transformers.GPT2LMHeadModel(config)).train()


def llama(layers: int = LAYERS) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return scaled(transformers.LlamaForCausalLM(config)).train()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.mix(self.norm(x))))


class Classifier(nn.Module):
    """A plain torch.nn classifier: features [P, 8] -> logits [P, 10]."""

    def __init__(self, layers: int = LAYERS, width: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def classifier(layers: int = LAYERS) -> nn.Module:
    return scaled(Classifier(layers), 3.0).train()


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama, "classifier": classifier}
SHIFTED = {"gpt2", "llama"}


def truncated(family: str, model: nn.Module, layer: int) -> nn.Module:
    """An independent copy that never had more than ``layer`` layers, in eval mode and float64."""
    copied = FAMILIES[family](layer)
    copied.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    return copied.double().eval()


def candidates(family: str, samples: int = 8, length: int = LENGTH) -> dict[str, Tensor]:
    """Padding, a row without labels (3), and two equal rows (5 and 6)."""
    draw = torch.Generator().manual_seed(samples * 1000 + length)
    if family == "classifier":
        x = torch.randn(samples, 8, generator=draw)
        labels = torch.randint(0, 10, (samples,), generator=draw)
        x[6], labels[6] = x[5], labels[5]
        labels[3] = -100
        return {"x": x, "labels": labels}
    ids = torch.randint(5, VOCAB, (samples, length), generator=draw)
    ids[6] = ids[5]
    mask = torch.ones_like(ids)
    mask[1, -6:] = 0
    mask[4, -3:] = 0
    labels = ids.clone()
    if family not in SHIFTED:
        hidden = torch.rand(samples, length, generator=draw) < 0.2
        hidden[:, 2] = True
        hidden[6] = hidden[5]
        labels[~hidden] = -100
        ids = ids.masked_fill(hidden, 4)
    labels = labels.masked_fill(mask == 0, -100)
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference_scores(
    family: str, model: nn.Module, layer: int, batch: dict[str, Tensor], criterion: str
) -> Tensor:
    """[P] float64: own truncation, head on all positions, plain arithmetic; NaN without a label."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        output = truncated(family, model, layer)(**inputs)
    logits = getattr(output, "logits", output)
    labels = batch["labels"]
    if family in SHIFTED:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    scores = []
    for row, wanted in zip(logits, labels, strict=True):
        values = []
        for position, label in zip(row, wanted.tolist(), strict=True):
            if label == -100:
                continue
            p = torch.exp(position - position.max())
            p = p / p.sum()
            value = -p[label].log() if criterion == "loss" else -(p * p.log()).sum()
            values.append(value)
        scores.append(torch.stack(values).mean() if values else torch.tensor(torch.nan))
    return torch.stack([score.double() for score in scores])


def trace(model: nn.Module) -> str:
    """A hash of everything that scoring must leave alone."""
    digest = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, Tensor):
            digest.update(
                thing.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
            digest.update(
                f"{thing.dtype}{thing.shape}{thing._version}{thing.requires_grad}".encode()
            )
        else:
            digest.update(repr(thing).encode())

    for name, module in model.named_modules():
        add((name, id(module), type(module), module.training, sorted(module.__dict__)))
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            add(sorted(module.__dict__[kind]))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        add((name, id(tensor)))
        add(tensor)
        add(tensor.grad)
    add(torch.get_rng_state())
    add(
        (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
        )
    )
    return digest.hexdigest()
