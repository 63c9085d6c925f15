"""What is said beside a result: a line for whoever reads along, through Python's `logging`."""

from __future__ import annotations

import logging
import os

# Without handlers of the caller's own, Python prints its lines on standard error.
LOG = logging.getLogger("sophon")


def remark(line: str) -> None:
    """Say a line, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        LOG.warning("%s", line)
