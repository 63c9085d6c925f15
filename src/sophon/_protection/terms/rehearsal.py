"""A hindrance: simulated attackers, and the suppression gradient streamed out of them."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sophon._base.plain_mode import plain
from sophon._base.seeding import generator, seeded
from sophon._base.spans import span, spanned
from sophon._data import Domain
from sophon._models import heads
from sophon._protection.attackers import Accumulator, Attacker, Plan, Visit, below, domain_of
from sophon._protection.losses import SuppressionName, suppression_named
from sophon._protection.readers import Readers, ReadersSpec, check_images
from sophon._protection.rehearsal_checks import check_rehearsal
from sophon._protection.sampling import StrategyDistribution, sample_strategy
from sophon._protection.term import Contribution, Hindrance, State, Surroundings, TermSpec
from sophon._records.statement import Rehearsed
from sophon._specs import Strategy
from sophon._specs.base import Positive, Rate
from sophon._training.loop import MOMENTS, attacker_images
from sophon._training.setting import Feed
from sophon._training.sharding import gradients, load_whole


class Rehearsal(TermSpec):
    """`kind = "rehearsal"`: how protection simulates attackers, and what it makes of them.

    Each update advances `strategies` attackers by `steps` (the paper's K). Without a `horizon`
    every attacker is fresh and used once, as in the paper. With one, `pool` attackers persist:
    each keeps its optimizer and its displacement from the real weights from update to update until
    it has taken `horizon` steps, then a new one takes its place.

    After each step the suppression `loss` of a query batch is what hinders, by default KLU for a
    classifier and DoS for a diffusion model; with `readers` what readers find in the attacker's
    features is added (`erasure`, weighed by `erasure_weight`), on the same batch. `gamma` weighs
    the steps. A fresh head's gradient is not the real head's, unless `head_gradient` says so.
    """

    kind: Literal["rehearsal"] = "rehearsal"
    loss: SuppressionName = None
    strategies: Positive = 1
    steps: Positive = 20
    horizon: Positive | None = None
    pool: Positive = 8
    distribution: StrategyDistribution = StrategyDistribution()
    fixed: Strategy | None = None
    query_batch_size: Positive = 32
    gamma: Literal["uniform", "linear", "last"] = "uniform"
    head_gradient: Literal["exclude_fresh", "apply_fresh"] = "exclude_fresh"
    readers: ReadersSpec | None = None
    erasure_weight: Rate = 3.0

    @property
    def life(self) -> int:
        """Steps that an attacker takes in all."""
        return self.horizon or self.steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        usual = Strategy.model_fields["steps"].default
        if self.fixed is not None and self.fixed.steps not in (usual, self.life):
            raise ValueError(
                f"fixed.steps = {self.fixed.steps}: attackers take horizon or steps, here"
                f" {self.life}; leave it out"
            )
        if self.fixed is not None and self.distribution != StrategyDistribution():
            raise ValueError("fixed and distribution: strategies are fixed or sampled; give one")
        if self.horizon is not None and self.horizon < self.steps:
            raise ValueError(f"horizon = {self.horizon} is shorter than steps = {self.steps}")
        if self.horizon is not None and self.pool < self.strategies:
            raise ValueError(f"pool = {self.pool} is smaller than strategies = {self.strategies}")
        return self


class RehearsalTerm(Hindrance[Rehearsal]):
    """sum_i sum_k gamma_ik grad L(theta_ik): the suppression loss L at the weights theta_ik of
    attacker i after its step k, first order (arXiv 2404.12699, algorithm 1).

    Memory does not grow with K: each query gradient is added to one accumulator at once. Of many
    processes each holds its own attackers only: a slot of the pool, or a turn of fresh ones,
    belongs to one of them. All know which attacker has which slot.
    """

    spec_type = Rehearsal
    turn_noun = "attackers"
    instead_of_two = "raise its strategies, or widen its distribution"

    def __init__(self, spec: Rehearsal, around: Surroundings) -> None:
        super().__init__(spec, around)
        self.setting, self.ranks = around.setting, around.ranks
        self.suppression = suppression_named(spec.loss, self.setting.task.metric)
        self.weights = [domain.weight for domain in self.setting.restricted]
        self.readers = (
            None
            if spec.readers is None
            else Readers(
                spec.readers,
                around,
                spec.query_batch_size,
                (spec.fixed or spec.distribution).augmentation,
            )
        )
        self.next_identity = 0
        self.visits = 0
        self.pool: dict[int, Attacker] = {}
        self.occupants: dict[int, int] = {}

    @classmethod
    def check(cls, spec: Rehearsal, model: nn.Module, around: Surroundings) -> None:
        """Raise unless every attacker can be prepared, fed and shared among the processes."""
        check_rehearsal(spec, model, around)
        if spec.readers is not None:
            check_images(
                around.setting.restricted,
                spec.query_batch_size,
                "protect.hinder: a rehearsal's query_batch_size",
            )

    @classmethod
    def turns(cls, spec: Rehearsal, updates: int) -> int:
        """Return how many attackers there are in so many updates."""
        return max(1, updates * spec.strategies * spec.steps // spec.life)

    @classmethod
    def rehearsed(cls, spec: Rehearsal) -> Rehearsed:
        """Return the rate rehearsed last, by optimizer, and the steps of an attacker's life."""
        if spec.fixed is not None:
            return Rehearsed(rates={spec.fixed.optimizer: spec.fixed.learning_rate}, life=spec.life)
        rates = {name: high for name, (_, high) in spec.distribution.learning_rates.items()}
        return Rehearsed(rates=rates, life=spec.life)

    @classmethod
    def state_copies(cls, spec: Rehearsal) -> int:
        """Return three a persistent attacker: its displacement and its moments."""
        return 0 if spec.horizon is None else 3 * spec.pool

    @classmethod
    def extent(cls, spec: Rehearsal) -> dict[str, int]:
        """Return K, the attackers, and their lives, of which preparations take a share."""
        return {"steps": spec.steps, "strategies": spec.strategies, "life": spec.life}

    @classmethod
    def shortened(cls, spec: Rehearsal, extent: dict[str, int]) -> Rehearsal:
        """Return the same with so few; what a preparation may spend depends on the life."""
        few, life = extent["strategies"], max(extent["steps"], extent["life"])
        fresh = {"steps": extent["steps"], "horizon": life, "strategies": few, "pool": 2 * few}
        return spec.model_copy(update=fresh)

    @classmethod
    def held_bytes(cls, spec: Rehearsal, weights: int) -> int:
        """Return what persistent attackers hold: a copy, a displacement, an optimizer's moments."""
        if spec.horizon is None:
            return 0
        names = spec.distribution.learning_rates if spec.fixed is None else (spec.fixed.optimizer,)
        return spec.pool * weights * (2 + max(MOMENTS[name] for name in names))

    def contribute(self, model: nn.Module) -> Contribution:
        """Return the streamed gradient of one update."""
        total, _ = self.suppress(model)
        return Contribution(
            gradients=total.gradients,
            loss=total.loss,
            score=total.score,
            labels=tuple(visit.strategy.label() for visit in total.visits),
            domains=tuple(visit.domain.name for visit in total.visits),
            losses=tuple(visit.query_loss for visit in total.visits),
        )

    def suppress(self, real: nn.Module) -> tuple[Accumulator, list[Attacker]]:
        """Advance the next attackers by K steps each; return the streamed gradient.

        `real` is not changed. The sums are over all processes, one reduction whatever K is; the
        attackers returned are this process's.
        """
        parameters = dict(real.named_parameters())
        # In float64 it does not matter in which order, and by which process, attackers are added.
        wide = torch.float32 if self.setting.device.type == "mps" else torch.float64
        total = Accumulator.like(parameters, wide)
        attackers = []
        for turn in range(self.spec.strategies):
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
            if visit.slot in self.pool:
                attacker.detach_from(parameters)
            attackers.append(attacker)
        total = total.reduced(parameters, self.ranks)
        self._dismiss(total.visits)
        return total, attackers

    def strategy(self, identity: int) -> Strategy:
        """Return the strategy of attacker `identity`: the fixed one, or a sample."""
        chosen = self.spec.fixed
        if chosen is None:
            stream = generator(self.around.seed, "strategy", identity)
            chosen = sample_strategy(self.spec.distribution, stream)
        # A schedule runs over the attacker's life, as it does in a real attack.
        return chosen.model_copy(update={"steps": self.spec.life})

    def domain(self, identity: int) -> Domain:
        """Return the restricted domain attacker `identity` takes."""
        return self.setting.restricted[domain_of(identity, self.weights)]

    def feed(self, identity: int, strategy: Strategy) -> Feed:
        """Return the attacker's batches: its own images first, then the query images."""
        domain = self.domain(identity)
        stream = (self.around.seed, ("attacker", identity))
        return self.setting.feed(
            domain,
            attacker_images(domain, strategy.data_fraction, stream),
            batch_size=strategy.batch_size + self.spec.query_batch_size,
            stream=(self.around.seed, ("attacker", identity, "batches")),
            augmentation=strategy.augmentation,
        )

    def _attacker(self, real: nn.Module, identity: int, horizon: int) -> Attacker:
        strategy = self.strategy(identity)
        feed = self.feed(identity, strategy)
        plan = Plan(identity, strategy, self.domain(identity), feed, self.spec.steps)
        return Attacker(real, self._copy(real), plan, self.around, horizon)

    def _copy(self, real: nn.Module) -> nn.Module:
        """Return a copy of the real model, in one piece: preparations look at whole layers.

        A model in shards cannot be copied: its weights go into a copy of the given one.
        """
        if not self.ranks.sharded:
            return copy.deepcopy(real)
        model = copy.deepcopy(self.around.given)
        load_whole(model, real.state_dict())
        return model

    def _next(self, turn: int) -> tuple[bool, Visit]:
        """Return whose turn it is, and whether that attacker is new."""
        if self.spec.horizon is None:
            slot, owner, fresh = -1, turn, True
        else:
            slot = owner = self.visits % self.spec.pool
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
        horizon = self.spec.horizon
        if horizon is None:
            return self._attacker(real, visit.identity, self.spec.steps)
        # The first generation ends staggered, so that later ones are of every age. It has the
        # first identities.
        first = visit.identity < self.spec.pool
        share = (visit.slot + 1) / self.spec.pool if first else 1.0
        life = max(1, round(horizon * share))
        self.pool[visit.slot] = self._attacker(real, visit.identity, life)
        return self.pool[visit.slot]

    def _dismiss(self, visits: list[Visit]) -> None:
        """Forget the attackers whose last step that was, here and elsewhere."""
        if self.spec.horizon is None:
            return
        ended = torch.stack([v.ended for v in visits]).tolist()
        for visit, over in zip(visits, ended, strict=True):
            if over:
                del self.occupants[visit.slot]
                self.pool.pop(visit.slot, None)

    def _rehearse(self, attacker: Attacker, total: Accumulator) -> None:
        steps = min(self.spec.steps, attacker.horizon - attacker.tuning.taken)
        gammas = gammas_of(self.spec.gamma, steps, self.spec.strategies)
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
            total.score += score / (steps * self.spec.strategies)
        total.loss += attacker.query_loss

    def _query(self, attacker: Attacker) -> tuple[Tensor, Tensor]:
        tuning, task = attacker.tuning, self.setting.task
        if tuning.query is None:
            raise RuntimeError("a query needs a step before it")
        names = ("attacker", attacker.plan.identity, "query", tuning.taken)
        seed, readers = self.around.seed, self.readers
        with seeded(seed, *names), _watching(readers, tuning.model) as features:
            with tuning.setting.autocast():
                outputs, targets = task.outputs(
                    tuning.model, *tuning.query, generator(seed, *names)
                )
            loss = self.suppression(outputs, targets).mean()
        if readers is not None:
            stream = generator(seed, *names, "readers")
            found = readers.erasure(features, tuning.query[1], attacker.plan.domain, stream)
            loss = loss + self.spec.erasure_weight * found.loss
        return loss, task.score(outputs.detach(), targets).mean()

    def _passing(self, attacker: Attacker) -> list[tuple[str, nn.Parameter, float]]:
        """Return the real names of the parameters that query gradients reach, the attacker's own
        parameters and their factors.
        """
        fresh_passes = self.spec.head_gradient == "apply_fresh"
        prefix = tuple(f"{end}." for end in heads(attacker.model, self.setting.head))
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

    def state(self) -> State:
        """Return what persists between rounds; the first process has the attackers of all."""
        tensors: dict[str, Tensor] = {}
        members = []
        for slot, attacker in sorted(self.pool.items()):
            held, member = attacker.state()
            tensors.update({f"{slot}/{name}": value for name, value in held.items()})
            members.append({"slot": slot, **member})
        members, tensors = self.ranks.collect(members, tensors)
        meta = {"next_identity": self.next_identity, "visits": self.visits, "members": members}
        return tensors, meta

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Put back what `state` returned, around the real model as it now is."""
        self.next_identity, self.visits = meta["next_identity"], meta["visits"]
        self.pool = {}
        self.occupants = {member["slot"]: member["identity"] for member in meta["members"]}
        for member in meta["members"]:
            slot = member["slot"]
            if not self.ranks.owns(slot):
                continue
            attacker = self._attacker(model, member["identity"], member["horizon"])
            attacker.restore(below(tensors, f"{slot}/"), member)
            self.pool[slot] = attacker


def _watching(
    readers: Readers | None, model: nn.Module
) -> AbstractContextManager[dict[str, Tensor]]:
    return nullcontext({}) if readers is None else readers.watching(model)


def gammas_of(kind: str, steps: int, strategies: int) -> list[float]:
    """Return the weight of each of an attacker's queries; they sum to 1 / strategies."""
    raw = {
        "uniform": [1.0] * steps,
        "linear": [float(k + 1) for k in range(steps)],
        "last": [0.0] * (steps - 1) + [1.0],
    }[kind]
    return [value / (sum(raw) * strategies) for value in raw]
