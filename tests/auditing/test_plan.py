"""Audits by stages: the same for every subject, however interrupted, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import Fatal, digits, original, restricted, trained_model
from records import trial as made
from sophon._attacks.kinds import method, patient
from sophon._attacks.search import AT_ONCE, RATES, AttackerSearch, rates
from sophon._attacks.suites import (
    SUITES,
    Suite,
    anew_attacks,
    beyond_rehearsal,
    beyond_usual,
    depth_attacks,
    resolved,
    strategies_of,
    suite_fingerprint,
)
from sophon._auditing.audit import Audit
from sophon._auditing.plan import Plan, _guess, _has_moved, fitted
from sophon._auditing.trial import Job, evaluation_steps, stop_at
from sophon._base.errors import DataError, SpecError
from sophon._judgement.statistics import envelope
from sophon._judgement.verdict import summarise
from sophon._records.audit_record import AuditRecord, Point, Score, pack
from sophon._records.metrics import KINDS
from sophon._reporting.tables import best_by_attack
from sophon._specs import (
    AuditSpec,
    BatchNorm,
    FreshHead,
    Heal,
    ResetLastBlocks,
    RidgeHead,
    Strategy,
    Subject,
)

# The machinery of `standard-1` on a tenth of its attacks.
SMALL = Suite(
    tuple(SUITES["standard-1"].strategies[i] for i in (5, 6, 24, 25, 28, 40, 66, -1)),
    prefilter=0.25,
    survivors=2,
    headline=True,
    seeds=(0, 1),
    search_trials=5,
    depth=True,
    rehearsed=True,
    secondary=SUITES["quick-1"].strategies[:3],
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
    late = [s for s in uninterrupted.strategies if patient(s)]
    kinds = {t.outcome.kind for t in uninterrupted.trials if t.strategy in late}
    assert kinds == {"completed"}
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


def test_interrupted_in_the_middle_the_record_is_the_same(
    uninterrupted: AuditRecord, tmp_path: Path
) -> None:
    run = _audit(tmp_path)
    for _, trial in zip(range(33), run, strict=False):
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
    wanted = {
        "fresh_head",
        "ridge_head",
        "reset_last_blocks",
        "rescale_weights",
        "batch_norm",
        "noise_kick",
    }
    assert kinds == wanted | {"heal", "distil"}
    for optimizer in RATES:
        rates = [s.learning_rate for s in strategies if s.optimizer == optimizer]
        assert max(rates) / min(rates) >= 1e3 * 0.999
    assert {s.data_fraction for s in strategies} == {0.01, 0.1, 1.0}
    assert {s.lora_rank for s in strategies} == {None, 4, 16}


def test_standard_2_has_what_ever_led_and_what_erasure_provokes() -> None:
    old, new = (set(SUITES[name].strategies) for name in ("standard-1", "standard-2"))
    # 40 of 92 led somewhere: `benchmarks/leaders.py`, whose test holds it against the records.
    assert len(old & new) == 40
    kinds = {p.kind for s in new - old for p in s.preparations}
    assert kinds == {
        *("fresh_head", "ridge_head", "keep_span", "balance_weights", "densify"),
        *("shrink_perturb", "noise_kick", "scramble"),
    }
    fits = {p.features for s in new for p in s.preparations if isinstance(p, RidgeHead)}
    assert fits == {"plain", "whitened", "robust"}
    assert {s.data_fraction for s in new} == {0.01, 0.0316, 0.1, 0.316, 1.0}
    assert 1 in {s.lora_rank for s in new}


@pytest.mark.parametrize("steps", [100, 200, 1000])
def test_standard_2_takes_at_most_four_fifths_of_the_steps_of_standard_1(steps: int) -> None:
    taken = []
    for name in ("standard-1", "standard-2"):
        spec = resolved(AuditSpec(suite=name, steps=steps))
        chosen = (*strategies_of(spec), *anew_attacks(10, spec), *beyond_usual(spec))
        whole = depth_attacks(10, spec) if SUITES[name].depth else ()
        subjects: tuple[Subject, ...] = ("protected", "unprotected", "scratch")
        plan = Plan(spec, subjects, (restricted(),), (), tuple(dict.fromkeys(chosen)), whole=whole)
        taken.append(plan.expected().steps)
    assert taken[1] <= 0.8 * taken[0]


def test_attacks_of_one_name_never_share_a_result() -> None:
    for suite in SUITES.values():
        names = [s.label() for s in suite.strategies]
        assert len(set(names)) == len(names)
    # A rate is named by three digits, and a fresh head is not named where one is fitted.
    twins = (
        (Strategy(learning_rate=0.0123), Strategy(learning_rate=0.012301)),
        (
            Strategy(preparations=(FreshHead(), RidgeHead())),
            Strategy(preparations=(RidgeHead(),)),
        ),
    )
    for one, other in twins:
        assert one.label() == other.label()
        run = Audit(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec=SPEC.model_copy(update={"suite": "quick-1", "extra": (one, other), "steps": 4}),
        )
        jobs = {s: Job("protected", restricted().name, s, 0) for s in run.strategies[-2:]}
        assert len({run._key(job) for job in jobs.values()}) == 2
        trials = [
            made("protected", (score,), strategy=s)
            for s, score in zip(jobs, (0.3, 0.6), strict=True)
        ]
        assert list(best_by_attack(trials).values()) == [0.3, 0.6]
        kept = {point.value for point in envelope(trials)}
        assert kept == {0.6}


STANDARD_1 = "2a1cd33e23d179c412ad9c734b99952e55437b7982b1788a24b66b4aad5adfc3"


@pytest.mark.parametrize(
    "change",
    [
        {"prefilter": 0.3},
        {"survivors": 5},
        {"seeds": (0, 1, 2, 3, 4)},
        {"search_trials": 12},
        {"depth": False},
        {"headline": False},
        {"rehearsed": False},
        {"secondary": ()},
    ],
)
def test_no_field_of_a_released_suite_changes_unnoticed(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = suite_fingerprint("standard-1")
    monkeypatch.setitem(SUITES, "standard-1", replace(SUITES["standard-1"], **change))  # type: ignore[arg-type]
    assert suite_fingerprint("standard-1") != released


def test_defaults_and_the_search_belong_to_a_released_suite(
    monkeypatch: pytest.MonkeyPatch, uninterrupted: AuditRecord
) -> None:
    released = suite_fingerprint("standard-1")
    monkeypatch.setitem(RATES, "adam", (1e-5, 1e-1))
    assert suite_fingerprint("standard-1") != released
    monkeypatch.undo()
    keyed = Strategy.keyed

    def later(self: Strategy) -> dict[str, Any]:
        return keyed(self) | {"momentum": 0.95}

    monkeypatch.setattr(Strategy, "keyed", later)
    assert suite_fingerprint("standard-1") != released
    monkeypatch.undo()
    monkeypatch.setitem(SUITES, "small", SMALL)
    assert uninterrupted.suite_fingerprint == suite_fingerprint("small")
    assert SUITES["standard-1"].seeds == (0, 1, 2, 3, 4, 5)


def test_rates_beyond_what_was_rehearsed_are_attacked_with() -> None:
    fixed = {"spec": {"rehearsal": {"fixed": {"optimizer": "sgd", "learning_rate": 1e-4}}}}
    chosen = beyond_rehearsal(fixed, SPEC)
    assert [(s.optimizer, s.learning_rate) for s in chosen] == [("sgd", 1e-3), ("sgd", 1e-2)]
    ranges = {"adam": [1e-4, 1e-2], "nesterov": [1e-3, 1e-1]}
    sampled = {"spec": {"rehearsal": {"distribution": {"learning_rates": ranges}}}}
    reached = [s.learning_rate for s in beyond_rehearsal(sampled, SPEC)]
    assert reached == [0.1, 1.0, 1.0, 10.0]
    silent = beyond_rehearsal(None, SPEC)
    # Silence buys no milder audit.
    assert [(s.optimizer, s.learning_rate) for s in silent] == [
        ("sgd_momentum", 1.0),
        ("sgd_momentum", 10.0),
        ("adam", 0.1),
        ("adam", 1.0),
    ]
    assert beyond_rehearsal({"spec": {}}, SPEC) == silent


def test_no_statement_makes_an_audit_milder_than_silence() -> None:
    def opened(ranges: dict[str, list[float]] | None) -> Audit:
        stated = {"spec": {"rehearsal": {"distribution": {"learning_rates": ranges}}}}
        held: dict[str, Any] = {"original": original(), "restricted": restricted()}
        about = {} if ranges is None else {"protection": stated}
        return Audit(trained_model(), spec=AuditSpec(suite="standard-1"), about=about, **held)

    silent = opened(None)
    faint = opened({name: [1e-30, 1e-30] for name in RATES})
    assert set(silent.strategies) <= set(faint.strategies)
    assert rates(faint.plan.beyond) == RATES
    huge = rates(opened({name: [1e3, 1e3] for name in RATES}).plan.beyond)
    assert all(low == RATES[name][0] for name, (low, _) in huge.items())
    assert all(high <= 100 * RATES[name][1] for name, (_, high) in huge.items())


def test_rates_stated_within_the_usual_ones_are_searched_as_far_as_a_hundred_times() -> None:
    for name, (low, high) in RATES.items():
        stated = {"fixed": {"optimizer": name, "learning_rate": high}}
        beyond = beyond_rehearsal({"spec": {"rehearsal": stated}}, SPEC)
        assert rates(beyond)[name] == (low, pytest.approx(min(1000.0, 100 * high)))
    # What released checkpoints state.
    stated = {"fixed": {"optimizer": "sgd", "learning_rate": 1e-4}}
    assert rates(beyond_rehearsal({"spec": {"rehearsal": stated}}, SPEC)) == RATES


def test_the_classes_of_the_original_task_are_those_of_its_protection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def opened(classes: object) -> Audit:
        held: dict[str, Any] = {"original": original(), "restricted": restricted(), "spec": SPEC}
        return Audit(trained_model(), about={"protection": {"classes": classes}}, **held)

    own = list(original().classes)
    other = [own[1], own[0], *own[2:]]
    said = f"class 0 of {original().name!r} is {own[0]!r}, and was {own[1]!r} when"
    with pytest.raises(DataError, match=f"{said}.*in the order of `classes` in the"):
        opened(other)
    # What says nothing, or what a stranger wrote.
    for silent in (own, None, 3, [1], [*own, "more"], [None] * len(own)):
        opened(silent)
    assert not caplog.messages
    opened(["zebra", *own[1:]])
    (line,) = caplog.messages
    assert f"is {own[0]!r}, and was 'zebra' when" in line


@pytest.mark.parametrize(
    ("protection", "named"),
    [
        ({"spec": {"rehearsal": {"fixed": {"optimizer": "lion", "learning_rate": 1}}}}, "lion"),
        ({"spec": {"rehearsal": {"fixed": {"optimizer": "adam", "learning_rate": -1}}}}, "-1"),
        ({"spec": {"rehearsal": {"distribution": {"learning_rates": {"adam": 1}}}}}, "adam"),
        ({"spec": {"rehearsal": {"steps": "many"}}}, "many"),
        ({"spec": {"guard": {"tolerance_points": "none"}}}, "tolerance_points"),
        ({"spec": [1]}, "spec"),
        ("strong", "strong"),
        ([], "top level"),
    ],
)
def test_a_statement_that_cannot_be_read_is_refused_before_any_work(
    protection: Any, named: str
) -> None:
    held: dict[str, Any] = {"original": original(), "restricted": restricted(), "spec": SPEC}
    with pytest.raises(SpecError, match=f"(?s)model.json.*{named}"):
        Audit(trained_model(), about={"protection": protection}, **held)


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


def test_an_attack_that_the_suite_has_is_not_run_twice() -> None:
    own = SUITES["quick-1"].strategies[0]
    for extra in ((own,), (Strategy(learning_rate=0.3),) * 2):
        with pytest.raises(SpecError, match=r"audit.extra repeats direct-all sgd_momentum"):
            strategies_of(AuditSpec(extra=extra))


def test_a_stated_rate_of_any_size_gives_rates_that_can_be_run() -> None:
    stated = {"spec": {"rehearsal": {"fixed": {"optimizer": "sgd", "learning_rate": 50.0}}}}
    assert [s.learning_rate for s in beyond_rehearsal(stated, SPEC)] == [500.0, 1000.0]


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


def test_searches_of_other_seeds_propose_otherwise_and_batches_fit_the_images() -> None:
    first, second = (AttackerSearch(seed, 100, 20).ask(8) for seed in (0, 1))
    assert first != second
    assert {strategy.batch_size for strategy in first} == {20}
    assert {s.batch_size for s in AttackerSearch(0, 100, 70).ask(60)} == {32, 64}
    named = AttackerSearch(0, 100, 20, batch_size=48).ask(4)
    assert {strategy.batch_size for strategy in named} == {20}


def test_what_heals_for_as_long_as_the_stop_is_not_searched() -> None:
    """A tenth of 200 steps is spent on healing."""
    for stop, healed in ((20, False), (21, True), (None, True)):
        asked = AttackerSearch(0, 200, 1000, stop=stop).ask(60)
        assert any(p.kind == "heal" for s in asked for p in s.preparations) is healed


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


def test_a_search_begins_with_what_the_suite_found() -> None:
    plain, told = AttackerSearch(0, 200, 1000), AttackerSearch(0, 200, 1000)
    suite = [s.model_copy(update={"steps": 200}) for s in SUITES["standard-1"].strategies]
    known = [s for s in suite if told.learn(s, 0.9 if s.preparations == (FreshHead(),) else 0.1)]
    # Neither few images, nor a rank or a batch that is not searched, nor a student.
    assert {s.data_fraction for s in known} == {1.0}
    assert {s.lora_rank for s in known} == {None}
    assert {s.batch_size for s in known} == {32, 64, 128}
    assert len(known) > len(suite) / 2
    assert not plain.learn(Strategy(optimizer="adam", learning_rate=1.0, steps=200), 1.0)
    assert not plain.learn(Strategy(optimizer="adam", learning_rate=1e-3, steps=100), 1.0)
    fresh = [
        sum(s.preparations == (FreshHead(),) for _ in range(6) for s in search.ask(AT_ONCE))
        for search in (plain, told)
    ]
    assert fresh[1] > 2 * fresh[0]


def test_a_search_proposes_what_the_suite_attacks_with() -> None:
    search = AttackerSearch(0, 200, 1000, stop=37)
    asked = [strategy for _ in range(60) for strategy in search.ask(AT_ONCE)]
    kinds = {preparation.kind for strategy in asked for preparation in strategy.preparations}
    suite = {p.kind for s in SUITES["standard-1"].strategies for p in s.preparations}
    assert kinds == suite - {"distil"}
    modes = {p.mode for s in asked for p in s.preparations if isinstance(p, BatchNorm)}
    assert modes == {"reset", "reestimate"}
    assert {strategy.scope for strategy in asked} == {"all", "head"}
    assert {strategy.lora_rank is None for strategy in asked} == {True, False}
    assert {strategy.weight_decay for strategy in asked} == {0.0, 0.01}
    assert {strategy.batch_size for strategy in asked} == {32, 64, 128}


def test_a_search_keeps_to_the_task_the_batch_size_and_the_stop_and_goes_beyond_rehearsal() -> None:
    beyond = (Strategy(optimizer="adam", learning_rate=1.0),)
    search = AttackerSearch(0, 200, 90, batch_size=48, metric="mse", beyond=beyond, stop=20)
    asked = [strategy for _ in range(60) for strategy in search.ask(AT_ONCE)]
    assert {strategy.batch_size for strategy in asked} == {48}
    assert {strategy.scope for strategy in asked} == {"all"}
    kinds = {preparation.kind for strategy in asked for preparation in strategy.preparations}
    assert not kinds & {"batch_norm", "heal"}
    adam = [strategy.learning_rate for strategy in asked if strategy.optimizer == "adam"]
    assert RATES["adam"][1] < max(adam) <= 1.0
    others = [s.learning_rate for s in asked if s.optimizer == "adamw"]
    assert max(others) <= RATES["adamw"][1]


def test_an_audits_search_knows_its_task_batch_size_and_what_was_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_with: list[dict[str, object]] = []
    search = AttackerSearch.__init__

    def noted(self: AttackerSearch, *words: int, **fields: object) -> None:
        made_with.append(fields)
        search(self, *words, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(AttackerSearch, "__init__", noted)
    rehearsed = {"fixed": {"optimizer": "adam", "learning_rate": 1e-2}}
    run = Audit(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=SPEC.model_copy(update={"batch_size": 24}),
        about={"protection": {"spec": {"rehearsal": rehearsed}}},
    )
    next(run.plan._search_stages(run.restricted[0]))
    assert {subject["batch_size"] for subject in made_with} == {24}
    assert {subject["metric"] for subject in made_with} == {"accuracy"}
    beyond = [s.learning_rate for s in made_with[0]["beyond"]]  # type: ignore[attr-defined]
    assert beyond == [0.1, 1.0]
    assert len(made_with) == len(run.plan.subjects)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
def test_allowed_tasks_meet_the_strongest_kinds_of_attack_too(metric: str) -> None:
    def secondary(spec: AuditSpec) -> set[Strategy]:
        suite = strategies_of(spec)
        allowed = digits(8, 10)
        plan = Plan(spec, ("protected",), (), (allowed,), suite, metric=metric)
        return {job.strategy for batch in iter(plan.next, None) for job in batch}

    spec = AuditSpec(suite="standard-1", steps=40)
    met, own = secondary(spec), set(fitted(strategies_of(spec), digits(8, 10)))
    assert met >= set(fitted(strategies_of(AuditSpec(suite="quick-1", steps=40)), digits(8, 10)))
    assert met < own
    assert len(met) == (18 if metric == "accuracy" else 14)
    assert ("ridge_head" in {p.kind for s in met for p in s.preparations}) == (metric == "accuracy")
    assert {s.steps for s in met} == {40}
    assert {s.batch_size for s in secondary(spec.model_copy(update={"batch_size": 16}))} == {16}
    more = spec.model_copy(update={"extra": (Strategy(learning_rate=0.0321),)})
    assert secondary(more) == met
    quick = AuditSpec(suite="quick-1", steps=40)
    assert secondary(quick) == set(fitted(strategies_of(quick), digits(8, 10)))


@pytest.mark.parametrize(("blocks", "anew"), [(0, []), (1, [1]), (2, [1]), (4, [2]), (10, [5])])
def test_quick_2_starts_half_of_the_blocks_anew(blocks: int, anew: list[int]) -> None:
    spec = AuditSpec(suite="quick-2", steps=40, batch_size=16)
    found = anew_attacks(blocks, spec)
    assert [[p.blocks for p in s.preparations if p.kind == "reset_last_blocks"] for s in found] == [
        [count] for count in anew
    ]
    assert {(s.steps, s.batch_size) for s in found} <= {(40, 16)}
    assert anew_attacks(blocks, AuditSpec(suite="standard-1")) == ()


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"quick-1, quick-2, standard-1"):
        strategies_of(AuditSpec(suite="standard-9"))


def test_a_prefilter_can_be_earlier_and_let_fewer_go_on(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"prefilter": 0.1, "survivors": 1, "search_trials": 0})
    strict, usual = (_audit(tmp_path, spec=s).plan for s in (spec, SPEC))
    assert strict._stop() == 1 < (usual._stop() or 0)
    assert strict.expected().steps < usual.expected().steps
    # Stopped after one step, most trials have two points, that of their start included.
    stopped = len(strict.subjects) * len(strict._early_and_late(restricted())[0])
    whole = len(evaluation_steps(spec.steps, spec.evaluations)) + 1
    measurements = (strict.expected().trials - stopped) * whole + stopped * 2
    assert strict.expected().measurements == measurements
    early = strict._early_and_late(restricted())[0]
    domain, ranks = strict.restricted[0], range(len(early))
    scores = [0.9 - rank / 20 for rank in ranks]
    _at_stop(strict, dict.fromkeys(strict.subjects, scores), early)
    # Besides the best one the best of every method goes on.
    first = {method(strategy): strategy for strategy in reversed(early)}
    assert len(first) < len(early)
    assert strict._survivors(domain, early) == [s for s in early if s in first.values()]
    # Nothing is stopped, on any subject, where on one of them none has moved by the stop.
    still = dict.fromkeys(strict.subjects, scores) | {"protected": [0.2] * len(early)}
    _at_stop(strict, still, early)
    assert strict._survivors(domain, early) == early


def _at_stop(
    plan: Plan, scores: dict[Subject, Sequence[float]], strategies: Sequence[Strategy]
) -> None:
    """Let each subject's attacks have reached so much at the stop."""
    plan.trials.clear()
    for subject in plan.subjects:
        for strategy, value in zip(strategies, scores[subject], strict=True):
            met = made(subject, [value], strategy=strategy, domain=plan.restricted[0].name)
            last = met.curve[1].model_copy(update={"step": plan._stop()})
            plan.trials.append(met.model_copy(update={"curve": (met.curve[0], last)}))


def test_a_method_that_moves_lets_no_other_be_chosen_by_luck() -> None:
    """A defence that delays all but linear probing must not choose the others' attackers."""
    spec = SPEC.model_copy(update={"steps": 200, "survivors": 1, "search_trials": 0})
    plan = _audit(spec=spec).plan
    domain = plan.restricted[0]
    early = plan._early_and_late(domain)[0]
    guess = _guess(domain, KINDS["accuracy"])
    probing = [method(s)[-1] == "head" for s in early]
    assert 0 < sum(probing) < len(early)
    delayed = [guess + 0.5 if alone else guess for alone in probing]
    usual = [guess + 0.5 - rank / 1000 for rank in range(len(early))]
    _at_stop(plan, {**dict.fromkeys(plan.subjects, usual), "protected": delayed}, early)
    assert plan._moved(domain, "protected", early)
    kept = set(plan._survivors(domain, early))
    assert {s for s, alone in zip(early, probing, strict=True) if not alone} <= kept
    # Where everything moves most are stopped.
    _at_stop(plan, dict.fromkeys(plan.subjects, usual), early)
    assert len(plan._survivors(domain, early)) < len(early) - 3


def test_what_has_moved_is_more_than_luck_among_many() -> None:
    plan = _audit(spec=SPEC.model_copy(update={"steps": 200})).plan
    domain = plan.restricted[0]
    # Of 200 images eight points above guessing are luck for one of many attacks.
    one = [Strategy(learning_rate=1e-2)]
    many = [Strategy(learning_rate=1e-2 + i / 1e4) for i in range(40)]
    guess = _guess(domain, KINDS["accuracy"])
    above = {key: [guess + 0.08] for key in plan.subjects}
    _at_stop(plan, above, one)
    assert plan._moved(domain, "protected", one)
    _at_stop(plan, dict.fromkeys(plan.subjects, [guess + 0.08] * 40), many)
    assert not plan._moved(domain, "protected", many)
    _at_stop(plan, dict.fromkeys(plan.subjects, [guess + 0.2] * 40), many)
    assert plan._moved(domain, "protected", many)
    # What it was before the first step is no success of the attack: 0.1 of 200 images here.
    _at_stop(plan, {key: [0.11] for key in plan.subjects}, one)
    assert not plan._moved(domain, "protected", one)


def test_scores_of_the_same_images_are_compared_image_by_image() -> None:
    domain = digits(5, 8)
    right = np.r_[np.ones(90), np.zeros(110)]
    better = np.r_[np.ones(100), np.zeros(100)]
    points = []
    for step, held in enumerate((right, better)):
        score = Score(correct=int(held.sum()), total=200)
        points.append(Point(step=step, samples=0, validation=score, by_image=pack(held, score)))
    trial = made("protected", (0.5,)).model_copy(update={"curve": tuple(points)})
    assert _has_moved(trial, 1, domain, 0.025)
    blind = tuple(point.model_copy(update={"by_image": None}) for point in points)
    assert not _has_moved(trial.model_copy(update={"curve": blind}), 1, domain, 0.025)


def test_of_a_search_the_better_half_goes_on_unless_nothing_has_moved() -> None:
    plan = _audit(spec=SPEC.model_copy(update={"steps": 200})).plan
    domain = plan.restricted[0]
    four = [Strategy(learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
    four.append(Strategy(preparations=(Heal(share=0.1),), learning_rate=1e-3))
    asked = dict.fromkeys(plan.subjects, four)
    _at_stop(plan, {key: [0.9, 0.8, 0.95, 0.3] for key in plan.subjects}, four)
    # Healing pays off late: it is never among those that are stopped.
    assert set(map(tuple, plan._going_on(domain, asked).values())) == {(four[3], four[2])}
    still = {key: [0.9, 0.8, 0.95, 0.3] for key in plan.subjects} | {"scratch": [0.1] * 4}
    _at_stop(plan, still, four)
    assert plan._going_on(domain, asked) == asked


def test_of_an_odd_number_of_proposals_the_better_half_is_the_larger_one() -> None:
    plan = _audit(spec=SPEC.model_copy(update={"steps": 200})).plan
    three = [Strategy(learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
    for count, kept in ((3, {three[0], three[2]}), (1, {three[0]})):
        some = three[:count]
        _at_stop(plan, dict.fromkeys(plan.subjects, [0.9, 0.8, 0.95][:count]), some)
        chosen = plan._going_on(plan.restricted[0], dict.fromkeys(plan.subjects, some))
        assert set(map(frozenset, chosen.values())) == {frozenset(kept)}


def test_secondary_domains_are_attacked_with_the_first_three_seeds() -> None:
    spec = AuditSpec(suite="quick-1", steps=40, seeds=(4, 3, 2, 1, 0))
    suite, domain = strategies_of(spec), digits(8, 10)
    plan = Plan(spec, ("protected",), (), (domain,), suite)
    jobs = plan.next() or []
    assert [job.seed for job in jobs] == [s for s in (4, 3, 2) for _ in fitted(suite, domain)]
    assert {job.domain for job in jobs} == {domain.name}
    assert plan.expected().trials == len(jobs)
    # Once it is done it stays done.
    assert plan.next() is plan.next() is None


def test_what_is_given_as_results_decides_the_next_batch() -> None:
    plan = _audit(spec=SPEC.model_copy(update={"steps": 200, "survivors": 1})).plan
    first = plan.next() or []
    stopped = {job.strategy for job in first if job.stop is not None}
    by_method: dict[tuple[str, ...], list[Strategy]] = {}
    for strategy in stopped:
        by_method.setdefault(method(strategy), []).append(strategy)
    best = {max(some, key=lambda s: s.learning_rate) for some in by_method.values()}
    results = []
    for job in first:
        value = 0.95 if job.strategy in best else 0.6
        met = made(job.subject, [value], strategy=job.strategy, domain=job.domain)
        last = met.curve[1].model_copy(update={"step": job.stop or 200})
        results.append(met.model_copy(update={"curve": (met.curve[0], last)}))
    second = plan.next(results) or []
    assert plan.trials == results
    # Before the first step all are alike: the first of them leads there.
    assert {job.strategy for job in second} == best | {first[0].strategy} < stopped
    assert {job.stop for job in second} == {None}


def test_a_prefilter_at_the_end_of_the_budget_runs_nothing_twice() -> None:
    spec = SPEC.model_copy(update={"prefilter": 1.0, "search_trials": 0, "seeds": (0,)})
    plan = _audit(spec=spec).plan
    first = plan.next() or []
    # Met as trials of the first stage, survivors would not be run again.
    assert {job.stop for job in first} == {None}
    second = plan.next(
        [made(a.subject, (0.5,), strategy=a.strategy, domain=a.domain) for a in first]
    )
    assert second
    assert set(second) <= set(first)
    of_one_domain = len({(a.subject, a.strategy) for a in first})
    expected = plan.expected()
    assert expected.trials == of_one_domain + 3 * 3
    points = evaluation_steps(spec.steps, spec.evaluations)
    assert expected.measurements == expected.trials * (1 + len(points))


def test_a_suite_that_runs_all_to_the_end_has_no_prefilter() -> None:
    for change in ({"prefilter": 0.1}, {"survivors": 3}):
        with pytest.raises(
            SpecError, match=rf"audit.{next(iter(change))} = .*'quick-1' runs every"
        ):
            resolved(AuditSpec(suite="quick-1", **change))
