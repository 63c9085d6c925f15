"""The archives of the small recipes, made from a few images of each public data set."""

from __future__ import annotations

import importlib
import io
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import formats
from grid import TRAINING_IMAGES
from scripts import script_at
from sophon._base.errors import DataError
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import load_domain
from sophon._data.sources.archives import _OF_RECIPES
from sophon._specs import DomainSpec

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = {
    "cifar10": (2, 1),
    "cifar10_jpeg": (3, 2),
    "mnist": (3, 2),
    "gtsrb10": (4, 2),
    "tiny_imagenet20_64": (2, 1),
    "cifar100": (2, 1),
    "orl_faces64": (3, 2),
}
TRACKS, FRAMES = 5, 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script, which takes a few images of each class."""
    module = script_at(RECIPES / "make_archives.py")
    monkeypatch.setattr(module, "WHOLE", dict(module.COUNTS), raising=False)
    monkeypatch.setattr(module, "COUNTS", SMALL)
    return module


@pytest.fixture
def public(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a few images of each public data set, as it is published."""
    root = tmp_path / "public"
    prepare_torchvision()
    datasets: Any = importlib.import_module("torchvision.datasets")
    formats.write_cifar(root, datasets.CIFAR10, monkeypatch, per_class=4)
    formats.write_cifar(root, datasets.CIFAR100, monkeypatch, per_class=2)
    formats.write_mnist(root, monkeypatch)
    for person in range(1, script.PERSONS + 1):
        place = root / "orl_faces" / f"s{person}"
        place.mkdir(parents=True)
        for number in range(1, 6):
            Image.new("L", (92, 112), person).save(place / f"{number}.pgm")
    for number in script.GTSRB:
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{number:05}"
        folder.mkdir(parents=True)
        for track in range(TRACKS):
            for frame in range(FRAMES):
                # The shade tells the physical sign, whatever is resized.
                shade = Image.new("RGB", (25 + frame, 25 + frame), (50 * track, number, 9))
                shade.save(folder / f"{track:05}_{frame:05}.ppm")
    tiny = root / "tiny-imagenet-200"
    rows = []
    for index, label in enumerate(script.TINY_IMAGENET):
        formats.write_pictures(tiny / "train" / label / "images", 3, "JPEG", (64, 64), index)
        name = f"val_{index}.JPEG"
        (tiny / "val" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), index).save(tiny / "val" / "images" / name)
        rows.append(f"{name}\t{label}\t0\t0\t62\t62")
    (tiny / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def test_archives_have_the_format_that_the_recipes_read(
    script: ModuleType, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "archives"
    script.main(["--from", str(public), "--to", str(to)])
    assert {file.name for file in to.iterdir()} == _OF_RECIPES
    sides = {"mnist": 28, "tiny_imagenet20_64": 64, "orl_faces64": 64}
    counted = {"tiny_imagenet20_64": 20, "cifar100": 100, "orl_faces64": 40}
    for name, counts in SMALL.items():
        held = np.load(to / f"{name}.npz", allow_pickle=False)
        classes = counted.get(name, 10)
        assert len(held["class_names"]) == classes
        for split, count in zip(("train", "test"), counts, strict=True):
            blocks = held[f"y_{split}"].reshape(count, classes)
            assert (np.sort(blocks, axis=1) == np.arange(classes)).all()
        spec = DomainSpec(source="npz", path=f"{name}.npz", validation=0.5)
        domain = load_domain(spec, base=to, role="original")
        assert domain.class_count == classes
        assert domain.image_shape[1:] == (sides.get(name, 32),) * 2
        assert len(domain.test) == counts[1] * classes
    assert np.load(to / "mnist.npz")["class_names"].tolist() == list("0123456789")
    spec = DomainSpec(source="npz", path="cifar100.npz", labels="coarse", validation=0.5)
    coarse = load_domain(spec, base=to)
    assert (coarse.class_count, coarse.classes[4]) == (20, "fruit_and_vegetables")
    again = (to / "mnist.npz").stat().st_mtime_ns
    script.main(["--from", str(public), "--to", str(to), "mnist"])
    assert (to / "mnist.npz").stat().st_mtime_ns == again
    assert "mnist.npz is there" in capsys.readouterr().out


def test_no_image_and_no_sign_is_in_two_places(script: ModuleType, public: Path) -> None:
    lossless, packed = (
        script.cifar10(public),
        script._drawn("CIFAR10", public, "cifar10_jpeg", skipped=SMALL["cifar10"]),
    )
    seen = [image.tobytes() for held in (lossless, packed) for image in held["x_train"]]
    assert len(set(seen)) == len(seen) == 10 * (2 + 3)
    signs = script.gtsrb10(public)
    for label, number in enumerate(script.GTSRB):
        tracks = [
            {int(image[0, 0, 0]) for image in signs[f"x_{split}"][signs[f"y_{split}"] == label]}
            for split in ("train", "test")
        ]
        assert not tracks[0] & tracks[1]
        # Frames are spread over all signs.
        assert (len(tracks[0]), len(tracks[1])) == (4, 1)
        assert {int(image[0, 0, 1]) for image in signs["x_test"][signs["y_test"] == label]} == {
            number
        }


def test_whole_archives_have_the_counts_of_the_grid(script: ModuleType) -> None:
    classes = {"tiny_imagenet20_64": 20, "cifar100": 100}
    names = {"gtsrb10": "gtsrb", "tiny_imagenet20_64": "tiny-imagenet20"}
    for archive, (train, _) in script.WHOLE.items():
        kept = (train - round(0.1 * train)) * classes.get(archive, 10)
        # One is the ablation study's, one is joined and cut anew.
        if archive not in ("cifar10_jpeg", "orl_faces64"):
            assert kept == TRAINING_IMAGES[names.get(archive, archive)]
    paths = {
        str(table["path"]).rpartition("/")[2]
        for file in (RECIPES / "small").glob("*.toml")
        for held in [tomllib.loads(file.read_text())]
        for table in (held["original"], *held.get("restricted", ()))
    }
    assert paths == {f"{name}.npz" for name in script.ARCHIVES} == _OF_RECIPES


def test_what_is_not_there_is_named(
    script: ModuleType, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    (public / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    formats.remove(public / "gtsrb" / "GTSRB" / "Training" / "00004")
    next((public / "MNIST" / "raw").iterdir()).unlink()
    for name, words in {
        "tiny_imagenet20_64": "tiny-imagenet-200.zip",
        "gtsrb10": "benchmark.ini.rub.de",
        "mnist": "ossci-datasets",
    }.items():
        with pytest.raises(SystemExit, match=words):
            script.main(["--from", str(public), "--to", str(to), name])
    with pytest.raises(SystemExit):
        script.main(["--from", str(public), "--to", str(to), "svhn"])
    assert "svhn is no archive of the recipes" in capsys.readouterr().err
    assert list(to.iterdir()) == []


@pytest.fixture
def originals() -> ModuleType:
    """Return the script that joins two archives."""
    return script_at(RECIPES / "withstand/originals.py")


def test_an_archive_to_join_that_is_not_there_is_one_line(
    originals: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"^there is no file .*cifar10\.npz; make it with.*py$"):
        originals.main([str(tmp_path), str(tmp_path / "joined.npz")])
    (tmp_path / "cifar10.npz").touch()
    with pytest.raises(SystemExit, match=r"^there is no file .*cifar10_jpeg\.npz; make it"):
        originals.main([str(tmp_path), str(tmp_path / "joined.npz")])
    assert not (tmp_path / "joined.npz").exists()


def test_only_jpeg_files_are_unpacked(originals: ModuleType) -> None:
    shade = np.full((8, 8, 3), 90, np.uint8)
    for kind, read in (("JPEG", True), ("PNG", False)):
        held = io.BytesIO()
        Image.fromarray(shade).save(held, kind)
        packed = np.frombuffer(held.getvalue(), np.uint8)
        archive = {"x_test_jpeg": packed, "x_test_offsets": np.array([0, len(packed)])}
        if read:
            assert np.array_equal(originals.unpacked(archive, "test")[0], shade)
        else:
            with pytest.raises(OSError, match="cannot identify"):
                originals.unpacked(archive, "test")


def test_the_joined_original_validates_on_images_of_another_archive(
    originals: ModuleType, shared_data: Path
) -> None:
    arrays = originals.joined(shared_data)
    assert arrays["x_train"].shape == (13660, 32, 32, 3)
    assert len(arrays["y_train"]) == 13660
    with np.load(shared_data / "cifar10.npz") as exact:
        assert np.array_equal(arrays["x_test"], exact["x_test"])
        assert np.array_equal(arrays["x_train"][:3660], exact["x_train"])
    seen = {image.tobytes() for image in arrays["x_train"]}
    assert not any(image.tobytes() in seen for image in arrays["x_val"])
    assert np.bincount(arrays["y_val"]).tolist() == [200] * 10


def test_an_archive_of_the_recipes_that_is_missing_says_what_makes_it(tmp_path: Path) -> None:
    for name, maker in {
        "mnist": "recipes/make_archives.py",
        "cifar10_unseen": "recipes/withstand/originals.py",
    }.items():
        with pytest.raises(DataError, match=f"no file .*{name}.npz; .*make it with {maker}"):
            load_domain(DomainSpec(source="npz", path=f"{name}.npz"), base=tmp_path)
