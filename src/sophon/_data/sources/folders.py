"""The `folder` source: directories of image files, one per class or without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sophon._base.errors import DataError, brief
from sophon._data.images import Bytes, Fit, Integers, suffixes
from sophon._data.sources.decoded import read_pictures
from sophon._data.split_names import TESTS, TRAINING, precedence, split_of
from sophon._data.splits import Contents, Part

_LINK = "links that lead nowhere"
# Beside the files of a data set that `datasets` saved.
_SAVED = ("dataset_dict.json", "state.json")


def read_folder(path: Path, fit: Fit) -> Contents:
    """Return the contents of a directory with one directory of images per class.

    Classes are in sorted order. With `train/` below `path`, its classes are for training and those
    of `test/` (else `val/`) for the test split; where there are both, `val/` is for validation.
    Other usual names do as well, in any case and as a word of a longer name (`seg_train`).
    Images become what `fit` says. All become RGB
    unless all are grey. Links to folders are followed. Hidden files are ignored, and files that are
    no images are left out as long as they are not the majority; `remarks` say so.

    Raises DataError: no classes, a class without images, a damaged image, or sizes that differ.
    """
    layout = _layout(path, nested=True)
    train = layout.train
    classes = tuple(folder.name for folder in directories(train))
    if not classes:
        raise DataError(
            f"{train} holds no folders; put the images of each class into a folder named after it,"
            " or name their classes in a labels.csv of file_name and label beside them"
        )
    left_out: Counter[str] = Counter()
    parts = [_part(train, classes, fit, left_out)]
    for other in layout.held:
        unknown = sorted({folder.name for folder in directories(other)} - set(classes))
        if unknown:
            raise DataError(f"{other} has class {unknown[0]!r} which {train} has not; rename it")
        parts.append(_part(other, classes, fit, left_out))
    test, validation = [*parts[1:], None, None][:2]
    remarks = (*layout.remarks, *_splits_within(train, classes), *_counted(left_out))
    return Contents(parts[0], test, classes, validation, remarks)


def read_images(path: Path, fit: Fit) -> Contents:
    """Return the contents of a directory of images without classes, flat or nested as it may be.

    With images below `train/`, those are for training and those of `test/` and `val/` as in
    `read_folder`; otherwise every image below `path` is one collection. So are sizes.

    Raises DataError: no images, a damaged image, or sizes that differ.
    """
    layout = _layout(path, nested=False)
    left_out: Counter[str] = Counter()
    parts = []
    for folder in (layout.train, *layout.held):
        files, others = sorted_out(folder)
        left_out += others
        parts.append(read_later(files, fit))
    test, validation = [*parts[1:], None, None][:2]
    remarks = (*layout.remarks, *_counted(left_out))
    return Contents(parts[0], test, ("image",), validation, remarks)


@dataclass(frozen=True)
class _Layout:
    """The folders of the splits, the held-out ones with that for testing first."""

    train: Path
    held: list[Path] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def _layout(path: Path, *, nested: bool) -> _Layout:
    """Return which folders of `path` are splits; `path` alone where none is for training.

    A name says so if it is a split's own, or has one as a word and a counterpart beside it. With
    `nested` a split has folders of classes. Raises DataError where `path` or its classes are not
    there.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; correct path")
    if any((path / name).is_file() for name in _SAVED) and any(path.rglob("*.arrow")):
        raise DataError(
            f"{path} is a saved Hugging Face data set: set source = 'datasets' in a run file"
            " (`init` and `try` read folders of images alone)"
        )
    folders = directories(path)
    named = sorted(
        (one for one in folders if split_of(one.name)), key=lambda one: precedence(one.name)
    )
    held = [one for one in named if split_of(one.name) not in TRAINING]
    train = next(
        (one for one in named if one not in held and (directories(one) or not nested)), None
    )
    if train is None or not (held or precedence(train.name)[0] == 0):
        alike = f"{_names(named)} look like splits and are taken for classes"
        return _Layout(path, remarks=(alike,) if nested and len(named) > 1 else ())
    # One folder for testing and one for validation; of several of a kind the plainest.
    kinds: dict[bool, Path] = {}
    for one in map(_inner, held):
        if not nested or _sorted_into_classes(one):
            kinds.setdefault(split_of(one.name) not in TESTS, one)
    used = [kinds[kind] for kind in sorted(kinds)]
    roles = [(train, "training"), *zip(used, ("test", "validation"), strict=False)]
    remarks = [", ".join(f"{one.relative_to(path)}/ for {role}" for one, role in roles)]
    tops = {train, *(path / one.relative_to(path).parts[0] for one in used)}
    unused = [one for one in folders if one not in tops]
    if unused:
        remarks.append(f"{_names(unused)} not read")
    return _Layout(_inner(train), used, tuple(remarks))


def _inner(folder: Path) -> Path:
    """Return the folder of a split's own name that is all that it holds, as archives unpack."""
    below = directories(folder)
    same = len(below) == 1 and split_of(below[0].name) == split_of(folder.name)
    return _inner(below[0]) if same else folder


def _splits_within(train: Path, classes: tuple[str, ...]) -> Iterator[str]:
    """Yield a remark where the folders of a class are splits: all of its images are one class."""
    for name in classes:
        named = [one for one in directories(train / name) if split_of(one.name)]
        if len(named) > 1:
            yield f"{_names(named)} in {name} look like splits; their images are not kept apart"
            return


def _sorted_into_classes(path: Path) -> bool:
    """Return whether `path` is a split. Raises DataError if its images are not in folders."""
    if directories(path):
        return True
    flat = sum(is_image(one) for one in path.iterdir())
    if flat:
        raise DataError(
            f"{path} holds {flat} images and no folders of classes; put each into a folder"
            " named after its class, or move them away"
        )
    return False


def read_later(files: list[Path], fit: Fit, labels: ArrayLike = 0) -> Part:
    """Return a part of image files that are read when they are asked for."""

    def read(index: Integers) -> Bytes:
        return read_pictures([files[one] for one in index], fit)

    return Part(np.array(np.broadcast_to(labels, len(files)), np.int64), read)


def _part(root: Path, classes: tuple[str, ...], fit: Fit, left_out: Counter[str]) -> Part:
    """Return the images of the classes that are below `root`; what else there is, is counted."""
    left_out["images in no class's folder"] += sum(is_image(one) for one in root.iterdir())
    found = {}
    for label, name in enumerate(classes):
        if (root / name).is_dir():
            found[label], others = sorted_out(root / name)
            left_out.update(others)
    labels = [label for label, files in found.items() for _ in files]
    return read_later([path for files in found.values() for path in files], fit, labels)


def sorted_out(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the image files below a folder, sorted, and how many others there are of a kind.

    Raises DataError: there are none, or most files are no images.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in files_below(folder):
        (images if is_image(path) else others).append(path)
    kinds = Counter(
        path.suffix.lower() or "no suffix" if path.is_file() else _LINK for path in others
    )
    if not images:
        held = f" but other files ({_listed(kinds)})" if others else ""
        raise DataError(f"{folder} holds no images{held}; add some or remove it")
    if len(images) < len(others):
        raise DataError(
            f"{len(others)} of {len(images) + len(others)} files in {folder} are not images, for "
            f"instance {others[0].name}; correct path or remove them"
        )
    return images, kinds


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, hidden ones left out, sorted; links to folders are followed,
    but for those that lead back to a folder above, or again to one that was met before.
    """
    found: list[Path] = []
    walked: set[str] = set()
    real = Path(os.path.realpath(folder))
    above = {str(folder): {str(real), *map(str, real.parents)}}
    for place, folders, names in os.walk(folder, followlinks=True):
        known = above.pop(place)
        reached = {name: os.path.realpath(Path(place, name)) for name in folders}
        wanted = []
        for name in folders:
            # Links to links would lead to one folder on ever more ways.
            again = os.path.islink(Path(place, name)) and reached[name] in walked
            if _visible(name) and reached[name] not in known and not again:
                wanted.append(name)
                walked.add(reached[name])
        folders[:] = wanted
        above |= {os.path.join(place, n): known | {reached[n]} for n in folders}
        found += [Path(place, name) for name in names if _visible(name)]
    return sorted(found)


def _counted(left_out: Counter[str]) -> Iterator[str]:
    """Yield what was left out, if anything was."""
    if left_out.total():
        yield f"{left_out.total()} files left out ({_listed(left_out)})"


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5) if count)


def _names(folders: list[Path]) -> str:
    """Return the names of folders, of many the first."""
    more = f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    return ", ".join(f"{one.name}/" for one in folders[:4]) + more


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image and is not hidden."""
    return path.suffix.lower() in suffixes() and _visible(path.name) and path.is_file()


def named_file(table: Path, key: str, name: str) -> Path:
    """Return the file beside `table`, or below, that it names under `key`. Raises DataError."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(
            f"{table}: {key} {brief(name)} leads elsewhere; give a path from the table's folder"
        )
    return table.parent / name


def present(path: Path) -> bool:
    """Return whether there is a file, however long its name."""
    try:
        return path.is_file()
    except OSError:
        return False


def directories(path: Path) -> list[Path]:
    """Return the folders in `path`, sorted; none where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(one for one in path.iterdir() if one.is_dir() and _visible(one.name))


def _visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))
