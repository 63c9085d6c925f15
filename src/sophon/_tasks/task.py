"""What the engine needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sophon._base.errors import SpecError
from sophon._data import IMAGENET_MEAN, IMAGENET_STD, Domain
from sophon._models import (
    TRANSFORMERS,
    Shape,
    expected_channels,
    of_transformers,
    run_probe,
    write_classifier,
)
from sophon._records.audit_record import ErrorScore, Measurement, Score
from sophon._records.metrics import KINDS, MetricKind
from sophon._specs import ModelSpec

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class Task(Protocol):
    """How a model is run on a batch, what it is trained on and how it is scored.

    Three methods and a name; the rest has a default that suits a classifier. `metric` names how
    scores are kept and shown (`KINDS`), `normalisation` is the (mean, std) of images of domains
    that give none, `ema_decay` what pre-training averages weights with unless it is told (0: not).
    """

    metric: Literal["accuracy", "mse"] = "accuracy"
    normalisation: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)
    ema_decay: float = 0.0

    @property
    def name(self) -> str:
        """What determines a result, besides model, images and strategy."""
        ...

    @property
    def kind(self) -> MetricKind:
        """What its scores mean, what guessing gives, and how they are shown."""
        return KINDS[self.metric]

    @property
    def parts(self) -> Sequence[Task]:
        """The tasks whose mean score is an evaluation's: a pass over the images for each."""
        return (self,)

    @property
    def draws(self) -> bool:
        """Whether its models draw pictures that an audit can judge."""
        return False

    def sampler(self, steps: int) -> Any:
        """Return what draws pictures in so many steps; its `config` says how."""
        raise SpecError(f"the models of {self.name} draw no pictures")

    def draw(self, model: nn.Module, shape: Shape, labels: Tensor, *, steps: int) -> Tensor:
        """Return uint8 images of `shape`, one for each label; other models begin alike."""
        raise SpecError(f"the models of {self.name} draw no pictures")

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

    def measure(self, scores: Tensor) -> Measurement:
        """Return what the scores of images, (parts, images), come to."""
        return MEASURES[self.metric](scores)

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

    def check_shipped(self, model: nn.Module, domain: Domain, shape: Shape) -> None:
        """Raise DataError unless a pipeline of `model` would make images of `shape`."""
        del model, domain, shape

    def require_alike(self, scheduler: Any, folder: Path) -> None:
        """Raise SpecError if a model in `folder` with that scheduler predicts something else."""
        del scheduler, folder

    def described(self, spec: ModelSpec | None, model: nn.Module) -> ModelSpec | None:
        """Return the network that the folder of the shipped `model` names, given as `spec`: one of
        transformers is in that folder itself.
        """
        if not of_transformers(model):
            return spec
        given = spec or ModelSpec(name=TRANSFORMERS)
        return given.model_copy(update={"name": f"{TRANSFORMERS}.", "weights": None})

    def complete(self, folder: Path, model: nn.Module) -> None:
        """Write what the library of `model` needs beside the shipped weights in `folder`."""
        if of_transformers(model):
            write_classifier(folder, model)


def _correct(scores: Tensor) -> Score:
    """Return how many images are right, from one part's scores of 0 and 1."""
    return Score(correct=int(scores.sum().item()), total=scores.shape[1])


def _squared_error(scores: Tensor) -> ErrorScore:
    """Return the mean error of images, each averaged over the parts, and of each part."""
    errors = 1 - scores.double()
    images = errors.mean(0)
    return ErrorScore(
        mse=float(images.mean()),
        variance=float(images.var(correction=0)),
        total=len(images),
        quarters=tuple(errors.mean(1).tolist()) if len(errors) > 1 else (),
    )


MEASURES: dict[str, Callable[[Tensor], Measurement]] = {"accuracy": _correct, "mse": _squared_error}
