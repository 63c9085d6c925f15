"""Small real domains and models that the engine's tests share."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from sophon._data import Domain
from sophon._models.networks import SmallConvNet
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import ProtectSpec
from sophon._protection.term import Surroundings
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._specs import FreshHead, Guard
from sophon._tasks import Classification
from sophon._training.environment import environment
from sophon._training.setting import Setting, make_setting


@cache
def digits(low: int, high: int) -> Domain:
    """Return scikit-learn's handwritten digits low..high-1, 8x8 grey, as a domain."""
    raw = load_digits()
    keep = (raw.target >= low) & (raw.target < high)
    images = np.round(raw.images[keep] * (255 / 16)).astype(np.uint8)
    return Domain.from_arrays(
        f"digits-{low}-{high - 1}", images, (raw.target[keep] - low).astype(np.int64)
    )


def original() -> Domain:
    return digits(0, 5)


def restricted() -> Domain:
    return digits(5, 10)


@cache
def _trained_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = SmallConvNet(classes=5, in_channels=1)
    domain = original()
    images = domain.train.pixels.float() / 255
    images = (images - 0.449) / 0.226
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), domain.train.labels[index]).backward()
        optimizer.step()
    return model.state_dict()


def skip_unless_pinned(pins: dict[str, Any]) -> None:
    """Skip the rest of a test where bits are not what they were when they were pinned: makers of
    processors round differently, whatever instructions these have.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    here = f"{environment(torch.device('cpu'), 'fp32').processor} {capability}"
    if (here, torch.__version__) != (pins["cpu"], pins["torch"]):
        pytest.skip(
            f"nearly alike; bits are pinned on {pins['cpu']}, torch {pins['torch']}, not on {here}"
        )


def trained_model() -> SmallConvNet:
    """Return a small network trained on the digits 0 to 4."""
    model = SmallConvNet(classes=5, in_channels=1)
    model.load_state_dict(_trained_state())
    return model.eval()


class Fatal(SmallConvNet):
    """Kills the first worker process that trains it, once: `marker` is left behind."""

    marker: Path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and multiprocessing.parent_process() and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def scratch_model() -> nn.Module:
    return SmallConvNet(classes=5, in_channels=1)


def setting_of(model: nn.Module, **changes: Any) -> Setting:
    """Return the setting of the two halves of the digits, in fp32 on the processor."""
    arguments: dict[str, Any] = {
        "task": Classification(),
        "original": original(),
        "restricted": (restricted(),),
        "head": None,
        "precision": "fp32",
        "device": "cpu",
    }
    return make_setting(model, **(arguments | changes))


def quick_spec(**changes: Any) -> ProtectSpec:
    """Return a protection of a few seconds by the paper's method, persistent attackers included.

    Keys are the flat ones of earlier versions.
    """
    rehearsal = Rehearsal(
        strategies=2,
        steps=3,
        horizon=7,
        pool=3,
        query_batch_size=16,
        distribution=StrategyDistribution(
            learning_rates={"sgd_momentum": (1e-3, 1e-1), "adam": (1e-4, 1e-2)},
            preparations=((), (FreshHead(),)),
            batch_sizes=(16, 32),
        ),
    )
    usual: dict[str, Any] = {
        "rounds": 6,
        "suppression": "klu",
        "rehearsal": rehearsal,
        "guard": Guard(every=2, tolerance_points=20.0),
        "checkpoint_every": 1,
        "original_batch_size": 32,
        "precision": "fp32",
    }
    return ProtectSpec(**(usual | changes))


def rehearsal_of(spec: ProtectSpec) -> Rehearsal:
    """Return the one rehearsal of a protection."""
    (term,) = spec.hinder or ()
    assert isinstance(term, Rehearsal)
    return term


def rehearsing(spec: ProtectSpec, setting: Setting, model: nn.Module) -> RehearsalTerm:
    """Return the rehearsal of a protection in a setting, around the model as it was given."""
    return RehearsalTerm(rehearsal_of(spec), Surroundings(setting, model, spec.seed))


class Double(nn.Module):
    """A float64 network for float32 images: what differs by more than rounding shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(images.double())
        return result
