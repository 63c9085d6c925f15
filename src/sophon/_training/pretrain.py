"""Pre-training: the model of an original task, from scratch or from given weights.

`Pretraining(...)` is an iterator of `Stage`s over the one fine-tuning loop; `pretrain(...)` runs
it to the end. With a folder the run can be killed at any moment and repeated: it goes on to
bit-identical weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sophon._base.errors import NonFiniteError, require_kind
from sophon._base.signatures import signed_as
from sophon._data import Domain, check_batch_fits
from sophon._records.audit_record import Measurement
from sophon._records.round import Stage
from sophon._specs import ModelSpec, PretrainSpec, Strategy
from sophon._tasks import Classification, Task
from sophon._training.evaluate import evaluate
from sophon._training.loop import ENGINE_VERSION, FineTuning, optimizer_tensors, restore_optimizer
from sophon._training.ranks import Ranks
from sophon._training.resumable import Groups, ResumableRun, run_identity
from sophon._training.setting import make_setting

Tensors = tuple[Tensor, ...] | list[Tensor]
# What a state holds in sizes of the model: itself, its average, two moments; two states and a half.
_STATE_SIZES = 3 * 4


@dataclass(frozen=True)
class Pretrained:
    """What pre-training returns: the model, its stages, its score on the validation split."""

    model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...] = field(repr=False)
    score: Measurement
    folder: Path | None


class Pretraining(ResumableRun[Stage]):
    """A pre-training run: iterate it for its stages, then ask it for its `result()`.

    The recipe is AdamW with warm-up and a cosine over all steps, clipping and flips; diffusion
    models ship the exponential moving average of their weights. The model passed in is never
    changed. Raises DataError, UnsupportedModelError or CheckpointError before any work; while it
    runs, NonFiniteError.
    """

    part, table, record = "stage", "pretrain", Stage
    spec: PretrainSpec

    def __init__(
        self,
        model: nn.Module,
        *,
        original: Domain,
        task: Task | None = None,
        spec: PretrainSpec | None = None,
        out: str | Path | None = None,
        model_spec: ModelSpec | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec = PretrainSpec() if spec is None else spec
        require_kind(spec, PretrainSpec, "spec", "a PretrainSpec")
        self.setting = make_setting(
            model,
            task=task or Classification(),
            original=original,
            head=None if model_spec is None else model_spec.head,
            precision=spec.precision,
            device=device,
        )
        check_batch_fits(original, spec.batch_size, "pretrain.batch_size")
        self.setting.task.check_shipped(model, original, self.setting.shape(original))
        self.out, self.ranks = None if out is None else Path(out), Ranks()
        self.model_spec = model_spec
        self._given = model
        stream = (spec.seed, ("pretrain",))
        feed = self.setting.feed(
            original,
            original.train,
            batch_size=spec.batch_size,
            stream=(spec.seed, ("pretrain", "batches")),
            augmentation=spec.augmentation,
        )
        placed = self.setting.place(copy.deepcopy(model))
        training = spec.model_dump(exclude={"seed", "ema_decay", "every"})
        strategy = Strategy(optimizer="adamw", schedule="warmup_cosine", **training)
        self.tuning = FineTuning(placed, strategy, self.setting, feed, stream=stream)
        self.average = self._averaged(placed)
        self.identity = run_identity(spec, model, self.setting, engine=ENGINE_VERSION)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.open(_STATE_SIZES * size)

    def __len__(self) -> int:
        """Return the number of stages of the whole run."""
        return math.ceil(self.spec.steps / self.spec.every)

    @property
    def stages(self) -> list[Stage]:
        """The records of the stages finished so far."""
        return self.records

    @property
    def model(self) -> nn.Module:
        """The model that would be shipped now: the average of the weights, if one is kept."""
        return self.tuning.model if self.average is None else self.average.module

    def result(self) -> Pretrained:
        """Return the trained model after the last stage, written to the folder if there is one."""
        self.require_done()
        model = copy.deepcopy(self._given)
        model.load_state_dict(self.model.state_dict())
        model.eval()
        score = self.stages[-1].validation
        about = {
            "spec": self.spec.model_dump(mode="json"),
            "identity": self.identity,
            "original": self.setting.original.name,
            "input": self.setting.input(),
            "classes": self.setting.class_names(),
            "validation": score.model_dump(),
            "wall_s": sum(stage.wall_s for stage in self.stages),
        }
        self.ship(model, "pretraining", about)
        return Pretrained(model, tuple(self.stages), score, self.out)

    def state(self) -> tuple[Groups, dict[str, Any]]:
        """Return the model, its average, the optimizer's moments, and the steps taken."""
        moments, values = optimizer_tensors(self.tuning.optimizer)
        groups = {"model": self.tuning.model.state_dict(), "optimizer": moments}
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        return groups, {"taken": self.tuning.taken, "optimizer": values}

    def restore(self, group: Callable[[str], dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.tuning.model.load_state_dict(group("model"))
        if self.average is not None:
            self.average.load_state_dict(group("average"))
        self.tuning.taken = values["taken"]
        restore_optimizer(self.tuning.optimizer, group("optimizer"), values["optimizer"])

    def next_record(self) -> Stage:
        """Train for a stage and score what would be shipped then."""
        start = time.perf_counter()
        count = min(self.spec.every, self.spec.steps - self.tuning.taken)
        total = torch.zeros((), device=self.setting.device)
        for step in self.tuning.run(count):
            total += step.loss
            if self.average is not None:
                self.average.update_parameters(self.tuning.model)
        loss = float(total) / count
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {self.tuning.taken}: the loss is not finite: lower"
                " pretrain.learning_rate; states written before are kept"
            )
        original = self.setting.original
        return Stage(
            step=self.tuning.taken,
            loss=loss,
            validation=evaluate(self.model, self.setting, original, original.validation),
            wall_s=time.perf_counter() - start,
        )

    def _averaged(self, model: nn.Module) -> AveragedModel | None:
        decay = self.spec.ema_decay
        if decay is None:
            decay = self.setting.task.ema_decay
        if decay == 0:
            return None

        def average(held: Tensors, new: Tensors, count: Tensor | int) -> None:
            # Early on a shorter memory: the first weights are worth nothing.
            number = int(count)
            torch._foreach_lerp_(held, new, 1 - min(decay, (1 + number) / (10 + number)))

        return AveragedModel(model, multi_avg_fn=torch.no_grad()(average))


@signed_as(Pretraining)
def pretrain(*model: Any, **arguments: Any) -> Pretrained:
    """Return the trained model; see `Pretraining` for the arguments and errors."""
    run = Pretraining(*model, **arguments)
    for _ in run:
        pass
    return run.result()


def forecast(
    model: nn.Module, *, spec: PretrainSpec | None = None, **arguments: Any
) -> tuple[float, float]:
    """Return the seconds of a step and of the whole of pre-training, from four steps and a check of
    the validation split; nothing is kept. Arguments and errors are those of `Pretraining`.
    """
    whole = Pretraining(model, spec=spec, **arguments)
    few = whole.spec.model_copy(update={"steps": 4, "every": 2})
    run = Pretraining(model, spec=few, **arguments)
    start = time.perf_counter()
    evaluate(run.model, run.setting, run.setting.original, run.setting.original.validation)
    check_s = time.perf_counter() - start
    # The first stage pays for what is only set up once.
    step_s = max(0.0, ([stage.wall_s for stage in run][-1] - check_s) / few.every)
    return step_s, whole.spec.steps * step_s + len(whole) * check_s
