"""Tables of published and re-measured numbers, filled from stored records. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophon._attacks import strategies_of
from sophon._errors import CheckpointError
from sophon._grid import (
    CELLS,
    PUBLISHED_ROBUSTNESS,
    Cell,
    Published,
    Scale,
    published_of,
    robustness,
)
from sophon._metric_kinds import MetricKind, kind_of_record
from sophon._records import AuditRecord, Trial
from sophon._specs import AuditSpec, Strategy, Subject
from sophon._verdict import overall, summarise

SUBJECTS: tuple[Subject, ...] = ("scratch", "unprotected", "protected")
Triple = tuple[float | None, ...]
# What stands for a cell that never ran, or a number nobody published.
EMPTY = ""


@dataclass(frozen=True)
class Measured:
    """What an audit says of its first restricted domain, on the test split, in [0, 1].

    `rehearsed` and `worst` hold scratch, unprotected and protected: after the attack that
    protection rehearsed, and after each subject's best attack. `seeds` counts attack seeds.
    """

    kind: MetricKind
    before: float | None
    after: float | None
    rehearsed: Triple
    worst: Triple
    verdict: str
    seeds: int


def record_file(out: Path, cell: Cell) -> Path:
    """Return where `sophon reproduce --out` keeps the record of a cell."""
    return out / cell.scale / cell.name / "audit" / "record.json"


def read_measured(file: Path) -> Measured | None:
    """Return what a stored record says, None where there is none.

    Raises CheckpointError for a damaged one.
    """
    record = read_stored(file)
    return None if record is None else measured(record)


def read_stored(file: Path) -> AuditRecord | None:
    """Return the record in `file`, None where there is none; raises as `read_measured`."""
    if not file.is_file():
        return None
    try:
        return AuditRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{file} is not a whole audit record: delete it and repeat `sophon reproduce`"
        ) from None


def measured(record: AuditRecord) -> Measured:
    """Return the numbers of a record's first restricted domain."""
    summaries = summarise(record)
    first = summaries[0]
    scores = {subject.name: subject.original for subject in record.subjects}
    own, kept = scores.get("unprotected"), scores.get("protected")
    worst = [first.subjects.get(name) for name in SUBJECTS]
    attack = rehearsed_attack(record)
    return Measured(
        kind=kind_of_record(record),
        before=None if own is None else own.value,
        after=None if kept is None else kept.value,
        rehearsed=(None,) * 3 if attack is None else scores_of(record, attack),
        worst=tuple(s.test.value if s is not None and s.test is not None else None for s in worst),
        verdict=overall(summaries).text,
        seeds=len(record.seeds),
    )


def rehearsed_attack(record: AuditRecord) -> Strategy | None:
    """Return the attack of the record that protection rehearsed: the same but for its steps."""
    spec: Any = (record.protection or {}).get("spec") or {}
    fixed = (spec.get("rehearsal") or {}).get("fixed")
    if not fixed:
        return None
    wanted = Strategy.model_validate(fixed, strict=False)
    return next((s for s in record.strategies if _alike(s, wanted)), None)


def _alike(one: Strategy, other: Strategy) -> bool:
    return one == other.model_copy(update={"steps": one.steps})


def scores_of(record: AuditRecord, attack: Strategy) -> Triple:
    """Return the mean test score over seeds after an attack on each subject, None if not run.

    It is of the record's first restricted domain, at the step that validation chose.
    """
    domain = record.restricted[0].name
    found: list[float | None] = []
    for subject in SUBJECTS:
        trials = [t for t in record.trials if t.subject == subject and t.domain == domain]
        values = [t.test.value for t in trials if _of(t, attack) and t.test is not None]
        found.append(sum(values) / len(values) if values else None)
    return tuple(found)


def _of(trial: Trial, attack: Strategy) -> bool:
    return trial.strategy == attack


# --- Tables ------------------------------------------------------------------------------------

HEADER = (
    "| cell | published at paper size: original, before and after"
    " | published at paper size: scratch / unprotected / protected"
    " | original, before and after | rehearsed rate: scratch / unprotected / protected"
    " | worst case: scratch / unprotected / protected | attack seeds | verdict |"
)


def table(out: Path, scale: Scale) -> str:
    """Return the Markdown table of all cells of a scale, from the records below `out`."""
    rows = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for cell in CELLS:
        if cell.scale == scale:
            rows.append(row(cell, read_measured(record_file(out, cell))))
    return "\n".join(rows)


def row(cell: Cell, held: Measured | None) -> str:
    """Return a cell's row; what was not published or not run stays empty."""
    # Beside a small cell the paper's own numbers say what was seen at its size.
    said = published_of(cell)
    cells = [cell.name, _pair(_numbers(said.before, said.after)), _triple(_published(said))]
    if held is None:
        cells += [EMPTY] * 5
    else:
        own = [EMPTY if v is None else held.kind.show(v, 1) for v in (held.before, held.after)]
        cells += [
            _pair(own),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.rehearsed]),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.worst]),
            str(held.seeds),
            held.verdict,
        ]
    return "| " + " | ".join(cells) + " |"


def _numbers(*values: float | None) -> list[str]:
    return [EMPTY if value is None else f"{value:g}" for value in values]


def _published(said: Published) -> list[str]:
    return _numbers(said.scratch, said.unprotected, said.protected)


def _text(kind: MetricKind, value: float) -> str:
    return kind.show(value, 1).removesuffix(" %")


def _pair(values: list[str]) -> str:
    return ", ".join(value or "?" for value in values) if any(values) else EMPTY


def _triple(values: list[str]) -> str:
    return " / ".join(value or "?" for value in values) if any(values) else EMPTY


# --- Robustness --------------------------------------------------------------------------------


def robustness_attacks(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the robustness tables that the specification does not have yet."""
    held = set(strategies_of(spec))
    wanted = [s for rows in robustness(spec.steps).values() for s in rows.values()]
    return tuple(s for s in dict.fromkeys(wanted) if s not in held)


def robustness_tables(record: AuditRecord, architecture: str) -> str:
    """Return the three robustness tables of a record as Markdown: test score after each attack."""
    kind, parts = kind_of_record(record), []
    for title, rows in robustness(record.spec.steps).items():
        lines = [
            f"| {title} | scratch | unprotected | protected | published protected |",
            "|---|---|---|---|---|",
        ]
        for name, attack in rows.items():
            shown = [EMPTY if v is None else kind.show(v, 1) for v in scores_of(record, attack)]
            said = PUBLISHED_ROBUSTNESS.get((architecture, attack.optimizer))
            direct = title == "method and optimizer" and not attack.preparations
            value = said.protected if said is not None and direct else None
            lines.append(f"| {name} | {' | '.join(shown)} | {_numbers(value)[0]} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
