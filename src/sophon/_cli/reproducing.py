"""`sophon reproduce`: run a cell of the paper's grid, or show the grid and its tables."""

from __future__ import annotations

import json
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sophon._base.errors import (
    CheckpointError,
    DataError,
    IntactnessError,
    LockedError,
    NonFiniteError,
    SophonError,
    SpecError,
)
from sophon._cli.application import Quiet, Settings, Threads, app, counted, guarded
from sophon._cli.auditing import run_audit, write_audit
from sophon._cli.running import (
    mode_of,
    run_pretraining,
    run_protection,
    say,
    show_forecast,
    show_pretrained,
    show_protected,
    show_verdict,
)
from sophon._cli.showing import show_ablation, show_list, show_robustness, show_table

if TYPE_CHECKING:
    from sophon._cli.progress import Mode
    from sophon._cli.run_spec import PretrainRunSpec, RunSpec
    from sophon._grid import Cell, Scale

ABLATION = "ablation"
_TRACEBACK = "traceback.txt"


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon reproduce --list\n"
    "  sophon reproduce resnet18-gtsrb-klu --threads 2 --workers 2\n"
    "  sophon reproduce caformer-cifar10-ice --scale paper --out runs\n"
    "  sophon reproduce all --scale small\n"
    "  sophon reproduce robustness\n"
    "  sophon reproduce ablation --threads 2 --workers 2\n"
    "  sophon reproduce --table\n"
    "  sophon reproduce resnet18-gtsrb-klu --table\n"
    "  sophon reproduce ablation --table\n"
)
@guarded
def reproduce(  # noqa: PLR0913, PLR0917 - one parameter an option
    cell: Annotated[
        str | None,
        typer.Argument(
            metavar="CELL", help="A cell, `all` of a scale, `robustness`, or `ablation`."
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale",
            metavar="small|paper",
            help="Which size of the cells; default: small, and both for --list.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where runs are kept; resumes there.")
    ] = Path("runs"),
    listed: Annotated[bool, typer.Option("--list", help="List the cells; run nothing.")] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Print published beside re-measured numbers, of all cells of a scale or of CELL,"
            " or the tables of `robustness` or `ablation`; run nothing.",
        ),
    ] = False,
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            metavar="CELL",
            help="Whose protected model `robustness` attacks; default: one cell of each mode.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what protecting CELL is expected to take; write nothing."
        ),
    ] = False,
    settings: Settings = None,
    quiet: Quiet = False,
    threads: Threads = None,
    workers: Annotated[
        int,
        typer.Option("--workers", parser=counted, metavar="N", help="Processes that run trials."),
    ] = 1,
) -> None:
    """Train, protect and audit a cell of the paper's tables; repeat the command to resume.

    The model of the original task is trained first if it is missing. `--set` changes the cell, and
    is then no longer the cell of that name: give another --out.
    """
    from sophon._cli.run_file import require_folder, require_place
    from sophon._grid import CELLS, ROBUSTNESS, cell_of

    size = _size_of(scale)
    _require_consistent(cell, size, listed=listed, table=table, of=of, settings=settings)
    _require_cell(cell, dry_run=dry_run, shown=listed or table)
    require_folder(out)
    if listed:
        show_list(out, size if scale else None)
        return
    if table:
        _show_table(cell, size, out, of)
        return
    if cell is None:
        raise SpecError("name a cell, `all`, `robustness` or `ablation`; --list shows the cells")
    require_place(out)
    jobs = _Jobs(out, settings, mode_of(quiet, False), threads, workers)
    if dry_run:
        jobs.forecast(cell_of(cell, size))
    elif cell == ROBUSTNESS:
        jobs.all_robustness(_attacked(size, of))
    elif cell == ABLATION:
        jobs.ablation()
    elif cell == "all":
        jobs.run_all([one for one in CELLS if one.scale == size])
    else:
        chosen = cell_of(cell, size)
        jobs.run(chosen)
        jobs.show_row(chosen)


def _size_of(scale: str | None) -> Scale:
    """Return the scale of that name, small without one. Raises SpecError for another name."""
    from sophon._grid import SCALES

    if scale not in (None, *SCALES):
        raise SpecError(f"--scale = {scale!r}: use {' or '.join(SCALES)}")
    return "paper" if scale == "paper" else "small"


def _require_cell(cell: str | None, *, dry_run: bool, shown: bool) -> None:
    """Raise SpecError where a forecast is asked for and not of one cell."""
    from sophon._grid import ROBUSTNESS

    if dry_run and (shown or cell in (None, "all", ROBUSTNESS, ABLATION)):
        raise SpecError(
            "--dry-run says what protecting one cell takes: name a cell, without --list or --table"
        )


def _attacked(scale: Scale, of: str | None) -> list[Cell]:
    """Return the cells whose protected models `robustness` attacks: one of each mode, or `of`."""
    from sophon._grid import ROBUST_CELLS, cell_of

    return [cell_of(name, scale) for name in (ROBUST_CELLS[scale] if of is None else (of,))]


def _show_table(cell: str | None, scale: Scale, out: Path, of: str | None) -> None:
    """Print what is stored of the cell or the study of that name; of all cells without one."""
    from sophon._grid import ROBUSTNESS, cell_of

    if cell == ROBUSTNESS:
        show_robustness(out, _attacked(scale, of))
    elif cell == ABLATION:
        show_ablation(out)
    else:
        show_table(out, scale, None if cell is None else cell_of(cell, scale))


def _require_consistent(
    cell: str | None,
    scale: Scale,
    *,
    listed: bool,
    table: bool,
    of: str | None,
    settings: list[str] | None,
) -> None:
    """Raise SpecError for options that exclude each other, or that would do nothing."""
    from sophon._grid import ROBUSTNESS

    shows = "--list" if listed else "--table"
    if listed and table:
        raise SpecError("--list and --table: give one of them")
    if of is not None and (cell != ROBUSTNESS or listed):
        raise SpecError(f"--of = {of} is for `sophon reproduce robustness`: leave it out")
    if cell == ABLATION and scale != "small":
        raise SpecError(f"--scale = {scale}: the ablation study is small only; leave it out")
    if not (listed or table):
        return
    if cell is not None and (listed or cell == "all"):
        raise SpecError(
            f"{cell} and {shows}: {shows} shows all cells and runs nothing; leave one out"
        )
    if settings:
        raise SpecError(
            f"--set {settings[0]!r} and {shows}: {shows} shows what was run; leave one out"
        )


class _Jobs:
    """Runs cells below one folder: bases, then protections, then audits that share a store."""

    def __init__(
        self,
        out: Path,
        settings: list[str] | None,
        mode: Mode,
        threads: int | None,
        workers: int,
    ) -> None:
        self.out, self.mode = out, mode
        self.settings = [_from_here(one) for one in settings or ()]
        self.threads, self.workers = threads, workers

    @property
    def _of_cells(self) -> list[str]:
        """The settings that concern a cell; where its base comes from is the base's affair."""
        from sophon._sameness import OF_BASE, key_of

        return [one for one in self.settings if key_of(one) not in OF_BASE]

    @property
    def _of_bases(self) -> list[str]:
        """The settings that concern the training of the original task."""
        from sophon._sameness import key_of

        parts = ("original", "model", "pretrain", "task")
        return [one for one in self.settings if key_of(one).partition(".")[0] in parts]

    def run(self, cell: Cell) -> None:
        """Run a cell from where it stopped."""
        self._announce(f"{cell.name} ({cell.scale})")
        with _failure_kept(self._place(cell)):
            file, base = self._prepared(cell)
            self._protected_and_audited(file, file.parent, base, [])

    def forecast(self, cell: Cell) -> None:
        """Print what protecting a cell is expected to take, with random weights where its base is
        not trained yet; nothing is written.
        """
        from sophon._cli.run_file import load
        from sophon._grid import DIFFUSION, UNET_FILES, UNETS, run_file

        self._base_text(cell)
        settings = list(self._of_cells)
        with TemporaryDirectory() as folder:
            file, unet = Path(folder, "run.toml"), Path(folder, UNET_FILES[cell.scale])
            file.write_text(run_file(cell, cell.name, str((self.out / "bases").absolute())))
            if cell.architecture == DIFFUSION:
                unet.write_text(UNETS[cell.scale])
                settings.append(_setting("model.name", f"diffusers:{unet}"))
            show_forecast(load(file, settings, self.threads, network_only=True), as_json=False)

    def show_row(self, cell: Cell) -> None:
        """Print the cell's row of the table, published beside re-measured; nothing where quiet."""
        if self.mode in ("bar", "lines"):
            say([""])
            show_table(self.out, cell.scale, cell)

    def _prepared(self, cell: Cell) -> tuple[Path, Path]:
        """Return a cell's run file and the folder of its base, which is trained if it is missing.

        Raises SpecError or CheckpointError before anything is trained where the settings do not fit
        or something else was run there.
        """
        from sophon._grid import DIFFUSION, UNET_FILES, UNETS
        from sophon._sameness import base_folder

        text = self._base_text(cell)
        self._require_pictures(cell)
        file = self._run_file(cell)
        base = base_folder(self.out, cell)
        if cell.architecture == DIFFUSION:
            unet = self.out / "bases" / UNET_FILES[cell.scale]
            _recipe(unet, UNETS[cell.scale], json.loads, ran=[base])
        self._trained(base, text, file)
        return file, base

    def _base_text(self, cell: Cell) -> str:
        """Return the run file of a cell's base. Raises SpecError for settings that do not fit it or
        the cell's.
        """
        from sophon._grid import DIFFUSION, base_file, run_file
        from sophon._sameness import key_of

        if cell.architecture == DIFFUSION and "model.name" in map(key_of, self.settings):
            raise SpecError(
                f"--set model.name: {cell.name} protects the network that it trained first; for"
                " another one write run files of your own, for `sophon pretrain` and the rest"
            )
        text = base_file(cell, f"recipes/{cell.scale}/base-{cell.architecture}.toml")
        self._check(run_file(cell, cell.name, "."), [])
        self._check_base(text)
        return text

    def _require_pictures(self, cell: Cell) -> None:
        """Raise SpecError where the audit of a diffusion model could not judge its pictures."""
        from sophon._grid import DIFFUSION, run_file

        if cell.architecture != DIFFUSION:
            return
        run = self._check(run_file(cell, cell.name, "."), [])
        if run.audit.samples.count and run.task.timestep is None:
            from sophon._auditing.picture_quality import require_torchmetrics

            require_torchmetrics()

    def _check(self, text: str, settings: list[str]) -> RunSpec:
        """Return what a run file says with its settings. Raises SpecError, before anything is
        trained, for settings that do not fit it.
        """
        from sophon._cli.run_file import parse_run

        return parse_run(text, [*self._of_cells, *settings], where="--set")

    def _check_base(self, text: str) -> PretrainRunSpec:
        """Return what the run file of a base says with its settings; raise as `_check`."""
        from sophon._cli.run_file import parse_pretraining

        return parse_pretraining(text, self._of_bases, where="--set")

    def _announce(self, what: str) -> None:
        if self.mode in ("bar", "lines"):
            typer.echo(what, err=True)

    def _protected_and_audited(
        self, file: Path, folder: Path, base: Path, settings: list[str]
    ) -> None:
        """Run a protection and its audit in `folder`, from where they stopped."""
        from sophon._cli.run_file import load
        from sophon._sameness import require_same_training

        settings = [*self._of_cells, *settings]
        case = load(file, settings, self.threads)
        require_same_training(base, case.original.fingerprint(), case.task.name)
        result = run_protection(case, folder / "protected", self.mode)
        show_protected(result, folder / "protected", self.mode)
        self._audit(file, folder / "protected", folder / "audit", settings)

    def run_all(self, cells: list[Cell]) -> None:
        """Run cells in turn, going on where one cannot be run; raise the first error at the end."""
        failed: dict[str, Exception] = {}
        for cell in cells:
            error = self._tried(partial(self.run, cell), cell.name, self._place(cell))
            if error is not None:
                failed[cell.name] = error
        _raise_first(failed, len(cells), "cells")

    def _tried(self, work: Callable[[], None], name: str, folder: Path) -> Exception | None:
        """Do a part of the work; return what it raised, whose traceback is kept in `folder`."""
        from sophon._base.files import write_text

        kept = folder / _TRACEBACK
        kept.unlink(missing_ok=True)
        try:
            with _failure_kept(folder, make=True):
                work()
        except Exception as error:  # noqa: BLE001 - the others are still to be run
            folder.mkdir(parents=True, exist_ok=True)
            write_text(kept, traceback.format_exc())
            typer.echo(f"{name}: {_said(error)} (see {kept})", err=True)
            return error
        return None

    def _place(self, cell: Cell) -> Path:
        return self.out / cell.scale / cell.name

    def all_robustness(self, cells: list[Cell]) -> None:
        """Attack the protected models of some cells in turn, going on where one cannot be."""
        for cell in cells:
            self._base_text(cell)
            self._require_pictures(cell)
        if len(cells) == 1:
            self.robustness(cells[0])
            return
        failed: dict[str, Exception] = {}
        for cell in cells:
            work = partial(self.robustness, cell)
            error = self._tried(work, cell.name, self._robustness_place(cell))
            if error is not None:
                failed[cell.name] = error
        _raise_first(failed, len(cells), "cells")

    def _robustness_place(self, cell: Cell) -> Path:
        from sophon._reproduction import robustness_folder

        return robustness_folder(self.out, cell)

    def robustness(self, cell: Cell) -> None:
        """Attack a cell's protected model with the attacks of the robustness tables.

        Raises CheckpointError where the model was protected otherwise than the settings say.
        """
        from sophon._base.files import write_text
        from sophon._cli.run_file import read_run
        from sophon._reproduction import read_stored, robustness_attacks, robustness_tables
        from sophon._sameness import require_same_protection

        file, base = self._prepared(cell)
        run = read_run(file, self._of_cells)
        protected = self._place(cell) / "protected"
        if (protected / "model.safetensors").is_file():
            require_same_protection(protected, run.protect)
        else:
            self.run(cell)
        spec = run.audit
        extra = [s.model_dump(mode="json") for s in (*spec.extra, *robustness_attacks(spec))]
        folder = self._robustness_place(cell)
        settings = [*self._of_cells, _setting("audit.extra", extra)]
        self._audit(file, protected, folder / "audit", settings)
        record = read_stored(folder / "audit" / "record.json")
        assert record is not None
        tables = robustness_tables(record, cell, base)
        write_text(folder / "tables.md", tables)
        say([tables])

    def ablation(self) -> None:
        """Run the study of what the paper ablates; go on where a run of it fails."""
        from sophon import _ablation as study
        from sophon._ablation_plot import draw, require_matplotlib
        from sophon._base.files import write_text

        require_matplotlib()
        for variation in study.variations():
            self._check(study.run_file("."), list(variation.settings))
        self._check_base(study.BASE_FILE)
        folder, base = self.out / "small" / study.NAME, self.out / "bases" / f"small-{study.NAME}"
        ran = [folder / variation.name for variation in study.variations()]
        text = study.run_file("../../bases")
        file = _recipe(folder / "run.toml", text, tomllib.loads, ran=ran)
        self._trained(base, study.BASE_FILE, file)
        failed: dict[str, Exception] = {}
        for variation in study.variations():
            self._announce(f"{study.NAME}: {variation.name}")
            place, settings = folder / variation.name, list(variation.settings)
            work = partial(self._protected_and_audited, file, place, base, settings)
            error = self._tried(work, variation.name, place)
            # Weights that never meet the tolerance, or diverge, are what the study is to find out.
            if error is not None and not isinstance(error, IntactnessError | NonFiniteError):
                failed[variation.name] = error
        held = study.results(folder)
        tables = study.table(folder, held)
        write_text(folder / "table.md", tables)
        draw(held, folder / "ablation.svg")
        say([tables, str(folder / "ablation.svg")])
        _raise_first(failed, len(study.variations()), "runs of the study")

    def _audit(self, file: Path, protected: Path, out: Path, settings: list[str] | None) -> None:
        from sophon._cli.run_file import load

        case = load(file, settings, self.threads)
        # Below one folder a scale: trials of unprotected models and fresh networks are shared.
        store = out.parent.parent / "store"
        record = run_audit(case, protected, self.mode, store=store, workers=self.workers)
        made = write_audit(record, out)
        show_verdict(made, self.mode, {"report": out / "report.html"})

    def _run_file(self, cell: Cell) -> Path:
        """Write the cell's run file and return it; CheckpointError if another one was run."""
        from sophon._grid import run_file

        folder = self._place(cell)
        text = run_file(cell, f"recipes/{cell.scale}/{cell.name}.toml", "../../bases")
        return _recipe(folder / "run.toml", text, tomllib.loads, ran=[folder])

    def _trained(self, folder: Path, text: str, cell: Path) -> None:
        """Train the model of the run file `text` in `folder`, unless it was; the data of the run
        file `cell` must be there before.

        Raises CheckpointError where `folder` holds a model trained otherwise, LockedError where
        another process is training it.
        """
        from sophon._cli.run_file import load_pretraining, require_restricted
        from sophon._sameness import BASE_DONE, require_same_base

        wanted = self._check_base(text)
        file = _recipe(folder.with_name(f"{folder.name}.toml"), text, _of_base, ran=[folder])
        if (folder / BASE_DONE).is_file() and (folder / "model.safetensors").is_file():
            require_same_base(folder, wanted)
            return
        case = load_pretraining(file, self._of_bases, self.threads)
        require_restricted(cell, self._of_cells)
        try:
            result = run_pretraining(case, folder, self.mode)
        except LockedError:
            raise LockedError(
                f"{folder}: the base is being trained by another process; wait for it and repeat"
                " the command"
            ) from None
        show_pretrained(result, folder, self.mode)


@contextmanager
def _failure_kept(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Keep the reason for which work fails in `folder`, if that is there by then or is to be made.

    An earlier one goes when work begins. Work that lacks its images, or whose folder another
    process is writing to, has not begun.
    """
    from sophon._base.files import write_text
    from sophon._reproduction import failure_file

    file = failure_file(folder)
    earlier = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    file.unlink(missing_ok=True)
    try:
        yield
    except (DataError, LockedError):
        if earlier is not None:
            write_text(file, earlier)
        raise
    except Exception as error:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            write_text(file, f"{_said(error)}\n")
        raise


def _said(error: Exception) -> str:
    """Return what an error says, on one line; the kind of one that was not raised on purpose."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SophonError) else f"{type(error).__name__}: {text}"


def _raise_first(failed: dict[str, Exception], count: int, what: str) -> None:
    """Raise an error of the first one's kind that names all that failed, if any did."""
    if failed:
        first = next(iter(failed.values()))
        kind = type(first) if isinstance(first, SophonError) else SophonError
        raise kind(f"{len(failed)} of {count} {what} failed: {', '.join(failed)}")


def _from_here(setting: str) -> str:
    """Return a `key=value` whose path, if it is a relative one, starts at the working directory: a
    recipe lies in a folder that the user did not choose.
    """
    from sophon._sameness import key_of

    key, value = key_of(setting), setting.partition("=")[2].strip()
    place = value.strip("\"'")
    named = key == "model.weights" or key.rpartition(".")[2] in ("path", "root")
    if not named or not place or place.startswith(("$", "~")):
        return setting
    return _setting(key, str(Path(place).absolute()))


def _setting(key: str, value: object) -> str:
    """Return `key=value` as `--set` takes it."""
    from sophon._cli.progress import toml

    return f"{key}={toml(value)}"


def _of_base(text: str) -> dict[str, Any]:
    """Return the tables of a run file that pre-training reads."""
    return {name: held for name, held in tomllib.loads(text).items() if name != "restricted"}


def _recipe(
    path: Path, text: str, read: Callable[[str], dict[str, Any]], *, ran: Iterable[Path]
) -> Path:
    """Write a recipe afresh and return its path.

    Raises CheckpointError where the file there says something else and a run of it is in one of the
    folders `ran`: what lies there would pass for a run of today's recipe.
    """
    from sophon._base.files import write_text
    from sophon._reproduction import started

    held = path.read_text(encoding="utf-8") if path.is_file() else text
    if held != text and not _same(held, text, read):
        held_in = [folder for folder in ran if started(folder)]
        if held_in:
            raise CheckpointError(
                f"{path} is not today's recipe and {held_in[0]} holds a run of it: give another"
                f" --out, or delete {held_in[0]} to start over"
            )
    if held != text or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


def _same(one: str, other: str, read: Callable[[str], dict[str, Any]]) -> bool:
    """Return whether two recipes say the same, whatever their comments."""
    try:
        return read(one) == read(other)
    except ValueError:
        return False
