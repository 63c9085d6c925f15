"""A keep term: what the model as it was given says of original images."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sophon._base.seeding import generator, seeded
from sophon._base.spans import spanned
from sophon._data import check_batch_fits
from sophon._protection.term import Keep, Surroundings, TermSpec
from sophon._specs.base import Augmentation, Rate
from sophon._tasks import Distillation


class DistilSpec(TermSpec):
    """`kind = "distil"`: distillation from the model as given, weighed by `weight`.

    `temperature` softens a classifier's distributions; other outputs are compared as they are.
    `mixed` more original images a step, augmented as `augmentation` says, are each mixed with
    another at a random share: what the model as given says between images is kept, too, so that the
    images learnt from are not all there is (arXiv 2106.05237).
    """

    kind: Literal["distil"] = "distil"
    temperature: Rate = 2.0
    mixed: Annotated[int, Field(ge=0)] = 0
    augmentation: Augmentation = "none"


class DistilTerm(Keep[DistilSpec]):
    """T^2 KL(softmax(z_given / T) || softmax(z / T)), the mean over a batch of original images; for
    outputs that are no logits their mean squared difference (arXiv 1503.02531).

    The model as given runs in eval mode, on the same images and the same draws of the task.
    """

    spec_type = DistilSpec

    def __init__(self, spec: DistilSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.lesson = Distillation(around.setting.task, around.given, spec.temperature)
        original = around.setting.original
        self.feed = around.setting.feed(
            original,
            original.train,
            batch_size=spec.mixed or 1,
            stream=(around.seed, ("mixed",)),
            augmentation=spec.augmentation,
        )

    @classmethod
    def check(cls, spec: DistilSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless there are as many original images as are mixed."""
        check_batch_fits(around.setting.original, spec.mixed, "protect.keep: distil's mixed")

    def loss(
        self, outputs: Tensor, targets: Tensor, images: Tensor, labels: Tensor, drawn: Tensor
    ) -> Tensor:
        """Return the mean divergence from the given model's outputs on the batch."""
        stream = torch.Generator()
        stream.set_state(drawn)
        setting = self.around.setting
        with torch.no_grad(), setting.autocast():
            wanted, _ = setting.task.outputs(self.around.given, images, labels, stream)
        return self.lesson.loss(outputs, wanted).mean()

    @spanned("mixed")
    def besides(self, model: nn.Module, step: int, factor: float) -> Tensor | None:
        """Add the gradient of the divergence on mixed images."""
        around, names = self.around, ("mixed", step)
        if not self.spec.mixed:
            return None
        images, labels = self.feed.batch(step)
        stream = generator(around.seed, *names)
        shares = torch.rand(len(images), 1, 1, 1, generator=stream).to(images)
        others = torch.randperm(len(images), generator=stream).to(labels.device)
        images = shares * images + (1 - shares) * images[others]
        with seeded(around.seed, *names), around.setting.autocast():
            outputs, wanted = self.lesson.outputs(model, images, labels, stream)
        loss = self.lesson.loss(outputs, wanted).mean()
        (factor * loss).backward()
        return loss.detach()
