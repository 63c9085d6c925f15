"""Blocks, layers with their normalisations, and how a model runs best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophon._base.errors import UnsupportedModelError
from sophon._base.plain_mode import plain
from sophon._models.denoisers import is_denoiser
from sophon._models.heads import heads
from sophon._models.probing import Shape, probe_images, probing, run

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def blocks(model: nn.Module, head: str) -> list[tuple[str, ...]]:
    """Return the model's blocks in order, each a tuple of module names, without the head.

    Sequential and ModuleList are opened, and so is whatever holds the head; a normalisation
    layer joins the block before it; modules without parameters are left out.
    """
    found: list[tuple[str, ...]] = []
    for name, module in _opened(model, "", heads(model, head)):
        if not any(True for _ in module.parameters()):
            continue
        if isinstance(module, _NORMS) and found:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
    return found


def _opened(
    module: nn.Module, prefix: str, ends: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module]]:
    children = _in_order(list(module.named_children()))
    weighty = [key for key, child in children if any(True for _ in child.parameters())]
    for key, child in children:
        name = f"{prefix}{key}"
        if name in ends:
            continue
        # A lone wrapper around the whole network is opened too.
        alone = len([other for other in weighty if f"{prefix}{other}" not in ends]) == 1
        alone = alone or getattr(module, "base_model", None) is child
        wrapper = alone and not prefix and any(True for _ in child.children())
        if _is_container(child) or wrapper or any(end.startswith(f"{name}.") for end in ends):
            yield from _opened(child, f"{name}.", ends)
        else:
            yield name, child


def _is_container(part: nn.Module) -> bool:
    """Return whether a module runs what it holds in order: an encoder of transformers does with
    one list, but takes from several in turn.
    """
    lists, kind = (nn.Sequential, nn.ModuleList), type(part)
    if kind.__module__.startswith("transformers.") and kind.__name__.endswith("Encoder"):
        return sum(isinstance(child, lists) for child in part.children()) == 1
    return isinstance(part, lists)


def _in_order(children: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return children in the order they run: diffusers' U-Nets declare the middle last."""
    names = [name for name, _ in children]
    if "mid_block" in names and "up_blocks" in names:
        children = list(children)
        middle = children.pop(names.index("mid_block"))
        children.insert([name for name, _ in children].index("up_blocks"), middle)
    return children


def normalised_pairs(model: nn.Module, image_shape: Shape) -> list[tuple[str, str]]:
    """Return (layer, normalisation) names where the normalisation directly follows the layer.

    Layers are convolutions and Linear, normalisations BatchNorm, GroupNorm, LayerNorm and
    kin. Found on a probe: the normalisation's input is the layer's output, or a view of it,
    each ran once, and no other module read that tensor. What a functional call reads is not
    seen: whoever uses a pair must check that the function is preserved.
    """
    recorder = _Recorder(model)
    # A block that takes the tensor may add it to what its normalisation makes of it.
    parts = [module for module in model.modules() if not isinstance(module, nn.Sequential)]
    handles = [module.register_forward_pre_hook(recorder.before) for module in parts]
    handles += [module.register_forward_hook(recorder.after) for module in parts]
    _watch(model, image_shape, handles)
    return _single_pairs(model, recorder.made, recorder.read)


def layers_in_order(model: nn.Module, image_shape: Shape) -> list[str]:
    """Return the convolutions and Linear layers that run once each, in the order they run."""
    runs: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: runs.append(name)

    handles = [
        part.register_forward_hook(note(name))
        for name, part in model.named_modules()
        if isinstance(part, (*_CONVS, nn.Linear))
    ]
    _watch(model, image_shape, handles)
    return [name for name in runs if runs.count(name) == 1]


def _watch(model: nn.Module, image_shape: Shape, handles: list[RemovableHandle]) -> None:
    """Run `model` on a probe once, then take its hooks off again."""
    try:
        with probing(model):
            run(model, probe_images(model, image_shape))
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Which layers made each storage, and which modules read it, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.made: dict[int, list[str]] = {}
        self.read: dict[int, list[str]] = {}
        # Tensors are kept so that no storage is used twice.
        self.kept: list[Tensor] = []

    def before(self, module: nn.Module, args: tuple[object, ...]) -> None:
        for value in args:
            if isinstance(value, Tensor):
                self.kept.append(value)
                self.read.setdefault(_storage(value), []).append(self.names[module])

    def after(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(module, (*_CONVS, nn.Linear)) and isinstance(output, Tensor):
            self.kept.append(output)
            self.made.setdefault(_storage(output), []).append(self.names[module])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _single_pairs(
    model: nn.Module, made: dict[int, list[str]], read: dict[int, list[str]]
) -> list[tuple[str, str]]:
    runs = [name for group in made.values() for name in group]
    reads = [name for group in read.values() for name in group]
    pairs = []
    for storage, makers in made.items():
        readers = [
            name
            for name in read.get(storage, [])
            if not isinstance(model.get_submodule(name), nn.Identity)
        ]
        if len(makers) != 1 or len(readers) != 1:
            continue
        layer, norm = makers[0], readers[0]
        if not isinstance(model.get_submodule(norm), _NORMS):
            continue
        if runs.count(layer) == 1 and reads.count(norm) == 1:
            pairs.append((layer, norm))
    return pairs


def choose_channels_last(model: nn.Module) -> bool:
    """Return whether the model's convolutions run faster with channels last: it has Conv2d.

    Not diffusers' U-Nets: their group normalisations eat up the gain (`docs/design/generation.md`).
    """
    return (
        not plain()
        and not is_denoiser(model)
        and any(isinstance(module, nn.Conv2d) for module in model.modules())
    )


def choose_precision(
    requested: str, device: torch.device, model: nn.Module, shapes: Iterable[Shape]
) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 where the processor or the card computes in it.

    Where a strided convolution of `model` meets images smaller than its stride, for images of
    `shapes`, a processor's bf16 gradients are wrong: `auto` is then fp32, and bf16 is refused with
    an UnsupportedModelError that names the layer.
    """
    if device.type == "cpu" and requested != "fp32":
        outrun = next((name for shape in shapes for name in _outrun(model, shape)), None)
        if outrun is not None and requested == "bf16":
            raise UnsupportedModelError(
                f"precision = 'bf16': the images reach layer {outrun!r} smaller than its stride,"
                " where a processor's bf16 gradients are wrong: set precision = 'fp32' or a larger"
                " image_size"
            )
        if outrun is not None:
            return "fp32"
    if requested != "auto":
        return requested
    if plain():
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    supported = any(getattr(torch.cpu, check, bool)() for check in checks)
    return "bf16" if supported else "fp32"


def _outrun(model: nn.Module, shape: Shape) -> list[str]:
    """Return the convolutions whose input is smaller than their stride.

    With oneDNN (torch 2.13), part of the weight's bf16 gradient is then memory never written.
    """
    found: list[str] = []
    handles = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1:

            def look(layer: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                pairs = zip(inputs[0].shape[-2:], layer.stride, strict=True)
                if any(size < stride for size, stride in pairs):
                    found.append(name)

            handles.append(part.register_forward_pre_hook(look))
    _watch(model, shape, handles)
    return found
