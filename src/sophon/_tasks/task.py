"""What the engine needs to know of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sophon._data import IMAGENET_MEAN, IMAGENET_STD, Domain
from sophon._models import Shape, expected_channels, run_probe

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class Task(Protocol):
    """How a model is run on a batch, what it is trained on and how it is scored.

    Three methods and a name; the rest has a default that suits a classifier. `metric` names how
    scores are kept and shown (`_metric_kinds`), `normalisation` is the (mean, std) of images of
    domains that give none.
    """

    metric: Literal["accuracy", "mse"] = "accuracy"
    normalisation: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)

    @property
    def name(self) -> str:
        """What determines a result, besides model, images and strategy."""
        ...

    @property
    def parts(self) -> Sequence[Task]:
        """The tasks whose mean score is an evaluation's: a pass over the images for each."""
        return (self,)

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Run `model`; return its outputs and the targets they are held against, batch first.

        A task that draws noise or timesteps draws them from `generator`.
        """
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the task loss of each image, shape (batch,)."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the performance on each image, shape (batch,); higher is better."""
        ...

    def classes(self, domain: Domain) -> int | None:
        """Return how many outputs the head needs for `domain`; None leaves it as it is."""
        return domain.class_count

    def channels(self, model: nn.Module) -> int | None:
        """Return the channels of the images that feed `model`, or None where any may."""
        return expected_channels(model)

    def shape(self, image_shape: Shape) -> Shape:
        """Return the shape in which `model` meets images of `image_shape`."""
        return image_shape

    def check(self, model: nn.Module, domain: Domain, shape: Shape, *, trained: bool) -> None:
        """Raise DataError or UnsupportedModelError unless `model` fits images of `shape`.

        Where it is to be `trained` for its publisher it must run in train mode too.
        """
        run_probe(model, self.shape(shape), what=f"domain {domain.name!r}", training=trained)
