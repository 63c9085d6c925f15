"""Diffusers' U-Nets: recognise them, run them, build them, read and write their folders.

They stay plain diffusers models: same keys, same class. diffusers is imported only when one is
built or loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.errors import (
    CheckpointError,
    DataError,
    UnsupportedModelError,
    first_line,
    shortened,
)
from sophon._base.files import temporary_beside, write_text
from sophon._base.torchvision_patch import installing, library

# What the last layer is called in both; it is the head that attackers start anew.
HEAD = "conv_out"
PLAIN, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
_INDEX, _CONFIG = "model_index.json", "config.json"
# What EMAModel writes into the configuration beside the network's own settings.
_OF_EMA = {
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup"),
    *("inv_gamma", "power"),
}
# Tokens of the empty condition that a probe gives.
_PROBE_TOKENS = 4


def _is(model: nn.Module, name: str) -> bool:
    bases = type(model).__mro__
    return any(b.__name__ == name and b.__module__.startswith("diffusers.") for b in bases)


def is_denoiser(model: nn.Module) -> bool:
    """Return whether `model` is one of diffusers' U-Nets: UNet2DModel or UNet2DConditionModel."""
    return _is(model, PLAIN) or is_conditional(model)


def is_conditional(model: nn.Module) -> bool:
    """Return whether `model` takes token embeddings, as in Stable Diffusion."""
    return _is(model, CONDITIONAL)


def class_embeddings(model: nn.Module) -> int | None:
    """Return how many classes a class-conditional U-Net knows; None for an unconditional one."""
    if getattr(model, "class_embedding", None) is None:
        return None
    count = getattr(model, "config", {}).get("num_class_embeds")
    return None if count is None else int(count)


def predict(
    model: nn.Module, images: Tensor, timesteps: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Return what a denoiser says of noisy `images` (batch, c, h, w) at `timesteps` (batch,).

    `condition` holds class numbers (batch,), which an unconditional U-Net is not given, or token
    embeddings (batch, tokens, width) for a conditional one.
    """
    if is_conditional(model):
        held = model(images, timesteps, encoder_hidden_states=condition, return_dict=False)
    else:
        known = getattr(model, "class_embedding", None) is not None
        held = model(
            images, timesteps, class_labels=condition if known else None, return_dict=False
        )
    predicted: Tensor = held[0]
    return predicted


def probe_prediction(model: nn.Module, images: Tensor) -> Tensor:
    """Return a denoiser's output on plain images, at timestep 1, of class 0 or no tokens."""
    count = len(images)
    condition = torch.zeros(count, dtype=torch.long, device=images.device)
    if is_conditional(model):
        width = _settings(model)["cross_attention_dim"]
        width = width if isinstance(width, int) else width[0]
        condition = images.new_zeros(count, _PROBE_TOKENS, width)
    timesteps = torch.ones(count, dtype=torch.long, device=images.device)
    return predict(model, images, timesteps, condition)


def halvings(model: nn.Module) -> int:
    """Return how often the U-Net halves its images."""
    downs: Any = model.get_submodule("down_blocks")
    return sum(getattr(block, "downsamplers", None) is not None for block in downs)


def check_denoiser(model: nn.Module, shape: tuple[int, int, int], what: str) -> None:
    """Raise unless the U-Net can take images of `shape` (channels, height, width).

    DataError names a size that cannot be halved often enough, UnsupportedModelError an output
    that is no prediction of its input. `what` names the domain.
    """
    channels, height, width = shape
    settings = _settings(model)
    if settings["in_channels"] != settings["out_channels"]:
        raise UnsupportedModelError(
            f"the U-Net takes {settings['in_channels']} channels and returns"
            f" {settings['out_channels']}: networks that predict a variance too, or take more"
            " than the noisy image, are not supported"
        )
    if channels != settings["in_channels"]:
        raise DataError(
            f"{what} has images of {channels} channels and the U-Net takes"
            f" {settings['in_channels']}: use a network made for {channels}, or convert the images"
        )
    unit = 2 ** halvings(model)
    if height % unit or width % unit:
        raise DataError(
            f"{what} has {height}x{width} images, which the U-Net cannot halve"
            f" {halvings(model)} times: set image_size to a multiple of {unit}"
        )


def check_sample_size(model: nn.Module, shape: tuple[int, int, int], what: str) -> None:
    """Raise DataError unless a pipeline of the U-Net would draw images of `shape` (c, h, w).

    Its configuration says how large they are, whatever it was trained on.
    """
    size = _settings(model).get("sample_size")
    if size is None:
        return
    height, width = (size, size) if isinstance(size, int) else size
    if (height, width) != shape[1:]:
        raise DataError(
            f"{what} has {shape[1]}x{shape[2]} images, and the U-Net's configuration says"
            f" sample_size = {size}: its pipeline would draw those; set image_size, or sample_size"
            " there"
        )


def _settings(model: nn.Module) -> Any:
    return getattr(model, "config", {})


# --- Building and loading --------------------------------------------------------------------


def diffusers() -> Any:
    """Return the library. Raises UnsupportedModelError where it is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    needed = installing("diffusion")
    held = library("diffusers", "diffusers cannot be imported", needed)
    # Loading is shown by whoever runs a command, and a page of bars hides that.
    held.utils.logging.disable_progress_bar()
    return held


class DenoiserSource:
    """Where a U-Net comes from: a configuration, its folder, or a pipeline's folder.

    Of a pipeline the weights of `unet_ema` are taken where there are any. Raises CheckpointError
    for a path that is none of these, or lacks a part.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pipeline = path if (path / _INDEX).is_file() else None
        self.unet: Path | None = None
        if self.pipeline is not None:
            require_parts(self.pipeline)
            averaged = path / "unet_ema"
            self.unet = averaged if (averaged / _CONFIG).is_file() else path / "unet"
        elif path.is_dir():
            self.unet = path
        file = path if self.unet is None else self.unet / _CONFIG
        if self.pipeline is not None and not file.is_file():
            raise CheckpointError(f"{path} lacks unet/{_CONFIG}: download it again")
        if not file.is_file():
            raise CheckpointError(
                f"model.name: {path} is no pipeline's folder ({_INDEX}), no U-Net's folder"
                f" ({_CONFIG}) and no configuration file: correct the path"
            )
        self.config = _read(file)
        self.class_name = str(self.config.get("_class_name", PLAIN))
        if self.class_name not in (PLAIN, CONDITIONAL):
            raise UnsupportedModelError(
                f"model.name: {file} describes a {self.class_name}: use a {PLAIN} or the"
                f" {CONDITIONAL} of a Stable Diffusion pipeline"
            )

    @property
    def conditional(self) -> bool:
        """Whether the U-Net takes prompts' embeddings."""
        return self.class_name == CONDITIONAL

    def build(self) -> nn.Module:
        """Return the network with random weights, from torch's global generator."""
        kind = getattr(diffusers(), self.class_name)
        try:
            model, unused = kind.from_config(dict(self.config), return_unused_kwargs=True)
        except _UNUSABLE as error:
            raise UnsupportedModelError(
                f"model.name: the configuration in {self.path} cannot be built"
                f" ({first_line(error)}): restore it"
            ) from None
        wrong = [name for name in unused if not name.startswith("_") and name not in _OF_EMA]
        if wrong:
            raise UnsupportedModelError(
                f"model.name: {self.path} has settings that {self.class_name} does not know:"
                f" {', '.join(wrong)}: remove them, or update diffusers"
            )
        return model  # type: ignore[no-any-return]

    def load(self) -> nn.Module:
        """Return the network with the folder's weights; a configuration alone gives random ones.

        Raises CheckpointError for weights that are missing, damaged or of another shape.
        """
        if self.unet is None:
            return self.build()
        kind = getattr(diffusers(), self.class_name)
        try:
            model: nn.Module = kind.from_pretrained(
                self.unet, local_files_only=True, low_cpu_mem_usage=False
            )
        except _UNUSABLE as error:
            raise CheckpointError(
                f"{self.unet} holds no usable weights ({first_line(error, 200)}): download"
                " diffusion_pytorch_model.safetensors again"
            ) from None
        # Of another type only where that is needed: diffusers warns of it.
        return model if next(model.parameters()).dtype == torch.float32 else model.float()

    def scheduler(self) -> Any | None:
        """Return the pipeline's scheduler; None for what is no pipeline."""
        if self.pipeline is None:
            return None
        name = _read(self.pipeline / _INDEX)["scheduler"][1]
        folder = self.pipeline / "scheduler"
        count = _read(folder / "scheduler_config.json").get("num_train_timesteps", 1000)
        if not isinstance(count, int) or not 4 <= count <= _MOST_TIMESTEPS:
            raise CheckpointError(
                f"{folder}: num_train_timesteps = {shortened(repr(count))}: use a whole number from"
                f" 4 to {_MOST_TIMESTEPS}"
            )
        try:
            held = getattr(diffusers(), name).from_pretrained(folder, local_files_only=True)
            alphas = torch.as_tensor(held.alphas_cumprod)
            fit = bool((torch.isfinite(alphas) & (alphas >= 0) & (alphas <= 1)).all())
        except _UNUSABLE as error:
            raise CheckpointError(
                f"{folder} cannot be used ({first_line(error)}): restore its configuration"
            ) from None
        if not fit:
            raise CheckpointError(f"{folder}: betas outside 0 to 1: restore its configuration")
        return held


# What a configuration with wrong values makes diffusers raise.
_UNUSABLE = (
    *(OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(ImportError, AssertionError),
)
_MOST_TIMESTEPS = 1_000_000
# Any other class of diffusers would be made and run for its name alone.
_SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"),
    *("DDPMParallelScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"),
    *("DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
)
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def _require_meant(folder: Path, named: dict[str, Any]) -> None:
    """Raise CheckpointError for an index that names other code or other folders than a pipeline of
    diffusers has.
    """
    for name, held in named.items():
        if name.startswith("_") and name != "_class_name":
            continue
        if not isinstance(held, list) or held == [None, None]:
            continue
        known = len(held) == 2 and held[0] in _LIBRARIES and str(held[1]).isidentifier()
        if not (known and name.isidentifier()):
            raise CheckpointError(
                f"{folder / _INDEX}: {shortened(name)} = {shortened(held)} is no part of a pipeline"
                f" of diffusers or transformers: give a folder that diffusers wrote"
            )
    scheduler = named.get("scheduler")
    if isinstance(scheduler, list) and scheduler[1] not in (*_SCHEDULERS, None):
        raise UnsupportedModelError(
            f"{folder}: the scheduler {shortened(scheduler[1])} is none of those with the noise of"
            f" DDPM: use one such as {', '.join(_SCHEDULERS[:3])}"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}): restore it") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{file} is no table of settings: restore it")
    return held


def require_parts(folder: Path) -> None:
    """Raise CheckpointError naming the parts of a pipeline's folder that are missing."""
    named = _read(folder / _INDEX)
    _require_meant(folder, named)
    wanted = [n for n, held in named.items() if isinstance(held, list) and held[0] is not None]
    for part in ("unet", "scheduler"):
        if part not in wanted:
            raise CheckpointError(f"{folder} is a pipeline without {part}: give one that has it")
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, which its {_INDEX} names: download it again"
        )


# --- Writing ---------------------------------------------------------------------------------


def write_pipeline(
    folder: Path, model: nn.Module, scheduler: Any, source: Path | None = None
) -> None:
    """Make `folder`, which holds the weights as model.safetensors, a pipeline of diffusers too.

    `DDPMPipeline.from_pretrained` loads it without sophon. Of a larger pipeline, `source`, all
    other parts are copied. The weights are the same file where the system has hard links.
    """
    unet = folder / "unet"
    unet.mkdir(exist_ok=True)
    settings = {"_class_name": type(model).__name__, "_diffusers_version": diffusers().__version__}
    settings |= {k: v for k, v in _settings(model).items() if not k.startswith("_")}
    write_text(unet / _CONFIG, json.dumps(settings, indent=2, sort_keys=True, default=list) + "\n")
    _same_file(folder / "model.safetensors", unet / "diffusion_pytorch_model.safetensors")
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "_diffusers_version": "0"}
    if source is not None:
        index = _read(source / _INDEX)
        for name, held in index.items():
            if isinstance(held, list) and held[0] is not None and name not in ("unet", "scheduler"):
                shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["unet"] = ["diffusers", type(model).__name__]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_diffusers_version"] = diffusers().__version__
    write_text(folder / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _same_file(file: Path, link: Path) -> None:
    temporary = temporary_beside(link)
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
    temporary.replace(link)
