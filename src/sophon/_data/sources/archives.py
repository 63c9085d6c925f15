"""The `npz` source: numpy archives of raw or JPEG-packed images, read without pickle."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sophon._base.errors import DataError
from sophon._data.domain import checked
from sophon._data.images import (
    UNREADABLE,
    Bytes,
    Fit,
    Integers,
    opened,
    stack,
)
from sophon._data.labelled import class_names
from sophon._data.splits import Contents, Part, part_of_array

# What damaged headers make numpy and zipfile raise.
_DAMAGED = (
    *(OSError, EOFError, KeyError, IndexError, TypeError, MemoryError, OverflowError, SyntaxError),
    *(RuntimeError, NotImplementedError, struct.error, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error),
)
# What the recipes read.
_OF_RECIPES = {
    *("cifar10.npz", "cifar100.npz", "cifar10_jpeg.npz", "gtsrb10.npz", "mnist.npz"),
    *("orl_faces64.npz", "tiny_imagenet20_64.npz"),
}
_JOINED = "cifar10_unseen.npz"
FORMAT = (
    "x_train, y_train (uint8 images, integer labels); x_val, y_val, x_test, y_test, class_names if"
    " there are"
)


def read_archive(path: Path, fit: Fit, *, coarse: bool = False) -> Contents:
    """Return the contents of an npz file; images become what `fit` says when they are read.

    With `coarse` every label is replaced by its group: `coarse_of_fine` (labels,) has the groups,
    `coarse_names` their names.

    Arrays are `x_train`, `y_train` and, as wished, `x_val`, `y_val` for validation, `x_test`,
    `y_test` and `class_names`. Images are uint8 (n, h, w) or (n, h, w, 3), or JPEG files end to
    end in `x_train_jpeg` with `x_train_offsets` (n + 1,). Nothing in the file is executed: pickled
    arrays are refused.

    Raises DataError: the file is missing, damaged, or does not hold these arrays.
    """
    arrays = _arrays(path)
    if coarse:
        _coarsen(arrays)
    train = _part(arrays, "train", fit)
    held = {split: _there(arrays, split) for split in ("test", "val")}
    parts = {split: _part(arrays, split, fit) if there else None for split, there in held.items()}
    labels = [part.labels for part in (train, *parts.values()) if part is not None]
    names = class_names(_names(arrays), labels)
    return Contents(train, parts["test"], names, parts["val"], _unread(arrays))


def _unread(arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    """Return a remark that names the arrays of which nothing is read, if there are any."""
    known = {name for split in ("train", "val", "test") for name in _own(split)}
    known |= {"class_names", "coarse_of_fine", "coarse_names"}
    unread = sorted(arrays.keys() - known)
    return (f"arrays {', '.join(unread[:5])} not read",) if unread else ()


def _own(split: str) -> tuple[str, ...]:
    return (f"x_{split}", f"y_{split}", f"x_{split}_jpeg", f"x_{split}_offsets")


def _there(arrays: dict[str, NDArray[Any]], split: str) -> bool:
    return any(name in arrays for name in _own(split))


def _coarsen(arrays: dict[str, NDArray[Any]]) -> None:
    for name in ("coarse_of_fine", "coarse_names"):
        if name not in arrays:
            raise DataError(f"labels = 'coarse' needs an array {name} in the archive: remove it")
    groups = arrays["coarse_of_fine"]
    if groups.dtype.kind not in "iu" or groups.ndim != 1:
        raise DataError(f"coarse_of_fine is {groups.dtype} {groups.shape}; give integers (labels,)")
    for name in ("y_train", "y_val", "y_test"):
        if name not in arrays:
            continue
        labels = arrays[name]
        if labels.dtype.kind not in "iu" or labels.size == 0:
            continue  # refused, with the reason, where the split is read
        if labels.min() < 0 or labels.max() >= len(groups):
            raise DataError(
                f"{name} has labels {labels.min()} to {labels.max()} and coarse_of_fine has"
                f" {len(groups)} entries; give one group per label"
            )
        arrays[name] = groups[labels]
    arrays["class_names"] = arrays["coarse_names"]


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        made = dict.fromkeys(_OF_RECIPES, "make_archives.py") | {_JOINED: "withstand/originals.py"}
        script = made.get(path.name)
        how = f", or make it with recipes/{script} (docs/data.md)" if script else ""
        raise DataError(f"there is no file {path}; correct path{how}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; copy or download it again")
    arrays = _loaded(path)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: {name} is not an array; save it with numpy.savez")
    return arrays


def _loaded(path: Path) -> dict[str, Any]:
    try:
        # numpy leaves a file it cannot read open, so it is opened and closed here.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array; give an npz archive with {FORMAT}")
            return {name: archive[name] for name in archive.files}
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise DataError(_damaged(path, error)) from None
        raise DataError(
            f"{path} holds pickled objects or is no npz archive; objects are never loaded, as they "
            f"can run code: save numeric arrays with numpy.savez"
        ) from None
    except _DAMAGED as error:
        raise DataError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    said = " ".join(str(error).split())
    # Some faults quote the bytes they met.
    reason = said if said.isprintable() and len(said) <= 120 else type(error).__name__
    return (
        f"{path} cannot be read as npz, it may be cut off or damaged ({reason}); copy or download"
        " it again"
    )


def _array(arrays: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in arrays:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"the archive has no array {name}; it holds {held}; needed: {FORMAT}")
    return arrays[name]


def _part(arrays: dict[str, NDArray[Any]], split: str, fit: Fit) -> Part:
    if f"x_{split}_jpeg" in arrays and f"x_{split}" not in arrays:
        return _packed_part(arrays, split, fit)
    pixels, labels = checked(_array(arrays, f"x_{split}"), _array(arrays, f"y_{split}"), split)
    return part_of_array(pixels, labels, fit)


def _packed_part(arrays: dict[str, NDArray[Any]], split: str, fit: Fit) -> Part:
    packed, offsets = arrays[f"x_{split}_jpeg"], _array(arrays, f"x_{split}_offsets")
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise DataError(f"x_{split}_jpeg is {packed.dtype} {packed.shape}; give uint8 (bytes,)")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(f"x_{split}_offsets is {offsets.dtype} {offsets.shape}; give int64 (n+1,)")
    steps = np.diff(offsets.astype(np.int64))
    if offsets[0] < 0 or offsets[-1] > len(packed) or (steps <= 0).any():
        raise DataError(
            f"x_{split}_offsets do not ascend from 0 to {len(packed)}, the length of "
            f"x_{split}_jpeg; write the archive again"
        )
    count = len(offsets) - 1
    labels = checked(
        np.broadcast_to(np.uint8(0), (count, 1, 1)), _array(arrays, f"y_{split}"), split
    )[1]

    def read(index: Integers) -> Bytes:
        def name(position: int) -> str:
            return f"{split} image {index[position]}"

        def picture(position: int) -> Bytes:
            one = index[position]
            return _decoded(packed[offsets[one] : offsets[one + 1]].tobytes(), name(position), fit)

        return stack(picture, len(index), name)

    return Part(labels, read)


def _decoded(data: bytes, what: str, fit: Fit) -> Bytes:
    try:
        with opened(io.BytesIO(data)) as picture:
            return fit.pixels(picture)
    except UNREADABLE:
        raise DataError(f"{what} is not a whole JPEG file; write the archive again") from None


def _names(arrays: dict[str, NDArray[Any]]) -> list[str] | None:
    if "class_names" not in arrays:
        return None
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind not in "U":
        raise DataError(f"class_names is {names.dtype} {names.shape}; give text (classes,)")
    return [str(name) for name in names]
