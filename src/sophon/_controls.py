"""Controls: models that only look protected, and two whose answer is known. An audit of the audit.

Each keeps the architecture and the keys of the unprotected model. A decoy must be convicted or
flagged; the unprotected model must come out as not protected, a fresh network at an advantage
removed of 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophon._attacks import resolved
from sophon._audit import Audit
from sophon._data import Domain
from sophon._models import find_head, fresh_copy, normalised_pairs, tracked_batch_norms
from sophon._specs import AuditSpec
from sophon._verdict import DomainSummary, summarise

# What an interval needs.
_SEEDS = 3
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


def _no_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.detach() + 0.0 * (output - output.detach())


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
    "poisoned head": lambda m, place: _scale_head(m, place, 300.0),
    "saturated logits": lambda m, place: _scale_head(m, place, 1e4),
    "faint gradients": lambda m, _: _add(m.register_forward_hook(_faint_gradient)),
    "inflated weights": _inflate,
    "spoilt BatchNorm": _spoil_statistics,
    "untrainable": lambda m, _: _add(m.register_forward_hook(_no_gradient)),
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
    with all of them, at least three. Trials of the unprotected model and of fresh networks are
    shared through `store`. `arguments` are those of `Audit`.
    """

    def __init__(
        self,
        unprotected: nn.Module,
        *,
        original: Domain,
        restricted: Domain,
        spec: AuditSpec | None = None,
        scratch: Callable[[], nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        self.unprotected = unprotected
        self.scratch = scratch
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
        setting = self._audit(copy.deepcopy(unprotected), self.often).setting
        shape = setting.shape(original)
        self.place = Place(find_head(unprotected, shape, setting.head), shape)

    def __len__(self) -> int:
        """Return how many controls there are."""
        return len(DECOYS) + 2

    def __iter__(self) -> Iterator[ControlResult]:
        """Audit one control after another."""
        yield from self.decoys()
        yield from self.known()

    def decoys(self) -> Iterator[ControlResult]:
        """Audit the models that only look protected."""
        for name, make in DECOYS.items():
            model = copy.deepcopy(self.unprotected)
            with torch.no_grad():
                make(model, self.place)
            summary = self._audited(model, self.once)
            # "Fewer than three seeds" and the like say nothing of the model.
            telling = [f for f in summary.flags if f.name in _TELLING]
            yield ControlResult(name, summary, summary.verdict in _CONVICTED or bool(telling))

    def known(self) -> Iterator[ControlResult]:
        """Audit the two whose answer is a number."""
        summary = self._audited(copy.deepcopy(self.unprotected), self.often)
        value = summary.advantage.value
        recovered = summary.verdict == "not protected" and value is not None and abs(value) < 0.05
        yield ControlResult("the unprotected model", summary, recovered)
        fresh = fresh_copy(self.unprotected, self.scratch, seed=1, names=("control",))
        summary = self._audited(fresh, self.often)
        interval = summary.advantage.interval
        known = interval is not None and interval.low <= 1 <= interval.high
        yield ControlResult("a fresh network", summary, known)

    def _audit(self, model: nn.Module, spec: AuditSpec) -> Audit:
        return Audit(model, spec=spec, **self.arguments)

    def _audited(self, model: nn.Module, spec: AuditSpec) -> DomainSummary:
        run = self._audit(model, spec)
        for _ in run:
            pass
        return summarise(run.record())[0]


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
