"""Cost to recover as survival data: an attack seed that never got there is censored, not dropped.

Kaplan-Meier and log-rank are SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    from scipy.stats import logrank as test

    if min(len(first.costs), len(second.costs)) < 2:
        return None
    if all(cost.steps is None for cost in (*first.costs, *second.costs)):
        return None
    with np.errstate(all="ignore"):
        value = float(test(_censored(first.costs), _censored(second.costs)).pvalue)
    # Without any spread there is no variance to divide by.
    return value if math.isfinite(value) else 1.0


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
    from scipy.stats import ecdf

    if not costs or all(cost.steps is None for cost in costs):
        return None
    survival = ecdf(_censored(costs)).sf
    reached = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
    return int(reached[0]) if len(reached) else None


def _censored(costs: Sequence[Cost]) -> object:
    from scipy.stats import CensoredData

    steps = [float(cost.horizon if cost.steps is None else cost.steps) for cost in costs]
    return CensoredData.right_censored(steps, [cost.steps is None for cost in costs])
