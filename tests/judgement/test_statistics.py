"""The numbers of an audit against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from records import CURVES, STEPS, trial
from sophon._auditing.trial import evaluation_steps
from sophon._judgement.advantage import advantage_removed, image_areas
from sophon._judgement.statistics import (
    area,
    bands,
    budgets,
    by_seed,
    cost_to_recover,
    envelope,
    first_evaluation,
    next_seed,
    shared_budgets,
    wilson,
    winner,
)
from sophon._records.audit_record import (
    ErrorScore,
    Point,
    Score,
    Trial,
    pack,
    unpack,
)
from sophon._specs import Strategy, Subject


def test_wilson_equals_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), method 3: 81 of 263 gives 0.2553 to 0.3662.
    low, high = wilson(Score(correct=81, total=263))
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_proportion_and_stays_in_range(total: int, data: st.DataObject) -> None:
    score = Score(correct=data.draw(st.integers(0, total)), total=total)
    low, high = wilson(score)
    assert 0 <= low <= score.value <= high <= 1


def test_the_envelope_never_falls_and_names_its_holder() -> None:
    first = trial("protected", (0.3, 0.2, 0.2, 0.2))
    second = trial(
        "protected",
        (0.1, 0.25, 0.6, 0.4),
        strategy=first.strategy.model_copy(update={"optimizer": "adam"}),
    )
    points = envelope([first, second])
    assert [p.step for p in points] == list(STEPS)
    assert [p.value for p in points] == [0.3, 0.3, 0.6, 0.6]
    assert ["adam" in p.label for p in points] == [False, False, True, True]


def test_the_area_is_a_mean_over_the_logarithm_of_the_budget() -> None:
    assert area([1, 10, 100], np.array([0.2, 0.2, 0.2])) == pytest.approx(0.2)
    # A straight line in the logarithm has its middle as mean, whatever the spacing of budgets.
    steps = [1, 2, 50, 100]
    line = np.log(steps) / math.log(100)
    assert area(steps, line) == pytest.approx(0.5)


def test_cost_to_recover_is_censored_at_the_horizon() -> None:
    points = envelope([trial("protected", CURVES["protected"])])
    assert cost_to_recover(points, 0.45).steps == 80
    missed = cost_to_recover(points, 0.95)
    assert (missed.steps, missed.horizon) == (None, 200)


@pytest.mark.parametrize(
    ("protected", "expected"), [(0.8, 0.0), (0.5, 1.0), (0.65, 0.5), (0.35, 1.5)]
)
def test_advantage_removed_at_its_landmarks(protected: float, expected: float) -> None:
    noise = np.array([-0.01, 0.0, 0.01])
    estimate = advantage_removed(protected + noise, 0.8 + noise, 0.5 + noise, images=200)
    assert estimate.value == pytest.approx(expected)
    assert estimate.interval is not None
    assert estimate.interval.low <= expected <= estimate.interval.high


def test_advantage_removed_says_when_it_means_nothing() -> None:
    noise = np.array([-0.05, 0.0, 0.05])
    same = advantage_removed(0.5 + noise, 0.5 + noise, 0.49 + noise, images=200)
    assert not same.defined
    assert "tell nothing" in same.reason
    single = advantage_removed(np.array([0.5]), np.array([0.8]), np.array([0.5]), images=200)
    assert single.defined
    assert single.interval is None


def test_the_winner_is_chosen_on_validation() -> None:
    weak = trial("protected", (0.1, 0.1, 0.1, 0.5))
    strong = trial("protected", (0.1, 0.1, 0.1, 0.6)).model_copy(
        update={"test": Score(correct=0, total=1000)}
    )
    assert winner([weak, strong]) is strong
    assert winner([]) is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_as_often_as_they_claim(seeds: int) -> None:
    stream = np.random.default_rng(seeds)

    def measured(mean: float, images: int = 250) -> np.ndarray:
        shared = stream.normal(0, math.sqrt(mean * (1 - mean) / images))
        return mean + shared + stream.normal(0, 0.02, seeds)

    held = 0
    for _ in range(200):
        estimate = advantage_removed(measured(0.6), measured(0.7), measured(0.4), images=250)
        # Two seeds may be too few to say anything, and then nothing is said.
        assert estimate.defined or seeds == 2
        low, high = estimate.interval or (0.0, 1.0)
        held += low <= 1 / 3 <= high
    assert held >= 188


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_on_shared_images_cover_and_are_narrower(seeds: int) -> None:
    stream = np.random.default_rng(seeds)
    # Of an image of difficulty z each subject is right with probability 1 / (1 + exp(2 z - a)).
    offsets = (0.6, 1.0, -0.4)

    def right(offset: float, z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(2 * z - offset))

    many = np.random.default_rng(0).normal(size=200_000)
    p, u, s = (right(offset, many).mean() for offset in offsets)
    truth = (u - p) / (u - s)
    held, widths = 0, []
    for _ in range(200):
        images = stream.normal(size=250)
        areas, by_image = [], []
        for offset in offsets:
            shifted = offset + stream.normal(0, 0.05, seeds)
            # Six budgets' mean, so an image may be in between.
            drawn = [stream.binomial(6, right(own, images)) / 6 for own in shifted]
            areas.append(np.mean(drawn, axis=1))
            by_image.append(np.array(drawn))
        shared = advantage_removed(*areas, images=250, by_image=by_image)
        apart = advantage_removed(*areas, images=250)
        assert shared.value == apart.value
        assert shared.interval is not None
        assert apart.interval is not None
        held += shared.interval.low <= truth <= shared.interval.high
        widths.append([i.high - i.low for i in (shared.interval, apart.interval)])
    assert held >= 184
    narrow, wide = np.mean(widths, axis=0)
    assert narrow < 0.7 * wide


def with_images(held: Trial, scores: np.ndarray) -> Trial:
    """Return the trial with these scores of 0 and 1, (points, images)."""
    points = []
    for point, own in zip(held.curve, scores, strict=True):
        found = Score(correct=int(own.sum()), total=len(own))
        packed = pack(own, found)
        assert np.array_equal(unpack(packed, found), own)
        points.append(point.model_copy(update={"validation": found, "by_image": packed}))
    return held.model_copy(update={"curve": tuple(points)})


def test_areas_by_image_of_one_attack_are_its_areas_seed_by_seed() -> None:
    stream = np.random.default_rng(0)
    # Every point is better than the one before: there is nothing to choose.
    rising = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    trials = []
    for seed in (0, 1):
        scores = (stream.random(200) < rising[:, None]).astype(float)
        held = trial("protected", (0.2, 0.4, 0.3, 0.8), seed=seed)
        trials.append(with_images(held, scores[: len(held.curve)]))
    images = image_areas(trials, STEPS)
    assert images is not None
    assert images.shape == (2, 200)
    assert images.mean(1) == pytest.approx(area(STEPS, by_seed(trials, STEPS)))
    # One that does not say which images it had right: nothing is known of all.
    older = trial("protected", (0.9,) * 4, seed=0)
    assert image_areas([*trials, older], STEPS) is None


def test_one_image_that_is_far_off_does_not_outweigh_all_others() -> None:
    def errors(subject: Subject, values: np.ndarray, index: int) -> Trial:
        score = ErrorScore(mse=float(1 - values.mean()), variance=1.0, total=len(values))
        points = [
            Point(step=s, samples=s, validation=score, by_image=pack(values, score)) for s in STEPS
        ]
        held = trial(subject, (), strategy=Strategy(learning_rate=1e-3 * (index + 1)))
        return held.model_copy(update={"curve": tuple(points)})

    sound = np.full(100, 0.94)
    # A little better everywhere, and beyond all bounds on one image.
    spoilt = np.where(np.arange(100) == 7, 1 - 1e4, 0.95)
    found = image_areas([errors("protected", v, i) for i, v in enumerate((sound, spoilt))], STEPS)
    assert found is not None
    assert 0.92 < found.mean() < 0.951


@pytest.mark.parametrize(("further", "left"), [(2, 3), (3, 3), (4, 4)])
def test_a_seed_that_chose_the_attacks_does_not_measure_them(further: int, left: int) -> None:
    stream = np.random.default_rng(0)
    z = stream.normal(size=50)
    every = attacks(0.5, z, count=1, seeds=1 + further, stream=stream)
    # The first seed tried others too, which led nowhere.
    only = [
        held.model_copy(update={"strategy": Strategy(learning_rate=0.5 + index)})
        for index, held in enumerate(attacks(0.5, z, count=4, seeds=1, stream=stream))
    ]
    found = image_areas([*every, *only], STEPS)
    assert found is not None
    # Without it at least three must remain.
    assert len(found) == left
    kept = image_areas([held for held in every if held.seed or further == 2], STEPS)
    assert kept is not None
    assert np.array_equal(found, kept)
    # An attack that one seed lacks, because it crashed there, was chosen by no seed.
    both = attacks(0.5, z, count=2, seeds=1 + further, stream=stream)
    lacking = image_areas([*both[:3], *both[4:]], STEPS)
    assert lacking is not None
    assert len(lacking) == 1 + further


def attacks(
    offset: float, z: np.ndarray, *, count: int, seeds: int, stream: np.random.Generator
) -> list[Trial]:
    """Return attacks that are all as good: right on an image of difficulty z with probability
    1 / (1 + exp(2 z - offset)), each time anew.
    """
    made = []
    for seed in range(seeds):
        for index in range(count):
            held = trial(
                "protected",
                (0.0,) * 4,
                seed=seed,
                strategy=Strategy(learning_rate=1e-3 * index + 1e-4),
            )
            chance = 1 / (1 + np.exp(2 * z - offset))
            scores = stream.random((len(held.curve), len(z))) < chance
            made.append(with_images(held, scores.astype(float)))
    return made


def test_the_best_of_many_equal_attacks_is_no_better_than_one() -> None:
    stream = np.random.default_rng(1)
    cross, plain = [], []
    for _ in range(20):
        z = stream.normal(size=150)
        trials = attacks(0.5, z, count=12, seeds=1, stream=stream)
        found = image_areas(trials, STEPS)
        assert found is not None
        truth = (1 / (1 + np.exp(2 * z - 0.5))).mean()
        cross.append(found.mean() - truth)
        plain.append(float(area(STEPS, by_seed(trials, STEPS)).mean()) - truth)
    # Luck makes the best of twelve look better where the same images choose and measure.
    assert abs(np.mean(cross)) < 0.01
    assert np.mean(plain) > 0.05


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_where_subjects_have_unequally_many_good_attacks(seeds: int) -> None:
    stream = np.random.default_rng(seeds)
    offsets, counts = (0.6, 1.0, -0.4), (1, 10, 10)
    many = np.random.default_rng(0).normal(size=200_000)
    p, u, s = ((1 / (1 + np.exp(2 * many - offset))).mean() for offset in offsets)
    truth = (u - p) / (u - s)
    held, repeats = 0, 40
    for _ in range(repeats):
        z = stream.normal(size=150)
        by = [
            attacks(offset, z, count=count, seeds=seeds, stream=stream)
            for offset, count in zip(offsets, counts, strict=True)
        ]
        found = advantage_removed(
            *(area(STEPS, by_seed(trials, STEPS)) for trials in by),
            images=150,
            by_image=[image_areas(trials, STEPS) for trials in by],
        )
        assert found.interval is not None
        held += found.interval.low <= truth <= found.interval.high
    # 95 % of 40 is 38.
    assert held >= 35


@pytest.mark.parametrize("text", ["!!", "AAAA", "/w==", "/////////////////////////////////w=="])
def test_damaged_scores_by_image_are_refused(text: str) -> None:
    score = Score(correct=100, total=200)
    with pytest.raises(ValueError, match="by_image is damaged"):
        Point(step=1, samples=64, validation=score, by_image=text)
    whole = pack(np.arange(200) % 2, score)
    assert Point(step=1, samples=64, validation=score, by_image=whole).by_image == whole


def test_one_validation_image_tells_nothing() -> None:
    areas = np.array([0.8, 0.81]), np.array([0.9, 0.91]), np.array([0.1, 0.11])
    found = advantage_removed(*areas, images=1)
    assert not found.defined
    assert "give more" in found.reason


def test_errors_by_image_are_kept_to_a_thousandth() -> None:
    errors = np.array([0.05, 0.1, 2.0, 1e4])
    score = ErrorScore(mse=float(errors.mean()), variance=1.0, total=4)
    kept = unpack(pack(1 - errors, score), score)
    assert kept == pytest.approx(1 - errors, rel=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_bands_and_intervals_cover_though_seeds_are_few_and_images_many(seeds: int) -> None:
    stream = np.random.default_rng(seeds)
    held = [0, 0, 0]
    for _ in range(400):
        p, u, s = (m + stream.normal(0, 0.02, seeds) for m in (0.6, 0.7, 0.4))
        band = bands(p[:, None])[0]
        held[0] += band.low <= 0.6 <= band.high
        estimate = advantage_removed(p, u, s, images=10**9)
        if estimate.interval is not None:
            held[1] += estimate.interval.low <= 1 / 3 <= estimate.interval.high
        else:
            held[1] += 1
        following = next_seed(p)
        assert following is not None
        held[2] += following.low <= 0.6 + stream.normal(0, 0.02) <= following.high
    # 95 % of 400 is 380; chance takes up to ten of them, resampling two or three seeds more.
    assert held[0] >= {2: 300, 3: 350, 5: 366}[seeds]
    assert held[1] >= 366
    assert 366 <= held[2] <= 394


def test_the_next_seed_of_a_hand_computed_example() -> None:
    found = next_seed(np.array([1.0, 2.0, 3.0]))
    # t(2, 0.975) = 4.302653, s = 1: 2 +- 4.302653 * sqrt(4 / 3).
    assert found == pytest.approx((2 - 4.968276, 2 + 4.968276), abs=1e-5)
    assert next_seed(np.array([1.0])) is None


def test_resampling_two_seeds_does_not_understate_their_spread() -> None:
    wide = np.array([0.5, 0.7])
    many = 10**9
    found = advantage_removed(wide, np.array([0.9, 0.9]), np.array([0.1, 0.1]), images=many)
    # The bare bootstrap of two values reaches from one to the other: 0.25 to 0.5.
    assert found.interval is not None
    assert found.interval.low < 0.24
    assert found.interval.high > 0.51


def test_only_attacks_run_with_every_seed_make_up_a_seeds_envelope() -> None:
    common, extra = Strategy(learning_rate=1e-2), Strategy(learning_rate=1e-1)
    trials = [trial("protected", (0.2, 0.3, 0.4, 0.5), seed=s, strategy=common) for s in (0, 1)]
    trials.append(trial("protected", (0.6, 0.7, 0.8, 0.9), seed=0, strategy=extra))
    rows = by_seed(trials, STEPS)
    np.testing.assert_allclose(rows, [[0.2, 0.3, 0.4, 0.5]] * 2)
    np.testing.assert_allclose(by_seed(trials[2:], STEPS), [[0.6, 0.7, 0.8, 0.9]])


def test_an_area_begins_where_attacks_are_due() -> None:
    """A fitted head is measured after one step; the others would count there with their start."""
    early = trial("protected", (0.5, 0.6, 0.7, 0.8))
    fitted = early.model_copy(
        update={
            "curve": (
                early.curve[0],
                early.curve[1].model_copy(update={"step": 1}),
                *early.curve[1:],
            )
        }
    )
    assert budgets([fitted, early])[0] == 1
    first = first_evaluation(early.strategy.steps)
    assert shared_budgets([fitted, early]) == [s for s in budgets([early]) if s >= first]
    assert first == min(evaluation_steps(early.strategy.steps, 12))
