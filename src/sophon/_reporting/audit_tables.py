"""The tables of a report that are of the whole audit: original task, images, trials. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import ValidationError

from sophon._judgement.parts import SUBJECTS, domains_of
from sophon._judgement.statistics import best_of, interval_of
from sophon._records.audit_record import AuditRecord, Measurement, Overlap, Trial
from sophon._records.metrics import NONE, measurement, shown
from sophon._reporting.rendering import Table, by_column, percent, score_text, table
from sophon._specs import shared_fields


def original_table(record: AuditRecord) -> Table:
    """Return what each subject scores on the original domain, reported and measured again."""
    claims = reported(record)
    rows: list[tuple[str, ...]] = []
    for subject in sorted(record.subjects, key=lambda s: SUBJECTS.index(s.name), reverse=True):
        if subject.original is None:
            continue
        claim = claims.get(subject.name)
        row: tuple[str, ...] = (subject.name, score_text(subject.original))
        if claims:
            row = (subject.name, score_text(claim), row[1], _agree(claim, subject.original))
        rows.append(row)
    if not claims:
        noun = record.kind.noun
        return table(("model", f"test {noun} (95 %)"), rows)
    return table(
        ("model", "reported, validation (95 %)", "re-measured, test (95 %)", "agreement"),
        rows,
        "Reported is what the checkpoint says of itself, on the publisher's validation images;"
        " re-measured is what this audit found on test images.",
    )


def reported(record: AuditRecord) -> dict[str, Measurement]:
    """Return the scores on the original domain that the checkpoint claims, by subject."""
    held = record.protection or {}
    found: dict[str, Measurement] = {}
    for name, key in (("unprotected", "validation_before"), ("protected", "validation_after")):
        claim = held.get(key)
        try:
            found[name] = measurement(claim)
        except ValidationError:
            # Whoever publishes a checkpoint may claim anything; what is no score claims nothing.
            continue
    return found


def _agree(claim: Measurement | None, measured: Measurement) -> str:
    if claim is None:
        return NONE
    one, other = interval_of(claim), interval_of(measured)
    if one.low > other.high:
        return "less than reported"
    return "more than reported" if one.high < other.low else "within both intervals"


def claimed_domains(record: AuditRecord) -> str:
    """Return what the checkpoint says it was protected against, if this audit tried others."""
    named = (record.protection or {}).get("restricted")
    if not isinstance(named, list | tuple):
        return ""
    tried = {domain.name for domain in record.restricted}
    stated = [str(name) for name in named]
    if set(stated) == tried:
        return ""
    return (
        f"The checkpoint says it was protected against {', '.join(stated)};"
        f" this audit judges {', '.join(sorted(tried))}."
    )


def overlap_table(record: AuditRecord) -> tuple[str, Table | None]:
    """Return a sentence on images that splits share, and the table of those that share any."""
    if not record.overlaps:
        return "Whether domains share images was not measured.", None
    shared = [o for o in record.overlaps if o.exact + o.near]
    count = len(record.overlaps)
    if not shared:
        return f"None of {count} pairs of splits share an image, exactly or nearly.", None
    shared.sort(key=lambda o: -(o.exact + o.near) / max(1, o.count))
    columns: dict[str, Callable[[Overlap], str]] = {
        "of": lambda o: o.first,
        "also in": lambda o: o.second,
        "images": lambda o: str(o.count),
        "exact": lambda o: str(o.exact),
        "near": lambda o: str(o.near),
        "share": lambda o: percent((o.exact + o.near) / max(1, o.count)),
    }
    return f"{len(shared)} of {count} pairs of splits share images:", by_column(shared, columns)


def trial_table(record: AuditRecord) -> Table:
    """Return every trial."""
    shared, kind = shared_fields(t.strategy for t in record.trials), record.kind
    flops = {domain.name: domain.training_flops for domain in domains_of(record)}
    crashes: dict[str, list[str]] = {}
    for crash in record.earlier_crashes:
        crashes.setdefault(crash.trial, []).append(crash.error)
    columns: dict[str, Callable[[Trial], str]] = {
        "domain": lambda t: t.domain,
        "subject": lambda t: t.subject,
        "attack": lambda t: t.strategy.label(shared),
        "seed": lambda t: str(t.seed),
        "best validation": lambda t: kind.shown(best_of(t)) if t.curve else NONE,
        "at step": lambda t: NONE if t.best_step is None else str(t.best_step),
        "test": lambda t: shown(t.test),
        "outcome": lambda t: _ended(t, crashes.get(t.key, [])),
        "seconds": lambda t: f"{t.wall_s:.1f}",
        "TFLOP, at most": lambda t: _teraflops(t, flops[t.domain]),
    }
    note = (
        "The validation split chooses the step; the test split is measured once there and chooses"
        " nothing."
    )
    if crashes:
        runs = len(record.earlier_crashes)
        note += (
            f" Run again after a crash: {len(crashes)} trials; {runs} crashed"
            f" run{'' if runs == 1 else 's'} in all."
        )
    return by_column(record.trials, columns, note)


def _teraflops(trial: Trial, each: int | None) -> str:
    """Return the cost of a trial's images if all weights were trained: an adapter's or the head's
    steps take less, and measurements are not counted.
    """
    images = max((point.samples for point in trial.curve), default=0)
    return NONE if each is None else f"{images * each / 1e12:.3g}"


def _ended(trial: Trial, crashes: Sequence[str]) -> str:
    """Return how a trial ended, and the errors of its earlier crashes."""
    outcome = trial.outcome
    if outcome.kind == "crashed":
        text = f"crashed: {outcome.error}"
    elif outcome.kind == "completed":
        text = outcome.kind
    else:
        text = f"{outcome.kind} at step {outcome.step}"
    if not crashes:
        return text
    errors = ", ".join(dict.fromkeys(error or "error not known" for error in crashes))
    return f"{text}; crashed {_times(len(crashes))} before: {errors}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
