"""Measure what the engine costs beyond the bare passes, side by side in one run.

`make bench` prints one table: ratio of sophon's time to a plain PyTorch loop that does the same
forward, backward and optimizer steps and nothing else. Images are random: speed needs no data.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sophon._circumstances import environment
from sophon._data import Domain
from sophon._finetune import FineTuning
from sophon._networks import ResNet20
from sophon._protect import Protection
from sophon._rehearsal import Rehearsals
from sophon._setting import Setting
from sophon._specs import ProtectSpec, Rehearsal, Strategy
from sophon._suppression import SUPPRESSIONS

STEPS, SUPPORT, QUERY, REPEATS = 10, 135, 15, 5


def domain(name: str, seed: int) -> Domain:
    """Return 2,000 random 32x32 images in ten classes."""
    stream = np.random.default_rng(seed)
    images = stream.integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    return Domain.from_arrays(name, images, np.arange(2000) % 10)


def bare_training(model: torch.nn.Module, setting: Setting, batches: list[tuple]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    for images, labels in batches:
        with setting.autocast():
            loss = F.cross_entropy(model(images[:SUPPORT]).float(), labels[:SUPPORT])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_rehearsal(model: torch.nn.Module, setting: Setting, batches: list[tuple]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    for images, labels in batches:
        with setting.autocast():
            loss = F.cross_entropy(model(images[:SUPPORT]).float(), labels[:SUPPORT])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with setting.autocast():
            logits = model(images[SUPPORT:])
        SUPPRESSIONS["klu"](logits.float(), labels[SUPPORT:]).mean().backward()
        optimizer.zero_grad()


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def row(name: str, ours: Callable[[], object], bare: Callable[[], object]) -> None:
    ours()
    bare()
    ratios = [seconds(ours) / seconds(bare) for _ in range(REPEATS)]
    middle = statistics.median(ratios)
    print(f"{name:34} {middle:6.2f}   {min(ratios):.2f} .. {max(ratios):.2f}   n = {REPEATS}")


def main() -> None:
    """Print the table and where it was measured."""
    strategy = Strategy(learning_rate=1e-3, batch_size=SUPPORT, steps=STEPS)
    rehearsal = Rehearsal(steps=STEPS, fixed=strategy, query_batch_size=QUERY)
    spec = ProtectSpec(rounds=1, rehearsal=rehearsal)
    torch.manual_seed(0)
    run = Protection(ResNet20(), original=domain("a", 0), restricted=domain("b", 1), spec=spec)
    setting, model = run.setting, run.model

    def pool() -> Rehearsals:
        return Rehearsals(spec, setting, [1.0])

    feed = pool().feed(0, strategy)
    batches = [feed.batch(step) for step in range(STEPS)]

    def attack() -> None:
        tuning = FineTuning(copy.deepcopy(model), strategy, setting, feed, stream=(0, ()))
        for _ in tuning.run(STEPS):
            pass

    where = environment(setting.device, setting.precision)
    print(f"{where.processor}, {where.threads} threads, {where.precision}, {where.versions}")
    print(f"{'ResNet-20, 32x32, K = ' + str(STEPS):34} ratio    least .. most")
    row(
        "attack steps / bare training",
        attack,
        lambda: bare_training(copy.deepcopy(model), setting, batches),
    )
    row(
        "rehearsal / bare passes",
        lambda: pool().suppress(model),
        lambda: bare_rehearsal(copy.deepcopy(model), setting, batches),
    )


if __name__ == "__main__":
    main()
