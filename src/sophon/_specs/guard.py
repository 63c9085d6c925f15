"""The intactness guard's specification: what the original task may lose, and what follows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sophon._specs.base import NonNegative, Positive, Rate, Spec


class Price(Spec):
    """What hindrance costs: a multiplier of its terms, moved at every check of the guard.

    It starts at `start`, rises by the factor `rise` while the original score is within the
    tolerance, up to `most`, and falls by `fall` while it is not. Early on `slack` times the
    tolerance is allowed on top of it, less and less as the run's rate falls: what a high rate
    costs comes back. Shipped weights have none of it. Weights that leave what is allowed by more
    than `margin` times the tolerance are rolled back.
    """

    start: Rate = 1.2
    rise: Annotated[float, Field(ge=1, le=10)] = 1.03
    fall: Annotated[float, Field(gt=0, lt=1)] = 0.95
    most: Rate = 1.6
    slack: NonNegative = 1.0
    margin: Annotated[float, Field(ge=1, le=100)] = 5.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start > self.most:
            remedy = "lower it" if "start" in self.model_fields_set else "give start too"
            raise ValueError(f"start = {self.start:g} is above most = {self.most:g}: {remedy}")
        return self


class Guard(Spec):
    """The intactness guard: checked on the original validation split every `every` rounds.

    A classifier may lose `tolerance_points` of accuracy; the squared error of a diffusion model may
    grow by `tolerance_relative` of what it was (0.1: a tenth). With `mode = "rollback"` weights
    that lost more go back to the last that did not; with `mode = "price"` the `price` of hindrance
    falls, and rolling back is the last line (None: as the update allows). Shipped are the last
    weights that met the tolerance, or of those the ones with the lowest query score.
    """

    tolerance_points: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 2.0
    tolerance_relative: NonNegative = 0.1
    every: Positive = 10
    ship: Literal["last", "lowest_query_score"] = "last"
    mode: Literal["rollback", "price"] | None = None
    price: Price = Price()

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.mode == "rollback" and self.price != Price():
            raise ValueError("price is for mode = 'price'")
        return self
