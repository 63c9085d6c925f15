"""The audit: same program for every subject, nothing run twice, failures kept."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from builders import digits, original, quick_spec, restricted, scratch_model, trained_model
from sophon._attacks.suites import SUITES, strategies_of, suite_fingerprint
from sophon._auditing.audit import Audit, audit
from sophon._auditing.trial import Bench, Job, evaluation_steps
from sophon._base.errors import AuditError, CheckpointError, DataError, SpecError
from sophon._data import Domain, Images
from sophon._judgement.advantage import image_areas
from sophon._judgement.statistics import budgets
from sophon._judgement.verdict import summarise
from sophon._models.networks import SmallConvNet
from sophon._protection.protection import protect
from sophon._records.audit_record import AuditRecord, Score, Trial, unpack
from sophon._records.store import TrialStore
from sophon._specs import AuditSpec, Guard, ResetLastBlocks, SampleSpec, Strategy, parse_spec
from sophon._training.environment import environment, health

SPEC = AuditSpec(steps=8, evaluations=3, batch_size=32, precision="fp32")


def _record(store: Path | None = None, spec: AuditSpec = SPEC) -> AuditRecord:
    return audit(
        trained_model(),
        unprotected=trained_model(),
        original=original(),
        restricted=restricted(),
        spec=spec,
        store=store,
        scratch=scratch_model,
    )


BRIEF = SPEC.model_copy(update={"steps": 2, "evaluations": 2})


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditRecord]:
    """Return the store and the record of an audit of two steps."""
    store = tmp_path_factory.mktemp("brief")
    return store, _record(store, BRIEF)


@pytest.fixture
def store(brief: tuple[Path, AuditRecord], tmp_path: Path) -> Path:
    """Return a copy of that store."""
    return Path(shutil.copytree(brief[0], tmp_path / "store"))


def _essence(trial: Trial) -> dict[str, object]:
    return trial.model_dump(exclude={"wall_s"})


def test_equal_subjects_get_equal_trials_and_every_trial_is_kept() -> None:
    record = _record()
    assert len(record.trials) == 3 * 12
    by = {s: [t for t in record.trials if t.subject == s] for s in ("protected", "unprotected")}
    for first, second in zip(by["protected"], by["unprotected"], strict=True):
        assert first.curve == second.curve
        assert first.test == second.test
    assert all(t.outcome.kind == "completed" for t in record.trials)
    # Which images were right is kept, in one order for all: equal models differ by no image.
    for held in record.trials:
        for point in held.curve:
            right = unpack(point.by_image or "", point.validation)
            assert right.sum() == point.validation.correct  # type: ignore[union-attr]
    at = budgets(record.trials)
    one, other = (image_areas(by[name], at) for name in ("protected", "unprotected"))
    assert one is not None
    assert np.array_equal(one, other)
    (summary,) = summarise(record)
    assert summary.advantage.value == 0


def test_a_repeated_audit_runs_only_what_is_missing(
    brief: tuple[Path, AuditRecord], store: Path
) -> None:
    _, first = brief
    files = sorted((store / "trials").iterdir())
    stamps = [f.stat().st_mtime_ns for f in files]
    files[3].unlink()
    again = Audit(
        trained_model(),
        unprotected=trained_model(),
        original=original(),
        restricted=restricted(),
        spec=BRIEF,
        store=store,
        scratch=scratch_model,
    )
    assert again.missing() in (1, 2)
    for _ in again:
        pass
    assert [_essence(t) for t in again.record().trials] == [_essence(t) for t in first.trials]
    kept = [f.stat().st_mtime_ns for i, f in enumerate(files) if i != 3]
    assert kept == [stamp for i, stamp in enumerate(stamps) if i != 3]


def test_a_record_holds_the_trial_that_the_store_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process on the same store is done first with every trial."""
    put = TrialStore.put

    def outrun(self: TrialStore, trial: Trial) -> None:
        put(self, trial.model_copy(update={"wall_s": 12345.0}))
        put(self, trial)

    monkeypatch.setattr(TrialStore, "put", outrun)
    spec = SPEC.model_copy(update={"steps": 1, "evaluations": 1})
    assert {trial.wall_s for trial in _record(tmp_path, spec).trials} == {12345.0}


def test_a_model_that_cannot_do_its_own_task_is_refused_before_any_trial(tmp_path: Path) -> None:
    class Faulty(SmallConvNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 2 and not self.training:
                raise RuntimeError("too many")
            return super().forward(images)

    model = Faulty(classes=5, in_channels=1)
    held: dict[str, Any] = {"original": original(), "restricted": restricted(), "spec": SPEC}
    run = Audit(model, store=tmp_path, scratch=scratch_model, **held)
    with pytest.raises(AuditError, match=r"protected model raises.*too many"):
        next(iter(run))
    assert not list((tmp_path / "trials").glob("*.json"))


def test_what_is_frozen_by_design_is_no_fault() -> None:
    model, designed = trained_model(), trained_model()
    assert health(model, designed) == health(model) == ()
    designed.stage1.requires_grad_(False)
    assert health(designed, trained_model()) == ("frozen_parameters",)
    assert health(designed) == ("frozen_parameters",)
    assert health(designed, copy.deepcopy(designed)) == ()
    more = copy.deepcopy(designed).requires_grad_(False)
    assert health(more, designed) == ("frozen_parameters",)


def test_the_record_survives_its_json(brief: tuple[Path, AuditRecord]) -> None:
    _, record = brief
    assert AuditRecord.model_validate_json(record.model_dump_json()) == record


def test_a_damaged_trial_names_its_file(store: Path) -> None:
    victim = next((store / "trials").iterdir())
    victim.write_text("{}")
    with pytest.raises(CheckpointError, match=victim.name):
        _record(store, BRIEF)


class _Fragile(SmallConvNet):
    """Raises in train mode: it only looks protected."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("cannot be trained")
        result: torch.Tensor = super().forward(images)
        return result


def test_a_crashed_attack_is_recorded_and_the_rest_goes_on() -> None:
    fragile = _Fragile(classes=5, in_channels=1)
    fragile.load_state_dict(trained_model().state_dict())
    record = audit(
        fragile,
        unprotected=trained_model(),
        original=original(),
        restricted=restricted(),
        spec=BRIEF,
        scratch=scratch_model,
    )
    crashed = [t for t in record.trials if t.outcome.kind == "crashed"]
    assert {t.subject for t in crashed} == {"protected"}
    assert "cannot be trained" in crashed[0].outcome.traceback
    assert len(record.trials) == 36


def test_a_crashed_trial_is_run_again_and_its_trace_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Bench._attack

    def failing(self: Bench, job: Job, *rest: object) -> object:
        if job.subject == "scratch":
            raise MemoryError("for once")
        return attack(self, job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "_attack", failing)
    first = _record(tmp_path, BRIEF)
    assert sum(t.outcome.kind == "crashed" for t in first.trials) == 12
    assert first.earlier_crashes == ()
    second = _record(tmp_path, BRIEF)
    assert [t.key for t in second.trials] == [t.key for t in first.trials]
    # What crashes alike each time is said by the trials: killed or not, the record is the same.
    assert second.earlier_crashes == ()
    monkeypatch.setattr(Bench, "_attack", attack)
    third = _record(tmp_path, BRIEF)
    assert {t.outcome.kind for t in third.trials} == {"completed"}
    assert len(list((tmp_path / "trials").glob("*.crashed-1.json"))) == 12
    # Both runs of every trial that crashed are in the record, in the order of the trials.
    keys = [t.key for t in first.trials if t.subject == "scratch"]
    assert [c.trial for c in third.earlier_crashes] == [key for key in keys for _ in range(2)]
    assert {c.error for c in third.earlier_crashes} == {"MemoryError: for once"}
    assert _record(tmp_path, BRIEF).earlier_crashes == third.earlier_crashes


def test_crashes_are_in_the_record_without_a_store_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Audit(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=BRIEF,
        scratch=scratch_model,
    )
    attack, calls = Bench._attack, []

    def failing(self: Bench, *rest: object) -> object:
        calls.append(rest)
        if len(calls) == 1:
            raise MemoryError("for once\nand more")
        return attack(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "_attack", failing)
    crashed, *_ = run
    assert run.record().earlier_crashes == ()
    again, *_ = run
    assert again.outcome.kind == "completed"
    held = run.record().earlier_crashes
    assert [(c.trial, c.error) for c in held] == [(crashed.key, "MemoryError: for once")]


def test_code_beside_the_weights_is_recorded_and_has_trials_of_its_own() -> None:
    def opened(**settings: object) -> Audit:
        model = trained_model()
        for name, value in settings.items():
            setattr(model.stage1, name, value)
        held = {"original": original(), "restricted": restricted(), "spec": SPEC}
        return Audit(model, unprotected=trained_model(), **held)  # type: ignore[arg-type]

    plain, same, other = opened(), opened(), opened(rate=0.9)
    keys = [[run._key(a) for a in run.plan.next() or ()] for run in (plain, same, other)]
    assert keys[0] == keys[1]
    assert plain.subjects.code() == ()
    # The protected model's alone: the others compute as they did.
    assert len(set(keys[0]) & set(keys[2])) == 2 * len(set(keys[0])) // 3
    assert other.subjects.code() == ("stage1.rate = 0.9 instead of absent",)


def test_other_weights_and_other_images_are_other_trials(store: Path) -> None:
    changed = trained_model()
    with torch.no_grad():
        changed.get_parameter(_head(changed)).mul_(1.01)
    denied = restricted()
    fewer = dataclasses.replace(
        denied, train=Images(denied.train.pixels[:-1].clone(), denied.train.labels[:-1].clone())
    )
    for model, domain, missing in ((changed, denied, 12), (trained_model(), fewer, 36)):
        run = Audit(
            model,
            unprotected=trained_model(),
            original=original(),
            restricted=domain,
            spec=BRIEF,
            store=store,
            scratch=scratch_model,
        )
        assert run.missing() == missing


def test_the_test_split_is_scored_and_chooses_nothing() -> None:
    """With other labels on the test images, only the final scores change."""
    spec = SPEC.model_copy(update={"steps": 20, "evaluations": 4})
    denied = restricted()
    wrong = Images(denied.test.pixels, (denied.test.labels + 1) % 5)
    records = [
        audit(
            trained_model(),
            original=original(),
            restricted=domain,
            spec=spec,
            scratch=scratch_model,
        )
        for domain in (denied, dataclasses.replace(denied, test=wrong))
    ]
    right, other = ([t for t in r.trials if t.subject == "protected"] for r in records)
    assert [t.curve for t in right] == [t.curve for t in other]
    assert [t.best_step for t in right] == [t.best_step for t in other]
    best = max(right, key=lambda t: max(p.validation.value for p in t.curve))
    assert best.test is not None
    assert best.test.total == len(denied.test)
    assert best.test.value > 0.5
    assert all(t.test is not None and t.test.value < 0.5 for t in other)


def test_each_seed_has_its_own_fresh_network() -> None:
    run = Audit(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=SPEC.model_copy(update={"seeds": (0, 1)}),
        scratch=scratch_model,
    )
    assert run.subjects.start("scratch", 0).sha256 != run.subjects.start("scratch", 1).sha256
    assert run.subjects.start("protected", 0)[1] == run.subjects.start("protected", 1)[1]


def test_an_attack_the_model_does_not_allow_is_refused_before_any_runs(tmp_path: Path) -> None:
    extra = Strategy(preparations=(ResetLastBlocks(blocks=99),))
    with pytest.raises(SpecError, match="blocks = 99"):
        _record(tmp_path, SPEC.model_copy(update={"extra": (extra,)}))
    assert not (tmp_path / "trials").exists()


def test_pictures_of_a_classifier_are_refused(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"samples": SampleSpec(budgets=(0.5,))})
    with pytest.raises(SpecError, match=r"audit\.samples is for diffusion models"):
        _record(tmp_path, spec)
    assert not (tmp_path / "trials").exists()


def test_a_diverged_attack_is_not_a_score() -> None:
    extra = Strategy(optimizer="sgd", learning_rate=1000.0, momentum=0.0)
    model = trained_model()
    model.get_parameter("head.weight" if hasattr(model, "head") else _head(model)).data.mul_(1e30)
    record = audit(
        model,
        original=original(),
        restricted=restricted(),
        spec=SPEC.model_copy(update={"extra": (extra,)}),
    )
    kinds = {t.outcome.kind for t in record.trials if t.subject == "protected"}
    assert "diverged" in kinds


def _head(model: nn.Module) -> str:
    return [name for name, _ in model.named_parameters() if name.endswith("weight")][-1]


def test_real_attacks_learn_and_scratch_learns_less() -> None:
    spec = AuditSpec(steps=40, evaluations=4, batch_size=32, precision="fp32")
    record = _record(spec=spec)
    best = {
        s: max(p.validation.value for t in record.trials if t.subject == s for p in t.curve)
        for s in ("unprotected", "scratch")
    }
    assert best["unprotected"] > 0.9
    early = {
        s: max(t.curve[1].validation.value for t in record.trials if t.subject == s)
        for s in ("unprotected", "scratch")
    }
    assert early["unprotected"] >= early["scratch"]


def test_another_architecture_is_refused() -> None:
    with pytest.raises(AuditError, match="another architecture"):
        audit(
            trained_model(),
            unprotected=SmallConvNet(classes=7, in_channels=1),
            original=original(),
            restricted=restricted(),
        )


def test_the_same_data_twice_is_refused() -> None:
    same = digits(0, 5)
    with pytest.raises(DataError):
        audit(trained_model(), original=original(), restricted=same)


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(SpecError, match="quick-1"):
        strategies_of(AuditSpec(suite="quick-9"))


def test_quick_1_is_as_released() -> None:
    assert len(SUITES["quick-1"].strategies) == 12
    assert suite_fingerprint("quick-1") == QUICK_1_SHA256


QUICK_1_SHA256 = "38aef0e69a94b294b6e30bb2793a93a52ec57ff41f8d8355f43015cf91b3930d"


def test_evaluations_end_at_the_horizon() -> None:
    due = evaluation_steps(200, 12)
    assert max(due) == 200
    assert min(due) == 5
    assert len(due) == 12


def test_stale_batch_norm_statistics_cost_the_attacker_nothing() -> None:
    stale = trained_model()
    for name, buffer in stale.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1000.0)
    record = audit(
        stale,
        unprotected=trained_model(),
        original=original(),
        restricted=restricted(),
        spec=SPEC,
        scratch=scratch_model,
    )
    by = {s: [t for t in record.trials if t.subject == s] for s in ("protected", "unprotected")}
    # What is trained does not depend on running statistics, so neither does the better score.
    compared = 0
    for spoilt, sound in zip(by["protected"], by["unprotected"], strict=True):
        assert spoilt.curve[0].reestimated
        for one, other in zip(spoilt.curve, sound.curve, strict=True):
            if one.reestimated and other.reestimated:
                compared += 1
                assert one.validation == other.validation
    assert compared >= 12
    best = {s: max(t.test.value for t in by[s] if t.test) for s in by}
    assert best["protected"] > best["unprotected"] - 0.1


def test_the_test_split_meets_the_best_weights_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = iter(range(100, 0, -1))
    met: list[torch.Tensor] = []
    domain = restricted()

    def worse_and_worse(_: nn.Module, __: object, ___: object, images: Images) -> torch.Tensor:
        assert images is not domain.test
        return (torch.arange(100) < next(scores)).float()[None]

    def on_test(model: nn.Module, _: object, __: object, images: Images) -> Score:
        assert images is domain.test
        met.append(next(model.parameters()).detach().clone())
        return Score(correct=1, total=100)

    run = _one_attack(Strategy(optimizer="sgd", learning_rate=0.1))
    monkeypatch.setattr("sophon._auditing.trial.image_scores", worse_and_worse)
    monkeypatch.setattr("sophon._auditing.trial.evaluate", on_test)
    trial = next(iter(run))
    assert trial.best_step == 0
    assert len(met) == 1
    assert torch.equal(met[0], next(trained_model().parameters()))


def _one_attack(strategy: Strategy) -> Audit:
    """Return an audit whose first trial is `strategy` on the protected subject."""
    run = Audit(
        trained_model(),
        unprotected=trained_model(),
        original=original(),
        restricted=restricted(),
        spec=SPEC.model_copy(update={"extra": (strategy,)}),
        scratch=scratch_model,
    )
    run.plan.strategies = (run.strategies[-1], *run.strategies[:-1])
    return run


def test_of_equal_scores_the_first_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(_: nn.Module, __: object, ___: object, images: Images) -> torch.Tensor:
        return (torch.arange(len(images)) % 2).float()[None]

    monkeypatch.setattr("sophon._auditing.trial.image_scores", alike)
    trial = next(iter(_one_attack(Strategy(optimizer="sgd", learning_rate=0.1))))
    assert trial.best_step == 0
    assert not any(point.reestimated for point in trial.curve)


def test_a_curve_counts_the_images_of_its_steps_and_subjects_are_scored_on_the_test() -> None:
    run = _one_attack(Strategy(learning_rate=0.02, batch_size=7))
    trial = next(iter(run))
    assert [point.step for point in trial.curve] == [0, 1, 3, 8]
    assert [point.samples for point in trial.curve] == [0, 7, 21, 56]
    assert trial.test is not None
    assert trial.test.total == len(restricted().test)
    assert {p.validation.total for p in trial.curve} == {len(restricted().validation)}
    for score in run.subjects.original_scores(run.setting).values():
        assert score.total == len(original().test)


def test_attacks_augment_as_their_strategy_says() -> None:
    plain, flipped = (
        next(iter(_one_attack(Strategy(learning_rate=0.02, augmentation=how))))
        for how in ("none", "flip")
    )
    assert plain.curve[-1].train_loss != flipped.curve[-1].train_loss


def test_an_extra_attack_has_its_own_batch_size_and_the_common_budget() -> None:
    spec = SPEC.model_copy(update={"extra": (Strategy(batch_size=7), Strategy(learning_rate=0.3))})
    assert [s.batch_size for s in strategies_of(spec)[-3:]] == [32, 7, 64]
    assert {s.steps for s in strategies_of(spec)} == {8}
    longer = SPEC.model_copy(update={"extra": (Strategy(steps=900),)})
    with pytest.raises(SpecError, match=r"audit\.extra\.0\.steps = 900"):
        strategies_of(longer)


def test_a_specification_written_out_in_full_runs_the_same_attacks() -> None:
    given = {"steps": 8, "batch_size": 16, "extra": [{"learning_rate": 0.3}]}
    spec = parse_spec(AuditSpec, given, where="here")
    whole = parse_spec(AuditSpec, spec.model_dump(mode="json"), where="here")
    assert strategies_of(whole) == strategies_of(spec)


def test_two_unlike_restricted_domains_end_to_end() -> None:
    stream = np.random.default_rng(0)
    colour = Domain.from_arrays(
        "colour", stream.integers(0, 256, (90, 12, 12, 3), np.uint8), np.arange(90) % 3
    )
    torch.manual_seed(0)
    model = SmallConvNet(classes=5, in_channels=3)
    spec = quick_spec(rounds=2, guard=Guard(every=1, tolerance_points=100.0))
    both = [restricted(), colour]
    protected = protect(model, original=original(), restricted=both, spec=spec)
    assert {name for r in protected.rounds for name in r.domains} == {"digits-5-9", "colour"}
    record = audit(
        protected.model,
        unprotected=model,
        original=original(),
        restricted=both,
        spec=BRIEF,
    )
    assert [d.classes for d in record.restricted] == [5, 3]
    assert [d.image for d in record.restricted] == [(1, 8, 8), (3, 12, 12)]
    # Protection adds no code to a network.
    assert [s.code for s in record.subjects] == [(), (), ()]
    assert len(record.trials) == 2 * 3 * 12
    assert {t.outcome.kind for t in record.trials} == {"completed"}


def test_a_record_names_the_card_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(torch.device("cpu"), "fp32").place == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    assert environment(torch.device("cuda"), "bf16").place == "cuda (A Card)"
