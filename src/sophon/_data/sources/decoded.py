"""Decoded pictures, kept on the disk between runs where the user says so.

With `SOPHON_CACHE=FOLDER` in the environment, image files are decoded and resized once per size;
a later run reads the pixels. An entry is named after every file's path, length and time of change,
so a changed file is read anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from sophon._base.errors import CheckpointError
from sophon._base.files import require_writable, temporary_beside
from sophon._data.images import Bytes, Fit, open_picture, stack

# Raise this when the same file gives other pixels.
_VERSION = 1
_REMEDY = "name another folder in SOPHON_CACHE, or unset it"


def read_pictures(files: list[Path], fit: Fit) -> Bytes:
    """Return image files as one array, each as `fit` says: (n, h, w) if all are grey, else RGB.

    Raises CheckpointError: the folder of decoded pictures cannot be written. DataError: a
    damaged image, or sizes that differ.
    """
    folder = os.environ.get("SOPHON_CACHE")
    if not folder:
        return _decoded(files, fit)
    entry = Path(folder) / f"{_name(files, fit)}.npy"
    try:
        with entry.open("rb") as file:
            held: Bytes = np.load(file, allow_pickle=False)
            fit.transparent[True] += int(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError):  # not there yet, or damaged
        require_writable(entry.parent, remedy=_REMEDY)
        before = fit.transparent[True]
        held = _decoded(files, fit)
        _keep(entry, held, fit.transparent[True] - before)
    return held


def _decoded(files: list[Path], fit: Fit) -> Bytes:
    return stack(
        lambda position: open_picture(files[position], fit),
        len(files),
        lambda position: str(files[position]),
    )


def _name(files: list[Path], fit: Fit) -> str:
    # The size alone stood here before there was more to say.
    how = (
        fit.size
        if fit == Fit(fit.size)
        else [getattr(fit, one.name) for one in fields(fit) if one.compare]
    )
    about = []
    for path in files:
        status = path.stat()
        about.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([_VERSION, how, about]).encode()).hexdigest()


def _keep(entry: Path, pixels: Bytes, transparent: int) -> None:
    # Whole or not at all: another process may read at any moment.
    temporary = temporary_beside(entry)
    try:
        with temporary.open("wb") as file:
            for held in (pixels, np.int64(transparent)):
                np.save(file, held, allow_pickle=False)
        temporary.replace(entry)
    except OSError as error:
        raise CheckpointError(
            f"decoded pictures cannot be kept in {entry.parent} ({error}): make room or {_REMEDY}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
