"""How good a diffusion model's pictures are: samples, feature extractors, KID, FID, precision.

Distances are torchmetrics'; they mean something only beside the extractor's name.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon._base.errors import DataError, SophonError, SpecError, UnsupportedModelError
from sophon._base.files import read_json
from sophon._base.seeding import generator, seeded
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import Domain, Images
from sophon._models import diffusers, find_head, predict, read_tensors, resolve_model
from sophon._models.networks import SmallConvNet
from sophon._specs import ModelSpec, SampleSpec, Strategy, fingerprint_of
from sophon._tasks import Classification, Denoising
from sophon._training.checkpoints import file_sha256
from sophon._training.environment import environment
from sophon._training.loop import FineTuning
from sophon._training.setting import make_setting

# The classifier whose features are compared sees images of at most this side.
_SIDE = 32
_BATCH = 64
_KID_SUBSETS = 50


class Quality(NamedTuple):
    """Distances from real images, lower is better, and shares in [0, 1], higher is better.

    `kid` is the kernel distance (arXiv 1801.01401), a mean over subsets, with its standard
    deviation; `fid` the Frechet distance (arXiv 1706.08500). `precision` is the share of samples
    that lie among the real images, `recall` of real images that lie among the samples
    (arXiv 1904.06991).
    """

    kid: float
    kid_std: float
    fid: float
    precision: float
    recall: float


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


# --- Samples ---------------------------------------------------------------------------------


def make_sampler(task: Denoising, steps: int) -> Any:
    """Return diffusers' DDIM (arXiv 2010.02502) on the task's own schedule, set to `steps` steps.

    Raises SpecError where the schedule does not have so many.
    """
    held = dict(task.scheduler.config)
    total = len(task.alphas)

    def bounded(name: str) -> bool:
        # DDIM would clip where the source says nothing of it; latents have no bounds at all.
        return bool(held.get(name, False)) and task.latents is None

    sampler = diffusers().DDIMScheduler.from_config(
        held,
        # Its own list of schedules is short: it is given what the task is trained on, whole.
        num_train_timesteps=total,
        beta_schedule="linear",
        trained_betas=None,
        rescale_betas_zero_snr=False,
        clip_sample=bounded("clip_sample"),
        thresholding=bounded("thresholding"),
    )
    sampler.alphas_cumprod = task.alphas
    if not sampler.config.set_alpha_to_one:
        sampler.final_alpha_cumprod = task.alphas[0]
    if steps <= total:
        sampler.set_timesteps(steps)
    if steps > total or int(sampler.timesteps.max()) >= total:
        raise SpecError(
            f"audit.samples.steps = {steps}: the schedule has timesteps 0 to {total - 1}, too few"
            " for so many steps: lower audit.samples.steps"
        )
    return sampler


@torch.no_grad()
def draw_samples(
    model: nn.Module, task: Denoising, shape: tuple[int, int, int], labels: Tensor, *, steps: int
) -> Tensor:
    """Return uint8 images (n, c, h, w), one for each label, drawn by DDIM (arXiv 2010.02502).

    `shape` is an image's. Every model starts from the same noise: that of an image depends on its
    place only, and DDIM adds none. Raises SpecError for more steps than the schedule has.
    """
    device = next(model.parameters()).device
    scheduler = make_sampler(task, steps)
    stream = generator(0, "samples")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    drawn = []
    for part in labels.split(_BATCH):
        noise = [torch.randn(task.shape(shape), generator=stream) for _ in part]
        images, classes = torch.stack(noise).to(device), part.to(device)
        condition = classes if task.latents is None else task.latents.embedded(classes)
        for timestep in scheduler.timesteps:
            times = timestep.to(device).expand(len(images))
            predicted = predict(model, images, times, condition)
            images = scheduler.step(predicted, timestep, images).prev_sample
        images = images if task.latents is None else task.latents.decoded(images)
        # What a broken network draws may not be a number: black then.
        scaled = (images.float() / 2 + 0.5).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
        drawn.append((scaled * 255).round().byte().cpu())
    for module, training in modes:
        module.training = training
    return torch.cat(drawn)


# --- Extractors ------------------------------------------------------------------------------


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
    setting = make_setting(
        model,
        task=Classification(),
        original=domain,
        restricted=None,
        head="head",
        precision="fp32",
        device="cpu",
    )
    strategy = Strategy(
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.01,
        schedule="warmup_cosine",
        batch_size=min(64, len(domain.train)),
        steps=spec.extractor_steps,
        precision="fp32",
    )
    stream = (0, ("extractor",))
    feed = setting.feed(
        domain,
        domain.train,
        batch_size=strategy.batch_size,
        stream=(0, ("extractor", "batches")),
        augmentation="flip",
    )
    tuning = FineTuning(model, strategy, setting, feed, stream=stream)
    for _ in tuning.run(strategy.steps):
        pass
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
    fid = _torchmetrics("torchmetrics.image.fid")
    # torch-fidelity would unpickle whatever the file holds: it is given a copy of the tensors.
    tensors = read_tensors(file)
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "inception.pth"
            torch.save(tensors, copy)
            module = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], str(copy))
    except ModuleNotFoundError:
        raise SpecError(
            "Inception's features need torch-fidelity: pip install 'sophon-protect[quality]'"
        ) from None
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise SpecError(
            f"audit.samples.extractor: {file.name} does not hold the weights of the FID's"
            f" Inception ({line})"
        ) from None
    module.num_features = 2048
    return Extractor(module, f"Inception v3 pool features ({file.name})", 2048)


def _torchmetrics(name: str) -> Any:
    prepare_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(
            f"torchmetrics cannot be imported ({error}): KID and FID need it: pip install"
            " 'sophon-protect[quality]', or set audit.samples.count = 0"
        ) from None


# --- Distances -------------------------------------------------------------------------------


def require_torchmetrics() -> None:
    """Raise SpecError where torchmetrics is not installed: distances of pictures need it."""
    _torchmetrics("torchmetrics")


def check_quality(spec: SampleSpec, domains: Iterable[Domain]) -> None:
    """Raise SpecError or DataError unless there are enough samples and images for KID."""
    require_torchmetrics()
    # Of less than half the spread over subsets is that of the whole estimate, or more; larger
    # subsets are all alike, and a verdict would rest on no spread.
    needed = max(2 * spec.kid_subset, spec.neighbours + 2)
    if spec.count < needed:
        raise SpecError(
            f"audit.samples.count = {spec.count}: at least {needed} samples are needed; KID"
            f" compares subsets of {spec.kid_subset} (audit.samples.kid_subset), and how sure it is"
            f" shows in twice as many; precision looks at {spec.neighbours} neighbours"
            " (audit.samples.neighbours)"
        )
    for domain in domains:
        have = len(domain.test)
        if have < needed:
            raise DataError(
                f"domain {domain.name!r} has {have} test images, too few for KID: at least"
                f" {needed} are needed; give more, raise test, or lower audit.samples.kid_subset"
            )


def measure_quality(
    samples: Tensor, images: Tensor, extractor: Extractor, spec: SampleSpec
) -> Quality:
    """Return how far uint8 `samples` (n, c, h, w) are from real `images`, as the extractor sees."""
    fake, real = extractor.features(samples), extractor.features(images)
    with warnings.catch_warnings(), seeded(0, "kid"):
        warnings.simplefilter("ignore")
        kid = _torchmetrics("torchmetrics.image.kid").KernelInceptionDistance(
            feature=_Given(extractor.width), subsets=_KID_SUBSETS, subset_size=spec.kid_subset
        )
        fid = _torchmetrics("torchmetrics.image.fid").FrechetInceptionDistance(
            feature=_Given(extractor.width)
        )
        for metric in (kid, fid):
            metric.update(real, real=True)
            metric.update(fake, real=False)
        mean, std = (float(value) for value in kid.compute())
        distance = float(fid.compute())
    return Quality(
        kid=mean,
        kid_std=std,
        fid=distance,
        precision=_among(fake, real, spec.neighbours),
        recall=_among(real, fake, spec.neighbours),
    )


class _Given(nn.Module):
    """Passes features through: they were extracted before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


def _among(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Return the share of `points` within a ball around a point of `manifold` that reaches to its
    k-th nearest neighbour (arXiv 1904.06991).
    """
    radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
    inside = torch.cdist(points, manifold) <= radii
    return float(inside.any(1).float().mean())
