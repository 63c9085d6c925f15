"""Work-arounds for combinations of libraries that do not load beside each other."""

from __future__ import annotations

from functools import cache


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
