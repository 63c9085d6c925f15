"""Many processes on one run: which one this is, sums over all, and one voice for errors.

`torchrun` starts the processes. Each rehearses its own attackers; everything else is the same in
all of them. `Ranks()` is a process on its own: every operation is then the identity, so the plain
path and the shared one are the same code.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sophon._base.errors import RanksError, SophonError, SpecError, first_line

# One that ends is noticed at once; the others wait while the first one measures and writes alone.
_PATIENCE = datetime.timedelta(hours=6)
# What gloo and NCCL say of a process that is gone or silent.
_GONE = (
    *("connection", "timed out", "timeout", "broken pipe"),
    *("socket closed", "aborted", "network error"),
)


def launched() -> bool:
    """Return whether torchrun started several processes, of which this is one."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and dist.is_available() and dist.is_torchelastic_launched()


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this is number `rank` of `world`.

    `sharded` says that all of them work on the same attacker, each with its rows of the batch,
    rather than each on attackers of its own.
    """

    rank: int = 0
    world: int = 1
    backend: str = "none"
    sharded: bool = False

    @classmethod
    def present(cls, *, sharded: bool = False) -> Ranks:
        """Return the processes of the default group, or this one alone.

        Raises SpecError where torchrun started several and there is no group, each would do all of
        the work; or where one alone is to hold all shards.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), dist.get_backend(), sharded)
        if launched():
            raise SpecError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, and each would do all of"
                " the work: call torch.distributed.init_process_group() first"
            )
        if sharded:
            raise SpecError(
                "--shard spreads the model over several processes: start them with torchrun"
            )
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Return whether what bears this number is this process's share of the work."""
        return self.sharded or index % self.world == self.rank

    # --- tensors -----------------------------------------------------------------------------

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of some floating tensors by its sum over all processes; one collective."""
        if self.world == 1 or self.sharded:
            return
        flat = _flat(tensors, self.wire)
        with self.answered():
            dist.all_reduce(flat)
        _unpack(flat, tensors)

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the first process's; a collective for numbers, one for integers."""
        floating = [t for t in tensors if t.is_floating_point()]
        for group in (floating, [t for t in tensors if not t.is_floating_point()]):
            if not group or self.world == 1:
                continue
            flat = _flat(group, self.wire)
            with self.answered():
                dist.broadcast(flat, 0)
            _unpack(flat, group)

    def require_same(self, identity: dict[str, str]) -> None:
        """Raise SpecError unless all processes were given the same run."""
        for rank, other in enumerate(self.gather(identity)):
            names = dict.fromkeys([*identity, *other])
            different = [name for name in names if identity.get(name) != other.get(name)]
            if different:
                raise _hushed(
                    SpecError(
                        f"processes {self.rank} and {rank} were given another"
                        f" {' and '.join(different)}: give all the same, a seeded model among it"
                    ),
                    told=not self.first,
                )

    def require_equal(self, tensors: Sequence[Tensor]) -> None:
        """Raise RanksError unless all processes hold the same bits, as far as a checksum tells."""
        if self.world == 1 or self.sharded:
            return
        checksums = self.gather([_checksum(tensor) for tensor in tensors])
        differing = [rank for rank, held in enumerate(checksums) if held != checksums[0]]
        if differing:
            raise RanksError(
                f"the weights of processes 0 and {differing[0]} have drifted apart: start all on"
                " the same kind of machine with the same libraries; states written before are kept"
            )

    def collect(
        self, plain: list[Any], tensors: dict[str, Tensor]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Return, in the first process, the values and tensors of all; elsewhere its own."""
        if self.world == 1 or self.sharded:
            return plain, tensors
        parts = self.gather((plain, _layout(tensors)))
        if not self.first:
            with self.answered():
                for value in tensors.values():
                    dist.send(value.detach().to(self.wire).contiguous(), 0)
            return plain, tensors
        everything = dict(tensors)
        for rank, (_, layout) in enumerate(parts):
            for name, shape, dtype in layout if rank else ():
                wire = torch.empty(shape, dtype=dtype, device=self.wire)
                with self.answered():
                    dist.recv(wire, rank)
                everything[name] = wire.cpu()
        return [value for values, _ in parts for value in values], everything

    def from_first(self, state: tuple[dict[str, Tensor], Any] | None) -> Any:
        """Return the tensors and values that the first process holds, or its None."""
        if self.world == 1:
            return state
        sent = None if state is None else (_layout(state[0]), state[1])
        held = [sent if self.first else None]
        with self.answered():
            dist.broadcast_object_list(held, 0)
        if held[0] is None:
            return None
        tensors = {} if state is None else state[0]
        for name, shape, dtype in held[0][0]:
            wire = torch.empty(shape, dtype=dtype, device=self.wire)
            if self.first:
                wire.copy_(tensors[name])
            with self.answered():
                dist.broadcast(wire, 0)
            tensors[name] = wire.cpu()
        return tensors, held[0][1]

    # --- values and errors -------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Return the plain value of every process, by rank."""
        held: list[Any] = [value] * self.world
        if self.world > 1:
            with self.answered():
                dist.all_gather_object(held, value)
        return held

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run a block in every process; if one fails, all raise, and one of them says why."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, once all know
            failure = error
        messages = self.gather(None if failure is None else f"{failure}")
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failure is not None:
            if failed[0] != self.rank:
                _hushed(failure)
            raise failure
        if failed:
            raise _hushed(RanksError(f"process {failed[0]} of {self.world}: {messages[failed[0]]}"))

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Say in a line that another process is gone or silent; what else fails is left as it is.

        A collective raises RuntimeError for that as for a lack of memory or a wrong type.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
            if not lost and not any(sign in text for sign in _GONE):
                raise
            raise RanksError(
                f"another of the {self.world} processes does not answer ({first_line(error)}): it"
                " says why if it could, or it took longer than the group's timeout; repeat the"
                " command to resume"
            ) from error

    @property
    def wire(self) -> torch.device:
        """The device whose tensors the group can exchange."""
        return torch.device("cuda" if "nccl" in self.backend else "cpu")


def take_card(device: str | torch.device | None) -> None:
    """Have one of several processes on a machine compute on a card of its own.

    That of its `LOCAL_RANK`, unless `device` is another kind or one card, or this process sees
    fewer: it was given its own then.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or torch.device(device or "cuda") != torch.device("cuda"):
        return
    local = os.environ.get("LOCAL_RANK")
    if local is not None and int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun started for as long as the context lasts; else stay alone.

    Tensors on the processor go through gloo, those on cards through nccl, a card for each process.
    Raises SpecError where there are fewer cards than processes on this machine.
    """
    if not launched() or dist.is_initialized():
        yield Ranks.present()
        return
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise SpecError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here and there are"
                f" {count} cards: use --nproc-per-node {count}"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks.present()
    finally:
        dist.destroy_process_group()


Layout = list[tuple[str, torch.Size, torch.dtype]]


def _layout(tensors: dict[str, Tensor]) -> Layout:
    return [(name, value.shape, value.dtype) for name, value in tensors.items()]


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return all elements in one tensor of the widest of their types."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat([t.detach().reshape(-1).to(device, dtype) for t in tensors])


@torch.no_grad()
def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def _checksum(tensor: Tensor) -> int:
    """Return the sum of the bits as integers: exact, so no machine's order of sums matters."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    wanted = integers.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().reshape(-1).view(wanted)
    return int(bits.sum(dtype=torch.int64))


def _hushed(error: Exception, *, told: bool = True) -> Exception:
    """Return an error, marked if another process tells it."""
    if isinstance(error, SophonError):
        error.told = told
    return error
