"""Domains of a run, resized as its network's own image processor does."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sophon._cli.run_spec import PretrainRunSpec
from sophon._data.loading import prepared_as
from sophon._models import TRANSFORMERS, checkpoint_input, folder_input
from sophon._specs import ModelSpec

AnyRun = TypeVar("AnyRun", bound=PretrainRunSpec)


def prepared(spec: AnyRun, network: ModelSpec, name: str, base: Path) -> AnyRun:
    """Return a run with domains resized as the image processor of its network of transformers does,
    where they say nothing else. Where `name`, from `base`, is a checkpoint of such a network, they
    are resized as it says that its own images were.

    Raises CheckpointError or UnsupportedModelError for a processor that cannot be used.
    """
    if not network.name.startswith(TRANSFORMERS):
        return spec
    if name.startswith(TRANSFORMERS):
        own = folder_input(Path(name.removeprefix(TRANSFORMERS)))
    else:
        place = base / name
        own = checkpoint_input((place if place.is_dir() else place.parent) / "model.json")
    if own is None:
        return spec
    roles = ("restricted", "held_out", "benign")
    several = {role: tuple(prepared_as(s, own) for s in getattr(spec, role)) for role in roles}
    return spec.model_copy(update={"original": prepared_as(spec.original, own), **several})
