"""Where readers look: what leaves each block, what the head reads, which axis is which.

Found on a probe, without changing the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._models import Shape, blocks, heads, probe_images, probing, run

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_FIRST = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Place:
    """Where a tensor is taken: what goes into a module (`before`) or leaves it.

    `last`: of a map (images, height, width, channels), not (images, channels, height, width).
    """

    module: str
    before: bool
    last: bool = False

    def watch(
        self, model: nn.Module, outputs: dict[str, Tensor], name: str, seen: list[Any] | None = None
    ) -> RemovableHandle:
        """Keep what passes here as `outputs[name]`, noted in `seen`, until the handle goes."""

        def keep(value: object) -> None:
            if isinstance(value, Tensor):
                outputs[name] = value
                if seen is not None:
                    seen.append(name)

        part = model.get_submodule(self.module)
        if self.before:
            return part.register_forward_pre_hook(lambda _, given: keep(_first_of(given)))
        return part.register_forward_hook(lambda _, given, output: keep(output))

    def change(self, model: nn.Module, by: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Put `by(value)` in the place of what passes here, until the handle goes."""
        part = model.get_submodule(self.module)
        if self.before:
            return part.register_forward_pre_hook(lambda _, given: (by(given[0]), *given[1:]))
        return part.register_forward_hook(lambda _, given, output: by(output))


def _first_of(given: tuple[object, ...]) -> object:
    return given[0] if given else None


def find_depths(
    model: nn.Module, head: str, shape: Shape, wanted: tuple[str, ...] | None
) -> dict[str, Place]:
    """Return where what leaves each block can be read, by the block's first name, and what goes
    into the head, by the head's, where that is not the mean of what leaves the last block.

    It is what goes into the next block, activation and pooling between them included; of the last
    block, its own output. A place that a probe does not pass is left out. Raises SpecError for a
    `wanted` depth that there is not, UnsupportedModelError for a network without blocks.
    """
    parts = blocks(model, head)
    places = {part[0]: Place(after[0], before=True) for part, after in pairwise(parts)}
    if parts:
        places[parts[-1][0]] = Place(parts[-1][-1], before=False)
    ends = {name: Place(name, before=True) for name in heads(model, head)} if parts else {}
    passed, seen = _probed(model, shape, places | ends)
    final = next((passed[name] for name in reversed(places) if name in passed), None)
    for name, place in ends.items():
        if final is not None and name in passed and not _same(passed[name], final):
            places[name] = place
    places = {
        name: replace(place, last=_channels_last(passed[name], name, seen))
        for name, place in places.items()
        if name in passed
    }
    if not places:
        raise UnsupportedModelError(
            f"readers: {type(model).__name__} has no blocks before its head {head!r} to read from:"
            " use method = 'sophon', or a network of several modules"
        )
    unknown = [name for name in wanted or () if name not in places]
    if unknown:
        raise SpecError(
            f"depths: the network has no block {unknown[0]!r}; there is {', '.join(places)}"
        )
    return places if wanted is None else {name: places[name] for name in wanted}


@dataclass(frozen=True)
class _Met:
    """A tensor that a layer met: as its input, or as its output."""

    part: nn.Module
    entering: bool
    shape: torch.Size
    stride: tuple[int, ...]


def _probed(
    model: nn.Module, shape: Shape, places: dict[str, Place]
) -> tuple[dict[str, Tensor], list[str | _Met]]:
    """Return what passed the places on a probe, and in order which place and layer met what."""
    passed: dict[str, Tensor] = {}
    seen: list[str | _Met] = []

    def met(part: nn.Module, value: object, *, entering: bool) -> None:
        if isinstance(value, Tensor) and value.dim() == 4:
            seen.append(_Met(part, entering, value.shape, value.stride()))

    handles = [place.watch(model, passed, name, seen) for name, place in places.items()]
    for part in model.modules():
        if isinstance(part, (*_FIRST, *_NORMS, nn.Linear)):
            handles += [
                part.register_forward_pre_hook(
                    lambda part, given: met(part, _first_of(given), entering=True)
                ),
                part.register_forward_hook(
                    lambda part, given, output: met(part, output, entering=False)
                ),
            ]
    try:
        with probing(model):
            run(model, probe_images(model, shape))
    finally:
        for handle in handles:
            handle.remove()
    return passed, seen


def _same(read: Tensor, final: Tensor) -> bool:
    """Return whether a head reads what leaves the last block, at most after a ReLU and a mean over
    positions.
    """
    for held in (final, final.relu()):
        axes = {3: ((1,),), 4: ((2, 3), (1, 2))}.get(held.dim(), ())
        for one in (held, *(held.mean(axis) for axis in axes)):
            if one.flatten(1).shape == read.flatten(1).shape and torch.allclose(
                one.flatten(1), read.flatten(1), rtol=1e-3, atol=1e-5
            ):
                return True
    return False


def _channels_last(value: Tensor, name: str, seen: list[str | _Met]) -> bool:
    """Return whether a map has its channels last, as the layers beside its place take it.

    It is asked of the layers that take such a map after it, then of those that gave one before.
    Where none tells, a map with square sides is taken for one with channels last if they differ
    from them.
    """
    if value.dim() != 4:
        return False
    at = seen.index(name)
    after = [met for met in seen[at:] if isinstance(met, _Met) and met.entering]
    before = [met for met in reversed(seen[: at + 2]) if isinstance(met, _Met) and not met.entering]
    for met in (*after, *before):
        if (met.shape, met.stride) == (value.shape, value.stride()):
            found = _says_last(met.part, value)
            if found is not None:
                return found
    return value.shape[1] == value.shape[2] != value.shape[3]


@torch.no_grad()
def _says_last(part: nn.Module, value: Tensor) -> bool | None:
    """Return whether a layer takes the last axis of a map for the channels; None: it tells not."""
    if isinstance(part, _FIRST):
        return False
    if isinstance(part, nn.Linear):
        return True
    # Of normalisations there are many: what one value moves lies along the axis it works on.
    moved = value.detach().clone()
    moved[0, 0, 0, 0] += 1
    with probing(part):
        changed = (part(moved) != part(value.detach()))[0]
    last, first = bool(changed[0, 0, 1:].any()), bool(changed[1:, 0, 0].any())
    return last if last != first else None
