"""Files that are either whole or absent, and folders that can be written. No torch."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from sophon._base.errors import CheckpointError, LockedError

# Raise this when files of an older version can no longer be read as they are.
FORMAT = 1
_SPARE_BYTES = 64 * 2**20


def temporary_beside(path: Path) -> Path:
    """Return where to write what becomes `path` once it is whole: another name at each call.

    Two containers that share a folder may have equal process numbers, so a part of it is random.
    """
    # A name has at most 255 bytes; the whole of a long one would leave no room.
    name = os.fsencode(path.name)[:100].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either what it held before or all of it."""
    _written(path, text).replace(path)


def write_new_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all, unless there is such a file already."""
    temporary = _written(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        # No hard links here: the last of several writers wins, each with a whole file.
        if not path.exists():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_numbered_text(path: Path, text: str) -> Path:
    """Write `text` beside `path`, under the first free of `STEM-1.SUFFIX` and so on; return where.

    Each of several writers has a number of its own. The file is empty until it is whole.
    """
    for number in itertools.count(1):
        numbered = path.with_stem(f"{path.stem}-{number}")
        try:
            numbered.touch(exist_ok=False)
        except FileExistsError:
            continue
        write_text(numbered, text)
        return numbered
    raise AssertionError("numbers do not end")


def _written(path: Path, text: str) -> Path:
    temporary = temporary_beside(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # The user knows the file, not what it is called until it is whole.
        error.filename = str(path)
        raise
    return temporary


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` and the format's number as indented JSON, whole or not at all."""
    text = json.dumps({"format": FORMAT, **value}, indent=2, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")


def read_others_json(path: Path) -> dict[str, Any]:
    """Return the table in a file that another program wrote.

    Raises CheckpointError if it is missing, damaged or no table.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it or start in another folder"
        ) from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} is no table: restore it or start in another folder")
    return held


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote to `path`.

    Raises CheckpointError if it is missing, damaged or of a newer format.
    """
    held = read_others_json(path)
    # Files from before formats were numbered are of the first.
    found = held.pop("format", 1)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found!r} and this version reads {FORMAT}: use the version of"
            " sophon that wrote it, or a newer one"
        )
    return held


def nearest_present(folder: Path) -> Path:
    """Return the folder itself or what of the way to it is there."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def require_writable(
    folder: Path, *, needed_bytes: int = 0, remedy: str = "choose another folder with --out"
) -> None:
    """Make `folder` if it is missing; CheckpointError if it cannot be written or is full.

    Nothing is left behind where it is refused; the user is told the `remedy`.
    """
    nearest = nearest_present(folder)
    try:
        free = shutil.disk_usage(nearest).free
        if free < needed_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{folder} has {free / 2**20:.0f} MiB free,"
                f" {(needed_bytes + _SPARE_BYTES) / 2**20:.0f} MiB are needed: make room or"
                f" {remedy}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder} ({error.strerror}): {remedy}") from None


def require_unused(folder: Path, *ours: str) -> None:
    """Raise CheckpointError if `folder` holds files and is no run's, which a file or folder in it
    of one of the names `ours` would tell.

    So nothing that a user has there is overwritten.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in ours):
        return
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if held:
        raise CheckpointError(
            f"{folder} is not empty ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''}) and"
            " holds no run of sophon: give a new or empty folder, so that nothing there is"
            " overwritten"
        )


# Locks of this process by folder (device and inode): the open file, and how many hold it.
_locks: dict[tuple[int, int], list[int]] = {}


def lock_folder(folder: Path, owner: object) -> None:
    """Lock `folder` for this process until `owner` is gone or the process ends, however it ends.

    Several owners in one process share the lock: it goes with the last of them. Raises
    LockedError if another process holds it. Where the system or the file system has none,
    nothing is locked.
    """
    if sys.platform == "win32":
        return
    where = folder.stat()
    key = (where.st_dev, where.st_ino)
    if key not in _locks:
        descriptor = _locked(folder)
        if descriptor is None:
            return
        _locks[key] = [descriptor, 0]
    _locks[key][1] += 1
    weakref.finalize(owner, _release, key)


def _locked(folder: Path) -> int | None:
    import fcntl

    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"cannot open {folder / '.lock'} ({error.strerror}): it is a link, or another user's;"
            " choose another folder with --out"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise LockedError(
            f"another process is writing to {folder}: wait for it, or choose another folder"
            " with --out"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _release(key: tuple[int, int]) -> None:
    held = _locks[key]
    held[1] -= 1
    if not held[1]:
        os.close(held[0])
        del _locks[key]
