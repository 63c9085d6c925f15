"""Simulated attackers: what each does, its copy of the model, and how it moves with the real one.

An attacker's weights are `factor * real + displacement`, parameter by parameter: the factor is
the derivative of its preparation (0 re-initialised, 1 kept, c rescaled), the displacement is
what its preparation added and its steps did. So when the real weights move, a persistent
attacker moves along, and a fresh one is merely an attacker whose horizon is one visit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.spans import spanned
from sophon._data import Domain
from sophon._protection.term import State, Surroundings
from sophon._specs import Strategy
from sophon._training.loop import (
    FineTuning,
    Origin,
    attacker_copy,
    optimizer_tensors,
    restore_optimizer,
)
from sophon._training.ranks import Ranks
from sophon._training.setting import Feed
from sophon._training.sharding import placed, shard


def domain_of(identity: int, weights: list[float]) -> int:
    """Return which restricted domain attacker `identity` takes.

    Every prefix of the sequence holds each domain in proportion to its weight, as closely as
    whole numbers allow.
    """
    order = _order(tuple(weights))
    return order[identity % len(order)]


@functools.lru_cache
def _order(weights: tuple[float, ...]) -> list[int]:
    # Long enough that any weights are met to a thousandth.
    total, counts, order = sum(weights), [0] * len(weights), []
    for taken in range(1 if len(weights) == 1 else 1000):
        deficits = [w / total * (taken + 1) - c for w, c in zip(weights, counts, strict=True)]
        order.append(deficits.index(max(deficits)))
        counts[order[-1]] += 1
    return order


@dataclass
class Visit:
    """An attacker's turn in a suppression step, whichever process takes it.

    `query_loss` is the weighted sum of its queries' losses; `ended` is 1 after its last step.
    """

    slot: int
    identity: int
    strategy: Strategy
    domain: Domain
    mine: bool
    query_loss: Tensor
    ended: Tensor


@dataclass
class Accumulator:
    """Sums over a suppression step: gradients by parameter name, query loss and query score.

    `visits` are the attackers' turns that they come from, in order.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    score: Tensor
    visits: list[Visit] = field(default_factory=list)

    @classmethod
    def like(
        cls, parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Accumulator:
        """Return zeros for these parameters, of their types unless one is given."""
        zeros = {n: torch.zeros_like(value, dtype=dtype) for n, value in parameters.items()}
        device = next(iter(parameters.values())).device
        loss = torch.zeros((), device=device, dtype=dtype)
        return cls(zeros, loss, loss.clone())

    def include(self, other: Accumulator) -> None:
        """Add the sums of another."""
        for name, value in other.gradients.items():
            self.gradients[name] += value
        self.loss += other.loss
        self.score += other.score

    def reduced(self, parameters: Mapping[str, Tensor], ranks: Ranks) -> Accumulator:
        """Return the sums over all processes, of the parameters' types."""
        of_visits = [part for visit in self.visits for part in (visit.query_loss, visit.ended)]
        ranks.add([*self.gradients.values(), self.loss, self.score, *of_visits])
        gradients = {n: self.gradients[n].to(value.dtype) for n, value in parameters.items()}
        return Accumulator(gradients, self.loss.float(), self.score.float(), self.visits)


@dataclass(frozen=True)
class Plan:
    """What an attacker is to do: its strategy, its domain and its batches, `steps` a visit."""

    identity: int
    strategy: Strategy
    domain: Domain
    feed: Feed
    steps: int


class Attacker:
    """A simulated attacker of the model: a prepared copy, its optimizer, its displacement.

    `model` is a copy of `real` in one piece, which it prepares and trains.
    """

    def __init__(
        self, real: nn.Module, model: nn.Module, plan: Plan, around: Surroundings, horizon: int
    ) -> None:
        self.plan = plan
        setting = around.setting
        stream = (around.seed, ("attacker", plan.identity))
        prepared = attacker_copy(
            model,
            plan.strategy,
            setting,
            classes=setting.task.classes(plan.domain),
            feed=plan.feed,
            stream=stream,
        )
        shard(model, setting.head, around.ranks)
        self.origins = prepared.origins
        # A short life still has steps of its own after what its preparation spent.
        own = min(plan.steps, plan.strategy.steps - prepared.spent)
        self.horizon = max(horizon, prepared.spent + own)
        self.tuning = FineTuning(
            model, plan.strategy, setting, plan.feed, stream=stream, taken=prepared.spent
        )
        self.query_loss = torch.zeros((), device=setting.device)
        self.displacement: dict[str, Tensor] = {}
        self.shapes = {name: value.shape for name, value in real.named_parameters()}
        self.detach_from(dict(real.named_parameters()))

    @property
    def model(self) -> nn.Module:
        """The attacker's own copy."""
        return self.tuning.model

    @spanned("attackers' copies")
    @torch.no_grad()
    def detach_from(self, real: Mapping[str, Tensor]) -> None:
        """Remember where the attacker stands relative to the real weights."""
        for name, value in self.model.named_parameters():
            origin, factor = self.origins[name]
            moved = value.detach().clone()
            if origin is not None and factor != 0:
                moved.sub_(real[origin], alpha=factor)
            self.displacement[name] = moved

    @spanned("attackers' copies")
    @torch.no_grad()
    def follow(self, real: Mapping[str, Tensor]) -> None:
        """Move with the real weights: `factor * real + displacement`."""
        for name, value in self.model.named_parameters():
            value.copy_(self.displacement[name])
            origin, factor = self.origins[name]
            if origin is not None and factor != 0:
                value.add_(real[origin], alpha=factor)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], member: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        moved = below(tensors, "displacement/")
        for name, value in self.model.named_parameters():
            self.displacement[name] = placed(moved[name], value)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer/{name}"])
        self.origins = {name: Origin(*held) for name, held in member["origins"].items()}
        self.tuning.taken = member["taken"]
        restore_optimizer(self.tuning.optimizer, below(tensors, "optimizer/"), member["optimizer"])

    def state(self) -> State:
        """Return what persists between rounds, as tensors by name and as plain values."""
        moments, plain = optimizer_tensors(self.tuning.optimizer)
        groups = {
            "displacement": self.displacement,
            "buffer": dict(self.model.named_buffers()),
            "optimizer": moments,
        }
        tensors = {f"{g}/{name}": v for g, values in groups.items() for name, v in values.items()}
        return tensors, {
            "identity": self.plan.identity,
            "horizon": self.horizon,
            "taken": self.tuning.taken,
            "origins": {n: list(origin) for n, origin in self.origins.items()},
            "optimizer": plain,
        }


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
