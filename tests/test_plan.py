"""Audits by stages: the same for every subject, however interrupted, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builders import Fatal, digits, original, restricted, trained_model
from records import trial as made
from sophon._attacks import (
    SUITES,
    Suite,
    beyond_rehearsal,
    depth_attacks,
    resolved,
    strategies_of,
    suite_fingerprint,
)
from sophon._audit import Audit
from sophon._errors import SpecError
from sophon._plan import fitted
from sophon._records import AuditRecord
from sophon._search import AT_ONCE, RATES, AttackerSearch
from sophon._specs import AuditSpec, FreshHead, Heal, ResetLastBlocks, Strategy
from sophon._trials import stop_at
from sophon._verdict import summarise

# The machinery of `standard-1` on a tenth of its attacks.
SMALL = Suite(
    tuple(SUITES["standard-1"].strategies[i] for i in (5, 6, 24, 25, 28, 40, 55, -1)),
    prefilter=0.25,
    survivors=2,
    headline=True,
    seeds=(0, 1),
    search_trials=5,
    depth=True,
    rehearsed=True,
)
SPEC = AuditSpec(suite="small", steps=16, evaluations=4, precision="fp32")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "small", SMALL)


def _audit(store: Path | None = None, workers: int = 1, spec: AuditSpec = SPEC) -> Audit:
    return Audit(
        trained_model(),
        unprotected=trained_model(),
        original=original(),
        restricted=digits(5, 8),
        benign=(digits(8, 10),),
        spec=spec,
        store=store,
        scratch=None,
        workers=workers,
    )


def _whole(run: Audit) -> AuditRecord:
    for _ in run:
        pass
    return run.record()


def _facts(record: AuditRecord) -> list[object]:
    """Return what must not depend on when and where trials ran."""
    varying = {"wall_s", "environment"}
    return [trial.model_dump(exclude=varying) for trial in record.trials]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as workers do: another number of threads rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(one_thread: None) -> AuditRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "small", SMALL)
        return _whole(_audit())


def test_every_subject_is_attacked_alike(uninterrupted: AuditRecord) -> None:
    assert (uninterrupted.restricted[0].training_flops or 0) > 0
    by = {
        name: [t for t in uninterrupted.trials if t.subject == name]
        for name in ("protected", "unprotected", "scratch")
    }
    assert len({len(trials) for trials in by.values()}) == 1
    ends = {name: sum(t.outcome.kind == "stopped" for t in by[name]) for name in by}
    assert len(set(ends.values())) == 1
    assert ends["scratch"] > 0
    assert "unequal search" not in {f.name for f in summarise(uninterrupted)[0].flags}
    # Equal weights give equal trials wherever the same strategy was proposed.
    for one, other in zip(by["protected"], by["unprotected"], strict=True):
        assert (one.strategy, one.curve) == (other.strategy, other.curve)


def test_nothing_is_tried_twice_and_late_attacks_are_never_stopped(
    uninterrupted: AuditRecord,
) -> None:
    keys = [trial.key for trial in uninterrupted.trials]
    assert len(set(keys)) == len(keys)
    for trial in uninterrupted.trials:
        if any(isinstance(p, Heal) for p in trial.strategy.preparations):
            assert trial.outcome.kind == "completed"
    assert {t.seed for t in uninterrupted.trials} == {0, 1}


def test_attacks_that_lead_are_run_with_every_seed(uninterrupted: AuditRecord) -> None:
    summary = summarise(uninterrupted)[0]
    for subject in summary.subjects.values():
        seeds = {
            t.seed
            for t in uninterrupted.trials
            if t.domain == summary.domain.name
            and t.subject == subject.name
            and t.strategy == subject.winner.strategy
        }
        assert seeds == {0, 1}


def test_each_subjects_winner_is_run_with_every_seed_though_it_adds_nothing_to_the_area() -> None:
    early, late = Strategy(learning_rate=1e-2), Strategy(learning_rate=1e-3)
    plan = _audit().plan
    domain = plan.restricted[0]
    for subject in plan.subjects:
        # The winner's lead at the very end is too small for the envelope's area.
        for strategy, scores in ((early, (0.9, 0.9, 0.9, 0.9)), (late, (0.1, 0.1, 0.1, 0.905))):
            met = made(subject, scores, strategy=strategy, domain=domain.name)
            plan.trials.append(met)
    assert plan._leaders(domain) == [late, early]


@pytest.mark.parametrize("kept", [7, 33])
def test_interrupted_anywhere_the_record_is_the_same(
    kept: int, uninterrupted: AuditRecord, tmp_path: Path
) -> None:
    run = _audit(tmp_path)
    for _, trial in zip(range(kept), run, strict=False):
        last = trial.key
    assert last in {trial.key for trial in uninterrupted.trials}
    before = {file.name for file in (tmp_path / "trials").iterdir()}
    again = _audit(tmp_path)
    assert _facts(_whole(again)) == _facts(uninterrupted)
    assert before < {file.name for file in (tmp_path / "trials").iterdir()}
    assert _audit(tmp_path).missing() == 0


def test_workers_find_what_one_process_finds(uninterrupted: AuditRecord, tmp_path: Path) -> None:
    record = _whole(_audit(tmp_path, workers=2))
    found = [(t.key, t.subject, t.strategy, t.outcome.kind) for t in record.trials]
    assert found == [(t.key, t.subject, t.strategy, t.outcome.kind) for t in uninterrupted.trials]
    assert {t.environment.threads for t in record.trials if t.environment} == {1}


def test_the_trial_of_a_killed_worker_is_run_again_and_counted_once(tmp_path: Path) -> None:
    model = Fatal(classes=5, in_channels=1)
    model.load_state_dict(trained_model().state_dict())
    model.marker = tmp_path / "killed"
    spec = AuditSpec(steps=2, evaluations=2, batch_size=16, precision="fp32")
    run = Audit(
        model,
        original=original(),
        restricted=restricted(),
        spec=spec,
        store=tmp_path,
        workers=2,
    )
    record = _whole(run)
    assert model.marker.exists()
    assert {t.outcome.kind for t in record.trials} == {"completed"}
    assert len(record.trials) == len({t.key for t in record.trials}) == 24
    assert len(list((tmp_path / "trials").glob("*.json"))) == 24


# --- Suites and searches ----------------------------------------------------------------------


def test_standard_1_is_as_released() -> None:
    strategies = SUITES["standard-1"].strategies
    assert len(set(strategies)) == len(strategies)
    assert suite_fingerprint("standard-1") == STANDARD_1
    assert {s.optimizer for s in strategies} == set(RATES)
    kinds = {p.kind for s in strategies for p in s.preparations}
    wanted = {"fresh_head", "reset_last_blocks", "rescale_weights", "batch_norm", "noise_kick"}
    assert kinds == wanted | {"heal", "distil"}
    for optimizer in RATES:
        rates = [s.learning_rate for s in strategies if s.optimizer == optimizer]
        assert max(rates) / min(rates) >= 1e3 * 0.999
    assert {s.data_fraction for s in strategies} == {0.01, 0.1, 1.0}
    assert {s.lora_rank for s in strategies} == {None, 4, 16}


STANDARD_1 = "fa1f3a76c77ff9e01a523a32c7f1918e9b6d28d2ef649cf1cf85e088a58a06bd"


def test_rates_beyond_what_was_rehearsed_are_attacked_with() -> None:
    fixed = {"spec": {"rehearsal": {"fixed": {"optimizer": "sgd", "learning_rate": 1e-4}}}}
    chosen = beyond_rehearsal(fixed, SPEC)
    assert [(s.optimizer, s.learning_rate) for s in chosen] == [("sgd", 1e-3), ("sgd", 1e-2)]
    ranges = {"adam": [1e-4, 1e-2], "nesterov": [1e-3, 1e-1]}
    sampled = {"spec": {"rehearsal": {"distribution": {"learning_rates": ranges}}}}
    rates = [s.learning_rate for s in beyond_rehearsal(sampled, SPEC)]
    assert rates == [0.1, 1.0, 1.0, 10.0]
    assert beyond_rehearsal(None, SPEC) == ()
    assert beyond_rehearsal({"spec": {}}, SPEC) == ()


def test_depth_keeps_all_some_and_few_blocks() -> None:
    chosen = depth_attacks(10, SPEC)
    reset = [[p.blocks for p in s.preparations if isinstance(p, ResetLastBlocks)] for s in chosen]
    assert reset == [[], [], [2], [2], [5], [5], [8], [8]]
    assert all(FreshHead() in s.preparations for s in chosen)
    assert len(set(depth_attacks(1, SPEC))) >= 2


def test_batches_are_as_large_as_the_images_allow() -> None:
    domain = restricted()
    have = len(domain.train)
    few = Strategy(data_fraction=0.01)
    chosen = fitted((Strategy(batch_size=512 * 4), few, Strategy(batch_size=have)), domain)
    assert chosen[0].batch_size == have
    assert len(chosen) == 2
    assert domain.class_count <= chosen[1].batch_size < 64


def test_a_prefilter_stops_where_attacks_are_measured() -> None:
    assert stop_at(200, 12, 0.25) == 37
    assert stop_at(16, 4, 0.01) == 1


def test_a_search_repeats_itself_when_told_the_same() -> None:
    def proposals(values: list[float]) -> list[Strategy]:
        search = AttackerSearch(0, 100, 1000)
        asked = []
        for _ in range(3):
            asked += search.ask(AT_ONCE)
            search.tell(values)
        return asked

    first = proposals([0.1, 0.2, 0.3, 0.4])
    assert first == proposals([0.1, 0.2, 0.3, 0.4])
    assert first[:AT_ONCE] == proposals([0.4, 0.3, 0.2, 0.1])[:AT_ONCE]
    assert first != proposals([0.4, 0.3, 0.2, 0.1])
    for strategy in first:
        low, high = RATES[strategy.optimizer]
        assert 0.999 * low <= strategy.learning_rate <= 1.001 * high


def test_a_search_finds_the_rate_that_pays() -> None:
    search = AttackerSearch(0, 100, 1000)
    best = []
    for _ in range(12):
        asked = search.ask(AT_ONCE)
        values = [
            float(s.optimizer.startswith("adam")) - abs(s.learning_rate - 1e-3) for s in asked
        ]
        best.append(max(values))
        search.tell(values)
    assert sum(value > 0.9 for value in best[6:]) >= 4


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"quick-1, standard-1"):
        strategies_of(AuditSpec(suite="standard-9"))


def test_a_prefilter_can_be_earlier_and_let_fewer_go_on(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"prefilter": 0.1, "survivors": 1, "search_trials": 0})
    strict, usual = (_audit(tmp_path, spec=s).plan for s in (spec, SPEC))
    assert strict._stop() == 1 < (usual._stop() or 0)
    assert strict.expected().steps < usual.expected().steps
    early = strict._early_and_late(restricted())[0]
    domain, ranks = strict.restricted[0], range(len(early))
    strict.trials = [
        made(subject, [0.9 - rank / 20] * 4, strategy=early[rank], domain=domain.name)
        for subject in strict.subjects
        for rank in ranks
    ]
    assert strict._survivors(domain, early) == early[:1]


def test_a_prefilter_at_the_end_of_the_budget_runs_nothing_twice() -> None:
    spec = SPEC.model_copy(update={"prefilter": 1.0, "search_trials": 0, "seeds": (0,)})
    plan = _audit(spec=spec).plan
    stages = plan.stages()
    first = next(stages)
    # Met as trials of the first stage, survivors would not be run again.
    assert {assignment.stop for assignment in first} == {None}
    plan.trials += [
        made(a.subject, (0.5,), strategy=a.strategy, domain=a.domain.name) for a in first
    ]
    second = next(stages)
    assert second
    assert set(second) <= set(first)
    of_one_domain = len({(a.subject, a.strategy) for a in first})
    assert plan.expected().trials == of_one_domain + 3 * 12


def test_a_suite_that_runs_all_to_the_end_has_no_prefilter() -> None:
    for change in ({"prefilter": 0.1}, {"survivors": 3}):
        with pytest.raises(
            SpecError, match=rf"audit.{next(iter(change))} = .*'quick-1' runs every"
        ):
            resolved(AuditSpec(suite="quick-1", **change))
