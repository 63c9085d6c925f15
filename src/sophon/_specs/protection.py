"""What `protect` does: the attackers it rehearses, its guard, its rates."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sophon._specs.base import (
    Augmentation,
    Count,
    NonNegative,
    OptimizerName,
    Positive,
    Precision,
    Rate,
    ScheduleName,
    Spec,
)
from sophon._specs.strategies import (
    FreshHead,
    Preparations,
    Strategy,
)


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
        return self


class Rehearsal(Spec):
    """How protection simulates attackers.

    Each suppression step advances `strategies` attackers by `steps` (the paper's K). Without a
    `horizon` every attacker is fresh and used once, as in the paper. With one, `pool`
    attackers persist: each keeps its optimizer and its displacement from the real weights from
    round to round until it has taken `horizon` steps, then a new one takes its place.
    """

    strategies: Positive = 1
    steps: Positive = 20
    horizon: Positive | None = None
    pool: Positive = 8
    distribution: StrategyDistribution = StrategyDistribution()
    fixed: Strategy | None = None
    query_batch_size: Positive = 32
    gamma: Literal["uniform", "linear", "last"] = "uniform"

    @property
    def life(self) -> int:
        """Steps that an attacker takes in all."""
        return self.horizon or self.steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        usual = Strategy.model_fields["steps"].default
        if self.fixed is not None and self.fixed.steps not in (usual, self.life):
            raise ValueError(
                f"fixed.steps = {self.fixed.steps}: attackers take horizon or steps, here"
                f" {self.life}; leave it out"
            )
        if self.fixed is not None and self.distribution != StrategyDistribution():
            raise ValueError("fixed and distribution: strategies are fixed or sampled; give one")
        if self.horizon is not None and self.horizon < self.steps:
            raise ValueError(f"horizon = {self.horizon} is shorter than steps = {self.steps}")
        if self.horizon is not None and self.pool < self.strategies:
            raise ValueError(f"pool = {self.pool} is smaller than strategies = {self.strategies}")
        return self


class Guard(Spec):
    """The intactness guard: checked on the original validation split every `every` rounds.

    A classifier may lose `tolerance_points` of accuracy; the squared error of a diffusion model may
    grow by `tolerance_relative` of what it was (0.1: a tenth).
    """

    tolerance_points: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 2.0
    tolerance_relative: NonNegative = 0.1
    every: Positive = 10
    ship: Literal["last", "lowest_query_score"] = "last"


class ProtectSpec(Spec):
    """Everything `protect` does beyond the model and the domains; see `docs/design`."""

    seed: Count = 0
    rounds: Positive = 100
    suppression: Literal["ice", "reversed_logits", "klu", "negated_ce", "dos", "negated_mse"] = (
        "klu"
    )
    suppression_steps: Positive = 1
    suppression_rate: Rate = 3e-4
    reinforcement_steps: Count = 1
    reinforcement_rate: Rate = 5e-4
    original_batch_size: Positive = 64
    original_augmentation: Augmentation = "none"
    clip_norm: Rate = 0.5
    head_gradient: Literal["exclude_fresh", "apply_fresh"] = "exclude_fresh"
    rehearsal: Rehearsal = Rehearsal()
    guard: Guard = Guard()
    checkpoint_every: Positive = 10
    precision: Precision = "auto"
