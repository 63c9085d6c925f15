"""The classifier layer: find it, count its classes, replace it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sophon._base.errors import UnsupportedModelError
from sophon._base.seeding import seeded
from sophon._models.denoisers import HEAD, is_denoiser
from sophon._models.probing import (
    PROBE_ERRORS,
    Names,
    Shape,
    cannot_take,
    probe_images,
    probing,
    run,
)
from sophon._models.transformers import averaged_heads, of_transformers


def find_head(model: nn.Module, image_shape: Shape, name: str | None = None) -> str:
    """Return the dotted name of the classifier layer, a Linear or a 1x1 Conv2d; of a denoiser its
    last convolution.

    A given `name` is only checked. Otherwise the first of several that the library averages is
    taken (`heads`), timm's `get_classifier` is asked, then the layer is looked for whose output on
    a probe is the model's output, a ReLU and an average over positions aside. Raises
    UnsupportedModelError listing the candidates when there is none or more than one.
    """
    if name is not None:
        return _named_head(model, name)
    if is_denoiser(model):
        return HEAD
    if averaged := averaged_heads(model):
        return averaged[0]
    layers = {
        key: module for key, module in model.named_modules() if key and _is_head_layer(module)
    }
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):
        given = classifier()
        given = given[0] if isinstance(given, tuple | list) and given else given
        for key, module in layers.items():
            if module is given:
                return str(key)
    found = _layers_giving_the_output(model, layers, image_shape)
    if len(found) != 1:
        problem = f"is ambiguous ({', '.join(found)})" if found else "was not found"
        raise UnsupportedModelError(
            f"the classifier head {problem}: set model.head to one of {_listed(layers)}"
        )
    return found[0]


def heads(model: nn.Module, head: str) -> tuple[str, ...]:
    """Return `head` and the layers whose outputs its library averages with its own: distilled
    vision transformers of timm and transformers have two.
    """
    if head in (averaged := averaged_heads(model)):
        return (head, *(name for name in averaged if name != head))
    layer = model.get_submodule(head)
    for part in model.modules():
        classifier = getattr(part, "get_classifier", None)
        known = type(part).__module__.startswith("timm.")
        given = classifier() if known and callable(classifier) else None
        if isinstance(given, tuple | list) and any(one is layer for one in given):
            others = [name for name, one in model.named_modules() if any(one is g for g in given)]
            return (head, *(name for name in others if name != head))
    return (head,)


def head_parameters(model: nn.Module, head: str) -> list[nn.Parameter]:
    """Return the parameters of `heads`."""
    return [p for name in heads(model, head) for p in model.get_submodule(name).parameters()]


def encoder_weights(model: nn.Module, head: str) -> dict[str, nn.Parameter]:
    """Return the weights of more than one axis outside `heads` by name: no biases, no norms."""
    ends = tuple(f"{name}." for name in heads(model, head))
    return {
        name: value
        for name, value in model.named_parameters()
        if value.dim() > 1 and name.endswith("weight") and not name.startswith(ends)
    }


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
    layers = {key: module for key, module in modules.items() if key and _is_head_layer(module)}
    if name in layers or (name == HEAD and is_denoiser(model)):
        return name
    problem = (
        f"is a {type(modules[name]).__name__}, not a Linear or a 1x1 Conv2d"
        if name in modules
        else "is not a layer of the model"
    )
    near = difflib.get_close_matches(name, list(layers), n=1)
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
            result: object = run(model, probe_images(model, image_shape))
    except PROBE_ERRORS as error:
        raise cannot_take(model, image_shape, "the probe", error) from None
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        return []
    return [key for key, output in outputs.items() if _same_logits(output, result)]


def _same_logits(output: Tensor, result: Tensor) -> bool:
    flat = result.flatten(1)
    for logits in (output, output.relu()):
        pooled = logits.mean(dim=(2, 3)) if logits.dim() == 4 else logits
        if pooled.shape == flat.shape and torch.allclose(pooled, flat, rtol=1e-4, atol=1e-6):
            return True
    return False


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
    """Put a freshly initialised layer with `classes` outputs in the place of each of `heads`.

    It is of the same kind and drawn on the stream `(seed, *names)`. Raises
    UnsupportedModelError for a head whose weight is computed from other parameters.
    """
    first, *others = heads(model, head)
    _replace(model, first, classes, seed=seed, names=names)
    for other in others:
        _replace(model, other, classes, seed=seed, names=(*names, other))


def _replace(model: nn.Module, head: str, classes: int, *, seed: int, names: Names) -> None:
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
        parent: Any = model.get_submodule(".".join(path[:depth]))
        if isinstance(getattr(parent, "num_classes", None), int):
            parent.num_classes = classes
        if of_transformers(parent):
            parent.num_labels = parent.config.num_labels = classes
    setattr(model.get_submodule(".".join(path[:-1])), path[-1], new)
