"""Conventions of known domains, as data: class orders, and means and standard deviations."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sophon._base.errors import DataError

# The ten ImageNet classes of ImageNette, by WordNet id, in the order of its folders.
IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}

# Each place holds the names that one class goes by. CIFAR-10 and STL-10 share nine classes, in
# different orders; CIFAR's frog and STL's monkey have no counterpart and take each other's place,
# so that a head made for one data set has ten classes of the other. CINIC-10 has CIFAR's names.
CLASS_ORDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cifar10": (
        ("airplane",),
        ("automobile", "car"),
        ("bird",),
        ("cat",),
        ("deer",),
        ("dog",),
        ("frog", "monkey"),
        ("horse",),
        ("ship",),
        ("truck",),
    ),
    "stl10": (
        ("airplane",),
        ("bird",),
        ("car", "automobile"),
        ("cat",),
        ("deer",),
        ("dog",),
        ("horse",),
        ("monkey", "frog"),
        ("ship",),
        ("truck",),
    ),
    "imagenette": tuple((wnid, name) for wnid, name in IMAGENETTE.items()),
}


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation on pixels scaled to [0, 1], and their source."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


NORMALISATIONS: dict[str, Normalisation] = {
    "imagenet": Normalisation(
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "torchvision's and timm's ImageNet weights; also right for ImageNette",
    ),
    "cifar10": Normalisation(
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "pixels of the 50,000 training images"
    ),
    "cifar100": Normalisation(
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "pixels of the 50,000 training images"
    ),
    "cinic10": Normalisation(
        (0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587), "the data set's own README"
    ),
    "stl10": Normalisation(
        (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), "pixels of the 5,000 training images"
    ),
    "svhn": Normalisation(
        (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "pixels of the 73,257 training images"
    ),
    "mnist": Normalisation((0.1307,), (0.3081,), "pixels of the 60,000 training images"),
    "fashion_mnist": Normalisation((0.2860,), (0.3530,), "pixels of the 60,000 training images"),
    "symmetric": Normalisation(
        (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "[-1, 1], as diffusion models take it; CelebA and FFHQ"
    ),
}


def normalisation_of(name: str) -> Normalisation:
    """Return a named normalisation. Raises DataError, listing those there are."""
    if name not in NORMALISATIONS:
        raise DataError(_unknown("normalisation", name, list(NORMALISATIONS)))
    return NORMALISATIONS[name]


def ordered_classes(names: tuple[str, ...], order: str) -> tuple[int, ...]:
    """Return, for each place of a class order, which of `names` (in label order) belongs there.

    Classes that the order does not name are left out. Raises DataError for an order that does not
    exist and for a place that no class fills.
    """
    if order not in CLASS_ORDERS:
        raise DataError(_unknown("class_order", order, list(CLASS_ORDERS)))
    found = {name: label for label, name in enumerate(names)}
    chosen = []
    for synonyms in CLASS_ORDERS[order]:
        labels = [found[name] for name in synonyms if name in found]
        if not labels:
            raise DataError(
                f"class_order = {order!r} needs a class {' or '.join(synonyms)}; the classes are "
                f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
            )
        chosen.append(labels[0])
    return tuple(chosen)


def _unknown(key: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {key} {name!r}; {hint}known: {', '.join(known)}"
