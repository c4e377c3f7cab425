"""Which guards keep noisy labels out: python tools/noise.py [--seeds 5] [--noise 0.2]

A classification problem whose answers are known: a teacher labels points, and a share of the labels is
replaced by another class. A small network learns from the noisy labels for a few epochs, until it does
well on clean samples but has not yet learned the noise by heart; from then on every pool of 64 is
sifted to 16 by each guard, without training on. Printed is the share of noisy samples among the kept:

* TopK         by loss, the paper's rule: what is hardest, and the noisy samples are
* guards       the same loss under another selection
* Reducible    TopK by loss minus the loss of a smaller network that learned from clean data held out
* Random       the share of noise in the data, up to chance

and the mean loss of the clean samples among the kept: a guard must still find those that are hard.

A few seconds a seed. Figures of a planted problem: they show that a guard does what it is there for,
not how much noise there is in your data.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from siftloader import (
    Loss,
    Random,
    RankSample,
    Reducible,
    Robust,
    Sifter,
    TopK,
    TrimmedTopK,
)
from siftloader.scores import ScoreOf
from siftloader.selection import Selection


FEATURES, CLASSES, POOL, KEEP = 16, 8, 64, 0.25


@dataclass(frozen=True)
class Problem:
    """Points [N, FEATURES], the labels one is given [N], and which of them are wrong [N]."""

    x: Tensor
    labels: Tensor
    noisy: Tensor

    def batches(self, rows: int) -> list[dict[str, Tensor]]:
        """All samples in batches; ``id`` is the row."""
        whole = {"x": self.x, "labels": self.labels, "id": torch.arange(len(self.x))}
        whole["noisy"] = self.noisy
        parts = {name: values.split(rows) for name, values in whole.items()}
        count = len(self.x) // rows
        return [{name: part[i] for name, part in parts.items()} for i in range(count)]


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many problems (default 5)")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong labels (0.2)")
    parser.add_argument("--samples", type=int, default=4096, help="to train on and to sift (4096)")
    options = parser.parse_args(arguments)
    found = [trial(seed, options.noise, options.samples) for seed in range(options.seeds)]
    print(f"{options.noise:.0%} of the labels are wrong, {POOL} candidates, {KEEP:.0%} kept,")
    print(f"{options.samples // POOL} pools a seed\n")
    print(f"{'':<28}{'loss of the':>12}{'noisy':>8}")
    seeds = "".join(f"{f'seed {seed}':>8}" for seed in range(len(found)))
    print(f"{'':<28}{'kept clean':>12}{'kept':>8}  {seeds}")
    for name in found[0]:
        row = [each[name] for each in found]
        print(
            f"{name:<28}{np.mean([kept.clean_loss for kept in row]):>12.2f}"
            f"{np.mean([kept.noisy for kept in row]):>8.1%}  "
            + "".join(f"{kept.noisy:>8.1%}" for kept in row)
        )


@dataclass(frozen=True)
class Kept:
    """Of all kept samples: the share of noisy ones, and the mean loss of the others, in nats."""

    noisy: float
    clean_loss: float


def trial(seed: int, noise: float = 0.2, samples: int = 4096) -> dict[str, Kept]:
    """What each guard keeps of one planted problem, by name."""
    generator = torch.Generator().manual_seed(seed)
    teacher = built(32, generator)
    problem = planted(teacher, samples, noise, generator)
    model = trained(built(64, generator), problem, epochs=4)
    clean = planted(teacher, samples, 0.0, generator)
    reference = trained(built(32, generator), clean, epochs=8)
    irreducible = Sifter(reference, exit_layer="full").score(
        {"x": problem.x, "labels": problem.labels}
    )
    guards: dict[str, tuple[ScoreOf, Selection]] = {
        "TopK": (Loss(), TopK()),
        "TrimmedTopK(drop_top=0.2)": (Loss(), TrimmedTopK(drop_top=0.2)),
        "Robust()": (Loss(), Robust()),
        "RankSample()": (Loss(), RankSample()),
        "Reducible": (Reducible(torch.arange(samples), irreducible), TopK()),
        "Random": (Random(seed), TopK()),
    }
    return {name: sifted(model, problem, *guard) for name, guard in guards.items()}


def sifted(model: nn.Module, problem: Problem, criterion: ScoreOf, selection: Selection) -> Kept:
    sifter = Sifter(model, exit_layer="full", criterion=criterion, selection=selection, keep=KEEP)
    kept = [sifter(batch) for batch in problem.batches(POOL)]
    noisy = torch.cat([batch["noisy"] for batch in kept])
    losses = torch.cat([Sifter(model, exit_layer="full").score(batch) for batch in kept])
    return Kept(noisy.double().mean().item(), losses[~noisy].mean().item())


def built(width: int, generator: torch.Generator) -> Network:
    network = Network(width)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
            parameter.normal_(0, 1, generator=generator).mul_(spread)
    return network


def planted(teacher: nn.Module, samples: int, noise: float, generator: torch.Generator) -> Problem:
    x = torch.randn(samples, FEATURES, generator=generator)
    with torch.no_grad():
        right = teacher(x).argmax(1)
    noisy = torch.rand(samples, generator=generator) < noise
    other = torch.randint(1, CLASSES, (samples,), generator=generator)  # never the right one
    return Problem(x, torch.where(noisy, (right + other) % CLASSES, right), noisy)


def trained(network: Network, problem: Problem, epochs: int) -> Network:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in problem.batches(32):
            loss = nn.functional.cross_entropy(network(batch["x"]), batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return network


if __name__ == "__main__":
    main()
