"""Errors a user can act on: each message names the offending value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# What is said of one fault: two lines of 300 characters.
_MOST = 540


def shortened(value: object, most: int = 80) -> str:
    """Return `value` as text of at most `most` characters, cut in the middle; what a terminal would
    take for a command is replaced.
    """
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value))
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


class SophonError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns.

    `told` says that another process of the same run tells it.
    """

    exit_code = 2
    told = False

    def __str__(self) -> str:
        return shortened(super().__str__(), _MOST)


class SpecError(SophonError):
    """A specification (TOML, `--set` or a spec object) is not valid."""


class DataError(SophonError):
    """A domain cannot be loaded or cannot be used with this model or specification."""


class UnsupportedModelError(SophonError):
    """A model cannot be built, its head cannot be found, or it cannot take the images."""


class CheckpointError(SophonError):
    """A checkpoint, run folder or store is damaged, foreign or cannot be written."""


class LockedError(CheckpointError):
    """Another process is writing to a folder, in which nothing is wrong."""


class AuditError(SophonError):
    """An audit cannot be run or its record cannot be judged."""


class IntactnessError(SophonError):
    """No weights met the tolerance on the original domain; every file of the run is kept."""

    exit_code = 3


class NonFiniteError(SophonError):
    """A loss or gradient became NaN or infinite while protecting; what was written is kept."""

    exit_code = 4


class ControlError(SophonError):
    """A model whose answer is known was not found out: audits made like this prove nothing."""

    exit_code = 5


class RanksError(SophonError):
    """Another process of the same run failed, ended, or holds other weights."""


def first_line(error: BaseException, most: int = 160, *, default: str | None = None) -> str:
    """Return an error's first line, cut to `most`; where it is empty `default`, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else default or type(error).__name__


def brief(value: Any, most: int = 80) -> str:
    """Return what `value` is called in a message, cut in the middle to `most` characters."""
    return shortened(" ".join(repr(value).split()), most)


def require_kind(value: Any, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Raise SpecError, naming `what` was given and the `remedy`, unless `value` is of `kind`."""
    if not isinstance(value, kind):
        raise SpecError(f"{what} = {brief(value)}: give {remedy}")


def meant(name: str, known: Iterable[str]) -> str:
    """Return the question whether the nearest of the `known` names is meant, empty where none is
    near.
    """
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}? " if near else ""


def unknown(what: str, name: str, known: Iterable[str], *, any_case: bool = False) -> str:
    """Return the message that a name is not among the `known` ones, with the nearest of them."""
    names = list(known)
    hint = meant(name, names)
    if any_case:
        folded = difflib.get_close_matches(
            name.partition(":")[0].upper(), {one.upper() for one in names}, 1
        )
        near = next((one for one in names if one.upper() in folded), "")
        hint = f"did you mean {near}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(names)}"
