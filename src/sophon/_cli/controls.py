"""`sophon audit --controls`: the audit of the audit, and the table of what became of each model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sophon._base.errors import ControlError
from sophon._cli.application import command_line
from sophon._cli.running import print_rows, say_read

if TYPE_CHECKING:
    from sophon._cli.progress import Mode
    from sophon._cli.run_file import Case

CONTROLS = "controls.json"


def run_controls(case: Case, out: Path, mode: Mode, **arguments: Any) -> None:
    """Audit every control, write `controls.json` to `out` and print what became of each.

    Raises ControlError if one was not found out.
    """
    from sophon._auditing.controls import Controls
    from sophon._base.files import write_json
    from sophon._cli.progress import Display, say_forecast

    controls = Controls(
        case.model,
        original=case.original,
        restricted=case.restricted[0],
        benign=case.benign,
        spec=case.spec.audit,
        scratch=case.scratch,
        head=case.network.head,
        **arguments,
    )
    say_read(case, mode)
    say_forecast(controls.forecast(), mode)
    held = []
    with Display(mode, noun="control", total=len(controls), todo=len(controls)) as display:
        for result in controls:
            held.append(result.as_dict())
            display.step(held[-1], f"{result.name}: {held[-1]['verdict']}")
    write_json(out / CONTROLS, {"controls": held, "command": command_line()})
    missed = [f"{row['control']} ({_why_missed(row)})" for row in held if not row["passed"]]
    if mode in ("bar", "lines"):
        show_controls(held)
    if missed:
        raise ControlError(
            f"{', '.join(missed)}: not found out; audits made like this prove nothing. Use more"
            f" steps, measurements (audit.evaluations), seeds or images; the numbers are in"
            f" {out / CONTROLS}"
        )
    if mode != "json":
        count = sum(row["applies"] for row in held)
        typer.echo(f"controls: all {count} that apply found out or recovered; {out / CONTROLS}")


def _why_missed(row: dict[str, Any]) -> str:
    """Return what a control failed, and why its audit could say nothing where that is so."""
    reasons = row["reasons"] if row["advantage_removed"] is None else []
    return "; ".join([row["failed"], *reasons[:1]])


def show_controls(held: list[dict[str, Any]]) -> None:
    """Print what became of each control, as `controls.json` keeps it."""
    header = ("control", "verdict", "advantage removed", "flags that tell", "found out")
    print_rows([header, *map(_control_row, held)])


def _control_row(row: dict[str, Any]) -> tuple[str, ...]:
    value, interval = row["advantage_removed"], row["interval"]
    shown = "-" if value is None else f"{100 * value:z.0f} %"
    if interval is not None:
        shown += f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    found = "yes" if row.get("applies", True) else "-"
    found = found if row["passed"] else f"NO: {row.get('failed') or 'see its flags'}"
    return (row["control"], row["verdict"], shown, ", ".join(row["telling"]), found)
