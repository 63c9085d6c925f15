"""Denoising: what a diffusion model is trained on and scored by."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._base.seeding import generator
from sophon._data import Domain
from sophon._models import (
    DIFFUSERS,
    Shape,
    check_denoiser,
    check_sample_size,
    class_embeddings,
    diffusers,
    expected_channels,
    is_conditional,
    is_denoiser,
    keeping_modes,
    predict,
    run_probe,
    write_pipeline,
)
from sophon._specs import ModelSpec
from sophon._tasks.latents import Latents
from sophon._tasks.task import Normalisation, Task

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# An image's error counts at most so much: outputs that are not finite have no other.
LARGEST_ERROR = 1e4
_QUARTERS = 4
_DRAWN_AT_ONCE = 64


class Mixed(NamedTuple):
    """Noisy images and what is to be predicted of them, (batch, channels, height, width), the
    timesteps (batch,), and what the network is told beside: labels, or tokens.
    """

    images: Tensor
    targets: Tensor
    timesteps: Tensor
    condition: Tensor


class Denoising(Task):
    """Noise prediction of a diffusion model (arXiv 2006.11239), scored by its squared error.

    An image x0 is mixed with noise e at timestep t, x = sqrt(a_t) x0 + sqrt(1 - a_t) e with a_t
    the scheduler's `alphas_cumprod`; the network predicts e (`epsilon`), sqrt(a_t) e -
    sqrt(1 - a_t) x0 (`v_prediction`, arXiv 2202.00512) or x0 (`sample`). Timesteps are uniform
    over the whole schedule, or all `timestep`: 1 is what the released research code does.

    The score of an image is 1 - its squared error per element: of noise it is the share that is
    explained, 0 where nothing is predicted. An evaluation takes every image once in each quarter
    of the schedule, with noise and timesteps that depend on the image's place only.

    `scheduler` is any of diffusers' that has `alphas_cumprod`; without one, 1000 timesteps with
    betas linear from 1e-4 to 0.02. `latents` is the frozen part of a latent pipeline.
    """

    metric = "mse"
    normalisation: Normalisation = ((0.5,), (0.5,))
    ema_decay = 0.999

    def __init__(
        self,
        scheduler: Any | None = None,
        *,
        prediction: str | None = None,
        timestep: int | None = None,
        latents: Latents | None = None,
    ) -> None:
        if scheduler is None:
            scheduler = diffusers().DDPMScheduler(prediction_type=prediction or "epsilon")
        self.alphas: Tensor = _alphas(scheduler)
        self.scheduler = scheduler
        self.prediction = _prediction(scheduler, prediction)
        self.latents = latents
        self.timesteps = (0, len(self.alphas))
        if timestep is not None:
            if not 0 <= timestep < len(self.alphas):
                raise SpecError(
                    f"task.timestep = {timestep}: the schedule has 0 to {len(self.alphas) - 1}"
                )
            self.timesteps = (timestep, timestep + 1)

    @property
    def name(self) -> str:
        """What determines a result: prediction, timesteps, and the schedule's checksum."""
        low, high = self.timesteps
        total = len(self.alphas)
        single = f"timestep {low} alone" if high == low + 1 else f"timesteps {low} to {high - 1}"
        digest = hashlib.sha256(self.alphas.numpy().tobytes()).hexdigest()[:8]
        frozen = "" if self.latents is None else f", latents {self.latents.sha256[:8]}"
        return (
            f"denoising, {self.prediction} prediction, {single} of {total} (schedule {digest})"
            f"{frozen}"
        )

    @property
    def parts(self) -> Sequence[Denoising]:
        """The quarters of the timesteps, each a task of its own; one if there is one timestep."""
        low, high = self.timesteps
        if high - low < _QUARTERS:
            return (self,)
        bounds = [low + (high - low) * part // _QUARTERS for part in range(_QUARTERS + 1)]
        return [self.within(start, end) for start, end in pairwise(bounds)]

    def within(self, low: int, high: int) -> Denoising:
        """Return the task at timesteps from `low` up to `high`, which is left out."""
        part = copy.copy(self)
        part.timesteps = (low, high)
        return part

    @property
    def draws(self) -> bool:
        """One timestep alone makes no picture."""
        return len(self.parts) > 1

    def sampler(self, steps: int) -> Any:
        """Return diffusers' DDIM (arXiv 2010.02502) on the task's own schedule, set to `steps`.

        Raises SpecError where the schedule does not have so many.
        """
        held = dict(self.scheduler.config)
        total = len(self.alphas)

        def bounded(name: str) -> bool:
            # DDIM would clip where the source says nothing of it; latents have no bounds at all.
            return bool(held.get(name, False)) and self.latents is None

        sampler = diffusers().DDIMScheduler.from_config(
            held,
            # Its own list of schedules is short: it is given what the task is trained on, whole.
            num_train_timesteps=total,
            beta_schedule="linear",
            trained_betas=None,
            rescale_betas_zero_snr=False,
            clip_sample=bounded("clip_sample"),
            thresholding=bounded("thresholding"),
        )
        sampler.alphas_cumprod = self.alphas
        if not sampler.config.set_alpha_to_one:
            sampler.final_alpha_cumprod = self.alphas[0]
        if steps <= total:
            sampler.set_timesteps(steps)
        if steps > total or int(sampler.timesteps.max()) >= total:
            raise SpecError(
                f"audit.samples.steps = {steps}: the schedule has timesteps 0 to {total - 1}, too"
                " few for so many steps: lower audit.samples.steps"
            )
        return sampler

    @torch.no_grad()
    def draw(self, model: nn.Module, shape: Shape, labels: Tensor, *, steps: int) -> Tensor:
        """Return uint8 images (n, c, h, w), one for each label, drawn by DDIM (arXiv 2010.02502).

        `shape` is an image's. Every model starts from the same noise: that of an image depends on
        its place only, and DDIM adds none. Raises SpecError for more steps than the schedule has.
        """
        device = next(model.parameters()).device
        scheduler = self.sampler(steps)
        stream = generator(0, "samples")
        drawn = []
        with keeping_modes(model):
            model.eval()
            for part in labels.split(_DRAWN_AT_ONCE):
                noise = [torch.randn(self.shape(shape), generator=stream) for _ in part]
                images, classes = torch.stack(noise).to(device), part.to(device)
                condition = classes if self.latents is None else self.latents.embedded(classes)
                for timestep in scheduler.timesteps:
                    times = timestep.to(device).expand(len(images))
                    predicted = predict(model, images, times, condition)
                    images = scheduler.step(predicted, timestep, images).prev_sample
                images = images if self.latents is None else self.latents.decoded(images)
                # What a broken network draws may not be a number: black then.
                scaled = (images.float() / 2 + 0.5).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
                drawn.append((scaled * 255).round().byte().cpu())
        return torch.cat(drawn)

    def outputs(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction and its target, both of the images' shape, in float32 or wider.

        Timestep and noise are drawn image by image, so they do not depend on the batch size.
        """
        mixed = self.mixed(images, labels, generator)
        predicted = predict(model, mixed.images, mixed.timesteps, mixed.condition)
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return predicted.to(wide), mixed.targets.to(wide)

    def mixed(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Mixed:
        """Return images mixed with noise, of which timesteps and noise are drawn one by one."""
        clean, condition = images, labels
        if self.latents is not None:
            clean, condition = self.latents.encoded(images), self.latents.embedded(labels)
        timesteps, noise = self._drawn(clean, generator)
        alphas = self.alphas[timesteps].to(clean).view(-1, 1, 1, 1)
        signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - spread * clean,
            "sample": lambda: clean,
        }
        noisy = signal * clean + spread * noise
        return Mixed(noisy, targets[self.prediction](), timesteps.to(clean.device), condition)

    def _drawn(self, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        timesteps, noise = [], []
        for _ in range(len(like)):
            timesteps.append(torch.randint(*self.timesteps, (1,), generator=generator))
            noise.append(torch.randn(like.shape[1:], generator=generator))
        if not timesteps:
            return torch.zeros(0, dtype=torch.long), torch.empty_like(like)
        return torch.cat(timesteps), torch.stack(noise).to(like)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error per element of each image."""
        return (outputs - targets).square().flatten(1).mean(1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 - the squared error of each image; an error counts at most 1e4."""
        error = self.loss(outputs, targets).nan_to_num(nan=LARGEST_ERROR, posinf=LARGEST_ERROR)
        return 1 - error.clamp(max=LARGEST_ERROR)

    def classes(self, domain: Domain) -> int | None:
        """Return None: the last layer's size does not depend on the domain."""
        return None

    def channels(self, model: nn.Module) -> int | None:
        """Return the channels of the images: the network's, or the autoencoder's."""
        return expected_channels(model) if self.latents is None else self.latents.channels

    def shape(self, image_shape: Shape) -> Shape:
        """Return the shape of what the network meets: the image's, or its latent's."""
        return image_shape if self.latents is None else self.latents.shape(image_shape)

    def check(self, model: nn.Module, domain: Domain, shape: Shape, *, trained: bool) -> None:
        """Raise DataError or UnsupportedModelError unless the model can denoise the domain."""
        what = f"domain {domain.name!r}"
        if not is_denoiser(model):
            raise UnsupportedModelError(
                f"task.name = 'denoising': the model is a {type(model).__name__}; give one of"
                " diffusers' U-Nets as model.name = 'diffusers:PATH'"
            )
        if domain.mean is not None and {*domain.mean, *(domain.std or ())} != {0.5}:
            raise DataError(
                f"{what}: mean = {list(domain.mean)} and std = {list(domain.std or ())}, but"
                " diffusion models take images from -1 to 1: leave both out"
            )
        if is_conditional(model) != (self.latents is not None):
            raise UnsupportedModelError(
                "the U-Net takes prompts' embeddings, and the task knows of no text encoder: name"
                " its pipeline's folder as model.name"
                if self.latents is None
                else "the pipeline's U-Net takes no prompts: name the U-Net's own folder"
            )
        met = self.shape(shape)
        check_denoiser(model, met, what)
        if self.latents is not None:
            self.latents.check(domain, shape)
        known = class_embeddings(model)
        if known is not None and domain.class_count > known:
            raise DataError(
                f"{what} has {domain.class_count} classes and the U-Net has embeddings for"
                f' {known}: choose fewer with classes, or set labels = "none"'
            )
        for training in (False, True) if trained else (False,):
            run_probe(model, met, what=what, training=training)

    def check_shipped(self, model: nn.Module, domain: Domain, shape: Shape) -> None:
        """Raise DataError unless the U-Net's configuration says that its images have `shape`."""
        check_sample_size(model, shape, f"domain {domain.name!r}")

    def require_alike(self, scheduler: Any, folder: Path) -> None:
        """Raise SpecError if a model in `folder` with that scheduler predicts something else."""
        held = scheduler.config.get("prediction_type", "epsilon")
        if held != self.prediction:
            raise SpecError(
                f"{folder} predicts {held!r} and the model of the run {self.prediction!r}:"
                " compare models that predict the same"
            )

    def described(self, spec: ModelSpec | None, model: nn.Module) -> ModelSpec | None:
        """Return the folder's own U-Net: the folder is a pipeline."""
        return ModelSpec(name=f"{DIFFUSERS}unet")

    def complete(self, folder: Path, model: nn.Module) -> None:
        """Make the folder a pipeline of diffusers as well."""
        source = None if self.latents is None else self.latents.source
        write_pipeline(folder, model, self.scheduler, source)


def _alphas(scheduler: Any) -> Tensor:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        raise SpecError(
            f"the scheduler {type(scheduler).__name__} has no alphas_cumprod: use one of the DDPM"
            " family (flow matching is not supported)"
        )
    return alphas.detach().to("cpu", torch.float32).contiguous()


def _prediction(scheduler: Any, wanted: str | None) -> str:
    """Return what the network predicts. Raises SpecError where scheduler and wish differ."""
    held = str(scheduler.config.get("prediction_type", "epsilon"))
    if wanted is not None and wanted != held:
        raise SpecError(
            f"task.prediction = {wanted!r}, and the scheduler says {held!r}, which is what its"
            " model was trained for: leave task.prediction out, or correct the scheduler"
        )
    if held not in PREDICTIONS:
        raise SpecError(f"prediction type {held!r}: known are {', '.join(PREDICTIONS)}")
    return held
