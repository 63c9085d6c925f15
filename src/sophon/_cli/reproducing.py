"""`sophon reproduce`: run a cell of the paper's grid, or show the grid and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sophon._cli.application import Quiet, Settings, Threads, app, guarded
from sophon._cli.auditing import run_audit, write_audit
from sophon._cli.running import (
    mode_of,
    run_pretraining,
    run_protection,
    say,
    show_pretrained,
    show_protected,
    show_verdict,
)
from sophon._errors import IntactnessError, NonFiniteError, SophonError, SpecError

if TYPE_CHECKING:
    from sophon._grid import Cell, Scale
    from sophon._progress import Mode

ROBUSTNESS, ABLATION = "robustness", "ablation"
_ROBUST_CELL = {"small": "resnet18-gtsrb-klu", "paper": "vgg-cifar10-ice"}


@app.command(
    epilog="\b\nExamples:\n"
    "  sophon reproduce --list\n"
    "  sophon reproduce resnet18-gtsrb-klu --threads 2 --workers 2\n"
    "  sophon reproduce caformer-cifar10-ice --scale paper --out runs\n"
    "  sophon reproduce all --scale small\n"
    "  sophon reproduce robustness\n"
    "  sophon reproduce ablation --threads 2 --workers 2\n"
    "  sophon reproduce --table\n"
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
        str, typer.Option("--scale", metavar="small|paper", help="Which size of the cells.")
    ] = "small",
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where runs are kept; resumes there.")
    ] = Path("runs"),
    listed: Annotated[bool, typer.Option("--list", help="List the cells; run nothing.")] = False,
    table: Annotated[
        bool,
        typer.Option("--table", help="Print published beside re-measured numbers; run nothing."),
    ] = False,
    of: Annotated[
        str | None,
        typer.Option("--of", metavar="CELL", help="Whose protected model `robustness` attacks."),
    ] = None,
    settings: Settings = None,
    quiet: Quiet = False,
    threads: Threads = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, metavar="N", help="Processes that run trials.")
    ] = 1,
) -> None:
    """Train, protect and audit a cell of the paper's tables; repeat the command to resume.

    The model of the original task is trained first if it is missing. `--set` changes the cell, and
    is then no longer the cell of that name: give another --out.
    """
    from sophon._grid import CELLS, SCALES, cell_of
    from sophon._reproduction import table as filled
    from sophon._runs import require_place

    if scale not in SCALES:
        raise SpecError(f"--scale = {scale!r}: use {' or '.join(SCALES)}")
    size: Scale = "paper" if scale == "paper" else "small"
    if listed or table:
        say([filled(out, size)] if table else _listing(out))
        return
    if cell is None:
        raise SpecError("name a cell, `all`, `robustness` or `ablation`; --list shows the cells")
    require_place(out)
    jobs = _Jobs(out, settings, mode_of(quiet, False), threads, workers)
    if cell == ROBUSTNESS:
        jobs.robustness(cell_of(of or _ROBUST_CELL[size], size))
    elif cell == ABLATION:
        if size != "small":
            raise SpecError(f"--scale = {scale}: the ablation study is small only; leave it out")
        jobs.ablation()
    elif cell == "all":
        jobs.run_all([one for one in CELLS if one.scale == size])
    else:
        jobs.run(cell_of(cell, size))


def _listing(out: Path) -> list[str]:
    from sophon._grid import CELLS
    from sophon._reproduction import record_file

    width = max(len(cell.name) for cell in CELLS)
    lines = []
    for cell in CELLS:
        state = "measured" if record_file(out, cell).is_file() else "not run"
        lines.append(f"{cell.name:{width}}  {cell.scale:5}  {state}")
    return lines


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
        self.out, self.settings, self.mode = out, settings, mode
        self.threads, self.workers = threads, workers

    def run(self, cell: Cell) -> None:
        """Run a cell from where it stopped."""
        from sophon._grid import run_file

        self._announce(f"{cell.name} ({cell.scale})")
        self._check(run_file(cell, cell.name, "."), [])
        self._base(cell)
        self._protected_and_audited(self._run_file(cell), self.out / cell.scale / cell.name, [])

    def _check(self, text: str, settings: list[str]) -> None:
        """Raise SpecError for settings that do not fit a run file, before anything is trained."""
        from sophon._runs import parse_run

        parse_run(text, [*(self.settings or ()), *settings], where="--set")

    def _announce(self, what: str) -> None:
        if self.mode in ("bar", "lines"):
            typer.echo(what, err=True)

    def _protected_and_audited(self, file: Path, folder: Path, settings: list[str]) -> None:
        """Run a protection and its audit in `folder`, from where they stopped."""
        from sophon._runs import load

        settings = [*(self.settings or ()), *settings]
        case = load(file, settings, self.threads)
        result = run_protection(case, folder / "protected", self.mode)
        show_protected(result, folder / "protected", self.mode)
        self._audit(file, folder / "protected", folder / "audit", settings)

    def run_all(self, cells: list[Cell]) -> None:
        """Run cells in turn, going on where one cannot be run; raise the first error at the end."""
        failed: dict[str, SophonError] = {}
        for cell in cells:
            try:
                self.run(cell)
            except SophonError as error:
                typer.echo(f"{cell.name}: {error}", err=True)
                failed[cell.name] = error
        if failed:
            first = next(iter(failed.values()))
            raise type(first)(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}")

    def robustness(self, cell: Cell) -> None:
        """Attack a cell's protected model with the attacks of the robustness tables."""
        from sophon._files import write_text
        from sophon._reproduction import read_stored, robustness_attacks, robustness_tables
        from sophon._runs import read_run

        if not (self.out / cell.scale / cell.name / "protected" / "model.safetensors").is_file():
            self.run(cell)
        spec = read_run(self._run_file(cell), self.settings).audit
        extra = [s.model_dump(mode="json") for s in (*spec.extra, *robustness_attacks(spec))]
        folder = self.out / cell.scale / f"{cell.name}-{ROBUSTNESS}"
        settings = [*(self.settings or ()), _setting("audit.extra", extra)]
        protected = self.out / cell.scale / cell.name / "protected"
        self._audit(self._run_file(cell), protected, folder / "audit", settings)
        record = read_stored(folder / "audit" / "record.json")
        assert record is not None
        tables = robustness_tables(record, cell.architecture)
        write_text(folder / "tables.md", tables)
        say([tables])

    def ablation(self) -> None:
        """Run the study of what the paper ablates; go on where a run of it fails."""
        from sophon import _ablation as study
        from sophon._ablation_plot import draw, require_matplotlib
        from sophon._files import write_text

        require_matplotlib()
        for variation in study.variations():
            self._check(study.run_file("."), list(variation.settings))
        folder = self.out / "small" / study.NAME
        self._trained(f"small-{study.NAME}", study.BASE_FILE)
        file = _written(folder / "run.toml", study.run_file("../../bases"))
        for variation in study.variations():
            self._announce(f"{study.NAME}: {variation.name}")
            try:
                settings = list(variation.settings)
                self._protected_and_audited(file, folder / variation.name, settings)
            except (IntactnessError, NonFiniteError) as error:
                typer.echo(f"{variation.name}: {error}", err=True)
                reason = study.failure_file(folder, variation)
                reason.parent.mkdir(exist_ok=True)
                write_text(reason, f"{error}\n")
        held = study.results(folder)
        tables = study.table(folder, held)
        write_text(folder / "table.md", tables)
        draw(held, folder / "ablation.svg")
        say([tables, str(folder / "ablation.svg")])

    def _audit(self, file: Path, protected: Path, out: Path, settings: list[str] | None) -> None:
        from sophon._runs import load

        case = load(file, settings, self.threads)
        # Below one folder a scale: trials of unprotected models and fresh networks are shared.
        store = out.parent.parent / "store"
        record = run_audit(case, protected, self.mode, store=store, workers=self.workers)
        made = write_audit(record, out)
        show_verdict(made, self.mode, {"report": out / "report.html"})

    def _run_file(self, cell: Cell) -> Path:
        """Write the cell's run file, if it is not there, and return it."""
        from sophon._grid import run_file

        folder = self.out / cell.scale / cell.name
        recipe = f"recipes/{cell.scale}/{cell.name}.toml"
        return _written(folder / "run.toml", run_file(cell, recipe, "../../bases"))

    def _base(self, cell: Cell) -> None:
        """Train the model of a cell's original task unless it is there."""
        from sophon._grid import UNET, UNET_FILE, base_file, base_name

        recipe = f"recipes/{cell.scale}/base-{cell.architecture}.toml"
        _written(self.out / "bases" / UNET_FILE, UNET)
        self._trained(base_name(cell), base_file(cell, recipe))

    def _trained(self, name: str, text: str) -> None:
        """Train a model as the run file `text` says, unless it is there."""
        from sophon._runs import load

        folder = self.out / "bases" / name
        if (folder / "model.safetensors").is_file():
            return
        file = _written(folder.parent / f"{name}.toml", text)
        result = run_pretraining(
            load(file, _for_base(self.settings), self.threads), folder, self.mode
        )
        show_pretrained(result, folder, self.mode)


def _for_base(settings: list[str] | None) -> list[str]:
    """Return the settings that concern the training of the original task."""
    parts = ("original", "restricted", "model.", "pretrain", "task")
    return [setting for setting in settings or () if setting.startswith(parts)]


def _setting(key: str, value: object) -> str:
    """Return `key=value` as `--set` takes it."""
    from sophon._progress import toml

    return f"{key}={toml(value)}"


def _written(path: Path, text: str) -> Path:
    from sophon._files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_text(path, text)
    return path
