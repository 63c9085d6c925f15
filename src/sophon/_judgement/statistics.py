"""Numbers of an audit: envelopes, areas, costs, intervals. Pure functions of trials; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sophon._records.audit_record import Measurement, Score, Trial
from sophon._specs import Strategy

DRAWS = 4000
_Z = 1.959963984540054


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class EnvelopePoint(NamedTuple):
    """Best validation score of any attack within `step` steps, and the attack that holds it."""

    step: int
    value: float
    label: str


@dataclass(frozen=True)
class Cost:
    """Steps needed to reach a target; None where it was not reached by the horizon (censored).

    What is known is that it lies above `above`, the last budget measured without the target, and
    not above `steps`, the first one with it.
    """

    steps: int | None
    horizon: int
    above: int = 0


def wilson(score: Score) -> Interval:
    """Return the 95 % Wilson interval of a proportion (Wilson, JASA 22, 1927)."""
    n, p = score.total, score.value
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Interval(max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def interval_of(score: Measurement) -> Interval:
    """Return the 95 % interval of a score's value: Wilson's of a proportion, normal of a mean."""
    if isinstance(score, Score):
        return wilson(score)
    half = _Z * math.sqrt(score.variance / score.total)
    return Interval(score.value - half, score.value + half)


def budgets(trials: Sequence[Trial]) -> list[int]:
    """Return every budget at which any trial was measured, in steps, 0 left out."""
    return sorted({point.step for trial in trials for point in trial.curve if point.step > 0})


def first_evaluation(steps: int) -> int:
    """Return the first of `steps` after which an attack is measured, if it is prepared by then."""
    return max(1, steps // 40)


def shared_budgets(trials: Sequence[Trial]) -> list[int]:
    """Return the budgets that an area is taken over: from the first at which attacks are due.

    One is measured at the end of its preparation as well. Where that is earlier, all others would
    count with their start, and on a logarithmic axis these few steps are wide. Where it is later,
    nothing is reached within the budgets before: that is what the preparation costs.
    """
    first = first_evaluation(max((trial.strategy.steps for trial in trials), default=0))
    return [budget for budget in budgets(trials) if budget >= first]


def envelope(trials: Sequence[Trial], at: Sequence[int] | None = None) -> list[EnvelopePoint]:
    """Return the best validation score within each budget over all trials, and its attack.

    The score before the first step counts for every budget; within budgets that a preparation
    needs for itself alone nothing is reached. Trials that diverged or were stopped count up to
    where they were measured.
    """
    labels: dict[int, str] = {}
    result: list[EnvelopePoint] = []
    for budget, best, trial in _leading(trials, budgets(trials) if at is None else at):
        if trial is not None and id(trial) not in labels:
            labels[id(trial)] = trial.strategy.label()
        result.append(EnvelopePoint(budget, best, "" if trial is None else labels[id(trial)]))
    return result


def _leading(
    trials: Sequence[Trial], at: Sequence[int]
) -> Iterator[tuple[int, float, Trial | None]]:
    """Yield each budget, the best validation score within it and whose that is."""
    points = sorted(
        ((p.step, p.validation.value, t) for t in trials for p in t.curve),
        key=lambda point: point[0],
    )
    best, leader, position = -1.0, None, 0
    for budget in at if points else ():
        while position < len(points) and points[position][0] <= budget:
            if points[position][1] > best:
                _, best, leader = points[position]
            position += 1
        yield budget, max(best, 0.0), leader


def area(steps: Sequence[int], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of `values` (..., budgets) over the logarithm of the budget.

    It is the area under the envelope from the first budget to the horizon, divided by the
    logarithmic width, so its unit is the score's.
    """
    if len(steps) == 1:
        single: NDArray[np.float64] = values[..., 0]
        return single
    logs = np.log(np.asarray(steps, dtype=np.float64))
    widths = np.diff(logs)
    middles = (values[..., 1:] + values[..., :-1]) / 2
    total: NDArray[np.float64] = (middles * widths).sum(-1) / widths.sum()
    return total


def envelope_area(trials: Sequence[Trial], at: Sequence[int]) -> float:
    """Return the area under the trials' envelope; 0 where nothing was measured."""
    values = _values(trials, at)
    return float(area(at, np.array(values))) if values else 0.0


def _values(trials: Sequence[Trial], at: Sequence[int]) -> list[float]:
    return [best for _, best, _ in _leading(trials, at)]


def run_with_all_seeds(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose attack was run with every seed; all of them if none was.

    Otherwise the seed with the most attacks would look the strongest.
    """
    seeds = {trial.seed for trial in trials}
    ran: dict[Strategy, set[int]] = {}
    for trial in trials:
        ran.setdefault(trial.strategy, set()).add(trial.seed)
    return [t for t in trials if len(ran[t.strategy]) == len(seeds)] or list(trials)


def by_seed(trials: Sequence[Trial], at: Sequence[int]) -> NDArray[np.float64]:
    """Return each seed's envelope, shape (seeds, budgets), of the attacks run with every seed."""
    trials = run_with_all_seeds(trials)
    seeds = sorted({trial.seed for trial in trials})
    rows = [_values([t for t in trials if t.seed == s], at) for s in seeds]
    return np.array([row for row in rows if len(row) == len(at)]).reshape(-1, len(at))


def bootstrap(values: NDArray[np.float64], *, seed: int = 0) -> NDArray[np.float64]:
    """Return means of `values` (seeds, ...) over resampled seeds, (draws, ...), widened for few."""
    n, mean = len(values), values.mean(0)
    index = np.random.default_rng(seed).integers(0, n, (DRAWS, n))
    means: NDArray[np.float64] = values[index].mean(1)
    return means if n < 2 else mean + (means - mean) * widening(n)


def bands(rows: NDArray[np.float64]) -> tuple[Interval, ...]:
    """Return the 95 % bootstrap interval of the mean over seeds at each budget.

    `rows` are the seeds' envelopes, shape (seeds, budgets). Widened for few seeds;
    with one seed each interval is the value itself.
    """
    if len(rows) < 2:
        return tuple(Interval(value, value) for value in rows.mean(0).tolist())
    low, high = np.percentile(np.clip(bootstrap(rows), 0.0, 1.0), [2.5, 97.5], axis=0)
    return tuple(Interval(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def widening(n: int) -> float:
    """Return what deviations of resampled means of n seeds are multiplied by.

    Resampling understates the spread by sqrt((n - 1) / n), and few seeds tell little of it: the
    central 95 % becomes Student's interval (1908) where seeds are normal.
    """
    return math.sqrt(n / (n - 1)) * student(n - 1) / _Z


@lru_cache
def student(degrees: int) -> float:
    """Return the t that Student's distribution exceeds either way in one of 20 cases.

    By its closed form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4),
    halving the angle atan(t / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """Return the probability that Student's |t| is below sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    squared, term, total = math.cos(angle) ** 2, math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= squared * (k - 1) / k
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def next_seed(values: NDArray[np.float64]) -> Interval | None:
    """Return where one more seed's value falls in 95 of 100 cases; None with fewer than two.

    Student's prediction interval: mean +- t s sqrt(1 + 1 / n), for normal seeds.
    """
    n = len(values)
    if n < 2:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    half = student(n - 1) * spread * math.sqrt(1 + 1 / n)
    return Interval(mean - half, mean + half)


def percentile_interval(draws: NDArray[np.float64]) -> Interval:
    """Return the central 95 % of bootstrap draws."""
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return Interval(low, high)


def cost_to_recover(points: Sequence[EnvelopePoint], target: float) -> Cost:
    """Return the least budget whose envelope reaches `target`, censored at the horizon."""
    reached = [point.step for point in points if point.value >= target]
    return Cost(min(reached) if reached else None, points[-1].step if points else 0)


def cost_of(trials: Sequence[Trial], at: Sequence[int], target: float) -> Cost:
    """Return what the trials' envelope needed to reach `target`, and what it surely needed.

    Each attack counts with its own measurements: budgets at which only others were measured do not
    tell that it was not there.
    """
    points = [EnvelopePoint(budget, best, "") for budget, best, _ in _leading(trials, at)]
    cost = cost_to_recover(points, target)
    reached = [held for trial in trials if (held := _last_without(trial, target)) is not None]
    return replace(cost, above=min(reached, default=cost.horizon))


def _last_without(trial: Trial, target: float) -> int | None:
    """Return the last step measured before the target was reached; None where it never was."""
    before = 0
    for point in sorted(trial.curve, key=lambda p: p.step):
        if point.validation.value >= target:
            return before
        before = point.step
    return None


def winner(trials: Sequence[Trial], within: int | None = None) -> Trial | None:
    """Return the trial with the best validation score; ties go to the one that was faster.

    Only what was measured `within` so many steps counts, if they are given: the trial returned
    ends there.
    """
    if within is not None:
        trials = [until(trial, within) for trial in trials]
    measured = [trial for trial in trials if trial.best_step is not None]
    return max(measured, key=lambda t: (best_of(t), -(t.best_step or 0)), default=None)


def until(trial: Trial, step: int) -> Trial:
    """Return the trial as if it had been stopped at a step, which it was not tested at."""
    curve = tuple(point for point in trial.curve if point.step <= step)
    if len(curve) == len(trial.curve):
        return trial
    best = max(curve, key=lambda point: (point.validation.value, -point.step), default=None)
    best_step = None if best is None else best.step
    return trial.model_copy(update={"curve": curve, "best_step": best_step, "test": None})


def best_of(trial: Trial) -> float:
    """Return a trial's best validation score; 0 if nothing was measured."""
    return max((point.validation.value for point in trial.curve), default=0.0)
