"""Where readers look: the head's input where it is another thing, and which axis is channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sophon
from sophon._models.networks import NETWORKS
from sophon._protection.depths import find_depths
from sophon._protection.readers import pooled

TINY: dict[str, dict[str, object]] = {
    "timm:vit_tiny_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "timm:deit_tiny_distilled_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "timm:swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
    },
    "timm:convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "timm:resnet10t": {},
    "torchvision:squeezenet1_1": {},
}


def built(name: str) -> nn.Module:
    spec = sophon.ModelSpec(name=name, classes=5, arguments=TINY[name])  # type: ignore[arg-type]
    return sophon.resolve_model(spec)[0]


@pytest.mark.parametrize(
    ("name", "head", "added"),
    [
        ("timm:vit_tiny_patch16_224", "head", ["head"]),
        ("timm:deit_tiny_distilled_patch16_224", "head", ["head", "head_dist"]),
        ("timm:swin_tiny_patch4_window7_224", "head.fc", []),
        ("timm:convnext_atto", "head.fc", []),
        ("timm:resnet10t", "fc", []),
        ("torchvision:squeezenet1_1", "classifier.1", []),
    ],
)
def test_what_the_head_reads_is_a_depth_where_it_is_no_mean_of_the_last_block(
    name: str, head: str, added: list[str]
) -> None:
    found = find_depths(built(name), head, (3, 32, 32), None)
    assert list(found)[len(found) - len(added) :] == added
    assert (head in found) == bool(added)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_pinned_recipes_are_read_where_they_were(name: str) -> None:
    model, _ = sophon.resolve_model(sophon.ModelSpec(name=name, classes=5))
    head = {"resnet20": "linear", "small_convnet": "head"}.get(name)
    head = head or sophon._models.find_head(model, (3, 32, 32))  # type: ignore[attr-defined]
    found = find_depths(model, head, (3, 32, 32), None)
    assert head not in found


class Projected(nn.Module):
    """A convolutional network with something functional between its last block and its head."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3))
        self.change = change
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.change(self.body(x)))
        return logits


@pytest.mark.parametrize(
    ("change", "added"),
    [
        (lambda x: x.mean((2, 3)), False),
        (lambda x: x.relu().mean((2, 3)), False),
        (lambda x: x.amax((2, 3)), True),
        (lambda x: nn.functional.normalize(x.mean((2, 3))), True),
    ],
)
def test_a_norm_or_a_pool_before_the_head_adds_its_input(
    change: Callable[[Tensor], Tensor], added: bool
) -> None:
    found = find_depths(Projected(change), "head", (3, 16, 16), None)
    assert ("head" in found) == added
    assert list(find_depths(Projected(change), "head", (3, 16, 16), ("body.0",))) == ["body.0"]


class Rows(nn.Module):
    """Maps with the channels last, normalised and mixed there; `side` may equal `channels`."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.first = nn.Sequential(norm(channels), nn.Linear(channels, channels))
        self.second = nn.Sequential(norm(channels), nn.Linear(channels, channels))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x).permute(0, 2, 3, 1).contiguous()
        logits: Tensor = self.head(self.second(self.first(rows)).mean((1, 2)))
        return logits


class OwnNorm(nn.LayerNorm):
    """A normalisation whose class alone does not tell its axis."""


@pytest.mark.parametrize("channels", [4, 8, 12])
@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
def test_channels_that_are_last_are_found_whatever_the_sides(
    channels: int, norm: type[nn.Module]
) -> None:
    found = find_depths(Rows(channels, norm), "head", (3, 32, 32), None)
    assert list(found) == ["stem", "first.1", "second.1"]
    assert all(place.last for place in found.values())


class Columns(nn.Module):
    """Maps of 8 channels and 8x4 pixels; the norm is over channels, which are first."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.middle = middle
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.middle(self.stem(x))).mean((2, 3)))
        return logits


class FirstNorm(nn.LayerNorm):
    """As timm's and torchvision's LayerNorm2d: over the channels of maps that have them first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("middle", [nn.Conv2d(8, 8, 1), FirstNorm(8), nn.GroupNorm(2, 8)])
def test_channels_that_are_first_are_found_whatever_the_sides(middle: nn.Module) -> None:
    found = find_depths(Columns(middle), "head", (3, 32, 16), None)
    assert found
    assert not any(place.last for place in found.values())


def test_swin_maps_are_pooled_over_their_positions() -> None:
    model = built("timm:swin_tiny_patch4_window7_224")
    found = find_depths(model, "head.fc", (3, 32, 32), None)
    assert all(place.last for place in found.values())
    maps = torch.randn(2, 8, 8, 8)
    expected = maps.permute(0, 3, 1, 2).unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    assert torch.allclose(pooled(maps, 2, last=True), expected, atol=1e-6)
    assert torch.equal(pooled(maps, 2), pooled(maps.permute(0, 2, 3, 1), 2, last=True))


class Scale(nn.Module):
    """A layer of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Silent(nn.Module):
    """Maps between layers that tell nothing of their axes."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.body = nn.Sequential(Scale(), Scale())
        self.head = nn.Linear(math.prod(shape), 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.flatten(1)[:, :1].expand(-1, math.prod(self.shape)).reshape(-1, *self.shape)
        logits: Tensor = self.head(self.body(maps).flatten(1))
        return logits


def test_where_no_layer_tells_square_sides_beside_other_channels_are_taken_for_pixels() -> None:
    for shape, last in {(4, 4, 4): False, (4, 8, 2): False, (4, 4, 8): True}.items():
        found = find_depths(Silent(shape), "head", (3, 2, 2), None)
        assert [place.last for place in found.values()] == [last, last]
