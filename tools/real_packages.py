"""timm and Composer as they are installed, the loader swapped: python tools/real_packages.py timm|composer

timm's loaders (PIL images, mixup, random erasing, with its prefetcher and without), model, optimizer and schedule
run in a loop in the shape of its train.py, which its wheel does not hold; Composer's Trainer runs as it is. Both
on CPU, in one process. Checked, and each run again where only the line of the loader differs:

* keep=1.0     the same batches, losses, updates and final weights as with the plain loader, bit for bit
* sifting      the same as with a loader written by hand: two batches are a pool, scored by a copy of the model that
               has one block and is made at that moment, and the better half is handed out
* updates      timm: accumulation that does not divide the epoch; Composer: microbatches
* mixup        timm: a loop that switches it off through the loader reaches the loader inside
* resume       Composer: a new Trainer takes up a checkpoint, in every phase and epoch, and goes on as the unbroken run;
               the warm-up counted in batches, and in updates

Both packages ask for torchvision, and Composer for torch below 2.7.1, so they live in an environment of their own
that sees the one of this repository, and are installed without what they ask for:

    python -m venv packages
    printf '%s\\n' $PWD $PWD/.venv/lib/python3.11/site-packages > packages/lib/python3.11/site-packages/main.pth
    packages/bin/pip install --no-deps timm==1.0.31 torchvision==0.29.2 mosaicml==0.32.1 mosaicml-cli==0.8.3 \\
        backoff coolname gql graphql-core importlib_metadata lazy_importer prompt_toolkit py-cpuinfo \\
        pytorch_ranger questionary ruamel.yaml tabulate tenacity torch_optimizer validators wcwidth websockets zipp
    packages/bin/python tools/real_packages.py timm

A torchvision built for CUDA does not load its operators beside torch for CPUs. Nothing here calls them, but it is
not imported before torch knows the schemas of two, torchvision::nms and torchvision::qnms: they are defined then.
Ends with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from os import cpu_count
from pathlib import Path
from platform import machine, python_version
from typing import Any, Literal

import numpy as np
import torch
from real_scripts import Failed, versions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from siftloader import SiftingDataLoader
from siftloader.errors import SiftError


CLASSES, BATCH, EPOCHS = 10, 4, 2
PICTURES, ACCUMULATE = 44, 4  # 11 batches or 6, neither of them divided by 4
POINTS = 90  # the last batch is of two rows
WARMUP, LONG = 2, 15  # batches, of 13 and 19 in the first epoch
PACKAGES = ("torch", "torchvision", "timm", "mosaicml", "lightning", "siftloader")


@dataclass
class Trained:
    """What a loop saw and did."""

    batches: list[str] = field(default_factory=list)  # digests, as they came out of the loader
    mixed: list[bool] = field(default_factory=list)  # batches whose labels are mixtures
    losses: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)  # batches before each
    weights: str = ""  # digest, at the end

    def after(self, batches: int) -> Trained:
        """What is left of it once so many batches are trained on, an update after each."""
        left = [number - batches for number in self.updates if number > batches]
        return Trained(self.batches[batches:], [], self.losses[batches:], left, self.weights)


class ByHand:
    """Sifting in its simplest words, and none of siftloader's: two batches drawn, the better half handed out."""

    batch_size = BATCH  # Composer asks for it

    def __init__(self, inner: Any, model: nn.Module, score: Score, warmup: int = 0) -> None:
        own = {"inner": inner, "model": model, "score": score, "warmup": warmup}
        self.__dict__.update(own, handed=0, epoch=-1)

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.__dict__["epoch"] += 1
        if isinstance(self.inner.sampler, DistributedSampler):
            self.inner.sampler.set_epoch(self.epoch)  # Composer tells that to DataLoaders alone
        held: list[list[Tensor]] = []
        for batch in self.inner:
            held.append([each.clone() for each in batch])
            plain = self.handed < self.warmup
            if plain or sum(len(each[0]) for each in held) == 2 * BATCH:
                yield held.pop() if plain else self.better(held)
                self.__dict__["handed"] += 1
                held = []
        if sum(len(each[0]) for each in held) >= BATCH:
            yield self.better(held)
            self.__dict__["handed"] += 1

    def __len__(self) -> int:
        plain = max(0, self.warmup - self.handed)
        pools, rest = divmod(rows_of(self.inner) - plain * BATCH, 2 * BATCH)
        return plain + pools + (rest >= BATCH)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def better(self, held: list[list[Tensor]]) -> list[Tensor]:
        pool = [torch.cat(each) for each in zip(*held, strict=True)]
        scores = self.score(self.model, *pool).tolist()
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
        return [each[sorted(order[:BATCH])] for each in pool]


Score = Callable[[nn.Module, Tensor, Tensor], Tensor]
Swap = Callable[[Any, nn.Module], Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(CHECKS))
    name = parser.parse_args(arguments).name
    torch.set_num_threads(1)
    schemas = torchvision_imports()
    table = Table()
    CHECKS[name](table)
    del schemas  # known to torch as long as this is held
    return 0 if table.printed() else 1


# ---- what a loader is swapped for: each takes it and the model ----


def as_it_is(loader: Any, model: nn.Module) -> Any:
    return loader


def keeping_all(loader: Any, model: nn.Module) -> Any:
    return SiftingDataLoader.wrap(loader, model=model, keep=1.0)


def sifting(warmup: int, count: Literal["batches", "optimizer"] = "batches") -> Swap:
    return lambda loader, model: SiftingDataLoader.wrap(
        loader, model=model, warmup_steps=warmup, count=count
    )


def by_hand(score: Score, warmup: int = 0) -> Swap:
    return lambda loader, model: ByHand(loader, model, score, warmup)


# ---- what was found ----


class Table:
    """What was found, and the seconds it took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float, str]] = []

    def row(self, what: str, finding: Callable[[], str]) -> None:
        """Add a check."""
        began, outcome = time.monotonic(), "ok"
        try:
            words = finding()
        except (Failed, SiftError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            outcome, words = "FAILED", f"{type(error).__name__}: {error}"
        self.rows.append((outcome, what, time.monotonic() - began, words))
        print(f"{outcome:7} {what}", file=sys.stderr, flush=True)

    def printed(self) -> bool:
        """Print the table; True if nothing failed."""
        for outcome, what, seconds, words in self.rows:
            print(f"{outcome:7} {what:44} {seconds:5.1f} s  {words}")
        print(
            f"{machine()}, {cpu_count()} cores, 1 thread | Python {python_version()}, "
            f"{', '.join(versions(PACKAGES))} | {date.today()}"
        )
        return all(outcome == "ok" for outcome, *_ in self.rows)


def same(one: Trained, other: Trained) -> str:
    """Two runs did the same, bit for bit."""
    for name in ("batches", "mixed", "losses", "updates"):
        first, second = getattr(one, name), getattr(other, name)
        if len(first) != len(second):
            raise Failed(f"{len(first)} {name}, and {len(second)}")
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            if a != b:
                raise Failed(f"{name} differ from number {number} of {len(first)} on")
    if one.weights != other.weights:
        raise Failed("the final weights differ")
    if not one.batches or not one.updates:
        raise Failed("nothing was trained on")
    return f"{len(one.batches)} batches, {len(one.updates)} updates"


def as_by_hand(plain: Trained, sifted: Trained, hand: Trained, loader: Any) -> str:
    """The sifting loader did what is written by hand, and that is not what the plain one does."""
    words = same(sifted, hand)
    if set(sifted.batches) <= set(plain.batches):
        raise Failed("every batch is one of the plain loader's: this loader does not sift")
    stats = loader.stats
    return f"{words}, {stats['kept']} of {stats['candidates']} candidates kept"


def loss_after_one_block(autocast: bool = False) -> Score:
    """The loss of every row [P], of a copy of the model that has one block only."""

    def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        shallow = copy.deepcopy(model).eval()
        shallow.blocks = shallow.blocks[:1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = shallow(inputs)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    return score


def rows_of(loader: Any) -> int:
    """Rows of an epoch."""
    rows = len(loader.sampler)
    return rows // BATCH * BATCH if getattr(loader, "drop_last", False) else rows


def seeded() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)


def digest(*tensors: Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def torchvision_imports() -> object:
    """Import torchvision, with schemas for its operators if they do not load; keep what is returned."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401

        return library
    return None


# ---- timm ----


@dataclass(frozen=True)
class Recipe:
    """The options of timm's train.py that matter here."""

    prefetcher: bool = True  # mixup is then the loader's, else the loop's
    autocast: bool = False  # bfloat16
    mixup_off: int = 1  # the epoch


class Pictures(Dataset[Any]):
    """Noise as PIL images, 40 x 40, each with a label."""

    transform: Any = None  # timm sets it

    def __len__(self) -> int:
        return PICTURES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index % CLASSES


def timm_trained(recipe: Recipe, swap: Swap) -> tuple[Trained, Any]:
    """What timm's parts do in the loop of its train.py, and the loader."""
    from timm import create_model
    from timm.data import FastCollateMixup, Mixup, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    seeded()
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": CLASSES}
    mixup = None if recipe.prefetcher else Mixup(**mixing)
    loader = create_loader(
        Pictures(),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=recipe.prefetcher,
        collate_fn=FastCollateMixup(**mixing) if recipe.prefetcher else None,
        re_prob=0.25,
        color_jitter=0.4,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=CLASSES,
        depth=4,
        drop_path_rate=0.1,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    loader = swap(loader, model)
    each = (len(loader) + ACCUMULATE - 1) // ACCUMULATE
    schedule, epochs = create_scheduler_v2(
        optimizer, num_epochs=EPOCHS, updates_per_epoch=each, step_on_epochs=False
    )
    found, soft, updates = Trained(), SoftTargetCrossEntropy(), 0
    for epoch in range(min(EPOCHS, epochs)):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        if epoch >= recipe.mixup_off:
            if recipe.prefetcher and loader.mixup_enabled:
                loader.mixup_enabled = False
            elif mixup is not None:
                mixup.mixup_enabled = False
        model.train()
        optimizer.zero_grad()
        last, last_group = len(loader) - 1, len(loader) % ACCUMULATE
        for index, (inputs, targets) in enumerate(loader):
            found.batches.append(digest(inputs, targets))
            if mixup is not None:
                inputs, targets = mixup(inputs, targets)
            found.mixed.append(bool((targets.sort(1).values[:, -2] > targets.min()).any()))
            part = ACCUMULATE if index <= last - last_group else last_group
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
                loss = soft(model(inputs), targets)
            (loss / part).backward()
            found.losses.append(loss.item())
            if index == last or (index + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
                found.updates.append(len(found.batches))
                updates += 1
                schedule.step_update(num_updates=updates)
        schedule.step(epoch + 1)
    found.weights = digest(*model.state_dict().values())
    return found, loader


def check_timm(table: Table) -> None:
    """All that can be checked of timm in one process."""
    recipes = {
        "prefetcher": Recipe(),
        "prefetcher, bfloat16": Recipe(autocast=True),
        "no prefetcher": Recipe(prefetcher=False),
    }
    for name, recipe in recipes.items():
        timm_checks(table, name, recipe)


def timm_checks(table: Table, name: str, recipe: Recipe) -> None:
    plain, _ = timm_trained(recipe, as_it_is)
    sifted, loader = timm_trained(recipe, sifting(warmup=0))
    score = loss_after_one_block(recipe.autocast)
    table.row(
        f"{name}: keep=1.0 as plain", lambda: same(plain, timm_trained(recipe, keeping_all)[0])
    )
    table.row(
        f"{name}: sifted as by hand",
        lambda: as_by_hand(plain, sifted, timm_trained(recipe, by_hand(score))[0], loader),
    )
    table.row(f"{name}: updates", lambda: accumulated(sifted))
    table.row(f"{name}: mixup switched off", lambda: mixup_ended(sifted, recipe))


def accumulated(run: Trained) -> str:
    """Updates after every group of batches, and after those that are left of an epoch."""
    epoch = len(run.batches) // EPOCHS
    wanted = [*range(ACCUMULATE, epoch, ACCUMULATE), epoch]
    wanted += [epoch + number for number in wanted]
    if not epoch % ACCUMULATE or run.updates != wanted:
        raise Failed(f"updates after {run.updates} batches, wanted {wanted}")
    return f"after {wanted} batches"


def mixup_ended(run: Trained, recipe: Recipe) -> str:
    """Labels are mixtures up to an epoch, and none is one from there on."""
    off = recipe.mixup_off * len(run.batches) // EPOCHS
    before, since = sum(run.mixed[:off]), sum(run.mixed[off:])
    if not before or since:
        raise Failed(f"{before} mixed batches before it was switched off, {since} after")
    return f"{before} of {off} batches mixed before, none of {len(run.mixed) - off} after"


# ---- Composer ----


class Net(nn.Module):
    """Points [P, 8] to logits [P, 10], through four blocks of width 16."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Dropout(dropout))
            for _ in range(4)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        hidden = self.embed(points)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def composer_trained(
    swap: Swap,
    dropout: float = 0.1,
    microbatch: int = BATCH,
    save: Path | None = None,
    load: Path | None = None,
) -> tuple[Trained, Any]:
    """What Composer's Trainer does, and the loader."""
    from composer import Callback, Trainer
    from composer.models import ComposerClassifier
    from composer.utils import dist

    seeded()
    points = TensorDataset(torch.randn(POINTS, 8), torch.randint(0, CLASSES, (POINTS,)))
    model, found = ComposerClassifier(Net(dropout), num_classes=CLASSES), Trained()

    class Watch(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            found.batches.append(digest(*state.batch))

        def after_loss(self, state: Any, logger: Any) -> None:
            found.losses.append(state.loss.item())

    inner = DataLoader(points, batch_size=BATCH, sampler=dist.get_sampler(points, shuffle=True))
    loader = swap(inner, model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def updated(*_: Any) -> None:
        if found.batches:  # to load the state of an optimizer, torch has it take a step of nothing
            found.updates.append(len(found.batches))

    optimizer.register_step_post_hook(updated)
    with warnings.catch_warnings():
        # The last batch of the plain loader is smaller than a microbatch.
        warnings.filterwarnings("ignore", message="Cannot split tensor of length 2")
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            max_duration=f"{EPOCHS}ep",
            optimizers=optimizer,
            callbacks=[Watch()],
            device="cpu",
            device_train_microbatch_size=microbatch,
            seed=3,
            save_folder=save and str(save),
            save_interval="5ba",
            load_path=load and str(load),
            progress_bar=False,
        )
        trainer.fit()
        trainer.close()
    found.weights = digest(*model.module.state_dict().values())
    return found, loader


def check_composer(table: Table) -> None:
    """All that can be checked of Composer in one process."""
    plain, _ = composer_trained(as_it_is)
    table.row("keep=1.0 as plain", lambda: same(plain, composer_trained(keeping_all)[0]))
    for microbatch in (BATCH, BATCH // 2):
        table.row(
            f"microbatches of {microbatch}: sifted as by hand",
            lambda microbatch=microbatch: in_microbatches(plain, microbatch),
        )
    with tempfile.TemporaryDirectory() as folder:
        for warmup in (0, WARMUP, LONG):
            resumed(table, f"warm-up {warmup}", sifting(warmup), Path(folder, str(warmup)))
        counted = sifting(LONG, count="optimizer")
        resumed(table, f"warm-up {LONG} updates", counted, Path(folder, "counted"))


def in_microbatches(plain: Trained, microbatch: int) -> str:
    """As by hand, the model called with so many rows at once."""
    sifted, loader = composer_trained(sifting(WARMUP), microbatch=microbatch)
    hand, _ = composer_trained(by_hand(loss_after_one_block(), WARMUP), microbatch=microbatch)
    if len(sifted.losses) != len(sifted.batches) * BATCH // microbatch:
        raise Failed(f"{len(sifted.losses)} losses of {len(sifted.batches)} batches")
    return as_by_hand(plain, sifted, hand, loader)


def resumed(table: Table, name: str, swap: Swap, folder: Path) -> None:
    """From every checkpoint of a run, another goes on as that did.

    Without dropout: Composer restores no random state in the middle of an epoch of data that have a state.
    """
    unbroken, _ = composer_trained(swap, dropout=0, save=folder)

    def goes_on(checkpoint: Path, batches: int) -> str:
        after, _ = composer_trained(swap, dropout=0, load=checkpoint)
        return same(unbroken.after(batches), after)

    saved = {int(path.name.split("-")[1][2:]): path for path in folder.glob("ep*-ba*-rank0.pt")}
    for batches, path in sorted(saved.items()):
        if batches < len(unbroken.batches):
            what = f"{name}: resumed at {path.name.removesuffix('-rank0.pt')}"
            table.row(what, lambda path=path, batches=batches: goes_on(path, batches))
    if not saved:
        table.rows.append(("FAILED", f"{name}: resumed", 0.0, "no checkpoint was saved"))


CHECKS = {"timm": check_timm, "composer": check_composer}


if __name__ == "__main__":
    sys.exit(main())
