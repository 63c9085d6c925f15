"""Look inside a model without changing it: images, modes, what it can take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sophon._base.errors import DataError, UnsupportedModelError, first_line
from sophon._base.seeding import generator, seeded
from sophon._models.denoisers import is_denoiser, probe_prediction
from sophon._models.transformers import logits

Shape = tuple[int, int, int]
Names = tuple[str | int, ...]
# Images have one to four channels.
_MOST_CHANNELS = 4

PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` back into its train or eval mode after a block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# What transformers' configurations call problems that no softmax solves.
_OTHER_PROBLEMS = {"multi_label_classification", "regression"}


@contextmanager
def probing(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a block with `model` in eval (or train) mode, without gradients; then put all back.

    Restored are its modes, its buffers and torch's global generators.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with keeping_modes(model), torch.no_grad(), seeded(0, "probe"):
            model.train(training)
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def probe_images(model: nn.Module, image_shape: Shape, count: int = 2) -> Tensor:
    """Return `count` Gaussian images of the device and type of the model's weights."""
    images = torch.randn((count, *image_shape), generator=generator(0, "probe images"))
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device=like.device, dtype=like.dtype)


def check_images(model: nn.Module, image_shape: Shape, *, what: str, training: bool = True) -> None:
    """Raise unless `model` maps images of that shape to (batch, classes) in eval mode.

    With `training` it must do so in train mode too.

    DataError names the channels or the size it cannot take; UnsupportedModelError an output
    that is no classifier's. `what` names the domain in the message.
    """
    kinds = {getattr(getattr(one, "config", None), "problem_type", None) for one in model.modules()}
    for kind in kinds & _OTHER_PROBLEMS:
        raise UnsupportedModelError(
            f"the model's config has problem_type = {kind!r}: multi-label models and regression are"
            " not supported, give a model that chooses one class"
        )
    images = probe_images(model, image_shape).float()
    for mode in (False, True) if training else (False,):
        output = run_probe(model, image_shape, what=what, training=mode, images=images)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape in ((2,), (2, 1)):
            raise UnsupportedModelError(
                f"the model's output for two images is {shape}, one logit each (a sigmoid's): give"
                " its head two outputs, the first with weight and bias 0, the second with its own,"
                " which is the same classifier"
            )
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
            raise UnsupportedModelError(
                f"the model's output for two images is {shape}; a classifier returns "
                "(2, classes): wrap it so that forward returns the logits alone, or build it"
                " without auxiliary heads (aux_logits=False), or with"
                " AutoModelForImageClassification"
            )


def run(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of any model on plain images: logits, a denoiser's at timestep 1."""
    denoiser = is_denoiser(model)
    outputs: Tensor = probe_prediction(model, images) if denoiser else logits(model(images))
    return outputs


def run_probe(
    model: nn.Module, image_shape: Shape, *, what: str, training: bool, images: Tensor | None = None
) -> Tensor:
    """Return the model's outputs on a probe, in eval or train mode, leaving it as it was.

    Raises DataError or UnsupportedModelError if it cannot take the images.
    """
    try:
        with probing(model, training=training):
            return run(
                model, probe_images(model, image_shape).float() if images is None else images
            )
    except PROBE_ERRORS as error:
        raise cannot_take(model, image_shape, what, error) from None


def check_single_image(model: nn.Module, image_shape: Shape, what: str) -> None:
    """Raise UnsupportedModelError unless `model` can be trained on a batch of one image.

    BatchNorm cannot where a single value is left of a channel. `what` names the batch size.
    """
    try:
        with probing(model, training=True):
            run(model, probe_images(model, image_shape, 1))
    except PROBE_ERRORS as error:
        raise UnsupportedModelError(
            f"{what} = 1: the model cannot be trained on one image at a time"
            f" ({first_line(error)}): use at least 2"
        ) from None


def expected_channels(model: nn.Module) -> int | None:
    """Return the channels that the model's first convolution takes, or None without one.

    Of several in the order they were declared, it is the first that takes as many as images have.
    """
    taken = [part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)]
    return next((count for count in taken if count <= _MOST_CHANNELS), taken[0] if taken else None)


def cannot_take(
    model: nn.Module, image_shape: Shape, what: str, error: Exception
) -> DataError | UnsupportedModelError:
    """Return the error that names the channels or the size that the model cannot take."""
    channels, height, width = image_shape
    held = [(n, p.dtype) for n, p in model.named_parameters() if p.is_floating_point()]
    other = next((one for one in held if one[1] != torch.float32), None)
    if other is not None:
        return UnsupportedModelError(
            f"the model's {other[0]} is {str(other[1]).removeprefix('torch.')} and images are"
            f" float32, which it cannot take ({first_line(error)}): convert it, model.float()"
        )
    expected = expected_channels(model)
    if expected is not None and expected != channels:
        return DataError(
            f"{what} has images of {channels} channels and the model takes {expected}: set "
            f"model.in_channels = {channels}, or convert the images"
        )
    line = first_line(error, default="no reason given")
    made = made_for(model, (0, 0))
    hint = f" (it was made for {made[0]}x{made[1]})" if made[0] else ""
    return DataError(
        f"{what} has {height}x{width} images, which the model cannot take{hint}: {line}; set "
        "image_size of the domain to a size it takes"
    )


def made_for(model: nn.Module, default: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) that a timm model says it was made for, or `default`."""
    settings = getattr(model, "pretrained_cfg", None)
    size = settings.get("input_size") if isinstance(settings, dict) else None
    return (size[1], size[2]) if size else default
