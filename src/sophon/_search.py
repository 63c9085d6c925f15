"""Search for the attack that a suite missed: Optuna over the same space for every subject.

Nothing is stored here. The sampler is seeded and is told only results that are in the trial store,
in the same order, so an interrupted search that is repeated proposes the same strategies again.
"""

from __future__ import annotations

import importlib
from typing import Any

from sophon._errors import SpecError
from sophon._specs import (
    BatchNorm,
    FreshHead,
    OptimizerName,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
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
    "last block": (ResetLastBlocks(), FreshHead()),
    "rescaled": (RescaleWeights(),),
    "batch norm": (BatchNorm(mode="reset"),),
}
BATCH_SIZES = (32, 64, 128)
SCHEDULES = ("constant", "cosine", "warmup_cosine")
CLIPS = (None, 1.0)
# Proposals made before their results are known: constant, so that workers change nothing.
AT_ONCE = 4


class AttackerSearch:
    """Propose strategies of `steps` steps and learn from what they reached; one per subject."""

    def __init__(self, seed: int, steps: int, largest_batch: int) -> None:
        self._optuna = _optuna()
        self.steps = steps
        self.batch_sizes = [size for size in BATCH_SIZES if size <= largest_batch]
        self.batch_sizes = self.batch_sizes or [largest_batch]
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

    def _strategy(self, trial: Any) -> Strategy:
        optimizer = trial.suggest_categorical("optimizer", list(RATES))
        low, high = RATES[optimizer]
        # One position for all optimizers: what is learnt of one tells something of the others.
        position = trial.suggest_float("rate position", 0.0, 1.0)
        preparations = PREPARATIONS[trial.suggest_categorical("start", list(PREPARATIONS))]
        return Strategy(
            optimizer=optimizer,
            learning_rate=float(f"{low * (high / low) ** position:.4g}"),
            preparations=preparations,
            schedule=trial.suggest_categorical("schedule", list(SCHEDULES)),
            clip_norm=trial.suggest_categorical("clip", list(CLIPS)),
            batch_size=trial.suggest_categorical("batch size", self.batch_sizes),
            steps=self.steps,
        )


def require_optuna() -> None:
    """Raise SpecError unless Optuna can be imported."""
    _optuna()


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise SpecError(
            f"optuna cannot be imported ({error}): a search needs it: pip install"
            " 'sophon-protect[search]', or set audit.search_trials = 0"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
