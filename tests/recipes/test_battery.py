"""The battery that a search is judged by."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from scripts import script_at
from sophon._models import fresh_copy, resolve_model
from sophon._specs import FreshHead, ModelSpec, Strategy

WITHSTAND = Path(__file__).resolve().parents[2] / "recipes/withstand"
RUN = """
[model]
name = "small_convnet"
weights = "given.safetensors"
in_channels = 1
[original]
source = "embedded"
name = "letters"
[[restricted]]
source = "embedded"
name = "digits"
classes = [0, 1, 2, 3, 4]

[[benign]]
source = "npz"
name = "others"
path = "others.npz"
[audit]
precision = "fp32"
"""


@pytest.fixture
def script() -> ModuleType:
    """Return the script."""
    return script_at(WITHSTAND / "battery.py")


def test_three_attacks_are_in_no_rehearsal(script: ModuleType) -> None:
    attacks = script.battery(10)
    assert len(attacks) == 10
    assert {s.steps for s in attacks} == {100}
    kinds = {p.kind for s in attacks[-3:] for p in s.preparations}
    assert kinds == {"noise_kick", "batch_norm", "heal", "ridge_head", "fresh_head"}
    for recipe in WITHSTAND.glob("*.toml"):
        text = recipe.read_text(encoding="utf-8")
        assert not any(f'"{kind}"' in text for kind in ("noise_kick", "batch_norm", "heal"))


def test_without_a_lead_over_a_fresh_network_there_is_no_share_of_it(script: ModuleType) -> None:
    high, low, held = {5: 60.0, 100: 80.0}, {5: 40.0, 100: 60.0}, {5: 55.0, 100: 75.0}
    assert script.removed(high, low, held) == "0.25"
    assert script.removed(high, low, low) == "1.00"
    assert script.removed(low, low, held) == script.removed(low, high, held) == "-"


def test_the_unprotected_model_has_nothing_removed_and_a_fresh_one_all(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sets: Any = pytest.importorskip("sklearn.datasets", reason="digits need scikit-learn")
    images, labels = sets.load_digits(return_X_y=True)
    chosen = labels >= 5
    others = (images[chosen] * 15.9).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "others.npz", x_train=others, y_train=labels[chosen] - 5)
    short = Strategy(
        preparations=(FreshHead(),), optimizer="adam", learning_rate=3e-3, batch_size=32, steps=20
    )
    monkeypatch.setattr(script, "battery", lambda depth: [short])
    monkeypatch.setattr(script, "STEPS", 20)
    monkeypatch.setattr(script, "SEEDS", (0,))
    spec = ModelSpec(name="small_convnet", in_channels=1)
    model, scratch = resolve_model(spec, default_classes=26)
    save_file(model.state_dict(), tmp_path / "given.safetensors")
    # What an audit of seed 0 starts its fresh network from.
    fresh = fresh_copy(model, scratch, seed=0, names=("scratch",))
    save_file(fresh.state_dict(), tmp_path / "fresh.safetensors")
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    files = [tmp_path / name for name in ("run.toml", "given.safetensors", "fresh.safetensors")]
    script.main([*map(str, files), "--store", str(tmp_path / "store")])
    rows = capsys.readouterr().out.strip().splitlines()
    # Refused and allowed: before, fresh, and both again for the second model.
    gone = [row.split("|")[-2].strip() for row in rows[1:]]
    assert gone == ["0", "1", "0.00", "0", "1", "0.00", "1.00", "1.00"]
    assert rows[1].split("|")[2:4] == rows[3].split("|")[2:4]
    assert len(list((tmp_path / "store/trials").glob("*.json"))) == 8
