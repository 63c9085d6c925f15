"""Public data sets at their real formats: trees of folders, binaries; copies that are not whole."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import formats
from sophon._base.errors import DataError
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import load_domain
from sophon._data.images import Fit
from sophon._data.sources.conventions import (
    CLASS_ORDERS,
    NORMALISATIONS,
    ordered_classes,
)
from sophon._data.sources.torchvision_sets import DATASETS
from sophon._data.sources.trees import TREES, read_tree
from sophon._specs import DomainSpec

CIFAR_NAMES = tuple(names[0] for names in CLASS_ORDERS["cifar10"])
STL_NAMES = tuple(names[0] for names in CLASS_ORDERS["stl10"])


def load(base: Path, **fields: Any) -> Any:
    return load_domain(DomainSpec(**fields), base=base, role="restricted")


def refused(base: Path, *words: str, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(base, **fields)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert len(message.replace(str(base), "")) < 400
    return message


# --- Trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Imagenette", "Imagenette:160px", "ILSVRC", "CINIC10"])
def test_a_tree_has_its_classes_and_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    formats.write_tree(tmp_path, name, monkeypatch)
    domain = load(tmp_path, source="tree", name=name, root=".", image_size=16)
    wanted = (
        CIFAR_NAMES if name == "CINIC10" else tuple(name for _, name in CLASS_ORDERS["imagenette"])
    )
    assert (domain.classes, domain.image_shape) == (wanted, (3, 16, 16))
    assert domain.test.labels.tolist() == [label for label in range(10) for _ in range(2)]


def test_cinic_keeps_its_own_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_tree(tmp_path, "CINIC10", monkeypatch)
    domain = load(tmp_path, source="tree", name="CINIC10", root=".")
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (40, 30, 20)
    first = Image.open(tmp_path / "valid" / "airplane" / "0.png")
    assert np.array_equal(domain.validation.pixels[0].permute(1, 2, 0), np.asarray(first))
    limited = load(tmp_path, source="tree", name="CINIC10", root=".", limit=2)
    assert (len(limited.train), len(limited.validation), len(limited.test)) == (20, 20, 20)


def test_ilsvrc_takes_ten_of_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_tree(tmp_path, "ILSVRC", monkeypatch)
    for split in ("train", "val"):
        formats.write_pictures(tmp_path / split / "n01443537", 3, "JPEG")
    domain = load(tmp_path, source="tree", name="ILSVRC", root=".", image_size=16)
    assert domain.class_count == 10
    # The plain folder source gets there too, by the order of ImageNette's classes.
    again = load(
        tmp_path, source="folder", path=".", class_order="imagenette", image_size=16, validation=0.1
    )
    assert again.classes == tuple(wnid for wnid, _ in CLASS_ORDERS["imagenette"])
    assert torch.equal(again.test.pixels, domain.test.pixels)


@pytest.mark.parametrize(
    "listing",
    ["list_eval_partition.txt", "Eval/list_eval_partition.txt", "list_eval_partition.csv"],
)
def test_celeba_is_one_collection_of_faces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str
) -> None:
    formats.write_tree(tmp_path, "CelebA", monkeypatch)
    text = (tmp_path / "list_eval_partition.txt").read_text()
    (tmp_path / "list_eval_partition.txt").unlink()
    (tmp_path / listing).parent.mkdir(exist_ok=True)
    kaggle = "image_id,partition\n" + text.replace(" ", ",")
    (tmp_path / listing).write_text(kaggle if listing.endswith("csv") else text)
    contents = read_tree("CelebA", tmp_path, Fit(16))
    assert contents.classes == ("face",)
    sizes = [
        None if part is None else len(part.labels)
        for part in (contents.train, contents.validation, contents.test)
    ]
    assert sizes == [8, 4, 4]
    assert contents.train.read(np.arange(8)).shape == (8, 16, 16, 3)
    fields: dict[str, Any] = {"source": "tree", "name": "CelebA", "root": ".", "image_size": 16}
    assert load(tmp_path, **fields, labels="none").class_count == 1
    refused(tmp_path, "labels = 'none'", **fields)


def test_celeba_without_its_splits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_tree(tmp_path, "CelebA", monkeypatch, partition=False)
    fields: dict[str, Any] = {"source": "tree", "name": "CelebA", "root": ".", "labels": "none"}
    words = ("list_eval_partition.txt is missing", "list_eval_partition.csv", "source = 'folder'")
    refused(tmp_path, *words, **fields)


@pytest.mark.parametrize("name", ["FFHQ", "FFHQ:1024px"])
def test_ffhq_keeps_its_last_ten_thousand_for_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    formats.write_tree(tmp_path, name, monkeypatch)
    contents = read_tree(name, tmp_path, Fit(16))
    assert contents.test is not None
    assert (len(contents.train.labels), len(contents.test.labels)) == (12, 4)


def test_trees_that_are_not_there_say_what_is_expected_and_how_to_get_it(tmp_path: Path) -> None:
    for name, tree in TREES.items():
        source = tree.get.split("https://")[1].split("/")[0].split(" ")[0]
        refused(tmp_path, "expected there", source, source="tree", name=name, root="no")
    place = "expected there: imagenette2/train/n01440764..n03888257, imagenette2/val/n01440764"
    said = refused(tmp_path, place, source="tree", name="Imagenette:full", root=".")
    assert "get imagenette2.tgz of" in said
    assert "160" not in said
    (tmp_path / "train").mkdir()
    refused(tmp_path, "there: train/n0144", source="tree", name="Imagenette:full", root=".")
    refused(tmp_path, "did you mean CINIC10?", source="tree", name="cinic-10", root=".")
    refused(tmp_path, "FFHQ:128px", source="tree", name="FFHQ:64px", root=".")
    refused(tmp_path, "root is missing", source="tree", name="FFHQ")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: next(root.glob("train/cat/*")).unlink(), ("39 images", "partial download")),
        (lambda root: next(root.glob("test/cat/*")).write_bytes(b""), ("is empty",)),
        (lambda root: (root / "valid").rename(root / "v"), ("valid/airplane has no images",)),
        (
            lambda root: formats.write_pictures(root / "train" / "cat" / "more", 1, "PNG"),
            ("41 images", "more than"),
        ),
    ],
)
def test_a_partial_tree_is_found_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], object],
    words: tuple[str, ...],
) -> None:
    formats.write_tree(tmp_path, "CINIC10", monkeypatch)
    harm(tmp_path)
    refused(tmp_path, *words, source="tree", name="CINIC10", root=".")


def test_validation_images_that_are_not_sorted_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_tree(tmp_path, "ILSVRC", monkeypatch)
    formats.flatten(tmp_path / "val")
    refused(tmp_path, "lie unsorted", source="tree", name="ILSVRC", root=".")
    refused(tmp_path, "no folders of classes", source="folder", path=".")


def test_a_cut_off_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_tree(tmp_path, "Imagenette", monkeypatch)
    victim = next((tmp_path / "train" / "n03417042").iterdir())
    victim.write_bytes(victim.read_bytes()[:200])
    refused(tmp_path, victim.name, source="tree", name="Imagenette", root=".", image_size=16)


def test_a_variants_own_folder_comes_before_what_else_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"train": 2, "test": 1}
    # A stray train/ and val/ beside the whole copies of two sizes.
    for name in ("Imagenette", "Imagenette:160px", "Imagenette:full"):
        formats.write_tree(tmp_path, name, monkeypatch, sizes=sizes)
    for folder in TREES["Imagenette"].classes:
        formats.write_pictures(tmp_path / "train" / folder, 2, "JPEG", (40, 32), seed=999)
    for variant, folder in (("160px", "imagenette2-160"), ("full", "imagenette2")):
        fields: dict[str, Any] = {"source": "tree", "name": f"Imagenette:{variant}"}
        found = load(tmp_path, **fields, root=".", image_size=16)
        alone = load(tmp_path / folder, **fields, root=".", image_size=16)
        assert torch.equal(found.train.pixels, alone.train.pixels)
    stray = load(tmp_path, source="tree", name="Imagenette", root=".", image_size=16)
    assert not torch.equal(stray.train.pixels, found.train.pixels)


@pytest.mark.parametrize(
    ("held", "asked", "words"),
    [
        ("160px", "full", ("160 pixels", "Imagenette:160px's", "Imagenette:full has their own")),
        ("160px", "320px", ("160 pixels", "Imagenette:160px's", "Imagenette:320px has 320 pixels")),
        ("full", "160px", ("32 pixels", "no variant's", "Imagenette:160px has 160 pixels")),
    ],
)
def test_images_of_another_variant_are_found_out(
    held: str, asked: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_tree(tmp_path, f"Imagenette:{held}", monkeypatch, sizes={"train": 2, "test": 1})
    root = TREES["Imagenette"].variants[held]
    fields: dict[str, Any] = {"source": "tree", "name": f"Imagenette:{asked}", "root": root}
    archive = f"get {TREES['Imagenette'].variants[asked]}.tgz of"
    refused(tmp_path, *words, archive, **fields, image_size=16)


def test_a_folder_with_three_splits_keeps_them_apart(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for name in ("a", "b"):
            formats.write_pictures(tmp_path / split / name, count, "PNG")
    domain = load(tmp_path, source="folder", path=".", image_size=16)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (12, 4, 6)


# --- torchvision's copies that are not whole -----------------------------------------------------


@pytest.fixture
def datasets() -> Any:
    prepare_torchvision()
    return importlib.import_module("torchvision.datasets")


def test_a_missing_and_a_damaged_batch_are_named(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    fields: dict[str, Any] = {"source": "torchvision", "name": "CIFAR10", "root": "."}
    assert load(tmp_path, **fields).class_count == 10
    third = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "data_batch_3", "published checksum", f"{len(whole) // 2:,}", **fields)
    third.unlink()
    refused(tmp_path, "data_batch_3 is missing", "cs.toronto.edu", **fields)


def test_cifar100_has_its_fine_classes(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_cifar(tmp_path, datasets.CIFAR100, monkeypatch)
    domain = load(tmp_path, source="torchvision", name="CIFAR100", root=".")
    assert (domain.class_count, domain.image_shape) == (100, (3, 32, 32))


def test_a_cut_off_mnist_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_mnist(tmp_path, monkeypatch)
    fields: dict[str, Any] = {"source": "torchvision", "name": "MNIST", "root": "."}
    assert load(tmp_path, **fields).image_shape == (1, 28, 28)
    monkeypatch.setitem(
        DATASETS, "MNIST", dataclasses.replace(DATASETS["MNIST"], counts=(60_000, 10_000))
    )
    refused(tmp_path, "40 images", "60000", **fields)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    refused(tmp_path, "MNIST (train)", "cannot be read", **fields)
    images.write_bytes(b"")
    refused(tmp_path, "train-images-idx3-ubyte is empty", **fields)
    images.unlink()
    refused(tmp_path, "train-images-idx3-ubyte is missing", **fields)


def test_a_damaged_svhn_file_is_named(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_svhn(tmp_path, datasets, monkeypatch)
    fields: dict[str, Any] = {"source": "torchvision", "name": "SVHN", "root": "."}
    assert load(tmp_path, **fields).classes == tuple("0123456789")
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:-20])
    refused(tmp_path, "test_32x32.mat", "published checksum", **fields)


@pytest.mark.parametrize("harm", ["class", "images"])
def test_a_partial_imagenette_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    formats.write_tree(tmp_path / "imagenette2-160", "Imagenette", monkeypatch)
    fields: dict[str, Any] = {"source": "torchvision", "name": "Imagenette:160px", "root": "."}
    monkeypatch.setitem(
        DATASETS, "Imagenette", dataclasses.replace(DATASETS["Imagenette"], counts=(40, 20))
    )
    domain = load(tmp_path, **fields, image_size=16)
    assert domain.classes[:2] == ("tench", "English springer")
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (30, 10, 20)
    victim = tmp_path / "imagenette2-160" / "train" / "n03888257"
    if harm == "class":
        formats.remove(victim)
        refused(tmp_path, "train/n03888257 is missing", **fields)
    else:
        next(victim.iterdir()).unlink()
        refused(tmp_path, "39 images where a whole copy has 40", **fields)


# --- Class orders and normalisations -------------------------------------------------------------


def test_stl_in_the_order_of_cifar(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_stl(tmp_path, datasets, monkeypatch)
    fields: dict[str, Any] = {"source": "torchvision", "name": "STL10", "root": "."}
    own, mapped = load(tmp_path, **fields), load(tmp_path, **fields, class_order="cifar10")
    assert own.classes == STL_NAMES
    assert mapped.classes[:3] == ("airplane", "car", "bird")
    # The same pictures under CIFAR's numbers; the monkey in the frog's place.
    for stl, cifar in (("car", 1), ("bird", 2), ("monkey", 6), ("truck", 9)):
        before = own.test.pixels[own.test.labels == STL_NAMES.index(stl)]
        assert torch.equal(mapped.test.pixels[mapped.test.labels == cifar], before)


def test_stl_without_its_names_is_refused(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_stl(tmp_path, datasets, monkeypatch)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    words = ("class_names.txt is missing", "set download = true")
    refused(tmp_path, *words, source="torchvision", name="STL10", root=".")


def test_the_orders_of_cifar_and_stl_undo_each_other() -> None:
    there = ordered_classes(STL_NAMES, "cifar10")
    back = ordered_classes(CIFAR_NAMES, "stl10")
    assert tuple(there[back[place]] for place in range(10)) == tuple(range(10))
    assert ordered_classes(CIFAR_NAMES, "cifar10") == tuple(range(10))


def test_orders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("airplane", "bird"):
        formats.write_pictures(tmp_path / name, 4, "PNG")
    fields: dict[str, Any] = {"source": "folder", "path": ".", "image_size": 16}
    refused(tmp_path, "automobile or car", **fields, class_order="cifar10")
    refused(tmp_path, "did you mean 'cifar10'?", **fields, class_order="cifar-10")
    refused(tmp_path, "keep one", **fields, class_order="cifar10", classes=(0, 1))
    refused(tmp_path, "did you mean 'imagenet'?", **fields, normalisation="image-net")
    refused(tmp_path, "keep one", **fields, normalisation="imagenet", mean=(0.5,), std=(0.5,))


def test_a_named_normalisation_is_the_domains(tmp_path: Path) -> None:
    for name in ("a", "b"):
        formats.write_pictures(tmp_path / name, 4, "PNG")
    domain = load(tmp_path, source="folder", path=".", image_size=16, normalisation="svhn")
    assert (domain.mean, domain.std) == (NORMALISATIONS["svhn"].mean, NORMALISATIONS["svhn"].std)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar10.npz"),
        ("cifar100", "cifar100.npz"),
        ("mnist", "mnist.npz"),
        ("fashion_mnist", "fashion_mnist.npz"),
    ],
)
def test_a_normalisation_is_that_of_the_real_images(
    shared_data: Path, name: str, file: str
) -> None:
    with np.load(shared_data / file, allow_pickle=False) as archive:
        pixels = archive["x_train"].astype(np.float64) / 255
    axes = (0, 1, 2)
    known = NORMALISATIONS[name]
    assert np.allclose(np.atleast_1d(pixels.mean(axes)), known.mean, atol=0.008)
    assert np.allclose(np.atleast_1d(pixels.std(axes)), known.std, atol=0.008)


def test_every_normalisation_and_tree_names_its_source() -> None:
    assert all(one.source and len(one.mean) == len(one.std) for one in NORMALISATIONS.values())
    assert all("https://" in tree.get for tree in TREES.values())


def test_the_fixture_of_cifar_is_what_the_library_reads(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = formats.write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    assert hashlib.md5(file.read_bytes()).hexdigest() == datasets.CIFAR10.test_list[0][1]
    held = pickle.loads(file.read_bytes())  # noqa: TID251 - the data set's own format
    assert np.array_equal(held["data"].reshape(-1, 3, 32, 32), planes[-len(held["labels"]) :])
