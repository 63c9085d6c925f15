"""What an attacker with few images reaches, and the area over their number. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sophon._judgement.parts import trials_of
from sophon._judgement.statistics import area, best_of, until
from sophon._records.audit_record import AuditRecord, Trial
from sophon._specs import Strategy

# Trials by share of the images and subject.
Sizes = dict[float, dict[str, list[Trial]]]
# Fewer sizes make no curve.
_LEAST = 3


@dataclass(frozen=True)
class DataSizes:
    """The best score within `steps` steps by share of the training images, (shares), and its mean
    over their logarithm, for each subject.
    """

    shares: tuple[float, ...]
    steps: int
    reached: dict[str, tuple[float, ...]]
    areas: dict[str, float]


def data_sizes(record: AuditRecord, domain: str) -> DataSizes | None:
    """Return what attacks that differ in their number of images reached on the first attack seed;
    None where none was tried with three sizes on every subject.
    """
    held: dict[Strategy, Sizes] = {}
    for trial in trials_of(record, domain):
        if trial.seed == record.seeds[0] and trial.curve:
            usual = trial.strategy.model_copy(update={"data_fraction": 1.0, "batch_size": 1})
            sizes = held.setdefault(usual, {})
            sizes.setdefault(trial.strategy.data_fraction, {}).setdefault(trial.subject, []).append(
                trial
            )
    most = max(map(len, held.values()), default=0)
    if most < _LEAST:
        return None
    families = [_alike(sizes) for sizes in held.values() if len(sizes) == most]
    shares = tuple(sorted(families[0]))
    families = [sizes for sizes in families if tuple(sorted(sizes)) == shares]
    subjects: list[str] = [s.name for s in record.subjects]
    groups = {
        name: [[t for sizes in families for t in sizes[share].get(name, [])] for share in shares]
        for name in subjects
    }
    if not all(trials for group in groups.values() for trials in group):
        return None
    # Some were stopped early: what all of them had by then is compared.
    last = min(
        max(t.curve[-1].step for t in trials) for group in groups.values() for trials in group
    )
    reached = {
        name: tuple(max(best_of(until(t, last)) for t in trials) for trials in group)
        for name, group in groups.items()
    }
    # Shares in millionths are as good as steps: a logarithm counts.
    areas = {
        name: float(area([round(1e6 * share) for share in shares], np.array(values)))
        for name, values in reached.items()
    }
    return DataSizes(shares, last, reached, areas)


def _alike(sizes: Sizes) -> Sizes:
    """Leave of the attacks on all images those with the batch of those on fewer, which is smaller
    only where there are no more images.
    """
    batches = [
        (share, t.strategy.batch_size)
        for share, trials in sizes.items()
        for one in trials.values()
        for t in one
    ]
    few = max((size for share, size in batches if share < 1), default=1)
    usual = min((size for share, size in batches if share == 1 and size >= few), default=few)
    return {
        share: {
            name: [t for t in one if share < 1 or t.strategy.batch_size == usual]
            for name, one in trials.items()
        }
        for share, trials in sizes.items()
    }
