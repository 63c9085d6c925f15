"""Suppression losses against their formulas in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sophon._base.errors import SpecError
from sophon._protection.losses import SUPPRESSIONS, suppression_named


def _fitting(metric: str) -> list[str]:
    return [name for name, loss in SUPPRESSIONS.items() if loss.metric == metric]


ON_LOGITS, ON_PREDICTIONS = _fitting("accuracy"), _fitting("mse")


def _logits(classes: int, scale: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    stream = torch.Generator().manual_seed(classes)
    return (torch.randn(9, classes, generator=stream, dtype=torch.float64) * scale).to(dtype)


def _labels(classes: int) -> torch.Tensor:
    return torch.arange(9) % classes


def _formula(name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    true = p[torch.arange(len(labels)), labels]
    q = (-logits).exp() / (-logits).exp().sum(1, keepdim=True)
    classes = logits.shape[1]
    return {
        "ice": -torch.log(1 - true),
        "reversed_logits": -torch.log(q[torch.arange(len(labels)), labels]),
        "klu": -(classes * p).log().mean(1),
        "negated_ce": true.log(),
        "negated_entropy": (p * p.log()).sum(1),
    }[name]


def _gradient_formula(name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p, q = logits.softmax(1), (-logits).softmax(1)
    one = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    true = (p * one).sum(1, keepdim=True)
    return {
        "ice": one * true - (1 - one) * p * true / (1 - true),
        "reversed_logits": one - q,
        "klu": p - 1 / logits.shape[1],
        "negated_ce": one - p,
        "negated_entropy": p * (p.log() - (p * p.log()).sum(1, keepdim=True)),
    }[name]


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_values_and_gradients_equal_the_formula(name: str, classes: int, scale: float) -> None:
    logits, labels = _logits(classes, scale).requires_grad_(True), _labels(classes)
    loss = SUPPRESSIONS[name].function(logits, labels)
    torch.testing.assert_close(loss, _formula(name, logits, labels), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(
        gradient, _gradient_formula(name, logits.detach(), labels), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("name", ON_LOGITS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=12), label=st.integers(0, 11)
)
def test_finite_on_logits_of_plus_minus_200(name: str, rows: list[float], label: int) -> None:
    logits = torch.tensor([rows], dtype=torch.float32, requires_grad=True)
    loss = SUPPRESSIONS[name].function(logits, torch.tensor([label % len(rows)]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(loss.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_inverse_cross_entropy_at_the_extremes(sign: float) -> None:
    logits = torch.tensor([[200.0 * sign, -200.0 * sign]], requires_grad=True)
    loss = SUPPRESSIONS["ice"].function(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(400.0 if sign > 0 else 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = [1.0, -1.0] if sign > 0 else [0.0, 0.0]
    assert gradient.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_finite_on_logits_of_any_size_met_in_float32(name: str, classes: int, size: float) -> None:
    logits = (_logits(classes, 1.0).sign() * size).float().requires_grad_()
    loss = SUPPRESSIONS[name].function(logits, _labels(classes))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ON_PREDICTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 3, 5, 7)])
def test_losses_on_predictions_equal_the_formula(name: str, shape: tuple[int, ...]) -> None:
    stream = torch.Generator().manual_seed(1)
    outputs = torch.randn(shape, generator=stream, dtype=torch.float64).requires_grad_(True)
    targets = torch.randn(shape, generator=stream, dtype=torch.float64)
    loss = SUPPRESSIONS[name].function(outputs, targets)
    elements = outputs[0].numel()
    values = outputs.detach().flatten(1).tolist()
    wanted = targets.flatten(1).tolist()
    expected = {
        "dos": [sum(x * x for x in row) / elements for row in values],
        "negated_mse": [
            -sum((x - y) ** 2 for x, y in zip(row, other, strict=True)) / elements
            for row, other in zip(values, wanted, strict=True)
        ],
    }[name]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    held = outputs.detach()
    slope = {"dos": 2 * held / elements, "negated_mse": -2 * (held - targets) / elements}[name]
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("name", ON_PREDICTIONS)
def test_losses_on_predictions_are_finite_up_to_a_thousand_millions(name: str) -> None:
    outputs = torch.full((2, 3, 8, 8), 1e9, requires_grad=True)
    loss = SUPPRESSIONS[name].function(outputs, -outputs.detach())
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_every_loss_fits_one_kind_of_task_and_no_other() -> None:
    assert sorted((*ON_LOGITS, *ON_PREDICTIONS)) == sorted(SUPPRESSIONS)
    for metric, names in (("accuracy", ON_LOGITS), ("mse", ON_PREDICTIONS)):
        for name in SUPPRESSIONS:
            if name in names:
                assert suppression_named(name, metric) is SUPPRESSIONS[name].function
                continue
            with pytest.raises(SpecError, match=f"{name}.*use one of {names[0]}"):
                suppression_named(name, metric)
