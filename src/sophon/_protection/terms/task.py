"""The keep term of the paper: the task's own loss on original images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sophon._protection.term import Keep, TermSpec


class TaskLossSpec(TermSpec):
    """`kind = "task"`: the task's own loss, weighed by `weight`."""

    kind: Literal["task"] = "task"


class TaskTerm(Keep[TaskLossSpec]):
    """The mean task loss of a batch of original images: cross-entropy, or squared error.

    The reinforcement of arXiv 2404.12699, algorithm 1. `outputs` (batch, ...), `targets` as the
    task gives them.
    """

    spec_type = TaskLossSpec

    def loss(
        self, outputs: Tensor, targets: Tensor, images: Tensor, labels: Tensor, drawn: Tensor
    ) -> Tensor:
        """Return the mean loss of the batch."""
        return self.around.setting.task.loss(outputs, targets).mean()
