"""The pictures of an audit: what each subject draws before and after its best attack.

The attack is repeated up to its best step, which gives the same weights; nothing is chosen here.
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

from sophon._data import Domain
from sophon._executors import Workload
from sophon._quality import (
    Extractor,
    check_extractor,
    check_quality,
    draw_samples,
    make_extractor,
    make_sampler,
    measure_quality,
)
from sophon._records import SampleRecord, Trial
from sophon._setting import Setting
from sophon._specs import SampleSpec, Strategy, Subject, fingerprint_of
from sophon._statistics import winner
from sophon._store import DocumentStore
from sophon._tasks import Denoising
from sophon._trials import Assignment

# Pictures are shown larger than they are, so that a person sees them.
_SHOWN_SIDE = 64
_COLUMNS = 8


def wanted(setting: Setting, spec: SampleSpec) -> bool:
    """Return whether there are pictures to judge: not of classifiers, nor of one timestep alone."""
    task = setting.task
    return isinstance(task, Denoising) and len(task.parts) > 1 and spec.count > 0


def check_samples(setting: Setting, spec: SampleSpec, domains: Sequence[Domain]) -> None:
    """Raise SpecError or DataError, before any work, for pictures that cannot be judged."""
    if not wanted(setting, spec):
        return
    assert isinstance(setting.task, Denoising)
    check_quality(spec, (setting.original, *domains))
    make_sampler(setting.task, spec.steps)
    check_extractor(spec, setting.original, domains[0])


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
        seed = trials[0].seed if trials else 0
        for subject in subjects:
            rows += self._stored(subject, None, seed)
            own = [t for t in trials if t.subject == subject]
            for share in sorted(self.spec.budgets):
                budget = max(1, round(share * steps))
                best = winner(own, budget)
                rows += self._after(subject, best, budget=budget)
            rows += self._after(subject, winner(own))
            for strategy in extra if self.spec.extra else ():
                named = winner([t for t in own if t.strategy == strategy])
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
        assert isinstance(task, Denoising)
        sampler = make_sampler(task, self.spec.steps)
        parts = {
            "spec": self.spec.model_dump(mode="json"),
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
        return [SampleRecord.model_validate(row) for row in held["rows"]]

    @property
    def _setting(self) -> Setting:
        return self.workload.bench.setting

    @cached_property
    def _extractor(self) -> Extractor:
        return make_extractor(self.spec, self._setting.original, self.domain)

    def _drawn(self, subject: Subject, trial: Trial | None, seed: int) -> list[SampleRecord]:
        start, setting = self.workload.start(subject, seed), self._setting
        model: nn.Module = start.model
        if trial is not None:
            assignment = Assignment(subject, self.domain, trial.strategy, trial.seed)
            model = self.workload.bench.attacked(assignment, start, trial.best_step or 0)
        judged = [self.domain]
        # Whether the original task is kept shows in pictures too.
        judged += [setting.original] if trial is None and subject != "scratch" else []
        return [self._judged(model, domain, subject, trial) for domain in judged]

    def _judged(
        self, model: nn.Module, domain: Domain, subject: Subject, trial: Trial | None
    ) -> SampleRecord:
        setting, task = self._setting, self._setting.task
        assert isinstance(task, Denoising)
        labels = spread_labels(domain.train.labels, self.spec.count)
        shape = (setting.channels, *domain.image_shape[1:])
        samples = draw_samples(model, task, shape, labels, steps=self.spec.steps)
        quality = measure_quality(samples, domain.test.pixels, self._extractor, self.spec)
        return SampleRecord(
            subject=subject,
            domain=domain.name,
            attacked=self.domain.name,
            attack="" if trial is None else trial.strategy.label(),
            count=len(samples),
            images=len(domain.test),
            steps=self.spec.steps,
            extractor=self._extractor.name,
            features=self._extractor.width,
            grid=picture_grid(samples[: self.spec.grid]),
            **quality._asdict(),
        )


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
