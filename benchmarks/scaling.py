"""What a protection of the paper's largest network costs on data-centre cards, by calculation.

    python benchmarks/scaling.py

The run is that of `recipes/paper/caformer-cifar10-ice.toml`, with the recipe's restricted images of
32x32 and with ones of 224x224. Counted here: floating point operations of a forward pass (torch's
counter), bytes that it keeps for its backward (what a second image adds to those of one: autocast
also keeps copies of the weights, once a pass), the size of the weights. Assumed: a backward is two
forwards (torch 2.13 counts depthwise convolutions far too high there), what a card reaches of its
peak, how fast cards add their gradients up, and how long an operator takes to start. Nothing here
ran on a card.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sophon._models import resolve_model
from sophon._specs import ModelSpec

ORIGINAL, RESTRICTED = 224, (224, 32)
# Images of a support step, of a query and of a reinforcement step.
ROUNDS, K, SUPPORT, QUERY, REINFORCED = 800, 50, 150, 150, 150
# NVIDIA H100 SXM, bf16, dense, of its data sheet; the shares are guesses: many small layers, run
# one by one, wait for memory.
PEAK, SHARES = 989e12, (0.05, 0.1, 0.2)
# Seconds from one operator's start to the next, where computing takes less; a guess, too.
LAUNCH = 10e-6
# Bytes a second of a ring reduction: within a node of 8 (NVLink) and between nodes (400 Gb/s).
WITHIN, BETWEEN = 200e9, 40e9
# What a device holds at most, in bytes a parameter, while an attacker takes its steps.
HELD = {
    "weights": 4,
    "two Adams": 16,
    "copies of the guard": 8,
    "attacker": 4,
    "its gradient": 4,
    "its optimizer": 8,
    "its displacement": 4,
    "its query gradients, added up": 4,
    "those of all attackers, in float64": 8,
}


@dataclass(frozen=True)
class Counted:
    """What an image, a pass and the weights cost.

    `forward` are an image's operations, `kept` and `kept_once` the bytes that an image and a pass
    keep for the backward, `calls` the operators of a forward pass that compute something.
    """

    parameters: int
    forward: float
    kept: int
    kept_once: int
    calls: int

    def seconds(self, batch: int, share: float) -> float:
        """Return what a forward and a backward take: computing or starting kernels, the longer."""
        return max(3 * batch * self.forward / (PEAK * share), 3 * self.calls * LAUNCH)


class Calls(TorchDispatchMode):
    """Counts operators that are called, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def counted(name: str, size: int) -> Counted:
    """Return what the network costs at square images, in train mode, under bf16 autocast."""
    model, _ = resolve_model(ModelSpec(name=name, classes=10), base=Path())
    model.train()
    one, two = (bytes_kept(model, torch.randn(batch, 3, size, size)) for batch in (1, 2))
    image = torch.randn(1, 3, size, size)
    # Fused attention on a processor is not counted; the same in its parts is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16), Calls() as calls:
        model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counted(parameters, forward.get_total_flops(), two - one, 2 * one - two, calls.count)


def bytes_kept(model: nn.Module, images: Tensor) -> int:
    """Return the bytes beside weights that a forward pass keeps for its backward."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        saved_tensors_hooks(keep, lambda kept: kept),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(images)
    return sum(held.values())


@dataclass(frozen=True)
class Round:
    """A round's passes: of restricted images, in support and query steps, and of original ones."""

    restricted: Counted
    original: Counted

    def work(self, attackers: int) -> float:
        """Return the operations of a round with so many attackers in one process."""
        passes = attackers * K * (SUPPORT + QUERY) * self.restricted.forward
        return 3 * (passes + REINFORCED * self.original.forward)

    def parts(self, share: float) -> dict[str, float]:
        """Return the seconds of each part of a round with one attacker."""
        return {
            "support passes": K * self.restricted.seconds(SUPPORT, share),
            "query passes": K * self.restricted.seconds(QUERY, share),
            "reinforcement": self.original.seconds(REINFORCED, share),
        }

    def hours(self, attackers: int, share: float) -> float:
        """Return the hours of the whole run with so many attackers in one process."""
        support, query, reinforcement = self.parts(share).values()
        return ROUNDS * (attackers * (support + query) + reinforcement) / 3600


def cell(cost: Round, attackers: int, cards: int) -> str:
    """Return the hours of the whole run, or that the attackers cannot be shared evenly."""
    if attackers % cards:
        return "refused"
    low, high = (
        shown(cost.hours(attackers // cards, share)) for share in (max(SHARES), min(SHARES))
    )
    return f"{low} h" if low == high else f"{low} to {high} h"


def shown(hours: float) -> str:
    """Return a number with two digits that count."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def hours_table(cost: Round, sizes: tuple[int, ...]) -> list[str]:
    """Return the Markdown table of hours by attackers a round and cards."""
    cards = " | ".join(f"{count} card{'s' * (count > 1)}" for count in sizes)
    lines = [
        f"| attackers a round | work of {ROUNDS} rounds | {cards} |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for attackers in sizes:
        cells = " | ".join(cell(cost, attackers, count) for count in sizes)
        lines.append(
            f"| {attackers} | {ROUNDS * cost.work(attackers) / 1e18:.2f} EFLOP | {cells} |"
        )
    return lines


def table(name: str, attackers: tuple[int, ...] = (1, 8, 64)) -> list[str]:
    """Return Markdown: counts, then hours of the whole run by attackers a round and cards."""
    costs = {size: counted(name, size) for size in {ORIGINAL, *RESTRICTED}}
    lines = []
    for size in sorted(costs, reverse=True):
        cost = costs[size]
        kept = SUPPORT * cost.kept + cost.kept_once
        lines.append(
            f"`{name}` at {size}x{size}: {cost.parameters / 1e6:.1f} M weights;"
            f" {cost.forward / 1e9:.2f} GFLOP an image forward, {3 * cost.forward / 1e9:.2f} with"
            f" its backward; {cost.calls} operators a forward pass; for the backward"
            f" {cost.kept / 2**20:.1f} MiB an image and {cost.kept_once / 2**20:.0f} MiB a pass,"
            f" {kept / 2**30:.1f} GiB for {SUPPORT} images."
        )
    parameters = costs[ORIGINAL].parameters
    lines += [
        "",
        f"Beside activations {sum(HELD.values())} bytes a parameter,"
        f" {sum(HELD.values()) * parameters / 2**30:.1f} GiB: "
        + ", ".join(f"{name} {size}" for name, size in HELD.items())
        + ".",
    ]
    # Gradients of suppression travel in float64, those of reinforcement in float32.
    suppression, reinforcement = 8 * parameters, 4 * parameters
    sent = 2 * (suppression + reinforcement)
    for size in RESTRICTED:
        cost = Round(costs[size], costs[ORIGINAL])
        parts = cost.parts(SHARES[1])
        seconds = sum(parts.values())
        shares = ", ".join(f"{name} {100 * part / seconds:.0f} %" for name, part in parts.items())
        lines += [
            "",
            f"Restricted images of {size}x{size}:",
            "",
            *hours_table(cost, attackers),
            "",
            f"Of a round with one attacker: {shares}. Reductions of"
            f" {suppression / 2**20:.0f} MiB for a suppression step and"
            f" {reinforcement / 2**20:.0f} MiB for a reinforcement step take"
            f" {1000 * sent / WITHIN:.0f} ms in a node and {1000 * sent / BETWEEN:.0f} ms between"
            f" nodes, of {seconds:.2f} s at {100 * SHARES[1]:.0f} % of the peak.",
        ]
    return lines


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1] if len(sys.argv) > 1 else "timm:caformer_m36")))
