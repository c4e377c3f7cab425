"""The arms of a comparison: what may differ between two training runs is the loader, and it is named here.

An ``Arm`` is a way to choose samples, a budget, and nothing else: ``arm.loader(...)`` builds the loader
that a run of tools/compare.py trains from. ``SUITES`` are the sets of arms worth comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from siftloader import (
    Gumbel,
    Loss,
    RankSample,
    Rarity,
    Residual,
    SiftingDataLoader,
    Stratified,
    Stride,
    TokenShards,
    TopK,
    TrimmedTopK,
)
from siftloader.pool import Pool


FULL = 0  # an exit layer that stands for the last one


@dataclass(frozen=True)
class Arm:
    """One way to train: which samples, and for how long.

    ``criterion`` None is plain training. ``warmup`` and ``cooldown`` are the shares of the steps that pass
    through unsifted; ``budget`` is a share of the comparison's budget; with ``charged`` that is a budget of
    time, out of which scoring is paid, else one of samples. ``repeat`` tells identical runs apart.
    """

    name: str
    criterion: str | None = None
    selection: str = "top-k"
    exit_layer: int = 1
    keep: float = 0.5
    warmup: float = 0.05
    cooldown: float = 0.2
    budget: float = 1.0
    charged: bool = False
    repeat: int = 0
    stride: int = 1  # scores every so many labelled positions, corrected by token rarity

    def __post_init__(self) -> None:
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(
                f"arm {self.name!r}: no criterion {self.criterion!r} in {[*CRITERIA]}"
            )
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"arm {self.name!r}: no selection {self.selection!r} in {[*SELECTIONS]}"
            )

    @property
    def sifts(self) -> bool:
        """Whether anything is selected."""
        return self.criterion is not None

    @property
    def sifted_share(self) -> float:
        """The share of its steps that are sifted."""
        return 1 - self.warmup - self.cooldown if self.sifts else 0.0

    @property
    def sifted_step(self) -> Arm | None:
        """What a sifted step of it is made of, as an arm without a name; None where no step is sifted."""
        if not self.sifts:
            return None
        plain = {"charged": False, "budget": 1.0, "warmup": 0.0, "cooldown": 0.0, "repeat": 0}
        return replace(self, name="", **plain)

    def settings(self) -> dict[str, Any]:
        """What makes this arm this arm, JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "name"}

    def loader(
        self,
        shards: TokenShards,
        model: nn.Module,
        batch_size: int,
        steps: int,
        *,
        layers: int,
        autocast: torch.dtype | None,
        log_selections: Path | None = None,
        on_select: Callable[[Tensor, Tensor, Tensor], None] | None = None,
        audit_every: int = 0,
    ) -> Iterable[dict[str, Tensor]]:
        """The loader of a run of ``steps`` steps; plain training has torch's own, or one that audits and never sifts."""
        if self.criterion is None:
            if not audit_every:
                return DataLoader(shards, batch_size, drop_last=True)
            return SiftingDataLoader(
                shards,
                batch_size,
                drop_last=True,
                model=model,
                keep={steps: self.keep},  # from the step on that does not come
                warmup_steps=0,
                autocast=autocast,
                audit_every=audit_every,
            )
        return SiftingDataLoader(
            shards,
            batch_size,
            drop_last=True,
            model=model,
            exit_layer=layers if self.exit_layer == FULL else self.exit_layer,
            criterion=CRITERIA[self.criterion](shards),
            selection=SELECTIONS[self.selection](),
            positions=Stride(self.stride, control=shards.unigrams) if self.stride > 1 else None,
            keep=self.keep,
            warmup_steps=round(self.warmup * steps),
            cooldown_steps=self.cooldown,
            total_steps=steps,
            autocast=autocast,
            log_selections=log_selections,
            on_select=on_select,
            audit_every=audit_every,
        )


class Spread:
    """Kept scores are spread like those of the pool: one of every ``P / b`` neighbours in rank, drawn.

    Less noise than a random half, and no bias: a stratified sample with the score as the stratum.
    """

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[b]; the drawn place within each run of neighbours is a function of (rank, pool)."""
        ranked = torch.sort(scores, descending=True, stable=True).indices
        edges = torch.linspace(0, len(scores), keep + 1, dtype=torch.float64)
        place = edges[:-1] + pool.uniform(0, keep) * edges.diff()
        return ranked[place.long().clamp_max(len(scores) - 1).to(ranked.device)].sort().values


class Middle:
    """The middle of the pool by score: neither what is known nor what may be noise."""

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[b]; as many are left out above as below."""
        ranked = torch.sort(scores, descending=True, stable=True).indices
        above = (len(scores) - keep) // 2
        return ranked[above : above + keep].sort().values


CRITERIA: dict[str, Callable[[TokenShards], Any]] = {
    "random": lambda shards: "random",
    "loss": lambda shards: Loss(),
    "entropy": lambda shards: "entropy",
    "rarity": lambda shards: Rarity(shards.unigrams),
    "residual": lambda shards: Residual(shards.unigrams),
    "residual-bigram": lambda shards: Residual(shards.bigrams),
    "easy": lambda shards: -Loss(),
}
SELECTIONS: dict[str, Callable[[], Any]] = {
    "top-k": TopK,
    "rank": RankSample,
    "gumbel-0.1": lambda: Gumbel(0.1),
    "gumbel-0.3": lambda: Gumbel(0.3),
    "gumbel-1": lambda: Gumbel(1.0),
    "trimmed": lambda: TrimmedTopK(0.2),
    "by-source": lambda: Stratified("source"),
    "spread": Spread,
    "middle": Middle,
}

PLAIN = Arm("plain")
RANDOM = Arm("random", "random")
LOSS = Arm("loss", "loss")
# What plain training reaches in more or less time, its learning rate decayed at each: the measure of what
# a difference in loss is worth.
LADDER = [replace(PLAIN, name=f"plain@{budget:g}", budget=budget) for budget in (0.71, 1.41, 2.0)]


def charged(arm: Arm) -> Arm:
    """The same arm with as much time as plain training, scoring paid out of it."""
    return replace(arm, name=f"{arm.name}, equal time", charged=True)


def longer(arm: Arm, budget: float) -> Arm:
    """The same arm under another budget, to be compared with plain training under that one."""
    return replace(arm, name=f"{arm.name}@{budget:g}", budget=budget)


# For a small causal model the head at all positions costs more than the layers; one in eight is enough to
# tell what is known by heart from what is not.
SPARSE = Arm("loss, 1 in 8", "loss", stride=8)

QUICK = [PLAIN, RANDOM, LOSS, charged(SPARSE)]
FULL_GRID = [
    PLAIN,
    RANDOM,
    LOSS,
    charged(LOSS),
    SPARSE,
    charged(SPARSE),
    longer(SPARSE, 2),
    longer(charged(SPARSE), 2),
    Arm("entropy", "entropy"),
    Arm("rarity", "rarity"),
    Arm("residual", "residual"),
    Arm("loss, rank sampled", "loss", "rank"),
    Arm("loss, full depth", "loss", exit_layer=FULL),
    *LADDER,
    Arm("easy", "easy"),
    Arm("residual-bigram", "residual-bigram"),
    Arm("loss, spread", "loss", "spread"),
    Arm("loss, middle", "loss", "middle"),
    Arm("loss, gumbel 0.1", "loss", "gumbel-0.1"),
    Arm("loss, gumbel 0.3", "loss", "gumbel-0.3"),
    Arm("loss, gumbel 1", "loss", "gumbel-1"),
    Arm("loss, trimmed", "loss", "trimmed"),
    Arm("loss, by source", "loss", "by-source"),
    Arm("loss, exit 2", "loss", exit_layer=2),
    Arm("entropy, exit 2", "entropy", exit_layer=2),
    Arm("loss, no cool-down", "loss", cooldown=0.0),
    Arm("loss, cool-down 0.1", "loss", cooldown=0.1),
    Arm("loss, cool-down 0.3", "loss", cooldown=0.3),
    Arm("loss, keep 0.25", "loss", keep=0.25),
    Arm("loss, keep 0.67", "loss", keep=2 / 3),
]
MASKED = [
    PLAIN,
    RANDOM,
    LOSS,
    charged(LOSS),
    Arm("entropy", "entropy"),
    charged(Arm("entropy", "entropy")),
    Arm("rarity", "rarity"),
    Arm("residual", "residual"),
    Arm("loss, rank sampled", "loss", "rank"),
    Arm("loss, full depth", "loss", exit_layer=FULL),
    Arm("loss, no cool-down", "loss", cooldown=0.0),
    *LADDER,
]
# Identical runs tell how far apart a GPU's noise alone ends; the paper's exits are 1, 2, 3, 6 and 12 of 12.
GPU = [
    *MASKED,
    replace(PLAIN, name="plain#1", repeat=1),
    replace(PLAIN, name="plain#2", repeat=2),
    Arm("loss, exit 2", "loss", exit_layer=2),
    Arm("loss, exit 3", "loss", exit_layer=3),
]
SUITES = {"quick": QUICK, "full": FULL_GRID, "masked": MASKED, "gpu": GPU}
