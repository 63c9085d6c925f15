"""The paper's grid: recipes, tables of published and re-measured numbers, cells end to end."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import formats
from sophon._attacks import strategies_of
from sophon._cli import app
from sophon._compatibility import prepare_torchvision
from sophon._errors import SpecError
from sophon._grid import (
    CELLS,
    PUBLISHED,
    PUBLISHED_BEFORE,
    Cell,
    cell_of,
    published_of,
    robustness,
    run_file,
)
from sophon._networks import SmallConvNet
from sophon._records import AuditRecord, Round
from sophon._reproduction import (
    measured,
    rehearsed_attack,
    robustness_attacks,
    robustness_tables,
    scores_of,
    table,
)
from sophon._specs import AuditSpec, RunSpec, parse_spec

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
SMALL = [cell for cell in CELLS if cell.scale == "small"]
PAPER = [cell for cell in CELLS if cell.scale == "paper"]
CLASSIFIERS = [cell for cell in PAPER if cell.architecture != "ddpm"]
DIFFUSION = [cell for cell in PAPER if cell.architecture == "ddpm"]


def named(cell: Cell) -> str:
    return f"{cell.scale}-{cell.name}"


def command(*arguments: str | Path, fails: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == fails, result.output
    return result.output


def spec_of(cell: Cell) -> RunSpec:
    data = tomllib.loads((RECIPES / cell.scale / f"{cell.name}.toml").read_text())
    return parse_spec(RunSpec, data, where=cell.name)


# --- Recipes -------------------------------------------------------------------------------------


def test_the_recipes_are_what_the_grid_says() -> None:
    found = importlib.util.spec_from_file_location("write", RECIPES / "write.py")
    assert found is not None
    assert found.loader is not None
    write = importlib.util.module_from_spec(found)
    found.loader.exec_module(write)
    expected = write.files()
    held = {
        f"{scale}/{path.name}": path.read_text()
        for scale in ("small", "paper")
        for path in (RECIPES / scale).iterdir()
    }
    assert held == expected, "run: python recipes/write.py"


def test_every_row_and_column_of_the_paper_is_there() -> None:
    architectures = {cell.architecture for cell in PAPER}
    restricted = {cell.restricted for cell in PAPER}
    assert architectures == {"caformer", "resnet50", "resnet34", "resnet18", "vgg", "ddpm"}
    assert restricted == {"cifar10", "cinic10", "stl10", "mnist", "svhn", "celeba", "ffhq"}
    assert {cell.loss for cell in PAPER} == {"ice", "klu", "dos"}
    assert len(SMALL) == 12
    assert len({named(cell) for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", PAPER, ids=named)
def test_a_paper_recipe_has_the_papers_hyper_parameters(cell: Cell) -> None:
    protect = spec_of(cell).protect
    assert (protect.rounds, protect.rehearsal.steps) == (800, 50)
    assert (protect.suppression_rate, protect.reinforcement_rate) == (3e-4, 5e-4)
    assert (protect.suppression_steps, protect.reinforcement_steps) == (1, 1)
    assert (protect.original_batch_size, protect.clip_norm) == (150, 0.5)
    assert protect.rehearsal.fixed is not None
    assert protect.rehearsal.fixed.batch_size == 150
    assert protect.suppression == cell.loss


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_the_rehearsed_attack_is_among_those_of_the_audit(cell: Cell) -> None:
    spec = spec_of(cell)
    fixed = spec.protect.rehearsal.fixed
    assert fixed is not None
    attacks = strategies_of(spec.audit)
    assert fixed.model_copy(update={"steps": spec.audit.steps}) in attacks


def test_names_that_are_no_cell_are_refused_with_near_ones() -> None:
    assert cell_of("resnet18-gtsrb-klu", "small").restricted == "gtsrb"
    with pytest.raises(SpecError, match=r"did you mean.*resnet18-cifar10-klu"):
        cell_of("resnet18-cifar-klu", "small")
    with pytest.raises(SpecError, match="use --scale paper"):
        cell_of("resnet34-stl10-ice", "small")
    assert "--list" in command("reproduce", fails=2)
    assert "use small or paper" in command("reproduce", "--list", "--scale", "tiny", fails=2)


# --- Tables --------------------------------------------------------------------------------------


def test_cells_that_never_ran_stay_empty(tmp_path: Path) -> None:
    lines = table(tmp_path, "paper").splitlines()
    assert len(lines) == 2 + len(PAPER)
    rows = {line.split(" | ")[0].strip("| "): line.strip("|").split("|") for line in lines[2:]}
    known = [one.strip() for one in rows["caformer-cifar10-ice"]]
    assert known[1:] == ["99.6, 96.2", "62.7 / 84.8 / 15.2", "", "", "", "", ""]
    assert [one.strip() for one in rows["resnet34-svhn-klu"]][1:] == ["99, ?"] + [""] * 6
    assert [one.strip() for one in rows["ddpm-ffhq-dos"]][1:] == [""] * 7
    assert "0.479 / 0.445 / 0.705" in rows["ddpm-celeba-dos"][2]
    output = command("reproduce", "--list", "--out", tmp_path)
    assert output.count("not run") == len(CELLS)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_published_is_shown_as_published() -> None:
    # Everything else would be made up: these are the numbers of the design page, and no others.
    assert set(PUBLISHED) == {"caformer-cifar10-ice", "ddpm-celeba-dos"}
    assert set(PUBLISHED_BEFORE.values()) == {99.6, 99.2, 99.0, 98.6, 95.4}
    others = [published_of(cell) for cell in CELLS if cell.name not in PUBLISHED]
    assert {(p.after, p.scratch, p.unprotected, p.protected) for p in others} == {(None,) * 4}
    assert all(p.source for p in PUBLISHED.values())


def test_robustness_is_three_methods_by_five_optimizers_five_rates_and_five_sizes() -> None:
    tables = robustness(30)
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
        printed = command("reproduce", "robustness", "--of", "caformer-mnist-klu", *fields)
        yield out, printed


def record_of(out: Path, name: str) -> AuditRecord:
    return AuditRecord.model_validate_json((out / "small" / name / "audit/record.json").read_text())


def test_a_cell_trains_its_base_protects_and_audits(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    assert (out / "bases" / "small-caformer" / "model.safetensors").is_file()
    folder = out / "small" / "caformer-mnist-klu"
    lines = (folder / "protected" / "rounds.jsonl").read_text().splitlines()
    assert len([Round.model_validate_json(line) for line in lines]) == 2
    assert (folder / "run.toml").read_text() == run_file(
        cell_of("caformer-mnist-klu", "small"),
        "recipes/small/caformer-mnist-klu.toml",
        "../../bases",
    )
    record = record_of(out, "caformer-mnist-klu")
    assert record.original.name == "tiny-imagenet20"
    assert record.restricted[0].name == "mnist"


def test_the_table_shows_what_was_measured(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    record = record_of(out, "caformer-mnist-klu")
    held, attack = measured(record), rehearsed_attack(record)
    assert attack is not None
    assert (attack.optimizer, attack.learning_rate) == ("sgd_momentum", 1e-3)
    trials = [t for t in record.trials if t.strategy == attack]
    assert sorted(t.subject for t in trials) == ["protected", "scratch", "unprotected"]
    by_subject = {t.subject: t.test.value for t in trials if t.test is not None}
    assert held.rehearsed == tuple(
        by_subject[name] for name in ("scratch", "unprotected", "protected")
    )
    assert held.worst[2] is not None
    printed = command("reproduce", "--table", "--out", out)
    row = next(line for line in printed.splitlines() if line.startswith("| caformer-mnist-klu"))
    assert f"{100 * by_subject['protected']:.1f} | " in row
    assert held.verdict in row
    other = next(line for line in printed.splitlines() if line.startswith("| vgg-mnist-klu"))
    assert other.endswith("|  |  |  |  |  |")


def test_robustness_fills_its_tables(reproduced: tuple[Path, str]) -> None:
    out, printed = reproduced
    record = record_of(out, "caformer-mnist-klu-robustness")
    text = robustness_tables(record, "caformer")
    assert text.strip() in printed
    for rows in robustness(2).values():
        for name, attack in rows.items():
            scores = scores_of(record, attack)
            assert None not in scores, name
            shown = " | ".join(f"{100 * score:.1f} %" for score in scores if score is not None)
            assert f"| {name} | {shown} |" in text
    published = robustness_tables(record, "vgg")
    assert published.count("56.4") == 1


def test_a_finished_cell_is_not_run_again(reproduced: tuple[Path, str]) -> None:
    out, _ = reproduced
    file = out / "bases" / "small-caformer" / "model.safetensors"
    trials = sorted((out / "small" / "store" / "trials").iterdir())
    before = [path.stat().st_mtime_ns for path in (file, *trials)]
    command("reproduce", "caformer-mnist-klu", "--out", out, "--quiet", *tiny())
    assert [path.stat().st_mtime_ns for path in (file, *trials)] == before


@pytest.mark.parametrize("cell", ["resnet18-gtsrb-klu", "robustness", "ablation"])
@pytest.mark.parametrize("setting", ["protect.rond=2", 'protect.rounds="x"'])
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(
    cell: str, setting: str, tmp_path: Path
) -> None:
    said = command("reproduce", cell, "--set", setting, "--out", tmp_path / "runs", fails=2)
    assert setting.partition("=")[0] in said
    assert not (tmp_path / "runs").exists()


def test_data_that_is_not_there_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path / "nowhere"))
    output = command("reproduce", "resnet18-mnist-klu", "--out", tmp_path, fails=2)
    assert "tiny_imagenet20_64.npz" in output
    assert not list(tmp_path.rglob("*.safetensors"))
    paper = ("reproduce", "resnet18-svhn-ice", "--scale", "paper", "--out", tmp_path)
    assert "github.com/fastai/imagenette" in command(*paper, fails=2)


# --- Every paper recipe, on a few images of each data set ----------------------------------------

BRIEF = {
    "original.image_size": 16,
    "protect.rounds": 2,
    "protect.original_batch_size": 4,
    "protect.rehearsal.steps": 1,
    "protect.rehearsal.query_batch_size": 2,
    "protect.rehearsal.fixed.batch_size": 4,
}


@pytest.fixture(scope="module")
def paper_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a few images of every data set of the paper, at its own format."""
    root = tmp_path_factory.mktemp("data")
    prepare_torchvision()
    datasets: Any = importlib.import_module("torchvision.datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHON_DATA", str(root))
        formats.write_tree(root, "Imagenette:full", patch)
        formats.write_tree(root / "cinic10", "CINIC10", patch)
        formats.write_tree(root / "celeba", "CelebA", patch)
        formats.write_tree(root / "ffhq", "FFHQ", patch)
        formats.write_cifar(root, datasets.CIFAR10, patch, per_class=1)
        formats.write_cifar(root, datasets.CIFAR100, patch, per_class=1)
        formats.write_stl(root, datasets, patch)
        formats.write_mnist(root)
        formats.write_svhn(root / "svhn", datasets, patch)
        save_file(SmallConvNet(classes=10).state_dict(), root / "model.safetensors")
        (root / "unet.json").write_text(
            (RECIPES / "orl-unet-16.json").read_text().replace("16, 32, 32", "8, 16, 16")
        )
        yield root


def settings(held: dict[str, Any]) -> list[str]:
    return [part for key, value in held.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@pytest.mark.parametrize("cell", CLASSIFIERS, ids=named)
def test_a_paper_recipe_runs_for_two_rounds(cell: Cell, paper_data: Path, tmp_path: Path) -> None:
    """With a small network: the architectures themselves have tests of their own."""
    changed = {
        **BRIEF,
        "model.name": "small_convnet",
        "model.weights": str(paper_data / "model.safetensors"),
        "protect.guard.tolerance_points": 100.0,
    }
    recipe = RECIPES / "paper" / f"{cell.name}.toml"
    command("protect", recipe, "--out", tmp_path, "--quiet", *settings(changed))
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    rounds = [Round.model_validate_json(line) for line in lines]
    assert [r.suppression_gradient_norm > 0 for r in rounds] == [True, True]
    held = json.loads((tmp_path / "model.json").read_text())["protection"]
    assert held["spec"]["suppression"] == cell.loss


@pytest.mark.parametrize("cell", DIFFUSION, ids=named)
def test_a_paper_recipe_of_diffusion_runs_for_two_rounds(
    cell: Cell, paper_data: Path, tmp_path: Path
) -> None:
    changed = {
        **BRIEF,
        "model.name": f"diffusers:{paper_data / 'unet.json'}",
        "restricted.0.image_size": 16,
        "protect.guard.tolerance_relative": 100.0,
    }
    recipe = RECIPES / "paper" / f"{cell.name}.toml"
    command("protect", recipe, "--out", tmp_path, "--quiet", *settings(changed))
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 2


def test_a_paper_cell_by_hand_with_its_own_architecture(paper_data: Path, tmp_path: Path) -> None:
    """The base recipe, then the cell's; the other architectures have tests of their own."""
    assert (paper_data / "imagenette2").is_dir()
    base = {
        "model.pretrained": False,
        "original.image_size": 32,
        "pretrain.steps": 1,
        "pretrain.batch_size": 4,
    }
    recipes = RECIPES / "paper"
    command("pretrain", recipes / "base-resnet18.toml", "--out", tmp_path / "base", *settings(base))
    cell = {
        **BRIEF,
        "original.image_size": 32,
        "model.weights": str(tmp_path / "base" / "model.safetensors"),
        "protect.guard.tolerance_points": 100.0,
        "protect.checkpoint_every": 2,
    }
    recipe = recipes / "resnet18-mnist-ice.toml"
    command("protect", recipe, "--out", tmp_path / "protected", *settings(cell))
    held = json.loads((tmp_path / "protected" / "model.json").read_text())
    assert held["model"]["name"] == "torchvision:resnet18"
    assert held["protection"]["original"] == "Imagenette:full"
