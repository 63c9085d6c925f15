"""What is checked of a rehearsal before any work; a refusal names the key and what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sophon._base.errors import SpecError
from sophon._data import check_batch_fits
from sophon._models import check_single_image, require_peft
from sophon._protection.losses import suppression_named
from sophon._protection.term import Surroundings
from sophon._training.loop import check_preparations, image_count
from sophon._training.ranks import Ranks

if TYPE_CHECKING:
    from sophon._protection.terms.rehearsal import Rehearsal

_WHAT = "protect.hinder: a rehearsal's"


def check_rehearsal(spec: Rehearsal, model: nn.Module, around: Surroundings) -> None:
    """Raise a SophonError unless every attacker can be prepared, fed, and shared by processes."""
    setting = around.setting
    suppression_named(spec.loss, setting.task.metric)
    if around.ranks.sharded:
        require_rows(
            {
                f"{_WHAT} query_batch_size": spec.query_batch_size,
                f"{_WHAT} batch_size": min(_batch_sizes(spec)),
            },
            around,
        )
    else:
        _check_shares(spec, around.ranks)
    _check_batches(spec, model, around)
    fixed = spec.fixed
    wanted = spec.distribution.preparations if fixed is None else (fixed.preparations,)
    check_preparations(model, wanted, setting, spec.life)
    if fixed is not None:
        setting.at(fixed.precision, model)
        if fixed.lora_rank is not None:
            require_peft()
    if spec.readers is not None and (not setting.task.kind.classifies or around.ranks.sharded):
        raise SpecError(
            f"{_WHAT} readers are for classifiers without --shard: leave readers or --shard out"
        )
    if spec.readers is not None and fixed is not None and fixed.lora_rank is not None:
        raise SpecError("protect.hinder: readers do not look into adapters: leave lora_rank out")


def require_rows(sizes: dict[str, int], around: Surroundings) -> None:
    """Raise SpecError for a batch size with fewer images than there are processes to share it."""
    for name, size in sizes.items():
        if size < around.ranks.world:
            raise SpecError(
                f"{name} = {size} is fewer images than --shard has processes: use at least"
                f" {around.ranks.world}"
            )


def _batch_sizes(spec: Rehearsal) -> tuple[int, ...]:
    return spec.distribution.batch_sizes if spec.fixed is None else (spec.fixed.batch_size,)


def _check_shares(spec: Rehearsal, ranks: Ranks) -> None:
    """Raise SpecError unless every process has the same number of attackers in every round."""
    counts = {"strategies": spec.strategies}
    if spec.horizon is not None:
        counts["pool"] = spec.pool
    for name, count in counts.items():
        if count % ranks.world:
            fitting = [n for n in range(1, count + 1) if not any(c % n for c in counts.values())]
            raise SpecError(
                f"{_WHAT} {name} = {count} cannot be shared evenly by {ranks.world}"
                f" processes, some would wait: make it a multiple of {ranks.world}, or start"
                f" {' or '.join(map(str, fitting))}"
            )


def _check_batches(spec: Rehearsal, model: nn.Module, around: Surroundings) -> None:
    setting, fixed, sizes = around.setting, spec.fixed, _batch_sizes(spec)
    key = "distribution.batch_sizes" if fixed is None else "fixed.batch_size"
    for domain in setting.restricted:
        check_batch_fits(
            domain,
            max(sizes) + spec.query_batch_size,
            have=image_count(domain, 1.0 if fixed is None else fixed.data_fraction),
            what=f"{_WHAT} {key} ({max(sizes)}) + query_batch_size ({spec.query_batch_size})"
            " together",
        )
        if 1 in sizes:
            check_single_image(model, setting.shape(domain), f"{_WHAT} batch_size")
        if spec.query_batch_size == 1:
            check_single_image(model, setting.shape(domain), f"{_WHAT} query_batch_size")
