"""Models that Ray's workers import."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from sophon._base.plain_mode import plain
from sophon._models.networks import SmallConvNet


class FatalOnce(SmallConvNet):
    """Kills the first worker of a cluster that trains it, once: `marker` is left behind."""

    marker: Path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        worker = any("default_worker" in part for part in sys.argv)
        if self.training and worker and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Switched:
    """Says as the trial of a job whether a worker computes the plain way."""

    device = torch.device("cpu")

    def run(self, job: object) -> bool:
        return plain()
