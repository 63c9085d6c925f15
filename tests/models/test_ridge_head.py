"""A head fitted in closed form: what it solves, what it leaves alone, what it costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import RobustScaler
from torch import Tensor, nn

from builders import restricted, setting_of, trained_model
from denoisers import unet
from sophon._attacks.suites import SUITES, fitting
from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._data import load_domain
from sophon._models import fit_head, replace_head, resolve_model
from sophon._models.closed_form import _PENALTIES, _SCALES
from sophon._specs import (
    DomainSpec,
    FeatureScaling,
    FreshHead,
    Heal,
    ModelSpec,
    Preparation,
    RescaleWeights,
    RidgeHead,
    Strategy,
)
from sophon._training.evaluate import evaluate
from sophon._training.loop import AttackerCopy, attacker_copy
from sophon._training.preparations import Surroundings, prepare
from sophon._training.setting import Setting

STREAM = (0, ("attack",))


class Flat(nn.Module):
    """What reaches the head are the images."""

    def __init__(self, features: int, classes: int, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images)  # type: ignore[no-any-return]


def examples(count: int, features: int) -> tuple[Tensor, Tensor]:
    source = np.random.default_rng(0)
    labels = np.arange(count) % 3
    given = source.normal(size=(count, features)) + labels[:, None] * 0.8
    return torch.from_numpy(given).float(), torch.from_numpy(labels)


@pytest.mark.parametrize(("count", "features"), [(40, 6), (24, 50)])
def test_the_head_is_ridge_regression_with_the_best_penalty_left_out_one_by_one(
    count: int, features: int
) -> None:
    given, labels = examples(count, features)
    wanted = np.eye(3)[labels]
    centred = given.double() - given.double().mean(0)
    mean_square = float(torch.linalg.svdvals(centred)[: min(features, count - 1)].square().mean())
    penalties = [mean_square * float(p) for p in _PENALTIES]
    without = [
        cross_val_predict(Ridge(alpha=p), given.double().numpy(), wanted, cv=LeaveOneOut())
        for p in penalties
    ]
    best = int(np.argmin([((held - wanted) ** 2).mean() for held in without]))
    assert 0 < best < len(penalties) - 1
    held = torch.from_numpy(without[best])
    losses = [float(nn.functional.cross_entropy(s * held, labels)) for s in _SCALES.tolist()]
    scale = float(_SCALES[int(np.argmin(losses))])
    expected = Ridge(alpha=penalties[best]).fit(given.double().numpy(), wanted)
    model = Flat(features, 3)
    assert fit_head(model, "head", [(given[:9], labels[:9]), (given[9:], labels[9:])])
    weight, bias = model.head.weight.detach().numpy(), model.head.bias.detach().numpy()
    np.testing.assert_allclose(weight, scale * expected.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, scale * expected.intercept_, rtol=1e-4, atol=1e-5)


def test_a_head_without_bias_or_of_one_by_one_convolution_is_fitted_too() -> None:
    given, labels = examples(40, 6)
    model = Flat(6, 3, bias=False)
    assert fit_head(model, "head", [(given, labels)])
    assert float((model(given).argmax(1) == labels).float().mean()) > 0.5
    pooled = nn.Sequential(nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = given[:, :, None, None] + 0.01 * torch.randn(40, 6, 4, 4)
    assert fit_head(pooled, "0", [(images, labels)])
    assert float((pooled(images).argmax(1) == labels).float().mean()) > 0.7


def test_positions_and_tokens_count_as_their_mean() -> None:
    given, labels = examples(40, 6)
    maps = given[:, :, None, None] + torch.randn(40, 6, 4, 4)
    plain, read = Flat(6, 3), Flat(6, 3)
    pooled = nn.Sequential(nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert fit_head(plain, "head", [(maps.mean((2, 3)), labels)])
    assert fit_head(pooled, "0", [(maps, labels)])
    assert fit_head(read, "head", [(maps.flatten(2).mT, labels)])
    for weight in (pooled[0].weight.flatten(1), read.head.weight):
        torch.testing.assert_close(weight, plain.head.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_where_nothing_can_be_fitted_the_head_stays(value: float) -> None:
    model = Flat(6, 3)
    before = copy.deepcopy(model.state_dict())
    given, labels = torch.full((9, 6), value), torch.arange(9) % 3
    assert not fit_head(model, "head", [(given, labels)])
    assert not fit_head(model, "head", [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    factors, _ = prepare(model, (RidgeHead(),), _around(value))
    assert set(factors.values()) == {0.0}
    assert not torch.equal(model.head.weight, before["head.weight"]), "fresh, as any new head"


def _around(value: float) -> Surroundings:
    def labelled(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((torch.full((9, 6), value), torch.arange(9) % 3) for _ in range(count))

    return Surroundings(
        head="head",
        image_shape=(6, 1, 1),
        classes=3,
        seed=0,
        names=(),
        batches=None,
        steps=10,
        labelled=labelled,
    )


def test_an_input_without_features_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"what reaches 'head' has the shape \(6,\)"):
        fit_head(Flat(6, 3), "head", [(torch.zeros(6), torch.zeros(1, dtype=torch.int64))])


# --- As an attacker's preparation ----------------------------------------------------------------


def _prepared(
    model: nn.Module, setting: Setting, batch_size: int, steps: int, *preparations: Preparation
) -> AttackerCopy:
    domain = setting.restricted[0]
    strategy = Strategy(preparations=preparations, batch_size=batch_size, steps=steps)
    feed = setting.feed(domain, domain.train, batch_size=batch_size, stream=STREAM)
    return attacker_copy(
        model, strategy, setting, classes=domain.class_count, feed=feed, stream=STREAM
    )


def _accuracy(model: nn.Module, setting: Setting) -> float:
    domain = setting.restricted[0]
    return evaluate(model, setting, domain, domain.validation).value


def test_it_reads_the_refused_task_off_the_features_and_changes_nothing_else() -> None:
    given = trained_model()
    setting = setting_of(copy.deepcopy(given), restricted=(restricted(),))
    fresh, fitted = copy.deepcopy(given), copy.deepcopy(given)
    _prepared(fresh, setting, 32, 100, FreshHead())
    before = [module.training for module in fitted.modules()]
    origins = _prepared(fitted, setting, 32, 100, RidgeHead()).origins
    assert _accuracy(fitted, setting) > _accuracy(fresh, setting) + 0.3
    factors = {name: origin.factor for name, origin in origins.items()}
    assert {f for n, f in factors.items() if n.startswith(f"{setting.head}.")} == {0.0}
    assert {f for n, f in factors.items() if not n.startswith(f"{setting.head}.")} == {1.0}
    assert [module.training for module in fitted.modules()] == before
    held = given.state_dict()
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, held[name]) != name.startswith(f"{setting.head}."), name


def test_it_gets_far_on_a_real_network_before_the_first_step(shared_data: Path) -> None:
    spec = ModelSpec(name="resnet20", weights="resnet20_cifar10.safetensors")
    model = resolve_model(spec, base=shared_data)[0]
    kept, refused = (
        load_domain(
            DomainSpec(source="npz", path=name, limit=limit), base=shared_data, role="original"
        )
        for name, limit in (("cifar10.npz", 100), ("gtsrb10.npz", 1500))
    )
    setting = setting_of(copy.deepcopy(model), original=kept, restricted=(refused,))
    fresh, fitted = copy.deepcopy(model), copy.deepcopy(model)
    _prepared(fresh, setting, 64, 100, FreshHead())
    assert _prepared(fitted, setting, 64, 100, RidgeHead()).spent == 5
    assert _accuracy(fresh, setting) < 0.3
    assert _accuracy(fitted, setting) > 0.6


@pytest.mark.parametrize(
    ("batch_size", "steps", "spent"),
    # Some 640 digits to train on: a third of a step a whole batch, at most a twentieth of all.
    [(16, 1000, 14), (16, 40, 2), (64, 1000, 4), (1000, 1000, 1), (16, 2, 1)],
)
def test_passes_forward_come_out_of_the_budget(batch_size: int, steps: int, spent: int) -> None:
    domain = restricted()
    whole = max(1, len(domain.train) // batch_size)
    assert spent == min(-(-whole // 3), max(1, round(0.05 * steps)))
    setting = setting_of(trained_model(), restricted=(domain,))
    assert _prepared(trained_model(), setting, batch_size, steps, RidgeHead()).spent == spent


def test_it_comes_last_and_leaves_steps() -> None:
    for preparations in ((RidgeHead(), RescaleWeights()), (RidgeHead(), RidgeHead())):
        with pytest.raises(SpecError, match="list it last"):
            Strategy(preparations=preparations)
    with pytest.raises(SpecError, match="must leave steps"):
        Strategy(preparations=(Heal(share=0.5), RidgeHead(share=0.5)))
    assert Strategy(preparations=(RescaleWeights(), RidgeHead())).label() == (
        "init-FC-all +rescale_weights +ridge_head sgd_momentum 0.01"
    )
    setting = setting_of(trained_model(), restricted=(restricted(),))
    with pytest.raises(SpecError, match="leave no step of 1"):
        _prepared(trained_model(), setting, 16, 1, RidgeHead())


def test_a_denoiser_has_no_classes_to_fit_a_head_to() -> None:
    strategies = SUITES["standard-1"].strategies
    kept, left = fitting(strategies, "mse")
    fitted = [s for s in strategies if any(p.kind == "ridge_head" for p in s.preparations)]
    assert len(fitted) > 5
    assert not set(fitted) & set(kept)
    assert f"{fitted[0].label()}: no classes to fit a head to" in left
    held: Any = _around(0.0)
    without = Surroundings(**{**vars(held), "labelled": None, "head": "conv_out"})
    with pytest.raises(SpecError, match="labelled images"):
        prepare(unet(), (RidgeHead(),), without)


def test_replacing_the_head_first_changes_nothing_that_is_fitted() -> None:
    """The classes of the refused domain are fewer than the model's: any head is replaced."""
    domain = restricted()
    model = trained_model()
    wide = copy.deepcopy(model)
    replace_head(wide, "head", 9, seed=3)
    setting = setting_of(copy.deepcopy(model), restricted=(domain,))
    for one in (model, wide):
        _prepared(one, setting, 32, 100, RidgeHead())
    assert torch.equal(model.head.weight, wide.head.weight)


def _answers(given: Tensor, labels: Tensor, scaling: FeatureScaling) -> Tensor:
    model = Flat(given.shape[1], 3).double()
    assert fit_head(model, "head", [(given, labels)], scaling)
    return model(given).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scaling", ["plain", "whitened", "robust"])
def test_scales_of_features_mislead_a_plain_fit_alone(scaling: FeatureScaling) -> None:
    given, labels = examples(60, 6)
    given = given.double()
    scaled = given * torch.logspace(-2, 2, 6, dtype=torch.float64)
    wanted, found = _answers(given, labels, scaling), _answers(scaled, labels, scaling)
    assert torch.allclose(wanted, found, rtol=1e-4, atol=1e-4) == (scaling != "plain")
    if scaling == "whitened":
        turned = scaled @ torch.linalg.qr(given[:6])[0]
        assert torch.allclose(_answers(turned, labels, scaling), wanted, rtol=1e-3, atol=1e-3)


def test_scaled_fits_are_those_of_scikit_learn() -> None:
    given, labels = examples(60, 6)
    given[7, 2] = 1e4
    given = given.double()
    robust = RobustScaler().fit_transform(given.numpy()).clip(-3, 3)
    inside = (given - given.median(0).values).abs().amax(1) < 100
    for scaling, features in (
        ("whitened", PCA(whiten=True).fit_transform(given.numpy())),
        ("robust", robust),
    ):
        wanted = _answers(torch.from_numpy(features), labels, "plain")
        found = _answers(given, labels, scaling)  # type: ignore[arg-type]
        # What is clipped for the fit is not clipped for the head.
        near = inside if scaling == "robust" else torch.ones(60, dtype=torch.bool)
        near &= torch.from_numpy((abs(features) < 3).all(1)) | (torch.tensor(scaling == "whitened"))
        assert near.sum() > 50
        assert torch.allclose(found[near], wanted[near], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scaling", ["whitened", "robust"])
def test_nothing_is_fitted_to_features_that_are_alike(scaling: FeatureScaling) -> None:
    model = Flat(5, 3)
    assert not fit_head(model, "head", [(torch.ones(8, 5), torch.arange(8) % 3)], scaling)
    given, labels = examples(30, 5)
    given[:, 1] = 4.0
    assert fit_head(model, "head", [(given, labels)], scaling)
    assert model.head.weight.isfinite().all()
