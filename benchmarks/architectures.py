"""Time and memory of one round of protection for each classifier of the paper, at 224x224.

    python benchmarks/architectures.py [BATCH [STEPS]]

Each architecture runs in a process of its own: one rehearsed attacker of STEPS steps (the paper's
K is 50) with BATCH images a step (the paper's is 150), one reinforcement step, one thread, fp32.
Prints a Markdown row each. Seconds are processor time; memory is the process's peak.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sophon._data import Domain
from sophon._models import resolve_model
from sophon._protect import Protection
from sophon._specs import Guard, ModelSpec, ProtectSpec, Rehearsal, Strategy

NAMES = (
    "timm:caformer_s18",
    "timm:caformer_m36",
    "torchvision:resnet50",
    "torchvision:resnet34",
    "torchvision:resnet18",
    "torchvision:vgg16_bn",
)
SIZE = 224


def noise(name: str, seed: int, batch: int) -> Domain:
    count = 4 * batch + 8
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return Domain.from_arrays(name, pixels, np.arange(count) % 2, test=0.1)


def measure(name: str, batch: int, steps: int) -> str:
    torch.set_num_threads(1)
    model, _ = resolve_model(ModelSpec(name=name, classes=2), base=Path())
    attacker = Strategy(optimizer="sgd", learning_rate=1e-4, batch_size=batch)
    spec = ProtectSpec(
        rounds=2,
        suppression="ice",
        original_batch_size=batch,
        rehearsal=Rehearsal(steps=steps, query_batch_size=batch, fixed=attacker),
        guard=Guard(every=2),
        precision="fp32",
    )
    run = iter(
        Protection(model, original=noise("a", 0, batch), restricted=noise("b", 1, batch), spec=spec)
    )
    next(run)
    start = time.process_time()
    # The first round is warm-up; the second holds the guard's check, of a few images.
    list(run)
    seconds = time.process_time() - start
    weights = sum(parameter.numel() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    per_image = seconds / (batch * (2 * steps + 1))
    return (
        f"| `{name}` | {weights / 1e6:.1f} M | {batch} | {steps} | {seconds:.1f} s |"
        f" {per_image:.3f} s | {peak:.2f} GiB |"
    )


def main() -> None:
    given = [int(one) for one in sys.argv[1:3]]
    batch, steps = (*given, 4, 2)[:2] if len(given) != 1 else (given[0], 2)
    if len(sys.argv) > 3:
        print(measure(sys.argv[3], batch, steps))
        return
    for name in NAMES:
        command = [sys.executable, __file__, str(batch), str(steps), name]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
