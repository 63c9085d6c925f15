"""What a network's library says of the images that its weights were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sophon._base.files import read_json


@dataclass(frozen=True)
class OwnInput:
    """How the publisher normalises pixels in [0, 1], per channel, and resizes; `stated` is where it
    says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    stated: str


def own_input(model: nn.Module) -> OwnInput | None:
    """Return what timm's `pretrained_cfg` of a network says of its images, or None without one.

    Networks of torchvision that Sophon builds have it too (`torchvision_input`), and those of its
    own checkpoints, as they were trained (`recorded_input`).
    """
    held = getattr(model, "pretrained_cfg", None)
    if not isinstance(held, Mapping) or not (held.get("mean") and held.get("std")):
        return None
    name = ".".join(str(held[key]) for key in ("architecture", "tag") if held.get(key))
    mean, std = (tuple(float(value) for value in held[key]) for key in ("mean", "std"))
    stated = str(held.get("stated", f"pretrained_cfg {name}"))
    return OwnInput(mean, std, str(held.get("interpolation", "bilinear")), stated)


def torchvision_input(models: Any, name: str) -> dict[str, Any] | None:
    """Return what torchvision's default weights of a network say, in timm's words, or None."""
    weights = models.get_model_weights(name)
    if not len(weights):
        return None
    held = weights.DEFAULT.transforms()
    return {
        "architecture": name,
        "tag": weights.DEFAULT.name,
        "mean": tuple(held.mean),
        "std": tuple(held.std),
        "interpolation": held.interpolation.value,
    }


def recorded_input(model: nn.Module, file: Path) -> None:
    """Let `model` state what `file`, the `model.json` of its checkpoint, says that it takes."""
    held = read_json(file)
    about: dict[str, Any] = held.get("protection") or held.get("pretraining") or {}
    given = about.get("input") or {}
    found = {key: given.get(key) for key in ("mean", "std")}
    if not all(isinstance(v, list) and v and all(map(_is_number, v)) for v in found.values()):
        return
    before = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = {**before, **found, "stated": f"its checkpoint's {file.name}"}  # type: ignore[assignment]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
