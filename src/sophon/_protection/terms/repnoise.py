"""A hindrance: representation noising, carried over to images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sophon._protection.batched import Batch, Judged
from sophon._protection.discrepancy import mmd
from sophon._protection.probe import ProbingHindrance, ProbingSpec
from sophon._protection.readers import Reading, ReadingSpec, pooled
from sophon._protection.term import Surroundings
from sophon._specs.base import NonNegative


class RepNoiseSpec(ProbingSpec):
    """`kind = "repnoise"`: restricted features are to be noise at every depth.

    `beta` weighs the noise, `alpha` the ascent on a probe's loss.
    """

    kind: Literal["repnoise"] = "repnoise"
    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0


class RepNoiseTerm(ProbingHindrance[RepNoiseSpec]):
    """beta mean over depths of MMD^2(h, noise) - alpha log(1 + L_R).

    arXiv 2405.14577. h (images, channels) is what leaves a block, averaged over positions; noise is
    standard normal, drawn anew for each batch and depth; L_R is the cross-entropy of a linear
    probe on the head's input.

    Where it departs: a language model has one head for every task, and the public code reads
    all layers through it; a head of other classes says nothing of restricted labels, so a probe
    that is trained along takes its place. There beta = 0.001, for layers of other widths.
    """

    spec_type = RepNoiseSpec

    def __init__(self, spec: RepNoiseSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.reading = Reading(ReadingSpec(), around)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the probe's accuracy."""
        with self.reading.listening(model) as found:
            _, features = self.passed(model, batch.images)
        apart = []
        for name, place in self.reading.depths.items():
            hidden = pooled(found[name], 1, last=place.last).flatten(1)
            noise = torch.randn(hidden.shape, generator=batch.stream).to(hidden)
            apart.append(mmd(hidden, noise))
        distance: Tensor = torch.stack(apart).mean()
        wrong, right = self.probe.loss(features, batch, self.spec.probe_steps)
        loss = self.spec.beta * distance - self.spec.alpha * wrong.log1p()
        return loss, right, {"MMD": distance, "cross-entropy": wrong}
