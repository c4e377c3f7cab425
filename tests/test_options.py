"""Options of the loader that change what is kept, and what is told of it: pytest tests/test_options.py"""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from effort import FACTOR, examples
from hypothesis import given, strategies as st
from models import bert, candidates, classifier, gpt2, trace
from test_loader import DEMO, Rows, ids, make
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siftloader import (
    ExitHead,
    Gumbel,
    Loss,
    Predicted,
    RankSample,
    Reducible,
    Robust,
    ScoringError,
    Sifter,
    SiftingDataLoader,
    StateError,
    Stratified,
    Stride,
    TokenShards,
    TrimmedTopK,
    twin,
)


SHARES = st.sampled_from([1.0, 2 / 3, 0.5, 0.25])


@examples(30)
@given(
    keep=st.dictionaries(st.integers(0, 8), SHARES, min_size=1, max_size=3),
    warmup=st.integers(0, 3),
    count=st.integers(40, 130),
    cut=st.integers(1, 12),
)
def test_keep_by_step_draws_what_it_says_and_resumes(keep, warmup, count, cut):
    def fresh():
        return make(Rows(count), batch_size=4, shuffle=False, keep=keep, warmup_steps=warmup)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an epoch inside the warm-up
        loader = fresh()
        told, expected = len(loader), [ids(batch) for batch in loader]
    assert len(expected) == told
    used = 0
    for step, batch in enumerate(expected[:-1]):
        share = (
            1.0
            if step < warmup
            else keep.get(max((s for s in keep if s <= step), default=-1), 1.0)
        )
        # Passing through, the rest of a half-used inner batch comes first.
        size = round(4 / share) if share < 1 else -used % 4 or 4
        pool = list(range(used, used + size))
        used += len(pool)
        best = sorted(sorted(pool, key=lambda row: (-(row % 7), row))[:4])
        assert batch == (best if share < 1 else pool), (step, share)
    first = fresh()
    source = iter(first)
    begun = [ids(next(source)) for _ in range(min(cut, told - 1))]
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh()
    second.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert begun + [ids(batch) for batch in second] == expected


def test_keep_by_step_is_checked():
    with pytest.raises(ValueError, match="whole number of rows"):
        make(batch_size=8, keep={0: 0.5, 100: 0.3})
    with pytest.raises(ValueError, match="would change"):
        make(batch_size=8, keep={0: 0.5}, pool="split")
    with pytest.raises(TypeError, match="counts no steps"):
        Sifter(classifier(), keep={0: 0.5})
    state = make(batch_size=8, keep={0: 0.5, 9: 0.25}).state_dict()
    with pytest.raises(StateError, match="saved with keep"):
        make(batch_size=8).load_state_dict(state)


# Weights


@pytest.mark.parametrize(
    ("selection", "criterion"), [(RankSample(), "loss"), (Gumbel(2.0), "loss"), (None, "random")]
)
def test_the_weighted_mean_of_the_kept_is_the_mean_of_all_on_average(selection, criterion):
    # Through the public surface: one pool again and again, other draws each time.
    model = classifier()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": torch.arange(16) % 10}
    sift = Sifter(model, criterion=criterion, selection=selection, sift_weight=True, keep=0.5)
    value = Sifter(model, exit_layer=4).score(batch)  # what the loop would average: the full loss
    of = {tuple(row): v.item() for row, v in zip(x.tolist(), value, strict=True)}
    weighted, plain = [], []
    for _ in range(500 * FACTOR):
        kept = sift(batch)
        values = torch.tensor([of[tuple(row)] for row in kept["x"].tolist()])
        weighted.append((kept["sift_weight"] * values).mean().item())
        plain.append(values.mean().item())
    means = torch.tensor(weighted).double()
    error = means.std() / len(means) ** 0.5
    assert (means.mean() - value.mean()).abs() < 4 * error + 1e-6
    if criterion == "loss":  # without the weights the mean is biased, or this could not fail
        assert (torch.tensor(plain).mean() - value.mean()).abs() > 6 * error


def test_weights_are_ones_while_passing_through():
    loader = make(Rows(64), batch_size=8, warmup_steps=2, score_fn=None, selection=RankSample(),
                  sift_weight=True)  # fmt: skip
    weights = [batch["sift_weight"] for batch in loader]
    assert all(len(each) == 8 and each.dtype == torch.float32 for each in weights)
    assert all((each == 1).all() for each in weights[:2])
    assert not any((each == 1).all() for each in weights[2:])


@pytest.mark.parametrize(
    "selection", [None, TrimmedTopK(), Robust(), Stratified(by=lambda batch: batch["labels"] % 2)]
)
def test_selections_that_never_draw_refuse_weights(selection):
    with pytest.raises(ValueError, match="RankSample, Gumbel"):
        make(batch_size=8, selection=selection, sift_weight=True)


def test_weights_need_a_batch_of_fields():
    batch = candidates("classifier")
    pair = (batch["x"], batch["labels"])
    sift = Sifter(classifier(), selection=Gumbel(), sift_weight=True)
    with pytest.raises(ValueError, match="must be a dict"):
        sift(pair)


def test_draws_repeat_on_resume_and_differ_between_pools():
    def fresh():
        return make(Rows(128), batch_size=8, shuffle=False, score_fn=None, selection=Gumbel(),
                    model=classifier())  # fmt: skip

    torch.manual_seed(0)
    loader = fresh()
    state = loader._sifter.scorer.model.state_dict()
    expected = [ids(batch) for batch in loader]
    for cut in (1, 3, 5):
        first, second = fresh(), fresh()
        first._sifter.scorer.model.load_state_dict(state)
        second._sifter.scorer.model.load_state_dict(state)
        source = iter(first)
        begun = [ids(next(source)) for _ in range(cut)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [ids(batch) for batch in second] == expected


# Ids, sources, and the log


def test_shards_tell_who_the_candidates_are_without_a_field_in_the_batch():
    seen = []

    def note(numbers, scores, kept):
        seen.append((numbers, kept))

    shards = TokenShards(DEMO)
    loader = SiftingDataLoader(
        shards, 8, model=bert(vocab_size=8192), criterion="random", warmup_steps=0, on_select=note
    )
    with_ids = TokenShards(DEMO, with_ids=True)
    for number, (batch, plain) in enumerate(zip(loader, with_ids.batches(16), strict=False)):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        numbers, kept = seen[number]
        assert torch.equal(numbers, plain["id"]) and numbers.dtype == torch.int64
        assert torch.equal(batch["input_ids"], plain["input_ids"][kept])
        if number == 5:
            break
    asked = SiftingDataLoader(
        with_ids, 8, model=bert(vocab_size=8192), criterion="random", warmup_steps=0
    )
    assert "id" in next(iter(asked))


def test_ids_stay_with_their_rows_where_pools_split_batches():
    seen = []
    loader = SiftingDataLoader(
        TokenShards(DEMO), 8, model=bert(vocab_size=8192), criterion="random", keep=2 / 3, warmup_steps=0,
        on_select=lambda numbers, scores, kept: seen.append((numbers, kept)),
    )  # fmt: skip
    whole = next(iter(TokenShards(DEMO, with_ids=True).batches(60)))
    for number, batch in zip(range(5), loader, strict=False):
        numbers, kept = seen[number]
        rows = slice(12 * number, 12 * number + 12)
        assert torch.equal(numbers, whole["id"][rows])
        assert torch.equal(batch["input_ids"], whole["input_ids"][rows][kept])


def test_the_criterion_sees_the_ids_of_shards():
    shards = TokenShards(DEMO)
    total = len(shards)
    # Loss minus a huge irreducible loss for odd ids: only even ones are kept.
    table = Reducible(torch.arange(total), 1e4 * (torch.arange(total) % 2))
    seen = []
    loader = SiftingDataLoader(
        shards, 8, model=_reader(), criterion=table, warmup_steps=0,
        on_select=lambda numbers, scores, kept: seen.append((numbers, kept)),
    )  # fmt: skip
    for number, _ in enumerate(loader):
        numbers, kept = seen[number]
        if (numbers % 2 == 0).sum() >= 8:
            assert (numbers[kept] % 2 == 0).all()
        if number == 4:
            break
    with pytest.raises(ScoringError, match=r'no field "id"'):
        Sifter(classifier(), criterion=table).score(candidates("classifier"))
    few = SiftingDataLoader(
        shards, 8, model=_reader(), criterion=Reducible([10**9], [1.0]), warmup_steps=0
    )
    with pytest.raises(ScoringError, match="no irreducible loss for sample"):
        next(iter(few))


def _reader() -> nn.Module:
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8192, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 8192)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    return Reader().train()


def test_strata_may_be_the_sources_of_shards():
    loader = SiftingDataLoader(
        TokenShards(DEMO), 8, model=_reader(), selection=Stratified(by="source"), warmup_steps=0
    )
    assert next(iter(loader))["input_ids"].shape == (8, 128)


def test_every_pool_is_logged_and_readable_at_each_checkpoint(tmp_path):
    pytest.importorskip("pyarrow")
    from siftloader.selection_report import read_log

    path = tmp_path / "x.parquet"
    seen = []
    loader = make(
        Rows(64), batch_size=8, warmup_steps=1, log_selections=path,
        on_select=lambda numbers, scores, kept: seen.append((numbers, scores, kept)),
    )  # fmt: skip
    source = iter(loader)
    for _ in range(3):
        next(source)
    state = loader.state_dict()
    table = read_log(path)
    assert table.num_rows == 2 * 16  # readable now, whatever happens next
    next(source)
    again = make(Rows(64), batch_size=8, warmup_steps=1, log_selections=path)
    again.load_state_dict(state)
    list(again)
    rows = read_log(path).to_pydict()
    assert len(rows["id"]) == 16 * 3 + 8  # 56 rows after the warm-up; no pool twice
    for pool, (numbers, scores, kept) in enumerate(seen[:2]):
        at = [n for n, each in enumerate(rows["pool"]) if each == pool]
        assert [rows["id"][n] for n in at] == numbers.tolist()
        assert [rows["kept"][n] for n in at] == kept.tolist()
        assert torch.equal(torch.tensor([rows["score"][n] for n in at]), scores)
        assert {rows["step"][n] for n in at} == {pool + 1}


def test_a_log_says_what_its_ids_count(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from siftloader.cli import main
    from siftloader.selection_report import ids_of

    shards = TokenShards(DEMO)
    kinds = {
        shards.fingerprint: SiftingDataLoader(
            shards, 8, model=_reader(), criterion="random", warmup_steps=0,
            log_selections=tmp_path / shards.fingerprint,
        ),
        "batch": SiftingDataLoader.wrap(
            [{"x": torch.zeros(16, 8), "labels": torch.zeros(16).long(), "id": torch.arange(16)}],
            model=classifier(), warmup_steps=0, pool="split", log_selections=tmp_path / "batch",
        ),
        "candidates": make(Rows(32), batch_size=8, log_selections=tmp_path / "candidates"),
    }  # fmt: skip
    for name, loader in kinds.items():
        next(iter(loader))
        loader.state_dict()
        assert ids_of(tmp_path / name) == name
    shown = ["inspect-selections", str(tmp_path / shards.fingerprint), "--shards", DEMO]
    assert main(shown) == 0
    capsys.readouterr()
    shown[1] = str(tmp_path / "candidates")
    assert main(shown) == 1 and "only number the candidates" in capsys.readouterr().err


# Autocast that the loop owns


@pytest.mark.parametrize("given_dtype", [None, torch.bfloat16])
def test_scoring_runs_in_the_precision_of_the_loop(given_dtype):
    batch = candidates("bert", samples=32)
    dataset = [{k: v[i] for k, v in batch.items()} for i in range(32) if i != 3]
    seen = []
    model = bert()
    loader = SiftingDataLoader(
        dataset, 4, model=model, warmup_steps=0, autocast=given_dtype,
        on_select=lambda numbers, scores, kept: seen.append(scores),
    )  # fmt: skip
    before = trace(model)
    pools = torch.utils.data.default_collate(dataset[:24])
    for number, step in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16):
            model(**step)
        assert not model._forward_pre_hooks
        if number == 2:
            break
    assert trace(model) != before  # dropout draws, but ...
    hidden = {k: v[16:24] for k, v in pools.items()}
    low = Sifter(model, autocast=torch.bfloat16).score(hidden)
    high = Sifter(model).score(hidden)
    assert not torch.equal(low, high)
    assert torch.equal(seen[2], low)
    assert loader.state_dict()["precision"] == "bfloat16"
    other = SiftingDataLoader(dataset, 4, model=model, warmup_steps=0)
    other.load_state_dict(loader.state_dict())
    assert other._sifter.scorer.precision.name == "bfloat16"


def test_nobody_watches_a_loader_that_is_off_or_a_loop_that_never_calls():
    model = classifier()
    for options in ({"keep": 1.0}, {"autocast": torch.bfloat16}):
        loader = make(Rows(64), batch_size=8, model=model, **options)
        next(iter(loader))
        assert not model._forward_pre_hooks
    loader = make(Rows(64), batch_size=8, model=model)
    source = iter(loader)
    next(source)
    assert len(model._forward_pre_hooks) == 1
    loader.attach_model(classifier())
    assert not model._forward_pre_hooks
    del source


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("give", ["compiled", "plain"])
def test_a_compiled_loop_is_neither_broken_nor_recompiled(give):
    batch = candidates("bert", samples=32)
    dataset = [{k: v[i] for k, v in batch.items()} for i in range(32) if i != 3]
    model = bert()
    compiled = torch.compile(model, backend="eager")
    loader = SiftingDataLoader(
        dataset, 4, model=compiled if give == "compiled" else model, warmup_steps=0
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for step in loader:
        with torch.autocast("cpu", torch.bfloat16):
            compiled(**step)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, "a hook that comes and goes must not compile anew"
    assert loader._sifter.scorer.precision.name == ("bfloat16" if give == "compiled" else None)
    torch._dynamo.reset()


# Positions


def test_positions_are_an_option_of_the_loader():
    model, batch = gpt2(), candidates("gpt2", samples=32)
    dataset = [{k: v[i] for k, v in batch.items()} for i in range(32) if i != 3]
    seen = []
    loader = SiftingDataLoader(
        dataset, 4, model=model, warmup_steps=0, positions=Stride(8), criterion=Loss(),
        on_select=lambda numbers, scores, kept: seen.append(scores),
    )  # fmt: skip
    next(iter(loader))
    first = torch.utils.data.default_collate(dataset[:8])
    assert torch.allclose(seen[0], Sifter(model, positions=Stride(8)).score(first), atol=1e-6)
    assert not torch.allclose(seen[0], Sifter(model).score(first), atol=1e-3)


def test_fewer_positions_cost_fewer_logits(monkeypatch):
    model, batch = gpt2(), candidates("gpt2")
    sizes = []
    own = twin._Gather.run

    def counted(self, hidden):
        out = own(self, hidden)
        sizes.append(out.shape[-2] if self.positions is not None else 0)
        return out

    monkeypatch.setattr(twin._Gather, "run", counted)
    sifter = Sifter(model, positions=Stride(8))
    sifter.score(batch)
    sizes.clear()
    sifter.score(batch)
    labelled = (batch["labels"][:, 1:] != -100).sum(1)
    assert sum(sizes) == (-(-labelled // 8)).sum()


def test_plain_loaders_are_wrapped_as_before():
    plain = DataLoader(Rows(32), 8)
    loader = SiftingDataLoader.wrap(plain, model=classifier(), warmup_steps=0, keep={0: 0.5})
    assert len(list(loader)) == 2


# Learned beside the model: exit heads, predicted losses


class Stages(nn.Module):
    """A stage network on features [P, 8]: widths 16, 24, 32, so that its head fits the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 24, 32]
        for number, (a, b) in enumerate(pairwise(widths), 1):
            stage = nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.1))
            setattr(self, f"layer{number}", stage)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


def stages() -> nn.Module:
    torch.manual_seed(5)
    return Stages().train()


def planted_rows(count: int = 256) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": (row[:5].argmax()).long()} for row in x]


def probing(model, **options) -> SiftingDataLoader:
    settings = {"exit_layer": "layer1", "exit_head": ExitHead(lr=3e-2), "warmup_steps": 4}
    return SiftingDataLoader(planted_rows(), 8, model=model, **settings | options)


def test_an_exit_head_learns_from_the_warm_up_on_and_touches_nothing():
    model = stages()
    loader = probing(model)
    source, digests = iter(loader), [loader.exit_head.digest()]
    traces = set()
    for _ in range(8):
        batch = next(source)
        assert batch["x"].shape == (8, 8)
        digests.append(loader.exit_head.digest())
        loader._sifter.scorer.precision.unwatch()  # it waits for a forward that this loop never makes
        traces.add(trace(model))
    assert len(traces) == 1
    assert digests[0] == "" and len(set(digests)) == 9, "a step of the head for every batch"
    sifter = Sifter(model, exit_layer="layer1", exit_head=loader.exit_head)
    held_out = torch.utils.data.default_collate(planted_rows(512)[256:])
    assert sifter.score(held_out).mean() < 0.9 * math.log(10)
    assert loader.exit_head.digest() == digests[-1], "looking at scores teaches nothing"


@pytest.mark.parametrize("cut", [0, 2, 4, 7])
@pytest.mark.parametrize("heads_first", [True, False])
def test_a_run_with_an_exit_head_resumes_exactly(cut, heads_first):
    model = stages()
    expected = [batch["x"] for batch in probing(model)]
    first, second = probing(model), probing(model)
    source = iter(first)
    begun = [next(source)["x"] for _ in range(cut)]
    state, tensors = json.loads(json.dumps(first.state_dict())), first.exit_head.state_dict()
    if heads_first:
        second.exit_head.load_state_dict(tensors)
        second.load_state_dict(state)
    else:
        second.load_state_dict(state)
        second.exit_head.load_state_dict(tensors)
    rest = [batch["x"] for batch in second]
    assert all(map(torch.equal, begun + rest, expected))
    assert len(begun + rest) == len(expected)


def test_a_state_without_its_tensors_is_refused():
    model = stages()
    loader = probing(model)
    source = iter(loader)
    next(source)
    forgotten = probing(model)
    forgotten.load_state_dict(loader.state_dict())
    with pytest.raises(StateError, match=r"loader\.exit_head"):
        next(iter(forgotten))
    plain = SiftingDataLoader(planted_rows(), 8, model=classifier(), warmup_steps=0)
    plain.load_state_dict(
        SiftingDataLoader(planted_rows(), 8, model=classifier(), warmup_steps=0).state_dict()
    )
    next(iter(plain))
    predicted = SiftingDataLoader(
        planted_rows(),
        8,
        model=classifier(),
        criterion=0.5 * Predicted(Small()) + Loss(),
        warmup_steps=0,
    )
    next(iter(predicted))
    other = SiftingDataLoader(
        planted_rows(), 8, model=classifier(), warmup_steps=0,
        criterion=0.5 * Predicted(Small()) + Loss(),
    )  # fmt: skip
    other.load_state_dict(predicted.state_dict())
    with pytest.raises(StateError, match="the criterion"):
        next(iter(other))


def test_an_exit_head_is_offered_to_transformers_too():
    model, batch = bert(), candidates("bert")
    sifter = Sifter(model, exit_layer=2, exit_head="probe")
    first = sifter.score(batch)
    rows = torch.arange(8) != 3
    assert torch.allclose(first[rows], torch.full((7,), math.log(97)), atol=1e-4)
    for _ in range(30):
        sifter(batch)
    assert (sifter.score(batch)[rows] < first[rows]).all()


def test_a_stage_network_is_told_of_the_exit_head():
    with pytest.raises(ScoringError, match="exit_head"):
        SiftingDataLoader(planted_rows(), 8, model=stages(), exit_layer=1)
    with pytest.raises(ValueError, match="give one of them"):
        make(batch_size=8, exit_head="probe")
    with pytest.raises(ValueError, match='None, "probe" or an ExitHead'):
        Sifter(classifier(), exit_head="linear")
