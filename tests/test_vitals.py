"""What is measured of a subject, and which images domains share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from builders import restricted, setting_of, trained_model
from sophon._data import Domain, overlaps, overlaps_of
from sophon._networks import SmallConvNet
from sophon._setting import Setting
from sophon._vitals import measure_vitals, training_flops


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


def test_blank_images_are_like_no_other_but_the_same() -> None:
    shades = np.arange(60, dtype=np.uint8).reshape(60, 1, 1)
    labels = np.arange(60, dtype=np.int64) % 2
    blank = Domain.from_arrays("blank", np.zeros((60, 8, 8), np.uint8) + shades, labels)
    assert all(o.exact == o.near == 0 for o in overlaps_of((blank,)))
    same = Domain.from_arrays("same", np.zeros((60, 8, 8), np.uint8), labels)
    assert all(o.exact == o.count and o.near == 0 for o in overlaps_of((same,)))


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
    assert ("first/test", "second/train") in found


def test_images_are_compared_some_at_a_time_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 20, 20, 3), dtype=np.uint8)
    images = Domain.from_arrays("noise", pixels, np.arange(600) % 2).train
    counts: list[int] = []
    resized = overlaps._resized

    def counted(grey: torch.Tensor, height: int, width: int) -> torch.Tensor:
        counts.append(len(grey))
        return resized(grey, height, width)

    monkeypatch.setattr(overlaps, "_resized", counted)
    monkeypatch.setattr(overlaps, "_CHUNK", 100)
    small, thumbnails = overlaps._reduced(images)
    assert max(counts) == 100
    grey = images.pixels.float().mean(1, keepdim=True) / 255
    assert torch.equal(small, resized(grey, 8, 9))
    assert torch.equal(thumbnails, resized(grey, 16, 16))
