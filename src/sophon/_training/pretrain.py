"""Pre-training: the model of an original task, from scratch or from given weights.

`Pretraining(...)` is an iterator of `Stage`s over the one fine-tuning loop; `pretrain(...)` runs
it to the end. With a folder the run can be killed at any moment and repeated: it goes on to
bit-identical weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sophon._base.errors import CheckpointError, NonFiniteError
from sophon._base.files import write_json, write_text
from sophon._base.plain_mode import plain
from sophon._data import Domain, check_batch_fits
from sophon._models import check_sample_size, network_identity, weights_sha256
from sophon._records.audit_record import Measurement
from sophon._records.round import Stage
from sophon._specs import ModelSpec, PretrainSpec, Strategy
from sophon._tasks import Classification, Denoising, Task
from sophon._training.checkpoints import open_run, save_state
from sophon._training.evaluate import evaluate
from sophon._training.loop import ENGINE_VERSION, FineTuning, optimizer_tensors, restore_optimizer
from sophon._training.setting import make_setting
from sophon._training.shipping import ship

_STAGES, _STATES, _DONE = "stages.jsonl", "states", "pretraining.json"
Tensors = tuple[Tensor, ...] | list[Tensor]
_EMA_OF_DIFFUSION = 0.999
# What a state holds in sizes of the model: itself, its average, two moments; two states and a half.
_STATE_SIZES = 3 * 4


@dataclass(frozen=True)
class Pretrained:
    """What pre-training returns: the model, its stages, its score on the validation split."""

    model: nn.Module
    stages: tuple[Stage, ...]
    score: Measurement
    folder: Path | None


class Pretraining:
    """A pre-training run: iterate it for its stages, then ask it for its `result()`.

    The recipe is AdamW with warm-up and a cosine over all steps, clipping and flips; diffusion
    models ship the exponential moving average of their weights. The model passed in is never
    changed. Raises DataError, UnsupportedModelError or CheckpointError before any work; while it
    runs, NonFiniteError.
    """

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
        self.spec = spec = PretrainSpec() if spec is None else spec
        self.setting = make_setting(
            model,
            task=task or Classification(),
            original=original,
            restricted=None,
            head=None if model_spec is None else model_spec.head,
            precision=spec.precision,
            device=device,
        )
        check_batch_fits(original, spec.batch_size, "pretrain.batch_size")
        if isinstance(self.setting.task, Denoising):
            check_sample_size(model, self.setting.shape(original), f"domain {original.name!r}")
        self.out = None if out is None else Path(out)
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
        self.tuning = FineTuning(placed, _strategy(spec), self.setting, feed, stream=stream)
        self.average = self._averaged(placed)
        self.stages: list[Stage] = []
        self._open()

    def __len__(self) -> int:
        """Return the number of stages of the whole run."""
        return math.ceil(self.spec.steps / self.spec.every)

    @property
    def done(self) -> int:
        """Stages finished so far."""
        return len(self.stages)

    @property
    def model(self) -> nn.Module:
        """The model that would be shipped now: the average of the weights, if one is kept."""
        return self.tuning.model if self.average is None else self.average.module

    def __iter__(self) -> Iterator[Stage]:
        """Run the remaining stages, yielding each once it is recorded."""
        while self.done < len(self):
            self.stages.append(self._stage())
            self.save()
            yield self.stages[-1]

    def result(self) -> Pretrained:
        """Return the trained model after the last stage, written to the folder if there is one."""
        if self.done < len(self):
            raise CheckpointError(
                f"stage {self.done} of {len(self)}: iterate to the end before result()"
            )
        model = copy.deepcopy(self._given)
        model.load_state_dict(self.model.state_dict())
        model.eval()
        score = self.stages[-1].validation
        if self.out is not None:
            about = {
                "spec": self.spec.model_dump(mode="json"),
                "identity": self.identity,
                "original": self.setting.original.name,
                "input": self.setting.input(),
                "validation": score.model_dump(),
                "wall_s": sum(stage.wall_s for stage in self.stages),
            }
            ship(self.out, model, self.model_spec, {"pretraining": about}, self.setting.task)
            write_json(self.out / _DONE, about)
        return Pretrained(model, tuple(self.stages), score, self.out)

    def save(self) -> None:
        """Write the state to resume from. Without a folder this does nothing."""
        if self.out is None:
            return
        moments, values = optimizer_tensors(self.tuning.optimizer)
        groups = {"model": self.tuning.model.state_dict(), "optimizer": moments}
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        tensors = {f"{g}|{n}": value for g, held in groups.items() for n, value in held.items()}
        meta = {
            "stages": [stage.model_dump(mode="json") for stage in self.stages],
            "taken": self.tuning.taken,
            "optimizer": values,
        }
        save_state(self.out / _STATES, self.done, tensors, meta)
        lines = [stage.model_dump_json() + "\n" for stage in self.stages]
        write_text(self.out / _STAGES, "".join(lines))

    @property
    def identity(self) -> dict[str, str]:
        """What a run must share with the one whose folder it takes up."""
        return {
            "spec": self.spec.fingerprint(),
            "model": self._digest,
            "engine": str(ENGINE_VERSION),
            "network": self._network,
            "domains": self.setting.original.fingerprint(),
            "task": self.setting.task.name,
            "precision": self.setting.precision,
            "plain": str(plain()),
        }

    def _stage(self) -> Stage:
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
            decay = _EMA_OF_DIFFUSION if self.setting.task.metric == "mse" else 0.0
        if decay == 0:
            return None

        def average(held: Tensors, new: Tensors, count: Tensor | int) -> None:
            # Early on a shorter memory: the first weights are worth nothing.
            number = int(count)
            torch._foreach_lerp_(held, new, 1 - min(decay, (1 + number) / (10 + number)))

        return AveragedModel(model, multi_avg_fn=torch.no_grad()(average))

    def _open(self) -> None:
        """Start afresh or take up the newest state of the folder."""
        self._digest, self._network = weights_sha256(self._given), network_identity(self._given)
        if self.out is None:
            return
        size = sum(p.numel() * p.element_size() for p in self._given.parameters())
        state = open_run(
            self.out,
            self.identity,
            self.spec.model_dump(mode="json"),
            prefix="pretrain",
            states=self.out / _STATES,
            needed_bytes=_STATE_SIZES * size,
            owner=self,
        )
        if state is not None:
            self._restore(*state)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        def group(name: str) -> dict[str, Tensor]:
            mark = name + "|"
            return {k.removeprefix(mark): v for k, v in tensors.items() if k.startswith(mark)}

        self.tuning.model.load_state_dict(group("model"))
        if self.average is not None:
            self.average.load_state_dict(group("average"))
        self.tuning.taken = meta["taken"]
        restore_optimizer(self.tuning.optimizer, group("optimizer"), meta["optimizer"])
        self.stages = [Stage.model_validate(held) for held in meta["stages"]]


def _strategy(spec: PretrainSpec) -> Strategy:
    return Strategy(
        optimizer="adamw",
        schedule="warmup_cosine",
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=spec.warmup_steps,
        clip_norm=spec.clip_norm,
        batch_size=spec.batch_size,
        steps=spec.steps,
        augmentation=spec.augmentation,
        precision=spec.precision,
    )


def pretrain(
    model: nn.Module,
    *,
    original: Domain,
    task: Task | None = None,
    spec: PretrainSpec | None = None,
    out: str | Path | None = None,
    model_spec: ModelSpec | None = None,
    device: str | torch.device | None = None,
) -> Pretrained:
    """Return the trained model; see `Pretraining` for the arguments and errors."""
    run = Pretraining(
        model,
        original=original,
        task=task,
        spec=spec,
        out=out,
        model_spec=model_spec,
        device=device,
    )
    for _ in run:
        pass
    return run.result()
