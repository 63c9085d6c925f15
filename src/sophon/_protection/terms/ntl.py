"""A hindrance: non-transferable learning, target-specified."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged
from sophon._protection.discrepancy import mmd
from sophon._specs.base import Rate


class NTLSpec(BatchSpec):
    """`kind = "ntl"`: restricted images are to be misclassified and to lie apart from the
    original ones.

    The classification loss is scaled by `alpha`, the distance of features by `distance_alpha`;
    each is worth no more than its `beta`.
    """

    kind: Literal["ntl"] = "ntl"
    alpha: Rate = 0.1
    beta: Rate = 10.0
    distance_alpha: Rate = 0.1
    distance_beta: Rate = 1.0


class NTLTerm(BatchHindrance[NTLSpec]):
    """-min(beta, alpha L_R L_dis), L_dis = min(beta', alpha' MMD^2(phi(x_O), phi(x_R))).

    arXiv 2106.06916 (ICLR 2022). L_R is the cross-entropy of restricted images, which
    is the paper's KL from one-hot labels; phi (images, features) is what goes into the head; MMD
    has five Gaussian widths.

    Where it departs: the paper's two domains share their classes. Here restricted labels are taken
    modulo the head's number of classes, so with as many or fewer each has an output of its own. The
    given model never learnt that pairing: L_R starts high, and MMD has most of the work. Public
    code caps alpha L_R rather than the product, and averages L_R over ten classes as well: its cap
    of 1 is one of 10 here.
    """

    spec_type = NTLSpec
    reads_original = True

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the accuracy on restricted labels."""
        others, _ = self.original.batch(batch.turn)
        # One pass, so that normalisation sees both domains alike.
        outputs, features = self.passed(model, torch.cat([others, batch.images]))
        split = len(others)
        labels = batch.labels % outputs.shape[1]
        wrong = F.cross_entropy(outputs[split:], labels)
        apart = mmd(features[:split], features[split:])
        loss = self.hindered(wrong, apart)
        score = self.around.setting.task.score(outputs[split:].detach(), labels).mean()
        return loss, score, {"cross-entropy": wrong, "MMD": apart}

    def hindered(self, wrong: Tensor, apart: Tensor) -> Tensor:
        """Return the loss of a cross-entropy and a squared MMD, both scalars."""
        spec = self.spec
        distance = (spec.distance_alpha * apart).clamp_max(spec.distance_beta)
        return -(spec.alpha * wrong * distance).clamp_max(spec.beta)
