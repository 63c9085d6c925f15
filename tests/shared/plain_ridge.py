"""What closed-form readers find, written out in float64: an oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_r2(features: Tensor, labels: Tensor, classes: int, kind: str, penalty: float) -> Tensor:
    """Return R2 on the second half of ridge regression on the first, image by image.

    Of `kind` linear it is the primal solution; the kernel one is a Gaussian process's mean.
    """
    half = len(features) // 2
    support, query = features[:half].double(), features[half:].double()
    targets = torch.eye(classes, dtype=torch.float64)[labels]
    mean = targets[:half].mean(0)
    wanted = targets[half:] - mean
    width = features.shape[1]
    if kind == "linear":
        # With K = S S^T / width the primal penalty is half * penalty * width.
        gram = support.T @ support + half * penalty * width * torch.eye(width, dtype=torch.float64)
        said = query @ torch.linalg.solve(gram, support.T @ (targets[:half] - mean))
    else:
        kernel = torch.stack([_row(x, support) for x in support])
        ridge = kernel + half * penalty * torch.eye(half, dtype=torch.float64)
        weights = torch.linalg.inv(ridge) @ (targets[:half] - mean)
        said = torch.stack([_row(x, support) for x in query]) @ weights
    return 1 - (wanted - said).square().sum() / wanted.square().sum()


def _row(image: Tensor, support: Tensor) -> Tensor:
    return torch.exp(-(support - image).square().sum(1) / (2 * support.shape[1]))


def plain_standardised(features: Tensor, clip: float) -> Tensor:
    """Return every feature less its mean, over its deviation, cut."""
    held = features.double()
    deviation = held.var(0, unbiased=False).sqrt()
    return ((held - held.mean(0)) / deviation).clamp(-clip, clip)
