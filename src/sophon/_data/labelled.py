"""From labels as sources give them, numbers or names, to classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sophon._base.errors import DataError, brief
from sophon._data.images import Bytes, Integers
from sophon._data.split_names import roles_of
from sophon._data.splits import Contents, Part


@dataclass(frozen=True)
class Labelled:
    """One split: its images' labels, each a number or a name, and `read` as `Part` has it.

    `classes` are the names of numbers, where the source has them.
    """

    labels: Sequence[Any]
    read: Callable[[Integers], Bytes]
    classes: Sequence[str] | None = None


def contents_of(
    names: Iterable[str], read: Callable[[str], Labelled], remarks: tuple[str, ...] = ()
) -> Contents:
    """Return the contents of splits of these `names`, of which `read` returns one; `remarks` say
    more of them.

    Labels that are text are names of classes, sorted. Held-out splits without labels are left out.

    Raises DataError: no split is for training, or labels are no classes.
    """
    every = tuple(names)
    used = [name for name in roles_of(every) if name is not None]
    splits = {name: read(name) for name in used}
    labels = {name: _labels(split, name) for name, split in splits.items()}
    bare = [name for name, held in labels.items() if held is None]
    if used[0] in bare:
        raise DataError(f"the images of {used[0]!r} have no labels; give a class for each")
    numbers, classes = _numbered(
        {name: held for name, held in labels.items() if held is not None},
        {name: split.classes for name, split in splits.items()},
    )
    parts = {name: Part(held, splits[name].read) for name, held in numbers.items()}
    roles = zip(parts, ("training", "test", "validation"), strict=False)
    said = ", ".join(f"{name} for {role}" for name, role in roles)
    unread = ", ".join(name for name in every if name not in splits)
    remarks += (said,) if len(every) > 1 else ()
    remarks += (f"{unread} not read",) if unread else ()
    remarks += tuple(f"{name} left out, as its images have no labels" for name in bare)
    test, validation = [*list(parts.values())[1:], None, None][:2]
    return Contents(parts[used[0]], test, classes, validation, remarks)


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


def as_label(label: Any) -> int | str:
    """Return a label as an integer or as a name.

    Raises DataError: it is a fraction, missing, several, or beyond 64 bits.
    """
    value = np.asarray(label)
    if value.size > 1 or isinstance(label, list | tuple | dict):
        raise DataError(
            f"a label is {brief(label)}: several for one image (multi-label) are not supported;"
            " give one integer or name per image"
        )
    # NumPy has integers beyond as unsigned ones or as objects.
    beyond = value.dtype.kind == "u" and value.size == 1 and int(value.reshape(())) >= 2**63
    if value.size != 1 or value.dtype.kind not in "iubU" or beyond:
        raise DataError(f"a label is {brief(label)}; give one integer or name per image")
    return str(label) if value.dtype.kind == "U" else int(value.reshape(()))


def as_written(label: str) -> int | str:
    """Return a label that was read from text, as a number where it is one."""
    return int(label) if re.fullmatch(r"-?[0-9]{1,18}", label) else label


def _labels(split: Labelled, name: str) -> list[int | str] | None:
    """Return a split's labels; None where all of them are missing (None, or -1)."""
    if len(split.labels) and all(
        label is None or (isinstance(label, int) and label == -1) for label in split.labels
    ):
        return None
    try:
        return [as_label(label) for label in split.labels]
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _numbered(
    read: dict[str, list[int | str]], known: dict[str, Sequence[str] | None]
) -> tuple[dict[str, Integers], tuple[str, ...]]:
    """Return the labels of each split as numbers, and the names of the classes."""
    kinds = {type(label) for labels in read.values() for label in labels}
    train = next(iter(read))
    if len(kinds) > 1:
        raise DataError("some labels are numbers and some are names; give one kind")
    names = known[train]
    if kinds == {str}:
        names = sorted({str(label) for label in read[train]})
        place = {name: number for number, name in enumerate(names)}
        for split, labels in read.items():
            unknown = next((label for label in labels if label not in place), None)
            if unknown is not None:
                raise DataError(f"{split} has class {unknown!r} which {train} has not; rename it")
        read = {split: [place[str(one)] for one in labels] for split, labels in read.items()}
    for split in read:
        other = known[split]
        if kinds != {str} and names and other and tuple(other) != tuple(names):
            raise DataError(f"{split} has other class names than {train}; give both the same")
    numbers = {split: np.array(labels, dtype=np.int64) for split, labels in read.items()}
    return numbers, class_names(names, list(numbers.values()))
