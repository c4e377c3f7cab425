"""Which cheap statistic predicts what sifting gains? python tools/gate_settings.py run, then ... table

A *setting* is a mix of data, a stage of training, and a way to score. At each stage of a plain run, a number of
statistics are measured that a training loop could compute there, without knowing the future; then model and optimizer
are forked, and the same pools train it for ``--fork`` steps, rate falling to zero, plainly (a random half of each pool, and
the other half) and sifted in several ways. What the held-out loss is lower by is the gain. Held-out text is what users
care about: free of noise and repetitions.

    python tools/gate_settings.py run --shards shards/built/gpt --seeds 0 1 2 --out tools/results/gate
    python tools/gate_settings.py table --out tools/results/gate --png gate.png

A run of a mix and a seed is a file of JSON lines, one for each stage, first what it ran on; stages that are there
are not run again. Letters: K pools of P rows, b kept, T tokens of a row.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import siftloader
from siftloader import TokenShards, World


Array = NDArray[Any]

T = 64  # tokens of a row
P, B = 32, 16  # candidates, and how many of them are kept
RATE, WARMUP = 2e-3, 20
COSTS = (0.06, 0.29)  # of scoring, in plain steps: BERT's layer 1 and a small GPT's


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured."""

    stages: tuple[int, ...] = (60, 250, 800)
    forks: int = 80  # steps of a fork
    pools: int = 12  # measured at each stage
    folds: int = 4  # of these pools, where a direction must not meet the rows it was made of
    looks: int = 4  # look-aheads
    ahead: int = 5  # steps of each
    held: int = 512  # held-out rows
    layers: int = 3
    width: int = 64

    @property
    def longest(self) -> int:
        """Steps of plain training that take as long as a fork that pays for its scoring."""
        return round(self.forks * (1 + COSTS[-1]))

    @property
    def fresh(self) -> int:
        """Rows measured at a stage."""
        return (self.pools + JUDGES + self.looks * self.ahead) * P


JUDGES = 4  # pools that look-aheads are judged by


# --- data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """Rows of several kinds in these shares; ``held`` are the shares of what is held out."""

    shares: dict[str, float]
    held: dict[str, float]

    def rows(self, count: int, text: Array, rng: np.random.Generator, held: bool = False) -> Array:
        """[count, T] ids in random order; as many of each kind as their share says, on average."""
        shares = self.held if held else self.shares
        which = rng.choice(len(shares), size=count, p=np.array([*shares.values()]))
        found = np.empty((count, T), np.int64)
        for number, kind in enumerate(shares):
            here = which == number
            found[here] = KINDS[kind](int(here.sum()), text, rng)
        return found


def prose(count: int, text: Array, rng: np.random.Generator) -> Array:
    """Text that comes once, as long as there is any: [count, T]."""
    orders = [rng.permutation(len(text)) for _ in range(-(-count // len(text)) or 1)]
    return text[np.concatenate(orders)[:count]]


def repeated(count: int, text: Array, rng: np.random.Generator) -> Array:
    """64 rows of the text, over and over."""
    return text[-64:][rng.integers(0, 64, count)]


def copied(count: int, text: Array, rng: np.random.Generator) -> Array:
    """The same 64 rows, each time with a tenth of the tokens replaced by others of the text."""
    found, other = repeated(count, text, rng), rng.choice(text.ravel(), (count, T))
    return np.where(rng.random((count, T)) < 0.1, other, found)


def foreign(count: int, text: Array, rng: np.random.Generator) -> Array:
    """Another language as it were: the same text, every id another."""
    return np.random.default_rng(5).permutation(VOCABULARY)[prose(count, text, rng)]


def shuffled(count: int, text: Array, rng: np.random.Generator) -> Array:
    """Noise that looks like text: the tokens of each row in any order."""
    return rng.permuted(prose(count, text, rng), axis=1)


def random(count: int, text: Array, rng: np.random.Generator) -> Array:
    """Noise: any ids, of which nothing can be learned."""
    return rng.integers(0, VOCABULARY, (count, T))


def easy(count: int, text: Array, rng: np.random.Generator) -> Array:
    """One or two tokens, over and over."""
    two = rng.integers(0, VOCABULARY, (count, 2))
    two[rng.random(count) < 0.5, 1] = -1
    two[:, 1] = np.where(two[:, 1] < 0, two[:, 0], two[:, 1])
    return np.tile(two, (1, T // 2))


def chain(count: int, rng: np.random.Generator, first: int, states: int, branches: int) -> Array:
    """A Markov chain on ids from ``first``, each with equally likely followers: all rows are equally hard."""
    follow = np.random.default_rng([first, states, branches]).integers(
        0, states, (states, branches)
    )
    at = rng.integers(0, states, count)
    found = np.empty((count, T), np.int64)
    for t in range(T):
        found[:, t] = at
        at = follow[at, rng.integers(0, branches, count)]
    return first + found


def quick(count: int, text: Array, rng: np.random.Generator) -> Array:
    """A chain soon learned (64 states), 2.08 nats a token."""
    return chain(count, rng, 0, 64, 8)


def slow(count: int, text: Array, rng: np.random.Generator) -> Array:
    """A chain that takes long to learn (768 states), in the end as easy."""
    return chain(count, rng, 256, 768, 8)


def smeared(count: int, text: Array, rng: np.random.Generator) -> Array:
    """The slow chain with a quarter of its tokens lost: noise everywhere alike."""
    found = slow(count, text, rng)
    return np.where(rng.random((count, T)) < 0.25, rng.integers(256, 1024, (count, T)), found)


def wide(count: int, text: Array, rng: np.random.Generator) -> Array:
    """A chain soon learned that stays hard: any of 64 tokens may follow, 4.16 nats."""
    return 128 + rng.integers(0, 64, (count, T))


def held_is(mix: Mix) -> str:
    """Whether what is held out is what is trained on."""
    return "as trained" if mix.shares == mix.held else "cleaner"


VOCABULARY = 1024
KINDS: dict[str, Callable[[int, Array, np.random.Generator], Array]] = {
    each.__name__: each
    for each in (
        *(prose, repeated, copied, foreign, shuffled, random),
        *(easy, quick, slow, smeared, wide),
    )
}
MIXES = {
    "prose": Mix({"prose": 1}, {"prose": 1}),
    "repeated-half": Mix({"prose": 0.5, "repeated": 0.5}, {"prose": 1}),
    "shuffled-half": Mix({"prose": 0.5, "shuffled": 0.5}, {"prose": 1}),
    "easy-most": Mix({"prose": 0.25, "easy": 0.75}, {"prose": 0.25, "easy": 0.75}),
    "identical": Mix({"slow": 1}, {"slow": 1}),
    "hard-learnable": Mix({"quick": 0.75, "slow": 0.25}, {"quick": 0.75, "slow": 0.25}),
    "hard-for-good": Mix({"slow": 0.75, "wide": 0.25}, {"slow": 0.75, "wide": 0.25}),
    "random-quarter": Mix({"prose": 0.75, "random": 0.25}, {"prose": 1}),
    "two-domains": Mix({"prose": 0.875, "foreign": 0.125}, {"prose": 0.875, "foreign": 0.125}),
    "repeated-most": Mix({"prose": 0.2, "repeated": 0.8}, {"prose": 1}),
    "repeated-noisy": Mix({"prose": 0.4, "repeated": 0.4, "random": 0.2}, {"prose": 1}),
    "hard-noisy": Mix({"quick": 0.6, "slow": 0.2, "random": 0.2}, {"quick": 0.75, "slow": 0.25}),
    "copied-half": Mix({"prose": 0.5, "copied": 0.5}, {"prose": 1}),
    "identical-noise": Mix({"smeared": 1}, {"slow": 1}),
    "shuffled-tenth": Mix({"prose": 0.9, "shuffled": 0.1}, {"prose": 1}),
    "easy-half": Mix({"prose": 0.5, "easy": 0.5}, {"prose": 0.5, "easy": 0.5}),
    "chain-quarter": Mix({"prose": 0.75, "slow": 0.25}, {"prose": 0.75, "slow": 0.25}),
    "two-domains-half": Mix({"prose": 0.5, "foreign": 0.5}, {"prose": 0.5, "foreign": 0.5}),
    "repeated-tenth": Mix({"prose": 0.9, "repeated": 0.1}, {"prose": 1}),
    "identical-quick": Mix({"quick": 1}, {"quick": 1}),
}


def texts(shards: Path) -> tuple[Array, Array]:
    """Training and held-out text of shards as rows of T ids; 0 stands for all but the commonest."""
    found = []
    for split in ("train", "val"):
        read = TokenShards(shards, split=split, seed=0, world=World())
        rows = np.concatenate([np.asarray(each["input_ids"])[None] for each in read])
        found.append(rows[:, : rows.shape[1] // T * T].reshape(-1, T).astype(np.int64))
    counts = np.bincount(found[0].ravel())
    id_of = np.zeros(max(each.max() for each in found) + 1, np.int64)
    common = np.argsort(-counts, kind="stable")[: VOCABULARY - 1]
    id_of[common] = 1 + np.arange(len(common))
    return id_of[found[0]], id_of[found[1]]


# --- the model ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        parts = self.qkv(self.before(x)).view(rows, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))


class GPT(nn.Module):
    """Ids [P, T] to logits [P, T, V]; the head is the embedding."""

    def __init__(self, layers: int, width: int, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(T, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, each in self.named_parameters():
            if each.ndim > 1:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(each, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(each)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.place.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def at(self, input_ids: Tensor, layers: int) -> Tensor:
        """Logits of the first ``layers`` layers under the model's own norm and head."""
        x = self.embedding(input_ids) + self.place.weight[: input_ids.shape[1]]
        for block in itertools.islice(self.blocks, layers):
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def token_losses(logits: Tensor, rows: Tensor) -> Tensor:
    """[P, T - 1] nats: how badly each next token was foreseen."""
    flat = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return flat.view(len(rows), -1)


def token_entropies(logits: Tensor) -> Tensor:
    """[P, T - 1] nats."""
    log = logits.log_softmax(-1)
    return -(log.exp() * log).sum(-1)


@torch.no_grad()
def row_losses(model: GPT, rows: Tensor) -> Tensor:
    """[rows] mean losses, nats, of the whole model."""
    return torch.cat(
        [token_losses(model(each[:, :-1]), each).mean(1) for each in rows.split(2 * P)]
    )


# --- training -----------------------------------------------------------------------------------------------

Score = Callable[[GPT, Tensor], Tensor]


@dataclass(frozen=True)
class Counts:
    """What token counts say of text, fixed before training: ``alone`` [V] and ``given`` [V, V], -log p in nats."""

    alone: Tensor
    given: Tensor

    @classmethod
    def of(cls, rows: Array) -> Counts:
        counts = np.bincount(rows.ravel(), minlength=VOCABULARY) + 1.0
        p = counts / counts.sum()
        pairs = np.zeros((VOCABULARY, VOCABULARY))
        np.add.at(pairs, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
        given = (pairs + 20 * p) / (pairs.sum(1, keepdims=True) + 20)
        return cls(torch.tensor(-np.log(p)).float(), torch.tensor(-np.log(given)).float())

    def unigram(self, rows: Tensor) -> Tensor:
        """[P] mean nats a token."""
        return self.alone[rows[:, 1:]].mean(1)

    def bigram(self, rows: Tensor) -> Tensor:
        """[P] mean nats a token, given the one before."""
        return self.given[rows[:, :-1], rows[:, 1:]].mean(1)


def criteria(counts: Counts) -> dict[str, Score]:
    """The ways to score that are compared, by name."""

    def loss(model: GPT, rows: Tensor) -> Tensor:
        return token_losses(model.at(rows[:, :-1], 1), rows).mean(1)

    def entropy(model: GPT, rows: Tensor) -> Tensor:
        return token_entropies(model.at(rows[:, :-1], 1)).mean(1)

    def whole(model: GPT, rows: Tensor) -> Tensor:
        return token_losses(model(rows[:, :-1]), rows).mean(1)

    def residual(model: GPT, rows: Tensor) -> Tensor:
        return loss(model, rows) - counts.unigram(rows)

    return {"loss@1": loss, "entropy@1": entropy, "loss@N": whole, "residual@1": residual}


def optimizer_of(model: GPT) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)


def fork(model: GPT, optimizer: torch.optim.AdamW) -> tuple[GPT, torch.optim.AdamW]:
    """Copies of both that go on as these would."""
    model = copy.deepcopy(model)
    twin = optimizer_of(model)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, twin


def step(model: GPT, optimizer: torch.optim.AdamW, rows: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    token_losses(model(rows[:, :-1]), rows).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def top(scores: Tensor) -> Tensor:
    """[b] the indices of the highest of [P] scores, rising."""
    return scores.argsort(descending=True, stable=True)[:B].sort().values


def gain_of(
    model: GPT,
    optimizer: torch.optim.AdamW,
    pools: Sequence[Tensor],
    held: Tensor,
    choose: Callable[[GPT, int, Tensor], Tensor],
) -> float:
    """The held-out loss, nats, after a step on the chosen rows of each pool, the rate falling to zero."""
    model, optimizer = fork(model, optimizer)
    for number, pool in enumerate(pools):
        with torch.no_grad():
            kept = choose(model, number, pool)
        step(model, optimizer, pool[kept], RATE * (1 - (number + 0.5) / len(pools)))
    return float(row_losses(model, held).mean())


# --- what is measured at a stage ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the statistics of a way to score are made of: rows [K, P], nats.

    ``grams``, by metric, are the inner products [3K, 3K] of the gradients of the kept half of each pool, of a random
    half of each, and of as many held-out rows; ``own`` [2, 2, F] how far a step of Adam's along the kept and along random halves
    goes down the loss of other pools, then of held-out rows, by fold; ``ahead`` [L, 2, 2] the loss on other rows, and on
    held-out ones, after steps on kept and on random halves.
    """

    scores: Array
    full_scores: Array
    losses: Array
    early_losses: Array
    entropies: Array
    unigrams: Array
    bigrams: Array
    before: Array  # losses of the model as it was a quarter of the steps ago
    within: Array  # variance of the losses of a row's tokens
    held: float
    grams: dict[str, Array]
    own: Array
    ahead: Array

    @property
    def pools(self) -> int:
        return len(self.scores)

    def without(self, pool: int) -> Measured:
        """The same, less one pool, one fold and one look-ahead: for the jackknife."""
        some = np.arange(self.pools) != pool
        both = np.concatenate([some, some, some])
        fields = {
            name: getattr(self, name)[some]
            for name in (
                *("scores", "full_scores", "losses", "early_losses", "entropies"),
                *("unigrams", "bigrams", "before", "within"),
            )
        }
        return Measured(
            **fields,
            held=self.held,
            grams={name: gram[np.ix_(both, both)] for name, gram in self.grams.items()},
            own=np.delete(self.own, pool % self.own.shape[-1], -1),
            ahead=np.delete(self.ahead, pool % len(self.ahead), 0),
        )


METRICS = ("raw", "adam", "head", "norms", "last")


def measure(
    course: Course,
    earlier: GPT,
    ways: dict[str, Score],
    rows: Tensor,
    held: float,
    rng: np.random.Generator,
) -> dict[str, Measured]:
    """By the name of the way to score: what the statistics need, from fresh rows and held-out ones; the model stays as it is."""
    model, optimizer, counts, plan = course.model, course.optimizer, course.counts, course.plan
    pools = rows[: plan.pools * P].view(plan.pools, P, T)
    with torch.no_grad():
        tokens = [token_losses(model(each[:, :-1]), each) for each in pools]
        full_entropies = stack([token_entropies(model(each[:, :-1])).mean(1) for each in pools])
        scores = {name: [way(model, each) for each in pools] for name, way in ways.items()}
        before = stack([token_losses(earlier(each[:, :-1]), each).mean(1) for each in pools])
    losses = stack([each.mean(1) for each in tokens])
    unigrams = stack([counts.unigram(each) for each in pools])
    halves = [torch.as_tensor(np.sort(rng.permutation(P)[:B])) for _ in pools]
    at_random = gradients(model, [each[half] for each, half in zip(pools, halves, strict=True)])
    goals, clean = course.aside.tensor_split([plan.pools * B])
    held_out = gradients(model, goals.view(plan.pools, B, T))
    metrics = metrics_of(model, optimizer)
    judges, rest = rows[plan.pools * P :].tensor_split([JUDGES * P])
    ahead = look_ahead(model, optimizer, ways, rest, (judges, clean), rng, plan)

    found = {}
    for name in ways:
        kept = gradients(
            model, [each[top(score)] for each, score in zip(pools, scores[name], strict=True)]
        )
        both = torch.cat([kept, at_random, held_out])
        full = {"entropy@1": full_entropies, "residual@1": losses - unigrams}.get(name, losses)
        found[name] = Measured(
            scores=stack(scores[name]),
            full_scores=full,
            losses=losses,
            early_losses=losses if name == "loss@N" else stack(scores["loss@1"]),
            entropies=full_entropies,
            unigrams=unigrams,
            bigrams=stack([counts.bigram(each) for each in pools]),
            before=before,
            within=stack([each.var(1) for each in tokens]),
            held=held,
            grams={
                metric: ((both * weight) @ both.T).double().numpy()
                for metric, weight in metrics.items()
            },
            own=own_directions(kept, at_random, held_out, plan.folds),
            ahead=ahead[name],
        )
    return found


def stack(each: Iterable[Tensor]) -> Array:
    return torch.stack([*each]).double().numpy()


def gradients(model: GPT, batches: Iterable[Tensor]) -> Tensor:
    """[K, parameters]: the gradient of the mean loss of each batch."""
    found = []
    for rows in batches:
        loss = token_losses(model(rows[:, :-1]), rows).mean()
        parts = torch.autograd.grad(loss, [*model.parameters()])
        found.append(torch.cat([each.flatten() for each in parts]))
    return torch.stack(found)


def metrics_of(model: GPT, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """By name, the weight [parameters] of each coordinate in an inner product."""
    names = [*dict(model.named_parameters())]

    def only(chosen: Callable[[str], bool]) -> Tensor:
        return torch.cat(
            [
                torch.full((each.numel(),), float(chosen(name)))
                for name, each in zip(names, model.parameters(), strict=True)
            ]
        )

    moments = torch.cat(
        [optimizer.state[each]["exp_avg_sq"].flatten() for each in model.parameters()]
    )
    steps = float(optimizer.state[next(model.parameters())]["step"])
    last = f"blocks.{len(model.blocks) - 1}."
    return {
        "raw": torch.ones(len(moments)),
        "adam": 1 / ((moments / (1 - 0.98**steps)).sqrt() + 1e-8),
        "head": only(lambda name: name == "embedding.weight"),
        "norms": only(lambda name: "norm" in name or "before" in name or "between" in name),
        "last": only(lambda name: name.startswith(last)),
    }


def own_directions(kept: Tensor, at_random: Tensor, held_out: Tensor, folds: int) -> Array:
    """[2, 2, F]: how steeply the mean gradient, divided by the root of its own mean square, goes down other pools' loss.

    First of kept and of random halves; then down the loss of random halves and of held-out rows. So does
    Adam go once its moments have seen nothing but such batches. Each fold's directions are made of the
    other folds' pools.
    """
    found = np.zeros((2, 2, folds))
    fold_of = torch.arange(len(kept)) % folds
    for fold in range(folds):
        goals = [each[fold_of == fold].mean(0) for each in (at_random, held_out)]
        for which, each in enumerate((kept, at_random)):
            others = each[fold_of != fold]
            direction = others.mean(0) / (others.square().mean(0).sqrt() + 1e-8)
            found[which, :, fold] = [float(direction @ goal) for goal in goals]
    return found


def look_ahead(
    model: GPT,
    optimizer: torch.optim.AdamW,
    ways: dict[str, Score],
    rows: Tensor,
    judges: tuple[Tensor, Tensor],
    rng: np.random.Generator,
    plan: Plan,
) -> dict[str, Array]:
    """By way to score [L, 2, 2]: the losses of both ``judges`` after a few steps on kept and on random halves of pools."""
    pools = rows[: plan.looks * plan.ahead * P].view(plan.looks, plan.ahead, P, T)
    halves = [
        [torch.as_tensor(rng.permutation(P)[:B]) for _ in range(plan.ahead)]
        for _ in range(plan.looks)
    ]

    def after(look: int, choose: Callable[[GPT, int, Tensor], Tensor]) -> list[float]:
        twin, own = fork(model, optimizer)
        for number, pool in enumerate(pools[look]):
            with torch.no_grad():
                kept = choose(twin, number, pool)
            step(twin, own, pool[kept], RATE)
        return [float(row_losses(twin, each).mean()) for each in judges]

    plain = [
        after(look, lambda _, n, __, look=look: halves[look][n]) for look in range(plan.looks)
    ]
    return {
        name: np.array(
            [
                [after(look, lambda twin, _, pool, way=way: top(way(twin, pool))), plain[look]]
                for look in range(plan.looks)
            ]
        )
        for name, way in ways.items()
    }


# --- statistics ---------------------------------------------------------------------------------------------


def statistics(m: Measured) -> dict[str, float]:
    """Everything that might tell, from what was measured, whether sifting will pay; nan where it has no value."""
    kept = top_mask(m.scores)
    progress = m.before - m.losses
    loss = m.losses.mean()
    between = m.losses.var(axis=1, ddof=1).mean()
    by_chance = m.within.mean() / (T - 1)
    found = {
        "rho": m.losses[kept].mean() / loss,
        "rho of the best": m.losses[top_mask(m.losses)].mean() / loss,
        "lift": lift(m.losses, kept),
        "lift over unigrams": lift(m.losses - m.unigrams, kept),
        "lift over bigrams": lift(m.losses - m.bigrams, kept),
        "lift of progress": lift(progress, kept),
        "progress ratio": lift(progress, kept) / (abs(progress.mean()) or math.nan),
        "lift of loss - entropy": lift(m.losses - m.entropies, kept),
        "progress": progress.mean(),
        "loss": loss,
        "loss / unigrams": loss / m.unigrams.mean(),
        "std": math.sqrt(between),
        "cv": math.sqrt(between) / loss,
        "iqr": float(np.mean(np.subtract(*np.quantile(m.losses, [0.75, 0.25], axis=1)))),
        "score std": m.scores.std(axis=1, ddof=1).mean(),
        "spread over chance": between / by_chance,
        "spread beyond chance": math.sqrt(max(0.0, between - by_chance)),
        "easy share": float((m.losses < loss / 2).mean()),
        "lowest quarter": quarter(m.losses, 0) / loss,
        "highest quarter": quarter(m.losses, -1) / loss,
        "loss ~ unigrams": by_pool(spearman, m.losses, m.unigrams),
        "residual share": (m.losses - m.unigrams).std(axis=1).mean() / m.losses.std(axis=1).mean(),
        "score ~ progress": by_pool(spearman, m.scores, progress),
        "score ~ full score": by_pool(spearman, m.scores, m.full_scores),
        "overlap": float(top_mask(m.full_scores)[kept].mean()),
        "sigma": float((np.log(m.early_losses) - np.log(m.losses)).std()),
        "change of rho": loss_share(m.losses) - loss_share(m.before),
        "held-out gap": m.held - loss,
        "ahead": float((m.ahead[:, 1, 0] - m.ahead[:, 0, 0]).mean()),
        "ahead, held-out": float((m.ahead[:, 1, 1] - m.ahead[:, 0, 1]).mean()),
        "own steps": m.own[0, 0].sum() / m.own[1, 0].sum(),
        "own steps, held-out": (m.own[0, 1].sum() - m.own[1, 1].sum()) / abs(m.own[1, 1].sum()),
    }
    for metric, gram in m.grams.items():
        found |= {f"{name}, {metric}": value for name, value in alignment(gram).items()}
    return {name: float(value) for name, value in found.items()}


def alignment(gram: Array) -> dict[str, float]:
    """Of gradients' inner products [3K, 3K], kept halves first: no product is of rows with themselves.

    ``align``: <g_kept, g> / <g, g>, of expected gradients. ``cosine``: the same, each batch's gradient cut to one length.
    ``angle``: the cosine of the expected gradients. ``snr``: how much of a batch's gradient is signal, kept over random.
    ``held-out``: how much more of g_held the kept go down than random halves do, each cut to one length and in parts of
    what held-out rows themselves do; ``apart``: the cosine of g and g_held.
    """
    k = len(gram) // 3
    off = ~np.eye(k, dtype=bool)
    kept, at_random, held = (gram[n * k : (n + 1) * k] for n in range(3))
    kk, kr, kh = kept[:, :k][off].mean(), kept[:, k : 2 * k][off].mean(), kept[:, 2 * k :].mean()
    rr, rh, hh = (
        at_random[:, k : 2 * k][off].mean(),
        at_random[:, 2 * k :].mean(),
        held[:, 2 * k :][off].mean(),
    )
    long, short, straight = (
        math.sqrt(np.trace(gram[n * k :, n * k :][:k, :k]) / k) for n in range(3)
    )
    return {
        "align": kr / rr,
        "cosine": kr / rr * short / long,
        "angle": kr / math.sqrt(kk * rr) if min(kk, rr) > 0 else math.nan,
        "snr": kk / rr * (short / long) ** 2,
        "length": long / short,
        "held-out": (kh / long - rh / short) / (hh / straight) if hh > 0 else math.nan,
        "apart": rh / math.sqrt(rr * hh) if min(rr, hh) > 0 else math.nan,
    }


def top_mask(scores: Array) -> Array:
    """Of [K, P], the b highest of each pool; the lower position wins a tie."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :B]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def lift(values: Array, kept: Array) -> float:
    """By how much the mean of the kept lies above that of all."""
    return float(values[kept].mean() - values.mean())


def loss_share(losses: Array) -> float:
    return float(losses[top_mask(losses)].mean() / losses.mean())


def quarter(losses: Array, which: int) -> float:
    """The mean of the lowest (0) or highest (-1) quarter of each pool."""
    ranked = np.sort(losses, axis=1)
    size = ranked.shape[1] // 4
    return float((ranked[:, :size] if which == 0 else ranked[:, -size:]).mean())


def by_pool(function: Callable[[Array, Array], float], a: Array, b: Array) -> float:
    return float(np.mean([function(x, y) for x, y in zip(a, b, strict=True)]))


def ranks(values: Array) -> Array:
    """Ranks from 0, the mean of those that tie."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two vectors; 0 where one of them is constant."""
    x, y = ranks(np.asarray(a)), ranks(np.asarray(b))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else 0.0


def with_noise(m: Measured) -> dict[str, tuple[float, float]]:
    """Every statistic with its standard error over pools, by the jackknife."""
    whole = statistics(m)
    each = [statistics(m.without(pool)) for pool in range(m.pools)]
    found = {}
    for name, value in whole.items():
        kind = name.split(",")[0]
        few = {"own steps": m.own.shape[-1], "ahead": len(m.ahead)}.get(kind, m.pools)
        values = np.array([one[name] for one in each[:few]])
        found[name] = (value, math.sqrt((few - 1) * values.var()))
    return found


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A plain run of a mix: rows in the order they are trained on, held-out ones, and how to score."""

    plan: Plan
    rows: Tensor
    held: Tensor
    aside: Tensor  # held-out rows for measuring, not for judging
    counts: Counts
    model: GPT
    optimizer: torch.optim.AdamW

    @classmethod
    def of(cls, name: str, seed: int, plan: Plan, text: tuple[Array, Array]) -> Course:
        mix = MIXES[name]
        count = max(plan.stages) * B + plan.fresh + plan.longest * P
        stream = mix.rows(count, text[0], np.random.default_rng([seed, 1]))
        held = mix.rows(plan.held, text[1], np.random.default_rng([seed, 2]), held=True)
        count = plan.pools * B + JUDGES * P
        aside = mix.rows(count, text[1], np.random.default_rng([seed, 5]), held=True)
        torch.manual_seed(seed)
        model = GPT(plan.layers, plan.width)
        tensors = [torch.as_tensor(each) for each in (stream, held, aside)]
        return cls(plan, *tensors, Counts.of(stream), model, optimizer_of(model))

    def fresh(self, stage: int) -> tuple[Tensor, Tensor]:
        """Rows that the model did not see by this stage: those to measure, and pools [N, P, T] to train on."""
        measured, rest = self.rows[stage * B :].tensor_split([self.plan.fresh])
        return measured, rest[: self.plan.longest * P].view(-1, P, T)

    def step(self, number: int) -> None:
        batch = self.rows[number * B : (number + 1) * B]
        step(self.model, self.optimizer, batch, RATE * min(1, (number + 1) / WARMUP))


def run(
    name: str,
    seed: int,
    plan: Plan,
    text: tuple[Array, Array],
    path: Path,
    raw: Path | None = None,
) -> None:
    """Train plainly through the stages; measure and fork at each that ``path`` does not have yet."""
    missing = set(plan.stages) - {line["stage"] for line in lines_of(path)}
    if not missing:
        return
    course = Course.of(name, seed, plan, text)
    model, optimizer, ways = course.model, course.optimizer, criteria(course.counts)
    earlier: dict[int, GPT] = {}
    start(path, {"machine": machine(), "mix": name, "seed": seed, "forks": plan.forks})
    for number in range(max(missing) + 1):
        earlier |= {s: copy.deepcopy(model) for s in missing if round(0.75 * s) == number}
        if number in missing:
            begun = time.perf_counter()
            fresh, pools = course.fresh(number)
            loss = float(row_losses(model, course.held).mean())
            rng = np.random.default_rng([seed, 3, number])
            found = measure(course, earlier.pop(number), ways, fresh, loss, rng)
            measuring = time.perf_counter() - begun
            rng = np.random.default_rng([seed, 4, number])
            losses = forked(model, optimizer, ways, pools, course.held, rng, plan)
            told = {
                way: {
                    key: [float(f"{v:.5g}") for v in pair] for key, pair in with_noise(m).items()
                }
                for way, m in found.items()
            }
            for way, m in found.items() if raw else ():
                keep(m, raw / f"{path.stem}-{number}-{way}.npz")
            line = {"mix": name, "seed": seed, "stage": number, "held": loss, "losses": losses}
            seconds = [round(measuring, 1), round(time.perf_counter() - begun, 1)]
            write(path, line | {"statistics": told, "seconds": seconds})
        course.step(number)


MARKS = (1, 2, 5, 10, 20, 36)  # steps of one long look-ahead, as many as there are measured pools
FOLLOWED = ("loss@1", "entropy@1")


def look_far(name: str, seed: int, plan: Plan, text: tuple[Array, Array], path: Path) -> None:
    """At each stage that ``path`` does not have yet: one look-ahead, judged by held-out rows as it goes on."""
    missing = set(plan.stages) - {line["stage"] for line in lines_of(path)}
    if not missing:
        return
    course = Course.of(name, seed, plan, text)
    ways = criteria(course.counts)
    start(path, {"machine": machine(), "mix": name, "seed": seed, "marks": MARKS})
    for number in range(max(missing) + 1):
        if number in missing:
            pools = course.fresh(number)[0].view(-1, P, T)
            rng = np.random.default_rng([seed, 6, number])
            halves = [torch.as_tensor(rng.permutation(P)[:B]) for _ in pools]
            after = {"random": follow(course, pools, lambda _, n, __, halves=halves: halves[n])}
            for way in FOLLOWED:
                after[way] = follow(
                    course, pools, lambda m, _, pool, way=way: top(ways[way](m, pool))
                )
            write(path, {"mix": name, "seed": seed, "stage": number, "after": after})
        course.step(number)


def follow(
    course: Course, pools: Tensor, choose: Callable[[GPT, int, Tensor], Tensor]
) -> list[float]:
    """Losses of the held-out rows aside, nats, after MARKS steps at full rate on the chosen rows of each pool."""
    model, optimizer = fork(course.model, course.optimizer)
    found = []
    for number, pool in enumerate(pools[: max(MARKS)], 1):
        with torch.no_grad():
            kept = choose(model, number - 1, pool)
        step(model, optimizer, pool[kept], RATE)
        if number in MARKS:
            found.append(float(row_losses(model, course.aside).mean()))
    return found


def forked(
    model: GPT,
    optimizer: torch.optim.AdamW,
    ways: dict[str, Score],
    pools: Tensor,
    held: Tensor,
    rng: np.random.Generator,
    plan: Plan,
) -> dict[str, float]:
    """Held-out losses, nats: of plain training on either half, for longer, and of every way to sift."""
    orders = [torch.as_tensor(rng.permutation(P)) for _ in pools]
    short = pools[: plan.forks]
    found = {
        "plain": gain_of(model, optimizer, short, held, lambda _, n, __: orders[n][:B]),
        "other half": gain_of(model, optimizer, short, held, lambda _, n, __: orders[n][B:]),
        "longer": gain_of(model, optimizer, pools, held, lambda _, n, __: orders[n][:B]),
    }
    for name, way in ways.items():
        found[name] = gain_of(
            model, optimizer, short, held, lambda m, _, pool, way=way: top(way(m, pool))
        )
    return found


def keep(m: Measured, path: Path) -> None:
    """Write what the statistics were made of, so that others can be tried."""
    fields = {name: value for name, value in vars(m).items() if name != "grams"}
    grams = {f"gram {name}": gram for name, gram in m.grams.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **fields, **grams)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The stages of a run, without its first line; a line that was cut off does not count."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in found if "stage" in line]


def start(path: Path, line: dict[str, Any]) -> None:
    """Begin a file, or go on with one: a line that was cut off ends here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write(path, line)
    elif not path.read_text().endswith("\n"):
        with path.open("a") as file:
            file.write("\n")


def write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def machine() -> str:
    try:
        cpu = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, {torch.get_num_threads()} threads | Python {platform.python_version()}, torch "
        f"{torch.__version__}, numpy {np.__version__}, siftloader {siftloader.__version__} | "
        f"{datetime.date.today()}"
    )


# --- which statistic predicts the gain ----------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One mix, stage and way to score: means over seeds, nats; what is positive is gained by sifting."""

    mix: str
    stage: int
    way: str
    seeds: int
    gain: float  # after as many samples
    gains: tuple[float, ...]  # of each seed
    error: float  # its standard error over seeds, nan of one
    paid: tuple[float, ...]  # gain in equal time, for each of COSTS
    chance: float  # by how much the two random halves differed, root mean square
    values: dict[str, float]
    noise: dict[str, float]  # standard error of a statistic of one seed's pools


def settings_of(folder: Path, ways: Sequence[str] = ()) -> list[Setting]:
    """Every setting of the runs in ``folder``, in order."""
    found: dict[tuple[str, int, str], list[tuple[dict[str, Any], str]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in lines_of(path):
            for way in line.get("statistics", ()):
                if not ways or way in ways:
                    found.setdefault((line["mix"], line["stage"], way), []).append((line, way))
    order = {name: number for number, name in enumerate(MIXES)}
    keys = sorted(found, key=lambda key: (order.get(key[0], len(order)), *key[1:]))
    return [setting(*key, [line for line, _ in found[key]]) for key in keys]


def setting(mix: str, stage: int, way: str, lines: Sequence[dict[str, Any]]) -> Setting:
    """From the lines of its seeds."""
    losses = [line["losses"] for line in lines]
    plain = np.array([(each["plain"] + each["other half"]) / 2 for each in losses])
    gains = plain - np.array([each[way] for each in losses])
    faster = np.array([each["plain"] - each["longer"] for each in losses]) / COSTS[-1]
    halves = np.array([each["plain"] - each["other half"] for each in losses])
    told = [line["statistics"][way] for line in lines]
    count = len(lines)
    return Setting(
        mix,
        stage,
        way,
        count,
        gain=float(gains.mean()),
        gains=tuple(map(float, gains)),
        error=float(gains.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        paid=tuple(float((gains - cost * faster).mean()) for cost in COSTS),
        chance=float(np.sqrt(np.square(halves).mean())),
        values={name: float(np.mean([each[name][0] for each in told])) for name in told[0]},
        noise={
            name: float(np.sqrt(np.mean([each[name][1] ** 2 for each in told])))
            for name in told[0]
        },
    )


@dataclass(frozen=True)
class Judged:
    """How well one statistic tells the gain, over settings. Intervals are of 95 %."""

    name: str
    all: float  # Spearman over settings
    by_setting: tuple[float, float]  # bootstrap over settings, which are not independent
    by_mix: tuple[float, float]  # bootstrap over mixes
    between: float  # Spearman of the means of mixes
    within: float  # correlation of ranks within mixes
    p: float  # that mixes in any other order correlate as much
    holm: float  # the same, for as many statistics as were tried
    right: float  # share of settings whose sign a threshold finds that was set on the other mixes
    value: float  # nats a setting gained by sifting where that threshold says so, unpaid
    at_once: float  # the same by the threshold that its meaning gives, nan where there is none
    noise: float  # standard error of the statistic over its standard deviation over settings
    steps: float  # what measuring costs, in plain steps


def judge(found: Sequence[Setting], draws: int = 1000, seed: int = 0) -> list[Judged]:
    """All statistics, the most telling first."""
    rng = np.random.default_rng(seed)
    gains = np.array([each.gain for each in found])
    names = [*found[0].values]
    x = np.array([[each.values[name] for name in names] for each in found])
    x = np.apply_along_axis(filled, 0, x)
    which = blocks(found)
    rows = [rng.integers(0, len(found), len(found)) for _ in range(draws)]
    clusters = [
        np.concatenate([which[n] for n in rng.integers(0, len(which), len(which))])
        for _ in range(draws)
    ]
    everywhere = correlations(x, gains)
    by_setting = np.array([correlations(x[each], gains[each]) for each in rows])
    by_mix = np.array([correlations(x[each], gains[each]) for each in clusters])
    ranked = np.apply_along_axis(ranks, 0, x)
    order = [shuffled_blocks(which, rng) for _ in range(5 * draws)]
    by_luck = np.array([products(ranked, ranks(gains)[each]) for each in order])
    p = (1 + (np.abs(by_luck) >= np.abs(everywhere)).sum(0)) / (1 + len(order))
    adjusted = holm(p)
    means = np.array([x[each].mean(0) for each in which])
    between = correlations(means, np.array([gains[each].mean() for each in which]))
    judged = []
    for n, name in enumerate(names):
        right, value = thresholds(x[:, n], gains, which)
        errors = np.array([each.noise[name] for each in found])
        spread = x[:, n].std()
        judged.append(
            Judged(
                name,
                float(everywhere[n]),
                interval(by_setting[:, n]),
                interval(by_mix[:, n]),
                float(between[n]),
                within(x[:, n], gains, which),
                float(p[n]),
                float(adjusted[n]),
                right,
                value,
                untuned(name, x[:, n], gains),
                float(np.sqrt((filled(errors) ** 2).mean()) / spread) if spread else math.nan,
                steps_of(name),
            )
        )
    return sorted(judged, key=lambda each: -abs(each.all))


def filled(values: Array) -> Array:
    """What has no value gets the median of what has, and tells nothing."""
    real = np.isfinite(values)
    return np.where(real, values, np.median(values[real]) if real.any() else 0.0)


def interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def correlations(x: Array, y: Array) -> Array:
    """Spearman of each column of x [N, S] with y [N]; 0 where one is constant."""
    return products(np.apply_along_axis(ranks, 0, x), ranks(y))


def products(a: Array, b: Array) -> Array:
    """Correlation of each column of a [N, S] with b [N]; 0 where one is constant."""
    a, b = a - a.mean(0), b - b.mean()
    size = np.sqrt((a * a).sum(0) * (b @ b))
    return np.divide(b @ a, size, out=np.zeros(a.shape[1]), where=size > 0)


def shuffled_blocks(which: Sequence[Array], rng: np.random.Generator) -> Array:
    """[N]: whose gain each setting gets when whole mixes change places; a short block is gone through again."""
    order = rng.permutation(len(which))
    taken = np.empty(sum(map(len, which)), np.int64)
    for here, there in zip(which, order, strict=True):
        taken[here] = np.resize(which[there], len(here))
    return taken


def within(x: Array, y: Array, which: Sequence[Array]) -> float:
    """Correlation of ranks, counted within each mix from their mean."""
    a, b = np.zeros(len(x)), np.zeros(len(y))
    for here in which:
        for values, ranked in ((x, a), (y, b)):
            own = ranks(values[here]) / len(here)
            ranked[here] = own - own.mean()
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def holm(p: Array) -> Array:
    """p-values for a family of tests (Holm, 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    found = np.empty(len(p))
    found[order] = np.minimum(1, stepped)
    return found


def thresholds(x: Array, gains: Array, which: Sequence[Array]) -> tuple[float, float]:
    """(share of right signs, nats gained a setting): each mix judged by a threshold set on the others.

    The threshold, and which side of it is good, is the one that would have gained most there.
    """
    opened = np.zeros(len(x), bool)
    for here in which:
        others = np.setdiff1d(np.arange(len(x)), here)
        side, cut = best_cut(x[others], gains[others])
        opened[here] = side * x[here] > cut
    return float((opened == (gains > 0)).mean()), float(np.where(opened, gains, 0).mean())


def best_cut(x: Array, gains: Array) -> tuple[int, float]:
    """(side, cut): opening where side * x > cut gains most; cuts lie in the middle between two values."""
    best, found = 0.0, (1, math.inf)
    for side in (1, -1):
        order = np.argsort(-side * x, kind="stable")
        ranked, total = side * x[order], np.cumsum(gains[order])
        cuts = np.append((ranked[1:] + ranked[:-1]) / 2, -math.inf)
        total = np.where(np.append(ranked[1:] != ranked[:-1], True), total, -math.inf)
        if total.max() > best:
            best, found = float(total.max()), (side, float(cuts[total.argmax()]))
    return found


def untuned(name: str, x: Array, gains: Array) -> float:
    """Nats gained a setting where sifting opens as the statistic's meaning says: better than random halves."""
    kind, of = name.split(", ") if ", " in name else (name, "")
    if kind in ("ahead", "held-out") or of == "held-out":
        return float(np.where(x > 0, gains, 0).mean())
    if kind in ("align", "cosine", "snr", "own steps"):
        return float(np.where(x > 1, gains, 0).mean())
    return math.nan


def steps_of(name: str) -> float:
    """What measuring a statistic once costs beyond scoring the pools, in plain steps of b rows.

    A forward pass is a third of a step of as many rows.
    """
    plan = Plan()
    a_pass = plan.pools * (P / B) / 3
    kind, of = name.split(", ") if ", " in name else (name, "")
    if kind == "score std":
        return 0
    if kind == "ahead":
        return 2 * plan.looks * (plan.ahead + JUDGES * (P / B) / 3)
    if kind == "held-out gap":
        return a_pass + plan.held / B / 3
    if of in METRICS or kind == "own steps":
        return (3 if kind in ("held-out", "apart") or of == "held-out" else 2) * plan.pools
    return 2 * a_pass if "progress" in name or name == "change of rho" else a_pass


def table(found: Sequence[Setting], judged: Sequence[Judged]) -> str:
    gains = np.array([each.gain for each in found])
    seeds = [each.seeds for each in found]
    chance = np.sqrt(np.mean([each.chance**2 for each in found]))
    lines = [
        f"{len(found)} settings of {len({each.mix for each in found})} mixes, {min(seeds)} to {max(seeds)} seeds "
        f"each; gain {gains.min():+.3f} to {gains.max():+.3f} nats, positive in {(gains > 0).mean():.0%}; two "
        f"random halves differ by {chance:.4f}{agreement(found)}",
        f"nats a setting: always sifting {gains.mean():+.4f}, never 0, knowing the sign {gains.clip(0).mean():+.4f}",
        *(line_of_time(found, n) for n in range(len(COSTS))),
        "",
        f"{'statistic':<26}{'rank r':>7}  {'95%, mixes':<15}{'95%, settings':<16}{'between':>7}{'within':>8}"
        f"{'p':>7}{'Holm':>6}{'signs':>7}{'gated':>9}{'untuned':>9}{'noise':>7}{'steps':>7}",
    ]
    for j in judged:
        lines += [
            f"{j.name:<26}{j.all:>+7.2f}  {span(j.by_mix):<15}{span(j.by_setting):<16}{j.between:>+7.2f}"
            f"{j.within:>+8.2f}{j.p:>7.3f}{j.holm:>6.2f}{j.right:>7.0%}{j.value:>+9.4f}{shown(j.at_once)}{j.noise:>7.2f}{j.steps:>7.1f}"
        ]
    return "\n".join(lines)


def line_of_time(found: Sequence[Setting], n: int) -> str:
    """What is gained in equal time, where scoring costs COSTS[n] of a step, by whom."""
    paid = np.array([each.paid[n] for each in found])
    line = (
        f"in equal time, scoring at {COSTS[n]:.0%} of a step: positive in {(paid > 0).mean():.0%}, always sifting "
        f"{paid.mean():+.4f}, knowing the sign {paid.clip(0).mean():+.4f}"
    )
    for name in ("ahead, held-out", "ahead"):
        if name in found[0].values:
            opens = np.array([each.values[name] > 0 for each in found])
            line += f", gated by {name!r} > 0 {np.where(opens, paid, 0).mean():+.4f}"
    return line


def agreement(found: Sequence[Setting]) -> str:
    """How well the gain of one seed tells that of another: what no statistic of one run can do better, hardly."""
    pairs = np.array([each.gains[:2] for each in found if each.seeds > 1])
    if len(pairs) < 3:
        return ""
    alike = (np.sign(pairs[:, 0]) == np.sign(pairs[:, 1])).mean()
    return f"; gains of two seeds: rank r {spearman(*pairs.T):+.2f}, signs {alike:.0%}"


def shown(value: float) -> str:
    return f"{value:>+9.4f}" if math.isfinite(value) else f"{'':>9}"


def span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:+.2f} to {ends[1]:+.2f}"


def horizon_table(found: Sequence[Setting], folder: Path, draws: int) -> str:
    """How far to look: one look-ahead of so many steps against the gain; "" where none was made."""
    told: dict[tuple[str, int, str], list[Array]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in lines_of(path):
            for way in FOLLOWED if "after" in line else ():
                ahead = np.subtract(line["after"]["random"], line["after"][way])
                told.setdefault((line["mix"], line["stage"], way), []).append(ahead)
    both = [each for each in found if (each.mix, each.stage, each.way) in told]
    if len(both) < 3:
        return ""
    x = np.array([np.mean(told[each.mix, each.stage, each.way], axis=0) for each in both])
    gains, rng = np.array([each.gain for each in both]), np.random.default_rng(0)
    which = blocks(both)
    again = [
        np.concatenate([which[n] for n in rng.integers(0, len(which), len(which))])
        for _ in range(draws)
    ]
    spread = np.array([correlations(x[each], gains[each]) for each in again])
    paid = np.array([each.paid for each in both])
    best = ", ".join(f"{each.clip(0).mean():+.4f}" for each in (gains, *paid.T))
    lines = [
        f"one look-ahead at full rate, judged by {Plan().pools * B + JUDGES * P} held-out rows; {len(both)} settings of "
        f"{len(which)} mixes; knowing the sign {best}",
        f"{'steps':>5}{'rank r':>8}  {'95%, mixes':<15}{'signs':>6}{'gated at 0':>12}"
        + "".join(f"{f'paying {cost:.0%}':>12}" for cost in COSTS),
    ]
    for n, (mark, r) in enumerate(zip(MARKS, correlations(x, gains), strict=False)):
        opens = x[:, n] > 0
        values = [thresholds(x[:, n], each, which)[1] for each in paid.T]
        lines += [
            f"{mark:>5}{r:>+8.2f}  {span(interval(spread[:, n])):<15}{(opens == (gains > 0)).mean():>6.0%}"
            f"{np.where(opens, gains, 0).mean():>+12.4f}"
            + "".join(f"{each:>+12.4f}" for each in values)
        ]
    return "\n".join(lines)


def blocks(found: Sequence[Setting]) -> list[Array]:
    """Where the settings of each mix are."""
    mixes = np.array([each.mix for each in found])
    return [np.flatnonzero(mixes == mix) for mix in dict.fromkeys(mixes)]


def gains_table(found: Sequence[Setting]) -> str:
    """What was gained where, thousandths of a nat."""
    ways = [*dict.fromkeys(each.way for each in found)]
    by = {(each.mix, each.stage, each.way): each for each in found}
    lines = [f"{'gain, 0.001 nats':<18}{'step':>6}  " + "".join(f"{way:>16}" for way in ways)]
    for mix, stage in dict.fromkeys((each.mix, each.stage) for each in found):
        cells = ""
        for way in ways:
            each = by.get((mix, stage, way))
            shown = "" if each is None else f"{1e3 * each.gain:+.0f} ± {1e3 * each.error:.0f}"
            cells += f"{shown:>16}"
        lines.append(f"{mix:<18}{stage:>6}  {cells}")
    return "\n".join(lines)


# Up to where an axis is linear, beyond which logarithmic.
LINEAR = {"ahead": 0.02, "ahead, held-out": 0.02, "held-out gap": 0.5}


def draw(
    found: Sequence[Setting], judged: Sequence[Judged], path: Path, names: Sequence[str]
) -> None:
    """Statistics against the gain, a colour for each mix, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {each.name: each for each in judged}
    names = [*names] or [each.name for each in judged[:6]]
    mixes = [*dict.fromkeys(each.mix for each in found)]
    stages = sorted({each.stage for each in found})
    colours = pyplot.get_cmap("tab20")
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    width = 4.6 * columns + 1.9
    figure, axes = pyplot.subplots(
        height, columns, figsize=(width, 3.9 * height), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        for each in found:
            axis.scatter(
                each.values[name],
                1e3 * each.gain,
                s=14 + 22 * stages.index(each.stage),
                color=colours(mixes.index(each.mix) % 20),
                alpha=0.8,
                linewidths=0.4,
                edgecolors="white",
            )
        axis.axhline(0, color="0.5", linewidth=0.8)
        # Most gains lie within a few hundredths of a nat, some far above.
        axis.set_yscale("symlog", linthresh=20)
        if name in LINEAR:
            axis.set_xscale("symlog", linthresh=LINEAR[name])
        judge = by_name[name]
        axis.set_title(f"{name}: rank r {judge.all:+.2f} ({span(judge.by_mix)})", fontsize=9)
        axis.grid(color="0.9", linewidth=0.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("gain, 0.001 nats")
    handles = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colours(n % 20), label=mix)
        for n, mix in enumerate(mixes)
    ]
    handles += [
        pyplot.Line2D(
            [], [], marker="o", linestyle="", color="0.6", markersize=math.sqrt(14 + 22 * n), label=f"step {stage:,}"
        )
        for n, stage in enumerate(stages)
    ]  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1 - 1.8 / width, 1))
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1 - 1.75 / width, 0.5),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, about in (("run", "train, measure, fork"), ("far", "train, look further ahead")):
        running = commands.add_parser(command, help=about)
        running.add_argument("--shards", type=Path, default=Path("shards/built/gpt"))
        running.add_argument("--mixes", nargs="+", default=[*MIXES], choices=[*MIXES])
        running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        running.add_argument("--stages", nargs="+", type=int, default=[*Plan.stages])
        running.add_argument("--fork", type=int, default=Plan.forks, help="steps of a fork (80)")
        running.add_argument("--out", type=Path, default=Path("tools/results/gate"))
        running.add_argument("--raw", type=Path, help="a folder for what statistics are made of")
    showing = commands.add_parser("table", help="which statistic predicts the gain")
    showing.add_argument("--out", type=Path, default=Path("tools/results/gate"))
    showing.add_argument("--mixes", nargs="+", default=[*MIXES], help="of these mixes only")
    showing.add_argument("--ways", nargs="+", default=[], help="of these ways to score only")
    showing.add_argument("--stages", nargs="+", type=int, default=[], help="of these stages only")
    showing.add_argument(
        "--held",
        choices=["as trained", "cleaner"],
        help="only mixes whose held-out rows are of the training mix, or are cleaner than it",
    )
    showing.add_argument("--draws", type=int, default=1000, help="of bootstrap and chance (1,000)")
    showing.add_argument("--png", type=Path)
    showing.add_argument("--draw", nargs="+", default=[], help="these statistics (the best six)")
    options = parser.parse_args(arguments)
    if options.command == "table":
        found = [
            each
            for each in settings_of(options.out, options.ways)
            if (not options.stages or each.stage in options.stages)
            and each.mix in options.mixes
            and options.held in (None, held_is(MIXES[each.mix]))
        ]
        if not found:
            sys.exit(f"no runs in {options.out}; make some with: {sys.argv[0]} run")
        judged = judge(found, options.draws)
        far = horizon_table(found, options.out, options.draws)
        print(gains_table(found), table(found, judged), far, sep="\n\n")
        if options.png:
            draw(found, judged, options.png, options.draw)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(machine(), flush=True)
    text = texts(options.shards)
    plan = Plan(stages=tuple(options.stages), forks=options.fork)
    for seed, name in itertools.product(options.seeds, options.mixes):
        begun = time.perf_counter()
        path = options.out / f"{name}-{seed}-{max(plan.stages)}.jsonl"
        if options.command == "far":
            look_far(name, seed, plan, text, path.with_name(f"far-{path.name}"))
        else:
            run(name, seed, plan, text, path, options.raw)
        print(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
