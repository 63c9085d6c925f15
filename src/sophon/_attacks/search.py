"""Search for the attack that a suite missed: Optuna over the same space for every subject.

It begins with what the suite's own attacks reached, as far as they lie in the space. Nothing is
stored here. The sampler is seeded and is told only results that are in the trial store, in the same
order, so an interrupted search that is repeated proposes the same strategies again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sophon._attacks.kinds import idle, spent_first
from sophon._base.errors import SpecError
from sophon._base.torchvision_patch import installing, library
from sophon._records.metrics import KINDS
from sophon._specs import (
    BatchNorm,
    FreshHead,
    Heal,
    NoiseKick,
    OptimizerName,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Strategy,
)

# The rates that are searched, by optimizer: three decades or more.
RATES: dict[OptimizerName, tuple[float, float]] = {
    "sgd": (1e-3, 3.0),
    "sgd_momentum": (1e-4, 1.0),
    "nesterov": (1e-4, 1.0),
    "adagrad": (1e-4, 1.0),
    "adadelta": (1e-2, 30.0),
    "adam": (1e-5, 3e-2),
    "adamw": (1e-5, 3e-2),
}
PREPARATIONS: dict[str, tuple[Preparation, ...]] = {
    "direct": (),
    "fresh head": (FreshHead(),),
    "fitted head": (RidgeHead(),),
    "last block": (ResetLastBlocks(), FreshHead()),
    "rescaled": (RescaleWeights(),),
    "rescaled, fresh head": (RescaleWeights(), FreshHead()),
    "batch norm reset": (BatchNorm(mode="reset"),),
    "batch norm measured": (BatchNorm(mode="reestimate"),),
    "noise": (NoiseKick(relative_std=0.1),),
    # Little enough to have steps of its own before a prefilter stops it.
    "healed": (Heal(share=0.1),),
    "healed, fresh head": (Heal(share=0.1), FreshHead()),
}
# What is trained.
METHODS: dict[str, dict[str, Any]] = {
    "all": {},
    "head": {"scope": "head"},
    "adapters": {"lora_rank": 8},
}
BATCH_SIZES = (32, 64, 128)
WEIGHT_DECAYS = (0.0, 1e-2)
SCHEDULES = ("constant", "cosine", "warmup_cosine")
CLIPS = (None, 1.0)
# How far beyond the usual rates a statement can widen the search: a rate that diverges wastes it.
_FURTHEST = 100.0
# Proposals made before their results are known: constant, so that workers change nothing.
AT_ONCE = 4


def starts(metric: str, steps: int, stop: int | None = None) -> dict[str, tuple[Preparation, ...]]:
    """Return the preparations that are searched: those that leave steps before `stop` or the end,
    and do something to models that `metric` scores.
    """
    end = steps if stop is None else min(stop, steps)
    return {
        name: held
        for name, held in PREPARATIONS.items()
        if spent_first(held, steps) < end and idle(held, metric) is None
    }


def rates(beyond: Iterable[Strategy] = ()) -> dict[OptimizerName, tuple[float, float]]:
    """Return the rates that are searched, by optimizer: to those of `beyond`, if they are higher.

    What a publisher states shifts no lower end, and the upper one by a hundred times at most.
    """
    widened = dict(RATES)
    for strategy in beyond:
        low, high = widened[strategy.optimizer]
        furthest = _FURTHEST * RATES[strategy.optimizer][1]
        widened[strategy.optimizer] = (low, max(high, min(furthest, strategy.learning_rate)))
    return widened


def search_space() -> dict[str, Any]:
    """Return the whole space as plain values, for a fingerprint."""
    return {
        "rates": {name: list(bounds) for name, bounds in RATES.items()},
        "widened at most": _FURTHEST,
        "starts": {
            name: [preparation.keyed() for preparation in held]
            for name, held in PREPARATIONS.items()
        },
        "methods": METHODS,
        "batch sizes": list(BATCH_SIZES),
        "weight decays": list(WEIGHT_DECAYS),
        "schedules": list(SCHEDULES),
        "clips": list(CLIPS),
        "at once": AT_ONCE,
        "begins with": "the suite's attacks that lie in the space",
    }


class AttackerSearch:
    """Propose strategies of `steps` steps and learn from what they reached; one per subject.

    `batch_size` is the audit's where it names one; otherwise batches up to `largest_batch` are
    searched. Rates go as far as those of `beyond`. Where proposals are stopped at step `stop`
    first, those whose training beforehand takes as long are left out. `metric` is the task's.
    """

    def __init__(
        self,
        seed: int,
        steps: int,
        largest_batch: int,
        *,
        batch_size: int | None = None,
        metric: str = "accuracy",
        beyond: Iterable[Strategy] = (),
        stop: int | None = None,
    ) -> None:
        self._optuna = require_optuna()
        self.steps = steps
        self.batch_sizes = [size for size in BATCH_SIZES if size <= largest_batch]
        self.batch_sizes = self.batch_sizes or [largest_batch]
        if batch_size is not None:
            self.batch_sizes = [min(batch_size, largest_batch)]
        self.rates = rates(beyond)
        self.starts = starts(metric, steps, stop)
        self.methods = [m for m in METHODS if m != "head" or KINDS[metric].probes]
        sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=AT_ONCE)
        self._study = self._optuna.create_study(sampler=sampler, direction="maximize")
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[Strategy]:
        """Return `count` strategies to try next."""
        self._asked = [self._study.ask() for _ in range(count)]
        return [self._strategy(trial) for trial in self._asked]

    def tell(self, values: list[float]) -> None:
        """Learn what the strategies asked for last reached, in their order; higher is better."""
        for trial, value in zip(self._asked, values, strict=True):
            self._study.tell(trial, value)

    def learn(self, strategy: Strategy, value: float) -> bool:
        """Learn what an attack of the suite reached; False, and nothing, if it lies outside."""
        choices = self._choices()
        optimizer = strategy.optimizer
        low, high = self.rates[optimizer]
        held = {
            "optimizer": optimizer,
            "start": _named(self.starts, strategy.preparations),
            "method": _named(
                {name: Strategy(optimizer=optimizer, **METHODS[name]) for name in self.methods},
                Strategy(optimizer=optimizer, scope=strategy.scope, lora_rank=strategy.lora_rank),
            ),
            "weight decay": strategy.weight_decay,
            "schedule": strategy.schedule,
            "clip": strategy.clip_norm,
            "batch size": strategy.batch_size,
        }
        position = math.log(strategy.learning_rate / low) / math.log(high / low)
        outside = any(held[name] not in choices[name] for name in choices)
        if outside or not 0.0 <= position <= 1.0 or strategy != self._made(held, position):
            return False
        categories = self._optuna.distributions.CategoricalDistribution
        distributions = {name: categories(chosen) for name, chosen in choices.items()}
        distributions["rate position"] = self._optuna.distributions.FloatDistribution(0.0, 1.0)
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params={**held, "rate position": position}, distributions=distributions, value=value
            )
        )
        return True

    def _choices(self) -> dict[str, list[Any]]:
        """Return what is chosen from, by name; beside it there is the rate."""
        return {
            "optimizer": list(RATES),
            "start": list(self.starts),
            "method": self.methods,
            "weight decay": list(WEIGHT_DECAYS),
            "schedule": list(SCHEDULES),
            "clip": list(CLIPS),
            "batch size": self.batch_sizes,
        }

    def _strategy(self, trial: Any) -> Strategy:
        # One position for all optimizers: what is learnt of one tells something of the others.
        position = trial.suggest_float("rate position", 0.0, 1.0)
        held = {
            name: trial.suggest_categorical(name, chosen)
            for name, chosen in self._choices().items()
        }
        return self._made(held, position)

    def _made(self, held: Mapping[str, Any], position: float) -> Strategy:
        low, high = self.rates[held["optimizer"]]
        return Strategy(
            optimizer=held["optimizer"],
            learning_rate=float(f"{low * (high / low) ** position:.4g}"),
            weight_decay=held["weight decay"],
            preparations=self.starts[held["start"]],
            schedule=held["schedule"],
            clip_norm=held["clip"],
            batch_size=held["batch size"],
            steps=self.steps,
            **METHODS[held["method"]],
        )


def _named(choices: Mapping[str, Any], wanted: Any) -> str | None:
    return next((name for name, held in choices.items() if held == wanted), None)


def require_optuna() -> Any:
    """Return Optuna. Raises SpecError where it cannot be imported."""
    remedy = f"{installing('search')}; or set audit.search_trials = 0"
    needed = f"a search needs it: {remedy}"
    optuna = library("optuna", "optuna cannot be imported", needed, SpecError)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
