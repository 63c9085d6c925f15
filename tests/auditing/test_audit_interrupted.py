"""Audits that are killed, and audits that share a store: no trial twice, none lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sophon._records.audit_record import Trial

# Runs a small audit by stages (prefilter, search, seeds, a benign domain) and prints what must
# not depend on when trials ran; kills its own process at the N-th step of an attack, flush,
# link or removal of a file. Of several N each but the last is a fork's, until ten were killed.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from builders import digits, original, scratch_model, trained_model
from sophon._attacks.suites import SUITES, Suite
from sophon._auditing.audit import Audit
from sophon._training.loop import FineTuning
from sophon._specs import AuditSpec

store, workers, *forked, last = sys.argv[1:]
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

SUITES["tiny"] = Suite(
    tuple(SUITES["standard-1"].strategies[i] for i in (5, 24, 40)),
    prefilter=0.5, survivors=1, headline=True, seeds=(0, 1), search_trials=2,
)
model, kills = trained_model(), 0
for event in forked:
    if (child := os.fork()) == 0:
        last = event
        break
    status = os.waitpid(child, 0)[1]
    assert status == signal.SIGKILL
    kills += 1
    if kills == 10:
        break
assert kills == 10 or last != {never!r} or not forked
left = int(last)
os.fsync = counted(os.fsync)
os.link = counted(os.link)
Path.unlink = counted(Path.unlink)
FineTuning._step = counted(FineTuning._step)
run = Audit(
    model, unprotected=model, original=original(), restricted=digits(5, 8),
    spec=AuditSpec(suite="tiny", steps=4, evaluations=2, batch_size=16, precision="fp32"),
    scratch=scratch_model, store=store, workers=int(workers),
)
for _ in run:
    pass
varying = {{"wall_s", "environment"}}
print(json.dumps([trial.model_dump(mode="json", exclude=varying) for trial in run.record().trials]))
print({never} - left, file=sys.stderr)
"""
NEVER = 1_000_000

SHARED = Path(__file__).parents[1] / "shared"


def _run(store: Path, *events: int, workers: int = 1) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(SHARED), never=str(NEVER))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(store), str(workers), *map(str, events)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        start_new_session=True,
    )


def _finished(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], int]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out), int(err.split()[-1])


def _stored(store: Path) -> list[str]:
    """Return the keys of the stored trials, each read back whole."""
    files = sorted((store / "trials").glob("*.json"))
    for file in files:
        assert Trial.model_validate_json(file.read_text()).key == file.stem
    return [file.stem for file in files]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], int]:
    return _finished(_run(tmp_path_factory.mktemp("whole"), NEVER))


@pytest.mark.slow
def test_killed_at_ten_random_points_the_record_is_the_same(
    uninterrupted: tuple[list[dict[str, Any]], int], tmp_path: Path
) -> None:
    expected, events = uninterrupted
    assert events > 100
    stream = random.Random(0)
    # Each kill comes a twelfth of the whole further, at most: ten before it is done.
    points = [stream.randint(1, events // 6) for _ in range(40)]
    found, _ = _finished(_run(tmp_path, *points, NEVER))
    assert found == expected
    assert sorted(t["key"] for t in found) == _stored(tmp_path)


@pytest.mark.slow
def test_killed_with_workers_the_record_is_the_same_and_none_is_left_behind(
    uninterrupted: tuple[list[dict[str, Any]], int], tmp_path: Path
) -> None:
    # Here only flushes, links and removals count: the steps are those of the workers.
    process = _run(tmp_path, 20, workers=2)
    process.communicate()
    assert process.returncode == -9
    assert len(_stored(tmp_path)) in (6, 7)
    _require_ended(process.pid)
    found, _ = _finished(_run(tmp_path, NEVER))
    assert found == uninterrupted[0]
    assert sorted(t["key"] for t in found) == _stored(tmp_path)


def _require_ended(group: int) -> None:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers were left behind")


@pytest.mark.slow
def test_two_processes_share_a_store(
    uninterrupted: tuple[list[dict[str, Any]], int], tmp_path: Path
) -> None:
    both = [_run(tmp_path, NEVER) for _ in range(2)]
    for process in both:
        assert _finished(process)[0] == uninterrupted[0]
    assert sorted(t["key"] for t in uninterrupted[0]) == _stored(tmp_path)
    assert not list((tmp_path / "trials").glob(".*.tmp"))
