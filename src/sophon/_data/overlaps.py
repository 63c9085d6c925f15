"""Images that domains share, exactly or nearly: pixel by pixel, and by perceptual hash."""

from __future__ import annotations

import hashlib
import itertools
from functools import partial

import torch

from sophon._data.domain import Domain
from sophon._data.images import Images
from sophon._records.audit_record import Overlap

# Difference hashes of 64 bits that differ in at most so many bits are looked at again.
_BITS = 4
# Near duplicates: thumbnails whose correlation is at least this.
_ALIKE = 0.995
_THUMBNAIL = 16
_CHUNK = 512


def overlaps_of(domains: tuple[Domain, ...]) -> tuple[Overlap, ...]:
    """Return the overlap of every test and validation split with its own training split, of every
    test split with its own validation split, and of every split with every one of other domains.
    """
    measured = ("test", "validation")
    pairs: list[tuple[Domain, str, Domain, str]] = [
        (domain, split, domain, "train") for domain in domains for split in measured
    ]
    # What chooses attacks and steps must not be what measures them.
    pairs += [(domain, "test", domain, "validation") for domain in domains]
    for first, second in itertools.combinations(domains, 2):
        pairs.append((second, "train", first, "train"))
        pairs += [(second, split, first, "train") for split in measured]
        pairs += [(first, split, second, "train") for split in measured]
        pairs += [
            _smaller_first((second, one, first, other)) for one in measured for other in measured
        ]
    prints: dict[tuple[str, str], _Prints] = {}

    def of(domain: Domain, split: str) -> _Prints:
        if (domain.name, split) not in prints:
            prints[domain.name, split] = _Prints(getattr(domain, split))
        return prints[domain.name, split]

    return tuple(
        _overlap(f"{a.name}/{one}", of(a, one), f"{b.name}/{other}", of(b, other))
        for a, one, b, other in pairs
    )


def _smaller_first(pair: tuple[Domain, str, Domain, str]) -> tuple[Domain, str, Domain, str]:
    """Return a pair of splits, the one of fewer images first: of it most may be shared."""
    a, one, b, other = pair
    return pair if len(getattr(a, one)) <= len(getattr(b, other)) else (b, other, a, one)


def copies(images: Images, others: Images) -> int:
    """Return how many of `images` are, exactly or nearly and in whatever size, among `others`."""
    found = _overlap("", _Prints(images), "", _Prints(others))
    return found.exact + found.near


class _Prints:
    """A split's fingerprints: hashes of bytes, difference hashes (n, 64), thumbnails (n, 256)."""

    def __init__(self, images: Images) -> None:
        size = str(tuple(images.pixels.shape[1:])).encode()
        self.bytes = [
            hashlib.sha256(size + image.numpy().tobytes()).digest() for image in images.pixels
        ]
        small, thumbnails = _reduced(images)
        # As plus and minus one: then a product tells in how many bits two hashes differ.
        self.hashes = 2.0 * (small[:, :, 1:] > small[:, :, :-1]).flatten(1).float() - 1.0
        thumbnails = thumbnails.flatten(1)
        thumbnails = thumbnails - thumbnails.mean(1, keepdim=True)
        self.flat = thumbnails.norm(dim=1) < 1e-3
        self.thumbnails = torch.nn.functional.normalize(thumbnails, dim=1)


def _reduced(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images in grey, in [0, 1], as (n, 8, 9) and as thumbnails (n, 16, 16).

    Some at a time: the floats of all would take many times the memory of the images.
    """
    sizes = ((8, 9), (_THUMBNAIL, _THUMBNAIL))
    reduce = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
    parts = []
    for part in images.pixels.split(_CHUNK):
        grey = part.float().mean(1, keepdim=True) / 255
        parts.append([reduce(grey, size, align_corners=False)[:, 0] for size in sizes])
    small, thumbnails = (torch.cat(held) for held in zip(*parts, strict=True))
    return small, thumbnails


def _overlap(first: str, one: _Prints, second: str, other: _Prints) -> Overlap:
    """Compare every image of the first split with every one of the second.

    Exact are images with the same pixels; near ones look alike, in whatever size or colour.
    """
    held = set(other.bytes)
    same = torch.tensor([image in held for image in one.bytes])
    near = 0
    for start in range(0, len(one.hashes), _CHUNK):
        stop = start + _CHUNK
        distance = (64 - one.hashes[start:stop] @ other.hashes.T) / 2
        close = distance <= _BITS + 0.5
        likeness = one.thumbnails[start:stop] @ other.thumbnails.T
        best = torch.where(close, likeness, -1.0).amax(1)
        # A blank image is like no other.
        best[one.flat[start:stop]] = -1.0
        near += int(((best >= _ALIKE) & ~same[start:stop]).sum())
    return Overlap(
        first=first, second=second, count=len(one.hashes), exact=int(same.sum()), near=near
    )
