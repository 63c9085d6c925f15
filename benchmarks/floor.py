"""A protect round and an attack trial against plain PyTorch loops of the same passes.

The plain loops do the same forward, backward and optimizer steps on the same images, in the same
precision and memory layout, from batches made before the clock starts. A trial's loop scores the
network as the audit's protocol does; what that costs beyond one plain evaluation is a row of its
own, without a bar.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from cases import Sizes, protection, quick, rehearsal
from timing import Row, alone, row
from torch import Tensor, nn

from sophon._auditing.trial import Bench, Job, Start, evaluation_steps
from sophon._protection.losses import SUPPRESSIONS
from sophon._specs import Strategy
from sophon._training.setting import Feed, Setting

Batches = list[tuple[Tensor, Tensor]]
# Three evaluations in 36 steps: before any, after the first, at the end. 13 in an attack of 160
# come about as often.
TRIAL_STEPS, EVALUATIONS, TRIAL_BATCH = 36, 2, 64
# A round and the bare passes take turns after so many steps: a machine's speed drifts in a minute.
PIECE = 5
# Seconds for whole rounds and for trials, which are what the table is for.
WITHIN = 45.0


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
        SUPPRESSIONS["klu"].function(logits.float(), labels).mean().backward()
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


@dataclass(frozen=True)
class Compared:
    """Seconds of an action and of its bare passes, piece by piece, one list for each repeat."""

    repeats: list[list[tuple[float, float]]]

    def ratios(self, less: Sequence[float] = ()) -> list[float]:
        """Return how many times as long as its bare passes each repeat takes.

        `less` are seconds of each repeat to take from those of its bare passes.
        """
        taken = list(less) or [0.0] * len(self.repeats)
        return [
            sum(one for one, _ in pairs) / (sum(other for _, other in pairs) - seconds)
            for pairs, seconds in zip(self.repeats, taken, strict=True)
        ]

    def note(self) -> str:
        """Return what the pieces say of the spread, also of a single repeat.

        The standard error is that of a ratio of sums over pieces, which are taken as independent.
        """
        pieces = [pair for pairs in self.repeats for pair in pairs]
        each = sorted(one / other for one, other in pieces)
        bare = sum(other for _, other in pieces)
        whole = sum(one for one, _ in pieces) / bare
        count = len(pieces)
        shown = f"{count} pieces of {PIECE} steps take turns, each {each[0]:.2f} to {each[-1]:.2f}"
        if count == 1:
            return shown
        spread = sum((one - whole * other) ** 2 for one, other in pieces) * count / (count - 1)
        error = spread**0.5 / bare
        return f"{shown}; all together {whole:.3f}, standard error over pieces {error:.3f}"


def compared(
    action: Callable[[], object],
    bare: Callable[[], Iterator[None]],
    repeats: int,
    *,
    of: Callable[[Feed], bool],
) -> Compared:
    """Return the seconds of as many repeats as fit into `WITHIN`, but of at least one."""
    made: list[list[tuple[float, float]]] = []
    taken = 0.0
    while len(made) < repeats and (not made or taken * (1 + 1 / len(made)) <= WITHIN):
        made.append(in_turn(action, bare(), of=of))
        taken += sum(map(sum, made[-1]))
    return Compared(made)


def round_row(name: str, sizes: Sizes, repeats: int) -> Row:
    run = protection(name, sizes)
    setting, rounds, attackers = run.setting, iter(run), rehearsal(run)
    feed = attackers.feed(0, attackers.strategy(0))
    made = [feed.batch(step) for step in range(sizes.steps)]
    supports = [(x[: sizes.support], y[: sizes.support]) for x, y in made]
    queries = [(x[sizes.support :], y[sizes.support :]) for x, y in made]
    real, attacker = (copy.deepcopy(run.model).train() for _ in range(2))
    batches = supports, queries, [run.keep.feed.batch(0)]
    few = replace(sizes, steps=2)

    def warm() -> None:
        next(iter(protection(name, few)))
        for _ in bare_round(real, attacker, setting, tuple(made[:2] for made in batches)):
            pass

    warm()
    found = compared(
        lambda: next(rounds),
        lambda: bare_round(real, attacker, setting, batches),
        repeats,
        of=lambda feed: feed is not run.keep.feed,
    )
    what = f"protect round / bare passes: {name}, 32x32, K = {sizes.steps}, batch {sizes.batch}"
    return row(
        f"{what}, {setting.precision}",
        found.ratios(),
        at_most=1.05,
        note="a round between checks: without the guard's evaluation and without a state written,"
        f" both of which come every so many rounds only; {found.note()}",
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
def scored_anew(model: nn.Module, setting: Setting, fresh: Batches, batches: Batches) -> float:
    """Score as the audit's protocol does: as it is, and with BatchNorm's statistics anew.

    Returns the seconds of what comes after the first of the two scores.
    """
    scored(model, setting, batches)
    start = time.perf_counter()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    kept = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for images, _ in fresh:
        with setting.autocast():
            model(images)
    scored(model, setting, batches)
    for norm, held in zip(norms, kept, strict=True):
        norm.momentum = 0.1
        for buffer, value in zip(norm.buffers(), held, strict=True):
            buffer.copy_(value)
    return time.perf_counter() - start


def trial_rows(name: str, steps: int, repeats: int) -> list[Row]:
    run = protection(name, quick(Sizes()))
    setting, domain = run.setting, run.setting.restricted[0]
    strategy = Strategy(learning_rate=1e-3, batch_size=TRIAL_BATCH, steps=steps)
    bench = Bench(setting, EVALUATIONS)
    job = Job("protected", domain.name, strategy, 0)
    start = Start(run.model, name, "")
    shorter = strategy.model_copy(update={"steps": 4})
    brief = Bench(setting, 2), Job("protected", domain.name, shorter, 0)
    feed = setting.feed(domain, domain.train, batch_size=TRIAL_BATCH, stream=(0, ("bare",)))
    batches = [feed.batch(step) for step in range(steps)]
    validation, test = (
        list(setting.feed(domain, images, batch_size=250).in_order())
        for images in (domain.validation, domain.test)
    )
    due = evaluation_steps(steps, EVALUATIONS)

    again: list[float] = []

    def bare() -> Iterator[None]:
        model = copy.deepcopy(run.model).train()
        optimizer = momentum(model)
        again.append(scored_anew(model, setting, batches[:4], validation))
        for step, batch in enumerate(batches):
            if step and step % PIECE == 0:
                yield
            train(model, optimizer, setting, batch)
            if step + 1 in due:
                again[-1] += scored_anew(model, setting, batches[:4], validation)
        scored(model, setting, test)

    brief[0].run(brief[1], start)
    found = compared(lambda: bench.run(job, start), bare, repeats, of=lambda feed: True)
    what = f"{name}, 32x32, {steps} steps of {TRIAL_BATCH}, {len(due) + 1} evaluations"
    return [
        row(
            f"attack trial / bare training: {what}, {setting.precision}",
            found.ratios(),
            at_most=1.03,
            note="both measure BatchNorm's statistics anew at each evaluation and score twice, as"
            f" the audit's protocol asks; {found.note()}",
        ),
        row(
            f"attack trial / bare training scored once: {what}, {setting.precision}",
            found.ratios(less=again),
            note="the same seconds, less those of the bare training's statistics and second scores:"
            " what the protocol costs beyond a plain evaluation",
        ),
    ]


def rows(short: bool, names: tuple[str, ...] = ("ResNet-20", "ResNet-18")) -> list[Row]:
    """Return a round and a trial on each network."""
    sizes, steps, pairs = (quick(Sizes()), 6, (1, 1)) if short else (Sizes(), TRIAL_STEPS, (3, 5))
    found = []
    for name in names:
        # The larger one takes fewer steps, or one round would take all of the time.
        fewer = replace(sizes, steps=min(sizes.steps, 15)) if name == "ResNet-18" else sizes
        found += [round_row(name, fewer, pairs[0]), *trial_rows(name, steps, pairs[1])]
    return found


if __name__ == "__main__":
    alone(rows)
