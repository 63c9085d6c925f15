"""Networks of timm and torchvision: which there are, and how one is built."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from sophon._base.errors import UnsupportedModelError, first_line
from sophon._base.torchvision_patch import installing, library
from sophon._models.networks import NETWORKS
from sophon._models.own_input import torchvision_input


def vision(name: str) -> Any:
    """Return a module of timm or torchvision; UnsupportedModelError where it is not installed."""
    return library(name, f"{name} cannot be imported", installing("vision"))


def require_name(kind: str, name: str) -> None:
    """Raise UnsupportedModelError, with near matches, for a name that timm or torchvision lacks."""
    if kind == "timm" and vision("timm").is_model(name):
        _require_tag(name)
        return
    known = _names_of(kind)
    if kind == "timm" or name not in known:
        near = [f"{kind}:{found}" for found in known]
        raise UnsupportedModelError(unknown_network(f"{kind}:{name}", near))


def _require_tag(name: str) -> None:
    """Raise UnsupportedModelError, with those there are, for weights that timm does not know."""
    network, _, tag = name.partition(".")
    held: list[str] = vision("timm").list_pretrained(f"{network}.*") if tag else []
    if tag and name not in held:
        known = ", ".join(f"timm:{one}" for one in held) or "none"
        raise UnsupportedModelError(
            f"model.name = 'timm:{name}': timm knows no weights {tag!r} of {network}; known:"
            f" {known}"
        )


def _names_of(kind: str) -> list[str]:
    """Return the networks that timm or torchvision knows."""
    if kind == "timm":
        names: list[str] = vision("timm").list_models()
        return names
    models = vision("torchvision.models")
    held: list[str] = models.list_models(module=models)
    return held


def build_timm(
    name: str, classes: int | None, in_channels: int, options: dict[str, Any]
) -> nn.Module:
    """Return a network of timm with random weights; None is its own number of classes."""
    require_name("timm", name)
    timm = vision("timm")
    arguments: dict[str, Any] = {"in_chans": in_channels, **tuples(options)}
    if classes is not None:
        arguments["num_classes"] = classes
    return _with_arguments(
        f"timm:{name}", options, lambda: flexible(timm.create_model, name, **arguments)
    )


def flexible(create: Callable[..., nn.Module], *names: Any, **arguments: Any) -> nn.Module:
    """Return the timm network; a vision transformer takes any image size, with unchanged keys."""
    try:
        return create(*names, dynamic_img_size=True, **arguments)
    except TypeError:
        return create(*names, **arguments)


def tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a run file as the libraries take them: lists as tuples."""
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
        raise UnsupportedModelError(
            f"model.arguments = {options}: {name} cannot be built with them ({first_line(error)});"
            " correct or remove them"
        ) from None


def build_torchvision(name: str, classes: int | None, options: dict[str, Any]) -> nn.Module:
    """Return a network of torchvision with random weights; None is its own number of classes."""
    require_name("torchvision", name)
    models = vision("torchvision.models")
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    arguments |= tuples(options)
    model = _with_arguments(
        f"torchvision:{name}", options, lambda: models.get_model(name, weights=None, **arguments)
    )
    return stating_input(model, name)


def without_auxiliary(model: Any) -> nn.Module:
    """Return inception or googlenet as it is used: without the heads that only training has."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False
        for name in ("AuxLogits", "aux1", "aux2"):
            if hasattr(model, name):
                setattr(model, name, None)
    built: nn.Module = model
    return built


def stating_input(model: nn.Module, name: str) -> nn.Module:
    """Return a network of torchvision with what its published weights say of images, as timm's."""
    held = torchvision_input(vision("torchvision.models"), name)
    if held is not None and getattr(model, "transform_input", None) is False:
        # Torchvision has these normalised as ImageNet, and inside the network so.
        held |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if held is not None:
        model.pretrained_cfg = held  # type: ignore[assignment]
    return model


def installed_networks() -> list[str]:
    """Return the networks of the libraries that are installed: `timm:resnet18` and so on."""
    held = []
    for kind in ("timm", "torchvision"):
        try:
            held += [f"{kind}:{one}" for one in _names_of(kind)]
        except UnsupportedModelError:
            continue
    return held


def unknown_network(name: str, known: list[str]) -> str:
    """Return the message that a network does not exist, with near ones among the `known`."""
    near = [one for one in known if one.endswith(f":{name}")] or _near(name, known)
    hint = f"did you mean {', '.join(near)}?" if near else ""
    forms = (
        f"use {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME, diffusers:PATH, transformers:PATH"
        " or a path to a checkpoint"
    )
    return f"model.name = {name!r} is not known: {hint or forms}"


def _near(name: str, known: list[str]) -> list[str]:
    """Return the nearest names; one without a library is compared with names alone, ours first."""
    if ":" in name:
        return difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    bare: dict[str, list[str]] = {}
    for one in known:
        bare.setdefault(one.rpartition(":")[2], []).append(one)
    close = difflib.get_close_matches(name, bare, n=4, cutoff=0.5)
    return sorted((one for held in close for one in bare[held]), key=lambda one: ":" in one)[:4]
