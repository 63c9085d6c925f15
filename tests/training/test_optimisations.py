"""Faster is not different: with every optimisation switched off the same is computed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from builders import Double, original, quick_spec, rehearsing, restricted, setting_of, trained_model
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import CheckpointError
from sophon._base.seeding import seeded
from sophon._models import choose_precision
from sophon._protection.protection import Protection
from sophon._specs import Strategy
from sophon._training.loop import OPTIMIZERS
from sophon._training.setting import Feed


@pytest.fixture(params=["1", "0"], ids=["plain", "not plain"])
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("SOPHON_PLAIN", request.param)
    return request.param == "1"


def test_the_switch_is_one_place_for_all(switch: bool) -> None:
    model = trained_model()
    parameters = list(model.parameters())
    assert setting_of(model).channels_last is not switch
    for name, made in OPTIMIZERS.items():
        defaults = made(parameters, Strategy(optimizer=name)).defaults
        assert (defaults["foreach"] is False) is switch
        without = name in ("adagrad", "adadelta")
        assert (defaults.get("fused") is True) is (not switch and not without)
    if switch:
        assert choose_precision("auto", torch.device("cpu"), model, [(1, 8, 8)]) == "fp32"
    assert choose_precision("bf16", torch.device("cpu"), model, [(1, 8, 8)]) == "bf16"


def test_a_protection_is_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(value: str) -> dict[str, Tensor]:
        monkeypatch.setenv("SOPHON_PLAIN", value)
        run = Protection(
            Double(trained_model()),
            original=original(),
            restricted=restricted(),
            spec=quick_spec(rounds=3),
        )
        for _ in run:
            pass
        return run.model.state_dict()

    expected = weights("1")
    for name, value in weights("0").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adagrad"])
def test_an_attack_is_the_same_to_rounding(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Double(trained_model())
    strategy = Strategy(optimizer=optimizer, learning_rate=1e-2, batch_size=16, steps=12)
    found = {}
    for value in ("0", "1"):
        monkeypatch.setenv("SOPHON_PLAIN", value)
        setting = setting_of(model)
        bench = Bench(setting, 4)
        start = Start(setting.place(copy.deepcopy(model)), "", "")
        job = Job("protected", restricted().name, strategy, 0)
        left = bench.attacked(job, start, 12).state_dict()
        found[value] = left, bench.run(job, start), bench.key(job, start)
    for name, tensor in found["0"][0].items():
        torch.testing.assert_close(tensor, found["1"][0][name], rtol=1e-6, atol=1e-9)
    fast, slow = (found[value][1] for value in ("0", "1"))
    scores = [[point.validation for point in trial.curve] for trial in (fast, slow)]
    assert scores[0] == scores[1]
    assert (fast.best_step, fast.test) == (slow.best_step, slow.test)
    # Their last bits may differ, so neither stands for the other in a store.
    assert found["0"][2] != found["1"][2]


def test_gradients_added_together_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the sums change: optimizer and layout stay the fast ones."""
    model = trained_model()
    setting = setting_of(model)
    sums = []
    for value in (False, True):
        monkeypatch.setattr("sophon._protection.terms.rehearsal.plain", lambda value=value: value)
        pool = rehearsing(quick_spec(), setting, model)
        sums.append(pool.suppress(model)[0].gradients)
    for name, value in sums[0].items():
        assert torch.equal(value, sums[1][name])
        assert value.abs().sum() > 0


def test_what_is_kept_between_batches_changes_no_bit() -> None:
    setting = setting_of(trained_model())

    def feed() -> Feed:
        domain = restricted()
        return setting.feed(domain, domain.train, batch_size=100, augmentation="crop")

    kept = feed()
    for step in (0, 1, 9, 1):
        for fast, anew in zip(kept.batch(step), feed().batch(step), strict=True):
            assert torch.equal(fast, anew)


def test_the_shorter_way_to_a_seed_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for alone in (True, False):
        monkeypatch.setattr("sophon._base.seeding._processor_alone", lambda alone=alone: alone)
        with seeded(3, "dropout", 7):
            draws.append(torch.rand(5))
    assert torch.equal(*draws)


def test_a_plain_run_is_not_taken_up_without_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Protection:
        return Protection(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec=quick_spec(),
            out=tmp_path,
        )

    monkeypatch.setenv("SOPHON_PLAIN", "1")
    next(iter(run()))
    monkeypatch.delenv("SOPHON_PLAIN")
    with pytest.raises(CheckpointError, match="plain"):
        run()
