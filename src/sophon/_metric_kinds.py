"""The two kinds of score: how each is tolerated, recovered and shown. No torch.

The engine, the statistics and the verdict work on values that are higher for better models, on
the scale of accuracy: 1 is perfect, 0 is worth nothing. What a person reads is in the metric's own
unit. A third kind is one more entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import TypeAdapter

from sophon._records import AuditRecord, Measurement, Score
from sophon._specs import Guard

NONE = "\u2013"


@dataclass(frozen=True)
class MetricKind:
    """A metric: `show` writes a value in its unit, `axis` writes it beside a plot.

    `allowed` is the least value after protection of a model that had `value` before, `tolerance`
    says how that was specified. `floor` is where recovery starts: what is worth nothing, given what
    a fresh network reaches.
    """

    name: str
    noun: str
    show: Callable[[float, int], str]
    gap: Callable[[float], str]
    allowed: Callable[[float, Guard], float]
    tolerance: Callable[[Guard], str]
    floor: Callable[[float | None], float]
    recovering: str
    higher_is_better: bool = True

    def interval(self, bounds: tuple[float, float], digits: int = 1) -> tuple[str, str]:
        """Return the bounds of an interval of values as they are read: the smaller number first."""
        low, high = bounds if self.higher_is_better else reversed(bounds)
        return self.show(low, digits), self.show(high, digits)


def _error(value: float, digits: int) -> str:
    return f"{1 - value:.{digits + 3}f}"


KINDS: dict[str, MetricKind] = {
    "accuracy": MetricKind(
        name="accuracy",
        noun="accuracy",
        show=lambda value, digits: f"{100 * value:.{digits}f} %",
        gap=lambda value: f"{100 * value:.1f} points",
        allowed=lambda value, guard: value - guard.tolerance_points / 100,
        tolerance=lambda guard: f"{guard.tolerance_points} points (guard.tolerance_points)",
        floor=lambda scratch: 0.0,
        recovering="reaching 90 % of the unprotected model's best score",
    ),
    # A value is 1 - MSE: of noise, the share that is explained.
    "mse": MetricKind(
        name="mse",
        noun="mean squared error",
        show=_error,
        gap=lambda value: f"{value:.4f} of mean squared error",
        allowed=lambda value, guard: 1 - (1 - value) * (1 + guard.tolerance_relative),
        tolerance=lambda guard: (
            f"{100 * guard.tolerance_relative:.0f} % of the error (guard.tolerance_relative)"
        ),
        # A share of the noise is explained by any network: what counts is what a fresh one lacks.
        floor=lambda scratch: scratch or 0.0,
        recovering="going 90 % of the way from the best error that a fresh network reaches to"
        " the best that the unprotected model reaches",
        higher_is_better=False,
    ),
}


def kind_of(score: Measurement) -> MetricKind:
    """Return the kind of a score."""
    return KINDS["accuracy" if isinstance(score, Score) else "mse"]


def kind_of_record(record: AuditRecord) -> MetricKind:
    """Return the kind of an audit's scores."""
    return KINDS["accuracy" if record.task == "classification" else "mse"]


def measurement(held: object) -> Measurement:
    """Return the score that was written as plain values."""
    return TypeAdapter[Measurement](Measurement).validate_python(held)


def shown(score: Measurement | None, digits: int = 1) -> str:
    """Return a score in its own unit, or a dash for none."""
    return NONE if score is None else kind_of(score).show(score.value, digits)
