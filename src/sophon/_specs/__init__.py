"""What to do: frozen, strict specifications, their validation and their fingerprints."""

from sophon._specs.base import (
    Augmentation,
    OptimizerName,
    Precision,
    ScheduleName,
    Subject,
    fingerprint_of,
)
from sophon._specs.parsing import (
    parse_spec,
)
from sophon._specs.protection import (
    Guard,
    ProtectSpec,
    Rehearsal,
    StrategyDistribution,
)
from sophon._specs.run_file import (
    AuditSpec,
    DomainSpec,
    ModelSpec,
    PretrainRunSpec,
    PretrainSpec,
    RunSpec,
    SampleSpec,
    TaskSpec,
)
from sophon._specs.strategies import (
    BatchNorm,
    Distil,
    FreshHead,
    Heal,
    NoiseKick,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Strategy,
    shared_fields,
)

__all__ = [
    "AuditSpec",
    "Augmentation",
    "BatchNorm",
    "Distil",
    "DomainSpec",
    "FreshHead",
    "Guard",
    "Heal",
    "ModelSpec",
    "NoiseKick",
    "OptimizerName",
    "Precision",
    "Preparation",
    "PretrainRunSpec",
    "PretrainSpec",
    "ProtectSpec",
    "Rehearsal",
    "RescaleWeights",
    "ResetLastBlocks",
    "RidgeHead",
    "RunSpec",
    "SampleSpec",
    "ScheduleName",
    "Strategy",
    "StrategyDistribution",
    "Subject",
    "TaskSpec",
    "fingerprint_of",
    "parse_spec",
    "shared_fields",
]
