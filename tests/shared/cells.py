"""The grid's cells as their tests name, read and run them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sophon._cli import app
from sophon._cli.run_spec import RunSpec
from sophon._grid import CELLS, Cell
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
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == fails, result.output
    return result.output


def spec_of(cell: Cell) -> RunSpec:
    data = tomllib.loads((RECIPES / cell.scale / f"{cell.name}.toml").read_text())
    return parse_spec(RunSpec, data, where=cell.name)


def settings(held: dict[str, Any]) -> list[str]:
    return [part for key, value in held.items() for part in ("--set", f"{key}={json.dumps(value)}")]
