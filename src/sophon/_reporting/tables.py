"""The tables and facts of a report, as text. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from sophon._attacks.kinds import in_words
from sophon._judgement.advantage import Estimate
from sophon._judgement.data_sizes import DataSizes
from sophon._judgement.depth import DepthRow
from sophon._judgement.parts import SUBJECTS
from sophon._judgement.pictures import moment, pictures_of, when
from sophon._judgement.statistics import Cost, best_of
from sophon._judgement.summaries import DomainSummary, Ratio, SubjectSummary
from sophon._judgement.survival import Recovery
from sophon._records.audit_record import AuditRecord, ErrorScore, SampleRecord, Trial
from sophon._records.metrics import NONE, MetricKind, shown
from sophon._records.statement import ReadersFound
from sophon._reporting.rendering import Table, by_column, percent, score_text, table
from sophon._specs import Strategy, Subject, shared_fields

# --- One domain -----------------------------------------------------------------------------------


def facts(summary: DomainSummary) -> list[tuple[str, str]]:
    """Return a domain's key numbers with their names."""
    advantage = summary.advantage
    removed = removed_text(advantage) if advantage.defined else f"undefined: {advantage.reason}"
    found = [("Verdict", summary.text)]
    if summary.verdict == "void":
        found.append(("The numbers here", "no result, because the verdict is void"))
    found.append(("Advantage removed", removed))
    if advantage.one_more is not None:
        low, high = (f"{100 * bound:z.0f}" for bound in advantage.one_more)
        found.append(("The same of one further attack seed, same images", f"{low} to {high} %"))
    for name, ratio in (
        ("Cost multiplier", summary.slowing),
        ("Fraction of scratch cost", summary.fraction),
    ):
        if ratio.value is not None:
            found.append((name, ratio_text(ratio)))
    sure = summary.slowing._replace(
        value=summary.slowing.sure, interval=summary.slowing.sure_interval
    )
    if sure.value is not None:
        found.append(("Cost multiplier that is sure between measurements", ratio_text(sure)))
    if summary.logrank_p is not None:
        found.append(("Log-rank p, protected against unprotected", f"{summary.logrank_p:.3f}"))
    if "protected" in summary.subjects:
        won = summary.subjects["protected"].winner.strategy
        found.append(("Strongest attack on the protected model", f"{won.label()}: {in_words(won)}"))
    return found


def removed_text(advantage: Estimate) -> str:
    """Return how much advantage was removed with its interval, or a dash."""
    text = percent(advantage.value, 0)
    if advantage.interval is None:
        return text
    return f"{text} ({100 * advantage.interval.low:z.0f} to {100 * advantage.interval.high:z.0f})"


def ratio_text(ratio: Ratio) -> str:
    """Return a ratio of costs with its interval over seeds."""
    if ratio.value is None:
        return NONE
    text = f"{'at least ' if ratio.bound else ''}{ratio.value:.2g}"
    if ratio.interval is None:
        return text
    # The value is the luckiest attacker's and may lie outside what median seeds say.
    return f"{text} (median seeds: {ratio.interval.low:.2g} to {ratio.interval.high:.2g})"


def reached(summary: DomainSummary, shared: frozenset[str]) -> Table:
    """Return what the strongest attack reached on each subject, and what it cost."""
    columns: dict[str, Callable[[SubjectSummary], str]] = {
        "subject": lambda s: s.name,
        "best validation": lambda s: summary.kind.shown(s.best),
        "test (95 %)": lambda s: score_text(s.test),
        f"steps to {summary.kind.goal}": lambda s: cost_text(s.costs.get("unprotected")),
        "median seed": lambda s: _median(s.recoveries.get("unprotected")),
        "steps to 90 % of scratch": lambda s: cost_text(s.costs.get("scratch")),
        "won by": lambda s: s.winner.strategy.label(shared),
    }
    note = (
        "Steps are those of the luckiest attacker over all seeds; the median over seeds is"
        " Kaplan and Meier's, in which a seed that did not get there is censored, not dropped."
    )
    return by_column(summary.subjects.values(), columns, note)


def cost_text(cost: Cost | None) -> str:
    """Return the steps that a score took, or that it was not reached."""
    if cost is None:
        return NONE
    return f"more than {cost.horizon}" if cost.steps is None else f"{cost.steps}"


def _median(recovery: Recovery | None) -> str:
    if recovery is None or not recovery.costs:
        return NONE
    text = f"more than {recovery.horizon}" if recovery.median is None else f"{recovery.median}"
    if not recovery.censored:
        return text
    return f"{text} ({recovery.censored} of {len(recovery.costs)} seeds did not get there)"


def envelopes(summary: DomainSummary) -> Table:
    """Return the best validation score within each budget, over all attacks and seeds."""
    held, show = [summary.subjects.get(name) for name in SUBJECTS], summary.kind.shown
    rows = [
        [str(budget), *(show(s.points[position].value) if s else NONE for s in held)]
        for position, budget in enumerate(summary.budgets)
    ]
    return table(("steps", *SUBJECTS), rows)


def best_by_attack(trials: Iterable[Trial]) -> dict[Strategy, float]:
    """Return each attack's best validation score over its trials, those it was stopped in too."""
    found: dict[Strategy, float] = {}
    for trial in trials:
        if trial.curve:
            found[trial.strategy] = max(best_of(trial), found.get(trial.strategy, -math.inf))
    return found


def distribution(summary: DomainSummary, bests: Mapping[str, Mapping[Strategy, float]]) -> Table:
    """Return how the best scores of all attacks spread, the worst case first."""
    target, kind = summary.goal, summary.kind
    rows = []
    for name, held in bests.items():
        values = np.array(sorted(held.values()))
        quantiles = np.quantile(values, [1.0, 0.9, 0.5, 0.1]).tolist()
        there = NONE if target is None else f"{int((values >= target).sum())} of {len(values)}"
        rows.append((name, *map(kind.shown, quantiles), there))
    note = (
        "Each attack counts once, with its best validation score; the verdict rests on the worst"
        " case alone."
    )
    header = ("subject", "worst case", "upper tenth", "median attack", "lower tenth")
    return table((*header, f"attacks that reach {kind.goal}"), rows, note)


def readers(found: ReadersFound) -> Table:
    """Return what the best reader finds at each depth: before, after, and on fresh networks."""
    columns = zip(found.depths, found.given, found.protected, found.fresh, strict=True)
    rows = [(name, *(f"{value:.2f}" for value in values)) for name, *values in columns]
    return Table(("block", "unprotected", "protected", "fresh"), tuple(rows))


def depth(rows: Sequence[DepthRow], kind: MetricKind) -> Table | None:
    """Return the advantage an attacker keeps by the number of blocks taken, if it was tried."""
    if not rows:
        return None

    def cell(row: DepthRow, name: str) -> str:
        if name not in row.areas:
            return NONE
        return f"{kind.shown(row.areas[name])} ({percent(row.shares[name], 0)})"

    cells = [(f"{r.kept} of {r.blocks}", *(cell(r, name) for name in SUBJECTS)) for r in rows]
    note = (
        "Mean score over the logarithm of the budget for an attacker who takes the first blocks"
        " and starts the rest anew. In brackets: the share that keeps of the whole unprotected"
        " model's lead over a fresh network. Two attacks a row, the first attack seed: not the"
        " attacks, nor the measure, of the advantage removed."
    )
    return table(("blocks kept", *SUBJECTS), cells, note)


def data_sizes(found: DataSizes, kind: MetricKind) -> Table:
    """Return the best score by share of the training images, and the mean over their logarithm."""
    names = [name for name in SUBJECTS if name in found.reached]
    rows = [
        (f"{100 * share:.3g} %", *(kind.shown(found.reached[name][i]) for name in names))
        for i, share in enumerate(found.shares)
    ]
    rows.append(("area", *(kind.shown(found.areas[name]) for name in names)))
    note = (
        f"Best validation score within {found.steps} steps of one attack, the first seed; area is"
        " the mean over the logarithm of the share."
    )
    return table(("images", *names), rows, note)


# --- Pictures and timesteps of a diffusion model --------------------------------------------------


def quarters(record: AuditRecord, summary: DomainSummary) -> Table | None:
    """Return the winners' test errors in each quarter of the timesteps; None where there are none.

    The originals' stand below.
    """
    held = [(f"{n}, attacked", s.test) for n, s in summary.subjects.items()]
    held += [(f"{s.name}, {record.original.name}", s.original) for s in record.subjects]
    rows = [
        (name, *(f"{value:.4f}" for value in (*score.quarters, score.mse)))
        for name, score in held
        if isinstance(score, ErrorScore) and score.quarters
    ]
    if not rows:
        return None
    note = "Mean squared error on test images; the first quarter of timesteps has the least noise."
    return table(("subject", "quarter 1", "quarter 2", "quarter 3", "quarter 4", "all"), rows, note)


def pictures(record: AuditRecord, domain: str) -> Table | None:
    """Return how far drawn pictures are from real ones; None where none were drawn."""
    held = _by_moment(tuple(row for row in record.samples if row.attacked == domain))
    if not held:
        return None
    columns: dict[str, Callable[[SampleRecord], str]] = {
        "subject": lambda row: row.subject,
        "when": when,
        "compared with": lambda row: row.domain,
        "KID": lambda row: f"{row.kid:.4f} ({row.kid_std:.4f})",
        "FID": lambda row: f"{row.fid:.2f}",
        "precision": lambda row: percent(row.precision, 0),
        "recall": lambda row: percent(row.recall, 0),
    }
    one = held[0]
    note = (
        f"{one.count} pictures each, DDIM in {one.steps} steps from the same noise, against"
        f" {', '.join(sorted({f'{row.images} test images of {row.domain}' for row in held}))}."
        f" Features: {one.extractor}, {one.features} of them. Distances on other features are other"
        " numbers. In brackets: standard deviation over KID's subsets."
    )
    return by_column(held, columns, note)


def sheets(record: AuditRecord, domain: str) -> list[tuple[str, str]]:
    """Return captions and data URIs of the pictures of each subject."""
    return [
        (f"{row.subject}, {when(row)}{_won_by(row)}", row.grid)
        for row in _by_moment(pictures_of(record, domain))
        if row.grid
    ]


def _by_moment(rows: tuple[SampleRecord, ...]) -> list[SampleRecord]:
    """Return the rows with the subjects side by side at each moment, in the order of moments."""
    moments = list(dict.fromkeys(moment(row) for row in rows))
    return sorted(rows, key=lambda row: moments.index(moment(row)))


def _won_by(row: SampleRecord) -> str:
    return f": {row.attack}" if row.attack and not row.named else ""


# --- Other domains --------------------------------------------------------------------------------

_BENIGN_WORDS = {
    "withstood": "blocked",
    "slowed": "held back",
    "not protected": "can be learnt",
    "void": "cannot be told",
}


def secondary_table(
    summaries: Sequence[DomainSummary], *, benign: bool, narrower: int = 0
) -> Table:
    """Return the table of held-out or of benign domains; `narrower` is with how many attacks they
    were attacked where these are fewer than the restricted domains' own.
    """

    def tested(name: Subject) -> Callable[[DomainSummary], str]:
        return lambda s: shown(s.subjects[name].test) if name in s.subjects else NONE

    columns: dict[str, Callable[[DomainSummary], str]] = {
        "domain": lambda s: s.domain.name,
        "verdict": lambda s: _BENIGN_WORDS[s.verdict] + s.factor if benign else s.text,
        "advantage removed": lambda s: removed_text(s.advantage),
        "cost multiplier": lambda s: ratio_text(s.slowing),
        **{f"{name}, test": tested(name) for name in SUBJECTS},
        "flags": lambda s: ", ".join(flag.name for flag in s.flags) or "none",
    }
    note = (
        "What protection is not meant to block: here little should be removed."
        if benign
        else "Restricted tasks that protection was not given: whether it holds beyond those it was."
    )
    if narrower:
        note += (
            f" Attacked with {narrower} attacks alone, without a search and with at most three"
            " seeds: a good verdict here says less than one above."
        )
    return by_column(summaries, columns, note)


def verdict_table(summaries: Sequence[DomainSummary], record: AuditRecord) -> list[tuple[str, ...]]:
    """Return what a terminal shows: a row for each subject, a header row first."""
    shared = shared_fields(trial.strategy for trial in record.trials)
    columns: dict[str, Callable[[tuple[DomainSummary, SubjectSummary]], str]] = {
        "restricted domain": lambda pair: pair[0].domain.name,
        "subject": lambda pair: pair[1].name,
        "best validation": lambda pair: pair[0].kind.shown(pair[1].best),
        "test": lambda pair: score_text(pair[1].test),
        "winning attack": lambda pair: pair[1].winner.strategy.label(shared),
        "verdict": lambda pair: pair[0].text if pair[1].name == "protected" else "",
    }
    made = by_column([(d, s) for d in summaries for s in d.subjects.values()], columns)
    return [made.header, *made.rows]
