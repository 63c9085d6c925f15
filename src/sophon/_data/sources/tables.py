"""Images whose classes stand in a table beside them: `metadata.csv`, `.jsonl`, `labels.csv`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from sophon._base.errors import DataError, brief, first_line, shortened
from sophon._data.collecting import Columns
from sophon._data.images import Fit
from sophon._data.labelled import Labelled, as_written, contents_of
from sophon._data.sources.folders import (
    directories,
    files_below,
    is_image,
    named_file,
    present,
    read_later,
)
from sophon._data.split_names import split_of
from sophon._data.splits import Contents

_TABLES = ("metadata.csv", "metadata.jsonl", "labels.csv")
_LABELS = ("label", "labels", "target")
# Rows of a table: image file and label.
_Rows = list[tuple[Path, Any]]


def read_table(path: Path, fit: Fit, columns: Columns) -> Contents | None:
    """Return the contents of a folder with a table of `file_name` and `label`, or of folders of
    splits with one each; None where no table has both columns. `columns` name others.

    Paths are relative to the table. Where all start with a folder of a split's name they are of
    those splits, else all are together. Images without a row are left out.

    Raises DataError: a row that cannot be read, or without an image; an image of several rows.
    """
    named = [one for one in directories(path) if split_of(one.name)]
    tables = [held for one in (path, *named) if (held := _table_in(one, columns))]
    if not tables:
        return None
    labels = _once_each(path, tables)
    splits: dict[str, list[Path]] = {}
    for file in labels:
        splits.setdefault(file.relative_to(path).parts[0], []).append(file)
    apart = all(split_of(name) and (path / name).is_dir() for name in splits)
    mixed = [one for one in named if one.name in splits and not apart]
    if not apart:
        splits = {path.name: list(labels)}
    bare = sum(is_image(file) and file not in labels for file in files_below(path))
    said = [f"labels from {', '.join(sorted({table.name for table, _ in tables}))}"]
    said += [f"{bare} images without a label left out"] if bare else []
    if mixed:
        said.append(f"{mixed[0].name}/ is no split, as other images lie in none")

    def split(name: str) -> Labelled:
        files = splits[name]
        return Labelled([labels[file] for file in files], read_later(files, fit).read)

    return contents_of(splits, split, tuple(said))


def _once_each(path: Path, tables: list[tuple[Path, _Rows]]) -> dict[Path, Any]:
    """Return the label of each image, in order. Raises DataError: one is absent, or comes twice."""
    labels: dict[Path, Any] = {}
    for table, rows in tables:
        _require_there(table, rows)
        for file, label in rows:
            if file in labels:
                raise DataError(
                    f"{table}: {file.relative_to(path)} has several rows, label"
                    f" {brief(labels[file], 40)} and {brief(label, 40)}: keep one of them"
                )
            labels[file] = label
    return labels


def _table_in(folder: Path, columns: Columns) -> tuple[Path, _Rows] | None:
    """Return the first table in a folder that has labels, and its rows."""
    image = columns[0] or "file_name"
    for name in _TABLES:
        table = folder / name
        rows = _rows(table) if table.is_file() else []
        held = {key for row in rows[:1] for key in row if isinstance(key, str)}
        wanted = _LABELS if columns[1] is None else (columns[1],)
        label = next((one for one in wanted if one in held), None)
        if label is not None and image in held:
            found = [_entry(table, row, image, label) for row in rows]
            return table, _as_numbers(found) if table.suffix == ".csv" else found
        if held and columns != (None, None):
            raise DataError(
                f"{table} has columns {brief(', '.join(sorted(held)))}: name the file's in"
                " image_column and the class's in label_column"
            )
    return None


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                return list(csv.DictReader(file))
            rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        raise DataError(f"{table} cannot be read ({first_line(error, 120)}); repair it") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{table}: give a line {{"file_name": "a.png", "label": "cat"}} an image')
    return rows


def _entry(table: Path, row: dict[str, Any], image: str, label: str) -> tuple[Path, Any]:
    name, held = row.get(image), row.get(label)
    if not isinstance(name, str) or not name or held in (None, ""):
        raise DataError(f"{table}: a row has {image} {brief(name)} and {label} {brief(held)}")
    return named_file(table, image, name), held


def _as_numbers(rows: _Rows) -> _Rows:
    """Return labels of a table of text as numbers where all are numbers."""
    numbers = [(file, as_written(label)) for file, label in rows]
    return numbers if all(isinstance(label, int) for _, label in numbers) else rows


def _require_there(table: Path, rows: _Rows) -> None:
    absent = [shortened(file.name) for file, _ in rows if not present(file)]
    if absent:
        raise DataError(
            f"{table}: {len(absent)} of {len(rows)} images are not there, for instance {absent[0]};"
            " add them or remove the rows"
        )
