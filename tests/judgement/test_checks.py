"""Each red flag: a record that raises it and one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from records import CURVES, crashed, diverged, record, trial
from sophon._attacks.suites import resolved, strategies_of
from sophon._judgement import flags
from sophon._judgement.flags.all import CHECKS
from sophon._judgement.flags.flag import TEXTS
from sophon._judgement.flags.running import unequal_search
from sophon._protection.migration import _FLAT
from sophon._records.audit_record import AuditRecord, Familiarity, Overlap, Score, Vitals
from sophon._specs import AuditSpec, FreshHead, RescaleWeights, Strategy, Subject


def _rates(best: float) -> AuditRecord:
    trials = [
        trial(
            "protected",
            (0, 0, 0, 0.9 if rate == best else 0.5),
            strategy=Strategy(learning_rate=rate),
        )
        for rate in (1e-3, 1e-2, 1e-1)
    ]
    return record(trials)


def _optimizers(adam: float) -> AuditRecord:
    trials = [
        trial("protected", (0, 0, 0, 0.5), strategy=Strategy(optimizer="sgd_momentum")),
        trial("protected", (0, 0, 0, adam), strategy=Strategy(optimizer="adam")),
    ]
    spec = {"rehearsal": {"fixed": {"optimizer": "sgd", "learning_rate": 1e-4}}}
    return record(trials, protection={"spec": spec})


def _rehearsing(steps: int, horizon: int | None = None) -> AuditRecord:
    rehearsal = {"steps": steps, "horizon": horizon}
    return record(protection={"spec": {"rehearsal": rehearsal}})


def _standard(**changes: object) -> AuditRecord:
    """Return a record by `standard-1` in full, or with less of it."""
    spec = resolved(AuditSpec(suite="standard-1")).model_copy(update=changes)
    return record().model_copy(update={"spec": spec})


def _before(score: float) -> AuditRecord:
    """Return a record whose unprotected model has this score on its own task, of ten classes."""
    base, held = record(), Score(correct=round(1000 * score), total=1000)
    subjects = [
        one.model_copy(update={"original": held}) if one.name == "unprotected" else one
        for one in base.subjects
    ]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _machines(**other: str) -> AuditRecord:
    """Return a record whose trials on one subject ran somewhere else."""
    base = record()
    there = base.environment.model_copy(update=other)
    trials = [
        t.model_copy(
            update={"environment": there if t.subject == "protected" else base.environment}
        )
        for t in base.trials
    ]
    return base.model_copy(update={"trials": tuple(trials)})


SOUND = Vitals(
    largest_logit=12.0,
    gradient_norms={"refused": 2.0},
    body_gradient_norms={"refused": 1.5},
    weight_sizes={"a": 0.1, "b": 0.2},
    largest_buffer=5.0,
    smallest_variance=0.1,
)


def _vital(**changes: object) -> AuditRecord:
    """Return a record of a sound unprotected model and a protected one with these vitals."""
    base = record()
    after = SOUND.model_copy(update=changes)
    vitals = {"protected": after, "unprotected": SOUND}
    subjects = [s.model_copy(update={"vitals": vitals.get(s.name)}) for s in base.subjects]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _familiar(before: tuple[int, int], fresh: tuple[int, int] | None = (100, 100)) -> AuditRecord:
    """Return a record in which so many of 200 images of the training and of the validation split
    are told apart, by the unprotected model and by a fresh network.
    """

    def vitals(right: tuple[int, int]) -> Vitals:
        trained, others = (Score(correct=n, total=200) for n in right)
        known = {"refused": Familiarity(trained=trained, others=others)}
        return SOUND.model_copy(update={"familiarity": known})

    held = {"unprotected": vitals(before), "scratch": vitals(fresh) if fresh else None}
    base = record()
    subjects = [s.model_copy(update={"vitals": held.get(s.name)}) for s in base.subjects]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _weights(sha256: str) -> AuditRecord:
    """Return a record whose protected model has these weights."""
    base = record()
    subjects = [
        s.model_copy(update={"weights_sha256": sha256} if s.name == "protected" else {})
        for s in base.subjects
    ]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _made_from(similarity: float | None = None, stated: str | None = None) -> AuditRecord:
    protection = None if stated is None else {"identity": {"model": stated}}
    base = record(protection=protection)
    subjects = [
        s.model_copy(update={"similarity": similarity if s.name == "protected" else None})
        for s in base.subjects
    ]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _other_code(*lines: str) -> AuditRecord:
    base = record()
    subjects = [
        s.model_copy(update={"code": lines if s.name == "protected" else ()}) for s in base.subjects
    ]
    return base.model_copy(update={"subjects": tuple(subjects)})


def _heads(fresh: float) -> AuditRecord:
    trials = [
        trial("protected", (0, 0, 0, 0.5)),
        trial("protected", (0, 0, 0, fresh), strategy=Strategy(preparations=(FreshHead(),))),
    ]
    return record(trials)


def _overlapping(near: int) -> AuditRecord:
    shared = Overlap(first="refused/test", second="refused/train", count=1000, exact=5, near=near)
    other = Overlap(first="allowed/test", second="allowed/train", count=10, exact=10, near=0)
    return record().model_copy(update={"overlaps": (shared, other)})


def _searched(last: float) -> AuditRecord:
    """Return a record of a search whose last proposal reached `last`."""
    proposals = [Strategy(learning_rate=rate) for rate in (0.011, 0.012, 0.013)]
    trials = [
        trial("protected", (0, 0, 0, v), strategy=s)
        for s, v in zip(proposals, (0.5, 0.6, last), strict=True)
    ]
    # What leads is run with another seed at the end; that is no new proposal.
    trials.append(trial("protected", (0, 0, 0, 0.5), strategy=proposals[0], seed=1))
    base = record(trials)
    return base.model_copy(update={"spec": base.spec.model_copy(update={"search_trials": 3})})


LAST, FIRST = strategies_of(AuditSpec())[-1], strategies_of(AuditSpec())[0]
CASES: dict[str, tuple[AuditRecord, AuditRecord]] = {
    "winner_on_the_edge": (_rates(1e-1), _rates(1e-2)),
    "last_trial_is_best": (
        record([trial("protected", (0.5,), strategy=LAST)]),
        record([trial("protected", (v,), strategy=s) for v, s in ((0.5, FIRST), (0.4, LAST))]),
    ),
    "last_step_is_best": (record(), record([trial("protected", (0.1, 0.2, 0.6, 0.5))])),
    "seeds_disagree": (
        record([trial("protected", (0.5,), seed=0), trial("protected", (0.9,), seed=1)]),
        record(),
    ),
    "most_diverged": (
        record([diverged("scratch"), diverged("scratch"), trial("scratch", (0.5,))]),
        record([diverged("scratch"), trial("scratch", (0.5,)), trial("scratch", (0.5,))]),
    ),
    "unequal_search": (record(record().trials[1:]), record()),
    "crashed_attacks": (record([crashed("protected")]), record()),
    "near_chance_on_original": (record(original=0.15), record(original=0.9)),
    "unprotected_fails": (_before(0.11), _before(0.13)),
    "original_task_suffers": (record(original=0.85), record(original=0.89)),
    "other_optimizer_far_better": (_optimizers(0.9), _optimizers(0.55)),
    "same_weights": (_weights("2" * 64), record()),
    "another_network": (_made_from(similarity=0.1), _made_from(similarity=0.9)),
    "other_code": (_other_code("head.drop_rate = 0.9 instead of 0.0"), _other_code()),
    "gradients_at_step_0": (_vital(gradient_norms={"refused": 0.0}), _vital()),
    "saturated_logits": (_vital(largest_logit=2e3), _vital(largest_logit=900.0)),
    "inflated_weights": (
        _vital(weight_sizes={"a": 3.0, "b": 0.2}),
        _vital(weight_sizes={"a": 0.3, "b": 0.06}),
    ),
    "extreme_batch_norm": (_vital(largest_buffer=2e4), _vital(largest_buffer=400.0)),
    "lost_in_rounding": (_vital(rounding=0.5), _vital(rounding=0.05)),
    "seen_before": (_familiar((152, 120)), _familiar((149, 120))),
    "unprotected_on_trust": (record(), _made_from(stated="0" * 64)),
    "head_alone": (_heads(0.7), _heads(0.55)),
    "data_overlap": (_overlapping(6), _overlapping(5)),
    "few_seeds": (record(seeds=(0, 1)), record()),
    "short_horizon": (_rehearsing(21), _rehearsing(20)),
    "protected_still_rises": (record(), record(curves={"protected": (0.2, 0.3, 0.6, 0.61)})),
    "scratch_still_rises": (record(curves={"scratch": (0.1, 0.2, 0.4, 0.5)}), record()),
    "rehearsal_unknown": (record(), _rehearsing(20)),
    "cut_down_suite": (_standard(search_trials=0), _standard()),
    "mixed_machines": (_machines(accelerator="another"), _machines(processor="a processor")),
    "unhealthy_weights": (record(flags=("frozen_parameters",)), record()),
}


def test_every_check_has_its_cases() -> None:
    assert set(CASES) == set(CHECKS)
    assert set(CURVES) == {"protected", "unprotected", "scratch"}
    # One in a file that nobody looks through would never be asked, nor one without words.
    files = {one.stem for one in Path(flags.__file__).parent.glob("*.py")}
    looked_through = {subject.__name__.rpartition(".")[2] for subject in flags.all._SUBJECTS}
    assert files - {"__init__", "all", "flag"} == looked_through
    written = {
        name
        for subject in flags.all._SUBJECTS
        for name, function in vars(subject).items()
        if getattr(function, "__module__", "") == subject.__name__ and not name.startswith("_")
        if getattr(function, "__annotations__", {}).get("return") == "Flag | None"
    }
    assert written == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_flag_is_raised_and_says_what_to_do(name: str) -> None:
    flag = CHECKS[name](CASES[name][0], "refused")
    assert flag is not None
    assert all((flag.name, flag.raised_if, flag.explanation, flag.remedy, flag.detail))


@pytest.mark.parametrize("name", TEXTS)
def test_remedies_name_no_key_of_earlier_versions(name: str) -> None:
    assert not [key for key in _FLAT if f"protect.{key}" in TEXTS[name]["remedy"]]


@pytest.mark.parametrize("name", CHECKS)
def test_a_flag_is_not_raised_without_cause(name: str) -> None:
    assert CHECKS[name](CASES[name][1], "refused") is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gradients_at_step_0", {"gradient_norms": {"refused": None}}),
        ("gradients_at_step_0", {"gradient_norms": {"refused": 0.01}}),
        ("gradients_at_step_0", {"gradient_norms": {"refused": 500.0}}),
        ("gradients_at_step_0", {"body_gradient_norms": {"refused": 0.01}}),
        ("gradients_at_step_0", {"body_gradient_norms": {"refused": 0.0}}),
        ("saturated_logits", {"largest_logit": None}),
        ("inflated_weights", {"weight_sizes": {"a": 0.02, "b": 0.2}}),
        ("extreme_batch_norm", {"largest_buffer": None}),
        ("extreme_batch_norm", {"smallest_variance": -0.1}),
        ("extreme_batch_norm", {"smallest_variance": 1e-20}),
    ],
)
def test_what_is_not_finite_or_far_off_is_flagged_too(
    name: str, changes: dict[str, object]
) -> None:
    assert CHECKS[name](_vital(**changes), "refused") is not None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gradients_at_step_0", {"gradient_norms": {"refused": 1e9}}),
        ("gradients_at_step_0", {"gradient_norms": {"refused": 1e-6}}),
        ("inflated_weights", {"weight_sizes": {"a": 1e9, "b": 0.2}}),
    ],
)
def test_what_is_far_off_is_flagged_without_anything_to_compare_with(
    name: str, changes: dict[str, object]
) -> None:
    def alone(held: AuditRecord) -> AuditRecord:
        kept = tuple(s for s in held.subjects if s.name != "unprotected")
        return held.model_copy(update={"subjects": kept})

    assert CHECKS[name](alone(_vital(**changes)), "refused") is not None
    assert CHECKS[name](alone(_vital()), "refused") is None


def test_a_lead_on_training_images_that_a_fresh_network_has_too_says_nothing() -> None:
    check = CHECKS["seen_before"]
    assert check(_familiar((160, 120), (180, 140)), "refused") is None
    assert check(_familiar((160, 120), None), "refused") is not None
    # Chance is in the fresh network's lead, too.
    assert check(_familiar((130, 95), (100, 100)), "refused") is not None
    assert check(_familiar((150, 110), (107, 100)), "refused") is None
    # Sure, but so little that it may be a difference of the splits.
    assert check(_familiar((199, 180)), "refused") is None
    # A fresh network that is behind on them excuses nothing, and accuses nobody.
    assert check(_familiar((120, 120), (80, 140)), "refused") is None
    assert check(_familiar((200, 200)), "refused") is None
    assert check(_familiar((200, 180)), "elsewhere") is None


@pytest.mark.parametrize("name", ["scratch_still_rises", "rehearsal_unknown"])
def test_a_fresh_network_that_has_not_begun_to_learn_has_not_levelled_out(name: str) -> None:
    flag = CHECKS[name](record(curves={"scratch": (0.1, 0.1, 0.1, 0.1)}), "refused")
    assert flag is not None
    assert flag.forbids == {"withstood"}
    settled = CHECKS[name](record(), "refused")
    assert settled is None or not settled.forbids


def test_what_is_measured_at_the_end_alone_may_still_rise() -> None:
    late = record([trial(name, CURVES[name]) for name in ("protected", "scratch")])
    trials = [t.model_copy(update={"curve": (t.curve[0], *t.curve[-1:])}) for t in late.trials]
    held = late.model_copy(update={"trials": tuple(trials)})
    for name in ("protected_still_rises", "scratch_still_rises"):
        flag = CHECKS[name](held, "refused")
        assert flag is not None
        assert "first measured at step 200 of 200" in flag.detail


def test_an_unprotected_model_that_is_another_network_is_flagged() -> None:
    check = CHECKS["another_network"]
    stated = check(_made_from(0.9, stated="9" * 64), "refused")
    assert stated is not None
    assert "999999999999" in stated.detail
    assert check(_made_from(0.9, stated="2" * 64), "refused") is None
    # A statement that fits does not excuse weights that do not.
    assert check(_made_from(0.1, stated="2" * 64), "refused") is not None
    assert check(_made_from(), "refused") is None
    alone = _made_from(0.1, stated="9" * 64)
    kept = tuple(s for s in alone.subjects if s.name != "unprotected")
    assert check(alone.model_copy(update={"subjects": kept}), "refused") is None


def test_attackers_that_persist_are_rehearsed_for_their_whole_life() -> None:
    assert CHECKS["short_horizon"](_rehearsing(20, 160), "refused") is not None
    assert CHECKS["short_horizon"](_rehearsing(2, 20), "refused") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"prefilter": 0.03},
        {"survivors": 1},
        {"seeds": (0, 1, 2)},
        {"search_trials": 3},
        {"evaluations": 11},
        {"batch_size": 64},
    ],
)
def test_a_suite_that_is_cut_down_says_so(changes: dict[str, object]) -> None:
    flag = CHECKS["cut_down_suite"](_standard(**changes), "refused")
    assert flag is not None
    assert flag.forbids == {"withstood"}


def test_smaller_batches_than_the_suites_cut_it_down_and_larger_ones_do_not() -> None:
    for size, less in ((32, True), (64, False), (128, False)):
        spec = AuditSpec(batch_size=size, seeds=(0, 1, 2))
        held = record().model_copy(update={"spec": spec})
        assert (CHECKS["cut_down_suite"](held, "refused") is not None) == less


def test_few_test_images_do_not_excuse_a_loss_on_the_original_task() -> None:
    base = record()

    def measured(before: int, after: int) -> AuditRecord:
        scores = {"unprotected": before, "protected": after}
        subjects = [
            s.model_copy(update={"original": Score(correct=scores[s.name], total=100)})
            if s.name in scores
            else s
            for s in base.subjects
        ]
        return base.model_copy(update={"subjects": tuple(subjects)})

    flag = CHECKS["original_task_suffers"](measured(70, 51), "refused")
    assert flag is not None
    assert not flag.voids
    assert flag.forbids == {"withstood", "slowed"}
    assert CHECKS["original_task_suffers"](measured(70, 70), "refused") is None


def test_the_last_attack_of_a_suite_is_no_rate_beyond_rehearsal() -> None:
    spec = AuditSpec(suite="standard-1")
    last = strategies_of(spec)[-1].model_copy(update={"batch_size": 30})
    beyond = Strategy(optimizer="sgd", learning_rate=1.0)
    for best, flagged in ((last, True), (beyond, False)):
        tried = [
            trial("protected", (0, 0, 0, 0.9 if s == best else 0.5), strategy=s)
            for s in (Strategy(), last, beyond)
        ]
        strategies = (*strategies_of(spec), beyond)
        held = record(tried).model_copy(update={"spec": spec, "strategies": strategies})
        assert (CHECKS["last_trial_is_best"](held, "refused") is not None) == flagged


def test_a_tolerance_that_the_checkpoint_states_does_not_excuse_the_loss() -> None:
    stated = {"spec": {"guard": {"tolerance_points": 50.0}}}
    flag = CHECKS["original_task_suffers"](record(original=0.45, protection=stated), "refused")
    assert flag is not None
    assert flag.voids
    assert "50" in flag.detail
    stricter = {"spec": {"guard": {"tolerance_points": 0.5}}}
    assert CHECKS["original_task_suffers"](record(original=0.89), "refused") is None
    held = record(original=0.89, protection=stricter)
    assert CHECKS["original_task_suffers"](held, "refused") is not None


def test_a_leader_run_after_the_search_does_not_hide_that_its_last_trial_wins() -> None:
    base = _searched(0.7)
    leader = Strategy(learning_rate=0.02)
    later = [
        trial(name, (0, 0, 0, 0.5), strategy=leader, domain="refused")
        for name in ("unprotected", "protected")
    ]
    # On the unprotected model it was proposed, on the protected one it was only repeated.
    held = base.model_copy(update={"trials": (*base.trials, *later)})
    assert CHECKS["last_trial_is_best"](held, "refused") is not None


@pytest.mark.parametrize(
    "way", [{"preparations": (RescaleWeights(),)}, {"lora_rank": 16}, {"clip_norm": 1.0}]
)
def test_the_edge_is_that_of_the_winners_own_way(way: dict[str, Any]) -> None:
    own = [Strategy(learning_rate=rate, **way) for rate in (1e-2, 1e-1)]
    plain = [Strategy(learning_rate=rate) for rate in (1e-3, 1e-2, 1e-1, 1.0)]
    scores = [0.5, 0.9, 0.5, 0.5, 0.5, 0.5]
    trials = [
        trial("protected", (0, 0, 0, score), strategy=strategy)
        for strategy, score in zip((*own, *plain), scores, strict=True)
    ]
    assert CHECKS["winner_on_the_edge"](record(trials), "refused") is not None


def test_networks_without_batch_norm_have_no_extreme_statistics() -> None:
    plain = SOUND.model_copy(update={"largest_buffer": None, "smallest_variance": None})
    base = record()
    subjects = [s.model_copy(update={"vitals": plain}) for s in base.subjects]
    held = base.model_copy(update={"subjects": tuple(subjects)})
    assert CHECKS["extreme_batch_norm"](held, "refused") is None


def test_a_held_out_domain_that_shares_images_with_a_restricted_one_is_flagged() -> None:
    base = record()
    far = base.restricted[0].model_copy(update={"name": "far", "role": "held_out"})
    shared = Overlap(first="far/train", second="refused/train", count=100, exact=2, near=0)
    held = base.model_copy(update={"held_out": (far,), "overlaps": (shared,)})
    assert CHECKS["data_overlap"](held, "far") is not None
    assert CHECKS["data_overlap"](held, "refused") is None


# The protocol's red flags, each with the check that is for it and a record that raises it.
PROTOCOL: dict[str, tuple[str, AuditRecord]] = {
    "winner on the edge of the search space": ("winner_on_the_edge", _rates(1e-3)),
    "best trial is the last one": ("last_trial_is_best", _searched(0.7)),
    "best step is the last step": ("last_step_is_best", record()),
    "seeds disagree": ("seeds_disagree", CASES["seeds_disagree"][0]),
    "most trials diverged": ("most_diverged", CASES["most_diverged"][0]),
    "protected model near chance": ("near_chance_on_original", record(original=0.1)),
    "zero gradients at step 0": ("gradients_at_step_0", _vital(gradient_norms={"refused": 0.0})),
    "huge gradients at step 0": ("gradients_at_step_0", _vital(gradient_norms={"refused": 1e4})),
    "logits beyond 1e3": ("saturated_logits", _vital(largest_logit=1001.0)),
    "non-finite weights": ("unhealthy_weights", record(flags=("non_finite_weights",))),
    "extreme weights": ("inflated_weights", _vital(weight_sizes={"a": 1e6, "b": 0.2})),
    "non-finite BatchNorm buffers": ("extreme_batch_norm", _vital(largest_buffer=None)),
    "extreme BatchNorm buffers": ("extreme_batch_norm", _vital(largest_buffer=1e7)),
    "weight norms inflated": ("inflated_weights", _vital(weight_sizes={"a": 0.5, "b": 0.2})),
    "frozen parameters": ("unhealthy_weights", record(flags=("frozen_parameters",))),
    "re-initialising the head alone breaks it": ("head_alone", _heads(0.9)),
    "another optimizer family": ("other_optimizer_far_better", _optimizers(0.8)),
    "restricted and original overlap": (
        "data_overlap",
        record().model_copy(
            update={
                "overlaps": (
                    Overlap(first="refused/train", second="kept/train", count=99, exact=2, near=0),
                )
            }
        ),
    ),
    "train and test overlap": ("data_overlap", _overlapping(60)),
    "fewer than three seeds": ("few_seeds", record(seeds=(0,))),
}


@pytest.mark.parametrize("name", PROTOCOL)
def test_every_flag_of_the_protocol_is_raised_by_its_check(name: str) -> None:
    check, held = PROTOCOL[name]
    assert CHECKS[check](held, "refused") is not None
    assert CHECKS[check](CASES[check][1], "refused") is None


def test_a_search_that_had_settled_is_not_flagged() -> None:
    assert CHECKS["last_trial_is_best"](_searched(0.55), "refused") is None


def test_seeds_are_compared_on_the_attacks_that_all_of_them_ran() -> None:
    alone = trial("protected", (0.9,), seed=0, strategy=Strategy(optimizer="adam"))
    shared = [trial("protected", (0.5,), seed=seed) for seed in (0, 1, 2)]
    assert CHECKS["seeds_disagree"](record([alone, *shared]), "refused") is None


def test_a_search_that_proposes_a_little_less_to_one_subject_is_no_unequal_search() -> None:
    attacks = [Strategy(learning_rate=0.001 * (n + 1)) for n in range(40)]
    names: tuple[Subject, ...] = ("protected", "unprotected", "scratch")
    trials = [trial(name, CURVES[name], strategy=attack) for name in names for attack in attacks]
    # Of forty attacks on the protected model two are missing, then three.
    assert unequal_search(record(trials[2:]), "refused") is None
    assert unequal_search(record(trials[3:]), "refused") is not None


def test_guessing_takes_the_largest_class() -> None:
    def flat(largest: float | None) -> AuditRecord:
        held = record(curves={"scratch": (0.7,) * 4, "unprotected": (0.8, 0.9, 0.95, 0.98)})
        domain = held.restricted[0].model_copy(update={"classes": 2, "largest": largest})
        trials = [
            t.model_copy(update={"test": Score(correct=700, total=1000)})
            if t.subject == "scratch"
            else t
            for t in held.trials
        ]
        return held.model_copy(update={"restricted": (domain,), "trials": tuple(trials)})

    check = CHECKS["scratch_still_rises"]
    # Half of two equal classes is beaten; the majority of unequal ones is all that was learnt.
    assert check(flat(None), "refused") is None
    flag = check(flat(0.7), "refused")
    assert flag is not None
    assert "guessing 70.0 %" in flag.detail
    original = record(original=0.72)
    kept = original.original.model_copy(update={"classes": 2, "largest": 0.7})
    assert CHECKS["near_chance_on_original"](original, "refused") is None
    unequal = original.model_copy(update={"original": kept})
    assert CHECKS["near_chance_on_original"](unequal, "refused") is not None
