"""What a round of erasure costs beside the forward and backward passes it cannot do without.

    python benchmarks/erasure.py

Bare passes: the restricted batch and the original one forward and backward through the network, the
original one forward through the given network, one step of Adam. Bar: 1.15 times these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import network, noise, threads
from timing import Row, alone, ratios, row
from torch.optim import Adam

from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.erasure import ErasureSpec
from sophon._specs import Guard


def bare_passes(run: Protection) -> Callable[[], None]:
    model = run.setting.place(copy.deepcopy(run.model)).train()
    given, setting = run.around.given, run.setting
    optimizer = Adam(model.parameters(), 1e-3, fused=True)
    (term,) = run.hinder
    feeds = (term.feeds[0], run.keep.feed)
    state = {"step": 0}

    def passes() -> None:
        for index, feed in enumerate(feeds):
            images, labels = feed.batch(state["step"])
            with setting.autocast():
                outputs = model(images).float()
                loss = F.cross_entropy(outputs, labels)
            loss.backward()
            if index:
                with torch.no_grad(), setting.autocast():
                    given(images)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1

    return passes


def rows(short: bool) -> list[Row]:
    """Return the ratio of a round to its bare passes."""
    name = "ResNet-20"
    spec = ProtectSpec(rounds=10_000, hinder=(ErasureSpec(),), guard=Guard(every=10_000))
    domains = [noise(kind, seed, count=1000, size=32) for seed, kind in enumerate("ab")]
    with threads(1):
        run = Protection(network(name), original=domains[0], restricted=domains[1], spec=spec)
        rounds, bare = iter(run), bare_passes(run)
        found = ratios(lambda: next(rounds), bare, 2 if short else 12, within=60.0)
    what = f"round of erasure / bare passes, {name}, 192 + 256 images"
    return [row(what, found, at_most=1.15, unit="x")]


if __name__ == "__main__":
    alone(rows)
