"""All red flags: pure functions of a record that say when an audit should not be believed.

Each returns a `Flag` or None for one domain. Add one as a function and its words in `flags.toml`,
whose order is that in which they are shown.
"""

from __future__ import annotations

from sophon._judgement.flags import before, horizon, images, original, running, search, weights
from sophon._judgement.flags.flag import TEXTS, Check, Flag
from sophon._records.audit_record import AuditRecord

_SUBJECTS = (before, horizon, images, original, running, search, weights)
CHECKS: dict[str, Check] = {
    name: getattr(subject, name)
    for name in TEXTS
    for subject in _SUBJECTS
    if hasattr(subject, name)
}


def raised(record: AuditRecord, domain: str) -> dict[str, Flag]:
    """Return the flags that a domain raises, by the name of their check."""
    found = {name: check(record, domain) for name, check in CHECKS.items()}
    return {name: flag for name, flag in found.items() if flag is not None}
