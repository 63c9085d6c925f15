"""How time grows with attackers, steps, images, parameters and trials: the exponent of each.

An exponent of 1 is time in proportion to the work; above 1 something grows faster than it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import Sizes, noise, protection
from starting import record
from timing import Row, alone, row, seconds
from torch import nn

from sophon._audit import Audit
from sophon._protect import Protection
from sophon._report import report
from sophon._specs import AuditSpec, Guard, ProtectSpec, Rehearsal, Strategy

_REPEATS = 2


@dataclass(frozen=True)
class Curve:
    """Seconds at each amount of work, one for each repeat in the order they were run."""

    what: str
    amounts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def exponents(self) -> list[float]:
        """Return the slope of log time against log work, once for each repeat."""
        logs = np.log(self.amounts)
        return [
            float(np.polyfit(logs, np.log([taken[repeat] for taken in self.seconds]), 1)[0])
            for repeat in range(len(self.seconds[0]))
        ]


def timed_round(run: Protection, repeats: int) -> tuple[float, ...]:
    rounds = iter(run)
    next(rounds)
    return tuple(seconds(lambda: next(rounds)) for _ in range(repeats))


def in_turn(actions: list[Callable[[], None]], repeats: int) -> tuple[tuple[float, ...], ...]:
    """Return the seconds of each action, one for each repeat: all are run once in every repeat."""
    taken = [[seconds(action) for action in actions] for _ in range(repeats)]
    return tuple(zip(*taken, strict=True))


def wide(width: int) -> nn.Module:
    """Return convolutions of `width` channels: parameters and work grow with its square."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, width, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def wide_protection(width: int, sizes: Sizes) -> Protection:
    attacker = Strategy(learning_rate=1e-3, batch_size=sizes.support)
    rehearsal = Rehearsal(steps=sizes.steps, query_batch_size=sizes.query, fixed=attacker)
    spec = ProtectSpec(
        rounds=1000, rehearsal=rehearsal, guard=Guard(every=1000), original_batch_size=32
    )
    kept, refused = noise("a", 0, size=16), noise("b", 1, size=16)
    return Protection(wide(width), original=kept, restricted=refused, spec=spec)


def parameters(width: int) -> int:
    return sum(p.numel() for p in wide(width).parameters())


def audited(seeds: int) -> None:
    run = protection("small network", Sizes(1, 8, 4), count=200, size=8)
    spec = AuditSpec(steps=2, batch_size=64, seeds=tuple(range(seeds)), evaluations=2)
    kept, refused = run.setting.original, run.setting.restricted[0]
    audit = Audit(
        run.model,
        unprotected=run.model,
        scratch=lambda: protection("small network", Sizes(1, 8, 4), count=200, size=8).model,
        original=kept,
        restricted=refused,
        spec=spec,
    )
    for _ in audit:
        pass


@functools.cache
def curves(short: bool) -> tuple[Curve, ...]:
    """Return every curve, measured once a process."""
    repeats = 1 if short else _REPEATS
    end = 2 if short else 4
    sizes = Sizes(5, 24, 8)

    def rounds(what: str, amounts: tuple[int, ...], *, of: str) -> Curve:
        taken = []
        for amount in amounts[:end]:
            steps = amount if of == "steps" else sizes.steps
            images = amount - sizes.query if of == "images" else sizes.support
            run = protection(
                "small network",
                Sizes(steps, images, sizes.query),
                size=16,
                strategies=amount if of == "strategies" else 1,
            )
            taken.append(timed_round(run, repeats))
        return Curve(what, amounts[:end], tuple(taken))

    widths = (16, 32, 64, 128)[:end]
    trials = (1, 2, 3)[:end]
    reports = (100, 200, 400, 800)[:end]
    report(record(3)).html()  # imports
    return (
        rounds("attackers a round, N", (1, 2, 4, 8), of="strategies"),
        rounds("steps, K", (10, 20, 40, 80), of="steps"),
        rounds("images a step", (32, 64, 128, 256), of="images"),
        Curve(
            "parameters (and work), a round",
            tuple(parameters(width) for width in widths),
            tuple(timed_round(wide_protection(width, sizes), repeats) for width in widths),
        ),
        Curve(
            "seeds of an audit",
            trials,
            in_turn([functools.partial(audited, amount) for amount in trials], min(2, repeats)),
        ),
        Curve(
            "trials in a report",
            reports,
            tuple(
                tuple(seconds(lambda held=held: report(held).html()) for _ in range(repeats))
                for held in map(record, reports)
            ),
        ),
    )


def rows(short: bool) -> list[Row]:
    """Return the exponents, whose bar leaves a tenth for the spread of short measurements."""
    found = []
    for curve in curves(short):
        first, last = curve.amounts[0], curve.amounts[-1]
        least = [min(taken) for taken in (curve.seconds[0], curve.seconds[-1])]
        note = f"{least[0]:.3g} s at {first:,.0f}, {least[1]:.3g} s at {last:,.0f}"
        what = f"exponent of time in {curve.what}, {first:,.0f} to {last:,.0f}"
        found.append(row(what, curve.exponents(), at_most=1.1, note=note))
    return found


def draw(made: tuple[Curve, ...], file: Path) -> None:
    """Draw each curve, in logarithms, beside a line of time in proportion to the work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "growth", "font.size": 8}):
        across = 3
        down = math.ceil(len(made) / across)
        figure, grid = pyplot.subplots(down, across, figsize=(9, 2.8 * down), layout="constrained")
        for axes, curve in zip(grid.flat, made, strict=True):
            middle = [float(np.median(taken)) for taken in curve.seconds]
            base = middle[-1] / curve.amounts[-1]
            ideal = [base * amount for amount in curve.amounts]
            axes.loglog(curve.amounts, ideal, "--", color="0.6", label="in proportion")
            axes.loglog(curve.amounts, middle, "o-", color="C0", label="measured")
            axes.set_xticks(curve.amounts, [f"{amount:,.0f}" for amount in curve.amounts])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(curve.what)
            axes.set_ylabel("seconds")
        grid.flat[0].legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    alone(rows)
