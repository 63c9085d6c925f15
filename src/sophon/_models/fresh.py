"""Freshly initialised weights: layer by layer, or a whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophon._base.errors import UnsupportedModelError
from sophon._base.seeding import seeded
from sophon._models.heads import head_classes, replace_head
from sophon._models.probing import Names
from sophon._models.transformers import from_configuration
from sophon._models.weights import tensors_sha256


@dataclass(frozen=True)
class Bare:
    """Fresh values of the parameters of a network that no `reset_parameters` reaches, by name."""

    values: Mapping[str, Tensor]

    def within(self, name: str) -> Bare:
        """Return those of the submodule `name`, named as it names them."""
        start = f"{name}."
        held = {k.removeprefix(start): v for k, v in self.values.items() if k.startswith(start)}
        return Bare(held)

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of names, types, shapes and bytes."""
        return tensors_sha256(self.values.items())


@torch.no_grad()
def bare_parameters(fresh: nn.Module) -> Bare:
    """Return the parameters of a fresh network that no reset reaches: scales of residuals, position
    embeddings, class tokens. The network is left as it is.
    """
    missed = _reset(copy.deepcopy(fresh), seed=0, names=("bare",))
    return Bare({name: fresh.get_parameter(name).detach().clone() for name in missed})


def _reset(module: nn.Module, *, seed: int, names: Names) -> list[str]:
    """Reset what has a `reset_parameters`; return the parameters that none reached: now NaN."""
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    with seeded(seed, *names):
        for part in reversed(list(module.modules())):
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
    return [name for name, p in module.named_parameters() if bool(torch.isnan(p).any())]


@torch.no_grad()
def reinitialise(
    module: nn.Module,
    *,
    seed: int,
    names: Names,
    bare: Bare | None = None,
    otherwise: str = "leave out the preparations that reset it",
) -> None:
    """Reset every parameter by its layer's own `reset_parameters`, on the stream `(seed, *names)`;
    those that no reset reaches are taken from `bare`.

    Raises UnsupportedModelError naming parameters that neither has, with what to do `otherwise`
    than to write a reset; the module is then unchanged.
    """
    before = [(tensor, tensor.clone()) for tensor in [*module.parameters(), *module.buffers()]]
    missed = []
    for name in _reset(module, seed=seed, names=names):
        parameter = module.get_parameter(name)
        value = None if bare is None else bare.values.get(name)
        if value is None or value.shape != parameter.shape:
            missed.append(name)
        else:
            parameter.copy_(value)
    if missed:
        for tensor, value in before:
            tensor.copy_(value)
        raise UnsupportedModelError(
            f"no reset_parameters reaches {', '.join(missed[:4])}"
            f"{', ...' if len(missed) > 4 else ''} of {type(module).__name__}: give its layer a"
            f" reset_parameters method, or {otherwise}"
        )


def fresh_copy(
    model: nn.Module, factory: Callable[[], nn.Module] | None, *, seed: int, names: Names
) -> nn.Module:
    """Return a freshly initialised model with the keys and shapes of `model`, in eval mode.

    `factory` runs on the stream `(seed, *names)`; without one a network of transformers
    is built from its configuration, and a copy of any other is reset layer by layer.
    A head whose class count differs is replaced. Raises UnsupportedModelError for a factory
    that builds another architecture.
    """
    factory = factory or from_configuration(model)
    if factory is None:
        fresh = copy.deepcopy(model)
        made = "pass a factory of fresh models as scratch"
        reinitialise(fresh, seed=seed, names=names, otherwise=made)
        return fresh.eval()
    with seeded(seed, *names):
        fresh = factory()
    wanted, built = model.state_dict(), fresh.state_dict()
    if wanted.keys() != built.keys():
        differing = sorted(wanted.keys() ^ built.keys())[:4]
        raise UnsupportedModelError(
            f"the factory of fresh models builds another architecture: {', '.join(differing)}:"
            " give one that builds the model's own"
        )
    differing = [key for key, value in wanted.items() if value.shape != built[key].shape]
    for head in sorted({key.rpartition(".")[0] for key in differing}):
        classes = head_classes(model, head)
        replace_head(fresh, head, classes, seed=seed, names=(*names, "head"))
    like = next(model.parameters())
    if next(fresh.parameters()).dtype != like.dtype:
        fresh = fresh.to(like.dtype)
    return fresh.to(like.device).eval()


@torch.no_grad()
def shrink_towards(model: nn.Module, fresh: nn.Module, share: float) -> list[str]:
    """Make matrices and filters of `model` (1 - share) of themselves and `share` of those of
    `fresh`, each at the given one's norm; return their names. Scales, shifts and statistics stay.
    Where the fresh ones are 0, what is left is the (1 - share).
    """
    mixed = [name for name, held in model.named_parameters() if held.dim() > 1]
    for name in mixed:
        held, new = model.get_parameter(name), fresh.get_parameter(name)
        size = new.norm()
        scale = torch.where(size > 0, held.norm() / size, 0.0)
        held.mul_(1 - share).add_(new * scale, alpha=share)
    return mixed
