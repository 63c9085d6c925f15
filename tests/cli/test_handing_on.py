"""What a run file and its options say reaches what is run, whole and in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from records import record
from sophon._base.errors import CheckpointError
from sophon._cli import app, auditing
from sophon._cli.controls import run_controls
from sophon._cli.first_look import _in_full
from sophon._cli.run_file import Case, load, load_subject
from sophon._cli.running import run_pretraining, run_protection
from sophon._models import head_classes
from sophon._models.networks import SmallConvNet
from sophon._training.checkpoints import save_model

ROLES = ("restricted", "held_out", "benign")
RUN = '[model]\nname = "small_convnet"\nin_channels = 1\nhead = "head"\n' + "".join(
    f'{table}\nsource = "embedded"\nname = "{name}"\ndataset = "digits"\nlimit = 12\n'
    f"classes = [{low}, {low + 1}]\n"
    for low, (table, name) in enumerate(
        [("[original]", "original"), *((f"[[{role}]]", role) for role in ROLES)]
    )
)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Return a run with a domain of every role, its network untrained."""
    (tmp_path / "run.toml").write_text(RUN)
    return load(tmp_path / "run.toml", None)


class Made(Exception):  # noqa: N818 - it ends what would be run
    """What a run was made of."""


def _made(*model: Any, **parts: Any) -> NoReturn:
    raise Made(parts)


RUNS: dict[str, tuple[Callable[[Case, Path], object], str, str]] = {
    "auditing.audit.Audit": (
        lambda case, out: auditing.audit_of(case, case.model, None),
        "audit",
        "original restricted held_out benign task scratch head",
    ),
    "auditing.controls.Controls": (
        lambda case, out: run_controls(case, out, "quiet"),
        "audit",
        "original benign scratch head",
    ),
    "protection.protection.Protection": (
        lambda case, out: run_protection(case, out, "quiet"),
        "protect",
        "original restricted task head model_spec",
    ),
    "training.pretrain.Pretraining": (
        lambda case, out: run_pretraining(case, out, "quiet"),
        "pretrain",
        "original task model_spec",
    ),
}


@pytest.mark.parametrize("place", RUNS)
def test_a_run_is_made_of_all_that_its_file_names(
    place: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, table, names = RUNS[place]
    monkeypatch.setattr(f"sophon._{place}", _made)
    with pytest.raises(Made) as caught:
        run(case, tmp_path)
    given = caught.value.args[0]
    own = {"head": "head", "model_spec": case.network}
    assert given["spec"] == getattr(case.spec, table)
    for name in names.split():
        assert given[name] == (own[name] if name in own else getattr(case, name)), name


def test_a_subject_is_judged_with_the_classes_that_it_has(case: Case, tmp_path: Path) -> None:
    save_file(SmallConvNet(classes=5, in_channels=1).state_dict(), tmp_path / "theirs.safetensors")
    (tmp_path / "run.toml").write_text(RUN.replace('head = "head"', 'head = "head"\nclasses = 2'))
    two = load(tmp_path / "run.toml", None)
    assert head_classes(two.model, "head") == 2
    assert head_classes(load_subject(two, tmp_path / "theirs.safetensors")[0], "head") == 5


def test_a_checkpoint_is_evaluated_on_images_as_it_took_them(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = case.network.model_dump(mode="json")
    took = {"pretraining": {"input": {"mean": [0.3], "std": [0.2]}}}
    save_model(tmp_path, case.model, {"model": network, **took})

    def measured(model: Any, setting: Any, *_: Any) -> NoReturn:
        raise Made(setting.normalisation(case.original))

    monkeypatch.setattr("sophon._training.evaluate.evaluate", measured)
    words = ["evaluate", tmp_path / "run.toml", "--model", tmp_path / "model.safetensors"]
    made = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(made.exception, Made), made.output
    assert made.exception.args == (((0.3,), (0.2,)),)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1h30m", 5400)])
def test_a_duration_is_the_sum_of_its_parts(text: str, seconds: float) -> None:
    assert auditing.parse_duration(text) == seconds


@pytest.mark.parametrize("role", ROLES)
def test_an_audit_of_other_images_in_any_role_is_another_one(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = record()
    domains = dict.fromkeys(ROLES, made.restricted)
    monkeypatch.setattr(auditing, "_record_in", lambda _: made.model_copy(update=domains))

    def audit(changed: str | None) -> Any:
        digests = {one: "1" * 64 if one == changed else "0" * 64 for one in ROLES}
        held = {
            one: (SimpleNamespace(fingerprint=lambda digest=digest: digest),)
            for one, digest in digests.items()
        }
        return SimpleNamespace(spec=made.spec, **held)

    auditing._require_same_audit(tmp_path, audit(None))
    with pytest.raises(CheckpointError, match="other images"):
        auditing._require_same_audit(tmp_path, audit(role))


def test_what_a_first_look_leaves_open_outlasts_rehearsal(case: Case, tmp_path: Path) -> None:
    for life, steps in ((3, 200), (50, 500)):
        stated = {"spec": {"rehearsal": {"steps": life}}}
        lines = _in_full(case, record(protection=stated), tmp_path / "run.toml", tmp_path, None)
        assert f"audit.steps={steps} " in lines[-1]
