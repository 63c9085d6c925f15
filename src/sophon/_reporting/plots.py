"""Pictures of an audit as inline SVG. No torch, no scripts.

Subjects differ in dash and marker as well as in colour, and carry their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sophon._judgement.depth import DepthRow
from sophon._judgement.parts import SUBJECTS
from sophon._judgement.statistics import best_of
from sophon._judgement.summaries import DomainSummary
from sophon._judgement.survival import Recovery
from sophon._records.audit_record import Trial
from sophon._records.metrics import MetricKind
from sophon._records.statement import ReadersFound
from sophon._specs import Strategy

# Text must fit at 15 units, too: on a phone the style sheet makes it as large.
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 34, 50
_EDGE = _WIDTH - _RIGHT
_DASHES = {"protected": "", "unprotected": "7 4", "scratch": "2 4"}
_TICK_ROOM = 42


@dataclass(frozen=True)
class _Axis:
    """Maps values onto a stretch of the picture, on a linear or a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    scale: Callable[[float], float] = float
    tick: float = 0.1

    def __call__(self, value: float) -> float:
        first, last = self.scale(self.low), self.scale(self.high)
        share = (self.scale(value) - first) / (last - first) if last > first else 0.5
        return self.start + share * (self.end - self.start)


def _scores(values: Iterable[float], start: float, end: float, kind: MetricKind) -> _Axis:
    """Return an axis of scores in [0, 1] from whole mark to whole mark, tenths of accuracy."""
    held = list(values)
    tick = kind.tick(max(held) - min(held))
    low = min(1.0 - tick, max(0.0, math.floor(min(held) / tick + 1e-9) * tick))
    high = max(low + tick, min(1.0, math.ceil(max(held) / tick - 1e-9) * tick))
    return _Axis(low, high, start, end, tick=tick)


def _steps(budgets: Sequence[int]) -> _Axis:
    return _Axis(budgets[0], max(budgets[-1], budgets[0] + 1), _LEFT, _EDGE, math.log)


def _svg(title: str, parts: Sequence[str], height: float = _HEIGHT) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _ticks(axis: _Axis) -> list[float]:
    count = round((axis.high - axis.low) / axis.tick)
    return [axis.low + axis.tick * i for i in range(0, count + 1, 1 if count <= 5 else 2)]


def _score_grid(axis: _Axis, kind: MetricKind) -> list[str]:
    """Return horizontal lines with their scores at the left."""
    return [part for v in _ticks(axis) for part in _grid_line(axis(v), kind.show(v, 0))]


def _grid_line(y: float, words: str) -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{_EDGE}" y1="{y:.1f}" y2="{y:.1f}"/>',
        _text(_LEFT - 6, y + 5, words, "end"),
    ]


def _below(axis: _Axis, values: Sequence[int], height: float, title: str) -> list[str]:
    """Return the ticks below a picture, the last first, as many as have room, and a title."""
    base, parts, last = height - _BOTTOM, [], math.inf
    for value in reversed(values):
        x = axis(value)
        if last - x < _TICK_ROOM:
            continue
        last = x
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{base:.0f}" y2="{base + 5:.0f}"/>'
            + _text(x, base + 20, str(value))
        )
    parts.append(_text((_LEFT + _EDGE) / 2, height - 8, title))
    return parts


def _legend(names: Iterable[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for name in names:
        line = f'<path d="M{x:.0f} 14 h26" stroke-dasharray="{_DASHES[name]}"/>'
        words = _text(x + 33, 19, name, "start", f"name {name}")
        parts.append(f'<g class="{name} line">{line}{_mark(name, x + 13, 14)}</g>{words}')
        x += 48 + 9.2 * len(name)
    return parts


def _mark(name: str, x: float, y: float) -> str:
    if name == "protected":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    if name == "unprotected":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    return f'<path class="mark" d="M{x:.1f} {y - 4:.1f} l4 7 h-8 z"/>'


def _line(name: str, points: Sequence[tuple[float, float]], *, marks: bool = True) -> str:
    along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    held = "".join(_mark(name, x, y) for x, y in points) if marks else ""
    return (
        f'<g class="{name}"><polyline points="{along}" stroke-dasharray="{_DASHES[name]}"/>'
        f"{held}</g>"
    )


def envelope_plot(summary: DomainSummary) -> Markup:
    """Return the envelope of each subject over the budget.

    Lines are means over seeds of each seed's envelope, bands their bootstrap intervals.
    """
    if not summary.subjects or not summary.budgets:
        return Markup("<p>No attack was measured.</p>")
    bounds = [bound for s in summary.subjects.values() for pair in s.band for bound in pair]
    x, y = _steps(summary.budgets), _scores(bounds, _HEIGHT - _BOTTOM, _TOP, summary.kind)
    title = "attack budget, optimizer steps (logarithmic)"
    parts = [*_score_grid(y, summary.kind), *_below(x, summary.budgets, _HEIGHT, title)]
    for name, subject in summary.subjects.items():
        pairs = list(zip(summary.budgets, subject.band, strict=True))
        edge = [(x(b), y(i.high)) for b, i in pairs] + [(x(b), y(i.low)) for b, i in pairs[::-1]]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in edge)
        parts.append(f'<g class="{name}"><polygon class="band" points="{points}"/></g>')
        along = zip(summary.budgets, subject.mean, strict=True)
        parts.append(_line(name, [(x(b), y(v)) for b, v in along]))
    parts += _legend(summary.subjects)
    return _svg(f"Best score on {summary.domain.name} within a budget of steps", parts)


# --- Cost to recover ------------------------------------------------------------------------------

_ROW = 50


def recovery_plot(summary: DomainSummary) -> Markup:
    """Return what each subject cost to recover: a bar to the median seed, a mark for each seed.

    A seed that had not got there at the horizon is an arrow at its end: censored, not dropped.
    """
    known = {n: s.recoveries.get("unprotected") for n, s in summary.subjects.items()}
    held = {name: costs for name, costs in known.items() if costs and costs.costs}
    if not held or not summary.budgets:
        return Markup("")
    height = 10 + _ROW * len(held) + _BOTTOM
    axis = _steps(summary.budgets)
    parts = _below(axis, summary.budgets, height, "steps to recover (logarithmic)")
    for position, (name, costs) in enumerate(held.items()):
        parts += _recovery_bar(axis, name, costs, 4 + _ROW * position)
    return _svg(f"Steps to {summary.kind.goal} on {summary.domain.name}", parts, height)


def _recovery_bar(axis: _Axis, name: str, costs: Recovery, top: float) -> list[str]:
    end = axis(costs.horizon if costs.median is None else costs.median)
    kind = "bar open" if costs.median is None else "bar"
    marks, apart = [], min(5.0, 18 / len(costs.costs))
    for index, cost in enumerate(costs.costs):
        y = top + 32 + apart * (index - (len(costs.costs) - 1) / 2)
        if cost.steps is None:
            x = axis(cost.horizon) + 4
            marks.append(f'<path class="seed" d="M{x:.1f} {y - 3.5:.1f} l7 3.5 l-7 3.5 z"/>')
        else:
            marks.append(f'<circle class="seed" cx="{axis(cost.steps):.1f}" cy="{y:.1f}" r="3"/>')
    median = f"more than {costs.horizon}" if costs.median is None else str(costs.median)
    late = f", {costs.censored} of {len(costs.costs)} seeds never" if costs.censored else ""
    words = f"{name}: {median} steps{late}"
    return [
        f'<g class="{name}"><rect class="{kind}" x="{_LEFT}" y="{top + 22:.0f}"'
        f' width="{max(2.0, end - _LEFT):.1f}" height="20"/>{"".join(marks)}</g>',
        _text(_LEFT, top + 16, words, "start", f"name {name}"),
    ]


# --- Best so far ----------------------------------------------------------------------------------


def search_plot(summary: DomainSummary, trials: Sequence[Trial]) -> Markup:
    """Return the best score after each trial, in the order they were run, for each subject.

    `trials` are the domain's with one seed.
    """
    curves: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for trial in trials:
        held = curves[trial.subject]
        held.append(max(best_of(trial), held[-1] if held else 0.0))
    curves = {name: values for name, values in curves.items() if values}
    if not curves:
        return Markup("")
    last = max(2, *map(len, curves.values()))
    x = _Axis(1, last, _LEFT, _EDGE)
    scores = (v for values in curves.values() for v in values)
    y = _scores(scores, _HEIGHT - _BOTTOM, _TOP, summary.kind)
    counts = sorted({1, *(round(last * share / 4) for share in range(1, 5))} - {0})
    parts = [
        *_score_grid(y, summary.kind),
        *_below(x, counts, _HEIGHT, "trials on each subject, in order"),
    ]
    for name, values in curves.items():
        # A flat stretch is one line: only where it rises, and its end, are points.
        corners = []
        for index, value in enumerate(values):
            if index and value > values[index - 1]:
                corners.append((x(index + 1), y(values[index - 1])))
            if not index or value > values[index - 1] or index == len(values) - 1:
                corners.append((x(index + 1), y(value)))
        parts.append(_line(name, corners, marks=False))
        parts.append(f'<g class="{name}">{_mark(name, *corners[-1])}</g>')
    parts += _legend(curves)
    return _svg(f"Best score so far over the trials on {summary.domain.name}", parts)


# --- Distribution ---------------------------------------------------------------------------------


def strip_plot(summary: DomainSummary, bests: Mapping[str, Mapping[Strategy, float]]) -> Markup:
    """Return each attack's best score as a dot, a row for each subject; the worst case is named."""
    rows = {name: sorted(held.values()) for name, held in bests.items() if held}
    if not rows:
        return Markup("")
    height = 10 + _ROW * len(rows) + _BOTTOM
    scores = (v for values in rows.values() for v in values)
    axis = _scores(scores, _LEFT - 20, _EDGE, summary.kind)
    base = height - _BOTTOM
    parts = [
        f'<line class="grid" x1="{axis(v):.1f}" x2="{axis(v):.1f}" y1="4" y2="{base + 5:.0f}"/>'
        + _text(axis(v), base + 20, summary.kind.show(v, 0))
        for v in _ticks(axis)
    ]
    parts.append(_text((_LEFT + _EDGE) / 2, height - 8, "best validation score of each attack"))
    for position, (name, values) in enumerate(rows.items()):
        middle = 4 + _ROW * position + 34
        # Apart from each other by place alone: the same dots wherever the page is made.
        heights = [middle + 1.2 * (index * 7 % 11 - 5) for index in range(len(values))]
        dots = "".join(
            f'<circle class="dot" cx="{axis(v):.1f}" cy="{y:.1f}" r="2.6"/>'
            for v, y in zip(values, heights, strict=True)
        )
        at = axis(values[len(values) // 2])
        worst = f'<circle class="ring" cx="{axis(values[-1]):.1f}" cy="{middle:.1f}" r="7"/>'
        median = f'<path class="seed" d="M{at:.1f} {middle - 12:.1f} v24"/>'
        words = f"{name}: worst case {summary.kind.show(values[-1], 1)}"
        parts.append(f'<g class="{name}">{dots}{worst}{median}</g>')
        parts.append(_text(_LEFT - 20, middle - 16, words, "start", f"name {name}"))
    return _svg(f"How the attacks' best scores on {summary.domain.name} spread", parts, height)


# --- Depth ----------------------------------------------------------------------------------------


def depth_plot(summary: DomainSummary, rows: Sequence[DepthRow]) -> Markup:
    """Return the area under each subject's envelope by how many blocks the attacker keeps."""
    if not rows:
        return Markup("")
    kept = [row.kept for row in rows]
    x = _Axis(kept[0], max(kept[-1], kept[0] + 1), _LEFT, _EDGE)
    scores = (v for row in rows for v in row.areas.values())
    y = _scores(scores, _HEIGHT - _BOTTOM, _TOP, summary.kind)
    parts = [
        *_score_grid(y, summary.kind),
        *_below(x, kept, _HEIGHT, "first blocks kept, the rest anew"),
    ]
    names = [name for name in SUBJECTS if all(name in row.areas for row in rows)]
    for name in names:
        parts.append(_line(name, [(x(row.kept), y(row.areas[name])) for row in rows]))
    parts += _legend(names)
    return _svg(f"Advantage by depth on {summary.domain.name}", parts)


def readers_plot(domain: str, found: ReadersFound) -> Markup:
    """Return what the best reader finds at each depth before and after protection, and on fresh
    networks. Below 0, where a reader is worse than the mean, the axis ends.
    """
    rows = {"protected": found.protected, "unprotected": found.given, "scratch": found.fresh}
    last = len(found.depths)
    x = _Axis(1, max(2, last), _LEFT, _EDGE)
    y = _Axis(
        0.0, max(0.2, math.ceil(10 * max(map(max, rows.values()))) / 10), _HEIGHT - _BOTTOM, _TOP
    )
    parts = [
        *(part for value in _ticks(y) for part in _grid_line(y(value), f"{value:.1f}")),
        *_below(x, range(1, last + 1), _HEIGHT, "block, from the first to the last"),
    ]
    for name, row in rows.items():
        along = enumerate(row, start=1)
        parts.append(_line(name, [(x(depth), y(max(0.0, value))) for depth, value in along]))
    parts += _legend(rows)
    return _svg(f"R2 of the best reader on {domain} by depth", parts)
