"""The audit is audited: decoys are found out, the unprotected and a fresh model recovered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import original, restricted, scratch_model, trained_model
from sophon._controls import DECOYS, ControlResult, Controls
from sophon._data import load_domain
from sophon._models import resolve_model
from sophon._specs import AuditSpec, DomainSpec, ModelSpec


@pytest.fixture(scope="module")
def results(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ControlResult]:
    """Return the controls of a real ResNet-20 that keeps CIFAR-10, on real traffic signs."""
    kept = DomainSpec(source="npz", path="cifar10.npz", limit=30)
    signs = DomainSpec(source="npz", path="gtsrb10.npz", image_size=16, limit=150)
    spec = ModelSpec(name="resnet20", weights="resnet20_cifar10.safetensors")
    model, scratch = resolve_model(spec, base=shared_data)
    run = Controls(
        model,
        original=load_domain(kept, base=shared_data),
        restricted=load_domain(signs, base=shared_data),
        spec=AuditSpec(steps=50, evaluations=3, batch_size=32),
        store=tmp_path_factory.mktemp("controls"),
        scratch=scratch,
    )
    found = {result.name: result for result in run}
    assert len(found) == len(run)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DECOYS, "the unprotected model", "a fresh network"])
def test_every_control_gets_its_answer(name: str, results: dict[str, ControlResult]) -> None:
    result = results[name]
    assert result.passed, (result.summary.verdict, result.summary.advantage, result.flags)


def test_controls_leave_the_model_as_it_is() -> None:
    model = trained_model()
    spec = AuditSpec(steps=2, evaluations=2, batch_size=16)
    run = Controls(
        model, original=original(), restricted=restricted(), spec=spec, scratch=scratch_model
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = next(iter(run))
    assert first.passed
    assert "crashed attacks" in first.flags
    assert run.place.head == "head"
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
