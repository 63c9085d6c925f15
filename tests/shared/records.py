"""Audit records made by hand, for what judges and shows records."""

from __future__ import annotations

from collections.abc import Sequence

from sophon._attacks.suites import strategies_of, suite_fingerprint
from sophon._records.audit_record import (
    AuditRecord,
    Completed,
    Crashed,
    Diverged,
    DomainRecord,
    Environment,
    Outcome,
    Point,
    Score,
    SubjectRecord,
    Trial,
)
from sophon._specs import AuditSpec, Strategy, Subject

STEPS = (5, 20, 80, 200)
CURVES: dict[str, tuple[float, ...]] = {
    "protected": (0.2, 0.3, 0.5, 0.6),
    "unprotected": (0.4, 0.7, 0.85, 0.9),
    "scratch": (0.1, 0.2, 0.49, 0.5),
}


def trial(
    subject: Subject,
    values: Sequence[float],
    *,
    seed: int = 0,
    strategy: Strategy | None = None,
    outcome: Outcome | None = None,
    domain: str = "refused",
) -> Trial:
    """Return a trial that measured `values` at STEPS."""
    curve = [Point(step=0, samples=0, validation=Score(correct=20, total=200))]
    curve += [
        Point(step=s, samples=64 * s, validation=Score(correct=round(200 * v), total=200))
        for s, v in zip(STEPS, values, strict=False)
    ]
    best = max(curve, key=lambda point: point.validation.correct)
    return Trial(
        key=f"{subject}-{seed}-{values}",
        subject=subject,
        domain=domain,
        strategy=strategy or Strategy(learning_rate=1e-2),
        seed=seed,
        curve=tuple(curve),
        best_step=best.step,
        test=Score(correct=5 * best.validation.correct, total=1000),
        outcome=outcome or Completed(),
        wall_s=1.0,
    )


def crashed(subject: Subject) -> Trial:
    """Return a trial that raised before its first measurement."""
    held = trial(subject, (), outcome=Crashed(error="RuntimeError: <b>no</b>", traceback="..."))
    return held.model_copy(update={"curve": (), "best_step": None, "test": None})


def diverged(subject: Subject) -> Trial:
    return trial(subject, (0.1,), outcome=Diverged(step=20))


def record(
    trials: Sequence[Trial] | None = None,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    original: float = 0.9,
    flags: tuple[str, ...] = (),
    protection: dict[str, object] | None = None,
    curves: dict[str, tuple[float, ...]] | None = None,
) -> AuditRecord:
    """Return a record; without `trials` one attack per subject and seed that follows CURVES."""
    if trials is None:
        chosen = CURVES | (curves or {})
        trials = [
            trial(name, [v + 0.005 * seed for v in values], seed=seed)  # type: ignore[arg-type]
            for name, values in chosen.items()
            for seed in seeds
        ]
    spec = AuditSpec(seeds=seeds)

    def domain(name: str, role: str) -> DomainRecord:
        return DomainRecord(
            name=name,
            role=role,  # type: ignore[arg-type]
            source="arrays",
            sha256="0" * 64,
            train=1000,
            validation=1000,
            test=1000,
            classes=10,
            image=(3, 32, 32),
        )

    score, before = (Score(correct=round(1000 * v), total=1000) for v in (original, 0.92))
    subjects = [
        SubjectRecord(
            name="protected", weights_sha256="1" * 64, original=score, parameters=9, flags=flags
        ),
        SubjectRecord(name="unprotected", weights_sha256="2" * 64, original=before, parameters=9),
        SubjectRecord(name="scratch", weights_sha256="3" * 64, original=None, parameters=9),
    ]
    return AuditRecord(
        spec=spec,
        spec_fingerprint=spec.fingerprint(),
        strategies=strategies_of(spec),
        model="resnet20",
        task="classification",
        original=domain("kept", "original"),
        restricted=(domain("refused", "restricted"),),
        subjects=tuple(subjects),
        trials=tuple(trials),
        environment=Environment(
            versions={"torch": "2.13.0"},
            platform="Linux x86_64",
            processor="a processor",
            threads=2,
            device="cpu",
            precision="fp32",
        ),
        suite_fingerprint=suite_fingerprint(spec.suite),
        created="2026-11-24T00:00:00+00:00",
        command="sophon audit run.toml --model p --out a",
        protection=protection,
    )
