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
