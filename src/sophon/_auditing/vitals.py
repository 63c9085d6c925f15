"""Sizes of a subject that red flags judge: outputs, gradients, weights, BatchNorm statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sophon._auditing.familiarity import familiarity
from sophon._base.seeding import generator
from sophon._data import Domain
from sophon._models import tracked_batch_norms
from sophon._records.audit_record import Vitals
from sophon._specs import RescaleWeights, Strategy
from sophon._training.loop import FineTuning, attacker_copy
from sophon._training.preparations import Surroundings, prepare
from sophon._training.rounding import rounding_error
from sophon._training.setting import Setting

_IMAGES = 250
_BATCH = 64
# Two: BatchNorm needs more than one where maps are single pixels.
_COUNTED = 2


def measure_vitals(model: nn.Module, setting: Setting) -> Vitals:
    """Return the sizes of `model`, which stays as it is; what raises is measured as None."""
    rounding = rounding_error(model, setting)
    setting = setting.exact()
    held = setting.place(copy.deepcopy(model))
    norms = tracked_batch_norms(held)
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    raised: list[str] = []

    def of_each(measure: Callable[[nn.Module, Setting, Domain], Any]) -> dict[str, Any]:
        return {
            domain.name: _or_raised(raised, partial(measure, model, setting, domain))
            for domain in setting.restricted
        }

    gradients, familiar = of_each(_gradient_norms), of_each(familiarity)
    return Vitals(
        largest_logit=_or_raised(raised, partial(_largest_logit, held, setting)),
        gradient_norms={name: norms and norms[0] for name, norms in gradients.items()},
        body_gradient_norms={name: norms and norms[1] for name, norms in gradients.items()},
        weight_sizes=_sizes(held),
        rescaled_sizes=_or_raised(raised, partial(_rescaled_sizes, model, setting)) or {},
        largest_buffer=_extreme(buffers, largest=True),
        smallest_variance=_extreme([norm.running_var for norm in norms], largest=False),
        raised=tuple(dict.fromkeys(raised)),
        rounding=rounding,
        familiarity=familiar,
    )


def _sizes(model: nn.Module) -> dict[str, float | None]:
    """Return the root mean square of every parameter but biases."""
    return {
        name: finite(float(value.detach().float().square().mean().sqrt()))
        for name, value in model.named_parameters()
        if not name.endswith("bias")
    }


def _rescaled_sizes(model: nn.Module, setting: Setting) -> dict[str, float | None]:
    """Return the sizes after rescaling: what it does not reach keeps its own."""
    held = setting.place(copy.deepcopy(model))
    surroundings = Surroundings(
        head=setting.head,
        image_shape=setting.shape(setting.original),
        classes=None,
        seed=0,
        names=("vitals",),
        batches=None,
    )
    prepare(held, (RescaleWeights(),), surroundings)
    return _sizes(held)


@torch.no_grad()
def _largest_logit(model: nn.Module, setting: Setting) -> float | None:
    domain = setting.original
    feed = setting.feed(domain, domain.validation, batch_size=_IMAGES)
    images, labels = next(iter(feed.in_order()))
    model.eval()
    outputs, _ = setting.task.outputs(model, images, labels, generator(0, "vitals"))
    return finite(float(outputs.abs().max()))


@torch.no_grad()
def training_flops(model: nn.Module, setting: Setting, domain: Domain) -> int | None:
    """Return the floating point operations of one image of a domain, forward and backward.

    Three times those of the network's forward pass, as is usual: matrix products, convolutions and
    attention, counted by PyTorch on a copy. None where the model raises.
    """
    counter = FlopCounterMode(display=False)
    images = min(_COUNTED, len(domain.train))
    try:
        held = setting.place(copy.deepcopy(model)).train()
        batch = setting.feed(domain, domain.train, batch_size=images).batch(0)
        # Of the network alone, not of what a task does to the images before.
        given: list[tuple[Any, Any]] = []
        handle = held.register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        setting.task.outputs(held, *batch, generator(0, "operations"))
        handle.remove()
        # Fused attention on a processor is not counted; the same in its parts is.
        with sdpa_kernel(SDPBackend.MATH), counter:
            held(*given[0][0], **given[0][1])
    except Exception:  # noqa: BLE001 - a model may raise anything; its trials say so
        return None
    return 3 * int(counter.get_total_flops()) // images


def _gradient_norms(
    model: nn.Module, setting: Setting, domain: Domain
) -> tuple[float | None, float | None]:
    """Return the norms of an attacker's first gradient on the weights: all, and before the head."""
    strategy = Strategy(batch_size=min(_BATCH, len(domain.train)), steps=1)
    feed = setting.feed(domain, domain.train, batch_size=strategy.batch_size)
    stream = (0, ("vitals",))
    attacker = copy.deepcopy(model)
    classes = setting.task.classes(domain)
    attacker_copy(attacker, strategy, setting, classes=classes, feed=feed, stream=stream)
    tuning = FineTuning(attacker, strategy, setting, feed, stream=stream)
    whole, before = tuning.gradient_norms()
    return finite(float(whole)), finite(float(before))


def _or_raised(raised: list[str], measure: Callable[[], Any]) -> Any:
    """Return what is measured, or None and a line in `raised`: such models are to be found out."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - a model may raise anything; the trials are done
        raised.append(f"{type(error).__name__}: {error}")
        return None


def _extreme(tensors: list[Tensor], *, largest: bool) -> float | None:
    if not tensors:
        return None
    values = [float(t.abs().max() if largest else t.min()) for t in tensors]
    return finite(max(values) if largest else min(values))


def finite(value: float) -> float | None:
    """Return a number, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None
