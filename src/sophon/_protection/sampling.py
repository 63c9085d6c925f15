"""What a rehearsal samples its strategies from, and in which order."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from sophon._specs import FreshHead, OptimizerName, ScheduleName, Strategy
from sophon._specs.base import Augmentation, Positive, Rate, Spec
from sophon._specs.strategies import Preparations, require_ordered


def _default_rates() -> dict[OptimizerName, tuple[float, float]]:
    return {"sgd_momentum": (1e-4, 1e-1), "adam": (1e-4, 1e-2)}


class StrategyDistribution(Spec):
    """What a rehearsal samples its strategies from: each choice uniform, the rate log-uniform."""

    learning_rates: dict[OptimizerName, Annotated[tuple[Rate, Rate], Field(strict=False)]] = Field(
        default_factory=_default_rates, min_length=1
    )
    preparations: Annotated[tuple[Preparations, ...], Field(strict=False, min_length=1)] = (
        (),
        (FreshHead(),),
    )
    batch_sizes: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (64,)
    scopes: Annotated[tuple[Literal["all", "head"], ...], Field(strict=False, min_length=1)] = (
        "all",
    )
    schedules: Annotated[tuple[ScheduleName, ...], Field(strict=False, min_length=1)] = (
        "constant",
    )
    augmentation: Augmentation = "none"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in self.learning_rates.items():
            if low > high:
                raise ValueError(f"the range of {name} starts at {low} above its end {high}")
            if not math.isfinite(high / low):
                raise ValueError(
                    f"the range of {name} starts at {low}: give rates of 1e-30 or more"
                )
        for preparations in self.preparations:
            require_ordered(preparations)
        return self


def sample_strategy(distribution: StrategyDistribution, stream: torch.Generator) -> Strategy:
    """Return one strategy of the distribution: choices uniform, the rate log-uniform."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=stream))

    names = list(distribution.learning_rates)
    optimizer = names[pick(len(names))]
    low, high = distribution.learning_rates[optimizer]
    position = float(torch.rand((), generator=stream, dtype=torch.float64))
    preparations = distribution.preparations[pick(len(distribution.preparations))]
    return Strategy(
        optimizer=optimizer,
        learning_rate=low * (high / low) ** position,
        preparations=preparations,
        batch_size=distribution.batch_sizes[pick(len(distribution.batch_sizes))],
        scope=distribution.scopes[pick(len(distribution.scopes))],
        schedule=distribution.schedules[pick(len(distribution.schedules))],
        augmentation=distribution.augmentation,
    )
