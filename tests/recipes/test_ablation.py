"""The ablation study: one setting at a time, run from end to end, its tables and its figure."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import ablation
import jobs
from ablation import AXES, BASE, RUN_FILE, results, table, variations
from cells import grid_command
from jobs import Jobs
from sophon._base.errors import IntactnessError
from sophon._cli.run_file import read_run
from sophon._records.round import Round
from tables import failure_file

TINY = (
    "original.limit=10",
    "restricted.0.limit=30",
    "pretrain.steps=2",
    "pretrain.every=2",
    "pretrain.batch_size=16",
    "protect.rounds=3",
    "protect.original_batch_size=8",
    "protect.rehearsal.steps=1",
    "protect.rehearsal.horizon=2",
    "protect.rehearsal.query_batch_size=4",
    "protect.guard.tolerance_points=100.0",
    "audit.steps=2",
    "audit.evaluations=2",
    "audit.batch_size=8",
    "audit.seeds=[0]",
)


# Where the flat keys of the study's run file are now.
PLACES = {
    "protect.suppression_rate": "protect.update.hindrance_rate",
    "protect.suppression_steps": "protect.update.hindrance_steps",
    "protect.suppression": "protect.hinder.0.loss",
    "protect.reinforcement_rate": "protect.update.keep_rate",
    "protect.reinforcement_steps": "protect.update.keep_steps",
    "protect.head_gradient": "protect.hinder.0.head_gradient",
    "protect.clip_norm": "protect.update.clip_norm",
    "protect.rehearsal": "protect.hinder.0",
}
NOW = re.compile("|".join(map(re.escape, PLACES)))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if path.endswith("hinder") and isinstance(value, list):
        value = {str(place): term for place, term in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {k: v for name in value for k, v in leaves(value[name], f"{path}.{name}").items()}


@pytest.mark.parametrize("variation", variations(), ids=lambda v: v.name)
def test_every_run_of_the_study_changes_the_one_setting_of_its_axis(
    variation: ablation.Variation,
) -> None:
    base = leaves(read_run(RUN_FILE, None).model_dump(mode="json"))
    held = leaves(read_run(RUN_FILE, list(variation.settings)).model_dump(mode="json"))
    changed = {key for key in base.keys() | held.keys() if base.get(key) != held.get(key)}
    if variation.name == BASE:
        assert not changed
        return
    key = NOW.sub(lambda found: PLACES[found[0]], variation.settings[0].partition("=")[0])
    if variation.axis == "strategies":
        # What is sampled is one thing, though many values.
        assert {name.removeprefix(f".{key}.").partition(".")[0] for name in changed} == {
            "preparations",
            "learning_rates",
        }
        return
    assert changed == {f".{key}"}


def test_the_base_stands_in_every_axis() -> None:
    for name, values in AXES.items():
        assert [v.name for v in values].count(BASE) == 1, name
        assert len({v.value for v in values}) == len(values) >= 2
    assert [v.name for v in variations()].count(BASE) == 1
    assert variations()[0].name == BASE


@pytest.fixture(scope="module")
def studied(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the study was run, briefly, on two axes; one run failed."""
    out = tmp_path_factory.mktemp("runs")
    axes = {name: AXES[name] for name in ("loss", "strategies", "pool")}
    axes["loss"] = axes["loss"][:2]
    axes["pool"] = axes["pool"][:2]
    axes["tolerance"] = (
        ablation.Variation("tolerance", "none", ("protect.guard.tolerance_points=0.0",)),
    )
    run = jobs.run_protection

    def protect(case: Any, folder: Path, mode: Any) -> Any:
        if case.spec.protect.guard.tolerance_points == 0:
            raise IntactnessError("no weights met the tolerance")
        return run(case, folder, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHON_DATA", str(shared_data))
        patch.setattr(ablation, "AXES", axes)
        patch.setattr(jobs, "run_protection", protect)
        options = [part for setting in TINY for part in ("--set", setting)]
        said = grid_command("ablation", "--out", out, "--quiet", *options)
        assert "| loss | ice |" in said
    return out


@pytest.mark.slow
def test_the_study_runs_from_end_to_end(studied: Path) -> None:
    folder = studied / "small/ablation"
    assert (studied / "bases/small-ablation/model.safetensors").is_file()
    held = results(folder)
    assert set(held) == {BASE, "loss-ice", "strategies-one", "pool-2"}
    assert [len(r.rounds) for r in held.values()] == [3] * 4
    one = {label for r in held["strategies-one"].rounds for label in r.strategies}
    assert len(one) == 1
    assert (folder / "ablation.svg").read_text(encoding="utf-8").startswith("<?xml")
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "failed: no weights met the tolerance" in text
    # Unprotected and fresh networks are attacked once for the whole study.
    files = [folder / name / "protected/model.safetensors" for name in held]
    different = {file.read_bytes() for file in files}
    trials = len(list((folder / "store/trials").iterdir()))
    assert trials == 12 * (2 + len(different)) < 12 * 3 * len(held)


@pytest.mark.slow
def test_the_table_says_what_was_measured_and_leaves_the_rest_empty(studied: Path) -> None:
    folder = studied / "small/ablation"
    held = results(folder)
    lines = table(folder, held).splitlines()
    base = next(line for line in lines if line.startswith("| loss | klu (base)"))
    kept = held[BASE]
    assert kept.before is not None
    assert f"{100 * kept.before.value:.1f} %, " in base
    assert held[BASE].summary.text in base
    empty = next(line for line in lines if line.startswith("| K | 10"))
    assert empty == "| K | 10 |  |  |  |  |  |  |  |"
    assert None not in kept.mild
    assert " / ".join(f"{100 * (v or 0):.1f} %" for v in kept.mild) in base
    assert f"Measured: {kept.origin}; 1 attack seed, one protection seed." in lines
    told = {**held, BASE: dataclasses.replace(kept, changes=("audit.steps",))}
    assert "| changed: audit.steps |" in table(folder, told)
    assert "changed:" not in table(folder, held)
    (folder / "ablation.svg").unlink()
    assert "ablation.svg" in grid_command("ablation", "--table", "--out", studied)
    assert (folder / "ablation.svg").is_file()
    violated = kept.rounds[0].model_copy(update={"guard": "violated"})
    twice: tuple[Round, ...] = (violated, violated, *kept.rounds)
    worse = dataclasses.replace(kept, rounds=twice)
    assert worse.violations == kept.violations + 2
    reason = failure_file(folder / AXES["K"][2].name)
    reason.parent.mkdir()
    reason.write_text("a loss is not finite\n", encoding="utf-8")
    text = table(folder, held)
    assert "| K | 10 |  |  |  |  |  |  | failed: a loss is not finite |" in text


def test_the_study_goes_on_after_any_error_and_its_table_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def work(jobs: Any, file: Path, folder: Path, base: Path, settings: list[str]) -> None:
        del jobs, file, base, settings
        tried.append(folder.name)
        if folder.name == "K-2":
            raise MemoryError("no memory")
        if folder.name == "K-10":
            raise IntactnessError("no weights met the tolerance")

    monkeypatch.setattr(Jobs, "_trained", lambda *_: None)
    monkeypatch.setattr(Jobs, "_protected_and_audited", work)
    arguments = ("ablation", "--out", tmp_path, "--quiet")
    # Weights that never met the tolerance are a result; no memory is none.
    said = grid_command(*arguments, fails=2)
    assert tried == [v.name for v in variations()]
    assert "1 of 19 runs of the study failed: K-2" in said
    folder = tmp_path / "small" / "ablation"
    assert "MemoryError: no memory" in (folder / "K-2" / "traceback.txt").read_text()
    shown = grid_command("ablation", "--table", "--out", tmp_path)
    assert shown.strip() == (folder / "table.md").read_text().strip()
    assert "| K | 2 |  |  |  |  |  |  | failed: MemoryError: no memory |" in shown
    assert "| K | 10 |  |  |  |  |  |  | failed: no weights met the tolerance |" in shown
    monkeypatch.setattr(Jobs, "_protected_and_audited", lambda *_: None)
    grid_command(*arguments)
    assert "failed" not in (folder / "table.md").read_text()


def test_the_study_has_one_size(tmp_path: Path) -> None:
    words = ("ablation", "--scale", "paper", "--out", tmp_path)
    assert "small only" in grid_command(*words, fails=2)
    assert not list(tmp_path.iterdir())
