"""Read weights from files of tensors, load them, check them, hash them."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sophon._base.errors import (
    CheckpointError,
    UnsupportedModelError,
    brief,
    first_line,
    shortened,
)
from sophon._base.files import read_others_json
from sophon._models.hooks import hooks
from sophon._models.weight_sets import NESTS, chosen, required_keys

# Ends the name of a file that says which files beside it hold which weights.
INDEX = ".index.json"
_DAMAGED = (
    *(SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, AssertionError),
    *(AttributeError, TypeError, OverflowError, MemoryError, struct.error),
)


def _is_torch_file(path: Path) -> bool:
    """Return whether a file begins as a zip archive or a pickle does."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a torch file that holds tensors only.

    A torch file may nest them under `state_dict`, `model_state_dict` or `model`. Raises
    CheckpointError as `read_content`, and for a file of anything else.
    """
    return named_tensors(read_content(path), path)


def read_content(path: Path) -> Any:
    """Return what a safetensors file holds, or a torch file of tensors and plain values, or the
    files that an `INDEX` beside them names.

    Raises CheckpointError for a missing, damaged or foreign file; a pickle with anything else in it
    is refused unread.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: correct the path of the weights")
    if path.name.endswith(INDEX):
        return {k: v for file, keys in _shards(path).items() for k, v in _named(file, keys).items()}
    try:
        with path.open("rb"):
            # The library says of a file that may not be read that there is none.
            pass
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): get the permission, or name another file"
        ) from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        require_safe_torch(path)
        with warnings.catch_warnings():
            # What is odd about a damaged file is in the error.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        if not _is_torch_file(path):
            raise CheckpointError(
                f"{path} is no file of weights: name a safetensors file, or one of torch.save"
            ) from None
        raise CheckpointError(
            f"{path} is refused: it is a pickle with more than tensors in it, which could run "
            "code. Where you trust it, load it yourself and keep the state_dict with "
            "safetensors.torch.save_file"
        ) from None
    except _DAMAGED as error:
        said = first_line(error, default="it ends early")
        # torch says where in its own code; that is no help.
        reason = said if said.isprintable() and "[enforce" not in said else "no such file inside"
        raise CheckpointError(
            f"{path} is damaged or not a file of tensors ({reason}): copy it again, or save"
            " model.state_dict() with safetensors.torch.save_file"
        ) from None


def _shards(index: Path) -> dict[Path, list[str]]:
    """Return the files of weights that an index names, and the keys that it says each holds.

    Raises CheckpointError.
    """
    named = read_others_json(index).get("weight_map")
    held = named if isinstance(named, dict) else {}
    if not held or not all(isinstance(one, str) for one in held.values()):
        raise CheckpointError(f"{index} names no files of weights: restore it")
    found: dict[Path, list[str]] = {}
    for key, name in sorted(held.items(), key=lambda item: item[1]):
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(
                f"{index}: {brief(name)} leads elsewhere than to weights beside it: restore it"
            )
        found.setdefault(index.parent / name, []).append(key)
    return found


def _named(file: Path, keys: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a file that its index names. Raises CheckpointError: one is absent."""
    held = named_tensors(read_content(file), file)
    absent = next((key for key in keys if key not in held), None)
    if absent is not None:
        raise CheckpointError(
            f"{file} has no {shortened(absent)}, which the index beside it says it holds: restore"
            " both"
        )
    return {key: held[key] for key in keys}


def require_safe_torch(path: Path) -> None:
    """Raise CheckpointError where torch may run code that a torch file holds."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise CheckpointError(
            f"{path} is refused: torch {torch.__version__} may run code in such a file"
            " (CVE-2025-32434): install torch 2.6 or newer, or give a safetensors file"
        )


def named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of what `read_content` gave; CheckpointError where there is more."""
    for key in NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    foreign = [] if isinstance(content, dict) else [type(content).__name__]
    if isinstance(content, dict):
        foreign = [
            shortened(key) for key, value in content.items() if not isinstance(value, Tensor)
        ]
    if foreign or not content:
        raise CheckpointError(
            f"{path} is not a file of named tensors ({', '.join(foreign[:3]) or 'empty'}): "
            "save model.state_dict()"
        )
    require_usual(content, path)
    return {str(key): value for key, value in content.items()}


def require_usual(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for tensors that cannot be weights: sparse, meta, quantised, ..."""
    for key, value in tensors.items():
        odd = _unusual(value)
        if odd:
            raise CheckpointError(
                f"{path}: {shortened(key)} is a {odd} tensor: save model.state_dict() of dense,"
                " real tensors on the processor"
            )


def _unusual(tensor: Tensor) -> str:
    """Return what keeps a tensor from being a weight; empty where nothing does."""
    kinds = {
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "meta": tensor.is_meta,
        "complex": tensor.is_complex(),
    }
    found = [name for name, held in kinds.items() if held]
    return found[0] if found else "" if tensor.layout == torch.strided else "sparse"


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Load `tensors` into `model`; a prefix of all keys is dropped, as `chosen` remarks.

    BatchNorm's `num_batches_tracked` may be missing, and all names of tied weights but one. Raises
    CheckpointError naming the keys that differ; the model is then unchanged.
    """
    expected = model.state_dict()
    found = chosen(tensors, untied(model), source=source) or tensors
    present = {id(value) for key, value in model.state_dict(keep_vars=True).items() if key in found}
    tied = {k for k, v in model.state_dict(keep_vars=True).items() if id(v) in present}
    faults = {
        "missing": [key for key in required_keys(expected) if key not in found and key not in tied],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in found and found[key].shape != value.shape
        ],
        "no floating numbers": [
            f"{key} {found[key].dtype}"
            for key, value in expected.items()
            if key in found and value.is_floating_point() > found[key].is_floating_point()
        ],
    }
    if any(faults.values()):
        lines = [
            f"{len(keys)} {fault} ({', '.join(map(shortened, keys[:3]))}"
            f"{', ...' if len(keys) > 3 else ''})"
            for fault, keys in faults.items()
            if keys
        ]
        raise CheckpointError(
            f"{source} is of another architecture than {type(model).__name__}: keys "
            + "; ".join(lines)
            + ": give weights of that architecture, or correct model.name"
        )
    # The model's own dictionary also holds the versions of its layers.
    expected.update(found)
    model.load_state_dict(expected)


def untied(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with the first name alone of weights that have several."""
    held, names = model.state_dict(), model.state_dict(keep_vars=True)
    first = {id(value): key for key, value in reversed(names.items())}
    return {key: held[key] for key, value in names.items() if first[id(value)] == key}


def require_finite(model: nn.Module, *, what: str) -> None:
    """Raise UnsupportedModelError naming the first weights or buffers that are NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsupportedModelError(
                f"{what}: {name} holds NaN or infinite values: give weights from before"
                " training diverged, or copy the file again"
            )


# Where our own networks were when the first trials were stored: names, wherever their files move.
_OWN = {"sophon._models.networks": "sophon._networks"}


def network_identity(model: nn.Module) -> str:
    """Return a name for what computes with the weights: class, hooks, and a hash of the layers.

    Layers count with their types, what they print (strides, activations, dropout rates) and rates
    that act in train mode unprinted; code inside a `forward` is not seen.
    """
    calls = [hook.call for hook in hooks(model)]
    names = [f"{h.__module__}.{getattr(h, '__qualname__', type(h).__qualname__)}" for h in calls]
    layers = "\n".join(
        f"{name}: {_class_name(part)}({part.extra_repr()})"
        f"{_unprinted_rates(part)}{_untrained(part)}"
        for name, part in model.named_modules()
    )
    structure = hashlib.sha256(layers.encode()).hexdigest()[:16]
    return "+".join([_class_name(model), *names, structure])


def _class_name(part: nn.Module) -> str:
    kind = type(part)
    return f"{_OWN.get(kind.__module__, kind.__module__)}.{kind.__qualname__}"


def _unprinted_rates(part: nn.Module) -> str:
    """Return the rates that a layer keeps as plain numbers and does not print, but for zeros."""
    printed = part.extra_repr()
    rates = [
        f"{name}={value}"
        for name, value in sorted(vars(part).items())
        if ("drop" in name or name == "p") and isinstance(value, int | float) and value
        if not isinstance(value, bool) and f"{name}=" not in printed
    ]
    return ", ".join(rates)


def _untrained(part: nn.Module) -> str:
    """Return the weights that a layer keeps as buffers, where no optimizer finds them."""
    names = [name for name, _ in part.named_buffers(recurse=False) if name in ("weight", "bias")]
    return f" untrained: {', '.join(names)}" if names else ""


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of every parameter and buffer: names, types, shapes and bytes."""
    return tensors_sha256([*model.named_parameters(), *model.named_buffers()])


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 (hex) of tensors in the order of their names: see `weights_sha256`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values, of whatever type, as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()
