"""What splits are called: which of several names is for training, testing, validation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sophon._base.errors import DataError, brief

TRAINING = ("train", "training", "trainval")
TESTS = ("test", "testing", "eval", "evaluation")
# Validation alone is for testing.
HELD = (*TESTS, "val", "valid", "validation", "dev", "development")


def split_of(name: str) -> str:
    """Return the split that a name speaks of (`val` for `seg_Val2017`), or nothing."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    spoken = {word.lower().removesuffix("set") for word in words}
    return next((split for split in (*TRAINING, *HELD) if split in spoken), "")


def precedence(name: str) -> tuple[int, int, str]:
    """Return the order of names of splits: those named for nothing else first."""
    split = split_of(name)
    return int(name.lower() != split), (*TRAINING, *HELD).index(split), name


def roles_of(names: Iterable[str]) -> tuple[str, str | None, str | None]:
    """Return which split is for training, for testing and for validation; None where none is.

    Of several of a kind the plainest name is taken; validation alone is for testing; a split that
    is alone is for training, whatever its name.

    Raises DataError: none of several is for training.
    """
    held = list(names)
    if len(held) == 1:
        return held[0], None, None
    kinds: dict[str, str] = {}
    for name in sorted(filter(split_of, held), key=precedence):
        split = split_of(name)
        kind = "train" if split in TRAINING else "test" if split in TESTS else "validation"
        kinds.setdefault(kind, name)
    if "train" not in kinds:
        raise DataError(
            f"of the splits {brief(', '.join(held))} none is called train: give one of them alone,"
            " or rename it"
        )
    test, validation = kinds.get("test"), kinds.get("validation")
    return (kinds["train"], test, validation) if test else (kinds["train"], validation, None)
