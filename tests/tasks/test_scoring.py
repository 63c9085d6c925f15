"""A task owns its scoring: what scores of images come to, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builders import original, setting_of, trained_model
from sophon._records.audit_record import ErrorScore, Score
from sophon._records.metrics import KINDS
from sophon._tasks import Classification, Distillation
from sophon._tasks.task import MEASURES
from sophon._training.evaluate import image_scores


def test_every_kind_of_metric_is_measured() -> None:
    assert MEASURES.keys() == KINDS.keys()
    assert Classification().kind is KINDS["accuracy"]
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert Classification().measure(scores) == Score(correct=3, total=4)


def test_a_squared_error_is_averaged_over_parts_and_spread_over_images() -> None:
    errors = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.5, 1.0]], dtype=torch.float64)
    found = MEASURES["mse"](1 - errors)
    assert isinstance(found, ErrorScore)
    means = [0.2, 0.4, 0.6]
    assert found.mse == pytest.approx(0.4)
    assert found.variance == pytest.approx(sum((m - 0.4) ** 2 for m in means) / 3)
    assert (found.total, found.quarters) == (3, pytest.approx((0.2, 0.6)))
    assert MEASURES["mse"](1 - errors[:1]).quarters == ()


def test_logits_that_are_not_finite_are_not_right() -> None:
    logits = torch.tensor([[2.0, 1.0], [math.inf, 1.0], [1.0, -math.inf], [1.0, 2.0]])
    found = Classification().score(logits, torch.zeros(4, dtype=torch.long))
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_student_learns_softened_logits() -> None:
    """Temperature T softens both, and T squared keeps the gradients' size (arXiv 1503.02531)."""
    task = Distillation(Classification(), trained_model(), temperature=2.0)
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    wanted, given = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    expected = 4 * (wanted * (wanted / given).log()).sum(1)
    torch.testing.assert_close(task.loss(student, teacher), expected)
    maps = torch.randn(2, 3, 5, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(task.loss(*maps), (maps[0] - maps[1]).square().mean((1, 2)))
    assert torch.equal(task.score(student, teacher), -task.loss(student, teacher))


class _Halved(Classification):
    """Returns its scores in half precision, as a network under autocast may."""

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().score(outputs, targets).bfloat16()


def test_scores_are_kept_in_single_precision_whatever_the_task_returns() -> None:
    model, domain = trained_model(), original()
    setting = setting_of(model)
    found = image_scores(model, setting, domain, domain.validation)
    object.__setattr__(setting, "task", _Halved())
    model.train()
    again = image_scores(model, setting, domain, domain.validation)
    assert found.dtype == again.dtype == torch.float32
    assert torch.equal(found, again)
    assert all(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d))
