"""What is measured of a subject, and which images domains share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from builders import original, restricted, setting_of, trained_model
from records import record
from sophon._auditing.audit import Audit
from sophon._auditing.vitals import measure_vitals, training_flops
from sophon._data import Domain, overlaps, overlaps_of
from sophon._data.images import Images, to_images
from sophon._judgement.flags.weights import inflated_weights
from sophon._models import code_differences, network_identity, similarity
from sophon._models.networks import SmallConvNet
from sophon._tasks import Classification
from sophon._training.setting import Setting, make_setting


def _setting(model: nn.Module) -> Setting:
    return setting_of(model, trained=False)


def test_vitals_leave_the_model_as_it_is_and_hold_its_sizes() -> None:
    model = trained_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vitals = measure_vitals(model, _setting(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    name, weight = next(iter(model.named_parameters()))
    size = float(weight.detach().square().mean().sqrt())
    assert vitals.weight_sizes[name] == pytest.approx(size, rel=1e-5)
    assert vitals.largest_logit is not None
    assert 0 < vitals.largest_logit < 100
    assert (vitals.gradient_norms["digits-5-9"] or 0) > 0
    assert vitals.smallest_variance is not None


def test_sizes_are_measured_in_single_precision_whatever_attacks_compute_in() -> None:
    model = trained_model()
    exact, rounded = (
        measure_vitals(model, setting_of(model, trained=False, precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert exact.rounding is None
    assert 0 < (rounded.rounding or 0) < 0.1
    alike = {"rounding": None}
    assert rounded.model_copy(update=alike) == exact.model_copy(update=alike)


def test_a_model_that_was_trained_on_a_domain_knows_those_images_better(
    shared_data: Path,
) -> None:
    """Real images: 500 of ten classes."""
    with np.load(shared_data / "cifar100.npz") as held:
        drawn, labels = held["x_train"], held["y_train"]
    few, other = (
        Domain.from_arrays(
            name,
            drawn[labels // 10 == tens],
            labels[labels // 10 == tens] % 10,
            validation=0.2,
            test=0.4,
        )
        for name, tens in (("few", 0), ("other", 1))
    )
    torch.manual_seed(0)
    model = SmallConvNet(classes=few.class_count)
    setting = make_setting(
        model,
        task=Classification(),
        original=other,
        restricted=(few,),
        head=None,
        precision="fp32",
        device="cpu",
        trained=False,
    )
    before = measure_vitals(model, setting).familiarity["few"]
    assert before is not None
    # Whoever trained it had no validation split.
    pixels = torch.cat((few.train.pixels, few.validation.pixels)).float() / 255
    answers = torch.cat((few.train.labels, few.validation.labels))
    mean, std = (torch.tensor(v)[:, None, None] for v in setting.normalisation(few))
    batch = (pixels - mean) / std
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), answers).backward()
        optimizer.step()
    after = measure_vitals(model, setting).familiarity["few"]
    assert after is not None
    assert abs(before.trained.value - before.others.value) < 0.15
    assert after.trained.value - after.others.value > 0.3


def test_a_model_that_raises_when_trained_has_no_gradient() -> None:
    class Sulking(SmallConvNet):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("no")
            return super().forward(images)

    model = Sulking(classes=5, in_channels=1)
    model.load_state_dict(trained_model().state_dict())
    vitals = measure_vitals(model, _setting(model))
    assert vitals.gradient_norms == {"digits-5-9": None}
    assert vitals.raised == ("RuntimeError: no",)
    assert vitals.largest_logit is not None
    assert training_flops(model, _setting(trained_model()), restricted()) is None


def test_operations_are_three_times_those_of_each_image_forward() -> None:
    class Mixed(nn.Module):
        """A grouped convolution, attention over the pixels and a head."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1, stride=2)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.head = nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.depthwise(self.stem(images)).flatten(2).mT
            maps = nn.functional.scaled_dot_product_attention(maps, maps, maps)
            return self.head(maps.mean(1))

    # 8x8 images, 4x4 maps of 8 channels: 16 tokens.
    stem, depthwise = 2 * 8 * 9 * 16, 2 * 8 * 9 * 16
    attention, head = 2 * (2 * 16 * 16 * 8), 2 * 8 * 5
    expected = 3 * (stem + depthwise + attention + head)
    assert training_flops(Mixed(), _setting(Mixed()), restricted()) == expected


def test_shared_images_are_counted_exact_and_near() -> None:
    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    labels = raw.target.astype(np.int64) % 2
    generator = np.random.default_rng(0)
    noisy = images[:40].astype(int) + generator.integers(-3, 4, (40, 32, 32))
    near = np.clip(noisy, 0, 255).astype(np.uint8)
    first = Domain.from_arrays("first", images[:600], labels[:600])
    held = first.train.pixels[:30, 0].numpy()
    second = Domain.from_arrays(
        "second",
        np.concatenate([images[1000:1100], held]),
        np.concatenate([labels[1000:1100], first.train.labels[:30].numpy()]),
    )
    third = Domain.from_arrays("third", np.concatenate([near, images[1200:1300]]), labels[:140])
    found = {(o.first, o.second): o for o in overlaps_of((first, second, third))}
    shared = [o for pair, o in found.items() if pair[0].startswith("second") and "first" in pair[1]]
    assert 20 <= sum(o.exact for o in shared) <= 30
    alike = [o for pair, o in found.items() if pair[0].startswith("third") and "first" in pair[1]]
    assert sum(o.near + o.exact for o in alike) >= 15
    assert sum(o.exact for o in alike) <= 2


def test_every_split_is_compared_with_every_split_of_other_domains() -> None:
    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    labels = raw.target.astype(np.int64) % 2
    domains = [
        Domain.from_arrays(name, images[first : first + 100], labels[first : first + 100])
        for name, first in (("a", 0), ("b", 100), ("c", 200))
    ]
    held = (domains[0], replace(domains[1], test=domains[0].test), domains[2])
    held = (*held[:2], replace(held[2], validation=domains[0].test))
    found = {frozenset((o.first, o.second)): o for o in overlaps_of(held)}
    names = ("train", "validation", "test")
    splits = [f"{domain.name}/{split}" for domain in held for split in names]
    every = {frozenset(pair) for pair in itertools.combinations(splits, 2)}
    assert set(found) == every
    assert len(overlaps_of(held)) == len(every)
    shared = {pair for pair, o in found.items() if o.exact == o.count}
    tests = ("a/test", "b/test", "c/validation")
    assert shared == {frozenset(pair) for pair in itertools.combinations(tests, 2)}


def test_of_two_measured_splits_the_share_is_of_the_smaller_one() -> None:
    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    labels = raw.target.astype(np.int64) % 2
    large, small = (
        Domain.from_arrays(name, images[start:stop], labels[start:stop])
        for name, start, stop in (("large", 0, 600), ("small", 600, 700))
    )
    small = replace(small, test=Images(large.test.pixels[:10], large.test.labels[:10]))
    for pair in ((large, small), (small, large)):
        found = {(o.first, o.second): o for o in overlaps_of(pair)}
        assert found["small/test", "large/test"].exact == 10


def test_blank_images_are_like_no_other_but_the_same() -> None:
    shades = np.arange(60, dtype=np.uint8).reshape(60, 1, 1)
    labels = np.arange(60, dtype=np.int64) % 2
    blank = Domain.from_arrays("blank", np.zeros((60, 8, 8), np.uint8) + shades, labels)
    assert all(o.exact == o.near == 0 for o in overlaps_of((blank,)))
    same = Domain.from_arrays("same", np.zeros((60, 8, 8), np.uint8), labels)
    assert all(o.exact == o.count and o.near == 0 for o in overlaps_of((same,)))


def test_pictures_that_resemble_each_other_are_no_copies() -> None:
    across, down = np.meshgrid(np.arange(32), np.arange(32))

    def single(pixels: np.ndarray) -> Images:
        return to_images(np.round(pixels)[None].astype(np.uint8), np.zeros(1, np.int64))

    # All rows rise: every hash is the same, and thumbnails correlate by 1 / sqrt(1 + tilt ** 2).
    level = 60 + 4 * across
    for tilt, found in ((0.05, 1), (0.2, 0)):
        assert overlaps.copies(single(level + tilt * 4 * down), single(level)) == found
    # Each row in which the fifth step falls instead of rising is a bit of the hash.
    stairs = np.broadcast_to(np.array([0, 20, 40, 60, 80, 81, 100, 120, 140]), (8, 9))
    for rows, found in ((4, 1), (5, 0)):
        changed = stairs.copy()
        changed[:rows, 5] = 79
        assert overlaps.copies(single(changed), single(stairs)) == found


def test_what_was_only_recoloured_is_near_and_not_exact() -> None:
    raw = load_digits()
    images = np.round(raw.images * (200 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    labels = raw.target.astype(np.int64) % 2
    first = Domain.from_arrays("first", images[:200], labels[:200])
    brighter = first.validation.pixels[:, 0].numpy() + 20
    second = Domain.from_arrays(
        "second", brighter, first.validation.labels.numpy(), validation=0.5, test=0.25
    )
    found = {(o.first, o.second): o for o in overlaps_of((first, second))}
    # The validation split of one domain is looked for in the training split of the other.
    shared = found["first/validation", "second/train"]
    assert shared.exact == 0
    assert shared.near >= len(second.train) - 1
    assert ("second/validation", "second/train") in found
    assert ("second/test", "second/validation") in found
    assert ("first/test", "second/train") in found


def _faint(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output.detach() + 1e-6 * (output - output.detach())


def test_gradients_before_the_head_are_measured_apart_from_the_heads() -> None:
    model, masked = trained_model(), trained_model()
    # The last layer that the head reads from.
    masked.stage3.register_forward_hook(_faint)
    sound, faint = (measure_vitals(m, _setting(m)) for m in (model, masked))
    name = restricted().name
    whole, before = sound.gradient_norms[name] or 0, sound.body_gradient_norms[name] or 0
    assert 0 < before < whole
    assert (faint.gradient_norms[name] or 0) > whole / 100
    assert (faint.body_gradient_norms[name] or 0) < before / 1e4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.stage1[0].register_forward_hook(_faint), "stage1.0, forward_hook 0: hook"),
        (lambda m: setattr(m, "drop_rate", 0.9), "the network.drop_rate = 0.9 instead of absent"),
        (lambda m: setattr(m.stage1[1], "momentum", 1.0), "stage1.1.momentum = 1.0 instead of 0.1"),
        (lambda m: setattr(m.stage1, "2", nn.Dropout()), "stage1.2: Dropout instead of ReLU"),
        (lambda m: setattr(m, "forward", lambda images: images), "the network.forward ="),
    ],
    ids=["hook", "rate", "setting", "layer", "forward"],
)
def test_code_beside_the_weights_is_told_apart(
    change: Callable[[nn.Module], object], said: str
) -> None:
    model = trained_model()
    assert code_differences(model, trained_model()) == ()
    assert code_differences(copy.deepcopy(model).train(), model) == ()
    renamed = trained_model()
    renamed.num_classes = 1000  # type: ignore[assignment]
    assert code_differences(renamed, trained_model()) == ()
    change(model)
    found = code_differences(model, trained_model())
    assert any(line.startswith(said) for line in found), found
    # What both have is no difference.
    assert code_differences(copy.deepcopy(model), model) == ()


def test_weights_that_no_optimizer_finds_are_told_apart() -> None:
    model, other = trained_model(), trained_model()
    layer = model.get_submodule("stage1.0")
    weight = layer.weight
    del layer.weight
    layer.register_buffer("weight", weight.detach())
    assert model.state_dict().keys() == other.state_dict().keys()
    (found,) = code_differences(model, other)
    assert found == "stage1.0.weight = a buffer instead of a parameter"
    assert network_identity(model) != network_identity(other)


class _Configured(nn.Module):
    """A network that reads a rate from an object, a table and a plain tensor of its own."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(rate=rate, name_or_path=f"from/{rate}")
        self.table = {"rates": [{"drop": 0.0}], "_name_or_path": f"from/{rate}"}
        self.mask = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: setattr(m.config, "rate", 0.99), "the network.config ="),
        (lambda m: m.table["rates"][0].update(drop=0.99), "the network.table ="),
        (lambda m: m.mask.zero_(), "the network.mask ="),
    ],
    ids=["object", "table", "tensor"],
)
def test_what_layers_keep_in_objects_is_looked_into(
    change: Callable[[Any], object], said: str
) -> None:
    model, other = _Configured(), _Configured()
    other.config.name_or_path = other.table["_name_or_path"] = "elsewhere"
    assert code_differences(model, other) == ()
    change(model)
    (found,) = code_differences(model, other)
    assert found.startswith(said)


def test_without_another_network_every_hook_is_code_of_its_own() -> None:
    model = trained_model()
    assert code_differences(model, None) == ()
    model.stage1.register_forward_hook(_faint)
    assert len(code_differences(model, None)) == 1


def test_layers_that_torch_parametrizes_are_alike() -> None:
    pair = [nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) for _ in "ab"]
    assert code_differences(*pair) == ()


def test_weights_are_alike_whatever_their_scale_and_unlike_when_trained_apart() -> None:
    model, scaled = trained_model(), trained_model()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(30.0)
    assert similarity(scaled, model) == pytest.approx(1.0)
    torch.manual_seed(5)
    apart = SmallConvNet(classes=5, in_channels=1)
    assert abs(similarity(apart, model) or 1.0) < 0.2
    # A network of another head is the same one still.
    refitted = trained_model()
    refitted.head = apart.head
    assert similarity(refitted, model) == pytest.approx(1.0)
    with torch.no_grad():
        next(scaled.parameters()).fill_(torch.nan)
    assert similarity(scaled, model) is None


def _alike(audit: Audit) -> float | None:
    records = audit.subjects.records(audit.setting, (restricted(),), {}, {})
    return next(record.similarity for record in records if record.name == "protected")


def test_a_record_says_how_alike_protected_and_unprotected_are() -> None:
    torch.manual_seed(5)
    apart = SmallConvNet(classes=5, in_channels=1)
    for model, low, high in ((trained_model(), 0.999, 1.001), (apart, -0.2, 0.2)):
        held: dict[str, Any] = {"original": original(), "restricted": restricted()}
        assert low < (_alike(Audit(model, unprotected=trained_model(), **held)) or 0) < high
        assert _alike(Audit(model, **held)) is None


class _Attending(nn.Module):
    """A stem with BatchNorm, a LayerNorm whose scale a Linear can undo, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).flatten(2).mT
        held: Tensor = self.head(torch.tanh(self.mix(self.norm(maps))).mean(1))
        return held


def test_what_rescaling_brings_back_is_measured() -> None:
    torch.manual_seed(0)
    before = _Attending().eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.stem[0].weight.mul_(30.0)
        after.stem[1].running_mean.mul_(30.0)
        after.stem[1].running_var.mul_(900.0)
        after.norm.weight.mul_(50.0)
        after.norm.bias.mul_(50.0)
        after.mix.weight.div_(50.0)
    measured = [measure_vitals(model, _setting(model)) for model in (after, before)]
    grown, back = (
        {name: size / sizes[1][name] for name, size in sizes[0].items()}
        for sizes in ([m.weight_sizes for m in measured], [m.rescaled_sizes for m in measured])
    )
    assert grown["stem.0.weight"] == pytest.approx(30.0)
    assert back["stem.0.weight"] == pytest.approx(1.0, rel=1e-3)
    for ratios in (grown, back):
        assert ratios["norm.weight"] == pytest.approx(50.0)
        assert ratios["mix.weight"] == pytest.approx(0.02)
    assert not any(name.endswith("bias") for name in grown)
    held = record()
    subjects = [
        s.model_copy(update={"vitals": m})
        for s, m in zip(held.subjects, (*measured, None), strict=True)
    ]
    flag = inflated_weights(held.model_copy(update={"subjects": tuple(subjects)}), "refused")
    assert flag is not None
    assert "rescaling leaves 2 (norm.weight)" in flag.detail
    assert flag.forbids


def test_images_are_compared_some_at_a_time_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 20, 20, 3), dtype=np.uint8)
    images = Domain.from_arrays("noise", pixels, np.arange(600) % 2).train
    counts: list[int] = []
    resized = torch.nn.functional.interpolate

    def counted(grey: torch.Tensor, size: tuple[int, int], **how: Any) -> torch.Tensor:
        counts.append(len(grey))
        return resized(grey, size, **how)

    monkeypatch.setattr("torch.nn.functional.interpolate", counted)
    monkeypatch.setattr(overlaps, "_CHUNK", 100)
    small, thumbnails = overlaps._reduced(images)
    assert max(counts) == 100
    grey = images.pixels.float().mean(1, keepdim=True) / 255
    how: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
    assert torch.equal(small, resized(grey, (8, 9), **how)[:, 0])
    assert torch.equal(thumbnails, resized(grey, (16, 16), **how)[:, 0])
