"""Bad data: each fault is one DataError of a line or two that names the value and the remedy."""

from __future__ import annotations

import dataclasses
import importlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from builders import original, restricted, trained_model
from formats import write_pictures
from sophon._base.errors import DataError
from sophon._data import (
    Domain,
    Images,
    check_batch_fits,
    check_channels,
    check_distinct,
    load_domain,
)
from sophon._data.images import Fit, open_picture
from sophon._data.sources.torchvision_sets import _picture
from sophon._specs import DomainSpec
from sophon._tasks import Classification
from sophon._training.setting import make_setting


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int = 20) -> np.ndarray:
    return np.arange(count) % 2


def refused(base: Path, *words: str, role: str = "restricted", **fields: Any) -> str:
    """Load and return the message, having checked its words and that it is short."""
    with pytest.raises(DataError) as caught:
        load_domain(DomainSpec(**fields), base=base, role=role)
    message = str(caught.value)
    assert message.startswith(role)
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 2
    # Beside the paths, which the reader needs in full.
    assert len(message.replace(str(base), "")) < 330
    assert "\n" not in message
    return message


def archive(path: Path, **arrays: Any) -> None:
    good = {"x_train": noise(20, 6, 6), "y_train": labels()}
    kept = {name: value for name, value in (good | arrays).items() if value is not None}
    np.savez(path / "bad.npz", **kept)


ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no labels": ({"y_train": None}, ("y_train", "x_train")),
    "no images": ({"x_train": None}, ("x_train",)),
    "validation without labels": ({"x_val": noise(4, 6, 6)}, ("y_val",)),
    "validation of another class": (
        {"x_val": noise(4, 6, 6), "y_val": np.array([0, 1, -1, 1])},
        ("-1",),
    ),
    "floats": ({"x_train": noise(20, 6, 6) / 255}, ("float64", "uint8")),
    "NaN": ({"x_train": np.full((20, 6, 6), np.nan)}, ("NaN", "remove")),
    "text": ({"x_train": np.full((20, 6, 6), "a")}, ("<U1", "uint8")),
    "int32": ({"x_train": np.zeros((20, 6, 6), np.int32)}, ("int32", "uint8")),
    "flat": ({"x_train": noise(20, 36)}, ("(20, 36)", "height")),
    "channels first": ({"x_train": noise(20, 3, 6, 6)}, ("(20, 3, 6, 6)", "transpose(0, 2, 3, 1)")),
    "four channels": ({"x_train": noise(20, 6, 6, 4)}, ("(20, 6, 6, 4)", "RGB")),
    "zero images": ({"x_train": noise(0, 6, 6), "y_train": labels(0)}, ("no train images",)),
    "zero pixels": ({"x_train": noise(20, 0, 6)}, ("(20, 0, 6)",)),
    "label count": ({"y_train": labels(19)}, ("20", "19 labels")),
    "label type": ({"y_train": labels() * 1.0}, ("float64", "integers")),
    "label shape": ({"y_train": np.eye(2, dtype=int)[labels()]}, ("(20, 2)", "integers")),
    "negative": ({"y_train": labels() - 1}, ("label -1", "0 to")),
    "above names": ({"class_names": np.array(["a"])}, ("label 1", "1 classes")),
    "above images": ({"y_train": labels() * 900}, ("label 900", "from 0")),
    "one class": ({"y_train": np.zeros(20, int)}, ("only class '0'", "at least 2")),
    "rare class": ({"y_train": np.eye(20, dtype=int)[3]}, ("class '1'", "too few images")),
    "test labels": ({"x_test": noise(4, 6, 6)}, ("y_test",)),
    "test size": (
        {"x_test": noise(4, 7, 6), "y_test": labels(4)},
        ("6x6", "6x7", "image_size"),
    ),
    "validation size": (
        {"x_val": noise(4, 7, 6), "y_val": labels(4)},
        ("training images are 6x6 and validation images are 6x7", "image_size"),
    ),
    "test label": (
        {"x_test": noise(4, 6, 6), "y_test": labels(4) + 5, "class_names": np.array(["a", "b"])},
        ("test label 6", "0 to 1"),
    ),
    "names": ({"class_names": np.array([1, 2])}, ("class_names", "text")),
}


@pytest.mark.parametrize("fault", ARRAYS)
def test_npz_with_wrong_arrays(tmp_path: Path, fault: str) -> None:
    arrays, words = ARRAYS[fault]
    archive(tmp_path, **arrays)
    message = refused(tmp_path, *words, source="npz", path="bad.npz")
    assert "bad.npz" in message


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    np.savez_compressed(path, x_train=noise(20, 6, 6), y_train=labels())
    path.write_bytes(path.read_bytes()[:-300])


def damaged(path: Path) -> None:
    np.savez_compressed(path, x_train=noise(20, 6, 6), y_train=labels())
    data = bytearray(path.read_bytes())
    data[150:200] = bytes(50)
    path.write_bytes(bytes(data))


def pickled(path: Path) -> None:
    objects = np.empty(20, dtype=object)
    objects[:] = [noise(1, 6, 6)] * 20
    np.savez(path, x_train=objects, y_train=labels())


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no archive of arrays" * 9)


def single(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, noise(20, 6, 6))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x_train", "text")


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (empty, "empty"),
    "truncated": (truncated, "cut off"),
    "damaged": (damaged, "cannot be read"),
    "pickled": (pickled, "pickled"),
    "garbage": (garbage, "no npz archive"),
    "single": (single, "single array"),
    "other zip": (other_zip, "not an array"),
}


@pytest.mark.parametrize("fault", FILES)
def test_npz_file_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    write, word = FILES[fault]
    write(tmp_path / "bad.npz")
    message = refused(tmp_path, word, source="npz", path="bad.npz")
    assert "bad.npz" in message


def test_npz_missing(tmp_path: Path) -> None:
    assert "no file" in refused(tmp_path, "gone.npz", "path", source="npz", path="gone.npz")


@pytest.mark.parametrize(
    ("offsets", "data"),
    [([0, 5, 3], 9), ([0, 5, 50], 9), ([0], 9), ([0, 4, 9], 9), ([-1, 4, 9], 9)],
)
def test_npz_with_bad_jpeg_packing(tmp_path: Path, offsets: list[int], data: int) -> None:
    archive(
        tmp_path,
        x_train=None,
        x_train_jpeg=np.zeros(data, np.uint8),
        x_train_offsets=np.array(offsets),
        y_train=np.arange(max(len(offsets) - 1, 1)),
    )
    word = "too few images" if offsets == [0, 4, 9] else "x_train_offsets"
    refused(tmp_path, "bad.npz", word, source="npz", path="bad.npz")
    archive(tmp_path, x_train=None, x_train_jpeg=np.zeros(9, np.uint8))
    assert "x_train_offsets" in refused(tmp_path, source="npz", path="bad.npz")


def test_npz_with_a_broken_jpeg(tmp_path: Path) -> None:
    archive(
        tmp_path,
        x_train=None,
        x_train_jpeg=np.zeros(60, np.uint8),
        x_train_offsets=np.arange(0, 61, 10),
        y_train=labels(6),
    )
    refused(tmp_path, "not a whole JPEG", source="npz", path="bad.npz")


@pytest.mark.parametrize(
    ("classes", "word"), [((0, 7), "7"), ((0, 0), "repeats"), ((0, 1, 2), "'c'")]
)
def test_classes_that_do_not_exist(tmp_path: Path, classes: tuple[int, ...], word: str) -> None:
    archive(tmp_path, class_names=np.array(["a", "b", "c"]))
    refused(tmp_path, word, "classes", source="npz", path="bad.npz", classes=classes)


def test_limit_of_one_leaves_nothing_to_cut(tmp_path: Path) -> None:
    archive(tmp_path)
    refused(tmp_path, "too few", "limit", source="npz", path="bad.npz", limit=1)


def test_test_split_without_the_classes_in_use(tmp_path: Path) -> None:
    archive(tmp_path, x_test=noise(2, 6, 6), y_test=np.array([2, 2]), y_train=np.arange(20) % 3)
    refused(tmp_path, "test split", source="npz", path="bad.npz", classes=(0, 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": (0.5,)}, ("give both or neither",)),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, ("2 values",)),
        ({"mean": (0.5,), "std": (0.0,)}, ("std = [0.0]", "above 0")),
        ({"mean": (float("nan"),), "std": (1.0,)}, ("mean = [nan]", "finite")),
        (
            {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
            ("mean = [123.675, 116.28, 103.53]", "0 to 255", "divide mean and std by 255"),
        ),
        ({"mean": (103.5,), "std": (1.0,)}, ("mean = [103.5]", "by 255")),
        ({"mean": (0.5,), "std": (127.5,)}, ("std = [127.5]", "by 255")),
    ],
)
def test_bad_normalisation(tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    archive(tmp_path)
    assert refused(tmp_path, *words, source="npz", path="bad.npz", **fields)


def test_unknown_source_and_missing_keys(tmp_path: Path) -> None:
    refused(tmp_path, "'npy'", "did you mean 'npz'?", "folder", source="npy")
    refused(tmp_path, "path", source="npz")
    refused(tmp_path, "path", source="folder")
    refused(tmp_path, "name", source="torchvision", root=".")
    refused(tmp_path, "root", source="torchvision", name="MNIST")
    message = refused(tmp_path, "name", source="embedded", role="original")
    assert "digits" in message


def test_unset_variable_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPHON_NOT_SET", raising=False)
    message = refused(tmp_path, "SOPHON_NOT_SET", source="npz", path="${SOPHON_NOT_SET}/a.npz")
    assert "not set ('${SOPHON_NOT_SET}/a.npz' needs SOPHON_NOT_SET): export it" in message
    monkeypatch.delenv("SOPHON_DATA", raising=False)
    remedy = "export it; SOPHON_DATA is the folder that holds the image sets (docs/data.md)"
    refused(tmp_path, remedy, source="npz", path="${SOPHON_DATA}/a.npz")
    both = "SOPHON_DATA and SOPHON_NOT_SET are not set ('${SOPHON_DATA}/"
    refused(tmp_path, both, source="npz", path="${SOPHON_DATA}/${SOPHON_NOT_SET}/a.npz")


# --- folder -------------------------------------------------------------------------------------


def write_images(folder: Path, count: int = 6, size: tuple[int, int] = (8, 8)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(noise(count, *size, 3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_folder_missing_or_empty(tmp_path: Path) -> None:
    refused(tmp_path, "no folder", "path", source="folder", path="gone")
    assert "of each class" in refused(tmp_path, source="folder", path=".")


def test_folder_with_an_empty_class(tmp_path: Path) -> None:
    write_images(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert f"{tmp_path / 'b'}" in refused(tmp_path, "no images;", source="folder", path=".")
    (tmp_path / "b" / "1.heic").write_text("of a telephone")
    refused(tmp_path, "no images but other files (1 .heic)", source="folder", path=".")


def test_folder_with_one_class(tmp_path: Path) -> None:
    write_images(tmp_path / "a")
    assert "only class 'a'" in refused(tmp_path, source="folder", path=".")


def test_folder_with_mostly_other_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 2)
        for number in range(3):
            (tmp_path / name / f"{number}.csv").write_text("1,2")
    assert "3 of 5" in refused(tmp_path, ".csv", source="folder", path=".")


def test_folder_with_different_sizes(tmp_path: Path) -> None:
    write_images(tmp_path / "a")
    write_images(tmp_path / "b", size=(8, 9))
    message = refused(tmp_path, "8x8", "9x8", "image_size", source="folder", path=".")
    assert str(tmp_path / "b") in message


def test_folder_with_test_classes_of_its_own(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/c"):
        write_images(tmp_path / name)
    assert "'c'" in refused(tmp_path, "test", source="folder", path=".")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_folder_with_a_damaged_image(tmp_path: Path, content: bytes | None) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, size=(40, 40))
    bad = tmp_path / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:900] if content is None else content)
    message = refused(tmp_path, "cannot be read as an image", source="folder", path=".")
    assert str(bad) in message


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n"


@pytest.mark.parametrize("source", ["folder", "npz", "torchvision"])
def test_no_format_that_starts_a_program_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    file = tmp_path / "sly.png"
    file.write_bytes(EPS)
    if source == "folder":
        for label in "ab":
            write_pictures(tmp_path / "set" / label, 12, "PNG")
        file.replace(tmp_path / "set" / "b" / "sly.png")
        refused(tmp_path, "sly.png", "identify", source="folder", path="set")
    elif source == "npz":
        data = np.frombuffer(EPS * 20, np.uint8)
        offsets = np.arange(21) * len(EPS)
        archive(tmp_path, x_train=None, x_train_jpeg=data, x_train_offsets=offsets)
        refused(tmp_path, "train image", source="npz", path="bad.npz")
    else:
        with pytest.raises(DataError, match=r"sly\.png"):
            _picture(SimpleNamespace(_samples=[(str(file), 0)]), 0, Fit())


def test_a_large_picture_is_read_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_pictures(tmp_path, 1, "PNG", (12, 12))
    assert open_picture(tmp_path / "0.png", Fit()).shape == (12, 12, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"0\.png"):
        open_picture(tmp_path / "0.png", Fit())


def test_folder_with_32_bit_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("F", (8, 8)).save(tmp_path / name / f"{number}.tif")
    assert "mode F" in refused(tmp_path, "8 bits", source="folder", path=".")


# --- torchvision and embedded ---------------------------------------------------------------------


def test_unknown_torchvision_name(tmp_path: Path) -> None:
    message = refused(tmp_path, "'cifar-10'", source="torchvision", name="cifar-10", root=".")
    assert "did you mean CIFAR10?" in message
    assert "GTSRB" in message
    refused(tmp_path, "no variants", source="torchvision", name="MNIST:x", root=".")


@pytest.mark.parametrize(
    "name",
    [
        "CIFAR10",
        "CIFAR100",
        "MNIST",
        "FashionMNIST",
        "SVHN",
        "STL10",
        "Imagenette",
        "GTSRB",
        "CelebA",
    ],
)
def test_absent_torchvision_files(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, name, "download = true", source="torchvision", name=name, root="no")
    assert str(tmp_path / "no") in message


def test_unknown_embedded_name(tmp_path: Path) -> None:
    message = refused(tmp_path, "'digit'", source="embedded", name="digit")
    assert "did you mean 'digits'?" in message


def test_embedded_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sophon._data.sources.embedded import digits

    original = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "sklearn.datasets":
            raise ImportError(name)
        return original(name, package)

    digits.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    message = refused(tmp_path, "scikit-learn", source="embedded", name="digits")
    assert "-c constraints.txt '.[demo]'" in message


# --- Arrays and datasets through the API ------------------------------------------------------


def test_arrays_without_test_labels() -> None:
    with pytest.raises(DataError, match="both or neither"):
        Domain.from_arrays("a", noise(20, 6, 6), labels(), test_images=noise(4, 6, 6))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_outside_their_range(fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        Domain.from_arrays("a", noise(20, 6, 6), labels(), validation=fraction)


@pytest.mark.parametrize(
    ("images", "targets", "word"),
    [
        (torch.full((20, 1, 6, 6), float("nan")), torch.arange(20) % 2, "NaN"),
        (torch.full((20, 1, 6, 6), 2.5), torch.arange(20) % 2, "normalisation"),
        (torch.zeros(20, 5, 6, 6), torch.arange(20) % 2, "(5, 6, 6)"),
        (torch.zeros(20, 1, 6, 6, dtype=torch.int64), torch.arange(20) % 2, "int64"),
        (torch.zeros(20, 1, 6, 6), torch.arange(20) / 2, "label"),
        (torch.zeros(20, 1, 6, 6), torch.zeros(20, 2, dtype=torch.int64), "label"),
        (torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64), "no images"),
    ],
)
def test_datasets_with_bad_items(images: torch.Tensor, targets: torch.Tensor, word: str) -> None:
    with pytest.raises(DataError) as caught:
        Domain.from_datasets("a", TensorDataset(images, targets))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([{"img": 0, "fine_label": 1}], ("'img', 'fine_label'", "columns = ('image', 'label')")),
        ({"one": [], "two": []}, ("'one, two'", "none is called train")),
        ([(0, 1, 2)], ("item 0 is a tuple of 3", "pairs")),
        ([torch.zeros(2, 6, 6)], ("item 0 is a Tensor", "pairs")),
    ],
)
def test_datasets_of_other_items(dataset: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        Domain.from_datasets("a", dataset)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(DataError, match="divide mean and std by 255"):
        Domain.from_arrays("a", noise(20, 6, 6), labels(), mean=(127.5,), std=(127.5,))


def test_images_of_the_wrong_type() -> None:
    with pytest.raises(DataError, match="float32"):
        Images(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="int32"):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32))


def test_fewer_images_than_a_batch() -> None:
    domain = Domain.from_arrays("few", noise(20, 6, 6), labels())
    with pytest.raises(DataError) as caught:
        check_batch_fits(domain, 64, "batch_size")
    for word in ("'few'", f"{len(domain.train)} training images", "batch_size = 64", "at most"):
        assert word in str(caught.value)
    check_batch_fits(domain, len(domain.train), "batch_size")


def test_rgb_images_for_a_grey_model() -> None:
    with pytest.raises(DataError, match="in_channels = 3"):
        check_channels("colour", 3, 1)


def test_the_same_data_twice_is_refused_with_its_share() -> None:
    images = noise(100, 6, 6)
    original = Domain.from_arrays("keep", images, np.arange(100) % 2)
    mixed = np.concatenate([images[:60], noise(40, 6, 6, seed=9)])
    restricted = Domain.from_arrays("deny", mixed, np.arange(100) % 5, split_seed=3)
    with pytest.raises(DataError, match=r"'deny' is the same data as .*'keep': [56]\d%"):
        check_distinct(original, restricted)


def test_the_original_hidden_among_other_images_is_refused() -> None:
    images = noise(100, 6, 6)
    original = Domain.from_arrays("keep", images, np.arange(100) % 2)
    mixed = np.concatenate([images, noise(300, 6, 6, seed=9)])
    restricted = Domain.from_arrays("deny", mixed, np.arange(400) % 5)
    with pytest.raises(
        DataError, match=r"'deny' is the same data.*of the training images of 'keep'"
    ):
        check_distinct(original, restricted)


def test_a_minority_of_shared_images_passes() -> None:
    images = noise(100, 6, 6)
    original = Domain.from_arrays("keep", images, np.arange(100) % 2)
    mixed = np.concatenate([images[:40], noise(60, 6, 6, seed=9)])
    restricted = Domain.from_arrays("deny", mixed, np.arange(100) % 2)
    check_distinct(original, restricted)
    assert original.fingerprint() != restricted.fingerprint()


def test_labels_with_gaps_are_refused_unless_chosen_or_named() -> None:
    images = np.zeros((40, 4, 4), dtype=np.uint8)
    labels = np.array([0, 7] * 20)
    with pytest.raises(DataError, match=r"up to 7 .* label 1; number the 2 classes"):
        Domain.from_arrays("gaps", images, labels)
    named = Domain.from_arrays("named", images, labels, classes=list("abcdefgh"))
    assert named.class_count == 8


def test_two_restricted_domains_of_the_same_images_are_refused() -> None:
    twin = dataclasses.replace(restricted(), name="twin")
    with pytest.raises(DataError, match="'twin' is the same data as the restricted 'digits-5-9'"):
        make_setting(
            trained_model(),
            task=Classification(),
            original=original(),
            restricted=(restricted(), twin),
            head=None,
            precision="fp32",
            device="cpu",
        )
