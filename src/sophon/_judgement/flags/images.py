"""Red flags on images: those that two splits share, and those that a model has met before."""

from __future__ import annotations

import math
from statistics import NormalDist

from sophon._judgement.flags.flag import Flag, flag
from sophon._records.audit_record import AuditRecord, Familiarity

_OVERLAP = 0.01
# How unlikely it must be that an unprotected model knows training images better by chance, and by
# how much it must: splits that differ a little are no memory.
_BY_CHANCE = 1e-3
_FAMILIAR = 0.1


def data_overlap(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if more than one image in a hundred is in two splits, exactly or nearly.

    Splits are those of the domain and of the original one; of a held-out domain those of the
    restricted ones, too, which it must have nothing of.
    """
    names = {domain, record.original.name}
    held_out = domain in {held.name for held in record.held_out}
    given = {held.name for held in record.restricted} if held_out else set()
    found = []
    for o in record.overlaps:
        pair = {o.first.rpartition("/")[0], o.second.rpartition("/")[0]}
        meant = pair <= names or (domain in pair and pair <= {domain, *given})
        if meant and o.exact + o.near > _OVERLAP * o.count:
            found.append(o)
    if not found:
        return None
    worst = max(found, key=lambda o: (o.exact + o.near) / o.count)
    return flag(
        "data_overlap",
        f"{worst.first} in {worst.second}: {worst.exact} exact and {worst.near} near of"
        f" {worst.count}; {len(found)} pairs of splits",
    )


def seen_before(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the unprotected model was trained on the domain's training images."""
    held = {s.name: s.vitals.familiarity.get(domain) if s.vitals else None for s in record.subjects}
    before, fresh = held.get("unprotected"), held.get("scratch")
    if before is None:
        return None
    lead, chance = _lead(before, fresh)
    if lead < _FAMILIAR or chance >= _BY_CHANCE:
        return None
    shown = f"unprotected {_both(before)}" + (f", fresh network {_both(fresh)}" if fresh else "")
    return flag(
        "seen_before",
        f"a head fitted to other training images is right about, training and test: {shown}",
    )


def _both(held: Familiarity) -> str:
    return f"{held.trained.value:.1%} and {held.others.value:.1%}"


def _lead(before: Familiarity, fresh: Familiarity | None) -> tuple[float, float]:
    """Return by how much training images are known better than others, and how likely so much is by
    chance (a one-sided normal test, variances pooled).

    Frames of one film in both halves of the training images are a lead that says nothing: a fresh
    network has it, too. The lead is measured from that one's, or from 0 if that is negative.
    """
    lead, variance = _better(before)
    usual, spread = (0.0, 0.0) if fresh is None else _better(fresh)
    if usual > 0:
        lead, variance = lead - usual, variance + spread
    if not variance:
        return lead, 1.0
    return lead, 1 - NormalDist().cdf(lead / math.sqrt(variance))


def _better(held: Familiarity) -> tuple[float, float]:
    """Return the lead of training images over others, and its variance if there is none."""
    trained, others = held.trained, held.others
    share = (trained.correct + others.correct) / (trained.total + others.total)
    variance = share * (1 - share) * (1 / trained.total + 1 / others.total)
    return trained.value - others.value, variance
