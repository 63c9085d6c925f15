"""The frozen half of a latent diffusion pipeline: its autoencoder and its prompts' embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.errors import CheckpointError, DataError, first_line
from sophon._data import Domain
from sophon._models import Shape, diffusers, weights_sha256

# Prompts embedded at once.
_AT_ONCE = 32


class Latents:
    """Images become latents, labels the embeddings of the prompts they index; nothing is trained.

    `vae` is diffusers' AutoencoderKL, `prompts` the table that labels of every domain index (see
    `share_prompts`), `embeddings` (prompts, tokens, width) what the text encoder makes of them.
    An image's latent is the mode of its posterior, not a draw from it: evaluations then compare.
    """

    def __init__(
        self,
        vae: nn.Module,
        prompts: Sequence[str],
        embeddings: Tensor,
        *,
        source: Path | None = None,
    ) -> None:
        if len(prompts) != len(embeddings):
            raise DataError(
                f"{len(prompts)} prompts have {len(embeddings)} embeddings: give one for each"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.prompts = tuple(prompts)
        self.embeddings = embeddings.detach().float()
        self.source = source
        config: Any = vae.config
        # Channels of the images and of their latents; how many pixels of a side become one latent.
        self.channels, self.depth = int(config["in_channels"]), int(config["latent_channels"])
        self.factor = int(2 ** (len(config["block_out_channels"]) - 1))
        self.scale = float(config["scaling_factor"])

    @classmethod
    def from_pipeline(cls, folder: str | Path, prompts: Sequence[str]) -> Latents:
        """Return the frozen half of the Stable Diffusion pipeline in `folder`.

        Raises CheckpointError if it lacks a part or cannot be loaded.
        """
        try:
            pipeline = diffusers().DiffusionPipeline.from_pretrained(folder, local_files_only=True)
            pipeline.set_progress_bar_config(disable=True)
            with torch.no_grad():
                held = [
                    pipeline.encode_prompt(
                        list(prompts[start : start + _AT_ONCE]),
                        device="cpu",
                        num_images_per_prompt=1,
                        do_classifier_free_guidance=False,
                    )[0]
                    for start in range(0, len(prompts), _AT_ONCE)
                ]
            return cls(pipeline.vae, prompts, torch.cat(held), source=Path(folder))
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"{folder} is no pipeline with an autoencoder and a text encoder"
                f" ({first_line(error, 200)}): name the folder of a whole one"
            ) from None

    @cached_property
    def sha256(self) -> str:
        """The checksum of the autoencoder and the embeddings."""
        digest = hashlib.sha256(weights_sha256(self.vae).encode())
        digest.update(self.embeddings.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def shape(self, image_shape: Shape) -> Shape:
        """Return the shape of an image's latent."""
        _, height, width = image_shape
        return self.depth, height // self.factor, width // self.factor

    def check(self, domain: Domain, shape: Shape) -> None:
        """Raise DataError unless the domain's labels index the prompts and its images fit."""
        _, height, width = shape
        if height % self.factor or width % self.factor:
            raise DataError(
                f"domain {domain.name!r} has {height}x{width} images: set image_size to a multiple"
                f" of {self.factor}, by which the autoencoder divides a side"
            )
        if domain.classes != self.prompts:
            raise DataError(
                f"domain {domain.name!r}: its labels index other prompts than those embedded: put"
                " the domains through share_prompts first"
            )

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """Return the latents (batch, channels, height, width) of images from -1 to 1."""
        self._follow(images)
        with torch.autocast(images.device.type, enabled=False):
            latents: Tensor = self.vae.encode(images).latent_dist.mode()  # type: ignore[operator]
        return latents * self.scale

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""
        self._follow(latents)
        images: Tensor = self.vae.decode(latents / self.scale, return_dict=False)[0]  # type: ignore[operator]
        return images

    def embedded(self, labels: Tensor) -> Tensor:
        """Return the token embeddings (batch, tokens, width) of the prompts that labels index."""
        self._follow(labels)
        return self.embeddings[labels]

    def _follow(self, like: Tensor) -> None:
        if self.embeddings.device != like.device:
            self.embeddings = self.embeddings.to(like.device)
            self.vae.to(like.device)
