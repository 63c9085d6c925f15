"""Run files of published defences: each one's term takes its steps on small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import denoisers
from builders import original, restricted, trained_model
from sophon._cli.run_file import parse_run
from sophon._protection.protection import Protection
from sophon._protection.terms import TERMS, Hindrance
from sophon._tasks import Denoising

FOLDER = Path(__file__).resolve().parents[2] / "recipes/defences"
RECIPES = sorted(FOLDER.glob("*.toml"))


def test_every_published_defence_has_a_run_file_and_a_paragraph() -> None:
    own = {"erasure", "denoising_erasure", "rehearsal", "suppress"}
    kinds = {kind for kind, term in TERMS.items() if issubclass(term, Hindrance)} - own
    named = {path.stem.rsplit("-", 1)[0] for path in RECIPES}
    assert named == kinds | {"tar", "sophon", "sophon-released", "imma", "resalign"}
    page = (FOLDER.parents[1] / "docs/defences.md").read_text(encoding="utf-8")
    missing = [one.name for one in RECIPES if f"recipes/defences/{one.name}" not in page]
    assert not missing, f"docs/defences.md names no {missing}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_run_file_does_two_rounds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    run_file = parse_run(text, ["protect.rounds=2", "protect.precision=fp32"], where=path.name)
    if run_file.task.name == "denoising":
        model = denoisers.unet()
        case: dict[str, Any] = {
            "original": denoisers.digits(0, 5),
            "restricted": denoisers.digits(5, 10),
            "task": Denoising(),
        }
    else:
        model, case = trained_model(), {"original": original(), "restricted": restricted()}
    run = Protection(model, **case, spec=run_file.protect, device="cpu")
    rounds = list(run)
    assert len(rounds) == 2
    assert all(record.suppression_gradient_norm > 0 for record in rounds)
    pairs = zip(run.model.parameters(), model.parameters(), strict=True)
    assert any(new.dim() > 1 and not torch.equal(new, old) for new, old in pairs)
