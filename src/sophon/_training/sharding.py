"""One batch, and one model, over many processes.

Each process runs the model on its rows of a batch, and all see the outputs of all. Noise, timesteps
and losses are then drawn and computed for the whole batch in every process, so shares of any size
are weighted as one process would weigh them. A model whose weights fit on one device but whose
training state does not has its parameters in shards besides (FSDP2): it is whole on every device
until it is spread. The functions here are the identity for one that is in no shards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from sophon._base.seeding import generator, seeded
from sophon._models import blocks
from sophon._training.ranks import Ranks
from sophon._training.setting import Setting

# Rows on their own may differ by rounding: other shapes take other kernels.
_SAME = 1e-3
_PROBED = 4


@contextmanager
def sharing(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Have `model` run on this process's rows of every batch and return the outputs of all rows.

    The gradient is then this process's part of a sum.
    """
    handles = _on_rows(model, ranks.rank, ranks.world, partial(_joined, ranks))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(ranks: Ranks, own: Tensor, start: int, count: int) -> Tensor:
    # Every backend knows float32, and a sum with zeros is exact in it.
    wide = torch.promote_types(own.dtype, torch.float32)
    full = torch.zeros((count, *own.shape[1:]), dtype=wide, device=ranks.wire)
    full[start : start + len(own)] = own.detach()
    with ranks.answered():
        dist.all_reduce(full)
    held = full.to(own)
    if ranks.sharded and own.requires_grad:
        # FSDP averages over the processes what is to be a sum.
        own.register_hook(lambda gradient: gradient * ranks.world)
    return torch.cat([held[:start], own, held[start + len(own) :]])


def shard(model: nn.Module, head: str, ranks: Ranks) -> None:
    """Spread the parameters of `model` over all processes, block by block, in place.

    It then works on this process's rows, as in `sharing`. Without `ranks.sharded` nothing is done.
    """
    if not ranks.sharded:
        return
    # Takes a second and more; nobody else should wait for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.world,))
    for parameter in model.parameters():
        # FSDP takes no other layout, and channels last is one.
        parameter.data = parameter.data.contiguous()
    parts = [model.get_submodule(name) for names in blocks(model, head) for name in names]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    _on_rows(model, ranks.rank, ranks.world, partial(_joined, ranks))


def is_sharded(value: Tensor) -> bool:
    """Return whether each process holds a shard of a tensor."""
    # Only a DTensor has it; its class takes a second to import.
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor of which each process may hold a shard; all must ask at once."""
    held: Any = value
    full: Tensor = held.full_tensor() if is_sharded(value) else value
    return full


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Return `value`, which every process holds, with the layout, and in the shards, of `like`."""
    if not is_sharded(like):
        return torch.empty_like(like).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    held, pattern = value.to(like.device, like.dtype), cast(Any, like)
    return distribute_tensor(held, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state into a model; each may be in shards. One tensor at a time is whole."""
    for name, target in model.state_dict().items():
        target.copy_(placed(whole(tensors[name]), target))


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return whole tensors in the first process, and none elsewhere; all must ask at once.

    Those in shards go to its main memory: one at a time is whole on the device.
    """
    held: dict[str, Tensor] = {}
    for name, value in tensors.items():
        full = whole(value)
        if ranks.first:
            held[name] = full.cpu() if is_sharded(value) else full
    return held


def backward(loss: Tensor, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradient in some of the model's parameters to what they have."""
    if not is_sharded(parameters[0]):
        # Unlike autograd.grad, backward gives each gradient its parameter's memory layout.
        torch.autograd.backward(loss, inputs=parameters)
        return
    # FSDP knows only passes that reach every parameter.
    loss.backward()
    wanted = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        if id(parameter) not in wanted:
            parameter.grad = None


def gradients(loss: Tensor, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient in some of the model's parameters, zeros where the loss has none.

    No parameter holds any before or after.
    """
    if not parameters:
        return []
    if not is_sharded(parameters[0]):
        return [*torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]
    loss.backward()
    held = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.zero_grad(set_to_none=True)
    return held


def splits(model: nn.Module, setting: Setting) -> bool:
    """Return whether a training batch may be split: rows do not depend on each other, nothing is
    drawn at random inside and no statistics are kept. BatchNorm and dropout forbid it, and a task
    whose outputs do not come from a call of the model alone: each process would compute all of
    them, and the gradients would add up to a multiple.
    """
    images = setting.original.train
    feed = setting.feed(setting.original, images, batch_size=min(_PROBED, len(images)))
    batch = feed.batch(0)
    held = setting.place(copy.deepcopy(model)).train()

    @torch.no_grad()
    def outputs(rank: int, world: int) -> Tensor:
        handles = _on_rows(held, rank, world, _padded)
        result, _ = setting.task.outputs(held, *batch, generator(0, "rows"))
        for handle in handles:
            handle.remove()
        return result

    with seeded(0, "rows"):
        before = _hidden(held, setting.device)
        expected = outputs(0, 1)
        pure = all(map(torch.equal, before, _hidden(held, setting.device)))
        parts = [outputs(rank, 2) for rank in range(2)]
    rows = [_rows(len(expected), rank, 2) for rank in range(2)]
    halves = [part[own] for part, own in zip(parts, rows, strict=True)]
    # Of the other's rows a process has zeros, unless it computed them past the model's call.
    others = [part[own] for part, own in zip(parts, reversed(rows), strict=True)]
    apart = not any(bool(other.any()) for other in others)
    moved = (torch.cat(halves) - expected).norm()
    return pure and apart and bool(moved <= _SAME * expected.norm())


def _hidden(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Return copies of what a pass may change besides its outputs."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states + [buffer.clone() for buffer in model.buffers()]


def _padded(own: Tensor, start: int, count: int) -> Tensor:
    after = own.new_zeros((count - start - len(own), *own.shape[1:]))
    return torch.cat([own.new_zeros((start, *own.shape[1:])), own, after])


def _rows(count: int, rank: int, world: int) -> slice:
    return slice(count * rank // world, count * (rank + 1) // world)


def _on_rows(
    model: nn.Module, rank: int, world: int, joined: Callable[[Tensor, int, int], Tensor]
) -> list[RemovableHandle]:
    """Give `model` its rows of whatever has a batch's length; make outputs whole again.

    A batch of fewer rows than processes stays whole.
    """
    counts: list[int] = []

    def cut(_: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        counts.append(len(tensors[0]))
        if counts[-1] < world:
            return args, kwargs

        def own(tensor: Tensor) -> Tensor:
            batched = tensor.dim() > 0 and len(tensor) == counts[-1]
            return tensor[_rows(counts[-1], rank, world)] if batched else tensor

        return tree_map_only(Tensor, own, (args, kwargs))

    def join(_: nn.Module, inputs: Any, outputs: Any) -> Any:
        count = counts.pop()
        if count < world:
            return outputs
        start = _rows(count, rank, world).start
        return tree_map_only(Tensor, lambda own: joined(own, start, count), outputs)

    return [
        model.register_forward_pre_hook(cut, with_kwargs=True),
        model.register_forward_hook(join),
    ]
