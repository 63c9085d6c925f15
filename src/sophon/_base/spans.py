"""Named parts of a run, timed while a profile is taken; at all other times they cost nothing.

    with span("query passes"):
        ...

A part's time is its own: what a part inside it takes is not counted twice. Under `torch.profiler`
each is a range of the trace.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_NOTHING = nullcontext()


class Clock:
    """Sums the seconds of parts by name. `wait` ends what a device still computes."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._wait = wait
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        """Begin a part: the one around it stands still."""
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        """End the innermost part."""
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


_clock: Clock | None = None


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Time every part that runs inside."""
    global _clock  # noqa: PLW0603 - a clock passed through every call would cost more than it times
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before


def span(name: str) -> AbstractContextManager[None]:
    """Return a context that is the part `name`; one that does nothing unless a clock runs."""
    return _NOTHING if _clock is None else _timed(_clock, name)


@contextmanager
def _timed(clock: Clock, name: str) -> Iterator[None]:
    from torch.profiler import record_function

    clock.enter(name)
    try:
        with record_function(f"sophon: {name}"):
            yield
    finally:
        clock.leave()


def spanned(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make every call of a function the part `name`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with span(name):
                return function(*args, **kwargs)

        return called

    return decorate
