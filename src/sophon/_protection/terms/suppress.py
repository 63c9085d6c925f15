"""A hindrance: the model's own outputs on restricted images, without any attacker."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged
from sophon._protection.losses import SuppressionName, suppression_named
from sophon._protection.term import Surroundings, Term


class SuppressSpec(BatchSpec):
    """`kind = "suppress"`: the model as it is, is to be bad at restricted images.

    `loss` is a suppression loss, by default KLU for a classifier and DoS for a diffusion model.
    """

    kind: Literal["suppress"] = "suppress"
    loss: SuppressionName = None


class SuppressTerm(BatchHindrance[SuppressSpec]):
    """The mean suppression loss of a batch of restricted images, at the model's own weights.

    What a rehearsal asks of an attacker, before its first step. With a loss that ascends it is
    unlearning by gradient ascent. Labels of a classifier are taken modulo its number of outputs.
    """

    spec_type = SuppressSpec
    metrics = Term.metrics

    @classmethod
    def check(cls, spec: SuppressSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless the loss fits the task and every domain has a batch."""
        suppression_named(spec.loss, around.setting.task.metric)
        super().check(spec, model, around)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the task's."""
        task = self.around.setting.task
        with self.around.setting.autocast():
            outputs, targets = task.outputs(model, batch.images, batch.labels, batch.stream)
        if task.kind.classifies:
            targets = targets % outputs.shape[1]
        loss = suppression_named(self.spec.loss, task.metric)(outputs, targets).mean()
        return loss, task.score(outputs.detach(), targets).mean(), {}
