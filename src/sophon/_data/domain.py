"""A domain: three fixed splits of labelled images, their classes and their normalisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sophon._base.errors import DataError
from sophon._data.collecting import labelled
from sophon._data.images import Bytes, Fit, Images, Integers
from sophon._data.labelled import class_names, contents_of
from sophon._data.splits import Contents, Cut, cut, part_of_array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled images of one task, cut once into train, validation and test.

    `classes` are names in label order. `mean` and `std` are per channel, on pixels scaled to
    [0, 1]; None takes the original domain's, or ImageNet's (see `resolve_normalisation`).
    `weight` is the domain's share when a round picks among several restricted ones. `remarks` say
    what was left out, and what was taken for what, when it was read; `fit` how pictures were
    resized, where that is known.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str = "arrays"
    weight: float = 1.0
    remarks: tuple[str, ...] = ()
    fit: Fit | None = None

    def __post_init__(self) -> None:
        channels = self.image_shape[0]
        if channels not in (1, 3):
            raise DataError(f"images have {channels} channels; give grey (1) or RGB (3)")
        check_normalisation(self.mean, self.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        _, channels, height, width = self.train.pixels.shape
        return channels, height, width

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the pixels, labels and shapes of all splits, of the
        normalisation and of the number of classes; names do not count. Computed once.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(json.dumps(list(split.pixels.shape)).encode())
            digest.update(split.pixels.numpy().data)
            digest.update(split.labels.numpy().astype("<i8").data)
        digest.update(json.dumps([self.mean, self.std, self.class_count]).encode())
        return digest.hexdigest()

    @classmethod
    def from_arrays(  # noqa: PLR0913 - one keyword per field of DomainSpec
        cls,
        name: str,
        images: NDArray[Any],
        labels: NDArray[Any] | None = None,
        *,
        test_images: NDArray[Any] | None = None,
        test_labels: NDArray[Any] | None = None,
        validation: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Self:
        """Return the domain of uint8 images (n, h, w) or (n, h, w, 3) with integer labels (n,).

        Without labels all images are of one class, which is enough for a diffusion model.

        The validation split (fraction `validation`) is cut from the training images; without
        test images a test split (fraction `test`) is cut first. `classes` are names.

        Raises DataError: shapes, types, counts or labels do not fit; the message says which.
        """
        bare = labels is None
        if bare:
            labels, classes = np.zeros(len(images), np.int64), classes or ("image",)
            if test_images is not None:
                test_labels = np.zeros(len(test_images), np.int64)
        parts = [checked(images, labels, "training")]
        if (test_images is None) != (test_labels is None):
            raise DataError("test_images and test_labels: give both or neither")
        if test_images is not None and test_labels is not None:
            parts.append(checked(test_images, test_labels, "test"))
        names = class_names(classes, [part_labels for _, part_labels in parts])
        made = [part_of_array(*part, Fit()) for part in parts]
        contents = Contents(made[0], made[1] if len(made) > 1 else None, names)
        splits = cut(contents, Cut(validation, test, split_seed, least_classes=1 if bare else 2))
        return cls(name, **vars(splits), mean=_floats(mean), std=_floats(std))

    @classmethod
    def from_datasets(  # noqa: PLR0913 - one keyword per field of DomainSpec
        cls,
        name: str,
        train: Dataset[Any] | Mapping[str, Dataset[Any]],
        test: Dataset[Any] | None = None,
        *,
        image_size: int | None = None,
        validation: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        columns: tuple[str, str] | None = None,
        on_error: Literal["error", "skip"] = "error",
    ) -> Self:
        """Return the domain of torch datasets of (image, label), read once from start to end.

        Items may be dictionaries, as of Hugging Face datasets: `columns` are their keys of image
        and label, found where they have usual names; the label's class names are the domain's.
        Several splits in a dictionary (a DatasetDict) are used as their names say.
        Hugging Face's image files are opened as those of folders are; `on_error` is of these.
        An image is PIL, uint8, or floating in [0, 1]: tensors (c, h, w) or (h, w), arrays
        (h, w, c) or (h, w). Leave random augmentation and normalisation out of the dataset.

        Raises DataError: as `from_arrays`; also NaN or normalised images, labels that are no
        classes, and items that are neither.
        """
        splits = dict(train) if isinstance(train, Mapping) else {"train": train}
        if test is not None:
            splits["test"] = test
        fit = Fit(image_size)
        contents = contents_of(
            splits, lambda split: labelled(splits[split], fit, columns or (None, None))
        )
        if classes is not None:
            contents = replace(contents, classes=tuple(map(str, classes)))
        made = cut(contents, Cut(validation, test_fraction, split_seed, on_error=on_error))
        made = replace(made, remarks=made.remarks + fit.remarks)
        return cls(name, **vars(made), mean=_floats(mean), std=_floats(std))


def several(given: Any) -> tuple[Any, ...]:
    """Return what was given as one domain or a sequence of them as a tuple, whatever is in it."""
    alone = isinstance(given, str | Mapping) or not isinstance(given, Iterable)
    return (given,) if alone else tuple(given)


def resolve_normalisation(
    domain: Domain,
    fallback: Domain | None,
    default: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (mean, std) that `domain`'s images are normalised with.

    They are the domain's own if given, else those of `fallback` (the original domain: an
    attacker keeps the model's input convention), else the `default`.
    """
    for candidate in (domain, fallback):
        if candidate is not None and candidate.mean is not None and candidate.std is not None:
            return candidate.mean, candidate.std
    return default


def checked(images: Any, labels: Any, what: str) -> tuple[Bytes, Integers]:
    """Return images and labels as they came, labels as int64, if they can be a split.

    Raises DataError: wrong type, shape or count.
    """
    pixels, numbers = np.asarray(images), np.asarray(labels)
    _check_type(pixels, what)
    _check_shape(pixels, what)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(
            f"{what} labels are {numbers.dtype} of shape {numbers.shape}; give integers (n,)"
        )
    if len(pixels) != len(numbers):
        raise DataError(
            f"{len(pixels)} {what} images have {len(numbers)} labels; give one per image"
        )
    return pixels, numbers.astype(np.int64)


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def check_normalisation(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Raise DataError unless both are None, or can be a mean and a std of pixels in [0, 1]."""
    if mean is None or std is None:
        if mean is not std:
            raise DataError(f"mean = {mean} and std = {std}: give both or neither")
        return
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in {1, 3}:
            raise DataError(f"{name} = {list(values)} has {len(values)} values; give 1 or 3")
        if not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
            allowed = "finite and above 0" if name == "std" else "finite"
            raise DataError(f"{name} = {list(values)}; its values must be {allowed}")
        if max(map(abs, values)) > 1:
            raise DataError(
                f"{name} = {list(values)} is of pixels from 0 to 255, and here pixels are scaled to"
                " [0, 1] first: divide mean and std by 255"
            )


def _check_type(pixels: NDArray[Any], what: str) -> None:
    if pixels.dtype == np.uint8:
        return
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise DataError(f"{what} images hold NaN or infinite values; repair or remove them")
        raise DataError(
            f"{what} images are {pixels.dtype}; scale them to 0..255 and convert them to uint8"
        )
    raise DataError(f"{what} images are {pixels.dtype}; give uint8, values 0 to 255")


def _check_shape(pixels: NDArray[Any], what: str) -> None:
    shape = pixels.shape
    if pixels.ndim == 3 or (pixels.ndim == 4 and shape[3] in (1, 3)):
        if not pixels.size:
            raise DataError(f"there are no {what} images (shape {shape}); give some")
        return
    hint = "; transpose(0, 2, 3, 1) them" if pixels.ndim == 4 and shape[1] in (1, 3) else ""
    raise DataError(
        f"{what} images have shape {shape}; give (n, height, width) for grey or "
        f"(n, height, width, 3) for RGB{hint}"
    )
