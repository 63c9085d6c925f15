"""What a caller gives as a model: a network as it is, with weights that can be trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sophon._base.errors import UnsupportedModelError, brief

# Wrappers by class, and where each keeps the network.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
}


def require_network(model: Any, what: str = "model") -> None:
    """Raise UnsupportedModelError, naming `what` and the remedy, unless `model` is a network that
    can be copied, probed and trained. It is left as it is.

    Refused are other objects, classes, wrappers of torch and peft, TorchScript, and weights that
    are not there yet (lazy) or not at all (on the `meta` device).
    """
    problem = _problem(model)
    if problem is not None:
        raise UnsupportedModelError(f"{what} {problem}")


def _problem(model: Any) -> str | None:
    kind = type(model)
    if isinstance(model, type):
        return f"is the class {model.__name__}: give an instance, such as {model.__name__}()"
    if not isinstance(model, nn.Module):
        return (
            f"is {brief(model)}: give a torch.nn.Module; sophon.resolve_model(sophon.ModelSpec("
            "name=...)) builds one by name"
        )
    if any(type(part).__module__.partition(".")[0] == "peft" for part in model.modules()):
        return f"{kind.__name__} holds adapters of peft: merge them, model.merge_and_unload()"
    if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
        inner = _WRAPPERS[kind.__name__]
        return f"is wrapped in {kind.__name__}: give what is inside, model.{inner}"
    if kind.__module__.startswith("torch.jit."):
        return "is compiled by TorchScript: give the network that it was made from"
    return _without_values(model)


def _without_values(model: nn.Module) -> str | None:
    kind = type(model).__name__
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return f"{kind}: {name} has no shape yet: run a batch of images through it"
        if tensor.is_meta:
            return f"{kind}: {name} is on the meta device, without values: load weights"
    return None
