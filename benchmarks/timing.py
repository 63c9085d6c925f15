"""Side-by-side timing: what every speed benchmark shares."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Action = Callable[[], object]
# Seconds for the pairs of one row: the whole table must not take longer than 15 minutes.
WITHIN = 30.0


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, its bar, the median and spread of n repeats.

    `bar` is `at most 1.05` and the like, or empty for a number that has none; `met` is then None.
    Without repeats (n = 0) it was not measured. `note` says what else the reader must know, such as
    the reason why a bar is missed.
    """

    what: str
    bar: str
    measured: float | None
    low: float | None
    high: float | None
    n: int
    met: bool | None = None
    unit: str = ""
    note: str = ""


def row(
    what: str,
    values: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    unit: str = "",
    note: str = "",
) -> Row:
    """Return the row of `values`: their median against a bar, if there is one.

    Without values it is a row that was not measured; `note` should say why.
    """
    bar = ""
    if at_most is not None:
        bar = f"at most {at_most:g}{unit}"
    elif at_least is not None:
        bar = f"at least {at_least:g}{unit}"
    if not values:
        return Row(what, bar, None, None, None, 0, None, unit, note)
    middle, met = statistics.median(values), None
    if at_most is not None:
        met = middle <= at_most
    elif at_least is not None:
        met = middle >= at_least
    return Row(what, bar, middle, min(values), max(values), len(values), met, unit, note)


def seconds(action: Action) -> float:
    """Return how long `action` takes."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def side_by_side(
    first: Action,
    second: Action,
    repeats: int,
    warm: Action | None = None,
    within: float = WITHIN,
) -> list[tuple[float, float]]:
    """Return the seconds of both, `repeats` times, in turn; each pair begins with the other one.

    Before, unmeasured, `warm` runs where it is given, less of the same work, otherwise both do.
    There are fewer pairs, but at least one, where another of the same length would end after
    `within` seconds: a slow machine measures less often, and n says so.
    """
    if warm is None:
        first()
        second()
    else:
        warm()
    pairs: list[tuple[float, float]] = []
    for repeat in range(repeats):
        taken = sum(map(sum, pairs))
        if pairs and taken + taken / len(pairs) > within:
            break
        if repeat % 2:
            after = seconds(second)
            pairs.append((seconds(first), after))
        else:
            before = seconds(first)
            pairs.append((before, seconds(second)))
    return pairs


def ratios(
    first: Action,
    second: Action,
    repeats: int,
    warm: Action | None = None,
    within: float = WITHIN,
) -> list[float]:
    """Return how many times as long as `second` the `first` takes, pair by pair."""
    return [one / other for one, other in side_by_side(first, second, repeats, warm, within)]


def show(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table of the rows."""
    lines = ["| measured | bar | median | least to most | n | |", "|---|---|---|---|---|---|"]
    for held in rows:
        met = {True: "met", False: "**missed**", None: ""}[held.met]
        middle, spread = "not measured", ""
        if held.measured is not None:
            middle = f"{held.measured:.3g}{held.unit}"
            spread = f"{held.low:.3g} to {held.high:.3g}"
        cells = (held.what, held.bar, middle, spread, str(held.n), met)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def notes(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that has a note."""
    return [f"- {held.what}: {held.note}" for held in rows if held.note]


def alone(rows: Callable[[bool], list[Row]]) -> None:
    """Run one benchmark by itself: `--quick` takes seconds, and its numbers mean nothing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    found = rows(parser.parse_args().quick)
    print("\n".join([*show(found), *notes(found)]))
