"""What earlier versions wrote is taken up: run files, interrupted runs, statements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders import original, quick_spec, restricted, skip_unless_pinned
from sophon._base.errors import SpecError
from sophon._models import weights_sha256
from sophon._protection.migration import migrated
from sophon._protection.protection import Protection, protect
from sophon._protection.spec import Alternate, ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.statement import statement_of
from sophon._specs import Guard, parse_spec

OLD_RUN = Path(__file__).parent / "old-run"
PINS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "house/pins.json").read_text())
OLD: dict[str, Any] = PINS["old_run"]["spec"]


class Tiny(nn.Module):
    """The network of the old run, whose identity has these names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    values = torch.linspace(-0.5, 0.5, parameter.numel())
                    parameter.copy_(values.view_as(parameter))
            self.head.bias.copy_(torch.tensor(BIAS))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images)).relu()
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


# What the head's bias was drawn as.
BIAS = (
    0.3179267644882202,
    -0.27934253215789795,
    0.4335537552833557,
    0.15427875518798828,
    -0.4214743971824646,
)
Tiny.__module__, Tiny.__qualname__ = "old_run", "Tiny"


def _tiny() -> nn.Module:
    return Tiny().eval()


def _old_spec(**changes: Any) -> ProtectSpec:
    return parse_spec(ProtectSpec, {**OLD, **changes}, where="old")


def _run(out: Path | None) -> Protection:
    return Protection(
        _tiny(),
        original=original(),
        restricted=restricted(),
        spec=_old_spec(),
        out=out,
        device="cpu",
    )


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_the_former_version_interrupted_goes_on_to_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    run = _run(folder)
    assert run.done == 3
    former = [json.loads(line) for line in (OLD_RUN / "rounds.jsonl").read_text().splitlines()]
    assert [r.suppression_loss for r in run.rounds] == [r["suppression_loss"] for r in former[:3]]
    rest = list(run)
    assert [r.index for r in rest] == [3, 4, 5]
    # Bit for bit on the processor that the former version ran on; elsewhere nearly so.
    whole = _run(None)
    for _ in whole:
        pass
    for name, value in whole.result().model.state_dict().items():
        torch.testing.assert_close(
            run.result().model.state_dict()[name], value, rtol=1e-3, atol=1e-4
        )
    skip_unless_pinned(PINS)
    assert weights_sha256(run.result().model) == PINS["old_run"]["sha256"]
    assert weights_sha256(whole.result().model) == PINS["old_run"]["sha256"]


def test_the_migrated_folder_is_one_of_the_present_version(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    run = _run(folder)
    next(iter(run))
    del run
    held = json.loads((folder / "run.json").read_text())
    assert "rehearsal" not in held["resolved"]
    assert held["resolved"]["hinder"][0]["loss"] == "klu"
    assert _run(folder).done == 4


FLAT: dict[str, tuple[Any, Any]] = {
    "suppression": ("ice", lambda spec: spec.hinder[0].loss),
    "suppression_steps": (3, lambda spec: spec.update.hindrance_steps),
    "suppression_rate": (0.02, lambda spec: spec.update.hindrance_rate),
    "reinforcement_steps": (0, lambda spec: spec.update.keep_steps),
    "reinforcement_rate": (0.03, lambda spec: spec.update.keep_rate),
    "clip_norm": (0.7, lambda spec: spec.update.clip_norm),
    "head_gradient": ("apply_fresh", lambda spec: spec.hinder[0].head_gradient),
    "rehearsal": (
        {"steps": 5, "horizon": 9},
        lambda spec: {"steps": spec.hinder[0].steps, "horizon": spec.hinder[0].horizon},
    ),
}


@pytest.mark.parametrize("key", list(FLAT))
def test_a_flat_key_lands_in_its_new_place(key: str) -> None:
    value, place = FLAT[key]
    spec = parse_spec(ProtectSpec, {key: value}, where="run.toml")
    assert place(spec) == value
    assert spec.method == "sophon"
    assert spec.update is None or isinstance(spec.update, Alternate)
    assert [type(term) for term in spec.hinder or ()] == [Rehearsal]


def test_every_flat_key_of_the_former_version_is_known() -> None:
    present = {*ProtectSpec.model_fields, *FLAT}
    assert set(OLD) <= present
    spec = _old_spec()
    (term,) = spec.hinder or ()
    assert isinstance(term, Rehearsal)
    held = term.model_dump(mode="json")
    assert all(held[name] == value for name, value in OLD["rehearsal"].items())
    assert spec.guard == Guard(tolerance_points=100.0, every=2)
    assert (spec.rounds, spec.checkpoint_every, spec.precision) == (6, 1, "fp32")


def test_what_has_no_flat_key_stays_as_it_is() -> None:
    table = {"rounds": 3, "hinder": [{"kind": "erasure"}]}
    assert migrated(table) is table
    assert parse_spec(ProtectSpec, {"rounds": 3}, where="run.toml").method == "erasure"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"suppression": "klu"}, {"hinder": [{"kind": "rehearsal"}]}),
        ({"suppression_rate": 0.1}, {"update": {"kind": "joint"}}),
        ({"rehearsal": {"steps": 3}}, {"keep": [{"kind": "task"}]}),
    ],
)
def test_old_and_new_keys_together_are_refused(old: dict[str, Any], new: dict[str, Any]) -> None:
    words = rf"run.toml: protect.*{next(iter(old))} is the former way to write {next(iter(new))}"
    table = {
        "model": {"name": "resnet20"},
        "original": {"source": "npz", "path": "a.npz"},
        "restricted": [{"source": "npz", "path": "b.npz"}],
        "protect": {**old, **new},
    }
    from sophon._cli.run_spec import RunSpec

    with pytest.raises(SpecError, match=words):
        parse_spec(RunSpec, table, where="run.toml")


@pytest.mark.parametrize("fixed", [True, False])
def test_an_old_checkpoint_states_what_a_new_one_does(fixed: bool, tmp_path: Path) -> None:
    rehearsal: dict[str, Any] = dict(OLD["rehearsal"])
    if fixed:
        del rehearsal["distribution"]
        rehearsal["fixed"] = {"optimizer": "sgd", "learning_rate": 0.004, "batch_size": 16}
    spec = _old_spec(rounds=2, rehearsal=rehearsal)
    protect(_tiny(), original=original(), restricted=restricted(), spec=spec, out=tmp_path / "p")
    made = json.loads((tmp_path / "p/model.json").read_text())["protection"]
    former = {**OLD, "rehearsal": rehearsal}
    new, old = statement_of(made), statement_of({"spec": former})
    expected = {"sgd": 0.004} if fixed else {"sgd_momentum": 0.1, "adam": 0.01}
    assert new.rates == old.rates == expected
    assert new.life == old.life == 7
    # What a run file left out is not stated; here it gave all.
    assert new.tolerances == old.tolerances
    assert new.tolerances["tolerance_points"] == 100.0


def test_a_specification_comes_back_from_its_json() -> None:
    spec = quick_spec()
    assert ProtectSpec.model_validate_json(spec.model_dump_json()) == spec
