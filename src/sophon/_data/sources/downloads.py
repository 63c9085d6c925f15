"""What torchvision's data sets consist of on a disk, and what is wrong with a copy of one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGNS = 43


@dataclass(frozen=True)
class Expected:
    """A file or folder below the root; `md5` is the published checksum where there is one."""

    path: str
    md5: str | None = None
    folder: bool = False


def expected_files(kind: Any, variant: str = "") -> tuple[Expected, ...]:
    """Return what the torchvision data set `kind` (a class) needs below its root.

    Checksums are torchvision's own.
    """
    name = kind.__name__
    if hasattr(kind, "train_list"):
        return _of_lists(kind)
    if hasattr(kind, "split_list"):
        splits = [kind.split_list[name] for name in ("train", "test")]
        return tuple(Expected(file, md5) for _, file, md5 in splits)
    if hasattr(kind, "file_list"):
        held = [(file, md5) for _, md5, file in kind.file_list if file.endswith(".txt")]
        texts = [Expected(f"{kind.base_folder}/{file}", md5) for file, md5 in held]
        return (*texts, Expected(f"{kind.base_folder}/img_align_celeba", folder=True))
    if hasattr(kind, "resources"):
        files = [Path(file).stem for file, _ in kind.resources]
        return tuple(Expected(f"{name}/raw/{file}") for file in files)
    if name == "Imagenette":
        top = Path(kind._ARCHIVES[variant or "320px"][0]).stem
        pairs = [(split, wnid) for split in ("train", "val") for wnid in kind._WNID_TO_CLASS]
        return tuple(Expected(f"{top}/{split}/{wnid}", folder=True) for split, wnid in pairs)
    training = [f"gtsrb/GTSRB/Training/{sign:05}" for sign in range(SIGNS)]
    places = [*training, "gtsrb/GTSRB/Final_Test/Images"]
    tested = Expected("gtsrb/GT-final_test.csv")
    return (tested, *(Expected(place, folder=True) for place in places))


def _of_lists(kind: Any) -> tuple[Expected, ...]:
    listed = [*kind.train_list, *kind.test_list]
    meta = getattr(kind, "meta", None)
    if meta is not None:
        listed.append((meta["filename"], meta["md5"]))
    names = getattr(kind, "class_names_file", None)
    if names is not None:
        listed.append((names, None))
    return tuple(Expected(f"{kind.base_folder}/{name}", md5) for name, md5 in listed)


def fault(root: Path, expected: tuple[Expected, ...], *, checksums: bool) -> str | None:
    """Return what is wrong with the copy below `root`, or None: a file or folder that is absent
    or empty or, with `checksums`, is not what was published.
    """
    for one in expected:
        path = root / one.path
        if not (path.is_dir() if one.folder else path.is_file()):
            return f"{one.path} is missing"
        empty = not any(path.iterdir()) if one.folder else not path.stat().st_size
        if empty:
            return f"{one.path} is empty, a partial download"
        if checksums and one.md5 is not None and _md5(path) != one.md5:
            size = path.stat().st_size
            return (
                f"{one.path} ({size:,} bytes) does not have the published checksum, it is damaged"
                " or a partial download"
            )
    return None


def summary(expected: tuple[Expected, ...]) -> str:
    """Return what is expected below the root, the first and the last of a long list."""
    names = [one.path for one in expected]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
