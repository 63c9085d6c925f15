"""What a round of erasure costs beside the forward and backward passes it cannot do without.

    python benchmarks/erasure.py

Bare passes of a classifier and of a U-Net: the restricted batch and the original one forward and
backward through the network, the original one forward through the given network, one step of Adam.
Bar: 1.15 times these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import network, noise, threads
from denoising import domain as pictures
from denoising import network as unet
from timing import Row, alone, ratios, row
from torch import Tensor, nn
from torch.optim import Adam

from sophon._models import predict
from sophon._protection.denoising_readers import DenoisingReadersSpec
from sophon._protection.protection import Protection
from sophon._protection.spec import Joint, ProtectSpec
from sophon._protection.terms.denoising_erasure import DenoisingErasureSpec
from sophon._protection.terms.distil import DistilSpec
from sophon._protection.terms.erasure import ErasureSpec
from sophon._protection.terms.task import TaskLossSpec
from sophon._specs import Guard
from sophon._tasks import Denoising

# Of the model and of what it meets, the loss, and the same pass of another model.
Passed = tuple[Tensor, Callable[[nn.Module], object]]
Pass = Callable[[nn.Module, Tensor, Tensor], Passed]


def classified(model: nn.Module, images: Tensor, labels: Tensor) -> Passed:
    outputs = model(images).float()
    return F.cross_entropy(outputs, labels), lambda given: given(images)


def denoised(model: nn.Module, images: Tensor, labels: Tensor) -> Passed:
    mixed = Denoising().mixed(images, labels, torch.Generator())

    def predicted(of: nn.Module) -> Tensor:
        return predict(of, mixed.images, mixed.timesteps).float()

    return F.mse_loss(predicted(model), mixed.targets), predicted


def bare_passes(run: Protection, passed: Pass) -> Callable[[], None]:
    model = run.setting.place(copy.deepcopy(run.model)).train()
    given, setting = run.around.given, run.setting
    optimizer = Adam(model.parameters(), 1e-3, fused=True)
    (term,) = run.hinder
    feeds = (term.feeds[0], run.keep.feed)
    state = {"step": 0}

    def passes() -> None:
        for index, feed in enumerate(feeds):
            with setting.autocast():
                loss, again = passed(model, *feed.batch(state["step"]))
            loss.backward()
            if index:
                with torch.no_grad(), setting.autocast():
                    again(given)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1

    return passes


def measured(run: Protection, passed: Pass, what: str, short: bool) -> Row:
    """Return the ratio of a round to its bare passes."""
    rounds, bare = iter(run), bare_passes(run, passed)
    found = ratios(lambda: next(rounds), bare, 2 if short else 12, within=60.0)
    return row(f"round of erasure / bare passes, {what}", found, at_most=1.15, unit="x")


def rows(short: bool) -> list[Row]:
    """Return the row of a classifier and that of a U-Net."""
    rounds, guard = 10_000, Guard(every=10_000)
    domains = [noise(kind, seed, count=1000, size=32) for seed, kind in enumerate("ab")]
    spec = ProtectSpec(rounds=rounds, guard=guard, hinder=(ErasureSpec(),))
    with threads(1):
        run = Protection(
            network("ResNet-20"), original=domains[0], restricted=domains[1], spec=spec
        )
        first = measured(run, classified, "ResNet-20, 192 + 256 images", short)
        spec = ProtectSpec(
            rounds=rounds,
            guard=guard,
            keep=(TaskLossSpec(), DistilSpec()),
            hinder=(DenoisingErasureSpec(batch_size=96, readers=DenoisingReadersSpec(networks=1)),),
            update=Joint(),
            original_batch_size=64,
        )
        run = Protection(
            unet(),
            original=pictures("a", 0),
            restricted=pictures("b", 1),
            task=Denoising(),
            spec=spec,
        )
        return [first, measured(run, denoised, "U-Net, 96 + 64 images", short)]


if __name__ == "__main__":
    alone(rows)
