"""A run file: the model, the domains, and what is done with them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sophon._protection.spec import ProtectSpec
from sophon._specs import AuditSpec, DomainSpec, ModelSpec, PretrainSpec, TaskSpec
from sophon._specs.base import Spec


class PretrainRunSpec(Spec):
    """A run file as `pretrain` reads it: only the original domain is needed.

    The other tables may be there, as in the run file of a protection.
    """

    model: ModelSpec
    task: TaskSpec = TaskSpec()
    original: DomainSpec
    restricted: Annotated[tuple[DomainSpec, ...], Field(strict=False)] = ()
    held_out: Annotated[tuple[DomainSpec, ...], Field(strict=False)] = ()
    benign: Annotated[tuple[DomainSpec, ...], Field(strict=False)] = ()
    pretrain: PretrainSpec = PretrainSpec()
    protect: ProtectSpec = ProtectSpec()
    audit: AuditSpec = AuditSpec()


class RunSpec(PretrainRunSpec):
    """One run file: the model, the domains, and what `protect` and `audit` do with them.

    Only the audit uses `held_out`, restricted domains kept from protection, and `benign`, allowed
    ones that must stay possible.
    """

    restricted: Annotated[tuple[DomainSpec, ...], Field(strict=False, min_length=1)]
