"""A fixed small battery: what a change of a protection is judged by, on validation images.

    python recipes/withstand/battery.py RUN.toml MODEL... [--store FOLDER]

Ten attacks of 100 steps, two seeds, on each model, on the model before protection and on fresh
networks, on refused domains and on allowed ones (`[[benign]]`). Printed, a row a model and domain:
the original task's validation score, the best attack's at each budget (mean over seeds) and how
much of the unprotected model's area above a fresh network's is gone, over the logarithm of the
steps from 5 on: much of it where the domain is refused, little where it is allowed. No interval,
one verdict less: what is published is audited. The last three attacks are in nothing that a recipe
rehearses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import typer

from sophon._auditing.audit import Audit
from sophon._auditing.trial import Job
from sophon._cli.run_file import Case, load, load_subject
from sophon._models import blocks
from sophon._records.audit_record import Completed
from sophon._specs import (
    AuditSpec,
    BatchNorm,
    FreshHead,
    Heal,
    NoiseKick,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Strategy,
    Subject,
)
from sophon._training.evaluate import evaluate

STEPS, EVALUATIONS, FIRST, SEEDS = 100, 8, 5, (0, 1)
Curve = dict[int, float]


def battery(depth: int) -> list[Strategy]:
    """Return the ten attacks on a network of so many blocks."""

    def attack(*preparations: Any, rate: float, batch: int = 64, **fields: Any) -> Strategy:
        return Strategy(
            preparations=preparations,
            optimizer=fields.pop("optimizer", "adam"),
            learning_rate=rate,
            batch_size=batch,
            steps=STEPS,
            **fields,
        )

    few, many = (max(1, round(depth * share)) for share in (0.3, 0.6))
    return [
        attack(FreshHead(), rate=3e-3),
        attack(FreshHead(), rate=1e-2, batch=128),
        attack(RidgeHead(), rate=3e-3, batch=128),
        attack(RescaleWeights(), RidgeHead(), rate=3e-3, batch=128),
        attack(ResetLastBlocks(blocks=few), FreshHead(), rate=3e-3),
        attack(ResetLastBlocks(blocks=many), FreshHead(), rate=3e-3),
        attack(FreshHead(), rate=1e-1, optimizer="sgd_momentum"),
        attack(NoiseKick(relative_std=0.3), RidgeHead(), rate=1e-2, batch=128),
        attack(BatchNorm(mode="reset"), FreshHead(), rate=1e-2, batch=128),
        attack(Heal(share=0.2), RidgeHead(), rate=1e-2, batch=128),
    ]


def opened(case: Case, path: Path, store: Path) -> Audit:
    """Return what trials of a model are run with."""
    return Audit(
        load_subject(case, path)[0],
        unprotected=case.model,
        original=case.original,
        restricted=(*case.restricted, *case.benign),
        task=case.task,
        spec=AuditSpec(steps=STEPS, evaluations=EVALUATIONS, seeds=SEEDS),
        store=store,
        scratch=case.scratch,
        head=case.network.head,
    )


def envelope(audit: Audit, subject: Subject, domain: str, strategies: list[Strategy]) -> Curve:
    """Return the best attack's validation score at each budget from `FIRST` on, in percent."""
    best: Curve = {}
    for strategy in strategies:
        found: dict[int, list[float]] = {}
        for seed in SEEDS:
            job, start = Job(subject, domain, strategy, seed), audit.subjects.start(subject, seed)
            trial = audit.store.get(audit.bench.key(job, start)) or audit.bench.run(job, start)
            audit.store.put(trial)
            if not isinstance(trial.outcome, Completed):
                typer.echo(f"{strategy.label()}: {trial.outcome}", err=True)
                continue
            for point in trial.curve:
                found.setdefault(point.step, []).append(100 * point.validation.value)
        for step, values in found.items():
            best[step] = max(best.get(step, 0.0), float(np.mean(values)))
    # A shorter attack is within a longer one's budget.
    steps = sorted(best)
    reached = {step: max(best[one] for one in steps if one <= step) for step in steps}
    return {step: score for step, score in reached.items() if step >= FIRST}


def area(curve: Curve, steps: list[int]) -> float:
    """Return the mean of a curve over the logarithm of the steps; what it lacks is carried on."""
    held = sorted(curve)
    values = [curve[max((s for s in held if s <= step), default=held[0])] for step in steps]
    width = np.log(steps[-1] / steps[0])
    return float(np.trapezoid(values, np.log(steps)) / width)


def removed(open_: Curve, fresh: Curve, curve: Curve) -> str:
    """Return what share of the unprotected model's lead is gone; a dash where it has none."""
    steps = sorted(open_)
    most, least, held = (area(one, steps) for one in (open_, fresh, curve))
    return f"{(most - held) / (most - least):.2f}" if most > least else "-"


def rows(run: Path, models: list[Path], store: Path) -> None:
    """Print the rows of every model, the unprotected one's and a fresh network's first."""
    case = load(run, None)
    others: dict[str, tuple[Curve, Curve]] = {}
    for path in models:
        audit = opened(case, path, store)
        strategies = battery(len(blocks(audit.subjects.before, audit.setting.head)))
        original = case.original
        kept = evaluate(audit.subjects.protected, audit.setting, original, original.validation)
        for domain in (*case.restricted, *case.benign):
            if domain.name not in others:
                names: tuple[Subject, Subject] = ("unprotected", "scratch")
                open_, fresh = (envelope(audit, n, domain.name, strategies) for n in names)
                others[domain.name] = open_, fresh
                before = evaluate(case.model, audit.setting, original, original.validation)
                typer.echo(_row(f"(unprotected, {domain.name})", 100 * before.value, open_, "0"))
                typer.echo(_row(f"(fresh, {domain.name})", None, fresh, "1"))
            open_, fresh = others[domain.name]
            curve = envelope(audit, "protected", domain.name, strategies)
            gone = removed(open_, fresh, curve)
            typer.echo(_row(f"{path} ({domain.name})", 100 * kept.value, curve, gone))


def _row(name: str, original: float | None, curve: Curve, removed: str) -> str:
    kept = "-" if original is None else f"{original:.1f}"
    scores = " ".join(f"{step}:{value:.1f}" for step, value in curve.items())
    return f"| {name} | {kept} | {scores} | {removed} |"


def main(arguments: list[str] | None = None) -> None:
    """Run the battery on the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--store", type=Path, default=Path("runs/battery"))
    given = parser.parse_args(arguments)
    typer.echo("| model | original, validation | best after ... steps | area removed |")
    rows(given.run, given.models, given.store)


if __name__ == "__main__":
    main()
