r"""Does a sixth seed fall where five seeds say it will?

    python benchmarks/intervals.py runs/small_convnet_cifar10_16.safetensors \
        runs/small16-sampled/model.safetensors --store runs/intervals

Real attacks on the small network at 16x16 (unprotected, protected, fresh) with many seeds: every
draw of five seeds gives an interval of advantage removed and one for a further seed; how often does
another seed's value lie in the latter, and the mean over all seeds in the former? The images are in
the folder `$SOPHON_DATA`. About fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import numpy as np

from sophon._audit import Audit
from sophon._circumstances import environment
from sophon._data import load_domain
from sophon._models import resolve_model
from sophon._specs import AuditSpec, DomainSpec, FreshHead, ModelSpec, Strategy
from sophon._statistics import advantage_removed, area, budgets, by_seed, image_areas

FIVE, DRAWS = 5, 2000
# Attacks that lead at some budget.
ATTACKS = (
    Strategy(optimizer="adam", learning_rate=3e-3),
    Strategy(optimizer="sgd_momentum", learning_rate=3e-2, preparations=(FreshHead(),)),
    Strategy(optimizer="adam", learning_rate=1e-2, preparations=(FreshHead(),)),
)


def main() -> None:
    """Print how often intervals hold what they claim, and where it was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("protected", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=30)
    chosen = parser.parse_args()
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
    domain = load_domain(refused, base=base)
    run = Audit(
        made[0][0],
        unprotected=made[1][0],
        scratch=made[1][1],
        original=load_domain(kept, base=base),
        restricted=domain,
        spec=AuditSpec(suite="quick-1", seeds=tuple(range(chosen.seeds)), extra=ATTACKS),
        store=chosen.store,
        workers=chosen.workers,
    )
    # Only the attacks above: the suite's others lead nowhere and would take an hour.
    run.plan.strategies = tuple(s for s in run.plan.strategies if s in set(ATTACKS))
    trials = list(run)
    at = budgets(trials)
    by_subject = [
        [t for t in trials if t.subject == name] for name in ("protected", "unprotected", "scratch")
    ]
    by_image = [image_areas(held, at) for held in by_subject]
    areas = [
        area(at, by_seed(held, at)) if own is None else own.mean(1)
        for held, own in zip(by_subject, by_image, strict=True)
    ]
    p, u, s = areas
    all_of_them = float((u.mean() - p.mean()) / (u.mean() - s.mean()))
    stream = np.random.default_rng(0)
    means = nexts = counted = 0
    for _ in range(DRAWS):
        order = stream.permutation(chosen.seeds)
        five, other = order[:FIVE], order[FIVE]
        found = advantage_removed(
            *(a[five] for a in areas),
            images=len(domain.validation),
            by_image=[None if held is None else held[five] for held in by_image],
        )
        if found.interval is None or found.one_more is None:
            continue
        counted += 1
        means += found.interval.low <= all_of_them <= found.interval.high
        value = (u[other] - p[other]) / (u[five].mean() - s[five].mean())
        nexts += found.one_more.low <= value <= found.one_more.high
    where = environment(run.setting.device, run.setting.precision)
    print(f"{where.processor}, {where.precision}, {datetime.date.today()}, {where.versions}")
    print(f"advantage removed over {chosen.seeds} seeds: {100 * all_of_them:.0f} %")
    print(f"{counted} of {DRAWS} draws of {FIVE} seeds: defined")
    print(f"their interval holds the mean of all seeds in {100 * means / counted:.1f} %")
    print(f"their interval for one more seed holds another seed in {100 * nexts / counted:.1f} %")


if __name__ == "__main__":
    main()
