"""The audit is audited: models that only look protected are found out, each by its own flags.

The two whose answer is a number are in `test_controls_known.py`: test files run side by side.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from builders import original, restricted, scratch_model, setting_of, trained_model
from controls import digit_controls, few_attacks, leading_attacks, real_controls
from records import CURVES, crashed, diverged, record, trial
from sophon._attacks.suites import SUITES
from sophon._auditing.controls import ControlResult, Controls, telling_flags
from sophon._auditing.decoys import DECOYS, FAINT, RECOVERED, STUBBORN, UNTRAINABLE, decoy_of
from sophon._auditing.vitals import measure_vitals
from sophon._judgement.flags.flag import GOOD
from sophon._judgement.verdict import summarise
from sophon._models import resolve_model
from sophon._records.audit_record import Trial, Vitals
from sophon._specs import AuditSpec, FreshHead, ModelSpec, RescaleWeights, Strategy
from sophon._training.setting import Setting

# What must be said of each decoy, whatever else is.
FLAGS: dict[str, set[str]] = {
    "raises when trained": {"crashed attacks", "zero or huge gradients"},
    "NaN when trained": {"most trials diverged", "zero or huge gradients"},
    "frozen parameters": {"unhealthy weights"},
    "poisoned head": {"original task destroyed"},
    "saturated logits": {"saturated outputs", "weight norms inflated", "zero or huge gradients"},
    "faint gradients": {"zero or huge gradients", "code of its own"},
    FAINT: {"zero or huge gradients", "code of its own"},
    "dropout when trained": {"code of its own"},
    "inflated weights": {"weight norms inflated"},
    "slightly inflated weights": set(),
    "spoilt BatchNorm": {"extreme BatchNorm statistics", "original task destroyed"},
    UNTRAINABLE: {"zero or huge gradients"},
    "deformed spectra": set(),
    "ill-conditioned features": {"weight norms inflated"},
    "outlying features": {"weight norms inflated"},
    "duplicated channels": set(),
    "dead units": set(),
    "obeyed sparsity": {"code of its own"},
}

# A flag that is no longer held against a model once an attack has rescaled its weights.
UNDONE = {"inflated weights": {"weight norms inflated"}}

# Attackers get no further than on a fresh network; with one seed that is void.
HOPELESS = {"protected": CURVES["scratch"]}


@pytest.fixture(scope="module")
def results(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ControlResult]:
    """Return what the audit made of every decoy that needs no benign domain."""
    with leading_attacks():
        run = real_controls(shared_data, tmp_path_factory.mktemp("controls"))
        return {name: run.decoy(name) for name in DECOYS if name != UNTRAINABLE}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DECOYS if name != UNTRAINABLE])
def test_every_decoy_is_found_out(name: str, results: dict[str, ControlResult]) -> None:
    result = results[name]
    said = (result.summary.verdict, result.summary.advantage, result.flags)
    assert result.passed, said
    assert set(result.flags) >= FLAGS[name], said
    assert set(result.telling) >= FLAGS[name] - UNDONE.get(name, set()), said
    if name in RECOVERED:
        value = result.summary.advantage.value
        assert value is not None, said
        assert value < 0.5, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deformed spectra", "inflated weights"])
def test_weights_of_a_real_resnet_that_are_inflated_are_flagged(
    name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_attacks(monkeypatch, (11,))
    weights = "resnet20_cifar10.safetensors"
    network = ModelSpec(name="resnet20", weights=weights)
    spec = AuditSpec(suite="quick-1", steps=2, evaluations=2, batch_size=16)
    run = real_controls(shared_data, None, network, spec)
    assert "weight norms inflated" in run.decoy(name).telling


def test_every_decoy_has_its_flags() -> None:
    assert set(FLAGS) == set(DECOYS)
    # Only attacks tell of what is inflated or deformed too little for a flag, and of what hardly
    # changes.
    subtle = [
        *("slightly inflated weights", "deformed spectra"),
        "duplicated channels",
        "dead units",
    ]
    assert [name for name in DECOYS if not FLAGS[name]] == subtle


def test_a_suite_without_strong_attacks_does_not_pass_for_its_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every decoy is flagged before any attack: where attackers recover, they must have."""
    run = digit_controls()
    monkeypatch.setattr(Controls, "_audited", lambda *_, **__: record(curves=HOPELESS, seeds=(0,)))
    monkeypatch.setattr(
        "sophon._auditing.controls.telling_flags", lambda _: ("weight norms inflated",)
    )
    for name in DECOYS:
        if name != UNTRAINABLE:
            assert run.decoy(name).passed == (name not in RECOVERED), name


def test_a_poisoned_head_has_the_classes_of_another_and_nothing_else_changed() -> None:
    model = trained_model()
    place = digit_controls().place
    with torch.no_grad():
        DECOYS["poisoned head"](model, place)
    before = trained_model().state_dict()
    for name, value in model.state_dict().items():
        expected = before[name]
        if name.startswith(f"{place.head}."):
            expected = torch.cat([expected[-1:], expected[:-1]])
        assert torch.equal(value, expected), name


def _made(name: str) -> tuple[nn.Module, float]:
    """Return a decoy of the small network, and how far its outputs on digits moved."""
    model = trained_model()
    images = setting_of(model).feed(original(), original().test, batch_size=64).batch(0)[0]
    with torch.no_grad():
        before = model(images)
        DECOYS[name](model, digit_controls().place)
        return model, float((model(images) - before).norm() / before.norm())


@pytest.mark.parametrize(
    ("name", "least"),
    [("deformed spectra", 30), ("ill-conditioned features", 300), ("outlying features", 100)],
)
def test_deformed_networks_compute_what_they_did_and_are_ill_conditioned(
    name: str, least: float
) -> None:
    model, moved = _made(name)
    assert moved < 1e-3
    # The last normalisation before the head, which undoes it.
    after, before = (one.get_parameter("stage3.4.weight") for one in (model, trained_model()))
    by = (after / before).detach()
    assert float(by.max() / by.min()) > least


def test_copies_dead_units_and_masks_are_where_they_are_said_to_be() -> None:
    def told(model: nn.Module, name: str) -> list[int]:
        return [len(p.unique(dim=0)) for key, p in model.named_parameters() if key.endswith(name)]

    model, moved = _made("duplicated channels")
    rows = zip(told(model, "0.weight"), told(trained_model(), "0.weight"), strict=True)
    assert any(now < before for now, before in rows)
    assert 0 < moved < 0.2
    model, moved = _made("dead units")
    assert any(bool((p == -100).any()) for p in model.parameters())
    assert 0 < moved < 0.2
    model, _ = _made("obeyed sparsity")
    weight = model.get_parameter("stage1.3.weight")
    zeros = weight == 0
    assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        weight.add_(1.0)
        copy.deepcopy(model)(torch.zeros(1, 1, 8, 8))
        model(torch.zeros(1, 1, 8, 8))
    assert torch.equal(weight == 0, zeros)


def _vision_transformer() -> nn.Module:
    shape = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    spec = ModelSpec(name="timm:vit_tiny_patch16_224", classes=5, in_channels=1, arguments=shape)
    return resolve_model(spec, base=Path())[0].eval()


NOT_ON_TRANSFORMERS = {
    *("inflated weights", "slightly inflated weights", "spoilt BatchNorm", "deformed spectra"),
    *("ill-conditioned features", "outlying features"),
}


@pytest.mark.parametrize("name", DECOYS)
def test_a_decoy_applies_where_it_is_one(name: str) -> None:
    """GELU undoes no scale, LayerNorm follows a sum: what cannot be changed is no decoy."""
    place, images = digit_controls().place, original().test.pixels.float() / 255
    assert decoy_of(trained_model(), name, place) is not None
    model = _vision_transformer()
    decoy = decoy_of(model, name, place)
    assert (decoy is None) == (name in NOT_ON_TRANSFORMERS)
    if name in ("duplicated channels", "dead units"):
        assert decoy is not None
        with torch.no_grad():
            before = model(images)
            assert 0 < float((decoy(images) - before).norm() / before.norm()) < 0.3


def test_a_decoy_that_does_not_apply_is_not_attacked_and_not_convicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = digit_controls()
    run.unprotected = _vision_transformer()
    monkeypatch.setattr(Controls, "_audited", lambda *_, **__: pytest.fail("attacked"))
    said = run.decoy("spoilt BatchNorm").as_dict()
    assert (said["verdict"], said["passed"], said["flags"]) == ("does not apply", True, [])


def test_masks_leave_out_weights_that_are_computed() -> None:
    model = trained_model()
    place, computed = digit_controls().place, weight_norm(model.get_submodule("stage1.0"))
    decoy = decoy_of(model, "obeyed sparsity", place)
    assert decoy is not None
    assert "mask" not in decoy.get_submodule("stage1.0").__dict__
    assert "mask" in decoy.get_submodule("stage1.3").__dict__
    assert computed is model.get_submodule("stage1.0")


@pytest.mark.slow
def test_what_cannot_be_fine_tuned_at_all_is_called_untrainable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_attacks(monkeypatch)
    run = digit_controls()
    result = run.decoy(UNTRAINABLE)
    assert result.summary.verdict == UNTRAINABLE, (result.summary.reasons, result.flags)
    assert result.passed
    assert set(result.flags) >= FLAGS[UNTRAINABLE]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUBBORN)
def test_seeds_enough_for_a_good_verdict_give_a_decoy_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_attacks(monkeypatch)
    result = digit_controls(benign=False).decoy(name, often=True)
    said = (result.summary.verdict, result.summary.reasons, result.flags)
    assert result.passed, said
    assert result.summary.verdict not in GOOD, said
    assert set(result.telling) >= FLAGS[name], said
    assert "fewer than three seeds" not in result.flags
    if name == UNTRAINABLE:
        # Nothing but the flags denies it one.
        assert any("it looks protected, but" in reason for reason in result.summary.reasons), said


@pytest.mark.slow
def test_a_suite_that_goes_by_stages_rescales_inflated_weights_and_acquits_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategies = (
        Strategy(optimizer="sgd_momentum", learning_rate=1e-3),
        Strategy(optimizer="adam", learning_rate=1e-3, preparations=(RescaleWeights(),)),
        Strategy(learning_rate=1e-1, preparations=(FreshHead(),), scope="head"),
    )
    staged = dataclasses.replace(
        SUITES["standard-1"],
        strategies=strategies,
        seeds=(0, 1, 2),
        survivors=1,
        search_trials=4,
        depth=False,
        rehearsed=False,
    )
    monkeypatch.setitem(SUITES, "staged", staged)
    spec = {"suite": "staged", "search_trials": 4}
    run = digit_controls(tmp_path, benign=False, **spec)
    result = run.decoy("inflated weights", often=True)
    assert result.passed, (result.summary.verdict, result.flags)
    # Rescaling brings the weights back, so what is left to hold against it are its statistics.
    assert "weight norms inflated" in result.flags
    assert result.telling == ("extreme BatchNorm statistics",)
    trials = [
        Trial.model_validate_json(file.read_text()) for file in (tmp_path / "trials").iterdir()
    ]
    assert {t.outcome.kind for t in trials} >= {"completed", "stopped"}
    assert {t.seed for t in trials} == {0, 1, 2}
    rescaled = {
        (t.subject, t.strategy, t.seed, t.outcome.kind): [p.validation for p in t.curve]
        for t in trials
        if t.strategy.preparations[:1] == (RescaleWeights(),)
    }
    there = {key[1:]: scores for key, scores in rescaled.items() if key[0] == "protected"}
    assert len(there) >= 4
    assert all(rescaled["unprotected", *key] == scores for key, scores in there.items())
    budget = {s.model_copy(update={"steps": 4, "batch_size": 128}) for s in strategies}
    assert len({t.strategy for t in trials} - budget) >= 4


def test_a_flag_that_the_unprotected_model_raises_as_well_finds_nothing_out() -> None:
    held = record([*record().trials, crashed("scratch"), diverged("unprotected")])
    assert "crashed attacks" in {flag.name for flag in summarise(held)[0].flags}
    assert telling_flags(held) == ()
    own = record([*record().trials, crashed("protected")], flags=("frozen_parameters",))
    assert set(telling_flags(own)) == {"crashed attacks", "unhealthy weights"}


def test_flags_that_forbid_nothing_find_nothing_out() -> None:
    strategies = (Strategy(), Strategy(preparations=(FreshHead(),)))
    trials = [
        trial("protected", (0, 0, 0, score), strategy=strategy)
        for strategy, score in zip(strategies, (0.5, 0.9), strict=True)
    ]
    others = [t for t in record().trials if t.subject != "protected"]
    held = record([*trials, *others])
    assert "the head alone resists" in {flag.name for flag in summarise(held)[0].flags}
    assert "the head alone resists" not in telling_flags(held)


def test_what_controls_share_is_measured_once_and_is_what_each_would_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_attacks(monkeypatch, (11,))
    measured: list[nn.Module] = []

    def counted(model: nn.Module, setting: Setting) -> Vitals:
        measured.append(model)
        return measure_vitals(model, setting)

    monkeypatch.setattr("sophon._auditing.subjects.measure_vitals", counted)
    run = digit_controls(benign=False, suite="quick-1", steps=2)
    first, second = (run._audited(trained_model(), run.once) for _ in range(2))
    # The model itself twice, the unprotected and the fresh network once.
    assert len(measured) == 4
    alone = digit_controls(benign=False, suite="quick-1", steps=2)
    found = alone._audited(trained_model(), alone.once)
    assert [s.vitals for s in first.subjects] == [s.vitals for s in found.subjects]
    assert [s.vitals for s in second.subjects] == [s.vitals for s in found.subjects]


def test_controls_leave_the_model_as_it_is() -> None:
    model = trained_model()
    spec = AuditSpec(steps=2, evaluations=2, batch_size=16)
    run = Controls(
        model, original=original(), restricted=restricted(), spec=spec, scratch=scratch_model
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = next(iter(run))
    assert first.passed
    assert "crashed attacks" in first.flags
    assert run.place.head == "head"
    twin = run.twin().state_dict()
    # The twin is another network, and hardly so.
    moved = [(twin[name] - value).abs().max() for name, value in before.items() if value.ndim > 1]
    assert all(0 < float(size) < 0.1 for size in moved)
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
