"""What a protected checkpoint says of its own protection. Whoever publishes it may say anything."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from sophon._base.errors import SpecError
from sophon._specs import OptimizerName, parse_spec
from sophon._specs.base import NonNegative, Rate, Spec

_WHERE = (
    "the 'protection' of the protected checkpoint's model.json (mend it, or audit the file of"
    " weights alone)"
)


# Of a protection, at most: a century.
_MOST_SECONDS = 3.2e9
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(Spec):
    """A part of a statement: what an audit does not ask for may be there."""

    model_config = ConfigDict(extra="ignore")


class _Fixed(_Part):
    optimizer: OptimizerName
    learning_rate: Rate


class _Distribution(_Part):
    learning_rates: dict[OptimizerName, tuple[Rate, Rate]] | None = None


class _Rehearsal(_Part):
    fixed: _Fixed | None = None
    distribution: _Distribution | None = None
    steps: int | None = None
    horizon: int | None = None


class _Guard(_Part):
    tolerance_points: NonNegative = 0.0
    tolerance_relative: NonNegative = 0.0


class _Stated(_Part):
    rehearsal: _Rehearsal | None = None
    guard: _Guard | None = None


class Rehearsed(_Part):
    """Attacks that a term of a protection rehearsed: the rate rehearsed last, by optimizer (of a
    range the upper end), and how many steps an attacker took in its life.
    """

    rates: dict[OptimizerName, Rate] = Field(default_factory=dict)
    life: int = 0


class ReadersFound(_Part):
    """What readers found of one domain's labels: R2 of the best reader at each depth."""

    depths: tuple[str, ...]
    fresh: tuple[_Finite, ...]
    given: tuple[_Finite, ...]
    protected: tuple[_Finite, ...]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        rows = (self.fresh, self.given, self.protected)
        if any(len(row) != len(self.depths) for row in rows) or not self.depths:
            raise ValueError("fresh, given and protected need a number for each depth")
        return self


class Terms(_Part):
    """What the terms of a protection state, and its guard's tolerances."""

    rehearsed: tuple[Rehearsed, ...] = ()
    guard: _Guard | None = None


class Statement(_Part):
    """What protection says that it did, as far as an audit asks.

    `terms` is what its terms state, `readers` what these found by domain; `spec` is what earlier
    versions wrote instead; `wall_s` the seconds that its rounds took.
    """

    terms: Terms | None = None
    readers: dict[str, ReadersFound] = Field(default_factory=dict)
    spec: _Stated | None = None
    wall_s: NonNegative | None = None

    @field_validator("wall_s", mode="before")
    @classmethod
    def _readable(cls, given: Any) -> float | None:
        """Return what is only shown as it can be: no verdict hangs on it."""
        usual = isinstance(given, int | float) and not isinstance(given, bool)
        return float(given) if usual and 0 <= given <= _MOST_SECONDS else None

    @property
    def _rehearsal(self) -> _Rehearsal:
        return (self.spec and self.spec.rehearsal) or _Rehearsal()

    @property
    def rates(self) -> dict[OptimizerName, float]:
        """The rate rehearsed last, by optimizer: of a range the upper end; empty: not said."""
        if self.terms is not None:
            return {n: rate for part in self.terms.rehearsed for n, rate in part.rates.items()}
        fixed, distribution = self._rehearsal.fixed, self._rehearsal.distribution
        if fixed is not None:
            return {fixed.optimizer: fixed.learning_rate}
        ranges = distribution and distribution.learning_rates
        return {optimizer: high for optimizer, (_, high) in (ranges or {}).items()}

    @property
    def life(self) -> int:
        """How many steps a rehearsed attacker takes in its life; 0: not said."""
        if self.terms is not None:
            return max((part.life for part in self.terms.rehearsed), default=0)
        return self._rehearsal.horizon or self._rehearsal.steps or 0

    @property
    def tolerances(self) -> dict[str, float]:
        """The guard's tolerances, by name, as far as they are said."""
        spec = self.terms or self.spec
        guard = None if spec is None else spec.guard
        return {} if guard is None else guard.model_dump(exclude_unset=True)


def statement_of(protection: dict[str, Any] | None) -> Statement:
    """Return what a checkpoint's `protection` says. Raises SpecError if it cannot be read."""
    return parse_spec(Statement, {} if protection is None else protection, where=_WHERE)


def stated(protection: dict[str, Any] | None) -> Statement:
    """Return what a record's `protection` says: nothing, where it cannot be read.

    An audit refuses such a statement; a record that holds one all the same is judged like one that
    holds none.
    """
    try:
        return statement_of(protection)
    except SpecError:
        return Statement()
