"""Loops that may take a while: whoever watches sees how far they are; nobody does unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

Item = TypeVar("Item")
# Called with what one item is called and how many there are; its context's value after each.
Watcher = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
_watcher: Watcher | None = None


@contextmanager
def watching(watcher: Watcher | None) -> Iterator[None]:
    """Show `counted` loops by `watcher` inside, or none of them."""
    global _watcher  # noqa: PLW0603 - what decodes images knows nothing of who looks on
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def counted(items: Iterable[Item], noun: str, total: int) -> Iterator[Item]:
    """Yield `items`, of which there are `total`, each called `noun`, before whoever watches."""
    if _watcher is None:
        yield from items
        return
    with _watcher(noun, total) as step:
        for item in items:
            yield item
            step()
