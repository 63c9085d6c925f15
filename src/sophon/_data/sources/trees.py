"""The `tree` source: public data sets that come as folders of image files, by name.

What is expected below `root` and how many images a split has is known, so a copy that is not
whole is found before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophon._base.errors import DataError, unknown
from sophon._data.images import Fit, shorter_side
from sophon._data.sources.conventions import CLASS_ORDERS, SETS
from sophon._data.sources.folders import files_below, read_later
from sophon._data.splits import Contents

SUFFIXES = (".jpeg", ".jpg", ".png")
# Images whose size is looked at to tell one variant of a data set from another.
_LOOKED_AT = 9


@dataclass(frozen=True)
class Tree:
    """How a data set lies on a disk.

    `splits` maps train, validation and test to folders below the root, each with one folder of
    `classes` (folder name to class name); a set without classes has a single folder of images,
    which `sort` deals out to the splits by file name. `counts` are the images of each folder of a
    whole copy. `get` says where it comes from. `variants` are folders of other sizes, `sides` the
    shorter side in pixels of those that have one; `{archive}` in `get` stands for theirs.
    """

    splits: dict[str, str]
    classes: dict[str, str]
    counts: dict[str, int]
    get: str
    sort: Callable[[Path, list[Path]], dict[str, list[Path]]] | None = None
    variants: dict[str, str] = field(default_factory=dict)
    sides: dict[str, int] = field(default_factory=dict)

    def source(self, variant: str) -> str:
        """Return where a variant comes from; without one, where all do."""
        folders = [self.variants[variant]] if variant else list(self.variants.values())
        return self.get.replace("{archive}", " or ".join(f"{one}.tgz" for one in folders))


# The official split as its publishers lay it out, and as Kaggle's copy has it.
_PARTITIONS = ("list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv")


def _celeba_splits(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the official splits. Raises DataError where no file says what they are."""
    listing = next((root / one for one in _PARTITIONS if (root / one).is_file()), None)
    if listing is None:
        raise DataError(
            f"CelebA: in root = {str(root)!r} {_PARTITIONS[0]} is missing, which says what the"
            f" official splits are (or {', or '.join(_PARTITIONS[1:])}); get it where the images"
            " come from, or cut splits of your own with source = 'folder', path = the folder of"
            " images"
        )
    lines = listing.read_text(encoding="utf-8").replace(",", " ").splitlines()
    rows = [line.split() for line in lines]
    split = {row[0]: row[1] for row in rows if len(row) == 2}
    missing = next((file.name for file in files if file.name not in split), None)
    if missing is not None:
        raise DataError(f"{listing} does not list {missing}; download it again")
    named = {"train": "0", "validation": "1", "test": "2"}
    return {name: [f for f in files if split[f.name] == mark] for name, mark in named.items()}


def _ffhq_splits(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the official splits: the first 60,000 numbers train, the last 10,000 test."""
    odd = next((file for file in files if not file.stem.isdecimal()), None)
    if odd is not None:
        raise DataError(f"{odd} is not named by a number as FFHQ's images are; correct root")
    train = [file for file in files if int(file.stem) < 60_000]
    return {"train": train, "test": [file for file in files if int(file.stem) >= 60_000]}


# How images that lie in one folder are dealt out to the splits.
_SORTS = {"CelebA": _celeba_splits, "FFHQ": _ffhq_splits}


def _tree(name: str, held: dict[str, Any]) -> Tree:
    order, shown = CLASS_ORDERS.get(held.pop("order", ""), ()), held.pop("shown", 0)
    classes = {names[0]: names[shown] for names in order}
    return Tree(**held, classes=classes, sort=_SORTS.get(name))


TREES = {name: _tree(name, dict(held)) for name, held in SETS["trees"].items()}


def read_tree(name: str, root: Path, fit: Fit) -> Contents:
    """Return the contents of the data set `name`, a key of `TREES`, that lies below `root`.

    `Imagenette:160px` and `FFHQ:1024px` choose a size. `root` is the folder that holds the parts,
    such as `train`, or for a variant the folder above it. `ILSVRC` takes the ten classes of
    ImageNette out of a whole ILSVRC tree. CelebA and FFHQ have one class and no labels.

    Raises DataError: an unknown name; absent, empty or too few files, with what is expected where
    and how to get it.
    """
    key, _, variant = name.partition(":")
    if key not in TREES:
        raise DataError(unknown("tree", name, TREES, any_case=True))
    tree = TREES[key]
    if variant and variant not in tree.variants:
        known = ", ".join(f"{key}:{one}" for one in tree.variants) or key
        raise DataError(f"unknown variant {name!r}; known: {known}")
    if tree.sort is None:
        return _with_classes(key, tree, variant, _base(tree, variant, root), fit)
    return _without_classes(key, tree, variant, root, fit)


def _base(tree: Tree, variant: str, root: Path) -> Path:
    """Return the folder that holds the splits: a variant's own below `root`, or `root` itself.

    Without a variant `root` comes first, then the variants as they are listed.
    """
    if variant:
        own = root / tree.variants[variant]
        return own if own.is_dir() else root
    if (root / tree.splits["train"]).is_dir():
        return root
    return next((root / one for one in tree.variants.values() if (root / one).is_dir()), root)


def _with_classes(key: str, tree: Tree, variant: str, base: Path, fit: Fit) -> Contents:
    parts = {}
    for split, below in tree.splits.items():
        files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(tree.classes):
            found = _pictures(base / below / folder)
            if not found:
                flat = "; its images lie unsorted" if _pictures(base / below, flat=True) else ""
                raise _absent(key, variant, base, f"{below}/{folder}", flat)
            files += found
            labels += [label] * len(found)
        _require_whole(key, variant, split, base / below, files)
        if variant:
            _require_size(f"{key}:{variant}", tree, base / below, files)
        parts[split] = read_later(files, fit, labels)
    classes = tuple(tree.classes.values())
    return Contents(parts["train"], parts.get("test"), classes, parts.get("validation"))


def _without_classes(key: str, tree: Tree, variant: str, root: Path, fit: Fit) -> Contents:
    below = tree.variants[variant] if variant else tree.splits["train"]
    files = _pictures(root / below)
    if not files:
        raise _absent(key, variant, root, below)
    _require_whole(key, variant, "train", root / below, files)
    assert tree.sort is not None
    dealt = {name: held for name, held in tree.sort(root, files).items() if held}
    parts = {name: read_later(held, fit) for name, held in dealt.items()}
    return Contents(parts["train"], parts.get("test"), ("face",), parts.get("validation"))


def _absent(key: str, variant: str, base: Path, place: str, flat: str = "") -> DataError:
    """Return the error that says which folder below `base` has no images, and what is expected."""
    tree, above = TREES[key], ""
    expected = f"{place}/"
    if tree.classes:
        # A variant lies in a folder of its own, unless `base` is that folder.
        at_home = any((base / one).is_dir() for one in tree.splits.values())
        above = f"{tree.variants[variant]}/" if variant and not at_home else ""
        first, *_, last = tree.classes
        expected = ", ".join(f"{above}{one}/{first}..{last}" for one in tree.splits.values())
    name = f"{key}:{variant}" if variant else key
    return DataError(
        f"{name}: in root = {str(base)!r} {above}{place} has no images{flat}; expected there:"
        f" {expected}; get {tree.source(variant)}"
    )


def _require_whole(key: str, variant: str, split: str, folder: Path, files: list[Path]) -> None:
    """Raise DataError unless there are as many files as a whole copy has, none of them empty."""
    tree = TREES[key]
    wanted = tree.counts[split]
    if len(files) != wanted:
        kind = "a partial download" if len(files) < wanted else "more than the data set"
        raise DataError(
            f"{folder} has {len(files)} images where {key} has {wanted}, {kind}; get"
            f" {tree.source(variant)}, or use what is there with source = 'folder'"
        )
    empty = next((file for file in files if not file.stat().st_size), None)
    if empty is not None:
        raise DataError(f"{empty} is empty, a partial download; get {tree.source(variant)}")


def _require_size(name: str, tree: Tree, folder: Path, files: list[Path]) -> None:
    """Raise DataError where the images are those of another variant than the one in `name`.

    The middle one of a few shorter sides is told from the sides of the variants.
    """
    some = files[:: max(1, len(files) // _LOOKED_AT)][:_LOOKED_AT]
    middle = sorted(shorter_side(file) for file in some)[len(some) // 2]
    wanted = tree.sides.get(name.partition(":")[2])
    other = next((one for one, side in tree.sides.items() if side == middle), None)
    if (middle == wanted) if wanted is not None else other is None:
        return
    held = f"{name.partition(':')[0]}:{other}'s" if other else "no variant's"
    expected = f"{wanted} pixels" if wanted else "their own sizes"
    raise DataError(
        f"{folder} has images of {middle} pixels along the shorter side, {held}, where {name} has"
        f" {expected}: correct root or the name, or get"
        f" {tree.source(name.partition(':')[2])}"
    )


def _pictures(folder: Path, *, flat: bool = False) -> list[Path]:
    """Return the image files below a folder (of it alone if `flat`), sorted."""
    found = (one for one in files_below(folder) if one.suffix.lower() in SUFFIXES)
    return [one for one in found if not flat or one.parent == folder]
