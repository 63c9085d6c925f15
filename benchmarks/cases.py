"""The networks and images that the speed benchmarks share. Images are random: speed needs none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import Domain
from sophon._models.networks import ResNet20, SmallConvNet
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._specs import Augmentation, Guard, Precision, Strategy


def noise(name: str, seed: int, *, count: int = 1000, size: int = 32) -> Domain:
    """Return `count` random images in ten classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Domain.from_arrays(name, pixels, np.arange(count) % 10)


def resnet18() -> nn.Module:
    prepare_torchvision()
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": ResNet20,
    "ResNet-18": resnet18,
    "small network": lambda: SmallConvNet(classes=10),
}


def network(name: str) -> nn.Module:
    """Return a network of ten classes with the same random weights every time."""
    torch.manual_seed(0)
    return NETWORKS[name]()


@dataclass(frozen=True)
class Sizes:
    """How much one round does: K steps of `support` + `query` images."""

    steps: int = 50
    support: int = 135
    query: int = 15

    @property
    def batch(self) -> int:
        """Images of one step."""
        return self.support + self.query


def quick(sizes: Sizes) -> Sizes:
    """Return sizes that take a moment."""
    return Sizes(min(sizes.steps, 3), 12, 4)


def protection(  # noqa: PLR0913 - one keyword per part of a case
    name: str,
    sizes: Sizes,
    *,
    precision: Precision = "auto",
    suppression: str = "klu",
    count: int = 1000,
    size: int = 32,
    rounds: int = 1000,
    strategies: int = 1,
    augmentation: Augmentation = "none",
) -> Protection:
    """Return a protection whose rounds have one attacker of K plain steps of SGD with momentum
    and one reinforcement step; the guard looks after the last round only.
    """
    attacker = Strategy(learning_rate=1e-3, batch_size=sizes.support, augmentation=augmentation)
    spec = ProtectSpec(
        rounds=rounds,
        suppression=suppression,
        original_batch_size=sizes.batch,
        original_augmentation=augmentation,
        rehearsal=Rehearsal(
            strategies=strategies,
            steps=sizes.steps,
            query_batch_size=sizes.query,
            fixed=attacker,
        ),
        reinforcement_steps=1,
        guard=Guard(every=rounds),
        precision=precision,
    )
    domains = [noise(kind, seed, count=count, size=size) for seed, kind in enumerate("ab")]
    return Protection(network(name), original=domains[0], restricted=domains[1], spec=spec)


def rehearsal(run: Protection) -> RehearsalTerm:
    """Return the one rehearsal of a protection."""
    (term,) = run.hinder
    assert isinstance(term, RehearsalTerm)
    return term


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
