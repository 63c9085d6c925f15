"""The price of hindrance: how the guard moves it, what it rolls back, that it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builders import original, restricted, setting_of, trained_model
from sophon._base.errors import IntactnessError, SpecError
from sophon._protection.guard import IntactnessGuard
from sophon._protection.protection import Protection
from sophon._protection.spec import Joint, ProtectSpec
from sophon._records.audit_record import Score
from sophon._specs import Guard
from sophon._specs.guard import Price
from toy_term import ToySpec, ToyTerm

PRICE = Price(start=2.0, rise=1.5, fall=0.5, most=4.0, slack=5.0, margin=3.0)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    from sophon._protection.terms import TERMS

    monkeypatch.setitem(TERMS, "toy", ToyTerm)


def _guard(monkeypatch: pytest.MonkeyPatch, correct: list[int]) -> IntactnessGuard:
    """Return a guard that starts at 95 of 100, and measures these after it; two may be lost."""
    scores = iter([Score(correct=value, total=100) for value in (95, *correct)])
    monkeypatch.setattr("sophon._protection.guard.evaluate", lambda *_, **__: next(scores))
    spec = Guard(mode="price", price=PRICE, tolerance_points=2.0)
    guard = IntactnessGuard(trained_model(), setting_of(trained_model()), spec)
    guard.begin()
    return guard


def _check(guard: IntactnessGuard, finished: int, left: float = 0.0) -> str:
    guard.observe(0.5)
    return guard.check(finished, left)[1]


@pytest.mark.parametrize(("left", "price"), [(1.0, 3.0), (0.4, 3.0), (0.3, 1.0), (0.0, 1.0)])
def test_early_on_more_is_allowed_for_the_price_but_not_for_shipping(
    left: float, price: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of 100 lost, two may be: four beyond, where five times two, or what is left, is slack."""
    guard = _guard(monkeypatch, [89])
    assert _check(guard, 1, left) == "violated"
    assert guard.price == pytest.approx(price)
    assert guard.shipped is None


def test_the_average_is_what_is_checked_and_shipped(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", update=Joint(average=0.5))
    for _ in run:
        pass
    shipped, trained = run.result().model.state_dict(), run.model.state_dict()
    average = run.update.shipped.state_dict()
    assert all(torch.equal(shipped[name], value) for name, value in average.items())
    assert any(not torch.equal(shipped[name], value) for name, value in trained.items())
    plain = _run(update=Joint(average=0.0))
    assert plain.update.shipped is plain.model


def test_frozen_statistics_stay_those_given_and_the_loss_is_of_what_is_shipped() -> None:
    def statistics(model: nn.Module) -> list[torch.Tensor]:
        return [v.clone() for n, v in model.named_buffers() if "running" in n or "batches" in n]

    given = statistics(trained_model())
    frozen = _run(update=Joint(freeze_statistics=True))
    moving = _run(update=Joint(freeze_statistics=False))
    images, labels = frozen.keep.feed.batch(0)
    with torch.no_grad():
        logits = trained_model().eval()(images)
        wanted = nn.functional.cross_entropy(logits, labels)
    record, other = next(iter(frozen)), next(iter(moving))
    assert record.original_loss == pytest.approx(float(wanted), rel=1e-4)
    assert other.original_loss != pytest.approx(float(wanted), rel=1e-3)
    for model in (frozen.model, frozen.update.shipped):
        assert all(map(torch.equal, statistics(model), given))
    assert not all(map(torch.equal, statistics(moving.model), given))


@pytest.mark.parametrize(("changes", "frozen"), [({}, True), ({"start": "fresh"}, False)])
@pytest.mark.parametrize("update", ["joint", {"kind": "joint", "rate": 7e-4}])
def test_statistics_stand_still_unless_the_run_starts_from_other_weights(
    changes: dict[str, Any], frozen: bool, update: Any
) -> None:
    run = _run(update=update, **changes)
    assert isinstance(run.spec.update, Joint)
    assert run.spec.update.freeze_statistics is frozen


def test_the_price_stands_still_until_other_weights_first_meet_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = _guard(monkeypatch, [20, 40, 95, 92])
    guard.returns = False
    assert [_check(guard, finished) for finished in (1, 2)] == ["violated", "violated"]
    assert guard.price == pytest.approx(2.0)
    assert _check(guard, 3) == "met"
    assert guard.price == pytest.approx(3.0)
    assert _check(guard, 4) == "violated"
    assert guard.price == pytest.approx(1.5)


def test_constant_buffers_survive_the_average() -> None:
    run = _run(rounds=4, update=Joint(average=0.95))
    mask = torch.tensor([0.0, -torch.inf])
    for model in (run.model, run.update.shipped):
        model.register_buffer("mask", mask.clone())
        model.register_buffer("index", torch.tensor([13]))
    for _ in run:
        pass
    held = dict(run.update.shipped.named_buffers())
    assert torch.equal(held["mask"], mask)
    assert held["index"].tolist() == [13]


@pytest.mark.parametrize("start", [{"start": "fresh"}, {"start": "shrunk", "shrink": 0.4}])
def test_other_starts_run_to_the_end_and_go_on_where_they_were(
    start: dict[str, Any], tmp_path: Path
) -> None:
    whole = _run(**start)
    begun = {name: value.clone() for name, value in whole.model.state_dict().items()}
    given = trained_model().state_dict()
    assert not torch.equal(begun["stage1.0.weight"], given["stage1.0.weight"])
    for _ in whole:
        pass
    result = whole.result()
    # What is to be kept is the given model's score, not the start's.
    assert whole.guard.before.value > 0.9
    assert len(result.rounds) == 6
    assert not torch.equal(result.model.state_dict()["stage1.0.weight"], begun["stage1.0.weight"])
    first = _run(tmp_path / "run", **start)
    next(iter(first))
    del first
    second = _run(tmp_path / "run", **start)
    for _ in second:
        pass
    held = result.model.state_dict()
    assert all(torch.equal(held[n], v) for n, v in second.result().model.state_dict().items())


def test_a_fresh_start_has_no_statistics_to_freeze() -> None:
    with pytest.raises(SpecError, match="fresh network has no statistics yet"):
        ProtectSpec(start="fresh", update=Joint(freeze_statistics=True))


def test_it_rises_while_the_tolerance_is_met_and_falls_while_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = _guard(monkeypatch, [95, 94, 93, 92, 91, 95])
    found = [guard.price]
    verdicts = []
    for finished in range(1, 7):
        verdicts.append(_check(guard, finished))
        found.append(guard.price)
    assert verdicts == ["met", "met", "met", "violated", "violated", "met"]
    assert found == pytest.approx([2.0, 3.0, 4.0, 4.0, 2.0, 1.0, 1.5])
    assert guard.extra_steps == 0


@pytest.mark.parametrize(("lost", "back"), [(3, False), (8, False), (9, True), (50, True)])
def test_weights_go_back_only_beyond_the_margin(
    lost: int, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = _guard(monkeypatch, [95, 95 - lost])
    _check(guard, 1)
    with torch.no_grad():
        next(guard.model.parameters()).add_(1.0)
    moved = next(guard.model.parameters()).detach().clone()
    assert _check(guard, 2) == "violated"
    assert torch.equal(next(guard.model.parameters()), moved) != back
    assert torch.equal(next(guard.model.parameters()), guard.last_good["stage1.0.weight"]) == back
    # What is shipped met the tolerance.
    assert guard.require_shipped(1.0).round == 1


def _spec(**changes: Any) -> ProtectSpec:
    usual: dict[str, Any] = {
        "rounds": 6,
        "hinder": (ToySpec(),),
        "keep": ({"kind": "task"},),
        "update": Joint(),
        "guard": Guard(every=2, tolerance_points=100.0, price=PRICE),
        "original_batch_size": 16,
        "checkpoint_every": 1,
        "precision": "fp32",
    }
    return ProtectSpec(**(usual | changes))


def _run(out: Path | None = None, **changes: Any) -> Protection:
    return Protection(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=_spec(**changes),
        out=out,
        device="cpu",
    )


def test_it_is_in_the_record_of_every_round() -> None:
    run = _run()
    assert run.guard.spec.mode == "price"
    assert [record.price for record in run] == pytest.approx([2.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    plain = _run(guard=Guard(every=2, tolerance_points=100.0), update="alternate")
    assert plain.guard.spec.mode == "rollback"
    assert [record.price for record in plain] == [None] * 6


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = _run()
    for _ in whole:
        pass
    first = _run(tmp_path / "run")
    for record in first:
        if record.index == 2:
            break
    del first
    second = _run(tmp_path / "run")
    assert (second.done, second.guard.price) == (3, 3.0)
    for _ in second:
        pass
    assert [r.price for r in second.rounds] == [r.price for r in whole.rounds]
    held = whole.model.state_dict()
    assert all(torch.equal(held[name], v) for name, v in second.model.state_dict().items())


def test_it_multiplies_the_gradient_of_the_hindrances() -> None:
    """With a plain step in Adam's place the weights move by the clipped sum."""
    moved = {}
    for start in (0.25, 0.5):
        price = Price(start=start, most=start)
        run = _run(
            update=Joint(pin_norms=False, clip_norm=1000.0),
            guard=Guard(every=6, tolerance_points=100.0, price=price),
        )
        seen: dict[str, torch.Tensor] = {}

        def note(*_: object, run: Protection = run, seen: Any = seen) -> None:
            seen.update({n: p.grad.clone() for n, p in run.model.named_parameters()})

        run.update.optimizers["joint"].register_step_pre_hook(note)
        next(iter(run))
        moved[start] = seen
    run = _run()
    hindrance = ToyTerm(ToySpec(), run.around).contribute(run.model).gradients
    for name, gradient in hindrance.items():
        difference = moved[0.5][name] - moved[0.25][name]
        torch.testing.assert_close(difference, 0.25 * gradient, rtol=1e-3, atol=1e-5)


def test_two_adams_in_turn_have_nothing_to_multiply(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"guard.mode = 'price'.*use update = 'joint'"):
        _spec(update="alternate", guard=Guard(mode="price"))
    # Where the update is left to the method it is found out once that is known.
    with pytest.raises(SpecError, match=r"guard.mode = 'price'.*use update = 'joint'"):
        _run(tmp_path / "run", update=None, method="sophon", guard=Guard(mode="price"))
    assert not (tmp_path / "run").exists()


def test_one_adam_has_no_keep_steps_for_rollback_to_add(tmp_path: Path) -> None:
    rollback = Guard(mode="rollback")
    with pytest.raises(SpecError, match=r"guard.mode = 'rollback'.*use guard.mode = 'price'"):
        _spec(guard=rollback)
    with pytest.raises(SpecError, match=r"protect.guard.mode = 'rollback'.*update = 'alternate'"):
        _run(tmp_path / "run", update=None, guard=rollback)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [
        ("price", r"lower protect\.guard\.price\.most, or raise the weights of protect\.keep"),
        ("rollback", r"what protect\.update gives the keep terms"),
    ],
)
def test_where_no_weights_can_be_shipped_what_can_be_turned_is_named(
    mode: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = _guard(monkeypatch, [])
    guard.spec = Guard(mode=mode)
    with pytest.raises(IntactnessError, match=remedy):
        guard.require_shipped(0.9)


def test_a_price_above_its_most_is_refused() -> None:
    with pytest.raises(SpecError, match="start = 5 is above most = 4: lower it"):
        Price(start=5.0, most=4.0)
    with pytest.raises(SpecError, match=r"start = 1\.2 is above most = 1: give start too"):
        Price(most=1.0)
