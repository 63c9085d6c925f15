"""Weights changed at random: noise, zeros drawn anew, values in another order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sophon._specs import Densify, NoiseKick, Scramble


@torch.no_grad()
def noise_kick(model: nn.Module, spec: NoiseKick, source: torch.Generator) -> None:
    """Add noise to every parameter; of a rank, to those of two dimensions or more."""
    for parameter in model.parameters():
        if spec.rank is None:
            noise = torch.randn(parameter.shape, generator=source)
        elif parameter.dim() > 1:
            rows, columns = parameter.flatten(1).shape
            left = torch.randn((rows, spec.rank), generator=source)
            right = torch.randn((spec.rank, columns), generator=source)
            noise = (left @ right / spec.rank**0.5).view(parameter.shape)
        else:
            continue
        size = parameter.square().mean().sqrt()
        parameter.add_(noise.to(parameter) * (spec.relative_std * size))


@torch.no_grad()
def densify(model: nn.Module, spec: Densify, source: torch.Generator) -> None:
    """Draw zeros of parameters of two dimensions or more anew, where other values are beside."""
    for parameter in model.parameters():
        zeros = parameter == 0
        if parameter.dim() > 1 and zeros.any() and not zeros.all():
            size = parameter[~zeros].square().mean().sqrt()
            noise = torch.randn(parameter.shape, generator=source).to(parameter)
            parameter.copy_(torch.where(zeros, noise * (spec.relative_std * size), parameter))


@torch.no_grad()
def scramble(
    model: nn.Module, spec: Scramble, source: torch.Generator, factors: dict[str, float]
) -> None:
    """Permute parameters of two dimensions or more, or draw Gaussian ones of their mean and
    standard deviation; nothing passes to them by `factors`.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(_scrambled(parameter, spec.mode, source))
            factors[name] = 0.0


def _scrambled(held: Tensor, mode: str, source: torch.Generator) -> Tensor:
    if mode == "permute":
        order = torch.randperm(held.numel(), generator=source).to(held.device)
        return held.flatten()[order].view(held.shape)
    drawn = torch.randn(held.shape, generator=source).to(held)
    drawn = (drawn - drawn.mean()) / drawn.std(correction=0).clamp_min(1e-12)
    return held.mean() + held.std(correction=0) * drawn
