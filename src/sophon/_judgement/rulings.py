"""From facts to a ruling: each rule says what it concludes, or nothing. No torch.

A rule takes the facts of one domain; the first that has something to say rules. A ruling carries
codes to decide by and texts to read; nothing reads the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sophon._judgement.advantage import Estimate
from sophon._judgement.flags.flag import WITHSTOOD, Flag
from sophon._judgement.statistics import Interval, interval_of
from sophon._judgement.summaries import Ratio, Reason, SubjectSummary, Verdict
from sophon._judgement.survival import Recovery, logrank
from sophon._records.audit_record import AuditRecord, DomainRecord, Measurement
from sophon._records.metrics import kind_of

# An audit of fewer seeds may convict, but not acquit.
SEEDS_TO_ACQUIT = 3
SLOWED_FROM = 1.5
# Withstood: an attacker saves at most a fifth of what the weights were worth (the low end of
# advantage removed), and may be ahead of a fresh network's test score by half of what counts as far
# apart (the high end of the difference).
SAVES_NOTHING = 0.8
# Whether an interval that reaches 1 says that a model looks protected, rather than not.
UNCERTAIN = 0.5
AHEAD = 0.5
# A value as close to 0 as a twin's of the unprotected model may come out: it convicts, however wide
# its interval.
NOTHING = 0.25
# Costs count single steps where recovery is quick; less of the advantage than this is nothing.
MATERIAL = 0.05
SIGNIFICANT = 0.05


class Ruling(NamedTuple):
    """A verdict and its reasons; `looks` is the good one that the model would get if nothing stood
    against it, if any. Pictures may bear a slowing out only so far: `borne_out` times the steps.
    """

    verdict: Verdict
    reasons: tuple[Reason, ...]
    looks: Literal["withstood", "slowed"] | None = None
    borne_out: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of one domain: its numbers and the flags it raises, by their checks' names.

    `seeds` are those of its attacks.
    """

    record: AuditRecord
    domain: DomainRecord
    subjects: dict[str, SubjectSummary]
    advantage: Estimate
    slowing: Ratio
    flags: dict[str, Flag]
    seeds: int

    @property
    def lenient(self) -> bool:
        """Whether few seeds are enough: what speaks against a model needs less proof."""
        return self.domain.role == "benign"

    @property
    def few(self) -> bool:
        """Whether there are too few seeds to acquit."""
        return not self.lenient and self.seeds < SEEDS_TO_ACQUIT

    @property
    def value(self) -> float:
        """How much of the advantage was removed; only where that is defined."""
        return self.advantage.value or 0.0

    @property
    def bounds(self) -> Interval:
        """The interval of that, or the value itself."""
        return self.advantage.interval or Interval(self.value, self.value)

    @property
    def voids(self) -> list[Flag]:
        """The flags that forbid any verdict."""
        return [flag for flag in self.flags.values() if flag.voids]

    @property
    def holds(self) -> bool:
        """Whether attackers seem to save nothing."""
        return self.bounds.high >= 1 and self.bounds.low >= UNCERTAIN

    @property
    def slows(self) -> bool:
        """Whether attackers seem to need clearly more steps."""
        slower = (self.slowing.value or 0.0) >= SLOWED_FROM
        return slower and self.bounds.low > 0 and self.value >= MATERIAL

    @property
    def costs(self) -> list[Recovery]:
        """What the protected and the unprotected model cost to recover, as far as it is known."""
        known = [name for name in ("protected", "unprotected") if name in self.subjects]
        held = [self.subjects[name].recoveries.get("unprotected") for name in known]
        return [one for one in held if one is not None]

    @property
    def surely(self) -> bool:
        """Whether costs over seeds differ by more than chance, in no direction but up: what counts
        is the least that the protected model's can have been.
        """
        sure, interval, costs = self.slowing.sure, self.slowing.sure_interval, self.costs
        if self.lenient or sure is None or interval is None or len(costs) != 2:
            return self.lenient
        p = logrank(costs[0].at_least(), costs[1])
        return sure >= SLOWED_FROM and interval.low >= 1 and p is not None and p < SIGNIFICANT

    @property
    def ahead(self) -> bool:
        """Whether the best attack on the protected model surely beats a fresh network's test."""
        mine, other = self.subjects["protected"].test, self.subjects["scratch"].test
        return mine is not None and other is not None and _difference(mine, other).low > 0

    @property
    def removed(self) -> Reason:
        """How much of the advantage was removed."""
        text = f"{100 * self.value:z.0f} % of the unprotected model's lead over a fresh one"
        return Reason("removed", f"advantage removed: {text}")

    def doubts(self, verdict: str) -> tuple[Reason, ...]:
        """Return what stands against a good verdict."""
        if self.lenient:
            return ()
        found = [flag.said for flag in self.flags.values() if verdict in flag.forbids]
        if verdict in WITHSTOOD:
            low = self.bounds.low
            if low < SAVES_NOTHING:
                found.append(
                    f"an attacker may keep {100 * (1 - low):.0f} % of the advantage, at most"
                    f" {100 * (1 - SAVES_NOTHING):.0f} % count as none"
                )
            lead = _lead(self.subjects["protected"].test, self.subjects["scratch"].test)
            found += [lead] if lead else []
        return tuple(map(_looks, found))


Rule = Callable[[Facts], Ruling | None]


def _looks(text: str) -> Reason:
    return Reason("looks", f"it looks protected, but {text}")


def _undefined(facts: Facts) -> Ruling | None:
    if facts.advantage.defined:
        return None
    said = Reason("undefined", facts.advantage.reason)
    return Ruling("void", (*_flagged(facts.voids), said))


def _broken_down(facts: Facts) -> Ruling | None:
    """A conviction by other attacks outlives those that broke down on the protected model alone."""
    elsewhere = all(flag.alone for flag in facts.voids) and facts.bounds.high < UNCERTAIN
    if not facts.voids or (elsewhere and not facts.holds and not facts.slows):
        return None
    return Ruling("void", _flagged(facts.voids))


def _flagged(flags: list[Flag]) -> tuple[Reason, ...]:
    return tuple(Reason("flag", flag.said) for flag in flags)


def _too_few_seeds(facts: Facts) -> Ruling | None:
    if not facts.few or not (facts.holds or facts.slows):
        return None
    few = f"{facts.seeds} attack seed{'s are' if facts.seeds > 1 else ' is'} too few to say so"
    return Ruling("void", (facts.removed, _looks(f"{few}: {SEEDS_TO_ACQUIT} or more are needed")))


def _withstood(facts: Facts) -> Ruling | None:
    if not facts.holds or facts.doubts("withstood"):
        return None
    said = Reason("withstood", "the best attack does no better than a fresh network")
    return Ruling("withstood", (facts.removed, said), "withstood")


def _slowed(facts: Facts) -> Ruling | None:
    if not (facts.slows and facts.surely) or facts.doubts("slowed"):
        return None
    factor = facts.slowing.value if facts.lenient else facts.slowing.sure
    bound = "at least " if facts.slowing.bound else ""
    said = Reason("slowed", f"recovery takes {bound}{factor:.1f} times the steps")
    return Ruling("slowed", (facts.removed, said), "slowed")


def _doubted(facts: Facts) -> Ruling | None:
    if facts.holds:
        return Ruling("void", (facts.removed, *facts.doubts("withstood")), "withstood")
    if facts.slows and facts.surely:
        return Ruling("void", (facts.removed, *facts.doubts("slowed")), "slowed")
    return None


def _out_of_room(facts: Facts) -> Ruling | None:
    """Most of the advantage is surely gone, and the horizon leaves no room to say how much slower
    recovery is: the protected model never got there, the unprotected one only late.
    """
    short = facts.slowing.bound and (facts.slowing.value or 0.0) < SLOWED_FROM
    if facts.lenient or not short or facts.bounds.low < UNCERTAIN:
        return None
    words = "the protected model never recovered, and the budget ends too soon to say how much"
    said = Reason("no room", f"{words} slower: raise audit.steps")
    return Ruling("void", (*_of_a_conviction(facts), said))


def _too_little(facts: Facts) -> Ruling | None:
    """An interval that reaches 1 convicts nobody but near 0, or surely ahead of a fresh network."""
    if facts.bounds.high < 1 or facts.value <= NOTHING or facts.ahead:
        return None
    words = "the interval reaches from what is not protected to what is: too little to tell"
    return Ruling("void", (*_of_a_conviction(facts), Reason("too little", words)))


def _convicted(facts: Facts) -> Ruling:
    said = Reason("convicted", "the strongest attacks still profit from the weights")
    return Ruling("not protected", (*_of_a_conviction(facts), said))


def _of_a_conviction(facts: Facts) -> tuple[Reason, ...]:
    unsure = (Reason("unsure", _unsure(facts.slowing)),) if facts.slows else ()
    return (facts.removed, *_flagged(facts.voids), *unsure)


RULES: tuple[Rule, ...] = (
    *(_undefined, _broken_down, _too_few_seeds, _withstood, _slowed, _doubted),
    *(_out_of_room, _too_little, _convicted),
)


def rule(facts: Facts) -> Ruling:
    """Return the ruling of the first rule that has something to say."""
    return next(ruling for one in RULES if (ruling := one(facts)) is not None)


def _unsure(slowing: Ratio) -> str:
    """Return why a ratio of measured costs is not called slowed."""
    seen = f"recovery took x{slowing.value:.1f}"
    if slowing.sure is not None and slowing.sure < SLOWED_FROM:
        return (
            f"{seen}, but between measurements only x{slowing.sure:.1f} is sure: raise"
            " audit.evaluations"
        )
    return f"{seen}, but seeds do not bear it out"


def _difference(one: Measurement, other: Measurement) -> Interval:
    """Return the 95 % interval of the difference of two scores.

    Newcombe's of two proportions (Statistics in Medicine 17, 1998), from the intervals of both.
    """
    own, others, difference = interval_of(one), interval_of(other), one.value - other.value
    return Interval(
        difference - math.hypot(one.value - own.low, others.high - other.value),
        difference + math.hypot(own.high - one.value, other.value - others.low),
    )


def _lead(mine: Measurement | None, other: Measurement | None) -> str | None:
    """Return why the best attack may do better than on a fresh network; None if it does not."""
    if mine is None or other is None:
        return "a test score is missing"
    most = _difference(mine, other).high
    margin = AHEAD * kind_of(mine).far(other.value)
    if mine.value <= interval_of(other).high and most <= margin:
        return None
    return (
        f"the best attack may be {kind_of(mine).gap(most)} ahead of a fresh network on the"
        f" {mine.total} test images; {kind_of(mine).gap(margin)} would be let pass"
    )
