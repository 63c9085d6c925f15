"""How good a diffusion model's pictures are: KID, FID, precision and recall."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sophon._auditing.extractors import Extractor, torchmetrics
from sophon._base.errors import DataError, SpecError
from sophon._base.seeding import seeded
from sophon._data import Domain
from sophon._specs import SampleSpec

_KID_SUBSETS = 50


class Quality(NamedTuple):
    """Distances from real images, lower is better, and shares in [0, 1], higher is better.

    `kid` is the kernel distance (arXiv 1801.01401), a mean over subsets, with its standard
    deviation; `fid` the Frechet distance (arXiv 1706.08500). `precision` is the share of samples
    that lie among the real images, `recall` of real images that lie among the samples
    (arXiv 1904.06991).
    """

    kid: float
    kid_std: float
    fid: float
    precision: float
    recall: float


def check_quality(spec: SampleSpec, domains: Iterable[Domain]) -> None:
    """Raise SpecError or DataError unless there are enough samples and images for KID."""
    torchmetrics("torchmetrics")
    # Of less than half the spread over subsets is that of the whole estimate, or more; larger
    # subsets are all alike, and a verdict would rest on no spread.
    needed = max(2 * spec.kid_subset, spec.neighbours + 2)
    if spec.count < needed:
        raise SpecError(
            f"audit.samples.count = {spec.count}: at least {needed} samples are needed; KID"
            f" compares subsets of {spec.kid_subset} (audit.samples.kid_subset), and how sure it is"
            f" shows in twice as many; precision looks at {spec.neighbours} neighbours"
            " (audit.samples.neighbours)"
        )
    for domain in domains:
        have = len(domain.test)
        if have < needed:
            raise DataError(
                f"domain {domain.name!r} has {have} test images, too few for KID: at least"
                f" {needed} are needed; give more, raise test, or lower audit.samples.kid_subset"
            )


def measure_quality(
    samples: Tensor, images: Tensor, extractor: Extractor, spec: SampleSpec
) -> Quality:
    """Return how far uint8 `samples` (n, c, h, w) are from real `images`, as the extractor sees."""
    fake, real = extractor.features(samples), extractor.features(images)
    with warnings.catch_warnings(), seeded(0, "kid"):
        warnings.simplefilter("ignore")
        kid = torchmetrics("torchmetrics.image.kid").KernelInceptionDistance(
            feature=_Given(extractor.width), subsets=_KID_SUBSETS, subset_size=spec.kid_subset
        )
        fid = torchmetrics("torchmetrics.image.fid").FrechetInceptionDistance(
            feature=_Given(extractor.width)
        )
        for metric in (kid, fid):
            metric.update(real, real=True)
            metric.update(fake, real=False)
        mean, std = (float(value) for value in kid.compute())
        distance = float(fid.compute())
    return Quality(
        kid=mean,
        kid_std=std,
        fid=distance,
        precision=_among(fake, real, spec.neighbours),
        recall=_among(real, fake, spec.neighbours),
    )


class _Given(nn.Module):
    """Passes features through: they were extracted before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


def _among(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Return the share of `points` within a ball around a point of `manifold` that reaches to its
    k-th nearest neighbour (arXiv 1904.06991).
    """
    radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
    inside = torch.cdist(points, manifold) <= radii
    return float(inside.any(1).float().mean())
