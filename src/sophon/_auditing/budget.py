"""How long an audit will take, and what to give up where it must take less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sophon._attacks.suites import suite_of
from sophon._auditing.plan import Work
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import AuditError
from sophon._records.store import DocumentStore
from sophon._specs import AuditSpec, fingerprint_of, parse_spec

# Steps of the two trials that are measured.
_FEW, _MORE = 2, 12
# No verdict is good news on fewer seeds, and no horizon is believed below ten times K.
_LEAST_SEEDS = 3
# A curve of fewer measurements is none.
_LEAST_EVALUATIONS = 4
_TIMES_REHEARSED = 10


@dataclass(frozen=True)
class Pace:
    """What trials take here, in seconds: each image of a step, each measurement, each start."""

    image_s: float
    measurement_s: float
    trial_s: float

    def seconds(self, work: Work) -> float:
        """Return what `work` takes, one trial after another."""
        measured = work.measurements * self.measurement_s
        return work.images * self.image_s + measured + work.trials * self.trial_s


@dataclass(frozen=True)
class AuditForecast:
    """What an audit is expected to take in all: trials, optimizer steps and seconds.

    `seconds` is None where the measured trials crashed.
    """

    trials: int
    steps: int
    seconds: float | None


def measure_pace(bench: Bench, job: Job, start: Start) -> Pace | None:
    """Return what trials take, from three short ones; None if one of them crashed.

    `job` says where; its strategy's batch size is kept.
    """

    def seconds(steps: int, evaluations: int) -> tuple[float, int] | None:
        strategy = job.strategy.model_copy(update={"steps": steps})
        trial = replace(bench, evaluations=evaluations).run(job._replace(strategy=strategy), start)
        return None if trial.outcome.kind == "crashed" else (trial.wall_s, len(trial.curve))

    # The first trial of a process pays for what is only set up once.
    if seconds(_FEW, 2) is None:
        return None
    short, long, dense = (seconds(_FEW, 2), seconds(_MORE, 2), seconds(_MORE, _MORE))
    if short is None or long is None or dense is None:
        return None
    step_s = max(1e-6, (long[0] - short[0]) / (_MORE - _FEW))
    measurement_s = max(0.0, (dense[0] - long[0]) / max(1, dense[1] - long[1]))
    trial_s = max(0.0, short[0] - _FEW * step_s - short[1] * measurement_s)
    return Pace(step_s / job.strategy.batch_size, measurement_s, trial_s)


def fit(
    spec: AuditSpec, seconds: float, cost: Callable[[AuditSpec], float], *, rehearsed: int = 0
) -> tuple[AuditSpec, tuple[str, ...]]:
    """Return the largest audit that costs at most `seconds`, and what it gives up against `spec`.

    The search gives way first, then seeds down to three, then steps down to half or ten times
    the `rehearsed` ones; then every other measurement, and of a suite that goes by stages the
    share of the budget before most attacks are stopped and how many go on. Never the suite's
    attacks. Raises AuditError, naming the least time, where that is not enough.
    """
    for chosen, given_up in _smaller(spec, rehearsed):
        if cost(chosen) <= seconds:
            return chosen, given_up
    least = cost(chosen)
    seeds = len(chosen.seeds or ())
    without = " without the search," if spec.search_trials else ""
    smaller = "look-1" if suite_of(spec).prefilter is None else "quick-2"
    other = "" if spec.suite == smaller else f", or take audit.suite = {smaller!r}"
    raise AuditError(
        f"a budget of {_duration(seconds)} is too short: even{without} on {seeds} attack"
        f" seed{'' if seeds == 1 else 's'} of {chosen.steps} steps this audit takes about"
        f" {_duration(least)}: raise --budget, use more --workers, or lower audit.steps or"
        f" audit.seeds yourself{other}"
    )


def decided(
    decisions: DocumentStore,
    asked: dict[str, Any],
    choose: Callable[[], tuple[AuditSpec, tuple[str, ...]]],
) -> tuple[AuditSpec, tuple[str, ...]]:
    """Return what `choose` does, an audit and what it gives up, as an earlier run decided it.

    Audits of several protections of one model ask alike and decide alike: they can be compared,
    and share their trials of the unprotected and of the fresh network.
    """
    key = fingerprint_of(asked)
    if decisions.get(key) is None:
        chosen, given_up = choose()
        made = {"chosen": chosen.model_dump(mode="json"), "given_up": list(given_up)}
        decisions.put(key, {**asked, **made})
    # Of two audits that measure at once the first to be done decides.
    held = decisions.get(key) or {}
    where = f"the budget's decision {key}"
    return parse_spec(AuditSpec, held["chosen"], where=where), tuple(held["given_up"])


def least_steps(spec: AuditSpec, rehearsed: int) -> int:
    """Return the fewest steps of an attack that a budget may leave, as `rehearsed` ones allow."""
    return min(spec.steps, max(spec.steps // 2, _TIMES_REHEARSED * rehearsed))


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def _smaller(spec: AuditSpec, rehearsed: int) -> Iterator[tuple[AuditSpec, tuple[str, ...]]]:
    """Yield ever smaller audits with what each gives up, the whole one first."""
    yield spec, ()
    kept: tuple[str, ...] = ()
    for options in _concessions(spec, rehearsed):
        lost = kept
        for changes, what in options:
            lost = (*kept, what)
            spec = spec.model_copy(update=changes)
            yield spec, lost
        kept = lost


def _concessions(spec: AuditSpec, rehearsed: int) -> Iterator[list[tuple[dict[str, object], str]]]:
    """Yield what may be given up, one thing after another, each by degrees."""
    search = spec.search_trials or 0
    yield [
        ({"search_trials": n}, f"{search - n} of {search} searched strategies on each subject")
        for n in range(search - 1, -1, -1)
    ]
    seeds = spec.seeds or (0,)
    yield [
        ({"seeds": seeds[:n]}, f"{len(seeds) - n} of {len(seeds)} attack seeds")
        for n in range(len(seeds) - 1, _LEAST_SEEDS - 1, -1)
    ]
    least = least_steps(spec, rehearsed)
    fewer = sorted({round(spec.steps * s) for s in (0.9, 0.8, 0.7, 0.6, 0.5)}, reverse=True)
    yield [
        (
            {"steps": n, "extra": tuple(s.model_copy(update={"steps": n}) for s in spec.extra)},
            f"{spec.steps - n} of {spec.steps} steps of every attack",
        )
        for n in fewer
        if least <= n < spec.steps
    ]
    half = spec.evaluations // 2
    if half >= _LEAST_EVALUATIONS:
        lost = f"{spec.evaluations - half} of {spec.evaluations} measurements of every attack"
        yield [({"evaluations": half}, lost)]
    suite = suite_of(spec)
    if suite.prefilter is not None:
        share, several = spec.prefilter or suite.prefilter, spec.survivors or suite.survivors
        lost = f"most attacks are stopped at {share / 2:.3g} of the budget instead of {share:.3g}"
        yield [({"prefilter": share / 2}, lost)]
        yield [
            ({"survivors": n}, f"{n} instead of {several} attacks of each subject go on from there")
            for n in range(several - 1, 1, -1)
        ]
