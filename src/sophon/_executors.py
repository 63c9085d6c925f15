"""Where trials are run: here, one after another, or in worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch

from sophon._data import Domain
from sophon._errors import AuditError
from sophon._records import Trial
from sophon._specs import Strategy, Subject
from sophon._trials import Assignment, Bench, Start

# How often work is given to new workers after some died (killed, out of memory).
ATTEMPTS = 3


class Job(NamedTuple):
    """A trial to run, by names: what a worker needs besides the workload it holds."""

    subject: Subject
    domain: str
    strategy: Strategy
    seed: int
    stop: int | None


@dataclass(frozen=True)
class Workload:
    """Everything that trials share: the bench, the domains and what attacks start from."""

    bench: Bench
    domains: dict[str, Domain]
    starts: dict[tuple[Subject, int], Start]

    def start(self, subject: Subject, seed: int) -> Start:
        """Return what an attack starts from: only a fresh network depends on the seed."""
        return self.starts[subject, seed if subject == "scratch" else 0]

    def run(self, job: Job) -> Trial:
        """Return the finished trial of a job."""
        assignment = Assignment(
            job.subject, self.domains[job.domain], job.strategy, job.seed, job.stop
        )
        return self.bench.run(assignment, self.start(job.subject, job.seed))


class Executor(Protocol):
    """Where jobs are run: a context that yields their trials in their order."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Yield the trials in the order of the jobs."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Serial:
    """Run jobs in this process, one after another."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Yield the trials in the order of the jobs."""
        for job in jobs:
            yield self.workload.run(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class Processes:
    """Run jobs in `workers` processes of one thread each.

    A trial whose worker died is given to another one; it counts once. Raises AuditError if the
    model cannot be sent to another process, or workers keep dying.
    """

    def __init__(self, workload: Workload, workers: int) -> None:
        self.workload = workload
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Yield the trials in the order of the jobs."""
        done, attempts = 0, 0
        while done < len(jobs):
            pool = self._opened()
            try:
                for trial in pool.map(_run, jobs[done:]):
                    attempts = 0
                    done += 1
                    yield trial
            except BrokenProcessPool:
                attempts += 1
                self._close()
                if attempts == ATTEMPTS:
                    raise AuditError(
                        f"workers died {attempts} times in a row without finishing a trial: lower"
                        " --workers, there may be too little memory; finished trials are kept"
                    ) from None
            except (AttributeError, TypeError) as error:
                # What pickle says of classes made inside functions and the like.
                if "pickle" not in str(error):
                    raise
                raise AuditError(
                    f"the model cannot be sent to a worker ({error}): define its class in a module,"
                    " or use one worker"
                ) from None

    def _opened(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                # Forking a process whose threads compute can leave the child waiting for ever.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self.workload,),
            )
        return self._pool

    def _close(self, *, at_once: bool = False) -> None:
        if self._pool is None:
            return
        # Trials under way are run again when the audit is repeated; nobody waits for them.
        for worker in list((self._pool._processes or {}).values()) if at_once else ():
            worker.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(at_once=kind is not None)


_held: list[Workload] = []


def _begin(workload: Workload) -> None:
    # Ctrl-C reaches the whole group; the process that was asked ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _held.append(workload)


def _run(job: Job) -> Trial:
    return _held[-1].run(job)
