"""Tasks: how a model is run on a batch, what it is trained on and how it is scored."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Task(Protocol):
    """What the one fine-tuning loop needs to know of a task; three methods and a name."""

    name: str

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


class Distillation:
    """A student learns a teacher's outputs on the same images (arXiv 1503.02531).

    Logits (two dimensions) by the divergence of softened distributions, anything else by
    squared error.
    """

    def __init__(self, task: Task, teacher: nn.Module, temperature: float = 4.0) -> None:
        self.name = f"{task.name} distillation"
        self.task = task
        self.teacher = teacher
        self.temperature = temperature

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


class Classification:
    """Image classification: logits, cross-entropy, top-1 accuracy."""

    name = "classification"

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return logits (batch, classes), in float32 or wider, and the labels."""
        del generator
        logits: Tensor = model(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each image."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 where the largest logit is the label's and every logit is finite, else 0."""
        right = outputs.argmax(1) == targets
        return (right & outputs.isfinite().all(1)).float()
