"""Benchmarks run: at sizes whose numbers mean nothing, but whose table is whole."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Parts, and how many rows each has.
PARTS = {
    "start": 3,
    "floor, ResNet-20": 2,
    "floor, U-Net": 1,
    "retained graphs": 4,
    "precision": 2,
    "denormals": 4,
    "input": 5,
    "stacking": 2,
    "growth": 6,
}
# Rows that are there only where there is something to time.
MORE = {"denormals": 4}


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
    assert PARTS[part] <= len(rows) <= PARTS[part] + MORE.get(part, 0)
    assert "not measured" not in run.stdout
    if part == "retained graphs":
        assert next(row for row in rows if "float64" in row).endswith("| met |")


@pytest.mark.slow
def test_ray_that_is_absent_is_a_row_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "ray", None)
    run = importlib.import_module("run")
    rows = run.of_ranks(True)
    assert [(row.bar, row.n) for row in rows] == [
        ("", 2), ("", 2), ("at least 1.7x", 2),
        ("", 2), ("", 2), ("at least 1.8x", 2), ("at least 1.8x", 0),
    ]  # fmt: skip
    *_, shown = run.show(rows)
    assert "| at least 1.8x | not measured |" in shown
    assert "not measured: ray cannot be imported" in run.notes(rows)[-1]


def test_a_part_that_fails_is_named_and_takes_no_other_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run = importlib.import_module("run")

    def failing(short: bool) -> list[object]:
        raise ValueError if short else ValueError("no\nroom")

    monkeypatch.setattr(run, "PARTS", {"a": failing, "b": lambda short: ["row"]})
    assert run.measured(True, ["a", "b"]) == (["row"], {"a": "ValueError"})
    assert run.measured(False, ["a", "b"]) == (["row"], {"a": "ValueError: no"})


def test_repeats_are_not_paired_by_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    growth = importlib.import_module("growth")
    taken = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(growth, "seconds", lambda action: next(taken))
    assert growth.timed_round([None] * 5, 3) == (3.0, 1.0, 2.0)


def test_activations_are_what_another_image_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "passed", lambda model, batch: (5.0, 100 + 7 * batch))
    found = scaling.counted("small_convnet")
    assert (found.forward, found.kept, found.kept_once) == (5.0, 7, 100)


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


def test_a_slow_machine_measures_less_often(
    timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "seconds", lambda action: 4.0)

    def pairs(within: float) -> int:
        found = timing.side_by_side(list, list, 5, list, within)  # type: ignore[attr-defined]
        return len(found)

    assert [pairs(within) for within in (1.0, 15.0, 16.0, 39.0, 40.0, 99.0)] == [1, 1, 2, 4, 5, 5]


def test_a_round_and_its_bare_passes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    floor = importlib.import_module("floor")
    order: list[str] = []

    class Feed:
        def batch(self, step: int) -> int:
            return step

    def action() -> None:
        feed, other = Feed(), Feed()
        other.batch(floor.PIECE)
        for step in range(12):
            order.append(f"a{feed.batch(step)}")
            other.batch(step)

    def bare() -> Iterator[None]:
        for step in range(12):
            if step and step % floor.PIECE == 0:
                yield
            order.append(f"b{step}")

    monkeypatch.setattr(floor, "Feed", Feed)
    first: list[object] = []

    def counts(feed: Feed) -> bool:
        first.append(feed)
        # The feed met first is not the attacker's.
        return feed is not first[0]

    pairs = floor.in_turn(action, bare(), of=counts)
    pieces = [range(5), range(5, 10), range(10, 12)]
    assert order == [f"{who}{step}" for piece in pieces for who in "ab" for step in piece]
    assert len(pairs) == 3


def test_what_a_batch_costs_is_told_from_what_an_image_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("architectures")
    sizes = []

    def seconds(model: object, name: str, batch: int, steps: int, reinforced: int) -> float:
        del model, name
        sizes.append((batch, reinforced))
        return 2 * steps * (0.5 + 0.01 * batch) + reinforced * (2.0 + 0.1 * batch)

    monkeypatch.setattr(script, "seconds_of", seconds)
    row = script.measure("small_convnet", (2, 8), 3)
    assert sizes == [(2, 0), (8, 0), (2, 1), (8, 1)]
    assert "| 3 | 0.500 s | 0.0100 s | 2.000 s | 0.1000 s |" in row
    minutes = (100 * (0.5 + 0.01 * 150) + 2.0 + 0.1 * 150) / 60
    assert row.endswith(f"| {minutes:.1f} min |")
    assert row.count("|") == script.HEADER.splitlines()[0].count("|")
    shapes = [script.noise("a", 0, 2, size).image_shape for size in (script.ORIGINAL, 32)]
    assert shapes == [(3, 224, 224), (3, script.RESTRICTED, script.RESTRICTED)]
