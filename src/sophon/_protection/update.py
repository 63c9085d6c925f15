"""How a round follows its terms: two Adams in turn, or one on keep + price x hindrance."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sophon._base.errors import NonFiniteError
from sophon._base.seeding import generator, seeded
from sophon._base.spans import spanned
from sophon._models import normalised_pairs, tracked_batch_norms
from sophon._protection.spec import Alternate, Joint, ProtectSpec
from sophon._protection.term import Contribution, Hindrance, Keep
from sophon._training.loop import fused, optimizer_tensors, restore_optimizer
from sophon._training.ranks import Ranks
from sophon._training.setting import Feed, Setting
from sophon._training.sharding import sharing, whole


@dataclass
class Turn:
    """What the updates of a round gave: their numbers, and who was rehearsed or read."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    readings: dict[str, float] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)


class KeepSide:
    """The keep terms: their summed loss on batches of original images, added to the gradients."""

    def __init__(
        self, terms: list[Keep[Any]], setting: Setting, spec: ProtectSpec, ranks: Ranks, split: bool
    ) -> None:
        self.terms = terms
        self.setting = setting
        self.seed = spec.seed
        self.ranks = ranks
        self.split = split
        self.frozen = isinstance(spec.update, Joint) and bool(spec.update.freeze_statistics)
        self.steps = 0
        self.feed: Feed = setting.feed(
            setting.original,
            setting.original.train,
            batch_size=spec.original_batch_size or 1,
            stream=(spec.seed, ("original",)),
            augmentation=spec.original_augmentation or "none",
        )

    @spanned("reinforcement")
    def learn(self, model: nn.Module) -> Tensor:
        """Add the gradient of one batch to what the parameters have; return the loss."""
        model.train()
        for norm in tracked_batch_norms(model) if self.frozen else ():
            norm.eval()
        with sharing(model, self.ranks) if self.split else nullcontext():
            loss = self._loss(model)
        loss = loss + self._besides(model)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if self.split:
            self.ranks.add(gradients)
        elif not self.ranks.sharded:
            # All computed the whole batch; kernels need not agree to the last bit on that.
            self.ranks.follow_first([loss, *gradients, *model.buffers()])
        self.steps += 1
        return loss

    def _loss(self, model: nn.Module) -> Tensor:
        task, seed, step = self.setting.task, self.seed, self.steps
        images, labels = self.feed.batch(step)
        with seeded(seed, "reinforcement", step):
            stream = generator(seed, "reinforcement", "task", step)
            drawn = stream.get_state()
            with self.setting.autocast():
                outputs, targets = task.outputs(model, images, labels, stream)
            parts = [
                term.spec.weight * term.loss(outputs, targets, images, labels, drawn)
                for term in self.terms
            ]
            loss = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
            loss.backward()
        return loss.detach()

    def _besides(self, model: nn.Module) -> float | Tensor:
        """Add the gradients of what terms ask of batches of their own; return its weighed loss.

        Where processes add up shares, each gives its part of what all of them computed.
        """
        total: float | Tensor = 0.0
        for term in self.terms:
            weight = term.spec.weight
            share = weight / self.ranks.world if self.split else weight
            asked = term.besides(model, self.steps, share)
            if asked is not None:
                total = total + weight * asked
        return total


class Updating:
    """What both ways share: hindrances summed up, gradients checked, optimizers to resume."""

    def __init__(self, model: nn.Module, keep: KeepSide, hinder: list[Hindrance[Any]]) -> None:
        self.model = model
        self.keep = keep
        self.hinder = hinder

    def left(self, done: float) -> float:
        """Return the share of the rate's fall that is still to come, a share `done` being over."""
        return 0.0

    @property
    def shipped(self) -> nn.Module:
        """The model that is checked and shipped: an average of the weights, if there is one."""
        return self.model

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the optimizers' states, as groups of tensors and as plain values."""
        groups: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Any] = {}
        for name, optimizer in self.optimizers.items():
            groups[name], values[name] = optimizer_tensors(optimizer)
        return groups, values

    def restore(self, group: Callable[[str], dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, group(name), values[name])

    @property
    def optimizers(self) -> dict[str, Adam]:
        """The optimizers, by the name that a state has them under."""
        raise NotImplementedError

    def round(self, done: float, price: float, extra: int) -> Turn:
        """Take the steps of a round, a share `done` of the run being over.

        `extra` is how many more keep steps the guard wants. Raises NonFiniteError.
        """
        raise NotImplementedError

    def keep_steps(self, extra: int) -> int:
        """Return how many batches of original images a round learns."""
        raise NotImplementedError

    def hindrance(self) -> tuple[dict[str, Tensor], list[Contribution]]:
        """Return the weighed sum of the hindrances' gradients, and what each gave."""
        parts = [term.contribute(self.model) for term in self.hinder]
        if len(parts) == 1 and self.hinder[0].spec.weight == 1:
            return parts[0].gradients, parts
        total: dict[str, Tensor] = {}
        for term, part in zip(self.hinder, parts, strict=True):
            for name, gradient in part.gradients.items():
                weighed = gradient * term.spec.weight
                total[name] = total[name].add_(weighed) if name in total else weighed
        return total, parts

    def constrain(self, model: nn.Module) -> None:
        """Have every hindrance put weights back that may not move."""
        for term in self.hinder:
            term.constrain(model)

    def note(self, turn: Turn, parts: list[Contribution], norm: Tensor) -> None:
        """Add what the hindrances gave to the turn's numbers. Raises NonFiniteError."""
        loss = torch.stack([t.spec.weight * p.loss for t, p in self._pairs(parts)]).sum()
        # What readers explain is no score of attackers: a mean is over these where there are any.
        asked = [part for part in parts if part.labels] or parts
        score = torch.stack([part.score for part in asked]).mean()
        values = torch.stack([loss, score, norm]).tolist()
        self._require_finite(values, parts)
        turn.losses.append(values[0])
        turn.scores.append(values[1])
        turn.norms.append(values[2])
        for part in parts:
            turn.labels += part.labels
            # A record's strategies and domains belong together: those of attackers.
            turn.domains += part.domains if part.labels else ()
            turn.readings |= {name: float(value) for name, value in part.readings.items()}

    def _pairs(self, parts: list[Contribution]) -> list[tuple[Hindrance[Any], Contribution]]:
        return list(zip(self.hinder, parts, strict=True))

    def _require_finite(self, values: list[float], parts: list[Contribution]) -> None:
        """Raise NonFiniteError, naming attackers whose losses are not finite, unless all are."""
        if all(math.isfinite(value) for value in values):
            return
        attackers = [pair for part in parts for pair in zip(part.labels, part.losses, strict=True)]
        at_fault = [label for label, loss in attackers if not math.isfinite(float(loss))]
        named = ", ".join(at_fault or [label for label, _ in attackers])
        if named:
            raise NonFiniteError(
                f"suppression of strategy {named}: narrow that optimizer's range of rates, or lower"
                " the hindrance's rate (protect.update)"
            )
        kinds = ", ".join(term.spec.kind for term in self.hinder)
        raise NonFiniteError(f"{kinds}: lower the rate of protect.update")


class Alternating(Updating):
    """Hindrance steps with one Adam, then keep steps with another: the paper's algorithm 1."""

    def __init__(
        self, spec: Alternate, model: nn.Module, keep: KeepSide, hinder: list[Hindrance[Any]]
    ) -> None:
        super().__init__(model, keep, hinder)
        self.spec = spec
        parameters = list(model.parameters())
        self.suppressor = Adam(parameters, spec.hindrance_rate, **fused())
        self.reinforcer = Adam(parameters, spec.keep_rate, **fused())

    @property
    def optimizers(self) -> dict[str, Adam]:
        """Both Adams."""
        return {"suppressor": self.suppressor, "reinforcer": self.reinforcer}

    def keep_steps(self, extra: int) -> int:
        """Return as many as specified, and the guard's."""
        return self.spec.keep_steps + extra

    def round(self, done: float, price: float, extra: int) -> Turn:
        """Take the hindrance steps, then the keep steps; the price is not asked."""
        turn = Turn()
        for _ in range(self.spec.hindrance_steps):
            gradients, parts = self.hindrance()
            self.note(turn, parts, self._apply(gradients))
        turn.kept = [self._reinforce() for _ in range(self.keep_steps(extra))]
        return turn

    @spanned("suppression step")
    def _apply(self, gradients: dict[str, Tensor]) -> Tensor:
        """Take one clipped step along the hindrance gradient; return its norm before."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients.get(name)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm))
        self.suppressor.step()
        self.suppressor.zero_grad(set_to_none=True)
        self.constrain(self.model)
        return norm

    def _reinforce(self) -> Tensor:
        """Take one step on a batch of the original domain; return loss and gradient norm."""
        loss = self.keep.learn(self.model)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), math.inf))
        self.reinforcer.step()
        self.reinforcer.zero_grad(set_to_none=True)
        self.constrain(self.model)
        return torch.stack([loss, norm])


class Together(Updating):
    """One Adam on keep + price x hindrance, one step a round; norms pinned."""

    def __init__(
        self, spec: Joint, model: nn.Module, keep: KeepSide, hinder: list[Hindrance[Any]]
    ) -> None:
        super().__init__(model, keep, hinder)
        self.spec = spec
        self.optimizer = Adam(list(model.parameters()), spec.rate, **fused())
        self.pinned = _filters(model, keep.setting) if spec.pin_norms else []
        # A model in shards cannot be copied.
        averaged = spec.average > 0 and not keep.ranks.sharded
        average = get_ema_multi_avg_fn(spec.average)
        self.average = AveragedModel(model, multi_avg_fn=average) if averaged else None

    def left(self, done: float) -> float:
        """Return what the cosine has still to fall."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    @property
    def shipped(self) -> nn.Module:
        """The average of the weights, if one is kept."""
        return self.model if self.average is None else self.average.module

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the optimizer's state and the average's."""
        groups, values = super().state()
        if self.average is not None:
            groups["average"] = self.average.module.state_dict()
            values["averaged"] = int(self.average.n_averaged)
        return groups, values

    def restore(self, group: Callable[[str], dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        super().restore(group, values)
        if self.average is not None:
            self.average.module.load_state_dict(group("average"))
            self.average.n_averaged.fill_(values["averaged"])

    @property
    def optimizers(self) -> dict[str, Adam]:
        """The one Adam."""
        return {"joint": self.optimizer}

    def keep_steps(self, extra: int) -> int:
        """Return one."""
        return 1

    def round(self, done: float, price: float, extra: int) -> Turn:
        """Take one step on a batch of original images and what the hindrances give."""
        turn = Turn()
        gradients, parts = self.hindrance()
        loss = self.keep.learn(self.model)
        kept = _norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = self._step(gradients, price, done)
        self.note(turn, parts, norm)
        turn.kept = [torch.stack([loss, kept])]
        return turn

    @spanned("update")
    def _step(self, gradients: dict[str, Tensor], price: float, done: float) -> Tensor:
        """Add the priced gradients, step, pin; return the norm of the hindrance's gradient."""
        norm = _norm(list(gradients.values()))
        for name, parameter in self.model.named_parameters():
            if name in gradients:
                own = gradients[name]
                if parameter.grad is None:
                    parameter.grad = own * price
                else:
                    parameter.grad.add_(own, alpha=price)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.rate * (
                self.spec.final + (1 - self.spec.final) * self.left(done)
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for pin in self.pinned:
            pin()
        self.constrain(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
            self.constrain(self.average.module)
        return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    norms: list[Tensor] = list(torch._foreach_norm(gradients))
    return whole(torch.stack(norms).norm())


def _filters(model: nn.Module, setting: Setting) -> list[Callable[[], None]]:
    """Return what puts the filters of every layer before a normalisation back to their norms."""
    shape = setting.shape(setting.original)
    layers = [model.get_submodule(name) for name, _ in normalised_pairs(model, shape)]
    return [_pin(layer.get_parameter("weight")) for layer in layers]


def _pin(weight: nn.Parameter) -> Callable[[], None]:
    def norms() -> Tensor:
        flat: Tensor = weight.detach().flatten(1).norm(dim=1)
        return flat.view(-1, *[1] * (weight.dim() - 1))

    held = norms()

    @torch.no_grad()
    def pin() -> None:
        weight.mul_(held / norms().clamp_min(torch.finfo(weight.dtype).tiny))

    return pin


def updating(
    spec: Alternate | Joint, model: nn.Module, keep: KeepSide, hinder: list[Hindrance[Any]]
) -> Updating:
    """Return the way of updating that a specification means."""
    if isinstance(spec, Alternate):
        return Alternating(spec, model, keep, hinder)
    return Together(spec, model, keep, hinder)
