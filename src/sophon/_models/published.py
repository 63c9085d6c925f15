"""Published weights: found in the caches of timm and torchvision, or fetched where there is a net.

Without either it is said at once, not after a library's retries.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from torch import nn

from sophon._base.errors import UnsupportedModelError, first_line
from sophon._models.libraries import (
    flexible,
    require_name,
    stating_input,
    tuples,
    vision,
    without_auxiliary,
)
from sophon._specs import ModelSpec

FILES = ("model.safetensors", "pytorch_model.bin")
_REACH_S = 3.0
_UNREACHED = (OSError, RuntimeError, ValueError)
# What reading half a file raises, and a download whose checksum is another.
_CUT = (SafetensorError, UnpicklingError, EOFError, RuntimeError, struct.error)


@dataclass(frozen=True)
class Published:
    """The published weights of the network `spec`.

    `file` is that in a cache, None where there is none: then `host` has them, and `lacking` says
    what no cache has. `place` is where the file is looked for; `load` gives the network.
    """

    spec: ModelSpec
    file: Path | None
    host: str
    lacking: str
    place: Path
    load: Callable[[], nn.Module]

    def require(self) -> None:
        """Raise UnsupportedModelError at once where they are in no cache and out of reach."""
        try:
            self._require()
        except _UNREACHED as error:
            raise self._out_of_reach(error) from None

    def model(self) -> nn.Module:
        """Return the network with these weights.

        Raises UnsupportedModelError where they are out of reach, damaged, or do not fit.
        """
        try:
            self._require()
            return self.load()
        except _CUT as error:
            if "state_dict" in str(error):
                raise UnsupportedModelError(
                    f"the published weights of {self.spec.name} do not fit it with model.arguments"
                    f" = {self.spec.arguments}: remove these, or set model.pretrained = false"
                ) from None
            said = " ".join(str(error).split())[:120]
            raise UnsupportedModelError(
                f"the published weights of {self.spec.name} in {self.place} are damaged or a"
                f" partial download ({type(error).__name__}: {said}): delete them and download"
                " them again"
            ) from None
        except _UNREACHED as error:
            raise self._out_of_reach(error) from None

    def _require(self) -> None:
        if self.file is None:
            require_reach(self.host, self.lacking)

    def _out_of_reach(self, error: Exception) -> UnsupportedModelError:
        reason = first_line(error, 200, default="no reason")
        return UnsupportedModelError(
            f"the published weights of {self.spec.name} are not at hand ({reason}): download them"
            f" once with a connection, to {self.place}, or give the file as model.weights and set"
            " model.pretrained = false beside it"
        )


def published(spec: ModelSpec) -> Published:
    """Return the weights that timm or torchvision publishes of the network `spec`.

    Raises UnsupportedModelError where neither does.
    """
    kind, _, name = spec.name.partition(":")
    found = None
    if kind in ("timm", "torchvision"):
        require_name(kind, name)
        found = _of_timm(spec, name) if kind == "timm" else _of_torchvision(spec, name)
    if found is None:
        raise UnsupportedModelError(
            f"model.pretrained = true: {spec.name} has no published weights; set model.weights"
        )
    return found


def _of_timm(spec: ModelSpec, name: str) -> Published | None:
    timm = vision("timm")
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not (settings.hf_hub_id or settings.url or settings.file):
        return None
    file = Path(settings.file) if settings.file else None
    if settings.hf_hub_id:
        from huggingface_hub import constants

        place = Path(constants.HF_HUB_CACHE) / f"models--{settings.hf_hub_id.replace('/', '--')}"
        host = constants.ENDPOINT
        file = file or _hub_file(settings)
    else:
        host, place = settings.url or "", _torch_cache(settings.url or "")
        file = file or (place if place.is_file() else None)
    overlay = {} if file is None else {"pretrained_cfg_overlay": {"file": str(file)}}
    arguments = {"in_chans": spec.in_channels, **tuples(spec.arguments), **overlay}
    return Published(
        spec=spec,
        file=file,
        host=urlsplit(host).hostname or "",
        lacking=f"the cache has no weights of timm:{name}",
        place=place,
        load=lambda: flexible(timm.create_model, name, pretrained=True, **arguments),
    )


def _of_torchvision(spec: ModelSpec, name: str) -> Published | None:
    models = vision("torchvision.models")
    every = models.get_model_weights(name)
    if not len(every):
        return None
    weights = every.DEFAULT
    place = _torch_cache(weights.url)
    # Not part of a state: a checkpoint that is read again would compute otherwise.
    plain = {"transform_input": False} if name in ("googlenet", "inception_v3") else {}
    arguments = {**plain, **tuples(spec.arguments)}

    def load() -> nn.Module:
        model = models.get_model(name, weights=weights, **arguments)
        return stating_input(without_auxiliary(model), name)

    return Published(
        spec=spec,
        file=place if place.is_file() else None,
        host=urlsplit(weights.url).hostname or "",
        lacking=f"torch's cache has no {Path(weights.url).name}",
        place=place,
        load=load,
    )


def require_reach(host: str, what: str) -> None:
    """Raise FileNotFoundError unless `host`, or the proxy that leads there, answers.

    `HF_HUB_OFFLINE` counts as no connection. `what` opens the message.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise FileNotFoundError(f"{what} and HF_HUB_OFFLINE is set")
    proxy = urlsplit(getproxies().get("https", ""))
    place = (proxy.hostname, proxy.port or 3128) if proxy.hostname else (host, 443)
    try:
        socket.create_connection(place, timeout=_REACH_S).close()
    except OSError as error:
        raise FileNotFoundError(f"{what} and {place[0]} does not answer, {error}") from None


def _hub_file(settings: Any) -> Path | None:
    """Return the file of weights in the cache of Hugging Face's hub, or None."""
    from huggingface_hub import try_to_load_from_cache

    names = [settings.hf_hub_filename] if settings.hf_hub_filename else FILES
    found = (try_to_load_from_cache(settings.hf_hub_id, name) for name in names)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _torch_cache(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
