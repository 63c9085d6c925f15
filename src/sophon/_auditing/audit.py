"""The audit: every attack of a suite on every subject, under one budget; every trial is kept.

`Audit(...)` is an iterator of `Trial`s that runs only what its store lacks; `audit(...)`
runs it to the end and returns the record.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from sophon._attacks.search import require_optuna, starts
from sophon._attacks.suites import (
    beyond_rehearsal,
    beyond_usual,
    depth_attacks,
    fitting,
    resolved,
    strategies_of,
    suite_fingerprint,
    suite_of,
)
from sophon._auditing.budget import (
    AuditForecast,
    Pace,
    fit,
    least_steps,
    measure_pace,
    usual_attack,
)
from sophon._auditing.executors import Executor, Job, Processes, Serial, Workload
from sophon._auditing.plan import Plan
from sophon._auditing.ray import RayCluster, require_ray
from sophon._auditing.samples import (
    SampleStage,
    check_samples,
    expected_sets,
    fewer_pictures,
    wanted,
)
from sophon._auditing.trial import REINITIALISING, Assignment, Bench, Start
from sophon._auditing.vitals import block_count, measure_vitals, training_flops
from sophon._base.errors import AuditError, SpecError
from sophon._base.files import require_writable
from sophon._data import Domain, check_batch_fits, overlaps_of
from sophon._models import (
    Bare,
    bare_parameters,
    code_differences,
    fresh_copy,
    network_identity,
    require_peft,
    similarity,
    weights_sha256,
)
from sophon._records.audit_record import (
    AuditRecord,
    DomainRecord,
    EarlierCrash,
    Measurement,
    SampleRecord,
    SubjectRecord,
    Trial,
)
from sophon._records.statement import statement_of
from sophon._records.store import DocumentStore, TrialStore, earlier_crashes
from sophon._specs import AuditSpec, Preparation, Strategy, Subject, fingerprint_of, parse_spec
from sophon._tasks import Classification, Task
from sophon._training.environment import domain_record, environment, health
from sophon._training.evaluate import evaluate
from sophon._training.loop import check_preparations
from sophon._training.rounding import TOLERATED, rounding_error
from sophon._training.setting import Setting, make_setting

ExecutorName = Literal["processes", "ray"]
# Batches up to this size are not shrunk to the images at hand: too few images are an error.
_USUAL_BATCH = Strategy.model_fields["batch_size"].default


class Audit:
    """An audit: iterate it for its trials, then ask it for its `record()`.

    `model` is the protected subject, `unprotected` the model before protection; without it
    nothing can be said of what protection bought. `scratch` makes a freshly initialised network
    of the same architecture; without it every layer of `model` is re-initialised. `held_out` are
    restricted domains that protection did not use, `benign` allowed ones. With `store`, a folder,
    only trials missing there are run; with more than one of `workers`, in processes of one
    thread each, or with `executor = "ray"` so many at once on the Ray cluster at `address`
    (default: one on this machine). `budget_s` fits the audit to so many seconds, as measured
    before it starts; what that gives up is in `given_up` and in the record, and a repeated audit
    gives up the same. `about` adds `model`, `command`, `protection`, `note` and `files` (the
    checksum of each subject's file) to the record. No model passed in is changed.

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
        self.spec = resolved(AuditSpec() if spec is None else spec)
        self.restricted = _several(restricted)
        self.held_out, self.benign = tuple(held_out), tuple(benign)
        self.subjects: dict[Subject, nn.Module] = {"protected": model}
        if unprotected is not None:
            self.subjects["unprotected"] = unprotected
        self.scratch = scratch
        self.workers = workers
        self.executor, self.address = _chosen(executor, address)
        self.about = about or {}
        for name, subject in self.subjects.items():
            _require_same_architecture(model, subject, name)
        self._starts: dict[tuple[Subject, int], Start] = {}
        self._domains = {d.name: d for d in (*self.restricted, *self.held_out, *self.benign)}
        self._finished = False
        # Keys of the trials that were not in the store.
        self.ran: set[str] = set()
        self.setting = make_setting(
            model,
            task=task or Classification(),
            original=original,
            restricted=(*self.restricted, *self.held_out, *self.benign),
            head=head,
            precision=self.spec.precision,
            device=device,
            trained=False,
        )
        self.setting = self._precise_enough(self.setting)
        self.bench = Bench(self.setting, self.spec.evaluations)
        self.given_up: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._originals: dict[Subject, Measurement] = {}
        self._pictures: list[SampleRecord] = []
        self._crashes: tuple[EarlierCrash, ...] = ()
        self._pace: Pace | None = None
        self.plan = self._planned(self.spec)
        self.bench = replace(self.bench, bare=self._bare())
        self._check()
        trials = None if store is None else Path(store) / "trials"
        if trials is not None:
            require_writable(trials)
        self.store = TrialStore(trials)
        self._sheets = DocumentStore(None if store is None else Path(store) / "samples")
        if budget_s is not None:
            self._fit(budget_s, None if store is None else Path(store) / "budgets")

    def _precise_enough(self, setting: Setting) -> Setting:
        """Return the setting in fp32 where a subject is lost in a precision that nobody asked for:
        an attacker would not attack there.
        """
        if self.spec.precision != "auto":
            return setting
        errors = [rounding_error(subject, setting) or 0.0 for subject in self.subjects.values()]
        return setting.exact() if max(errors) > TOLERATED else setting

    @property
    def trials(self) -> list[Trial]:
        """The trials met so far."""
        return self.plan.trials

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The attacks of the suite, and the extra ones."""
        return self.plan.strategies

    def __len__(self) -> int:
        """Return the number of trials of the whole audit; about so many if it goes by stages."""
        return max(self.plan.expected().trials, len(self.trials))

    def missing(self) -> int:
        """Return how many trials the store lacks: as far as that is known yet."""
        plan = self._planned(self.spec)
        held, lacking = set(), set()
        for stage in plan.stages():
            for assignment in stage:
                key = self._key(assignment)
                trial = self.store.get(key)
                if trial is None:
                    lacking.add(key)
                else:
                    held.add(key)
                    plan.trials.append(self._named(assignment, trial))
            if plan.staged and lacking:
                return max(len(lacking), plan.expected().trials - len(held))
        return len(lacking)

    def __iter__(self) -> Iterator[Trial]:
        """Yield every trial in order, running and storing those the store lacks."""
        self.trials.clear()
        self._finished = False
        self.ran.clear()
        # First: a model that fails here would lose the record of all trials.
        self._originals = self._original_scores()
        met: set[str] = set()
        with self._executor() as executor:
            for stage in self.plan.stages():
                keys = {a: self._key(a) for a in stage}
                new = {key: a for a, key in keys.items() if key not in met}
                met |= new.keys()
                found = {key: self.store.get(key) for key in new}
                lacking = [_job(a) for key, a in new.items() if found[key] is None]
                # Each is stored once it is done, though one in front of it may take longer.
                ran = executor.run(lacking, self.store.put)
                for key, assignment in new.items():
                    trial = found[key]
                    if trial is None:
                        trial = next(ran)
                        self.ran.add(key)
                        # Of two audits that run it at once the first one's stays.
                        trial = self.store.get(key) or trial
                    self.trials.append(self._named(assignment, trial))
                    yield self.trials[-1]
        self._crashes = earlier_crashes(self.store, self.trials)
        self._pictures = self._drawn()
        self._finished = True

    def record(self) -> AuditRecord:
        """Return the record of the audit, once every trial was met."""
        if not self._finished:
            raise AuditError(
                f"{len(self.trials)} of {len(self)} trials were met: iterate to the end"
            )
        setting = self.setting
        return AuditRecord(
            spec=self.spec,
            spec_fingerprint=self.spec.fingerprint(),
            strategies=self.strategies,
            model=self.about.get("model", type(next(iter(self.subjects.values()))).__name__),
            task="classification" if setting.task.metric == "accuracy" else "denoising",
            task_name=setting.task.name,
            original=domain_record(setting.original, "original"),
            restricted=self._domain_records(self.restricted, "restricted"),
            held_out=self._domain_records(self.held_out, "held_out"),
            benign=self._domain_records(self.benign, "benign"),
            overlaps=overlaps_of((setting.original, *setting.restricted)),
            samples=tuple(self._pictures),
            left_out=self.left_out,
            subjects=self._subject_records(),
            trials=tuple(self.trials),
            earlier_crashes=self._crashes,
            environment=environment(setting.device, setting.precision),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            suite_fingerprint=suite_fingerprint(self.spec.suite),
            command=self.about.get("command", ""),
            given_up=self.given_up,
            note=self.about.get("note", ""),
            protection=self.about.get("protection"),
        )

    def _domain_records(self, domains: Sequence[Domain], role: str) -> tuple[DomainRecord, ...]:
        # Of a model that can be trained, whatever the subjects are.
        model = self._start("scratch", self._seeds[0]).model
        return tuple(
            domain_record(d, role, training_flops(model, self.setting, d)) for d in domains
        )

    # --- What is run -------------------------------------------------------------------------

    def forecast(self) -> AuditForecast:
        """Return what the whole audit is expected to take, from a few measured steps."""
        work = self.plan.expected()
        return AuditForecast(work.trials, work.steps, self._seconds(self.plan))

    def _seconds(self, plan: Plan) -> float | None:
        if self._pace is None:
            domain, seed = self.restricted[0], self._seeds[0]
            size = min(_USUAL_BATCH, len(domain.train))
            there = Assignment("scratch", domain, usual_attack(size), seed)
            with self._threads_of_a_trial():
                self._pace = measure_pace(self.bench, there, self._start("scratch", seed))
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

    def _fit(self, budget_s: float, folder: Path | None) -> None:
        """Make the audit as small as the budget asks; as an earlier run in `folder` decided.

        Audits of several protections of one model decide alike: they can be compared, and share
        their trials of the unprotected and of the fresh network.
        """
        against = self.subjects.get("unprotected", self.subjects["protected"])
        asked = {
            "spec": self.spec.model_dump(mode="json"),
            "budget_s": budget_s,
            "workers": self.workers,
            "executor": self.executor,
            "device": str(self.setting.device),
            "precision": self.setting.precision,
            "threads": torch.get_num_threads() if self.workers == 1 else 1,
            "least_steps": least_steps(self.spec, self._rehearsed()),
            "model": weights_sha256(against),
            "domains": [domain.fingerprint() for domain in self._domains.values()],
        }
        key, decisions = fingerprint_of(asked), DocumentStore(folder)
        if decisions.get(key) is None:
            chosen, given_up = self._fitted(budget_s)
            decided = {"chosen": chosen.model_dump(mode="json"), "given_up": list(given_up)}
            decisions.put(key, {**asked, **decided})
        # Of two audits that measure at once the first to be done decides.
        held = decisions.get(key) or {}
        chosen = parse_spec(AuditSpec, held["chosen"], where=f"the budget's decision {key}")
        self.spec, self.given_up = chosen, tuple(held["given_up"])
        self.plan = self._planned(chosen)
        self.bench = replace(self.bench, evaluations=chosen.evaluations)

    def _fitted(self, budget_s: float) -> tuple[AuditSpec, tuple[str, ...]]:
        def cost(spec: AuditSpec) -> float:
            seconds = self._seconds(self._planned(spec))
            if seconds is None:
                raise AuditError(
                    "the pace of this audit cannot be measured, its attacks on a fresh network"
                    " crash: leave the budget out to see why in the record"
                )
            return seconds

        chosen, given_up = fit(self.spec, budget_s, cost, rehearsed=self._rehearsed())
        chosen, lost = fewer_pictures(self.setting, chosen)
        return chosen, (*given_up, *lost)

    def _rehearsed(self) -> int:
        """Return how many steps protection says that a rehearsed attacker takes in its life."""
        return statement_of(self.about.get("protection")).life

    def _planned(self, spec: AuditSpec) -> Plan:
        suite = suite_of(spec)
        strategies, self.left_out = fitting(strategies_of(spec), self.setting.task.metric)
        whole: tuple[Strategy, ...] = ()
        beyond = beyond_rehearsal(self.about.get("protection"), spec)
        if suite.rehearsed:
            strategies = tuple(dict.fromkeys((*strategies, *beyond, *beyond_usual(spec))))
        if suite.depth:
            model = self.subjects["protected"]
            whole = depth_attacks(block_count(model, self.setting.head), spec)
        return Plan(
            spec=spec,
            subjects=(*self.subjects, "scratch"),
            restricted=self.restricted,
            secondary=(*self.held_out, *self.benign),
            strategies=strategies,
            whole=whole,
            beyond=beyond,
            metric=self.setting.task.metric,
        )

    def _check(self) -> None:
        """Raise, before any work, what would make attacks impossible."""
        strategies = (*self.plan.strategies, *self.plan.whole)
        searched: tuple[tuple[Preparation, ...], ...] = ()
        if self.spec.search_trials:
            searched = tuple(starts(self.setting.task.metric, self.spec.steps).values())
        if searched or any(strategy.lora_rank is not None for strategy in strategies):
            require_peft()
        if self.spec.search_trials:
            require_optuna()
        check_samples(self.setting, self.spec, self.restricted)
        first = self.subjects["protected"]
        # Of a model that can be made; one that cannot be attacked is recorded as crashed.
        check_preparations(
            self._start("scratch", self._seeds[0]).model,
            (*(strategy.preparations for strategy in strategies), *searched),
            self.setting,
            self.spec.steps,
            self.bench.bare.get(self._seeds[0]),
        )
        for strategy in strategies:
            self.setting.at(strategy.precision, first)
        chosen = {strategy.batch_size for strategy in self.spec.extra}
        chosen |= set() if self.spec.batch_size is None else {self.spec.batch_size}
        usual = {s.batch_size for s in strategies if s.batch_size <= _USUAL_BATCH}
        for domain in self._domains.values():
            check_batch_fits(
                domain, max(chosen | usual), "the largest batch of the attacks (audit.batch_size)"
            )

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.spec.seeds or (0,)

    @property
    def picture_sets(self) -> int:
        """How many sets of pictures are drawn and judged after the trials, at most."""
        return expected_sets(self.setting, self.spec, self.restricted, self.plan.subjects)

    def _drawn(self) -> list[SampleRecord]:
        """Return the pictures of every subject, before and after its attacks."""
        if not wanted(self.setting, self.spec.samples):
            return []
        workload = Workload(self.bench, self._domains, self._starts)
        rows: list[SampleRecord] = []
        for domain in self.restricted:
            stage = SampleStage(workload, self.spec.samples, domain, self._sheets)
            met = [trial for trial in self.trials if trial.domain == domain.name]
            extra = strategies_of(self.spec)[-len(self.spec.extra) :] if self.spec.extra else ()
            with self._threads_of_a_trial():
                rows += stage.records(met, self.plan.subjects, steps=self.spec.steps, extra=extra)
        return rows

    def _executor(self) -> Executor:
        workload = Workload(self.bench, self._domains, self._starts)
        for seed in self._seeds:
            for subject in self.plan.subjects:
                self._start(subject, seed)
        if self.executor == "ray":
            return RayCluster(workload, self.workers, self.address)
        return Serial(workload) if self.workers == 1 else Processes(workload, self.workers)

    def _start(self, subject: Subject, seed: int) -> Start:
        """Return what an attack starts from."""
        at = (subject, seed if subject == "scratch" else 0)
        if at not in self._starts:
            model = self.subjects.get(subject)
            # Not of the protected one where that can be helped: a copy keeps its hooks.
            first = self.subjects.get("unprotected", self.subjects["protected"])
            if model is None:
                model = fresh_copy(first, self.scratch, seed=seed, names=("scratch",))
            network = network_identity(model)
            if subject == "protected" and (code := self._code()):
                # Not all of it is in the name; trials of other code are other trials.
                network += f"+{fingerprint_of(list(code))[:16]}"
            self._starts[at] = Start(model, network, weights_sha256(model))
        return self._starts[at]

    def _bare(self) -> dict[int, Bare]:
        """Return fresh values of what no reset reaches, by attack seed: none if it reaches all, or
        no attack needs them.
        """
        strategies = (*self.plan.strategies, *self.plan.whole)
        kinds = {p.kind for strategy in strategies for p in strategy.preparations}
        if not kinds & REINITIALISING and not self.spec.search_trials:
            return {}
        if not bare_parameters(self._start("scratch", self._seeds[0]).model).values:
            return {}
        return {s: bare_parameters(self._start("scratch", s).model) for s in self._seeds}

    def _key(self, assignment: Assignment) -> str:
        return self.bench.key(assignment, self._start(assignment.subject, assignment.seed))

    def _named(self, assignment: Assignment, trial: Trial) -> Trial:
        # Equal images under another name are the same trial.
        named = {"subject": assignment.subject, "domain": assignment.domain.name}
        return trial.model_copy(update=named)

    # --- The subjects ------------------------------------------------------------------------

    def _subject_records(self) -> tuple[SubjectRecord, ...]:
        vital = replace(self.setting, restricted=self.restricted)
        records = []
        for name in self.plan.subjects:
            start = self._start(name, self._seeds[0])
            records.append(
                SubjectRecord(
                    name=name,
                    weights_sha256=start.sha256,
                    file_sha256=self.about.get("files", {}).get(name),
                    original=self._originals.get(name),
                    parameters=sum(p.numel() for p in start.model.parameters()),
                    flags=health(start.model, self.subjects.get("unprotected")),
                    blocks=block_count(start.model, self.setting.head),
                    vitals=measure_vitals(start.model, vital),
                    code=self._code() if name == "protected" else (),
                    similarity=self._similarity() if name == "protected" else None,
                )
            )
        return tuple(records)

    def _original_scores(self) -> dict[Subject, Measurement]:
        """Return each subject's score on the original test split. Raises AuditError if a model
        raises.
        """
        exact, original = self.setting.exact(), self.setting.original
        scores: dict[Subject, Measurement] = {}
        for name, model in self.subjects.items():
            held = self.setting.place(copy.deepcopy(model))
            try:
                scores[name] = evaluate(held, exact, original, original.test)
            except Exception as error:
                raise AuditError(
                    f"the {name} model raises on test images of {original.name!r}"
                    f" ({type(error).__name__}: {error}): no verdict can be given on a model that"
                    " cannot do its own task; mend it first"
                ) from error
        return scores

    def _similarity(self) -> float | None:
        other = self.subjects.get("unprotected")
        return None if other is None else similarity(self.subjects["protected"], other)

    def _code(self) -> tuple[str, ...]:
        """Return what the protected model computes otherwise, beside its weights."""
        other = self.subjects.get("unprotected")
        if other is None and self.scratch is not None:
            other = self._start("scratch", self._seeds[0]).model
        return code_differences(self.subjects["protected"], other)


def _chosen(executor: str, address: str | None) -> tuple[str, str | None]:
    """Return executor and address. Raises SpecError before any work if they cannot be used."""
    if executor not in get_args(ExecutorName):
        raise SpecError(f"executor = {executor!r}: use {' or '.join(get_args(ExecutorName))}")
    if executor == "ray":
        require_ray()
    elif address is not None:
        raise SpecError(f"address = {address!r} is for executor = 'ray': add it, or leave it out")
    return executor, address


def _several(domains: Domain | Sequence[Domain]) -> tuple[Domain, ...]:
    return (domains,) if isinstance(domains, Domain) else tuple(domains)


def _job(assignment: Assignment) -> Job:
    return Job(
        assignment.subject,
        assignment.domain.name,
        assignment.strategy,
        assignment.seed,
        assignment.stop,
    )


def _require_same_architecture(first: nn.Module, other: nn.Module, name: str) -> None:
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    others = {key: value.shape for key, value in other.state_dict().items()}
    different = sorted(k for k in shapes | others if shapes.get(k) != others.get(k))
    if different:
        raise AuditError(
            f"the {name} model has another architecture than the one to audit: {len(different)}"
            f" keys differ ({', '.join(different[:3])}): compare checkpoints of one architecture"
        )


def audit(  # noqa: PLR0913 - one keyword per part of an audit
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
) -> AuditRecord:
    """Return the record of a whole audit; see `Audit` for the arguments and errors."""
    run = Audit(
        model,
        original=original,
        restricted=restricted,
        unprotected=unprotected,
        held_out=held_out,
        benign=benign,
        task=task,
        spec=spec,
        store=store,
        scratch=scratch,
        head=head,
        device=device,
        workers=workers,
        executor=executor,
        address=address,
        budget_s=budget_s,
    )
    for _ in run:
        pass
    return run.record()
