"""A hindrance: a compact un-transferable isolation domain around the original one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._models import run
from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged
from sophon._protection.readers import Reading, ReadingSpec
from sophon._protection.term import Surroundings
from sophon._specs.base import Rate


class CUTISpec(BatchSpec):
    """`kind = "cuti"`: restricted images are to be misclassified, also in the style of original
    ones. The classification loss is scaled by `alpha`, and is worth no more than `beta`.
    """

    kind: Literal["cuti"] = "cuti"
    alpha: Rate = 0.1
    beta: Rate = 10.0


class CUTITerm(BatchHindrance[CUTISpec]):
    """-min(beta, alpha L_R); in every second update restricted maps h at each depth become
    h sigmoid(A std_O) + sigmoid(B mean_O).

    "Model Barrier" (CVPR 2023). L_R is the cross-entropy of restricted images; std_O and mean_O
    (images, channels) are over the positions of an original image's map at the same depth; A and B
    (channels, channels) are drawn anew for each depth and update, as in public code.

    Where it departs: restricted labels are taken modulo the head's number of classes, since the
    paper's domains share their classes; its KL from one-hot labels is the cross-entropy. Public
    code averages it over ten classes as well, so its cap of 1 is one of 10 here.
    """

    spec_type = CUTISpec
    reads_original = True

    def __init__(self, spec: CUTISpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.places = Reading(ReadingSpec(), around).depths

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the accuracy on restricted labels."""
        others, _ = self.original.batch(batch.turn)
        styled = self._styled(model, batch.stream) if batch.turn % 2 else ExitStack()
        with styled, self.around.setting.autocast():
            # One pass, so that normalisation sees both domains alike.
            outputs = run(model, torch.cat([others, batch.images])).float()[len(others) :]
        labels = batch.labels % outputs.shape[1]
        wrong = F.cross_entropy(outputs, labels)
        loss = -(self.spec.alpha * wrong).clamp_max(self.spec.beta)
        score = self.around.setting.task.score(outputs.detach(), labels).mean()
        return loss, score, {"cross-entropy": wrong}

    @contextmanager
    def _styled(self, model: nn.Module, stream: torch.Generator) -> Iterator[None]:
        """Hold the model so that the second half of a batch takes the style of the first."""
        handles = [
            place.change(model, partial(in_style, stream=stream, last=place.last))
            for place in self.places.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def in_style(value: Tensor, stream: torch.Generator, *, last: bool = False) -> Tensor:
    """Return maps or tokens whose second half has the style of the first.

    Maps (images, channels, height, width), or with channels `last`; tokens (images, tokens,
    channels). What has no positions stays.
    """
    if value.dim() < 3:
        return value
    channel = 1 if value.dim() == 4 and not last else value.dim() - 1
    positions = [axis for axis in range(1, value.dim()) if axis != channel]
    first, second = value.chunk(2)
    spread, mean = torch.var_mean(first, positions, keepdim=True)
    count = value.shape[channel]
    draws = [(2 * torch.rand(count, count, generator=stream) - 1) / count**0.5 for _ in range(2)]
    scale, shift = (
        torch.sigmoid(torch.tensordot(part, draw.to(value), ([channel], [1])).movedim(-1, channel))
        for draw, part in zip(draws, ((spread + 1e-5).sqrt(), mean), strict=True)
    )
    return torch.cat([first, second * scale + shift])
