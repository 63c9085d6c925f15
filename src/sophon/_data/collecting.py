"""Datasets in Python: torch's, of pairs or dictionaries, and Hugging Face's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sophon._base.errors import DataError, shortened
from sophon._data.images import Bytes, Fit, Integers, from_item, resized, stack
from sophon._data.labelled import Labelled

# What images and labels are called in Hugging Face datasets.
_USUAL = (("image", "img", "pixel_values"), ("label", "labels", "target"))
# What image and label are called; None for what is usual.
Columns = tuple[str | None, str | None]


def labelled(
    dataset: Any, fit: Fit, columns: Columns = (None, None), within: Path | None = None
) -> Labelled:
    """Return the images and labels of a dataset, map-style or iterable, of pairs or dictionaries.

    The files of Hugging Face's are opened as those of folders are, never by their own decoder; of
    a map-style one images are read when they are asked for, where files of them have paths only
    those `within` a folder, if it is given. Others are read once.

    Raises DataError: items are neither, or images or labels are none.
    """
    names, undecoded = _undecoded(dataset, columns)
    if undecoded is not None:
        dataset = undecoded
        # In memory and on the disk, but not while it streams.
        if hasattr(dataset, "__len__"):
            return _of_table(dataset, names, fit, columns, within)
    pictures: list[Bytes] = []
    labels: list[Any] = []
    for item in _items(dataset):
        image, label = _pair(item, columns, len(pictures))
        pictures.append(_numbered(image, fit, len(pictures)))
        labels.append(label)
    pixels = stack(pictures.__getitem__, len(pictures))
    return Labelled(labels, lambda index: resized(pixels[index], Fit()), names)


def _of_table(
    dataset: Any, names: list[str] | None, fit: Fit, columns: Columns, within: Path | None
) -> Labelled:
    """Return a Hugging Face dataset of which images are read later."""
    image, label = columns_of(dataset.column_names, columns)
    if not len(dataset):
        raise DataError("the dataset is empty: no images; give at least one")

    def read(index: Integers) -> Bytes:
        def name(position: int) -> str:
            return f"image {index[position]}"

        def picture(position: int) -> Bytes:
            held = dataset[int(index[position])][image]
            if isinstance(held, list):
                held = np.array(held, dataset.features[image].dtype)
            return from_item(held, fit, name(position), within)

        return stack(picture, len(index), name)

    return Labelled(dataset[label][:], read, names)


def _undecoded(dataset: Any, columns: Columns) -> tuple[list[str] | None, Any]:
    """Return the class names that a Hugging Face dataset has, if any, and the dataset with its
    images as files; None for another dataset, or one that a function of the caller's changes.

    Raises DataError: a column holds several images or labels each.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None, None
    image, label = columns_of(features, columns)
    names = getattr(features[label], "names", None)
    library = sys.modules.get("datasets")
    if library is None or not isinstance(dataset, library.Dataset | library.IterableDataset):
        return names, None
    form = getattr(dataset, "format", {})
    # What a file names as one is no function.
    if form.get("type") == "custom" and callable(form["format_kwargs"].get("transform")):
        return names, None
    plain = (library.Value, library.ClassLabel)
    # What is within another column would be decoded.
    usual = (library.Image, library.Array2D, library.Array3D, library.Value)
    if not isinstance(features[image], usual) and not _is_file(features[image]):
        raise DataError(
            f"{image} is {shortened(features[image])}: give a column of one image file each"
        )
    if not isinstance(features[label], plain):
        raise DataError(
            f"{label} is {shortened(features[label])}: several labels for one image (multi-label)"
            " are not supported; give a column of one integer or name each"
        )
    dataset = dataset.select_columns([image, label]).with_format(None)
    if isinstance(features[image], library.Image):
        dataset = dataset.cast_column(image, library.Image(decode=False))
    return names, dataset


def _is_file(feature: Any) -> bool:
    return isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}


def _items(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "__len__"):
        # Map-style datasets need not stop at their end when iterated.
        return (dataset[index] for index in range(len(dataset)))
    return iter(dataset)


def _pair(item: Any, columns: Columns, index: int) -> tuple[Any, Any]:
    """Return an item's image and label."""
    if isinstance(item, Mapping):
        image, label = columns_of(item, columns)
        return item[image], item[label]
    if not isinstance(item, tuple | list) or len(item) != 2:
        held = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(
            f"item {index} is a {type(item).__name__}{held}; give (image, label) pairs, or"
            " dictionaries of both"
        )
    return item[0], item[1]


def columns_of(names: Iterable[str], columns: Columns) -> tuple[str, str]:
    """Return which of an item's keys are its image and its label. Raises DataError."""
    held = list(names)
    wanted = [
        usual if name is None else (name,) for usual, name in zip(_USUAL, columns, strict=True)
    ]
    found = [next((name for name in names if name in held), None) for names in wanted]
    if len(found) != 2 or found[0] is None or found[1] is None:
        raise DataError(
            f"items are dictionaries of {shortened(', '.join(map(repr, held)))}; name their image"
            " and label: columns = ('image', 'label'), in a run file image_column and label_column"
        )
    return found[0], found[1]


def _numbered(image: Any, fit: Fit, index: int) -> Bytes:
    try:
        return from_item(image, fit)
    except DataError as error:
        raise DataError(f"item {index}: {error}") from None
