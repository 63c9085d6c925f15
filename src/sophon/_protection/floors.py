"""What readers find on fresh networks, and how much more they find on a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.seeding import generator, seeded
from sophon._data import Domain
from sophon._models import Bare, batch_statistics, reinitialise
from sophon._protection.term import Surroundings
from sophon._specs.base import Augmentation

# What a table is the mean over.
_BATCHES = 4


@dataclass(frozen=True)
class Found:
    """What readers found: the loss, and the best reader's R2 at each depth and what it is on fresh
    networks, of shape (depths,).
    """

    loss: Tensor
    best: Tensor
    floor: Tensor


class Floored:
    """Readers with a floor: `names` says where they look, `read` what they find there.

    `images` of a batch are read, half of them support; those of tables are augmented as the term's.
    """

    spec: Any
    around: Surroundings
    images: int
    augmentation: Augmentation
    names: tuple[str, ...]

    def read(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        domain: Domain,
        stream: torch.Generator,
    ) -> list[Tensor]:
        """Return the R2s of every name, one a reader, on a batch that `model` runs on as it is."""
        raise NotImplementedError

    @cached_property
    def floors(self) -> dict[str, list[Tensor]]:
        """Each depth's R2s on fresh networks, one a reader, by restricted domain."""
        # Several terms read alike, and need not ask the fresh networks twice.
        shared, alike = self.around.shared, ("floors", self.spec, self.images, self.augmentation)
        if alike not in shared:
            domains = self.around.setting.restricted
            shared[alike] = {domain.name: self._floor(domain) for domain in domains}
        held: dict[str, list[Tensor]] = shared[alike]
        return held

    def above(self, scores: list[Tensor], domain: Domain) -> Found:
        """Return the mean over depths of max over readers of max(0, R2 - floor)."""
        floors = self.floors[domain.name]
        above = [
            (row - floor).clamp_min(0).max() for row, floor in zip(scores, floors, strict=True)
        ]
        best = torch.stack([row.max() for row in scores]).detach()
        floor = torch.stack([row.max() for row in floors])
        return Found(torch.stack(above).mean(), best, floor)

    @torch.no_grad()
    def table(self, model: nn.Module, domain: Domain) -> list[Tensor]:
        """Return each depth's mean R2s on `model` in train mode, one a reader; it stays as it is.

        The floors are those of fresh networks, on the same batches and with the same ridges.
        """
        setting, seed = self.around.setting, self.around.seed
        feed = setting.feed(
            domain,
            domain.train,
            batch_size=self.images,
            stream=(seed, ("readers", domain.name)),
            augmentation=self.augmentation,
        )
        rows = []
        for step in range(_BATCHES):
            names = ("readers", domain.name, step)
            stream = generator(seed, *names)
            with seeded(seed, *names), batch_statistics(model):
                rows.append(self.read(model, *feed.batch(step), domain, stream))
        return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]

    def _floor(self, domain: Domain) -> list[Tensor]:
        tables = []
        for index in range(self.spec.networks):
            fresh = copy.deepcopy(self.around.given)
            # What no reset reaches, such as position embeddings, stays the given model's.
            bare = Bare({name: p.detach().clone() for name, p in fresh.named_parameters()})
            reinitialise(fresh, seed=self.around.seed, names=("floor", index), bare=bare)
            tables.append(self.table(fresh, domain))
        return [torch.stack(column).mean(0).clamp_min(0) for column in zip(*tables, strict=True)]
