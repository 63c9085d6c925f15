"""What is said of what is wrong with a specification."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from sophon._base.errors import brief, shortened

# Of a file full of faults only the first few are told.
_MOST_FAULTS = 100


def faults_of(cls: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong, for the first few faults the path, the value and what is allowed."""
    # A key that is unknown may be why another is missing.
    faults = error.errors(include_url=False)[:_MOST_FAULTS]
    every = sorted(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    return "; ".join(_describe(cls, f) for f in [f for f in every if not _follows(f, every)][:3])


def _follows(fault: Any, faults: list[Any]) -> bool:
    """Return whether a list is only too short because one of its items is at fault."""
    depth = len(fault["loc"])
    inside = (len(f["loc"]) > depth and f["loc"][:depth] == fault["loc"] for f in faults)
    return fault["type"] == "too_short" and any(inside)


def _describe(cls: type[BaseModel], fault: Any) -> str:
    path = shortened(".".join(str(part) for part in fault["loc"])) or "(top level)"
    value = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_keys_at(cls, fault["loc"][:-1]))
        return f"unknown key {path}" + (f"; the keys here are {known}" if known else "")
    if fault["type"] == "missing":
        return f"{path} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "too_short":
        message = f"give at least {fault['ctx']['min_length']}"
    if fault["type"] in ("tuple_type", "list_type") and isinstance(value, dict):
        message = f"there may be several: write [[{path}]] with two brackets a side"
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(value, dict) else f" = {brief(value)}"
    return f"{path}{shown}: {message}"


def _keys_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
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
