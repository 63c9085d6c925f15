"""Named, versioned suites of attacks: data. A released suite never changes; a better one is new."""

from __future__ import annotations

from sophon._errors import SpecError
from sophon._specs import AuditSpec, FreshHead, OptimizerName, Preparation, Strategy, fingerprint_of

_FRESH: tuple[Preparation, ...] = (FreshHead(),)


def _rates(
    optimizer: OptimizerName,
    rates: tuple[float, ...],
    preparations: tuple[Preparation, ...] = (),
) -> tuple[Strategy, ...]:
    return tuple(
        Strategy(optimizer=optimizer, learning_rate=rate, preparations=preparations)
        for rate in rates
    )


# Twelve trials: the paper's three methods, SGD with momentum over three decades, Adam over two.
_QUICK_1: tuple[Strategy, ...] = (
    *_rates("sgd_momentum", (1e-4, 1e-3, 1e-2, 1e-1)),
    *_rates("adam", (1e-4, 1e-3, 1e-2)),
    *_rates("sgd_momentum", (1e-2, 1e-1), _FRESH),
    *_rates("adam", (1e-3,), _FRESH),
    Strategy(optimizer="sgd_momentum", learning_rate=1e-1, preparations=_FRESH, scope="head"),
    Strategy(optimizer="adam", learning_rate=1e-2, preparations=_FRESH, scope="head"),
)

SUITES: dict[str, tuple[Strategy, ...]] = {"quick-1": _QUICK_1}


def strategies_of(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the specification's suite and its extra ones, budget filled in.

    `spec.batch_size` is the suite's; an extra attack has its own. Only values count, not whether
    they were written out. Raises SpecError, listing the suites there are, if the name is not one
    of them, and for an extra attack with steps of its own: one budget is for all.
    """
    if spec.suite not in SUITES:
        raise SpecError(f"audit.suite = {spec.suite!r} is no suite; there is {', '.join(SUITES)}")
    usual = Strategy.model_fields["steps"].default
    for index, strategy in enumerate(spec.extra):
        if strategy.steps not in (usual, spec.steps):
            raise SpecError(
                f"audit.extra.{index}.steps = {strategy.steps}: every attack has the same budget;"
                f" leave it out, or set audit.steps (now {spec.steps})"
            )
    suite = SUITES[spec.suite]
    if spec.batch_size is not None:
        suite = tuple(s.model_copy(update={"batch_size": spec.batch_size}) for s in suite)
    chosen = tuple(s.model_copy(update={"steps": spec.steps}) for s in (*suite, *spec.extra))
    if len({s.fingerprint() for s in chosen}) != len(chosen):
        raise SpecError("audit.extra repeats an attack of the suite or of itself: remove it")
    return chosen


def suite_fingerprint(name: str) -> str:
    """Return the SHA-256 of a suite's attacks as released."""
    return fingerprint_of([s.model_dump(mode="json") for s in SUITES[name]])
