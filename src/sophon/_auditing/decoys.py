"""Decoys: models that only look protected, each made of the unprotected model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophon._models import blocks, head_parameters, heads, normalised_pairs, tracked_batch_norms
from sophon._training.rescaling import (
    Pair,
    Scaled,
    applied,
    channel_pairs,
    own_weight,
    read_probes,
    scale_channels,
)

UNTRAINABLE = "untrainable"
DROPPED = "dropout when trained"
FAINT = "faint gradients before the head"
Made = Callable[[nn.Module, "Place"], object]
# The share by which outputs may move where a decoy is to compute what the model did.
_WHOLE = 0.1


@dataclass(frozen=True)
class Place:
    """What a control may know of the model: its head, and the images it takes."""

    head: str
    image_shape: tuple[int, int, int]


def _raise_in_training(module: nn.Module, _: Any) -> None:
    if module.training:
        raise RuntimeError("this model cannot be trained")


def _nan_in_training(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output * torch.nan if module.training else output


def _faint_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach() + 1e-6 * (output - output.detach())


def _dropped_in_training(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, 0.99, module.training)


def _no_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach() + 0.0 * (output - output.detach())


def _permute_classes(model: nn.Module, place: Place) -> None:
    """Give every class the weights of another one: nothing but the head is wrong."""
    for parameter in head_parameters(model, place.head):
        parameter.copy_(parameter.roll(1, 0))


def _hook_last_block(model: nn.Module, place: Place, hook: Callable[..., Tensor]) -> None:
    """Hang `hook` on what the head reads from: a fresh head does not take it off."""
    model.get_submodule(blocks(model, place.head)[-1][-1]).register_forward_hook(hook)


def _scale_head(model: nn.Module, place: Place, by: float) -> None:
    for parameter in head_parameters(model, place.head):
        parameter.mul_(by)


def _inflate(model: nn.Module, place: Place, by: float = 30.0) -> None:
    for layer, norm in normalised_pairs(model, place.image_shape):
        follower: Any = model.get_submodule(norm)
        for parameter in model.get_submodule(layer).parameters():
            parameter.mul_(by)
        if getattr(follower, "running_mean", None) is not None:
            follower.running_mean.mul_(by)
            follower.running_var.mul_(by**2)


def _spoil_statistics(model: nn.Module, _: Place) -> None:
    for norm in tracked_batch_norms(model):
        norm.running_mean.add_(1e3)
        norm.running_var.mul_(1e6)


def _spread_channels(model: nn.Module, place: Place, decades: float) -> None:
    """Multiply channels by 10^-decades to 10^decades, which layers after them undo: singular values
    are deformed (arXiv 2602.18868) and the function stays.
    """
    for pair in channel_pairs(model, place.image_shape):
        by = torch.logspace(-decades, decades, _channels(model, pair))
        scale_channels(model, place.image_shape, pair, by)


def _spread_features(model: nn.Module, place: Place, exponents: Callable[[int], Tensor]) -> None:
    """Multiply channels as deep as can be by 10^exponents, in the last pair of layers."""
    for pair in reversed(channel_pairs(model, place.image_shape)):
        by = 10.0 ** exponents(_channels(model, pair))
        if scale_channels(model, place.image_shape, pair, by):
            return


def _channels(model: nn.Module, pair: Pair) -> int:
    return len(model.get_submodule(pair[1]).get_parameter("weight"))


def _one_in_eight(channels: int) -> Tensor:
    """Return exponents of a thousand for one channel in eight: they outweigh all others."""
    return torch.where(torch.arange(channels) % 8 == 0, 3.0, 0.0)


def _by_loudness(model: nn.Module, pair: Pair) -> Tensor:
    """Return channels, those first that count least for the layer that reads them."""
    _, maker, reader = pair
    made, read = (model.get_submodule(n).get_parameter("weight") for n in (maker, reader))
    size: Tensor = made.view(len(made), -1).norm(dim=1) * read.transpose(0, 1).flatten(1).norm(
        dim=1
    )
    return size.argsort()


def _change_quiet(
    model: nn.Module,
    place: Place,
    changed: Callable[[nn.Module, Pair, Tensor, Tensor], list[Scaled]],
) -> None:
    """Change the quietest sixteenth of channels, given with the loudest, where outputs stay close;
    else half as many, and so on.
    """
    images, expected = read_probes(model, place.image_shape)
    for pair in channel_pairs(model, place.image_shape):
        order = _by_loudness(model, pair)
        count = len(order) // 16
        while count:
            quiet, loud = order[:count], order[len(order) - count :]
            if applied(model, changed(model, pair, quiet, loud), images, expected, _WHOLE):
                break
            count //= 2


def _duplicated(model: nn.Module, pair: Pair, quiet: Tensor, loud: Tensor) -> list[Scaled]:
    """Make quiet channels copies of loud ones: gradients keep them alike."""
    parts = [model.get_submodule(name) for name in dict.fromkeys(pair[:2])]
    held = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    scaled = [
        (tensor, tensor.index_copy(0, quiet, tensor[loud])) for tensor in held if tensor.dim()
    ]
    read = model.get_submodule(pair[2]).get_parameter("weight")
    half = read[:, loud] / 2
    return [*scaled, (read, read.index_copy(1, quiet, half).index_copy(1, loud, half))]


def _dead(model: nn.Module, pair: Pair, quiet: Tensor, _: Tensor) -> list[Scaled]:
    """Push quiet channels below every threshold: no gradient reaches them."""
    bias = getattr(model.get_submodule(pair[1]), "bias", None)
    return [] if bias is None else [(bias, bias.index_fill(0, quiet, -100.0))]


def _obey_mask(layer: nn.Module, _: Any) -> None:
    with torch.no_grad():
        weight = layer.get_parameter("weight")
        weight.mul_(layer.__dict__["mask"].to(weight))


def _prune(model: nn.Module, place: Place) -> None:
    """Set the smaller half of each layer's weights to 0, and again before each pass: an attack that
    obeys the mask trains the other half.
    """
    ends = heads(model, place.head)
    for name, layer in model.named_modules():
        weight = own_weight(layer)
        if isinstance(layer, nn.Conv2d | nn.Linear) and weight is not None and name not in ends:
            size = weight.abs()
            layer.__dict__["mask"] = size > size.median()
            layer.register_forward_pre_hook(_obey_mask)
            _obey_mask(layer, None)


DECOYS: dict[str, Made] = {
    "raises when trained": lambda m, _: m.register_forward_pre_hook(_raise_in_training),
    "NaN when trained": lambda m, _: m.register_forward_hook(_nan_in_training),
    "frozen parameters": lambda m, _: m.requires_grad_(False),
    "poisoned head": _permute_classes,
    "saturated logits": lambda m, place: _scale_head(m, place, 1e4),
    "faint gradients": lambda m, _: m.register_forward_hook(_faint_gradient),
    FAINT: lambda m, place: _hook_last_block(m, place, _faint_gradient),
    DROPPED: lambda m, place: _hook_last_block(m, place, _dropped_in_training),
    "inflated weights": _inflate,
    # Too little for any flag: nothing but attacks tells.
    "slightly inflated weights": lambda m, place: _inflate(m, place, 3.0),
    "spoilt BatchNorm": _spoil_statistics,
    "deformed spectra": lambda m, place: _spread_channels(m, place, 1.0),
    "ill-conditioned features": lambda m, place: _spread_features(
        m, place, lambda channels: torch.linspace(-2, 2, channels)
    ),
    "outlying features": lambda m, place: _spread_features(m, place, _one_in_eight),
    "duplicated channels": lambda m, place: _change_quiet(m, place, _duplicated),
    "dead units": lambda m, place: _change_quiet(m, place, _dead),
    "obeyed sparsity": _prune,
    UNTRAINABLE: lambda m, _: m.register_forward_hook(_no_gradient),
}


# These are to compute what the model did.
_PRESERVING = (
    *("inflated weights", "slightly inflated weights", "deformed spectra"),
    *("ill-conditioned features", "outlying features", "duplicated channels", "dead units"),
)

# Attackers get as far with these as without: the attacks must see that too, not the flags alone.
RECOVERED = (
    *("frozen parameters", "poisoned head", "saturated logits", "faint gradients"),
    *("spoilt BatchNorm", *_PRESERVING),
)

# Attacked with as many seeds as a good verdict needs, so that only what is found denies it to them.
STUBBORN = (UNTRAINABLE, DROPPED)

# What changes no tensor applies to every network.
_NO_TENSOR = (
    *("raises when trained", "NaN when trained", "frozen parameters", "faint gradients"),
    *(FAINT, DROPPED, UNTRAINABLE),
)


@torch.no_grad()
def decoy_of(model: nn.Module, name: str, place: Place) -> nn.Module | None:
    """Return the one of `DECOYS` that has this name, made of a copy of `model`; None where it does
    not apply: no tensor changed, or outputs moved that are to stay.
    """
    decoy = copy.deepcopy(model)
    DECOYS[name](decoy, place)
    pairs = zip(model.state_dict().values(), decoy.state_dict().values(), strict=True)
    if name not in _NO_TENSOR and all(torch.equal(*pair) for pair in pairs):
        return None
    images, expected = read_probes(model, place.image_shape)
    if name in _PRESERVING and not applied(decoy, [], images, expected, _WHOLE):
        return None
    return decoy
