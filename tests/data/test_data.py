"""Domains: real sources, fixed splits, batches."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import io
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from sophon._base.errors import DataError
from sophon._base.seeding import derive_seed
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    Images,
    batch,
    check_batch_fits,
    check_channels,
    check_distinct,
    load_domain,
    resolve_normalisation,
    share_prompts,
)
from sophon._data.images import Fit, suffixes
from sophon._data.loading import expanded
from sophon._data.sources.embedded import digits, letters
from sophon._data.sources.torchvision_sets import DATASETS
from sophon._data.sources.trees import TREES
from sophon._data.splits import first_per_class, stratified
from sophon._specs import DomainSpec

JPEG_SHA256 = {
    "train": "b65f52dc6299ae4f7f885831ea08382412ab88b04d9c863f6b1dabdda86288a8",
    "test": "b3f16ca2a01b3033989ac74cc1514340f985af91563562ae56a276f46b59c196",
}


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def small(count: int = 60, classes: int = 3, *, grey: bool = False, **options: Any) -> Domain:
    shape = (8, 10) if grey else (8, 10, 3)
    return Domain.from_arrays("small", noise(count, *shape), np.arange(count) % classes, **options)


def rows(*splits: Images) -> list[bytes]:
    return [one.numpy().tobytes() for split in splits for one in split.pixels]


def spec(**fields: Any) -> DomainSpec:
    return DomainSpec(**fields)


# --- npz: the real image sets -------------------------------------------------------------------


def test_cifar10_has_its_shapes_and_keeps_its_test_split(shared_data: Path) -> None:
    domain = load_domain(spec(source="npz", path="cifar10.npz"), base=shared_data)
    with np.load(shared_data / "cifar10.npz", allow_pickle=False) as archive:
        expected = torch.from_numpy(archive["x_test"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(archive["y_test"])
    assert len(domain.train) + len(domain.validation) == 3660
    assert domain.image_shape == (3, 32, 32)
    assert (domain.name, domain.class_count, domain.classes[0]) == ("cifar10", 10, "airplane")
    assert torch.equal(domain.test.pixels, expected)
    assert torch.equal(domain.test.labels, labels)


def test_jpeg_archive_decodes_to_its_published_hash(shared_data: Path) -> None:
    from sophon._data.sources.archives import read_archive

    contents = read_archive(shared_data / "cifar10_jpeg.npz", Fit())
    assert contents.test is not None
    for name, part in (("train", contents.train), ("test", contents.test)):
        pixels = part.read(np.arange(len(part.labels)))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == JPEG_SHA256[name]


def test_grey_archive_has_one_channel(shared_data: Path) -> None:
    domain = load_domain(spec(source="npz", path="mnist.npz"), base=shared_data)
    assert domain.image_shape == (1, 28, 28)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (4500, 500, 1000)


def test_classes_are_filtered_and_renumbered_in_the_given_order(shared_data: Path) -> None:
    wanted = (71, 3, 40)
    domain = load_domain(
        spec(source="npz", path="cifar100.npz", classes=wanted, limit=20), base=shared_data
    )
    with np.load(shared_data / "cifar100.npz", allow_pickle=False) as archive:
        names = tuple(str(archive["class_names"][one]) for one in wanted)
        first = archive["x_train"][archive["y_train"] == 71][:20]
        tests = archive["x_test"][archive["y_test"] == 3]
    assert domain.classes == names
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (54, 6, 30)
    ours = {
        one.permute(1, 2, 0).numpy().tobytes()
        for split in (domain.train, domain.validation)
        for one in split.pixels[split.labels == 0]
    }
    assert ours == {one.tobytes() for one in first}
    assert torch.equal(
        domain.test.pixels[domain.test.labels == 1], torch.from_numpy(tests).permute(0, 3, 1, 2)
    )


def test_a_real_archive_is_resized(shared_data: Path) -> None:
    domain = load_domain(
        spec(source="npz", path="orl_faces64.npz", image_size=32), base=shared_data
    )
    assert domain.image_shape == (1, 32, 32)


def test_archive_without_test_split_or_names(tmp_path: Path) -> None:
    # Arrays of other names are no splits.
    others = {
        name: noise(3, 5, 5) for name in ("x_validation", "y_values", "x_test_raw", "y_tests")
    }
    labels = np.arange(40) % 2
    np.savez(tmp_path / "plain.npz", x_train=noise(40, 6, 6), y_train=labels, **others)
    domain = load_domain(spec(source="npz", path="plain.npz", test=0.25), base=tmp_path)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (26, 4, 10)
    assert domain.classes == ("0", "1")


@pytest.mark.parametrize("coarse", [False, True])
def test_an_archive_may_have_validation_images_of_its_own(coarse: bool, tmp_path: Path) -> None:
    pixels, labels = noise(30, 6, 6), np.arange(30) % 4
    groups = {"coarse_of_fine": np.array([0, 0, 1, 1]), "coarse_names": np.array(["a", "b"])}
    np.savez(
        tmp_path / "d.npz",
        x_train=pixels[:16], y_train=labels[:16], x_val=pixels[16:24], y_val=labels[16:24],
        x_test=pixels[24:], y_test=labels[24:], **groups,
    )  # fmt: skip
    how = {"labels": "coarse"} if coarse else {}
    domain = load_domain(spec(source="npz", path="d.npz", **how), base=tmp_path)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (16, 8, 6)
    assert np.array_equal(domain.validation.pixels.numpy()[:, 0], pixels[16:24])
    wanted = labels[16:24] // 2 if coarse else labels[16:24]
    assert domain.validation.labels.tolist() == wanted.tolist()


# --- Splits -------------------------------------------------------------------------------------


def test_what_settings_leave_out_or_do_not_change_is_said(tmp_path: Path) -> None:
    held = {"x_train": noise(20, 6, 6), "y_train": np.arange(20) % 4}
    own = {"x_val": noise(8, 6, 6), "y_val": np.arange(8) % 4, "x_valid": noise(8, 6, 6)}
    np.savez(tmp_path / "own.npz", **held, **own)
    chosen = {"validation": 0.3, "test": 0.4, "classes": (0, 1), "limit": 2}
    domain = load_domain(spec(source="npz", path="own.npz", **chosen), base=tmp_path)
    assert domain.remarks == (
        "arrays x_valid not read",
        "test cut from the training images",
        "validation = 0.3 is not used, there are validation images",
        "2 of 4 classes left out, as chosen",
        "2 training images left out by limit = 2",
    )
    np.savez(tmp_path / "cut.npz", **held)
    domain = load_domain(spec(source="npz", path="cut.npz", validation=0.3), base=tmp_path)
    assert domain.remarks == ("test and validation cut from the training images",)


def test_splits_are_the_same_every_time_and_follow_the_seed() -> None:
    assert small().fingerprint() == small().fingerprint()
    assert small().fingerprint() != small(split_seed=1).fingerprint()


def test_splits_share_no_image_and_lose_none() -> None:
    domain = small()
    found = rows(domain.train, domain.validation, domain.test)
    everything = [one.transpose(2, 0, 1).tobytes() for one in noise(60, 8, 10, 3)]
    assert sorted(found) == sorted(everything)


def test_given_test_images_are_left_alone() -> None:
    test = noise(9, 8, 10, 3, seed=5)
    domain = small(test_images=test, test_labels=np.arange(9) % 3)
    assert torch.equal(domain.test.pixels, torch.from_numpy(test).permute(0, 3, 1, 2))
    assert len(domain.train) + len(domain.validation) == 60


def test_validation_is_drawn_from_a_stream_of_its_own() -> None:
    images, labels = noise(60, 8, 10, 3), np.arange(60) % 3
    test = {"test_images": noise(9, 8, 10, 3, seed=5), "test_labels": np.arange(9) % 3}
    domain = Domain.from_arrays("a", images, labels, split_seed=7, **test)
    drawn = stratified(labels, 0.1, derive_seed(7, "validation"), ("0", "1", "2"))[1]
    expected = torch.from_numpy(images[drawn]).permute(0, 3, 1, 2)
    assert torch.equal(domain.validation.pixels, expected)


def test_a_domain_is_cut_and_weighed_as_its_specification_says(tmp_path: Path) -> None:
    images, labels = noise(60, 8, 10), np.arange(60) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels)
    cut: dict[str, Any] = {"validation": 0.2, "split_seed": 7}
    domain = load_domain(
        spec(source="npz", path="d.npz", weight=2.5, test=0.4, **cut), base=tmp_path
    )
    assert domain.weight == 2.5
    drawn = stratified(labels, 0.4, derive_seed(7, "test"), ("0", "1", "2"))[1]
    assert np.array_equal(domain.test.pixels[:, 0].numpy(), images[drawn])
    # Of each class 8 of 20, then 2 of the 12 that are left.
    assert (len(domain.validation), len(domain.test)) == (6, 24)
    pairs = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    for same in (
        Domain.from_arrays("a", images, labels, test=0.4, **cut),
        Domain.from_datasets("a", pairs, test_fraction=0.4, **cut),
    ):
        assert same.fingerprint() == domain.fingerprint()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_partitions_and_is_proportional(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    kept, held = stratified(labels, fraction, seed, tuple("abcdef"))
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        taken = int((labels[held] == label).sum())
        assert 1 <= taken <= size - 1
        assert abs(taken - size * fraction) <= 1
    again = stratified(labels, fraction, seed, tuple("abcdef"))
    assert np.array_equal(again[1], held)


def test_limit_keeps_the_first_of_each_class() -> None:
    assert first_per_class(np.array([0, 1, 0, 0, 1, 2]), 2).tolist() == [0, 1, 2, 4, 5]


def test_fingerprint_depends_on_contents_not_on_names() -> None:
    images, labels = noise(40, 6, 6), np.arange(40) % 2
    base = Domain.from_arrays("a", images, labels)
    assert Domain.from_arrays("b", images, labels).fingerprint() == base.fingerprint()
    changed = images.copy()
    changed[0, 0, 0] ^= 1
    assert Domain.from_arrays("a", changed, labels).fingerprint() != base.fingerprint()
    assert Domain.from_arrays("a", images, 1 - labels).fingerprint() != base.fingerprint()
    scaled = Domain.from_arrays("a", images, labels, mean=[0.5], std=[0.5])
    assert scaled.fingerprint() != base.fingerprint()


def test_fingerprint_sees_every_split() -> None:
    base = small()
    prints = {base.fingerprint()}
    for name in ("train", "validation", "test"):
        held: Images = getattr(base, name)
        pixels, labels = held.pixels.clone(), held.labels.clone()
        pixels[-1, 0, 0, 0] ^= 1
        labels[-1] = (labels[-1] + 1) % 3
        for changed in (Images(pixels, held.labels), Images(held.pixels, labels)):
            prints.add(dataclasses.replace(base, **{name: changed}).fingerprint())
    assert len(prints) == 7


# --- folder -------------------------------------------------------------------------------------


def write_images(
    folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (12, 8)
) -> None:
    folder.mkdir(parents=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    for number, pixels in enumerate(noise(count, *shape, seed=len(str(folder)))):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


def test_folder_keeps_the_pixels_and_sorts_the_classes(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        write_images(tmp_path / name, 10)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    domain = load_domain(spec(source="folder", path="."), base=tmp_path)
    assert domain.classes == ("ant", "zebra")
    assert domain.image_shape == (3, 8, 12)
    assert domain.name == tmp_path.name
    first = np.asarray(Image.open(tmp_path / "ant" / "00.png")).transpose(2, 0, 1).tobytes()
    assert first in rows(domain.train, domain.validation, domain.test)


@pytest.mark.parametrize(
    ("folders", "sizes", "remark"),
    [
        ("train test", (18, 2, 6), "train/ for training, test/ for test"),
        ("train val", (18, 2, 6), "val/ for test"),
        ("Train Test", (18, 2, 6), "Test/ for test"),
        ("training validation", (18, 2, 6), "validation/ for test"),
        ("seg_train/seg_train seg_test/seg_test", (18, 2, 6), "seg_test/seg_test/ for test"),
        ("trainingSet testSet", (18, 2, 6), "testSet/ for test"),
        ("train2017 val2017", (18, 2, 6), "val2017/ for test"),
        ("TRAIN dev", (18, 2, 6), "dev/ for test"),
        ("train eval", (18, 2, 6), "eval/ for test"),
        ("train dev test", (20, 6, 6), "test/ for test, dev/ for validation"),
        ("train test valid test_extra", (20, 6, 6), "test_extra/ not read"),
        ("train test test_hard", (18, 2, 6), "test_hard/ not read"),
        ("train val seg_test", (20, 6, 6), "seg_test/ for test, val/ for validation"),
        ("train test masks", (18, 2, 6), "masks/ not read"),
        ("train train_more", (14, 2, 4), "train_more/ not read"),
    ],
)
def test_folder_takes_directories_of_splits(
    tmp_path: Path, folders: str, sizes: tuple[int, int, int], remark: str
) -> None:
    for number, split in enumerate(folders.split()):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, 3 if number else 10)
    domain = load_domain(spec(source="folder", path=str(tmp_path)), base=Path())
    assert domain.classes == ("a", "b")
    assert (len(domain.train), len(domain.validation), len(domain.test)) == sizes
    assert remark in "; ".join(domain.remarks)


@pytest.mark.parametrize(
    ("folders", "classes", "remark"),
    [
        ("train test", ("test", "train"), "train/, test/ look like splits and are taken for"),
        ("bus freight_train/x", ("bus", "freight_train"), ""),
        ("bus train", ("bus", "train"), ""),
        ("invalid valid", ("invalid", "valid"), ""),
        ("a/train a/test b", ("a", "b"), "test/, train/ in a look like splits"),
    ],
)
def test_folder_classes_may_be_named_as_splits(
    tmp_path: Path, folders: str, classes: tuple[str, str], remark: str
) -> None:
    for name in folders.split():
        write_images(tmp_path / name, 6)
    domain = load_domain(spec(source="folder", path="."), base=tmp_path)
    assert domain.classes == classes
    assert remark in "; ".join(domain.remarks)
    assert ("look like" in "; ".join(domain.remarks)) == bool(remark)


def test_images_without_classes_have_splits_under_any_usual_name(tmp_path: Path) -> None:
    for name, count in {"Train": 10, "Dev": 3, "Test": 2}.items():
        write_images(tmp_path / name, count)
    domain = load_domain(spec(source="folder", path=".", labels="none"), base=tmp_path)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (10, 3, 2)


@pytest.mark.parametrize("suffix", sorted({".jfif", ".jpe", ".JPG", ".dib", ".pbm"} | suffixes()))
def test_folder_reads_every_suffix_of_a_format_that_pillow_reads(
    tmp_path: Path, suffix: str
) -> None:
    kind = Image.registered_extensions()[suffix.lower()]
    if suffix == ".pfm":
        pytest.skip("of 32 bits a value, which are refused")
    for name in ("a", "b"):
        write_images(tmp_path / name, 6, "RGB")
        for file in (tmp_path / name).iterdir():
            picture = Image.open(file).convert("1" if suffix == ".pbm" else "RGB")
            file.unlink()
            picture.save(file.with_suffix(suffix), format=kind)
    domain = load_domain(spec(source="folder", path=".", image_size=8), base=tmp_path)
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 12
    assert "left out" not in "; ".join(domain.remarks)


def test_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 6)
    for number in range(3):
        (tmp_path / "a" / f"{number}.HEIC").write_text("of a telephone")
    (tmp_path / "b" / "bare").write_text("no suffix")
    (tmp_path / "b" / "x.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / ".cache").mkdir()
    shutil.copy(tmp_path / "a" / "00.png", tmp_path / "a" / ".cache")
    shutil.copy(tmp_path / "a" / "00.png", tmp_path)
    domain = load_domain(spec(source="folder", path="."), base=tmp_path)
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 12
    assert domain.remarks[0] == (
        "6 files left out (3 .heic, 1 images in no class's folder, 1 no suffix,"
        " 1 links that lead nowhere)"
    )


@pytest.mark.parametrize("labels", ["own", "none"])
def test_folder_follows_links_to_folders_and_ends(tmp_path: Path, labels: str) -> None:
    for name in ("d/a", "d/b", "elsewhere"):
        write_images(tmp_path / name, 6)
    (tmp_path / "d" / "b" / "part2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "b" / "again").symlink_to(tmp_path / "d" / "b")
    (tmp_path / "d" / "b" / "above").symlink_to(tmp_path / "d")
    domain = load_domain(spec(source="folder", path="d", labels=labels), base=tmp_path)
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 18


def test_links_to_links_lead_to_a_folder_once(tmp_path: Path) -> None:
    write_images(tmp_path / "d" / "a", 6)
    write_images(tmp_path / "d" / "b", 6)
    last = tmp_path / "d" / "b"
    for level in range(12):
        folder = tmp_path / f"n{level}"
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(last)
        last = folder
    (tmp_path / "d" / "a" / "all").symlink_to(last)
    domain = load_domain(spec(source="folder", path="d"), base=tmp_path)
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 18


def test_folder_resizes_the_shorter_side_and_cuts_the_middle(tmp_path: Path) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8))
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    for name, picture in {"a": wide, "b": tall}.items():
        (tmp_path / name).mkdir()
        for number in range(4):
            picture.save(tmp_path / name / f"{number}.png")
    domain = load_domain(spec(source="folder", path=".", image_size=10), base=tmp_path)
    assert domain.image_shape == (3, 10, 10)
    expected = [
        wide.resize((30, 10), Image.Resampling.BILINEAR).crop((10, 0, 20, 10)),
        tall.resize((10, 30), Image.Resampling.BILINEAR).crop((0, 10, 10, 20)),
    ]
    for pixels, label in zip(domain.train.pixels, domain.train.labels.tolist(), strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(expected[label]))


def test_folder_turns_pictures_upright_as_their_camera_says(tmp_path: Path) -> None:
    pixels = noise(1, 8, 12, 3)[0]
    exif = Image.Exif()
    # The top is at the right side of what is stored: shown, it is turned clockwise.
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png", exif=exif)
    domain = load_domain(spec(source="folder", path="."), base=tmp_path)
    assert domain.image_shape == (3, 12, 8)
    assert np.array_equal(domain.train.pixels[0].permute(1, 2, 0), np.rot90(pixels, -1))


def test_folder_is_grey_only_if_all_images_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 6, "L")
    assert load_domain(spec(source="folder", path="."), base=tmp_path).image_shape == (1, 8, 12)
    write_images(tmp_path / "c", 6)
    domain = load_domain(spec(source="folder", path="."), base=tmp_path)
    grey = domain.train.pixels[domain.train.labels == 0]
    assert domain.image_shape == (3, 8, 12)
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_folder_reads_every_usual_mode(tmp_path: Path, mode: str) -> None:
    pixels = noise(1, 9, 9)[0]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            wide = pixels.astype(np.uint16) * 257
            grey = (
                Image.fromarray(wide) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
            )
            grey.save(tmp_path / name / f"{number}.tif")
    domain = load_domain(spec(source="folder", path=".", image_size=9), base=tmp_path)
    assert domain.image_shape == ({"1": 1, "LA": 1, "I;16": 1}.get(mode, 3), 9, 9)
    if mode in ("LA", "I;16", "RGBA"):
        assert np.array_equal(domain.train.pixels[0, 0].numpy(), pixels)


def test_paths_expand_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", x_train=noise(20, 6, 6), y_train=np.arange(20) % 2)
    monkeypatch.setenv("SOPHON_TEST_FOLDER", str(tmp_path))
    path = "${SOPHON_TEST_FOLDER}/x.npz"
    domain = load_domain(spec(source="npz", path=path), base=Path("/no"))
    assert domain.name == "x"
    # As a shell and `make_archives.py` have it, whatever folder the run file is in.
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("SOPHON_TEST_FOLDER", tmp_path.name)
    assert load_domain(spec(source="npz", path=path), base=Path("recipes")).name == "x"
    assert expanded("x/${SOPHON_TEST_FOLDER}", Path("recipes")).parts[0] == "recipes"


# --- torchvision: its own classes on tiny files of the real formats ------------------------------


@pytest.fixture
def datasets() -> Any:
    prepare_torchvision()
    return importlib.import_module("torchvision.datasets")


def write_cifar10(root: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    planes = noise(60, 3, 32, 32)
    sums = {}
    for number, name in enumerate([f"data_batch_{one}" for one in range(1, 6)] + ["test_batch"]):
        flat = planes[number * 10 : number * 10 + 10].reshape(10, -1)
        data = pickle.dumps({"data": flat, "labels": [one % 5 for one in range(10)]})  # noqa: TID251 - the data set's own format
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    meta = pickle.dumps({"label_names": list("abcde")})  # noqa: TID251 - the data set's own format
    (folder / "batches.meta").write_bytes(meta)
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})
    return planes


def test_torchvision_cifar10(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = write_cifar10(tmp_path, datasets, monkeypatch)
    domain = load_domain(spec(source="torchvision", name="CIFAR10", root="."), base=tmp_path)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (45, 5, 10)
    assert domain.classes == tuple("abcde")
    assert torch.equal(domain.test.pixels, torch.from_numpy(planes[50:]))


def test_torchvision_mnist(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(DATASETS["MNIST"], counts=(20, 10))
    monkeypatch.setitem(DATASETS, "MNIST", few)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = noise(30, 28, 28)
    for name, part in (("train", images[:20]), ("t10k", images[20:])):
        head = np.array([2051, len(part), 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        labels = (np.arange(len(part)) % 10).astype(np.uint8).tobytes()
        head = np.array([2049, len(part)], ">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels)
    domain = load_domain(spec(source="torchvision", name="MNIST", root="."), base=tmp_path)
    assert domain.image_shape == (1, 28, 28)
    assert torch.equal(domain.test.pixels[:, 0], torch.from_numpy(images[20:]))
    assert len(domain.train) == 10
    assert datasets.MNIST(tmp_path, train=False).targets.tolist() == domain.test.labels.tolist()


def test_torchvision_svhn(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io", reason="SVHN's format needs scipy").savemat
    images, labels = noise(20, 32, 32, 3), np.arange(20) % 10 + 1
    split_list = dict(datasets.SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = split_list[split]
        savemat(tmp_path / name, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
        split_list[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    domain = load_domain(spec(source="torchvision", name="SVHN", root="."), base=tmp_path)
    assert torch.equal(domain.test.pixels, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert domain.test.labels.tolist() == (labels % 10).tolist()
    assert domain.classes == tuple("0123456789")


def test_torchvision_stl10(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    planes = noise(20, 3, 96, 96)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for attribute in ("train_list", "test_list"):
        patched = []
        for name, _ in getattr(datasets.STL10, attribute):
            labels = (np.arange(20) % 10 + 1).astype(np.uint8)
            data = planes.transpose(0, 1, 3, 2).tobytes() if "X" in name else labels.tobytes()
            (folder / name).write_bytes(data)
            patched.append([name, hashlib.md5(data).hexdigest()])
        monkeypatch.setattr(datasets.STL10, attribute, patched)
    domain = load_domain(spec(source="torchvision", name="STL10", root="."), base=tmp_path)
    assert torch.equal(domain.test.pixels, torch.from_numpy(planes))
    assert domain.classes == tuple("abcdefghij")


def test_torchvision_gtsrb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "gtsrb"
    test = base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "Width", "Height", "ClassId"])
        for number, pixels in enumerate(noise(4, 30, 34, 3)):
            Image.fromarray(pixels).save(test / f"{number:05}.ppm")
            writer.writerow([f"{number:05}.ppm", 34, 30, number % 2])
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05}"
        folder.mkdir(parents=True)
        for number, pixels in enumerate(noise(4, 40, 28, 3, seed=label)):
            Image.fromarray(pixels).save(folder / f"{number}.ppm")
    wanted = spec(source="torchvision", name="GTSRB", root=".", image_size=24, classes=(0, 1))
    with pytest.raises(DataError, match=r"172 images where a whole copy has 26640"):
        load_domain(wanted, base=tmp_path)
    few = dataclasses.replace(DATASETS["GTSRB"], counts=(172, 4))
    monkeypatch.setitem(DATASETS, "GTSRB", few)
    domain = load_domain(wanted, base=tmp_path)
    assert domain.image_shape == (3, 24, 24)
    assert domain.test.labels.tolist() == [0, 1, 0, 1]
    assert domain.classes == ("0", "1")


@pytest.mark.parametrize(("name", "column"), [("CelebA", 1), ("CelebA:Smiling", 0)])
def test_torchvision_celeba_labels_an_attribute(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch, name: str, column: int
) -> None:
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06}.jpg" for number in range(16)]
    values = [[1 if number % 2 else -1, 1 if number % 4 < 2 else -1] for number in range(16)]
    for file, pixels in zip(names, noise(16, 22, 18, 3), strict=True):
        Image.fromarray(pixels).save(base / "img_align_celeba" / file)

    def lines(pairs: Any, *head: str) -> str:
        return "\n".join([*head, *(f"{file} {text}" for file, text in pairs)])

    texts = {
        "list_attr_celeba.txt": lines(
            [(file, f"{a} {b}") for file, (a, b) in zip(names, values, strict=True)],
            "16",
            "Smiling Male ",
        ),
        "identity_CelebA.txt": lines((file, 7) for file in names),
        "list_bbox_celeba.txt": lines([(file, "0 0 9 9") for file in names], "16", "id x y w h"),
        "list_landmarks_align_celeba.txt": lines([(f, "1 2") for f in names], "16", "x y"),
        "list_eval_partition.txt": lines((f, 0 if n < 8 else 2) for n, f in enumerate(names)),
    }
    sums = {}
    for file, text in texts.items():
        (base / file).write_text(text)
        sums[file] = hashlib.md5((base / file).read_bytes()).hexdigest()
    listed = [(ident, sums.get(file, md5), file) for ident, md5, file in datasets.CelebA.file_list]
    monkeypatch.setattr(datasets.CelebA, "file_list", listed)
    domain = load_domain(spec(source="torchvision", name=name, root="."), base=tmp_path)
    attribute = ("Smiling", "Male")[column]
    assert domain.classes == (f"not {attribute}", attribute)
    assert domain.test.labels.tolist() == [(values[n][column] + 1) // 2 for n in range(8, 16)]
    bare = load_domain(
        spec(source="torchvision", name=name, root=".", labels="none", image_size=8), base=tmp_path
    )
    assert bare.classes == ("image",)
    assert (len(bare.train) + len(bare.validation), len(bare.test)) == (8, 8)


@pytest.mark.parametrize(
    "layout",
    [
        # FFHQ: a thousand pictures to a folder; LFW: a folder to a person, some with one picture.
        ["00000/{:05}.png", "01000/{:05}.png"],
        ["Aaron_Eckhart/Aaron_Eckhart_{:04}.png", "Zico/Zico_{:04}.png"],
        ["{:05}.png"],
    ],
)
def test_folders_without_classes_are_read_as_they_come(tmp_path: Path, layout: list[str]) -> None:
    root = tmp_path / "faces"
    for number, pixels in enumerate(noise(20, 12, 10, 3)):
        # All but one in the first folder.
        file = root / layout[-1 if number == 0 else 0].format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    (root / "LICENSE.txt").write_text("terms")
    domain = load_domain(
        spec(source="folder", path="faces", labels="none", image_size=8), base=tmp_path
    )
    assert domain.classes == ("image",)
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 20
    assert domain.image_shape == (3, 8, 8)


def test_train_and_test_images_are_joined_and_cut_anew(tmp_path: Path) -> None:
    pixels = noise(30, 8, 8)
    labels = np.arange(30) % 3
    np.savez(
        tmp_path / "d.npz",
        x_train=pixels[:24], y_train=labels[:24], x_test=pixels[24:], y_test=labels[24:],
    )  # fmt: skip
    domain = load_domain(spec(source="npz", path="d.npz", join=True, test=0.4), base=tmp_path)
    assert len(domain.test) == 12
    parts = (domain.train, domain.validation, domain.test)
    held = torch.cat([part.pixels for part in parts]).numpy()[:, 0]
    order = np.lexsort(held.reshape(30, -1).T)
    assert np.array_equal(held[order], pixels[np.lexsort(pixels.reshape(30, -1).T)])
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == [10, 10, 10]
    bare = load_domain(
        spec(source="npz", path="d.npz", join=True, test=0.4, labels="none"), base=tmp_path
    )
    assert (bare.classes, len(bare.test)) == (("image",), 12)


def test_prompts_that_none_shares_are_cut_and_stay_with_their_images(tmp_path: Path) -> None:
    pictures = noise(20, 6, 6, 3)
    lines = []
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"noise {number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    domain = load_domain(spec(source="prompts", path="."), base=tmp_path)
    splits = (domain.train, domain.validation, domain.test)
    assert [len(split) for split in splits] == [14, 2, 4]
    for split in splits:
        for pixels, label in zip(split.pixels, split.labels.tolist(), strict=True):
            number = int(domain.classes[label].removeprefix("noise "))
            assert np.array_equal(pixels.permute(1, 2, 0), pictures[number])


def test_domains_that_share_prompts_keep_each_image_its_own() -> None:
    domains = [
        Domain.from_arrays("small", noise(20, 6, 6), np.arange(20) % 2, classes=names)
        for names in (("a cat", "a dog"), ("a bird", "a cat"))
    ]
    shared = share_prompts(domains)
    assert shared[0].classes == shared[1].classes == ("a cat", "a dog", "a bird")
    for before, after in zip(domains, shared, strict=True):
        for name in ("train", "validation", "test"):
            told = [
                [domain.classes[label] for label in getattr(domain, name).labels]
                for domain in (before, after)
            ]
            assert told[0] == told[1]
            assert torch.equal(getattr(before, name).pixels, getattr(after, name).pixels)


def test_each_picture_of_ffhq_is_in_one_split(tmp_path: Path) -> None:
    files = [tmp_path / f"{number:05}.png" for number in (0, 59_999, 60_000, 69_999)]
    sort = TREES["FFHQ"].sort
    assert sort is not None
    assert sort(tmp_path, files) == {"train": files[:2], "test": files[2:]}


# --- embedded and torch datasets -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "count"), [("digits", 10, 1797), ("letters", 26, 3120)]
)
def test_embedded_domains_share_one_shape(name: str, classes: int, count: int) -> None:
    pytest.importorskip("sklearn", reason="the embedded digits need scikit-learn")
    domain = load_domain(spec(source="embedded", name=name), base=Path())
    assert domain.image_shape == (1, 16, 16)
    assert domain.class_count == classes
    assert len(domain.train) + len(domain.validation) + len(domain.test) == count
    assert domain.source == "embedded"


def test_chosen_classes_without_a_test_split_keep_their_own_images() -> None:
    domain = load_domain(spec(source="embedded", name="digits", classes=(7, 2)), base=Path())
    raw, labels = digits()
    for label, digit in enumerate((7, 2)):
        found = [
            one.numpy().tobytes()
            for split in (domain.train, domain.validation, domain.test)
            for one in split.pixels[split.labels == label]
        ]
        assert sorted(found) == sorted(one.tobytes() for one in raw[labels == digit])


def test_letters_are_deterministic_and_all_different() -> None:
    first = letters()[0].copy()
    letters.cache_clear()
    assert np.array_equal(letters()[0], first)
    assert len({one.tobytes() for one in first}) == len(first)


def test_ten_letters_can_be_chosen() -> None:
    domain = load_domain(
        spec(source="embedded", name="letters", classes=tuple(range(10))), base=Path()
    )
    assert domain.classes == tuple("ABCDEFGHIJ")


class Named(list[dict[str, Any]]):
    """Items as Hugging Face datasets give them; `features` has the names of the classes."""

    def __init__(self, image: str, label: str) -> None:
        pictures = (Image.fromarray(pixels) for pixels in noise(20, 7, 9, 3))
        super().__init__({image: p, label: n % 2, "id": "x"} for n, p in enumerate(pictures))
        names = SimpleNamespace(names=["cat", "dog"])
        self.features = {image: object(), label: names, "id": object()}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for number, pixels in enumerate(noise(20, 7, 9, 3)):
            yield pixels, np.int64(number % 2)


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(noise(20, 7, 9, 3)[index]), index % 2


def test_every_kind_of_dataset_gives_the_same_domain() -> None:
    images, labels = noise(20, 7, 9, 3), np.arange(20) % 2
    expected = Domain.from_arrays("a", images, labels).fingerprint()
    planes, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    for dataset in (
        TensorDataset(planes, targets),
        TensorDataset(planes.float() / 255, targets),
        Streamed(),
        Pictures(),
    ):
        assert Domain.from_datasets("a", dataset).fingerprint() == expected


@pytest.mark.parametrize(
    ("keys", "columns"),
    [(("image", "label"), None), (("img", "labels"), None), (("photo", "kind"), ("photo", "kind"))],
)
def test_items_of_hugging_face_datasets_are_dictionaries(
    keys: tuple[str, str], columns: tuple[str, str] | None
) -> None:
    expected = Domain.from_datasets("a", Pictures()).fingerprint()
    domain = Domain.from_datasets("a", Named(*keys), columns=columns)
    assert domain.classes == ("cat", "dog")
    assert domain.fingerprint() == expected
    assert Domain.from_datasets("a", Named(*keys), columns=columns, classes="xy").classes == (
        "x",
        "y",
    )
    assert len(Domain.from_datasets("a", Pictures(), Named("image", "label")).test) == 20


def test_datasets_may_bring_their_own_test_split() -> None:
    domain = Domain.from_datasets("a", Pictures(), Pictures(), image_size=6)
    assert len(domain.test) == 20
    assert domain.image_shape == (3, 6, 6)


# --- Batches ------------------------------------------------------------------------------------


def plain(images: Images, index: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    defaults: dict[str, Any] = {"mean": (0.4,), "std": (0.2,), "channels": 3, "device": "cpu"}
    return batch(images, index, **(defaults | options))


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_without_augmentation_is_the_formula(channels_last: bool) -> None:
    images, index = small().train, torch.tensor([3, 0, 3])
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels, labels = plain(images, index, mean=mean, std=std, channels_last=channels_last)
    expected = images.pixels[index].double() / 255
    expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected.float())
    assert torch.equal(labels, images.labels[index])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert pixels.is_contiguous(memory_format=layout)
    assert pixels.dtype == torch.float32


def test_grey_images_are_repeated_and_then_normalised_per_channel() -> None:
    images = small(grey=True).train
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels, _ = plain(images, torch.arange(4), mean=mean, std=std)
    for channel in range(3):
        expected = (images.pixels[:4, 0] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(pixels[:, channel], expected)


def test_a_grey_model_is_given_the_mean_of_a_normalisation_in_colour() -> None:
    images = small(grey=True).train
    options: dict[str, Any] = {"mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.4), "channels": 1}
    pixels, _ = plain(images, torch.arange(4), **options)
    torch.testing.assert_close(pixels, (images.pixels[:4] / 255 - 0.3) / 0.3)


def test_batch_leaves_the_images_alone() -> None:
    images = small().train
    before = images.pixels.clone()
    plain(images, torch.arange(8), augmentation="flip_crop", generator=torch.Generator())
    assert torch.equal(images.pixels, before)


@pytest.mark.parametrize("augmentation", ["flip", "crop", "flip_crop"])
def test_augmentation_draws_from_the_generator_only(augmentation: str) -> None:
    images, index = small().train, torch.arange(40)
    state = torch.get_rng_state()

    def drawn(seed: int) -> torch.Tensor:
        stream = torch.Generator().manual_seed(seed)
        return plain(images, index, augmentation=augmentation, generator=stream)[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = small(400).train
    index = torch.arange(len(images))
    before, _ = plain(images, index)
    after, _ = plain(images, index, augmentation="flip", generator=torch.Generator().manual_seed(0))
    flipped = (after == before.flip(-1)).flatten(1).all(1)
    kept = (after == before).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 0.4 < flipped.float().mean() < 0.6


def test_crop_is_a_window_of_the_padded_image_and_reaches_every_window() -> None:
    domain = Domain.from_arrays("a", noise(400, 16, 8), np.arange(400) % 2)
    images, index = domain.train, torch.arange(len(domain.train))
    options: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "channels": 1}
    stream = torch.Generator().manual_seed(0)
    pixels, _ = plain(images, index, augmentation="crop", generator=stream, **options)
    padded = torch.nn.functional.pad(images.pixels, (1, 1, 2, 2)).float() / 255
    seen = set()
    for one in range(len(images)):
        places = [
            (top, left)
            for top in range(5)
            for left in range(3)
            if torch.equal(padded[one, :, top : top + 16, left : left + 8], pixels[one])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 15


# --- Normalisation and checks --------------------------------------------------------------------


def test_normalisation_is_own_then_original_then_imagenet() -> None:
    own = small(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    bare = small(grey=True)
    assert resolve_normalisation(own, bare) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert resolve_normalisation(bare, own) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert resolve_normalisation(bare, None) == (IMAGENET_MEAN, IMAGENET_STD)


def test_different_domains_pass_the_checks() -> None:
    original, restricted = small(), small(grey=True)
    check_distinct(original, restricted)
    check_channels("small", 1, 3)
    check_batch_fits(original, len(original.train), "batch_size")
    assert original.fingerprint() != restricted.fingerprint()


def test_jpeg_packing_equals_decoding_each_file(tmp_path: Path) -> None:
    files = []
    for pixels in noise(12, 16, 16, 3):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    packed = np.frombuffer(b"".join(files), np.uint8)
    labels = np.arange(12) % 2
    np.savez(tmp_path / "a.npz", x_train_jpeg=packed, x_train_offsets=offsets, y_train=labels)
    domain = load_domain(spec(source="npz", path="a.npz"), base=tmp_path)
    decoded = {
        np.asarray(Image.open(io.BytesIO(one))).transpose(2, 0, 1).tobytes() for one in files
    }
    assert set(rows(domain.train, domain.validation, domain.test)) == decoded


def test_npz_coarse_labels_are_groups_of_the_fine_ones(tmp_path: Path) -> None:
    fine = np.arange(40) % 4
    np.savez(
        tmp_path / "x.npz",
        x_train=noise(40, 6, 6),
        y_train=fine,
        coarse_of_fine=np.array([1, 0, 1, 0]),
        coarse_names=np.array(["odd", "even"]),
    )
    made = load_domain(spec(source="npz", path="x.npz", labels="coarse"), base=tmp_path)
    assert made.classes == ("odd", "even")
    images = np.load(tmp_path / "x.npz")["x_train"]
    groups = {image.tobytes(): (label + 1) % 2 for image, label in zip(images, fine, strict=True)}
    for split in (made.train, made.validation, made.test):
        for pixels, label in zip(split.pixels, split.labels, strict=True):
            assert groups[pixels.numpy().tobytes()] == int(label)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs an array coarse_of_fine"),
        ({"coarse_of_fine": np.array([0, 1])}, "needs an array coarse_names"),
        ({"coarse_of_fine": np.array([0]), "coarse_names": np.array(["a"])}, "labels 0 to 1"),
        ({"coarse_of_fine": np.array([0.5]), "coarse_names": np.array(["a"])}, "give integers"),
    ],
)
def test_npz_coarse_labels_that_do_not_fit_are_refused(
    fields: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    arrays = {"x_train": noise(20, 6, 6), "y_train": np.arange(20) % 2, **fields}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_domain(spec(source="npz", path="x.npz", labels="coarse"), base=tmp_path)


def test_coarse_labels_are_of_archives_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is for npz archives"):
        load_domain(spec(source="folder", path="x", labels="coarse"), base=tmp_path)
