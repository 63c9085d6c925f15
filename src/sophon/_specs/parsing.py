"""Parsed TOML as a specification, and what is said of what is wrong with it."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sophon._base.errors import SpecError
from sophon._specs.base import Spec

AnySpec = TypeVar("AnySpec", bound=Spec)


def parse_spec(cls: type[AnySpec], data: dict[str, Any], *, where: str) -> AnySpec:
    """Validate parsed TOML as `cls`.

    Raises SpecError naming, for the first few faults, the path in the file, the value and
    what is allowed. `where` names the file in the message.
    """
    try:
        # JSON mode keeps strictness yet takes arrays for tuples, as TOML has only arrays.
        return cls.model_validate_json(json.dumps(data))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SpecError(f"{where}: {error}; only TOML numbers, text and tables") from None
        faults = [f for f in error.errors() if not _follows(f, error.errors())]
        lines = [_describe(cls, fault) for fault in faults[:3]]
        raise SpecError(f"{where}: " + "; ".join(lines)) from None


def _follows(fault: Any, faults: list[Any]) -> bool:
    """Return whether a list is only too short because one of its items is at fault."""
    depth = len(fault["loc"])
    inside = (len(f["loc"]) > depth and f["loc"][:depth] == fault["loc"] for f in faults)
    return fault["type"] == "too_short" and any(inside)


def _describe(cls: type[Spec], fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"]) or "(top level)"
    value = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_keys_at(cls, fault["loc"][:-1]))
        return f"unknown key {path}" + (f"; the keys here are {known}" if known else "")
    if fault["type"] == "missing":
        return f"{path} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "too_short":
        message = f"give at least {fault['ctx']['min_length']}"
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"{path}{shown}: {message}"


def _keys_at(cls: type[Spec], loc: tuple[Any, ...]) -> list[str]:
    current: Any = cls
    for part in loc:
        fields = getattr(current, "model_fields", {})
        if isinstance(part, int) or part not in fields:
            continue
        current = _spec_in(fields[part].annotation)
    return sorted(getattr(current, "model_fields", {}))


def _spec_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_in(argument)
        if found is not None:
            return found
    return None
