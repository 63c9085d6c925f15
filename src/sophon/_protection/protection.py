"""Protection: rounds of fine-tuning suppression, reinforcement and the intactness guard.

`Protection(...)` is an iterator of `Round`s; `protect(...)` runs it to the end. With a folder
the run can be killed at any moment and repeated: it goes on to bit-identical weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from sophon._base.errors import CheckpointError, NonFiniteError
from sophon._base.files import write_json, write_text
from sophon._base.plain_mode import plain
from sophon._base.seeding import generator, seeded
from sophon._base.spans import spanned
from sophon._data import Domain
from sophon._models import network_identity, weights_sha256
from sophon._protection.checks import check_protection
from sophon._protection.guard import IntactnessGuard
from sophon._protection.terms.rehearsal import Rehearsals, Visit
from sophon._records.audit_record import Measurement
from sophon._records.round import Round
from sophon._specs import ModelSpec, ProtectSpec, fingerprint_of
from sophon._tasks import Classification, Task
from sophon._training.checkpoints import open_run, save_state
from sophon._training.loop import (
    fused,
    optimizer_tensors,
    restore_optimizer,
)
from sophon._training.ranks import Ranks, take_card
from sophon._training.setting import make_setting
from sophon._training.sharding import gathered, load_whole, sharing, splits, whole
from sophon._training.sharding import shard as spread
from sophon._training.shipping import ship

State = tuple[dict[str, Tensor], dict[str, Any]]
_ROUNDS, _STATES, _DONE = "rounds.jsonl", "states", "protection.json"
# Raise this when a change of the rounds changes what a run that is resumed would give.
ENGINE_VERSION = 2
# States on the disk at once, at most: two, and the one being written.
_KEPT = 3


@dataclass(frozen=True)
class Protected:
    """What protection returns: the model, and where its weights come from.

    `before` and `after` are scores on the original domain's validation split; `shipped_round`
    is the round after which the guard met the shipped weights.
    """

    model: nn.Module
    rounds: tuple[Round, ...]
    before: Measurement
    after: Measurement
    shipped_round: int
    folder: Path | None


class Protection:
    """A protection run: iterate it for its rounds, then ask it for its `result()`.

    Implements SOPHON (arXiv 2404.12699, algorithm 1). The model passed in is never changed.
    With `out`, a folder, the run resumes there when it is repeated. `head` names the classifier
    layer where it cannot be found; `model_spec` is written beside the weights as provenance;
    `device` is CUDA where there is one unless it is given; of several processes on a machine each
    takes the card of its `LOCAL_RANK`.

    In a process group (torchrun) all processes must make the same call: each rehearses its share
    of the attackers, and the first one writes. With `shard`, for models whose weights fit on one
    device but whose training state does not, all work on the same attacker, and model and attackers
    are in shards (FSDP2). Neither is part of what the run is: it may be resumed with any number of
    processes.

    Raises DataError, UnsupportedModelError or CheckpointError before any work; while it runs,
    NonFiniteError.
    """

    def __init__(  # noqa: PLR0913 - one keyword per part of a run
        self,
        model: nn.Module,
        *,
        original: Domain,
        restricted: Domain | list[Domain] | tuple[Domain, ...],
        task: Task | None = None,
        spec: ProtectSpec | None = None,
        out: str | Path | None = None,
        head: str | None = None,
        model_spec: ModelSpec | None = None,
        device: str | torch.device | None = None,
        shard: bool = False,
    ) -> None:
        self.ranks = Ranks.present(sharded=shard)
        take_card(device)
        self.spec = spec = ProtectSpec() if spec is None else spec
        restricted = (restricted,) if isinstance(restricted, Domain) else tuple(restricted)
        self.out = None if out is None else Path(out)
        self.model_spec = model_spec
        self._given = model
        with self.ranks.agreeing():
            self.setting = make_setting(
                model,
                task=task or Classification(),
                original=original,
                restricted=restricted,
                head=head,
                precision=spec.precision,
                device=device,
            )
            independent = self.ranks.world > 1 and splits(model, self.setting)
            check_protection(model, spec, self.setting, self.ranks, independent=independent)
            self.identity = self._identity(model)
        self.ranks.require_same(
            {
                **self.identity,
                "shard": str(shard),
                "out": "a folder" if out is not None else "none",
                "independence of rows": str(independent),
            }
        )
        self.model = self.setting.place(copy.deepcopy(model).requires_grad_(True))
        enough = spec.original_batch_size >= self.ranks.world
        self._split = independent and enough and not self.ranks.sharded and not plain()
        spread(self.model, self.setting.head, self.ranks)
        parameters = list(self.model.parameters())
        self.suppressor = Adam(parameters, spec.suppression_rate, **fused())
        self.reinforcer = Adam(parameters, spec.reinforcement_rate, **fused())
        weights = [domain.weight for domain in restricted]
        self.rehearsals = Rehearsals(spec, self.setting, weights, self.ranks, model)
        self.original_feed = self.setting.feed(
            original,
            original.train,
            batch_size=spec.original_batch_size,
            stream=(spec.seed, ("original",)),
            augmentation=spec.original_augmentation,
        )
        self.rounds: list[Round] = []
        self.reinforced = 0
        self.guard = IntactnessGuard(self.model, self.setting, spec.guard, self.ranks)
        self._open()

    def _identity(self, model: nn.Module) -> dict[str, str]:
        """Return what determines the result; how many processes there are does not."""
        domains = (self.setting.original, *self.setting.restricted)
        return {
            "spec": self.spec.fingerprint(),
            "model": weights_sha256(model),
            "engine": str(ENGINE_VERSION),
            "network": network_identity(model),
            "domains": fingerprint_of([[d.name, d.weight, d.fingerprint()] for d in domains]),
            "task": self.setting.task.name,
            "head": self.setting.head,
            "precision": self.setting.precision,
            "plain": str(plain()),
        }

    @property
    def done(self) -> int:
        """Rounds finished so far."""
        return len(self.rounds)

    def __len__(self) -> int:
        """Return the number of rounds of the whole run."""
        return self.spec.rounds

    def __iter__(self) -> Iterator[Round]:
        """Run the remaining rounds, yielding each once it is recorded."""
        while self.done < self.spec.rounds:
            self.rounds.append(self._round(self.done))
            if self.out is not None:
                if self.ranks.first:
                    with (self.out / _ROUNDS).open("a", encoding="utf-8") as file:
                        file.write(self.rounds[-1].model_dump_json() + "\n")
                if self.done % self.spec.checkpoint_every == 0 or self.done == self.spec.rounds:
                    self.save()
            yield self.rounds[-1]

    def result(self) -> Protected:
        """Return the protected model after the last round, written to the folder if there is one.

        Raises IntactnessError if no checked weights met the tolerance; every file is kept.
        """
        if self.done < self.spec.rounds:
            raise CheckpointError(
                f"round {self.done} of {self.spec.rounds}: iterate to the end before result()"
            )
        with self.ranks.agreeing():
            result = self._shipped()
            if self.out is not None and self.ranks.first:
                protection = self._description(result)
                about = {"protection": protection}
                ship(self.out, result.model, self.model_spec, about, self.setting.task)
                write_json(self.out / _DONE, protection)
        return result

    def _shipped(self) -> Protected:
        scores = [r.guard_score for r in self.rounds if r.guard_score is not None]
        shipped = self.guard.require_shipped(max(scores))
        model = copy.deepcopy(self._given)
        load_whole(model, shipped.tensors)
        model.eval()
        return Protected(
            model=model,
            rounds=tuple(self.rounds),
            before=self.guard.before,
            after=shipped.score,
            shipped_round=shipped.round,
            folder=self.out,
        )

    def save(self) -> None:
        """Write the state to resume from. Without a folder this does nothing."""
        if self.out is None:
            return
        self.save_to(self.out / _STATES)

    @spanned("states written")
    def save_to(self, folder: Path) -> None:
        """Write the state to resume from into `folder`."""
        tensors, plain = self._state()
        if self.ranks.first:
            save_state(folder, self.done, tensors, plain)

    # --- one round ---------------------------------------------------------------------------

    def _round(self, index: int) -> Round:
        start = time.perf_counter()
        losses, scores, norms, labels, domains = [], [], [], [], []
        for _ in range(self.spec.suppression_steps):
            total, _ = self.rehearsals.suppress(self.model)
            labels += [visit.strategy.label() for visit in total.visits]
            domains += [visit.domain.name for visit in total.visits]
            norm = self._apply(total.gradients)
            values = torch.stack([total.loss, total.score, norm]).tolist()
            self._require_finite(values, index, total.visits)
            losses.append(values[0])
            scores.append(values[1])
            norms.append(values[2])
        reinforced = [self._reinforce() for _ in range(self._reinforcement_steps())]
        pairs = torch.stack(reinforced).mean(0).tolist() if reinforced else None
        if pairs is not None:
            self._require_finite(pairs, index, [])
        query_score = sum(scores) / len(scores)
        self.guard.observe(query_score)
        steps = self._reinforcement_steps()
        due = (index + 1) % self.spec.guard.every == 0 or index + 1 == self.spec.rounds
        guard_score, verdict = self.guard.check(index + 1) if due else (None, None)
        return Round(
            index=index,
            suppression_loss=sum(losses) / len(losses),
            query_score=query_score,
            original_loss=pairs[0] if pairs else None,
            suppression_gradient_norm=sum(norms) / len(norms),
            reinforcement_gradient_norm=pairs[1] if pairs else None,
            strategies=tuple(labels),
            domains=tuple(domains),
            guard_score=guard_score,
            guard=verdict,
            reinforcement_steps=steps,
            wall_s=time.perf_counter() - start,
        )

    def _require_finite(self, values: list[float], index: int, visits: list[Visit]) -> None:
        """Raise NonFiniteError, naming the attackers whose losses are not finite, unless all are.

        Without attackers the values are those of reinforcement.
        """
        if all(math.isfinite(value) for value in values):
            return
        at_fault = [v for v in visits if not math.isfinite(float(v.query_loss))] or visits
        part, remedy = "reinforcement:", "lower protect.reinforcement_rate"
        if at_fault:
            named = ", ".join(visit.strategy.label() for visit in at_fault)
            part = f"suppression of strategy {named}:"
            remedy = "narrow that optimizer's range of rates, or lower protect.suppression_rate"
        error = NonFiniteError(
            f"round {index}: a loss or gradient is not finite in the {part}"
            f" {remedy}; states written before are kept"
        )
        error.told = not self.ranks.first
        raise error

    @spanned("suppression step")
    def _apply(self, gradients: dict[str, Tensor]) -> Tensor:
        """Take one clipped Adam step along the streamed gradient; return its norm before."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name]
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm))
        self.suppressor.step()
        self.suppressor.zero_grad(set_to_none=True)
        return norm

    def _reinforcement_steps(self) -> int:
        return self.spec.reinforcement_steps + self.guard.extra_steps

    @spanned("reinforcement")
    def _reinforce(self) -> Tensor:
        """Take one ordinary training step on the original domain; return loss and gradient norm."""
        step = self.reinforced
        self.model.train()
        with sharing(self.model, self.ranks) if self._split else nullcontext():
            loss = self._learn(step)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self._split:
            self.ranks.add(gradients)
        elif not self.ranks.sharded:
            # All computed the whole batch; kernels need not agree to the last bit on that.
            self.ranks.follow_first([loss, *gradients, *self.model.buffers()])
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), math.inf))
        self.reinforcer.step()
        self.reinforcer.zero_grad(set_to_none=True)
        self.reinforced += 1
        return torch.stack([loss, norm])

    def _learn(self, step: int) -> Tensor:
        """Add the gradient of one batch of the original domain; return the loss."""
        task, seed = self.setting.task, self.spec.seed
        images, labels = self.original_feed.batch(step)
        with seeded(seed, "reinforcement", step):
            stream = generator(seed, "reinforcement", "task", step)
            with self.setting.autocast():
                outputs, targets = task.outputs(self.model, images, labels, stream)
            loss = task.loss(outputs, targets).mean()
            loss.backward()
        return loss.detach()

    # --- resuming ----------------------------------------------------------------------------

    def _open(self) -> None:
        """Start afresh or take up the newest state of the folder."""
        held: list[State | None] = [None]
        with self.ranks.agreeing():
            if self.out is not None and self.ranks.first:
                held = [self._opened(self.out)]
        state = self.ranks.from_first(held[0])
        if state is not None:
            self._restore(*state)
        else:
            self.guard.begin()

    def _opened(self, out: Path) -> State | None:
        """Take the folder; return its newest state, or None in a new one."""
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        state = open_run(
            out,
            self.identity,
            self.spec.model_dump(mode="json"),
            prefix="protect",
            states=out / _STATES,
            needed_bytes=_KEPT * size * self._copies(),
            owner=self,
        )
        if state is None:
            write_text(out / _ROUNDS, "")
        return state

    def _copies(self) -> int:
        """Return how many times the model's size a state holds, at most."""
        attackers = 0 if self.spec.rehearsal.horizon is None else self.spec.rehearsal.pool
        # The model, two kept copies, two Adams; an attacker's displacement and its moments.
        return 3 + 4 + 3 * attackers

    def _state(self) -> State:
        """Return whole tensors, in the first process only, and plain values; all must ask."""
        attackers, pool = self.rehearsals.state()
        guarded, guard = self.guard.state()
        groups = {"model": self.model.state_dict(), "attackers": attackers, **guarded}
        plain: dict[str, Any] = {}
        for name, optimizer in self._optimizers().items():
            groups[name], plain[name] = optimizer_tensors(optimizer)
        named = {f"{group}|{name}": v for group, held in groups.items() for name, v in held.items()}
        tensors = gathered(named, self.ranks)
        meta = {
            "rounds": [record.model_dump(mode="json") for record in self.rounds],
            "reinforced": self.reinforced,
            "guard": guard,
            "pool": pool,
            "optimizers": plain,
        }
        return tensors, meta

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        def group(name: str) -> dict[str, Tensor]:
            mark = name + "|"
            return {k.removeprefix(mark): v for k, v in tensors.items() if k.startswith(mark)}

        load_whole(self.model, group("model"))
        self.rounds = [Round.model_validate(held) for held in meta["rounds"]]
        self.reinforced = meta["reinforced"]
        guarded = {name: group(name) for name in ("last_good", "shipped")}
        self.guard.restore(guarded, meta["guard"])
        for name, optimizer in self._optimizers().items():
            restore_optimizer(optimizer, group(name), meta["optimizers"][name])
        self.rehearsals.restore(self.model, group("attackers"), meta["pool"])
        if self.out is not None and self.ranks.first:
            lines = [record.model_dump_json() + "\n" for record in self.rounds]
            write_text(self.out / _ROUNDS, "".join(lines))

    def _optimizers(self) -> dict[str, Adam]:
        return {"suppressor": self.suppressor, "reinforcer": self.reinforcer}

    def _description(self, result: Protected) -> dict[str, Any]:
        return {
            "spec": self.spec.model_dump(mode="json"),
            "identity": self.identity,
            "original": self.setting.original.name,
            "restricted": [domain.name for domain in self.setting.restricted],
            "head": self.setting.head,
            "input": self.setting.input(),
            "validation_before": result.before.model_dump(),
            "validation_after": result.after.model_dump(),
            "shipped_round": result.shipped_round,
            "rounds": len(result.rounds),
            "guard_violations": sum(r.guard == "violated" for r in result.rounds),
            "wall_s": sum(r.wall_s for r in result.rounds),
            "processes": self.ranks.world,
            "backend": self.ranks.backend,
        }


def protect(  # noqa: PLR0913 - as Protection
    model: nn.Module,
    *,
    original: Domain,
    restricted: Domain | list[Domain] | tuple[Domain, ...],
    task: Task | None = None,
    spec: ProtectSpec | None = None,
    out: str | Path | None = None,
    head: str | None = None,
    device: str | torch.device | None = None,
    shard: bool = False,
) -> Protected:
    """Return the protected model; see `Protection` for the arguments.

    Raises what `Protection` raises, and IntactnessError if no weights kept the original task
    within the tolerance.
    """
    run = Protection(
        model,
        original=original,
        restricted=restricted,
        task=task,
        spec=spec,
        out=out,
        head=head,
        device=device,
        shard=shard,
    )
    for _ in run:
        pass
    return run.result()
