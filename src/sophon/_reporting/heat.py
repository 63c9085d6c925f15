"""Heat maps: the best score of each attack at each learning rate. No torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from sophon._attacks.kinds import without_rate
from sophon._judgement.parts import SUBJECTS, trials_of
from sophon._judgement.statistics import best_of
from sophon._records.audit_record import AuditRecord
from sophon._records.metrics import MetricKind
from sophon._reporting.rendering import Table, table


class HeatMap(NamedTuple):
    """Best validation scores on one subject by attack (rows) and learning rate (columns).

    None is what was not tried, `low` to `high` the range over all subjects of the domain.
    """

    subject: str
    rates: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    low: float
    high: float
    kind: MetricKind

    def shade(self, value: float) -> float:
        """Return where `value` lies in the range, 0 to 1."""
        return (value - self.low) / max(self.high - self.low, 1e-9)

    def table(self) -> Table:
        """Return the map in its kind's unit."""
        rows = [
            (name, *("" if v is None else self.kind.cell(v) for v in values))
            for name, values in self.rows
        ]
        return table((f"{self.subject}, {self.kind.unit} by rate", *self.rates), rows)


def heat_maps(record: AuditRecord, domain: str) -> list[HeatMap]:
    """Return a heat map of each subject.

    Rates are gathered in half decades; schedules, batch sizes and the like are maximised over.
    """
    trials = [trial for trial in trials_of(record, domain) if trial.curve]
    if not trials:
        return []
    values, kind = [best_of(trial) for trial in trials], record.kind
    found = [_half_decade(trial.strategy.learning_rate) for trial in trials]
    columns = range(min(found), max(found) + 1)
    maps = []
    for subject in SUBJECTS:
        cells: dict[str, dict[int, float]] = {}
        for trial in trials:
            if trial.subject == subject:
                row = cells.setdefault(without_rate(trial.strategy), {})
                at = _half_decade(trial.strategy.learning_rate)
                row[at] = max(row.get(at, -math.inf), best_of(trial))
        rows = tuple((n, tuple(row.get(c) for c in columns)) for n, row in sorted(cells.items()))
        if rows:
            rates = tuple(_rate(column) for column in columns)
            maps.append(HeatMap(subject, rates, rows, min(values), max(values), kind))
    return maps


def _half_decade(rate: float) -> int:
    return round(2 * math.log10(rate))


def _rate(column: int) -> str:
    digit = "1" if column % 2 == 0 else "3"
    power = column // 2
    return f"{digit}e{power}" if power < -3 or power > 2 else f"{float(digit) * 10.0**power:g}"
