"""Compare two networks of the same keys: the code beside their weights, and the weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from statistics import median
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sophon._models.gradient_checkpointing import checkpointed
from sophon._models.hooks import foreign_hooks
from sophon._models.weights import tensor_bytes

# What every module holds, where a checkpoint was loaded from and by which version, and what a new
# head leaves as it was.
_LOADED = {
    *("name_or_path", "_name_or_path", "pretrained_cfg", "default_cfg"),
    *("_diffusers_version", "transformers_version", "_use_kernels", "_weight_conversions"),
}
# In which type a configuration of transformers was saved, as a type or as its name.
_SAVED = ("dtype", "torch_dtype")
# What they take in memory and time, and nothing of what they compute.
_COSTS = {"grad_checkpointing", "gradient_checkpointing"}
_USUAL = frozenset(vars(nn.Module())) | _LOADED | _COSTS | {"num_classes"}
_PLAIN = (bool, int, float, str, type(None))
# Objects that layers keep are looked into so far.
_DEEP = 3


def code_differences(model: nn.Module, other: nn.Module | None) -> tuple[str, ...]:
    """Return what of `model` computes otherwise than in `other`, layer by layer.

    Compared are classes, attributes (rates, modes, functions, configurations, plain tensors), which
    weights are trained, and hooks that are not torch's own, whichever mode they act in; weights
    are not. Without `other` every such hook counts.
    """
    found = [] if other is None else _layer_differences(model, other)
    usual = {} if other is None else dict(_hooks_of(other))
    found += [f"{at}: hook {call}" for at, call in _hooks_of(model) if usual.get(at) != call]
    return tuple(found)


def differing_keys(model: nn.Module, other: nn.Module) -> list[str]:
    """Return the keys of tensors that one of two networks lacks, or has in another shape."""
    shapes, others = (
        {key: value.shape for key, value in one.state_dict().items()} for one in (model, other)
    )
    return sorted(key for key in shapes | others if shapes.get(key) != others.get(key))


@torch.no_grad()
def similarity(model: nn.Module, other: nn.Module) -> float | None:
    """Return the median over weight tensors (two dimensions or more) of their cosine with those of
    `other`: 1 for equal ones up to scale, near 0 for networks that were trained apart.

    None where there are none, or they are not finite.
    """
    others = dict(other.named_parameters())
    cosines = []
    for name, value in model.named_parameters():
        if value.dim() < 2 or name not in others:
            continue
        first, second = (tensor.cpu().double().flatten() for tensor in (value, others[name]))
        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
        if not math.isfinite(cosine):
            return None
        cosines.append(cosine)
    return median(cosines) if cosines else None


def _layer_differences(model: nn.Module, other: nn.Module) -> list[str]:
    layers, others = dict(model.named_modules()), dict(other.named_modules())
    found = []
    for name in dict.fromkeys((*layers, *others)):
        first, second = layers.get(name), others.get(name)
        where = name or "the network"
        if first is None or second is None or not _same_class(type(first), type(second)):
            found.append(f"{where}: {_kind(first)} instead of {_kind(second)}")
            continue
        held, usual = _attributes(first), _attributes(second)
        found += [
            f"{where}.{key} = {held.get(key, 'absent')} instead of {usual.get(key, 'absent')}"
            for key in sorted(held.keys() | usual.keys())
            if held.get(key) != usual.get(key)
        ]
    return found


def _kind(part: nn.Module | None) -> str:
    return "nothing" if part is None else type(part).__qualname__


def _same_class(first: type, second: type) -> bool:
    """Return whether two classes are one, or were made by the same code, as parametrized ones."""
    if first is second:
        return True
    codes = [
        {key: held.__code__ for key, held in vars(kind).items() if isinstance(held, FunctionType)}
        for kind in (first, second)
    ]
    named = (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)
    return named and first.__bases__ == second.__bases__ and codes[0] == codes[1]


def _attributes(part: nn.Module) -> dict[str, str]:
    """Return a layer's attributes in words, its own tensors by whether they are trained."""
    held = {
        key: _described(value)
        for key, value in vars(part).items()
        # What diffusers runs blocks with is code: ours is known, anybody else's counts.
        if key not in _USUAL and value is not checkpointed
    }
    # An optimizer is given parameters: what is kept as a buffer no attack moves.
    held |= {key: "a parameter" for key, _ in part.named_parameters(recurse=False)}
    return held | {key: "a buffer" for key, _ in part.named_buffers(recurse=False)}


def _hooks_of(model: nn.Module) -> list[tuple[str, str]]:
    """Return (layer, kind and place among its kind; what is called) of hooks not torch's own."""
    foreign = {id(hook.call) for hook in foreign_hooks(model)}
    return [
        (f"{name or 'the network'}, {kind[1:].removesuffix('s')} {index}", _described(call))
        for name, part in model.named_modules()
        for kind, held in vars(part).items()
        if kind.endswith("_hooks") and isinstance(held, dict)
        for index, call in enumerate(held.values())
        if id(call) in foreign
    ]


def _described(value: Any, deep: int = _DEEP) -> str:
    """Return a text that two values share only if they do the same, as far as that can be told."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        return _of_many(value, deep)
    if isinstance(value, MethodType):
        return _described(value.__func__, deep)
    if isinstance(value, partial):
        bound = [*value.args, *value.keywords.values()]
        return f"{_described(value.func, deep)} of {_described(bound, deep)}"
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, Tensor):
        return _of_tensor(value)
    name = f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    # A layer that is kept as an attribute is compared in its own place, or is not of the network.
    if isinstance(value, type | nn.Module) or not deep or not getattr(value, "__dict__", None):
        return name
    left_out = _SAVED if name.startswith("transformers.") else ()
    held = {key: one for key, one in vars(value).items() if key not in left_out}
    return f"{name} {_described(held, deep - 1)}"


def _of_many(value: Any, deep: int) -> str:
    if isinstance(value, Mapping):
        items = [(str(key), _described(held, deep)) for key, held in value.items()]
        return str({key: held for key, held in sorted(items) if key not in _USUAL})
    parts = [_described(one, deep) for one in value]
    return f"[{', '.join(parts if isinstance(value, list | tuple) else sorted(parts))}]"


def _of_function(value: FunctionType) -> str:
    cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    bound = [held for held in (*cells, *(value.__defaults__ or ())) if isinstance(held, _PLAIN)]
    place = f"{value.__module__}.{value.__qualname__}, line {value.__code__.co_firstlineno}"
    return f"{place}, {bound}" if bound else place


def _of_tensor(value: Tensor) -> str:
    content = hashlib.sha256(tensor_bytes(value)).hexdigest()[:16]
    return f"{value.dtype} {tuple(value.shape)} {content}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
