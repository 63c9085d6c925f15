"""The audit is audited: it finds the two controls whose answer is a number.

The decoys are in `test_controls.py`: test files run side by side.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from controls import real_controls
from sophon._controls import ControlResult

KNOWN = ("the unprotected model", "a fresh network")


@pytest.fixture(scope="module")
def results(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ControlResult]:
    """Return both answers."""
    run = real_controls(shared_data, tmp_path_factory.mktemp("controls"))
    return {result.name: result for result in run.known()}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_the_answer_is_found(name: str, results: dict[str, ControlResult]) -> None:
    result = results[name]
    assert set(results) == set(KNOWN)
    assert result.passed, (result.summary.verdict, result.summary.advantage, result.flags)
