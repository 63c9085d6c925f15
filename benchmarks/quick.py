"""How close the quick suite comes to all attacks of the stored records, and which few would.

    python benchmarks/quick.py [--choose N]

For every subject and refused domain of the records of `standard-1`, and of those named `withstand`
that met more than `quick-2`: the mean over the logarithm of the steps, from 5 on, of how far the
best of the suite's attacks is below the best of all, in points of validation accuracy (means over
seeds). `--choose N` picks N attacks greedily by the mean gap and half the largest: what `quick-2`
was made from.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sophon._attacks.suites import anew_attacks, strategies_of
from sophon._cli.reading import read_record
from sophon._records.audit_record import AuditRecord
from sophon._specs import AuditSpec, Strategy

RECORDS = Path(__file__).parents[1] / "docs/results/records"
FIRST = 5
Scores = dict[Strategy, dict[int, float]]
Cell = tuple[str, NDArray[np.int64], dict[Strategy, NDArray[np.float64]]]


def scores(record: AuditRecord, subject: str, domain: str) -> Scores:
    """Return the mean validation accuracy by attack and step, in percent."""
    held: dict[Strategy, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in record.trials:
        if (trial.subject, trial.domain) == (subject, domain):
            for point in trial.curve:
                held[trial.strategy][point.step].append(100 * point.validation.value)
    return {s: {k: float(np.mean(v)) for k, v in found.items()} for s, found in held.items()}


def so_far(curve: dict[int, float], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the best score up to each step; 0 before the first."""
    return np.array(
        [max([v for k, v in curve.items() if k <= step], default=0.0) for step in steps]
    )


def cells() -> list[Cell]:
    """Return every subject's curves on every refused domain of the records."""
    found: list[Cell] = []
    for path in sorted(RECORDS.glob("*.json.gz")):
        record = read_record(path)
        whole = record.spec.suite == "standard-1"
        if not whole and (record.spec.suite == "quick-2" or not path.name.startswith("withstand")):
            continue
        for domain in record.restricted:
            for subject in ("protected", "unprotected", "scratch"):
                held = scores(record, subject, domain.name)
                steps = np.array(sorted({k for c in held.values() for k in c if k >= FIRST}))
                name = f"{path.name.removesuffix('.json.gz')}, {subject}, {domain.name}"
                found.append((name, steps, {s: so_far(c, steps) for s, c in held.items()}))
    return found


def gap(cell: Cell, chosen: list[Strategy]) -> float:
    """Return how far the best of the chosen attacks is below the best of all."""
    _, steps, curves = cell
    mine = [curves[strategy] for strategy in chosen if strategy in curves]
    best = np.max(list(curves.values()), axis=0)
    held = np.max(mine, axis=0) if mine else np.zeros_like(best)
    return float(np.average(best - held, weights=np.gradient(np.log(steps))))


def suite(cell: Cell, name: str) -> list[Strategy]:
    """Return which of the cell's attacks the suite has, whatever the budget and block count."""

    def shape(strategy: Strategy) -> str:
        return strategy.model_copy(update={"steps": 1}).fingerprint()

    spec = AuditSpec(suite=name)
    wanted = {shape(s) for s in strategies_of(spec)}
    wanted |= {shape(s) for count in range(1, 33) for s in anew_attacks(count, spec)}
    return [strategy for strategy in cell[2] if shape(strategy) in wanted]


def choose(held: list[Cell], count: int) -> None:
    """Print so many attacks, each the best one more, and what they leave."""
    names = sorted({s.label() for cell in held for s in cell[2]})
    chosen: list[str] = []

    def left(labels: list[str]) -> NDArray[np.float64]:
        return np.array([gap(c, [s for s in c[2] if s.label() in labels]) for c in held])

    for _ in range(count):
        tried = {one: left([*chosen, one]) for one in names if one not in chosen}
        best = min(tried, key=lambda one: float(tried[one].mean() + tried[one].max() / 2))
        chosen.append(best)
        print(f"{best}: mean {tried[best].mean():.2f}, most {tried[best].max():.2f}")


def main(arguments: list[str] | None = None) -> None:
    """Print the gaps of both quick suites, or choose."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", type=int, default=0)
    given = parser.parse_args(arguments)
    held = cells()
    if given.choose:
        return choose(held, given.choose)
    print("| record, subject, domain | quick-1 | quick-2 |\n|---|---|---|")
    for cell in held:
        print(f"| {cell[0]} | {' | '.join(f'{gap(cell, suite(cell, q)):.2f}' for q in QUICK)} |")
    return None


QUICK = ("quick-1", "quick-2")

if __name__ == "__main__":
    main()
