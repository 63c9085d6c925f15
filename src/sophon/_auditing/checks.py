"""What is refused before an audit begins: executors, packages, attacks and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from sophon._attacks.search import require_optuna, starts
from sophon._auditing.plan import Plan
from sophon._auditing.ray import require_ray
from sophon._auditing.samples import check_samples
from sophon._base.errors import DataError, SpecError, brief
from sophon._base.remarks import remark
from sophon._data import Domain, check_batch_fits
from sophon._models import Bare, require_peft
from sophon._specs import Preparation, Strategy
from sophon._training.loop import check_preparations
from sophon._training.setting import Setting

ExecutorName = Literal["processes", "ray"]
# Batches up to this size are not shrunk to the images at hand: too few images are an error.
USUAL_BATCH: int = Strategy.model_fields["batch_size"].default


def check_executor(executor: str, address: str | None) -> None:
    """Raise SpecError for an executor that there is not, or an address that is not for it."""
    if executor not in get_args(ExecutorName):
        raise SpecError(f"executor = {executor!r}: use {' or '.join(get_args(ExecutorName))}")
    if executor == "ray":
        require_ray()
    elif address is not None:
        raise SpecError(f"address = {address!r} is for executor = 'ray': add it, or leave it out")


def checked_about(about: dict[str, Any], original: Domain) -> dict[str, Any]:
    """Return what is said of a checkpoint, whose classes at protection are held against those of
    the original task: raise DataError for another order of the same, and remark on others.
    """
    protection = about.get("protection")
    held: Any = protection.get("classes") if isinstance(protection, dict) else None
    usual = isinstance(held, list) and all(isinstance(name, str) for name in held)
    # What is no domain is refused with the other domains.
    own = list(original.classes) if isinstance(original, Domain) else held
    if not usual or held == own or len(held) != len(own):
        return about
    at = next(index for index, name in enumerate(own) if name != held[index])
    said = (
        f"class {at} of {original.name!r} is {brief(own[at])}, and was {brief(held[at])} when the"
        " model was protected"
    )
    if sorted(held) == sorted(own):
        raise DataError(
            f"{said}: give the classes in the order of `classes` in the checkpoint's model.json"
            " (original.classes in a run file)"
        )
    remark(f"warning: {said}: give the classes that it was protected with, if they are others")
    return about


def check_attacks(
    plan: Plan, setting: Setting, protected: nn.Module, fresh: nn.Module, bare: Mapping[int, Bare]
) -> None:
    """Raise SpecError, DataError or UnsupportedModelError for what would make attacks impossible.

    `fresh` is of a model that can be made; one that cannot be attacked is recorded as crashed.
    """
    spec, strategies = plan.spec, (*plan.strategies, *plan.whole)
    searched: tuple[tuple[Preparation, ...], ...] = ()
    if spec.search_trials:
        searched = tuple(starts(setting.task.metric, spec.steps).values())
    if searched or any(strategy.lora_rank is not None for strategy in strategies):
        require_peft()
    if spec.search_trials:
        require_optuna()
    check_samples(setting, spec, plan.restricted)
    preparations = (*(strategy.preparations for strategy in strategies), *searched)
    check_preparations(fresh, preparations, setting, spec.steps, bare.get(plan.seeds[0]))
    for strategy in strategies:
        setting.at(strategy.precision, protected)
    _check_batches(plan, setting, strategies)


def _check_batches(plan: Plan, setting: Setting, strategies: Sequence[Strategy]) -> None:
    chosen = {strategy.batch_size for strategy in plan.spec.extra}
    chosen |= set() if plan.spec.batch_size is None else {plan.spec.batch_size}
    usual = {s.batch_size for s in strategies if s.batch_size <= USUAL_BATCH}
    for domain in setting.restricted:
        check_batch_fits(
            domain, max(chosen | usual), "the largest batch of the attacks (audit.batch_size)"
        )
