"""The fine-tuning loop against a plain PyTorch loop, and what must not depend on it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from builders import original, restricted, trained_model
from sophon._finetune import (
    OPTIMIZERS,
    SCHEDULES,
    FineTuning,
    attacker_copy,
    optimizer_tensors,
    restore_optimizer,
)
from sophon._setting import Feed, Setting, make_setting
from sophon._specs import FreshHead, Strategy
from sophon._tasks import Classification


def _setting() -> Setting:
    return make_setting(
        trained_model(),
        task=Classification(),
        original=original(),
        restricted=(restricted(),),
        head=None,
        precision="fp32",
        device="cpu",
    )


def _feed(setting: Setting, batch_size: int = 16) -> Feed:
    domain = restricted()
    return setting.feed(domain, domain.train, batch_size=batch_size, stream=(3, ("test",)))


PLAIN = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, fused=False),
    "sgd_momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, fused=False),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, fused=False),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adam": lambda p, lr: torch.optim.Adam(p, lr, fused=False),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0, fused=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loop_equals_a_plain_loop(name: str) -> None:
    setting = _setting()
    feed = _feed(setting)
    model = setting.place(trained_model())
    plain = copy.deepcopy(model).train()
    strategy = Strategy(optimizer=name, learning_rate=1e-3, batch_size=16, steps=5)
    for _ in FineTuning(model, strategy, setting, feed, stream=(3, ("test",))).run(5):
        pass
    optimizer = PLAIN[name](list(plain.parameters()), 1e-3)
    for step in range(5):
        images, labels = feed.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-4, atol=2e-6)


def test_a_zero_rate_changes_no_weight() -> None:
    setting = _setting()
    model = setting.place(trained_model())
    strategy = Strategy(optimizer="sgd", learning_rate=1e-30, batch_size=16, steps=3)
    for _ in FineTuning(model, strategy, setting, _feed(setting), stream=(0, ())).run(3):
        pass
    before = dict(trained_model().named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_head_only_changes_only_the_head() -> None:
    setting = _setting()
    model = setting.place(trained_model())
    strategy = Strategy(
        preparations=(FreshHead(),), scope="head", learning_rate=0.1, batch_size=16, steps=3
    )
    feed = _feed(setting)
    attacker_copy(model, strategy, setting, classes=5, feed=feed, stream=(0, ()))
    for _ in FineTuning(model, strategy, setting, feed, stream=(0, ())).run(3):
        pass
    before = dict(trained_model().named_parameters())
    changed = {n for n, value in model.named_parameters() if not torch.equal(before[n], value)}
    assert changed == {n for n in before if n.startswith(setting.head + ".")}


def test_stopping_between_steps_changes_nothing() -> None:
    setting = _setting()
    strategy = Strategy(optimizer="adam", learning_rate=1e-3, batch_size=16, steps=6)
    whole = FineTuning(
        setting.place(trained_model()), strategy, setting, _feed(setting), stream=(1, ())
    )
    for _ in whole.run(6):
        pass
    first = FineTuning(
        setting.place(trained_model()), strategy, setting, _feed(setting), stream=(1, ())
    )
    for _ in first.run(4):
        pass
    tensors, plain = optimizer_tensors(first.optimizer)
    held = {name: value.clone() for name, value in tensors.items()}
    second = FineTuning(
        copy.deepcopy(first.model), strategy, setting, _feed(setting), stream=(1, ())
    )
    restore_optimizer(second.optimizer, held, plain)
    second.taken = 4
    for _ in second.run(2):
        pass
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key


def test_query_images_are_not_trained_on() -> None:
    setting = _setting()
    strategy = Strategy(batch_size=16, steps=40)
    feed = _feed(setting, batch_size=24)
    tuning = FineTuning(setting.place(trained_model()), strategy, setting, feed, stream=(0, ()))
    for step in tuning.run(40):
        support = feed.batch(step.taken - 1)[0][:16].flatten(1)
        assert tuning.query is not None
        query = tuning.query[0].flatten(1)
        assert len(query) == 8
        assert float(torch.cdist(query, support).min()) > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_in_range(name: str) -> None:
    strategy = Strategy(schedule=name, steps=20, warmup_steps=5)
    factors = [SCHEDULES[name](step, strategy) for step in range(20)]
    assert all(0 < factor <= 1 for factor in factors)
    if name.startswith("warmup"):
        assert factors[0] < factors[4]
    if name.endswith("cosine"):
        assert factors[-1] < 0.05


def test_the_global_generator_is_left_alone() -> None:
    setting = _setting()
    strategy = Strategy(batch_size=16, steps=2)
    model = setting.place(trained_model())
    state = torch.get_rng_state()
    tuning = FineTuning(model, strategy, setting, _feed(setting), stream=(0, ()))
    assert len(list(tuning.run(2))) == 2
    assert torch.equal(torch.get_rng_state(), state)
