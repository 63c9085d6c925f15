"""Readers: what closed-form regression finds of restricted labels at every depth of a network.

A reader is fitted to one half of a batch (support) and judged on the other (query), anew each time,
so that a network trained against it is trained against the best one there is (Kernel-ARL, arXiv
1910.07423; that an adversary must start over: arXiv 1807.08379).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophon._base.errors import NonFiniteError, SpecError, UnsupportedModelError
from sophon._base.seeding import generator, seeded
from sophon._data import Domain
from sophon._models import (
    Bare,
    Shape,
    batch_statistics,
    blocks,
    probe_images,
    probing,
    reinitialise,
    run,
)
from sophon._protection.term import Surroundings
from sophon._specs.base import Name, Positive, Rate, Spec

ReaderKind = Literal["linear", "kernel"]
# Of a feature's mean square: below it a deviation is taken for rounding.
_LEAST = 1e-6
# What a table is the mean over.
_BATCHES = 4


class ReadersSpec(Spec):
    """Which readers look where.

    `depths` names the blocks whose outputs are read (all, unless given). Maps and tokens are pooled
    to `views`, so many positions a side. Features are standardised and cut at `clip` deviations:
    else a few outlying ones fool a reader that an attacker's optimizer sees through. The ridge is
    drawn log-uniformly from `penalty`, relative to the mean squared feature and the number of
    images. Floors are means over `networks` fresh networks.
    """

    kinds: Annotated[tuple[ReaderKind, ...], Field(strict=False, min_length=1)] = (
        "linear",
        "kernel",
    )
    depths: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | None = None
    views: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (2, 4)
    clip: Rate = 3.0
    penalty: Annotated[tuple[Rate, Rate], Field(strict=False)] = (3e-4, 3e-2)
    networks: Positive = 4

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.penalty
        if low > high:
            raise ValueError(f"penalty starts at {low:g} above its end {high:g}")
        return self


@dataclass(frozen=True)
class Found:
    """What readers found: the loss, and the best reader's R2 at each depth and what it is on fresh
    networks, of shape (depths,).
    """

    loss: Tensor
    best: Tensor
    floor: Tensor


def _linear(left: Tensor, right: Tensor) -> Tensor:
    kernel: Tensor = left @ right.T / left.shape[1]
    return kernel


def _gaussian(left: Tensor, right: Tensor) -> Tensor:
    squares = left.square().sum(1)[:, None] + right.square().sum(1)[None] - 2 * left @ right.T
    kernel: Tensor = torch.exp(-squares.clamp_min(0) / (2 * left.shape[1]))
    return kernel


# The kernel of each reader: (rows, features) twice -> (rows, rows), of the order of 1 on its
# diagonal for standardised features.
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": _linear, "kernel": _gaussian}


def standardised(features: Tensor, clip: float) -> Tensor:
    """Return features (images, features) with mean 0 and deviation 1 each, cut at `clip`.

    A constant feature is 0. Gradients are finite everywhere.
    """
    centred = features - features.mean(0, keepdim=True)
    variance = centred.square().mean(0, keepdim=True)
    least = _LEAST * variance.mean().detach() + torch.finfo(features.dtype).tiny ** 0.5
    scaled: Tensor = centred * (variance + least).rsqrt()
    return scaled.clamp(-clip, clip)


def pooled(output: Tensor, view: int) -> Tensor:
    """Return (images, features) in float32 of a block's output.

    Maps (images, channels, height, width), or with square sides and channels last, are averaged to
    `view` positions a side, tokens (images, tokens, channels) to as many in their order; (images,
    features) stays.
    """
    if output.dim() == 4:
        if output.shape[1] == output.shape[2] != output.shape[3]:
            output = output.permute(0, 3, 1, 2)
        height, width = output.shape[-2:]
        sides = (min(view, height), min(view, width))
        if height % sides[0] or width % sides[1]:
            averages = F.adaptive_avg_pool2d(output, sides)
        else:
            # The same averages; its backward pass keeps the memory layout.
            averages = F.avg_pool2d(output, (height // sides[0], width // sides[1]))
        return averages.float().flatten(1)
    if output.dim() == 3:
        count = min(view * view, output.shape[1])
        return F.adaptive_avg_pool1d(output.float().transpose(1, 2), count).flatten(1)
    return output.float().flatten(1)


def explained(
    features: Tensor, labels: Tensor, classes: int, kind: ReaderKind, penalty: float
) -> Tensor:
    """Return R2 on the second half of a reader that was fitted to the first, a scalar.

    `features` (images, features) are standardised. The prediction of the query's centred one-hot
    labels is K_qs (K_ss + n penalty I)^-1 Y_s, with Y less the support's mean; R2 is 1 less its
    squared error over that of the mean. In float32 a solve is exact enough, as the ridge bounds the
    condition number by 1 / penalty.
    """
    half = len(features) // 2
    support, query = features[:half], features[half:]
    targets = F.one_hot(labels, classes).to(features)
    centred = targets - targets[:half].mean(0, keepdim=True)
    kernel = KERNELS[kind]
    ridge = half * penalty * torch.eye(half, dtype=features.dtype, device=features.device)
    weights = torch.linalg.solve(kernel(support, support) + ridge, centred[:half])
    missed = (centred[half:] - kernel(query, support) @ weights).square().sum()
    total = centred[half:].square().sum()
    # Of labels that are all alike there is nothing to explain.
    return torch.where(total > _LEAST, 1 - missed / total.clamp_min(_LEAST), 0 * missed)


class Readers:
    """The readers of one run: where they look, what they find, and what fresh networks show them.

    `images` of a batch are read, half of them support. Raises UnsupportedModelError for a network
    without blocks, SpecError for depths that it has not.
    """

    def __init__(self, spec: ReadersSpec, around: Surroundings, images: int) -> None:
        self.spec = spec
        self.around = around
        self.images = images
        shape = around.setting.shape(around.setting.restricted[0])
        self.depths = _depths(around.given, around.setting.head, shape, spec.depths)
        self.floors = {domain.name: self._floor(domain) for domain in around.setting.restricted}

    def scores(
        self, outputs: dict[str, Tensor], labels: Tensor, classes: int, stream: torch.Generator
    ) -> list[Tensor]:
        """Return each depth's R2s, one a reader, of what `watching` kept of a batch.

        Raises NonFiniteError naming a depth whose features are not finite.
        """
        low, high = (math.log(bound) for bound in self.spec.penalty)
        found = []
        for name in self.depths:
            row = []
            for view in self.spec.views:
                read = pooled(outputs[name], view)
                if not bool(read.isfinite().all()):
                    raise NonFiniteError(
                        f"erasure: what leaves block {name!r} on restricted images is not finite:"
                        " lower the rate of protect.update, or set protect.precision = 'fp32'"
                    )
                features = standardised(read, self.spec.clip)
                for kind in self.spec.kinds:
                    share = float(torch.rand((), generator=stream, dtype=torch.float64))
                    penalty = math.exp(low + share * (high - low))
                    row.append(explained(features, labels, classes, kind, penalty))
            found.append(torch.stack(row))
        return found

    def erasure(
        self, outputs: dict[str, Tensor], labels: Tensor, domain: Domain, stream: torch.Generator
    ) -> Found:
        """Return the mean over depths of max over readers of max(0, R2 - floor)."""
        scores = self.scores(outputs, labels, domain.class_count, stream)
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
            domain, domain.train, batch_size=self.images, stream=(seed, ("readers", domain.name))
        )
        rows = []
        for step in range(_BATCHES):
            images, labels = feed.batch(step)
            names = ("readers", domain.name, step)
            with seeded(seed, *names), self.watching(model) as outputs, setting.autocast():
                model(images)
            stream = generator(seed, *names)
            rows.append(self.scores(outputs, labels, domain.class_count, stream))
        return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Hold `model` in train mode with statistics of the batch and give what leaves its blocks.

        Its BatchNorm's running statistics, and its mode, are afterwards what they were.
        """
        outputs: dict[str, Tensor] = {}
        handles = [_watch(model, place, outputs, name) for name, place in self.depths.items()]
        try:
            with batch_statistics(model):
                yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _floor(self, domain: Domain) -> list[Tensor]:
        tables = []
        for index in range(self.spec.networks):
            fresh = copy.deepcopy(self.around.given)
            # What no reset reaches, such as position embeddings, stays the given model's.
            bare = Bare({name: p.detach().clone() for name, p in fresh.named_parameters()})
            reinitialise(fresh, seed=self.around.seed, names=("floor", index), bare=bare)
            tables.append(self.table(fresh, domain))
        return [torch.stack(column).mean(0).clamp_min(0) for column in zip(*tables, strict=True)]


# Where a block's output is taken: the module, and whether it is what goes into it.
Place = tuple[str, bool]


def _watch(
    model: nn.Module, place: Place, outputs: dict[str, Tensor], name: str
) -> RemovableHandle:
    module, before = model.get_submodule(place[0]), place[1]

    def entering(part: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            outputs[name] = given[0]

    def leaving(part: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output

    if before:
        return module.register_forward_pre_hook(entering)
    return module.register_forward_hook(leaving)


def _depths(
    model: nn.Module, head: str, shape: Shape, wanted: tuple[str, ...] | None
) -> dict[str, Place]:
    """Return where what leaves each block can be read, by the block's first name.

    It is what goes into the next block, activation and pooling between them included; of the last
    block, its own output. A place that a probe does not pass is left out.
    """
    parts = blocks(model, head)
    places = {part[0]: (after[0], True) for part, after in pairwise(parts)}
    if parts:
        places[parts[-1][0]] = (parts[-1][-1], False)
    passed: dict[str, Tensor] = {}
    handles = [_watch(model, place, passed, name) for name, place in places.items()]
    try:
        with probing(model):
            run(model, probe_images(model, shape))
    finally:
        for handle in handles:
            handle.remove()
    places = {name: place for name, place in places.items() if name in passed}
    if not places:
        raise UnsupportedModelError(
            f"erasure: {type(model).__name__} has no blocks before its head {head!r} to read from:"
            " use method = 'sophon', or a network of several modules"
        )
    unknown = [name for name in wanted or () if name not in places]
    if unknown:
        raise SpecError(
            f"depths: the network has no block {unknown[0]!r}; there is {', '.join(places)}"
        )
    return places if wanted is None else {name: places[name] for name in wanted}
