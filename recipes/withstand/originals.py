"""Join the two archives of CIFAR-10 into one whose validation images no network was trained on.

    python recipes/withstand/originals.py $SOPHON_DATA cifar10_unseen.npz

A network that was trained on all of CIFAR-10's training images knows any validation split that is
cut from them by heart, and a price that is led by it is misled. The joined archive trains on the
training images of both, validates on the test images of `cifar10_jpeg.npz` and tests on those of
`cifar10.npz`: the two share no image.
"""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXACT, PACKED = "cifar10.npz", "cifar10_jpeg.npz"


def joined(folder: Path) -> dict[str, Any]:
    """Return the arrays of the joined archive."""
    with np.load(folder / EXACT) as exact, np.load(folder / PACKED) as packed:
        return {
            "x_train": np.concatenate([exact["x_train"], unpacked(packed, "train")]),
            "y_train": np.concatenate([exact["y_train"], packed["y_train"]]),
            "x_val": unpacked(packed, "test"),
            "y_val": packed["y_test"],
            "x_test": exact["x_test"],
            "y_test": exact["y_test"],
            "class_names": exact["class_names"],
        }


def unpacked(archive: Any, split: str) -> NDArray[np.uint8]:
    """Return the images of a split that lie as JPEG files end to end, (n, h, w, 3)."""
    data, ends = archive[f"x_{split}_jpeg"].tobytes(), archive[f"x_{split}_offsets"]
    files = (data[a:b] for a, b in itertools.pairwise(ends))
    return np.stack([_decoded(file) for file in files])


def _decoded(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file), formats=("JPEG",)) as picture:
        return np.asarray(picture.convert("RGB"))


def main(arguments: list[str]) -> None:
    """Write the joined archive."""
    if len(arguments) != 2:
        sys.exit("usage: python recipes/withstand/originals.py FOLDER ARCHIVE.npz")
    folder, target = map(Path, arguments)
    missing = [file for file in (folder / EXACT, folder / PACKED) if not file.is_file()]
    if missing:
        sys.exit(f"there is no file {missing[0]}; make it with recipes/make_archives.py")
    np.savez_compressed(target, **joined(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
