"""The `folder` source: directories of image files, one per class or without classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sophon._base.errors import DataError
from sophon._data.images import Bytes, Integers
from sophon._data.sources.decoded import read_pictures
from sophon._data.splits import Contents, Part

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
TEST_NAMES = ("test", "val", "valid", "validation")


def read_folder(path: Path, size: int | None) -> Contents:
    """Return the contents of a directory with one directory of images per class.

    Classes are in sorted order. With `train/` below `path`, its classes are for training and those
    of `test/` (else `val/`) for the test split; where there are both, `val/` is for validation.
    Images keep their size unless `size` is given;
    then the shorter side is resized (bilinear, antialiased) and the middle cut out. All become RGB
    unless all are grey. Hidden files are ignored, and so are files that are no images as long as
    they are not the majority.

    Raises DataError: no classes, a class without images, a damaged image, or sizes that differ.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; correct path")
    train, others = path, []
    if _directories(path / "train"):
        train = path / "train"
        others = [path / name for name in TEST_NAMES if _sorted_into_classes(path / name)][:2]
    classes = tuple(folder.name for folder in _directories(train))
    if not classes:
        raise DataError(
            f"{train} holds no folders; put the images of each class into a folder named after it"
        )
    parts = [_part(train, classes, size)]
    for other in others:
        unknown = sorted({folder.name for folder in _directories(other)} - set(classes))
        if unknown:
            raise DataError(f"{other} has class {unknown[0]!r} which {train} has not; rename it")
        parts.append(_part(other, classes, size))
    test, validation = [*parts[1:], None, None][:2]
    return Contents(parts[0], test, classes, validation)


def _sorted_into_classes(path: Path) -> bool:
    """Return whether `path` is a split. Raises DataError if its images are not in folders."""
    if _directories(path) or not path.is_dir():
        return path.is_dir()
    flat = [one for one in path.iterdir() if one.suffix.lower() in SUFFIXES and _visible(one)]
    if flat:
        raise DataError(
            f"{path} holds {len(flat)} images and no folders of classes; put each into a folder"
            " named after its class, or move them away"
        )
    return False


def read_images(path: Path, size: int | None) -> Contents:
    """Return the contents of a directory of images without classes, flat or nested as it may be.

    With images below `train/`, those are for training and those of `test/` (else `val/`) for the
    test split; otherwise every image below `path` is one collection. Sizes are as in `read_folder`.

    Raises DataError: no images, a damaged image, or sizes that differ.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; correct path")
    train, test = path, None
    if (path / "train").is_dir():
        train = path / "train"
        test = next((path / name for name in TEST_NAMES if (path / name).is_dir()), None)
    parts = [read_later(image_files(folder), size) for folder in (train, test) if folder]
    return Contents(parts[0], parts[1] if len(parts) > 1 else None, ("image",))


def read_later(files: list[Path], size: int | None, labels: ArrayLike = 0) -> Part:
    """Return a part of image files that are read when they are asked for."""

    def read(index: Integers) -> Bytes:
        return read_pictures([files[one] for one in index], size)

    return Part(np.array(np.broadcast_to(labels, len(files)), np.int64), read)


def _part(root: Path, classes: tuple[str, ...], size: int | None) -> Part:
    found = {
        label: image_files(root / name)
        for label, name in enumerate(classes)
        if (root / name).is_dir()
    }
    labels = [label for label, files in found.items() for _ in files]
    return read_later([path for files in found.values() for path in files], size, labels)


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted.

    Raises DataError: there are none, or most files are no images.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _visible(path)]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}); add some or remove it"
        )
    if len(images) * 2 < len(files):
        other = next(path for path in files if path.suffix.lower() not in SUFFIXES)
        raise DataError(
            f"{len(files) - len(images)} of {len(files)} files in {folder} are not images, for "
            f"instance {other.name}; correct path or remove them"
        )
    return images


def _directories(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(one for one in path.iterdir() if one.is_dir() and _visible(one))


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))
