# ruff: noqa: F401
# mypy: implicit-reexport
"""Domains: images in memory, fixed splits, sources, batches for a model."""

from sophon._data.batches import batch, check_channels, fitted
from sophon._data.checks import check_apart, check_batch_fits, check_distinct
from sophon._data.domain import IMAGENET_MEAN, IMAGENET_STD, Domain, resolve_normalisation, several
from sophon._data.images import Images
from sophon._data.loading import SOURCES, load_domain
from sophon._data.overlaps import overlaps_of
from sophon._data.sources.prompts import share_prompts
