"""What a network's library states of its images is the default; what differs is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import sophon
from builders import original, quick_spec, restricted, scratch_model, trained_model
from sophon._base.errors import CheckpointError
from sophon._models import own_input
from sophon._models.own_input import recorded_input
from sophon._reporting.export import export
from sophon._training.environment import domain_text
from sophon._training.resumable import run_identity
from sophon._training.setting import Setting, make_setting

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def domain(name: str, seed: int, **fields: Any) -> sophon.Domain:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    return sophon.Domain.from_arrays(name, pixels, np.arange(60) % 2, **fields)


def built(name: str) -> nn.Module:
    return sophon.resolve_model(sophon.ModelSpec(name=name, classes=2))[0]


def setting(model: nn.Module, **fields: Any) -> Setting:
    return make_setting(
        model,
        task=sophon.Classification(),
        original=domain("keep", 0, **fields),
        restricted=(domain("refuse", 1),),
        head=None,
        precision="fp32",
        device="cpu",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:vit_tiny_patch16_224", HALVES),
        ("timm:resnet10t", IMAGENET),
        ("torchvision:efficientnet_v2_l", HALVES),
        ("torchvision:squeezenet1_1", IMAGENET),
    ],
)
def test_the_own_normalisation_is_what_the_library_states(
    name: str, expected: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    own = own_input(built(name))
    assert own is not None
    assert (own.mean, own.std) == expected
    assert name.partition(":")[2] in own.stated


@pytest.mark.parametrize("role", ["keep", "refuse"])
def test_domains_without_a_normalisation_get_the_networks_own(
    role: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = setting(built("timm:vit_tiny_patch16_224"))
    chosen = {"keep": found.original, "refuse": found.restricted[0]}[role]
    assert found.normalisation(chosen) == HALVES
    assert found.input()["mean"] == HALVES[0]
    assert not caplog.messages
    assert "normalisation" in run_identity(
        quick_spec(), built("timm:vit_tiny_patch16_224"), found, engine=1
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:vit_tiny_patch16_224", "(the network's: pretrained_cfg vit_tiny_patch16_224."),
        # ImageNet's are the default as well, and still come from the network.
        ("timm:resnet10t", "(the network's: pretrained_cfg resnet10t."),
        ("torchvision:squeezenet1_1", "(the network's: pretrained_cfg squeezenet1_1.IMAGENET1K"),
        ("resnet20", "(by default)"),
    ],
)
def test_the_line_of_a_domain_says_where_its_normalisation_is_from(name: str, said: str) -> None:
    usual, own = sophon.Classification().normalisation, own_input(built(name))
    keep, given = domain("keep", 0), domain("keep", 0, mean=[0.5], std=[0.5])
    assert said in domain_text(keep, keep, usual, own)
    assert "(given)" in domain_text(given, given, usual, own)
    assert "(the original domain's)" in domain_text(keep, given, usual, own)


def test_what_the_run_file_says_wins_and_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = built("timm:vit_tiny_patch16_224")
    found = setting(model, mean=IMAGENET[0], std=IMAGENET[1])
    assert found.normalisation(found.restricted[0]) == IMAGENET
    (line,) = caplog.messages
    assert "warning: 'keep' is normalised with mean 0.485" in line
    assert "own is mean 0.5, 0.5, 0.5" in line
    caplog.clear()
    setting(model, mean=[0.5], std=[0.5])
    assert not caplog.messages


def test_networks_of_nobody_elses_are_normalised_as_before() -> None:
    assert own_input(scratch_model()) is None
    assert "normalisation" not in run_identity(
        quick_spec(), built("timm:resnet10t"), setting(built("timm:resnet10t")), engine=1
    )


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5], "std": [float("nan")]},
        {"mean": [128.0], "std": [0.5]},
        {"mean": [True], "std": [0.5]},
        {"mean": [], "std": [0.5]},
        {"mean": "0.5", "std": [0.5]},
    ],
)
def test_an_input_that_cannot_be_names_the_file(given: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"protection": {"input": given}}))
    with pytest.raises(CheckpointError, match=r"model\.json: input\.(mean|std) = .*restore"):
        recorded_input(trained_model(), file)


@pytest.mark.parametrize("about", [{}, {"protection": "x"}, {"protection": {"input": "x"}}])
def test_a_checkpoint_may_state_no_input(about: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps(about))
    model = trained_model()
    recorded_input(model, file)
    assert own_input(model) is None


def test_a_checkpoint_states_what_it_was_trained_on_and_its_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("zebra crossing", "one", "two", "three", "four")
    digits = original()
    kept = sophon.Domain(
        "keep", digits.train, digits.validation, digits.test, names, (0.25,), (0.5,)
    )
    sophon.protect(
        trained_model(),
        original=kept,
        restricted=restricted(),
        spec=quick_spec(rounds=2),
        out=tmp_path / "p",
        model_spec=sophon.ModelSpec(name="small_convnet", in_channels=1),
    )
    model, _ = sophon.resolve_model(sophon.ModelSpec(name=tmp_path / "p"))
    found = make_setting(
        model,
        task=sophon.Classification(),
        original=original(),
        restricted=(restricted(),),
        head=None,
        precision="fp32",
        device="cpu",
    )
    assert found.normalisation(original()) == ((0.25,), (0.5,))
    export(tmp_path / "p", tmp_path / "e")
    held = json.loads((tmp_path / "e" / "config.json").read_text())
    assert held["label_names"] == list(names)
    assert json.loads((tmp_path / "p" / "model.json").read_text())["protection"]["classes"] == [
        *names
    ]
