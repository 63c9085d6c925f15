"""Tensors in files that are either whole or absent: states to resume from, models. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sophon._base import files
from sophon._base.errors import CheckpointError
from sophon._models import untied
from sophon._records.round import ANEW, without_weights
from sophon._specs import fingerprint_of

STATE_PREFIX = "round-"
_KEPT_STATES = 2


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write `tensors` as safetensors, whole or not at all; return the file's SHA-256."""
    temporary = files.temporary_beside(path)
    # A tensor may share memory with another; the format wants each on its own.
    plain = {
        name: torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        for name, value in tensors.items()
    }
    # The library makes files that only their owner can read; others get what the user gives files.
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(plain, temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room, then repeat the command; what was"
            " written before is kept"
        ) from None
    digest = file_sha256(temporary)
    temporary.replace(path)
    return digest


def save_model(folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write `model.safetensors`, tied weights once, and beside it `model.json` with `description`
    and a checksum.
    """
    digest = save_tensors(folder / "model.safetensors", untied(model))
    files.write_json(folder / "model.json", {**description, "sha256": digest})


def save_state(root: Path, index: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a state to resume from as `root/round-INDEX`; older ones but the last go."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".state.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = root / f".state.{os.getpid()}"
    temporary.mkdir()
    try:
        digest = save_tensors(temporary / "tensors.safetensors", tensors)
        held = json.loads(json.dumps(meta))  # as it is read
        sums = {"sha256": digest, "meta_sha256": fingerprint_of(held)}
        files.write_json(temporary / "meta.json", {"meta": held, **sums})
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
            held = files.read_json(folder / "meta.json")
            whole = file_sha256(folder / "tensors.safetensors") == held["sha256"]
            # Earlier versions wrote no checksum of the values.
            if whole and held.get("meta_sha256") in (None, fingerprint_of(held["meta"])):
                return load_file(folder / "tensors.safetensors"), held["meta"]
        except (OSError, CheckpointError, LookupError, ValueError, SafetensorError):
            continue
    if states:
        raise CheckpointError(
            f"every state below {root} is damaged: restore one, or delete {root.parent} to start"
            " over"
        )
    return None


def open_run(
    folder: Path,
    identity: dict[str, str],
    resolved: dict[str, Any],
    *,
    prefix: str,
    states: Path,
    needed_bytes: int,
    owner: object,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Make or take up the folder of a run that can be resumed; return its newest state, if any.

    `run.json` holds what the run is (`identity`, and `resolved`, the table `prefix` of a run file);
    the folder is locked for `owner`.
    Raises CheckpointError if it holds another run, cannot be written, or another process has it.
    """
    held = folder / "run.json"
    if held.is_file():
        found = files.read_json(held)
        different = [name for name, value in identity.items() if found.get(name) != value]
        if different:
            raise CheckpointError(
                f"{folder} holds a run with another {' and '.join(different)}"
                f"{_changes(found, resolved, prefix)}: give another --out, or delete that folder to"
                " start over"
            )
    files.require_unused(folder, held.name)
    files.require_writable(folder, needed_bytes=needed_bytes)
    files.lock_folder(folder, owner)
    if not held.is_file():
        files.write_json(held, {**identity, "resolved": resolved})
    return load_state(states)


def _changes(held: dict[str, Any], resolved: dict[str, Any], prefix: str) -> str:
    """Return the first few keys in which two specifications differ, with both values."""
    before, now = (_flat(spec, prefix) for spec in (held.get("resolved") or {}, resolved))
    found = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return f" ({'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''})" if found else ""


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}").items()}


def require_recorded(file: Path, held: dict[str, Any]) -> str:
    """Return the SHA-256 of `file`; CheckpointError unless `held`, its model.json, says so."""
    digest = file_sha256(file)
    if digest != held.get("sha256"):
        raise CheckpointError(
            f"{file} does not have the checksum in model.json: it was changed or damaged; restore"
            " both files or repeat the protection"
        )
    return digest


def require_model_in(folder: Path, remedy: str) -> None:
    """Raise CheckpointError with the `remedy` unless a folder holds a model; of a run that is not
    finished, or kept no weights, it says so.
    """
    if (folder / "model.safetensors").is_file():
        return
    if (folder / "run.json").is_file():
        if ended := without_weights(folder):
            raise CheckpointError(f"{ended}: {ANEW}")
        raise CheckpointError(
            f"{folder} holds a run that is not finished: repeat the command that began it, and see"
            f" `sophon inspect {folder}`"
        )
    raise CheckpointError(f"{folder} holds no model.safetensors: {remedy}")


def _states(root: Path) -> list[Path]:
    return sorted(root.glob(f"{STATE_PREFIX}*"), reverse=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
