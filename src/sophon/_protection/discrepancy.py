"""The maximum mean discrepancy between two sets of features, by Gaussian kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the kernels' widths, relative to the mean squared distance.
_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def mmd(first: Tensor, second: Tensor) -> Tensor:
    """Return MMD^2 of `first` (m, features) and `second` (n, features), a scalar of 0 or more.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) with k(a, b) = sum over widths w of
    exp(-|a - b|^2 / (w d)), where d is the mean squared distance of different rows of both sets,
    through which no gradient passes (DAN, arXiv 1502.02791, with equal weights).
    """
    both = torch.cat([first, second]).float()
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(0)
    count = len(both)
    scale = (distances.detach().sum() / (count * (count - 1))).clamp_min(1e-12)
    kernel = torch.stack([torch.exp(-distances / (width * scale)) for width in _WIDTHS]).sum(0)
    split = len(first)
    between = kernel[:split, split:].mean()
    return kernel[:split, :split].mean() + kernel[split:, split:].mean() - 2 * between
