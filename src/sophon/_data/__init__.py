"""Domains: images in memory, fixed splits, sources, batches for a model."""

from __future__ import annotations

from sophon._data.batches import batch, check_channels
from sophon._data.checks import check_batch_fits, check_distinct
from sophon._data.domain import IMAGENET_MEAN, IMAGENET_STD, Domain, resolve_normalisation
from sophon._data.images import Images
from sophon._data.loading import SOURCES, load_domain
from sophon._data.overlaps import overlaps_of
from sophon._data.sources.prompts import share_prompts

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOURCES",
    "Domain",
    "Images",
    "batch",
    "check_batch_fits",
    "check_channels",
    "check_distinct",
    "load_domain",
    "overlaps_of",
    "resolve_normalisation",
    "share_prompts",
]
