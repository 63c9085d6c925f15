"""Advantage removed: how much of what the weights were worth to an attacker is gone. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sophon._judgement.parts import SUBJECTS, measured
from sophon._judgement.statistics import (
    DRAWS,
    Interval,
    area,
    bootstrap,
    by_seed,
    next_seed,
    percentile_interval,
    run_with_all_seeds,
    shared_budgets,
    winner,
)
from sophon._records.audit_record import DomainRecord, ErrorScore, Trial, unpack
from sophon._records.metrics import KINDS, MetricKind
from sophon._specs import Strategy, Subject

# Ways to cut validation images into halves that choose and measure in turn.
_SPLITS = 16
# An error without bounds, of one image, must not outweigh all others: twice that of predicting
# nothing is as bad as it gets.
_WORST = -1.0
# Seeds that must remain where the one that chose the attacks is left out.
_LEAST_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; without one where fewer than two seeds were run.

    Where `defined` is false, `reason` says why the number means nothing. `one_more` is where the
    number of one further attack seed falls in 95 of 100 cases. `baselines` are the mean areas of
    the unprotected and of the fresh network, between which it lies. `missing` are the subjects
    without any measured attack.
    """

    value: float | None
    interval: Interval | None
    defined: bool
    reason: str = ""
    one_more: Interval | None = None
    baselines: tuple[float, float] | None = None
    missing: tuple[Subject, ...] = ()


def advantage_of(domain: DomainRecord, trials: list[Trial], kind: MetricKind) -> Estimate:
    """Return the advantage removed by what trials on a domain reached."""
    at, held = shared_budgets(trials), {name: measured(trials, name) for name in SUBJECTS}
    missing = tuple(name for name, own in held.items() if winner(own) is None)
    if not missing and not at:
        return Estimate(None, None, False, "no attack was measured when the first budget ended")
    if missing:
        words = f"no measured attack on {', '.join(missing)}"
        return Estimate(None, None, False, words, missing=missing)
    return advantage_removed(
        *(area(at, by_seed(own, at)) for own in held.values()),
        images=domain.validation,
        variances=[_variance(winner(own)) for own in held.values()],
        by_image=[image_areas(own, at) for own in held.values()],
        kind=kind,
    )


def _variance(best: Trial | None) -> float | None:
    """Return the variance of one image's error at a trial's best; None of a proportion."""
    scores = [p.validation for p in best.curve if p.step == best.best_step] if best else []
    held = [score.variance for score in scores if isinstance(score, ErrorScore)]
    return held[-1] if held else None


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
    p, u, s = (bootstrap(areas[i], seed=i) + own for i, own in enumerate(noise))
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
    measured = np.searchsorted([point.step for point in points], at, side="right")
    choosing = _halves(scores.shape[1])
    leaders = _leaders(choosing @ scores.T)[:, measured]
    result = np.zeros((len(at), scores.shape[1]))
    for budget, leading in enumerate(leaders.T):
        for leader in set(leading.tolist()) - {-1}:
            chosen = (1 - choosing[leading == leader]).sum(0)
            result[budget] += scores[leader] * chosen / _SPLITS
    return np.ascontiguousarray(result.T)


@lru_cache(maxsize=8)
def _halves(images: int) -> NDArray[np.float64]:
    """Return which images choose for the others, 1 or 0: (halves, images)."""
    stream = np.random.default_rng(0)
    choosing = np.zeros((2 * _SPLITS, images))
    for first, second in choosing.reshape(_SPLITS, 2, images):
        order = stream.permutation(images)
        first[order[images // 2 :]] = 1
        second[order[: images // 2]] = 1
    return choosing


def _leaders(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return which of the first 0, 1, ... of the last axis' values is the best, the first of ties;
    -1 if none is above 0.
    """
    best = np.maximum.accumulate(np.insert(values, 0, 0.0, axis=-1), axis=-1)
    new = np.where(values > best[..., :-1], np.arange(values.shape[-1]), -1)
    return np.maximum.accumulate(np.insert(new, 0, -1, axis=-1), axis=-1)
