"""A profile of a protection: where the time of its rounds goes, and a trace of one round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sophon._base.errors import SpecError
from sophon._base.files import write_json
from sophon._base.spans import Clock, clocked, span
from sophon._protection.protection import Protection
from sophon._records.round import Round
from sophon._training.environment import environment

FOLDER = "profile"
REST = "everything else"


@dataclass(frozen=True)
class Profile:
    """Seconds of each part over so many rounds, the largest first."""

    rounds: int
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table: part, seconds a round, share."""
        body = [
            (part, f"{taken / self.rounds:.3g} s", f"{100 * taken / self.total_s:.1f} %")
            for part, taken in self.seconds.items()
        ]
        return [("part", "a round", "share"), *body]

    def data(self) -> dict[str, Any]:
        """Return what is written to `profile.json`."""
        shares = {part: taken / self.total_s for part, taken in self.seconds.items()}
        return {"rounds": self.rounds, "seconds": self.seconds, "shares": shares}


class Profiled:
    """A protection to iterate like itself, whose next `rounds` are timed part by part.

    The round after them is traced with torch's profiler, for a browser (chrome://tracing or
    Perfetto). Neither changes a number. On a card each part waits for what it started.

    Raises SpecError unless so many rounds, and one, are left.
    """

    def __init__(self, run: Protection, rounds: int, out: Path) -> None:
        require_rounds(rounds, len(run) - run.done)
        self.run = run
        self.rounds = rounds
        self.folder = out / FOLDER
        self.result: Profile | None = None

    def __iter__(self) -> Iterator[Round]:
        """Yield every remaining round of the run."""
        rounds, device = iter(self.run), self.run.setting.device
        on_card = device.type == "cuda"
        clock = Clock(torch.cuda.synchronize) if on_card else Clock()
        for _ in range(self.rounds):
            yield self._next(rounds, clock)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
        with profile(activities=activities) as traced:
            record = self._next(rounds, Clock())
        self.folder.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(self.folder / "trace.json.gz"))
        parts = sorted(clock.seconds.items(), key=lambda item: -item[1])
        self.result = Profile(self.rounds, dict(parts))
        where = environment(device, self.run.setting.precision).model_dump(mode="json")
        write_json(self.folder / "profile.json", {**self.result.data(), "environment": where})
        yield record
        yield from rounds

    @staticmethod
    def _next(rounds: Iterator[Round], clock: Clock) -> Round:
        with clocked(clock), span(REST):
            return next(rounds)


def require_rounds(rounds: int, left: int) -> None:
    """Raise SpecError unless so many rounds can be timed, and one more traced, of those left."""
    if not rounds or rounds < left:
        return
    if left > 1:
        raise SpecError(
            f"--profile {rounds} times {rounds} rounds and traces one more; the run has {left}"
            f" left: use at most {left - 1}"
        )
    raise SpecError(
        f"--profile {rounds}: the run has {left} round{'' if left == 1 else 's'} left, too few to"
        " time one and trace one more: give a new --out"
    )
