"""Domains of a run, resized as its network's own image processor does."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sophon._cli.run_spec import PretrainRunSpec
from sophon._data.loading import prepared_as
from sophon._models import TRANSFORMERS, folder_input
from sophon._specs import ModelSpec

AnyRun = TypeVar("AnyRun", bound=PretrainRunSpec)


def prepared(spec: AnyRun, network: ModelSpec) -> AnyRun:
    """Return a run with domains resized as the image processor of its network of transformers does,
    where they say nothing else.

    Raises CheckpointError or UnsupportedModelError for a processor that cannot be used.
    """
    name = network.name
    own = folder_input(Path(name[len(TRANSFORMERS) :])) if name.startswith(TRANSFORMERS) else None
    if own is None:
        return spec
    roles = ("restricted", "held_out", "benign")
    several = {role: tuple(prepared_as(s, own) for s in getattr(spec, role)) for role in roles}
    return spec.model_copy(update={"original": prepared_as(spec.original, own), **several})
