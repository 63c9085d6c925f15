"""A finished model in a folder: its weights, where they come from, and what its library needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sophon._specs import ModelSpec
from sophon._tasks import Task
from sophon._training.checkpoints import save_model


def ship(
    folder: Path, model: nn.Module, spec: ModelSpec | None, about: dict[str, Any], task: Task
) -> None:
    """Write `model` to `folder`; beside it `model.json` with its network and `about`, and what its
    task says: a diffusion model's folder is a pipeline of diffusers as well, and names itself.
    """
    described = task.described(spec)
    network = None if described is None else described.model_dump(mode="json")
    save_model(folder, model, {"model": network, **about})
    task.complete(folder, model)
