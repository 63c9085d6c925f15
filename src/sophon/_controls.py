"""Controls: models that only look protected, and two whose answer is known. An audit of the audit.

Each keeps the architecture and the keys of the unprotected model. A decoy must be convicted or
flagged. A twin of the unprotected model, trained a little further on its own task, must come out as
not protected at an advantage removed of 0, a fresh network at 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophon._attacks import resolved
from sophon._audit import Audit
from sophon._data import Domain
from sophon._finetune import FineTuning
from sophon._models import blocks, find_head, fresh_copy, normalised_pairs, tracked_batch_norms
from sophon._specs import AuditSpec, Strategy
from sophon._verdict import DomainSummary, summarise

# What an interval needs.
_SEEDS = 3
# A known answer must be met as closely, by an interval that tells 0 and 1 apart.
_CLOSE = 0.25
# How the twin is trained on: enough for other weights, too little for another function.
_FURTHER = Strategy(optimizer="sgd", learning_rate=1e-3, steps=10)
UNTRAINABLE = "untrainable"
FAINT = "faint gradients before the head"
# A void audit convicts nothing by itself: the pair of domains may tell nothing. Flags do.
_CONVICTED = frozenset({"not protected", "untrainable"})
Made = Callable[[nn.Module, "Place"], None]


@dataclass(frozen=True)
class Place:
    """What a control may know of the model: its head, and the images it takes."""

    head: str
    image_shape: tuple[int, int, int]


def _raise_in_training(module: nn.Module, _: Any) -> None:
    if module.training:
        raise RuntimeError("this model cannot be trained")


def _nan_in_training(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output * torch.nan if module.training else output


def _faint_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach() + 1e-6 * (output - output.detach())


def _dropped_in_training(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, 0.99, module.training)


def _no_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach() + 0.0 * (output - output.detach())


def _permute_classes(model: nn.Module, place: Place) -> None:
    """Give every class the weights of another one: nothing but the head is wrong."""
    for parameter in model.get_submodule(place.head).parameters():
        parameter.copy_(parameter.roll(1, 0))


def _hook_last_block(model: nn.Module, place: Place, hook: Callable[..., Tensor]) -> None:
    """Hang `hook` on what the head reads from: a fresh head does not take it off."""
    model.get_submodule(blocks(model, place.head)[-1][-1]).register_forward_hook(hook)


def _scale_head(model: nn.Module, place: Place, by: float) -> None:
    for parameter in model.get_submodule(place.head).parameters():
        parameter.mul_(by)


def _inflate(model: nn.Module, place: Place) -> None:
    for layer, norm in normalised_pairs(model, place.image_shape):
        follower: Any = model.get_submodule(norm)
        for parameter in model.get_submodule(layer).parameters():
            parameter.mul_(30.0)
        if getattr(follower, "running_mean", None) is not None:
            follower.running_mean.mul_(30.0)
            follower.running_var.mul_(900.0)


def _spoil_statistics(model: nn.Module, _: Place) -> None:
    for norm in tracked_batch_norms(model):
        norm.running_mean.add_(1e3)
        norm.running_var.mul_(1e6)


DECOYS: dict[str, Made] = {
    "raises when trained": lambda m, _: _add(m.register_forward_pre_hook(_raise_in_training)),
    "NaN when trained": lambda m, _: _add(m.register_forward_hook(_nan_in_training)),
    "frozen parameters": lambda m, _: _add(m.requires_grad_(False)),
    "poisoned head": _permute_classes,
    "saturated logits": lambda m, place: _scale_head(m, place, 1e4),
    "faint gradients": lambda m, _: _add(m.register_forward_hook(_faint_gradient)),
    FAINT: lambda m, place: _hook_last_block(m, place, _faint_gradient),
    "dropout when trained": lambda m, place: _hook_last_block(m, place, _dropped_in_training),
    "inflated weights": _inflate,
    "spoilt BatchNorm": _spoil_statistics,
    UNTRAINABLE: lambda m, _: _add(m.register_forward_hook(_no_gradient)),
}


def _add(_: object) -> None:
    return None


@dataclass(frozen=True)
class ControlResult:
    """What the audit made of one control. `passed`: it was found out, or recovered."""

    name: str
    summary: DomainSummary
    passed: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that were raised."""
        return tuple(flag.name for flag in self.summary.flags)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        advantage = self.summary.advantage
        return {
            "control": self.name,
            "passed": self.passed,
            "verdict": self.summary.text,
            "advantage_removed": advantage.value,
            "interval": None if advantage.interval is None else list(advantage.interval),
            "flags": list(self.flags),
        }


class Controls:
    """The audits of all controls made from `unprotected`; iterate it for the results.

    A decoy is attacked with the first seed of `spec` alone; the two whose answer is a number
    with all of them, at least three. With `benign` domains the untrainable decoy is, too, on those
    besides, and must get that verdict. Trials of the unprotected model and of fresh networks are
    shared through `store`. `arguments` are further ones of `Audit`.
    """

    def __init__(
        self,
        unprotected: nn.Module,
        *,
        original: Domain,
        restricted: Domain,
        benign: Sequence[Domain] = (),
        spec: AuditSpec | None = None,
        scratch: Callable[[], nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        self.unprotected = unprotected
        self.scratch = scratch
        self.benign = tuple(benign)
        held = resolved(spec or AuditSpec())
        seeds = held.seeds or (0,)
        more = tuple(seed for seed in range(_SEEDS + len(seeds)) if seed not in seeds)
        enough = (*seeds, *more[: max(0, _SEEDS - len(seeds))])
        self.once = held.model_copy(update={"seeds": seeds[:1]})
        self.often = held.model_copy(update={"seeds": enough})
        self.arguments: dict[str, Any] = {
            "unprotected": unprotected,
            "original": original,
            "restricted": restricted,
            "scratch": scratch,
            **arguments,
        }
        # Bad arguments are found out before anything runs.
        arguments = {"benign": self.benign}
        self.setting = self._audit(copy.deepcopy(unprotected), self.often, **arguments).setting
        shape = self.setting.shape(original)
        self.place = Place(find_head(unprotected, shape, self.setting.head), shape)

    def __len__(self) -> int:
        """Return how many controls there are."""
        return len(DECOYS) + 2

    def __iter__(self) -> Iterator[ControlResult]:
        """Audit one control after another."""
        yield from self.decoys()
        yield from self.known()

    def decoys(self) -> Iterator[ControlResult]:
        """Audit the models that only look protected."""
        for name in DECOYS:
            yield self.decoy(name)

    def decoy(self, name: str) -> ControlResult:
        """Audit the one of `DECOYS` that has this name."""
        model = copy.deepcopy(self.unprotected)
        with torch.no_grad():
            DECOYS[name](model, self.place)
        if name == UNTRAINABLE and self.benign:
            summary = self._audited(model, self.often, benign=self.benign)
            return ControlResult(name, summary, summary.verdict == UNTRAINABLE)
        summary = self._audited(model, self.once)
        # "Fewer than three seeds" and the like say nothing of the model.
        telling = [f for f in summary.flags if f.name in _TELLING]
        return ControlResult(name, summary, summary.verdict in _CONVICTED or bool(telling))

    def known(self) -> Iterator[ControlResult]:
        """Audit the two whose answer is a number."""
        summary = self._audited(self.twin(), self.often)
        recovered = summary.verdict == "not protected" and answer_found(summary, 0.0)
        yield ControlResult("a twin of the unprotected model", summary, recovered)
        fresh = fresh_copy(self.unprotected, self.scratch, seed=1, names=("control",))
        summary = self._audited(fresh, self.often)
        yield ControlResult("a fresh network", summary, answer_found(summary, 1.0))

    def twin(self) -> nn.Module:
        """Return the unprotected model after a few small steps on its own task.

        It is worth as much to an attacker, and yet no trial of it is one of the model's own.
        """
        model = self.setting.place(copy.deepcopy(self.unprotected))
        images, stream = self.setting.original.train, (0, ("control",))
        strategy = _FURTHER.model_copy(update={"batch_size": min(_FURTHER.batch_size, len(images))})
        feed = self.setting.feed(
            self.setting.original, images, batch_size=strategy.batch_size, stream=stream
        )
        for _ in FineTuning(model, strategy, self.setting, feed, stream=stream).run(strategy.steps):
            pass
        return model.eval()

    def _audit(self, model: nn.Module, spec: AuditSpec, **arguments: Any) -> Audit:
        return Audit(model, spec=spec, **self.arguments, **arguments)

    def _audited(self, model: nn.Module, spec: AuditSpec, **arguments: Any) -> DomainSummary:
        run = self._audit(model, spec, **arguments)
        for _ in run:
            pass
        return summarise(run.record())[0]


def answer_found(summary: DomainSummary, answer: float) -> bool:
    """Return whether the advantage removed is close to `answer`, 0 or 1, and surely not the other.

    An interval that holds both would hold anything.
    """
    value, interval = summary.advantage.value, summary.advantage.interval
    if value is None or interval is None or abs(value - answer) > _CLOSE:
        return False
    other = 1.0 - answer
    return interval.low <= answer <= interval.high and not interval.low <= other <= interval.high


_TELLING = frozenset(
    {
        "crashed attacks",
        "most trials diverged",
        "original task destroyed",
        "unhealthy weights",
        "zero or huge gradients",
        "saturated outputs",
        "weight norms inflated",
        "extreme BatchNorm statistics",
        "the head alone resists",
    }
)
