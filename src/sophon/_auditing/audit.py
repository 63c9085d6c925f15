"""The audit: every attack of a suite on every subject, under one budget; every trial is kept.

`Audit(...)` is an iterator of `Trial`s that runs only what its store lacks; `audit(...)`
runs it to the end and returns the record.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon._attacks import suites
from sophon._auditing.budget import AuditForecast, Pace, decided, fit, least_steps, measure_pace
from sophon._auditing.checks import (
    USUAL_BATCH,
    ExecutorName,
    check_attacks,
    check_executor,
    checked_about,
)
from sophon._auditing.executors import Executor, Processes, Serial, Workload
from sophon._auditing.plan import Plan
from sophon._auditing.ray import RayCluster
from sophon._auditing.samples import drawn, expected_sets, fewer_pictures
from sophon._auditing.subjects import Subjects
from sophon._auditing.trial import REINITIALISING, Bench, Job
from sophon._auditing.vitals import training_flops
from sophon._base.errors import AuditError, require_kind
from sophon._base.files import require_writable
from sophon._base.signatures import signed_as
from sophon._data import Domain, overlaps_of, several
from sophon._models import Bare, blocks, weights_sha256
from sophon._records.audit_record import (
    AuditRecord,
    DomainRecord,
    EarlierCrash,
    Measurement,
    SampleRecord,
    Trial,
)
from sophon._records.statement import statement_of
from sophon._records.store import DocumentStore, TrialStore, earlier_crashes
from sophon._specs import AuditSpec, Strategy, Subject
from sophon._tasks import Classification, Task
from sophon._training.environment import domain_record, domain_text, environment
from sophon._training.setting import make_setting


class Audit:
    """An audit: iterate it for its trials, then ask it for its `record()`.

    **Main arguments:**

    - `model`: the protected subject. No model passed in is changed.
    - `original`: the domain whose task the model keeps.
    - `restricted`: the domain or domains that protection is against.
    - `unprotected`: the model before protection; without it nothing can be said of what protection
      bought.
    - `spec`: suite, steps, seeds and precision of the attacks; default: `AuditSpec()`.
    - `store`: a folder; only trials missing there are run.

    **Other arguments:**

    - `held_out`: restricted domains that protection did not use.
    - `benign`: allowed domains.
    - `task`: what the scores are of; default: `Classification()`.
    - `scratch`: makes a freshly initialised network of the same architecture; without it every
      layer of the model is re-initialised.
    - `head`: the name of the model's last layer; default: found.
    - `device`: where trials compute; default: a card where there is one.
    - `workers`: how many trials run at once; more than one are processes of one thread each.
    - `executor`: "processes", or "ray" for workers on a Ray cluster.
    - `address`: the Ray cluster's `host:port`; default: one is started on this machine.
    - `budget_s`: fits the audit to so many seconds, as measured before it starts; what that gives
      up is in `given_up` and in the record, and a repeated audit gives up the same.
    - `about`: adds `model`, `command`, `protection`, `note` and `files` (the checksum of each
      subject's file) to the record.

    Raises AuditError, DataError, SpecError or UnsupportedModelError before any work.
    """

    def __init__(  # noqa: PLR0913 - one keyword per part of an audit
        self,
        model: nn.Module,
        *,
        original: Domain,
        restricted: Domain | Sequence[Domain],
        unprotected: nn.Module | None = None,
        held_out: Sequence[Domain] = (),
        benign: Sequence[Domain] = (),
        task: Task | None = None,
        spec: AuditSpec | None = None,
        store: str | Path | None = None,
        scratch: Callable[[], nn.Module] | None = None,
        head: str | None = None,
        device: str | torch.device | None = None,
        workers: int = 1,
        executor: ExecutorName = "processes",
        address: str | None = None,
        budget_s: float | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        spec = AuditSpec() if spec is None else spec
        require_kind(spec, AuditSpec, "spec", "an AuditSpec")
        self.spec, self.restricted = suites.resolved(spec), several(restricted)
        self.held_out, self.benign = several(held_out), several(benign)
        check_executor(executor, address)
        self.workers, self.executor, self.address = workers, executor, address
        self.about = checked_about(about or {}, original)
        self.subjects = Subjects(model, unprotected, scratch, (self.spec.seeds or (0,))[0])
        setting = make_setting(
            model,
            task=task or Classification(),
            original=original,
            restricted=(*self.restricted, *self.held_out, *self.benign),
            head=head,
            precision=self.spec.precision,
            device=device,
            trained=False,
        )
        automatic = self.spec.precision == "auto"
        self.setting = self.subjects.precise_enough(setting) if automatic else setting
        self.plan = self._planned(self.spec)
        self.bench = Bench(self.setting, self.spec.evaluations, self._bare())
        check_attacks(self.plan, self.setting, model, self.subjects.fresh, self.bench.bare)
        folder = None if store is None else Path(store)
        if folder is not None:
            require_writable(folder / "trials")
        self.store = TrialStore(folder and folder / "trials")
        self._sheets = DocumentStore(folder and folder / "samples")
        # The trials met so far, and the keys of those that were not in the store.
        self.trials: list[Trial] = []
        self.ran: set[str] = set()
        self.given_up: tuple[str, ...] = ()
        self._finished = False
        self._originals: dict[Subject, Measurement] = {}
        self._pictures: list[SampleRecord] = []
        self._crashes: tuple[EarlierCrash, ...] = ()
        self._pace: Pace | None = None
        if budget_s is not None:
            self._fit(budget_s, DocumentStore(folder and folder / "budgets"))

    def _planned(self, spec: AuditSpec) -> Plan:
        suite, metric = suites.suite_of(spec), self.setting.task.metric
        count = len(blocks(self.subjects.protected, self.setting.head))
        chosen = (*suites.strategies_of(spec), *suites.anew_attacks(count, spec))
        strategies, left_out = suites.fitting(suites.without_repeats(chosen, count), metric)
        whole: tuple[Strategy, ...] = ()
        beyond = suites.beyond_rehearsal(self.about.get("protection"), spec)
        if suite.rehearsed:
            strategies = tuple(dict.fromkeys((*strategies, *beyond, *suites.beyond_usual(spec))))
        if suite.depth:
            whole = suites.depth_attacks(count, spec)
        return Plan(
            spec=spec,
            subjects=self.subjects.names,
            restricted=self.restricted,
            secondary=(*self.held_out, *self.benign),
            strategies=strategies,
            whole=whole,
            beyond=beyond,
            metric=metric,
            left_out=left_out,
        )

    def _bare(self) -> dict[int, Bare]:
        """Return fresh values of what no reset reaches, if any attack needs them."""
        strategies = (*self.plan.strategies, *self.plan.whole)
        kinds = {p.kind for strategy in strategies for p in strategy.preparations}
        if not kinds & REINITIALISING and not self.spec.search_trials:
            return {}
        return self.subjects.bare(self.plan.seeds)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The attacks of the suite, and the extra ones."""
        return self.plan.strategies

    def __len__(self) -> int:
        """Return the number of trials of the whole audit; about so many if it goes by stages."""
        return max(self.plan.expected().trials, len(self.trials))

    def missing(self) -> int:
        """Return how many trials the store lacks: as far as that is known yet."""
        plan = replace(self.plan, trials=[])
        met: dict[str, Trial | None] = {}
        lacking = 0
        jobs = plan.next()
        while jobs is not None:
            new = self._new(jobs, met)
            met |= {key: self.store.get(key) for key in new}
            lacking = sum(trial is None for trial in met.values())
            if plan.staged and lacking:
                return max(lacking, plan.expected().trials - (len(met) - lacking))
            found = [(job, met[key]) for key, job in new.items()]
            jobs = plan.next([_named(job, trial) for job, trial in found if trial is not None])
        return lacking

    def __iter__(self) -> Iterator[Trial]:
        """Yield every trial in order, running and storing those the store lacks."""
        self.trials, self._finished = [], False
        self.ran.clear()
        self.plan = replace(self.plan, trials=[])
        # First: a model that fails here would lose the record of all trials.
        self._originals = self.subjects.original_scores(self.setting)
        with self._executor() as executor:
            jobs = self.plan.next()
            while jobs is not None:
                before = len(self.trials)
                for trial in self._met(self._new(jobs, {t.key for t in self.trials}), executor):
                    self.trials.append(trial)
                    yield trial
                jobs = self.plan.next(self.trials[before:])
        self._crashes = earlier_crashes(self.store, self.trials)
        workload = Workload(self.bench, self.subjects.starts)
        with self._threads_of_a_trial():
            self._pictures = drawn(workload, self.plan, self.trials, self._sheets)
        self._finished = True

    def _new(self, jobs: Iterable[Job], met: Container[str]) -> dict[str, Job]:
        """Return the jobs by the keys of their trials, without those whose trials were met."""
        keyed = {self._key(job): job for job in jobs}
        return {key: job for key, job in keyed.items() if key not in met}

    def _met(self, new: dict[str, Job], executor: Executor) -> Iterator[Trial]:
        """Yield the trials of the jobs in order, running and storing those the store lacks."""
        found = {key: self.store.get(key) for key in new}
        lacking = [job for key, job in new.items() if found[key] is None]
        # Each is stored once it is done, though one in front of it may take longer.
        ran = executor.run(lacking, self.store.put)
        for key, job in new.items():
            trial = found[key]
            if trial is None:
                trial = next(ran)
                self.ran.add(key)
                # Of two audits that run it at once the first one's stays.
                trial = self.store.get(key) or trial
            yield _named(job, trial)

    def _key(self, job: Job) -> str:
        return self.bench.key(job, self.subjects.start(job.subject, job.seed))

    def _executor(self) -> Executor:
        for seed in self.plan.seeds:
            for subject in self.subjects.names:
                self.subjects.start(subject, seed)
        workload = Workload(self.bench, self.subjects.starts)
        if self.executor == "ray":
            return RayCluster(workload, self.workers, self.address)
        return Serial(workload) if self.workers == 1 else Processes(workload, self.workers)

    # --- Time --------------------------------------------------------------------------------

    def forecast(self) -> AuditForecast:
        """Return what the whole audit is expected to take, from a few measured steps."""
        work = self.plan.expected()
        return AuditForecast(work.trials, work.steps, self._seconds(self.plan))

    def _seconds(self, plan: Plan) -> float | None:
        if self._pace is None:
            domain, seed = self.restricted[0], self.plan.seeds[0]
            usual = Strategy(batch_size=min(USUAL_BATCH, len(domain.train)))
            job = Job("scratch", domain.name, usual, seed)
            with self._threads_of_a_trial():
                self._pace = measure_pace(self.bench, job, self.subjects.start("scratch", seed))
        if self._pace is None:
            return None
        return self._pace.seconds(plan.expected()) / self.workers

    @contextmanager
    def _threads_of_a_trial(self) -> Iterator[None]:
        """Compute with as many threads as trials do: another number gives other weights."""
        threads = torch.get_num_threads()
        alone = self.workers == 1 and self.executor != "ray"
        torch.set_num_threads(threads if alone else 1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _fit(self, budget_s: float, decisions: DocumentStore) -> None:
        """Make the audit as small as the budget asks; as an earlier run decided."""
        # How many steps protection says that a rehearsed attacker takes in its life.
        rehearsed = statement_of(self.about.get("protection")).life
        asked = {
            "spec": self.spec.keyed(),
            "budget_s": budget_s,
            "workers": self.workers,
            "executor": self.executor,
            "device": str(self.setting.device),
            "precision": self.setting.precision,
            "threads": torch.get_num_threads() if self.workers == 1 else 1,
            "least_steps": least_steps(self.spec, rehearsed),
            "model": weights_sha256(self.subjects.before),
            "domains": [domain.fingerprint() for domain in self.setting.restricted],
        }

        def choose() -> tuple[AuditSpec, tuple[str, ...]]:
            chosen, given_up = fit(self.spec, budget_s, self.cost, rehearsed=rehearsed)
            chosen, lost = fewer_pictures(self.setting, chosen)
            return chosen, (*given_up, *lost)

        self.spec, self.given_up = decided(decisions, asked, choose)
        self.plan = self._planned(self.spec)
        self.bench = replace(self.bench, evaluations=self.spec.evaluations)

    def cost(self, spec: AuditSpec) -> float:
        """Return the seconds that this audit by another specification is expected to take.

        Raises AuditError where the measured trials crash.
        """
        seconds = self._seconds(self._planned(spec))
        if seconds is None:
            raise AuditError(
                "the pace of this audit cannot be measured, its attacks on a fresh network"
                " crash: leave the budget out to see why in the record"
            )
        return seconds

    # --- Pictures and the record -------------------------------------------------------------

    @property
    def picture_sets(self) -> int:
        """How many sets of pictures are drawn and judged after the trials, at most."""
        return expected_sets(self.setting, self.spec, self.restricted, self.plan.subjects)

    def record(self) -> AuditRecord:
        """Return the record of the audit, once every trial was met."""
        if not self._finished:
            raise AuditError(
                f"{len(self.trials)} of {len(self)} trials were met: iterate to the end"
            )
        setting, about = self.setting, self.about
        return AuditRecord(
            spec=self.spec,
            spec_fingerprint=self.spec.fingerprint(),
            strategies=self.strategies,
            model=about.get("model", type(self.subjects.protected).__name__),
            task=setting.task.kind.task,
            task_name=setting.task.name,
            original=self._domain_record(setting.original, "original"),
            restricted=self._domain_records(self.restricted, "restricted"),
            held_out=self._domain_records(self.held_out, "held_out"),
            benign=self._domain_records(self.benign, "benign"),
            overlaps=overlaps_of((setting.original, *setting.restricted)),
            samples=tuple(self._pictures),
            left_out=self.plan.left_out,
            subjects=self.subjects.records(
                setting, self.restricted, self._originals, about.get("files", {})
            ),
            trials=tuple(self.trials),
            earlier_crashes=self._crashes,
            environment=environment(setting.device, setting.precision),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            suite_fingerprint=suites.suite_fingerprint(self.spec.suite),
            command=about.get("command", ""),
            given_up=self.given_up,
            note=about.get("note", ""),
            protection=about.get("protection"),
        )

    def _domain_records(self, domains: Sequence[Domain], role: str) -> tuple[DomainRecord, ...]:
        # Of a model that can be trained, whatever the subjects are.
        model = self.subjects.fresh
        return tuple(
            self._domain_record(d, role, training_flops(model, self.setting, d)) for d in domains
        )

    def _domain_record(self, domain: Domain, role: str, flops: int | None = None) -> DomainRecord:
        setting = self.setting
        read = domain_text(domain, setting.original, setting.task.normalisation, setting.own)
        return domain_record(domain, role, flops, read=read)


def _named(job: Job, trial: Trial) -> Trial:
    # Equal images under another name are the same trial.
    return trial.model_copy(update={"subject": job.subject, "domain": job.domain})


@signed_as(Audit)
def audit(*model: Any, **arguments: Any) -> AuditRecord:
    """Return the record of a whole audit; see `Audit` for the arguments and errors, and iterate one
    to see its trials.
    """
    run = Audit(*model, **arguments)
    for _ in run:
        pass
    return run.record()
