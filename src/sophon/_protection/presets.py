"""What `protect` does unless a run file says otherwise: by method, task and number of images."""

from __future__ import annotations

import math
from typing import Any

from sophon._data import Domain
from sophon._protection.losses import USUAL
from sophon._protection.spec import Alternate, Joint, ProtectSpec
from sophon._protection.terms import TERMS
from sophon._protection.terms.distil import DistilSpec
from sophon._protection.terms.erasure import ErasureSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._protection.terms.task import TaskLossSpec
from sophon._specs.guard import Guard
from sophon._training.setting import Setting

# How often erasure passes over the restricted images, and its rounds at least and at most.
_PASSES, _LEAST, _MOST = 150, 200, 6000
_BATCH = 192
_ORIGINAL_BATCH = 128


def completed(spec: ProtectSpec, setting: Setting) -> ProtectSpec:
    """Return the specification with nothing left open, for the task and the domains of a run.

    Erasure is for classifiers: a diffusion model has the paper's method unless terms are given.
    """
    metric = setting.task.metric
    erases = spec.method == "erasure" and metric in TERMS["erasure"].metrics
    return _filled(spec, _erasure(setting), metric) if erases else as_paper(spec, metric)


def as_paper(spec: ProtectSpec, metric: str) -> ProtectSpec:
    """Return the specification completed by the paper's method, for a task that `metric` scores."""
    return _filled(spec, _sophon(), metric)


def _filled(spec: ProtectSpec, usual: dict[str, Any], metric: str) -> ProtectSpec:
    values = {name: value for name, value in usual.items() if getattr(spec, name) is None}
    whole = spec.model_copy(update=values)
    guard = whole.guard or Guard()
    if guard.mode is None:
        mode = "price" if isinstance(whole.update, Joint) else "rollback"
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


def _erasure(setting: Setting) -> dict[str, Any]:
    # A small domain is read in smaller batches, of an even number of images, one of many classes
    # in larger ones.
    fewest = min(map(_count, setting.restricted))
    classes = max(domain.class_count for domain in setting.restricted)
    batch = max(8, min(max(_BATCH, 2 * classes), fewest) // 2 * 2)
    rounds = math.ceil(_PASSES * sum(map(_count, setting.restricted)) / batch)
    return {
        "rounds": max(_LEAST, min(_MOST, rounds)),
        "keep": (TaskLossSpec(), DistilSpec()),
        "hinder": (ErasureSpec(batch_size=batch),),
        "update": Joint(),
        "original_batch_size": min(_ORIGINAL_BATCH, _count(setting.original)),
        "original_augmentation": "crop",
    }


def _count(domain: Domain) -> int:
    return len(domain.train)
