"""Forecast of a protection run: time and memory, from a few measured steps."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from sophon._data import Domain
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms import TERMS
from sophon._specs import Guard
from sophon._tasks import Task


@dataclass(frozen=True)
class Forecast:
    """What a run is, with nothing left open, and what it is expected to take.

    Seconds a round and in all, and its peak memory: None where the system does not tell a process
    its own peak.
    """

    spec: ProtectSpec
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
    """Return a forecast from short rounds, a check of the guard and a state; nothing is kept."""

    def begun(held: ProtectSpec) -> Protection:
        return Protection(
            model, original=original, restricted=restricted, task=task, spec=held, head=head
        )

    measured: dict[int, float] = {}
    whole = begun(spec)
    terms, guard = whole.spec.hinder or (), whole.guard.spec
    inner = max(TERMS[term.kind].inner_steps(term) for term in terms)
    for steps in sorted({1, min(4, inner)}):
        run = begun(_short(whole.spec, steps))
        measured[steps] = min(round_.wall_s for round_ in islice(run, 2))
    (least, first), (most, last) = min(measured.items()), max(measured.items())
    slope = max(0.0, last - first) / max(1, most - least)
    round_s = first + slope * (inner - 1)
    run.guard.observe(0.0)
    round_s += _seconds(lambda: run.guard.check(2)) / guard.every
    with tempfile.TemporaryDirectory() as folder:
        round_s += _seconds(lambda: run.save_to(Path(folder))) / spec.checkpoint_every
    peak = _peak_bytes()
    if peak is not None:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak += sum(TERMS[term.kind].held_bytes(term, weights) for term in terms)
    return Forecast(spec=whole.spec, round_s=round_s, total_s=round_s * len(whole), peak_bytes=peak)


def _short(spec: ProtectSpec, steps: int) -> ProtectSpec:
    """Return a run whose hindrances take so many inner steps; its guard looks after two rounds."""
    guard = (spec.guard or Guard()).model_copy(update={"every": 2})
    terms = tuple(
        TERMS[t.kind].shortened(t, min(steps, TERMS[t.kind].inner_steps(t)))
        for t in spec.hinder or ()
    )
    return spec.model_copy(update={"hinder": terms, "guard": guard})


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
