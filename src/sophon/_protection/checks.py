"""What is checked of a protection before any work; a refusal names the key and what fits."""

from __future__ import annotations

from torch import nn

from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._data import check_batch_fits
from sophon._models import check_single_image
from sophon._protection.rehearsal_checks import require_rows
from sophon._protection.spec import ProtectSpec
from sophon._protection.term import Surroundings
from sophon._protection.terms import TERMS, Hindrance, Keep
from sophon._records.metrics import KINDS
from sophon._specs.guard import Guard


def check_protection(model: nn.Module, spec: ProtectSpec, around: Surroundings) -> None:
    """Raise SpecError, DataError or UnsupportedModelError unless the run can be done as specified.

    `spec` is completed: nothing in it is left open.
    """
    setting, ranks = around.setting, around.ranks
    try:
        spec.require_priced()
    except ValueError as error:
        raise SpecError(f"protect.{error}") from None
    size = spec.original_batch_size or 1
    if ranks.sharded:
        _check_rows(model, size, around)
    metric = setting.task.metric
    for name, terms in (("keep", spec.keep), ("hinder", spec.hinder)):
        for term in terms or ():
            kind = TERMS[term.kind]
            if metric not in kind.metrics:
                role = Keep if name == "keep" else Hindrance
                fitting = [
                    k for k, t in TERMS.items() if metric in t.metrics and issubclass(t, role)
                ]
                raise SpecError(
                    f"protect.{name}: a term of kind {term.kind!r} does not fit this task: use one"
                    f" of {', '.join(fitting)}"
                )
            kind.check(term, model, around)
    _check_tolerance(spec.guard or Guard(), metric)
    check_batch_fits(setting.original, size, "protect.original_batch_size")
    if size == 1:
        shape = setting.shape(setting.original)
        check_single_image(model, shape, "protect.original_batch_size")
    _check_weights(spec, around)


def _check_tolerance(guard: Guard, metric: str) -> None:
    """Raise SpecError for a tolerance that the task's guard does not look at."""
    used = KINDS[metric].guard_key
    for unused in {kind.guard_key for kind in KINDS.values()} - {used}:
        value = getattr(guard, unused)
        if value != Guard.model_fields[unused].default:
            raise SpecError(
                f"protect.guard.{unused} = {value:g} is not for this task: set protect.guard.{used}"
            )


def _check_rows(model: nn.Module, size: int, around: Surroundings) -> None:
    """Raise unless the rows of every batch can be worked on apart, and suffice for all."""
    if not around.independent:
        found = next((name for name, part in model.named_modules() if _mixes(part)), None)
        layer = "" if found is None else f"; here it is {found!r}"
        raise UnsupportedModelError(
            "--shard: the model's outputs for an image depend on the rest of the batch or on chance"
            f" (BatchNorm, dropout{layer}), or come from more than a call of the model, so that the"
            " batch cannot be split: leave --shard out"
        )
    require_rows({"protect.original_batch_size": size}, around)


def _mixes(part: nn.Module) -> bool:
    """Return whether a layer's output for one image depends on others, or on chance."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return isinstance(part, kinds) and getattr(part, "p", 1.0) > 0


def _check_weights(spec: ProtectSpec, around: Surroundings) -> None:
    """Raise SpecError for a domain that no turn of a hindrance of the whole run would take."""
    restricted = around.setting.restricted
    total = sum(domain.weight for domain in restricted)
    updates = (spec.rounds or 1) * getattr(spec.update, "hindrance_steps", 1)
    for term in spec.hinder or ():
        turns = TERMS[term.kind].turns(term, updates)
        for domain in restricted:
            if domain.weight / total * turns < 0.5:
                raise SpecError(
                    f"restricted domain {domain.name!r}: weight = {domain.weight:g} of {total:g} is"
                    f" not one of the run's {turns} {TERMS[term.kind].turn_noun}: raise its weight"
                    " or protect.rounds"
                )
