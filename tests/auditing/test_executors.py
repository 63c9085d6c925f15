"""Workers: each trial is handed over when it is done, and one that kills workers ends alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import sophon._auditing.executors
from sophon._auditing.executors import Processes, Serial, Workload, take_card
from sophon._base.errors import AuditError
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._records.audit_record import Trial
from workloads import Broken, Counting, Holding, Scripted, Unloadable, job


def test_each_trial_is_handed_over_as_it_is_done_and_yielded_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def completed(*_: object) -> object:
        for place in (2, 0, 3, 1):
            events.append(f"done {place}")
            yield place, place

    events: list[str] = []
    monkeypatch.setattr(Serial, "completed", completed)
    here = Serial(Scripted(tmp_path))  # type: ignore[arg-type]
    for trial in here.run((), lambda t: events.append(f"stored {t}")):
        events.append(f"yielded {trial}")
    assert events == [
        *("done 2", "stored 2", "done 0", "stored 0", "yielded 0", "done 3", "stored 3"),
        *("done 1", "stored 1", "yielded 1", "yielded 2", "yielded 3"),
    ]


def test_in_this_process_trials_are_handed_over_too(tmp_path: Path) -> None:
    stored: list[int] = []
    with Serial(Scripted(tmp_path)) as here:  # type: ignore[arg-type]
        jobs = [job("quick", n) for n in range(3)]
        for trial in here.run(jobs, lambda t: stored.append(t.seed)):
            assert stored[-1] == trial.seed
    assert stored == [0, 1, 2]


@pytest.mark.slow
def test_a_slow_trial_in_front_holds_up_none_and_a_deadly_one_ends_none_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sophon._auditing.executors, "ATTEMPTS", 2)
    stored: list[int] = []

    def finished(trial: Trial) -> None:
        stored.append(trial.seed)
        # The first job waits until the one behind it was handed over.
        if trial.seed == 1:
            (tmp_path / "go").touch()

    names = ("waits", "quick", "kills", "quick", "quick")
    workload = Scripted(tmp_path)
    with Processes(workload, 2) as processes:  # type: ignore[arg-type]
        trials = list(processes.run([job(name, n) for n, name in enumerate(names)], finished))
    assert [trial.seed for trial in trials] == [0, 1, 2, 3, 4]
    assert sorted(stored) == [0, 1, 2, 3, 4]
    assert stored[0] == 1
    kinds = [trial.outcome.kind for trial in trials]
    assert kinds == ["completed", "completed", "crashed", "completed", "completed"]
    assert trials[2].outcome.error.startswith("worker died 2 times")  # type: ignore[union-attr]
    assert workload.begun(2) == 2
    # Whoever was under way when a worker died is run again, alone: once is enough.
    assert max(workload.begun(n) for n in (0, 1, 3, 4)) <= 2


@pytest.mark.slow
def test_workers_that_cannot_begin_are_no_fault_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sophon._auditing.executors, "ATTEMPTS", 1)
    early = pytest.raises(AuditError, match="before they were given a trial")
    with Processes(Unloadable(tmp_path), 1) as processes, early:  # type: ignore[arg-type]
        list(processes.run([job("quick", 0)]))
    assert Scripted(tmp_path).begun(0) == 0


def test_workers_take_cards_in_turn_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for index in range(3):
        take_card(torch.device("cuda"), index)
        take_card(torch.device("cuda:1"), index)
        take_card(torch.device("cpu"), index)
    assert taken == [0, 1, 0]


@pytest.mark.slow
def test_each_worker_has_a_number_of_its_own(tmp_path: Path) -> None:
    with Processes(Counting(tmp_path), 2) as processes:  # type: ignore[arg-type]
        list(processes.run([job("quick", 0)]))
    assert sorted(file.name for file in tmp_path.glob("card-*")) == ["card-0", "card-1"]


scale = lambda images: 2 * images  # noqa: E731 - as users write it


def test_a_function_without_a_name_is_said_not_to_be_sent(tmp_path: Path) -> None:
    model = nn.Identity()
    model.transform = scale
    refused = pytest.raises(AuditError, match=r"cannot be sent to a worker .*lambda.*by name")
    with Processes(Holding(tmp_path, model), 2) as processes, refused:  # type: ignore[arg-type]
        list(processes.run([job("quick", 0)]))


def test_a_class_of_a_notebook_is_said_not_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    typed = type("Typed", (nn.Identity,), {"__module__": "__main__"})
    model = nn.Sequential(nn.Identity(), typed())
    refused = pytest.raises(AuditError, match="class Typed was defined in a notebook or a shell")
    with Processes(Holding(tmp_path, model), 2) as processes, refused:  # type: ignore[arg-type]
        list(processes.run([job("quick", 0)]))


@pytest.mark.slow
def test_what_a_worker_cannot_load_is_no_lack_of_memory(tmp_path: Path) -> None:
    refused = pytest.raises(AuditError, match="a worker cannot load the model")
    with Processes(Broken(tmp_path), 1) as processes, refused:  # type: ignore[arg-type]
        list(processes.run([job("quick", 0)]))


def test_a_new_process_can_load_a_model_of_timm(tmp_path: Path) -> None:
    # Beside a torch without CUDA neither timm nor torchvision can be imported unprepared.
    prepare_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("test_resnet", num_classes=2)
    workload = Workload(cast("Any", None), {("unprotected", 0): cast("Any", model)})
    held = tmp_path / "workload.pickle"
    held.write_bytes(pickle.dumps(workload))  # noqa: TID251
    load = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    told = subprocess.run(
        [sys.executable, "-c", load, str(held)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
