"""What people hand over as their model: it runs, or one line names the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

import sophon
from builders import Double, original, quick_spec, restricted, trained_model
from sophon._base.errors import SpecError, UnsupportedModelError
from sophon._data.domain import several
from sophon._models import require_peft
from sophon._models.networks import SmallConvNet


def with_adapters() -> nn.Module:
    peft = require_peft()
    config = peft.LoraConfig(target_modules=["stage1.0"], modules_to_save=["head"])
    model: nn.Module = peft.get_peft_model(trained_model(), config)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return SmallConvNet(classes=5, in_channels=1)


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "fp16": (lambda: trained_model().half(), r"float16 .*model\.float\(\)"),
    "bf16": (lambda: trained_model().bfloat16(), r"bfloat16 .*model\.float\(\)"),
    "fp64": (lambda: trained_model().double(), r"float64 .*model\.float\(\)"),
    "peft": (with_adapters, r"merge_and_unload\(\)"),
    "meta": (on_meta, r"stage1\.0\.weight is on the meta device"),
    "class": (lambda: SmallConvNet, r"is the class SmallConvNet: give an instance"),
    "name": (lambda: "resnet18", r"'resnet18': give a torch\.nn\.Module"),
    "state": (lambda: trained_model().state_dict(), r"give a torch\.nn\.Module"),
    "compiled": (lambda: torch.compile(trained_model(), backend="eager"), r"model\._orig_mod"),
    "parallel": (lambda: nn.DataParallel(trained_model()), r"model\.module"),
    "averaged": (lambda: AveragedModel(trained_model()), r"model\.module"),
    "script": (lambda: torch.jit.trace(trained_model(), torch.zeros(1, 1, 8, 8)), "TorchScript"),
    "lazy": (lazy, r"0\.weight has no shape yet: run a batch"),
}


ROLES: dict[str, Callable[[Any], Any]] = {
    "protect": lambda m: sophon.Protection(m, original=original(), restricted=restricted()),
    "audit": lambda m: sophon.Audit(m, original=original(), restricted=restricted()),
    "pretrain": lambda m: sophon.Pretraining(m, original=original()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_cannot_be_trained_are_refused_with_the_remedy(kind: str) -> None:
    make, said = MODELS[kind]
    model = make()
    for call in ROLES.values():
        with pytest.raises(UnsupportedModelError, match=said) as raised:
            call(model)
        assert len(str(raised.value)) <= 300
        assert "\n" not in str(raised.value)
    if kind == "lazy":
        assert is_lazy(model[0].weight)


def test_the_unprotected_model_is_looked_at_too() -> None:
    with pytest.raises(UnsupportedModelError, match="unprotected is the class SmallConvNet"):
        sophon.Audit(
            trained_model(),
            original=original(),
            restricted=restricted(),
            unprotected=SmallConvNet,  # type: ignore[arg-type]
        )


def test_a_network_that_casts_for_itself_is_taken_in_any_precision() -> None:
    run = sophon.Protection(
        Double(trained_model()), original=original(), restricted=restricted(), spec=quick_spec()
    )
    assert run.setting.head == "inner.head"


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "load": (lambda: sophon.load_domain("photos"), "'photos': give a DomainSpec"),  # type: ignore[arg-type]
    "resolve": (lambda: sophon.resolve_model("resnet18"), "'resnet18': give a ModelSpec"),  # type: ignore[arg-type]
    "report": (lambda: sophon.report("a1"), "'a1': give an AuditRecord"),  # type: ignore[arg-type]
    "original": (
        lambda: sophon.protect(trained_model(), original=None, restricted=restricted()),  # type: ignore[arg-type]
        "original = None: give a Domain",
    ),
    "restricted": (
        lambda: sophon.protect(trained_model(), original=original(), restricted=["photos"]),  # type: ignore[list-item]
        "restricted = 'photos': give a Domain",
    ),
    "no restricted": (
        lambda: sophon.audit(trained_model(), original=original(), restricted=None),  # type: ignore[arg-type]
        "restricted = None: give a Domain",
    ),
    "spec": (
        lambda: sophon.protect(
            trained_model(),
            original=original(),
            restricted=restricted(),
            spec={"rounds": 3},  # type: ignore[arg-type]
        ),
        r"spec = \{'rounds': 3\}: give a ProtectSpec",
    ),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_kinds_of_arguments_are_named(call: str) -> None:
    with pytest.raises(SpecError, match=WRONG[call][1]):
        WRONG[call][0]()


def test_several_domains_may_come_in_any_collection() -> None:
    one, other = original(), restricted()
    for given in ([one, other], (d for d in (one, other)), {1: one, 2: other}.values()):
        assert several(given) == (one, other)
    assert several(one) == (one,)
    assert several("text") == ("text",)
