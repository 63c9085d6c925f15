"""The study of what the paper ablates: one small protection, one setting varied at a time.

Its tables and its figure are filled from stored records. No torch; matplotlib is imported only to
draw.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grid import ABLATION, DATA, HERE
from sameness import settings_in
from sophon._base.errors import CheckpointError, SpecError
from sophon._base.torchvision_patch import installing
from sophon._cli.progress import toml
from sophon._judgement.summaries import DomainSummary
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord, Measurement
from sophon._records.round import Round
from sophon._reporting.tables import removed_text
from sophon._specs import Strategy
from tables import SUBJECTS, Triple, missing_of, origin_of, read_stored, scores_of

BASE = "base"
RUN_FILE = HERE / "small" / f"{ABLATION}.toml"
BASE_FILE = HERE / "small" / f"base-{ABLATION}.toml"


@dataclass(frozen=True)
class Variation:
    """A value of one axis, and the settings (as `--set` takes them) that make it so.

    Without settings it is the study's base, which stands in every axis.
    """

    axis: str
    value: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.axis}-{self.value}".replace(" ", "-") if self.settings else BASE


AXES: dict[str, tuple[Variation, ...]] = {
    axis: tuple(
        Variation(axis, label, () if label == said["base"] else (f"{said['key']}={toml(value)}",))
        for label, value in said["values"].items()
    )
    for axis, said in DATA[ABLATION].items()
}


def variations() -> tuple[Variation, ...]:
    """Return what is run, the base first, nothing twice."""
    held = {v.name: v for values in AXES.values() for v in values}
    return tuple(sorted(held.values(), key=lambda v: v.name != BASE))


# --- Results ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run of the study came to: its rounds, and what the audit says of its domain.

    `mild` is what the suite's mild attack reaches on scratch, unprotected and protected, `seeds`
    how many attack seeds there are, `origin` where the numbers come from, `changes` the keys that
    the command set: with any it is not the study's.
    """

    rounds: tuple[Round, ...]
    summary: DomainSummary
    before: Measurement | None
    after: Measurement | None
    mild: Triple
    seeds: int
    origin: str
    changes: tuple[str, ...]

    @property
    def violations(self) -> int:
        """How often the guard sent the weights back."""
        return sum(held.guard == "violated" for held in self.rounds)


def results(folder: Path) -> dict[str, Result]:
    """Return the finished runs below the study's folder by name. Raises CheckpointError."""
    found = {}
    for variation in variations():
        record = read_stored(folder / variation.name)
        rounds = folder / variation.name / "protected" / "rounds.jsonl"
        if record is not None and rounds.is_file():
            found[variation.name] = _result(record, rounds)
    return found


def _result(record: AuditRecord, rounds: Path) -> Result:
    try:
        lines = rounds.read_text(encoding="utf-8").splitlines()
        held = tuple(Round.model_validate_json(line) for line in lines)
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{rounds} is damaged: delete its folder and repeat `python recipes/reproduce.py"
            f" {ABLATION}`"
        ) from None
    scores = {subject.name: subject.original for subject in record.subjects}
    before, after = scores.get("unprotected"), scores.get("protected")
    mild = next((attack for attack in record.strategies if _is_mild(attack)), None)
    reached = (None,) * 3 if mild is None else scores_of(record, mild)
    return Result(
        held,
        summarise(record)[0],
        before,
        after,
        reached,
        len(record.seeds),
        origin_of(record),
        tuple(settings_in(record.command)),
    )


def _is_mild(attack: Strategy) -> bool:
    """Return whether it is the attack at whose kind protections are published: at a small rate,
    from the weights as they are.
    """
    found = (attack.optimizer, attack.learning_rate, attack.preparations, attack.scope)
    return found == ("sgd_momentum", 1e-3, (), "all")


def table(folder: Path, held: dict[str, Result]) -> str:
    """Return the Markdown table of the study and where its numbers come from; what was not run
    stays empty.
    """
    lines = [
        "| axis | value | original test, before and after | guard violations"
        " | mean query score, last tenth | SGD momentum 1e-3: scratch / unprotected / protected"
        " | best attack: scratch / unprotected / protected | advantage removed (95 %) | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for axis, values in AXES.items():
        for variation in values:
            label = variation.value + ("" if variation.settings else " (base)")
            cells = [axis, label, *_cells(held.get(variation.name))]
            missing = missing_of(folder / variation.name)
            if variation.name not in held and missing is not None:
                cells[-1] = missing
            lines.append("| " + " | ".join(cells) + " |")
    for origin, seeds in dict.fromkeys((one.origin, one.seeds) for one in held.values()):
        several = f"{seeds} attack seed{'' if seeds == 1 else 's'}, one protection seed"
        lines += ["", f"Measured: {origin}; {several}."]
    return "\n".join(lines) + "\n"


def _cells(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 7
    summary, kind = result.summary, result.summary.kind
    kept = [m for m in (result.before, result.after) if m is not None]
    best = [summary.subjects.get(name) for name in SUBJECTS]
    tests = tuple(None if s is None or s.test is None else s.test.value for s in best)
    reached = (result.mild, tests)
    last = result.rounds[-max(1, len(result.rounds) // 10) :]
    query = sum(r.query_score for r in last) / len(last)
    removed = summary.advantage
    return [
        ", ".join(kind.show(m.value, 1) for m in kept),
        str(result.violations),
        kind.show(query, 1),
        *(" / ".join("?" if v is None else kind.show(v, 1) for v in three) for three in reached),
        removed.reason if removed.value is None else removed_text(removed),
        f"changed: {', '.join(result.changes)}" if result.changes else summary.text,
    ]


# --- Figure ------------------------------------------------------------------------------------

# Rounds are averaged over so many before they are drawn: single ones are noise.
_SMOOTHED = 10
_COLUMNS = 4


def draw(held: dict[str, Result], file: Path) -> None:
    """Write the study's figure: per axis what was removed and what the original task lost, and
    the course of each loss over the rounds.
    """
    plots = pyplot()
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


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files. Raises SpecError where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise SpecError(
            f"matplotlib cannot be imported ({error}): the study's figure needs it:"
            f" {installing('demo')}"
        ) from None
