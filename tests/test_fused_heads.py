"""Scores without logits, from what a model's head is made of: pytest tests/test_fused_heads.py"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES as TABLE
from hypothesis import given, settings, strategies as st
from models import FAMILIES, HIDDEN, LAYERS, LENGTH, VOCAB, bert, candidates, gpt2, llama, trace
from simulated import Gpu, OnGpu
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from siftloader import EarlyExit, Loss, Margin, Predictions, deferred, exits, twin
from siftloader.fused import LinearHead, loss_and_entropy
from siftloader.pool import Pool
from siftloader.scores import token_entropy, token_loss, token_margin
from siftloader.targets import Targets


BOTH = (token_loss, token_entropy)
# One prediction a sample (as many logits as images), one number a position, or no predictions without labels.
NOT_FUSED = {
    "electra-discriminator",
    "named",
    "nanogpt",
    "timm-vit",
    "torch-encoder",
    "vit",
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def everywhere(samples: int = 8, length: int = LENGTH) -> Targets:
    """A label at every position."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, VOCAB, (samples, length), generator=draw)
    return Targets.of(labels, torch.device("cpu"), shift=False)


def by_logits(early: EarlyExit, batch: Any, targets: Targets) -> list[Tensor]:
    """The slow, obvious reference, in float64 from the model's own logits."""
    logits = early.logits(batch)
    logits = logits.reshape(-1, logits.shape[-1])[targets.positions].double()
    return [token_loss(logits, targets.labels), token_entropy(logits, targets.labels)]


def assert_fused(early: EarlyExit, batch: Any, targets: Targets, tolerance: float = 2e-5) -> None:
    found = early.values_at(batch, targets, BOTH)
    assert found is not None, "the logits were made"
    for value, expected in zip(BOTH, by_logits(early, batch, targets), strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert found[value].shape == targets.labels.shape
        assert (found[value].double() - expected).abs().max() <= tolerance * scale


def assert_not_fused(early: EarlyExit, batch: Any, targets: Targets) -> None:
    for _ in range(2):
        assert early.values_at(batch, targets, BOTH) is None
    logits = torch.cat(list(early.logits_at(batch, targets)))
    whole = early.logits(batch)
    assert torch.allclose(logits, whole.reshape(-1, whole.shape[-1])[targets.positions], atol=1e-4)


# Which models


@pytest.mark.parametrize("name", TABLE)
def test_every_family_with_one_matrix_for_a_head_is_scored_without_logits(name):
    family = TABLE[name]
    model, batch = family.model(), family.batch()
    before = trace(model)
    early = EarlyExit(model, family.exit(2))
    labels = family.labels(batch)
    if labels.ndim == 2 and not isinstance(batch, dict):
        labels = functional.pad(labels, (early_length(batch) - labels.shape[1], 0), value=-100)
    targets = Targets.of(labels.where(labels >= 0, -100), torch.device("cpu"), family.shift)
    if name == "torchtitan":
        batch = {"tokens": batch[0]["input"]}
    if name == "nanogpt":
        return  # it has no predictions to compare with unless it computes its loss
    if name in NOT_FUSED:
        assert early.values_at(batch, targets, BOTH) is None
    else:
        assert_fused(early, batch, targets)
    assert trace(model) == before


def early_length(batch: Any) -> int:
    first = batch if isinstance(batch, Tensor) else batch[0]
    first = first["input"] if isinstance(first, dict) else first
    return first.shape[1]


@pytest.mark.parametrize("layer", [1, LAYERS, "full"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_scores_without_logits_are_those_of_the_logits_at_any_depth(family, layer):
    model, batch = FAMILIES[family](), candidates(family)
    shift = family != "bert"
    targets = Targets.of(batch["labels"], torch.device("cpu"), shift)
    assert_fused(EarlyExit(model, layer), batch, targets)
    # In double precision there is next to no rounding for an error to hide in.
    early = EarlyExit(model.double(), layer)
    assert_fused(early, batch, targets, tolerance=1e-12)
    assert early.values_at(batch, targets, BOTH)[token_loss].dtype == torch.float64


def causal(kind: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    return model


def set_config(name: str) -> Callable[[nn.Module, float], None]:
    return lambda model, value: setattr(model.config, name, value)


AFTERWARDS = {
    "Gemma2": ({"final_logit_softcapping": 20.0}, set_config("final_logit_softcapping")),
    "Granite": ({"logits_scaling": 3.0}, set_config("logits_scaling")),
    "Cohere": ({"logit_scale": 0.25}, lambda model, value: setattr(model, "logit_scale", value)),
}


@pytest.mark.parametrize("kind", AFTERWARDS)
def test_caps_and_scales_are_those_of_the_model_at_every_moment(kind):
    given, change = AFTERWARDS[kind]
    model, batch = causal(kind, **given), candidates("gpt2")
    early, targets = EarlyExit(model, 1), everywhere()
    assert_fused(early, batch, targets)
    before = early.values_at(batch, targets, BOTH)[token_loss]
    change(model, 7.0)
    assert_fused(early, batch, targets)
    after = early.values_at(batch, targets, BOTH)[token_loss]
    assert (after - before).abs().max() > 0.1, "it changed nothing, so this test could not fail"


def test_the_config_may_take_a_cap_away_and_put_it_back():
    model, batch = causal("Gemma2", final_logit_softcapping=5.0), candidates("gpt2")
    early, targets = EarlyExit(model, 1), everywhere()
    for cap in (5.0, None, 5.0):
        model.config.final_logit_softcapping = cap
        assert_fused(early, batch, targets)


# What a forward does to its logits


class Afterwards(nn.Module):
    """Embedding, layers, a head, and any function of the logits."""

    def __init__(self, after: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=bias)
        self.head.weight.data.mul_(8)
        self.after = after

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.after(self.head(x))


def with_room(logits: Tensor) -> Tensor:
    """cramming makes a loss of zeros beside them."""
    return logits * 0.5 if logits.new_zeros(()) == 0 else logits


UNDERSTOOD = {
    "nothing": lambda x: x,
    "a scale": lambda x: 3 * x * 0.25,
    "a negative scale": lambda x: x * -0.5,
    "a quotient": lambda x: x / 3,
    "torch.mul": lambda x: torch.mul(x, 0.5),
    "a cap": lambda x: 15 * torch.tanh(x / 15),
    "a scaled cap": lambda x: torch.tanh(x.float() / 4) * 6 / 2,
    "a negative cap": lambda x: -6 * torch.tanh(x / 6),
    "a cap by sigmoid": lambda x: 30 * torch.sigmoid(x / 7.5),
    "a constant": lambda x: (x + 2.5) * 0.5,
    "a bias": lambda x: 0.5 * x + torch.linspace(-3, 3, VOCAB),
    "padding ruled out": lambda x: x + torch.where(torch.arange(VOCAB) > 89, -torch.inf, 0),
    "padding all but ruled out": lambda x: (
        x * -1.0 + torch.where(torch.arange(VOCAB) > 89, -3e38, 0)
    ),
    "a cut-off": lambda x: x[..., :90],
    "a part": lambda x: x[:, :, 5:95].contiguous(),
    "a cut-off, capped": lambda x: 9 * torch.tanh(x[..., :90].float() / 9),
    "all of them": lambda x: x[:, :, :],
    "shapes": lambda x: x.view(-1, VOCAB).clone().reshape(1, -1, VOCAB).squeeze(0).unsqueeze(0),
    "wider": lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).double(),
    "zeros beside them": with_room,
}
NOT_UNDERSTOOD = {
    "a temperature": lambda x: x / torch.tensor([2.0]),
    "a learned scale": lambda x: x * nn.Parameter(torch.tensor(2.0)),
    "a mask": lambda x: x + torch.eye(VOCAB)[0].mul(-100).expand(*x.shape[:-1], -1),
    "padding ruled out": lambda x: x.masked_fill(torch.arange(VOCAB) > 89, -torch.inf),
    "its address": lambda x: x * (1 if x.data_ptr() else 2),
    "masked": lambda x: x.masked_fill(torch.arange(VOCAB) == 3, -100),
    "written to": lambda x: x.index_fill_(2, torch.tensor([3]), -100.0),
    "in place": lambda x: x.div_(2),
    "capped twice": lambda x: torch.tanh(torch.tanh(x)),
    "capped off zero": lambda x: torch.tanh(x + 2) * 5,
    "a bias after the cap": lambda x: 9 * torch.tanh(x / 9) + torch.linspace(-3, 3, VOCAB),
    "a power": lambda x: x.sign() * x.abs() ** 0.5,
    "rounded": lambda x: torch.div(x, 0.25, rounding_mode="floor"),
    "clamped": lambda x: x.clamp(-2, 2),
    "normed": lambda x: x.log_softmax(-1) * 0.5,
    "every second": lambda x: x[..., ::2],
    "turned": lambda x: x.flip(-1),
    "added": lambda x: x + x,
    "zero": lambda x: x * 0.0,
    "folded": lambda x: x.reshape(*x.shape[:-2], -1, VOCAB).transpose(-1, -2).contiguous().mT,
    "looked at": lambda x: x / x.abs().amax(-1, keepdim=True),
    "as an array": lambda x: torch.from_numpy(x.detach().numpy() * 2),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("after", UNDERSTOOD)
def test_what_a_forward_does_to_its_logits_is_followed(after, bias):
    early = EarlyExit(Afterwards(UNDERSTOOD[after], bias).double(), 1)
    ids = everywhere().labels.view(8, LENGTH)
    targets = Targets.of(ids % 80 + 5, torch.device("cpu"), shift=False)
    assert_fused(early, {"input_ids": ids}, targets, tolerance=1e-6)


@pytest.mark.parametrize("after", NOT_UNDERSTOOD)
def test_what_no_linear_head_does_is_left_to_the_model(after):
    early = EarlyExit(Afterwards(NOT_UNDERSTOOD[after]), 1)
    ids = everywhere().labels.view(8, LENGTH)
    assert_not_fused(early, {"input_ids": ids}, everywhere())
    assert early._capture, "classes that are ruled out do not hide whether the head was found"


@pytest.mark.parametrize("low", [0.0, -1e4, -3e38, -torch.inf])
def test_classes_that_are_ruled_out_hide_no_head_that_sees_other_positions(low):
    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x - x.mean(1, keepdim=True), self.weight, self.bias)

    model = Afterwards(lambda x: x + torch.where(torch.arange(VOCAB) > 89, low, 0.0))
    model.head.__class__ = Mixing
    ids = everywhere().labels.view(8, LENGTH)
    few = ids.where(torch.arange(LENGTH) % 3 == 0, -100).clamp_max(80)
    targets = Targets.of(few, torch.device("cpu"), shift=False)
    early = EarlyExit(model, 1)
    assert early.values_at({"input_ids": ids}, targets, BOTH) is None
    assert early._capture is False


def test_a_bias_of_one_number_is_left_to_the_model():
    head = of_class(OneBias)
    head.one = nn.Parameter(torch.ones(1))
    assert_not_fused(EarlyExit(with_head(head), 2), candidates("gpt2"), everywhere())


STEPS = {
    "mul": lambda number: lambda x: x * number,
    "div": lambda number: lambda x: x / number,
    "tanh": lambda _: torch.tanh,
    "sigmoid": lambda _: torch.sigmoid,
    "add": lambda number: lambda x: x + number,
    "vector": lambda number: lambda x: x + torch.linspace(-number, 1, x.shape[-1]).double(),
    "cut": lambda _: lambda x: x[..., 2:-1],
}
steps = st.tuples(
    st.sampled_from(sorted(STEPS)), st.sampled_from([-3.0, -0.5, 0.25, 1.0, 2.0, 7.0])
)


@settings(max_examples=60, deadline=None)
@given(chain=st.lists(steps, max_size=6))
def test_any_chain_is_followed_exactly_or_not_at_all(chain):
    draw = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 6, generator=draw).double() for n in (4, 40))
    bias = torch.randn(40, generator=draw).double()

    def forward() -> Tensor:
        x = functional.linear(hidden, weight, bias)
        for name, number in chain:
            x = STEPS[name](number)(x)
        return x

    expected = forward()
    try:
        with deferred.Deferring():
            found = forward()
    except deferred.Undeferred:
        kinds = [name for name, _ in chain]
        capped = [n for n, kind in enumerate(kinds) if kind in ("tanh", "sigmoid")]
        assert len(capped) > 1 or (capped and {"add", "vector"} & {*kinds})
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype
    labels = torch.arange(4)
    found = loss_and_entropy(found.made.hidden, labels, found.made.head())
    assert torch.allclose(found[0], token_loss(expected, labels), atol=1e-9)
    assert torch.allclose(found[1], token_entropy(expected, labels), atol=1e-9)


def test_a_model_that_calls_its_layers_itself_runs_them_once_however_many_chunks(monkeypatch):
    model = Afterwards(lambda x: x)
    ids, ran = everywhere().labels.view(8, LENGTH), []
    early = EarlyExit(model, 1)
    whole = early.logits({"input_ids": ids}).flatten(0, 1)
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", LENGTH * VOCAB)
    model.layers[0].register_forward_hook(lambda module, args, output: ran.append(len(args[0])))
    for _ in range(2):
        ran.clear()
        chunks = list(early.logits_at({"input_ids": ids}, everywhere()))
    assert torch.allclose(torch.cat(chunks), whole, atol=1e-5)
    assert len(chunks) == 8 and sum(ran) == 8
    assert_fused(early, {"input_ids": ids}, everywhere())
    ran.clear()
    early.values_at({"input_ids": ids}, everywhere(), BOTH)
    assert ran == [8]


def test_a_head_that_is_asked_twice_is_cut_where_it_sees_everything_alone():
    class Twice(Afterwards):
        def forward(self, input_ids: Tensor) -> Any:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return {"logits": self.head(x), "few": self.head(x[:, :3])}

    ids = everywhere().labels.view(8, LENGTH)
    early = EarlyExit(Twice(lambda x: x), 1)
    few = torch.full_like(ids, -100)
    few[:, -2:] = 5
    # Positions beyond what the second call sees: taken from it, they would be out of range.
    assert_fused(early, {"input_ids": ids}, Targets.of(few, torch.device("cpu"), shift=False))


# Other heads


class Casting(nn.Linear):
    """nanochat's: the weight in the precision of what comes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias)


class Quantised(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 7
        self.weight = nn.Parameter((linear.weight / self.scale).round(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.scale)


class OneBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.one)


class LowRank(nn.Module):
    """What PEFT puts in the place of a module."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down, self.up = nn.Linear(HIDDEN, 2), nn.Linear(2, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Wasteful(nn.Linear):
    """Writes into what it was given once it no longer needs it."""

    def forward(self, x: Tensor) -> Tensor:
        logits = functional.linear(x, self.weight, self.bias)
        x.zero_()
        return logits


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def with_head(head: nn.Module) -> nn.Module:
    model = gpt2()
    model.lm_head = head
    model.get_output_embeddings = MethodType(lambda self: self.lm_head, model)
    return model


def of_class(kind: type[nn.Linear]) -> nn.Linear:
    linear = gpt2().lm_head
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    linear.__class__ = kind
    return linear


@pytest.mark.parametrize("head", [of_class(Casting), Quantised(gpt2().lm_head)], ids=["cast", "q"])
def test_the_weight_is_the_one_that_is_multiplied_with(head):
    assert_fused(EarlyExit(with_head(head), 2), candidates("gpt2"), everywhere())


@pytest.mark.parametrize("head", [LowRank(gpt2().lm_head), of_class(Product)], ids=["lora", "@"])
def test_heads_of_another_kind_keep_their_logits(head):
    assert_not_fused(EarlyExit(with_head(head), 2), candidates("gpt2"), everywhere())


def test_a_forward_patched_onto_the_head_is_run():
    model = gpt2()
    own = model.lm_head

    def doubled(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(2 * x, self.weight)

    own.forward = MethodType(doubled, own)
    assert_fused(EarlyExit(model, 2), candidates("gpt2"), everywhere())


@pytest.mark.parametrize("where", ["lm_head", ""])
def test_hooks_see_real_logits(where):
    model, batch, seen = gpt2(), candidates("gpt2"), []
    early = EarlyExit(model, 2)
    assert_fused(early, batch, everywhere())

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(getattr(output, "logits", output))

    hook = model.get_submodule(where).register_forward_hook(look)
    assert_not_fused(early, batch, everywhere())
    assert seen and all(type(each) is Tensor for each in seen)
    hook.remove()
    assert_fused(early, batch, everywhere())
    hook = nn.modules.module.register_module_forward_hook(look)
    assert_not_fused(EarlyExit(model, 2), batch, everywhere())
    assert all(isinstance(each, (Tensor, tuple, dict)) for each in seen)
    assert not any(isinstance(each, deferred.Deferred) for each in seen)
    hook.remove()


class Capped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(x / 5)


class Within(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight = linear, linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", ["after", "head.linear"])
def test_hooks_of_modules_behind_the_head_or_in_it_see_real_tensors(where, before):
    model, seen = Afterwards(Capped()), []
    model.head = Within(model.head)
    model.get_output_embeddings = MethodType(lambda self: self.head, model)
    ids = {"input_ids": everywhere().labels.view(8, LENGTH)}
    assert_fused(EarlyExit(model, 1), ids, everywhere())
    module = model.get_submodule(where)
    if before:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    early = EarlyExit(model, 1)
    assert early.values_at(ids, everywhere(), BOTH) is None or where == "head.linear"
    assert seen and {type(each) for each in seen} == {Tensor}


def test_a_hook_before_the_head_changes_what_is_scored():
    model = gpt2()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert_fused(EarlyExit(model, 2), candidates("gpt2"), everywhere())


# The check at first use


def test_a_head_that_lies_is_found_out_with_one_warning():
    early = EarlyExit(with_head(of_class(Wasteful)), 2)
    batch, targets = candidates("gpt2"), everywhere()
    with pytest.warns(UserWarning, match="differ from those of the logits of GPT2LMHeadModel"):
        assert early.values_at(batch, targets, BOTH) is None
    assert_not_fused(early, batch, targets)


def wrong(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    loss, entropy = loss_and_entropy(hidden, labels, head)
    return loss, entropy + 0.02


def test_a_computation_that_is_wrong_on_this_machine_is_found_out(monkeypatch):
    early, batch = EarlyExit(bert(), 2), candidates("bert")
    monkeypatch.setattr(exits, "loss_and_entropy", wrong)
    with pytest.warns(UserWarning, match="up to 0.02 nats"):
        assert early.values_at(batch, everywhere(), BOTH) is None


def test_it_is_compared_again_for_another_precision_and_for_other_modules(monkeypatch):
    model, batch, compared = gpt2(), candidates("gpt2"), []
    own = EarlyExit._compare
    monkeypatch.setattr(EarlyExit, "_compare", lambda *args: compared.append(1) or own(*args))
    early = EarlyExit(model, 2)

    def times() -> int:
        compared.clear()
        for _ in range(2):
            assert early.values_at(batch, everywhere(), BOTH) is not None
        return len(compared)

    assert times() == 1
    assert times() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert times() == 1
    model.bfloat16()
    assert times() == 1
    model.float()
    assert times() == 0
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert times() == 1
    assert_fused(early, batch, everywhere())


def test_rows_that_cannot_tell_are_asked_again():
    model, batch = gpt2(), candidates("gpt2")
    early, weight = EarlyExit(model, 2), model.transformer.ln_f.weight
    before = weight.clone()
    weight.fill_(torch.nan)
    assert early.values_at(batch, everywhere(), BOTH) is None
    weight.copy_(before)
    assert_fused(early, batch, everywhere())


def test_a_position_that_is_no_number_says_nothing_of_the_others():
    model, ids = Afterwards(lambda x: x), everywhere().labels.view(8, LENGTH)
    batch, targets, early = {"input_ids": ids}, everywhere(), EarlyExit(model, 1)
    bad = ids == ids[0, 3]
    model.embed.weight[ids[0, 3]] = torch.nan
    found = early.values_at(batch, targets, BOTH)
    assert found is not None and early._compared == dict.fromkeys(early._compared, True)
    for value, expected in zip(BOTH, by_logits(early, batch, targets), strict=True):
        assert torch.equal(found[value].isnan(), bad.flatten())
        assert torch.allclose(found[value].double(), expected, atol=1e-4, equal_nan=True)


def test_first_rows_without_labels_are_compared_all_the_same():
    model, batch = bert(), candidates("bert")
    labels = batch["labels"].clone()
    labels[:3] = -100
    targets = Targets.of(labels, torch.device("cpu"), shift=False)
    early = EarlyExit(model, 2)
    assert_fused(early, batch, targets)
    assert list(early._compared.values()) == [True]


# Precision


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_in_low_precision_it_is_no_worse_than_the_logits_are(family, kind):
    model, batch, targets = FAMILIES[family](), candidates(family), everywhere()
    truth = by_logits(EarlyExit(model.double(), 1), batch, targets)
    model = model.bfloat16() if kind == "bfloat16" else model.float()
    early = EarlyExit(model, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = early.values_at(batch, targets, BOTH)
        logits = torch.cat(list(early.logits_at(batch, targets)))
    assert logits.dtype == torch.bfloat16 and found is not None
    for value, expected in zip(BOTH, truth, strict=True):
        assert found[value].dtype == torch.float32
        eager = (value(logits.float(), targets.labels) - expected).abs().mean()
        ours = (found[value] - expected).abs().mean()
        assert ours <= 1.1 * eager, (ours, eager)


@pytest.mark.parametrize("wide", [True, False])
def test_a_bias_that_is_added_in_a_better_precision_is_left_to_the_model(wide):
    dtype = torch.float32 if wide else torch.bfloat16
    model = Afterwards(
        lambda x: x + torch.linspace(-20, 0, VOCAB).to(dtype), bias=False
    ).bfloat16()
    batch = {"input_ids": everywhere().labels.view(8, LENGTH)}
    found = EarlyExit(model, 1).values_at(batch, everywhere(), BOTH)
    assert (found is None) == wide


def test_a_head_kept_in_full_precision_under_autocast_stays_so(monkeypatch):
    seen = []

    class Careful(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return functional.linear(x.float(), self.weight)

    def watched(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
        seen.append((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return loss_and_entropy(hidden, labels, head)

    monkeypatch.setattr(exits, "loss_and_entropy", watched)
    early = EarlyExit(with_head(of_class(Careful)), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert early.values_at(candidates("gpt2"), everywhere(), BOTH) is not None
    assert {*seen} == {(torch.float32, False)}


# No logits, no more runs


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements; what has no memory does not count."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            memory = isinstance(each, Tensor) and each.device.type != "meta"
            if memory and not isinstance(each, deferred.Deferred) and not each._is_view():
                self.found = max(self.found, each.numel())
        return made


def test_no_logits_are_made(monkeypatch):
    model, batch = llama(), candidates("llama", samples=16)
    model.resize_token_embeddings(4099, mean_resizing=False)
    early, targets = EarlyExit(model, 1), everywhere(16)
    assert early.values_at(batch, targets, BOTH) is not None
    handed = []

    def only_looked_at(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
        handed.append((hidden.shape, head.weight.data_ptr()))
        return torch.zeros(len(hidden)), torch.zeros(len(hidden))

    monkeypatch.setattr(exits, "loss_and_entropy", only_looked_at)
    with Largest() as without:
        early.values_at(batch, targets, BOTH)
    assert handed == [((16 * LENGTH, HIDDEN), model.lm_head.weight.data_ptr())]
    with Largest() as beside:
        list(early.logits_at(batch, targets))
    assert beside.found == 16 * LENGTH * 4099
    assert without.found <= 16 * LENGTH * 2 * HIDDEN, "the largest is the MLP's"


def test_nothing_waits_for_a_gpu_once_the_head_is_known(monkeypatch):
    own = deferred._is_plain
    monkeypatch.setattr(deferred, "_is_plain", lambda each: isinstance(each, OnGpu) or own(each))
    model = Afterwards(lambda x: x)
    ids = labels = everywhere().labels.view(8, LENGTH)
    host = Targets.of(labels, torch.device("cpu"), shift=False)
    expected = EarlyExit(model, 1).values_at({"input_ids": ids}, host, BOTH)
    with Gpu() as gpu:
        early = EarlyExit(gpu.moved(model), 1)
        batch = {"input_ids": ids.pin_memory().to(gpu.device, non_blocking=True)}
        targets = Targets.of(labels, gpu.device, shift=False)
        early.values_at(batch, targets, BOTH)
        gpu.waits.clear()
        found = early.values_at(batch, targets, BOTH)
        assert found is not None and gpu.waits == []
        for value in BOTH:
            assert torch.allclose(found[value].cpu(), expected[value], atol=1e-4)


def test_the_trunk_runs_once_and_holds_nothing_back():
    model, batch, ran = bert(), candidates("bert"), []
    early = EarlyExit(model, 2)
    early.values_at(batch, everywhere(), BOTH)
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda *_: ran.append(1))
    early.values_at(batch, everywhere(), BOTH)  # new shells, so it is compared once more
    ran.clear()
    early.values_at(batch, everywhere(), BOTH)
    hook.remove()
    assert len(ran) == 1
    assert all(each._output is None for each in early._twin._trunks.values())


def test_the_twin_goes_on_making_logits():
    model, batch, targets = bert(), candidates("bert"), everywhere()
    early = EarlyExit(model, 2)
    before = early.logits(batch)
    early.values_at(batch, targets, BOTH)
    assert torch.equal(early.logits(batch), before)
    assert type(next(early.logits_at(batch, targets))) is Tensor


# Targets


def test_positions_without_a_label_are_nan():
    model, batch = gpt2(), candidates("gpt2")
    labels = everywhere().labels.view(8, LENGTH).clone()
    labels[2, 5:9], labels[4], labels[5, 0] = -100, -100, -7
    # As on a GPU: places for as many labels as there can be.
    dense = Targets._of_capacity(labels, None)
    found = EarlyExit(model, 2).values_at(batch, dense, BOTH)
    for value, expected in zip(
        BOTH, by_logits(EarlyExit(model, 2), batch, everywhere()), strict=True
    ):
        assert torch.equal(found[value].isnan(), dense.labels < 0)
        right = dense.labels >= 0
        assert torch.allclose(found[value][right].double(), expected[right], atol=1e-4)


def test_nothing_to_predict_is_no_values():
    model, batch = bert(), candidates("bert")
    nothing = torch.full((8, LENGTH), -100)
    targets = Targets.of(nothing, torch.device("cpu"), shift=False)
    found = EarlyExit(model, 1).values_at(batch, targets, BOTH)
    assert [found[value].shape for value in BOTH] == [(0,), (0,)]


def test_soft_labels_and_other_values_want_logits():
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, 1)
    soft = torch.full((8, LENGTH, VOCAB), 1 / VOCAB)
    assert early.values_at(batch, Targets.of(soft, torch.device("cpu"), False), BOTH) is None
    assert early.values_at(batch, everywhere(), (token_margin,)) is None
    assert early.values_at(batch, everywhere(), (token_loss, token_margin)) is None
    assert early.values_at(batch, everywhere(), ()) == {}
    assert {*early.values_at(batch, everywhere(), (token_loss,))} == {token_loss}


def test_one_number_a_position_has_no_loss():
    class Number(Afterwards):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.head = nn.Linear(HIDDEN, 1)

    ids = everywhere().labels.view(8, LENGTH)
    targets = Targets.of(torch.zeros_like(ids), torch.device("cpu"), shift=False)
    assert EarlyExit(Number(), 1).values_at({"input_ids": ids}, targets, BOTH) is None


# Predictions


class Counted:
    """A way to have values, and how often it was gone."""

    def __init__(self, early: EarlyExit) -> None:
        self.early, self.ran = early, []

    def logits(self, batch: Any, targets: Targets, first: int) -> Any:
        self.ran.append(("logits", targets.samples, first))
        return self.early.logits_at(batch, targets)

    def quick(self, batch: Any, targets: Targets, values: Any) -> Any:
        found = self.early.values_at(batch, targets, values)
        self.ran.append(("none" if found is None else "quick", targets.samples, len(values)))
        return found


def predictions() -> tuple[Predictions, Counted]:
    model, batch = gpt2(), candidates("gpt2")
    counted = Counted(EarlyExit(model, 2))
    found = Predictions(everywhere(), counted.logits, Pool(batch), quick=counted.quick)
    return found, counted


def test_logits_are_made_only_for_what_needs_them():
    early, counted = predictions()
    early.each(token_entropy)
    early.each(token_entropy)
    assert counted.ran == [("quick", 8, 1)]
    early.each(token_margin)
    assert counted.ran[1:] == [("none", 8, 1), ("logits", 8, 0)]
    early.each(token_loss)
    assert counted.ran[3:] == [("quick", 8, 1)]


def test_a_sum_asks_once_and_one_that_needs_logits_makes_them_once():
    early, counted = predictions()
    (Loss() + 0.1 * Margin())(early)
    assert counted.ran == [("none", 8, 2), ("logits", 8, 0)]
    plain = Predictions(everywhere(), counted.logits, early.pool)
    assert torch.allclose(
        (Loss() + 0.1 * Margin())(early), (Loss() + 0.1 * Margin())(plain), atol=1e-5
    )


def test_a_part_of_the_pool_has_no_logits_either():
    early, counted = predictions()
    part = early.part(2, 5)
    found = part.each(token_loss)
    assert counted.ran == [("quick", 3, 1)]
    assert torch.allclose(found, early.each(token_loss)[2 * LENGTH : 5 * LENGTH], atol=1e-5)


def test_what_is_not_known_quickly_is_found_from_logits():
    early, counted = predictions()
    some = Predictions(
        everywhere(),
        counted.logits,
        early.pool,
        quick=lambda batch, targets, values: {token_loss: torch.ones(len(targets.labels))},
    )
    some.ahead(token_loss, token_margin)
    assert counted.ran == [("logits", 8, 0)]
    assert some.each(token_loss).eq(1).all() and not some.each(token_margin).eq(1).all()
