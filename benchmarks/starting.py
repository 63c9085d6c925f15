"""How long the command line takes to start, and a report of 200 trials."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from timing import Row, alone, row, seconds

from sophon._attacks.suites import strategies_of
from sophon._records.audit_record import (
    AuditRecord,
    Completed,
    DomainRecord,
    Environment,
    Point,
    Score,
    SubjectRecord,
    Trial,
    pack,
)
from sophon._specs import AuditSpec, Subject

SUBJECTS: tuple[Subject, ...] = ("protected", "unprotected", "scratch")
STEPS = (5, 8, 12, 18, 27, 40, 59, 87, 128, 155, 180, 200)
MAIN = "import sys; from sophon._cli import main; main()"


def scores(index: int) -> list[tuple[int, Score]]:
    """Return a made-up curve: (step, score of 200 images)."""
    # Fresh networks learn half as much, so that there is an advantage to reckon with.
    share = 0.5 if SUBJECTS[index % 3] == "scratch" else 1.0
    steps = enumerate((0, *STEPS))
    right = [(step, 20 + int(share * (step // 2 + (7 * index + at) % 70))) for at, step in steps]
    return [(step, Score(correct=count, total=200)) for step, count in right]


def audited(trials: int) -> AuditSpec:
    """Return an audit of so many trials or a few more: the suite at as many rates as it takes."""
    spec = AuditSpec(steps=200, seeds=(0, 1, 2))
    suite, wanted = strategies_of(spec), math.ceil(trials / (len(SUBJECTS) * len(spec.seeds)))
    extra = [
        strategy.model_copy(update={"learning_rate": strategy.learning_rate * 1.01**power})
        for power in range(1, math.ceil(wanted / len(suite)))
        for strategy in suite
    ]
    return spec.model_copy(update={"extra": tuple(extra[: max(0, wanted - len(suite))])})


def record(trials: int) -> AuditRecord:
    """Return a record of so many trials with made-up scores, no two of them of the same attack on
    the same subject with the same seed.
    """
    spec = audited(trials)
    strategies = strategies_of(spec)
    made = []
    for index in range(trials):
        subject = SUBJECTS[index % 3]
        seed, strategy = index // 3 % 3, strategies[index // 9]
        curve = [
            Point(
                step=step,
                samples=64 * step,
                validation=score,
                by_image=pack(np.arange(200.0) < score.correct, score),
            )
            for step, score in scores(index)
        ]
        made.append(
            Trial(
                key=str(index),
                subject=subject,
                domain="refused",
                strategy=strategy,
                seed=seed,
                curve=tuple(curve),
                best_step=max(curve, key=lambda point: point.validation.correct).step,
                test=Score(correct=700, total=1000),
                outcome=Completed(),
                wall_s=1.0,
            )
        )

    def domain(name: str, role: str) -> DomainRecord:
        return DomainRecord(
            name=name,
            role=role,
            source="arrays",
            sha256="0" * 64,
            train=1000,
            validation=200,
            test=1000,
            classes=10,
            image=(3, 32, 32),
        )

    return AuditRecord(
        spec=spec,
        spec_fingerprint=spec.fingerprint(),
        strategies=strategies,
        model="resnet20",
        task="classification",
        original=domain("kept", "original"),
        restricted=(domain("refused", "restricted"),),
        subjects=tuple(
            SubjectRecord(
                name=name,
                weights_sha256="1" * 64,
                original=None if name == "scratch" else Score(correct=900, total=1000),
                parameters=9,
                flags=(),
            )
            for name in SUBJECTS
        ),
        trials=tuple(made),
        environment=Environment(
            versions={},
            platform="",
            processor="",
            threads=1,
            device="cpu",
            precision="fp32",
        ),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command="",
    )


def imports_torch(*arguments: str) -> bool:
    """Return whether the command has imported torch by its end."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n" + MAIN
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return run.stderr.split()[-1] == "True"


def rows(short: bool) -> list[Row]:
    """Return the time of `sophon --help` and of `sophon report`, as text and as a page."""
    repeats, trials = (1, 200) if short else (3, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "record.json").write_text(record(trials).model_dump_json(), encoding="utf-8")
        commands = (
            ("sophon --help", ("--help",), 0.3),
            (f"sophon report of {trials} trials", ("report", name), 1.5),
            (
                f"sophon report --html of {trials} trials",
                ("report", name, "--html", str(folder / "report.html")),
                1.5,
            ),
        )
        return [started(what, command, bar, repeats) for what, command, bar in commands]


def started(what: str, command: tuple[str, ...], bar: float, repeats: int) -> Row:
    heavy = imports_torch(*command)

    def run() -> None:
        subprocess.run([sys.executable, "-c", MAIN, *command], check=True, capture_output=True)

    found = row(what, [seconds(run) for _ in range(repeats)], at_most=bar, unit=" s")
    if heavy:
        return replace(found, met=False, note="imports torch: missed, however fast it is")
    return replace(found, note="imports no torch")


if __name__ == "__main__":
    alone(rows)
