"""The streamed suppression gradient against the usual way: every query graph kept to the end.

The usual way is written with TorchOpt (arXiv 2211.06934), a library of differentiable optimizers:
the attacker's weights are the real ones plus its detached updates, so that one backward through all
K query losses gives the first-order gradient. Memory is each process's own peak, less what it
held before the pass, with an allocator that gives freed tensors back at once: glibc's otherwise
keeps more and more of them as it goes, some 10 MiB that come and go from run to run.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import Sizes, protection, quick, rehearsal
from timing import Row, alone, ratios, row, seconds
from torch import Tensor, nn
from torch.func import functional_call

from sophon._protection.losses import SUPPRESSIONS
from sophon._protection.protection import Protection
from sophon._protection.term import Surroundings
from sophon._protection.terms.rehearsal import RehearsalTerm
from sophon._specs import Strategy
from sophon._tasks import Classification
from sophon._training.setting import make_setting

SUPPRESSION = "klu"
# From so many bytes on, a block goes back to the system as soon as it is freed (glibc).
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "32768"}


def retained(model: nn.Module, pool: RehearsalTerm, strategy: Strategy) -> dict[str, Tensor]:
    """Return the gradient by parameter name from K graphs that are kept until one backward."""
    import torchopt

    feed = pool.feed(0, strategy)
    network = copy.deepcopy(model).train()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    # TorchOpt's trees of tensors: a tuple in the order of the names.
    names, held = tuple(leaves), tuple(leaves.values())
    optimizer = torchopt.sgd(lr=strategy.learning_rate, momentum=strategy.momentum)
    state = optimizer.init(held)
    steps, size = pool.spec.steps, strategy.batch_size
    total: Tensor | float = 0.0
    for step in range(steps):
        images, labels = feed.batch(step)
        outputs = functional_call(network, dict(zip(names, held, strict=True)), (images[:size],))
        gradients = torch.autograd.grad(F.cross_entropy(outputs, labels[:size]), held)
        updates, state = optimizer.update(gradients, state, params=held, inplace=False)
        held = torchopt.apply_updates(held, updates, inplace=False)
        outputs = functional_call(network, dict(zip(names, held, strict=True)), (images[size:],))
        loss = SUPPRESSIONS[SUPPRESSION].function(outputs, labels[size:]).mean()
        total = total + loss / steps
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(names, gradients, strict=True))


def prepared(sizes: Sizes) -> tuple[Protection, Strategy]:
    run = protection("ResNet-20", sizes, precision="fp32")
    return run, rehearsal(run).strategy(0)


def anew(run: Protection) -> RehearsalTerm:
    """Return the rehearsal of a protection, no attacker taken yet."""
    return RehearsalTerm(rehearsal(run).spec, run.around)


def streamed(run: Protection) -> dict[str, Tensor]:
    pool = anew(run)
    return pool.suppress(run.model)[0].gradients


class Double(nn.Module):
    """A network in float64 for a feed's float32 images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.inner(images.double())
        return result


def difference(sizes: Sizes) -> float:
    """Return the largest difference of the two gradients in float64, relative to the largest."""
    run, strategy = prepared(sizes)
    model = Double(copy.deepcopy(run.model))
    setting = make_setting(
        model,
        task=Classification(),
        original=run.setting.original,
        restricted=run.setting.restricted,
        head=None,
        precision="fp32",
        device="cpu",
    )
    pool = RehearsalTerm(rehearsal(run).spec, Surroundings(setting, model, run.spec.seed))
    expected = retained(model, pool, strategy)
    found = pool.suppress(model)[0].gradients
    most = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[n] - value).abs().max()) for n, value in expected.items()) / most


def status(key: str) -> float:
    """Return a size of this process in MiB, from Linux: `VmHWM` its peak, `VmRSS` what it holds."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def measure(way: str, sizes: Sizes) -> dict[str, float]:
    """Return the seconds and the extra MiB of one gradient, in this process."""
    run, strategy = prepared(sizes)
    # The kernels' own buffers belong to neither way.
    F.cross_entropy(run.model.train()(run.keep.feed.batch(0)[0][:8]), torch.zeros(8).long())
    pool = anew(run)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if way == "streamed":
        taken = seconds(lambda: pool.suppress(run.model))
    else:
        taken = seconds(lambda: retained(run.model, pool, strategy))
    return {"seconds": taken, "extra": status("VmHWM") - before}


def in_process(way: str, sizes: Sizes) -> dict[str, float]:
    """Return what `measure` finds in a process of its own."""
    values = [str(value) for value in (sizes.steps, sizes.support, sizes.query)]
    command = [sys.executable, __file__, "--measure", way, *values, str(torch.get_num_threads())]
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **RETURNED}
    )
    result: dict[str, float] = json.loads(run.stdout)
    return result


def rows(short: bool) -> list[Row]:
    """Return equality, speed and memory against the graphs kept."""
    # Of memory and its growth the number of images says nothing: few take less time.
    full, images, steps = Sizes(), (20, 6), (10, 200)
    if short:
        full, images, steps = quick(full), (12, 4), (2, 3)
    small, few = Sizes(full.steps, *images), Sizes(3, 12, 4)
    run, strategy = prepared(Sizes(min(10, full.steps), full.support, full.query))
    pool = anew(run)
    brief = prepared(Sizes(2, full.support, full.query))[0]

    def warm() -> None:
        streamed(brief)
        retained(brief.model, anew(brief), strategy)

    speed = ratios(
        lambda: streamed(run),
        lambda: retained(run.model, pool, strategy),
        1 if short else 3,
        warm,
    )
    ours, kept = (in_process(way, small)["extra"] for way in ("streamed", "retained"))
    least, most = (in_process("streamed", Sizes(many, *images))["extra"] for many in steps)
    whole = f"{full.support} + {full.query} images"
    fewer = f"{small.support} + {small.query} images"
    return [
        row(
            "difference of the streamed and the retained gradient in float64, relative",
            [difference(few)],
            at_most=1e-9,
        ),
        row(
            f"streamed / retained, seconds: ResNet-20, K = {rehearsal(run).spec.steps}, {whole},"
            " fp32",
            speed,
            at_most=1.0,
        ),
        row(
            f"streamed / retained, extra memory: K = {full.steps}, {fewer}, fp32",
            [ours / kept],
            at_most=1 / 3,
            note=f"{ours:.0f} MiB against {kept:.0f} MiB",
        ),
        row(
            f"extra memory, K = {steps[1]} / K = {steps[0]}: {fewer}, fp32",
            [most / least],
            at_most=1.05,
            note=f"{most:.1f} MiB against {least:.1f} MiB",
        ),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        torch.set_num_threads(int(sys.argv[6]))
        chosen = Sizes(*(int(value) for value in sys.argv[3:6]))
        print(json.dumps(measure(sys.argv[2], chosen)))
    else:
        alone(rows)
