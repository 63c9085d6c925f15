"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from sophon._base.errors import UnsupportedModelError
from sophon._models.batch_norm import tracked_batch_norms

_KEY = "model.gradient_checkpointing = true"


def checkpoint_gradients(model: nn.Module) -> nn.Module:
    """Have `model` keep the inputs of its blocks alone, as its library does it; return it.

    What it computes stays the same, in less memory and more time (arXiv 1604.06174). Raises
    UnsupportedModelError for a network without it, or with running statistics, which a block's
    second pass would move again.
    """
    if tracked_batch_norms(model):
        raise UnsupportedModelError(
            f"{_KEY}: {type(model).__name__} has BatchNorm, whose running statistics a second pass"
            " would move twice: leave it out and take smaller batches"
        )
    enable = getattr(model, "set_grad_checkpointing", None)
    arguments: tuple[Any, ...] = ()
    if enable is None:
        enable = getattr(model, "enable_gradient_checkpointing", None)
        # Unlike the library's own default this can be sent to another process.
        arguments = (checkpointed,)
    reason = ""
    try:
        if enable is not None:
            enable(*arguments)
    except (AssertionError, ValueError) as error:
        # So both libraries refuse.
        reason = f" ({error})"
    if not computes_twice(model):
        raise UnsupportedModelError(
            f"{_KEY}: {type(model).__name__} does not offer it{reason}: leave it out, or use a"
            " network of timm or diffusers that does"
        )
    return model


def computes_twice(model: nn.Module) -> bool:
    """Return whether blocks of `model` are computed again in the backward pass."""
    flags = ("grad_checkpointing", "gradient_checkpointing")
    return any(vars(part).get(name) for part in model.modules() for name in flags)


def checkpointed(part: nn.Module, *inputs: Any) -> Any:
    """Run a block and keep its inputs alone."""
    return checkpoint(part.__call__, *inputs, use_reentrant=False)
