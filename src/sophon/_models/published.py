"""Published weights: found in the caches of timm and torchvision, or fetched where there is a net.

Without either it is said at once, not after a library's retries.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

FILES = ("model.safetensors", "pytorch_model.bin")
_REACH_S = 3.0


def is_published(library: Any, name: str) -> bool:
    """Return whether timm or `torchvision.models` names weights of a network that it knows."""
    if hasattr(library, "get_pretrained_cfg"):
        settings = library.get_pretrained_cfg(name)
        return settings is not None and bool(settings.hf_hub_id or settings.url or settings.file)
    return len(library.get_model_weights(name)) > 0


def require_published(library: Any, name: str) -> None:
    """Raise FileNotFoundError at once where the published weights of a network of timm or of
    `torchvision.models` are neither in a cache nor within reach.
    """
    if hasattr(library, "get_pretrained_cfg"):
        settings = library.get_pretrained_cfg(name)
        if settings is not None and _cached(settings) is None:
            require_reach(_host(settings), f"the cache has no weights of timm:{name}")
        return
    url = library.get_model_weights(name).DEFAULT.url
    if not _in_torch_cache(url):
        what = f"torch's cache has no {Path(url).name}"
        require_reach(urlsplit(url).hostname or "", what)


def published_timm(timm: Any, name: str, **arguments: Any) -> nn.Module:
    """Return a timm network with its published weights; raises as `require_published`."""
    require_published(timm, name)
    settings = timm.get_pretrained_cfg(name)
    file = None if settings is None else _cached(settings)
    overlay = {} if file is None else {"pretrained_cfg_overlay": {"file": str(file)}}
    model: nn.Module = timm.create_model(name, pretrained=True, **overlay, **arguments)
    return model


def published_torchvision(models: Any, name: str, **arguments: Any) -> nn.Module:
    """Return a torchvision network with its default weights; raises as `require_published`."""
    require_published(models, name)
    weights = models.get_model_weights(name).DEFAULT
    # Its images have three channels: `blueprint` refused anything else.
    model: nn.Module = models.get_model(name, weights=weights, **arguments)
    return model


def published_place(library: Any, name: str) -> str:
    """Return where the file of weights is looked for, of timm or of `torchvision.models`."""
    if hasattr(library, "get_pretrained_cfg"):
        settings = library.get_pretrained_cfg(name)
        if settings is not None and settings.hf_hub_id:
            from huggingface_hub import constants

            folder = f"models--{settings.hf_hub_id.replace('/', '--')}"
            return str(Path(constants.HF_HUB_CACHE) / folder)
        url = "" if settings is None else settings.url
    else:
        url = library.get_model_weights(name).DEFAULT.url
    return str(_torch_cache(url) if url else Path(torch.hub.get_dir()) / "checkpoints")


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


def _cached(settings: Any) -> Path | None:
    """Return the file of weights in a cache, or None."""
    if settings.file:
        return Path(settings.file)
    if settings.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        names = [settings.hf_hub_filename] if settings.hf_hub_filename else FILES
        for name in names:
            found = try_to_load_from_cache(settings.hf_hub_id, name)
            if isinstance(found, str):
                return Path(found)
        return None
    return _torch_cache(settings.url) if settings.url and _in_torch_cache(settings.url) else None


def _host(settings: Any) -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT if settings.hf_hub_id else settings.url).hostname or ""


def _torch_cache(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def _in_torch_cache(url: str) -> bool:
    return _torch_cache(url).is_file()
