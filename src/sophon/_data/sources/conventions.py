"""Conventions of known domains, from `sets.toml`: class orders, means and standard deviations."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from sophon._base.errors import DataError, unknown

# The tables of `sets.toml`, by name.
SETS = tomllib.loads(Path(__file__).with_name("sets.toml").read_text(encoding="utf-8"))
CLASS_ORDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple(map(tuple, places)) for name, places in SETS["class_orders"].items()
}


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation on pixels scaled to [0, 1], and their source."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


NORMALISATIONS = {
    name: Normalisation(tuple(held["mean"]), tuple(held["std"]), held["source"])
    for name, held in SETS["normalisations"].items()
}


def normalisation_of(name: str) -> Normalisation:
    """Return a named normalisation. Raises DataError, listing those there are."""
    if name not in NORMALISATIONS:
        raise DataError(unknown("normalisation", name, NORMALISATIONS))
    return NORMALISATIONS[name]


def ordered_classes(names: tuple[str, ...], order: str) -> tuple[int, ...]:
    """Return, for each place of a class order, which of `names` (in label order) belongs there.

    Classes that the order does not name are left out. Raises DataError for an order that does not
    exist and for a place that no class fills.
    """
    if order not in CLASS_ORDERS:
        raise DataError(unknown("class_order", order, CLASS_ORDERS))
    found = {name: label for label, name in enumerate(names)}
    chosen = []
    for synonyms in CLASS_ORDERS[order]:
        labels = [found[name] for name in synonyms if name in found]
        if not labels:
            raise DataError(
                f"class_order = {order!r} needs a class {' or '.join(synonyms)}; the classes are "
                f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
            )
        chosen.append(labels[0])
    return tuple(chosen)
