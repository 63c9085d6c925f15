"""The paper's cells on a few images of each data set: their recipes, and the command for them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import formats
import grid
from cells import (
    CLASSIFIERS,
    DIFFUSION,
    PAPER,
    RECIPES,
    command,
    grid_command,
    named,
    settings,
    spec_of,
)
from grid import CELLS, Cell
from sophon._attacks.suites import SUITES
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._cli.run_file import load_pretraining
from sophon._models import blueprint
from sophon._models.networks import SmallConvNet
from sophon._records.audit_record import AuditRecord
from sophon._records.round import Round

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
        formats.write_mnist(root, patch)
        formats.write_svhn(root / "svhn", datasets, patch)
        save_file(SmallConvNet(classes=10).state_dict(), root / "model.safetensors")
        (root / "unet.json").write_text(
            (RECIPES / "orl-unet-16.json").read_text().replace("16, 32, 32", "8, 16, 16")
        )
        yield root


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
    assert held["spec"]["hinder"][0]["loss"] == cell.loss


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


def one_of_each_architecture() -> list[Cell]:
    held = {(cell.scale, cell.architecture): cell for cell in CELLS}
    return list(held.values())


@pytest.mark.parametrize("cell", one_of_each_architecture(), ids=named)
def test_a_base_recipe_loads_its_network_without_a_restricted_set(
    cell: Cell, paper_data: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = paper_data if cell.scale == "paper" else shared_data
    monkeypatch.setenv("SOPHON_DATA", str(folder))
    recipe = RECIPES / cell.scale / f"base-{cell.architecture}.toml"
    assert "restricted" not in tomllib.loads(recipe.read_text())
    offline = ["model.pretrained=false"] if cell.scale == "paper" else []
    small = ["original.image_size=32"]
    case = load_pretraining(recipe, [*offline, *small])
    assert case.restricted == ()
    run = spec_of(cell)
    if cell.architecture == "ddpm":
        assert case.model.config["sample_size"] == (32 if cell.scale == "paper" else 16)
        return
    assert case.network.name == run.model.name
    assert case.network.arguments == run.model.arguments
    # The cell's network, built for the same classes, takes the weights of the base's.
    with torch.device("meta"):
        built = blueprint(run.model).build(case.original.class_count).state_dict()
    held = case.model.state_dict()
    assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in built.items()}


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


# --- Paper cells, briefly, by the command that makes them ----------------------------------------

BRIEF_CELL = {
    **{key: value for key, value in BRIEF.items() if key != "original.image_size"},
    "pretrain.steps": 2,
    "pretrain.every": 1,
    "pretrain.batch_size": 4,
    "audit.steps": 2,
    "audit.evaluations": 2,
    "audit.batch_size": 4,
    "audit.seeds": [0],
    "audit.extra": [],
}


@pytest.fixture
def two_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave two attacks of `quick-1`: twelve of a network of the paper's size take minutes."""
    suite = SUITES["quick-1"]
    few = dataclasses.replace(suite, strategies=suite.strategies[:2])
    monkeypatch.setitem(SUITES, "quick-1", few)


def brief(cell: Cell) -> list[str]:
    """Return settings that keep the cell's network and make all else small and short.

    The model of the original task begins with random weights: the published ones are not here.
    """
    changed: dict[str, Any] = dict(BRIEF_CELL)
    if cell in DIFFUSION:
        changed |= {"audit.samples.count": 0, "protect.guard.tolerance_relative": 100.0}
    else:
        changed |= {
            "original.image_size": 32,
            "model.pretrained": False,
            "protect.guard.tolerance_points": 100.0,
        }
    return settings(changed)


def reproduced_cell(cell: Cell, out: Path) -> AuditRecord:
    """Run a paper cell from its base to its audit, then again, which must run nothing anew."""
    words = (cell.name, "--scale", "paper", "--out", out, "--quiet", *brief(cell))
    grid_command(*words)
    files = [*(out / "bases").rglob("*.safetensors"), *out.rglob("store/trials/*")]
    assert len(files) > 2 * 3
    before = [path.stat().st_mtime_ns for path in files]
    grid_command(*words)
    assert [path.stat().st_mtime_ns for path in files] == before
    rows = grid_command("--table", "--scale", "paper", "--out", out).splitlines()
    (row,) = (line for line in rows if line.startswith(f"| {cell.name} |"))
    assert "changed: " in row
    assert "pretrain.steps" in row
    file = out / "paper" / cell.name / "audit" / "record.json"
    return AuditRecord.model_validate_json(file.read_text())


# All 52, every network at its own size, take an hour or more on two cores: they run when asked for.
# Otherwise two do, the U-Net narrow; each of the other networks has tests of its own.
EVERY_CELL = os.environ.get("SOPHON_TEST_EVERY_CELL") == "1"
EXAMPLES = ("resnet18-mnist-ice", "ddpm-celeba-dos")


@pytest.mark.slow
@pytest.mark.usefixtures("two_attacks")
@pytest.mark.parametrize(
    "cell", [cell for cell in PAPER if EVERY_CELL or cell.name in EXAMPLES], ids=named
)
def test_a_paper_cell_is_reproduced_with_its_own_architecture(
    cell: Cell, paper_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (paper_data / "imagenette2").is_dir()
    if cell in DIFFUSION and not EVERY_CELL:
        shutil.copytree(RECIPES / "paper", tmp_path / "recipes" / "paper")
        monkeypatch.setattr(grid, "HERE", tmp_path / "recipes")
        unet = json.loads((paper_data / "unet.json").read_text()) | {"sample_size": 32}
        assert cell.unet_file is not None
        cell.unet_file.write_text(json.dumps(unet))
    try:
        record = reproduced_cell(cell, tmp_path)
        wanted = spec_of(cell)
        if cell in CLASSIFIERS:
            assert record.model == wanted.model.name
        assert [r.name for r in record.restricted] == [r.name for r in wanted.restricted]
        assert record.original.name == wanted.original.name
        assert record.task == wanted.task.name
        assert {t.outcome.kind for t in record.trials} == {"completed"}
        rounds = (tmp_path / "paper" / cell.name / "protected" / "rounds.jsonl").read_text()
        assert len(rounds.splitlines()) == 2
        if cell in DIFFUSION:
            # The base knows all timesteps: it is none for a cell of one.
            words = (cell.name, "--scale", "paper", "--out", tmp_path, *brief(cell))
            assert "timestep 1 alone" in grid_command(*words, "--set", "task.timestep=1", fails=2)
    finally:
        shutil.rmtree(tmp_path)
