"""A domain: three fixed splits of labelled images, their classes and their normalisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sophon._base.errors import DataError
from sophon._data.images import Bytes, Images, Integers, from_item, stack
from sophon._data.splits import Contents, Cut, cut, part_of_array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What images and labels are called in Hugging Face datasets.
_USUAL = (("image", "img", "pixel_values"), ("label", "labels", "target"))


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled images of one task, cut once into train, validation and test.

    `classes` are names in label order. `mean` and `std` are per channel, on pixels scaled to
    [0, 1]; None takes the original domain's, or ImageNet's (see `resolve_normalisation`).
    `weight` is the domain's share when a round picks among several restricted ones. `remarks` say
    what was left out, and what was taken for what, when it was read.
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
        made = [part_of_array(*part, None) for part in parts]
        contents = Contents(made[0], made[1] if len(made) > 1 else None, names)
        splits = cut(contents, Cut(validation, test, split_seed, least_classes=1 if bare else 2))
        return cls(name, **vars(splits), mean=_floats(mean), std=_floats(std))

    @classmethod
    def from_datasets(  # noqa: PLR0913 - one keyword per field of DomainSpec
        cls,
        name: str,
        train: Dataset[Any],
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
    ) -> Self:
        """Return the domain of torch datasets of (image, label), read once from start to end.

        Items may be dictionaries, as of Hugging Face datasets: `columns` are their keys of image
        and label, found where they have usual names; the label's class names are the domain's.
        An image is PIL, uint8, or floating in [0, 1]: tensors (c, h, w) or (h, w), arrays
        (h, w, c) or (h, w). Leave random augmentation and normalisation out of the dataset.

        Raises DataError: as `from_arrays`; also NaN or normalised images, labels that are not
        integers, and items that are neither.
        """
        images, labels = collect(train, image_size, columns)
        tested = (None, None) if test is None else collect(test, image_size, columns)
        classes = classes or names_of(train, columns)
        return cls.from_arrays(
            name,
            images,
            labels,
            test_images=tested[0],
            test_labels=tested[1],
            validation=validation,
            test=test_fraction,
            split_seed=split_seed,
            classes=classes,
            mean=mean,
            std=std,
        )


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


def class_names(names: Sequence[str] | None, labels: Sequence[Integers]) -> tuple[str, ...]:
    """Return `names`, or the numbers up to the highest label.

    Raises DataError: labels reach beyond the number of images, so they are no class numbers.
    """
    if names is not None:
        return tuple(str(name) for name in names)
    highest = max((int(part.max()) for part in labels if len(part)), default=0)
    count = sum(len(part) for part in labels)
    if highest >= max(count, 2):
        raise DataError(
            f"label {highest} is out of range: there are {count} images; number classes from 0"
        )
    return tuple(str(number) for number in range(highest + 1))


def collect(
    dataset: Dataset[Any], size: int | None, columns: tuple[str, str] | None = None
) -> tuple[Bytes, Integers]:
    """Return every image and label of a dataset, map-style or iterable, of pairs or dictionaries.

    Raises DataError: as `Domain.from_datasets`.
    """
    if isinstance(dataset, Mapping):
        raise DataError(
            f"a dictionary of {', '.join(map(repr, dataset))} is no dataset; give one of them, as"
            f" in data[{next(iter(dataset), 'train')!r}]"
        )
    if hasattr(dataset, "__len__"):
        # Map-style datasets need not stop at their end when iterated.
        items: Iterator[Any] = (dataset[index] for index in range(len(dataset)))
    else:
        items = iter(cast(Iterable[Any], dataset))
    pictures: list[Bytes] = []
    labels: list[int] = []
    for item in items:
        image, label = _pair(item, columns, len(pictures))
        pictures.append(_numbered(image, size, len(pictures)))
        labels.append(as_label(label))
    return stack(pictures, len(pictures)), np.array(labels, dtype=np.int64)


def _pair(item: Any, columns: tuple[str, str] | None, index: int) -> tuple[Any, Any]:
    """Return an item's image and label."""
    if isinstance(item, Mapping):
        image, label = _columns(item, columns)
        return item[image], item[label]
    if not isinstance(item, tuple | list) or len(item) != 2:
        held = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(
            f"item {index} is a {type(item).__name__}{held}; give (image, label) pairs, or"
            " dictionaries of both"
        )
    return item[0], item[1]


def _columns(names: Iterable[str], columns: tuple[str, str] | None) -> tuple[str, str]:
    """Return which of an item's keys are its image and its label. Raises DataError."""
    held = list(names)
    wanted = _USUAL if columns is None else tuple((name,) for name in columns)
    found = [next((name for name in usual if name in held), None) for usual in wanted]
    if len(found) != 2 or found[0] is None or found[1] is None:
        raise DataError(
            f"items are dictionaries of {', '.join(map(repr, held))}; name their image and label,"
            " as in columns = ('image', 'label')"
        )
    return found[0], found[1]


def names_of(dataset: Dataset[Any], columns: tuple[str, str] | None) -> Sequence[str] | None:
    """Return the class names that a Hugging Face dataset has for its labels, if any."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    return getattr(features[_columns(features, columns)[1]], "names", None)


def as_label(label: Any) -> int:
    """Return a dataset's label as an integer.

    Raises DataError: it is a fraction, text or a vector.
    """
    value = np.asarray(label)
    if value.size != 1 or value.dtype.kind not in "iub":
        raise DataError(f"a label is {label!r}; give one integer per image")
    return int(value.reshape(()))


def _numbered(image: Any, size: int | None, index: int) -> Bytes:
    try:
        return from_item(image, size)
    except DataError as error:
        raise DataError(f"item {index}: {error}") from None


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
