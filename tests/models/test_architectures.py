"""The paper's classifiers: built, protected for a round, attacked for a step, saved, reloaded."""

from __future__ import annotations

import copy
import importlib
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cells import CLASSIFIERS, spec_of
from sophon import _models as models
from sophon._auditing.audit import Audit
from sophon._base.errors import CheckpointError, UnsupportedModelError
from sophon._base.seeding import seeded
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import Domain
from sophon._models import published
from sophon._models.networks import NETWORKS
from sophon._protection.protection import Protection
from sophon._protection.spec import ProtectSpec
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._specs import AuditSpec, Guard, ModelSpec, Strategy
from sophon._tasks import Denoising
from sophon._training.checkpoints import save_model
from sophon._training.loop import FineTuning

HEADS = {
    "timm:caformer_s18": "head.fc.fc2",
    "timm:resnet18": "fc",
    "torchvision:resnet50": "fc",
    "timm:vgg11_bn": "head.fc",
    "small_caformer": "head.fc.fc2",
}
# Two thirds of a VGG are its two wide layers before the head.
ARGUMENTS: dict[str, dict[str, Any]] = {"timm:vgg11_bn": {"mlp_ratio": 0.0625}}
# The networks of the paper's recipes, as they stand there.
PAPER = list(dict.fromkeys(spec_of(cell).model.name for cell in CLASSIFIERS))
FULL_SIZE = {
    "timm:caformer_m36": "head.fc.fc2",
    "torchvision:resnet50": "fc",
    "torchvision:resnet34": "fc",
    "torchvision:resnet18": "fc",
    "torchvision:vgg16_bn": "classifier.6",
}
UNET_FILE = Path(__file__).resolve().parents[2] / "recipes/paper/ddpm-unet-32.json"


def one_round(batch: int, **changes: Any) -> ProtectSpec:
    """Return a protection of one round with one attacker of one step."""
    usual: dict[str, Any] = {
        "rounds": 1,
        "suppression": "klu",
        "original_batch_size": batch,
        "rehearsal": Rehearsal(
            strategies=1,
            steps=1,
            query_batch_size=batch,
            fixed=Strategy(optimizer="sgd", learning_rate=1e-4, batch_size=batch),
        ),
        "guard": Guard(tolerance_points=100.0, every=1),
        "precision": "fp32",
    }
    return ProtectSpec(**(usual | changes))


def images(name: str, size: int, seed: int) -> Domain:
    """Return two classes of noise around two levels of grey, `size` pixels a side."""
    random = np.random.default_rng(seed)
    count = 16 if size < 100 else 10
    labels = np.arange(count) % 2
    levels = np.where(labels == 0, 70, 180)[:, None, None, None]
    pixels = np.clip(random.normal(levels, 40, (count, size, size, 3)), 0, 255).astype(np.uint8)
    return Domain.from_arrays(name, pixels, labels)


def once_through(name: str, size: int, head: str, folder: Path) -> None:
    """Build, find the head, protect a round, attack a step, save and load into plain `nn`."""
    spec = ModelSpec(name=name, classes=2, arguments=ARGUMENTS.get(name, {}))
    with seeded(0, "architecture"):
        model, fresh = models.resolve_model(spec, base=folder)
    assert models.find_head(model, (3, size, size)) == head
    # The paper's recipes keep 224 pixels and refuse 32.
    original = images("kept", size, 0)
    restricted = images("refused", 32 if size > 100 else size, 1)
    before = models.weights_sha256(model)
    batch = 4 if size < 100 else 2
    run = Protection(
        model,
        original=original,
        restricted=restricted,
        spec=one_round(batch),
        model_spec=spec,
    )
    rounds = list(run)
    protected = run.result().model
    assert len(rounds) == 1
    assert rounds[0].suppression_gradient_norm > 0
    assert models.weights_sha256(model) == before
    assert models.weights_sha256(protected) != before

    attack = attacked if size < 100 else one_step
    attack(protected, model, fresh, run, batch)
    del run

    save_model(folder, protected, {"model": spec.model_dump(mode="json")})
    plain = plainly(name)
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    batch = original.test.pixels[:2].float() / 255
    with torch.no_grad():
        assert torch.equal(plain.eval()(batch), protected.eval()(batch))


def attacked(
    protected: nn.Module, model: nn.Module, fresh: Any, run: Protection, batch: int
) -> None:
    """Run the first trial of an audit."""
    setting = run.setting
    audit = Audit(
        protected,
        unprotected=model,
        original=setting.original,
        restricted=setting.restricted,
        scratch=fresh,
        spec=AuditSpec(suite="quick-1", steps=2, evaluations=2, batch_size=batch, precision="fp32"),
    )
    assert next(iter(audit)).outcome.kind == "completed"


def one_step(
    protected: nn.Module, model: nn.Module, fresh: Any, run: Protection, batch: int
) -> None:
    """Take one step of an attack: an audit of a large network takes minutes."""
    del model, fresh
    setting, stream = run.setting, (0, ("attack",))
    (domain,) = setting.restricted
    feed = setting.feed(domain, domain.train, batch_size=batch, stream=stream)
    strategy = Strategy(optimizer="adam", learning_rate=1e-3, batch_size=batch)
    subject = setting.place(copy.deepcopy(protected))
    (step,) = FineTuning(subject, strategy, setting, feed, stream=stream).run(1)
    assert torch.isfinite(step.loss)
    assert models.weights_sha256(subject) != models.weights_sha256(protected)


def plainly(name: str) -> nn.Module:
    """Return the network from its own library, without sophon."""
    library, _, model = name.partition(":")
    prepare_torchvision()
    arguments = {"num_classes": 2, **ARGUMENTS.get(name, {})}
    if library == "timm":
        made: nn.Module = importlib.import_module("timm").create_model(model, **arguments)
        return made
    if library == "small_caformer":
        return NETWORKS[name](2, 3)
    built: nn.Module = importlib.import_module("torchvision.models").get_model(model, **arguments)
    return built


@pytest.mark.parametrize("name", HEADS)
def test_an_architecture_at_64_pixels(name: str, tmp_path: Path) -> None:
    once_through(name, 64, HEADS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_an_architecture_at_224_pixels(name: str, tmp_path: Path) -> None:
    once_through(name, 224, FULL_SIZE[name], tmp_path)


def test_the_papers_architectures_are_all_tried() -> None:
    assert sorted(PAPER) == sorted(FULL_SIZE)


def test_the_papers_diffusion_network_learns_from_an_image_of_its_size(tmp_path: Path) -> None:
    spec = ModelSpec(name=f"diffusers:{UNET_FILE}")
    model, _ = models.resolve_model(spec, base=tmp_path)
    assert models.find_head(model, (3, 32, 32)) == "conv_out"
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 30e6 < size < 40e6
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    task = Denoising()
    domain = Domain.from_arrays("faces", np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2)
    task.check(model, domain, (3, 32, 32), trained=True)
    stream = torch.Generator().manual_seed(1)
    outputs, targets = task.outputs(model.train(), images, torch.zeros(1).long(), stream)
    assert outputs.shape == images.shape
    task.loss(outputs, targets).mean().backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert len(norms) == len(list(model.parameters()))
    assert bool(torch.isfinite(torch.stack(norms)).all())
    assert max(norms) > 0


@pytest.mark.slow
def test_the_papers_diffusion_network_at_its_size(tmp_path: Path) -> None:
    """Protect it for a round, attack it for a step, save it and load it with diffusers alone."""
    model, fresh = models.resolve_model(ModelSpec(name=f"diffusers:{UNET_FILE}"), base=tmp_path)
    guard = Guard(tolerance_relative=100.0, every=1)
    spec = one_round(2, suppression="dos", guard=guard)
    run = Protection(
        model,
        original=images("kept", 32, 0),
        restricted=images("refused", 32, 1),
        task=Denoising(),
        spec=spec,
        out=tmp_path / "protected",
    )
    assert [held.suppression_gradient_norm > 0 for held in run] == [True]
    protected = run.result().model
    assert models.weights_sha256(protected) != models.weights_sha256(model)
    one_step(protected, model, fresh, run, 2)
    prepare_torchvision()
    pipelines: Any = importlib.import_module("diffusers")
    loaded = pipelines.DDPMPipeline.from_pretrained(tmp_path / "protected", local_files_only=True)
    assert models.weights_sha256(loaded.unet) == models.weights_sha256(protected)
    assert loaded.unet.config["attention_head_dim"] is None


# --- Narrower layers -------------------------------------------------------------------------


def test_arguments_make_a_narrower_network_and_are_kept(tmp_path: Path) -> None:
    spec = ModelSpec(name="timm:resnet18", classes=5, arguments={"channels": [8, 16, 32, 64]})
    model, factory = models.resolve_model(spec, base=tmp_path)
    assert model.get_submodule("fc").in_features == 64
    assert factory().state_dict().keys() == model.state_dict().keys()
    save_model(tmp_path, model, {"model": spec.model_dump(mode="json")})
    again, _ = models.resolve_model(ModelSpec(name=str(tmp_path)), base=tmp_path)
    assert models.weights_sha256(again) == models.weights_sha256(model)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("timm:resnet18", {"width": 3}, "width"),
        ("torchvision:resnet18", {"dims": [3]}, "dims"),
        ("resnet20", {"width": 3}, "takes none"),
    ],
)
def test_arguments_a_network_does_not_take_are_named(
    name: str, arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"model\.arguments.*{words}"):
        models.resolve_model(ModelSpec(name=name, arguments=arguments), base=tmp_path)


# --- Names and published weights --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm:caformer_m35", "timm:caformer_m36"),
        ("torchvision:vgg17_bn", "torchvision:vgg16_bn"),
        ("torchvision:resnet43", "torchvision:resnet34"),
        ("resnet34", "timm:resnet34, torchvision:resnet34"),
        ("caformer_m35", "timm:caformer_m36"),
        ("vgg17_bn", "torchvision:vgg1[69]_bn"),
    ],
)
def test_a_name_that_does_not_exist_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"did you mean.*{near}"):
        models.blueprint(ModelSpec(name=name)).build(2)


@pytest.mark.parametrize("name", ["timm:caformer_s18", "torchvision:vgg16_bn"])
@pytest.mark.parametrize("why", ["asked for", "no network"])
def test_published_weights_that_are_out_of_reach_are_said_at_once(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(place: Any, timeout: float) -> socket.socket:
        asked.append((place, timeout))
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(published.socket, "create_connection", refuse)
    monkeypatch.setattr(published, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if why == "asked for" else "0")
    words = "HF_HUB_OFFLINE is set" if why == "asked for" else "no route to host"
    remedy = r"give the file as model.weights and set model\.pretrained = false"
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*{remedy}") as caught:
        models.resolve_model(ModelSpec(name=name, pretrained=True), base=tmp_path)
    place = "models--timm--caformer_s18" if name.startswith("timm") else "checkpoints/vgg16_bn-"
    assert place in str(caught.value)
    assert str(tmp_path) in str(caught.value) or name.startswith("timm")
    # One question, with a short timeout, and no library that tries again.
    assert len(asked) == (why == "no network")
    assert all(timeout <= 5 for _, timeout in asked)


def test_published_weights_in_the_cache_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = plainly("torchvision:resnet18")
    source.fc = nn.Linear(512, 1000)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(source.state_dict(), folder / "resnet18-f37072fd.pth")
    monkeypatch.setattr(published, "require_reach", _never)
    spec = ModelSpec(name="torchvision:resnet18", pretrained=True)
    model, _ = models.resolve_model(spec, base=tmp_path)
    assert models.weights_sha256(model) == models.weights_sha256(source)


def test_whole_published_weights_that_do_not_fit_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(plainly("torchvision:resnet18").state_dict(), folder / "resnet18-f37072fd.pth")
    monkeypatch.setattr(published, "require_reach", _never)
    wide = ModelSpec(
        name="torchvision:resnet18", pretrained=True, arguments={"width_per_group": 128}
    )
    with pytest.raises(UnsupportedModelError) as caught:
        models.resolve_model(wide, base=tmp_path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("whole", ["a pickle", "an archive", "nothing"])
def test_a_partial_download_of_published_weights_is_told(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / "resnet18-f37072fd.pth"
    torch.save(
        plainly("torchvision:resnet18").state_dict(),
        file,
        _use_new_zipfile_serialization=whole == "an archive",
    )
    size = 0 if whole == "nothing" else file.stat().st_size // 3
    file.write_bytes(file.read_bytes()[:size])
    monkeypatch.setattr(published, "require_reach", _never)
    spec = ModelSpec(name="torchvision:resnet18", pretrained=True)
    with pytest.raises(
        UnsupportedModelError, match=r"resnet18-f37072fd\.pth are damaged or a partial"
    ):
        models.resolve_model(spec, base=tmp_path)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_file_of_published_weights_gets_a_head_of_the_classes_asked_for(
    name: str, tmp_path: Path
) -> None:
    narrow = {"channels": [8, 16, 32, 64]} if name.startswith("timm") else {}
    source = models.blueprint(ModelSpec(name=name, arguments=narrow)).build(1000)
    torch.save(source.state_dict(), tmp_path / "published.pth")
    spec = ModelSpec(name=name, arguments=narrow, weights="published.pth", classes=10)
    model, fresh = models.resolve_model(spec, base=tmp_path, default_classes=10)
    held, published = model.state_dict(), source.state_dict()
    different = {key for key in held if not torch.equal(held[key], published[key])}
    assert different == {"fc.weight", "fc.bias"}
    assert held["fc.weight"].shape[0] == fresh().state_dict()["fc.weight"].shape[0] == 10
    again, _ = models.resolve_model(spec, base=tmp_path)
    assert models.weights_sha256(again) == models.weights_sha256(model)
    # What differs elsewhere is of another architecture, whatever is asked for.
    spoilt = {**published, "conv1.weight": published["conv1.weight"][:, :2]}
    torch.save(spoilt, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"of another architecture.*conv1\.weight"):
        models.resolve_model(spec, base=tmp_path)


def test_a_proxy_is_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(published, "getproxies", lambda: {"https": f"http://127.0.0.1:{port}"})
    start = time.monotonic()
    published.require_reach("nowhere.invalid", "weights")
    server.close()
    assert time.monotonic() - start < published._REACH_S
    with pytest.raises(FileNotFoundError, match=r"127\.0\.0\.1 does not answer"):
        published.require_reach("nowhere.invalid", "weights")


def _never(host: str, what: str) -> None:
    raise AssertionError(f"{host} was asked although {what}")
