"""Red flags on the budget: whether attacks were given the steps that a verdict needs."""

from __future__ import annotations

from sophon._judgement.flags.flag import WITHSTOOD, Flag, flag
from sophon._judgement.parts import domains_of, trials_of
from sophon._judgement.statistics import budgets, by_seed, interval_of, winner
from sophon._records.audit_record import AuditRecord
from sophon._records.metrics import shown
from sophon._records.statement import stated
from sophon._specs import Subject

# Of what counts as far apart, what a curve that has levelled out may still gain.
_STILL = 0.2


def short_horizon(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if attacks were given less than ten times the steps that were rehearsed."""
    # Attackers that persist from round to round live longer than a round's K.
    rehearsed = stated(record.protection).life
    if not rehearsed or record.spec.steps >= 10 * rehearsed:
        return None
    return flag("short_horizon", f"{record.spec.steps} steps, {rehearsed} rehearsed")


def rehearsal_unknown(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the checkpoint does not say how it was protected."""
    statement = stated(record.protection)
    if statement.rates or statement.life:
        return None
    # Of the horizon only the fresh network's curve tells whether it is long enough.
    unsettled = scratch_still_rises(record, domain) is not None
    detail = "no statement" if record.protection is None else "no rehearsal that can be read"
    return flag("rehearsal_unknown", detail, forbids=WITHSTOOD if unsettled else frozenset())


def protected_still_rises(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if attackers of the protected model still gained much at the end."""
    much, words = _late_gain(record, domain, "protected") or (False, "")
    far = record.kind.far_words
    return flag("protected_still_rises", words if much else "", far=far)


def scratch_still_rises(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if a fresh network still gained much at the end, or has learnt nothing."""
    late = _late_gain(record, domain, "scratch")
    if late is None:
        return None
    guesses = unlearnt(record, domain, "scratch")
    words = late[1] if late[0] else guesses
    return flag("scratch_still_rises", words, far=record.kind.far_words)


def _late_gain(record: AuditRecord, domain: str, subject: Subject) -> tuple[bool, str] | None:
    """Return whether a subject's mean envelope over seeds gained much in the last third of the
    budget, and how much in words.

    It is much where no measurement before that third tells. None without any measurement.
    """
    trials = [t for t in trials_of(record, domain, subject) if t.curve]
    at = budgets(trials)
    rows = by_seed(trials, at) if at else None
    if rows is None or not len(rows):
        return None
    earlier = [index for index, step in enumerate(at) if step <= record.spec.steps * 2 / 3]
    if not earlier:
        return True, f"first measured at step {at[0]} of {record.spec.steps}"
    kind, mean = record.kind, rows.mean(0)
    gain = float(mean[-1] - mean[earlier[-1]])
    much = gain > _STILL * kind.far(float(mean[-1]))
    return much, f"{kind.gap(gain)} between step {at[earlier[-1]]} and {at[-1]}"


def unlearnt(record: AuditRecord, domain: str, subject: Subject) -> str:
    """Return in words that a subject's best attack is no better than guessing, or nothing.

    It is measured on the test split: the best of many validation scores beats guessing by luck.
    """
    best = winner(trials_of(record, domain, subject))
    images = next((held for held in domains_of(record)[1:] if held.name == domain), None)
    if best is None or images is None:
        return ""
    kind = record.kind
    chance = kind.chance(images.classes, images.largest or 0.0)
    if best.test is not None and interval_of(best.test).low > chance:
        return ""
    return f"{shown(best.test)} on the test split, guessing {kind.show(chance, 1)}"
