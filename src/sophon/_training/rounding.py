"""What a model loses when it computes in the attacks' precision instead of single precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sophon._base.seeding import generator
from sophon._models import BatchNorms
from sophon._training.setting import Setting

# Beyond it attacks in this precision meet another network than the publisher's. Sound networks
# were at 0.01 to 0.02.
TOLERATED = 0.1
# Where outputs in the lower precision are not finite, and those in single precision are.
_LOST = 1e6
_IMAGES = 64


@torch.no_grad()
def rounding_error(model: nn.Module, setting: Setting) -> float | None:
    """Return how far `model`'s outputs in the setting's precision are from those in fp32.

    The norm of the difference over that of the outputs, both without each image's mean, which no
    loss sees; the largest of a batch of every domain, with BatchNorm as in evaluation and as in
    training; of a model that raises in the lower precision alone it is as large as can be. None in
    fp32, and where the model raises or is not finite in fp32 either.
    """
    if setting.precision == "fp32":
        return None
    domains = (
        (setting.original, setting.original.validation),
        *((d, d.train) for d in setting.restricted),
    )
    found: list[float] = []
    for domain, images in domains:
        feed = setting.feed(domain, images, batch_size=min(_IMAGES, len(images)))
        batch = feed.batch(0)
        for training in (False, True):
            exact = _outputs(model, setting.exact(), batch, training)
            if exact is None or not (bool(exact.isfinite().all()) and bool(exact.any())):
                continue
            rounded = _outputs(model, setting, batch, training)
            error = _LOST if rounded is None else float((rounded - exact).norm() / exact.norm())
            found.append(error if error < _LOST else _LOST)
    return max(found, default=None)


def _outputs(
    model: nn.Module, setting: Setting, batch: tuple[Tensor, Tensor], training: bool
) -> Tensor | None:
    """Return outputs (images, values) less each image's mean; None where the model raises."""
    held = setting.place(copy.deepcopy(model)).eval()
    for part in held.modules():
        if isinstance(part, BatchNorms):
            part.train(training)
    try:
        with setting.autocast():
            outputs, _ = setting.task.outputs(held, *batch, generator(0, "rounding"))
    except Exception:  # noqa: BLE001 - a model may raise anything; its trials say so
        return None
    flat = outputs.float().flatten(1)
    return flat - flat.mean(dim=1, keepdim=True)
