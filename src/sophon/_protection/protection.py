"""Protection: rounds of updates by the terms of a specification, and the intactness guard.

`Protection(...)` is an iterator of `Round`s; `protect(...)` runs it to the end. With a folder
the run can be killed at any moment and repeated: it goes on to bit-identical weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.errors import NonFiniteError, require_kind
from sophon._base.plain_mode import plain
from sophon._base.signatures import signed_as
from sophon._data import Domain, several
from sophon._protection.checks import check_protection
from sophon._protection.guard import IntactnessGuard
from sophon._protection.migration import migrate_run, migrated_state
from sophon._protection.presets import completed
from sophon._protection.spec import Alternate, ProtectSpec
from sophon._protection.start import starting_weights
from sophon._protection.term import Surroundings
from sophon._protection.terms import TERMS, Hindrance, Term
from sophon._protection.update import KeepSide, Turn, updating
from sophon._records.audit_record import Measurement
from sophon._records.round import Round
from sophon._records.statement import Terms
from sophon._specs import Guard, ModelSpec, fingerprint_of, parse_spec
from sophon._tasks import Classification, Task
from sophon._training.ranks import Ranks, take_card
from sophon._training.resumable import Groups, ResumableRun, run_identity
from sophon._training.setting import make_setting
from sophon._training.sharding import load_whole, splits
from sophon._training.sharding import shard as spread

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

    model: nn.Module = field(repr=False)
    rounds: tuple[Round, ...] = field(repr=False)
    before: Measurement
    after: Measurement
    shipped_round: int
    folder: Path | None


class Protection(ResumableRun[Round]):
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

    part, table, record = "round", "protect", Round
    spec: ProtectSpec

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
        super().__init__()
        self.ranks = Ranks.present(sharded=shard)
        take_card(device)
        spec = ProtectSpec() if spec is None else spec
        require_kind(spec, ProtectSpec, "spec", "a ProtectSpec")
        self.out = None if out is None else Path(out)
        self.model_spec = model_spec
        self._given = model
        with self.ranks.agreeing():
            self.setting = make_setting(
                model,
                task=task or Classification(),
                original=original,
                restricted=several(restricted),
                head=head,
                precision=spec.precision,
                device=device,
            )
            self.spec = completed(spec, self.setting, model)
            self.around = self._surroundings(model)
            check_protection(model, self.spec, self.around)
            self.identity = self._identity(model)
        self.ranks.require_same(
            {
                **self.identity,
                "shard": str(shard),
                "out": "a folder" if out is not None else "none",
                "independence of rows": str(self.around.independent),
            }
        )
        self.model = self.setting.place(starting_weights(model, self.spec))
        self._assemble()
        guard = self.spec.guard or Guard()
        self.guard = IntactnessGuard(
            self.model, self.setting, guard, self.ranks, shipped=self.update.shipped
        )
        if self.out is not None and self.ranks.first:
            migrate_run(self.out, self._present)
        self.open(self._needed_bytes())

    def _surroundings(self, model: nn.Module) -> Surroundings:
        given = self.setting.place(copy.deepcopy(model)).requires_grad_(False).eval()
        independent = self.ranks.world > 1 and splits(model, self.setting)
        return Surroundings(self.setting, given, self.spec.seed, self.ranks, independent)

    def _assemble(self) -> None:
        """Make the terms and what updates the model by them."""
        spec, ranks = self.spec, self.ranks
        spread(self.model, self.setting.head, ranks)
        enough = (spec.original_batch_size or 1) >= ranks.world
        keep: list[Any] = [TERMS[term.kind](term, self.around) for term in spec.keep or ()]
        split = self.around.independent and enough and not ranks.sharded and not plain()
        hinder: list[Any] = [TERMS[term.kind](term, self.around) for term in spec.hinder or ()]
        self.keep = KeepSide(keep, self.setting, spec, ranks, split)
        self.hinder: list[Hindrance[Any]] = hinder
        self.update = updating(spec.update or Alternate(), self.model, self.keep, hinder)

    def _identity(self, model: nn.Module) -> dict[str, str]:
        """Return what determines the result; how many processes there are does not."""
        domains = (self.setting.original, *self.setting.restricted)
        return {
            **run_identity(self.spec, model, self.setting, engine=ENGINE_VERSION),
            "domains": fingerprint_of([[d.name, d.weight, d.fingerprint()] for d in domains]),
            "head": self.setting.head,
        }

    @property
    def rounds(self) -> list[Round]:
        """The records of the rounds finished so far."""
        return self.records

    def __len__(self) -> int:
        """Return the number of rounds of the whole run."""
        return self.spec.rounds or 0

    @property
    def due(self) -> bool:
        """Whether a state is to be written now."""
        return self.done % self.spec.checkpoint_every == 0

    def begin(self) -> None:
        """Measure the original task before the first round."""
        self.guard.begin(None if self.spec.start == "given" else self.around.given)

    def result(self) -> Protected:
        """Return the protected model after the last round, written to the folder if there is one.

        Raises IntactnessError if no checked weights met the tolerance; every file is kept.
        """
        self.require_done()
        with self.ranks.agreeing():
            result = self._shipped()
            self.ship(result.model, "protection", self._description(result))
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

    def next_record(self) -> Round:
        """Take the updates of a round, and look at the original task when it is due."""
        index, start = self.done, time.perf_counter()
        price, steps = self.guard.price, self.update.keep_steps(self.guard.extra_steps)
        turn, pairs = self._turn(index, price)
        query_score = sum(turn.scores) / len(turn.scores)
        self.guard.observe(query_score)
        due = (index + 1) % self.guard.spec.every == 0 or index + 1 == len(self)
        guard_score, verdict = (
            self.guard.check(index + 1, self.update.left((index + 1) / len(self)))
            if due
            else (None, None)
        )
        return Round(
            index=index,
            suppression_loss=sum(turn.losses) / len(turn.losses),
            query_score=query_score,
            original_loss=pairs[0] if pairs else None,
            suppression_gradient_norm=sum(turn.norms) / len(turn.norms),
            reinforcement_gradient_norm=pairs[1] if pairs else None,
            strategies=tuple(turn.labels),
            domains=tuple(turn.domains),
            guard_score=guard_score,
            guard=verdict,
            reinforcement_steps=steps,
            wall_s=time.perf_counter() - start,
            price=price if self.guard.spec.mode == "price" else None,
            readings=turn.readings,
        )

    def _turn(self, index: int, price: float) -> tuple[Turn, list[float]]:
        """Return what the updates of a round gave, and loss and gradient norm of the keep terms, if
        there were any. Raises NonFiniteError.
        """
        try:
            turn = self.update.round(index / len(self), price, self.guard.extra_steps)
            pairs = torch.stack(turn.kept).mean(0).tolist() if turn.kept else []
            if not all(map(math.isfinite, pairs)):
                raise NonFiniteError("reinforcement: lower the keep rate (protect.update)")
        except NonFiniteError as error:
            told = NonFiniteError(
                f"round {index}: a loss or gradient is not finite in the {error}; states written"
                " before are kept"
            )
            told.told = not self.ranks.first
            raise told from None
        return turn, pairs

    def _needed_bytes(self) -> int:
        """Return what states take on the disk at most."""
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        # The model, its average, two kept copies, two Adams.
        copies = 8 + sum(type(term).state_copies(term.spec) for term in self.hinder)
        return _KEPT * size * copies

    def _present(self, table: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return fingerprint and table of an earlier version's specification as it is now."""
        spec = completed(
            parse_spec(ProtectSpec, table, where="run.json"), self.setting, self._given
        )
        return spec.fingerprint(), spec.model_dump(mode="json")

    def _terms(self) -> dict[str, Term[Any]]:
        """Return the terms by the names that a state has them under."""
        sides: list[tuple[str, list[Any]]] = [("keep", self.keep.terms), ("hinder", self.hinder)]
        return {f"{side}.{i}": term for side, terms in sides for i, term in enumerate(terms)}

    def state(self) -> tuple[Groups, dict[str, Any]]:
        """Return the model, the guard's, the terms' and the optimizers' states."""
        guarded, guard = self.guard.state()
        groups = {"model": self.model.state_dict(), **guarded}
        terms: dict[str, Any] = {}
        for name, term in self._terms().items():
            groups[name], terms[name] = term.state()
        held, optimizers = self.update.state()
        values = {"kept": self.keep.steps, "guard": guard}
        return {**groups, **held}, {**values, "terms": terms, "optimizers": optimizers}

    def restore(self, group: Callable[[str], dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Take back what `state` returned, of this version or an earlier one."""
        values, renamed = migrated_state(values)
        load_whole(self.model, group("model"))
        self.keep.steps = values["kept"]
        guarded = {name: group(name) for name in ("last_good", "shipped")}
        self.guard.restore(guarded, values["guard"])
        self.update.restore(group, values["optimizers"])
        for name, term in self._terms().items():
            tensors = group(renamed.get(name, name))
            term.restore(self.model, tensors, values["terms"].get(name, {}))

    def _statement(self) -> Terms:
        """Return what the terms state to an audit, and the guard's tolerances."""
        stated = [type(term).rehearsed(term.spec) for term in self.hinder]
        guard = self.guard.spec.model_dump(exclude_unset=True)
        return Terms.model_validate(
            {"rehearsed": tuple(part for part in stated if part is not None), "guard": guard}
        )

    def _descriptions(self, model: nn.Module) -> dict[str, Any]:
        """Return what the terms say of the protected model."""
        placed = self.setting.place(copy.deepcopy(model))
        held: dict[str, Any] = {}
        for term in self.hinder:
            held |= term.description(placed)
        return held

    def _description(self, result: Protected) -> dict[str, Any]:
        return {
            "spec": self.spec.model_dump(mode="json"),
            "terms": self._statement().model_dump(mode="json", exclude_unset=True),
            **self._descriptions(result.model),
            "identity": self.identity,
            "original": self.setting.original.name,
            "restricted": [domain.name for domain in self.setting.restricted],
            "head": self.setting.head,
            "input": self.setting.input(),
            "classes": self.setting.class_names(),
            "validation_before": result.before.model_dump(),
            "validation_after": result.after.model_dump(),
            "shipped_round": result.shipped_round,
            "rounds": len(result.rounds),
            "guard_violations": sum(r.guard == "violated" for r in result.rounds),
            "wall_s": sum(r.wall_s for r in result.rounds),
            "processes": self.ranks.world,
            "backend": self.ranks.backend,
        }


@signed_as(Protection)
def protect(*model: Any, **arguments: Any) -> Protected:
    """Return the protected model; see `Protection` for the arguments, and iterate one to see its
    rounds.

    Raises what `Protection` raises, and IntactnessError if no weights kept the original task
    within the tolerance.
    """
    run = Protection(*model, **arguments)
    for _ in run:
        pass
    return run.result()
