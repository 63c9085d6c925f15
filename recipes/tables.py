"""Tables of published and re-measured numbers, filled from stored records. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import grid
from grid import Cell, Scale, published_of
from sameness import base_folder, changes_of
from sophon._base.errors import CheckpointError, SpecError
from sophon._judgement.verdict import overall, summarise
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.audit_record import AuditRecord
from sophon._records.metrics import MetricKind
from sophon._reporting.tables import removed_text
from sophon._specs import Strategy, Subject, parse_spec

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


def folder_of(out: Path, cell: Cell) -> Path:
    """Return where a cell is run below `--out`."""
    return out / cell.scale / cell.name


def failure_file(folder: Path) -> Path:
    """Return where the reason is kept for which what runs in `folder` could not be finished."""
    return folder / "failed.txt"


def started(folder: Path) -> bool:
    """Return whether a base, a protection or an audit was started in a folder."""
    found = ("run.json", "protected/run.json", "audit/record.json")
    return any((folder / name).is_file() for name in found)


def missing_of(folder: Path) -> str | None:
    """Return what stands for the numbers of what runs in `folder` and has no record: why it failed,
    or that it is unfinished; None where nothing was begun.
    """
    file = failure_file(folder)
    if not file.is_file():
        return "unfinished" if started(folder) else None
    reason = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    return f"failed: {reason}".replace("|", "\\|")


def read_stored(folder: Path) -> AuditRecord | None:
    """Return the record of the audit of what ran in `folder`, None where there is none.

    Raises CheckpointError for a damaged one.
    """
    file = folder / "audit" / "record.json"
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
        kind=record.kind,
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
    held = held.get("spec") if isinstance(held, dict) else None
    try:
        spec = parse_spec(ProtectSpec, held if isinstance(held, dict) else {}, where="stored")
    except SpecError:
        # What is stated cannot be read.
        return None
    terms = [term for term in spec.hinder or () if isinstance(term, Rehearsal)]
    wanted = next((term.fixed for term in terms if term.fixed is not None), None)
    if wanted is None:
        return None
    same = {"steps": wanted.steps}
    return next((s for s in record.strategies if s.model_copy(update=same) == wanted), None)


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
    wanted = (subject, domain, attack)
    trials = [t for t in record.trials if (t.subject, t.domain, t.strategy) == wanted]
    return [t.test.value for t in trials if t.test is not None]


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
    cells = [cell for cell in grid.CELLS if cell.scale == scale] if only is None else [only]
    sources = [said.footnote for said in map(published_of, cells) if said.source]
    notes = {text: number for number, text in enumerate(dict.fromkeys(sources), start=1)}
    rows = [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    origins: list[str] = []
    for cell in cells:
        folder, held, why = folder_of(out, cell), None, EMPTY
        try:
            record = read_stored(folder)
            if record is None:
                why = missing_of(folder) or EMPTY
            else:
                held = measured(record, cell, base_folder(out, cell))
                origins.append(f"- {cell.name}: {held.origin}")
        except CheckpointError as error:
            why = f"unreadable: {error}"
        rows.append(_row(cell, held, notes, why))
    said = ["", *(f"[{number}] {text}" for text, number in notes.items())] if notes else []
    measured_by = ["", "Re-measured:", "", *origins] if origins else []
    return "\n".join([*rows, *said, *measured_by])


def state(out: Path, cell: Cell) -> str:
    """Return what `--list` says of a cell: measured, changed, unreadable, not run, unfinished, or
    why it failed.
    """
    folder = folder_of(out, cell)
    try:
        record = read_stored(folder)
        if record is None:
            return missing_of(folder) or "not run"
        return "changed" if changes_of(record, cell, base_folder(out, cell)) else "measured"
    except CheckpointError:
        return "unreadable"


def _row(cell: Cell, held: Measured | None, notes: dict[str, int], why: str) -> str:
    """Return a cell's row; what was not published or not run stays empty.

    `notes` numbers the sources; `why` stands in place of the verdict where there are no numbers.
    """
    # Beside a small cell the paper's own numbers say what was seen at its size.
    said = published_of(cell)
    mark = f" [{notes[said.footnote]}]" if said.source else ""
    original = _joined(", ", (said.before, said.after))
    restricted = _joined(" / ", (said.scratch, said.unprotected, said.protected))
    cells = [cell.name, *(text + mark if text else EMPTY for text in (original, restricted))]
    if held is None:
        return "| " + " | ".join([*cells, *[EMPTY] * 5, why]) + " |"
    show = held.kind.show
    cells += [
        _joined(", ", (held.before, held.after), lambda value: show(value, 1)),
        *(
            _joined(" / ", three, lambda value: show(value, 1).removesuffix(" %"))
            for three in (held.rehearsed, held.worst)
        ),
        held.removed,
        str(held.seeds) if held.found == held.seeds else f"{held.found} of {held.seeds}",
        f"changed: {', '.join(held.changes)}" if held.changes else held.verdict,
    ]
    return "| " + " | ".join(cells) + " |"


def _joined(between: str, values: Triple, show: Callable[[float], str] = str) -> str:
    """Return numbers as the text of a cell, a mark for one that is not known; empty without any."""
    if all(value is None for value in values):
        return EMPTY
    return between.join("?" if value is None else show(value) for value in values)
