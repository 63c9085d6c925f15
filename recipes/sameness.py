"""Whether a run is what a cell of the grid says: its record, its model, its base. No torch."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from grid import TRAINING_IMAGES, Cell, text_of
from sophon._attacks.suites import resolved
from sophon._base.errors import CheckpointError, SpecError
from sophon._base.files import read_json
from sophon._cli.run_spec import PretrainRunSpec, RunSpec
from sophon._protection.losses import SUPPRESSIONS
from sophon._protection.presets import as_paper
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.audit_record import AuditRecord, DomainRecord
from sophon._specs import AuditSpec, DomainSpec, ModelSpec, PretrainSpec, fingerprint_of, parse_spec

# An image set without `image_size` has images of this many pixels a side.
_OWN_SIDE = 32


def changes_of(record: AuditRecord, cell: Cell, base: Path | None = None) -> tuple[str, ...]:
    """Return the keys in which a record was not run as the cell says, such as `audit.steps`.

    Of a domain the record tells its name, its size and how many images it is trained on; of what
    else was changed it tells the command. `base` is the folder of the model of the original task,
    whose training is compared with the cell's where it is there. Raises CheckpointError where its
    description is damaged.
    """
    wanted = parse_spec(RunSpec, tomllib.loads(text_of(cell.run_file)), where=cell.name)
    found = [] if record.model == _named(wanted.model) else ["model.name"]
    if record.task != wanted.task.name:
        found.append("task.name")
    if _timestep(record.task_name) != wanted.task.timestep:
        found.append("task.timestep")
    images = _domain_changes("original", (record.original,), (wanted.original,))
    images += _domain_changes("restricted", record.restricted, wanted.restricted)
    found += images or _other_images(record)
    for role, added in (("held_out", record.held_out), ("benign", record.benign)):
        found += [role] if added else []
    held = (record.protection or {}).get("spec")
    found += _changes("protect", held, wanted.protect)
    found += _differing("audit", _plain(record.spec), _plain(resolved(wanted.audit)))
    # The record tells of the others by value.
    told = ("audit", "protect")
    found += [k for k in settings_in(record.command) if k.partition(".")[0] not in told]
    if base is not None and (base / BASE_DONE).is_file():
        found += _training_changes(base, cell)
    return tuple(dict.fromkeys(found))


def _other_images(record: AuditRecord) -> list[str]:
    """Return that the model was protected with other images than it was attacked with, if so."""
    identity: Any = (record.protection or {}).get("identity")
    stated = identity.get("domains") if isinstance(identity, dict) else None
    # No cell weighs its domains.
    attacked = [[one.name, 1.0, one.sha256] for one in (record.original, *record.restricted)]
    same = stated is None or stated == fingerprint_of(attacked)
    return [] if same else ["protected with other images"]


def _timestep(task_name: str) -> int | None:
    """Return the only timestep of a diffusion task, from its name in a record; None: all."""
    found = re.search(r"\btimestep (\d+) alone\b", task_name)
    return int(found.group(1)) if found else None


def settings_in(command: str) -> list[str]:
    """Return the keys that a command sets; where images and published weights lie is no change, nor
    what a run takes.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    given = [word for option, word in itertools.pairwise(words) if option == "--set"]
    given += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return [
        key
        for key in map(key_of, given)
        if key.rpartition(".")[2] not in ("root", "path", "download")
        and key not in (*OF_BASE, *CHANGES_NOTHING)
    ]


def key_of(setting: str) -> str:
    """Return the key of a `key=value`."""
    return ".".join(part.strip() for part in setting.partition("=")[0].split("."))


def _training_changes(base: Path, cell: Cell) -> list[str]:
    """Return the keys in which the model in `base` was not trained as the cell says."""
    wanted = parse_spec(PretrainRunSpec, tomllib.loads(text_of(cell.base_file)), where=cell.name)
    held = _trained_as(base)
    found = _changes("pretrain", held["spec"], wanted.pretrain)
    if _timestep(held["identity"].get("task", "")) != wanted.task.timestep:
        found.append("task.timestep")
    model = read_json(base / "model.json").get("model") or {}
    # Published weights may have come as a file; without either it began with random ones.
    if wanted.model.pretrained and not (model.get("pretrained") or model.get("weights")):
        found.append("model.pretrained")
    return found


def _plain(spec: AuditSpec | ProtectSpec | PretrainSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _changes(path: str, held: Any, wanted: ProtectSpec | PretrainSpec) -> list[str]:
    """Return the keys in which a stored specification, completed with what later versions added
    to it, differs from the one that is wanted.
    """
    # What does not read as a specification stays as it is, and differs.
    with contextlib.suppress(SpecError):
        held = _plain(_whole(parse_spec(type(wanted), held, where="stored")))
    return _differing(path, held, _plain(_whole(wanted)))


def _whole(spec: ProtectSpec | PretrainSpec) -> ProtectSpec | PretrainSpec:
    """Return a specification with nothing left open: cells are by the paper's method."""
    if isinstance(spec, PretrainSpec):
        return spec
    losses = [term.loss for term in spec.hinder or () if isinstance(term, Rehearsal)]
    diffusion = any(SUPPRESSIONS[loss].metric == "mse" for loss in losses if loss is not None)
    return as_paper(spec, "mse" if diffusion else "accuracy")


def _named(model: ModelSpec) -> str:
    """Return a network's name as records have it: of a path its last part."""
    kind, _, rest = model.name.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "diffusers" else model.name


def _domain_changes(
    role: str, held: tuple[DomainRecord, ...], wanted: tuple[DomainSpec, ...]
) -> list[str]:
    if [one.name for one in held] != [one.name for one in wanted]:
        return [role]
    found = []
    for number, (one, spec) in enumerate(zip(held, wanted, strict=True)):
        where = role if role == "original" else f"{role}.{number}"
        if one.image[1:] != (spec.image_size or _OWN_SIDE,) * 2:
            found.append(f"{where}.image_size")
        images = TRAINING_IMAGES[one.name]
        if one.train != images:
            found.append(f"{where}: {one.train:,} training images instead of {images:,}")
    return found


def _differing(path: str, held: Any, wanted: Any) -> list[str]:
    """Return the keys below `path` in which two specifications differ."""
    if path.startswith("protect.hinder") and isinstance(held, list) and isinstance(wanted, list):
        # Terms are told apart by their place.
        held, wanted = (dict(zip(map(str, range(len(x))), x, strict=True)) for x in (held, wanted))
    if not isinstance(held, dict) or not isinstance(wanted, dict):
        return [] if held == wanted else [path]
    keys = [*wanted, *(key for key in held if key not in wanted)]
    return [
        one for key in keys for one in _differing(f"{path}.{key}", held.get(key), wanted.get(key))
    ]


# --- The model of the original task ------------------------------------------------------------

BASE_DONE = "pretraining.json"
# They say where the original task's model comes from; the cell's own comes from its folder.
OF_BASE = ("model.weights", "model.pretrained")
# They change what a run takes, and no weight.
CHANGES_NOTHING = ("model.gradient_checkpointing",)


def base_folder(out: Path, cell: Cell) -> Path:
    """Return where the model that a cell protects lies below `--out`."""
    return out / "bases" / f"{cell.scale}-{cell.architecture}"


def _trained_as(folder: Path) -> dict[str, Any]:
    """Return what is kept of the training of the model in `folder`."""
    held = read_json(folder / BASE_DONE)
    if not all(isinstance(held.get(key), dict) for key in ("spec", "identity")):
        raise CheckpointError(
            f"{folder / BASE_DONE} is damaged: delete {folder} and repeat the command"
        )
    return held


def require_same_base(folder: Path, wanted: PretrainRunSpec) -> None:
    """Raise CheckpointError unless the model in `folder` was trained as `wanted` says."""
    held = _trained_as(folder)
    model = read_json(folder / "model.json").get("model") or {}
    pairs = {
        **_values("pretrain", held["spec"], wanted.pretrain),
        "original.name": (held["original"], wanted.original.name),
    }
    if wanted.task.name == "classification":
        # The folder of a diffusion model names itself.
        pairs |= _values("model", model, wanted.model)
        for key in CHANGES_NOTHING:
            del pairs[key]
    different = [
        f"{key} = {before!r}, not {now!r}" for key, (before, now) in pairs.items() if before != now
    ]
    if different:
        raise CheckpointError(
            f"{folder} was trained with {'; '.join(different[:3])}: give another --out, or repeat"
            " the same --set"
        )


def require_same_training(folder: Path, fingerprint: str, task: str) -> None:
    """Raise CheckpointError unless the model in `folder` was trained on images of `fingerprint`,
    and for the task of that name: a diffusion model's says its timesteps and its schedule.
    """
    held = _trained_as(folder)
    trained = held["identity"].get("task")
    if trained != task:
        raise CheckpointError(
            f"{folder} was trained for {trained}, not for {task}: give another --out, or repeat the"
            " same --set"
        )
    if held["identity"].get("domains") != fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other images of {held['original']!r} than this run's: give"
            " another --out, or repeat the same --set"
        )


def require_same_protection(folder: Path, wanted: ProtectSpec) -> None:
    """Raise CheckpointError unless the model in `folder` was protected as `wanted` says."""
    held = read_json(folder / "model.json").get("protection") or {}
    found = _changes("protect", held.get("spec"), wanted)
    if found:
        raise CheckpointError(
            f"{folder} was protected with other {', '.join(found[:3])}: give another --out, or"
            " repeat the same --set"
        )


def _values(
    path: str, held: dict[str, Any], now: ModelSpec | PretrainSpec
) -> dict[str, tuple[Any, Any]]:
    """Return each field of two specifications with both values; absent ones have defaults."""
    before = parse_spec(type(now), held, where=path)
    names = type(now).model_fields
    return {f"{path}.{name}": (getattr(before, name), getattr(now, name)) for name in names}
