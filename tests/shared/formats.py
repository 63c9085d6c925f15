"""Writes public data sets at their real formats, a few random images each, for the tests.

Where a data set has checksums or counts of a whole copy, those of the few images take their place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sophon._data.sources.conventions import CLASS_ORDERS
from sophon._data.sources.torchvision_sets import DATASETS
from sophon._data.sources.trees import TREES

SPLIT_SIZES = {"train": 4, "validation": 3, "test": 2}


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_pictures(
    folder: Path, count: int, kind: str, size: tuple[int, int] = (32, 32), seed: int = 0
) -> None:
    """Write pictures named 0.png or 0.JPEG and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {"PNG": "png", "JPEG": "JPEG"}[kind]
    for number, pixels in enumerate(noise(count, size[1], size[0], 3, seed=seed)):
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}", kind)


def write_tree(
    root: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    partition: bool = True,
    sizes: dict[str, int] | None = None,
) -> None:
    """Write the tree `name` below `root` with `sizes` images a class and split."""
    key, _, variant = name.partition(":")
    tree, sizes = TREES[key], sizes or SPLIT_SIZES
    if tree.sort is not None:
        counts = {"train": 16}
        _write_faces(root, key, variant, partition)
    else:
        base = root / tree.variants[variant] if variant else root
        kind, side = ("PNG", (32, 32)) if key == "CINIC10" else ("JPEG", (40, 32))
        if variant in tree.sides:
            side = (tree.sides[variant] + 8, tree.sides[variant])
        for number, (split, below) in enumerate(tree.splits.items()):
            for label, folder in enumerate(tree.classes):
                seed = 100 * number + label
                write_pictures(base / below / folder, sizes[split], kind, side, seed)
        counts = {split: sizes[split] * len(tree.classes) for split in tree.splits}
    monkeypatch.setitem(TREES, key, dataclasses.replace(tree, counts=counts))


def _write_faces(root: Path, key: str, variant: str, partition: bool) -> None:
    tree = TREES[key]
    folder = root / (tree.variants[variant] if variant else tree.splits["train"])
    rows = []
    for number, pixels in enumerate(noise(16, 26, 22, 3)):
        if key == "CelebA":
            file = folder / f"{number + 1:06}.jpg"
            rows.append(f"{file.name} {0 if number < 8 else 1 if number < 12 else 2}")
        else:
            image = number if number < 12 else 60_000 + number
            file = folder / f"{image // 1000 * 1000:05}" / f"{image:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    if rows and partition:
        (root / "list_eval_partition.txt").write_text("\n".join(rows) + "\n")


def flatten(folder: Path) -> None:
    """Move all images of a folder's folders into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        file.rename(folder / f"ILSVRC2012_val_{number + 1:08}.JPEG")
    for below in sorted(folder.iterdir()):
        if below.is_dir():
            below.rmdir()


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def write_cifar(
    root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, per_class: int = 2
) -> np.ndarray:
    """Write CIFAR-10 or CIFAR-100 (a torchvision class) in the format of its Python version."""
    fine = kind.__name__ == "CIFAR100"
    classes = 100 if fine else 10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    count = classes * per_class
    files = [name for name, _ in (*kind.train_list, *kind.test_list)]
    planes, sums = noise(count * len(files), 3, 32, 32), {}
    for number, name in enumerate(files):
        flat = planes[number * count : (number + 1) * count].reshape(count, -1)
        labels = [one % classes for one in range(count)]
        held: dict[str, Any] = {"data": flat, "fine_labels" if fine else "labels": labels}
        sums[name] = _dump(folder / name, held)
    names = (
        [f"class {number}" for number in range(100)]
        if fine
        else [one[0] for one in CLASS_ORDERS["cifar10"]]
    )
    digest = _dump(folder / kind.meta["filename"], {kind.meta["key"]: names})
    for attribute in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, listed)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest})
    return planes


def _dump(path: Path, held: dict[str, Any]) -> str:
    data = pickle.dumps(held)  # noqa: TID251 - the data set's own format
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def write_mnist(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST", per_class: int = 4
) -> None:
    """Write MNIST's four idx files."""
    counts = (10 * per_class, 10 * per_class)
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], counts=counts))
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for number, part in enumerate(("train", "t10k")):
        images = noise(10 * per_class, 28, 28, seed=number)
        head = np.array([2051, len(images), 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = (np.arange(len(images)) % 10).astype(np.uint8).tobytes()
        head = np.array([2049, len(images)], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)


def write_svhn(
    root: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch, per_class: int = 4
) -> None:
    """Write SVHN's two MATLAB files; the digit 0 has label 10 in them."""
    savemat = pytest.importorskip("scipy.io", reason="SVHN's format needs scipy").savemat
    root.mkdir(parents=True, exist_ok=True)
    split_list = dict(datasets.SVHN.split_list)
    for number, split in enumerate(("train", "test")):
        images = noise(10 * per_class, 32, 32, 3, seed=number)
        labels = np.arange(len(images)) % 10 + 1
        url, name, _ = split_list[split]
        savemat(root / name, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
        split_list[split] = [url, name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)


def write_stl(
    root: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch, per_class: int = 3
) -> None:
    """Write STL-10's binaries: column by column, labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text(
        "\n".join(names[0] for names in CLASS_ORDERS["stl10"]) + "\n"
    )
    planes = noise(10 * per_class, 3, 96, 96)
    for attribute in ("train_list", "test_list"):
        patched = []
        for name, _ in getattr(datasets.STL10, attribute):
            labels = (np.arange(len(planes)) % 10 + 1).astype(np.uint8)
            data = planes.transpose(0, 1, 3, 2).tobytes() if "X" in name else labels.tobytes()
            (folder / name).write_bytes(data)
            patched.append([name, hashlib.md5(data).hexdigest()])
        monkeypatch.setattr(datasets.STL10, attribute, patched)
