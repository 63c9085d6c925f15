"""Which parts of a record a judgement is about."""

from __future__ import annotations

from typing import get_args

from sophon._records.audit_record import (
    AuditRecord,
    DomainRecord,
    Measurement,
    SubjectRecord,
    Trial,
)
from sophon._specs import Subject

SUBJECTS: tuple[Subject, ...] = get_args(Subject)


def subjects(record: AuditRecord) -> dict[Subject, SubjectRecord]:
    """Return an audit's subjects by their names."""
    return {subject.name: subject for subject in record.subjects}


def originals(record: AuditRecord) -> dict[Subject, Measurement]:
    """Return the test scores on the original task that were measured, by subject."""
    return {s.name: s.original for s in record.subjects if s.original is not None}


def alone(record: AuditRecord) -> bool:
    """Return whether the model before protection was not given."""
    return "unprotected" not in subjects(record)


def domains_of(record: AuditRecord) -> tuple[DomainRecord, ...]:
    """Return every domain of an audit, the original one first."""
    return (record.original, *record.restricted, *record.held_out, *record.benign)


def trials_of(record: AuditRecord, domain: str, subject: str | None = None) -> list[Trial]:
    """Return a domain's trials, of one subject or of all."""
    return [
        trial
        for trial in record.trials
        if trial.domain == domain and subject in (None, trial.subject)
    ]


def measured(trials: list[Trial], subject: Subject) -> list[Trial]:
    """Return those of the trials that measured anything on a subject."""
    return [trial for trial in trials if trial.subject == subject and trial.curve]
