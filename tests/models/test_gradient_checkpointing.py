"""Gradient checkpointing changes what a run keeps in memory and nothing that it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cells import command
from sameness import settings_in
from sophon import _models as models
from sophon._base.errors import UnsupportedModelError
from sophon._cli.run_file import load, load_subject
from sophon._data import Domain
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import Guard, ModelSpec, Precision, Strategy
from sophon._tasks import Denoising

# Each draws something of its own in train mode: which branches and units it drops.
CAFORMER, VIT, UNET = "small_caformer", "timm:test_vit", "diffusers:unet.json"
ARGUMENTS: dict[str, dict[str, Any]] = {VIT: {"drop_path_rate": 0.5, "proj_drop_rate": 0.2}}
ORL = Path(__file__).resolve().parents[2] / "recipes/orl-unet-16.json"
STRATEGIES = {
    "adam": Strategy(optimizer="adam", learning_rate=0.01, batch_size=4),
    "lora": Strategy(optimizer="sgd", learning_rate=0.1, batch_size=4, lora_rank=2),
}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the configuration of a U-Net that drops units."""
    made = tmp_path_factory.mktemp("networks")
    unet = json.loads(ORL.read_text()) | {"dropout": 0.3}
    (made / "unet.json").write_text(json.dumps(unet))
    return made


def built(name: str, folder: Path, *, on: bool) -> nn.Module:
    classes = None if name == UNET else 2
    spec = ModelSpec(
        name=name,
        classes=classes,
        gradient_checkpointing=on,
        arguments=ARGUMENTS.get(name, {}),
    )
    return models.resolve_model(spec, base=folder)[0]


@contextmanager
def kept() -> Iterator[list[int]]:
    """Give the most bytes that are kept for backward passes while the context lasts."""
    held, most = 0, [0]

    def keep(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        most[0] = max(most[0], held)
        return tensor

    def take(tensor: Tensor) -> Tensor:
        nonlocal held
        held -= tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, take):
        yield most


def after_a_round(
    name: str, folder: Path, strategy: Strategy, precision: Precision, *, on: bool
) -> tuple[dict[str, Tensor], int]:
    """Return the weights after a round of protection, and the most bytes kept for a backward."""
    model = built(name, folder, on=on)
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
            precision=precision,
            rehearsal=Rehearsal(steps=2, query_batch_size=4, fixed=strategy),
            guard=Guard(tolerance_relative=10.0) if name == UNET else Guard(tolerance_points=100),
        ),
        **denoising,
    )
    with kept() as most:
        list(run)
    return {name: value.clone() for name, value in run.model.state_dict().items()}, most[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [CAFORMER, VIT, UNET])
def test_a_round_gives_the_same_weights_and_keeps_less(
    name: str, strategy: str, precision: Precision, folder: Path
) -> None:
    given = STRATEGIES[strategy]
    plain, usual = after_a_round(name, folder, given, precision, on=False)
    checkpointed, less = after_a_round(name, folder, given, precision, on=True)
    assert list(plain) == list(checkpointed)
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    before = built(name, folder, on=False).state_dict()
    assert any(not torch.equal(plain[key], value) for key, value in before.items())
    assert less < 0.8 * usual


@pytest.mark.parametrize("name", [CAFORMER, VIT, UNET])
def test_a_copy_in_another_process_is_checkpointed_and_the_same_network(
    name: str, folder: Path
) -> None:
    model = built(name, folder, on=True)
    sent = ForkingPickler.loads(ForkingPickler.dumps(model))
    plain = built(name, folder, on=False)
    assert models.network_identity(sent) == models.network_identity(plain)
    # An audit compares what the protected and the unprotected model compute with.
    assert models.code_differences(sent, plain) == ()
    assert models.code_differences(plain, sent) == ()
    size = (2, 3, 16, 16) if name == UNET else (2, 3, 32, 32)
    spent = []
    for one in (plain, model, sent):
        words = (torch.zeros(size), 0) if name == UNET else (torch.zeros(size),)
        with kept() as most:
            one.train()(*words)
        spent.append(most[0])
    assert spent[1] == spent[2] < spent[0]


def test_a_fresh_network_is_checkpointed_too() -> None:
    spec = ModelSpec(name=CAFORMER, classes=2, gradient_checkpointing=True)
    _, fresh = models.resolve_model(spec)
    assert all(stage.grad_checkpointing for stage in fresh().stages)  # type: ignore[union-attr]


def test_what_else_runs_the_blocks_is_code_of_its_own(folder: Path) -> None:
    def spoilt(part: nn.Module, *inputs: Any) -> Any:
        return part(*inputs)

    model: Any = built(UNET, folder, on=True)
    model.enable_gradient_checkpointing(spoilt)
    found = models.code_differences(model, built(UNET, folder, on=False))
    assert any("_gradient_checkpointing_func" in line for line in found)


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
    weights, spent = [], []
    for on in ("false", "true"):
        file = tmp_path / f"{on}.toml"
        file.write_text(RUN.format(on=on, path=paths[0], other=paths[1]))
        out = tmp_path / on
        with kept() as most:
            command("protect", file, "--out", out)
        spent.append(most[0])
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert spent[1] < 0.8 * spent[0]
    # The run file says it, whatever the checkpoint was made with.
    for on in ("false", "true"):
        case = load(tmp_path / f"{on}.toml", [])
        loaded = [load_subject(case, tmp_path / made)[0] for made in ("false", "true")]
        for model in (case.model, case.scratch(), *loaded):
            stages: Any = model.get_submodule("stages")
            assert {stage.grad_checkpointing for stage in stages} == {on == "true"}


def test_a_folder_of_diffusers_is_checkpointed_as_the_run_file_says(
    tmp_path: Path, folder: Path
) -> None:
    built(UNET, folder, on=False).save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    pixels, labels = images(0, 1, 16)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    pixels, labels = images(1, 1, 16)
    np.savez(tmp_path / "b.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    for on in (False, True):
        file = tmp_path / "run.toml"
        file.write_text(
            f'[model]\nname = "diffusers:{folder / "unet.json"}"\n'
            f"gradient_checkpointing = {str(on).lower()}\n"
            f'[task]\nname = "denoising"\n'
            f'[original]\nsource = "npz"\nname = "a"\npath = "{tmp_path / "a.npz"}"\n'
            f'[[restricted]]\nsource = "npz"\nname = "b"\npath = "{tmp_path / "b.npz"}"\n'
        )
        model, _ = load_subject(load(file, []), tmp_path / "unet")
        parts = [vars(part).get("gradient_checkpointing") for part in model.modules()]
        assert any(parts) == on


def test_a_cell_stays_the_cell_with_it() -> None:
    said = "python recipes/reproduce.py resnet18-mnist-klu --set model.gradient_checkpointing=true"
    assert settings_in(said) == []
    assert settings_in(said + " --set model.classes=3") == ["model.classes"]
