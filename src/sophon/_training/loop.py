"""The fine-tuning loop: the one program that rehearsed attackers and real attackers run.

`FineTuning` fine-tunes a model in place as a `Strategy` says and yields after every step.
Protection rehearses with it, the audit attacks with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer

from sophon._base.plain_mode import plain
from sophon._base.seeding import generator, seeded
from sophon._base.spans import span, spanned
from sophon._data import Domain, Images
from sophon._models import Bare, add_lora, head_parameters, lora_parameters, real_name
from sophon._specs import OptimizerName, Preparation, ScheduleName, Strategy
from sophon._tasks import Distillation
from sophon._training.preparations import Course, Surroundings, prepare, require_steps
from sophon._training.setting import Feed, Setting
from sophon._training.sharding import backward, is_sharded, placed

# Raise this when a change of the loop changes what a trial with an old key would give.
ENGINE_VERSION = 4


def _sgd(parameters: list[nn.Parameter], strategy: Strategy, **more: Any) -> Optimizer:
    decay = strategy.weight_decay
    return SGD(parameters, strategy.learning_rate, weight_decay=decay, **more, **fused())


OPTIMIZERS: dict[OptimizerName, Callable[[list[nn.Parameter], Strategy], Optimizer]] = {
    "sgd": _sgd,
    "sgd_momentum": lambda p, s: _sgd(p, s, momentum=s.momentum),
    "nesterov": lambda p, s: _sgd(p, s, momentum=s.momentum, nesterov=True),
    "adagrad": lambda p, s: Adagrad(p, s.learning_rate, weight_decay=s.weight_decay, **_unfused()),
    "adadelta": lambda p, s: Adadelta(
        p, s.learning_rate, weight_decay=s.weight_decay, **_unfused()
    ),
    "adam": lambda p, s: Adam(p, s.learning_rate, weight_decay=s.weight_decay, **fused()),
    "adamw": lambda p, s: AdamW(p, s.learning_rate, weight_decay=s.weight_decay, **fused()),
}


# Tensors the size of the weights that an optimizer keeps.
MOMENTS: dict[OptimizerName, int] = {
    "sgd": 0,
    "sgd_momentum": 1,
    "nesterov": 1,
    "adagrad": 1,
    "adadelta": 2,
    "adam": 2,
    "adamw": 2,
}


def fused() -> dict[str, Any]:
    """Return the arguments that make an optimizer's step one call for all parameters."""
    return {"foreach": False} if plain() else {"fused": True}


def _unfused() -> dict[str, Any]:
    """Return the arguments of an optimizer without a fused step: torch's own choice, or plain."""
    return {"foreach": False} if plain() else {}


def _ramp(step: int, strategy: Strategy) -> float:
    warmup = strategy.warmup_steps or max(1, strategy.steps // 10)
    return min(1.0, (step + 1) / warmup)


def _cosine(step: int, strategy: Strategy) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / strategy.steps)))


# The factor on the learning rate at a step, counted from 0. `warmup` takes a tenth of the steps
# unless `warmup_steps` says otherwise.
SCHEDULES: dict[ScheduleName, Callable[[int, Strategy], float]] = {
    "constant": lambda step, strategy: 1.0,
    "warmup": _ramp,
    "cosine": _cosine,
    "warmup_cosine": lambda step, strategy: _ramp(step, strategy) * _cosine(step, strategy),
}


@dataclass(frozen=True)
class Step:
    """What the loop yields: steps taken so far and the (detached, unread) mean training loss."""

    taken: int
    loss: Tensor


class FineTuning:
    """Fine-tune `model` in place as `strategy` says.

    `stream` is the seed and the names that every random draw of this attacker derives from.
    Each batch of `feed` may carry more images than the strategy's batch size: the loop trains
    on the first ones, the rest are for the caller (query images, never trained on in that step).
    `taken` steps of the budget are spent already.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        setting: Setting,
        feed: Feed,
        *,
        stream: tuple[int, tuple[str | int, ...]],
        taken: int = 0,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.setting = setting.at(strategy.precision, model)
        self.feed = feed
        self.seed, self.names = stream
        self.taken = taken
        model.requires_grad_(True)
        model.train()
        self.parameters = _scope(model, strategy, setting.head)
        self.optimizer = OPTIMIZERS[strategy.optimizer](self.parameters, strategy)
        if isinstance(self.optimizer, SGD) and is_sharded(self.parameters[0]):
            # torch has no fused step of SGD for shards.
            for group in self.optimizer.param_groups:
                group["fused"] = False
        self.query: tuple[Tensor, Tensor] | None = None

    def run(self, steps: int) -> Iterator[Step]:
        """Take `steps` further steps, yielding after each."""
        size = self.strategy.batch_size
        for _ in range(steps):
            images, labels = self.feed.batch(self.taken)
            self.query = (images[size:], labels[size:])
            with seeded(self.seed, *self.names, "step", self.taken):
                loss = self._step(images[:size], labels[:size])
            self.taken += 1
            yield Step(self.taken, loss)

    def gradient_norms(self) -> tuple[Tensor, Tensor]:
        """Return the norm of the gradient that the next step would meet, and that of its part
        before the head; no step is taken.
        """
        images, labels = self.feed.batch(self.taken)
        size = self.strategy.batch_size
        with seeded(self.seed, *self.names, "step", self.taken):
            self._backward(images[:size], labels[:size])
        head = {id(p) for p in head_parameters(self.model, self.setting.head)}
        held = [p for p in self.parameters if p.grad is not None]
        before = [p for p in held if id(p) not in head]
        norms = (_norm_of_gradients(held), _norm_of_gradients(before))
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    @spanned("support passes")
    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        stream = generator(self.seed, *self.names, "task", self.taken)
        with self.setting.autocast():
            outputs, targets = self.setting.task.outputs(self.model, images, labels, stream)
        loss = self.setting.task.loss(outputs, targets).mean()
        backward(loss, self.model, self.parameters)
        return loss.detach()

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self._backward(images, labels)
        if self.strategy.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.strategy.clip_norm)
        if self.strategy.schedule != "constant":
            factor = SCHEDULES[self.strategy.schedule](self.taken, self.strategy)
            for group in self.optimizer.param_groups:
                group["lr"] = self.strategy.learning_rate * factor
        with span("attackers' optimizer steps"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss


def _norm_of_gradients(parameters: list[nn.Parameter]) -> Tensor:
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    return norm


class Origin(NamedTuple):
    """Where an attacker's parameter comes from: `factor` times the `real` one, plus a constant.

    `real` is None for a parameter that the real model lacks (an adapter's).
    """

    real: str | None
    factor: float


class AttackerCopy(NamedTuple):
    """A prepared copy: the origin of each parameter, and the steps its preparation spent."""

    origins: dict[str, Origin]
    spent: int


def attacker_copy(
    model: nn.Module,
    strategy: Strategy,
    setting: Setting,
    *,
    classes: int | None,
    feed: Feed,
    stream: tuple[int, tuple[str | int, ...]],
    bare: Bare | None = None,
) -> AttackerCopy:
    """Prepare `model`, already a copy, as the strategy says."""

    def batches(count: int) -> Iterator[Tensor]:
        for step in range(count):
            yield feed.batch(step)[0][: strategy.batch_size]

    def labelled(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(min(count, max(1, len(feed.images) // strategy.batch_size))):
            yield feed.batch(step)

    surroundings = Surroundings(
        head=setting.head,
        image_shape=setting.task.shape((setting.channels, *feed.images.pixels.shape[2:])),
        classes=classes,
        seed=stream[0],
        names=stream[1],
        batches=batches,
        labelled=labelled if setting.task.kind.classifies else None,
        train=lambda model, course: _follow(model, course, strategy, setting),
        steps=strategy.steps,
        bare=bare,
    )
    setting.place(model)
    factors, spent = prepare(model, strategy.preparations, surroundings)
    if strategy.lora_rank is not None:
        lora = (*stream[1], "lora")
        add_lora(model, strategy.lora_rank, head=setting.head, seed=stream[0], names=lora)
    # A preparation may have put new layers in.
    setting.place(model)
    origins = {}
    for name, _ in model.named_parameters():
        real = real_name(name)
        origins[name] = Origin(real, 0.0 if real is None else factors[real])
    return AttackerCopy(origins, spent)


def train(
    model: nn.Module,
    strategy: Strategy,
    setting: Setting,
    domain: Domain,
    *,
    stream: tuple[int, tuple[str | int, ...]],
    batches: tuple[int, tuple[str | int, ...]] | None = None,
) -> None:
    """Train `model` in place on a domain for all steps; `batches` is their stream, if another."""
    feed = setting.feed(
        domain,
        domain.train,
        batch_size=strategy.batch_size,
        stream=batches or stream,
        augmentation=strategy.augmentation,
    )
    for _ in FineTuning(model, strategy, setting, feed, stream=stream).run(strategy.steps):
        pass


def _follow(model: nn.Module, course: Course, strategy: Strategy, setting: Setting) -> None:
    """Train `model` on the original domain as a preparation's course says."""
    domain = setting.original
    if course.teacher is not None:
        setting = replace(setting, task=Distillation(setting.task, course.teacher))
    training = Strategy(
        optimizer="adam",
        learning_rate=course.learning_rate,
        batch_size=min(strategy.batch_size, len(domain.train)),
        steps=course.steps,
        precision=strategy.precision,
    )
    names = (*course.names, "course")
    batches = (course.seed, (*names, "batches"))
    train(model, training, setting, domain, stream=(course.seed, names), batches=batches)


def image_count(domain: Domain, fraction: float) -> int:
    """Return how many training images an attacker has whose share is `fraction`."""
    _, counts = domain.train.labels.unique(return_counts=True)
    return sum(max(1, round(fraction * count)) for count in counts.tolist())


def attacker_images(
    domain: Domain, fraction: float, stream: tuple[int, tuple[str | int, ...]]
) -> Images:
    """Return the share of the training images that an attacker has, every class among them."""
    images = domain.train
    if fraction >= 1:
        return images
    seed, names = stream
    order = torch.randperm(len(images), generator=generator(seed, *names, "few images"))
    chosen: list[Tensor] = []
    for label in images.labels.unique():
        of_class = order[images.labels[order] == label]
        chosen.append(of_class[: max(1, round(fraction * len(of_class)))])
    index = torch.cat(chosen).sort().values
    return Images(images.pixels[index], images.labels[index])


def check_preparations(
    model: nn.Module,
    wanted: Iterable[tuple[Preparation, ...]],
    setting: Setting,
    steps: int,
    bare: Bare | None = None,
) -> None:
    """Raise SpecError, before any work, unless `model` allows every one of the preparations and
    each leaves an attacker of `steps` steps some of its own; UnsupportedModelError for parameters
    that no reset reaches and of which `bare` has no fresh value.
    """
    for preparations in dict.fromkeys(wanted):
        if not preparations:
            continue
        require_steps(preparations, steps)
        for domain in setting.restricted:
            feed = setting.feed(domain, domain.train, batch_size=min(8, len(domain.train)))
            attacker_copy(
                copy.deepcopy(model),
                Strategy(preparations=preparations, batch_size=8, steps=4),
                setting,
                classes=setting.task.classes(domain),
                feed=feed,
                stream=(0, ("check",)),
                bare=bare,
            )


def _scope(model: nn.Module, strategy: Strategy, head: str) -> list[nn.Parameter]:
    if strategy.scope == "head":
        return head_parameters(model, head)
    if strategy.lora_rank is not None:
        trained = lora_parameters(model, head)
        return [parameter for name, parameter in model.named_parameters() if name in trained]
    return list(model.parameters())


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by name, and as plain values by name."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            target = tensors if isinstance(value, Tensor) else plain
            target[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `optimizer_tensors` returned into an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            # Files hold contiguous tensors; a fused step needs the parameter's memory layout.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                values[key] = placed(value, parameter)
