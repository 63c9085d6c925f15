"""Rehearsals: simulated attackers, and the suppression gradient streamed out of them.

An attacker's weights are `factor * real + displacement`, parameter by parameter: the factor is
the derivative of its preparation (0 re-initialised, 1 kept, c rescaled), the displacement is
what its preparation added and its steps did. So when the real weights move, a persistent
attacker moves along, and a fresh one is merely an attacker whose horizon is one visit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.plain_mode import plain
from sophon._base.seeding import generator, seeded
from sophon._base.spans import span, spanned
from sophon._data import Domain
from sophon._protection.losses import SUPPRESSIONS
from sophon._specs import ProtectSpec, Rehearsal, Strategy, StrategyDistribution
from sophon._training.loop import (
    FineTuning,
    Origin,
    attacker_copy,
    attacker_images,
    optimizer_tensors,
    restore_optimizer,
)
from sophon._training.ranks import Ranks
from sophon._training.setting import Feed, Setting
from sophon._training.sharding import gradients, load_whole, placed, shard


def sample_strategy(distribution: StrategyDistribution, stream: torch.Generator) -> Strategy:
    """Return one strategy of the distribution: choices uniform, the rate log-uniform."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=stream))

    names = list(distribution.learning_rates)
    optimizer = names[pick(len(names))]
    low, high = distribution.learning_rates[optimizer]
    position = float(torch.rand((), generator=stream, dtype=torch.float64))
    preparations = distribution.preparations[pick(len(distribution.preparations))]
    return Strategy(
        optimizer=optimizer,
        learning_rate=low * (high / low) ** position,
        preparations=preparations,
        batch_size=distribution.batch_sizes[pick(len(distribution.batch_sizes))],
        scope=distribution.scopes[pick(len(distribution.scopes))],
        schedule=distribution.schedules[pick(len(distribution.schedules))],
        augmentation=distribution.augmentation,
    )


def domain_of(identity: int, weights: list[float]) -> int:
    """Return which restricted domain attacker `identity` takes.

    Every prefix of the sequence holds each domain in proportion to its weight, as closely as
    whole numbers allow.
    """
    order = _order(tuple(weights))
    return order[identity % len(order)]


@functools.lru_cache
def _order(weights: tuple[float, ...]) -> list[int]:
    # Long enough that any weights are met to a thousandth.
    total, counts, order = sum(weights), [0] * len(weights), []
    for taken in range(1 if len(weights) == 1 else 1000):
        deficits = [w / total * (taken + 1) - c for w, c in zip(weights, counts, strict=True)]
        order.append(deficits.index(max(deficits)))
        counts[order[-1]] += 1
    return order


@dataclass
class Visit:
    """An attacker's turn in a suppression step, whichever process takes it.

    `query_loss` is the weighted sum of its queries' losses; `ended` is 1 after its last step.
    """

    slot: int
    identity: int
    strategy: Strategy
    domain: Domain
    mine: bool
    query_loss: Tensor
    ended: Tensor


@dataclass
class Accumulator:
    """Sums over a suppression step: gradients by parameter name, query loss and query score.

    `visits` are the attackers' turns that they come from, in order.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    score: Tensor
    visits: list[Visit] = field(default_factory=list)

    @classmethod
    def like(
        cls, parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Accumulator:
        """Return zeros for these parameters, of their types unless one is given."""
        zeros = {n: torch.zeros_like(value, dtype=dtype) for n, value in parameters.items()}
        device = next(iter(parameters.values())).device
        loss = torch.zeros((), device=device, dtype=dtype)
        return cls(zeros, loss, loss.clone())

    def include(self, other: Accumulator) -> None:
        """Add the sums of another."""
        for name, value in other.gradients.items():
            self.gradients[name] += value
        self.loss += other.loss
        self.score += other.score

    def reduced(self, parameters: Mapping[str, Tensor], ranks: Ranks) -> Accumulator:
        """Return the sums over all processes, of the parameters' types."""
        of_visits = [part for visit in self.visits for part in (visit.query_loss, visit.ended)]
        ranks.add([*self.gradients.values(), self.loss, self.score, *of_visits])
        gradients = {n: self.gradients[n].to(value.dtype) for n, value in parameters.items()}
        return Accumulator(gradients, self.loss.float(), self.score.float(), self.visits)


class Attacker:
    """A simulated attacker of the model: a prepared copy, its optimizer, its displacement."""

    def __init__(
        self, real: nn.Module, identity: int, slot: int, horizon: int, pool: Rehearsals
    ) -> None:
        self.identity = identity
        self.slot = slot
        self.strategy = pool.strategy(identity)
        self.domain = pool.domain(identity)
        stream = (pool.spec.seed, ("attacker", identity))
        feed = pool.feed(identity, self.strategy)
        model = pool.copy(real)
        prepared = attacker_copy(
            model,
            self.strategy,
            pool.setting,
            classes=pool.setting.task.classes(self.domain),
            feed=feed,
            stream=stream,
        )
        shard(model, pool.setting.head, pool.ranks)
        self.origins = prepared.origins
        # A short life still has steps of its own after what its preparation spent.
        own = min(pool.rehearsal.steps, self.strategy.steps - prepared.spent)
        self.horizon = max(horizon, prepared.spent + own)
        self.tuning = FineTuning(
            model, self.strategy, pool.setting, feed, stream=stream, taken=prepared.spent
        )
        self.query_loss = torch.zeros((), device=pool.setting.device)
        self.displacement: dict[str, Tensor] = {}
        self.shapes = {name: value.shape for name, value in real.named_parameters()}
        self.detach_from(dict(real.named_parameters()))

    @property
    def model(self) -> nn.Module:
        """The attacker's own copy."""
        return self.tuning.model

    @spanned("attackers' copies")
    @torch.no_grad()
    def detach_from(self, real: Mapping[str, Tensor]) -> None:
        """Remember where the attacker stands relative to the real weights."""
        for name, value in self.model.named_parameters():
            origin, factor = self.origins[name]
            moved = value.detach().clone()
            if origin is not None and factor != 0:
                moved.sub_(real[origin], alpha=factor)
            self.displacement[name] = moved

    @spanned("attackers' copies")
    @torch.no_grad()
    def follow(self, real: Mapping[str, Tensor]) -> None:
        """Move with the real weights: `factor * real + displacement`."""
        for name, value in self.model.named_parameters():
            value.copy_(self.displacement[name])
            origin, factor = self.origins[name]
            if origin is not None and factor != 0:
                value.add_(real[origin], alpha=factor)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], member: dict[str, Any]) -> None:
        """Put back what `Rehearsals.state` returned of this attacker."""
        moved = _below(tensors, "displacement/")
        for name, value in self.model.named_parameters():
            self.displacement[name] = placed(moved[name], value)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer/{name}"])
        self.origins = {name: Origin(*held) for name, held in member["origins"].items()}
        self.tuning.taken = member["taken"]
        restore_optimizer(self.tuning.optimizer, _below(tensors, "optimizer/"), member["optimizer"])


class Rehearsals:
    """The pool of simulated attackers of one protection run.

    Of many processes each holds its own attackers only: a slot of the pool, or a turn of fresh
    ones, belongs to one of them. All know which attacker has which slot.
    """

    def __init__(
        self,
        spec: ProtectSpec,
        setting: Setting,
        weights: list[float],
        ranks: Ranks | None = None,
        structure: nn.Module | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.structure = structure
        self.spec = spec
        self.setting = setting
        self.weights = weights
        self.next_identity = 0
        self.visits = 0
        self.pool: dict[int, Attacker] = {}
        self.occupants: dict[int, int] = {}

    @property
    def rehearsal(self) -> Rehearsal:
        """The rehearsal's specification."""
        return self.spec.rehearsal

    def copy(self, real: nn.Module) -> nn.Module:
        """Return a copy of the real model, in one piece: preparations look at whole layers.

        A model in shards cannot be copied: its weights go into a copy of `structure`.
        """
        if not self.ranks.sharded or self.structure is None:
            return copy.deepcopy(real)
        model = copy.deepcopy(self.structure)
        load_whole(model, real.state_dict())
        return model

    def strategy(self, identity: int) -> Strategy:
        """Return the strategy of attacker `identity`: the fixed one, or a sample."""
        if self.rehearsal.fixed is not None:
            chosen = self.rehearsal.fixed
        else:
            stream = generator(self.spec.seed, "strategy", identity)
            chosen = sample_strategy(self.rehearsal.distribution, stream)
        # A schedule runs over the attacker's life, as it does in a real attack.
        return chosen.model_copy(update={"steps": self.rehearsal.life})

    def domain(self, identity: int) -> Domain:
        """Return the restricted domain attacker `identity` takes."""
        return self.setting.restricted[domain_of(identity, self.weights)]

    def feed(self, identity: int, strategy: Strategy) -> Feed:
        """Return the attacker's batches: its own images first, then the query images."""
        domain = self.domain(identity)
        stream = (self.spec.seed, ("attacker", identity))
        return self.setting.feed(
            domain,
            attacker_images(domain, strategy.data_fraction, stream),
            batch_size=strategy.batch_size + self.rehearsal.query_batch_size,
            stream=(self.spec.seed, ("attacker", identity, "batches")),
            augmentation=strategy.augmentation,
        )

    def suppress(self, real: nn.Module) -> tuple[Accumulator, list[Attacker]]:
        """Advance the next attackers by K steps each; return the streamed gradient.

        Implements sum_i sum_k gamma_ik dL/dtheta at the attackers' weights (arXiv 2404.12699,
        algorithm 1, first order). Memory does not grow with K: each query gradient is added to
        one accumulator at once. `real` is not changed. The sums are over all processes, one
        reduction whatever K is; the attackers returned are this process's.
        """
        parameters = dict(real.named_parameters())
        # In float64 it does not matter in which order, and by which process, attackers are added.
        wide = torch.float32 if self.setting.device.type == "mps" else torch.float64
        total = Accumulator.like(parameters, wide)
        attackers = []
        for turn in range(self.rehearsal.strategies):
            fresh, visit = self._next(turn)
            total.visits.append(visit)
            if not visit.mine:
                continue
            attacker = self._recruit(real, visit) if fresh else self.pool[visit.slot]
            attacker.follow(parameters)
            own = Accumulator.like(parameters)
            self._rehearse(attacker, own)
            total.include(own)
            visit.query_loss.copy_(attacker.query_loss)
            visit.ended.fill_(attacker.tuning.taken >= attacker.horizon)
            if attacker.slot in self.pool:
                attacker.detach_from(parameters)
            attackers.append(attacker)
        total = total.reduced(parameters, self.ranks)
        self._dismiss(total.visits)
        return total, attackers

    def _next(self, turn: int) -> tuple[bool, Visit]:
        """Return whose turn it is, and whether that attacker is new."""
        if self.rehearsal.horizon is None:
            slot, owner, fresh = -1, turn, True
        else:
            slot = owner = self.visits % self.rehearsal.pool
            self.visits += 1
            fresh = slot not in self.occupants
        identity = self.next_identity if fresh else self.occupants[slot]
        self.next_identity += fresh
        if slot >= 0:
            self.occupants[slot] = identity
        zero = torch.zeros((), device=self.setting.device)
        mine = self.ranks.owns(owner)
        strategy, domain = self.strategy(identity), self.domain(identity)
        return fresh, Visit(slot, identity, strategy, domain, mine, zero, zero.clone())

    @spanned("attackers' copies")
    def _recruit(self, real: nn.Module, visit: Visit) -> Attacker:
        horizon = self.rehearsal.horizon
        if horizon is None:
            return Attacker(real, visit.identity, visit.slot, self.rehearsal.steps, self)
        # The first generation ends staggered, so that later ones are of every age. It has the
        # first identities.
        first = visit.identity < self.rehearsal.pool
        share = (visit.slot + 1) / self.rehearsal.pool if first else 1.0
        life = max(1, round(horizon * share))
        self.pool[visit.slot] = Attacker(real, visit.identity, visit.slot, life, self)
        return self.pool[visit.slot]

    def _dismiss(self, visits: list[Visit]) -> None:
        """Forget the attackers whose last step that was, here and elsewhere."""
        if self.rehearsal.horizon is None:
            return
        for visit, ended in zip(
            visits, torch.stack([v.ended for v in visits]).tolist(), strict=True
        ):
            if ended:
                del self.occupants[visit.slot]
                self.pool.pop(visit.slot, None)

    def _rehearse(self, attacker: Attacker, total: Accumulator) -> None:
        steps = min(self.rehearsal.steps, attacker.horizon - attacker.tuning.taken)
        gammas = gammas_of(self.rehearsal.gamma, steps, self.rehearsal.strategies)
        passing = self._passing(attacker)
        leaves = [leaf for _, leaf, _ in passing]
        sums = [total.gradients[name] for name, _, _ in passing]
        factors = [factor for _, _, factor in passing]
        # After a distillation nothing of the real weights is left: there is no gradient to pass on.
        together = bool(factors) and all(factor == 1 for factor in factors) and not plain()
        attacker.query_loss.zero_()
        for gamma, _ in zip(gammas, attacker.tuning.run(steps), strict=True):
            with span("query passes"):
                loss, score = self._query(attacker)
                found = gradients(loss, attacker.model, leaves)
            if together:
                torch._foreach_add_(sums, found, alpha=gamma)
            else:
                for into, gradient, factor in zip(sums, found, factors, strict=True):
                    into.add_(gradient, alpha=gamma * factor)
            attacker.query_loss += gamma * loss.detach()
            total.score += score / (steps * self.rehearsal.strategies)
        total.loss += attacker.query_loss

    def _query(self, attacker: Attacker) -> tuple[Tensor, Tensor]:
        tuning, task = attacker.tuning, self.setting.task
        if tuning.query is None:
            raise RuntimeError("a query needs a step before it")
        stream = generator(self.spec.seed, "attacker", attacker.identity, "query", tuning.taken)
        with seeded(self.spec.seed, "attacker", attacker.identity, "query", tuning.taken):
            with tuning.setting.autocast():
                outputs, targets = task.outputs(tuning.model, *tuning.query, stream)
            loss = SUPPRESSIONS[self.spec.suppression](outputs, targets).mean()
        return loss, task.score(outputs.detach(), targets).mean()

    def _passing(self, attacker: Attacker) -> list[tuple[str, nn.Parameter, float]]:
        """Return the real names of the parameters that query gradients reach, the attacker's own
        parameters and their factors.
        """
        fresh_passes = self.spec.head_gradient == "apply_fresh"
        prefix = self.setting.head + "."
        passing = []
        for name, leaf in attacker.model.named_parameters():
            real, factor = attacker.origins[name]
            if real is None:
                continue
            same = leaf.shape == attacker.shapes[real]
            if factor == 0 and fresh_passes and same and real.startswith(prefix):
                factor = 1.0
            if factor != 0:
                passing.append((real, leaf, factor))
        return passing

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what persists between rounds, as tensors by name and as plain values.

        The first process has the attackers of all.
        """
        tensors: dict[str, Tensor] = {}
        members = []
        for slot, attacker in sorted(self.pool.items()):
            moments, plain = optimizer_tensors(attacker.tuning.optimizer)
            groups = {
                "displacement": attacker.displacement,
                "buffer": dict(attacker.model.named_buffers()),
                "optimizer": moments,
            }
            for group, values in groups.items():
                tensors.update({f"{slot}/{group}/{name}": v for name, v in values.items()})
            members.append(
                {
                    "slot": slot,
                    "identity": attacker.identity,
                    "horizon": attacker.horizon,
                    "taken": attacker.tuning.taken,
                    "origins": {n: list(origin) for n, origin in attacker.origins.items()},
                    "optimizer": plain,
                }
            )
        members, tensors = self.ranks.collect(members, tensors)
        meta = {"next_identity": self.next_identity, "visits": self.visits, "members": members}
        return tensors, meta

    def restore(self, real: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned, around the real model as it now is."""
        self.next_identity, self.visits = meta["next_identity"], meta["visits"]
        self.pool = {}
        self.occupants = {member["slot"]: member["identity"] for member in meta["members"]}
        for member in meta["members"]:
            slot = member["slot"]
            if not self.ranks.owns(slot):
                continue
            attacker = Attacker(real, member["identity"], slot, member["horizon"], self)
            attacker.restore(_below(tensors, f"{slot}/"), member)
            self.pool[slot] = attacker


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def gammas_of(kind: str, steps: int, strategies: int) -> list[float]:
    """Return the weight of each of an attacker's queries; they sum to 1 / strategies."""
    raw = {
        "uniform": [1.0] * steps,
        "linear": [float(k + 1) for k in range(steps)],
        "last": [0.0] * (steps - 1) + [1.0],
    }[kind]
    return [value / (sum(raw) * strategies) for value in raw]
