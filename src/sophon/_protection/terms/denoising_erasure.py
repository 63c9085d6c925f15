"""A hindrance: no block of a U-Net is to tell more of restricted images than a fresh one does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from sophon._protection.batched import Batch, BatchSpec, Judged
from sophon._protection.denoising_readers import DenoisingReaders, DenoisingReadersSpec
from sophon._protection.term import Surroundings
from sophon._protection.terms.erasure import Erasing, readings_of


class DenoisingErasureSpec(BatchSpec):
    """`kind = "denoising_erasure"`: what `erasure` is for classifiers, for an unconditional U-Net.

    `batch_size` restricted images an update are dealt out to the bands of timesteps, half of each
    band's support; several domains take turns in proportion to their weights.
    """

    kind: Literal["denoising_erasure"] = "denoising_erasure"
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 3.0
    batch_size: Annotated[int, Field(ge=8)] = 96
    readers: DenoisingReadersSpec = DenoisingReadersSpec()


class DenoisingErasureTerm(Erasing[DenoisingErasureSpec]):
    """mean over blocks and bands of max over maps of max(0, R2 - floor), on restricted images.

    R2 is what a ridge explains of what has to be predicted, from a pixel of a block's map, and of
    the restricted images' principal components, from the whole map; floor the same of fresh
    networks (`denoising_readers`). A row of content counts as one of a band.
    """

    spec_type = DenoisingErasureSpec
    metrics = ("mse",)
    instead_of_two = "it reads several blocks (readers.depths) and takes turns over domains"

    def __init__(self, spec: DenoisingErasureSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.look(DenoisingReaders(spec.readers, around, spec.batch_size, spec.augmentation))

    @classmethod
    def check(cls, spec: DenoisingErasureSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless the U-Net, its images and the bands of timesteps can be read."""
        super().check(spec, model, around)
        DenoisingReaders(spec.readers, around, spec.batch_size)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss of a batch; the score is the mean R2 over blocks and bands."""
        rows = self.readers.read(model, batch.images, batch.labels, batch.domain, batch.stream)
        read = self.readers.above(rows, batch.domain)
        return read.loss, read.best.mean(), readings_of(read)
