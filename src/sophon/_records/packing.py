"""Which images were right, as bits in a text. No numpy: a record has tens of thousands of them."""

from __future__ import annotations

import base64


def ones(text: str, total: int) -> int | None:
    """Return how many of the `total` bits in a base64 text are set, the first the most significant;
    None where it is no such text, or has other than zeros to fill up its last byte.
    """
    try:
        held = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    bits, spare = int.from_bytes(held), 8 * len(held) - total
    return bits.bit_count() if 0 <= spare < 8 and bits % (1 << spare) == 0 else None
