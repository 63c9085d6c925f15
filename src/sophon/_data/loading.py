"""Domains from specifications: which sources there are, and how each is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sophon._base.errors import DataError, brief, require_kind, unknown
from sophon._data.collecting import Columns
from sophon._data.domain import Domain, check_normalisation
from sophon._data.images import Fit
from sophon._data.sources.archives import read_archive
from sophon._data.sources.conventions import normalisation_of, ordered_classes
from sophon._data.sources.embedded import read_embedded
from sophon._data.sources.folders import read_folder, read_images
from sophon._data.sources.prompts import read_prompts
from sophon._data.sources.saved_datasets import read_saved
from sophon._data.sources.tables import read_table
from sophon._data.sources.tars import read_tars
from sophon._data.sources.torchvision_sets import read_torchvision
from sophon._data.sources.trees import read_tree
from sophon._data.splits import Contents, Cut, cut, joined, unlabelled
from sophon._models import OwnInput
from sophon._specs import DomainSpec, Interpolation

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
# Domains by what describes them, while they are to be read once.
_kept: dict[str, Domain] | None = None


@contextmanager
def reading_once() -> Iterator[None]:
    """Let `load_domain` return, inside, what it read before where it is asked for the same."""
    global _kept  # noqa: PLW0603 - what asks for domains knows nothing of who asked before
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def load_domain(spec: DomainSpec, *, base: str | Path = ".", role: str = "domain") -> Domain:
    """Return the domain that `spec` describes.

    Relative paths start at `base`, for a run file its folder; `${VARIABLES}` and a leading `~`
    are expanded; a leading variable's value starts at the working directory. `role`, such as
    `original`, opens every error message. It asks no network and no image processor of
    transformers, which only the run file's commands do for size and way of resizing: give
    `image_size`, `interpolation`, `crop_pct` and `crop_mode` as the processor has them.

    Raises DataError: the images cannot be found, read or used; one or two lines with the remedy.
    """
    require_kind(
        spec, DomainSpec, role, "a DomainSpec, such as DomainSpec(source='folder', path=...)"
    )
    base = Path(base)
    try:
        if spec.source not in SOURCES:
            raise DataError(unknown("source", spec.source, SOURCES))
        if spec.labels == "coarse" and spec.source != "npz":
            raise DataError(
                f"labels = 'coarse' is for npz archives, not {spec.source!r}: remove it"
            )
        sources = ("folder", "datasets", "webdataset")
        if _columns(spec) != (None, None) and spec.source not in sources:
            raise DataError(
                f"image_column and label_column are for {', '.join(sources)}: remove them"
            )
        fit, plain = _fit(spec), Fit(bit_depth=spec.bit_depth, background=spec.background)
        if spec.image_size is None and fit != plain:
            raise DataError(
                "interpolation, crop_pct and crop_mode need image_size: set it, or remove them"
            )
        if spec.dataset is not None and spec.source in ("npz", *sources):
            raise DataError(
                f"dataset = {spec.dataset!r} is for torchvision, tree and embedded sources: remove"
                " it"
            )
        return _read(spec, base, fit)
    except DataError as error:
        raise DataError(f"{role}: {error}") from None


def _read(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    if _kept is None:
        return SOURCES[spec.source](spec, base, fit)
    # The same place may be named from several.
    given = {"path": spec.path, "root": spec.root}
    places = {key: str(expanded(v, base).resolve()) for key, v in given.items() if v}
    key = spec.model_copy(update=places).model_dump_json()
    if key not in _kept:
        _kept[key] = SOURCES[spec.source](spec, base, fit)
    return _kept[key]


def _npz(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    path = _path(spec, base)
    try:
        contents = read_archive(path, fit, coarse=spec.labels == "coarse")
        return _domain(contents, spec, fit, path.stem)
    except DataError as error:
        # Most faults are found in arrays, which do not know their file.
        known = str(path) in str(error)
        raise DataError(str(error) if known else f"{path}: {error}") from None


def _folder(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    path, columns = _path(spec, base), _columns(spec)
    if spec.labels == "none":
        contents: Contents | None = read_images(path, fit)
    else:
        contents = read_table(path, fit, columns)
        if contents is None and columns != (None, None):
            raise DataError(
                f"{path} has no table of images, such as labels.csv: remove image_column and"
                " label_column, or add one"
            )
    return _domain(contents or read_folder(path, fit), spec, fit, path.resolve().name)


def _datasets(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    path, bare = _path(spec, base), spec.labels == "none"
    contents = read_saved(path, fit, _columns(spec), bare=bare)
    return _domain(contents, spec, fit, path.resolve().stem)


def _webdataset(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    path, bare = _path(spec, base), spec.labels == "none"
    contents = read_tars(path, fit, _columns(spec), bare=bare)
    return _domain(contents, spec, fit, path.resolve().stem)


def _prompts(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    path = _path(spec, base)
    return _domain(read_prompts(path, fit), spec, fit, path.resolve().name)


def _torchvision(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    name, root = _named(spec, "CIFAR10"), _root(spec, base)
    contents = read_torchvision(name, root, download=spec.download, fit=fit)
    return _domain(contents, spec, fit, name)


def _tree(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    name = _named(spec, "CINIC10")
    contents = read_tree(name, _root(spec, base), fit)
    if len(contents.classes) == 1 and spec.labels != "none":
        raise DataError(
            f"{name} has no labels: set labels = 'none', for a diffusion model, or take one of"
            " CelebA's attributes with source = 'torchvision'"
        )
    return _domain(contents, spec, fit, name)


def _embedded(spec: DomainSpec, base: Path, fit: Fit) -> Domain:
    name = _named(spec, "digits")
    return _domain(read_embedded(name, fit), spec, fit, name)


SOURCES: dict[str, Callable[[DomainSpec, Path, Fit], Domain]] = {
    "npz": _npz,
    "folder": _folder,
    "datasets": _datasets,
    "webdataset": _webdataset,
    "torchvision": _torchvision,
    "tree": _tree,
    "embedded": _embedded,
    "prompts": _prompts,
}


def prepared_as(spec: DomainSpec, own: OwnInput) -> DomainSpec:
    """Return `spec` with the size and the way of resizing that a network states, where it says
    nothing of its own.
    """
    if own.side is None or own.interpolation not in get_args(Interpolation):
        return spec
    stated = {"image_size": own.side, "interpolation": own.interpolation}
    stated |= {"crop_pct": own.crop_pct, "crop_mode": own.crop_mode}
    given = spec.model_fields_set
    return spec.model_copy(update={key: v for key, v in stated.items() if key not in given})


def expanded(text: str, base: Path) -> Path:
    """Return `text` as a path from `base`, with `${VARIABLES}` and a leading `~` replaced.

    Where a variable opens it, a relative value starts at the working directory, as the shell that
    it was set in has it.

    Raises DataError: a variable is not set, or empty.
    """
    require_variables(text)
    path = Path(_VARIABLE.sub(lambda match: os.environ[match.group(1)], text))
    start = Path.cwd() if _VARIABLE.match(text) else base
    try:
        return start / path.expanduser()
    except RuntimeError as error:
        raise DataError(f"{text!r}: {error}; write the folder out") from None


def require_variables(text: str) -> None:
    """Raise DataError naming all `${VARIABLES}` in `text` that are not set, or empty."""
    named = dict.fromkeys(_VARIABLE.findall(text))
    if unset := [name for name in named if not os.environ.get(name)]:
        several = len(unset) > 1
        images = "SOPHON_DATA" in unset
        (used, *_) = re.findall(rf'[^"]*\$\{{{unset[0]}\}}[^"]*', text)
        raise DataError(
            f"the environment variable{'s' * several} {' and '.join(unset)}"
            f" {'are' if several else 'is'} not set ({brief(used)} needs {unset[0]}): export"
            f" {'them' if several else 'it'}"
            f"{'; SOPHON_DATA is the folder that holds the image sets (docs/data.md)' * images}"
        )


def _domain(contents: Contents, spec: DomainSpec, fit: Fit, name: str) -> Domain:
    mean, std = _normalisation(spec)
    if spec.join:
        contents = joined(contents)
    if spec.labels == "none":
        contents = unlabelled(contents)
    classes: tuple[int | str, ...] | None = spec.classes
    if spec.class_order is not None:
        if classes is not None:
            raise DataError("classes and class_order both choose classes: keep one of them")
        classes = ordered_classes(contents.classes, spec.class_order)
    free = spec.source == "prompts"
    how = Cut(
        spec.validation,
        spec.test,
        spec.split_seed,
        classes,
        spec.limit,
        spec.on_error,
        least_classes=1 if free or spec.labels == "none" else 2,
        stratified=not free,
    )
    made = cut(contents, how)
    splits: dict[str, Any] = {**vars(made), "remarks": made.remarks + fit.remarks}
    if replace(fit, background=None) != Fit(spec.image_size, bit_depth=spec.bit_depth):
        squashed = ", squashed" if spec.crop_mode == "squash" else ""
        said = f"resized with {spec.interpolation}, crop_pct {spec.crop_pct:.4g}{squashed}"
        splits["remarks"] = (said, *splits["remarks"])
    splits |= {"mean": mean, "std": std, "fit": None if spec.image_size is None else fit}
    return Domain(spec.name or name, **splits, source=spec.source, weight=spec.weight)


def _fit(spec: DomainSpec) -> Fit:
    how = (spec.interpolation, spec.crop_pct, spec.bit_depth, spec.crop_mode, spec.background)
    return Fit(spec.image_size, *how)


def _columns(spec: DomainSpec) -> Columns:
    return spec.image_column, spec.label_column


def _normalisation(spec: DomainSpec) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if spec.normalisation is None:
        check_normalisation(spec.mean, spec.std)
        return spec.mean, spec.std
    if spec.mean is not None or spec.std is not None:
        raise DataError("normalisation and mean or std are both given: keep one of them")
    named = normalisation_of(spec.normalisation)
    return named.mean, named.std


def _named(spec: DomainSpec, example: str) -> str:
    return _required(spec, "name", spec.dataset or spec.name, example)


def _path(spec: DomainSpec, base: Path) -> Path:
    return expanded(_required(spec, "path", spec.path, "data"), base)


def _root(spec: DomainSpec, base: Path) -> Path:
    return expanded(_required(spec, "root", spec.root, "data"), base)


def _required(spec: DomainSpec, key: str, value: str | None, example: str) -> str:
    if not value:
        raise DataError(
            f"{key} is missing; source = {spec.source!r} needs it, as in {key} = {example!r}"
        )
    return value
