"""What makes two trials, or two runs, the same: every part that determines the result."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from builders import digits, original, quick_spec, restricted, setting_of, trained_model
from sophon._attacks.suites import SUITES, suite_fingerprint
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import CheckpointError
from sophon._data import Domain
from sophon._models import network_identity, weights_sha256
from sophon._models.networks import NETWORKS
from sophon._protection.protection import Protection
from sophon._specs import Heal, Strategy

PINS = json.loads((Path(__file__).parents[1] / "house/pins.json").read_text())
BENCH = Bench(setting_of(trained_model()), 4)
JOB = Job("protected", restricted().name, Strategy(preparations=(Heal(),)), 0)


def _start(model: nn.Module) -> Start:
    return Start(model, network_identity(model), weights_sha256(model))


def _setting(**changes: Any) -> Bench:
    return dataclasses.replace(BENCH, setting=dataclasses.replace(BENCH.setting, **changes))


def _normalised(domain: Domain) -> Domain:
    return dataclasses.replace(domain, mean=(0.4,), std=(0.3,))


class _OtherTask(type(BENCH.setting.task)):  # type: ignore[misc]
    name = "another"


CHANGES: dict[str, Callable[[], str]] = {
    "subject": lambda: BENCH.key(JOB._replace(subject="scratch"), _start(trained_model())),
    "seed": lambda: BENCH.key(JOB._replace(seed=1), _start(trained_model())),
    "stop": lambda: BENCH.key(JOB._replace(stop=3), _start(trained_model())),
    "strategy": lambda: BENCH.key(JOB._replace(strategy=Strategy()), _start(trained_model())),
    "domain": lambda: _setting(restricted=(digits(5, 8),)).key(
        JOB._replace(domain=digits(5, 8).name), _start(trained_model())
    ),
    "evaluations": lambda: dataclasses.replace(BENCH, evaluations=5).key(
        JOB, _start(trained_model())
    ),
    "precision": lambda: _setting(precision="bf16").key(JOB, _start(trained_model())),
    "head": lambda: _setting(head="stage1.0").key(JOB, _start(trained_model())),
    "task": lambda: _setting(task=_OtherTask()).key(JOB, _start(trained_model())),
    "original": lambda: _setting(original=digits(0, 4)).key(JOB, _start(trained_model())),
    "normalisation": lambda: _setting(original=_normalised(original())).key(
        JOB._replace(strategy=Strategy()), _start(trained_model())
    ),
    "weights": lambda: BENCH.key(JOB, _start(_other_weights())),
    "layers": lambda: BENCH.key(JOB, _start(_sigmoid())),
}


def _other_weights() -> nn.Module:
    model = trained_model()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    return model


def _sigmoid() -> nn.Module:
    model = trained_model()
    model.stage1[2] = nn.Sigmoid()
    return model


@pytest.mark.parametrize("part", list(CHANGES))
def test_whatever_determines_a_trial_is_in_its_key(part: str) -> None:
    plain = Strategy() if part == "normalisation" else JOB.strategy
    usual = BENCH.key(JOB._replace(strategy=plain), _start(trained_model()))
    assert CHANGES[part]() != usual
    assert BENCH.key(JOB._replace(strategy=plain), _start(trained_model())) == usual


def test_layers_that_have_no_weights_tell_networks_apart() -> None:
    def made(*layers: nn.Module) -> str:
        return network_identity(nn.Sequential(nn.Linear(2, 2), *layers))

    names = [made(x) for x in (nn.ReLU(), nn.Sigmoid(), nn.Dropout(0.0), nn.Dropout(0.9))]
    assert len(set(names)) == 4
    assert made(nn.ReLU()) == names[0]
    hooked = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    hooked.register_full_backward_pre_hook(lambda *_: None)
    assert network_identity(hooked) != names[0]


def test_rates_that_a_layer_does_not_print_tell_networks_apart() -> None:
    networks = [trained_model() for _ in range(3)]
    for network, rate in zip(networks, (0, 0.0, 0.5), strict=True):
        network.stage1.drop_rate = rate
    names = [network_identity(network) for network in networks]
    assert names[0] == names[1] != names[2]
    # Networks without such a rate are known by the name they had: stored trials have it.
    assert network_identity(trained_model()).endswith("+39c2b2ba11afafd8")


def test_the_number_of_classes_is_part_of_a_domain() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    made = [
        Domain.from_arrays("x", images, np.arange(60) % 3, classes=names)
        for names in (["a", "b", "c"], ["a", "b", "c", "d"])
    ]
    assert [domain.class_count for domain in made] == [3, 4]
    assert made[0].fingerprint() != made[1].fingerprint()
    renamed = Domain.from_arrays("y", images, np.arange(60) % 3, classes=["d", "e", "f"])
    assert renamed.fingerprint() == made[0].fingerprint()


RUNS: dict[str, dict[str, Any]] = {
    "spec": {"spec": quick_spec(rounds=5)},
    "model": {"model": _other_weights()},
    "network": {"model": _sigmoid()},
    "domains": {"restricted": digits(5, 8)},
}


@pytest.mark.parametrize("part", list(RUNS))
def test_whatever_determines_a_run_is_in_its_identity(part: str, tmp_path: Path) -> None:
    def open_run(**changes: Any) -> Protection:
        held = {"original": original(), "restricted": restricted(), "spec": quick_spec(), **changes}
        model = held.pop("model", trained_model())
        return Protection(copy.deepcopy(model), out=tmp_path, **held)

    first = open_run()
    assert set(first.identity) >= {"engine", "head", "precision", "task"}
    del first
    assert open_run().done == 0
    with pytest.raises(CheckpointError, match=f"another .*{part}"):
        open_run(**RUNS[part])


@pytest.mark.parametrize("part", ["engine", "head", "precision", "task"])
def test_a_run_of_another_kind_is_not_taken_up(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Any] = {
        "original": original(),
        "restricted": restricted(),
        "spec": quick_spec(),
        "out": tmp_path,
    }
    run = Protection(trained_model(), **held)
    del run
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace(f'"{part}": "', f'"{part}": "other '))
    with pytest.raises(CheckpointError, match=f"another {part}"):
        Protection(trained_model(), **held)


# --- What stored trials are known by ------------------------------------------------------------


@pytest.mark.parametrize("name", list(SUITES))
def test_released_suites_and_their_attacks_have_the_fingerprints_that_they_had(name: str) -> None:
    assert suite_fingerprint(name) == PINS["suites"][name]
    held = [strategy.fingerprint() for strategy in SUITES[name].strategies]
    assert held == PINS["strategies"][name]


def test_own_networks_have_the_identities_that_they_had() -> None:
    found = {name: network_identity(make()) for name, make in NETWORKS.items()}
    assert found == PINS["networks"]


def test_trials_have_the_keys_that_they_had() -> None:
    start = Start(nn.Identity(), "sophon._networks.SmallConvNet+0123", "ab" * 32)
    found = {
        strategy.label(): BENCH.key(Job("protected", restricted().name, strategy, 0), start)
        for strategy in SUITES["standard-1"].strategies[::9]
    }
    assert found == PINS["keys"]


class _Later(Strategy):
    """A strategy of a later version, with a field more."""

    patience: int = 3


def test_a_later_field_keys_nothing_anew_until_it_is_used() -> None:
    usual = {"optimizer": "adam", "preparations": (Heal(),)}
    plain = Strategy(**usual)
    assert _Later(**usual).fingerprint() == plain.fingerprint()
    assert _Later(patience=4, **usual).fingerprint() != plain.fingerprint()
    later = JOB._replace(strategy=_Later(patience=4, preparations=(Heal(),)))
    assert BENCH.key(later, _start(trained_model())) != BENCH.key(JOB, _start(trained_model()))
