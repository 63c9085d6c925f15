"""Low-rank adapters through peft: put in beside a model's layers, merged into them at the end."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from sophon._base.errors import UnsupportedModelError
from sophon._base.seeding import seeded
from sophon._base.torchvision_patch import installing, library
from sophon._models.heads import heads

# peft keeps a layer's own weights under this name, and its adapters under "default".
_BASE = ".base_layer."


def add_lora(
    model: nn.Module, rank: int, *, head: str, seed: int, names: tuple[str | int, ...]
) -> None:
    """Put LoRA adapters beside every Conv2d and Linear of `model` but the head, in place.

    The function is unchanged at first (arXiv 2106.09685, section 4.1; scaling 2).
    Raises UnsupportedModelError if peft is missing or there is no layer to adapt.
    """
    ends = heads(model, head)
    layers = [name for name, part in model.named_modules() if _adaptable(part) and name not in ends]
    if not layers:
        raise UnsupportedModelError("lora_rank: the model has no Conv2d or Linear besides its head")
    peft = require_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="|".join(re.escape(name) for name in layers)
    )
    device = next(model.parameters()).device
    with seeded(seed, *names):
        peft.inject_adapter_in_model(config, model)
    model.to(device)
    # An attribute that only peft's own saving reads.
    del model.peft_config


def lora_parameters(model: nn.Module, head: str) -> set[str]:
    """Return what fine-tuning through adapters trains: the adapters' parameters and the head's."""
    names = (name for name, _ in model.named_parameters())
    ends = tuple(f"{end}." for end in heads(model, head))
    return {name for name in names if ".lora_" in name or name.startswith(ends)}


def real_name(name: str) -> str | None:
    """Return what a parameter was called before `add_lora`; None for an adapter's own."""
    return None if ".lora_" in name else name.replace(_BASE, ".")


@torch.no_grad()
def merged_lora(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with its adapters merged into its layers, under the old names."""
    merged = copy.deepcopy(model)
    adapted = [(n, part) for n, part in merged.named_modules() if hasattr(part, "get_base_layer")]
    for name, part in adapted:
        layer: Any = part
        layer.merge()
        owner, _, last = name.rpartition(".")
        setattr(merged.get_submodule(owner), last, layer.get_base_layer())
    return merged


def _adaptable(part: nn.Module) -> bool:
    # Of grouped convolutions peft adapts some ranks only.
    return isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)


def require_peft() -> Any:
    """Return peft. Raises UnsupportedModelError where it cannot be imported."""
    return library(
        "peft",
        "peft cannot be imported",
        f"attacks with lora_rank need it: {installing('peft')}",
    )
