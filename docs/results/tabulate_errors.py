"""Turn finished audits of diffusion models into the tables and the pictures of a results page.

    python docs/results/tabulate_errors.py FIGURE.svg PICTURES.png "label=runs/a1" ...

Prints Markdown: one row per subject and audit, then the best error within each budget. The figure
shows the envelopes; the pictures are what each subject draws before and after its best attack.
"""

from __future__ import annotations

import base64
import io
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from sophon._base.errors import SophonError
from sophon._cli.reading import read_record
from sophon._judgement.parts import SUBJECTS
from sophon._judgement.pictures import moment, pictures_of
from sophon._judgement.statistics import interval_of
from sophon._judgement.summaries import DomainSummary
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord, ErrorScore, Measurement, SampleRecord

COLOURS = {"protected": "#c2410c", "unprotected": "#1d4ed8", "scratch": "#6b7280"}
# What the released research code fine-tunes with.
RELEASED = ("sgd", 1e-4)
BEST = "after its best attack"
HEADER = (
    "| protection | subject | original, test | SGD 1e-4, test | best attack, test (95 %) | won by"
    " | KID before, after SGD 1e-4, after the best | FID before, after the best"
    " | precision, recall after"
    " | advantage removed (95 %) | verdict |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def _error(score: Measurement | None) -> str:
    return f"{score.mse:.4f}" if isinstance(score, ErrorScore) else "-"


def _interval(score: Measurement | None) -> str:
    if score is None:
        return "-"
    low, high = interval_of(score)
    return f"{_error(score)} ({1 - high:.4f} to {1 - low:.4f})"


def _released(record: AuditRecord, domain: str, subject: str) -> str:
    """Return the mean test error over seeds after the released code's attack, and its range."""
    held = [
        trial.test.mse
        for trial in record.trials
        if (trial.strategy.optimizer, trial.strategy.learning_rate) == RELEASED
        and (trial.domain, trial.subject) == (domain, subject)
        and isinstance(trial.test, ErrorScore)
    ]
    if not held:
        return "-"
    return f"{statistics.mean(held):.4f} ({min(held):.4f} to {max(held):.4f})"


def _pictures(record: AuditRecord, domain: str, subject: str) -> dict[str, SampleRecord]:
    """Return the pictures of a subject compared with the domain, by when they were drawn."""
    return {moment(row): row for row in pictures_of(record, domain) if row.subject == subject}


def _distance(row: SampleRecord | None) -> str:
    return "-" if row is None else f"{row.kid:.3g}"


def rows(label: str, record: AuditRecord, summary: DomainSummary) -> list[str]:
    """Return the Markdown rows of one domain, a subject each."""
    scores = {subject.name: subject.original for subject in record.subjects}
    estimate, lines = summary.advantage, []
    removed = estimate.reason if estimate.value is None else f"{100 * estimate.value:z.0f} %"
    if estimate.interval is not None:
        removed += f" ({100 * estimate.interval.low:z.0f} to {100 * estimate.interval.high:z.0f})"
    for name in SUBJECTS:
        held = summary.subjects.get(name)
        if held is None:
            continue
        drawn = _pictures(record, summary.domain.name, name)
        after = drawn.get(BEST)
        pair = [drawn.get("as it is"), after]
        named = next((row for row in drawn.values() if row.named), None)
        first = name == "protected"
        cells = [
            label if first else "",
            name,
            _error(scores.get(name)),
            _released(record, summary.domain.name, name),
            _interval(held.test),
            held.winner.strategy.label(),
            ", ".join(_distance(row) for row in (pair[0], named, after)),
            ", ".join("-" if row is None else f"{row.fid:.3g}" for row in pair),
            "-" if after is None else f"{100 * after.precision:.0f} %, {100 * after.recall:.0f} %",
            removed if first else "",
            summary.text if first else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def envelopes(label: str, summary: DomainSummary) -> list[str]:
    """Return the best validation error within each budget over all attacks and seeds."""
    names = [name for name in SUBJECTS if name in summary.subjects]
    lines = [f"| steps, {label} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for position, budget in enumerate(summary.budgets):
        held = [1 - summary.subjects[name].points[position].value for name in names]
        lines.append(f"| {budget} | " + " | ".join(f"{error:.4f}" for error in held) + " |")
    return lines


def distances(label: str, record: AuditRecord, summary: DomainSummary) -> list[str]:
    """Return the KID of pictures after the best attack within each budget that was drawn."""
    names = [name for name in SUBJECTS if name in summary.subjects]
    drawn = {name: _pictures(record, summary.domain.name, name) for name in names}
    budgets = sorted({r.budget for held in drawn.values() for r in held.values() if r.budget})
    if not budgets:
        return []
    lines = [f"| KID, {label} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    moments = [f"{BEST} within {budget} steps" for budget in budgets]
    for title in ("as it is", *moments, BEST):
        cells = [
            "-" if row is None else f"{row.kid:.3g} ({row.kid_std:.2g})"
            for row in (drawn[name].get(title) for name in names)
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def panel(axes: plt.Axes, label: str, summary: DomainSummary) -> None:
    """Draw the three envelopes, mean over attack seeds with its bootstrap interval."""
    for name, held in summary.subjects.items():
        axes.plot(summary.budgets, [1 - v for v in held.mean], color=COLOURS[name], label=name)
        low, high = ([1 - pair[end] for pair in held.band] for end in (1, 0))
        axes.fill_between(summary.budgets, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(label, fontsize=9)
    axes.set_xlabel("attack steps")
    axes.grid(alpha=0.25)


def sheet(drawn: list[tuple[str, SampleRecord, SampleRecord]], file: str) -> None:
    """Write what each subject draws, as it is on the left and after its best attack."""
    figure, grid = plt.subplots(len(drawn), 2, figsize=(9, 1.45 * len(drawn)), squeeze=False)
    for axes, (label, before, after) in zip(grid, drawn, strict=True):
        for place, row, title in zip(axes, (before, after), ("as it is", "attacked"), strict=True):
            data = base64.b64decode(row.grid.partition(",")[2])
            place.imshow(Image.open(io.BytesIO(data)).convert("RGB"))
            place.set_title(f"{label}, {title}: KID {row.kid:.3g}", fontsize=9)
            place.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main(figure: str, pictures: str, *named: str) -> None:
    """Print the tables, and write the figure and the sheet of pictures."""
    plt.switch_backend("agg")
    plt.rcParams["svg.fonttype"] = "none"
    panels: list[tuple[str, AuditRecord, DomainSummary]] = []
    drawn: dict[str, tuple[str, SampleRecord, SampleRecord]] = {}
    pairs = [one.partition("=")[::2] for one in named]
    audits = [(label, read_record(Path(folder))) for label, folder in pairs]
    print(HEADER)
    for label, record in audits:
        for summary in summarise(record):
            panels.append((label, record, summary))
            print("\n".join(rows(label, record, summary)))
            for name in SUBJECTS:
                held = _pictures(record, summary.domain.name, name)
                title = f"protected ({label})" if name == "protected" else name
                if BEST in held:
                    drawn.setdefault(title, (title, held["as it is"], held[BEST]))
    for label, record, summary in panels:
        for table in (envelopes(label, summary), distances(label, record, summary)):
            print("\n" + "\n".join(table))
    draw(panels, figure)
    if drawn:
        sheet(list(drawn.values()), pictures)


def draw(panels: list[tuple[str, AuditRecord, DomainSummary]], figure: str) -> None:
    """Write the envelopes, a panel each."""
    picture, grid = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axes, (label, _, summary) in zip(grid.flat, panels, strict=True):
        panel(axes, label, summary)
    grid[0, 0].set_ylabel("restricted, validation error")
    grid[0, 0].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(figure, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except SophonError as error:
        sys.exit(f"error: {error}")
