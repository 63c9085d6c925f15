"""A run of many equal parts in a folder: killed at any moment and repeated, it goes on from there.

The folder holds `run.json` (what the run is), a line for each record and the newest states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from torch import Tensor, nn

from sophon._base.errors import CheckpointError, first_line
from sophon._base.files import write_json, write_text
from sophon._base.plain_mode import plain
from sophon._base.spans import spanned
from sophon._models import network_identity, weights_sha256
from sophon._specs import ModelSpec
from sophon._specs.base import Spec
from sophon._training.checkpoints import open_run, save_model, save_state
from sophon._training.ranks import Ranks
from sophon._training.setting import Setting
from sophon._training.sharding import gathered

_STATES = "states"
Record = TypeVar("Record", bound=BaseModel)
Groups = dict[str, dict[str, Tensor]]


def run_identity(spec: Spec, model: nn.Module, setting: Setting, *, engine: int) -> dict[str, str]:
    """Return what determines the result of a run; how many processes there are does not."""
    # Earlier versions took the task's normalisation where a domain has none.
    default, own = setting.task.normalisation, setting.own
    other = own is not None and (own.mean, own.std) != default and setting.original.mean is None
    return {
        **({"normalisation": str(setting.normalisation(setting.original))} if other else {}),
        "spec": spec.fingerprint(),
        "model": weights_sha256(model),
        "engine": str(engine),
        "network": network_identity(model),
        "domains": setting.original.fingerprint(),
        "task": setting.task.name,
        "precision": setting.precision,
        "plain": str(plain()),
    }


class ResumableRun(ABC, Generic[Record]):
    """Iterate it for its records, each of which is written to the folder `out`, if there is one.

    A subclass names its parts (`part`, whose plural names the file of records and the key of a
    state), the class of its `record`, the `table` of a run file that its `spec` is; it says how
    many parts there are, takes one, and gives its state and takes it back. Before its first part
    it calls `open`. Of several processes (`ranks`) the first one writes.
    """

    part: str
    table: str
    record: type[Record]
    spec: Spec
    setting: Setting
    identity: dict[str, str]
    model_spec: ModelSpec | None
    out: Path | None
    ranks: Ranks

    def __init__(self) -> None:
        self.records: list[Record] = []

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of parts of the whole run."""

    @abstractmethod
    def next_record(self) -> Record:
        """Do the next part."""

    @abstractmethod
    def state(self) -> tuple[Groups, dict[str, Any]]:
        """Return tensors by group and name, perhaps in shards, and plain values."""

    @abstractmethod
    def restore(self, group: Callable[[str], dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Take back what `state` returned; `group` gives the tensors of one."""

    def begin(self) -> None:
        """Do what a run does once, where there is no state to take up."""

    @property
    def done(self) -> int:
        """Parts finished so far."""
        return len(self.records)

    @property
    def due(self) -> bool:
        """Whether a state is to be written now."""
        return True

    def __iter__(self) -> Iterator[Record]:
        """Run the remaining parts, yielding the record of each once it is written."""
        while self.done < len(self):
            self.records.append(self.next_record())
            if self.out is not None:
                if self.ranks.first:
                    with self._log(self.out).open("a", encoding="utf-8") as file:
                        file.write(self.records[-1].model_dump_json() + "\n")
                if self.due or self.done == len(self):
                    self.save()
            yield self.records[-1]

    def require_done(self) -> None:
        """Raise CheckpointError unless every part is finished."""
        if self.done < len(self):
            raise CheckpointError(
                f"{self.part} {self.done} of {len(self)}: iterate to the end before result()"
            )

    def ship(self, model: nn.Module, kind: str, about: dict[str, Any]) -> None:
        """Write the finished model to the folder: its weights; beside it `model.json` with its
        network and `about`, that alone as `KIND.json`, and what its task says: a diffusion model's
        folder is a pipeline of diffusers as well, and names itself.
        """
        if self.out is not None and self.ranks.first:
            described = self.setting.task.described(self.model_spec, model)
            network = None if described is None else described.model_dump(mode="json")
            save_model(self.out, model, {"model": network, kind: about})
            self.setting.task.complete(self.out, model)
            write_json(self.out / f"{kind}.json", about)

    def save(self) -> None:
        """Write the state to resume from. Without a folder this does nothing."""
        if self.out is not None:
            self.save_to(self.out / _STATES)

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return whole tensors, in the first process only, and plain values; all must ask."""
        groups, values = self.state()
        named = {
            f"{group}|{n}": value for group, held in groups.items() for n, value in held.items()
        }
        return gathered(named, self.ranks), values

    @spanned("states written")
    def save_to(self, folder: Path) -> None:
        """Write the state to resume from into `folder`; all processes must ask."""
        tensors, values = self.whole_state()
        if self.ranks.first:
            records = [record.model_dump(mode="json") for record in self.records]
            save_state(folder, self.done, tensors, {f"{self.part}s": records, **values})

    def open(self, needed_bytes: int) -> None:
        """Start afresh, or take up the newest state of the folder. Raises as `open_run`."""
        state = None
        with self.ranks.agreeing():
            if self.out is not None and self.ranks.first:
                state = open_run(
                    self.out,
                    self.identity,
                    self.spec.model_dump(mode="json"),
                    prefix=self.table,
                    states=self.out / _STATES,
                    needed_bytes=needed_bytes,
                    owner=self,
                )
        state = self.ranks.from_first(state)
        if state is None:
            self.begin()
        else:
            tensors, values = state
            try:
                self.records = [self.record.model_validate(r) for r in values[f"{self.part}s"]]
                self.restore(lambda name: _group(tensors, name), values)
            except (LookupError, TypeError, ValueError) as error:  # of a version without checksums
                raise CheckpointError(
                    f"the newest state below {self.out} is not whole"
                    f" ({type(error).__name__}: {first_line(error)}): delete the last folder in"
                    f" {_STATES} to resume from the one before"
                ) from None
        if self.out is not None and self.ranks.first:
            # Records after the state are made again.
            lines = [record.model_dump_json() + "\n" for record in self.records]
            write_text(self._log(self.out), "".join(lines))

    def _log(self, folder: Path) -> Path:
        return folder / f"{self.part}s.jsonl"


def _group(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    mark = f"{name}|"
    return {key.removeprefix(mark): v for key, v in tensors.items() if key.startswith(mark)}
