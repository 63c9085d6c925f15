"""Parsed TOML as a specification."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from sophon._base.errors import SpecError
from sophon._specs.base import Spec
from sophon._specs.faults import faults_of

AnySpec = TypeVar("AnySpec", bound=Spec)


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
