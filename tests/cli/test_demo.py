"""The demonstration: it trains, protects, audits and reports, and repeats without work."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from sophon._cli import app

SHORT = ["--set", "protect.rounds=3", "--set", "protect.guard.every=1", "--set", "audit.steps=2"]
SHORT += ["--set", "audit.evaluations=2", "--set", "protect.guard.tolerance_points=50.0"]


def test_the_demo_does_the_whole_job_once(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = CliRunner().invoke(app, ["demo", "--out", str(out), *SHORT])
    assert first.exit_code == 0, first.stderr
    assert "trained: letters validation" in first.stderr
    assert "demonstration on toy data" in first.stdout
    assert "verdict:" in first.stdout
    assert str(out / "audit" / "report.html") in first.stdout
    assert (out / "audit" / "report.html").is_file()
    again = CliRunner().invoke(app, ["demo", "--out", str(out), *SHORT])
    assert again.exit_code == 0
    assert "trained" not in again.stderr
    assert "is complete" in again.stderr
    assert "trial 48/48  stored" in again.stderr
    held = json.loads((out / "start" / "pretraining.json").read_text())["validation"]
    assert held["correct"] / held["total"] >= 0.9
