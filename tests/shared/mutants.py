"""What strangers may hand over, made at random: run files, records, weights and archives, each read
as a command reads it.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "run files": _read_run_file,
    "records": _read_record,
    "weights": _read_weights,
    "archives": _read_archive,
}


def read(kind: str, seed: int, folder: Path) -> str:
    """Read a thing of a kind, made from the seed in a folder; return why it was refused, if so.

    Raises what no user can act on: any other exception, and AssertionError for a message that is
    long or that a terminal would take for commands.
    """
    try:
        KINDS[kind](random.Random(seed), folder)
    except SophonError as error:
        said = str(error)
        assert len(said) <= 600, said
        assert len(said.splitlines()) <= 2, said
        assert all(line.isprintable() for line in said.splitlines()), ascii(said)
        return said
    return ""
