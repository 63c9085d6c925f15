"""What a red flag is. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sophon._records.audit_record import AuditRecord

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

    @property
    def said(self) -> str:
        """The flag as a reason for a verdict."""
        return f"{self.name}: {self.detail}"


Check = Callable[[AuditRecord, str], Flag | None]
