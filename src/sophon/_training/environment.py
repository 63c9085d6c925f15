"""What an audit was run on and where: domains, versions, hardware, health of the weights."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn

from sophon._data import Domain, resolve_normalisation
from sophon._models import OwnInput
from sophon._records.audit_record import DomainRecord, Environment
from sophon._tasks.task import Normalisation

_PACKAGES = (
    *("sophon-protect", "torch", "numpy", "timm", "torchvision", "transformers", "diffusers"),
    "torchmetrics",
)


def domain_record(
    domain: Domain, role: str, training_flops: int | None = None, *, read: str = ""
) -> DomainRecord:
    """Return a domain's entry in a record; `read` is its line, as `domain_text` returns it."""
    return DomainRecord(
        name=domain.name,
        role=role,  # type: ignore[arg-type]
        source=domain.source,
        sha256=domain.fingerprint(),
        train=len(domain.train),
        validation=len(domain.validation),
        test=len(domain.test),
        classes=domain.class_count,
        image=domain.image_shape,
        training_flops=training_flops,
        largest=_largest(domain),
        read=read,
    )


def domain_text(
    domain: Domain, original: Domain, default: Normalisation, own: OwnInput | None
) -> str:
    """Return in a line what was read: classes, image shape, images of each split, normalisation
    and where it comes from, what was left out. `default` is the task's normalisation, `own` what
    the network's library says, if it does.
    """
    names = shorten(", ".join(domain.classes), 100, placeholder=" ...")
    noun = "class" if domain.class_count == 1 else "classes"
    channels, height, width = domain.image_shape
    sizes = f"{len(domain.train)} train, {len(domain.validation)} validation, {len(domain.test)}"
    usual = "by default"
    if own is not None:
        usual, default = f"the network's: {own.stated}", (own.mean, own.std)
    by = "given" if domain.mean else "the original domain's" if original.mean else usual
    mean, std = (
        " ".join(f"{value:.4g}" for value in values)
        for values in resolve_normalisation(domain, original, default)
    )
    parts = (
        f"{domain.name}: {domain.class_count} {noun} ({names}), {height}x{width}x{channels}",
        f"{sizes} test",
        f"mean {mean} std {std} ({by})",
        *domain.remarks,
    )
    text = "; ".join(" ".join(part.split()) for part in parts)
    return "".join(one if one.isprintable() else "?" for one in text)


def _largest(domain: Domain) -> float | None:
    """Return the share of the test images that are of the most frequent class."""
    if domain.class_count < 2 or not len(domain.test):
        return None
    _, counts = domain.test.labels.unique(return_counts=True)
    return int(counts.max()) / len(domain.test)


def environment(device: torch.device, precision: str) -> Environment:
    """Return where the audit runs: versions, processor, threads, device, precision."""
    return Environment(
        versions=_versions(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        threads=torch.get_num_threads(),
        device=str(device),
        precision=precision,
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
    )


# Both are read once a process: every trial has them.
@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def health(model: nn.Module, usual: nn.Module | None = None) -> tuple[str, ...]:
    """Return what is wrong with a model's weights, in names that the red flags know.

    What is frozen in `usual` as well, by its name, is so by design.
    """
    flags = []
    tensors = [v for v in model.state_dict().values() if v.is_floating_point()]
    if not all(bool(value.isfinite().all()) for value in tensors):
        flags.append("non_finite_weights")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if usual is not None:
        frozen -= {name for name, p in usual.named_parameters() if not p.requires_grad}
    if frozen:
        flags.append("frozen_parameters")
    return tuple(flags)
