"""What a red flag is. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


# What flags say, by the names of their checks, in the order in which they are shown.
TEXTS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("flags.toml").read_text(encoding="utf-8")
)


def flag(check: str, detail: str | None, *, far: str = "", **changes: Any) -> Flag | None:
    """Return the flag of a check with the `detail` that raised it; None without one.

    `far` is what the kind of score counts as far apart; `changes` are `voids`, `forbids` or `alone`
    where they are not what `flags.toml` says.
    """
    if not detail:
        return None
    held = dict(TEXTS[check])
    held["raised_if"] = held["raised_if"].replace("{far}", far)
    held["forbids"] = frozenset(held.get("forbids", ()))
    return Flag(**{**held, **changes}, detail=detail)


Check = Callable[[AuditRecord, str], Flag | None]
