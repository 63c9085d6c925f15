"""Data sets as others write them: Hugging Face's, WebDataset's, images with a table of labels."""

from __future__ import annotations

import gzip
import io
import json
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sophon._base.errors import DataError
from sophon._data import Domain, load_domain
from sophon._specs import DomainSpec

NAMES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("something goes online")

    monkeypatch.setattr(socket.socket, "connect", connect)


def load(path: Path, source: str, **fields: Any) -> Domain:
    return load_domain(DomainSpec(source=source, path=path, **fields))


def refused(path: Path, source: str, *words: str, **fields: Any) -> None:
    with pytest.raises(DataError) as caught:
        load(path, source, **fields)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    assert len(said.replace(str(path), "")) < 300


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels(number)).save(held, "PNG")
    return held.getvalue()


def expected(count: int = 20) -> Domain:
    images = np.stack([pixels(number) for number in range(count)])
    return Domain.from_arrays("a", images, np.arange(count) % 2)


def table(
    count: int = 20, labels: list[Any] | None = None, kind: Any = NAMES, names: str = "image label"
) -> datasets.Dataset:
    image, label = names.split()
    features = datasets.Features({image: datasets.Image(), label: kind})
    files = [{"bytes": png(number), "path": None} for number in range(count)]
    held = [number % 2 for number in range(count)] if labels is None else labels
    return datasets.Dataset.from_dict({image: files, label: held}, features=features)


# --- Hugging Face datasets ------------------------------------------------------------------------


def saved(path: Path) -> Path:
    table().save_to_disk(path)
    return path


def parquet(path: Path) -> Path:
    (path / "data").mkdir(parents=True)
    table().select(range(12)).to_parquet(path / "data" / "train-00000-of-00002.parquet")
    table().select(range(12, 20)).to_parquet(path / "data" / "train-00001-of-00002.parquet")
    return path


def arrow(path: Path) -> Path:
    saved(path)
    (file,) = path.glob("*.arrow")
    return file


@pytest.mark.parametrize("write", [saved, parquet, arrow])
def test_a_dataset_on_the_disk_is_its_images(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "pets")
    before = sorted(tmp_path.rglob("*"))
    domain = load(path, "datasets")
    assert domain.classes == ("cat", "dog")
    assert domain.fingerprint() == expected().fingerprint()
    assert load(path, "datasets", labels="none").classes == ("image",)
    assert load(path, "datasets", classes=["dog", "cat"]).classes == ("dog", "cat")
    assert sorted(tmp_path.rglob("*")) == before


def test_splits_are_what_their_names_say_and_one_without_labels_is_left_out(
    tmp_path: Path,
) -> None:
    splits = datasets.DatasetDict(
        train=table(), dev=table(8), test=table(6, [-1] * 6), unsupervised=table(4)
    )
    splits.save_to_disk(tmp_path / "d")
    domain = load(tmp_path / "d", "datasets")
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (18, 2, 8)
    assert domain.remarks[:3] == (
        "train for training, dev for test",
        "unsupervised not read",
        "test left out, as its images have no labels",
    )
    assert Domain.from_datasets("a", splits).fingerprint() == domain.fingerprint()
    splits["test"] = table(6)
    domain = Domain.from_datasets("a", splits)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (20, 8, 6)


@pytest.mark.parametrize(
    "form",
    [
        lambda held: held,
        lambda held: held.to_iterable_dataset(),
        lambda held: held.with_format("torch"),
        lambda held: held.select(range(19, -1, -1)).select(range(19, -1, -1)),
        lambda held: held.with_transform(lambda rows: rows),
    ],
)
def test_datasets_in_memory_have_the_same_images(form: Callable[[Any], Any]) -> None:
    domain = Domain.from_datasets("a", form(table(names="photo kind")), columns=("photo", "kind"))
    assert domain.fingerprint() == expected().fingerprint()


def test_labels_may_be_names_and_images_arrays(tmp_path: Path) -> None:
    names = ["heron", "ibis"] * 10
    table(20, names, datasets.Value("string"), "photo kind").save_to_disk(tmp_path / "d")
    domain = load(tmp_path / "d", "datasets", image_column="photo", label_column="kind")
    assert domain.classes == ("heron", "ibis")
    assert domain.fingerprint() == expected().fingerprint()
    grey = np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8)
    features = datasets.Features(
        {"image": datasets.Array2D((8, 8), "uint8"), "label": datasets.Value("int32")}
    )
    held = datasets.Dataset.from_dict({"image": grey, "label": [0, 1] * 10}, features=features)
    wanted = Domain.from_arrays("a", grey, np.arange(20) % 2)
    assert Domain.from_datasets("a", held).fingerprint() == wanted.fingerprint()


def test_no_picture_is_opened_by_the_librarys_own_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    postscript = io.BytesIO()
    Image.fromarray(pixels(0)).save(postscript, "EPS")
    files = [{"bytes": postscript.getvalue(), "path": None}] + [
        {"bytes": png(number), "path": None} for number in range(1, 20)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": NAMES})
    held = datasets.Dataset.from_dict({"image": files, "label": [0, 1] * 10}, features=features)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DataError, match="image 0 cannot be read as an image"):
        Domain.from_datasets("a", held)
    domain = Domain.from_datasets("a", held, on_error="skip")
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 19
    assert "1 images skipped that cannot be used (image 0)" in domain.remarks


LISTS = datasets.Sequence(datasets.ClassLabel(names=["a", "b"]))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (table(20, [0.5, 1.0] * 10, datasets.Value("float32")), ["label is 0.5", "one integer"]),
        (table(20, [[0, 1], [1]] * 10, LISTS), ["multi-label", "one integer or name"]),
        (table(20, [None] * 20, datasets.Value("int64")), ["have no labels"]),
        (table(20, [None, "a"] * 10, datasets.Value("string")), ["a label is None"]),
        (table(0), ["empty"]),
        (table().remove_columns("image"), ["'label'", "image_column"]),
        (table(names="one two"), ["'one', 'two'", "label_column"]),
        (
            datasets.Dataset.from_dict({"image": [[1.5]] * 20, "label": [0, 1] * 10}),
            ["image is List", "one image file each"],
        ),
    ],
)
def test_a_dataset_that_is_no_classification_of_images_is_one_line(
    tmp_path: Path, held: datasets.Dataset, words: list[str]
) -> None:
    held.save_to_disk(tmp_path / "d")
    refused(tmp_path / "d", "datasets", *words)


def test_a_list_of_images_in_a_row_is_refused() -> None:
    features = datasets.Features({"image": datasets.Sequence(datasets.Image()), "label": NAMES})
    files = [[{"bytes": png(0), "path": None}]] * 20
    held = datasets.Dataset.from_dict({"image": files, "label": [0, 1] * 10}, features=features)
    with pytest.raises(DataError, match="image is List"):
        Domain.from_datasets("a", held)


def test_a_format_that_a_folder_names_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(tmp_path / "d") / "state.json"
    named = {"_format_type": "custom", "_format_kwargs": {"transform": "x"}}
    state.write_text(json.dumps(json.loads(state.read_text()) | named))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    live = Domain.from_datasets("a", datasets.load_from_disk(tmp_path / "d"))
    for domain in (live, load(tmp_path / "d", "datasets")):
        assert domain.fingerprint() == expected().fingerprint()
    assert load(tmp_path / "d", "datasets", labels="none").classes == ("image",)


def test_paths_of_images_lead_nowhere_but_into_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "d", tmp_path / "outside.png"
    outside.write_bytes(png(0))
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "link.png").symlink_to(outside)
    usual = "Screenshot at 9.41\u202fAM\u00a0\u00e9.png"
    (folder / usual).write_bytes(png(0))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": NAMES})

    def write(first: str) -> None:
        names = [first, *(f"{number}.png" for number in range(1, 20))]
        files = [{"bytes": None, "path": name} for name in names]
        columns = {"image": files, "label": [0, 1] * 10}
        held = pyarrow.table(columns, schema=features.arrow_schema)
        pyarrow.parquet.write_table(held, folder / "train.parquet")

    for inside in ("0.png", str(folder / "0.png"), usual):
        write(inside)
        assert load(folder, "datasets").fingerprint() == expected().fingerprint()
    for elsewhere in (str(outside), "../outside.png", "link.png", "http://127.0.0.1/0.png"):
        write(elsewhere)
        refused(folder, "datasets", "image 0 is the file", "not in the dataset's folder")
    for odd in ("a\0", "a\x1b[2J.png", "a\x9b.png"):
        write(odd)
        refused(folder, "datasets", "image 0 is the file", "no name of a file has such characters")


@pytest.mark.parametrize("elsewhere", ["../out", "absolute", "link", "folder link", "\ud800", 3])
@pytest.mark.parametrize("split", [False, True])
def test_a_saved_dataset_names_no_files_but_its_own(
    elsewhere: Any, split: bool, tmp_path: Path
) -> None:
    whole = tmp_path / "d" / "all"
    arrow(tmp_path / "out")
    saved = table() if not split else datasets.DatasetDict(train=table())
    saved.save_to_disk(str(whole))
    folder = whole / "train" if split else whole
    assert len(load(whole, "datasets").train) > 0
    state = folder / "state.json"
    held = json.loads(state.read_text())
    file = held["_data_files"][0]["filename"]
    other = next((tmp_path / "out").glob("*.arrow"))
    names: dict[Any, Any] = {3: 3, "\ud800": "\ud800", "absolute": str(other)}
    names |= {"../out": f"{'../' * (2 + split)}out/{other.name}"}
    if elsewhere == "link":
        (folder / file).unlink()
        (folder / file).symlink_to(other)
    elif elsewhere == "folder link":
        (folder / "inner").symlink_to(tmp_path / "out")
        names[elsewhere] = f"inner/{other.name}"
    held["_data_files"][0]["filename"] = names.get(elsewhere, file)
    state.write_text(json.dumps(held))
    refused(whole, "datasets", "state.json", "outside of the dataset's folder")
    if split:
        # The library passes over one at the top without a description beside it.
        (whole / "state.json").write_text('{"_data_files": []}')
        (whole / "dataset_info.json").unlink(missing_ok=True)
        refused(whole, "datasets", "state.json", "outside of the dataset's folder")


def test_splits_and_descriptions_of_a_saved_dataset_lie_in_its_folder(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table()).save_to_disk(str(tmp_path / "d"))
    arrow(tmp_path / "out")
    index = tmp_path / "d" / "dataset_dict.json"
    for name in ("../out", str(tmp_path / "out"), "train::http://127.0.0.1"):
        index.write_text(json.dumps({"splits": [name]}))
        refused(tmp_path / "d", "datasets", "dataset_dict.json", "outside of the dataset's folder")
    index.write_text(json.dumps({"splits": "train"}))
    refused(tmp_path / "d", "datasets", "no list of splits")
    index.write_text(json.dumps({"splits": ["train"]}))
    about = tmp_path / "d" / "train" / "dataset_info.json"
    about.unlink()
    about.symlink_to(tmp_path / "out" / "dataset_info.json")
    refused(tmp_path / "d", "datasets", "dataset_info.json", "outside of the dataset's folder")


def test_damaged_and_absent_datasets_are_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "no", "datasets", "no file or folder")
    refused(tmp_path, "datasets", "holds no .parquet or .arrow")
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and no more")
    refused(file, "datasets", "a.parquet cannot be read")
    (cut := arrow(tmp_path / "d")).write_bytes(cut.read_bytes()[:3000])
    refused(tmp_path / "d", "datasets", "cannot be read as a dataset")
    (tmp_path / "d" / "state.json").write_text("{")
    refused(tmp_path / "d", "datasets", "cannot be read as a dataset")
    for name in ("one", "two"):
        (tmp_path / "e" / name).mkdir(parents=True)
        table().to_parquet(tmp_path / "e" / name / "train.parquet")
    refused(tmp_path / "e", "datasets", "files of train lie in one/ and two/")


def test_a_name_too_long_for_any_file_is_absent(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{'x' * 5000}.png,cat\n")
    refused(tmp_path, "folder", "1 of 1 images are not there")
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x" * 5000, "text": "a"}))
    (tmp_path / "a.png").write_bytes(png(0))
    refused(tmp_path, "prompts", "1 of 1 prompts have no image")


@pytest.mark.parametrize("name", ["../outside.png", "absolute", "a/../../outside.png"])
def test_images_of_prompts_and_of_tables_lie_in_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(png(0))
    (folder := tmp_path / "d").mkdir()
    (folder / "a.png").write_bytes(png(1))
    name = str(tmp_path / "outside.png") if name == "absolute" else name
    row = {"file_name": name, "text": "a bird", "label": 1}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    for source in ("prompts", "folder"):
        refused(folder, source, "metadata.jsonl", "leads elsewhere")


def test_offsets_of_a_damaged_table_are_found_before_they_are_read(tmp_path: Path) -> None:
    file = arrow(tmp_path / "d")
    whole = file.read_bytes()
    # Where the images of twenty rows begin: numbers of 32 bits, of which one is now negative.
    starts = np.cumsum([0, *(len(png(number)) for number in range(20))], dtype=np.int32).tobytes()
    at = whole.index(starts) + 4 * 7
    file.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    refused(tmp_path / "d", "datasets", "cannot be read as a dataset")


# --- WebDataset -----------------------------------------------------------------------------------


def write_tar(path: Path, numbers: range, **endings: Callable[[int], str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            files = {"png": png(number)} | {e: f(number).encode() for e, f in endings.items()}
            for ending, data in files.items():
                member = tarfile.TarInfo(f"a/{number:05}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_tars_hold_images_and_labels(tmp_path: Path) -> None:
    for shard in range(2):
        numbers = range(shard * 10, shard * 10 + 10)
        write_tar(tmp_path / f"pets-{shard:03}.tar", numbers, cls=lambda n: str(n % 2))
    for path in (tmp_path, tmp_path / "pets-{000..001}.tar"):
        domain = load(path, "webdataset")
        assert domain.fingerprint() == expected().fingerprint()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert load(tmp_path, "webdataset").classes == ("cat", "dog")
    refused(tmp_path / "pets-{001..000}.tar", "webdataset", "counts down from 001 to 000")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "pets.tar.gz").write_bytes(b"")
    for packed in (tmp_path / "packed", tmp_path / "packed" / "pets.tar.gz"):
        refused(packed, "webdataset", "unpack pets.tar.gz (gunzip)")
    words = ("2 of 4 files are missing", "pets-002.tar")
    refused(tmp_path / "pets-{000..003}.tar", "webdataset", *words)


def test_tars_of_splits_hold_labels_in_json(tmp_path: Path) -> None:
    def label(number: int) -> str:
        return json.dumps({"label": ["ibis", "heron"][number % 2], "kind": number % 2})

    write_tar(tmp_path / "train" / "0.tar", range(20), json=label)
    write_tar(tmp_path / "test" / "0.tar", range(20, 26), json=label)
    domain = load(tmp_path, "webdataset")
    assert domain.classes == ("heron", "ibis")
    assert domain.test.labels.tolist() == [1, 0] * 3
    named = load(tmp_path, "webdataset", label_column="kind")
    assert named.test.labels.tolist() == [0, 1] * 3


def test_damaged_tars_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, range(20), txt=lambda _: "a caption")
    refused(path, "webdataset", "no labels")
    assert load(path, "webdataset", labels="none").classes == ("image",)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    refused(path, "webdataset", "cannot be read as a tar file")
    path.write_bytes(gzip.compress(whole))
    refused(path, "webdataset", "gunzip")
    for text in ("{", "[" * 10**5):
        write_tar(path, range(20), json=lambda _, text=text: text)  # type: ignore[misc]
        refused(path, "webdataset", "cannot be read")
    write_tar(path, range(20), cls=lambda n: "9" * 5000 if n % 2 else "0")
    refused(path, "webdataset", "some labels are numbers and some are names")
    write_tar(path, range(20), cls=lambda n: "h\u00e9ron" if n else "ibis")
    path.write_bytes(path.read_bytes().replace("h\u00e9ron".encode(), b"h\xe9rons"))
    refused(path, "webdataset", "a/00001.cls is not UTF-8 text")
    write_tar(path, range(20), cls=str)
    (tmp_path / "classnames.txt").write_bytes(b"\xff")
    refused(path, "webdataset", "classnames.txt is not UTF-8")


# --- Tables of labels -----------------------------------------------------------------------------


def write_flat(folder: Path, numbers: range, name: str, line: str, head: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:02}.png").write_bytes(png(number))
    rows = [line % (f"{number:02}.png", number % 2) for number in numbers]
    (folder / name).write_text("\n".join([*([head] if head else []), *rows]) + "\n")


TABLES = {
    "labels.csv": ("%s,%s", "file_name,label"),
    "metadata.csv": ("3,%s,%s", "id,file_name,label"),
    "metadata.jsonl": ('{"file_name": "%s", "label": %s}', ""),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_says_which_class_an_image_is_of(tmp_path: Path, name: str) -> None:
    write_flat(tmp_path / "flat", range(20), name, *TABLES[name])
    (tmp_path / "flat" / "extra.png").write_bytes(png(50))
    domain = load(tmp_path / "flat", "folder")
    assert domain.fingerprint() == expected().fingerprint()
    said = (f"labels from {name}", "1 images without a label left out")
    assert domain.remarks[:2] == said


def test_tables_may_lie_in_splits_or_name_them(tmp_path: Path) -> None:
    write_flat(tmp_path / "a" / "train", range(20), "labels.csv", *TABLES["labels.csv"])
    write_flat(tmp_path / "a" / "validation", range(8), "metadata.csv", *TABLES["metadata.csv"])
    first = load(tmp_path / "a", "folder")
    assert (len(first.train), len(first.validation), len(first.test)) == (18, 2, 8)
    (tmp_path / "a" / "train" / "labels.csv").unlink()
    (tmp_path / "a" / "validation" / "metadata.csv").unlink()
    rows = [f"train/{n:02}.png,{n % 2}" for n in range(20)]
    rows += [f"validation/{n:02}.png,{n % 2}" for n in range(8)]
    (tmp_path / "a" / "labels.csv").write_text("\n".join(["image,breed", *rows]))
    named = load(tmp_path / "a", "folder", image_column="image", label_column="breed")
    assert named.fingerprint() == first.fingerprint()


def test_a_tables_images_are_split_by_folders_only_if_all_lie_in_them(tmp_path: Path) -> None:
    for folder, numbers in (("test", range(10)), ("heron", range(10, 20))):
        write_flat(tmp_path / folder, numbers, "rows", "%s%s")
    rows = [f"{'test' if n < 10 else 'heron'}/{n:02}.png,{n % 2}" for n in range(20)]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,label", *rows]))
    domain = load(tmp_path, "folder")
    assert domain.fingerprint() == expected().fingerprint()
    assert "test/ is no split, as other images lie in none" in domain.remarks


def test_a_table_in_a_folder_of_the_same_name_is_read_as_well(tmp_path: Path) -> None:
    outer = tmp_path / "train"
    write_flat(outer / "train", range(10), "labels.csv", *TABLES["labels.csv"])
    write_flat(outer / "train", range(10, 20), "rows", "%s%s")
    rows = [f"train/{n:02}.png,{n % 2}" for n in range(10, 20)]
    (outer / "labels.csv").write_text("\n".join(["file_name,label", *rows]))
    domain = load(outer, "folder")
    assert len(domain.train) + len(domain.validation) + len(domain.test) == 20


@pytest.mark.parametrize("label", [2**63, 2**64, -(2**63) - 1])
def test_a_label_beyond_64_bits_is_refused(tmp_path: Path, label: int) -> None:
    write_flat(tmp_path / "f", range(8), "metadata.jsonl", *TABLES["metadata.jsonl"])
    file = tmp_path / "f" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"label": 1', f'"label": {label}'))
    refused(tmp_path / "f", "folder", f"a label is {label}", "one integer or name")


@pytest.mark.parametrize("label", [0, 1])
def test_an_image_of_several_rows_is_refused(tmp_path: Path, label: int) -> None:
    write_flat(tmp_path / "f", range(8), "labels.csv", *TABLES["labels.csv"])
    with (tmp_path / "f" / "labels.csv").open("a") as file:
        file.write(f"./00.png,{label}\n")
    refused(tmp_path / "f", "folder", f"00.png has several rows, label 0 and {label}: keep one")


def test_a_table_without_labels_leaves_folders_as_they_are(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        write_flat(tmp_path / name, range(number, 20, 2), "metadata.csv", "%s,%s", "file_name,text")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a/00.png", "text": "a bird"}')
    assert load(tmp_path, "folder").classes == ("a", "b")


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        ("file_name,label\nno.png,a\n", {}, ["1 of 1 images are not there", "no.png"]),
        ("file_name,label\n00.png,\n", {}, ["a row has file_name '00.png' and label ''"]),
        ("id,breed\n00.png,a\n", {}, ["holds no folders", "labels.csv of file_name and label"]),
        ("id,breed\n00.png,a\n", {"image_column": "id"}, ["'breed, id'", "label_column"]),
        ("file_name,label\n\x00\xff", {}, ["labels.csv cannot be read"]),
        ("file_name,label\n../00.png,a\n", {}, ["'../00.png' leads elsewhere"]),
        ("file_name,label\n/00.png,a\n", {}, ["'/00.png' leads elsewhere"]),
        ("id,breed\n00.png,a,b\n", {"label_column": "x"}, ["'breed, id'"]),
    ],
)
def test_tables_at_fault_are_one_line(
    tmp_path: Path, text: str, fields: dict[str, Any], words: list[str]
) -> None:
    write_flat(tmp_path / "f", range(4), "labels.csv", "%s%s")
    (tmp_path / "f" / "labels.csv").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "f", "folder", *words, **fields)


def test_columns_are_of_tables(tmp_path: Path) -> None:
    refused(tmp_path, "npz", "remove them", label_column="label")
    (tmp_path / "a").mkdir()
    refused(tmp_path, "folder", "no table of images", label_column="label")


def test_a_saved_data_set_is_named_as_such(tmp_path: Path) -> None:
    for name, folder in (("state.json", "whole"), ("dataset_dict.json", "splits")):
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / name).write_text("{}")
        (tmp_path / folder / "train" / "data-0.arrow").touch()
        with pytest.raises(DataError, match="saved Hugging Face data set: set source = 'datasets'"):
            load_domain(DomainSpec(source="folder", path=str(tmp_path / folder)))
