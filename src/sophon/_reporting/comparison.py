"""Several audits on one page, ranked where they can be compared. No torch.

Audits are alike if everything but the protected weights is: suite, budget, seeds, domains, model
before protection. Only such audits are ranked against each other. What a suite adds for the rates
that a protection states keeps no audits apart: every audit has the same for the usual rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sophon._attacks.suites import SUITES, beyond_rehearsal, beyond_usual, strategies_of
from sophon._base.errors import AuditError
from sophon._judgement.parts import SUBJECTS, originals
from sophon._judgement.statistics import Cost, best_of
from sophon._judgement.summaries import DomainSummary, Verdict
from sophon._judgement.verdict import Judgement, judge
from sophon._records.audit_record import AuditRecord, DomainRecord, Measurement
from sophon._records.metrics import NONE, kind_of, shown
from sophon._records.statement import stated
from sophon._reporting.rendering import Document, Table, by_column, render, score_text
from sophon._reporting.tables import cost_text, ratio_text, removed_text
from sophon._specs import OptimizerName, Strategy, Subject, fingerprint_of, shared_fields

# The best first; what follows has no rank, because it says nothing of how hard the model is.
_RANKED: tuple[Verdict, ...] = ("withstood", "slowed", "not protected")
_WITHOUT_RANK: tuple[Verdict, ...] = ("untrainable", "void")
_SHORT_HASH = 12


@dataclass(frozen=True, eq=False)
class Entry:
    """One audit of a comparison: what it is called, and what it was judged to be."""

    name: str
    judgement: Judgement

    @property
    def record(self) -> AuditRecord:
        """The audit's record."""
        return self.judgement.record

    @property
    def worst(self) -> DomainSummary:
        """The domain that speaks for the model."""
        return self.judgement.worst

    @property
    def attacked(self) -> Measurement | None:
        """The test score of the best attack on the protected model."""
        held = self.worst.subjects.get("protected")
        return None if held is None else held.test

    @property
    def cost(self) -> Cost | None:
        """What it took to reach 90 % of the unprotected model's best again."""
        held = self.worst.subjects.get("protected")
        return None if held is None else held.costs.get("unprotected")

    @property
    def wall_s(self) -> float | None:
        """How long protection says that it took, in seconds."""
        return stated(self.record.protection).wall_s

    @property
    def heads_alone(self) -> dict[Subject, float]:
        """The best validation score of attacks that train a head alone, by subject: linear
        probing, which many papers on protection stop at.
        """
        trials = [t for t in self.record.trials if t.domain == self.worst.domain.name]
        alone = [t for t in trials if t.curve and t.strategy.scope == "head"]
        bests: dict[Subject, float] = {}
        for trial in alone:
            bests[trial.subject] = max(best_of(trial), bests.get(trial.subject, -math.inf))
        return bests

    @property
    def originals(self) -> tuple[Measurement | None, Measurement | None]:
        """The test scores on the original task after and before protection."""
        held = originals(self.record)
        return held.get("protected"), held.get("unprotected")

    @property
    def flags(self) -> tuple[str, ...]:
        """The names of the flags raised on any restricted domain."""
        return tuple(dict.fromkeys(f.name for s in self.judgement.restricted for f in s.flags))

    @property
    def rates(self) -> dict[OptimizerName, float]:
        """The rates that protection says it rehearsed; empty: not said."""
        return stated(self.record.protection).rates

    @property
    def ranked(self) -> bool:
        """Whether the verdict says how well the model is protected."""
        return self.worst.verdict in _RANKED


@dataclass(frozen=True)
class Group:
    """Audits that can be compared, the best protected first, and what they have in common."""

    setting: dict[str, str]
    entries: tuple[Entry, ...]

    @property
    def drifted(self) -> str:
        """How far the areas of the unprotected or of the fresh network lie apart, in words; nothing
        where they are close.

        Each audit attacks them with what led on its own protected model as well, so that what is
        removed is measured against another lead.
        """
        ranked = [e.worst for e in self.entries if e.ranked and e.worst.advantage.baselines]
        pairs = [one.advantage.baselines or (0.0, 0.0) for one in ranked]
        if len({one.domain.name for one in ranked}) > 1 or len(pairs) < 2:
            return ""
        kind = ranked[0].kind
        apart = max(max(areas) - min(areas) for areas in zip(*pairs, strict=True))
        return kind.gap(apart) if apart > kind.close else ""

    @property
    def certainty(self) -> str:
        """How certain the order is, as a sentence; nothing where there is none."""
        ranked = [entry for entry in self.entries if entry.ranked]
        if len(ranked) < 2:
            return ""
        if any(entry.worst.advantage.interval for entry in ranked):
            return "Where intervals overlap, the order is not certain."
        alone = " (one attack seed)" if len(ranked[0].record.seeds) == 1 else ""
        return f"There are no intervals{alone}: within a verdict the order says nothing."

    @property
    def further(self) -> str:
        """What the suite did beyond its own attacks for the rates that protections state, as a
        sentence; nothing where they state the same, or where nothing follows from them.
        """
        record = self.entries[0].record
        suite = SUITES.get(record.spec.suite)
        each = []
        if suite is not None and suite.rehearsed:
            each.append("each was attacked at ten and a hundred times its own as well")
        if record.spec.search_trials:
            each.append("its search reaches as far as a hundred times its own")
        held = {entry.name: _rates_text(entry.rates) for entry in self.entries}
        if not each or len(set(held.values())) < 2:
            return ""
        said = "; ".join(f"{name}: {text}" for name, text in held.items())
        return f"Protections state different rehearsed rates ({said}): {', and '.join(each)}."

    def ranks(self) -> tuple[int | None, ...]:
        """Return each entry's rank; None for those that have none, and for one that is alone.

        Where what they are measured against has `drifted`, those of one verdict share a rank.
        """
        if len(self.entries) == 1:
            return (None,)
        verdicts = [entry.worst.verdict for entry in self.entries]
        places = [verdicts.index(v) if self.drifted else i for i, v in enumerate(verdicts)]
        return tuple(
            place + 1 if entry.ranked else None
            for place, entry in zip(places, self.entries, strict=True)
        )


class Comparison(Document):
    """Groups of named audits that can be compared, the largest first.

    Raises AuditError with fewer than two, with a name that comes twice, or where a record names
    no restricted domain.
    """

    def __init__(self, records: Sequence[tuple[str, AuditRecord]]) -> None:
        names = [name for name, _ in records]
        if len(records) < 2:
            raise AuditError(f"{len(records)} audit to compare: name two or more")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise AuditError(f"{twice} is named twice: name each audit once")
        groups: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
        for name, record in records:
            entry = Entry(name, judge(record))
            groups.setdefault(tuple(_setting(record).items()), []).append(entry)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        self.groups = tuple(
            Group(dict(setting), tuple(sorted(entries, key=_order))) for setting, entries in ordered
        )

    @property
    def differing(self) -> tuple[str, ...]:
        """In what the groups differ; empty if all audits can be compared."""
        names = self.groups[0].setting
        return tuple(n for n in names if len({group.setting[n] for group in self.groups}) > 1)

    def tables(self) -> list[Table]:
        """Return a table for each group."""
        return [_table(group) for group in self.groups]

    def data(self) -> list[dict[str, Any]]:
        """Return the groups as plain values, for JSON; fractions in [0, 1]."""
        return [
            {
                "setting": group.setting,
                "audits": [
                    {"rank": rank, **_values(entry)}
                    for rank, entry in zip(group.ranks(), group.entries, strict=True)
                ],
            }
            for group in self.groups
        ]

    def rendered(self, form: str) -> str:
        """Return it as `html` or as `md`."""
        pairs = list(zip(self.groups, self.tables(), strict=True))
        return render(f"comparison.{form}.j2", comparison=self, groups=pairs)


def _setting(record: AuditRecord) -> dict[str, str]:
    """Return what must be equal for two audits to be compared, in words."""
    hashes = {subject.name: subject.weights_sha256 for subject in record.subjects}
    spec = record.spec
    suite = f"{spec.suite}, search of {spec.search_trials or 0}, {len(spec.extra)} extra"
    if record.suite_fingerprint:
        suite += f" [{record.suite_fingerprint[:_SHORT_HASH]}]"
    stages = SUITES.get(spec.suite)
    if stages is not None and stages.prefilter is not None:
        share, several = spec.prefilter or stages.prefilter, spec.survivors or stages.survivors
        suite += f", {several} go on at {share:.3g}"
    if spec.extra:
        extra = fingerprint_of([_but_for(spec.steps, strategy) for strategy in spec.extra])
        suite += f" [{extra[:_SHORT_HASH]}]"
    batch = f", batches of {spec.batch_size}" if spec.batch_size is not None else ""
    return {
        "suite": suite,
        "attacks": _attacks(record),
        "budget": f"{spec.steps} steps, {spec.evaluations} evaluations{batch}",
        "seeds": ", ".join(map(str, record.seeds)),
        "restricted": _named(record.restricted),
        "allowed tasks": _named(record.benign) or "none",
        "original": _named([record.original]),
        "unprotected model": f"{record.model} [{hashes.get('unprotected', 'none')[:_SHORT_HASH]}]",
        "precision": f"{record.environment.precision} on {record.environment.place}",
        "task": record.task_name,
        "pictures": _pictures(record),
        "given up": "; ".join(record.given_up) or "nothing",
        # Of plain envelopes the best of many attacks counts with the luck that made it the best.
        "areas": "plain" if _without_images(record) else "cross-fitted",
    }


def _named(domains: Sequence[DomainRecord]) -> str:
    """Return domains by name and content."""
    held = sorted(domains, key=lambda domain: domain.name)
    return ", ".join(f"{domain.name} [{domain.sha256[:_SHORT_HASH]}]" for domain in held)


def _attacks(record: AuditRecord) -> str:
    """Return the attacks that were not searched, but for those that only the rates which a
    checkpoint states brought in. In whatever order: those of usual rates come before or after.
    """
    stated_alone = _of_stated_rates(record)
    steps = record.spec.steps
    held = sorted(_but_for(steps, s) for s in record.strategies if s not in stated_alone)
    return f"{len(held)} [{fingerprint_of(held)[:_SHORT_HASH]}]"


def _but_for(steps: int, strategy: Strategy) -> str:
    """Return an attack's fingerprint, whatever the budget is, where it has the budget's steps."""
    fields = strategy.model_dump(mode="json")
    return fingerprint_of(fields | {"steps": None} if strategy.steps == steps else fields)


def _of_stated_rates(record: AuditRecord) -> set[Strategy]:
    """Return the attacks that follow from a checkpoint's stated rates and from nothing else: not
    one of the suite's, of `audit.extra`, or of the usual rates.
    """
    spec, suite = record.spec, SUITES.get(record.spec.suite)
    if suite is None or not suite.rehearsed or not stated(record.protection).rates:
        return set()
    own = {*strategies_of(spec), *beyond_usual(spec)}
    return set(beyond_rehearsal(record.protection, spec)) - own


def _rates_text(rates: dict[OptimizerName, float]) -> str:
    return ", ".join(f"{name} {rates[name]:g}" for name in sorted(rates)) or "none"


def _pictures(record: AuditRecord) -> str:
    """Return how pictures were judged; nothing of it concerns a classifier."""
    if not record.kind.pictured:
        return "none"
    samples = record.spec.samples
    fingerprint = fingerprint_of(samples.model_dump(mode="json"))
    return f"{samples.count} of each, {samples.extractor} [{fingerprint[:_SHORT_HASH]}]"


def _without_images(record: AuditRecord) -> bool:
    return any(point.by_image is None for trial in record.trials for point in trial.curve)


def _order(entry: Entry) -> tuple[int, float, str]:
    """Return where an entry stands: by verdict, then by the advantage that was removed."""
    place = (*_RANKED, *_WITHOUT_RANK).index(entry.worst.verdict)
    return place, -(entry.worst.advantage.value or 0.0), entry.name


def _change(after: Measurement | None, before: Measurement | None) -> str:
    if after is None or before is None:
        return NONE
    return kind_of(after).change(after.value - before.value)


def _table(group: Group) -> Table:
    several = len(group.entries[0].record.restricted) > 1
    ranks = dict(zip(group.entries, group.ranks(), strict=True))

    def verdict(worst: DomainSummary) -> str:
        return f"{worst.text}, on {worst.domain.name}" if several else worst.text

    columns: dict[str, Callable[[Entry], str]] = {
        "rank": lambda e: str(ranks[e] or NONE),
        "audit": lambda e: e.name,
        "verdict": lambda e: verdict(e.worst),
        "advantage removed (95 %)": lambda e: removed_text(e.worst.advantage),
        "worst case, restricted test (95 %)": lambda e: score_text(e.attacked),
        "strongest attack": _strongest,
        "steps to recover": lambda e: cost_text(e.cost),
        "cost multiplier": lambda e: ratio_text(e.worst.slowing),
        "a head alone, validation: protected, unprotected, fresh": _heads_alone,
        "original test before": lambda e: shown(e.originals[1]),
        "after": lambda e: shown(e.originals[0]),
        "change": lambda e: _change(*e.originals),
        "seconds of protection": lambda e: NONE if e.wall_s is None else f"{e.wall_s:.0f}",
        "area: unprotected, fresh": lambda e: _baselines(e.worst),
        "flags": lambda e: ", ".join(e.flags) or "none",
    }
    return by_column(group.entries, columns)


def _strongest(entry: Entry) -> str:
    held = entry.worst.subjects.get("protected")
    if held is None:
        return NONE
    shared = shared_fields(trial.strategy for trial in entry.record.trials)
    return held.winner.strategy.label(shared)


def _heads_alone(entry: Entry) -> str:
    """Return what a head alone reached on each subject, a dash where none was attacked so."""
    bests, show = entry.heads_alone, entry.worst.kind.show
    if not bests:
        return NONE
    return ", ".join(show(bests[name], 1) if name in bests else NONE for name in SUBJECTS)


def _baselines(worst: DomainSummary) -> str:
    """Return the areas between which advantage removed lies."""
    areas = worst.advantage.baselines
    return NONE if areas is None else ", ".join(worst.kind.show(area, 1) for area in areas)


def _values(entry: Entry) -> dict[str, Any]:
    worst, test, (after, before) = entry.worst, entry.attacked, entry.originals
    cost = entry.cost
    return {
        "name": entry.name,
        "stated_rates": entry.rates,
        "verdict": worst.verdict,
        "domain": worst.domain.name,
        "advantage_removed": worst.advantage.value,
        "advantage_interval": worst.advantage.interval,
        "areas_unprotected_and_fresh": worst.advantage.baselines,
        "worst_case_test": test.value if test else None,
        "original_before": before.value if before else None,
        "original_after": after.value if after else None,
        "steps_to_recover": cost.steps if cost else None,
        "strongest_attack": _strongest(entry),
        "head_alone": entry.heads_alone,
        "protection_s": entry.wall_s,
        "cost_multiplier": worst.slowing.value,
        "cost_multiplier_is_bound": worst.slowing.bound,
        "cost_multiplier_sure": worst.slowing.sure,
        "cost_multiplier_interval": worst.slowing.interval,
        "flags": entry.flags,
    }
