"""What is said of what is wrong with a specification."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from sophon._base.errors import brief, meant, shortened

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
        keys = _keys_at(cls, fault["loc"][:-1])
        known = f"; {meant(str(fault['loc'][-1]), keys)}the keys here are {', '.join(keys)}"
        return f"unknown key {path}" + (known if keys else "")
    if fault["type"] == "missing":
        return f"{path} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "too_short":
        message = f"give at least {fault['ctx']['min_length']}"
    if fault["type"] in ("tuple_type", "list_type") and isinstance(value, dict):
        message = f"there may be several: write [[{path}]] with two brackets a side"
    message = message[0].lower() + message[1:]
    message += _hint(fault)
    shown = "" if isinstance(value, dict) else f" = {brief(value)}"
    return f"{path}{shown}: {message}"


def _hint(fault: Any) -> str:
    """Return the question whether the nearest of the words that may stand here is meant."""
    context = fault.get("ctx", {})
    words = re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags"))))
    given = context.get("tag", fault.get("input"))
    hint = meant(given, words).strip() if isinstance(given, str) else ""
    return f"; {hint}" if hint else ""


def _keys_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: list[Any] = [cls]
    for part in loc:
        fields = [one.model_fields for one in current]
        # A part that is no key tells which of several specifications it is.
        found = [one for one in current if _kind_of(one) == part] or current
        inside = [_specs_in(held[part].annotation) for held in fields if part in held]
        current = inside[0] if inside else found
    return sorted({key for one in current for key in one.model_fields})


def _kind_of(cls: type[BaseModel]) -> Any:
    return cls.model_fields["kind"].default if "kind" in cls.model_fields else None


def _specs_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [spec for argument in arguments for spec in _specs_in(argument)]
