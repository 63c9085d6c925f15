"""Runs of the code before protection was a sum of terms: the same recipes give the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import skip_unless_pinned
from sophon._cli.run_file import load
from sophon._models import weights_sha256
from sophon._protection.protection import Protection

ROOT = Path(__file__).parents[2]
PINS: dict[str, Any] = json.loads((ROOT / "tests/house/pins.json").read_text())
WEIGHTS = ROOT / "docs/results/weights/small_convnet_cifar10_16.safetensors"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", list(PINS["runs"]))
def test_a_recipe_gives_what_it_gave(
    name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    monkeypatch.setenv("SMALL_NETWORK", str(WEIGHTS))
    pinned = PINS["runs"][name]
    case = load(ROOT / f"recipes/{name}.toml", pinned["settings"])
    run = Protection(
        case.model,
        original=case.original,
        restricted=case.restricted,
        spec=case.spec.protect,
        head=case.network.head,
        device="cpu",
    )
    rounds = list(run)
    losses, scores = zip(*((r.suppression_loss, r.guard_score) for r in rounds), strict=True)
    assert run.identity["network"] == pinned["network"]
    norms = {name: float(p.detach().double().norm()) for name, p in run.model.named_parameters()}
    assert norms == pytest.approx(pinned["norms"], rel=1e-3)
    assert list(losses) == pytest.approx(pinned["losses"], rel=1e-2)
    skip_unless_pinned(PINS)
    assert (list(losses), list(scores)) == (pinned["losses"], pinned["scores"])
    assert weights_sha256(run.model) == pinned["sha256"]
