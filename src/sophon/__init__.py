"""Sophon: protect a pre-trained model against fine-tuning, attack it, report what that is worth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Modules and the public names that live there; resolved on first use, so that importing sophon
# needs no torch.
_MODULES = {
    "_auditing.audit": "Audit audit",
    "_base.errors": "AuditError CheckpointError DataError IntactnessError NonFiniteError"
    " SophonError SpecError UnsupportedModelError",
    "_cli.run_spec": "RunSpec",
    "_data": "Domain load_domain share_prompts",
    "_models": "resolve_model",
    "_protection.denoising_readers": "DenoisingReadersSpec",
    "_protection.protection": "Protected Protection protect",
    "_protection.readers": "ReadersSpec ReadingSpec",
    "_protection.sampling": "StrategyDistribution",
    "_protection.spec": "Alternate Joint ProtectSpec",
    "_protection.terms.denoising_erasure": "DenoisingErasureSpec",
    "_protection.terms.distil": "DistilSpec",
    "_protection.terms.erasure": "ErasureSpec",
    "_protection.terms.rehearsal": "Rehearsal",
    "_protection.terms.retention": "RetentionSpec",
    "_protection.terms.task": "TaskLossSpec",
    "_records.audit_record": "AuditRecord",
    "_records.round": "Round",
    "_reporting.report": "report",
    "_specs": "AuditSpec BalanceWeights BatchNorm Densify Distil DomainSpec FreshHead Guard Heal"
    " KeepSpan ModelSpec NoiseKick PretrainSpec Price RescaleWeights ResetLastBlocks RidgeHead"
    " Scramble ShrinkPerturb Strategy",
    "_tasks": "Classification Denoising Latents",
    "_training.pretrain": "Pretrained Pretraining pretrain",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}

if TYPE_CHECKING:
    from sophon._auditing.audit import Audit, audit
    from sophon._base.errors import (
        AuditError,
        CheckpointError,
        DataError,
        IntactnessError,
        NonFiniteError,
        SophonError,
        SpecError,
        UnsupportedModelError,
    )
    from sophon._cli.run_spec import RunSpec
    from sophon._data import Domain, load_domain, share_prompts
    from sophon._models import resolve_model
    from sophon._protection.denoising_readers import DenoisingReadersSpec
    from sophon._protection.protection import Protected, Protection, protect
    from sophon._protection.readers import ReadersSpec, ReadingSpec
    from sophon._protection.sampling import StrategyDistribution
    from sophon._protection.spec import Alternate, Joint, ProtectSpec
    from sophon._protection.terms.denoising_erasure import DenoisingErasureSpec
    from sophon._protection.terms.distil import DistilSpec
    from sophon._protection.terms.erasure import ErasureSpec
    from sophon._protection.terms.rehearsal import Rehearsal
    from sophon._protection.terms.retention import RetentionSpec
    from sophon._protection.terms.task import TaskLossSpec
    from sophon._records.audit_record import AuditRecord
    from sophon._records.round import Round
    from sophon._reporting.report import report
    from sophon._specs import (
        AuditSpec,
        BalanceWeights,
        BatchNorm,
        Densify,
        Distil,
        DomainSpec,
        FreshHead,
        Guard,
        Heal,
        KeepSpan,
        ModelSpec,
        NoiseKick,
        PretrainSpec,
        Price,
        RescaleWeights,
        ResetLastBlocks,
        RidgeHead,
        Scramble,
        ShrinkPerturb,
        Strategy,
    )
    from sophon._tasks import Classification, Denoising, Latents
    from sophon._training.pretrain import Pretrained, Pretraining, pretrain

__all__ = [
    "Alternate",
    "Audit",
    "AuditError",
    "AuditRecord",
    "AuditSpec",
    "BalanceWeights",
    "BatchNorm",
    "CheckpointError",
    "Classification",
    "DataError",
    "Denoising",
    "DenoisingErasureSpec",
    "DenoisingReadersSpec",
    "Densify",
    "Distil",
    "DistilSpec",
    "Domain",
    "DomainSpec",
    "ErasureSpec",
    "FreshHead",
    "Guard",
    "Heal",
    "IntactnessError",
    "Joint",
    "KeepSpan",
    "Latents",
    "ModelSpec",
    "NoiseKick",
    "NonFiniteError",
    "PretrainSpec",
    "Pretrained",
    "Pretraining",
    "Price",
    "ProtectSpec",
    "Protected",
    "Protection",
    "ReadersSpec",
    "ReadingSpec",
    "Rehearsal",
    "RescaleWeights",
    "ResetLastBlocks",
    "RetentionSpec",
    "RidgeHead",
    "Round",
    "RunSpec",
    "Scramble",
    "ShrinkPerturb",
    "SophonError",
    "SpecError",
    "Strategy",
    "StrategyDistribution",
    "TaskLossSpec",
    "UnsupportedModelError",
    "__version__",
    "audit",
    "load_domain",
    "pretrain",
    "protect",
    "report",
    "resolve_model",
    "share_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sophon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sophon.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
