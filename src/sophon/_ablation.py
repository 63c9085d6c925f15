"""The study of what the paper ablates, as data: one small protection, one setting varied at a time.

Its tables are filled from stored records. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sophon._base.errors import CheckpointError
from sophon._judgement.summaries import DomainSummary
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord, Measurement
from sophon._records.round import Round
from sophon._reproduction import Triple, missing_of, origin_of, read_stored, scores_of
from sophon._sameness import settings_in
from sophon._specs import Strategy


@dataclass(frozen=True)
class Variation:
    """A value of one axis, and the settings (as `--set` takes them) that make it so.

    Without settings it is the study's base, which stands in every axis.
    """

    axis: str
    value: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.axis}-{self.value}".replace(" ", "-") if self.settings else BASE


BASE = "base"
NAME = "ablation"
_REHEARSAL = "protect.rehearsal"


def _axis(name: str, base: str, key: str, values: dict[str, object]) -> tuple[Variation, ...]:
    """Return an axis along one setting: `values` by label, the base's label among them."""
    return tuple(
        Variation(name, label, () if label == base else (f"{key}={json.dumps(value)}",))
        for label, value in values.items()
    )


def _numbers(name: str, base: str, key: str, *values: float) -> tuple[Variation, ...]:
    return _axis(name, base, key, {f"{value:g}": value for value in values})


# Attackers of one strategy alone, from the weights as they are.
_ONE = (
    f"{_REHEARSAL}.distribution={{ batch_sizes = [32], preparations = [[]],"
    " learning_rates = { sgd_momentum = [1e-3, 1e-3] } }"
)
AXES: dict[str, tuple[Variation, ...]] = {
    "loss": _axis(
        "loss",
        "klu",
        "protect.suppression",
        {name: name for name in ("klu", "ice", "reversed_logits", "negated_ce")},
    ),
    "alpha": _numbers("alpha", "0.0003", "protect.suppression_rate", 1e-4, 3e-4, 1e-3),
    "beta": _numbers("beta", "0.0005", "protect.reinforcement_rate", 1.5e-4, 5e-4, 1.5e-3),
    "K": _numbers("K", "5", f"{_REHEARSAL}.steps", 2, 5, 10),
    "N": _numbers("N", "1", f"{_REHEARSAL}.strategies", 1, 2, 4),
    "strategies": (Variation("strategies", "one", (_ONE,)), Variation("strategies", "sampled")),
    # How many attackers live side by side; each keeps its strategy for its life.
    "pool": _numbers("pool", "4", f"{_REHEARSAL}.pool", 2, 4, 8),
    "NTR steps": _numbers("NTR steps", "2", "protect.reinforcement_steps", 1, 2, 4),
    "tolerance": _numbers("tolerance", "3", "protect.guard.tolerance_points", 1, 3, 10),
}

_ORIGINAL = """\
[original]
source = "npz"
name = "cifar10"
path = "${SOPHON_DATA}/cifar10_jpeg.npz"
image_size = 16
"""
_RESTRICTED = """\
[[restricted]]
source = "npz"
name = "gtsrb"
path = "${SOPHON_DATA}/gtsrb10.npz"
image_size = 16
"""
BASE_FILE = f"""\
# The model of the ablation study: the small convolutional network on CIFAR-10 at 16x16.
#   sophon pretrain recipes/small/base-ablation.toml --out runs/bases/small-ablation
# Values are ours.

[model]
name = "small_convnet"

{_ORIGINAL}
[pretrain]
steps = 1500
batch_size = 128
learning_rate = 3e-3
warmup_steps = 100
augmentation = "flip_crop"
every = 500
"""


def run_file(bases: str) -> str:
    """Return the study's run file; `bases` is the folder of pre-trained models seen from there."""
    return f"""\
# The base of the ablation study; every other run of it changes one setting. Values are ours, but
# for the rates alpha and beta, which are the defaults: SOPHON, arXiv 2404.12699, read second-hand.
# Set SOPHON_DATA to the folder that holds the image sets, then
#   sophon reproduce ablation

[model]
name = "small_convnet"
weights = "{bases}/small-ablation/model.safetensors"

{_ORIGINAL}
{_RESTRICTED}
[protect]
suppression = "klu"
rounds = 200
original_batch_size = 64
reinforcement_steps = 2
checkpoint_every = 100

# Persistent attackers, prepared and trained in sampled ways.
[protect.rehearsal]
steps = 5
horizon = 80
pool = 4
query_batch_size = 32

[protect.rehearsal.distribution]
batch_sizes = [32]
preparations = [[], [{{ kind = "fresh_head" }}]]

[protect.rehearsal.distribution.learning_rates]
sgd_momentum = [1e-4, 1e-1]
adam = [1e-4, 1e-2]

[protect.guard]
tolerance_points = 3.0
every = 10

[audit]
suite = "quick-1"
steps = 100
batch_size = 32
seeds = [0, 1, 2]
"""


def variations() -> tuple[Variation, ...]:
    """Return what is run, the base first, nothing twice."""
    held = {v.name: v for values in AXES.values() for v in values}
    return tuple(sorted(held.values(), key=lambda v: v.name != BASE))


# --- Results ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run of the study came to: its rounds, and what the audit says of its domain.

    `mild` is what the suite's mild attack reaches on scratch, unprotected and protected, `seeds`
    how many attack seeds there are, `origin` where the numbers come from, `changes` the keys that
    the command set: with any it is not the study's.
    """

    rounds: tuple[Round, ...]
    summary: DomainSummary
    before: Measurement | None
    after: Measurement | None
    mild: Triple
    seeds: int
    origin: str
    changes: tuple[str, ...]

    @property
    def violations(self) -> int:
        """How often the guard sent the weights back."""
        return sum(held.guard == "violated" for held in self.rounds)


def results(folder: Path) -> dict[str, Result]:
    """Return the finished runs below the study's folder by name. Raises CheckpointError."""
    found = {}
    for variation in variations():
        record = read_stored(folder / variation.name / "audit" / "record.json")
        rounds = folder / variation.name / "protected" / "rounds.jsonl"
        if record is not None and rounds.is_file():
            found[variation.name] = _result(record, rounds)
    return found


def _result(record: AuditRecord, rounds: Path) -> Result:
    try:
        lines = rounds.read_text(encoding="utf-8").splitlines()
        held = tuple(Round.model_validate_json(line) for line in lines)
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{rounds} is damaged: delete its folder and repeat `sophon reproduce {NAME}`"
        ) from None
    scores = {subject.name: subject.original for subject in record.subjects}
    before, after = scores.get("unprotected"), scores.get("protected")
    mild = next((attack for attack in record.strategies if _is_mild(attack)), None)
    reached = (None,) * 3 if mild is None else scores_of(record, mild)
    return Result(
        held,
        summarise(record)[0],
        before,
        after,
        reached,
        len(record.seeds),
        origin_of(record),
        tuple(settings_in(record.command)),
    )


def _is_mild(attack: Strategy) -> bool:
    """Return whether it is the attack at whose kind protections are published: at a small rate,
    from the weights as they are.
    """
    found = (attack.optimizer, attack.learning_rate, attack.preparations, attack.scope)
    return found == ("sgd_momentum", 1e-3, (), "all")


def table(folder: Path, held: dict[str, Result]) -> str:
    """Return the Markdown table of the study and where its numbers come from; what was not run
    stays empty.
    """
    lines = [
        "| axis | value | original test, before and after | guard violations"
        " | mean query score, last tenth | SGD momentum 1e-3: scratch / unprotected / protected"
        " | best attack: scratch / unprotected / protected | advantage removed (95 %) | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for axis, values in AXES.items():
        for variation in values:
            label = variation.value + ("" if variation.settings else " (base)")
            cells = [axis, label, *_cells(held.get(variation.name))]
            missing = missing_of(folder / variation.name)
            if variation.name not in held and missing is not None:
                cells[-1] = missing
            lines.append("| " + " | ".join(cells) + " |")
    for origin, seeds in dict.fromkeys((one.origin, one.seeds) for one in held.values()):
        several = f"{seeds} attack seed{'' if seeds == 1 else 's'}, one protection seed"
        lines += ["", f"Measured: {origin}; {several}."]
    return "\n".join(lines) + "\n"


def _cells(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 7
    summary, kind = result.summary, result.summary.kind
    kept = [m for m in (result.before, result.after) if m is not None]
    best = [summary.subjects.get(name) for name in ("scratch", "unprotected", "protected")]
    tests = tuple(None if s is None or s.test is None else s.test.value for s in best)
    reached = (result.mild, tests)
    last = result.rounds[-max(1, len(result.rounds) // 10) :]
    query = sum(r.query_score for r in last) / len(last)
    value, interval = summary.advantage.value, summary.advantage.interval
    removed = summary.advantage.reason if value is None else f"{100 * value:z.0f} %"
    if value is not None and interval is not None:
        removed += f" ({100 * interval.low:z.0f} to {100 * interval.high:z.0f})"
    return [
        ", ".join(kind.show(m.value, 1) for m in kept),
        str(result.violations),
        kind.show(query, 1),
        *(" / ".join("?" if v is None else kind.show(v, 1) for v in three) for three in reached),
        removed,
        f"changed: {', '.join(result.changes)}" if result.changes else summary.text,
    ]
