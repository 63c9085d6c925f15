"""Write recipes/small and recipes/paper from the grid's table in `sophon._grid`.

python recipes/write.py
"""

from __future__ import annotations

from pathlib import Path

from sophon import _ablation
from sophon._grid import (
    CELLS,
    ROBUST_CELLS,
    ROBUSTNESS,
    SCALES,
    UNET_FILES,
    UNETS,
    base_file,
    cell_of,
    run_file,
)
from sophon._reproduction import robustness_file

HERE = Path(__file__).resolve().parent


def files() -> dict[str, str]:
    """Return the recipes by path below this folder."""
    held: dict[str, str] = {}
    for cell in CELLS:
        base, run = f"base-{cell.architecture}.toml", f"{cell.name}.toml"
        for name, text in (
            (base, base_file(cell, f"recipes/{cell.scale}/{base}")),
            (run, run_file(cell, f"recipes/{cell.scale}/{run}", "../../runs/bases")),
        ):
            held.setdefault(f"{cell.scale}/{name}", text)
    for scale in SCALES:
        held[f"{scale}/{UNET_FILES[scale]}"] = UNETS[scale]
        for cell in (cell_of(one, scale) for one in ROBUST_CELLS[scale]):
            name = f"{scale}/{cell.name}-{ROBUSTNESS}.toml"
            held[name] = robustness_file(cell, f"recipes/{name}", "../../runs/bases")
    study = {
        "small/base-ablation.toml": _ablation.BASE_FILE,
        "small/ablation.toml": _ablation.run_file("../../runs/bases"),
    }
    return {**held, **study}


def main() -> None:
    """Write every recipe."""
    for name, text in files().items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
