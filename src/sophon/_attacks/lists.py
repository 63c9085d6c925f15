"""The attacks of the released suites: data, which never changes once it is released."""

from __future__ import annotations

from typing import Any

from sophon._specs import (
    BalanceWeights,
    BatchNorm,
    Densify,
    Distil,
    FreshHead,
    Heal,
    KeepSpan,
    NoiseKick,
    OptimizerName,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Scramble,
    ShrinkPerturb,
    Strategy,
)

FRESH: tuple[Preparation, ...] = (FreshHead(),)
FITTED: tuple[Preparation, ...] = (RidgeHead(),)
# Shares of the images that an attacker may have, evenly spread over their logarithm.
DATA_SIZES = (0.01, 0.0316, 0.1, 0.316)


def at_rates(
    optimizer: OptimizerName,
    rates: tuple[float, ...],
    preparations: tuple[Preparation, ...] = (),
    **fields: Any,
) -> tuple[Strategy, ...]:
    """Return one attack a rate."""
    return tuple(
        Strategy(optimizer=optimizer, learning_rate=rate, preparations=preparations, **fields)
        for rate in rates
    )


# Twelve trials: the paper's three methods, SGD with momentum over three decades, Adam over two.
QUICK_1: tuple[Strategy, ...] = (
    *at_rates("sgd_momentum", (1e-4, 1e-3, 1e-2, 1e-1)),
    *at_rates("adam", (1e-4, 1e-3, 1e-2)),
    *at_rates("sgd_momentum", (1e-2, 1e-1), FRESH),
    *at_rates("adam", (1e-3,), FRESH),
    Strategy(optimizer="sgd_momentum", learning_rate=1e-1, preparations=FRESH, scope="head"),
    Strategy(optimizer="adam", learning_rate=1e-2, preparations=FRESH, scope="head"),
)

# Few attacks that reach what `standard-1` reached on every record (`benchmarks/quick.py`), the
# usual ones, and what is known to do best after erasure.
QUICK_2: tuple[Strategy, ...] = (
    *at_rates("sgd_momentum", (1e-2,)),
    *at_rates("adam", (1e-3, 1e-2)),
    *at_rates("adam", (3e-3,), batch_size=512),
    *at_rates("adam", (1e-2,), (BatchNorm(mode="reestimate"),)),
    *at_rates("sgd_momentum", (1e-1,), FRESH),
    *at_rates("adam", (1e-2,), FRESH, scope="head"),
    *at_rates("adam", (3e-3, 1e-2), FRESH, batch_size=128),
    *at_rates("adam", (1e-2,), FRESH, batch_size=256),
    *at_rates("adam", (1e-3, 3e-3, 1e-2), FITTED, batch_size=128),
    *at_rates("adagrad", (1e-2,), FITTED, batch_size=128),
    *at_rates("adam", (3e-3,), (RescaleWeights(), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (ResetLastBlocks(blocks=1), RidgeHead()), batch_size=128),
)

# Six of `quick-2`, a method each: for a first look where there is no time for more.
LOOK_1: tuple[Strategy, ...] = (
    *at_rates("sgd_momentum", (1e-2,)),
    *at_rates("adam", (1e-3,)),
    *at_rates("adam", (1e-2,), FRESH, scope="head"),
    *at_rates("adam", (3e-3,), FRESH, batch_size=128),
    *at_rates("adam", (1e-3,), FITTED, batch_size=128),
    *at_rates("adam", (3e-3,), (RescaleWeights(), RidgeHead()), batch_size=128),
)

# The protocol's table, axis by axis.
STANDARD_1: tuple[Strategy, ...] = (
    # Every optimizer over three decades, from the weights as they are (direct-all).
    *at_rates("sgd", (1e-3, 1e-2, 1e-1, 1.0)),
    *at_rates("sgd_momentum", (1e-4, 1e-3, 1e-2, 1e-1)),
    *at_rates("nesterov", (1e-4, 1e-3, 1e-2, 1e-1)),
    *at_rates("adagrad", (1e-4, 1e-3, 1e-2, 1e-1)),
    *at_rates("adadelta", (1e-2, 1e-1, 1.0, 10.0)),
    *at_rates("adam", (1e-5, 1e-4, 1e-3, 1e-2)),
    *at_rates("adamw", (1e-5, 1e-4, 1e-3, 1e-2), weight_decay=1e-2),
    # A fresh head, then all weights (init-FC + all) or the head alone (init-FC + FC only).
    *at_rates("sgd_momentum", (1e-3, 1e-2, 1e-1), FRESH),
    *at_rates("adam", (1e-4, 1e-3, 1e-2), FRESH),
    *at_rates("adagrad", (1e-2, 1e-1), FRESH),
    *at_rates("sgd_momentum", (1e-2, 1e-1), FRESH, scope="head"),
    *at_rates("adam", (1e-3, 1e-2, 1e-1), FRESH, scope="head"),
    # A head fitted in closed form, then all weights or the head alone.
    *at_rates("adam", (1e-3, 3e-3, 1e-2), FITTED, batch_size=128),
    *at_rates("adam", (1e-3,), FITTED),
    *at_rates("adagrad", (1e-2,), FITTED, batch_size=128),
    *at_rates("sgd_momentum", (1e-2, 1e-1), FITTED),
    *at_rates("adam", (1e-3,), FITTED, scope="head"),
    *at_rates("adam", (3e-3,), (RescaleWeights(), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (ResetLastBlocks(blocks=1), RidgeHead()), batch_size=128),
    # The last blocks anew.
    *at_rates("adam", (1e-3,), (ResetLastBlocks(blocks=1), FreshHead())),
    *at_rates("sgd_momentum", (1e-1,), (ResetLastBlocks(blocks=1), FreshHead())),
    # Schedules.
    *at_rates("sgd_momentum", (1e-1, 3e-1), schedule="warmup_cosine"),
    *at_rates("adam", (3e-3, 1e-2), schedule="warmup_cosine"),
    # Batch sizes, as far as there are images.
    *at_rates("adam", (1e-3, 1e-2), batch_size=32),
    *at_rates("adam", (1e-3, 3e-3, 1e-2), batch_size=128),
    *at_rates("sgd_momentum", (1e-2, 1e-1), batch_size=128),
    *at_rates("adam", (3e-3,), batch_size=512),
    *at_rates("sgd_momentum", (1e-2, 1e-1), FRESH, batch_size=128),
    *at_rates("adam", (3e-3, 1e-2), FRESH, batch_size=128),
    # Few images: one in a hundred, one in ten.
    *at_rates("adam", (1e-3,), data_fraction=0.01),
    *at_rates("sgd_momentum", (1e-2,), data_fraction=0.01),
    *at_rates("adam", (1e-3,), data_fraction=0.1),
    *at_rates("sgd_momentum", (1e-2,), data_fraction=0.1),
    # Adapters.
    *at_rates("adam", (1e-3, 1e-2), lora_rank=4),
    *at_rates("adam", (1e-3, 1e-2), lora_rank=16),
    # Undoing what a defence may have done to the weights.
    *at_rates("adam", (1e-3, 1e-2), (BatchNorm(mode="reestimate"),)),
    *at_rates("adam", (1e-3, 1e-2), (BatchNorm(mode="reset"),)),
    *at_rates("adam", (1e-3, 1e-2), (RescaleWeights(),)),
    *at_rates("sgd_momentum", (1e-2, 1e-1), (RescaleWeights(),)),
    *at_rates("adam", (1e-3,), (NoiseKick(relative_std=0.1),)),
    *at_rates("sgd_momentum", (1e-1, 1.0), clip_norm=1.0),
    # Through the original task: heal first, hardly anything else (retain only), a student.
    *at_rates("adam", (1e-3,), (Heal(share=0.25),)),
    *at_rates("sgd_momentum", (1e-2,), (Heal(share=0.25), FreshHead())),
    *at_rates("adam", (1e-2,), (Heal(share=0.75), FreshHead()), scope="head"),
    *at_rates("adam", (1e-3,), (Distil(share=0.5), FreshHead())),
)

# What `standard-1` led with on any stored record (`benchmarks/leaders.py`), and what that record
# lacks: attacks that the literature names and that erasure provokes.
STANDARD_2: tuple[Strategy, ...] = (
    # From the weights as they are.
    *at_rates("sgd_momentum", (1e-4, 1e-3, 1e-2, 1e-1)),
    *at_rates("adagrad", (1e-2,)),
    *at_rates("adam", (1e-4, 1e-3, 1e-2)),
    *at_rates("adam", (1e-3, 1e-2), batch_size=32),
    *at_rates("adam", (3e-3, 1e-2), batch_size=128),
    *at_rates("sgd_momentum", (1e-1,), batch_size=128),
    *at_rates("adam", (3e-3,), batch_size=512),
    *at_rates("adam", (1e-2,), schedule="warmup_cosine"),
    *at_rates("sgd_momentum", (1e-1,), clip_norm=1.0),
    # A fresh head.
    *at_rates("sgd_momentum", (1e-2, 1e-1), FRESH),
    *at_rates("sgd_momentum", (1e-1,), FRESH, batch_size=128),
    *at_rates("adagrad", (1e-2,), FRESH),
    *at_rates("adam", (1e-3, 3e-3, 1e-2), FRESH),
    *at_rates("adam", (3e-3, 1e-2), FRESH, batch_size=128),
    *at_rates("adam", (1e-2,), FRESH, batch_size=256),
    *at_rates("sgd_momentum", (1e-1,), FRESH, scope="head"),
    *at_rates("adam", (1e-2,), FRESH, scope="head"),
    # A fitted head; also to features whose scales mislead a plain fit.
    *at_rates("adam", (1e-3, 3e-3, 1e-2), FITTED, batch_size=128),
    *at_rates("adam", (1e-3,), FITTED),
    *at_rates("adagrad", (1e-2,), FITTED, batch_size=128),
    *at_rates("sgd_momentum", (1e-1,), FITTED),
    *at_rates("adam", (3e-3,), (RidgeHead(features="whitened"),), batch_size=128),
    *at_rates("adam", (3e-3,), (RidgeHead(features="robust"),), batch_size=128),
    # Some of the blocks: the last one anew, the first ones kept, a span behind a new stem.
    *at_rates("adam", (1e-3,), (ResetLastBlocks(blocks=1), FreshHead())),
    *at_rates("sgd_momentum", (1e-1,), (ResetLastBlocks(blocks=1), FreshHead())),
    *at_rates("adam", (3e-3,), (ResetLastBlocks(blocks=1), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(end=0.25), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(end=0.5), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(end=0.75), RidgeHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(start=0.25), FreshHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(start=0.5), FreshHead()), batch_size=128),
    *at_rates("adam", (3e-3,), (KeepSpan(start=0.25, end=0.75), FreshHead()), batch_size=128),
    # Undoing what a defence may have done to the weights.
    *at_rates("adam", (1e-2,), (BatchNorm(mode="reestimate"),)),
    *at_rates("adam", (1e-2,), (RescaleWeights(),)),
    *at_rates("sgd_momentum", (1e-2,), (RescaleWeights(),)),
    *at_rates("adam", (3e-3,), (RescaleWeights(), RidgeHead()), batch_size=128),
    *at_rates("adam", (1e-2,), (BalanceWeights(),)),
    *at_rates("adam", (3e-3,), (BalanceWeights(), RidgeHead()), batch_size=128),
    *at_rates("adam", (1e-2,), (Densify(), FreshHead()), batch_size=128),
    *at_rates("adam", (1e-2,), (ShrinkPerturb(), FreshHead()), batch_size=128),
    *at_rates("adam", (1e-2,), (NoiseKick(relative_std=0.1, rank=1), FreshHead()), batch_size=128),
    # Adapters.
    *at_rates("adam", (1e-2,), lora_rank=1),
    *at_rates("adam", (1e-2,), lora_rank=16),
    # No feature at all: what scales of weights alone are worth.
    *at_rates("adam", (1e-2,), (Scramble(mode="permute"), FreshHead()), batch_size=128),
    *at_rates("adam", (1e-2,), (Scramble(mode="match"), FreshHead()), batch_size=128),
    # Few images, half a decade apart; all of them are above.
    *(s for f in DATA_SIZES for s in at_rates("adam", (1e-3,), FITTED, data_fraction=f)),
)

# Held-out and benign domains: as `quick-1`, and fresh and fitted heads with large batches. Without
# these the unprotected network's lead over a fresh one is small there, and nothing can be told.
SECONDARY_1: tuple[Strategy, ...] = (
    *QUICK_1,
    *at_rates("adam", (3e-3, 1e-2), FRESH, batch_size=128),
    *at_rates("adam", (1e-3, 3e-3, 1e-2), FITTED, batch_size=128),
    *at_rates("adagrad", (1e-2,), FITTED, batch_size=128),
)
