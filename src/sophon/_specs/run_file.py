"""The tables of a run file: models, domains, tasks, audits, pre-training."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sophon._base.errors import shortened
from sophon._specs.base import (
    Augmentation,
    Channels,
    Count,
    Fraction,
    Interpolation,
    Name,
    NonNegative,
    Place,
    Plain,
    Positive,
    Precision,
    Rate,
    Seed,
    Spec,
)
from sophon._specs.strategies import Strategy


class SampleSpec(Spec):
    """How the pictures of a diffusion model are judged; nothing of it concerns a classifier.

    `count` pictures (0: none) are drawn from each subject before and after its best attack, in
    `steps` steps of DDIM; the first `grid` are shown. `extractor` is `classifier` (trained for
    `extractor_steps` on the classes of both domains), the folder of a classifier, or a file of
    Inception's weights; `width`, if given, is the number of features it must have. `kid_subset` is
    KID's, of which twice as many pictures and test images are needed; `neighbours` are those of
    precision and recall. With `budgets` pictures are also drawn after the best attack within these
    shares of the audit's steps, with `extra` after each of the attacks that `audit.extra` names.
    """

    count: Count = 128
    steps: Positive = 25
    grid: Positive = 16
    extractor: Place = "classifier"
    extractor_steps: Positive = 400
    width: Positive | None = None
    kid_subset: Annotated[int, Field(ge=2, le=10**9)] = 40
    neighbours: Positive = 3
    budgets: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()
    extra: bool = False


class AuditSpec(Spec):
    """What `audit` runs: a suite, its budget and its seeds.

    `extra` adds attacks; all take `steps` steps. `batch_size` replaces the suite's, an extra
    attack has its own. `search_trials` is how many strategies a search tries on each subject, on
    top of the suite. A suite that stops most attacks early does so at `prefilter` of the budget
    and goes on with the `survivors` best of each subject and its best of every method. What is left
    out is the suite's own.
    """

    suite: str = "quick-1"
    steps: Positive = 200
    evaluations: Annotated[int, Field(ge=2, le=10_000)] = 12
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] | None = None
    search_trials: Count | None = None
    prefilter: Annotated[float, Field(gt=0, le=1)] | None = None
    survivors: Positive | None = None
    batch_size: Positive | None = None
    extra: Annotated[tuple[Strategy, ...], Field(strict=False)] = ()
    precision: Precision = "auto"
    samples: SampleSpec = SampleSpec()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        return self


# Arguments of timm's and torchvision's constructors that look for files or on the hub, and values.
_ELSEWHERE = re.compile(
    r"(^|_)(pretrained(?!_window)|hub|urls?|files?|filename|cache|dir|folder)(_|$)"
    r"|^(weights|backbone|checkpoint)(_|$)"
)
_ADDRESS = re.compile(r"^[\w-]+:|[/\\]")


class ModelSpec(Spec):
    """Which network: `resnet20`, `timm:NAME`, `torchvision:NAME` or a checkpoint by sophon;
    `transformers:PATH`, the folder of an image classifier that `save_pretrained` wrote; for
    denoising `diffusers:PATH`, a pipeline's or a U-Net's folder, or a U-Net's configuration.

    `weights` is a file of tensors (safetensors, or a torch file that loads as tensors only); of
    several sets in it `weights_key` takes that under this key or prefix, such as `model_ema`.
    `head` names the classifier layer where it cannot be found; `classes` overrides the number
    of outputs the network is built with; `in_channels` is 3 for RGB and 1 for grey networks.
    `arguments` go to timm's or torchvision's constructor, such as narrower layers.
    `gradient_checkpointing` saves memory for time: activations are computed twice and not kept.
    """

    released: ClassVar = frozenset(
        {
            *("name", "weights", "pretrained", "classes", "in_channels", "head", "arguments"),
            "gradient_checkpointing",
        }
    )

    name: Place
    weights: Place | None = None
    weights_key: Name | None = None
    pretrained: bool = False
    classes: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    in_channels: Annotated[int, Field(ge=1, le=4)] = 3
    head: str | None = None
    arguments: dict[str, Plain | list[Plain]] = Field(default_factory=dict)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _at_hand(self) -> Self:
        for key, value in self.arguments.items():
            texts = [str(one) for one in (value if isinstance(value, list) else [value])]
            if _ELSEWHERE.search(key.lower()) or any(map(_ADDRESS.search, texts)):
                raise ValueError(
                    f"arguments.{shortened(key)} makes the library look for files or weights"
                    " elsewhere: set model.pretrained = true for published weights, or"
                    " model.weights = FILE"
                )
        return self


class DomainSpec(Spec):
    """Where a domain's images come from and how they are cut and normalised.

    `source` is `npz`, `folder`, `datasets`, `webdataset`, `torchvision`, `tree`, `embedded` or
    `prompts`; of `torchvision`, `tree` and `embedded` `dataset` says which set, or else `name`,
    which is the domain's. `image_column` and `label_column` name what a table or dataset calls
    images and labels. Images become `image_size` squares when it is given: the middle square, of
    `crop_pct` of the shorter side, is resized by `interpolation`; with `crop_mode = "squash"` the
    middle, `crop_pct` of both sides, whatever its shape. 16-bit grey keeps the upper 8 of
    its `bit_depth` bits. Transparent pictures are laid on `background`; without it their
    transparency is dropped. `on_error = "skip"` leaves out image files that cannot be read. `mean`
    and `std` are per channel on images scaled to [0, 1]. `labels = "coarse"` takes an archive's
    coarser labels instead of its own (arrays `coarse_of_fine` and `coarse_names`), `labels =
    "none"` makes all images one class, as a diffusion model allows, and reads a folder as it comes,
    flat or nested. `join` joins train and test and cuts a test split anew. `classes` keeps only
    those labels, numbers or names, renumbered in order; `limit` keeps the first so many training
    images of each class. `normalisation` names a known mean and std, such as `cifar10`, and
    `class_order` a known order of classes, `cifar10`, `stl10` or `imagenette`.
    """

    released: ClassVar = frozenset(
        {
            *("source", "name", "dataset", "path", "root", "download", "image_size", "mean", "std"),
            *("normalisation", "validation", "test", "split_seed", "labels", "join", "classes"),
            *("class_order", "limit", "weight"),
        }
    )

    source: str
    name: Name | None = None
    dataset: Name | None = None
    path: Place | None = None
    root: Place | None = None
    download: bool = False
    image_column: Name | None = None
    label_column: Name | None = None
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    interpolation: Interpolation = "bilinear"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop_mode: Literal["center", "squash"] = "center"
    bit_depth: Annotated[int, Field(ge=9, le=16)] = 16
    background: Literal["black", "grey", "white"] | None = None
    on_error: Literal["error", "skip"] = "error"
    mean: Channels | None = None
    std: Channels | None = None
    normalisation: Name | None = None
    validation: Fraction = 0.1
    test: Fraction = 0.2
    split_seed: Seed = 0
    labels: Literal["own", "coarse", "none"] = "own"
    join: bool = False
    classes: Annotated[tuple[Count | Name, ...], Field(strict=False, min_length=2)] | None = None
    class_order: Name | None = None
    limit: Positive | None = None
    weight: Rate = 1.0


class ScheduleSpec(Spec):
    """The noise of a diffusion model that comes without a scheduler: diffusers' DDPM settings."""

    timesteps: Annotated[int, Field(ge=4, le=1_000_000)] = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02


class TaskSpec(Spec):
    """What the model does: `classification`, or `denoising` for a diffusion model.

    `prediction` is what a diffusion model predicts; a pipeline's scheduler says so itself, as it
    says the schedule. `timestep` trains, suppresses and evaluates at that one timestep instead of
    all of them: the released research code uses 1.
    """

    name: Literal["classification", "denoising"] = "classification"
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    timestep: Count | None = None
    schedule: ScheduleSpec | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        given = [n for n in ("prediction", "timestep", "schedule") if getattr(self, n) is not None]
        if self.name == "classification" and given:
            raise ValueError(f"{given[0]} is a setting of name = 'denoising'")
        return self


class PretrainSpec(Spec):
    """How `pretrain` trains the model of a run on its original domain.

    AdamW with warm-up and a cosine; `ema_decay` ships the exponential moving average of the weights
    (without one: 0.999 for a diffusion model, none for a classifier; 0 for none).
    """

    seed: Seed = 0
    steps: Positive = 2000
    batch_size: Positive = 64
    learning_rate: Rate = 1e-3
    weight_decay: NonNegative = 0.01
    warmup_steps: Count = 0
    clip_norm: Rate | None = 1.0
    augmentation: Augmentation = "flip"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    every: Positive = 100
    precision: Precision = "auto"
