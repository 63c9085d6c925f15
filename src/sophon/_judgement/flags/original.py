"""Red flags on the original task: what protection left of it, and whether it was ever there."""

from __future__ import annotations

from sophon._judgement.flags.flag import GOOD, Flag, flag
from sophon._judgement.parts import originals
from sophon._judgement.statistics import interval_of
from sophon._records.audit_record import AuditRecord
from sophon._records.metrics import shown
from sophon._records.statement import stated
from sophon._specs import Guard


def near_chance_on_original(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the protected model hardly beats guessing on its own task, and the
    unprotected one does.
    """
    detail = "" if unprotected_fails(record, domain) else _near_chance(record)
    return flag("near_chance_on_original", detail)


def _near_chance(record: AuditRecord) -> str:
    """Return the protected model's score and chance if it hardly beats that."""
    kind = record.kind
    chance = kind.chance(record.original.classes, record.original.largest or 0.0)
    scores = originals(record)
    before, score = scores.get("unprotected"), scores.get("protected")
    # A tenth of the way from chance to what the unprotected model does, or to perfection.
    best = max(chance, 1.0 if before is None else before.value)
    least = chance + 0.1 * (best - chance)
    if score is None or (score.value > least and interval_of(score).low > chance):
        return ""
    return f"{kind.show(score.value, 1)}, chance {kind.show(chance, 1)}"


def unprotected_fails(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the unprotected model is no better than guessing on its own task.

    Where the protected one is no better either, it forbids any verdict.
    """
    kind = record.kind
    chance = kind.chance(record.original.classes, record.original.largest or 0.0)
    score = originals(record).get("unprotected")
    if score is None or interval_of(score).low > chance:
        return None
    detail = f"{kind.show(score.value, 1)}, chance {kind.show(chance, 1)}"
    return flag("unprotected_fails", detail, voids=bool(_near_chance(record)))


def original_task_suffers(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the original task lost more than the guard's tolerance on the test split.

    The loss must exceed it by more than the protected model's interval; a loss of more than ten
    points forbids a verdict, one that may be as large within that interval a good one. A tolerance
    above the usual one, which the checkpoint states of itself, loosens neither.
    """
    scores = originals(record)
    before, after = scores.get("unprotected"), scores.get("protected")
    if before is None or after is None:
        return None
    kind = record.kind
    usual = Guard()
    known = usual.model_copy(update=stated(record.protection).tolerances)
    lost = [before.value - kind.allowed(before.value, one) for one in (known, usual)]
    tolerance = min(lost)
    own = f"; it states {kind.tolerance(known)}" if lost[0] > lost[1] else ""
    held = interval_of(after)
    certain, possible = before.value - held.high, before.value - held.low
    ruin = kind.ruin(before.value)
    if certain <= tolerance and possible <= ruin:
        return None
    low, high = kind.interval(held)
    detail = f"{shown(before)} before, {shown(after)} after ({low} to {high}){own}"
    forbids = GOOD if possible > ruin else frozenset()
    return flag("original_task_suffers", detail, voids=certain > ruin, forbids=forbids)
