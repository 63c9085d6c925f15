"""A hindrance: each update on restricted images is to be smaller than the last."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon._base.errors import UnsupportedModelError
from sophon._base.seeding import seeded
from sophon._models import computes_twice
from sophon._protection.batched import Batch, Judged
from sophon._protection.probe import ProbingHindrance, ProbingSpec
from sophon._protection.term import Surroundings
from sophon._specs.base import Fraction, NonNegative, Positive, Rate

_LEAST = 1e-12
# A series whose ratio comes near 1 is worth no more than with this distance to it.
_MARGIN = 0.05

Weights = dict[str, Tensor]


class ClampSpec(ProbingSpec):
    """`kind = "clamp"`: gradient descent against a probe's loss is to contract.

    The attacker takes `steps` at `rate`. `gain` weighs what it is predicted to gain beyond `slack`,
    `contraction` a ratio of updates above `most`, `trap` curvature along its way below `least`,
    `start` the loss that it starts from. Finite differences are over `radius`.
    """

    kind: Literal["clamp"] = "clamp"
    steps: Positive = 1
    rate: Rate = 0.1
    radius: Rate = 0.1
    gain: NonNegative = 0.1
    slack: NonNegative = 0.0
    contraction: NonNegative = 1.0
    most: Fraction = 0.9
    trap: NonNegative = 0.1
    least: NonNegative = 1.0
    start: NonNegative = 0.1


class ClampTerm(ProbingHindrance[ClampSpec]):
    """gain max(0, h_0 - h_K + |g| B + L B^2 / 2 - slack) + contraction softplus(c - most)
    + trap sum_t softplus(least - k_t) - start h_0, with B = rate |g| / (1 - c).

    "Immunizing Models Against Harmful Long-Horizon Fine-Tuning" (CLAMP, CVPR 2026), by notes of
    others on it. h_t is a probe's cross-entropy at the attacker's weights w_t, g its gradient at
    w_K, v = -g / |g|; T(w) = w - rate grad h(w), c = |T(w_K + radius v) - T(w_K)| / radius;
    k_t = (h(w_t + radius v_t) - 2 h(w_t) + h(w_t - radius v_t)) / radius^2, t from 0 to K. B bounds
    how far updates lead that shrink by c each.

    Where it departs: the paper differentiates its attacker's steps, here they are constant. Notes
    say neither what the direction v is, nor how L, a Lipschitz constant of the gradient, is
    estimated: it is |grad h(w_K + radius v) - g| / radius here. 1 - c is at least 0.05, where B has
    no gradient through c. The attacker descends with the encoder, the probe stays. All numbers are
    ours.
    """

    spec_type = ClampSpec
    exact = True

    @classmethod
    def check(cls, spec: ClampSpec, model: nn.Module, around: Surroundings) -> None:
        """Raise UnsupportedModelError for blocks that are computed twice, which would meet other
        weights, and what every term of a batch raises.
        """
        super().check(spec, model, around)
        if computes_twice(model):
            raise UnsupportedModelError(
                "protect.hinder: clamp moves weights within a pass, which gradient checkpointing"
                " would miss: leave model.gradient_checkpointing out"
            )

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the loss; the score is the probe's accuracy before the first step."""
        # Not every fused attention can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return self._judge(_Attacked(self, model, batch))

    def _judge(self, attacked: _Attacked) -> Judged:
        spec = self.spec
        first, right = attacked.probed(spec.probe_steps)
        moved: Weights = {}
        loss, bent = first, []
        for step in range(spec.steps + 1):
            loss = attacked.loss(moved) if step else first
            slope = attacked.slope(loss)
            away = {n: -g.detach() / _length(slope).detach() for n, g in slope.items()}
            ahead, behind = (attacked.loss(_sum(moved, away, s * spec.radius)) for s in (1, -1))
            bent.append((ahead - 2 * loss + behind) / spec.radius**2)
            if step < spec.steps:
                moved = _sum(moved, away, spec.rate * float(_length(slope).detach()))
        beyond = attacked.slope(ahead)
        change = {n: beyond[n] - g for n, g in slope.items()}
        ratio = _length({n: spec.radius * away[n] - spec.rate * d for n, d in change.items()})
        ratio = ratio / spec.radius
        reach = spec.rate * _length(slope) / (1 - ratio).clamp_min(_MARGIN)
        tail = _length(slope) * reach + _length(change) / spec.radius * reach.square() / 2
        gain = first - loss + tail
        traps = torch.stack([F.softplus(spec.least - value) for value in bent])
        total = (
            spec.gain * (gain - spec.slack).clamp_min(0)
            + spec.contraction * F.softplus(ratio - spec.most)
            + spec.trap * traps.sum()
            - spec.start * first
        )
        readings = {"cross-entropy": first, "drop": first - loss, "gain": gain, "ratio": ratio}
        return total, right, readings | {"curvature": torch.stack(bent).mean()}


class _Attacked(nn.Module):
    """A probe's loss of a batch as a function of how far the model's weights are moved."""

    def __init__(self, term: ClampTerm, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self.term, self.batch = term, batch
        self.weights = dict(self.named_parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Return what goes into the head (images, features)."""
        return self.term.passed(self.model, images)[1]

    def probed(self, steps: int, moved: Weights | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss with weights moved, and the accuracy; the probe takes steps before."""
        batch, term = self.batch, self.term
        weights = {name: self.weights[name] + by for name, by in (moved or {}).items()}
        with seeded(term.around.seed, term.spec.kind, batch.turn, "pass"):
            features = torch.func.functional_call(self, weights, (batch.images,))
        return term.probe.loss(features, batch, steps)

    def loss(self, moved: Weights) -> Tensor:
        """Return the loss with weights moved; the probe stays."""
        return self.probed(0, moved)[0]

    def slope(self, loss: Tensor) -> Weights:
        """Return the gradient of a loss by name, which can be differentiated again."""
        values = list(self.weights.values())
        found = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
        return {n: g for n, g in zip(self.weights, found, strict=True) if g is not None}


def _length(vector: Weights) -> Tensor:
    squares = torch.stack([value.square().sum() for value in vector.values()]).sum()
    return squares.clamp_min(_LEAST).sqrt()


def _sum(moved: Weights, direction: Weights, length: float) -> Weights:
    return {n: moved.get(n, 0) + length * value for n, value in direction.items()}
