"""The robustness tables: methods by optimizers, learning rates, batch sizes. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grid import DATA, PUBLISHED_ROBUSTNESS, ROBUSTNESS, Cell
from sameness import base_folder, changes_of
from sophon._attacks.suites import strategies_of
from sophon._base.errors import CheckpointError
from sophon._records.audit_record import AuditRecord
from sophon._specs import AuditSpec, Strategy
from tables import EMPTY, missing_of, origin_of, read_stored, scores_of, seeds_of


def robustness(spec: AuditSpec) -> dict[str, dict[str, Strategy]]:
    """Return the paper's three robustness tables: rows by name, each with its attack.

    Methods by optimizers; five rates and five batch sizes of SGD with momentum, direct-all. All
    take the specification's steps and batch size (without one: a strategy's own), but for the table
    of batch sizes.
    """
    said = DATA[ROBUSTNESS]
    optimizers: dict[str, float] = said["optimizers"]
    usual = Strategy().batch_size if spec.batch_size is None else spec.batch_size

    def attack(optimizer: str, rate: float, **fields: Any) -> Strategy:
        held = {"optimizer": optimizer, "learning_rate": rate, "steps": spec.steps}
        return Strategy.model_validate({"batch_size": usual, **held, **fields}, strict=False)

    return {
        "method and optimizer": {
            f"{method}, {optimizer}": attack(optimizer, rate, **fields)
            for method, fields in said["methods"].items()
            for optimizer, rate in optimizers.items()
        },
        "learning rate": {f"{rate:g}": attack("sgd_momentum", rate) for rate in said["rates"]},
        "batch size": {
            str(size): attack("sgd_momentum", optimizers["sgd_momentum"], batch_size=size)
            for size in said["batch_sizes"]
        },
    }


def robustness_attacks(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the robustness tables that the specification does not have yet."""
    held = set(strategies_of(spec))
    wanted = [s for rows in robustness(spec).values() for s in rows.values()]
    return tuple(s for s in dict.fromkeys(wanted) if s not in held)


def robustness_folder(out: Path, cell: Cell) -> Path:
    """Return where the robustness of a cell's protected model lies below `--out`."""
    return out / cell.scale / f"{cell.name}-{ROBUSTNESS}"


def stored_robustness(out: Path, cell: Cell) -> str:
    """Return the robustness tables of a cell from its stored record below `out`, or a line that
    says why there are none.
    """
    folder = robustness_folder(out, cell)
    try:
        record = read_stored(folder)
        if record is not None:
            return robustness_tables(record, cell, base_folder(out, cell))
        why = missing_of(folder) or "not run"
    except CheckpointError as error:
        why = f"unreadable: {error}"
    return f"{cell.name}, {cell.scale}: {ROBUSTNESS}: {why}"


def robustness_tables(record: AuditRecord, cell: Cell, base: Path | None = None) -> str:
    """Return the three robustness tables of a cell's record as Markdown: test score after each
    attack.

    Above them stands what they are of and what was run otherwise than the cell, whose model of the
    original task is in `base`; below them the steps, the seeds, where the numbers come from and
    what is published of the architecture.
    """
    parts = [f"### {cell.name}, {cell.scale}: robustness"]
    changes = [key for key in changes_of(record, cell, base) if not key.startswith("audit.extra")]
    if changes:
        parts.append(f"**Not the cell of that name**, changed: {', '.join(changes)}.")
    for title, rows in robustness(record.spec).items():
        lines = [f"| {title} | scratch | unprotected | protected |", "|---|---|---|---|"]
        lines += [f"| {name} | {_shown(record, attack)} |" for name, attack in rows.items()]
        parts.append("\n".join(lines))
    parts.append(
        f"{record.spec.steps:,} steps an attack; test scores at the step that validation chose,"
        f" mean over attack seeds {', '.join(map(str, record.seeds))}."
    )
    parts.append(f"Measured: {origin_of(record)}.")
    if cell.architecture in PUBLISHED_ROBUSTNESS:
        parts.append(PUBLISHED_ROBUSTNESS[cell.architecture])
    return "\n\n".join(parts) + "\n"


def _shown(record: AuditRecord, attack: Strategy) -> str:
    """Return the scores after an attack as cells of a row, and of how many seeds where of fewer."""
    kind, seeds = record.kind, len(record.seeds)
    return " | ".join(
        EMPTY
        if value is None
        else kind.show(value, 1) + (f" ({count} of {seeds} seeds)" if count < seeds else "")
        for value, count in zip(scores_of(record, attack), seeds_of(record, attack), strict=True)
    )
