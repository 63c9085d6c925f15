"""A finished model in a folder: its weights, where they come from, and what its library needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sophon._models import DIFFUSERS, write_pipeline
from sophon._specs import ModelSpec
from sophon._tasks import Denoising, Task
from sophon._training.checkpoints import save_model


def ship(
    folder: Path, model: nn.Module, spec: ModelSpec | None, about: dict[str, Any], task: Task
) -> None:
    """Write `model` to `folder`; beside it `model.json` with its network and `about`.

    A diffusion model's folder is a pipeline of diffusers as well, and names itself as its network.
    """
    if isinstance(task, Denoising):
        spec = ModelSpec(name=f"{DIFFUSERS}unet")
    described = None if spec is None else spec.model_dump(mode="json")
    save_model(folder, model, {"model": described, **about})
    if isinstance(task, Denoising):
        source = None if task.latents is None else task.latents.source
        write_pipeline(folder, model, task.scheduler, source)
