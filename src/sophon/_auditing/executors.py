"""Where trials are run: here, one after another, or in worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

import torch

from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import AuditError
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._records.audit_record import Trial
from sophon._specs import Subject

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

# How many deaths of its workers (killed, out of memory) end a trial.
ATTEMPTS = 3
Finished = Callable[[Trial], object]


def lost(attempts: int) -> str:
    """Return the error of a trial whose workers died so many times."""
    return f"worker died {attempts} times on this trial: killed, or too little memory"


def unheard(_: Trial) -> None:
    """Do nothing with a finished trial."""


@dataclass(frozen=True)
class Workload:
    """Everything that trials share: the bench, and what attacks start from."""

    bench: Bench
    starts: dict[tuple[Subject, int], Start]

    def __reduce__(self) -> tuple[Callable[..., Workload], tuple[Any, ...]]:
        """Have the process that unpickles this prepare itself before it imports what models are."""
        return _unpacked, (_Preparation(), self.bench, self.starts)

    @property
    def device(self) -> torch.device:
        """Where trials compute."""
        return self.bench.setting.device

    def start(self, subject: Subject, seed: int) -> Start:
        """Return what an attack starts from: only a fresh network depends on the seed."""
        return self.starts[subject, seed if subject == "scratch" else 0]

    def run(self, job: Job) -> Trial:
        """Return the finished trial of a job."""
        return self.bench.run(job, self.start(job.subject, job.seed))

    def crashed(self, job: Job, error: str) -> Trial:
        """Return the trial of a job that could not be finished."""
        return self.bench.crashed(job, self.start(job.subject, job.seed), error)


class Executor(AbstractContextManager["Executor"]):
    """Where jobs are run: a context that yields their trials in their order."""

    def __init__(self, workload: Workload, workers: int = 1) -> None:
        self.workload = workload
        self.workers = workers

    def __exit__(self, *exception: object) -> None:
        return None

    @abstractmethod
    def completed(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Trial]]:
        """Yield the place of each job and its trial, as they are done."""

    def run(self, jobs: Sequence[Job], finished: Finished = unheard) -> Iterator[Trial]:
        """Yield the trials in the order of the jobs; call `finished` with each once it is done.

        A trial is done before it is yielded, often long before: one in front may take longer.
        """
        held: dict[int, Trial] = {}
        following = 0
        for place, trial in self.completed(jobs):
            finished(trial)
            held[place] = trial
            while following in held:
                yield held.pop(following)
                following += 1


class Serial(Executor):
    """Run jobs in this process, one after another."""

    def completed(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Trial]]:
        """Yield each job's place and trial."""
        return ((place, self.workload.run(job)) for place, job in enumerate(jobs))


class Processes(Executor):
    """Run jobs in `workers` processes of one thread each, on a card each where there are cards.

    More workers than cards share them. A trial whose worker died is given to another one; it counts
    once. After `ATTEMPTS` deaths it has crashed, and the others go on. Raises AuditError if the
    model cannot be sent to another process, or workers die before they are given a trial.
    """

    def __init__(self, workload: Workload, workers: int) -> None:
        super().__init__(workload, workers)
        self._pool: ProcessPoolExecutor | None = None
        # The first task of the pool, which does nothing; pools in a row that did not get there.
        self._first: Future[None] | None = None
        self._stillborn = 0

    def run(self, jobs: Sequence[Job], finished: Finished = unheard) -> Iterator[Trial]:
        """Yield the trials in the order of the jobs; see `Executor`."""
        try:
            yield from super().run(jobs, finished)
        except (AttributeError, TypeError, PicklingError) as error:
            # What pickle says of classes and functions made inside functions, lambdas and the like.
            if "pickle" not in str(error).lower():
                raise
            raise AuditError(
                f"the model cannot be sent to a worker ({error}): define its class, and functions"
                " that it holds, by name in a module, or use one worker"
            ) from None

    def completed(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Trial]]:
        """Yield the place of each job and its trial, as they are done."""
        waiting = deque(enumerate(jobs))
        while waiting:
            running: dict[Future[Trial], tuple[int, Job]] = {}
            try:
                while waiting or running:
                    # No more than are computed: of all others it is known that they killed nobody.
                    while waiting and len(running) < self.workers:
                        running[self._submit(waiting[0][1])] = waiting[0]
                        waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        trial = future.result()
                        yield running.pop(future)[0], trial
            except BrokenProcessPool:
                at_work = self._buried()
                whole = [f for f in running if f.done() and f.exception() is None]
                yield from [(running.pop(future)[0], future.result()) for future in whole]
                left = sorted(running.values(), key=lambda one: one[0])
                if at_work:
                    # Nobody knows which of them it was: alone it will show.
                    yield from ((place, self._alone(job)) for place, job in left)
                else:
                    waiting.extendleft(reversed(left))

    def _alone(self, job: Job) -> Trial:
        """Return the trial of a job whose worker may have died once, no other being under way."""
        deaths = 1
        while deaths < ATTEMPTS:
            try:
                return self._submit(job).result()
            except BrokenProcessPool:
                deaths += self._buried()
        return self.workload.crashed(job, lost(deaths))

    def _submit(self, job: Job) -> Future[Trial]:
        if self._pool is None:
            _require_importable(self.workload)
            # Forking a process whose threads compute can leave the child waiting for ever.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=context,
                initializer=_begin,
                initargs=(self.workload, context.Value("i", 0)),
            )
            self._first = self._pool.submit(_begun)
        return self._pool.submit(_run, job)

    def _buried(self) -> bool:
        """Close the pool of a worker that died; return whether workers had begun to work.

        Raises AuditError if they did not, time and again: then no trial is to blame.
        """
        begun = self._first is not None and self._first.done() and not self._first.exception()
        workers = [] if self._pool is None else list((self._pool._processes or {}).values())
        self._close()
        self._stillborn = 0 if begun else self._stillborn + 1
        # What Python itself ends with after an error; a signal's is negative.
        if not begun and any((worker.exitcode or 0) > 0 for worker in workers):
            raise AuditError(
                "a worker cannot load the model (its error is above): define its class, and all"
                " that it holds, in a module that can be imported without an error, or use one"
                " worker; finished trials are kept"
            ) from None
        if self._stillborn == ATTEMPTS:
            raise AuditError(
                f"workers died {ATTEMPTS} times in a row before they were given a trial: lower"
                " --workers, there may be too little memory; finished trials are kept"
            ) from None
        return begun

    def _close(self, *, at_once: bool = False) -> None:
        if self._pool is None:
            return
        # Trials under way are run again when the audit is repeated; nobody waits for them.
        for worker in list((self._pool._processes or {}).values()) if at_once else ():
            worker.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def __exit__(self, *exception: object) -> None:
        self._close(at_once=exception[0] is not None)


def _require_importable(workload: Workload) -> None:
    """Raise AuditError if the class of a model was typed in: a new process cannot import that."""
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) or getattr(main, "__spec__", None):
        return
    for start in workload.starts.values():
        for part in start.model.modules():
            if type(part).__module__ == "__main__":
                raise AuditError(
                    f"the model's class {type(part).__name__} was defined in a notebook or a"
                    " shell, where workers cannot find it: put it into a module and import it, or"
                    " use one worker"
                )


class _Preparation:
    """Pickles as a call: whoever unpickles it lets torchvision, and so timm, load."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return prepare_torchvision, ()


def _unpacked(_: None, bench: Bench, starts: dict[tuple[Subject, int], Start]) -> Workload:
    return Workload(bench, starts)


_held: list[Workload] = []


def take_card(device: torch.device, index: int) -> None:
    """Have this process compute on card `index`, counted round, unless `device` is one card."""
    if device == torch.device("cuda"):
        torch.cuda.set_device(index % torch.cuda.device_count())


def _begin(workload: Workload, begun: Synchronized[int]) -> None:
    # Ctrl-C reaches the whole group; the process that was asked ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One that is killed cannot: its workers would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with begun.get_lock():
        index, begun.value = begun.value, begun.value + 1
    take_card(workload.device, index)
    _held.append(workload)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begun() -> None:
    """Do nothing: that it is done says that a worker could begin."""


def _run(job: Job) -> Trial:
    return _held[-1].run(job)
