"""A protect round and an attack trial against plain PyTorch loops of the same passes.

The plain loops do the same forward, backward and optimizer steps on the same images, in the same
precision and memory layout, from batches made before the clock starts, and nothing else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from cases import Sizes, protection, quick
from timing import Row, alone, row
from torch import Tensor, nn

from sophon._setting import Feed, Setting
from sophon._specs import Strategy
from sophon._suppression import SUPPRESSIONS
from sophon._trials import Assignment, Bench, Start, evaluation_steps

Batches = list[tuple[Tensor, Tensor]]
# Two evaluations in 32 steps, the first before any: about as often as 13 in an attack of 200.
TRIAL_STEPS, EVALUATIONS, TRIAL_BATCH = 32, 1, 64
# A round and the bare passes take turns after so many steps: a machine's speed drifts in a minute.
PIECE = 5
# Seconds for whole rounds and for trials, which are what the table is for.
WITHIN = 60.0


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    batch: tuple[Tensor, Tensor],
) -> None:
    with setting.autocast():
        logits = model(batch[0])
    F.cross_entropy(logits.float(), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def bare_round(
    real: nn.Module,
    attacker: nn.Module,
    setting: Setting,
    batches: tuple[Batches, Batches, Batches],
) -> Iterator[None]:
    """Take K support steps with a query pass each, one suppression and one reinforcement step.

    Stops after each piece of the K steps but the last.
    """
    supports, queries, originals = batches
    optimizer = momentum(attacker)
    for step, (support, (images, labels)) in enumerate(zip(supports, queries, strict=True)):
        if step and step % PIECE == 0:
            yield
        train(attacker, optimizer, setting, support)
        with setting.autocast():
            logits = attacker(images)
        SUPPRESSIONS["klu"](logits.float(), labels).mean().backward()
        optimizer.zero_grad()
    adam = torch.optim.Adam(real.parameters(), 1e-4, fused=True)
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    for original in originals:
        train(real, adam, setting, original)


def in_turn(
    action: Callable[[], object], bare: Iterator[None], *, of: Callable[[Feed], bool]
) -> list[tuple[float, float]]:
    """Run both piece by piece; return the seconds of both for each piece.

    The action stops before each batch, of the feeds that `of` says, that begins a piece.
    """
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()

    def pause() -> None:
        nonlocal start
        middle = time.perf_counter()
        next(bare, None)
        end = time.perf_counter()
        pairs.append((middle - start, end - middle))
        start = time.perf_counter()

    batch = Feed.batch

    def pausing(feed: Feed, step: int) -> tuple[Tensor, Tensor]:
        if step and step % PIECE == 0 and of(feed):
            pause()
        return batch(feed, step)

    with mock.patch.object(Feed, "batch", pausing):
        action()
        pause()
    return pairs


def compared(
    action: Callable[[], object],
    bare: Callable[[], Iterator[None]],
    repeats: int,
    *,
    of: Callable[[Feed], bool],
) -> tuple[list[float], str]:
    """Return how many times as long as `bare` the action takes, and a note on their pieces."""
    values: list[float] = []
    pieces: list[float] = []
    taken = 0.0
    while len(values) < repeats and (not values or taken * (1 + 1 / len(values)) <= WITHIN):
        pairs = in_turn(action, bare(), of=of)
        ours, theirs = (sum(seconds) for seconds in zip(*pairs, strict=True))
        taken += ours + theirs
        values.append(ours / theirs)
        pieces += [one / other for one, other in pairs]
    each = f"each {min(pieces):.2f} to {max(pieces):.2f}"
    return values, f"pieces of {PIECE} steps take turns, {each}"


def round_row(name: str, sizes: Sizes, repeats: int) -> Row:
    run = protection(name, sizes)
    setting, rounds = run.setting, iter(run)
    feed = run.rehearsals.feed(0, run.rehearsals.strategy(0))
    made = [feed.batch(step) for step in range(sizes.steps)]
    supports = [(x[: sizes.support], y[: sizes.support]) for x, y in made]
    queries = [(x[sizes.support :], y[sizes.support :]) for x, y in made]
    real, attacker = (copy.deepcopy(run.model).train() for _ in range(2))
    batches = supports, queries, [run.original_feed.batch(0)]
    few = replace(sizes, steps=2)

    def warm() -> None:
        next(iter(protection(name, few)))
        for _ in bare_round(real, attacker, setting, tuple(made[:2] for made in batches)):
            pass

    warm()
    values, note = compared(
        lambda: next(rounds),
        lambda: bare_round(real, attacker, setting, batches),
        repeats,
        of=lambda feed: feed is not run.original_feed,
    )
    what = f"protect round / bare passes: {name}, 32x32, K = {sizes.steps}, batch {sizes.batch}"
    return row(
        f"{what}, {setting.precision}",
        values,
        at_most=1.05,
        note="a round between checks: without the guard's evaluation and without a state written,"
        f" both of which come every so many rounds only; {note}",
    )


@torch.no_grad()
def scored(model: nn.Module, setting: Setting, batches: Batches) -> int:
    model.eval()
    right = 0
    for images, labels in batches:
        with setting.autocast():
            right += int((model(images).argmax(1) == labels).sum())
    model.train()
    return right


@torch.no_grad()
def scored_anew(
    model: nn.Module, setting: Setting, fresh: Batches, batches: Batches
) -> tuple[int, int]:
    """Score as the audit's protocol does: as it is, and with BatchNorm's statistics anew."""
    first = scored(model, setting, batches)
    held = copy.deepcopy(model.state_dict())
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for images, _ in fresh:
        with setting.autocast():
            model(images)
    second = scored(model, setting, batches)
    for norm in norms:
        norm.momentum = 0.1
    model.load_state_dict(held)
    return first, second


def trial_row(name: str, steps: int, repeats: int) -> Row:
    run = protection(name, quick(Sizes()))
    setting, domain = run.setting, run.setting.restricted[0]
    strategy = Strategy(learning_rate=1e-3, batch_size=TRIAL_BATCH, steps=steps)
    bench = Bench(setting, EVALUATIONS)
    assignment = Assignment("protected", domain, strategy, 0)
    start = Start(run.model, name, "")
    shorter = strategy.model_copy(update={"steps": 4})
    brief = Bench(setting, 2), Assignment("protected", domain, shorter, 0)
    feed = setting.feed(domain, domain.train, batch_size=TRIAL_BATCH, stream=(0, ("bare",)))
    batches = [feed.batch(step) for step in range(steps)]
    validation, test = (
        list(setting.feed(domain, images, batch_size=250).in_order())
        for images in (domain.validation, domain.test)
    )
    due = evaluation_steps(steps, EVALUATIONS)

    def bare() -> Iterator[None]:
        model = copy.deepcopy(run.model).train()
        optimizer = momentum(model)
        scored_anew(model, setting, batches[:4], validation)
        for step, batch in enumerate(batches):
            if step and step % PIECE == 0:
                yield
            train(model, optimizer, setting, batch)
            if step + 1 in due:
                scored_anew(model, setting, batches[:4], validation)
        scored(model, setting, test)

    brief[0].run(brief[1], start)
    values, note = compared(
        lambda: bench.run(assignment, start), bare, repeats, of=lambda feed: True
    )
    what = f"attack trial / bare training: {name}, 32x32, {steps} steps of {TRIAL_BATCH}"
    return row(
        f"{what}, {len(due) + 1} evaluations, {setting.precision}",
        values,
        at_most=1.03,
        note=f"evaluation includes the passes that measure BatchNorm's statistics anew; {note}",
    )


def rows(short: bool, names: tuple[str, ...] = ("ResNet-20", "ResNet-18")) -> list[Row]:
    """Return a round and a trial on each network."""
    sizes, steps, pairs = (quick(Sizes()), 4, (1, 1)) if short else (Sizes(), TRIAL_STEPS, (3, 5))
    found = []
    for name in names:
        found += [round_row(name, sizes, pairs[0]), trial_row(name, steps, pairs[1])]
    return found


if __name__ == "__main__":
    alone(rows)
