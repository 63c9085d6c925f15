"""Suppression losses: what a rehearsed attacker's query loss is turned into.

Each is a pure function `(outputs, targets) -> Tensor` of shape (batch,), to be minimised. For
classification `outputs` are logits (batch, classes) and `targets` labels (batch,). All are
finite with finite gradients on logits up to 1e30 in size (float32) and up to 1000 classes. For
denoising both are (batch, channels, height, width): a prediction and what it should have been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from sophon._base.errors import SpecError

Suppression = Callable[[Tensor, Tensor], Tensor]


def inverse_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -log(1 - p_y): ICE as the paper defines it (arXiv 2404.12699, eq. 9).

    Gradient in the logits: p_y on the true class, -p_j p_y / (1 - p_y) elsewhere: bounded by 1,
    vanishing once p_y does.
    """
    logarithms = F.log_softmax(outputs, dim=1)
    index = targets.unsqueeze(1)
    true = logarithms.gather(1, index).squeeze(1)
    others = logarithms.scatter(1, index, -torch.inf).logsumexp(1)
    # Near p_y = 0 the sum of the others cancels; near p_y = 1 log1p overflows. Each half is exact.
    small = -torch.log1p(-true.exp().clamp(max=0.5))
    return torch.where(true.exp() < 0.5, small, -others)


def reversed_logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of the negated logits, what the released research code calls ICE.

    Its gradient does not vanish when the model is confidently wrong.
    """
    return F.cross_entropy(-outputs, targets, reduction="none")


def kl_from_uniform(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return KL(uniform || p) = -mean_j log(C p_j): KLU (arXiv 2404.12699, eq. 10).

    Gradient in the logits: p_j - 1/C. The targets are not used.
    """
    classes = outputs.shape[1]
    constant = torch.log(torch.tensor(float(classes), dtype=outputs.dtype, device=outputs.device))
    return -F.log_softmax(outputs, dim=1).mean(1) - constant


def negated_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return sum_j p_j log p_j: the tamper-resistance loss of TAR (arXiv 2408.00761).

    Gradient in the logits: p_j (log p_j + H), which vanishes where the model is certain, rightly or
    not. The targets are not used.
    """
    logarithms = F.log_softmax(outputs, dim=1)
    return (logarithms.exp() * logarithms).sum(1)


def negated_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -CE: plain ascent on the task loss, unbounded below.

    It diverges; kept as the ablation that motivates the others.
    """
    return -F.cross_entropy(outputs, targets, reduction="none")


def denial_of_service(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean square of the prediction: DoS (arXiv 2404.12699, eq. 11).

    Gradient: 2 / n of each of its n elements. A network that predicts nothing minimises it: bounded
    below, unlike ascent on the error. The targets are not used.
    """
    return outputs.square().flatten(1).mean(1)


def negated_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -MSE: plain ascent on the task loss, unbounded below.

    It diverges; kept as the ablation that motivates DoS, and as what IMMA and ResAlign ascend.
    """
    return -(outputs - targets).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Loss:
    """A suppression loss: the function, and the metric of the tasks whose outputs it turns."""

    function: Suppression
    metric: str


SUPPRESSIONS: dict[str, Loss] = {
    "ice": Loss(inverse_cross_entropy, "accuracy"),
    "reversed_logits": Loss(reversed_logits, "accuracy"),
    "klu": Loss(kl_from_uniform, "accuracy"),
    "negated_entropy": Loss(negated_entropy, "accuracy"),
    "negated_ce": Loss(negated_cross_entropy, "accuracy"),
    "dos": Loss(denial_of_service, "mse"),
    "negated_mse": Loss(negated_squared_error, "mse"),
}


def _known(name: str | None) -> str | None:
    if name is not None and name not in SUPPRESSIONS:
        raise ValueError(f"use one of {', '.join(SUPPRESSIONS)}")
    return name


# A suppression loss in a specification; None: the usual one of the task.
SuppressionName = Annotated[str | None, AfterValidator(_known)]
# What a task has unless another is named, by its metric.
USUAL = {"accuracy": "klu", "mse": "dos"}


def suppression_named(name: str | None, metric: str) -> Suppression:
    """Return the loss of that name, or the usual one, for the task that `metric` scores.

    Raises SpecError that lists those that fit.
    """
    name = USUAL[metric] if name is None else name
    fitting = [key for key, loss in SUPPRESSIONS.items() if loss.metric == metric]
    if name not in fitting:
        raise SpecError(
            f"protect: loss = {name!r} does not fit this task: use one of {', '.join(fitting)}"
        )
    return SUPPRESSIONS[name].function
