"""The networks that ship with sophon, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sophon._base.torchvision_patch import installing, library


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut, which has no parameters.

    Where the shape changes the shortcut takes every second pixel and pads zero channels
    evenly on both sides (arXiv 1512.03385, section 4.2).
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, planes, height / stride, width / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x
        if self.stride != 1 or self.padding:
            sides = (0, 0, 0, 0, self.padding, self.padding)
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], sides)
        return functional.relu(out + shortcut)


class ResNet20(nn.Module):
    """The 20-layer residual network of the CIFAR family: 0.27 M weights, made for 32x32 images.

    Its keys are those of the widely used CIFAR checkpoints (`conv1`, `bn1`,
    `layer1.0.conv1`, ..., `linear`).
    """

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        _kaiming_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, in_channels, height, width)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def _stage(in_planes: int, planes: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_planes, planes, stride),
        BasicBlock(planes, planes, 1),
        BasicBlock(planes, planes, 1),
    )


class SmallConvNet(nn.Module):
    """Six 3x3 convolutions with BatchNorm in three stages, global average pooling, one head.

    About 0.11 M weights; takes images from 8x8 to 32x32.
    """

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stage1 = _plain_stage(in_channels, 24)
        self.stage2 = _plain_stage(24, 48)
        self.stage3 = _plain_stage(48, 72)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(72, classes)
        _kaiming_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, in_channels, height, width)."""
        out = self.stage3(self.pool(self.stage2(self.pool(self.stage1(x)))))
        logits: Tensor = self.head(out.mean(dim=(2, 3)))
        return logits


def _plain_stage(in_planes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_planes, planes, 3, padding=1, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
        nn.Conv2d(planes, planes, 3, padding=1, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
    )


@torch.no_grad()
def _kaiming_normal(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_caformer(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return a CAFormer of timm's own blocks, 5 instead of 18 and narrower, for 32x32 images.

    Convolutions in the first two stages, attention in the last two (arXiv 2210.13452). Raises
    UnsupportedModelError without timm.
    """
    metaformer = _timm("metaformer", "small_caformer")
    model: nn.Module = metaformer.MetaFormer(
        in_chans=in_channels,
        num_classes=classes,
        depths=(1, 1, 2, 1),
        dims=(32, 64, 128, 192),
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        use_mlp_head=True,
    )
    return model


def small_vgg(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return timm's VGG-11 with BatchNorm and a quarter of its widths (arXiv 1409.1556), 3.2 M
    weights; raises as `small_caformer`.
    """
    layers = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    model: nn.Module = _timm("vgg", "small_vgg").VGG(
        layers,
        num_classes=classes,
        in_chans=in_channels,
        norm_layer=nn.BatchNorm2d,
        mlp_ratio=1 / 16,
    )
    return model


def _timm(module: str, name: str) -> Any:
    needed = installing("vision")
    return library(f"timm.models.{module}", f"{name} needs timm", needed)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet20": ResNet20,
    "small_convnet": SmallConvNet,
    "small_caformer": small_caformer,
    "small_vgg": small_vgg,
}
