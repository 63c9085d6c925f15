"""The `webdataset` source: tar files with the files of a sample under one name."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophon._base.errors import DataError, first_line, shortened
from sophon._data.collecting import Columns
from sophon._data.images import Bytes, Fit, Integers, open_picture, stack, suffixes
from sophon._data.labelled import Labelled, as_written, contents_of
from sophon._data.sources.shards import shards_of
from sophon._data.splits import Contents

_KEYS = ("cls", "label", "labels", "target")
# What a label's file may hold, in bytes.
_MOST = 10**6


def read_tars(path: Path, fit: Fit, columns: Columns, *, bare: bool = False) -> Contents:
    """Return the contents of tar files, in WebDataset's format, where they lie.

    A sample is an image (`a/0001.jpg`) and its label: a number or a name in `a/0001.cls`, or under
    `cls` or `label` in `a/0001.json`. `columns` name other endings or keys. `classnames.txt` beside
    the files has the names of numbers, a line each. `bare` images need no labels.

    Raises DataError: there are no such files, they are damaged, or hold no samples.
    """
    files = shards_of(path, (".tar",))
    beside = (path if path.is_dir() else path.parent) / "classnames.txt"
    try:
        names = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else None
    except ValueError:
        raise DataError(f"{beside} is not UTF-8 text: save it as such") from None

    def split(name: str) -> Labelled:
        samples = [sample for file in files[name] for sample in _samples(file, columns)]
        if not samples:
            raise DataError(f"{files[name][0]} holds no images: put some in, such as 0001.jpg")
        labels = [0 if bare else sample.label for sample in samples]

        def read(index: Integers) -> Bytes:
            held = [samples[one] for one in index]
            return stack(lambda at: held[at].read(fit), len(held), lambda at: str(held[at].name))

        return Labelled(labels, read, None if bare else names)

    return contents_of(files, split)


@dataclass
class _Sample:
    """Where in a file the image of a sample lies, and its label, if it has one."""

    file: Path
    ending: str = ""
    name: Path = field(default_factory=Path)
    offset: int = 0
    size: int = 0
    label: Any = None

    def read(self, fit: Fit) -> Bytes:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return open_picture(self.name, fit, file.read(self.size))


def _samples(file: Path, columns: Columns) -> list[_Sample]:
    """Return the samples of one file that have images, in its order."""
    found: dict[str, _Sample] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if member.isfile() and stem:
                    sample = found.setdefault(f"{folder}/{stem}", _Sample(file))
                    _take(sample, tar, member, ending.lower(), columns)
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read as a tar file ({first_line(error, 120)}); unpack it if it is"
            " compressed (gunzip), else copy it again"
        ) from None
    return [sample for sample in found.values() if sample.ending]


def _take(
    sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, columns: Columns
) -> None:
    image, label = columns
    if ending == image or (image is None and f".{ending}" in suffixes() and not sample.ending):
        sample.ending, sample.name = ending, sample.file / member.name
        sample.offset, sample.size = member.offset_data, member.size
        return
    keys = _KEYS if label is None else (label,)
    if ending not in (*keys, "json") or member.size > _MOST:
        return
    held = tar.extractfile(member)
    try:
        text = "" if held is None else held.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        name = shortened(member.name)
        raise DataError(f"{sample.file}: {name} is not UTF-8 text: save it as such") from None
    if ending == "json":
        about = json.loads(text)
        key = next((key for key in keys if isinstance(about, dict) and key in about), None)
        sample.label = about[key] if key and sample.label is None else sample.label
    else:
        sample.label = as_written(text)
