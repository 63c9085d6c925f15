"""Attackers of one shape trained one after another, and stacked with `torch.func`.

Stacked, one forward runs all of them at once (`vmap` over `stack_module_state`). It is worth
having where a network is too small to fill a device. The engine does not stack: see the table.
`--device cuda` measures it on a card.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from cases import network
from timing import Row, notes, ratios, row, show
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

ATTACKERS, RATE, MOMENTUM = 4, 1e-3, 0.9


def batches(steps: int, size: int, batch: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return batches (attackers, batch, 3, size, size) with labels."""
    stream = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(ATTACKERS, batch, 3, size, size, generator=stream).to(device),
            torch.randint(10, (ATTACKERS, batch), generator=stream).to(device),
        )
        for _ in range(steps)
    ]


class OneByOne:
    """Attackers with an optimizer each, trained one after another."""

    def __init__(self, model: nn.Module) -> None:
        self.attackers = [copy.deepcopy(model).train() for _ in range(ATTACKERS)]
        self.optimizers = [
            torch.optim.SGD(attacker.parameters(), RATE, momentum=MOMENTUM, fused=True)
            for attacker in self.attackers
        ]

    def train(self, made: list[tuple[Tensor, Tensor]]) -> None:
        for index, attacker in enumerate(self.attackers):
            for images, labels in made:
                F.cross_entropy(attacker(images[index]), labels[index]).backward()
                self.optimizers[index].step()
                self.optimizers[index].zero_grad()


class Stacked:
    """Attackers whose weights lie in one tensor for each parameter, trained together."""

    def __init__(self, model: nn.Module) -> None:
        attackers = [copy.deepcopy(model).train() for _ in range(ATTACKERS)]
        self.weights, self.buffers = stack_module_state(attackers)
        template = copy.deepcopy(model).train()

        def loss(weights: dict, state: dict, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(template, (weights, state), (images,)), labels)

        self.gradient = vmap(grad(loss))
        parameters = list(self.weights.values())
        self.optimizer = torch.optim.SGD(parameters, RATE, momentum=MOMENTUM, fused=True)

    def train(self, made: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in made:
            detached = {name: value.detach() for name, value in self.weights.items()}
            gradients = self.gradient(detached, self.buffers, images, labels)
            for name, parameter in self.weights.items():
                parameter.grad = gradients[name]
            self.optimizer.step()


def agreement(single: OneByOne, together: Stacked) -> float:
    """Return the largest difference of a weight between the two ways."""
    return max(
        float((together.weights[name][index].detach() - value.detach()).abs().max())
        for index, attacker in enumerate(single.attackers)
        for name, value in attacker.named_parameters()
    )


def compared(name: str, size: int, steps: int, *, short: bool, device: torch.device) -> Row:
    steps, repeats, batch = (2, 1, 8) if short else (steps, 3, 64)
    model = network(name).to(device)
    made = batches(steps, size, batch, device)
    single, together = OneByOne(model), Stacked(model)
    single.train(made[:2])
    together.train(made[:2])
    apart = agreement(single, together)

    def waited(way: OneByOne | Stacked) -> None:
        way.train(made)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    values = ratios(lambda: waited(together), lambda: waited(single), repeats, lambda: None)
    what = f"{ATTACKERS} attackers stacked / one by one: {name}, {size}x{size}, batch {batch}, fp32"
    note = f"{steps} steps on {device}; weights differ by at most {apart:.1g} after two"
    return row(what, values, note=note)


def rows(short: bool, device: str = "cpu") -> list[Row]:
    """Return stacked against one by one, on two networks."""
    cases = (("small network", 16, 20), ("ResNet-20", 32, 4))
    return [compared(*case, short=short, device=torch.device(device)) for case in cases]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--device", default="cpu", help="where attackers train, such as cuda")
    given = parser.parse_args()
    found = rows(given.quick, given.device)
    print("\n".join([*show(found), *notes(found)]))
