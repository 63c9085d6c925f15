"""Models that compute something else in the precision of the attacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders import original, restricted, setting_of, trained_model
from sophon._auditing.audit import Audit
from sophon._auditing.vitals import measure_vitals
from sophon._specs import AuditSpec
from sophon._training.rounding import TOLERATED, rounding_error


class Biased(nn.Module):
    """A convolution with a bias before its BatchNorm, as VGG has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.convolution(images)).relu().mean(dim=(2, 3))
        return self.head(features)  # type: ignore[no-any-return]


def shifted(by: float) -> Biased:
    """Return the same function: what the bias adds, the running mean takes away."""
    model = Biased().eval()
    with torch.no_grad():
        assert model.convolution.bias is not None
        model.convolution.bias.add_(by)
        assert model.norm.running_mean is not None
        model.norm.running_mean.add_(by)
    return model


@pytest.mark.parametrize("task", ["network", "trained"])
def test_a_sound_network_is_the_same_in_either_precision(task: str) -> None:
    model = shifted(0.0) if task == "network" else trained_model()
    before = copy.deepcopy(model.state_dict())
    error = rounding_error(model, setting_of(model, precision="bf16"))
    assert error is not None
    assert 0 < error < TOLERATED / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rounding_error(model, setting_of(model)) is None


def test_a_large_bias_that_batch_norm_takes_away_is_lost_in_rounding() -> None:
    model, setting = shifted(1000.0), setting_of(shifted(0.0), precision="bf16")
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(images), shifted(0.0)(images), rtol=0, atol=1e-3)
    error = rounding_error(model, setting)
    assert error is not None
    assert error > 5 * TOLERATED
    assert measure_vitals(model, setting).rounding == error
    assert measure_vitals(model, setting_of(model)).rounding is None


def test_what_no_loss_sees_hides_no_error_and_what_overflows_is_one() -> None:
    class Raised(Biased):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).add(self.by)

    model: Any = Raised()
    setting = setting_of(Biased(), precision="bf16")
    # All outputs alike larger: the loss is the same, and in bf16 nothing is left of the rest.
    with torch.no_grad():
        model.by, model.head.bias[:] = 0.0, 900.0
    assert (rounding_error(model, setting) or 0.0) > TOLERATED
    with torch.no_grad():
        model.by, model.head.bias[:] = 3e38, 0.0
    assert rounding_error(model, setting) in (None, 1e6)
    model.by = "nothing"
    assert rounding_error(model, setting) is None


def test_a_model_that_raises_in_the_lower_precision_alone_is_lost_there() -> None:
    class Picky(Biased):
        def forward(self, images: Tensor) -> Tensor:
            outputs = super().forward(images)
            if outputs.dtype == torch.bfloat16:
                raise RuntimeError("single precision only")
            return outputs

    model = Picky().eval()
    error = rounding_error(model, setting_of(Biased(), precision="bf16"))
    assert error is not None
    assert error > TOLERATED


def test_an_audit_that_may_choose_attacks_such_a_model_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(requested: str, *_: object) -> str:
        return "bf16" if requested == "auto" else requested

    monkeypatch.setattr("sophon._training.setting.choose_precision", choose)

    def chosen(model: nn.Module, precision: Any = "auto") -> str:
        audit = Audit(
            model,
            unprotected=shifted(0.0),
            original=original(),
            restricted=restricted(),
            spec=AuditSpec(suite="quick-1", steps=2, precision=precision, seeds=(0,)),
            scratch=Biased,
        )
        return audit.setting.precision

    assert chosen(shifted(0.5)) == "bf16"
    assert chosen(shifted(1000.0)) == "fp32"
    assert chosen(shifted(1000.0), "bf16") == "bf16"
    assert chosen(shifted(0.5), "fp32") == "fp32"
