"""The paper's grid: recipes, tables of published and re-measured numbers, cells end to end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablation
import jobs
import records
from builders import rehearsal_of
from cells import PAPER, RECIPES, SMALL, command, grid_command, named, spec_of
from grid import (
    CELLS,
    PUBLISHED,
    ROBUST_CELLS,
    SCALES,
    TRAINING_IMAGES,
    Cell,
    Published,
    cell_of,
    published_of,
    text_of,
)
from jobs import Jobs
from robustness import robustness, robustness_attacks, robustness_tables
from sameness import changes_of, require_same_training
from sophon._attacks.suites import resolved, strategies_of
from sophon._base.errors import CheckpointError, DataError, IntactnessError, SpecError
from sophon._cli.application import command_line
from sophon._cli.run_file import load_pretraining
from sophon._cli.run_spec import PretrainRunSpec, RunSpec
from sophon._data.splits import stratified
from sophon._protection.presets import as_paper
from sophon._protection.spec import Alternate
from sophon._records.audit_record import AuditRecord, DomainRecord
from sophon._records.round import Round
from sophon._specs import AuditSpec, parse_spec
from sophon._tasks import Denoising
from tables import folder_of, measured, origin_of, rehearsed_attack, scores_of, table

# --- Recipes -------------------------------------------------------------------------------------


def test_every_cell_has_its_recipes_and_every_recipe_is_of_a_cell() -> None:
    for scale in SCALES:
        cells = [cell for cell in CELLS if cell.scale == scale]
        wanted = {file for cell in cells for file in (cell.run_file, cell.base_file)}
        robust = {cell_of(name, scale).run_file for name in ROBUST_CELLS[scale]}
        wanted |= {file.with_stem(f"{file.stem}-robustness") for file in robust}
        if scale == "small":
            wanted |= {ablation.RUN_FILE, ablation.BASE_FILE}
        assert set((RECIPES / scale).glob("*.toml")) == wanted
        unets = [cell.unet_file for cell in cells if cell.unet_file is not None]
        assert set((RECIPES / scale).glob("*.json")) == set(unets)


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_a_recipe_is_of_its_own_cell(cell: Cell) -> None:
    """It protects what its base trains, and the commands of its opening name its own files."""
    spec, text = spec_of(cell), cell.run_file.read_text()
    base = parse_spec(PretrainRunSpec, tomllib.loads(cell.base_file.read_text()), where="base")
    folder = f"../../runs/bases/{cell.scale}-{cell.architecture}"
    if cell.unet_file is None:
        assert (spec.model.name, spec.model.arguments) == (base.model.name, base.model.arguments)
        assert spec.model.weights == f"{folder}/model.safetensors"
    else:
        assert base.model.name == f"diffusers:{cell.unet_file.name}"
        assert spec.model.name == f"diffusers:{folder}"
    assert (spec.original, spec.task) == (base.original, base.task)
    assert spec.restricted[0].name in TRAINING_IMAGES
    assert rehearsal_of(spec.protect).loss == cell.loss
    scale = "" if cell.scale == "small" else " --scale paper"
    assert f"#   python recipes/reproduce.py {cell.name}{scale}\n" in text
    for word in ("protect", "audit"):
        assert f"#   sophon {word} recipes/{cell.scale}/{cell.name}.toml " in text


def test_every_row_and_column_of_the_paper_is_there() -> None:
    architectures = {cell.architecture for cell in PAPER}
    restricted = {cell.restricted for cell in PAPER}
    assert architectures == {"caformer", "resnet50", "resnet34", "resnet18", "vgg", "ddpm"}
    assert restricted == {"cifar10", "cinic10", "stl10", "mnist", "svhn", "celeba", "ffhq"}
    assert {cell.loss for cell in PAPER} == {"ice", "klu", "dos"}
    assert sum(cell.architecture != "ddpm" for cell in SMALL) == 12
    assert [cell.name for cell in SMALL if cell.architecture == "ddpm"] == ["ddpm-orl-dos"]
    # Published and re-measured numbers of a restricted domain stand side by side.
    assert any(published_of(cell).protected is not None for cell in SMALL)
    assert len({named(cell) for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", PAPER, ids=named)
def test_a_paper_recipe_has_the_papers_hyper_parameters(cell: Cell) -> None:
    protect = as_paper(spec_of(cell).protect, "accuracy")
    rehearsal, update = rehearsal_of(protect), protect.update
    assert isinstance(update, Alternate)
    assert (protect.rounds, rehearsal.steps) == (800, 50)
    assert (update.hindrance_rate, update.keep_rate) == (3e-4, 5e-4)
    assert (update.hindrance_steps, update.keep_steps) == (1, 1)
    assert (protect.original_batch_size, update.clip_norm) == (150, 0.5)
    assert rehearsal.fixed is not None
    assert rehearsal.fixed.batch_size == 150
    assert rehearsal.loss == cell.loss


# What the paper's sets publish: training images by class, or of all where they have no labels here,
# and how many are validation images of their own.
PUBLISHED_SIZES: dict[str, list[int]] = {
    "cifar10": [5_000] * 10,
    "stl10": [500] * 10,
    "mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "svhn": [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659],
    "ffhq": [60_000],
}
OWN_VALIDATION = {"cinic10": 90_000, "celeba": 162_770}


@pytest.mark.parametrize("cell", PAPER, ids=named)
def test_every_attack_of_a_paper_recipe_takes_twenty_epochs(cell: Cell) -> None:
    spec = spec_of(cell)
    if cell.restricted in OWN_VALIDATION:
        images = OWN_VALIDATION[cell.restricted]
    else:
        counts = PUBLISHED_SIZES[cell.restricted]
        labels = np.repeat(np.arange(len(counts)), counts)
        names = tuple(map(str, range(len(counts))))
        kept, _ = stratified(labels, spec.restricted[0].validation, 0, names)
        images = len(kept)
    assert images == TRAINING_IMAGES[str(spec.restricted[0].name)]
    sizes = {(s.batch_size, s.steps) for s in strategies_of(spec.audit)}
    for batch_size, steps in sizes:
        assert abs(steps * batch_size / images - 20) < 20 * 0.001
    text = (RECIPES / "paper" / f"{cell.name}.toml").read_text()
    assert f"20 * {images:,} images / 150" in text


def test_the_papers_original_sets_have_as_many_training_images_as_the_grid_says() -> None:
    imagenette = [963, 955, 993, 858, 941, 956, 961, 931, 951, 960]
    for name, counts in (("Imagenette:full", imagenette), ("CIFAR100", [50_000])):
        labels = np.repeat(np.arange(len(counts)), counts)
        kept, _ = stratified(labels, 0.1, 0, tuple(map(str, range(len(counts)))))
        assert TRAINING_IMAGES[name] == len(kept)


@pytest.mark.parametrize(
    "stated",
    [
        None,
        {"spec": "evil"},
        {"spec": {"rehearsal": []}},
        {"spec": {"rehearsal": {"fixed": {"learning_rate": "fast"}}}},
    ],
)
def test_a_statement_that_cannot_be_read_names_no_rehearsed_attack(stated: Any) -> None:
    assert rehearsed_attack(records.record(protection=stated)) is None


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_the_rehearsed_attack_is_among_those_of_the_audit(cell: Cell) -> None:
    spec = spec_of(cell)
    fixed = rehearsal_of(spec.protect).fixed
    assert fixed is not None
    attacks = strategies_of(spec.audit)
    assert fixed.model_copy(update={"steps": spec.audit.steps}) in attacks


def test_names_that_are_no_cell_are_refused_with_near_ones() -> None:
    assert cell_of("resnet18-gtsrb-klu", "small").restricted == "gtsrb"
    with pytest.raises(SpecError, match=r"did you mean.*resnet18-cifar10-klu"):
        cell_of("resnet18-cifar-klu", "small")
    with pytest.raises(SpecError, match=r"did you mean resnet18-gtsrb-klu"):
        cell_of("ResNet18-GTSRB-KLU", "small")
    with pytest.raises(SpecError, match="use --scale paper"):
        cell_of("resnet34-stl10-ice", "small")
    assert "--list" in grid_command(fails=2)
    assert "use small or paper" in grid_command("--list", "--scale", "tiny", fails=2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("vgg-mnist-klu", "--of", "caformer-mnist-klu"), "--of = caformer-mnist-klu"),
        (("--table", "--of", "caformer-mnist-klu"), "--of = caformer-mnist-klu"),
        (("vgg-mnist-klu", "--list"), "vgg-mnist-klu and --list"),
        (("vgg-gtsrb-klu", "--table", "--scale", "paper"), "use --scale small"),
        (("vgg-mnist-kli", "--table"), "did you mean vgg-mnist-klu"),
        (("all", "--table"), "all and --table"),
        (("all", "--dry-run"), "--dry-run says what protecting one cell takes"),
        (("vgg-mnist-klu", "--table", "--dry-run"), "without --list or --table"),
        (("ablation", "--list"), "ablation and --list"),
        (("--list", "--table"), "one of them"),
        (("--list", "--set", "audit.steps=2"), "'audit.steps=2' and --list"),
        (("--table", "--set", "audit.steps=2"), "'audit.steps=2' and --table"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    assert word in grid_command(*options, "--out", tmp_path / "runs", fails=2)
    assert not (tmp_path / "runs").exists()


def test_a_count_of_workers_is_a_whole_number() -> None:
    assert "-1 is not a whole number from 1 on" in grid_command("all", "--workers", "-1", fails=2)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_is_refused(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    said = grid_command("--list", fails=2)
    wanted = "torchrun started 2 processes, and `python recipes/reproduce.py` is work for one"
    assert (wanted in said) == (rank == "0")


def test_the_script_runs_by_itself_and_a_record_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["recipes/reproduce.py", "vgg-mnist-kli", "--out", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=RECIPES.parent
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: 'vgg-mnist-kli' is no cell of the grid; did you mean")
    assert len(run.stderr.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == f"python recipes/reproduce.py vgg-mnist-kli --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["sophon/__main__.py", "demo"])
    assert command_line() == "sophon demo"


def test_the_list_is_of_both_scales_or_of_the_one_asked_for(tmp_path: Path) -> None:
    for scale, cells in (("small", SMALL), ("paper", PAPER)):
        lines = grid_command("--list", "--scale", scale, "--out", tmp_path).splitlines()
        assert [line.split()[:2] for line in lines] == [[cell.name, scale] for cell in cells]


# --- Tables --------------------------------------------------------------------------------------


def test_cells_that_never_ran_stay_empty(tmp_path: Path) -> None:
    lines = table(tmp_path, "paper").splitlines()
    count = 2 + len(PAPER)
    assert lines[count] == ""
    rows = {line.split(" | ")[0].strip("| "): line.strip("|").split("|") for line in lines[2:count]}
    assert len(rows) == len(PAPER)
    known = [one.strip() for one in rows["caformer-cifar10-ice"]]
    assert known[1:] == ["99.6, 96.2 [1]", "62.7 / 84.8 / 15.2 [1]", *[""] * 6]
    assert [one.strip() for one in rows["resnet34-svhn-klu"]][1:] == ["99.0, ? [2]"] + [""] * 7
    assert [one.strip() for one in rows["ddpm-ffhq-dos"]][1:] == [""] * 8
    assert rows["ddpm-celeba-dos"][2].strip() == "0.479 / 0.445 / 0.705 [3]"
    notes = lines[count + 1 :]
    assert [note[:4] for note in notes] == ["[1] ", "[2] ", "[3] "]
    assert all("second-hand" in note for note in notes)
    assert "loss not stated" in notes[0]
    assert "timestep 1 only: --set task.timestep=1 compares" in notes[2]
    output = grid_command("--list", "--out", tmp_path)
    assert output.count("not run") == len(CELLS)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_published_is_shown_as_published() -> None:
    # Everything else would be made up: these are the numbers of the design page, and no others.
    assert set(PUBLISHED) == {"caformer-cifar10-ice", "ddpm-celeba-dos"}
    before = {p.before for p in map(published_of, PAPER)} - {None}
    assert before == {99.6, 99.2, 99.0, 98.6, 95.4}
    others = [published_of(cell) for cell in CELLS if cell.name not in PUBLISHED]
    assert {(p.after, p.scratch, p.unprotected, p.protected) for p in others} == {(None,) * 4}
    assert all(p.source for p in PUBLISHED.values())
    # The paper has no traffic signs.
    assert published_of(cell_of("resnet18-gtsrb-klu", "small")) == Published("")
    rows = (RECIPES.parent / "docs" / "paper.md").read_text()
    assert "the tables of" in rows
    assert "footnotes" in rows


def test_robustness_is_three_methods_by_five_optimizers_five_rates_and_five_sizes() -> None:
    tables = robustness(AuditSpec(steps=30))
    assert [len(rows) for rows in tables.values()] == [15, 5, 5]
    grid = {
        (s.optimizer, len(s.preparations), s.scope) for s in tables["method and optimizer"].values()
    }
    assert len(grid) == 15
    assert len({s.learning_rate for s in tables["learning rate"].values()}) == 5
    assert len({s.batch_size for s in tables["batch size"].values()}) == 5
    spec = AuditSpec(steps=30)
    extra = robustness_attacks(spec)
    together = strategies_of(spec.model_copy(update={"extra": extra}))
    wanted = {s for rows in tables.values() for s in rows.values()}
    assert wanted <= set(together)
    assert len(together) == 12 + len(extra)


@pytest.mark.parametrize(
    "cell", [cell_of(name, scale) for scale in SCALES for name in ROBUST_CELLS[scale]], ids=named
)
def test_a_robustness_recipe_is_the_cells_with_the_attacks_of_the_tables(cell: Cell) -> None:
    file = RECIPES / cell.scale / f"{cell.name}-robustness.toml"
    spec, own = parse_spec(RunSpec, tomllib.loads(file.read_text()), where=file.name), spec_of(cell)
    assert (spec.model, spec.protect, spec.restricted) == (own.model, own.protect, own.restricted)
    tables = robustness(own.audit).values()
    attacks = strategies_of(spec.audit)
    assert {s for rows in tables for s in rows.values()} <= set(attacks)
    assert set(attacks) == {*strategies_of(own.audit), *robustness_attacks(own.audit)}


def test_robustness_is_of_one_cell_of_each_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[str] = []

    def attack(jobs: Any, cell: Cell) -> None:
        del jobs
        attacked.append(cell.name)
        if cell.architecture == "vgg":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Jobs, "robustness", attack)
    grid_command("robustness", "--out", tmp_path)
    assert attacked == ["resnet18-gtsrb-klu", "ddpm-orl-dos"]
    said = grid_command("robustness", "--scale", "paper", "--out", tmp_path, fails=2)
    assert attacked[2:] == ["vgg-cifar10-ice", "ddpm-celeba-dos"]
    assert "1 of 2 cells failed: vgg-cifar10-ice" in said


def test_robustness_tables_are_printed_from_stored_records(
    reproduced: tuple[Path, str], tmp_path: Path
) -> None:
    out, printed = reproduced
    words = ("robustness", "--table", "--of", "caformer-mnist-klu", "--out")
    shown = grid_command(*words, out)
    assert shown.startswith("### caformer-mnist-klu, small: robustness")
    assert shown.strip() in printed
    said = "caformer-mnist-klu, small: robustness: not run\n"
    assert grid_command(*words, tmp_path) == said
    both = grid_command("robustness", "--table", "--scale", "paper", "--out", tmp_path)
    assert [line.split(",")[0] for line in both.splitlines()] == list(ROBUST_CELLS["paper"])
    assert not list(tmp_path.iterdir())
    file = tmp_path / "small" / "caformer-mnist-klu-robustness" / "audit" / "record.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert "unreadable: " in grid_command(*words, tmp_path)
    assert "is no cell" in grid_command(*words[:-2], "nothing", "--out", tmp_path, fails=2)


def test_runs_below_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.write_text("")
    for option in ("--list", "--table"):
        said = grid_command(option, "--out", file, fails=2)
        assert f"{file} is a file; give the folder of the runs" in said


def test_robustness_without_images_says_what_is_missing_and_tries_both_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path / "nowhere"))
    said = grid_command("robustness", "--out", tmp_path / "runs", fails=2)
    assert "tiny_imagenet20_64.npz" in said
    assert "cifar100.npz" in said
    assert "2 of 2 cells failed: resnet18-gtsrb-klu, ddpm-orl-dos" in said
    assert len(list((tmp_path / "runs").rglob("traceback.txt"))) == 2


def test_a_cell_of_diffusion_has_the_network_that_it_trained(tmp_path: Path) -> None:
    name = ("--set", "model.name=diffusers:unet.json")
    said = grid_command("ddpm-orl-dos", *name, "--out", tmp_path / "runs", fails=2)
    assert "--set model.name: ddpm-orl-dos protects the network that it trained" in said
    assert not (tmp_path / "runs").exists()


# --- A small cell from end to end ----------------------------------------------------------------

TINY = (
    "original.limit=10",
    "restricted.0.limit=30",
    "pretrain.steps=4",
    "pretrain.every=2",
    "pretrain.batch_size=16",
    "protect.rounds=2",
    "protect.original_batch_size=8",
    "protect.rehearsal.steps=1",
    "protect.rehearsal.query_batch_size=4",
    "protect.rehearsal.fixed.batch_size=8",
    "protect.guard.tolerance_points=100.0",
    "audit.steps=2",
    "audit.evaluations=2",
    "audit.batch_size=8",
    "audit.seeds=[0]",
)


def tiny() -> list[str]:
    return [part for setting in TINY for part in ("--set", setting)]


@pytest.fixture(scope="module")
def reproduced(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Path
) -> Iterator[tuple[Path, str]]:
    """Return where a small cell was reproduced, briefly, with the tables of robustness."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHON_DATA", str(shared_data))
        fields = ("--out", out, "--quiet", *tiny())
        printed = grid_command("robustness", "--of", "caformer-mnist-klu", *fields)
        yield out, printed


def record_of(out: Path, name: str) -> AuditRecord:
    return AuditRecord.model_validate_json((out / "small" / name / "audit/record.json").read_text())


def test_a_cell_trains_its_base_protects_and_audits(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    assert (out / "bases" / "small-caformer" / "model.safetensors").is_file()
    folder = out / "small" / "caformer-mnist-klu"
    lines = (folder / "protected" / "rounds.jsonl").read_text().splitlines()
    assert len([Round.model_validate_json(line) for line in lines]) == 2
    kept = (folder / "run.toml").read_text()
    assert kept == text_of(cell_of("caformer-mnist-klu", "small").run_file)
    assert 'weights = "../../bases/small-caformer/model.safetensors"' in kept
    record = record_of(out, "caformer-mnist-klu")
    assert record.original.name == "tiny-imagenet20"
    assert record.restricted[0].name == "mnist"


def test_the_table_shows_what_was_measured(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    record = record_of(out, "caformer-mnist-klu")
    held, attack = (
        measured(record, cell_of("caformer-mnist-klu", "small")),
        rehearsed_attack(record),
    )
    assert attack is not None
    assert (attack.optimizer, attack.learning_rate) == ("sgd_momentum", 1e-3)
    trials = [t for t in record.trials if t.strategy == attack]
    assert sorted(t.subject for t in trials) == ["protected", "scratch", "unprotected"]
    by_subject = {t.subject: t.test.value for t in trials if t.test is not None}
    assert held.rehearsed == tuple(
        by_subject[name] for name in ("scratch", "unprotected", "protected")
    )
    assert held.worst[2] is not None
    printed = grid_command("--table", "--out", out)
    row = next(line for line in printed.splitlines() if line.startswith("| caformer-mnist-klu"))
    assert f"{100 * by_subject['protected']:.1f} | " in row
    # A run of two steps is not the cell of that name, and does not pass for it.
    verdict = row.strip("| ").split(" | ")[-1]
    assert verdict.startswith("changed: ")
    assert {"audit.steps", "protect.rounds", "protect.hinder.0.steps"} <= set(
        verdict.removeprefix("changed: ").split(", ")
    )
    assert "restricted.0: 270 training images instead of 4,500" in verdict
    assert held.verdict not in row
    listed = grid_command("--list", "--scale", "small", "--out", out).splitlines()
    states = {line.split()[0]: line.split()[-1] for line in listed}
    assert states.pop("caformer-mnist-klu") == "changed"
    assert set(states.values()) == {"run"}
    other = next(line for line in printed.splitlines() if line.startswith("| vgg-mnist-klu"))
    assert other.endswith("|  |  |  |  |  |")


def test_robustness_fills_its_tables(reproduced: tuple[Path, str]) -> None:
    out, printed = reproduced
    record = record_of(out, "caformer-mnist-klu-robustness")
    cell = cell_of("caformer-mnist-klu", "small")
    text = robustness_tables(record, cell, out / "bases" / "small-caformer")
    assert text.strip() in printed
    assert text.startswith("### caformer-mnist-klu, small: robustness")
    assert f"Measured: {origin_of(record)}." in text
    # It was run briefly, with few images: not the cell.
    fewer_images = "original: 180 training images instead of 4,500"
    assert f"**Not the cell of that name**, changed: {fewer_images}," in text
    assert "audit.extra" not in text
    own = as_the_cell_says(record, cell)
    told = own.model_copy(update={"command": "python recipes/reproduce.py robustness"})
    assert "changed" not in robustness_tables(told, cell)
    for rows in robustness(AuditSpec(steps=2, batch_size=8)).values():
        for name, attack in rows.items():
            scores = scores_of(record, attack)
            assert None not in scores, name
            shown = " | ".join(f"{100 * score:.1f} %" for score in scores if score is not None)
            assert f"| {name} | {shown} |" in text
    assert "2 steps an attack" in text
    assert "attack seeds 0." in text
    assert "ublished" not in text
    lost = record.trials[0]
    crashed = lost.model_copy(update={"test": None})
    fewer = record.model_copy(update={"trials": (crashed, *record.trials[1:])})
    twice = [trial.model_copy(update={"seed": 1}) for trial in record.trials]
    spec = record.spec.model_copy(update={"seeds": (0, 1)})
    both = fewer.model_copy(update={"spec": spec, "trials": (*fewer.trials, *twice)})
    assert robustness_tables(both, cell).count("(1 of 2 seeds)") == len(
        [
            1
            for rows in robustness(AuditSpec(steps=2, batch_size=8)).values()
            for attack in rows.values()
            if attack == lost.strategy
        ]
    )
    published = robustness_tables(record, cell_of("vgg-mnist-klu", "small"))
    assert published.count("56.4") == 1
    last = published.splitlines()[-1]
    assert "56.4" in last
    assert "restricted set, method and loss are not named" in last


def as_the_cell_says(record: AuditRecord, cell: Cell) -> AuditRecord:
    """Return the record as if the cell had been run unchanged."""
    spec = spec_of(cell)

    def whole(domain: DomainRecord) -> DomainRecord:
        return domain.model_copy(update={"train": TRAINING_IMAGES[domain.name]})

    protection = {**(record.protection or {}), "spec": spec.protect.model_dump(mode="json")}
    changes = {
        "spec": resolved(spec.audit),
        "protection": protection,
        "original": whole(record.original),
        "restricted": tuple(whole(one) for one in record.restricted),
    }
    return record.model_copy(update=changes)


def test_a_record_is_the_cells_only_where_nothing_was_changed(
    reproduced: tuple[Path, str], tmp_path: Path
) -> None:
    cell = cell_of("caformer-mnist-klu", "small")
    record = as_the_cell_says(record_of(reproduced[0], cell.name), cell)
    assert changes_of(record, cell) == ()
    file = tmp_path / "small" / cell.name / "audit" / "record.json"
    file.parent.mkdir(parents=True)
    file.write_text(record.model_dump_json())
    lines = [line for line in table(tmp_path, "small").splitlines() if cell.name in line]
    row, origin = lines
    assert origin == f"- {cell.name}: {origin_of(record)}"
    assert row.endswith(f"| {measured(record, cell).verdict} |")
    listed = grid_command("--list", "--scale", "small", "--out", tmp_path)
    assert listed.count("measured") == 1
    protection: dict[str, Any] = dict(record.protection or {})
    longer = {**protection["spec"], "rounds": 800}
    fields: dict[str, dict[str, Any]] = {
        "model.name": {"model": "timm:resnet18"},
        "audit.seeds": {"spec": record.spec.model_copy(update={"seeds": (0, 1)})},
        "protect.rounds": {"protection": {**protection, "spec": longer}},
        "protect": {"protection": None},
        "protected with other images": {
            "protection": {
                **protection,
                "identity": {**protection["identity"], "domains": "of fewer images"},
            }
        },
        "original": {"original": record.original.model_copy(update={"name": "other"})},
        "original.image_size": {
            "original": record.original.model_copy(update={"image": (3, 64, 64)})
        },
        "restricted.0: 9 training images instead of 4,500": {
            "restricted": (record.restricted[0].model_copy(update={"train": 9}),)
        },
        "benign": {"benign": record.restricted},
        "task.timestep": {"task_name": "denoising, epsilon prediction, timestep 1 alone of 1000"},
    }
    for expected, change in fields.items():
        assert changes_of(record.model_copy(update=change), cell) == (expected,)
    # Another cell's name makes it no run of that cell.
    assert "protect.suppression" in changes_of(
        record.model_copy(
            update={"protection": {"spec": {**protection["spec"], "suppression": "ice"}}}
        ),
        cell,
    )
    assert "restricted" in changes_of(record, cell_of("caformer-gtsrb-klu", "small"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--set pretrain.steps=20", ("pretrain.steps",)),
        ("--set=model.in_channels=1", ("model.in_channels",)),
        ("--set 'model.arguments.width = 3'", ("model.arguments.width",)),
        ("--set original.split_seed=1", ("original.split_seed",)),
        ("--set restricted.0.normalisation=mnist", ("restricted.0.normalisation",)),
        ("--set restricted.0.class_order=stl10 --set task.timestep=1", None),
        # Where things lie is no change, and what the record holds is compared by value.
        ("--set original.path=x --set restricted.0.download=true --set original.root=x", ()),
        ("--set model.weights=x.pth --set model.pretrained=false", ()),
        ("--set audit.steps=100 --set protect.rounds=120 --threads 2", ()),
    ],
)
def test_what_a_command_sets_makes_another_cell(
    words: str, expected: tuple[str, ...] | None, reproduced: tuple[Path, str]
) -> None:
    cell = cell_of("caformer-mnist-klu", "small")
    record = as_the_cell_says(record_of(reproduced[0], cell.name), cell)
    told = record.model_copy(update={"command": f"python recipes/reproduce.py {cell.name} {words}"})
    wanted = ("restricted.0.class_order", "task.timestep") if expected is None else expected
    assert changes_of(told, cell) == wanted


def test_a_base_trained_otherwise_makes_another_cell(
    reproduced: tuple[Path, str], tmp_path: Path
) -> None:
    cell = cell_of("caformer-mnist-klu", "small")
    record = as_the_cell_says(record_of(reproduced[0], cell.name), cell)
    shutil.copytree(reproduced[0] / "bases", tmp_path / "bases")
    base = tmp_path / "bases" / "small-caformer"
    found = changes_of(record, cell, base)
    assert found == ("pretrain.steps", "pretrain.batch_size", "pretrain.every")
    file = base / "pretraining.json"
    held = json.loads(file.read_text())
    base_spec = parse_spec(
        PretrainRunSpec,
        tomllib.loads((RECIPES / "small" / "base-caformer.toml").read_text()),
        where="base",
    )
    held["spec"] = base_spec.pretrain.model_dump(mode="json")
    file.write_text(json.dumps(held))
    assert changes_of(record, cell, base) == ()
    # From random weights where the recipe begins with published ones.
    paper = cell_of("resnet18-cifar10-ice", "paper")
    assert "model.pretrained" in changes_of(record, paper, base)
    assert "model.pretrained" not in changes_of(record, paper)
    described = json.loads((base / "model.json").read_text())
    described["model"]["weights"] = "published.pth"
    (base / "model.json").write_text(json.dumps(described))
    assert "model.pretrained" not in changes_of(record, paper, base)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        changes_of(record, cell, base)


def test_a_diffusion_model_of_other_timesteps_is_not_reused(tmp_path: Path) -> None:
    names = [Denoising(timestep=step).name for step in (None, 1)]
    held = {"spec": {}, "identity": {"task": names[0], "domains": "x"}, "original": "CIFAR100"}
    (tmp_path / "pretraining.json").write_text(json.dumps(held))
    require_same_training(tmp_path, "x", names[0])
    with pytest.raises(CheckpointError, match=r"timesteps 0 to 999 .*not for .*timestep 1 alone"):
        require_same_training(tmp_path, "x", names[1])


def test_a_damaged_record_marks_its_own_row(reproduced: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    cell = cell_of("caformer-mnist-klu", "small")
    whole = record_of(reproduced[0], cell.name).model_dump_json()
    for name, text in ((cell.name, whole), ("vgg-mnist-klu", whole[:1000])):
        file = out / "small" / name / "audit" / "record.json"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    printed = grid_command("--table", "--out", out).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in printed}
    assert "is not a whole audit record of this version: repeat the audit" in rows["vgg-mnist-klu"]
    assert "changed: " in rows[cell.name]
    listed = grid_command("--list", "--scale", "small", "--out", out)
    assert (listed.count("unreadable"), listed.count("changed")) == (1, 1)


def test_a_cell_ends_with_its_own_row_of_the_table(
    reproduced: tuple[Path, str], shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    out, name = reproduced[0], "caformer-cifar10-ice"
    whole = grid_command("--table", "--out", out).splitlines()
    for cell in (name, "caformer-mnist-klu"):
        shown = grid_command(cell, "--table", "--out", out).splitlines()
        (row,) = (line for line in whole if line.startswith(f"| {cell} "))
        # The footnotes of one row are numbered from 1.
        assert shown[:3] == [*whole[:2], row.replace("[2]", "[1]")]
    assert shown[3:5] == ["", "[1] second-hand: file names of the released research code"]
    assert shown[-1].startswith("- caformer-mnist-klu: ")
    again = ("caformer-mnist-klu", "--out", out, *tiny())
    printed = grid_command(*again)
    assert printed.endswith("\n".join(shown) + "\n")
    assert printed.index("verdict: ") < printed.index(shown[2])
    assert shown[2] not in grid_command(*again, "--quiet")


@pytest.mark.parametrize("cell", ["caformer-mnist-klu", "ddpm-orl-dos"])
def test_what_a_cell_takes_is_said_without_its_base_and_nothing_is_written(
    cell: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    fewer = ("--set", "original.limit=10", "--set", "restricted.0.limit=30")
    said = grid_command(cell, "--dry-run", *fewer, "--out", tmp_path / "runs")
    rounds = spec_of(cell_of(cell, "small")).protect.rounds
    assert f"forecast: {rounds} rounds of " in said
    assert "nothing was written" in said
    assert not (tmp_path / "runs").exists()


def test_a_finished_cell_is_not_run_again(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    file = out / "bases" / "small-caformer" / "model.safetensors"
    trials = sorted((out / "small" / "store" / "trials").iterdir())
    before = [path.stat().st_mtime_ns for path in (file, *trials)]
    grid_command("caformer-mnist-klu", "--out", out, "--quiet", *tiny())
    assert [path.stat().st_mtime_ns for path in (file, *trials)] == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("pretrain.steps=6", "was trained with pretrain.steps = 4, not 6"),
        ("model.in_channels=1", "was trained with model.in_channels = 3, not 1"),
        ("original.limit=11", "was trained on other images of 'tiny-imagenet20'"),
    ],
)
def test_a_base_trained_otherwise_is_not_reused(
    setting: str, words: str, reproduced: tuple[Path, str], shared_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(reproduced[0] / "bases", out / "bases")
    fields = ("--out", out, "--quiet", *tiny(), "--set", setting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHON_DATA", str(shared_data))
        said = grid_command("caformer-mnist-klu", *fields, fails=2)
    assert words in said
    assert "give another --out, or repeat the same --set" in said
    assert not list(out.rglob("rounds.jsonl"))


def test_a_recipe_that_was_changed_since_is_refused_where_it_was_run(
    reproduced: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(reproduced[0], out)
    again = ("caformer-mnist-klu", "--out", out, "--quiet", *tiny())
    cell, base = out / "small/caformer-mnist-klu", out / "bases/small-caformer"
    for file, run, old, new in (
        (cell / "run.toml", cell, "rounds = 120", "rounds = 100"),
        (out / "bases/small-caformer.toml", base, "steps = 1500", "steps = 100"),
    ):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        said = grid_command(*again, fails=2)
        assert f"{file} is not today's recipe and {run} holds a run of it" in said
        assert "delete" in said
        # Comments say nothing of what was run.
        file.write_text("# Of last week.\n" + text)
        grid_command(*again)
        assert file.read_text() == text


def test_robustness_of_a_model_protected_otherwise_is_refused(
    reproduced: tuple[Path, str], shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    again = ("robustness", "--of", "caformer-mnist-klu", "--out", reproduced[0])
    said = grid_command(*again, "--quiet", *tiny(), "--set", "protect.rounds=3", fails=2)
    assert "was protected with other protect.rounds: give another --out" in said


def test_without_a_run_a_recipe_is_written_afresh_and_data_found_before_a_base_is_trained(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    (data / "tiny_imagenet20_64.npz").symlink_to(shared_data / "tiny_imagenet20_64.npz")
    monkeypatch.setenv("SOPHON_DATA", str(data))
    cell = cell_of("caformer-mnist-klu", "small")
    file = out / "small" / cell.name / "run.toml"
    file.parent.mkdir(parents=True)
    file.write_text("[model]\n")
    said = grid_command(cell.name, "--out", out, "--quiet", *tiny(), fails=2)
    assert "mnist.npz" in said
    assert not (out / "bases" / "small-caformer").exists()
    assert file.read_text() == text_of(cell.run_file)
    assert "restricted" not in (out / "bases" / "small-caformer.toml").read_text()


def test_where_a_base_comes_from_is_no_affair_of_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["model.weights=x.pth", "model.pretrained=false", "restricted.0.limit=3"]
    given += ["model.head=fc", "pretrain.steps=2", "protect.rounds=1"]
    jobs = Jobs(tmp_path, given, "quiet", None, 1)
    assert jobs.of_cells == given[2:]
    here = f'model.weights="{tmp_path / "x.pth"}"'
    assert jobs.of_bases == [here, given[1], "model.head=fc", "pretrain.steps=2"]


def test_paths_given_to_a_cell_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["restricted.0.path = 'x.npz'", "original.root=${X}", "model.weights=~/x.pth"]
    jobs = Jobs(tmp_path, given, "quiet", None, 1)
    assert jobs.settings == [f'restricted.0.path="{tmp_path / "x.npz"}"', *given[1:]]


def test_a_relative_folder_of_images_starts_at_the_working_directory(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").symlink_to(shared_data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOPHON_DATA", "images")
    case = load_pretraining(RECIPES / "small/base-caformer.toml", ["original.limit=2"])
    assert case.original.name == "tiny-imagenet20"


def test_all_cells_are_tried_and_a_base_is_trained_once(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    for name in ("tiny_imagenet20_64", "mnist", "gtsrb10"):
        (data / f"{name}.npz").symlink_to(shared_data / f"{name}.npz")
    monkeypatch.setenv("SOPHON_DATA", str(data))
    names = ["caformer-gtsrb-klu", "caformer-cifar10-ice", "caformer-mnist-klu"]
    monkeypatch.setattr("grid.CELLS", tuple(cell_of(name, "small") for name in names))
    trained: list[Path] = []
    pretrain, protect = jobs.run_pretraining, jobs.run_protection

    def pretrained(case: Any, folder: Path, mode: Any) -> Any:
        trained.append(folder)
        return pretrain(case, folder, mode)

    def protected(case: Any, folder: Path, mode: Any) -> Any:
        if case.restricted[0].name == "gtsrb":
            raise RuntimeError("out of memory")
        return protect(case, folder, mode)

    def audited(jobs: Any, file: Path, folder: Path, to: Path, settings: list[str]) -> None:
        del jobs, file, folder, settings
        audits.append(to)

    audits: list[Path] = []
    monkeypatch.setattr(Jobs, "_audit", audited)
    monkeypatch.setattr(jobs, "run_pretraining", pretrained)
    monkeypatch.setattr(jobs, "run_protection", protected)
    said = grid_command("all", "--out", out, "--quiet", *tiny(), fails=2)
    assert "caformer-gtsrb-klu: RuntimeError: out of memory" in said
    assert "cifar10.npz" in said
    assert "error: 2 of 3 cells failed: caformer-gtsrb-klu, caformer-cifar10-ice" in said
    kept = [out / "small" / name / "traceback.txt" for name in names]
    assert [file.is_file() for file in kept] == [True, True, False]
    assert "in protected" in kept[0].read_text()
    assert audits == [out / "small" / "caformer-mnist-klu" / "audit"]
    assert trained == [out / "bases" / "small-caformer"]


def test_a_cell_that_failed_is_told_from_one_that_never_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(jobs: Any, cell: Cell) -> tuple[Path, Path]:
        folder = folder_of(jobs.out, cell)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "run.toml", tmp_path

    def unmet(*_: Any) -> None:
        raise IntactnessError("no weights met the tolerance | loosen it")

    monkeypatch.setattr(Jobs, "_prepared", prepared)
    monkeypatch.setattr(Jobs, "_protected_and_audited", unmet)
    cell = ("vgg-mnist-klu", "--out", tmp_path)
    grid_command(*cell, fails=3)

    def shown(option: str) -> str:
        lines = grid_command(option, "--scale", "small", "--out", tmp_path).splitlines()
        (line,) = (one for one in lines if "vgg-mnist-klu" in one)
        return line

    said = r"failed: no weights met the tolerance \| loosen it"
    assert shown("--table").endswith(f"| {said} |")
    assert shown("--list").endswith(said)

    def raising(error: BaseException) -> Any:
        def work(*_: Any) -> None:
            raise error

        return work

    # Without its images a cell has not begun anew: what was said of it stands.
    monkeypatch.setattr(Jobs, "_protected_and_audited", raising(DataError("no file")))
    grid_command(*cell, fails=2)
    assert shown("--list").endswith(said)
    monkeypatch.setattr(Jobs, "_protected_and_audited", raising(KeyboardInterrupt()))
    grid_command(*cell, fails=130)
    assert shown("--list").endswith("not run")
    begun = tmp_path / "small" / "vgg-mnist-klu" / "protected" / "run.json"
    begun.parent.mkdir()
    begun.write_text("{}")
    assert shown("--list").endswith("unfinished")
    assert shown("--table").endswith("| unfinished |")


def test_a_base_that_another_process_trains_is_no_failure_of_the_cell(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    base = tmp_path / "bases" / "small-caformer"
    base.mkdir(parents=True)
    with (base / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fields = ("--out", tmp_path, "--quiet", *tiny())
        said = grid_command("caformer-mnist-klu", *fields, fails=2)
    wanted = "the base is being trained by another process; wait for it and repeat the command"
    assert f"{base}: {wanted}" in said
    listed = grid_command("--list", "--scale", "small", "--out", tmp_path)
    assert "failed" not in listed
    assert not list(tmp_path.rglob("failed.txt"))


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_cell_without_its_images_never_ran(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", folder)
    cell = ("vgg-mnist-klu", "--out", tmp_path)
    said = grid_command(*cell, fails=2)
    assert ("needs SOPHON_DATA): export it" if not folder else "there is no file") in said
    lines = grid_command("--list", "--scale", "small", "--out", tmp_path).splitlines()
    assert [line.split()[-2:] for line in lines if "vgg-mnist-klu" in line] == [["not", "run"]]


def test_ctrl_c_ends_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run(jobs: Any, cell: Cell) -> None:
        del jobs
        tried.append(cell.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Jobs, "run", run)
    grid_command("all", "--out", tmp_path, fails=130)
    assert tried == [SMALL[0].name]


@pytest.mark.parametrize("cell", ["resnet18-gtsrb-klu", "robustness", "ablation"])
@pytest.mark.parametrize("setting", ["protect.rond=2", 'protect.rounds="x"'])
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(
    cell: str, setting: str, tmp_path: Path
) -> None:
    said = grid_command(cell, "--set", setting, "--out", tmp_path / "runs", fails=2)
    assert setting.partition("=")[0] in said
    assert not (tmp_path / "runs").exists()


def test_data_that_is_not_there_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path / "nowhere"))
    output = grid_command("resnet18-mnist-klu", "--out", tmp_path, fails=2)
    assert "tiny_imagenet20_64.npz" in output
    assert "recipes/make_archives.py (docs/data.md)" in output
    assert not list(tmp_path.rglob("*.safetensors"))
    paper = ("resnet18-svhn-ice", "--scale", "paper", "--out", tmp_path)
    paper += ("--set", "model.pretrained=false")
    assert "github.com/fastai/imagenette" in grid_command(*paper, fails=2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (None, "the published weights of torchvision:resnet18 are not at hand (torch's cache"),
        ("model.name=torchvision:resnet81", "did you mean torchvision:resnet18"),
        ("model.name=small_convent", "did you mean small_convnet"),
        ("model.pretrained=false", "nowhere.pth does not exist"),
    ],
)
def test_a_model_out_of_reach_is_said_before_images_are_read(
    setting: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "sophon._cli.run_file.load_domain", lambda *_, role, **__: read.append(role)
    )
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [] if setting is None else ["--set", setting]
    if setting == "model.pretrained=false":
        given += ["--set", "model.weights=nowhere.pth"]
    cell = ("resnet18-mnist-ice", "--scale", "paper", "--out", tmp_path, *given)
    assert words in grid_command(*cell, fails=2)
    assert read == []


def test_pictures_that_could_not_be_judged_are_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path / "nowhere"))
    cell = ("ddpm-orl-dos", "--out", tmp_path)
    assert "pip install -c constraints.txt '.[quality]'" in grid_command(*cell, fails=2)
    said = grid_command(*cell, "--set", "audit.samples.count=0", fails=2)
    assert "cifar100.npz" in said


@pytest.mark.parametrize("restricted", ["", "restricted = []\n"])
@pytest.mark.parametrize("words", [("protect",), ("audit", "--model", "x"), ("inspect",)])
def test_only_pretraining_takes_a_run_file_without_a_restricted_set(
    words: tuple[str, ...], restricted: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "run.toml", tmp_path / "out"
    file.write_text(
        restricted
        + '[model]\nname = "small_convnet"\nin_channels = 1\n'
        + '[original]\nsource = "embedded"\nname = "digits"\nlimit = 6\n'
        + "[pretrain]\nsteps = 1\nbatch_size = 4\n"
    )
    wanted = "restricted = []: give at least 1" if restricted else "restricted is missing; add it"
    place = () if words == ("inspect",) else ("--out", out)
    assert wanted in command(words[0], file, *words[1:], *place, fails=2)
    assert not out.exists()
    command("pretrain", file, "--out", out, "--quiet")
    assert (out / "model.safetensors").is_file()
