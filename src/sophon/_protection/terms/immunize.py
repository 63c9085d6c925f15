"""A hindrance: a large condition number of restricted features, a small one of original ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged
from sophon._specs.base import NonNegative

_LEAST = 1e-12


class ImmunizeSpec(BatchSpec):
    """`kind = "immunize"`: gradient descent on a new head is to be slow on restricted features.

    `ill` weighs the regulariser of restricted features, `well` that of original ones.
    """

    kind: Literal["immunize"] = "immunize"
    ill: NonNegative = 10.0
    well: NonNegative = 1e-3


class ImmunizeTerm(BatchHindrance[ImmunizeSpec]):
    """ill / (|s_R|^2 / 2k - min(s_R)^2 / 2) + well (max(s_O)^2 / 2 - |s_O|^2 / 2k).

    arXiv 2505.23760, R_ill and R_well. s (k,) are the k largest eigenvalues of the second moment
    phi^T phi / n of features phi (n images, features) at the head's input, the Hessian of a linear
    probe's squared error; k is the smaller of both numbers.

    Where it departs: eigenvalues are divided by their mean, as a condition number has no scale and
    both regularisers have one, which growing features would exploit. The paper's weights are for
    its own scales, and its preconditioned steps on an added linear layer are left out.
    """

    spec_type = ImmunizeSpec
    reads_original = True

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the inverse condition number of restricted features."""
        others, _ = self.original.batch(batch.turn)
        # One pass, so that normalisation sees both domains alike.
        _, features = self.passed(model, torch.cat([others, batch.images]))
        split = len(others)
        original, restricted = eigenvalues(features[:split]), eigenvalues(features[split:])
        spread = (restricted.square().mean() - restricted.min().square()) / 2
        ill = 1 / spread.clamp_min(_LEAST)
        well = (original.max().square() - original.square().mean()) / 2
        loss = self.spec.ill * ill + self.spec.well * well
        readings = {"ill": ill, "well": well}
        return loss.float(), (restricted.min() / restricted.max()).float(), readings


def eigenvalues(features: Tensor) -> Tensor:
    """Return those of the second moment of features (n, d), min(n, d) of them in float64, divided
    by their mean.
    """
    phi = features.double()
    phi = phi if phi.shape[0] >= phi.shape[1] else phi.T
    found: Tensor = torch.linalg.eigvalsh(phi.T @ phi)
    return found / found.mean().clamp_min(_LEAST)
