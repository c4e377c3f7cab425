"""Runs that never ran, for what draws and compares: curves that fall like those of a small GPT."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from siftloader.results import Evaluation, Results, Run


# By arm: how much lower it ends (nats), what a step costs (in plain ones), criterion, exit layer.
ARMS = {
    "plain": (0.0, 1.0, None, 1),
    "random": (0.003, 1.02, "random", 1),
    "loss": (-0.024, 1.17, "loss", 1),
    "entropy": (-0.012, 1.18, "entropy", 1),
    "loss, exit 3": (-0.016, 1.4, "loss", 3),
    "rarity": (0.05, 1.03, "rarity", 1),
}
LADDER = {"plain@0.5": 0.5, "plain@0.71": 0.71, "plain@1.41": 1.41, "plain@2": 2.0}


def runs_of(
    arm: str,
    ends_at: float,
    cost: float,
    seeds: int,
    criterion: str | None,
    layer: int,
    **more: object,
) -> list[Run]:
    budget = LADDER.get(arm, 1.0)
    steps = round(2000 * budget)
    runs = []
    for seed in range(seeds):
        shared = np.random.default_rng(seed)  # what all arms of a seed have in common
        start, level = shared.normal(9.0, 0.05), shared.normal(3.2, 0.08)
        own = np.random.default_rng([seed, *arm.encode()])
        evaluations = []
        for step in range(steps // 20, steps + 1, steps // 20):
            done = step / steps
            loss = (
                level
                + ends_at
                - 0.25 * math.log2(budget) / 2
                + (start - level) * 0.35 * (math.exp(-9 * done) + 0.25 * (1 - done))
            )
            loss += own.normal(0, 0.006)
            fields = {"train_loss": loss + 0.1, "seconds_scoring": step * 0.4 * (cost - 1)}
            point = (step, 32 * step, step * 0.4 * cost, loss, 0.62 - loss / 12)
            evaluations.append(Evaluation(*point, fields=fields))
        end = evaluations[-1]
        evaluations.append(
            Evaluation(
                end.step, end.samples, end.seconds, end.loss, end.accuracy, True, end.fields
            )
        )
        audits = ()
        if criterion in (None, "loss", "entropy"):
            audits = tuple(
                {
                    "step": one.step,
                    "sifting": criterion is not None and one.step < 0.8 * steps,
                    "population_loss": one.loss + own.normal(0, 0.02),
                    "rho": 1.3 - 0.1 * one.step / steps,
                    "rho_full": 1.4,
                    "overlap": 0.9 + 0.05 * one.step / steps,
                    "spearman": 0.8,
                    "sigma": None if one is evaluations[0] else 0.1,
                    "scoring_cost": cost - 1,
                }
                for one in evaluations[:-2]
            )
        settings = {
            "criterion": criterion,
            "exit_layer": layer,
            "preset": {"layers": 8, "lr": 1e-3},
        }
        versions = {
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "machine": "AMD EPYC, 2 cores",
        }
        told = {**settings, **versions, **more}
        runs.append(Run("gpt", arm, seed, steps, tuple(evaluations), told, audits=audits))
    return runs


def realistic(seeds: int = 5) -> Results:
    runs = []
    for arm, (ends_at, cost, criterion, layer) in ARMS.items():
        runs += runs_of(arm, ends_at, cost, seeds, criterion, layer)
    for arm in LADDER:
        runs += runs_of(arm, 0.0, 1.0, seeds, None, 1)
    runs += runs_of("plain#1", 0.0, 1.0, 1, None, 1)
    return Results(tuple(sorted(runs, key=lambda run: run.key)))


def few(*more: Run) -> Results:
    """Two arms of two seeds, and more."""
    runs = [*runs_of("plain", 0, 1, 2, None, 1), *runs_of("loss", -0.02, 1.2, 2, "loss", 1), *more]
    return Results(tuple(sorted(runs, key=lambda run: run.key)))


def without(run: Run, **changes: object) -> Run:
    """The same run with every evaluation changed."""
    return replace(run, evaluations=tuple(replace(one, **changes) for one in run.evaluations))
