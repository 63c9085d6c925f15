"""How long an audit takes, and what it gives up to take less."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch import nn

from builders import original, restricted, scratch_model, setting_of, trained_model
from sophon._auditing.audit import Audit
from sophon._auditing.budget import Pace, fit, measure_pace
from sophon._auditing.plan import Work
from sophon._auditing.trial import Bench, Job, Start, evaluation_steps
from sophon._base.errors import AuditError, SpecError
from sophon._cli.auditing import parse_duration
from sophon._specs import AuditSpec, Strategy

WHOLE = AuditSpec(steps=100, seeds=(0, 1, 2, 3, 4), search_trials=4)


def _cost(spec: AuditSpec) -> float:
    """Return a price that falls with everything that may be given up."""
    return spec.steps * (20 + (spec.search_trials or 0)) * len(spec.seeds or ()) / 10


def test_a_budget_that_is_enough_gives_up_nothing() -> None:
    assert fit(WHOLE, _cost(WHOLE), _cost) == (WHOLE, ())


def test_the_search_gives_way_first_then_seeds_then_steps() -> None:
    chosen, lost = fit(WHOLE, 1150, _cost)
    assert (chosen.search_trials, chosen.seeds, chosen.steps) == (3, WHOLE.seeds, 100)
    assert lost == ("1 of 4 searched strategies on each subject",)
    chosen, lost = fit(WHOLE, 700, _cost)
    assert (chosen.search_trials, chosen.seeds, chosen.steps) == (0, (0, 1, 2), 100)
    assert "2 of 5 attack seeds" in lost
    chosen, lost = fit(WHOLE, 361, _cost)
    assert (chosen.seeds, chosen.steps) == ((0, 1, 2), 60)
    assert "40 of 100 steps of every attack" in lost
    assert chosen.suite == WHOLE.suite
    assert chosen.evaluations == WHOLE.evaluations


def test_then_measurements_and_what_the_prefilter_lets_go_on() -> None:
    def price(spec: AuditSpec) -> float:
        late = (spec.prefilter or 0.25) * 100 + 5 * (spec.survivors or 6)
        return _cost(spec) + 10 * spec.evaluations + late

    spec = WHOLE.model_copy(update={"suite": "standard-1"})
    chosen, lost = fit(spec, 300 + 60 + 25 + 30, price)
    assert (chosen.steps, chosen.evaluations) == (50, 6)
    assert (chosen.prefilter, chosen.survivors) == (None, None)
    assert lost[-1] == "6 of 12 measurements of every attack"
    chosen, lost = fit(spec, 300 + 60 + 12.5 + 15, price)
    assert (chosen.evaluations, chosen.prefilter, chosen.survivors) == (6, 0.125, 3)
    assert lost[-2:] == (
        "most attacks are stopped at 0.125 of the budget instead of 0.25",
        "3 instead of 6 attacks of each subject go on from there",
    )
    with pytest.raises(AuditError, match=r"too short.*take audit\.suite = 'quick-2'"):
        fit(spec, 300 + 60 + 12.5 + 9, price)


def test_a_budget_too_short_names_the_least_time() -> None:
    with pytest.raises(AuditError, match=r"too short.*about 5 min.*audit\.suite = 'look-1'"):
        fit(WHOLE, 60, _cost)
    with pytest.raises(AuditError, match=r"audit\.seeds yourself$"):
        fit(WHOLE.model_copy(update={"suite": "look-1"}), 60, _cost)


def test_steps_stay_ten_times_what_was_rehearsed() -> None:
    chosen, _ = fit(WHOLE, 550, _cost, rehearsed=9)
    assert chosen.steps == 90
    with pytest.raises(AuditError, match="too short"):
        fit(WHOLE, 500, _cost, rehearsed=9)


def test_extra_attacks_keep_the_common_number_of_steps() -> None:
    spec = WHOLE.model_copy(update={"extra": (Strategy(learning_rate=0.5, steps=100),)})
    chosen, _ = fit(spec, 400, _cost)
    assert {strategy.steps for strategy in chosen.extra} == {chosen.steps} != {100}


def test_seconds_are_images_measurements_and_starts() -> None:
    pace = Pace(image_s=0.01, measurement_s=0.5, trial_s=2.0)
    assert pace.seconds(Work(3, 30, 960, 15)) == pytest.approx(9.6 + 7.5 + 6.0)


@dataclass(frozen=True)
class Clockwork(Bench):
    """A trial takes 3 s to start, half a second a step and a quarter a measurement."""

    def run(self, job: Job, start: Start) -> Any:
        steps = job.strategy.steps
        points = 1 + len(evaluation_steps(steps, self.evaluations))
        ended = SimpleNamespace(kind="completed")
        wall_s = 3.0 + 0.5 * steps + 0.25 * points
        return SimpleNamespace(outcome=ended, wall_s=wall_s, curve=range(points))


def test_a_pace_is_what_trials_are_made_of() -> None:
    model = trained_model()
    job = Job("scratch", restricted().name, Strategy(batch_size=16), 0)
    pace = measure_pace(Clockwork(setting_of(model), 5), job, Start(model, "", ""))
    assert pace is not None
    assert pace.image_s * 16 == pytest.approx(0.5)
    assert pace.measurement_s == pytest.approx(0.25)
    assert pace.trial_s == pytest.approx(3.0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1h30m", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "1 h", "-5m", "0m", "1h30", "soon"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(SpecError, match="write a time such as"):
        parse_duration(text)


def _audit(model: nn.Module, store: Path, budget_s: float | None, **changes: object) -> Audit:
    spec = AuditSpec(steps=4, evaluations=2, batch_size=16, precision="fp32", search_trials=8)
    return Audit(
        model,
        unprotected=model,
        original=original(),
        restricted=restricted(),
        spec=spec.model_copy(update=changes),
        scratch=scratch_model,
        store=store,
        budget_s=budget_s,
    )


def test_a_repeated_audit_gives_up_the_same_and_the_record_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, paces = trained_model(), [Pace(1e-4, 1e-2, 1e-2)]
    monkeypatch.setattr("sophon._auditing.audit.measure_pace", lambda *_: paces[-1])
    whole = _audit(model, tmp_path, None).forecast()
    assert whole.seconds is not None
    assert whole.seconds > 0
    assert whole.steps > whole.trials > 36
    first = _audit(model, tmp_path, whole.seconds * 0.75)
    assert first.given_up
    assert first.spec.search_trials in range(8)
    assert first.forecast().steps < whole.steps
    # The machine has become so fast that nothing would be given up now: the decision stays.
    paces.append(Pace(1e-5, 1e-3, 1e-3))
    again = _audit(model, tmp_path, whole.seconds * 0.75)
    assert (again.spec, again.given_up) == (first.spec, first.given_up)
    assert again.plan.expected() == first.plan.expected()
    for _ in again:
        pass
    record = again.record()
    assert record.given_up == first.given_up
    assert record.spec == first.spec


def test_workers_share_the_time_and_what_is_done_is_no_longer_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sophon._auditing.audit.measure_pace", lambda *_: Pace(0.0, 0.0, 1.0))
    run = _audit(trained_model(), tmp_path, None, search_trials=0)
    assert run.forecast().seconds == run.forecast().trials == len(run) == run.missing() == 36
    run.workers = 2
    assert run.forecast().seconds == 18
    for _, _ in zip(range(2), run, strict=False):
        pass
    assert run.missing() == 36 - len(list((tmp_path / "trials").iterdir()))


def test_what_a_budget_gives_up_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measurements alone cost anything.
    monkeypatch.setattr("sophon._auditing.audit.measure_pace", lambda *_: Pace(0.0, 1.0, 0.0))
    changes: dict[str, object] = {"steps": 40, "evaluations": 12, "search_trials": 0}
    whole = _audit(trained_model(), tmp_path / "whole", None, **changes).forecast().seconds
    assert whole is not None
    fitted = _audit(trained_model(), tmp_path / "fitted", 0.7 * whole, **changes)
    assert fitted.given_up[-1] == "6 of 12 measurements of every attack"
    assert (fitted.spec.evaluations, fitted.bench.evaluations) == (6, 6)
    # Points of the first steps fall together: less than half of them is given up.
    left, all_of_them = (1 + len(evaluation_steps(40, points)) for points in (6, 12))
    assert fitted.forecast().seconds == pytest.approx(left / all_of_them * whole)


def test_protections_that_share_a_store_give_up_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, budget_s = trained_model(), 1e3
    paces = iter([Pace(1.0, 0.0, 0.0), Pace(0.01, 0.0, 0.0)])
    monkeypatch.setattr("sophon._auditing.audit.measure_pace", lambda *_: next(paces))

    def make(model: nn.Module, protection: dict[str, object]) -> Audit:
        return Audit(
            model,
            unprotected=before,
            original=original(),
            restricted=restricted(),
            spec=AuditSpec(steps=8, evaluations=2, batch_size=1, search_trials=8),
            scratch=scratch_model,
            store=tmp_path,
            budget_s=budget_s,
            about={"protection": {"spec": protection}},
        )

    first = make(before, {"rehearsal": {"steps": 0}})
    assert first.given_up
    other = make(scratch_model(), {"rehearsal": {"steps": 0}, "rounds": 3})
    assert other.given_up == first.given_up
    # Another floor of steps is another decision, and this machine has become fast.
    assert not make(before, {"rehearsal": {"steps": 1}}).given_up
    # The same floor, all steps, is the same one: there is no third pace to measure.
    assert not make(scratch_model(), {"rehearsal": {"steps": 20}}).given_up


def test_a_field_that_comes_later_leaves_what_a_budget_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaterSpec(AuditSpec):
        released: ClassVar = frozenset(AuditSpec.model_fields)
        further: bool = False

    paces = iter([Pace(1.0, 0.0, 0.0)])
    monkeypatch.setattr("sophon._auditing.audit.measure_pace", lambda *_: next(paces))
    asked = {"steps": 8, "evaluations": 2, "batch_size": 1, "search_trials": 8}
    # There is no second pace to measure.
    first, again = (
        Audit(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec=kind(**asked),
            scratch=scratch_model,
            store=tmp_path,
            budget_s=1e3,
        )
        for kind in (AuditSpec, LaterSpec)
    )
    assert first.given_up
    assert again.given_up == first.given_up


def test_a_fresh_network_that_cannot_be_attacked_has_no_pace(tmp_path: Path) -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = scratch_model()

        def forward(self, images: object) -> object:
            if self.training:
                raise RuntimeError("not to be trained")
            return self.inner(images)

    def make(budget_s: float | None) -> Audit:
        spec = AuditSpec(steps=4, evaluations=2, batch_size=16, precision="fp32")
        return Audit(
            Refuses(),
            original=original(),
            restricted=restricted(),
            spec=spec,
            scratch=Refuses,
            store=tmp_path,
            budget_s=budget_s,
        )

    assert make(None).forecast().seconds is None
    with pytest.raises(AuditError, match="pace of this audit cannot be measured"):
        make(60.0)
