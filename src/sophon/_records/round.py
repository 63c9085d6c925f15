"""What happened while a model was trained: rounds of protection, stages of pre-training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sophon._records.audit_record import Measurement, Record


class Stage(Record):
    """Some steps of pre-training: the mean loss over them, and the score after them."""

    step: int
    loss: float
    validation: Measurement
    wall_s: float


class Round(Record):
    """One round of protection. Losses and scores are means over the round's queries.

    `price` is the multiplier of the hindrances, `readings` what their terms measured by name.
    """

    index: int
    suppression_loss: float
    query_score: float
    original_loss: float | None
    suppression_gradient_norm: float
    reinforcement_gradient_norm: float | None
    strategies: tuple[str, ...]
    domains: tuple[str, ...]
    guard_score: float | None = None
    guard: Literal["met", "violated"] | None = None
    reinforcement_steps: int
    wall_s: float
    price: float | None = None
    readings: dict[str, float] = Field(default_factory=dict)
