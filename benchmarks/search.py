r"""Does `standard-1` find what a full grid finds, at a third of its steps?

    SMALL_NETWORK=$PWD/runs/small_convnet_cifar10_16.safetensors \
      python benchmarks/search.py --store runs/small16

The small network at 16x16, unprotected, on ten CIFAR-100 classes: for each of three seeds
the envelope of `standard-1` is held against that of 200 plain strategies, at every budget. The
images are in the folder `$SOPHON_DATA`; the weights are those of `small_network.py`. About
twenty minutes a seed on one core; with `--store` it goes on where it was stopped, and takes
the trials of audits by `recipes/small16-sampled.toml` that are there, as of those whose records
`--record` names.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sophon._attacks import depth_attacks, resolved, strategies_of
from sophon._circumstances import environment
from sophon._data import Domain
from sophon._executors import Job, Processes, Workload
from sophon._models import network_identity, weights_sha256
from sophon._plan import Plan
from sophon._records import AuditRecord, Trial
from sophon._runs import load
from sophon._setting import make_setting
from sophon._specs import AuditSpec, FreshHead, OptimizerName, Strategy, Subject
from sophon._statistics import area, envelope
from sophon._store import TrialStore
from sophon._trials import Assignment, Bench, Start
from sophon._vitals import block_count

STEPS = 200
RECIPE = Path(__file__).parents[1] / "recipes/small16-sampled.toml"
SUBJECT: Subject = "unprotected"
# Ten rates for each optimizer, half a decade apart and less.
RATES: dict[OptimizerName, tuple[float, float]] = {
    "sgd": (1e-3, 3.0),
    "sgd_momentum": (1e-4, 1.0),
    "adagrad": (1e-4, 1.0),
    "adam": (1e-5, 3e-2),
    "adamw": (1e-5, 3e-2),
}


def grid() -> list[Strategy]:
    """Return 200 plain strategies: optimizers, rates, the head kept or fresh, batch sizes."""
    return [
        Strategy(
            optimizer=optimizer,
            learning_rate=float(f"{rate:.4g}"),
            preparations=preparations,
            batch_size=batch_size,
            steps=STEPS,
        )
        for optimizer, (low, high) in RATES.items()
        for rate in np.geomspace(low, high, 10).tolist()
        for preparations in ((), (FreshHead(),))
        for batch_size in (32, 128)
    ]


class Runner:
    """Runs assignments on the unprotected model in worker processes, and keeps their trials."""

    def __init__(self, store: Path | None, workers: int) -> None:
        case = load(RECIPE, None, None)
        self.domain: Domain = case.restricted[0]
        self.setting = make_setting(
            case.model,
            task=case.task,
            original=case.original,
            restricted=case.restricted,
            head=case.network.head,
            precision=case.spec.audit.precision,
            device=None,
        )
        self.blocks = block_count(case.model, self.setting.head)
        self.bench = Bench(self.setting, AuditSpec().evaluations)
        self.start = Start(case.model, network_identity(case.model), weights_sha256(case.model))
        workload = Workload(self.bench, {self.domain.name: self.domain}, {(SUBJECT, 0): self.start})
        self.executor = Processes(workload, workers)
        self.store = TrialStore(None if store is None else store / "trials")

    def run(self, assignments: Sequence[Assignment]) -> Iterator[Trial]:
        """Yield the trials of the assignments, in order."""
        found = [self.store.get(self.bench.key(a, self.start)) for a in assignments]
        jobs = [
            Job(a.subject, a.domain.name, a.strategy, a.seed, a.stop)
            for a, held in zip(assignments, found, strict=True)
            if held is None
        ]
        fresh = self.executor.run(jobs)
        for held in found:
            trial = held or next(fresh)
            self.store.put(trial)
            yield trial


def standard(runner: Runner, seed: int) -> list[Trial]:
    """Return the trials of `standard-1` with one seed."""
    spec = resolved(AuditSpec(suite="standard-1", steps=STEPS, seeds=(seed,)))
    plan = Plan(
        spec=spec,
        subjects=(SUBJECT,),
        restricted=(runner.domain,),
        secondary=(),
        strategies=strategies_of(spec),
        whole=depth_attacks(runner.blocks, spec),
    )
    met: set[str] = set()
    for stage in plan.stages():
        for trial in runner.run(stage):
            if trial.key not in met:
                met.add(trial.key)
                plan.trials.append(trial)
    return plan.trials


def steps_of(trials: Sequence[Trial]) -> int:
    """Return the optimizer steps that trials took; what a preparation spent counts."""
    stopped = [
        t.outcome.step if t.outcome.kind in ("stopped", "diverged") else None for t in trials
    ]
    return sum(STEPS if step is None else step for step in stopped)


def known(file: Path) -> tuple[Trial, ...]:
    """Return the trials of an audit's record, which may be compressed."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return AuditRecord.model_validate_json(text).trials


def main() -> None:
    """Print one line a seed, and where it was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--record", type=Path, action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    runner = Runner(chosen.store, chosen.workers)
    for file in chosen.record:
        for trial in known(file):
            runner.store.put(trial)
    where = environment(runner.setting.device, runner.setting.precision)
    print(f"{where.processor}, {where.precision}, {datetime.date.today()}, {where.versions}")
    print("seed  steps of standard-1 / grid  envelope: worst shortfall, at the horizon, area")
    for seed in chosen.seeds:
        ours = standard(runner, seed)
        plain = list(runner.run([Assignment(SUBJECT, runner.domain, s, seed) for s in grid()]))
        at = sorted({p.step for t in plain for p in t.curve if p.step > 0})
        one, other = (np.array([p.value for p in envelope(t, at)]) for t in (ours, plain))
        short = 100 * (other - one)
        areas = 100 * (area(at, other) - area(at, one))
        taken, whole = steps_of(ours), steps_of(plain)
        print(
            f"{seed:4}  {taken} / {whole} = {taken / whole:.2f}"
            f"  {short.max():+.1f} points (at {at[int(short.argmax())]} steps), {short[-1]:+.1f},"
            f" {areas:+.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
