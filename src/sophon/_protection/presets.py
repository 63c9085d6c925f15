"""What `protect` does unless a run file says otherwise: by method, task and number of images."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import nn

from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._data import Domain
from sophon._models import blocks
from sophon._protection.losses import USUAL
from sophon._protection.readers import ReadersSpec, images_needed
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import Alternate, Joint, ProtectSpec
from sophon._protection.terms import TERMS
from sophon._protection.terms.distil import DistilSpec
from sophon._protection.terms.erasure import ErasureSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._protection.terms.retention import RetentionSpec
from sophon._protection.terms.task import TaskLossSpec
from sophon._specs import FreshHead, Preparation, RescaleWeights, ResetLastBlocks, RidgeHead
from sophon._specs.guard import Guard, Price
from sophon._training.loop import check_preparations
from sophon._training.setting import Setting

# How often erasure passes over the restricted images, and its rounds at least and at most.
_PASSES, _LEAST, _MOST = 250, 200, 6000
_BATCH = 192
# Images that a reader's batch, and an attacker's, have at least.
_SMALLEST, _ATTACKERS_LEAST = 8, 2
_ORIGINAL_BATCH = 256
# Steps of a rehearsed attacker: a tenth of an audit's usual ones, as a good verdict wants; and the
# shares of the blocks that some of them start anew.
_LIFE = 20
_RESET = (0.1, 0.35, 0.7)


def completed(spec: ProtectSpec, setting: Setting, model: nn.Module) -> ProtectSpec:
    """Return the specification with nothing left open, for the task, the domains and the model.

    Erasure is for classifiers: a diffusion model has the paper's method unless terms are given.
    """
    metric = setting.task.metric
    erases = spec.method == "erasure" and metric in TERMS["erasure"].metrics
    if erases and spec.hinder is None:
        require_images(setting.restricted)
    usual = _erasure(setting, model, spec) if erases else _sophon()
    return _filled(spec, usual, metric)


def as_paper(spec: ProtectSpec, metric: str) -> ProtectSpec:
    """Return the specification completed by the paper's method, for a task that `metric` scores."""
    return _filled(spec, _sophon(), metric)


def _filled(spec: ProtectSpec, usual: dict[str, Any], metric: str) -> ProtectSpec:
    values = {name: value for name, value in usual.items() if getattr(spec, name) is None}
    whole = spec.model_copy(update=values)
    update = whole.update
    if isinstance(update, Joint) and update.freeze_statistics is None:
        frozen = whole.start == "given"
        whole = whole.model_copy(
            update={"update": update.model_copy(update={"freeze_statistics": frozen})}
        )
    guard = whole.guard or Guard()
    if guard.mode is None:
        mode = "price" if isinstance(whole.update, Joint) else "rollback"
        if mode == "rollback" and guard.price != Price():
            raise SpecError(
                "protect.guard.price is for update = 'joint': leave it out, or set that update"
            )
        guard = guard.model_copy(update={"mode": mode})
    named = tuple(
        term.model_copy(update={"loss": USUAL[metric]})
        if isinstance(term, Rehearsal) and term.loss is None
        else term
        for term in whole.hinder or ()
    )
    return whole.model_copy(update={"guard": guard, "hinder": named})


def _sophon() -> dict[str, Any]:
    return {
        "rounds": 100,
        "keep": (TaskLossSpec(),),
        "hinder": (Rehearsal(),),
        "update": Alternate(),
        "original_batch_size": 64,
        "original_augmentation": "none",
    }


def _erasure(setting: Setting, model: nn.Module, spec: ProtectSpec) -> dict[str, Any]:
    # A small domain is read in smaller batches, of an even number of images, one of many classes
    # in larger ones. An attacker has a third as many to train on.
    fewest = min(map(_count, setting.restricted))
    least = _least_batch(setting.restricted)
    batch = max(_SMALLEST, min(max(_BATCH, least), fewest * 3 // 4) // 2 * 2)
    batch = least if batch < least <= fewest - _ATTACKERS_LEAST else batch
    rounds = math.ceil(_PASSES * sum(map(_count, setting.restricted)) / batch)
    # The rates and batches at which features come back the fastest.
    sizes = sorted({max(_ATTACKERS_LEAST, min(size, fewest - batch)) for size in (64, 128)})
    distribution = StrategyDistribution(
        learning_rates={"adam": (3e-3, 1.5e-2), "sgd_momentum": (3e-2, 1.5e-1)},
        batch_sizes=tuple(sizes),
        preparations=_winners(setting, model),
    )
    rehearsal = Rehearsal(
        steps=1,
        horizon=_LIFE,
        pool=8,
        query_batch_size=batch,
        readers=ReadersSpec(),
        distribution=distribution,
    )
    keep = [TaskLossSpec(), DistilSpec()]
    held = min(max(_BATCH, images_needed(setting.original.class_count)), _count(setting.original))
    # Against erasure; its readers need batches of two images a class.
    if spec.hinder is None and held >= max(8, images_needed(setting.original.class_count)):
        keep.append(RetentionSpec(batch_size=held // 2 * 2))
    return {
        "rounds": max(_LEAST, min(_MOST, rounds)),
        "keep": tuple(keep),
        "hinder": (ErasureSpec(batch_size=batch), rehearsal),
        "update": Joint(),
        "original_batch_size": min(_ORIGINAL_BATCH, _count(setting.original)),
        "original_augmentation": "crop",
    }


def _least_batch(restricted: tuple[Domain, ...]) -> int:
    return max(_SMALLEST, images_needed(max(d.class_count for d in restricted)))


def require_images(restricted: tuple[Domain, ...]) -> None:
    """Raise DataError for a domain with fewer images than erasure's smallest batches take."""
    needed = _least_batch(restricted) + _ATTACKERS_LEAST
    for domain in restricted:
        if _count(domain) < needed:
            raise DataError(
                f"domain {domain.name!r} has {_count(domain)} training images; erasure needs"
                f" {needed}: give more, or use method = 'sophon' with batches that fit"
            )


def _winners(setting: Setting, model: nn.Module) -> tuple[tuple[Preparation, ...], ...]:
    """Return the preparations that won audits, as far as the model allows them: the weights as they
    are, a fresh head, a fitted one, rescaled weights, and the first blocks kept.
    """
    count = len(blocks(model, setting.head))
    resets = sorted({max(1, round(count * share)) for share in _RESET} - {count})
    wanted: list[tuple[Preparation, ...]] = [
        (FreshHead(),),
        (RidgeHead(),),
        (RescaleWeights(), FreshHead()),
        (RescaleWeights(), RidgeHead()),
        *((ResetLastBlocks(blocks=number), FreshHead()) for number in resets),
    ]
    held: list[tuple[Preparation, ...]] = [()]
    for preparations in wanted:
        with contextlib.suppress(SpecError, UnsupportedModelError):
            check_preparations(model, [preparations], setting, _LIFE)
            held.append(preparations)
    return tuple(held)


def _count(domain: Domain) -> int:
    return len(domain.train)
