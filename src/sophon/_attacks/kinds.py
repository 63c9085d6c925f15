"""What kind of attack a strategy is, for whatever treats some kinds otherwise than others."""

from __future__ import annotations

from sophon._records.metrics import KINDS
from sophon._specs import (
    Distil,
    FreshHead,
    Heal,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Strategy,
)


def method(strategy: Strategy) -> tuple[str, ...]:
    """Return the kinds of an attack's preparations, and whether it trains the head or adapters."""
    trained = "adapters" if strategy.lora_rank is not None else strategy.scope
    return (*(preparation.kind for preparation in strategy.preparations), trained)


def in_words(strategy: Strategy) -> str:
    """Return what an attack's name says, in words."""
    heads = {FreshHead: "a fresh head", RidgeHead: "a head fitted by ridge regression"}
    done = [heads.get(type(p), p.kind.replace("_", " ")) for p in strategy.preparations]
    start = f"the weights with {', then '.join(done)}" if done else "the weights as they are"
    trained = "low-rank adapters and the head" if strategy.lora_rank is not None else ""
    trained = trained or ("all layers" if strategy.scope == "all" else "the head alone")
    how = f"by {strategy.optimizer} at rate {strategy.learning_rate:.3g}"
    return f"starts from {start}; trains {trained} {how}"


def way(strategy: Strategy) -> tuple[object, ...]:
    """Return what attacks that differ by rate alone share: preparations, adapters, clipping."""
    return strategy.preparations, strategy.lora_rank, strategy.clip_norm


def optimizer_group(optimizer: str) -> str:
    """Return the optimizers that a rehearsal of one of them stands for: SGD's are alike."""
    return "sgd" if optimizer in ("sgd", "sgd_momentum", "nesterov") else optimizer


def without_rate(strategy: Strategy) -> str:
    """Return what an attack is, apart from its rate and how its steps are arranged."""
    kept = ("optimizer", "scope", "preparations", "lora_rank", "data_fraction")
    same = Strategy(**{name: getattr(strategy, name) for name in kept}, learning_rate=1.0)
    return same.label().replace(f" {strategy.optimizer} 1", f" {strategy.optimizer}", 1)


def in_batches_of(strategy: Strategy, size: int) -> Strategy:
    """Return the attack with this batch: a domain's images may have allowed no larger one."""
    return strategy.model_copy(update={"batch_size": size})


def fresh_head_only(strategy: Strategy) -> bool:
    """Return whether all that an attack does first is to begin with a fresh head."""
    return [type(p) for p in strategy.preparations] == [FreshHead]


def rescales(strategy: Strategy) -> bool:
    """Return whether an attack scales weights back before it trains."""
    return any(isinstance(p, RescaleWeights) for p in strategy.preparations)


def blocks_reset(strategy: Strategy) -> int:
    """Return how many of the last blocks an attack starts anew."""
    return sum(p.blocks for p in strategy.preparations if isinstance(p, ResetLastBlocks))


def trains_first(strategy: Strategy) -> bool:
    """Return whether an attack trains on the original task before it trains on its own."""
    return any(isinstance(p, Heal | Distil) for p in strategy.preparations)


def patient(strategy: Strategy) -> bool:
    """Return whether an attack pays off late by design, so that no prefilter may stop it."""
    return trains_first(strategy) or strategy.schedule != "constant"


def idle(preparations: tuple[Preparation, ...], metric: str) -> str | None:
    """Return why preparations can do nothing to models that `metric` scores; None: they can."""
    reasons = KINDS[metric].idle
    return next((reasons[p.kind] for p in preparations if p.kind in reasons), None)


def spent_first(preparations: tuple[Preparation, ...], steps: int) -> int:
    """Return about how many of the steps are spent on training beforehand."""
    courses = [p for p in preparations if isinstance(p, Heal | Distil | RidgeHead)]
    return sum(max(1, round(p.share * steps)) for p in courses)
