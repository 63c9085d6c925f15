"""One trial: an attack on one subject, measured as it goes. The same for every subject."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from sophon._base.plain_mode import plain
from sophon._data import Domain
from sophon._judgement.statistics import first_evaluation
from sophon._models import Bare, batch_norm_reestimated, foreign_hooks, merged_lora
from sophon._records.audit_record import (
    SCHEMA_VERSION,
    Completed,
    Crashed,
    Diverged,
    Measurement,
    Outcome,
    Point,
    Stopped,
    Trial,
    pack,
)
from sophon._specs import Strategy, Subject, fingerprint_of
from sophon._training.environment import environment
from sophon._training.evaluate import evaluate, image_scores
from sophon._training.loop import ENGINE_VERSION, FineTuning, attacker_copy, attacker_images
from sophon._training.setting import Setting

# Preparations that give layers fresh weights by their own reset.
REINITIALISING = frozenset({"distil", "keep_span", "reset_last_blocks", "shrink_perturb"})
# Images that BatchNorm statistics are measured anew on, at each evaluation.
_REESTIMATE_ON = 256


class Job(NamedTuple):
    """One trial to run: which attack, on which subject and domain, with which seed.

    Subject and domain are names, so that a job is small where it is sent to a worker. With `stop`
    the attack ends after so many steps of its budget: what a prefilter needs.
    """

    subject: Subject
    domain: str
    strategy: Strategy
    seed: int
    stop: int | None = None


class Start(NamedTuple):
    """What an attack starts from, never to be changed: the network, its class, its hash."""

    model: nn.Module
    network: str
    sha256: str


@dataclass(frozen=True)
class Bench:
    """Where trials are run: the setting, and how often an attack is measured.

    `bare` are fresh values of parameters that no reset reaches, by attack seed, where the network
    has such.
    """

    setting: Setting
    evaluations: int
    bare: Mapping[int, Bare] = field(default_factory=dict, repr=False, compare=False)

    def domain(self, job: Job) -> Domain:
        """Return the domain that a job attacks on: one of the setting's restricted ones."""
        return next(d for d in self.setting.restricted if d.name == job.domain)

    def key(self, job: Job, start: Start) -> str:
        """Return the fingerprint of everything that determines a trial."""
        setting, domain = self.setting, self.domain(job)
        parts = {
            "schema": SCHEMA_VERSION,
            "engine": ENGINE_VERSION,
            # Two subjects may hold equal weights and yet compute differently.
            "subject": job.subject,
            "network": start.network,
            "weights": start.sha256,
            "strategy": job.strategy.keyed(),
            "seed": job.seed,
            "domain": domain.fingerprint(),
            "normalisation": setting.normalisation(domain),
            "evaluations": self.evaluations,
            "precision": setting.precision,
            "task": setting.task.name,
            "head": setting.head,
        }
        if job.stop is not None:
            parts["stop"] = job.stop
        if plain():
            parts["plain"] = True
        if job.strategy.preparations:
            # Some train on the original domain first.
            parts["original"] = setting.original.fingerprint()
        kinds = {preparation.kind for preparation in job.strategy.preparations}
        bare = self.bare.get(job.seed)
        if bare is not None and kinds & REINITIALISING:
            parts["bare"] = bare.sha256()
        if "distil" in kinds and foreign_hooks(start.model):
            parts["student"] = "without hooks"
        return fingerprint_of(parts)

    def run(self, job: Job, start: Start) -> Trial:
        """Return the finished trial; an attack that raised is one too, with its traceback."""
        begun = time.perf_counter()
        progress = _Progress()
        try:
            outcome = self._attack(job, start, progress)
        except Exception as error:  # noqa: BLE001 - a crashed attack is a result, kept with its trace
            progress.test = None
            outcome = Crashed(
                error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()
            )
        return self._trial(job, start, progress, outcome, time.perf_counter() - begun)

    def crashed(self, job: Job, start: Start, error: str) -> Trial:
        """Return the trial of an attack that took its process with it: nothing of it is left."""
        outcome = Crashed(error=error, traceback="")
        return self._trial(job, start, _Progress(), outcome, 0.0)

    def _trial(
        self, job: Job, start: Start, progress: _Progress, outcome: Outcome, wall_s: float
    ) -> Trial:
        return Trial(
            key=self.key(job, start),
            subject=job.subject,
            domain=job.domain,
            strategy=job.strategy,
            seed=job.seed,
            curve=tuple(progress.curve),
            best_step=progress.best_step,
            test=progress.test,
            outcome=outcome,
            wall_s=wall_s,
            environment=environment(self.setting.device, self.setting.precision),
        )

    def attacked(self, job: Job, start: Start, steps: int) -> nn.Module:
        """Return the network that an attack leaves after `steps` steps, adapters merged."""
        tuning = self._begun(job, start)
        for _ in tuning.run(max(0, steps - tuning.taken)):
            pass
        return merged_lora(tuning.model)

    def _begun(self, job: Job, start: Start) -> FineTuning:
        """Return an attack before its first step."""
        domain, strategy, seed = self.domain(job), job.strategy, job.seed
        model = copy.deepcopy(start.model)
        stream = (seed, ("attack",))
        feed = self.setting.feed(
            domain,
            attacker_images(domain, strategy.data_fraction, stream),
            batch_size=strategy.batch_size,
            stream=(seed, ("attack", "batches")),
            augmentation=strategy.augmentation,
        )
        classes = self.setting.task.classes(domain)
        prepared = attacker_copy(
            model,
            strategy,
            self.setting,
            classes=classes,
            feed=feed,
            stream=stream,
            bare=self.bare.get(seed),
        )
        return FineTuning(model, strategy, self.setting, feed, stream=stream, taken=prepared.spent)

    def _attack(self, job: Job, start: Start, progress: _Progress) -> Outcome:
        tuning, domain = self._begun(job, start), self.domain(job)
        outcome = self._advance(tuning, domain, progress, job.stop)
        if progress.best is not None:
            tuning.model.load_state_dict(progress.best)
            merged = merged_lora(tuning.model)
            progress.test = evaluate(merged, tuning.setting, domain, domain.test)
        return outcome

    def _advance(
        self, tuning: FineTuning, domain: Domain, progress: _Progress, stop: int | None
    ) -> Outcome:
        steps = tuning.strategy.steps
        due = evaluation_steps(steps, self.evaluations)
        # What a preparation spent is not measured on the way, only at its end.
        self._measure(tuning, domain, progress, None)
        last = steps if stop is None else min(stop, steps)
        for step in tuning.run(max(0, last - tuning.taken)):
            if step.taken not in due:
                continue
            loss = float(step.loss)
            if not np.isfinite(loss):
                return Diverged(step=step.taken)
            self._measure(tuning, domain, progress, loss)
        return Completed() if last == steps else Stopped(step=last)

    def _measure(
        self, tuning: FineTuning, domain: Domain, progress: _Progress, loss: float | None
    ) -> None:
        """Score the model as it is and with BatchNorm measured anew; the better one counts.

        Running statistics lag behind the weights, and at first they are the publisher's. A real
        attacker would not let that cost anything.
        """
        model, setting = tuning.model, tuning.setting
        scores = image_scores(model, setting, domain, domain.validation)
        score = setting.task.measure(scores)
        progress.met(tuning.taken, score, model)
        size = tuning.strategy.batch_size
        batches = (tuning.feed.batch(step)[0] for step in range(math.ceil(_REESTIMATE_ON / size)))
        reestimated = False
        with setting.autocast(), batch_norm_reestimated(model, batches) as anew:
            if anew:
                others = image_scores(model, setting, domain, domain.validation)
                other = setting.task.measure(others)
                reestimated = other.value > score.value
                if reestimated:
                    scores, score = others, other
                    progress.met(tuning.taken, score, model)
        progress.curve.append(
            Point(
                step=tuning.taken,
                samples=tuning.taken * size,
                validation=score,
                reestimated=reestimated,
                train_loss=loss,
                by_image=pack(scores.mean(0).numpy(), score),
            )
        )


@dataclass
class _Progress:
    """What a running trial has measured so far."""

    curve: list[Point] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_score: Measurement | None = None
    best_step: int | None = None
    test: Measurement | None = None

    def met(self, step: int, score: Measurement, model: nn.Module) -> None:
        """Remember the weights if they are the best so far."""
        if self.best_score is None or score.value > self.best_score.value:
            self.best_score, self.best_step = score, step
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}


def evaluation_steps(steps: int, evaluations: int) -> frozenset[int]:
    """Return the steps after which an attack is measured: geometric from 1/40 of the horizon."""
    due = np.geomspace(first_evaluation(steps), steps, evaluations)
    return frozenset(round(value) for value in due.tolist())


def stop_at(steps: int, evaluations: int, share: float) -> int:
    """Return the last step at or before `share` of the budget at which an attack is measured."""
    due = sorted(evaluation_steps(steps, evaluations))
    return max((step for step in due if step <= share * steps), default=due[0])
