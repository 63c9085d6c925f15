"""Freshly initialised weights: layer by layer, or a whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from sophon._errors import UnsupportedModelError
from sophon._models._heads import head_classes, replace_head
from sophon._models._probing import (
    Names,
)
from sophon._seeding import seeded


@torch.no_grad()
def reinitialise(module: nn.Module, *, seed: int, names: Names) -> None:
    """Reset every parameter by its layer's own `reset_parameters`, on the stream `(seed, *names)`.

    Raises UnsupportedModelError naming parameters that no reset reaches; the module is then
    unchanged.
    """
    before = [(tensor, tensor.clone()) for tensor in [*module.parameters(), *module.buffers()]]
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    with seeded(seed, *names):
        for part in reversed(list(module.modules())):
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
    missed = [name for name, p in module.named_parameters() if bool(torch.isnan(p).any())]
    if missed:
        for tensor, value in before:
            tensor.copy_(value)
        raise UnsupportedModelError(
            f"no reset_parameters reaches {', '.join(missed[:4])}"
            f"{', ...' if len(missed) > 4 else ''} of {type(module).__name__}: give the layer "
            "that owns it a reset_parameters method, or pass a factory of fresh models"
        )


def fresh_copy(
    model: nn.Module,
    factory: Callable[[], nn.Module] | None,
    *,
    seed: int,
    names: Names,
) -> nn.Module:
    """Return a freshly initialised model with the keys and shapes of `model`, in eval mode.

    `factory` runs on the stream `(seed, *names)`; without one a copy is reset layer by layer.
    A head whose class count differs is replaced. Raises UnsupportedModelError for a factory
    that builds another architecture.
    """
    if factory is None:
        fresh = copy.deepcopy(model)
        reinitialise(fresh, seed=seed, names=names)
        return fresh.eval()
    with seeded(seed, *names):
        fresh = factory()
    wanted, built = model.state_dict(), fresh.state_dict()
    if wanted.keys() != built.keys():
        differing = sorted(wanted.keys() ^ built.keys())[:4]
        raise UnsupportedModelError(
            f"the factory of fresh models builds another architecture: {', '.join(differing)}"
        )
    differing = [key for key, value in wanted.items() if value.shape != built[key].shape]
    for head in sorted({key.rpartition(".")[0] for key in differing}):
        classes = head_classes(model, head)
        replace_head(fresh, head, classes, seed=seed, names=(*names, "head"))
    like = next(model.parameters())
    if next(fresh.parameters()).dtype != like.dtype:
        fresh = fresh.to(like.dtype)
    return fresh.to(like.device).eval()
