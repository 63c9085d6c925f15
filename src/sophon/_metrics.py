"""Measure a model on a split."""

from __future__ import annotations

import torch
from torch import nn

from sophon._data import Domain, Images
from sophon._records import Score
from sophon._seeding import generator
from sophon._setting import Setting


@torch.no_grad()
def evaluate(
    model: nn.Module, setting: Setting, domain: Domain, images: Images, *, batch_size: int = 250
) -> Score:
    """Return how many of `images` the model gets right, in eval mode, every image counted.

    The model's train or eval mode is as before afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total = torch.zeros((), device=setting.device)
    stream = generator(0, "evaluation")
    for pixels, labels in setting.feed(domain, images, batch_size=batch_size).in_order():
        with setting.autocast():
            outputs, targets = setting.task.outputs(model, pixels, labels, stream)
        total += setting.task.score(outputs, targets).sum()
    for module, training in modes.items():
        module.training = training
    return Score(correct=int(total.item()), total=len(images))
