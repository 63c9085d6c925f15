# ruff: noqa: F401
# mypy: implicit-reexport
"""Tasks: how a model is run on a batch, what it is trained on and how it is scored."""

from sophon._tasks.classification import Classification, Distillation
from sophon._tasks.denoising import Denoising
from sophon._tasks.latents import Latents
from sophon._tasks.task import Task
