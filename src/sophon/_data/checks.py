"""Checks on domains that are made before any training starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sophon._base.errors import DataError
from sophon._data.domain import Domain
from sophon._data.images import Images
from sophon._data.overlaps import copies


def check_batch_fits(domain: Domain, needed: int, what: str, *, have: int | None = None) -> None:
    """Raise DataError unless the training split, or the `have` images that an attacker has of
    it, holds a batch of `needed` images.

    `what` names the batch in the message, for instance `batch_size of strategy 3`.
    """
    have = len(domain.train) if have is None else have
    if have < needed:
        raise DataError(
            f"domain {domain.name!r} has {have} training images to use (those for validation"
            f" are not counted), fewer than {what} = {needed}; lower it to at most {have} or"
            " give more images"
        )


def check_distinct(
    first: Domain, second: Domain, roles: tuple[str, str] = ("original", "restricted")
) -> None:
    """Raise DataError if more than half of the training images of one domain are images of the
    other: compared pixel by pixel (any split), or by thumbnails where their sizes differ.
    """
    resized = first.image_shape != second.image_shape
    for one, other in ((second, first), (first, second)):
        found = copies(one.train, other.train) if resized else _found(one.train, other)
        share = found / len(one.train)
        if share > 0.5:
            raise DataError(
                f"{roles[1]} domain {second.name!r} is the same data as the {roles[0]} "
                f"{first.name!r}{' in another size' if resized else ''}: {share:.0%} of the"
                f" training images of {one.name!r} are in both; give each its own images"
            )


def check_apart(original: Domain, restricted: tuple[Domain, ...]) -> None:
    """Raise DataError for two domains of the same images or of the same name."""
    for index, domain in enumerate(restricted):
        check_distinct(original, domain)
        for other in restricted[:index]:
            check_distinct(other, domain, ("restricted", "restricted"))
    names = [domain.name for domain in (original, *restricted)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two domains are named {name!r}: give each its own name")


def _found(images: Images, domain: Domain) -> int:
    """Return how many images are in some split of `domain`, pixel by pixel."""
    splits = (domain.train, domain.validation, domain.test)
    known = {image for split in splits for image in _hashes(split)}
    return sum(image in known for image in _hashes(images))


def _hashes(images: Images) -> Iterator[bytes]:
    shape = str(tuple(images.pixels.shape[1:])).encode()
    for pixels in images.pixels.numpy():
        yield hashlib.blake2b(pixels.data, digest_size=16, key=shape).digest()
