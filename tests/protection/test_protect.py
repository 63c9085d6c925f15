"""Protection: its promises to the caller, the guard, and going on after being killed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from builders import (
    digits,
    original,
    quick_spec,
    rehearsal_of,
    restricted,
    setting_of,
    trained_model,
)
from sophon._base.errors import (
    CheckpointError,
    DataError,
    IntactnessError,
    NonFiniteError,
    SpecError,
    UnsupportedModelError,
)
from sophon._base.files import lock_folder
from sophon._data import Images
from sophon._protection.forecast import Forecast, forecast
from sophon._protection.guard import IntactnessGuard
from sophon._protection.protection import Protection, protect
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import Alternate, ProtectSpec
from sophon._protection.start import starting_weights
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._protection.update import Alternating
from sophon._records.audit_record import Score
from sophon._specs import Guard, Heal, Strategy
from sophon._tasks import Classification
from sophon._training import checkpoints as _checkpoints
from sophon._training.checkpoints import load_state
from sophon._training.loop import FineTuning
from sophon._training.setting import Setting, make_setting

SHARED = Path(__file__).parents[1] / "shared"


def _protect(spec: ProtectSpec, out: Path | None = None) -> nn.Module:
    return protect(
        trained_model(), original=original(), restricted=restricted(), spec=spec, out=out
    ).model


def _started(out: Path) -> Protection:
    """Return a run of `quick_spec` in a folder, no round of it done."""
    return Protection(
        trained_model(), original=original(), restricted=restricted(), spec=quick_spec(), out=out
    )


def _alternating(run: Protection) -> Alternating:
    assert isinstance(run.update, Alternating)
    return run.update


def _setting() -> Setting:
    return make_setting(
        trained_model(),
        task=Classification(),
        original=original(),
        restricted=(restricted(),),
        head=None,
        precision="fp32",
        device=None,
    )


def _equal(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[key]) for key, value in first.state_dict().items())


def test_the_argument_is_left_bit_identical_and_the_keys_are_kept() -> None:
    model = trained_model()
    before = copy.deepcopy(model.state_dict())
    result = protect(model, original=original(), restricted=restricted(), spec=quick_spec())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(result.model.state_dict()) == list(before)
    assert not _equal(result.model, model)
    assert type(result.model) is type(model)


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    first, second = _protect(quick_spec()), _protect(quick_spec())
    assert _equal(first, second)
    assert not _equal(first, _protect(quick_spec(seed=1)))


def test_every_round_is_recorded() -> None:
    run = Protection(
        trained_model(), original=original(), restricted=restricted(), spec=quick_spec()
    )
    rounds = list(run)
    assert [r.index for r in rounds] == list(range(6))
    assert all(len(r.strategies) == 2 and r.suppression_gradient_norm > 0 for r in rounds)
    assert [r.guard is not None for r in rounds] == [False, True] * 3


def test_suppression_works_on_the_rehearsed_query() -> None:
    """Long enough, the rehearsed attackers' query accuracy falls: the effect itself."""
    strategy = Strategy(optimizer="sgd", learning_rate=1e-3, batch_size=32)
    usual = rehearsal_of(quick_spec())
    rehearsal = Rehearsal(
        strategies=usual.strategies,
        steps=usual.steps,
        query_batch_size=usual.query_batch_size,
        fixed=strategy,
    )
    spec = quick_spec(rounds=30, rehearsal=rehearsal, suppression_rate=3e-3)
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    rounds = list(run)
    first = sum(r.suppression_loss for r in rounds[:5])
    assert sum(r.suppression_loss for r in rounds[-5:]) < 0.5 * first


def test_each_violation_adds_one_reinforcement_step_and_what_is_met_none() -> None:
    spec = SPECS["violated"]
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    violations = 0
    for record in run:
        assert record.reinforcement_steps == _alternating(run).spec.keep_steps + violations
        violations += record.guard == "violated"
    assert {r.guard for r in run.rounds} == {"met", "violated"}


@pytest.mark.parametrize(("lost", "verdict"), [(0, "met"), (3, "met"), (4, "violated")])
def test_the_tolerance_is_met_up_to_its_last_image(
    lost: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([Score(correct=95, total=100), Score(correct=95 - lost, total=100)])
    monkeypatch.setattr("sophon._protection.guard.evaluate", lambda *_, **__: next(scores))
    guard = IntactnessGuard(trained_model(), setting_of(trained_model()), Guard(tolerance_points=3))
    guard.begin()
    guard.observe(0.5)
    assert guard.check(1)[1] == verdict


def _rolling_back() -> Protection:
    """Return a protection whose every step does too much."""
    spec = quick_spec(rounds=2, suppression_rate=0.5, reinforcement_steps=0, guard=Guard(every=1))
    return Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)


def test_after_a_violation_the_weights_are_the_last_good_ones() -> None:
    run, model = _rolling_back(), trained_model()
    record = next(iter(run))
    assert record.guard == "violated"
    assert record.guard_score is not None
    assert record.guard_score < run.guard.before.value - 0.02
    assert _equal(run.model, model)


def test_the_guard_never_looks_at_the_test_split() -> None:
    spec, model = quick_spec(rounds=2), trained_model()
    kept = original()
    held = dataclasses.replace(kept, test=Images(kept.test.pixels, (kept.test.labels + 1) % 5))
    results = []
    for domain in (kept, held):
        run = Protection(model, original=domain, restricted=restricted(), spec=spec)
        results.append([(r.guard, r.guard_score) for r in run])
    assert results[0] == results[1]
    assert run.guard.before.value > 0.9


@pytest.mark.parametrize("ship", ["last", "lowest_query_score"])
def test_what_is_shipped_follows_the_rule(ship: Literal["last", "lowest_query_score"]) -> None:
    guard = IntactnessGuard(trained_model(), _setting(), Guard(tolerance_points=100.0, ship=ship))
    guard.begin()
    for finished, query in enumerate((0.5, 0.2, 0.4), start=1):
        guard.observe(query)
        guard.check(finished)
    assert guard.require_shipped(1.0).round == {"last": 3, "lowest_query_score": 2}[ship]


def test_of_equal_query_scores_the_later_weights_are_shipped() -> None:
    spec = Guard(tolerance_points=100.0, ship="lowest_query_score")
    guard = IntactnessGuard(trained_model(), _setting(), spec)
    guard.begin()
    for finished, query in enumerate((0.5, 0.2, 0.2), start=1):
        guard.observe(query)
        guard.check(finished)
    assert guard.require_shipped(1.0).round == 3


def test_a_score_to_keep_is_the_given_models_and_other_starts_are_not_returned_to() -> None:
    given, start = trained_model(), trained_model()
    with torch.no_grad():
        start.head.weight.zero_()
    guard = IntactnessGuard(start, _setting(), Guard(tolerance_points=5.0))
    guard.begin(given)
    assert guard.before.value > 0.9
    with torch.no_grad():
        start.head.bias.fill_(1.0)
    guard.observe(0.5)
    assert guard.check(1)[1] == "violated"
    assert guard.shipped is None
    assert bool((start.head.bias == 1.0).all()), "it went back to where it started"


def test_after_a_violation_the_trained_weights_go_back_beside_the_average() -> None:
    trained, average = trained_model(), trained_model()
    guard = IntactnessGuard(trained, _setting(), Guard(tolerance_points=5.0), shipped=average)
    guard.begin()
    with torch.no_grad():
        trained.head.weight.add_(1.0)
        average.head.weight.zero_()
    guard.observe(0.5)
    assert guard.check(1)[1] == "violated"
    assert _equal(trained, trained_model())
    assert _equal(average, trained_model())


def test_the_guard_comes_back_as_it_was() -> None:
    first, second = (
        IntactnessGuard(trained_model(), _setting(), Guard(tolerance_points=0.0)) for _ in range(2)
    )
    first.begin()
    first.observe(0.5)
    first.check(1)
    first.observe(0.25)
    first.extra_steps = 3
    second.restore(*copy.deepcopy(first.state()))
    assert second.state()[1] == first.state()[1]
    assert second.extra_steps == 3
    assert second.state()[1]["window"] == [0.25]


def test_a_shrunk_start_is_between_the_given_weights_and_fresh_ones_of_their_norm() -> None:
    given = trained_model()
    before = copy.deepcopy(given.state_dict())
    one, again, other = (
        starting_weights(given, ProtectSpec(start="shrunk", shrink=0.25, seed=seed))
        for seed in (0, 0, 1)
    )
    assert _equal(given, trained_model())
    assert _equal(one, again)
    assert all(parameter.requires_grad for parameter in one.parameters())
    for name, value in one.state_dict().items():
        held = before[name]
        if held.dim() < 2:
            assert torch.equal(value, held), name
            continue
        fresh, another = ((model.state_dict()[name] - 0.75 * held) / 0.25 for model in (one, other))
        torch.testing.assert_close(fresh.norm(), held.norm(), rtol=1e-4, atol=0)
        assert not torch.allclose(fresh, another)
        cosine = torch.nn.functional.cosine_similarity(fresh.flatten(), held.flatten(), dim=0)
        assert abs(float(cosine)) < 0.5


def test_a_fresh_start_has_none_of_the_given_weights() -> None:
    given = trained_model()
    fresh = starting_weights(given, ProtectSpec(start="fresh"))
    held = given.state_dict()
    for name, value in fresh.named_parameters():
        assert not torch.equal(value, held[name]), name
    start = starting_weights(given, ProtectSpec())
    assert _equal(start, given)
    assert start is not given


def test_the_suppression_gradient_is_clipped_to_the_norm() -> None:
    run = Protection(
        trained_model(), original=original(), restricted=restricted(), spec=quick_spec()
    )
    seen = []
    _alternating(run).suppressor.register_step_pre_hook(
        lambda *_: seen.append(
            torch.stack(
                [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
            ).norm()
        )
    )
    gradients = {name: torch.ones_like(p) for name, p in run.model.named_parameters()}
    before = _alternating(run)._apply(gradients)
    assert float(before) > 1.0
    assert float(seen[0]) == pytest.approx(_alternating(run).spec.clip_norm, rel=1e-3)


def test_suppression_and_reinforcement_have_an_adam_each_and_take_their_steps() -> None:
    spec = quick_spec(rounds=2, suppression_steps=3, reinforcement_steps=2)
    run = Protection(trained_model(), original=original(), restricted=restricted(), spec=spec)
    taken = {"suppressor": 0, "reinforcer": 0}

    def count(name: str) -> None:
        taken[name] += 1

    _alternating(run).suppressor.register_step_pre_hook(lambda *_: count("suppressor"))
    _alternating(run).reinforcer.register_step_pre_hook(lambda *_: count("reinforcer"))
    next(iter(run))
    assert taken == {"suppressor": 3, "reinforcer": 2}


def test_no_weights_within_tolerance_is_an_error_that_keeps_the_files(tmp_path: Path) -> None:
    spec = quick_spec(
        rounds=2,
        suppression_rate=5.0,
        reinforcement_steps=0,
        guard=Guard(every=1, tolerance_points=0.0),
    )
    with pytest.raises(IntactnessError, match="tolerance_points"):
        _protect(spec, tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text().count("\n") == 2
    assert load_state(tmp_path / "states") is not None
    assert not (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_names_the_strategy_and_loses_nothing(tmp_path: Path) -> None:
    spec = quick_spec(suppression="reversed_logits")
    run = Protection(
        trained_model(), original=original(), restricted=restricted(), spec=spec, out=tmp_path
    )
    rounds = iter(run)
    next(rounds)
    second = next(rounds)
    # One attacker of the pool breaks; the other of the same round does not.
    (rehearsal,) = run.hinder
    assert isinstance(rehearsal, RehearsalTerm)
    broken = rehearsal.pool[rehearsal.visits % 3]
    broken.displacement[run.setting.head + ".weight"].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"round 2.*not finite") as caught:
        next(rounds)
    assert broken.plan.strategy.label() in str(caught.value)
    others = {a.plan.strategy.label() for a in rehearsal.pool.values()} - {
        broken.plan.strategy.label()
    }
    assert not any(label in str(caught.value) for label in others)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]
    resumed = Protection(
        trained_model(), original=original(), restricted=restricted(), spec=spec, out=tmp_path / "x"
    )
    assert resumed.done == 0
    assert load_state(tmp_path / "states") is not None
    assert second.index == 1


def test_a_reinforcement_that_is_not_finite_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Protection(
        trained_model(), original=original(), restricted=restricted(), spec=quick_spec()
    )
    monkeypatch.setattr(_alternating(run), "_reinforce", lambda: torch.tensor([torch.nan, 1.0]))
    with pytest.raises(
        NonFiniteError, match=r"round 0.*in the reinforcement: lower the keep rate .protect.update"
    ):
        next(iter(run))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    _protect(quick_spec(rounds=1, guard=Guard(every=1, tolerance_points=100.0)), tmp_path)
    with pytest.raises(CheckpointError, match="another spec"):
        _protect(quick_spec(rounds=2), tmp_path)


def test_too_few_images_for_a_batch_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="original_batch_size"):
        _protect(quick_spec(original_batch_size=100_000), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_forecast_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forecast_of(steps: int, rounds: int) -> Forecast:
        spec = quick_spec(rounds=rounds)
        rehearsal = rehearsal_of(spec).model_copy(update={"steps": steps, "horizon": None})
        spec = spec.model_copy(update={"hinder": (rehearsal,)})
        domains = {"original": original(), "restricted": (restricted(),)}
        return forecast(trained_model(), **domains, spec=spec)

    def slow(*args: Any) -> Tensor:
        time.sleep(0.05)
        return step(*args)

    step = FineTuning._step
    monkeypatch.setattr(FineTuning, "_step", slow)
    short, long = forecast_of(4, 6), forecast_of(40, 60)
    # Two attackers a round: 0.4 s and 4 s of sleep, to which little is added.
    assert short.round_s >= 0.4
    assert 4.0 <= long.round_s < 40
    assert long.total_s == pytest.approx(60 * long.round_s)
    assert long.peak_bytes is not None
    assert long.peak_bytes > 1e7


def test_a_forecast_measures_a_few_of_any_number() -> None:
    many = 1_000_000
    strategies = StrategyDistribution(preparations=((Heal(share=0.02),),), batch_sizes=(8,))
    rehearsal = Rehearsal(steps=many, strategies=many, distribution=strategies, query_batch_size=8)
    update = Alternate(hindrance_steps=many, keep_steps=many)
    spec = quick_spec(rounds=many).model_copy(update={"hinder": (rehearsal,), "update": update})
    found = forecast(trained_model(), original=original(), restricted=restricted(), spec=spec)
    # A million updates by a million attackers of a million steps, a millisecond each or so.
    assert found.round_s > 1e-6 * many**3
    assert found.total_s == pytest.approx(many * found.round_s)


def test_one_image_at_a_time_is_refused_where_batch_norm_cannot(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)
    )
    for changes in ({"original_batch_size": 1}, {"rehearsal": Rehearsal(query_batch_size=1)}):
        with pytest.raises(UnsupportedModelError, match=r"batch_size = 1.*at least 2"):
            protect(
                model,
                original=original(),
                restricted=restricted(),
                spec=quick_spec(**changes),
                out=tmp_path / "new",
            )
    assert not (tmp_path / "new").exists()


def test_a_folder_of_a_newer_format_is_not_touched(tmp_path: Path) -> None:
    spec = quick_spec(rounds=1, guard=Guard(every=1, tolerance_points=100.0))
    _protect(spec, tmp_path)
    held = json.loads((tmp_path / "run.json").read_text())
    assert held["format"] == 1
    (tmp_path / "run.json").write_text(json.dumps({**held, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2 and this version reads 1"):
        _protect(spec, tmp_path)


# Runs the protection once for each N and kills its process at the N-th event: a file flushed,
# renamed or replaced, or an optimizer step of the real model.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from builders import original, quick_spec, restricted, trained_model
from sophon._protection.spec import ProtectSpec
from sophon._protection import protection as _protect
from sophon._protection.terms.rehearsal import RehearsalTerm
from sophon._protection.update import Alternating

def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

out, spec, *events = sys.argv[1:]
# Threads of a parent are not there in its forks.
torch.set_num_threads(1)
model = trained_model()
for event in events:
    if (child := os.fork()):
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        continue
    left = int(event)
    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    Path.rename = counted(Path.rename)
    RehearsalTerm.suppress = counted(RehearsalTerm.suppress)
    Alternating._reinforce = counted(Alternating._reinforce)
    _protect.protect(model, original=original(), restricted=restricted(),
                     spec=ProtectSpec.model_validate_json(spec), out=Path(out, event))
    print("finished", left)
    sys.exit()
"""


SPECS: dict[str, ProtectSpec] = {
    "every round": quick_spec(),
    # Fewer states than rounds, a guard that is violated, and the other rule of what is shipped.
    "violated": quick_spec(
        checkpoint_every=3,
        suppression_rate=0.01,
        reinforcement_rate=2e-3,
        guard=Guard(every=1, tolerance_points=2.0, ship="lowest_query_score"),
    ),
}


@pytest.fixture(scope="module")
def uninterrupted() -> nn.Module:
    return _protect(SPECS["every round"])


@pytest.fixture(scope="module")
def violated() -> nn.Module:
    run = protect(
        trained_model(), original=original(), restricted=restricted(), spec=SPECS["violated"]
    )
    assert {r.guard for r in run.rounds} == {"met", "violated"}
    return run.model


EVENTS = {
    "every round": (1, 3, 4, 6, 9, 13, 18, 24, 31, 39, 47, 51),
    "violated": (5, 11, 16, 21, 26, 29),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs that were killed, by their spec's name and the event."""
    out = tmp_path_factory.mktemp("killed")
    for name, events in EVENTS.items():
        words = [str(out / name), SPECS[name].model_dump_json(), *map(str, events)]
        script = [sys.executable, "-c", KILLED.format(tests=str(SHARED)), *words]
        ended = subprocess.run(
            script, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return out


@pytest.mark.parametrize(("name", "event"), [(n, e) for n, held in EVENTS.items() for e in held])
def test_killed_anywhere_the_repeated_command_gives_identical_weights(
    name: str, event: int, killed: Path, uninterrupted: nn.Module, violated: nn.Module
) -> None:
    expected = {"every round": uninterrupted, "violated": violated}[name]
    run = killed / name / str(event)
    resumed = _protect(SPECS[name], run)
    assert _equal(resumed, expected)
    held = load_file(run / "model.safetensors")
    assert all(torch.equal(held[k], v) for k, v in expected.state_dict().items())
    lines = (run / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(6))


def test_another_weight_of_a_domain_is_another_run(tmp_path: Path) -> None:
    spec = quick_spec(rounds=2)
    given = {"original": original(), "spec": spec, "out": tmp_path}
    next(iter(Protection(trained_model(), restricted=restricted(), **given)))  # type: ignore[arg-type]
    heavier = dataclasses.replace(restricted(), weight=50.0)
    with pytest.raises(CheckpointError, match="another domains"):
        Protection(trained_model(), restricted=heavier, **given)  # type: ignore[arg-type]


def test_a_run_is_not_started_over_when_every_state_is_damaged(tmp_path: Path) -> None:
    run = _started(tmp_path)
    for _ in range(3):
        next(iter(run))
    for state in (tmp_path / "states").iterdir():
        (state / "tensors.safetensors").write_bytes(b"damaged")
    held = (tmp_path / "rounds.jsonl").read_text()
    with pytest.raises(CheckpointError, match="every state"):
        _protect(quick_spec(), tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text() == held


def _without(held: bytes, key: str) -> bytes:
    whole = json.loads(held)
    del whole["meta"][key]
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tensors.safetensors", lambda held: b"damaged"),
        ("tensors.safetensors", lambda held: held[:-1] + bytes([held[-1] ^ 1])),
        ("meta.json", lambda held: held[: len(held) // 2]),
        ("meta.json", lambda held: re.sub(rb'("kept": )(\d+)', rb"\g<1>7", held)),
        ("meta.json", lambda held: held.replace(b'"rounds"', b'"rounded"', 1)),
        ("meta.json", lambda held: _without(held, "kept")),
    ],
)
def test_a_damaged_state_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[bytes], bytes], uninterrupted: nn.Module, tmp_path: Path
) -> None:
    run = _started(tmp_path)
    for _ in range(4):
        next(iter(run))
    newest = sorted((tmp_path / "states").iterdir())[-1]
    file = newest / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    assert _equal(_protect(quick_spec(), tmp_path), uninterrupted)


@pytest.mark.parametrize("missing", [None, "kept", "rounds"])
def test_a_state_of_a_version_without_checksums_resumes_or_is_refused(
    missing: str | None, uninterrupted: nn.Module, tmp_path: Path
) -> None:
    run = _started(tmp_path)
    for _ in range(2):
        next(iter(run))
    file = sorted((tmp_path / "states").iterdir())[-1] / "meta.json"
    held = json.loads(file.read_text())
    del held["meta_sha256"]
    if missing is not None:
        del held["meta"][missing]
    file.write_text(json.dumps(held))
    if missing is None:
        assert _equal(_protect(quick_spec(), tmp_path), uninterrupted)
    else:
        with pytest.raises(CheckpointError, match="not whole"):
            _protect(quick_spec(), tmp_path)


def test_a_heavier_domain_is_rehearsed_more_often() -> None:
    heavy = dataclasses.replace(digits(5, 8), weight=3.0)
    light = dataclasses.replace(digits(8, 10), weight=1.0)
    spec = quick_spec(rounds=4, rehearsal=Rehearsal(strategies=2, steps=1, query_batch_size=8))
    run = protect(trained_model(), original=original(), restricted=[light, heavy], spec=spec)
    met = [name for record in run.rounds for name in record.domains]
    assert (met.count(heavy.name), met.count(light.name)) == (6, 2)


def test_reinforcement_trains_batch_norm_too() -> None:
    model = trained_model()
    spec = quick_spec(rounds=1, suppression_rate=1e-12, reinforcement_rate=1e-12)
    spec = spec.model_copy(update={"guard": Guard(every=1, tolerance_points=100.0)})
    result = protect(model, original=original(), restricted=restricted(), spec=spec).model
    moved = dict(result.named_buffers())
    means = [n for n, _ in model.named_buffers() if n.endswith("running_mean")]
    assert means
    assert all(not torch.equal(moved[n], dict(model.named_buffers())[n]) for n in means)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from sophon._base.files import lock_folder\n"
        "lock_folder(Path(sys.argv[1]), Path); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another process is writing"):
            _protect(quick_spec(rounds=1), tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        other.kill()
    _protect(quick_spec(rounds=2), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_planted_link_in_place_of_the_lock_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="it is a link, or another user's"):
        _protect(quick_spec(rounds=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_anything_else_in_it_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    save_file(trained_model().state_dict(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"not empty \(model.safetensors\)"):
        _protect(quick_spec(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_another_specification_is_refused_naming_what_changed(tmp_path: Path) -> None:
    _protect(quick_spec(), tmp_path)
    with pytest.raises(CheckpointError, match=r"protect\.update\.hindrance_rate was .*, is 0\.02"):
        _protect(quick_spec(suppression_rate=0.02), tmp_path)


def test_others_can_read_the_protected_file_as_they_can_the_record_beside_it(
    tmp_path: Path,
) -> None:
    _protect(quick_spec(), tmp_path)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir() if p.is_file()}
    assert modes["model.safetensors"] == modes["run.json"]


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _checkpoints.save_file
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        saved(tensors, path)

    monkeypatch.setattr(_checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        _protect(quick_spec(), tmp_path)
    assert not list((tmp_path / "states").glob(".state.*"))
    monkeypatch.setattr(_checkpoints, "save_file", saved)
    assert _equal(_protect(quick_spec(), tmp_path), _protect(quick_spec()))


def test_a_weight_that_no_attacker_would_take_is_refused(tmp_path: Path) -> None:
    domains = (digits(5, 8), dataclasses.replace(digits(8, 10), weight=1e-6))
    with pytest.raises(SpecError, match=r"digits-8-9.*weight = 1e-06.*raise its weight"):
        protect(
            trained_model(),
            original=original(),
            restricted=domains,
            spec=quick_spec(),
            out=tmp_path / "new",
        )
    assert not (tmp_path / "new").exists()


def test_a_fixed_strategy_is_checked_as_it_will_be_run(tmp_path: Path) -> None:
    def refused(match: str, error: type[Exception], **fixed: Any) -> None:
        held = {"batch_size": 16, **fixed}
        rehearsal = Rehearsal(steps=1, query_batch_size=16, fixed=Strategy(**held))
        with pytest.raises(error, match=match):
            _protect(quick_spec(rehearsal=rehearsal), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    refused("leave no step of 1", SpecError, preparations=(Heal(share=0.5),))
    # 5 % of about 640 images are 33: not 16 and 32.
    refused("fewer than", DataError, data_fraction=0.02)


def test_a_folder_stays_locked_until_the_last_of_this_process_is_gone(tmp_path: Path) -> None:
    def taken_elsewhere() -> bool:
        script = (
            "import sys; from pathlib import Path; from sophon._base.files import lock_folder\n"
            "lock_folder(Path(sys.argv[1]), Path)"
        )
        words = [sys.executable, "-c", script, str(tmp_path)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ended.returncode == 0 or "another process is writing" in ended.stderr
        return ended.returncode != 0

    class Owner:
        pass

    first, second = Owner(), Owner()
    lock_folder(tmp_path, first)
    lock_folder(tmp_path, second)
    del first
    assert taken_elsewhere()
    del second
    assert not taken_elsewhere()
