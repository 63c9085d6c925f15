"""Cost to recover as survival data: an attack seed that never got there is censored, not dropped.

Kaplan-Meier and log-rank are written out: to import SciPy's takes longer than the rest of a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sophon._judgement.statistics import (
    DRAWS,
    Cost,
    Interval,
    cost_of,
    percentile_interval,
    run_with_all_seeds,
)
from sophon._records.audit_record import Trial

# What deviations of a resampled median of so many seeds are multiplied by, on the logarithm.
_WIDER = {2: 3.0, 3: 1.5, 4: 1.2}


@dataclass(frozen=True)
class Recovery:
    """What it cost to reach a target, seed by seed.

    `median` is the Kaplan-Meier median in steps, None where fewer than half of the seeds got
    there by the horizon.
    """

    target: float
    costs: tuple[Cost, ...]
    median: int | None
    horizon: int

    @property
    def censored(self) -> int:
        """How many seeds did not reach the target."""
        return sum(cost.steps is None for cost in self.costs)

    def at_least(self) -> Recovery:
        """Return the least that each seed can have cost: the last budget measured without it."""
        costs = tuple(
            cost if cost.steps is None else replace(cost, steps=max(cost.above, 1))
            for cost in self.costs
        )
        return replace(self, costs=costs, median=_median(costs))


def recovery(trials: Sequence[Trial], at: Sequence[int], target: float) -> Recovery:
    """Return what each seed's envelope needed to reach `target`, a validation score."""
    held = run_with_all_seeds(trials)
    own = [
        [t for t in held if t.seed == seed and t.curve] for seed in sorted({t.seed for t in held})
    ]
    costs = tuple(cost_of(seed, at, target) for seed in own if seed)
    return Recovery(target, costs, _median(costs), at[-1] if at else 0)


def logrank(first: Recovery, second: Recovery) -> float | None:
    """Return the two-sided log-rank p-value of two subjects' costs (Mantel, 1966).

    None with fewer than two seeds each and where nobody got there; 1 where all cost the same.
    """
    if min(len(first.costs), len(second.costs)) < 2:
        return None
    if all(cost.steps is None for cost in (*first.costs, *second.costs)):
        return None
    excess = variance = 0.0
    for time, at_risk, ended in _events((*first.costs, *second.costs)):
        own, of_own = _at(first.costs, time)
        excess += of_own - ended * own / at_risk
        if at_risk > 1:
            shares = own * (at_risk - own) / at_risk**2
            variance += ended * shares * (at_risk - ended) / (at_risk - 1)
    # Without any spread there is no variance to divide by.
    return math.erfc(abs(excess) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def ratio_interval(protected: Recovery, other: Recovery) -> Interval | None:
    """Return the 95 % bootstrap interval, over seeds, of the ratio of median costs.

    A seed that did not get there counts with the horizon, the least it can have cost: where
    `protected` has such seeds the bounds are lower bounds. Where only `other` has, ratios are at
    most 1, so that they never speak for protection. None with fewer than two seeds each.
    """
    if min(len(protected.costs), len(other.costs)) < 2:
        return None
    stream = np.random.default_rng(0)
    above, below = (_resampled(r, stream) for r in (protected, other))
    return percentile_interval(above / below)


def _resampled(held: Recovery, stream: np.random.Generator) -> NDArray[np.float64]:
    """Return draws of the median cost over resampled seeds."""
    steps = [held.horizon if c.steps is None else c.steps for c in held.costs]
    costs = np.maximum(np.array(steps, np.float64), 1.0)
    index = stream.integers(0, len(costs), (DRAWS, len(costs)))
    centre, medians = np.median(costs), np.median(costs[index], axis=1)
    drawn: NDArray[np.float64] = centre * (medians / centre) ** _WIDER.get(len(costs), 1.0)
    return drawn


def _median(costs: Sequence[Cost]) -> int | None:
    surviving = 1.0
    for time, at_risk, ended in _events(costs):
        surviving *= 1 - ended / at_risk
        if surviving <= 0.5 + 1e-12:
            return time
    return None


def _events(costs: Sequence[Cost]) -> Iterator[tuple[int, int, int]]:
    """Yield each number of steps at which a seed got there, with what `_at` says of it."""
    for time in sorted({cost.steps for cost in costs if cost.steps is not None}):
        yield time, *_at(costs, time)


def _at(costs: Sequence[Cost], time: int) -> tuple[int, int]:
    """Return how many seeds had not got there before `time` steps, and how many did then."""
    lasted = [cost.horizon if cost.steps is None else cost.steps for cost in costs]
    return sum(one >= time for one in lasted), sum(cost.steps == time for cost in costs)
