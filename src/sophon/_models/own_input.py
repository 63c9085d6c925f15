"""What a network's library says of the images that its weights were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sophon._base.errors import CheckpointError, brief
from sophon._base.files import read_json
from sophon._models.image_processors import processor_input
from sophon._models.transformers import input_beside

# How Sophon resizes unless told otherwise.
USUAL_FIT: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


@dataclass(frozen=True)
class OwnInput:
    """How the publisher normalises pixels in [0, 1], per channel, and resizes: the middle square, a
    side of `crop_pct` of the shorter one, by `interpolation`, to a square of `side` pixels;
    `crop_mode` `squash` is `crop_pct` of both sides. `stated` is where it says so. `reversed`: blue
    comes first.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    stated: str
    reversed: bool = False
    crop_mode: str = "center"
    side: int | None = None


def own_input(model: nn.Module) -> OwnInput | None:
    """Return what timm's `pretrained_cfg` of a network says of its images, or None without one.

    Networks of torchvision that Sophon builds have it too (`torchvision_input`), those of
    transformers from their image processor, and those of its own checkpoints, as they were trained
    (`recorded_input`).
    """
    return _own(getattr(model, "pretrained_cfg", None) or input_beside(model))


def folder_input(folder: Path) -> OwnInput | None:
    """Return what the image processor in a folder of transformers says, None without one."""
    return _own(processor_input(folder))


def _own(held: Any) -> OwnInput | None:
    if not isinstance(held, Mapping) or not (held.get("mean") and held.get("std")):
        return None
    name = ".".join(str(held[key]) for key in ("architecture", "tag") if held.get(key))
    mean, std = (tuple(float(value) for value in held[key]) for key in ("mean", "std"))
    stated = str(held.get("stated", f"pretrained_cfg {name}"))
    interpolation, crop, mode = (held.get(key) or usual for key, usual in USUAL_FIT.items())
    last, (_, height, width) = bool(held.get("reversed")), held.get("input_size") or (0, 0, None)
    side = width if height == width else None
    return OwnInput(mean, std, str(interpolation), float(crop), stated, last, str(mode), side)


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
        "crop_pct": held.crop_size[0] / held.resize_size[0],
    }


def recorded_input(model: nn.Module, file: Path) -> None:
    """Let `model` state what `file`, the `model.json` of its checkpoint, says that it takes."""
    found = _recorded(file)
    if found is not None:
        before = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = {**before, **found}  # type: ignore[assignment]


def checkpoint_input(file: Path) -> OwnInput | None:
    """Return what `file`, the `model.json` of a checkpoint, says that its network takes, of which
    size too; None where it says nothing. Raises CheckpointError for what no run records.
    """
    found = _recorded(file)
    if found is None:
        return None
    about = read_json(file)
    size = (about.get("protection") or about["pretraining"])["input"].get("input_size")
    usual = isinstance(size, list) and len(size) == 3
    if size is not None and not (usual and all(type(one) is int and one > 0 for one in size)):
        raise CheckpointError(
            f"{file}: input.input_size = {brief(size)} is not (channels, height, width): restore"
            " the file"
        )
    return _own(found | {"input_size": size})


def _recorded(file: Path) -> dict[str, Any] | None:
    """Return what a `model.json` says of its images but for their size, in timm's words."""
    held = read_json(file)
    about = held.get("protection") or held.get("pretraining")
    given = about.get("input") if isinstance(about, dict) else None
    if not isinstance(given, dict) or "mean" not in given:
        return None
    found: dict[str, Any] = {key: given.get(key) for key in ("mean", "std")}
    for key, value in found.items():
        usual = isinstance(value, list) and 1 <= len(value) <= 4 and all(map(_is_usual, value))
        if not usual or (key == "std" and min(value) <= 0):
            raise CheckpointError(
                f"{file}: input.{key} = {brief(value)} is not of pixels from 0 to 1, a number a"
                " channel: restore the file"
            )
    found |= {key: given.get(key, usual) for key, usual in USUAL_FIT.items()}
    if found["crop_mode"] not in ("center", "squash"):
        raise CheckpointError(
            f"{file}: input.crop_mode = {brief(found['crop_mode'])} is neither 'center' nor"
            " 'squash': restore the file"
        )
    if not _is_usual(found["crop_pct"]) or found["crop_pct"] <= 0:
        raise CheckpointError(
            f"{file}: input.crop_pct = {brief(found['crop_pct'])} is no share: restore the file"
        )
    return found | {"stated": f"its checkpoint's {file.name}"}


def _is_usual(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1
