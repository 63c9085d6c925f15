r"""Do the intervals of advantage removed hold what they claim?

    python benchmarks/intervals.py runs/small_convnet_cifar10_16.safetensors \
        runs/small16-sampled/model.safetensors --store runs/intervals

Real attacks on the small network at 16x16 (unprotected, protected, fresh) with many seeds. Every
draw takes six seeds, as `standard-1` does, and a fifth of the validation images: the first seed
runs every attack and chooses those that lead, the five others run these and give an interval of
advantage removed and one for a further seed. Two things are counted:

* how often the interval holds the advantage removed by the same attacks over all seeds on the other
  four fifths of the images, none of which the interval has met. That number is itself of finitely
  many images, with a quarter of the variance: where images are all that varies, a right interval
  holds it in 92 % of the draws (1.96 / sqrt(1 + 1/4) standard deviations), where seeds are, in 95 %
  or more;
* how often the interval for a further seed (`Estimate.one_more`) holds a seventh seed's value: its
  own lead of unprotected over protected, with the same attacks on the same images, over the five
  seeds' mean lead of unprotected over scratch. It says nothing of other images.

After less than 90 % of either the exit code is 1, as it is where no draw has an interval. The
images are in the folder `$SOPHON_DATA`. About half an hour on one core.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sophon._attacks.suites import strategies_of
from sophon._auditing.audit import Audit
from sophon._auditing.plan import Plan
from sophon._data import load_domain
from sophon._judgement.advantage import advantage_removed, image_areas
from sophon._judgement.statistics import Interval, shared_budgets
from sophon._models import resolve_model
from sophon._records.audit_record import Point, Score, Trial, pack, unpack
from sophon._specs import AuditSpec, DomainSpec, FreshHead, ModelSpec, Strategy, Subject
from sophon._training.environment import environment

# Seeds of a draw: one chooses, the others measure.
SIX = 6
# Ways to part the images, and draws of seeds for each.
PARTS, DRAWS = 20, 50
# One in so many images is for the intervals, the others are for the truth.
SHARE = 5
LEAST = 0.9
# Attacks that lead at some budget, and some that come close.
ATTACKS = (
    Strategy(optimizer="adam", learning_rate=3e-3),
    Strategy(optimizer="sgd_momentum", learning_rate=3e-2, preparations=(FreshHead(),)),
    Strategy(optimizer="adam", learning_rate=1e-2, preparations=(FreshHead(),)),
    Strategy(optimizer="adam", learning_rate=3e-3, preparations=(FreshHead(),)),
    Strategy(optimizer="sgd_momentum", learning_rate=1e-1),
    Strategy(optimizer="sgd_momentum", learning_rate=1e-1, preparations=(FreshHead(),)),
)
SUBJECTS: tuple[Subject, ...] = ("protected", "unprotected", "scratch")


def only(trial: Trial, images: NDArray[np.int64]) -> Trial:
    """Return the trial as if its validation images had been `images` alone."""
    curve = []
    for point in trial.curve:
        right = unpack(point.by_image or "", point.validation)[images]
        score = Score(correct=int(right.sum()), total=len(right))
        curve.append(
            Point(
                step=point.step,
                samples=point.samples,
                validation=score,
                by_image=pack(right, score),
            )
        )
    return trial.model_copy(update={"curve": tuple(curve)})


@dataclass(frozen=True)
class Held:
    """Trials as of some images; areas are those of each subject, (seeds, images)."""

    trials: tuple[Trial, ...]
    at: list[int]
    ratios: dict[frozenset[Strategy], float] = field(default_factory=dict)

    def areas(self, seeds: Sequence[int], attacks: set[Strategy]) -> list[NDArray[np.float64]]:
        """Return the areas of the attacks that every one of the seeds ran."""
        return self._areas([t for t in self.trials if t.seed in seeds and t.strategy in attacks])

    def chosen_areas(
        self, chooser: int, others: Sequence[int], attacks: set[Strategy]
    ) -> list[NDArray[np.float64]]:
        """Return the areas where the chooser ran every attack and the others the chosen ones."""
        return self._areas(
            [
                t
                for t in self.trials
                if t.seed == chooser or (t.seed in others and t.strategy in attacks)
            ]
        )

    def _areas(self, trials: Sequence[Trial]) -> list[NDArray[np.float64]]:
        found = [image_areas([t for t in trials if t.subject == s], self.at) for s in SUBJECTS]
        return [areas for areas in found if areas is not None]

    def ratio(self, attacks: set[Strategy]) -> float:
        """Return the advantage removed by the attacks, over all seeds."""
        key = frozenset(attacks)
        if key not in self.ratios:
            seeds = sorted({trial.seed for trial in self.trials})
            p, u, s = (float(held.mean()) for held in self.areas(seeds, attacks))
            self.ratios[key] = (u - p) / (u - s) if u > s else float("nan")
        return self.ratios[key]

    def leaders(self, plan: Plan, chooser: int) -> set[Strategy]:
        """Return the attacks that an audit would repeat with its further seeds."""
        spec = plan.spec.model_copy(update={"seeds": (chooser,)})
        return set(replace(plan, spec=spec, trials=list(self.trials))._leaders(plan.restricted[0]))


class Draw(NamedTuple):
    """A draw's interval and truth, the further seed's interval and value; None where undefined."""

    interval: Interval | None
    truth: float
    one_more: Interval | None
    value: float


def drawn(few: Held, rest: Held, plan: Plan, order: Sequence[int]) -> Draw:
    """Return what the first six seeds of an order say on few images; what is so on the rest, and of
    the seventh.
    """
    chooser, others, further = order[0], order[1:SIX], order[SIX]
    attacks = few.leaders(plan, chooser)
    by_image = few.chosen_areas(chooser, others, attacks)
    found = advantage_removed(
        *(areas.mean(1) for areas in by_image),
        images=by_image[0].shape[1],
        by_image=by_image,
    )
    p, u, _ = (float(areas.mean()) for areas in few.areas([further], attacks))
    gap = float(by_image[1].mean() - by_image[2].mean())
    value = (u - p) / gap if gap > 0 else float("nan")
    return Draw(found.interval, rest.ratio(attacks), found.one_more, value)


def judged(draws: Sequence[Draw]) -> tuple[list[str], bool]:
    """Return how often the intervals hold what they claim, in words, and whether often enough."""
    means = [d.interval.low <= d.truth <= d.interval.high for d in draws if d.interval]
    nexts = [d.one_more.low <= d.value <= d.one_more.high for d in draws if d.one_more]
    lines = [f"{len(means)} of {len(draws)} draws of {SIX} seeds: defined"]
    met = True
    for name, held in (
        ("their interval holds the number of all seeds on the other images", means),
        ("their interval for one more seed holds another seed on the same images", nexts),
    ):
        enough = bool(held) and np.mean(held) >= LEAST
        met = met and bool(enough)
        share = f"{100 * np.mean(held):.1f} %" if held else "none: no draw has such an interval"
        word = "met" if enough else "MISSED"
        lines.append(f"{name}: {share} (at least {100 * LEAST:.0f} %: {word})")
    return lines, met


def specified(seeds: int) -> AuditSpec:
    """Return an audit that has the attacks above, the suite's own among them or not."""
    spec = AuditSpec(suite="quick-1", seeds=tuple(range(seeds)))
    suite = set(strategies_of(spec))
    return spec.model_copy(update={"extra": tuple(s for s in ATTACKS if s not in suite)})


def audited(chosen: argparse.Namespace) -> Audit:
    """Return the audit of the two networks by the attacks above, not yet run."""
    base = Path(os.environ["SOPHON_DATA"])
    kept = DomainSpec(source="npz", path="cifar10_jpeg.npz", image_size=16)
    refused = DomainSpec(
        source="npz",
        path="cifar100.npz",
        image_size=16,
        classes=tuple(range(10)),
        validation=0.4,
    )
    made = [
        resolve_model(ModelSpec(name="small_convnet", weights=str(file.absolute())), base=base)
        for file in (chosen.protected, chosen.weights)
    ]
    return Audit(
        made[0][0],
        unprotected=made[1][0],
        scratch=made[1][1],
        original=load_domain(kept, base=base),
        restricted=load_domain(refused, base=base),
        spec=specified(chosen.seeds),
        store=chosen.store,
        workers=chosen.workers,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Print how often intervals hold what they claim, and where it was measured; 1 for a miss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("protected", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--draws", type=int, default=PARTS * DRAWS)
    chosen = parser.parse_args(words)
    if chosen.seeds <= SIX:
        parser.error(f"--seeds {chosen.seeds}: at least {SIX + 1}, six for a draw and one more")
    run = audited(chosen)
    # Only the attacks above: the suite's others lead nowhere and would take an hour.
    run.plan.strategies = tuple(s for s in run.plan.strategies if s in set(ATTACKS))
    if len(run.plan.strategies) != len(ATTACKS):
        raise RuntimeError(f"{len(run.plan.strategies)} of {len(ATTACKS)} attacks are in the audit")
    trials = list(run)
    crashed = [trial for trial in trials if trial.outcome.kind == "crashed"]
    if crashed:
        print(f"{len(crashed)} trials crashed, such as {crashed[0].strategy.label()}: mend them")
        return 1
    at = shared_budgets(trials)
    stream = np.random.default_rng(0)
    draws = []
    for index in range(chosen.draws):
        if index % max(1, chosen.draws // PARTS) == 0:
            total = trials[0].curve[0].validation.total
            order = stream.permutation(total)
            parts = order[: total // SHARE], order[total // SHARE :]
            few, rest = (Held(tuple(only(t, part) for t in trials), at) for part in parts)
        draws.append(drawn(few, rest, run.plan, stream.permutation(chosen.seeds).tolist()))
    where = environment(run.setting.device, run.setting.precision)
    print(f"{where.processor}, {where.precision}, {datetime.date.today()}, {where.versions}")
    lines, met = judged(draws)
    print("\n".join(lines))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
