"""The store of trials: append-only, one file each; several processes may share a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophon._base.errors import CheckpointError
from sophon._base.files import read_json, write_new_text, write_numbered_text
from sophon._records.audit_record import EarlierCrash, Trial

_CRASHED = ".crashed"


class TrialStore:
    """An append-only folder of trials, one file each, named by the trial's key.

    A crashed trial is to be run again and never has that name: it stands beside as
    `KEY.crashed-N.json`, N from 1 on.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Trial] = {}
        self._crashed: list[Trial] = []

    def get(self, key: str) -> Trial | None:
        """Return the stored trial, or None; a crashed one is not found by its key.

        Raises CheckpointError if its file is damaged or holds another trial.
        """
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.json"
        held = self._read(path)
        if held is not None and held.key != key:
            raise CheckpointError(
                f"{path} holds the trial {held.key}, under another's name: delete that file to run"
                " the trial again"
            )
        return held

    def put(self, trial: Trial) -> None:
        """Store a trial; one already there under its key stays, and so does every crashed one."""
        crashed = trial.outcome.kind == "crashed"
        if self.folder is None:
            if crashed:
                self._crashed.append(trial)
            else:
                self._memory.setdefault(trial.key, trial)
        else:
            name = f"{trial.key}{_CRASHED if crashed else ''}.json"
            write = write_numbered_text if crashed else write_new_text
            write(self.folder / name, trial.model_dump_json())

    def crashes(self) -> list[tuple[str, Trial | None]]:
        """Return the key of every crashed trial with the trial; None where it cannot be read."""
        if self.folder is None:
            return [(trial.key, trial) for trial in self._crashed]
        found: list[tuple[str, Trial | None]] = []
        for path in sorted(self.folder.glob(f"*{_CRASHED}-*.json")):
            try:
                trial = self._read(path)
            except CheckpointError:
                trial = None
            found.append((path.name.partition(_CRASHED)[0], trial))
        return found

    def _read(self, path: Path) -> Trial | None:
        try:
            return Trial.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} is not a trial of this version ({type(error).__name__}): delete that file"
                " to run the trial again"
            ) from None


def earlier_crashes(store: TrialStore, trials: Iterable[Trial]) -> tuple[EarlierCrash, ...]:
    """Return the crashes in `store` of these trials: what was run before them, or beside them.

    One that crashed alike each time is said by the trial itself.
    """
    kept = {trial.key: trial for trial in trials}
    found = []
    for key, crash in store.crashes():
        last = kept.get(key)
        if last is None or (crash is not None and crash.outcome == last.outcome):
            continue
        found.append(EarlierCrash(trial=key, error=_first_line(crash)))
    order = {key: position for position, key in enumerate(kept)}
    return tuple(sorted(found, key=lambda one: order[one.trial]))


def _first_line(crash: Trial | None) -> str:
    if crash is None or crash.outcome.kind != "crashed":
        return ""
    return crash.outcome.error.partition("\n")[0]


class DocumentStore:
    """A folder of small JSON documents by key; without a folder they are kept in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored document, or None. Raises CheckpointError if its file is damaged."""
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.json"
        return read_json(path) if path.is_file() else None

    def put(self, key: str, document: dict[str, Any]) -> None:
        """Store a document, whole or not at all; one already there under its key stays."""
        if self.folder is None:
            self._memory.setdefault(key, document)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_new_text(self.folder / f"{key}.json", json.dumps(document, indent=1) + "\n")
