"""The one switch of what makes a run faster and may round otherwise.

With `SOPHON_PLAIN=1` in the environment a run computes the plain way: fp32 where precision is
`auto`, the default memory layout, optimizers that go parameter by parameter, gradients added one
by one. Tests compare both ways; the list of what it switches is in `docs/design/engine.md`.
"""

from __future__ import annotations

import os

SWITCH = "SOPHON_PLAIN"


def plain() -> bool:
    """Return whether optimisations are switched off; worker processes are told."""
    return os.environ.get(SWITCH, "") not in ("", "0")
