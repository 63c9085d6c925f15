"""Inputs that once failed, each with the right answer, from a folder beside the project."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(os.environ.get("SOPHON_CASES", Path(__file__).parents[3] / "shared" / "cases"))
NAMES = sorted(path.name for path in CASES.glob("[0-9]*"))

# A demonstration as everywhere, but short: a case wants its record, not its result.
SHORT = "--set pretrain.steps=40 --set protect.rounds=5 --set audit.steps=2"
SHORT += " --set audit.evaluations=2 --set protect.guard.tolerance_points=100.0"


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """Return a `sophon` whose demonstration is short, beside its Python."""
    python = shlex.quote(sys.executable)
    whole = f"exec {shlex.quote(str(Path(sys.executable).with_name('sophon')))}"
    scripts = {
        "python": f'exec {python} "$@"',
        "sophon": f'[ "$1" != demo ] || {whole} "$@" {SHORT}\n{whole} "$@"',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "sophon"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", NAMES or [pytest.param("", marks=pytest.mark.skip(f"not at {CASES}"))]
)
def test_a_handed_case_has_its_right_answer(name: str, executable: Path) -> None:
    outer = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        ["bash", str(CASES / "run"), name.partition("-")[0]],
        capture_output=True,
        text=True,
        check=False,
        env={**outer, "SOPHON": str(executable)},
    )
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed"), run.stdout
