"""Tiny models of every family that the twin must cut, each with an independent idea of its exits.

    family = FAMILIES["bert"]
    model = family.model()                        # N layers, weights scaled, training mode
    logits = family.reference(model, layer=2)     # by a model that never had more than two layers

Matrices are scaled so that depths disagree: at default initialisation every depth scores alike and a
twin that runs the whole model would pass. The modules below are written for these tests, with the call
conventions of the training codes that they are named after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional


VOCAB, HIDDEN, LENGTH, LAYERS, SAMPLES = 97, 32, 24, 4, 8
UNLABELLED = 3  # this row has nothing to predict


@dataclass(frozen=True)
class Family:
    """One row of the table.

    ``call`` is how a training loop calls the model, labels included where it gives them; ``loss`` has
    the loop's own lines where the loss is computed outside of a model that Sifter cannot call by itself.
    ``exit`` turns a layer number into ``exit_layer``.
    """

    name: str
    build: Callable[[int], nn.Module]
    batch: Callable[[], Any]
    labels: Callable[[Any], Tensor]
    call: Callable[[Any, Any], Any]
    shift: bool = False
    factor: float = 8.0
    double: bool = False  # scored in float64: routing and recurrences amplify the last bit
    dropout: bool = True
    loss: Callable[[Any, Any], Tensor] | None = None
    number: bool = False  # one number per position says yes or no
    exit: Callable[[int], int | str] = int

    def model(self, layers: int = LAYERS) -> nn.Module:
        """The same weights at every call, in training mode; no random number is drawn."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build(layers)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(self.factor)
        return model.double().train() if self.double else model.train()

    def truncated(self, model: nn.Module, layer: int) -> nn.Module:
        """A model of ``layer`` layers with the weights of ``model``, in eval mode and float64."""
        copied = self.model(layer).double()
        wanted, given = copied.state_dict(), model.state_dict()
        assert not wanted.keys() - given.keys()
        # One number per layer: the first ones belong to the layers that stay.
        state = {name: given[name][tuple(map(slice, wanted[name].shape))] for name in wanted}
        copied.load_state_dict(state)
        buffers = dict(model.named_buffers())  # those that no state has: tables, rounded by `.to`
        for name, buffer in copied.named_buffers():
            buffer.copy_(buffers[name])
        return copied.eval()

    def reference(
        self, model: nn.Module, layer: int, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Logits [P, T, V] or [P, C], computed in ``dtype``, returned in float64."""
        truncated, batch = self.truncated(model, layer).to(dtype), cast(self.batch(), dtype)
        with torch.no_grad():
            return logits_in(self.call(truncated, batch)).double()

    def scores(self, logits: Tensor, batch: Any, criterion: str) -> Tensor:
        """[P] float64 in plain arithmetic; NaN without a label."""
        labels = self.labels(batch)
        if self.number:
            logits = torch.stack((torch.zeros_like(logits), logits), -1)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.reshape(*labels.shape, -1)
        p = torch.exp(logits - logits.amax(-1, keepdim=True))
        p = p / p.sum(-1, keepdim=True)
        chosen = p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        values = -chosen.log() if criterion == "loss" else -torch.special.xlogy(p, p).sum(-1)
        values, wanted = values.reshape(SAMPLES, -1), (labels >= 0).reshape(SAMPLES, -1)
        return values.masked_fill(~wanted, 0).sum(1) / wanted.sum(1)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The same batch with its floating-point tensors in ``dtype``."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: cast(value, dtype) for name, value in batch.items()}
    return tuple(cast(value, dtype) for value in batch)


def logits_in(output: Any) -> Tensor:
    """The predictions in what a model of the table returns."""
    if isinstance(output, dict):
        for name in ("logits", "prediction_logits", "outputs"):
            if name in output:
                return output[name]
    return output[0] if isinstance(output, tuple) else output


# Batches: padding in rows 1 and 4, row 3 without labels, rows 5 and 6 equal.


def _ids(length: int = LENGTH) -> tuple[Tensor, Tensor, torch.Generator]:
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(5, VOCAB, (SAMPLES, length), generator=draw)
    ids[6] = ids[5]
    mask = torch.ones_like(ids)
    mask[1, -6:] = 0
    mask[4, -3:] = 0
    return ids, mask, draw


def masked_text() -> dict[str, Tensor]:
    ids, mask, draw = _ids()
    hidden = torch.rand(ids.shape, generator=draw) < 0.2
    hidden[:, 2] = True
    hidden[6] = hidden[5]
    labels = ids.masked_fill(~hidden | (mask == 0), -100)
    labels[UNLABELLED] = -100
    return {"input_ids": ids.masked_fill(hidden, 4), "attention_mask": mask, "labels": labels}


def text() -> dict[str, Tensor]:
    ids, mask, _ = _ids()
    labels = ids.masked_fill(mask == 0, -100)
    labels[UNLABELLED] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sentence_pairs() -> dict[str, Tensor]:
    batch = masked_text()
    return {**batch, "next_sentence_label": torch.arange(SAMPLES) % 2}


def replaced_tokens() -> dict[str, Tensor]:
    batch = text()
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["input_ids"] % 2)}


def translations() -> dict[str, Tensor]:
    batch = text()
    labels = batch["labels"].flip(1)
    decoder = functional.pad(labels.clamp_min(0)[:, :-1], (1, 0))
    return {**batch, "decoder_input_ids": decoder, "labels": labels}


def pictures() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    pixels = torch.randn(SAMPLES, 3, 32, 32, generator=draw)
    pixels[6] = pixels[5]
    labels = torch.randint(0, 10, (SAMPLES,), generator=draw)
    labels[6] = labels[5]
    labels[UNLABELLED] = -100
    return {"pixel_values": pixels, "labels": labels}


def labelled_pictures() -> tuple[Tensor, Tensor]:
    batch = pictures()
    return batch["pixel_values"], batch["labels"]


def next_tokens(nothing: int) -> tuple[Tensor, Tensor]:
    ids, mask, _ = _ids(LENGTH + 1)
    y = ids[:, 1:].masked_fill(mask[:, 1:] == 0, nothing)
    y[UNLABELLED] = nothing
    return ids[:, :-1], y


def bare() -> Tensor:
    return _ids(LENGTH + 1)[0]


# Hugging Face


def _sizes(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 64,
        **more,
    }


def _decoder_sizes(layers: int, **more: Any) -> dict[str, Any]:
    sizes = _sizes(layers, num_key_value_heads=2, head_dim=8, attention_dropout=0.1)
    return {**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}


def _plain(model: Any, batch: Any) -> Any:
    # As a loop calls it, but for the labels: the loss is not what is compared.
    return model(**{name: value for name, value in batch.items() if "label" not in name})


def _labels(batch: Any) -> Tensor:
    return batch["labels"]


def _hf(
    name: str,
    model: str,
    config: str,
    settings: Callable[[int], dict[str, Any]],
    batch: Callable[[], Any] = text,
    **more: Any,
) -> Family:
    def build(layers: int) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**settings(layers)))

    more.setdefault("shift", batch is text)
    return Family(name, build, batch, _labels, _plain, **more)


def _encoder(name: str, model: str, config: str, **settings: Any) -> Family:
    return _hf(name, model, config, lambda n: _sizes(n, **settings), masked_text)


def _decoder(name: str, model: str, config: str, **settings: Any) -> Family:
    return _hf(name, model, config, lambda n: _decoder_sizes(n, **settings))


def _albert(groups: int) -> Family:
    def settings(layers: int) -> dict[str, Any]:
        within = math.ceil(layers * groups / LAYERS)
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return _sizes(layers, embedding_size=16, num_hidden_groups=within, **dropout)

    name = f"albert-{groups}-groups"
    return _hf(name, "AlbertForMaskedLM", "AlbertConfig", settings, masked_text)


def _modernbert(sparse: bool) -> Family:
    def settings(layers: int) -> dict[str, Any]:
        return _sizes(
            layers,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=16,
            sparse_prediction=sparse,
            mlp_dropout=0.1,
        )

    name = "modernbert-sparse" if sparse else "modernbert"
    return _hf(name, "ModernBertForMaskedLM", "ModernBertConfig", settings, masked_text)


HUGGING_FACE = [
    _encoder("bert", "BertForMaskedLM", "BertConfig"),
    _hf("bert-pretraining", "BertForPreTraining", "BertConfig", _sizes, sentence_pairs),
    _encoder("roberta", "RobertaForMaskedLM", "RobertaConfig", pad_token_id=1),
    _hf(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        lambda n: {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": n,
            "n_heads": 4,
            "hidden_dim": 2 * HIDDEN,
            "max_position_embeddings": 64,
        },
        masked_text,
    ),
    _encoder("electra-generator", "ElectraForMaskedLM", "ElectraConfig", embedding_size=16),
    _hf(
        "electra-discriminator",
        "ElectraForPreTraining",
        "ElectraConfig",
        lambda n: _sizes(n, embedding_size=16),
        replaced_tokens,
        number=True,
    ),
    _encoder(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=16,
        pos_att_type="p2c|c2p",
        conv_kernel_size=3,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    _albert(1),
    _albert(2),
    _modernbert(sparse=False),
    _modernbert(sparse=True),
    _hf(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        lambda n: {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": n,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
    ),
    _hf(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        lambda n: _sizes(
            n, hidden_dropout=0.1, attention_dropout=0.1, bos_token_id=1, eos_token_id=2
        ),
    ),
    _hf(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        lambda n: {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": n,
            "ffn_dim": 2 * HIDDEN,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": HIDDEN,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    _hf(
        "phi",
        "PhiForCausalLM",
        "PhiConfig",
        lambda n: _sizes(n, resid_pdrop=0.1, bos_token_id=1, eos_token_id=2),
    ),
    _decoder("llama", "LlamaForCausalLM", "LlamaConfig"),
    _decoder("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=16),
    _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
    _hf(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        lambda n: _decoder_sizes(
            n,
            sliding_window=16,
            layer_types=[*["sliding_attention"] * 3, "full_attention"][:n],
            final_logit_softcapping=30.0,
        ),
    ),
    _decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    _hf(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        lambda n: _decoder_sizes(n, num_local_experts=4, experts_implementation="eager"),
        double=True,
    ),
    _hf(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        lambda n: _decoder_sizes(
            n,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=HIDDEN,
            experts_implementation="eager",
        ),
        double=True,
    ),
    _hf(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        lambda n: {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": n,
            "state_size": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        double=True,
        dropout=False,
    ),
    _hf(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        lambda n: {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 2 * HIDDEN,
            "num_layers": math.ceil(6 * n / LAYERS),  # the encoder has six
            "num_decoder_layers": n,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        translations,
        factor=2.0,
    ),
    _hf(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        lambda n: {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "encoder_layers": math.ceil(n / 2),  # and this one two
            "decoder_layers": n,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * HIDDEN,
            "decoder_ffn_dim": 2 * HIDDEN,
            "max_position_embeddings": 64,
        },
        translations,
    ),
    _hf(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        lambda n: {
            "hidden_size": HIDDEN,
            "num_hidden_layers": n,
            "num_attention_heads": 4,
            "intermediate_size": 2 * HIDDEN,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 10,
            "hidden_dropout_prob": 0.1,
        },
        pictures,
    ),
]


# Modules with the call conventions of others' training codes


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4, causal: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, extra: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        v = v if extra is None else v + extra
        q, k, v = (y.view(rows, length, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class Layer(nn.Module):
    def __init__(self, width: int = HIDDEN, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), mask=mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class NanoGPT(nn.Module):
    """The loss inside; without targets only the last position is predicted."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=layers)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "wpe": nn.Embedding(64, HIDDEN),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(Layer() for _ in range(layers)),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        places = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(places))
        for layer in self.transformer.h:
            x = layer(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        flat = logits.view(-1, VOCAB), targets.reshape(-1)
        return logits, functional.cross_entropy(*flat, ignore_index=-1)


def rms(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:])


class GatedLayer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.attn = Attention(HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, 64, bias=False)
        self.down = nn.Linear(64, HIDDEN, bias=False)
        self.gate = nn.Linear(8, HIDDEN, bias=False) if index % 2 else None

    def forward(self, x: Tensor, value: Tensor | None) -> Tensor:
        if self.gate is not None:
            value = value * self.gate(x[..., :8]).sigmoid()
        x = x + self.attn(rms(x), value)
        return x + self.down(functional.relu(self.up(rms(x))).square())


class NanoChat(nn.Module):
    """Logits or the loss, soft-capped; numbers and embeddings per layer, norms without weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=layers, vocab_size=VOCAB)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "h": nn.ModuleList(GatedLayer(index) for index in range(layers)),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.stream_lambdas = nn.Parameter(torch.linspace(1.0, 0.7, LAYERS)[:layers].clone())
        self.start_lambdas = nn.Parameter(torch.linspace(0.0, 0.4, LAYERS)[:layers].clone())
        self.value_embeds = nn.ModuleDict(
            {str(index): nn.Embedding(VOCAB, HIDDEN) for index in range(1, layers, 2)}
        )
        places = torch.outer(torch.arange(64.0), 0.1 ** torch.linspace(0, 1, HIDDEN // 2))
        self.register_buffer("cos", places.cos(), persistent=False)
        self.register_buffer("sin", places.sin(), persistent=False)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean"
    ) -> Tensor:
        x = self.transformer.wte(idx)
        cos, sin = self.cos[: idx.shape[1]], self.sin[: idx.shape[1]]
        one, two = x.chunk(2, -1)
        x = start = rms(torch.cat([one * cos + two * sin, two * cos - one * sin], -1))
        for index, layer in enumerate(self.transformer.h):
            x = self.stream_lambdas[index] * x + self.start_lambdas[index] * start
            own = self.value_embeds[str(index)](idx) if str(index) in self.value_embeds else None
            x = layer(x, own)
        logits = 15 * torch.tanh(
            self.lm_head(rms(x)).to(torch.promote_types(x.dtype, torch.float32)) / 15
        )
        if targets is None:
            return logits
        return functional.cross_entropy(
            logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1, reduction=loss_reduction
        )


class LitGPT(nn.Module):
    """Logits only: the loop slices a bare [B, T + 1] and computes the loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=layers)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "h": nn.ModuleList(Layer() for _ in range(layers)),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(idx)
        for layer in self.transformer.h:
            x = layer(x)
        return self.lm_head(self.transformer.ln_f(x))


class Titan(nn.Module):
    """Layers in a dict with strings for keys, parts that may be missing, the loss outside."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleDict({str(index): Layer() for index in range(layers)})
        self.norm = nn.RMSNorm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens) if self.tok_embeddings else tokens
        for layer in self.layers.values():
            x = layer(x)
        x = self.norm(x) if self.norm else x
        return self.output(x) if self.output else x


class Trunk(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(causal=False) for _ in range(layers))
        self.final_norm = nn.LayerNorm(HIDDEN)

    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)


class Crammed(nn.Module):
    """A dict of loss and outputs, rows and positions flattened; a head at the masked positions only."""

    def __init__(self, layers: int, sparse: bool) -> None:
        super().__init__()
        self.cfg, self.sparse = SimpleNamespace(num_transformer_layers=layers), sparse
        self.encoder = Trunk(layers)
        self.decoder = nn.Linear(HIDDEN, VOCAB)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        x = self.encoder(input_ids, mask).reshape(-1, HIDDEN)
        if labels is None:
            outputs = self.decoder(x)
            return {"loss": outputs.new_zeros(()), "outputs": outputs}
        flat = labels.reshape(-1)
        if self.sparse:
            places = flat.ne(-100).nonzero()[:, 0]
            x, flat = x[places], flat[places]
        outputs = self.decoder(x)
        return {"loss": functional.cross_entropy(outputs, flat), "outputs": outputs}


class TorchEncoder(nn.Module):
    """torch's own encoder under a mean and a linear head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 64, dropout=0.1, batch_first=True)
        self.patches = nn.Linear(3 * 32, HIDDEN)
        self.encoder = nn.TransformerEncoder(layer, layers)
        for each in self.encoder.layers:  # they begin as copies of one
            for parameter in each.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures.transpose(1, 2).flatten(2))
        return self.head(self.encoder(x).mean(1))


class TimmVit(nn.Module):
    """timm's names: patch_embed, cls_token, pos_embed, blocks as a Sequential, norm, head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, HIDDEN, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, HIDDEN) * 0.02)
        self.pos_drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Layer(causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))
        return self.head(x[:, 0])


class Named(nn.Module):
    """Two stacks of one kind: which one to cut must be said."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * 32, HIDDEN)
        self.stem = nn.Sequential(Layer(causal=False), Layer(causal=False))
        self.tower = nn.ModuleDict(
            {"parts": nn.ModuleList(Layer(causal=False) for _ in range(layers))}
        )
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stem(self.patches(pictures.transpose(1, 2).flatten(2)))
        for part in self.tower["parts"]:
            x = part(x)
        return self.head(x.mean(1))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _images(name: str, build: Callable[[int], nn.Module], **more: Any) -> Family:
    return Family(name, build, labelled_pictures, lambda b: b[1], lambda m, b: m(b[0]), **more)


OTHERS = [
    Family(
        "nanogpt",
        NanoGPT,
        lambda: next_tokens(-1),
        labels=lambda batch: batch[1],
        call=lambda model, batch: model(*batch),
        factor=3.0,
    ),
    Family(
        "nanochat",
        NanoChat,
        lambda: next_tokens(-1),
        labels=lambda batch: batch[1],
        call=lambda model, batch: model(batch[0]),
        factor=2.0,
        dropout=False,
    ),
    Family(
        "litgpt",
        LitGPT,
        bare,
        labels=lambda batch: batch[:, 1:],
        call=lambda model, batch: model(batch[:, :-1]),
        loss=lambda model, batch: cross_entropy(model(batch[:, :-1]), batch[:, 1:]),
        factor=3.0,
    ),
    Family(
        "torchtitan",
        Titan,
        lambda: ({"input": next_tokens(-100)[0]}, next_tokens(-100)[1]),
        labels=lambda batch: batch[1],
        call=lambda model, batch: model(batch[0]["input"]),
        loss=lambda model, batch: cross_entropy(model(batch[0]["input"]), batch[1]),
        factor=3.0,
    ),
    Family("cramming", lambda n: Crammed(n, False), masked_text, _labels, _plain, factor=3.0),
    Family(
        "cramming-sparse", lambda n: Crammed(n, True), masked_text, _labels, _plain, factor=3.0
    ),
    _images("torch-encoder", TorchEncoder, factor=2.0),
    _images("timm-vit", TimmVit, factor=3.0),
    _images("named", Named, factor=3.0, exit=lambda layer: f"tower.parts:{layer}"),
]

FAMILIES = {family.name: family for family in [*HUGGING_FACE, *OTHERS]}
