"""Image classifiers of transformers: folders, live networks, attacks on them, and export."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import sophon
from cells import command as sophon_command
from classifiers import NETWORKS, classifier, saved
from sophon import _models as models
from sophon._base.errors import CheckpointError, UnsupportedModelError
from sophon._cli.run_file import load as load_run
from sophon._data.images import Fit
from sophon._data.loading import prepared_as
from sophon._models import image_processors
from sophon._models.image_processors import processor_input, transformers
from sophon._models.own_input import folder_input, own_input
from sophon._models.weights import read_tensors
from sophon._protection.depths import find_depths
from sophon._training.loop import attacker_copy
from sophon._training.rescaling import rescale_weights
from sophon._training.setting import Setting, make_setting

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = (0.5, 0.5, 0.5)


def domain(name: str, side: int = 16, seed: int = 0, classes: int = 5) -> sophon.Domain:
    labels = np.arange(30 * classes) % classes
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), side, side, 3))
    pixels[:, : side // 2] = pixels[:, : side // 2] // 4 + (labels * 36)[:, None, None, None]
    return sophon.Domain.from_arrays(name, pixels.astype(np.uint8), labels)


def setting(model: nn.Module, side: int = 16, **fields: Any) -> Setting:
    return make_setting(
        model,
        task=sophon.Classification(),
        original=domain("keep", side, **fields),
        restricted=(domain("refuse", side, 1, classes=3),),
        device="cpu",
    )


def resolved(folder: Path, **fields: Any) -> tuple[nn.Module, Callable[[], nn.Module]]:
    return sophon.resolve_model(sophon.ModelSpec(name=f"transformers:{folder}", **fields))


@torch.no_grad()
def answers(model: nn.Module, side: int = 16) -> torch.Tensor:
    images = torch.randn((4, 3, side, side), generator=torch.Generator().manual_seed(1))
    held = model.eval()(images)
    logits: torch.Tensor = held.logits
    return logits


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_folder_is_the_network_that_was_saved(kind: str, tmp_path: Path) -> None:
    live = classifier(kind)
    side, head = NETWORKS[kind][1:]
    model, fresh = resolved(saved(tmp_path / "net", live))
    assert type(model) is type(live)
    assert torch.equal(answers(model, side), answers(live, side))
    assert not torch.equal(answers(fresh(), side), answers(live, side))
    assert models.find_head(model, (3, side, side)) == head
    assert models.code_differences(model, live) == ()
    # Wherever it lies, it is the same network.
    moved = (tmp_path / "net").rename(tmp_path / "elsewhere")
    again = resolved(moved)[0]
    assert models.network_identity(again) == models.network_identity(live)
    assert models.weights_sha256(again) == models.weights_sha256(live)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_preparation_of_an_attacker_works(kind: str, tmp_path: Path) -> None:
    side, head = NETWORKS[kind][1:]
    model, fresh = resolved(saved(tmp_path, classifier(kind)))
    found = setting(model, side)
    parts = models.blocks(model, head)
    assert len(parts) >= 3
    named = [name for part in parts for name in part]
    covered = {
        n for n, _ in model.named_parameters() if n.startswith(tuple(f"{p}." for p in named))
    }
    ends = tuple(f"{name}." for name in models.heads(model, head))
    own = {n for n, _ in model.named_parameters() if not n.startswith(ends)}
    assert covered == own
    assert set(find_depths(model, head, (3, side, side), None)) >= {part[0] for part in parts}
    refuse = found.restricted[0]
    feed = found.feed(refuse, refuse.train, batch_size=8)
    for preparation in (sophon.FreshHead(), sophon.RidgeHead(), sophon.ResetLastBlocks(blocks=2)):
        copied = resolved(tmp_path)[0]
        strategy = sophon.Strategy(
            preparations=(preparation,), lora_rank=2, batch_size=8, steps=4, learning_rate=0.1
        )
        bare = models.bare_parameters(fresh())
        attacker_copy(
            copied, strategy, found, classes=3, feed=feed, stream=(0, ("test",)), bare=bare
        )
        assert answers(copied, side).shape == (4, 3)
        assert models.merged_lora(copied).config.num_labels == 3
        merged = dict(models.merged_lora(copied).named_parameters())
        parameters = model.get_submodule(parts[-1][0]).named_parameters()
        last = f"{parts[-1][0]}.{next(name for name, p in parameters if p.dim() > 1)}"
        reset = isinstance(preparation, sophon.ResetLastBlocks)
        assert torch.equal(merged[last], model.get_parameter(last)) != reset


@pytest.mark.parametrize("kind", NETWORKS)
def test_rescaled_weights_keep_what_the_network_says(kind: str) -> None:
    side = NETWORKS[kind][1]
    model = classifier(kind)
    before, weights = answers(model, side), models.weights_sha256(model)
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    rescale_weights(model, 2.0, (3, side, side), factors)
    assert torch.allclose(answers(model, side), before, atol=0.02, rtol=0.05)
    changed = [name for name, factor in factors.items() if factor != 1]
    assert bool(changed) == (models.weights_sha256(model) != weights)


@torch.no_grad()
def test_the_two_heads_of_a_network_with_a_teacher_are_one(tmp_path: Path) -> None:
    live: Any = classifier("deit with teacher")
    folder = saved(tmp_path / "net", live)
    model: Any = resolved(folder)[0]
    held = model(torch.randn(2, 3, 16, 16))
    assert torch.equal(held.logits, (held.cls_logits + held.distillation_logits) / 2)
    assert models.heads(model, "distillation_classifier")[1:] == ("cls_classifier",)
    # The library's own way back, with a fresh pair of heads too.
    for classes in (None, 3):
        made = resolved(folder, classes=classes)[0]
        models.save_classifier(
            tmp_path / f"out{classes}", made, [], {"input_size": (3, 16, 16)} | IMAGENET
        )
        again = transformers().AutoModelForImageClassification.from_pretrained(
            tmp_path / f"out{classes}"
        )
        assert type(again) is type(live)
        assert torch.equal(answers(again), answers(made))
        assert answers(again).shape == (4, classes or 5)


def test_weights_in_several_files_are_those_of_one(tmp_path: Path) -> None:
    live: Any = classifier("vit")
    folder = saved(tmp_path / "net", live)
    whole = answers(resolved(folder)[0])
    (folder / "model.safetensors").unlink()
    live.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert torch.equal(answers(resolved(folder)[0]), whole)
    assert torch.equal(answers(resolved(folder, weights=str(folder))[0]), whole)
    index = folder / "model.safetensors.index.json"
    assert torch.equal(answers(resolved(folder, weights=str(index))[0]), whole)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": []}', "names no files"),
        ('{"weight_map": {"a": 3}}', "names no files"),
        ('{"weight_map": {"a": "../net/model.safetensors"}}', "leads elsewhere"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "leads elsewhere"),
        ('{"weight_map": {"a": "model-00009.safetensors"}}', "model-00009.safetensors does not"),
        ('{"weight_map": {"a": "config.json"}}', "leads elsewhere"),
    ],
)
def test_an_index_of_weights_names_files_beside_it(held: str, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "net", classifier("vit"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(held)
    with pytest.raises(CheckpointError, match=said) as caught:
        resolved(folder)
    assert len(str(caught.value).splitlines()) <= 2


def test_tensors_come_from_the_files_that_their_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "model-2.safetensors")
    named = {"a": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": named}))
    found = read_tensors(tmp_path / INDEX)
    assert {key: value[0].item() for key, value in found.items()} == {"a": 0, "c": 1}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": named | {"b": named["c"]}}))
    with pytest.raises(CheckpointError, match=r"model-2.safetensors has no b, which the index"):
        read_tensors(tmp_path / INDEX)


def test_the_image_processor_says_how_images_are_normalised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = classifier("vit")
    own = own_input(resolved(saved(tmp_path / "a", live))[0])
    assert own is not None
    assert (own.mean, own.std, own.interpolation) == (HALVES, HALVES, "bilinear")
    assert own.stated == "its preprocessor_config.json"
    found = setting(resolved(tmp_path / "a")[0])
    assert found.input()["mean"] == HALVES
    assert not caplog.messages
    # A network that its user loaded says so, too.
    loaded = transformers().ViTForImageClassification.from_pretrained(tmp_path / "a")
    assert own_input(loaded) == own
    assert own_input(live) is None
    given = sophon.Domain.from_arrays(
        "keep", np.zeros((60, 16, 16, 3), np.uint8), np.arange(60) % 5, mean=[0.4], std=[0.3]
    )
    make_setting(
        resolved(tmp_path / "a")[0], task=sophon.Classification(), original=given, device="cpu"
    )
    assert "warning: 'keep' is normalised with mean 0.4" in caplog.text
    assert "its preprocessor_config.json" in caplog.text


def test_a_processor_without_normalisation_and_with_blue_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, classifier("mobilevit"), "MobileViTImageProcessor")
    found = setting(resolved(folder)[0], 32)
    assert found.input()["mean"] == (0.0,)
    assert found.input()["std"] == (1.0,)
    assert "warning: the network was made for images with blue first" in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        {"include_top": True},
        {"include_top": True, "do_normalize": False},
        {"include_top": False, "rescale_offset": True, "rescale_factor": 1 / 127.5},
        {"include_top": False, "do_rescale": False},
    ],
)
def test_mean_and_std_are_what_the_processor_does_in_all(
    said: dict[str, Any], tmp_path: Path
) -> None:
    side = {"height": 16, "width": 16}
    kind = transformers().EfficientNetImageProcessor
    processor = kind(size=side, image_mean=[0.4] * 3, image_std=[0.3] * 3, **said)
    processor.save_pretrained(tmp_path)
    held = processor_input(tmp_path)
    assert held is not None
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    wanted = processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    found = (image / 255 - held["mean"]) / held["std"]
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "size", "crop", "mode"),
    [
        ("ConvNextImageProcessor", {"shortest_edge": 224}, 0.875, "center"),
        ("ConvNextImageProcessor", {"shortest_edge": 384}, 1.0, "squash"),
        ("PoolFormerImageProcessor", {"shortest_edge": 224}, 0.9, "center"),
        ("CLIPImageProcessor", {"shortest_edge": 256}, 0.875, "center"),
        ("LevitImageProcessor", {"shortest_edge": 224}, 0.875, "center"),
        ("PerceiverImageProcessor", {"height": 224, "width": 224}, 0.875, "center"),
        ("ViTImageProcessor", {"height": 224, "width": 224}, 1.0, "squash"),
        ("DeiTImageProcessor", {"height": 256, "width": 256}, 0.875, "squash"),
    ],
)
def test_a_processors_size_and_part_of_a_picture_are_the_default_of_domains(
    kind: str, size: dict[str, int], crop: float, mode: str, tmp_path: Path
) -> None:
    processor = getattr(transformers(), kind)(size=size)
    processor.save_pretrained(tmp_path)
    own = folder_input(tmp_path)
    assert own is not None
    assert own.crop_pct == pytest.approx(crop)
    spec = prepared_as(sophon.DomainSpec(source="folder", path="x"), own)
    side = 384 if size.get("shortest_edge") == 384 else 224
    assert (spec.image_size, spec.crop_mode) == (side, mode)
    # What a file says stays.
    said = sophon.DomainSpec(source="folder", path="x", image_size=32, crop_mode="center")
    assert prepared_as(said, own).image_size == 32
    assert prepared_as(said, own).crop_mode == "center"
    picture = waves(600, 400)
    fit = Fit(side, spec.interpolation, spec.crop_pct, crop_mode=mode)
    found = fit.pixels(picture) / 255
    made = processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    wanted = made.numpy() * own.std + own.mean
    assert np.abs(found - wanted).mean() < 0.01


def test_a_run_resizes_pictures_as_the_networks_processor_does(tmp_path: Path) -> None:
    saved(tmp_path / "net", classifier("vit"))
    stream = np.random.default_rng(0)
    for folder, classes in (("keep", "abcde"), ("refuse", "xyz")):
        for number, name in enumerate(classes * 8):
            place = tmp_path / folder / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = stream.integers(0, 256, (30, 40 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place)
    text = RUN.replace("npz", "folder").replace(".folder", "")
    for role in ("held_out", "benign"):
        text += f'[[{role}]]\nsource = "folder"\nname = "{role}"\npath = "refuse"\n'
    (tmp_path / "run.toml").write_text(text)
    case = load_run(tmp_path / "run.toml", [])
    loaded = (case.original, *case.restricted, *case.held_out, *case.benign)
    assert [d.fit for d in loaded] == [Fit(16, crop_mode="squash")] * 4
    assert case.spec.original.image_size == 16
    assert case.setting().input()["crop_mode"] == "squash"
    assert "resized with bilinear, crop_pct 1, squashed" in case.read()[0]
    given = load_run(tmp_path / "run.toml", ["original.crop_mode=center"])
    assert given.original.fit == Fit(16)
    # A checkpoint is asked what it was trained with, not the folder that its network came from.
    (tmp_path / "made").mkdir()
    tensors = resolved(tmp_path / "net")[0].state_dict()
    save_file(tensors, tmp_path / "made" / "model.safetensors")
    took = {"input_size": [3, 16, 16], "mean": HALVES, "std": HALVES}
    took |= {"interpolation": "bicubic", "crop_pct": 0.875}
    held = {"model": {"name": f"transformers:{tmp_path / 'net'}"}, "pretraining": {"input": took}}
    (tmp_path / "made" / "model.json").write_text(json.dumps(held))
    for name in ("made", "made/model.safetensors"):
        again = load_run(tmp_path / "run.toml", [f"model.name={name}"])
        wanted = Fit(16, "bicubic", 0.875)
        assert [d.fit for d in (again.original, *again.restricted)] == [wanted] * 2


def test_a_processor_is_measured_once_until_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], image_processors._geometry

    def counted(*about: Any) -> dict[str, Any]:
        measured.append(about)
        return measure(*about)

    monkeypatch.setattr(image_processors, "_geometry", counted)
    folder = saved(tmp_path / "own", classifier("vit"))
    model, fresh = resolved(folder, classes=3)
    assert own_input(model) == own_input(fresh()) == folder_input(folder)
    assert len(measured) == 1
    held = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**held, "image_mean": [0.1] * 3}))
    found = folder_input(folder)
    assert found is not None
    assert found.mean == pytest.approx([0.1] * 3)


def waves(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width] / 12
    shades = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1)
    return Image.fromarray((127 + 120 * shades).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("CLIPImageProcessor", {"do_resize": False}),
        ("DetrImageProcessor", {}),
        ("ImageGPTImageProcessor", {"clusters": [[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]]}),
    ],
)
def test_a_processor_that_does_something_else_with_pictures_is_refused(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    getattr(transformers(), kind)(**settings).save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedModelError), match="delete") as caught:
        processor_input(tmp_path)
    assert "preprocessor_config.json" in str(caught.value)
    assert ("do_resize = false" in str(caught.value)) == ("do_resize" in settings)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("processor", [None, "ViTImageProcessor", "MobileViTImageProcessor"])
def test_an_exported_processor_prepares_images_as_sophon_does(
    processor: str | None, mode: str, tmp_path: Path
) -> None:
    model = resolved(saved(tmp_path / "net", classifier("vit"), processor))[0]
    takes = {"input_size": (3, 56, 56), "mean": (0.4,) * 3, "std": (0.3,) * 3}
    takes |= {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": mode}
    models.save_classifier(tmp_path / "out", model, [], takes)
    picture = waves(144, 96)
    made = transformers().AutoImageProcessor.from_pretrained(tmp_path / "out")
    found = made(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    wanted = Fit(56, "bicubic", 0.875, crop_mode=mode).pixels(picture)
    assert np.abs((found * 0.3 + 0.4) * 255 - wanted).max() < 4
    said = own_input(resolved(tmp_path / "out")[0])
    assert said is not None
    assert (said.interpolation, said.crop_pct, said.crop_mode) == ("bicubic", 0.875, mode)


def test_a_configuration_names_no_other_folder(tmp_path: Path) -> None:
    other = saved(tmp_path / "other", classifier("vit"))
    folder = saved(tmp_path / "net", classifier("vit"), None)
    edited(name_or_path=str(other))(folder)
    assert own_input(resolved(folder)[0]) is None


def test_weights_of_earlier_names_other_classes_and_pickles_are_loaded(tmp_path: Path) -> None:
    live = classifier("vit")
    folder = saved(tmp_path / "net", live)
    assert load_file(folder / "model.safetensors").keys() != live.state_dict().keys()
    other = tmp_path / "other.safetensors"
    save_file({k: v + 1 for k, v in load_file(folder / "model.safetensors").items()}, other)
    model = resolved(folder, weights=str(other))[0]
    assert torch.equal(model.get_parameter("classifier.bias"), live.classifier.bias + 1)
    model, fresh = resolved(folder, classes=3)
    assert answers(model).shape == answers(fresh()).shape == (4, 3)
    assert model.config.num_labels == 3
    seven = saved(tmp_path / "seven", classifier("vit", 7)) / "model.safetensors"
    assert answers(resolved(folder, weights=str(seven))[0]).shape == (4, 7)
    torch.save(live.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(answers(resolved(folder)[0]), answers(live))


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
DETR = {"model_type": "detr", "architectures": ["DetrForObjectDetection"]}
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (removed("config.json"), "no folder with a config.json"),
    "no weights": (removed("model.safetensors"), "folder without model.safetensors"),
    "text": (edited(**BERT), "describes 'BertForSequenceClassification', which is no image"),
    "detection": (edited(**DETR), "describes 'DetrForObjectDetection', which is no image"),
    "no head": (edited(architectures=["ViTModel"]), "describes 'ViTModel', which is no image"),
    "timm": (edited(model_type="timm_wrapper", architectures=None), "a timm network is timm:NAME"),
    "unknown": (edited(model_type="nosuch", architectures=None), "describes 'nosuch'"),
    "odd type": (edited(model_type=["vit"]), "describes"),
    "one logit": (edited(id2label={"0": "yes"}), "num_labels = 1"),
    "several labels": (edited(problem_type="multi_label_classification"), "multi_label"),
    "own code": (edited(auto_map={"AutoConfig": "evil.Config"}), "auto_map brings code"),
    "quantised": (edited(quantization_config={"load_in_8bit": True}), "quantization_config brings"),
    "wrong value": (edited(hidden_size="wide"), "config.json cannot be built"),
    "other sizes": (edited(hidden_size=32), "is of another architecture"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "processor": (
        lambda f: (f / "preprocessor_config.json").write_text('{"image_processor_type": "X"}'),
        "preprocessor_config.json cannot be used",
    ),
    "processor's code": (
        lambda f: (f / "preprocessor_config.json").write_text('{"auto_map": {"A": "b.C"}}'),
        "auto_map brings code, which is never run",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_folder_is_said(case: str, tmp_path: Path) -> None:
    edit, said = BAD[case]
    edit(saved(tmp_path, classifier("vit")))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=said) as caught:
        resolved(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 2
    assert max(map(len, lines)) <= 300 + len(str(tmp_path)) or case == "other sizes"


def test_kernels_and_names_that_a_configuration_brings_are_not_used(tmp_path: Path) -> None:
    folder = saved(tmp_path, classifier("vit", label2id={"backbone": 0, "_b": 1}))
    edited(_attn_implementation="some/kernel", attn_implementation="some/kernel")(folder)
    model = resolved(folder)[0]
    assert model.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pretrained": True}, "brings its own weights"),
        ({"arguments": {"depth": 2}}, "takes none"),
        ({"weights_key": "ema"}, "set model.weights too"),
    ],
)
def test_settings_that_a_folder_does_not_take(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        resolved(saved(tmp_path, classifier("vit")), **fields)


def test_a_missing_folder_and_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="nowhere' is no folder with a config"):
        resolved(tmp_path / "nowhere")
    folder = saved(tmp_path, classifier("vit"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"-c constraints.txt '\.\[transformers\]'"):
        resolved(folder)


def test_what_is_no_classifier_or_has_other_classes_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has 5 outputs but the original"):
        setting(classifier("vit"), classes=4)
    with pytest.raises(UnsupportedModelError, match="with AutoModelForImageClassification"):
        setting(classifier("vit").vit)
    with pytest.raises(sophon.DataError, match="set image_size"):
        setting(classifier("vit"), 24)


@torch.no_grad()
def test_class_names_in_another_order_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["Ant", "bee", "cat", "dog", "eel"]
    folder = saved(tmp_path, classifier("vit", id2label=dict(enumerate(names))))
    model = resolved(folder)[0]
    plain = domain("keep")
    pixels, labels = plain.train.pixels.permute(0, 2, 3, 1).numpy(), plain.train.labels.numpy()
    for order, warned in ((["ant", "Bee", "cat", "dog", "eel"], False), (names[::-1], True)):
        named = sophon.Domain.from_arrays("keep", pixels, labels, classes=order)
        make_setting(model, task=sophon.Classification(), original=named, device="cpu")
        assert ("class 0 of 'keep' is 'eel'" in caplog.text) == warned


RUN = """
[model]
name = "transformers:net"

[original]
source = "npz"
path = "keep.npz"

[[restricted]]
source = "npz"
path = "refuse.npz"

[protect]
rounds = 2
[protect.guard]
tolerance_points = 100.0

[audit]
steps = 4
suite = "quick-1"
seeds = [0]
"""


def archive(file: Path, made: sophon.Domain, names: list[str]) -> None:
    parts = {"train": made.train, "val": made.validation, "test": made.test}
    arrays = {f"x_{k}": v.pixels.permute(0, 2, 3, 1).numpy() for k, v in parts.items()}
    arrays |= {f"y_{k}": v.labels.numpy() for k, v in parts.items()}
    np.savez(file, class_names=np.array(names), **arrays)


@pytest.mark.slow
def test_a_folder_is_protected_audited_exported_and_loaded_by_its_library(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel"]
    saved(tmp_path / "net", classifier("vit"))
    archive(tmp_path / "keep.npz", domain("keep"), names)
    archive(tmp_path / "refuse.npz", domain("refuse", seed=1, classes=3), ["x", "y", "z"])
    (tmp_path / "run.toml").write_text(RUN)
    run, made = tmp_path / "run.toml", tmp_path / "made"
    sophon_command("protect", run, "--out", made)
    assert json.loads((made / "model.json").read_text())["model"]["name"] == "transformers:."
    sophon_command("audit", run, "--model", made, "--out", tmp_path / "audit")
    record = tmp_path / "audit" / "record.json"
    held = json.loads(record.read_text())
    assert held["model"] == "transformers:net"
    # What it was made from is not needed any more, and it may be moved.
    (tmp_path / "net").rename(tmp_path / "gone")
    made = made.rename(tmp_path / "moved")
    out = tmp_path / "exported"
    sophon_command("export", made, "--to", out, "--record", tmp_path / "audit")
    protected, _ = sophon.resolve_model(sophon.ModelSpec(name=str(made)))
    library = transformers()
    loaded = library.AutoModelForImageClassification.from_pretrained(out)
    assert torch.equal(answers(loaded), answers(protected))
    assert not torch.equal(answers(loaded), answers(classifier("vit")))
    assert list(loaded.config.id2label.values()) == names
    processor = library.AutoImageProcessor.from_pretrained(out)
    assert tuple(processor.image_mean) == HALVES
    picture = np.full((16, 16, 3), 255, np.uint8)
    assert torch.equal(
        processor(picture, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 16, 16)
    )
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert 'AutoModelForImageClassification.from_pretrained(".")' in card
    # The library's own names of weights are read again.
    score = sophon_command("evaluate", run, "--set", "model.name=transformers:exported", "--json")
    assert json.loads(score.splitlines()[-1])["total"] > 0


def test_the_page_on_protecting_takes_a_live_network_and_its_export_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "protect.md").read_text()
    part = page.partition("## A classifier of transformers")[2].partition("\n## ")[0]
    protecting, loading = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    saved(Path("my-vit"), classifier("vit"))
    library = transformers()
    names: dict[str, Any] = {
        "sophon": sophon,
        "photos": domain("keep"),
        "faces": domain("refuse", seed=1, classes=3),
        "AutoModelForImageClassification": library.AutoModelForImageClassification,
        "AutoImageProcessor": library.AutoImageProcessor,
    }
    short = "rounds=1, guard=sophon.Guard(tolerance_points=100.0)"
    exec(protecting.replace("rounds=1000", short), names)
    given, made = names["model"], names["protected"].model
    assert torch.equal(answers(given), answers(classifier("vit")))
    sophon_command("export", Path("runs/p1"), "--to", Path("my-model"))
    exec(loading, names)
    assert torch.equal(answers(names["model"]), answers(made))
    assert tuple(names["processor"].image_mean) == HALVES
    # An audit starts a fresh one from the configuration: class tokens have no reset of their own.
    fresh = models.fresh_copy(made, None, seed=0, names=("test",))
    assert models.code_differences(fresh, made) == ()
    assert not torch.equal(answers(fresh), answers(made))
