"""The cells of the paper's tables: `grid.toml`, and the run files beside it. No torch.

At paper size the hyper-parameters are those of SOPHON (arXiv 2404.12699), read second-hand, where a
comment of a run file says so, and ours elsewhere.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sophon._base.errors import SpecError

HERE = Path(__file__).resolve().parent
Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")
ROBUSTNESS, ABLATION = "robustness", "ablation"
DATA: dict[str, Any] = tomllib.loads((HERE / "grid.toml").read_text(encoding="utf-8"))
TRAINING_IMAGES: dict[str, int] = DATA["training_images"]
ROBUST_CELLS: dict[Scale, list[str]] = DATA["robust_cells"]
PUBLISHED_ROBUSTNESS: dict[str, str] = DATA["published_robustness"]


@dataclass(frozen=True)
class Cell:
    """An architecture, a restricted domain and a suppression loss, at one of two sizes."""

    scale: Scale
    architecture: str
    restricted: str
    loss: str

    @property
    def name(self) -> str:
        """Its name, the same at both scales, such as `resnet18-cifar10-ice`."""
        return f"{self.architecture}-{self.restricted}-{self.loss}"

    @property
    def run_file(self) -> Path:
        """The run file of its protection and its audit."""
        return HERE / self.scale / f"{self.name}.toml"

    @property
    def base_file(self) -> Path:
        """The run file of the model that it protects; cells of an architecture share it."""
        return HERE / self.scale / f"base-{self.architecture}.toml"

    @property
    def unet_file(self) -> Path | None:
        """The network that its base names where it is a diffusion model; None: a classifier."""
        return next(self.base_file.parent.glob(f"{self.architecture}-unet-*.json"), None)


def text_of(run_file: Path) -> str:
    """Return a run file as it is kept two folders below `--out`, where `bases` lies."""
    return run_file.read_text(encoding="utf-8").replace("../../runs/bases", "../../bases")


@dataclass(frozen=True)
class Published:
    """What the paper reports for a cell: accuracies in percent, or for diffusion models MSE.

    `before` and `after` are of the original task, the rest of the restricted one after
    fine-tuning: of a fresh network, the unprotected and the protected model. `source` is where the
    numbers were read, `note` what a reader must know to compare them.
    """

    source: str
    note: str = ""
    before: float | None = None
    after: float | None = None
    scratch: float | None = None
    unprotected: float | None = None
    protected: float | None = None

    @property
    def footnote(self) -> str:
        """What a footnote of a table says of them."""
        return f"{self.source}; {self.note}" if self.note else self.source


CELLS: tuple[Cell, ...] = tuple(
    Cell(block["scale"], *parts)
    for block in DATA["cells"]
    for parts in itertools.product(block["architectures"], block["restricted"], block["losses"])
)
_OF_PAPER = {cell.restricted for cell in CELLS if cell.scale == "paper"}
PUBLISHED = {name: Published(**said) for name, said in DATA["published"].items()}


def published_of(cell: Cell) -> Published:
    """Return what is published for a cell; nothing is filled in for what is not, such as a
    restricted domain that the paper does not have.
    """
    if cell.name in PUBLISHED:
        return PUBLISHED[cell.name]
    said = DATA["published_before"]
    if cell.restricted not in _OF_PAPER or cell.architecture not in said:
        return Published("")
    return Published(said["source"], before=said[cell.architecture])


def cell_of(name: str, scale: Scale) -> Cell:
    """Return a cell by name. Raises SpecError with near matches, or naming its other scale."""
    known = {cell.name: cell for cell in CELLS if cell.scale == scale}
    if name in known:
        return known[name]
    other = [cell.scale for cell in CELLS if cell.name == name]
    if other:
        raise SpecError(f"{name} is no cell at scale {scale}: use --scale {other[0]}")
    words = [*known, ROBUSTNESS, ABLATION, "all"]
    near = difflib.get_close_matches(name.lower(), words, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise SpecError(f"{name!r} is no cell of the grid; {hint}--list shows all cells")
