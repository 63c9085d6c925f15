"""What a red flag is, and which trials it is about. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sophon._records.audit_record import AuditRecord, Measurement, SubjectRecord, Trial
from sophon._specs import Subject

# Verdicts that speak for a model.
GOOD = frozenset({"withstood", "slowed"})
WITHSTOOD = frozenset({"withstood"})


class Flag(NamedTuple):
    """A reason for doubt: what raised it, why it matters, what to do.

    `voids` forbids any verdict, `forbids` names those that it alone cannot be given; a conviction
    stands. `alone` says that what voids happened to the protected model and to no other subject.
    """

    name: str
    raised_if: str
    explanation: str
    remedy: str
    detail: str
    voids: bool = False
    forbids: frozenset[str] = frozenset()
    alone: bool = False


Check = Callable[[AuditRecord, str], Flag | None]


def subjects(record: AuditRecord) -> dict[Subject, SubjectRecord]:
    """Return an audit's subjects by their names."""
    return {subject.name: subject for subject in record.subjects}


def originals(record: AuditRecord) -> dict[Subject, Measurement]:
    """Return the test scores on the original task that were measured, by subject."""
    return {s.name: s.original for s in record.subjects if s.original is not None}


def trials_of(record: AuditRecord, domain: str, subject: str | None = None) -> list[Trial]:
    """Return a domain's trials, of one subject or of all."""
    return [
        trial
        for trial in record.trials
        if trial.domain == domain and subject in (None, trial.subject)
    ]
