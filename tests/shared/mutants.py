"""What strangers may hand over, made at random: run files, records, weights, archives, saved data
sets, tars and tables of labels, each read as a command reads it.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save

from sophon._base.errors import SophonError
from sophon._cli.demo import RUN
from sophon._cli.reading import read_record
from sophon._cli.run_file import parse_run
from sophon._data import load_domain
from sophon._models import resolve_model
from sophon._models.networks import SmallConvNet
from sophon._reporting.report import report
from sophon._specs import DomainSpec, ModelSpec
from sophon._training.environment import domain_text

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*-sampled.toml"))
DEEP = 3000
VALUES = (
    *("9" * 5000, "9" * 30, "1e400", "1e-320", "-inf", "nan", "-1", "0", "0x" + "f" * 300),
    *("true", '""', "[]", "{}", "[[[[1]]]]", '"x"', "2020-01-01", "[1, 2]", "{a = 1}", '"\\u0000"'),
    *("'''", '"joint"', '[{kind = "erasure"}]', '{kind = "heal"}', "{sgd = [1e-320, 0.1]}"),
    *('[[{kind = "fresh_head"}, {kind = "heal"}]]', f'"{"y" * 100_000}"', "[" * DEEP + "]" * DEEP),
    *("{a = " * DEEP + "1" + "}" * DEEP, "[" + "1," * 50_000 + "]", '"C:\\Users\\me"'),
)
LINES = (
    *("[x" + ".y" * DEEP + "]", "a" + ".b" * DEEP + " = 1", '"a".' * DEEP + "b = 1", "[protect]"),
    *(
        "\n".join(f"k{n} = 1" for n in range(DEEP)),
        "[model.arguments]\nx = [[1]]",
        '"' + '\\"' * DEEP,
    ),
    *('[[protect.hinder]]\nkind = "rehearsal"\nsteps = -1', '[protect.update]\nkind = "joint"'),
)
# What may stand anywhere in JSON in the place of something else.
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1e308, -1e-320, 0.5, "", "x" * 5000, "\x1b[31m", "<script>"),
    *([], {}, [[]], {"": None}, [None], "\ud800", float("nan"), float("inf")),
)
_DTYPES = (torch.int64, torch.bool, torch.float16, torch.float64, torch.complex64, torch.int8)


def run_file(chance: random.Random) -> str:
    """Return the text of a run file in which up to three places were changed."""
    texts = [RUN, *(path.read_text() for path in RECIPES)]
    lines = chance.choice(texts).splitlines()
    for _ in range(chance.randint(1, 3)):
        at, how = chance.randrange(len(lines)), chance.random()
        key, equals, _ = lines[at].partition("=")
        if how < 0.5 and equals:
            lines[at] = f"{key}= {chance.choice(VALUES)}"
        elif how < 0.7:
            lines.insert(at, chance.choice([*LINES, *lines]))
        elif how < 0.8:
            lines[at] = lines[at].replace("[[", "[").replace("]]", "]")
        else:
            where = chance.randrange(len(lines[at]) + 1)
            wrong = chance.choice("[]{}=\"'.,\\#\0é9-")
            lines[at] = lines[at][:where] + wrong + lines[at][where + 1 :]
    return "\n".join(lines)


def record(chance: random.Random) -> bytes:
    """Return the record of an audit with changed bytes, or values, or without some of them."""
    text = _record()
    if chance.random() < 0.2:
        return flipped(chance, text)
    held = json.loads(text)
    for _ in range(chance.choice([1, 1, 2])):
        within: Any = held
        while isinstance(within, dict | list) and within:
            keys = list(within) if isinstance(within, dict) else list(range(len(within)))
            key = chance.choice(keys)
            deeper = within[key]
            if not deeper or not isinstance(deeper, dict | list) or chance.random() < 0.15:
                _change(chance, within, key)
                break
            within = deeper
    return json.dumps(held).encode("utf-8", "surrogatepass")


def _change(chance: random.Random, within: Any, key: Any) -> None:
    how, value = chance.random(), within[key]
    if how < 0.1:
        del within[key]
    elif how < 0.25 and isinstance(within, list):
        within.append(value)
    elif how < 0.8:
        # Of the same type, which is what gets as far as the report.
        alike = [one for one in _ODD if type(one) is type(value)]
        if type(value) in (int, float):
            alike += [value * 2, value + 1, value - 1, value * 0, type(value)(10**9)]
        within[key] = chance.choice(alike or [value])
    else:
        within[key] = chance.choice(_ODD)


@cache
def _record() -> bytes:
    return (ROOT / "tests/records/record-v1.json").read_bytes()


def flipped(chance: random.Random, held: bytes) -> bytes:
    """Return bytes with up to four of them changed, or without their end."""
    changed = bytearray(held)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.15 else changed)


@cache
def _state() -> dict[str, torch.Tensor]:
    return dict(SmallConvNet(classes=5).state_dict())


def weights(chance: random.Random) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a file of weights: odd tensors or keys, changed bytes."""
    held: dict[str, Any] = dict(_state())
    for _ in range(chance.randint(0, 2)):
        key = chance.choice(list(held))
        value, how = held.pop(key), chance.random()
        if how < 0.3:
            held[key] = value.to(chance.choice(_DTYPES))
        elif how < 0.5:
            held[key] = torch.zeros(chance.choices([0, 1, 3, 24], k=chance.randint(0, 4)))
        elif how < 0.7:
            held[key] = torch.full_like(value, chance.choice([3, 0])) * float("nan")
        elif how < 0.9:
            held[chance.choice(["\x1b[31m", "a" * 9000, f"module.{key}", "model", ""])] = value
    nested = chance.choice([held, {"state_dict": held}, {"model": held, "epoch": 3}, [held], {}])
    plain = chance.random() < 0.5
    if plain:
        whole = save({key: value.contiguous() for key, value in held.items()})
    else:
        file = io.BytesIO()
        torch.save(nested, file, _use_new_zipfile_serialization=chance.random() < 0.5)
        whole = file.getvalue()
    # In the head, where a format says what follows, changes tell more.
    head = chance.choice([len(whole), min(2000, len(whole))])
    whole = whole if chance.random() < 0.3 else flipped(chance, whole[:head]) + whole[head:]
    return (".safetensors" if plain == (chance.random() < 0.95) else ".pth"), whole


def archive(chance: random.Random) -> bytes:
    """Return an npz archive with odd arrays, or with changed bytes."""
    stream = np.random.default_rng(chance.randrange(2**32))
    held: dict[str, Any] = {
        "x_train": stream.integers(0, 256, (30, 6, 6), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": stream.integers(0, 256, (9, 6, 6), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
        "classes": np.array(["a", "b", "c"]),
    }
    for _ in range(chance.randint(0, 2)):
        key = chance.choice(list(held))
        value, how = held.pop(key), chance.random()
        if how < 0.5:
            kinds = ("float32", "int8", "bool", "complex64", "S3", "U3", "M8[s]", "uint64")
            held[key] = np.zeros(value.shape, chance.choice(kinds))
        elif how < 0.8:
            shapes = ((), (0,), (30,), (30, 6), (30, 6, 6, 3), (30, 6, 6, 3, 1), (9, 3, 6, 6))
            held[key] = np.zeros(chance.choice(shapes), value.dtype)
        elif how < 0.9:
            held[chance.choice(["x", "\x1b[31m", "mean", "../a", ""])] = value
    file = io.BytesIO()
    (np.savez if chance.random() < 0.7 else np.savez_compressed)(file, **held)
    whole = file.getvalue()
    return whole if chance.random() < 0.3 else flipped(chance, whole)


@cache
def _pictures() -> list[bytes]:
    """Return small image files of several formats, each another picture."""
    held = []
    for number in range(12):
        stream = np.random.default_rng(number)
        file = io.BytesIO()
        picture = Image.fromarray(stream.integers(0, 256, (8, 7, 3), dtype=np.uint8))
        picture.save(file, ("PNG", "JPEG", "BMP", "GIF")[number % 4])
        held.append(file.getvalue())
    return held


def _picture(chance: random.Random) -> bytes:
    held, how = chance.choice(_pictures()), chance.random()
    odd = [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG", b"x" * 3000]
    return held if how < 0.99 else flipped(chance, held) if how < 0.997 else chance.choice(odd)


def _files(chance: random.Random, count: int = 24) -> dict[str, bytes]:
    return {f"{number:03}.png": _picture(chance) for number in range(count)}


def table(chance: random.Random) -> tuple[str, bytes, dict[str, bytes]]:
    """Return the name and bytes of a table of labels, with odd rows or bytes, and its images."""
    files, name = _files(chance), chance.choice(["labels.csv", "metadata.csv", "metadata.jsonl"])
    rows: list[Any] = [{"file_name": one, "label": f"c{n % 3}"} for n, one in enumerate(files)]
    for _ in range(chance.randint(0, 2)):
        row, key = chance.choice(rows), chance.choice(["file_name", "label"])
        row[key] = chance.choice([*_ODD, *_PLACES, *_LABELS])
    lines = [json.dumps(row) for row in rows]
    if name.endswith(".csv"):
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerows([["file_name", "label"], *([row[k] for k in row] for row in rows)])
        lines = file.getvalue().splitlines()
    for _ in range(chance.randint(0, 1)):
        at = chance.randrange(len(lines))
        lines[at] = chance.choice([*_ROWS, lines[at] + ",more", lines[at][1:], lines[at] * 2])
    whole = "\n".join(lines).encode("utf-8", "surrogatepass")
    return name, whole if chance.random() < 0.7 else flipped(chance, whole), files


# Where a name of a file may lead, what a label may be, and lines of a table.
_PLACES = ("../x.png", "/etc/passwd", "a\0b.png", ".", "000.png/x", "http://127.0.0.1/a.png", "~/x")
_LABELS = ([1, 2], {"a": 1}, 2**70, "9" * 5000, -1, "-1", 1.5, "c0\nc1", "\x1b[2J", " ", "c" * 9000)
_ROWS = ("", ",", '"', "[" * 3000, "{}", "null", "[]", '{"a": NaN}', "\0", "a;b", '"a" "b"', "é")


def tar(chance: random.Random) -> bytes:
    """Return a tar file of samples with odd members, or with changed bytes."""
    file = io.BytesIO()
    form = chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=file, mode="w", format=form) as held:
        for number, data in enumerate(_files(chance).values()):
            label = str(number % 3) if chance.random() < 0.99 else chance.choice(_LABELS)
            said = chance.random() < 0.98
            ending, text = ("cls", label) if said else ("json", {"cls": label})
            known = json.dumps(text) if not isinstance(text, str) else text
            odd = chance.random() < 0.02
            for name, content in (
                (f"a/{number:03}.{chance.choice(_ENDINGS) if odd else 'png'}", data),
                (f"a/{number:03}.{ending}", known.encode("utf-8", "surrogatepass")),
            ):
                member = tarfile.TarInfo(name if chance.random() < 0.99 else chance.choice(_NAMES))
                member.size = len(content)
                if chance.random() < 0.01:
                    member.type = chance.choice(
                        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
                    )
                    member.linkname, member.size = "/etc/passwd", 0
                held.addfile(member, io.BytesIO(content))
    whole = file.getvalue()
    # In a head of 512 bytes, where sizes stand, changes tell more than in padding.
    head = chance.choice([len(whole), 512, 2048])
    whole = whole if chance.random() < 0.4 else flipped(chance, whole[:head]) + whole[head:]
    return whole if chance.random() < 0.97 else gzip.compress(whole)


_ENDINGS = ("PNG", "seg.png", "eps", "txt", "json", "cls", "")
_NAMES = (
    "../x.png",
    "/etc/x.png",
    "a",
    ".png",
    "a/.cls",
    "x" * 300 + ".png",
    "\x1b[31m.png",
    "a//",
)


def saved_dataset(chance: random.Random, folder: Path) -> None:
    """Write a data set as `save_to_disk` or `to_parquet` do, with odd columns, values of its tables
    of JSON, or bytes.
    """
    library = importlib.import_module("datasets")
    library.disable_progress_bars()
    kind = chance.choice([library.ClassLabel(names=["a", "b", "c"]), None, library.Value("string")])
    named = [{"bytes": one, "path": None} for one in _files(chance).values()]
    if chance.random() < 0.2:
        named[chance.randrange(24)] = {"bytes": None, "path": str(chance.choice(_PLACES))}
    labels: list[Any] = [n % 3 if kind is not None else n % 2 for n in range(24)]
    if kind is not None and chance.random() < 0.1:
        labels[chance.randrange(24)] = chance.choice([None, -1])
    labels = [str(one) for one in labels] if isinstance(kind, library.Value) else labels
    image = chance.choice(["image", "image", "image", "img", "x", ""])
    features = {image: library.Image(), "label": kind or library.Value("int64")}
    if chance.random() < 0.05:
        features, labels = features | {"label": library.List(library.Value("int64"))}, [[1, 2]] * 24
    if chance.random() < 0.3:
        # Written as it is: the library would read the files that paths name.
        held = pyarrow.table(
            {image: named, "label": labels}, schema=library.Features(features).arrow_schema
        )
        parquet.write_table(held, folder / f"{chance.choice(['train', 'x', 'test'])}.parquet")
    else:
        named = [{"bytes": one["bytes"] or b"", "path": None} for one in named]
        made = library.Dataset.from_dict(
            {image: named, "label": labels}, features=library.Features(features)
        )
        (library.DatasetDict(train=made) if chance.random() < 0.3 else made).save_to_disk(folder)
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    for file in chance.sample(files, chance.randint(0, min(2, len(files)))):
        _damage(chance, file)


def _damage(chance: random.Random, file: Path) -> None:
    """Change a value of a table of JSON, or bytes of a file, or take it away."""
    how, whole = chance.random(), file.read_bytes()
    if how < 0.1:
        file.unlink()
    elif how < 0.7 and file.suffix == ".json":
        held: Any = json.loads(whole)
        within: Any = held
        while isinstance(within, dict | list) and within:
            key = chance.choice(list(within) if isinstance(within, dict) else range(len(within)))
            if not isinstance(within[key], dict | list) or chance.random() < 0.3:
                within[key] = chance.choice([*_ODD, *_PLACES, "Audio", "torch", "custom"])
                break
            within = within[key]
        file.write_bytes(json.dumps(held).encode("utf-8", "surrogatepass"))
    else:
        # Where tables describe themselves: Parquet at its end, Arrow at its beginning.
        cut = max(0, len(whole) - 900) if file.suffix == ".parquet" else 0
        size = chance.choice([900, len(whole)])
        part = whole[cut : cut + size]
        file.write_bytes(
            whole[:cut] + (flipped(chance, part) if part else b"x") + whole[cut + size :]
        )


def _read_run_file(chance: random.Random, folder: Path) -> None:
    parse_run(run_file(chance), [], where="run.toml")


def _read_record(chance: random.Random, folder: Path) -> None:
    (folder / "record.json").write_bytes(record(chance))
    made = report(read_record(folder / "record.json"))
    made.write_html(folder / "report.html")
    made.write_markdown(folder / "report.md")


def _read_weights(chance: random.Random, folder: Path) -> None:
    suffix, held = weights(chance)
    (folder / f"w{suffix}").write_bytes(held)
    resolve_model(ModelSpec(name="small_convnet", weights=f"w{suffix}"), base=folder)


def _read_archive(chance: random.Random, folder: Path) -> None:
    (folder / "x.npz").write_bytes(archive(chance))
    load_domain(DomainSpec(source="npz", path="x.npz"), base=folder)


def _read_table(chance: random.Random, folder: Path) -> None:
    name, whole, files = table(chance)
    for file, data in {name: whole, **files}.items():
        (folder / file).write_bytes(data)
    _read_domain(chance, "folder", folder)


def _read_tar(chance: random.Random, folder: Path) -> None:
    (folder / "x.tar").write_bytes(tar(chance))
    _read_domain(chance, "webdataset", folder)


def _read_saved_dataset(chance: random.Random, folder: Path) -> None:
    saved_dataset(chance, folder)
    _read_domain(chance, "datasets", folder)


def _read_domain(chance: random.Random, source: str, folder: Path) -> None:
    on_error: Any = chance.choice(["error", "skip"])
    domain = load_domain(DomainSpec(source=source, path=str(folder), on_error=on_error))
    domain_text(domain, domain, ((0.5,), (0.5,)), None)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "run files": _read_run_file,
    "records": _read_record,
    "weights": _read_weights,
    "archives": _read_archive,
    "tables": _read_table,
    "tars": _read_tar,
    "datasets": _read_saved_dataset,
}


def read(kind: str, seed: int, folder: Path) -> str:
    """Read a thing of a kind, made from the seed in a folder; return why it was refused, if so.

    Raises what no user can act on: any other exception, and AssertionError for a message that is
    long or that a terminal would take for commands.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            KINDS[kind](random.Random(seed), Path(place))
    except SophonError as error:
        said = str(error)
        assert len(said) <= 600, said
        assert len(said.splitlines()) <= 2, said
        assert all(line.isprintable() for line in said.splitlines()), ascii(said)
        return said
    return ""
