"""The terms that a protection is a sum of, one file each, by kind."""

from __future__ import annotations

import json
from typing import Any

from sophon._base.errors import SpecError
from sophon._protection.term import Hindrance, Keep, Term, TermSpec
from sophon._protection.terms.distil import DistilTerm
from sophon._protection.terms.erasure import ErasureTerm
from sophon._protection.terms.rehearsal import RehearsalTerm
from sophon._protection.terms.task import TaskTerm
from sophon._specs import parse_spec

TERMS: dict[str, type[Term[Any]]] = {
    "task": TaskTerm,
    "distil": DistilTerm,
    "erasure": ErasureTerm,
    "rehearsal": RehearsalTerm,
}


def parse_term(value: Any, role: type[Keep[Any]] | type[Hindrance[Any]]) -> TermSpec:
    """Return a term's specification from its table, or as it is.

    Raises SpecError that lists the kinds there are for one that does not exist or is of the other
    role, and one that names the key for settings that cannot be.
    """
    fitting = [kind for kind, term in TERMS.items() if issubclass(term, role)]
    kind = value.kind if isinstance(value, TermSpec) else value
    kind = kind.get("kind") if isinstance(kind, dict) else kind
    if kind not in fitting:
        raise SpecError(f"kind = {kind!r} is no such term; there is {', '.join(fitting)}")
    if isinstance(value, TermSpec):
        return value
    table = value if isinstance(value, dict) else {"kind": value}
    # A table from Python may hold specifications.
    plain = json.loads(json.dumps(table, default=lambda spec: spec.model_dump(mode="json")))
    return parse_spec(TERMS[kind].spec_type, plain, where=kind)


__all__ = ["TERMS", "Hindrance", "Keep", "Term", "TermSpec", "parse_term"]
