"""What every specification is: frozen, strict, with a fingerprint; and the types of its fields."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sophon._base.errors import SpecError, brief
from sophon._specs.faults import faults_of

Subject = Literal["protected", "unprotected", "scratch"]
OptimizerName = Literal["sgd", "sgd_momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw"]
ScheduleName = Literal["constant", "warmup", "cosine", "warmup_cosine"]
Augmentation = Literal["none", "flip", "crop", "flip_crop"]
Precision = Literal["auto", "fp32", "bf16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

Name = Annotated[str, Field(min_length=1)]
# What names a file or folder: text, or a pathlib.Path, of which the text is kept.
Place = Annotated[
    Name,
    BeforeValidator(lambda given: os.fspath(given) if isinstance(given, os.PathLike) else given),
]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Plain = bool | int | float | str
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=4)]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Constructed(ModelMetaclass):
    """Makes a constructor raise SpecError; pydantic's own error is kept where specs are nested."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:  # noqa: N805 - of a metaclass
        if values:
            raise SpecError(f"{cls.__name__}({brief(values[0])}): give every setting by its name")
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            raise SpecError(
                f"{cls.__name__}: {faults_of(cast(type[BaseModel], cls), error)}"
            ) from None


class Spec(BaseModel, metaclass=_Constructed):
    """Base of every specification: frozen, strict, no unknown keys.

    Its constructor raises SpecError.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    # The fields that fingerprints had from the first; None: all there are.
    released: ClassVar[frozenset[str] | None] = None

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON of `keyed`."""
        return fingerprint_of(self.keyed())

    def keyed(self) -> dict[str, Any]:
        """Return what identifies this specification: its released fields, defaults included, and
        of later ones those that differ from their default, so that a new field re-keys nothing.
        """
        known, values = self.released, {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            default = field.get_default(call_default_factory=True)
            if known is None or name in known or value != default:
                values[name] = _keyed(value)
        return values


def _keyed(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.keyed()
    if isinstance(value, tuple | list):
        return [_keyed(item) for item in value]
    if isinstance(value, dict):
        return {key: _keyed(item) for key, item in value.items()}
    return value


def fingerprint_of(value: Any) -> str:
    """Return the SHA-256 (hex) of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
