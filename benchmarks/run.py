"""Every speed benchmark, and one table: bar against measured.

    python benchmarks/run.py             # under 15 minutes on two quiet cores
    python benchmarks/run.py --quick     # only sees that each runs; its numbers mean nothing
    python benchmarks/run.py --write     # also writes it to docs/results/

`--write` makes `speed.md`, its `.json` and `growth.svg` where `auto` is bf16, and where it is not
`speed-without-bf16.md` and its `.json`. What was written by hand between the marks of a page is
kept.

A part that cannot run here (a package is missing, say) is named with the reason; the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import denoising
import denormals
import feeding
import floor
import growth
import precision
import ranks
import retained_graphs
import stacking
import starting
import torch
from timing import Row, notes, row, show

from sophon._training.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# Around what is written by hand.
BEGIN, END = "<!-- remarks -->", "<!-- end of remarks -->"
TITLES = {
    "speed": "# Speed, measured",
    "speed-without-bf16": "# Speed on a processor without bf16",
}
Part = Callable[[bool], list[Row]]


def of_ranks(short: bool) -> list[Row]:
    """Return the rows of several processes, which `ranks.py` measures."""
    return [
        row(held.what, held.values, at_least=held.at_least, unit=held.unit, note=held.note)
        for held in ranks.measured(short)
    ]


PARTS: dict[str, Part] = {
    "start": starting.rows,
    "floor, ResNet-20": functools.partial(floor.rows, names=("ResNet-20",)),
    "floor, ResNet-18": functools.partial(floor.rows, names=("ResNet-18",)),
    "floor, U-Net": denoising.rows,
    "retained graphs": retained_graphs.rows,
    "precision": precision.rows,
    "denormals": denormals.rows,
    "input": feeding.rows,
    "stacking": stacking.rows,
    "growth": growth.rows,
    "processes": of_ranks,
}


def measured(short: bool, chosen: list[str]) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of the chosen parts, and why some could not be measured."""
    found: list[Row] = []
    failed: dict[str, str] = {}
    for name in chosen:
        start = time.perf_counter()
        try:
            found += PARTS[name](short)
        except Exception as error:  # noqa: BLE001 - one part must not take the others' numbers along
            failed[name] = traceback.format_exception_only(error)[0].splitlines()[0]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found, failed


def commit() -> str:
    """Return the short hash of the commit that was measured, marked where files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def circumstances() -> dict[str, Any]:
    """Return where and when it was measured."""
    chosen = precision.protection("ResNet-20", precision.quick(precision.Sizes())).setting
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        **environment(torch.device("cpu"), chosen.precision).model_dump(mode="json"),
    }


def remarks(old: str) -> str:
    """Return what stands between the marks of an older page, both included."""
    if BEGIN not in old or END not in old:
        return f"{BEGIN}\n\n{END}"
    return BEGIN + old.split(BEGIN, 1)[1].split(END, 1)[0] + END


def page(
    rows: list[Row],
    failed: dict[str, str],
    where: dict[str, Any],
    old: str = "",
    name: str = "speed",
) -> str:
    """Return the Markdown page of the results, with the remarks of the `old` one."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    missed = [held.what for held in rows if held.met is False]
    lines = [
        TITLES[name],
        "",
        "Written by `python benchmarks/run.py --write`. Ratios of rounds and trials to other passes"
        " are of two things run in turn in one process; so are the amounts of an exponent. Memory"
        " and several processes are measured in processes of their own, which take turns. Starting"
        " and loading pictures are not in turns.",
        "",
        f"{where['date']}, commit {where['commit']}, {where['processor']}, {where['threads']}"
        f" threads, {where['precision']} where `auto`; {versions}. All of it took"
        f" {where['seconds'] // 60} min {where['seconds'] % 60} s.",
        "",
        *show(rows),
        "",
        f"{sum(held.met is True for held in rows)} bars met, {len(missed)} missed.",
        "",
        remarks(old),
        "",
        *[f"- not measured: {name}: {reason}" for name, reason in failed.items()],
        *notes(rows),
        "",
        *(["![Time against the work, in logarithms](growth.svg)", ""] if name == "speed" else []),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def write(rows: list[Row], failed: dict[str, str], where: dict[str, Any], short: bool) -> Path:
    """Write the page, the numbers behind it and in bf16 the picture of growth; return the page."""
    name = "speed" if where["precision"] == "bf16" else "speed-without-bf16"
    place = RESULTS / f"{name}.md"
    old = place.read_text(encoding="utf-8") if place.exists() else ""
    place.write_text(page(rows, failed, where, old, name), encoding="utf-8")
    curves = [asdict(curve) for curve in growth.curves(short)]
    held = {**where, "rows": [asdict(held) for held in rows], "failed": failed, "growth": curves}
    place.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    if name == "speed":
        growth.draw(growth.curves(short), RESULTS / "growth.svg")
    return place


def main() -> None:
    """Measure, print the table, and write it if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    parser.add_argument("--write", action="store_true", help="write to docs/results/, too")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="one part; repeat it")
    given = parser.parse_args()
    if given.write and (given.quick or given.only):
        parser.error("--write needs the whole, at full size: leave out --quick and --only")
    start = time.perf_counter()
    rows, failed = measured(given.quick, given.only or list(PARTS))
    where = {**circumstances(), "seconds": round(time.perf_counter() - start)}
    print(page(rows, failed, where))
    if given.write:
        print(f"written to {write(rows, failed, where, given.quick)}: bring its remarks up to date")
    else:
        print("nothing is written: --write keeps it in docs/results/")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
