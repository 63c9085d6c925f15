"""The audit is audited: models that only look protected are found out.

The two whose answer is a number are in `test_controls_known.py`: test files run side by side.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import original, restricted, scratch_model, trained_model
from controls import real_controls
from sophon._controls import DECOYS, ControlResult, Controls
from sophon._specs import AuditSpec


@pytest.fixture(scope="module")
def results(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ControlResult]:
    """Return what the audit made of every decoy."""
    run = real_controls(shared_data, tmp_path_factory.mktemp("controls"))
    found = {result.name: result for result in run.decoys()}
    assert len(found) == len(run) - 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", DECOYS)
def test_every_decoy_is_found_out(name: str, results: dict[str, ControlResult]) -> None:
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
