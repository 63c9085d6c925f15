"""Weights rescaled so that the function stays: a following layer, or a normalisation, undoes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sophon._models import Shape, layers_in_order, normalised_pairs, probe_images, probing, run

# Outputs may move by this much, relative to their size: a normalisation's eps does not scale.
_PRESERVED = 0.02
# Between layers that undo each other exactly only rounding is left.
_CHAIN_PRESERVED = 1e-3
# So many probes as they are, and as many three times as large: caps (ReLU6) are met.
_PROBES = 4
# A layer, the normalisation after it, and a factor; a tensor and what it becomes.
Scale = tuple[str, str, float]
Scaled = tuple[Tensor, Tensor]
Pair = tuple[str, str, str]


@torch.no_grad()
def rescale_weights(
    model: nn.Module, size: float, image_shape: Shape, factors: dict[str, float]
) -> None:
    """Give filters the norm `size` where the function allows it.

    Scaled is what the next layer can undo: weight and bias by c, the next weight by 1 / c; then
    what a normalisation undoes: weight, bias and running mean by c, variance by c^2.

    In this order: a normalised layer may have to take what the one before it left. All pairs at
    once when that preserves the function; otherwise one at a time, leaving out those that do not
    (an output read elsewhere, an eps that matters). `factors` of the parameters follow.
    """
    pairs = normalised_pairs(model, image_shape)
    normalised = {layer for layer, _ in pairs if _scalable(_size(model, layer))}
    images = probe_images(model, image_shape)
    _rescale_chain(model, size, layers_in_order(model, image_shape), images, factors, normalised)
    scales = [
        (layer, norm, size / held)
        for layer, norm in pairs
        if _scalable(held := _size(model, layer))
    ]
    expected = _read_out(model, images)
    kept = _apply_together(model, scales, images, expected)
    if not kept:
        kept = [scale for scale in scales if _apply_together(model, [scale], images, expected)]
    for layer, _, scale in kept:
        _multiply(factors, layer, scale)


@torch.no_grad()
def balance_weights(model: nn.Module, image_shape: Shape, factors: dict[str, float]) -> None:
    """Give each channel between two layers the same norm on both sides; nothing passes by `factors`
    to what is balanced. All pairs together move outputs on probes by a thousandth at most.
    """
    _, expected = read_probes(model, image_shape)
    for pair in channel_pairs(model, image_shape):
        made, read = (model.get_submodule(name).get_parameter("weight") for name in pair[1:])
        outgoing = read.transpose(0, 1).flatten(1).norm(dim=1)
        ratio = outgoing / made.view(len(made), -1).norm(dim=1)
        by = torch.where(ratio.isfinite() & (ratio > 0), ratio.sqrt(), 1.0)
        for name in scale_channels(model, image_shape, pair, by, expected):
            factors[name] = 0.0


def channel_pairs(model: nn.Module, image_shape: Shape) -> list[Pair]:
    """Return (layer, maker, reader) names of layers that run one after the other and fit.

    The maker of the channels is the normalisation after the layer, else the layer. What lies
    between them, and what else reads them, is not known: `scale_channels` tries. Left out are
    weights that are computed of others (weight norm, spectral norm).
    """
    follows = dict(normalised_pairs(model, image_shape))
    pairs = []
    for layer, reader in itertools.pairwise(layers_in_order(model, image_shape)):
        maker = follows.get(layer, layer)
        made, read = (own_weight(model.get_submodule(name)) for name in (maker, reader))
        if made is None or read is None:
            continue
        if read.dim() > 1 and len(made) == read.shape[1]:
            pairs.append((layer, maker, reader))
    return pairs


def own_weight(layer: nn.Module) -> Tensor | None:
    """Return the parameter `weight` of a layer; None where it has none, or computes it."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def read_probes(model: nn.Module, image_shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """Return probe images (8, *image_shape), half of them large, and each half's outputs."""
    images = probe_images(model, image_shape, _PROBES)
    images = torch.cat([images, 3 * images])
    return images, _read_out(model, images)


@torch.no_grad()
def scale_channels(
    model: nn.Module,
    image_shape: Shape,
    pair: Pair,
    by: Tensor,
    before: list[Tensor] | None = None,
) -> list[str]:
    """Multiply what makes channels `by` (channels) and divide what reads them; return the names of
    the parameters that changed: none, and all as it was, where that moves outputs by more than a
    thousandth, from those of now or from those that `read_probes` read `before`.
    """
    _, maker, reader = pair
    (images, now), readers = read_probes(model, image_shape), model.get_submodule(reader)
    made = dict(model.get_submodule(maker).named_parameters(recurse=False))
    read: Any = readers.weight
    scaled: list[Scaled] = [(p, p * by.view(-1, *[1] * (p.dim() - 1))) for p in made.values()]
    scaled.append((read, read / by.view(1, -1, *[1] * (read.dim() - 2))))
    # What reads them must stay as well: a block may hardly count yet.
    expected = [*(before or now), *_read_out(model, images, readers)[len(now) :]]
    if not applied(model, scaled, images, expected, _CHAIN_PRESERVED, readers):
        return []
    return [*(f"{maker}.{name}" for name in made), f"{reader}.weight"]


def _size(model: nn.Module, layer: str) -> float:
    """Return the root mean square over a layer's filters of their norms."""
    weight: Any = model.get_submodule(layer).weight
    return float(weight.norm()) / math.sqrt(weight.shape[0])


def _scalable(size: float) -> bool:
    return size > 0 and math.isfinite(size)


def _multiply(factors: dict[str, float], layer: str, scale: float) -> None:
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in factors:
            factors[name] *= scale


def _rescale_chain(
    model: nn.Module,
    norm: float,
    order: list[str],
    images: Tensor,
    factors: dict[str, float],
    but: set[str],
) -> None:
    """Scale each layer that no normalisation follows, where its successor can take the inverse."""
    expected = _read_out(model, images)
    for name, after in itertools.pairwise(order):
        size = _size(model, name)
        following: Any = model.get_submodule(after)
        computed = any(own_weight(model.get_submodule(n)) is None for n in (name, after))
        if name in but or computed or not _scalable(size):
            continue
        scale = norm / size
        scaled = [*_layer_tensors(model, name, scale), (following.weight, following.weight / scale)]
        if applied(model, scaled, images, expected, _CHAIN_PRESERVED):
            _multiply(factors, name, scale)
            factors[f"{after}.weight"] /= scale


def _apply_together(
    model: nn.Module, scales: list[Scale], images: Tensor, expected: list[Tensor]
) -> list[Scale]:
    """Return `scales`, applied, or nothing and the tensors as before when the outputs move."""
    scaled = [pair for scale in scales for pair in _scaled_tensors(model, *scale)]
    return scales if applied(model, scaled, images, expected, _PRESERVED) else []


def _read_out(model: nn.Module, images: Tensor, *watched: nn.Module) -> list[Tensor]:
    """Return the model's outputs, in parts, and those of the layers `watched`."""
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda *given: found.append(given[2])) for m in watched]
    try:
        with probing(model):
            outputs = [run(model, images), *found]
            return [part for one in outputs for part in one.split(_PROBES)]
    finally:
        for handle in handles:
            handle.remove()


def applied(
    model: nn.Module,
    scaled: list[Scaled],
    images: Tensor,
    expected: list[Tensor],
    tolerated: float,
    *watched: nn.Module,
) -> bool:
    """Give tensors their values and return whether outputs on `images`, and of what is `watched`,
    are within the share `tolerated` of those `expected`; where they are not, undo it.
    """
    before = [tensor.clone() for tensor, _ in scaled]
    for tensor, value in scaled:
        tensor.copy_(value)
    pairs = zip(_read_out(model, images, *watched), expected, strict=True)
    if all(bool((now - then).norm() <= tolerated * then.norm()) for now, then in pairs):
        return True
    for (tensor, _), value in zip(scaled, before, strict=True):
        tensor.copy_(value)
    return False


def _layer_tensors(model: nn.Module, layer: str, scale: float) -> Iterator[Scaled]:
    owner: Any = model.get_submodule(layer)
    yield owner.weight, owner.weight * scale
    if owner.bias is not None:
        yield owner.bias, owner.bias * scale


def _scaled_tensors(model: nn.Module, layer: str, norm: str, scale: float) -> Iterator[Scaled]:
    yield from _layer_tensors(model, layer, scale)
    follower: Any = model.get_submodule(norm)
    if getattr(follower, "running_mean", None) is not None:
        yield follower.running_mean, follower.running_mean * scale
        yield follower.running_var, follower.running_var * (scale * scale)
