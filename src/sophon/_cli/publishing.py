"""`sophon export`: a protected model as a folder for the hub, timm, torchvision or diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophon._cli.application import Json, command, option, say_json
from sophon._cli.reading import read_record


@command(
    "sophon export runs/p1 --to my-model", "sophon export runs/p1 --to my-model --record runs/a1"
)
def export(
    protected: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `sophon protect --out` wrote.")
    ],
    to: Annotated[Path, option("--to", "FOLDER", "A new folder to write to.")],
    record: Annotated[
        Path | None, option("--record", "FOLDER", "Its audit, for the model card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder to publish, its model card with the verdict.

    It holds config.json and model.safetensors, or of a diffusion model the pipeline's parts, and
    README.md, which says how to load it; nothing is uploaded. A network of timm, torchvision or
    diffusers loads without sophon, one of sophon's own with it.
    """
    from sophon._cli.run_file import require_place
    from sophon._reporting.export import export as write

    require_place(to)
    files = write(protected, to, None if record is None else read_record(record))
    if as_json:
        say_json("summary", files=[str(file) for file in files])
        return
    card = "" if record is not None else " (the card says: not audited)"
    typer.echo(f"exported: {', '.join(file.name for file in files)} in {to}{card}")
