"""Benchmarks run: at sizes whose numbers mean nothing, but whose table is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Of the start-up and the growth of reports other tests speak; they take their time even when quick.
PARTS = ("floor, ResNet-20", "retained graphs", "precision", "denormals", "input", "stacking")


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_and_judges(part: str) -> None:
    if part == "retained graphs":
        pytest.importorskip("torchopt", reason="graphs are kept with torchopt: the bench extra")
    run = ran("--quick", "--only", part)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 1
    assert "not measured" not in run.stdout
    if part == "retained graphs":
        assert next(row for row in rows if "float64" in row).endswith("| met |")


def test_quick_numbers_are_not_written() -> None:
    run = ran("--quick", "--write")
    assert run.returncode == 2
    assert "--write needs the whole" in run.stderr


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("timing")


def test_a_row_is_judged_by_its_median(timing: object) -> None:
    row = timing.row  # type: ignore[attr-defined]
    assert row("a", [1.0, 1.2, 9.0], at_most=1.2).met is True
    assert row("a", [1.0, 1.21, 1.3], at_most=1.2).met is False
    assert row("a", [1.0, 1.7, 9.0], at_least=1.7).met is True
    assert row("a", [1.0, 1.6, 9.0], at_least=1.7).met is False
    held = row("a", [3.0, 1.0, 2.0])
    assert (held.met, held.bar, held.measured, held.low, held.high, held.n) == (
        None, "", 2.0, 1.0, 3.0, 3,
    )  # fmt: skip


def test_both_are_run_in_turn_as_often(timing: object) -> None:
    order: list[str] = []
    pairs = timing.side_by_side(  # type: ignore[attr-defined]
        lambda: order.append("a"), lambda: order.append("b"), 2
    )
    assert "".join(order) == "ab" + "ab" + "ba"
    assert len(pairs) == 2
    assert all(first > 0 and second > 0 for first, second in pairs)
