"""The `prompts` source: a folder of images with one prompt each; and one table for domains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sophon._base.errors import DataError, shortened
from sophon._data.domain import Domain
from sophon._data.images import Fit, Images
from sophon._data.sources.folders import named_file, present, read_later, sorted_out
from sophon._data.splits import Contents

TABLE = "metadata.jsonl"


def read_prompts(path: Path, fit: Fit) -> Contents:
    """Return the contents of a folder of images whose prompts stand in `metadata.jsonl`.

    A line is a JSON object with `file_name`, relative to the folder, and `text`, the prompt (the
    layout of an imagefolder with captions). Labels index the prompts, `classes` in the order of
    their first line.

    Raises DataError: no table, a line that is none, prompts without images or images without
    prompts.
    """
    table = path / TABLE
    if not table.is_file():
        raise DataError(f"there is no file {table}; it gives each image's file_name and text")
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 text (byte {error.start}): save it as such"
        ) from None
    rows = [_row(line, number, table) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{table} has no lines; give each image's file_name and text")
    files = [named_file(table, "file_name", name) for name, _ in rows]
    absent = [shortened(file.name) for file in files if not present(file)]
    if absent:
        raise DataError(
            f"{table}: {len(absent)} of {len(rows)} prompts have no image, for instance"
            f" {absent[0]}; add the images or remove the lines"
        )
    bare = sorted(set(sorted_out(path)[0]) - set(files))
    if bare:
        raise DataError(
            f"{table} has no prompt for {bare[0].name} ({len(bare)} images lack one): add their"
            " lines or remove the images"
        )
    prompts = tuple(dict.fromkeys(text for _, text in rows))
    place = {text: number for number, text in enumerate(prompts)}
    labels = [place[text] for _, text in rows]
    return Contents(read_later(files, fit, labels), None, prompts)


def _row(line: str, number: int, table: Path) -> tuple[str, str]:
    try:
        held = json.loads(line)
        name, text = held["file_name"], held["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f'{table} line {number}: give {{"file_name": "a.png", "text": "a prompt"}}'
        ) from None
    if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
        raise DataError(f"{table} line {number}: file_name and text are text, and not empty")
    return name, text


def share_prompts(domains: Sequence[Domain]) -> tuple[Domain, ...]:
    """Return the domains with labels that index one table, the prompts (classes) of all of them.

    `classes` of each is that table.
    """
    table = tuple(dict.fromkeys(name for domain in domains for name in domain.classes))

    def relabelled(images: Images, names: tuple[str, ...]) -> Images:
        index = torch.tensor([table.index(name) for name in names])
        return Images(images.pixels, index[images.labels])

    return tuple(
        replace(
            domain,
            train=relabelled(domain.train, domain.classes),
            validation=relabelled(domain.validation, domain.classes),
            test=relabelled(domain.test, domain.classes),
            classes=table,
        )
        for domain in domains
    )
