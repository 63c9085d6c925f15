"""What is checked of a protection before any work; a refusal names the key and what fits."""

from __future__ import annotations

from torch import nn

from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._data import Domain, check_batch_fits
from sophon._models import check_single_image, require_peft
from sophon._protection.losses import require_fitting
from sophon._specs import Guard, ProtectSpec, Rehearsal
from sophon._training.loop import check_preparations, image_count
from sophon._training.ranks import Ranks
from sophon._training.setting import Setting


def check_protection(
    model: nn.Module, spec: ProtectSpec, setting: Setting, ranks: Ranks, *, independent: bool
) -> None:
    """Raise SpecError, DataError or UnsupportedModelError unless the run can be done as specified.

    `independent` says whether the rows of the model's batches are.
    """
    if ranks.sharded:
        _check_rows(model, spec, ranks, independent=independent)
    else:
        _check_shares(spec.rehearsal, ranks)
    require_fitting(spec.suppression, setting.task.metric)
    _check_tolerance(spec.guard, setting.task.metric)
    _check_batches(spec, setting.original, setting.restricted)
    _check_single_images(model, spec, setting)
    fixed = spec.rehearsal.fixed
    wanted = spec.rehearsal.distribution.preparations if fixed is None else (fixed.preparations,)
    check_preparations(model, wanted, setting, spec.rehearsal.life)
    if fixed is not None:
        setting.at(fixed.precision, model)
        if fixed.lora_rank is not None:
            require_peft()
    _check_weights(spec, setting.restricted)


def _check_tolerance(guard: Guard, metric: str) -> None:
    """Raise SpecError for a tolerance that the task's guard does not look at."""
    names = ("tolerance_points", "tolerance_relative")
    used, unused = names if metric == "accuracy" else names[::-1]
    value = getattr(guard, unused)
    if value != Guard.model_fields[unused].default:
        raise SpecError(
            f"protect.guard.{unused} = {value:g} is not for this task: set protect.guard.{used}"
        )


def _check_single_images(model: nn.Module, spec: ProtectSpec, setting: Setting) -> None:
    rehearsal = spec.rehearsal
    sizes = rehearsal.distribution.batch_sizes
    sizes = sizes if rehearsal.fixed is None else (rehearsal.fixed.batch_size,)
    if spec.original_batch_size == 1:
        shape = setting.shape(setting.original)
        check_single_image(model, shape, "protect.original_batch_size")
    for domain in setting.restricted:
        if 1 in sizes:
            check_single_image(model, setting.shape(domain), "protect.rehearsal: batch_size")
        if rehearsal.query_batch_size == 1:
            name = "protect.rehearsal.query_batch_size"
            check_single_image(model, setting.shape(domain), name)


def _check_shares(rehearsal: Rehearsal, ranks: Ranks) -> None:
    """Raise SpecError unless every process has the same number of attackers in every round."""
    counts = {"strategies": rehearsal.strategies}
    if rehearsal.horizon is not None:
        counts["pool"] = rehearsal.pool
    for name, count in counts.items():
        if count % ranks.world:
            fitting = [n for n in range(1, count + 1) if not any(c % n for c in counts.values())]
            raise SpecError(
                f"protect.rehearsal.{name} = {count} cannot be shared evenly by {ranks.world}"
                f" processes, some would wait: make it a multiple of {ranks.world}, or start"
                f" {' or '.join(map(str, fitting))}"
            )


def _check_rows(model: nn.Module, spec: ProtectSpec, ranks: Ranks, *, independent: bool) -> None:
    """Raise unless the rows of every batch can be worked on apart, and suffice for all."""
    if not independent:
        found = next((name for name, part in model.named_modules() if _mixes(part)), None)
        layer = "" if found is None else f"; here it is {found!r}"
        raise UnsupportedModelError(
            "--shard: the model's outputs for an image depend on the rest of the batch or on chance"
            f" (BatchNorm, dropout{layer}), or come from more than a call of the model, so that the"
            " batch cannot be split: leave --shard out"
        )
    rehearsal = spec.rehearsal
    fixed, sizes = rehearsal.fixed, rehearsal.distribution.batch_sizes
    smallest = {
        "protect.original_batch_size": spec.original_batch_size,
        "protect.rehearsal.query_batch_size": rehearsal.query_batch_size,
        "protect.rehearsal: batch_size": min(sizes) if fixed is None else fixed.batch_size,
    }
    for name, size in smallest.items():
        if size < ranks.world:
            raise SpecError(
                f"{name} = {size} is fewer images than --shard has processes: use at least"
                f" {ranks.world}"
            )


def _mixes(part: nn.Module) -> bool:
    """Return whether a layer's output for one image depends on others, or on chance."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return isinstance(part, kinds) and getattr(part, "p", 1.0) > 0


def _check_batches(spec: ProtectSpec, original: Domain, restricted: tuple[Domain, ...]) -> None:
    check_batch_fits(original, spec.original_batch_size, "protect.original_batch_size")
    rehearsal = spec.rehearsal
    sizes, fixed = rehearsal.distribution.batch_sizes, rehearsal.fixed
    largest = max(sizes) if fixed is None else fixed.batch_size
    key = "distribution.batch_sizes" if fixed is None else "fixed.batch_size"
    for domain in restricted:
        check_batch_fits(
            domain,
            largest + rehearsal.query_batch_size,
            have=image_count(domain, 1.0 if fixed is None else fixed.data_fraction),
            what=f"protect.rehearsal.{key} ({largest}) + protect.rehearsal.query_batch_size"
            f" ({rehearsal.query_batch_size}) together",
        )


def _check_weights(spec: ProtectSpec, restricted: tuple[Domain, ...]) -> None:
    """Raise SpecError for a domain that no attacker of the whole run would take."""
    rehearsal = spec.rehearsal
    visits = spec.rounds * spec.suppression_steps * rehearsal.strategies
    attackers = max(1, visits * rehearsal.steps // rehearsal.life)
    total = sum(domain.weight for domain in restricted)
    for domain in restricted:
        if domain.weight / total * attackers < 0.5:
            raise SpecError(
                f"restricted domain {domain.name!r}: weight = {domain.weight:g} of {total:g} is not"
                f" one of the run's {attackers} attackers: raise its weight or protect.rounds"
            )
