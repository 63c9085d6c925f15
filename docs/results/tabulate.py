"""Turn finished audits into the table and the figure of a results page.

    python docs/results/tabulate.py FIGURE.svg "label=runs/a1" "label=runs/a2" ...
    python docs/results/tabulate.py FIGURE.svg runs/a1

The first prints one Markdown row per audit and restricted domain; the figure has one panel each.
The second draws what readers found by depth on an audit's first restricted domain.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from sophon._base.errors import SophonError
from sophon._cli.reading import read_record
from sophon._judgement.statistics import Cost, wilson
from sophon._judgement.summaries import DomainSummary
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord, Score
from sophon._records.statement import stated
from sophon._reporting.plots import readers_plot

COLOURS = {"protected": "#c2410c", "unprotected": "#1d4ed8", "scratch": "#6b7280"}
STYLE = (
    "svg{background:#fff} text{font:15px sans-serif} .grid{stroke:#ccc}"
    + "".join(f" .{name}{{stroke:{c};fill:{c}}}" for name, c in COLOURS.items())
    + " polyline{fill:none;stroke-width:2} text{stroke:none}"
)
HEADER = (
    "| protection | original test, before and after | best attack, test (95 %) | won by |"
    " steps to 90 % | advantage removed (95 %) | verdict |\n|---|---|---|---|---|---|---|"
)


def _score(score: Score | None) -> str:
    return "-" if score is None else f"{100 * score.value:.1f} %"


def _interval(score: Score | None) -> str:
    if score is None:
        return "-"
    low, high = wilson(score)
    return f"{_score(score)} ({100 * low:.1f} to {100 * high:.1f})"


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "-"
    return f"over {cost.horizon}" if cost.steps is None else str(cost.steps)


def _advantage(summary: DomainSummary) -> str:
    estimate = summary.advantage
    if estimate.value is None:
        return estimate.reason
    interval = estimate.interval
    spread = ""
    if interval is not None:
        spread = f" ({100 * interval.low:z.0f} to {100 * interval.high:z.0f})"
    return f"{100 * estimate.value:z.0f} %{spread}"


def rows(label: str, record: AuditRecord, summary: DomainSummary) -> list[str]:
    """Return the Markdown rows of one domain: protected, and what it is compared with."""
    scores = {subject.name: subject.original for subject in record.subjects}
    lines = []
    for name in ("protected", "unprotected", "scratch"):
        held = summary.subjects.get(name)
        if held is None:
            continue
        first = name == "protected"
        kept = f"{_score(scores['unprotected'])}, {_score(scores['protected'])}" if first else ""
        cells = [
            label if first else f"({name}, {summary.domain.name})",
            kept,
            _interval(held.test),
            held.winner.strategy.label(),
            _cost(held.costs.get("unprotected")),
            _advantage(summary) if first else "",
            summary.text if first else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def panel(axes: plt.Axes, label: str, summary: DomainSummary) -> None:
    """Draw the three envelopes, mean over attack seeds with its bootstrap interval."""
    for name, held in summary.subjects.items():
        steps = [point.step for point in held.points]
        mean = [100 * value for value in held.mean]
        low, high = ([100 * pair[i] for pair in held.band] for i in (0, 1))
        axes.plot(steps, mean, color=COLOURS[name], label=name, linewidth=1.6)
        axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_title(label, fontsize=9)
    axes.grid(alpha=0.25)


def main(figure: str, *named: str) -> None:
    """Print the table and write the figure."""
    plt.switch_backend("svg")
    plt.rcParams["svg.fonttype"] = "none"
    panels = []
    pairs = [one.partition("=")[::2] for one in named]
    audits = [(label, read_record(Path(folder))) for label, folder in pairs]
    print(HEADER)
    for label, record in audits:
        for summary in summarise(record):
            panels.append((label, summary))
            print("\n".join(rows(label, record, summary)))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (4.4 * columns, 2.7 * lines + 0.4)
    picture, grid = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, summary) in zip(grid.flat, panels, strict=False):
        panel(axes, label, summary)
    for axes in grid[:, 0]:
        axes.set_ylabel("restricted, validation %")
    for axes in grid[-1]:
        axes.set_xlabel("attack steps")
    grid[0, 0].legend(fontsize=8, loc="lower right")
    picture.tight_layout()
    picture.savefig(figure, metadata={"Date": None})


def readers(figure: str, folder: str) -> None:
    """Write what the best readers found at each depth, as a figure that stands alone."""
    record = read_record(Path(folder))
    name = record.restricted[0].name
    drawn = str(readers_plot(name, stated(record.protection).readers[name]))
    head, rest = drawn.split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" width="720"')
    Path(figure).write_text(f"{head}><style>{STYLE}</style>{rest}\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        (main if "=" in sys.argv[2] else readers)(*sys.argv[1:])
    except SophonError as error:
        sys.exit(f"error: {error}")
