"""What `sophon reproduce --list` and `--table` print: stored records of the grid."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sophon._cli.running import say

if TYPE_CHECKING:
    from sophon._grid import Cell, Scale


def show_list(out: Path, scale: Scale | None) -> None:
    """Print the cells of a scale, of both without one, and which were run below `out`."""
    from sophon._grid import CELLS
    from sophon._reproduction import state

    width = max(len(one.name) for one in CELLS)
    chosen = [one for one in CELLS if scale in (None, one.scale)]
    say(f"{one.name:{width}}  {one.scale:5}  {state(out, one)}" for one in chosen)


def show_table(out: Path, scale: Scale, only: Cell | None) -> None:
    """Print the table of published and re-measured numbers, of all cells or of one."""
    from sophon._reproduction import table

    say([table(out, scale, only)])


def show_robustness(out: Path, cells: list[Cell]) -> None:
    """Print the robustness tables of some cells."""
    from sophon._reproduction import stored_robustness

    say(stored_robustness(out, cell) for cell in cells)


def show_ablation(out: Path) -> None:
    """Print the table of the ablation study, and draw its figure anew where runs of it are."""
    from sophon import _ablation as study
    from sophon._ablation_plot import draw

    folder = out / "small" / study.NAME
    held = study.results(folder)
    say([study.table(folder, held)])
    if held and importlib.util.find_spec("matplotlib") and os.access(folder, os.W_OK):
        draw(held, folder / "ablation.svg")
        say([str(folder / "ablation.svg")])
