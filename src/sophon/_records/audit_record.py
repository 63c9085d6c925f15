"""What happened: frozen, versioned records of trials and audits."""

from __future__ import annotations

import base64
import json
import math
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sophon._records.metrics import OF_TASKS, MetricKind
from sophon._records.packing import ones
from sophon._specs import AuditSpec, Strategy, Subject
from sophon._specs.base import Seed, Whole

SCHEMA_VERSION = 1
_PICTURE = "^(data:image/png;base64,[A-Za-z0-9+/=]*)?$"


class Record(BaseModel):
    """Base of every record: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Completed(Record):
    """The trial ran to its last step."""

    kind: Literal["completed"] = "completed"


class Diverged(Record):
    """The loss became NaN or infinite: evidence about the attack, not a success of the defence.

    `step` is the evaluation step at which it was seen.
    """

    kind: Literal["diverged"] = "diverged"
    step: Whole


class Crashed(Record):
    """An exception ended the trial; the traceback is kept."""

    kind: Literal["crashed"] = "crashed"
    error: str
    traceback: str


class Stopped(Record):
    """The trial was ended at `step` of its budget: others of its suite did better by then."""

    kind: Literal["stopped"] = "stopped"
    step: Whole


Outcome = Annotated[Completed | Diverged | Crashed | Stopped, Field(discriminator="kind")]


class Score(Record):
    """`correct` of `total` images classified correctly."""

    metric: ClassVar = "accuracy"
    correct: Whole
    total: Whole

    @model_validator(mode="after")
    def _of_images(self) -> Self:
        if not 0 <= self.correct <= self.total or not self.total:
            raise ValueError(f"{self.correct} of {self.total} images is no score")
        return self

    @property
    def value(self) -> float:
        """Fraction in [0, 1]; higher is better."""
        return self.correct / self.total

    @property
    def variance(self) -> float:
        """The variance of one image's score."""
        return self.value * (1 - self.value)


class ErrorScore(Record):
    """The mean squared error over `total` images; lower is better for whoever trains the model.

    `variance` is that of one image's error. `quarters` are the mean errors of the quarters of a
    diffusion model's timesteps, from the least noise to the most.
    """

    metric: ClassVar = "mse"
    mse: float
    variance: float
    total: Whole
    quarters: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _of_images(self) -> Self:
        if self.total < 1 or self.variance < 0:
            what = f"an error over {self.total} images of variance {self.variance:g}"
            raise ValueError(f"{what} is no score")
        return self

    @property
    def value(self) -> float:
        """1 - the error: higher is better, and 0 where nothing is predicted."""
        return 1 - self.mse


Measurement = Score | ErrorScore


class Point(Record):
    """Performance on the validation split after `step` optimizer steps (0: before the first).

    `reestimated` says that the better of two scores is the one with BatchNorm statistics measured
    anew on training images. `by_image` is the score of each validation image in their order, as
    `pack` writes it: whoever compares two models on the same images needs it.
    """

    step: Whole
    samples: Whole
    validation: Measurement
    reestimated: bool = False
    train_loss: float | None = None
    by_image: str | None = None

    @model_validator(mode="after")
    def _of_the_score(self) -> Self:
        text, score = self.by_image, self.validation
        if text is None or (isinstance(score, Score) and ones(text, score.total) == score.correct):
            return self
        try:
            held = unpack(text, score)
        except ValueError as error:
            raise ValueError(f"by_image is damaged ({error})") from None
        if len(held) != score.total or (isinstance(score, Score) and held.sum() != score.correct):
            raise ValueError(
                f"by_image is damaged: it has {len(held)} images and the sum {held.sum():g}, the"
                f" score {score.total} images and the value {score.value:g}"
            )
        return self


def pack(scores: NDArray[np.floating[Any]], score: Measurement) -> str:
    """Return the score of each image, (images,), as base64: a bit for right or wrong, the first
    image's the most significant, or a half-precision float for an error.
    """
    held = np.packbits(scores > 0.5) if isinstance(score, Score) else scores.astype("<f2")
    return base64.b64encode(held.tobytes()).decode("ascii")


def unpack(text: str, score: Measurement) -> NDArray[np.float64]:
    """Return what `pack` was given, (images,)."""
    held = base64.b64decode(text, validate=True)
    if not isinstance(score, Score):
        return np.frombuffer(held, "<f2").astype(np.float64)
    count = score.total if len(held) == math.ceil(score.total / 8) else None
    return np.unpackbits(np.frombuffer(held, np.uint8), count=count).astype(np.float64)


class Environment(Record):
    """Where it ran: versions of the libraries, processor, threads, device, precision in use.

    `accelerator` is the name of the card that is meant by `device`, if it is one.
    """

    versions: dict[str, str]
    platform: str
    processor: str
    threads: Whole
    device: str
    precision: str
    accelerator: str = ""

    @property
    def place(self) -> str:
        """The device, with its card's name: `cpu`, or such as `cuda (NVIDIA H200)`."""
        return f"{self.device} ({self.accelerator})" if self.accelerator else self.device


class Trial(Record):
    """One attack on one subject with one seed.

    `test` is measured once, after the trial, with the weights of `best_step`, which the
    validation split chose; it never selects anything. A crashed trial has neither.
    """

    key: str
    subject: Subject
    domain: str
    strategy: Strategy
    seed: Seed
    curve: tuple[Point, ...]
    best_step: Whole | None
    test: Measurement | None
    outcome: Outcome
    wall_s: float
    notes: tuple[str, ...] = ()
    environment: Environment | None = None


class EarlierCrash(Record):
    """That the trial with the key `trial` was run before and crashed; it was then run again.

    `error` is the exception's type and the first line of its message, empty where it is not known.
    """

    trial: str
    error: str = ""


class Familiarity(Record):
    """With a head fitted to half of a domain's training images, the score on the other half, which
    a model may have been `trained` on, and on `others`, its test images.
    """

    trained: Score
    others: Score


class Vitals(Record):
    """Sizes that tell a sound network from one that only looks protected; None: not finite.

    `largest_logit` is the largest absolute output on original validation images,
    `gradient_norms` the norm of the loss's gradient at step 0 on a batch of each restricted
    domain, `body_gradient_norms` that of its part before the head, `weight_sizes` the root mean
    square of every weight tensor and scale, `rescaled_sizes` the same after rescaling, as attacks
    that rescale do first, `largest_buffer` the largest absolute value in BatchNorm's statistics,
    `smallest_variance` the smallest variance, `raised` what the model raised while it was measured,
    `rounding` the relative error of outputs in the precision of the attacks (None: fp32),
    `familiarity` whether each restricted domain's training images are better known than others.
    """

    largest_logit: float | None
    gradient_norms: dict[str, float | None]
    weight_sizes: dict[str, float | None]
    largest_buffer: float | None = None
    smallest_variance: float | None = None
    raised: tuple[str, ...] = ()
    body_gradient_norms: dict[str, float | None] = {}
    rescaled_sizes: dict[str, float | None] = {}
    rounding: float | None = None
    familiarity: dict[str, Familiarity | None] = {}


class SubjectRecord(Record):
    """What an attack starts from. `original` is its score on the original domain's test split
    (absent for scratch); `blocks` counts the blocks before the head. `weights_sha256` is of all
    tensors, whatever file they came from; `file_sha256` is of the file, where it is known.
    `code` is what the protected model computes otherwise than the unprotected one (a fresh one
    where that is not given) beside its weights: layers, settings, hooks. `similarity` is the median
    over weight tensors of their cosine with the unprotected model's.
    """

    name: Subject
    weights_sha256: str
    file_sha256: str | None = None
    original: Measurement | None
    parameters: Whole
    flags: tuple[str, ...] = ()
    blocks: Whole | None = None
    vitals: Vitals | None = None
    code: tuple[str, ...] = ()
    similarity: float | None = None


class DomainRecord(Record):
    """A domain as it was used: sizes of its splits, number of classes, content fingerprint.

    `training_flops` are the floating point operations of the network on one image, forward and
    backward: times the images of a trial they are its cost. `largest` is the share of test images
    in the most frequent class: what guessing scores; None in older records and without classes.
    `read` says in a line what was read of it and how; empty in older records.
    """

    name: str
    role: Literal["original", "restricted", "held_out", "benign"]
    source: str
    sha256: str
    train: Whole
    validation: Whole
    test: Whole
    classes: Whole
    image: tuple[Whole, Whole, Whole]
    training_flops: Whole | None = None
    largest: float | None = None
    read: str = ""


class Overlap(Record):
    """How many of `count` images of a split, `domain/split`, are exactly or nearly in another."""

    first: str
    second: str
    count: Whole
    exact: Whole
    near: Whole


class SampleRecord(Record):
    """Pictures that a diffusion model drew, and how far they are from real ones.

    `domain` names the `images` test images they are compared with; `attack` is the subject's best
    attack on the restricted domain `attacked`, empty before it: the best within `budget` steps
    where that is given, one that was asked for by name where `named`. `seed` is the attack's,
    before it that of a fresh network; `best_step` is after how many of its steps they were drawn.
    `features` is how many the `extractor` gives; two extractors differ where `extractor_key` does.
    `grid` shows the first pictures, as the data URI of a PNG: a page asks for nothing elsewhere.
    """

    subject: Subject
    domain: str
    attacked: str
    attack: str = ""
    budget: Whole | None = None
    named: bool = False
    seed: Seed | None = None
    best_step: Whole | None = None
    count: Whole
    images: Whole
    steps: Whole
    extractor: str
    extractor_key: str = ""
    features: Whole
    kid: float
    kid_std: float
    fid: float
    precision: float
    recall: float
    grid: Annotated[str, Field(pattern=_PICTURE)] = ""


class AuditRecord(Record):
    """An audit: its specification, its subjects and every trial, failures included.

    `held_out` are restricted domains that protection did not use, `benign` allowed ones;
    `given_up` says what a time budget left out, `note` is what a reader must know first.
    `suite_fingerprint` is of the suite as it was, empty in older records.
    `task_name` says what the scores are of; `left_out` names attacks of the suite that the task
    has no use for, and why; `earlier_crashes` lists the crashed runs of trials that were run again.
    """

    schema_version: Literal[1] = 1
    spec: AuditSpec
    spec_fingerprint: str
    strategies: tuple[Strategy, ...]
    model: str
    task: Literal["classification", "denoising"]
    task_name: str = "classification"
    original: DomainRecord
    restricted: tuple[DomainRecord, ...]
    held_out: tuple[DomainRecord, ...] = ()
    benign: tuple[DomainRecord, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    left_out: tuple[str, ...] = ()
    subjects: tuple[SubjectRecord, ...]
    trials: tuple[Trial, ...]
    earlier_crashes: tuple[EarlierCrash, ...] = ()
    environment: Environment
    created: str
    command: str
    suite_fingerprint: str = ""
    given_up: tuple[str, ...] = ()
    note: str = ""
    protection: dict[str, object] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "protected" not in {subject.name for subject in self.subjects}:
            raise ValueError("it has no protected subject")
        domains = (*self.restricted, *self.held_out, *self.benign)
        unknown = {trial.domain for trial in self.trials} - {domain.name for domain in domains}
        if unknown:
            raise ValueError(f"it has trials on {min(unknown)}, a domain that it does not describe")
        for domain in (self.original, *domains):
            if self.kind.classifies and domain.classes < 1:
                raise ValueError(f"the domain {domain.name} has {domain.classes} classes")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """The attack seeds."""
        return self.spec.seeds or (0,)

    @property
    def kind(self) -> MetricKind:
        """The kind of its scores: what its task means to whoever judges or shows it."""
        return OF_TASKS[self.task]


def record_schema() -> str:
    """Return the JSON Schema (draft 2020-12) of an audit record as it is written, as text."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    named = {"title": f"Sophon audit record, version {SCHEMA_VERSION}"}
    return json.dumps(dialect | AuditRecord.model_json_schema() | named, indent=1) + "\n"
