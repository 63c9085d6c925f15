"""Pre-training of classifiers; that of diffusion models is in `test_generation`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders import original, scratch_model
from sophon._base.errors import CheckpointError, DataError, NonFiniteError
from sophon._base.seeding import seeded
from sophon._models import load_weights, read_tensors, weights_sha256
from sophon._specs import ModelSpec, PretrainSpec
from sophon._training.checkpoints import require_recorded
from sophon._training.evaluate import evaluate
from sophon._training.pretrain import Pretraining, pretrain

SPEC = PretrainSpec(steps=60, batch_size=32, every=30, learning_rate=5e-3, precision="fp32")


def _model() -> torch.nn.Module:
    with seeded(0, "test"):
        return scratch_model()


def test_a_classifier_is_trained_and_the_one_given_is_not(tmp_path: Path) -> None:
    model = _model()
    before = weights_sha256(model)
    spec = ModelSpec(name="small_convnet", classes=5, in_channels=1)
    made = pretrain(model, original=original(), spec=SPEC, out=tmp_path / "run", model_spec=spec)
    assert weights_sha256(model) == before
    assert made.score.value > 0.9
    assert [stage.step for stage in made.stages] == [30, 60]
    file = tmp_path / "run" / "model.safetensors"
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    require_recorded(file, described)
    assert described["model"]["name"] == "small_convnet"
    assert described["pretraining"]["original"] == original().name
    again = _model()
    load_weights(again, read_tensors(file), source="run")
    assert weights_sha256(again) == weights_sha256(made.model)


def test_averaged_weights_are_shipped_where_asked_for() -> None:
    run = Pretraining(_model(), original=original(), spec=SPEC.model_copy(update={"steps": 3}))
    assert run.average is None
    averaged = Pretraining(
        _model(),
        original=original(),
        spec=SPEC.model_copy(update={"steps": 3, "every": 1, "ema_decay": 0.9}),
    )
    held = [p.detach().clone() for p in averaged.tuning.model.parameters()]
    expected = held
    for number, _ in enumerate(averaged):
        now = list(averaged.tuning.model.parameters())
        share = 1.0 if number == 0 else 1 - min(0.9, (1 + number) / (10 + number))
        expected = [e.lerp(p.detach(), share) for e, p in zip(expected, now, strict=True)]
    for found, wanted in zip(averaged.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted)


def test_the_averaged_weights_are_scored_and_not_the_trained_ones() -> None:
    spec = SPEC.model_copy(update={"steps": 12, "every": 3, "ema_decay": 0.9})
    run = Pretraining(_model(), original=original(), spec=spec)
    images, trained = original().validation, []
    for stage in run:
        assert stage.validation == evaluate(run.model, run.setting, original(), images)
        trained.append(evaluate(run.tuning.model, run.setting, original(), images))
    assert [stage.validation for stage in run.stages] != trained
    made = run.result()
    assert made.score == run.stages[-1].validation
    assert weights_sha256(made.model) == weights_sha256(run.model)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pretrain.batch_size = 5000"):
        Pretraining(
            _model(), original=original(), spec=SPEC.model_copy(update={"batch_size": 5000})
        )
    wild = PretrainSpec(steps=4, every=2, learning_rate=1000.0, batch_size=16, clip_norm=None)
    model = _model()
    with torch.no_grad():
        model.head.weight.fill_(1e38)  # type: ignore[union-attr, operator]
    run = Pretraining(model, original=original(), spec=wild)
    with pytest.raises(NonFiniteError, match=r"lower pretrain.learning_rate"):
        list(run)
    with pytest.raises(CheckpointError, match="iterate to the end"):
        run.result()
    first = Pretraining(_model(), original=original(), spec=SPEC, out=tmp_path / "run")
    del first
    other = SPEC.model_copy(update={"seed": 1})
    with pytest.raises(CheckpointError, match=r"another spec \(pretrain.seed was 0, is 1\)"):
        Pretraining(_model(), original=original(), spec=other, out=tmp_path / "run")


def test_a_folder_is_taken_up_only_by_the_same_network_and_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    Pretraining(_model(), original=original(), spec=SPEC, out=out)
    Pretraining(_model(), original=original(), spec=SPEC, out=out)

    class Other(type(_model())):  # type: ignore[misc]
        """Computes with the same weights, perhaps something else."""

    other = _model()
    other.__class__ = Other
    with pytest.raises(CheckpointError, match="a run with another network"):
        Pretraining(other, original=original(), spec=SPEC, out=out)
    with monkeypatch.context() as patch:
        patch.setattr("sophon._training.pretrain.ENGINE_VERSION", 0)
        with pytest.raises(CheckpointError, match="a run with another engine"):
            Pretraining(_model(), original=original(), spec=SPEC, out=out)
    for folder, now in ((out, "1"), (tmp_path / "plain", "0")):
        monkeypatch.setenv("SOPHON_PLAIN", str(1 - int(now)))
        Pretraining(_model(), original=original(), spec=SPEC, out=folder)
        monkeypatch.setenv("SOPHON_PLAIN", now)
        with pytest.raises(CheckpointError, match="a run with another plain"):
            Pretraining(_model(), original=original(), spec=SPEC, out=folder)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"steps": 24, "every": 8, "ema_decay": 0.9})
    whole = Pretraining(_model(), original=original(), spec=spec)
    stages = list(whole)
    out = tmp_path / "run"
    first = Pretraining(_model(), original=original(), spec=spec, out=out)
    assert not (out / "stages.jsonl").read_text()
    for _ in zip(range(2), first, strict=False):
        pass
    assert first.done == 2
    with pytest.raises(CheckpointError, match="stage 2 of 3: iterate to the end"):
        first.result()
    lines = (out / "stages.jsonl").read_text()
    # Killed before the state of a further stage was whole.
    (out / "stages.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    again = Pretraining(_model(), original=original(), spec=spec, out=out)
    assert (again.done, (out / "stages.jsonl").read_text()) == (2, lines)
    assert len(list(again)) == 1
    assert weights_sha256(again.model) == weights_sha256(whole.model)
    assert weights_sha256(again.tuning.model) == weights_sha256(whole.tuning.model)
    assert weights_sha256(again.model) != weights_sha256(again.tuning.model)
    told = [(stage.step, stage.loss, stage.validation) for stage in stages]
    assert [(stage.step, stage.loss, stage.validation) for stage in again.stages] == told
    assert len((out / "stages.jsonl").read_text().splitlines()) == 3
    made = again.result()
    described = json.loads((out / "pretraining.json").read_text())
    assert described["identity"] == whole.identity
    assert described["validation"] == made.score.model_dump()
    assert sorted(path.name for path in (out / "states").iterdir()) == [
        "round-00000002",
        "round-00000003",
    ]
