"""Image classifiers of transformers: recognise them, build them, read and write their folders.

They stay plain transformers models: same keys, same class. The library is imported only where one
is built or read, never asked of the hub, and runs no code that a folder brings.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sophon._base.errors import (
    CheckpointError,
    UnsupportedModelError,
    brief,
    first_line,
    shortened,
)
from sophon._base.files import read_others_json, write_text
from sophon._models.image_processors import (
    PROCESSOR,
    RESAMPLED,
    processor_input,
    transformers,
    unusable,
)

# Opens the name of a network of transformers; the path of its folder follows.
TRANSFORMERS = "transformers:"
CONFIG = "config.json"
# What makes the library fetch code or other weights, or compute with others than it is given.
_ELSEWHERE = ("auto_map", "quantization_config", "backbone", "use_timm_backbone")
# Classes of two heads, whose outputs they average.
_TEACHERS = {
    "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
}


def of_transformers(model: nn.Module) -> bool:
    """Return whether `model` is a network of transformers."""
    bases = type(model).__mro__
    return any(
        b.__name__ == "PreTrainedModel" and b.__module__.startswith("transformers.") for b in bases
    )


def from_configuration(model: Any) -> Callable[[], nn.Module] | None:
    """Return what builds a network of transformers anew, with random weights; None for another."""
    if not (of_transformers(model) and type(model).__module__.startswith("transformers.")):
        return None
    return lambda: type(model)(copy.deepcopy(model.config))


def stated_classes(model: Any) -> list[str]:
    """Return what a network of transformers calls its outputs, in order; of another nothing."""
    held = model.config.id2label if of_transformers(model) else {}
    return [str(held[index]) for index in sorted(held)]


def averaged_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the heads whose outputs a network of transformers averages, if any."""
    return _TEACHERS.get(type(model).__name__, ()) if of_transformers(model) else ()


def logits(outputs: Any) -> Any:
    """Return what a network's output says of classes: transformers puts it among other things."""
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs


class ClassifierFolder:
    """The folder of an image classifier that `save_pretrained` wrote.

    Raises CheckpointError for a path that is none, UnsupportedModelError for one of another kind,
    of one output, or with code of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / CONFIG
        if not file.is_file():
            raise CheckpointError(
                f"model.name = '{TRANSFORMERS}{shortened(path)}' is no folder with a {CONFIG}: name"
                " one that save_pretrained wrote"
            )
        self.settings = _usual(read_others_json(file), file)
        self.kind = _kind(self.settings, file)
        count, problem = self._config().num_labels, self.settings.get("problem_type")
        if count < 2 or problem not in (None, "single_label_classification"):
            raise UnsupportedModelError(
                f"{file}: num_labels = {count}, problem_type = {brief(problem)}: give a classifier"
                " of one label out of at least 2"
            )

    def _config(self) -> Any:
        known = transformers().CONFIG_MAPPING
        try:
            held = {key: v for key, v in self.settings.items() if key != "model_type"}
            return known[self.settings["model_type"]].from_dict(held)
        except unusable() as error:
            raise self._unbuilt(error) from None

    def _unbuilt(self, error: Exception) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path / CONFIG} cannot be built ({first_line(error)}): restore it"
        )

    def build(self, classes: int | None) -> nn.Module:
        """Return the network with random weights, from torch's global generator; None is its own
        number of classes.
        """
        config = self._config()
        if classes not in (None, config.num_labels):
            config.num_labels = classes
        try:
            model: nn.Module = self.kind(config)
        except unusable() as error:
            raise self._unbuilt(error) from None
        model.pretrained_cfg = processor_input(self.path)  # type: ignore[assignment]
        return model

    def renamed(self, content: Any) -> Any:
        """Return tensors, by name, under the names that this version of the library gives them.

        What it does not know, or has in another shape, is returned as it is.
        """
        usual = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
        if not usual or self.build(None).state_dict().keys() <= content.keys():
            return content
        config = self._config()
        # Nothing is rounded to the type in which the configuration was saved.
        config.dtype = None
        try:
            with _quiet():
                model, found = self.kind.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(content),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except unusable():
            return content
        other = {name for name, *_ in found["mismatched_keys"]}
        lost = {*found["missing_keys"], *other}
        kept = {key: content[key] for key in (*found["unexpected_keys"], *other) if key in content}
        return kept | {k: v for k, v in model.state_dict().items() if k not in lost}


def _usual(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return settings without what says nothing of the network; refuse what reaches elsewhere."""
    for key in _ELSEWHERE:
        if settings.get(key):
            raise UnsupportedModelError(
                f"{file}: {key} brings code or weights from elsewhere, which is never run: give a"
                " folder of a network that transformers itself has"
            )
    return {
        key: _usual(value, file) if isinstance(value, dict) and key != "label2id" else value
        for key, value in settings.items()
        # The library itself says where it loaded a network from.
        if not (key.startswith("_") or key.endswith("_implementation") or key == "name_or_path")
    }


def _kind(settings: dict[str, Any], file: Path) -> Any:
    """Return the class of image classifier that the settings describe."""
    of = transformers()
    kinds, known = of.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, of.CONFIG_MAPPING
    model_type, named = settings.get("model_type"), settings.get("architectures")
    usual = isinstance(model_type, str) and model_type in known and model_type != "timm_wrapper"
    config = known[model_type] if usual else None
    held: Any = kinds[config] if config is not None and config in kinds else ()
    held = held if isinstance(held, tuple) else (held,)
    # Of several the first has one head.
    found = [one for at, one in enumerate(held) if at == 0 or one.__name__ in _TEACHERS]
    kind = next((one for one in found if not named or named == [one.__name__]), None)
    if kind is None:
        wanted = " or ".join(one.__name__ for one in found) or "a timm network is timm:NAME"
        described = named[0] if isinstance(named, list) and named else model_type
        raise UnsupportedModelError(
            f"{file} describes {brief(described)}, which is no image classifier of"
            f" transformers: save one of AutoModelForImageClassification ({wanted})"
        )
    return kind


@contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers print nothing of weights that differ: whoever asked says so in a line."""
    said = transformers().utils.logging
    before = said.get_verbosity()
    said.set_verbosity_error()
    try:
        yield
    finally:
        said.set_verbosity(before)


def write_classifier(folder: Path, model: nn.Module) -> None:
    """Write the configuration of `model`, and of its image processor where it has one, to `folder`,
    which holds the weights: `ClassifierFolder` reads it then.
    """
    config: Any = model.config
    _write(
        folder / CONFIG,
        {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]},
    )
    stated: Any = getattr(model, "pretrained_cfg", None) or input_beside(model) or {}
    if stated.get("processor") is not None:
        _write(folder / PROCESSOR, stated["processor"])


def save_classifier(
    folder: Path, model: Any, classes: Sequence[str], takes: Mapping[str, Any]
) -> tuple[str, ...]:
    """Write `model` as its library does and an image processor; return the names of the files.

    `classes` are the names of its outputs, in place of the configuration's. The processor prepares
    images as Sophon did: `takes` has `input_size` (channels, height, width), `mean` and
    `std`, and `interpolation`, `crop_pct` and `crop_mode` where they are not the usual ones.
    """
    transformers()
    if classes:
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: index for index, name in enumerate(classes)}
    model.save_pretrained(folder, max_shard_size="100GB")
    channels, height, width = takes["input_size"]
    mean, std = (list(takes[key]) for key in ("mean", "std"))
    numbers = {name: number for number, name in RESAMPLED.items()}
    # Images that are not square have a size of their own, to which Sophon resizes none.
    size = {"height": height, "width": width}
    whole = {side: round(value / takes.get("crop_pct", 1.0)) for side, value in size.items()}
    short = whole if takes.get("crop_mode") == "squash" else {"shortest_edge": whole["height"]}
    held = {
        # The one that resizes the shorter side and cuts out the middle.
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": short if height == width else size,
        "resample": numbers[takes.get("interpolation", "bilinear")],
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean * (channels // len(mean)),
        "image_std": std * (channels // len(std)),
    }
    _write(folder / PROCESSOR, held)
    return CONFIG, "model.safetensors", PROCESSOR


def _write(file: Path, held: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(held, indent=2, sort_keys=True) + "\n")


def input_beside(model: nn.Module) -> dict[str, Any] | None:
    """Return what the image processor says in the folder that a network of transformers was loaded
    from, as `processor_input`; None for any other network.
    """
    place = getattr(model, "name_or_path", None) if of_transformers(model) else None
    return processor_input(Path(place)) if place else None
