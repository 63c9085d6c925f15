"""A hindrance in one class, as whoever adds one writes it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged


class ToySpec(BatchSpec):
    """`kind = "toy"`: outputs on restricted images are to be small."""

    kind: Literal["toy"] = "toy"
    batch_size: int = 16


class ToyTerm(BatchHindrance[ToySpec]):
    """The mean square of the outputs on a batch of restricted images."""

    spec_type = ToySpec
    # Tests add two of them up.
    instead_of_two = ""

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss, which is the score, too."""
        loss = model(batch.images).square().mean()
        return loss, loss, {}
