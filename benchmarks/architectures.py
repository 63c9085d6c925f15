"""Time and memory of a round of protection for each network of the paper, as its recipes run it.

    python benchmarks/architectures.py [--batches 2 8] [--steps 2] [NAME...]
    python benchmarks/architectures.py --full [--gradient-checkpointing] [NAME...]

Images of the original task are 224x224 and restricted ones 32x32, as in `recipes/paper/`; those of
the diffusion network are all 32x32. Each network runs in a process of its own: one rehearsed
attacker, one reinforcement step. Prints a Markdown row each; n = 1.

With `--full` it is the paper's round: 50 steps of 150 images, in the precision and on the device
that a run would take, with as many threads as torch takes (`OMP_NUM_THREADS` says). A first run
of one step and two images loads the kernels.

Without, it is one of few steps (2) and images, in fp32 with one thread, and an estimate of the
paper's.
A round is STEPS batches that the attacker trains on, as many queries and one batch of the original
task. It is timed with and without that one, at two batch sizes (2 and 8; the paper's is 150): so
what a batch costs is told from what an image costs, for each of the domains. The last column is
what that comes to for the paper's round: 100 restricted batches and one original of 150 images.
Seconds are processor time; memory is the process's peak, on a card the tensors' there.
"""

from __future__ import annotations

import argparse
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
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import Guard, ModelSpec, Precision, Strategy
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
CHECKPOINTED = [name for name in NAMES if name.startswith(("timm:caformer", DIFFUSERS))]
ORIGINAL, RESTRICTED = 224, 32
PAPER_STEPS, PAPER_BATCH = 50, 150
HEADER = (
    "| network | weights | K | batches of | restricted: a batch | an image | original: a batch"
    " | an image | peak memory, at the larger | a paper round, estimated |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
FULL_HEADER = (
    "| network | weights | device | precision | gradient checkpointing | a round | processor time |"
    " peak memory |\n|---|---|---|---|---|---|---|---|"
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


def protection(
    model: nn.Module, name: str, batch: int, steps: int, reinforced: int, precision: Precision
) -> Protection:
    """Return a run of three rounds, of which the last is checked."""
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
        precision=precision,
    )
    size = RESTRICTED if diffusion else ORIGINAL
    return Protection(
        model,
        original=noise("a", 0, batch, size),
        restricted=noise("b", 1, batch, RESTRICTED),
        task=Denoising() if diffusion else Classification(),
        spec=spec,
    )


def seconds_of(model: nn.Module, name: str, batch: int, steps: int, reinforced: int) -> float:
    """Return the seconds of the second round: the first warms up."""
    rounds = iter(protection(model, name, batch, steps, reinforced, "fp32"))
    next(rounds)
    start = time.process_time()
    next(rounds)
    return time.process_time() - start


def measure(name: str, batches: tuple[int, int], steps: int) -> str:
    """Return a network's row."""
    torch.set_num_threads(1)
    model = built(name)
    without = [seconds_of(model, name, batch, steps, 0) for batch in batches]
    whole = [seconds_of(model, name, batch, steps, 1) for batch in batches]
    count = 2 * steps
    restricted = Line.through(batches, (without[0] / count, without[1] / count))
    original = Line.through(batches, (whole[0] - without[0], whole[1] - without[1]))
    paper = 2 * PAPER_STEPS * restricted.at(PAPER_BATCH) + original.at(PAPER_BATCH)
    weights = sum(parameter.numel() for parameter in model.parameters())
    lines = " | ".join(
        f"{line.fixed:.3f} s | {line.image:.4f} s" for line in (restricted, original)
    )
    return (
        f"| `{shown(name)}` | {weights / 1e6:.1f} M | {steps} | {batches[0]}, {batches[1]} |"
        f" {lines} |"
        f" {peak_bytes() / 2**30:.2f} GiB |"
        f" {paper / 60:.1f} min |"
    )


def measure_full(
    name: str, *, checkpointed: bool, steps: int = PAPER_STEPS, batch: int = PAPER_BATCH
) -> str:
    """Return a network's row of a round as the paper has it."""
    model = built(name, checkpointed=checkpointed)
    list(zip((0,), protection(model, name, 2, 1, 1, "auto"), strict=False))
    run = protection(model, name, batch, steps, 1, "auto")
    rounds = iter(run)
    wall, processor = time.perf_counter(), time.process_time()
    next(rounds)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    weights = sum(parameter.numel() for parameter in model.parameters())
    card = run.setting.device.type == "cuda"
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if card else f"{threads} thread{'s' * (threads > 1)}"
    return (
        f"| `{shown(name)}` | {weights / 1e6:.1f} M | {device} | {run.setting.precision} |"
        f" {'on' if checkpointed else 'off'} | {wall:.1f} s | {processor:.1f} s |"
        f" {peak_bytes() / 2**30:.2f} GiB |"
    )


def built(name: str, *, checkpointed: bool = False) -> nn.Module:
    """Return the network of that name; a classifier tells two classes apart."""
    classes = None if name.startswith(DIFFUSERS) else 2
    spec = ModelSpec(name=name, classes=classes, gradient_checkpointing=checkpointed)
    return resolve_model(spec, base=Path())[0]


def shown(name: str) -> str:
    """Return how the table names a network."""
    return f"{DIFFUSERS}{UNET.name}" if name.startswith(DIFFUSERS) else name


def peak_bytes() -> int:
    """Return the peak memory of this process, or of its tensors on the card it works on."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print the rows of the networks named, or of all, each from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; default: the paper's")
    parser.add_argument(
        "--batches", nargs=2, type=int, metavar="BATCH", help="two batch sizes (2 8)"
    )
    parser.add_argument("--steps", type=int, help="steps of the attacker (2)")
    parser.add_argument("--full", action="store_true", help="a whole round of the paper's size")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="with --full; default: the networks that offer it",
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.full and (given.batches or given.steps):
        parser.error("--full has the paper's batches and steps: leave --batches and --steps out")
    if given.gradient_checkpointing and not given.full:
        parser.error("--gradient-checkpointing is measured with --full only")
    first, second = given.batches or (2, 8)
    if first == second:
        parser.error("--batches: give two different sizes, such as 2 8")
    if given.row is not None:
        if given.full:
            row = measure_full(given.row, checkpointed=given.gradient_checkpointing)
        else:
            row = measure(given.row, (first, second), given.steps or 2)
        print(row, flush=True)
        return
    print(FULL_HEADER if given.full else HEADER, flush=True)
    usual = [name for name in NAMES if name in CHECKPOINTED or not given.gradient_checkpointing]
    # One that fails, for want of memory say, takes no other's row.
    commands = [[sys.executable, *sys.argv, "--row", name] for name in given.names or usual]
    sys.exit(max(subprocess.run(command, check=False).returncode for command in commands))


if __name__ == "__main__":
    main()
