"""Numbers of an audit: envelopes, areas, costs, intervals. Pure functions of trials; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sophon._records.audit_record import Measurement, Score, Trial, first_evaluation, unpack
from sophon._records.metrics import KINDS, MetricKind
from sophon._specs import Strategy

DRAWS = 4000
# Ways to cut validation images into halves that choose and measure in turn.
_SPLITS = 16
# An error without bounds, of one image, must not outweigh all others: twice that of predicting
# nothing is as bad as it gets.
_WORST = -1.0
# Seeds that must remain where the one that chose the attacks is left out.
_LEAST_SEEDS = 3
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


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; without one where fewer than two seeds were run.

    Where `defined` is false, `reason` says why the number means nothing. `one_more` is where the
    number of one further attack seed falls in 95 of 100 cases. `baselines` are the mean areas of
    the unprotected and of the fresh network, between which it lies.
    """

    value: float | None
    interval: Interval | None
    defined: bool
    reason: str = ""
    one_more: Interval | None = None
    baselines: tuple[float, float] | None = None


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
    points = sorted(
        ((p.step, p.validation.value, t.strategy) for t in trials for p in t.curve),
        key=lambda point: point[0],
    )
    result: list[EnvelopePoint] = []
    best, label, position = -1.0, "", 0
    for budget in budgets(trials) if at is None else at:
        while position < len(points) and points[position][0] <= budget:
            if points[position][1] > best:
                _, best, strategy = points[position]
                label = strategy.label()
            position += 1
        if points:
            result.append(EnvelopePoint(budget, max(best, 0.0), label))
    return result


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
    rows = [[p.value for p in envelope([t for t in trials if t.seed == s], at)] for s in seeds]
    return np.array([row for row in rows if len(row) == len(at)]).reshape(-1, len(at))


def image_areas(trials: Sequence[Trial], at: Sequence[int]) -> NDArray[np.float64] | None:
    """Return each seed's area under the envelope image by image, shape (seeds, images).

    Each image is scored at the points that lead on other images: the best of many noisy scores on
    the very images that chose it would flatter whoever has more attacks that are alike
    (cross-fitting; Chernozhukov et al., The Econometrics Journal 21, 2018). A seed that chose the
    attacks which the others repeat is left out for the same reason, where three others remain. None
    where the trials do not say which images they had right, as older ones do not.
    """
    trials = _without_chooser(trials)
    areas = []
    for seed in sorted({trial.seed for trial in trials}):
        scores = _cross_fitted([t for t in trials if t.seed == seed], at)
        if scores is None:
            return None
        areas.append(area(at, scores))
    return np.stack(areas) if len({len(held) for held in areas}) == 1 else None


def _without_chooser(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of attacks run with every seed, of the seeds that did not choose them.

    A suite that goes by stages repeats with further seeds what led with the first, which alone ran
    others too.
    """
    ran: dict[int, set[Strategy]] = {}
    for trial in trials:
        ran.setdefault(trial.seed, set()).add(trial.strategy)
    common = set.intersection(*ran.values()) if ran else set()
    choosers = [seed for seed, own in ran.items() if own > common]
    kept = run_with_all_seeds(trials)
    if not common or len(choosers) != 1 or len(ran) - 1 < _LEAST_SEEDS:
        return kept
    return [trial for trial in kept if trial.seed != choosers[0]]


def _cross_fitted(trials: Sequence[Trial], at: Sequence[int]) -> NDArray[np.float64] | None:
    """Return the image scores of the envelope's points, chosen on other images: (images, budgets).

    A mean over `_SPLITS` ways to cut the images into halves, each of which chooses for the other.
    """
    points = sorted((p for t in trials for p in t.curve), key=lambda p: p.step)
    if not points or any(point.by_image is None for point in points):
        return None
    held = [unpack(point.by_image or "", point.validation) for point in points]
    if len({len(scores) for scores in held}) != 1 or len(held[0]) < 2:
        return None
    scores = np.maximum(np.stack(held), _WORST)
    images = scores.shape[1]
    measured = np.searchsorted([point.step for point in points], at, side="right")
    result = np.zeros((images, len(at)))
    stream = np.random.default_rng(0)
    for _ in range(_SPLITS):
        order = stream.permutation(images)
        halves = order[: images // 2], order[images // 2 :]
        for chosen, chooses in (halves, halves[::-1]):
            leaders = _leaders(scores[:, chooses].mean(1))
            for column, count in enumerate(measured):
                leader = leaders[count - 1] if count else None
                if leader is not None:
                    result[chosen, column] += scores[leader, chosen] / _SPLITS
    return result


def _leaders(values: NDArray[np.float64]) -> list[int | None]:
    """Return which of the values up to each is the best, the first of ties; None if none is > 0."""
    found: list[int | None] = []
    leader: int | None = None
    best = 0.0
    for index, value in enumerate(values.tolist()):
        if value > best:
            leader, best = index, value
        found.append(leader)
    return found


def bootstrap(
    values: NDArray[np.float64], *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Return `draws` means of `values` (seeds,) resampled with replacement."""
    index = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means: NDArray[np.float64] = values[index].mean(1)
    return means


def bands(rows: NDArray[np.float64], *, seed: int = 0) -> tuple[Interval, ...]:
    """Return the 95 % bootstrap interval of the mean over seeds at each budget.

    `rows` are the seeds' envelopes, shape (seeds, budgets). Widened for few seeds;
    with one seed each interval is the value itself.
    """
    n, mean = len(rows), rows.mean(0)
    if n < 2:
        return tuple(Interval(value, value) for value in mean.tolist())
    index = np.random.default_rng(seed).integers(0, n, (DRAWS, n))
    draws = mean + (rows[index].mean(1) - mean) * _widening(n)
    low, high = np.percentile(np.clip(draws, 0.0, 1.0), [2.5, 97.5], axis=0)
    return tuple(Interval(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def _widening(n: int) -> float:
    """Return what deviations of resampled means of n seeds are multiplied by.

    Resampling understates the spread by sqrt((n - 1) / n), and few seeds tell little of it: the
    central 95 % becomes Student's interval (1908) where seeds are normal.
    """
    from scipy.special import stdtrit

    return float(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975) / _Z)


def next_seed(values: NDArray[np.float64]) -> Interval | None:
    """Return where one more seed's value falls in 95 of 100 cases; None with fewer than two.

    Student's prediction interval: mean +- t s sqrt(1 + 1 / n), for normal seeds.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    half = float(stdtrit(n - 1, 0.975)) * spread * math.sqrt(1 + 1 / n)
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
    cost = cost_to_recover(envelope(trials, at), target)
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


def advantage_removed(
    protected: NDArray[np.float64],
    unprotected: NDArray[np.float64],
    scratch: NDArray[np.float64],
    *,
    images: int,
    variances: Sequence[float | None] = (None, None, None),
    by_image: Sequence[NDArray[np.float64] | None] = (),
    kind: MetricKind = KINDS["accuracy"],
) -> Estimate:
    """Return (A_unprotected - A_protected) / (A_unprotected - A_scratch) from areas by seed.

    0: protection bought nothing; 1: the weights are worth no more than a fresh network. It is
    defined only where unprotected and scratch differ by more than their interval. Intervals
    resample the attack seeds and add the error of finitely many validation images. All subjects
    meet the same ones: with `by_image`, each subject's `image_areas`, these are the areas, and the
    error is drawn for all three together. Without, the areas are as given, so that the best of many
    attacks counts with the luck that made it the best, and the error is that of `images` images for
    each alone, binomial unless one image's variance is given. With one seed that error alone
    decides whether the value is defined, and no interval is given.
    """
    if not (len(protected) and len(unprotected) and len(scratch)):
        return Estimate(None, None, False, "a subject has no measured attack")
    if images < 2:
        return Estimate(None, None, False, "one validation image tells nothing: give more")
    areas: tuple[NDArray[np.float64], ...] = (protected, unprotected, scratch)
    shared = _of_the_same_images(by_image)
    if shared is None:
        noise = _separate_noise(areas, images, variances)
    else:
        noise = _shared_noise(shared)
        protected, unprotected, scratch = areas = tuple(held.mean(1) for held in shared)
    baselines = (float(unprotected.mean()), float(scratch.mean()))
    gap = baselines[0] - baselines[1]
    p, u, s = (_draws(v, i) + own for i, (v, own) in enumerate(zip(areas, noise, strict=True)))
    if gap <= 0 or np.percentile(u - s, 2.5) <= 0:
        return Estimate(None, None, False, _tells_nothing(gap, kind))
    value = float(unprotected.mean() - protected.mean()) / gap
    if min(len(protected), len(unprotected), len(scratch)) < 2:
        return Estimate(value, None, True, baselines=baselines)
    held = u - s > 1e-9
    interval = percentile_interval((u - p)[held] / (u - s)[held])
    paired = len(protected) == len(unprotected)
    one_more = next_seed((unprotected - protected) / gap) if paired else None
    return Estimate(value, interval, True, one_more=one_more, baselines=baselines)


def _draws(areas: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return draws of a subject's mean area over resampled seeds."""
    mean, n = float(areas.mean()), len(areas)
    resampled = bootstrap(areas, seed=seed)
    return resampled if n < 2 else mean + (resampled - mean) * _widening(n)


def _of_the_same_images(
    by_image: Sequence[NDArray[np.float64] | None],
) -> tuple[NDArray[np.float64], ...] | None:
    """Return the areas by image of all three subjects; None unless all are of the same images."""
    held = tuple(areas for areas in by_image if areas is not None)
    return held if len(held) == 3 and len({areas.shape[1] for areas in held}) == 1 else None


def _shared_noise(by_image: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return draws of how far the subjects' areas are off because images are finitely many.

    Normal, with the covariance of the subjects over images.
    """
    held = np.stack([areas.mean(0) for areas in by_image])
    covariance = np.cov(held) / held.shape[1]
    stream = np.random.default_rng(100)
    return [*stream.multivariate_normal(np.zeros(3), covariance, DRAWS, method="eigh").T]


def _separate_noise(
    subjects: Sequence[NDArray[np.float64]], images: int, variances: Sequence[float | None]
) -> list[NDArray[np.float64]]:
    """Return the same where it is not known which images each subject had right.

    `variances` are of the images at hand: that of all images is a little larger.
    """
    noise = []
    for index, (areas, variance) in enumerate(zip(subjects, variances, strict=True)):
        mean = float(areas.mean())
        wide = max(mean * (1 - mean), 0.0) if variance is None else variance
        stream = np.random.default_rng(100 + index)
        noise.append(stream.normal(0.0, math.sqrt(wide / (images - 1)), DRAWS))
    return noise


def _tells_nothing(gap: float, kind: MetricKind) -> str:
    lead = f"leads a fresh one by only {kind.gap(gap)}"
    if gap < 0:
        lead = f"is {kind.gap(-gap)} behind a fresh one"
    return (
        f"the unprotected model {lead} on average over the budget: this pair and budget tell"
        " nothing"
    )


def winner(trials: Sequence[Trial], within: int | None = None) -> Trial | None:
    """Return the trial with the best validation score; ties go to the one that was faster.

    Only what was measured `within` so many steps counts, if they are given: the trial returned
    ends there.
    """
    if within is not None:
        trials = [cut for trial in trials if (cut := _until(trial, within)) is not None]
    measured = [trial for trial in trials if trial.best_step is not None]
    return max(measured, key=lambda t: (best_of(t), -(t.best_step or 0)), default=None)


def _until(trial: Trial, step: int) -> Trial | None:
    """Return the trial as it was after `step` steps; None if it was not measured by then."""
    curve = tuple(point for point in trial.curve if point.step <= step)
    if not curve:
        return None
    best = max(curve, key=lambda point: (point.validation.value, -point.step))
    return trial.model_copy(update={"curve": curve, "best_step": best.step})


def best_of(trial: Trial) -> float:
    """Return a trial's best validation score; 0 if nothing was measured."""
    return max((point.validation.value for point in trial.curve), default=0.0)
