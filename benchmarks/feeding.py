"""How much of a round is input: gathering, augmenting and normalising batches."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cases import Sizes, protection, quick, rehearsal
from PIL import Image
from timing import Row, alone, row, seconds

from sophon._data import load_domain
from sophon._specs import Augmentation, DomainSpec

# Of each domain: a permutation of few images costs nothing.
IMAGES = 6_000
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "flip_crop")


def share(
    name: str, sizes: Sizes, size: int, repeats: int, augmentation: Augmentation
) -> list[float]:
    """Return the percentage of each round that the feeds of another such round take alone.

    Round and feeds augment alike, and an attacker's feed is a new one every time, as in a round.
    """
    run = protection(name, sizes, size=size, count=IMAGES, augmentation=augmentation)
    rounds, attackers = iter(run), rehearsal(run)
    next(rounds)

    def fed(identity: int) -> None:
        feed = attackers.feed(identity, attackers.strategy(identity))
        for step in range(sizes.steps):
            feed.batch(step)
        run.keep.feed.batch(identity)

    fed(0)
    return [
        100 * seconds(lambda: fed(identity)) / seconds(lambda: next(rounds))  # noqa: B023
        for identity in range(1, repeats + 1)
    ]


def folder_seconds(images: int, size: int) -> tuple[float, float]:
    """Return how long a folder of JPEG files takes to load: the first and the second time."""
    with tempfile.TemporaryDirectory() as name:
        random = np.random.default_rng(0)
        for index in range(images):
            place = Path(name, "train", str(index % 2))
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.jpg")
        spec = DomainSpec(source="folder", path=name, image_size=size)
        with mock.patch.dict(os.environ, {"SOPHON_CACHE": str(Path(name, ".kept"))}):
            return seconds(lambda: load_domain(spec)), seconds(lambda: load_domain(spec))


def rows(short: bool) -> list[Row]:
    """Return the shares of input, and what the second load of a folder takes of the first."""
    sizes, repeats, images = (quick(Sizes()), 1, 40) if short else (Sizes(5), 3, 300)
    found = []
    for name, size in (("ResNet-20", 32), ("small network", 16)):
        for augmentation in AUGMENTATIONS:
            what = f"input / round: {name}, {size}x{size}, augmentation {augmentation}"
            values = share(name, sizes, size, repeats, augmentation)
            found.append(row(what, values, at_most=3, unit=" %"))
    first, second = folder_seconds(images, 64)
    what = f"second / first load of a folder of {images} JPEG files of 256x256, at 64x64"
    note = f"{first:.2f} s, then {second:.2f} s"
    found.append(row(what, [second / first], note=note))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    alone(rows)
