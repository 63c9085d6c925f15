"""Red flags on what attacks start from: gradients, outputs, weights, statistics.

Records without vitals raise none of them but that of unhealthy weights.
"""

from __future__ import annotations

from sophon._attacks.kinds import rescales
from sophon._judgement.flags.flag import GOOD, Flag, flag
from sophon._judgement.parts import subjects, trials_of
from sophon._records.audit_record import AuditRecord, Vitals

# Protected over unprotected, or the inverse: what training a network does stays well within.
_FAR = 100.0
_INFLATED = 4.0
# Where there is nothing to compare with.
_GRADIENTS = (1e-5, 1e4)
_LARGEST_WEIGHT = 1e3
_LARGEST_LOGIT = 1e3
_LARGEST_STATISTIC = 1e4
# The smallest running variance over that of the unprotected model.
_SHRUNK = 1e-4
# Relative error of outputs in the attacks' precision, and how much larger than before protection.
_ROUNDING = 0.1
_WORSE = 3.0


# Of a model before protection that was not given.
_UNKNOWN = Vitals(largest_logit=None, gradient_norms={}, weight_sizes={})


def _vitals(record: AuditRecord) -> tuple[Vitals | None, Vitals]:
    """Return the vitals of the protected and of the unprotected subject."""
    held = subjects(record)
    before = held.get("unprotected")
    return held["protected"].vitals, (before and before.vitals) or _UNKNOWN


def gradients_at_step_0(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the first gradient is missing, or far smaller or larger than it was."""
    after, before = _vitals(record)
    if after is None or domain not in after.gradient_norms:
        return None
    usual = before.gradient_norms.get(domain)
    detail = _off(after, after.gradient_norms[domain], usual)
    if detail is None and domain in after.body_gradient_norms:
        usual = before.body_gradient_norms.get(domain)
        detail = _off(after, after.body_gradient_norms[domain], usual)
        detail = detail and f"before the head: {detail}"
    return flag("gradients_at_step_0", detail)


def _off(after: Vitals, norm: float | None, usual: float | None) -> str | None:
    """Return what is wrong with the norm of a gradient, if anything is."""
    if norm is None:
        return "; ".join(after.raised) or "not finite"
    if norm == 0:
        return "zero"
    if not usual and not _GRADIENTS[0] <= norm <= _GRADIENTS[1]:
        return f"{norm:.3g}"
    if usual and not 1 / _FAR <= norm / usual <= _FAR:
        return f"{norm:.3g}, unprotected {usual:.3g}"
    return None


def saturated_logits(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if outputs on the original domain are not finite or beyond 1000."""
    after, _ = _vitals(record)
    if after is None:
        return None
    largest = after.largest_logit
    if largest is not None and largest <= _LARGEST_LOGIT:
        return None
    return flag("saturated_logits", "not finite" if largest is None else f"{largest:.3g}")


def inflated_weights(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if a weight tensor or scale is four times as large, or as small, as it was.

    Without an unprotected model: beyond 1000. Good verdicts stand if attacks rescaled, and that
    brings every such tensor back.
    """
    after, before = _vitals(record)
    if after is None:
        return None
    unknown = before is _UNKNOWN
    ratios, far = _far_off(after.weight_sizes, None if unknown else before.weight_sizes)
    if not far:
        return None
    rescaled, left = _far_off(after.rescaled_sizes, None if unknown else before.rescaled_sizes)
    stuck = [n for n in far if n in left or n not in rescaled]
    name = max(far, key=lambda n: max(far[n], 1 / max(far[n], 1e-12)))
    attacks = trials_of(record, domain, "protected")
    undone = any(t.curve and rescales(t.strategy) for t in attacks)
    size = f"{far[name]:.3g}{'' if unknown else ' times as large'}"
    kept = f", of which rescaling leaves {len(stuck)} ({stuck[0]})" if stuck else ""
    detail = f"{name} {size}; {len(far)} of {len(ratios)} tensors{kept}"
    forbids = frozenset() if undone and not stuck else GOOD
    return flag("inflated_weights", detail, forbids=forbids)


Sizes = dict[str, float]


def _far_off(
    after: dict[str, float | None], before: dict[str, float | None] | None
) -> tuple[Sizes, Sizes]:
    """Return tensors' sizes over what they were (without `before` the sizes), and those far off."""
    if before is None:
        sizes = {n: size for n, size in after.items() if size is not None}
        return sizes, {n: size for n, size in sizes.items() if size > _LARGEST_WEIGHT}
    ratios = {
        name: size / (before[name] or 1.0)
        for name, size in after.items()
        if size is not None and before.get(name)
    }
    return ratios, {n: r for n, r in ratios.items() if not 1 / _INFLATED <= r <= _INFLATED}


def extreme_batch_norm(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if BatchNorm statistics are not finite, negative, or far beyond usual."""
    after, before = _vitals(record)
    if after is None:
        return None
    largest, smallest = after.largest_buffer, after.smallest_variance
    usual = before.largest_buffer
    if largest is None and usual is None and smallest is None:
        return None
    limit = max(_LARGEST_STATISTIC, _FAR * (usual or 0.0))
    least = _SHRUNK * (before.smallest_variance or 0.0)
    if largest is not None and largest <= limit and smallest is not None and smallest >= least:
        return None
    return flag("extreme_batch_norm", f"largest {largest}, smallest variance {smallest}")


def lost_in_rounding(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the attacks' precision changes what the protected model alone computes."""
    after, before = _vitals(record)
    error = None if after is None else after.rounding
    if error is None or error <= _ROUNDING:
        return None
    usual = before.rounding
    if usual is not None and error <= _WORSE * usual:
        return None
    compared = "" if usual is None else f", unprotected {usual:.2g}"
    detail = f"relative error {error:.2g}{compared} in {record.environment.precision}"
    return flag("lost_in_rounding", detail)


def unhealthy_weights(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if a subject has weights that are not finite or parameters that are frozen."""
    detail = "; ".join(f"{s.name}: {', '.join(s.flags)}" for s in record.subjects if s.flags)
    voids = any("non_finite_weights" in s.flags for s in record.subjects)
    return flag("unhealthy_weights", detail, voids=voids)
