"""Sophon: protect a pre-trained model against fine-tuning, attack it, report what that is worth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and the modules they live in; resolved on first use, so that importing sophon
# needs no torch.
_PUBLIC = {
    "Alternate": "_protection.spec",
    "Audit": "_auditing.audit",
    "AuditError": "_base.errors",
    "AuditRecord": "_records.audit_record",
    "AuditSpec": "_specs",
    "BatchNorm": "_specs",
    "CheckpointError": "_base.errors",
    "Classification": "_tasks",
    "DataError": "_base.errors",
    "Denoising": "_tasks",
    "Distil": "_specs",
    "DistilSpec": "_protection.terms.distil",
    "Domain": "_data",
    "DomainSpec": "_specs",
    "ErasureSpec": "_protection.terms.erasure",
    "FreshHead": "_specs",
    "Guard": "_specs",
    "Heal": "_specs",
    "IntactnessError": "_base.errors",
    "Joint": "_protection.spec",
    "Latents": "_tasks",
    "ModelSpec": "_specs",
    "NoiseKick": "_specs",
    "NonFiniteError": "_base.errors",
    "PretrainSpec": "_specs",
    "Pretrained": "_training.pretrain",
    "Pretraining": "_training.pretrain",
    "Price": "_specs",
    "ProtectSpec": "_protection.spec",
    "Protected": "_protection.protection",
    "Protection": "_protection.protection",
    "ReadersSpec": "_protection.readers",
    "Rehearsal": "_protection.terms.rehearsal",
    "RescaleWeights": "_specs",
    "ResetLastBlocks": "_specs",
    "RidgeHead": "_specs",
    "Round": "_records.round",
    "RunSpec": "_cli.run_spec",
    "SophonError": "_base.errors",
    "SpecError": "_base.errors",
    "Strategy": "_specs",
    "StrategyDistribution": "_protection.sampling",
    "TaskLossSpec": "_protection.terms.task",
    "UnsupportedModelError": "_base.errors",
    "audit": "_auditing.audit",
    "load_domain": "_data",
    "pretrain": "_training.pretrain",
    "protect": "_protection.protection",
    "report": "_reporting.report",
    "resolve_model": "_models",
    "share_prompts": "_data",
}

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
    from sophon._protection.protection import Protected, Protection, protect
    from sophon._protection.readers import ReadersSpec
    from sophon._protection.sampling import StrategyDistribution
    from sophon._protection.spec import Alternate, Joint, ProtectSpec
    from sophon._protection.terms.distil import DistilSpec
    from sophon._protection.terms.erasure import ErasureSpec
    from sophon._protection.terms.rehearsal import Rehearsal
    from sophon._protection.terms.task import TaskLossSpec
    from sophon._records.audit_record import AuditRecord
    from sophon._records.round import Round
    from sophon._reporting.report import report
    from sophon._specs import (
        AuditSpec,
        BatchNorm,
        Distil,
        DomainSpec,
        FreshHead,
        Guard,
        Heal,
        ModelSpec,
        NoiseKick,
        PretrainSpec,
        Price,
        RescaleWeights,
        ResetLastBlocks,
        RidgeHead,
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
    "BatchNorm",
    "CheckpointError",
    "Classification",
    "DataError",
    "Denoising",
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
    "Rehearsal",
    "RescaleWeights",
    "ResetLastBlocks",
    "RidgeHead",
    "Round",
    "RunSpec",
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
