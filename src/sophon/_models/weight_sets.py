"""Which of the tensors in a file are a network's weights, whatever wrapped or averaged them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sophon._base.errors import CheckpointError, brief
from sophon._base.remarks import remark

# What torch.compile, FSDP and activation checkpointing put into names, at any depth.
_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# How copies that were averaged while training are named.
_AVERAGED = ("ema", "swa", "avg", "averag", "shadow", "teacher", "polyak", "momentum")
# Under which keys a torch file nests the weights, most usual first.
NESTS = ("state_dict", "model_state_dict", "model")
# Heads that inception and googlenet have while they are trained.
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
# Deeper than this no framework nests them.
_DEEPEST = 4


@dataclass(frozen=True)
class _Set:
    """One network's weights: the dotted path to them, and what was dropped of their names."""

    path: str
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        return any(word in self.path.lower() for word in _AVERAGED)

    @property
    def said(self) -> str:
        parts = [f"{', '.join(self.dropped)} is dropped from names of weights"] * bool(self.dropped)
        if self.left_out:
            count, first = len(self.left_out), brief(self.left_out[0])
            parts.append(
                f"{count} tensors that are no weights of the network are left out ({first})"
            )
        return "; ".join(parts)


def required_keys(expected: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that weights must have: old files lack BatchNorm's counters."""
    return [key for key in expected if not key.endswith("num_batches_tracked")]


def chosen(
    content: Any, expected: Mapping[str, Tensor], *, source: str, key: str | None = None
) -> dict[str, Tensor] | None:
    """Return the tensors in `content` that have every key of `expected`, under those keys.

    `content` is a dictionary, nested or not. Prefixes that all of them share are dropped. Of
    several sets it is the one under the path `key`, else the first that is not an average; what was
    taken or dropped is remarked. None if no set fits; CheckpointError if `key` names none.
    """
    sets = [one for held in _dictionaries(content) for one in _sets(*held, expected)]
    names = ", ".join(one.path or "(top level)" for one in sets)
    if key is not None:
        named = [one for one in sets if f".{key}." in f".{one.path}."]
        if len(named) != 1:
            raise CheckpointError(
                f"model.weights_key = {brief(key)}: {source} has {len(named)} such sets of weights"
                f" for this network; there are: {names[:160] or 'none'}"
            )
        return named[0].tensors
    if not sets:
        return None
    taken = min(sets, key=lambda one: (one.averaged, _rank(one.path)))
    if len(sets) > 1:
        remark(
            f"{source} holds several sets of weights ({names[:160]}): {taken.path or '(top level)'}"
            " is taken; model.weights_key chooses another"
        )
    elif taken.said:
        remark(f"{source}: {taken.said}")
    return taken.tensors


def _rank(path: str) -> int:
    first = path.partition(".")[0]
    return NESTS.index(first) if first in NESTS else len(NESTS)


def _dictionaries(
    content: Any, path: str = "", depth: int = 0, met: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dictionaries with tensors in `content`, each once with a path of keys to it."""
    met = set() if met is None else met
    if not isinstance(content, Mapping) or depth > _DEEPEST or id(content) in met:
        return
    met.add(id(content))
    held = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if held:
        yield path, held
    for key, value in content.items():
        yield from _dictionaries(value, f"{path}.{key}" if path else str(key), depth + 1, met)


def _sets(path: str, held: dict[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[_Set]:
    """Yield the sets of weights in one dictionary: one for each prefix of all required keys."""
    required = required_keys(expected)
    plain = {_unmarked(key): value for key, value in held.items()}
    marks = tuple(mark for mark in _MARKS if any(mark in key for key in held))
    first = required[0] if required else ""
    ends = [key for key in plain if key == first or key.endswith(f".{first}")]
    prefixes = [key.removesuffix(first) for key in ends]
    prefixes = [p for p in prefixes if all(p + key in plain for key in required)]
    for prefix in prefixes:
        others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
        others += tuple(prefix + one for one in _AUXILIARY)
        own = {
            key: value
            for key, value in plain.items()
            if key.startswith(prefix)
            and (key.removeprefix(prefix) in expected or not key.startswith(others))
        }
        yield _Set(
            path=".".join(part for part in (path, prefix.rstrip(".")) if part),
            tensors={key.removeprefix(prefix): value for key, value in own.items()},
            dropped=(*marks, *([prefix] if prefix else [])),
            left_out=tuple(key for key in plain if key not in own),
        )


def _unmarked(key: str) -> str:
    for mark in _MARKS:
        key = key.replace(mark, "")
    return key
