"""What the image processor of a network of transformers does to pictures, by its folder."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sophon._base.errors import CheckpointError, UnsupportedModelError, first_line
from sophon._base.files import read_others_json
from sophon._base.torchvision_patch import installing, library

PROCESSOR = "preprocessor_config.json"
# How far shares of a picture's sides, and pixels from 0 to 1, may be from what they mean.
_ALIKE = 0.02
RESAMPLED = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def transformers() -> Any:
    """Return the library. Raises UnsupportedModelError where it is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    needed = installing("transformers")
    held = library("transformers", "transformers cannot be imported", needed)
    held.utils.logging.disable_progress_bar()
    return held


def unusable() -> tuple[type[Exception], ...]:
    """Return what wrong values make the library raise; newer ones check types."""
    errors = importlib.import_module("huggingface_hub.errors")
    return (
        *(OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError),
        *(ArithmeticError, ImportError, AssertionError),
        getattr(errors, "StrictDataclassError", ValueError),
    )


def processor_input(folder: Path) -> dict[str, Any] | None:
    """Return what the image processor in `folder` says of images, in timm's words and as
    `processor` in its own; None where there is none. Raises CheckpointError for a damaged one.
    """
    file = folder / PROCESSOR
    if not file.is_file():
        return None
    held = read_others_json(file)
    if held.get("auto_map"):
        raise UnsupportedModelError(
            f"{file}: auto_map brings code, which is never run: delete the file, and set mean and"
            " std of the domains"
        )
    config = folder / "config.json"
    other = config.read_bytes() if config.is_file() else b""
    return copy.deepcopy(_measured(folder, json.dumps(held), other))


@lru_cache(maxsize=8)
def _measured(folder: Path, _settings: str, _config: bytes) -> dict[str, Any]:
    """Return what the processor in `folder` does, once for the same files."""
    file = folder / PROCESSOR
    try:
        found = transformers().AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        stated = _stated(json.loads(found.to_json_string()))
        return stated | _geometry(found, stated, file)
    except unusable() as error:
        raise CheckpointError(
            f"{file} cannot be used ({first_line(error)}): restore it, or delete it and set mean"
            " and std of the domains"
        ) from None


def _stated(held: dict[str, Any]) -> dict[str, Any]:
    """Return what a processor's settings say, as `processor_input`."""
    normalised = bool(held.get("do_normalize"))
    # EfficientNet's divides by std once more, and moves what was scaled by one.
    times = normalised + bool(held.get("include_top"))
    std = [float(value) ** times for value in held["image_std"]] if times else [1.0]
    # Without normalisation pixels stay as they are scaled.
    mean = held["image_mean"] if normalised else [0.0] * len(std)
    offset = 1.0 if held.get("rescale_offset") else 0.0
    scale = 255 * (float(held.get("rescale_factor", 1 / 255)) if held.get("do_rescale") else 1.0)
    return {
        "mean": tuple((float(m) + offset) / scale for m in mean),
        "std": tuple(s / scale for s in std),
        "interpolation": RESAMPLED[held.get("resample", 2)],
        "reversed": bool(held.get("do_flip_channel_order")),
        "processor": held,
        "stated": f"its {PROCESSOR}",
    }


def _geometry(processor: Any, stated: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return which part of a picture a processor takes and of what size it makes it, found by what
    it does to pictures that are black, white, or brighter towards the right or the bottom.

    Nothing is returned of one that keeps the size. Raises UnsupportedModelError where it does to
    pixels what `stated` does not say, or takes another part than the middle.
    """
    height, width = 400, 600
    channels = len(stated["mean"]) if stated["processor"].get("do_normalize") else 3
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)

    def prepared(shades: Any) -> Any:
        picture = np.repeat(np.rint(255 * shades).astype(np.uint8)[..., None], channels, -1)
        made = processor([picture], input_data_format="channels_last", return_tensors="pt")
        found = made["pixel_values"][0].permute(1, 2, 0).double().numpy()
        return found * stated["std"] + stated["mean"]

    black, white = prepared(across * 0), prepared(across.T * 0 + 1)
    rows, columns = black.shape[:2]
    if (rows, columns) == (height, width):
        return {}
    left, share_across = _taken(prepared(across).mean((0, 2)))
    top, share_down = _taken(prepared(down).mean((1, 2)))
    middle = max(abs(left * 2 + share_across - 1), abs(top * 2 + share_down - 1)) < _ALIKE
    squashed = abs(share_across - share_down) < _ALIKE
    squared = rows == columns and abs(share_across * width / height - share_down) < _ALIKE
    same = black.shape == white.shape and max(np.abs(black).max(), np.abs(white - 1).max()) < _ALIKE
    resizes = stated["processor"].get("do_resize")
    if not (same and middle and (squashed or squared) and resizes):
        does = "pads pictures, takes other parts than their middle or changes pixels in other ways"
        does = does if resizes else "cuts or pads pictures and resizes none (do_resize = false)"
        raise UnsupportedModelError(
            f"{file}: {type(processor).__name__} {does}: delete the file, and set mean, std and"
            " image_size"
        )
    return {
        "input_size": (channels, rows, columns),
        "crop_mode": "squash" if squashed else "center",
        "crop_pct": _usual_share(min(share_down, 1.0), stated["processor"]),
    }


def _taken(line: Any) -> tuple[float, float]:
    """Return where on a line that grows from 0 to 1 values begin, and which share they have."""
    inner = slice(len(line) // 4, len(line) - len(line) // 4)
    share, start = np.polyfit((np.arange(len(line))[inner] + 0.5) / len(line), line[inner], 1)
    return float(start), float(share)


def _usual_share(share: float, held: Mapping[str, Any]) -> float:
    """Return the share that a processor's settings mean, which whole pixels round."""
    sizes = [_side(held.get(key) or {}) for key in ("crop_size", "size")]
    known = [1.0, 0.875, held.get("crop_pct") or 1.0]
    known += [sizes[0] / sizes[1], sizes[1] / sizes[0]] if all(sizes) else []
    nearest = min(known, key=lambda one: abs(one - share))
    return float(nearest if abs(nearest - share) < _ALIKE else round(share, 4))


def _side(size: Mapping[str, Any]) -> int:
    """Return the shorter side of a processor's size; 0 where it says none."""
    return size.get("shortest_edge") or min(size.get("height") or 0, size.get("width") or 0)
