"""What an attacker does to the copied weights before its first step, and how it derives.

A preparation maps each real parameter w to c * w + constant. The factor c is what carries a
change of the real weights over to the prepared ones: 1 where they are kept, 0 where they are
re-initialised, c where they are rescaled. Factors multiply along the list. Training beforehand
(heal) is a constant too, to first order, and so is a head that is fitted (ridge_head). Where no one
factor says what becomes of a tensor (balance_weights, scramble), nothing passes: 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from sophon._base.errors import DataError, SpecError
from sophon._base.seeding import generator
from sophon._models import (
    Bare,
    BatchNorms,
    Names,
    Shape,
    blocks,
    drop_foreign_hooks,
    fit_head,
    head_classes,
    heads,
    reestimate_batch_norm,
    reinitialise,
    replace_head,
    shrink_towards,
    tracked_batch_norms,
)
from sophon._specs import (
    BatchNorm,
    Distil,
    FreshHead,
    Heal,
    KeepSpan,
    Preparation,
    ResetLastBlocks,
    RidgeHead,
    ShrinkPerturb,
)
from sophon._training.perturbing import densify, noise_kick, scramble
from sophon._training.rescaling import balance_weights, rescale_weights

# Passes forward that cost as much as a step, which goes back as well.
_PASSES_A_STEP = 3
# A head is fitted to no more images than this.
_MOST_IMAGES = 8192
Factors = dict[str, float]


@dataclass(frozen=True)
class Surroundings:
    """What a preparation may use.

    `classes` is the restricted domain's, None where a head stays of its size; `batches(n)` yields
    up to n normalised image batches of it (batch, channels, height, width), `labelled(n)` up to n
    with their labels, none twice; `train` follows a course on the original domain; `steps` is the
    attacker's budget; `(seed, *names)` is its random stream; `bare` are fresh values for parameters
    that no `reset_parameters` reaches; `factors` are the parameters', by name, which it changes.
    """

    head: str
    image_shape: Shape
    classes: int | None
    seed: int
    names: Names
    batches: Callable[[int], Iterator[Tensor]] | None
    train: Callable[[nn.Module, Course], None] | None = None
    steps: int = 1
    bare: Bare | None = None
    labelled: Callable[[int], Iterator[tuple[Tensor, Tensor]]] | None = None
    factors: Factors = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """Training on the original domain: on its labels, or on the outputs of a `teacher`."""

    steps: int
    learning_rate: float
    teacher: nn.Module | None
    seed: int
    names: Names


def prepare(
    model: nn.Module, preparations: tuple[Preparation, ...], surroundings: Surroundings
) -> tuple[Factors, int]:
    """Prepare `model`, already a copy, in order; return each parameter's factor, and the steps
    that were spent on it.

    A head whose class count differs from the domain's is replaced in any case, once what needs
    the original one (heal, distil) is done. Raises SpecError for a preparation that this model
    does not allow, naming what it allows, and UnsupportedModelError for layers that cannot be
    re-initialised.
    """
    factors = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    surroundings = replace(surroundings, factors=factors)
    spent, fitted = 0, False
    for index, preparation in enumerate(preparations):
        if not fitted and not isinstance(preparation, Heal | Distil):
            _fit_head(model, surroundings)
            fitted = True
        step = _streamed(surroundings, "preparation", index, preparation.kind)
        spent += PREPARATIONS[preparation.kind](model, preparation, step) or 0
    if not fitted:
        _fit_head(model, surroundings)
    require_steps(preparations, surroundings.steps)
    return factors, spent


def require_steps(preparations: tuple[Preparation, ...], steps: int) -> None:
    """Raise SpecError unless what trains beforehand leaves one of `steps` steps."""
    if sum(spent_at_most(p, steps) for p in preparations) >= steps:
        raise SpecError(
            f"heal, distil and ridge_head leave no step of {steps}: raise the steps, or lower their"
            " share"
        )


def _fit_head(model: nn.Module, surroundings: Surroundings) -> None:
    wanted = surroundings.classes
    if wanted is not None and head_classes(model, surroundings.head) != wanted:
        _fresh_head(model, FreshHead(), _streamed(surroundings, "fitting head"))


def spent_at_most(preparation: Preparation, steps: int) -> int:
    """Return the steps a preparation may take of the budget: one at least, and one is left."""
    if not isinstance(preparation, Heal | Distil | RidgeHead):
        return 0
    return max(1, min(round(preparation.share * steps), steps - 1))


def _distil(model: nn.Module, preparation: Distil, surroundings: Surroundings) -> int:
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    # A student is a network of its own: what hangs on the publisher's stays with the teacher.
    drop_foreign_hooks(model)
    names = (*surroundings.names, "student")
    reinitialise(model, seed=surroundings.seed, names=names, bare=surroundings.bare)
    spent = _train(model, preparation, surroundings, teacher)
    for name in surroundings.factors:
        surroundings.factors[name] = 0.0
    return spent


def _train(
    model: nn.Module,
    preparation: Heal | Distil,
    surroundings: Surroundings,
    teacher: nn.Module | None,
) -> int:
    """Follow the course and return its steps."""
    if surroundings.train is None:
        raise SpecError(f"{preparation.kind} needs images of the original domain: give them")
    course = Course(
        steps=spent_at_most(preparation, surroundings.steps),
        learning_rate=preparation.learning_rate,
        teacher=teacher,
        seed=surroundings.seed,
        names=surroundings.names,
    )
    surroundings.train(model, course)
    return course.steps


def _streamed(surroundings: Surroundings, *names: str | int) -> Surroundings:
    return replace(surroundings, names=(*surroundings.names, *names))


def _forget(factors: Factors, prefix: str) -> None:
    for name in factors:
        if name.startswith(f"{prefix}."):
            factors[name] = 0.0


def _fresh_head(model: nn.Module, _: FreshHead, surroundings: Surroundings) -> None:
    head = surroundings.head
    classes = surroundings.classes or head_classes(model, head)
    replace_head(model, head, classes, seed=surroundings.seed, names=surroundings.names)
    for name in heads(model, head):
        _forget(surroundings.factors, name)


def _ridge_head(model: nn.Module, preparation: RidgeHead, surroundings: Surroundings) -> int:
    """Fit a fresh head; it stays as drawn where nothing can be fitted. Return the steps spent."""
    if surroundings.labelled is None:
        raise SpecError(
            "ridge_head needs labelled images of the restricted domain: give them, or leave it out"
        )
    _fresh_head(model, FreshHead(), surroundings)
    most = _PASSES_A_STEP * spent_at_most(preparation, surroundings.steps)
    seen: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in surroundings.labelled(most):  # type: ignore[misc]
            seen.append(len(images))
            yield images, labels
            if sum(seen) >= _MOST_IMAGES:
                return

    fit_head(model, surroundings.head, batches(), preparation.features)
    return max(1, math.ceil(len(seen) / _PASSES_A_STEP))


def _reset_last_blocks(
    model: nn.Module, preparation: ResetLastBlocks, surroundings: Surroundings
) -> None:
    found = blocks(model, surroundings.head)
    if preparation.blocks > len(found):
        raise SpecError(
            f"reset_last_blocks: blocks = {preparation.blocks}, and the model has {len(found)}; "
            f"choose 1 to {len(found)}"
        )
    _reset_blocks(model, found[-preparation.blocks :], surroundings)


def _keep_span(model: nn.Module, preparation: KeepSpan, surroundings: Surroundings) -> None:
    found = blocks(model, surroundings.head)
    if not found:
        raise SpecError("keep_span: the model has no blocks before its head; leave it out")
    start, end = preparation.kept_of(len(found))
    _reset_blocks(model, [*found[:start], *found[end:]], surroundings)


def _reset_blocks(
    model: nn.Module, chosen: list[tuple[str, ...]], surroundings: Surroundings
) -> None:
    for names in chosen:
        for name in names:
            stream = (*surroundings.names, name)
            reinitialise(
                model.get_submodule(name),
                seed=surroundings.seed,
                names=stream,
                bare=None if surroundings.bare is None else surroundings.bare.within(name),
            )
            _forget(surroundings.factors, name)


def _batch_norm(model: nn.Module, preparation: BatchNorm, surroundings: Surroundings) -> None:
    if preparation.mode == "reset":
        for name, part in model.named_modules():
            if isinstance(part, BatchNorms):
                part.reset_parameters()
                _forget(surroundings.factors, name)
    elif tracked_batch_norms(model):
        if surroundings.batches is None:
            raise SpecError("batch_norm: mode = 'reestimate' needs images of the restricted domain")
        if not reestimate_batch_norm(model, surroundings.batches(preparation.batches)):
            raise DataError("batch_norm: the restricted domain gave no batch to re-estimate from")


def _shrink_perturb(
    model: nn.Module, preparation: ShrinkPerturb, surroundings: Surroundings
) -> None:
    fresh = copy.deepcopy(model)
    reinitialise(fresh, seed=surroundings.seed, names=surroundings.names, bare=surroundings.bare)
    for name in shrink_towards(model, fresh, preparation.share):
        surroundings.factors[name] *= 1 - preparation.share


# Each returns the steps it spent, if any.
PREPARATIONS: dict[str, Callable[[nn.Module, Any, Surroundings], int | None]] = {
    "fresh_head": _fresh_head,
    "ridge_head": _ridge_head,
    "reset_last_blocks": _reset_last_blocks,
    "keep_span": _keep_span,
    "rescale_weights": lambda m, p, s: rescale_weights(m, p.norm, s.image_shape, s.factors),
    "balance_weights": lambda m, p, s: balance_weights(m, s.image_shape, s.factors),
    "batch_norm": _batch_norm,
    "noise_kick": lambda m, p, s: noise_kick(m, p, generator(s.seed, *s.names)),
    "shrink_perturb": _shrink_perturb,
    "densify": lambda m, p, s: densify(m, p, generator(s.seed, *s.names)),
    "scramble": lambda m, p, s: scramble(m, p, generator(s.seed, *s.names), s.factors),
    "heal": lambda m, p, s: _train(m, p, s, None),
    "distil": _distil,
}
