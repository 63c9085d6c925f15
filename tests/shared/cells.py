"""The grid's cells as their tests name, read and run them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from typer import Typer
from typer.testing import CliRunner

import reproduce
from grid import CELLS, Cell
from sophon._cli import app
from sophon._cli.run_spec import RunSpec
from sophon._specs import parse_spec

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "recipes"
SMALL = [cell for cell in CELLS if cell.scale == "small"]
PAPER = [cell for cell in CELLS if cell.scale == "paper"]
CLASSIFIERS = [cell for cell in PAPER if cell.architecture != "ddpm"]
DIFFUSION = [cell for cell in PAPER if cell.architecture == "ddpm"]


def named(cell: Cell) -> str:
    return f"{cell.scale}-{cell.name}"


def command(*arguments: str | Path, fails: int = 0) -> str:
    return invoked(app, arguments, fails)


def grid_command(*arguments: str | Path, fails: int = 0) -> str:
    """Run `recipes/reproduce.py` in this process and return what it prints."""
    return invoked(reproduce.app, arguments, fails)


def invoked(application: Typer, arguments: tuple[str | Path, ...], fails: int) -> str:
    result = CliRunner().invoke(application, [str(argument) for argument in arguments])
    assert result.exit_code == fails, result.output
    return result.output


def spec_of(cell: Cell) -> RunSpec:
    return parse_spec(RunSpec, tomllib.loads(cell.run_file.read_text()), where=cell.name)


def settings(held: dict[str, Any]) -> list[str]:
    return [part for key, value in held.items() for part in ("--set", f"{key}={json.dumps(value)}")]
