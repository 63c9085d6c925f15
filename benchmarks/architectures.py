"""Time and memory of a round of protection for each network of the paper, as its recipes run it.

    python benchmarks/architectures.py [BATCH BATCH [STEPS]]

Images of the original task are 224x224 and restricted ones 32x32, as in `recipes/paper/`; those of
the diffusion network are all 32x32. Each network runs in a process of its own: one rehearsed
attacker of STEPS steps (2; the paper's K is 50), one reinforcement step, one thread, fp32.

A round is STEPS batches that the attacker trains on, as many queries and one batch of the original
task. It is timed with and without that one, at two batch sizes (2 and 8; the paper's is 150): so
what a batch costs is told from what an image costs, for each of the domains. The last column is
what that comes to for the paper's round: 100 restricted batches and one original of 150 images.
Prints a Markdown row each. Seconds are processor time, n = 1; memory is the process's peak.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sophon._data import Domain
from sophon._models import DIFFUSERS, resolve_model
from sophon._protect import Protection
from sophon._specs import Guard, ModelSpec, ProtectSpec, Rehearsal, Strategy
from sophon._tasks import Classification, Denoising

UNET = Path(__file__).resolve().parent.parent / "recipes" / "paper" / "ddpm-unet-32.json"
NAMES = (
    "timm:caformer_s18",
    "timm:caformer_m36",
    "torchvision:resnet50",
    "torchvision:resnet34",
    "torchvision:resnet18",
    "torchvision:vgg16_bn",
    f"{DIFFUSERS}{UNET}",
)
ORIGINAL, RESTRICTED = 224, 32
PAPER_STEPS, PAPER_BATCH = 50, 150
HEADER = (
    "| network | weights | K | batches of | restricted: a batch | an image | original: a batch"
    " | an image | peak memory, at the larger | a paper round, estimated |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Line:
    """Seconds of a batch: `fixed` and so many more for each image."""

    fixed: float
    image: float

    @classmethod
    def through(cls, batches: tuple[int, int], seconds: tuple[float, float]) -> Line:
        """Return the line through two measurements; noise may make a fixed part negative."""
        image = (seconds[1] - seconds[0]) / (batches[1] - batches[0])
        return cls(seconds[0] - image * batches[0], image)

    def at(self, batch: int) -> float:
        """Return the seconds of a batch of so many images."""
        return self.fixed + self.image * batch


def noise(name: str, seed: int, batch: int, size: int) -> Domain:
    """Return two classes of noise, as many images as a few batches need."""
    count = 4 * batch + 16
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Domain.from_arrays(name, pixels, np.arange(count) % 2, test=0.1)


def seconds_of(model: nn.Module, name: str, batch: int, steps: int, reinforced: int) -> float:
    """Return the seconds of the second round of three: the first warms up, the last is checked."""
    diffusion = name.startswith(DIFFUSERS)
    attacker = Strategy(optimizer="sgd", learning_rate=1e-4, batch_size=batch)
    kept: dict[str, Any] = {"tolerance_relative": 10.0} if diffusion else {}
    spec = ProtectSpec(
        rounds=3,
        suppression="dos" if diffusion else "ice",
        reinforcement_steps=reinforced,
        original_batch_size=batch,
        rehearsal=Rehearsal(steps=steps, query_batch_size=batch, fixed=attacker),
        guard=Guard(every=3, **kept),
        precision="fp32",
    )
    size = RESTRICTED if diffusion else ORIGINAL
    run = Protection(
        model,
        original=noise("a", 0, batch, size),
        restricted=noise("b", 1, batch, RESTRICTED),
        task=Denoising() if diffusion else Classification(),
        spec=spec,
    )
    rounds = iter(run)
    next(rounds)
    start = time.process_time()
    next(rounds)
    return time.process_time() - start


def measure(name: str, batches: tuple[int, int], steps: int) -> str:
    """Return a network's row."""
    torch.set_num_threads(1)
    classes = None if name.startswith(DIFFUSERS) else 2
    model, _ = resolve_model(ModelSpec(name=name, classes=classes), base=Path())
    without = [seconds_of(model, name, batch, steps, 0) for batch in batches]
    whole = [seconds_of(model, name, batch, steps, 1) for batch in batches]
    count = 2 * steps
    restricted = Line.through(batches, (without[0] / count, without[1] / count))
    original = Line.through(batches, (whole[0] - without[0], whole[1] - without[1]))
    paper = 2 * PAPER_STEPS * restricted.at(PAPER_BATCH) + original.at(PAPER_BATCH)
    weights = sum(parameter.numel() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shown = f"{DIFFUSERS}{UNET.name}" if name.startswith(DIFFUSERS) else name
    lines = " | ".join(
        f"{line.fixed:.3f} s | {line.image:.4f} s" for line in (restricted, original)
    )
    return (
        f"| `{shown}` | {weights / 1e6:.1f} M | {steps} | {batches[0]}, {batches[1]} | {lines} |"
        f" {peak:.2f} GiB |"
        f" {paper / 60:.1f} min |"
    )


def main() -> None:
    """Print the row of the network named last, or of all, each from its own process."""
    given = [int(one) for one in sys.argv[1:4]]
    if len(given) == 1 or (len(given) > 1 and given[0] == given[1]):
        sys.exit("give two different batch sizes, such as 2 8")
    first, second, steps = given if len(given) == 3 else ((*given, 2) if given else (2, 8, 2))
    if len(sys.argv) > 4:
        print(measure(sys.argv[4], (first, second), steps), flush=True)
        return
    print(HEADER, flush=True)
    for name in NAMES:
        command = [sys.executable, __file__, str(first), str(second), str(steps), name]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
