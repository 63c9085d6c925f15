"""The commands that read what was written: report, compare, inspect, export.

Nothing heavy is imported before a command runs; report and compare need no torch.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sophon._base.errors import CheckpointError, SpecError, first_line, shortened
from sophon._cli.application import Json, Quiet, command, option, say_json
from sophon._cli.controls import CONTROLS, show_controls
from sophon._cli.first_look import DELETE_FIRST
from sophon._cli.running import mode_of, say, show_comparison, show_verdict

if TYPE_CHECKING:
    from sophon._records.audit_record import AuditRecord
    from sophon._reporting.comparison import Comparison
    from sophon._reporting.report import Report

# What every file compressed by gzip begins with.
_GZIP = b"\x1f\x8b"
# Of a record, unpacked; those of large audits have a twentieth.
_MOST_BYTES = 2**28
# Suites of the time before records had their fingerprints.
_UNMARKED = ("quick-1",)
_PRINTED = Path("-")
# Of a line that tells what wrote a run file.
_LONGEST = 2000


def read_record(path: Path) -> AuditRecord:
    """Return the record in an audit's folder or file, gzip or not. Raises CheckpointError."""
    import gzip
    import zlib

    from pydantic import ValidationError

    from sophon._records.audit_record import AuditRecord

    if path.is_dir() and (path / "audit").is_dir() and _first_look(path):
        path /= "audit"
    file = path / "record.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            packed = opened.read(len(_GZIP)) == _GZIP
            opened.seek(0)
            held = (gzip.GzipFile(fileobj=opened) if packed else opened).read(_MOST_BYTES + 1)
        if len(held) > _MOST_BYTES:
            raise CheckpointError(f"{file} has more than {_MOST_BYTES >> 20} MiB: no record has")
        record = AuditRecord.model_validate_json(held.decode("utf-8"))
        _require_as_written(record, file)
        return record
    except FileNotFoundError:
        raise CheckpointError(_absence(path, file)) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise CheckpointError(
            f"{file} is compressed and cannot be unpacked: copy it again, or repeat the audit"
        ) from None
    except (UnicodeDecodeError, ValidationError) as error:
        if not held.lstrip().startswith(b"{"):
            raise CheckpointError(
                f"{file} is no audit record: name the folder that `sophon audit --out` wrote, or"
                " its record.json"
            ) from None
        raise CheckpointError(
            f"{file} is not a whole audit record of this version{_why(error)}: repeat the audit, or"
            " name the record.json that it wrote"
        ) from None


def _absence(path: Path, file: Path) -> str:
    """Return what to do where there is no record."""
    from sophon._records.round import without_weights

    if (path / CONTROLS).is_file():
        return f"{path} holds controls, an audit of the audit: `sophon inspect {path}` prints them"
    begun = len(list((path / "trials").glob("*.json")))
    look = path.parent if path.name == "audit" else path
    tried = _first_look(look)
    if tried and (ended := without_weights(look / "protected")):
        return (
            f"{ended}: repeat its `sophon try` command with a larger one"
            f" (--set protect.guard.tolerance_points=...); {DELETE_FIRST}"
        )
    if tried or (path / "trials").is_dir():
        command = "`sophon try` command" if tried else "`sophon audit`"
        return (
            f"{path} is of an audit that is not finished ({begun} trials are stored): repeat"
            f" its {command}"
        )
    if (path / "model.json").is_file():
        return f"{path} is of a model: name the folder that `sophon audit --out` wrote"
    if several := sorted(path.glob("*.json.gz")):
        named = several[0].name
        return f"{path} is no audit's folder, but holds {named}: name such files one by one"
    named = "record.json" if path.suffix in (".json", ".gz") else "the folder"
    return f"{file} does not exist: name {named} that `sophon audit --out` wrote"


def _of_an_audit(folder: Path) -> bool:
    return (folder / "record.json").is_file() or (folder / "trials").is_dir()


def _first_look(folder: Path) -> bool:
    """Return whether `sophon try` wrote a folder's run file."""
    try:
        with (folder / "run.toml").open(encoding="utf-8") as file:
            line = file.readline(_LONGEST)
    except (OSError, UnicodeDecodeError):
        return False
    return re.fullmatch(r"# Written by `sophon try\b.*`\.\n", line) is not None


def _require_as_written(record: AuditRecord, file: Path) -> None:
    """Raise CheckpointError where the suite or the settings of a record are not those it ran with.

    Records from before suites had fingerprints are taken as they are: they are of the suites of
    their time, and tell no earlier crashes.
    """
    from sophon._attacks.suites import SUITES, suite_fingerprint

    name, marked, fault = record.spec.suite, record.suite_fingerprint, ""
    if not marked and (name not in _UNMARKED or record.earlier_crashes):
        fault = "it lacks suite_fingerprint, which says what its attacks were: restore the file"
    elif name not in SUITES:
        fault = f"its suite {shortened(name)!r} is unknown here: use the version that wrote it"
    elif marked and suite_fingerprint(name) != marked:
        fault = f"its attacks were not those of suite {name!r}: restore the file"
    elif marked and record.spec.fingerprint() != record.spec_fingerprint:
        fault = "its settings are not those that it ran with: restore the file"
    if fault:
        raise CheckpointError(f"{file} is not as the audit wrote it; {fault}, or repeat the audit")


def _why(error: ValueError) -> str:
    """Return what contradicts itself in a record, in brackets; nothing of one that is damaged."""
    said = [fault for fault in getattr(error, "errors", list)() if fault["type"] == "value_error"]
    return f" ({said[0]['msg'].removeprefix('Value error, ')})" if said else ""


@command(
    "sophon report runs/a1", "sophon report runs/a1 --html report.html --markdown model_card.md"
)
def report(
    audited: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="An audit's folder, or its record.json; .gz, too."),
    ],
    html: Annotated[Path | None, option("--html", "FILE", "Write the report as one page.")] = None,
    markdown: Annotated[
        Path | None, option("--markdown", "FILE", "Write it for a model card; - prints it alone.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Judge a stored audit; print the verdict and write the report."""
    from sophon._reporting.report import report as judge

    _require_places(html, markdown, as_json=as_json)
    made = judge(read_record(audited))
    files = _written(made, {"report": html, "markdown": markdown})
    if markdown == _PRINTED:
        typer.echo(made.markdown(), nl=False)
        return
    show_verdict(made, mode_of(quiet, as_json), files)


def _require_places(html: Path | None, markdown: Path | None, *, as_json: bool) -> None:
    """Raise SpecError for a page that cannot be printed, or cannot beside JSON; CheckpointError
    for one that would replace another file.
    """
    from sophon._reporting.rendering import require_replaceable

    if html == _PRINTED:
        raise SpecError("--html = -: a page is not printed, name a file; --markdown - prints text")
    for page in (html, markdown):
        if page not in (None, _PRINTED):
            require_replaceable(page)
    if markdown == _PRINTED and as_json:
        raise SpecError("--markdown = - and --json both print: leave one out, or name a file")


def _written(made: Report | Comparison, asked: dict[str, Path | None]) -> dict[str, Path]:
    """Write the pages asked for; return them."""
    files = {name: path for name, path in asked.items() if path not in (None, _PRINTED)}
    for name, path in files.items():
        (made.write_markdown if name == "markdown" else made.write_html)(path)
    return files


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage: many records are millions of objects, none of them in a cycle."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _short(paths: list[Path]) -> list[str]:
    """Return the names of the audits' folders, or of records of other names, without suffixes; the
    paths as given where those are not all different.
    """
    usual = ("record.json", "record.json.gz")
    folders = [path.parent if path.name in usual else path for path in paths]
    names = [f.absolute().name.removesuffix(".gz").removesuffix(".json") for f in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@command(
    "sophon compare runs/a1 runs/a2 runs/a3",
    "sophon compare runs/a1 runs/a2 --html comparison.html --markdown comparison.md",
)
def compare(
    audited: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Two or more audits' folders, or record.json; .gz, too."
        ),
    ],
    html: Annotated[Path | None, option("--html", "FILE", "Write the ranking as one page.")] = None,
    markdown: Annotated[
        Path | None, option("--markdown", "FILE", "Write it as Markdown; - prints it alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank stored audits; what cannot be compared is kept apart."""
    from sophon._reporting.comparison import Comparison

    _require_places(html, markdown, as_json=as_json)
    with _uncollected():
        records = [read_record(path) for path in audited]
        made = Comparison(list(zip(_short(audited), records, strict=True)))
    files = _written(made, {"comparison": html, "markdown": markdown})
    if markdown == _PRINTED:
        typer.echo(made.markdown(), nl=False)
        return
    show_comparison(made, files, as_json=as_json)


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Raise CheckpointError where what sophon wrote to `path` was changed by hand."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"a file of {path} is not as sophon wrote it ({type(error).__name__}:"
            f" {first_line(error)}): restore it, or write the folder anew"
        ) from None


@command(
    "sophon inspect run.toml",
    "sophon inspect runs/p1",
    "sophon inspect runs/a1",
    "sophon inspect --schema > audit-record.schema.json",
)
def inspect(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A run file, a checkpoint or an audit.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of record.json instead.")
    ] = False,
) -> None:
    """Describe a run file, a checkpoint or an audit.

    A checkpoint's checksum is verified.
    """
    if schema:
        from sophon._records.audit_record import record_schema

        typer.echo(record_schema(), nl=False)
        return
    if path is None:
        raise CheckpointError("PATH is missing: name a run file, a checkpoint or an audit")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a run file, a checkpoint or an audit")
    from sophon._cli.inspection import describe_checkpoint, describe_run

    controls = path if path.name == CONTROLS else path / CONTROLS
    if path.suffix == ".toml":
        say(describe_run(path))
    elif controls.is_file() and not (path / "record.json").is_file():
        from sophon._base.files import read_json

        with _as_written(path):
            show_controls(read_json(controls)["controls"])
    elif path.name.endswith((".json", ".json.gz")) or _of_an_audit(path):
        from sophon._reporting.report import report as judge

        show_verdict(judge(read_record(path)), "lines", {})
    else:
        with _as_written(path):
            say(describe_checkpoint(path))


@command(
    "sophon export runs/p1 --to my-model", "sophon export runs/p1 --to my-model --record runs/a1"
)
def export(
    protected: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `sophon protect --out` wrote.")
    ],
    to: Annotated[Path, option("--to", "FOLDER", "A new folder to write to.")],
    record: Annotated[
        Path | None, option("--record", "FOLDER", "Its audit, for the model card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder to publish, its model card with the verdict.

    It holds config.json and model.safetensors, or of a diffusion model the pipeline's parts, and
    README.md, which says how to load it; nothing is uploaded. A network of timm, torchvision,
    transformers or diffusers loads without sophon, one of sophon's own with it.
    """
    from sophon._cli.run_file import require_place
    from sophon._reporting.export import export as write

    require_place(to)
    audited = None if record is None else read_record(record)
    with _as_written(protected):
        files = write(protected, to, audited)
    if as_json:
        say_json("summary", files=[str(file) for file in files])
        return
    card = "" if record is not None else " (the card says: not audited)"
    typer.echo(f"exported: {', '.join(file.name for file in files)} in {to}{card}")
