r"""Does `standard-1` find what a full grid finds, at a third of its steps?

    SMALL_NETWORK=$PWD/runs/small_convnet_cifar10_16.safetensors \
      python benchmarks/search.py --store runs/small16

The small network at 16x16, unprotected, on ten CIFAR-100 classes: for each of three seeds
the envelope of `standard-1` is held against that of 200 plain strategies, at every budget. With
`--weights`, files or folders such as `docs/results/weights/small16-sampled`, the same is asked of
these protected networks instead. The plan is that of one subject: an audit lets the survivors and
leaders of three go on, on each of them, and takes more steps. A row is a miss where the grid is
ahead by more than a point within some budget, or where `standard-1` takes more than a third of its
steps; after a miss the exit code is 1. The last row is of the mean over the seeds: of one seed the
best of many attacks is, by luck, two or three of 200 images better or worse.

The images are in the folder `$SOPHON_DATA`; the weights of the unprotected network are those of
`small_network.py`. About twenty minutes a seed on one core; with `--store` it goes on where it was
stopped, and takes the trials of audits by `recipes/small16-sampled.toml` that are there, as of
those whose records `--record` names.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sophon._attacks.suites import (
    beyond_rehearsal,
    beyond_usual,
    depth_attacks,
    resolved,
    strategies_of,
)
from sophon._auditing.executors import Processes, Serial, Workload
from sophon._auditing.plan import Plan
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import AuditError
from sophon._base.files import require_writable
from sophon._cli.run_file import load, load_subject, weights_file
from sophon._data import Domain
from sophon._judgement.statistics import area, envelope
from sophon._models import blocks, network_identity, weights_sha256
from sophon._records.audit_record import AuditRecord, Trial
from sophon._records.store import TrialStore
from sophon._specs import AuditSpec, FreshHead, OptimizerName, Strategy, Subject
from sophon._training.environment import environment
from sophon._training.setting import make_setting

STEPS = 200
RECIPE = Path(__file__).parents[1] / "recipes/small16-sampled.toml"
# What a row may fall short of: points of the envelope within any budget, and steps.
POINTS, SHARE = 1.0, 1 / 3
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
    """Runs assignments on one network in worker processes, and keeps their trials.

    `weights` are a protected network's, a file or a folder; without them it is the recipe's.
    """

    def __init__(self, weights: Path | None, store: Path | None, workers: int) -> None:
        held = [] if weights is None else [f"model.weights={weights_file(weights).absolute()}"]
        case = load(RECIPE, held, None)
        self.subject: Subject = "unprotected" if weights is None else "protected"
        self.protection: dict[str, Any] | None = None
        model = case.model
        if weights is not None:
            model, self.protection = load_subject(case, weights)
        self.domain: Domain = case.restricted[0]
        self.setting = make_setting(
            model,
            task=case.task,
            original=case.original,
            restricted=case.restricted,
            head=case.network.head,
            precision=case.spec.audit.precision,
            device=None,
        )
        self.blocks = len(blocks(model, self.setting.head))
        self.bench = Bench(self.setting, AuditSpec().evaluations)
        self.start = Start(model, network_identity(model), weights_sha256(model))
        starts = {(self.subject, 0): self.start}
        workload = Workload(self.bench, starts)
        self.executor = Serial(workload) if workers == 1 else Processes(workload, workers)
        folder = None if store is None else store / "trials"
        if folder is not None:
            require_writable(folder, remedy="choose another folder with --store")
        self.store = TrialStore(folder)

    def job(self, strategy: Strategy, seed: int) -> Job:
        """Return the job of an attack on this network."""
        return Job(self.subject, self.domain.name, strategy, seed)

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Yield the trials of the jobs, in order. AuditError for one that crashed."""
        found = [self.known(self.bench.key(job, self.start)) for job in jobs]
        lacking = [job for job, held in zip(jobs, found, strict=True) if held is None]
        fresh = self.executor.run(lacking)
        for held in found:
            trial = held
            if trial is None:
                trial = next(fresh)
                self.store.put(trial)
            if trial.outcome.kind == "crashed":
                raise AuditError(
                    f"{trial.strategy.label()}, seed {trial.seed}, crashed"
                    f" ({trial.outcome.error}): mend it and repeat the command"
                )
            yield trial

    def known(self, key: str) -> Trial | None:
        """Return the stored trial unless it crashed: such a one is run again."""
        trial = self.store.get(key)
        return None if trial is None or trial.outcome.kind == "crashed" else trial


def standard(runner: Runner, seed: int) -> list[Trial]:
    """Return the trials of `standard-1` with one seed."""
    spec = resolved(AuditSpec(suite="standard-1", steps=STEPS, seeds=(seed,)))
    beyond = beyond_rehearsal(runner.protection, spec)
    plan = Plan(
        spec=spec,
        subjects=(runner.subject,),
        restricted=(runner.domain,),
        secondary=(),
        strategies=tuple(dict.fromkeys((*strategies_of(spec), *beyond, *beyond_usual(spec)))),
        whole=depth_attacks(runner.blocks, spec),
        beyond=beyond,
    )
    met: dict[str, Trial] = {}
    jobs = plan.next()
    while jobs is not None:
        new = {t.key: t for t in runner.run(jobs) if t.key not in met}
        met |= new
        jobs = plan.next(list(new.values()))
    return plan.trials


def steps_of(trials: Sequence[Trial]) -> int:
    """Return the optimizer steps that trials took; what a preparation spent counts."""
    stopped = [
        t.outcome.step if t.outcome.kind in ("stopped", "diverged") else None for t in trials
    ]
    return sum(STEPS if step is None else step for step in stopped)


def known(file: Path) -> tuple[Trial, ...]:
    """Return the trials of an audit's record, which may be compressed, without crashed ones."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    trials = AuditRecord.model_validate_json(text).trials
    return tuple(trial for trial in trials if trial.outcome.kind != "crashed")


class Row(NamedTuple):
    """How `standard-1` did against the grid: points of the score, positive where it falls short."""

    taken: int
    whole: int
    worst: float
    worst_at: int
    last: float
    area: float

    @property
    def missed(self) -> str:
        """What the row misses, in words; empty where it is within both bars."""
        lost = []
        if not self.worst <= POINTS:
            lost.append(f"{self.worst:.1f} points short, {POINTS:g} allowed")
        if not self.taken <= SHARE * self.whole:
            lost.append(f"{self.taken / self.whole:.2f} of the steps, {SHARE:.2f} allowed")
        return "; ".join(lost)

    def __str__(self) -> str:
        judged = f"MISSED: {self.missed}" if self.missed else "met"
        return (
            f"{self.taken} / {self.whole} = {self.taken / self.whole:.2f}"
            f"  {self.worst:+.1f} points (at {self.worst_at} steps), {self.last:+.1f},"
            f" {self.area:+.2f}  {judged}"
        )


def compared(ours: Sequence[Sequence[Trial]], plain: Sequence[Sequence[Trial]]) -> Row:
    """Return how the trials of `standard-1`, by seed, did against those of the grid, on average."""
    at = sorted({p.step for trials in plain for t in trials for p in t.curve if p.step > 0})
    one, other = (
        np.mean([[p.value for p in envelope(trials, at)] for trials in held], axis=0)
        for held in (ours, plain)
    )
    short = 100 * (other - one)
    return Row(
        taken=sum(map(steps_of, ours)),
        whole=sum(map(steps_of, plain)),
        worst=round(float(short.max()), 6),
        worst_at=at[int(short.argmax())],
        last=float(short[-1]),
        area=float(100 * (area(at, other) - area(at, one))),
    )


def main(words: Sequence[str] | None = None) -> int:
    """Print one line a network and seed, and where it was measured; return 1 after a miss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, nargs="+", default=[None])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--record", type=Path, action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args(words)
    missed = False
    for index, weights in enumerate(chosen.weights):
        runner = Runner(weights, chosen.store, chosen.workers)
        for file in chosen.record:
            for trial in known(file):
                runner.store.put(trial)
        if not index:
            where = environment(runner.setting.device, runner.setting.precision)
            print(f"{where.processor}, {where.precision}, {datetime.date.today()}")
            print(where.versions)
            print(
                "seed  steps of standard-1 / grid"
                "  envelope: worst shortfall, at the horizon, area; judged"
            )
        print("unprotected" if weights is None else f"protected: {weights}")
        with runner.executor:
            ours: list[list[Trial]] = []
            plain: list[list[Trial]] = []
            for seed in chosen.seeds:
                ours.append(standard(runner, seed))
                plain.append(list(runner.run([runner.job(s, seed) for s in grid()])))
                row = compared(ours[-1:], plain[-1:])
                missed = missed or bool(row.missed)
                print(f"{seed:4}  {row}", flush=True)
            row = compared(ours, plain)
            missed = missed or bool(row.missed)
            print(f"mean  {row}", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
