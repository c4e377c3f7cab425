"""Which way to choose samples trains better? Arms that differ in their loader alone, paired by seed.

    python tools/compare.py --subject gpt --shards shards/built/gpt --out runs/compare/prose

Every arm of a seed starts from the same weights, sees the same candidates in the same order, is evaluated on
the same held-out samples under the same masks, and ends with its learning rate decayed to zero. What
remains is the loader, and a difference per seed. Arms are named in tools/arms.py; ``random``, a random
half of the same candidates, is the control to look at beside ``plain``.

Arms have as many samples to backpropagate as plain training, or, named "equal time", as many seconds: the
cost of a plain step and of a step of each arm is measured first, in turn, and the number of steps follows
from it, so that scoring is paid for and a run still repeats to the bit (on a CPU; a GPU adds in any order,
hence the repeats "plain#1" there). "plain@0.71" is plain training with 0.71 of the budget, its learning rate
decayed there: the measure of what a difference in loss is worth.

A pool of every run is audited now and then: also scored by the whole model, which changes nothing and is
not charged. What that finds stands in its file, in results.parquet and on the page, to tell why an arm won.

Seeds are added until the 95 % interval of every arm against its control is narrow enough (--precision), or
until --seeds; what is not told apart by then is called inconclusive. Stopped or killed at any moment, the
same command goes on. Results: a file per run, results.parquet, a table, a page to look at (report.html).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # siftloader may not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import pretrain_bert
import pretrain_gpt
from arms import LOSS, SUITES, Arm
from pretrain_bert import count

import siftloader
import siftloader.cli
from siftloader import TokenShards
from siftloader.comparison import Name, difference
from siftloader.report import table
from siftloader.results import Results, read_results, write_results


ROOT = Path(__file__).resolve().parent.parent
RESULTS = "results.parquet"
CONTROLS = ("plain", "random")
COMPARABLE = ("subject", "fingerprint", "preset", "precision", "threads", "final_samples")
EVALUATIONS = 8  # of a run, the last one not counted
CURVE_SAMPLES = 256  # held-out samples for each of them
AUDITS = 16  # of a run: a pool is also scored by the whole model, which is not charged, and changes nothing
ROUNDS = 15  # of steps, one of each arm, from which their costs are measured
LEAST_CHECKPOINT = 100  # steps; a run that is killed begins again at the last tenth of its steps


@dataclass(frozen=True)
class Subject:
    """What is trained: a model family, its sizes, and how the model is built."""

    build: Callable[[pretrain_bert.Preset, TokenShards], nn.Module]
    presets: dict[str, pretrain_bert.Preset]


SUBJECTS = {
    "gpt": Subject(
        pretrain_gpt.build_gpt,
        {
            # Two cores, two minutes: a model that learns more than word frequencies in that time.
            "cpu": replace(pretrain_gpt.TINY, batch_size=16, steps=500),
            "gpu": pretrain_bert.Preset(
                8, 512, 8, 256, 1500, lr=1e-3, lr_warmup=0.05, dropout=0, init=0.02
            ),
        },
    ),
    "bert": Subject(
        pretrain_bert.build_bert,
        {
            "cpu": replace(pretrain_bert.TINY, batch_size=32, steps=1200),
            "gpu": pretrain_bert.Preset(
                8, 384, 6, 256, 2500, lr=1e-3, lr_warmup=0.05, dropout=0, init=0.04
            ),
        },
    ),
}


def main(arguments: list[str] | None = None) -> None:
    begun = time.monotonic()
    options = parse(arguments)
    if options.run is not None:
        end_with_parent(sys.stdin.fileno())
        run(Comparison.open(options.out, options.shards), options.run, options.seed)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with alone(options.out):
        comparison = Comparison.prepare(options)
        print(comparison.about())
        work(comparison, options, begun)
        say(comparison, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for what is found; the same one goes on")
    add("--subject", choices=SUBJECTS, default="gpt", help="the model that learns (default gpt)")
    add("--shards", type=Path, help="folder of tools/make_shards.py, of the subject's objective")
    add("--suite", choices=SUITES, default="quick", help="which arms (default quick)")
    add("--arms", nargs="+", metavar="NAME", help="only these of the suite, and the controls")
    add("--name", help="what this comparison is called in tables (default: the folder's name)")
    add("--preset", choices=["cpu", "gpu"], help="size of the model (default: of this machine)")
    add("--steps", type=count, help="steps of plain training; others follow from the budget")
    add("--seconds", type=float, help="instead: as many as plain training does in so many seconds")
    add("--batch-size", type=count, help="samples backpropagated per step")
    add("--lr", type=float, help="highest learning rate")
    add("--final-samples", type=count, default=4096, help="held-out samples at the end (4096)")
    add("--seeds", type=count, default=5, help="at most so many (default 5)")
    add("--least-seeds", type=count, default=3, help="at least so many for every arm (default 3)")
    add("--precision", type=float, default=0.01, help="half-width to reach, in nats (0.01)")
    add("--minutes", type=float, help="begin no run that would not end by then (default: no end)")
    add("--tokenizer", type=Path, help="that of the shards, to show which texts were kept")
    add("--threads", type=count, help="of each run (default: the cores, divided by the workers)")
    add("--workers", type=count, help="runs at a time (default: one per core, one on a GPU)")
    add("--run", metavar="ARM", help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if options.preset is None:
        options.preset = "gpu" if gpu else "cpu"
    if options.workers is None:
        options.workers = 1 if gpu else max(1, len(os.sched_getaffinity(0)))
    if options.shards is None:
        options.shards = ROOT / "shards" / "built" / options.subject
    if options.run is None and not (options.shards / "manifest.jsonl").exists():
        parser.error(f"{options.shards} holds no shards; `make compare` prepares them first")
    if options.tokenizer and not options.tokenizer.exists():
        parser.error(f"--tokenizer {options.tokenizer}: no such file or folder")
    if options.least_seeds > options.seeds:
        parser.error(f"--least-seeds {options.least_seeds} is more than --seeds {options.seeds}")
    return options


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder: two commands that write to one would run everything twice."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(
                f"{folder} is in use by another comparison; wait for it, or choose another --out"
            )
        yield


# ---- the plan: what runs, for how long, at which price


@dataclass(frozen=True)
class Comparison:
    """What is compared, and what each arm costs: written once, so that later runs mean the same.

    ``seconds`` is what a plain step takes; ``costs`` what a sifted step of each arm takes, in plain steps.
    """

    folder: Path
    name: str
    subject: str
    shards: Path
    fingerprint: str
    preset: pretrain_bert.Preset
    precision: str
    threads: int
    final_samples: int
    arms: tuple[Arm, ...]
    seconds: float
    costs: dict[str, float]
    machine: str

    @classmethod
    def prepare(cls, options: argparse.Namespace) -> Comparison:
        """Take up the plan of the folder, or make one; what arms cost is measured where it is not known."""
        wanted = cls._wanted(options)
        file = options.out / "plan.json"
        if file.exists():
            found = cls.open(options.out, options.shards)
            if options.seconds:
                wanted = replace(wanted, preset=replace(wanted.preset, steps=found.preset.steps))
            if not options.threads and wanted.threads and found.threads:
                wanted = replace(wanted, threads=found.threads)  # however many cores are here
            for field in COMPARABLE:
                if getattr(found, field) != getattr(wanted, field):
                    sys.exit(
                        f"{file} was made with {field} {getattr(found, field)!r}, now it is "
                        f"{getattr(wanted, field)!r}: runs of both do not compare; choose another --out"
                    )
            known = {arm.name: arm for arm in found.arms}
            for arm in wanted.arms:
                if known.get(arm.name, arm) != arm:
                    sys.exit(
                        f"arm {arm.name!r} was {known[arm.name]} and now is {arm}; give it another "
                        f"name, or choose another --out"
                    )
            if undated(found.machine) != undated(wanted.machine):
                print(
                    f"note: {file} was made on {found.machine}; here it is {wanted.machine}. Runs of both "
                    f"are compared, at the prices of the former",
                    file=sys.stderr,
                )
            priced = {arm.sifted_step: found.costs[arm.name] for arm in found.arms}
            costs = {
                **{arm.name: priced.get(arm.sifted_step, 0.0) for arm in wanted.arms},
                **found.costs,
            }
            new = [arm for arm in wanted.arms if not costs[arm.name]]
            wanted = replace(
                wanted,
                name=found.name,
                seconds=found.seconds,
                costs=costs,
                machine=found.machine,
            )
            if new:
                # Only ratios are taken from this second measurement: hours may lie between the two.
                wanted = replace(wanted, costs={**costs, **measure(wanted, new)[1]})
            unused = [
                arm for arm in found.arms if arm.name not in {arm.name for arm in wanted.arms}
            ]
            plan = replace(wanted, arms=(*wanted.arms, *unused))
        else:
            seconds, costs = measure(wanted, wanted.arms)
            if options.seconds:
                steps = max(10, round(options.seconds / seconds, -1))
                wanted = replace(wanted, preset=replace(wanted.preset, steps=int(steps)))
            plan = wanted = replace(wanted, seconds=seconds, costs=costs)
        # Without the places, which are another machine's when it goes on elsewhere.
        kept = asdict(replace(plan, folder=Path(), shards=Path()))
        del kept["folder"], kept["shards"]
        write(file, json.dumps(kept, indent=1))
        return wanted

    @classmethod
    def _wanted(cls, options: argparse.Namespace) -> Comparison:
        preset = SUBJECTS[options.subject].presets[options.preset]
        given = {name: getattr(options, name) for name in ("steps", "batch_size", "lr")}
        preset = replace(preset, **{name: value for name, value in given.items() if value})
        arms = SUITES[options.suite]
        if options.arms:
            unknown = {*options.arms} - {arm.name for arm in arms}
            if unknown:
                sys.exit(
                    f"no arm {sorted(unknown)} in {options.suite}: {[arm.name for arm in arms]}"
                )
            arms = [arm for arm in arms if arm.name in {*options.arms, *CONTROLS}]
        gpu = torch.cuda.is_available()
        threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
        return cls(
            folder=options.out,
            name=options.name or options.out.resolve().name,
            subject=options.subject,
            shards=options.shards,
            fingerprint=TokenShards(options.shards).fingerprint,
            preset=preset,
            precision="bf16",
            threads=threads if not gpu else 0,
            final_samples=options.final_samples,
            arms=tuple(arms),
            seconds=0.0,
            costs={},
            machine=machine(),
        )

    @classmethod
    def open(cls, folder: Path, shards: Path) -> Comparison:
        """Read the plan of a folder; where the shards are differs from machine to machine."""
        file = folder / "plan.json"
        try:
            found = json.loads(file.read_text())
            found["preset"] = pretrain_bert.Preset(**found["preset"])
            found["arms"] = tuple(Arm(**arm) for arm in found["arms"])
            return cls(**{**found, "folder": folder, "shards": shards})
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(
                f"{file} is missing, damaged, or of another version ({error!r}); put back the one that "
                f"the runs beside it were made by, or choose another --out"
            )

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def steps(self, arm: Arm) -> int:
        """As many as its budget buys: of samples, or of time."""
        steps = self.preset.steps * arm.budget
        if arm.charged:
            steps /= 1 + arm.sifted_share * (self.costs[arm.name] - 1)
        return max(1, int(steps))

    def seconds_at(self, arm: Arm, step: int) -> float:
        """What ``step`` steps of an arm are charged, in seconds of the machine that measured."""
        return step * self.seconds + self.scoring_at(arm, step)

    def scoring_at(self, arm: Arm, step: int) -> float:
        """The part of that which plain training does not pay: drawing twice, scoring, selecting."""
        if not arm.sifts:
            return 0.0
        steps = self.steps(arm)
        begin, end = round(arm.warmup * steps), steps - round(arm.cooldown * steps)
        sifted = max(0, min(step, end) - begin)
        return sifted * (self.costs[arm.name] - 1) * self.seconds

    def file(self, arm: Arm, seed: int) -> Path:
        """Where a finished run is."""
        return self.folder / f"{re.sub(r'[^a-z0-9@#.]+', '-', arm.name.lower())}-{seed}.jsonl"

    def selections(self, arm: Arm) -> Path:
        """Where the selection log of its first seed is."""
        return self.folder / "selections" / self.file(arm, 0).stem

    def about(self) -> str:
        """What is compared, and what it costs, for people."""
        preset = self.preset
        lines = [
            f"{self.name}: {self.subject}, {preset.layers} layers of {preset.hidden}, {preset.steps:,} "
            f"steps of {preset.batch_size} samples, lr {preset.lr:g}, {self.precision}",
            f"measured on {self.machine}: a plain step takes {1000 * self.seconds:.0f} ms; a sifted one",
        ]
        sifted = [arm for arm in self.arms if arm.sifts and not arm.charged]
        lines += [f"    {self.costs[arm.name]:5.2f} x as long   {arm.name}" for arm in sifted]
        return "\n".join(lines)


def measure(comparison: Comparison, arms: Iterable[Arm]) -> tuple[float, dict[str, float]]:
    """Seconds of a plain step, and what a sifted step of each arm takes in plain steps.

    All in turn, round by round, on one model: what disturbs the machine disturbs all of a round, and
    the median of the rounds' ratios is what an arm is charged.
    """
    set_up(comparison, seed=0)
    shards = TokenShards(comparison.shards, seed=0)
    model = build(comparison, shards)
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(model), 1e-6, fused=True)
    # Arms whose sifted steps are the same are measured once; None is a plain step. That one is drawn by the
    # same code as the others: torch's own loader collates sample by sample, on a GPU a third of a step, which
    # plain training alone would be charged.
    plain = Arm("plain", "random", keep=1.0, warmup=0.0, cooldown=0.0)
    kinds: dict[Arm | None, list[str]] = {None: []}
    for arm in arms:
        kinds.setdefault(arm.sifted_step, []).append(arm.name)
    batches = {
        kind: pretrain_bert.endless(
            (kind or plain).loader(
                TokenShards(comparison.shards, seed=0),
                model,
                comparison.preset.batch_size,
                1_000_000,
                layers=comparison.preset.layers,
                autocast=torch.bfloat16,
            )
        )
        for kind in kinds
    }

    def step(kind: Arm | None) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        since = time.perf_counter()
        batch = {name: field.to(device) for name, field in next(batches[kind]).items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), pretrain_bert.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - since

    rounds: list[dict[Arm | None, float]] = []
    for number in tqdm(range(3 + ROUNDS), desc="what steps cost", disable=None, leave=False):
        found = {kind: step(kind) for kind in batches}
        if number >= 3:  # the first ones warm up
            rounds.append(found)
    seconds = median(found[None] for found in rounds)
    costs = {}
    for kind, names in kinds.items():
        ratio = median(found[kind] / found[None] for found in rounds)
        # A sifted step does all that a plain one does: less than that is noise.
        costs |= dict.fromkeys(names, max(1.0, ratio))
    return seconds, costs


# ---- one run


def set_up(comparison: Comparison, seed: int) -> None:
    # As many threads as the plan says: sums in another order are other sums.
    if comparison.threads:
        torch.set_num_threads(comparison.threads)
    torch.manual_seed(seed)


def build(comparison: Comparison, shards: TokenShards) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SUBJECTS[comparison.subject].build(comparison.preset, shards).to(device)


def run(comparison: Comparison, name: str, seed: int) -> None:
    """Train one arm of one seed; its file appears when it is finished."""
    arm = comparison.arm(name)
    final = comparison.file(arm, seed)
    kept = comparison.folder / ".unfinished"
    kept.mkdir(exist_ok=True)
    log, checkpoint = kept / final.name, kept / f"{final.stem}.pt"
    steps = comparison.steps(arm)
    chosen = comparison.selections(arm) if arm.sifts and seed == 0 else None
    if chosen is not None and not checkpoint.exists():
        shutil.rmtree(chosen, ignore_errors=True)  # of a run that got nowhere, or of an older one
    set_up(comparison, seed)
    train_shards = TokenShards(comparison.shards, seed=seed)
    val_shards = TokenShards(comparison.shards, split="val")
    model = build(comparison, train_shards)
    preset = replace(comparison.preset, steps=steps)
    loader: Any = arm.loader(
        train_shards,
        model,
        preset.batch_size,
        steps,
        layers=preset.layers,
        autocast=torch.bfloat16,
        # What was kept, of one run: the page shows its scores and its texts.
        log_selections=chosen,
        audit_every=max(1, steps // AUDITS) if AUDITS else 0,
    )
    options, _ = pretrain_bert.parse(
        [
            f"--shards={comparison.shards}",
            f"--seed={seed}",
            f"--precision={comparison.precision}",
            f"--log={log}",
            f"--eval-every={max(1, steps // EVALUATIONS)}",
            f"--eval-samples={CURVE_SAMPLES}",
            f"--final-samples={comparison.final_samples}",
            f"--checkpoint={checkpoint}",
            f"--checkpoint-every={max(LEAST_CHECKPOINT, steps // 10)}",
            "--continue",
        ],
        "",
        {"tiny": preset},
    )
    options.header = {
        "experiment": comparison.name,
        "arm": arm.name,
        "seed": seed,
        "steps": steps,
        "criterion": arm.criterion,
        "exit_layer": preset.layers if arm.exit_layer == 0 else arm.exit_layer,
        "sifting": arm.settings(),
        "cost": comparison.costs[arm.name],
        "seconds_scoring": comparison.scoring_at(arm, steps),
        "measured_on": comparison.machine,
    }
    pretrain_bert.train(options, preset, model, loader, train_shards, val_shards)
    header, *records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record["seconds"] = comparison.seconds_at(arm, record["step"])
    # Why it won or lost: how well the exit chose, and the loss of all candidates.
    audits = [{"audit": audit} for audit in loader.audits] if AUDITS else []
    write(final, "".join(json.dumps(line) + "\n" for line in (header, *audits, *records)))
    for file in (checkpoint, log):  # a checkpoint without its log would continue without its past
        file.unlink(missing_ok=True)


def end_with_parent(pipe: int) -> None:
    """End this process when ``pipe``, a file descriptor from its parent, ends.

    However the parent dies, no run goes on alone, writing to the files of the one that takes its place.
    """

    def wait() -> None:
        os.read(pipe, 1)  # not through sys.stdin, whose lock the interpreter wants when it ends
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def write(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(file)


# ---- all runs


def found_in(comparison: Comparison) -> Results:
    """The runs that the folder holds, in files of their own or in a results.parquet."""
    if any(comparison.folder.glob("*.jsonl")) or (comparison.folder / RESULTS).exists():
        return read_results(comparison.folder)
    return Results(())


def wanted(comparison: Comparison, options: argparse.Namespace) -> list[tuple[Arm, int]]:
    """The runs still to do, seed by seed, so that wherever it stops whole pairs are done."""
    results = found_in(comparison)
    done = {run.key for run in results.runs if run.end is not None}
    todo = []
    for seed in range(options.seeds):
        open_arms = {arm.name for arm in comparison.arms}
        if seed >= options.least_seeds:
            open_arms = unsettled(comparison, results, seed, options.precision)
            if open_arms:
                open_arms |= {*CONTROLS}
        todo += [
            (arm, seed)
            for arm in comparison.arms
            if arm.name in open_arms and (comparison.name, arm.name, seed) not in done
        ]
        if todo and seed + 1 >= options.least_seeds:
            break  # what the next seed is needed for shows when this one is done
    return todo


def unsettled(comparison: Comparison, results: Results, seeds: int, precision: float) -> set[str]:
    """The arms whose interval against the control, over the first ``seeds`` seeds, is too wide."""
    wide = set()
    for arm in comparison.arms:
        against = "random" if arm.sifts and arm.name != "random" else "plain"
        if arm.name == against or Name.of(arm.name).repeat is not None:
            continue  # a repeat tells how far apart equals end; it is compared with nothing
        found = difference(results, comparison.name, arm.name, against, seeds=range(seeds))
        if found.half_width is None or found.half_width > precision:
            wide.add(arm.name)
    return wide


def work(comparison: Comparison, options: argparse.Namespace, begun: float) -> None:
    """Train what is left to train, several runs at a time, each in a process of its own."""
    running: dict[subprocess.Popen[bytes], tuple[Arm, int, float]] = {}
    slowness = 1.0  # what a run took, beginning and evaluations included, in what its steps should
    alive, ours = os.pipe()  # nothing is ever written: ``ours`` closes when this process ends

    def fits(arm: Arm) -> bool:
        if options.minutes is None:
            return True
        left = 60 * options.minutes - (time.monotonic() - begun)
        return 1.1 * slowness * comparison.seconds_at(arm, comparison.steps(arm)) <= left

    try:
        while True:
            under_way = {(arm.name, seed) for arm, seed, _ in running.values()}
            left = [
                (arm, seed)
                for arm, seed in wanted(comparison, options)
                if (arm.name, seed) not in under_way
            ]
            todo = [(arm, seed) for arm, seed in left if fits(arm)]
            for arm, seed in todo[: options.workers - len(running)]:
                running[start(comparison, arm, seed, alive)] = (arm, seed, time.monotonic())
            if not running:
                if left:
                    print(
                        f"{len(left)} runs or more are left; the same command goes on, given --minutes enough "
                        f"for one of them"
                    )
                break
            process = next_to_end(running)
            arm, seed, since = running.pop(process)
            if process.returncode:
                sys.exit(
                    f"{arm.name}, seed {seed} failed (exit status {process.returncode}; negative: killed by that "
                    f"signal); what it said stands above"
                )
            took = time.monotonic() - since
            slowness = max(slowness, took / comparison.seconds_at(arm, comparison.steps(arm)))
            end = json.loads(comparison.file(arm, seed).read_text().splitlines()[-1])
            tqdm.write(
                f"{arm.name}, seed {seed}: held-out loss {end['val_loss']:.4f}, accuracy "
                f"{end['val_accuracy']:.2%}, {took:.0f} s"
            )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        os.close(alive)
        os.close(ours)


def start(comparison: Comparison, arm: Arm, seed: int, alive: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--run", arm.name]
    command += ["--out", str(comparison.folder), "--shards", str(comparison.shards)]
    threads = {"OMP_NUM_THREADS": str(comparison.threads)} if comparison.threads else {}
    return subprocess.Popen(
        [*command, "--seed", str(seed)],
        env={**os.environ, **threads},
        stdin=alive,
        stdout=subprocess.DEVNULL,
    )


def next_to_end(running: Iterable[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    while True:
        for process in running:
            if process.poll() is not None:
                return process
        time.sleep(0.2)


def say(comparison: Comparison, options: argparse.Namespace) -> None:
    """The table, as text; the runs as one Parquet file; the page."""
    results = found_in(comparison)
    if not results.runs:
        print("no run has finished; give it more --minutes")
        return
    text = f"{comparison.about()}\n\n{table(results)}"
    print("\n" + text)
    write(comparison.folder / "table.txt", text + "\n")
    write_results(results, comparison.folder / RESULTS)
    page = ["report", str(comparison.folder), "--out", str(comparison.folder / "report.html")]
    log = comparison.selections(LOSS)
    if any(log.glob("*.parquet")):
        page += ["--selections", str(log), "--shards", str(comparison.shards)]
        page += ["--tokenizer", str(options.tokenizer)] if options.tokenizer else []
    with contextlib.redirect_stdout(io.StringIO()):  # the table once more
        if status := siftloader.cli.main(page):
            sys.exit(status)  # it said why
    print(f"\n{os.path.relpath(comparison.folder / 'report.html')}: the same to look at")


def undated(machine: str) -> str:
    """The same without its date."""
    return machine.rpartition(", ")[0]


def machine() -> str:
    """Machine, versions and date, in one line."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    return (
        f"{name}, {platform.system()}, python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, siftloader {siftloader.__version__}, "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    )


if __name__ == "__main__":
    main()
