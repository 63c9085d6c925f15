"""Pictures of an audit as inline SVG and HTML tables. No torch, no scripts.

Curves differ in dash and marker as well as in colour, and carry their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from sophon._records import Trial
from sophon._specs import Strategy, Subject, shared_fields
from sophon._statistics import best_of
from sophon._verdict import DomainSummary, SubjectSummary

SUBJECTS: tuple[Subject, ...] = ("protected", "unprotected", "scratch")

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 136, 18, 46
_DASHES = {"protected": "", "unprotected": "7 4", "scratch": "2 4"}


class _Axes:
    """Maps budgets (logarithmic) and scores (linear) to picture coordinates."""

    def __init__(self, summary: DomainSummary) -> None:
        steps = summary.budgets
        self.first, self.last = steps[0], max(steps[-1], steps[0] + 1)
        spreads = [i for s in summary.subjects.values() for i in s.spread]
        top = max(i.high for i in spreads)
        bottom = min(i.low for i in spreads)
        self.low = max(0.0, math.floor(bottom * 10) / 10)
        self.high = max(self.low + 0.1, min(1.0, math.ceil(top * 10) / 10))

    def x(self, step: float) -> float:
        share = math.log(step / self.first) / math.log(self.last / self.first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def envelope_plot(summary: DomainSummary) -> Markup:
    """Return the envelope of each subject over the budget as inline SVG.

    Lines are means over seeds of each seed's envelope, bands the range over seeds.
    """
    if not summary.subjects or not summary.budgets:
        return Markup("<p>No attack was measured.</p>")
    axes = _Axes(summary)
    parts = [*_grid(axes, summary.budgets)]
    for subject in summary.subjects.values():
        parts += _curve(axes, summary.budgets, subject)
    parts += _labels(axes, summary)
    title = escape(f"Best score on {summary.domain.name} within a budget of steps")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        + "".join(parts)
        + "</svg>"
    )


def _grid(axes: _Axes, budgets: Sequence[int]) -> list[str]:
    parts = []
    count = round((axes.high - axes.low) * 10)
    for tick in range(0, count + 1, 1 if count <= 6 else 2):
        value = axes.low + tick / 10
        y = axes.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.0f} %</text>'
        )
    last = -math.inf
    for budget in budgets:
        x = axes.x(budget)
        if x - last < 34:
            continue
        last = x
        base = _HEIGHT - _BOTTOM
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>'
            f'<text x="{x:.1f}" y="{base + 19}" text-anchor="middle">{budget}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
        "attack budget, optimizer steps (logarithmic)</text>"
    )
    return parts


def _curve(axes: _Axes, budgets: Sequence[int], subject: SubjectSummary) -> list[str]:
    along = [(axes.x(b), axes.y(v)) for b, v in zip(budgets, subject.mean, strict=True)]
    upper = [(axes.x(b), axes.y(i.high)) for b, i in zip(budgets, subject.spread, strict=True)]
    lower = [(axes.x(b), axes.y(i.low)) for b, i in zip(budgets, subject.spread, strict=True)]
    band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in along)
    marks = "".join(_mark(subject.name, x, y) for x, y in along)
    return [
        f'<g class="{subject.name}"><polygon class="band" points="{band}"/>'
        f'<polyline points="{line}" stroke-dasharray="{_DASHES[subject.name]}"/>{marks}</g>'
    ]


def _mark(name: str, x: float, y: float) -> str:
    if name == "protected":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if name == "unprotected":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    return f'<path d="M{x:.1f} {y - 4:.1f} l4 7 h-8 z"/>'


def _labels(axes: _Axes, summary: DomainSummary) -> list[str]:
    """Return the curves' names at their right ends, moved apart where they would overlap."""
    ends = sorted((axes.y(s.mean[-1]), s.name) for s in summary.subjects.values())
    placed: list[tuple[float, str]] = []
    for y, name in ends:
        lowest = placed[-1][0] + 16 if placed else -math.inf
        placed.append((max(y, lowest), name))
    x = _WIDTH - _RIGHT + 10
    return [
        f'<text class="name {name}" x="{x}" y="{y + 4:.1f}">{name}</text>' for y, name in placed
    ]


# --- Cost to recover ----------------------------------------------------------------------------

_ROW = 46


def recovery_plot(summary: DomainSummary) -> Markup:
    """Return what each subject cost to recover: a bar to the median seed, a mark for each seed.

    A seed that had not got there at the horizon is an arrow at its end: censored, not dropped.
    """
    held = [s for s in summary.subjects.values() if s.recovery is not None and s.recovery.costs]
    if not held or not summary.budgets:
        return Markup("")
    height = _TOP + _ROW * len(held) + _BOTTOM
    axes = _Axes(summary)
    parts = _steps_axis(axes, summary.budgets, height - _BOTTOM, "steps to recover (logarithmic)")
    for position, subject in enumerate(held):
        parts += _recovery_bar(axes, subject, _TOP + _ROW * position)
    title = escape(f"Steps to reach 90 % of the unprotected model's best on {summary.domain.name}")
    return _svg(title, parts, height)


def _recovery_bar(axes: _Axes, subject: SubjectSummary, top: float) -> list[str]:
    costs = subject.recovery
    assert costs is not None  # noqa: S101 - those without were left out
    end = axes.x(costs.horizon if costs.median is None else costs.median)
    open_end = ' fill-opacity=".2" stroke-dasharray="4 3"' if costs.median is None else ""
    marks = []
    for index, cost in enumerate(costs.costs):
        y = top + 23 + 4 * (index - (len(costs.costs) - 1) / 2)
        if cost.steps is None:
            x = axes.x(cost.horizon) + 4
            marks.append(f'<path class="seed" d="M{x:.1f} {y - 4:.1f} l7 4 l-7 4 z"/>')
        else:
            marks.append(f'<circle class="seed" cx="{axes.x(cost.steps):.1f}" cy="{y:.1f}" r="3"/>')
    median = f"more than {costs.horizon}" if costs.median is None else str(costs.median)
    late = f", {costs.censored} of {len(costs.costs)} not reached" if costs.censored else ""
    return [
        f'<g class="{subject.name}"><rect class="bar" x="{_LEFT}" y="{top + 14}"'
        f' width="{max(2.0, end - _LEFT):.1f}" height="18"{open_end}/>{"".join(marks)}</g>'
        f'<text class="name {subject.name}" x="{_LEFT}" y="{top + 9}">{subject.name}: {median}'
        f" steps{late}</text>"
    ]


# --- Best so far --------------------------------------------------------------------------------


def search_plot(summary: DomainSummary, trials: Sequence[Trial]) -> Markup:
    """Return the best score after each attack tried, in the order they were run, for each subject.

    `trials` are the domain's with one seed.
    """
    curves: dict[str, list[float]] = {}
    for trial in trials:
        held = curves.setdefault(trial.subject, [])
        held.append(max(best_of(trial), held[-1] if held else 0.0))
    if not curves:
        return Markup("")
    last = max(2, max(map(len, curves.values())))
    axes = _Axes(summary, low=0.0)
    right = _WIDTH - _RIGHT

    def x(count: int) -> float:
        return _LEFT + (count - 1) / (last - 1) * (right - _LEFT)

    base = _HEIGHT - _BOTTOM
    parts = _scores_axis(axes)
    for count in sorted({1, *(round(last * share / 4) for share in range(1, 5))} - {0}):
        parts.append(
            f'<text x="{x(count):.1f}" y="{base + 19}" text-anchor="middle">{count}</text>'
        )
    parts.append(_axis_title("attacks tried on each subject"))
    for name, values in curves.items():
        line = " ".join(f"{x(i + 1):.1f},{axes.y(v):.1f}" for i, v in enumerate(values))
        parts.append(
            f'<g class="{name}"><polyline points="{line}" stroke-dasharray="{_DASHES[name]}"/></g>'
        )
    parts += _end_labels({name: axes.y(values[-1]) for name, values in curves.items()})
    title = escape(f"Best score so far over the attacks tried on {summary.domain.name}")
    return _svg(title, parts, _HEIGHT)


# --- Heat map -----------------------------------------------------------------------------------


def heat_map(trials: Sequence[Trial], subject: str) -> Markup:
    """Return a table of the best score on a subject by attack (rows) and learning rate (columns).

    Rates are gathered in half decades; the number stands in each cell, the shade repeats it.
    """
    held = [trial for trial in trials if trial.subject == subject and trial.curve]
    if not held:
        return Markup("")
    shared = shared_fields(_without_rate(trial.strategy) for trial in trials)
    cells: dict[str, dict[int, float]] = {}
    for trial in held:
        row = cells.setdefault(_family(trial.strategy, shared), {})
        column = _half_decade(trial.strategy.learning_rate)
        row[column] = max(row.get(column, 0.0), best_of(trial))
    found = [column for row in cells.values() for column in row]
    columns = range(min(found), max(found) + 1)
    head = "".join(f"<th>{_rate(column)}</th>" for column in columns)
    rows = []
    for name, row in sorted(cells.items()):
        values = "".join(_heat_cell(row.get(column)) for column in columns)
        rows.append(f"<tr><td>{escape(name)}</td>{values}</tr>")
    return Markup(f'<table class="heat"><tr><th>attack</th>{head}</tr>{"".join(rows)}</table>')


def _heat_cell(value: float | None) -> str:
    if value is None:
        return '<td class="none"></td>'
    return f'<td style="--heat:{100 * value:.0f}%">{100 * value:.0f}</td>'


def _without_rate(strategy: Strategy) -> Strategy:
    return strategy.model_copy(update={"learning_rate": 1.0})


def _family(strategy: Strategy, shared: frozenset[str]) -> str:
    text = _without_rate(strategy).label(shared)
    return text.replace(f" {strategy.optimizer} 1", f" {strategy.optimizer}", 1)


def _half_decade(rate: float) -> int:
    return round(2 * math.log10(rate))


def _rate(column: int) -> str:
    return f"{10 ** (column / 2):.1g}" if abs(column) < 8 else f"{10 ** (column / 2):.0e}"
