"""Which attack leads where on the stored records, and which of `standard-1` never led.

    python benchmarks/leaders.py

An attack leads where no other is above it within some budget from 5 steps on, by the mean over
seeds on validation images, on any subject and domain of any record in `docs/results/records`. Then:
what the envelope of `standard-1`'s records loses without the attacks that `standard-2` lacks, with
the first of the search's proposals that it would still make, in points as in `quick.py`.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from quick import FIRST, RECORDS, Cell, gap, scores, so_far

from sophon._attacks.suites import SUITES, anew_attacks, depth_attacks, strategies_of
from sophon._cli.reading import read_record
from sophon._specs import AuditSpec, Strategy

OLD, NEW = "standard-1", "standard-2"
SUBJECTS = ("protected", "unprotected", "scratch")


def cells() -> list[Cell]:
    """Return every subject's curves on every domain of every record; names begin with a suite."""
    found: list[Cell] = []
    for path in sorted(RECORDS.rglob("*.json.gz")):
        record = read_record(path)
        for domain in (*record.restricted, *record.held_out, *record.benign):
            for subject in SUBJECTS:
                held = scores(record, subject, domain.name)
                steps = np.array(sorted({k for c in held.values() for k in c if k >= FIRST}))
                name = f"{record.spec.suite}: {path.name.removesuffix('.json.gz')}, {subject}"
                curves = {s: so_far(c, steps) for s, c in held.items()}
                found.append((f"{name}, {domain.name}", steps, curves))
    return found


def leaders(cell: Cell) -> list[Strategy]:
    """Return the attacks that lead within some budget."""
    _, _, curves = cell
    best = np.max(list(curves.values()), axis=0)
    return [s for s, c in curves.items() if bool(((c >= best - 1e-9) & (best > 0)).any())]


@functools.cache
def has(name: str) -> set[str]:
    """Return what a suite attacks with, by fingerprint, whatever the budget and block count."""
    spec, made = AuditSpec(suite=name), list(SUITES[name].strategies)
    for count in range(1, 33):
        made += anew_attacks(count, spec)
        made += depth_attacks(count, spec) if SUITES[name].depth else ()
    return {shape(s) for s in (*made, *strategies_of(spec))}


def shape(strategy: Strategy) -> str:
    """Return what an attack is known by; a domain of 300 images cuts its batch to that."""
    size = 512 if strategy.batch_size == 300 else strategy.batch_size
    return strategy.model_copy(update={"steps": 1, "batch_size": size}).fingerprint()


def left(cell: Cell) -> list[Strategy]:
    """Return those of a cell's attacks that `standard-2` would meet: its own, and proposals."""
    old, new = has(OLD), has(NEW)
    proposed = [s for s in cell[2] if shape(s) not in old]
    # Leaders of the other subjects' searches are met too: as many of each.
    lost = len(SUBJECTS) * (SUITES[OLD].search_trials - SUITES[NEW].search_trials)
    kept = proposed[: max(0, len(proposed) - lost)]
    return [s for s in cell[2] if shape(s) in new] + kept


def main() -> None:
    """Print who led how often, who never did, and the gaps."""
    held = cells()
    led = Counter(shape(s) for cell in held for s in leaders(cell))
    suite = {shape(s): s.label() for s in SUITES[OLD].strategies}
    print(f"| attack of {OLD} | leads on, of {len(held)} subjects and domains |\n|---|---|")
    for key, name in suite.items():
        print(f"| {name} | {led[key]} |")
    dropped = [name for key, name in suite.items() if not led[key]]
    print(f"\nNever: {len(dropped)} of {len(suite)}.")
    print(f"\n| record, subject, domain | points lost by {NEW} |\n|---|---|")
    for cell in held:
        if cell[0].startswith(OLD):
            print(f"| {cell[0]} | {gap(cell, left(cell)):.2f} |")


if __name__ == "__main__":
    main()
