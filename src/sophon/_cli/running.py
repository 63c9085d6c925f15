"""Running a protection or an audit under progress bars, and showing what came out.

The only module that prints results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sophon._cli.application import command_line, stopping

if TYPE_CHECKING:
    from sophon._progress import Mode
    from sophon._protect import Protected
    from sophon._records import AuditRecord
    from sophon._report import Report
    from sophon._runs import Case


def run_protection(case: Case, out: Path, mode: Mode) -> Protected:
    """Run or resume a protection in `out`."""
    from sophon._progress import Display, percent, round_text
    from sophon._protect import Protection

    run = Protection(
        case.model,
        original=case.original,
        restricted=case.restricted,
        spec=case.spec.protect,
        out=out,
        head=case.network.head,
        model_spec=case.network,
    )
    if run.done and mode in ("bar", "lines"):
        finished = run.done == len(run)
        state = "is complete" if finished else f"resumes after round {run.done} of {len(run)}"
        typer.echo(f"{out} {state}", err=True)
    guard = ""
    display = Display(mode, noun="round", total=len(run), todo=len(run) - run.done)
    with stopping() as stop, display:
        display.start_at(run.done)
        for record in run:
            if record.guard_score is not None:
                guard = f"{percent(record.guard_score)} ({record.guard})"
            display.step(record.model_dump(mode="json"), round_text(record, guard))
            if stop.asked and run.done < len(run):
                run.save()
                raise KeyboardInterrupt
    return run.result()


def show_protected(result: Protected, out: Path, mode: Mode) -> None:
    """Print what protection made."""
    from sophon._progress import percent

    file = out / "model.safetensors"
    if mode == "json":
        summary = {
            "event": "summary",
            "validation_before": result.before.model_dump(),
            "validation_after": result.after.model_dump(),
            "shipped_round": result.shipped_round,
            "rounds": len(result.rounds),
            "file": str(file),
        }
        typer.echo(json.dumps(summary))
        return
    typer.echo(
        f"protected: original validation {percent(result.before.value)} before,"
        f" {percent(result.after.value)} after; weights of round {result.shipped_round} of"
        f" {len(result.rounds)}; {file}"
    )


def run_audit(
    case: Case,
    path: Path,
    store: Path,
    mode: Mode,
    *,
    unprotected: Path | None = None,
    workers: int = 1,
) -> AuditRecord:
    """Audit the checkpoint in `path`, running the trials that `store` lacks.

    It is held against the checkpoint in `unprotected`, or the model of the run.
    """
    from sophon._audit import Audit
    from sophon._progress import Display, trial_text
    from sophon._runs import load_subject

    protected, protection = load_subject(case, path)
    audit = Audit(
        protected,
        unprotected=case.model if unprotected is None else load_subject(case, unprotected)[0],
        original=case.original,
        restricted=case.restricted,
        held_out=case.held_out,
        benign=case.benign,
        spec=case.spec.audit,
        store=store,
        scratch=case.scratch,
        head=case.network.head,
        workers=workers,
        about={
            "model": case.network.name,
            "command": command_line(),
            "protection": protection,
        },
    )
    held = {file.stem for file in (store / "trials").glob("*.json")}
    display = Display(mode, noun="trial", total=len(audit), todo=audit.missing())
    with display:
        for trial in audit:
            fresh = trial.key not in held
            display.step(trial.model_dump(mode="json"), trial_text(trial), fresh=fresh)
    return audit.record()


def write_audit(record: AuditRecord, out: Path) -> Report:
    """Write the record and both reports to `out`."""
    from sophon._files import require_writable, write_text
    from sophon._report import report

    require_writable(out)
    write_text(out / "record.json", record.model_dump_json(indent=1) + "\n")
    made = report(record)
    made.write_html(out / "report.html")
    made.write_markdown(out / "report.md")
    return made


def show_verdict(made: Report, mode: Mode, files: dict[str, Path]) -> None:
    """Print the verdict table, the verdict and where the reports are."""
    verdict = str(made.verdict)
    if mode == "json":
        paths = {name: str(path) for name, path in files.items()}
        rows = [list(map(str, row)) for row in made.table()]
        summary = {"event": "summary", "verdict": verdict, "table": rows, **paths}
        typer.echo(json.dumps(summary))
        return
    if mode != "quiet":
        _print_rows([tuple(map(str, row)) for row in made.table()])
    written = "".join(f"; {path}" for path in files.values())
    typer.echo(f"verdict: {verdict}{written}")


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for title in rows[0]:
        table.add_column(title, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    # A pipe has no width of its own; a table must not be cut there.
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def say(lines: Iterable[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)


def show_forecast(case: Case, *, as_json: bool) -> None:
    """Print the resolved run and what it is expected to take."""
    from sophon._forecast import forecast
    from sophon._progress import duration, lines

    expected = forecast(
        case.model,
        original=case.original,
        restricted=case.restricted,
        spec=case.spec.protect,
        head=case.network.head,
    )
    resolved = case.spec.model_dump(mode="json")
    if as_json:
        numbers = {
            "round_s": expected.round_s,
            "total_s": expected.total_s,
            "peak_bytes": expected.peak_bytes,
        }
        typer.echo(json.dumps({"event": "forecast", "spec": resolved, **numbers}))
        return
    say(lines(resolved))
    peak = expected.peak_bytes
    memory = "" if peak is None else f"; about {peak / 2**20:.0f} MiB of memory"
    typer.echo(
        f"forecast: {case.spec.protect.rounds} rounds of {expected.round_s:.2g} s,"
        f" {duration(expected.total_s)} in all{memory}; nothing was written"
    )
