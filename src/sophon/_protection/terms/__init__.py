"""The terms that a protection is a sum of, one file each, by kind."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from sophon._base.errors import SpecError, meant
from sophon._protection.term import Hindrance, Keep, Term, TermSpec
from sophon._protection.terms.booster import BoosterTerm
from sophon._protection.terms.clamp import ClampTerm
from sophon._protection.terms.cuti import CUTITerm
from sophon._protection.terms.denoising_erasure import DenoisingErasureTerm
from sophon._protection.terms.distil import DistilTerm
from sophon._protection.terms.encoderlock import EncoderLockTerm
from sophon._protection.terms.erasure import ErasureTerm
from sophon._protection.terms.immunize import ImmunizeTerm
from sophon._protection.terms.ntl import NTLTerm
from sophon._protection.terms.prune import PruneTerm
from sophon._protection.terms.rehearsal import RehearsalTerm
from sophon._protection.terms.repnoise import RepNoiseTerm
from sophon._protection.terms.retention import RetentionTerm
from sophon._protection.terms.suppress import SuppressTerm
from sophon._protection.terms.task import TaskTerm
from sophon._specs import parse_spec

TERMS: dict[str, type[Term[Any]]] = {
    "task": TaskTerm,
    "distil": DistilTerm,
    "retention": RetentionTerm,
    "erasure": ErasureTerm,
    "denoising_erasure": DenoisingErasureTerm,
    "rehearsal": RehearsalTerm,
    "suppress": SuppressTerm,
    "ntl": NTLTerm,
    "repnoise": RepNoiseTerm,
    "immunize": ImmunizeTerm,
    "encoderlock": EncoderLockTerm,
    "prune": PruneTerm,
    "cuti": CUTITerm,
    "booster": BoosterTerm,
    "clamp": ClampTerm,
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
        hint = meant(str(kind), fitting)
        raise SpecError(f"kind = {kind!r} is no such term; {hint}there is {', '.join(fitting)}")
    wanted = TERMS[kind].spec_type
    if isinstance(value, wanted):
        return value
    if isinstance(value, TermSpec):
        raise SpecError(
            f"kind = {kind!r} is given as {type(value).__name__}: use {wanted.__name__}, or a table"
        )
    table = value if isinstance(value, dict) else {"kind": value}
    plain = {key: _plain(f"{kind}: {key}", held) for key, held in table.items()}
    return parse_spec(wanted, plain, where=kind)


def _plain(key: str, value: Any) -> Any:
    """Return a value as JSON has it; one from Python may be or hold specifications."""

    def dumped(part: Any) -> Any:
        if isinstance(part, BaseModel):
            return part.model_dump(mode="json")
        raise SpecError(
            f"{key} = {value!r} holds a {type(part).__name__}: give plain numbers, texts, lists and"
            " tables"
        )

    return json.loads(json.dumps(value, default=dumped))


__all__ = ["TERMS", "Hindrance", "Keep", "Term", "TermSpec", "parse_term"]
