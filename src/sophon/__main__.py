"""`python -m sophon` is the command line."""

from __future__ import annotations

from sophon._cli import main

main()
