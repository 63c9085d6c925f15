"""Red flags on how attacks were run: how many, how often, where, and what broke down."""

from __future__ import annotations

from sophon._attacks.suites import SUITES, Suite
from sophon._judgement.flags.flag import Flag, flag
from sophon._judgement.parts import SUBJECTS, trials_of
from sophon._records.audit_record import AuditRecord
from sophon._specs import AuditSpec

# How often a subject must be attacked, of how often another one was.
_AS_OFTEN = 0.95


def crashed_attacks(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if any attack crashed."""
    ends = [(t.subject, t.outcome) for t in trials_of(record, domain)]
    crashed = [(subject, end.error) for subject, end in ends if end.kind == "crashed"]
    if not crashed:
        return None
    found = sorted({subject for subject, _ in crashed})
    detail = f"{len(crashed)} on {', '.join(found)}: {crashed[0][1]}"
    return flag("crashed_attacks", detail, alone=found == ["protected"])


def most_diverged(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if more than half of the attacks on a subject diverged."""
    found = {}
    for subject in SUBJECTS:
        trials = trials_of(record, domain, subject)
        diverged = sum(trial.outcome.kind == "diverged" for trial in trials)
        if diverged > len(trials) / 2:
            found[subject] = f"{diverged} of {len(trials)} on {subject}"
    return flag("most_diverged", ", ".join(found.values()), alone=list(found) == ["protected"])


def unequal_search(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if a subject was attacked clearly less often than another.

    Searches may propose to one subject what another one met already, so a few trials may differ.
    """
    counts = {
        subject.name: len({(t.strategy, t.seed) for t in trials_of(record, domain, subject.name)})
        for subject in record.subjects
    }
    unequal = min(counts.values()) < _AS_OFTEN * max(counts.values())
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return flag("unequal_search", shown if unequal else "")


def few_seeds(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if fewer than three attack seeds were run."""
    return flag("few_seeds", f"{len(record.seeds)}" if len(record.seeds) < 3 else None)


def cut_down_suite(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if the audit is weaker than the suite whose name it bears."""
    spec, suite = record.spec, SUITES.get(record.spec.suite)
    if suite is None:
        return None
    less = []
    if (spec.search_trials or 0) < suite.search_trials:
        less.append(f"{spec.search_trials or 0} of {suite.search_trials} searched strategies")
    if suite.prefilter is not None and (spec.prefilter or suite.prefilter) < suite.prefilter:
        less.append(f"most attacks end at {spec.prefilter:.2g} of the budget")
    if (spec.survivors or suite.survivors) < suite.survivors:
        less.append(f"{spec.survivors} of {suite.survivors} attacks of a subject go on")
    if len(record.seeds) < len(suite.seeds):
        less.append(f"{len(record.seeds)} of {len(suite.seeds)} attack seeds")
    less += _coarser(spec, suite)
    return flag("cut_down_suite", "; ".join(less))


def _coarser(spec: AuditSpec, suite: Suite) -> list[str]:
    """Return in what measurements and batches are less than a suite's own."""
    less = []
    usual = AuditSpec.model_fields["evaluations"].default
    if spec.evaluations < usual:
        less.append(f"{spec.evaluations} of {usual} evaluations")
    batches = sorted({strategy.batch_size for strategy in suite.strategies})
    if spec.batch_size is not None and (len(batches) > 1 or spec.batch_size < batches[0]):
        own = ", ".join(map(str, batches))
        less.append(f"batches of {spec.batch_size} alone, of the suite's {own}")
    return less


def mixed_machines(record: AuditRecord, domain: str) -> Flag | None:
    """Return a flag if a domain's trials were run on unlike machines or versions."""
    held = [t.environment for t in trials_of(record, domain) if t.environment is not None]
    kinds = {
        (e.processor, e.place, e.precision, e.versions.get("torch", ""), e.threads): None
        for e in held
    }
    shown = [", ".join(map(str, kind)) for kind in list(kinds)[:3]]
    return flag("mixed_machines", "; ".join(shown) if len(kinds) > 1 else "")
