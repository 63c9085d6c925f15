"""What a protection of the paper's largest network costs on data-centre cards, by calculation.

    python benchmarks/scaling.py

Counted here: floating point operations of a forward pass (torch's counter), bytes that it keeps
for its backward (what a second image adds to those of one: autocast also keeps copies of the
weights, once a pass), the size of the weights. Assumed: a backward is two forwards (torch 2.13
counts depthwise convolutions far too high there), what a card reaches of its peak, and how fast
cards add their gradients up. Nothing here ran on a card.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from sophon._models import resolve_model
from sophon._specs import ModelSpec

SIZE, ROUNDS, K, SUPPORT, QUERY, ORIGINAL = 224, 800, 50, 135, 15, 150
# NVIDIA H100 SXM, bf16, dense, of its data sheet; the shares are guesses: many small layers, run
# one by one, wait for memory.
PEAK, SHARES = 989e12, (0.05, 0.1, 0.2)
# Bytes a second of a ring reduction: within a node of 8 (NVLink) and between nodes (400 Gb/s).
WITHIN, BETWEEN = 200e9, 40e9


@dataclass(frozen=True)
class Counted:
    """What one image and the weights cost: operations, and bytes kept an image and a pass."""

    parameters: int
    forward: float
    kept: int
    kept_once: int


def counted(name: str) -> Counted:
    """Return what the network costs an image, in train mode, under bf16 autocast."""
    model, _ = resolve_model(ModelSpec(name=name, classes=10), base=Path())
    model.train()
    forward, one = passed(model, 1)
    _, two = passed(model, 2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counted(parameters, forward, two - one, 2 * one - two)


def passed(model: nn.Module, batch: int) -> tuple[float, int]:
    """Return the operations of a forward pass, and the bytes beside weights kept for a backward."""
    images = torch.randn(batch, 3, SIZE, SIZE)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as forward,
        saved_tensors_hooks(keep, lambda kept: kept),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(images)
    return forward.get_total_flops(), sum(held.values())


def hours(work: float, share: float) -> float:
    """Return what so many operations take one card, in hours."""
    return work / (PEAK * share) / 3600


def table(name: str, attackers: tuple[int, ...] = (1, 8, 64)) -> list[str]:
    """Return Markdown: counts, then hours of the whole run by attackers a round and cards."""
    cost = counted(name)
    image = 3 * cost.forward
    parts = {"support": K * SUPPORT * image, "query": K * QUERY * image}
    original = ORIGINAL * image
    rows = [
        f"`{name}` at {SIZE}x{SIZE}: {cost.parameters / 1e6:.1f} M weights;"
        f" {cost.forward / 1e9:.1f} GFLOP an image forward, so {image / 1e9:.0f} with its backward;"
        f" {cost.kept / 2**20:.0f} MiB an image kept for the backward, and"
        f" {cost.kept_once / 2**20:.0f} MiB a pass.",
        "",
        f"A support batch of {SUPPORT}: {SUPPORT * cost.kept / 2**30:.1f} GiB of activations, a"
        f" query batch of {QUERY}: {QUERY * cost.kept / 2**30:.1f} GiB (never both at once); model,"
        f" attacker, their gradients and moments: {9 * 4 * cost.parameters / 2**30:.1f} GiB.",
        "",
        f"| attackers a round | work of {ROUNDS} rounds | "
        + " | ".join(f"{cards} card{'s' * (cards > 1)}" for cards in attackers)
        + " |",
        "|---|---|" + "---|" * len(attackers),
    ]
    for number in attackers:
        cells = []
        for cards in attackers:
            busiest = -(-number // cards)
            work = ROUNDS * (busiest * sum(parts.values()) + original)
            low, high = hours(work, max(SHARES)), hours(work, min(SHARES))
            cells.append(f"{low:.2f} to {high:.2f} h")
        whole = ROUNDS * (number * sum(parts.values()) + original)
        rows.append(f"| {number} | {whole / 1e18:.2f} EFLOP | " + " | ".join(cells) + " |")
    # Gradients of suppression travel in float64, those of reinforcement in float32.
    suppression, reinforcement = 8 * cost.parameters, 4 * cost.parameters
    size = suppression + reinforcement
    round_ = sum(parts.values()) / (PEAK * SHARES[1])
    share = [part / (sum(parts.values()) + original) for part in (*parts.values(), original)]
    rows += [
        "",
        f"Of a round with one attacker: support passes {100 * share[0]:.0f} %, query passes"
        f" {100 * share[1]:.0f} %, reinforcement {100 * share[2]:.0f} %. Reductions of"
        f" {suppression / 2**20:.0f} MiB for a suppression step and"
        f" {reinforcement / 2**20:.0f} MiB for a reinforcement step take"
        f" {1000 * 2 * size / WITHIN:.0f} ms in a node and"
        f" {1000 * 2 * size / BETWEEN:.0f} ms between nodes, of {round_:.1f} s at"
        f" {100 * SHARES[1]:.0f} % of the peak.",
    ]
    return rows


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1] if len(sys.argv) > 1 else "timm:caformer_m36")))
