"""Costs to recover as survival data: medians, log-rank and intervals against worked examples."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from records import STEPS, record, trial
from sophon._judgement.statistics import Cost, bands, cost_of, student
from sophon._judgement.survival import Recovery, _median, logrank, ratio_interval, recovery
from sophon._judgement.verdict import summarise
from sophon._reporting.report import report


def _recovery(costs: Sequence[int | None], horizon: int = 200) -> Recovery:
    """Return the recovery of seeds that cost so much, through trials that show it."""
    trials = [
        trial("protected", [0.9 if cost is not None and step >= cost else 0.1 for step in STEPS])
        for cost in costs
    ]
    numbered = [t.model_copy(update={"seed": seed}) for seed, t in enumerate(trials)]
    held = recovery(numbered, STEPS, 0.8)
    assert [cost.steps for cost in held.costs] == list(costs)
    assert held.horizon == horizon
    return held


@pytest.mark.parametrize(
    ("costs", "median"),
    [
        # The survival function falls to one half or less, by hand.
        ((5, 20, 80), 20),
        ((5, 20, 80, 200), 20),
        ((5, 20, None), 20),
        ((20, None, None), None),
        ((20, 80, None, None), 80),
        ((None, None, None), None),
        ((20,), 20),
    ],
)
def test_kaplan_meier_medians_by_hand(costs: tuple[int | None, ...], median: int | None) -> None:
    held = _recovery(costs)
    assert held.median == median
    assert held.censored == sum(cost is None for cost in costs)


def _logrank_by_hand(first: Sequence[int | None], other: Sequence[int | None]) -> float:
    """Return Mantel's two-sided p-value, term by term: observed, expected, hypergeometric."""
    horizon = 200
    observed = expected = variance = 0.0
    for time in sorted({c for c in (*first, *other) if c is not None}):
        risk = [sum((c or horizon) >= time for c in group) for group in (first, other)]
        events = [sum(c == time for c in group) for group in (first, other)]
        n, d = sum(risk), sum(events)
        observed += events[0]
        expected += d * risk[0] / n
        if n > 1:
            variance += d * risk[0] * risk[1] * (n - d) / (n**2 * (n - 1))
    return math.erfc(abs(observed - expected) / math.sqrt(variance) / math.sqrt(2))


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ((80, 200, None, None), (5, 20, 20, 80)),
        ((5, 20, 80), (5, 20, 80)),
        ((5, 5, None), (20, 80, 200)),
        ((None, None, None, None, None), (5, 5, 20, 20, 80)),
    ],
)
def test_logrank_equals_the_sum_worked_out_by_hand(
    first: tuple[int | None, ...], other: tuple[int | None, ...]
) -> None:
    found = logrank(_recovery(first), _recovery(other))
    assert found == pytest.approx(_logrank_by_hand(first, other), rel=1e-6)


def test_logrank_of_a_published_example() -> None:
    # Freireich et al. (1963), remission in weeks under 6-MP (+ censored) and placebo, as in
    # Collett's and Kalbfleisch's textbooks: chi-squared 16.79 on one degree of freedom.
    treated = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    late = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]

    def held(steps: list[int], censored: Sequence[int] = ()) -> Recovery:
        costs = [Cost(step, 40) for step in steps] + [Cost(None, step) for step in censored]
        return Recovery(0.9, tuple(costs), None, 40)

    p = logrank(held(treated, late), held(placebo))
    assert p == pytest.approx(math.erfc(math.sqrt(16.79 / 2)), rel=0.01)


@pytest.mark.parametrize("costs", [(5, 20, 80), (20, 20), (5, None, None), (None, None)])
def test_equal_costs_are_not_told_apart(costs: tuple[int | None, ...]) -> None:
    held = _recovery(costs)
    p, interval = logrank(held, held), ratio_interval(held, held)
    assert p == (None if set(costs) == {None} else pytest.approx(1.0))
    assert interval is not None
    assert interval.low <= 1 <= interval.high


def test_costs_are_known_to_lie_between_two_measurements() -> None:
    held = _recovery((5, 80, None))
    assert [cost.above for cost in held.costs] == [0, 20, 200]
    assert [cost.steps for cost in held.at_least().costs] == [1, 20, None]
    assert held.at_least().costs[2].horizon == 200


def test_a_budget_at_which_only_another_attack_was_measured_tells_nothing() -> None:
    coarse, fine = trial("protected", (0.1, 0.1, 0.1, 0.9)), trial("protected", (0.1,) * 4)
    kept = tuple(point for point in coarse.curve if point.step in (0, 5, 200))
    cost = cost_of([coarse.model_copy(update={"curve": kept}), fine], STEPS, 0.8)
    assert cost == Cost(200, 200, 5)


def test_one_cell_of_the_measuring_grid_is_not_slowed() -> None:
    """Half a point short of the goal at the budget at which the unprotected model is there."""
    held = record(curves={"protected": (0.1, 0.3, 0.805, 0.9)})
    (summary,) = summarise(held)
    assert (summary.slowing.value, summary.slowing.sure) == (2.5, 1.0)
    assert (summary.logrank_p or 1) < 0.05
    assert summary.verdict == "not protected"
    assert "raise audit.evaluations" in summary.reasons[1]
    slower = {"protected": (0.1, 0.3, 0.4, 0.9), "unprotected": (0.4, 0.83, 0.85, 0.9)}
    assert report(record(curves=slower)).verdict == "slowed x4.0"


def test_one_seed_and_nobody_there_have_no_p_value() -> None:
    one, none = _recovery((20,)), _recovery((None, None))
    assert logrank(one, one) is None
    assert ratio_interval(one, one) is None
    assert logrank(none, none) is None


def test_ratios_are_those_of_medians_and_never_speak_for_protection_by_censoring_alone() -> None:
    slow, fast = _recovery((200, 200, 200)), _recovery((20, 20, 20))
    assert ratio_interval(slow, fast) == (10.0, 10.0)
    never = _recovery((None, None, None))
    assert ratio_interval(never, fast) == (10.0, 10.0)
    interval = ratio_interval(slow, never)
    assert interval is not None
    assert interval.high <= 1


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_intervals_of_ratios_cover_as_often_as_they_claim(seeds: int) -> None:
    stream = np.random.default_rng(seeds)

    def drawn(median: float) -> Recovery:
        steps = np.exp(stream.normal(math.log(median), 0.4, seeds))
        return Recovery(0.8, tuple(Cost(round(float(s)), 10**9) for s in steps), None, 10**9)

    held = 0
    for _ in range(150):
        interval = ratio_interval(drawn(50_000), drawn(20_000))
        assert interval is not None
        held += interval.low <= 2.5 <= interval.high
    assert held >= 136


def test_equal_models_cost_the_same() -> None:
    held = record(curves={"protected": (0.4, 0.7, 0.85, 0.9)})
    (summary,) = summarise(held)
    assert summary.slowing.value == 1
    assert summary.slowing.interval == (1.0, 1.0)
    assert summary.logrank_p == pytest.approx(1.0)
    assert summary.advantage.value == pytest.approx(0.0)
    assert report(held).verdict == "not protected"


def test_bands_are_intervals_of_the_mean() -> None:
    rows = np.array([[0.2, 0.5], [0.4, 0.5], [0.6, 0.5]])
    first, second = bands(rows)
    assert first.low < 0.4 < first.high
    assert second == pytest.approx((0.5, 0.5))
    assert bands(rows[:1]) == ((0.2, 0.2), (0.5, 0.5))


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.72), (10, 0.86)])
def test_bands_cover_as_the_bootstrap_does(seeds: int, least: float) -> None:
    stream = np.random.default_rng(seeds)
    held = 0
    for _ in range(150):
        (band,) = bands(np.clip(stream.normal(0.5, 0.05, (seeds, 1)), 0, 1))
        held += band.low <= 0.5 <= band.high
    # Of few seeds a bootstrap covers less than 95 %, and the report says so.
    assert least <= held / 150 <= 0.99


def test_medians_and_p_values_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    stream = np.random.default_rng(3)
    compared = 0
    for _ in range(200):
        held, data = [], []
        for size in stream.integers(2, 7, 2):
            steps = stream.choice([5, 20, 80, 200], size)
            lost = stream.random(size) < 0.4
            costs = tuple(
                Cost(None if gone else int(step), int(step))
                for step, gone in zip(steps, lost, strict=True)
            )
            data.append(stats.CensoredData.right_censored(steps.astype(float), lost))
            survival = stats.ecdf(data[-1]).sf
            reached = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
            # SciPy's has a step at every time, also where seeds were only lost.
            median = int(reached[0]) if len(reached) and not lost.all() else None
            held.append(Recovery(0.5, costs, _median(costs), 200))
            assert held[-1].median == median
        with np.errstate(all="ignore"):
            expected = float(stats.logrank(*data).pvalue)
        found = logrank(*held)
        if found is not None and math.isfinite(expected):
            assert found == pytest.approx(expected, abs=1e-12)
            compared += 1
    assert compared > 100


def test_students_quantiles_are_scipys() -> None:
    special = pytest.importorskip("scipy.special")
    for degrees in (*range(1, 60), 200, 1001):
        assert student(degrees) == pytest.approx(special.stdtrit(degrees, 0.975), rel=1e-12)


def test_a_report_imports_neither_torch_nor_scipy(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(
        record([trial("protected", [0.1] * len(STEPS))]).model_dump_json()
    )
    code = (
        "import sys; from pathlib import Path; from sophon._cli.reading import read_record;"
        "from sophon._reporting.report import report;"
        "report(read_record(Path('record.json'))).write_html(Path('report.html'));"
        "assert 'torch' not in sys.modules; assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "report.html").is_file()
