"""Parsed TOML as a specification."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any, TypeVar

from pydantic import ValidationError

from sophon._base.errors import SpecError, first_line, shortened
from sophon._specs.base import Spec
from sophon._specs.faults import faults_of

AnySpec = TypeVar("AnySpec", bound=Spec)


# Far beyond what a run file needs, and what a parser takes at once.
MOST_BYTES, _MOST_DEPTH, _MOST_ENTRIES, _LONGEST_WORD = 2**18, 24, 10_000, 250
# Texts and comments as a whole, words and numbers, and what nests and separates.
_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)'
    r"|'''.*?(?:'''|\Z)"
    r'|"(?:[^"\\\n]|\\.)*"?|\'[^\'\n]*\'?|\#[^\n]*|[\w+-]+|[\[{\]}.,=\n]',
    re.DOTALL,
)


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """Return TOML text as plain values.

    Raises SpecError, with the remedy, where it is no TOML, or larger, deeper or longer than any run
    file; `where` names the file in the message.
    """
    _require_small(text, where)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, OverflowError) as error:
        said = first_line(error)
        escape = "scape" in said or "hex value" in said or "Unicode" in said
        hint = "; in double quotes \\ is written \\\\: write paths in single quotes or with /"
        raise SpecError(f"{where} is not valid TOML: {said}{hint if escape else ''}") from None


def _require_small(text: str, where: str) -> None:
    """Raise SpecError for text that a parser would take too long over, or fail at."""
    depth = dots = entries = 0
    fault = f"more than {MOST_BYTES:,} characters" if len(text) > MOST_BYTES else ""
    for match in () if fault else _TOKEN.finditer(text):
        token = match.group()
        depth += (token in "[{") - (token in "]}")
        # A key such as a.b.c is a table in a table.
        dots = dots + 1 if token == "." else 0 if token in "[{]},=\n" else dots
        entries += token in ",="
        if max(depth, dots) > _MOST_DEPTH:
            fault = f"tables or lists nested more than {_MOST_DEPTH} deep"
        elif entries > _MOST_ENTRIES:
            fault = f"more than {_MOST_ENTRIES:,} values"
        elif len(token) > _LONGEST_WORD and (token[0].isalnum() or token[0] in "+-_"):
            fault = f"a number or a key of {len(token):,} characters, {shortened(token, 40)}"
        if fault:
            break
    if fault:
        raise SpecError(f"{where} has {fault}: no run file needs that; correct it")


def parse_spec(cls: type[AnySpec], data: dict[str, Any], *, where: str) -> AnySpec:
    """Validate parsed TOML as `cls`.

    Raises SpecError naming, for the first few faults, the path in the file, the value and
    what is allowed. `where` names the file in the message.
    """
    try:
        # JSON mode keeps strictness yet takes arrays for tuples, as TOML has only arrays.
        return cls.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise SpecError(f"{where}: {faults_of(cls, error)}") from None
    except (TypeError, ValueError) as error:
        raise SpecError(f"{where}: {error}; only TOML numbers, text and tables") from None
