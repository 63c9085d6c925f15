"""Forecast of a protection run: time and memory, from a few measured steps."""

from __future__ import annotations

import math
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
from sophon._protection.spec import Alternate, ProtectSpec
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

    whole = begun(spec)
    terms, guard = whole.spec.hinder or (), whole.guard.spec
    wanted = _extent(whole.spec)
    few = {key: min(count, _FEW[key[1]][0]) for key, count in wanted.items()}
    run = begun(_short(whole.spec, few))
    round_s = first = _round_s(run)
    for key, count in wanted.items():
        more = min(count, _FEW[key[1]][1])
        if more > few[key]:
            run = begun(_short(whole.spec, few | {key: more}))
            each = max(0.0, _round_s(run) - first) / (more - few[key])
            round_s += each * (count - few[key]) * _times(key, wanted, few)
    run.guard.observe(0.0)
    round_s += _seconds(lambda: run.guard.check(2)) / guard.every
    with tempfile.TemporaryDirectory() as folder:
        round_s += _seconds(lambda: run.save_to(Path(folder))) / spec.checkpoint_every
    peak = _peak_bytes()
    if peak is not None:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak += sum(TERMS[term.kind].held_bytes(term, weights) for term in terms)
    return Forecast(spec=whole.spec, round_s=round_s, total_s=round_s * len(whole), peak_bytes=peak)


# Of what a round may have any number of, how few are measured, and how many for the difference.
_FEW = {
    "steps": (1, 4),
    "strategies": (2, 4),
    "life": (64, 128),
    "hindrance_steps": (1, 3),
    "keep_steps": (1, 3),
}
# By the place of a hindrance, or None for the update, and by name.
Extent = dict[tuple[int | None, str], int]


def _extent(spec: ProtectSpec) -> Extent:
    """Return how often a round repeats what."""
    held: Extent = {
        (place, name): count
        for place, term in enumerate(spec.hinder or ())
        for name, count in TERMS[term.kind].extent(term).items()
    }
    if isinstance(spec.update, Alternate):
        held[None, "hindrance_steps"] = spec.update.hindrance_steps
        held[None, "keep_steps"] = spec.update.keep_steps
    return held


def _times(key: tuple[int | None, str], wanted: Extent, few: Extent) -> float:
    """Return in how many places a round repeats it, for each at which it was measured."""
    place, name = key
    outer: list[tuple[int | None, str]] = [] if place is None else [(None, "hindrance_steps")]
    outer += [(place, "strategies")] if name in ("steps", "life") else []
    return math.prod(wanted[one] / few[one] for one in outer if one in wanted)


def _round_s(run: Protection) -> float:
    return min(round_.wall_s for round_ in islice(run, 2))


def _short(spec: ProtectSpec, extent: Extent) -> ProtectSpec:
    """Return a run with so few of everything; its guard looks after two rounds."""
    guard = (spec.guard or Guard()).model_copy(update={"every": 2})
    terms = tuple(
        TERMS[term.kind].shortened(term, {n: c for (p, n), c in extent.items() if p == place})
        for place, term in enumerate(spec.hinder or ())
    )
    update = spec.update
    if update is not None:
        update = update.model_copy(update={n: c for (p, n), c in extent.items() if p is None})
    return spec.model_copy(update={"hinder": terms, "guard": guard, "update": update})


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
