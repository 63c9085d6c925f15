"""Advantage by depth: what an attacker keeps who takes only the first blocks. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sophon._attacks.kinds import blocks_reset, in_batches_of
from sophon._attacks.suites import depth_attacks
from sophon._judgement.parts import trials_of
from sophon._judgement.statistics import budgets, envelope_area
from sophon._records.audit_record import AuditRecord, Trial

# A lead must be so many small differences of its kind for shares of it to mean something.
_SMALL_DIFFERENCES = 4


@dataclass(frozen=True)
class DepthRow:
    """An attacker who keeps the first `kept` of `blocks` blocks and starts the rest anew.

    `areas` is each subject's area under the envelope of these attacks, `shares` how much that is
    of the lead that the whole unprotected model has over a fresh network (None: no lead).
    """

    kept: int
    blocks: int
    areas: dict[str, float]
    shares: dict[str, float | None]


def depth_rows(record: AuditRecord, domain: str) -> tuple[DepthRow, ...]:
    """Return a row for each number of blocks kept, the fewest first; none if none was tried.

    Only the first attack seed counts: later ones are not run for all depths.
    """
    blocks = max((s.blocks or 0 for s in record.subjects), default=0)
    wanted = {in_batches_of(strategy, 1) for strategy in depth_attacks(blocks, record.spec)}
    first = record.seeds[0]
    held = [
        trial
        for trial in trials_of(record, domain)
        if trial.seed == first and trial.curve and in_batches_of(trial.strategy, 1) in wanted
    ]
    resets = sorted({blocks_reset(trial.strategy) for trial in held}, reverse=True)
    if len(resets) < 2:
        return ()
    at = budgets(held)
    groups: dict[int, dict[str, list[Trial]]] = {reset: {} for reset in resets}
    for trial in held:
        groups[blocks_reset(trial.strategy)].setdefault(trial.subject, []).append(trial)
    areas = {
        reset: {subject: envelope_area(trials, at) for subject, trials in group.items()}
        for reset, group in groups.items()
    }
    whole = areas[min(resets)]
    base, top = whole.get("scratch"), whole.get("unprotected")
    smallest = _SMALL_DIFFERENCES * record.kind.close
    gap = None if base is None or top is None or top - base < smallest else top - base

    def share(value: float) -> float | None:
        return None if gap is None or base is None else (value - base) / gap

    return tuple(
        DepthRow(
            kept=blocks - reset,
            blocks=blocks,
            areas=found,
            shares={name: share(value) for name, value in found.items()},
        )
        for reset, found in areas.items()
    )
