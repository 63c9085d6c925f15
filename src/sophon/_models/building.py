"""Networks by name, with their weights."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from sophon._base.errors import CheckpointError, UnsupportedModelError
from sophon._base.files import read_json
from sophon._base.seeding import seeded
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._models.denoisers import DenoiserSource
from sophon._models.gradient_checkpointing import checkpoint_gradients
from sophon._models.heads import find_head, head_classes, replace_head
from sophon._models.networks import NETWORKS
from sophon._models.probing import (
    made_for,
)
from sophon._models.published import (
    FILES,
    is_published,
    published_place,
    published_timm,
    published_torchvision,
    require_published,
)
from sophon._models.weights import load_weights, read_tensors, require_finite
from sophon._specs import ModelSpec, parse_spec

# Opens the name of a network of diffusers; a path follows.
DIFFUSERS = "diffusers:"


@dataclass(frozen=True)
class Blueprint:
    """How to make a network again: `build(classes)` has random weights; None: its own classes.

    `load`, where there is one, gives the weights that the name itself points at.
    """

    name: str
    build: Callable[[int | None], nn.Module]
    load: Callable[[], nn.Module] | None = None


def resolve_model(
    spec: ModelSpec, *, base: str | Path = ".", default_classes: int | None = None
) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Return the network with its weights loaded, and a factory for a freshly initialised one.

    Both have the same number of classes: `spec.classes`, or what the weights hold (published
    ones too), or `default_classes`, or the network's own. Weights of another number of classes than
    `spec.classes` get a fresh head. Relative paths start at `base`.

    Raises UnsupportedModelError for a network that cannot be built or has non-finite weights
    and CheckpointError for weights that cannot be read or do not fit.
    """
    base = Path(base)
    network = architecture(spec, base=base)
    plan = blueprint(network)
    file = _weights_file(spec, base)
    classes = spec.classes or network.classes or default_classes
    if spec.pretrained:
        classes = spec.classes
        model = _pretrained(spec)
    elif file is None:
        with seeded(0, "weights", spec.name.rpartition("/")[2]):
            model = plan.build(classes) if plan.load is None else plan.load()
    else:
        tensors = read_tensors(file)
        held = _classes_in(tensors, plan, classes)
        model = plan.build(held)
        load_weights(model, tensors, source=str(file))
        if spec.classes is None:
            classes = held
        elif held != spec.classes:
            _refit(model, spec)
    require_finite(model, what=spec.name)

    def fresh() -> nn.Module:
        return _ready(plan.build(classes), spec)

    return _ready(model, spec), fresh


def _ready(model: nn.Module, spec: ModelSpec) -> nn.Module:
    return (checkpoint_gradients(model) if spec.gradient_checkpointing else model).eval()


def require_model(spec: ModelSpec, *, base: str | Path = ".") -> None:
    """Raise what `resolve_model` would for a network that does not exist or weights that are
    neither at hand nor within reach; nothing is built or read.
    """
    base = Path(base)
    network = architecture(spec, base=base)
    blueprint(network)
    kind, _, name = network.name.partition(":")
    if kind in ("timm", "torchvision"):
        _require_name(kind, name)
    if spec.pretrained:
        _weights_file(spec, base)
        library, name = _publisher(spec)
        try:
            require_published(library, name)
        except _UNREACHED as error:
            raise _out_of_reach(spec, error) from None
        return
    file = _weights_file(spec, base)
    if file is not None and not file.is_file():
        read_tensors(file)


def architecture(spec: ModelSpec, *, base: Path) -> ModelSpec:
    """Return the spec of the underlying network: a checkpoint's is read from its `model.json`.

    Raises UnsupportedModelError for unknown names and CheckpointError for a damaged checkpoint.
    """
    for _ in range(4):
        if spec.name.startswith(DIFFUSERS):
            return spec.model_copy(update={"name": denoiser_name(spec.name, base)})
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
        changes = {
            "weights": None,
            "pretrained": False,
            "head": head,
            "gradient_checkpointing": spec.gradient_checkpointing,
        }
        spec, base = described.model_copy(update=changes), folder
    raise CheckpointError(f"{spec.name}: checkpoints refer to one another without end")


def blueprint(spec: ModelSpec) -> Blueprint:
    """Return how to build the network that `spec.name` names, without weights.

    Raises UnsupportedModelError for an unknown name, with near matches.
    """
    kind, _, name = spec.name.partition(":")
    if kind == "timm" and name:
        return Blueprint(
            spec.name,
            lambda classes: _build_timm(name, classes, spec.in_channels, spec.arguments),
        )
    if kind == "torchvision" and name:
        if spec.in_channels != 3:
            raise UnsupportedModelError(
                f"model.in_channels = {spec.in_channels}: torchvision's networks take 3; "
                "use 3 (grey images are repeated) or a timm network"
            )
        return Blueprint(
            spec.name, lambda classes: _build_torchvision(name, classes, spec.arguments)
        )
    if spec.name.startswith(DIFFUSERS):
        source = DenoiserSource(Path(spec.name.removeprefix(DIFFUSERS)))
        return Blueprint(spec.name, lambda classes: source.build(), source.load)
    if spec.name in NETWORKS:
        if spec.arguments:
            raise UnsupportedModelError(
                f"model.arguments: {spec.name} takes none; remove them, or use a timm network"
            )
        network = NETWORKS[spec.name]
        return Blueprint(spec.name, lambda classes: network(classes or 10, spec.in_channels))
    raise UnsupportedModelError(_unknown(spec.name, [*NETWORKS, *_elsewhere()]))


def _elsewhere() -> list[str]:
    """Return the networks of the libraries that are installed: `timm:resnet18` and so on."""
    held = []
    for kind in ("timm", "torchvision"):
        try:
            held += [f"{kind}:{one}" for one in _names_of(kind)]
        except UnsupportedModelError:
            continue
    return held


def denoiser_name(name: str, base: Path) -> str:
    """Return `diffusers:PATH` with a path that starts at `base` made absolute."""
    return DIFFUSERS + str((base / name.removeprefix(DIFFUSERS)).absolute())


def _unknown(name: str, known: list[str]) -> str:
    near = [one for one in known if one.endswith(f":{name}")] or _near(name, known)
    hint = f"did you mean {', '.join(near)}?" if near else ""
    forms = (
        f"use {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME, diffusers:PATH or a path to a"
        " checkpoint"
    )
    return f"model.name = {name!r} is not known: {hint or forms}"


def _near(name: str, known: list[str]) -> list[str]:
    """Return the names nearest to one; a name without a library is compared with names alone, and
    networks of our own come first.
    """
    if ":" in name:
        return difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    bare: dict[str, list[str]] = {}
    for one in known:
        bare.setdefault(one.rpartition(":")[2], []).append(one)
    close = difflib.get_close_matches(name, bare, n=4, cutoff=0.5)
    return sorted((one for held in close for one in bare[held]), key=lambda one: ":" in one)[:4]


def _library(name: str) -> Any:
    prepare_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{name} cannot be imported ({error}): pip install 'sophon-protect[vision]'"
        ) from None


def _require_name(kind: str, name: str) -> None:
    """Raise UnsupportedModelError, with near matches, for a name that timm or torchvision lacks."""
    if kind == "timm" and _library("timm").is_model(name):
        _require_tag(name)
        return
    known = _names_of(kind)
    if kind == "timm" or name not in known:
        near = [f"{kind}:{found}" for found in known]
        raise UnsupportedModelError(_unknown(f"{kind}:{name}", near))


def _require_tag(name: str) -> None:
    """Raise UnsupportedModelError, with those there are, for weights that timm does not know."""
    network, _, tag = name.partition(".")
    held: list[str] = _library("timm").list_pretrained(f"{network}.*") if tag else []
    if tag and name not in held:
        known = ", ".join(f"timm:{one}" for one in held) or "none"
        raise UnsupportedModelError(
            f"model.name = 'timm:{name}': timm knows no weights {tag!r} of {network}; known:"
            f" {known}"
        )


def _names_of(kind: str) -> list[str]:
    """Return the networks that timm or torchvision knows."""
    if kind == "timm":
        names: list[str] = _library("timm").list_models()
        return names
    models = _library("torchvision.models")
    held: list[str] = models.list_models(module=models)
    return held


def _build_timm(
    name: str, classes: int | None, in_channels: int, options: dict[str, Any]
) -> nn.Module:
    _require_name("timm", name)
    timm = _library("timm")
    arguments: dict[str, Any] = {"in_chans": in_channels, **_tuples(options)}
    if classes is not None:
        arguments["num_classes"] = classes
    return _with_arguments(
        f"timm:{name}", options, lambda: _flexible(timm.create_model, name, **arguments)
    )


def _flexible(create: Callable[..., nn.Module], *names: Any, **arguments: Any) -> nn.Module:
    """Return the timm network; a vision transformer takes any image size, with unchanged keys."""
    try:
        return create(*names, dynamic_img_size=True, **arguments)
    except TypeError:
        return create(*names, **arguments)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def _with_arguments(
    name: str, options: dict[str, Any], build: Callable[[], nn.Module]
) -> nn.Module:
    """Return what `build` makes; UnsupportedModelError if `options` are at fault."""
    try:
        return build()
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError) as error:
        if not options:
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UnsupportedModelError(
            f"model.arguments = {options}: {name} cannot be built with them ({line}); correct or"
            " remove them"
        ) from None


def _build_torchvision(name: str, classes: int | None, options: dict[str, Any]) -> nn.Module:
    _require_name("torchvision", name)
    models = _library("torchvision.models")
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    arguments |= _tuples(options)
    return _with_arguments(
        f"torchvision:{name}", options, lambda: models.get_model(name, weights=None, **arguments)
    )


_UNREACHED = (OSError, RuntimeError, ValueError)
# What reading half a file raises, and a download whose checksum is another.
_CUT = (SafetensorError, UnpicklingError, EOFError, RuntimeError)


def _publisher(spec: ModelSpec) -> tuple[Any, str]:
    """Return the library that publishes weights of the network, and its name there.

    Raises UnsupportedModelError where none does.
    """
    kind, _, name = spec.name.partition(":")
    library = None
    if kind in ("timm", "torchvision"):
        _require_name(kind, name)
        library = _library("timm" if kind == "timm" else "torchvision.models")
    if library is None or not is_published(library, name):
        raise UnsupportedModelError(
            f"model.pretrained = true: {spec.name} has no published weights; set model.weights"
        )
    return library, name


def _pretrained(spec: ModelSpec) -> nn.Module:
    """Return the network with its publisher's weights; another class count gets a fresh head."""
    library, name = _publisher(spec)
    blueprint(spec).build(None)
    options = _tuples(spec.arguments)
    try:
        if spec.name.startswith("timm:"):
            options["in_chans"] = spec.in_channels
            model = _flexible(published_timm, library, name, **options)
        else:
            model = published_torchvision(library, name, **options)
    except _CUT as error:
        if "state_dict" in str(error):
            raise UnsupportedModelError(
                f"the published weights of {spec.name} do not fit it with model.arguments ="
                f" {spec.arguments}: remove these, or set model.pretrained = false"
            ) from None
        raise _damaged(spec, error) from None
    except _UNREACHED as error:
        raise _out_of_reach(spec, error) from None
    _refit(model, spec)
    return model


def _damaged(spec: ModelSpec, error: Exception) -> UnsupportedModelError:
    said = " ".join(str(error).split())[:120]
    return UnsupportedModelError(
        f"the published weights of {spec.name} in {published_place(*_publisher(spec))} are damaged"
        f" or a partial download ({type(error).__name__}: {said}): delete them and download them"
        " again"
    )


def _out_of_reach(spec: ModelSpec, error: Exception) -> UnsupportedModelError:
    library, name = _publisher(spec)
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
    return UnsupportedModelError(
        f"the published weights of {spec.name} are not at hand ({reason}): download them once "
        f"with a connection, to {published_place(library, name)}, or give the file as"
        " model.weights and set model.pretrained = false beside it"
    )


def _refit(model: nn.Module, spec: ModelSpec) -> None:
    """Give the model a fresh head of `spec.classes` outputs where it has another number."""
    if spec.classes is None:
        return
    shape = (spec.in_channels, *made_for(model, (224, 224)))
    head = find_head(model, shape, spec.head)
    if head_classes(model, head) != spec.classes:
        replace_head(model, head, spec.classes, seed=0, names=("pretrained",))


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
        return _file_in(base / spec.weights)
    if _checkpoint_folder(spec.name, base) is None:
        return None
    path = base / spec.name
    return path / "model.safetensors" if path.is_dir() else path


def _file_in(path: Path) -> Path:
    """Return a file of weights, or that in a folder as huggingface_hub lays it out."""
    if not path.is_dir():
        return path
    held = [path / name for name in FILES if (path / name).is_file()]
    if not held:
        raise CheckpointError(
            f"model.weights = {str(path)!r} is a folder without {' or '.join(FILES)}: name the file"
        )
    return held[0]


def _read_description(path: Path) -> ModelSpec:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: for weights not written by sophon set model.name to the network "
            "and model.weights to the file"
        )
    description = read_json(path)
    if not isinstance(description.get("model"), dict):
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
