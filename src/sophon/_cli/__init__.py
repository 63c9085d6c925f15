"""The command line: the only package that prints results, reads arguments or exits."""

from __future__ import annotations

import os
import sys

# The import adds them to the application.
from sophon._cli import auditing, commands, reading, starting
from sophon._cli.application import app

__all__ = ["app", "auditing", "commands", "main", "reading", "starting"]


def main() -> None:
    """Run the command line; it ends the process with the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file opened would be in its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    app()
