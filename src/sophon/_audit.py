"""The audit: every attack of a suite on every subject, under one budget; every trial is kept.

`Audit(...)` is an iterator of `Trial`s that runs only what its store lacks; `audit(...)`
runs it to the end and returns the record.
"""

from __future__ import annotations

import copy
import datetime
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sophon._attacks import strategies_of
from sophon._circumstances import domain_record, environment, health
from sophon._data import Domain, check_batch_fits
from sophon._errors import AuditError
from sophon._files import require_writable
from sophon._finetune import FineTuning, attacker_copy, check_preparations
from sophon._metrics import evaluate
from sophon._models import batch_norm_reestimated, fresh_copy, weights_sha256
from sophon._records import (
    SCHEMA_VERSION,
    AuditRecord,
    Completed,
    Crashed,
    Diverged,
    Outcome,
    Point,
    Score,
    SubjectRecord,
    Trial,
)
from sophon._setting import make_setting
from sophon._specs import AuditSpec, Strategy, Subject, fingerprint_of
from sophon._store import TrialStore
from sophon._tasks import Classification, Task

# Raise this when a change of the loop changes what a trial with an old key would give.
ENGINE_VERSION = 2
# Images that BatchNorm statistics are measured anew on, at each evaluation.
_REESTIMATE_ON = 256


@dataclass(frozen=True)
class Assignment:
    """One trial to run: which attack, on which subject and domain, with which seed."""

    subject: Subject
    domain: Domain
    strategy: Strategy
    seed: int


class Audit:
    """An audit: iterate it for its trials, then ask it for its `record()`.

    `model` is the protected subject, `unprotected` the model before protection; without it
    nothing can be said of what protection bought. `scratch` makes a freshly initialised network
    of the same architecture; without it every layer of `model` is re-initialised. With `store`,
    a folder, only trials missing there are run. `about` adds `model`, `command` and
    `protection` to the record. No model passed in is changed.

    Raises AuditError, DataError, SpecError or UnsupportedModelError before any work.
    """

    def __init__(  # noqa: PLR0913 - one keyword per part of an audit
        self,
        model: nn.Module,
        *,
        original: Domain,
        restricted: Domain | list[Domain] | tuple[Domain, ...],
        unprotected: nn.Module | None = None,
        task: Task | None = None,
        spec: AuditSpec | None = None,
        store: str | Path | None = None,
        scratch: Callable[[], nn.Module] | None = None,
        head: str | None = None,
        device: str | torch.device | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        spec = AuditSpec() if spec is None else spec
        restricted = (restricted,) if isinstance(restricted, Domain) else tuple(restricted)
        subjects: dict[Subject, nn.Module] = {"protected": model}
        if unprotected is not None:
            subjects["unprotected"] = unprotected
        self.spec = spec
        self.strategies = strategies_of(spec)
        self.subjects = subjects
        self.scratch = scratch
        self.about = about or {}
        first = next(iter(subjects.values()))
        for name, subject in subjects.items():
            _require_same_architecture(first, subject, name)
        self._starts: dict[tuple[Subject, int], tuple[nn.Module, str]] = {}
        self.setting = make_setting(
            first,
            task=task or Classification(),
            original=original,
            restricted=restricted,
            head=head,
            precision=spec.precision,
            device=device,
            trained=False,
        )
        # Of a model that can be made; one that cannot be attacked is recorded as crashed.
        check_preparations(
            self._start("scratch", spec.seeds[0])[0],
            (strategy.preparations for strategy in self.strategies),
            self.setting,
        )
        for strategy in self.strategies:
            self.setting.at(strategy.precision, first)
        for domain in restricted:
            largest = max(strategy.batch_size for strategy in self.strategies)
            check_batch_fits(domain, largest, "the largest batch of the attacks")
        trials = None if store is None else Path(store) / "trials"
        if trials is not None:
            require_writable(trials)
        self.store = TrialStore(trials)
        self.assignments = [
            Assignment(subject, domain, strategy, seed)
            for domain in restricted
            for seed in spec.seeds
            for strategy in self.strategies
            for subject in (*subjects, "scratch")
        ]
        self.trials: list[Trial] = []
        self._networks = {
            name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in subjects.items()
        }

    def __len__(self) -> int:
        """Return the number of trials of the whole audit."""
        return len(self.assignments)

    def missing(self) -> int:
        """Return how many trials the store lacks."""
        return sum(self._stored(self._key(a)) is None for a in self.assignments)

    def _stored(self, key: str) -> Trial | None:
        """Return the stored trial unless it crashed: those are run again when repeated."""
        trial = self.store.get(key)
        return None if trial is None or trial.outcome.kind == "crashed" else trial

    def __iter__(self) -> Iterator[Trial]:
        """Yield every trial in order, running and storing those the store lacks."""
        self.trials = []
        for assignment in self.assignments:
            key = self._key(assignment)
            trial = self._stored(key)
            if trial is None:
                trial = self._run(assignment, key)
                self.store.put(trial)
            named = {"subject": assignment.subject, "domain": assignment.domain.name}
            self.trials.append(trial.model_copy(update=named))
            yield self.trials[-1]

    def record(self) -> AuditRecord:
        """Return the record of the audit, once every trial was met."""
        if len(self.trials) < len(self):
            raise AuditError(
                f"{len(self.trials)} of {len(self)} trials were met: iterate to the end"
            )
        setting = self.setting
        return AuditRecord(
            spec=self.spec,
            spec_fingerprint=self.spec.fingerprint(),
            strategies=self.strategies,
            model=self.about.get("model", type(next(iter(self.subjects.values()))).__name__),
            task="classification",
            original=domain_record(setting.original, "original"),
            restricted=tuple(domain_record(d, "restricted") for d in setting.restricted),
            subjects=self._subject_records(),
            trials=tuple(self.trials),
            environment=environment(setting.device, setting.precision),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=self.about.get("command", ""),
            protection=self.about.get("protection"),
        )

    # --- one trial ---------------------------------------------------------------------------

    def _start(self, subject: Subject, seed: int) -> tuple[nn.Module, str]:
        """Return what an attack starts from, never to be changed, and its hash."""
        at = (subject, seed if subject == "scratch" else 0)
        if at not in self._starts:
            model = self.subjects.get(subject)
            if model is None:
                first = next(iter(self.subjects.values()))
                model = fresh_copy(first, self.scratch, seed=seed, names=("scratch",))
            self._starts[at] = (model, weights_sha256(model))
        return self._starts[at]

    def _key(self, assignment: Assignment) -> str:
        return fingerprint_of(
            {
                "schema": SCHEMA_VERSION,
                "engine": ENGINE_VERSION,
                # Two subjects may hold equal weights and yet compute differently.
                "subject": assignment.subject,
                "network": self._networks.get(assignment.subject, self._networks["protected"]),
                "weights": self._start(assignment.subject, assignment.seed)[1],
                "strategy": assignment.strategy.model_dump(mode="json"),
                "seed": assignment.seed,
                "domain": assignment.domain.fingerprint(),
                "normalisation": self.setting.normalisation(assignment.domain),
                "evaluations": self.spec.evaluations,
                "precision": self.setting.precision,
                "task": self.setting.task.name,
                "head": self.setting.head,
            }
        )

    def _run(self, assignment: Assignment, key: str) -> Trial:
        start = time.perf_counter()
        trial = _Progress()
        try:
            outcome = self._attack(assignment, trial)
        except Exception as error:  # noqa: BLE001 - a crashed attack is a result, kept with its trace
            trial.test = None
            outcome = Crashed(
                error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()
            )
        return Trial(
            key=key,
            subject=assignment.subject,
            domain=assignment.domain.name,
            strategy=assignment.strategy,
            seed=assignment.seed,
            curve=tuple(trial.curve),
            best_step=trial.best_step,
            test=trial.test,
            outcome=outcome,
            wall_s=time.perf_counter() - start,
        )

    def _attack(self, assignment: Assignment, trial: _Progress) -> Outcome:
        domain, strategy, seed = assignment.domain, assignment.strategy, assignment.seed
        model = copy.deepcopy(self._start(assignment.subject, seed)[0])
        feed = self.setting.feed(
            domain,
            domain.train,
            batch_size=strategy.batch_size,
            stream=(seed, ("attack", "batches")),
            augmentation=strategy.augmentation,
        )
        stream = (seed, ("attack",))
        attacker_copy(
            model,
            strategy,
            self.setting,
            classes=domain.class_count,
            feed=feed,
            stream=stream,
        )
        tuning = FineTuning(model, strategy, self.setting, feed, stream=stream)
        outcome = self._advance(tuning, domain, trial)
        if trial.best is not None:
            model.load_state_dict(trial.best)
            trial.test = evaluate(model, tuning.setting, domain, domain.test)
        return outcome

    def _advance(self, tuning: FineTuning, domain: Domain, trial: _Progress) -> Outcome:
        due = evaluation_steps(tuning.strategy.steps, self.spec.evaluations)
        self._measure(tuning, domain, trial, None)
        for step in tuning.run(tuning.strategy.steps):
            if step.taken not in due:
                continue
            loss = float(step.loss)
            if not np.isfinite(loss):
                return Diverged(step=step.taken)
            self._measure(tuning, domain, trial, loss)
        return Completed()

    def _measure(
        self, tuning: FineTuning, domain: Domain, trial: _Progress, loss: float | None
    ) -> None:
        """Score the model as it is and with BatchNorm measured anew; the better one counts.

        Running statistics lag behind the weights, and at first they are the publisher's. A real
        attacker would not let that cost anything.
        """
        model, setting = tuning.model, tuning.setting
        score = trial.met(tuning.taken, evaluate(model, setting, domain, domain.validation), model)
        count = math.ceil(_REESTIMATE_ON / tuning.strategy.batch_size)
        batches = (tuning.feed.batch(step)[0] for step in range(count))
        reestimated = False
        with setting.autocast(), batch_norm_reestimated(model, batches) as anew:
            if anew:
                other = evaluate(model, setting, domain, domain.validation)
                reestimated = other.correct > score.correct
                score = trial.met(tuning.taken, other, model) if reestimated else score
        samples = tuning.taken * tuning.strategy.batch_size
        trial.curve.append(
            Point(
                step=tuning.taken,
                samples=samples,
                validation=score,
                reestimated=reestimated,
                train_loss=loss,
            )
        )

    def _subject_records(self) -> tuple[SubjectRecord, ...]:
        exact, original = self.setting.exact(), self.setting.original
        records = []
        for name in (*self.subjects, "scratch"):
            model, digest = self._start(name, self.spec.seeds[0])
            score = None
            if name != "scratch":
                held = self.setting.place(copy.deepcopy(model))
                score = evaluate(held, exact, original, original.test)
            records.append(
                SubjectRecord(
                    name=name,
                    weights_sha256=digest,
                    original=score,
                    parameters=sum(p.numel() for p in model.parameters()),
                    flags=health(model),
                )
            )
        return tuple(records)


@dataclass
class _Progress:
    """What a running trial has measured so far."""

    def __post_init__(self) -> None:
        self.curve: list[Point] = []
        self.best: dict[str, Tensor] | None = None
        self.best_score: Score | None = None
        self.best_step: int | None = None
        self.test: Score | None = None

    def met(self, step: int, score: Score, model: nn.Module) -> Score:
        """Remember the weights if they are the best so far; return the score."""
        if self.best_score is None or score.correct > self.best_score.correct:
            self.best_score, self.best_step = score, step
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        return score


def evaluation_steps(steps: int, evaluations: int) -> frozenset[int]:
    """Return the steps after which an attack is measured: geometric from 1/40 of the horizon."""
    first = max(1, steps // 40)
    return frozenset(round(value) for value in np.geomspace(first, steps, evaluations).tolist())


def _require_same_architecture(first: nn.Module, other: nn.Module, name: str) -> None:
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    others = {key: value.shape for key, value in other.state_dict().items()}
    different = sorted(k for k in shapes | others if shapes.get(k) != others.get(k))
    if different:
        raise AuditError(
            f"the {name} model has another architecture: {len(different)} keys differ"
            f" ({', '.join(different[:3])}): compare checkpoints of one architecture"
        )


def audit(  # noqa: PLR0913 - one keyword per part of an audit
    model: nn.Module,
    *,
    original: Domain,
    restricted: Domain | list[Domain] | tuple[Domain, ...],
    unprotected: nn.Module | None = None,
    task: Task | None = None,
    spec: AuditSpec | None = None,
    store: str | Path | None = None,
    scratch: Callable[[], nn.Module] | None = None,
    head: str | None = None,
    device: str | torch.device | None = None,
) -> AuditRecord:
    """Return the record of a whole audit; see `Audit` for the arguments and errors."""
    run = Audit(
        model,
        original=original,
        restricted=restricted,
        unprotected=unprotected,
        task=task,
        spec=spec,
        store=store,
        scratch=scratch,
        head=head,
        device=device,
    )
    for _ in run:
        pass
    return run.record()
