"""A linear head on restricted labels that is trained along with the features it reads."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from sophon._base.seeding import seeded
from sophon._protection.attackers import below
from sophon._protection.batched import Batch, BatchHindrance, BatchSpec
from sophon._protection.term import State, Surroundings
from sophon._specs.base import Positive, Rate
from sophon._training.loop import optimizer_tensors, restore_optimizer


class Probe:
    """An attacker's head for each restricted domain, which follows the model by steps of Adam."""

    def __init__(self, around: Surroundings, kind: str, rate: float) -> None:
        setting = around.setting
        self.ranks = around.ranks
        layer = around.given.get_submodule(setting.head)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        self.heads: dict[str, nn.Linear] = {}
        for domain in setting.restricted:
            with seeded(around.seed, kind, "probe", domain.name):
                head = nn.Linear(cast(int, width), domain.class_count)
            self.heads[domain.name] = head.to(setting.device)
        self.optimizers = {name: Adam(head.parameters(), rate) for name, head in self.heads.items()}

    def loss(self, features: Tensor, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
        """Take steps on a batch's features (images, features); return the cross-entropy of the head
        that was found, through which gradients reach the features, and the accuracy.
        """
        head, optimizer = self.heads[batch.domain.name], self.optimizers[batch.domain.name]
        fixed = features.detach()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(head(fixed), batch.labels).backward()
            optimizer.step()
        # All computed the whole batch; kernels need not agree to the last bit on that.
        self.ranks.follow_first([value.detach() for value in head.parameters()])
        outputs = F.linear(features, head.weight.detach(), head.bias.detach())
        right = (outputs.detach().argmax(1) == batch.labels).float().mean()
        return F.cross_entropy(outputs, batch.labels), right

    def state(self) -> State:
        """Return the heads and their optimizers, as tensors by name and as plain values."""
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for name, head in self.heads.items():
            moments, meta[name] = optimizer_tensors(self.optimizers[name])
            for part, held in (("head", head.state_dict()), ("adam", moments)):
                tensors |= {f"probe/{name}/{part}/{key}": value for key, value in held.items()}
        return tensors, meta

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, head in self.heads.items():
            head.load_state_dict(below(tensors, f"probe/{name}/head/"))
            moments = below(tensors, f"probe/{name}/adam/")
            restore_optimizer(self.optimizers[name], moments, meta[name])


class ProbingSpec(BatchSpec):
    """A term that asks a probe, which takes `probe_steps` of Adam at `probe_rate` an update."""

    probe_rate: Rate = 1e-2
    probe_steps: Positive = 1


AnyProbingSpec = TypeVar("AnyProbingSpec", bound=ProbingSpec)


class ProbingHindrance(BatchHindrance[AnyProbingSpec]):
    """A hindrance of a batch with a probe of restricted labels on what goes into the head."""

    def __init__(self, spec: AnyProbingSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.probe = Probe(around, spec.kind, spec.probe_rate)

    def state(self) -> State:
        """Return the turns of each domain, and the probe."""
        _, meta = super().state()
        tensors, probe = self.probe.state()
        return tensors, {**meta, "probe": probe}

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        super().restore(model, tensors, meta)
        self.probe.restore(tensors, meta["probe"])
