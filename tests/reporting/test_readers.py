"""What a checkpoint states that readers found: shown beside the verdict, never part of it."""

from __future__ import annotations

from typing import Any

import pytest

from records import record
from sophon._reporting.report import report

FOUND = {
    "depths": ["stem", "layer1", "<b>last</b>"],
    "fresh": [0.1, 0.12, 0.05],
    "given": [0.2, 0.45, 0.5],
    "protected": [0.11, 0.14, -3.5],
}


def _report(readers: Any) -> Any:
    held = record()
    name = held.restricted[0].name
    return report(held.model_copy(update={"protection": {"readers": {name: readers}}}))


def test_depth_against_r2_is_shown_before_and_after() -> None:
    made = _report(FOUND)
    page, text = made.html(), made.markdown()
    assert "What readers find by depth" in page
    assert "What readers find by depth" in text
    assert "| layer1 | 0.45 | 0.14 | 0.12 |" in text
    lines = text.splitlines()
    assert all(not lines[i - 1] for i, line in enumerate(lines) if line.startswith("###"))
    assert "R2 of the best reader on" in page
    assert "<b>last</b>" not in page


def test_what_readers_found_decides_nothing() -> None:
    worse = {**FOUND, "protected": [0.9, 0.9, 0.9]}
    assert str(_report(FOUND).verdict) == str(_report(worse).verdict)


@pytest.mark.parametrize(
    "readers",
    [
        {},
        {**FOUND, "given": [0.1]},
        {**FOUND, "depths": [], "fresh": [], "given": [], "protected": []},
        {**FOUND, "fresh": ["a", 0.1, 0.2]},
    ],
)
def test_a_statement_that_cannot_be_read_is_none(readers: Any) -> None:
    assert "What readers find" not in _report(readers).html()
