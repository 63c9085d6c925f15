"""BatchNorm's running statistics: measured anew on given images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sophon._models.probing import keeping_modes

BatchNorms = nn.modules.batchnorm._BatchNorm


def tracked_batch_norms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm layers that keep running statistics, in the model's order."""
    return [
        part
        for part in model.modules()
        if isinstance(part, BatchNorms) and part.running_mean is not None
    ]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the running statistics to the plain average over `batches` of images; return how many.

    Only BatchNorm runs in train mode: dropout would distort what evaluation then meets. Modes
    and momenta are as before afterwards.
    """
    tracked = tracked_batch_norms(model)
    momenta = [norm.momentum for norm in tracked]
    seen = 0
    try:
        with keeping_modes(model):
            model.eval()
            for norm in tracked:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for images in batches:
                model(images)
                seen += 1
    finally:
        for norm, momentum in zip(tracked, momenta, strict=True):
            norm.momentum = momentum
    return seen


@contextmanager
def batch_norm_reestimated(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[bool]:
    """Hold `model` with statistics measured anew; put the old ones back on leaving.

    Gives False, and does nothing, for a model without running statistics.
    """
    tracked = tracked_batch_norms(model)
    before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in tracked]
    try:
        yield bool(tracked) and reestimate_batch_norm(model, batches) > 0
    finally:
        with torch.no_grad():
            for norm, values in zip(tracked, before, strict=True):
                for buffer, value in zip(norm.buffers(recurse=False), values, strict=True):
                    buffer.copy_(value)


@contextmanager
def _borrowed_buffers(model: nn.Module, but: list[Any]) -> Iterator[None]:
    """Hold `model` with copies of its buffers, but those of some layers; gradients that are taken
    later need them as they were left.
    """
    apart = {id(part) for part in but}
    own = [
        (part._buffers, name, buffer)
        for part in model.modules()
        if id(part) not in apart
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        for held, name, buffer in own:
            held[name] = buffer.clone()
        yield
    finally:
        for held, name, buffer in own:
            held[name] = buffer


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Hold `model` in train mode with BatchNorm on each batch's own statistics.

    Buffers and modes are afterwards what they were, other layers' too: InstanceNorm's running
    statistics, the vectors of a spectral norm.
    """
    tracked = tracked_batch_norms(model)
    with keeping_modes(model), _borrowed_buffers(model, tracked):
        model.train()
        for norm in tracked:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in tracked:
                norm.track_running_stats = True
