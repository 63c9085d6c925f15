"""What earlier versions wrote, as it is written now: run files, runs, states. The one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sophon._base.files import read_json, write_json

# Flat keys of `protect` and where they are now, below the update and below the rehearsal.
_UPDATE = {
    "suppression_steps": "hindrance_steps",
    "suppression_rate": "hindrance_rate",
    "reinforcement_steps": "keep_steps",
    "reinforcement_rate": "keep_rate",
    "clip_norm": "clip_norm",
}
_REHEARSAL = {"suppression": "loss", "head_gradient": "head_gradient"}
_FLAT = (*_UPDATE, *_REHEARSAL, "rehearsal")


def migrated(data: dict[str, Any]) -> dict[str, Any]:
    """Return a `protect` table with the flat keys of earlier versions in their new places.

    One that has such a key is the paper's method. Raises ValueError where it has new ones too.
    """
    old = [key for key in _FLAT if key in data]
    if not old:
        return data
    new = [key for key in ("hinder", "keep", "update") if data.get(key) is not None]
    if new:
        raise ValueError(f"{old[0]} is the former way to write {new[0]}: use one of them")
    if data.get("method") == "erasure":
        raise ValueError(
            f"{old[0]} is a key of method = 'sophon': for erasure write it below [[protect.hinder]]"
        )
    rest = {key: value for key, value in data.items() if key not in _FLAT}
    rehearsal = data.get("rehearsal", {})
    if isinstance(rehearsal, BaseModel):
        rehearsal = {name: getattr(rehearsal, name) for name in rehearsal.model_fields_set}
    elif not isinstance(rehearsal, dict):
        raise ValueError(f"rehearsal = {rehearsal!r}: give a table")
    named = {_REHEARSAL[key]: data[key] for key in _REHEARSAL if key in data}
    update = {_UPDATE[key]: data[key] for key in _UPDATE if key in data}
    return {
        **rest,
        "method": "sophon",
        "hinder": [{**rehearsal, "kind": "rehearsal", **named}],
        **({"update": {"kind": "alternate", **update}} if update else {}),
    }


def migrate_run(folder: Path, fingerprint: Any) -> None:
    """Rewrite the `run.json` of a protection that an earlier version began.

    `fingerprint` gives the present one of a `protect` table. Nothing else in the folder changes.
    """
    file = folder / "run.json"
    held = read_json(file) if file.is_file() else {}
    resolved = held.get("resolved")
    if isinstance(resolved, dict) and any(key in resolved for key in _FLAT):
        spec, resolved = fingerprint(resolved)
        write_json(file, {**held, "spec": spec, "resolved": resolved})


def migrated_state(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the plain values of a state in the present form, and under which other name it has
    the tensors of a term: the pool of attackers was no term's once.
    """
    if "pool" not in values:
        return values, {}
    kept = {key: value for key, value in values.items() if key not in ("pool", "reinforced")}
    present = {**kept, "kept": values["reinforced"], "terms": {"hinder.0": values["pool"]}}
    return present, {"hinder.0": "attackers"}
