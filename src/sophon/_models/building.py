"""Networks by name, with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from sophon._base.errors import (
    CheckpointError,
    SophonError,
    UnsupportedModelError,
    require_kind,
)
from sophon._base.files import read_json
from sophon._base.seeding import seeded
from sophon._models.denoisers import DenoiserSource, is_denoiser
from sophon._models.gradient_checkpointing import checkpoint_gradients
from sophon._models.heads import find_head, head_classes, replace_head
from sophon._models.libraries import (
    build_timm,
    build_torchvision,
    installed_networks,
    require_name,
    unknown_network,
)
from sophon._models.networks import NETWORKS
from sophon._models.own_input import USUAL_FIT, own_input, recorded_input
from sophon._models.probing import expected_channels, made_for, run_probe
from sophon._models.published import FILES, published
from sophon._models.transformers import TRANSFORMERS, ClassifierFolder
from sophon._models.weight_sets import chosen
from sophon._models.weights import (
    INDEX,
    load_weights,
    named_tensors,
    read_content,
    read_tensors,
    require_finite,
    require_usual,
    untied,
)
from sophon._specs import ModelSpec, parse_spec
from sophon._specs.base import Interpolation

# Opens the name of a network of diffusers; a path follows.
DIFFUSERS = "diffusers:"
# What opens a name that goes on with a path.
PATHS = (DIFFUSERS, TRANSFORMERS)


@dataclass(frozen=True)
class Blueprint:
    """How to make a network again: `build(classes)` has random weights; None: its own classes.

    `load`, where there is one, gives the weights that the name itself points at, and `renamed` the
    tensors of a file under the network's own names.
    """

    build: Callable[[int | None], nn.Module]
    load: Callable[[], nn.Module] | None = None
    renamed: Callable[[Any], Any] = lambda content: content


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
    require_kind(spec, ModelSpec, "model", "a ModelSpec, such as ModelSpec(name='timm:resnet18')")
    base = Path(base)
    network = architecture(spec, base=base)
    plan = blueprint(network)
    file = _weights_file(spec, base)
    classes = spec.classes or network.classes or default_classes
    if spec.pretrained:
        classes = spec.classes
        source = published(spec)
        # Arguments at fault are said before anything is fetched.
        blueprint(spec).build(None)
        model = source.model()
        _refit(model, spec)
    elif file is None:
        with seeded(0, "weights", spec.name.rpartition("/")[2]):
            model = plan.build(classes) if plan.load is None else plan.load()
    else:
        content, expected = plan.renamed(read_content(file)), untied(plan.build(classes))
        tensors = chosen(content, expected, source=str(file), key=spec.weights_key)
        if tensors is None:
            tensors = named_tensors(content, file)
        require_usual(tensors, file)
        held = _classes_in(tensors, expected, classes)
        model = plan.build(held)
        load_weights(model, tensors, source=str(file))
        if spec.classes is None:
            classes = held
        elif held != spec.classes:
            _refit(model, spec)
    require_finite(model, what=spec.name if file is None else str(file))
    folder = _checkpoint_folder(spec.name, base)
    if folder is not None and not is_denoiser(model):
        recorded_input(model, folder / "model.json")

    def fresh() -> nn.Module:
        return _ready(plan.build(classes), spec)

    return _ready(model, spec), fresh


def input_side(spec: ModelSpec, usual: int) -> int:
    """Return the side of the square images, in pixels, that a network by name is built for, where
    it takes no other ones, or the `usual` one.
    """
    model = blueprint(architecture(spec, base=Path())).build(None)
    if (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return made_for(model, (usual, usual))[0]
    stated = getattr(getattr(model, "config", model), "image_size", None)
    try:
        channels = expected_channels(model) or spec.in_channels
        run_probe(model, (channels, usual, usual), what="the network", training=False)
    except SophonError:
        return stated if isinstance(stated, int) else usual
    return usual


def stated_input(spec: ModelSpec) -> dict[str, Any] | None:
    """Return `interpolation`, `crop_pct` and `crop_mode` of a network by name, as its library
    states them, where these are not what a domain has anyway and a domain can have them.
    """
    own = own_input(blueprint(architecture(spec, base=Path())).build(None))
    held = {} if own is None else {key: getattr(own, key) for key in USUAL_FIT}
    known = held.get("interpolation") in get_args(Interpolation)
    # timm knows a border, too.
    known &= held.get("crop_mode") in ("center", "squash")
    return held if known and held != USUAL_FIT else None


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
        require_name(kind, name)
    file = _weights_file(spec, base)
    if spec.pretrained:
        published(spec).require()
    elif file is not None and not file.is_file():
        read_tensors(file)


def architecture(spec: ModelSpec, *, base: Path) -> ModelSpec:
    """Return the spec of the underlying network: a checkpoint's is read from its `model.json`.

    Raises UnsupportedModelError for unknown names and CheckpointError for a damaged checkpoint.
    """
    for _ in range(4):
        if spec.name.startswith(PATHS):
            return spec.model_copy(update={"name": placed_name(spec.name, base)})
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
            "weights_key": None,
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
            lambda classes: build_timm(name, classes, spec.in_channels, spec.arguments)
        )
    if kind == "torchvision" and name:
        if spec.in_channels != 3:
            raise UnsupportedModelError(
                f"model.in_channels = {spec.in_channels}: torchvision's networks take 3; "
                "use 3 (grey images are repeated) or a timm network"
            )
        return Blueprint(lambda classes: build_torchvision(name, classes, spec.arguments))
    if spec.name.startswith(DIFFUSERS):
        source = DenoiserSource(Path(spec.name.removeprefix(DIFFUSERS)))
        return Blueprint(lambda classes: source.build(), source.load)
    if spec.arguments and (spec.name in NETWORKS or spec.name.startswith(TRANSFORMERS)):
        raise UnsupportedModelError(
            f"model.arguments: {spec.name} takes none; remove them, or use a timm network"
        )
    if spec.name.startswith(TRANSFORMERS):
        folder = ClassifierFolder(Path(name))
        return Blueprint(folder.build, renamed=folder.renamed)
    if spec.name in NETWORKS:
        network = NETWORKS[spec.name]
        return Blueprint(lambda classes: network(classes or 10, spec.in_channels))
    raise UnsupportedModelError(unknown_network(spec.name, [*NETWORKS, *installed_networks()]))


def placed_name(name: str, base: Path) -> str:
    """Return `diffusers:PATH` or `transformers:PATH` with a path from `base` made absolute."""
    library, _, path = name.partition(":")
    return f"{library}:{(base / path).absolute()}"


def renamed(name: str, place: Callable[[Path], str]) -> str:
    """Return a network's name in which a path, if it has one, is what `place` makes of it."""
    library, colon, path = name.partition(":")
    if name.startswith(PATHS):
        return f"{library}:{place(Path(path))}"
    return name if colon or _checkpoint_folder(name, Path()) is None else place(Path(name))


def brings_weights(spec: ModelSpec) -> bool:
    """Return whether the network is a folder or file that holds its own weights."""
    return spec.weights is None and _weights_file(spec, Path()) is not None


def _refit(model: nn.Module, spec: ModelSpec) -> None:
    """Give the model a fresh head of `spec.classes` outputs where it has another number."""
    if spec.classes is None:
        return
    channels = expected_channels(model) or spec.in_channels
    shape = (channels, *made_for(model, (224, 224)))
    head = find_head(model, shape, spec.head)
    if head_classes(model, head) != spec.classes:
        replace_head(model, head, spec.classes, seed=0, names=("pretrained",))


def _checkpoint_folder(name: str, base: Path) -> Path | None:
    """Return the folder of a sophon checkpoint when `name` is a path to one, else None."""
    path = base / name
    if name.endswith(".safetensors"):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: correct model.name")
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
    if spec.weights_key is not None:
        raise UnsupportedModelError(
            f"model.weights_key = {spec.weights_key!r} chooses in a file of weights: set"
            " model.weights too"
        )
    if spec.name.startswith(TRANSFORMERS):
        if spec.pretrained:
            raise UnsupportedModelError(
                f"model.pretrained = true: {spec.name} brings its own weights: remove it"
            )
        return _file_in(base / spec.name.removeprefix(TRANSFORMERS))
    if _checkpoint_folder(spec.name, base) is None:
        return None
    path = base / spec.name
    return path / "model.safetensors" if path.is_dir() else path


def _file_in(path: Path) -> Path:
    """Return a file of weights, or that in a folder as huggingface_hub lays it out."""
    if not path.is_dir():
        return path
    names = (name for one in FILES for name in (one, f"{one}{INDEX}"))
    held = [path / name for name in names if (path / name).is_file()]
    if not held:
        raise CheckpointError(
            f"{path} is a folder without {' or '.join(FILES)}: set model.weights to the file"
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


def _classes_in(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], classes: int | None
) -> int | None:
    """Return the class count that makes the network fit, when only its outputs differ."""
    counts = set()
    for key, value in expected.items():
        if key not in tensors or tensors[key].shape == value.shape:
            continue
        if tensors[key].shape[1:] != value.shape[1:] or tensors[key].dim() != value.dim():
            return classes
        counts.add(tensors[key].shape[0])
    return counts.pop() if len(counts) == 1 else classes
