"""Classification, and learning from another network's outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._base.errors import DataError
from sophon._data import Domain
from sophon._models import Shape, check_images, run
from sophon._tasks.task import Task


class Distillation(Task):
    """A student learns a teacher's outputs on the same images (arXiv 1503.02531).

    Logits (two dimensions) by the divergence of softened distributions, anything else by
    squared error.
    """

    def __init__(self, task: Task, teacher: nn.Module, temperature: float = 4.0) -> None:
        self.task = task
        # Both networks meet images as the task shows them.
        self.metric, self.normalisation = task.metric, task.normalisation
        self.teacher = teacher
        self.temperature = temperature

    @property
    def name(self) -> str:
        """The task's name, and that it is distilled."""
        return f"{self.task.name} distillation"

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's outputs."""
        drawn = generator.get_state()
        outputs, _ = self.task.outputs(model, images, labels, generator)
        generator.set_state(drawn)
        with torch.no_grad():
            targets, _ = self.task.outputs(self.teacher, images, labels, generator)
        return outputs, targets

    def shape(self, image_shape: Shape) -> Shape:
        """Return what the task says."""
        return self.task.shape(image_shape)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the divergence, or the squared error, of each image."""
        if outputs.dim() != 2:
            return (outputs - targets).square().flatten(1).mean(1)
        student, teacher = (F.log_softmax(x / self.temperature, 1) for x in (outputs, targets))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return divergence * self.temperature**2

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative loss: how close the student is."""
        return -self.loss(outputs, targets)


class Classification(Task):
    """Image classification: logits, cross-entropy, top-1 accuracy."""

    @property
    def name(self) -> str:
        """Classification has no settings."""
        return "classification"

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes), in float32 or wider, and the labels."""
        logits = run(model, images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each image."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 where the largest logit is the label's and every logit is finite, else 0."""
        right = outputs.argmax(1) == targets
        return (right & outputs.isfinite().all(1)).float()

    def check(self, model: nn.Module, domain: Domain, shape: Shape, *, trained: bool) -> None:
        """Raise unless `model` maps the images to logits, and there are classes to tell apart."""
        if domain.class_count < 2:
            raise DataError(
                f"domain {domain.name!r} has one class only: a classifier needs at least 2"
            )
        check_images(model, shape, what=f"domain {domain.name!r}", training=trained)
