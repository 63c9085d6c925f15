"""What a second process brings: strategies per second of protection, trials per second of an audit.

    python benchmarks/ranks.py            # a few minutes on two quiet cores
    python benchmarks/ranks.py --quick    # only sees that it runs

Every process has one thread. One process and two take turns, so that whatever else the machine
does meets both; each ratio is of a turn to the one beside it. Starting processes is left out: a run
lasts hours. Images are random: speed needs no data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sophon._auditing.executors import Executor, Processes, Serial, Workload
from sophon._auditing.ray import RayCluster
from sophon._auditing.trial import Bench, Job, Start
from sophon._base.errors import SpecError
from sophon._data import Domain
from sophon._models import network_identity, weights_sha256
from sophon._models.networks import ResNet20
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import Guard, Strategy
from sophon._training.environment import environment

WORKERS = 2


@dataclass(frozen=True)
class Measured:
    """Values of one row, one for each repeat, and the bar that their median is held against.

    Without values it was not measured, and `note` says why.
    """

    what: str
    values: tuple[float, ...]
    unit: str = ""
    at_least: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Size:
    """How much is run: repeats, and per repeat rounds of so many steps, trials of so many steps."""

    repeats: int
    trial_repeats: int
    rounds: int
    steps: int
    images: int
    trials: int
    trial_steps: int


# Of K = 5 the reinforcement step, which a network with BatchNorm takes whole in every process, is
# so much of a round that two ranks could be 1.7 times as fast at most.
FULL = Size(repeats=3, trial_repeats=2, rounds=1, steps=10, images=500, trials=4, trial_steps=4)
QUICK = Size(repeats=2, trial_repeats=2, rounds=1, steps=1, images=200, trials=2, trial_steps=2)


def domain(name: str, seed: int, count: int) -> Domain:
    """Return random 32x32 images in ten classes."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Domain.from_arrays(name, images, np.arange(count) % 10)


def started(size: Size) -> Protection:
    """Return a protection whose rounds have two strategies, and enough of them."""
    strategy = Strategy(learning_rate=1e-3, batch_size=64)
    rehearsal = Rehearsal(strategies=WORKERS, steps=size.steps, fixed=strategy, query_batch_size=16)
    rounds = size.rounds * (size.repeats + 1) + 1
    spec = ProtectSpec(
        rounds=rounds, rehearsal=rehearsal, guard=Guard(every=rounds), precision="fp32"
    )
    torch.manual_seed(0)
    original, restricted = domain("a", 0, size.images), domain("b", 1, size.images)
    return Protection(ResNet20(), original=original, restricted=restricted, spec=spec, device="cpu")


def _serve(rank: int, world: int, meeting: str, pipe: Connection, size: Size) -> None:
    """Run some rounds whenever asked."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    rounds = iter(started(size))
    pipe.send("ready")
    while pipe.recv():
        for _ in range(size.rounds):
            next(rounds)
        pipe.send("done")
    dist.destroy_process_group()


@contextmanager
def group(world: int, size: Size) -> Iterator[Callable[[], None]]:
    """Start processes of one thread in a group; give what has them run some rounds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            words = (rank, world, f"file://{Path(folder) / 'meeting'}", theirs, size)
            processes.append(context.Process(target=_serve, args=words, daemon=True))
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()

        def run() -> None:
            for pipe in pipes:
                pipe.send(True)
            for pipe in pipes:
                pipe.recv()

        yield run
        for pipe in pipes:
            pipe.send(False)
        for process in processes:
            process.join()


def in_turn(actions: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Return the seconds of each action, `repeats` times. Every other turn goes backwards."""
    seconds: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats):
        order = list(range(len(actions)))
        for index in reversed(order) if repeat % 2 else order:
            start = time.perf_counter()
            actions[index]()
            seconds[index].append(time.perf_counter() - start)
    return seconds


def _compared(
    noun: str, names: Sequence[str], work: int, seconds: list[list[float]], bar: float
) -> Iterator[Measured]:
    """Yield the speed of each, and of each but the first how many times that of the first."""
    for name, held in zip(names, seconds, strict=True):
        yield Measured(f"{noun} a second, {name}", tuple(work / s for s in held), f" {noun}/s")
    for name, held in zip(names[1:], seconds[1:], strict=True):
        ratios = tuple(one / two for one, two in zip(seconds[0], held, strict=True))
        yield Measured(_against(noun, name, names[0]), ratios, "x", bar)


def _against(noun: str, name: str, other: str) -> str:
    return f"{noun}: {name} against {other}"


def protection(size: Size) -> Iterator[Measured]:
    """Yield strategies per second of one rank and of two, reinforcement included."""
    with group(1, size) as one, group(WORKERS, size) as two:
        one()
        two()
        seconds = in_turn([one, two], size.repeats)
    names = ("one rank of one thread", f"{WORKERS} ranks of one thread")
    yield from _compared("strategies", names, WORKERS * size.rounds, seconds, 1.7)


def trials(size: Size) -> Iterator[Measured]:
    """Yield trials per second of one process, of a local pool, and of Ray where it is installed."""
    torch.manual_seed(0)
    model = ResNet20()
    setting = started(size).setting
    restricted = setting.restricted[0]
    held = Start(model, network_identity(model), weights_sha256(model))
    workload = Workload(Bench(setting, 2), {("unprotected", 0): held})
    strategy = Strategy(learning_rate=1e-3, batch_size=64, steps=size.trial_steps)
    jobs = [
        Job("unprotected", restricted.name, strategy, seed, None) for seed in range(size.trials)
    ]
    kinds: dict[str, Callable[[], Executor]] = {
        "one process": lambda: Serial(workload),
        f"pool of {WORKERS}": lambda: Processes(workload, WORKERS),
        f"Ray with {WORKERS}": lambda: RayCluster(workload, WORKERS),
    }
    with ExitStack() as stack:
        executors: dict[str, Executor] = {}
        absent: dict[str, str] = {}
        for name, kind in kinds.items():
            try:
                executors[name] = stack.enter_context(kind())
            except SpecError as error:
                absent[name] = str(error)
        actions = [_running(executor, jobs) for executor in executors.values()]
        # Workers start with their first trials; this process needs but one to be warm.
        for executor in executors.values():
            _running(executor, jobs[:1] if isinstance(executor, Serial) else jobs)()
        seconds = in_turn(actions, size.trial_repeats)
    names = list(executors)
    yield from _compared("trials", names, len(jobs), seconds, 1.8)
    for name, reason in absent.items():
        yield Measured(_against("trials", name, names[0]), (), "x", 1.8, f"not measured: {reason}")


def _running(executor: Executor, jobs: list[Job]) -> Callable[[], None]:
    def run() -> None:
        kinds = {trial.outcome.kind for trial in executor.run(jobs)}
        if kinds != {"completed"}:
            raise RuntimeError(f"trials that did not complete have no speed: {kinds}")

    return run


def measured(quick: bool) -> Iterator[Measured]:
    """Yield all rows."""
    size = QUICK if quick else FULL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from protection(size)
        yield from trials(size)
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Print the rows and where they were measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    quick = parser.parse_args().quick
    where = environment(torch.device("cpu"), "fp32")
    print(f"{where.processor}, one thread a process, {where.precision}, {where.versions}")
    print(f"{'ResNet-20, 32x32':66} median    least .. most")
    for row in measured(quick):
        if not row.values:
            print(f"{row.what:66} {row.note}")
            continue
        values = f"{min(row.values):.3g} .. {max(row.values):.3g}   n = {len(row.values)}"
        bar = "" if row.at_least is None else f"   at least {row.at_least:g}"
        print(f"{row.what:66} {statistics.median(row.values):6.3g}   {values}{bar}")


if __name__ == "__main__":
    main()
