"""Hooks: code that a model carries beside its layers, put there by torch or by its publisher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Hook(NamedTuple):
    """A hook: the dict that holds it, its key there, and what is called."""

    held: dict[int, Any]
    key: int
    call: Any


def hooks(module: nn.Module) -> Iterator[Hook]:
    """Yield every hook of the module's forward and backward passes, layer by layer."""
    for part in module.modules():
        for held in (
            part._forward_pre_hooks,
            part._forward_hooks,
            part._backward_pre_hooks,
            part._backward_hooks,
        ):
            for key, call in held.items():
                yield Hook(held, key, call)


def foreign_hooks(module: nn.Module) -> list[Hook]:
    """Return the hooks that are not torch's own (those compute weights).

    Whoever publishes a model may have put them there.
    """
    ours = "torch.nn.utils."
    return [h for h in hooks(module) if not getattr(h.call, "__module__", "").startswith(ours)]


def drop_foreign_hooks(module: nn.Module) -> None:
    """Take off every hook that is not torch's own, in place."""
    for held, key, _ in foreign_hooks(module):
        del held[key]
