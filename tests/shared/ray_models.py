"""Models that Ray's workers import."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

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
