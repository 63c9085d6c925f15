"""The store of trials: append-only, one file each; several processes may share a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophon._errors import CheckpointError
from sophon._files import read_json, write_new_text
from sophon._records import Trial


class TrialStore:
    """An append-only folder of trials, one file each, named by the trial's key."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Trial] = {}

    def get(self, key: str) -> Trial | None:
        """Return the stored trial, or None. Raises CheckpointError if its file is damaged."""
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.json"
        try:
            return Trial.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} is not a trial of this version ({type(error).__name__}): delete that file"
                " to run the trial again"
            ) from None

    def put(self, trial: Trial) -> None:
        """Store a trial; one already there under its key stays, unless it crashed.

        A crashed one is kept beside it, as `KEY.crashed-N.json`.
        """
        if self.folder is None:
            held = self._memory.get(trial.key)
            if held is None or held.outcome.kind == "crashed":
                self._memory[trial.key] = trial
            return
        self._set_crashed_aside(trial.key)
        path = self.folder / f"{trial.key}.json"
        write_new_text(path, trial.model_dump_json())

    def _set_crashed_aside(self, key: str) -> None:
        held = self.get(key)
        if self.folder is None or held is None or held.outcome.kind != "crashed":
            return
        number = len(list(self.folder.glob(f"{key}.crashed-*.json"))) + 1
        (self.folder / f"{key}.json").replace(self.folder / f"{key}.crashed-{number}.json")


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
