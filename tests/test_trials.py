"""gate="trial": when it opens and closes, what it costs (in counts), and that training never notices."""

from __future__ import annotations

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siftloader import (
    Gumbel,
    Predicted,
    Random,
    ScoringError,
    SiftingDataLoader,
    StateError,
    TokenShards,
)
from siftloader.trials import TrialGate


VOCABULARY, STATES, LENGTH, HIDDEN = 400, 384, 16, 32
B = 8  # rows of a batch
COST = 0.06  # of scoring a pool of 16, in plain steps


class Net(nn.Module):
    """Next tokens of [P, T] ids from the last one alone: fast, and it has layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


FOLLOW = torch.randint(0, STATES, (STATES, 4), generator=torch.Generator().manual_seed(7))


def chain(count, branches, generator) -> Tensor:
    """Rows that are all equally hard: each state has as many followers."""
    at = torch.randint(0, STATES, (count,), generator=generator)
    found = [at]
    for _ in range(LENGTH):
        at = FOLLOW[at, torch.randint(0, branches, (count,), generator=generator)]
        found.append(at)
    return torch.stack(found, 1)


def drawn(kind: str, count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "identical":
        ids = chain(count, 4, generator)
    elif kind == "hard":
        ids = chain(count, 1, generator)
    else:  # one row in eight has something to teach; of the others one has seen all
        ids = torch.full((count, LENGTH + 1), STATES + 1)
        hard = torch.rand(count, generator=generator) < 1 / 8
        ids[hard] = chain(int(hard.sum()), 1, generator)
    return {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def batches(kind: str, count: int, seed: int = 0, size: int = B) -> list[dict[str, Tensor]]:
    rows = drawn(kind, count * size, seed)
    return [
        {name: value[i * size : (i + 1) * size] for name, value in rows.items()}
        for i in range(count)
    ]


def gate(kind: str = "planted", **options) -> TrialGate:
    held_out = batches("identical" if kind == "identical" else "hard", 1, 1000, size=256)
    return TrialGate(**({"held_out": held_out, "steps": 8, "share": 1.0, "cost": COST} | options))


def make(model, kind="planted", count=600, gated=None, **options) -> SiftingDataLoader:
    options = {"warmup_steps": 40, "audit_every": 0, "exit_layer": 2} | options
    return SiftingDataLoader.wrap(
        batches(kind, count),
        model=model,
        shift_labels=False,
        gate=gated or gate(kind),
        **options,
    )


def begun(seed: int = 0, rate: float = 1e-3):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.Adam(model.parameters(), rate)


def train(loader, model, optimizer, steps: int = 10**9) -> list[float]:
    """What the loop saw: a number for every batch."""
    seen = []
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        seen.append(float(batch["ids"].sum()))
        if step + 1 == steps:
            break
    return seen


def weights(model) -> list[list[float]]:
    return [each.tolist() for each in model.state_dict().values()]


# ---- the three things asked of a gate, on counts


def test_on_planted_hard_samples_it_opens_stays_on_and_turns_off_when_they_are_learned():
    model, optimizer = begun(seed=1)
    loader = make(model, count=1000, gated=gate(least=0.004))
    train(loader, model, optimizer, 350)
    assert [each["step"] for each in loader.trials] == [40, 192, 344]
    assert [each["open"] for each in loader.trials] == [True, True, False], loader.trials
    # Sifted from the first trial to the one that closed it, and never else.
    assert loader.stats["candidates"] == 2 * B * (344 - 40)
    assert loader.stats["kept"] == B * (344 - 40) and not loader.stats["sifting"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_weights_it_stays_on_for_long_and_turns_off_in_the_end(seed):
    model, optimizer = begun(seed)
    loader = make(model, count=2200)
    train(loader, model, optimizer, 960)
    opened = [each["open"] for each in loader.trials]
    assert opened == sorted(opened, reverse=True), "on, then off for good"
    assert opened[:3] == [True] * 3 and not opened[-1]


def test_where_all_is_equally_hard_nothing_is_sifted_and_trying_costs_little():
    model, optimizer = begun()
    loader = make(model, "identical", count=420)
    train(loader, model, optimizer, 400)
    found = loader.stats
    assert found["candidates"] == 0 and len(loader.trials) == 3
    # Scored in all: within the trials, at what a candidate costs.
    scored = found["candidates"] + sum(each["scored"] for each in loader.trials)
    assert scored * COST / (2 * B) <= 0.02 * found["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_that_trials_cost_stays_within_the_share(seed):
    model, optimizer = begun(seed)
    gated = gate("identical", share=0.02, steps=4, held_out_rows=64)
    loader = make(model, "identical", count=12_000, gated=gated)
    train(loader, model, optimizer, 6_000)
    found = loader.stats
    one = loader.trials[0]["steps_spent"]
    assert 2 <= len(loader.trials) <= 3
    assert found["trial_steps_spent"] <= 0.02 * (found["steps"] - 40) + one
    scored = found["candidates"] + sum(each["scored"] for each in loader.trials)
    assert scored * COST / (2 * B) <= 0.02 * found["steps"]


@pytest.mark.parametrize(
    ("was", "gains", "opens"),
    [
        (False, (0.010, 0.012), False),  # an interval of twelve times their difference
        (False, (0.0100, 0.0101), True),
        (False, (0.0019, 0.0019), False),  # sure, but less than is wanted
        (False, (-0.01, -0.01), False),
        (True, (0.05, -0.04), True),  # unsure, but open: at least half of what is wanted
        (True, (0.0009, 0.0009), False),
        (True, (math.nan, 0.01), False),
    ],
)
def test_a_gate_opens_on_a_sure_gain_and_closes_on_half_of_it(was, gains, opens, monkeypatch):
    from siftloader import trials as room

    model, optimizer = begun()
    held = batches("hard", 1)
    gated = gate(held_out=held, steps=1, repeats=2, least=0.002, optimizer=optimizer)
    loader = make(model, count=40, gated=gated, warmup_steps=3)
    batches_ = iter(loader)
    train(batches_, model, optimizer, 3)
    losses = iter([x for gain in gains for x in (1 + gain, 1.0)])
    monkeypatch.setattr(room, "held_out_loss", lambda *args: next(losses))
    loader._trials.is_open = was
    next(batches_)
    (only,) = loader.trials
    assert only["open"] is opens is loader._open
    expected = None if math.isnan(sum(gains)) else pytest.approx(sum(gains) / 2)
    assert only["gain"] == expected


def test_what_is_said_to_be_spent_is_what_is_spent(monkeypatch):
    from siftloader import trials as room

    steps, looked, armed, held_out_loss = [], [], room.arm, room.held_out_loss

    def arm(model, optimizer, pools, choose, step, key):
        def counted(pool):
            batch = choose(pool)
            steps.append(len(batch["ids"]))
            return batch

        armed(model, optimizer, pools, counted, step, key)

    def look(model, held, step):
        looked.append(sum(len(each["ids"]) for each in held))
        return held_out_loss(model, held, step)

    monkeypatch.setattr(room, "arm", arm)
    monkeypatch.setattr(room, "held_out_loss", look)
    model, optimizer = begun()
    loader = make(model, count=120, gated=gate(held_out_rows=100, cost=0.5))
    train(loader, model, optimizer, 42)
    (only,) = loader.trials
    del steps[0], looked[0]  # tried once with the first optimizer step, for nothing
    assert set(steps) == {B} and set(looked) == {100}
    sifted = round(8 / 1.5) * 4
    assert len(steps) == 8 * 4 + sifted and only["scored"] == sifted * 2 * B
    expected = len(steps) + 0.5 * sifted + sum(looked) / B / 3
    assert only["steps_spent"] == pytest.approx(expected)


# ---- the loop notices nothing


def test_behind_a_closed_gate_training_is_that_of_the_plain_loader_to_the_bit():
    model, optimizer = begun()
    shut = gate(least=1e9)
    loader = make(model, count=270, gated=shut)
    seen = train(loader, model, optimizer)
    assert len(loader.trials) == 2 and not any(each["open"] for each in loader.trials)
    streams = torch.get_rng_state()
    plain, its_optimizer = begun()
    expected = train(batches("planted", 270), plain, its_optimizer)
    assert seen == expected and weights(model) == weights(plain)
    assert torch.equal(streams, torch.get_rng_state())
    first, second = optimizer.state_dict()["state"], its_optimizer.state_dict()["state"]
    assert all(torch.equal(first[n]["exp_avg"], second[n]["exp_avg"]) for n in first)


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"pool": "split"}], ids=str)
def test_pools_that_a_trial_looked_at_are_handed_out_all_the_same(options):
    model, optimizer = begun()
    always = gate(least=0.0, seed=3)
    loader = make(model, count=300, gated=always, **options)
    handed = train(loader, model, optimizer)
    found = loader.stats
    assert loader.trials and found["candidates"] > 0
    passed = found["samples"] - found["kept"]
    if options.get("pool") == "split":
        assert found["steps"] == 300 == len(handed)
    else:
        assert found["candidates"] + passed + found["tail_dropped"] == 300 * B


def test_a_trial_trains_copies_on_the_same_pools_by_the_loaders_own_rules():
    # By chance against chance: no gain, of whatever sign, beyond the noise of which rows were drawn.
    model, optimizer = begun()
    loader = make(model, count=500, gated=gate(repeats=8), criterion=Random(seed=5))
    train(loader, model, optimizer, 45)
    (only,) = loader.trials
    assert abs(only["gain"]) <= 2 * only["half_width"] and only["half_width"] > 0


def test_held_out_batches_are_drawn_without_a_trace():
    # A DataLoader draws a seed from the global stream whenever it begins.
    rows = drawn("planted", 80, 0)
    dataset = [{name: value[i] for name, value in rows.items()} for i in range(80)]
    held_out = DataLoader(dataset[:32], 16, shuffle=True)
    streams = []
    for gated in (None, TrialGate(held_out=held_out, cost=COST, least=1e9, steps=2, repeats=2)):
        model, optimizer = begun()
        warmup = 1 if gated else 100
        loader = SiftingDataLoader(
            dataset,
            B,
            shuffle=True,
            model=model,
            shift_labels=False,
            warmup_steps=warmup,
            audit_every=0,
            gate=gated,
        )
        seen = train(loader, model, optimizer, 8)
        streams.append((seen, torch.get_rng_state().tolist(), weights(model)))
    assert loader.trials and streams[0] == streams[1]


@pytest.mark.parametrize("options", [{"exit_head": "probe"}, {"criterion": "predicted"}], ids=str)
def test_what_is_learned_beside_the_model_is_copied_too(options):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids).mean(1))

    ends = []
    for steps in (2, 10**6):  # so many pools that there is no trial
        model, optimizer = begun()
        torch.manual_seed(3)
        if "criterion" in options:
            options = {"criterion": Predicted(Small())}
        gated = gate(steps=steps, repeats=2, least=1e9)
        loader = make(model, count=60, gated=gated, warmup_steps=3, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            seen = train(loader, model, optimizer, 20)
        assert bool(loader.trials) == (steps == 2)
        learned = loader.state_dict()["learned"]
        assert learned
        ends.append((seen, weights(model), learned))
    assert ends[0] == ends[1]


def test_a_copy_scores_in_the_loops_precision_and_shares_nothing():
    model, _ = begun()
    loader = make(
        model, selection=Gumbel(), sift_weight=True, scope="global", autocast=torch.bfloat16
    )
    sifter, other = loader._sifter, loader._sifter.of(copy.deepcopy(model), 0.5)
    assert other.scorer.precision.name == "bfloat16" and not other.scorer.precision.watches
    assert not other.weighs and other.scope == "rank" and sifter.weighs
    for name in ("scorer", "selection", "counts", "_copies"):
        assert getattr(other, name) is not getattr(sifter, name)
    assert (
        other.scorer.model is not model and other.scorer.criterion is not sifter.scorer.criterion
    )


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
def test_after_a_trial_that_broke_off_everything_is_as_before(interrupt, monkeypatch):
    from siftloader import trials as room

    model, optimizer = begun()
    loader = make(model, count=200, warmup_steps=5, gated=gate(steps=2, repeats=2))
    batches = iter(loader)
    seen = train(batches, model, optimizer, 5)
    held = room.held_out_loss

    def break_off(*args):
        held(*args)
        raise interrupt("in the middle")

    monkeypatch.setattr(room, "held_out_loss", break_off)
    kept, streams, before = loader.state_dict(), torch.get_rng_state(), weights(model)
    with pytest.raises(interrupt, match="in the middle"):
        next(batches)
    monkeypatch.undo()
    assert torch.equal(streams, torch.get_rng_state()) and weights(model) == before
    assert not loader.trials and {**loader.state_dict(), "trials": 0} == {**kept, "trials": 0}
    again = make(model, count=200, warmup_steps=5, gated=gate(steps=2, repeats=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a list is resumed by drawing it again
        again.load_state_dict(loader.state_dict())
        seen += train(again, model, optimizer, 4)
    assert again.trials and len(seen) == 9


# ---- when it happens


def test_the_optimizer_is_found_by_the_steps_that_it_takes():
    model, optimizer = begun()
    loader = make(model, count=400, warmup_steps=0)
    batches = iter(loader)
    next(batches)
    next(batches)
    assert not loader.trials, "no optimizer has trained this model yet"
    _, its_optimizer = begun()
    its_optimizer.step()
    next(batches)
    assert not loader.trials
    train(batches, model, optimizer, 2)
    assert len(loader.trials) == 1


def test_an_optimizer_that_is_named_needs_no_step():
    model, optimizer = begun()
    loader = make(model, count=400, warmup_steps=1, gated=gate(optimizer=optimizer))
    batches = iter(loader)
    next(batches)
    next(batches)
    assert [each["step"] for each in loader.trials] == [1]


def test_batches_that_are_skipped_are_no_batches_to_try():
    model, optimizer = begun()
    loader = make(model, count=60, warmup_steps=0, gated=gate(optimizer=optimizer))
    loader._open = True  # as a state may tell
    batches = loader._begin(joined=False, over=3)
    assert len(next(batches)["ids"]) == B


def test_several_optimizers_are_refused_unless_one_is_named():
    model, _ = begun()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizers = [torch.optim.SGD(first, 0.1), torch.optim.Adam(second, 1e-3)]
    loader = make(model, count=400, warmup_steps=2)
    handed = 0
    with pytest.raises(ScoringError, match=r"2 optimizers train the model \(Adam, SGD\)"):
        for batch in loader:
            handed += 1
            model(**batch).loss.backward()
            for each in optimizers:
                each.step()
    assert handed == 1, "told of as soon as they have stepped"


def test_an_optimizer_that_another_one_replaced_does_not_count():
    model, first = begun()
    loader = make(model, count=400, warmup_steps=6)
    batches = iter(loader)
    train(batches, model, first, 2)
    second = torch.optim.SGD(model.parameters(), 0.1)
    train(batches, model, second, 6)
    assert len(loader.trials) == 1 and first.state


def test_another_model_is_tried_with_its_own_optimizer():
    (first, its), (second, others) = begun(), begun(1)
    loader = make(first, count=400, warmup_steps=6)
    train(loader, first, its, 2)
    loader.attach_model(second)
    train(loader, second, others, 6)
    assert len(loader.trials) == 1


def test_without_a_cost_the_audits_are_waited_for():
    model, optimizer = begun()
    loader = make(model, count=400, warmup_steps=0, gated=gate(cost=None), audit_every=10)
    train(loader, model, optimizer, 40)
    assert loader.trials[0]["step"] == 18, "the audit of step 10, settled eight steps later"
    assert loader.trials[0]["cost"] == loader.audits[0]["scoring_cost"]
    with pytest.raises(ValueError, match="audit_every=0 makes none"):
        make(begun()[0], gated=gate(cost=None))


def test_an_epoch_without_pools_enough_is_told_and_trained_on():
    model, optimizer = begun()
    loader = make(model, count=50, warmup_steps=4)
    train(loader, model, optimizer)
    with pytest.warns(UserWarning, match=r"needs 32 pools .* 25 were left in two epochs"):
        train(loader, model, optimizer)
    assert not loader.trials and loader.stats["samples"] == 2 * 50 * B


def test_the_end_of_an_epoch_is_waited_for():
    model, optimizer = begun()
    loader = make(model, count=80, warmup_steps=30)
    train(loader, model, optimizer)
    assert not loader.trials
    train(loader, model, optimizer)
    assert loader.trials[0]["step"] == 80


def test_shards_bring_their_own_held_out_text():
    shards = TokenShards("shards/demo", seed=0)
    rows = list(shards.held_out(4))
    expected = TokenShards("shards/demo", split="val").batches(4)
    for found, wanted in zip(rows, expected, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- restarts


def test_a_restart_goes_on_with_the_gate_as_it_stood():
    model, optimizer = begun()
    whole = make(model, count=700, gated=gate(optimizer=optimizer))
    start = json.loads(json.dumps(weights(model)))
    expected = train(whole, model, optimizer, 200)
    assert [each["step"] for each in whole.trials] == [40, 192]
    for stop in (39, 41, 193):
        model, optimizer = begun()
        assert weights(model) == start
        before = make(model, count=700, gated=gate(optimizer=optimizer))
        seen = train(before, model, optimizer, stop)
        state = json.loads(json.dumps(before.state_dict()))
        after = make(model, count=700, gated=gate(optimizer=optimizer))
        after.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a list is resumed by drawing it again
            seen += train(after, model, optimizer, 200 - stop)
        assert seen == expected and after.trials == whole.trials, stop
        for name in ("trials", "trial_gain", "trial_steps_spent"):
            assert after.stats[name] == whole.stats[name]


@pytest.mark.parametrize(
    "change", [{"open": 1}, {"next": -1}, {"history": [{"gain": math.nan}]}, {"spent": None}]
)
def test_a_damaged_state_is_refused(change):
    model, optimizer = begun()
    loader = make(model)
    train(loader, model, optimizer, 2)
    state = loader.state_dict()
    state["trials"] = state["trials"] | change
    with pytest.raises(StateError, match="trials"):
        make(model).load_state_dict(state)


# ---- what it refuses


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"steps": 0}, ValueError, "steps must be an int of at least 1"),
        ({"repeats": 1}, ValueError, "repeats must be an int of at least 2"),
        ({"share": 0}, ValueError, "share must be a number above 0"),
        ({"share": True}, ValueError, "share must be a number above 0"),
        ({"cost": -0.1}, ValueError, "cost must be what scoring a pool takes"),
        ({"least": -1}, ValueError, "least must be a gain in nats"),
        ({"held_out": "val"}, TypeError, "held_out must be batches"),
        ({"held_out": 3}, TypeError, "held_out must be batches"),
        ({"held_out_rows": 0}, ValueError, "held_out_rows must be an int of at least 1"),
    ],
)
def test_a_gate_checks_itself(options, error, text):
    with pytest.raises(error, match=text):
        TrialGate(**options)


def test_other_data_than_shards_needs_held_out_batches():
    with pytest.raises(ValueError, match=r"TrialGate\(held_out=\[\.\.\.\]\)"):
        make(begun()[0], gated="trial", audit_every=10)


def test_no_held_out_batches_are_told_of_at_the_first_batch():
    loader = make(begun()[0], gated=TrialGate(held_out=[], cost=0.1))
    with pytest.raises(ValueError, match="held_out has no batches"):
        next(iter(loader))


def test_a_model_without_a_loss_of_its_own_is_told_of_at_the_first_batch():
    class Bare(Net):
        def forward(self, ids: Tensor):
            return super().forward(ids).logits

    loader = make(Bare())
    with pytest.raises(ScoringError, match=r"TrialGate\(loss=\.\.\.\)"):
        next(iter(loader))


def test_batches_that_are_no_dicts_are_told_of_at_the_first_one():
    pairs = [(each["ids"], each["labels"]) for each in batches("planted", 4)]
    loader = SiftingDataLoader.wrap(
        pairs, model=begun()[0], shift_labels=False, gate=gate(), audit_every=0
    )
    with pytest.raises(ScoringError, match=r"a tuple gives none; .* TrialGate\(loss=\.\.\.\)"):
        next(iter(loader))


def test_what_fails_in_a_step_of_a_copy_does_so_long_before_the_first_trial():
    # A field that the loop takes away before its forward, and a trial does not.
    model, optimizer = begun()
    rows = [{**each, "id": torch.arange(B)} for each in batches("planted", 20)]
    loader = SiftingDataLoader.wrap(
        rows, model=model, shift_labels=False, warmup_steps=100, audit_every=0, gate=gate()
    )
    handed = 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'id'"):
        for batch in loader:
            handed += 1
            del batch["id"]
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert handed == 1


def test_candidates_are_looked_at_once(monkeypatch):
    from siftloader import trials as room

    made, early = [], room.EarlyExit
    monkeypatch.setattr(room, "EarlyExit", lambda *args: made.append(args) or early(*args))
    model, optimizer = begun()
    loader = make(model, count=60, warmup_steps=2, gated=gate(steps=2, repeats=2, least=0.0))
    for _ in range(2):
        train(loader, model, optimizer, 10)
        loader._open = True
    assert loader.stats["candidates"] and len(made) == 1


def test_batches_that_never_end_are_read_no_further_than_needed():
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield from batches("hard", 1)

    loader = make(begun()[0], gated=gate(held_out=endless(), held_out_rows=2 * B))
    assert not drawn
    next(iter(loader))
    assert len(drawn) == 2


def test_a_loss_of_the_loop_is_trained_on():
    class Bare(Net):
        def forward(self, ids: Tensor):
            return super().forward(ids).logits

    def loss(model, batch):
        return nn.functional.cross_entropy(
            model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
        )

    torch.manual_seed(0)
    model = Bare()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loader = make(model, gated=gate(loss=loss))
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if step == 45:
            break
    assert len(loader.trials) == 1


def test_it_works_on_a_dataloader_in_place_of_torchs():
    rows = drawn("planted", 1200, 0)
    dataset = [{name: value[i] for name, value in rows.items()} for i in range(1200)]
    model, optimizer = begun()
    loader = SiftingDataLoader(
        dataset,
        B,
        shuffle=True,
        model=model,
        shift_labels=False,
        warmup_steps=10,
        audit_every=5,
        gate=TrialGate(held_out=DataLoader(dataset[:64], 32), steps=4, repeats=3),
    )
    train(loader, model, optimizer, 40)
    assert loader.stats["trials"] == 1
