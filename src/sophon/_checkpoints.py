"""Files that are either whole or absent: states to resume from, models, text. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sophon._errors import CheckpointError

STATE_PREFIX = "round-"
_KEPT_STATES = 2
_SPARE_BYTES = 64 * 2**20


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either what it held before or all of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON in `path`; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it or start in another folder"
        ) from None


def require_writable(folder: Path, *, needed_bytes: int = 0) -> None:
    """Make `folder` if it is missing; CheckpointError if it cannot be written or is full.

    Nothing is left behind where it is refused.
    """
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        free = shutil.disk_usage(nearest).free
        if free < needed_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{folder} has {free / 2**20:.0f} MiB free,"
                f" {(needed_bytes + _SPARE_BYTES) / 2**20:.0f} MiB are needed: make room or choose"
                " another folder with --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder} ({error.strerror}): choose another folder with --out"
        ) from None


def lock_folder(folder: Path, owner: object) -> None:
    """Lock `folder` for this process until `owner` is gone or the process ends, however it ends.

    Raises CheckpointError if another process holds the lock. Where the system or the file
    system has none, nothing is locked.
    """
    if sys.platform == "win32":
        return
    import fcntl

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    weakref.finalize(owner, os.close, descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CheckpointError(
            f"another process is writing to {folder}: wait for it, or choose another folder"
            " with --out"
        ) from None
    except OSError:
        return


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write `tensors` as safetensors, whole or not at all; return the file's SHA-256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A tensor may share memory with another; the format wants each on its own.
    plain = {
        name: torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        for name, value in tensors.items()
    }
    save_file(plain, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = _sha256(temporary)
    temporary.replace(path)
    return digest


def save_model(folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write `model.safetensors` and, beside it, `model.json` with `description` and a checksum."""
    digest = save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "model.json", {**description, "sha256": digest})


def save_state(root: Path, index: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a state to resume from as `root/round-INDEX`; older ones but the last go."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".state.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = root / f".state.{os.getpid()}"
    temporary.mkdir()
    digest = save_tensors(temporary / "tensors.safetensors", tensors)
    write_json(temporary / "meta.json", {"meta": meta, "sha256": digest})
    final = root / f"{STATE_PREFIX}{index:08d}"
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for old in _states(root)[_KEPT_STATES:]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(root: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest undamaged state below `root`, or None if there is none at all.

    Raises CheckpointError if there are states and all are damaged: nothing is started over
    unasked.
    """
    states = _states(root)
    for folder in states:
        try:
            held = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if _sha256(folder / "tensors.safetensors") == held["sha256"]:
                return load_file(folder / "tensors.safetensors"), held["meta"]
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    if states:
        raise CheckpointError(
            f"every state below {root} is damaged: restore one, or delete {root.parent} to start"
            " over"
        )
    return None


def require_recorded(file: Path, held: dict[str, Any]) -> str:
    """Return the SHA-256 of `file`; CheckpointError unless `held`, its model.json, says so."""
    digest = _sha256(file)
    if digest != held.get("sha256"):
        raise CheckpointError(
            f"{file} does not have the checksum in model.json: it was changed or damaged; restore"
            " both files or repeat the protection"
        )
    return digest


def _states(root: Path) -> list[Path]:
    return sorted(root.glob(f"{STATE_PREFIX}*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
