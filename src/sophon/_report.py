"""Record to report: one self-contained HTML file, and the same as Markdown. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape

from sophon._files import write_text
from sophon._plots import SUBJECTS, envelope_plot
from sophon._records import AuditRecord, Score
from sophon._specs import shared_fields
from sophon._statistics import Interval, best_of, wilson
from sophon._verdict import DomainSummary, overall, scope, summarise

# What stands where nothing was measured.
NONE = "\u2013"
MEANINGS = {
    "withstood": "In this audit, starting from the protected weights saved an attacker nothing.",
    "slowed": "Attackers still get there, but need more steps than from the unprotected weights.",
    "not protected": "An attacker who tries these attacks gets most of what the weights offer.",
    "untrainable": "The model cannot be fine-tuned to anything, allowed tasks included.",
    "void": "This audit cannot be believed, for the reasons below; it says nothing either way.",
}


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash for none."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def with_interval(value: float, interval: Interval | None, digits: int = 1) -> str:
    """Return a percentage with its 95 % interval."""
    if interval is None:
        return percent(value, digits)
    low, high = (f"{100 * bound:.{digits}f}" for bound in interval)
    return f"{percent(value, digits)} ({low} to {high})"


def score_text(score: Score | None) -> str:
    """Return a score with its Wilson interval, or a dash."""
    return NONE if score is None else with_interval(score.value, wilson(score))


class Report:
    """An audit's report: its verdict, its table, and the two documents."""

    def __init__(self, record: AuditRecord) -> None:
        self.record = record
        self.summaries = summarise(record)
        self.worst = overall(self.summaries)

    @property
    def verdict(self) -> str:
        """The verdict on the model: that of its worst restricted domain."""
        return self.worst.text

    def table(self) -> list[tuple[str, ...]]:
        """Return the verdict table, a header row first."""
        rows: list[tuple[str, ...]] = [
            ("restricted domain", "subject", "best validation", "test", "winning attack", "verdict")
        ]
        shared = shared_fields(trial.strategy for trial in self.record.trials)
        for summary in self.summaries:
            for name, subject in summary.subjects.items():
                rows.append(
                    (
                        summary.domain.name,
                        name,
                        percent(subject.best),
                        score_text(subject.test),
                        subject.winner.strategy.label(shared),
                        summary.text if name == "protected" else "",
                    )
                )
        return rows

    def html(self) -> str:
        """Return the report as one HTML page without scripts or references to anything outside."""
        return _render("report.html.j2", self, escape_html=True)

    def markdown(self) -> str:
        """Return the report as Markdown, for a model card."""
        return _render("report.md.j2", self, escape_html=False)

    def write_html(self, path: str | Path) -> None:
        """Write the HTML page to `path`, whole or not at all."""
        _write(Path(path), self.html())

    def write_markdown(self, path: str | Path) -> None:
        """Write the Markdown text to `path`, whole or not at all."""
        _write(Path(path), self.markdown())


def report(record: AuditRecord) -> Report:
    """Return the report of an audit record. Raises AuditError if it names no restricted domain."""
    return Report(record)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _render(name: str, report: Report, *, escape_html: bool) -> str:
    environment = Environment(
        loader=PackageLoader("sophon"),
        autoescape=escape_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    record = report.record
    scores = {subject.name: subject.original for subject in record.subjects}
    return environment.get_template(name).render(
        report=report,
        record=record,
        summaries=report.summaries,
        meaning=MEANINGS[report.worst.verdict],
        scope=scope(record),
        scoring=_scoring(record),
        facts=[(s, _facts(s)) for s in report.summaries],
        plots={s.domain.name: envelope_plot(s) for s in report.summaries},
        envelopes={s.domain.name: _envelope_rows(s) for s in report.summaries},
        originals=[(n, score_text(scores.get(n))) for n in SUBJECTS[:2] if n in scores],
        trials=[tuple(map(_plain, r)) for r in _trial_rows(record)]
        if not escape_html
        else _trial_rows(record),
        spec=json.dumps(record.spec.model_dump(mode="json", exclude_defaults=False), indent=2),
        protection=None
        if record.protection is None
        else json.dumps(record.protection, indent=2, sort_keys=True),
        percent=percent,
    )


def _scoring(record: AuditRecord) -> str:
    """Return how attackers with BatchNorm were scored; nothing where it made no difference."""
    points = [point for trial in record.trials for point in trial.curve]
    anew = sum(point.reestimated for point in points)
    if not anew:
        return ""
    return (
        "Every attacker is scored as it is and with BatchNorm statistics measured anew on its"
        f" training images; the better score counts, here the latter in {anew} of {len(points)}"
        " measurements."
    )


def _plain(cell: str) -> str:
    """Return `cell` as one Markdown table cell."""
    return str(escape(" ".join(cell.split()))).replace("|", "\\|")


def _facts(summary: DomainSummary) -> list[tuple[str, str]]:
    """Return a domain's key numbers with their names."""
    facts = [("Verdict", summary.text)]
    advantage = summary.advantage
    if advantage.defined and advantage.value is not None:
        facts.append(
            ("Advantage removed", with_interval(advantage.value, advantage.interval, digits=0))
        )
    else:
        facts.append(("Advantage removed", f"undefined: {advantage.reason}"))
    for name, subject in summary.subjects.items():
        test = "" if subject.test is None else f", test {score_text(subject.test)}"
        facts.append((f"Best on {name}", f"{percent(subject.best)} validation{test}"))
    for name, subject in summary.subjects.items():
        if subject.to_unprotected is not None:
            facts.append((f"Steps to recover, {name}", _cost(subject.to_unprotected)))
    if summary.multiplier is not None:
        bound = "at least " if summary.multiplier_is_bound else ""
        facts.append(("Cost multiplier", f"{bound}{summary.multiplier:.1f}"))
    if summary.scratch_fraction is not None:
        bound = "at least " if summary.scratch_fraction_is_bound else ""
        facts.append(("Fraction of scratch cost", f"{bound}{summary.scratch_fraction:.2f}"))
    return facts


def _cost(cost: Any) -> str:
    return f"more than {cost.horizon} (not reached)" if cost.steps is None else f"{cost.steps}"


def _envelope_rows(summary: DomainSummary) -> list[list[str]]:
    rows = []
    for position, budget in enumerate(summary.budgets):
        values = [summary.subjects.get(name) for name in SUBJECTS]
        cells = [percent(v.points[position].value) if v else NONE for v in values]
        rows.append([str(budget), *cells])
    return rows


def _trial_rows(record: AuditRecord) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    shared = shared_fields(trial.strategy for trial in record.trials)
    for trial in record.trials:
        outcome = trial.outcome
        ended: str = outcome.kind
        if outcome.kind == "diverged":
            ended = f"diverged at step {outcome.step}"
        elif outcome.kind == "crashed":
            ended = f"crashed: {outcome.error}"
        rows.append(
            (
                trial.domain,
                trial.subject,
                trial.strategy.label(shared),
                str(trial.seed),
                percent(best_of(trial)) if trial.curve else NONE,
                NONE if trial.best_step is None else str(trial.best_step),
                NONE if trial.test is None else percent(trial.test.value),
                ended,
                f"{trial.wall_s:.1f}",
            )
        )
    return rows
