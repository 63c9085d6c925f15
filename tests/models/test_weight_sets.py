"""Files of weights as frameworks leave them: wrapped, averaged, tied, nested."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sophon
from builders import original, quick_spec, restricted
from sophon import _models as models
from sophon._base.errors import CheckpointError, UnsupportedModelError
from sophon._models import building
from sophon._models.networks import SmallConvNet
from sophon._training.checkpoints import save_model

State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return SmallConvNet(classes=3).state_dict()


def under(prefix: str, held: State) -> State:
    return {prefix + key: value for key, value in held.items()}


def loaded(file: Path, **fields: Any) -> State:
    spec = sophon.ModelSpec(name="small_convnet", weights=file, **fields)
    return sophon.resolve_model(spec)[0].state_dict()


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[key], right[key]) for key in right)


def wrapped_by_fsdp(held: State) -> State:
    return {
        "_fsdp_wrapped_module." + key.replace("stage2.", "stage2._fsdp_wrapped_module."): value
        for key, value in held.items()
    }


WRAPPED = {
    "compile": lambda s: torch.compile(_with(s), backend="eager").state_dict(),
    "parallel": lambda s: nn.DataParallel(_with(s)).state_dict(),
    "compiled inside": lambda s: under("module._orig_mod.", s),
    "averaged": lambda s: AveragedModel(_with(s)).state_dict(),
    "fsdp": wrapped_by_fsdp,
    "checkpointed": lambda s: under("stage._checkpoint_wrapped_module.", s),
    "lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2"},
    "lightning with a loss": lambda s: {
        "state_dict": {**under("net.", s), "criterion.weight": torch.ones(3)}
    },
    "any": lambda s: under("my.own.encoder.", s),
}


def _with(held: State) -> nn.Module:
    model = SmallConvNet(classes=3)
    model.load_state_dict(held)
    return model


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_of_wrappers_are_dropped_and_said(
    kind: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held, file = state(1), tmp_path / f"w.{suffix}"
    content: Any = WRAPPED[kind](held)
    if suffix == "pt":
        torch.save(content, file)
    else:
        flat = content.get("state_dict", content)
        save_file({key: value.clone() for key, value in flat.items()}, file)
    assert same(loaded(file), held)
    (line,) = caplog.messages
    assert "dropped from names of weights" in line
    assert ("criterion.weight" in line) == (kind == "lightning with a loss")


@pytest.mark.parametrize("nest", ["model_state_dict", "params", "net"])
def test_weights_are_found_under_whatever_key(
    nest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = state(1)
    model = SmallConvNet(classes=3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {"epoch": 1, nest: held, "optimizer_state_dict": optimizer.state_dict(), "loss": 0.4}
    torch.save(content, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt"), held)
    assert not caplog.messages


SEVERAL = {
    "timm": (lambda r, a: {"state_dict_ema": a, "state_dict": r}, "state_dict_ema"),
    "torchvision": (
        lambda r, a: {"model": r, "model_ema": AveragedModel(_with(a)).state_dict(), "epoch": 2},
        "model_ema",
    ),
    "lightning": (
        lambda r, a: {"state_dict": {**under("ema_model.module.", a), **under("model.", r)}},
        "ema_model",
    ),
    "flat": (lambda r, a: {**under("ema.", a), **r}, "ema"),
    "contrastive": (
        lambda r, a: {**under("momentum_encoder.", a), **under("base_encoder.", r)},
        "momentum_encoder",
    ),
    "nested": (lambda r, a: {"state_dict": under("ema.", a), "network": r}, "ema"),
    "distilled": (lambda r, a: {"teacher": a, "student": r}, "teacher"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_raw_and_averaged_weights_either_can_be_had(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (make, key), file = SEVERAL[kind], tmp_path / "w.pt"
    raw, averaged = state(1), state(2)
    torch.save(make(raw, averaged), file)
    assert same(loaded(file), raw)
    (line,) = caplog.messages
    assert "several sets of weights" in line
    assert key in line
    assert "model.weights_key" in line
    caplog.clear()
    assert same(loaded(file, weights_key=key), averaged)
    assert not caplog.messages
    with pytest.raises(CheckpointError, match=rf"weights_key = 'other': .* there are: .*{key}"):
        loaded(file, weights_key="other")


def test_a_key_without_a_file_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"weights_key = 'ema' .*set model\.weights"):
        sophon.resolve_model(sophon.ModelSpec(name="small_convnet", weights_key="ema"))


def test_a_part_of_a_network_is_no_set_of_weights(tmp_path: Path) -> None:
    held = under("model.", {k: v for k, v in state().items() if not k.startswith("stage2")})
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="another architecture"):
        loaded(tmp_path / "w.pt")


class Tied(nn.Module):
    """Two layers of one weight, the second of which is declared first."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)
        self.inner = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 5)])
        self.inner[0].weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        held = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        logits: Tensor = self.inner[1](self.out(self.inner[0](held).relu()).relu())
        return logits


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    given = Tied()
    made = sophon.protect(
        given, original=original(), restricted=restricted(), spec=quick_spec(rounds=1), out=tmp_path
    )
    file = tmp_path / "model.safetensors"
    assert len(load_file(file)) == len(list(given.named_parameters()))
    model = Tied()
    load_model(model, file)
    assert model.inner[0].weight is model.out.weight
    assert models.weights_sha256(model) == models.weights_sha256(made.model)
    other = Tied()
    models.load_weights(other, load_file(file), source="w")
    assert other.inner[0].weight is other.out.weight
    assert models.weights_sha256(other) == models.weights_sha256(made.model)
    assert not torch.equal(given.out.weight, made.model.out.weight)  # type: ignore[union-attr]


def test_of_two_sets_of_tied_weights_either_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(building.NETWORKS, "tied", lambda *given: Tied())
    sets = [models.untied(Tied()) for _ in range(2)]
    torch.save(dict(zip(("model", "model_ema"), sets, strict=True)), tmp_path / "w.pt")
    for key, held in zip((None, "model_ema"), sets, strict=True):
        spec = sophon.ModelSpec(name="tied", weights=tmp_path / "w.pt", weights_key=key)
        found = models.untied(sophon.resolve_model(spec, default_classes=5)[0])
        assert all(torch.equal(found[name], value) for name, value in held.items())


def test_a_file_that_holds_itself_is_read_once(tmp_path: Path) -> None:
    held: dict[Any, Any] = {}
    held |= dict.fromkeys(range(200), held)
    torch.save(held | {"model": state()}, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt"), state())


def test_untied_networks_are_written_as_before(tmp_path: Path) -> None:
    model = _with(state())
    save_model(tmp_path, copy.deepcopy(model), {})
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
