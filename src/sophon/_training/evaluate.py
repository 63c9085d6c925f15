"""Measure a model on a split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sophon._base.seeding import generator
from sophon._data import Domain, Images
from sophon._models import keeping_modes
from sophon._records.audit_record import Measurement
from sophon._training.setting import Setting


def evaluate(
    model: nn.Module, setting: Setting, domain: Domain, images: Images, *, batch_size: int = 250
) -> Measurement:
    """Return the model's score on `images`, in eval mode, every image counted."""
    scores = image_scores(model, setting, domain, images, batch_size=batch_size)
    return setting.task.measure(scores)


@torch.no_grad()
def image_scores(
    model: nn.Module, setting: Setting, domain: Domain, images: Images, *, batch_size: int = 250
) -> Tensor:
    """Return the score of every image in every part of the task, (parts, images), in eval mode.

    A task of several parts (timesteps) takes every image once in each. What it draws depends on the
    image's place alone, so numbers of any two models compare. The model's train or eval mode is
    as before afterwards.
    """
    scores = []
    with keeping_modes(model):
        model.eval()
        for index, task in enumerate(setting.task.parts):
            stream = generator(0, "evaluation", index)
            held = []
            for pixels, labels in setting.feed(domain, images, batch_size=batch_size).in_order():
                with setting.autocast():
                    outputs, targets = task.outputs(model, pixels, labels, stream)
                score = task.score(outputs, targets)
                # Half precision would round what is averaged.
                held.append(score.to(torch.promote_types(score.dtype, torch.float32)))
            scores.append(torch.cat(held))
    return torch.stack(scores).cpu()
