"""Tables of published and re-measured numbers, filled from stored records. No torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophon._attacks.suites import strategies_of
from sophon._base.errors import CheckpointError
from sophon._cli.run_spec import RunSpec
from sophon._grid import (
    CELLS,
    PUBLISHED_ROBUSTNESS,
    ROBUSTNESS,
    Cell,
    Published,
    Scale,
    published_of,
    robustness,
    run_file,
)
from sophon._judgement.verdict import overall, summarise
from sophon._records.audit_record import AuditRecord, Trial
from sophon._records.metrics import MetricKind, kind_of_record
from sophon._reporting.tables import removed_text
from sophon._sameness import base_folder, changes_of
from sophon._specs import AuditSpec, Strategy, Subject, parse_spec

SUBJECTS: tuple[Subject, ...] = ("scratch", "unprotected", "protected")
Triple = tuple[float | None, ...]
# What stands for a cell that never ran, or a number nobody published.
EMPTY = ""


@dataclass(frozen=True)
class Measured:
    """What an audit says of its first restricted domain, on the test split, in [0, 1].

    `rehearsed` and `worst` hold scratch, unprotected and protected: after the attack that
    protection rehearsed, and after each subject's best attack. `removed` says how much of the
    advantage is gone, or why nobody knows. `seeds` counts attack seeds, `found`
    those of which the rehearsed attack has a score of each subject: others crashed or diverged.
    `changes` names what was not run as the cell says, `origin` where the numbers come from.
    """

    kind: MetricKind
    before: float | None
    after: float | None
    rehearsed: Triple
    worst: Triple
    removed: str
    verdict: str
    seeds: int
    found: int
    origin: str
    changes: tuple[str, ...] = ()


def record_file(out: Path, cell: Cell) -> Path:
    """Return where `sophon reproduce --out` keeps the record of a cell."""
    return out / cell.scale / cell.name / "audit" / "record.json"


def failure_file(folder: Path) -> Path:
    """Return where the reason is kept for which what runs in `folder` could not be finished."""
    return folder / "failed.txt"


def failure_of(folder: Path) -> str | None:
    """Return why what runs in `folder` could not be finished, fit for a table; None: nothing says
    so.
    """
    file = failure_file(folder)
    if not file.is_file():
        return None
    reason = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    return f"failed: {reason}".replace("|", "\\|")


def started(folder: Path) -> bool:
    """Return whether a base, a protection or an audit was started in a folder."""
    found = ("run.json", "protected/run.json", "audit/record.json")
    return any((folder / name).is_file() for name in found)


def missing_of(folder: Path) -> str | None:
    """Return what stands for the numbers of what runs in `folder` and has no record: why it failed,
    or that it is unfinished; None where nothing was begun.
    """
    return failure_of(folder) or ("unfinished" if started(folder) else None)


def read_measured(out: Path, cell: Cell) -> Measured | None:
    """Return what a cell's stored record below `out` says, None where there is none.

    Raises CheckpointError for a damaged one.
    """
    record = read_stored(record_file(out, cell))
    return None if record is None else measured(record, cell, base_folder(out, cell))


def read_stored(file: Path) -> AuditRecord | None:
    """Return the record in `file`, None where there is none; raises as `read_measured`."""
    if not file.is_file():
        return None
    try:
        return AuditRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{file} is not a whole audit record of this version: repeat the audit"
        ) from None


def measured(record: AuditRecord, cell: Cell, base: Path | None = None) -> Measured:
    """Return the numbers of a record's first restricted domain, and how it differs from `cell`,
    whose model of the original task is in `base`.
    """
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
        removed=removed_text(first.advantage),
        verdict=overall(summaries).text,
        seeds=len(record.seeds),
        found=len(record.seeds) if attack is None else min(seeds_of(record, attack)),
        origin=origin_of(record),
        changes=changes_of(record, cell, base),
    )


def rehearsed_attack(record: AuditRecord) -> Strategy | None:
    """Return the attack of the record that protection rehearsed: the same but for its steps."""
    held: Any = record.protection
    for key in ("spec", "rehearsal", "fixed"):
        held = held.get(key) if isinstance(held, dict) else None
    try:
        wanted = Strategy.model_validate(held, strict=False)
    except ValidationError:
        # Nothing is stated, or nothing that can be read.
        return None
    return next((s for s in record.strategies if _alike(s, wanted)), None)


def _alike(one: Strategy, other: Strategy) -> bool:
    return one == other.model_copy(update={"steps": one.steps})


def scores_of(record: AuditRecord, attack: Strategy) -> Triple:
    """Return the mean test score over seeds after an attack on each subject, None if not run.

    It is of the record's first restricted domain, at the step that validation chose.
    """
    found = [_scores(record, attack, subject) for subject in SUBJECTS]
    return tuple(sum(values) / len(values) if values else None for values in found)


def seeds_of(record: AuditRecord, attack: Strategy) -> tuple[int, ...]:
    """Return over how many attack seeds each of `scores_of` is a mean."""
    return tuple(len(_scores(record, attack, subject)) for subject in SUBJECTS)


def _scores(record: AuditRecord, attack: Strategy, subject: Subject) -> list[float]:
    domain = record.restricted[0].name
    trials = [t for t in record.trials if t.subject == subject and t.domain == domain]
    return [t.test.value for t in trials if _of(t, attack) and t.test is not None]


def _of(trial: Trial, attack: Strategy) -> bool:
    return trial.strategy == attack


def origin_of(record: AuditRecord) -> str:
    """Return where a record's numbers come from: date, command, machine."""
    where = record.environment
    return (
        f"{record.created[:10]}, `{record.command}`; {where.processor}, {where.place},"
        f" {where.precision}, {where.threads} thread{'' if where.threads == 1 else 's'}, torch"
        f" {where.versions.get('torch', '?')}"
    )


# --- Tables ------------------------------------------------------------------------------------

HEADER = (
    "| cell | published at paper size: original, before and after"
    " | published at paper size: scratch / unprotected / protected"
    " | re-measured: original, before and after"
    " | re-measured, rehearsed rate: scratch / unprotected / protected"
    " | re-measured, worst case: scratch / unprotected / protected"
    " | advantage removed (95 %) | attack seeds | verdict |"
)


def table(out: Path, scale: Scale, only: Cell | None = None) -> str:
    """Return the Markdown table of all cells of a scale, or of `only` one, from the records below
    `out`, and where the published numbers come from. A record that cannot be read marks its own
    row.
    """
    cells = [cell for cell in CELLS if cell.scale == scale] if only is None else [only]
    notes = _notes(cells)
    rows = [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    origins: list[str] = []
    for cell in cells:
        try:
            held = read_measured(out, cell)
        except CheckpointError as error:
            rows.append(row(cell, None, notes, verdict=f"unreadable: {error}"))
        else:
            missing = missing_of(record_file(out, cell).parent.parent) if held is None else None
            rows.append(row(cell, held, notes, verdict=missing or EMPTY))
            origins += [] if held is None else [f"- {cell.name}: {held.origin}"]
    said = ["", *(f"[{number}] {text}" for text, number in notes.items())] if notes else []
    measured_by = ["", "Re-measured:", "", *origins] if origins else []
    return "\n".join([*rows, *said, *measured_by])


def state(out: Path, cell: Cell) -> str:
    """Return what `--list` says of a cell: measured, changed, unreadable, not run, unfinished, or
    why it failed.
    """
    try:
        record = read_stored(record_file(out, cell))
        if record is None:
            return missing_of(record_file(out, cell).parent.parent) or "not run"
        return "changed" if changes_of(record, cell, base_folder(out, cell)) else "measured"
    except CheckpointError:
        return "unreadable"


def _notes(cells: list[Cell]) -> dict[str, int]:
    """Return the footnotes of the published numbers, numbered from 1."""
    said = [published_of(cell) for cell in cells]
    texts = dict.fromkeys(_note(one) for one in said if one.source)
    return {text: number for number, text in enumerate(texts, start=1)}


def _note(said: Published) -> str:
    return f"{said.source}; {said.note}" if said.note else said.source


def row(cell: Cell, held: Measured | None, notes: dict[str, int], verdict: str = EMPTY) -> str:
    """Return a cell's row; what was not published or not run stays empty.

    `notes` numbers the sources; `verdict` stands where there are no numbers.
    """
    # Beside a small cell the paper's own numbers say what was seen at its size.
    said = published_of(cell)
    mark = f" [{notes[_note(said)]}]" if said.source else ""
    published = (_pair(_numbers(said.before, said.after)), _triple(_published(said)))
    cells = [cell.name, *(text + mark if text else EMPTY for text in published)]
    if held is None:
        cells += [EMPTY] * 5 + [verdict]
    else:
        own = [EMPTY if v is None else held.kind.show(v, 1) for v in (held.before, held.after)]
        cells += [
            _pair(own),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.rehearsed]),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.worst]),
            held.removed,
            str(held.seeds) if held.found == held.seeds else f"{held.found} of {held.seeds}",
            f"changed: {', '.join(held.changes)}" if held.changes else held.verdict,
        ]
    return "| " + " | ".join(cells) + " |"


def _numbers(*values: float | None) -> list[str]:
    return [EMPTY if value is None else str(value) for value in values]


def _published(said: Published) -> list[str]:
    return _numbers(said.scratch, said.unprotected, said.protected)


def _text(kind: MetricKind, value: float) -> str:
    return kind.show(value, 1).removesuffix(" %")


def _pair(values: list[str]) -> str:
    return ", ".join(value or "?" for value in values) if any(values) else EMPTY


def _triple(values: list[str]) -> str:
    return " / ".join(value or "?" for value in values) if any(values) else EMPTY


# --- Robustness --------------------------------------------------------------------------------


# What the tables add to the cell's attacks.
_EXTRA = "audit.extra"


def robustness_file(cell: Cell, recipe: str, bases: str) -> str:
    """Return the run file that attacks a cell's protected model with the robustness tables'
    attacks; see `run_file`.
    """
    spec = parse_spec(RunSpec, tomllib.loads(run_file(cell, recipe, bases)), where=cell.name)
    return run_file(cell, recipe, bases, robustness_attacks(spec.audit))


def robustness_attacks(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the robustness tables that the specification does not have yet."""
    held = set(strategies_of(spec))
    wanted = [s for rows in _tables(spec).values() for s in rows.values()]
    return tuple(s for s in dict.fromkeys(wanted) if s not in held)


def _tables(spec: AuditSpec) -> dict[str, dict[str, Strategy]]:
    return robustness(spec.steps, spec.batch_size)


def robustness_folder(out: Path, cell: Cell) -> Path:
    """Return where `sophon reproduce --out` keeps the robustness of a cell's protected model."""
    return out / cell.scale / f"{cell.name}-{ROBUSTNESS}"


def stored_robustness(out: Path, cell: Cell) -> str:
    """Return the robustness tables of a cell from its stored record below `out`, or a line that
    says why there are none.
    """
    folder = robustness_folder(out, cell)
    try:
        record = read_stored(folder / "audit" / "record.json")
        if record is not None:
            return robustness_tables(record, cell, base_folder(out, cell))
        why = missing_of(folder) or "not run"
    except CheckpointError as error:
        why = f"unreadable: {error}"
    return f"{cell.name}, {cell.scale}: {ROBUSTNESS}: {why}"


def robustness_tables(record: AuditRecord, cell: Cell, base: Path | None = None) -> str:
    """Return the three robustness tables of a cell's record as Markdown: test score after each
    attack.

    Above them stands what they are of and what was run otherwise than the cell, whose model of the
    original task is in `base`; below them the steps, the seeds, where the numbers come from and
    what is published of the architecture.
    """
    kind, parts = kind_of_record(record), [f"### {cell.name}, {cell.scale}: robustness"]
    changes = [key for key in changes_of(record, cell, base) if not key.startswith(_EXTRA)]
    if changes:
        parts.append(f"**Not the cell of that name**, changed: {', '.join(changes)}.")
    seeds = len(record.seeds)
    for title, rows in _tables(record.spec).items():
        lines = [f"| {title} | scratch | unprotected | protected |", "|---|---|---|---|"]
        for name, attack in rows.items():
            counted = zip(scores_of(record, attack), seeds_of(record, attack), strict=True)
            shown = [
                EMPTY
                if v is None
                else kind.show(v, 1) + (f" ({count} of {seeds} seeds)" if count < seeds else "")
                for v, count in counted
            ]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    parts.append(
        f"{record.spec.steps:,} steps an attack; test scores at the step that validation chose,"
        f" mean over attack seeds {', '.join(map(str, record.seeds))}."
    )
    parts.append(f"Measured: {origin_of(record)}.")
    if cell.architecture in PUBLISHED_ROBUSTNESS:
        parts.append(PUBLISHED_ROBUSTNESS[cell.architecture])
    return "\n\n".join(parts) + "\n"
