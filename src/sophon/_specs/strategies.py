"""How an attacker fine-tunes: what it does to the weights first, and how it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sophon._specs.base import (
    Augmentation,
    Count,
    Fraction,
    NonNegative,
    OptimizerName,
    Positive,
    Precision,
    Rate,
    ScheduleName,
    Spec,
)

FeatureScaling = Literal["plain", "whitened", "robust"]

# --- Preparations: what an attacker does to the copied weights before the first step -----------


class FreshHead(Spec):
    """Replace the classifier head by a freshly initialised one (the paper's init-FC)."""

    released: ClassVar = frozenset({"kind"})
    kind: Literal["fresh_head"] = "fresh_head"


class RidgeHead(Spec):
    """Fit a new head in closed form to images of the attacker's, before the first step: linear
    probing, then fine-tuning (arXiv 2202.10054).

    Images are passed forward once, which counts as a third of a step a batch, for at most `share`
    of the steps. `features`: as they are, decorrelated at unit variance (`whitened`), or each by
    its quartiles and clipped at three of them (`robust`); the head takes them as they are.
    """

    released: ClassVar = frozenset({"kind", "share"})
    kind: Literal["ridge_head"] = "ridge_head"
    share: Fraction = 0.05
    features: FeatureScaling = "plain"


class ResetLastBlocks(Spec):
    """Re-initialise the last `blocks` blocks before the head (the head is left to FreshHead)."""

    released: ClassVar = frozenset({"kind", "blocks"})
    kind: Literal["reset_last_blocks"] = "reset_last_blocks"
    blocks: Positive = 1


class KeepSpan(Spec):
    """Keep the blocks between two shares of the depth, `start` and `end`, and re-initialise the
    others: at least one is kept (arXiv 1411.1792).
    """

    released: ClassVar = frozenset({"kind", "start", "end"})
    kind: Literal["keep_span"] = "keep_span"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start = {self.start:g} must be below end = {self.end:g}")
        return self

    def kept_of(self, blocks: int) -> tuple[int, int]:
        """Return the first of so many blocks that is kept, and the first after it that is not."""
        start = min(math.ceil(self.start * blocks), blocks - 1)
        return start, max(math.floor(self.end * blocks), start + 1)


class RescaleWeights(Spec):
    """Scale weights to `norm`, a root mean square over filters, where the function allows it.

    It does where a normalisation follows the layer, and where the next layer can take the inverse
    (ReLU and pooling between them). The function is preserved; the size of a step relative to
    the weights is not.
    """

    released: ClassVar = frozenset({"kind", "norm"})
    kind: Literal["rescale_weights"] = "rescale_weights"
    norm: Rate = 1.0


class BalanceWeights(Spec):
    """Give each channel between two layers filters of one norm on both sides (arXiv 1906.04721),
    where the function allows it: outputs on probe images move by a thousandth at most.
    """

    released: ClassVar = frozenset({"kind"})
    kind: Literal["balance_weights"] = "balance_weights"


class BatchNorm(Spec):
    """Put BatchNorm back: `reset` re-initialises it, `reestimate` measures its statistics anew."""

    released: ClassVar = frozenset({"kind", "mode", "batches"})
    kind: Literal["batch_norm"] = "batch_norm"
    mode: Literal["reset", "reestimate"] = "reestimate"
    batches: Annotated[int, Field(ge=1, le=10_000)] = 10


class NoiseKick(Spec):
    """Add Gaussian noise with `relative_std` times each weight tensor's root mean square; with
    `rank` that of a random adapter of this rank, to matrices and filters alone.
    """

    released: ClassVar = frozenset({"kind", "relative_std"})
    kind: Literal["noise_kick"] = "noise_kick"
    relative_std: Rate = 0.02
    rank: Positive | None = None


class ShrinkPerturb(Spec):
    """Mix matrices and filters with fresh ones of the same norm, which get `share`: shrink and
    perturb (arXiv 1910.08475).
    """

    released: ClassVar = frozenset({"kind", "share"})
    kind: Literal["shrink_perturb"] = "shrink_perturb"
    share: Fraction = 0.5


class Densify(Spec):
    """Draw the zeros of matrices and filters anew, at `relative_std` times the root mean square of
    the other weights: a mask is gone. A tensor without zeros, or of nothing else, stays.
    """

    released: ClassVar = frozenset({"kind", "relative_std"})
    kind: Literal["densify"] = "densify"
    relative_std: Rate = 0.1


class Scramble(Spec):
    """Keep of matrices and filters what is no feature: their values in another order (`permute`),
    or Gaussian ones of their mean and standard deviation (`match`).
    """

    released: ClassVar = frozenset({"kind", "mode"})
    kind: Literal["scramble"] = "scramble"
    mode: Literal["permute", "match"] = "permute"


class Heal(Spec):
    """Train on the original domain first, with Adam, for `share` of the steps.

    What protection spoilt may be mended before the restricted task is taken up.
    """

    released: ClassVar = frozenset({"kind", "share", "learning_rate"})
    kind: Literal["heal"] = "heal"
    share: Fraction = 0.25
    learning_rate: Rate = 1e-3


class Distil(Spec):
    """Teach a fresh network the model's outputs on original images, for `share` of the steps.

    What only makes the weights hard to train stays behind (arXiv 1503.02531; temperature 4, Adam).
    """

    released: ClassVar = frozenset({"kind", "share", "learning_rate"})
    kind: Literal["distil"] = "distil"
    share: Fraction = 0.5
    learning_rate: Rate = 3e-3


Preparation = Annotated[
    FreshHead
    | RidgeHead
    | ResetLastBlocks
    | KeepSpan
    | RescaleWeights
    | BalanceWeights
    | BatchNorm
    | NoiseKick
    | ShrinkPerturb
    | Densify
    | Scramble
    | Heal
    | Distil,
    Field(discriminator="kind"),
]
Preparations = Annotated[tuple[Preparation, ...], Field(strict=False)]


def require_ordered(preparations: tuple[Preparation, ...]) -> None:
    """Raise ValueError for an order or shares of preparations that no attacker can follow."""
    training = [p for p in preparations if isinstance(p, Heal | Distil)]
    if tuple(training) != preparations[: len(training)]:
        raise ValueError("heal and distil train the original task: list them first")
    fitted = [p for p in preparations if isinstance(p, RidgeHead)]
    if fitted and fitted != [preparations[-1]]:
        raise ValueError("ridge_head fits the head to all that comes before: list it last")
    if sum(p.share for p in (*training, *fitted)) >= 1:
        raise ValueError(
            "the shares of heal, distil and ridge_head must leave steps: below 1 in all"
        )


class Strategy(Spec):
    """How an attacker fine-tunes: preparations, scope, optimizer, schedule, batches, steps.

    `lora_rank` trains low-rank adapters and the head instead of all weights; `data_fraction` is
    the share of the training images that the attacker has, every class among them.

    The paper's three methods are `preparations = ()` (direct-all), `(FreshHead(),)` with
    `scope = "all"` (init-FC + all) and with `scope = "head"` (init-FC + FC only).
    """

    # A field that is added later is not added here: the keys of stored trials stay what they are.
    released: ClassVar = frozenset(
        [
            *("preparations", "scope", "optimizer", "learning_rate", "momentum", "weight_decay"),
            *("schedule", "warmup_steps", "clip_norm", "batch_size", "steps", "augmentation"),
            *("precision", "lora_rank", "data_fraction"),
        ]
    )
    preparations: Preparations = ()
    scope: Literal["all", "head"] = "all"
    optimizer: OptimizerName = "sgd_momentum"
    learning_rate: Rate = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    schedule: ScheduleName = "constant"
    warmup_steps: Count = 0
    clip_norm: Rate | None = None
    batch_size: Positive = 64
    steps: Positive = 200
    augmentation: Augmentation = "none"
    precision: Precision = "auto"
    lora_rank: Positive | None = None
    data_fraction: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.optimizer == "nesterov" and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        require_ordered(self.preparations)
        if self.lora_rank is not None and self.scope == "head":
            raise ValueError("lora_rank adapts the layers before the head: use scope = 'all'")
        return self

    def label(self, shared: frozenset[str] = frozenset()) -> str:
        """Return a name that tells this strategy from others of one budget, such as
        `init-FC-all sgd_momentum 0.01 (clip norm 1.0)`. Fields in `shared` are left out.
        """
        kinds = [preparation.kind for preparation in self.preparations]
        start = "init-FC" if {"fresh_head", "ridge_head"} & set(kinds) else "direct"
        scope = "FC-only" if self.scope == "head" else "all"
        extra = "".join(
            f" +{p.kind}{_changed(p, 'kind')}" for p in self.preparations if p.kind != "fresh_head"
        )
        usual = ("preparations", "scope", "optimizer", "learning_rate", "steps")
        rest = _changed(self, *usual, *shared)
        return f"{start}-{scope}{extra} {self.optimizer} {self.learning_rate:.3g}{rest}"


def shared_fields(strategies: Iterable[Strategy]) -> frozenset[str]:
    """Return the fields in which the strategies are all alike: a table need not repeat them."""
    held = set(strategies)
    names = Strategy.model_fields
    return frozenset(n for n in names if len({getattr(s, n) for s in held}) == 1)


def _changed(spec: Spec, *but: str) -> str:
    """Return the fields that differ from their defaults, such as ` (blocks 2)`."""
    parts = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name not in but and value != field.default:
            parts.append(f"{name.replace('_', ' ')} {value}")
    return f" ({', '.join(parts)})" if parts else ""
