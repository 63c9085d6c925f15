"""All red flags: pure functions of a record that say when an audit should not be believed.

Each returns a `Flag` or None for one domain. Add one as a function and an entry.
"""

from __future__ import annotations

from sophon._judgement.flags import before, horizon, images, original, running, search, weights
from sophon._judgement.flags.flag import Check, Flag
from sophon._records.audit_record import AuditRecord

CHECKS: dict[str, Check] = {
    "crashed_attacks": running.crashed_attacks,
    "unequal_search": running.unequal_search,
    "near_chance_on_original": original.near_chance_on_original,
    "unprotected_fails": original.unprotected_fails,
    "original_task_suffers": original.original_task_suffers,
    "unhealthy_weights": weights.unhealthy_weights,
    "most_diverged": running.most_diverged,
    "winner_on_the_edge": search.winner_on_the_edge,
    "last_trial_is_best": search.last_trial_is_best,
    "last_step_is_best": search.last_step_is_best,
    "seeds_disagree": search.seeds_disagree,
    "other_optimizer_far_better": search.other_optimizer_far_better,
    "same_weights": before.same_weights,
    "another_network": before.another_network,
    "other_code": before.other_code,
    "gradients_at_step_0": weights.gradients_at_step_0,
    "saturated_logits": weights.saturated_logits,
    "inflated_weights": weights.inflated_weights,
    "extreme_batch_norm": weights.extreme_batch_norm,
    "lost_in_rounding": weights.lost_in_rounding,
    "unprotected_on_trust": before.unprotected_on_trust,
    "seen_before": images.seen_before,
    "head_alone": search.head_alone,
    "data_overlap": images.data_overlap,
    "few_seeds": running.few_seeds,
    "short_horizon": horizon.short_horizon,
    "protected_still_rises": horizon.protected_still_rises,
    "scratch_still_rises": horizon.scratch_still_rises,
    "rehearsal_unknown": horizon.rehearsal_unknown,
    "cut_down_suite": running.cut_down_suite,
    "mixed_machines": running.mixed_machines,
}


def raised(record: AuditRecord, domain: str) -> dict[str, Flag]:
    """Return the flags that a domain raises, by the name of their check."""
    found = {name: check(record, domain) for name, check in CHECKS.items()}
    return {name: flag for name, flag in found.items() if flag is not None}
