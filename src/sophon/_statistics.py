"""Numbers of an audit: intervals, envelopes, areas, costs, advantage removed.

Scores are fractions in [0, 1], budgets are optimizer steps. `docs/design/verdict.md` says why
each number is what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sophon._records import Record, Score, Trial

Array = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 4000
_SEED = 2404


class Interval(Record):
    """From `low` to `high`, both ends included."""

    low: float
    high: float


class EnvelopePoint(Record):
    """The best score any attack had reached by `step`, and the attack that holds it."""

    step: int
    score: float
    label: str


class Cost(Record):
    """Steps until a target was reached; None when it was not within `horizon` (right-censored)."""

    steps: int | None
    horizon: int


class Ratio(Record):
    """One cost over another. With `at_least` the numerator is censored: the truth is larger."""

    value: float
    at_least: bool


class Estimate(Record):
    """A value with its interval; `low` and `high` are None when fewer than two seeds carry it.

    Where it is not `defined` there is no value, and `reason` says why.
    """

    value: float | None
    low: float | None
    high: float | None
    defined: bool
    reason: str = ""


class SeedCurves(Record):
    """Envelopes of one subject on a common grid: `scores[seed][budget]`.

    `images` is the size of the validation split the scores were measured on.
    """

    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    images: int

    @property
    def matrix(self) -> Array:
        """Scores as an array (seeds, budgets)."""
        return np.asarray(self.scores, dtype=np.float64)

    @property
    def mean(self) -> Array:
        """Mean over the seeds (budgets,)."""
        return np.asarray(self.matrix.mean(axis=0), dtype=np.float64)


def wilson(score: Score, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's interval of a proportion (Wilson 1927); [0, 1] when nothing was measured."""
    return _wilson(score.correct, score.total, confidence)


def _wilson(correct: float, total: int, confidence: float = CONFIDENCE) -> Interval:
    if total == 0:
        return Interval(low=0.0, high=1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half = z * spread / (1 + z * z / total)
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def measured(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that count: not crashed, and evaluated at least once.

    A diverged trial counts with the points it left before it diverged.
    """
    return [t for t in trials if t.outcome.kind != "crashed" and t.curve]


def budgets_of(trials: Iterable[Trial]) -> tuple[int, ...]:
    """Return every budget above zero at which a trial that counts was evaluated, ascending."""
    return tuple(sorted({p.step for t in measured(trials) for p in t.curve if p.step > 0}))


def envelope(trials: Sequence[Trial], budgets: Sequence[int] | None = None) -> list[EnvelopePoint]:
    """Return, for each budget, the best validation score of any trial at that budget or below.

    Never decreasing. A score before the first step counts, but zero is no budget. Of equal
    scores the one reached first holds the place. Empty when no trial counts.
    """
    found = [
        (p.step, -p.validation.value, t.key, t.strategy.label())
        for t in measured(trials)
        for p in t.curve
    ]
    if not found:
        return []
    found.sort()
    grid = tuple(budgets) if budgets is not None else budgets_of(trials)
    points, best, label, taken = [], -1.0, "", 0
    for budget in grid:
        while taken < len(found) and found[taken][0] <= budget:
            if -found[taken][1] > best:
                best, label = -found[taken][1], found[taken][3]
            taken += 1
        points.append(EnvelopePoint(step=budget, score=max(best, 0.0), label=label))
    return points


def seed_curves(trials: Sequence[Trial], budgets: Sequence[int]) -> SeedCurves | None:
    """Return one envelope per attack seed on `budgets`; None when no trial counts.

    Seeds without a trial that counts are left out.
    """
    counted = measured(trials)
    if not counted or not budgets:
        return None
    seeds = sorted({t.seed for t in counted})
    rows = [envelope([t for t in counted if t.seed == seed], budgets) for seed in seeds]
    return SeedCurves(
        budgets=tuple(budgets),
        seeds=tuple(seeds),
        scores=tuple(tuple(point.score for point in row) for row in rows),
        images=min(t.curve[0].validation.total for t in counted),
    )


def area_under_envelope(budgets: Sequence[int], scores: Array) -> Array:
    """Return the area under `scores` (..., budgets) over log budget, divided by the log range.

    The trapezoid rule on the logarithm; a mean score, therefore, in accuracy units. With a
    single budget it is the score there.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if len(budgets) == 1:
        return np.asarray(scores[..., 0], dtype=np.float64)
    logs = np.log(np.asarray(budgets, dtype=np.float64))
    heights = (scores[..., 1:] + scores[..., :-1]) / 2
    return np.asarray((heights * np.diff(logs)).sum(axis=-1) / (logs[-1] - logs[0]))


def cost_to_recover(points: Sequence[EnvelopePoint], target: float) -> Cost:
    """Return the first budget at which the envelope is at `target` or above.

    Right-censored at the last budget when it never is. `points` must not be empty.
    """
    reached = (p.step for p in points if p.score >= target - 1e-12)
    return Cost(steps=next(reached, None), horizon=points[-1].step)


def cost_ratio(cost: Cost, reference: Cost) -> Ratio | None:
    """Return `cost` over `reference`, a lower bound when `cost` is censored.

    None when the reference is censored: there is nothing to compare with.
    """
    if reference.steps is None:
        return None
    steps = cost.horizon if cost.steps is None else cost.steps
    return Ratio(value=steps / reference.steps, at_least=cost.steps is None)


def area_estimate(curves: SeedCurves) -> Estimate:
    """Return the area under the mean envelope with its interval over seeds and images."""
    value = float(area_under_envelope(curves.budgets, curves.mean))
    if len(curves.seeds) < 2:
        return Estimate(
            value=value, low=None, high=None, defined=True, reason="one seed has no interval"
        )
    low, high = _percentiles(_area_draws(curves, np.random.default_rng(_SEED)))
    return Estimate(value=value, low=low, high=high, defined=True)


def area_interval(curves: SeedCurves) -> Interval:
    """Return the interval of the area: bootstrap, or with one seed Wilson's for the images."""
    estimate = area_estimate(curves)
    if estimate.low is not None and estimate.high is not None:
        return Interval(low=estimate.low, high=estimate.high)
    area = float(area_under_envelope(curves.budgets, curves.mean))
    return _wilson(area * curves.images, curves.images)


def separated(better: SeedCurves, worse: SeedCurves) -> bool:
    """Return whether the area of `better` is above that of `worse` by more than their intervals."""
    return area_interval(better).low > area_interval(worse).high


def advantage_removed(
    protected: SeedCurves, unprotected: SeedCurves, scratch: SeedCurves
) -> Estimate:
    """Return (A_unprotected - A_protected) / (A_unprotected - A_scratch), with its interval.

    Undefined where unprotected is not above scratch by more than their intervals: then the
    pair of domains tells nothing. The interval needs two seeds of each subject.
    """
    if not separated(unprotected, scratch):
        reason = "unprotected and scratch do not differ by more than their intervals"
        return Estimate(value=None, low=None, high=None, defined=False, reason=reason)
    subjects = (protected, unprotected, scratch)
    p, u, s = (float(area_under_envelope(c.budgets, c.mean)) for c in subjects)
    value = (u - p) / (u - s)
    if min(len(c.seeds) for c in subjects) < 2:
        reason = "an interval needs at least two seeds"
        return Estimate(value=value, low=None, high=None, defined=True, reason=reason)
    rng = np.random.default_rng(_SEED)
    drawn_p, drawn_u, drawn_s = (_area_draws(c, rng) for c in subjects)
    gap = np.maximum(drawn_u - drawn_s, 1e-3)
    low, high = _percentiles((drawn_u - drawn_p) / gap)
    return Estimate(value=value, low=low, high=high, defined=True)


def worst_case(curves: SeedCurves) -> SeedCurves:
    """Return the envelope over all seeds together, as if it were one seed's."""
    best = tuple(float(x) for x in curves.matrix.max(axis=0))
    return curves.model_copy(update={"seeds": curves.seeds[:1], "scores": (best,)})


def _area_draws(curves: SeedCurves, rng: np.random.Generator) -> Array:
    """Return bootstrap draws of the mean area: seeds resampled, images as binomial noise."""
    areas = area_under_envelope(curves.budgets, curves.matrix)
    count = len(areas)
    picked = areas[rng.integers(0, count, size=(DRAWS, count))].mean(axis=1)
    # Resampling n seeds understates their variance by (n-1)/n; few seeds need it put back.
    widened = areas.mean() + (picked - areas.mean()) * math.sqrt(count / (count - 1))
    mean = float(np.clip(areas.mean(), 0, 1))
    error = math.sqrt(mean * (1 - mean) / curves.images) if curves.images else 0.0
    return np.asarray(np.clip(widened + rng.normal(0.0, error, size=DRAWS), 0, 1))


def _percentiles(draws: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
