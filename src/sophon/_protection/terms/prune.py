"""A hindrance: pruning what restricted images need, by ADMM."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._models import encoder_weights
from sophon._protection.attackers import below
from sophon._protection.batched import Batch, Judged
from sophon._protection.probe import ProbingHindrance, ProbingSpec
from sophon._protection.term import State, Surroundings
from sophon._specs.base import Fraction, NonNegative, Positive, Rate

_LEAST = 1e-12


class PruneSpec(ProbingSpec):
    """`kind = "prune"`: a share `sparsity` of the encoder's weights becomes zero, where it hurts
    restricted images.

    It grows evenly over `ramp` updates, by a step each `every`. `alpha` weighs the probe's loss, up
    to `cap`; `fisher` how far restricted classes stand apart; `rho` what pulls weights to the
    sparse ones.
    """

    kind: Literal["prune"] = "prune"
    alpha: NonNegative = 1.0
    cap: Rate = 10.0
    fisher: NonNegative = 1.0
    rho: NonNegative = 1e-3
    sparsity: Fraction = 0.5
    ramp: Positive = 1000
    every: Positive = 50


class PruneTerm(ProbingHindrance[PruneSpec]):
    """-alpha min(cap, L_R) + fisher B / W + rho / 2 sum |w - z + u|^2, each w zero once its z is.

    arXiv 2410.08015. L_R is a probe's cross-entropy on the head's input phi of restricted images; B
    is the mean square of the class means of phi about their mean, W that of phi about its class's
    mean. Each `every` updates z is w + u shrunk towards zero by a threshold, and u becomes w + u -
    z. An attacker who trains all weights makes the network dense again.

    Loss and cap are the released code's. Where it departs: the threshold is set layer by layer to
    meet `sparsity`, instead of an l1 weight that leaves it open; a probe that is trained along
    replaces a second classifier.
    """

    spec_type = PruneSpec

    def __init__(self, spec: PruneSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.masks: dict[str, Tensor] = {}
        self.duals: dict[str, Tensor] = {}
        # z - u, what weights are pulled to.
        self.targets: dict[str, Tensor] = {}

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the probe's accuracy."""
        spec = self.spec
        weights = encoder_weights(model, self.around.setting.head)
        if batch.turn % spec.every == 0:
            self._project(weights, spec.sparsity * min(1.0, batch.turn / spec.ramp))
        _, features = self.passed(model, batch.images)
        wrong, right = self.probe.loss(features, batch, spec.probe_steps)
        apart = fisher_ratio(features, batch.labels, batch.domain.class_count)
        far = [(weight - self.targets[name]).square().sum() for name, weight in weights.items()]
        loss = spec.fisher * apart - spec.alpha * wrong.clamp_max(spec.cap)
        loss = loss + spec.rho / 2 * torch.stack(far).sum()
        kept = torch.cat([mask.flatten() for mask in self.masks.values()]).float().mean()
        return loss, right, {"cross-entropy": wrong, "Fisher ratio": apart, "sparsity": 1 - kept}

    @torch.no_grad()
    def _project(self, weights: dict[str, nn.Parameter], share: float) -> None:
        """Set z, u and the masks of every weight, a `share` of each layer's being zero."""
        for name, weight in weights.items():
            moved = weight + self.duals[name] if name in self.duals else weight.clone()
            count = int(share * moved.numel())
            least = moved.abs().flatten().kthvalue(count).values if count else moved.new_zeros(())
            dual = moved.clamp(-least, least)
            sparse = moved - dual
            # What is zero stays zero.
            mask = sparse != 0
            mask = mask & self.masks[name] if name in self.masks else mask
            self.masks[name], self.duals[name] = mask, dual
            self.targets[name] = sparse * mask - dual

    @torch.no_grad()
    def constrain(self, model: nn.Module) -> None:
        """Make the pruned weights zero."""
        for name, mask in self.masks.items():
            model.get_parameter(name).mul_(mask)

    def state(self) -> State:
        """Return the turns, the probe, masks, u and z - u."""
        tensors, meta = super().state()
        for part, values in self._parts().items():
            tensors |= {f"{part}/{name}": value for name, value in values.items()}
        return tensors, meta

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        super().restore(model, tensors, meta)
        for part, values in self._parts().items():
            values.update(below(tensors, f"{part}/"))

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": self.masks, "duals": self.duals, "targets": self.targets}

    @classmethod
    def state_copies(cls, spec: PruneSpec) -> int:
        """Return 3: masks, u and z - u."""
        return 3

    @classmethod
    def held_bytes(cls, spec: PruneSpec, weights: int) -> int:
        """Return the bytes of the same."""
        return 3 * weights


def fisher_ratio(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return between-class over within-class mean square of features (images, features)."""
    members = F.one_hot(labels, classes).to(features)
    members = members[:, members.any(0)]
    means = members.T @ features / members.sum(0)[:, None]
    between = (means - means.mean(0)).square().mean()
    within = (features - members @ means).square().mean()
    return between / within.clamp_min(_LEAST)
