"""A hindrance: restricted labels are to be found at no depth of the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sophon._base.errors import CheckpointError
from sophon._base.seeding import generator, seeded
from sophon._base.spans import spanned
from sophon._data import check_batch_fits
from sophon._models import heads, run
from sophon._protection.attackers import domain_of
from sophon._protection.losses import kl_from_uniform
from sophon._protection.readers import Readers, ReadersSpec, check_images, check_whole
from sophon._protection.term import Contribution, Hindrance, State, Surroundings, TermSpec
from sophon._specs.base import Augmentation, NonNegative


class ErasureSpec(TermSpec):
    """`kind = "erasure"`: closed-form readers at every depth are to find no more than on a fresh
    network.

    `batch_size` restricted images an update, half of them support; several domains take turns in
    proportion to their weights. `outputs` weighs KLU on the model's own outputs on these images,
    for tasks that the output itself tells.
    """

    kind: Literal["erasure"] = "erasure"
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 3.0
    batch_size: Annotated[int, Field(ge=8)] = 192
    augmentation: Augmentation = "none"
    readers: ReadersSpec = ReadersSpec()
    outputs: NonNegative = 0.0


class ErasureTerm(Hindrance[ErasureSpec]):
    """mean over depths of max over readers of max(0, R2 - floor), on restricted images.

    R2 is what a reader that was fitted to half of the batch explains of the labels of the other
    half, floor the same of fresh networks (`readers`). Below it there is nothing to gain: to reward
    worse than nothing would make features reliably wrong, which is information. The model runs in
    train mode with the batch's own statistics; its running ones stay those of original images.
    """

    spec_type = ErasureSpec
    instead_of_two = "it reads several depths (readers.depths) and takes turns over domains"
    metrics = ("accuracy",)

    def __init__(self, spec: ErasureSpec, around: Surroundings) -> None:
        super().__init__(spec, around)
        setting = around.setting
        self.readers = Readers(spec.readers, around, spec.batch_size, spec.augmentation)
        self.weights = [domain.weight for domain in setting.restricted]
        # How many turns each domain has had.
        self.taken = [0 for _ in setting.restricted]
        self.feeds = [
            setting.feed(
                domain,
                domain.train,
                batch_size=spec.batch_size,
                stream=(around.seed, ("erasure", domain.name)),
                augmentation=spec.augmentation,
            )
            for domain in setting.restricted
        ]
        self.given = {d.name: self.readers.table(around.given, d) for d in setting.restricted}

    @classmethod
    def check(cls, spec: ErasureSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise unless every domain has images and classes enough for the readers."""
        check_whole(around, spec.kind)
        for domain in around.setting.restricted:
            what = "protect.hinder: erasure needs batch_size"
            check_batch_fits(domain, spec.batch_size, what)
        check_images(
            around.setting.restricted, spec.batch_size, "protect.hinder: erasure's batch_size"
        )

    @spanned("erasure")
    def contribute(self, model: nn.Module) -> Contribution:
        """Return the gradient of one batch of one domain; `score` is the mean R2 over depths."""
        around, turn = self.around, sum(self.taken)
        which = domain_of(turn, self.weights)
        domain = around.setting.restricted[which]
        images, labels = self.feeds[which].batch(self.taken[which])
        self.taken[which] += 1
        parameters = dict(model.named_parameters())
        names = ("erasure", turn)
        with seeded(around.seed, *names), self.readers.watching(model) as found:
            with around.setting.autocast():
                outputs = run(model, images)
            stream = generator(around.seed, *names)
            read = self.readers.erasure(found, labels, domain, stream)
            loss = read.loss
            if self.spec.outputs:
                uniform = kl_from_uniform(outputs.float(), labels).mean()
                loss = loss + self.spec.outputs * uniform
            # As it ran: a checkpointed block runs once more.
            values = list(parameters.values())
            gradients = torch.autograd.grad(loss, values, allow_unused=True)
        held = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
        # All computed the whole batch; kernels need not agree to the last bit on that.
        score = read.best.mean()
        around.ranks.follow_first([*held.values(), score])
        readings = {
            "erasure": read.loss.detach(),
            **_by_depth("R2", read.best),
            **_by_depth("floor", read.floor),
        }
        # Domains that take turns have readings of their own.
        of = f" ({domain.name})" if len(self.feeds) > 1 else ""
        return Contribution(
            gradients=held,
            loss=loss.detach(),
            score=score,
            readings={f"{name}{of}": value for name, value in readings.items()},
            domains=(domain.name,),
        )

    def state(self) -> State:
        """Return how many turns each domain has had, and where readers look."""
        return {}, {"turns": self.taken, "depths": [*self.readers.depths]}

    def restore(self, model: nn.Module, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Put back what `state` returned; CheckpointError where readers looked elsewhere."""
        # Earlier versions did not read what goes into a head.
        ends = heads(model, self.around.setting.head)
        looked = [name for name in self.readers.depths if name not in ends]
        if meta.get("depths", looked) != [*self.readers.depths]:
            raise CheckpointError(
                "the folder holds a run of an earlier version, whose readers did not look at what"
                f" goes into the head {ends[0]!r}: give another --out to start over"
            )
        self.taken = list(meta["turns"])

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
            held[domain.name] = {"depths": list(self.readers.depths), **best}
        return held

    def description(self, model: nn.Module) -> dict[str, Any]:
        """Return the tables of what readers find."""
        return {"readers": self.tables(model)}


def _by_depth(what: str, values: Tensor) -> dict[str, Tensor]:
    """Return the mean over the first, the middle and the last third of the depths, as far as there
    are such.
    """
    thirds = zip(("early", "middle", "late"), torch.tensor_split(values, 3), strict=True)
    return {f"{what} {name}": part.mean() for name, part in thirds if len(part)}
