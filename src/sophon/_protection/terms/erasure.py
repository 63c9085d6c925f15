"""A hindrance: restricted labels are to be found at no depth of the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sophon._base.errors import CheckpointError
from sophon._models import heads, run
from sophon._protection.batched import Batch, BatchHindrance, BatchSpec, Judged
from sophon._protection.floors import Floored, Found
from sophon._protection.losses import kl_from_uniform
from sophon._protection.readers import Readers, ReadersSpec, check_images
from sophon._protection.term import State, Surroundings
from sophon._specs.base import NonNegative


class ErasureSpec(BatchSpec):
    """`kind = "erasure"`: closed-form readers at every depth are to find no more than on a fresh
    network.

    `batch_size` restricted images an update, half of them support; several domains take turns in
    proportion to their weights. `outputs` weighs KLU on the model's own outputs on these images,
    for tasks that the output itself tells.
    """

    kind: Literal["erasure"] = "erasure"
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 3.0
    batch_size: Annotated[int, Field(ge=8)] = 192
    readers: ReadersSpec = ReadersSpec()
    outputs: NonNegative = 0.0


AnyErasureSpec = TypeVar("AnyErasureSpec", bound=BatchSpec)


class Erasing(BatchHindrance[AnyErasureSpec]):
    """What terms share that have readers find no more than on fresh networks."""

    readers: Floored
    given: dict[str, list[Tensor]]

    def look(self, readers: Floored) -> None:
        """Have the readers look at the model as given."""
        self.readers = readers
        domains = self.around.setting.restricted
        self.given = {domain.name: readers.table(self.around.given, domain) for domain in domains}

    def state(self) -> State:
        """Return how many turns each domain has had, and where readers look."""
        tensors, meta = super().state()
        return tensors, {**meta, "depths": [*self.readers.names]}

    def restore(self, model: nn.Module, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put back what `state` returned; CheckpointError where readers looked elsewhere."""
        # Earlier versions did not read what goes into a head.
        ends = heads(model, self.around.setting.head)
        looked = [name for name in self.readers.names if name not in ends]
        if meta.get("depths", looked) != [*self.readers.names]:
            raise CheckpointError(
                "the folder holds a run of an earlier version, whose readers did not look at what"
                f" goes into the head {ends[0]!r}: give another --out to start over"
            )
        super().restore(model, tensors, meta)

    def remarks(self) -> list[str]:
        """Name the domains of which readers find no more than on fresh networks."""
        return [
            f"{name}: readers find no more on this model than on a fresh network: nothing to erase"
            for name, rows in self.given.items()
            if all(
                bool((r <= f).all()) for r, f in zip(rows, self.readers.floors[name], strict=True)
            )
        ]

    def tables(self, model: nn.Module) -> dict[str, Any]:
        """Return what readers find by domain: depths, and R2 of the best reader on a fresh network,
        on the given one and on `model`.
        """
        held = {}
        for domain in self.around.setting.restricted:
            rows = {
                "fresh": self.readers.floors[domain.name],
                "given": self.given[domain.name],
                "protected": self.readers.table(model, domain),
            }
            best = {name: [round(float(r.max()), 4) for r in row] for name, row in rows.items()}
            held[domain.name] = {"depths": list(self.readers.names), **best}
        return held

    def description(self, model: nn.Module) -> dict[str, Any]:
        """Return the tables of what readers find."""
        return {"readers": self.tables(model)}


class ErasureTerm(Erasing[ErasureSpec]):
    """mean over depths of max over readers of max(0, R2 - floor), on restricted images.

    R2 is what a reader that was fitted to half of the batch explains of the labels of the other
    half, floor the same of fresh networks (`readers`). Below it there is nothing to gain: to reward
    worse than nothing would make features reliably wrong, which is information. The model runs in
    train mode with the batch's own statistics; its running ones stay those of original images.
    """

    spec_type = ErasureSpec
    readers: Readers
    instead_of_two = "it reads several depths (readers.depths) and takes turns over domains"

    def __init__(self, spec: ErasureSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.look(Readers(spec.readers, around, spec.batch_size, spec.augmentation))

    @classmethod
    def check(cls, spec: ErasureSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless every domain has images and classes enough for the readers."""
        super().check(spec, model, around)
        check_images(
            around.setting.restricted, spec.batch_size, "protect.hinder: erasure's batch_size"
        )

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss of a batch; the score is the mean R2 over depths."""
        with self.readers.listening(model) as found:
            with self.around.setting.autocast():
                outputs = run(model, batch.images)
            read = self.readers.erasure(found, batch.labels, batch.domain, batch.stream)
        loss = read.loss
        if self.spec.outputs:
            uniform = kl_from_uniform(outputs.float(), batch.labels).mean()
            loss = loss + self.spec.outputs * uniform
        return loss, read.best.mean(), readings_of(read)


def readings_of(read: Found) -> dict[str, Tensor]:
    """Return what a round's record keeps of what readers found."""
    return {
        "erasure": read.loss,
        **_by_depth("R2", read.best),
        **_by_depth("floor", read.floor),
    }


def _by_depth(what: str, values: Tensor) -> dict[str, Tensor]:
    """Return the mean over the first, the middle and the last third of the depths, as far as there
    are such.
    """
    thirds = zip(("early", "middle", "late"), torch.tensor_split(values, 3), strict=True)
    return {f"{what} {name}": part.mean() for name, part in thirds if len(part)}
