"""The command line: the only module that prints results, reads arguments or exits.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer

from sophon._errors import CheckpointError, SophonError, SpecError

if TYPE_CHECKING:
    from types import FrameType

    from sophon._progress import Mode
    from sophon._protect import Protected
    from sophon._records import AuditRecord
    from sophon._report import Report
    from sophon._runs import Case

EXIT_CODES = """\
\b
Exit codes:
  0    done
  1    a fault in sophon itself; please report it
  2    the command, run file, data, model or folder cannot be used; the message says what to change
  3    no weights met the tolerance on the original task; all files are kept
  4    a loss became infinite or not a number; what was written is kept
  130  interrupted; repeat the command to resume

\b
Examples:
  sophon demo
  sophon protect run.toml --out runs/p1
  sophon audit run.toml --model runs/p1/model.safetensors --out runs/a1
  sophon report runs/a1 --html report.html
"""

app = typer.Typer(
    name="sophon",
    help="Protect a pre-trained classifier against fine-tuning, attack it, report the result.",
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.TOML", help="The run: model, domains and what to do.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the run file, such as protect.rounds=50. May be repeated.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the last line, the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and no bars.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Processor threads to use.")
]
Arguments = ParamSpec("Arguments")


# --- Errors and interruptions -------------------------------------------------------------------


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code)


def _guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn what a user can act on into a line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except SophonError as error:
            _fail(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _fail(f"interrupted: to resume, repeat the command: {_command_line()}", 130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            remedy = "make room or choose another place, then repeat the command"
            _fail(f"error: {where}{error.strerror or error}: {remedy}", 2)

    return guarded


def _command_line() -> str:
    return shlex.join(["sophon", *sys.argv[1:]])


class _Stop:
    """Ctrl-C asks to stop after the current round, a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        typer.echo("\nstopping after this round; Ctrl-C again stops at once", err=True)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# --- Running ------------------------------------------------------------------------------------


def _run_protection(case: Case, out: Path, mode: Mode) -> Protected:
    from sophon._progress import Display, percent, round_text
    from sophon._protect import protection

    run = protection(
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
    with _stopping() as stop, display:
        display.start_at(run.done)
        for record in run:
            if record.guard_score is not None:
                guard = f"{percent(record.guard_score)} ({record.guard})"
            display.step(record.model_dump(mode="json"), round_text(record, guard))
            if stop.asked and run.done < len(run):
                run.save()
                raise KeyboardInterrupt
    return run.result()


def _show_protected(result: Protected, out: Path, mode: Mode) -> None:
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


def _run_audit(case: Case, path: Path, store: Path, mode: Mode) -> AuditRecord:
    from sophon._audit import auditing
    from sophon._progress import Display, trial_text
    from sophon._runs import load_subject

    protected, protection = load_subject(case, path)
    audit = auditing(
        protected,
        unprotected=case.model,
        original=case.original,
        restricted=case.restricted,
        spec=case.spec.audit,
        store=store,
        scratch=case.scratch,
        head=case.network.head,
        about={
            "model": case.network.name,
            "command": _command_line(),
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


def _write_audit(record: AuditRecord, out: Path) -> Report:
    from sophon._checkpoints import require_writable, write_text
    from sophon._report import report

    require_writable(out)
    write_text(out / "record.json", record.model_dump_json(indent=1) + "\n")
    made = report(record)
    made.write_html(out / "report.html")
    made.write_markdown(out / "report.md")
    return made


def _show_verdict(made: Report, mode: Mode, files: dict[str, Path]) -> None:
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


def _mode(quiet: bool, as_json: bool) -> Mode:
    from sophon._progress import choose_mode

    return choose_mode(quiet=quiet, as_json=as_json)


# --- Commands -----------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from sophon import __version__

        typer.echo(f"sophon {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon protect run.toml --dry-run\n"
    "  sophon protect run.toml --out runs/p1\n"
    "  sophon protect run.toml --out runs/p2 --set protect.rounds=50 --set protect.seed=1\n"
)
@_guarded
def protect(
    run_file: RunFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to write; resumes there.")
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: Json = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved run and a forecast; write nothing."),
    ] = False,
    threads: Threads = None,
) -> None:
    """Protect the model of RUN.TOML; repeat the command to resume."""
    from sophon._runs import load, require_place

    if dry_run:
        _forecast(load(run_file, settings, threads), as_json=as_json)
        return
    if out is None:
        raise SpecError("--out is missing: name a folder to write to, such as --out runs/p1")
    mode = _mode(quiet, as_json)
    require_place(out)
    result = _run_protection(load(run_file, settings, threads), out, mode)
    _show_protected(result, out, mode)


def _forecast(case: Case, *, as_json: bool) -> None:
    from sophon._progress import duration, lines
    from sophon._protect import forecast

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
    _say(lines(resolved))
    typer.echo(
        f"forecast: {case.spec.protect.rounds} rounds of {expected.round_s:.2g} s,"
        f" {duration(expected.total_s)} in all; about {expected.peak_bytes / 2**20:.0f} MiB of"
        " memory; nothing was written"
    )


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon audit run.toml --model runs/p1/model.safetensors --out runs/a1\n"
    "  sophon audit run.toml --model runs/p1 --out runs/a2 --store runs/a1\n"
)
@_guarded
def audit(
    run_file: RunFile,
    model: Annotated[
        Path,
        typer.Option(
            "--model", metavar="FILE", help="The protected checkpoint: its file or folder."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where record and reports go.")
    ],
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", metavar="FOLDER", help="Where trials are kept and looked up; default: --out."
        ),
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Attack a protected checkpoint, the model of RUN.TOML and a network from scratch alike.

    Only trials that the store lacks are run; repeat the command to resume.
    """
    from sophon._runs import load, require_place

    mode = _mode(quiet, as_json)
    require_place(out)
    require_place(store or out)
    case = load(run_file, settings, threads)
    made = _write_audit(_run_audit(case, model, store or out, mode), out)
    _show_verdict(made, mode, {"report": out / "report.html"})


def _read_record(path: Path) -> AuditRecord:
    from pydantic import ValidationError

    from sophon._records import AuditRecord

    file = path / "record.json" if path.is_dir() else path
    try:
        return AuditRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist: name the folder that `sophon audit --out` wrote"
        ) from None
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{file} is not a whole audit record of this version: repeat the audit"
        ) from None


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon report runs/a1\n"
    "  sophon report runs/a1 --html report.html --markdown model_card.md\n"
)
@_guarded
def report(
    audited: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An audit's folder, or its record.json.")
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write it for a model card.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Judge a stored audit; print the verdict and write the report."""
    from sophon._report import report as judge

    made = judge(_read_record(audited))
    files = {}
    if html is not None:
        made.write_html(html)
        files["report"] = html
    if markdown is not None:
        made.write_markdown(markdown)
        files["markdown"] = markdown
    _show_verdict(made, _mode(quiet, as_json), files)


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon evaluate run.toml\n"
    "  sophon evaluate run.toml --model runs/p1 --split test\n"
)
@_guarded
def evaluate(
    run_file: RunFile,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FILE", help="A checkpoint instead of RUN.TOML's model."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="validation|test", help="Which images to score.")
    ] = "validation",
    settings: Settings = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Print the accuracy on the original domain with its 95 % interval (Wilson)."""
    if split not in ("validation", "test"):
        raise SpecError(f"--split = {split!r}: use validation or test")
    from sophon._metrics import evaluate as measure
    from sophon._progress import percent
    from sophon._runs import load, load_subject
    from sophon._statistics import wilson

    case = load(run_file, settings, threads)
    setting = case.setting()
    subject = case.model if model is None else load_subject(case, model)[0]
    images = case.original.test if split == "test" else case.original.validation
    score = measure(setting.place(subject), setting, case.original, images)
    interval = wilson(score)
    if as_json:
        held = {"split": split, **score.model_dump(), "low": interval.low, "high": interval.high}
        typer.echo(json.dumps({"event": "summary", "domain": case.original.name, **held}))
        return
    typer.echo(
        f"{case.original.name} {split}: {percent(score.value)} of {score.total} images"
        f" (95 % interval {percent(interval.low)} to {percent(interval.high)})"
    )


@app.command(
    epilog="\b\nExamples:\n  sophon inspect run.toml\n  sophon inspect runs/p1\n"
    "  sophon inspect runs/a1\n"
)
@_guarded
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run file, a checkpoint or an audit.")
    ],
) -> None:
    """Describe a run file, a checkpoint (its checksum is verified) or an audit."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a run file, a checkpoint or an audit")
    from sophon._inspection import describe_checkpoint, describe_run

    if path.suffix == ".toml":
        _say(describe_run(path))
    elif path.suffix == ".json" or (path / "record.json").is_file():
        from sophon._report import report as judge

        _show_verdict(judge(_read_record(path)), "lines", {})
    else:
        _say(describe_checkpoint(path))


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


@app.command(epilog="\b\nExamples:\n  sophon demo\n  sophon demo --out first-look --threads 2\n")
@_guarded
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where everything is written.")
    ] = Path("demo"),
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Protect, audit and report a small model on embedded images, in about a minute."""
    from sophon._progress import percent

    mode = _mode(quiet, as_json)
    if mode in ("bar", "lines"):
        typer.echo("Preparing letters, digits and a small network for letters.", err=True)
    from sophon._demo import WHAT_IT_SHOWS, prepare
    from sophon._runs import load, require_place

    require_place(out)
    start = prepare(out)
    if mode in ("bar", "lines"):
        done = "trained" if start.trained else "found"
        typer.echo(f"{done}: letters validation {percent(start.score.value)}", err=True)
    case = load(start.run, settings, threads)
    result = _run_protection(case, out / "protected", mode)
    if mode != "quiet":
        _show_protected(result, out / "protected", mode)
    checkpoint = out / "protected" / "model.safetensors"
    record = _run_audit(case, checkpoint, out / "audit", mode)
    made = _write_audit(record, out / "audit")
    if mode in ("bar", "lines"):
        typer.echo(WHAT_IT_SHOWS)
    _show_verdict(made, mode, {"report": (out / "audit" / "report.html").absolute()})


def main() -> None:
    """Run the command line; it ends the process with the exit code."""
    app()


if __name__ == "__main__":
    main()
