"""A workload for executors whose jobs do what they are called, with nothing to train."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from records import crashed, trial
from sophon._auditing.trial import Job, Start
from sophon._records.audit_record import Crashed, Trial
from sophon._specs import Strategy

# A job that waits longer than this is not waited for.
PATIENCE_S = 60.0


def job(does: str, number: int) -> Job:
    """Return the job of this number that `quick`, `waits` or `kills` is the name of."""
    return Job("scratch", does, Strategy(learning_rate=0.1), number, None)


class Scripted:
    """Notes in `folder` whenever a job begins; what waits goes on once `folder/go` is there."""

    device = torch.device("cpu")
    starts: ClassVar[dict[tuple[str, int], Start]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begun(self, number: int) -> int:
        """Return how often the job of this number was begun."""
        return len(list(self.folder.glob(f"{number}-*")))

    def run(self, one: Job) -> Trial:
        """Return a trial with the seed of the job, or kill this process."""
        (self.folder / f"{one.seed}-{os.getpid()}").touch()
        if one.domain == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + PATIENCE_S
        while one.domain == "waits" and not (self.folder / "go").exists():
            if time.monotonic() > until:
                return self.crashed(one, "nobody said go")
            time.sleep(0.01)
        return trial("scratch", (0.5,), seed=one.seed)

    def crashed(self, one: Job, error: str) -> Trial:
        """Return the trial of a job that could not be finished."""
        outcome = Crashed(error=error, traceback="")
        return crashed("scratch").model_copy(update={"seed": one.seed, "outcome": outcome})


class Counting(Scripted):
    """Notes the card that a worker takes, of four that there seem to be."""

    device = torch.device("cuda")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        torch.cuda.device_count = lambda: 4
        torch.cuda.set_device = lambda index: (self.folder / f"card-{index}").touch()


class Unloadable(Scripted):
    """Kills every worker that it is sent to."""

    def __setstate__(self, state: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(Scripted):
    """Fails in every worker that it is sent to."""

    def __setstate__(self, state: object) -> None:
        raise ImportError("no module of that name over there")


class Holding(Scripted):
    """Has a model beside its jobs."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        super().__init__(folder)
        self.model = model
        self.starts = {("protected", 0): Start(model, "network", "weights")}  # type: ignore[misc]
