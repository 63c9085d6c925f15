"""`sophon audit`: its options, the forecast it prints, the audit itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sophon._base.errors import CheckpointError, SpecError
from sophon._cli import application as cli
from sophon._cli.controls import CONTROLS, run_controls
from sophon._cli.running import mode_of, remark, say_read, show_resolved, show_verdict

if TYPE_CHECKING:
    from torch import nn

    from sophon._auditing.audit import Audit
    from sophon._cli.progress import Mode
    from sophon._cli.run_file import Case
    from sophon._records.audit_record import AuditRecord
    from sophon._reporting.report import Report

# Any of these in a folder tells that an audit, or controls, were written there.
_OURS = ("record.json", CONTROLS, "trials", "budgets")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

Out = Annotated[Path | None, cli.option("--out", "FOLDER", "Where record and reports go.")]
Protected = Annotated[
    Path | None, cli.option("--model", "FILE", "The protected checkpoint: its file or folder.")
]
Unprotected = Annotated[
    Path | None,
    cli.option(
        "--unprotected",
        "FILE",
        "The checkpoint before protection; default: the model of RUN.TOML. `none`: there"
        " is none, and the report says what cannot be claimed without.",
    ),
]
Store = Annotated[
    Path | None,
    cli.option("--store", "FOLDER", "Where trials are kept and looked up; default: --out."),
]
Budget = Annotated[
    str | None,
    cli.option(
        "--budget",
        "TIME",
        "Fit the audit to a time such as 45m or 1h30m, and say what that gives up.",
    ),
]
WithControls = Annotated[
    bool,
    typer.Option(
        "--controls",
        help="Audit the audit: models that only look protected, made from the model of"
        " RUN.TOML, must be found out.",
    ),
]
Workers = Annotated[
    int, cli.option("--workers", "N", "Trials run at once, of one thread each.", parser=cli.counted)
]
Executor = Annotated[str, cli.option("--executor", "processes|ray", "What runs the workers.")]
Address = Annotated[
    str | None, cli.option("--address", "HOST:PORT", "The Ray cluster; default: here.")
]


@cli.command(
    "sophon audit run.toml --model runs/p1 --dry-run",
    "sophon audit run.toml --model runs/p1/model.safetensors --out runs/a1",
    "sophon audit run.toml --model runs/p1 --out runs/a2 --store runs/a1",
    "sophon audit run.toml --model runs/p1 --out runs/a3 --budget 1h30m --workers 4",
    "sophon audit run.toml --model theirs.pth --unprotected before.pth --out runs/a4",
    "sophon audit run.toml --model theirs.pth --unprotected none --out runs/a5",
    "sophon audit run.toml --controls --out runs/c1 --set 'audit.suite=\"quick-1\"'",
)
def audit(  # noqa: PLR0913, PLR0917 - one parameter an option
    run_file: cli.RunFile,
    out: Out = None,
    model: Protected = None,
    unprotected: Unprotected = None,
    store: Store = None,
    budget: Budget = None,
    controls: WithControls = False,
    workers: Workers = 1,
    executor: Executor = "processes",
    address: Address = None,
    settings: cli.Settings = None,
    quiet: cli.Quiet = False,
    as_json: cli.Json = False,
    threads: cli.Threads = None,
    dry_run: cli.DryRun = False,
) -> None:
    """Attack a protected checkpoint and report what it withstood.

    The model of RUN.TOML and a network from scratch are attacked alike. Only
    trials that the store lacks are run; repeat the command to resume.
    """
    from sophon._cli.run_file import load

    mode = mode_of(quiet, as_json)
    if not run_file.is_file():
        raise SpecError(f"{run_file} does not exist: name the run file")
    workers_of: dict[str, Any] = {"workers": workers, "executor": executor, "address": address}
    _require_consistent(controls, {"--model": model, "--unprotected": unprotected}, budget)
    seconds = None if budget is None else parse_duration(budget)
    if dry_run and controls:
        raise SpecError("--dry-run forecasts an audit, and --controls are several: leave one out")
    if not dry_run:
        out = cli.required_out(out, "runs/a1")
        _require_places(run_file, settings, model, (out, store or out))
    # Another model before protection, or none, stands in for the run file's.
    case = load(run_file, settings, threads, untrained=unprotected is not None)
    if controls and not case.task.kind.classifies:
        raise SpecError("--controls makes classifiers that only look protected: not for denoising")
    wanted: dict[str, Any] = {"unprotected": unprotected, "budget_s": seconds, **workers_of}
    if out is None or dry_run:
        _show_dry(case, Path(model or ""), as_json=as_json, **wanted)
    elif controls:
        run_controls(case, out, mode, store=store or out, **workers_of)
    elif model is not None:
        _require_same_model(out, model)
        record = run_audit(case, model, mode, out=out, store=store or out, **wanted)
        made = write_audit(record, out)
        show_verdict(made, mode, {"report": out / "report.html"})


def _show_dry(case: Case, model: Path, *, as_json: bool, **wanted: Any) -> None:
    """Print the resolved run and what its audit is expected to take, without a store."""
    from sophon._cli.progress import forecast_text

    audit = _opened(case, model, "quiet" if as_json else "lines", note="", **wanted)
    remark("quiet" if as_json else "lines", "measuring a few attacks for the forecast")
    expected = audit.forecast()
    show_resolved(
        case,
        {"audit": audit.spec},
        {
            "trials": expected.trials,
            "steps": expected.steps,
            "total_s": expected.seconds,
            "given_up": list(audit.given_up),
        },
        f"{forecast_text(expected, about=audit.plan.staged)}, as four attacks of at most 12 steps"
        " on a fresh network took; stored trials are not counted",
        as_json=as_json,
        own=audit.setting.own,
    )


def _require_places(
    run_file: Path, settings: list[str] | None, model: Path | None, folders: tuple[Path, Path]
) -> None:
    """Raise SpecError or CheckpointError for an --out or --store that must stay as it is."""
    from sophon._base.files import require_unused
    from sophon._cli.run_file import read_run, require_outside, require_place
    from sophon._reporting.rendering import require_replaceable

    for folder in folders:
        require_place(folder)
    out = folders[0]
    if model is not None and model.is_dir() and out.resolve() == model.resolve():
        raise SpecError(
            f"--out = {out} is the folder of the model to audit, which is for publishing: choose"
            f" another, such as {out}-audit"
        )
    for folder in dict.fromkeys(folders):
        require_unused(folder, *_OURS)
        require_outside(folder, read_run(run_file, settings), run_file.parent)
    for page in ("report.html", "report.md"):
        require_replaceable(out / page)


def _require_consistent(
    controls: bool, checkpoints: dict[str, Path | None], budget: str | None
) -> None:
    """Raise SpecError for options that exclude each other, or for one that is missing."""
    if not controls and checkpoints["--model"] is None:
        raise SpecError("--model is missing: name the checkpoint to audit, such as --model runs/p1")
    for name, value in checkpoints.items():
        if controls and value is not None:
            raise SpecError(
                f"{name} = {value} and --controls: controls are made from the model of the run"
                " file; leave one out"
            )
    if controls and budget is not None:
        raise SpecError("--budget is not for --controls: use --set audit.steps=N instead")


def _record_in(out: Path) -> AuditRecord | None:
    """Return the record in `out`; a damaged one says nothing, and the audit is what replaces it."""
    from sophon._cli.reading import read_record

    try:
        return read_record(out) if (out / "record.json").is_file() else None
    except CheckpointError:
        return None


def _require_same_model(out: Path, model: Path) -> None:
    """Raise CheckpointError if `out` holds the record of another model than the one in `model`."""
    from sophon._cli.run_file import weights_file
    from sophon._training.checkpoints import file_sha256

    file, record = weights_file(model), _record_in(out)
    if record is None or not file.is_file():
        return
    held = {one.name: one.file_sha256 for one in record.subjects}
    if held.get("protected") not in (None, file_sha256(file)):
        raise CheckpointError(
            f"{out} holds the audit of another model than {model}: give another --out, or delete"
            f" {out / 'record.json'}"
        )


def _require_same_audit(out: Path, audit: Audit) -> None:
    """Raise CheckpointError if `out` holds the record of an audit with other settings or images: an
    audit that is repeated until it pleases must leave the others where they can be seen.
    """
    held = _record_in(out)
    if held is None:
        return
    before, now = held.spec.model_dump(mode="json"), audit.spec.model_dump(mode="json")
    changed = [f"audit.{name} = {before[name]}" for name in now if before[name] != now[name]]
    domains = (*audit.restricted, *audit.held_out, *audit.benign)
    known = [domain.sha256 for domain in (*held.restricted, *held.held_out, *held.benign)]
    if known != [domain.fingerprint() for domain in domains]:
        changed.append("other images")
    if changed:
        raise CheckpointError(
            f"{out} holds the record of another audit of this model ({'; '.join(changed)}): give"
            f" another --out, so that both can be seen; --store {out} shares its trials"
        )


def parse_duration(text: str) -> float:
    """Return seconds from a text such as `90s`, `45m` or `1h30m`. Raises SpecError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise SpecError(f"--budget = {text!r}: write a time such as 90s, 45m or 1h30m")
    return seconds


def run_audit(
    case: Case,
    path: Path,
    mode: Mode,
    *,
    store: Path,
    unprotected: Path | None = None,
    out: Path | None = None,
    note: str = "",
    measured: bool = False,
    **arguments: Any,
) -> AuditRecord:
    """Audit the checkpoint in `path`, running the trials that `store` lacks.

    It is held against the checkpoint in `unprotected`, or the model of the run; `note` heads the
    report. Where it was `measured` already, what it takes is not said again. `arguments` are
    further ones of `Audit`. Raises CheckpointError if `out` holds the record of another audit.
    """
    from sophon._cli.progress import Display, trial_text

    audit = _opened(case, path, mode, unprotected=unprotected, note=note, store=store, **arguments)
    if out is not None:
        _require_same_audit(out, audit)
    say_read(case, mode, audit.setting.own)
    todo = audit.missing()
    if not measured:
        _show_forecast(audit, todo, mode)
    with Display(mode, noun="trial", total=len(audit), todo=todo) as display:
        for trial in audit:
            fresh = trial.key in audit.ran
            display.step(trial.model_dump(mode="json"), trial_text(trial), fresh=fresh)
    if sets := audit.picture_sets:
        remark(mode, f"drawing and judging {sets} sets of pictures, stored ones excepted")
    return audit.record()


def _opened(
    case: Case, path: Path, mode: Mode, *, unprotected: Path | None, note: str, **arguments: Any
) -> Audit:
    """Return the audit of a checkpoint, and warn of one that is not protected.

    Raises CheckpointError naming the file that is of another architecture.
    """
    from sophon._cli.run_file import load_subject, weights_file
    from sophon._models import weights_sha256
    from sophon._training.checkpoints import file_sha256

    protected, protection = load_subject(case, path)
    _require_architecture(case, protected, f"--model {path}")
    files = {"protected": file_sha256(weights_file(path))}
    before = case.model
    if unprotected is not None and str(unprotected) != "none":
        before = load_subject(case, unprotected)[0]
        _require_architecture(case, before, f"--unprotected {unprotected}")
        files["unprotected"] = file_sha256(weights_file(unprotected))
    about = {"protection": protection, "note": note, "files": files}
    given = None if str(unprotected) == "none" else before
    audit = audit_of(case, protected, given, about, **arguments)
    if weights_sha256(protected) == weights_sha256(before):
        remark(
            mode,
            f"warning: {path} has the weights of the model before protection: name the protected"
            " ones with --model, and those in the run file or with --unprotected",
        )
    return audit


def _require_architecture(case: Case, model: nn.Module, given: str) -> None:
    """Raise CheckpointError if a model is no network as the run file's, whose fresh one is attacked
    beside it.
    """
    from sophon._models import differing_keys

    if different := differing_keys(model, case.model):
        raise CheckpointError(
            f"{given} is of another architecture than {case.name}, the network of the run file:"
            f" {len(different)} keys differ ({', '.join(different[:3])}): name its own run file, or"
            " other weights"
        )


def audit_of(
    case: Case,
    protected: nn.Module,
    unprotected: nn.Module | None,
    about: dict[str, Any] | None = None,
    **arguments: Any,
) -> Audit:
    """Return the audit of a run's model; `about` and `arguments` are more of `Audit`'s."""
    from sophon._auditing.audit import Audit

    return Audit(
        protected,
        unprotected=unprotected,
        original=case.original,
        restricted=case.restricted,
        held_out=case.held_out,
        benign=case.benign,
        task=case.task,
        spec=case.spec.audit,
        scratch=case.scratch,
        head=case.network.head,
        about={"model": case.name, "command": cli.command_line(), **(about or {})},
        **arguments,
    )


def _show_forecast(audit: Audit, todo: int, mode: Mode) -> None:
    """Print, before any trial, what the audit is expected to take and what it gives up."""
    from sophon._cli.progress import say_forecast

    if not todo or mode == "quiet":
        return
    remark(mode, "measuring a few attacks for the forecast")
    say_forecast(audit.forecast(), mode, todo, audit.given_up, about=audit.plan.staged)
    if sets := audit.picture_sets:
        late = "come after the trials; their time is not in the forecast"
        remark(mode, f"pictures ({sets} sets) {late}")
    for lost in audit.given_up:
        remark(mode, f"given up to fit the budget: {lost}")


def write_audit(record: AuditRecord, out: Path) -> Report:
    """Write the record and both reports to `out`."""
    from sophon._base.files import require_writable, write_text
    from sophon._reporting.report import report

    require_writable(out)
    write_text(out / "record.json", record.model_dump_json(indent=1) + "\n")
    made = report(record)
    made.write_html(out / "report.html")
    made.write_markdown(out / "report.md")
    return made
