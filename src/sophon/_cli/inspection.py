"""Descriptions of run files and checkpoints, line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophon._base.files import read_json
from sophon._cli.progress import lines, toml
from sophon._cli.run_file import load
from sophon._models import blocks, read_tensors
from sophon._protection.presets import completed
from sophon._records.metrics import measurement, shown
from sophon._records.round import ANEW, without_weights
from sophon._training.checkpoints import require_recorded


def describe_run(path: Path) -> Iterator[str]:
    """Yield the resolved specification, the domains and the parts of the model."""
    case = load(path, None)
    setting = case.setting()
    resolved = case.spec.model_dump(mode="json")
    if case.restricted:
        whole = completed(case.spec.protect, setting, case.model)
        resolved["protect"] = whole.model_dump(mode="json")
    yield from lines(resolved)
    yield (f"fingerprint: {case.spec.fingerprint()}")
    yield from case.read()
    size = sum(parameter.numel() for parameter in case.model.parameters())
    yield (f"model {case.network.name}: {size:,} parameters, head {setting.head}")
    for number, names in enumerate(blocks(case.model, setting.head), start=1):
        yield (f"  block {number}: {', '.join(names)}")


def describe_checkpoint(path: Path) -> Iterator[str]:
    """Yield what a checkpoint holds; CheckpointError if it is not what was written."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() and (path / "run.json").is_file():
        yield _unfinished(path)
        return
    tensors = read_tensors(file)
    size = sum(value.numel() for value in tensors.values())
    provenance = ["no model.json beside it: an export, or not written by sophon"]
    if (file.parent / "model.json").is_file():
        # To the end before the first line: a checkpoint that was changed is not described.
        provenance = list(_provenance(file, read_json(file.parent / "model.json")))
    yield (f"{file}: {len(tensors)} tensors, {size:,} values")
    yield from provenance


def _unfinished(path: Path) -> str:
    resolved = read_json(path / "run.json")["resolved"]
    protects = "rounds" in resolved
    if ended := without_weights(path):
        return f"{ended}: {ANEW}"
    what, part, wanted = (
        ("protection", "round", resolved["rounds"])
        if protects
        else ("pre-training", "stage", math.ceil(resolved["steps"] / resolved["every"]))
    )
    held = path / f"{part}s.jsonl"
    done = held.read_bytes().count(b"\n") if held.is_file() else 0
    return f"{path}: a {what} not finished, {done} of {wanted} {part}s; repeat it"


def _provenance(file: Path, held: dict[str, Any]) -> Iterator[str]:
    digest = require_recorded(file, held)
    yield (f"sha256 {digest}, as recorded")
    if held.get("model"):
        yield (f"model {toml(held['model'])}")
    trained = held.get("pretraining")
    if trained:
        score = shown(measurement(trained["validation"]))
        yield f"trained on {trained['original']}: validation {score}"
        yield from lines(trained["spec"], "pretrain.")
    protection = held.get("protection")
    if not protection:
        return
    before, after = (
        shown(measurement(protection[f"validation_{when}"])) for when in ("before", "after")
    )
    yield (
        f"protected against {', '.join(protection['restricted'])}: round"
        f" {protection['shipped_round']} of {protection['rounds']},"
        f" {protection['original']} validation {before} before, {after} after"
    )
    yield from lines(protection["spec"], "protect.")
