"""Heads as libraries build them: two that are averaged, one behind a ReLU, auxiliary ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sophon
from builders import trained_model
from sophon import _models as models
from sophon._base.errors import UnsupportedModelError
from sophon._base.torchvision_patch import library
from sophon._models.libraries import stating_input, without_auxiliary
from sophon._models.own_input import own_input
from sophon._specs import FreshHead, Guard, RidgeHead

NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def distilled(classes: int) -> nn.Module:
    spec = sophon.ModelSpec(
        name="timm:deit_tiny_distilled_patch16_224", classes=classes, arguments=NARROW
    )
    return sophon.resolve_model(spec)[0]


def squeezed(classes: int) -> nn.Module:
    name = "torchvision:squeezenet1_1"
    return sophon.resolve_model(sophon.ModelSpec(name=name, classes=classes))[0]


BUILT = {"distilled": (distilled, "head"), "squeezed": (squeezed, "classifier.1")}


def domain(name: str, classes: int, seed: int) -> sophon.Domain:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    return sophon.Domain.from_arrays(name, pixels, np.arange(60) % classes)


@pytest.mark.parametrize("kind", BUILT)
def test_every_head_is_found_and_replaced_together(kind: str) -> None:
    make, name = BUILT[kind]
    model = make(5)
    assert models.find_head(model, (3, 32, 32)) == name
    models.replace_head(model, name, 3, seed=0)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_two_heads_are_no_block_and_are_trained_alone_by_a_linear_probe() -> None:
    model = distilled(5)
    assert models.heads(model, "head") == ("head", "head_dist")
    assert models.heads(model, "head_dist") == ("head_dist", "head")
    assert "head_dist" not in [name for block in models.blocks(model, "head") for name in block]
    probed = {id(p) for p in models.head_parameters(model, "head")}
    assert {n for n, p in model.named_parameters() if id(p) in probed} == {
        *("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
    }
    models.add_lora(model, 2, head="head", seed=0, names=())
    assert {"head.weight", "head_dist.bias"} <= models.lora_parameters(model, "head")


def test_both_heads_are_fitted_in_closed_form() -> None:
    model = distilled(5)
    labels = torch.arange(30) % 5
    stream = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, 32, 32, generator=stream)
    images = means[labels] + 0.1 * torch.randn(30, 3, 32, 32, generator=stream)
    before = [p.clone() for p in models.head_parameters(model, "head")]
    assert models.fit_head(model, "head", [(images, labels)])
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before, models.head_parameters(model, "head"), strict=True)
    ]
    assert all(changed)
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.9


def test_weights_of_the_encoder_are_its_matrices_and_filters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 5)
    )
    assert set(models.encoder_weights(model, "4")) == {"0.weight", "3.weight"}


@pytest.mark.parametrize("kind", BUILT)
def test_they_are_protected_against_another_number_of_classes(kind: str) -> None:
    model = BUILT[kind][0](2)
    rehearsal = sophon.Rehearsal(
        steps=2,
        query_batch_size=4,
        distribution=sophon.StrategyDistribution(
            batch_sizes=(4,), preparations=((FreshHead(),), (RidgeHead(),))
        ),
    )
    spec = sophon.ProtectSpec(
        rounds=2,
        original_batch_size=4,
        guard=Guard(every=1, tolerance_points=100),
        rehearsal=rehearsal,  # type: ignore[call-arg]
    )
    made = sophon.protect(
        model, original=domain("keep", 2, 0), restricted=domain("refuse", 3, 1), spec=spec
    )
    with torch.no_grad():
        assert made.model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 64), ("inception_v3", 299)], ids=["googlenet", "inception"]
)
def test_a_checkpoint_with_auxiliary_heads_loads_without_them(
    name: str, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torchvision: Any = library("torchvision.models", "", "")
    given = torchvision.get_model(name, num_classes=4, aux_logits=True, init_weights=False)
    save_file(given.state_dict(), tmp_path / "w.safetensors")
    spec = sophon.ModelSpec(name=f"torchvision:{name}", weights=tmp_path / "w.safetensors")
    model, _ = sophon.resolve_model(spec)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.train(False)(images), given.eval()(images))
    (line,) = caplog.messages
    assert "left out ('" in line
    with pytest.raises(UnsupportedModelError, match=r"aux_logits=False"):
        models.check_images(given, (3, size, size), what="x")
    models.check_images(without_auxiliary(given), (3, size, size), what="x")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_that_normalises_inside_states_what_its_weights_take(name: str) -> None:
    torchvision: Any = library("torchvision.models", "", "")
    inside = torchvision.get_model(
        name, num_classes=4, aux_logits=False, init_weights=False, transform_input=True
    )
    outside = torchvision.get_model(name, num_classes=4, aux_logits=False, init_weights=False)
    outside.load_state_dict(inside.state_dict())
    pixels = torch.rand(2, 3, 96, 96)
    outputs = []
    for model in (inside, outside):
        own = own_input(stating_input(model, name))
        assert own is not None
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (own.mean, own.std))
        with torch.no_grad():
            outputs.append(model.eval()((pixels - mean) / std))
    assert torch.allclose(*outputs, atol=1e-4)


class _Foreign(nn.Module):
    """A layer of someone whose method of timm's name asks for more."""

    def get_classifier(self, name: str) -> str:
        return name

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_method_of_the_same_name_is_not_asked() -> None:
    model = trained_model()
    model.stage1.add_module("own", _Foreign())  # type: ignore[operator, union-attr]
    assert models.heads(model, "head") == ("head",)
