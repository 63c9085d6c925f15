"""A keep term: what readers find of original labels at every depth of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sophon._base.seeding import generator, seeded
from sophon._base.spans import spanned
from sophon._data import check_batch_fits
from sophon._models import run
from sophon._protection.readers import Reading, ReadingSpec, check_images, check_whole
from sophon._protection.term import Keep, Surroundings, TermSpec
from sophon._specs.base import Augmentation, Rate


class RetentionSpec(TermSpec):
    """`kind = "retention"`: closed-form readers at every depth are to find as much of the original
    labels as in the model as given.

    Distillation keeps outputs alone, and leaves erasure free to take from the features what other
    tasks would start from: this keeps allowed tasks learnable, without an image of theirs.
    `batch_size` original images a step, half of them support.
    """

    kind: Literal["retention"] = "retention"
    weight: Rate = 8.0
    batch_size: Annotated[int, Field(ge=8)] = 192
    augmentation: Augmentation = "none"
    readers: ReadingSpec = ReadingSpec()


class RetentionTerm(Keep[RetentionSpec]):
    """mean over depths and readers of max(0, R2 of the given model - R2), on original images.

    Both models are read on the same batch with the same ridges (`readers`), and as an attacker
    would train them: in train mode, with the batch's own statistics. To find more than there was
    costs nothing.
    """

    spec_type = RetentionSpec
    metrics = ("accuracy",)

    def __init__(self, spec: RetentionSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.reading = Reading(spec.readers, around)
        original = around.setting.original
        self.feed = around.setting.feed(
            original,
            original.train,
            batch_size=spec.batch_size,
            stream=(around.seed, ("retention",)),
            augmentation=spec.augmentation,
        )

    @classmethod
    def check(cls, spec: RetentionSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless the model is whole and batches have images enough for the readers."""
        check_whole(around, spec.kind)
        original, what = around.setting.original, "protect.keep: retention's batch_size"
        check_batch_fits(original, spec.batch_size, what)
        check_images([original], spec.batch_size, what)

    @spanned("retention")
    def besides(self, model: nn.Module, step: int, factor: float) -> Tensor:
        """Add the gradient of what readers miss of what they found in the given model, in R2."""
        batch = self.feed.batch(step)
        with torch.no_grad(), self._read(self.around.given, *batch, step) as before:
            pass
        # As it ran: a checkpointed block runs once more.
        with self._read(model, *batch, step) as now:
            loss = (before - now).clamp_min(0).mean()
            (factor * loss).backward()
        return loss.detach()

    @contextmanager
    def _read(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> Iterator[Tensor]:
        around, names = self.around, ("retention", step)
        with seeded(around.seed, *names), self.reading.watching(model) as found:
            with around.setting.autocast():
                run(model, images)
            classes, stream = around.setting.original.class_count, generator(around.seed, *names)
            yield torch.stack(self.reading.scores(found, labels, classes, stream))
