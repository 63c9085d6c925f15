"""The commands of `sophon`: their arguments, their help, and what they call.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sophon._base.errors import SpecError
from sophon._cli import application as cli
from sophon._cli import running

# What only reads and prints may run in several processes.
_SHARED = ("protect", "report", "compare", "inspect")

_OUT = cli.option("--out", "FOLDER", "Where to write; resumes there.")
Profile = Annotated[
    int | None,
    cli.option(
        "--profile",
        "ROUNDS",
        "Time the parts of so many rounds and trace one more, into FOLDER/profile.",
        parser=cli.counted,
    ),
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard",
        help="Spread training over torchrun's processes: for a model whose weights fit on one"
        " device but whose training state does not.",
    ),
]


@cli.app.callback(invoke_without_command=True)
@cli.guarded
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from sophon import __version__

        typer.echo(f"sophon {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand not in _SHARED:
        cli.require_alone(f"sophon {context.invoked_subcommand}")


@cli.command(
    "sophon protect run.toml --dry-run",
    "sophon protect run.toml --out runs/p1",
    "sophon protect run.toml --out runs/p2 --set protect.rounds=50 --set protect.seed=1",
    "torchrun --nproc-per-node 2 -m sophon protect run.toml --out runs/p3",
)
def protect(  # noqa: PLR0913, PLR0917 - one parameter an option
    run_file: cli.RunFile,
    out: Annotated[Path | None, _OUT] = None,
    settings: cli.Settings = None,
    quiet: cli.Quiet = False,
    as_json: cli.Json = False,
    dry_run: cli.DryRun = False,
    tensorboard: Annotated[
        Path | None, cli.option("--tensorboard", "FOLDER", "Log every round for TensorBoard.")
    ] = None,
    profile: Profile = None,
    threads: cli.Threads = None,
    shard: Shard = False,
) -> None:
    """Protect the model of RUN.TOML; repeat the command to resume.

    Under torchrun many processes share the work.
    """
    from sophon._cli.run_file import load, read_run, require_outside, require_place
    from sophon._protection.profile import require_rounds
    from sophon._training.ranks import process_group

    mode = running.mode_of(quiet, as_json)
    with process_group() as ranks:
        with ranks.agreeing():
            _require_one_process(ranks.world, profile, dry_run=dry_run)
            if not dry_run:
                out = cli.required_out(out, "runs/p1")
                require_place(out)
                require_outside(out, read_run(run_file, settings), run_file.parent)
            if tensorboard is not None:
                require_place(tensorboard)
            case = load(run_file, settings, threads)
            # Of a run that goes on fewer are left; that is known once its folder is open.
            if case.spec.protect.rounds is not None:
                require_rounds(profile or 0, case.spec.protect.rounds)
        if out is None or dry_run:
            running.show_forecast(case, as_json=as_json)
            return
        result = running.run_protection(
            case, out, mode, tensorboard=tensorboard, profile=profile, shard=shard
        )
        if ranks.first:
            running.show_protected(result, out, mode)


def _require_one_process(world: int, profile: int | None, *, dry_run: bool) -> None:
    """Raise SpecError where a forecast or a profile is asked of many processes, or of one both."""
    if dry_run and profile is not None:
        raise SpecError("--dry-run trains no round to --profile: leave one of them out")
    if dry_run and world > 1:
        raise SpecError("--dry-run forecasts one process: repeat it without torchrun")
    if profile is not None and world > 1:
        raise SpecError("--profile times one process: repeat it without torchrun")


@cli.command(
    "sophon pretrain run.toml --dry-run",
    "sophon pretrain run.toml --out runs/base",
    "sophon pretrain run.toml --out runs/base --set pretrain.steps=5000",
)
def pretrain(
    run_file: cli.RunFile,
    out: Annotated[Path | None, _OUT] = None,
    settings: cli.Settings = None,
    quiet: cli.Quiet = False,
    as_json: cli.Json = False,
    threads: cli.Threads = None,
    dry_run: cli.DryRun = False,
) -> None:
    """Train the model of RUN.TOML on its original domain; repeat the command to resume.

    The run file needs no restricted domain; one that is there is not read.
    """
    from sophon._cli.run_file import load_pretraining, require_place

    mode = running.mode_of(quiet, as_json)
    if dry_run:
        case = load_pretraining(run_file, settings, threads)
        running.show_pretraining_forecast(case, as_json=as_json)
        return
    out = cli.required_out(out, "runs/base")
    require_place(out)
    case = load_pretraining(run_file, settings, threads)
    running.show_pretrained(running.run_pretraining(case, out, mode), out, mode)


@cli.command("sophon evaluate run.toml", "sophon evaluate run.toml --model runs/p1 --split test")
def evaluate(
    run_file: cli.RunFile,
    model: Annotated[
        Path | None, cli.option("--model", "FILE", "A checkpoint instead of RUN.TOML's model.")
    ] = None,
    split: Annotated[
        str, cli.option("--split", "validation|test", "Which images to score.")
    ] = "validation",
    settings: cli.Settings = None,
    as_json: cli.Json = False,
    threads: cli.Threads = None,
) -> None:
    """Print the score on the original domain with its 95 % interval."""
    if split not in ("validation", "test"):
        raise SpecError(f"--split = {split!r}: use validation or test")
    from sophon._cli.run_file import load, load_subject
    from sophon._judgement.statistics import interval_of
    from sophon._models import own_input
    from sophon._records.metrics import kind_of
    from sophon._training.evaluate import evaluate as measure

    case = load(run_file, settings, threads)
    subject = case.model if model is None else load_subject(case, model)[0]
    setting = replace(case.setting(), own=own_input(subject))
    images = case.original.test if split == "test" else case.original.validation
    score = measure(setting.place(subject), setting, case.original, images)
    interval = interval_of(score)
    kind = kind_of(score)
    low, high = kind.interval(interval)
    if as_json:
        held = {"split": split, **score.model_dump(), "low": interval.low, "high": interval.high}
        cli.say_json("summary", domain=case.original.name, **held)
        return
    chance = kind.show(kind.chance(case.original.class_count, 0.0), 1)
    guessing = f"; guessing: {chance}" if kind.classifies else ""
    typer.echo(
        f"{case.original.name} {split}: {kind.noun} {kind.show(score.value, 1)} on {score.total}"
        f" images (95 % interval {low} to {high}){guessing}"
    )


@cli.command("sophon demo", "sophon demo --out first-look --threads 2")
def demo(
    out: Annotated[Path, cli.option("--out", "FOLDER", "Where everything is written.")] = Path(
        "demo"
    ),
    settings: cli.Settings = None,
    quiet: cli.Quiet = False,
    as_json: cli.Json = False,
    threads: cli.Threads = None,
) -> None:
    """Protect, audit and report a toy model on embedded images."""
    from sophon._base.files import require_writable, write_new_text
    from sophon._cli.demo import RUN, WHAT_IT_SHOWS
    from sophon._cli.first_look import first_look
    from sophon._cli.run_file import require_place

    mode = running.mode_of(quiet, as_json)
    require_place(out)
    require_writable(out)
    write_new_text(out / "run.toml", RUN)
    first_look(out / "run.toml", out, settings, mode, threads, note=WHAT_IT_SHOWS)
