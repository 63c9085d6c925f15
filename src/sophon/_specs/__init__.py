"""What to do: frozen, strict specifications, their validation and their fingerprints."""

from sophon._specs.base import (
    Augmentation,
    OptimizerName,
    Precision,
    ScheduleName,
    Subject,
    fingerprint_of,
)
from sophon._specs.guard import Guard, Price
from sophon._specs.parsing import (
    parse_spec,
)
from sophon._specs.run_file import (
    AuditSpec,
    DomainSpec,
    ModelSpec,
    PretrainSpec,
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
    "PretrainSpec",
    "Price",
    "RescaleWeights",
    "ResetLastBlocks",
    "RidgeHead",
    "SampleSpec",
    "ScheduleName",
    "Strategy",
    "Subject",
    "TaskSpec",
    "fingerprint_of",
    "parse_spec",
    "shared_fields",
]
