"""Has a model been trained on a domain's training images? What it knows of them against others.

A head is fitted in closed form to half of the training images, on the features as they are. The
other half and the test images are equally new to that head; a model that was trained on the former
tells them apart better (a test of membership). Validation images are often cut from the same source
as training images, and such a model may have met them. So does any tell them apart better where
halves share more than splits do, such as frames of one film: hence a fresh network is asked, too.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sophon._base.seeding import generator
from sophon._data import Domain, Images
from sophon._models import tracked_batch_norms
from sophon._records.audit_record import Familiarity, Score
from sophon._specs import BatchNorm, Preparation, RidgeHead, Strategy
from sophon._training.evaluate import evaluate
from sophon._training.loop import attacker_copy
from sophon._training.setting import Setting

_MOST = 500
# Fewer tell nothing.
_LEAST = 50
_BATCH = 64
# Nothing is trained for so many steps: their share lets the head see every whole batch.
_STEPS = 1000


def familiarity(model: nn.Module, setting: Setting, domain: Domain) -> Familiarity | None:
    """Return how many training images and how many others `model` tells right; it stays as it is.

    None for tasks without classes and where there are too few images to halve.
    """
    half = min(_MOST, len(domain.train) // 2)
    classes = setting.task.classes(domain)
    if not setting.task.kind.classifies or classes is None:
        return None
    if half < max(_LEAST, classes) or len(domain.test) < _LEAST:
        return None
    order = torch.randperm(len(domain.train), generator=generator(0, "familiarity"))
    fitted, held = (_part(domain.train, order[at : at + half]) for at in (0, half))
    chosen = torch.randperm(len(domain.test), generator=generator(0, "familiarity", "others"))
    others = _part(domain.test, chosen[:_MOST])
    preparations: tuple[Preparation, ...] = (RidgeHead(),)
    if tracked_batch_norms(model):
        preparations = (BatchNorm(mode="reestimate"), *preparations)
    strategy = Strategy(
        preparations=preparations, batch_size=min(_BATCH, half), steps=_STEPS, precision="fp32"
    )
    feed = setting.feed(domain, fitted, batch_size=strategy.batch_size)
    probed = copy.deepcopy(model)
    stream = (0, ("familiarity",))
    attacker_copy(probed, strategy, setting, classes=classes, feed=feed, stream=stream)
    known, new = (evaluate(probed, setting, domain, images) for images in (held, others))
    assert isinstance(known, Score)
    assert isinstance(new, Score)
    return Familiarity(trained=known, others=new)


def _part(images: Images, index: torch.Tensor) -> Images:
    return Images(images.pixels[index], images.labels[index])
