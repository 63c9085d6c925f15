"""Each red flag: a record that raises it and one that does not."""

from __future__ import annotations

import pytest

from records import CURVES, crashed, diverged, record, trial
from sophon._attacks import strategies_of
from sophon._checks import CHECKS
from sophon._records import AuditRecord
from sophon._specs import AuditSpec, Strategy


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
    spec = {"rehearsal": {"fixed": {"optimizer": "sgd"}}}
    return record(trials, protection={"spec": spec})


def _rehearsing(steps: int) -> AuditRecord:
    return record(protection={"spec": {"rehearsal": {"steps": steps}}})


LAST, FIRST = strategies_of(AuditSpec())[-1], strategies_of(AuditSpec())[0]
CASES: dict[str, tuple[AuditRecord, AuditRecord]] = {
    "winner_on_the_edge": (_rates(1e-1), _rates(1e-2)),
    "last_trial_is_best": (
        record([trial("protected", (0.5,), strategy=LAST)]),
        record([trial("protected", (0.5,), strategy=FIRST)]),
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
    "original_task_suffers": (record(original=0.85), record(original=0.89)),
    "other_optimizer_far_better": (_optimizers(0.9), _optimizers(0.55)),
    "few_seeds": (record(seeds=(0, 1)), record()),
    "short_horizon": (_rehearsing(21), _rehearsing(20)),
    "unhealthy_weights": (record(flags=("frozen_parameters",)), record()),
}


def test_every_check_has_its_cases() -> None:
    assert set(CASES) == set(CHECKS)
    assert set(CURVES) == {"protected", "unprotected", "scratch"}


@pytest.mark.parametrize("name", CHECKS)
def test_a_flag_is_raised_and_says_what_to_do(name: str) -> None:
    flag = CHECKS[name](CASES[name][0], "refused")
    assert flag is not None
    assert all((flag.name, flag.raised_if, flag.explanation, flag.remedy, flag.detail))


@pytest.mark.parametrize("name", CHECKS)
def test_a_flag_is_not_raised_without_cause(name: str) -> None:
    assert CHECKS[name](CASES[name][1], "refused") is None
