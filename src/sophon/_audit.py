"""The audit: every attack of a suite on every subject, under one budget; every trial is kept.

`auditing(...)` is an iterator of `Trial`s that runs only what its store lacks; `audit(...)`
runs it to the end and returns the record.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sophon._attacks import strategies_of
from sophon._checkpoints import require_writable
from sophon._data import Domain, check_batch_fits
from sophon._errors import AuditError, CheckpointError
from sophon._finetune import FineTuning, attacker_copy
from sophon._metrics import evaluate
from sophon._models import fresh_copy, weights_sha256
from sophon._records import (
    SCHEMA_VERSION,
    AuditRecord,
    Completed,
    Crashed,
    Diverged,
    DomainRecord,
    Environment,
    Outcome,
    Point,
    Score,
    SubjectRecord,
    Trial,
)
from sophon._setting import make_setting
from sophon._specs import AuditSpec, Strategy, Subject, fingerprint_of
from sophon._tasks import Classification, Task

# Raise this when a change of the loop changes what a trial with an old key would give.
ENGINE_VERSION = 1
_PACKAGES = ("sophon-protect", "torch", "numpy", "timm", "torchvision")


class TrialStore:
    """An append-only folder of trials, one file each, named by the trial's key."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Trial] = {}

    def get(self, key: str) -> Trial | None:
        """Return the stored trial, or None. Raises CheckpointError if its file is damaged."""
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.json"
        try:
            return Trial.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} is not a trial of this version ({type(error).__name__}): delete that file"
                " to run the trial again"
            ) from None

    def put(self, trial: Trial) -> None:
        """Store a trial; one already there under its key stays."""
        if self.folder is None:
            self._memory.setdefault(trial.key, trial)
            return
        path = self.folder / f"{trial.key}.json"
        temporary = self.folder / f".{trial.key}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(trial.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()


@dataclass(frozen=True)
class Assignment:
    """One trial to run: which attack, on which subject and domain, with which seed."""

    subject: Subject
    domain: Domain
    strategy: Strategy
    seed: int


class Audit:
    """An audit, one trial at a time; see `auditing`."""

    def __init__(  # noqa: PLR0913 - one keyword per part of an audit
        self,
        subjects: dict[Subject, nn.Module],
        *,
        task: Task,
        original: Domain,
        restricted: tuple[Domain, ...],
        spec: AuditSpec,
        store: Path | None,
        scratch: Callable[[], nn.Module] | None,
        head: str | None,
        about: dict[str, Any],
    ) -> None:
        self.spec = spec
        self.strategies = strategies_of(spec)
        self.subjects = subjects
        self.scratch = scratch
        self.about = about
        first = next(iter(subjects.values()))
        for name, model in subjects.items():
            _require_same_architecture(first, model, name)
        self.setting = make_setting(
            first,
            task=task,
            original=original,
            restricted=restricted,
            head=head,
            precision=spec.precision,
            device=None,
            trained=False,
        )
        for domain in restricted:
            largest = max(strategy.batch_size for strategy in self.strategies)
            check_batch_fits(domain, largest, "the largest batch of the attacks")
        if store is not None:
            require_writable(store / "trials")
        self.store = TrialStore(None if store is None else store / "trials")
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
        self._starts: dict[tuple[Subject, int], tuple[nn.Module, str]] = {}

    def __len__(self) -> int:
        """Return the number of trials of the whole audit."""
        return len(self.assignments)

    def missing(self) -> int:
        """Return how many trials the store lacks."""
        return sum(self.store.get(self._key(a)) is None for a in self.assignments)

    def __iter__(self) -> Iterator[Trial]:
        """Yield every trial in order, running and storing those the store lacks."""
        self.trials = []
        for assignment in self.assignments:
            key = self._key(assignment)
            trial = self.store.get(key)
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
            trial.test = evaluate(model, self.setting, domain, domain.test)
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
        score = evaluate(tuning.model, self.setting, domain, domain.validation)
        samples = tuning.taken * tuning.strategy.batch_size
        trial.curve.append(
            Point(step=tuning.taken, samples=samples, validation=score, train_loss=loss)
        )
        if trial.best_score is None or score.correct > trial.best_score.correct:
            trial.best_score, trial.best_step = score, tuning.taken
            trial.best = {k: v.detach().clone() for k, v in tuning.model.state_dict().items()}

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
                    flags=_health(model),
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


def evaluation_steps(steps: int, evaluations: int) -> frozenset[int]:
    """Return the steps after which an attack is measured: geometric from 1/40 of the horizon."""
    first = max(1, steps // 40)
    return frozenset(round(value) for value in np.geomspace(first, steps, evaluations).tolist())


def domain_record(domain: Domain, role: str) -> DomainRecord:
    """Return a domain's entry in a record."""
    return DomainRecord(
        name=domain.name,
        role=role,  # type: ignore[arg-type]
        source=domain.source,
        sha256=domain.fingerprint(),
        train=len(domain.train),
        validation=len(domain.validation),
        test=len(domain.test),
        classes=domain.class_count,
        image=domain.image_shape,
    )


def environment(device: torch.device, precision: str) -> Environment:
    """Return where the audit runs: versions, processor, threads, device and precision."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        versions=versions,
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        threads=torch.get_num_threads(),
        device=str(device),
        precision=precision,
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _health(model: nn.Module) -> tuple[str, ...]:
    flags = []
    tensors = [v for v in model.state_dict().values() if v.is_floating_point()]
    if not all(bool(value.isfinite().all()) for value in tensors):
        flags.append("non_finite_weights")
    if not all(parameter.requires_grad for parameter in model.parameters()):
        flags.append("frozen_parameters")
    return tuple(flags)


def _require_same_architecture(first: nn.Module, other: nn.Module, name: str) -> None:
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    others = {key: value.shape for key, value in other.state_dict().items()}
    different = sorted(k for k in shapes | others if shapes.get(k) != others.get(k))
    if different:
        raise AuditError(
            f"the {name} model has another architecture: {len(different)} keys differ"
            f" ({', '.join(different[:3])}): compare checkpoints of one architecture"
        )


def auditing(  # noqa: PLR0913 - one keyword per part of an audit
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
    about: dict[str, Any] | None = None,
) -> Audit:
    """Return an audit: iterate it for its trials, then ask it for its `record()`.

    `model` is the protected subject, `unprotected` the model before protection; without it
    nothing can be said of what protection bought. `scratch` makes a freshly initialised network
    of the same architecture; without it every layer of `model` is re-initialised. With `store`,
    a folder, only trials missing there are run. `about` adds `model`, `command` and
    `protection` to the record. No model passed in is changed.

    Raises AuditError, DataError, SpecError or UnsupportedModelError before any work.
    """
    subjects: dict[Subject, nn.Module] = {"protected": model}
    if unprotected is not None:
        subjects["unprotected"] = unprotected
    return Audit(
        subjects,
        task=task or Classification(),
        original=original,
        restricted=(restricted,) if isinstance(restricted, Domain) else tuple(restricted),
        spec=spec or AuditSpec(),
        store=None if store is None else Path(store),
        scratch=scratch,
        head=head,
        about=about or {},
    )


def audit(
    model: nn.Module,
    *,
    original: Domain,
    restricted: Domain | list[Domain] | tuple[Domain, ...],
    unprotected: nn.Module | None = None,
    task: Task | None = None,
    spec: AuditSpec | None = None,
    store: str | Path | None = None,
    scratch: Callable[[], nn.Module] | None = None,
) -> AuditRecord:
    """Return the record of a whole audit; see `auditing` for the arguments."""
    run = auditing(
        model,
        original=original,
        restricted=restricted,
        unprotected=unprotected,
        task=task,
        spec=spec,
        store=store,
        scratch=scratch,
    )
    for _ in run:
        pass
    return run.record()
