"""What an attacker does to the copied weights before its first step, and how it derives.

A preparation maps each real parameter w to c * w + constant. The factor c is what carries a
change of the real weights over to the prepared ones: 1 where they are kept, 0 where they are
re-initialised, c where they are rescaled. Factors multiply along the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sophon._errors import DataError, SpecError
from sophon._models import (
    BatchNorms,
    Names,
    Shape,
    blocks,
    head_classes,
    normalised_pairs,
    probe_images,
    probing,
    reestimate_batch_norm,
    reinitialise,
    replace_head,
    tracked_batch_norms,
)
from sophon._seeding import generator
from sophon._specs import (
    BatchNorm,
    FreshHead,
    NoiseKick,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
)

# Outputs may move by this much, relative to their size: a normalisation's eps does not scale.
_PRESERVED = 0.02
Factors = dict[str, float]


@dataclass(frozen=True)
class Surroundings:
    """What a preparation may use.

    `classes` is the restricted domain's; `batches(n)` yields up to n normalised image batches
    of it (batch, channels, height, width); `(seed, *names)` is the attacker's random stream.
    """

    head: str
    image_shape: Shape
    classes: int
    seed: int
    names: Names
    batches: Callable[[int], Iterator[Tensor]] | None


def prepare(
    model: nn.Module, preparations: tuple[Preparation, ...], surroundings: Surroundings
) -> Factors:
    """Prepare `model`, already a copy, in order; return each named parameter's factor.

    A head whose class count differs from the domain's is replaced in any case. Raises
    SpecError for a preparation that this model does not allow, naming what it allows, and
    UnsupportedModelError for layers that cannot be re-initialised.
    """
    factors = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if head_classes(model, surroundings.head) != surroundings.classes:
        _fresh_head(model, FreshHead(), _streamed(surroundings, "fitting head"), factors)
    for index, preparation in enumerate(preparations):
        step = _streamed(surroundings, "preparation", index, preparation.kind)
        _PREPARATIONS[preparation.kind](model, preparation, step, factors)
    return factors


def _streamed(surroundings: Surroundings, *names: str | int) -> Surroundings:
    return replace(surroundings, names=(*surroundings.names, *names))


def _forget(factors: Factors, prefix: str) -> None:
    for name in factors:
        if name.startswith(f"{prefix}."):
            factors[name] = 0.0


def _fresh_head(
    model: nn.Module, _: FreshHead, surroundings: Surroundings, factors: Factors
) -> None:
    head, classes = surroundings.head, surroundings.classes
    replace_head(model, head, classes, seed=surroundings.seed, names=surroundings.names)
    _forget(factors, head)


def _reset_last_blocks(
    model: nn.Module, preparation: ResetLastBlocks, surroundings: Surroundings, factors: Factors
) -> None:
    found = blocks(model, surroundings.head)
    if preparation.blocks > len(found):
        raise SpecError(
            f"reset_last_blocks: blocks = {preparation.blocks}, and the model has {len(found)}; "
            f"choose 1 to {len(found)}"
        )
    for names in found[-preparation.blocks :]:
        for name in names:
            stream = (*surroundings.names, name)
            reinitialise(model.get_submodule(name), seed=surroundings.seed, names=stream)
            _forget(factors, name)


def _batch_norm(
    model: nn.Module, preparation: BatchNorm, surroundings: Surroundings, factors: Factors
) -> None:
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorms)}
    if preparation.mode == "reestimate":
        _reestimate(model, preparation.batches, surroundings)
        return
    for name, norm in norms.items():
        norm.reset_parameters()
        _forget(factors, name)


def _reestimate(model: nn.Module, count: int, surroundings: Surroundings) -> None:
    if not tracked_batch_norms(model):
        return
    if surroundings.batches is None:
        raise SpecError("batch_norm: mode = 'reestimate' needs images of the restricted domain")
    if not reestimate_batch_norm(model, surroundings.batches(count)):
        raise DataError("batch_norm: the restricted domain gave no batch to re-estimate from")


@torch.no_grad()
def _noise_kick(
    model: nn.Module, preparation: NoiseKick, surroundings: Surroundings, factors: Factors
) -> None:
    source = generator(surroundings.seed, *surroundings.names)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source).to(parameter)
        size = parameter.square().mean().sqrt()
        parameter.add_(noise * (preparation.relative_std * size))


@torch.no_grad()
def _rescale_weights(
    model: nn.Module, preparation: RescaleWeights, surroundings: Surroundings, factors: Factors
) -> None:
    """Scale what each normalisation undoes: weight, bias and running mean by c, variance by c^2.

    All pairs at once when that preserves the function; otherwise one at a time, leaving out
    those that do not (an output read elsewhere, an eps that matters).
    """
    scales = []
    for layer, norm in normalised_pairs(model, surroundings.image_shape):
        weight: Any = model.get_submodule(layer).weight
        size = float(weight.norm()) / math.sqrt(weight.shape[0])
        if size > 0 and math.isfinite(size):
            scales.append((layer, norm, preparation.norm / size))
    images = probe_images(model, surroundings.image_shape)
    with probing(model):
        expected = model(images)
    kept = _apply_together(model, scales, images, expected)
    if not kept:
        kept = [scale for scale in scales if _apply_together(model, [scale], images, expected)]
    for layer, _, scale in kept:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in factors:
                factors[name] *= scale


Scale = tuple[str, str, float]


def _apply_together(
    model: nn.Module, scales: list[Scale], images: Tensor, expected: Tensor
) -> list[Scale]:
    """Return `scales`, applied, or nothing and the tensors as before when the outputs move."""
    touched = [tensor for scale in scales for tensor, _ in _scaled_tensors(model, *scale)]
    before = [tensor.clone() for tensor in touched]
    for scale in scales:
        for tensor, factor in _scaled_tensors(model, *scale):
            tensor.mul_(factor)
    with probing(model):
        moved = (model(images) - expected).norm()
    if bool(moved <= _PRESERVED * expected.norm()):
        return scales
    for tensor, value in zip(touched, before, strict=True):
        tensor.copy_(value)
    return []


def _scaled_tensors(
    model: nn.Module, layer: str, norm: str, scale: float
) -> Iterator[tuple[Tensor, float]]:
    owner: Any = model.get_submodule(layer)
    yield owner.weight, scale
    if owner.bias is not None:
        yield owner.bias, scale
    follower: Any = model.get_submodule(norm)
    if getattr(follower, "running_mean", None) is not None:
        yield follower.running_mean, scale
        yield follower.running_var, scale * scale


_PREPARATIONS: dict[str, Callable[[nn.Module, Any, Surroundings, Factors], None]] = {
    "fresh_head": _fresh_head,
    "reset_last_blocks": _reset_last_blocks,
    "rescale_weights": _rescale_weights,
    "batch_norm": _batch_norm,
    "noise_kick": _noise_kick,
}
