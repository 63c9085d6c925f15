"""Measure a model on a split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sophon._base.seeding import generator
from sophon._data import Domain, Images
from sophon._records.audit_record import ErrorScore, Measurement, Score
from sophon._training.setting import Setting


def evaluate(
    model: nn.Module, setting: Setting, domain: Domain, images: Images, *, batch_size: int = 250
) -> Measurement:
    """Return the model's score on `images`, in eval mode, every image counted."""
    return measured(image_scores(model, setting, domain, images, batch_size=batch_size), setting)


def measured(scores: Tensor, setting: Setting) -> Measurement:
    """Return the score that `image_scores` come to."""
    return _MEASURED[setting.task.metric](scores)


@torch.no_grad()
def image_scores(
    model: nn.Module, setting: Setting, domain: Domain, images: Images, *, batch_size: int = 250
) -> Tensor:
    """Return the score of every image in every part of the task, (parts, images), in eval mode.

    A task of several parts (timesteps) takes every image once in each. What it draws depends on the
    image's place alone, so numbers of any two models compare. The model's train or eval mode is
    as before afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    scores = []
    for index, task in enumerate(setting.task.parts):
        stream = generator(0, "evaluation", index)
        held = []
        for pixels, labels in setting.feed(domain, images, batch_size=batch_size).in_order():
            with setting.autocast():
                outputs, targets = task.outputs(model, pixels, labels, stream)
            held.append(task.score(outputs, targets))
        scores.append(torch.cat(held))
    for module, training in modes.items():
        module.training = training
    return torch.stack(scores).cpu()


def _correct(scores: Tensor) -> Score:
    """Return how many images are right, from one part's scores of 0 and 1."""
    return Score(correct=int(scores.sum().item()), total=scores.shape[1])


def _squared_error(scores: Tensor) -> ErrorScore:
    """Return the mean error of images, each averaged over the parts, and of each part."""
    errors = 1 - scores.double()
    images = errors.mean(0)
    quarters = errors.mean(1).tolist() if len(errors) > 1 else ()
    return ErrorScore(
        mse=float(images.mean()),
        variance=float(images.var(correction=0)),
        total=len(images),
        quarters=tuple(quarters),
    )


_MEASURED: dict[str, Callable[[Tensor], Measurement]] = {
    "accuracy": _correct,
    "mse": _squared_error,
}
