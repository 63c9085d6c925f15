"""Preparations: the factor is the derivative, the function is kept, the streams are their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sophon import _models as models
from sophon._attacks.suites import without_repeats
from sophon._base.errors import DataError, SpecError
from sophon._models.networks import ResNet20, SmallConvNet
from sophon._specs import (
    BalanceWeights,
    BatchNorm,
    Densify,
    Distil,
    FreshHead,
    Heal,
    KeepSpan,
    ModelSpec,
    NoiseKick,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Scramble,
    ShrinkPerturb,
    Strategy,
)
from sophon._training.preparations import PREPARATIONS, Course, Surroundings, prepare
from sophon._training.rescaling import channel_pairs, read_probes, scale_channels

IMAGE = (3, 32, 32)
EVERY: dict[str, tuple[Preparation, ...]] = {
    "fresh_head": (FreshHead(),),
    "reset_last_blocks": (ResetLastBlocks(blocks=2),),
    "rescale_weights": (RescaleWeights(norm=0.7),),
    "batch_norm": (BatchNorm(mode="reset"),),
    "noise_kick": (NoiseKick(),),
    "batch_norm reestimate": (BatchNorm(batches=2),),
    "noise_kick rank": (NoiseKick(rank=1),),
    "keep_span": (KeepSpan(start=0.25, end=0.75),),
    "balance_weights": (BalanceWeights(),),
    "shrink_perturb": (ShrinkPerturb(share=0.3),),
    "densify": (Densify(),),
    "scramble": (Scramble(),),
    "scramble match": (Scramble(mode="match"),),
    "ridge_head": (RidgeHead(),),
    "heal": (Heal(share=0.5),),
    "distil": (Distil(share=0.5),),
    "all": (
        RescaleWeights(norm=0.5),
        RescaleWeights(norm=2.0),
        ResetLastBlocks(),
        FreshHead(),
        NoiseKick(),
    ),
}


# No one factor says what becomes of a tensor: nothing passes.
NO_FACTOR = {"balance_weights", "scramble", "scramble match"}


def around(classes: int = 10, head: str = "linear", **fields: object) -> Surroundings:
    values: dict[str, object] = {
        "head": head,
        "image_shape": IMAGE,
        "classes": classes,
        "seed": 0,
        "names": ("attacker", 1),
        "batches": batches,
        "train": nudge,
        "steps": 4,
        "labelled": alike,
    }
    return Surroundings(**(values | fields))  # type: ignore[arg-type]


def nudge(model: nn.Module, course: Course) -> None:
    """Move every weight by what only the course decides, as training does to first order."""
    assert course.steps == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(course.learning_rate)


def alike(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Nothing can be fitted to these: a fitted head follows the weights beyond its factor."""
    return ((torch.zeros(16, *IMAGE).double(), torch.arange(16) % 10) for _ in range(count))


def batches(count: int) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(16, *IMAGE, generator=source) * 2 + 0.5


@pytest.fixture(scope="module")
def real(shared_data: Path) -> nn.Module:
    spec = ModelSpec(name="resnet20", weights="resnet20_cifar10.safetensors")
    return models.resolve_model(spec, base=shared_data)[0]


@pytest.fixture(scope="module")
def images(shared_data: Path) -> Tensor:
    with np.load(shared_data / "cifar10.npz", allow_pickle=False) as file:
        pixels = torch.from_numpy(file["x_test"][:200]).permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return (pixels - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), models.probing(model):
        out: Tensor = model(images)
    return out


def inflate(model: nn.Module, by: float) -> nn.Module:
    """Return the same function with weights `by` times as large before BatchNorm."""
    inflated = copy.deepcopy(model)
    modules = dict(inflated.named_modules())
    convolutions = [name for name, part in modules.items() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        for name in convolutions:
            norm = modules[name.replace("conv", "bn")]
            modules[name].weight.mul_(by)  # type: ignore[operator, union-attr]
            norm.running_mean.mul_(by)  # type: ignore[operator, union-attr]
            norm.running_var.mul_(by * by)  # type: ignore[operator, union-attr]
    return inflated


def test_every_kind_of_preparation_is_tried() -> None:
    assert set(PREPARATIONS) == {step.kind for steps in EVERY.values() for step in steps}


# --- The factor is the derivative -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EVERY.keys() - NO_FACTOR))
def test_a_move_of_the_real_weights_carries_over_by_the_factor(name: str) -> None:
    torch.manual_seed(0)
    real = ResNet20().double()
    with torch.no_grad():
        for parameter in real.parameters():
            if not parameter.any():
                # Noise relative to nothing would change with any move.
                parameter.normal_()
    moved = copy.deepcopy(real)
    prepared = copy.deepcopy(real)
    factors, _ = prepare(prepared, EVERY[name], around(batches=doubles))
    assert factors.keys() == dict(prepared.named_parameters()).keys()
    # A move that keeps the quantities a preparation measures: tiny, and checked to first order
    # only where the factor does not depend on the weights themselves.
    size = 1e-7
    directions = {key: orthogonal(p, size) for key, p in real.named_parameters()}
    with torch.no_grad():
        for key, parameter in moved.named_parameters():
            parameter.add_(directions[key])
    prepare(moved, EVERY[name], around(batches=doubles))
    after = dict(moved.named_parameters())
    for key, parameter in prepared.named_parameters():
        change = after[key] - parameter
        assert torch.allclose(change, factors[key] * directions[key], rtol=1e-3, atol=1e-3 * size)


def orthogonal(parameter: Tensor, size: float) -> Tensor:
    """Return a direction of root mean square `size` that leaves the norm as it is."""
    value = parameter.detach().flatten()
    noise = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(1))
    if value.norm() > 0:
        noise -= value * (noise @ value) / (value @ value)
    root_mean_square = noise.square().mean().sqrt().clamp_min(1e-12)
    return (noise * size / root_mean_square).view_as(parameter)


def doubles(count: int) -> Iterator[Tensor]:
    return (batch.double() for batch in batches(count))


def test_factors_say_what_was_kept_reset_and_rescaled() -> None:
    model = ResNet20()
    steps = (ResetLastBlocks(blocks=1), RescaleWeights(norm=0.5), FreshHead())
    factors, _ = prepare(model, steps, around())
    zero = {key for key, factor in factors.items() if factor == 0}
    assert zero == {key for key in factors if key.startswith(("layer3.2.", "linear."))}
    scaled = {key for key, factor in factors.items() if factor not in (0, 1)}
    assert scaled == {key for key in factors if ".conv" in f".{key}"} - zero
    for key in scaled:
        weight = model.get_parameter(key)
        assert float(weight.detach().norm()) / weight.shape[0] ** 0.5 == pytest.approx(0.5)


def test_without_preparations_nothing_changes() -> None:
    model = ResNet20()
    before = models.weights_sha256(model)
    factors, _ = prepare(model, (), around())
    assert set(factors.values()) == {1.0}
    assert models.weights_sha256(model) == before


def test_a_head_of_another_class_count_is_replaced_unasked() -> None:
    model = ResNet20()
    factors, _ = prepare(model, (), around(classes=7))
    assert models.head_classes(model, "linear") == 7
    assert {key for key, factor in factors.items() if factor == 0} == {
        "linear.weight",
        "linear.bias",
    }


# --- Rescaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("by", [1.0, 30.0])
def test_rescaling_keeps_the_function_of_the_real_network(
    real: nn.Module, images: Tensor, by: float, norm: float
) -> None:
    inflated = inflate(real, by)
    expected = logits(real, images)
    assert torch.allclose(logits(inflated, images), expected, atol=0.05)
    factors, _ = prepare(inflated, (RescaleWeights(norm=norm),), around())
    assert torch.allclose(logits(inflated, images), expected, atol=0.05)
    for key, factor in factors.items():
        weight = real.get_parameter(key).detach()
        rms = float(weight.norm()) * by / weight.shape[0] ** 0.5
        assert factor == pytest.approx(norm / rms if ".conv" in f".{key}" else 1.0, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["timm:resnet50_gn", "timm:convnext_atto", "timm:efficientnet_b0", "torchvision:vgg11_bn"],
)
def test_rescaling_keeps_the_function_of_other_networks(name: str) -> None:
    if "vgg" in name:
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 10),
        )
    else:
        model = models.resolve_model(ModelSpec(name=name, classes=10), base=Path())[0]
    head = models.find_head(model, IMAGE)
    probe = next(batches(1))[:4]
    expected = logits(model, probe)
    factors, _ = prepare(model, (RescaleWeights(norm=1.5),), around(head=head))
    assert any(factor != 1 for factor in factors.values())
    assert (logits(model, probe) - expected).norm() < 0.02 * expected.norm()


def test_a_pair_that_would_change_the_function_is_left_alone() -> None:
    class Leaky(nn.Module):
        """The convolution's output also reaches the head past its normalisation."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.deep = nn.Conv2d(8, 8, 3)
            self.last = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            out = self.last(self.deep(self.norm(out).relu() + out))
            logits: Tensor = self.head(out.relu().mean(dim=(2, 3)))
            return logits

    torch.manual_seed(0)
    model = Leaky()
    with torch.no_grad():
        for images in batches(20):
            model(images)
    probe = next(batches(1))
    expected, weight = logits(model, probe), model.conv.weight.detach().clone()
    factors, _ = prepare(model, (RescaleWeights(norm=3.0),), around(head="head"))
    assert factors["conv.weight"] == 1
    assert torch.equal(model.conv.weight, weight)
    assert factors["deep.weight"] != 1
    assert (logits(model, probe) - expected).norm() < 0.02 * expected.norm()


# --- BatchNorm --------------------------------------------------------------------------------


def test_reestimated_statistics_are_those_of_the_images() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(3, 10))
    norm.running_mean.fill_(100)  # type: ignore[union-attr]
    model.train()
    factors, _ = prepare(model, (BatchNorm(batches=3),), around(head="4"))
    seen = torch.stack([batch.transpose(0, 1).flatten(1) for batch in batches(3)])
    assert torch.allclose(norm.running_mean, seen.mean(dim=2).mean(dim=0), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, seen.var(dim=2).mean(dim=0), atol=1e-4)  # type: ignore[arg-type]
    assert (norm.momentum, norm.training, model.training) == (0.1, True, True)
    assert set(factors.values()) == {1.0}


def test_reset_batch_norm_forgets_its_scale_and_statistics(real: nn.Module) -> None:
    model = copy.deepcopy(real)
    factors, _ = prepare(model, (BatchNorm(mode="reset"),), around())
    assert torch.equal(model.bn1.weight, torch.ones(16))  # type: ignore[arg-type]
    assert torch.equal(model.bn1.running_mean, torch.zeros(16))  # type: ignore[union-attr, arg-type]
    assert {key for key, factor in factors.items() if factor == 0} == {
        key for key in factors if ".bn" in f".{key}"
    }


@pytest.mark.parametrize("mode", ["reset", "reestimate"])
def test_a_network_without_batch_norm_is_left_as_it_is(mode: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    before = models.weights_sha256(model)
    prepare(model, (BatchNorm(mode=mode),), around(head="1", batches=None))  # type: ignore[arg-type]
    assert models.weights_sha256(model) == before


def test_reestimating_needs_images() -> None:
    with pytest.raises(SpecError, match="reestimate"):
        prepare(ResNet20(), (BatchNorm(),), around(batches=None))
    with pytest.raises(DataError, match="no batch"):
        prepare(ResNet20(), (BatchNorm(),), around(batches=lambda count: iter(())))


DRAWN = [
    *("fresh_head", "reset_last_blocks", "noise_kick", "noise_kick rank", "keep_span", "all"),
    *("shrink_perturb", "scramble", "scramble match"),
]


# --- Streams and bad input --------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_depends_on_the_stream_alone(name: str) -> None:
    real = SmallConvNet()
    hashes = []
    for stream in (("a", 1), ("a", 1), ("a", 2)):
        torch.rand(3)
        model, noise = copy.deepcopy(real), torch.random.get_rng_state()
        prepare(model, EVERY[name], around(head="head", names=stream))
        assert torch.equal(torch.random.get_rng_state(), noise)
        hashes.append(models.weights_sha256(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_noise_is_as_large_as_asked(real: nn.Module) -> None:
    model = copy.deepcopy(real)
    factors, _ = prepare(model, (NoiseKick(relative_std=0.1),), around())
    assert set(factors.values()) == {1.0}
    for key, weight in real.named_parameters():
        if weight.numel() > 1000:
            noise = (model.get_parameter(key) - weight).detach().norm()
            assert float(noise / weight.detach().norm()) == pytest.approx(0.1, rel=0.15)


def test_more_blocks_than_there_are_is_an_error_that_names_their_number() -> None:
    with pytest.raises(SpecError, match=r"blocks = 11.*has 10; choose 1 to 10"):
        prepare(ResNet20(), (ResetLastBlocks(blocks=11),), around())


def test_resetting_every_block_leaves_only_the_head(real: nn.Module) -> None:
    model = copy.deepcopy(real)
    factors, _ = prepare(model, (ResetLastBlocks(blocks=10),), around())
    kept = {key for key, factor in factors.items() if factor == 1}
    assert kept == {"linear.weight", "linear.bias"}
    assert torch.equal(model.get_parameter("linear.weight"), real.get_parameter("linear.weight"))


# --- Chains without a normalisation -----------------------------------------------------------


def plain_chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 12),
        nn.GELU(),
        nn.Linear(12, 10),
    )


def test_layers_without_normalisation_are_rescaled_where_the_next_one_undoes_it() -> None:
    model = plain_chain()
    probe = next(batches(1))
    expected = logits(model, probe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors, _ = prepare(model, (RescaleWeights(norm=3.0),), around(head="9"))
    torch.testing.assert_close(logits(model, probe), expected, rtol=1e-4, atol=1e-5)
    for name in ("0", "3"):
        size = (
            model.get_submodule(name).weight.norm()
            / model.get_submodule(name).weight.shape[0] ** 0.5
        )
        assert float(size.detach()) == pytest.approx(3.0, rel=1e-4)
    # GELU does not scale: the layer before it only takes what its predecessor left.
    assert factors["7.bias"] == factors["9.weight"] == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), factors[name] * before[name], rtol=1e-5, atol=1e-6
        )


def test_a_normalised_layer_takes_what_the_one_before_it_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    first: Any = model[0]
    with torch.no_grad():
        first.weight.mul_(30 / _size_of(first))
        for images in batches(20):
            model(images)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe = next(batches(1))
    expected = logits(model, probe)
    factors, _ = prepare(model, (RescaleWeights(),), around(head="7"))
    torch.testing.assert_close(logits(model, probe), expected, rtol=1e-3, atol=1e-4)
    for layer in (model[0], model[2]):
        assert _size_of(layer) == pytest.approx(1.0, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), factors[name] * before[name], rtol=1e-5, atol=1e-6
        )


def _size_of(layer: Any) -> float:
    return float(layer.weight.detach().norm()) / layer.weight.shape[0] ** 0.5


# --- What a defence that erases or deforms provokes -----------------------------------------------


@pytest.mark.parametrize(
    ("span", "kept"),
    [
        (KeepSpan(end=0.5), range(5)),
        (KeepSpan(start=0.25), range(3, 10)),
        (KeepSpan(start=0.25, end=0.75), range(3, 7)),
        (KeepSpan(start=0.99), [9]),
        (KeepSpan(end=0.01), [0]),
    ],
)
def test_a_span_is_kept_and_the_others_are_anew(span: KeepSpan, kept: Sequence[int]) -> None:
    real = ResNet20()
    model = copy.deepcopy(real)
    factors, _ = prepare(model, (span,), around())
    for index, names in enumerate(models.blocks(model, "linear")):
        for name in names:
            for key, value in model.get_submodule(name).named_parameters(prefix=name):
                assert factors[key] == (index in kept)
                # Scales and shifts begin as they were drawn.
                if value.dim() > 1:
                    assert torch.equal(value, real.get_parameter(key)) == (index in kept)


def test_a_span_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(SpecError, match=r"start = 0\.5 must be below end = 0\.5"):
        KeepSpan(start=0.5, end=0.5)


@pytest.mark.parametrize("name", ["resnet20", "small_convnet", "small_caformer"])
def test_balancing_keeps_the_function_and_undoes_a_deformation(name: str) -> None:
    model = models.resolve_model(ModelSpec(name=name, classes=10), base=Path())[0]
    head = models.find_head(model, IMAGE)
    with torch.no_grad():
        for images in batches(2):
            model.train()(images)
    probe = next(batches(1))[:4]
    expected = logits(model, probe)
    deformed = copy.deepcopy(model)

    changed = []
    for pair in channel_pairs(deformed, IMAGE):
        by = torch.logspace(-1, 1, len(deformed.get_submodule(pair[1]).get_parameter("weight")))
        changed += scale_channels(deformed, IMAGE, pair, by)
    assert (logits(deformed, probe) - expected).norm() < 0.02 * expected.norm()
    held = {key: p.detach().clone() for key, p in deformed.named_parameters()}
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, held[key])}
    assert moved <= set(changed)
    for one in (model, deformed):
        factors, _ = prepare(one, (BalanceWeights(),), around(head=head))
        assert (logits(one, probe) - expected).norm() < 0.02 * expected.norm()
        assert {key for key, factor in factors.items() if factor == 0} >= set(changed)
    for key in changed:
        restored = (deformed.get_parameter(key) - model.get_parameter(key)).norm().detach()
        assert restored <= 0.05 * model.get_parameter(key).norm()
    assert changed


def test_shrinking_mixes_filters_with_fresh_ones_of_their_norm(real: nn.Module) -> None:
    model = copy.deepcopy(real)
    factors, _ = prepare(model, (ShrinkPerturb(share=0.25),), around())
    for key, held in real.named_parameters():
        now = model.get_parameter(key)
        assert factors[key] == (0.75 if held.dim() > 1 else 1.0)
        noise = float((now - factors[key] * held).norm().detach() / held.norm().detach())
        assert noise == pytest.approx(0.25 if held.dim() > 1 else 0.0, abs=1e-5)


def test_factors_multiply_along_the_list(real: nn.Module) -> None:
    steps = (RescaleWeights(norm=2.0), ShrinkPerturb(share=0.25))
    first, both = (prepare(copy.deepcopy(real), steps[:n], around())[0] for n in (1, 2))
    kept = {key: 0.75 if held.dim() > 1 else 1.0 for key, held in real.named_parameters()}
    assert any(factor != 1 for factor in first.values())
    assert both == {key: pytest.approx(first[key] * kept[key]) for key in kept}


def test_zeros_are_drawn_anew_and_nothing_else_changes(real: nn.Module) -> None:
    pruned = copy.deepcopy(real)
    with torch.no_grad():
        for parameter in pruned.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < parameter.abs().median()] = 0
    model = copy.deepcopy(pruned)
    prepare(model, (Densify(relative_std=0.1),), around())
    for key, held in pruned.named_parameters():
        now = model.get_parameter(key).detach()
        assert torch.equal(now[held != 0], held[held != 0])
        if held.dim() > 1:
            assert not (now == 0).any()
            sizes = [part.square().mean().sqrt() for part in (now[held == 0], held[held != 0])]
            assert float((sizes[0] / sizes[1]).detach()) == pytest.approx(0.1, rel=0.2)
    before = models.weights_sha256(real)
    prepare(untouched := copy.deepcopy(real), (Densify(),), around())
    assert models.weights_sha256(untouched) == before


def test_a_random_adapter_has_its_rank_and_size(real: nn.Module) -> None:
    model = copy.deepcopy(real)
    prepare(model, (NoiseKick(relative_std=0.1, rank=1),), around())
    for key, held in real.named_parameters():
        change = (model.get_parameter(key) - held).detach()
        if held.dim() > 1:
            assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3) == 1
            assert float(change.norm() / held.detach().norm()) == pytest.approx(0.1, rel=0.9)
        else:
            assert not change.any()


@pytest.mark.parametrize("mode", ["permute", "match"])
def test_what_is_scrambled_keeps_no_feature_but_its_values_or_moments(
    real: nn.Module, mode: Literal["permute", "match"]
) -> None:
    model = copy.deepcopy(real)
    prepare(model, (Scramble(mode=mode),), around())
    for key, held in real.named_parameters():
        now = model.get_parameter(key).detach()
        if held.dim() == 1:
            assert torch.equal(now, held)
            continue
        assert torch.equal(now.flatten().sort().values, held.flatten().sort().values) == (
            mode == "permute"
        )
        assert float(now.mean()) == pytest.approx(float(held.detach().mean()), abs=1e-5)
        assert float(now.std()) == pytest.approx(float(held.detach().std()), rel=1e-3)
        related = torch.corrcoef(torch.stack([now.flatten(), held.detach().flatten()]))[0, 1]
        assert abs(float(related)) < 4 / held.numel() ** 0.5


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"all", "reset_last_blocks"}))
@pytest.mark.parametrize("network", ["timm:test_vit", "own"])
def test_networks_without_batch_norm_and_of_ones_own_are_prepared(name: str, network: str) -> None:
    if network == "own":
        model: nn.Module = plain_chain()
    else:
        spec = ModelSpec(name=network, classes=10, arguments={"img_size": 32})
        model = models.resolve_model(spec, base=Path())[0]
    bare = models.bare_parameters(model)
    head = models.find_head(model, IMAGE)

    def images(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch, torch.arange(16) % 10) for batch in batches(count))

    prepare(model, EVERY[name], around(head=head, bare=bare, labelled=images))
    assert logits(model, next(batches(1))).isfinite().all()


# --- Training beforehand ----------------------------------------------------------------------


def test_training_comes_first_and_leaves_steps() -> None:
    with pytest.raises(SpecError, match="list them first"):
        Strategy(preparations=(FreshHead(), Heal()))
    with pytest.raises(SpecError, match="below 1 in all"):
        Strategy(preparations=(Heal(share=0.6), Distil(share=0.5)))
    with pytest.raises(SpecError, match="leave no step of 1"):
        prepare(ResNet20(), (Heal(),), around(steps=1, train=lambda *_: None))
    with pytest.raises(SpecError, match="needs images of the original domain"):
        prepare(ResNet20(), (Heal(),), around(train=None))


def test_a_student_starts_fresh_and_learns_from_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = ResNet20()
    given = copy.deepcopy(model)
    seen: list[Course] = []

    def train(student: nn.Module, course: Course) -> None:
        assert not torch.equal(student.conv1.weight, given.conv1.weight)  # type: ignore[arg-type]
        assert student.get_submodule("linear").out_features == 10
        seen.append(course)

    factors, spent = prepare(model, (Distil(share=0.5),), around(classes=7, train=train, steps=100))
    assert spent == seen[0].steps == 50
    assert set(factors.values()) == {0.0}
    assert models.head_classes(model, "linear") == 7
    teacher = seen[0].teacher
    assert teacher is not None
    held = teacher.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in given.state_dict().items())


def test_a_teacher_evaluates_and_hooks_stay_with_it() -> None:
    model, seen = ResNet20().train(), []

    def doubled(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return 2 * output

    model.register_forward_hook(doubled)

    def train(student: nn.Module, course: Course) -> None:
        teacher = course.teacher
        assert teacher is not None
        assert not any(part.training for part in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        seen.append((list(teacher._forward_hooks.values()), list(student._forward_hooks)))

    prepare(model, (Distil(share=0.5),), around(train=train))
    assert seen == [([doubled], [])]


def test_a_span_of_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(SpecError, match="keep_span: the model has no blocks"):
        prepare(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (KeepSpan(),), around(head="1"))


def test_spans_that_keep_the_same_blocks_are_attacked_with_once() -> None:
    chosen = [Strategy(preparations=(KeepSpan(end=e),)) for e in (0.25, 0.5, 0.75)]
    assert without_repeats(chosen, 1) == tuple(chosen[:1])
    assert without_repeats(chosen, 8) == tuple(chosen)


def test_shrinking_towards_zeros_leaves_the_rest() -> None:
    model, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
    nn.init.zeros_(fresh.weight)
    held = 1e30 * torch.ones(2, 3)
    model.weight.data.copy_(held)
    assert models.shrink_towards(model, fresh, 0.25) == ["weight"]
    torch.testing.assert_close(model.weight.detach(), 0.75 * held)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [old_weight_norm, weight_norm, spectral_norm])
def test_weights_that_are_computed_are_not_balanced(norm: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(
        norm(nn.Conv2d(3, 16, 3, bias=False)), nn.ReLU(), norm(nn.Conv2d(16, 16, 3, bias=False))
    )
    model += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model.eval()
    probe = next(batches(1))[:4]
    expected = logits(model, probe)
    prepare(model, (BalanceWeights(), RescaleWeights()), around(head="5"))
    assert (logits(model, probe) - expected).norm() < 0.02 * expected.norm()
    assert channel_pairs(model, IMAGE) == []


def test_pairs_are_compared_with_outputs_before_any_of_them() -> None:
    """What has moved outputs already leaves no room for a pair that would itself move nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 784, 10)
    )
    (pair, *_), by = channel_pairs(model, IMAGE), torch.full((8,), 2.0)
    images, before = read_probes(model, IMAGE)
    assert images.shape == (8, *IMAGE)
    with torch.no_grad():
        model[4].weight.mul_(1.002)
    assert scale_channels(model, IMAGE, pair, by, before) == []
    assert scale_channels(model, IMAGE, pair, by) != []
