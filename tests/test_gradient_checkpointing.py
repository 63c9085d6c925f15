"""Gradient checkpointing changes what a run keeps in memory and nothing that it computes."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cells import command
from sophon import _models as models
from sophon._data import Domain
from sophon._errors import UnsupportedModelError
from sophon._protect import Protection
from sophon._runs import load, load_subject
from sophon._specs import Guard, ModelSpec, ProtectSpec, Rehearsal, Strategy
from sophon._tasks import Denoising

UNET = f"diffusers:{Path(__file__).resolve().parent.parent / 'recipes/orl-unet-16.json'}"
CAFORMER = "small_caformer"
RUN = """
[model]
name = "small_caformer"
gradient_checkpointing = {on}

[original]
source = "npz"
name = "first"
path = "{path}"

[[restricted]]
source = "npz"
name = "second"
path = "{other}"

[protect]
rounds = 1
original_batch_size = 8
precision = "fp32"
guard = {{ tolerance_points = 100 }}

[protect.rehearsal]
steps = 2
query_batch_size = 4
fixed = {{ optimizer = "sgd", learning_rate = 0.1, batch_size = 4 }}
"""


def images(seed: int, channels: int = 3, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return forty images of noise in two classes."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (40, size, size, channels), dtype=np.uint8)
    return pixels, np.arange(40) % 2


def built(name: str, *, on: bool) -> nn.Module:
    classes = None if name == UNET else 2
    spec = ModelSpec(name=name, classes=classes, gradient_checkpointing=on)
    return models.resolve_model(spec)[0]


def after_a_round(name: str, *, on: bool) -> tuple[dict[str, Tensor], int]:
    """Return the weights after a round of protection, and the most bytes kept for a backward."""
    held = most = 0

    def kept(tensor: Tensor) -> Tensor:
        nonlocal held, most
        held += tensor.numel() * tensor.element_size()
        most = max(most, held)
        return tensor

    def taken(tensor: Tensor) -> Tensor:
        nonlocal held
        held -= tensor.numel() * tensor.element_size()
        return tensor

    model = built(name, on=on)
    shape = (1, 16) if name == UNET else (3, 32)
    denoising: dict[str, Any] = {"task": Denoising()} if name == UNET else {}
    run = Protection(
        model,
        original=Domain.from_arrays("first", *images(0, *shape)),
        restricted=Domain.from_arrays("second", *images(1, *shape)),
        spec=ProtectSpec(
            rounds=1,
            suppression="dos" if name == UNET else "klu",
            original_batch_size=8,
            precision="fp32",
            rehearsal=Rehearsal(
                steps=2,
                query_batch_size=4,
                fixed=Strategy(optimizer="sgd", learning_rate=0.1, batch_size=4),
            ),
            guard=Guard(tolerance_relative=10.0) if name == UNET else Guard(tolerance_points=100),
        ),
        **denoising,
    )
    with torch.autograd.graph.saved_tensors_hooks(kept, taken):
        list(run)
    return {name: value.clone() for name, value in run.model.state_dict().items()}, most


@pytest.mark.parametrize("name", [CAFORMER, UNET])
def test_a_round_gives_the_same_weights_and_keeps_less(name: str) -> None:
    plain, usual = after_a_round(name, on=False)
    checkpointed, less = after_a_round(name, on=True)
    assert list(plain) == list(checkpointed)
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    assert any(not torch.equal(plain[k], v) for k, v in built(name, on=False).state_dict().items())
    assert less < 0.8 * usual


@pytest.mark.parametrize("name", [CAFORMER, UNET])
def test_a_checkpointed_model_can_be_sent_to_another_process(name: str) -> None:
    model = built(name, on=True)
    again = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert models.network_identity(again) == models.network_identity(built(name, on=False))


def test_a_fresh_network_is_checkpointed_too() -> None:
    spec = ModelSpec(name=CAFORMER, classes=2, gradient_checkpointing=True)
    _, fresh = models.resolve_model(spec)
    assert all(stage.grad_checkpointing for stage in fresh().stages)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:resnet18", "has BatchNorm"),
        ("torchvision:vgg11", "does not offer it"),
        ("timm:vgg11", "does not offer it"),
        ("small_convnet", "has BatchNorm"),
    ],
)
def test_a_network_without_it_is_refused(name: str, reason: str) -> None:
    spec = ModelSpec(name=name, gradient_checkpointing=True)
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing = true.*" + reason):
        models.resolve_model(spec)


def test_a_run_file_asks_for_it(tmp_path: Path) -> None:
    paths = [tmp_path / "first.npz", tmp_path / "second.npz"]
    for seed, path in enumerate(paths):
        pixels, labels = images(seed)
        np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    weights = []
    for on in ("false", "true"):
        file = tmp_path / f"{on}.toml"
        file.write_text(RUN.format(on=on, path=paths[0], other=paths[1]))
        out = tmp_path / on
        command("protect", file, "--out", out)
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    # The run file says it, whatever the checkpoint was made with.
    for on in ("false", "true"):
        case = load(tmp_path / f"{on}.toml", [])
        for made in ("false", "true"):
            model, _ = load_subject(case, tmp_path / made)
            stages: Any = model.get_submodule("stages")
            assert {stage.grad_checkpointing for stage in stages} == {on == "true"}
