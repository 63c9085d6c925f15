"""Records that anybody may have written: read or refused, never a traceback."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from typer.testing import CliRunner

from records import record
from sophon._base.errors import CheckpointError, SophonError, SpecError
from sophon._cli import app
from sophon._cli.reading import read_record
from sophon._judgement.flags.all import CHECKS
from sophon._records.audit_record import (
    AuditRecord,
    ErrorScore,
    Point,
    SampleRecord,
    Score,
    pack,
    unpack,
)
from sophon._records.metrics import KINDS
from sophon._records.statement import stated
from sophon._reporting.audit_tables import claimed_domains, reported
from sophon._reporting.report import report
from sophon._specs import Guard, parse_spec

WHOLE = json.loads((Path(__file__).parents[1] / "records" / "record-v1-whole.json").read_text())


SAMPLE: dict[str, Any] = {
    **dict.fromkeys(("count", "images", "steps", "features"), 1),
    **dict.fromkeys(("kid", "kid_std", "fid", "precision", "recall"), 0.5),
    "subject": "protected",
    "domain": "d",
    "attacked": "d",
    "extractor": "e",
}


def _written(folder: Path, **changes: Any) -> Path:
    file = folder / "record.json"
    file.write_text(json.dumps(json.loads(record().model_dump_json()) | changes))
    return file


@pytest.mark.parametrize("value", [[], {}, None, "x"], ids=repr)
def test_whatever_stands_in_a_field_is_judged_or_refused(value: object) -> None:
    judged = 0
    for name in WHOLE:
        try:
            held = AuditRecord.model_validate_json(json.dumps(WHOLE | {name: value}))
        except pydantic.ValidationError:
            continue
        try:
            made = report(held)
            assert made.html()
            assert made.markdown()
        except SophonError:
            continue
        judged += 1
    assert judged


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subjects": []}, "it has no protected subject"),
        ({"subjects": WHOLE["subjects"][1:]}, "it has no protected subject"),
        ({"restricted": []}, "it has trials on refused, a domain that it does not describe"),
        ({"original": WHOLE["original"] | {"classes": 0}}, "has 0 classes"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_with_the_reason(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    file = _written(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=why):
        read_record(file)
    for words in (["report", str(file)], ["compare", str(file), str(file)]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, done.output
        assert why in " ".join(done.output.split())


@pytest.mark.parametrize("counts", [(0, 0), (-1, 5), (6, 5)])
def test_what_is_no_score_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(pydantic.ValidationError, match="is no score"):
        Score(correct=counts[0], total=counts[1])
    with pytest.raises(pydantic.ValidationError, match="is no score"):
        ErrorScore(mse=0.5, variance=-1.0, total=5)


@pytest.mark.parametrize(
    "statement",
    [
        {"spec": "evil"},
        {"spec": -1},
        {"spec": {"rehearsal": "evil"}},
        {"spec": {"rehearsal": {"fixed": [1]}}},
        {"spec": {"rehearsal": {"fixed": {"optimizer": "sgd", "learning_rate": -1.0}}}},
        {"spec": {"rehearsal": {"steps": "many"}}},
        {"spec": {"guard": 7}},
        {"spec": {"guard": {"tolerance_points": None}}},
        {"spec": {"guard": {"tolerance_points": -5.0}}},
    ],
    ids=repr,
)
def test_a_statement_that_cannot_be_read_says_nothing(statement: dict[str, object]) -> None:
    held = record(protection=statement, original=0.9)
    assert stated(held.protection).rates == {}
    silent = record(protection={}, original=0.9)
    for check in CHECKS.values():
        assert check(held, "refused") == check(silent, "refused")
    assert "unknown rehearsal" in {flag.name for flag in report(held).worst.flags}
    assert report(held).html()


@pytest.mark.parametrize("seconds", [-1, "soon", True, 1e300, float("nan"), None])
def test_seconds_that_cannot_be_read_take_nothing_else_away(seconds: object) -> None:
    said = {"terms": {"rehearsed": [{"rates": {"adam": 0.01}, "life": 20}]}, "wall_s": seconds}
    assert stated(said).life == 20
    assert stated(said).wall_s is None


def test_a_statement_says_the_upper_rates_and_the_whole_life() -> None:
    ranges = {"adam": [1e-4, 1e-2], "sgd": [1e-3, 1e-1]}
    rehearsal = {"distribution": {"learning_rates": ranges}, "steps": 10}
    said = stated({"spec": {"rehearsal": rehearsal, "guard": {"tolerance_points": 2.0}}})
    assert (said.rates, said.life) == ({"adam": 1e-2, "sgd": 1e-1}, 10)
    assert said.tolerances == {"tolerance_points": 2.0}
    fixed = rehearsal | {"fixed": {"optimizer": "sgd", "learning_rate": 0.5}, "horizon": 40}
    said = stated({"spec": {"rehearsal": fixed}})
    assert (said.rates, said.life, said.tolerances) == ({"sgd": 0.5}, 40, {})
    assert (stated(None).rates, stated(None).life, stated({"spec": {}}).life) == ({}, 0, 0)


def test_each_kind_of_score_is_written_in_its_own_unit() -> None:
    accuracy, error = KINDS["accuracy"], KINDS["mse"]
    assert accuracy.interval((0.25, 0.5)) == ("25.0 %", "50.0 %")
    assert error.interval((0.25, 0.5)) == ("0.5000", "0.7500")
    assert (accuracy.shown(None), error.shown(0.9)) == ("\u2013", "0.1000")
    ticks = [error.tick(width) for width in (1.0, 0.9, 0.5, 0.3, 0.0)]
    assert ticks == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.0002])
    loose = Guard(tolerance_points=2.0, tolerance_relative=0.1)
    assert accuracy.allowed(0.9, loose) == pytest.approx(0.88)
    assert error.allowed(0.9, loose) == pytest.approx(0.89)


def test_scores_are_packed_bit_by_bit_and_damage_shows() -> None:
    right = np.array([1.0, 0, 0, 1, 1, 0, 0, 0, 1])
    score = Score(correct=4, total=9)
    text = pack(right, score)
    assert base64.b64decode(text) == bytes([0b10011000, 0b10000000])
    assert unpack(text, score).tolist() == right.tolist()
    for total, correct in ((8, 4), (17, 4), (9, 3)):
        held = {"correct": correct, "total": total}
        with pytest.raises(pydantic.ValidationError, match="by_image is damaged"):
            Point(step=0, samples=0, validation=Score(**held), by_image=text)


@pytest.mark.parametrize(
    "claim", [-1, "x", {"total": 5}, {"correct": 3, "total": 0}, {"correct": None, "total": 5}]
)
def test_a_claim_that_is_no_score_is_no_claim(claim: object) -> None:
    held = record(protection={"validation_after": claim, "restricted": [[], {}]})
    assert reported(held) == {}
    assert "protected against [], {}" in claimed_domains(held)
    assert report(held).markdown()


@pytest.mark.parametrize("packed", [False, True])
def test_a_record_is_unpacked_to_a_limit(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sophon._cli.reading._MOST_BYTES", 2**20)
    file = tmp_path / "record.json"
    held = b" " * 2**24
    file.write_bytes(gzip.compress(held) if packed else held)
    with pytest.raises(CheckpointError, match="more than 1 MiB"):
        read_record(file)


@pytest.mark.parametrize(
    "grid",
    [
        "http://a.test/x.png",
        "//a.test/x",
        "data:image/svg+xml;base64,AAAA",
        "data:text/html,x",
        "x",
    ],
)
def test_a_picture_of_a_record_asks_nobody(grid: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="grid"):
        SampleRecord(**SAMPLE, grid=grid)
    assert SampleRecord(**SAMPLE, grid="data:image/png;base64,AAAA").grid.endswith("AAAA")


def test_numbers_of_a_record_fit_a_float_and_many_faults_take_no_time(tmp_path: Path) -> None:
    begun = time.process_time()
    for changes in (
        {"trials": [{**WHOLE["trials"][0], "wall_s": 10**400}]},
        {"trials": [{**WHOLE["trials"][0], "seed": 10**400}]},
        {"original": {**WHOLE["original"], "train": 10**30}},
        {str(number): 1 for number in range(100_000)},
        {"protection": {str(number): 1 for number in range(100_000)}},
    ):
        with contextlib.suppress(CheckpointError):
            report(read_record(_written(tmp_path, **changes)))
    with pytest.raises(SpecError, match="unknown key 0"):
        parse_spec(Guard, {str(number): 1 for number in range(100_000)}, where="x")
    assert time.process_time() - begun < 20


def test_a_compressed_record_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    packed = gzip.compress(_written(tmp_path).read_bytes())
    whole, cut, other = (tmp_path / f"{name}.json.gz" for name in ("whole", "cut", "other"))
    whole.write_bytes(packed)
    cut.write_bytes(packed[: len(packed) // 2])
    other.write_bytes(gzip.compress(b"{}"))
    assert read_record(whole) == record()
    done = CliRunner().invoke(app, ["compare", str(whole), str(tmp_path)])
    assert done.exit_code == 0, done.output
    with pytest.raises(CheckpointError, match="compressed and cannot be unpacked"):
        read_record(cut)
    with pytest.raises(CheckpointError, match="is not a whole audit record"):
        read_record(other)
