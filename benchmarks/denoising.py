"""Measure what a round of protecting a diffusion model costs beyond its bare passes.

    python benchmarks/denoising.py

The ratio is sophon's time to that of a plain PyTorch loop with the same forward, backward and
optimizer steps, a copy of the model for the attacker, its query gradients added up and clipped,
side by side in one process. Images are random: speed needs no data.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from timing import Row, alone, ratios, row

from sophon._data import Domain
from sophon._models import diffusers
from sophon._protection.losses import denial_of_service
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import Guard, Strategy
from sophon._tasks import Denoising

STEPS, SUPPORT, QUERY, ORIGINAL, SIDE = 5, 24, 8, 32, 32


def domain(name: str, seed: int) -> Domain:
    """Return 500 random 32x32 images."""
    stream = np.random.default_rng(seed)
    return Domain.from_arrays(name, stream.integers(0, 256, (500, SIDE, SIDE, 3), dtype=np.uint8))


def network() -> torch.nn.Module:
    """Return a U-Net of 1.1 M weights."""
    torch.manual_seed(0)
    return diffusers().UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


class Bare:
    """The passes and optimizer steps of one round, with inputs that lie ready."""

    def __init__(self, run: Protection) -> None:
        self.model, self.setting = copy.deepcopy(run.model), run.setting
        stream = torch.Generator().manual_seed(0)
        size = (SUPPORT + QUERY, 3, SIDE, SIDE)
        self.noisy = torch.randn(size, generator=stream)
        self.noise = torch.randn(size, generator=stream)
        self.times = torch.randint(0, 1000, size[:1], generator=stream)
        self.outer = [torch.optim.Adam(self.model.parameters(), 3e-4, fused=True) for _ in range(2)]

    def _predicted(self, model: torch.nn.Module, part: slice) -> torch.Tensor:
        with self.setting.autocast():
            return model(self.noisy[part], self.times[part], return_dict=False)[0].float()

    def round(self) -> None:
        attacker, support, query = copy.deepcopy(self.model), slice(SUPPORT), slice(SUPPORT, None)
        inner = torch.optim.SGD(attacker.parameters(), 1e-3, momentum=0.9, fused=True)
        total = [torch.zeros_like(p) for p in attacker.parameters()]
        for _ in range(STEPS):
            error = self._predicted(attacker, support) - self.noise[support]
            error.square().mean().backward()
            inner.step()
            inner.zero_grad()
            loss = denial_of_service(self._predicted(attacker, query), self.noise[query]).mean()
            torch._foreach_add_(total, torch.autograd.grad(loss, list(attacker.parameters())))
        for parameter, gradient in zip(self.model.parameters(), total, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.outer[0].step()
        self.outer[0].zero_grad()
        error = self._predicted(self.model, slice(ORIGINAL)) - self.noise[:ORIGINAL]
        error.square().mean().backward()
        self.outer[1].step()
        self.outer[1].zero_grad()


def rows(short: bool) -> list[Row]:
    """Return a round of protecting the U-Net against its bare passes."""
    fixed = Strategy(learning_rate=1e-3, batch_size=SUPPORT, steps=STEPS)
    spec = ProtectSpec(
        rounds=10_000,
        suppression="dos",
        original_batch_size=ORIGINAL,
        rehearsal=Rehearsal(steps=STEPS, fixed=fixed, query_batch_size=QUERY),
        guard=Guard(every=10_000),
    )
    run = Protection(
        network(), original=domain("a", 0), restricted=domain("b", 1), task=Denoising(), spec=spec
    )
    rounds, bare = iter(run), Bare(run)
    values = ratios(lambda: next(rounds), bare.round, 1 if short else 7)
    what = f"protect round / bare passes: U-Net, 32x32, K = {STEPS}, batch {SUPPORT + QUERY}"
    return [row(f"{what}, {run.setting.precision}", values, at_most=1.05)]


if __name__ == "__main__":
    alone(rows)
