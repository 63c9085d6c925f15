"""Pictures in memory: one split of a domain, reading single pictures, resizing them."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sophon._base.counting import counted
from sophon._base.errors import DataError, brief, first_line

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

GREY_MODES = frozenset({"1", "L", "LA", "La"})
# As Pillow names them; of each every suffix that Pillow knows is read, where it can read it. Pillow
# tells formats by content, whatever a file is called, and hands some, such as EPS, to a program.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


# What transparent pictures may be laid on.
BACKGROUNDS = {"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255)}


@cache
def _openable() -> tuple[str, ...]:
    """Return which of the formats Pillow can open here; an MPO file is opened as a JPEG."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of image files, in lower case and with their dots."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in FORMATS)


@dataclass(frozen=True, eq=False)
class Images:
    """One split, kept once in memory on the CPU.

    `pixels` is uint8 (n, channels, height, width), contiguous; `labels` is int64 (n,).
    """

    pixels: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)

    def __repr__(self) -> str:
        return f"Images{tuple(self.pixels.shape)}"

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.is_contiguous():
            raise DataError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; "
                "give contiguous uint8 (n, channels, height, width)"
            )
        if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
                f"give int64 ({len(pixels)},), one per image"
            )

    def __len__(self) -> int:
        return len(self.labels)


def to_images(pixels: Bytes, labels: Integers) -> Images:
    """Return the split of `pixels`, (n, h, w) or (n, h, w, c), with its labels."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    moved = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    owned = moved if moved.flags.writeable else moved.copy()
    return Images(torch.from_numpy(owned), torch.from_numpy(np.array(labels, dtype=np.int64)))


@dataclass(frozen=True)
class Fit:
    """How a picture becomes pixels; the fields are those of `DomainSpec`.

    With a `size` the middle square is resized to it, of a side of `crop_pct` of the shorter one
    (as timm and torchvision resize to `size / crop_pct` and cut); where `crop_mode` is `squash`
    it is that share of both sides. What is transparent is laid on `background`. 16-bit
    grey keeps the upper 8 of its `bit_depth` bits, its transparency aside. `transparent` counts
    the other pictures with a transparent pixel.
    """

    size: int | None = None
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    bit_depth: int = 16
    crop_mode: str = "center"
    background: str | None = None
    transparent: Counter[bool] = field(
        default_factory=Counter, init=False, compare=False, repr=False
    )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What became of transparency, if there was any."""
        done = f"laid on {self.background}" if self.background else "dropped, as without background"
        count = self.transparent[True]
        return (f"transparency of {count} images {done}",) if count else ()

    def squared(self, picture: Image.Image) -> Image.Image:
        """Return `picture` with its middle resized, with antialiasing; as it is without `size`."""
        size, crop = self.size, self.crop_pct
        if size is None or (picture.size == (size, size) and crop == 1):
            return picture
        width, height = picture.size
        across, down = (width, height) if self.crop_mode == "squash" else (min(width, height),) * 2
        left, top = (width - across * crop) / 2, (height - down * crop) / 2
        if picture.mode in ("1", "P", "PA"):
            picture = picture.convert("L" if picture.mode == "1" else "RGB")
        box = (left, top, left + across * crop, top + down * crop)
        method = Image.Resampling[self.interpolation.upper()]
        return picture.resize((size, size), method, box=box)

    def pixels(self, picture: Image.Image) -> Bytes:
        """Return a picture, squared, as uint8 (h, w) if it is grey and (h, w, 3) otherwise.

        Transparency is dropped unless there is a `background`. Raises DataError: the picture holds
        values beyond `bit_depth`, or of 32 bits, which have no fixed range.
        """
        if picture.mode.startswith("I;16"):
            highest = int(np.asarray(picture).max())
            if highest >= 2**self.bit_depth:
                raise DataError(
                    f"the picture has values up to {highest}, above bit_depth = {self.bit_depth}:"
                    " raise that or leave it out"
                )
            # Bicubic edges may go beyond the values of the picture.
            brightness = np.asarray(self.squared(picture)) >> (self.bit_depth - 8)
            small: Bytes = np.minimum(brightness, 255).astype(np.uint8)
            return small
        if picture.mode in ("I", "F"):
            raise DataError(
                f"pictures of mode {picture.mode} are not supported; save it with 8 bits"
            )
        transparent = _transparent(picture)
        self.transparent[transparent] += 1
        if self.background and transparent:
            laid = Image.new("RGBA", picture.size, BACKGROUNDS[self.background])
            laid = Image.alpha_composite(laid, picture.convert("RGBA"))
            picture = laid.convert("L" if picture.mode in GREY_MODES else "RGB")
        squared = self.squared(picture)
        return np.asarray(squared.convert("L" if squared.mode in GREY_MODES else "RGB"))


def _transparent(picture: Image.Image) -> bool:
    if not picture.has_transparency_data:
        return False
    held = picture if "A" in picture.getbands() else picture.convert("RGBA")
    return held.getchannel("A").getextrema() != (255, 255)


class UnreadableError(DataError):
    """Some images of `count` cannot be read: `faults`, name and reason by their positions.

    `pixels` are those of the others, in their order; None if there are no others.
    """

    def __init__(
        self, faults: dict[int, tuple[str, DataError]], count: int, pixels: Bytes | None
    ) -> None:
        self.faults, self.pixels = faults, pixels
        held = list(faults.values())
        names = ", ".join("/".join(Path(name).parts[-2:]) for name, _ in held[:4])
        more = ", ..." if len(held) > 4 else ""
        several = f"{len(held)} of {count} images cannot be used: {names}{more}; the first: "
        super().__init__(f"{several if len(held) > 1 else ''}{held[0][1]}")


@contextmanager
def opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image of one of the `FORMATS`, and no other, for as long as the context lasts.

    Raises one of `UNREADABLE`. Pillow's warnings, which name no file, are silent.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(source, formats=_openable()) as picture:
            yield picture


def open_picture(path: Path, fit: Fit, data: bytes | None = None) -> Bytes:
    """Return the image file at `path`, or its `data`, upright as its camera says, as `fit` says.

    Raises DataError: the file is damaged or is no image; the message names it.
    """
    try:
        with opened(path if data is None else io.BytesIO(data)) as picture:
            # Whole first: a reduced JPEG would be faster but its pixels differ.
            return fit.pixels(ImageOps.exif_transpose(picture))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def shorter_side(path: Path) -> int:
    """Return the pixels along the shorter side of an image file, of which only the head is read.

    Raises DataError as `open_picture`.
    """
    try:
        with opened(path) as picture:
            return min(picture.size)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


# What damaged files, and those of other formats, make Pillow raise.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, OverflowError),
    *(AttributeError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
)


def _unreadable(path: Path, error: Exception) -> DataError:
    said = re.sub(r" <_io\.BytesIO[^>]*>", "", first_line(error, 1000))
    return DataError(f"{path} cannot be read as an image ({said}); replace or remove it")


def resized(pixels: Bytes, fit: Fit) -> Bytes:
    """Return an array of images, (n, h, w) or (n, h, w, 3), each as `fit` says."""
    if fit.size is None or (pixels.shape[1:3] == (fit.size, fit.size) and fit.crop_pct == 1):
        return pixels
    return stack(lambda one: fit.pixels(Image.fromarray(pixels[one])), len(pixels))


def stack(
    read: Callable[[int], Bytes], count: int, name: Callable[[int], str] = "image {}".format
) -> Bytes:
    """Return `count` pictures of one size as one array: (n, h, w) if all are grey, else RGB.

    `read` returns the picture at a position, `name` tells what to call it.

    Raises DataError: the sizes differ; the message names the first two that do. UnreadableError:
    `read` raised a DataError; all others were read.
    """
    result: Bytes | None = None
    faults: dict[int, tuple[str, DataError]] = {}
    first = 0
    for position in counted(range(count), "image", count):
        try:
            picture = read(position)
        except DataError as error:
            faults[position] = (name(position), error)
            continue
        if result is None:
            first, result = position, np.empty((count - len(faults), *picture.shape), np.uint8)
        if picture.shape[:2] != result.shape[1:3]:
            raise DataError(
                f"images differ in size: {name(first)} is {_size(result[0])}, {name(position)} is "
                f"{_size(picture)} pixels; set image_size"
            )
        if picture.ndim == 3 and result.ndim == 3:
            result = repeated(result)
        row = position - len(faults)
        result[row] = repeated(picture) if picture.ndim < result.ndim - 1 else picture
    if faults:
        left = None if result is None else result[: count - len(faults)]
        raise UnreadableError(faults, count, left)
    if result is None:
        raise DataError("no images; give at least one")
    return result


def repeated(grey: Bytes) -> Bytes:
    """Return grey pixels, (..., h, w), as RGB, (..., h, w, 3)."""
    return np.repeat(grey[..., None], 3, axis=-1)


def from_item(image: Any, fit: Fit, name: str = "the picture", within: Path | None = None) -> Bytes:
    """Return one image of a dataset as uint8 (h, w) or (h, w, 3), as `fit` says.

    A tensor is (c, h, w) or (h, w), an array (h, w) or (h, w, c); floating values lie in [0, 1]. A
    file is its bytes, or a mapping of its `bytes` or `path`; errors in it call it `name`. A path is
    relative to the folder `within`, if that is given, and leads nowhere else.

    Raises DataError: it is no picture, or a file that lies elsewhere.
    """
    if isinstance(image, Image.Image):
        return fit.pixels(image)
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        image = image.get("bytes") or _file(str(image["path"]), name, within)
    if isinstance(image, bytes | Path):
        data = image if isinstance(image, bytes) else None
        return open_picture(Path(name) if isinstance(image, bytes) else image, fit, data)
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif image is None or isinstance(image, str | Mapping):
        raise DataError(f"{name} is {brief(image)}, no picture: give files, or name its column")
    else:
        array = np.asarray(image)
    array = _as_bytes(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3) or array.size == 0:
        raise DataError(
            f"an image has shape {tuple(np.shape(image))}; give (channels, height, width) tensors, "
            "(height, width, channels) arrays or PIL images, grey or RGB"
        )
    return fit.pixels(Image.fromarray(np.ascontiguousarray(array)))


def unusual(name: str) -> bool:
    """Return whether a file's name has control characters, NUL among them, or lone surrogates."""
    return re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name) is not None


def _file(path: str, name: str, within: Path | None) -> Path:
    """Return the file at `path`. Raises DataError: it is none, an address, or elsewhere."""
    file = Path(path) if within is None else within / path
    if unusual(path):
        raise DataError(f"{name} is the file {brief(path)}: no name of a file has such characters")
    elsewhere = "://" in path
    if within is not None and not elsewhere:
        elsewhere = not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(within))
    if elsewhere:
        raise DataError(
            f"{name} is the file {brief(path)}, which is not in the dataset's folder and is not"
            " read: save the images' bytes with the dataset"
        )
    return file


def _as_bytes(array: NDArray[Any]) -> Bytes:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"an image has dtype {array.dtype}; give uint8, or floats in [0, 1]")
    if not np.isfinite(array).all():
        raise DataError("an image has NaN or infinite values; repair or remove it")
    if array.size and (array.min() < 0 or array.max() > 1):
        raise DataError(
            f"an image has values from {array.min():.3g} to {array.max():.3g}; floats must lie in "
            "[0, 1]: leave normalisation out of the dataset and give mean and std instead"
        )
    return np.round(array * 255).astype(np.uint8)


def _size(picture: Bytes) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
