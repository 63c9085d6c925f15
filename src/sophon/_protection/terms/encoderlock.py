"""A hindrance: few weights, those that restricted images need and original ones do not."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._models import encoder_weights
from sophon._protection.attackers import below
from sophon._protection.batched import Batch, Judged
from sophon._protection.probe import ProbingHindrance, ProbingSpec
from sophon._protection.term import State, Surroundings
from sophon._specs.base import Fraction, Positive, Rate

_LEAST = 1e-8


class EncoderLockSpec(ProbingSpec):
    """`kind = "encoderlock"`: a probe is to fail, by changing few weights of the encoder.

    Each `every` updates the share `fraction` of the encoder's weights is added to those that may
    change; all others, biases, normalisations and the head stay as they are given.
    """

    kind: Literal["encoderlock"] = "encoderlock"
    alpha: Rate = 1.0
    fraction: Fraction = 0.01
    every: Positive = 100


class EncoderLockTerm(ProbingHindrance[EncoderLockSpec]):
    """log(1 + alpha L_O / L_R), on weights with the largest |dL_R / dw| / (|dL_O / dw| + 1e-8).

    arXiv 2411.12508 (NDSS 2025), the supervised level. L_O is the model's cross-entropy on original
    images, L_R that of a probe on the head's input on restricted ones, which is trained against the
    encoder all along (self-challenging). Weights are those of more than one axis.

    Where it departs: the released code first picks layers and then weights in them, here all
    weights of the encoder compete; its probe is trained anew every round and kept if it is better,
    here it takes `probe_steps` an update.
    """

    spec_type = EncoderLockSpec
    reads_original = True

    def __init__(self, spec: EncoderLockSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.selected: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the probe's accuracy."""
        others, labels = self.original.batch(batch.turn)
        # One pass, so that normalisation sees both domains alike.
        outputs, features = self.passed(model, torch.cat([others, batch.images]))
        split = len(others)
        kept = F.cross_entropy(outputs[:split], labels)
        wrong, right = self.probe.loss(features[split:], batch, self.spec.probe_steps)
        if batch.turn % self.spec.every == 0:
            self._select(model, kept, wrong)
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = (self.spec.alpha * kept / wrong.clamp_min(_LEAST)).log1p()
        return loss, right, {"cross-entropy": wrong, "changed": self._share()}

    def _select(self, model: nn.Module, kept: Tensor, wrong: Tensor) -> None:
        """Add the weights with the largest ratio of gradients to those that may change."""
        weights = encoder_weights(model, self.around.setting.head)
        values = list(weights.values())
        needed = torch.autograd.grad(wrong, values, retain_graph=True)
        spared = torch.autograd.grad(kept, values, retain_graph=True)
        ratios = [a.abs() / (b.abs() + _LEAST) for a, b in zip(needed, spared, strict=True)]
        self.around.ranks.follow_first(ratios)
        flat = torch.cat([ratio.flatten() for ratio in ratios])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(math.ceil(self.spec.fraction * len(flat))).indices] = True
        for (name, value), part in zip(
            weights.items(), chosen.split([v.numel() for v in values]), strict=True
        ):
            new = part.view_as(value)
            self.selected[name] = self.selected[name] | new if name in self.selected else new

    def _share(self) -> Tensor:
        masks = torch.cat([mask.flatten() for mask in self.selected.values()])
        return masks.float().mean()

    @torch.no_grad()
    def constrain(self, model: nn.Module) -> None:
        """Put every weight but the selected ones back."""
        for name, parameter in model.named_parameters():
            given = self.before[name]
            free = self.selected.get(name)
            parameter.copy_(given if free is None else torch.where(free, parameter, given))

    def state(self) -> State:
        """Return the turns, the probe, and which weights may change."""
        tensors, meta = super().state()
        return tensors | {f"selected/{n}": mask for n, mask in self.selected.items()}, meta

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        super().restore(model, tensors, meta)
        self.selected = below(tensors, "selected/")

    @classmethod
    def state_copies(cls, spec: EncoderLockSpec) -> int:
        """Return 1: the masks, which are smaller than weights."""
        return 1

    @classmethod
    def held_bytes(cls, spec: EncoderLockSpec, weights: int) -> int:
        """Return the bytes of the masks and of the weights before a step."""
        return 2 * weights
