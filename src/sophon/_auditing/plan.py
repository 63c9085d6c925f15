"""Which trials an audit runs, in which order: everything, or in stages that build on each other.

Every decision is taken from trials on the validation split, for all subjects by the same rule, and
from whole stages only, so neither workers nor interruptions change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

from sophon._attacks.kinds import method, patient, trains_first
from sophon._attacks.search import AT_ONCE, AttackerSearch
from sophon._attacks.suites import Suite, fitting, secondary_of, suite_of
from sophon._auditing.trial import Job, evaluation_steps, stop_at
from sophon._data import Domain
from sophon._judgement.statistics import best_of, envelope_area, winner
from sophon._records.audit_record import Point, Trial, unpack
from sophon._records.metrics import MetricKind, kind_of
from sophon._specs import AuditSpec, Strategy, Subject
from sophon._training.loop import image_count

# Attacks that lead somewhere: enough of each subject's for its envelope, nearly, and no more.
_LEADERS = 4
# How many of them a subject has in most audits, its winner included: for forecasts.
_USUAL_LEADERS = 3
# How sure it must be that an attack has moved by the stop, whichever of them it is.
_LUCK = 0.025
# Secondary domains are attacked with so many seeds at most.
_SECONDARY_SEEDS = 3


class Work(NamedTuple):
    """How much there is to do; `images` are those of all steps, measurements those of a model."""

    trials: int
    steps: int
    images: int
    measurements: int


@dataclass
class Plan:
    """Decides which trials an audit runs, batch after batch: ask `next` until it is None.

    `strategies` are the suite's and the extra ones, `whole` more that no prefilter stops, `beyond`
    those whose rates a search must reach; `metric` is the task's, which has no use for what is
    `left_out`. `trials` are those met so far.
    """

    spec: AuditSpec
    subjects: tuple[Subject, ...]
    restricted: tuple[Domain, ...]
    secondary: tuple[Domain, ...]
    strategies: tuple[Strategy, ...]
    whole: tuple[Strategy, ...] = ()
    beyond: tuple[Strategy, ...] = ()
    metric: str = "accuracy"
    left_out: tuple[str, ...] = ()
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batches = self._in_order()

    @property
    def suite(self) -> Suite:
        """The suite."""
        return suite_of(self.spec)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The attack seeds."""
        return self.spec.seeds or self.suite.seeds

    @property
    def staged(self) -> bool:
        """Whether later trials depend on what earlier ones reached."""
        return self.suite.prefilter is not None or bool(self.spec.search_trials)

    @property
    def survivors(self) -> int:
        """How many of each subject's attacks a prefilter lets go on."""
        return self.spec.survivors or self.suite.survivors

    def expected(self) -> Work:
        """Return how much work the audit is: exactly, or about as much if `staged`.

        As if the prefilter could tell attacks apart: where it cannot, all of them go on.
        """
        due = evaluation_steps(self.spec.steps, self.spec.evaluations)
        work = Work(0, 0, 0, 0)
        for count, steps, batch_size in self._expected():
            # Each is measured at its start too.
            measured = count * (1 + sum(step <= steps for step in due))
            more = (count, count * steps, count * steps * batch_size, measured)
            work = Work(*(held + round(extra) for held, extra in zip(work, more, strict=True)))
        return work

    def _expected(self) -> Iterator[tuple[float, int, int]]:
        """Yield how many trials of how many steps and of what batch there are to be."""
        whole, usual = self.spec.steps, Strategy.model_fields["batch_size"].default
        several, stop = len(self.subjects), self._stop() or self.spec.steps
        every = 1 if self.suite.headline else len(self.seeds)
        for domain in self.restricted:
            early, late = self._early_and_late(domain)
            yield from ((several * every, stop, strategy.batch_size) for strategy in early)
            yield from ((several * every, whole, strategy.batch_size) for strategy in late)
            if stop < whole:
                survivors = min(len(early), self.survivors * 2 + len({method(s) for s in early}))
                yield several * survivors, whole, usual
            search = (self.spec.search_trials or 0) * several
            yield search, stop, usual
            yield search / 2 if stop < whole else 0, whole, usual
            if self.suite.headline or search:
                again = len(self.seeds) - every
                # Leaders of one subject are new to the others' searches, and to later seeds.
                leaders = _USUAL_LEADERS * several
                yield several * (leaders * again + search / several / 4), whole, usual
        for domain in self.secondary:
            seeds = min(_SECONDARY_SEEDS, len(self.seeds))
            for strategy in self._secondary_for(domain):
                yield several * seeds, whole, strategy.batch_size

    def next(self, results: Sequence[Trial] = ()) -> list[Job] | None:
        """Return the next batch of trials to run, or None where all were.

        `results` are the trials of the batch before, all of them: they decide what is next. Where
        a batch asks for a trial that was met before, its result need not be given again.
        """
        self.trials += results
        return next(self._batches, None)

    def _in_order(self) -> Iterator[list[Job]]:
        for domain in self.restricted:
            yield from self._suite_stages(domain)
            yield from self._search_stages(domain)
            if self.suite.headline or self.spec.search_trials:
                yield self._each(domain, self._leaders(domain), self.seeds)
        for domain in self.secondary:
            seeds = self.seeds[:_SECONDARY_SEEDS]
            yield self._each(domain, self._secondary_for(domain), seeds)

    # --- The suite ---------------------------------------------------------------------------

    def _suite_for(self, domain: Domain) -> list[Strategy]:
        return fitted((*self.strategies, *self.whole), domain)

    def _secondary_for(self, domain: Domain) -> list[Strategy]:
        own, _ = fitting(secondary_of(self.spec), self.metric)
        return fitted(own or self.strategies, domain)

    def _suite_stages(self, domain: Domain) -> Iterator[list[Job]]:
        chosen = self._suite_for(domain)
        first = self.seeds[:1]
        if self.suite.prefilter is None:
            yield self._each(domain, chosen, first if self.suite.headline else self.seeds)
            return
        early, late = self._early_and_late(domain)
        yield [*self._each(domain, early, first, self._stop()), *self._each(domain, late, first)]
        yield self._each(domain, self._survivors(domain, early), first)

    def _early_and_late(self, domain: Domain) -> tuple[list[Strategy], list[Strategy]]:
        """Return the attacks that a prefilter may stop, and those that it may not."""
        chosen = self._suite_for(domain)
        whole = set(fitted(self.whole, domain))
        late = [s for s in chosen if patient(s) or s in whole]
        return [s for s in chosen if s not in set(late)], late

    def _stop(self) -> int | None:
        """Return where a prefilter stops attacks; None where it lets all of them end."""
        if self.suite.prefilter is None:
            return None
        share = self.spec.prefilter or self.suite.prefilter
        step = stop_at(self.spec.steps, self.spec.evaluations, share)
        return step if step < self.spec.steps else None

    def _survivors(self, domain: Domain, early: Sequence[Strategy]) -> list[Strategy]:
        """Return the attacks that go on: each subject's best, and its best of every method.

        All of a method go on where none of them has moved on some subject: what is best there is
        luck, and a defence that lets one method pass must not choose the others' attackers.
        """
        methods: dict[tuple[str, ...], list[Strategy]] = {}
        for strategy in early:
            methods.setdefault(method(strategy), []).append(strategy)
        kept = {
            strategy
            for several in methods.values()
            if not all(self._moved(domain, subject, several) for subject in self.subjects)
            for strategy in several
        }
        for subject in self.subjects:
            trials = [t for t in self._met(domain, subject) if t.strategy in set(early)]
            ranked = sorted(trials, key=best_of, reverse=True)
            kept.update(t.strategy for t in ranked[: self.survivors])
            kept.update({method(t.strategy): t.strategy for t in reversed(ranked)}.values())
            kept.update(_holders(trials))
        return [strategy for strategy in early if strategy in kept]

    def _moved(self, domain: Domain, subject: Subject, strategies: Sequence[Strategy]) -> bool:
        """Return whether the stop can tell any of the attacks from its start and from guessing."""
        chosen, stop = set(strategies), self._stop() or self.spec.steps
        trials = [t for t in self._met(domain, subject) if t.strategy in chosen]
        level = _LUCK / max(1, len(trials))
        return any(_has_moved(trial, stop, domain, level) for trial in trials)

    # --- The search --------------------------------------------------------------------------

    def _search_stages(self, domain: Domain) -> Iterator[list[Job]]:
        left = self.spec.search_trials or 0
        if not left:
            return
        seed, stop = self.seeds[0], self._stop()
        searches: dict[Subject, AttackerSearch] = {}
        for name in self.subjects:
            searches[name] = search = AttackerSearch(
                seed,
                self.spec.steps,
                len(domain.train),
                batch_size=self.spec.batch_size,
                metric=self.metric,
                beyond=self.beyond,
                stop=stop,
            )
            for strategy in dict.fromkeys(t.strategy for t in self._met(domain, name)):
                search.learn(strategy, self._reached(domain, name, strategy))
        while left:
            count = min(AT_ONCE, left)
            left -= count
            asked = {name: search.ask(count) for name, search in searches.items()}
            yield self._of_each(domain, asked, stop)
            if stop is not None:
                yield self._of_each(domain, self._going_on(domain, asked), None)
            for name, strategies in asked.items():
                searches[name].tell([self._reached(domain, name, s) for s in strategies])

    def _of_each(
        self, domain: Domain, asked: dict[Subject, list[Strategy]], stop: int | None
    ) -> list[Job]:
        return [
            Job(name, domain.name, strategy, self.seeds[0], stop)
            for name, strategies in asked.items()
            for strategy in strategies
        ]

    def _going_on(
        self, domain: Domain, asked: dict[Subject, list[Strategy]]
    ) -> dict[Subject, list[Strategy]]:
        """Return the better half of each subject's proposals: as many for each subject.

        What trains beforehand pays off late and goes on first. All go on where none has moved on
        some subject.
        """
        if not all(self._moved(domain, name, strategies) for name, strategies in asked.items()):
            return asked
        late = max(sum(map(trains_first, strategies)) for strategies in asked.values())
        chosen: dict[Subject, list[Strategy]] = {}
        for name, strategies in asked.items():
            scored = [(trains_first(s), self._reached(domain, name, s), s) for s in strategies]
            ranked = [s for *_, s in sorted(scored, key=lambda one: one[:2], reverse=True)]
            chosen[name] = ranked[: max(late, (len(ranked) + 1) // 2)]
        return chosen

    def _reached(self, domain: Domain, subject: Subject, strategy: Strategy) -> float:
        """Return the area under a strategy's best-so-far, as far as it was run."""
        return self._area([t for t in self._met(domain, subject) if t.strategy == strategy])

    def _area(self, trials: Sequence[Trial]) -> float:
        at = sorted(evaluation_steps(self.spec.steps, self.spec.evaluations))
        return envelope_area(trials, at)

    # --- What is run with every seed ---------------------------------------------------------

    def _leaders(self, domain: Domain) -> list[Strategy]:
        """Return each subject's winner and the attacks that make up its envelope, best first."""
        chosen: dict[Strategy, None] = {}
        for subject in self.subjects:
            met = self._met(domain, subject)
            if (best_trial := winner(met)) is not None:
                chosen[best_trial.strategy] = None
            by_strategy: dict[Strategy, list[Trial]] = {}
            for trial in met:
                by_strategy.setdefault(trial.strategy, []).append(trial)
            full = self._area(met)
            held: list[Trial] = []
            close = next((kind_of(t.curve[0].validation).close for t in met), 0.0)
            for _ in range(_LEADERS):
                if not by_strategy or self._area(held) >= full - close:
                    break
                best = max(by_strategy, key=lambda s: self._area([*held, *by_strategy[s]]))
                chosen[best] = None
                held += by_strategy.pop(best)
        return list(chosen)

    def _met(self, domain: Domain, subject: Subject) -> list[Trial]:
        """Return the trials met so far on a subject with the first seed."""
        return [
            t
            for t in self.trials
            if (t.domain, t.subject, t.seed) == (domain.name, subject, self.seeds[0]) and t.curve
        ]

    def _each(
        self,
        domain: Domain,
        strategies: Iterable[Strategy],
        seeds: Iterable[int],
        stop: int | None = None,
    ) -> list[Job]:
        strategies = list(strategies)
        return [
            Job(subject, domain.name, strategy, seed, stop)
            for seed in seeds
            for strategy in strategies
            for subject in self.subjects
        ]


def _has_moved(trial: Trial, stop: int, domain: Domain, level: float) -> bool:
    """Return whether by `stop` an attack's score is above where it started and above guessing, by
    more than is small for the metric and than chance allows in one of 1 / `level` cases.
    """
    points = [point for point in trial.curve if point.step <= stop]
    if len(points) < 2:
        return False
    start = points[0]
    best = max(points[1:], key=lambda point: point.validation.value)
    score, kind = best.validation, kind_of(best.validation)
    sure = NormalDist().inv_cdf(1 - level)
    gain = score.value - start.validation.value
    lead = score.value - _guess(domain, kind)
    own = math.sqrt(score.variance / score.total)
    return gain > max(kind.close, sure * _noise(start, best)) and lead > max(kind.close, sure * own)


def _noise(start: Point, best: Point) -> float:
    """Return the standard error of how far two scores are apart; they are of the same images."""
    first, second = start.validation, best.validation
    if start.by_image is None or best.by_image is None:
        return math.sqrt((first.variance + second.variance) / second.total)
    change = unpack(best.by_image, second) - unpack(start.by_image, first)
    return float(change.std() / math.sqrt(len(change)))


def _guess(domain: Domain, kind: MetricKind) -> float:
    """Return what guessing gives: of classes that are not equally frequent, the largest."""
    _, counts = domain.validation.labels.unique(return_counts=True)
    return kind.chance(domain.class_count, int(counts.max()) / len(domain.validation))


def _holders(trials: Sequence[Trial]) -> set[Strategy]:
    """Return the strategies that are best at some budget."""
    steps = sorted({point.step for trial in trials for point in trial.curve})
    holders = set()
    for budget in steps:
        reached = [
            (max((p.validation.value for p in t.curve if p.step <= budget), default=-1.0), -i)
            for i, t in enumerate(trials)
        ]
        holders.add(trials[-max(reached)[1]].strategy)
    return holders


def fitted(strategies: Iterable[Strategy], domain: Domain) -> list[Strategy]:
    """Return the strategies with batches that the domain's images allow, none twice."""
    chosen: dict[Strategy, None] = {}
    for strategy in strategies:
        size = min(strategy.batch_size, image_count(domain, strategy.data_fraction))
        chosen[strategy.model_copy(update={"batch_size": size})] = None
    return list(chosen)
