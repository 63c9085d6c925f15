"""Trials on a Ray cluster: an extra, `pip install -c constraints.txt '.[cluster]'`.

Ray gives the trial of a worker that died to another one; it counts once. After some deaths it has
crashed.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

from sophon._auditing.executors import ATTEMPTS, Executor, Workload, lost
from sophon._auditing.trial import Job
from sophon._base.errors import AuditError, SpecError, first_line
from sophon._base.plain_mode import SWITCH
from sophon._base.torchvision_patch import installing, library
from sophon._records.audit_record import Trial

if TYPE_CHECKING:
    import torch


class RayCluster(Executor):
    """Run up to `workers` jobs at once, of one thread each, on the cluster at `address`.

    Where it has cards each job takes one, or a part if there are fewer cards than workers. Without
    an address a cluster of so many processors is started on this machine. Every machine of the
    cluster needs this version of sophon and the module of the model. Raises SpecError if Ray cannot
    be imported, AuditError if the cluster cannot be reached or cannot run trials.
    """

    def __init__(self, workload: Workload, workers: int, address: str | None = None) -> None:
        super().__init__(workload, workers)
        self._ray = require_ray()
        # The workload in Ray's own store, from the first trial on.
        self._held: Any = None
        self._connect(address)

    def _connect(self, address: str | None) -> None:
        # Ray itself would try for minutes.
        _require_answer(address)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        local = {"num_cpus": self.workers, "include_dashboard": False}
        try:
            self._ray.init(address=address or "local", **quiet, **({} if address else local))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise AuditError(_no_answer(address, error)) from None

    def completed(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Trial]]:
        """Yield the place of each job and its trial, as they are done."""
        ray: Any = self._ray
        share = _share_of_a_card(
            self.workload.device, self.workers, int(ray.cluster_resources().get("GPU", 0))
        )
        task = ray.remote(num_cpus=1, num_gpus=share, max_retries=ATTEMPTS - 1)(_run)
        if self._held is None:
            self._held = self._put()
        # Only a cluster on this machine would inherit it.
        switch = os.environ.get(SWITCH, "")
        waiting = deque(enumerate(jobs))
        running: dict[Any, tuple[int, Job]] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                place, job = waiting.popleft()
                running[task.remote(self._held, job, switch)] = (place, job)
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                place, job = running.pop(reference)
                yield place, self._result(reference, job)

    def _put(self) -> Any:
        """Return the workload in Ray's store; AuditError if it cannot be sent there."""
        try:
            return self._ray.put(self.workload)
        except (AttributeError, TypeError, PicklingError) as error:
            # Ray adds a report of many lines.
            line = first_line(error, 1000)
            raise AuditError(
                f"the model cannot be sent to a worker ({line}): leave out what it holds besides"
                " weights, such as open files, locks and generators, or use one worker"
            ) from None

    def _result(self, reference: Any, job: Job) -> Trial:
        exceptions: Any = self._ray.exceptions
        try:
            trial: Trial = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            # A trial never raises: something of the workload could not be loaded over there.
            raise AuditError(
                f"a worker cannot run trials ({error.cause!r}): install this version of sophon and"
                " the module of the model on every machine; finished trials are kept"
            ) from None
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError):
            return self.workload.crashed(job, lost(ATTEMPTS))
        except exceptions.RayError as error:
            raise AuditError(
                f"the cluster lost a trial ({type(error).__name__}: {error}): see that all its"
                " machines are up, then repeat the command; finished trials are kept"
            ) from None
        return trial

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()


def _share_of_a_card(device: torch.device, workers: int, cards: int) -> float:
    """Return what part of a card each worker takes; 0 where trials need none, or all that one."""
    # A numbered card is one of those that the job would see without Ray's choice.
    return 1 / math.ceil(workers / cards) if str(device) == "cuda" and cards else 0


def _require_answer(address: str | None) -> None:
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise AuditError(_no_answer(address, error)) from None


def _no_answer(address: str | None, error: Exception) -> str:
    return (
        f"no Ray cluster answers at {address!r} ({error}): start one with `ray start --head`, or"
        " correct --address"
    )


def require_ray() -> Any:
    """Return the module `ray`, which reports no usage; SpecError if it cannot be imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray makes workers the last to get processor time; a forecast could not be kept then.
    os.environ.setdefault("RAY_worker_niceness", "0")
    remedy = f"{installing('cluster')}; or use --workers alone"
    library("ray.exceptions", "ray cannot be imported", remedy, SpecError)
    return library("ray", "ray cannot be imported", remedy, SpecError)


def _run(workload: Workload, job: Job, switch: str) -> Trial:
    import torch

    os.environ[SWITCH] = switch
    torch.set_num_threads(1)
    return workload.run(job)
