"""What closed-form readers find, written out in float64: an oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sophon._data import Domain


def plain_r2(features: Tensor, labels: Tensor, classes: int, kind: str, penalty: float) -> Tensor:
    """Return R2 on the second half of ridge regression on the first, image by image."""
    return plain_r2_of(features, torch.eye(classes, dtype=torch.float64)[labels], penalty, kind)


def plain_r2_of(features: Tensor, targets: Tensor, penalty: float, kind: str = "linear") -> Tensor:
    """Return the same of any `targets` (images, values)."""
    half = len(features) // 2
    support, query = features[:half].double(), features[half:].double()
    mean = targets[:half].mean(0)
    wanted = targets[half:] - mean
    said = ORACLES[kind](support, query, targets[:half] - mean, half * penalty)
    return 1 - (wanted - said).square().sum() / wanted.square().sum()


def _primal(support: Tensor, query: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return what weights of the features say; with K = S S^T / width they are ridged as much."""
    width = support.shape[1]
    gram = support.T @ support + ridge * width * torch.eye(width, dtype=torch.float64)
    return query @ torch.linalg.solve(gram, support.T @ targets)


def _gaussian(support: Tensor, query: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return the mean of a Gaussian process."""
    kernel = torch.stack([_row(x, support) for x in support])
    weights = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=torch.float64))
    return torch.stack([_row(x, support) for x in query]) @ (weights @ targets)


# What each kind of reader says of the query, (query, classes), of what it was told of the support.
ORACLES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "linear": _primal,
    "kernel": _gaussian,
}


def _row(image: Tensor, support: Tensor) -> Tensor:
    return torch.exp(-(support - image).square().sum(1) / (2 * support.shape[1]))


def plain_standardised(features: Tensor, clip: float) -> Tensor:
    """Return every feature less its mean, over its deviation, cut."""
    held = features.double()
    deviation = held.var(0, unbiased=False).sqrt()
    return ((held - held.mean(0)) / deviation).clamp(-clip, clip)


def plain_components(domain: Domain, images: Tensor, side: int, count: int) -> Tensor:
    """Return components (images, components) of small images along the first principal directions
    of the training images of `domain`.
    """
    pixels = domain.train.pixels.double() / 127.5 - 1

    def small(whole: Tensor) -> Tensor:
        return F.avg_pool2d(whole.double(), whole.shape[-1] // side).flatten(1)

    known = small(pixels)
    _, vectors = torch.linalg.eigh(torch.cov(known.T))
    return (small(images) - known.mean(0)) @ vectors.flip(1)[:, :count]
