"""The pictures of an audit: what each subject draws before and after its best attack.

The attack is repeated up to its best step, with as many threads as its trial had: on the same
processor that gives the same weights. Nothing is chosen here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from sophon._attacks.suites import strategies_of
from sophon._auditing.executors import Workload
from sophon._auditing.extractors import Extractor, check_extractor, extractor_key, make_extractor
from sophon._auditing.picture_quality import check_quality, measure_quality
from sophon._auditing.plan import Plan, fitted
from sophon._auditing.trial import Job, evaluation_steps
from sophon._base.errors import SpecError
from sophon._data import Domain
from sophon._judgement.statistics import winner
from sophon._records.audit_record import SampleRecord, Trial
from sophon._records.store import DocumentStore
from sophon._specs import AuditSpec, SampleSpec, Strategy, Subject, fingerprint_of
from sophon._training.setting import Setting

# Pictures are shown larger than they are, so that a person sees them.
_SHOWN_SIDE = 64
_COLUMNS = 8
# Changes whenever pictures or distances would: stored ones are then made again.
ENGINE_VERSION = 2


def wanted(setting: Setting, spec: SampleSpec) -> bool:
    """Return whether there are pictures to judge."""
    return setting.task.draws and spec.count > 0


def expected_sets(
    setting: Setting, audit: AuditSpec, domains: Sequence[Domain], subjects: Sequence[Subject]
) -> int:
    """Return how many sets of pictures are drawn and judged after the trials, at most."""
    if not wanted(setting, audit.samples):
        return 0
    moments = 2 + len(audit.samples.budgets) + (len(audit.extra) if audit.samples.extra else 0)
    return len(domains) * len(subjects) * moments


def check_samples(setting: Setting, audit: AuditSpec, domains: Sequence[Domain]) -> None:
    """Raise SpecError or DataError, before any work, for pictures that cannot be judged."""
    spec = audit.samples
    if setting.task.kind.classifies and spec.count and spec != SampleSpec():
        raise SpecError(
            "audit.samples is for diffusion models, and this is a classifier: leave it out"
        )
    if not wanted(setting, spec):
        return
    _check_budgets(audit)
    if spec.extra and not audit.extra:
        raise SpecError(
            "audit.samples.extra = true, and audit.extra names no attack: name one there, or leave"
            " audit.samples.extra out"
        )
    check_quality(spec, (setting.original, *domains))
    setting.task.sampler(spec.steps)
    check_extractor(spec, setting.original, domains[0])


def fewer_pictures(setting: Setting, audit: AuditSpec) -> tuple[AuditSpec, tuple[str, ...]]:
    """Return the audit without shares of its budget that are one step, and what that gives up."""
    spec = audit.samples
    if not wanted(setting, spec):
        return audit, ()
    first = min(evaluation_steps(audit.steps, audit.evaluations))
    told_apart: dict[int, float] = {}
    for share in spec.budgets:
        if round(share * audit.steps) >= first:
            told_apart.setdefault(round(share * audit.steps), share)
    lost = len(spec.budgets) - len(told_apart)
    if not lost:
        return audit, ()
    samples = spec.model_copy(update={"budgets": tuple(told_apart.values())})
    what = f"pictures at {lost} of {len(spec.budgets)} shares of the budget"
    return audit.model_copy(update={"samples": samples}), (what,)


def _check_budgets(audit: AuditSpec) -> None:
    """Raise SpecError for shares of the budget at which nothing was measured, or the same twice."""
    first = min(evaluation_steps(audit.steps, audit.evaluations))
    met: dict[int, float] = {}
    for share in audit.samples.budgets:
        step = round(share * audit.steps)
        if step < first:
            raise SpecError(
                f"audit.samples.budgets = {share:g}: that is {step} of audit.steps = {audit.steps},"
                f" and attacks are measured from step {first} on: give at least"
                f" {first / audit.steps:g}"
            )
        if step in met:
            raise SpecError(
                f"audit.samples.budgets: {met[step]:g} and {share:g} are both {step} of"
                f" audit.steps = {audit.steps}: leave one out"
            )
        met[step] = share


def spread_labels(labels: Tensor, count: int) -> Tensor:
    """Return `count` of the labels, evenly over all of them: sources come sorted by class."""
    return labels[torch.arange(count) * len(labels) // count]


@dataclass
class SampleStage:
    """Draws and judges the pictures on one restricted domain; what the store holds is read."""

    workload: Workload
    spec: SampleSpec
    domain: Domain
    store: DocumentStore

    def records(
        self,
        trials: Sequence[Trial],
        subjects: Sequence[Subject],
        *,
        steps: int = 0,
        extra: Sequence[Strategy] = (),
    ) -> list[SampleRecord]:
        """Return each subject's pictures before and after its best attack, within earlier shares
        of `steps` too if the specification says so, and after the `extra` attacks.
        """
        rows: list[SampleRecord] = []
        first = min((t.seed for t in trials), default=0)
        for subject in subjects:
            own = [t for t in trials if t.subject == subject]
            last = winner(own)
            # Before and after are the same network; a fresh one differs by seed.
            rows += self._stored(subject, None, first if last is None else last.seed)
            for share in sorted(self.spec.budgets):
                budget = round(share * steps)
                rows += self._after(subject, winner(own, budget), budget=budget)
            rows += self._after(subject, last)
            for strategy in fitted(extra, self.domain) if self.spec.extra else ():
                # One seed for all subjects: nothing is chosen where an attack is named.
                named = winner([t for t in own if t.strategy == strategy and t.seed == first])
                rows += self._after(subject, named, named=True)
        return rows

    def _after(
        self,
        subject: Subject,
        trial: Trial | None,
        *,
        budget: int | None = None,
        named: bool = False,
    ) -> list[SampleRecord]:
        if trial is None:
            return []
        rows = self._stored(subject, trial, trial.seed)
        return [row.model_copy(update={"budget": budget, "named": named}) for row in rows]

    def _stored(self, subject: Subject, trial: Trial | None, seed: int) -> list[SampleRecord]:
        start, task = self.workload.start(subject, seed), self._setting.task
        sampler = task.sampler(self.spec.steps)
        parts = {
            "engine": ENGINE_VERSION,
            # What is drawn when, and checked of it, changes no picture.
            "spec": self.spec.model_dump(mode="json", exclude={"budgets", "extra", "width"}),
            "extractor": self._extractor_key,
            "start": [start.sha256, start.network],
            "trial": None if trial is None else [trial.key, trial.best_step],
            "domains": [d.fingerprint() for d in (self._setting.original, self.domain)],
            "names": [self._setting.original.name, self.domain.name, subject],
            "task": task.name,
            "sampler": {k: repr(v) for k, v in sampler.config.items() if not k.startswith("_")},
            "precision": self._setting.precision,
        }
        key = fingerprint_of(parts)
        held = self.store.get(key)
        if held is None:
            drawn = self._drawn(subject, trial, seed)
            held = {"rows": [row.model_dump(mode="json") for row in drawn]}
            self.store.put(key, held)
        # What is as it is has no seed; here it goes with the attack beside it.
        return [SampleRecord.model_validate({**row, "seed": seed}) for row in held["rows"]]

    @property
    def _setting(self) -> Setting:
        return self.workload.bench.setting

    @cached_property
    def _extractor(self) -> Extractor:
        return make_extractor(self.spec, self._setting.original, self.domain)

    @cached_property
    def _extractor_key(self) -> str:
        return extractor_key(self.spec, self._setting.original, self.domain)

    def _drawn(self, subject: Subject, trial: Trial | None, seed: int) -> list[SampleRecord]:
        start, setting = self.workload.start(subject, seed), self._setting
        model: nn.Module = start.model
        if trial is not None:
            job = Job(subject, self.domain.name, trial.strategy, trial.seed)
            model = self.workload.bench.attacked(job, start, trial.best_step or 0)
        judged = [self.domain]
        # Whether the original task is kept shows in pictures too.
        judged += [setting.original] if trial is None and subject != "scratch" else []
        return [self._judged(model, domain, subject, trial, seed) for domain in judged]

    def _judged(
        self, model: nn.Module, domain: Domain, subject: Subject, trial: Trial | None, seed: int
    ) -> SampleRecord:
        setting, task = self._setting, self._setting.task
        labels = spread_labels(domain.train.labels, self.spec.count)
        shape = (setting.channels, *domain.image_shape[1:])
        samples = task.draw(model, shape, labels, steps=self.spec.steps)
        quality = measure_quality(samples, domain.test.pixels, self._extractor, self.spec)
        return SampleRecord(
            subject=subject,
            domain=domain.name,
            attacked=self.domain.name,
            attack="" if trial is None else trial.strategy.label(),
            seed=seed,
            best_step=None if trial is None else trial.best_step,
            count=len(samples),
            images=len(domain.test),
            steps=self.spec.steps,
            extractor=self._extractor.name,
            extractor_key=self._extractor_key,
            features=self._extractor.width,
            grid=picture_grid(samples[: self.spec.grid]),
            **quality._asdict(),
        )


def drawn(
    workload: Workload, plan: Plan, trials: Sequence[Trial], store: DocumentStore
) -> list[SampleRecord]:
    """Return the pictures of every subject, before and after its attacks; none if not `wanted`."""
    spec = plan.spec
    if not wanted(workload.bench.setting, spec.samples):
        return []
    extra = strategies_of(spec)[-len(spec.extra) :] if spec.extra else ()
    rows: list[SampleRecord] = []
    for domain in plan.restricted:
        stage = SampleStage(workload, spec.samples, domain, store)
        met = [trial for trial in trials if trial.domain == domain.name]
        rows += stage.records(met, plan.subjects, steps=spec.steps, extra=extra)
    return rows


def picture_grid(images: Tensor) -> str:
    """Return uint8 images (n, c, h, w) side by side, as the data URI of a PNG."""
    count, channels, height, width = images.shape
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    sheet = Image.new("L" if channels == 1 else "RGB", (columns * width, rows * height))
    for position, image in enumerate(images):
        pixels = image[0] if channels == 1 else image.permute(1, 2, 0)
        at = (position % columns * width, position // columns * height)
        sheet.paste(Image.fromarray(pixels.numpy()), at)
    scale = max(1, _SHOWN_SIDE // width)
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
