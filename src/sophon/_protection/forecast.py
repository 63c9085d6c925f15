"""Forecast of a protection run: time and memory, from a few measured steps."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sophon._data import Domain
from sophon._protection.protection import Protection
from sophon._specs import OptimizerName, ProtectSpec, Rehearsal
from sophon._tasks import Task

# Tensors the size of the weights that an optimizer keeps.
_MOMENTS: dict[OptimizerName, int] = {
    "sgd": 0,
    "sgd_momentum": 1,
    "nesterov": 1,
    "adagrad": 1,
    "adadelta": 2,
    "adam": 2,
    "adamw": 2,
}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take: seconds a round and in all, and its peak memory.

    `peak_bytes` is None where the system does not tell a process its own peak.
    """

    round_s: float
    total_s: float
    peak_bytes: int | None


def forecast(
    model: nn.Module,
    *,
    original: Domain,
    restricted: Domain | list[Domain] | tuple[Domain, ...],
    spec: ProtectSpec,
    task: Task | None = None,
    head: str | None = None,
) -> Forecast:
    """Return a forecast from short measured rounds, a check of the guard and a state written to
    a temporary folder; nothing else is written.
    """
    seconds = {}
    held = spec.rehearsal
    lengths = sorted({1, min(4, held.steps)})
    for steps in lengths:
        # As long a life as in the run: what a preparation may spend of it depends on that.
        fresh = {"steps": steps, "horizon": held.life, "pool": 2 * held.strategies}
        rehearsal = held.model_copy(update=fresh)
        guard = spec.guard.model_copy(update={"every": 2})
        short = spec.model_copy(update={"rounds": 2, "rehearsal": rehearsal, "guard": guard})
        run = Protection(
            model, original=original, restricted=restricted, task=task, spec=short, head=head
        )
        seconds[steps] = min(round_.wall_s for round_ in run)
    first, last = seconds[lengths[0]], seconds[lengths[-1]]
    slope = max(0.0, last - first) / max(1, lengths[-1] - lengths[0])
    round_s = first + slope * (held.steps - 1)
    run.guard.observe(0.0)
    round_s += _seconds(lambda: run.guard.check(2)) / spec.guard.every
    with tempfile.TemporaryDirectory() as folder:
        round_s += _seconds(lambda: run.save_to(Path(folder))) / spec.checkpoint_every
    peak = _peak_bytes()
    if peak is not None:
        peak += pool_bytes(model, spec.rehearsal)
    return Forecast(round_s=round_s, total_s=round_s * spec.rounds, peak_bytes=peak)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def pool_bytes(model: nn.Module, rehearsal: Rehearsal) -> int:
    """Return what the attackers that persist between rounds hold, at most."""
    if rehearsal.horizon is None:
        return 0
    fixed = rehearsal.fixed
    names = rehearsal.distribution.learning_rates if fixed is None else (fixed.optimizer,)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Each has its copy of the model and its displacement besides its optimizer's moments.
    return rehearsal.pool * weights * (2 + max(_MOMENTS[name] for name in names))


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
