"""Sophon: protect a pre-trained model against fine-tuning, attack it, report what that is worth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and the modules they live in; resolved on first use, so that importing sophon
# needs no torch.
_PUBLIC = {
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
    "Domain": "_data",
    "DomainSpec": "_specs",
    "FreshHead": "_specs",
    "Guard": "_specs",
    "Heal": "_specs",
    "IntactnessError": "_base.errors",
    "Latents": "_tasks",
    "ModelSpec": "_specs",
    "NoiseKick": "_specs",
    "NonFiniteError": "_base.errors",
    "PretrainSpec": "_specs",
    "Pretrained": "_training.pretrain",
    "Pretraining": "_training.pretrain",
    "ProtectSpec": "_specs",
    "Protected": "_protection.protection",
    "Protection": "_protection.protection",
    "Rehearsal": "_specs",
    "RescaleWeights": "_specs",
    "ResetLastBlocks": "_specs",
    "RidgeHead": "_specs",
    "Round": "_records.round",
    "RunSpec": "_specs",
    "SophonError": "_base.errors",
    "SpecError": "_base.errors",
    "Strategy": "_specs",
    "StrategyDistribution": "_specs",
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
    from sophon._data import Domain, load_domain, share_prompts
    from sophon._models import resolve_model
    from sophon._protection.protection import Protected, Protection, protect
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
        ProtectSpec,
        Rehearsal,
        RescaleWeights,
        ResetLastBlocks,
        RidgeHead,
        RunSpec,
        Strategy,
        StrategyDistribution,
    )
    from sophon._tasks import Classification, Denoising, Latents
    from sophon._training.pretrain import Pretrained, Pretraining, pretrain

__all__ = [
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
    "Domain",
    "DomainSpec",
    "FreshHead",
    "Guard",
    "Heal",
    "IntactnessError",
    "Latents",
    "ModelSpec",
    "NoiseKick",
    "NonFiniteError",
    "PretrainSpec",
    "Pretrained",
    "Pretraining",
    "ProtectSpec",
    "Protected",
    "Protection",
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
