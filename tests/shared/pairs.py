"""Two processes of one group that wait for work, and the small networks they protect."""

from __future__ import annotations

import functools
import multiprocessing
import os
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import denoisers
from builders import digits, original, restricted
from sophon._base.plain_mode import SWITCH
from sophon._data import Domain
from sophon._protection.protection import Protection, protect
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._records.round import Round
from sophon._specs import FreshHead, Guard, Heal, NoiseKick, Preparation, RescaleWeights
from sophon._tasks import Denoising
from sophon._training.loop import optimizer_tensors

WORLD = 2
PREPARATIONS: tuple[tuple[Preparation, ...], ...] = (
    (),
    (FreshHead(),),
    (NoiseKick(relative_std=0.01), RescaleWeights(norm=2.0)),
    (Heal(share=0.3),),
)


class Normalised(nn.Module):
    """Two convolutions with BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        held = self.bn1(self.first(images)).relu()
        held = self.bn2(self.second(held)).relu()
        logits: Tensor = self.head(held.mean((2, 3)))
        return logits


class Attentive(nn.Module):
    """A transformer of two layers without biases.

    The bias of an attention's keys changes nothing: its gradient is rounding, which Adam enlarges.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, 2, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                8, 2, 16, dropout=dropout, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        held = self.embed(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            held = layer(held)
        logits: Tensor = self.head(self.norm(held.mean(1)))
        return logits


class Convolved(Attentive):
    """The same after a convolution whose weights have another layout with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(1, 8, 2, 2, bias=False),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
        )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch": Normalised,
    "layer": Attentive,
    "convolved": Convolved,
}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().eval()


def spec(**changes: Any) -> ProtectSpec:
    """Return four rounds; changes that are the rehearsal's go there."""
    rehearsal: dict[str, Any] = {"strategies": 2, "steps": 3, "query_batch_size": 7}
    inner = {key: changes.pop(key) for key in list(changes) if key in Rehearsal.model_fields}
    rates: Any = {"sgd_momentum": (1e-3, 1e-2), "adam": (1e-4, 1e-3), "adagrad": (1e-4, 1e-3)}
    distribution = StrategyDistribution(
        learning_rates=rates, preparations=PREPARATIONS, batch_sizes=(9, 16)
    )
    return ProtectSpec(
        **{
            "rounds": 4,
            "guard": Guard(every=2, tolerance_points=100.0),
            "checkpoint_every": 1,
            "original_batch_size": 15,
            "precision": "fp32",
            "rehearsal": Rehearsal(distribution=distribution, **(rehearsal | inner)),
            **changes,
        }
    )


def domains(count: int) -> tuple[Domain, ...]:
    return (restricted(),) if count == 1 else (digits(5, 8), digits(7, 10))


def started(
    given: ProtectSpec, name: str, *, count: int = 1, out: Path | None = None, shard: bool = False
) -> Protection:
    """Return a protection on the processor, no round of it done."""
    return Protection(
        network(name),
        original=original(),
        restricted=domains(count),
        spec=given,
        out=out,
        shard=shard,
        device="cpu",
    )


def finished(
    given: ProtectSpec, name: str, *, count: int = 1, out: Path | None = None, shard: bool = False
) -> tuple[dict[str, Tensor], list[Round]]:
    """Return the weights after the whole run, and its rounds."""
    run = started(given, name, count=count, out=out, shard=shard)
    for _ in run:
        pass
    return run.result().model.state_dict(), run.rounds


# --- The pair ---------------------------------------------------------------------------------


def _serve(rank: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    while True:
        work = pipe.recv()
        if work is None:
            break
        try:
            pipe.send((work(), None))
        except Exception as error:  # noqa: BLE001 - goes to the test
            pipe.send((None, error))
    dist.destroy_process_group()


class Pair:
    """Two processes in one group: what is given to them runs in both at once."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            words = (rank, f"file://{folder / 'meeting'}", theirs)
            self.processes.append(context.Process(target=_serve, args=words, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def both(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the function returned, or the error it raised, in each process."""
        for pipe in self.pipes:
            pipe.send(functools.partial(function, *args, **kwargs))
        results = []
        for pipe in self.pipes:
            assert pipe.poll(120), "a process does not answer"
            result, error = pipe.recv()
            results.append(result if error is None else error)
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


# --- What they are given besides ---------------------------------------------------------------


def _rehearsal(run: Protection) -> RehearsalTerm:
    (term,) = run.hinder
    assert isinstance(term, RehearsalTerm)
    return term


def abandoned(given: ProtectSpec, name: str, rounds: int, out: Path, *, shard: bool = False) -> int:
    """Run some rounds only; return how many are done."""
    run = started(given, name, out=out, shard=shard)
    for record in run:
        if record.index + 1 == rounds:
            break
    return run.done


def counted(given: ProtectSpec, name: str) -> dict[str, int]:
    """Return how often each collective was called in two rounds without a check of the guard."""
    run = started(given, name)
    names = ("all_reduce", "broadcast", "all_gather_object", "send", "recv")
    calls = dict.fromkeys(names, 0)
    plain = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return plain[name](*args, **kwargs)

        return call

    try:
        for called in names:
            setattr(dist, called, counting(called))
        rounds = iter(run)
        next(rounds)
        next(rounds)
    finally:
        for called, function in plain.items():
            setattr(dist, called, function)
    return calls


def drifting(given: ProtectSpec, name: str) -> None:
    """Move a weight of the second process by the least that a number can move."""
    run = started(given, name)
    if run.ranks.rank == 1:
        with torch.no_grad():
            weight = next(run.model.parameters())
            weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(torch.inf))
    run.guard.observe(0.0)
    run.guard.check(1)


def differing(given: ProtectSpec) -> None:
    """Give each process another model."""
    model = network("layer", seed=dist.get_rank())
    Protection(model, original=original(), restricted=domains(1), spec=given)


def state(given: ProtectSpec, name: str, *, shard: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a state after a round; all of them whole, or it fails."""
    run = started(given, name, shard=shard)
    next(iter(run))
    tensors, _ = run.whole_state()
    assert all(type(value) in (Tensor, nn.Parameter) for value in tensors.values())
    return {name: tuple(value.shape) for name, value in tensors.items()}


def most_whole(given: ProtectSpec, name: str) -> int:
    """Return how many gathered tensors live at once while a state and an attacker are made."""
    from torch.distributed.tensor import DTensor

    run = started(given, name, shard=True)
    next(iter(run))
    made: list[weakref.ref[Tensor]] = []
    alive = []
    gather = DTensor.full_tensor

    def gathering(value: DTensor) -> Tensor:
        result = gather(value)
        made.append(weakref.ref(result))
        alive.append(sum(held() is not None for held in made))
        return result

    with mock.patch.object(DTensor, "full_tensor", gathering):
        run.whole_state()
        _rehearsal(run)._copy(run.model)
    return max(alive)


def called_otherwise(given: ProtectSpec, what: str, folder: Path) -> None:
    """Give the second process a folder, shards, or the switch, where the first has none."""
    second = dist.get_rank() == 1
    with mock.patch.dict(os.environ, {SWITCH: str(int(second and what == "plain"))}):
        started(
            given,
            "layer",
            out=folder if second and what == "out" else None,
            shard=second and what == "shard",
        )


def divides(given: ProtectSpec, plain: str) -> bool:
    """Return whether reinforcement splits its batch, with or without the switch."""
    with mock.patch.dict(os.environ, {SWITCH: plain}):
        return started(given, "layer").keep.split


def held(given: ProtectSpec, name: str) -> tuple[set[int], int]:
    """Return the slots whose attackers this process holds after a few rounds, and all slots."""
    run = started(given, name)
    for _ in run:
        pass
    return set(_rehearsal(run).pool), len(_rehearsal(run).occupants)


def shares(given: ProtectSpec) -> tuple[int, int, int]:
    """Return how many numbers of the weights this process holds of the model, how many of its one
    attacker with its displacement and moments, and how many weights there are.
    """
    run = started(given, "layer", shard=True)
    next(iter(run))
    (attacker,) = _rehearsal(run).pool.values()
    moments, _ = optimizer_tensors(attacker.tuning.optimizer)
    tensors = [*attacker.model.parameters(), *attacker.displacement.values(), *moments.values()]
    return _held(list(run.model.parameters())), _held(tensors), _all(list(run.model.parameters()))


def _held(tensors: list[Any]) -> int:
    return sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)


def _all(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def denoised(given: ProtectSpec) -> dict[str, Tensor]:
    """Return the weights of a protected diffusion model."""
    low, high = denoisers.digits(0, 5), denoisers.digits(5, 10)
    model, task = denoisers.unet(), Denoising()
    result = protect(
        model, original=low, restricted=high, task=task, spec=given, device="cpu"
    ).model
    return result.state_dict()
