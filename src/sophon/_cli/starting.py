"""`sophon init` and `sophon try`: from folders of images to a run file, and to a first report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sophon._base.errors import CheckpointError, DataError
from sophon._cli import application as cli
from sophon._cli import running
from sophon._cli.auditing import audit_of, parse_duration, run_audit, write_audit

if TYPE_CHECKING:
    from sophon._cli.progress import Mode
    from sophon._specs import ModelSpec

# Where a network that came without weights is trained, beside the run file.
START = "start/model.safetensors"
_SIZE = 64
# Points that the task to keep may lose.
_TOLERANCE = 3.0
# Of the time: for rounds and for attacks; the rest is for reading, training and pictures.
_PROTECTING, _AUDITING = 0.45, 0.35
_LEAST_ROUNDS, _LEAST_STEPS, _STEPS, _MOST_STEPS = 20, 20, 60, 200

_TEMPLATE = """\
# Written by `sophon {command}`. What is left out has its default: `sophon inspect` prints it.
#   sophon protect {file} --dry-run
#   sophon protect {file} --out protected
#   sophon audit {file} --model protected --out audit

[model]
name = {model}
{weights}

[original]                  # the task to keep: a folder of images for each class
source = "folder"
path = {keep}
image_size = {size}             # shorter side resized, middle cut out; the same for all domains

[[restricted]]              # the task to refuse
source = "folder"
path = {refuse}
image_size = {size}
{allowed}
[pretrain]                  # only `sophon pretrain` and a `sophon try` without weights
steps = 300
batch_size = 32

[protect]
method = "erasure"          # labels of the task to refuse are to be found at no depth
{rounds}
seed = 0

[protect.guard]
tolerance_points = {tolerance:<8} # points of validation accuracy that the task to keep may lose

[audit]
suite = "quick-2"           # seventeen attacks on the protected, the given and a fresh network
{steps}
evaluations = 6             # how often each attack is measured
batch_size = 32
seeds = [0]                 # three or more for a verdict to be good news
"""
_ALLOWED = """
[[benign]]                  # a task that must stay possible: the audit measures it
source = "folder"
path = {path}
image_size = {size}
"""


@dataclass(frozen=True)
class Wanted:
    """What a run file is made from: a network, its weights, and folders of images."""

    model: str
    weights: Path | None
    pretrained: bool
    keep: Path
    refuse: Path
    allow: tuple[Path, ...]
    image_size: int | None

    def require(self) -> int:
        """Return the side of the images, in pixels, that the network takes.

        Raises SophonError for folders without classes, weights that are not there, and networks
        that cannot be built; no image is opened.
        """
        from sophon._data.images import Fit
        from sophon._data.sources.folders import read_folder
        from sophon._models import input_side, require_model

        folders = [("--keep", self.keep), ("--refuse", self.refuse)]
        for flag, folder in (*folders, *(("--allow", folder) for folder in self.allow)):
            try:
                read_folder(folder, Fit())
            except DataError as error:
                raise DataError(f"{flag}: {error}") from None
        require_model(self.spec)
        return self.image_size or input_side(self.spec, _SIZE)

    @property
    def spec(self) -> ModelSpec:
        """The network, with paths from where the command runs."""
        from sophon._specs import ModelSpec

        weights = None if self.weights is None else str(self.weights)
        return ModelSpec(name=self.model, weights=weights, pretrained=self.pretrained)

    def run_file(
        self,
        file: Path,
        command: str,
        size: int,
        rounds: int | None = None,
        steps: int = _STEPS,
        tolerance: float = _TOLERANCE,
    ) -> str:
        """Return the run file; its paths start at its folder."""
        from sophon._cli.progress import toml
        from sophon._models import brings_weights, renamed

        def placed(path: Path) -> str:
            return Path(os.path.relpath(path.resolve(), file.parent.resolve())).as_posix()

        def at(path: Path) -> str:
            return toml(placed(path))

        trained = f"weights = {toml(START)}   # made by this command"
        weights = trained if command == "try" else "# weights = FILE; without, they are random"
        if self.weights is not None:
            weights = f"weights = {at(self.weights)}"
        elif brings_weights(self.spec):
            weights = "# it brings its weights"
        elif self.pretrained and command == "init":
            weights = "pretrained = true           # published weights, fetched once"
        return _TEMPLATE.format(
            command=command,
            file=file.name,
            model=toml(renamed(self.model, placed)),
            weights=weights,
            keep=at(self.keep),
            refuse=at(self.refuse),
            size=size,
            allowed="".join(_ALLOWED.format(path=at(one), size=size) for one in self.allow),
            rounds="# rounds: by the number of images" if rounds is None else f"rounds = {rounds}",
            steps=f"steps = {steps}" + " " * 8 + "# of each attack",
            tolerance=tolerance,
        )


Model = Annotated[
    str, cli.option("--model", "NAME", "The network, such as timm:resnet18 or resnet20.")
]
Keep = Annotated[
    Path, cli.option("--keep", "FOLDER", "Images of the task to keep, a folder for each class.")
]
Refuse = Annotated[Path, cli.option("--refuse", "FOLDER", "Images of the task to refuse, alike.")]
Weights = Annotated[
    Path | None, cli.option("--weights", "FILE", "The network's weights, safetensors or torch.")
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Take published weights, which may be fetched.")
]
Allow = Annotated[
    list[Path] | None,
    cli.option("--allow", "FOLDER", "Images of a task that must stay possible. May be repeated."),
]
Size = Annotated[
    int | None,
    cli.option(
        "--image-size",
        "PIXELS",
        f"The side of the images; default: {_SIZE}, or the network's.",
        parser=cli.counted,
    ),
]


@cli.command(
    "sophon init --model timm:resnet18 --weights w.safetensors --keep photos --refuse faces",
    "sophon init --model resnet20 --keep photos --refuse faces --allow plants --out my.toml",
)
def init(
    model: Model,
    keep: Keep,
    refuse: Refuse,
    weights: Weights = None,
    pretrained: Pretrained = False,
    allow: Allow = None,
    image_size: Size = None,
    out: Annotated[Path, cli.option("--out", "FILE", "The run file to write.")] = Path("run.toml"),
) -> None:
    """Write a run file to start from, with comments; never over a file that exists."""
    from sophon._base.files import require_writable, write_new_text
    from sophon._cli.run_file import parse_run, require_place
    from sophon._models import brings_weights

    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already: give another --out, or delete it")
    require_place(out.parent)
    wanted = Wanted(model, weights, pretrained, keep, refuse, tuple(allow or ()), image_size)
    text = wanted.run_file(out, "init", wanted.require())
    parse_run(text, None, where=str(out))
    require_writable(out.parent)
    write_new_text(out, text)
    random = not (weights or pretrained or brings_weights(wanted.spec))
    first = "name the network's weights in it or train them (sophon pretrain), then " * random
    typer.echo(f"written: {out}; next: {first}sophon protect {out} --dry-run")


@cli.command(
    "sophon try --model timm:resnet18 --weights w.safetensors --keep photos --refuse faces",
    "sophon try --model resnet20 --keep photos --refuse faces --out first-look --budget 20m",
    name="try",
)
def try_(  # noqa: PLR0913, PLR0917 - one parameter an option
    model: Model,
    keep: Keep,
    refuse: Refuse,
    weights: Weights = None,
    pretrained: Pretrained = False,
    allow: Allow = None,
    image_size: Size = None,
    out: Annotated[Path, cli.option("--out", "FOLDER", "Where everything is written.")] = Path(
        "first-look"
    ),
    budget: Annotated[
        str, cli.option("--budget", "TIME", "Rounds and steps are chosen to take about so long.")
    ] = "10m",
    settings: cli.Settings = None,
    quiet: cli.Quiet = False,
    as_json: cli.Json = False,
    threads: cli.Threads = None,
) -> None:
    """Write a run file, protect, audit and report within some minutes.

    A network without weights is trained first. Repeat the command to resume.
    """
    from sophon._base.files import require_unused, require_writable, write_text
    from sophon._cli.run_file import parse_run, read_run, require_outside, require_place

    mode, seconds, run = running.mode_of(quiet, as_json), parse_duration(budget), out / "run.toml"
    require_place(out)
    require_unused(out, run.name)
    wanted = Wanted(model, weights, pretrained, keep, refuse, tuple(allow or ()), image_size)
    size = wanted.require()
    text = wanted.run_file(run, "try", size)
    spec = parse_run(text, settings, where=str(run))
    require_outside(out, spec, run.parent)
    if run.is_file():
        held = read_run(run, settings)
        tables = ("model", "original", "restricted", "benign")
        changed = [name for name in tables if getattr(held, name) != getattr(spec, name)]
        if changed:
            raise CheckpointError(
                f"{run} is of other options ({', '.join(changed)}): give another --out, or repeat"
                " the command as it was"
            )
    else:
        require_writable(out)  # and made: paths start there
        chosen = _affordable(text, run, settings, mode, threads, seconds)
        write_text(run, wanted.run_file(run, "try", size, *chosen))
    first_look(run, out, settings, mode, threads, pretrained=pretrained)


def _affordable(
    text: str,
    run: Path,
    settings: list[str] | None,
    mode: Mode,
    threads: int | None,
    seconds: float,
) -> tuple[int, int, float]:
    """Return the rounds, and the steps of an attack, that fit so many seconds, and the tolerance
    that the images allow to measure; say what they take.
    """
    from sophon._cli.progress import duration
    from sophon._cli.run_file import load_spec, parse_run

    running.remark(mode, "measuring a few rounds and steps, to choose how many there is time for")
    case = load_spec(parse_run(text, settings, where=str(run)), run.parent, threads, untrained=True)
    expected = running.forecast_of(case)
    most = expected.spec.rounds or _LEAST_ROUNDS
    rounds = max(_LEAST_ROUNDS, min(most, int(_PROTECTING * seconds / expected.round_s)))
    attacks = audit_of(case, case.model, case.model).forecast()
    steps, attacked = case.spec.audit.steps, attacks.seconds or 0.0
    if attacked:
        affordable = int(steps * _AUDITING * seconds / attacked)
        chosen = max(_LEAST_STEPS, min(_MOST_STEPS, affordable))
        attacked, steps = attacked * chosen / steps, chosen
    protected = rounds * expected.round_s
    running.remark(
        mode,
        f"forecast: {rounds} rounds, {duration(protected)}; {attacks.trials} attacks of {steps}"
        f" steps, {duration(attacked)}; about {duration(protected + attacked)} in all"
        + ", besides training the network first"
        * (START in text),
    )
    # Of few images each is several points: three of them may be lost in a first look.
    fewest = 300 / len(case.original.validation)
    return rounds, steps, max(_TOLERANCE, round(fewest, 1))


def first_look(
    run: Path,
    out: Path,
    settings: list[str] | None,
    mode: Mode,
    threads: int | None,
    *,
    pretrained: bool = False,
    note: str = "",
) -> None:
    """Do what a run file says from the first step to the report in `out`, its folder, or go on.

    A network whose weights are to be at `START` is trained first, from published weights where
    `pretrained`; `note` heads the report. Raises SophonError as the commands do.
    """
    from sophon._cli.run_file import load, load_pretraining, read_run
    from sophon._records.metrics import shown

    start = out / START
    if not start.is_file() and read_run(run, settings).model.weights == START:
        published = [*(settings or ()), *(["model.pretrained=true"] if pretrained else ())]
        training = load_pretraining(run, published, threads, untrained=True)
        result = running.run_pretraining(training, start.parent, mode)
        scored = f"{training.original.name} validation {shown(result.score)}"
        running.remark(mode, f"trained: {scored}")
    case = load(run, settings, threads)
    protected = out / "protected"
    made = running.run_protection(case, protected, mode)
    if mode != "quiet":
        running.show_protected(made, protected, mode)
    record = run_audit(case, protected, mode, store=out / "audit", note=note)
    report = write_audit(record, out / "audit")
    if note and mode in ("bar", "lines"):
        typer.echo(note)
    running.show_verdict(report, mode, {"report": (out / "audit" / "report.html").absolute()})
