"""What to do: frozen, strict specifications, their validation and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sophon._errors import SpecError

Subject = Literal["protected", "unprotected", "scratch"]
OptimizerName = Literal["sgd", "sgd_momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw"]
ScheduleName = Literal["constant", "warmup", "cosine", "warmup_cosine"]
Augmentation = Literal["none", "flip", "crop", "flip_crop"]
Precision = Literal["auto", "fp32", "bf16"]

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Plain = bool | int | float | str
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=4)]


class Spec(BaseModel):
    """Base of every specification: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON of every field, defaults included."""
        return fingerprint_of(self.model_dump(mode="json"))


def fingerprint_of(value: Any) -> str:
    """Return the SHA-256 (hex) of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --- Preparations: what an attacker does to the copied weights before the first step -----------


class FreshHead(Spec):
    """Replace the classifier head by a freshly initialised one (the paper's init-FC)."""

    kind: Literal["fresh_head"] = "fresh_head"


class ResetLastBlocks(Spec):
    """Re-initialise the last `blocks` blocks before the head (the head is left to FreshHead)."""

    kind: Literal["reset_last_blocks"] = "reset_last_blocks"
    blocks: Positive = 1


class RescaleWeights(Spec):
    """Scale weights to `norm`, a root mean square over filters, where the function allows it.

    It does where a normalisation follows the layer, and where the next layer can take the inverse
    (ReLU and pooling between them). The function is preserved; the size of a step relative to
    the weights is not.
    """

    kind: Literal["rescale_weights"] = "rescale_weights"
    norm: Rate = 1.0


class BatchNorm(Spec):
    """Put BatchNorm back: `reset` re-initialises it, `reestimate` measures its statistics anew."""

    kind: Literal["batch_norm"] = "batch_norm"
    mode: Literal["reset", "reestimate"] = "reestimate"
    batches: Positive = 10


class NoiseKick(Spec):
    """Add Gaussian noise with `relative_std` times each weight tensor's root mean square."""

    kind: Literal["noise_kick"] = "noise_kick"
    relative_std: Rate = 0.02


class Heal(Spec):
    """Train on the original domain first, with Adam, for `share` of the steps.

    What protection spoilt may be mended before the restricted task is taken up.
    """

    kind: Literal["heal"] = "heal"
    share: Fraction = 0.25
    learning_rate: Rate = 1e-3


class Distil(Spec):
    """Teach a fresh network the model's outputs on original images, for `share` of the steps.

    What only makes the weights hard to train stays behind (arXiv 1503.02531; temperature 4, Adam).
    """

    kind: Literal["distil"] = "distil"
    share: Fraction = 0.5
    learning_rate: Rate = 3e-3


Preparation = Annotated[
    FreshHead | ResetLastBlocks | RescaleWeights | BatchNorm | NoiseKick | Heal | Distil,
    Field(discriminator="kind"),
]
Preparations = Annotated[tuple[Preparation, ...], Field(strict=False)]


class Strategy(Spec):
    """How an attacker fine-tunes: preparations, scope, optimizer, schedule, batches, steps.

    `lora_rank` trains low-rank adapters and the head instead of all weights; `data_fraction` is
    the share of the training images that the attacker has, every class among them.

    The paper's three methods are `preparations = ()` (direct-all), `(FreshHead(),)` with
    `scope = "all"` (init-FC + all) and with `scope = "head"` (init-FC + FC only).
    """

    preparations: Preparations = ()
    scope: Literal["all", "head"] = "all"
    optimizer: OptimizerName = "sgd_momentum"
    learning_rate: Rate = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    schedule: ScheduleName = "constant"
    warmup_steps: Count = 0
    clip_norm: Rate | None = None
    batch_size: Positive = 64
    steps: Positive = 200
    augmentation: Augmentation = "none"
    precision: Precision = "auto"
    lora_rank: Positive | None = None
    data_fraction: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.optimizer == "nesterov" and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        training = [p for p in self.preparations if isinstance(p, Heal | Distil)]
        if tuple(training) != self.preparations[: len(training)]:
            raise ValueError("heal and distil train the original task: list them first")
        if sum(p.share for p in training) >= 1:
            raise ValueError("the shares of heal and distil must leave steps: below 1 in all")
        if self.lora_rank is not None and self.scope == "head":
            raise ValueError("lora_rank adapts the layers before the head: use scope = 'all'")
        return self

    def label(self, shared: frozenset[str] = frozenset()) -> str:
        """Return a name that tells this strategy from others of one budget, such as
        `init-FC-all sgd_momentum 0.01 (clip norm 1.0)`. Fields in `shared` are left out.
        """
        kinds = [preparation.kind for preparation in self.preparations]
        start = "init-FC" if "fresh_head" in kinds else "direct"
        scope = "FC-only" if self.scope == "head" else "all"
        extra = "".join(
            f" +{p.kind}{_changed(p, 'kind')}" for p in self.preparations if p.kind != "fresh_head"
        )
        usual = ("preparations", "scope", "optimizer", "learning_rate", "steps")
        rest = _changed(self, *usual, *shared)
        return f"{start}-{scope}{extra} {self.optimizer} {self.learning_rate:.3g}{rest}"


def shared_fields(strategies: Iterable[Strategy]) -> frozenset[str]:
    """Return the fields in which the strategies are all alike: a table need not repeat them."""
    held = set(strategies)
    names = Strategy.model_fields
    return frozenset(n for n in names if len({getattr(s, n) for s in held}) == 1)


def _changed(spec: Spec, *but: str) -> str:
    """Return the fields that differ from their defaults, such as ` (blocks 2)`."""
    parts = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name not in but and value != field.default:
            parts.append(f"{name.replace('_', ' ')} {value}")
    return f" ({', '.join(parts)})" if parts else ""


def _default_rates() -> dict[OptimizerName, tuple[float, float]]:
    return {"sgd_momentum": (1e-4, 1e-1), "adam": (1e-4, 1e-2)}


class StrategyDistribution(Spec):
    """What a rehearsal samples its strategies from: each choice uniform, the rate log-uniform."""

    learning_rates: dict[OptimizerName, Annotated[tuple[Rate, Rate], Field(strict=False)]] = Field(
        default_factory=_default_rates, min_length=1
    )
    preparations: Annotated[tuple[Preparations, ...], Field(strict=False, min_length=1)] = (
        (),
        (FreshHead(),),
    )
    batch_sizes: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (64,)
    scopes: Annotated[tuple[Literal["all", "head"], ...], Field(strict=False, min_length=1)] = (
        "all",
    )
    schedules: Annotated[tuple[ScheduleName, ...], Field(strict=False, min_length=1)] = (
        "constant",
    )
    augmentation: Augmentation = "none"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in self.learning_rates.items():
            if low > high:
                raise ValueError(f"the range of {name} starts at {low} above its end {high}")
        return self


class Rehearsal(Spec):
    """How protection simulates attackers.

    Each suppression step advances `strategies` attackers by `steps` (the paper's K). Without a
    `horizon` every attacker is fresh and used once, as in the paper. With one, `pool`
    attackers persist: each keeps its optimizer and its displacement from the real weights from
    round to round until it has taken `horizon` steps, then a new one takes its place.
    """

    strategies: Positive = 1
    steps: Positive = 20
    horizon: Positive | None = None
    pool: Positive = 8
    distribution: StrategyDistribution = StrategyDistribution()
    fixed: Strategy | None = None
    query_batch_size: Positive = 32
    gamma: Literal["uniform", "linear", "last"] = "uniform"

    @property
    def life(self) -> int:
        """Steps that an attacker takes in all."""
        return self.horizon or self.steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        usual = Strategy.model_fields["steps"].default
        if self.fixed is not None and self.fixed.steps not in (usual, self.life):
            raise ValueError(
                f"fixed.steps = {self.fixed.steps}: attackers take horizon or steps, here"
                f" {self.life}; leave it out"
            )
        if self.fixed is not None and self.distribution != StrategyDistribution():
            raise ValueError("fixed and distribution: strategies are fixed or sampled; give one")
        if self.horizon is not None and self.horizon < self.steps:
            raise ValueError(f"horizon = {self.horizon} is shorter than steps = {self.steps}")
        if self.horizon is not None and self.pool < self.strategies:
            raise ValueError(f"pool = {self.pool} is smaller than strategies = {self.strategies}")
        return self


class Guard(Spec):
    """The intactness guard: checked on the original validation split every `every` rounds.

    A classifier may lose `tolerance_points` of accuracy; the squared error of a diffusion model may
    grow by `tolerance_relative` of what it was (0.1: a tenth).
    """

    tolerance_points: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 2.0
    tolerance_relative: NonNegative = 0.1
    every: Positive = 10
    ship: Literal["last", "lowest_query_score"] = "last"


class ProtectSpec(Spec):
    """Everything `protect` does beyond the model and the domains; see `docs/design`."""

    seed: Count = 0
    rounds: Positive = 100
    suppression: Literal["ice", "reversed_logits", "klu", "negated_ce", "dos", "negated_mse"] = (
        "klu"
    )
    suppression_steps: Positive = 1
    suppression_rate: Rate = 3e-4
    reinforcement_steps: Count = 1
    reinforcement_rate: Rate = 5e-4
    original_batch_size: Positive = 64
    original_augmentation: Augmentation = "none"
    clip_norm: Rate = 0.5
    head_gradient: Literal["exclude_fresh", "apply_fresh"] = "exclude_fresh"
    rehearsal: Rehearsal = Rehearsal()
    guard: Guard = Guard()
    checkpoint_every: Positive = 10
    precision: Precision = "auto"


class SampleSpec(Spec):
    """How the pictures of a diffusion model are judged; nothing of it concerns a classifier.

    `count` pictures (0: none) are drawn from each subject before and after its best attack, in
    `steps` steps of DDIM; the first `grid` are shown. `extractor` is `classifier` (trained for
    `extractor_steps` on the classes of both domains), the folder of a classifier, or a file of
    Inception's weights; `width`, if given, is the number of features it must have. `kid_subset` is
    KID's, `neighbours` those of precision and recall.
    """

    count: Count = 128
    steps: Positive = 25
    grid: Positive = 16
    extractor: Name = "classifier"
    extractor_steps: Positive = 400
    width: Positive | None = None
    kid_subset: Annotated[int, Field(ge=2)] = 50
    neighbours: Positive = 3


class AuditSpec(Spec):
    """What `audit` runs: a suite, its budget and its seeds.

    `extra` adds attacks; all take `steps` steps. `batch_size` replaces the suite's, an extra
    attack has its own. `search_trials` is how many strategies a search tries on each subject, on
    top of the suite. Without `seeds` or `search_trials` the suite's own count.
    """

    suite: str = "quick-1"
    steps: Positive = 200
    evaluations: Annotated[int, Field(ge=2)] = 12
    seeds: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] | None = None
    search_trials: Count | None = None
    batch_size: Positive | None = None
    extra: Annotated[tuple[Strategy, ...], Field(strict=False)] = ()
    precision: Precision = "auto"
    samples: SampleSpec = SampleSpec()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        return self


class ModelSpec(Spec):
    """Which network: `resnet20`, `timm:NAME`, `torchvision:NAME` or a checkpoint by sophon;
    for denoising `diffusers:PATH`, a pipeline's or a U-Net's folder, or a U-Net's configuration.

    `weights` is a file of tensors (safetensors, or a torch file that loads as tensors only);
    `head` names the classifier layer where it cannot be found; `classes` overrides the number
    of outputs the network is built with; `in_channels` is 3 for RGB and 1 for grey networks.
    `arguments` go to timm's or torchvision's constructor, such as narrower layers.
    """

    name: Name
    weights: Name | None = None
    pretrained: bool = False
    classes: Annotated[int, Field(ge=2)] | None = None
    in_channels: Annotated[int, Field(ge=1, le=4)] = 3
    head: str | None = None
    arguments: dict[str, Plain | list[Plain]] = Field(default_factory=dict)


class DomainSpec(Spec):
    """Where a domain's images come from and how they are cut and normalised.

    `source` is `npz`, `folder`, `torchvision`, `tree`, `embedded` or `prompts`; of
    `torchvision`, `tree` and `embedded` `dataset` says which set, or else `name`, which is the
    domain's. Images become `image_size` squares (shorter side resized, centre cropped) when it
    is given. `mean` and `std` are per channel on images scaled to [0, 1]. `labels = "coarse"`
    takes an archive's coarser labels instead of its own (arrays `coarse_of_fine` and
    `coarse_names`), `labels = "none"` makes all images one class, as a diffusion model allows,
    and reads a folder as it comes, flat or nested. `join` joins train and test and cuts a test
    split anew. `classes` keeps only those labels, renumbered in order; `limit` keeps the first
    so many training images of each class. `normalisation` names a known mean and std, such as
    `cifar10`, and `class_order` a known order of classes, `cifar10`, `stl10` or `imagenette`.
    """

    source: str
    name: Name | None = None
    dataset: Name | None = None
    path: Name | None = None
    root: Name | None = None
    download: bool = False
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    mean: Channels | None = None
    std: Channels | None = None
    normalisation: Name | None = None
    validation: Fraction = 0.1
    test: Fraction = 0.2
    split_seed: Count = 0
    labels: Literal["own", "coarse", "none"] = "own"
    join: bool = False
    classes: Annotated[tuple[Count, ...], Field(strict=False, min_length=2)] | None = None
    class_order: Name | None = None
    limit: Positive | None = None
    weight: Rate = 1.0


class ScheduleSpec(Spec):
    """The noise of a diffusion model that comes without a scheduler: diffusers' DDPM settings."""

    timesteps: Annotated[int, Field(ge=4)] = 1000
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

    seed: Count = 0
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


class RunSpec(Spec):
    """One run file: the model, the domains, and what `protect` and `audit` do with them.

    Only the audit uses `held_out`, restricted domains kept from protection, and `benign`, allowed
    ones that must stay possible.
    """

    model: ModelSpec
    task: TaskSpec = TaskSpec()
    original: DomainSpec
    restricted: Annotated[tuple[DomainSpec, ...], Field(strict=False, min_length=1)]
    held_out: Annotated[tuple[DomainSpec, ...], Field(strict=False)] = ()
    benign: Annotated[tuple[DomainSpec, ...], Field(strict=False)] = ()
    pretrain: PretrainSpec = PretrainSpec()
    protect: ProtectSpec = ProtectSpec()
    audit: AuditSpec = AuditSpec()


AnySpec = TypeVar("AnySpec", bound=Spec)


def parse_spec(cls: type[AnySpec], data: dict[str, Any], *, where: str) -> AnySpec:
    """Validate parsed TOML as `cls`.

    Raises SpecError naming, for the first few faults, the path in the file, the value and
    what is allowed. `where` names the file in the message.
    """
    try:
        # JSON mode keeps strictness yet takes arrays for tuples, as TOML has only arrays.
        return cls.model_validate_json(json.dumps(data))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise SpecError(f"{where}: {error}; only TOML numbers, text and tables") from None
        faults = [f for f in error.errors() if not _follows(f, error.errors())]
        lines = [_describe(cls, fault) for fault in faults[:3]]
        raise SpecError(f"{where}: " + "; ".join(lines)) from None


def _follows(fault: Any, faults: list[Any]) -> bool:
    """Return whether a list is only too short because one of its items is at fault."""
    depth = len(fault["loc"])
    inside = (len(f["loc"]) > depth and f["loc"][:depth] == fault["loc"] for f in faults)
    return fault["type"] == "too_short" and any(inside)


def _describe(cls: type[Spec], fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"]) or "(top level)"
    value = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_keys_at(cls, fault["loc"][:-1]))
        return f"unknown key {path}" + (f"; the keys here are {known}" if known else "")
    if fault["type"] == "missing":
        return f"{path} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"{path}{shown}: {message}"


def _keys_at(cls: type[Spec], loc: tuple[Any, ...]) -> list[str]:
    current: Any = cls
    for part in loc:
        fields = getattr(current, "model_fields", {})
        if isinstance(part, int) or part not in fields:
            continue
        current = _spec_in(fields[part].annotation)
    return sorted(getattr(current, "model_fields", {}))


def _spec_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_in(argument)
        if found is not None:
            return found
    return None
