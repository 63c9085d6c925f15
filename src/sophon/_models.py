"""Build networks, load their weights, find and replace their heads, and look inside them.

Image shapes are (channels, height, width). Nothing here changes a model unless its name says
so: probing leaves weights, buffers, modes and the random generators as they were.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sophon._compatibility import prepare_torchvision
from sophon._errors import CheckpointError, DataError, UnsupportedModelError
from sophon._networks import NETWORKS
from sophon._seeding import generator, seeded
from sophon._specs import ModelSpec, parse_spec

Shape = tuple[int, int, int]
Names = tuple[str | int, ...]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


# --- Building ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blueprint:
    """How to make a network again: `build(classes)` has random weights; None: its own classes."""

    name: str
    build: Callable[[int | None], nn.Module]


def resolve_model(
    spec: ModelSpec, *, base: Path, default_classes: int | None = None
) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Return the network with its weights loaded, and a factory for a freshly initialised one.

    Both have the same number of classes: `spec.classes`, or what the weights hold (published
    ones too), or `default_classes`, or the network's own. Relative paths start at `base`.

    Raises UnsupportedModelError for a network that cannot be built or has non-finite weights
    and CheckpointError for weights that cannot be read or do not fit.
    """
    network = architecture(spec, base=base)
    plan = blueprint(network)
    file = _weights_file(spec, base)
    classes = spec.classes or network.classes or default_classes
    if spec.pretrained:
        classes = spec.classes
        model = _pretrained(spec)
    elif file is None:
        model = plan.build(classes)
    else:
        tensors = read_tensors(file)
        classes = spec.classes or _classes_in(tensors, plan, classes)
        model = plan.build(classes)
        load_weights(model, tensors, source=str(file))
    require_finite(model, what=spec.name)
    return model.eval(), lambda: plan.build(classes).eval()


def architecture(spec: ModelSpec, *, base: Path) -> ModelSpec:
    """Return the spec of the underlying network: a checkpoint's is read from its `model.json`.

    Raises UnsupportedModelError for unknown names and CheckpointError for a damaged checkpoint.
    """
    for _ in range(4):
        folder = _checkpoint_folder(spec.name, base)
        if folder is None:
            return spec
        if spec.weights is not None or spec.pretrained:
            raise UnsupportedModelError(
                f"model.name = {spec.name!r} is a checkpoint and brings its own weights: "
                "remove model.weights and model.pretrained"
            )
        described = _read_description(folder / "model.json")
        head = spec.head if spec.head is not None else described.head
        unloaded = {"weights": None, "pretrained": False, "head": head}
        spec, base = described.model_copy(update=unloaded), folder
    raise CheckpointError(f"{spec.name}: checkpoints refer to one another without end")


def blueprint(spec: ModelSpec) -> Blueprint:
    """Return how to build the network that `spec.name` names, without weights.

    Raises UnsupportedModelError for an unknown name, with near matches.
    """
    kind, _, name = spec.name.partition(":")
    if kind == "timm" and name:
        return Blueprint(spec.name, lambda classes: _build_timm(name, classes, spec.in_channels))
    if kind == "torchvision" and name:
        if spec.in_channels != 3:
            raise UnsupportedModelError(
                f"model.in_channels = {spec.in_channels}: torchvision's networks take 3; "
                "use 3 (grey images are repeated) or a timm network"
            )
        return Blueprint(spec.name, lambda classes: _build_torchvision(name, classes))
    if spec.name in NETWORKS:
        network = NETWORKS[spec.name]
        return Blueprint(spec.name, lambda classes: network(classes or 10, spec.in_channels))
    raise UnsupportedModelError(_unknown(spec.name, list(NETWORKS)))


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else ""
    forms = f"use {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME or a path to a checkpoint"
    return f"model.name = {name!r} is not known: {hint or forms}"


def _library(name: str) -> Any:
    prepare_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{name} cannot be imported ({error}): pip install 'sophon-protect[vision]'"
        ) from None


def _build_timm(name: str, classes: int | None, in_channels: int) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        near = [f"timm:{found}" for found in timm.list_models()]
        raise UnsupportedModelError(_unknown(f"timm:{name}", near))
    arguments: dict[str, Any] = {"in_chans": in_channels}
    if classes is not None:
        arguments["num_classes"] = classes
    return _create_timm(name, **arguments)


def _create_timm(name: str, **arguments: Any) -> nn.Module:
    timm = _library("timm")
    try:
        # Vision transformers then take any image size, with unchanged keys.
        model: nn.Module = timm.create_model(name, dynamic_img_size=True, **arguments)
    except TypeError:
        model = timm.create_model(name, **arguments)
    return model


def _build_torchvision(name: str, classes: int | None) -> nn.Module:
    models = _library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        near = [f"torchvision:{found}" for found in known]
        raise UnsupportedModelError(_unknown(f"torchvision:{name}", near))
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = models.get_model(name, weights=None, **arguments)
    return model


def _pretrained(spec: ModelSpec) -> nn.Module:
    """Return the network with its publisher's weights; another class count gets a fresh head."""
    kind, _, name = spec.name.partition(":")
    loaders = {"timm": _pretrained_timm, "torchvision": _pretrained_torchvision}
    if kind not in loaders:
        raise UnsupportedModelError(
            f"model.pretrained = true: {spec.name} has no published weights; set model.weights"
        )
    blueprint(spec).build(None)
    try:
        model = loaders[kind](name, spec.in_channels)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
        raise UnsupportedModelError(
            f"the published weights of {spec.name} are not at hand ({reason}): download them once "
            "with a connection, or give the file as model.weights"
        ) from None
    if spec.classes is not None:
        shape = (spec.in_channels, *_made_for(model, (224, 224)))
        head = find_head(model, shape, spec.head)
        if head_classes(model, head) != spec.classes:
            replace_head(model, head, spec.classes, seed=0, names=("pretrained",))
    return model


def _pretrained_timm(name: str, in_channels: int) -> nn.Module:
    return _create_timm(name, pretrained=True, in_chans=in_channels)


def _pretrained_torchvision(name: str, in_channels: int) -> nn.Module:
    models = _library("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    if offline and not cached.is_file():
        raise FileNotFoundError(f"offline, and {cached.name} is not in torch's cache")
    # Its images have three channels: `blueprint` refused anything else.
    model: nn.Module = models.get_model(name, weights=weights)
    return model


def _made_for(model: nn.Module, default: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) that a timm model says it was made for, or `default`."""
    settings = getattr(model, "pretrained_cfg", None)
    size = settings.get("input_size") if isinstance(settings, dict) else None
    return (size[1], size[2]) if size else default


# --- Weights ----------------------------------------------------------------------------------


def _checkpoint_folder(name: str, base: Path) -> Path | None:
    """Return the folder of a sophon checkpoint when `name` is a path to one, else None."""
    path = base / name
    if name.endswith(".safetensors"):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        return path.parent
    if name not in NETWORKS and ":" not in name and path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(f"{path} holds no model.safetensors; name a checkpoint's folder")
        return path
    return None


def _weights_file(spec: ModelSpec, base: Path) -> Path | None:
    if spec.weights is not None:
        if spec.pretrained:
            raise UnsupportedModelError(
                f"model.pretrained = true and model.weights = {spec.weights!r}: keep one of them"
            )
        return base / spec.weights
    if _checkpoint_folder(spec.name, base) is None:
        return None
    path = base / spec.name
    return path / "model.safetensors" if path.is_dir() else path


def _read_description(path: Path) -> ModelSpec:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: for weights not written by sophon set model.name to the network "
            "and model.weights to the file"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise CheckpointError(f"{path} has no 'model' table: it was not written by sophon")
    return parse_spec(ModelSpec, description["model"], where=str(path))


def _classes_in(tensors: dict[str, Tensor], plan: Blueprint, classes: int | None) -> int | None:
    """Return the class count that makes the network fit, when only its outputs differ."""
    found = {key.removeprefix("module."): value for key, value in tensors.items()}
    expected = plan.build(classes).state_dict()
    counts = set()
    for key, value in expected.items():
        if key not in found or found[key].shape == value.shape:
            continue
        if found[key].shape[1:] != value.shape[1:] or found[key].dim() != value.dim():
            return classes
        counts.add(found[key].shape[0])
    return counts.pop() if len(counts) == 1 else classes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a torch file that holds tensors only.

    A torch file may nest them under `state_dict` or `model`. Raises CheckpointError for a
    missing, damaged or foreign file; a pickle with anything else in it is refused unread.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: set the path of the weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is a pickle with more than tensors in it, which could run "
            "code. Where you trust it, load it yourself and keep the state_dict with "
            "safetensors.torch.save_file"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else "ends early"
        raise CheckpointError(f"{path} is damaged or not a file of tensors ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    foreign = [] if isinstance(content, dict) else [type(content).__name__]
    if isinstance(content, dict):
        foreign = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if foreign or not content:
        raise CheckpointError(
            f"{path} is not a file of named tensors ({', '.join(foreign[:3]) or 'empty'}): "
            "save model.state_dict()"
        )
    return {str(key): value for key, value in content.items()}


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Load `tensors` into `model`; a `module.` prefix is dropped.

    BatchNorm's `num_batches_tracked` may be missing. Raises CheckpointError naming the keys
    that differ; the model is then unchanged.
    """
    found = {key.removeprefix("module."): value for key, value in tensors.items()}
    expected = model.state_dict()
    required = [key for key in expected if not key.endswith("num_batches_tracked")]
    faults = {
        "missing": [key for key in required if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in found and found[key].shape != value.shape
        ],
    }
    if any(faults.values()):
        lines = [
            f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for fault, keys in faults.items()
            if keys
        ]
        raise CheckpointError(
            f"{source} is of another architecture than {type(model).__name__}: keys "
            + "; ".join(lines)
        )
    model.load_state_dict(expected | found)


def require_finite(model: nn.Module, *, what: str) -> None:
    """Raise UnsupportedModelError naming the first weights or buffers that are NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsupportedModelError(
                f"{what}: {name} holds NaN or infinite values; the weights are damaged"
            )


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of every parameter and buffer: names, types, shapes and bytes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


# --- Probing ----------------------------------------------------------------------------------


@contextmanager
def probing(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a block with `model` in eval (or train) mode and without gradients, then restore
    its modes, its buffers and torch's global generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), seeded(0, "probe"):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def probe_images(model: nn.Module, image_shape: Shape, count: int = 2) -> Tensor:
    """Return `count` Gaussian images of the device and type of the model's weights."""
    images = torch.randn((count, *image_shape), generator=generator(0, "probe images"))
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device=like.device, dtype=like.dtype)


def check_images(model: nn.Module, image_shape: Shape, *, what: str) -> None:
    """Raise unless `model` maps images of that shape to (batch, classes), in both modes.

    DataError names the channels or the size it cannot take; UnsupportedModelError an output
    that is no classifier's. `what` names the domain in the message.
    """
    images = probe_images(model, image_shape)
    for training in (False, True):
        try:
            with probing(model, training=training):
                output = model(images)
        except _PROBE_ERRORS as error:
            raise _cannot_take(model, image_shape, what, str(error)) from None
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if (
            not isinstance(output, Tensor)
            or output.dim() != 2
            or len(output) != 2
            or (output.shape[1] < 2)
        ):
            raise UnsupportedModelError(
                f"the model's output for two images is {shape}; a classifier returns "
                "(2, classes): wrap it so that forward returns the logits alone"
            )


def expected_channels(model: nn.Module) -> int | None:
    """Return the channels that the model's first convolution takes, or None without one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def _cannot_take(
    model: nn.Module, image_shape: Shape, what: str, reason: str
) -> DataError | UnsupportedModelError:
    channels, height, width = image_shape
    expected = expected_channels(model)
    if expected is not None and expected != channels:
        return DataError(
            f"{what} has images of {channels} channels and the model takes {expected}: set "
            f"model.in_channels = {channels}, or convert the images"
        )
    line = reason.strip().splitlines()[0][:160] if reason.strip() else "no reason given"
    made = _made_for(model, (0, 0))
    made_for = f" (it was made for {made[0]}x{made[1]})" if made[0] else ""
    return DataError(
        f"{what} has {height}x{width} images, which the model cannot take{made_for}: {line}; set "
        "image_size of the domain to a size it takes"
    )


# --- The head ---------------------------------------------------------------------------------


def find_head(model: nn.Module, image_shape: Shape, name: str | None = None) -> str:
    """Return the dotted name of the classifier layer, a Linear or a 1x1 Conv2d.

    A given `name` is only checked. Otherwise timm's `get_classifier` is asked, then the layer
    is looked for whose output on a probe is the model's output. Raises UnsupportedModelError
    listing the candidates when there is none or more than one.
    """
    if name is not None:
        return _named_head(model, name)
    layers = {key: module for key, module in model.named_modules() if _is_head_layer(module)}
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):
        given = classifier()
        for key, module in layers.items():
            if module is given:
                return key
    found = _layers_giving_the_output(model, layers, image_shape)
    if len(found) != 1:
        problem = f"is ambiguous ({', '.join(found)})" if found else "was not found"
        raise UnsupportedModelError(
            f"the classifier head {problem}: set model.head to one of {_listed(layers)}"
        )
    return found[0]


def _is_head_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _listed(layers: dict[str, nn.Module]) -> str:
    names = [key for key, module in layers.items() if isinstance(module, nn.Linear)]
    names = names or list(layers)
    return ", ".join(names[-6:]) if names else "(the model has no Linear layer)"


def _named_head(model: nn.Module, name: str) -> str:
    modules = dict(model.named_modules())
    layers = {key: module for key, module in modules.items() if _is_head_layer(module)}
    if name in layers:
        return name
    problem = (
        f"is a {type(modules[name]).__name__}, not a Linear or a 1x1 Conv2d"
        if name in modules
        else "is not a layer of the model"
    )
    near = difflib.get_close_matches(name, layers, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UnsupportedModelError(
        f"model.head = {name!r} {problem}{hint}: choose one of {_listed(layers)}"
    )


def _layers_giving_the_output(
    model: nn.Module, layers: dict[str, nn.Module], image_shape: Shape
) -> list[str]:
    outputs: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[key] = output.clone()

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in layers.items()]
    try:
        with probing(model):
            result = model(probe_images(model, image_shape))
    except _PROBE_ERRORS as error:
        raise _cannot_take(model, image_shape, "the probe", str(error)) from None
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        return []
    return [key for key, output in outputs.items() if _same_logits(output, result)]


def _same_logits(output: Tensor, result: Tensor) -> bool:
    if output.dim() == 4:
        output = output.mean(dim=(2, 3))
    flat = result.flatten(1)
    return output.shape == flat.shape and torch.allclose(output, flat, rtol=1e-4, atol=1e-6)


def _head_layer(model: nn.Module, head: str) -> nn.Linear | nn.Conv2d:
    layer = model.get_submodule(_named_head(model, head))
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


def head_classes(model: nn.Module, head: str) -> int:
    """Return the number of outputs of the layer that `head` names."""
    layer = _head_layer(model, head)
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def replace_head(
    model: nn.Module, head: str, classes: int, *, seed: int, names: Names = ()
) -> None:
    """Put a freshly initialised layer with `classes` outputs in the head's place.

    It is of the same kind and drawn on the stream `(seed, *names)`. Raises
    UnsupportedModelError for a head whose weight is computed from other parameters.
    """
    old = _head_layer(model, head)
    if "weight" not in old._parameters:
        raise UnsupportedModelError(
            f"model.head = {head!r}: its weight is computed (weight norm or another "
            "parametrisation); remove the parametrisation first"
        )
    new = copy.deepcopy(old)
    new.weight = nn.Parameter(old.weight.detach().new_empty(classes, *old.weight.shape[1:]))
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().new_empty(classes))
    if isinstance(new, nn.Linear):
        new.out_features = classes
    else:
        new.out_channels = classes
    with seeded(seed, *names):
        new.reset_parameters()
    path = head.split(".")
    for depth in range(len(path)):
        parent = model.get_submodule(".".join(path[:depth]))
        if isinstance(getattr(parent, "num_classes", None), int):
            parent.num_classes = classes  # type: ignore[assignment]
    setattr(model.get_submodule(".".join(path[:-1])), path[-1], new)


# --- Fresh weights ----------------------------------------------------------------------------


@torch.no_grad()
def reinitialise(module: nn.Module, *, seed: int, names: Names) -> None:
    """Reset every parameter by its layer's own `reset_parameters`, on the stream `(seed, *names)`.

    Raises UnsupportedModelError naming parameters that no reset reaches; the module is then
    unchanged.
    """
    before = [(tensor, tensor.clone()) for tensor in [*module.parameters(), *module.buffers()]]
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    with seeded(seed, *names):
        for part in reversed(list(module.modules())):
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
    missed = [name for name, p in module.named_parameters() if bool(torch.isnan(p).any())]
    if missed:
        for tensor, value in before:
            tensor.copy_(value)
        raise UnsupportedModelError(
            f"no reset_parameters reaches {', '.join(missed[:4])}"
            f"{', ...' if len(missed) > 4 else ''} of {type(module).__name__}: give the layer "
            "that owns it a reset_parameters method, or pass a factory of fresh models"
        )


def fresh_copy(
    model: nn.Module,
    factory: Callable[[], nn.Module] | None,
    *,
    seed: int,
    names: Names,
) -> nn.Module:
    """Return a freshly initialised model with the keys and shapes of `model`, in eval mode.

    `factory` runs on the stream `(seed, *names)`; without one a copy is reset layer by layer.
    A head whose class count differs is replaced. Raises UnsupportedModelError for a factory
    that builds another architecture.
    """
    if factory is None:
        fresh = copy.deepcopy(model)
        reinitialise(fresh, seed=seed, names=names)
        return fresh.eval()
    with seeded(seed, *names):
        fresh = factory()
    wanted, built = model.state_dict(), fresh.state_dict()
    if wanted.keys() != built.keys():
        differing = sorted(wanted.keys() ^ built.keys())[:4]
        raise UnsupportedModelError(
            f"the factory of fresh models builds another architecture: {', '.join(differing)}"
        )
    differing = [key for key, value in wanted.items() if value.shape != built[key].shape]
    for head in sorted({key.rpartition(".")[0] for key in differing}):
        classes = head_classes(model, head)
        replace_head(fresh, head, classes, seed=seed, names=(*names, "head"))
    like = next(model.parameters())
    return fresh.to(device=like.device, dtype=like.dtype).eval()


# --- Structure --------------------------------------------------------------------------------


def blocks(model: nn.Module, head: str) -> list[tuple[str, ...]]:
    """Return the model's blocks in order, each a tuple of module names, without the head.

    Sequential and ModuleList are opened, and so is whatever holds the head; a normalisation
    layer joins the block before it; modules without parameters are left out.
    """
    found: list[tuple[str, ...]] = []
    for name, module in _opened(model, "", head):
        if not any(True for _ in module.parameters()):
            continue
        if isinstance(module, _NORMS) and found:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
    return found


def _opened(module: nn.Module, prefix: str, head: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    weighty = [key for key, child in children if any(True for _ in child.parameters())]
    for key, child in children:
        name = f"{prefix}{key}"
        if name == head:
            continue
        # A lone wrapper around the whole network is opened too.
        alone = len([other for other in weighty if f"{prefix}{other}" != head]) == 1
        wrapper = alone and not prefix and any(True for _ in child.children())
        container = isinstance(child, nn.Sequential | nn.ModuleList)
        if container or wrapper or head.startswith(f"{name}."):
            yield from _opened(child, f"{name}.", head)
        else:
            yield name, child


def normalised_pairs(model: nn.Module, image_shape: Shape) -> list[tuple[str, str]]:
    """Return (layer, normalisation) names where the normalisation directly follows the layer.

    Layers are convolutions and Linear, normalisations BatchNorm, GroupNorm, LayerNorm and
    kin. Found on a probe: the normalisation's input is the layer's output, or a view of it,
    each ran once, and no other module read that tensor. What a functional call reads is not
    seen: whoever uses a pair must check that the function is preserved.
    """
    made: dict[int, list[str]] = {}
    read: dict[int, list[str]] = {}
    kept: list[Tensor] = []
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        for value in args:
            if isinstance(value, Tensor):
                kept.append(value)
                read.setdefault(_storage(value), []).append(names[module])

    def after(module: nn.Module, args: object, output: object) -> None:
        if isinstance(module, (*_CONVS, nn.Linear)) and isinstance(output, Tensor):
            kept.append(output)
            made.setdefault(_storage(output), []).append(names[module])

    handles = []
    for module in model.modules():
        # A block that takes the tensor may add it to what its normalisation makes of it.
        if not isinstance(module, nn.Sequential):
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        with probing(model):
            model(probe_images(model, image_shape))
    finally:
        for handle in handles:
            handle.remove()
    return _single_pairs(model, made, read)


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


# --- How to run it ----------------------------------------------------------------------------


def choose_channels_last(model: nn.Module) -> bool:
    """Return whether the model's convolutions run faster with channels last: it has Conv2d."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def choose_precision(requested: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 where the processor or the card computes in it."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    supported = any(getattr(torch.cpu, check, bool)() for check in checks)
    return "bf16" if supported else "fp32"
