"""What stored records were judged to be: verdicts, flags, reasons and every word of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sophon._cli.reading import read_record
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord
from sophon._reporting.report import report

ROOT = Path(__file__).parents[2]
GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden.json").read_text(encoding="utf-8")
)


def _as(held: AuditRecord, subject: str) -> AuditRecord:
    """Return the record in which `subject` is the protected model as well."""
    changes = {}
    for part, field in (("subjects", "name"), ("trials", "subject"), ("samples", "subject")):
        rows = getattr(held, part)
        others = [row for row in rows if getattr(row, field) != "protected"]
        again = [r.model_copy(update={field: "protected"}) for r in rows if _of(r, field, subject)]
        changes[part] = (*again, *others)
    return held.model_copy(update=changes)


def _of(row: Any, field: str, subject: str) -> bool:
    return bool(getattr(row, field) == subject)


def _without_before(held: AuditRecord) -> AuditRecord:
    return held.model_copy(
        update={
            "subjects": tuple(s for s in held.subjects if s.name != "unprotected"),
            "trials": tuple(t for t in held.trials if t.subject != "unprotected"),
        }
    )


def _one_seed(held: AuditRecord) -> AuditRecord:
    return held.model_copy(
        update={
            "spec": held.spec.model_copy(update={"seeds": held.seeds[:1]}),
            "trials": tuple(t for t in held.trials if t.seed == held.seeds[0]),
        }
    )


def _allowed(held: AuditRecord, other: AuditRecord) -> AuditRecord:
    """Return the record with the restricted domains of `other` as allowed tasks."""
    names = {domain.name for domain in other.restricted}
    benign = [
        d.model_copy(update={"name": f"{d.name} again", "role": "benign"}) for d in other.restricted
    ]
    more = [
        t.model_copy(update={"domain": f"{t.domain} again"})
        for t in other.trials
        if t.domain in names
    ]
    return held.model_copy(update={"benign": tuple(benign), "trials": (*held.trials, *more)})


VIEWS: dict[str, Callable[[AuditRecord], AuditRecord]] = {
    "fresh": lambda held: _as(held, "scratch"),
    "untouched": lambda held: _as(held, "unprotected"),
    "fresh, one seed": lambda held: _one_seed(_as(held, "scratch")),
    "without the model before": _without_before,
    "blocked": lambda held: _allowed(_as(held, "scratch"), _as(held, "scratch")),
    "learnt": lambda held: _allowed(_as(held, "scratch"), _as(held, "unprotected")),
}

# A record of each kind; in every view it takes a second or less.
ALL_VIEWS = (
    *("tests/records/record-v1.json", "tests/records/record-v1-whole.json"),
    *(
        f"docs/results/records/{name}.json.gz"
        for name in (
            *("cifar100-ten-klu-sampled", "gtsrb-klu-sampled", "mnist-klu-sampled"),
            *("orl-released-t1", "small/caformer-gtsrb-klu", "small/ddpm-orl-dos"),
        )
    ),
)


def judged(held: AuditRecord) -> list[Any]:
    """Return each restricted domain's verdict and flags, and what its reasons' texts hash to."""
    return [
        [s.text, [flag.name for flag in s.flags], _hash("\n".join(s.reasons))]
        for s in summarise(held)
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored() -> list[Path]:
    folders = ROOT.glob("docs/results/records/**/*.json.gz"), ROOT.glob("tests/records/*.json")
    return [path for folder in folders for path in sorted(folder)]


def read(path: Path) -> AuditRecord:
    """Return a record; those of the tests' folder are of a suite that no version has."""
    if path.suffix == ".json":
        return AuditRecord.model_validate_json(path.read_text())
    return read_record(path)


def pinned(name: str, held: AuditRecord) -> dict[str, Any]:
    """Return what is pinned of a record: some are judged in other views as well."""
    views = {view: judged(change(held)) for view, change in VIEWS.items() if name in ALL_VIEWS}
    return {**views, "as it is": judged(held), "markdown": _hash(report(held).markdown())}


def test_every_stored_record_is_pinned() -> None:
    assert [path.relative_to(ROOT).as_posix() for path in stored()] == list(GOLDEN)
    rows = [
        row
        for held in GOLDEN.values()
        for view, found in held.items()
        if view != "markdown"
        for row in found
    ]
    verdicts = {text.partition(" x")[0] for text, *_ in rows}
    assert verdicts == {"slowed", "untrainable", "not protected", "void"}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_stored_record_is_judged_as_it_was(name: str) -> None:
    assert pinned(name, read(ROOT / name)) == GOLDEN[name]
