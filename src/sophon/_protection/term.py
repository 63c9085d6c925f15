"""What a term of a protection is: a keep term or a hindrance, with its specification.

A protection is a sum of terms. A *keep* term is a loss on original images, a *hindrance* a gradient
that makes restricted tasks harder. A new one is a file in `terms/`, an entry in `TERMS`, and, for
the generic tests, settings and an oracle (`docs/extend.md`); the engine knows none by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from sophon._records.metrics import KINDS
from sophon._records.statement import Rehearsed
from sophon._specs.base import Rate, Spec
from sophon._training.ranks import Ranks
from sophon._training.setting import Setting

State = tuple[dict[str, Tensor], dict[str, Any]]


class TermSpec(Spec):
    """A term's specification: its kind, and what it weighs in the sum."""

    kind: str
    weight: Rate = 1.0


@dataclass(frozen=True)
class Surroundings:
    """What terms are made with: where the run takes place, and the model as it was given.

    `given` has the run's device and layout, in eval mode; nobody changes it. `independent` says
    whether the rows of the model's batches are. `shared` is what terms have in common, by whatever
    determines it.
    """

    setting: Setting
    given: nn.Module
    seed: int
    ranks: Ranks = field(default_factory=Ranks)
    independent: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass
class Contribution:
    """What a hindrance gives to an update.

    `gradients` by name of the model's parameters (a name left out: zero), the same in every
    process; `loss` is what they are the gradient of, `score` how well restricted tasks still go
    (higher is better for the attacker), `readings` what a round's record keeps, all scalars.
    `labels` and `domains` name the attackers it comes from, if any, and `losses` their losses.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    score: Tensor
    readings: dict[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    losses: tuple[Tensor, ...] = ()


AnyTermSpec = TypeVar("AnyTermSpec", bound=TermSpec)


class Term(Generic[AnyTermSpec]):
    """What keep terms and hindrances share. `metrics` are those of the tasks that it fits."""

    spec_type: ClassVar[type[TermSpec]]
    metrics: ClassVar[tuple[str, ...]] = tuple(KINDS)
    turn_noun: ClassVar[str] = "turns"

    def __init__(self, spec: AnyTermSpec, around: Surroundings) -> None:
        self.spec = spec
        self.around = around

    @classmethod
    def check(cls, spec: AnyTermSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise SpecError, DataError or UnsupportedModelError unless it can be done as specified;
        nothing is trained.
        """

    def state(self) -> State:
        """Return what persists between rounds, as tensors by name and as plain values."""
        return {}, {}

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned, around the model as it now is."""

    @classmethod
    def turns(cls, spec: AnyTermSpec, updates: int) -> int:
        """Return how many turns restricted domains have in so many updates, together."""
        return updates

    @classmethod
    def rehearsed(cls, spec: AnyTermSpec) -> Rehearsed | None:
        """Return the attacks that it states to an audit to have rehearsed; None: none."""
        return None

    @classmethod
    def state_copies(cls, spec: AnyTermSpec) -> int:
        """Return how many times the model's size its state holds, at most."""
        return 0

    @classmethod
    def extent(cls, spec: AnyTermSpec) -> dict[str, int]:
        """Return what there may be any number of in an update, by name: `steps` of each of so many
        `strategies`, which spend a share of their `life` on preparations. A forecast measures few.
        """
        return {}

    @classmethod
    def shortened(cls, spec: AnyTermSpec, extent: dict[str, int]) -> AnyTermSpec:
        """Return the specification with so few of what `extent` counts."""
        return spec

    @classmethod
    def held_bytes(cls, spec: AnyTermSpec, weights: int) -> int:
        """Return what it holds between rounds, for a model of so many bytes, at most."""
        return 0

    def remarks(self) -> list[str]:
        """Return what the publisher should know before the first round, a line each."""
        return []

    def description(self, model: nn.Module) -> dict[str, Any]:
        """Return what the folder of a finished run says of it and of the protected model."""
        return {}


class Keep(Term[AnyTermSpec]):
    """A term that keeps the original task: a loss on the batch of original images that keep terms
    share, the mean over images, each on its own; or one on a batch of the term's own.
    """

    def loss(
        self, outputs: Tensor, targets: Tensor, images: Tensor, labels: Tensor, drawn: Tensor
    ) -> Tensor:
        """Return a scalar loss of the model's `outputs`, batch first; 0 of a term that has none.

        `drawn` is the state of the generator that the task drew from, before it did.
        """
        return 0 * outputs.sum()

    def besides(self, model: nn.Module, step: int, factor: float) -> Tensor | None:
        """Return the loss of a step on a batch of the term's own, the same in every process, after
        adding its gradient times `factor` to those of the parameters; None: there is none.
        """
        return None


class Hindrance(Term[AnyTermSpec]):
    """A term that makes restricted tasks harder to learn.

    `instead_of_two` says what to do instead of giving another of its kind, where two would draw the
    same batches and have the same readings; empty: there may be several.
    """

    instead_of_two: ClassVar[str] = ""

    def contribute(self, model: nn.Module) -> Contribution:
        """Return the gradient of one update. The model's weights and buffers stay as they are."""
        raise NotImplementedError

    def constrain(self, model: nn.Module) -> None:
        """Put weights that may not move back in place, after each step of `model` or its average.

        Such weights are those of the update that `contribute` last saw.
        """
