"""Optional libraries: loaded when needed, beside each other where they do not go together."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from sophon._base.errors import SophonError, UnsupportedModelError


def library(
    name: str, refusal: str, remedy: str, error: type[SophonError] = UnsupportedModelError
) -> Any:
    """Return a module of an optional library.

    Raises `error`, with both texts, where it cannot be imported.
    """
    prepare_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        raise error(f"{refusal} ({fault}): {remedy}") from None


def installing(*extras: str) -> str:
    """Return the command that installs extras, with the versions that go together."""
    return f"in a clone of sophon, pip install -c constraints.txt '.[{','.join(extras)}]'"


@cache
def prepare_torchvision() -> None:
    """Let torchvision, and what imports it, load beside a torch without CUDA.

    Its wheel's compiled operators then do not load, and the import fails for want of the
    `nms` schema. Declaring the schemas is enough: sophon uses none of those operators.
    """
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        name = schema.split("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _kept.append(library)


# The schemas vanish with their library object.
_kept: list[object] = []
