"""A hindrance in one class, as whoever adds one writes it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from sophon._models import batch_statistics
from sophon._protection.term import Contribution, Hindrance, State, Surroundings, TermSpec
from sophon._specs.base import Positive


class ToySpec(TermSpec):
    """`kind = "toy"`: outputs on restricted images are to be small."""

    kind: Literal["toy"] = "toy"
    batch_size: Positive = 16


class ToyTerm(Hindrance[ToySpec]):
    """The mean square of the outputs on a batch of restricted images."""

    spec_type = ToySpec

    def __init__(self, spec: ToySpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        domain = around.setting.restricted[0]
        self.feed = around.setting.feed(domain, domain.train, batch_size=spec.batch_size)
        self.taken = 0

    def contribute(self, model: nn.Module) -> Contribution:
        """Return the gradient of one batch."""
        images, _ = self.feed.batch(self.taken)
        self.taken += 1
        with batch_statistics(model):
            loss = model(images).square().mean()
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        held = loss.detach()
        return Contribution(dict(zip(named, found, strict=True)), held, held)

    def state(self) -> State:
        """Return how many batches were taken."""
        return {}, {"taken": self.taken}

    def restore(self, model: nn.Module, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.taken = meta["taken"]
