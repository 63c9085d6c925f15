"""Controls on small real images, for the test files that share them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from builders import original, scratch_model, trained_model
from sophon._attacks.suites import SUITES
from sophon._auditing.controls import Controls
from sophon._data import Domain, Images, load_domain
from sophon._models import resolve_model
from sophon._specs import AuditSpec, DomainSpec, ModelSpec

WEIGHTS = Path(__file__).parents[2] / "docs/results/weights/small_convnet_cifar10_16.safetensors"


SMALL = ModelSpec(name="small_convnet", weights=str(WEIGHTS))
SHORT = AuditSpec(suite="quick-2", steps=30, evaluations=2, batch_size=16)


def real_controls(
    shared_data: Path, store: Path | None, network: ModelSpec = SMALL, spec: AuditSpec = SHORT
) -> Controls:
    """Return the controls of a network that keeps real CIFAR-10, on real traffic signs."""
    kept = DomainSpec(source="npz", path="cifar10.npz", image_size=16, limit=60)
    signs = DomainSpec(source="npz", path="gtsrb10.npz", image_size=16, limit=150)
    model, scratch = resolve_model(network, base=shared_data)
    return Controls(
        model,
        original=load_domain(kept, base=shared_data),
        restricted=load_domain(signs, base=shared_data),
        spec=spec,
        store=store,
        scratch=scratch,
    )


def digit_controls(store: Path | None = None, *, benign: bool = True, **changes: Any) -> Controls:
    """Return the controls of a small network that keeps the digits 0 to 4, with a benign domain.

    Both tasks are these digits under other classes, on images of their own: what the network knows
    helps an attacker at once.
    """
    digits = original()

    def renamed(images: Images, by: int) -> Domain:
        labels = (images.labels + by) % digits.class_count
        return Domain.from_arrays(
            f"digits by {by}", images.pixels.permute(0, 2, 3, 1).numpy(), labels.numpy()
        )

    spec = AuditSpec(steps=4, evaluations=2, batch_size=128, precision="fp32")
    return Controls(
        trained_model(),
        original=renamed(digits.validation, 0),
        restricted=renamed(digits.test, 1),
        benign=[renamed(digits.train, 2)] if benign else [],
        spec=spec.model_copy(update=changes),
        scratch=scratch_model,
        store=store,
    )


def few_attacks(
    monkeypatch: pytest.MonkeyPatch, kept: Sequence[int] = (1, 10, 11), suite: str = "quick-1"
) -> None:
    """Leave these attacks of the suite; or three: one of all layers, two of the head alone."""
    whole = SUITES[suite]
    chosen = tuple(whole.strategies[i] for i in kept)
    monkeypatch.setitem(SUITES, suite, dataclasses.replace(whole, strategies=chosen))


@contextmanager
def leading_attacks() -> Iterator[None]:
    """Leave five attacks of `quick-2`: a fast one of all layers, a head alone, a ridge head, one
    after rescaling and one after the last block was reset; the suite adds one of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        few_attacks(patch, (2, 6, 11, 14, 15), "quick-2")
        yield
