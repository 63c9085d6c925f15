"""TensorBoard logs of a protection: one scalar per number of a round. Written only when asked."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sophon._base.errors import SpecError
from sophon._base.torchvision_patch import installing, library
from sophon._records.round import Round

# The tag of each number of a round.
SCALARS = {
    "suppression_loss": "suppression/loss",
    "query_score": "suppression/query_score",
    "suppression_gradient_norm": "suppression/gradient_norm",
    "original_loss": "reinforcement/loss",
    "reinforcement_gradient_norm": "reinforcement/gradient_norm",
    "reinforcement_steps": "reinforcement/steps",
    "guard_score": "guard/validation_score",
    "price": "guard/price",
    "wall_s": "time/round_s",
}


class RoundLog(AbstractContextManager["RoundLog"]):
    """Writes rounds to a TensorBoard folder; rounds from `done` on replace what it holds of them.

    Raises SpecError without tensorboard.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        remedy = installing("track")
        library("tensorboard", "--tensorboard needs tensorboard", remedy, SpecError)
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer: Any = writer(str(folder), purge_step=done)

    def add(self, record: Round) -> None:
        """Write a round's numbers, at the step of its index."""
        for name, tag in SCALARS.items():
            value = getattr(record, name)
            if value is not None:
                self._writer.add_scalar(tag, value, record.index)
        for name, value in record.readings.items():
            self._writer.add_scalar(f"terms/{name}", value, record.index)

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
