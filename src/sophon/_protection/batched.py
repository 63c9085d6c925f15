"""Hindrances that are the loss of a batch: whose turn it is, what is drawn, and the gradient."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sophon._base.seeding import generator, seeded
from sophon._base.spans import span
from sophon._data import Domain, check_batch_fits
from sophon._models import batch_statistics, run
from sophon._protection.attackers import domain_of
from sophon._protection.depths import Place
from sophon._protection.readers import check_whole, pooled
from sophon._protection.term import Contribution, Hindrance, State, Surroundings, TermSpec
from sophon._specs.base import Augmentation
from sophon._training.setting import Feed

# Of a batch: the loss, how well the restricted task still goes, and what a round's record keeps.
Judged = tuple[Tensor, Tensor, dict[str, Tensor]]


class BatchSpec(TermSpec):
    """A term that draws `batch_size` restricted images an update; domains take turns."""

    batch_size: Annotated[int, Field(ge=8)] = 64
    augmentation: Augmentation = "none"


@dataclass(frozen=True)
class Batch:
    """Restricted images (batch, channels, height, width) and labels (batch,) of a domain.

    `turn` counts the updates from 0; `stream` is for what else the update draws.
    """

    domain: Domain
    images: Tensor
    labels: Tensor
    turn: int
    stream: torch.Generator


AnyBatchSpec = TypeVar("AnyBatchSpec", bound=BatchSpec)


class BatchHindrance(Hindrance[AnyBatchSpec]):
    """The gradient of `judge` on one batch of one restricted domain.

    The model runs in train mode with the batch's own statistics; its running ones stay.
    `reads_original` says whether it takes batches of original images, too.
    """

    reads_original: ClassVar[bool] = False
    instead_of_two = "it takes turns over domains"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    # Whether it takes differences of passes that are nearly equal: these are in fp32.
    exact: ClassVar[bool] = False

    def __init__(self, spec: AnyBatchSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        setting = around.setting
        self.weights = [domain.weight for domain in setting.restricted]
        # How many turns each domain has had.
        self.taken = [0 for _ in setting.restricted]
        self.feeds = [
            setting.feed(
                domain,
                domain.train,
                batch_size=spec.batch_size,
                stream=(around.seed, (spec.kind, domain.name)),
                augmentation=spec.augmentation,
            )
            for domain in setting.restricted
        ]

    @cached_property
    def original(self) -> Feed:
        """Batches of original images, of the same size."""
        setting, spec = self.around.setting, self.spec
        return setting.feed(
            setting.original,
            setting.original.train,
            batch_size=spec.batch_size,
            stream=(self.around.seed, (spec.kind, "of the original domain")),
            augmentation=spec.augmentation,
        )

    @classmethod
    def check(cls, spec: AnyBatchSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless every domain has a batch and the model is whole."""
        check_whole(around, spec.kind)
        setting, what = around.setting, f"protect.hinder: {spec.kind} needs batch_size"
        for domain in (*setting.restricted, *([setting.original] if cls.reads_original else [])):
            check_batch_fits(domain, spec.batch_size, what)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss of a batch, the score and the readings, all scalars."""
        raise NotImplementedError

    def passed(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (images, classes) and what goes into the head (images, features)."""
        head, kept = self.around.setting.head, dict[str, Tensor]()
        last = isinstance(model.get_submodule(head), nn.Linear)
        handle = Place(head, before=True).watch(model, kept, head)
        try:
            with nullcontext() if self.exact else self.around.setting.autocast():
                outputs = run(model, images)
        finally:
            handle.remove()
        return outputs.float(), pooled(kept[head], 1, last=last).flatten(1)

    def contribute(self, model: nn.Module) -> Contribution:
        """Return the gradient of one batch of one domain."""
        around, turn = self.around, sum(self.taken)
        which = domain_of(turn, self.weights)
        domain, names = around.setting.restricted[which], (self.spec.kind, turn)
        images, labels = self.feeds[which].batch(self.taken[which])
        self.taken[which] += 1
        batch = Batch(domain, images, labels, turn, generator(around.seed, *names))
        parameters = dict(model.named_parameters())
        with span(self.spec.kind), seeded(around.seed, *names), batch_statistics(model):
            loss, score, readings = self.judge(model, batch)
            # As it ran: a checkpointed block runs once more.
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        held = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
        score = score.detach()
        # All computed the whole batch; kernels need not agree to the last bit on that.
        around.ranks.follow_first([*held.values(), score])
        # Domains that take turns have readings of their own.
        of = f" ({domain.name})" if len(self.feeds) > 1 else ""
        return Contribution(
            gradients=held,
            loss=loss.detach(),
            score=score,
            readings={f"{name}{of}": value.detach() for name, value in readings.items()},
            domains=(domain.name,),
        )

    def state(self) -> State:
        """Return how many turns each domain has had."""
        return {}, {"turns": self.taken}

    def restore(self, model: nn.Module, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.taken = list(meta["turns"])
