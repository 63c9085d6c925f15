"""Whether gradients that vanish turn into denormal numbers, and whether these slow the processor.

A network is protected, then every gradient of a query's backward is looked at: the share of
denormal numbers among those that are not zero, on the protected network and on one whose logits
are thirty times too large: of many factors tried the one with the most denormals (above it, what
vanishes is zero). The squares that Adam keeps of gradients vanish first: they are counted, too. The
network starts untrained. Where there are some, the same passes are timed with denormals as they
are and flushed to zero, with one thread, because the switch reaches only the thread that sets it.
All is in fp32: instructions that multiply in bf16 flush denormals whatever the switch says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from cases import Sizes, protection, quick, rehearsal, threads
from timing import Row, alone, ratios, row
from torch import Tensor, nn

from sophon._protection.losses import SUPPRESSIONS
from sophon._protection.protection import Protection

LOSSES = ("klu", "ice")


@dataclass
class Count:
    """Numbers seen in gradients or moments: those not zero, and the denormal ones of them."""

    nonzero: int = 0
    denormal: int = 0

    def share(self) -> float:
        """Return the percentage of denormal numbers among those that are not zero."""
        return 100 * self.denormal / max(1, self.nonzero)

    def add(self, gradient: Tensor) -> None:
        size = gradient.abs()
        self.nonzero += int((size > 0).sum())
        self.denormal += int(((size > 0) & (size < torch.finfo(size.dtype).tiny)).sum())


@contextmanager
def flushed(flush: bool) -> Iterator[None]:
    """Flush denormals, or keep them, in the calling thread."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def passes(model: nn.Module, run: Protection, loss: str, count: Count | None = None) -> None:
    """Run query passes of one attacker on the model; look at each gradient if asked to."""
    attackers = rehearsal(run)
    feed = attackers.feed(0, attackers.strategy(0))
    model.zero_grad()
    for step in range(attackers.spec.steps):
        images, labels = feed.batch(step)
        with run.setting.autocast():
            outputs = watched(model, images, count)
        SUPPRESSIONS[loss].function(outputs.float(), labels).mean().backward()
    if count is not None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                count.add(parameter.grad)


def watched(model: nn.Module, images: Tensor, count: Count | None) -> Tensor:
    """Return the outputs; the gradient of every layer's output will be counted."""
    if count is None:
        result: Tensor = model(images)
        return result

    def note(layer: object, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(count.add)

    leaves = [part for part in model.modules() if not any(True for _ in part.children())]
    hooks = [part.register_forward_hook(note) for part in leaves]
    outputs = model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def saturated(model: nn.Module, factor: float) -> nn.Module:
    """Return a copy whose logits are `factor` times as large."""
    result = copy.deepcopy(model)
    *_, head = (part for part in result.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        head.weight.mul_(factor)
        head.bias.mul_(factor)
    return result


def rows(short: bool) -> list[Row]:
    """Return shares and the time that flushing saves, for both losses."""
    sizes, rounds, repeats = (quick(Sizes()), 1, 1) if short else (Sizes(5, 48, 16), 4, 3)
    found = []
    for loss in LOSSES:
        run = protection("ResNet-20", sizes, suppression=loss, rounds=rounds, precision="fp32")
        for _ in run:
            pass
        model = run.model.train()
        moments = Count()
        for state in run.update.optimizers["suppressor"].state.values():
            moments.add(state["exp_avg_sq"])
        what = f"{loss}, after {rounds} rounds, {run.setting.precision}"
        found.append(
            row(
                f"denormal second moments of the suppressor's Adam: {what}",
                [moments.share()],
                unit=" %",
            )
        )
        for name, subject in (
            (f"after {rounds} rounds", model),
            ("logits times 30", saturated(model, 30.0)),
        ):
            count = Count()
            passes(subject, run, loss, count)
            what = f"{loss}, {name}, {run.setting.precision}"
            found.append(row(f"denormal gradients: {what}", [count.share()], unit=" %"))
            if count.denormal:
                values = timed(subject, run, repeats)
                found.append(row(f"denormals kept / flushed: {what}, one thread", values))
    return found


def timed(model: nn.Module, run: Protection, repeats: int) -> list[float]:
    def with_flush(flush: bool) -> None:
        with flushed(flush):
            passes(model, run, rehearsal(run).spec.loss or "klu")

    with threads(1):
        return ratios(lambda: with_flush(False), lambda: with_flush(True), repeats)


if __name__ == "__main__":
    alone(rows)
