"""A hindrance: one step on restricted images lowers their loss by little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from sophon._base.seeding import seeded
from sophon._protection.batched import Batch, Judged
from sophon._protection.probe import ProbingHindrance, ProbingSpec
from sophon._specs.base import Rate

_LEAST = 1e-7


class BoosterSpec(ProbingSpec):
    """`kind = "booster"`: one step of length `alpha` against a probe's loss is to gain little.

    The paper's lambda is the term's `weight`.
    """

    kind: Literal["booster"] = "booster"
    alpha: Rate = 0.1


class BoosterTerm(ProbingHindrance[BoosterSpec]):
    """h(w) - h(w - alpha g / |g|), g = grad h(w), whose gradient is taken as
    grad h(w) - grad h(w - alpha g / |g|).

    arXiv 2409.01586 (ICLR 2025): the step is held constant, so that no second derivative is needed;
    |g| is the norm over all weights. h is the cross-entropy of a linear probe on the head's input,
    the same batch and the same probe before and after the step.

    Where it departs: a language model has one head for every task, which takes part in the step; a
    head of other classes says nothing of restricted labels, so a probe that is trained along takes
    its place, and stays where it is while the encoder steps. Dropout is the same on both sides.
    """

    spec_type = BoosterSpec
    exact = True

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the probe's accuracy before the step."""
        before, right, gradients = self._slope(model, batch, self.spec.probe_steps)
        squares = torch.stack([value.double().square().sum() for value in gradients.values()])
        scale = float(self.spec.alpha / squares.sum().sqrt().clamp_min(_LEAST))
        with _moved(model, {name: -scale * value for name, value in gradients.items()}):
            after, _, stepped = self._slope(model, batch, 0)
        # Both gradients are there already: a loss of that value, linear in the weights.
        loss = before - after
        for name, parameter in model.named_parameters():
            if name in gradients:
                change = gradients[name] - stepped[name]
                loss = loss + (change * (parameter - parameter.detach())).sum()
        return loss, right, {"cross-entropy": before, "drop": before - after}

    def _slope(
        self, model: nn.Module, batch: Batch, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return h, the probe's accuracy after so many steps of its own, and the gradient of h."""
        parameters = dict(model.named_parameters())
        with seeded(self.around.seed, self.spec.kind, batch.turn, "pass"):
            _, features = self.passed(model, batch.images)
        wrong, right = self.probe.loss(features, batch, steps)
        found = torch.autograd.grad(wrong, list(parameters.values()), allow_unused=True)
        held = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        return wrong.detach(), right, held


@contextmanager
def _moved(model: nn.Module, by: dict[str, Tensor]) -> Iterator[None]:
    """Hold the model with its weights moved; afterwards they are what they were, to the bit."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in by}
    try:
        with torch.no_grad():
            for name, change in by.items():
                parameters[name].add_(change)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
