"""What turns pictures into features to compare them by: a classifier without its head, Inception.

Distances are torchmetrics'; they mean something only beside the extractor's name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._base.errors import SophonError, SpecError, UnsupportedModelError, first_line
from sophon._base.files import read_json
from sophon._base.seeding import seeded
from sophon._base.torchvision_patch import installing, library
from sophon._data import Domain, Images
from sophon._models import find_head, read_tensors, resolve_model
from sophon._models.networks import SmallConvNet
from sophon._specs import ModelSpec, SampleSpec, Strategy, fingerprint_of
from sophon._tasks import Classification
from sophon._training.checkpoints import file_sha256
from sophon._training.environment import environment
from sophon._training.loop import train
from sophon._training.setting import make_setting

# The classifier whose features are compared sees images of at most this side.
_SIDE = 32
_BATCH = 64


@dataclass(frozen=True)
class Extractor:
    """What turns uint8 images (n, 3, h, w) into features (n, width), and what it is called."""

    module: nn.Module
    name: str
    width: int

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images (n, c, h, w), grey ones repeated; on the CPU."""
        images = images.expand(-1, 3, -1, -1)
        return torch.cat([self.module(part).float().cpu() for part in images.split(_BATCH)])


def make_extractor(spec: SampleSpec, original: Domain, restricted: Domain) -> Extractor:
    """Return the extractor that the specification names.

    `classifier` is trained here, on the classes of both domains; else it is a path: the folder
    of a classifier that sophon wrote, or Inception's weights. Raises SpecError if it does not have
    the stated width, CheckpointError or UnsupportedModelError if it cannot be loaded.
    """
    if spec.extractor == "classifier":
        made = _trained(spec, original, restricted)
    else:
        made = _from_path(Path(spec.extractor))
    _require_width(spec, made.name, made.width)
    return made


def _from_path(path: Path) -> Extractor:
    """Return the extractor in a folder or a file; errors name the key that it stands under."""
    try:
        return _checkpoint(path) if path.is_dir() else _inception(path)
    except SophonError as error:
        key = "audit.samples.extractor"
        if key in str(error):
            raise
        raise type(error)(f"{key} = {str(path)!r}: {error}") from None


def extractor_key(spec: SampleSpec, original: Domain, restricted: Domain) -> str:
    """Return a fingerprint of everything that determines an extractor's features.

    One that is trained here comes out a little differently with another torch or processor.
    """
    if spec.extractor == "classifier":
        held = environment(torch.device("cpu"), "fp32")
        parts: dict[str, Any] = {
            "steps": spec.extractor_steps,
            "domains": [original.fingerprint(), restricted.fingerprint()],
            "names": [original.name, restricted.name],
            "torch": held.versions.get("torch"),
            "processor": held.processor,
            "threads": held.threads,
        }
        return fingerprint_of(parts)
    path = Path(spec.extractor)
    files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    return fingerprint_of({"files": [[file.name, file_sha256(file)] for file in files]})


def check_extractor(spec: SampleSpec, original: Domain, restricted: Domain) -> None:
    """Raise what `make_extractor` would, without training anything."""
    if spec.extractor == "classifier":
        with seeded(0, "extractor"):
            width = SmallConvNet(1).head.in_features
        _require_width(spec, "the small classifier that is trained for it", width)
    else:
        make_extractor(spec, original, restricted)


def _require_width(spec: SampleSpec, name: str, width: int) -> None:
    if spec.width is not None and spec.width != width:
        raise SpecError(
            f"audit.samples.width = {spec.width}, and the features of {name} have"
            f" {width}: leave width out, or name the extractor that you mean"
        )


class _Penultimate(nn.Module):
    """A classifier without its head, on uint8 images (n, 3, h, w)."""

    def __init__(
        self,
        body: nn.Module,
        head: str,
        normalisation: tuple[Tensor, Tensor],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.mean, self.std = normalisation
        self.size = size
        self.num_features = int(body.get_submodule(head).in_features)  # type: ignore[arg-type]
        owner, _, last = head.rpartition(".")
        setattr(body.get_submodule(owner), last, nn.Identity())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return features (n, width)."""
        fitting = small(images) if self.size is None else resized(images, self.size)
        scaled = fitting.float() / 255
        features: Tensor = self.body((scaled - self.mean) / self.std)
        return features


def small(images: Tensor) -> Tensor:
    """Return uint8 images whose sides are at most 32, antialiased where they were larger."""
    return images if max(images.shape[-2:]) <= _SIDE else resized(images, (_SIDE, _SIDE))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 images of `size` (height, width), antialiased where they were larger."""
    if images.shape[-2:] == size:
        return images
    scaled = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return scaled.round().byte()


def _joint(original: Domain, restricted: Domain) -> Domain:
    """Return one domain with the classes of both."""

    def both(first: Images, second: Images) -> Images:
        pixels = [small(part.pixels.expand(-1, 3, -1, -1)) for part in (first, second)]
        height, width = pixels[0].shape[-2:]
        pixels[1] = resized(pixels[1], (height, width))
        labels = [first.labels, second.labels + original.class_count]
        return Images(torch.cat(pixels).contiguous(), torch.cat(labels))

    return Domain(
        f"{original.name}+{restricted.name}",
        both(original.train, restricted.train),
        both(original.validation, restricted.validation),
        both(original.test, restricted.test),
        (*original.classes, *restricted.classes),
        (0.5,),
        (0.5,),
    )


def _trained(spec: SampleSpec, original: Domain, restricted: Domain) -> Extractor:
    domain = _joint(original, restricted)
    with seeded(0, "extractor"):
        model = SmallConvNet(domain.class_count)
    setting = make_setting(model, task=Classification(), original=domain, head="head", device="cpu")
    strategy = Strategy(
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.01,
        schedule="warmup_cosine",
        batch_size=min(64, len(domain.train)),
        steps=spec.extractor_steps,
        augmentation="flip",
        precision="fp32",
    )
    batches = (0, ("extractor", "batches"))
    train(model, strategy, setting, domain, stream=(0, ("extractor",)), batches=batches)
    half = torch.tensor(0.5)
    module = _Penultimate(model, "head", (half, half))
    classes = f"{original.class_count} + {restricted.class_count} classes"
    name = f"penultimate features of a small classifier of {domain.name} ({classes})"
    return Extractor(module, name, module.num_features)


def _checkpoint(folder: Path) -> Extractor:
    model, _ = resolve_model(ModelSpec(name=str(folder.absolute())), base=Path())
    held = read_json(folder / "model.json")
    takes = (held.get("protection") or held.get("pretraining") or {}).get("input")
    # Where it says nothing of its input, ImageNet's normalisation is what domains default to.
    size: tuple[int, int] | None = None
    mean, std = Classification.normalisation
    seen = f"at most {_SIDE}x{_SIDE} pixels, ImageNet's mean and std: none are recorded"
    if takes is not None:
        _, height, width = takes["input_size"]
        size, mean, std = (height, width), takes["mean"], takes["std"]
        seen = f"{height}x{width} pixels, mean {_listed(mean)}, std {_listed(std)}"
    head = find_head(model, (3, *(size or (_SIDE, _SIDE))))
    layer = model.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(
            f"audit.samples.extractor = {str(folder)!r}: its last layer {head!r} is a"
            f" {type(layer).__name__}: give a classifier, whose last layer is linear"
        )
    shape = (1, -1, 1, 1)
    normalisation = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
    module = _Penultimate(model, head, normalisation, size)
    name = f"penultimate features of the classifier in {folder.name} ({seen})"
    return Extractor(module, name, module.num_features)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _inception(file: Path) -> Extractor:
    if not file.is_file():
        raise SpecError(
            f"audit.samples.extractor = {str(file)!r} does not exist: use 'classifier', the folder"
            " of a classifier, or a file of Inception's weights"
        )
    fid = torchmetrics("torchmetrics.image.fid")
    # torch-fidelity would unpickle whatever the file holds: it is given a copy of the tensors.
    tensors = read_tensors(file)
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "inception.pth"
            torch.save(tensors, copy)
            module = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], str(copy))
    except ModuleNotFoundError:
        raise SpecError(
            f"Inception's features need torch-fidelity: {installing('quality')}"
        ) from None
    except RuntimeError as error:
        raise SpecError(
            f"audit.samples.extractor: {file.name} does not hold the weights of the FID's"
            f" Inception ({first_line(error)})"
        ) from None
    module.num_features = 2048
    return Extractor(module, f"Inception v3 pool features ({file.name})", 2048)


def torchmetrics(name: str) -> Any:
    """Return a module of torchmetrics. Raises SpecError where it is not installed."""
    remedy = f"{installing('quality')}; or set audit.samples.count = 0"
    needed = f"KID and FID need it: {remedy}"
    return library(name, "torchmetrics cannot be imported", needed, SpecError)
