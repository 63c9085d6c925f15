"""Where a run takes place: one task, its domains and the device, checked before work starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sophon._base.errors import DataError, UnsupportedModelError, require_kind
from sophon._base.remarks import remark
from sophon._base.seeding import generator
from sophon._base.spans import spanned
from sophon._data import (
    Domain,
    Images,
    batch,
    check_apart,
    check_channels,
    fitted,
    resolve_normalisation,
)
from sophon._models import (
    OwnInput,
    Shape,
    choose_channels_last,
    choose_precision,
    find_head,
    head_classes,
    own_input,
    require_network,
    stated_classes,
)
from sophon._specs import Augmentation, Interpolation, Precision
from sophon._tasks import Task


@dataclass(frozen=True)
class Feed:
    """The batches of one stream: batch `step` is a pure function of `(seed, names, step)`.

    Every epoch is a new permutation; images left over at its end wait for another one.
    """

    setting: Setting
    domain: Domain
    images: Images
    batch_size: int
    seed: int
    names: tuple[str | int, ...]
    augmentation: Augmentation = "none"
    _epoch: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @spanned("input")
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return normalised images (batch, channels, height, width) and labels of one step."""
        epoch, position = divmod(step, max(1, len(self.images) // self.batch_size))
        if epoch not in self._epoch:
            self._epoch.clear()
            stream = generator(self.seed, *self.names, "epoch", epoch)
            self._epoch[epoch] = torch.randperm(len(self.images), generator=stream)
        start = position * self.batch_size
        index = self._epoch[epoch][start : start + self.batch_size]
        return self._fetch(index, generator(self.seed, *self.names, "augment", step))

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, in order, the last partial batch included."""
        stream = generator(self.seed, *self.names, "in-order")
        for index in torch.arange(len(self.images)).split(self.batch_size):
            yield self._fetch(index, stream)

    def _fetch(self, index: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        mean, std = self.setting.normalisation(self.domain)
        return batch(
            self.images,
            index,
            mean=mean,
            std=std,
            channels=self.setting.channels,
            device=self.setting.device,
            augmentation=self.augmentation,
            generator=stream,
            channels_last=self.setting.channels_last,
        )


@dataclass(frozen=True)
class Setting:
    """Everything about a run that does not change while it runs."""

    task: Task
    original: Domain
    restricted: tuple[Domain, ...]
    head: str
    channels: int
    device: torch.device
    precision: str
    channels_last: bool
    own: OwnInput | None = None

    def normalisation(self, domain: Domain) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return (mean, std) of a domain: its own, else the original domain's, else what the
        library of the network states, else the task's.
        """
        default = self.task.normalisation if self.own is None else (self.own.mean, self.own.std)
        return resolve_normalisation(domain, self.original, default)

    def input(self) -> dict[str, Any]:
        """Return what the model takes: (channels, height, width), and how pixels are normalised."""
        mean, std = self.normalisation(self.original)
        takes: dict[str, Any] = {"input_size": self.shape(self.original), "mean": mean, "std": std}
        fit = self.original.fit
        # Without these keys: bilinear, the whole shorter side, and its square in the middle.
        if fit is not None and (fit.interpolation, fit.crop_pct) != ("bilinear", 1.0):
            takes |= {"interpolation": fit.interpolation, "crop_pct": fit.crop_pct}
        if fit is not None and fit.crop_mode != "center":
            takes |= {"crop_mode": fit.crop_mode}
        return takes

    def class_names(self) -> list[str] | None:
        """Return which class each output of the head is; None where outputs are no classes."""
        original = self.original
        return None if self.task.classes(original) is None else list(original.classes)

    def shape(self, domain: Domain) -> Shape:
        """Return the shape in which the model meets the domain's images."""
        return self.task.shape((self.channels, *domain.image_shape[1:]))

    def feed(
        self,
        domain: Domain,
        images: Images,
        *,
        batch_size: int,
        stream: tuple[int, tuple[str | int, ...]] = (0, ()),
        augmentation: Augmentation = "none",
    ) -> Feed:
        """Return the batches of `images`, one of the domain's splits, on `stream`."""
        return Feed(self, domain, images, batch_size, *stream, augmentation)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the run's precision (disabled in fp32)."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device and memory layout of the run, in place; return it."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload,no-any-return]

    def at(self, precision: Precision, model: nn.Module) -> Setting:
        """Return this setting in a strategy's precision; `auto` is the run's.

        Raises UnsupportedModelError where `model` cannot be trained in it.
        """
        if precision == "auto":
            return self
        shapes = [self.shape(domain) for domain in self.restricted]
        chosen = choose_precision(precision, self.device, model, shapes)
        return replace(self, precision=chosen)

    def exact(self) -> Setting:
        """Return this setting in fp32."""
        return replace(self, precision="fp32")


def make_setting(
    model: nn.Module,
    *,
    task: Task,
    original: Domain,
    restricted: tuple[Domain, ...] | None = None,
    head: str | None = None,
    precision: Precision = "fp32",
    device: str | torch.device | None = None,
    trained: bool = True,
) -> Setting:
    """Check that model and domains fit each other and return the setting.

    Unless the model is to be `trained` for its publisher, failing in train mode is its own
    affair: an attack on it will be recorded as crashed. `restricted` is None for a run that has
    no such domain. Raises DataError or UnsupportedModelError before any work.
    """
    require_network(model)
    if restricted == ():
        raise DataError("no restricted domain: give at least one")
    for role, domain in (
        ("original", original),
        *(("restricted", one) for one in restricted or ()),
    ):
        require_kind(domain, Domain, role, "a Domain, such as sophon.load_domain(DomainSpec(...))")
    restricted = restricted or ()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    channels = task.channels(model) or original.image_shape[0]
    shapes: list[Shape] = []
    for domain in (original, *restricted):
        check_channels(domain.name, domain.image_shape[0], channels)
        task.check(model, domain, (channels, *domain.image_shape[1:]), trained=trained)
        shapes.append(task.shape((channels, *domain.image_shape[1:])))
    check_apart(original, restricted)
    found = find_head(model, (channels, *original.image_shape[1:]), head)
    if task.classes(original) not in (None, head_classes(model, found)):
        raise UnsupportedModelError(
            f"the model's head {found!r} has {head_classes(model, found)} outputs but the original"
            f" domain {original.name!r} has {original.class_count} classes: give the weights"
            " trained on this domain"
        )
    setting = Setting(
        task=task,
        original=original,
        restricted=restricted,
        head=found,
        channels=channels,
        device=place,
        precision=choose_precision(precision, place, model, shapes),
        channels_last=choose_channels_last(model),
        own=own_input(model),
    )
    _remark_on_normalisation(setting)
    _remark_on_resizing(setting.own, original)
    _remark_on_classes(original, stated_classes(model))
    return setting


def _remark_on_normalisation(setting: Setting) -> None:
    """Say where images are normalised otherwise than the network's library states."""
    if setting.own is None:
        return
    own = (setting.own.mean, setting.own.std)
    used = setting.normalisation(setting.original)
    if [fitted(v, setting.channels) for v in used] != [fitted(v, setting.channels) for v in own]:
        remark(
            f"warning: {setting.original.name!r} is normalised with {_numbers(used)}; the network's"
            f" own is {_numbers(own)} ({setting.own.stated}), the default where a domain gives none"
        )
    if setting.own.reversed:
        remark(
            f"warning: the network was made for images with blue first ({setting.own.stated}); it"
            " is given red first, as all are"
        )


def _remark_on_classes(original: Domain, stated: list[str]) -> None:
    """Say where the domain has the classes that the network states in another order."""
    own, others = ([name.casefold() for name in names] for names in (original.classes, stated))
    if own != others and sorted(own) == sorted(others):
        at = next(index for index, name in enumerate(own) if name != others[index])
        remark(
            f"warning: class {at} of {original.name!r} is {original.classes[at]!r}, and the"
            f" network's own {stated[at]!r} (its id2label): give the classes in its order"
        )


_RESIZING = ("interpolation", "crop_mode", "crop_pct")


def _remark_on_resizing(own: OwnInput | None, original: Domain) -> None:
    """Say where images are resized otherwise than the network's library states."""
    fit = original.fit
    if own is None or fit is None or own.interpolation not in get_args(Interpolation):
        return
    pairs = [(name, getattr(fit, name), getattr(own, name)) for name in _RESIZING]
    # Published numbers are rounded.
    differ = [
        (name, mine, theirs)
        for name, mine, theirs in pairs
        if (mine != theirs if isinstance(mine, str) else abs(mine - theirs) >= 0.01)
    ]
    if differ:
        here, there = (
            " and ".join(f"{one[0]} = {_plain(one[at])}" for one in differ) for at in (1, 2)
        )
        remark(
            f"warning: {original.name!r} is resized with {here}; the network's own is {there}"
            f" ({own.stated}): set it for a new run"
        )


def _plain(value: str | float) -> str:
    return repr(value) if isinstance(value, str) else f"{value:.4g}"


def _numbers(normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in normalisation)
    return f"mean {mean} and std {std}"
