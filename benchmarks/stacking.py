"""Attackers of one shape trained one after another, and stacked with `torch.func`.

Stacked, one forward runs all of them at once (`vmap` over `stack_module_state`). It is worth
having where a network is too small to fill a device. The engine does not stack: see the table.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from cases import network
from timing import Row, alone, ratios, row
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

ATTACKERS, RATE, MOMENTUM = 4, 1e-3, 0.9


def batches(steps: int, size: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches (attackers, batch, 3, size, size) with labels."""
    stream = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(ATTACKERS, batch, 3, size, size, generator=stream),
            torch.randint(10, (ATTACKERS, batch), generator=stream),
        )
        for _ in range(steps)
    ]


def one_by_one(model: nn.Module, made: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
    trained = []
    for index in range(ATTACKERS):
        attacker = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(attacker.parameters(), RATE, momentum=MOMENTUM, fused=True)
        for images, labels in made:
            F.cross_entropy(attacker(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(attacker)
    return trained


def stacked(model: nn.Module, made: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    attackers = [copy.deepcopy(model).train() for _ in range(ATTACKERS)]
    held, buffers = stack_module_state(attackers)
    template = copy.deepcopy(model).train()

    def loss(weights: dict, state: dict, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(template, (weights, state), (images,)), labels)

    gradient = vmap(grad(loss))
    parameters = list(held.values())
    optimizer = torch.optim.SGD(parameters, RATE, momentum=MOMENTUM, fused=True)
    for images, labels in made:
        detached = {name: value.detach() for name, value in held.items()}
        gradients = gradient(detached, buffers, images, labels)
        for name, parameter in held.items():
            parameter.grad = gradients[name]
        optimizer.step()
    return held


def agreement(model: nn.Module, made: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of a weight between the two ways."""
    single, together = one_by_one(model, made), stacked(model, made)
    return max(
        float((together[name][index].detach() - value.detach()).abs().max())
        for index, attacker in enumerate(single)
        for name, value in attacker.named_parameters()
    )


def compared(name: str, size: int, *, short: bool) -> Row:
    steps, repeats, batch = (2, 1, 8) if short else (2, 3, 64)
    model, made = network(name), batches(steps, size, batch)
    values = ratios(lambda: stacked(model, made), lambda: one_by_one(model, made), repeats)
    apart = agreement(model, made[:2])
    what = f"{ATTACKERS} attackers stacked / one by one: {name}, {size}x{size}, batch {batch}, fp32"
    return row(what, values, note=f"weights differ by at most {apart:.1g}")


def rows(short: bool) -> list[Row]:
    """Return stacked against one by one, on two networks."""
    return [compared(*case, short=short) for case in (("small network", 16), ("ResNet-20", 32))]


if __name__ == "__main__":
    alone(rows)
