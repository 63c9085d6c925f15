# ruff: noqa: F401
# mypy: implicit-reexport
"""What to do: frozen, strict specifications, their validation and their fingerprints."""

from sophon._specs.base import (
    Augmentation,
    Interpolation,
    OptimizerName,
    Precision,
    ScheduleName,
    Subject,
    fingerprint_of,
)
from sophon._specs.guard import Guard, Price
from sophon._specs.parsing import parse_spec, parse_toml
from sophon._specs.run_file import (
    AuditSpec,
    DomainSpec,
    ModelSpec,
    PretrainSpec,
    SampleSpec,
    TaskSpec,
)
from sophon._specs.strategies import (
    BalanceWeights,
    BatchNorm,
    Densify,
    Distil,
    FeatureScaling,
    FreshHead,
    Heal,
    KeepSpan,
    NoiseKick,
    Preparation,
    RescaleWeights,
    ResetLastBlocks,
    RidgeHead,
    Scramble,
    ShrinkPerturb,
    Strategy,
    shared_fields,
)
