"""Early exit: pytest tests/test_exits.py"""

from __future__ import annotations

import warnings
from types import MethodType

import pytest
import torch
import transformers
from models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    VOCAB,
    Block,
    Classifier,
    bert,
    candidates,
    classifier,
    gpt2,
    trace,
    truncated,
)
from torch import Tensor, nn

from siftloader import EarlyExit, ScoringError, Sifter, twin
from siftloader.stack import find_stack
from siftloader.targets import Targets


EVERYWHERE = Targets.of(torch.zeros(8, 24, dtype=torch.long), torch.device("cpu"), shift=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_model_bit_for_bit(family):
    model, batch = FAMILIES[family](), candidates(family)
    early = EarlyExit(model, layer=LAYERS).logits(batch)
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        output = model(**inputs)
    assert torch.equal(early, getattr(output, "logits", output))


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_an_independently_truncated_model(family, layer):
    model, batch = FAMILIES[family]().double(), candidates(family)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    early = EarlyExit(model, layer=layer).logits(inputs | {"labels": batch["labels"]})
    found = {}
    for depth in (layer, layer + 1):
        with torch.no_grad():
            output = truncated(family, model, depth)(**inputs)
        found[depth] = (early - getattr(output, "logits", output)).abs().max().item()
    assert found[layer] < 1e-10
    assert found[layer + 1] > 1e-3, "depths must disagree, or this test could not fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_leaves_no_trace(family):
    model, batch = FAMILIES[family](), candidates(family)
    output = model(**batch) if family != "classifier" else None
    loss = output.loss if output is not None else model(batch["x"]).sum()
    loss.backward()
    model.blocks[1].eval() if family == "classifier" else None  # mixed modes stay mixed
    before, kept = trace(model), {name: value.clone() for name, value in batch.items()}
    for criterion in ("loss", "entropy"):
        for layer in (1, LAYERS):
            Sifter(model, exit_layer=layer, criterion=criterion)(batch)
    assert trace(model) == before
    assert all(torch.equal(batch[name], kept[name]) for name in batch)


def test_weights_are_live():
    model, batch = bert(), candidates("bert")
    early = EarlyExit(model, layer=2)
    before = early.logits(batch)

    def changed_as_the_model() -> Tensor:
        now = early.logits(batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            expected = truncated("bert", model, 2)(**inputs).logits
        assert torch.allclose(
            now.double(), expected, atol=0.05 if now.dtype == torch.bfloat16 else 1e-4
        )
        return now.double()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    stepped = changed_as_the_model()
    assert (stepped - before).abs().max() > 1e-3
    other = {name: value + 0.01 for name, value in bert().state_dict().items()}
    model.load_state_dict(other)
    assert (changed_as_the_model() - stepped).abs().max() > 1e-3
    model.load_state_dict({k: v * 1.01 for k, v in other.items()}, assign=True)
    model.tie_weights()
    assigned = changed_as_the_model()
    model.to(torch.float64)
    assert early.logits(batch).dtype == torch.float64
    assert torch.allclose(changed_as_the_model(), assigned, atol=1e-4)


def test_a_replaced_layer_is_seen():
    model, batch = classifier(), candidates("classifier")
    early = EarlyExit(model, layer=1)
    before = early.logits(batch)
    model.blocks[0] = Block(HIDDEN)
    assert not torch.equal(early.logits(batch), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_scored_by_its_live_weights():
    model, batch = bert(), candidates("bert")
    compiled = torch.compile(model, backend="eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    compiled(**inputs)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    expected = EarlyExit(model, layer=1).logits(batch)
    assert torch.equal(EarlyExit(compiled, layer=1).logits(batch), expected)
    compiled(**inputs)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "scoring caused a recompile"
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_compiled_in_place_are_scored_by_their_twins():
    model, batch = bert(), candidates("bert")
    expected = EarlyExit(model, layer=2).logits(batch)
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager")
    model.compile(backend="eager")
    assert torch.equal(EarlyExit(model, layer=2).logits(batch), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_is_built(family):
    seen = []

    class Watch:
        def __call__(self, early):
            values = early.each(lambda logits, labels: seen.append(logits) or logits[:, 0])
            return early.reduce(values)

    Sifter(FAMILIES[family](), criterion=Watch()).score(candidates(family))
    assert seen and not any(logits.requires_grad for logits in seen)


def test_the_head_runs_at_the_labelled_positions_only():
    model, batch = bert(), candidates("bert")
    seen = []
    sifter = Sifter(model, exit_layer=1)
    hook = model.cls.predictions.transform.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    sifter.score(batch)  # the first call also compares with the whole head
    seen.clear()
    sifter.score(batch)
    hook.remove()
    labelled = int((batch["labels"] != -100).sum())
    assert seen == [torch.Size([1, labelled, HIDDEN])]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "classifier"])
def test_chunks_change_nothing_and_bound_the_logits(family, monkeypatch):
    model, batch = FAMILIES[family](), candidates(family)
    whole = {c: Sifter(model, exit_layer=2, criterion=c).score(batch) for c in ("loss", "entropy")}
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 7 * VOCAB)
    sizes = []

    class Watch:
        def __call__(self, early):
            early.each(lambda logits, labels: sizes.append(logits.numel()) or labels.float())
            return torch.zeros(early.samples)

    for criterion, expected in whole.items():
        found = Sifter(model, exit_layer=2, criterion=criterion).score(batch)
        assert torch.allclose(found, expected, atol=1e-5)
    trunk = []
    stack = model.get_submodule(find_stack(model))
    hook = stack[0].register_forward_hook(lambda *_: trunk.append(1))
    sifter = Sifter(model, exit_layer=2, criterion=Watch())
    sifter.score(batch)
    trunk.clear(), sizes.clear()
    sifter.score(batch)
    hook.remove()
    if family != "classifier":
        assert len(sizes) > 3 and max(sizes) <= 7 * VOCAB
        assert len(trunk) == 1, "the trunk runs once, whatever the number of chunks"


class OddHead(nn.Module):
    """A head that mixes positions, so it must not be run on single ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden - hidden.mean(1, keepdim=True))


def test_a_head_that_mixes_positions_is_found_out():
    model, batch = gpt2(), candidates("gpt2")
    model.lm_head = OddHead(model.lm_head)
    model.get_output_embeddings = MethodType(lambda self: self.lm_head.linear, model)
    model.transformer.wte.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    # The inner linear may run on single positions, the head around it may not.
    sifter = Sifter(model, exit_layer=2)
    found = sifter.score(batch)
    logits = EarlyExit(model, layer=2).logits(batch)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    wanted = batch["labels"][:, 1:] != -100
    expected = (expected * wanted).sum(1) / wanted.sum(1)
    rows = torch.arange(8) != 3
    assert torch.allclose(found[rows], expected[rows], atol=1e-4)


def test_a_forward_bound_to_the_live_object_trips():
    model, batch = bert(), candidates("bert")
    own = type(model).forward
    model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)
    with pytest.raises(ScoringError, match="beyond the exit"):
        EarlyExit(model, layer=1).logits(batch)
    assert not model.bert.encoder.layer[1]._forward_pre_hooks


def test_a_method_patched_onto_the_instance_is_rebound():
    model, batch = bert(), candidates("bert")
    expected = EarlyExit(model, layer=1).logits(batch)
    model.forward = MethodType(type(model).forward, model)
    assert torch.equal(EarlyExit(model, layer=1).logits(batch), expected)


def test_a_buffer_and_a_mode_dependent_layer_are_scored_as_in_eval():
    class WithNorm(Classifier):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x):
            return super().forward(self.bn(x))

    model = WithNorm().train()
    before = trace(model)
    EarlyExit(model, layer=1).logits({"x": torch.randn(8, 8) * 5 + 3})
    torch.manual_seed(0)
    assert trace(model) == before or model.bn.num_batches_tracked == 0
    assert model.bn.num_batches_tracked == 0 and model.bn.running_mean.abs().max() == 0


def test_one_layer_in_all_places_still_counts():
    model = Classifier()
    model.blocks = nn.ModuleList([model.blocks[0]] * LAYERS)
    early = EarlyExit(model.eval(), layer=LAYERS)
    batch = candidates("classifier")
    assert early.layers == LAYERS
    with torch.no_grad():
        assert torch.equal(early.logits(batch), model(batch["x"]))
    assert not torch.equal(EarlyExit(model, layer=1).logits(batch), early.logits(batch))


def test_a_stack_may_be_named():
    model, batch = bert(), candidates("bert")
    by_name = EarlyExit(model, layer="bert.encoder.layer:2")
    assert torch.equal(by_name.logits(batch), EarlyExit(model, layer=2).logits(batch))
    assert by_name.layers == LAYERS


def test_full_depth_needs_no_stack():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    x = torch.randn(6, 8)
    with torch.no_grad():
        assert torch.equal(EarlyExit(model, layer="full").logits((x, torch.zeros(6))), model(x))


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(Block(8), Block(8))
        self.stage2 = nn.Sequential(Block(8), Block(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.stage2(self.stage1(x))


class Busy(Classifier):
    """Everything a forward may do to its module, and modules that are not registered where they run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm1d(8)
        self.before = [self.norm_in, nn.Identity()]
        self.temperature = 1.0
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + 1
        for module in self.before:
            x = module(x)
        return super().forward(x + self.offset) / self.temperature


def test_buffers_a_forward_writes_to_and_modules_in_lists_are_left_alone():
    model = Busy().train()
    batch = candidates("classifier")
    early = EarlyExit(model, layer=1)
    for _ in range(3):
        early.logits(batch)
    assert (model.calls, model.last, model.norm_in.num_batches_tracked) == (0, 0, 0)
    assert model.norm_in.running_mean.abs().max() == 0


def test_plain_attributes_and_buffers_are_live():
    model, batch = Busy().eval(), candidates("classifier")
    early = EarlyExit(model, layer=LAYERS)
    with torch.no_grad():
        assert torch.equal(early.logits(batch), model(batch["x"]))
        model.temperature = 5.0
        assert torch.equal(early.logits(batch), model(batch["x"]))
        model.offset.fill_(3.0)
        assert torch.equal(early.logits(batch), model(batch["x"]))
        model.offset = torch.ones(()) * 7
        assert torch.equal(early.logits(batch), model(batch["x"]))
        model.norm_in.running_mean += 1
        assert torch.equal(early.logits(batch), model(batch["x"]))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_that_returns_all_hidden_states_goes_on_doing_so(family):
    model, batch = FAMILIES[family](), candidates(family)
    model.config.output_hidden_states = True
    before = trace(model)
    for _ in range(3):
        Sifter(model, exit_layer=1).score(batch)
    assert trace(model) == before
    assert len(model(**batch).hidden_states) == LAYERS + 1


def test_dropped_layers_held_in_a_list_trip_too():
    class Elsewhere(Classifier):
        def __init__(self):
            super().__init__()
            self.order = list(self.blocks)

        def forward(self, x):
            x = self.embed(x)
            for block in self.order:
                x = block(x)
            return self.head(self.norm(x))

    with pytest.raises(ScoringError, match="beyond the exit"):
        EarlyExit(Elsewhere(), layer=1).logits(candidates("classifier"))
    assert EarlyExit(Elsewhere(), layer=LAYERS).logits(candidates("classifier")).shape == (8, 10)


def test_a_trunk_that_is_reached_past_its_wrapper_still_runs_once():
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    model, batch = transformers.OPTForCausalLM(config), candidates("gpt2")
    early = EarlyExit(model, layer=2)
    logits = torch.cat(list(early.logits_at(batch, EVERYWHERE)))
    assert early._capture is True
    assert torch.allclose(logits.view(8, 24, VOCAB), early.logits(batch), atol=1e-5)


def test_a_trunk_that_runs_twice_in_a_forward_is_not_replayed(monkeypatch):
    class Twice(type(gpt2())):
        def forward(self, input_ids):
            early = self.transformer(input_ids.flip(1)).last_hidden_state
            return self.lm_head(self.transformer(input_ids).last_hidden_state - 0.5 * early)

    model, batch = gpt2(), candidates("gpt2")
    model.__class__ = Twice
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 7 * VOCAB)
    early = EarlyExit(model, layer=2)
    logits = torch.cat(list(early.logits_at(batch, EVERYWHERE)))
    assert torch.allclose(logits.view(8, 24, VOCAB), early.logits(batch), atol=1e-4)


def test_a_first_batch_without_labels_decides_nothing():
    model, batch = gpt2(), candidates("gpt2")
    sifter = Sifter(model)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert torch.equal(sifter.score(empty), torch.full((8,), -torch.inf))
    sifter.score(batch)
    assert sifter.scorer._early._capture is True


def test_a_first_batch_of_nans_decides_nothing():
    model, batch = gpt2(), candidates("gpt2")
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    sifter = Sifter(model)
    weight.data.fill_(torch.nan)
    assert not sifter.score(batch).isfinite().any()
    weight.data.copy_(kept)
    sifter.score(batch)
    assert sifter.scorer._early._capture is True


def test_hidden_positions_that_are_no_label_positions_are_refused():
    class Prompted(nn.Module):  # three embeddings stand before the text
        def __init__(self):
            super().__init__()
            self.inner = bert()
            self.config = self.inner.config
            self.prompt = nn.Parameter(torch.randn(1, 3, HIDDEN))

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, input_ids):
            text = self.inner.get_input_embeddings()(input_ids)
            prompt = self.prompt.expand(len(text), -1, -1)
            return self.inner(inputs_embeds=torch.cat([prompt, text], 1))

    batch = candidates("bert")
    del batch["attention_mask"]
    with pytest.raises(ScoringError, match="one prediction per label"):
        Sifter(Prompted()).score(batch)


def test_a_forward_that_predicts_the_last_position_is_told_what_to_do():
    class LastOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = gpt2()

        def forward(self, idx, targets=None):
            logits = self.inner(idx).logits
            return logits if targets is not None else logits[:, -1:]

    x = candidates("gpt2")["input_ids"]
    with pytest.raises(ScoringError, match="predicts only the last position"):
        Sifter(LastOnly(), shift_labels=False).score((x[:, :-1], x[:, 1:]))
    named = {"idx": x[:, :-1], "targets": x[:, 1:]}
    assert Sifter(LastOnly(), labels="targets", shift_labels=False).score(named).isfinite().all()


def plain_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 10))


REFUSED = [
    ("a sequence", plain_layers, 1, ScoringError, "no stack of equal layers"),
    ("no stack", lambda: nn.Linear(8, 10), 1, ScoringError, "no stack of equal layers"),
    ("stages", TwoStacks, 1, ScoringError, "several stacks of Block"),
    ("too deep", classifier, LAYERS + 1, ScoringError, r"1\.\.4"),
    ("zero", classifier, 0, ScoringError, r"1\.\.4"),
    ("no such path", classifier, "layers:1", ScoringError, "no module 'layers'"),
    ("no number", classifier, "blocks", ValueError, "path.to.stack:j"),
    ("a float", classifier, 1.5, TypeError, "int or a str"),
    ("no module", lambda: "bert", 1, TypeError, "torch.nn.Module"),
]


@pytest.mark.parametrize(("_name", "make", "layer", "error", "text"), REFUSED)
def test_what_cannot_be_cut_is_refused_at_construction(_name, make, layer, error, text):
    with pytest.raises(error, match=text):
        EarlyExit(make(), layer=layer)


def test_named_fields_of_the_forward_are_passed_and_no_others():
    model, batch = bert(), candidates("bert")
    expected = EarlyExit(model, layer=1).logits(batch)
    extra = {**batch, "id": torch.arange(8), "text": ["x"] * 8}
    assert torch.equal(EarlyExit(model, layer=1).logits(extra), expected)
    with pytest.raises(ScoringError, match="none of the batch's fields"):
        EarlyExit(model, layer=1).logits({"tokens": batch["input_ids"]})


def test_a_forward_of_any_keywords_gets_all_fields_but_the_labels():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, labels=None, **inputs):
            assert labels is None
            return self.inner(**inputs)

    model, batch = bert(), candidates("bert")
    expected = EarlyExit(model, layer=1).logits(batch)
    assert torch.equal(EarlyExit(Wrapper(model), layer=1).logits(batch), expected)


def test_a_model_without_logits_is_refused():
    class Silent(Classifier):
        def forward(self, x):
            super().forward(x)
            return {"loss": x.sum()}

    with pytest.raises(ScoringError, match="without logits"):
        EarlyExit(Silent(), layer=1).logits({"x": torch.randn(4, 8)})


def test_nothing_warns_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sifter(bert(), exit_layer=1).score(candidates("bert"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_full_depth_runs_the_head_at_the_labels_only(family):
    model, batch = FAMILIES[family](), candidates(family)
    rows = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    full = Sifter(model, exit_layer="full")
    expected = Sifter(model, exit_layer=LAYERS).score(batch)
    assert torch.equal(full.score(batch), expected)
    rows.clear()
    full.score(batch)
    labels = batch["labels"] if family == "bert" else batch["labels"][:, 1:]
    assert sum(rows) == (labels != -100).sum()
