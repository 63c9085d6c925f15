"""Tiny diffusion models and real one-class domains that tests of generation share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import Domain
from sophon._models import diffusers
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import Guard

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def unet(**changes: Any) -> nn.Module:
    """Return a U-Net for 8x8 images with random weights, always the same."""
    torch.manual_seed(0)
    model: nn.Module = diffusers().UNet2DModel(**(CONFIG | changes))
    return model.eval()


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    raw = load_digits()
    return np.round(raw.images * (255 / 16)).astype(np.uint8), raw.target


@cache
def digits(low: int, high: int) -> Domain:
    """Return scikit-learn's handwritten digits low..high-1, 8x8 grey, without their classes."""
    images, labels = _digits()
    return Domain.from_arrays(f"digits-{low}-{high - 1}", images[(labels >= low) & (labels < high)])


def quick_spec(**changes: Any) -> ProtectSpec:
    """Return a protection of a second or two."""
    usual: dict[str, Any] = {
        "rounds": 3,
        "suppression": "dos",
        "rehearsal": Rehearsal(
            strategies=1,
            steps=2,
            horizon=4,
            pool=2,
            query_batch_size=8,
            distribution=StrategyDistribution(batch_sizes=(8,)),
        ),
        "guard": Guard(every=2, tolerance_relative=10.0),
        "checkpoint_every": 1,
        "original_batch_size": 8,
        "precision": "fp32",
    }
    return ProtectSpec(**(usual | changes))


def write_npz(path: Path, low: int, high: int) -> Path:
    """Write the digits low..high-1 with their labels, and return the path."""
    images, labels = _digits()
    keep = (labels >= low) & (labels < high)
    train, test = np.flatnonzero(keep)[:160], np.flatnonzero(keep)[160:220]
    np.savez(
        path,
        x_train=images[train],
        y_train=labels[train].astype(np.int64) - low,
        x_test=images[test],
        y_test=labels[test].astype(np.int64) - low,
    )
    return path


def write_prompted(folder: Path, low: int, high: int, prompt: str) -> Path:
    """Write digits as pictures with prompts in `metadata.jsonl`, 16x16 RGB; return the folder."""
    folder.mkdir()
    images, labels = _digits()
    lines = []
    for index in np.flatnonzero((labels >= low) & (labels < high))[:40]:
        name = f"{index}.png"
        Image.fromarray(images[index]).resize((16, 16)).convert("RGB").save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"{prompt} {labels[index]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_latent_pipeline(folder: Path) -> Path:
    """Write a Stable Diffusion pipeline built from tiny configurations; return the folder."""
    prepare_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    library = diffusers()
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    vae = library.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=4,
    )
    network = library.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    library.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=network,
        scheduler=library.DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
