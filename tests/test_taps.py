"""Losses heard in the model or in the loop: pytest tests/test_taps.py"""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, VOCAB, Block, scaled
from torch import Tensor, nn
from torch.nn import functional as F

from siftloader import EarlyExit, Entropy, Rarity, ScoringError, Sifter, Stride
from siftloader.taps import Reading, listen


P, T, WIDTH = 6, 12, 16


class Trunk(nn.Module):
    """A language model without attention, so that any truncation is easy to write down."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Embedding(T, WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class LastOnly(Trunk):
    """nanoGPT's way: with targets logits and loss, without them the last position's logits."""

    def forward(self, idx: Tensor, targets: Tensor | None = None):
        x = self.hidden(idx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-1)
        return logits, loss


class LossAlone(Trunk):
    """nanochat's way: logits or the loss, never both."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean"):
        logits = 15 * torch.tanh(self.head(self.hidden(idx)) / 15)
        if targets is None:
            return logits
        flat = logits.view(-1, VOCAB), targets.view(-1)
        return F.cross_entropy(*flat, ignore_index=-1, reduction=loss_reduction)


class OnlyLoss(Trunk):
    """A model that says nothing without its targets, and shifts them itself."""

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        if labels is None:
            return {"loss": torch.zeros(())}
        logits = self.head(self.hidden(ids))[:, :-1]
        return {"loss": F.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))}


class Parts(OnlyLoss):
    """Its loss in slices of positions (parts of every sample)."""

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        if labels is None:
            return {"loss": torch.zeros(())}
        logits, wanted = self.head(self.hidden(ids))[:, :-1], labels[:, 1:]
        slices = zip(logits.split(5, 1), wanted.split(5, 1), strict=True)
        losses = [F.cross_entropy(a.reshape(-1, VOCAB), b.reshape(-1)) for a, b in slices]
        return {"loss": torch.stack(losses).mean()}


class Chunks(OnlyLoss):
    """Its loss in chunks of tokens, as litgpt's: samples one after the other."""

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        if labels is None:
            return {"loss": torch.zeros(())}
        logits, wanted = self.head(self.hidden(ids))[:, :-1], labels[:, 1:]
        chunks = zip(logits.reshape(-1, VOCAB).split(8), wanted.reshape(-1).split(8), strict=True)
        return {"loss": sum(F.cross_entropy(a, b, reduction="sum") for a, b in chunks)}


class Sparse(OnlyLoss):
    """Its loss at the labelled positions only: samples contribute different numbers."""

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        if labels is None:
            return {"loss": torch.zeros(())}
        logits, wanted = self.head(self.hidden(ids))[:, :-1], labels[:, 1:]
        real = wanted != -100
        return {"loss": F.cross_entropy(logits[real], wanted[real])}


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (P, T + 1), generator=torch.Generator().manual_seed(seed))


def make(kind: type[Trunk]) -> Trunk:
    return scaled(kind(), 3.0).train()


def expected(model: Trunk, ids: Tensor, labels: Tensor, layer: int, criterion: str, cap=None):
    """[P] float64, by a truncated copy and plain arithmetic."""
    copied = Trunk(layer)
    copied.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        logits = copied.double().eval()(ids)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_p = logits.log_softmax(-1)
    scores = []
    for row, wanted in zip(log_p, labels, strict=True):
        at = [t for t in range(len(wanted)) if wanted[t] >= 0]
        loss = [-row[t, wanted[t]] for t in at]
        entropy = [-(row[t].exp() * row[t]).sum() for t in at]
        scores.append(torch.stack(loss if criterion == "loss" else entropy).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
@pytest.mark.parametrize("layer", [1, 2, LAYERS])
@pytest.mark.parametrize("kind", [LastOnly, LossAlone])
def test_pairs_of_inputs_and_targets_are_scored_by_the_models_own_loss(kind, layer, criterion):
    model, rows = make(kind), tokens()
    x, y = rows[:, :-1], rows[:, 1:].clone()
    y[:, :3] = -1  # the mark these models ignore
    found = Sifter(model, exit_layer=layer, criterion=criterion).score((x, y))
    cap = 15 if kind is LossAlone else None
    wanted = expected(model, x, y, layer, criterion, cap)
    assert torch.allclose(found.double(), wanted, atol=2e-5)
    other = expected(model, x, y, layer % LAYERS + 1, criterion, cap)
    assert (other - wanted).abs().max() > 100 * 2e-5, "depths must disagree"


@pytest.mark.parametrize("kind", [OnlyLoss, Parts, Chunks, Sparse])
@pytest.mark.parametrize("criterion", ["loss", "entropy"])
def test_a_model_that_only_gives_its_loss_is_listened_to(kind, criterion):
    model, ids = make(kind), tokens()[:, :-1]
    labels = ids.clone()
    labels[:, 3:6] = -100
    labels[2, :9] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    sifter = Sifter(model, exit_layer=2, criterion=criterion)
    told = {Sparse: "one at a time", Parts: "is not the mean"}  # of slices of unequal lengths
    if kind in told:
        with pytest.warns(UserWarning, match=told[kind]):
            found = sifter.score({"ids": ids, "labels": labels})
    else:
        found = sifter.score({"ids": ids, "labels": labels})
    wanted = expected(model, ids, shifted, 2, criterion)
    assert torch.allclose(found.double(), wanted, atol=2e-5)
    again = sifter.score({"ids": ids.flip(0), "labels": labels.flip(0)})
    assert torch.allclose(again.flip(0), found, atol=1e-6)


def test_what_cannot_be_grouped_would_be_scored_wrongly():
    # Why samples are compared one by one: a plausible grouping of a chunked loss mixes them up.
    model, ids = make(Chunks), tokens()[:, :-1]
    call = lambda batch: model(batch["ids"], batch["labels"])  # noqa: E731
    batch = {"ids": ids, "labels": ids}
    with torch.no_grad():
        model.eval()
        right = Reading.of(call, batch, P)
        wrong = Reading("whole" if right.order != "whole" else "parts", right.width, right.more)
        assert right.order == "whole"  # 2 x 11 positions in chunks of 8
        slices = make(Parts).eval()
        parts = Reading.of(lambda b: slices(b["ids"], b["labels"]), batch, P)
        assert parts.order == "parts"
        mixed = next(
            Reading("whole", 1).samples(lambda b: slices(b["ids"], b["labels"]), batch, P)
        )
        truth = next(parts.samples(lambda b: slices(b["ids"], b["labels"]), batch, P))
    assert wrong.order == "parts" and not torch.equal(mixed.labels, truth.labels)


def test_the_shift_is_heard_where_nothing_tells_it():
    # Labels equal to the inputs and an unknown class: refused when only the logits are there, ...
    ids = tokens()[:, :-1]
    with pytest.raises(ScoringError, match="shift_labels=True"):
        Sifter(make(Trunk)).score({"ids": ids, "labels": ids})

    class Shifts(Trunk):
        def forward(self, ids, labels=None):
            logits = self.head(self.hidden(ids))
            if labels is None:
                return logits
            return logits, F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])

    class Stays(Trunk):
        def forward(self, ids, labels=None):
            logits = self.head(self.hidden(ids))
            if labels is None:
                return logits
            return logits, F.cross_entropy(logits.transpose(1, 2), labels)

    # ... and scored as the model's own loss reads them where it has one.
    later = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for kind, labels in ((Shifts, later), (Stays, ids)):
        model = make(kind)
        found = Sifter(model, exit_layer=2).score({"ids": ids, "labels": ids})
        assert torch.allclose(found.double(), expected(model, ids, labels, 2, "loss"), atol=2e-5)


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
def test_two_lines_of_the_loop_are_enough(criterion):
    # litgpt's and torchtitan's way: one tensor [P, T + 1], the loss outside, a mean over everything.
    model, batch = make(Trunk), tokens()

    def loss_of(model, batch):
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.reshape(-1, VOCAB), batch[:, 1:].reshape(-1))

    sifter = Sifter(model, exit_layer=2, criterion=criterion, score_fn=loss_of)
    found = sifter.score(batch)
    wanted = expected(model, batch[:, :-1], batch[:, 1:], 2, criterion)
    assert torch.allclose(found.double(), wanted, atol=2e-5)
    kept = sifter(batch)
    assert torch.equal(kept, batch[found.argsort(descending=True)[: P // 2].sort().values])


def test_a_loss_outside_may_be_cut_into_chunks_of_rows(monkeypatch):
    from siftloader import twin

    model, batch = make(Trunk), tokens()
    sizes = []

    def loss_of(model, batch):
        sizes.append(len(batch))
        return F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    whole = Sifter(model, score_fn=loss_of).score(batch)
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 2 * T * VOCAB)
    sizes.clear()
    sifter = Sifter(model, score_fn=loss_of)
    assert torch.allclose(sifter.score(batch), whole, atol=1e-6)
    sizes.clear()
    sifter.score(batch)
    assert sizes == [2, 2, 2]


def test_positions_and_other_criteria_apply_to_heard_losses():
    model, batch = make(Trunk), tokens()

    def loss_of(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    found = Sifter(model, exit_layer=2, score_fn=loss_of, positions=Stride(4)).score(batch)
    labels = torch.full_like(batch[:, 1:], -1)
    labels[:, ::4] = batch[:, 1::4]
    assert torch.allclose(
        found.double(), expected(model, batch[:, :-1], labels, 2, "loss"), atol=2e-5
    )
    counts = torch.arange(VOCAB).numpy() ** 2
    assert Sifter(model, score_fn=loss_of, criterion=Entropy()).score(batch).isfinite().all()
    both = Sifter(model, score_fn=loss_of, criterion=Entropy() + 0.5 * Rarity(counts))
    assert both.score(batch).isfinite().all()


def test_one_number_for_all_candidates_is_refused():
    model, batch = make(Trunk), tokens()
    with pytest.raises(ScoringError, match="one number for all candidates"):
        Sifter(model, score_fn=lambda early, b: early(b[:, :-1]).square().mean()).score(batch)


def test_listening_changes_nothing():
    logits, labels = torch.randn(P, VOCAB, T), torch.randint(0, VOCAB, (P, T))
    labels[0, :5] = -7
    loss, taps = listen(lambda: F.cross_entropy(logits, labels, ignore_index=-7))
    assert torch.equal(loss, F.cross_entropy(logits, labels, ignore_index=-7))
    (tap,) = taps
    assert torch.equal(tap.logits.view(P, T, VOCAB), logits.movedim(1, -1))
    assert torch.equal(tap.labels.view(P, T), labels.masked_fill(labels == -7, -100))
    assert tap.ignored == -7

    # Another task's loss (another number of classes) is not mixed in; log-probabilities count too.
    def two():
        return F.nll_loss(logits.log_softmax(1), labels.clamp_min(0)), F.cross_entropy(
            torch.randn(P, 2), torch.zeros(P, dtype=int)
        )

    _, taps = listen(two)
    assert len(taps) == 1 and torch.allclose(taps[0].logits.exp().sum(-1), torch.ones(P * T))


def test_a_batch_without_a_place_for_labels_in_the_model_says_what_was_wrong():
    class Narrow(Trunk):
        def forward(self, ids, mask=None):
            return super().forward(ids)[:, -1:]

    batch = (tokens()[:, :-1], tokens()[:, 1:])
    with pytest.raises(ScoringError, match="one prediction per label"):
        Sifter(make(Narrow)).score(batch)


def test_labels_beyond_the_classes_are_named():
    model, rows = make(Trunk), tokens()
    with pytest.raises(
        ScoringError, match=rf"found label {VOCAB + 3}, the model predicts {VOCAB}"
    ):
        Sifter(model).score((rows[:, :-1], rows[:, 1:].clamp_max(2) + VOCAB + 1))


def test_early_exit_gives_what_the_loop_would_see():
    model, rows = make(LastOnly), tokens()
    early = EarlyExit(model, layer=1)
    logits, loss = early(rows[:, :-1], rows[:, 1:].contiguous())
    assert logits.shape == (P, T, VOCAB) and loss.ndim == 0


@pytest.mark.parametrize("layer", [1, 2])
def test_an_encoder_decoder_makes_its_own_decoder_inputs(layer):
    # As Hugging Face's translation examples call it: nothing but inputs and labels.
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = scaled(transformers.T5ForConditionalGeneration(config), 2.0).train()
    ids, labels = tokens()[:, :T], tokens(1)[:, :8].clamp_min(1)
    labels[:, 6:] = -100
    given = {"input_ids": ids, "labels": labels}
    explicit = given | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    found = Sifter(model, exit_layer=layer).score(given)
    assert torch.equal(found, Sifter(model, exit_layer=layer).score(explicit))
    logits = EarlyExit(model, layer=layer).logits(explicit)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(found, losses.sum(1) / 6, atol=1e-5)


def test_a_forward_that_cannot_do_without_labels_is_given_them():
    class Needs(Trunk):
        def forward(self, ids, labels):
            return F.cross_entropy(self.head(self.hidden(ids)).transpose(1, 2), labels)

    model, rows = make(Needs), tokens()
    found = Sifter(model, exit_layer=2).score({"ids": rows[:, :-1], "labels": rows[:, 1:]})
    wanted = expected(model, rows[:, :-1], rows[:, 1:], 2, "loss")
    assert torch.allclose(found.double(), wanted, atol=2e-5)

    class Broken(Trunk):
        def forward(self, ids, labels=None):
            raise ValueError("no such thing")

    with (
        pytest.warns(UserWarning, match="could not be heard"),
        pytest.raises(ValueError, match="no such thing"),
    ):
        Sifter(make(Broken)).score({"ids": rows[:, :-1], "labels": rows[:, 1:]})


# The model's own loss is believed, not its name


SIDES = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip
NAMED = {  # some shift, some do not, whatever they are called
    "BartForCausalLM": ("BartConfig", SIDES),
    "PegasusForCausalLM": ("PegasusConfig", SIDES),
    "TrOCRForCausalLM": ("TrOCRConfig", SIDES),
    "BartForConditionalGeneration": ("BartConfig", SIDES),
    "MarianMTModel": ("MarianConfig", SIDES),
    "XLMWithLMHeadModel": (
        "XLMConfig",
        {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "pad_index": 2},
    ),
    "XLNetLMHeadModel": (
        "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32},
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 1},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMED)
def test_labels_are_read_as_the_models_own_loss_reads_them(name):
    import transformers

    config, options = NAMED[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    model = scaled(model, 4.0).train()
    ids = tokens()[:, :T].clamp_min(5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    found = Sifter(model, exit_layer="full").score(batch)
    model.eval()
    with torch.no_grad():
        own = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(P)]
    assert torch.allclose(found, torch.stack(own), rtol=1e-4, atol=1e-4)


def test_the_data_cannot_mislead_about_the_shift():
    class Drops(Trunk):  # shifts, then drops what is ignored
        def forward(self, ids, labels=None):
            logits = self.head(self.hidden(ids))
            if labels is None:
                return logits
            logits, wanted = logits[:, :-1], labels[:, 1:]
            real = wanted != -100
            return logits, F.cross_entropy(logits[real], wanted[real])

    model, ids = make(Drops), tokens()[:, :-1]
    labels = ids.clone()
    labels[:, :4] = -100  # prompts: shifted or not, as many labels are left
    later = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wanted = expected(model, ids, later, 2, "loss")
    first = Sifter(model, exit_layer=2)
    assert torch.allclose(first.score({"ids": ids, "labels": labels}).double(), wanted, atol=2e-5)
    none = Sifter(model, exit_layer=2)  # and so where the first rows have none at all
    empty = labels.clone()
    empty[:2] = -100
    found = none.score({"ids": ids, "labels": empty}).double()
    assert torch.allclose(found[2:], wanted[2:], atol=2e-5) and (found[:2] == -torch.inf).all()
    assert none.scorer.reading_state == first.scorer.reading_state == [True, -100, False]


def test_a_head_of_zeros_does_not_hide_which_position_is_whose():
    class Slices(Parts):
        def forward(self, ids, labels=None):
            if labels is None:
                return {"loss": torch.zeros(())}
            pairs = zip(self.hidden(ids).chunk(4, 1), labels.chunk(4, 1), strict=True)
            losses = [F.cross_entropy(self.head(a).flatten(0, 1), b.flatten()) for a, b in pairs]
            return {"loss": torch.stack(losses).mean()}

    model, rows = make(Slices), tokens()
    batch = {"ids": rows[:, :-1], "labels": rows[:, 1:].contiguous()}
    trained = model.head.weight.detach().clone()
    model.head.weight.data.zero_()
    sifter = Sifter(model, exit_layer=2)
    sifter.score(batch)  # at first every layout looks alike
    model.head.weight.data.copy_(trained)
    wanted = expected(model, batch["ids"], batch["labels"], 2, "loss")
    assert torch.allclose(sifter.score(batch).double(), wanted, atol=2e-5)


def test_one_label_in_each_of_the_first_rows_does_not_mislead():
    model, ids = make(Sparse), tokens()[:, :-1]
    labels = torch.full_like(ids, -100)
    for row, count in enumerate([1, 1, 0, 2, 1, 1]):  # as many labels as rows
        labels[row, 2 : 2 + count] = ids[row, 2 : 2 + count]
    sifter = Sifter(model, exit_layer=2)
    with pytest.warns(UserWarning, match="one at a time"):
        found = sifter.score({"ids": ids, "labels": labels})
    later = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    some = torch.tensor([0, 1, 3, 4, 5])
    wanted = expected(model, ids[some], later[some], 2, "loss")
    assert torch.allclose(found[some].double(), wanted, atol=2e-5)
    assert found[2] == -torch.inf


def test_criteria_see_the_whole_pool_however_few_rows_fit(monkeypatch):
    from siftloader import Loss, Random, twin

    def standing(early):  # relative to the pool
        loss = early.reduce(early.each(lambda x, y: F.cross_entropy(x, y, reduction="none")))
        return (loss - loss.mean()) / loss.std()

    model, rows = make(OnlyLoss), tokens()
    batch = {"ids": rows[:, :-1], "labels": rows[:, :-1].clone()}
    counts = torch.arange(VOCAB).numpy() * 10
    kinds = [
        {"criterion": standing},
        {"criterion": 0.0 * Loss() + Random()},
        {"positions": Stride(4, control=counts)},
    ]
    whole = [Sifter(model, exit_layer=2, **kind).score(batch) for kind in kinds]
    monkeypatch.setattr(twin, "CHUNK_ELEMENTS", T * VOCAB)
    for kind, expected_scores in zip(kinds, whole, strict=True):
        found = Sifter(model, exit_layer=2, **kind).score(batch)
        assert torch.allclose(found, expected_scores, atol=1e-5) and len(set(found.tolist())) == P


def test_a_mask_over_the_loss_is_told():
    model, batch = make(Trunk), tokens()

    def masked(model, batch):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        return loss[:, 3:].mean()

    with pytest.warns(UserWarning, match="a mask, a weight or a further term"):
        Sifter(model, score_fn=masked).score(batch)


def test_floats_that_are_no_probabilities_are_refused():
    model, ids = make(Trunk), tokens()[:, 0]
    negative = torch.tensor([[2.0, -1.0]]).expand(P, 2)  # which adds up to 1
    for labels in (torch.ones(P, VOCAB), torch.randn(P, 2), negative):
        with pytest.raises(ScoringError, match="score_fn="):
            Sifter(model).score({"ids": ids, "labels": labels})
    one = torch.nn.functional.one_hot(torch.zeros(P).long(), 5).float()
    with pytest.raises(ScoringError, match="5 classes, the model predicts 10"):
        from models import candidates, classifier

        Sifter(classifier()).score({"x": candidates("classifier")["x"][:P], "labels": one})


def test_a_wrapper_hands_on_what_it_does_not_name():
    from models import bert, candidates

    inner, batch = bert(), candidates("bert")

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, **kwargs):
            return self.inner(input_ids, **kwargs)

    found = Sifter(Wrapper().train(), exit_layer=2).score(batch)
    assert torch.allclose(found, Sifter(inner, exit_layer=2).score(batch), atol=1e-5)


def test_any_field_but_the_labels_may_be_the_inputs():
    model, ids = make(Trunk), tokens()[:, :-1]
    masked = ids.masked_fill(torch.arange(T) % 3 > 0, -100)
    batch = {"labels": masked, "ids": ids.masked_fill(masked != -100, 4)}
    assert Sifter(model).score(batch).isfinite().all()  # labels that stand first
    for copies in ({"mask": torch.ones_like(ids), "ids": ids, "labels": ids},):
        with pytest.raises(ScoringError, match="shift_labels=True"):
            Sifter(model).score(copies)


def test_the_control_needs_no_labels_that_one_could_score():
    model, ids = make(Trunk), tokens()[:, :-1]
    for labels in (torch.randn(P), torch.randn(P, 3), torch.zeros(P, 4, 4).long(), ids):
        scores = Sifter(model, criterion="random").score({"ids": ids, "labels": labels})
        assert scores.isfinite().all() and len(set(scores.tolist())) == P
    none = ids.clone()
    none[2] = -100
    assert Sifter(model, criterion="random").score({"ids": ids, "labels": none})[2] == -torch.inf
    with pytest.raises(ValueError, match="RankSample, Gumbel"):  # the function scores, not chance
        Sifter(model, criterion="random", sift_weight=True, score_fn=lambda early, b: b["x"])


def test_looking_at_scores_teaches_nothing():
    from siftloader import ExitHead, Predicted

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(T, 1)

        def forward(self, ids):
            return self.line(ids.float())

    model, rows = make(Trunk), tokens()
    pair = {"ids": rows[:, :-1], "labels": rows[:, 1:]}
    predicted = Predicted(Small())
    sifter, before = Sifter(model, criterion=predicted), predicted.digest()
    assert torch.equal(sifter.score(pair), sifter.score(pair)) and predicted.digest() == before
    sifter(pair)
    assert predicted.digest() != before
    probe = Sifter(model, exit_layer=2, exit_head=ExitHead())
    probe.score(pair)
    assert probe.exit_head.digest() == ExitHead().digest() or not probe.scorer._early._seen
    assert probe.scorer._early._seen is None, "a pool must not live on"
    assert sum([Entropy(), Entropy()]).values == Entropy().values


def test_a_loss_that_drops_positions_is_noticed_when_it_first_does():
    model, ids = make(Sparse), tokens()[:, :-1]
    sifter = Sifter(model, exit_layer=2)
    sifter.score({"ids": ids, "labels": ids})  # all labelled: as if it dropped nothing
    assert sifter.scorer._reading.order == "whole"
    labels = ids.clone()
    labels[0, 3:6] = labels[1, 2:4] = labels[4, :9] = -100
    found = sifter.score({"ids": ids, "labels": labels})
    later = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.allclose(found.double(), expected(model, ids, later, 2, "loss"), atol=2e-5)


def test_padding_may_be_the_ignored_label():
    class Pads(Trunk):
        def forward(self, ids, labels=None):
            logits = self.head(self.hidden(ids))
            if labels is None:
                return logits
            return logits, F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=0)

    model, rows = make(Pads), tokens().clamp_min(1)
    labels = rows[:, 1:].clone()
    labels[1, 7:] = labels[4, 3:] = 0
    sifter = Sifter(model, exit_layer=2)
    found = sifter.score({"ids": rows[:, :-1], "labels": labels})
    assert sifter.scorer.reading_state == [False, 0, False] and sifter.scorer.ignored == 0
    marked = labels.masked_fill(labels == 0, -100)
    wanted = expected(model, rows[:, :-1], marked, 2, "loss")
    assert torch.allclose(found.double(), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["logits", "heard", "heard in chunks"])
def test_a_part_of_the_predictions_is_that_part(kind, monkeypatch):
    from siftloader import twin
    from siftloader.scores import token_loss

    model, rows = make(Trunk if kind == "logits" else OnlyLoss), tokens()
    if kind == "heard in chunks":
        monkeypatch.setattr(twin, "CHUNK_ELEMENTS", 2 * T * VOCAB)
    batch = {"ids": rows[:, :-1], "labels": rows[:, 1:]}
    seen = []

    def criterion(early):
        def other(logits, labels):  # nobody knows of it ahead
            return token_loss(2 * logits, labels)

        for value in (token_loss, other):
            whole, part = early.reduce(early.each(value)), early.part(2, 5)
            seen.append((whole[2:5], part.reduce(part.each(value))))
        early_part = early.part(1, 4)
        alone = early_part.reduce(early_part.each(torch_loss))  # before anyone asks for all of it
        seen.append((early.reduce(early.each(torch_loss))[1:4], alone))
        return whole

    def torch_loss(logits, labels):
        return token_loss(3 * logits, labels)

    criterion.values = (token_loss,)
    Sifter(model, exit_layer=2, criterion=criterion).score(batch)
    assert len(seen) == 3
    assert all(torch.allclose(part, whole, atol=1e-5) for whole, part in seen)


def test_padding_that_is_labelled_does_not_count_where_the_loss_leaves_it_out():
    import transformers

    config = transformers.ElectraConfig(
        vocab_size=VOCAB, hidden_size=32, embedding_size=16, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=32,
    )  # fmt: skip
    model = scaled(transformers.ElectraForPreTraining(config), 4.0).train()
    ids = tokens()[:, :T]
    mask = torch.ones_like(ids)
    mask[1, -5:] = mask[4, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids % 2}  # padding, too
    found = Sifter(model, exit_layer="full").score(batch)
    model.eval()
    with torch.no_grad():
        own = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(P)]
    assert torch.allclose(found, torch.stack(own), atol=1e-5)


class PadsItself(Trunk):
    """Shifts, and marks padding in its own loss: by an id, or by the mask."""

    pad: int | None = 0

    def forward(self, ids, attention_mask=None, labels=None):
        logits = self.head(self.hidden(ids))
        if labels is None:
            return logits
        labels = (
            labels.masked_fill(attention_mask == 0, -100)
            if self.pad is None
            else labels.masked_fill(labels == self.pad, -100)
        )
        return logits, F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


@pytest.mark.filterwarnings("ignore:the model's own loss leaves out")
@pytest.mark.parametrize("pad", [0, 1, 7, None])
@pytest.mark.parametrize("first_row_padded", [True, False])
def test_padding_that_the_model_marks_itself_does_not_count(pad, first_row_padded):
    model, ids = make(PadsItself), tokens()[:, :-1].clamp_min(8)
    model.pad = pad
    mask = torch.ones_like(ids)
    for row, length in ((0 if first_row_padded else 1, 7), (4, 3)):
        mask[row, length:] = 0
        ids[row, length:] = 2 if pad is None else pad
    batch = {"ids": ids, "attention_mask": mask, "labels": ids.clone()}
    sifter = Sifter(model, exit_layer=2)
    found = sifter.score(batch)
    marked = ids.masked_fill(mask == 0, -100)
    later = torch.nn.functional.pad(marked[:, 1:], (0, 1), value=-100)
    assert torch.allclose(found.double(), expected(model, ids, later, 2, "loss"), atol=2e-5)
    again = Sifter(model, exit_layer=2)  # a restart whose first pool has no padding
    again.scorer.reading_state = sifter.scorer.reading_state
    again.score({"ids": ids[2:4], "attention_mask": mask[2:4], "labels": ids[2:4]})
    assert torch.allclose(again.score(batch), found, atol=1e-5)


def test_another_task_in_the_same_forward_does_not_mislead():
    class TwoTasks(Trunk):
        def __init__(self, layers=LAYERS):
            super().__init__(layers)
            self.domain = nn.Linear(WIDTH, 3)

        def forward(self, ids, labels=None):
            x = self.hidden(ids)
            logits = self.head(x)
            if labels is None:
                return logits
            side = F.cross_entropy(self.domain(x[:, 0]), ids[:, 0] % 3)
            wanted = labels[:, 1:]
            return logits, side + F.cross_entropy(
                logits[:, :-1].transpose(1, 2), wanted, ignore_index=0
            )

    model, ids = make(TwoTasks), tokens()[:, :-1].clamp_min(1)
    ids[1, 6:] = 0
    found = Sifter(model, exit_layer=2).score({"ids": ids, "labels": ids})
    later = torch.nn.functional.pad(ids.masked_fill(ids == 0, -100)[:, 1:], (0, 1), value=-100)
    plain = Trunk(2)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        logits = plain.double().eval()(ids)
    losses = F.cross_entropy(logits.transpose(1, 2), later, reduction="none")
    wanted = losses.sum(1) / (later != -100).sum(1)
    assert torch.allclose(found.double(), wanted, atol=2e-5)


def test_options_weigh_more_than_what_an_earlier_run_learned():
    model, ids = make(Trunk), tokens()[:, :-1]
    first = Sifter(model, shift_labels=False, autocast=torch.bfloat16)
    first.score({"ids": ids, "labels": ids})
    second = Sifter(model, shift_labels=True, autocast=torch.float16)
    second.scorer.reading_state = first.scorer.reading_state
    second.scorer.precision.name = first.scorer.precision.name
    assert second.scorer.reading_state[0] is True
    assert second.scorer.precision.name == "float16"


def test_classes_of_samples_may_have_a_mark_of_their_own():
    class Marks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 4)

        def forward(self, x, labels=None):
            for layer in self.layers:
                x = layer(x)
            logits = self.head(x)
            return (
                logits
                if labels is None
                else (logits, F.cross_entropy(logits, labels, ignore_index=-1))
            )

    batch = {"x": torch.randn(P, 8), "labels": torch.tensor([1, -1, 2, 3, -1, 0])}
    found = Sifter(Marks().train()).score(batch)
    assert (found == -torch.inf).tolist() == [False, True, False, False, True, False]


def test_a_random_pool_without_any_label_has_no_weight():
    ids = tokens()[:, :-1]
    sift = Sifter(make(Trunk), criterion="random", sift_weight=True)
    kept = sift({"ids": ids, "labels": torch.full_like(ids, -100)})
    assert (kept["sift_weight"] == 0).all()
