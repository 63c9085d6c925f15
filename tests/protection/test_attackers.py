"""What attackers may do beyond plain fine-tuning: adapters, few images, healing, distilling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from builders import original, quick_spec, rehearsing, restricted, setting_of, trained_model
from sophon._auditing.audit import Audit
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._data import Domain
from sophon._models import (
    Bare,
    add_lora,
    bare_parameters,
    foreign_hooks,
    fresh_copy,
    merged_lora,
    network_identity,
    reinitialise,
    resolve_model,
    weights_sha256,
)
from sophon._models.networks import small_caformer
from sophon._protection.spec import ProtectSpec
from sophon._protection.start import starting_weights
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import AuditSpec, Distil, FreshHead, Heal, ModelSpec, ResetLastBlocks, Strategy
from sophon._tasks import Classification, Distillation
from sophon._training.evaluate import evaluate
from sophon._training.loop import FineTuning, attacker_copy, attacker_images, image_count
from sophon._training.setting import Setting

STREAM = (0, ("attack",))


def _setting(model: nn.Module | None = None, domain: Domain | None = None) -> Setting:
    return setting_of(model or trained_model(), restricted=(domain or restricted(),))


def _attack(model: nn.Module, strategy: Strategy, steps: int | None = None) -> FineTuning:
    """Attack `model` in place on the restricted digits; return the finished fine-tuning."""
    setting, domain = _setting(copy.deepcopy(model)), restricted()
    images = attacker_images(domain, strategy.data_fraction, STREAM)
    feed = setting.feed(domain, images, batch_size=strategy.batch_size, stream=STREAM)
    setting.place(model)
    prepared = attacker_copy(
        model, strategy, setting, classes=domain.class_count, feed=feed, stream=STREAM
    )
    tuning = FineTuning(model, strategy, setting, feed, stream=STREAM, taken=prepared.spent)
    for _ in tuning.run((steps or strategy.steps) - prepared.spent):
        pass
    return tuning


def _accuracy(tuning: FineTuning, model: nn.Module | None = None) -> float:
    domain = restricted()
    return evaluate(model or tuning.model, tuning.setting, domain, domain.validation).value


# --- Networks with parameters that no reset reaches ---------------------------------------------


def _with_bare_parameters(name: str) -> tuple[nn.Module, Callable[[], nn.Module], str]:
    if name == "small_caformer":
        made: Callable[[], nn.Module] = lambda: small_caformer(5, 3)  # noqa: E731
        return made(), made, "head.fc.fc2"
    pytest.importorskip("timm")
    spec = ModelSpec(name=name, classes=5, arguments=_TINY[name])
    model, fresh = resolve_model(spec, base=Path())
    return model, fresh, "head.fc" if "convnext" in name else "head"


_TINY: dict[str, dict[str, Any]] = {
    "timm:convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "timm:vit_tiny_patch16_224": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
    },
}


@pytest.mark.parametrize("name", ["small_caformer", *_TINY])
def test_standard_1_attacks_networks_with_parameters_that_no_reset_reaches(name: str) -> None:
    model, fresh, head = _with_bare_parameters(name)
    run = Audit(
        model,
        original=_coloured(0, 5),
        restricted=_coloured(5, 10),
        scratch=fresh,
        head=head,
        spec=AuditSpec(suite="standard-1", steps=4, evaluations=2, precision="fp32"),
    )
    assert run.bench.bare.keys() == {0, 1, 2, 3, 4, 5}
    assert all(held.values for held in run.bench.bare.values())
    for preparation in (Distil(share=0.5), ResetLastBlocks(blocks=1)):
        attack = Strategy(preparations=(preparation, FreshHead()), batch_size=16, steps=4)
        job = Job("protected", run.restricted[0].name, attack, 1)
        trial = run.bench.run(job, run.subjects.start("protected", 1))
        assert trial.outcome.kind == "completed", trial.outcome
        assert trial.key != replace(run.bench, bare={}).key(job, run.subjects.start("protected", 1))
    plain = Job("protected", run.restricted[0].name, Strategy(preparations=(FreshHead(),)), 1)
    keys = {
        held.key(plain, run.subjects.start("protected", 1)) for held in (run.bench, _no_bare(run))
    }
    assert len(keys) == 1


def _no_bare(run: Audit) -> Bench:
    return replace(run.bench, bare={})


def _coloured(low: int, high: int) -> Domain:
    """Return digits in three channels of 32x32."""
    raw = load_digits()
    keep = (raw.target >= low) & (raw.target < high)
    images = np.round(raw.images[keep] * (255 / 16)).astype(np.uint8)
    large = images.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    return Domain.from_arrays(f"digits-{low}", large, (raw.target[keep] - low).astype(np.int64))


def test_fresh_values_are_taken_only_where_no_reset_reaches() -> None:
    torch.manual_seed(0)
    real, fresh = small_caformer(5, 3), small_caformer(5, 3)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(7.0)
    bare = bare_parameters(fresh)
    assert 0 < len(bare.values) < len(list(fresh.parameters()))
    reinitialise(real, seed=3, names=("a",), bare=bare)
    for name, parameter in real.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)) == (
            name in bare.values or not parameter.any() or bool((parameter == 1).all())
        ), name
    plain, with_bare = trained_model(), trained_model()
    assert not bare_parameters(plain).values
    reinitialise(plain, seed=3, names=("a",))
    reinitialise(with_bare, seed=3, names=("a",), bare=Bare({"head.weight": torch.zeros(5, 5)}))
    assert weights_sha256(plain) == weights_sha256(with_bare)


@pytest.mark.parametrize(
    ("ask", "remedy"),
    [
        (lambda model: fresh_copy(model, None, seed=0, names=()), "fresh models as scratch"),
        (lambda model: starting_weights(model, ProtectSpec(start="fresh")), "start = 'given'"),
        (lambda model: reinitialise(model, seed=0, names=()), "leave out the preparations"),
    ],
)
def test_what_no_reset_reaches_is_refused_with_what_the_asker_can_do(
    ask: Callable[[nn.Module], object], remedy: str
) -> None:
    with pytest.raises(UnsupportedModelError, match="give its layer a reset_parameters") as caught:
        ask(small_caformer(5, 3))
    assert remedy in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_student_keeps_no_hook_of_the_publishers() -> None:
    def sabotage(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if module.training else output

    model = trained_model()
    plain = Start(model, network_identity(model), weights_sha256(model))
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(sabotage)
    bench = Bench(_setting(), 2)
    keys = []
    for preparations in ((Distil(share=0.5),), ()):
        attack = Strategy(preparations=preparations, batch_size=16, steps=4)
        job = Job("protected", restricted().name, attack, 0)
        start = plain._replace(model=hooked)
        outcome = bench.run(job, start).outcome.kind
        assert outcome == ("completed" if preparations else "diverged")
        keys.append(bench.key(job, start) == bench.key(job, plain))
    # Only of the student does the key say that its hooks are gone.
    assert keys == [False, True]
    assert len(hooked._forward_hooks) == 1
    normed = nn.utils.spectral_norm(nn.Linear(4, 4))
    assert not foreign_hooks(normed)


# --- Adapters ---------------------------------------------------------------------------------


def test_adapters_leave_the_function_and_train_only_themselves_and_the_head() -> None:
    model = trained_model()
    before = copy.deepcopy(model)
    tuning = _attack(
        model, Strategy(optimizer="adam", learning_rate=1e-2, batch_size=16, lora_rank=2, steps=1)
    )
    real = dict(before.named_parameters())
    for name, value in tuning.model.named_parameters():
        adapter, head = ".lora_" in name, name.startswith(tuning.setting.head)
        if not adapter:
            same = torch.equal(value, real[name.replace(".base_layer.", ".")])
            assert same != head
    trained = sum(p.numel() for p in tuning.parameters)
    assert 0 < trained < sum(p.numel() for p in before.parameters())


def test_adapters_learn_and_merge_into_the_plain_network() -> None:
    model = trained_model()
    keys = list(model.state_dict())
    plain = _accuracy(
        _attack(trained_model(), Strategy(learning_rate=1e-8, steps=1, batch_size=16))
    )
    tuning = _attack(
        model, Strategy(optimizer="adam", learning_rate=1e-2, batch_size=32, lora_rank=4, steps=60)
    )
    assert _accuracy(tuning) > plain + 0.3
    merged = merged_lora(tuning.model)
    assert list(merged.state_dict()) == keys
    images = restricted().validation.pixels[:20].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(
            merged.eval()(images), tuning.model.eval()(images), rtol=1e-4, atol=1e-4
        )


def test_an_adapter_adds_twice_the_product_of_its_matrices() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    before = model.get_parameter("0.weight").detach().clone()
    add_lora(model, 2, head="1", seed=0, names=())
    down, up = (model.get_parameter(f"0.lora_{one}.default.weight") for one in "AB")
    with torch.no_grad():
        up.normal_()
        wanted = before + 2 * up @ down
    torch.testing.assert_close(merged_lora(model).get_parameter("0.weight"), wanted)


@pytest.mark.parametrize("horizon", [None, 6])
def test_adapters_can_be_rehearsed(horizon: int | None) -> None:
    model = trained_model()
    strategy = Strategy(learning_rate=1e-2, batch_size=16, lora_rank=2)
    rehearsal = Rehearsal(steps=2, horizon=horizon, pool=1, fixed=strategy, query_batch_size=8)
    pool = rehearsing(quick_spec(rehearsal=rehearsal), _setting(), model)
    total, _ = pool.suppress(model)
    assert all(bool(g.any()) for name, g in total.gradients.items() if name.endswith("weight"))
    if horizon is not None:
        tensors, meta = pool.state()
        again = rehearsing(quick_spec(rehearsal=rehearsal), _setting(), model)
        again.restore(model, tensors, meta)
        first, second = pool.suppress(model)[0], again.suppress(model)[0]
        for name, value in first.gradients.items():
            assert torch.equal(value, second.gradients[name])


def test_adapters_need_layers_before_the_head() -> None:
    with pytest.raises(SpecError, match="use scope = 'all'"):
        Strategy(lora_rank=4, scope="head")


# --- Few images -------------------------------------------------------------------------------


def test_few_images_hold_every_class_and_depend_on_the_seed() -> None:
    domain = restricted()
    few = attacker_images(domain, 0.01, STREAM)
    assert sorted(few.labels.tolist()) == sorted(set(few.labels.tolist())) or len(few) < 20
    assert set(few.labels.tolist()) == set(domain.train.labels.tolist())
    tenth = attacker_images(domain, 0.1, STREAM)
    assert len(tenth) == pytest.approx(0.1 * len(domain.train), abs=domain.class_count)
    assert torch.equal(tenth.pixels, attacker_images(domain, 0.1, STREAM).pixels)
    assert not torch.equal(tenth.pixels, attacker_images(domain, 0.1, (1, ("attack",))).pixels)
    assert attacker_images(domain, 1.0, STREAM) is domain.train
    # What batches are fitted to is what an attacker has.
    for share in (0.01, 0.1, 0.37):
        assert len(attacker_images(domain, share, STREAM)) == image_count(domain, share)


# --- Healing and distilling -------------------------------------------------------------------


def _original_accuracy(model: nn.Module, setting: Setting) -> float:
    return evaluate(model, setting, original(), original().validation).value


def test_healing_mends_the_original_task_within_the_budget() -> None:
    torch.manual_seed(0)
    spoilt = trained_model()
    with torch.no_grad():
        for parameter in spoilt.parameters():
            parameter.add_(1.5 * parameter.std() * torch.randn_like(parameter))
    setting = _setting(spoilt, restricted())
    before = _original_accuracy(spoilt, setting)
    strategy = Strategy(preparations=(Heal(share=0.9),), batch_size=32, steps=100)
    feed = setting.feed(restricted(), restricted().train, batch_size=32, stream=STREAM)
    healed = copy.deepcopy(spoilt)
    prepared = attacker_copy(healed, strategy, setting, classes=5, feed=feed, stream=STREAM)
    assert prepared.spent == 90
    assert {origin.factor for origin in prepared.origins.values()} == {1.0}
    assert _original_accuracy(healed, setting) > max(before + 0.2, 0.9)


def test_a_student_learns_what_the_teacher_says_not_the_labels() -> None:
    teacher = trained_model()
    setting = _setting()
    strategy = Strategy(preparations=(Distil(share=0.9),), batch_size=64, steps=200)
    feed = setting.feed(restricted(), restricted().train, batch_size=64, stream=STREAM)
    student = copy.deepcopy(teacher)
    # A teacher that calls every digit by the next one's name has students who do, too.
    head = student.get_submodule(setting.head)
    with torch.no_grad():
        head.weight.copy_(head.weight.roll(1, 0))  # type: ignore[operator, union-attr]
        head.bias.copy_(head.bias.roll(1, 0))  # type: ignore[operator, union-attr]
    prepared = attacker_copy(student, strategy, setting, classes=5, feed=feed, stream=STREAM)
    assert {origin.factor for origin in prepared.origins.values()} == {0.0}
    domain = original()
    (images, labels), *_ = setting.feed(domain, domain.validation, batch_size=400).in_order()
    with torch.no_grad():
        said = student.eval()(images).argmax(1)
    assert float((said == (labels + 1) % 5).float().mean()) > 0.8


def test_distillation_is_zero_for_a_perfect_student() -> None:
    model = trained_model()
    task = Distillation(Classification(), copy.deepcopy(model))
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        outputs, targets = task.outputs(model, images, torch.zeros(4, dtype=torch.int64), stream)
    torch.testing.assert_close(task.loss(outputs, targets), torch.zeros(4), rtol=0, atol=1e-5)
    assert bool((task.loss(outputs, targets + torch.randn(4, 5)) > 0).all())
    picture = torch.randn(4, 3, 8, 8)
    expected = (picture**2).flatten(1).mean(1)
    torch.testing.assert_close(task.loss(torch.zeros_like(picture), picture), expected)
    assert torch.equal(task.score(picture, picture), torch.zeros(4))


def test_fresh_heads_and_training_beforehand_go_together() -> None:
    strategy = Strategy(
        preparations=(Heal(share=0.2), FreshHead()), scope="head", batch_size=16, steps=30
    )
    tuning = _attack(trained_model(), strategy)
    assert tuning.taken == 30
