"""A keep term: what the model as it was given says of original images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sophon._protection.term import Keep, Surroundings, TermSpec
from sophon._specs.base import Rate
from sophon._tasks import Distillation


class DistilSpec(TermSpec):
    """`kind = "distil"`: distillation from the model as given, weighed by `weight`.

    `temperature` softens a classifier's distributions; other outputs are compared as they are.
    """

    kind: Literal["distil"] = "distil"
    temperature: Rate = 2.0


class DistilTerm(Keep[DistilSpec]):
    """T^2 KL(softmax(z_given / T) || softmax(z / T)), the mean over a batch of original images; for
    outputs that are no logits their mean squared difference (arXiv 1503.02531).

    The model as given runs in eval mode, on the same images and the same draws of the task.
    """

    spec_type = DistilSpec

    def __init__(self, spec: DistilSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.lesson = Distillation(around.setting.task, around.given, spec.temperature)

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
