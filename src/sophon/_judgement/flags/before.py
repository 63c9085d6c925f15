"""Red flags on the model before protection: whether the protected one was made from it."""

from __future__ import annotations

from sophon._judgement.flags.flag import Flag, flag
from sophon._judgement.parts import alone, subjects
from sophon._records.audit_record import AuditRecord

# The cosine of weights before and after protection was 0.93 or more in every tensor (900 rounds);
# of networks that were trained apart it is near 0.
_RELATED = 0.5
# Lines of a list that a flag shows.
_LISTED = 5


def same_weights(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the protected model is the one before protection, to the bit."""
    held = subjects(record)
    after, before = held["protected"], held.get("unprotected")
    # What is computed otherwise with the same weights has a flag of its own.
    if before is None or after.code or after.weights_sha256 != before.weights_sha256:
        return None
    return flag("same_weights", after.weights_sha256[:12])


def another_network(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the protected model was not made from the unprotected one: it states another
    one, or its weights have little in common with that one's.
    """
    held = subjects(record)
    if "unprotected" not in held:
        return None
    stated, sha256 = _stated_model(record), held["unprotected"].weights_sha256
    alike, detail = held["protected"].similarity, ""
    if stated is not None and stated != sha256:
        detail = f"it states weights {stated[:12]}, the unprotected model has {sha256[:12]}"
    elif alike is not None and alike < _RELATED:
        detail = f"cosine of their weights {alike:.2f} (median over tensors)"
    return flag("another_network", detail)


def _stated_model(record: AuditRecord) -> str | None:
    """Return the hash of the weights that the checkpoint says it was made from."""
    identity = (record.protection or {}).get("identity")
    stated = identity.get("model") if isinstance(identity, dict) else None
    return stated if isinstance(stated, str) else None


def unprotected_on_trust(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if nothing ties the unprotected model to the protected one."""
    known = alone(record) or _stated_model(record) is not None
    return flag("unprotected_on_trust", "" if known else "no hash of the weights before protection")


def other_code(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the protected model computes otherwise than the unprotected one."""
    found = subjects(record)["protected"].code
    rest = len(found) - _LISTED
    more = (f"and {rest} more",) if rest > 0 else ()
    return flag("other_code", "; ".join((*found[:_LISTED], *more)))
