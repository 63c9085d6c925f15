"""The `datasets` source: Hugging Face datasets on the disk, saved ones or their tables' files."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from sophon._base.errors import DataError, brief, first_line
from sophon._base.torchvision_patch import installing, library
from sophon._data.collecting import Columns, columns_of, labelled
from sophon._data.images import Fit, unusual
from sophon._data.labelled import contents_of
from sophon._data.sources.shards import shards_of
from sophon._data.splits import Contents

_SPLITS, _STATE = "dataset_dict.json", "state.json"
# What damaged tables and descriptions make the libraries raise; Arrow's errors are among them.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)


def read_saved(path: Path, fit: Fit, columns: Columns, *, bare: bool = False) -> Contents:
    """Return the contents of a folder that `save_to_disk` wrote, or of files of Parquet or Arrow.

    `columns` are those of image and label. `bare` images need no labels and are of one class.
    Nothing is downloaded, no loading script is run and no cache is written. Where images have
    paths in place of bytes, they are relative to the folder and lie in it.

    Raises DataError: there are none, they are damaged, or columns hold no images or labels.
    """
    datasets = library(
        "datasets",
        "source = 'datasets' needs it",
        installing("datasets"),
        DataError,
    )
    if any((path / name).is_file() for name in (_SPLITS, _STATE)):
        _require_within(path)
        held = _read(path, lambda: datasets.load_from_disk(str(path.absolute())))
        # A format that the folder names would decode images as the library does.
        held = held.with_format(None)
        splits = dict(held) if isinstance(held, dict) else {"train": held}
    else:
        files = shards_of(path, (".parquet", ".arrow"))
        splits = {name: _joined(datasets, held) for name, held in files.items()}

    for held in splits.values():
        # What Arrow reads of a damaged table may be anything.
        _read(path, lambda held=held: held.data.validate(full=True))
    folder = path if path.is_dir() else path.parent

    def split(name: str) -> Any:
        dataset = splits[name]
        if bare:
            image, _ = columns_of({**dataset.features, "label": None}, (columns[0], "label"))
            dataset = dataset.select_columns([image])
            dataset = dataset.add_column("label", [0] * len(dataset))
        try:
            return labelled(dataset, fit, (columns[0], None) if bare else columns, folder)
        except DataError as error:
            raise DataError(f"{path}, {name}: {error}") from None

    return contents_of(splits, split)


def _require_within(path: Path) -> None:
    """Raise DataError where a saved folder names files that lie elsewhere."""
    # Which of them the library reads, where there are both, is its own affair.
    folders = [path] if (path / _STATE).is_file() else []
    if (path / _SPLITS).is_file():
        folders += (_within(path, path / _SPLITS, n) for n in _stated(path, _SPLITS, "splits"))
    for folder in folders:
        for name in (_STATE, "dataset_info.json"):
            _within(path, folder / name, name)
        for held in _stated(folder, _STATE, "_data_files"):
            named = held.get("filename") if isinstance(held, dict) else held
            _within(path, folder / _STATE, named)


def _stated(folder: Path, name: str, key: str) -> list[Any]:
    """Return the list under a key of a saved folder's file. Raises DataError for a damaged one."""
    file = folder / name
    held = _read(folder, lambda: json.loads(file.read_text(encoding="utf-8"))[key])
    if not isinstance(held, list):
        raise DataError(f"{file} has no list of {key}: save or copy the dataset again")
    return held


def _within(path: Path, file: Path, name: Any) -> Path:
    """Return what a `file` in a saved folder, or one of its splits, names, which lies in it."""
    # The library may take what follows two colons for an address.
    usual = isinstance(name, str) and not unusual(name) and "::" not in name
    found = file.parent / name if usual else file
    if not usual or not Path(os.path.realpath(found)).is_relative_to(os.path.realpath(path)):
        raise DataError(
            f"{file} names or is {brief(name)}, which lies outside of the dataset's folder and is"
            " not read: save the dataset again"
        )
    return found


def _joined(datasets: Any, files: list[Path]) -> Any:
    """Return the rows of several tables as one dataset."""
    tables = [_read(file, lambda file=file: datasets.Dataset(_table(file))) for file in files]
    return _read(files[0].parent, lambda: datasets.concatenate_datasets(tables))


def _table(file: Path) -> Any:
    """Return the table in a file; of Arrow's formats as they come, of images nothing is decoded."""
    if file.suffix.lower() == ".parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        return parquet.read_table(file.absolute(), memory_map=True, partitioning=None)
    arrow = importlib.import_module("pyarrow")
    held = arrow.memory_map(str(file))
    try:
        return arrow.ipc.open_stream(held).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(held).read_all()


def _read(path: Path, read: Any) -> Any:
    try:
        return read()
    except _DAMAGED as error:
        raise DataError(
            f"{path} cannot be read as a dataset ({first_line(error, 120)}), it may be empty or"
            " damaged; save or copy it again"
        ) from None
