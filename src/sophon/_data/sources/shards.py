"""Files that hold parts of a data set: which belong to which split."""

from __future__ import annotations

import re
from pathlib import Path

from sophon._base.errors import DataError
from sophon._data.sources.folders import files_below
from sophon._data.split_names import split_of

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shards_of(path: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Return the files of each split, sorted: `path` itself, those below a folder, or those of a
    range such as `train-{000..015}.tar`. A split is named by the file, else by a folder of it.

    Raises DataError: there are none, or those of a split lie in several folders.
    """
    files = _files(path, suffixes)
    splits: dict[str, list[Path]] = {}
    for file in files:
        folders = file.relative_to(path).parts[:-1] if path.is_dir() else ()
        named = (split_of(name) for name in (file.stem, *reversed(folders)))
        splits.setdefault(next(filter(None, named), ""), []).append(file)
    if "" in splits:
        splits["other files" if len(splits) > 1 else "train"] = splits.pop("")
    for split, held in splits.items():
        places = sorted({file.parent for file in held})
        if len(places) > 1:
            raise DataError(
                f"files of {split} lie in {places[0].name}/ and {places[1].name}/ of {path}; name"
                " one of the folders in path"
            )
    return splits


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if _RANGE.search(path.name):
        return _in_range(path)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; correct path")
    # Hugging Face's own caches lie beside its files.
    below = files_below(path) if path.is_dir() else [path]
    files = [one for one in below if one.suffix.lower() in suffixes]
    files = [one for one in files if not one.name.startswith("cache-")]
    if not files:
        packed = next((one for one in below if one.suffix.lower() in (".gz", ".tgz")), None)
        hint = f"unpack {packed.name} (gunzip)" if packed else "correct path or source"
        raise DataError(f"{path} holds no {' or '.join(suffixes)} file; {hint}")
    return files


def _in_range(path: Path) -> list[Path]:
    first, last = _RANGE.findall(path.name)[0]
    if int(first) > int(last):
        raise DataError(f"{path.name} counts down from {first} to {last}: give the smaller first")
    numbers = [f"{n:0{len(first)}}" for n in range(int(first), min(int(last), 10**6) + 1)]
    files = [path.with_name(_RANGE.sub(number, path.name, count=1)) for number in numbers]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(files)} files are missing, the first {absent[0]}: copy them"
            " again, or narrow the range in path"
        )
    return files
