"""Named, versioned suites of attacks: data. A released suite never changes; a better one is new."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from sophon._attacks.kinds import idle
from sophon._attacks.lists import (
    FRESH,
    LOOK_1,
    QUICK_1,
    QUICK_2,
    SECONDARY_1,
    STANDARD_1,
    STANDARD_2,
    at_rates,
)
from sophon._attacks.search import search_space
from sophon._base.errors import SpecError, shortened
from sophon._records.statement import statement_of
from sophon._specs import (
    AuditSpec,
    FreshHead,
    KeepSpan,
    OptimizerName,
    Preparation,
    ResetLastBlocks,
    Strategy,
    fingerprint_of,
)


@dataclass(frozen=True)
class Suite:
    """Attacks, and how they are run.

    With a `prefilter` every attack is first stopped at that share of the budget, and only the
    `survivors` best of each subject, those that were best at any budget and the best of every
    method are run to its end, on every subject; those that only pay off late are never stopped, and
    none is where the stop cannot tell any of a subject's attacks from its start or from guessing.
    With `headline`, only attacks that lead somewhere are run with every seed: the first seed
    chooses them, the others measure. Otherwise all are.

    Held-out and benign domains are attacked with `secondary`, each to its end; with all
    `strategies` where it is empty. `anew` holds shares of a network's blocks, from the last one:
    for each one more attack starts so many anew.
    """

    strategies: tuple[Strategy, ...]
    prefilter: float | None = None
    survivors: int = 0
    headline: bool = False
    seeds: tuple[int, ...] = (0,)
    search_trials: int = 0
    depth: bool = False
    rehearsed: bool = False
    secondary: tuple[Strategy, ...] = ()
    anew: tuple[float, ...] = ()


SUITES: dict[str, Suite] = {
    "quick-1": Suite(QUICK_1),
    "quick-2": Suite(QUICK_2, anew=(0.5,)),
    "standard-1": Suite(
        STANDARD_1,
        prefilter=0.25,
        survivors=6,
        headline=True,
        seeds=(0, 1, 2, 3, 4, 5),
        search_trials=16,
        depth=True,
        rehearsed=True,
        secondary=SECONDARY_1,
    ),
    "standard-2": Suite(
        STANDARD_2,
        prefilter=0.2,
        survivors=2,
        headline=True,
        seeds=(0, 1, 2, 3, 4, 5),
        search_trials=12,
        rehearsed=True,
        secondary=SECONDARY_1,
        anew=(0.25, 0.5, 0.75),
    ),
    "look-1": Suite(LOOK_1),
}
# Multiples of a rehearsed rate that are attacked with.
_BEYOND = (10, 100)
# What a checkpoint is taken to have rehearsed whatever it says: nothing buys a milder audit.
_UNSAID: dict[OptimizerName, float] = {"sgd_momentum": 1e-1, "adam": 1e-2}
# Numbers of blocks whose attacks by depth stand for all in a suite's fingerprint.
_NETWORKS = (1, 5, 12)


def suite_of(spec: AuditSpec) -> Suite:
    """Return the specification's suite. Raises SpecError, listing those there are."""
    if spec.suite not in SUITES:
        raise SpecError(f"audit.suite = {spec.suite!r} is no suite; there is {', '.join(SUITES)}")
    return SUITES[spec.suite]


def resolved(spec: AuditSpec) -> AuditSpec:
    """Return the specification with the suite's own seeds and search where it names none.

    Raises SpecError for a prefilter or survivors of a suite that runs every attack to its end.
    """
    suite = suite_of(spec)
    for name in ("prefilter", "survivors") if suite.prefilter is None else ():
        if getattr(spec, name) is not None:
            raise SpecError(
                f"audit.{name} = {getattr(spec, name)}: suite {spec.suite!r} runs every attack to"
                " its end; leave it out, or set audit.suite = 'standard-1'"
            )
    trials = suite.search_trials if spec.search_trials is None else spec.search_trials
    return spec.model_copy(update={"seeds": spec.seeds or suite.seeds, "search_trials": trials})


def strategies_of(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the specification's suite and its extra ones, budget filled in.

    `spec.batch_size` is the suite's; an extra attack has its own. Only values count, not whether
    they were written out. Raises SpecError, listing the suites there are, if the name is not one
    of them, and for an extra attack with steps of its own: one budget is for all.
    """
    usual = Strategy.model_fields["steps"].default
    for index, strategy in enumerate(spec.extra):
        if strategy.steps not in (usual, spec.steps):
            raise SpecError(
                f"audit.extra.{index}.steps = {strategy.steps}: every attack has the same budget;"
                f" leave it out, or set audit.steps (now {spec.steps})"
            )
    suite = _with_budget(suite_of(spec).strategies, spec)
    chosen = (*suite, *(s.model_copy(update={"steps": spec.steps}) for s in spec.extra))
    met: set[str] = set()
    for strategy in chosen:
        if strategy.fingerprint() in met:
            raise SpecError(
                f"audit.extra repeats {strategy.label()}, an attack of the suite or of itself:"
                " remove it"
            )
        met.add(strategy.fingerprint())
    return chosen


def attack_named(name: str) -> Strategy:
    """Return the attack of a suite that reports show under this name.

    Raises SpecError with near matches, or with some of the attacks there are.
    """
    known = {one.label(): one for suite in SUITES.values() for one in suite.strategies}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    wanted = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else (f"name it as reports do, such as {next(iter(known))!r}, or give its table")
    )
    raise SpecError(f"{shortened(name)!r} is no attack of a suite; {wanted}")


def secondary_of(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the suite's own attacks on held-out and benign domains, budget filled in; none where
    these meet what the restricted ones do.
    """
    return _with_budget(suite_of(spec).secondary, spec)


def _with_budget(suite: tuple[Strategy, ...], spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return a suite's attacks with the specification's steps and, if it has one, batch size."""
    change: dict[str, Any] = {"steps": spec.steps}
    if spec.batch_size is not None:
        change["batch_size"] = spec.batch_size
    return tuple(dict.fromkeys(s.model_copy(update=change) for s in suite))


def fitting(
    strategies: tuple[Strategy, ...], metric: str
) -> tuple[tuple[Strategy, ...], tuple[str, ...]]:
    """Return the attacks that can do something to a task's models, and what was left out and why.

    To a diffusion model all else applies, its last convolution being the head.
    """
    why = {s: idle(s.preparations, metric) for s in strategies}
    kept = tuple(s for s in strategies if why[s] is None)
    return kept, tuple(f"{s.label()}: {reason}" for s, reason in why.items() if reason is not None)


def without_repeats(strategies: Iterable[Strategy], blocks: int) -> tuple[Strategy, ...]:
    """Return the attacks, but of those that keep the same of so many blocks only the first."""
    chosen: dict[object, Strategy] = {}
    for strategy in strategies:
        spans = tuple(
            p.kept_of(blocks) if isinstance(p, KeepSpan) and blocks else p
            for p in strategy.preparations
        )
        chosen.setdefault((strategy.model_copy(update={"preparations": ()}), spans), strategy)
    return tuple(chosen.values())


def beyond_rehearsal(protection: dict[str, Any] | None, spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return attacks at 10 and 100 times the rates that protection says it rehearsed.

    Of a range it is the upper end that counts; of a checkpoint that says nothing, what is usual.
    Raises SpecError for a statement that cannot be read.
    """
    return _beyond(statement_of(protection).rates or _UNSAID, spec)


def beyond_usual(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return attacks at 10 and 100 times the usual rates: no statement makes an audit milder."""
    return _beyond(_UNSAID, spec)


def _beyond(rates: dict[OptimizerName, float], spec: AuditSpec) -> tuple[Strategy, ...]:
    batch_size = spec.batch_size or Strategy.model_fields["batch_size"].default
    return tuple(
        Strategy(
            optimizer=optimizer,
            learning_rate=min(1000.0, float(f"{rate * times:.6g}")),
            batch_size=batch_size,
            steps=spec.steps,
        )
        for optimizer, rate in rates.items()
        for times in _BEYOND
    )


def depth_attacks(blocks: int, spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return attacks that keep the first n of `blocks` blocks and start the rest anew.

    At most four values of n, evenly spread, all blocks among them; two optimizers each.
    """
    cuts = sorted({round(blocks * share) for share in (0.0, 0.25, 0.5, 0.75)})
    batch_size = spec.batch_size or Strategy.model_fields["batch_size"].default
    return tuple(
        strategy.model_copy(update={"steps": spec.steps, "batch_size": batch_size})
        for reset in cuts
        for strategy in (
            *at_rates("sgd_momentum", (3e-2,), _reset(reset)),
            *at_rates("adam", (3e-3,), _reset(reset)),
        )
    )


def anew_attacks(blocks: int, spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the suite's attacks that start a share of `blocks` blocks anew, budget filled in."""
    suite = suite_of(spec)
    counts = sorted({max(1, round(blocks * share)) for share in suite.anew if blocks})
    return _with_budget(
        tuple(s for count in counts for s in at_rates("adam", (3e-3,), _reset(count))), spec
    )


def _reset(blocks: int) -> tuple[Preparation, ...]:
    return (ResetLastBlocks(blocks=blocks), FreshHead()) if blocks else FRESH


def suite_fingerprint(name: str) -> str:
    """Return the SHA-256 of a suite as released: every field of its attacks, defaults included, how
    they are run, and what it makes for a network: attacks by depth, a search, rates beyond.
    """
    suite, spec = SUITES[name], AuditSpec(suite=name)
    made = {field.name: getattr(suite, field.name) for field in fields(suite)}
    made["strategies"] = _dumped(suite.strategies)
    # Absent where there are none: a suite keeps the fingerprint that it had without the field.
    if own := made.pop("secondary"):
        made["secondary"] = _dumped(own)
    if made.pop("anew"):
        made["anew"] = {n: _dumped(anew_attacks(n, spec)) for n in _NETWORKS}
    if suite.depth:
        made["depth attacks"] = {n: _dumped(depth_attacks(n, spec)) for n in _NETWORKS}
    if suite.rehearsed:
        made["beyond rehearsal"] = [list(_BEYOND), _UNSAID, "whatever is stated"]
    if suite.search_trials:
        made["search"] = search_space()
    return fingerprint_of(made)


def _dumped(strategies: tuple[Strategy, ...]) -> list[dict[str, Any]]:
    return [strategy.keyed() for strategy in strategies]
