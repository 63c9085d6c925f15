"""What every term of a protection keeps to, and one that is added: a class and an entry."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import denoisers
from builders import digits, original, restricted, setting_of, trained_model
from plain_ridge import plain_components, plain_r2, plain_r2_of, plain_standardised
from sophon._base.errors import DataError, SpecError, UnsupportedModelError
from sophon._base.seeding import generator
from sophon._cli.run_spec import RunSpec
from sophon._data import Domain
from sophon._models import diffusers
from sophon._protection.forecast import forecast
from sophon._protection.losses import SUPPRESSIONS
from sophon._protection.probe import ProbingHindrance
from sophon._protection.protection import Protection, protect
from sophon._protection.readers import ReadersSpec
from sophon._protection.spec import Joint, ProtectSpec
from sophon._protection.term import Surroundings, TermSpec
from sophon._protection.terms import TERMS, Hindrance, Keep, Term, parse_term
from sophon._protection.terms.booster import BoosterSpec, BoosterTerm
from sophon._protection.terms.clamp import ClampSpec, ClampTerm
from sophon._protection.terms.cuti import CUTISpec, CUTITerm
from sophon._protection.terms.denoising_erasure import (
    DenoisingErasureSpec,
    DenoisingErasureTerm,
)
from sophon._protection.terms.distil import DistilSpec
from sophon._protection.terms.encoderlock import EncoderLockSpec, EncoderLockTerm
from sophon._protection.terms.erasure import ErasureSpec, ErasureTerm
from sophon._protection.terms.immunize import ImmunizeSpec, ImmunizeTerm
from sophon._protection.terms.ntl import NTLSpec, NTLTerm
from sophon._protection.terms.prune import PruneSpec, PruneTerm
from sophon._protection.terms.rehearsal import Rehearsal, RehearsalTerm
from sophon._protection.terms.repnoise import RepNoiseSpec, RepNoiseTerm
from sophon._protection.terms.retention import RetentionTerm
from sophon._protection.terms.suppress import SuppressSpec, SuppressTerm
from sophon._records.statement import statement_of
from sophon._specs import Guard, Strategy, parse_spec
from sophon._tasks import Denoising
from toy_term import ToySpec, ToyTerm

KINDS = [*TERMS, "toy"]


def _many_digits() -> Domain:
    """Return the restricted digits as ten classes: a model of five has no output for half."""
    five = restricted()
    labels = five.train.labels + 5 * (torch.arange(len(five.train)) % 2)
    return Domain.from_arrays("ten", five.train.pixels.numpy()[:, 0], labels.numpy())


# Settings that make one of them quick. A new kind has its own here, and an oracle in `ORACLES`.
QUICK: dict[str, dict[str, Any]] = {
    "task": {},
    "distil": {},
    "retention": {"batch_size": 24, "readers": {"views": [2], "kinds": ["linear"]}},
    "toy": {"batch_size": 8},
    "erasure": {
        "batch_size": 24,
        "readers": {"networks": 1, "views": [2], "kinds": ["linear"]},
    },
    "denoising_erasure": {
        "batch_size": 16,
        "readers": {"networks": 1, "bands": [[0, 500], [500, 1000]], "components": 4},
    },
    "rehearsal": {
        "steps": 3,
        "horizon": 7,
        "pool": 2,
        "query_batch_size": 8,
        "distribution": {"batch_sizes": [8]},
    },
    "suppress": {"batch_size": 16},
    "ntl": {"batch_size": 16},
    "repnoise": {"batch_size": 16},
    "immunize": {"batch_size": 16},
    "encoderlock": {"batch_size": 16, "every": 2, "fraction": 0.01},
    "prune": {"batch_size": 16, "every": 2, "ramp": 2},
    "cuti": {"batch_size": 16},
    "booster": {"batch_size": 16},
    "clamp": {"batch_size": 16},
}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "toy", ToyTerm)


def _role(kind: str) -> str:
    return "hinder" if kind == "toy" or issubclass(TERMS[kind], Hindrance) else "keep"


def _listed(role: type[Term[Any]], metric: str = "") -> str:
    """Return the kinds there are of a role, and for a task if one is given, as messages do."""
    fitting = [
        kind
        for kind, term in TERMS.items()
        if issubclass(term, role) and (not metric or metric in term.metrics)
    ]
    return re.escape(", ".join(fitting))


def _spec(kind: str, update: Any = None, **changes: Any) -> ProtectSpec:
    """Return four rounds with a term of this kind."""
    terms = {"hinder": [{"kind": "toy"}], "keep": [{"kind": "task"}]}
    tolerance = {"tolerance_points" if _classifies(kind) else "tolerance_relative": 100.0}
    terms[_role(kind)] = [{"kind": kind, **QUICK[kind]}]
    return ProtectSpec(
        **{
            "rounds": 4,
            **terms,
            "update": update or Joint(),
            "guard": Guard(every=2, **tolerance),
            "original_batch_size": 16,
            "checkpoint_every": 1,
            "precision": "fp32",
            **changes,
        }
    )


def _classifies(kind: str) -> bool:
    return "accuracy" in TERMS[kind].metrics


def _model(kind: str) -> Any:
    """Return a network of a task that the term fits."""
    return trained_model() if _classifies(kind) else denoisers.unet()


def _digits(kind: str) -> Callable[[int, int], Domain]:
    return digits if _classifies(kind) else denoisers.digits


def _case(kind: str) -> dict[str, Any]:
    """Return the domains and the task of a run with the term."""
    part = _digits(kind)
    task = {} if _classifies(kind) else {"task": Denoising()}
    return {"original": part(0, 5), "restricted": part(5, 10), **task}


def _run(spec: ProtectSpec, out: Path | None = None, kind: str = "task") -> Protection:
    return Protection(_model(kind), **_case(kind), spec=spec, out=out, device="cpu")


def _around(seed: int = 0, kind: str = "task", **changes: Any) -> Surroundings:
    model, case = _model(kind), _case(kind)
    case["restricted"] = (case["restricted"],)
    return Surroundings(setting_of(model, **(case | changes)), _model(kind), seed)


def _hindrance(kind: str, around: Surroundings) -> Hindrance[Any]:
    term = TERMS[kind](parse_term({"kind": kind, **QUICK[kind]}, Hindrance), around)
    assert isinstance(term, Hindrance)
    return term


def test_what_is_tested_here_is_all_there_is() -> None:
    assert set(QUICK) == set(KINDS)
    assert set(ORACLES) == set(KINDS)


# --- Gradients ------------------------------------------------------------------------------------


def _train(model: nn.Module, images: Tensor) -> Tensor:
    outputs: Tensor = model.train()(images)
    return outputs


def _kept(kind: str, model: nn.Module, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the term's loss on a batch of original images, which the model meets in train mode,
    its outputs and the labels.
    """
    around = _around()
    term = TERMS[kind](parse_term({"kind": kind, **QUICK[kind], **settings}, Keep), around)
    assert isinstance(term, Keep)
    domain = original()
    images, labels = around.setting.feed(domain, domain.train, batch_size=32).batch(0)
    outputs = _train(model, images)
    drawn = torch.Generator().get_state()
    return term.loss(outputs, labels, images, labels, drawn), images, labels


def _task(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    loss, images, labels = _kept("task", model)
    found = _gradients(loss, model)
    logits = _train(model, images)
    true = logits[torch.arange(len(labels)), labels]
    return found, (logits.exp().sum(1).log() - true).mean()


def _distil(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    loss, images, _ = _kept("distil", model)
    found = _gradients(loss, model)
    heat = DistilSpec().temperature
    with torch.no_grad():
        wanted = F.softmax(trained_model()(images) / heat, 1)
    said = F.softmax(_train(model, images) / heat, 1)
    return found, heat**2 * (wanted * (wanted.log() - said.log())).sum(1).mean()


def _retention(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Two depths of maps, read at two positions a side, against the given model's."""
    depths = ("stage1.3", "stage3.3")
    readers = {**QUICK["retention"]["readers"], "depths": depths, "penalty": (0.01, 0.01)}
    settings = {"kind": "retention", **QUICK["retention"], "readers": readers}
    term: Any = RetentionTerm(parse_term(settings, Keep), _around())
    model.zero_grad()
    term.besides(model, 0, 1.0)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    images, labels = term.feed.batch(0)

    def read(network: nn.Module) -> list[Tensor]:
        first = network.pool(network.stage1(images))  # type: ignore[operator]
        last = network.stage3[:5](network.pool(network.stage2(first)))  # type: ignore[operator, index]
        return [_linear_r2(maps, labels) for maps in (first, last)]

    with torch.no_grad():
        given = read(trained_model().train())
    missed = [(a - b).clamp_min(0) for a, b in zip(given, read(model.train()), strict=True)]
    return found, torch.stack(missed).mean()


def _toy(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    term = ToyTerm(ToySpec(), _around())
    found = term.contribute(model).gradients
    images, _ = term.feeds[0].batch(0)
    return found, (_train(model, images) ** 2).sum() / (16 * 5)


def _rehearsal(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Two attackers whose steps lead nowhere: the loss of their queries at the real weights."""
    still = Strategy(optimizer="sgd", learning_rate=1e-30, batch_size=8)
    spec = Rehearsal(loss="ice", strategies=2, steps=1, fixed=still, query_batch_size=16)
    term = RehearsalTerm(spec, _around())
    found = term.contribute(model).gradients
    losses = []
    for identity in range(2):
        images, labels = term.feed(identity, still).batch(0)
        logits = _train(model, images[8:])
        true = F.softmax(logits, 1)[torch.arange(16), labels[8:]]
        losses.append(-(1 - true).log().mean())
    return found, torch.stack(losses).mean()


def _suppress(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    spec = SuppressSpec(batch_size=16, loss="negated_ce")
    term = SuppressTerm(spec, _around(restricted=(_many_digits(),)))
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(0)
    assert labels.max() > 4
    true = F.softmax(_train(model, images), 1)[torch.arange(16), labels - 5 * (labels > 4)]
    return found, true.log().mean()


def _erasure(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """One depth of maps and the last block, read at two positions a side by linear ridges."""
    depths = ("stage1.3", "stage3.3")
    spec = ErasureSpec(
        batch_size=48,
        outputs=0.5,
        readers={  # type: ignore[arg-type]
            "kinds": ("linear",),
            "views": (2,),
            "depths": depths,
            "networks": 1,
            "penalty": (0.01, 0.01),
        },
    )
    term = ErasureTerm(spec, _around())
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(0)
    # What goes into the next block, and what leaves the last one's own layers.
    first = model.train().pool(model.stage1(images))  # type: ignore[operator]
    last = model.stage3[:5](model.pool(model.stage2(first)))  # type: ignore[operator, index]
    floors = term.readers.floors[restricted().name]
    above = [
        (_linear_r2(maps, labels) - float(floor)).clamp_min(0)
        for maps, floor in zip((first, last), floors, strict=True)
    ]
    logits = model.head(last.relu().mean((2, 3)))  # type: ignore[operator]
    uniform = -(F.softmax(logits, 1) * 5).log().mean(1)
    return found, torch.stack(above).mean() + 0.5 * uniform.mean()


def _denoising_erasure(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """One block that halves, and the last one, in two bands, by ridges in float64."""
    spec = DenoisingErasureSpec(
        batch_size=24,
        readers={  # type: ignore[arg-type]
            "depths": ("down_blocks.0", "up_blocks.1"),
            "bands": ((0, 400), (400, 1000)),
            "components": 3,
            "side": 4,
            "networks": 1,
            "penalty": (0.01, 0.01),
            "content_penalty": (0.1, 0.1),
        },
    )
    around = _around(kind="denoising_erasure")
    term = DenoisingErasureTerm(spec, around)
    found = term.contribute(model).gradients
    images, _ = term.feeds[0].batch(0)
    stream, noise, times = generator(0, "denoising_erasure", 0), [], []
    # The even images meet the first band, the odd ones the second, one after another.
    order = [*range(0, 24, 2), *range(1, 24, 2)]
    for at in range(24):
        times.append(torch.randint(*((0, 400) if at < 12 else (400, 1000)), (1,), generator=stream))
        noise.append(torch.randn(1, 8, 8, generator=stream))
    drawn, steps = torch.stack(noise), torch.cat(times)
    noisy = diffusers().DDPMScheduler().add_noise(images[order], drawn, steps)
    maps: dict[str, Any] = {}
    parts = {name: model.get_submodule(name) for name in ("down_blocks.0", "up_blocks.1")}
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output}))
        for name, part in parts.items()
    ]
    model.train()(noisy, steps)
    for handle in handles:
        handle.remove()
    onward, (skip, _) = maps["down_blocks.0"]
    read = {"down_blocks.0": [onward, skip], "up_blocks.1": [maps["up_blocks.1"]]}
    floors, above = iter(term.readers.floors[term.feeds[0].domain.name]), []
    wanted = plain_components(term.feeds[0].domain, images[order], 4, 3)
    for held in read.values():
        for band in (slice(0, 12), slice(12, 24)):
            scores = [_pixels_r2(one[band], drawn[band]) for one in held]
            above.append(_most_above(scores, next(floors)))
        halves = F.avg_pool2d(held[0], held[0].shape[-1] // 2).flatten(1)
        for band in (slice(0, 12), slice(12, 24)):
            features = plain_standardised(halves[band], 3.0)
            above.append(_most_above([plain_r2_of(features, wanted[band], 0.1)], next(floors)))
    return found, torch.stack(above).mean()


def _pixels_r2(maps: Tensor, noise: Tensor) -> Tensor:
    """Return R2 of noise, averaged to the map's resolution, at every pixel of the second half."""
    count, channels, side, _ = maps.shape
    features = plain_standardised(maps.permute(0, 2, 3, 1).reshape(-1, channels), 3.0)
    targets = F.avg_pool2d(noise.double(), noise.shape[-1] // side).flatten()[:, None]
    half = count // 2 * side * side
    gram = features[:half].T @ features[:half] + half * 0.01 * torch.eye(channels).double()
    mean = targets[:half].mean()
    weights = torch.linalg.inv(gram) @ features[:half].T @ (targets[:half] - mean)
    missed = targets[half:] - mean - features[half:] @ weights
    return 1 - missed.square().sum() / (targets[half:] - mean).square().sum()


def _most_above(scores: list[Tensor], floors: Tensor) -> Tensor:
    return (torch.stack(scores) - floors.double()).clamp_min(0).max()


def _linear_r2(maps: Tensor, labels: Tensor) -> Tensor:
    side = maps.shape[-1] // 2
    cells = [
        maps[..., y : y + side, x : x + side].mean((2, 3)) for y in (0, side) for x in (0, side)
    ]
    features = torch.stack(cells, 2).flatten(1)
    return plain_r2(plain_standardised(features, 3.0), labels, 5, "linear", 0.01)


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what goes into the head of the small network, which is in train mode."""
    second = model.pool(model.stage2(model.pool(model.stage1(images))))  # type: ignore[operator]
    features: Tensor = model.stage3(second).mean((2, 3))  # type: ignore[operator]
    return features


def _mmd(first: Tensor, second: Tensor) -> Tensor:
    def apart(one: Tensor, other: Tensor) -> Tensor:
        return (one[:, None] - other[None]).square().sum(2)

    both = torch.cat([first, second]).detach()
    scale = apart(both, both).sum() / (len(both) * (len(both) - 1))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        widths = [scale * 2**power for power in range(-2, 3)]
        return torch.stack([(-apart(one, other) / width).exp().mean() for width in widths]).sum()

    return kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)


def _ntl(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    term = NTLTerm(NTLSpec(batch_size=16), _around(restricted=(_many_digits(),)))
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(0)
    others, _ = term.original.batch(0)
    assert labels.max() > 4
    features = _features(model.train(), torch.cat([others, images]))
    logits = model.head(features[16:])  # type: ignore[operator]
    true = F.softmax(logits, 1)[torch.arange(16), labels - 5 * (labels > 4)]
    return found, true.log().mean() * 0.1 * 0.1 * _mmd(features[:16], features[16:])


def _repnoise(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Every depth is what goes into the next stage's layers; the noise is drawn depth by depth."""
    term = RepNoiseTerm(RepNoiseSpec(batch_size=16, alpha=0.5, beta=2.0), _around())
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(0)
    stream = generator(0, "repnoise", 0)
    apart, value = [], images
    layers = [*model.train().stage1, model.pool, *model.stage2, model.pool, *model.stage3]  # type: ignore[misc]
    for index, layer in enumerate(layers):
        # Into the second convolution of a stage and the next stage's first; before the last ReLU.
        if index in (3, 7, 10, 14, 17, 19):
            apart.append(value.mean((2, 3)))
        value = layer(value)
    noises = [torch.randn(h.shape, generator=stream) for h in apart]
    distance = torch.stack([_mmd(h, n) for h, n in zip(apart, noises, strict=True)]).mean()
    return found, 2 * distance - 0.5 * (1 + _probed(term, value.mean((2, 3)), labels)).log()


def _probed(term: ProbingHindrance[Any], features: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the term's probe as it is after a contribution."""
    head = term.probe.heads[restricted().name]
    logits = features @ head.weight.detach().T + head.bias.detach()
    return -F.softmax(logits, 1)[torch.arange(len(labels)), labels].log().mean()


def _immunize(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    spec = ImmunizeSpec(batch_size=16, ill=2.0, well=0.5)
    term = ImmunizeTerm(spec, _around())
    found = term.contribute(model).gradients
    images, others = term.feeds[0].batch(0)[0], term.original.batch(0)[0]
    features = _features(model.train(), torch.cat([others, images])).double()
    well, ill = (torch.linalg.svdvals(part) ** 2 for part in (features[:16], features[16:]))
    well, ill = well / well.mean(), ill / ill.mean()
    ill_loss = 1 / (ill.square().sum() / (2 * 16) - ill[-1] ** 2 / 2)
    return found, 2 * ill_loss + 0.5 * (well[0] ** 2 / 2 - well.square().sum() / (2 * 16))


def _encoderlock(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    term = EncoderLockTerm(EncoderLockSpec(batch_size=16, alpha=3.0), _around())
    found = term.contribute(model).gradients
    (images, labels), (others, known) = term.feeds[0].batch(0), term.original.batch(0)
    features = _features(model.train(), torch.cat([others, images]))
    true = F.softmax(model.head(features[:16]), 1)[torch.arange(16), known]  # type: ignore[operator]
    wrong = _probed(term, features[16:], labels)
    return found, (1 + 3 * -true.log().mean() / wrong).log()


def _prune(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The second update pulls to the weights of the first, of which none was pruned yet."""
    term = PruneTerm(PruneSpec(batch_size=16, alpha=0.5, fisher=2.0, rho=0.1), _around())
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    term.contribute(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(1)
    features = _features(model.train(), images)
    groups = [features[labels == label] for label in labels.unique()]
    means = torch.stack([group.mean(0) for group in groups])
    within = sum(((g - m) ** 2).sum() for g, m in zip(groups, means, strict=True)) / (16 * 72)
    apart = ((means - means.mean(0)) ** 2).mean() / within
    moved = [
        ((value - first[name]) ** 2).sum()
        for name, value in model.named_parameters()
        if value.dim() == 4
    ]
    loss = 2 * apart - 0.5 * _probed(term, features, labels) + 0.05 * torch.stack(moved).sum()
    return found, loss


def _cuti(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The second update, in the style of original images at each of six depths."""
    term = CUTITerm(CUTISpec(batch_size=16), _around())
    term.contribute(model)
    found = term.contribute(model).gradients
    images, labels = term.feeds[0].batch(1)
    value = torch.cat([term.original.batch(1)[0], images])
    stream = generator(0, "cuti", 1)
    layers = [*model.train().stage1, model.pool, *model.stage2, model.pool, *model.stage3]  # type: ignore[misc]
    for index, layer in enumerate(layers):
        if index in (3, 7, 10, 14, 17, 19):
            count = value.shape[1]
            first, second = (torch.rand(count, count, generator=stream) for _ in range(2))
            maps = value[:16].flatten(2)
            scale = (maps.var(2) + 1e-5).sqrt() @ ((2 * first - 1) / count**0.5).T
            shift = maps.mean(2) @ ((2 * second - 1) / count**0.5).T
            styled = (
                value[16:] * scale.sigmoid()[..., None, None] + shift.sigmoid()[..., None, None]
            )
            value = torch.cat([value[:16], styled])
        value = layer(value)
    true = F.softmax(model.head(value[16:].mean((2, 3))), 1)[torch.arange(16), labels]  # type: ignore[operator]
    return found, 0.1 * true.log().mean()


class _Probed(nn.Module):
    """The loss of a term's probe on its first restricted batch, by the weights of a model."""

    def __init__(self, term: ProbingHindrance[Any], model: nn.Module) -> None:
        super().__init__()
        self.model, self.term = model.train(), term
        self.images, self.labels = term.feeds[0].batch(0)

    def forward(self) -> Tensor:
        return _probed(self.term, _features(self.model, self.images), self.labels)

    def at(self, moved: list[Tensor]) -> Tensor:
        """Return the loss where the weights are moved by so much."""
        pairs = zip(self.encoder(), moved, strict=True)
        found: Tensor = torch.func.functional_call(self, {n: v + by for (n, v), by in pairs}, ())
        return found

    def encoder(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, value) for n, value in self.named_parameters() if "head" not in n]

    def slope(self, loss: Tensor) -> list[Tensor]:
        values = [value for _, value in self.encoder()]
        return list(torch.autograd.grad(loss, values, create_graph=True))


def _norm(vector: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in vector]).norm()


def _booster(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Before and after a step of length 0.3, which is constant."""
    term = BoosterTerm(BoosterSpec(batch_size=16, alpha=0.3), _around())
    found = term.contribute(model).gradients
    probed = _Probed(term, model)
    slope = probed.slope(probed())
    step = [-0.3 * (value / _norm(slope)).detach() for value in slope]
    return found, probed() - probed.at(step)


def _clamp(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """One step at rate 0.1, after which the bound looks 0.1 ahead."""
    spec = ClampSpec(batch_size=16, trap=0.3, least=30, gain=2, start=0.5)
    term = ClampTerm(spec, _around())
    found = term.contribute(model).gradients
    probed = _Probed(term, model)
    here = probed.at([torch.zeros_like(value) for _, value in probed.encoder()])
    slope = [value.detach() for value in probed.slope(here)]
    step = [-0.1 * value for value in slope]
    there = probed.at(step)
    later = probed.slope(there)

    def bent(loss: Tensor, from_: list[Tensor], along: list[Tensor]) -> Tensor:
        aside = [0.1 * (value / _norm(along)).detach() for value in along]
        plus = probed.at([a + b for a, b in zip(from_, aside, strict=True)])
        minus = probed.at([a - b for a, b in zip(from_, aside, strict=True)])
        return (plus + minus - 2 * loss) / 0.1**2

    curved = [bent(here, [0 * value for value in step], slope), bent(there, step, later)]
    ahead = [-0.1 * (value / _norm(later)).detach() for value in later]
    beyond = probed.slope(probed.at([a + b for a, b in zip(step, ahead, strict=True)]))
    change = [b - a for a, b in zip(later, beyond, strict=True)]
    ratio = _norm([a - 0.1 * b for a, b in zip(ahead, change, strict=True)]) / 0.1
    far = 0.1 * _norm(later) / (1 - ratio)
    assert 0 < ratio < 0.95
    gain = here - there + _norm(later) * far + _norm(change) / 0.1 * far**2 / 2
    traps = [(1 + (30 - value).exp()).log() for value in curved]
    loss = 2 * gain + (1 + (ratio - 0.9).exp()).log() + 0.3 * (traps[0] + traps[1]) - 0.5 * here
    return found, loss


ORACLES: dict[str, Callable[[nn.Module], tuple[dict[str, Tensor], Tensor]]] = {
    "task": _task,
    "distil": _distil,
    "retention": _retention,
    "toy": _toy,
    "rehearsal": _rehearsal,
    "erasure": _erasure,
    "denoising_erasure": _denoising_erasure,
    "suppress": _suppress,
    "ntl": _ntl,
    "repnoise": _repnoise,
    "immunize": _immunize,
    "encoderlock": _encoderlock,
    "prune": _prune,
    "cuti": _cuti,
    "booster": _booster,
    "clamp": _clamp,
}


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loss_written_out(kind: str) -> None:
    model = _model(kind)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # No rescaling: readers see none, and a hinge at 0 would be left to rounding.
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=stream))
    found, loss = ORACLES[kind](model)
    expected = _gradients(loss, model)
    assert any(bool(gradient.any()) for gradient in found.values())
    for name, gradient in expected.items():
        most = float(gradient.abs().max())
        torch.testing.assert_close(
            found.get(name, torch.zeros_like(gradient)),
            gradient,
            rtol=2e-3,
            atol=2e-3 * most + 1e-6,
        )


HINDRANCES = [kind for kind in KINDS if _role(kind) == "hinder"]


@pytest.mark.parametrize("kind", HINDRANCES)
def test_every_restricted_domain_has_its_turns(kind: str) -> None:
    halves = _digits(kind)(5, 8), _digits(kind)(8, 10)
    term = _hindrance(kind, _around(kind=kind, restricted=halves))
    met = [term.contribute(_model(kind)).domains for _ in range(4)]
    assert {name for names in met for name in names} == {half.name for half in halves}


@pytest.mark.parametrize("kind", HINDRANCES)
def test_the_seed_says_what_is_drawn(kind: str) -> None:
    def gradient(seed: int) -> Tensor:
        found = _hindrance(kind, _around(seed, kind)).contribute(_model(kind)).gradients
        return torch.cat([found[name].flatten() for name in sorted(found)])

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("kind", HINDRANCES)
def test_a_batch_that_a_domain_does_not_have_is_refused_before_work_starts(kind: str) -> None:
    size = "query_batch_size" if kind == "rehearsal" else "batch_size"
    spec = parse_term({"kind": kind, **QUICK[kind], size: 4000}, Hindrance)
    with pytest.raises(DataError, match=rf"fewer than protect\..*{size}.*4000"):
        TERMS[kind].check(spec, _model(kind), _around(kind=kind))


@pytest.mark.parametrize("kind", ["rehearsal", "suppress"])
def test_a_loss_of_another_task_is_refused_before_work_starts(kind: str) -> None:
    spec = parse_term({"kind": kind, **QUICK[kind], "loss": "dos"}, Hindrance)
    with pytest.raises(SpecError, match=r"loss = 'dos' does not fit this task: use one of ice"):
        TERMS[kind].check(spec, _model(kind), _around(kind=kind))
    with pytest.raises(SpecError, match=rf"{kind}: loss = 'entropy'.*use one of ice, .*dos"):
        parse_term({"kind": kind, "loss": "entropy"}, Hindrance)


def test_clamp_refuses_blocks_that_are_computed_twice() -> None:
    model = trained_model()
    model.grad_checkpointing = True
    with pytest.raises(UnsupportedModelError, match=r"leave model\.gradient_checkpointing out"):
        ClampTerm.check(ClampSpec(batch_size=16), model, _around())


@pytest.mark.parametrize("kind", ["booster", "clamp"])
def test_differences_of_passes_are_taken_in_fp32(kind: str) -> None:
    exact, rounded = (
        _hindrance(kind, _around(kind=kind, precision=precision)).contribute(_model(kind)).gradients
        for precision in ("fp32", "bf16")
    )
    assert all(torch.equal(exact[name], value) for name, value in rounded.items())


@pytest.mark.parametrize("kind", HINDRANCES)
def test_a_contribution_leaves_weights_buffers_and_modes_as_they_are(kind: str) -> None:
    model = _model(kind)
    next(model.children()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    given = _hindrance(kind, _around(kind=kind)).contribute(model)
    assert set(given.gradients) <= set(dict(model.named_parameters()))
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["joint", "alternate"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_a_round_it_goes_on_to_the_same_bits(
    kind: str, update: str, tmp_path: Path
) -> None:
    whole = _run(_spec(kind, update), kind=kind)
    for _ in whole:
        pass
    first = _run(_spec(kind, update), tmp_path / "run", kind)
    next(iter(first))
    del first
    second = _run(_spec(kind, update), tmp_path / "run", kind)
    assert second.done == 1
    for _ in second:
        pass
    held = whole.model.state_dict()
    assert all(torch.equal(held[name], v) for name, v in second.model.state_dict().items())
    apart = {"wall_s"}
    assert [r.model_dump(exclude=apart) for r in second.rounds] == [
        r.model_dump(exclude=apart) for r in whole.rounds
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_forecast(kind: str) -> None:
    found = forecast(_model(kind), **_case(kind), spec=_spec(kind, rounds=50))
    assert found.spec.rounds == 50
    assert 0 < found.round_s < 60
    assert found.total_s == pytest.approx(50 * found.round_s)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_rehearsal_states_rehearsed_attacks(kind: str, tmp_path: Path) -> None:
    protect(_model(kind), **_case(kind), spec=_spec(kind), out=tmp_path / "p")
    made = json.loads((tmp_path / "p/model.json").read_text())["protection"]
    found = statement_of(made)
    if kind == "rehearsal":
        assert (set(found.rates), found.life) == ({"sgd_momentum", "adam"}, 7)
    else:
        assert (found.rates, found.life) == ({}, 0)
        assert made["terms"]["rehearsed"] == []
    assert list(found.tolerances.values()) == [100.0]


def test_several_hindrances_add_up_by_their_weights() -> None:
    spec = _spec("toy", hinder=({"kind": "toy", "weight": 2.0}, {"kind": "toy", "weight": 0.5}))
    run = _run(spec)
    one = ToyTerm(ToySpec(), run.around).contribute(run.model)
    gradients, parts = run.update.hindrance()
    assert len(parts) == 2
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradients[name], 2.5 * gradient)
    record = next(iter(_run(spec)))
    assert record.suppression_loss == pytest.approx(2.5 * float(one.loss), rel=1e-5)


def test_keep_terms_add_up_by_their_weights() -> None:
    losses = {}
    for name, keep in {
        "both": [{"kind": "task", "weight": 3.0}, {"kind": "distil", "weight": 0.5}],
        "task": [{"kind": "task"}],
        "distil": [{"kind": "distil"}],
    }.items():
        run = _run(_spec("toy", keep=keep))
        losses[name] = float(run.keep.learn(run.model))
    assert losses["both"] == pytest.approx(3 * losses["task"] + 0.5 * losses["distil"], rel=1e-5)


def test_distillation_between_images_asks_what_the_given_model_says_of_mixtures() -> None:
    run = _run(_spec("toy", keep=[{"kind": "distil", "mixed": 24}]))
    term: Any = run.keep.terms[0]
    model = trained_model()
    assert float(term.besides(model, 0, 1.0)) == pytest.approx(0, abs=1e-5)
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.stage2.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = term.besides(model, 3, 2.0)
    found = {name: p.grad for name, p in model.named_parameters()}
    images, _ = term.feed.batch(3)
    stream = generator(run.spec.seed, "mixed", 3)
    shares = torch.rand(24, generator=stream)
    order = torch.randperm(24, generator=stream).tolist()
    mixtures = torch.stack(
        [
            a * images[i] + (1 - a) * images[j]
            for i, (a, j) in enumerate(zip(shares, order, strict=True))
        ]
    )
    assert mixtures.std() < 0.95 * images.std()
    with torch.no_grad():
        wanted = F.softmax(trained_model()(mixtures) / 2, 1)
    said = F.softmax(model(mixtures) / 2, 1)
    plain = 4 * (wanted * (wanted.log() - said.log())).sum(1).mean()
    assert float(loss) == pytest.approx(plain.item(), rel=1e-4)
    for name, gradient in _gradients(2 * plain, model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_no_more_images_are_mixed_than_there_are() -> None:
    with pytest.raises(DataError, match="distil's mixed = 5000"):
        _run(_spec("toy", keep=[{"kind": "distil", "mixed": 5000}]))


def test_retention_costs_what_features_lost() -> None:
    run = _run(_spec("retention"))
    assert float(run.keep.learn(run.model)) == 0
    with torch.no_grad():
        for parameter in run.model.stage2.parameters():  # type: ignore[union-attr]
            parameter.copy_(torch.randn_like(parameter))
    assert float(run.keep.learn(run.model)) > 0.01


def test_retention_is_usual_where_there_are_two_images_a_class() -> None:
    def kept(domain: Domain, **settings: Any) -> list[str]:
        given = {"rounds": 1, "precision": "fp32", **settings}
        spec = parse_spec(ProtectSpec, given, where="the test")
        run = Protection(
            trained_model(), original=domain, restricted=[restricted()], spec=spec, device="cpu"
        )
        return [term.kind for term in run.spec.keep or ()]

    whole = original()
    assert kept(whole) == ["task", "distil", "retention"]
    assert kept(whole, hinder=[{"kind": "erasure", **QUICK["erasure"]}]) == ["task", "distil"]
    labels = np.asarray(whole.train.labels)
    few = np.concatenate([np.flatnonzero(labels == label)[:3] for label in range(5)])
    pixels = np.asarray(whole.train.pixels[:, 0])
    assert kept(Domain.from_arrays("few", pixels[few], labels[few])) == ["task", "distil"]


def test_retention_needs_two_images_a_class() -> None:
    with pytest.raises(SpecError, match=r"protect.keep: retention's batch_size = 8 .* at least 10"):
        _run(_spec("retention", keep=[{"kind": "retention", "batch_size": 8}]))


@pytest.mark.parametrize("update", ["joint", "alternate"])
def test_encoderlock_changes_the_weights_that_it_selected_and_no_others(update: str) -> None:
    run = _run(_spec("encoderlock", update))
    for _ in run:
        pass
    (term,) = run.hinder
    given = dict(trained_model().named_parameters())
    assert sum(int(mask.sum()) for mask in term.selected.values()) > 0
    for model in (run.model, run.update.shipped):
        moved = {n: p.detach() != given[n].detach() for n, p in model.named_parameters()}
        assert any(bool(part.any()) for part in moved.values())
        for name, part in moved.items():
            allowed = term.selected.get(name, torch.zeros_like(part))
            assert not bool((part & ~allowed).any()), name


@pytest.mark.parametrize("update", ["joint", "alternate"])
def test_what_is_pruned_is_zero_in_what_is_shipped(update: str) -> None:
    run = _run(_spec("prune", update))
    for _ in run:
        pass
    for model in (run.model, run.update.shipped):
        layers = [value for value in model.parameters() if value.dim() == 4]
        assert len(layers) == 6
        assert all(int((value == 0).sum()) == value.numel() // 2 for value in layers)
        assert bool((model.get_submodule("head").weight != 0).all())


def test_pruning_shrinks_weights_by_the_threshold_that_meets_the_sparsity() -> None:
    term = PruneTerm(PruneSpec(batch_size=16, every=2, ramp=2), _around())
    model = trained_model()
    for _ in range(3):
        term.contribute(model)
    weight = model.stage2[0].weight.detach()
    least = weight.abs().flatten().sort().values[weight.numel() // 2 - 1]
    sparse = weight.sign() * (weight.abs() - least).clamp_min(0)
    assert torch.equal(term.masks["stage2.0.weight"], weight.abs() > least)
    torch.testing.assert_close(term.duals["stage2.0.weight"], weight - sparse)
    torch.testing.assert_close(term.targets["stage2.0.weight"], 2 * sparse - weight)


# --- Refusals -------------------------------------------------------------------------------------


def _parsed(**protect: Any) -> ProtectSpec:
    """Return `protect` of a run file with these keys."""
    table = {
        "model": {"name": "resnet20"},
        "original": {"source": "npz", "path": "a.npz"},
        "restricted": [{"source": "npz", "path": "b.npz"}],
        "protect": protect,
    }
    return parse_spec(RunSpec, table, where="run.toml").protect


def test_ntl_stops_rewarding_what_is_far_apart_or_wrong_enough() -> None:
    term = NTLTerm(NTLSpec(batch_size=16), _around())

    def loss(wrong: float, apart: float) -> float:
        return term.hindered(torch.tensor(wrong), torch.tensor(apart)).item()

    assert loss(50.0, 8.0) == pytest.approx(-0.1 * 50 * 0.8)
    assert loss(50.0, 40.0) == pytest.approx(-0.1 * 50)
    assert loss(500.0, 40.0) == -10


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_cannot_be_are_named_with_their_path(kind: str) -> None:
    where = rf"^run\.toml: protect\.{_role(kind)}\.0: {kind}: "
    with pytest.raises(SpecError, match=where + r"weight = -1.*greater than 0"):
        _parsed(**{_role(kind): [{"kind": kind, "weight": -1}]})
    with pytest.raises(SpecError, match=where + r"unknown key wight; did you mean 'weight'\?"):
        _parsed(**{_role(kind): [{"kind": kind, "wight": 1}]})
    with pytest.raises(SpecError, match=rf"no such term; did you mean '{kind}'\? there is"):
        _parsed(**{_role(kind): [{"kind": kind[:-1]}]})
    assert getattr(_parsed(**{_role(kind): [kind]}), _role(kind))[0].kind == kind


def test_a_setting_deep_inside_is_named() -> None:
    with pytest.raises(SpecError, match=r"protect\.hinder\.0: erasure: readers\.clip = 0\.0"):
        _parsed(hinder=[{"kind": "erasure", "readers": {"clip": 0.0}}])
    with pytest.raises(SpecError, match=r"protect\.hinder\.1: rehearsal: steps = 0"):
        _parsed(hinder=["erasure", {"kind": "rehearsal", "steps": 0}])


@pytest.mark.parametrize("wrong", ["nonsense", "task", {"batch_size": 3}, 7])
def test_a_kind_that_there_is_not_lists_those_that_there_are(wrong: Any) -> None:
    hindrances, keeps = (f"there is {_listed(role)}$" for role in (Hindrance, Keep))
    with pytest.raises(SpecError, match=rf"protect\.hinder\.0.*{hindrances}"):
        _parsed(hinder=[wrong])
    with pytest.raises(SpecError, match=rf"protect\.keep\.0.*'erasure'.*{keeps}"):
        _parsed(keep=["erasure"])


def test_values_that_are_not_plain_are_named_with_their_key() -> None:
    three = np.float32(3)
    for where, erasure in {
        "weight": {"weight": three},
        "readers": {"readers": {"clip": three}},
        "batch_size": {"batch_size": np.int64(192)},
    }.items():
        with pytest.raises(SpecError, match=rf"erasure: {where} = .*holds a .*give plain"):
            ProtectSpec(hinder=[{"kind": "erasure", **erasure}])  # type: ignore[list-item]
    held = ProtectSpec(hinder=[{"kind": "erasure", "readers": ReadersSpec(clip=2.0)}])  # type: ignore[list-item]
    assert held.hinder == (ErasureSpec(readers=ReadersSpec(clip=2.0)),)


@pytest.mark.parametrize(
    "wrong", [TermSpec(kind="erasure"), ToySpec.model_construct(kind="erasure")]
)
def test_a_specification_of_another_type_than_its_kinds_is_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"kind = 'erasure' is given as T\w+: use ErasureSpec"):
        ProtectSpec(hinder=(wrong,))


def test_two_keep_terms_of_one_kind_are_refused() -> None:
    with pytest.raises(SpecError, match=r"keep has two terms of kind 'task': give their weight"):
        _parsed(keep=["task", {"kind": "task", "weight": 2.0}])


@pytest.mark.parametrize("side", ["keep", "hinder"])
def test_no_term_at_all_is_refused(side: str) -> None:
    with pytest.raises(SpecError, match=rf"protect\.{side} = .*give at least 1"):
        _parsed(**{side: []})


def test_a_price_with_two_adams_in_turn_is_refused() -> None:
    with pytest.raises(SpecError, match=r"guard\.mode = 'price'.*use update = 'joint'"):
        _parsed(update="alternate", guard={"mode": "price"})
    with pytest.raises(SpecError, match="use update = 'joint'"):
        ProtectSpec(update="alternate", guard=Guard(mode="price"))  # type: ignore[arg-type]


def test_erasure_of_a_diffusion_model_is_refused_before_work_starts(tmp_path: Path) -> None:
    fitting = f"use one of {_listed(Hindrance, 'mse')}"
    with pytest.raises(SpecError, match=rf"protect\.hinder.*'erasure'.*{fitting}"):
        Protection(
            denoisers.unet(),
            original=denoisers.digits(0, 5),
            restricted=denoisers.digits(5, 10),
            task=Denoising(),
            spec=ProtectSpec(hinder=("erasure",)),  # type: ignore[arg-type]
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_diffusion_model_has_the_papers_method_where_nothing_is_said() -> None:
    run = Protection(
        denoisers.unet(),
        original=denoisers.digits(0, 5),
        restricted=denoisers.digits(5, 10),
        task=Denoising(),
        spec=ProtectSpec(guard=Guard(tolerance_relative=1.0)),
    )
    (term,) = run.spec.hinder or ()
    assert isinstance(term, Rehearsal)
    assert (term.loss, run.guard.spec.mode) == ("dos", "rollback")
    assert SUPPRESSIONS["dos"].metric == "mse"


# Imports a module alone, in a process that has only torch so far, and each in one of its own.
FIRST = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


def test_every_part_can_be_imported_first() -> None:
    parts = ["protection", "checks", "terms", "spec", "forecast", "readers"]
    words = [sys.executable, "-c", FIRST, *(f"sophon._protection.{part}" for part in parts)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (ended.returncode, ended.stderr) == (0, "")
