"""Trials on a Ray cluster: the same record as here, and none lost with a worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch

from builders import original, restricted, scratch_model, trained_model
from ray_models import FatalOnce, Switched
from sophon._auditing.audit import Audit
from sophon._auditing.executors import ATTEMPTS
from sophon._auditing.ray import RayCluster
from sophon._auditing.trial import Job
from sophon._base.errors import AuditError, SpecError
from sophon._base.plain_mode import SWITCH
from sophon._records.audit_record import Trial
from sophon._specs import AuditSpec
from workloads import Scripted, job

ray = pytest.importorskip("ray", reason="ray is not installed")
SPEC = AuditSpec(steps=2, evaluations=2, batch_size=16, precision="fp32")

SHARED = Path(__file__).parents[1] / "shared"


@pytest.fixture(autouse=True)
def modules_for_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers import the builders of the tests."""
    here = str(SHARED)
    held = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(held))
    # Ray warns of a default that it will change.
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield
    ray.shutdown()


def _facts(run: Audit) -> list[object]:
    trials = list(run)
    return [trial.model_dump(exclude={"wall_s", "environment"}) for trial in trials]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cluster_of_two_workers_gives_the_same_trials_though_one_is_killed(
    tmp_path: Path,
) -> None:
    model = FatalOnce(classes=5, in_channels=1)
    model.load_state_dict(trained_model().state_dict())
    model.marker = tmp_path / "killed"
    run = Audit(
        model,
        original=original(),
        restricted=restricted(),
        spec=SPEC,
        scratch=scratch_model,
        store=tmp_path,
        workers=2,
        executor="ray",
    )
    found = _facts(run)
    assert model.marker.exists()
    keys = [trial["key"] for trial in found]  # type: ignore[index]
    assert len(set(keys)) == len(keys) == 24
    assert len(list((tmp_path / "trials").glob("*.json"))) == 24
    here = Audit(
        model, original=original(), restricted=restricted(), spec=SPEC, scratch=scratch_model
    )
    assert _facts(here) == found


class _Task:
    """Stands in for a function that a cluster runs."""

    def remote(self, *arguments: object) -> tuple[object, ...]:
        return arguments


class _Cluster:
    """Stands in for the module `ray`: of the jobs under way the last one given is done first."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.puts = 0
        self.cards = 0.0
        self.share = -1.0

    def put(self, workload: Scripted) -> Scripted:
        self.puts += 1
        return workload

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, **({"GPU": self.cards} if self.cards else {})}

    def remote(self, **options: float) -> Callable[[object], _Task]:
        assert options["max_retries"] == ATTEMPTS - 1
        self.share = options["num_gpus"]
        return lambda _: _Task()

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[-num_returns:], running[:-num_returns]

    def get(self, reference: tuple[Scripted, Job, str]) -> Trial:
        workload, one, _ = reference
        if one.domain == "kills":
            raise ray.exceptions.WorkerCrashedError
        if one.domain == "lost":
            raise ray.exceptions.NodeDiedError("gone")
        return workload.run(one)


def _faked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RayCluster, _Cluster]:
    module = _Cluster()
    monkeypatch.setattr("sophon._auditing.ray.require_ray", lambda: module)
    monkeypatch.setattr(RayCluster, "_connect", lambda *_: None)
    return RayCluster(Scripted(folder), 2), module  # type: ignore[arg-type]


def test_a_cluster_hands_trials_over_as_they_are_done_and_goes_on_after_a_deadly_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, module = _faked(tmp_path, monkeypatch)
    stored: list[int] = []
    jobs = [job(does, n) for n, does in enumerate(("quick", "quick", "kills", "quick"))]
    trials = list(cluster.run(jobs, lambda trial: stored.append(trial.seed)))
    assert stored == [1, 2, 3, 0]
    assert [trial.seed for trial in trials] == [0, 1, 2, 3]
    kinds = [trial.outcome.kind for trial in trials]
    assert kinds == ["completed", "completed", "crashed", "completed"]
    assert trials[2].outcome.error.startswith(f"worker died {ATTEMPTS} times")  # type: ignore[union-attr]
    # A later stage finds model and images where they are.
    assert len(list(cluster.run(jobs[:1]))) == 1
    assert module.puts == 1


@pytest.mark.parametrize(
    ("device", "cards", "workers", "share"),
    [
        ("cpu", 4, 2, 0),
        ("cuda", 0, 2, 0),
        ("cuda:1", 4, 2, 0),
        ("cuda", 4, 2, 1),
        ("cuda", 2, 4, 1 / 2),
        ("cuda", 2, 3, 1 / 2),
    ],
)
def test_workers_of_a_cluster_take_cards_where_there_are_some(
    device: str,
    cards: int,
    workers: int,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, module = _faked(tmp_path, monkeypatch)
    cluster.workload.device = torch.device(device)  # type: ignore[misc]
    cluster.workers, module.cards = workers, float(cards)
    list(cluster.run([job("quick", 0)]))
    assert module.share == share


def test_a_cluster_that_loses_machines_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, _ = _faked(tmp_path, monkeypatch)
    with pytest.raises(AuditError, match="see that all its machines are up"):
        list(cluster.run([job("lost", 0)]))


@pytest.mark.parametrize(
    "error", [TypeError("Could not serialize\na long report"), PicklingError("Could not serialize")]
)
def test_what_cannot_be_sent_to_a_cluster_is_an_error_of_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, module = _faked(tmp_path, monkeypatch)

    def failing(workload: object) -> object:
        raise error

    monkeypatch.setattr(module, "put", failing)
    with pytest.raises(AuditError, match=r"cannot be sent to a worker \(Could not serialize\)"):
        list(cluster.run([job("quick", 0)]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_that_do_not_inherit_the_switch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    with RayCluster(Switched(), 1) as cluster:  # type: ignore[arg-type]
        # As a cluster that was started elsewhere, this one was without the switch.
        for value in ("1", "0"):
            monkeypatch.setenv(SWITCH, value)
            assert list(cluster.run([None])) == [value == "1"]  # type: ignore[list-item,comparison-overlap]


def test_what_cannot_be_used_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**arguments: object) -> Audit:
        return Audit(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec=SPEC,
            **arguments,  # type: ignore[arg-type]
        )

    with pytest.raises(SpecError, match="'slurm': use processes or ray"):
        make(executor="slurm")
    with pytest.raises(SpecError, match="is for executor = 'ray'"):
        make(address="10.0.0.1:6379")

    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("sophon._base.torchvision_patch.importlib.import_module", missing)
    with pytest.raises(SpecError, match=r"'\.\[cluster\]'"):
        make(executor="ray")


def test_a_cluster_that_does_not_answer_is_an_error() -> None:
    run = Audit(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=SPEC,
        executor="ray",
        address="127.0.0.1:1",
    )
    with pytest.raises(AuditError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        list(run)
