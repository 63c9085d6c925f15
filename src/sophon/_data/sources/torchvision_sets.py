"""The `torchvision` source: its dataset classes, with their downloads and checksums."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sophon._base.errors import DataError, first_line, unknown
from sophon._base.torchvision_patch import installing, prepare_torchvision
from sophon._data.images import UNREADABLE, Bytes, Fit, Integers, from_item, opened, stack
from sophon._data.sources.conventions import SETS
from sophon._data.sources.downloads import expected_files, fault, summary
from sophon._data.splits import Contents, Part

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Entry:
    """How to open a torchvision dataset, and where it keeps labels and class names.

    `train` and `test` are the keyword arguments that choose a split. `variant` is the keyword
    that takes what follows a colon in the name, with its default. `labels` is the attribute with
    one label, or one (path, label) pair, per image. `get` is where it comes from, `counts` the
    images of the two splits where no checksum tells a whole copy.
    """

    labels: str
    get: str
    train: dict[str, Any] = field(default_factory=lambda: {"split": "train"})
    test: dict[str, Any] = field(default_factory=lambda: {"split": "test"})
    classes: tuple[str, ...] = ()
    counts: tuple[int, int] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    variant: tuple[str, str] | None = None


_DOWNLOAD = "set download = true"


def _entry(held: dict[str, Any]) -> Entry:
    made: dict[str, Any] = {key: tuple(held[key]) for key in ("counts", "variant") if key in held}
    return Entry(**{**held, **made, "classes": tuple(map(str, range(held.get("classes", 0))))})


DATASETS = {name: _entry(held) for name, held in SETS["torchvision"].items()}


def read_torchvision(name: str, root: Path, *, download: bool, fit: Fit) -> Contents:
    """Return the contents of a torchvision dataset kept under `root`.

    `name` is a key of `DATASETS`. `Imagenette:160px` chooses a size (else 320px), and
    `CelebA:Smiling` the attribute that is the label (else Male, classes `not Male`, `Male`);
    identities cannot be labels, as CelebA's test images show other people. With `download`,
    what is missing is fetched and compared with torchvision's checksums.

    Raises DataError: an unknown name, absent or damaged files, or no torchvision.
    """
    key, _, variant = name.partition(":")
    if key not in DATASETS:
        raise DataError(unknown("torchvision dataset", name, DATASETS, any_case=True))
    entry = DATASETS[key]
    if variant and entry.variant is None:
        raise DataError(f"torchvision dataset {key} has no variants; write {key!r}, not {name!r}")
    train = _opened(key, "train", variant, root, download)
    test = _opened(key, "test", variant, root, download)
    attribute = _attribute(train, variant or "Male") if key == "CelebA" else None
    parts = [_part(dataset, entry, fit, attribute) for dataset in (train, test)]
    _check_whole(key, variant, root, parts)
    return Contents(parts[0], parts[1], _class_names(train, entry, attribute, parts))


def _opened(key: str, split: SplitName, variant: str, root: Path, download: bool) -> Any:
    entry = DATASETS[key]
    arguments = dict(entry.train if split == "train" else entry.test) | entry.fixed
    if entry.variant is not None and entry.variant[0] == "size":
        arguments["size"] = variant or entry.variant[1]
    try:
        datasets = _torchvision_datasets()
        return getattr(datasets, key)(root=str(root), download=download, **arguments)
    except ImportError as error:
        raise DataError(
            f"{key} needs {error.name or 'torchvision'}: {installing('vision')} scipy"
        ) from None
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, AssertionError) as error:
        reason = first_line(error, 1000)
        raise _unusable(key, split, variant, root, download, reason) from None


def _unusable(
    key: str, split: str, variant: str, root: Path, download: bool, reason: str
) -> DataError:
    """Return the error that says what is wrong, what is expected where, and the remedy."""
    kind = getattr(_torchvision_datasets(), key)
    expected = expected_files(kind, variant if DATASETS[key].variant else "")
    found = fault(root, expected, checksums=True) or f"it cannot be read, {reason}"
    remedy = "check the network" if download else _DOWNLOAD
    return DataError(
        f"{key} ({split}) is not usable in root = {str(root)!r}: {found}; expected there:"
        f" {summary(expected)}; correct root, {remedy}, or get it from {DATASETS[key].get}"
    )


def _check_whole(key: str, variant: str, root: Path, parts: list[Part]) -> None:
    """Raise DataError for a copy that opens and yet is not whole."""
    kind, entry = getattr(_torchvision_datasets(), key), DATASETS[key]
    expected = expected_files(kind, variant if entry.variant else "")
    found = fault(root, expected, checksums=False)
    for part, count in zip(parts, entry.counts or (), strict=False):
        if found is None and len(part.labels) != count:
            found = f"{len(part.labels)} images where a whole copy has {count}, a partial download"
    if found is not None:
        raise DataError(
            f"{key} in root = {str(root)!r}: {found}; delete it and {_DOWNLOAD}, or get it from"
            f" {entry.get}"
        )


def _torchvision_datasets() -> Any:
    prepare_torchvision()
    return importlib.import_module("torchvision.datasets")


def _attribute(dataset: Any, name: str) -> tuple[int, str]:
    names = [one for one in dataset.attr_names if one]
    if name not in names:
        raise DataError(f"CelebA has no attribute {name!r}; known: {', '.join(names)}")
    return names.index(name), name


def _part(dataset: Any, entry: Entry, fit: Fit, attribute: tuple[int, str] | None) -> Part:
    held = getattr(dataset, entry.labels)
    if entry.labels == "_samples":
        held = [label for _, label in held]
    labels = np.asarray(held)
    if attribute is not None:
        labels = labels[:, attribute[0]]

    def read(index: Integers) -> Bytes:
        return stack(
            lambda position: _picture(dataset, int(index[position]), fit),
            len(index),
            lambda position: f"image {index[position]}",
        )

    return Part(labels.astype(np.int64), read)


def _picture(dataset: Any, index: int, fit: Fit) -> Bytes:
    try:
        path = _file(dataset, index)
        if path is None:
            return from_item(dataset[index][0], fit)
        with opened(path) as picture:
            return from_item(picture.convert("RGB"), fit)
    except UNREADABLE as error:
        raise DataError(
            f"image {index} of {type(dataset).__name__} cannot be read ({error}); download it again"
        ) from None


def _file(dataset: Any, index: int) -> Path | None:
    """Return the image file that torchvision would open, whatever its format; None for arrays."""
    if hasattr(dataset, "_samples"):
        return Path(dataset._samples[index][0])
    if hasattr(dataset, "attr_names"):  # CelebA
        name: str = dataset.filename[index]
        return Path(dataset.root, dataset.base_folder, "img_align_celeba", name)
    return None


def _class_names(
    dataset: Any, entry: Entry, attribute: tuple[int, str] | None, parts: list[Part]
) -> tuple[str, ...]:
    if attribute is not None:
        return f"not {attribute[1]}", attribute[1]
    if entry.classes:
        return entry.classes
    if hasattr(dataset, "classes"):
        names = [name if isinstance(name, str) else name[0] for name in dataset.classes]
        return tuple(names)
    return tuple(str(label) for label in range(max(int(part.labels.max()) for part in parts) + 1))
