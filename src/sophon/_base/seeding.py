"""One seed and a name give one random stream.

No generator state is ever stored: a stream is identified by `(seed, *names)`, for instance
`(0, "attacker", 17, "batches", 3)`, so a resumed run meets the same numbers as an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and every name, in order."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for the stream `(seed, *names)`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Run a block with torch's global generators on the stream `(seed, *names)`, then restore them.

    Needed for what draws from the global generators: dropout and module initialisation.
    """
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        start = torch.default_generator.manual_seed if _processor_alone() else torch.manual_seed
        start(derive_seed(seed, *names))
        yield


@cache
def _processor_alone() -> bool:
    """Return whether the processor's global generator is the only one there is.

    `torch.manual_seed` also leaves a seed, with a formatted stack, for every kind of device that
    is not there: over a millisecond, at each step of an attack.
    """
    import torch

    kinds = (torch.cuda, torch.backends.mps, torch.xpu, torch.mtia)
    return not any(kind.is_available() for kind in kinds)
