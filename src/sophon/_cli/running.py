"""Running a protection under a progress bar, and showing what came out of it or of an audit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sophon._base.errors import IntactnessError
from sophon._cli.application import say_json, stopping

if TYPE_CHECKING:
    from sophon._cli.progress import Mode
    from sophon._cli.run_file import Case
    from sophon._data import Domain
    from sophon._models import OwnInput
    from sophon._protection.forecast import Forecast
    from sophon._protection.profile import Profiled
    from sophon._protection.protection import Protected, Protection
    from sophon._records.audit_record import Measurement
    from sophon._reporting.comparison import Comparison
    from sophon._reporting.report import Report
    from sophon._specs import Guard
    from sophon._specs.base import Spec
    from sophon._training.pretrain import Pretrained


def mode_of(quiet: bool, as_json: bool) -> Mode:
    """Return how to show progress: JSON or nothing if asked for, a bar only on a terminal."""
    if as_json:
        return "json"
    if quiet:
        return "quiet"
    return "bar" if sys.stderr.isatty() else "lines"


def remark(mode: Mode, text: str) -> None:
    """Print a line beside the result, for a person: not with --quiet or --json."""
    if mode in ("bar", "lines"):
        typer.echo(text, err=True)


def run_protection(
    case: Case,
    out: Path,
    mode: Mode,
    *,
    tensorboard: Path | None = None,
    profile: int | None = None,
    shard: bool = False,
    again: str = ", into a new --out",
) -> Protected:
    """Run or resume a protection in `out`, with TensorBoard logs in a folder if one is given, and a
    profile of so many rounds; `again` ends the error where no weights met the tolerance.

    Of many processes the first one shows it.
    """
    from sophon._cli.progress import Display, round_text
    from sophon._cli.tensorboard import RoundLog
    from sophon._protection.profile import Profiled
    from sophon._protection.protection import Protection
    from sophon._records.metrics import kind_of

    run = Protection(
        case.model,
        original=case.original,
        restricted=case.restricted,
        task=case.task,
        spec=case.spec.protect,
        out=out,
        head=case.network.head,
        model_spec=case.network,
        shard=shard,
    )
    if not run.ranks.first:
        mode, tensorboard = "quiet", None
    if run.done:
        finished = run.done == len(run)
        state = "is complete" if finished else f"resumes after round {run.done} of {len(run)}"
        remark(mode, f"{out} {state}")
    say_read(case, mode)
    _say_doubts(run, mode)
    profiled = None if profile is None else Profiled(run, profile, out)
    guard, kind = "", kind_of(run.guard.before)
    display = Display(mode, noun="round", total=len(run), todo=len(run) - run.done)
    logged = None if tensorboard is None else RoundLog(tensorboard, done=run.done)
    with stopping(run.ranks) as stop, display, logged or nullcontext() as log:
        display.start_at(run.done)
        for record in run if profiled is None else profiled:
            if record.guard_score is not None:
                guard = f"{kind.show(record.guard_score, 1)} ({record.guard})"
            text = round_text(kind.show(record.query_score, 1), guard, record)
            display.step(record.model_dump(mode="json"), text)
            if log is not None:
                log.add(record)
            if stop.asked and run.done < len(run):
                run.save()
                raise KeyboardInterrupt
    if profiled is not None:
        _show_profile(profiled, mode)
    with _told(again):
        return run.result()


@contextmanager
def _told(again: str) -> Iterator[None]:
    try:
        yield
    except IntactnessError as error:
        error.args = (f"{error}{again}",)
        raise


def say_read(case: Case, mode: Mode, own: OwnInput | None = None) -> None:
    """Say, before any work, what was read of each domain; `own` as in `Case.read`."""
    for line in case.read(own):
        remark(mode, line)


def _say_doubts(run: Protection, mode: Mode) -> None:
    """Say, before any round, what speaks against it, and what the terms remark."""
    doubts = _doubts(run.setting.original, run.guard.before, run.guard.spec)
    for line in (*doubts, *(said for term in run.hinder for said in term.remarks())):
        remark(mode, line)


def _doubts(original: Domain, before: Measurement, guard: Guard | None) -> Iterator[str]:
    """Yield that the model does not know its task, or that its validation images
    are too few for a tolerance in points.
    """
    from sophon._judgement.statistics import interval_of
    from sophon._records.metrics import kind_of

    kind, chance = kind_of(before), kind_of(before).chance(original.class_count, 0.0)
    if interval_of(before).low <= chance:
        yield (
            f"warning: the model does not know its original task: {kind.show(before.value, 1)} on"
            f" {before.total} images of {original.name}, chance is {kind.show(chance, 1)};"
            " protection keeps what a model can do: name its weights, set `classes` to the order"
            " that it learnt, or train it first (sophon pretrain)"
        )
    images = len(original.validation)
    tolerance = None if guard is None else guard.tolerance_points
    if kind.classifies and tolerance is not None and 100 / images > tolerance:
        yield (
            f"warning: one of {images} validation images of {original.name} is {100 / images:.1f}"
            f" points, more than the tolerance of {tolerance:g}: give more images (`validation`),"
            " or raise protect.guard.tolerance_points"
        )


def _show_profile(profiled: Profiled, mode: Mode) -> None:
    if profiled.result is None or mode == "quiet":
        return
    if mode == "json":
        say_json("profile", **profiled.result.data(), folder=str(profiled.folder))
        return
    print_rows(profiled.result.rows())
    typer.echo(f"profile of {profiled.rounds} rounds and a trace: {profiled.folder}")


def run_pretraining(case: Case, out: Path, mode: Mode) -> Pretrained:
    """Run or resume the training of the original task's model in `out`."""
    from sophon._cli.progress import Display, stage_text
    from sophon._training.pretrain import Pretraining

    run = Pretraining(
        case.model,
        original=case.original,
        task=case.task,
        spec=case.spec.pretrain,
        out=out,
        model_spec=case.network,
    )
    if run.done:
        remark(mode, f"{out} resumes after step {run.stages[-1].step}")
    say_read(case, mode)
    display = Display(mode, noun="stage", total=len(run), todo=len(run) - run.done)
    with stopping() as stop, display:
        display.start_at(run.done)
        for stage in run:
            display.step(stage.model_dump(mode="json"), stage_text(stage))
            if stop.asked and run.done < len(run):
                raise KeyboardInterrupt
    return run.result()


def show_pretrained(result: Pretrained, out: Path, mode: Mode) -> None:
    """Print what pre-training made."""
    from sophon._records.metrics import kind_of, shown

    file = out / "model.safetensors"
    if mode == "json":
        say_json("summary", validation=result.score.model_dump(), file=str(file))
        return
    score = f"{shown(result.score)} ({kind_of(result.score).noun})"
    typer.echo(f"trained: validation {score} after {result.stages[-1].step} steps; {file}")


def show_protected(result: Protected, out: Path, mode: Mode) -> None:
    """Print what protection made."""
    from sophon._records.metrics import shown

    file = out / "model.safetensors"
    if mode == "json":
        say_json(
            "summary",
            validation_before=result.before.model_dump(),
            validation_after=result.after.model_dump(),
            shipped_round=result.shipped_round,
            rounds=len(result.rounds),
            file=str(file),
        )
        return
    if result.shipped_round < len(result.rounds) / 2:
        typer.echo(
            f"warning: weights of round {result.shipped_round} are hardly protected; no later ones"
            " kept the original task within protect.guard's tolerance: raise it, or lower"
            " guard.price.most or the rate of protect.update",
            err=True,
        )
    typer.echo(
        f"protected: original validation {shown(result.before)} before,"
        f" {shown(result.after)} after; weights of round {result.shipped_round} of"
        f" {len(result.rounds)}; {file}"
    )


def show_verdict(made: Report, mode: Mode, files: dict[str, Path]) -> None:
    """Print the verdict table, the verdict and where the reports are."""
    verdict = str(made.verdict)
    if mode == "json":
        paths = {name: str(path) for name, path in files.items()}
        say_json("summary", **made.data(), **paths)
        return
    if mode != "quiet":
        print_rows([tuple(map(str, row)) for row in made.table()])
        for summary in made.summaries:
            for reason in summary.reasons:
                typer.echo(f"{summary.domain.name}: {reason}")
            if summary.verdict == "void":
                typer.echo(f"{summary.domain.name}: void, so the numbers above are no result")
    written = "".join(f"; {path}" for path in files.values())
    typer.echo(f"verdict: {verdict}{written}")


# What a terminal has room for; the pages have the rest.
_COMPARED: tuple[str, ...] = ("rank", "audit", "verdict", "advantage removed (95 %)")
_COMPARED += ("worst case, restricted test (95 %)", "original test before", "after")


def show_comparison(made: Comparison, files: dict[str, Path], *, as_json: bool) -> None:
    """Print a table for each group of audits that can be compared, and where the pages are."""
    if as_json:
        paths = {name: str(path) for name, path in files.items()}
        say_json("summary", differ_in=made.differing, groups=made.data(), **paths)
        return
    if made.differing:
        typer.echo(f"not all can be compared: they differ in {', '.join(made.differing)}")
    for group, table in zip(made.groups, made.tables(), strict=True):
        if made.differing:
            differs = "; ".join(f"{name}: {group.setting[name]}" for name in made.differing)
            typer.echo(f"\n{differs}")
        at = [table.header.index(title) for title in _COMPARED]
        print_rows([tuple(row[i] for i in at) for row in (table.header, *table.rows)])
        say(filter(None, (group.certainty, group.further)))
    say(map(str, files.values()) if files else ["More columns: --markdown FILE, --html FILE"])


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Print a table, its header first."""
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


def forecast_of(case: Case) -> Forecast:
    """Return what the case's protection is expected to take, by a few rounds on a copy."""
    from sophon._protection.forecast import forecast

    return forecast(
        case.model,
        original=case.original,
        restricted=case.restricted,
        task=case.task,
        spec=case.spec.protect,
        head=case.network.head,
    )


def show_forecast(case: Case, *, as_json: bool) -> None:
    """Print the resolved run and what it is expected to take."""
    from sophon._cli.progress import duration
    from sophon._training.evaluate import evaluate

    remark(mode_of(quiet=False, as_json=as_json), "measuring a few rounds for the forecast")
    expected = forecast_of(case)
    peak, setting = expected.peak_bytes, case.setting()
    if not as_json:
        model, images = setting.place(case.model), case.original.validation
        before = evaluate(model, setting, case.original, images)
        for line in _doubts(case.original, before, expected.spec.guard):
            remark("lines", line)
    show_resolved(
        case,
        {"protect": expected.spec},
        {"round_s": expected.round_s, "total_s": expected.total_s, "peak_bytes": peak},
        f"{expected.spec.rounds} rounds of {expected.round_s:.2g} s,"
        f" {duration(expected.total_s)} in all"
        + ("" if peak is None else f"; about {peak / 2**20:.0f} MiB of memory"),
        as_json=as_json,
    )


def show_pretraining_forecast(case: Case, *, as_json: bool) -> None:
    """Print the resolved run and what pre-training is expected to take."""
    from sophon._cli.progress import duration
    from sophon._training.pretrain import forecast

    spec = case.spec.pretrain
    step_s, total_s = forecast(
        case.model, original=case.original, task=case.task, spec=spec, model_spec=case.network
    )
    show_resolved(
        case,
        {},
        {"step_s": step_s, "total_s": total_s},
        f"{spec.steps} steps of {step_s:.2g} s, {duration(total_s)} in all",
        as_json=as_json,
    )


def show_resolved(
    case: Case,
    completed: dict[str, Spec],
    expected: dict[str, Any],
    said: str,
    *,
    as_json: bool,
    own: OwnInput | None = None,
) -> None:
    """Print a run with its `completed` tables, what was read of its domains, and a forecast, as
    values and as it is said; `own` as in `Case.read`.
    """
    from sophon._cli.progress import lines

    resolved = case.spec.model_dump(mode="json")
    resolved |= {name: table.model_dump(mode="json") for name, table in completed.items()}
    if as_json:
        say_json("forecast", spec=resolved, **expected, domains=case.read(own))
        return
    say(lines(resolved))
    # As comments: what is printed is a run file but for its last line.
    say(f"# {line}" for line in case.read(own))
    typer.echo(f"forecast: {said}; nothing was written")
