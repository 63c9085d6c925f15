"""Run files of published defences: each one's term takes its steps on small images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import original, restricted, trained_model
from sophon._cli.run_file import parse_run
from sophon._protection.protection import Protection
from sophon._protection.terms import TERMS, Hindrance

FOLDER = Path(__file__).resolve().parents[2] / "recipes/defences"
RECIPES = sorted(FOLDER.glob("*.toml"))


def test_every_published_defence_has_a_run_file_and_a_paragraph() -> None:
    own = {"erasure", "denoising_erasure", "rehearsal"}
    kinds = {kind for kind, term in TERMS.items() if issubclass(term, Hindrance)} - own
    named = {path.stem.removesuffix("-small16") for path in RECIPES}
    assert named == kinds | {"tar", "sophon", "sophon-released"}
    page = (FOLDER.parents[1] / "docs/defences.md").read_text(encoding="utf-8")
    assert all(f"recipes/defences/{path.name}" in page for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_run_file_does_two_rounds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    spec = parse_run(text, ["protect.rounds=2", "protect.precision=fp32"], where=path.name).protect
    model = trained_model()
    run = Protection(model, original=original(), restricted=restricted(), spec=spec, device="cpu")
    rounds = list(run)
    assert len(rounds) == 2
    assert all(record.suppression_gradient_norm > 0 for record in rounds)
    assert not torch.equal(run.model.get_submodule("stage3")[3].weight, model.stage3[3].weight)
