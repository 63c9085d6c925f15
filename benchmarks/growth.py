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
from cases import Sizes, network, noise, protection
from starting import record
from timing import Row, alone, row, seconds
from torch import nn

from sophon._auditing.audit import Audit
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.audit_record import AuditRecord
from sophon._reporting.report import report
from sophon._specs import AuditSpec, Guard, Strategy

# Of rounds and reports, and of audits, which take longest.
_REPEATS, _AUDITS = 3, 1


@dataclass(frozen=True)
class Curve:
    """Seconds at each amount of work, one for each repeat in the order they were run."""

    what: str
    amounts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def exponents(self, *, last: int | None = None) -> list[float]:
        """Return the slope of log time against log work, once for each repeat.

        `last` is how many of the largest amounts it is of; all of them unless it is given.
        """
        amounts, seconds = (held[-(last or len(held)) :] for held in (self.amounts, self.seconds))
        logs = np.log(amounts)
        return [
            float(np.polyfit(logs, np.log([taken[repeat] for taken in seconds]), 1)[0])
            for repeat in range(len(seconds[0]))
        ]


def in_turn(actions: list[Callable[[], object]], repeats: int) -> tuple[tuple[float, ...], ...]:
    """Return the seconds of each action, one for each repeat.

    All are run once in every repeat, every other time from the last to the first.
    """
    taken: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats):
        order = list(zip(actions, taken, strict=True))
        for action, held in reversed(order) if repeat % 2 else order:
            held.append(seconds(action))
    return tuple(map(tuple, taken))


def begun(run: Protection) -> Callable[[], object]:
    """Return what runs one more round of a protection; the first, which warms it up, is done."""
    rounds = iter(run)
    next(rounds)
    return functools.partial(next, rounds)


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
        scratch=lambda: network("small network"),
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
        actions = []
        for amount in amounts[:end]:
            steps = amount if of == "steps" else sizes.steps
            images = amount - sizes.query if of == "images" else sizes.support
            run = protection(
                "small network",
                Sizes(steps, images, sizes.query),
                size=16,
                strategies=amount if of == "strategies" else 1,
            )
            actions.append(begun(run))
        return Curve(what, amounts[:end], in_turn(actions, repeats))

    widths = (16, 32, 64, 128)[:end]
    trials = (1, 2, 4)[:end]
    reports = (100, 200, 400, 800)[:end]
    report(record(3)).html()  # imports
    return (
        rounds("attackers a round, N", (1, 2, 4, 8), of="strategies"),
        rounds("steps, K", (10, 20, 40, 80), of="steps"),
        rounds("images a step", (32, 64, 128, 256), of="images"),
        Curve(
            "parameters (and work), a round",
            tuple(parameters(width) for width in widths),
            in_turn([begun(wide_protection(width, sizes)) for width in widths], repeats),
        ),
        Curve(
            "seeds of an audit",
            trials,
            in_turn(
                [functools.partial(audited, amount) for amount in trials], min(_AUDITS, repeats)
            ),
        ),
        Curve(
            "trials in a report",
            reports,
            in_turn([functools.partial(reported, record(amount)) for amount in reports], repeats),
        ),
    )


def reported(held: AuditRecord) -> None:
    report(held).html()


def rows(short: bool) -> list[Row]:
    """Return the exponents over all amounts, and between the last two of them.

    A fixed cost hides at the top what a line through all amounts would show. The bar leaves a
    tenth for the spread of short measurements.
    """
    found = []
    for curve in curves(short):
        least = [min(taken) for taken in curve.seconds]
        for last in (len(curve.amounts), 2):
            first, end = curve.amounts[-last], curve.amounts[-1]
            found.append(
                row(
                    f"exponent of time in {curve.what}, {first:,.0f} to {end:,.0f}",
                    curve.exponents(last=last),
                    at_most=1.1,
                    note=f"{least[-last]:.3g} s at {first:,.0f}, {least[-1]:.3g} s at {end:,.0f}",
                )
            )
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
