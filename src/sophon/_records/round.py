"""What happened while a model was trained: rounds of protection, stages of pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sophon._base.files import read_json
from sophon._records.audit_record import Measurement, Record

# What helps where no weights met the tolerance.
ANEW = "repeat with a larger one (protect.guard), or less hindrance, into a new --out"


class Stage(Record):
    """Some steps of pre-training: the mean loss over them, and the score after them."""

    step: int
    loss: float
    validation: Measurement
    wall_s: float


class Round(Record):
    """One round of protection. Losses and scores are means over the round's queries.

    `price` is the multiplier of the hindrances, `readings` what their terms measured by name.
    """

    index: int
    suppression_loss: float
    query_score: float
    original_loss: float | None
    suppression_gradient_norm: float
    reinforcement_gradient_norm: float | None
    strategies: tuple[str, ...]
    domains: tuple[str, ...]
    guard_score: float | None = None
    guard: Literal["met", "violated"] | None = None
    reinforcement_steps: int
    wall_s: float
    price: float | None = None
    readings: dict[str, float] = Field(default_factory=dict)


def without_weights(folder: Path) -> str:
    """Return what to say of a protection's folder whose rounds are done and none of whose weights
    met the guard's tolerance, or nothing. Raises CheckpointError where `run.json` is damaged.
    """
    log = folder / "rounds.jsonl"
    if (folder / "model.safetensors").is_file() or not log.is_file():
        return ""
    wanted = read_json(folder / "run.json").get("resolved", {}).get("rounds")
    held = log.read_bytes()
    if held.count(b"\n") != wanted or b'"guard":"met"' in held or b'"guard"' not in held:
        return ""
    done = f"finished, {wanted} of {wanted} rounds"
    return f"{folder}: a protection {done}; no weights met the tolerance"
