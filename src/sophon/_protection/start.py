"""The weights that a protection begins with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sophon._models import reinitialise, shrink_towards
from sophon._protection.spec import ProtectSpec


@torch.no_grad()
def starting_weights(model: nn.Module, spec: ProtectSpec) -> nn.Module:
    """Return a trainable copy of `model` with the weights that `spec.start` says.

    `"shrunk"` is (1 - shrink) given + shrink fresh for matrices and filters, each fresh one at the
    given one's norm; scales, shifts and statistics stay (what stays of given weights comes back:
    arXiv 2506.06278). `"fresh"` is a fresh network. Raises UnsupportedModelError where no reset
    reaches a parameter.
    """
    start = copy.deepcopy(model).requires_grad_(True)
    if spec.start == "given":
        return start
    fresh = copy.deepcopy(model)
    kept = "set protect.start = 'given'"
    reinitialise(fresh, seed=spec.seed, names=("start",), otherwise=kept)
    if spec.start == "fresh":
        return fresh.requires_grad_(True)
    shrink_towards(start, fresh, spec.shrink or 0.0)
    return start
