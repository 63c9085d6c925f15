"""Make the archives that the small recipes read, from the public data sets.

    python recipes/make_archives.py --from FOLDER --to FOLDER [NAME ...]

Below `--from` lie `cifar-10-batches-py/`, `cifar-100-python/`, `MNIST/raw/` and
`gtsrb/GTSRB/Training/` as torchvision keeps them, `tiny-imagenet-200/` as it is published and
`orl_faces/s1/1.pgm` to `s40/10.pgm`; NAME is one of cifar10, cifar10_jpeg, mnist, gtsrb10,
tiny_imagenet20_64, cifar100 and orl_faces64 (all without one). Formats, classes and counts are
those of the archives behind the published results. Which images are drawn is not: their draw came
from other copies, so numbers differ within the spread of a draw.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sophon._base.errors import DataError
from sophon._data.images import Fit, opened
from sophon._data.sources.torchvision_sets import read_torchvision
from sophon._data.splits import Part

Pixels = NDArray[np.uint8]
Generator = np.random.Generator
# Images of each class to train and to test.
COUNTS: dict[str, tuple[int, int]] = {
    "cifar10": (366, 86),
    "cifar10_jpeg": (1000, 200),
    "mnist": (500, 100),
    "gtsrb10": (250, 50),
    "tiny_imagenet20_64": (250, 50),
    "cifar100": (50, 10),
    "orl_faces64": (8, 2),
}
PERSONS = 40
GTSRB = {
    1: "speed limit 30",
    2: "speed limit 50",
    4: "speed limit 70",
    5: "speed limit 80",
    9: "no passing",
    10: "no passing for trucks",
    12: "priority road",
    13: "yield",
    25: "road work",
    38: "keep right",
}
# A sign was filmed as a track of 30 frames; this share of a class's tracks is for the test.
TEST_TRACKS = 0.2
TINY_IMAGENET = {
    "n01443537": "goldfish",
    "n01629819": "European fire salamander",
    "n01774384": "black widow",
    "n01882714": "koala",
    "n01910747": "jellyfish",
    "n02056570": "king penguin",
    "n02099601": "golden retriever",
    "n02123045": "tabby",
    "n02132136": "brown bear",
    "n02165456": "ladybug",
    "n02279972": "monarch",
    "n02504458": "African elephant",
    "n02793495": "barn",
    "n02814860": "beacon",
    "n04146614": "school bus",
    "n04285008": "sports car",
    "n04398044": "teapot",
    "n07753592": "banana",
    "n07873807": "pizza",
    "n09428293": "seashore",
}


# CIFAR-100's superclasses, and the one that each class belongs to.
COARSE = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables"
    " household_electrical_devices household_furniture insects large_carnivores"
    " large_man-made_outdoor_things large_natural_outdoor_scenes"
    " large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles"
    " small_mammals trees vehicles_1 vehicles_2"
)
COARSE_OF_FINE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11"
    " 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16"
    " 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)


def cifar10(root: Path) -> dict[str, Any]:
    """Return lossless images of CIFAR-10, (n, 32, 32, 3)."""
    return _drawn("CIFAR10", root, "cifar10", skipped=(0, 0))


def cifar10_jpeg(root: Path) -> dict[str, Any]:
    """Return images of CIFAR-10 as JPEG files (quality 75, 4:2:0), none of them in `cifar10`."""
    held = _drawn("CIFAR10", root, "cifar10_jpeg", skipped=COUNTS["cifar10"])
    for split in ("train", "test"):
        files = [_jpeg(pixels) for pixels in held.pop(f"x_{split}")]
        held |= _packed(split, files)
    return held


def mnist(root: Path) -> dict[str, Any]:
    """Return images of MNIST, (n, 28, 28)."""
    return _drawn("MNIST", root, "mnist", skipped=(0, 0))


def gtsrb10(root: Path) -> dict[str, Any]:
    """Return ten signs of GTSRB at 32x32; each physical sign is in one of the splits."""
    random, sizes = _random("gtsrb10"), COUNTS["gtsrb10"]
    chosen: dict[str, list[list[Path]]] = {"train": [], "test": []}
    for number in GTSRB:
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{number:05}"
        tracks = defaultdict(list)
        for file in sorted(folder.glob("*.ppm")):
            tracks[file.name.partition("_")[0]].append(file)
        if len(tracks) < 2:
            raise DataError(
                f"{folder} has no images of several signs (*.ppm): get GTSRB-Training_fixed.zip of"
                " https://benchmark.ini.rub.de, or download it with torchvision.datasets.GTSRB"
            )
        names = list(random.permutation(sorted(tracks)))
        tested = max(1, round(TEST_TRACKS * len(names)))
        for split, part, size in zip(
            ("train", "test"), (names[tested:], names[:tested]), sizes, strict=True
        ):
            frames = [list(random.permutation(np.array(tracks[name], object))) for name in part]
            chosen[split].append(_taken(_in_turn(frames), size, str(folder)))
    held: dict[str, Any] = {}
    for split, by_class in chosen.items():
        files, held[f"y_{split}"] = _blocks(by_class, random)
        held[f"x_{split}"] = np.stack([_sign(file) for file in files])
    held["class_names"] = np.array(list(GTSRB.values()))
    held["gtsrb_class_id"] = np.array(list(GTSRB), np.int64)
    return held


def tiny_imagenet20_64(root: Path) -> dict[str, Any]:
    """Return twenty classes of Tiny ImageNet with the JPEG files as they are, 64x64.

    Its validation images are the test.
    """
    random, sizes = _random("tiny_imagenet20_64"), COUNTS["tiny_imagenet20_64"]
    folder = root / "tiny-imagenet-200"
    listing = folder / "val" / "val_annotations.txt"
    if not listing.is_file():
        raise DataError(
            f"{listing} is missing: get tiny-imagenet-200.zip of http://cs231n.stanford.edu (the"
            " terms of ImageNet apply) and unpack it below --from"
        )
    tested = defaultdict(list)
    for row in listing.read_text(encoding="utf-8").splitlines():
        name, label = row.split()[:2]
        tested[label].append(folder / "val" / "images" / name)
    held: dict[str, Any] = {}
    for split, size in zip(("train", "test"), sizes, strict=True):
        by_class = []
        for label in TINY_IMAGENET:
            place = folder / "train" / label / "images"
            found = sorted(place.glob("*.JPEG")) if split == "train" else sorted(tested[label])
            mixed = list(random.permutation(np.array(found, object)))
            by_class.append(_taken(mixed, size, f"{folder}, {split}, {label}"))
        files, held[f"y_{split}"] = _blocks(by_class, random)
        held |= _packed(split, [file.read_bytes() for file in files])
    held["class_names"] = np.array(list(TINY_IMAGENET.values()))
    held["wnids"] = np.array(list(TINY_IMAGENET))
    return held


def cifar100(root: Path) -> dict[str, Any]:
    """Return lossless images of CIFAR-100, (n, 32, 32, 3), with the classes' superclasses."""
    held = _drawn("CIFAR100", root, "cifar100", skipped=(0, 0))
    held["coarse_of_fine"] = np.array(COARSE_OF_FINE.split(), np.int64)
    held["coarse_names"] = np.array(COARSE.split())
    return held


def orl_faces64(root: Path) -> dict[str, Any]:
    """Return the ORL faces, cropped to squares and resized, (n, 64, 64); a person is a class."""
    random, sizes = _random("orl_faces64"), COUNTS["orl_faces64"]
    chosen: dict[str, list[list[Path]]] = {"train": [], "test": []}
    names = [f"s{number}" for number in range(1, PERSONS + 1)]
    for name in names:
        folder = root / "orl_faces" / name
        mixed = list(random.permutation(np.array(sorted(folder.glob("*.pgm")), object)))
        if len(mixed) < sum(sizes):
            raise DataError(
                f"{folder} has {len(mixed)} images (*.pgm) where {sum(sizes)} are needed: get"
                " att_faces.zip of https://cam-orl.co.uk/facedatabase.html and unpack it there"
            )
        chosen["train"].append(mixed[: sizes[0]])
        chosen["test"].append(mixed[sizes[0] : sum(sizes)])
    held: dict[str, Any] = {"class_names": np.array(names)}
    for split, by_class in chosen.items():
        files, held[f"y_{split}"] = _blocks(by_class, random)
        held[f"x_{split}"] = np.stack([_face(file) for file in files])
    return held


ARCHIVES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cifar10": cifar10,
    "cifar10_jpeg": cifar10_jpeg,
    "mnist": mnist,
    "gtsrb10": gtsrb10,
    "tiny_imagenet20_64": tiny_imagenet20_64,
    "cifar100": cifar100,
    "orl_faces64": orl_faces64,
}


def _random(name: str, *more: int) -> Generator:
    return np.random.default_rng([1234, list(COUNTS).index(name), *more])


def _drawn(name: str, root: Path, archive: str, *, skipped: tuple[int, int]) -> dict[str, Any]:
    """Return as many images of each class of a torchvision set as `archive` has.

    `skipped` of each class are left to another archive of the same set.
    """
    contents = read_torchvision(name, root, download=False, fit=Fit())
    assert contents.test is not None
    held: dict[str, Any] = {}
    splits = zip(
        ("train", "test"), (contents.train, contents.test), skipped, COUNTS[archive], strict=True
    )
    for number, (split, part, skip, size) in enumerate(splits):
        # Archives of one set share this order: what one leaves the other takes.
        order = np.random.default_rng([1234, number]).permutation(len(part.labels))
        by_class = []
        for label, text in enumerate(contents.classes):
            members = list(order[part.labels[order] == label])
            by_class.append(_taken(members[skip:], size, f"{name}, {split}, class {text}"))
        index, held[f"y_{split}"] = _blocks(by_class, _random(archive, number))
        held[f"x_{split}"] = _read(part, index)
    held["class_names"] = np.array(_short(contents.classes))
    return held


def _read(part: Part, index: list[Any]) -> Pixels:
    return part.read(np.array(index, np.int64))


def _short(names: tuple[str, ...]) -> list[str]:
    """Return class names such as `7` where torchvision says `7 - seven`."""
    return [name.partition(" - ")[0] for name in names]


def _taken(found: Iterable[Any], count: int, where: str) -> list[Any]:
    held = list(itertools.islice(found, count))
    if len(held) < count:
        raise DataError(f"{where}: {len(held)} images where {count} are needed: get a whole copy")
    return held


def _in_turn(groups: list[list[Any]]) -> list[Any]:
    """Return the items of all groups, one of each in turn."""
    rows = itertools.zip_longest(*groups)
    return [item for row in rows for item in row if item is not None]


def _blocks(by_class: list[list[Any]], random: Generator) -> tuple[list[Any], NDArray[np.int64]]:
    """Return items and labels in blocks that hold each class once, in random order."""
    items, labels = [], []
    for row in zip(*by_class, strict=True):
        for label in random.permutation(len(row)):
            items.append(row[label])
            labels.append(label)
    return items, np.array(labels, np.int64)


def _sign(file: Path) -> Pixels:
    with opened(file) as picture:
        small = picture.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        return np.asarray(small, np.uint8)


def _face(file: Path) -> Pixels:
    """Return a picture of 92x112 without its first 14 and its last rows, at 64x64."""
    with opened(file) as picture:
        square = picture.convert("L").crop((0, 14, 92, 106))
        return np.asarray(square.resize((64, 64), Image.Resampling.LANCZOS), np.uint8)


def _jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75, subsampling="4:2:0")
    return file.getvalue()


def _packed(split: str, files: list[bytes]) -> dict[str, Any]:
    """Return JPEG files end to end, (bytes,), and where each starts, (n + 1,)."""
    offsets = np.cumsum([0, *(len(data) for data in files)], dtype=np.int64)
    return {
        f"x_{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
        f"x_{split}_offsets": offsets,
    }


def main(arguments: list[str] | None = None) -> None:
    """Make the archives asked for; one that is there is left as it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="root", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHIVES))
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in ARCHIVES]
    if unknown:
        parser.error(f"{unknown[0]} is no archive of the recipes: use {', '.join(ARCHIVES)}")
    given.to.mkdir(parents=True, exist_ok=True)
    for name in given.names or ARCHIVES:
        file = given.to / f"{name}.npz"
        if file.exists():
            sys.stdout.write(f"{file} is there\n")
            continue
        try:
            held = ARCHIVES[name](given.root)
        except DataError as error:
            sys.exit(f"{name}: {error}")
        with file.with_suffix(".tmp").open("wb") as temporary:
            np.savez_compressed(temporary, **held)
        file.with_suffix(".tmp").replace(file)
        sys.stdout.write(
            f"{file}: {len(held['y_train'])} to train, {len(held['y_test'])} to test\n"
        )


if __name__ == "__main__":
    main()
