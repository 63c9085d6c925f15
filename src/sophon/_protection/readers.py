"""Readers: what closed-form regression finds of restricted labels at every depth of a network.

A reader is fitted to one half of a batch (support) and judged on the other (query), anew each time,
so that a network trained against it is trained against the best one there is (Kernel-ARL, arXiv
1910.07423; that an adversary must start over: arXiv 1807.08379).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sophon._base.errors import NonFiniteError, SpecError, UnsupportedModelError
from sophon._data import Domain
from sophon._models import batch_statistics
from sophon._protection.depths import find_depths
from sophon._protection.floors import Floored, Found
from sophon._protection.term import Surroundings
from sophon._specs.base import Augmentation, Name, Rate, Spec

ReaderKind = Literal["linear", "kernel"]
# Of a feature's mean square: below it a deviation is taken for rounding.
_LEAST = 1e-6
# A batch that held two images of each of more classes would not fit.
_MOST_CLASSES = 128


class ReadingSpec(Spec):
    """Which readers look where.

    `depths` names the blocks whose outputs are read, or the head, whose input is (all, unless
    given). Maps and tokens are pooled
    to `views`, so many positions a side. Features are standardised and cut at `clip` deviations:
    else a few outlying ones fool a reader that an attacker's optimizer sees through. The ridge is
    drawn log-uniformly from `penalty`, relative to the mean squared feature and the number of
    images.
    """

    kinds: Annotated[tuple[ReaderKind, ...], Field(strict=False, min_length=1)] = (
        "linear",
        "kernel",
    )
    depths: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | None = None
    views: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(strict=False, min_length=1)
    ] = (2, 4)
    clip: Rate = 3.0
    penalty: Annotated[tuple[Rate, Rate], Field(strict=False)] = (3e-4, 3e-2)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.penalty
        if low > high:
            raise ValueError(f"penalty starts at {low:g} above its end {high:g}")
        return self


class ReadersSpec(ReadingSpec):
    """Readers that go no lower than a floor, the mean over `networks` fresh networks."""

    networks: Annotated[int, Field(ge=1, le=100)] = 4


def images_needed(classes: int) -> int:
    """Return how many images a batch needs: two a class, of as many classes as one can hold."""
    return 2 * min(classes, _MOST_CLASSES)


def check_whole(around: Surroundings, kind: str) -> None:
    """Raise UnsupportedModelError, naming the term's kind, for a network in shards."""
    if around.ranks.sharded:
        raise UnsupportedModelError(
            f"--shard: a term of kind {kind!r} reads whole networks: leave --shard out, or use"
            " method = 'sophon'"
        )


def check_images(domains: Iterable[Domain], images: int, what: str) -> None:
    """Raise SpecError, naming `what` says how many, for fewer images than a domain needs."""
    for domain in domains:
        needed = images_needed(domain.class_count)
        if images < needed:
            raise SpecError(
                f"{what} = {images} has fewer than two images for each of the"
                f" {domain.class_count} classes of {domain.name!r}: use at least {needed}"
            )


def _linear(products: Tensor, squares: Tensor, half: int) -> Tensor:
    return products


def _gaussian(products: Tensor, squares: Tensor, half: int) -> Tensor:
    distances = squares[:, None] + squares[None, :half] - 2 * products
    return torch.exp(-distances.clamp_min(0) / 2)


# The kernel of each reader, of all images with the support, from their mean products (images, half)
# and mean squares (images,): of the order of 1 on its diagonal for standardised features.
KERNELS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "linear": _linear,
    "kernel": _gaussian,
}


def standardised(features: Tensor, clip: float) -> Tensor:
    """Return features (..., images, features) with mean 0 and deviation 1 each, cut at `clip`.

    A constant feature is 0. Gradients are finite everywhere.
    """
    centred = features - features.mean(-2, keepdim=True)
    variance = centred.square().mean(-2, keepdim=True)
    least = _LEAST * variance.mean().detach() + torch.finfo(features.dtype).tiny ** 0.5
    scaled: Tensor = centred * (variance + least).rsqrt()
    return scaled.clamp(-clip, clip)


class _Windows(torch.autograd.Function):
    """Averages over windows side by side; PyTorch's own backward pass copies whole maps twice."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, window: tuple[int, int]) -> Tensor:
        last = maps.is_contiguous(memory_format=torch.channels_last)
        ctx.window = window
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return F.avg_pool2d(maps, window)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        height, width = ctx.window
        spread = (gradients[0] / (height * width)).contiguous(memory_format=ctx.layout)
        return F.interpolate(spread, scale_factor=(height, width), mode="nearest"), None


def pooled(output: Tensor, view: int, *, last: bool = False) -> Tensor:
    """Return a block's output in float32, averaged to `view` positions a side.

    Maps (images, channels, height, width), or with channels `last`, become (images, channels, view,
    view), or stay smaller; tokens (images, tokens, channels) become (images,
    channels, positions), in their order; (images, features) stays.
    """
    if output.dim() == 3:
        output = output.transpose(1, 2)
        count = min(view * view, output.shape[-1])
        return F.adaptive_avg_pool1d(output.float(), count)
    if output.dim() != 4:
        return output.float()
    if last:
        output = output.permute(0, 3, 1, 2)
    height, width = output.shape[-2:]
    sides = (min(view, height), min(view, width))
    if height % sides[0] or width % sides[1]:
        return F.adaptive_avg_pool2d(output, sides).float()
    averages: Tensor = _Windows.apply(  # type: ignore[no-untyped-call]
        output, (height // sides[0], width // sides[1])
    )
    return averages.float()


def pooled_to(output: Tensor, views: tuple[int, ...], *, last: bool = False) -> list[Tensor]:
    """Return a block's output at each view, (images, features).

    Where the views allow it a coarser one is the average of the finest: the output is passed once.
    """
    most = max(views)
    finest = pooled(output, most, last=last)
    once = finest.dim() == 4 and finest.shape[-2:] == (most, most)
    found = [
        finest
        if view == most
        else pooled(finest, view)
        if once and most % view == 0
        else pooled(output, view, last=last)
        for view in views
    ]
    return [values.flatten(1) for values in found]


def read_kernels(features: Tensor, kinds: tuple[ReaderKind, ...]) -> Tensor:
    """Return the kernels (kinds, images, half) of all images with the support, their first half.

    `features` (images, features) are standardised.
    """
    half, width = len(features) // 2, features.shape[1]
    products = features @ features[:half].T / width
    squares = features.square().mean(1)
    return torch.stack([KERNELS[kind](products, squares, half) for kind in kinds])


def explained(kernels: Tensor, targets: Tensor, penalties: Tensor) -> Tensor:
    """Return R2 on the second half of readers that were fitted to the first, (readers,).

    `kernels` (readers, images, half), `targets` (images, values), such as one-hot labels, or such
    of each reader, and `penalties` (readers,). The prediction of the query's centred targets is
    K_qs (K_ss + n penalty I)^-1 Y_s, with Y less the support's mean; R2 is 1 less its squared error
    over that of the mean. In float32 a solve is exact enough, as the ridge bounds the condition
    number by 1 / penalty.
    """
    half = kernels.shape[-1]
    targets = targets.to(kernels)
    centred = targets - targets[..., :half, :].mean(-2, keepdim=True)
    identity = torch.eye(half, dtype=kernels.dtype, device=kernels.device)
    ridges = half * penalties.to(kernels)[:, None, None] * identity
    weights = torch.linalg.solve(kernels[:, :half] + ridges, centred[..., :half, :])
    missed = (centred[..., half:, :] - kernels[:, half:] @ weights).square().sum((1, 2))
    total = centred[..., half:, :].square().sum((-2, -1))
    # Of targets that are all alike there is nothing to explain.
    return torch.where(total > _LEAST, 1 - missed / total.clamp_min(_LEAST), 0 * missed)


def draw_penalties(bounds: tuple[float, float], count: int, stream: torch.Generator) -> Tensor:
    """Return so many ridges (count,), log-uniform within bounds."""
    low, high = (math.log(bound) for bound in bounds)
    shares = torch.rand(count, generator=stream, dtype=torch.float64)
    return torch.exp(low + shares * (high - low))


def require_finite(features: Tensor, name: str) -> None:
    """Raise NonFiniteError naming a depth whose features are not finite."""
    if not bool(features.isfinite().all()):
        raise NonFiniteError(
            f"the features at {name!r} are not finite:"
            " lower the rate of protect.update, or set protect.precision = 'fp32'"
        )


class Reading:
    """What one run reads of a network's features at its depths.

    Raises UnsupportedModelError for a network without blocks, SpecError for depths that it has not.
    """

    spec: ReadingSpec

    def __init__(self, spec: ReadingSpec, around: Surroundings) -> None:
        self.spec = spec
        self.around = around
        shape = around.setting.shape(around.setting.restricted[0])
        self.depths = find_depths(around.given, around.setting.head, shape, spec.depths)

    def scores(
        self, outputs: dict[str, Tensor], labels: Tensor, classes: int, stream: torch.Generator
    ) -> list[Tensor]:
        """Return each depth's R2s, one a reader, of what `watching` kept of a batch.

        Raises NonFiniteError naming a depth whose features are not finite.
        """
        spec, held = self.spec, []
        for name in self.depths:
            for read in pooled_to(outputs[name], spec.views, last=self.depths[name].last):
                require_finite(read, name)
                held.append(read_kernels(standardised(read, spec.clip), spec.kinds))
        kernels = torch.cat(held)
        penalties = draw_penalties(spec.penalty, len(kernels), stream)
        found = explained(kernels, F.one_hot(labels, classes), penalties)
        return list(found.split(len(spec.views) * len(spec.kinds)))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Hold `model` in train mode with statistics of the batch and give what leaves its blocks.

        Its BatchNorm's running statistics, and its mode, are afterwards what they were.
        """
        with self.listening(model) as outputs, batch_statistics(model):
            yield outputs

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Give what leaves the blocks of `model`, which runs as it does."""
        outputs: dict[str, Tensor] = {}
        handles = [place.watch(model, outputs, name) for name, place in self.depths.items()]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


class Readers(Reading, Floored):
    """Readers of restricted labels, with what fresh networks show them.

    `images` of a batch are read, half of them support; those of tables are augmented as the term's.
    """

    spec: ReadersSpec

    def __init__(
        self,
        spec: ReadersSpec,
        around: Surroundings,
        images: int,
        augmentation: Augmentation = "none",
    ) -> None:
        super().__init__(spec, around)
        self.images = images
        self.augmentation = augmentation
        self.names = tuple(self.depths)

    def erasure(
        self, outputs: dict[str, Tensor], labels: Tensor, domain: Domain, stream: torch.Generator
    ) -> Found:
        """Return the mean over depths of max over readers of max(0, R2 - floor)."""
        return self.above(self.scores(outputs, labels, domain.class_count, stream), domain)

    def read(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        domain: Domain,
        stream: torch.Generator,
    ) -> list[Tensor]:
        """Return each depth's R2s on a batch, one a reader."""
        with self.listening(model) as outputs, self.around.setting.autocast():
            model(images)
        return self.scores(outputs, labels, domain.class_count, stream)
