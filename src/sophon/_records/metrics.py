"""The two kinds of score: how each is tolerated, recovered and shown. No torch.

The engine, the statistics and the verdict work on values that are higher for better models, on
the scale of accuracy: 1 is perfect, 0 is worth nothing. What a person reads is in the metric's own
unit. A third kind is one more entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from sophon._specs import Guard

if TYPE_CHECKING:
    from sophon._records.audit_record import Measurement

NONE = "\u2013"


@dataclass(frozen=True)
class MetricKind:
    """A metric: what its values mean, and how they are written.

    `show` writes a value in its unit with so many digits more or less, `cell` in a crowded table,
    `change` a difference, `gap` a lead. `tick` is the distance of marks on an axis of some width.

    `allowed` is the least value after protection of a model that had `value` before, `tolerance`
    says how that was specified in the key `guard_key`, `ruin` is a loss that forbids a verdict.
    `chance` is what guessing gives with so many classes. `task` is what a record calls its tasks.
    `floor` is where recovery starts, given what a fresh network reaches. `far` is a difference from
    the best value that is large, `close` one that is small. `idle` says which preparations can do
    nothing to its models, and why; `probes` whether a search trains their head alone; `pictured`
    whether a good verdict needs the pictures to bear it out. `meant` is what a report says of the
    scores of `{task}`.
    """

    name: str
    task: Literal["classification", "denoising"]
    noun: str
    unit: str
    show: Callable[[float, int], str]
    cell: Callable[[float], str]
    change: Callable[[float], str]
    gap: Callable[[float], str]
    tick: Callable[[float], float]
    guard_key: str
    allowed: Callable[[float, Guard], float]
    tolerance: Callable[[Guard], str]
    ruin: Callable[[float], float]
    # Of so many classes, and of the share of the largest.
    chance: Callable[[int, float], float]
    floor: Callable[[float | None], float]
    goal: str
    far: Callable[[float], float]
    far_words: str
    close: float
    higher_is_better: bool = True
    idle: Mapping[str, str] = field(default_factory=dict)
    probes: bool = True
    pictured: bool = False
    meant: str = ""

    @property
    def classifies(self) -> bool:
        """Whether what it scores are classifiers: labels are the targets of a head."""
        return self.task == "classification"

    def interval(self, bounds: tuple[float, float]) -> tuple[str, str]:
        """Return the bounds of an interval of values as they are read: the smaller number first."""
        low, high = bounds if self.higher_is_better else reversed(bounds)
        return self.show(low, 1), self.show(high, 1)

    def shown(self, value: float | None) -> str:
        """Return a value in its unit, or a dash for none."""
        return NONE if value is None else self.show(value, 1)


def _round_step(width: float) -> float:
    """Return 1, 2 or 5 times a power of ten: a fifth of the width or a little more."""
    least = max(width, 1e-3) / 5
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= least * (1 - 1e-9))


KINDS: dict[str, MetricKind] = {
    "accuracy": MetricKind(
        name="accuracy",
        task="classification",
        noun="accuracy",
        unit="percent",
        show=lambda value, digits: f"{100 * value:.{digits}f} %",
        cell=lambda value: f"{100 * value:.0f}",
        change=lambda value: f"{100 * value:+.1f} points",
        gap=lambda value: f"{100 * value:.1f} points",
        tick=lambda width: 0.1,
        guard_key="tolerance_points",
        allowed=lambda value, guard: value - guard.tolerance_points / 100,
        tolerance=lambda guard: f"{guard.tolerance_points} points (guard.tolerance_points)",
        ruin=lambda value: 0.1,
        chance=lambda classes, largest: max(1 / classes, largest),
        floor=lambda scratch: 0.0,
        goal="90 % of unprotected",
        far=lambda best: 0.1,
        far_words="10 points",
        close=0.005,
    ),
    # A value is 1 - MSE: of noise, the share that is explained.
    "mse": MetricKind(
        name="mse",
        task="denoising",
        noun="squared error (lower is better)",
        unit="mean square",
        show=lambda value, digits: f"{1 - value:.{digits + 3}f}",
        cell=lambda value: f"{1 - value:.3f}",
        change=lambda value: f"{-value:+.4f}",
        gap=lambda value: f"{value:.4f} of squared error",
        tick=_round_step,
        guard_key="tolerance_relative",
        allowed=lambda value, guard: 1 - (1 - value) * (1 + guard.tolerance_relative),
        tolerance=lambda guard: (
            f"{100 * guard.tolerance_relative:.0f} % of the error (guard.tolerance_relative)"
        ),
        ruin=lambda value: 1 - value,
        chance=lambda classes, largest: 0.0,
        # Any network explains most of the noise: what counts is what a fresh one lacks.
        floor=lambda scratch: scratch or 0.0,
        goal="90 % of the way from scratch to unprotected",
        far=lambda best: 0.25 * (1 - best),
        far_words="a quarter of the error",
        close=0.0005,
        higher_is_better=False,
        idle={
            "batch_norm": "no BatchNorm to put back",
            "ridge_head": "no classes to fit a head to",
        },
        probes=False,
        pictured=True,
        meant="Scores are squared errors of {task}; areas and costs are computed on 1 - the error."
        " Recovering means going 90 % of the way from the best error of a fresh network to that of"
        " the unprotected model. A good verdict needs the pictures to bear it out: at least half of"
        " the unprotected model's lead in KID over a fresh network must be gone too, by more than"
        " KID's spread.",
    ),
}
# The same, by what a record calls its tasks.
OF_TASKS = {kind.task: kind for kind in KINDS.values()}


def kind_of(score: Measurement) -> MetricKind:
    """Return the kind of a score."""
    return KINDS[score.metric]


def measurement(held: object) -> Measurement:
    """Return the score that was written as plain values."""
    from sophon._records.audit_record import Measurement

    return TypeAdapter[Measurement](Measurement).validate_python(held)


def shown(score: Measurement | None) -> str:
    """Return a score in its own unit, or a dash for none."""
    return NONE if score is None else kind_of(score).shown(score.value)
