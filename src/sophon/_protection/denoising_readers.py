"""Readers of a denoiser: what closed-form regression finds in what leaves each block of a U-Net.

At bands of timesteps they ask for what has to be predicted, pixel by pixel at the block's own
resolution, and for content, the principal components of the restricted images. Both see a block
before what it says is joined with what the other half of the U-Net says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._data import Domain
from sophon._models import class_embeddings, predict, probe_images, probing, run
from sophon._protection.floors import Floored
from sophon._protection.readers import (
    ReaderKind,
    ReadersSpec,
    draw_penalties,
    explained,
    pooled_to,
    read_kernels,
    require_finite,
    standardised,
)
from sophon._protection.term import Surroundings
from sophon._specs.base import Augmentation, Count, Positive, Rate
from sophon._tasks import Denoising

# Timesteps of a band at least: a network has a way of its own for each.
_LEAST_TIMESTEPS = 8
# Positions of a side of a block's map at least: less has no pixels to read.
_LEAST_SIDE = 2
# Images whose components are asked for.
_MOST_IMAGES = 2048
_LEAST = 1e-6


class DenoisingReadersSpec(ReadersSpec):
    """Which readers look where in a U-Net, in which timesteps, and for what.

    `depths` names blocks (all, unless given). A band is timesteps from its first number up to its
    second, which is left out (the quarters of the task's, unless given). `noise` asks for what has
    to be predicted at every pixel. The restricted images' first `components` (0: none), at `side`
    pixels a side, are asked of maps pooled to `views`, by `kinds` with a ridge of
    `content_penalty`: of few images, and of what noise hides, it is a larger one.
    """

    kinds: Annotated[tuple[ReaderKind, ...], Field(strict=False, min_length=1)] = ("linear",)
    views: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(strict=False, min_length=1)
    ] = (2,)
    bands: (
        Annotated[
            tuple[Annotated[tuple[Count, Positive], Field(strict=False)], ...],
            Field(strict=False, min_length=1),
        ]
        | None
    ) = None
    noise: bool = True
    components: Count = 16
    side: Positive = 8
    content_penalty: Annotated[tuple[Rate, Rate], Field(strict=False)] = (3e-2, 1.0)

    @model_validator(mode="after")
    def _content_ordered(self) -> Self:
        low, high = self.content_penalty
        if low > high:
            raise ValueError(f"content_penalty starts at {low:g} above its end {high:g}")
        return self


def require_plain(around: Surroundings, kind: str) -> Denoising:
    """Return the task. Raises UnsupportedModelError, naming the term's kind, for a U-Net that takes
    classes, prompts or latents.
    """
    task = around.setting.task
    what = None
    if not isinstance(task, Denoising):
        what = f"of noise that diffusion models predict, not of {task.name}"
    elif task.latents is not None:
        what = "images, not latents with prompts"
    elif class_embeddings(around.given) is not None:
        what = "U-Nets that are told no class"
    if what is not None or not isinstance(task, Denoising):
        raise UnsupportedModelError(
            f"a term of kind {kind!r} reads {what}: use kind = 'rehearsal', or method = 'sophon'"
        )
    return task


def bands_of(spec: DenoisingReadersSpec, task: Denoising) -> tuple[tuple[int, int], ...]:
    """Return the bands that are read. Raises SpecError naming one that has too few timesteps."""
    first, end = task.timesteps
    bands = spec.bands or tuple(part.timesteps for part in task.parts)
    for low, high in bands:
        if not first <= low < high <= end:
            raise SpecError(
                f"readers.bands: {low} up to {high} is no band of the timesteps {first} to"
                f" {end - 1}: correct it, or leave bands out"
            )
        if high - low < _LEAST_TIMESTEPS:
            raise SpecError(
                f"readers.bands: {low} up to {high} holds {high - low} timesteps, and a reader"
                f" needs {_LEAST_TIMESTEPS}: use wider bands, and leave task.timestep out"
            )
    return bands


class DenoisingReaders(Floored):
    """Readers of restricted images at every block, with what fresh networks show them.

    Raises UnsupportedModelError, SpecError or DataError for what they cannot read.
    """

    spec: DenoisingReadersSpec

    def __init__(
        self,
        spec: DenoisingReadersSpec,
        around: Surroundings,
        images: int,
        augmentation: Augmentation = "none",
    ) -> None:
        self.spec, self.around = spec, around
        self.images, self.augmentation = images, augmentation
        self.task = require_plain(around, "denoising_erasure")
        self.bands = bands_of(spec, self.task)
        self.blocks = _blocks(around.given, spec.depths)
        if not spec.noise and not spec.components:
            raise SpecError("readers.noise = false and components = 0: let them read one of both")
        asked = [*["noise"] * spec.noise, *["content"] * (spec.components > 0)]
        self.names = tuple(
            f"{block}, {what} at {low} to {high - 1}"
            for block in self.blocks
            for what in asked
            for low, high in self.bands
        )
        self._require_positions()
        self._components = {
            domain.name: self._principal(domain)
            for domain in (around.setting.restricted if spec.components else ())
        }

    def read(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        domain: Domain,
        stream: torch.Generator,
    ) -> list[Tensor]:
        """Return every name's R2s on a batch: of noise one a map of the block, of content one a
        view and kind.

        The images are dealt out to the bands, so that one pass of the model serves all.
        """
        count = len(self.bands)
        images = images[: len(images) // count * count]
        mixed = [
            self.task.within(*band).mixed(images[at::count], labels[at::count], stream)
            for at, band in enumerate(self.bands)
        ]
        noisy, targets, times, _ = (torch.cat(parts) for parts in zip(*mixed, strict=True))
        with self._listening(model) as found, self.around.setting.autocast():
            predict(model, noisy, times)
        wanted = None
        if self.spec.components:
            order = torch.cat([torch.arange(at, len(images), count) for at in range(count)])
            wanted = self._banded(self._content(images[order], domain))
        rows: list[Tensor] = []
        for block in self.blocks:
            if self.spec.noise:
                rows += self._noise_scores(block, found[block], targets, stream)
            if wanted is not None:
                rows += self._content_scores(block, found[block][0], wanted, stream)
        return rows

    def _noise_scores(
        self, block: str, maps: list[Tensor], targets: Tensor, stream: torch.Generator
    ) -> list[Tensor]:
        """Return the R2s of each band, one a map, of a batch that lies band by band."""
        held = []
        for whole in maps:
            require_finite(whole, block)
            features = standardised(self._pixels(whole), self.spec.clip)
            small = F.adaptive_avg_pool2d(targets, (whole.shape[2], whole.shape[3]))
            support = len(targets) // len(self.bands) // 2 * whole.shape[2] * whole.shape[3]
            penalties = draw_penalties(self.spec.penalty, len(self.bands), stream)
            held.append(pixels_explained(features, self._pixels(small), support, penalties))
        return list(torch.stack(held, 1))

    def _content_scores(
        self, block: str, first: Tensor, wanted: Tensor, stream: torch.Generator
    ) -> list[Tensor]:
        """Return the R2s of each band, one a view and kind, of `wanted` (bands, images,
        components).
        """
        spec, held = self.spec, []
        for read in pooled_to(first, spec.views):
            require_finite(read, block)
            apart = standardised(self._banded(read), spec.clip)
            held.append(torch.stack([read_kernels(part, spec.kinds) for part in apart]))
        kernels = torch.cat(held, 1)
        count, flat = kernels.shape[1], kernels.flatten(0, 1)
        penalties = draw_penalties(spec.content_penalty, len(flat), stream)
        found = explained(flat, wanted.repeat_interleave(count, 0), penalties)
        return list(self._banded(found))

    def _banded(self, values: Tensor) -> Tensor:
        """Return values (bands x images, ...) as (bands, images, ...)."""
        apart: Tensor = values.unflatten(0, (len(self.bands), -1))
        return apart

    def _pixels(self, maps: Tensor) -> Tensor:
        """Return maps (bands x images, channels, height, width) as (bands, positions, channels)."""
        return self._banded(maps.float()).flatten(3).transpose(2, 3).flatten(1, 2)

    def _content(self, images: Tensor, domain: Domain) -> Tensor:
        """Return the components (images, components) of images."""
        mean, basis = self._components[domain.name]
        components: Tensor = (self._small(images) - mean) @ basis
        return components

    def _small(self, images: Tensor) -> Tensor:
        side = self.spec.side
        height, width = (min(side, length) for length in images.shape[-2:])
        return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)

    def _principal(self, domain: Domain) -> tuple[Tensor, Tensor]:
        """Return the mean (pixels,) of small images, and the directions of their components,
        (pixels, components), of length 1 each.
        """
        size = min(len(domain.train), _MOST_IMAGES)
        feed = self.around.setting.feed(domain, domain.train, batch_size=size)
        small = self._small(feed.batch(0)[0])
        most = min(small.shape[1], size - 1)
        if self.spec.components > most:
            raise SpecError(
                f"readers.components = {self.spec.components}: {size} training images of"
                f" {domain.name!r} at readers.side have {most}: lower it"
            )
        mean = small.mean(0)
        _, _, directions = torch.linalg.svd(small - mean, full_matrices=False)
        return mean, directions[: self.spec.components].T

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """Give the maps that leave the blocks of `model`, which runs as it does."""
        outputs: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Any:
            return lambda _, given, output: outputs.__setitem__(name, _leaving(output))

        handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in self.blocks]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _require_positions(self) -> None:
        """Raise unless every map has pixels, and a band's support more of them than channels."""
        around, given = self.around, self.around.given
        for domain in around.setting.restricted:
            with self._listening(given) as found, probing(given):
                run(given, probe_images(given, around.setting.shape(domain)))
            for block, maps in found.items():
                for channels, height, width in (one.shape[1:] for one in maps):
                    if min(height, width) < _LEAST_SIDE:
                        raise DataError(
                            f"domain {domain.name!r}: its images reach {block!r} as"
                            f" {height}x{width}, too small to be read: set a larger image_size, or"
                            " leave that block out (readers.depths)"
                        )
                    # Two images a half, and as many pixels as channels.
                    needed = 2 * len(self.bands) * max(2, -(-channels // (height * width)))
                    if self.images < needed:
                        raise SpecError(
                            f"batch_size = {self.images} in {len(self.bands)} bands is too few to"
                            f" read {block!r} ({channels} channels at {height}x{width}): use at"
                            f" least {needed}"
                        )


def pixels_explained(features: Tensor, targets: Tensor, support: int, penalties: Tensor) -> Tensor:
    """Return R2 (bands,) on what follows the first `support` positions of ridges fitted to those.

    `features` (bands, positions, channels) are standardised, `targets` (bands, positions, values),
    `penalties` (bands,). With Z the support's features and Y its targets less their mean, the
    prediction of a query z is z (Z'Z / n + penalty I)^-1 Z'Y / n.
    """
    targets = targets.to(features)
    centred = targets - targets[:, :support].mean(1, keepdim=True)
    told, asked = features[:, :support], features[:, support:]
    identity = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    gram = told.mT @ told / support + penalties.to(features)[:, None, None] * identity
    weights = torch.linalg.solve(gram, told.mT @ centred[:, :support] / support)
    missed = (centred[:, support:] - asked @ weights).square().sum((1, 2))
    total = centred[:, support:].square().sum((1, 2))
    return torch.where(total > _LEAST, 1 - missed / total.clamp_min(_LEAST), 0 * missed)


def _blocks(model: nn.Module, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of a U-Net's blocks, down, middle and up, in the order they run."""
    names = [f"down_blocks.{at}" for at, _ in enumerate(_children(model, "down_blocks"))]
    names += ["mid_block"] if _children(model, "mid_block") else []
    names += [f"up_blocks.{at}" for at, _ in enumerate(_children(model, "up_blocks"))]
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise SpecError(
            f"depths: the network has no block {unknown[0]!r}; there is {', '.join(names)}"
        )
    return tuple(names) if wanted is None else wanted


def _children(model: nn.Module, name: str) -> list[nn.Module]:
    part = getattr(model, name, None)
    return list(part.children()) if isinstance(part, nn.Module) else []


def _leaving(output: Tensor | tuple[Any, ...]) -> list[Tensor]:
    """Return the maps that leave a block: what goes on to the next, and, of a block that halves
    its images at the end, what goes past the middle before that.
    """
    if isinstance(output, Tensor):
        return [output]
    onward, skips = output[0], output[1]
    return [onward, *[skip for skip in skips if skip.shape[-1] != onward.shape[-1]][-1:]]
