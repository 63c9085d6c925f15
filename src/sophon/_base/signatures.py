"""A function with the arguments of a class, without repeating them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def signed_as(
    kind: Callable[Arguments, object],
) -> Callable[[Callable[..., Result]], Callable[Arguments, Result]]:
    """Give a function the signature of the class that it hands all its arguments to."""

    def signed(function: Callable[..., Result]) -> Callable[Arguments, Result]:
        setattr(function, "__signature__", inspect.signature(kind))  # noqa: B010 - mypy
        return function

    return signed
