"""A keep term: what readers find of original labels at every depth of the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from sophon._protection.readers import Reading, ReadingSpec, check_whole, images_needed
from sophon._protection.term import Keep, Surroundings, TermSpec
from sophon._specs.base import Rate


class RetentionSpec(TermSpec):
    """`kind = "retention"`: closed-form readers at every depth are to find as much of the original
    labels as in the model as given.

    Distillation keeps outputs alone, and leaves erasure free to take from the features what other
    tasks would start from: this keeps allowed tasks learnable, without an image of theirs.
    """

    kind: Literal["retention"] = "retention"
    weight: Rate = 3.0
    readers: ReadingSpec = ReadingSpec()


class RetentionTerm(Keep[RetentionSpec]):
    """mean over depths and readers of max(0, R2 of the given model - R2), on original images.

    Both models are read on the same images with the same ridges (`readers`), half of the batch
    being support; the given model runs in eval mode. To find more than there was costs nothing.
    """

    spec_type = RetentionSpec
    metrics = ("accuracy",)
    rows_apart = False

    def __init__(self, spec: RetentionSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.readers = Reading(spec.readers, around)
        self.found: dict[str, Tensor] = {}

    @classmethod
    def check(cls, spec: RetentionSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless the model is whole."""
        check_whole(around, spec.kind)

    @classmethod
    def least_batch(cls, around: Surroundings) -> int:
        """Return two images a class, of as many classes as a batch can hold."""
        return images_needed(around.setting.original.class_count)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep what leaves the blocks while the model's outputs are computed."""
        with self.readers.listening(model) as self.found:
            yield

    def loss(
        self, outputs: Tensor, targets: Tensor, images: Tensor, labels: Tensor, drawn: Tensor
    ) -> Tensor:
        """Return what readers miss of what they found in the given model, in R2."""
        around = self.around
        given, classes = around.given, around.setting.original.class_count
        with torch.no_grad(), around.setting.autocast(), self.readers.listening(given) as wanted:
            given(images)
        scores = []
        for found in (wanted, self.found):
            stream = torch.Generator()
            stream.set_state(drawn)
            scores.append(torch.stack(self.readers.scores(found, labels, classes, stream)))
        self.found = {}
        return (scores[0] - scores[1]).clamp_min(0).mean()
