"""Read thousands of things that strangers may hand over, and count what no message explains.

    python benchmarks/fuzz.py [--quick] [--seed N]

Run files, audit records, files of weights, and images in archives, tars, saved data sets and with
tables of labels are changed at random (`tests/shared/mutants.py`) and read as the commands read
them, in this process. Each must be taken or refused in two lines. The process ends at once where
reading starts a process, connects a socket or opens a file for writing outside the scratch folder.
It fails where there was a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
sys.dont_write_bytecode = True

from mutants import KINDS, read  # noqa: E402 - from the tests' folder

AMOUNTS = {"run files": 10_000, "records": 1_000, "weights": 500, "archives": 400}
AMOUNTS |= {"tables": 300, "tars": 300, "datasets": 300}
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn")
_FORBIDDEN = (*_STARTS, "os.spawn", "os.startfile", "pty.spawn", "socket.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watched(scratch: Path) -> None:
    """End the process, for good, at the first forbidden event."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        fault = event in _FORBIDDEN
        if event == "open" and arguments[2] & _WRITING and not isinstance(arguments[0], int):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            fault = path != os.devnull and not path.startswith(f"{scratch}{os.sep}")
        if fault:
            # No handler of what is being read may take this for a damaged file.
            sys.stderr.write(f"forbidden: {event} {arguments!r:.200}\n")
            traceback.print_stack()
            sys.stderr.flush()
            os._exit(3)

    sys.addaudithook(hook)


def main() -> int:
    """Print the table; return 1 where anything ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of all")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, help="this kind alone")
    chosen = parser.parse_args()
    faults: Counter[str] = Counter()
    first: dict[str, str] = {}
    print(f"{'kind':12}{'read':>8}{'taken':>8}{'refused':>9}{'tracebacks':>12}{'slowest':>10}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        tempfile.tempdir = str(scratch)
        watched(scratch)
        for kind in [chosen.kind] if chosen.kind else KINDS:
            amount = AMOUNTS[kind] // (10 if chosen.quick else 1)
            ended: Counter[str] = Counter()
            slowest = 0.0
            for seed in range(chosen.seed, chosen.seed + amount):
                begun = time.perf_counter()
                try:
                    ended["refused" if read(kind, seed, scratch) else "taken"] += 1
                except Exception as error:  # noqa: BLE001 - what is counted
                    ended["tracebacks"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    place = f"{Path(where.filename).name}:{where.lineno}"
                    fault = f"{kind}: {type(error).__name__} at {place}"
                    faults[fault] += 1
                    first.setdefault(fault, f"seed {seed}: {str(error)[:150]!r}")
                slowest = max(slowest, time.perf_counter() - begun)
            counts = f"{ended['taken']:8}{ended['refused']:9}{ended['tracebacks']:12}"
            print(f"{kind:12}{amount:8}{counts}{slowest:8.2f} s", flush=True)
    for fault, count in faults.most_common():
        print(f"{count} x {fault} ({first[fault]})")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
