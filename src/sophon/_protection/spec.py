"""What `protect` does: the terms that it sums up, how it updates, its guard."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from sophon._base.errors import SpecError
from sophon._protection.migration import migrated
from sophon._protection.term import Hindrance, Keep, TermSpec
from sophon._protection.terms import TERMS, parse_term
from sophon._specs.base import Augmentation, Count, Fraction, Positive, Precision, Rate, Seed, Spec
from sophon._specs.guard import Guard


class Alternate(Spec):
    """Two Adams over the same weights, as in the paper: so many steps on the hindrances, then so
    many on the keep terms. Hindrance gradients are clipped to `clip_norm`.
    """

    kind: Literal["alternate"] = "alternate"
    hindrance_steps: Positive = 1
    hindrance_rate: Rate = 3e-4
    keep_steps: Count = 1
    keep_rate: Rate = 5e-4
    clip_norm: Rate = 0.5


class Joint(Spec):
    """One Adam on keep + price x hindrance, one step a round.

    The rate falls by a cosine from `rate` to `final` times it; the summed gradient is clipped to
    `clip_norm`. What is checked and shipped is the exponential moving average of the weights with
    decay `average` (0: the weights themselves): at a rate at which erasure moves, a network is
    some points worse than it will be once the rate has fallen. With `pin_norms` the filters of
    layers that a normalisation follows keep the norms that they had: there growing weights are a
    fake defence. With `freeze_statistics` original batches run with BatchNorm's running statistics,
    which stay those given: what is trained is then what is shipped (None: where the run starts from
    the given weights).
    """

    kind: Literal["joint"] = "joint"
    rate: Rate = 1e-3
    final: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip_norm: Rate = 2.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.98
    pin_norms: bool = True
    freeze_statistics: bool | None = None


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _term(value: Any, role: type[Keep[Any]] | type[Hindrance[Any]]) -> TermSpec:
    try:
        return parse_term(value, role)
    except SpecError as error:
        # So that the fault gets the path of the term in the run file.
        raise ValueError(error) from None


Update = Annotated[Alternate | Joint, Field(discriminator="kind"), BeforeValidator(_named)]
KeepTerm = Annotated[SerializeAsAny[TermSpec], BeforeValidator(lambda value: _term(value, Keep))]
HindranceTerm = Annotated[
    SerializeAsAny[TermSpec], BeforeValidator(lambda value: _term(value, Hindrance))
]


class ProtectSpec(Spec):
    """Everything `protect` does beyond the model and the domains; see `docs/protect.md`.

    `keep` and `hinder` are the terms, `update` says how their sum is followed. What is None is
    `method`'s, and depends on the task and on the number of images (`presets.completed`):
    `"erasure"`, or `"sophon"`, the paper's. `start` is the weights to begin with: the model's own,
    `"shrunk"` towards a fresh network by the share `shrink`, or `"fresh"`.

    The flat keys of earlier versions (`suppression`, `rehearsal`, ...) are taken as the paper's
    method (`migration`).
    """

    seed: Seed = 0
    method: Literal["erasure", "sophon"] = "erasure"
    rounds: Positive | None = None
    keep: Annotated[tuple[KeepTerm, ...], Field(strict=False, min_length=1)] | None = None
    hinder: Annotated[tuple[HindranceTerm, ...], Field(strict=False, min_length=1)] | None = None
    update: Update | None = None
    guard: Guard | None = None
    start: Literal["given", "shrunk", "fresh"] = "given"
    shrink: Fraction | None = None
    original_batch_size: Positive | None = None
    original_augmentation: Augmentation | None = None
    checkpoint_every: Positive = 10
    precision: Precision = "auto"

    @model_validator(mode="before")
    @classmethod
    def _released(cls, data: Any) -> Any:
        return migrated(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, terms in (("keep", self.keep), ("hinder", self.hinder)):
            kinds = [term.kind for term in terms or ()]
            twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
            if twice and name == "keep":
                raise ValueError(f"keep has two terms of kind {twice[0]!r}: give their weight once")
            for kind in twice:
                remedy = getattr(TERMS[kind], "instead_of_two", "")
                if remedy:
                    raise ValueError(f"hinder has two terms of kind {kind!r}: give one; {remedy}")
        if (self.start == "shrunk") != (self.shrink is not None):
            raise ValueError("start = 'shrunk' and shrink belong together: give both or none")
        frozen = isinstance(self.update, Joint) and self.update.freeze_statistics
        if self.start == "fresh" and frozen:
            raise ValueError(
                "update.freeze_statistics: a fresh network has no statistics yet: leave it out, or"
                " use start = 'given' or 'shrunk'"
            )
        self.require_priced()
        return self

    def require_priced(self) -> None:
        """Raise ValueError for a price where the hindrances have steps of their own, and for none
        where they have not.
        """
        mode = None if self.guard is None else self.guard.mode
        if mode == "rollback" and isinstance(self.update, Joint):
            raise ValueError(
                "guard.mode = 'rollback' takes more keep steps after a violation, and update ="
                " 'joint' has one a round: use guard.mode = 'price' or update = 'alternate'"
            )
        if mode == "price" and isinstance(self.update, Alternate):
            raise ValueError(
                "guard.mode = 'price' has nothing to multiply: update = 'alternate' steps on the"
                " hindrances alone; use update = 'joint' or guard.mode = 'rollback'"
            )
