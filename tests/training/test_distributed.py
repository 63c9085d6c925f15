"""Many processes do what one does: weights, resuming, errors, and what they say to each other."""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import denoisers
import pairs
from builders import setting_of
from pairs import Attentive, Pair, network, spec
from sophon._base.errors import RanksError, SpecError, UnsupportedModelError
from sophon._data import load_domain
from sophon._models.networks import SmallConvNet
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.round import Round
from sophon._specs import DomainSpec, Strategy, parse_spec
from sophon._tasks import Classification
from sophon._training.ranks import Ranks, process_group, take_card
from sophon._training.sharding import splits

Outcome = tuple[dict[str, Tensor], list[Round]]

SHARED = Path(__file__).parents[1] / "shared"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def _require_equal(
    first: dict[str, Tensor], second: dict[str, Tensor], within: float = 1e-6
) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=within, atol=within, msg=name)


def _facts(round_: Round) -> dict[str, Any]:
    """Return what must not depend on how many processes ran it."""
    numbers = (
        "suppression_loss",
        "query_score",
        "original_loss",
        "suppression_gradient_norm",
        "reinforcement_gradient_norm",
    )
    rounded = {name: pytest.approx(getattr(round_, name), rel=1e-4, abs=1e-6) for name in numbers}
    return {"strategies": round_.strategies, "domains": round_.domains, **rounded}


CASES: dict[str, tuple[ProtectSpec, dict[str, Any]]] = {
    "fresh, BatchNorm": (spec(), {"name": "batch"}),
    "persistent, BatchNorm, two domains": (
        spec(horizon=7, pool=4, suppression_steps=2),
        {"name": "batch", "count": 2},
    ),
    "four strategies, LayerNorm, a batch that is cut": (
        spec(strategies=4, horizon=5, pool=4),
        {"name": "layer"},
    ),
    "bf16": (spec(precision="bf16"), {"name": "batch"}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(case: str, pair: Pair) -> None:
    given, arguments = CASES[case]
    first, second = pair.both(pairs.finished, given, **arguments)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    weights, rounds = pairs.finished(given, **arguments)
    assert any(
        bool((weights[n] - v).any()) for n, v in network(arguments["name"]).state_dict().items()
    )
    _require_equal(first[0], weights)
    for ours, theirs in zip(first[1], rounds, strict=True):
        assert _facts(ours) == _facts(theirs)
    assert rounds[-1].guard == first[1][-1].guard == "met"


@pytest.mark.usefixtures("one_thread")
def test_erasure_and_retention_are_alike_in_two_processes(pair: Pair) -> None:
    readers = {"views": [2], "depths": ["layers.0", "layers.1"]}
    given = parse_spec(
        ProtectSpec,
        {
            "rounds": 4,
            "guard": {"mode": "price", "every": 2, "tolerance_points": 100.0},
            "original_batch_size": 16,
            "precision": "fp32",
            "keep": [{"kind": "distil"}, {"kind": "retention", "readers": readers}],
            "hinder": [
                {"kind": "erasure", "batch_size": 24, "readers": {**readers, "networks": 1}},
                {
                    "kind": "rehearsal",
                    "strategies": 2,
                    "steps": 1,
                    "horizon": 7,
                    "pool": 2,
                    "query_batch_size": 24,
                    "readers": {**readers, "networks": 1},
                },
            ],
        },
        where="the test",
    )
    first, second = pair.both(pairs.finished, given, "layer")
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    weights, rounds = pairs.finished(given, "layer")
    _require_equal(first[0], weights, within=1e-5)
    for ours, theirs in zip(first[1], rounds, strict=True):
        assert _facts(ours) == _facts(theirs)
        assert ours.readings == pytest.approx(theirs.readings, abs=1e-4)
    assert rounds[-1].price == first[1][-1].price


@pytest.mark.parametrize(
    ("horizon", "name"), [(None, "layer"), (7, "layer"), (None, "convolved"), (7, "convolved")]
)
def test_shards_give_what_the_whole_gives(horizon: int | None, name: str, pair: Pair) -> None:
    given = spec(horizon=horizon, pool=3, strategies=1)
    first, second = pair.both(pairs.finished, given, name, shard=True)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    weights, rounds = pairs.finished(given, name)
    _require_equal(first[0], weights, within=1e-5)
    for ours, theirs in zip(first[1], rounds, strict=True):
        assert _facts(ours) == _facts(theirs)


def test_shards_hold_a_share_of_model_and_attackers(pair: Pair) -> None:
    fixed = Strategy(optimizer="sgd_momentum", learning_rate=1e-3, batch_size=8)
    rehearsal = Rehearsal(steps=2, horizon=9, pool=1, query_batch_size=8, fixed=fixed)
    shares = pair.both(pairs.shares, spec(rehearsal=rehearsal))
    assert sum(share[0] for share in shares) == shares[0][2]
    assert sum(share[1] for share in shares) == 3 * shares[0][2]
    assert all(share[0] < 0.55 * share[2] for share in shares)


def test_a_denoiser_is_protected_as_by_one_process(pair: Pair) -> None:
    rehearsal = Rehearsal(strategies=2, steps=2, query_batch_size=3, horizon=4, pool=2)
    given = denoisers.quick_spec(rounds=3, original_batch_size=5, rehearsal=rehearsal)
    first, second = pair.both(pairs.denoised, given)
    expected = pairs.denoised(given)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        if "to_k.bias" not in name:
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(
    shard: bool, pair: Pair, tmp_path: Path
) -> None:
    given = spec(horizon=7, pool=4)
    expected, rounds = pairs.finished(given, "layer")
    assert pair.both(pairs.abandoned, given, "layer", 2, tmp_path / "a", shard=shard) == [2, 2]
    weights, resumed = pairs.finished(given, "layer", out=tmp_path / "a")
    _require_equal(weights, expected, within=1e-5 if shard else 1e-6)
    assert [r.strategies for r in resumed] == [r.strategies for r in rounds]
    assert pairs.abandoned(given, "layer", 2, tmp_path / "b") == 2
    first, _ = pair.both(pairs.finished, given, "layer", out=tmp_path / "b", shard=shard)
    _require_equal(first[0], expected, within=1e-5 if shard else 1e-6)
    _require_equal(load_file(tmp_path / "b" / "model.safetensors"), first[0], within=0.0)


def test_each_process_holds_its_own_attackers_only(pair: Pair) -> None:
    given = spec(horizon=30, pool=4)
    assert pair.both(pairs.held, given, "layer") == [({0, 2}, 4), ({1, 3}, 4)]


def test_what_is_said_does_not_grow_with_k(pair: Pair) -> None:
    counts = []
    for steps in (2, 6):
        given = spec(steps=steps, checkpoint_every=50, guard=pairs.Guard(every=50))
        counts += pair.both(pairs.counted, given, "batch")
    assert counts[0] == counts[1] == counts[2] == counts[3]
    # A round: one sum of the streamed gradients; of BatchNorm's whole batch numbers and integers.
    assert counts[0] == {
        "all_reduce": 2, "broadcast": 4, "all_gather_object": 0, "send": 0, "recv": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": 3}, "strategies = 3 .* by 2 processes.*multiple of 2, or start 1 or 3"),
        ({"horizon": 7, "pool": 3}, "pool = 3 cannot be shared evenly.* or start 1"),
        ({"strategies": 1}, "strategies = 1 cannot be shared"),
    ],
)
def test_shares_that_are_not_even_are_refused_once(
    changes: dict[str, Any], message: str, pair: Pair, tmp_path: Path
) -> None:
    errors = pair.both(pairs.started, spec(**changes), "layer", out=tmp_path / "new")
    for error in errors:
        with pytest.raises(SpecError, match=message):
            raise error
    assert [error.told for error in errors] == [False, True]
    assert not (tmp_path / "new").exists()


def test_a_folder_that_the_first_cannot_use_stops_all(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    first, second = pair.both(pairs.started, spec(), "layer", out=tmp_path)
    assert "is not empty" in str(first)
    assert isinstance(second, RanksError)
    assert "process 0 of 2: " in str(second)
    assert second.told


def test_a_plain_run_computes_the_whole_batch_in_every_process(pair: Pair) -> None:
    assert pair.both(pairs.divides, spec(), "0") == [True, True]
    assert pair.both(pairs.divides, spec(), "1") == [False, False]


def test_weights_that_drift_apart_are_found_out(pair: Pair) -> None:
    errors = pair.both(pairs.drifting, spec(), "layer")
    assert [type(error) for error in errors] == [RanksError] * 2
    assert "processes 0 and 1 have drifted apart" in str(errors[0])


def test_processes_with_different_models_are_refused(pair: Pair) -> None:
    errors = pair.both(pairs.differing, spec())
    assert all(isinstance(error, SpecError) for error in errors)
    assert "processes 0 and 1 were given another model" in str(errors[0])


@pytest.mark.parametrize(
    ("given", "name", "error", "message"),
    [
        (spec(), "batch", UnsupportedModelError, "BatchNorm, dropout"),
        (spec(query_batch_size=1), "layer", SpecError, "query_batch_size = 1 is fewer"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    given: ProtectSpec, name: str, error: type[Exception], message: str, pair: Pair
) -> None:
    for raised in pair.both(pairs.started, given, name, shard=True):
        with pytest.raises(error, match=message):
            raise raised


def test_one_process_has_no_shards() -> None:
    with pytest.raises(SpecError, match="start them with torchrun"):
        pairs.started(spec(), "layer", shard=True)


def test_torchrun_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpecError, match=r"started 2 processes.*init_process_group"):
        Ranks.present()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (network("layer"), True),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 5)),
            True,
        ),
        (network("batch"), False),
        (Attentive(dropout=0.1), False),
    ],
    ids=["LayerNorm", "GroupNorm", "BatchNorm", "dropout"],
)
def test_a_batch_is_split_only_where_its_rows_are_independent(
    model: nn.Module, expected: bool
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert splits(model, setting_of(model)) == expected
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


class PastTheCall(Classification):
    """Runs the parts of the network, and never calls the whole."""

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        held = images
        for part in model.children():
            held = part(held)
        return held, labels


class Penalised(Classification):
    """Adds a term of the weights to the outputs of a call."""

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        logits, labels = super().outputs(model, images, labels, generator)
        return logits + next(model.parameters()).square().mean(), labels


@pytest.mark.parametrize(
    ("task", "expected"), [(Classification(), True), (PastTheCall(), False), (Penalised(), False)]
)
def test_a_batch_is_split_only_where_outputs_come_from_a_call(
    task: Classification, expected: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    assert splits(model, dataclasses.replace(setting_of(model), task=task)) is expected


@pytest.mark.parametrize("shard", [False, True])
def test_a_state_is_whole_in_the_first_process_alone(shard: bool, pair: Pair) -> None:
    given = spec(horizon=30, pool=4)
    first, second = pair.both(pairs.state, given, "layer", shard=shard)
    assert second == {}
    assert first == pairs.state(given, "layer")


def test_shards_are_gathered_one_tensor_at_a_time(pair: Pair) -> None:
    _, second = pair.both(pairs.most_whole, spec(horizon=30, pool=1, strategies=1), "layer")
    # One, and the one before it.
    assert second <= 2


def test_processes_that_were_called_otherwise_are_refused(pair: Pair, tmp_path: Path) -> None:
    for what in ("out", "shard", "plain"):
        errors = pair.both(pairs.called_otherwise, spec(), what, tmp_path / what)
        assert [type(error) for error in errors] == [SpecError] * 2, errors
        assert f"processes 0 and 1 were given another {what}" in str(errors[0])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), RanksError),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), RanksError),
        (dist.DistNetworkError("the store is gone"), RanksError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError),
        (RuntimeError("Expected all tensors to be on the same device"), RuntimeError),
    ],
    ids=["closed", "timeout", "network", "memory", "device"],
)
def test_only_a_lost_process_is_said_not_to_answer(
    error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected) as raised, Ranks(0, 2).answered():
        raise error
    assert (raised.value is error) == (expected is RuntimeError)


def test_the_first_one_may_measure_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def joined(backend: str, **arguments: Any) -> None:
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", joined)
    with pytest.raises(InterruptedError), process_group():
        pass
    assert given["timeout"] >= datetime.timedelta(hours=2)


@pytest.mark.parametrize(
    ("device", "rank", "world", "expected"),
    [
        (None, "2", 4, [2]),
        ("cuda", "2", 4, [2]),
        ("cuda:1", "2", 4, []),
        ("cpu", "2", 4, []),
        (None, "2", 1, []),
        (None, "4", 8, []),
        (None, None, 4, []),
    ],
    ids=["own", "cuda", "one card", "processor", "alone", "sees fewer", "no torchrun"],
)
def test_processes_in_a_group_of_the_callers_take_cards_of_their_own(
    device: str | None,
    rank: str | None,
    world: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_card(device)
    assert taken == expected


def test_a_protection_takes_its_card_before_anything_is_placed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def taking(device: object) -> None:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr("sophon._protection.protection.take_card", taking)
    with pytest.raises(InterruptedError):
        pairs.started(spec(), "layer")
    assert asked == ["cpu"]


# --- torchrun ---------------------------------------------------------------------------------


RUN = """
[model]
name = "small_convnet"
weights = "letters.safetensors"
in_channels = 1

[original]
source = "embedded"
name = "letters"
limit = 10

[[restricted]]
source = "embedded"
name = "digits"
limit = 12

[protect]
rounds = 40
checkpoint_every = 1
original_batch_size = 16

[protect.rehearsal]
strategies = 2
steps = 2
horizon = 5
pool = 4
query_batch_size = 8

[protect.rehearsal.distribution]
batch_sizes = [8]

[protect.guard]
tolerance_points = 100.0
"""
LETTERS = DomainSpec(source="embedded", name="letters", limit=10)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SmallConvNet(classes=load_domain(LETTERS).class_count, in_channels=1)
    save_file(model.state_dict(), tmp_path / "letters.safetensors")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def _start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_torchrun_is_finished_by_one_process(run_file: Path, tmp_path: Path) -> None:
    rounds = ("--set", "protect.rounds=12")
    words = ("-m", "sophon", "protect", run_file, *rounds, "--json", "--out")
    with _start(*words, tmp_path / "p") as killed:
        assert killed.stdout is not None
        for _ in range(3):
            assert '"event": "round"' in killed.stdout.readline()
        os.killpg(killed.pid, signal.SIGKILL)
    done = len((tmp_path / "p" / "rounds.jsonl").read_text().splitlines())
    assert 3 <= done < 12
    for name in "pq":
        command = [sys.executable, *map(str, words), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT, timeout=120)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "pq")
    _require_equal(first, second)
    assert (tmp_path / "p" / "rounds.jsonl").read_text().count("\n") == 12


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_all_after_a_round(run_file: Path, tmp_path: Path) -> None:
    with _start("-m", "sophon", "protect", run_file, "--json", "--out", tmp_path / "p") as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert err.count("interrupted: to resume, repeat the command: torchrun") == 1
    assert (
        len((tmp_path / "p" / "rounds.jsonl").read_text().splitlines()) == out.count('round"') + 1
    )


FAILING = """
import sys
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import denoisers
import pairs
dist.init_process_group("gloo")
run = pairs.started(pairs.spec(), "layer")
for record in run:
    if dist.get_rank() == 1:
        raise ValueError("the second process gives up")
"""


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(tests=str(SHARED)))
    with _start(script) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "ValueError: the second process gives up" in err


def test_an_error_of_all_is_said_once(run_file: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "p", "--set", "protect.rehearsal.pool=3")
    with _start("-m", "sophon", "protect", run_file, *words) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert err.count("error: protect.hinder: a rehearsal's pool = 3 cannot be shared") == 1
    assert not (tmp_path / "p").exists()
