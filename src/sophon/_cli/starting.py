"""`sophon init` and `sophon try`: from folders of images to a run file, and to a first report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sophon._base.errors import CheckpointError
from sophon._cli import application as cli
from sophon._cli import running
from sophon._cli.auditing import parse_duration
from sophon._cli.first_look import START, USUAL, Chosen, affordable, first_look

if TYPE_CHECKING:
    from sophon._cli.progress import Mode
    from sophon._specs import ModelSpec

_SIZE = 64

_TEMPLATE = """\
# Written by `{command}`.
# What is left out has its default: `sophon inspect` prints it.
#   sophon protect {file} --dry-run
#   sophon protect {file} --out protected
#   sophon audit {file} --model protected --out audit

[model]
name = {model}
{weights}

[original]                  # the task to keep: a folder of images for each class
source = "folder"
path = {keep}
image_size = {size}             # {resized}; the same for all domains{fit}

[[restricted]]              # the task to refuse
source = "folder"
path = {refuse}
image_size = {size}{fit}
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
{every}
[audit]
suite = "{suite}"           # attacks on the protected, the given and a fresh network
{attacks}
"""
# What can acquit, and what fits some minutes and cannot.
_WHOLE = """\
steps = {steps:<19} # of each attack: ten times the rehearsed ones at least
seeds = [0, 1, 2]           # three or more for a verdict to be good news"""
_SHORT = """\
steps = {steps:<19} # of each attack
evaluations = 6             # how often each attack is measured
batch_size = 32
seeds = [0]                 # three or more for a verdict to be good news"""
_ALLOWED = """
[[benign]]                  # a task that must stay possible: the audit measures it
source = "folder"
path = {path}
image_size = {size}{fit}
"""
_EVERY = "every = {:<17} # rounds: the last weights within the tolerance are shipped\n"
# How the network's own images are resized.
_FIT = """
interpolation = {interpolation}     # as is stated with the network, like the rest
crop_pct = {crop_pct}
crop_mode = {crop_mode}"""


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

    def require(self, mode: Mode) -> int:
        """Return the side of the images, in pixels, that the network takes; say what is read.

        Raises SophonError for weights that are not there, networks that cannot be built and, in the
        words of `protect`, images that it would refuse: damaged ones, too few, of too few classes.
        """
        from sophon._cli.run_file import parse_run
        from sophon._data import check_apart, load_domain
        from sophon._models import input_side, require_model
        from sophon._protection.presets import require_images

        require_model(self.spec)
        size = self.image_size or input_side(self.spec, _SIZE)
        run = parse_run(self.run_file(Path("run.toml"), "init", size), None, where="run.toml")
        flags = ("--keep", "--refuse", *("--allow" for _ in run.benign))
        specs = (run.original, *run.restricted, *run.benign)
        running.remark(mode, "reading all images once, to refuse at once what protect would")
        original, refused, *_ = (
            load_domain(spec, role=flag) for flag, spec in zip(flags, specs, strict=True)
        )
        check_apart(original, (refused,))
        require_images((refused,))
        return size

    @property
    def spec(self) -> ModelSpec:
        """The network, with paths from where the command runs."""
        from sophon._specs import ModelSpec

        weights = None if self.weights is None else str(self.weights)
        return ModelSpec(name=self.model, weights=weights, pretrained=self.pretrained)

    def run_file(self, file: Path, command: str, size: int, chosen: Chosen = USUAL) -> str:
        """Return the run file that a command, `init` or `try`, writes; its paths start at its
        folder.
        """
        from sophon._cli.progress import toml
        from sophon._models import brings_weights, renamed, stated_input

        def placed(path: Path) -> str:
            # A link is named as such: it may lead elsewhere one day.
            given = path.parent.resolve() / path.name if ".." in path.parts else path.absolute()
            return Path(os.path.relpath(given, file.parent.resolve())).as_posix()

        def at(path: Path) -> str:
            return toml(placed(path))

        images = [path.resolve() for path in (self.keep, self.refuse, *self.allow)]

        def of(path: Path) -> str:
            name, parent = path.resolve().name, path.resolve().parent.name
            alike = [one.name for one in images].count(name) > 1
            return at(path) + (f"\nname = {toml(f'{parent}-{name}')}" if alike else "")

        trained = f"weights = {toml(START)}   # made by this command"
        weights = trained if command == "try" else "# weights = FILE; without, they are random"
        if self.weights is not None:
            weights = f"weights = {at(self.weights)}"
        elif brings_weights(self.spec):
            weights = "# it brings its weights"
        elif self.pretrained and command == "init":
            weights = "pretrained = true           # published weights, fetched once"
        own = stated_input(self.spec)
        fit = "" if own is None else _FIT.format(**{k: toml(v) for k, v in own.items()})
        squashes = own is not None and own["crop_mode"] == "squash"
        rounds, allowed = chosen.rounds, self.allow
        return _TEMPLATE.format(
            command=cli.typed(f"sophon {command}"),
            file=file.name,
            model=toml(renamed(self.model, placed)),
            weights=weights,
            keep=of(self.keep),
            refuse=of(self.refuse),
            size=size,
            fit=fit,
            resized="squashed" if squashes else "shorter side resized, middle cut",
            allowed="".join(_ALLOWED.format(path=of(o), size=size, fit=fit) for o in allowed),
            rounds="# rounds: by the number of images" if rounds is None else f"rounds = {rounds}",
            suite=chosen.suite,
            attacks=(_SHORT if command == "try" else _WHOLE).format(steps=chosen.steps),
            tolerance=chosen.tolerance,
            every="" if rounds is None else _EVERY.format(max(1, rounds // 5)),
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
    size = wanted.require(running.mode_of(quiet=False, as_json=False))
    text = wanted.run_file(out, "init", size)
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
    from sophon._cli.run_file import (
        load_spec,
        parse_run,
        read_run,
        require_outside,
        require_place,
    )
    from sophon._data.loading import reading_once

    began = time.monotonic()
    mode, seconds, run = running.mode_of(quiet, as_json), parse_duration(budget), out / "run.toml"
    require_place(out)
    require_unused(out, run.name)
    wanted = Wanted(model, weights, pretrained, keep, refuse, tuple(allow or ()), image_size)
    with reading_once():
        size = wanted.require(mode)
        text = wanted.run_file(run, "try", size)
        spec = parse_run(text, settings, where=str(run))
        require_outside(out, spec, run.parent)
        if run.is_file():
            held = read_run(run, settings)
            tables = ("model", "original", "restricted", "benign")
            changed = [name for name in tables if getattr(held, name) != getattr(spec, name)]
            if changed:
                raise CheckpointError(
                    f"{run} is of other options ({', '.join(changed)}): give another --out, or"
                    " repeat the command as it was"
                )
        else:
            require_writable(out)  # and made: paths start there
            case = load_spec(spec, out, threads, untrained=True)
            chosen = affordable(case, mode, seconds, began, trains=START in text)
            write_text(run, wanted.run_file(run, "try", size, chosen))
        first_look(run, out, settings, mode, threads, pretrained=pretrained)
