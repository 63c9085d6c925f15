"""One batch over many processes: each runs the model on its rows, all see the outputs of all.

Noise, timesteps and losses are then drawn and computed for the whole batch in every process, so
shares of any size are weighted as one process would weigh them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sophon._distributed import Ranks
from sophon._seeding import generator, seeded
from sophon._setting import Setting

# Rows on their own may differ by rounding: other shapes take other kernels.
_SAME = 1e-3
_PROBED = 4


@contextmanager
def sharing(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Have `model` run on this process's rows of every batch and return the outputs of all rows.

    The gradient is then this process's part of a sum.
    """

    def whole(own: Tensor, start: int, count: int) -> Tensor:
        # Every backend knows float32, and a sum with zeros is exact in it.
        wide = torch.promote_types(own.dtype, torch.float32)
        full = torch.zeros((count, *own.shape[1:]), dtype=wide, device=ranks.wire)
        full[start : start + len(own)] = own.detach()
        with ranks.answered():
            dist.all_reduce(full)
        held = full.to(own)
        return torch.cat([held[:start], own, held[start + len(own) :]])

    with _on_rows(model, ranks.rank, ranks.world, whole):
        yield


def splits(model: nn.Module, setting: Setting) -> bool:
    """Return whether a training batch may be split: rows do not depend on each other, nothing is
    drawn at random inside and no statistics are kept. BatchNorm and dropout forbid it.
    """
    images = setting.original.train
    feed = setting.feed(setting.original, images, batch_size=min(_PROBED, len(images)))
    batch = feed.batch(0)
    held = copy.deepcopy(model).train()

    @torch.no_grad()
    def outputs(rank: int, world: int) -> Tensor:
        with _on_rows(held, rank, world, _padded):
            return setting.task.outputs(held, *batch, generator(0, "rows"))[0]

    with seeded(0, "rows"):
        before = _hidden(held, setting.device)
        expected = outputs(0, 1)
        pure = all(map(torch.equal, before, _hidden(held, setting.device)))
        halves = [outputs(rank, 2)[_rows(len(expected), rank, 2)] for rank in range(2)]
    moved = (torch.cat(halves) - expected).norm()
    return pure and bool(moved <= _SAME * expected.norm())


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


@contextmanager
def _on_rows(
    model: nn.Module, rank: int, world: int, whole: Callable[[Tensor, int, int], Tensor]
) -> Iterator[None]:
    """Give `model` its rows of whatever has a batch's length; make outputs whole again."""
    counts: list[int] = []

    def cut(_: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        counts.append(len(tensors[0]))

        def own(tensor: Tensor) -> Tensor:
            batched = tensor.dim() > 0 and len(tensor) == counts[-1]
            return tensor[_rows(counts[-1], rank, world)] if batched else tensor

        return tree_map_only(Tensor, own, (args, kwargs))

    def join(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        del args, kwargs
        count = counts.pop()
        start = _rows(count, rank, world).start
        return tree_map_only(Tensor, lambda own: whole(own, start, count), outputs)

    handles = [
        model.register_forward_pre_hook(cut, with_kwargs=True),
        model.register_forward_hook(join, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
