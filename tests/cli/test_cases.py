"""Inputs that once failed, each with the right answer, from a folder beside the project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(os.environ.get("SOPHON_CASES", Path(__file__).parents[3] / "shared" / "cases"))
NAMES = sorted(path.name for path in CASES.glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", NAMES or [pytest.param("", marks=pytest.mark.skip(f"not at {CASES}"))]
)
def test_a_handed_case_has_its_right_answer(name: str) -> None:
    outer = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        ["bash", str(CASES / "run"), name.partition("-")[0]],
        capture_output=True,
        text=True,
        check=False,
        env={**outer, "SOPHON": str(Path(sys.executable).with_name("sophon"))},
    )
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed"), run.stdout
