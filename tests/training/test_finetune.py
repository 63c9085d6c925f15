"""The fine-tuning loop against a plain PyTorch loop, and what must not depend on it."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from builders import original, restricted, setting_of, trained_model
from sophon._specs import FreshHead, Heal, Strategy
from sophon._tasks import Classification
from sophon._training.evaluate import image_scores
from sophon._training.loop import (
    OPTIMIZERS,
    SCHEDULES,
    FineTuning,
    attacker_copy,
    optimizer_tensors,
    restore_optimizer,
)
from sophon._training.setting import Feed, Setting, make_setting


def _setting() -> Setting:
    return setting_of(trained_model())


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


def test_what_was_frozen_is_trained_all_the_same() -> None:
    setting = _setting()
    model = setting.place(trained_model()).requires_grad_(False)
    strategy = Strategy(learning_rate=0.1, batch_size=16, steps=2)
    for _ in FineTuning(model, strategy, setting, _feed(setting), stream=(0, ())).run(2):
        pass
    before = dict(trained_model().named_parameters())
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("training", [False, True])
def test_scoring_evaluates_every_image_and_leaves_the_model_as_it_was(training: bool) -> None:
    setting, domain = _setting(), restricted()
    model = setting.place(trained_model()).train(training)
    before = copy.deepcopy(model.state_dict())
    scores = image_scores(model, setting, domain, domain.test, batch_size=50)
    assert all(part.training is training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mean, std = setting.normalisation(domain)
    images = (domain.test.pixels / 255 - sum(mean) / len(mean)) / (sum(std) / len(std))
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == domain.test.labels
    assert torch.equal(scores, right.float()[None])


def test_healing_meets_other_batches_with_another_seed_or_batch_size() -> None:
    setting = _setting()
    found = []
    for seed, size in ((0, 16), (0, 16), (1, 16), (0, 8)):
        strategy = Strategy(preparations=(Heal(share=0.5),), batch_size=size, steps=8)
        model = setting.place(trained_model())
        stream = (seed, ("attack",))
        made = attacker_copy(
            model, strategy, setting, classes=5, feed=_feed(setting), stream=stream
        )
        assert made.spent == 4
        found.append(model.get_parameter("stage1.0.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


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


# The factors at a step of 20, five of them for warming up: written out again, for the loop's own
# cannot vouch for themselves.
FACTORS = {
    "constant": lambda step, steps, warmup: 1.0,
    "warmup": lambda step, steps, warmup: 1.0 if step >= warmup else (step + 1) / warmup,
    "cosine": lambda step, steps, warmup: math.cos(math.pi * step / steps / 2) ** 2,
    "warmup_cosine": lambda step, steps, warmup: (
        FACTORS["warmup"](step, steps, warmup) * FACTORS["cosine"](step, steps, warmup)
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_what_they_are_called(name: str) -> None:
    strategy = Strategy(schedule=name, steps=20, warmup_steps=5)
    tenth = Strategy(schedule=name, steps=40)
    for step in range(20):
        expected = FACTORS[name](step, 20, 5)
        assert SCHEDULES[name](step, strategy) == pytest.approx(expected, abs=1e-12)
        assert SCHEDULES[name](step, tenth) == pytest.approx(FACTORS[name](step, 40, 4), abs=1e-12)


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    setting = _setting()
    domain = restricted()
    feed = setting.feed(domain, domain.train, batch_size=19, stream=(3, ("test",)))
    a_pass = len(domain.train) // 19

    def order(feed: Feed, epoch: int) -> list[bytes]:
        steps = range(epoch * a_pass, (epoch + 1) * a_pass)
        return [image.numpy().tobytes() for step in steps for image in feed.batch(step)[0]]

    epochs = [order(feed, epoch) for epoch in range(3)]
    assert a_pass * 19 == len(domain.train)
    assert len(set(epochs[0])) > 100
    for number, one in enumerate(epochs):
        assert sorted(one) == sorted(epochs[0])
        assert all(one != other for other in epochs[:number])
    # A batch depends on its step alone, not on what was asked for before.
    assert order(_feed(setting, 19), 1) == order(feed, 1) == epochs[1]
    others = [(4, ("test",)), (3, ("tests",))]
    for stream in others:
        assert order(setting.feed(domain, domain.train, batch_size=19, stream=stream), 0) not in (
            epochs
        )


def test_the_global_generator_is_left_alone() -> None:
    setting = _setting()
    strategy = Strategy(batch_size=16, steps=2)
    model = setting.place(trained_model())
    state = torch.get_rng_state()
    tuning = FineTuning(model, strategy, setting, _feed(setting), stream=(0, ()))
    assert len(list(tuning.run(2))) == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "cosine"},
        {"schedule": "warmup_cosine", "warmup_steps": 3},
        {"clip_norm": 0.05},
        {"weight_decay": 0.5},
        {"momentum": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_acts_as_in_a_plain_loop(changes: dict[str, object]) -> None:
    setting = _setting()
    feed = _feed(setting)
    strategy = Strategy.model_validate(
        {"learning_rate": 0.02, "batch_size": 16, "steps": 6, **changes}
    )
    model = setting.place(trained_model())
    plain, untouched = copy.deepcopy(model).train(), copy.deepcopy(model)
    for _ in FineTuning(model, strategy, setting, feed, stream=(3, ())).run(6):
        pass
    base = Strategy(learning_rate=0.02, batch_size=16, steps=6)
    for _ in FineTuning(untouched, base, setting, feed, stream=(3, ())).run(6):
        pass
    optimizer = torch.optim.SGD(
        plain.parameters(),
        0.02,
        momentum=strategy.momentum,
        weight_decay=strategy.weight_decay,
        fused=False,
    )
    for step in range(6):
        images, labels = feed.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        if strategy.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), strategy.clip_norm)
        optimizer.param_groups[0]["lr"] = 0.02 * FACTORS[strategy.schedule](step, 6, 3)
        optimizer.step()
    plainly, usual = plain.state_dict(), dict(untouched.named_parameters())
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), plainly[key], rtol=2e-4, atol=2e-6)
        assert not torch.allclose(value, usual[key], rtol=1e-4, atol=1e-6), key


def test_a_strategy_may_have_its_own_precision() -> None:
    setting = _setting()
    dtypes = []
    for precision in ("auto", "bf16"):
        strategy = Strategy(batch_size=16, steps=1, precision=precision)
        model = setting.place(trained_model())
        tuning = FineTuning(model, strategy, setting, _feed(setting), stream=(0, ()))
        model.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
        assert len(list(tuning.run(1))) == 1
    assert dtypes == [torch.float32, torch.bfloat16]


def test_domains_with_normalisations_of_their_own_keep_them() -> None:
    kept = dataclasses.replace(original(), mean=(0.1,), std=(0.2,))
    refused = dataclasses.replace(restricted(), mean=(0.7,), std=(0.4,))
    setting = make_setting(
        trained_model(),
        task=Classification(),
        original=kept,
        restricted=(refused,),
        head=None,
        precision="fp32",
        device="cpu",
    )
    for domain, mean, std in ((kept, 0.1, 0.2), (refused, 0.7, 0.4)):
        images, _ = next(setting.feed(domain, domain.train, batch_size=9).in_order())
        expected = (domain.train.pixels[:9].float() / 255 - mean) / std
        torch.testing.assert_close(images, expected)
