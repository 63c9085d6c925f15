"""Models: real weights, real timm and torchvision networks, heads, blocks, bad input."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from sophon import _models as models
from sophon._base.errors import (
    CheckpointError,
    DataError,
    SophonError,
    SpecError,
    UnsupportedModelError,
)
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._models.networks import NETWORKS, ResNet20, SmallConvNet
from sophon._specs import ModelSpec, parse_spec

IMAGE = (3, 32, 32)
HEADS = {
    "resnet20": "linear",
    "small_convnet": "head",
    "timm:resnet18": "fc",
    "timm:vit_tiny_patch16_224": "head",
    "timm:convnext_atto": "head.fc",
    "timm:resnet50_gn": "fc",
    "timm:caformer_s18": "head.fc.fc2",
    "timm:efficientnet_b0": "classifier",
    "torchvision:resnet18": "fc",
    "torchvision:mobilenet_v3_small": "classifier.3",
    "torchvision:densenet121": "classifier",
    "torchvision:googlenet": "fc",
}


def build(name: str, classes: int | None = 7, **fields: object) -> nn.Module:
    spec = ModelSpec(name=name, classes=classes, **fields)  # type: ignore[arg-type]
    return models.resolve_model(spec, base=Path())[0]


class Tiny(nn.Module):
    """A network whose head, if any, is given by `tail`."""

    def __init__(self, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tail = nn.Linear(4, 5) if tail is None else tail

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.conv(x).mean(dim=(2, 3)))
        return out


# --- Real weights -----------------------------------------------------------------------------


def test_the_real_resnet20_scores_what_its_publisher_measured(shared_data: Path) -> None:
    spec = ModelSpec(name="resnet20", weights="resnet20_cifar10.safetensors")
    model, factory = models.resolve_model(spec, base=shared_data, default_classes=10)
    with np.load(shared_data / "cifar10.npz", allow_pickle=False) as file:
        pixels, labels = file["x_test"], file["y_test"]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        correct = int((model(images).argmax(dim=1) == torch.from_numpy(labels)).sum())
    assert (correct, len(labels)) == (787, 860)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert factory().state_dict().keys() == model.state_dict().keys()


def test_the_class_count_comes_from_the_weights(tmp_path: Path) -> None:
    save_file(ResNet20(classes=23).state_dict(), tmp_path / "w.safetensors")
    spec = ModelSpec(name="resnet20", weights="w.safetensors")
    model, factory = models.resolve_model(spec, base=tmp_path, default_classes=10)
    assert models.head_classes(model, "linear") == 23
    assert models.head_classes(factory(), "linear") == 23


def test_another_architecture_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    save_file(SmallConvNet().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(conv1.weight, .*unexpected \(.*stage1"):
        models.resolve_model(ModelSpec(name="resnet20", weights="w.safetensors"), base=tmp_path)


def test_loading_that_fails_leaves_the_model_as_it_was() -> None:
    model = SmallConvNet()
    before = models.weights_sha256(model)
    wrong = {**SmallConvNet(classes=3).state_dict()}
    with pytest.raises(CheckpointError, match=r"head.weight \(3, 72\) instead of \(10, 72\)"):
        models.load_weights(model, wrong, source="w")
    assert models.weights_sha256(model) == before


def test_missing_batch_counters_and_a_wrapper_prefix_are_tolerated() -> None:
    source, target = ResNet20(), ResNet20()
    tensors = {
        f"module.{key}": value
        for key, value in source.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    models.load_weights(target, tensors, source="w")
    assert models.weights_sha256(target) == models.weights_sha256(source)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_torch_files_of_tensors_load(tmp_path: Path, nest: str | None) -> None:
    state = SmallConvNet().state_dict()
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "w.pt")
    found = models.read_tensors(tmp_path / "w.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


class _Command:
    """Unpickling this creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        import os

        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path) -> None:
    torch.save({"state_dict": _Command(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"refused.*save_file"):
        models.read_tensors(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    save_file(SmallConvNet().state_dict(), tmp_path / "whole.safetensors")
    torch.save(SmallConvNet().state_dict(), tmp_path / "whole.pt")
    torch.save({"lr": 0.1}, tmp_path / "settings.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    for suffix in ("safetensors", "pt"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    names = ("cut.safetensors", "cut.pt", "settings.pt", "list.pt", "nothing.pt", "empty.pt")
    for name in (*names, "text.pt", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            models.read_tensors(tmp_path / name)


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda weight: weight.flatten(1).to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8),
    "nested": lambda weight: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "complex": lambda weight: weight.to(torch.complex64),
    "no floating numbers": lambda weight: weight.to(torch.int64),
    "bool": lambda weight: weight > 0,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_weights_of_other_kinds_are_named(kind: str, tmp_path: Path) -> None:
    state = SmallConvNet().state_dict()
    state["stage2.0.weight"] = UNUSUAL[kind](state["stage2.0.weight"])
    torch.save(state, tmp_path / "w.pt")
    spec = ModelSpec(name="small_convnet", weights="w.pt")
    with pytest.raises(CheckpointError, match=rf"w\.pt.*stage2\.0\.weight.*{kind}|{kind}.*stage2"):
        models.resolve_model(spec, base=tmp_path)


def test_weights_that_end_within_a_number_are_damaged(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"weight": torch.zeros(2)}, whole)
    with zipfile.ZipFile(whole) as held, zipfile.ZipFile(cut, "w") as made:
        for name in held.namelist():
            # A whole number of four bytes, one of which is there.
            made.writestr(name, b"\x80\x02J\x01" if name.endswith(".pkl") else held.read(name))
    with pytest.raises(CheckpointError, match="is damaged or not a file of tensors"):
        models.read_tensors(cut)


def test_a_long_key_is_cut_in_the_middle(tmp_path: Path) -> None:
    held = {"a" + "x" * 200_000 + "z": torch.zeros(1)}
    torch.save(held, tmp_path / "w.pt")
    torch.save(dict.fromkeys(held, 1), tmp_path / "v.pt")
    for name in ("w.pt", "v.pt"):
        spec = ModelSpec(name="small_convnet", weights=name)
        with pytest.raises(CheckpointError, match=name) as caught:
            models.resolve_model(spec, base=tmp_path)
        assert len(str(caught.value)) <= 600


def test_no_torch_file_is_read_where_torch_may_run_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(SmallConvNet().state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    with pytest.raises(CheckpointError, match=r"CVE-2025-32434.*2\.6"):
        models.read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", "hf-hub:a/b"),
        ("checkpoint_path", "w.pt"),
        ("weights", "DEFAULT"),
        ("weights_backbone", "DEFAULT"),
        ("cache_dir", "x"),
        ("hf_hub_id", "a/b"),
        ("width", "https://a.test/w.pt"),
    ],
)
def test_arguments_that_look_elsewhere_are_refused_by_name(key: str, value: object) -> None:
    data = {"name": "timm:resnet10t", "arguments": {key: value}}
    with pytest.raises(SpecError, match=rf"arguments\.{key}.*model\.pretrained"):
        parse_spec(ModelSpec, data, where="model.json")


def test_arguments_of_layers_are_let_through() -> None:
    held = {
        "drop_path_rate": 0.1,
        "pretrained_window_size": 8,
        "weight_init": "jax",
        "patch_size": 4,
    }
    assert ModelSpec(name="timm:a", arguments=held).arguments == held


PARTS = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}


@pytest.mark.parametrize(
    "part",
    [
        {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        {"unet": ["my_unet", "UNet2DModel"]},
        {"vae": ["subprocess", "Popen"]},
        {"vae": ["diffusers", "a.b"]},
        {"../out": ["diffusers", "AutoencoderKL"]},
        {"_class_name": ["pipeline", "Mine"]},
        {"vae": ["diffusers"]},
    ],
)
def test_a_pipeline_of_other_code_or_folders_is_refused(
    part: dict[str, list[str]], tmp_path: Path
) -> None:
    for name in (*PARTS, "vae"):
        (tmp_path / name).mkdir()
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "DDPMPipeline", **PARTS, "x": [None, None]}))
    models.require_parts(tmp_path)
    index.write_text(json.dumps({**PARTS, **part}))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"pipeline|scheduler"):
        models.require_parts(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "many"},
        {"beta_end": 5.0},
        {"beta_schedule": "icy"},
        {"trained_betas": [float("nan")] * 10},
        {"trained_betas": "x"},
    ],
)
def test_noise_that_is_none_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    for name in PARTS:
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(PARTS))
    (tmp_path / "unet" / "config.json").write_text("{}")
    settings = tmp_path / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    assert models.DenoiserSource(tmp_path).scheduler() is not None
    settings.write_text(json.dumps({"_class_name": "DDPMScheduler", **wrong}))
    with pytest.raises(CheckpointError, match="scheduler"):
        models.DenoiserSource(tmp_path).scheduler()


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    state = SmallConvNet().state_dict()
    state["stage2.0.weight"][0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    spec = ModelSpec(name="small_convnet", weights="w.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"w.safetensors: stage2.0.weight holds NaN"):
        models.resolve_model(spec, base=tmp_path)


def test_non_finite_statistics_are_refused_too(tmp_path: Path) -> None:
    state = SmallConvNet().state_dict()
    state["stage1.1.running_var"][0] = torch.inf
    save_file(state, tmp_path / "w.safetensors")
    spec = ModelSpec(name="small_convnet", weights="w.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"stage1.1.running_var holds NaN or infinite.*: give "
    ):
        models.resolve_model(spec, base=tmp_path)


def test_a_network_without_weights_starts_from_the_same_ones_every_time() -> None:
    hashes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, _ = models.resolve_model(ModelSpec(name="small_convnet"))
        assert torch.initial_seed() == seed
        hashes.append(models.weights_sha256(model))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["resnet20", "small_convnet"])
def test_our_own_networks_start_as_he_et_al_say(name: str) -> None:
    """Weights of the variance 2 / fan in (arXiv 1502.01852), biases of zero."""
    for part in NETWORKS[name](10, 3).modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            fan_in = part.weight[0].numel()
            assert float(part.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.2)
            assert part.bias is None or not part.bias.any()


# --- Checkpoints and names --------------------------------------------------------------------


def write_checkpoint(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"model": spec.model_dump(mode="json")}))


def test_a_checkpoint_loads_by_folder_and_by_file(tmp_path: Path) -> None:
    saved = SmallConvNet(classes=6)
    # What the network was once loaded from is not needed again.
    spec = ModelSpec(name="small_convnet", weights="gone.safetensors", head="head")
    write_checkpoint(tmp_path / "p1", saved, spec)
    for name in ("p1", "p1/model.safetensors"):
        model, factory = models.resolve_model(ModelSpec(name=name), base=tmp_path)
        assert models.weights_sha256(model) == models.weights_sha256(saved)
        assert models.head_classes(factory(), "head") == 6
        found = models.architecture(ModelSpec(name=name), base=tmp_path)
        assert (found.name, found.weights, found.head) == ("small_convnet", None, "head")


def test_a_head_named_for_a_checkpoint_stands_over_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "p1", SmallConvNet(), ModelSpec(name="small_convnet", head="head"))
    found = models.architecture(ModelSpec(name="p1", head="other"), base=tmp_path)
    assert found.head == "other"


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "p1", SmallConvNet(), ModelSpec(name="small_convnet"))
    spec = ModelSpec(name="p1")
    with pytest.raises(UnsupportedModelError, match="brings its own weights"):
        models.resolve_model(ModelSpec(name="p1", pretrained=True), base=tmp_path)
    (tmp_path / "p1" / "model.json").write_text('{"model": {"nam": "x"}}')
    with pytest.raises(SophonError, match=r"unknown key nam|name is missing"):
        models.resolve_model(spec, base=tmp_path)
    (tmp_path / "p1" / "model.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        models.resolve_model(spec, base=tmp_path)
    (tmp_path / "p1" / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.json is missing.*model.weights"):
        models.resolve_model(spec, base=tmp_path)
    (tmp_path / "p1" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
        models.resolve_model(spec, base=tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        models.resolve_model(ModelSpec(name="p2/model.safetensors"), base=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet21"}, "did you mean resnet20"),
        ({"name": "timm:resnet19"}, "did you mean timm:resnet18"),
        ({"name": "torchvision:resnet20"}, "did you mean torchvision:resnet"),
        ({"name": "nothing-like-it"}, "timm:NAME"),
        ({"name": "resnet20", "pretrained": True}, "set model.weights"),
        ({"name": "resnet20", "pretrained": True, "weights": "w"}, "keep one"),
        ({"name": "torchvision:resnet18", "in_channels": 1}, "model.in_channels = 1"),
        ({"name": "timm:resnet18", "pretrained": True}, "not at hand"),
        ({"name": "timm:resnet18.a9_in1k"}, "known: timm:resnet18.a1_in1k, "),
        (
            {"name": "timm:vit_giant_patch14_224", "pretrained": True},
            "timm:vit_giant_patch14_224 has no published weights",
        ),
        ({"name": "torchvision:resnet18", "pretrained": True}, "not at hand"),
    ],
)
def test_names_that_cannot_be_built_say_what_can(
    fields: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=message):
        models.resolve_model(ModelSpec(**fields), base=tmp_path)  # type: ignore[arg-type]


# --- Heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_network_is_probed_and_refitted(name: str) -> None:
    model = build(name).train()
    model.requires_grad_(True)
    before, modes = models.weights_sha256(model), [part.training for part in model.modules()]
    noise = torch.random.get_rng_state()

    head = models.find_head(model, IMAGE)
    models.check_images(model, IMAGE, what="domain")
    groups = models.blocks(model, head)
    pairs = models.normalised_pairs(model, IMAGE)

    assert head == HEADS[name]
    assert models.find_head(model, IMAGE, head) == head
    assert models.head_classes(model, head) == 7
    assert models.weights_sha256(model) == before
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert len(groups) >= 5
    assert not any(
        head == part or part.startswith(f"{head}.") for group in groups for part in group
    )
    assert bool(pairs) == ("vit" not in name)

    keys = list(model.state_dict())
    models.replace_head(model, head, 5, seed=1, names=("a",))
    assert list(model.state_dict()) == keys
    assert model.eval()(torch.zeros(2, *IMAGE)).shape == (2, 5)


def test_a_new_head_depends_on_its_stream_alone() -> None:
    fresh = []
    for names in (("a", 1), ("a", 1), ("a", 2)):
        model = SmallConvNet()
        models.replace_head(model, "head", 4, seed=3, names=names)
        torch.randn(5)
        fresh.append(model.head.weight)
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])


def test_a_model_that_says_how_many_classes_it_has_says_the_new_number() -> None:
    model = nn.ModuleDict({"net": Tiny()})
    model.num_classes, model["net"].num_classes = 5, 5  # type: ignore[assignment]
    models.replace_head(model, "net.tail", 9, seed=0)
    assert (model.num_classes, model["net"].num_classes) == (9, 9)


def test_a_convolutional_head_and_a_vgg_are_found() -> None:
    conv_head = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert models.find_head(conv_head, IMAGE) == "2"
    models.replace_head(conv_head, "2", 9, seed=0)
    assert conv_head(torch.zeros(2, *IMAGE)).shape == (2, 9)
    assert models.head_classes(conv_head, "2") == 9


def test_a_head_that_is_not_found_lists_the_layers() -> None:
    softmax = Tiny(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Softmax(dim=1)))
    with pytest.raises(UnsupportedModelError, match=r"not found.*tail.0, tail.2"):
        models.find_head(softmax, IMAGE)
    assert models.find_head(softmax, IMAGE, "tail.2") == "tail.2"


def test_an_ambiguous_head_lists_the_candidates() -> None:
    twin = nn.Linear(5, 5)
    torch.nn.init.eye_(twin.weight)
    torch.nn.init.zeros_(twin.bias)
    with pytest.raises(UnsupportedModelError, match=r"ambiguous \(tail.0, tail.1\).*model.head"):
        models.find_head(Tiny(nn.Sequential(nn.Linear(4, 5), twin)), IMAGE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tial", r"is not a layer.*did you mean tail"),
        ("conv", r"is a Conv2d, not a Linear.*choose one of tail"),
        ("", r"choose one of tail"),
    ],
)
def test_a_named_head_that_is_none_lists_the_layers(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        models.find_head(Tiny(), IMAGE, name)


def test_a_head_with_a_computed_weight_is_refused() -> None:
    model = Tiny(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)))
    with pytest.raises(UnsupportedModelError, match="parametrisation"):
        models.replace_head(model, "tail", 3, seed=0)


# --- What a model can take --------------------------------------------------------------------


def test_channels_and_sizes_a_model_cannot_take_are_named() -> None:
    with pytest.raises(DataError, match=r"digits has images of 1 channels.*takes 3.*in_channels"):
        models.check_images(SmallConvNet(), (1, 16, 16), what="digits")
    with pytest.raises(DataError, match=r"letters has 2x2 images.*image_size"):
        models.check_images(SmallConvNet(), (3, 2, 2), what="letters")
    mixer = build("timm:mixer_s32_224")
    with pytest.raises(DataError, match=r"32x32.*made for 224x224"):
        models.check_images(mixer, IMAGE, what="letters")


class _Pair(Tiny):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out


class _AuxiliaryInTraining(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.stack([out, out]) if self.training else out


@pytest.mark.parametrize("model", [_Pair(), _AuxiliaryInTraining()])
def test_outputs_that_are_no_logits_are_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a classifier returns \(2, classes\)"):
        models.check_images(model, IMAGE, what="digits")


@pytest.mark.parametrize("head", [nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))])
def test_a_model_of_one_logit_is_told_how_to_get_two(head: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"one logit each .* head two outputs"):
        models.check_images(Tiny(head), IMAGE, what="digits")


def test_a_model_that_chooses_no_class_is_refused_by_its_configuration() -> None:
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=16, problem_type="multi_label_classification"
    )
    wrapped = nn.Sequential(transformers.ViTForImageClassification(config))
    with pytest.raises(UnsupportedModelError, match="'multi_label_classification': multi-label"):
        models.check_images(wrapped, IMAGE, what="digits")


@pytest.mark.parametrize("size", [8, 16, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_demo_network_takes_small_images(size: int, channels: int) -> None:
    model = SmallConvNet(classes=4, in_channels=channels)
    models.check_images(model, (channels, size, size), what="digits")
    assert 80_000 < sum(p.numel() for p in model.parameters()) < 130_000
    assert models.expected_channels(model) == channels


# --- Fresh weights and structure --------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_copy_has_the_keys_and_none_of_the_weights(name: str) -> None:
    model = NETWORKS[name](10, 3)
    before = models.weights_sha256(model)
    factories: list[Callable[[], nn.Module] | None] = [lambda: NETWORKS[name](4, 3)]
    if name != "small_caformer":  # no reset reaches the scales of its residuals
        factories.append(None)
    for factory in factories:
        fresh = [models.fresh_copy(model, factory, seed=s, names=("scratch",)) for s in (0, 0, 1)]
        hashes = [models.weights_sha256(copied) for copied in fresh]
        assert hashes[0] == hashes[1] != hashes[2]
        shapes = {key: value.shape for key, value in fresh[0].state_dict().items()}
        assert shapes == {key: value.shape for key, value in model.state_dict().items()}
        weights = dict(fresh[0].named_parameters())
        moved = [
            not torch.equal(weights[key], p) for key, p in model.named_parameters() if p.dim() > 1
        ]
        assert all(moved)
    assert models.weights_sha256(model) == before


def test_a_fresh_copy_evaluates_and_its_replaced_head_follows_the_seed() -> None:
    model = SmallConvNet()
    heads = []
    for seed in (0, 0, 1):
        fresh = models.fresh_copy(model, lambda: SmallConvNet(classes=4), seed=seed, names=())
        again = models.fresh_copy(model, None, seed=seed, names=())
        assert not any(part.training for one in (fresh, again) for part in one.modules())
        heads.append(fresh.get_parameter("head.weight"))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_whole_is_reset_after_its_parts() -> None:
    """An attention starts with an output bias of zero, which its linear layer alone would draw."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    models.reinitialise(model, seed=0, names=())
    assert not model.get_parameter("0.out_proj.bias").any()
    assert model.get_parameter("0.out_proj.weight").std() > 0.1
    assert model.get_parameter("1.bias").any()


def test_a_factory_of_another_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="another architecture"):
        models.fresh_copy(SmallConvNet(), ResNet20, seed=0, names=())


def test_parameters_no_reset_reaches_are_named_and_kept() -> None:
    model = build("timm:convnext_atto")
    before = models.weights_sha256(model)
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.gamma"):
        models.reinitialise(model, seed=0, names=())
    assert models.weights_sha256(model) == before


def test_the_blocks_of_resnet20_in_order() -> None:
    found = models.blocks(ResNet20(), "linear")
    stages = [(f"layer{stage}.{index}",) for stage in (1, 2, 3) for index in (0, 1, 2)]
    assert found == [("conv1", "bn1"), *stages]


def test_a_wrapped_network_has_the_same_blocks() -> None:
    found = models.blocks(nn.ModuleDict({"net": ResNet20()}), "net.linear")
    assert found[0] == ("net.conv1", "net.bn1")
    assert len(found) == 10


def test_pairs_leave_out_outputs_that_something_else_reads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.mix = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.mix(self.norm(x))
            return out

    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    residual = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    shared = nn.Conv2d(3, 3, 1)
    twice = nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3))
    assert models.normalised_pairs(plain, IMAGE) == [("0", "2")]
    assert models.normalised_pairs(residual, IMAGE) == [("2", "3")]
    assert models.normalised_pairs(twice, IMAGE) == []
    assert models.layers_in_order(plain, IMAGE) == ["0", "3"]
    assert models.layers_in_order(twice, IMAGE) == []
    norm = nn.BatchNorm2d(4)
    both = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)
    assert models.normalised_pairs(both, IMAGE) == []


def test_the_hash_sees_weights_buffers_and_names() -> None:
    model = SmallConvNet()
    base = models.weights_sha256(model)
    other = copy.deepcopy(model)
    other.stage1[1].running_mean[0] += 1  # type: ignore[index, union-attr, operator]
    assert models.weights_sha256(other) != base
    assert models.weights_sha256(copy.deepcopy(model)) == base
    assert models.weights_sha256(nn.ModuleDict({"net": model})) != base
    assert models.weights_sha256(model.to(memory_format=torch.channels_last)) == base


def test_the_hash_sees_the_type_of_equal_bytes() -> None:
    hashes = []
    for kind in (torch.float32, torch.int32):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        model.register_buffer("count", torch.zeros(3, dtype=kind))
        hashes.append(models.weights_sha256(model))
    assert hashes[0] != hashes[1]


def test_precision_and_layout_follow_the_request_and_the_model() -> None:
    cpu, model = torch.device("cpu"), ResNet20()
    choices = {
        asked: models.choose_precision(asked, cpu, model, [IMAGE])
        for asked in ("fp32", "bf16", "auto")
    }
    assert choices.pop("auto") in ("fp32", "bf16")
    assert choices == {"fp32": "fp32", "bf16": "bf16"}
    assert models.choose_precision("auto", torch.device("meta"), model, [IMAGE]) == "fp32"
    assert models.choose_channels_last(SmallConvNet())
    assert not models.choose_channels_last(nn.Linear(2, 2))


def test_bf16_is_not_used_where_a_stride_outruns_the_image() -> None:
    """A processor's bf16 weight gradients hold memory never written there (torch 2.13)."""
    cpu, model = torch.device("cpu"), ResNet20()
    assert models.choose_precision("auto", cpu, model, [IMAGE, (3, 2, 2)]) == "fp32"
    assert models.choose_precision("fp32", cpu, model, [(3, 2, 2)]) == "fp32"
    with pytest.raises(UnsupportedModelError, match=r"'layer3.0.conv1'.*precision = 'fp32'"):
        models.choose_precision("bf16", cpu, model, [IMAGE, (3, 2, 2)])
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_safetensors_round_trip_matches_the_library(tmp_path: Path) -> None:
    state = SmallConvNet().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    found = models.read_tensors(tmp_path / "w.safetensors")
    assert found.keys() == load_file(tmp_path / "w.safetensors").keys() == state.keys()


def test_a_pass_with_the_batchs_statistics_leaves_every_buffer_as_it_was() -> None:
    """Also those that other layers move in train mode; a gradient may be taken afterwards."""
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4),
        nn.utils.spectral_norm(nn.Conv2d(4, 2, 3)),
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = dict(model.named_buffers())
    images = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))
    with models.batch_statistics(model):
        loss = model(images).square().mean()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(held[name] is buffer for name, buffer in model.named_buffers())
    loss.backward()
    # As it is without: the layers would move.
    model.train()(images)
    assert not torch.equal(held["1.running_mean"], before["1.running_mean"])
