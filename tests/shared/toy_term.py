"""A hindrance in one class, as whoever adds one writes it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from sophon._data import check_batch_fits
from sophon._models import batch_statistics
from sophon._protection.attackers import domain_of
from sophon._protection.term import Contribution, Hindrance, State, Surroundings, TermSpec
from sophon._specs.base import Positive


class ToySpec(TermSpec):
    """`kind = "toy"`: outputs on restricted images are to be small."""

    kind: Literal["toy"] = "toy"
    batch_size: Positive = 16


class ToyTerm(Hindrance[ToySpec]):
    """The mean square of the outputs on a batch of restricted images; domains take turns."""

    spec_type = ToySpec

    def __init__(self, spec: ToySpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        setting = around.setting
        self.weights = [domain.weight for domain in setting.restricted]
        self.taken = [0 for _ in setting.restricted]
        self.feeds = [
            setting.feed(
                domain,
                domain.train,
                batch_size=spec.batch_size,
                stream=(around.seed, ("toy", domain.name)),
            )
            for domain in setting.restricted
        ]

    @classmethod
    def check(cls, spec: ToySpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless every domain has a batch."""
        for domain in around.setting.restricted:
            check_batch_fits(domain, spec.batch_size, "protect.hinder: toy needs batch_size")

    def contribute(self, model: nn.Module) -> Contribution:
        """Return the gradient of one batch of one domain."""
        which = domain_of(sum(self.taken), self.weights)
        images, _ = self.feeds[which].batch(self.taken[which])
        self.taken[which] += 1
        with batch_statistics(model):
            loss = model(images).square().mean()
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        held = loss.detach()
        # All computed the whole batch; kernels need not agree to the last bit on that.
        self.around.ranks.follow_first([*found, held])
        return Contribution(
            gradients=dict(zip(named, found, strict=True)),
            loss=held,
            score=held,
            domains=(self.around.setting.restricted[which].name,),
        )

    def state(self) -> State:
        """Return how many batches of each domain were taken."""
        return {}, {"taken": self.taken}

    def restore(self, model: nn.Module, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.taken = list(meta["taken"])
