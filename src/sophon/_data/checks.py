"""Checks on domains that are made before any training starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sophon._data.domain import Domain
from sophon._data.images import Images
from sophon._errors import DataError


def check_batch_fits(domain: Domain, needed: int, what: str) -> None:
    """Raise DataError unless the training split holds a batch of `needed` images.

    `what` names the batch in the message, for instance `batch_size of strategy 3`.
    """
    have = len(domain.train)
    if have < needed:
        raise DataError(
            f"domain {domain.name!r} has {have} training images, fewer than {what} = {needed}; "
            f"lower that to at most {have} or give more images"
        )


def check_distinct(
    first: Domain, second: Domain, roles: tuple[str, str] = ("original", "restricted")
) -> None:
    """Raise DataError if more than half of the training images of one domain, compared pixel by
    pixel, are images of the other (any split).

    Copies that were resized or recompressed are not found.
    """
    for one, other in ((second, first), (first, second)):
        known: set[bytes] = set()
        for split in (other.train, other.validation, other.test):
            known.update(_hashes(split))
        share = sum(image in known for image in _hashes(one.train)) / len(one.train)
        if share > 0.5:
            raise DataError(
                f"{roles[1]} domain {second.name!r} is the same data as the {roles[0]} "
                f"{first.name!r}: {share:.0%} of the training images of {one.name!r} are in"
                " both; give each its own images"
            )


def _hashes(images: Images) -> Iterator[bytes]:
    shape = str(tuple(images.pixels.shape[1:])).encode()
    for pixels in images.pixels.numpy():
        yield hashlib.blake2b(pixels.data, digest_size=16, key=shape).digest()
