"""The intactness guard: whether the original task is kept, and which weights are shipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sophon._base.errors import IntactnessError
from sophon._base.spans import spanned
from sophon._records.audit_record import Measurement
from sophon._records.metrics import kind_of, measurement, shown
from sophon._specs import Guard
from sophon._training.evaluate import evaluate
from sophon._training.ranks import Ranks
from sophon._training.setting import Setting
from sophon._training.sharding import placed

GuardVerdict = Literal["met", "violated"]


@dataclass
class Good:
    """Weights that met the tolerance, and what the shipping rule needs to know of them.

    `query_score` is the attackers' mean query score over the rounds since the check before.
    """

    tensors: dict[str, Tensor]
    round: int
    score: Measurement
    query_score: float


class IntactnessGuard:
    """Checks `shipped`, or else `model`, on the original domain's validation split; never looks at
    the test split. `shipped` is an average of the weights of `model`.

    After a violation the model is back at the last weights that met the tolerance, and
    `extra_steps`, the reinforcement steps to take beyond the specified ones, is one more. With
    `mode = "price"` the `price` of hindrance falls instead, and rises while the tolerance is met;
    the model goes back only where it left the tolerance by more than the margin. A run from other
    weights than the given ones first has to come within it: until then the price stands still.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        spec: Guard,
        ranks: Ranks | None = None,
        *,
        shipped: nn.Module | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.trained = model
        self.model = model if shipped is None else shipped
        self.setting = setting
        self.spec = spec
        self.extra_steps = 0
        self.price = spec.price.start if spec.mode == "price" else 1.0
        self.shipped: Good | None = None
        # Other starting weights than the given ones are none to go back to.
        self.returns = True
        self.last_good: dict[str, Tensor] = {}
        self._before: Measurement | None = None
        self._window: list[float] = []

    @property
    def before(self) -> Measurement:
        """The score before protection."""
        if self._before is None:
            raise RuntimeError("begin() or restore() comes first")
        return self._before

    def begin(self, given: nn.Module | None = None) -> None:
        """Take the model as it is, before the first round, for the weights to return to; `given` is
        the model before protection, where the run starts from other weights.
        """
        self._before = self._measure(given)
        self.returns = given is None
        self.last_good = snapshot(self.model)

    def observe(self, query_score: float) -> None:
        """Note the attackers' mean query score of a round."""
        self._window.append(query_score)

    @spanned("guard")
    def check(self, finished: int, left: float = 0.0) -> tuple[float, GuardVerdict]:
        """Return the score after `finished` rounds and whether it is within the tolerance.

        `left` is the share of the rate's fall that is still to come: of the price's slack, too.
        Raises RanksError if the weights of several processes have drifted apart.
        """
        self.ranks.require_equal(list(self.model.state_dict().values()))
        score = self._measure()
        least = kind_of(score).allowed(self.before.value, self.spec) - 1e-12
        query_score = sum(self._window) / len(self._window)
        self._window = []
        if self.spec.mode == "price" and (self.returns or score.value >= least):
            self._reprice(score.value, least, left)
        if score.value < least:
            self._violated(score.value, least, left)
            return score.value, "violated"
        self.last_good, self.returns = snapshot(self.model), True
        better = self.shipped is None or query_score <= self.shipped.query_score
        if self.spec.ship == "last" or better:
            self.shipped = Good(self.last_good, finished, score, query_score)
        return score.value, "met"

    def _reprice(self, value: float, least: float, left: float) -> None:
        spec = self.spec.price
        slack = spec.slack * left * (self.before.value - least)
        met = value >= least - slack
        self.price = min(spec.most, self.price * spec.rise) if met else self.price * spec.fall

    def _violated(self, value: float, least: float, left: float) -> None:
        """Put the last good weights back, unless the price alone may mend it."""
        if self.spec.mode == "price":
            spec, tolerance = self.spec.price, max(self.before.value - least, 1e-3)
            if value >= least - (spec.slack * left + spec.margin) * tolerance:
                return
        else:
            self.extra_steps += 1
        for model in (self.trained, self.model) if self.returns else ():
            model.load_state_dict(self.last_good)

    def require_shipped(self, best: float) -> Good:
        """Return the weights to ship. Raises IntactnessError if none met the tolerance.

        `best` is the best score of all checks, for the message.
        """
        if self.shipped is None:
            kind = kind_of(self.before)
            remedy = (
                "lower protect.guard.price.most, or raise the weights of protect.keep"
                if self.spec.mode == "price"
                else "what protect.update gives the keep terms, or lower its rate of the hindrances"
            )
            raise IntactnessError(
                f"no weights stayed within {kind.tolerance(self.spec)} of"
                f" {shown(self.before)} on {self.setting.original.name!r} (best"
                f" {kind.show(best, 1)}): raise that tolerance, or {remedy}"
            )
        return self.shipped

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return what persists between rounds: groups of tensors, and plain values."""
        shipped = None
        if self.shipped is not None:
            score = self.shipped.score.model_dump()
            shipped = [self.shipped.round, score, self.shipped.query_score]
        groups = {
            "last_good": self.last_good,
            "shipped": {} if self.shipped is None else self.shipped.tensors,
        }
        plain = {
            "extra_steps": self.extra_steps,
            "price": self.price,
            "returns": self.returns,
            "window": self._window,
            "before": self.before.model_dump(),
            "shipped": shipped,
        }
        return groups, plain

    def restore(self, groups: dict[str, dict[str, Tensor]], plain: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        held = self.model.state_dict()
        groups = {
            g: {n: placed(v, held[n]) for n, v in tensors.items()} for g, tensors in groups.items()
        }
        self.last_good = groups["last_good"]
        self.extra_steps = plain["extra_steps"]
        self.price = plain.get("price", self.price)
        self.returns = plain.get("returns", True)
        self._window = plain["window"]
        self._before = measurement(plain["before"])
        if plain["shipped"] is not None:
            finished, score, query_score = plain["shipped"]
            good = measurement(score)
            self.shipped = Good(groups["shipped"], finished, good, query_score)

    def _measure(self, given: nn.Module | None = None) -> Measurement:
        """Return the score that the first process measures: all must come to one verdict."""
        original = self.setting.original
        held: Measurement | None = None
        if self.ranks.first or self.ranks.sharded:
            held = evaluate(given or self.model, self.setting, original, original.validation)
        score: Measurement = self.ranks.gather(held)[0]
        return score


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of every tensor of `model` by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
