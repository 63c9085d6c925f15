"""A batch for a model: gathered, normalised and augmented on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from sophon._base.errors import DataError
from sophon._data.images import Images
from sophon._specs import Augmentation


def batch(  # noqa: PLR0913 - the hot path takes plain values, no object to build per batch
    images: Images,
    index: torch.Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int,
    device: torch.device | str,
    augmentation: Augmentation = "none",
    generator: torch.Generator | None = None,
    channels_last: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels at `index`, an int64 CPU tensor (b,), on `device`.

    The images become float32 (b, channels, h, w): grey is repeated to `channels`, pixels are
    scaled to [0, 1], then `(x - mean) / std` per channel. Augmentation comes first, in uint8:
    `flip` mirrors each image with probability 1/2, `crop` pads 1/8 of the side with black and
    cuts a random window of the old size. It draws from `generator` only.
    """
    device = torch.device(device)
    pixels = images.pixels.index_select(0, index).to(device, non_blocking=True)
    labels = images.labels.index_select(0, index).to(device, non_blocking=True)
    if augmentation in ("crop", "flip_crop"):
        pixels = _cropped(pixels, generator)
    if augmentation in ("flip", "flip_crop"):
        pixels = _flipped(pixels, generator)
    if pixels.shape[1] != channels:
        pixels = pixels.expand(-1, channels, -1, -1)
    scaled = pixels.to(
        torch.float32,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    shift, scale = _constants(mean, std, channels, device)
    return scaled.div_(255).sub_(shift).div_(scale), labels


def check_channels(name: str, image_channels: int, channels: int) -> None:
    """Raise DataError unless images with `image_channels` can feed a model that takes `channels`.

    Grey images feed any model, by repetition.
    """
    if image_channels not in (1, channels):
        raise DataError(
            f"domain {name!r} has {image_channels}-channel images and the model takes {channels}; "
            f"use a model with in_channels = {image_channels}, or convert the images to grey"
        )


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached: a new tensor per batch would be a copy to the device in the hot loop.
    shift, scale = fitted(mean, channels), fitted(std, channels)
    shape = (1, channels, 1, 1)
    return (
        torch.tensor(shift, device=device).view(shape),
        torch.tensor(scale, device=device).view(shape),
    )


def fitted(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel: one is repeated, several become their mean for grey."""
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def _flipped(pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    source = generator.device if generator is not None else None
    chosen = torch.rand(len(pixels), 1, 1, 1, generator=generator, device=source) < 0.5
    return torch.where(chosen.to(pixels.device), pixels.flip(-1), pixels)


def _cropped(pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    count, _, height, width = pixels.shape
    source = generator.device if generator is not None else None
    above, beside = height // 8, width // 8
    padded = F.pad(pixels, (beside, beside, above, above))
    window = torch.rand(2, count, 1, generator=generator, device=source).to(pixels.device)
    # The product can round up to the end of the range, one past the last window.
    top = (window[0] * (2 * above + 1)).long().clamp_(max=2 * above).squeeze(1)
    left = (window[1] * (2 * beside + 1)).long().clamp_(max=2 * beside).squeeze(1)
    # Every window is a view; one of each image is copied.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=pixels.device), :, top, left]
