"""Tiny image classifiers of transformers, from configurations, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon._models.image_processors import transformers

WIDTHS = {"hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
# The settings of each configuration, the side of its images and its head.
NETWORKS: dict[str, tuple[dict[str, Any], int, str]] = {
    "vit": (WIDTHS | HEADS, 16, "classifier"),
    "deit": (WIDTHS | HEADS, 16, "classifier"),
    "deit with teacher": (WIDTHS | HEADS, 16, "cls_classifier"),
    "swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
        | {"image_size": 16, "patch_size": 2},
        16,
        "classifier",
    ),
    "convnext": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        16,
        "classifier",
    ),
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        16,
        "classifier.1",
    ),
    "mobilevit": (
        {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]}
        | {"num_attention_heads": 2, "image_size": 32},
        32,
        "classifier",
    ),
}


def classifier(kind: str, classes: int = 5, **changes: Any) -> nn.Module:
    """Return a network with random weights; `changes` are of its configuration."""
    library = transformers()
    settings = NETWORKS[kind][0] | {"num_labels": classes} | changes
    name, _, teacher = kind.partition(" ")
    config = library.CONFIG_MAPPING[name](**settings)
    found = library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    torch.manual_seed(0)
    model: nn.Module = (found[bool(teacher)] if isinstance(found, tuple) else found)(config)
    # The library's own start is so small that nothing of an image is left at so few layers.
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.reset_parameters()
    return model.eval()


def saved(folder: Path, model: Any, processor: str | None = "ViTImageProcessor") -> Path:
    """Write a network, and an image processor of the named class, as transformers does."""
    model.save_pretrained(folder)
    if processor is not None:
        side = getattr(model.config, "image_size", 16)
        size = {"height": side, "width": side}
        getattr(transformers(), processor)(size=size, crop_size=size).save_pretrained(folder)
    return folder
