"""Run a cell of the paper's grid, or show the grid and its tables.

python recipes/reproduce.py --help
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import ablation
import grid
from grid import ABLATION, ROBUST_CELLS, ROBUSTNESS, SCALES, Cell, Scale, cell_of
from robustness import stored_robustness
from sophon._base.errors import CheckpointError, SpecError
from sophon._base.files import nearest_present
from sophon._cli.application import Quiet, Settings, Threads, counted, guarded, require_alone
from sophon._cli.running import mode_of, say
from tables import state, table

if TYPE_CHECKING:
    from jobs import Jobs

COMMAND = "python recipes/reproduce.py"
_EXAMPLES = (
    "--list",
    "resnet18-gtsrb-klu --threads 2 --workers 2",
    "caformer-cifar10-ice --scale paper --out runs",
    "all --scale small",
    "robustness",
    "ablation --threads 2 --workers 2",
    "--table",
    "resnet18-gtsrb-klu --table",
    "ablation --table",
)
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


CellName = Annotated[
    str | None,
    typer.Argument(metavar="CELL", help="A cell, `all` of a scale, `robustness`, or `ablation`."),
]
ScaleName = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar="small|paper",
        help="Which size of the cells; default: small, and both for --list.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where runs are kept; resumes there.")
]
Listed = Annotated[bool, typer.Option("--list", help="List the cells; run nothing.")]
Shown = Annotated[
    bool,
    typer.Option(
        "--table",
        help="Print published beside re-measured numbers, of all cells of a scale or of CELL,"
        " or the tables of `robustness` or `ablation`; run nothing.",
    ),
]
Of = Annotated[
    str | None,
    typer.Option(
        "--of",
        metavar="CELL",
        help="Whose protected model `robustness` attacks; default: one cell of each mode.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what protecting CELL is expected to take; write nothing."
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", parser=counted, metavar="N", help="Processes that run trials.")
]


@app.command(epilog="\b\nExamples:\n" + "".join(f"  {COMMAND} {one}\n" for one in _EXAMPLES))
@guarded
def reproduce(  # noqa: PLR0913, PLR0917 - one parameter an option
    cell: CellName = None,
    scale: ScaleName = None,
    out: Out = Path("runs"),
    listed: Listed = False,
    shown: Shown = False,
    of: Of = None,
    dry_run: DryRun = False,
    settings: Settings = None,
    quiet: Quiet = False,
    threads: Threads = None,
    workers: Workers = 1,
) -> None:
    """Train, protect and audit a cell of the paper's tables; repeat the command to resume.

    The model of the original task is trained first if it is missing. `--set` changes the cell, and
    is then no longer the cell of that name: give another --out.
    """
    from sophon._cli.run_file import require_place

    require_alone(COMMAND)
    size = _size_of(scale)
    _require_consistent(cell, size, of, listed=listed, shown=shown)
    if listed or shown:
        _require_reading(cell, settings, listed=listed)
    if dry_run and (listed or shown or cell in (None, "all", ROBUSTNESS, ABLATION)):
        raise SpecError(
            "--dry-run says what protecting one cell takes: name a cell, without --list or --table"
        )
    _require_folder(out)
    if listed:
        _show_list(out, size if scale else None)
    elif shown:
        _show_table(cell, size, out, of)
    elif cell is None:
        raise SpecError("name a cell, `all`, `robustness` or `ablation`; --list shows the cells")
    else:
        require_place(out)
        from jobs import Jobs

        jobs = Jobs(out, settings, mode_of(quiet, False), threads, workers)
        _run(jobs, cell, size, of, dry_run=dry_run)


def _run(jobs: Jobs, cell: str, scale: Scale, of: str | None, *, dry_run: bool) -> None:
    """Do what is asked for by the name of a cell, of all of them, or of a study."""
    if cell == ROBUSTNESS:
        jobs.all_robustness(_attacked(scale, of))
    elif cell == ABLATION:
        jobs.ablation()
    elif cell == "all":
        jobs.run_all([one for one in grid.CELLS if one.scale == scale])
    elif dry_run:
        jobs.forecast(cell_of(cell, scale))
    else:
        chosen = cell_of(cell, scale)
        jobs.run(chosen)
        jobs.show_row(chosen)


def _size_of(scale: str | None) -> Scale:
    """Return the scale of that name, small without one. Raises SpecError for another name."""
    if scale not in (None, *SCALES):
        raise SpecError(f"--scale = {scale!r}: use {' or '.join(SCALES)}")
    return "paper" if scale == "paper" else "small"


def _require_folder(folder: Path) -> None:
    """Raise CheckpointError if `folder`, where stored runs are read, is a file or below one."""
    nearest = nearest_present(folder)
    if not nearest.is_dir():
        raise CheckpointError(
            f"no runs lie below {folder}: {nearest} is a file; give the folder of the runs"
        )


def _require_consistent(
    cell: str | None, scale: Scale, of: str | None, *, listed: bool, shown: bool
) -> None:
    """Raise SpecError for options that exclude each other."""
    if listed and shown:
        raise SpecError("--list and --table: give one of them")
    if of is not None and (cell != ROBUSTNESS or listed):
        raise SpecError(f"--of = {of} is for `{COMMAND} {ROBUSTNESS}`: leave it out")
    if cell == ABLATION and scale != "small":
        raise SpecError(f"--scale = {scale}: the ablation study is small only; leave it out")


def _require_reading(cell: str | None, settings: list[str] | None, *, listed: bool) -> None:
    """Raise SpecError for what would do nothing beside an option that only shows."""
    option = "--list" if listed else "--table"
    if cell is not None and (listed or cell == "all"):
        raise SpecError(
            f"{cell} and {option}: {option} shows all cells and runs nothing; leave one out"
        )
    if settings:
        raise SpecError(
            f"--set {settings[0]!r} and {option}: {option} shows what was run; leave one out"
        )


def _attacked(scale: Scale, of: str | None) -> list[Cell]:
    """Return the cells whose protected models `robustness` attacks: one of each mode, or `of`."""
    return [cell_of(name, scale) for name in (ROBUST_CELLS[scale] if of is None else (of,))]


def _show_list(out: Path, scale: Scale | None) -> None:
    """Print the cells of a scale, of both without one, and which were run below `out`."""
    width = max(len(one.name) for one in grid.CELLS)
    chosen = [one for one in grid.CELLS if scale in (None, one.scale)]
    say(f"{one.name:{width}}  {one.scale:5}  {state(out, one)}" for one in chosen)


def _show_table(cell: str | None, scale: Scale, out: Path, of: str | None) -> None:
    """Print what is stored of the cell or the study of that name; of all cells without one."""
    if cell == ROBUSTNESS:
        say(stored_robustness(out, one) for one in _attacked(scale, of))
    elif cell == ABLATION:
        _show_ablation(out / "small" / ABLATION)
    else:
        say([table(out, scale, None if cell is None else cell_of(cell, scale))])


def _show_ablation(folder: Path) -> None:
    """Print the table of the ablation study, and draw its figure anew where runs of it are."""
    found = ablation.results(folder)
    say([ablation.table(folder, found)])
    if found and importlib.util.find_spec("matplotlib") and os.access(folder, os.W_OK):
        ablation.draw(found, folder / "ablation.svg")
        say([str(folder / "ablation.svg")])


if __name__ == "__main__":
    app(prog_name=COMMAND)
