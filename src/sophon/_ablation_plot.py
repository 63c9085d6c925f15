"""The pictures of the ablation study. No torch; matplotlib is imported only here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sophon._ablation import AXES, Result, Variation
from sophon._base.errors import SpecError

# Rounds are averaged over so many before they are drawn: single ones are noise.
_SMOOTHED = 10
_COLUMNS = 4


def draw(held: dict[str, Result], file: Path) -> None:
    """Write the study's figure: per axis what was removed and what the original task lost, and
    the course of each loss over the rounds.
    """
    plots = _matplotlib()
    rows = 2 + -(-len(AXES) // _COLUMNS)
    figure, axes = plots.subplots(rows, _COLUMNS, figsize=(14, 3.1 * rows), squeeze=False)
    panels = list(axes.flat)
    for panel, (name, values) in zip(panels, AXES.items(), strict=False):
        _values(panel, name, [v for v in values if v.name in held], held)
    course = panels[(rows - 2) * _COLUMNS :]
    for panel in panels[len(AXES) : (rows - 2) * _COLUMNS]:
        panel.set_axis_off()
    losses = [v for v in AXES["loss"] if v.name in held]
    for index, variation in enumerate(losses):
        _course(course[index], course[index + _COLUMNS], variation, held[variation.name])
    for index in range(len(losses), _COLUMNS):
        course[index].set_axis_off()
        course[index + _COLUMNS].set_axis_off()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plots.close(figure)


def _values(panel: Any, name: str, values: list[Variation], held: dict[str, Result]) -> None:
    """Draw the advantage removed, with its interval, and what the original task lost."""
    panel.axhline(0, color="#9ca3af", linewidth=0.8)
    for place, variation in enumerate(values):
        result = held[variation.name]
        estimate = result.summary.advantage
        if estimate.value is not None:
            value = 100 * estimate.value
            panel.plot(place, value, "o", color="#c2410c")
            if estimate.interval is not None:
                ends = [100 * end for end in estimate.interval]
                panel.vlines(place, *ends, color="#c2410c")
        if result.before is not None and result.after is not None:
            lost = 100 * (result.before.value - result.after.value)
            panel.plot(place, lost, "s", color="#1d4ed8", fillstyle="none")
    # Names of several words would run into each other.
    labels = [v.value.replace("_", "\n") + ("" if v.settings else "\n(base)") for v in values]
    panel.set_xticks(range(len(values)), labels)
    panel.set_xlim(-0.5, max(0.5, len(values) - 0.5))
    panel.set_title(name)
    panel.set_ylabel("advantage removed, % (dots)\noriginal lost, points (squares)", fontsize=7)


def _course(losses: Any, scores: Any, variation: Variation, result: Result) -> None:
    """Draw the suppression loss over the rounds, and below it the query score and the guard's."""
    rounds = result.rounds
    at = range(0, len(rounds) - len(rounds) % _SMOOTHED, _SMOOTHED)
    blocks = [rounds[start : start + _SMOOTHED] for start in at] or [rounds]
    middle = [sum(r.index for r in block) / len(block) for block in blocks]
    losses.plot(
        middle, [sum(r.suppression_loss for r in b) / len(b) for b in blocks], color="#c2410c"
    )
    losses.set_title(f"{variation.value}: suppression loss", fontsize=9)
    query = [100 * sum(r.query_score for r in b) / len(b) for b in blocks]
    scores.plot(middle, query, color="#c2410c", label="query score")
    guarded = [(r.index, 100 * r.guard_score) for r in rounds if r.guard_score is not None]
    scores.plot(*zip(*guarded, strict=True), color="#1d4ed8", label="original")
    scores.set_ylim(0, 100)
    scores.set_title(f"{variation.value}: scores over the rounds, %", fontsize=9)
    scores.legend(fontsize=7)


def _matplotlib() -> Any:
    """Return pyplot, drawing to files. Raises SpecError where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise SpecError(
            f"matplotlib cannot be imported ({error}): the study's figure needs it: pip install"
            " 'sophon-protect[demo]'"
        ) from None


def require_matplotlib() -> None:
    """Raise SpecError, before any work, unless the figure can be drawn."""
    _matplotlib()
