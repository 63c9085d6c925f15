"""The audit is audited: it finds the two controls whose answer is a number.

The decoys are in `test_controls.py`: test files run side by side.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from controls import leading_attacks, real_controls
from records import record
from sophon._auditing.controls import ControlResult, answer_found
from sophon._judgement.statistics import Interval
from sophon._judgement.verdict import summarise

ANSWERS = {"a twin of the unprotected model": 0.0, "a fresh network": 1.0}


@pytest.fixture(scope="module")
def results(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ControlResult]:
    """Return both answers."""
    with leading_attacks():
        run = real_controls(shared_data, tmp_path_factory.mktemp("controls"))
        return {result.name: result for result in run.known()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_found(name: str, results: dict[str, ControlResult]) -> None:
    result = results[name]
    assert set(results) == set(ANSWERS)
    said = (result.summary.verdict, result.summary.advantage, result.flags)
    assert result.passed, said
    assert answer_found(result.summary, ANSWERS[name]), said


@pytest.mark.slow
def test_the_twin_is_measured_and_not_compared_with_itself(
    results: dict[str, ControlResult],
) -> None:
    subjects = results["a twin of the unprotected model"].summary.subjects
    assert subjects["protected"].mean != subjects["unprotected"].mean


@pytest.mark.parametrize(
    ("value", "interval", "answer", "found"),
    [
        (0.1, (-0.8, 0.9), 0.0, True),
        (0.1, (-0.8, 1.1), 0.0, False),
        (0.3, (-0.8, 0.9), 0.0, False),
        (0.1, (0.05, 0.9), 0.0, False),
        (0.9, (0.6, 1.5), 1.0, True),
        (0.9, (-0.1, 1.5), 1.0, False),
        (0.9, (0.6, 0.95), 1.0, False),
        (1.4, (0.6, 1.5), 1.0, False),
        (1.0, None, 1.0, False),
        (None, None, 1.0, False),
    ],
)
def test_an_interval_that_holds_everything_finds_nothing(
    value: float | None, interval: tuple[float, float] | None, answer: float, found: bool
) -> None:
    summary = summarise(record())[0]
    held = None if interval is None else Interval(*interval)
    advantage = dataclasses.replace(summary.advantage, value=value, interval=held)
    assert answer_found(dataclasses.replace(summary, advantage=advantage), answer) is found
