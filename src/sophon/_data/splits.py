"""Cut what a source holds into train, validation and test: fixed, seeded, stratified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sophon._base.errors import DataError, unknown
from sophon._base.seeding import derive_seed
from sophon._data.images import (
    Bytes,
    Fit,
    Images,
    Integers,
    UnreadableError,
    repeated,
    resized,
    to_images,
)


@dataclass(frozen=True)
class Part:
    """Labels of a source's split, known at once, and its images, read for chosen positions.

    `read` returns uint8 (n, h, w) or (n, h, w, c) for an int64 array of n positions.
    """

    labels: Integers
    read: Callable[[Integers], Bytes]


@dataclass(frozen=True)
class Contents:
    """What a source holds: a training part, test and validation parts if any, class names.

    `remarks` say what was left out and what was taken for what, a few words each.
    """

    train: Part
    test: Part | None
    classes: tuple[str, ...]
    validation: Part | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How contents are cut; the fields are those of `DomainSpec`.

    Splits hold the same share of every class unless they are not `stratified`.
    """

    validation: float = 0.1
    test: float = 0.2
    seed: int = 0
    classes: tuple[int | str, ...] | None = None
    limit: int | None = None
    on_error: Literal["error", "skip"] = "error"
    least_classes: int = 2
    stratified: bool = True


@dataclass(frozen=True)
class Cutting:
    """The three splits, the names of the classes kept and what is to be said of both."""

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


def cut(contents: Contents, how: Cut) -> Cutting:
    """Return the splits of `contents`: classes chosen, test cut if absent, the number of training
    images limited, then validation cut from training unless the source has its own.

    Raises DataError: a class does not exist or has too few images, or sizes differ.
    """
    _check_labels(contents)
    _check_cut(how)
    wanted = _wanted(contents.classes, how.classes)
    positions = np.flatnonzero(np.isin(contents.train.labels, wanted))
    labels = renumbered(contents.train.labels[positions], wanted)
    names = tuple(contents.classes[old] for old in wanted)
    _check_present(labels, names, how)
    if not how.stratified:
        labels = np.zeros_like(labels)
    inside: Integers | None = None
    if contents.test is None:
        kept, inside = stratified(labels, how.test, derive_seed(how.seed, "test"), names)
        tested, test = contents.train, positions[inside]
        positions, labels = positions[kept], labels[kept]
    else:
        tested, test = contents.test, np.flatnonzero(np.isin(contents.test.labels, wanted))
    whole = len(positions)
    if how.limit is not None:
        first = first_per_class(labels, how.limit)
        positions, labels = positions[first], labels[first]
    remarks = _remarks(contents, how, names, beyond_limit=whole - len(positions))
    if contents.validation is None:
        train, held = stratified(labels, how.validation, derive_seed(how.seed, "validation"), names)
        chosen = (contents.train, positions[held])
        positions = positions[train]
    else:
        chosen = (contents.validation, _own_validation(contents.validation, wanted, how.limit))
    if not len(test) or not len(chosen[1]):
        which = "validation" if len(test) else "test"
        raise DataError(
            f"the {which} split has no image of the classes in use; add some or remove it"
        )
    parts = [(contents.train, positions), chosen, (tested, test)]
    named = ("training", "validation", "test")
    pixels, parts, said = _read(parts, names, wanted, how)
    pixels = _in_one_format(pixels, named)
    made = [
        to_images(values, renumbered(part.labels[index], wanted))
        for values, (part, index) in zip(pixels, parts, strict=True)
    ]
    return Cutting(made[0], made[1], made[2], names, (*remarks, *said, *_dark(pixels[0])))


_Chosen = list[tuple[Part, Integers]]


def _read(
    parts: _Chosen, names: tuple[str, ...], wanted: Integers, how: Cut
) -> tuple[list[Bytes], _Chosen, tuple[str, ...]]:
    """Return the pixels of the chosen positions of each part, which positions can be read, and a
    remark on what cannot. Raises DataError where that is not to be skipped, or all there is.
    """
    pixels: list[Bytes] = []
    left: _Chosen = []
    faults: list[tuple[str, DataError]] = []
    for part, index in parts:
        values, unread = readable(part, index)
        faults += unread.values()
        left.append((part, np.delete(index, list(unread))))
        pixels += [] if values is None else [values]
    if not faults:
        return pixels, left, ()
    failed = UnreadableError(dict(enumerate(faults)), sum(len(index) for _, index in parts), None)
    if how.on_error == "error":
        raise DataError(f"{failed}, or set on_error = 'skip'")
    lost = np.setdiff1d(parts[0][0].labels[parts[0][1]], left[0][0].labels[left[0][1]])
    if len(pixels) < len(parts) or len(lost):
        name = "a split" if not len(lost) else f"class {names[renumbered(lost, wanted)[0]]!r}"
        raise DataError(f"without what cannot be read {name} has no images; {failed}")
    some = ", ".join("/".join(Path(name).parts[-2:]) for name, _ in faults[:3])
    said = f"{len(faults)} images skipped that cannot be used ({some}"
    return pixels, left, (f"{said}{', ...' if len(faults) > 3 else ''})",)


def readable(part: Part, index: Integers) -> tuple[Bytes | None, dict[int, tuple[str, DataError]]]:
    """Return the pixels of the images that can be read, and which cannot: their name and why, by
    their position in `index`.
    """
    try:
        return part.read(index), {}
    except UnreadableError as error:
        return error.pixels, error.faults


def _dark(pixels: Bytes) -> Iterator[str]:
    """Yield a remark where the brightest pixel is that of 12-bit values in 16-bit files."""
    brightest = int(pixels.max())
    if 1 < brightest < 64:
        yield f"no pixel is above {brightest} of 255; 12-bit files need bit_depth = 12"


def _remarks(
    contents: Contents, how: Cut, names: tuple[str, ...], *, beyond_limit: int
) -> tuple[str, ...]:
    """Return the source's own remarks, where splits come from, what the settings leave out."""
    said = list(contents.remarks)
    absent = [name for name in ("test", "validation") if getattr(contents, name) is None]
    if absent:
        said.append(f"{' and '.join(absent)} cut from the training images")
    for name in ("test", "validation"):
        value = getattr(how, name)
        if name not in absent and value != getattr(Cut, name):
            said.append(f"{name} = {value} is not used, there are {name} images")
    left = len(contents.classes) - len(names)
    if left:
        said.append(f"{left} of {len(contents.classes)} classes left out, as chosen")
    if beyond_limit:
        said.append(f"{beyond_limit} training images left out by limit = {how.limit}")
    return tuple(said)


def _own_validation(part: Part, wanted: Integers, limit: int | None) -> Integers:
    """Return the positions in use of a source's own validation part, limited as training is."""
    positions = np.flatnonzero(np.isin(part.labels, wanted))
    if limit is None:
        return positions
    return positions[first_per_class(part.labels[positions], limit)]


def stratified(
    labels: Integers, fraction: float, seed: int, names: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions kept and positions cut, both ascending: of every class the same `fraction`
    (rounded, at least one image on either side) is cut, drawn from the stream `seed`.

    Raises DataError: a class has a single image.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {names[label]!r} has too few images to cut validation and test from it; "
                "give it at least 3, raise limit, or leave it out with classes"
            )
        draw = np.random.default_rng(derive_seed(seed, "class", int(label))).permutation(members)
        size = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[draw[:size]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def first_per_class(labels: Integers, limit: int) -> NDArray[np.int64]:
    """Return the positions of the first `limit` images of each class, ascending."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    rank = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(order[rank < limit])


def renumbered(labels: Integers, wanted: Integers) -> Integers:
    """Return `labels`, all of them in `wanted`, as their positions in `wanted`."""
    lookup = np.full(int(wanted.max()) + 1, -1, dtype=np.int64)
    lookup[wanted] = np.arange(len(wanted))
    return lookup[labels]


def joined(contents: Contents) -> Contents:
    """Return contents whose training part holds the test part too; a test split is cut anew."""
    if contents.test is None:
        return contents
    first, second = contents.train, contents.test
    count = len(first.labels)

    def read(index: Integers) -> Bytes:
        own = index < count
        if own.all() or not own.any():
            return first.read(index) if own.all() else second.read(index - count)
        read = [readable(first, index[own]), readable(second, index[~own] - count)]
        places = (np.flatnonzero(own), np.flatnonzero(~own))
        faults = {
            int(place[one]): fault
            for place, (_, unread) in zip(places, read, strict=True)
            for one, fault in unread.items()
        }
        held = [values for values, _ in read if values is not None]
        if not held:
            raise UnreadableError(faults, len(index), None)
        pixels = _in_one_format(held, ("training", "test")[: len(held)])
        mine = np.delete(own, list(faults))
        result = np.empty((len(mine), *pixels[0].shape[1:]), np.uint8)
        for values, where in zip(pixels, (w for w in (mine, ~mine) if w.any()), strict=True):
            result[where] = values
        if faults:
            raise UnreadableError(faults, len(index), result)
        return result

    labels = np.concatenate([first.labels, second.labels])
    return replace(contents, train=Part(labels, read), test=None)


def unlabelled(contents: Contents) -> Contents:
    """Return contents of a single class, whatever their labels are."""

    def bare(part: Part) -> Part:
        return Part(np.zeros_like(part.labels), part.read)

    test = None if contents.test is None else bare(contents.test)
    validation = None if contents.validation is None else bare(contents.validation)
    return replace(
        contents, train=bare(contents.train), test=test, classes=("image",), validation=validation
    )


def part_of_array(pixels: Bytes, labels: Integers, fit: Fit) -> Part:
    """Return a part whose images lie in one array, (n, h, w) or (n, h, w, c)."""
    return Part(labels, lambda index: resized(pixels[index], fit))


def _check_cut(how: Cut) -> None:
    for name, value in (("validation", how.validation), ("test", how.test)):
        if not 0 < value < 1:
            raise DataError(f"{name} = {value} is not a fraction; give a number between 0 and 1")
    if how.limit is not None and how.limit < 1:
        raise DataError(f"limit = {how.limit} leaves no images; give at least 2")


def _check_labels(contents: Contents) -> None:
    parts = [("training", contents.train)]
    parts += [("test", contents.test)] if contents.test is not None else []
    parts += [("validation", contents.validation)] if contents.validation is not None else []
    for name, part in parts:
        if not len(part.labels):
            raise DataError(f"the {name} split has no images; add some or remove it")
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= len(contents.classes):
            wrong = low if low < 0 else high
            raise DataError(
                f"{name} label {wrong} is out of range for {len(contents.classes)} classes; "
                f"labels must be 0 to {len(contents.classes) - 1}"
            )


def _wanted(names: tuple[str, ...], chosen: tuple[int | str, ...] | None) -> Integers:
    if chosen is None:
        return np.arange(len(names))
    for one in chosen:
        if isinstance(one, str) and one not in names:
            raise DataError(unknown("class", one, names))
    classes = [names.index(one) if isinstance(one, str) else one for one in chosen]
    for index in classes:
        if not 0 <= index < len(names):
            raise DataError(
                f"classes names {index}, which does not exist; there are 0 to {len(names) - 1}"
            )
    if len(set(classes)) != len(classes):
        raise DataError(f"classes = {list(chosen)} repeats a label; name each once")
    return np.array(classes, dtype=np.int64)


def _check_present(labels: Integers, names: tuple[str, ...], how: Cut) -> None:
    present = np.unique(labels)
    if how.classes is not None and len(present) < len(names):
        missing = names[int(np.setdiff1d(np.arange(len(names)), present)[0])]
        raise DataError(f"class {missing!r} has no training images; leave it out of classes")
    # Names may speak for classes without images; numbers were only counted up to the highest.
    if len(present) < len(names) and names == tuple(map(str, range(len(names)))):
        absent = int(np.setdiff1d(np.arange(len(names)), present)[0])
        raise DataError(
            f"labels go up to {len(names) - 1} and no training image has label {absent}; number"
            f" the {len(present)} classes from 0 without gaps, or choose labels with classes"
        )
    if len(present) < min(2, how.least_classes):
        only = f"only class {names[int(present[0])]!r}" if len(present) else "no class"
        raise DataError(f"the training images hold {only}; a domain needs at least 2 classes")


def _in_one_format(parts: list[Bytes], named: tuple[str, ...]) -> list[Bytes]:
    parts = [part[..., 0] if part.ndim == 4 and part.shape[-1] == 1 else part for part in parts]
    sizes = {name: part.shape[1:3] for name, part in zip(named, parts, strict=True)}
    first = sizes[named[0]]
    if any(size != first for size in sizes.values()):
        shown = " and ".join(
            f"{name} images are {width}x{height}"
            for name, (height, width) in sizes.items()
            if name == named[0] or (height, width) != first
        )
        raise DataError(f"{shown} pixels; set image_size")
    if any(part.ndim == 4 for part in parts):
        return [part if part.ndim == 4 else repeated(part) for part in parts]
    return parts
